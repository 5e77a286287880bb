"""probe.py causal and steer on a tiny random SARM: scores by hand, pairs and best-of-n choices counted in loops.

N pairs, M features
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from support import SARM_M as M
from support import (
    feature_flags,
    held_out,
    mean,
    probe_refused,
    run_probe,
    summary,
    widest,
    write_rows,
    z_by_hand,
)

from nanorlhf import world
from nanorlhf.control.feature_edits import on_pairs, on_pool, parse_edits
from nanorlhf.control.feature_texts import groups_of

FUNCTIONS = {
    "set": lambda z, v: v,
    "min": max,
    "max": min,
    "*": lambda z, v: z * v,
    "+": lambda z, v: z + v,
}


def edited_by_hand(z, score, w, edits):
    return score + sum(w[i] * (FUNCTIONS[op](z[i], v) - z[i]) for i, (op, v) in edits.items())


def commonest(z, n):
    """The n latents that fire most often but not always."""
    rates = [mean(row[i] != 0 for row in z) for i in range(M)]
    return sorted((i for i in range(M) if rates[i] < 1), key=lambda i: -rates[i])[:n]


@pytest.fixture(scope="module")
def by_hand(sarm_material):  # noqa: F811
    """{side: [(latents, score)]} of all pairs, one text at a time."""
    root, lm, sarm = sarm_material
    return {
        side: [z_by_hand(lm, sarm, row["prompt"], row[side]) for row in held_out(root)]
        for side in ("chosen", "rejected")
    }


def test_causal_is_every_pair_scored_again(sarm_material, by_hand, tmp_path, capsys):  # noqa: F811
    root, lm, sarm = sarm_material
    w, latents = sarm.score.weight[0].tolist(), [z for side in by_hand.values() for z, _ in side]
    a, b = commonest(latents, 2)
    edits = {a: ("set", 0.0), b: ("max", 0.2)}
    run_probe(
        *feature_flags(
            "causal", root, tmp_path / "out", edits=[f"{a}:set:0", f"{b}:max:0.2"], draws=6
        )
    )
    found, printed = summary(tmp_path / "out"), capsys.readouterr().out
    assert (
        list(found["arms"]) == ["edits", *(f"random {i}" for i in range(6))]
        and widest(printed) <= 140
    )
    rates = [mean(z[i] != 0 for z in latents) for i in range(M)]
    for name, arm in found["arms"].items():
        ids = arm["features"]
        own = dict(zip(ids, edits.values()))
        before = {side: [score for _, score in texts] for side, texts in by_hand.items()}
        after = {
            side: [edited_by_hand(z, score, w, own) for z, score in texts]
            for side, texts in by_hand.items()
        }
        for side in before:
            assert arm[side]["mean"] == pytest.approx(
                mean(y - x for x, y in zip(before[side], after[side])), abs=1e-5
            ), name
        right = [[c > r for c, r in zip(s["chosen"], s["rejected"])] for s in (before, after)]
        assert arm["accuracy_before"]["mean"] == pytest.approx(mean(right[0]))
        assert arm["accuracy_after"]["mean"] == pytest.approx(mean(right[1]))
        assert arm["accuracy_change"]["mean"] == pytest.approx(mean(right[1]) - mean(right[0]))
        assert (
            arm["accuracy_change"]["low"]
            <= arm["accuracy_change"]["mean"]
            <= arm["accuracy_change"]["high"]
        )
        assert arm["reordered"] == sum(x != y for x, y in zip(*right))
        moved = [any(FUNCTIONS[op](z[i], v) != z[i] for i, (op, v) in own.items()) for z in latents]
        assert arm["changed"] == pytest.approx(mean(moved))
        assert arm["rates"] == pytest.approx([rates[i] for i in ids])
        if name != "edits":
            assert not set(ids) & {a, b} and len(set(ids)) == 2
    assert (
        len({i for arm in found["arms"].values() for i in arm["features"]}) == 2 * 7
    )  # no latent is drawn twice
    assert found["arms"]["edits"]["features"] == [a, b] and found["arms"]["edits"]["reordered"] > 0


def test_best_of_n_choices_that_turn_over(sarm_material, by_hand, tmp_path, capsys):  # noqa: F811
    """Prompts with 6 and 7 answers, the best of 3 in turn: the seventh is left out."""
    root, lm, sarm = sarm_material
    w = sarm.score.weight[0].tolist()
    answers = [row["response"] for row in world.demonstrations(39)]
    rows, start = [], 0
    for k, row in enumerate(world.prompts("test")[:6]):
        responses = answers[start : (start := start + 6 + k % 2)]
        rows.append(
            {
                "prompt": row["prompt"],
                "responses": responses,
                "gold_scores": [float(i) for i in range(len(responses))],
            }
        )
    write_rows(tmp_path / "pool.jsonl", rows)
    (a,) = commonest([z for z, _ in by_hand["chosen"]], 1)
    run_probe(
        *feature_flags(
            "causal",
            root,
            tmp_path / "out",
            edits=f"{a}:+:9",
            pool=tmp_path / "pool.jsonl",
            n=3,
            draws=1,
        )
    )
    run_probe(
        *feature_flags(
            "causal",
            root,
            tmp_path / "off",
            edits=f"{a}:set:-3",
            pool=tmp_path / "pool.jsonl",
            n=3,
            draws=1,
        )
    )
    assert "best of 3 of" in capsys.readouterr().out
    assert (
        summary(tmp_path / "out")["arms"]["edits"]["pool"]["flipped"] == 0
    )  # every text moves by the same amount
    flips = 0
    for name, arm in summary(tmp_path / "off")["arms"].items():
        own, flipped, gold = {arm["features"][0]: ("set", -3.0)}, 0, []
        for row in rows:
            scored = [z_by_hand(lm, sarm, row["prompt"], text) for text in row["responses"]]
            for first in (0, 3):
                before = max(range(first, first + 3), key=lambda i: scored[i][1])
                after = max(
                    range(first, first + 3), key=lambda i: edited_by_hand(*scored[i], w, own)
                )
                flipped, gold = flipped + (before != after), [*gold, (before, after)]
        part = arm["pool"]
        assert (part["groups"], part["flipped"]) == (12, flipped) and part["flip_rate"][
            "mean"
        ] == pytest.approx(flipped / 12)
        assert part["gold_before"]["mean"] == pytest.approx(mean(x for x, _ in gold))
        assert part["gold_change"]["mean"] == pytest.approx(mean(y - x for x, y in gold))
        flips += flipped
    assert flips > 0
    write_rows(
        tmp_path / "bare.jsonl",
        [{k: v for k, v in row.items() if k != "gold_scores"} for row in rows],
    )
    run_probe(
        *feature_flags(
            "causal",
            root,
            tmp_path / "bare",
            edits=f"{a}:set:-3",
            pool=tmp_path / "bare.jsonl",
            n=3,
            draws=1,
        )
    )
    part = summary(tmp_path / "bare")["arms"]["edits"]["pool"]
    assert (
        part["flipped"] == summary(tmp_path / "off")["arms"]["edits"]["pool"]["flipped"]
        and "gold_change" not in part
    )


def test_a_tie_is_half_right_and_a_change_of_order():
    before = {"chosen": torch.tensor([1.0, 2.0, 0.0]), "rejected": torch.tensor([0.0, 2.0, 1.0])}
    after = {"chosen": torch.tensor([1.0, 2.5, 1.0]), "rejected": torch.tensor([0.0, 2.0, 1.0])}
    found = on_pairs(before, after, torch.arange(3))
    assert found["accuracy_before"]["mean"] == 0.5 and found["accuracy_after"][
        "mean"
    ] == pytest.approx(2.5 / 3)
    assert found["reordered"] == 2 and found["changed"] == pytest.approx(2 / 6)


def test_pool_intervals_are_over_prompts():
    """Choices of one prompt move together: with one prompt there is no width."""
    rows = [{"prompt": "p", "responses": ["a"] * 8, "gold_scores": [0.0, 1.0] * 4}]
    found = on_pool(
        torch.tensor([1.0, 0.0] * 4), torch.tensor([1.0, 0.0] * 2 + [0.0, 1.0] * 2), rows, 2
    )
    assert found["flipped"] == 2 and found["gold_change"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert groups_of(["p", "q", "p"]).tolist() == [0, 1, 0]


def test_a_reward_model_with_an_autoencoder(sarm_material, tmp_path):  # noqa: F811
    """An edit that changes nothing changes nothing; one that does changes scores of texts on which the latent fires alone."""
    root, *_ = sarm_material
    options = {"reward_model": root / "rm", "sae": root / "sae"}
    run_probe(*feature_flags("reward_features", root, tmp_path / "latents", **options))
    rows = summary(tmp_path / "latents")["features"]
    row = min(rows, key=lambda row: abs(row["pairs"]["rate_chosen"] - 0.5))
    run_probe(
        *feature_flags(
            "causal", root, tmp_path / "same", edits=f"{row['id']}:*:1", draws=1, **options
        )
    )
    run_probe(
        *feature_flags(
            "causal", root, tmp_path / "off", edits=f"{row['id']}:set:0", draws=1, **options
        )
    )
    same, off = (summary(tmp_path / name)["arms"]["edits"] for name in ("same", "off"))
    rate = (row["pairs"]["rate_chosen"] + row["pairs"]["rate_rejected"]) / 2
    assert same["changed"] == 0 == same["reordered"] and off["changed"] == pytest.approx(rate)


# -------------------------------------------------------------------------------------------------------------------------- steer


def test_a_head_weight_changes_the_texts_with_its_feature_by_w_z(
    sarm_material, by_hand, tmp_path, capsys
):  # noqa: F811
    root, lm, sarm = sarm_material
    (a,) = commonest([z for side in by_hand.values() for z, _ in side], 1)
    run_probe(
        *feature_flags(
            "steer", root, tmp_path / "out", weights=f"{a}:*:-2", save=tmp_path / "steered"
        )
    )
    found, printed = summary(tmp_path / "out"), capsys.readouterr().out
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "texts.jsonl").read_text().splitlines()
    ]
    w = sarm.score.weight[0, a].item()
    for row in rows:
        z, score = z_by_hand(lm, sarm, row["prompt"], row["response"])
        assert row["before"] == pytest.approx(score, abs=1e-5) and row["latents"][
            str(a)
        ] == pytest.approx(z[a], abs=1e-5)
        assert row["after"] - row["before"] == pytest.approx(-3 * w * z[a], abs=1e-5)
        assert (row["after"] != row["before"]) == (z[a] != 0)
    with_it = sum(z[a] != 0 for side in by_hand.values() for z, _ in side)
    assert (found["texts"], found["with_feature"], found["changed"]) == (
        len(rows),
        with_it,
        with_it,
    )
    assert (
        found["changed_without"] == found["unchanged_with"] == 0
        and f"{with_it} of {len(rows)} texts change" in printed
    )
    assert widest(printed) <= 140 and 0 < with_it < len(rows)
    # What was saved has these scores, and differs from the first in one number.
    run_probe(
        *feature_flags(
            "steer", root, tmp_path / "again", reward_model=tmp_path / "steered", edits=f"{a}:*:1"
        )
    )
    again = [
        json.loads(line) for line in (tmp_path / "again" / "texts.jsonl").read_text().splitlines()
    ]
    assert (
        [row["before"] for row in again]
        == [row["after"] for row in rows]
        == [row["after"] for row in again]
    )
    old, new = (
        load_file(str(path / "model.safetensors")) for path in (root / "sarm", tmp_path / "steered")
    )
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["score.weight"]
    assert (old["score.weight"] != new["score.weight"]).nonzero().tolist() == [[0, a]]
    assert "sarm_param" in json.loads((tmp_path / "steered" / "config.json").read_text())


def test_a_model_and_results_do_not_share_a_folder(sarm_material, tmp_path, capfd):  # noqa: F811
    """Both have a config.json: the model's would be written over the results'."""
    root, *_ = sarm_material
    for save in ("out", "nothing/../out"):
        error = probe_refused(
            capfd,
            *feature_flags("steer", root, tmp_path / "out", weights="1:*:0", save=tmp_path / save),
        )
        assert "--save needs a folder of its own" in error and not (tmp_path / "out").exists()


def test_steering_latents_of_texts(sarm_material, by_hand, tmp_path):  # noqa: F811
    """`*` changes the texts with the feature, `+` all of them."""
    root, lm, sarm = sarm_material
    w = sarm.score.weight[0].tolist()
    (a,) = commonest([z for side in by_hand.values() for z, _ in side], 1)
    for op, value in (("*", 3.0), ("+", 0.5)):
        run_probe(
            *feature_flags(
                "steer", root, tmp_path / op, edits=f"{a}:{op}:{value}", texts=root / "before.jsonl"
            )
        )
        rows, found = (
            [json.loads(line) for line in (tmp_path / op / "texts.jsonl").read_text().splitlines()],
            summary(tmp_path / op),
        )
        assert [row["response"] for row in rows] == [
            json.loads(x)["response"] for x in (root / "before.jsonl").read_text().splitlines()
        ]
        for row in rows:
            z, score = z_by_hand(lm, sarm, row["prompt"], row["response"])
            assert row["after"] == pytest.approx(
                edited_by_hand(z, score, w, {a: (op, value)}), abs=1e-5
            )
        fires = sum(row["latents"][str(a)] != 0 for row in rows)
        assert (
            found["changed"] == (fires if op == "*" else len(rows))
            and found["changed_without"] == found["changed"] - fires
        )


# ------------------------------------------------------------------------------------------------------------------------- errors


def test_edits_are_read():
    assert parse_edits("edits", ["17:set:0", "3:*:-1.5", "4:+:1e-3"]) == {
        17: ("set", 0.0),
        3: ("*", -1.5),
        4: ("+", 0.001),
    }


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("causal", {}, "--edits names what is changed"),
        ("causal", {"edits": "48:set:0"}, "feature 48: there are the features 0 to 47"),
        ("causal", {"edits": "3:off:0"}, "--edits 3:off:0: it must be FEATURE:OP:VALUE"),
        ("causal", {"edits": "3:set"}, "it must be FEATURE:OP:VALUE"),
        ("causal", {"edits": "3:set:x"}, "it must be FEATURE:OP:VALUE"),
        ("causal", {"edits": "3:set:nan"}, "it must be FEATURE:OP:VALUE"),
        ("causal", {"edits": "3:set:1e39"}, "it must be FEATURE:OP:VALUE"),
        ("causal", {"edits": "3:*:-1e300"}, "it must be FEATURE:OP:VALUE"),
        ("causal", {"edits": "1" * 5000 + ":set:0"}, "it must be FEATURE:OP:VALUE"),
        ("causal", {"edits": "9" * 18 + ":set:0"}, "there are the features 0 to 47"),
        ("causal", {"edits": "3:*:3e38"}, "an edit makes a score of the reward model"),
        ("steer", {"weights": "3:set:3e38"}, "gave a score that is not finite"),
        ("causal", {"edits": "3:set:0:0"}, "it must be FEATURE:OP:VALUE"),
        ("causal", {"edits": ["3:set:0", "3:max:1"]}, "names feature 3 twice"),
        ("causal", {"edits": "3:set:0", "pool": "pool.jsonl"}, "--n 16: "),
        ("causal", {"edits": "3:set:0", "n": 1}, "--n must be at least 2"),
        (
            "causal",
            {"edits": "3:set:0", "reward_model": "rm"},
            "rm is no SARM: name an autoencoder",
        ),
        ("steer", {}, "name --edits of features or --weights of the head"),
        ("steer", {"edits": "1:set:0", "weights": "1:set:0"}, "one of both"),
        (
            "steer",
            {"weights": "1:*:0", "reward_model": "rm", "sae": "sae"},
            "--weights edits a SARM's head",
        ),
        ("steer", {"edits": "1:*:0", "save": "new"}, "edits of features are no part of a model"),
        ("steer", {"weights": "1:*:0", "save": "sarm"}, "it is there already"),
        ("steer", {"weights": "1:*:0", "texts": "pairs.jsonl"}, "no field 'response'"),
    ],
)
def test_wrong_input_is_one_line(sarm_material, tmp_path, capfd, command, changes, words):  # noqa: F811
    root, *_ = sarm_material
    write_rows(root / "pool.jsonl", [{"prompt": "review the hotel :", "responses": ["a", "b"]}])
    changes = {
        k: root / v if k in ("reward_model", "sae", "pool", "texts", "save") else v
        for k, v in changes.items()
    }
    assert words in probe_refused(capfd, *feature_flags(command, root, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()

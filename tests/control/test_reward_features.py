"""probe.py reward_features on a tiny random SARM: every number by hand, from one text at a time through the LM that it was cut from.

N texts, M features, K of them kept, D hidden
"""

import json

import numpy as np
import pytest
from support import (
    GOOD_REPLY,
    Endpoint,
    chat,
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
from support import SARM_M as M

from nanorlhf import world
from nanorlhf.control import reward_features
from nanorlhf.control.feature_texts import match_answers


def fires_on(lm, sarm, prompt, response):
    return [i for i, x in enumerate(z_by_hand(lm, sarm, prompt, response)[0]) if x]


def test_numbers_on_pairs_are_those_of_one_text_at_a_time(sarm_material, tmp_path, capsys):
    root, lm, sarm = sarm_material
    run_probe(*feature_flags("reward_features", root, tmp_path / "out", top=4))
    found, printed, pairs = summary(tmp_path / "out"), capsys.readouterr().out, held_out(root)
    assert widest(printed) <= 140
    z = {
        side: [z_by_hand(lm, sarm, row["prompt"], row[side])[0] for row in pairs]
        for side in ("chosen", "rejected")
    }
    scores = {
        side: [z_by_hand(lm, sarm, row["prompt"], row[side])[1] for row in pairs] for side in z
    }
    assert found["pairs"]["pairs"] == len(pairs) and found["pairs"]["prompts"] == len(
        {row["prompt"] for row in pairs}
    )
    differences = [a - b for a, b in zip(scores["chosen"], scores["rejected"])]
    assert found["pairs"]["margin"] == pytest.approx(mean(differences), abs=1e-5)
    assert found["pairs"]["accuracy"] == mean(d > 0 for d in differences)
    fires = [i for i in range(M) if any(row[i] for side in z.values() for row in side)]
    assert sorted(row["id"] for row in found["features"]) == fires and (
        found["firing"],
        found["m"],
    ) == (len(fires), M)
    c, j = (
        [mean(max(row[i], 0) for row in z[side]) for i in range(M)]
        for side in ("chosen", "rejected")
    )
    damping = mean(x + y for x, y in zip(c, j))
    for row in found["features"]:
        i, part, w = row["id"], row["pairs"], sarm.score.weight[0, row["id"]].item()
        assert row["weight"] == pytest.approx(w) and row["raises"] == (w > 0)
        if row["score_gap"] is not None:
            x = [[float(r[i] != 0), float(side == "chosen"), 1.0] for side in z for r in z[side]]
            y = [score for side in z for score in scores[side]]
            assert row["score_gap"] == pytest.approx(
                np.linalg.lstsq(np.array(x), np.array(y), rcond=None)[0][0], abs=1e-4
            )
        assert part["rate_chosen"] == pytest.approx(mean(r[i] != 0 for r in z["chosen"]))
        assert part["rate_rejected"] == pytest.approx(mean(r[i] != 0 for r in z["rejected"]))
        assert part["differential"]["mean"] == pytest.approx(
            (c[i] - j[i]) / (c[i] + j[i] + damping), abs=1e-5
        )
        assert part["contribution"]["mean"] == pytest.approx(w * (c[i] - j[i]), abs=1e-5)
        for x in (part["differential"], part["contribution"]):
            assert x["low"] <= x["mean"] <= x["high"]
    sizes = [abs(row["pairs"]["contribution"]["mean"]) for row in found["features"]]
    assert sizes == sorted(sizes, reverse=True) and found["described"] == [
        row["id"] for row in found["features"][:4]
    ]
    assert found["pairs"]["contributions"] == pytest.approx(
        sum(row["pairs"]["contribution"]["mean"] for row in found["features"])
    )
    assert all(("tokens" in row) == (row["id"] in found["described"]) for row in found["features"])


def test_described_by_tokens_and_contexts(sarm_material, tmp_path, capsys):
    root, lm, sarm = sarm_material
    a, b = fires_on(lm, sarm, held_out(root)[0]["prompt"], held_out(root)[0]["chosen"])[:2]
    silent = next(i for i in range(M) if sarm.sae.b_enc[i] == sarm.sae.b_enc.min())
    run_probe(
        *feature_flags(
            "reward_features", root, tmp_path / "out", features=f"{b},{a},{silent}", contexts=2
        )
    )
    printed, found, tokenizer = (
        capsys.readouterr().out,
        summary(tmp_path / "out"),
        world.tokenizer(),
    )
    assert found["described"] == [b, a, silent] and widest(printed) <= 140
    sides = [
        [(row["prompt"], row[side]) for row in held_out(root)] for side in ("chosen", "rejected")
    ]
    z = [[z_by_hand(lm, sarm, *text)[0] for text in side] for side in sides]
    words = [[set((p + " " + r + " <eos>").split()) for p, r in side] for side in sides]
    for row in (
        next(row for row in found["features"] if row["id"] == i) for i in found["described"]
    ):
        i = row["id"]
        for token, auc, texts, with_it, without in row["tokens"]:
            wins = []
            for values, sets in zip(z, words):
                has, lacks = (
                    [v[i] for v, s in zip(values, sets) if (token in s) == is_in]
                    for is_in in (True, False)
                )
                wins += [1.0 if x > y else 0.5 if x == y else 0.0 for x in has for y in lacks]
            assert auc == pytest.approx(mean(wins), abs=1e-6)
            every = [
                (v[i] != 0, token in s)
                for values, sets in zip(z, words)
                for v, s in zip(values, sets)
            ]
            assert texts == sum(there for _, there in every) and 10 <= texts <= len(every) - 10
            assert with_it == pytest.approx(mean(fires for fires, there in every if there))
            assert without == pytest.approx(mean(fires for fires, there in every if not there))
        sizes = [abs(auc - 0.5) for _, auc, *_ in row["tokens"]]
        assert (
            sizes == sorted(sizes, reverse=True)
            and len(sizes) == reward_features.SHOWN
            and f"{row['tokens'][0][0]} ." in printed
        )
        peaks = sorted((v[i] for values in z for v in values), reverse=True)
        for k, context in enumerate(row["contexts"]):
            s = ("chosen", "rejected").index(context["side"])
            at = [[*" ".join(text).split(), tokenizer.eos_token] for text in sides[s]].index(
                context["tokens"]
            )
            assert [context["z"]] * 2 == pytest.approx([peaks[k], z[s][at][i]], abs=1e-4)
            assert context["values"] == [0] * (len(context["tokens"]) - 1) + [
                pytest.approx(peaks[k] / peaks[0], abs=1e-3)
            ]
            assert f"z {context['z']:6.2f}" in printed


def test_answers_after_against_before_are_matched_by_prompt(sarm_material, tmp_path, capsys):
    """Beside the pairs; the order of the policy's contribution. Then alone, and by the other measures."""
    root, lm, sarm = sarm_material
    both = {"answers": root / "after.jsonl", "against": root / "before.jsonl", "top": 2}
    run_probe(*feature_flags("reward_features", root, tmp_path / "out", **both))
    found, printed = summary(tmp_path / "out"), capsys.readouterr().out
    assert widest(printed) <= 140 and "after against before: 30 pairs of 15 prompts" in printed
    z = {}
    for name in ("after", "before"):
        rows = [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]
        z[name] = [z_by_hand(lm, sarm, row["prompt"], row["response"])[0] for row in rows]
    for row in found["features"]:
        i, w = row["id"], sarm.score.weight[0, row["id"]].item()
        exploited = w * (
            mean(max(r[i], 0) for r in z["after"]) - mean(max(r[i], 0) for r in z["before"])
        )
        assert row["policy"]["contribution"]["mean"] == pytest.approx(exploited, abs=1e-5)
        assert row["policy"]["rate_after"] == pytest.approx(mean(r[i] != 0 for r in z["after"]))
        assert set(row["pairs"]) == {"rate_chosen", "rate_rejected", "differential", "contribution"}
    sizes = [abs(row["policy"]["contribution"]["mean"]) for row in found["features"]]
    assert sizes == sorted(sizes, reverse=True)
    run_probe(
        *feature_flags(
            "reward_features", root, tmp_path / "alone", dataset="", by="differential", **both
        )
    )
    alone = summary(tmp_path / "alone")
    sizes = [abs(row["policy"]["differential"]["mean"]) for row in alone["features"]]
    assert "pairs" not in alone and sizes == sorted(sizes, reverse=True)
    run_probe(*feature_flags("reward_features", root, tmp_path / "weight", by="weight"))
    sizes = [abs(row["weight"]) for row in summary(tmp_path / "weight")["features"]]
    assert sizes == sorted(sizes, reverse=True)


def test_the_kth_answer_stands_beside_the_kth():
    after = [{"prompt": p, "response": f"{p}{i}"} for i, p in enumerate("abab")]
    before = [{"prompt": r[0], "response": r} for r in ("b1", "b2", "a1", "a2")]
    assert [row["response"] for row in match_answers(after, before, ("after", "before"))] == [
        "a1",
        "b1",
        "a2",
        "b2",
    ]


def test_answers_that_were_cut_off_are_read_without_eos(sarm_material, tmp_path):
    root, lm, sarm = sarm_material
    tokenizer, prompts = world.tokenizer(), [row["prompt"] for row in world.prompts("test")[:12]]
    rows = []
    for i, prompt in enumerate(prompts):
        ids = tokenizer("the room was superb . the room was").input_ids[: 8 - i % 2]
        text = tokenizer.decode(ids)
        rows.append(
            {
                "prompt": prompt,
                "response": text,
                "prompt_ids": tokenizer(prompt).input_ids,
                "response_ids": ids,
            }
        )
    write_rows(tmp_path / "cut.jsonl", rows)
    write_rows(
        tmp_path / "other.jsonl", [{**row, "response_ids": [5] * 9} for row in rows]
    )  # not in these words: another tokenizer's ids
    files = {"answers": tmp_path / "cut.jsonl", "against": tmp_path / "other.jsonl"}
    run_probe(*feature_flags("reward_features", root, tmp_path / "out", dataset="", **files))
    found = summary(tmp_path / "out")
    cut = [z_by_hand(lm, sarm, row["prompt"], row["response_ids"])[1] for row in rows]
    whole = [z_by_hand(lm, sarm, row["prompt"], row["response"])[1] for row in rows]
    assert (
        found["policy"]["margin"] == pytest.approx(mean(cut) - mean(whole), abs=1e-5)
        and abs(found["policy"]["margin"]) > 1e-3
    )


def test_a_reward_model_with_an_autoencoder(sarm_material, tmp_path, capsys):
    """No head on the features: no weights, no contributions."""
    root, *_ = sarm_material
    run_probe(
        *feature_flags(
            "reward_features",
            root,
            tmp_path / "out",
            reward_model=root / "rm",
            sae=root / "sae",
            top=3,
        )
    )
    found = summary(tmp_path / "out")
    assert (
        found["by"] == "differential"
        and found["features"][0]["weight"] is None is found["features"][0]["pairs"]["contribution"]
    )
    assert widest(capsys.readouterr().out) <= 140


def test_an_explainer_is_asked_about_texts(sarm_material, tmp_path, capsys):
    root, lm, sarm = sarm_material
    a, b = fires_on(lm, sarm, held_out(root)[0]["prompt"], held_out(root)[0]["chosen"])[:2]
    with Endpoint(chat(GOOD_REPLY)) as endpoint:
        options = {
            "explainer": endpoint.url,
            "explainer_model": "tiny",
            "features": f"{a},{b}",
            "pause": 0.01,
            "related_to": "manners",
        }
        run_probe(*feature_flags("reward_features", root, tmp_path / "out", **options))
        prompt = endpoint.asked[0][2]["messages"][0]["content"]
        assert len(endpoint.asked) == 2
    row = next(row for row in summary(tmp_path / "out")["features"] if row["id"] == a)
    assert (
        row["description"] == "Fires on adjectives."
        and "to do with manners" in prompt
        and f"{row['tokens'][0][0]!r}" in prompt
    )
    assert "<eos> [[10]]" in prompt and prompt.count("[[") == len(row["contexts"])
    assert "Fires on adjectives." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": "3,48"}, "feature 48: there are the features 0 to 47"),
        ({"features": "x"}, "it must be numbers"),
        ({"reward_model": "lm"}, "lm is no reward model"),
        ({"reward_model": "rm"}, "rm is no SARM: name an autoencoder"),
        ({"sae": "sae"}, "is a SARM, which scores with an autoencoder of its own"),
        (
            {"reward_model": "rm", "sae": "sae", "by": "weight"},
            "with --sae there are no head weights",
        ),
        ({"by": "size"}, "--by must be one of"),
        ({"answers": "after.jsonl"}, "--answers and --against go together"),
        ({"answers": "after.jsonl", "against": "pairs.jsonl"}, "no field 'response'"),
        ({"answers": "after.jsonl", "against": "short.jsonl"}, "short.jsonl has fewer answers to"),
        ({"answers": "short.jsonl", "against": "after.jsonl"}, "short.jsonl has fewer answers to"),
        ({"dataset": ""}, "name --dataset, or --answers and --against"),
        ({"explainer": "http://localhost:1/v1"}, "name its model with --explainer_model"),
    ],
)
def test_wrong_input_is_one_line(sarm_material, tmp_path, capfd, changes, words):
    root, *_ = sarm_material
    write_rows(
        root / "short.jsonl",
        [json.loads(line) for line in (root / "before.jsonl").read_text().splitlines()][:-1],
    )
    changes = {
        k: root / v if k in ("reward_model", "sae", "answers", "against") else v
        for k, v in changes.items()
    }
    assert words in probe_refused(
        capfd, *feature_flags("reward_features", root, tmp_path / "out", **changes)
    )
    assert not (tmp_path / "out").exists()

"""probe.py causal and steer on a tiny random SARM: scores by hand, pairs and best-of-n choices
counted in loops.

    N pairs, M features
"""

import json
from statistics import fmean

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import feature_flags, probe_refused, read_rows, widest, write_rows

from nanorlhf import world
from nanorlhf.control.feature_edits import compare_choices, compare_pairs, parse_edits
from nanorlhf.control.feature_texts import groups_of


def edit(op, z, value):
    """What each kind of edit makes of a latent."""
    if op == "set":
        return value
    if op == "min":  # at least the value
        return max(z, value)
    if op == "max":  # at most the value
        return min(z, value)
    if op == "*":
        return z * value
    assert op == "+"
    return z + value


def edited_score(reading, weights, edits):
    """The score of a text after edits {feature: (op, value)}: only the head reads the latents."""
    score = reading.score
    for i, (op, value) in edits.items():
        z = reading.z[i]
        score += weights[i] * (edit(op, z, value) - z)
    return score


def edited_scores(readings, weights, edits):
    return np.array([edited_score(reading, weights, edits) for reading in readings])


def is_moved(reading, edits):
    """Whether some edit changes a latent of this text."""
    for i, (op, value) in edits.items():
        z = reading.z[i]
        if edit(op, z, value) != z:
            return True
    return False


def firing_rates(readings):
    """The share of texts on which each feature fires: [M]."""
    z = np.array([reading.z for reading in readings])
    return (z != 0).mean(0)


def commonest(readings, n):
    """The n features that fire most often, but not always."""
    rates = firing_rates(readings)
    by_rate = (-rates).argsort(kind="stable").tolist()
    return [i for i in by_rate if rates[i] < 1][:n]


def texts_of(folder):
    """The record of every text that `steer` scored."""
    return read_rows(folder / "texts.jsonl")


@pytest.fixture(scope="module")
def all_readings(pairs_by_hand):
    """[Reading] of both sides of all pairs."""
    return pairs_by_hand["chosen"] + pairs_by_hand["rejected"]


# --------------------------------------------------------------------------------- causal: pairs


@pytest.fixture(scope="module")
def on_all_pairs(all_readings, run_on_sarm):
    """A run that edits two features, and six times two others that are drawn. -> ProbeRun"""
    a, b = commonest(all_readings, 2)
    return run_on_sarm("causal", edits=[f"{a}:set:0", f"{b}:max:0.2"], draws=6)


def test_arms_are_the_edits_and_the_draws(on_all_pairs):
    random_names = [f"random {draw}" for draw in range(6)]
    assert list(on_all_pairs.found["arms"]) == ["edits", *random_names]
    assert widest(on_all_pairs.printed) <= 140


def test_causal_is_every_pair_scored_again(
    sarm_material, pairs_by_hand, all_readings, on_all_pairs
):
    weights = sarm_material.weights
    rates = firing_rates(all_readings)
    for name, arm in on_all_pairs.found["arms"].items():
        # Each arm makes the same two changes, to features of its own.
        edits = dict(zip(arm["features"], [("set", 0.0), ("max", 0.2)]))
        before = {}
        after = {}
        for side, readings in pairs_by_hand.items():
            before[side] = edited_scores(readings, weights, {})
            after[side] = edited_scores(readings, weights, edits)
            change = after[side] - before[side]
            assert arm[side]["mean"] == pytest.approx(change.mean(), abs=1e-5), name

        right_before = before["chosen"] > before["rejected"]  # [N]
        right_after = after["chosen"] > after["rejected"]  # [N]
        accuracy_change = right_after.mean() - right_before.mean()
        assert arm["accuracy_before"]["mean"] == pytest.approx(right_before.mean())
        assert arm["accuracy_after"]["mean"] == pytest.approx(right_after.mean())
        found_change = arm["accuracy_change"]
        assert found_change["mean"] == pytest.approx(accuracy_change)
        assert found_change["low"] <= found_change["mean"] <= found_change["high"]
        assert arm["reordered"] == (right_before != right_after).sum()

        moved = fmean(is_moved(reading, edits) for reading in all_readings)
        assert arm["changed"] == pytest.approx(moved)
        assert arm["rates"] == pytest.approx(rates[arm["features"]])


def test_random_arms_are_of_other_features_and_none_is_drawn_twice(all_readings, on_all_pairs):
    arms = on_all_pairs.found["arms"]
    assert arms["edits"]["features"] == commonest(all_readings, 2)
    # The two features matter: the edits turn some pairs over.
    assert arms["edits"]["reordered"] > 0

    # Seven arms of two features each.
    features = []
    for arm in arms.values():
        assert len(arm["features"]) == 2
        features += arm["features"]
    assert len(set(features)) == 2 * 7


def test_a_tie_is_half_right_and_a_change_of_order():
    before = {"chosen": torch.tensor([1.0, 2.0, 0.0]), "rejected": torch.tensor([0.0, 2.0, 1.0])}
    after = {"chosen": torch.tensor([1.0, 2.5, 1.0]), "rejected": torch.tensor([0.0, 2.0, 1.0])}
    found = compare_pairs(before, after, torch.arange(3))
    # Before: right, a tie, wrong. After: right, right, a tie.
    assert found["accuracy_before"]["mean"] == 0.5
    assert found["accuracy_after"]["mean"] == pytest.approx(2.5 / 3)
    assert found["reordered"] == 2
    # Two of six texts have another score.
    assert found["changed"] == pytest.approx(2 / 6)


def test_a_reward_model_with_an_autoencoder(sarm_material, run_on_sarm):
    """z * 1 changes nothing; z = 0 changes the texts on which the feature fires."""
    root = sarm_material.root
    model = {"reward_model": root / "rm", "sae": root / "sae"}
    rows = run_on_sarm("reward_features", **model).found["features"]
    row = min(rows, key=lambda row: abs(row["pairs"]["rate_chosen"] - 0.5))
    firing_rate = (row["pairs"]["rate_chosen"] + row["pairs"]["rate_rejected"]) / 2

    same = run_on_sarm("causal", edits=f"{row['id']}:*:1", draws=1, **model)
    off = run_on_sarm("causal", edits=f"{row['id']}:set:0", draws=1, **model)

    same_arm = same.found["arms"]["edits"]
    assert same_arm["changed"] == 0
    assert same_arm["reordered"] == 0
    off_arm = off.found["arms"]["edits"]
    assert off_arm["changed"] == pytest.approx(firing_rate)


# ----------------------------------------------------------------------------- causal: best of n


@pytest.fixture
def pool_rows(tmp_path):
    """A pool of six prompts with 6 and 7 answers in turn; gold is the answer's number.

    Of n = 3 each, the seventh answer is left out. It stands in pool.jsonl, and without its gold in
    bare.jsonl.
    """
    texts = [row["response"] for row in world.demonstrations(39)]
    rows = []
    bare_rows = []
    for k, prompt_row in enumerate(world.prompts("test")[:6]):
        n_answers = 6 + k % 2
        responses = texts[:n_answers]
        texts = texts[n_answers:]
        row = {"prompt": prompt_row["prompt"], "responses": responses}
        bare_rows.append(row)
        rows.append(row | {"gold_scores": [float(i) for i in range(n_answers)]})
    write_rows(tmp_path / "pool.jsonl", rows)
    write_rows(tmp_path / "bare.jsonl", bare_rows)
    return rows


@pytest.fixture
def run_on_pool(run_on_sarm, tmp_path):
    """A function: edit one feature and choose the best of 3 of the pool. -> ProbeRun"""

    def run(edits, pool="pool.jsonl"):
        return run_on_sarm("causal", edits=edits, pool=tmp_path / pool, n=3, draws=1)

    return run


def best_of_three(scores):
    """The places of the best answer among the first three and among the next three."""
    first = int(np.argmax(scores[:3]))
    second = 3 + int(np.argmax(scores[3:6]))
    return [first, second]


def read_pool(sarm_material, rows):
    """Every answer, read alone: for each prompt a list of Readings."""
    readings = []
    for row in rows:
        readings.append([sarm_material.read(row["prompt"], text) for text in row["responses"]])
    return readings


def choose_by_hand(readings, weights, edits):
    """The places of the answers that are chosen after the edits, two of each prompt."""
    choices = []
    for readings_of_prompt in readings:
        scores = edited_scores(readings_of_prompt, weights, edits)
        choices += best_of_three(scores)
    return np.array(choices)


def test_best_of_n_choices_that_turn_over(sarm_material, pairs_by_hand, pool_rows, run_on_pool):
    (a,) = commonest(pairs_by_hand["chosen"], 1)
    ran = run_on_pool(f"{a}:set:-3")
    assert "best of 3 of" in ran.printed

    readings = read_pool(sarm_material, pool_rows)
    before = choose_by_hand(readings, sarm_material.weights, {})
    n_flipped_of_all_arms = 0
    for arm in ran.found["arms"].values():
        (feature,) = arm["features"]
        after = choose_by_hand(readings, sarm_material.weights, {feature: ("set", -3.0)})
        n_flipped = (before != after).sum()
        found = arm["pool"]
        assert found["groups"] == 12
        assert found["flipped"] == n_flipped
        assert found["flip_rate"]["mean"] == pytest.approx(n_flipped / 12)
        # The gold of an answer is its place.
        assert found["gold_before"]["mean"] == pytest.approx(before.mean())
        assert found["gold_change"]["mean"] == pytest.approx((after - before).mean())
        n_flipped_of_all_arms += n_flipped
    assert n_flipped_of_all_arms > 0


def test_what_moves_every_text_by_the_same_amount_flips_no_choice(
    pairs_by_hand, pool_rows, run_on_pool
):
    (a,) = commonest(pairs_by_hand["chosen"], 1)
    found = run_on_pool(f"{a}:+:9").found
    assert found["arms"]["edits"]["pool"]["flipped"] == 0


@pytest.mark.slow
def test_a_pool_without_gold_has_the_same_flips_and_no_change_of_gold(
    pairs_by_hand, pool_rows, run_on_pool
):
    (a,) = commonest(pairs_by_hand["chosen"], 1)
    with_gold = run_on_pool(f"{a}:set:-3").found
    without_gold = run_on_pool(f"{a}:set:-3", pool="bare.jsonl").found
    part = without_gold["arms"]["edits"]["pool"]
    assert part["flipped"] == with_gold["arms"]["edits"]["pool"]["flipped"]
    assert "gold_change" not in part


def test_pool_intervals_are_over_prompts():
    """Choices of one prompt move together: with one prompt there is no width."""
    rows = [{"prompt": "p", "responses": ["a"] * 8, "gold_scores": [0.0, 1.0] * 4}]
    before = torch.tensor([1.0, 0.0] * 4)
    after = torch.tensor([1.0, 0.0] * 2 + [0.0, 1.0] * 2)
    found = compare_choices(before, after, rows, 2)
    # Of four choices the last two turn to the answer with gold 1.
    assert found["flipped"] == 2
    assert found["gold_change"] == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_rows_of_the_same_prompt_are_one_group():
    assert groups_of(["p", "q", "p"]).tolist() == [0, 1, 0]


# ----------------------------------------------------------------------------------------- steer


@pytest.fixture(scope="module")
def steered(all_readings, run_on_sarm, tmp_path_factory):
    """The head's weight on one feature made -2 times what it was. -> feature, ProbeRun, model"""
    (a,) = commonest(all_readings, 1)
    saved = tmp_path_factory.mktemp("saved") / "steered"
    ran = run_on_sarm("steer", weights=f"{a}:*:-2", save=saved)
    return a, ran, saved


def test_a_head_weight_changes_the_texts_with_its_feature_by_w_z(
    sarm_material, all_readings, steered
):
    a, ran, _ = steered
    w = sarm_material.weights[a]
    rows = texts_of(ran.folder)
    for row in rows:
        reading = sarm_material.read(row["prompt"], row["response"])
        z = reading.z[a]
        assert row["before"] == pytest.approx(reading.score, abs=1e-5)
        assert row["latents"][str(a)] == pytest.approx(z, abs=1e-5)
        # The weight goes from w to -2 w, so the score changes by -3 w z.
        assert row["after"] - row["before"] == pytest.approx(-3 * w * z, abs=1e-5)
        assert (row["after"] != row["before"]) == (z != 0)

    n_with_feature = round(firing_rates(all_readings)[a] * len(all_readings))
    assert 0 < n_with_feature < len(rows)
    assert ran.found["texts"] == len(rows)
    assert ran.found["with_feature"] == n_with_feature
    assert ran.found["changed"] == n_with_feature
    assert ran.found["changed_without"] == 0
    assert ran.found["unchanged_with"] == 0
    assert f"{n_with_feature} of {len(rows)} texts change" in ran.printed
    assert widest(ran.printed) <= 140


def test_the_model_that_is_saved_has_the_scores_after_the_change(
    sarm_material, steered, run_on_sarm
):
    a, ran, saved = steered
    # An edit that changes nothing: z times 1.
    again = run_on_sarm("steer", reward_model=saved, edits=f"{a}:*:1")
    rows = texts_of(ran.folder)
    for row, row_again in zip(rows, texts_of(again.folder), strict=True):
        assert row_again["before"] == row["after"]
        assert row_again["after"] == row["after"]

    # It differs from the first model in one number.
    old = load_file(str(sarm_material.root / "sarm/model.safetensors"))
    new = load_file(str(saved / "model.safetensors"))
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert changed == ["score.weight"]
    places = (old["score.weight"] != new["score.weight"]).nonzero()
    assert places.tolist() == [[0, a]]
    assert "sarm_param" in json.loads((saved / "config.json").read_text())


@pytest.mark.parametrize("save", ["out", "nothing/../out"])
def test_a_model_and_results_do_not_share_a_folder(sarm_material, tmp_path, capfd, save):
    """Both have a config.json: the model's would be written over the results'."""
    flags = {"weights": "1:*:0", "save": tmp_path / save}
    command = feature_flags("steer", sarm_material.root, tmp_path / "out", **flags)
    assert "--save needs a folder of its own" in probe_refused(capfd, *command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("op, value", [("*", 3.0), ("+", 0.5)])
def test_steering_latents_of_texts(sarm_material, all_readings, run_on_sarm, op, value):
    """`*` changes the texts with the feature, `+` all of them."""
    (a,) = commonest(all_readings, 1)
    file = sarm_material.root / "before.jsonl"

    ran = run_on_sarm("steer", edits=f"{a}:{op}:{value}", texts=file)

    n_firing = 0
    for row, answer in zip(texts_of(ran.folder), read_rows(file), strict=True):
        assert row["response"] == answer["response"]
        reading = sarm_material.read(row["prompt"], row["response"])
        expected = edited_score(reading, sarm_material.weights, {a: (op, value)})
        assert row["after"] == pytest.approx(expected, abs=1e-5)
        n_firing += row["latents"][str(a)] != 0
    n_texts = len(read_rows(file))
    n_changed = n_firing if op == "*" else n_texts
    assert ran.found["changed"] == n_changed
    assert ran.found["changed_without"] == n_changed - n_firing


# ---------------------------------------------------------------------------------------- errors


def test_edits_are_read():
    edits = parse_edits("edits", ["17:set:0", "3:*:-1.5", "4:+:1e-3"])
    assert edits == {17: ("set", 0.0), 3: ("*", -1.5), 4: ("+", 0.001)}


# The flags whose values are files or folders of the material.
PATH_FLAGS = ("reward_model", "sae", "pool", "texts", "save")


@pytest.fixture
def refuse(sarm_material, tmp_path, capfd):
    """A function: the command must end with one line, which is returned, and leave no folder."""
    root = sarm_material.root
    write_rows(root / "pool.jsonl", [{"prompt": "review the hotel :", "responses": ["a", "b"]}])

    def run(command, **changes):
        flags = {}
        for name, value in changes.items():
            flags[name] = root / value if name in PATH_FLAGS else value
        error = probe_refused(capfd, *feature_flags(command, root, tmp_path / "out", **flags))
        assert not (tmp_path / "out").exists()
        return error

    return run


@pytest.mark.parametrize(
    "edits",
    [
        "3:off:0",
        "3:set",
        "3:set:x",
        "3:set:nan",
        "3:set:1e39",
        "3:*:-1e300",
        "1" * 5000 + ":set:0",
        "3:set:0:0",
    ],
)
def test_an_edit_that_cannot_be_read_is_one_line(refuse, edits):
    assert f"--edits {edits}: it must be FEATURE:OP:VALUE" in refuse("causal", edits=edits)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "--edits names what is changed"),
        ({"edits": "48:set:0"}, "feature 48: there are the features 0 to 47"),
        ({"edits": "9" * 18 + ":set:0"}, "there are the features 0 to 47"),
        ({"edits": "3:*:3e38"}, "an edit makes a score of the reward model"),
        ({"edits": ["3:set:0", "3:max:1"]}, "names feature 3 twice"),
        ({"edits": "3:set:0", "pool": "pool.jsonl"}, "--n 16: "),
        ({"edits": "3:set:0", "n": 1}, "--n must be at least 2"),
        ({"edits": "3:set:0", "reward_model": "rm"}, "rm is no SARM: name an autoencoder"),
    ],
)
def test_wrong_input_of_causal_is_one_line(refuse, changes, words):
    assert words in refuse("causal", **changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "name --edits of features or --weights of the head"),
        ({"edits": "1:set:0", "weights": "1:set:0"}, "one of both"),
        ({"weights": "3:set:3e38"}, "gave a score that is not finite"),
        (
            {"weights": "1:*:0", "reward_model": "rm", "sae": "sae"},
            "--weights edits a SARM's head",
        ),
        ({"edits": "1:*:0", "save": "new"}, "edits of features are no part of a model"),
        ({"weights": "1:*:0", "save": "sarm"}, "it is there already"),
        ({"weights": "1:*:0", "texts": "pairs.jsonl"}, "no field 'response'"),
    ],
)
def test_wrong_input_of_steer_is_one_line(refuse, changes, words):
    assert words in refuse("steer", **changes)

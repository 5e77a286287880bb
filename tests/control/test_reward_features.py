"""probe.py reward_features on a tiny random SARM: every number by hand.

One text at a time goes through the LM that the SARM was cut from.

    N texts, M features
"""

from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import (
    GOOD_REPLY,
    Endpoint,
    chat,
    feature_flags,
    probe_refused,
    read_rows,
    widest,
    write_rows,
)
from tiny_models import SARM_M as M

from nanorlhf import world
from nanorlhf.control import reward_features
from nanorlhf.control.feature_texts import match_answers


def z_of(readings):
    """All latents of all texts: [N, M]."""
    return np.array([reading.z for reading in readings])


def firing_rates(readings):
    """The share of texts on which each feature fires: [M]."""
    return (z_of(readings) != 0).mean(0)


def positive_means(readings):
    """The mean over texts of max(z, 0), which the two measures of Zhang et al. read: [M]."""
    return np.maximum(z_of(readings), 0).mean(0)


def row_of(found, feature):
    """The row of a summary that is about this feature."""
    rows = {row["id"]: row for row in found["features"]}
    return rows[feature]


def means_of(found, kind, measure):
    """One measure of all features, in the order of the rows. kind: pairs, or policy."""
    return [row[kind][measure]["mean"] for row in found["features"]]


def assert_largest_first(numbers):
    """The sizes of the numbers descend, whatever their signs."""
    assert numbers == sorted(numbers, key=abs, reverse=True)


# ------------------------------------------------------------------------- numbers about pairs


@pytest.fixture(scope="module")
def on_pairs(run_on_sarm):
    """The summary of the command on the held-out pairs."""
    return run_on_sarm("reward_features", top=4).found


def test_the_margin_and_accuracy_of_the_pairs(on_pairs, sarm_material, pairs_by_hand):
    pairs = sarm_material.pairs
    margins = []
    wins = []
    for chosen, rejected in zip(pairs_by_hand["chosen"], pairs_by_hand["rejected"]):
        margins.append(chosen.score - rejected.score)
        wins.append(chosen.score > rejected.score)
    found = on_pairs["pairs"]
    assert found["pairs"] == len(pairs)
    assert found["prompts"] == len({row["prompt"] for row in pairs})
    assert found["margin"] == pytest.approx(fmean(margins), abs=1e-5)
    assert found["accuracy"] == fmean(wins)


def test_prompts_that_are_chats_are_counted():
    prompts = [[{"role": "user", "content": text}] for text in ("a b", "c", "a  b")]
    scores = {"chosen": torch.ones(3), "rejected": torch.zeros(3)}
    numbers = SimpleNamespace(contribution=None)
    found = reward_features.compare_scores(scores, prompts, "pairs", numbers)
    assert found["prompts"] == 2


def test_there_is_a_row_for_each_feature_that_fires(on_pairs, pairs_by_hand):
    all_z = z_of(pairs_by_hand["chosen"] + pairs_by_hand["rejected"])
    firing = (all_z != 0).any(0).nonzero()[0].tolist()
    assert sorted(row["id"] for row in on_pairs["features"]) == firing
    assert on_pairs["firing"] == len(firing)
    assert on_pairs["m"] == M


def test_rates_and_measures_of_each_feature(on_pairs, sarm_material, pairs_by_hand):
    c = positive_means(pairs_by_hand["chosen"])  # [M]
    j = positive_means(pairs_by_hand["rejected"])  # [M]
    damping = c.mean() + j.mean()
    rates_chosen = firing_rates(pairs_by_hand["chosen"])
    rates_rejected = firing_rates(pairs_by_hand["rejected"])
    for row in on_pairs["features"]:
        i = row["id"]
        w = sarm_material.weights[i]
        assert row["weight"] == pytest.approx(w)
        assert row["raises"] == (w > 0)

        found = row["pairs"]
        assert found["rate_chosen"] == pytest.approx(rates_chosen[i])
        assert found["rate_rejected"] == pytest.approx(rates_rejected[i])

        differential = (c[i] - j[i]) / (c[i] + j[i] + damping)
        contribution = w * (c[i] - j[i])
        assert found["differential"]["mean"] == pytest.approx(differential, abs=1e-5)
        assert found["contribution"]["mean"] == pytest.approx(contribution, abs=1e-5)
        for measure in (found["differential"], found["contribution"]):
            assert measure["low"] <= measure["mean"] <= measure["high"]


def score_gap_by_least_squares(pairs_by_hand, i):
    """A regression of the score on "feature i fires", with an intercept for each side."""
    rows = []
    scores = []
    for side, readings in pairs_by_hand.items():
        for reading in readings:
            rows.append([float(reading.z[i] != 0), float(side == "chosen"), 1.0])
            scores.append(reading.score)
    coefficients, *_ = np.linalg.lstsq(np.array(rows), np.array(scores), rcond=None)
    return coefficients[0]


def test_the_score_gap_is_least_squares(on_pairs, pairs_by_hand):
    for row in on_pairs["features"]:
        # A feature that fires on all texts of each side has no gap.
        if row["score_gap"] is not None:
            expected = score_gap_by_least_squares(pairs_by_hand, row["id"])
            assert row["score_gap"] == pytest.approx(expected, abs=1e-4)


def test_the_largest_contributions_come_first_and_are_described(on_pairs):
    contributions = means_of(on_pairs, "pairs", "contribution")
    assert_largest_first(contributions)
    assert on_pairs["pairs"]["contributions"] == pytest.approx(sum(contributions))
    # --top 4
    described_ids = []
    for place, row in enumerate(on_pairs["features"]):
        assert ("tokens" in row) == (place < 4)
        if place < 4:
            described_ids.append(row["id"])
    assert on_pairs["described"] == described_ids


# --------------------------------------------------------------------- descriptions of features


def two_features_of_a_text(pairs_by_hand):
    """Two features that fire on the first chosen answer."""
    z = np.array(pairs_by_hand["chosen"][0].z)
    return z.nonzero()[0][:2].tolist()


@pytest.fixture(scope="module")
def described(sarm_material, pairs_by_hand, run_on_sarm):
    """A run that names two features that fire and one that never does. -> their ids, ProbeRun"""
    a, b = two_features_of_a_text(pairs_by_hand)
    silent = sarm_material.sarm.sae.b_enc.argmin().item()
    ran = run_on_sarm("reward_features", features=f"{b},{a},{silent}", contexts=2)
    return [b, a, silent], ran


def test_the_features_that_are_named_are_described_in_that_order(described):
    features, ran = described
    assert ran.found["described"] == features


def words_of(row, side):
    """The tokens of a text, which are words in the embedded world."""
    return f"{row['prompt']} {row[side]} <eos>".split()


def compare(x, y):
    """1 where x is larger, 0.5 in a tie, 0 where it is smaller."""
    if x == y:
        return 0.5
    return float(x > y)


def split_by_token(token, i, side, pairs, readings):
    """z_i on the texts of a side that have a token, and on those that do not."""
    with_token = []
    without_token = []
    for row, reading in zip(pairs, readings):
        if token in words_of(row, side):
            with_token.append(reading.z[i])
        else:
            without_token.append(reading.z[i])
    return with_token, without_token


def test_tokens_of_a_feature_are_those_whose_texts_have_more_of_it(
    described, sarm_material, pairs_by_hand
):
    features, ran = described
    for i in features:
        for token, auc, n_texts, rate_with, rate_without in row_of(ran.found, i)["tokens"]:
            all_with = []
            all_without = []
            wins = []
            for side, readings in pairs_by_hand.items():
                z_with, z_without = split_by_token(token, i, side, sarm_material.pairs, readings)
                all_with += z_with
                all_without += z_without
                # Only texts of the same side are compared.
                for x in z_with:
                    for y in z_without:
                        wins.append(compare(x, y))
            assert auc == pytest.approx(fmean(wins), abs=1e-6)
            assert n_texts == len(all_with)
            assert rate_with == pytest.approx((np.array(all_with) != 0).mean())
            assert rate_without == pytest.approx((np.array(all_without) != 0).mean())
            # A token that nearly no text has, or nearly all, is not shown.
            assert len(all_with) >= 10
            assert len(all_without) >= 10


def test_the_tokens_that_tell_most_come_first(described):
    features, ran = described
    for i in features:
        tokens = row_of(ran.found, i)["tokens"]
        assert len(tokens) == reward_features.SHOWN
        distances = []
        for _, auc, *_ in tokens:
            distances.append(auc - 0.5)
        assert_largest_first(distances)


def test_contexts_are_the_texts_on_which_a_feature_is_largest(
    described, sarm_material, pairs_by_hand
):
    features, ran = described
    all_z = z_of(pairs_by_hand["chosen"] + pairs_by_hand["rejected"])
    for i in features:
        peaks = sorted(all_z[:, i], reverse=True)
        for k, context in enumerate(row_of(ran.found, i)["contexts"]):
            assert context["z"] == pytest.approx(peaks[k], abs=1e-4)
            # The text that is shown is the one that has this z.
            side = context["side"]
            texts = [words_of(row, side) for row in sarm_material.pairs]
            place = texts.index(context["tokens"])
            assert context["z"] == pytest.approx(pairs_by_hand[side][place].z[i], abs=1e-4)
            # The feature is read at the last token alone.
            *earlier, last = context["values"]
            assert earlier == [0] * (len(context["tokens"]) - 1)
            assert last == pytest.approx(peaks[k] / peaks[0], abs=1e-3)


def test_what_is_printed(described):
    features, ran = described
    assert widest(ran.printed) <= 140
    for i in features:
        row = row_of(ran.found, i)
        best_token = row["tokens"][0][0]
        assert f"{best_token} ." in ran.printed
        for context in row["contexts"]:
            assert f"z {context['z']:6.2f}" in ran.printed


# ----------------------------------------------------------------- a policy's answers, and orders


@pytest.fixture
def both_files(sarm_material):
    return {
        "answers": sarm_material.root / "after.jsonl",
        "against": sarm_material.root / "before.jsonl",
        "top": 2,
    }


@pytest.mark.slow
def test_answers_after_against_before_are_matched_by_prompt(sarm_material, run_on_sarm, both_files):
    """Beside the pairs; in the order of the policy's contribution."""
    ran = run_on_sarm("reward_features", **both_files)
    assert widest(ran.printed) <= 140
    assert "after against before: 30 pairs of 15 prompts" in ran.printed

    after = sarm_material.read_rows(read_rows(both_files["answers"]))
    before = sarm_material.read_rows(read_rows(both_files["against"]))
    gains = positive_means(after) - positive_means(before)  # [M]
    rates_after = firing_rates(after)
    for row in ran.found["features"]:
        i = row["id"]
        contribution = sarm_material.weights[i] * gains[i]
        assert row["policy"]["contribution"]["mean"] == pytest.approx(contribution, abs=1e-5)
        assert row["policy"]["rate_after"] == pytest.approx(rates_after[i])
        assert set(row["pairs"]) == {"rate_chosen", "rate_rejected", "differential", "contribution"}
    assert_largest_first(means_of(ran.found, "policy", "contribution"))


def test_answers_alone_by_the_differential(run_on_sarm, both_files):
    found = run_on_sarm("reward_features", dataset="", by="differential", **both_files).found
    assert "pairs" not in found
    assert_largest_first(means_of(found, "policy", "differential"))


def test_pairs_by_the_weight(run_on_sarm):
    ran = run_on_sarm("reward_features", by="weight")
    assert_largest_first([row["weight"] for row in ran.found["features"]])
    assert widest(ran.printed) <= 140


def test_the_kth_answer_stands_beside_the_kth():
    after = [{"prompt": p, "response": f"{p}{i}"} for i, p in enumerate("abab")]
    before = [{"prompt": text[0], "response": text} for text in ("b1", "b2", "a1", "a2")]
    partners = match_answers(after, before, ("after", "before"))
    assert [row["response"] for row in partners] == ["a1", "b1", "a2", "b2"]


def test_answers_that_were_cut_off_are_read_without_eos(sarm_material, run_on_sarm, tmp_path):
    tokenizer = world.tokenizer()
    cut_rows = []
    for i, prompt_row in enumerate(world.prompts("test")[:12]):
        # Eight or seven tokens, and no EOS behind them.
        response_ids = tokenizer("the room was superb . the room was").input_ids[: 8 - i % 2]
        row = {
            "prompt": prompt_row["prompt"],
            "response": tokenizer.decode(response_ids),
            "prompt_ids": tokenizer(prompt_row["prompt"]).input_ids,
            "response_ids": response_ids,
        }
        cut_rows.append(row)
    # Ids that are not those of the words are another tokenizer's: the words are read, to their end.
    other_rows = [row | {"response_ids": [5] * 9} for row in cut_rows]
    write_rows(tmp_path / "cut.jsonl", cut_rows)
    write_rows(tmp_path / "other.jsonl", other_rows)

    files = {"answers": tmp_path / "cut.jsonl", "against": tmp_path / "other.jsonl"}
    found = run_on_sarm("reward_features", dataset="", **files).found

    cut_scores = []
    whole_scores = []
    for row in cut_rows:
        cut_scores.append(sarm_material.read(row["prompt"], row["response_ids"]).score)
        whole_scores.append(sarm_material.read(row["prompt"], row["response"]).score)
    margin = fmean(cut_scores) - fmean(whole_scores)
    assert found["policy"]["margin"] == pytest.approx(margin, abs=1e-5)
    assert abs(margin) > 1e-3  # the EOS matters to this model


def test_a_reward_model_with_an_autoencoder(sarm_material, run_on_sarm):
    """No head reads the latents: there are no weights and no contributions."""
    root = sarm_material.root
    ran = run_on_sarm("reward_features", reward_model=root / "rm", sae=root / "sae", top=3)
    first = ran.found["features"][0]
    assert ran.found["by"] == "differential"
    assert first["weight"] is None
    assert first["pairs"]["contribution"] is None
    assert widest(ran.printed) <= 140


# --------------------------------------------------------------------------------- the explainer


def test_an_explainer_is_asked_about_texts(pairs_by_hand, run_on_sarm):
    a, b = two_features_of_a_text(pairs_by_hand)
    with Endpoint(chat(GOOD_REPLY)) as endpoint:
        ran = run_on_sarm(
            "reward_features",
            features=f"{a},{b}",
            related_to="manners",
            explainer=endpoint.url,
            explainer_model="tiny",
            pause=0.01,
        )
        _, _, request = endpoint.asked[0]
        assert len(endpoint.asked) == 2

    prompt = request["messages"][0]["content"]
    row = row_of(ran.found, a)
    best_token = row["tokens"][0][0]
    assert "to do with manners" in prompt
    assert repr(best_token) in prompt
    # Each context is marked once, where the feature is read: at the EOS.
    assert "<eos> [[10]]" in prompt
    assert prompt.count("[[") == len(row["contexts"])
    assert row["description"] == "Fires on adjectives."
    assert "Fires on adjectives." in ran.printed


# ----------------------------------------------------------------------------------- wrong input

# The flags whose values are files or folders of the material.
PATH_FLAGS = ("reward_model", "sae", "answers", "against")


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
    root = sarm_material.root
    # One answer too few.
    write_rows(root / "short.jsonl", read_rows(root / "before.jsonl")[:-1])
    flags = {}
    for name, value in changes.items():
        flags[name] = root / value if name in PATH_FLAGS else value

    error = probe_refused(capfd, *feature_flags("reward_features", root, tmp_path / "out", **flags))

    assert words in error
    assert not (tmp_path / "out").exists()

"""Ensemble objectives against loops in exact arithmetic, and the mean of weights against numpy.

K members, each with a score for every answer: a column of scores [K, ...] is one answer.
"""

import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from checks import refuses
from torch import nn

from nanorlhf import ensemble
from nanorlhf.ensemble import (
    average_weights,
    combine,
    combine_all,
    objective_of,
    variance,
    weighted_sum,
)

OBJECTIVES = ["mean", "wco", "uwo"]


def combine_by_hand(answer_scores, objective, uwo_lambda):
    """One answer's K scores -> its combined score, in fractions, which do not round.

    mu = (1/k) sum_i r_i; wco: min_i r_i; uwo: mu - lambda (1/k) sum_i (r_i - mu)^2
    (Coste et al. 2024).
    """
    r = [Fraction(x) for x in answer_scores]
    mu = sum(r) / len(r)
    spread = Fraction(0)
    for x in r:
        spread += (x - mu) ** 2 / len(r)  # ddof 0
    if objective == "mean":
        return float(mu)
    if objective == "wco":
        return float(min(r))
    return float(mu - Fraction(uwo_lambda) * spread)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", [(1, 4), (5, 7), (3, 2, 6), (4,)])
@pytest.mark.parametrize("uwo_lambda", [0, 0.1, 2.5])
def test_combine_equals_fractions(objective, shape, uwo_lambda):
    generator = torch.Generator().manual_seed(len(shape))
    scores = torch.randn(shape, dtype=torch.float64, generator=generator)  # [K, ...]
    expected = []
    answers = scores.reshape(shape[0], -1).T  # [N, K]
    for answer_scores in answers.tolist():
        expected.append(combine_by_hand(answer_scores, objective, uwo_lambda))
    expected = torch.tensor(expected, dtype=torch.float64)

    combined = combine(scores, objective, uwo_lambda)
    assert combined.shape == scores.shape[1:]
    assert torch.allclose(combined.flatten(), expected, atol=1e-14, rtol=0)


def test_variance_is_the_populations():
    # Answer 0 has the scores 1 and 3, answer 1 has 5 twice. ddof 1 would give 2 and 0.
    two_members = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert variance(two_members).tolist() == [1.0, 0.0]


def test_variance_of_a_single_member_is_0():
    one_member = torch.tensor([[1.0, 2.0]])
    assert variance(one_member).tolist() == [0.0, 0.0]  # no NaN


@pytest.mark.parametrize("objective", ensemble.OBJECTIVES)
def test_a_single_member_is_its_own_ensemble(objective):
    scores = torch.randn(1, 9)
    assert combine(scores, objective, 7.0).equal(scores[0])


@pytest.mark.parametrize("objective", ensemble.OBJECTIVES)
def test_an_answer_is_scored_by_its_own_members_alone_in_any_order(objective):
    scores = torch.randn(3, 4, 5)  # [K, P, N]
    combined = combine(scores, objective)
    of_one = combine(scores[:, 1, 2], objective)
    torch.testing.assert_close(combined[1, 2], of_one)
    torch.testing.assert_close(combine(scores.flip(0), objective), combined)


def test_lambda_zero_is_the_mean():
    scores = torch.randn(4, 9)
    mean = combine(scores, "mean")
    assert combine(scores, "uwo", 0).equal(mean)


def test_lambda_is_a_half_by_default():
    scores = torch.randn(4, 9)
    half = combine(scores, "uwo", 0.5)
    assert combine(scores, "uwo").equal(half)


def test_all_objectives_at_once():
    scores = torch.randn(4, 9)
    combined = combine_all(scores, [0.1, 2.0])
    assert {"mean", "wco", "uwo_0.1", "uwo_2"} <= set(combined)
    assert combined["mean"].equal(combine(scores, "mean"))
    assert combined["wco"].equal(combine(scores, "wco"))
    assert combined["uwo_0.1"].equal(combine(scores, "uwo", 0.1))
    assert combined["uwo_2"].equal(combine(scores, "uwo", 2.0))
    of_labels = {objective_of(label) for label in combined}
    assert of_labels == set(ensemble.OBJECTIVES)
    assert objective_of("uwo_") is None
    assert objective_of("gold") is None


def test_an_ensemble_never_scores_above_its_mean():
    scores = torch.randn(5, 100)
    mean = combine(scores, "mean")
    worst = combine(scores, "wco")
    lowered = combine(scores, "uwo")
    assert (worst <= mean).all()
    assert (lowered < mean).all()


def test_a_weighted_sum():
    # Two rewards of three answers; 1 and 1/5 of them: 1 + 5/5, 2 + 0, 0 - 5/5.
    scores = torch.tensor([[1.0, 2.0, 0.0], [5.0, 0.0, -5.0]])
    assert weighted_sum(scores, [1, 0.2]).tolist() == [2, 2, -1]
    assert torch.equal(weighted_sum(scores, [0, 1]), scores[1])
    assert weighted_sum(scores[:, None], [1, 1]).shape == (1, 3)


def test_each_reward_has_its_weight():
    with pytest.raises(ValueError, match="2 rewards and 1 weights"):
        weighted_sum(torch.ones(2, 3), [1])
    with pytest.raises(ValueError, match="not finite"):
        weighted_sum(torch.tensor([[1.0], [float("nan")]]), [1, 1])


def test_whole_numbers_and_lists():
    scores = [[1, 2], [2, 4]]
    assert combine(scores, "mean").tolist() == [1.5, 3.0]
    assert combine(scores, "uwo", 1).tolist() == [1.25, 2.0]


ZEROS = torch.zeros(2, 3)
NAN = float("nan")
INF = float("inf")
MISTAKES = {
    "unknown objective": (ZEROS, "nonsense", 0.5, "must be one of mean, "),
    "negative lambda": (ZEROS, "uwo", -0.1, "at least 0"),
    "lambda NaN": (ZEROS, "uwo", NAN, "at least 0"),
    "lambda infinite": (ZEROS, "uwo", INF, "at least 0"),
    "no member": (torch.zeros(0, 3), "mean", 0.5, "at least one member"),
    "no dimension": (torch.tensor(1.0), "mean", 0.5, "at least one member"),
    "score NaN": (torch.tensor([[1.0, NAN]]), "wco", 0.5, "not finite"),
    "score infinite": (torch.tensor([[1.0, INF]]), "mean", 0.5, "not finite"),
}


@pytest.mark.parametrize(
    "scores, objective, uwo_lambda, words", MISTAKES.values(), ids=MISTAKES.keys()
)
def test_errors(scores, objective, uwo_lambda, words):
    with refuses(words):
        combine(scores, objective, uwo_lambda)


# ------------------------------------------------------------------------------ the mean of weights


def make_member(seed, width=4):
    """A small network of random weights, one of which is frozen."""
    torch.manual_seed(seed)
    member = nn.Sequential(
        nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 1, bias=False)
    )
    member[0].weight.requires_grad_(False)
    return member


@pytest.mark.parametrize("k", [1, 2, 5])
def test_every_weight_is_the_mean_of_the_members(k):
    members = [make_member(seed) for seed in range(k)]
    arrays = {}  # {name: the k members' weights}, before the mean is taken
    for name in members[0].state_dict():
        of_members = [member.state_dict()[name].double().numpy() for member in members]
        arrays[name] = np.stack(of_members)

    average = average_weights(members)
    assert len(arrays) == 5
    for name, weight in average.state_dict().items():
        expected = arrays[name].mean(axis=0)
        np.testing.assert_allclose(weight.numpy(), expected, rtol=0, atol=1e-6)


def test_the_mean_of_a_model_and_its_copy_is_the_model():
    average = average_weights([make_member(3), make_member(3), make_member(3)])
    for weight, other in zip(average.parameters(), make_member(3).parameters()):
        assert weight.equal(other)


def test_one_member_is_held_beside_the_mean():
    """While a member is made, the ones before it are gone, but for the first, which is the mean."""
    made = []  # weak references

    def make_next():
        member = make_member(len(made))
        made.append(weakref.ref(member))
        return member

    def make_members():
        for i in range(4):
            alive = [j for j in range(i) if made[j]() is not None]
            assert alive in ([], [0])
            yield make_next()

    assert average_weights(make_members()) is made[0]()
    assert len(made) == 4


WITHOUT_MEAN = {
    "no model": ([], "no model to average"),
    "other shapes": ([make_member(0), make_member(1, width=5)], "different architectures"),
    "fewer weights": ([make_member(0), make_member(1)[:2]], "different architectures"),
    "more weights": ([make_member(0)[:2], make_member(1)], "different architectures"),
}


@pytest.mark.parametrize("members, words", WITHOUT_MEAN.values(), ids=WITHOUT_MEAN.keys())
def test_what_has_no_mean(members, words):
    with refuses(words):
        average_weights(members)

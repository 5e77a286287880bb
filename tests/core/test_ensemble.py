"""Ensemble objectives against loops in exact arithmetic."""

from fractions import Fraction

import pytest
import torch

from nanorlhf.ensemble import combine, variance


def by_hand(column, objective, lam):
    """One answer's K scores, as fractions."""
    r = [Fraction(x) for x in column]
    if objective == "wco":
        return float(min(r))
    mu = sum(r) / len(r)
    spread = sum((x - mu) ** 2 for x in r) / len(r)  # ddof 0
    return float(mu - (Fraction(lam) * spread if objective == "uwo" else 0))


@pytest.mark.parametrize("objective", ["mean", "wco", "uwo"])
@pytest.mark.parametrize("shape", [(1, 4), (5, 7), (3, 2, 6), (4,)])
@pytest.mark.parametrize("lam", [0, 0.1, 2.5])
def test_combine_equals_fractions(objective, shape, lam):
    scores = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))
    got = combine(scores, objective, lam)
    assert got.shape == scores.shape[1:]
    expected = [by_hand(column.tolist(), objective, lam) for column in scores.reshape(shape[0], -1).T]
    assert torch.allclose(got.flatten(), torch.tensor(expected, dtype=torch.float64), atol=1e-14, rtol=0)


def test_variance_is_the_populations():
    assert variance(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).tolist() == [1.0, 0.0]  # ddof 1 would give 2
    assert variance(torch.tensor([[1.0, 2.0]])).tolist() == [0.0, 0.0]  # one member: no NaN


def test_a_single_member_is_its_own_ensemble():
    scores = torch.randn(1, 9)
    assert all(combine(scores, objective, 7.0).equal(scores[0]) for objective in ("mean", "wco", "uwo"))


def test_lambda_zero_is_the_mean_and_half_is_the_default():
    scores = torch.randn(4, 9)
    assert combine(scores, "uwo", 0).equal(combine(scores, "mean"))
    assert combine(scores, "uwo").equal(combine(scores, "uwo", 0.5))


def test_an_ensemble_never_scores_above_its_mean():
    scores = torch.randn(5, 100)
    assert (combine(scores, "wco") <= combine(scores, "mean")).all() and (combine(scores, "uwo") < combine(scores, "mean")).all()


def test_whole_numbers_and_lists():
    assert combine([[1, 2], [2, 4]], "mean").tolist() == [1.5, 3.0]
    assert combine([[1, 2], [2, 4]], "uwo", 1).tolist() == [1.25, 2.0]


@pytest.mark.parametrize("scores, objective, lam, words", [
    (torch.zeros(2, 3), "median", 0.5, "must be one of mean, wco, uwo"),
    (torch.zeros(2, 3), "uwo", -0.1, "at least 0"),
    (torch.zeros(2, 3), "uwo", float("nan"), "at least 0"),
    (torch.zeros(0, 3), "mean", 0.5, "at least one member"),
    (torch.tensor(1.0), "mean", 0.5, "at least one member"),
    (torch.tensor([[1.0, float("nan")]]), "wco", 0.5, "not finite"),
    (torch.tensor([[1.0, float("inf")]]), "mean", 0.5, "not finite"),
])  # fmt: skip
def test_errors(scores, objective, lam, words):
    with pytest.raises(ValueError, match=words):
        combine(scores, objective, lam)

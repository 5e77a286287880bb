"""Statistics against simulation; Kendall's tau is tested with the rewards."""

import pytest
import torch

from nanorlhf.stats import bootstrap, ratio


def test_ratio_by_hand():
    mean, se = ratio(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    assert mean == 2 and se == pytest.approx(1.0)  # with equal counts: the std (ddof 1) of 1 and 3 over sqrt(2)
    assert ratio(torch.tensor([3.0]), torch.tensor([2.0])) == (1.5, 0.0)


def test_ratio_against_simulation():
    """Rows whose tokens share a level: the reported standard error is the spread of the means over repetitions."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(400):
        counts = torch.randint(1, 30, (60,), generator=generator).double()
        level = torch.randn(60, generator=generator).double()
        results.append(ratio((2 + level) * counts, counts))
    means, errors = torch.tensor(results).T
    assert means.mean().item() == pytest.approx(2, abs=0.03)
    assert errors.mean().item() == pytest.approx(means.std().item(), rel=0.1)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_bootstrap_of_two_rows_by_hand():
    """The mean of two draws from 0 and 1 is 0, 1/2, 1 with chances 1/4, 1/2, 1/4; their maximum is 0 with chance 1/4."""
    values = torch.tensor([0, 1])
    for level, interval in ((0.4, (0.5, 0.5)), (0.6, (0, 1)), (0.95, (0, 1))):  # quantiles 0.3 and 0.7; 0.2 and 0.8; ...
        assert tuple(x.item() for x in bootstrap(values, level=level)) == interval
    for level, interval in ((0.4, (1, 1)), (0.6, (0, 1))):
        assert tuple(x.item() for x in bootstrap(values, lambda rows: rows.amax(0), level=level)) == interval


@pytest.mark.parametrize("shape", [(7,), (30, 4), (12, 2, 3), (3000, 2)])  # the last needs several parts
def test_bootstrap_mean_is_the_quick_way_to_the_same(shape):
    values = randn(*shape) + 100
    quick, slow = bootstrap(values), bootstrap(values, lambda rows: rows.mean(0))
    for a, b in zip(quick, slow, strict=True):
        assert a.shape == shape[1:] and a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_bootstrap_against_the_standard_error():
    """Of many rows the interval of the mean is 1.96 (or 1.645) standard errors to both sides, in every column."""
    values = randn(2000, 3) * torch.tensor([1.0, 5.0, 0.1]).double() + torch.tensor([0.0, 9.0, -4.0]).double()
    for level, z in ((0.95, 1.96), (0.9, 1.645)):
        half = z * values.std(0) / 2000**0.5
        low, high = bootstrap(values, level=level, resamples=8000)
        torch.testing.assert_close(values.mean(0) - low, half, rtol=0.06, atol=0)
        torch.testing.assert_close(high - values.mean(0), half, rtol=0.06, atol=0)


def test_bootstrap_coverage():
    """The interval holds the true mean about 94 times in 100 for 40 rows; for a handful as often as its docstring says."""
    for rows, expected in ((40, 0.94), (10, 0.90), (5, 0.84), (3, 0.75)):
        hits = 0
        for seed in range(12):
            low, high = bootstrap(randn(rows, 500, seed=seed), seed=seed)  # 500 columns: as many repetitions, of the same draws
            hits += ((low <= 0) & (high >= 0)).sum().item()
        assert hits / 6000 == pytest.approx(expected, abs=0.015)
    hits = 0
    for seed in range(50):  # skewed rows and another statistic: the median of an exponential is log 2
        low, high = bootstrap(randn(60, 2, seed=seed).square().sum(1) / 2, torch.median, resamples=200)
        hits += (low <= torch.tensor(2.0).log() <= high).item()
    assert hits >= 42


def test_bootstrap_is_deterministic():
    values, state = randn(20), torch.get_rng_state()
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # the draws are its own
    assert bootstrap(values.tolist(), lambda rows: rows.max().item()) == bootstrap(values, torch.max)  # a number will do
    assert bootstrap(torch.tensor([3.0])) == (3, 3)


@pytest.mark.parametrize("bad", [[], torch.zeros(0, 3), 1.0, [1.0, float("nan")], [[1.0], [float("inf")]]])
def test_bootstrap_errors(bad):
    with pytest.raises(ValueError, match="bootstrap"):
        bootstrap(bad)
    for setting in ({"level": 1.0}, {"level": 0}, {"resamples": 0}):
        with pytest.raises(ValueError, match="level between 0 and 1"):
            bootstrap([1.0, 2.0], **setting)

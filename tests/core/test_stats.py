"""Statistics against simulation, loops, refits and autograd; Kendall's tau is tested with the rewards."""

import math

import pytest
import torch

from nanorlhf.stats import (
    auc,
    bootstrap,
    logistic,
    mean_over_groups,
    percentiles,
    r_squared,
    ratio,
    ridge,
    t_interval,
    t_quantile,
    win_points,
)


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


def test_win_points_are_the_loop():
    a, b = (torch.randint(4, (50,), generator=torch.Generator().manual_seed(seed)) / 3 for seed in (0, 1))
    points = [1.0 if x > y else 0.5 if x == y else 0.0 for x, y in zip(a.tolist(), b.tolist())]
    assert win_points(a, b).tolist() == points and {0, 0.5, 1} == set(points)
    assert (win_points(a, b) + win_points(b, a) == 1).all()
    for bad in ((torch.zeros(2), torch.zeros(3)), (torch.zeros(2), torch.tensor([1.0, float("nan")]))):
        with pytest.raises(ValueError, match="win_points"):
            win_points(*bad)


def test_mean_over_groups_by_hand():
    """Of a group of one row, 1, and one of three, 0: two draws give 1, 1/4 and 0 with chances 1/4, 1/2, 1/4."""
    mean, draws = mean_over_groups(torch.tensor([0, 1, 0, 0]), torch.tensor([7, 3, 7, 7]), resamples=8000)
    assert mean == 0.25 and draws.unique().tolist() == [0, 0.25, 1]
    assert [(draws == x).double().mean().item() for x in (0, 0.25, 1)] == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    values = randn(30)
    mean, draws = mean_over_groups(values)
    assert mean == pytest.approx(values.mean().item())
    assert torch.stack(percentiles(draws)).tolist() == pytest.approx(torch.stack(bootstrap(values)).tolist())
    tables = torch.stack([values, 2 * values + 1], 1).view(30, 2, 1)
    means, both = mean_over_groups(tables)
    assert means.shape == (2, 1) and torch.allclose(both[:, 0, 0], draws) and torch.allclose(both[:, 1, 0], 2 * draws + 1)
    for bad in ([], [float("inf")]):
        with pytest.raises(ValueError):
            mean_over_groups(bad)
    with pytest.raises(ValueError, match="1 groups for 2 rows"):
        mean_over_groups([1.0, 2.0], [1])


def test_intervals_over_groups_hold_the_truth():
    """Rows of a group share a level; a difference of two sets. Rows drawn singly would hold the true difference, 1, far too seldom."""
    hits, naive = 0, 0
    for seed in range(100):
        sets = []
        for part, (groups, shift) in enumerate(((40, 1.0), (30, 0.0))):
            labels = torch.arange(groups).repeat_interleave(torch.arange(groups) % 5 + 1)
            values = randn(groups, seed=4 * seed + part)[labels] + 0.3 * randn(len(labels), seed=4 * seed + 2 + part) + shift
            sets.append((values, labels))
        for grouped in (True, False):
            draws = [mean_over_groups(values, labels if grouped else None, 300, seed=i)[1] for i, (values, labels) in enumerate(sets)]
            low, high = percentiles(draws[0] - draws[1])
            inside = low <= 1 <= high
            hits, naive = hits + (inside if grouped else 0), naive + (0 if grouped else inside)
    assert hits >= 88 and naive <= 85


def test_t_quantile():
    for dof, expected in ((1, 12.7062), (2, 4.30265), (5, 2.57058), (14, 2.14479), (100, 1.98397), (3000, 1.96076)):
        assert t_quantile(dof) == pytest.approx(expected, rel=1e-4)


def test_t_interval_coverage():
    rows = randn(600, 5, seed=3).tolist()
    assert sum(abs(mean) <= half for mean, half in map(t_interval, rows)) / 600 == pytest.approx(0.95, abs=0.02)
    assert t_interval([1.0, 3.0]) == (2.0, pytest.approx(12.7062, rel=1e-4)) and math.isnan(t_interval([1.0])[1])
    assert all(math.isnan(x) for x in t_interval([1.0, math.nan, 2.0]))


def test_auc_by_all_pairs():
    for seed, levels in ((0, 3), (1, 10), (2, 10_000)):  # many ties, some, none
        scores = torch.randint(levels, (60,), generator=torch.Generator().manual_seed(seed))
        labels = randn(60, seed=seed) > 0.3
        pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels].tolist() for n in scores[~labels].tolist()]
        assert auc(scores, labels) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
        assert auc(-scores, labels.int()) == pytest.approx(1 - auc(scores, labels), abs=1e-12)
    assert auc([1, 1, 1], [0, 1, 1]) == 0.5
    for scores, labels in (([1.0, 2.0], [1, 1]), ([1.0, 2.0], [0, 0]), ([1.0], [0, 1]), ([1.0, math.nan], [0, 1])):
        with pytest.raises(ValueError, match="auc"):
            auc(scores, labels)


def test_r_squared_by_hand():
    assert r_squared([1, 2, 3], [1, 2, 3]) == 1 and r_squared([1, 2, 3], [2, 2, 2]) == 0
    assert r_squared([1, 2, 3], [3, 2, 1]) == -3  # (4 + 0 + 4) / 2
    assert math.isnan(r_squared([2, 2, 2], [1, 2, 3])) and math.isnan(r_squared([2, 2, 2], [2, 2, 2]))  # nothing varies


def least_squares(x, y, alpha):
    """Ridge with a free intercept -> (w, b), as least squares on D rows more, sqrt(alpha) in each, that want 0."""
    d = x.shape[1]
    more = torch.cat([math.sqrt(alpha) * torch.eye(d).double(), torch.zeros(d, 1).double()], 1)
    rows = torch.cat([torch.cat([x, torch.ones(len(x), 1).double()], 1), more])
    return torch.linalg.lstsq(rows, torch.cat([y, torch.zeros(d).double()])).solution


@pytest.mark.parametrize("n, d", [(40, 6), (12, 30), (20, 20)])  # more rows than columns, fewer, as many
@pytest.mark.parametrize("size", [1, 3])
def test_ridge_against_refits(n, d, size):
    """The solution is that of least squares, and alpha the one that refits without each group find best."""
    x, alphas = randn(n, d, seed=1) + 3, (0.01, 0.3, 3.0, 30.0, 1000.0)
    for noise in (0.01, 1.0, 30.0):
        y = x @ randn(d, seed=2) + noise * randn(n, seed=3) - 7
        groups = torch.arange(n) // size
        errors = []
        for alpha in alphas:
            squares = 0.0
            for g in groups.unique():
                w = least_squares(x[groups != g], y[groups != g], alpha)
                squares += (y[groups == g] - x[groups == g] @ w[:-1] - w[-1]).square().sum().item()
            errors.append(squares)
        weight, bias, alpha = ridge(x, y, alphas, None if size == 1 else groups)
        assert alpha == alphas[errors.index(min(errors))]
        expected = least_squares(x, y, alpha)
        torch.testing.assert_close(weight, expected[:-1], rtol=1e-9, atol=1e-9)
        assert bias == pytest.approx(expected[-1].item(), rel=1e-9)


def test_groups_matter():
    """Rows in pairs of twins: left out alone, a row is predicted by its twin, and the smallest penalty looks best. In pairs it does not."""
    x, y = randn(40, 60, seed=4).repeat_interleave(2, 0), randn(40, seed=5).repeat_interleave(2)
    assert ridge(x, y, (1e-3, 1e4)).penalty == 1e-3
    assert ridge(x, y, (1e-3, 1e4), torch.arange(80) // 2).penalty == 1e4


def test_ridge_of_constant_columns_and_its_errors():
    y = randn(6)
    weight, bias, _ = ridge(torch.ones(6, 3), y, [1.0])
    assert weight.tolist() == [0, 0, 0] and bias == pytest.approx(y.mean().item())
    x = randn(6, 2)
    settings = ([],), ([0.0],), ([1.0], [0] * 6), ([1.0], [0, 1])
    for bad in (*((x, y, *setting) for setting in settings), (x, y[:5], [1.0]), (y, y, [1.0]), (x / 0, y, [1.0])):
        with pytest.raises(ValueError, match="ridge"):
            ridge(*bad)


@pytest.mark.parametrize("n, d", [(50, 4), (15, 40)])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_logistic_is_where_the_gradient_vanishes(n, d, intercept, scale):
    x = scale * (randn(n, d, seed=6) + 0.5)
    labels = x[:, 0] / scale + randn(n, seed=7) > 0.2
    weight, bias, _ = logistic(x, labels, 0.3, intercept)
    w, b = weight.clone().requires_grad_(), torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    losses = [torch.log1p(torch.exp(-(1 if label else -1) * (row @ w + b))) for row, label in zip(x, labels)]
    (sum(losses) + 0.15 * w.square().sum()).backward()
    assert w.grad.abs().max() < 1e-6 * scale and (b.grad.abs() < 1e-6 if intercept else bias == 0)


def standardised_columns(seed, d):
    """5,699 rows of d standardised columns (normal, cubed or of two values), and labels that follow them more or less."""
    generator = torch.Generator().manual_seed(2 * seed + d)
    x = torch.randn(5699, d, generator=generator, dtype=torch.float64)
    if seed % 3 == 0:
        x = x**3
    if seed % 4 == 1:
        x = (x > 1.5).double()
    x = (x - x.mean(0)) / x.std(0)
    weight = torch.randn(d, generator=generator, dtype=torch.float64) * (seed % 5) / 2
    bias = 2 * torch.randn(1, generator=generator, dtype=torch.float64)
    chance = torch.sigmoid(x @ weight + bias)
    return x, torch.rand(5699, generator=generator, dtype=torch.float64) < chance


def test_logistic_does_not_stall_on_rounding():
    """Where steps were judged by a loss that could no longer tell them apart, some of these never ended."""
    stalled = [(59, 2), (261, 2), (266, 1), (619, 1), (707, 2)]
    others = [(seed, d) for seed in range(30) for d in (1, 2)]
    for seed, d in stalled + others:
        x, labels = standardised_columns(seed, d)
        weight, bias, _ = logistic(x, labels, 1.0)
        residual = torch.sigmoid(x @ weight + bias) - labels.double()
        assert (x.T @ residual + weight).abs().max() < 1e-8 and residual.sum().abs() < 1e-8


def fitted_by_lbfgs(x, labels, l2, intercept):
    """Weight and bias of least penalised loss, by a general optimiser and autograd."""
    weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    sign = torch.where(labels, 1.0, -1.0).double()
    parameters = [weight, bias] if intercept else [weight]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=3000, max_eval=6000, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.softplus(-sign * (x @ weight + bias)).sum() + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.item()


@pytest.mark.parametrize("l2", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("intercept", [True, False])
def test_logistic_against_lbfgs(l2, intercept):
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(40 + 50 * seed, 1 + seed, generator=generator, dtype=torch.float64)
        if seed % 2:
            x = x**3
        labels = x[:, 0] + torch.randn(len(x), generator=generator, dtype=torch.float64) > 0.3
        weight, bias, _ = logistic(x, labels, l2, intercept)
        expected_weight, expected_bias = fitted_by_lbfgs(x, labels, l2, intercept)
        torch.testing.assert_close(weight, expected_weight, rtol=1e-6, atol=1e-6)
        assert bias == pytest.approx(expected_bias, rel=1e-6, abs=1e-6)


def test_logistic_of_classes_far_apart():
    """Rows at +-c, each with its label: the loss is 2 log(1 + e^-cw) + l2/2 w^2, its minimum where 2c / (1 + e^cw) = l2 w."""
    weight = logistic([[1000.0], [-1000.0]], [1, 0], 1e-8).weight.item()
    assert 2000 / (1 + math.exp(1000 * weight)) == pytest.approx(1e-8 * weight, rel=1e-6)


def test_logistic_closed_form():
    """One column of zeros: the bias alone, log(p / (1 - p)). One row of 1 for one winner: 1 / (1 + e^w) = l2 w."""
    assert logistic(torch.zeros(10, 1), [1] * 7 + [0] * 3).bias == pytest.approx(math.log(7 / 3), abs=1e-8)
    w = logistic([[1.0]], [1], 0.25, intercept=False).weight.item()
    assert 1 / (1 + math.exp(w)) == pytest.approx(0.25 * w, abs=1e-9)
    for bad in ((randn(4, 2), [1, 1, 1, 1]), (randn(4, 2), [1, 0]), (randn(4), [1, 0, 1, 0]), (randn(4, 2), [1, 0, 1, 0], 0.0)):
        with pytest.raises(ValueError, match="logistic"):
            logistic(*bad)

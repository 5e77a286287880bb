"""nanorlhf.stats against simulation, loops, refits and autograd.

Kendall's tau is tested with the rewards.
"""

import math

import pytest
import torch
from checks import randn, refuses, seeded

from nanorlhf.stats import (
    auc,
    bootstrap,
    logistic,
    mean_over_groups,
    mean_se,
    pair_wins,
    percentiles,
    r_squared,
    ratio,
    ridge,
    t_interval,
    t_quantile,
)

NAN = float("nan")
INF = float("inf")


# ----------------------------------------------------------------------------------------- ratio


def test_ratio_by_hand():
    # With equal counts the standard error is the std (ddof 1) of 1 and 3 over sqrt(2).
    mean, standard_error = ratio(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    assert mean == 2
    assert standard_error == pytest.approx(1.0)


def test_ratio_of_a_single_row_has_no_standard_error():
    assert ratio(torch.tensor([3.0]), torch.tensor([2.0])) == (1.5, 0.0)


def test_ratio_against_simulation():
    """The reported standard error is the spread of the means over 400 repetitions.

    The tokens of a row share a level, so that rows, not tokens, are independent.
    """
    generator = seeded(0)
    means = []
    errors = []
    for _ in range(400):
        counts = torch.randint(1, 30, (60,), generator=generator).double()
        level = torch.randn(60, generator=generator).double()
        mean, error = ratio((2 + level) * counts, counts)
        means.append(mean)
        errors.append(error)
    means = torch.tensor(means)
    errors = torch.tensor(errors)
    assert means.mean().item() == pytest.approx(2, abs=0.03)
    spread = means.std().item()
    assert errors.mean().item() == pytest.approx(spread, rel=0.1)


def test_mean_and_standard_error_by_hand():
    # The squared deviations of 1, 2, 6 from 3 are 14 in all: a variance of 7 (ddof 1), over 3 rows.
    number = mean_se(torch.tensor([1.0, 2.0, 6.0]))
    assert number == {"mean": 3.0, "se": pytest.approx((7 / 3) ** 0.5), "n": 3}
    assert mean_se(torch.tensor([4, 6])) == {"mean": 5.0, "se": pytest.approx(1.0), "n": 2}
    assert mean_se(torch.tensor([4.0])) == {"mean": 4.0, "se": 0.0, "n": 1}


# ------------------------------------------------------------------------------------- bootstrap


def interval_of(values, *statistic, level):
    """The bootstrap's interval as two numbers."""
    low, high = bootstrap(values, *statistic, level=level)
    return low.item(), high.item()


# A level of 0.4 asks for the quantiles 0.3 and 0.7, 0.6 for 0.2 and 0.8.
@pytest.mark.parametrize("level, interval", [(0.4, (0.5, 0.5)), (0.6, (0, 1)), (0.95, (0, 1))])
def test_bootstrap_mean_of_two_rows_by_hand(level, interval):
    """The mean of two draws from 0 and 1 is 0, 1/2, 1 with chances 1/4, 1/2, 1/4."""
    values = torch.tensor([0, 1])
    assert interval_of(values, level=level) == interval


@pytest.mark.parametrize("level, interval", [(0.4, (1, 1)), (0.6, (0, 1))])
def test_bootstrap_maximum_of_two_rows_by_hand(level, interval):
    """The maximum of two draws from 0 and 1 is 0 with chance 1/4."""
    values = torch.tensor([0, 1])
    assert interval_of(values, lambda rows: rows.amax(0), level=level) == interval


# The last shape needs several parts.
@pytest.mark.parametrize("shape", [(7,), (30, 4), (12, 2, 3), (3000, 2)])
def test_bootstrap_mean_is_the_quick_way_to_the_same(shape):
    values = randn(*shape) + 100
    quick = bootstrap(values)
    slow = bootstrap(values, lambda rows: rows.mean(0))
    for quick_end, slow_end in zip(quick, slow, strict=True):
        assert quick_end.shape == shape[1:]
        assert quick_end.dtype == torch.float64
        torch.testing.assert_close(quick_end, slow_end, rtol=1e-12, atol=0)


@pytest.mark.parametrize("level, z", [(0.95, 1.96), (0.9, 1.645)])
def test_bootstrap_against_the_standard_error(level, z):
    """The interval of the mean of many rows is z standard errors to both sides, in each column."""
    scale = torch.tensor([1.0, 5.0, 0.1]).double()
    shift = torch.tensor([0.0, 9.0, -4.0]).double()
    values = randn(2000, 3) * scale + shift
    mean = values.mean(0)
    half = z * values.std(0) / 2000**0.5

    low, high = bootstrap(values, level=level, resamples=8000)
    torch.testing.assert_close(mean - low, half, rtol=0.06, atol=0)
    torch.testing.assert_close(high - mean, half, rtol=0.06, atol=0)


# As often as its docstring says.
@pytest.mark.parametrize(
    "n_rows, expected",
    [
        (40, 0.94),
        pytest.param(10, 0.90, marks=pytest.mark.slow),
        pytest.param(5, 0.84, marks=pytest.mark.slow),
        (3, 0.75),
    ],
)
def test_bootstrap_coverage(n_rows, expected):
    """The interval holds the true mean about 94 times in 100 for 40 rows, less often for few."""
    hits = 0
    for seed in range(12):
        # 500 columns are as many repetitions, with the same draws.
        low, high = bootstrap(randn(n_rows, 500, seed=seed), seed=seed)
        holds_the_truth = (low <= 0) & (high >= 0)
        hits += holds_the_truth.sum().item()
    assert hits / 6000 == pytest.approx(expected, abs=0.015)


def test_bootstrap_coverage_of_the_median_of_skewed_rows():
    """The median of an exponential is log 2."""
    truth = torch.tensor(2.0).log()
    hits = 0
    for seed in range(50):
        exponential = randn(60, 2, seed=seed).square().sum(1) / 2
        low, high = bootstrap(exponential, torch.median, resamples=200)
        hits += (low <= truth <= high).item()
    assert hits >= 42


def test_bootstrap_is_deterministic():
    values = randn(20)
    state = torch.get_rng_state()
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values) != bootstrap(values, seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # the draws are its own


def test_a_statistic_may_be_a_number():
    values = randn(20)
    of_numbers = bootstrap(values.tolist(), lambda rows: rows.max().item())
    assert of_numbers == bootstrap(values, torch.max)


def test_bootstrap_of_a_single_row():
    assert bootstrap(torch.tensor([3.0])) == (3, 3)


BAD_VALUES = {
    "empty": [],
    "no row": torch.zeros(0, 3),
    "a number": 1.0,
    "NaN": [1.0, NAN],
    "infinite": [[1.0], [INF]],
}


@pytest.mark.parametrize("values", BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_bootstrap_needs_rows_of_finite_numbers(values):
    with refuses("bootstrap"):
        bootstrap(values)


@pytest.mark.parametrize("setting", [{"level": 1.0}, {"level": 0}, {"resamples": 0}], ids=str)
def test_bootstrap_settings(setting):
    with refuses("level between 0 and 1"):
        bootstrap([1.0, 2.0], **setting)


# -------------------------------------------------------------------------------- wins and groups


def test_pair_wins_are_the_loop():
    a = torch.randint(4, (50,), generator=seeded(0)) / 3
    b = torch.randint(4, (50,), generator=seeded(1)) / 3
    expected = []
    for x, y in zip(a.tolist(), b.tolist()):
        if x > y:
            expected.append(1.0)
        elif x == y:
            expected.append(0.5)
        else:
            expected.append(0.0)
    assert set(expected) == {0, 0.5, 1}
    assert pair_wins(a, b).tolist() == expected
    assert (pair_wins(a, b) + pair_wins(b, a) == 1).all()


def test_mean_over_groups_by_hand():
    """One group holds a single row, 1, the other three rows, 0.

    Two draws of groups give the means 1, 1/4 and 0 with the chances 1/4, 1/2 and 1/4.
    """
    values = torch.tensor([0, 1, 0, 0])
    groups = torch.tensor([7, 3, 7, 7])
    mean, draws = mean_over_groups(values, groups, resamples=8000)
    assert mean == 0.25
    assert draws.unique().tolist() == [0, 0.25, 1]
    shares = [(draws == x).double().mean().item() for x in (0, 0.25, 1)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_mean_over_groups_of_single_rows_is_the_bootstrap():
    values = randn(30)
    mean, draws = mean_over_groups(values)
    assert mean == pytest.approx(values.mean().item())
    interval = percentiles(draws).tolist()
    expected = torch.stack(bootstrap(values)).tolist()
    assert interval == pytest.approx(expected)


def test_mean_over_groups_of_tables_draws_the_same_rows_for_every_cell():
    values = randn(30)
    _, draws = mean_over_groups(values)
    tables = torch.stack([values, 2 * values + 1], 1).view(30, 2, 1)
    means, table_draws = mean_over_groups(tables)
    assert means.shape == (2, 1)
    assert torch.allclose(table_draws[:, 0, 0], draws)
    assert torch.allclose(table_draws[:, 1, 0], 2 * draws + 1)


def test_mean_over_groups_needs_finite_numbers_and_a_group_for_each():
    with pytest.raises(ValueError):
        mean_over_groups([])
    with pytest.raises(ValueError):
        mean_over_groups([INF])
    with refuses("1 groups for 2 rows"):
        mean_over_groups([1.0, 2.0], [1])


def grouped_rows(n_groups, shift, seed):
    """Rows of groups of 1 to 5, around `shift`: values [N], labels [N]. A group shares a level."""
    sizes = torch.arange(n_groups) % 5 + 1
    labels = torch.arange(n_groups).repeat_interleave(sizes)
    level = randn(n_groups, seed=seed)
    noise = 0.3 * randn(len(labels), seed=seed + 2)
    return level[labels] + noise + shift, labels


def holds_the_true_difference(first, second):
    """Whether the interval of the difference of two sets' means holds 1: (values, groups) each."""
    _, first_draws = mean_over_groups(*first, 300, seed=0)
    _, second_draws = mean_over_groups(*second, 300, seed=1)
    low, high = percentiles(first_draws - second_draws)
    return (low <= 1 <= high).item()


def test_intervals_over_groups_hold_the_truth():
    """Rows of a group share a level. Rows drawn singly hold the true difference far too seldom."""
    n_held = 0
    n_held_by_single_rows = 0
    for seed in range(100):
        first, first_labels = grouped_rows(40, 1.0, seed=4 * seed)
        second, second_labels = grouped_rows(30, 0.0, seed=4 * seed + 1)
        n_held += holds_the_true_difference((first, first_labels), (second, second_labels))
        n_held_by_single_rows += holds_the_true_difference((first, None), (second, None))
    assert n_held >= 88
    assert n_held_by_single_rows <= 85


# ----------------------------------------------------------------------------------- Student's t

T_TABLE = [(1, 12.7062), (2, 4.30265), (5, 2.57058), (14, 2.14479), (100, 1.98397), (3000, 1.96076)]


@pytest.mark.parametrize("dof, expected", T_TABLE)
def test_t_quantile_against_a_table(dof, expected):
    assert t_quantile(dof) == pytest.approx(expected, rel=1e-4)


def test_t_interval_coverage():
    hits = 0
    for row in randn(600, 5, seed=3).tolist():
        mean, half = t_interval(row)
        if abs(mean) <= half:
            hits += 1
    assert hits / 600 == pytest.approx(0.95, abs=0.02)


def test_t_interval_by_hand():
    mean, half = t_interval([1.0, 3.0])  # the standard error is 1
    assert mean == 2.0
    assert half == pytest.approx(12.7062, rel=1e-4)


def test_t_interval_of_what_has_none_is_nan():
    _, half = t_interval([1.0])
    assert math.isnan(half)
    mean, half = t_interval([1.0, NAN, 2.0])
    assert math.isnan(mean)
    assert math.isnan(half)


# --------------------------------------------------------------------------------- AUC and R^2


def auc_over_all_pairs(positives, negatives):
    """The share of pairs in which the positive outscores the negative, a tie counting half."""
    wins = 0.0
    for p in positives:
        for n in negatives:
            if p > n:
                wins += 1
            elif p == n:
                wins += 0.5
    return wins / (len(positives) * len(negatives))


@pytest.mark.parametrize(
    "seed, n_levels", [(0, 3), (1, 10), (2, 10_000)], ids=["many ties", "some ties", "no ties"]
)
def test_auc_by_all_pairs(seed, n_levels):
    scores = torch.randint(n_levels, (60,), generator=seeded(seed))
    labels = randn(60, seed=seed) > 0.3
    expected = auc_over_all_pairs(scores[labels].tolist(), scores[~labels].tolist())
    found = auc(scores, labels)
    assert found == pytest.approx(expected, abs=1e-12)
    # The other way round it is what is missing to 1.
    assert auc(-scores, labels.int()) == pytest.approx(1 - found, abs=1e-12)


def test_auc_of_ties_alone_is_chance():
    assert auc([1, 1, 1], [0, 1, 1]) == 0.5


def test_auc_needs_both_classes():
    with refuses("auc"):
        auc([1.0, 2.0], [1, 1])
    with refuses("auc"):
        auc([1.0, 2.0], [0, 0])


def test_auc_needs_a_finite_score_for_each_label():
    with refuses("auc"):
        auc([1.0], [0, 1])
    with refuses("auc"):
        auc([1.0, NAN], [0, 1])


def test_r_squared_by_hand():
    y = [1, 2, 3]
    assert r_squared(y, [1, 2, 3]) == 1
    assert r_squared(y, [2, 2, 2]) == 0
    assert r_squared(y, [3, 2, 1]) == -3  # 1 - (4 + 0 + 4) / 2


def test_r_squared_where_nothing_varies_is_nan():
    constant = [2, 2, 2]
    assert math.isnan(r_squared(constant, [1, 2, 3]))
    assert math.isnan(r_squared(constant, constant))


# ----------------------------------------------------------------------------------------- ridge


def ridge_by_least_squares(x, y, alpha):
    """Ridge with a free intercept as plain least squares -> w [D], b.

    D more rows want every weight to be 0: sqrt(alpha) w_j = 0, whose square is alpha w_j^2. A
    column of ones is the intercept; the rows more have 0 there, so that nothing pulls at it.
    """
    n, d = x.shape
    data_rows = torch.cat([x, torch.ones(n, 1).double()], 1)
    zero_wanted = math.sqrt(alpha) * torch.eye(d).double()
    penalty_rows = torch.cat([zero_wanted, torch.zeros(d, 1)], 1)
    rows = torch.cat([data_rows, penalty_rows])
    targets = torch.cat([y, torch.zeros(d)])
    solution = torch.linalg.lstsq(rows, targets).solution
    return solution[:-1], solution[-1]


def left_out_error(x, y, groups, alpha):
    """The squared error on each group of a fit made without it, summed over groups."""
    total = 0.0
    for group in groups.unique():
        inside = groups == group
        w, b = ridge_by_least_squares(x[~inside], y[~inside], alpha)
        errors = y[inside] - x[inside] @ w - b
        total += errors.square().sum().item()
    return total


SHAPES = {"more rows": (40, 6), "more columns": (12, 30), "square": (20, 20)}


@pytest.mark.parametrize("n, d", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("noise", [0.01, 1.0, 30.0])
def test_ridge_against_refits(n, d, group_size, noise):
    """The solution is that of least squares; alpha is best for refits without each group."""
    alphas = (0.01, 0.3, 3.0, 30.0, 1000.0)
    x = randn(n, d, seed=1) + 3
    true_weight = randn(d, seed=2)
    y = x @ true_weight + noise * randn(n, seed=3) - 7
    groups = torch.arange(n) // group_size
    errors = {alpha: left_out_error(x, y, groups, alpha) for alpha in alphas}
    best_alpha = min(errors, key=errors.get)
    expected_weight, expected_bias = ridge_by_least_squares(x, y, best_alpha)

    if group_size == 1:
        groups = None  # every row alone is the default
    weight, bias, alpha = ridge(x, y, alphas, groups)
    assert alpha == best_alpha
    torch.testing.assert_close(weight, expected_weight, rtol=1e-9, atol=1e-9)
    assert bias == pytest.approx(expected_bias.item(), rel=1e-9)


def test_groups_matter():
    """Rows are pairs of twins.

    Left out alone, a row is predicted by its twin, and the smallest penalty looks best. Left out in
    pairs it is not.
    """
    x = randn(40, 60, seed=4).repeat_interleave(2, 0)
    y = randn(40, seed=5).repeat_interleave(2)
    pairs = torch.arange(80) // 2
    penalties = (1e-3, 1e4)
    assert ridge(x, y, penalties).penalty == 1e-3
    assert ridge(x, y, penalties, pairs).penalty == 1e4


def test_ridge_of_constant_columns_is_the_mean():
    y = randn(6)
    weight, bias, _ = ridge(torch.ones(6, 3), y, [1.0])
    assert weight.tolist() == [0, 0, 0]
    assert bias == pytest.approx(y.mean().item())


def test_ridge_needs_alphas_above_0():
    x = randn(6, 2)
    y = randn(6)
    with refuses("ridge"):
        ridge(x, y, [])
    with refuses("ridge"):
        ridge(x, y, [0.0])


def test_ridge_needs_two_groups_and_a_label_for_each_row():
    x = randn(6, 2)
    y = randn(6)
    one_group = [0] * 6
    with refuses("ridge"):
        ridge(x, y, [1.0], one_group)
    with refuses("ridge"):
        ridge(x, y, [1.0], [0, 1])


def test_ridge_needs_rows_of_finite_numbers_and_a_y_for_each():
    x = randn(6, 2)
    y = randn(6)
    with refuses("ridge"):
        ridge(x, y[:5], [1.0])
    with refuses("ridge"):
        ridge(y, y, [1.0])
    with refuses("ridge"):
        ridge(x / 0, y, [1.0])


# -------------------------------------------------------------------------------------- logistic


def logistic_loss_by_a_loop(x, labels, w, l2):
    """sum_i log(1 + exp(-s_i x_i w)) + l2/2 |w|^2, with s_i = +1 or -1."""
    total = l2 / 2 * w.square().sum()
    for row, is_positive in zip(x, labels):
        sign = 1 if is_positive else -1
        margin = sign * (row @ w)
        total = total + torch.log1p(torch.exp(-margin))
    return total


@pytest.mark.parametrize("n, d", [(50, 4), (15, 40)])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_logistic_is_where_the_gradient_vanishes(n, d, scale):
    x = scale * (randn(n, d, seed=6) + 0.5)
    labels = x[:, 0] / scale + randn(n, seed=7) > 0.2
    w = logistic(x, labels, 0.3).requires_grad_()
    logistic_loss_by_a_loop(x, labels, w, 0.3).backward()
    assert w.grad.abs().max() < 1e-6 * scale


def standardised_columns(seed, d):
    """5,699 rows of d standardised columns, and labels that follow them more or less.

    The columns are normal, cubed or of two values, by the seed.
    """
    generator = seeded(2 * seed + d)
    x = torch.randn(5699, d, generator=generator, dtype=torch.float64)
    if seed % 3 == 0:
        x = x**3
    if seed % 4 == 1:
        x = (x > 1.5).double()
    x = (x - x.mean(0)) / x.std(0)
    weight = torch.randn(d, generator=generator, dtype=torch.float64) * (seed % 5) / 2
    bias = 2 * torch.randn(1, generator=generator, dtype=torch.float64)
    chance = torch.sigmoid(x @ weight + bias)
    labels = torch.rand(5699, generator=generator, dtype=torch.float64) < chance
    return x, labels


def check_that_the_gradient_vanishes(seed, d):
    x, labels = standardised_columns(seed, d)
    weight = logistic(x, labels, 1.0)
    residual = torch.sigmoid(x @ weight) - labels.double()
    assert (x.T @ residual + weight).abs().max() < 1e-8


@pytest.mark.parametrize("seed, d", [(59, 2), (261, 2), (266, 1), (619, 1), (707, 2)])
def test_logistic_does_not_stall_on_rounding(seed, d):
    """Where steps were judged by a loss that could no longer tell them apart, these never ended."""
    check_that_the_gradient_vanishes(seed, d)


@pytest.mark.parametrize("d", [1, 2])
def test_logistic_of_standardised_columns(d):
    for seed in range(30):
        check_that_the_gradient_vanishes(seed, d)


def fit_by_lbfgs(x, labels, l2):
    """The weight of least penalised loss, by a general optimiser and autograd."""
    weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    sign = torch.where(labels, 1.0, -1.0).double()
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=3000,
        max_eval=6000,
        tolerance_grad=1e-11,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        margins = sign * (x @ weight)
        likelihood_loss = torch.nn.functional.softplus(-margins).sum()
        penalty = l2 / 2 * weight.square().sum()
        loss = likelihood_loss + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


@pytest.mark.parametrize("l2", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("seed", range(8))
def test_logistic_against_lbfgs(l2, seed):
    generator = seeded(seed)
    x = torch.randn(40 + 50 * seed, 1 + seed, generator=generator, dtype=torch.float64)
    if seed % 2:
        x = x**3
    noise = torch.randn(len(x), generator=generator, dtype=torch.float64)
    labels = x[:, 0] + noise > 0.3
    expected = fit_by_lbfgs(x, labels, l2)
    torch.testing.assert_close(logistic(x, labels, l2), expected, rtol=1e-6, atol=1e-6)


def test_logistic_of_classes_far_apart():
    """Rows at +c and -c, each with its label: the loss is 2 log(1 + e^-cw) + l2/2 w^2.

    Its minimum is where 2c / (1 + e^cw) = l2 w.
    """
    w = logistic([[1000.0], [-1000.0]], [1, 0], 1e-8).item()
    pull = 2000 / (1 + math.exp(1000 * w))
    assert pull == pytest.approx(1e-8 * w, rel=1e-6)


def test_logistic_of_one_row_and_one_winner():
    """The loss log(1 + e^-w) + l2/2 w^2 has its minimum where 1 / (1 + e^w) = l2 w."""
    w = logistic([[1.0]], [1], 0.25).item()
    pull = 1 / (1 + math.exp(w))
    assert pull == pytest.approx(0.25 * w, abs=1e-9)


def test_logistic_needs_a_label_for_each_row():
    with refuses("logistic"):
        logistic(randn(4, 2), [1, 0])


def test_logistic_needs_rows_and_a_penalty():
    labels = [1, 0, 1, 0]
    no_rows = randn(4)
    with refuses("logistic"):
        logistic(no_rows, labels)
    with refuses("logistic"):
        logistic(randn(4, 2), labels, 0.0)

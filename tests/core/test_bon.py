"""Best-of-n against all subsets, whole numbers and simulation; the fits against known curves.

P prompts, N answers per prompt, L points of a curve, S replicates of it
"""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from checks import doubles, randn, refuses, seeded

from nanorlhf.bon import (
    DEFAULT_NS,
    bon_curve,
    bon_estimate,
    bon_kl,
    bon_weights,
    fit_bon,
    fit_curve,
    fit_rl,
    rl_curve,
)

NAN = float("nan")
INF = float("inf")


def close(found, expected, atol):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# --------------------------------------------------------------------------------- the estimator


def value_of_the_best(subset, proxy, values):
    """The value of the answer with the best proxy; of several best ones, the mean of theirs."""
    best_proxy = max(proxy[i] for i in subset)
    best_values = []
    for i in subset:
        if proxy[i] == best_proxy:
            best_values.append(Fraction(values[i]))
    return sum(best_values) / len(best_values)


def mean_over_all_subsets(proxy, values, n):
    """What bon_estimate is by definition: each of the C(N, n) draws made once, in fractions."""
    subsets = list(combinations(range(len(proxy)), n))
    total = Fraction(0)
    for subset in subsets:
        total += value_of_the_best(subset, proxy, values)
    return float(total / len(subsets))


# n_kinds is how many different proxies there may be: from no ties to nothing but ties.
@pytest.mark.parametrize("n_kinds", [10**6, 4, 2, 1])
@pytest.mark.parametrize("N", [1, 2, 5, 8])
def test_all_subsets(N, n_kinds):
    proxy = torch.randint(n_kinds, (3, N), generator=seeded(N))
    values = randn(3, N)
    ns = list(range(1, N + 1))
    expected = torch.zeros(3, N, dtype=torch.float64)
    for p in range(3):
        for n in ns:
            mean = mean_over_all_subsets(proxy[p].tolist(), values[p].tolist(), n)
            expected[p, n - 1] = mean
    close(bon_estimate(proxy, values, ns, per_prompt=True), expected, 1e-14)
    close(bon_estimate(proxy, values, ns), expected.mean(0), 1e-14)


def test_best_of_one_is_the_mean_and_best_of_all_the_value_at_the_highest_proxy():
    proxy = torch.tensor([[0.3, -1.0, 2.0, 0.5], [1.0, 7.0, 7.0, -2.0]])
    values = torch.tensor([[1.0, 2.0, 4.0, 9.0], [3.0, 5.0, 6.0, 0.0]])
    per_prompt = bon_estimate(proxy, values, [1, 4], per_prompt=True)
    # In the second prompt two answers tie at the top: (5 + 6) / 2.
    assert per_prompt.tolist() == [[4.0, 4.0], [3.5, 5.5]]
    # The mean over prompts, in the order asked for.
    assert bon_estimate(proxy, values, [4, 1, 4]).tolist() == [4.75, 3.75, 4.75]


def estimate_in_whole_numbers(ascending, n):
    """sum_i C(i-1, n-1) S_(i) / C(N, n) for whole numbers S, rounded once, at the end.

    The binomials follow from each other: C(i, n-1) = C(i-1, n-1) i / (i - n + 1).
    """
    N = len(ascending)
    total = 0
    binomial = 1  # C(i-1, n-1), at i = n
    for i in range(n, N + 1):
        total += binomial * ascending[i - 1]
        binomial = binomial * i // (i - n + 1)
    return total / math.comb(N, n)


def test_the_estimate_in_whole_numbers_by_hand():
    """The yardstick of the next test: of equal scores it is the score, of a single 1 its chance."""
    assert estimate_in_whole_numbers([1] * 50, 7) == 1
    assert estimate_in_whole_numbers([0] * 49 + [1], 7) == 7 / 50


def test_exact_at_full_size():
    """N = 12,600, every default n, against whole numbers: the error is below 1e-10 of max |S|."""
    generator = seeded(0)
    values = torch.randint(-(2**40), 2**40, (12_600,), generator=generator)
    proxy = torch.randperm(12_600, generator=generator)
    ascending = values[proxy.argsort()].tolist()
    expected = []
    for n in DEFAULT_NS:
        expected.append(estimate_in_whole_numbers(ascending, n))
    found = bon_estimate(proxy[None], values[None], DEFAULT_NS)
    errors = (found - doubles(expected)).abs()
    assert errors.max() < 1e-10 * values.abs().max()


def interesting_ns(N):
    """The default ns and some at the far end, of those from 1 to N."""
    candidates = {*DEFAULT_NS, N // 2, N - 100, N - 99, N - 1, N}
    return sorted(n for n in candidates if 1 <= n <= N)


@pytest.mark.parametrize("N", [1, 2, 100, 12_600])
def test_weights_sum_to_one_and_stay_clear_of_the_denormal_numbers(N):
    smallest_normal = torch.finfo(torch.float64).tiny
    for n in interesting_ns(N):
        weights = bon_weights(n, N)
        assert weights.sum().item() == pytest.approx(1, abs=1e-12)
        # The best answer is in the draw, and then chosen, with the chance n / N.
        assert weights[0].item() == pytest.approx(n / N)
        # The n - 1 worst answers are never the best of n.
        assert 1 <= len(weights) <= N - n + 1
        assert weights.min() > smallest_normal


@pytest.mark.parametrize("N", [1, 2, 100, 12_600])
def test_weights_of_best_of_one_are_equal(N):
    assert bon_weights(1, N).tolist() == [1 / N] * N


def test_weights_are_the_ratios_of_binomials():
    expected = []
    for i in range(100, 2, -1):
        chance = math.comb(i - 1, 2) / math.comb(100, 3)
        expected.append(chance)
    weights = bon_weights(3, 100)
    torch.testing.assert_close(weights, doubles(expected), rtol=1e-13, atol=0)


def test_simulation_without_replacement():
    """Draw n of the answers, keep the best: the long-run mean, within four standard errors."""
    proxy = randn(40, seed=1).round(decimals=1)  # some ties
    values = randn(40, seed=2)
    # 40,000 random orders of the answers: the first n of an order are a draw.
    orders = torch.rand(40_000, 40, generator=seeded(3)).argsort(1)
    for n in (1, 3, 10, 39):
        drawn = orders[:, :n]
        best = proxy[drawn].argmax(1, keepdim=True)  # of a tie the first: random
        best_values = values[drawn.gather(1, best)].squeeze(1)
        mean = best_values.mean().item()
        standard_error = best_values.std().item() / 200
        found = bon_estimate(proxy[None], values[None], [n]).item()
        assert found == pytest.approx(mean, abs=4 * standard_error)


def test_order_of_answers_does_not_matter_but_pairing_does():
    proxy = randn(5, 300).round(decimals=1)
    values = randn(5, 300, seed=1)
    ns = [1, 2, 30, 300]
    order = torch.randperm(300, generator=seeded(0))
    expected = bon_estimate(proxy, values, ns, per_prompt=True)

    reordered = bon_estimate(proxy[:, order], values[:, order], ns, per_prompt=True)
    close(reordered, expected, 1e-13)
    mispaired = bon_estimate(proxy[:, order], values, ns, per_prompt=True)
    # Best of 1 is the mean, however the answers are paired.
    differences = (mispaired - expected).abs()[:, 1:]
    assert differences.min() > 1e-3


def test_proxy_by_itself_rises():
    proxy = randn(20, 500)
    estimate = bon_estimate(proxy, proxy, range(1, 501), per_prompt=True)
    assert (estimate.diff(dim=1) > -1e-13).all()
    assert torch.equal(estimate[:, -1], proxy.amax(1))


def padded_answers():
    """Answers to six prompts, as many as `mask` says: proxy, values, mask, all [6, 50]."""
    proxy = randn(6, 50).round(decimals=1)
    values = randn(6, 50, seed=1)
    share_of_real = torch.tensor([0.2, 0.9, 0.5, 0.5, 0.9, 2.0])[:, None]
    mask = torch.rand(6, 50, generator=seeded(2)) < share_of_real
    mask[3] = mask[2].flip(0)  # two prompts with the same number
    return proxy, values, mask


@pytest.mark.parametrize("junk", [NAN, INF, -INF, 1e9, 0.0])
def test_mask_is_a_loop_over_prompts(junk):
    """Prompts of unequal numbers of answers; padding anywhere in a row, holding anything."""
    proxy, values, mask = padded_answers()
    ns = [1, 2, 3, mask.sum(1).min().item()]
    alone = []
    for p in range(6):
        real_proxy = proxy[p, mask[p]]
        real_values = values[p, mask[p]]
        alone.append(bon_estimate(real_proxy[None], real_values[None], ns))
    alone = torch.stack(alone)  # [6, 4]

    padded_proxy = torch.where(mask, proxy, junk)
    padded_values = torch.where(mask, values, junk)
    per_prompt = bon_estimate(padded_proxy, padded_values, ns, mask=mask, per_prompt=True)
    assert torch.equal(per_prompt, alone)
    # A mask may be a list.
    mean = bon_estimate(proxy, values, ns, mask.tolist())
    assert torch.equal(mean, alone.mean(0))


def test_a_mask_of_all_answers_is_none():
    proxy, values, mask = padded_answers()
    ns = [1, 2, 3, mask.sum(1).min().item()]
    everything = torch.ones_like(mask)
    masked = bon_estimate(proxy, values, ns, mask=everything)
    assert torch.equal(masked, bon_estimate(proxy, values, ns))


def test_input_kinds():
    proxy = randn(2, 9).float()
    values = randn(2, 9, seed=1).float().requires_grad_()
    proxy_before = proxy.clone()
    expected = bon_estimate(proxy, values, [1, 4])
    assert expected.dtype == torch.float64
    assert expected.shape == (2,)
    assert not expected.requires_grad

    array = values.detach().numpy()
    lists = bon_estimate(proxy.tolist(), array.tolist(), (1, 4))
    arrays = bon_estimate(proxy.numpy(), array, np.array([1, 4]))
    lists_of_tensors = bon_estimate(list(proxy), list(values.detach()), torch.tensor([1.0, 4.0]))
    negative_strides = bon_estimate(proxy.flip(1), array[:, ::-1], [1, 4])
    for found in (lists, arrays, lists_of_tensors, negative_strides):
        close(found, expected, 1e-15)
    assert torch.equal(proxy, proxy_before)  # what came in is left alone


def test_bfloat16_proxies_are_taken_as_they_are():
    values = randn(2, 9, seed=1).float().requires_grad_()
    half = randn(2, 9).float().bfloat16()
    found = bon_estimate(half, values, [4])
    assert torch.equal(found, bon_estimate(half.double(), values, [4]))


# Of these, each of the following mistakes changes one thing.
PROXY = [[1.0, 2, 3], [3, 2, 1]]
VALUES = [[1.0, 2, 3], [1, 2, 3]]
ALL_BUT_ONE = [[True, True, True], [True, True, False]]


def test_the_arguments_that_the_mistakes_change_are_good():
    bon_estimate(PROXY, VALUES, [1, 2])


@pytest.mark.parametrize("ns", [[0], [2, -1], [1.5], [NAN], [INF], []], ids=str)
def test_ns_are_whole_numbers(ns):
    with refuses("whole numbers of at least 1"):
        bon_estimate(PROXY, VALUES, ns)


def test_ns_are_numbers():
    with refuses("ns does not form"):
        bon_estimate(PROXY, VALUES, ["two"])


def test_n_is_at_most_the_number_of_answers():
    with refuses("n = 4 is more than the 3 answers of prompt 0"):
        bon_estimate(PROXY, VALUES, [1, 4])
    with refuses("n = 3 is more than the 2 answers of prompt 1"):
        bon_estimate(PROXY, VALUES, [3], mask=ALL_BUT_ONE)
    none_and_all = [[False] * 3, [True] * 3]
    with refuses("n = 2 is more than the 0 answers of prompt 0"):
        bon_estimate(PROXY, VALUES, [1, 2], mask=none_and_all)
    nothing = torch.zeros(2, 0)
    with refuses("more than the 0 answers"):
        bon_estimate(nothing, nothing, [1, 2])


def test_scores_are_finite():
    with refuses("proxy of prompt 1"):
        bon_estimate([[1, 2, 3], [1, NAN, 3]], VALUES, [1, 2])
    with refuses("values of prompt 0"):
        bon_estimate(PROXY, [[1, 2, INF], [1, 2, 3]], [1, 2])
    with refuses("proxy of prompt 1"):
        bon_estimate([[1, 2, 3], [-INF, 2, 3]], VALUES, [1, 2], mask=ALL_BUT_ONE)


def test_proxy_and_values_are_of_one_shape_prompts_by_answers():
    with refuses(r"\[2, 2\] and \[2, 3\]"):
        bon_estimate([[1, 2], [1, 2]], VALUES, [1, 2])
    one_prompt = [1, 2, 3]
    with refuses(r"\[prompts, answers\]"):
        bon_estimate(one_prompt, one_prompt, [1, 2])
    no_prompt = torch.zeros(0, 3)
    with refuses("at least one prompt"):
        bon_estimate(no_prompt, no_prompt, [1, 2])
    with refuses("at least one"):
        bon_estimate([], [], [1, 2])


def test_rows_of_unequal_length_need_a_mask():
    unequal = [[1, 2, 3], [1, 2]]
    with refuses("proxy.*unequal length need a mask"):
        bon_estimate(unequal, VALUES, [1, 2])
    with refuses("values.*need a mask"):
        bon_estimate(PROXY, unequal, [1, 2])


def test_the_mask_is_bool_and_of_the_same_shape():
    with refuses("mask must be bool"):
        bon_estimate(PROXY, VALUES, [1, 2], mask=[[1, 1, 1], [1, 1, 0]])
    with refuses(r"mask must be bool \[2, 3\]"):
        bon_estimate(PROXY, VALUES, [1, 2], mask=[True, True, True])


# -------------------------------------------------------------------------------------------- KL


@pytest.mark.parametrize("n", [1, 2, 3, 10, 100])
def test_kl_is_the_integral(n):
    """KL(f || 1) = the integral of f log f over 0 to 1, with f(u) = n u^(n-1).

    f is the density of the best of n uniform numbers, and 1 that of a single one.
    """
    u = (torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6
    log_f = math.log(n) + (n - 1) * u.log()
    integral = (log_f.exp() * log_f).mean()
    assert bon_kl(n) == pytest.approx(integral.item(), abs=1e-7)


def test_kl_of_a_number_is_a_number_and_of_many_a_tensor():
    assert bon_kl(1) == 0
    assert isinstance(bon_kl(4), float)
    expected = [0, bon_kl(4)]
    assert bon_kl(torch.tensor([1, 4])).tolist() == expected
    assert bon_kl([1, 4]).tolist() == expected


@pytest.mark.parametrize("n", [0, 0.5, [2, -1], NAN], ids=str)
def test_kl_needs_an_n_of_at_least_one(n):
    with refuses("n >= 1"):
        bon_kl(n)


# --------------------------------------------------------------------------- Gao et al.'s curves

KL = bon_kl(DEFAULT_NS)  # its first is 0


def test_curves_by_hand():
    # d = sqrt(4) = 2: 2 (3 - 1 * 2) = 2.
    assert bon_curve(4, 3, 1).item() == 2
    assert bon_curve([0, -1, 4], 3, 1).tolist() == [0, 0, 2]
    # log 1 = 0: 1 (3 - 0) = 3.
    assert rl_curve(torch.tensor([0, -0.1, 1]), 3, 1).tolist() == [0, 0, 3]
    # d = e, log d = 1: e (3 - 1) = 2 e.
    assert rl_curve(math.e**2, 3, 1).item() == pytest.approx(2 * math.e)


def bon_truth(d, a, b):
    return d * (a - b * d)


def rl_truth(d, a, b):
    return d * (a - b * math.log(d))


def known_curves(truth, a, b):
    """Points without noise of a curve whose a and b are known: {what is special: (kl, gold)}."""
    curves = {}
    kl = KL[1:]
    gold = doubles([truth(d, a, b) for d in kl.sqrt().tolist()])
    curves["plain"] = (kl, gold)
    curves["two points"] = (kl[[0, -1]], gold[[0, -1]])

    # The curve from KL 0 on, where the score before is not 0.
    zero = torch.zeros(1).double()
    kl_from_zero = torch.cat([zero, kl])
    gold_from_zero = torch.cat([zero, gold])
    curves["with a start"] = (kl_from_zero, gold_from_zero + 7.5)

    # Estimates of KL may dip below 0: such points are not fitted, whatever their gold.
    dip = torch.full((1,), -0.01)
    kl_with_dips = torch.cat([1e-7 + zero, dip, kl, dip])
    gold_with_dips = torch.cat([zero, zero + 9, gold, zero - 9])
    curves["with dips"] = (kl_with_dips, gold_with_dips + 7.5)

    # Several replicates: with one kl for all, and each with a start of its own.
    curves["equal rows"] = (kl, gold.expand(5, -1))
    offsets = torch.tensor([[5.0], [-3.0], [0.5]])
    curves["rows with a start"] = (kl_from_zero, gold_from_zero + offsets)

    # Two replicates, of which only the first has a start; the second has its first point twice.
    kl_twice = torch.cat([kl, kl[:1]])
    gold_twice = torch.cat([gold, gold[:1]])
    rows_of_kl = torch.stack([kl_from_zero, kl_twice])
    rows_of_gold = torch.stack([gold_from_zero + 4, gold_twice])
    curves["rows with their own kl"] = (rows_of_kl, rows_of_gold)
    return curves


@pytest.mark.parametrize("fit, truth", [(fit_bon, bon_truth), (fit_rl, rl_truth)])
@pytest.mark.parametrize(
    "a, b", [(1.7, 0.4), (-0.3, -2.0), pytest.param(0.0, 1.0, marks=pytest.mark.slow)]
)
def test_known_curves_come_back(fit, truth, a, b):
    """Without noise a and b are exact, and their intervals are points."""
    for name, (kl, gold) in known_curves(truth, a, b).items():
        result = fit(kl, gold)
        assert (result.a, result.b) == pytest.approx((a, b), abs=1e-10), name
        if name == "two points":
            # They leave nothing to judge by.
            assert result.a_interval == (-INF, INF)
            assert result.b_interval == (-INF, INF)
        else:
            ends = (*result.a_interval, *result.b_interval)
            assert ends == pytest.approx((a, a, b, b), abs=1e-9), name


def dot(x, y):
    """The sum of products of two lists."""
    total = 0.0
    for p, q in zip(x, y, strict=True):
        total += p * q
    return total


def noisy_curve():
    """Six points of d (1 - 0.3 d), with noise: kl [6], gold [6]."""
    kl = KL[1:7]
    d = kl.sqrt()
    noise = 0.1 * randn(6, seed=4)
    return kl, d * (1 - 0.3 * d) + noise


def test_classical_interval_by_hand():
    """The textbook's normal equations, sums written out, and Student's t for 4 from a table.

    gold = a u + b v with u = d, v = -d^2; Var(a) = s^2 vv / det, Var(b) = s^2 uu / det.
    """
    kl, gold = noisy_curve()
    d = kl.sqrt()
    u = d.tolist()
    v = (-d * d).tolist()
    y = gold.tolist()

    # The 2 x 2 normal equations, solved by Cramer's rule.
    uu = dot(u, u)
    uv = dot(u, v)
    vv = dot(v, v)
    uy = dot(u, y)
    vy = dot(v, y)
    det = uu * vv - uv**2
    a = (vv * uy - uv * vy) / det
    b = (uu * vy - uv * uy) / det

    # Six points and two coefficients leave four degrees of freedom.
    squares = 0.0
    for i in range(6):
        residual = y[i] - a * u[i] - b * v[i]
        squares += residual**2
    variance = squares / (6 - 2)
    half_a = 2.776445 * math.sqrt(variance * vv / det)
    half_b = 2.776445 * math.sqrt(variance * uu / det)

    result = fit_bon(kl, gold)
    assert (result.a, result.b) == pytest.approx((a, b), rel=1e-9)
    assert result.a_interval == pytest.approx((a - half_a, a + half_a), rel=1e-4)
    assert result.b_interval == pytest.approx((b - half_b, b + half_b), rel=1e-4)


def test_a_point_that_is_not_used_is_not_a_degree_of_freedom():
    kl, gold = noisy_curve()
    result = fit_bon(kl, gold)
    longer_kl = torch.cat([kl, -kl[:1]])
    longer_gold = torch.cat([gold, gold[:1]])
    longer = fit_bon(longer_kl, longer_gold)
    assert longer.a_interval == pytest.approx(result.a_interval, rel=1e-12)


def holds_the_truth(result):
    """Whether the intervals of a and b hold 1.5 and 0.4: [2], numbers 0 and 1."""
    a_low, a_high = result.a_interval
    b_low, b_high = result.b_interval
    a_held = a_low <= 1.5 <= a_high
    b_held = b_low <= 0.4 <= b_high
    return torch.tensor([a_held, b_held]).float()


BOTH_FITS = [(fit_bon, bon_curve), pytest.param(fit_rl, rl_curve, marks=pytest.mark.slow)]


@pytest.mark.parametrize("fit, curve", BOTH_FITS)
def test_classical_coverage(fit, curve):
    """With independent errors the interval holds the truth 95 times in 100.

    Six points: with 1.96 in the place of Student's t it would be 88.
    """
    kl = KL[1:7]
    hits = torch.zeros(2)
    noise = 0.2 * randn(500, 6, seed=5)
    for gold in curve(kl, 1.5, 0.4) + noise:
        hits += holds_the_truth(fit(kl, gold))
    assert (hits > 0.925 * 500).all()
    assert (hits < 0.975 * 500).all()


def correlated_curves(S, seed):
    """S replicates [S, L] whose errors along one curve are not independent.

    The points of a replicate share a slope, and an error at the start.
    """
    shared_slope = 0.5 * randn(S, 1, seed=seed)
    noise = 0.2 * randn(S, len(KL), seed=seed + 10**6)
    return bon_curve(KL, 1.5, 0.4) + shared_slope * KL.sqrt() + noise


def check_half_widths(x, interval, half, rel):
    """The interval reaches from x by about the same length to both sides."""
    low, high = interval
    assert high - x == pytest.approx(half, rel=rel)
    assert x - low == pytest.approx(half, rel=rel)


def test_bootstrap_interval_is_that_of_a_mean_over_rows():
    """With one kl for all rows, a is the mean of the rows' own a, and so is b.

    Its interval is 1.96 standard errors of that mean, to both sides.
    """
    gold = correlated_curves(400, seed=0)
    result = fit_bon(KL, gold)
    a_of_rows = []
    b_of_rows = []
    for row in gold:
        fit = fit_bon(KL, row)
        a_of_rows.append(fit.a)
        b_of_rows.append(fit.b)
    a_of_rows = doubles(a_of_rows)
    b_of_rows = doubles(b_of_rows)

    assert result.a == pytest.approx(a_of_rows.mean().item(), rel=1e-9)
    assert result.b == pytest.approx(b_of_rows.mean().item(), rel=1e-9)
    half_a = 1.96 * a_of_rows.std().item() / 20
    half_b = 1.96 * b_of_rows.std().item() / 20
    check_half_widths(result.a, result.a_interval, half_a, rel=0.12)
    check_half_widths(result.b, result.b_interval, half_b, rel=0.12)


def test_bootstrap_interval_is_the_same_every_time():
    gold = correlated_curves(400, seed=0)
    result = fit_bon(KL, gold)
    assert fit_bon(KL, gold) == result
    assert fit_bon(KL.expand(400, -1), gold) == result


def test_the_classical_interval_of_one_curve_is_far_too_narrow():
    """The pitfall of fit_curve: errors along one curve are not independent."""
    gold = correlated_curves(400, seed=0)
    low, high = fit_bon(KL, gold).a_interval
    classical_low, classical_high = fit_bon(KL, gold.mean(0)).a_interval
    assert classical_high - classical_low < 0.5 * (high - low)


@pytest.mark.slow
def test_bootstrap_coverage():
    """Of 30 rows: about 0.93."""
    n_rounds = 20
    hits = torch.zeros(2)
    for seed in range(n_rounds):
        hits += holds_the_truth(fit_bon(KL, correlated_curves(30, seed)))
    assert (hits >= 0.8 * n_rounds).all()


def usable_points(kl, gold):
    """One row's columns [n, 2] of d (a - b log d) and its gold [n], counted from the start."""
    if kl[0] == 0:
        gold = gold - gold[0]
    is_usable = kl > 0
    d = np.sqrt(kl[is_usable])
    columns = np.stack([d, -d * np.log(d)], 1)
    return columns, gold[is_usable]


def test_rows_with_their_own_kl():
    """Seeds reach different distances: least squares on the points of all, by numpy.

    The bootstrap's interval is +-1.96 roots of the sandwich for clustered errors (Liang & Zeger
    1986): Cov = (X'X)^-1 [sum over rows of X_s' e_s e_s' X_s] (X'X)^-1.
    """
    S = 300
    kl = randn(S, 6).exp()
    kl[:100, 0] = 0
    shared_slope = 0.3 * randn(S, 1, seed=1)
    noise = 0.1 * randn(S, 6, seed=2)
    gold = rl_curve(kl, 1.0, 0.2) + 3 + shared_slope * kl.sqrt() + noise

    clusters = []
    for row_kl, row_gold in zip(kl.numpy(), gold.numpy(), strict=True):
        clusters.append(usable_points(row_kl, row_gold))
    X = np.concatenate([x for x, _ in clusters])
    Y = np.concatenate([y for _, y in clusters])
    expected, *_ = np.linalg.lstsq(X, Y, rcond=None)
    a, b = expected

    bread = np.linalg.inv(X.T @ X)
    filling = np.zeros((2, 2))
    for x, y in clusters:
        score = x.T @ (y - x @ expected)
        filling += np.outer(score, score)
    sandwich = bread @ filling @ bread
    a_error, b_error = np.sqrt(sandwich.diagonal())

    result = fit_rl(kl, gold)
    assert (result.a, result.b) == pytest.approx((a, b), rel=1e-9)
    check_half_widths(result.a, result.a_interval, 1.96 * a_error, rel=0.15)
    check_half_widths(result.b, result.b_interval, 1.96 * b_error, rel=0.15)


each_curve = pytest.mark.parametrize("curve", [bon_curve, rl_curve])
TOO_FEW = {
    "one point": ([1.0], [1.0]),
    "one kl above 0": ([0, 1.0], [1.0, 2]),
    "one kl above 0, one below": ([0, -1.0, 2], [1.0, 2, 3]),
    "one kl thrice": ([2.0, 2, 2], [1.0, 2, 3]),
    "no point": ([], []),
    "no row": (torch.ones(3), torch.ones(0, 3)),
}


@each_curve
@pytest.mark.parametrize("kl, gold", TOO_FEW.values(), ids=TOO_FEW.keys())
def test_a_fit_needs_two_different_kl(kl, gold, curve):
    with refuses("two different kl"):
        fit_curve(curve, kl, gold)


@each_curve
def test_points_are_finite(curve):
    with refuses("not finite"):
        fit_curve(curve, [1.0, NAN], [1.0, 2])
    with refuses("not finite"):
        fit_curve(curve, [1.0, 2], [1.0, INF])
    with refuses("not finite"):
        fit_curve(curve, [1.0, 2], [[1.0, 2], [NAN, 1]])


@each_curve
def test_kl_and_gold_fit_together(curve):
    with refuses(r"\[2\] and \[3\]"):
        fit_curve(curve, [1.0, 2, 3], [1.0, 2])
    with refuses("gold must be"):
        fit_curve(curve, [[1.0, 2]], [1.0, 2])
    with refuses("gold must be"):
        fit_curve(curve, 1.0, 2.0)
    with refuses("gold must be"):
        fit_curve(curve, [[1.0, 2]], [[1.0, 2], [1, 2]])
    three_dimensions = torch.ones(1, 1, 2)
    with refuses("gold must be"):
        fit_curve(curve, three_dimensions, three_dimensions)
    with refuses("gold does not form"):
        fit_curve(curve, [1.0, 2], [[1.0, 2], [1]])

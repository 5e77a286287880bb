"""Best-of-n against enumeration of all subsets, exact integers and simulation; the fits against curves that are known."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch

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


def enumerate_subsets(proxy, values, n):
    """The mean over all subsets of size n of the value of the best answer; of several best ones, the mean of theirs."""
    total, subsets = Fraction(0), list(combinations(range(len(proxy)), n))
    for subset in subsets:
        best = [Fraction(values[i]) for i in subset if proxy[i] == max(proxy[j] for j in subset)]
        total += sum(best) / len(best)
    return float(total / len(subsets))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------- the estimator


@pytest.mark.parametrize("kinds", [10**6, 4, 2, 1])  # how many different proxies there may be: from no ties to nothing but ties
@pytest.mark.parametrize("N", [1, 2, 5, 8])
def test_all_subsets(N, kinds):
    proxy = torch.randint(kinds, (3, N), generator=torch.Generator().manual_seed(N))
    values, ns = randn(3, N), list(range(1, N + 1))
    expected = [[enumerate_subsets(p.tolist(), v.tolist(), n) for n in ns] for p, v in zip(proxy, values, strict=True)]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(bon_estimate(proxy, values, ns, per_prompt=True), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(bon_estimate(proxy, values, ns), expected.mean(0), rtol=0, atol=1e-14)


def test_the_ends():
    """n = 1 is the mean, n = N the value at the highest proxy, or the mean over several of them."""
    proxy, values = torch.tensor([[0.3, -1.0, 2.0, 0.5], [1.0, 7.0, 7.0, -2.0]]), torch.tensor([[1.0, 2.0, 4.0, 9.0], [3.0, 5.0, 6.0, 0.0]])
    assert bon_estimate(proxy, values, [1, 4], per_prompt=True).tolist() == [[4.0, 4.0], [3.5, 5.5]]
    assert bon_estimate(proxy, values, [4, 1, 4]).tolist() == [4.75, 3.75, 4.75]  # in the order asked for


def exact(ascending, n):
    """sum_i C(i-1, n-1) S_(i) / C(N, n) in integers, rounded once. The binomials come from Pascal's rule of succession."""
    total, c = 0, 1  # c = C(i-1, n-1)
    for i in range(n, len(ascending) + 1):
        total += c * ascending[i - 1]
        c = c * i // (i - n + 1)
    return total / math.comb(len(ascending), n)


def test_exact_at_full_size():
    """N = 12,600, every default n, against whole numbers: below 1e-10 of max |S|."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-(2**40), 2**40, (12_600,), generator=generator)
    proxy = torch.randperm(12_600, generator=generator)
    ascending = values[proxy.argsort()].tolist()
    expected = [exact(ascending, n) for n in DEFAULT_NS]
    errors = (bon_estimate(proxy[None], values[None], DEFAULT_NS) - torch.tensor(expected, dtype=torch.float64)).abs()
    assert errors.max() < 1e-10 * values.abs().max()
    assert exact([1] * 50, 7) == 1 and exact([0] * 49 + [1], 7) == 7 / 50  # the yardstick itself


@pytest.mark.parametrize("N", [1, 2, 100, 12_600])
def test_weights(N):
    """They sum to 1, start at n / N, are as many as needed, and stay clear of the denormal numbers."""
    for n in sorted({n for n in (*DEFAULT_NS, N // 2, N - 100, N - 99, N - 1, N) if 1 <= n <= N}):
        w = bon_weights(n, N)
        assert w.sum().item() == pytest.approx(1, abs=1e-12) and w[0].item() == pytest.approx(n / N)
        assert 1 <= len(w) <= N - n + 1 and w.min() > torch.finfo(torch.float64).tiny
    assert bon_weights(1, N).tolist() == [1 / N] * N
    if N == 100:
        w = [math.comb(i - 1, 2) / math.comb(100, 3) for i in range(100, 2, -1)]
        torch.testing.assert_close(bon_weights(3, 100), torch.tensor(w, dtype=torch.float64), rtol=1e-13, atol=0)


def test_simulation_without_replacement():
    """Draw n of the answers, keep the best: the long-run mean, within four standard errors."""
    proxy, values = randn(40, seed=1).round(decimals=1), randn(40, seed=2)  # some ties
    draws = torch.rand(40_000, 40, generator=torch.Generator().manual_seed(3)).argsort(1)  # random orders: the first n are the draw
    for n in (1, 3, 10, 39):
        best = values[draws[:, :n].gather(1, proxy[draws[:, :n]].argmax(1, keepdim=True)).squeeze(1)]  # of a tie the first: random
        assert bon_estimate(proxy[None], values[None], [n]).item() == pytest.approx(best.mean().item(), abs=4 * best.std().item() / 200)


def test_order_of_answers_does_not_matter_but_pairing_does():
    proxy, values = randn(5, 300).round(decimals=1), randn(5, 300, seed=1)
    order, ns = torch.randperm(300, generator=torch.Generator().manual_seed(0)), [1, 2, 30, 300]
    expected = bon_estimate(proxy, values, ns, per_prompt=True)
    torch.testing.assert_close(bon_estimate(proxy[:, order], values[:, order], ns, per_prompt=True), expected, rtol=0, atol=1e-13)
    assert (bon_estimate(proxy[:, order], values, ns, per_prompt=True)[:, 1:] - expected[:, 1:]).abs().min() > 1e-3


def test_proxy_by_itself_rises():
    estimate = bon_estimate(x := randn(20, 500), x, range(1, 501), per_prompt=True)
    assert (estimate.diff(dim=1) > -1e-13).all() and torch.equal(estimate[:, -1], x.amax(1))


def test_mask_is_a_loop_over_prompts():
    """Rows of unequal length, padding anywhere in the row and holding anything."""
    proxy, values = randn(6, 50).round(decimals=1), randn(6, 50, seed=1)
    mask = torch.rand(6, 50, generator=torch.Generator().manual_seed(2)) < torch.tensor([0.2, 0.9, 0.5, 0.5, 0.9, 2.0])[:, None]
    mask[3] = mask[2].flip(0)  # two prompts with the same number
    ns = [1, 2, 3, mask.sum(1).min().item()]
    rows = [bon_estimate(p[m][None], v[m][None], ns) for p, v, m in zip(proxy, values, mask, strict=True)]
    for junk in (torch.nan, torch.inf, -torch.inf, 1e9, 0.0):
        padded = (torch.where(mask, x, junk) for x in (proxy, values))
        assert torch.equal(bon_estimate(*padded, ns, mask=mask, per_prompt=True), torch.stack(rows))
    assert torch.equal(bon_estimate(proxy, values, ns, mask.tolist()), torch.stack(rows).mean(0))
    assert torch.equal(bon_estimate(proxy, values, ns, mask=torch.ones_like(mask)), bon_estimate(proxy, values, ns))


def test_input_kinds():
    proxy, values = randn(2, 9).float(), randn(2, 9, seed=1).float().requires_grad_()
    expected, before = bon_estimate(proxy, values, [1, 4]), proxy.clone()
    assert expected.dtype == torch.float64 and expected.shape == (2,) and not expected.requires_grad
    array = values.detach().numpy()
    for p, v, ns in (
        (proxy.tolist(), array.tolist(), (1, 4)), (proxy.numpy(), array, np.array([1, 4])),
        (list(proxy), list(values.detach()), torch.tensor([1.0, 4.0])), (proxy.flip(1), array[:, ::-1], [1, 4]),
    ):  # fmt: skip
        torch.testing.assert_close(bon_estimate(p, v, ns), expected, rtol=0, atol=1e-15)
    half = proxy.bfloat16()
    assert torch.equal(bon_estimate(half, values, [4]), bon_estimate(half.double(), values, [4]))
    assert torch.equal(proxy, before)  # what came in is left alone


NAN, INF, ONES = float("nan"), float("inf"), [[True, True, True], [True, True, False]]


@pytest.mark.parametrize(
    "change, match",
    [
        ({"ns": [0]}, "whole numbers of at least 1"), ({"ns": [2, -1]}, "whole"), ({"ns": [1.5]}, "whole"), ({"ns": [NAN]}, "whole"),
        ({"ns": [INF]}, "whole"), ({"ns": []}, "whole"), ({"ns": ["two"]}, "ns does not form"),
        ({"ns": [1, 4]}, "n = 4 is more than the 3 answers of prompt 0"),
        ({"ns": [3], "mask": ONES}, "n = 3 is more than the 2 answers of prompt 1"),
        ({"mask": [[False] * 3, [True] * 3]}, "n = 2 is more than the 0 answers of prompt 0"),
        ({"proxy": [[1, 2, 3], [1, NAN, 3]]}, "proxy of prompt 1"), ({"values": [[1, 2, INF], [1, 2, 3]]}, "values of prompt 0"),
        ({"proxy": [[1, 2, 3], [-INF, 2, 3]], "mask": ONES}, "proxy of prompt 1"),
        ({"proxy": [[1, 2], [1, 2]]}, r"\[2, 2\] and \[2, 3\]"), ({"proxy": [1, 2, 3], "values": [1, 2, 3]}, r"\[prompts, answers\]"),
        ({"proxy": torch.zeros(0, 3), "values": torch.zeros(0, 3)}, "at least one prompt"), ({"proxy": [], "values": []}, "at least one"),
        ({"proxy": torch.zeros(2, 0), "values": torch.zeros(2, 0)}, "more than the 0 answers"),
        ({"proxy": [[1, 2, 3], [1, 2]]}, "proxy.*unequal length need a mask"), ({"values": [[1, 2, 3], [1, 2]]}, "values.*need a mask"),
        ({"mask": [[1, 1, 1], [1, 1, 0]]}, "mask must be bool"), ({"mask": [True, True, True]}, r"mask must be bool \[2, 3\]"),
    ],
)  # fmt: skip
def test_errors(change, match):
    good = {"proxy": [[1.0, 2, 3], [3, 2, 1]], "values": [[1.0, 2, 3], [1, 2, 3]], "ns": [1, 2]}
    bon_estimate(**good)
    with pytest.raises(ValueError, match=match):
        bon_estimate(**(good | change))


# --------------------------------------------------------------------------------------------------------------------------- KL


def test_kl_is_the_integral():
    """The best of n uniform numbers has density n u^(n-1); its KL from the uniform density is the integral of f log f."""
    u = (torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6
    for n in (1, 2, 3, 10, 100):
        log_f = math.log(n) + (n - 1) * u.log()
        assert bon_kl(n) == pytest.approx((log_f.exp() * log_f).mean().item(), abs=1e-7)
    assert bon_kl(1) == 0 and isinstance(bon_kl(4), float)
    assert bon_kl(torch.tensor([1, 4])).tolist() == bon_kl([1, 4]).tolist() == [0, bon_kl(4)]
    for n in (0, 0.5, [2, -1], NAN):
        with pytest.raises(ValueError, match="n >= 1"):
            bon_kl(n)


# ------------------------------------------------------------------------------------------------------------------------- fits

KL = bon_kl(DEFAULT_NS)  # its first is 0


def test_curves_by_hand():
    assert bon_curve(4, 3, 1).item() == 2 and bon_curve([0, -1, 4], 3, 1).tolist() == [0, 0, 2]
    assert rl_curve(torch.tensor([0, -0.1, 1]), 3, 1).tolist() == [0, 0, 3]
    assert rl_curve(math.e**2, 3, 1).item() == pytest.approx(2 * math.e)


@pytest.mark.parametrize("fit, truth", [(fit_bon, lambda d, a, b: d * (a - b * d)), (fit_rl, lambda d, a, b: d * (a - b * math.log(d)))])
@pytest.mark.parametrize("a, b", [(1.7, 0.4), (-0.3, -2.0), (0.0, 1.0)])
def test_known_curves_come_back(fit, truth, a, b):
    """Without noise a and b are exact and their intervals points: with and without a point at 0, in one row and in many."""
    kl = KL[1:]
    gold = torch.tensor([truth(d, a, b) for d in kl.sqrt().tolist()], dtype=torch.float64)
    zero, dip = torch.zeros(1).double(), torch.full((1,), -0.01).double()
    offsets = torch.tensor([[5.0], [-3.0], [0.5]]).double()
    with_start, without = torch.cat([zero, gold]) + 4, torch.cat([gold, gold[:1]])
    cases = [
        (kl, gold),
        (kl[[0, -1]], gold[[0, -1]]),
        (torch.cat([zero, kl]), torch.cat([zero, gold]) + 7.5),  # the score before is not 0
        (torch.cat([1e-7 + zero, dip, kl, dip]), torch.cat([zero, zero + 9, gold, zero - 9]) + 7.5),  # estimates of KL may dip
        (kl, gold.expand(5, -1)),
        (torch.cat([zero, kl]), torch.cat([zero, gold]) + offsets),  # each row has its own start
        (torch.stack([torch.cat([zero, kl]), torch.cat([kl, kl[:1]])]), torch.stack([with_start, without])),
    ]
    for kl, gold in cases:
        result = fit(kl, gold)
        assert (result.a, result.b) == pytest.approx((a, b), abs=1e-10)
        if len(gold) != 2 or gold.ndim == 2:  # two points leave nothing to judge by
            assert (*result.a_interval, *result.b_interval) == pytest.approx((a, a, b, b), abs=1e-9)
        else:
            assert result.a_interval == result.b_interval == (-INF, INF)


def test_classical_interval_by_hand():
    """Against textbook formulas with sums written out, and t from a table."""
    kl, noise = KL[1:7], randn(6, seed=4)
    d = kl.sqrt()
    gold = d * (1 - 0.3 * d) + 0.1 * noise
    u, v = d.tolist(), (-d * d).tolist()
    uu, uv, vv = (sum(p * q for p, q in zip(x, y, strict=True)) for x, y in ((u, u), (u, v), (v, v)))
    uy, vy = (sum(p * q for p, q in zip(x, gold.tolist(), strict=True)) for x in (u, v))
    det = uu * vv - uv**2
    a, b = (vv * uy - uv * vy) / det, (uu * vy - uv * uy) / det
    s2 = sum((y - a * p - b * q) ** 2 for p, q, y in zip(u, v, gold.tolist(), strict=True)) / (6 - 2)
    half_a, half_b = (2.776445 * math.sqrt(s2 * x / det) for x in (vv, uu))
    result = fit_bon(kl, gold)
    assert (result.a, result.b) == pytest.approx((a, b), rel=1e-9)
    assert result.a_interval == pytest.approx((a - half_a, a + half_a), rel=1e-4)
    assert result.b_interval == pytest.approx((b - half_b, b + half_b), rel=1e-4)
    dropped = fit_bon(torch.cat([kl, -kl[:1]]), torch.cat([gold, gold[:1]]))  # a point not used is not a degree of freedom
    assert dropped.a_interval == pytest.approx(result.a_interval, rel=1e-12)


@pytest.mark.parametrize("fit, curve", [(fit_bon, bon_curve), (fit_rl, rl_curve)])
def test_classical_coverage(fit, curve):
    """With independent errors the interval holds the truth 95 times in 100. Six points: with 1.96 for t it would be 88."""
    kl, hits = KL[1:7], torch.zeros(2)
    for gold in curve(kl, 1.5, 0.4) + 0.2 * randn(500, 6, seed=5):
        result = fit(kl, gold)
        hits += torch.tensor([low <= x <= high for x, (low, high) in zip((1.5, 0.4), result[2:], strict=True)])
    assert ((hits > 0.925 * 500) & (hits < 0.975 * 500)).all()


def correlated(S, seed):
    """Replicates whose points share a slope, and an error at the start: errors along one curve are not independent."""
    return bon_curve(KL, 1.5, 0.4) + 0.5 * randn(S, 1, seed=seed) * KL.sqrt() + 0.2 * randn(S, len(KL), seed=seed + 10**6)


def test_bootstrap_interval_is_that_of_a_mean_over_rows():
    """With one kl for all rows, a is the mean of the rows' own: its interval is 1.96 standard errors of that mean, to both sides."""
    gold = correlated(400, seed=0)
    result, again = fit_bon(KL, gold), fit_bon(KL.expand(400, -1), gold)
    each = torch.tensor([fit_bon(KL, row)[:2] for row in gold], dtype=torch.float64)  # [S, 2]
    for x, (low, high), column in zip(result[:2], result[2:], each.T, strict=True):
        assert x == pytest.approx(column.mean().item(), rel=1e-9)
        half = 1.96 * column.std().item() / 20
        assert (high - x, x - low) == (pytest.approx(half, rel=0.12), pytest.approx(half, rel=0.12))
    assert result == again == fit_bon(KL, gold)  # the same every time
    classical = fit_bon(KL, gold.mean(0)).a_interval
    assert classical[1] - classical[0] < 0.5 * (result.a_interval[1] - result.a_interval[0])  # the pitfall


def test_bootstrap_coverage():
    hits, rounds = torch.zeros(2), 20
    for seed in range(rounds):
        result = fit_bon(KL, correlated(30, seed))
        hits += torch.tensor([low <= x <= high for x, (low, high) in zip((1.5, 0.4), result[2:], strict=True)])
    assert (hits >= 0.8 * rounds).all()  # of 30 rows about 0.93


def test_rows_with_their_own_kl():
    """Seeds reach different distances: numpy's least squares on the stacked points, and the sandwich formula for clustered errors.

    Cov = (X'X)^-1 [sum over rows of X_s' e_s e_s' X_s] (X'X)^-1 (Liang & Zeger 1986): the bootstrap's interval is +-1.96 of its roots.
    """
    S = 300
    kl = randn(S, 6).exp()
    kl[:100, 0] = 0
    gold = rl_curve(kl, 1.0, 0.2) + 3 + 0.3 * randn(S, 1, seed=1) * kl.sqrt() + 0.1 * randn(S, 6, seed=2)
    clusters = []
    for k, g in zip(kl.numpy(), gold.numpy(), strict=True):
        d, y = np.sqrt(k[k > 0]), (g - g[0] if k[0] == 0 else g)[k > 0]
        clusters.append((np.stack([d, -d * np.log(d)], 1), y))
    X, y = (np.concatenate(parts) for parts in zip(*clusters, strict=True))
    expected = np.linalg.lstsq(X, y, rcond=None)[0]
    bread, scores = np.linalg.inv(X.T @ X), np.array([x.T @ (y - x @ expected) for x, y in clusters])
    errors = np.sqrt(np.diag(bread @ scores.T @ scores @ bread))
    result = fit_rl(kl, gold)
    assert result[:2] == pytest.approx(tuple(expected), rel=1e-9)
    for x, (low, high), error in zip(result[:2], result[2:], errors, strict=True):
        assert (high - x, x - low) == (pytest.approx(1.96 * error, rel=0.15), pytest.approx(1.96 * error, rel=0.15))


@pytest.mark.parametrize(
    "kl, gold, match",
    [
        ([1.0], [1.0], "two different kl"), ([0, 1.0], [1.0, 2], "two different"), ([0, -1.0, 2], [1.0, 2, 3], "two different"),
        ([2.0, 2, 2], [1.0, 2, 3], "two different"), ([], [], "two different"), (torch.ones(3), torch.ones(0, 3), "two different"),
        ([1.0, NAN], [1.0, 2], "not finite"), ([1.0, 2], [1.0, INF], "not finite"), ([1.0, 2], [[1.0, 2], [NAN, 1]], "not finite"),
        ([1.0, 2, 3], [1.0, 2], r"\[2\] and \[3\]"), ([[1.0, 2]], [1.0, 2], "gold must be"), (1.0, 2.0, "gold must be"),
        ([[1.0, 2]], [[1.0, 2], [1, 2]], "gold must be"), (torch.ones(1, 1, 2), torch.ones(1, 1, 2), "gold must be"),
        ([1.0, 2], [[1.0, 2], [1]], "gold does not form"),
    ],
)  # fmt: skip
def test_fit_errors(kl, gold, match):
    for curve in (bon_curve, rl_curve):
        with pytest.raises(ValueError, match=match):
            fit_curve(curve, kl, gold)

"""Best-of-n sampling: its expected score, its KL distance, and the curves of overoptimisation.

    P prompts, N answers per prompt, K of them with a weight that counts,
    L points of a curve, S independent replicates of it (prompts or seeds)

Best-of-n draws n answers and keeps the one with the highest *proxy* score. Drawing again and again
for each n wastes answers: from N scored answers the mean over *all* subsets of size n has a closed
form. What is averaged, `values`, may be the proxy itself or the gold score of the same answers:
keep both in the same column order. On a GPU nothing here would be faster: all is done on the CPU.

Sources: Nakano et al. 2021 (WebGPT, arXiv 2112.09332, appendix I: the estimator), Stiennon et al.
2020 (2009.01325, appendix G.3: the KL), Gao, Schulman & Hilton 2022 (2210.10760: the curves).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .stats import bootstrap, t_quantile

# 1, 2, 4, ..., 4096, then up to Coste et al.'s largest.
DEFAULT_NS = tuple(2**i for i in range(13)) + (6144, 8192, 12500)


def as_numbers(x, name: str) -> Tensor:
    """A tensor, array, list or number -> a float64 tensor on the CPU."""
    if torch.is_tensor(x):
        return x.detach().cpu().double()
    try:
        return torch.from_numpy(np.array(x, dtype=np.float64))
    except (TypeError, ValueError) as e:
        raise ValueError(
            f"{name} does not form a tensor of numbers (rows of unequal length need a mask, and "
            f"padding): {e}"
        ) from None


def bon_kl(n) -> float | Tensor:
    """KL(best-of-n || one answer) = log n - (n - 1) / n, in nats, for n >= 1.

    A number, or a tensor for a tensor or list. Pitfall: exact when no two answers tie. With few
    distinct answers it is an upper bound (Beirami et al. 2024, 2401.01879).
    """
    n = as_numbers(n, "n")
    if not (n >= 1).all():
        raise ValueError("best-of-n needs n >= 1")
    kl = n.log() - (n - 1) / n
    return kl if kl.ndim else kl.item()


# --------------------------------------------------------------------------------- the estimator


def bon_weights(n: int, N: int) -> Tensor:
    """The chance that answer i of N is the best of n of them, drawn without replacement.

        w_i = C(i-1, n-1) / C(N, n):    w_N = n / N,    w_{i-1} = w_i (i - n) / (i - 1)

    Answers are numbered in ascending order. -> float64 [K], i = N, N-1, ..., N-K+1: best answer
    first. The answers below, left out, weigh C(last-1, n) / C(N, n) < (last / N)^n < e^-40 < 1e-17
    together, which no float64 sum can see. Without the cut the products would sink into the
    denormal numbers, where a multiplication takes a hundred times longer.
    """
    last = max(n, int(N * math.exp(-40 / n)))
    i = np.arange(N, last - 1.0, -1)  # [K]
    factors = (i - (n - 1)) / i  # the factor from w_{i+1} to w_i
    factors[0] = n / N
    return torch.from_numpy(factors).cumprod(0)  # three times as fast as numpy's


def bon_estimate(proxy, values, ns, mask: Tensor | None = None, per_prompt: bool = False) -> Tensor:
    """The expected value of the best of n answers by proxy score, without bias, for every n at once
    (Nakano et al. 2021).

        E[best-of-n] = sum_{i=n..N} C(i-1, n-1) / C(N, n) S_(i)

    S: the values, sorted by proxy, ascending. Answers with equal proxies get the mean of their
    values: the expectation when ties are broken at random.

    proxy, values [P, N]; ns: whole numbers from 1 to the number of answers; mask [P, N] bool where
    prompts have unequal numbers of answers: False is padding and may hold anything -> float64
    [len(ns)], the mean over prompts, or [P, len(ns)] if `per_prompt`. ValueError: an n out of
    range, numbers that are not finite, shapes that differ. Pitfall: unbiased is not precise. Near
    n = N the estimate hangs on the few best answers of each prompt, and its error is seen only over
    prompts.
    """
    proxy = as_numbers(proxy, "proxy")
    values = as_numbers(values, "values")
    ns = as_numbers(ns, "ns").flatten()
    if mask is not None:
        mask = torch.as_tensor(mask).cpu()
    counts = count_answers(proxy, values, ns, mask)  # [P]
    ns = ns.long().tolist()

    estimates = torch.empty(len(proxy), len(ns), dtype=torch.float64)
    weights = {}
    # Prompts with the same number of answers come one after another: they share their weights.
    for p in counts.argsort().tolist():
        N = counts[p].item()
        if N not in weights:
            weights = {N: [bon_weights(n, N).numpy() for n in ns]}  # each [K]
        # Padding is dropped before the scores are looked at: it may hold anything, NaN too.
        real = slice(None) if mask is None else mask[p].numpy()
        best_first = sort_by_proxy(proxy[p].numpy()[real], values[p].numpy()[real], p)  # [N]
        # w holds the K weights that count, best answer first; all others weigh < 1e-17 together.
        row = []
        for w in weights[N]:
            row.append(best_first[: len(w)] @ w)
        estimates[p] = torch.tensor(row)
    return estimates if per_prompt else estimates.mean(0)


def count_answers(proxy: Tensor, values: Tensor, ns: Tensor, mask: Tensor | None) -> Tensor:
    """Check what bon_estimate is given, and count the answers to each prompt: [P]."""
    if proxy.ndim != 2 or proxy.shape != values.shape or not len(proxy):
        shapes = f"{list(proxy.shape)} and {list(values.shape)}"
        raise ValueError(
            "proxy and values must both be [prompts, answers], of at least one prompt, "
            f"not {shapes}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != proxy.shape):
        raise ValueError(
            f"mask must be bool {list(proxy.shape)}, not {mask.dtype} {list(mask.shape)}"
        )
    if not len(ns) or not ((ns >= 1) & (ns % 1 == 0)).all():
        raise ValueError(f"ns must be whole numbers of at least 1, not {ns.tolist()}")

    if mask is None:
        counts = torch.full(proxy.shape[:1], proxy.shape[1])
    else:
        counts = mask.sum(1)
    largest_n = int(ns.max())
    if largest_n > counts.min():
        raise ValueError(
            f"n = {largest_n} is more than the {counts.min().item()} answers of prompt "
            f"{counts.argmin().item()}"
        )
    return counts


def sort_by_proxy(proxy: np.ndarray, values: np.ndarray, prompt: int) -> np.ndarray:
    """The values of one prompt's answers, the one with the best proxy first: [N] -> [N].

    Tied answers have the mean of their values. Rows of this size fit the cache, and numpy sorts
    them almost twice as fast as torch. The sort is most of the time.
    """
    for name, x in (("proxy", proxy), ("values", values)):
        if not np.isfinite(x).all():
            raise ValueError(f"{name} of prompt {prompt}: a number that is not finite")
    order = np.argsort(-proxy)
    proxy = proxy[order]
    values = values[order]
    is_new = np.append(True, proxy[1:] != proxy[:-1])  # not tied with the one before
    if is_new.all():
        return values
    # Every answer of a group of ties gets the group's mean.
    start = np.flatnonzero(is_new)  # where each group begins
    size = np.diff(start, append=len(values))
    means = np.add.reduceat(values, start) / size
    return np.repeat(means, size)


# --------------------------------------------------------------------------- Gao et al.'s curves


class Fit(NamedTuple):
    """A fitted curve: a, b and their 95% intervals (low, high)."""

    a: float
    b: float
    a_interval: tuple[float, float]
    b_interval: tuple[float, float]


def bon_curve(kl, a: float, b: float) -> Tensor:
    """R(d) = d (a - b d), d = sqrt(KL): the gold score gained by best-of-n.

    kl: any shape, below 0 counts as 0 -> a float64 tensor of that shape.
    """
    d = as_numbers(kl, "kl").clamp(min=0).sqrt()
    return d * (a - b * d)


def rl_curve(kl, a: float, b: float) -> Tensor:
    """R(d) = d (a - b log d), d = sqrt(KL): the gold score gained by RL.

    kl: any shape, below 0 counts as 0 -> a float64 tensor of that shape.
    """
    d = as_numbers(kl, "kl").clamp(min=0).sqrt()
    return a * d - b * torch.xlogy(d, d)  # 0 log 0 = 0


def fit_bon(kl, gold) -> Fit:
    """Fit R(d) = d (a - b d) to best-of-n's gold scores: see fit_curve."""
    return fit_curve(bon_curve, kl, gold)


def fit_rl(kl, gold) -> Fit:
    """Fit R(d) = d (a - b log d) to the gold scores of an RL run: see fit_curve."""
    return fit_curve(rl_curve, kl, gold)


def fit_curve(curve: Callable, kl, gold) -> Fit:
    """Least squares for a and b, over all points, with 95% intervals.

    kl [L] (or [S, L]) in nats; gold [L] or [S, L], in rows the replicates that are independent:
    prompts for best-of-n, seeds for RL. R(0) = 0: where a row's first kl is 0 (at most 1e-6) its
    gold is subtracted from the row. No point with such a kl is fitted. Intervals: for one curve the
    classical ones (Student's t on the residuals; infinite for two points), for several the
    bootstrap over rows. ValueError: fewer than two different kl above 0, numbers that are not
    finite, shapes that do not fit.

    Pitfall: the classical interval takes errors as independent. Points of one curve share answers,
    or a policy, and the first point's error once subtracted, so it is far too narrow. The bootstrap
    is right, but for a handful of rows narrow too.
    """
    kl = as_numbers(kl, "kl")
    gold = as_numbers(gold, "gold")
    if gold.ndim not in (1, 2) or kl.shape not in (gold.shape, gold.shape[-1:]):
        raise ValueError(
            "gold must be [L] or [S, L] and kl [L] or as gold, "
            f"not {list(gold.shape)} and {list(kl.shape)}"
        )
    if not (kl.isfinite().all() and gold.isfinite().all()):
        raise ValueError("fit: a number that is not finite")
    gold = torch.atleast_2d(gold)  # [S, L]
    kl = kl.expand_as(gold)

    # R(0) = 0, so gold is counted from the first point if that is at KL 0.
    starts_at_zero = kl[:, :1] <= 1e-6
    gold = gold - torch.where(starts_at_zero, gold[:, :1], 0.0)
    usable = kl > 1e-6
    if len(kl[usable].unique()) < 2:
        raise ValueError("two coefficients need points at two different kl above 0 at the least")

    # The curves are linear in a and b: R = a curve(kl, 1, 0) + b curve(kl, 0, 1). Points that are
    # not used become rows of zeros.
    x = torch.stack([curve(kl, 1, 0), curve(kl, 0, 1)], -1) * usable[..., None]  # [S, L, 2]
    y = (gold * usable)[..., None]  # [S, L, 1]
    solver = torch.linalg.pinv(x.flatten(0, 1))  # [2, S L]
    ab = solver @ y.flatten()  # [2]

    if len(gold) == 1:
        half = classical_half_width(x[0], y.flatten(), ab, solver, n_points=usable.sum().item())
        low = ab - half
        high = ab + half
    else:
        low, high = bootstrap_over_rows(x, y)
    a, b = ab.tolist()
    a_low, b_low = low.tolist()
    a_high, b_high = high.tolist()
    return Fit(a, b, (a_low, a_high), (b_low, b_high))


def classical_half_width(x: Tensor, y: Tensor, ab: Tensor, solver: Tensor, n_points: int):
    """Half the width of Student's interval for a and b of one curve.

    x [L, 2], y [L], ab [2], solver = X+ [2, L] -> [2]. Cov = s^2 (X'X)^-1 = s^2 X+ X+'. Two points
    leave no residual to judge by: infinite.
    """
    dof = n_points - 2
    # A point that is not used is a row of zeros on both sides, and adds nothing to the sum.
    variance = (y - x @ ab).square().sum() / max(dof, 1)
    if not dof:
        return torch.inf
    return t_quantile(dof) * (variance * solver.square().sum(1)).sqrt()


def bootstrap_over_rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The bootstrap's interval for a and b of several curves.

    x [S, L, 2], y [S, L, 1] -> low [2], high [2]
    """
    # Least squares: X'X ab = X'y. A resample needs only the sums of its rows' products, [X'X, X'y].
    products = x.mT @ torch.cat([x, y], -1)  # [S, 2, 3]

    def solve(rows):
        # Means do as well as sums: the number of rows divides both sides of the equation.
        sums = rows.mean(0)  # [2, 3]
        return torch.linalg.pinv(sums[:, :2]) @ sums[:, 2]

    return bootstrap(products, solve)

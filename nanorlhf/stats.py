"""Small statistics, written out: means with their errors, Kendall's tau and AUC, ridge and logistic regression.

    N rows, D columns of inputs, Q = min(N, D) at most, the dimensions that the rows span, A penalties to choose from
"""

import math
import statistics
from typing import NamedTuple

import numpy as np
import torch

ROUNDING = 64 * torch.finfo(torch.float64).eps  # relative, of a loss that is the sum of many terms


def ratio(totals, counts):
    """A mean over tokens with the standard error that rows, not tokens, are worth: tokens of one text are not independent.

        mean = sum_i t_i / sum_i n_i        se = sqrt(N / (N - 1) sum_i (t_i - mean n_i)^2) / sum_i n_i

    totals, counts [N], one entry a row -> mean, se (0 for a single row). Cochran 1977, section 6.4.
    """
    mean = totals.sum() / counts.sum()
    rows = len(totals)
    squares = (totals - mean * counts).square().sum() * rows / max(rows - 1, 1)
    return mean.item(), (squares.sqrt() / counts.sum()).item() if rows > 1 else 0.0


def bootstrap(values, statistic=None, resamples=1000, level=0.95, seed=0, strata=None):
    """The bootstrap's percentile interval for a statistic of independent rows: each resample draws N of the N rows with replacement.

    values [N, ...]; statistic: [N, ...] -> a number or tensor, by default the mean over rows -> low, high, float64 tensors of its
    shape. The same seed gives the same interval. strata [N]: labels; as many rows are drawn of each as there are, so that none is ever
    empty. ValueError: no rows, numbers that are not finite. Efron & Tibshirani 1993, ch. 13.
    Pitfall: few rows make it too narrow: for the mean of 3, 5 and 10 normal numbers it holds 75, 84 and 90%, not 95. One row has width 0.
    """
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"bootstrap needs at least 1 resample and a level between 0 and 1, not {resamples} and {level}")
    return percentiles(resample(values, statistic, resamples, seed, strata), level)


def resample(values, statistic=None, resamples=1000, seed=0, strata=None):
    """The statistic of each of R resamples: [R, ...]. See bootstrap()."""
    values = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if not values.ndim or not len(values):
        raise ValueError("bootstrap needs at least one row to draw from")
    if not values.isfinite().all():
        raise ValueError("bootstrap: a number that is not finite")
    generator, n, draws = torch.Generator().manual_seed(seed), len(values), []
    strata = torch.zeros(n) if strata is None else torch.as_tensor(strata)
    members = [(strata == label).nonzero()[:, 0] for label in strata.unique()]
    for part in torch.arange(resamples).split(max(1, 2**20 // n)):  # R resamples at a time, so that [R, N] stays small
        rows = torch.cat([m[torch.randint(len(m), (len(part), len(m)), generator=generator)] for m in members], 1)  # [R, N]
        if statistic is None:  # R means at once: how often each row was drawn, times the rows
            times = torch.zeros(len(part), n, dtype=torch.float64)
            times.scatter_add_(1, rows, torch.ones_like(times))
            draws.append((times @ values.reshape(n, -1) / n).reshape(-1, *values.shape[1:]))
        else:
            draws.append(torch.stack([torch.as_tensor(statistic(values[r]), dtype=torch.float64) for r in rows]))
    return torch.cat(draws)


def percentiles(draws, level=0.95):
    """Draws [R, ...] -> low, high: the middle `level` of them."""
    tail = (1 - level) / 2
    low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return low, high


def mean_over_groups(values, groups=None, resamples=1000, seed=0):
    """A mean over rows that are independent only between groups (several answers to a prompt), and resamples of it by whole groups.

        mean = sum_g s_g / sum_g n_g,   s_g the sum and n_g the number of the group's rows

    values [N, ...], groups [N] of labels (default: every row alone) -> mean [...], draws [R, ...] for percentiles(); of two independent
    sets the interval of a difference is percentiles(draws_1 - draws_2), with other seeds. ValueError: no rows, another number of groups
    than rows, numbers that are not finite.
    """
    values = finite("mean_over_groups", values)
    groups = torch.arange(len(values)) if groups is None else torch.as_tensor(groups)
    if groups.shape != values.shape[:1]:
        raise ValueError(f"mean_over_groups: {len(groups)} groups for {len(values)} rows")
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), *values.shape[1:], dtype=torch.float64).index_add(0, index, values)
    table = torch.cat([sums.view(len(counts), math.prod(values.shape[1:])), counts[:, None].double()], 1)  # [G, .. + 1]
    draws = resample(table, resamples=resamples, seed=seed)  # [R, .. + 1]
    return values.mean(0), (draws[:, :-1] / draws[:, -1:]).view(-1, *values.shape[1:])


def mean_se(values):
    """Mean and its standard error (ddof 1) of a tensor: {'mean', 'se', 'n'}."""
    values = values.double()
    se = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else 0.0
    return {"mean": values.mean().item(), "se": se, "n": len(values)}


def pair_wins(chosen, rejected):
    """1 where the chosen answer scores higher, 1/2 for a tie, else 0: float64, of the scores' shape."""
    return (chosen > rejected).double() + 0.5 * (chosen == rejected).double()


def win_points(a, b):
    """Scores [N] of A's and B's answers -> what A gets: 1 where its own is better, 1/2 for a tie, 0 where B's is. float64 [N]

    The mean is A's win rate; with B's it adds up to 1. Pitfall: scores that differ by rounding alone are no tie.
    """
    a, b = finite("win_points", a), finite("win_points", b)
    if a.shape != b.shape:
        raise ValueError(f"win_points needs a score of B for each of A, not {list(a.shape)} and {list(b.shape)}")
    return ((a > b).double() + (a >= b).double()) / 2


def kendall_tau(x, y, permutations=1000, seed=0):
    """Kendall's tau-b with a two-sided permutation p-value.

        tau_b = sum_{i<j} sign(x_i - x_j) sign(y_i - y_j) / sqrt(pairs not tied in x * pairs not tied in y)

    x, y [N] -> tau in [-1, 1], p in (0, 1]; O(N^2) memory. A constant x or y has no tau: (nan, nan).
    """
    x, y = (torch.as_tensor(v, dtype=torch.float64).flatten() for v in (x, y))
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"kendall_tau needs two equally long vectors of at least 2 numbers, not {len(x)} and {len(y)}")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("kendall_tau: a number that is not finite")
    x, y = (v.unique(return_inverse=True)[1].float() for v in (x, y))  # ranks: small, and as tied as before

    def signs(v):
        return torch.sign(v[:, None] - v)  # [N, N]

    sx, sy = signs(x), signs(y)
    norm = (sx.abs().sum().double() * sy.abs().sum().double()).sqrt()
    if norm == 0:
        return float("nan"), float("nan")
    tau = ((sx * sy).sum().double() / norm).item()
    generator = torch.Generator().manual_seed(seed)
    extreme = 0
    for _ in range(permutations):
        order = torch.randperm(len(x), generator=generator)
        extreme += abs(((sx * signs(y[order])).sum().double() / norm).item()) >= abs(tau) - 1e-12
    return tau, (extreme + 1) / (permutations + 1)


def t_quantile(dof):
    """The 97.5% point of Student's t. With t = sqrt(dof) tan(theta) its density is cos(theta)^(dof - 1), easily summed."""
    theta = np.linspace(0, math.pi / 2, 20_001)
    mass = np.cumsum(np.cos((theta[1:] + theta[:-1]) / 2) ** (dof - 1))
    return math.sqrt(dof) * math.tan(np.interp(0.95 * mass[-1], mass, theta[1:]))


def t_interval(values):
    """Mean and half-width of the 95% t interval of a few independent numbers, such as one a seed.

    The half-width of a single number is nan, and both are where one of the numbers is.
    """
    n = len(values)
    if any(math.isnan(value) for value in values):
        return float("nan"), float("nan")
    return statistics.mean(values), t_quantile(n - 1) * statistics.stdev(values) / n**0.5 if n > 1 else float("nan")


def auc(scores, labels):
    """The area under the ROC curve: how often a positive outscores a negative, a tie counting half.

    scores [N], labels [N] of 0 and 1 -> a float; 0.5 is chance. ValueError where one of the two classes is empty.
    """
    scores, labels = finite("auc", scores).flatten(), torch.as_tensor(labels).flatten().cpu() > 0
    if len(scores) != len(labels) or not 0 < labels.sum() < len(labels):
        raise ValueError(f"auc needs both labels, one a score, not {len(labels)}, {int(labels.sum())} of them 1, for {len(scores)} scores")
    positive, negative = scores[labels], scores[~labels].sort().values
    wins, no_losses = (torch.searchsorted(negative, positive, side=side).double().mean() for side in ("left", "right"))
    return ((wins + no_losses) / 2 / len(negative)).item()


def r_squared(y, predicted):
    """1 - sum (y - predicted)^2 / sum (y - mean y)^2: 1 is perfect, 0 no better than y's own mean, below 0 worse. A float.

    A y that is one number throughout has no R^2: nan.
    """
    y, predicted = finite("r_squared", y), finite("r_squared", predicted)
    if not varies(y):
        return float("nan")
    return (1 - (y - predicted).square().sum() / (y - y.mean()).square().sum()).item()


def varies(values: torch.Tensor) -> bool:
    """Whether any two of the numbers of a tensor differ.

    Their standard deviation does not say so: that of equal numbers may be rounding.
    """
    return bool((values != values.flatten()[:1]).any())


def finite(name, x):
    """Anything -> a float64 vector on the CPU; ValueError for numbers that are not finite."""
    x = torch.as_tensor(x, dtype=torch.float64).detach().cpu()
    if not x.isfinite().all():
        raise ValueError(f"{name}: a number that is not finite")
    return x


# ---------------------------------------------------------------------------------------------------------------------- regression


class Linear(NamedTuple):
    """What a regression found: x -> x @ weight + bias, and the penalty that it was found with."""

    weight: torch.Tensor  # [D], float64
    bias: float
    penalty: float


def span(x):
    """Coordinates of centred rows in the space that they span: centred = P V', V'V = 1. x [N, D] -> P [N, Q], V [D, Q], eigenvalues [Q].

    A fit with a quadratic penalty lies in that space, so a thousand rows of a million columns cost what a thousand columns do. By one
    eigendecomposition of the smaller of X'X and XX' (a singular value decomposition takes several times as long).
    """
    wide = x.shape[1] > len(x)
    eigenvalues, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = eigenvalues > 1e-12 * eigenvalues[-1].clamp(min=1e-300)  # the rest is rounding
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    v = x.T @ vectors / eigenvalues.sqrt() if wide else vectors
    return x @ v, v, eigenvalues


def ridge(x, y, alphas, groups=None):
    """Ridge regression, its penalty chosen among `alphas` by the exact error on rows that are left out, without fitting again.

        w, b = argmin sum_i (y_i - x_i w - b)^2 + alpha |w|^2                                                Hoerl & Kennard 1970
        y = H y at the rows, H = 11'/N + P (P'P + alpha)^-1 P';  left out, the group G has the errors (1 - H_GG)^-1 (y - H y)_G

    x [N, D], y [N]; groups [N] of labels: rows with the same label are left out together (default: every row alone) -> Linear.
    ValueError: fewer than two groups, an alpha that is not positive. Source of the second line: Golub, Heath & Wahba 1979, by groups.
    Pitfall: x is centred here but not scaled: columns in other units need other alphas.
    """
    x, y = finite("ridge", x), finite("ridge", y)
    groups = torch.arange(len(y)) if groups is None else torch.as_tensor(groups)
    if x.shape != (len(y), *x.shape[1:2]) or x.ndim != 2 or len(groups) != len(y):
        raise ValueError(f"ridge needs x [N, D], y [N] and groups [N], not {list(x.shape)}, {list(y.shape)} and {len(groups)} groups")
    members = [(groups == g).nonzero()[:, 0] for g in groups.unique()]
    alphas = [float(alpha) for alpha in alphas]
    if len(members) < 2 or not alphas or min(alphas) <= 0:
        raise ValueError(f"ridge needs at least two groups of rows, and alphas above 0: {len(members)} groups, alphas {alphas}")
    x_mean, y_mean = x.mean(0), y.mean()
    p, v, eigenvalues = span(x - x_mean)
    projected = p.T @ (y - y_mean)  # [Q]

    def left_out_error(alpha):
        shrunk = p / (eigenvalues + alpha)  # [N, Q]
        residual = y - y_mean - shrunk @ projected  # [N]
        total = 0.0
        for rows in members:
            rest = torch.eye(len(rows)).double() - 1 / len(y) - shrunk[rows] @ p[rows].T  # 1 - H_GG
            total += torch.linalg.solve(rest, residual[rows]).square().sum().item()
        return total

    alpha = min(alphas, key=left_out_error)
    weight = v @ (projected / (eigenvalues + alpha))
    return Linear(weight, (y_mean - x_mean @ weight).item(), alpha)


def logistic(x, labels, l2=1.0, intercept=True, steps=100):
    """Logistic regression by Newton's method, until a step would lower the loss by less than its rounding.

        w, b = argmin sum_i log(1 + exp(-s_i (x_i w + b))) + l2/2 |w|^2,   s_i = +1 or -1

    x [N, D], labels [N] of 0 and 1 -> Linear. ValueError: one class alone (with an intercept), l2 not positive (separable classes have
    no finite fit without), no convergence. Without an intercept x is the difference of two things, and the label which of them won.
    """
    x, positive = finite("logistic", x), torch.as_tensor(labels).flatten().cpu() > 0
    if x.ndim != 2 or len(x) != len(positive) or l2 <= 0 or (intercept and not 0 < positive.sum() < len(positive)):
        raise ValueError(f"logistic needs x [N, D], labels [N] of both kinds, l2 above 0, not {list(x.shape)}, {len(positive)} and {l2}")
    sign = positive.double() * 2 - 1
    mean = x.mean(0) if intercept else torch.zeros(x.shape[1]).double()
    p, v, _ = span(x - mean)
    p = torch.cat([p, torch.ones(len(x), 1).double()], 1) if intercept else p  # the bias is one more column, without a penalty
    penalty = torch.full((p.shape[1],), float(l2), dtype=torch.float64)
    penalty[p.shape[1] - intercept :] = 0

    def loss(w):
        return -torch.nn.functional.logsigmoid(sign * (p @ w)).sum() + 0.5 * (penalty * w * w).sum()

    w = torch.zeros(p.shape[1]).double()
    converged = False
    for _ in range(steps):
        right = torch.sigmoid(sign * (p @ w))  # the chance of each row's own label
        wrong = torch.sigmoid(-sign * (p @ w))  # of the other one: 1 - right would round to 0
        gradient = penalty * w - p.T @ (sign * wrong)
        hessian = (p.T * (right * wrong)) @ p + penalty.diag()
        move = torch.linalg.solve(hessian, gradient)

        # Newton decrement: lambda^2 = g' H^-1 g. A full step lowers the loss by about lambda^2 / 2.
        decrease = (gradient @ move).item() / 2
        current = loss(w)
        if decrease <= ROUNDING * current:
            # The loss can no longer tell one point from the next, so no step length can be chosen
            # by it. So close to the minimum a full step squares the error: it is the last one.
            w = w - move
            converged = True
            break

        # A full Newton step may overshoot.
        size = 1.0
        while loss(w - size * move) > current and size > 1e-6:
            size /= 2
        w = w - size * move
    if not converged:
        raise ValueError(f"logistic: no convergence in {steps} steps")
    weight = v @ w[: v.shape[1]]
    return Linear(weight, (w[-1] - mean @ weight).item() if intercept else 0.0, float(l2))

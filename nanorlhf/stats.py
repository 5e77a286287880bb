"""Small statistics, written out: means with their errors, rank agreement, and two regressions.

    N rows, R resamples, G groups of rows, D columns of inputs,
    Q = min(N, D) at most, the dimensions that the rows span

Errors of means and the bootstrap come first, then Kendall's tau, Student's t and AUC, then ridge
and logistic regression. All arithmetic is in float64 on the CPU.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# A function of rows that gives a number or a tensor; None stands for their mean.
Statistic = Callable | None
# A label for each row; None where there are none.
Labels = Sequence | None

# The relative rounding error of a loss that is the sum of many terms.
ROUNDING = 64 * torch.finfo(torch.float64).eps
NEWTON_STEPS = 100  # at most; a dozen are usual


# ------------------------------------------------------------------------ means and their errors


def ratio(totals: Tensor, counts: Tensor) -> tuple[float, float]:
    """A mean over tokens, with a standard error over rows: tokens of one text are not independent.

        mean = sum_i t_i / sum_i n_i
        se   = sqrt(N / (N - 1) sum_i (t_i - mean n_i)^2) / sum_i n_i

    totals, counts [N], one entry a row -> mean, se (0 for a single row). Cochran 1977, section 6.4.
    """
    n_rows = len(totals)
    mean = totals.sum() / counts.sum()
    if n_rows <= 1:
        return mean.item(), 0.0
    residuals = totals - mean * counts  # [N]
    squares = residuals.square().sum() * n_rows / (n_rows - 1)
    se = squares.sqrt() / counts.sum()
    return mean.item(), se.item()


def mean_se(values: Tensor) -> dict[str, float]:
    """Mean and its standard error (ddof 1) of a tensor: {'mean', 'se', 'n'}."""
    values = values.double()
    n = len(values)
    se = 0.0
    if n > 1:
        se = (values.std() / n**0.5).item()
    return {"mean": values.mean().item(), "se": se, "n": n}


def bootstrap(
    values,
    statistic: Statistic = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    strata: Labels = None,
) -> tuple[Tensor, Tensor]:
    """The bootstrap's percentile interval for a statistic of independent rows.

    Each resample draws N of the N rows with replacement. values [N, ...]; statistic: [N, ...] -> a
    number or tensor, by default the mean over rows -> low, high, tensors of its shape. The same
    seed gives the same interval. strata [N]: labels; as many rows are drawn of each label as there
    are, so that none is ever empty. ValueError: no rows, numbers that are not finite. Efron &
    Tibshirani 1993, ch. 13.
    Pitfall: few rows make it too narrow: for the mean of 3, 5 and 10 normal numbers it holds 75, 84
    and 90%, not 95. One row has width 0.
    """
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(
            "bootstrap needs at least 1 resample and a level between 0 and 1, "
            f"not {resamples} and {level}"
        )
    draws = resample(values, statistic, resamples, seed, strata)
    low, high = percentiles(draws, level)
    return low, high


def resample(
    values,
    statistic: Statistic = None,
    resamples: int = 1000,
    seed: int = 0,
    strata: Labels = None,
) -> Tensor:
    """The statistic of each of R resamples: [R, ...]. See bootstrap()."""
    values = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if not values.ndim or not len(values):
        raise ValueError("bootstrap needs at least one row to draw from")
    if not values.isfinite().all():
        raise ValueError("bootstrap: a number that is not finite")
    n = len(values)
    generator = torch.Generator().manual_seed(seed)

    # The rows of each stratum; without strata all rows are in one.
    if strata is None:
        labels = torch.zeros(n)
    else:
        labels = torch.as_tensor(strata)
    members = []
    for label in labels.unique():
        members.append((labels == label).nonzero()[:, 0])

    draws = []
    # A part of the resamples at a time, r of them, so that [r, N] stays small.
    for part in torch.arange(resamples).split(max(1, 2**20 // n)):
        drawn = []
        for rows in members:
            choice = torch.randint(len(rows), (len(part), len(rows)), generator=generator)
            drawn.append(rows[choice])
        drawn_rows = torch.cat(drawn, 1)  # [r, N]
        if statistic is None:
            draws.append(means_of_resamples(values, drawn_rows))
        else:
            for rows in drawn_rows:
                result = torch.as_tensor(statistic(values[rows]), dtype=torch.float64)
                draws.append(result[None])  # [1, ...]
    return torch.cat(draws)


def means_of_resamples(values: Tensor, drawn_rows: Tensor) -> Tensor:
    """All means at once: how often each row was drawn, times the rows.

    values [N, ...], drawn_rows [r, N] -> [r, ...]
    """
    n = len(values)
    counts = torch.zeros(drawn_rows.shape, dtype=torch.float64)  # [r, N]: of each row's draws
    counts.scatter_add_(1, drawn_rows, torch.ones_like(counts))
    means = counts @ values.reshape(n, -1) / n
    return means.reshape(-1, *values.shape[1:])


def percentiles(draws: Tensor, level: float = 0.95) -> Tensor:
    """Draws [R, ...] -> low and high, the ends of their middle `level`: one tensor [2, ...]."""
    tail = (1 - level) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    return draws.quantile(ends, dim=0)


def mean_over_groups(
    values, groups: Labels = None, resamples: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A mean over rows that are independent only between groups, and resamples by whole groups.

        mean = sum_g s_g / sum_g n_g,   s_g the sum and n_g the number of the group's rows

    Several answers to one prompt are such a group. values [N, ...], groups [N] of labels (default:
    every row alone) -> mean [...], draws [R, ...] for percentiles(). The interval of a difference
    between two independent sets is percentiles(draws_1 - draws_2), with other seeds. ValueError: no
    rows, another number of groups than rows, numbers that are not finite.
    """
    values = check_finite("mean_over_groups", values)
    if groups is None:
        groups = torch.arange(len(values))
    else:
        groups = torch.as_tensor(groups)
    if groups.shape != values.shape[:1]:
        raise ValueError(f"mean_over_groups: {len(groups)} groups for {len(values)} rows")

    # A group's sum and its number of rows, side by side: a resample's mean is the quotient.
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    n_groups = len(counts)
    sums = torch.zeros(n_groups, *values.shape[1:], dtype=torch.float64)
    sums = sums.index_add(0, index, values).view(n_groups, math.prod(values.shape[1:]))
    table = torch.cat([sums, counts[:, None].double()], 1)  # [G, .. + 1]
    draws = resample(table, resamples=resamples, seed=seed)  # [R, .. + 1]
    means = draws[:, :-1] / draws[:, -1:]
    return values.mean(0), means.view(-1, *values.shape[1:])


def t_quantile(dof: int) -> float:
    """The 97.5% point of Student's t.

    With t = sqrt(dof) tan(theta) its density is cos(theta)^(dof - 1), easily summed.
    """
    theta = np.linspace(0, math.pi / 2, 20_001)
    # The midpoint rule: the mass of each of 20,000 slices, up to a factor that cancels below.
    middle = (theta[1:] + theta[:-1]) / 2
    density = np.cos(middle) ** (dof - 1)
    mass = np.cumsum(density)
    # Half of the distribution lies at theta > 0, so the 97.5% point has 95% of that half below it.
    quantile = np.interp(0.95 * mass[-1], mass, theta[1:])
    return math.sqrt(dof) * math.tan(quantile)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95% t interval of a few independent numbers, such as one a seed.

    The half-width of a single number is nan, and both are where one of the numbers is.
    """
    n = len(values)
    if any(math.isnan(value) for value in values):
        return float("nan"), float("nan")
    mean = statistics.mean(values)
    if n == 1:
        return mean, float("nan")
    half_width = t_quantile(n - 1) * statistics.stdev(values) / n**0.5
    return mean, half_width


# --------------------------------------------------------------------- comparing and ranking


def pair_wins(a: Tensor, b: Tensor) -> Tensor:
    """What A gets in each pair: 1 where its score is higher, 1/2 for a tie, else 0.

    a, b [..]: scores of A's and B's answers, or of chosen and rejected ones -> [..], float64. The
    mean is A's win rate; with B's it adds up to 1. Pitfall: scores that differ by rounding alone
    are no tie.
    """
    wins = (a > b).double()
    ties = (a == b).double()
    return wins + 0.5 * ties


def kendall_tau(x, y, permutations: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Kendall's tau-b (1945) with a two-sided permutation p-value.

        tau_b = sum_{i<j} sign(x_i - x_j) sign(y_i - y_j)
                / sqrt(pairs not tied in x * pairs not tied in y)

    x, y [N] -> tau in [-1, 1], p in (0, 1]. A constant x or y has no tau: (nan, nan). ValueError:
    unequal lengths, fewer than 2 numbers, numbers that are not finite.
    """
    x = check_finite("kendall_tau", x).flatten()
    y = check_finite("kendall_tau", y).flatten()
    n = len(x)
    if n != len(y) or n < 2:
        raise ValueError(
            "kendall_tau needs two equally long vectors of at least 2 numbers, "
            f"not {n} and {len(y)}"
        )

    # Ranks are small whole numbers, and as tied as the values were.
    x_ranks = x.unique(return_inverse=True)[1]
    y_ranks = y.unique(return_inverse=True)[1]
    n_pairs = n * (n - 1) // 2
    x_untied = (n_pairs - count_ties(x_ranks)).double()
    y_untied = (n_pairs - count_ties(y_ranks)).double()
    norm = (x_untied * y_untied).sqrt()
    if norm == 0:
        return float("nan"), float("nan")
    tau = (sum_of_signs(x_ranks, y_ranks[None]) / norm).item()

    # How often does a random pairing of the same numbers have a tau that is as large? Some pairings
    # at a time, r of them, so that [r, N] stays small.
    generator = torch.Generator().manual_seed(seed)
    rows_at_once = max(1, 2**18 // n)
    n_extreme = 0
    for first in range(0, permutations, rows_at_once):
        orders = []
        for _ in range(first, min(first + rows_at_once, permutations)):
            orders.append(torch.randperm(n, generator=generator))
        shuffled_y = y_ranks[torch.stack(orders)]  # [r, N]
        shuffled_taus = sum_of_signs(x_ranks, shuffled_y) / norm  # [r]
        # A tau that equals the observed one, rounding aside, counts too, so p is never too small.
        is_extreme = shuffled_taus.abs() >= abs(tau) - 1e-12
        n_extreme += is_extreme.sum().item()
    # The observed pairing is itself one of the possible ones: with it in the count, p is never 0.
    return tau, (n_extreme + 1) / (permutations + 1)


def sum_of_signs(x: Tensor, y: Tensor) -> Tensor:
    """sum_{i<j} sign(x_i - x_j) sign(y_i - y_j), for each row of y, in O(N log N): Knight 1966.

        = concordant - discordant = untied - 2 discordant

    A pair is concordant where x and y have it in the same order, discordant where they have it in
    opposite orders, and untied where it is one of the two.
    x [N], y [R, N]: whole numbers from 0 to N - 1 -> [R], float64
    """
    n = len(x)
    # x and y as one number: sorted by it, x ascends, and so does y wherever x is tied.
    both = (x * n + y).sort().values  # [R, N]

    # A pair that is tied in x and in y is subtracted twice, so it is added once.
    n_pairs = n * (n - 1) // 2
    untied = n_pairs - count_ties(x) - count_ties(y) + count_ties(both)

    # Now that x ascends, a pair is discordant wherever y descends.
    discordant = count_inversions(both % n)
    return (untied - 2 * discordant).double()


def count_ties(values: Tensor) -> Tensor:
    """How many pairs of numbers in a row are equal: [..., N] -> [...]."""
    values = values.sort().values
    places = torch.arange(values.shape[-1])
    # Each number makes a pair with those before it that are equal to it.
    first_places = torch.searchsorted(values, values)  # of the first that is equal
    return (places - first_places).sum(-1)


def count_inversions(rows: Tensor) -> Tensor:
    """How many pairs of numbers in a row descend from left to right: [R, N] -> [R].

    They are counted by a merge sort. Where two sorted runs are merged, each number of the right run
    stands behind all numbers of the left run that are larger.

        3 1 2 0  ->  1 3 | 0 2  ->  0 1 2 3        2 inversions in the first step, 3 in the second
    """
    n_rows, n = rows.shape
    # Runs double in length, so the row's length must be a power of 2. It is filled up with a number
    # that is largest and stands last, which makes no inversion.
    full_length = 2 ** math.ceil(math.log2(n))
    filling = rows.max().expand(n_rows, full_length - n)
    runs = torch.cat([rows, filling], 1)

    inversions = torch.zeros(n_rows, dtype=torch.long)
    width = 1  # the length of a sorted run
    while width < full_length:
        left, right = runs.view(n_rows, -1, 2, width).unbind(2)  # [R, pairs of runs, width] each
        n_smaller_or_equal = torch.searchsorted(left.contiguous(), right.contiguous(), right=True)
        n_larger = width - n_smaller_or_equal
        inversions += n_larger.sum((1, 2))
        width *= 2
        runs = runs.view(n_rows, -1, width).sort().values
    return inversions


def auc(scores, labels) -> float:
    """The area under the ROC curve: how often a positive outscores a negative, a tie counting half.

    scores [N], labels [N] of 0 and 1 -> a float; 0.5 is chance. ValueError where one of the two
    classes is empty.
    """
    scores = check_finite("auc", scores).flatten()
    is_positive = torch.as_tensor(labels).flatten().cpu() > 0
    n_positive = int(is_positive.sum())
    if len(scores) != len(is_positive) or not 0 < n_positive < len(is_positive):
        raise ValueError(
            f"auc needs both labels, one a score, not {len(is_positive)}, "
            f"{n_positive} of them 1, for {len(scores)} scores"
        )
    positive = scores[is_positive]
    negative = scores[~is_positive].sort().values
    # How many negatives lie strictly below each positive, and how many at most as high.
    n_below = torch.searchsorted(negative, positive, side="left").double()
    n_at_most = torch.searchsorted(negative, positive, side="right").double()
    mean_points = (n_below.mean() + n_at_most.mean()) / 2  # a tie is half a point
    return (mean_points / len(negative)).item()


def r_squared(y, predicted) -> float:
    """1 - sum (y - predicted)^2 / sum (y - mean y)^2.

    1 is perfect, 0 no better than y's own mean, below 0 worse. A y that is one number throughout
    has no R^2: nan.
    """
    y = check_finite("r_squared", y)
    predicted = check_finite("r_squared", predicted)
    if not varies(y):
        return float("nan")
    unexplained = (y - predicted).square().sum()
    total = (y - y.mean()).square().sum()
    return (1 - unexplained / total).item()


def varies(values: Tensor) -> bool:
    """Whether any two of the numbers of a tensor differ.

    Their standard deviation does not say so: that of equal numbers may be rounding.
    """
    first = values.flatten()[:1]
    return bool((values != first).any())


def check_finite(name: str, x) -> Tensor:
    """Anything that holds numbers -> a float64 tensor on the CPU.

    ValueError, with the caller's name, for numbers that are not finite.
    """
    x = torch.as_tensor(x, dtype=torch.float64).detach().cpu()
    if not x.isfinite().all():
        raise ValueError(f"{name}: a number that is not finite")
    return x


# ------------------------------------------------------------------------------------ regression


class Linear(NamedTuple):
    """What ridge() found: x -> x @ weight + bias, and the penalty that it was found with."""

    weight: Tensor  # [D], float64
    bias: float
    penalty: float


def span(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates of rows in the space that they span: x = P V', V'V = 1.

    x [N, D] -> P [N, Q], V [D, Q], eigenvalues [Q]. A fit with a quadratic penalty lies in that
    space, so a thousand rows of a million columns cost what a thousand columns do. One
    eigendecomposition of the smaller of X'X and XX' gives it (a singular value decomposition takes
    several times as long).
    """
    is_wide = x.shape[1] > len(x)
    if is_wide:
        products = x @ x.T
    else:
        products = x.T @ x
    eigenvalues, vectors = torch.linalg.eigh(products)

    # Eigenvalues that are tiny beside the largest one are rounding.
    largest = eigenvalues[-1].clamp(min=1e-300)
    kept = eigenvalues > 1e-12 * largest
    eigenvalues = eigenvalues[kept]
    vectors = vectors[:, kept]

    v = vectors
    if is_wide:
        v = x.T @ vectors / eigenvalues.sqrt()
    return x @ v, v, eigenvalues


def ridge(x, y, alphas: Sequence[float], groups: Labels = None) -> Linear:
    """Ridge regression, its penalty chosen by the exact error on rows that are left out.

        w, b = argmin sum_i (y_i - x_i w - b)^2 + alpha |w|^2                  Hoerl & Kennard 1970

    No fit is made again for that. At the rows the prediction is H y, with
    H = 11'/N + P (P'P + alpha)^-1 P'. Where the group G is left out, its errors are
    (1 - H_GG)^-1 (y - H y)_G (Golub, Heath & Wahba 1979, by groups).

    x [N, D], y [N]; groups [N] of labels: rows with the same label are left out together (default:
    every row alone) -> Linear. ValueError: fewer than two groups, an alpha that is not positive.
    Pitfall: x is centred here but not scaled: columns in other units need other alphas.
    """
    x = check_finite("ridge", x)
    y = check_finite("ridge", y)
    if groups is None:
        groups = torch.arange(len(y))
    else:
        groups = torch.as_tensor(groups)
    if x.ndim != 2 or len(x) != len(y) or len(groups) != len(y):
        raise ValueError(
            f"ridge needs x [N, D], y [N] and groups [N], not {list(x.shape)}, {list(y.shape)} "
            f"and {len(groups)} groups"
        )
    members = []  # the rows of each group
    for label in groups.unique():
        members.append((groups == label).nonzero()[:, 0])
    alphas = [float(alpha) for alpha in alphas]
    if len(members) < 2 or not alphas or min(alphas) <= 0:
        raise ValueError(
            "ridge needs at least two groups of rows, and alphas above 0: "
            f"{len(members)} groups, alphas {alphas}"
        )

    x_mean = x.mean(0)
    y_mean = y.mean()
    p, v, eigenvalues = span(x - x_mean)
    projected = p.T @ (y - y_mean)  # [Q]

    def left_out_error(alpha):
        # P'P is diagonal, with the eigenvalues: its inverse costs a division for each alpha.
        shrunk = p / (eigenvalues + alpha)  # [N, Q]
        residual = y - y_mean - shrunk @ projected  # [N]: y - H y
        total = 0.0
        for rows in members:
            # The rows of a group pulled the fit towards themselves; without them they miss by more.
            identity = torch.eye(len(rows)).double()
            without_mean = identity - 1 / len(y)
            one_minus_h = without_mean - shrunk[rows] @ p[rows].T  # 1 - H_GG
            errors = torch.linalg.solve(one_minus_h, residual[rows])
            total += errors.square().sum().item()
        return total

    alpha = min(alphas, key=left_out_error)
    # Back from the coordinates P to the columns of x; the bias undoes the centring of x and y.
    weight = v @ (projected / (eigenvalues + alpha))
    bias = (y_mean - x_mean @ weight).item()
    return Linear(weight, bias, alpha)


def logistic(x, labels, l2: float = 1.0) -> Tensor:
    """Logistic regression without an intercept, by Newton's method, to the rounding of the loss.

        w = argmin sum_i log(1 + exp(-s_i x_i w)) + l2/2 |w|^2,   s_i = +1 or -1

    x is the difference of two things, and the label which of them won: x [N, D], labels [N] of 0
    and 1 -> w [D], float64. ValueError: another number of labels than rows, l2 not positive
    (separable classes have no finite fit without), no convergence.
    """
    x = check_finite("logistic", x)
    is_positive = torch.as_tensor(labels).flatten().cpu() > 0
    if x.ndim != 2 or len(x) != len(is_positive) or l2 <= 0:
        raise ValueError(
            "logistic needs x [N, D], labels [N] and l2 above 0, "
            f"not {list(x.shape)}, {len(is_positive)} and {l2}"
        )
    sign = is_positive.double() * 2 - 1  # [N]
    # The fit is made in the space that the rows span, and brought back to the columns of x.
    p, v, _ = span(x)  # [N, Q], [D, Q]
    return v @ minimise_by_newton(p, sign, float(l2))


def minimise_by_newton(p: Tensor, sign: Tensor, l2: float) -> Tensor:
    """The w of the lowest loss: -sum_i log sigmoid(s_i p_i w) + l2/2 |w|^2.

    p [N, Q], sign [N] -> w [Q]. It ends where a step would lower the loss by less than its
    rounding. ValueError: it has not ended after NEWTON_STEPS.
    """

    def loss(w):
        log_likelihood = torch.nn.functional.logsigmoid(sign * (p @ w)).sum()
        return -log_likelihood + 0.5 * (l2 * w * w).sum()

    w = torch.zeros(p.shape[1]).double()
    for _ in range(NEWTON_STEPS):
        right = torch.sigmoid(sign * (p @ w))  # the chance of each row's own label
        wrong = torch.sigmoid(-sign * (p @ w))  # of the other one: 1 - right would round to 0
        gradient = l2 * w - p.T @ (sign * wrong)
        hessian = (p.T * (right * wrong)) @ p + l2 * torch.eye(len(w)).double()
        move = torch.linalg.solve(hessian, gradient)

        # Newton decrement: lambda^2 = g' H^-1 g. A full step lowers the loss by about lambda^2 / 2.
        decrease = (gradient @ move).item() / 2
        current = loss(w)
        if decrease <= ROUNDING * current:
            # The loss can no longer tell one point from the next, so no step length can be chosen
            # by it. So close to the minimum a full step squares the error: it is the last one.
            return w - move

        # A full Newton step may overshoot.
        size = 1.0
        while loss(w - size * move) > current and size > 1e-6:
            size /= 2
        w = w - size * move
    raise ValueError(f"logistic: no convergence in {NEWTON_STEPS} steps")

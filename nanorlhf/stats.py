"""Small statistics, written out: a ratio with its standard error, Kendall's tau."""

import torch


def ratio(totals, counts):
    """A mean over tokens with the standard error that rows, not tokens, are worth: tokens of one text are not independent.

        mean = sum_i t_i / sum_i n_i        se = sqrt(N / (N - 1) sum_i (t_i - mean n_i)^2) / sum_i n_i

    totals, counts [N], one entry a row -> mean, se (0 for a single row). Cochran 1977, section 6.4.
    """
    mean = totals.sum() / counts.sum()
    rows = len(totals)
    squares = (totals - mean * counts).square().sum() * rows / max(rows - 1, 1)
    return mean.item(), (squares.sqrt() / counts.sum()).item() if rows > 1 else 0.0


def kendall_tau(x, y, permutations=1000, seed=0):
    """Kendall's tau-b with a two-sided permutation p-value.

        tau_b = sum_{i<j} sign(x_i - x_j) sign(y_i - y_j) / sqrt(pairs not tied in x * pairs not tied in y)

    x, y [N] -> tau in [-1, 1], p in (0, 1]; O(N^2) memory. A constant x or y has no tau: (nan, nan).
    """
    x, y = torch.as_tensor(x).double().flatten(), torch.as_tensor(y).double().flatten()
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"kendall_tau needs two equally long vectors of at least 2 numbers, not {len(x)} and {len(y)}")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("kendall_tau: a number that is not finite")
    sx, sy = (torch.sign(v[:, None] - v[None, :]).float() for v in (x, y))  # [N, N]
    norm = (sx.abs().sum().double() * sy.abs().sum().double()).sqrt()
    if norm == 0:
        return float("nan"), float("nan")
    tau = ((sx * sy).sum().double() / norm).item()
    generator = torch.Generator().manual_seed(seed)
    extreme = 0
    for _ in range(permutations):
        order = torch.randperm(len(x), generator=generator)
        extreme += abs(((sx * sy[order][:, order]).sum().double() / norm).item()) >= abs(tau) - 1e-12
    return tau, (extreme + 1) / (permutations + 1)

"""Numbers of a study's runs: read, shortened, subtracted seed by seed, read off a curve; printed,
drawn.

A table is {row: {column: [one number a seed]}}.
"""

import math

import numpy as np

from ..runtime.files import read_rows
from .common import as_text


def shorten(x: float | None) -> float | None:
    """A number with four significant digits, so that a run fits a line of the file of results."""
    if x is None:
        return None
    return float(f"{x:.4g}")


def read_curves(folder: str, columns: tuple[str, ...]) -> dict[str, list]:
    """The evaluations of a run on held-out prompts, and the seconds that it trained for.

    -> {"step": [...], each of the columns: [...], "entropy": [...], "seconds": [x]}, with None for
    what was not measured. The entropy, in nats a token, is that of the answers that the step
    learned from.
    """
    # metrics.jsonl has a line for each step. Some lines also have an evaluation's numbers:
    #   {"step": 5, "entropy": 1.9, "seconds_rollout": 0.8, "eval/gold": -0.1, "eval/kl": 4.2, ...}
    run = {name: [] for name in ("step", *columns, "entropy")}
    for row in read_rows(f"{folder}/metrics.jsonl", {"step": int}):
        if "eval/proxy" not in row:
            continue
        run["step"].append(row["step"])
        for name in columns:
            run[name].append(shorten(row.get(f"eval/{name}")))
        run["entropy"].append(shorten(row.get("entropy")))
    return run | {"seconds": [read_seconds(folder)]}


def read_seconds(folder: str) -> float:
    """The seconds that a run's steps took, those without an evaluation too."""
    seconds = 0.0
    for row in read_rows(f"{folder}/metrics.jsonl", {"step": int}):
        for name, value in row.items():
            if name.startswith("seconds"):
                seconds += value
    return shorten(seconds)


def subtract(numbers: list[float], others: list[float]) -> list[float]:
    """Seed by seed."""
    return [x - y for x, y in zip(numbers, others, strict=True)]


def value_at_kl(points: list[tuple[float, float]], kl: float) -> float | None:
    """The value at a KL, on straight lines in the root of the KL between points (KL, value).

    None for a KL that no two neighbours have between them. Where there are several such pairs, the
    first counts: a run that comes back to a KL was there before.
    """
    d = math.sqrt(max(kl, 0.0))  # a KL that is estimated may come out a little below 0
    # Neighbours are taken along the run, which may pass a KL several times.
    for (kl_0, value_0), (kl_1, value_1) in zip(points, points[1:]):
        d_0 = math.sqrt(max(kl_0, 0.0))
        d_1 = math.sqrt(max(kl_1, 0.0))
        if not min(d_0, d_1) <= d <= max(d_0, d_1):
            continue
        # Both points are at this KL: there is no line between them, and the run came first to the
        # former.
        if d_0 == d_1:
            return value_0
        return value_0 + (value_1 - value_0) * (d - d_0) / (d_1 - d_0)
    return None


def print_table(table: dict[str, dict[str, list[float]]]):
    """Mean +- half-width of the interval; the number of seeds where not all have a number."""
    columns = {}  # a set that keeps the order
    most = 0  # seeds
    for row in table.values():
        columns |= dict.fromkeys(row)
        for numbers in row.values():
            most = max(most, len(numbers))

    header = f"{'':18s}"
    for column in columns:
        header += f"{column:>20s}"
    print(header)
    for name, row in table.items():
        line = f"{name:18s}"
        for column in columns:
            line += f"{as_text(row.get(column, []), most):>20s}"
        print(line)


def draw_mean(axis, x, values: np.ndarray, **look):
    """The mean of values [seeds, L] at x [L], and a band of its standard error over seeds.

    look: how the line looks, as in matplotlib's plot(). The band has the line's colour.
    """
    mean = values.mean(0)
    (line,) = axis.plot(x, mean, **look)
    # A single seed has no standard error.
    if len(values) > 1:
        error = values.std(0, ddof=1) / len(values) ** 0.5
        color = line.get_color()
        axis.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)

"""Pictures of runs, with matplotlib where it is installed.

The curves of each run, in RUN/curves.png; of a best-of-n run in RUN/bon.png:

    python -m nanorlhf.runtime.plots RUN...

Proxy and gold of PPO runs, or of best-of-n runs, in one picture:

    python -m nanorlhf.runtime.plots --compare FILE.png RUN...

A comparison averages runs that differ in nothing but seeds (seed_<digits> in a path is one).
Objectives of an ensemble are colours, and whatever else differs between the runs makes a row of
panels. Where all runs have the same objective there is one row, and whatever else differs makes a
colour.

What is drawn is read and put together in curves.py. torch takes a second to import, and only
comparisons need it. So functions import bon.py and ensemble.py here, where they use them.

    S runs that differ in seed, L points of a curve
"""

import argparse
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from .curves import BEST_OF_N, PPO, arrange, kind_of, logged_names, over_runs, read_records
from .files import check_output

# What the curves of a run show, if its metrics have it: name -> the metric's label.
PANELS = {
    "proxy": "proxy reward, held out",
    "controlled": "controlled reward, held out",
    "gold": "gold reward, held out",
    "kl": "KL to the SFT policy, held out (nats)",
    "variance": "variance over reward models",
    "perplexity": "perplexity, held out",
    "score_mean": "score of rollouts",
    "loss": "loss",
    "accuracy": "accuracy (of pairs; SFT: of tokens)",
    "entropy": "entropy (nats a token)",
    "length": "response length (tokens)",
    "clip_fraction": "clip fraction",
    "explained_variance": "explained variance",
    "value_loss": "value loss",
    "grad_norm": "gradient norm",
}


class Look(NamedTuple):
    """How a comparison of one kind of run is drawn."""

    x_label: str  # of the left panels
    d_label: str  # of the right panels
    scale: str  # of x in the left panels
    band: str  # what the band of a single run is
    start: float  # the x of the policy that a run starts from, where KL is 0
    fit: Callable  # (kl, gold, d) -> the curve that is fitted to gold over d
    formula: str


def curve_of_bon(kl: np.ndarray, gold: np.ndarray, d: np.ndarray) -> np.ndarray:
    """What gold gains at each d, by the formula of best-of-n, fitted to kl and gold [S, L]."""
    from ..bon import bon_curve, fit_bon

    fit = fit_bon(kl, gold)
    return bon_curve(d**2, fit.a, fit.b).numpy()


def curve_of_rl(kl: np.ndarray, gold: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The same by the formula of RL."""
    from ..bon import fit_rl, rl_curve

    fit = fit_rl(kl, gold)
    return rl_curve(d**2, fit.a, fit.b).numpy()


LOOK = {
    BEST_OF_N: Look(
        x_label="n, best of n",
        d_label="d = sqrt(KL of best-of-n in nats)",
        scale="log",
        band="bootstrap interval over prompts (mean of members: range)",
        start=1,
        fit=curve_of_bon,
        formula="R = d (a - b d)",
    ),
    PPO: Look(
        x_label="PPO steps",
        d_label="d = sqrt(KL to the SFT policy in nats)",
        scale="linear",
        band="+- 1 standard error over prompts",
        start=0,
        fit=curve_of_rl,
        formula="R = d (a - b log d)",
    ),
}

STYLE = {
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "figure.labelsize": 8,
    "lines.markersize": 4,
}

LEGEND_WIDTH = 130  # letters that fit beside each other above a comparison
LEGEND_HANDLE = 8  # letters' room that the line before each text takes


# ----------------------------------------------------------------------------------------- files


def plot_run(run: str) -> str | None:
    """Draw a run: its metrics into curves.png, or its best-of-n results into bon.png.

    Returns the picture's path, or None without matplotlib.
    """
    if kind_of(run) == BEST_OF_N:
        return save(comparison_figure, [run], os.path.join(run, "bon.png"))
    return save(curves_figure, run, os.path.join(run, "curves.png"))


def save(draw: Callable, what, path: str) -> str | None:
    """draw(figure, what) into a file. Returns its path, or None without matplotlib."""
    try:
        import matplotlib.figure
    except ImportError:
        return None
    # A figure that is made without pyplot needs no display and no closing.
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(layout="constrained")
        draw(figure, what)
        figure.savefig(path, dpi=150)
    return path


def is_picture(path: str) -> bool:
    """Whether a file is a picture that matplotlib drew: PNG, PDF or SVG that names matplotlib."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as f:
        content = f.read()
    return content.startswith((b"\x89PNG", b"%PDF", b"<?xml")) and b"Matplotlib" in content


# --------------------------------------------------------------------------- the curves of one run


def curves_figure(figure, run: str):
    """One panel a metric, against the step; bands are +- 1 standard error.

    A held-out metric has a line for each split. InputError: the run has no metric to draw.
    """
    records = read_records(run)
    logged = logged_names(records)
    panels = choose_panels(logged)
    if not panels:
        raise InputError(f"{run}: nothing to draw in its {PPO}")

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)  # rounded up
    figure.set_size_inches(4 * columns, 2.6 * rows)
    for i, (name, key) in enumerate(panels.items()):
        axis = figure.add_subplot(rows, columns, i + 1)
        lines = lines_of_panel(name, key, logged)
        for label, line_key in lines.items():
            draw_metric(axis, records, line_key, label)
        if len(lines) > 1:
            axis.legend()
        axis.set_title(PANELS[name])
        axis.set_xlabel("step")


def choose_panels(logged: set[str]) -> dict[str, str]:
    """Keys of metrics.jsonl -> {name in PANELS: the key that its panel shows}."""
    panels = {}
    for name in PANELS:
        # The last of the three that was logged is shown. So a metric that is measured on held-out
        # prompts too is shown for these.
        for key in (f"score_{name}", name, f"eval/{name}"):
            if key in logged:
                panels[name] = key
    return panels


def lines_of_panel(name: str, key: str, logged: set[str]) -> dict[str, str]:
    """{label: key} of the lines in a metric's panel: the first split, then further ones."""
    lines = {"first split": key}
    if not key.startswith("eval/"):
        return lines

    # Further splits have keys such as "ood/gold".
    prefixes = set()
    for logged_key in logged:
        if "/" in logged_key:
            prefixes.add(logged_key.partition("/")[0])
    for split in sorted(prefixes - {"eval", "score"}):
        if f"{split}/{name}" in logged:
            lines[split] = f"{split}/{name}"
    return lines


def draw_metric(axis, records: list[dict], key: str, label: str):
    """The line of one metric, with a band of its standard error where there is one."""
    # A record has a metric of evaluations only if its step had one.
    points = []
    for record in records:
        if key in record:
            points.append((record["step"], record[key], record.get(f"{key}_se", 0.0)))
    steps, values, errors = np.array(points, dtype=float).T  # [L] each; None becomes nan

    # Few points are marked one by one. Many marks would hide the line.
    marker = None
    if len(steps) < 15:
        marker = "o"
    axis.plot(steps, values, marker=marker, label=label)
    axis.fill_between(steps, values - errors, values + errors, alpha=0.25)


# -------------------------------------------------------------------------- the comparison of runs


def comparison_figure(figure, runs: list[str]):
    """Rows of two panels: rewards against n or the step, and against sqrt(KL).

    Gold is solid with a band, proxy dashed, the fit of gold dotted. InputError: runs of two kinds.
    """
    kinds = {kind_of(run) for run in runs}
    if len(kinds) > 1:
        raise InputError(
            "best-of-n runs and PPO runs do not share a picture: compare each kind on its own"
        )
    look = LOOK[kinds.pop()]
    rows = arrange(runs)
    labels = []
    most_runs = 1  # of one colour in a row of panels
    for row in rows.values():
        for label, group in row.items():
            labels.append(label)
            most_runs = max(most_runs, len(group))
    # A label has the same colour in all rows, so that rows can be compared at a glance.
    colours = colours_of(labels)

    row_height = 3.2
    if len(rows) > 1:
        row_height = 2.2
    figure.set_size_inches(9, 1 + row_height * len(rows))
    axes = figure.subplots(len(rows), 2, sharex="col", sharey=True, squeeze=False)

    # A row of panels is a cell, a colour in it the runs of that cell that differ in seed.
    handles = {}
    for pair, (title, row) in zip(axes, rows.items(), strict=True):
        for label, colour in colours.items():
            if label in row:
                handles[label] = draw_group(pair, over_runs(row[label]), colour, look)
        pair[0].set_title(title, loc="left")

    axes[-1, 0].set(xlabel=look.x_label, xscale=look.scale)
    axes[-1, 1].set(xlabel=look.d_label)
    figure.supylabel("reward (proxy: in standard deviations)", fontsize=9)
    band = look.band
    if most_runs > 1:
        band = "+- 1 standard error over runs"
    figure.supxlabel(f"gold solid, proxy dashed, fit of gold {look.formula} dotted; band: {band}")
    draw_legend(figure, rows, [(label, handles[label]) for label in colours])


def draw_legend(figure, rows: dict, handles: list[tuple]):
    """Put labels with their numbers of runs above a comparison, in as many columns as fit."""
    texts = []
    for label, _ in handles:
        counts = set()  # rows of panels may have different numbers of runs
        for row in rows.values():
            if label in row:
                counts.add(len(row[label]))
        text = label
        if counts != {1}:
            numbers = "-".join(map(str, sorted(counts)))
            text += f", {numbers} runs"
        texts.append(text)

    # All labels stand on one line where they fit. Else each column has room for the longest label.
    widths = [len(text) + LEGEND_HANDLE for text in texts]
    columns = len(texts)
    if sum(widths) >= LEGEND_WIDTH:
        columns = max(1, LEGEND_WIDTH // max(widths))
    lines = [line for _, line in handles]
    figure.legend(lines, texts, loc="outside upper center", ncols=columns)


def colours_of(labels: list[str]) -> dict[str, str]:
    """Labels -> {label: colour}, in the order of the legend.

    "single" and the objectives have the same colours in all pictures. uwo has none of its own: its
    labels name its lambda, and there may be several.
    """
    from ..ensemble import OBJECTIVES

    fixed = ["single"]
    for objective in OBJECTIVES:
        if objective != "uwo":
            fixed.append(objective)

    names = {label: label.split(" (")[0] for label in labels}  # without "(mean of K members)"
    order = list(names.values())
    if set(fixed) & set(order):
        order = fixed + order
    order = list(dict.fromkeys(order))  # each once

    # matplotlib has ten colours, C0 to C9.
    numbers = {label: order.index(name) for label, name in names.items()}
    in_order = sorted(labels, key=numbers.get)
    return {label: f"C{numbers[label] % 10}" for label in in_order}


def draw_group(axes, curves: dict[str, np.ndarray], colour: str, look: Look):
    """The mean of the curves [S, L] of runs that differ in seed. Returns its line for the legend.

    The band is the runs' standard error, or a single run's own band. It stands around gold, or
    around proxy where gold is not known.
    """
    mean = {name: values.mean(0) for name, values in curves.items()}  # [L] each
    main = "proxy"
    if np.isfinite(mean["gold"]).any():
        main = "gold"

    low = mean[f"{main}_low"]
    high = mean[f"{main}_high"]
    n_runs = len(curves["x"])
    if n_runs > 1:
        error = curves[main].std(0, ddof=1) / n_runs**0.5
        low = mean[main] - error
        high = mean[main] + error

    # The estimate of a KL near 0 may be negative.
    d = np.sqrt(curves["kl"].clip(0)).mean(0)  # [L]
    for axis, x, marker in ((axes[0], mean["x"], ""), (axes[1], d, "o")):
        axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        (proxy,) = axis.plot(x, mean["proxy"], "--", color=colour, linewidth=1)
        (gold,) = axis.plot(x, mean["gold"], "-", color=colour, linewidth=2, marker=marker)
    draw_fit(axes[1], curves, look)
    if main == "gold":
        return gold
    return proxy


def draw_fit(axis, curves: dict[str, np.ndarray], look: Look):
    """Gao et al.'s curve through the gold of all runs, over d = sqrt(KL).

    It is drawn where gold is known at the start and at two more KL at least.
    """
    is_known = np.isfinite(curves["gold"]).all(0)  # [L]
    kl = curves["kl"][:, is_known].clip(0)  # [S, known points]
    gold = curves["gold"][:, is_known]
    # The curve is fitted to the gain in gold since the start, where d = 0. Its two coefficients
    # need two further points.
    knows_start = is_known[0] and curves["x"][0, 0] == look.start
    if not knows_start:
        return
    later_kl = kl[:, 1:]
    if len(np.unique(later_kl[later_kl > 1e-6])) < 2:
        return

    # The KL of the policy that a run starts from is 0, whatever bfloat16 says.
    kl[:, 0] = 0.0
    d = np.linspace(0, np.sqrt(kl).mean(0).max(), 200)
    fitted = gold[:, 0].mean() + look.fit(kl, gold, d)
    axis.plot(d, fitted, ":", color="black", linewidth=1.2)


# -------------------------------------------------------------------------------- the command line


def main():
    """Draw what the command line names, and print the pictures' paths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument(
        "--compare", metavar="FILE.png", help="one picture of all these runs instead"
    )
    # Else the usage would stand in front of the error.
    parser.error = lambda message: parser.exit(2, f"plots.py: error: {message}\n")
    args = parser.parse_args()
    try:
        # Nothing is drawn before all folders are known to hold runs.
        for run in args.runs:
            kind_of(run)
        if args.compare:
            check_output(args.compare, is_picture, "a picture of matplotlib's")
            print_path(save(comparison_figure, args.runs, args.compare))
        else:
            for run in args.runs:
                print_path(plot_run(run))
    except (InputError, OSError) as e:
        parser.exit(2, f"plots.py: error: {e}\n")


def print_path(picture: str | None):
    print(picture or "matplotlib is not installed: pip install matplotlib")


if __name__ == "__main__":
    main()

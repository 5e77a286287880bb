"""Pictures of runs, with matplotlib where it is installed.

    python -m nanorlhf.runtime.plots RUN...                      RUN/curves.png for each; RUN/bon.png for a best-of-n run
    python -m nanorlhf.runtime.plots --compare FILE.png RUN...   proxy and gold of PPO runs, or of best-of-n runs, in one picture

A comparison averages runs that differ in nothing but seeds (seed_<digits> in a path is one). Ensemble objectives are colours, and
whatever else differs between the runs makes a row of panels; without several objectives there is one row, and it makes a colour.

    S runs that differ in seed, K members of an ensemble, L points of a curve
"""

import argparse
import functools
import json
import os
import re

import numpy as np

from ..bon import bon_curve, fit_bon, fit_rl, rl_curve
from ..ensemble import OBJECTIVES, objective_of
from ..errors import InputError
from .files import check_fields, check_output, is_of_type, read_object, read_rows
from .log import PLACES

# What the curves of a run show, if its metrics have it: name -> the metric's label.
PANELS = {
    "proxy": "proxy reward, held out", "controlled": "controlled reward, held out", "gold": "gold reward, held out",
    "kl": "KL to the SFT policy, held out (nats)",
    "variance": "variance over reward models", "perplexity": "perplexity, held out", "score_mean": "score of rollouts", "loss": "loss",
    "accuracy": "accuracy (of pairs; SFT: of tokens)", "entropy": "entropy (nats a token)", "length": "response length (tokens)",
    "clip_fraction": "clip fraction", "explained_variance": "explained variance", "value_loss": "value loss", "grad_norm": "gradient norm",
}  # fmt: skip
BEST_OF_N, PPO = "bon_results.json", "metrics.jsonl"  # the file that tells the kind of a run
# What must be numbers in a point of bon_results.json.
POINT = dict.fromkeys(("kl", "proxy_score", "proxy_se", "gold_score", "gold_se"), float | None)
POINT["n"] = float
# Of a comparison: labels of the x-axes, scale of the first, band of a single run, x where KL is 0, fit of gold over d.
LOOK = {
    BEST_OF_N: ("n, best of n", "d = sqrt(KL of best-of-n in nats)", "log", "bootstrap interval over prompts (mean of members: range)",
                1, fit_bon, bon_curve, "R = d (a - b d)"),
    PPO: ("PPO steps", "d = sqrt(KL to the SFT policy in nats)", "linear", "+- 1 standard error over prompts",
          0, fit_rl, rl_curve, "R = d (a - b log d)"),
}  # fmt: skip
STYLE = {"axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
         "legend.fontsize": 9, "legend.frameon": False, "figure.labelsize": 8, "lines.markersize": 4}  # fmt: skip


def plot_run(run):
    """Draw a run folder: its metrics into curves.png, or its best-of-n results into bon.png. -> the path, or None without matplotlib."""
    if kind_of(run) == BEST_OF_N:
        return save(comparison_figure, [run], os.path.join(run, "bon.png"))
    return save(curves_figure, run, os.path.join(run, "curves.png"))


def save(draw, what, path):
    """draw(figure, what) into a file. -> its path, or None without matplotlib"""
    try:
        import matplotlib.figure
    except ImportError:
        return None
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(layout="constrained")
        draw(figure, what)
        figure.savefig(path, dpi=150)
    return path


def is_picture(path):
    """Whether a file is a picture that matplotlib drew: PNG, PDF and SVG begin so and name it."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as f:
        content = f.read()
    return content.startswith((b"\x89PNG", b"%PDF", b"<?xml")) and b"Matplotlib" in content


def kind_of(run):
    """The file that tells what kind of run a folder holds; an InputError where there is none."""
    for kind in (BEST_OF_N, PPO):
        if os.path.isfile(os.path.join(run, kind)):
            return kind
    raise InputError(f"{run}: no run here (no {PPO}, no {BEST_OF_N})")


def read_records(run):
    """The rows of a run's metrics.jsonl, whose evaluations must be numbers."""
    path = os.path.join(run, PPO)
    records = read_rows(path, {"step": int})
    for number, record in enumerate(records, 1):
        evaluations = [name for name in record if name.startswith("eval/")]
        check_fields(record, dict.fromkeys(evaluations, float | None), f"{path}:{number}")
    return records


def curves_figure(figure, run):
    """One panel a metric, against the step, of held-out metrics a line for each split; bands are +- 1 standard error."""
    records = read_records(run)
    logged = {key for record in records for key in record}
    splits = sorted({key.partition("/")[0] for key in logged if "/" in key} - {"eval", "score"})
    keys = {name: key for name in PANELS for key in (f"score_{name}", name, f"eval/{name}") if key in logged}  # the last one stays
    if not keys:
        raise InputError(f"{run}: nothing to draw in its {PPO}")
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure.set_size_inches(4 * columns, 2.6 * rows)
    for i, (name, key) in enumerate(keys.items()):
        axis = figure.add_subplot(rows, columns, i + 1)
        further = {label: f"{label}/{name}" for label in splits if key.startswith("eval/") and f"{label}/{name}" in logged}
        for label, k in {"first split": key, **further}.items():
            steps, values, errors = np.array([(r["step"], r[k], r.get(f"{k}_se", 0.0)) for r in records if k in r], dtype=float).T
            axis.plot(steps, values, marker="o" if len(steps) < 15 else None, label=label)
            axis.fill_between(steps, values - errors, values + errors, alpha=0.25)
        if further:
            axis.legend()
        axis.set_title(PANELS[name])
        axis.set_xlabel("step")


def read_config(run):
    """config.json, with a list of reward models (older runs name one), and of a best-of-n run their number."""
    path = os.path.join(run, "config.json")
    config = read_object(path, {"reward_model": str | list[str] | None}, finite=False)
    config.pop("inputs", None)  # fingerprints, no settings
    paths = [path] if isinstance(path := config.get("reward_model", ""), str) else path
    return {**config, "reward_model": paths} | ({"members": len(paths)} if kind_of(run) == BEST_OF_N else {})


def cells_of(configs):
    """What differs between configs, seeds and objectives aside: for each a title such as "kl_coef 0.0, reward_model noise0.25"."""
    same = []
    for config in configs:
        config = json.loads(re.sub(r"seed_\d+", "seed_*", json.dumps(config)))
        config["reward_model"] = " + ".join(sorted(set(config["reward_model"])))
        same.append({k: str(v) for k, v in config.items() if k not in ("seed", "objective", "uwo_lambda", *PLACES)})
    names = dict.fromkeys(name for config in same for name in config)
    short = {name: without_common_ends({str(config.get(name)) for config in same}) for name in names}
    return [", ".join(f"{name} {short[name][str(config.get(name))]}" for name in names if len(short[name]) > 1) for config in same]


def without_common_ends(texts):
    """{text: what stays of it without the parts, between / and _, that all texts begin or end with}; something stays of each."""
    parts = {text: re.split(r"([/_])", text) for text in texts}  # "a/b_c" -> a / b _ c
    for end in (0, -1):
        while len({part[end] for part in parts.values()}) == 1 and all(len(part) > 1 for part in parts.values()):
            for part in parts.values():
                del part[end]
    return {text: "".join(part).strip("/_") for text, part in parts.items()}


def objectives_of(configs):
    """PPO configs -> "single" for one reward model, or the objective, with lambda and members where the ensembles differ in them."""
    ensembles = [c for c in configs if len(c["reward_model"]) > 1]
    lambdas, sizes = {str(c["uwo_lambda"]) for c in ensembles if c.get("objective") == "uwo"}, {len(c["reward_model"]) for c in ensembles}
    labels = []
    for config in configs:
        label = config.get("objective", "mean") if config in ensembles else "single"
        label += f" {config['uwo_lambda']}" if label == "uwo" and len(lambdas) > 1 else ""
        labels.append(label + (f" of {len(config['reward_model'])}" if label != "single" and len(sizes) > 1 else ""))
    return labels


def arrange(runs):
    """Run folders of one kind -> {title of a row of panels: {label of a colour: [the curve of each run]}}."""
    runs = list(dict.fromkeys(os.path.realpath(run) for run in runs))  # one named twice is not two seeds
    configs, rows = [read_config(run) for run in runs], {}
    for run, cell, objective in zip(runs, cells_of(configs), objectives_of(configs), strict=True):
        for label, curve in curves_of(run, objective).items():
            rows.setdefault(cell, {}).setdefault(label, []).append(curve)
    if len({label for row in rows.values() for label in row}) > 1:
        return rows
    return {"": {cell or label: group for cell, row in rows.items() for label, group in row.items()}}


def curve_of(points):
    """Points {x, kl, proxy, proxy_se, maybe proxy_interval, gold, ...} -> arrays [L] x, kl, proxy, proxy_low, proxy_high, gold, ..."""
    curve = {name: np.array([p.get(name) for p in points], dtype=float) for name in ("x", "kl", "proxy", "gold")}  # None becomes nan
    for name in ("proxy", "gold"):
        error = np.array([p.get(f"{name}_se") or 0.0 for p in points])
        low, high = curve[name] - error, curve[name] + error
        if all(p.get(f"{name}_interval") for p in points):
            low, high = np.array([p[f"{name}_interval"] for p in points], dtype=float).T
        curve |= {f"{name}_low": low, f"{name}_high": high}
    return curve


def curves_of(run, objective):
    """{objective: curve} of a PPO run; of best-of-n {"single (mean of K members)": from the lowest to the highest, "mean": ..., ...}."""
    if kind_of(run) == PPO:
        records = [row for row in read_records(run) if "eval/proxy" in row]
        if not records:
            raise InputError(f"{run}: no PPO run here (no eval/proxy in its {PPO})")
        return {objective: curve_of([{"x": r["step"]} | {k[5:]: v for k, v in r.items() if k.startswith("eval/")} for r in records])}
    curves = {}
    path = os.path.join(run, BEST_OF_N)
    for name, points in read_object(path, finite=False).items():
        if not is_of_type(points, list[dict]) or not points:
            raise InputError(f"{path}: {name} is no list of points")
        for point in points:
            check_fields(point, POINT, f"{path}: {name}")
        curves[name] = curve_of([{"x": p["n"]} | {k.replace("_score", ""): v for k, v in p.items()} for p in points])
    members = [curves.pop(name) for name in list(curves) if objective_of(name) is None]
    if len(members) == 1:
        return {"single": members[0]} | curves
    members = over_runs(members)  # [K, L]
    single = {name: values.mean(0) for name, values in members.items()}
    for score in ("proxy", "gold"):
        single |= {f"{score}_low": members[score].min(0), f"{score}_high": members[score].max(0)}
    return {f"single (mean of {len(members['x'])} members)": single} | curves


def over_runs(curves):
    """Curves -> {"x": [S, L], "kl": [S, L], ...} at the x that all of them have."""
    shared = functools.reduce(np.intersect1d, [curve["x"] for curve in curves])
    return {name: np.stack([curve[name][np.isin(curve["x"], shared)] for curve in curves]) for name in curves[0]}


def comparison_figure(figure, runs):
    """Rows of two panels, against n or the step and against sqrt(KL): gold solid with a band, proxy dashed, the fit of gold dotted."""
    kind, *others = {kind_of(run) for run in runs}
    if others:
        raise InputError("best-of-n runs and PPO runs do not share a picture: compare each kind on its own")
    rows, (x_label, d_label, scale, band, *_, formula) = arrange(runs), LOOK[kind]
    colours, handles = colours_of([label for row in rows.values() for label in row]), {}
    figure.set_size_inches(9, 1 + (2.2 if len(rows) > 1 else 3.2) * len(rows))
    axes = figure.subplots(len(rows), 2, sharex="col", sharey=True, squeeze=False)
    for pair, title in zip(axes, rows, strict=True):
        for label in (label for label in colours if label in rows[title]):
            handles[label] = draw_group(pair, over_runs(rows[title][label]), colours[label], kind)
        pair[0].set_title(title, loc="left")
    axes[-1, 0].set(xlabel=x_label, xscale=scale)
    axes[-1, 1].set(xlabel=d_label)
    figure.supylabel("reward (proxy: in standard deviations)", fontsize=9)
    counts = {label: sorted({len(row[label]) for row in rows.values() if label in row}) for label in colours}
    text = [label + (f", {'-'.join(map(str, counts[label]))} runs" if counts[label] != [1] else "") for label in colours]
    width = sum(map(len, text)) + 8 * len(text)  # in letters: 130 fit
    columns = len(text) if width < 130 else max(1, 130 // (max(map(len, text)) + 8))
    figure.legend([handles[label] for label in colours], text, loc="outside upper center", ncols=columns)
    band = "+- 1 standard error over runs" if max(map(max, counts.values())) > 1 else band
    figure.supxlabel(f"gold solid, proxy dashed, fit of gold {formula} dotted; band: {band}")


def colours_of(labels):
    """Labels -> {label: colour}, in the order of the legend.

    "single" and the objectives have the same colours in all pictures. uwo has none of its own: its
    labels name its lambda, and there may be several.
    """
    names = {label: label.split(" (")[0] for label in labels}  # without "(mean of K members)"
    order = list(names.values())
    first = ["single", *(objective for objective in OBJECTIVES if objective != "uwo")]
    if set(first) & set(order):
        order = first + order
    order = list(dict.fromkeys(order))

    in_order = sorted(names, key=lambda label: order.index(names[label]))
    return {label: f"C{order.index(names[label]) % 10}" for label in in_order}


def draw_group(axes, s, colour, kind):
    """The mean of the curves [S, L] of runs that differ in seed, with a band -> its line for the legend."""
    mean = {name: values.mean(0) for name, values in s.items()}
    main = "gold" if np.isfinite(mean["gold"]).any() else "proxy"  # the one with the band
    low, high = mean[f"{main}_low"], mean[f"{main}_high"]
    if len(s["x"]) > 1:
        error = s[main].std(0, ddof=1) / len(s["x"]) ** 0.5
        low, high = mean[main] - error, mean[main] + error
    for axis, x, marker in ((axes[0], mean["x"], ""), (axes[1], np.sqrt(s["kl"].clip(0)).mean(0), "o")):
        axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        (proxy,) = axis.plot(x, mean["proxy"], "--", color=colour, linewidth=1)
        (gold,) = axis.plot(x, mean["gold"], "-", color=colour, linewidth=2, marker=marker)
    # Gao et al.'s curve through the gold of all runs, where it is known at the start and at two more KL.
    *_, start, fit, curve, _ = LOOK[kind]
    known = np.isfinite(s["gold"]).all(0)
    kl, golds = s["kl"][:, known].clip(0), s["gold"][:, known]
    if known[0] and s["x"][0, 0] == start and len(np.unique(kl[:, 1:][kl[:, 1:] > 1e-6])) > 1:
        kl[:, 0] = 0.0  # the policy that one starts from, whatever bfloat16 says
        a, b, *_ = fit(kl, golds)
        d = np.linspace(0, np.sqrt(kl).mean(0).max(), 200)
        axes[1].plot(d, golds[:, 0].mean() + curve(d**2, a, b).numpy(), ":", color="black", linewidth=1.2)
    return gold if main == "gold" else proxy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--compare", metavar="FILE.png", help="one picture of all these runs instead")
    args = parser.parse_args()
    try:
        for run in args.runs:
            kind_of(run)
        if args.compare:
            check_output(args.compare, is_picture, "a picture of matplotlib's")
        for picture in [save(comparison_figure, args.runs, args.compare)] if args.compare else map(plot_run, args.runs):
            print(picture or "matplotlib is not installed: pip install matplotlib")
    except (InputError, OSError) as e:
        parser.exit(2, f"plots.py: error: {e}\n")

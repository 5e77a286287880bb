"""Pictures of runs, with matplotlib where it is installed.

    python -m nanorlhf.plots RUN...                      RUN/curves.png for each
    python -m nanorlhf.plots --compare FILE.png RUN...   proxy and gold of PPO runs in one picture, runs that differ in seed together
"""

import argparse
import json
import os
import re

from .checkpoint import read_json
from .log import PLACES, read_lines

# What the curves of a run show, if its metrics have it: name -> the metric's label.
PANELS = {
    "proxy": "proxy reward, held out", "gold": "gold reward, held out", "kl": "KL to the SFT policy, held out (nats)",
    "perplexity": "perplexity, held out", "score_mean": "score of rollouts", "loss": "loss", "accuracy": "pair accuracy, training batch",
    "entropy": "entropy (nats a token)", "length": "response length (tokens)", "clip_fraction": "clip fraction",
    "explained_variance": "explained variance", "value_loss": "value loss", "grad_norm": "gradient norm",
}  # fmt: skip


def plot_run(run):
    """Draw metrics.jsonl of a run folder into curves.png; bands are +- 1 standard error. Returns the path, or None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in read_lines(os.path.join(run, "metrics.jsonl"))]
    keys = {name: next((k for k in (f"eval/{name}", name) if any(k in r for r in records)), None) for name in PANELS}
    keys = {name: key for name, key in keys.items() if key}
    columns = min(3, len(keys))
    figure, axes = plt.subplots(-(-len(keys) // columns), columns, figsize=(4 * columns, 2.6 * -(-len(keys) // columns)), squeeze=False)
    for axis in axes.flat[len(keys) :]:
        axis.remove()
    for axis, (name, key) in zip(axes.flat, keys.items()):
        points = [(r["step"], r[key], r.get(f"{key}_se", 0.0)) for r in records if key in r]
        steps, values, errors = zip(*points)
        axis.plot(steps, values, marker="o" if len(points) < 15 else None, markersize=3)
        axis.fill_between(steps, [v - e for v, e in zip(values, errors)], [v + e for v, e in zip(values, errors)], alpha=0.25)
        axis.set_title(PANELS[name], fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path = os.path.join(run, "curves.png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def groups_of(runs):
    """Runs that differ in nothing but their seeds -> [(label, [records of each run])], labelled by what differs between groups."""
    groups = {}
    for run in runs:
        config = {k: v for k, v in read_json(os.path.join(run, "config.json")).items() if k not in ("seed", *PLACES)}
        config["reward_model"] = re.sub(r"seed_\d+", "seed_*", str(config.get("reward_model")))
        records = [json.loads(line) for line in read_lines(os.path.join(run, "metrics.jsonl"))]
        groups.setdefault(json.dumps(config, sort_keys=True), []).append(records)
    configs = [json.loads(key) for key in groups]
    differing = [k for k in configs[0] if any(c.get(k) != configs[0][k] for c in configs)]
    labels = [", ".join(f"{k} {c.get(k)}" for k in differing) or "all runs" for c in configs]
    return [(f"{label} ({len(group)} runs)", group) for label, group in zip(labels, groups.values())]


def plot_comparison(runs, path):
    """Proxy and gold of PPO runs against step and against sqrt(KL); thin lines are runs, thick ones means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for (label, group), colour in zip(groups_of(runs), colours):
        curves = [[r for r in records if "eval/gold" in r] for records in group]
        for name, style in (("proxy", "--"), ("gold", "-")):
            for axis, x in ((axes[0], lambda r: r["step"]), (axes[1], lambda r: max(r["eval/kl"], 0.0) ** 0.5)):
                points = [[(x(r), r[f"eval/{name}"]) for r in curve] for curve in curves]
                for curve in points:
                    axis.plot(*zip(*curve), style, color=colour, linewidth=0.6, alpha=0.5)
                mean = [[sum(values) / len(values) for values in zip(*at)] for at in zip(*points)]  # of x and y, evaluation by evaluation
                axis.plot(*zip(*mean), style, color=colour, linewidth=2, label=f"{name}, {label}")
    axes[0].set_xlabel("PPO steps")
    axes[1].set_xlabel("sqrt(KL to the SFT policy in nats)")
    axes[0].set_ylabel("reward of held-out prompts (proxy: in std)")
    axes[0].legend(fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--compare", metavar="FILE.png", help="one picture of proxy and gold of all these PPO runs instead")
    args = parser.parse_args()
    for run in args.runs:
        if not os.path.isfile(os.path.join(run, "metrics.jsonl")):
            parser.exit(2, f"plots.py: error: {run}: no run here (no metrics.jsonl)\n")
    for picture in [plot_comparison(args.runs, args.compare)] if args.compare else map(plot_run, args.runs):
        print(picture or "matplotlib is not installed: pip install matplotlib")

"""Pictures of a run, with matplotlib where it is installed: `python -m nanorlhf.plots RUN...` draws RUN/curves.png."""

import json
import os
import sys

from .log import read_lines

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


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(plot_run(folder) or "matplotlib is not installed: pip install matplotlib")

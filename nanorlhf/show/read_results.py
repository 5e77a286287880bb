"""What a page shows of results: best-of-n, features of autoencoders, and tables of probe.py.

best-of-n   {run, ns, proxies, scores, items: [{prompt, answers, picks: {proxy: [one an n]}}]}
features    {run, name, place, items: [features as probe.py describes them]}
table       {title, metrics: [{name, reference, rows: [[label, value, low, high]]}]}

N answers to a prompt, K members, L values of n
"""

import math

import torch

from ..chats import show
from ..ensemble import combine_all
from ..runtime import plots
from ..runtime.files import is_of_type, read_object, read_rows
from .read_runs import Run, shorten, without_empty_lines

POOL_ROW = {"responses": list[str], "scores": dict, "gold_scores": list[float] | None}
# Of a command's many features so many are in its table.
MOST_ROWS = 40


# --------------------------------------------------------------------------------------- best-of-n


def read_best_of_n(run: Run) -> tuple[list[dict], list[dict]]:
    """A best-of-n run -> its panels, and its block of prompts with the answers that are chosen."""
    if not run.has(plots.BEST_OF_N):
        return [], []
    results = read_object(run.path(plots.BEST_OF_N), finite=False)
    for name, points in results.items():
        plots.read_bon_curve(points, name, run.path(plots.BEST_OF_N))  # or an error
    panels = without_empty_lines(draw_best_of_n(run, results))
    if not run.has("pool.jsonl"):
        return panels, []

    rows = read_rows(run.path("pool.jsonl"), POOL_ROW)
    first_curve = next(iter(results.values()))
    ns = [point["n"] for point in first_curve]
    members = list(rows[0]["scores"])
    has_gold = "gold_scores" in rows[0]
    items = []
    for row in rows:
        proxies = find_proxies(run, row)
        items.append(choose_answers(row, proxies, ns, has_gold))
    block = {
        "run": run.name,
        "ns": ns,
        "proxies": list(proxies),
        "scores": [*members, "gold"] if has_gold else members,
        "items": items,
    }
    return panels, [block]


def draw_best_of_n(run: Run, results: dict) -> list[dict]:
    """Gold and proxy against n: together for a single reward, else one panel for each of them."""
    lines = []
    for name, points in results.items():
        for what in ("gold", "proxy"):
            line = []
            for point in points:
                value = point.get(f"{what}_score")
                if value is not None:
                    low, high = point.get(f"{what}_interval") or (None, None)
                    line.append([point["n"], value, low, high])
            lines.append({"series": name, "what": what, "points": line})

    parts = {"gold and proxy": lines}
    if len(results) > 1:
        parts = {}
        for what in ("gold", "proxy"):
            parts[what] = [line for line in lines if line["what"] == what]
    panels = []
    for what, own in parts.items():
        title = f"{what} of the best of n, {run.name}"
        panels.append({"title": title, "x": "n", "log": True, "lines": own})
    return panels


def find_proxies(run: Run, row: dict) -> dict[str, torch.Tensor]:
    """A row of a pool -> the scores [N] of its answers by each member and each objective."""
    proxies = {}
    for name, scores in row["scores"].items():
        proxies[name] = torch.tensor(scores, dtype=torch.float64)
    if len(proxies) > 1:
        members = torch.stack(list(proxies.values()))  # [K, N]
        proxies |= combine_all(members, run.config.get("uwo_lambda") or [0.5])
    return proxies


def choose_answers(
    row: dict, proxies: dict[str, torch.Tensor], ns: list[int], has_gold: bool
) -> dict:
    """A row of the pool and its scores {proxy: [N]} -> its item: the answers that any proxy takes.

    A proxy takes the best of the first n answers. The page needs no others.
    """
    places = {}  # {proxy: [L]}: which answer it takes, for each n
    for name, scores in proxies.items():
        places[name] = [scores[:n].argmax().item() for n in ns]
    chosen = sorted({place for own in places.values() for place in own})

    answers = []
    for place in chosen:
        scores = [own[place] for own in row["scores"].values()]
        if has_gold:
            scores.append(row["gold_scores"][place])
        answer = {"text": shorten(row["responses"][place]), "place": place, "scores": scores}
        answers.append(answer)

    picks = {}
    for name, own in places.items():
        picks[name] = [chosen.index(place) for place in own]
    # What each proxy says of the answer that it takes.
    proxy_scores = {}
    for name, own in places.items():
        proxy_scores[name] = [proxies[name][place].item() for place in own]
    return {
        "prompt": shorten(show(row["prompt"])),
        "answers": answers,
        "picks": picks,
        "proxy_scores": proxy_scores,
    }


# ---------------------------------------------------------------------------------------- features


def read_features(run: Run) -> list[dict]:
    """The described features of each autoencoder, from summary.json of probe.py features.

    The features of a reward model (probe.py reward_features) are shown in the same way.
    """
    summary = run.summary or {}
    blocks = []
    for name, result in (summary.get("saes") or {}).items():
        place = f"{result.get('model')}, layer {result.get('layer')}, {result.get('site')}"
        blocks.append({"run": run.name, "name": name, "place": place, "items": result["features"]})
    if "reward_model" in summary and "features" in summary:
        described = [row for row in summary["features"] if row.get("contexts")]
        name = summary["reward_model"]
        if described:
            blocks.append({"run": run.name, "name": name, "place": name, "items": described})
    return blocks


def draw_densities(run: Run) -> list[dict]:
    """How many features of each autoencoder fire how often, from summary.json of train_sae.py."""
    lines = []
    for name, result in (run.summary or {}).items():
        density = result.get("density") if isinstance(result, dict) else None
        if not density:
            continue
        edges = density["log10_edges"]
        counts = density.get("features") or density.get("latents")
        points = []
        for low, high, count in zip(edges, edges[1:], counts):
            points.append([(low + high) / 2, count, None, None])
        lines.append({"series": name, "what": run.name, "points": points})
    if not lines:
        return []
    title = "How many features fire how often"
    return [{"title": title, "x": "log10 of the share of tokens", "lines": lines}]


# ------------------------------------------------------------------------------------------ tables


def read_tables(run: Run) -> list[dict]:
    """The tables of a run: the numbers of its summary.json with their intervals."""
    summary = run.summary or {}
    command = run.config.get("command", "")
    readers = {
        "Reward": read_probe,
        "Pairs": read_probe,
        "Evaluate": read_benchmark,
        "Judge": read_judges,
        "Divergence": read_divergence,
        "Mmcs": read_mmcs,
        "RewardFeatures": read_reward_features,
    }
    if command in readers:
        metrics = readers[command](summary)
    elif "arms" in summary:
        metrics = collect_intervals(summary["arms"])
        # Of each number in `differences` its rows are pairs of arms.
        for name, rows in (summary.get("differences") or {}).items():
            own = [[label, row["mean"], row["low"], row["high"]] for label, row in rows.items()]
            metrics.append({"name": f"{name}, difference", "reference": 0, "rows": own})
    else:
        metrics = read_numbers(run, summary)
    metrics = [metric for metric in metrics if metric["rows"]]
    if not metrics:
        return []
    return [{"title": f"{run.kind}: {run.name}", "metrics": metrics}]


def read_probe(summary: dict) -> list[dict]:
    """probe.py reward and pairs: each metric with its t interval over splits."""
    metrics = []
    for name in [*summary["metrics"], "policy_less"]:
        rows = []
        for label, row in summary["rows"].items():
            mean, half_width = row[name]
            if mean is not None and half_width is not None:
                rows.append([label, mean, mean - half_width, mean + half_width])
        metrics.append({"name": TITLES.get(name, name), "reference": 0, "rows": rows})
    return metrics


TITLES = {
    "tau": "Kendall's tau",
    "r2": "R²",
    "sign": "the sign is right",
    "policy_less": "the policy's first metric less this one's",
}


def read_benchmark(summary: dict) -> list[dict]:
    """probe.py evaluate: each metric of each reward, and its difference from the first reward."""
    metrics = []
    for part, ending in (("rewards", ""), ("differences", ", less the first reward's")):
        for name in summary["metrics"]:
            rows = [[label, *row[name]] for label, row in summary[part].items()]
            reference = 0 if part == "differences" or name == "margin" else 0.5
            metrics.append({"name": name + ending, "reference": reference, "rows": rows})
    return metrics


def read_judges(summary: dict) -> list[dict]:
    """probe.py judge: win rates of A over B, gaps between splits, differences of scores."""
    rates = []
    gaps = []
    differences = []
    for judge, found in summary["judges"].items():
        for split, row in found["splits"].items():
            label = judge if split == "all" else f"{judge}, {split}"
            if "win_rate" in row:
                rates.append([label, row["win_rate"], *row["interval"]])
            if "difference" in row:
                differences.append([label, row["difference"], *row["difference_interval"]])
        for split, row in found["gap"].items():
            gaps.append([f"{judge}, first split less {split}", row["gap"], *row["interval"]])
    return [
        {"name": "how often A is better than B", "reference": 0.5, "rows": rates},
        {"name": "gap between splits", "reference": 0, "rows": gaps},
        {"name": "score of A less score of B", "reference": 0, "rows": differences},
    ]


def read_divergence(summary: dict) -> list[dict]:
    """probe.py divergence: how far each block has moved."""
    columns = {}  # {metric: rows}
    for row in summary["layers"]:
        label = f"layer {row['layer']}"
        for name in ("frobenius", "relative"):
            columns.setdefault(f"weights, {name}", []).append([label, row[name], None, None])
        for site, moved in row["activations"].items():
            for name, value in moved.items():
                columns.setdefault(f"{site}, {name}", []).append([label, value, None, None])
    return [{"name": name, "reference": 0, "rows": rows} for name, rows in columns.items()]


def read_mmcs(summary: dict) -> list[dict]:
    """probe.py mmcs: each pair of autoencoders, and what chance gives."""
    rows = []
    for pair in summary["pairs"]:
        label = f"{pair['a']} and {pair['b']}"
        rows.append([label, pair["mmcs"], None, None])
        rows.append([f"{label}, by chance", pair["chance"], None, None])
    return [{"name": "MMCS", "reference": 0, "rows": rows}]


def read_reward_features(summary: dict) -> list[dict]:
    """probe.py reward_features: its first features, on pairs and on the policy's answers."""
    metrics = []
    for part in ("pairs", "policy"):
        for name in ("differential", "contribution"):
            rows = []
            for feature in summary["features"][:MOST_ROWS]:
                numbers = (feature.get(part) or {}).get(name)
                if numbers:
                    label = f"feature {feature['id']}"
                    rows.append([label, numbers["mean"], numbers["low"], numbers["high"]])
            metrics.append({"name": f"{part}, {name}", "reference": 0, "rows": rows})
    return metrics


def collect_intervals(arms: dict[str, dict]) -> list[dict]:
    """Arms with numbers {mean, low, high}, some a level deeper -> a metric for each number."""
    columns = {}  # {metric: rows}

    def collect(arm, prefix, numbers):
        for name, value in numbers.items():
            if not isinstance(value, dict):
                continue
            if {"mean", "low", "high"} <= value.keys():
                row = [arm, value["mean"], value["low"], value["high"]]
                columns.setdefault(prefix + name, []).append(row)
            else:
                collect(arm, f"{prefix}{name}, ", value)

    for arm, numbers in arms.items():
        collect(arm, "", numbers)
    return [{"name": name, "reference": 0, "rows": rows} for name, rows in columns.items()]


def read_numbers(run: Run, summary: dict) -> list[dict]:
    """Numbers with standard errors: of the first and the last evaluation, or of a summary."""
    evaluations = [record for record in run.records if "eval/proxy" in record]
    states = {"at the end": summary}
    if evaluations:
        states = {"first evaluation": evaluations[0], "last evaluation": evaluations[-1]}
    columns = {}  # {metric: rows}
    for label, numbers in states.items():
        for name, value in numbers.items():
            error = numbers.get(f"{name}_se")
            if is_number(value) and is_number(error):
                row = [label, value, value - error, value + error]
                columns.setdefault(name.removeprefix("eval/"), []).append(row)
    return [{"name": name, "reference": 0, "rows": rows} for name, rows in columns.items()]


def is_number(value) -> bool:
    return is_of_type(value, float) and math.isfinite(value)

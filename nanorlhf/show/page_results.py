"""What a page shows of results: best-of-n, features of autoencoders, and tables of probe.py.

best-of-n   {run, ns, proxies, scores, items: [{prompt, answers, picks: {proxy: [one an n]}}]}
features    {run, name, place, items: [features as probe.py describes them]}
table       {title, metrics: [{name, reference, rows: [[label, value, low, high]]}]}

N answers to a prompt, K members, L values of n
"""

import torch

from ..chats import show
from ..ensemble import combine_all
from ..runtime.curves import BEST_OF_N, read_bon_curve
from ..runtime.files import is_number, read_object, read_rows
from .page_curves import STANDARD_ERROR, Run, finish_panels, shorten

POOL_ROW = {"responses": list[str], "scores": dict, "gold_scores": list[float] | None}
# Of a command's many features so many are in its table.
MOST_ROWS = 40
INTERVAL = "95% intervals"  # what low and high are, in words
NO_INTERVAL = (None, None)  # low and high of a number that has none


# --------------------------------------------------------------------------------------- best-of-n


def read_best_of_n(run: Run) -> tuple[list[dict], list[dict]]:
    """A best-of-n run -> its panels, and its block of prompts with the answers that are chosen."""
    if not run.has(BEST_OF_N):
        return [], []
    # The curves come first: they are there without the pool too.
    results = read_object(run.path(BEST_OF_N), finite=False)
    for name, points in results.items():
        read_bon_curve(points, name, run.path(BEST_OF_N))  # or an error
    panels = finish_panels(draw_best_of_n(run, results), INTERVAL)
    if not results or not run.has("pool.jsonl"):
        return panels, []

    # Below the curves the page has a slider for n, and shows which of n answers each proxy takes.
    rows = read_rows(run.path("pool.jsonl"), POOL_ROW)
    first_curve = next(iter(results.values()))
    ns = [point["n"] for point in first_curve]
    block = {"run": run.name, "ns": ns, "proxies": [], "scores": [], "items": []}
    for row in rows:
        proxies = find_proxies(run, row)
        block["items"].append(choose_answers(row, proxies, ns))
        # All rows have the same rewards.
        block["proxies"] = list(proxies)
        block["scores"] = list(scores_of_pool(row))
    return panels, [block]


def draw_best_of_n(run: Run, results: dict) -> list[dict]:
    """Gold and proxy against n: together for a single reward, else one panel for each of them."""
    # A single reward has gold and proxy in one panel, so that one sees them part. Several rewards
    # have two panels: their lines would cover each other, and each proxy has a unit of its own.
    by_what = {}  # {gold or proxy: lines}
    for what in ("gold", "proxy"):
        by_what[what] = []
        for name, points in results.items():
            by_what[what].append({"series": name, "what": what, "points": draw_n(points, what)})
    if len(results) == 1:
        by_what = {"gold and proxy": by_what["gold"] + by_what["proxy"]}

    panels = []
    for what, lines in by_what.items():
        title = f"{what} of the best of n, {run.name}"
        panels.append({"title": title, "x": "n", "log": True, "lines": lines})
    return panels


def draw_n(points: list[dict], what: str) -> list[list]:
    """Points of bon_results.json -> [[n, score, low, high]], of gold or of the proxy."""
    drawn = []
    for point in points:
        score = point.get(f"{what}_score")
        if is_number(score):
            low, high = point.get(f"{what}_interval") or NO_INTERVAL
            drawn.append([point["n"], score, low, high])
    return drawn


def scores_of_pool(row: dict) -> dict[str, list[float]]:
    """A row of a pool -> {name: the scores [N] of its answers}, gold last."""
    scores = dict(row["scores"])
    if row.get("gold_scores") is not None:
        scores["gold"] = row["gold_scores"]
    return scores


def find_proxies(run: Run, row: dict) -> dict[str, torch.Tensor]:
    """A row of a pool -> the scores [N] of its answers by each member and each objective."""
    # float64, in which sample_bon.py chooses too: rounded to float32, two answers might tie.
    proxies = {}
    for name, scores in row["scores"].items():
        proxies[name] = torch.tensor(scores, dtype=torch.float64)
    if len(proxies) > 1:
        members = torch.stack(list(proxies.values()))  # [K, N]
        proxies |= combine_all(members, run.config.get("uwo_lambda") or [0.5])
    return proxies


def choose_answers(row: dict, proxies: dict[str, torch.Tensor], ns: list[int]) -> dict:
    """A row of the pool and its scores {proxy: [N]} -> its item: the answers that any proxy takes.

    A proxy takes the best of the first n answers. The page needs no others.
    """
    places = []  # of the answers that are taken
    answers = []
    picks = {}  # {proxy: [L]}: where in `answers` it finds the one that it takes, for each n
    proxy_scores = {}  # {proxy: [L]}: what it says of that answer
    for name, scores in proxies.items():
        picks[name] = []
        proxy_scores[name] = []
        for n in ns:
            # Where a prompt has fewer than n answers, the best of all of them is taken.
            place = scores[:n].argmax().item()
            # Most proxies take the same few answers: each is kept once.
            if place not in places:
                places.append(place)
                answers.append(describe_choice(row, place))
            picks[name].append(places.index(place))
            proxy_scores[name].append(scores[place].item())
    prompt = shorten(show(row["prompt"]))
    return {"prompt": prompt, "answers": answers, "picks": picks, "proxy_scores": proxy_scores}


def describe_choice(row: dict, place: int) -> dict:
    """One answer of a row of the pool: {text, place, scores}."""
    scores = [numbers[place] for numbers in scores_of_pool(row).values()]
    return {"text": shorten(row["responses"][place]), "place": place, "scores": scores}


# ---------------------------------------------------------------------------------------- features


def read_features(run: Run) -> list[dict]:
    """The described features of each autoencoder, from summary.json of probe.py features.

    The features of a reward model (probe.py reward_features) are shown in the same way.
    """
    # {"saes": {folder: {"model", "layer", "site", "features": [...]}}}
    summary = run.summary or {}
    blocks = []
    for name, result in (summary.get("saes") or {}).items():
        place = f"{result.get('model')}, layer {result.get('layer')}, {result.get('site')}"
        blocks.append({"run": run.name, "name": name, "place": place, "items": result["features"]})
    # Of a reward model's features, many hundreds, only some have been described.
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
        # Summaries of other scripts have entries without a density.
        if not isinstance(result, dict) or not result.get("density"):
            continue
        density = result["density"]
        edges = density["log10_edges"]
        # A point stands in the middle between two edges.
        points = []
        for low, high, count in zip(edges, edges[1:], density["features"]):
            points.append([(low + high) / 2, count, None, None])
        lines.append({"series": name, "what": run.name, "points": points})
    if not lines:
        return []
    title = "How many features fire how often"
    return [{"title": title, "x": "log10 of the share of tokens", "lines": lines}]


# ------------------------------------------------------------------------------------------ tables


class Metrics(dict):
    """The metrics of a table by name: {name: {name, reference, rows}}."""

    def add(self, name: str, label: str, value, low=None, high=None, reference: float = 0):
        """One row of a metric, with the ends of its interval. reference: a line in its picture."""
        if name not in self:
            self[name] = {"name": name, "reference": reference, "rows": []}
        self[name]["rows"].append([label, value, low, high])

    def add_interval(self, name: str, label: str, numbers: dict):
        """The same for numbers {mean, low, high}."""
        self.add(name, label, numbers["mean"], numbers["low"], numbers["high"])

    def has_intervals(self) -> bool:
        for metric in self.values():
            for _label, _value, low, _high in metric["rows"]:
                if low is not None:
                    return True
        return False


def read_tables(run: Run) -> list[dict]:
    """The table of a run: the numbers of its summary.json with their intervals."""
    # Each command's summary has a form of its own. In runs of all other kinds read_numbers() looks
    # for numbers with standard errors.
    readers = {
        "probe.py reward": read_probe,
        "probe.py pairs": read_probe,
        "probe.py evaluate": read_benchmark,
        "probe.py judge": read_judges,
        "probe.py divergence": read_divergence,
        "probe.py mmcs": read_mmcs,
        "probe.py reward_features": read_reward_features,
        "probe.py ablate": read_arms,
        "probe.py causal": read_arms,
        "autoencoders": read_autoencoders,
    }
    metrics = Metrics()
    if run.kind not in readers:
        read_numbers(run, metrics)
        interval = STANDARD_ERROR
    elif run.summary is not None:
        readers[run.kind](run.summary, metrics)
        interval = INTERVAL
    if not metrics:
        return []
    title = f"{run.kind}: {run.name}"
    if metrics.has_intervals():
        title += f" ({interval})"
    return [{"title": title, "metrics": list(metrics.values())}]


TITLES = {
    "tau": "Kendall's tau",
    "r2": "R²",
    "sign": "the sign is right",
    "policy_less": "the policy's first metric less this one's",
}


def read_autoencoders(summary: dict, metrics: Metrics):
    """train_sae.py: how good each autoencoder is on held-out texts."""
    for label, numbers in summary.items():
        for name in ("fvu", "l0", "dead", "loss_recovered"):
            if is_number(numbers.get(name)):
                metrics.add(name.replace("_", " "), label, numbers[name])


def read_probe(summary: dict, metrics: Metrics):
    """probe.py reward and pairs: each metric with its t interval over splits."""
    # A row has [mean, half-width] for each metric. A single split has no half-width: null.
    for name in [*summary["metrics"], "policy_less"]:
        for label, row in summary["rows"].items():
            mean, half_width = row[name]
            if mean is not None and half_width is not None:
                title = TITLES.get(name, name)
                metrics.add(title, label, mean, mean - half_width, mean + half_width)


def read_benchmark(summary: dict, metrics: Metrics):
    """probe.py evaluate: each metric of each reward, and its difference from the first reward."""
    # The line in the picture is chance: right on half of the pairs, with a margin of 0. In
    # RewardBench 2 chance differs by subset (one of four answers, or of as many as there are).
    for name in summary["metrics"]:
        reference = 0.5
        if name == "margin" or summary["benchmark"] == "rewardbench2":
            reference = 0
        for label, row in summary["rewards"].items():
            metrics.add(name, label, *row[name], reference=reference)
    for name in summary["metrics"]:
        for label, row in summary["differences"].items():
            metrics.add(f"{name}, less the first reward's", label, *row[name])


def read_judges(summary: dict, metrics: Metrics):
    """probe.py judge: win rates of A over B, gaps between splits, differences of scores."""
    for judge, found in summary["judges"].items():
        for split, row in found["splits"].items():
            label = judge if split == "all" else f"{judge}, {split}"
            if "win_rate" in row:
                win_rate = "how often A is better than B"
                metrics.add(win_rate, label, row["win_rate"], *row["interval"], reference=0.5)
            if "difference" in row:
                difference = "score of A less score of B"
                metrics.add(difference, label, row["difference"], *row["difference_interval"])
        for split, row in found["gap"].items():
            label = f"{judge}, first split less {split}"
            metrics.add("gap between splits", label, row["gap"], *row["interval"])


def read_divergence(summary: dict, metrics: Metrics):
    """probe.py divergence: how far each block has moved."""
    for row in summary["layers"]:
        label = f"layer {row['layer']}"
        for name in ("frobenius", "relative"):
            metrics.add(f"weights, {name}", label, row[name])
        for site, moved in row["activations"].items():
            for name, value in moved.items():
                metrics.add(f"{site}, {name}", label, value)


def read_mmcs(summary: dict, metrics: Metrics):
    """probe.py mmcs: each pair of autoencoders, and what chance gives."""
    for pair in summary["pairs"]:
        label = f"{pair['a']} and {pair['b']}"
        metrics.add("MMCS", label, pair["mmcs"])
        metrics.add("MMCS", f"{label}, by chance", pair["chance"])


def read_reward_features(summary: dict, metrics: Metrics):
    """probe.py reward_features: its first features, on pairs and on the policy's answers."""
    # The features are sorted already, largest first. A run that was given only pairs, or only a
    # policy's answers, has only that part.
    for feature in summary["features"][:MOST_ROWS]:
        for part in ("pairs", "policy"):
            for name in ("differential", "contribution"):
                numbers = (feature.get(part) or {}).get(name)
                if numbers:
                    label = f"feature {feature['id']}"
                    metrics.add_interval(f"{part}, {name}", label, numbers)


def read_arms(summary: dict, metrics: Metrics):
    """probe.py ablate and causal: all intervals of each arm, and differences between arms."""
    for arm, numbers in summary["arms"].items():
        add_intervals(arm, numbers, "", metrics)
    for name, rows in (summary.get("differences") or {}).items():
        for label, numbers in rows.items():
            metrics.add_interval(f"{name}, difference", label, numbers)


def add_intervals(arm: str, numbers: dict, prefix: str, metrics: Metrics):
    """Each {mean, low, high} in the numbers of an arm, some of which lie a level deeper."""
    for name, value in numbers.items():
        if not isinstance(value, dict):
            continue
        if {"mean", "low", "high"} <= value.keys():
            metrics.add_interval(prefix + name, arm, value)
        else:
            add_intervals(arm, value, f"{prefix}{name}, ", metrics)


def read_numbers(run: Run, metrics: Metrics):
    """Numbers with standard errors: of the first and the last evaluation, or of a summary."""
    # The first and the last evaluation show what training has changed. A run without two of them
    # has the numbers of its end alone.
    evaluations = []
    for record in run.records:
        if any(name.startswith("eval/") for name in record):
            evaluations.append(record)
    states = {"at the end": run.summary or {}}
    if len(evaluations) > 1:
        states = {"first evaluation": evaluations[0], "last evaluation": evaluations[-1]}
    for label, numbers in states.items():
        for name, value in numbers.items():
            error = numbers.get(f"{name}_se")
            if is_number(value) and is_number(error):
                title = name.removeprefix("eval/")
                metrics.add(title, label, value, value - error, value + error)

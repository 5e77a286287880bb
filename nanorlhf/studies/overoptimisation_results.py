"""What the runs of the study of overoptimisation have found: read from their folders, compared,
shown.

A run here is {column: a list with an entry for each evaluation}; of best-of-n, for each n. A table
is {row: {column: [one number a seed]}}. What a seed has no number for is left out.
"""

import os
from itertools import combinations
from statistics import fmean

import numpy as np

from ..bon import bon_kl, fit_bon, fit_rl
from ..runtime.files import read_object, read_rows
from ..stats import kendall_tau
from .common import collect
from .known_states import measure_distances
from .tables import shorten, subtract

SINGLE = "single"  # one reward model

EVALUATED = ("gold", "proxy", "kl", "length", "distinct_2", "eos_rate", "variance")
N_OVERRATED = 2  # so many answers that all members overrate are kept of each run


# -------------------------------------------------------------------------------------- reading


def read_ppo(folder: str, pool: str) -> dict:
    """What a PPO run has found on held-out prompts, and what its reward models are like.

    -> {"step": [...], "gold": [...], ..., "entropy": [...], "distance": [...]} with an entry for
    each evaluation: None where there is none, such as a variance of one member. Further
    "correlation": [start, end], between members, "spread": [x], the standard deviation of the proxy
    on SFT's answers, "accuracy": [x] and "tau": [x] of its reward models on held-out pairs,
    "overrated": [texts], "seconds": [x]. pool: SFT's answers, which distances are measured from; ""
    for none.
    """
    run = {name: [] for name in ("step", *EVALUATED, "entropy")}
    seconds = 0.0
    for row in read_rows(f"{folder}/metrics.jsonl", {"step": int}):
        for name, value in row.items():
            if name.startswith("seconds"):
                seconds += value
        if "eval/proxy" not in row:
            continue
        run["step"].append(row["step"])
        for name in EVALUATED:
            run[name].append(shorten(row.get(f"eval/{name}")))
        # The entropy is that of the answers that the step learned from.
        run["entropy"].append(shorten(row.get("entropy")))
    run["distance"] = [None] * len(run["step"])
    if pool:
        run["distance"] = [shorten(x) for x in measure_distances(folder, pool)]

    first = read_answers(folder, run["step"][0])
    last = read_answers(folder, run["step"][-1])
    run["correlation"] = [shorten(correlation(first)), shorten(correlation(last))]
    run["overrated"] = overrated(last)
    run["spread"] = [shorten(float(scores_of(first).mean(0).std(ddof=1)))]
    run |= describe_reward_models(folder)
    return run | {"seconds": [shorten(seconds)]}


def read_answers(folder: str, step: int) -> list[dict]:
    """The answers of an evaluation, with the score that each member gives them."""
    return read_rows(f"{folder}/eval/step_{step}.jsonl", {"response": str, "scores": dict})


def scores_of(answers: list[dict]) -> np.ndarray:
    """The members' scores of answers: [K, N]."""
    return np.array([list(row["scores"].values()) for row in answers]).T


def correlation(answers: list[dict]) -> float | None:
    """The mean, over pairs of members, of the correlation of their scores; None for one member.

    None also where a member gives all answers the same score.
    """
    scores = scores_of(answers)
    if len(scores) < 2 or not scores.std(1).all():
        return None
    coefficients = np.corrcoef(scores)  # [K, K]
    pairs = combinations(range(len(scores)), 2)
    return fmean(float(coefficients[i, j]) for i, j in pairs)


def overrated(answers: list[dict]) -> list[str]:
    """The answers whose lowest score by a member is furthest above their gold, each text once.

    Gold and scores have different units, so each is ranked among the answers first.
    """
    if answers[0].get("gold") is None:
        return []
    lowest = scores_of(answers).min(0)  # [N]
    gold = np.array([row["gold"] for row in answers])
    excess = ranks(lowest) - ranks(gold)
    texts = {}  # a set that keeps the order
    for i in np.argsort(-excess, kind="stable"):
        texts[answers[i]["response"]] = None
    return list(texts)[:N_OVERRATED]


def ranks(numbers: np.ndarray) -> np.ndarray:
    """The rank of each of N numbers, 0 for the smallest."""
    return np.argsort(np.argsort(numbers, kind="stable"), kind="stable")


def describe_reward_models(folder: str) -> dict[str, list[float | None]]:
    """Mean accuracy, and Kendall's tau with gold, of a run's reward models on held-out pairs."""
    paths = read_object(f"{folder}/config.json", {"reward_model": list})["reward_model"]
    described = {}
    for column, name in (("accuracy", "eval/accuracy"), ("tau", "eval/gold_kendall_tau")):
        numbers = []
        for path in paths:
            summary = f"{path}/summary.json"
            if os.path.isfile(summary):
                numbers.append(read_object(summary, {}, finite=False).get(name))
        known = [number for number in numbers if number is not None]
        described[column] = [shorten(fmean(known))] if known else [None]
    return described


def read_bon(folder: str) -> dict:
    """The curves of best-of-n: {"n": [...], "kl": [...], NAME: {"proxy": [...], "gold": [...]}}.

    NAME is an objective, such as wco or uwo_0.5, or "single": the mean over the members' curves.
    """
    results = read_object(f"{folder}/bon_results.json")
    members = {}
    curves = {}
    for name, points in results.items():
        if name.startswith("seed_") or len(results) == 1:
            members[name] = points
        else:
            curves[name] = [points]
    curves = {SINGLE: list(members.values())} | curves

    (first, *_) = members.values()
    run = {"n": [point["n"] for point in first]}
    run["kl"] = [shorten(bon_kl(n)) for n in run["n"]]
    for name, own in curves.items():
        run[name] = {}
        for score in ("proxy", "gold"):
            run[name][score] = mean_curve(own, f"{score}_score")
    return run


def mean_curve(curves: list[list[dict]], column: str) -> list[float | None]:
    """The mean of a column over several curves, point by point; None where it is not measured."""
    means = []
    for points in zip(*curves, strict=True):
        numbers = [point[column] for point in points]
        means.append(None if None in numbers else shorten(fmean(numbers)))
    return means


def curves_of_bon(pools: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """{ensemble: what read_bon() has found, for each seed} -> {label: the run of each seed}.

    The first ensemble's labels are those of its curves, such as wco; another's have its name in
    front. An averaged reward model has one curve, and its name is that of the ensemble.
    """
    runs = {}
    for i, (ensemble, own) in enumerate(pools.items()):
        names = [name for name in own[0] if name not in ("n", "kl")]
        for name in names:
            label = name
            if len(names) == 1:
                label = ensemble
            elif i > 0:
                label = f"{ensemble}_{name}"
            runs[label] = []
            for pool in own:
                runs[label].append({"n": pool["n"], "kl": pool["kl"], **pool[name]})
    return runs


# ------------------------------------------------------------------------------------- comparing


def compare_curves(runs: dict[str, list[dict]], measure: str) -> dict:
    """The table of what came of each method. runs: {label: the run of each seed}

    measure: gold, or proxy. The differences at the end are taken seed by seed: from one reward
    model, and of members with a start of their own from members that share it.
    """
    table = {}
    for label, own in runs.items():
        table[label] = collect(describe_curve(run, measure) for run in own)
    for label, row in table.items():
        if label != SINGLE and SINGLE in table:
            row["less single's"] = subtract(row["end"], table[SINGLE]["end"])
        shared = label.removeprefix("pretrain_")
        if shared != label and shared in table:
            row["less shared start's"] = subtract(row["end"], table[shared]["end"])
    return table


def describe_curve(run: dict, measure: str) -> dict[str, float]:
    """Where a run starts, peaks and ends; what going on from the peak cost; and the KL at its end."""
    values = run[measure]
    peak = max(values)
    place = values.index(peak)
    positions = run.get("step") or run["n"]
    return {
        "start": values[0],
        "peak": peak,
        "at": positions[place],
        "end": values[-1],
        "fall": peak - values[-1],
        "KL": run["kl"][-1],
    }


def compare_members(runs: dict[str, list[dict]]) -> dict:
    """The table of how alike the members of each ensemble are, on SFT's and on the last answers."""
    table = {}
    for label, own in runs.items():
        if own[0]["correlation"][0] is not None:
            table[label] = collect(describe_members(run) for run in own)
    return table


def describe_members(run: dict) -> dict[str, float | None]:
    """The members' correlation and their standard deviation, before PPO and after it."""
    start, end = run["correlation"]
    variance = run["variance"]
    return {
        "correlation before": start,
        "correlation after": end,
        "std before": variance[0] ** 0.5,
        "std after": variance[-1] ** 0.5,
    }


def fit_curves(runs: dict[str, list[dict]]) -> list[str]:
    """A line for each method: a and b of Gao et al.'s curve, with intervals over the seeds."""
    lines = []
    for label, own in runs.items():
        fit = fit_rl
        formula = "d (a - b log d)"
        if "n" in own[0]:
            fit = fit_bon
            formula = "d (a - b d)"
        kl = np.array([run["kl"] for run in own]).clip(0)  # [S, L]
        gold = np.array([run["gold"] for run in own])  # [S, L]
        found = fit(kl, gold)
        lines.append(
            f"{label:18s} {formula}: a {found.a:.3f} {as_interval(found.a_interval)}, "
            f"b {found.b:.3f} {as_interval(found.b_interval)}"
        )
    return lines


def as_interval(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"[{low:.3f}, {high:.3f}]"


def compare_reward_models(runs: dict[str, list[dict]], measure: str) -> list[str]:
    """A line for each measure of reward models: does it tell which run ends with more gold?

    Kendall's tau over the runs of all methods. Runs that learn from the same pairs are not
    independent, so that a p-value would be too small: none is given.
    """
    lines = []
    for name in ("accuracy", "tau", "spread"):
        found = []
        ends = []
        for own in runs.values():
            for run in own:
                if run[name][0] is not None:
                    found.append(run[name][0])
                    ends.append(run[measure][-1])
        if len(found) < 2:
            continue
        tau, _ = kendall_tau(found, ends, permutations=0)
        lines.append(
            f"{name:10s} Kendall's tau with {measure} at the end {tau:6.2f}, {len(found)} runs"
        )
    return lines


# -------------------------------------------------------------------------------------- pictures


def draw_curves(figure, runs: dict[str, list[dict]]):
    """Gold (solid) and proxy (dashed), the mean over seeds, against steps or n and against sqrt(KL).

    The band is the standard error of gold over seeds. runs: {label: the run of each seed}
    """
    figure.set_size_inches(10, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for i, (label, own) in enumerate(runs.items()):
        positions = own[0].get("step") or own[0]["n"]
        d = np.array([run["kl"] for run in own]).clip(0) ** 0.5  # [seeds, evaluations]
        for axis, x in ((left, positions), (right, d.mean(0))):
            for measure, style in (("gold", "-"), ("proxy", "--")):
                if None in own[0][measure]:
                    continue
                values = np.array([run[measure] for run in own])  # [seeds, evaluations]
                mean = values.mean(0)
                name = label if measure == "gold" else None
                axis.plot(x, mean, style, color=f"C{i}", label=name, linewidth=1.2)
                if measure == "gold" and len(own) > 1:
                    error = values.std(0, ddof=1) / len(own) ** 0.5
                    axis.fill_between(
                        x, mean - error, mean + error, color=f"C{i}", alpha=0.15, linewidth=0
                    )
    is_bon = "n" in own[0]
    left.set(xlabel="n" if is_bon else "PPO step", ylabel="gold (solid), proxy (dashed)")
    if is_bon:
        left.set_xscale("log")
    right.set(xlabel="d = sqrt(KL to the SFT policy in nats)")
    lines, labels = left.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=min(len(labels), 6))

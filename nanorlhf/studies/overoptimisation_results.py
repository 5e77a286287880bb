"""What the runs of the study of overoptimisation have found: read from their folders, compared,
shown.

A run here is {column: a list with an entry for each evaluation}; of best-of-n, for each n. A table
is {row: {column: [one number a seed]}}. What a seed has no number for is left out.

    K members, N answers, S seeds, L evaluations
"""

import os
from statistics import fmean

import numpy as np

from ..bon import bon_kl, fit_bon, fit_rl
from ..runtime.files import read_object, read_rows
from ..stats import kendall_tau
from .common import collect
from .tables import draw_mean, read_curves, shorten, subtract

SINGLE = "single"  # one reward model

EVALUATED = ("gold", "proxy", "kl", "length", "distinct_2", "eos_rate", "variance")
N_OVERRATED = 2  # so many answers that all members overrate are kept of each run
# What can be said of a reward model before PPO: {name: its column in a summary of train_rm.py}
HELD_OUT = {"accuracy": "eval/accuracy", "tau": "eval/gold_kendall_tau"}


# -------------------------------------------------------------------------------------- reading


def read_ppo(folder: str) -> dict:
    """What a PPO run has found on held-out prompts, and what its reward models are like.

    With an entry for each evaluation, None where there is none, such as a variance of one member:
    "step", the columns of EVALUATED, "entropy", and a "distance" that is not measured here. Further
    "correlation": [on SFT's answers, on the last ones] between members; "overrated": [texts], the
    last answers that they overrate most; "spread": [x], the standard deviation of their mean score
    on SFT's answers; "accuracy" and "tau": [x], theirs on held-out pairs; "seconds": [x].
    """
    run = read_curves(folder, EVALUATED)
    # read_with_distance() of overoptimisation.py fills this column: all runs have the same columns.
    run["distance"] = [None] * len(run["step"])

    # PPO begins with SFT's own answers.
    first = read_answers(folder, run["step"][0])
    last = read_answers(folder, run["step"][-1])
    mean_scores = scores_of(first).mean(0)  # [N]
    run["correlation"] = [shorten(correlate_members(first)), shorten(correlate_members(last))]
    run["overrated"] = list_overrated(last)
    run["spread"] = [shorten(float(mean_scores.std(ddof=1)))]
    # All columns are lists, as a run is said to be: a single number is a list of one.
    return run | describe_reward_models(folder)


def read_answers(folder: str, step: int) -> list[dict]:
    """The answers of an evaluation, with the score that each member gives them."""
    return read_rows(f"{folder}/eval/step_{step}.jsonl", {"response": str, "scores": dict})


def scores_of(answers: list[dict]) -> np.ndarray:
    """The members' scores of answers: [K, N]."""
    # A row's scores are {name of the member: score}, in one order in all rows.
    return np.array([list(row["scores"].values()) for row in answers]).T


def correlate_members(answers: list[dict]) -> float | None:
    """The mean, over pairs of members, of the correlation of their scores; None for one member.

    None also where a member gives all answers the same score.
    """
    scores = scores_of(answers)  # [K, N]
    # The correlation of scores that do not vary would be 0 / 0.
    if len(scores) < 2 or not scores.std(1).all():
        return None
    coefficients = np.corrcoef(scores)  # [K, K]
    # The part above the diagonal has each pair once.
    pairs = np.triu_indices(len(scores), k=1)
    return float(coefficients[pairs].mean())


def list_overrated(answers: list[dict]) -> list[str]:
    """The answers whose lowest score by a member is furthest above their gold, each text once.

    Gold and scores have different units, so each is ranked among the answers first.
    """
    if answers[0].get("gold") is None:
        return []
    # WCO takes the lowest member's score. Where even that one is too high, WCO cannot notice.
    lowest = scores_of(answers).min(0)  # [N]
    gold = np.array([row["gold"] for row in answers])
    excess = rank(lowest) - rank(gold)  # [N]
    # Late in a run many answers are the same text: each text is listed once.
    texts = {}  # a set that keeps the order
    for i in np.argsort(-excess, kind="stable"):
        texts[answers[i]["response"]] = None
    return list(texts)[:N_OVERRATED]


def rank(numbers: np.ndarray) -> np.ndarray:
    """The rank of each of N numbers, 0 for the smallest."""
    # argsort() gives the number at each place of the order; argsort() of that, each number's place.
    return np.argsort(np.argsort(numbers, kind="stable"), kind="stable")


def describe_reward_models(folder: str) -> dict[str, list[float | None]]:
    """The numbers of HELD_OUT, mean over a PPO run's reward models; None where none has them."""
    # The run's settings name its reward models, whose folders have train_rm.py's summaries.
    paths = read_object(f"{folder}/config.json", {"reward_model": list})["reward_model"]
    summaries = []
    for path in paths:
        # The world's gold, or a model from elsewhere, has no summary.
        if os.path.isfile(f"{path}/summary.json"):
            summaries.append(read_object(f"{path}/summary.json", {}, finite=False))

    described = {}
    for name, column in HELD_OUT.items():
        numbers = []
        for summary in summaries:
            if summary.get(column) is not None:
                numbers.append(summary[column])
        described[name] = [None]
        if numbers:
            described[name] = [shorten(fmean(numbers))]
    return described


def read_bon(folder: str) -> dict:
    """The curves of best-of-n: {"n": [...], "kl": [...], NAME: {"proxy": [...], "gold": [...]}}.

    NAME is an objective, such as wco or uwo_0.5, or "single": the mean over the members' curves.
    """
    results = read_object(f"{folder}/bon_results.json")
    # bon_results.json has a curve for each member and for each objective:
    #   {"seed_0": [{"n": 1, "proxy_score": 0.1, "gold_score": -0.6, ...}, ...], "wco": [...], ...}
    curves = {SINGLE: []}  # {name: the curves whose mean it is}
    for name, points in results.items():
        # One reward model alone has one curve, whatever its name.
        if name.startswith("seed_") or len(results) == 1:
            curves[SINGLE].append(points)
        else:
            curves[name] = [points]

    # All curves of a run are at the same n, and the KL is a function of n alone.
    run = {"n": [], "kl": []}
    for point in curves[SINGLE][0]:
        run["n"].append(point["n"])
        run["kl"].append(shorten(bon_kl(point["n"])))
    for name, points in curves.items():
        proxy = average_curves(points, "proxy_score")
        gold = average_curves(points, "gold_score")
        run[name] = {"proxy": proxy, "gold": gold}
    return run


def average_curves(curves: list[list[dict]], column: str) -> list[float | None]:
    """The mean of a column over several curves, point by point; None where it is not measured."""
    means = []
    for points in zip(*curves, strict=True):
        numbers = [point[column] for point in points]
        if None in numbers:
            means.append(None)
        else:
            means.append(shorten(fmean(numbers)))
    return means


def curves_of_bon(pools: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """{ensemble: what read_bon() has found, for each seed} -> {label: the run of each seed}.

    The first ensemble's labels are those of its curves, such as wco; another's have its name in
    front. An averaged reward model has one curve, and its name is that of the ensemble.
    """
    # Labels are named as PPO's METHODS are, so that the tables of both can be compared.
    first, *_ = pools
    runs = {}
    for ensemble, seed_pools in pools.items():
        names = list(seed_pools[0])
        names.remove("n")
        names.remove("kl")
        for name in names:
            label = f"{ensemble}_{name}"
            if ensemble == first:
                label = name
            if len(names) == 1:
                label = ensemble
            runs[label] = []
            # The same form as a run of PPO, with n in the place of the step.
            for pool in seed_pools:
                runs[label].append({"n": pool["n"], "kl": pool["kl"], **pool[name]})
    return runs


# ------------------------------------------------------------------------------------- comparing


def stack(seed_runs: list[dict], column: str) -> np.ndarray:
    """A column of the runs of all seeds: [S, L]."""
    return np.array([run[column] for run in seed_runs])


def compare_curves(runs: dict[str, list[dict]], measure: str) -> dict:
    """The table of what came of each method. runs: {label: the run of each seed}

    measure: gold, or proxy. The differences at the end are taken seed by seed: from one reward
    model, and of members with a start of their own from members that share it.
    """
    table = {}
    for label, seed_runs in runs.items():
        table[label] = collect(describe_curve(run, measure) for run in seed_runs)
    # Methods of a seed share its pairs and its noise: what these do to both drops out of a
    # difference.
    for label, row in table.items():
        if label != SINGLE and SINGLE in table:
            row["less single's"] = subtract(row["end"], table[SINGLE]["end"])
        shared = label.removeprefix("pretrain_")
        if shared != label and shared in table:
            row["less shared start's"] = subtract(row["end"], table[shared]["end"])
    return table


def describe_curve(run: dict, measure: str) -> dict[str, float]:
    """A run's start, peak and end; what going on from the peak cost; and the KL at the end.

    Of PPO also the accuracy of its reward models on held-out pairs, and its seconds of training.
    """
    values = run[measure]
    # Pitfall: the peak is the largest of many noisy numbers, so it is a little too high.
    peak = max(values)
    place = values.index(peak)
    positions = run.get("step") or run["n"]
    described = {
        "start": values[0],
        "peak": peak,
        "at": positions[place],
        "end": values[-1],
        "fall": peak - values[-1],
        "KL": run["kl"][-1],
    }
    for name in ("accuracy", "seconds"):
        if name in run:
            (described[name],) = run[name]
    return described


def compare_members(runs: dict[str, list[dict]]) -> dict:
    """The table of how alike the members of each ensemble are, on SFT's and on the last answers."""
    table = {}
    for label, seed_runs in runs.items():
        # A single reward model has no other one to be like.
        if seed_runs[0]["correlation"][0] is not None:
            table[label] = collect(describe_members(run) for run in seed_runs)
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
    """A line for each method: a and b of Gao et al.'s curve, with intervals over the seeds.

    A method has none where its runs have been to less than two KL beside the start's.
    """
    lines = []
    for label, seed_runs in runs.items():
        kl = stack(seed_runs, "kl").clip(0)  # [S, L]
        gold = stack(seed_runs, "gold")  # [S, L]
        # The KL of the policy that a run starts from is 0, whatever rounding says.
        kl[:, 0] = 0.0
        # Two unknowns, a and b, need two KL besides the start's, where every curve is 0.
        if len(np.unique(kl[kl > 1e-6])) < 2:
            continue
        if "n" in seed_runs[0]:
            formula = "d (a - b d)"
            fit = fit_bon(kl, gold)
        else:
            formula = "d (a - b log d)"
            fit = fit_rl(kl, gold)
        lines.append(
            f"{label:18s} {formula}: a {fit.a:.3f} {as_interval(fit.a_interval)}, "
            f"b {fit.b:.3f} {as_interval(fit.b_interval)}"
        )
    return lines


def as_interval(ends: tuple[float, float]) -> str:
    """'[0.123, 0.456]'"""
    low, high = ends
    return f"[{low:.3f}, {high:.3f}]"


def compare_reward_models(runs: dict[str, list[dict]], measure: str) -> list[str]:
    """A line for each measure of reward models: does it tell which run ends with more gold?

    Kendall's tau over the runs of all methods. Runs that learn from the same pairs are not
    independent, so that a p-value would be too small: none is given.
    """
    lines = []
    for name in (*HELD_OUT, "spread"):
        numbers = []
        ends = []
        # Each run is a point: a measure of its reward models before PPO, and where the run ended.
        for seed_runs in runs.values():
            for run in seed_runs:
                (number,) = run[name]
                if number is not None:
                    numbers.append(number)
                    ends.append(run[measure][-1])
        if len(numbers) < 2:
            continue
        # permutations=0: no p-value, see above.
        tau, _ = kendall_tau(numbers, ends, permutations=0)
        lines.append(
            f"{name:10s} Kendall's tau with {measure} at the end {tau:6.2f}, {len(numbers)} runs"
        )
    return lines


# -------------------------------------------------------------------------------------- pictures


def draw_curves(figure, runs: dict[str, list[dict]]):
    """Gold (solid) and proxy (dashed), mean over seeds, against steps or n and against sqrt(KL).

    The band is the standard error of gold over seeds. runs: {label: the run of each seed}
    """
    figure.set_size_inches(10, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for i, (label, seed_runs) in enumerate(runs.items()):
        kl = stack(seed_runs, "kl")  # [S, L]
        d = kl.clip(0) ** 0.5
        positions = seed_runs[0].get("step") or seed_runs[0]["n"]
        # On the left by effort. On the right by the distance from SFT, where methods that move at
        # different paces can be compared.
        draw_scores(left, positions, seed_runs, color=f"C{i}", label=label)
        draw_scores(right, d.mean(0), seed_runs, color=f"C{i}", label=label)

    left.set(xlabel="PPO step", ylabel="gold (solid), proxy (dashed)")
    if "n" in seed_runs[0]:
        left.set(xlabel="n", xscale="log")
    right.set(xlabel="d = sqrt(KL to the SFT policy in nats)")
    lines, labels = left.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=min(len(labels), 6))


def draw_scores(axis, x, seed_runs: list[dict], color: str, label: str):
    """The mean gold and proxy of the runs of all seeds; the proxy alone where gold is unknown."""
    proxy = stack(seed_runs, "proxy")  # [S, L]
    # Without gold there is no solid line, so the dashed one has the label.
    if None in seed_runs[0]["gold"]:
        draw_mean(axis, x, proxy, color=color, label=label, linestyle="--")
        return
    gold = stack(seed_runs, "gold")  # [S, L]
    draw_mean(axis, x, gold, color=color, label=label)
    axis.plot(x, proxy.mean(0), "--", color=color, linewidth=1)


def draw_penalties(figure, runs: dict[float, dict[str, list[dict]]]):
    """Gold at the end of runs (solid) and its peak (dotted), against the coefficient of the KL
    penalty and against sqrt(KL) at the end. Mean over seeds; the bars are its standard error.

    runs: {coefficient: {label: the run of each seed}}
    """
    figure.set_size_inches(10, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    coefs = list(runs)
    for i, label in enumerate(runs[coefs[0]]):
        end = np.stack([stack(runs[coef][label], "gold")[:, -1] for coef in coefs])  # [C, S]
        peak = np.stack([stack(runs[coef][label], "gold").max(1) for coef in coefs])  # [C, S]
        kl = np.stack([stack(runs[coef][label], "kl")[:, -1] for coef in coefs])  # [C, S]
        d = kl.mean(1).clip(0) ** 0.5
        # One place for each coefficient: 0 has none on a logarithmic axis.
        for axis, x in ((left, range(len(coefs))), (right, d)):
            draw_error_bars(axis, x, end, color=f"C{i}", label=label, marker="o")
            axis.plot(x, peak.mean(1), ":", color=f"C{i}")

    left.set_xticks(range(len(coefs)), [f"{coef:g}" for coef in coefs])
    left.set(xlabel="coefficient of the KL penalty", ylabel="gold: at the end, peak (dotted)")
    right.set(xlabel="d = sqrt(KL to the SFT policy in nats), at the end")
    lines, labels = left.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=len(labels))


def draw_error_bars(axis, x, values: np.ndarray, **look):
    """The mean of values [L, S] over seeds at x [L], with a bar of its standard error."""
    seeds = values.shape[1]
    error = None
    if seeds > 1:
        error = values.std(1, ddof=1) / seeds**0.5
    axis.errorbar(x, values.mean(1), error, capsize=3, **look)

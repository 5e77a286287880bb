"""What the runs of the study of optimisers have found: read from their folders, compared, shown.

A run here is {column: a list with an entry for each evaluation}; of best-of-n, for each n. A table
is {row: {column: [one number a seed]}}. What a seed has no number for is left out.
"""

import numpy as np

from ..bon import bon_kl
from ..runtime.files import read_object
from .common import collect
from .tables import draw_mean, read_curves, shorten, subtract, value_at_kl

PPO = "ppo"
DPO = "dpo"
BON = "best_of_n"
SFT = "sft"
LABELS = {
    PPO: "PPO",
    "rloo": "RLOO",
    "dr_grpo": "Dr. GRPO",
    "grpo": "GRPO",
    DPO: "DPO",
    BON: "best-of-n",
    SFT: "SFT",
}

EVALUATED = ("gold", "proxy", "kl", "length", "distinct_2")
KLS = (1, 2, 5, 10, 20, 50)  # nats at which gold is compared
KS = (1, 4, 16, 64, 256)  # the k of max@k that tables show


# -------------------------------------------------------------------------------------- reading


def read_run(folder: str) -> dict:
    """The evaluations of a run on held-out prompts: see tables.read_curves."""
    return read_curves(folder, EVALUATED)


def read_bon(folder: str) -> dict:
    """The curve of best-of-n by one reward, {"n", "kl", "proxy", "gold": [a number for each n]}."""
    # {"seed_3": [{"n": 1, "proxy_score": 0.1, "gold_score": -0.6, ...}, {"n": 2, ...}, ...]}
    (points,) = read_object(f"{folder}/bon_results.json").values()
    run = {"n": [], "kl": [], "proxy": [], "gold": []}
    for point in points:
        run["n"].append(point["n"])
        run["kl"].append(shorten(bon_kl(point["n"])))
        run["proxy"].append(shorten(point["proxy_score"]))
        run["gold"].append(shorten(point["gold_score"]))
    return run


# ---------------------------------------------------------------------------------- runs, by method


def compare_ends(runs: dict[str, list[dict]]) -> dict:
    """The table of where runs have come to. runs: {method: the run of each seed}"""
    table = {}
    for method, seed_runs in runs.items():
        table[method] = collect(describe_end(run) for run in seed_runs)
    for method, row in table.items():
        # Within a seed all have learned from the same pairs.
        if method != PPO:
            row["less ppo's"] = subtract(row["gold"], table[PPO]["gold"])
    return table


def describe_end(run: dict) -> dict[str, float]:
    """A run's end, its peak, and what going on from the peak cost."""
    golds = run["gold"]
    peak = max(golds)
    # Pitfall: the peak is the largest of many noisy numbers: peak and fall are a little too large.
    return {
        "gold": golds[-1],
        "proxy": run["proxy"][-1],
        "KL": run["kl"][-1],
        "peak of gold": peak,
        "KL at the peak": run["kl"][golds.index(peak)],
        "fall": peak - golds[-1],
    }


def compare_answers(runs: dict[str, list[dict]]) -> dict:
    """The table of what the last answers are like, and of the seconds that training took."""
    table = {}
    for method, seed_runs in runs.items():
        table[method] = collect(describe_answers(run) for run in seed_runs)
    return table


def describe_answers(run: dict) -> dict[str, float | None]:
    """What a run's last answers are like. Best-of-n is no policy, and has none of these."""
    # DPO samples nothing while it trains, so its entropy is None: collect() leaves it out.
    row = {}
    for name in ("length", "distinct_2", "entropy", "seconds"):
        if name in run:
            row[name] = run[name][-1]
    return row


def compare_at_kl(runs: dict[str, list[dict]]) -> dict:
    """The table of gold at the same KL, along each run: None where the run has not gone so far."""
    table = {}
    for method, seed_runs in runs.items():
        table[method] = collect(describe_at_kl(run) for run in seed_runs)
    return table


def describe_at_kl(run: dict) -> dict[str, float | None]:
    """Gold at each of KLS."""
    # Points are in the order of the run: if it comes back to a KL, its first visit counts.
    points = list(zip(run["kl"], run["gold"]))
    row = {}
    for kl in KLS:
        row[f"KL {kl}"] = value_at_kl(points, kl)
    return row


# ------------------------------------------------------------------------------ where the KL stands


def compare_places(runs: dict[str, dict[float, list[dict]]], baseline: str) -> tuple[dict, dict]:
    """The trial of where the KL penalty stands. runs: {place: {coefficient: the run of each seed}}

    -> the table of where every cell has come to; and the table of its gold less what the baseline
    place has at the same KL, on lines between the ends of the baseline's runs. A cell beyond these
    has no number.
    """
    ends = {}
    less_baseline = {}
    for place, by_coefficient in runs.items():
        for coefficient, seed_runs in by_coefficient.items():
            name = f"{place} {coefficient:g}"
            rows = []
            differences = []
            # i is the seed: a run is compared with what the baseline did with the same pairs.
            for i, run in enumerate(seed_runs):
                end = describe_end(run)
                # These runs were evaluated only at their start and end: a peak would say nothing.
                rows.append({column: end[column] for column in ("gold", "proxy", "KL")})

                # The seed's runs of the baseline, from the smallest KL to the largest.
                points = []
                for others in runs[baseline].values():
                    points.append((others[i]["kl"][-1], others[i]["gold"][-1]))
                expected = value_at_kl(sorted(points), end["KL"])
                difference = None
                if expected is not None:
                    difference = end["gold"] - expected
                differences.append({f"less {baseline}'s": difference})
            ends[name] = collect(rows)
            if place != baseline:
                less_baseline[name] = collect(differences)
    return ends, less_baseline


# --------------------------------------------------------------------------------------- max@k

# A curve of max@k is {k: the expected gold of the best of k answers}.


def curve_of(run: dict, largest: int) -> dict[int, float]:
    """max@k of a pool whose best of n was chosen by gold, up to the largest k."""
    curve = {}
    for n, gold in zip(run["n"], run["gold"]):
        if n <= largest:
            curve[n] = gold
    return curve


def crossing(curve: dict[int, float], other: dict[int, float]) -> float | None:
    """The smallest k at which another curve is no longer below this one.

    Between two k it lies on a straight line in log k. None: the other curve stays below.
    """
    # The lead is how far this curve is above the other. It is followed from the smallest k upwards.
    last_k = None
    last_lead = None
    for k in sorted(curve):
        lead = curve[k] - other[k]
        # This curve is not above the other even at the smallest k: no line leads there.
        if lead <= 0 and last_k is None:
            return float(k)
        if lead <= 0:
            # On a line from last_lead > 0 to lead <= 0, this share of the way leads to 0.
            share = last_lead / (last_lead - lead)
            return last_k * (k / last_k) ** share
        last_k = k
        last_lead = lead
    return None


def compare_max_at_k(curves: dict[str, list[dict[int, float]]]) -> dict:
    """The table of max@k at the k of KS, and of what it is less SFT's. SFT has a single curve."""
    # All seeds share SFT's pool, so differences vary between seeds by the policy's curve alone.
    (sft,) = curves[SFT]
    whole = {}
    less_sft = {}
    for method, seed_curves in curves.items():
        rows = []
        differences = []
        for curve in seed_curves:
            row = {}
            difference = {}
            for k in KS:
                # A pool with fewer than k answers, as with --quick, has no such column.
                if k in curve:
                    row[f"k = {k}"] = curve[k]
                    difference[f"k = {k}"] = curve[k] - sft[k]
            rows.append(row)
            differences.append(difference)
        whole[method] = collect(rows)
        if method != SFT:
            less_sft[f"{method} less sft"] = collect(differences)
    return whole | less_sft


def describe_crossings(curves: dict[str, list[dict[int, float]]]) -> list[str]:
    """A sentence for each method: from which k on SFT is as good."""
    (sft,) = curves[SFT]
    sentences = []
    for method, seed_curves in curves.items():
        if method == SFT:
            continue
        phrases = []
        for curve in seed_curves:
            k = crossing(curve, sft)
            if k is None:
                phrases.append("never")
            else:
                phrases.append(f"from k = {k:.0f}")
        sentences.append(f"SFT is as good as {method}, seed by seed: {', '.join(phrases)}")
    return sentences


# --------------------------------------------------------------------------------- tables, pictures


def draw_against_kl(figure, runs: dict[str, list[dict]]):
    """Gold and proxy against the root of the KL, the mean over seeds. runs: {method: of each seed}

    A marker is an evaluation, or an n of best-of-n. The band is the standard error over seeds.
    """
    figure.set_size_inches(9.5, 4.4)
    gold_axis, proxy_axis = figure.subplots(1, 2, sharex=True)
    for method, seed_runs in runs.items():
        kl = np.array([run["kl"] for run in seed_runs])  # [seeds, evaluations]
        # An estimated KL may come out a little below 0, and would have no root.
        d = kl.clip(0) ** 0.5
        for axis, score in ((gold_axis, "gold"), (proxy_axis, "proxy")):
            scores = np.array([run[score] for run in seed_runs])
            draw_mean(axis, d.mean(0), scores, **look_of(method))
    gold_axis.set(ylabel="gold, on held-out prompts")
    proxy_axis.set(ylabel="proxy (in standard deviations)")
    figure.supxlabel("d = sqrt(KL to the SFT policy in nats)", fontsize=9)
    lines, labels = gold_axis.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=len(labels))


def draw_max_at_k(figure, curves: dict[str, list[dict[int, float]]]):
    """max@k against k, the mean over seeds."""
    figure.set_size_inches(5.5, 4)
    axis = figure.subplots()
    for method, seed_curves in curves.items():
        golds = np.array([list(curve.values()) for curve in seed_curves])  # [seeds, k]
        draw_mean(axis, list(seed_curves[0]), golds, **look_of(method))
    axis.set(xlabel="k answers to a prompt", ylabel="gold of the best of k", xscale="log")
    axis.legend()


def look_of(method: str) -> dict:
    """How a method's line looks, in all pictures."""
    colour = f"C{list(LABELS).index(method)}"
    return {"marker": "o", "color": colour, "label": LABELS[method]}

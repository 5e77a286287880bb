r"""What does each optimiser do to a known gold reward, on equal samples? PPO,
RLOO, Dr. GRPO, GRPO, DPO and best-of-n, against one noisy reward model.

    two runs side by side, one thread each; goes on where it was stopped:
        python -m nanorlhf.studies.optimisers
    the same tables in minutes: one seed, short runs, nothing tuned:
        python -m nanorlhf.studies.optimisers --quick
    everything once more, into a file of your own:
        python -m nanorlhf.studies.optimisers --results my.json

One SFT policy. A seed is 800 pairs of its own, a quarter of them with the wrong
label, which DPO learns from; a reward model of these pairs, which all others
learn from; and a run of each optimiser. Learning rates and coefficients are
tuned on two further seeds. Two trials follow: where the KL penalty stands, and
gold itself as the reward. What each run has found is kept in optimisers.json
and not run again.
"""

import math
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import numpy as np
from transformers.hf_argparser import HfArg

from ..bon import bon_kl
from ..runtime import cli
from ..runtime.files import check_can_write, read_object, read_rows
from .common import (
    Cell,
    KeptFlags,
    StudyFlags,
    as_text,
    collect,
    describe_numbers,
    draw_picture,
    print_title,
    read_flags,
    results_file,
    run_cells,
)

PPO = "ppo"
DPO = "dpo"
BON = "best_of_n"
SFT = "sft"
# The optimisers that sample their own answers. Each is a small step from the one above it:
ON_POLICY = {
    PPO: "",
    # no value function,
    "rloo": "--advantage rloo --loss_mean constant",
    # the KL in the loss (the advantage is RLOO's times 7/8, for groups of 8),
    "dr_grpo": "--advantage dr_grpo --loss_mean constant --kl_in loss --kl_kind k3",
    # advantages in standard deviations, and the mean over tokens within each answer.
    "grpo": "--advantage grpo --loss_mean sequence --kl_in loss --kl_kind k3",
}
TUNED = (*ON_POLICY, DPO)  # best-of-n has nothing to tune
ALL = (*TUNED, BON)

LABEL_NOISE = 0.25
# Where RLOO's KL penalty stands, in the trial.
PLACES = {
    "k1_reward": "--kl_in reward --kl_kind k1",
    "k2_loss": "--kl_in loss --kl_kind k2",
    "k3_loss": "--kl_in loss --kl_kind k3",
}
KLS = (1, 2, 5, 10, 20, 50)  # nats at which gold is compared
KS = (1, 4, 16, 64, 256)  # the k of max@k that tables show

# What --quick puts in the place of the flags' defaults. One setting leaves nothing to tune.
QUICK = {
    "seeds": 1,
    "lr": [3e-4],
    "kl_coef": [0.05],
    "dpo_lr": [1e-4],
    "dpo_beta": [0.1],
    "steps": 4,
    "no_kl_steps": 4,
    "place_steps": 2,
    "place_coefs": [0.02, 0.2],
    "trial_seeds": 1,
    "dpo_steps": 20,
    "eval_every": 2,
    "n_answers": 64,
    "k_answers": 64,
    "sft_flags": "--steps 200",
    "ppo_flags": "--batch_size 64",
}


# In all functions a are the study's Settings, s is a seed, and a run is what read_run() or
# read_bon() returns: {column: a list with an entry for each evaluation, or for each n}.

# ------------------------------------------------------------------------------------ the commands


class Setting(NamedTuple):
    """What is tuned."""

    lr: float
    strength: float  # of the pull towards SFT: --kl_coef, or DPO's --dpo_beta


def join(*words: str) -> str:
    """A command line of these words, without the empty ones."""
    return " ".join(word for word in words if word)


def train_sft(a) -> str:
    return join(f"train_sft.py --output_dir {a.output_dir}/sft", a.sft_flags)


def train_reward_model(a, s) -> str:
    return join(
        f"train_rm.py --model {a.output_dir}/sft",
        noisy_pairs(s),
        f"--output_dir {a.output_dir}/rm/seed_{s}",
        a.rm_flags,
    )


def noisy_pairs(s) -> str:
    """The flags of the pairs that a seed's reward model and its DPO run learn from."""
    return f"--dataset world:{s} --seed {s} --label_noise {LABEL_NOISE:g} --noise_seed {s}"


def policy_cell(a, name: str, s, flags: str, reward: str = "") -> Cell:
    """A run of train_ppo.py. reward: by default the seed's reward model."""
    needs = [train_sft(a)]
    if not reward:
        needs.append(train_reward_model(a, s))
        reward = f"{a.output_dir}/rm/seed_{s}"
    command = join(
        f"train_ppo.py --model {a.output_dir}/sft --reward_model {reward}",
        flags,
        f"--seed {s} --output_dir {a.output_dir}/{name}",
        a.ppo_flags,
    )
    return Cell(name, command, needs, read_run)


def dpo_cell(a, name: str, s, setting: Setting, eval_every: int) -> Cell:
    """A run of DPO. The seed's reward model only scores its answers to held-out prompts."""
    command = join(
        f"train_sft.py --loss dpo --model {a.output_dir}/sft",
        noisy_pairs(s),
        f"--reward_model {a.output_dir}/rm/seed_{s}",
        f"--lr {setting.lr:g} --dpo_beta {setting.strength:g}",
        f"--steps {a.dpo_steps} --eval_every {eval_every} --output_dir {a.output_dir}/{name}",
        a.dpo_flags,
    )
    return Cell(name, command, [train_sft(a), train_reward_model(a, s)], read_run)


def pool_cell(a, name: str, policy: str, n: int, s, needs: list[str]) -> Cell:
    """Answers of a policy to held-out prompts, with their gold: its best of n by gold is max@n."""
    command = join(
        f"sample_bon.py --model {a.output_dir}/{policy} --reward_model world:gold",
        f"--n_answers {n} --eval_size {a.prompts} --seed {s} --output_dir {a.output_dir}/{name}",
        a.bon_flags,
    )
    return Cell(name, command, needs, read_bon)


def sft_pool(a) -> Cell:
    """The answers of SFT, shared by best-of-n of all seeds and by max@k."""
    return pool_cell(a, "pool", "sft", a.n_answers, 0, [train_sft(a)])


def bon_cell(a, s) -> Cell:
    """Best-of-n by the seed's reward model."""
    name = f"tuned/{BON}/seed_{s}"
    command = join(
        f"sample_bon.py --pool {a.output_dir}/pool/pool.jsonl",
        f"--reward_model {a.output_dir}/rm/seed_{s} --seed {s} --output_dir {a.output_dir}/{name}",
        a.bon_flags,
    )
    needs = [train_sft(a), train_reward_model(a, s), sft_pool(a).command]
    return Cell(name, command, needs, read_bon)


def tuning_cell(a, method: str, s, setting: Setting) -> Cell:
    """A run that shows what a setting is worth."""
    name = f"tuning/{method}/lr_{setting.lr:g}_{setting.strength:g}/seed_{s}"
    if method == DPO:
        return dpo_cell(a, name, s, setting, eval_every=0)
    flags = join(ON_POLICY[method], flags_of(setting), f"--steps {a.tuning_steps} --eval_every 0")
    return policy_cell(a, name, s, flags)


def flags_of(setting: Setting) -> str:
    """A setting of an on-policy optimiser as flags."""
    return f"--lr {setting.lr:g} --kl_coef {setting.strength:g}"


def headline_cells(a, chosen: dict[str, Setting]) -> list[Cell]:
    """The two headline parts, seed by seed. chosen: the setting of each method."""
    cells = []
    for s in range(a.seeds):
        for method, own_flags in ON_POLICY.items():
            setting = chosen[method]
            length = f"--steps {a.steps} --eval_every {a.eval_every}"
            flags = join(own_flags, flags_of(setting), length)
            cells.append(policy_cell(a, f"tuned/{method}/seed_{s}", s, flags))

            if s < a.no_kl_seeds:
                length = f"--steps {a.no_kl_steps} --eval_every {a.no_kl_eval_every}"
                flags = join(own_flags, flags_of(setting._replace(strength=0)), length)
                cells.append(policy_cell(a, f"no_kl/{method}/seed_{s}", s, flags))
        cells.append(dpo_cell(a, f"tuned/{DPO}/seed_{s}", s, chosen[DPO], a.dpo_eval_every))
        cells.append(bon_cell(a, s))
    return cells


def place_cells(a, lr: float) -> list[Cell]:
    """The trial of where RLOO's KL penalty stands."""
    cells = []
    for s in range(a.trial_seeds):
        for place, place_flags in PLACES.items():
            for coef in a.place_coefs:
                length = f"--steps {a.place_steps} --eval_every 0"
                flags = join(
                    "--advantage rloo --loss_mean constant",
                    place_flags,
                    flags_of(Setting(lr, coef)),
                    length,
                )
                cells.append(policy_cell(a, f"place/{place}_{coef:g}/seed_{s}", s, flags))
    return cells


def gold_cells(a, chosen: dict[str, Setting]) -> list[Cell]:
    """The trial of gold as the reward, without a KL penalty, and pools of its policies."""
    runs = []
    pools = [sft_pool(a)]
    for s in range(a.trial_seeds):
        for method, own_flags in ON_POLICY.items():
            setting = chosen[method]._replace(strength=0)
            length = f"--steps {a.gold_steps} --eval_every {a.eval_every}"
            flags = join(own_flags, flags_of(setting), length)
            run = policy_cell(a, f"gold/{method}/seed_{s}", s, flags, reward="world:gold")
            runs.append(run)

            name = f"max_at_k/{method}/seed_{s}"
            needs = [*run.needs, run.command]
            # SFT's pool has seed 0.
            pools.append(pool_cell(a, name, run.name, a.k_answers, 1 + s, needs))
    return runs + pools


# ----------------------------------------------------------------------------------- their results

EVALUATED = ("gold", "proxy", "kl", "length", "distinct_2")


def read_run(folder: str) -> dict:
    """The evaluations of a run on held-out prompts, and the seconds that it trained for.

    -> {"step": [...], "gold": [...], ..., "entropy": [...], "seconds": x}. The entropy, in nats a
    token, is that of the answers that the step learned from: None where nothing was sampled.
    """
    run = {name: [] for name in ("step", *EVALUATED, "entropy")}
    seconds = 0.0
    for row in read_rows(f"{folder}/metrics.jsonl", {"step": int}):
        for name, value in row.items():
            if name.startswith("seconds"):
                seconds += value
        if "eval/gold" not in row:
            continue
        run["step"].append(row["step"])
        for name in EVALUATED:
            run[name].append(shorten(row[f"eval/{name}"]))
        run["entropy"].append(shorten(row.get("entropy")))
    return run | {"seconds": shorten(seconds)}


def read_bon(folder: str) -> dict:
    """The curve of best-of-n by one reward: {"n": [...], "kl": [...], "proxy": [...], "gold": [...]}."""
    (points,) = read_object(f"{folder}/bon_results.json").values()
    run = {"n": [], "kl": [], "proxy": [], "gold": []}
    for point in points:
        run["n"].append(point["n"])
        run["kl"].append(shorten(bon_kl(point["n"])))
        run["proxy"].append(shorten(point["proxy_score"]))
        run["gold"].append(shorten(point["gold_score"]))
    return run


def shorten(x: float | None) -> float | None:
    """A number with four significant digits, which a line of the file has room for."""
    if x is None:
        return None
    return float(f"{x:.4g}")


# ---------------------------------------------------------------------------------------- tuning


def grid_of(a, method: str) -> tuple[list[float], list[float]]:
    """The learning rates and the strengths that are tried. The first strength is the first round's."""
    if method == DPO:
        return a.dpo_lr, a.dpo_beta
    return a.lr, a.kl_coef


def tune(a, path: str) -> dict[str, dict[Setting, list[float]]]:
    """Try settings, first learning rates, then strengths at the best of these.

    -> {method: {setting: gold at the end, one number a seed}}. best_of() says which is best.
    """
    first_round = {}
    for method in TUNED:
        lrs, strengths = grid_of(a, method)
        first_round[method] = [Setting(lr, strengths[0]) for lr in lrs]
    tried = try_settings(a, first_round, path)

    second_round = {}
    for method in TUNED:
        _, strengths = grid_of(a, method)
        best = best_of(tried[method])
        second_round[method] = [best._replace(strength=strength) for strength in strengths[1:]]
    for method, golds in try_settings(a, second_round, path).items():
        tried[method] |= golds
    return tried


def try_settings(a, settings: dict[str, list[Setting]], path: str) -> dict:
    """{method: settings} -> {method: {setting: gold at the end, one number a seed}}"""
    cells = {}
    for method, own in settings.items():
        lrs, strengths = grid_of(a, method)
        if len(lrs) * len(strengths) == 1:
            continue  # nothing to choose
        for setting in own:
            cells[method, setting] = [tuning_cell(a, method, s, setting) for s in a.tuning_seeds]
    results = run_cells(sum(cells.values(), []), a, path)

    tried = {}
    for method, own in settings.items():
        tried[method] = {}
        for setting in own:
            golds = []
            for cell in cells.get((method, setting), []):
                golds.append(results[cell.name]["gold"][-1])
            tried[method][setting] = golds
    return tried


def best_of(tried: dict[Setting, list[float]]) -> Setting:
    """The setting with the highest mean gold; the first of equals. A single one needs no gold."""
    if len(tried) == 1:
        (only,) = tried
        return only
    return max(tried, key=lambda setting: fmean(tried[setting]))


def is_at_edge(value: float, values: list[float]) -> bool:
    """Whether a value is the smallest or the largest of several: a better one may lie beyond."""
    return len(values) > 1 and value in (min(values), max(values))


def print_tuning(a, tried: dict):
    """Every setting that was tried, with its gold; the chosen one is marked."""
    for method, golds in tried.items():
        best = best_of(golds)
        lrs, strengths = grid_of(a, method)
        for setting, numbers in golds.items():
            mark = ""
            if setting == best:
                mark = "  <- chosen"
                if is_at_edge(best.lr, lrs):
                    mark += ", at the edge of the learning rates"
                if is_at_edge(best.strength, strengths):
                    mark += ", at the edge of the coefficients"
            gold = "not tried"
            if numbers:
                of_seeds = ", ".join(f"{x:.2f}" for x in numbers)
                gold = f"{fmean(numbers):6.3f}  ({of_seeds})"
            print(f"{method:10s} lr {setting.lr:<7g} {setting.strength:<5g} {gold}{mark}")


# ---------------------------------------------------------------------------------------- tables


def describe_run(run: dict) -> dict[str, float]:
    """What a table shows of a run: its end, its peak, and what going on from the peak cost."""
    golds = run["gold"]
    peak = max(golds)
    row = {
        "gold": golds[-1],
        "proxy": run["proxy"][-1],
        "KL": run["kl"][-1],
        "peak of gold": peak,
        "KL at the peak": run["kl"][golds.index(peak)],
        "fall": peak - golds[-1],
    }
    # Best-of-n has no single policy to measure these on.
    for name in ("length", "distinct_2", "seconds"):
        if name in run:
            row[name] = last_of(run[name])
    return row


def last_of(numbers):
    """The last of several numbers; a single one is itself."""
    return numbers[-1] if isinstance(numbers, list) else numbers


def tables_of(runs: dict[str, list[dict]]) -> tuple[dict, dict]:
    """{row: the run of each seed} -> two tables {row: {column: [one number a seed]}}.

    The first is of what describe_run() says, the second of gold at the same KL, along each run.
    """
    at_end = {}
    at_same_kl = {}
    for name, own in runs.items():
        at_end[name] = collect(describe_run(run) for run in own)
        at_same_kl[name] = collect(gold_at_kls(run) for run in own)
        # Within a seed both have learned from the same pairs.
        if name != PPO:
            differences = subtract(at_end[name]["gold"], at_end[PPO]["gold"])
            at_end[name]["gold less ppo's"] = differences
    return at_end, at_same_kl


def subtract(numbers: list[float], others: list[float]) -> list[float]:
    """Seed by seed."""
    return [x - y for x, y in zip(numbers, others, strict=True)]


def gold_at_kls(run: dict) -> dict[str, float | None]:
    """{column: gold at one of KLS, None where the run has not gone so far}"""
    points = list(zip(run["kl"], run["gold"]))
    return {f"KL {kl}": value_at_kl(points, kl) for kl in KLS}


def value_at_kl(points: list[tuple[float, float]], kl: float) -> float | None:
    """The value at a KL, on straight lines in the root of the KL between points (KL, value).

    None for a KL that no two neighbours have between them. Where there are several such pairs, the
    first counts: a run that comes back to a KL was there before.
    """
    d = math.sqrt(kl)
    for (kl_0, value_0), (kl_1, value_1) in zip(points, points[1:]):
        # A KL that is estimated may come out a little below 0.
        d_0 = math.sqrt(max(kl_0, 0.0))
        d_1 = math.sqrt(max(kl_1, 0.0))
        if min(d_0, d_1) <= d <= max(d_0, d_1):
            if d_0 == d_1:
                return value_0
            return value_0 + (value_1 - value_0) * (d - d_0) / (d_1 - d_0)
    return None


def place_tables(a, results: dict) -> tuple[dict, dict]:
    """The trial of the KL's place: every cell at its end; and gold less k1's at the cell's KL."""
    at_end = {}
    at_same_kl = {}
    for place in PLACES:
        for coef in a.place_coefs:
            name = f"{place}_{coef:g}"
            rows = []
            differences = []
            for s in range(a.trial_seeds):
                run = results[f"place/{name}/seed_{s}"]
                kl = run["kl"][-1]
                gold = run["gold"][-1]
                rows.append({"gold": gold, "KL": kl, "proxy": run["proxy"][-1]})

                # k1 with every coefficient, from the smallest KL to the largest.
                k1_points = []
                for k1_coef in a.place_coefs:
                    k1_run = results[f"place/k1_reward_{k1_coef:g}/seed_{s}"]
                    k1_points.append((k1_run["kl"][-1], k1_run["gold"][-1]))
                k1_gold = value_at_kl(sorted(k1_points), kl)
                difference = None
                if k1_gold is not None:
                    difference = gold - k1_gold
                differences.append({"gold less k1's": difference})
            at_end[name] = collect(rows)
            if place != "k1_reward":
                at_same_kl[name] = collect(differences)
    return at_end, at_same_kl


def max_at_k_curves(a, results: dict) -> dict[str, list[dict[int, float]]]:
    """{SFT or method: of each seed {k: max@k}}, for the k that all pools have. SFT has one curve."""
    curves = {SFT: [curve_of(results["pool"])]}
    for method in ON_POLICY:
        curves[method] = []
        for s in range(a.trial_seeds):
            curves[method].append(curve_of(results[f"max_at_k/{method}/seed_{s}"]))
    largest = min(a.n_answers, a.k_answers)
    for name, own in curves.items():
        curves[name] = [{k: x for k, x in curve.items() if k <= largest} for curve in own]
    return curves


def curve_of(run: dict) -> dict[int, float]:
    """Best-of-n by gold: {n: gold}."""
    return dict(zip(run["n"], run["gold"]))


def crossing(curve: dict[int, float], other: dict[int, float]) -> float | None:
    """The smallest k from which another curve is no longer below this one.

    Between two k it lies on a straight line in log k. None: the other curve stays below.
    """
    ks = sorted(curve)
    leads = [curve[k] - other[k] for k in ks]
    if leads[0] <= 0:
        return float(ks[0])
    for k_0, k_1, lead_0, lead_1 in zip(ks, ks[1:], leads, leads[1:]):
        if lead_1 <= 0:
            share = lead_0 / (lead_0 - lead_1)
            return k_0 * (k_1 / k_0) ** share
    return None


def print_rows(rows: dict[str, dict[str, list[float]]]):
    """A table {row: {column: [one number a seed]}}: mean +- half-width of the interval."""
    columns = {}  # a set that keeps the order
    most = 0  # seeds
    for row in rows.values():
        columns |= dict.fromkeys(row)
        for numbers in row.values():
            most = max(most, len(numbers))
    print(f"{'':16s}" + "".join(f"{name:>20s}" for name in columns))
    for name, row in rows.items():
        cells = [as_text(row.get(column, []), most) for column in columns]
        print(f"{name:16s}" + "".join(f"{text:>20s}" for text in cells))


def print_max_at_k(curves: dict[str, list[dict[int, float]]]):
    """max@k at the k of KS, what it is less SFT's, and from which k on SFT is ahead."""
    (sft,) = curves[SFT]
    whole = {}
    less_sft = {}
    for name, own in curves.items():
        whole[name] = collect(at_ks(curve) for curve in own)
        if name != SFT:
            less_sft[f"{name} less sft"] = collect(
                at_ks({k: x - sft[k] for k, x in curve.items()}) for curve in own
            )
    print_rows(whole | less_sft)
    for name, own in curves.items():
        if name == SFT:
            continue
        found = []
        for curve in own:
            k = crossing(curve, sft)
            text = "never"
            if k is not None:
                text = f"from k = {k:.0f}"
            found.append(text)
        print(f"SFT overtakes {name}, seed by seed: {', '.join(found)}")


def at_ks(curve: dict[int, float]) -> dict[str, float]:
    """The k of a curve that the table shows."""
    return {f"k = {k}": curve[k] for k in KS if k in curve}


# -------------------------------------------------------------------------------------- pictures

LABELS = {
    PPO: "PPO",
    "rloo": "RLOO",
    "dr_grpo": "Dr. GRPO",
    "grpo": "GRPO",
    DPO: "DPO, tuned",
    BON: "best-of-n",
    SFT: "SFT",
}
COLOURS = {name: f"C{i}" for i, name in enumerate(LABELS)}


def draw_against_kl(figure, runs: dict[str, list[dict]]):
    """Gold and proxy against the root of the KL, the mean over seeds. runs: {method: of each seed}

    A marker is an evaluation, or an n. The band is the standard error over seeds.
    """
    figure.set_size_inches(9.5, 4.4)
    gold_axis, proxy_axis = figure.subplots(1, 2, sharex=True)
    for method, own in runs.items():
        d = np.array([run["kl"] for run in own]).clip(0) ** 0.5  # [seeds, evaluations]
        for axis, score in ((gold_axis, "gold"), (proxy_axis, "proxy")):
            values = np.array([run[score] for run in own])
            draw_mean(axis, d.mean(0), values, method)
    gold_axis.set(ylabel="gold, held-out prompts")
    proxy_axis.set(ylabel="proxy (in standard deviations)")
    figure.supxlabel("d = sqrt(KL to the SFT policy in nats)", fontsize=9)
    figure.legend(*gold_axis.get_legend_handles_labels(), loc="outside upper center", ncols=6)


def draw_max_at_k(figure, curves: dict[str, list[dict[int, float]]]):
    """max@k against k, the mean over seeds."""
    figure.set_size_inches(5.5, 4)
    axis = figure.subplots()
    for name, own in curves.items():
        values = np.array([list(curve.values()) for curve in own])
        draw_mean(axis, list(own[0]), values, name)
    axis.set(xlabel="k answers to a prompt", ylabel="gold of the best of k", xscale="log")
    axis.legend()


def draw_mean(axis, x, values: np.ndarray, name: str):
    """The mean of values [seeds, L] at x [L], and a band of its standard error over seeds."""
    mean = values.mean(0)
    axis.plot(x, mean, marker="o", color=COLOURS[name], label=LABELS[name])
    if len(values) > 1:
        error = values.std(0, ddof=1) / len(values) ** 0.5
        axis.fill_between(
            x, mean - error, mean + error, color=COLOURS[name], alpha=0.2, linewidth=0
        )


# --------------------------------------------------------------------------------------- the study


@dataclass
class Settings(KeptFlags, StudyFlags):
    """What is compared, and how long it runs"""

    output_dir: str = HfArg(
        default="runs/optimisers", help="the folder of all runs and of the pictures"
    )
    seeds: int = HfArg(default=10, help="how many seeds the tuned part has")
    no_kl_seeds: int = HfArg(default=5, help="how many of them run without a KL penalty, too")
    tuning_seeds: list[int] = HfArg(
        default_factory=lambda: [100, 101], help="seeds of tuning, used for nothing else"
    )
    lr: list[float] = HfArg(
        default_factory=lambda: [3e-5, 1e-4, 3e-4, 1e-3],
        help="learning rates of the on-policy optimisers to choose from",
    )
    kl_coef: list[float] = HfArg(
        default_factory=lambda: [0.1, 0.05, 0.2, 0.4],
        help="KL coefficients to choose from; learning rates are chosen at the first",
    )
    dpo_lr: list[float] = HfArg(
        default_factory=lambda: [1e-4, 3e-5, 3e-4], help="learning rates of DPO to choose from"
    )
    dpo_beta: list[float] = HfArg(
        default_factory=lambda: [0.1, 0.03, 0.3, 1],
        help="DPO's betas to choose from; learning rates are chosen at the first",
    )
    tuning_steps: int = HfArg(default=20, help="rollouts of a tuning run")
    steps: int = HfArg(default=30, help="rollouts of a tuned run, and of one on gold")
    eval_every: int = HfArg(default=5, help="evaluate those every N rollouts")
    gold_steps: int = HfArg(default=20, help="rollouts of a run on gold itself")
    no_kl_steps: int = HfArg(default=15, help="rollouts of a run without a KL penalty")
    no_kl_eval_every: int = HfArg(default=3, help="evaluate those every N rollouts")
    dpo_steps: int = HfArg(default=100, help="optimizer steps of a DPO run")
    dpo_eval_every: int = HfArg(default=10, help="evaluate those every N steps")
    n_answers: int = HfArg(default=512, help="answers to each prompt in best-of-n's pool")
    prompts: int = HfArg(default=30, help="held-out prompts of the pools")
    trial_seeds: int = HfArg(default=3, help="how many seeds the trials have")
    place_steps: int = HfArg(default=15, help="rollouts of a run in the trial of the KL's place")
    place_coefs: list[float] = HfArg(
        default_factory=lambda: [0.05, 0.1, 0.3], help="KL coefficients of that trial"
    )
    k_answers: int = HfArg(default=256, help="answers to each prompt of a policy trained on gold")
    dpo_flags: str = HfArg(default="", help="further flags of train_sft.py with DPO")
    bon_flags: str = HfArg(default="", help="further flags of sample_bon.py")


def read_settings(args: list[str] | None = None) -> Settings:
    """The study's flags, read from the command line or a list."""
    return read_flags(Settings, __doc__, args, QUICK)


def main(args=None):
    """Run what is not kept yet, part by part; after each part print its tables."""
    a = read_settings(args)
    with cli.errors_in_one_line():
        path = results_file(a, __file__)
        check_can_write(path)
        run_study(a, path)


def run_study(a, path: str):
    # 1. Tuning, on seeds of its own.
    tried = tune(a, path)
    chosen = {method: best_of(golds) for method, golds in tried.items()}
    print_title("Tuning: learning rate, coefficient, mean gold at the end (and of each seed)", a)
    print_tuning(a, tried)

    # 2. The headline: every optimiser with its setting, and without a KL penalty.
    results = run_cells(headline_cells(a, chosen), a, path)
    tuned = runs_of(results, "tuned", ALL, a.seeds)
    no_kl = runs_of(results, "no_kl", ON_POLICY, min(a.seeds, a.no_kl_seeds))
    # These two have no KL penalty to leave out.
    for method in (DPO, BON):
        no_kl[method] = tuned[method]
    for title, runs in (("Tuned", tuned), ("Without a KL penalty", no_kl)):
        at_end, at_same_kl = tables_of(runs)
        print_title(f"{title}: {describe_numbers(a)}; best-of-n: at its largest n", a)
        print_rows(at_end)
        print_title(f"{title}: gold at the same KL, along each run", a)
        print_rows(at_same_kl)
    draw_picture(draw_against_kl, no_kl, f"{a.output_dir}/optimisers.png")
    draw_picture(draw_against_kl, tuned, f"{a.output_dir}/tuned.png")

    # 3. Trial: where the KL penalty stands.
    results = run_cells(place_cells(a, chosen["rloo"].lr), a, path)
    at_end, at_same_kl = place_tables(a, results)
    print_title(f"RLOO, by the place of its KL: {a.trial_seeds} seeds", a)
    print_rows(at_end)
    print_title("RLOO: gold less that of k1 in the reward at the same KL", a)
    print_rows(at_same_kl)

    # 4. Trial: gold as the reward, and the best of k answers of its policies.
    results = run_cells(gold_cells(a, chosen), a, path)
    runs = runs_of(results, "gold", ON_POLICY, a.trial_seeds)
    at_end, _ = tables_of(runs)
    for method, own in runs.items():
        at_end[method]["entropy"] = [run["entropy"][-1] for run in own]
    print_title(f"Gold as the reward, no KL penalty: {a.trial_seeds} seeds", a)
    print_rows(at_end)
    curves = max_at_k_curves(a, results)
    print_title("max@k: gold of the best of k answers, of SFT and of these policies", a)
    print_max_at_k(curves)
    draw_picture(draw_max_at_k, curves, f"{a.output_dir}/max_at_k.png")


def runs_of(results: dict, part: str, methods, seeds: int) -> dict[str, list[dict]]:
    """{method: the run of each seed} of a part of the study."""
    runs = {}
    for method in methods:
        runs[method] = [results[f"{part}/{method}/seed_{s}"] for s in range(seeds)]
    return runs


if __name__ == "__main__":
    main()

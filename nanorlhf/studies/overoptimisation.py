r"""The overoptimisation study on the embedded world: best-of-n and PPO, {one reward
model, mean, WCO, UWO} x label noise x KL penalty.

    two runs side by side, one thread each; prints every command:
        python -m nanorlhf.studies.overoptimisation
    the same tables in minutes: one seed, short runs, noise and no KL penalty:
        python -m nanorlhf.studies.overoptimisation --quick
    your own model and data; prints all commands, and runs them without the
    last flag:
        python -m nanorlhf.studies.overoptimisation --model MODEL \
            --sft_dataset demonstrations.jsonl --pairs pairs.jsonl \
            --dataset prompts.jsonl --gold_model REWARD \
            --output_dir runs/mine --dry_run

One SFT policy. A seed of the study is five reward models of its own (their own
800 pairs and spurious cue, their own flipped labels, their own heads and data
orders), of which "single" is the first, and a PPO run of its own for each cell.
Runs that are done are not done again, so it goes on where it was stopped. At
the end a table over seeds, as text and in summary.json, and the pictures.

On your own data (own_data.py) all seeds share the pairs. Without a --gold_model
tables and pictures show the proxy, the score that is optimised. It cannot show
overoptimisation.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from transformers.hf_argparser import HfArg

from ..ensemble import OBJECTIVES
from ..runtime.plots import comparison_figure
from ..stats import t_interval
from .common import (
    StudyFlags,
    describe_numbers,
    draw_picture,
    print_title,
    read_flags,
    run_stage,
    with_interval,
    write_summary,
)
from .own_data import (
    OwnDataFlags,
    describe_own_data,
    has_own_data,
    pair_flags,
    print_remarks,
    prompt_flags,
    sft_commands,
    sft_of,
)
from .plan import print_plan

SINGLE = "single"  # one reward model
METHODS = (SINGLE, *OBJECTIVES)  # of PPO: against one reward model, or all by each objective
BON_LAMBDAS = (0.1, 0.5, 1)
# What --quick puts in the place of the flags' defaults: noisy labels and no penalty, where gold
# falls soonest.
QUICK = {
    "seeds": 1,
    "members": 3,
    "label_noise": [0.25],
    "kl_coef": [0],
    "steps": 15,
    "n_answers": 64,
}


# In all functions a are the study's Settings, and s is a seed.

# ---------------------------------------------------------------------------------- the commands


def commands(a):
    """The study as lists of command lines: what stands in one list can run side by side."""
    reward_models = []
    best_of_n = []
    policies = []
    for s in range(a.seeds):
        for noise in a.label_noise:
            reward_models.append(train_members(a, s, noise))
            best_of_n.append(choose_best(a, s, noise))
            for kl_coef in a.kl_coef:
                for method in METHODS:
                    policies.append(train_policy(a, s, noise, kl_coef, method))
    pool = sample_pool(a)
    if measure_of(a) == "gold":
        return [sft_commands(a), [pool, *reward_models], policies, best_of_n]
    # Without gold the pool is scored by a reward model, which has to be there.
    return [sft_commands(a), reward_models, [pool], policies, best_of_n]


def measure_of(a):
    """What tables show: gold, or without a gold reward the proxy."""
    if has_own_data(a) and not a.gold_model:
        return "proxy"
    return "gold"


def sample_pool(a):
    """The command that samples the answers which best-of-n chooses from, for all seeds."""
    reward_model = "world:gold"
    if has_own_data(a):
        reward_model = quote(a.gold_model)
    if measure_of(a) == "proxy":
        reward_model = first_folder(a, 0, a.label_noise[0])
    return (
        f"sample_bon.py --model {sft_of(a)} --reward_model {reward_model} {prompt_flags(a)}"
        f"--n_answers {a.n_answers} --eval_size {a.prompts} --output_dir {a.output_dir}/pool "
        f"{a.bon_flags}"
    )


def members_of(a, s, noise):
    """The folders of a seed's reward models: {seed} stands for their own seeds."""
    return f"{a.output_dir}/rm_noise{noise:g}/seed_{s}/seed_{{seed}}"


def first_member(a, s):
    """The own seed of the first of a seed's reward models: no two seeds share a member."""
    return s * a.members


def first_folder(a, s, noise):
    """The folder of the first of a seed's reward models."""
    return members_of(a, s, noise).replace("{seed}", str(first_member(a, s)))


def bon_folder(a, s, noise):
    return f"{a.output_dir}/bon_noise{noise:g}/seed_{s}"


def ppo_folder(a, s, noise, kl_coef, method):
    return f"{a.output_dir}/ppo_noise{noise:g}_kl{kl_coef:g}/{method}/seed_{s}"


def train_members(a, s, noise):
    """The command that trains a seed's reward models."""
    return (
        f"train_rm.py --members {a.members} --model {sft_of(a)} {pair_flags(a, s)} "
        f"--seed {first_member(a, s)} --label_noise {noise:g} --noise_seed {s} "
        f"--output_dir {members_of(a, s, noise)} {a.rm_flags}"
    )


def choose_best(a, s, noise):
    """The command that takes the best of n by a seed's reward models."""
    lambdas = " ".join(map(str, BON_LAMBDAS))
    return (
        f"sample_bon.py --pool {a.output_dir}/pool/pool.jsonl "
        f"--reward_model {members_of(a, s, noise)} --uwo_lambda {lambdas} --seed {s} "
        f"--output_dir {bon_folder(a, s, noise)} {a.bon_flags}"
    )


def train_policy(a, s, noise, kl_coef, method):
    """The command of one PPO run."""
    reward_model = members_of(a, s, noise)
    objective = method
    if method == SINGLE:
        reward_model = first_folder(a, s, noise)
        objective = "mean"  # of one
    return (
        f"train_ppo.py --model {sft_of(a)} --reward_model {reward_model} {prompt_flags(a)}"
        f"--objective {objective} --kl_coef {kl_coef:g} --seed {s} --steps {a.steps} "
        f"--eval_every {a.eval_every} --output_dir {ppo_folder(a, s, noise, kl_coef, method)} "
        f"{a.ppo_flags}"
    )


# ----------------------------------------------------------------------------------- the results


def ppo_curve(run, measure="gold"):
    """[(step, gold on held-out prompts)] of a PPO run. measure: gold, or proxy."""
    curve = []
    with open(f"{run}/metrics.jsonl") as f:
        for line in f:
            row = json.loads(line)
            if f"eval/{measure}" in row:
                curve.append((row["step"], row[f"eval/{measure}"]))
    return curve


def bon_names() -> list[str]:
    """What best-of-n compares, by its names in bon_results.json: UWO once for each lambda."""
    names = [SINGLE]
    for objective in OBJECTIVES:
        if objective == "uwo":
            names += [f"uwo_{uwo_lambda:g}" for uwo_lambda in BON_LAMBDAS]
        else:
            names.append(objective)
    return names


def bon_curve(run, name, measure="gold"):
    """[(n, gold)] of a best-of-n run; "single" is the mean over its members' curves.

    measure: gold, or proxy.
    """
    with open(f"{run}/bon_results.json") as f:
        results = json.load(f)
    if name == SINGLE:
        curves = [points for key, points in results.items() if key.startswith("seed_")]
    else:
        curves = [results[name]]

    mean_curve = []
    for points in zip(*curves):  # of all curves at the same n
        score = statistics.mean(point[f"{measure}_score"] for point in points)
        mean_curve.append((points[0]["n"], score))
    return mean_curve


def cell_of(curves):
    """Curves [(n or step, gold)], one a seed -> what the table shows: {column: [one a seed]}.

    `at` is the n or step of the peak; `fall` is peak - end: what going on cost.
    """
    cell = {"start": [], "peak": [], "at": [], "end": [], "fall": []}
    for curve in curves:
        _, start = curve[0]
        _, end = curve[-1]
        at, peak = max(curve, key=lambda point: point[1])
        cell["start"].append(start)
        cell["peak"].append(peak)
        cell["at"].append(at)
        cell["end"].append(end)
        cell["fall"].append(peak - end)
    return cell


def read_tables(a):
    """{title: {method: cell}}: best-of-n at each label noise, PPO also at each KL coefficient."""
    seeds = range(a.seeds)
    measure = measure_of(a)
    tables = {}
    for noise in a.label_noise:
        runs = [bon_folder(a, s, noise) for s in seeds]
        cells = {}
        for name in bon_names():
            cells[name] = cell_of([bon_curve(run, name, measure) for run in runs])
        tables[f"best-of-n, label noise {noise:g}"] = cells

    for noise in a.label_noise:
        for kl_coef in a.kl_coef:
            cells = {}
            for method in METHODS:
                folders = [ppo_folder(a, s, noise, kl_coef, method) for s in seeds]
                cells[method] = cell_of([ppo_curve(folder, measure) for folder in folders])
            tables[f"PPO, label noise {noise:g}, kl_coef {kl_coef:g}"] = cells
    return tables


def print_cells(cells):
    """A table of cells that belong together.

    Their ends are compared with that of "single" seed by seed.
    """
    print(
        f"{'':10s}{'start':>7s}{'peak':>16s}{'at':>16s}{'end':>16s}{'fall':>16s}"
        f"{'end - single':>16s}"
    )
    for name, cell in cells.items():
        start = statistics.mean(cell["start"])
        at = statistics.mean(cell["at"])
        line = f"{name:10s}{start:7.2f}{interval_of(cell['peak'])}{at:16.1f}"
        line += interval_of(cell["end"]) + interval_of(cell["fall"])
        if name != SINGLE:
            ends = zip(cell["end"], cells[SINGLE]["end"])
            line += interval_of([end - single_end for end, single_end in ends])
        print(line)


def interval_of(values):
    """The mean of numbers, one a seed, with its interval: a column of the table."""
    mean, half_width = t_interval(values)
    return f"{with_interval(mean, half_width, digits=2):>16s}"


# ------------------------------------------------------------------------------- flags, and main


@dataclass
class Settings(OwnDataFlags, StudyFlags):
    """What is compared: reward models, penalties, best-of-n and PPO"""

    members: int = HfArg(default=5, help="reward models in an ensemble")
    label_noise: list[float] = HfArg(
        default_factory=lambda: [0, 0.25], help="shares of training labels that are flipped"
    )
    kl_coef: list[float] = HfArg(
        default_factory=lambda: [0, 0.05], help="coefficients of PPO's KL penalty"
    )
    steps: int = HfArg(default=40, help="rollouts of each PPO run")
    eval_every: int = HfArg(default=5, help="evaluate PPO every N rollouts")
    n_answers: int = HfArg(default=512, help="answers to each prompt in the pool of best-of-n")
    prompts: int = HfArg(default=30, help="prompts of the pool")
    bon_flags: str = HfArg(default="", help="further flags of sample_bon.py")


def read_settings(args: list[str] | None = None) -> Settings:
    """The study's flags, read from the command line or a list."""
    return read_flags(Settings, __doc__, args, QUICK)


def main(args=None):
    """Run what is not done yet, then print the table and draw the pictures."""
    a = read_settings(args)
    remarks = describe_own_data(a)
    if a.dry_run:
        print_plan(commands(a), a, remarks)
        return
    print_remarks(remarks)
    for stage in commands(a):
        run_stage(stage, a.jobs)

    tables = read_tables(a)
    measure = measure_of(a)
    numbers = describe_numbers(a)
    title = (
        f"{measure.capitalize()} on held-out prompts: {numbers}; 'at': the peak's n or step, mean."
    )
    print(f"\n{title}")
    for title, cells in tables.items():
        print_title(title, a)
        print_cells(cells)
    write_summary(Path(a.output_dir, "summary.json"), {"settings": vars(a), measure: tables})

    for kind, log in (("bon", "bon_results.json"), ("ppo", "metrics.jsonl")):
        logs = Path(a.output_dir).glob(f"{kind}_*/**/{log}")
        runs = sorted(str(path.parent) for path in logs)
        draw_picture(comparison_figure, runs, f"{a.output_dir}/{kind}.png")


if __name__ == "__main__":
    main()

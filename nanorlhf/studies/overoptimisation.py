"""The overoptimisation study on the embedded world: best-of-n and PPO, {one reward
model, mean, WCO, UWO} x label noise x KL penalty.

    two runs side by side, one thread each; prints every command:
        python -m nanorlhf.studies.overoptimisation
    the same tables in minutes: one seed, short runs, noise and no KL penalty:
        python -m nanorlhf.studies.overoptimisation --quick

One SFT policy. A seed of the study is five reward models of its own (their own
800 pairs and spurious cue, their own flipped labels, their own heads and data
orders), of which "single" is the first, and a PPO run of its own for each cell.
Runs that are done are not done again, so it goes on where it was stopped. At
the end a table over seeds, as text and in summary.json, and the pictures.
"""

import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

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

METHODS = ("single", *OBJECTIVES)  # PPO against one reward model, and against all by each objective
BON_LAMBDAS = (0.1, 0.5, 1)
# What --quick puts in the place of the flags' defaults: noisy labels and no penalty, where gold falls soonest.
QUICK = {"seeds": 1, "members": 3, "label_noise": [0.25], "kl_coef": [0], "steps": 15, "n_answers": 64}


def commands(a):
    """The study as lists of command lines: what stands in one list can run side by side."""
    out, lambdas = a.output_dir, " ".join(map(str, BON_LAMBDAS))
    sft = f"train_sft.py --output_dir {out}/sft {a.sft_flags}"
    answers = f"--n_answers {a.n_answers} --eval_size {a.prompts}"
    pool = f"sample_bon.py --model {out}/sft --reward_model world:gold {answers} --output_dir {out}/pool {a.bon_flags}"
    members, bon, ppo = [], [], []
    for s, noise in itertools.product(range(a.seeds), a.label_noise):
        first, folder = s * a.members, f"{out}/rm_noise{noise:g}/seed_{s}"
        all_of_them = f"{folder}/seed_{{seed}}"
        members.append(
            f"train_rm.py --members {a.members} --model {out}/sft --dataset world:{s} --seed {first} --label_noise {noise:g} "
            f"--noise_seed {s} --output_dir {all_of_them} {a.rm_flags}"
        )
        bon.append(
            f"sample_bon.py --pool {out}/pool/pool.jsonl --reward_model {all_of_them} --uwo_lambda {lambdas} --seed {s} "
            f"--output_dir {out}/bon_noise{noise:g}/seed_{s} {a.bon_flags}"
        )
        for kl_coef, objective in itertools.product(a.kl_coef, METHODS):
            one = objective == "single"
            ppo.append(
                f"train_ppo.py --model {out}/sft --reward_model {f'{folder}/seed_{first}' if one else all_of_them} "
                f"--objective {'mean' if one else objective} --kl_coef {kl_coef:g} --seed {s} --steps {a.steps} "
                f"--eval_every {a.eval_every} --output_dir {out}/ppo_noise{noise:g}_kl{kl_coef:g}/{objective}/seed_{s} {a.ppo_flags}"
            )
    return [[sft], [pool, *members], ppo, bon]


def cell_of(curves):
    """Curves [(x, gold)] of the seeds -> what the table shows of them; `fall` is peak - end: what going on cost."""
    best = [max(curve, key=lambda point: point[1]) for curve in curves]
    return {
        "start": [curve[0][1] for curve in curves],
        "peak": [gold for _, gold in best],
        "at": [x for x, _ in best],
        "end": [curve[-1][1] for curve in curves],
        "fall": [gold - curve[-1][1] for (_, gold), curve in zip(best, curves)],
    }


def ppo_curve(run):
    """[(step, gold on held-out prompts)] of a PPO run."""
    rows = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
    return [(row["step"], row["eval/gold"]) for row in rows if "eval/gold" in row]


def bon_names() -> list[str]:
    """What best-of-n compares, by its names in bon_results.json: UWO once for each lambda."""
    names = ["single"]
    for objective in OBJECTIVES:
        if objective == "uwo":
            names += [f"uwo_{uwo_lambda:g}" for uwo_lambda in BON_LAMBDAS]
        else:
            names.append(objective)
    return names


def bon_curve(run, name):
    """[(n, gold)] of a best-of-n run; "single" is the mean over its members' curves."""
    results = json.load(open(f"{run}/bon_results.json"))
    curves = [points for key, points in results.items() if key.startswith("seed_")] if name == "single" else [results[name]]
    return [(points[0]["n"], statistics.mean(p["gold_score"] for p in points)) for points in zip(*curves)]


def show(cells):
    """A table of cells that belong together; their ends are compared with that of "single" seed by seed."""
    print(f"{'':10s}{'start':>7s}" + "".join(f"{name:>16s}" for name in ("peak", "at", "end", "fall", "end - single")))
    for name, cell in cells.items():
        columns = (cell["peak"], cell["end"], cell["fall"], [e - s for e, s in zip(cell["end"], cells["single"]["end"])])
        peak, end, fall, more = (f"{with_interval(*t_interval(values), digits=2):>16s}" for values in columns)
        start, at = statistics.mean(cell["start"]), statistics.mean(cell["at"])
        print(f"{name:10s}{start:7.2f}{peak}{at:16.1f}{end}{fall}{'' if name == 'single' else more}")


@dataclass
class Settings(StudyFlags):
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
    for stage in commands(a):
        run_stage(stage, a.jobs)

    tables = {}
    for noise in a.label_noise:
        runs = [f"{a.output_dir}/bon_noise{noise:g}/seed_{s}" for s in range(a.seeds)]
        tables[f"best-of-n, label noise {noise:g}"] = {name: cell_of([bon_curve(run, name) for run in runs]) for name in bon_names()}
    for noise, kl_coef in itertools.product(a.label_noise, a.kl_coef):
        folder = f"{a.output_dir}/ppo_noise{noise:g}_kl{kl_coef:g}"
        tables[f"PPO, label noise {noise:g}, kl_coef {kl_coef:g}"] = {
            name: cell_of([ppo_curve(f"{folder}/{name}/seed_{s}") for s in range(a.seeds)]) for name in METHODS
        }
    print(f"\nGold on held-out prompts: {describe_numbers(a)}; 'at': the peak's n or step, mean.")
    for title, cells in tables.items():
        print_title(title, a)
        show(cells)
    write_summary(Path(a.output_dir, "summary.json"), {"settings": vars(a), "gold": tables})
    for kind, log in (("bon", "bon_results.json"), ("ppo", "metrics.jsonl")):
        runs = sorted(str(path.parent) for path in Path(a.output_dir).glob(f"{kind}_*/**/{log}"))
        draw_picture(comparison_figure, runs, f"{a.output_dir}/{kind}.png")


if __name__ == "__main__":
    main()

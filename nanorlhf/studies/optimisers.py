r"""What does each optimiser do to a known gold reward, on equal samples? PPO,
RLOO, Dr. GRPO, GRPO, DPO and best-of-n, against one noisy reward model.

    two runs side by side, one thread each; goes on where it was stopped:
        python -m nanorlhf.studies.optimisers
    the same tables in minutes: one seed, short runs, nothing tuned:
        python -m nanorlhf.studies.optimisers --quick
    everything once more, in a folder and a file of your own:
        python -m nanorlhf.studies.optimisers --output_dir runs/again --results my.json

One SFT policy. A seed is 800 pairs of its own, a quarter of them with the wrong
label, which DPO learns from; a reward model of these pairs, which all others
learn from; and a run of each optimiser. Learning rates and coefficients are
tuned on two further seeds. Two trials follow: where the KL penalty stands, and
gold itself as the reward. What each run has found is kept in optimisers.json
and not run again. Tables and pictures: optimiser_results.py.
"""

from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from transformers.hf_argparser import HfArg

from ..runtime import cli
from .common import (
    StudyFlags,
    describe_numbers,
    draw_picture,
    join,
    print_title,
    read_flags,
)
from .kept_cells import (
    Cell,
    KeptFlags,
    results_file,
    run_cells,
)
from .optimiser_results import (
    BON,
    DPO,
    PPO,
    SFT,
    compare_answers,
    compare_at_kl,
    compare_ends,
    compare_max_at_k,
    compare_places,
    curve_of,
    describe_crossings,
    draw_against_kl,
    draw_max_at_k,
    read_bon,
    read_run,
)
from .tables import print_table

# The optimisers that sample their own answers. Each is a small step from the one above it.
ON_POLICY = {
    # PPO has a value function.
    PPO: "",
    # RLOO has no value function: it compares the answers to one prompt.
    "rloo": "--advantage rloo --loss_mean constant",
    # Dr. GRPO has the KL in the loss. Its advantage is RLOO's times 7/8, for groups of 8.
    "dr_grpo": "--advantage dr_grpo --loss_mean constant --kl_in loss --kl_kind k3",
    # GRPO has advantages in standard deviations, and a mean over the tokens of each answer.
    "grpo": "--advantage grpo --loss_mean sequence --kl_in loss --kl_kind k3",
}
TUNED = (*ON_POLICY, DPO)  # best-of-n has nothing to tune
LABEL_NOISE = 0.25

# The trial of where RLOO's KL penalty stands.
K1 = "k1_reward"
PLACES = {
    K1: "--kl_in reward --kl_kind k1",
    "k2_loss": "--kl_in loss --kl_kind k2",
    "k3_loss": "--kl_in loss --kl_kind k3",
}

# What --quick puts in the place of the flags' defaults. One setting leaves nothing to tune.
QUICK = {
    "seeds": 1,
    "lr": [3e-4],
    "kl_coef": [0.05],
    "dpo_lr": [1e-4],
    "dpo_beta": [0.1],
    "steps": 4,
    "gold_steps": 4,
    "eval_every": 2,
    "no_kl_steps": 4,
    "no_kl_eval_every": 2,
    "place_steps": 2,
    "place_coefs": [0.02, 0.2],
    "trial_seeds": 1,
    "dpo_steps": 20,
    "n_answers": 64,
    "k_answers": 64,
    "sft_flags": "--steps 200",
    "ppo_flags": "--batch_size 64",
}


# In all functions a are the study's Settings, and s is a seed.

# -------------------------------------------------------------------------------------- commands


class Setting(NamedTuple):
    """What is tuned."""

    lr: float
    strength: float  # of the pull towards SFT: --kl_coef, or DPO's --dpo_beta


def train_sft(a) -> str:
    """The command that trains the one SFT policy."""
    return join(f"train_sft.py --output_dir {a.output_dir}/sft", a.sft_flags)


def train_reward_model(a, s) -> str:
    """The command that trains a seed's reward model."""
    out = a.output_dir
    models = f"--model {out}/sft --output_dir {out}/rm/seed_{s}"
    return join("train_rm.py", models, noisy_pairs(s), a.rm_flags)


def noisy_pairs(s) -> str:
    """The flags of the pairs that a seed's reward model and its DPO run learn from."""
    return f"--dataset world:{s} --seed {s} --label_noise {LABEL_NOISE:g} --noise_seed {s}"


def flags_of(setting: Setting, steps: int, eval_every: int) -> str:
    """The flags of a run of train_ppo.py with a setting."""
    lr, kl_coef = setting
    return f"--lr {lr:g} --kl_coef {kl_coef:g} --steps {steps} --eval_every {eval_every}"


# ----------------------------------------------------------------------------------------- cells


def policy_cell(a, name: str, s, flags: str, on_gold: bool = False) -> Cell:
    """A run of train_ppo.py against the seed's reward model, or against gold itself."""
    # The cell's name is also its folder: part/method/seed_s.
    out = a.output_dir
    reward_model = f"{out}/rm/seed_{s}"
    needs = [train_sft(a), train_reward_model(a, s)]
    if on_gold:
        reward_model = "world:gold"
        needs = [train_sft(a)]
    models = f"--model {out}/sft --reward_model {reward_model}"
    place = f"--seed {s} --output_dir {out}/{name}"
    command = join("train_ppo.py", models, flags, place, a.ppo_flags)
    return Cell(name, command, needs, read_run)


def dpo_cell(a, name: str, s, setting: Setting, eval_every: int) -> Cell:
    """A run of DPO. The seed's reward model only scores its answers to held-out prompts."""
    out = a.output_dir
    lr, beta = setting
    models = f"--model {out}/sft {noisy_pairs(s)} --reward_model {out}/rm/seed_{s}"
    flags = f"--lr {lr:g} --dpo_beta {beta:g} --steps {a.dpo_steps} --eval_every {eval_every}"
    # noisy_pairs() has named --seed already.
    place = f"--output_dir {out}/{name}"
    command = join("train_sft.py --loss dpo", models, flags, place, a.dpo_flags)
    needs = [train_sft(a), train_reward_model(a, s)]
    return Cell(name, command, needs, read_run)


def pool_cell(a, name: str, policy: str, n: int, s, needs: list[str]) -> Cell:
    """n answers of a policy to each held-out prompt. The best of them by gold are max@n."""
    out = a.output_dir
    # Gold itself chooses here, which nobody could do in practice: max@k asks what is the best that
    # a policy can write.
    flags = f"--model {out}/{policy} --reward_model world:gold --n_answers {n}"
    place = f"--eval_size {a.prompts} --seed {s} --output_dir {out}/{name}"
    command = join("sample_bon.py", flags, place, a.bon_flags)
    return Cell(name, command, needs, read_bon)


def sft_pool(a) -> Cell:
    """The answers of SFT, which best-of-n of all seeds chooses from."""
    return pool_cell(a, "pool", "sft", a.n_answers, 0, [train_sft(a)])


def bon_cell(a, s) -> Cell:
    """Best-of-n by the seed's reward model."""
    out = a.output_dir
    name = f"tuned/{BON}/seed_{s}"
    models = f"--pool {out}/pool/pool.jsonl --reward_model {out}/rm/seed_{s}"
    place = f"--seed {s} --output_dir {out}/{name}"
    command = join("sample_bon.py", models, place, a.bon_flags)
    # All seeds choose from one pool, so that their curves differ by the reward models alone.
    needs = [train_sft(a), train_reward_model(a, s), sft_pool(a).command]
    return Cell(name, command, needs, read_bon)


def tuning_cell(a, method: str, s, setting: Setting) -> Cell:
    """A run that shows what a setting is worth."""
    lr, strength = setting
    name = f"tuning/{method}/lr_{lr:g}_{strength:g}/seed_{s}"
    # A setting is judged by its end alone. eval_every=0 evaluates only there and at the start.
    if method == DPO:
        return dpo_cell(a, name, s, setting, eval_every=0)
    flags = flags_of(setting, a.tuning_steps, eval_every=0)
    return policy_cell(a, name, s, join(ON_POLICY[method], flags))


def headline_cells(a, chosen: dict[str, Setting]) -> list[Cell]:
    """The two headline parts, seed by seed. chosen: the setting of each method."""
    cells = []
    for s in range(a.seeds):
        for method, method_flags in ON_POLICY.items():
            setting = chosen[method]
            flags = flags_of(setting, a.steps, a.eval_every)
            tuned = policy_cell(a, f"tuned/{method}/seed_{s}", s, join(method_flags, flags))
            cells.append(tuned)

            # The same learning rate, with nothing that pulls the policy back to SFT.
            if s < a.no_kl_seeds:
                no_kl = setting._replace(strength=0)
                flags = flags_of(no_kl, a.no_kl_steps, a.no_kl_eval_every)
                name = f"no_kl/{method}/seed_{s}"
                cells.append(policy_cell(a, name, s, join(method_flags, flags)))

        dpo = dpo_cell(a, f"tuned/{DPO}/seed_{s}", s, chosen[DPO], a.dpo_eval_every)
        cells.append(dpo)
        cells.append(bon_cell(a, s))
    return cells


def place_cells(a, lr: float) -> list[Cell]:
    """The trial of where RLOO's KL penalty stands."""
    cells = []
    for s in range(a.trial_seeds):
        for place, place_flags in PLACES.items():
            for coefficient in a.place_coefs:
                # ON_POLICY["rloo"] names neither --kl_in nor --kl_kind: the place does.
                setting = Setting(lr, coefficient)
                flags = flags_of(setting, a.place_steps, eval_every=0)
                flags = join(ON_POLICY["rloo"], place_flags, flags)
                name = name_of_place(place, coefficient, s)
                cells.append(policy_cell(a, name, s, flags))
    return cells


def name_of_place(place: str, coefficient: float, s) -> str:
    return f"place/{place}_{coefficient:g}/seed_{s}"


def gold_cells(a, chosen: dict[str, Setting]) -> tuple[list[Cell], list[Cell]]:
    """The trial of gold as the reward: runs without a KL penalty, and pools of their policies."""
    runs = []
    pools = [sft_pool(a)]
    for s in range(a.trial_seeds):
        for method, method_flags in ON_POLICY.items():
            no_kl = chosen[method]._replace(strength=0)
            flags = flags_of(no_kl, a.gold_steps, a.eval_every)
            flags = join(method_flags, flags)
            run = policy_cell(a, f"gold/{method}/seed_{s}", s, flags, on_gold=True)
            runs.append(run)

            # Noise of its own: the pool of SFT has seed 0.
            name = f"max_at_k/{method}/seed_{s}"
            needs = [*run.needs, run.command]
            pool = pool_cell(a, name, run.name, a.k_answers, s + 1, needs)
            pools.append(pool)
    return runs, pools


def commands(a) -> list[list[str]]:
    """All commands but those of tuning, with what a cell needs ahead of it.

    What tuning chooses is not known before: the first setting of each grid stands in its place.
    """
    first = {}
    for method in TUNED:
        lrs, strengths = grid_of(a, method)
        first[method] = Setting(lrs[0], strengths[0])
    runs, pools = gold_cells(a, first)
    cells = headline_cells(a, first) + place_cells(a, first["rloo"].lr) + runs + pools
    return [[*cell.needs, cell.command] for cell in cells]


# ---------------------------------------------------------------------------------------- tuning


def grid_of(a, method: str) -> tuple[list[float], list[float]]:
    """The learning rates and the strengths that are tried; learning rates at the first strength."""
    if method == DPO:
        return a.dpo_lr, a.dpo_beta
    return a.lr, a.kl_coef


def tune(a, path: str) -> dict[str, dict[Setting, list[float]]]:
    """Try settings, first learning rates, then strengths at the best of these.

    -> {method: {setting: gold at the end, one number a seed}}. best_of() says which is best.
    """
    # A full grid would take lrs x strengths runs a seed; two rounds take lrs + strengths - 1.
    first_round = {}
    for method in TUNED:
        lrs, strengths = grid_of(a, method)
        first_round[method] = [Setting(lr, strengths[0]) for lr in lrs]
    tried = try_settings(a, first_round, path)

    # The first strength has been tried already, at every learning rate.
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
    cells = []
    tried = {}
    places = {}  # {name of a cell: the list that its gold goes into}
    for method, settings_of_method in settings.items():
        # These lists are filled when the cells have run.
        tried[method] = {setting: [] for setting in settings_of_method}
        lrs, strengths = grid_of(a, method)
        if len(lrs) * len(strengths) == 1:
            continue  # nothing to choose
        for setting in settings_of_method:
            for s in a.tuning_seeds:
                cell = tuning_cell(a, method, s, setting)
                cells.append(cell)
                places[cell.name] = tried[method][setting]
    for name, result in run_cells(cells, a, path).items():
        golds = places[name]
        golds.append(result["gold"][-1])
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
            # Beyond a setting at the edge of the grid there may be a better one.
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
        run_study(a, results_file(a, __file__))


def run_study(a, path: str):
    """All parts, in order. path: the file of results"""
    # 1. Tuning, on seeds of its own: no setting is chosen by reward models that the results use.
    tried = tune(a, path)
    chosen = {method: best_of(golds) for method, golds in tried.items()}
    print_title("Tuning: gold at the end, mean over seeds (and of each seed)", a)
    print_tuning(a, tried)

    # 2. The headline: every optimiser with its setting, and without a KL penalty.
    results = run_cells(headline_cells(a, chosen), a, path)
    tuned = runs_of(results, "tuned", (*TUNED, BON), a.seeds)
    numbers = describe_numbers(a)
    print_title(f"Tuned: {numbers}; best-of-n at its largest n", a)
    print_table(compare_ends(tuned))
    print_title("Tuned: the answers at the end, and seconds of training", a)
    print_table(compare_answers(tuned))
    print_title("Tuned: gold at the same KL, along each run", a)
    print_table(compare_at_kl(tuned))

    no_kl = runs_of(results, "no_kl", ON_POLICY, min(a.seeds, a.no_kl_seeds))
    print_title(f"Without a KL penalty: the same over {len(no_kl[PPO])} seed(s)", a)
    print_table(compare_ends(no_kl))
    print_title("Without a KL penalty: the answers at the end, and seconds of training", a)
    print_table(compare_answers(no_kl))
    # These two have no KL penalty that could be left out.
    beside = {DPO: tuned[DPO], BON: tuned[BON]}
    print_title("Without a KL penalty: gold at the same KL, along each run", a)
    print_table(compare_at_kl(no_kl | beside))
    draw_picture(draw_against_kl, no_kl | beside, f"{a.output_dir}/optimisers.png")

    # 3. The trial of where the KL penalty stands.
    results = run_cells(place_cells(a, chosen["rloo"].lr), a, path)
    # Places are compared at the same KL: one coefficient does not mean the same in all places.
    runs = runs_of_places(a, results)
    ends, less_k1 = compare_places(runs, K1)
    print_title(f"RLOO by the place of its KL penalty, {a.trial_seeds} seed(s)", a)
    print_table(ends)
    print_title("RLOO: gold less that of k1 in the reward at the same KL", a)
    print_table(less_k1)

    # 4. The trial of gold as the reward, and the best of k answers of its policies.
    gold_runs, pools = gold_cells(a, chosen)
    results = run_cells(gold_runs, a, path)
    runs = runs_of(results, "gold", ON_POLICY, a.trial_seeds)
    print_title(f"Gold as the reward, without a KL penalty, {a.trial_seeds} seed(s)", a)
    print_table(compare_ends(runs))
    print_table(compare_answers(runs))

    results = run_cells(pools, a, path)
    largest = min(a.n_answers, a.k_answers)
    # All curves go up to the same k. SFT has one curve, since all seeds share its pool.
    curves = {SFT: [curve_of(results["pool"], largest)]}
    for method, seed_pools in runs_of(results, "max_at_k", ON_POLICY, a.trial_seeds).items():
        curves[method] = [curve_of(pool, largest) for pool in seed_pools]
    print_title("max@k: gold of the best of k answers", a)
    print_table(compare_max_at_k(curves))
    print("\n".join(describe_crossings(curves)))
    draw_picture(draw_max_at_k, curves, f"{a.output_dir}/max_at_k.png")


def runs_of(results: dict, part: str, methods, seeds: int) -> dict[str, list[dict]]:
    """{method: the run of each seed} of a part of the study."""
    runs = {}
    for method in methods:
        runs[method] = [results[f"{part}/{method}/seed_{s}"] for s in range(seeds)]
    return runs


def runs_of_places(a, results: dict) -> dict[str, dict[float, list[dict]]]:
    """{place of the KL: {coefficient: the run of each seed}}"""
    runs = {}
    for place in PLACES:
        runs[place] = {}
        for coefficient in a.place_coefs:
            seed_runs = []
            for s in range(a.trial_seeds):
                seed_runs.append(results[name_of_place(place, coefficient, s)])
            runs[place][coefficient] = seed_runs
    return runs


if __name__ == "__main__":
    main()

r"""Overoptimisation on the embedded world: which ensemble of reward models keeps
gold from falling, in PPO and in best-of-n, and how would one notice the fall?

    two runs side by side, one thread each; goes on where it was stopped:
        python -m nanorlhf.studies.overoptimisation
    the same tables in minutes: one seed, three members, short runs:
        python -m nanorlhf.studies.overoptimisation --quick
    your own model and data; prints all commands, and runs them without the
    last flag:
        python -m nanorlhf.studies.overoptimisation --model MODEL \
            --sft_dataset demonstrations.jsonl --pairs pairs.jsonl \
            --dataset prompts.jsonl --gold_model REWARD \
            --output_dir runs/mine --dry_run

A seed of the study is its own 800 pairs, a quarter of them with the wrong label;
three ensembles that learn from these; and a PPO run for each method. What each
run has found is kept in overoptimisation.json and not run again. Tables and
pictures: overoptimisation_results.py.

On your own data (own_data.py) all seeds share the pairs. Without a --gold_model
tables and pictures show the proxy, the score that is optimised. It cannot show
overoptimisation.
"""

from dataclasses import dataclass
from functools import partial
from shlex import quote
from typing import NamedTuple

from transformers.hf_argparser import HfArg

from ..errors import at_least, require
from ..runtime import cli
from ..runtime.files import check_can_write
from .common import (
    Cell,
    KeptFlags,
    StudyFlags,
    describe_numbers,
    draw_picture,
    print_title,
    read_flags,
    results_file,
    run_cells,
    stages_of,
)
from .overoptimisation_results import (
    SINGLE,
    compare_curves,
    compare_members,
    compare_reward_models,
    curves_of_bon,
    draw_curves,
    fit_curves,
    read_bon,
    read_ppo,
)
from .own_data import (
    OwnDataFlags,
    describe_own_data,
    has_own_data,
    pair_flags,
    print_remarks,
    prompt_flags,
    sft_of,
    spaced,
)
from .plan import print_plan
from .tables import print_table
from .warning_signs import compare_signs, print_signs

# The ensembles. Members of each learn from the same pairs, in an order of their own.
FINETUNE = "finetune"  # all start from one SFT policy; each has a score head of its own
PRETRAIN = "pretrain"  # each starts from an SFT policy of its own
WARM = "warm"  # they share the SFT policy and the score head's start, and are averaged
ENSEMBLES = (FINETUNE, PRETRAIN, WARM)


class Method(NamedTuple):
    """What PPO maximises: how many members of which ensemble, and by which objective."""

    ensemble: str
    objective: str = "mean"
    members: int | None = None  # the first so many of them; None: all
    uwo_lambda: float | None = None


METHODS = {
    SINGLE: Method(FINETUNE, members=1),
    "mean": Method(FINETUNE),
    "wco": Method(FINETUNE, "wco"),
    "uwo": Method(FINETUNE, "uwo"),
    "pretrain_mean": Method(PRETRAIN),
    "pretrain_wco": Method(PRETRAIN, "wco"),
    WARM: Method(WARM),
}
# By default UWO has a sweep of its own, below.
IN_WORLD = (SINGLE, "mean", "wco", "pretrain_mean", "pretrain_wco", WARM)
# These need no further SFT policies.
ON_OWN_DATA = (SINGLE, "mean", "wco", "uwo")

# The sweeps: of three seeds, against noisy labels and without a KL penalty.
MEMBER_COUNTS = {
    SINGLE: METHODS[SINGLE],
    "mean_of_2": Method(FINETUNE, members=2),
    "mean_of_3": Method(FINETUNE, members=3),
    "mean": METHODS["mean"],  # of 5
    "mean_of_10": Method(FINETUNE, members=10),
}
LAMBDAS = {f"uwo_{x:g}": Method(FINETUNE, "uwo", uwo_lambda=x) for x in (0.1, 1, 10)}
KL_COEFS = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 1)
IN_KL_SWEEP = (SINGLE, "pretrain_wco")

# Where best-of-n is made to fall: few pairs, many wrong labels, prompts that no pair is like, and
# as many answers as there is time for.
HARD_PAIRS = 200
HARD_NOISE = 0.4

BON_LAMBDAS = (0.1, 0.5, 1)
# What --quick puts in the place of the flags' defaults.
QUICK = {
    "seeds": 1,
    "trial_seeds": 0,
    "members": 3,
    "methods": [SINGLE, "wco", "pretrain_wco"],
    "label_noise": [0.25],
    "kl_coef": [0],
    "steps": 15,
    "n_answers": 64,
    "hard_answers": 0,
}


# In all functions a are the study's Settings, and s is a seed.

# -------------------------------------------------------------------------------- SFT and pairs


def sft_models(a, ensemble: str) -> list[str]:
    """The SFT policies that the members of an ensemble start from. The first is PPO's too."""
    if a.model and not a.sft_dataset:
        return [sft_of(a)]
    if ensemble == PRETRAIN:
        return [f"{sft_of(a)}/seed_{i}" for i in range(a.members)]
    return [f"{sft_of(a)}/seed_0"]


def policy_of(a) -> str:
    """The SFT policy that PPO and best-of-n start from."""
    (policy,) = sft_models(a, FINETUNE)
    return policy


def train_sfts(a, ensemble: str) -> list[str]:
    """The commands that train these SFT policies; none where --model is one."""
    if a.model and not a.sft_dataset:
        return []
    start = ""
    if a.sft_dataset:
        start = f"--model {quote(a.model)} --dataset {quote(a.sft_dataset)} {spaced(a.data_flags)}"
    commands = []
    for i, folder in enumerate(sft_models(a, ensemble)):
        commands.append(f"train_sft.py {start}--seed {i} --output_dir {folder} {a.sft_flags}")
    return commands


# -------------------------------------------------------------------------------- reward models


def member_folder(a, s, noise, ensemble: str) -> str:
    """The folders of a seed's reward models: {seed} stands for their own seeds."""
    return f"{a.output_dir}/rm_noise{noise:g}/{ensemble}/seed_{s}/seed_{{seed}}"


def train_members(a, s, noise, ensemble: str) -> list[str]:
    """The commands that make a seed's ensemble: one, and of WARM a second one for the average."""
    folder = member_folder(a, s, noise, ensemble)
    start = policy_of(a)
    if ensemble == PRETRAIN:
        start = f"{sft_of(a)}/seed_{{seed}}"
    flags = f"{pair_flags(a, s)} --label_noise {noise:g} --noise_seed {s}"
    if ensemble == WARM:
        flags = f"--head_seed 0 {flags}"
    commands = [
        f"train_rm.py --members {a.members} --model {start} {flags} --output_dir {folder} "
        f"{a.rm_flags}"
    ]
    if ensemble == WARM:
        commands.append(
            f"train_rm.py --average {folder} {pair_flags(a, s)} "
            f"--output_dir {averaged_folder(a, s, noise)} {a.rm_flags}"
        )
    return commands


def averaged_folder(a, s, noise) -> str:
    """The folder of a seed's averaged reward model."""
    return f"{a.output_dir}/rm_noise{noise:g}/{WARM}/seed_{s}/averaged"


def train_further(a, s, noise) -> str:
    """The command that trains as many members once more, for an ensemble of twice the size."""
    return (
        f"train_rm.py --members {a.members} --seed {a.members} --model {policy_of(a)} "
        f"{pair_flags(a, s)} --label_noise {noise:g} --noise_seed {s} "
        f"--output_dir {member_folder(a, s, noise, 'further')} {a.rm_flags}"
    )


def rewards_of(a, s, noise, method: Method) -> str:
    """What --reward_model names, so that it holds the members of a method."""
    folder = member_folder(a, s, noise, method.ensemble)
    if method.ensemble == WARM:
        return averaged_folder(a, s, noise)
    if method.members is None:
        return folder
    if method.members > a.members:
        return f"{folder} {member_folder(a, s, noise, 'further')}"
    return " ".join(folder.replace("{seed}", str(i)) for i in range(method.members))


# ---------------------------------------------------------------------------------------- cells


def measure_of(a) -> str:
    """What tables show: gold, or without a gold reward the proxy."""
    if has_own_data(a) and not a.gold_model:
        return "proxy"
    return "gold"


def sample_pool(a) -> list[str]:
    """The commands that sample SFT's answers, which best-of-n chooses from, for all seeds."""
    before = []
    reward_model = "world:gold"
    if has_own_data(a):
        reward_model = quote(a.gold_model)
    if measure_of(a) == "proxy":
        # Without gold the pool is scored by a reward model, which has to be there.
        noise = a.label_noise[0]
        before = train_members(a, 0, noise, FINETUNE)
        reward_model = rewards_of(a, 0, noise, METHODS[SINGLE])
    pool = (
        f"sample_bon.py --model {policy_of(a)} --reward_model {reward_model} {prompt_flags(a)}"
        f"--n_answers {a.n_answers} --eval_size {a.prompts} --output_dir {a.output_dir}/pool "
        f"{a.bon_flags}"
    )
    return [*before, pool]


def in_order(*groups: list[str]) -> list[str]:
    """The commands of some lists, each once."""
    commands = {}  # a set that keeps the order
    for group in groups:
        commands |= dict.fromkeys(group)
    return list(commands)


def ppo_cell(a, s, noise, kl_coef, label: str, method: Method) -> Cell:
    """One PPO run."""
    further = []
    if method.members is not None and method.members > a.members:
        further = [train_further(a, s, noise)]
    # On one's own data models may have tokenizers of their own: no distances are measured there.
    pool = ""
    before = []
    if not has_own_data(a):
        pool = f"{a.output_dir}/pool/pool.jsonl"
        before = sample_pool(a)
    needs = in_order(
        train_sfts(a, method.ensemble),
        before,
        train_members(a, s, noise, method.ensemble),
        further,
    )
    objective = f"--objective {method.objective} "
    if method.uwo_lambda is not None:
        objective += f"--uwo_lambda {method.uwo_lambda:g} "
    name = ppo_name(s, noise, kl_coef, label)
    command = (
        f"train_ppo.py --model {policy_of(a)} --reward_model {rewards_of(a, s, noise, method)} "
        f"{prompt_flags(a)}{objective}--kl_coef {kl_coef:g} --seed {s} --steps {a.steps} "
        f"--eval_every {a.eval_every} --output_dir {a.output_dir}/{name} {a.ppo_flags}"
    )
    return Cell(name, command, needs, partial(read_ppo, pool=pool))


def ppo_name(s, noise, kl_coef, label: str) -> str:
    """The name of a PPO run's cell, which is also its folder."""
    return f"ppo_noise{noise:g}_kl{kl_coef:g}/{label}/seed_{s}"


def bon_cell(a, s, noise, ensemble: str) -> Cell:
    """Best-of-n by a seed's ensemble, each of its members and each objective."""
    needs = in_order(train_sfts(a, ensemble), sample_pool(a), train_members(a, s, noise, ensemble))
    lambdas = " ".join(map(str, BON_LAMBDAS))
    name = f"bon_noise{noise:g}/{ensemble}/seed_{s}"
    command = (
        f"sample_bon.py --pool {a.output_dir}/pool/pool.jsonl "
        f"--reward_model {rewards_of(a, s, noise, Method(ensemble))} --uwo_lambda {lambdas} "
        f"--seed {s} --output_dir {a.output_dir}/{name} {a.bon_flags}"
    )
    return Cell(name, command, needs, read_bon)


def hard_cell(a, s, ensemble: str) -> Cell:
    """Best-of-n in the hard setting."""
    out = f"{a.output_dir}/hard"
    pool = (
        f"sample_bon.py --model {policy_of(a)} --reward_model world:gold --split ood "
        f"--max_rows {a.hard_prompts} --n_answers {a.hard_answers} --output_dir {out}/pool "
        f"{a.bon_flags}"
    )
    start = policy_of(a)
    if ensemble == PRETRAIN:
        start = f"{sft_of(a)}/seed_{{seed}}"
    folder = f"{out}/rm/{ensemble}/seed_{s}/seed_{{seed}}"
    members = (
        f"train_rm.py --members {a.members} --model {start} --dataset world:{s} "
        f"--max_rows {HARD_PAIRS} --label_noise {HARD_NOISE:g} --noise_seed {s} "
        f"--output_dir {folder} {a.rm_flags}"
    )
    needs = in_order(train_sfts(a, ensemble), [pool, members])
    name = f"hard/bon/{ensemble}/seed_{s}"
    command = (
        f"sample_bon.py --pool {out}/pool/pool.jsonl --reward_model {folder} --uwo_lambda 0.5 "
        f"--seed {s} --output_dir {a.output_dir}/{name} {a.bon_flags}"
    )
    return Cell(name, command, needs, read_bon)


def methods_of(a) -> dict[str, Method]:
    """The methods that the study compares."""
    return {label: METHODS[label] for label in a.methods}


def ensembles_of(a) -> list[str]:
    """The ensembles that these methods need."""
    ensembles = {}  # a set that keeps the order
    for method in methods_of(a).values():
        ensembles[method.ensemble] = None
    return list(ensembles)


def seeds_of(a, noise) -> range:
    """The seeds of a label noise. Without noise they are a trial's."""
    if noise == 0 and not has_own_data(a):
        return range(min(a.seeds, a.trial_seeds))
    return range(a.seeds)


def headline_cells(a) -> list[Cell]:
    """PPO by each method, and best-of-n by each ensemble, at each label noise."""
    cells = []
    for noise in a.label_noise:
        for s in seeds_of(a, noise):
            for ensemble in ensembles_of(a):
                cells.append(bon_cell(a, s, noise, ensemble))
        for kl_coef in a.kl_coef:
            for s in seeds_of(a, noise):
                for label, method in methods_of(a).items():
                    cells.append(ppo_cell(a, s, noise, kl_coef, label, method))
    return cells


def hard_cells(a) -> list[Cell]:
    """Best-of-n in the hard setting, by both kinds of ensemble."""
    if has_own_data(a) or not a.hard_answers:
        return []
    cells = []
    for s in range(a.hard_seeds):
        for ensemble in (FINETUNE, PRETRAIN):
            cells.append(hard_cell(a, s, ensemble))
    return cells


def trial_cells(a, methods: dict[str, Method], kl_coefs=(0,)) -> list[Cell]:
    """A sweep of a few seeds, at the first label noise."""
    cells = []
    if has_own_data(a):
        return cells
    noise = a.label_noise[0]
    for s in range(a.trial_seeds):
        for kl_coef in kl_coefs:
            for label, method in methods.items():
                cells.append(ppo_cell(a, s, noise, kl_coef, label, method))
    return cells


def all_cells(a) -> list[Cell]:
    """The cells of the whole study, in the order in which they are run."""
    kl_sweep = {label: METHODS[label] for label in IN_KL_SWEEP}
    cells = headline_cells(a) + hard_cells(a)
    cells += trial_cells(a, MEMBER_COUNTS) + trial_cells(a, LAMBDAS)
    cells += trial_cells(a, kl_sweep, KL_COEFS)
    return list({cell.name: cell for cell in cells}.values())


def commands(a) -> list[list[str]]:
    """The study as lists of command lines: what stands in one list can run side by side."""
    cells = all_cells(a)
    return [*stages_of(cells), [cell.command for cell in cells]]


# ------------------------------------------------------------------------------- flags, and main


@dataclass
class Settings(OwnDataFlags, KeptFlags, StudyFlags):
    """What is compared: reward models, penalties, best-of-n and PPO"""

    seeds: int = HfArg(default=10, help="how many seeds the study is repeated with")
    trial_seeds: int = HfArg(
        default=3, help="seeds of the sweeps, and of the runs without label noise"
    )
    members: int = HfArg(default=5, help="reward models in an ensemble")
    methods: list[str] = HfArg(
        default_factory=list,
        metadata={"choices": METHODS},
        help="what PPO maximises: one reward model, or an ensemble's objective; by default "
        f"{', '.join(IN_WORLD)}; on your own data {', '.join(ON_OWN_DATA)}",
    )
    label_noise: list[float] = HfArg(
        default_factory=lambda: [0.25, 0], help="shares of training labels that are flipped"
    )
    kl_coef: list[float] = HfArg(
        default_factory=lambda: [0, 0.05], help="coefficients of PPO's KL penalty"
    )
    steps: int = HfArg(default=40, help="rollouts of each PPO run")
    eval_every: int = HfArg(default=5, help="evaluate PPO every N rollouts")
    n_answers: int = HfArg(default=512, help="answers to each prompt in the pool of best-of-n")
    prompts: int = HfArg(default=30, help="prompts of the pool")
    hard_seeds: int = HfArg(default=5, help="seeds of the setting where best-of-n falls")
    hard_answers: int = HfArg(default=8192, help="answers to each prompt there; 0: leave it out")
    hard_prompts: int = HfArg(default=8, help="prompts there")
    bon_flags: str = HfArg(default="", help="further flags of sample_bon.py")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "trial_seeds", "hard_seeds", "hard_answers")
        if not self.methods:
            self.methods = list(ON_OWN_DATA if has_own_data(self) else IN_WORLD)
        if self.model and not self.sft_dataset:
            for label in self.methods:
                require(
                    METHODS[label].ensemble != PRETRAIN,
                    f"--methods {label} needs several SFT policies: train them from --sft_dataset",
                )


def read_settings(args: list[str] | None = None) -> Settings:
    """The study's flags, read from the command line or a list."""
    return read_flags(Settings, __doc__, args, QUICK)


def file_of_cells(a) -> str:
    """The file that keeps the results; on one's own data it is in the study's folder."""
    if has_own_data(a):
        return a.results or f"{a.output_dir}/cells.json"
    return results_file(a, __file__)


def main(args=None):
    """Run what is not done yet, then print the tables and draw the pictures."""
    a = read_settings(args)
    remarks = describe_own_data(a)
    if a.dry_run:
        print_plan(commands(a), a, remarks)
        return
    print_remarks(remarks)
    with cli.errors_in_one_line():
        path = file_of_cells(a)
        check_can_write(path)
        run_study(a, path)


def run_study(a, path: str):
    """Run the study part by part, and show what each part has found."""
    measure = measure_of(a)
    print(f"\n{measure.capitalize()} on held-out prompts: {describe_numbers(a)}")

    # 1. Which ensemble? PPO by each method, and best-of-n by each ensemble.
    results = run_cells(headline_cells(a), a, path)
    by_setting = {}  # {title: the PPO runs of a label noise and a KL coefficient}
    for noise in a.label_noise:
        seeds = seeds_of(a, noise)
        if not seeds:
            continue
        pools = {}
        for ensemble in ensembles_of(a):
            names = [bon_cell(a, s, noise, ensemble).name for s in seeds]
            pools[ensemble] = [results[name] for name in names]
        curves = curves_of_bon(pools)
        show_curves(a, f"best-of-n, label noise {noise:g}", curves, f"bon_noise{noise:g}.png")

        for kl_coef in a.kl_coef:
            runs = runs_of(results, noise, kl_coef, methods_of(a), seeds)
            title = f"PPO, label noise {noise:g}, kl_coef {kl_coef:g}"
            by_setting[title] = runs
            show_curves(a, title, runs, f"ppo_noise{noise:g}_kl{kl_coef:g}.png")
            print_title(f"{title}: how alike the members are", a)
            print_table(compare_members(runs))

    # 2. The setting in which best-of-n falls.
    hard = hard_cells(a)
    if hard:
        results = run_cells(hard, a, path)
        pools = {}
        for ensemble in (FINETUNE, PRETRAIN):
            names = [hard_cell(a, s, ensemble).name for s in range(a.hard_seeds)]
            pools[ensemble] = [results[name] for name in names]
        title = f"best-of-n, {HARD_PAIRS} pairs, label noise {HARD_NOISE:g}, other prompts"
        show_curves(a, title, curves_of_bon(pools), "bon_hard.png")

    # 3. The sweeps.
    noise = a.label_noise[0]
    for title, methods in (("number of members", MEMBER_COUNTS), ("lambda of UWO", LAMBDAS)):
        cells = trial_cells(a, methods)
        if cells:
            results = run_cells(cells, a, path)
            runs = runs_of(results, noise, 0, methods, range(a.trial_seeds))
            print_title(f"Trial of {a.trial_seeds} seeds: {title}", a)
            print_table(compare_curves(runs, measure))
    methods = {label: METHODS[label] for label in IN_KL_SWEEP}
    cells = trial_cells(a, methods, KL_COEFS)
    if cells:
        results = run_cells(cells, a, path)
        runs = {}
        for kl_coef in KL_COEFS:
            own = runs_of(results, noise, kl_coef, methods, range(a.trial_seeds))
            runs |= {f"{label}, {kl_coef:g}": of_seeds for label, of_seeds in own.items()}
        print_title(f"Trial of {a.trial_seeds} seeds: the KL coefficient", a)
        print_table(compare_curves(runs, measure))

    # 4. How would one notice without gold? And which reward model would one have chosen?
    for title, runs in by_setting.items():
        print_title(
            f"{title}: does a reward model's measure tell how much gold a run ends with?", a
        )
        print("\n".join(compare_reward_models(runs, measure)))
        if measure == "gold":
            print_title(f"{title}: signs that gold has fallen below its start", a)
            print_signs(compare_signs(by_seed(runs)))


def runs_of(results: dict, noise, kl_coef, methods, seeds) -> dict[str, list[dict]]:
    """{label: the PPO run of each seed}"""
    runs = {}
    for label in methods:
        runs[label] = [results[ppo_name(s, noise, kl_coef, label)] for s in seeds]
    return runs


def by_seed(runs: dict[str, list[dict]]) -> dict[int, list[dict]]:
    """{label: the run of each seed} -> {seed: its runs}"""
    seeds = {}
    for own in runs.values():
        for s, run in enumerate(own):
            seeds.setdefault(s, []).append(run)
    return seeds


def show_curves(a, title: str, runs: dict[str, list[dict]], picture: str):
    """Print the table and the fits of runs, and draw them."""
    measure = measure_of(a)
    print_title(title, a)
    print_table(compare_curves(runs, measure))
    if measure == "gold":
        print("\n".join(fit_curves(runs)))
    draw_picture(draw_curves, runs, f"{a.output_dir}/{picture}")


if __name__ == "__main__":
    main()

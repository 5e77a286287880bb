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

A seed of the study is its own 800 pairs, a quarter of them with the wrong
label; three ensembles that learn from these; and a PPO run for each method.
What each run has found is kept in overoptimisation.json and not run again.
Tables and pictures: overoptimisation_results.py.

On your own data (own_data.py) all seeds share the pairs. Without a --gold_model
tables and pictures show the proxy, the score that is optimised, and it cannot
show overoptimisation. A --model of your own has one start, and no sweeps.
"""

import importlib
import shlex
from dataclasses import dataclass
from functools import partial
from shlex import quote
from typing import NamedTuple

from transformers.hf_argparser import HfArg

from ..errors import at_least, require
from ..runtime import cli
from .common import (
    StudyFlags,
    draw_picture,
    print_title,
    read_flags,
)
from .kept_cells import (
    Cell,
    KeptFlags,
    results_file,
    run_cells,
    stages_of,
)
from .known_states import measure_distances
from .overoptimisation_results import (
    SINGLE,
    compare_curves,
    compare_members,
    compare_reward_models,
    curves_of_bon,
    draw_curves,
    draw_penalties,
    fit_curves,
    read_bon,
    read_ppo,
)
from .own_data import (
    OwnDataFlags,
    describe_own_data,
    has_one_sft,
    has_own_data,
    pair_flags,
    print_remarks,
    prompt_flags,
    sft_of,
    sft_start,
)
from .plan import count, print_plan
from .tables import print_table, shorten
from .warning_signs import compare_signs, print_signs

# The ensembles. Members of each learn from the same pairs, in an order of their own.
FINETUNE = "finetune"  # all start from one SFT policy; each has a score head of its own
PRETRAIN = "pretrain"  # each starts from an SFT policy of its own
WARM = "warm"  # they share the SFT policy and the score head's start, and are averaged


class Method(NamedTuple):
    """What PPO maximises: how many members of which ensemble, and by which objective."""

    ensemble: str
    objective: str = "mean"
    members: int | None = None  # the first so many of them; None: all
    uwo_lambda: float | None = None


# {a method's name in tables and folders: the method}. pretrain_NAME has the objective of NAME and
# members with a start of their own: tables show the difference of the two.
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
FEW_MEMBERS = (2, 3)
# UWO with lambda 0 is the mean.
LAMBDAS = {label: METHODS[label] for label in (SINGLE, "mean")}
for uwo_lambda in (0.1, 1, 10):
    LAMBDAS[f"uwo_{uwo_lambda:g}"] = Method(FINETUNE, "uwo", uwo_lambda=uwo_lambda)
KL_COEFS = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 1)
# One reward model, and the ensemble whose gold is highest with a penalty.
IN_KL_SWEEP = {label: METHODS[label] for label in (SINGLE, "wco")}

# Where best-of-n is made to fall: few pairs, many wrong labels, prompts that no pair is like, and
# as many answers as there is time for.
HARD_PAIRS = 200
HARD_NOISE = 0.4
IN_HARD_SETTING = (FINETUNE, PRETRAIN)

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

# ------------------------------------------------------------------------------------------ SFT


def sft_models(a, ensemble: str) -> list[str]:
    """The SFT policies that the members of an ensemble start from. The first is PPO's too."""
    # Here --model is the only SFT policy. (PRETRAIN was refused when the flags were read.)
    if has_one_sft(a):
        return [sft_of(a)]
    if ensemble == PRETRAIN:
        return [f"{sft_of(a)}/seed_{i}" for i in range(a.members)]
    # seed_0 is also the first of PRETRAIN's policies: PPO starts from it with every ensemble.
    return [f"{sft_of(a)}/seed_0"]


def policy_of(a) -> str:
    """The SFT policy that PPO and best-of-n start from."""
    (policy,) = sft_models(a, FINETUNE)
    return policy


def train_sfts(a, ensemble: str) -> list[str]:
    """The commands that train these SFT policies; none where --model is one."""
    if has_one_sft(a):
        return []
    commands = []
    for i, folder in enumerate(sft_models(a, ensemble)):
        place = f"--seed {i} --output_dir {folder}"
        commands.append(f"train_sft.py {sft_start(a)}{place} {a.sft_flags}")
    return commands


# -------------------------------------------------------------------------------- reward models


def member_folder(a, s, noise, ensemble: str) -> str:
    """The folders of a seed's reward models: {seed} stands for their own seeds."""
    # There are two kinds of seeds. The study's own, s, decides pairs, label noise and PPO's draws.
    # A member's decides the order of its pairs and its score head: train_rm.py puts it for {seed}.
    return f"{a.output_dir}/rm_noise{noise:g}/{ensemble}/seed_{s}/seed_{{seed}}"


def averaged_folder(a, s, noise) -> str:
    """The folder of a seed's averaged reward model."""
    return f"{a.output_dir}/rm_noise{noise:g}/{WARM}/seed_{s}/averaged"


def noisy_pairs(a, s, noise) -> str:
    """The flags of a seed's pairs, a share of them with the wrong label."""
    return f"{pair_flags(a, s)} --label_noise {noise:g} --noise_seed {s}"


def train_rms(a, ensemble: str, pairs: str, folder: str, first: int = 0) -> str:
    """The command that trains the members of an ensemble. first: the first one's own seed"""
    # The members have the seeds first, first + 1, ...
    seed = ""
    if first:
        seed = f"--seed {first} "
    # Members of FINETUNE differ in the order of their pairs and in the start of their score heads.
    start = policy_of(a)
    # Members of PRETRAIN also start from different SFT policies: {seed} is the member's own seed.
    if ensemble == PRETRAIN:
        start = f"{sft_of(a)}/seed_{{seed}}"
    head = ""
    # Members of WARM are averaged: all their weights, the head's too, must start out equal.
    if ensemble == WARM:
        head = "--head_seed 0 "
    return (
        f"train_rm.py --members {a.members} {seed}--model {start} {head}{pairs} "
        f"--output_dir {folder} {a.rm_flags}"
    )


def train_members(a, s, noise, ensemble: str) -> list[str]:
    """The commands that make a seed's ensemble: one, and of WARM a second one for the average."""
    folder = member_folder(a, s, noise, ensemble)
    commands = [train_rms(a, ensemble, noisy_pairs(a, s, noise), folder)]
    # PPO's reward is the average. The held-out pairs are needed again, to set its scores' scale.
    if ensemble == WARM:
        commands.append(
            f"train_rm.py --average {folder} {pair_flags(a, s)} "
            f"--output_dir {averaged_folder(a, s, noise)} {without_training(a.rm_flags)}"
        )
    return commands


def without_training(rm_flags: str) -> str:
    """Those of --rm_flags that train_rm.py --average takes too. Their names are written in full."""
    # The script is imported by its name: no module imports a script.
    refused = importlib.import_module("train_rm").NOT_FOR_AVERAGE
    kept_words = []
    is_kept = True
    for word in shlex.split(rm_flags):
        # The values of a flag follow it, up to the next one; or one stands after its =.
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0].replace("-", "_")
            is_kept = name not in refused
        if is_kept:
            kept_words.append(word)
    return shlex.join(kept_words)


def train_further(a, s, noise, method: Method) -> list[str]:
    """The command that trains as many members once more, for an ensemble of twice the size."""
    if method.members is None or method.members <= a.members:
        return []
    # The further members have a folder of their own, and the seeds that follow those of the others.
    folder = member_folder(a, s, noise, "further")
    return [train_rms(a, FINETUNE, noisy_pairs(a, s, noise), folder, first=a.members)]


def rewards_of(a, s, noise, method: Method) -> str:
    """What --reward_model names, so that it holds the members of a method."""
    folder = member_folder(a, s, noise, method.ensemble)
    if method.ensemble == WARM:
        return averaged_folder(a, s, noise)
    # In a reward's name {seed} stands for all members that are there.
    if method.members is None:
        return folder
    if method.members > a.members:
        return f"{folder} {member_folder(a, s, noise, 'further')}"
    # The folders of single members, by name.
    return " ".join(folder.replace("{seed}", str(i)) for i in range(method.members))


# ---------------------------------------------------------------------------------------- cells


def measure_of(a) -> str:
    """What tables show: gold, or without a gold reward the proxy."""
    if has_own_data(a) and not a.gold_model:
        return "proxy"
    return "gold"


def sample_pool(a) -> list[str]:
    """The commands that sample SFT's answers, which best-of-n chooses from, for all seeds."""
    # Gold scores the pool, so no reward model is needed yet: best-of-n reads the pool later.
    before = []
    reward_model = "world:gold"
    if has_own_data(a):
        reward_model = quote(a.gold_model)
    if measure_of(a) == "proxy":
        # Without gold the pool is scored by a reward model, which has to be there.
        noise = a.label_noise[0]
        before = train_members(a, 0, noise, FINETUNE)
        reward_model = rewards_of(a, 0, noise, METHODS[SINGLE])
    # All seeds and ensembles choose from one pool, so that their curves do not differ by the chance
    # of sampling.
    pool = (
        f"sample_bon.py --model {policy_of(a)} --reward_model {reward_model} {prompt_flags(a)}"
        f"--n_answers {a.n_answers} --eval_size {a.prompts} --output_dir {a.output_dir}/pool "
        f"{a.bon_flags}"
    )
    return [*before, pool]


def list_once(*groups: list[str]) -> list[str]:
    """The commands of some lists, each once."""
    commands = {}  # a set that keeps the order
    for group in groups:
        commands |= dict.fromkeys(group)
    return list(commands)


def ppo_name(s, noise, kl_coef, label: str) -> str:
    """The name of a PPO run's cell, which is also its folder."""
    return f"ppo_noise{noise:g}_kl{kl_coef:g}/{label}/seed_{s}"


def ppo_cell(a, s, noise, kl_coef, label: str, method: Method) -> Cell:
    """One PPO run."""
    # The order matters: a command reads what those ahead of it have written.
    needs = list_once(
        train_sfts(a, method.ensemble),
        sample_known(a),
        train_members(a, s, noise, method.ensemble),
        train_further(a, s, noise, method),
    )

    # Methods differ in --reward_model, --objective and --uwo_lambda; all other flags are the same.
    objective = f"--objective {method.objective} "
    if method.uwo_lambda is not None:
        objective += f"--uwo_lambda {method.uwo_lambda:g} "
    name = ppo_name(s, noise, kl_coef, label)
    command = (
        f"train_ppo.py --model {policy_of(a)} --reward_model {rewards_of(a, s, noise, method)} "
        f"{prompt_flags(a)}{objective}--kl_coef {kl_coef:g} --seed {s} --steps {a.steps} "
        f"--eval_every {a.eval_every} --output_dir {a.output_dir}/{name} {a.ppo_flags}"
    )
    # The distance is one of the signs in warning_signs.py. train_ppo.py does not log it: a reward
    # model reads the answers once more when the run's result is read.
    read = read_ppo
    if sample_known(a):
        read = partial(read_with_distance, known=f"{a.output_dir}/known/pool.jsonl")
    return Cell(name, command, needs, read)


def sample_known(a) -> list[str]:
    """The command that samples SFT's answers to the prompts of PPO's evaluations.

    A run's distances are measured from these. On one's own data a reward model may have a tokenizer
    of its own, which cannot read them: no distances are measured there.
    """
    if has_own_data(a):
        return []
    return [
        f"sample_bon.py --model {policy_of(a)} --reward_model world:gold --n_answers 16 "
        f"--output_dir {a.output_dir}/known {a.bon_flags}"
    ]


def read_with_distance(folder: str, known: str) -> dict:
    """What a PPO run has found, with the distance of its answers from those in a pool."""
    distances = measure_distances(folder, known)
    # read_ppo() has an empty column of this name, which is replaced.
    return read_ppo(folder) | {"distance": [shorten(distance) for distance in distances]}


def bon_name(s, noise, ensemble: str) -> str:
    """The name of a best-of-n run's cell, which is also its folder."""
    return f"bon_noise{noise:g}/{ensemble}/seed_{s}"


def bon_cell(a, s, noise, ensemble: str) -> Cell:
    """Best-of-n by a seed's ensemble, each of its members and each objective."""
    needs = list_once(train_sfts(a, ensemble), sample_pool(a), train_members(a, s, noise, ensemble))
    # One run gives the curves of each member and of every objective, by every lambda of UWO.
    lambdas = " ".join(map(str, BON_LAMBDAS))
    name = bon_name(s, noise, ensemble)
    # The command names no gold: the pool has each answer's gold score, where there is gold.
    command = (
        f"sample_bon.py --pool {a.output_dir}/pool/pool.jsonl "
        f"--reward_model {rewards_of(a, s, noise, Method(ensemble))} --uwo_lambda {lambdas} "
        f"--seed {s} --output_dir {a.output_dir}/{name} {a.bon_flags}"
    )
    return Cell(name, command, needs, read_bon)


def hard_name(s, ensemble: str) -> str:
    """The name of a cell in the hard setting, which is also its folder."""
    return f"hard/bon/{ensemble}/seed_{s}"


def hard_cell(a, s, ensemble: str) -> Cell:
    """Best-of-n in the hard setting."""
    out = f"{a.output_dir}/hard"
    # The prompts are of held-out topics, about which the reward models have learned no pair.
    pool = (
        f"sample_bon.py --model {policy_of(a)} --reward_model world:gold --split ood "
        f"--max_rows {a.hard_prompts} --n_answers {a.hard_answers} --output_dir {out}/pool "
        f"{a.bon_flags}"
    )
    pairs = (
        f"--dataset world:{s} --max_rows {HARD_PAIRS} --label_noise {HARD_NOISE:g} --noise_seed {s}"
    )
    folder = f"{out}/rm/{ensemble}/seed_{s}/seed_{{seed}}"
    needs = [*train_sfts(a, ensemble), pool, train_rms(a, ensemble, pairs, folder)]
    name = hard_name(s, ensemble)
    # One lambda for UWO: this setting asks where best-of-n falls, not which lambda is best.
    command = (
        f"sample_bon.py --pool {out}/pool/pool.jsonl --reward_model {folder} --uwo_lambda 0.5 "
        f"--seed {s} --output_dir {a.output_dir}/{name} {a.bon_flags}"
    )
    return Cell(name, command, needs, read_bon)


# ---------------------------------------------------------------------------- parts of the study


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
    # Best-of-n comes first: it trains no policy, so its results are there early.
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
    # A model of one's own may have no further starts, and data of one's own no other prompts.
    if a.model or not a.hard_answers:
        return []
    cells = []
    for s in range(a.hard_seeds):
        for ensemble in IN_HARD_SETTING:
            cells.append(hard_cell(a, s, ensemble))
    return cells


def member_counts(a) -> dict[str, Method]:
    """The mean of fewer members than an ensemble has, of all, and of twice as many."""
    methods = {SINGLE: METHODS[SINGLE]}
    for members in FEW_MEMBERS:
        if members < a.members:
            methods[f"mean_of_{members}"] = Method(FINETUNE, members=members)
    # "mean" is all members. That run is the headline's, with the same name, and is not run again.
    methods["mean"] = METHODS["mean"]
    methods[f"mean_of_{2 * a.members}"] = Method(FINETUNE, members=2 * a.members)
    return methods


def trial_cells(a, methods: dict[str, Method], kl_coefs=(0,)) -> list[Cell]:
    """A sweep of a few seeds, at the first label noise."""
    # Sweeps are run in the embedded world alone: they ask about methods, not about data.
    if a.model:
        return []
    noise = a.label_noise[0]
    cells = []
    for s in range(a.trial_seeds):
        for kl_coef in kl_coefs:
            for label, method in methods.items():
                cells.append(ppo_cell(a, s, noise, kl_coef, label, method))
    return cells


def all_cells(a) -> list[Cell]:
    """The cells of the whole study, in the order in which they are run."""
    cells = headline_cells(a) + hard_cells(a)
    cells += trial_cells(a, member_counts(a)) + trial_cells(a, LAMBDAS)
    cells += trial_cells(a, IN_KL_SWEEP, KL_COEFS)
    # The sweeps have some runs of the headline: each name once.
    by_name = {cell.name: cell for cell in cells}
    return list(by_name.values())


def commands(a) -> list[list[str]]:
    """The study as lists of command lines: what stands in one list can run side by side."""
    cells = all_cells(a)
    # The cells' own commands are the last stage: no cell reads what another cell has written.
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
        f"{', '.join(IN_WORLD)}; with --model {', '.join(ON_OWN_DATA)}",
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
        if not self.methods and self.model:
            self.methods = list(ON_OWN_DATA)
        elif not self.methods:
            self.methods = list(IN_WORLD)
        for label in self.methods:
            needs_several = METHODS[label].ensemble == PRETRAIN
            require(
                not needs_several or not has_one_sft(self),
                f"--methods {label} needs several SFT policies: train them from --sft_dataset",
            )


def read_settings(args: list[str] | None = None) -> Settings:
    """The study's flags, read from the command line or a list."""
    return read_flags(Settings, __doc__, args, QUICK)


def file_of_cells(a) -> str:
    """The file that keeps the results; with a model of one's own it is in the study's folder."""
    if a.model:
        return a.results or f"{a.output_dir}/cells.json"
    return results_file(a, __file__)


def describe_differences(a) -> list[str]:
    """What is different on one's own data: lines to print."""
    remarks = describe_own_data(a)
    if remarks and 0 in a.label_noise:
        remarks.append(
            "without label noise all seeds have the same reward models: intervals say what PPO's "
            "own draws do"
        )
    return remarks


def main(args=None):
    """Run what is not done yet, then print the tables and draw the pictures."""
    a = read_settings(args)
    remarks = describe_differences(a)
    if a.dry_run:
        print_plan(commands(a), a, remarks)
        return
    print_remarks(remarks)
    with cli.errors_in_one_line():
        run_study(a, file_of_cells(a))


def run_study(a, path: str):
    """Run the study part by part, and show what each part has found. path: the file of results"""
    # Parts are run and shown one after another, so that the first tables are there long before the
    # last runs. A cell that two parts share is run once.
    measure = measure_of(a)
    numbers = "mean over seeds +- half-width of its 95% t interval"
    print(f"\n{measure.capitalize()} on held-out prompts: {numbers}")

    # 1. Which ensemble? PPO by each method, and best-of-n by each ensemble.
    results = run_cells(headline_cells(a), a, path)
    runs_by_title = {}
    for noise in a.label_noise:
        # --trial_seeds 0 leaves no seed for the runs without label noise.
        if not seeds_of(a, noise):
            continue
        show_bon(a, results, noise)
        for kl_coef in a.kl_coef:
            title = f"PPO, label noise {noise:g}, kl_coef {kl_coef:g}"
            runs = runs_of(results, noise, kl_coef, methods_of(a), seeds_of(a, noise))
            runs_by_title[title] = runs
            show_ppo(a, title, runs, f"ppo_noise{noise:g}_kl{kl_coef:g}.png")

    # 2. Where does best-of-n fall?
    hard = hard_cells(a)
    if hard:
        show_hard(a, run_cells(hard, a, path))

    # 3. The sweeps.
    show_sweep(a, path, "number of members", member_counts(a))
    show_sweep(a, path, "lambda of UWO", LAMBDAS)
    show_sweep(a, path, "the KL coefficient", IN_KL_SWEEP, KL_COEFS)

    # 4. How would one notice without gold? And which reward model would one have chosen?
    for title, runs in runs_by_title.items():
        show_signs(a, title, runs)


def runs_of(results: dict, noise, kl_coef, methods, seeds) -> dict[str, list[dict]]:
    """{label: the PPO run of each seed}"""
    runs = {}
    for label in methods:
        runs[label] = [results[ppo_name(s, noise, kl_coef, label)] for s in seeds]
    return runs


# ------------------------------------------------------------------------- what each part shows


def show_bon(a, results: dict, noise):
    """Best-of-n at a label noise."""
    pools = {}
    for ensemble in ensembles_of(a):
        pools[ensemble] = [results[bon_name(s, noise, ensemble)] for s in seeds_of(a, noise)]
    # {finetune: [a seed's curves, ...], pretrain: ...} -> {"wco": [a seed's run, ...],
    # "pretrain_wco": ...}
    title = f"best-of-n, label noise {noise:g}"
    show_curves(a, title, curves_of_bon(pools), f"bon_noise{noise:g}.png")


def show_ppo(a, title: str, runs: dict[str, list[dict]], picture: str):
    """The PPO runs of all methods in one setting."""
    show_curves(a, title, runs, picture)
    table = compare_members(runs)
    if table:
        print_title(f"{title}: how alike the members are", a)
        print_table(table)


def show_hard(a, results: dict):
    """Best-of-n in the hard setting."""
    pools = {}
    for ensemble in IN_HARD_SETTING:
        pools[ensemble] = [results[hard_name(s, ensemble)] for s in range(a.hard_seeds)]
    title = f"best-of-n, {HARD_PAIRS} pairs, label noise {HARD_NOISE:g}, other prompts"
    show_curves(a, title, curves_of_bon(pools), "bon_hard.png")


def show_curves(a, title: str, runs: dict[str, list[dict]], picture: str):
    """The table, the fits and the picture of runs."""
    measure = measure_of(a)
    # All methods have the same seeds, since differences are taken seed by seed.
    (n_seeds,) = {len(seed_runs) for seed_runs in runs.values()}
    print_title(f"{title}, {count(n_seeds, 'seed')}", a)
    print_table(compare_curves(runs, measure))
    # Gao et al.'s curves are of gold, so they are not fitted to the proxy.
    if measure == "gold":
        for line in fit_curves(runs):
            print(line)
    # Best-of-n by UWO has a curve for each lambda, between those of the mean and of WCO.
    drawn = {label: seed_runs for label, seed_runs in runs.items() if "uwo_" not in label}
    draw_picture(draw_curves, drawn, f"{a.output_dir}/{picture}")


def show_sweep(a, path: str, title: str, methods: dict[str, Method], kl_coefs=(0,)):
    """Run a sweep, and print its table."""
    cells = trial_cells(a, methods, kl_coefs)
    if not cells:
        return
    results = run_cells(cells, a, path)
    # One table for the whole sweep. A row is a method, or a method at a coefficient: "wco, 0.05".
    table = {}
    runs = {}
    for kl_coef in kl_coefs:
        runs[kl_coef] = runs_of(results, a.label_noise[0], kl_coef, methods, range(a.trial_seeds))
        # Methods are compared with the same penalty.
        for label, row in compare_curves(runs[kl_coef], measure_of(a)).items():
            if len(kl_coefs) > 1:
                label = f"{label}, {kl_coef:g}"
            table[label] = row
    print_title(f"Trial of {count(a.trial_seeds, 'seed')}: {title}", a)
    print_table(table)
    if len(kl_coefs) > 1 and measure_of(a) == "gold":
        draw_picture(draw_penalties, runs, f"{a.output_dir}/penalties.png")


def show_signs(a, title: str, runs: dict[str, list[dict]]):
    """What tells of gold before PPO, and what during it."""
    measure = measure_of(a)
    # Before PPO: what can be read off a reward model alone.
    lines = compare_reward_models(runs, measure)
    if lines:
        print_title(f"{title}: does a measure of reward models tell how a run ends?", a)
        print("\n".join(lines))
    # During PPO: what evaluations show without gold. Gold judges how good these signs are.
    if measure == "gold":
        print_title(f"{title}: signs that gold has fallen below its start", a)
        print_signs(compare_signs(group_by_seed(runs)))


def group_by_seed(runs: dict[str, list[dict]]) -> dict[int, list[dict]]:
    """{label: the run of each seed} -> {seed: its runs}"""
    by_seed = {}
    for seed_runs in runs.values():
        for s, run in enumerate(seed_runs):
            by_seed.setdefault(s, []).append(run)
    return by_seed


if __name__ == "__main__":
    main()

r"""Generalisation and diversity: SFT, best-of-16, and PPO at several KL
coefficients with k1 or k2 as the KL in the reward.

    two runs side by side, one thread each; prints every command:
        python -m nanorlhf.studies.generalisation
    the same tables in minutes: one seed, two KL coefficients, short runs:
        python -m nanorlhf.studies.generalisation --quick
    your own model, reward and data; prints all commands, and runs them without
    the last flag:
        python -m nanorlhf.studies.generalisation --model smollm2 \
            --dataset prompts.jsonl --reward_model vader_lexicon.tsv \
            --data_flags "--in_distribution 'words:prompt<=6'" \
            --output_dir runs/mine --dry_run

After Kirk et al. 2024 (2310.06452). One SFT policy (--model: one that is
there). A seed is a reward model on its own 800 pairs with their own spurious
cue (--reward_model: the same one for all seeds), and with it a PPO run for
every cell and the best of 16 answers of SFT. Every system answers the same
prompts of every split K times at T = 1; best-of-16 from 16 K answers of SFT,
each answer the best of 16 of its own. Runs that are done are not done again. At
the end tables over seeds, as text and in summary.json, and a picture.

A win rate is over SFT's answers to the same prompt, all K x K pairs, ties half.
'in' is diversity per input (the K answers to one prompt), 'across' that of one
answer to each prompt; 'cut' is of the first words of each answer alone. PPO's
KL is that of its own last evaluation. All systems are sampled with noise of
their own; the pool that best-of-n draws from is one for all seeds, as the
prompts are.

On your own data (own_data.py) --data_flags say with --in_distribution what is
in, for SFT and reward models too; or name other files in --splits. The words of
diversity are then the tokens of the SFT policy, if --diversity_flags say
nothing else.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from shlex import quote, split

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from ..bon import bon_kl
from ..chats import show
from ..errors import require
from ..evals.diversity_report import FILE
from ..runtime import cli
from ..runtime.files import read_rows
from ..stats import pair_wins, t_interval
from ..world import vocabulary
from .common import (
    StudyFlags,
    collect,
    describe_numbers,
    draw_picture,
    is_finished,
    print_title,
    read_flags,
    run_stage,
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
from .tables import print_table, value_at_kl

SFT = "sft"
BON = "best_of_n"
KINDS = ("k1", "k2")
# The metrics of diversity.json that are compared, and how the tables call them.
DIVERSITY = {"ead": "EAD", "embedding": "emb", "distinct": "dist"}
# How diversity is measured in the embedded world: among its words, and also in 16 of each answer.
DIVERSITY_FLAGS = f"--vocab_size {len(vocabulary())} --truncate 16"
# What --quick puts in the place of the flags' defaults: the two ends of the KL coefficients.
QUICK = {"seeds": 1, "kl_coef": [0.02, 0.2], "steps": 15, "prompts": 20, "answers": 8, "n": 8}


@dataclass
class Settings(OwnDataFlags, StudyFlags):
    """What is compared: models, penalties, prompts and answers"""

    output_dir: str = HfArg(
        default="runs/generalisation", help="the folder of all runs, of tables and of pictures"
    )
    kl_coef: list[float] = HfArg(
        default_factory=lambda: [0.02, 0.05, 0.1, 0.2], help="coefficients of PPO's KL penalty"
    )
    kinds: list[str] = HfArg(
        default_factory=lambda: list(KINDS),
        metadata={"choices": KINDS},
        help="estimators of the KL in PPO's reward",
    )
    steps: int = HfArg(default=40, help="rollouts of each PPO run")
    splits: list[str] = HfArg(
        default_factory=lambda: ["test", "ood"],
        help="what is evaluated on, as --eval_splits of train_ppo.py; the first split is in "
        "distribution",
    )
    prompts: int = HfArg(default=60, help="prompts of each split")
    answers: int = HfArg(default=16, help="K: answers to each prompt")
    n: int = HfArg(default=16, help="the n of best-of-n")
    reward_model: str = HfArg(
        default="", help="the reward of all seeds; by default each seed trains its own"
    )
    encoder: str = HfArg(
        default="", help="a sentence encoder; by default the SFT policy's hidden states"
    )
    bon_flags: str = HfArg(default="", help="further flags of sample_bon.py")
    diversity_flags: str = HfArg(
        default=DIVERSITY_FLAGS,
        help="flags with which sample_bon.py measures diversity; on own data by default "
        "--tokenizer SFT_POLICY --truncate 16",
    )

    def __post_init__(self):
        super().__post_init__()
        # The embedded world has its held-out topics. For other data a rule must say what is in.
        needs_rule = self.dataset and "ood" in self.splits
        require(
            not needs_rule or "--in_distribution" in self.data_flags,
            '--splits ood: say what is in with --data_flags "--in_distribution ...", or name '
            "files, such as --splits test ood=FILE",
        )


def read_settings(args: list[str] | None = None) -> Settings:
    """The study's flags, read from the command line or a list."""
    return read_flags(Settings, __doc__, args, QUICK)


# ----------------------------------------------------------------------------------------- systems


def list_systems(a) -> dict[str, tuple[str, float] | None]:
    """{name: (kind of KL, coefficient) of a PPO cell, None of SFT and best-of-n}."""
    systems = {SFT: None, BON: None}
    for kind in a.kinds:
        for coefficient in a.kl_coef:
            systems[name_cell(kind, coefficient)] = (kind, coefficient)
    return systems


def name_cell(kind: str, coefficient: float) -> str:
    """("k1", 0.05) -> "k1_0.05"."""
    return f"{kind}_{coefficient:g}"


def names_of_splits(a) -> list[str]:
    """The names in --splits: "ood" of "ood=FILE"."""
    return [item.partition("=")[0] for item in a.splits]


def answers_of(a, name: str, seed: int, part: str) -> str:
    """The file with a system's K answers to each prompt of a split.

    Its rows are {prompt, response, scores, gold}.
    """
    # sample_bon.py writes the best of each n answers in turn: with n = 1 every answer.
    n = 1
    if name == BON:
        n = a.n
    return f"{a.output_dir}/answers/{name}/seed_{seed}/{part}/best_of_{n}.jsonl"


# ---------------------------------------------------------------------------------------- commands


def commands(a) -> list[list[str]]:
    """The study as lists of command lines: what stands in one list can run side by side."""
    # A policy and a reward that are there need no training.
    policies = sft_commands(a)
    rewards = []
    if not a.reward_model:
        for seed in range(a.seeds):
            rewards.append(
                f"train_rm.py --model {sft_of(a)} {pair_flags(a, seed)} --seed {seed} "
                f"--output_dir {reward_of(a, seed)} {a.rm_flags}"
            )

    # The pool is sampled beside the PPO runs: neither reads what the other writes.
    runs = [pool_command(a)]
    answers = []
    diversity = []
    for seed in range(a.seeds):
        for name, cell in list_systems(a).items():
            if cell is not None:
                runs.append(ppo_command(a, name, cell, seed))
            answers += answer_commands(a, name, seed)
        # One command measures all systems of a seed on a split, since they answer the same prompts.
        for part in names_of_splits(a):
            diversity.append(diversity_command(a, seed, part))
    return [policies, rewards, runs, answers, diversity]


def reward_of(a, seed: int) -> str:
    """The reward of a seed."""
    if a.reward_model:
        return quote(a.reward_model)
    return f"{a.output_dir}/rm/seed_{seed}"


def ppo_folder(a, name: str, seed: int) -> str:
    """The folder of a cell's PPO run."""
    return f"{a.output_dir}/ppo/{name}/seed_{seed}"


def data_flags_of(a) -> str:
    """The flags of the data that everything is evaluated on."""
    splits = " ".join(quote(item) for item in a.splits)
    return f"{prompt_flags(a)} --eval_splits {splits}"


def sampling_flags_of(a) -> str:
    """The flags of everything that is sampled for the tables."""
    return f"{data_flags_of(a)} --eval_size {a.prompts} {a.bon_flags}"


def pool_command(a) -> str:
    """Sample the n K answers of SFT that all seeds choose their best-of-n answers from."""
    # --seed 2000: noise that no system's own answers have, see answer_commands().
    return (
        f"sample_bon.py --model {sft_of(a)} --reward_model {reward_of_pool(a)} "
        f"--n_answers {a.n * a.answers} {sampling_flags_of(a)} --seed 2000 "
        f"--output_dir {a.output_dir}/pool"
    )


def reward_of_pool(a) -> str:
    """The reward that looks at the pool first; it chooses nothing."""
    # sample_bon.py scores what it samples, but no seed reads these scores: each has its own reward.
    if has_own_data(a) or a.reward_model:
        return reward_of(a, 0)
    return "world:gold"


def ppo_command(a, name: str, cell: tuple[str, float], seed: int) -> str:
    """Train the PPO policy of a cell."""
    kind, coefficient = cell
    # PPO is evaluated on the same splits as the tables: kl_of() reads the KL on each of them.
    return (
        f"train_ppo.py --model {sft_of(a)} --reward_model {reward_of(a, seed)} "
        f"--kl_kind {kind} --kl_coef {coefficient:g} --seed {seed} --steps {a.steps} "
        f"{data_flags_of(a)} --output_dir {ppo_folder(a, name, seed)} {a.ppo_flags}"
    )


def answer_commands(a, name: str, seed: int) -> list[str]:
    """Have a system answer the prompts of all splits."""
    folder = f"{a.output_dir}/answers/{name}/seed_{seed}"
    reward = reward_of(a, seed)

    # Best-of-n chooses from the pool, in which each split has a folder of its own.
    if name == BON:
        lines = []
        # The best of each n answers in turn is kept: n K answers of the pool give K.
        for part in names_of_splits(a):
            lines.append(
                f"sample_bon.py --pool {a.output_dir}/pool/{part}/pool.jsonl "
                f"--reward_model {reward} --n {a.n} --save_best --output_dir {folder}/{part}"
            )
        return lines

    # Seeds of sampling are different for SFT and PPO, so that all systems have their own noise.
    policy = ppo_folder(a, name, seed)
    sampling_seed = seed
    if name == SFT:
        policy = sft_of(a)
        sampling_seed = 1000 + seed
    return [
        f"sample_bon.py --model {policy} --reward_model {reward} --n_answers {a.answers} --n 1 "
        f"--save_best {sampling_flags_of(a)} --seed {sampling_seed} --output_dir {folder}"
    ]


def diversity_command(a, seed: int, part: str) -> str:
    """Measure the diversity of all systems' answers to the prompts of a split."""
    files = " ".join(answers_of(a, name, seed, part) for name in list_systems(a))
    # Without a sentence encoder, embeddings are hidden states of the SFT policy.
    encoder = sft_of(a)
    if a.encoder:
        encoder = quote(a.encoder)
    return (
        f"sample_bon.py --from {files} --encoder {encoder} {diversity_flags_of(a)} "
        f"--output_dir {a.output_dir}/diversity/seed_{seed}/{part}"
    )


def diversity_flags_of(a) -> str:
    """The flags with which diversity is measured."""
    # EAD depends on the size of the vocabulary. The default is the number of the world's words; on
    # own data the vocabulary is that of the SFT policy's tokenizer.
    if has_own_data(a) and a.diversity_flags == DIVERSITY_FLAGS:
        return f"--tokenizer {sft_of(a)} --truncate 16"
    return a.diversity_flags


def finished(a, command: str) -> bool:
    """Whether a command has run already: common.is_finished(), and what it cannot tell.

    sample_bon.py ends with a summary for each split, or with the diversity of the files that it
    names. It is measured again where the files or the encoder have changed.
    """
    words = split(command)
    folder = Path(words[words.index("--output_dir") + 1])
    if "--from" in words:
        # With other coefficients the study measures other systems in the same folder. The file says
        # which answers it has measured.
        stored = {}
        if (folder / FILE).is_file():
            stored = json.loads((folder / FILE).read_text())
        first = words.index("--from") + 1
        last = words.index("--encoder")
        same_files = stored.get("from_files") == words[first:last]
        same_encoder = stored.get("encoder") == words[last + 1]
        return same_files and same_encoder

    if is_finished(command):
        return True
    # Splits are sampled one after another, each into its folder: when the last is there, all are.
    last_split = names_of_splits(a)[-1]
    return "--eval_splits" in words and (folder / last_split / "summary.json").is_file()


# ---------------------------------------------------------------------------------------- one seed


def measure_seed(a, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """All that is read of one seed: {split: {system: {column: number}}}."""
    tables = {}
    for part in names_of_splits(a):
        # Each system's answers are compared with SFT's to the same prompts.
        sft = read_scores(answers_of(a, SFT, seed, part))
        rows = {}
        for name in list_systems(a):
            scores_of_system = read_scores(answers_of(a, name, seed, part))
            row = {"KL": kl_of(a, name, seed, part)}
            for key, scores in scores_of_system.items():
                row[key] = scores.mean().item()
            # SFT's own row has 0.5 here: each of its pairs is counted once in either direction.
            for key, scores in scores_of_system.items():
                row[f"win {key}"] = win_rate(scores, sft[key])
            rows[name] = row
        add_diversity(rows, Path(a.output_dir, f"diversity/seed_{seed}/{part}", FILE))
        tables[part] = rows
    return tables


def add_diversity(rows: dict[str, dict[str, float]], path: Path):
    """Add the columns of a diversity.json to the rows of the systems."""
    report = json.loads(path.read_text())
    # {"systems": {name: {"per_input": {...}, "across_input": {...}}, ...},
    #  "truncated": {"systems": {...}}}: the same numbers, of the first words of each answer alone.
    add_metrics(rows, report["systems"], "")
    if "truncated" in report:
        add_metrics(rows, report["truncated"]["systems"], ", cut")


def add_metrics(rows: dict[str, dict[str, float]], systems: dict[str, dict], end: str):
    """Add the columns of one list of diversity.json, whose names all have the same end."""
    # The systems of diversity.json stand in the order of the files, which is that of the rows.
    for row, system in zip(rows.values(), systems.values(), strict=True):
        per_input = system["per_input"]
        across_input = system["across_input"]
        row[f"length{end}"] = per_input["length"]["mean"]
        for key, label in DIVERSITY.items():
            row[f"in {label}{end}"] = per_input[key]["mean"]
        for key, label in DIVERSITY.items():
            row[f"across {label}{end}"] = across_input[key]["mean"]


def read_scores(path: str) -> dict[str, Tensor]:
    """A file of answers -> {"proxy": [P, K], "gold": [P, K] where there is gold}, float64."""
    # The K answers to a prompt stand in K lines, each with its prompt.
    by_metric = {}  # {"proxy": {prompt: [K numbers]}, ...}
    for row in read_rows(path, {"scores": dict}):
        prompt = show(row["prompt"])  # a chat is a list, which cannot be a key
        # A system's answers are scored by one reward, so a line has one score beside gold.
        (proxy,) = row["scores"].values()
        by_metric.setdefault("proxy", {}).setdefault(prompt, []).append(proxy)
        if row["gold"] is not None:
            by_metric.setdefault("gold", {}).setdefault(prompt, []).append(row["gold"])

    scores = {}
    for key, by_prompt in by_metric.items():
        scores[key] = torch.tensor(list(by_prompt.values()), dtype=torch.float64)
    return scores


def win_rate(a: Tensor, b: Tensor) -> float:
    """The share of the pairs of answers to one prompt that A wins, ties half.

    a [P, K], b [P, J]: scores of A's and of B's answers to the same prompts.
    """
    # Every answer of A meets every answer of B: that has less noise than K random pairs.
    a, b = torch.broadcast_tensors(a[:, :, None], b[:, None])  # [P, K, J]
    return pair_wins(a.flatten(), b.flatten()).mean().item()


def kl_of(a, name: str, seed: int, part: str) -> float:
    """The KL to SFT in nats.

    That of best-of-n is its formula's; that of PPO was measured on the run's own prompts of a
    split, after training.
    """
    if name == SFT:
        return 0.0
    if name == BON:
        return bon_kl(a.n)
    path = Path(ppo_folder(a, name, seed), "summary.json")
    summary = json.loads(path.read_text())
    key = "kl"
    if part != names_of_splits(a)[0]:
        key = f"{part}/kl"
    return summary["after"][key]


def k1_at_kl(rows: dict[str, dict], kl: float, column: str) -> float | None:
    """What k1 has in a column at some KL, between its cells and SFT; None for a KL beyond them."""
    # Every run starts from SFT, so SFT is a point at KL 0.
    points = []
    for name, row in rows.items():
        if name == SFT or name.startswith("k1_"):
            points.append((row["KL"], row[column]))
    return value_at_kl(sorted(points), kl)


# --------------------------------------------------------------------------------------- all seeds


def compare_seeds(a, seeds: list[dict]) -> dict[str, dict]:
    """measure_seed() of all seeds -> tables {title: {row: {column: [one number a seed]}}}.

    A seed that has no number for a cell of a table is left out there. All comparisons are made
    within a seed.
    """
    first, *others = names_of_splits(a)
    tables = {}
    for part in (first, *others):
        tables |= tables_of_split(a, part, [seed[part] for seed in seeds])
    # The gap compares every other split with the first, which is in distribution.
    for other in others:
        tables |= tables_of_gap(a, first, other, seeds)
    return tables


def tables_of_split(a, part: str, seeds: list[dict]) -> dict[str, dict]:
    """The tables of one split. seeds: {system: {column: number}} of each."""
    names = list(list_systems(a))
    # Each system's numbers, and their differences from SFT's, which are taken seed by seed.
    whole = {}
    less_sft = {}
    for name in names:
        whole[name] = collect(seed[name] for seed in seeds)
        if name != SFT:
            less_sft[name] = collect(subtract(seed[name], seed[SFT]) for seed in seeds)

    # What the coefficient does: the strongest penalty less the weakest one.
    ends = {}
    for kind in a.kinds:
        strongest = name_cell(kind, max(a.kl_coef))
        weakest = name_cell(kind, min(a.kl_coef))
        ends[kind] = collect(subtract(seed[strongest], seed[weakest]) for seed in seeds)
    tables = {
        part: whole,
        f"{part}, less SFT": less_sft,
        f"{part}, largest less smallest coefficient": ends,
    }
    if not set(KINDS) <= set(a.kinds):
        return tables

    # What the kind of KL does, at the same coefficient and at the same distance from SFT.
    same_coefficient = {}
    same_kl = {}
    for coefficient in a.kl_coef:
        k1 = name_cell("k1", coefficient)
        k2 = name_cell("k2", coefficient)
        same_coefficient[k2] = collect(subtract(seed[k2], seed[k1]) for seed in seeds)
        same_kl[k2] = collect(less_at_its_kl(seed, k2) for seed in seeds)
    tables[f"{part}, k2 less k1 at the same coefficient"] = same_coefficient
    tables[f"{part}, k2 less k1 at k2's KL"] = same_kl
    return tables


def tables_of_gap(a, first: str, other: str, seeds: list[dict]) -> dict[str, dict]:
    """The generalisation gap, the first split less another one, and what it is beyond SFT's gap."""
    # Gaps are differences of scores, so only the columns of scores have one. Gold may be missing.
    columns = []
    for column in ("proxy", "gold", "win proxy", "win gold"):
        if column in seeds[0][first][SFT]:
            columns.append(column)

    gaps = {}  # {system: the gaps of each seed}
    for name in list_systems(a):
        gaps[name] = []
        for seed in seeds:
            inside = {column: seed[first][name][column] for column in columns}
            gaps[name].append(subtract(inside, seed[other][name]))

    # If the other prompts are harder, SFT has a gap too. Training explains only what is beyond it.
    whole = {}
    less_sft = {}
    for name, seed_gaps in gaps.items():
        whole[name] = collect(seed_gaps)
        if name != SFT:
            less_sft[name] = collect(subtract(x, y) for x, y in zip(seed_gaps, gaps[SFT]))
    title = f"gap, {first} less {other}"
    return {title: whole, f"{title}, less SFT's": less_sft}


def subtract(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """a less b, for each column of a."""
    return {column: a[column] - b[column] for column in a}


def less_at_its_kl(rows: dict[str, dict], name: str) -> dict[str, float | None]:
    """A cell of k2 less what k1 has at that cell's KL.

    So both policies have moved as far from SFT. None where k1 has not moved so far.
    """
    row = rows[name]
    differences = {}
    for column, number in row.items():
        if column == "KL":
            continue
        k1 = k1_at_kl(rows, row["KL"], column)
        differences[column] = None
        if k1 is not None:
            differences[column] = number - k1
    return differences


# ------------------------------------------------------------------------------ tables and picture


def transpose(rows: dict[str, dict]) -> dict[str, dict]:
    """{row: {column: numbers}} -> {column: {row: numbers}}"""
    columns = {}
    for name, row in rows.items():
        for column, numbers in row.items():
            columns.setdefault(column, {})[name] = numbers
    return columns


def draw(figure, tables: dict[str, dict]):
    """Win rate over SFT against per-input EAD: a panel a split, a marker a system.

    The bars are 95% intervals over seeds.
    """
    # The tables of splits are named by the split alone; all others have a comma in their titles.
    parts = [title for title in tables if "," not in title]
    figure.set_size_inches(4.6 * len(parts), 4.2)
    axes = figure.subplots(1, len(parts), sharex=True, sharey=True, squeeze=False)[0]
    for axis, part in zip(axes, parts):
        won = "win proxy"
        if "win gold" in tables[part][SFT]:
            won = "win gold"
        for i, (group, rows) in enumerate(group_cells(tables[part]).items()):
            draw_group(axis, group, rows, won, i)
        axis.axhline(0.5, color="grey", linewidth=0.8)
        axis.set(title=part, xlabel="diversity: EAD of the answers to one prompt")
    axes[0].set_ylabel(f"win rate over SFT ({won.removeprefix('win ')})")
    axes[-1].legend()


def group_cells(table: dict[str, dict]) -> dict[str, dict]:
    """{system: row} -> {group: {system: row}}: the cells of a kind of KL are one group."""
    groups = {}
    for name, row in table.items():
        group = name
        if is_cell(name):
            group = name.partition("_")[0]
        groups.setdefault(group, {})[name] = row
    return groups


def is_cell(name: str) -> bool:
    """Whether a system is a cell of PPO."""
    return name.startswith(KINDS)


def draw_group(axis, group: str, rows: dict[str, dict], won: str, number: int):
    """The systems of a group: a line through their markers, and at each cell its coefficient."""
    # [(mean, half-width) of each system]: the means place a marker, the half-widths are its bars.
    diversity = [t_interval(row["in EAD"]) for row in rows.values()]
    wins = [t_interval(row[won]) for row in rows.values()]
    x, x_half_widths = zip(*diversity)
    y, y_half_widths = zip(*wins)

    names = {SFT: "SFT", BON: "best-of-n"}
    axis.errorbar(
        x,
        y,
        yerr=y_half_widths,
        xerr=x_half_widths,
        marker="osD^v"[number % 5],
        color=f"C{number}",
        linewidth=1,
        elinewidth=0.7,
        label=names.get(group, f"PPO, {group}"),
    )
    for name, *place in zip(rows, x, y):
        coefficient = ""
        if is_cell(name):
            coefficient = name.partition("_")[2]
        axis.annotate(coefficient, place, (4, 4), textcoords="offset points", fontsize=7)


# --------------------------------------------------------------------------------------- the study


def main(args=None):
    """Run what is not done yet, then print the tables and draw the picture."""
    a = read_settings(args)

    # is_finished() of common.py does not know all files of sample_bon.py: see finished().
    def is_done(command):
        return finished(a, command)

    remarks = describe_own_data(a)
    if a.dry_run:
        print_plan(commands(a), a, remarks, is_done)
        return
    print_remarks(remarks)
    for stage in commands(a):
        run_stage(stage, a.jobs, is_done)

    tables = compare_seeds(a, [measure_seed(a, seed) for seed in range(a.seeds)])
    print(
        f"\nNumbers: {describe_numbers(a)}; {a.prompts} prompts a split, {a.answers} answers to "
        "each."
    )
    for title, rows in tables.items():
        print_title(title, a)
        # There are more metrics than systems, so a line is a metric here, and a column is a system.
        print_table(transpose(rows))
    write_summary(Path(a.output_dir, "summary.json"), {"settings": vars(a), "tables": tables})
    draw_picture(draw, tables, f"{a.output_dir}/generalisation.png")


if __name__ == "__main__":
    with cli.errors_in_one_line():
        main()

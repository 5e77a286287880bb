"""Body of `probe.py evaluate`: how well rewards tell better answers from worse.

It measures them on pairs, RewardBench 2 or RM-Bench. Beside the rewards stands what the length of
an answer alone is worth.

    K rewards side by side, N answers in all, A to one prompt, U units, G subsets or domains

A unit is what belongs together: the pairs of one prompt, or the two halves of a Ties prompt. An
interval is the bootstrap's over units, drawn within their subset or domain. benchmark_scores.py has
the maths, benchmark_files.py the files and their rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from .. import data
from ..chats import show
from ..errors import at_least, require
from ..hf.folders import check_model, context_length
from ..models import load_tokenizer
from ..packing import Answers, pack
from ..rewards import (
    check_reward,
    expand,
    kind_of,
    load_reward,
    reward_names,
    score,
    split_label,
)
from ..runtime.curves import without_common_ends
from ..runtime.distributed import setup
from ..runtime.flags import FORWARD_HELP, HELD_OUT_HELP, ResultFlags, TextFlags, results_in
from ..runtime.locks import unlock_afterwards
from ..runtime.results import results_folder, save
from ..stats import bootstrap, pair_wins
from ..tokens import encode_items
from .benchmark_files import READ, TIES, Item
from .benchmark_scores import (
    hard_normal_easy,
    mean_of_groups,
    shared_credit,
    style_wins,
    ties_score,
    ties_terms,
)

BASELINES = {"longer wins": 1, "shorter wins": -1}  # times the number of characters
STYLES = ("concise", "detailed", "markdown")

# What belongs together, with the scores [K, A] of each prompt's answers.
Unit = list[tuple[Item, Tensor]]
# What a measure_*() function returns: the names of its metrics, and a function that computes them
# for the units that a resample has drawn: their places [u] among all units -> [K, metrics].
Measure = tuple[list[str], Callable[[Tensor], Tensor]]


@dataclass
class EvaluateConfig(TextFlags, ResultFlags):
    """The benchmark: which rewards are measured, on which pairs or prompts"""

    reward_model: list[str] = HfArg(
        default_factory=lambda: ["runs/rm/seed_{seed}"],
        help="rewards, as in train_ppo.py --help; {seed} stands for all that exist",
    )
    benchmark: str = HfArg(
        default="pairs",
        metadata={"choices": tuple(READ)},
        help="what the rows of --dataset are: pairs of answers, or the file of a benchmark",
    )
    eval_dataset: str = HfArg(default="", help=f"pairs: {HELD_OUT_HELP}")
    eval_size: int = HfArg(
        default=512,
        help="pairs: how many, those that train_rm.py held out, if it had the same number and no "
        "--in_distribution (else name --eval_dataset); 0: all rows of --dataset. The benchmarks "
        "are taken whole",
    )
    max_rows: int = HfArg(
        default=0, help="use a random subset of this many prompts (pairs: rows); 0: all"
    )
    max_length: int = HfArg(
        default=0,
        help="tokens in the longest prompt and answer; 0: the reward model's context",
    )
    micro_batch_size: int = HfArg(default=64, help=FORWARD_HELP)
    seed: int = HfArg(default=0, help="the number that the bootstrap's draws depend on")

    dataset: str = HfArg(
        default="world",
        help="the data: a file (.jsonl, .json, .csv, .parquet), a folder as downloaded, the "
        "NAME:SPLIT of a data set for the datasets library, or 'world', the embedded world's pairs "
        "(world:SEED: with another cue)",
    )
    output_dir: str = results_in("runs/probe/evaluate")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "eval_size", "max_rows", "max_length", "seed")
        at_least(self, 1, "micro_batch_size")
        has_file = self.benchmark == "pairs" or not data.is_world(self.dataset)
        require(has_file, f"--benchmark {self.benchmark}: name its file as --dataset")


@unlock_afterwards()
def evaluate(config: EvaluateConfig) -> dict:
    """How often rewards prefer the better of two answers.

    It measures accuracy and margin on pairs, RewardBench 2 or RM-Bench. The
    controls "longer wins" and "shorter wins" rule out that length alone does it.
    Intervals over prompts rule out that a few prompts made the number. The
    differences from the first reward are taken on the same pairs, which rules
    out that one reward had the easier ones. What would refute that a reward
    model knows what is better: "longer wins" is as good, or its accuracy falls
    to chance on prompts that it was not trained on.

    A text that does not fit is cut as in train_rm.py: the prompt on its left,
    then the answer.
    """
    dist = setup(config.device)
    folder = results_folder(config, dist)
    specs = expand(config.reward_model)
    for spec in specs:
        check_reward(spec)

    # The answers of all prompts, one after the other.
    items = data.subset(READ[config.benchmark](config), config.max_rows)
    rows = flatten(items)

    # What each reward, and then each baseline, says of them.
    scores = {}  # {name: [N]}
    cut = {}  # {name: how many answers were too long for the reward}
    for name, spec in zip(reward_names(specs), specs):
        scores[name], cut[name] = scores_of(spec, items, config, dist)
    lengths = torch.tensor([len(row["response"]) for row in rows])
    for name, sign in BASELINES.items():
        scores[name] = sign * lengths

    units = collect_units(items, scores)
    results = compute_metrics(config, list(scores), units)
    summary = {
        "benchmark": config.benchmark,
        "dataset": config.dataset,
        "prompts": len({show(item.prompt) for item in items}),
        "answers": len(rows),
        "units": len(units),
        "cut": cut,
        **results,
    }
    save(config, folder, summary, format_table(summary), draw)
    dist.barrier()
    return summary


def flatten(items: list[Item]) -> list[dict]:
    """Items -> rows {prompt, response}, all answers of an item side by side."""
    rows = []
    for item in items:
        for answer in item.answers:
            rows.append({"prompt": item.prompt, "response": answer})
    return rows


def scores_of(spec: str, items: list[Item], config, dist) -> tuple[Tensor, int]:
    """A reward's name and items -> the scores [N] of all answers, and how many texts were cut.

    All processes call this; each one scores a part of the items.
    """
    # All answers of an item go to one process, so that their prompt is cut alike.
    own_rows = flatten([items[i] for i in dist.part(len(items))])
    # A reward model's own tokenizer decides how much of a text fits.
    tokenizer = None
    if kind_of(spec) == "model":
        path, _ = split_label(spec)
        tokenizer = load_tokenizer(path, needs_eos=False)

    # A reward model reads tokens that fit. Other rewards read plain text, and so does a classifier
    # without EOS, which cuts it itself.
    batch = None
    n_cut = 0
    if tokenizer and tokenizer.eos_token_id is not None:
        longest = config.max_length or context_length(check_model(path))
        encoded = encode_items(tokenizer, own_rows, longest, config.chat_template)
        batch = pack(encoded.prompts, encoded.responses["response"], tokenizer.pad_token_id)
        n_cut = encoded.n_responses_cut

    reward = load_reward(spec, tokenizer, dist, config.micro_batch_size, config.dtype)
    prompts = [row["prompt"] for row in own_rows]
    responses = [row["response"] for row in own_rows]
    answers = Answers(prompts, responses, batch, chat=config.chat_template)
    scores = score(reward, [answers], dist)
    return dist.gather(scores), int(dist.sum(torch.tensor(n_cut)))


def collect_units(items: list[Item], scores: dict[str, Tensor]) -> dict[tuple[str, str], Unit]:
    """Items and the scores {reward: [N]} of all their answers -> {(group, name): unit}."""
    by_reward = torch.stack([values.double() for values in scores.values()])  # [K, N]
    n_answers = [len(item.answers) for item in items]
    by_item = by_reward.split(n_answers, 1)  # [K, A] each
    units = {}
    for item, item_scores in zip(items, by_item):
        units.setdefault((item.group, item.unit), []).append((item, item_scores))
    return units


# ------------------------------------------------------------------------------------ the measures


def compute_metrics(config, rewards: list[str], units: dict[tuple[str, str], Unit]) -> dict:
    """The metrics of all rewards, each with its interval.

    Returns {metrics: their names, rewards: {name: {metric: [value, low, high]}}, differences: the
    same of each reward but the first, less the first}.
    """
    # The group of each unit, by its number.
    names_of_groups = [group for group, _ in units]  # U names, of which G differ
    groups = sorted(set(names_of_groups))
    group_of_unit = torch.tensor([groups.index(group) for group in names_of_groups])  # [U]

    measures = {
        "pairs": measure_pairs,
        "rewardbench2": measure_rewardbench2,
        "rm_bench": measure_rm_bench,
    }
    measure = measures[config.benchmark]
    metrics, statistic = measure(list(units.values()), groups, group_of_unit)

    def values_and_differences(drawn: Tensor) -> Tensor:
        """[2 K, metrics]. Both come from the same draw, so what rewards have in common cancels."""
        values = statistic(drawn.long())  # [K, metrics]
        return torch.cat([values, values - values[:1]])

    # bootstrap() draws from rows of numbers: here the units' places, which come back as float64.
    all_units = torch.arange(len(units))
    values = values_and_differences(all_units)
    low, high = bootstrap(all_units, values_and_differences, seed=config.seed, strata=group_of_unit)
    cells = torch.stack([values, low, high], -1)  # [2 K, metrics, 3]

    # The first K rows are the rewards', the others the differences. Row K, the first reward less
    # itself, says nothing.
    results = [dict(zip(metrics, row)) for row in cells.tolist()]
    k = len(rewards)
    return {
        "metrics": metrics,
        "rewards": dict(zip(rewards, results)),
        "differences": dict(zip(rewards[1:], results[k + 1 :])),
    }


def measure_pairs(units: list[Unit], groups: list[str], group_of_unit: Tensor) -> Measure:
    """Accuracy, a tie counting half, and the mean margin in the reward's own unit.

    units U; groups: G names; group_of_unit [U]: the number of each unit's group -> a measure.
    """
    # The sums of a unit are computed once, so that a resample only has to add them up.
    sums = []
    for unit in units:
        pairs = []
        for _, scores in unit:
            chosen, rejected = scores.T  # [K] each
            wins = pair_wins(chosen, rejected)
            margins = chosen - rejected
            pairs.append(torch.stack([wins, margins], -1))
        sums.append(sum(pairs))  # [K, 2]
    sums = torch.stack(sums)  # [U, K, 2]
    counts = torch.tensor([len(unit) for unit in units]).double()  # [U]

    def statistic(drawn: Tensor) -> Tensor:
        # Prompts are drawn, but the mean is over pairs: a prompt with two pairs weighs double.
        return sums[drawn].sum(0) / counts[drawn].sum()

    return ["accuracy", "margin"], statistic


def measure_rewardbench2(units: list[Unit], groups: list[str], group_of_unit: Tensor) -> Measure:
    """The mean of the subsets' scores, and where there are several subsets each score.

    units U; groups: G names; group_of_unit [U]: the number of each unit's group -> a measure.
    """
    first_unit = units[0]
    _, scores = first_unit[0]
    n_rewards = len(scores)

    # A unit of the subset Ties has terms, any other one has credit; the rest of both stays 0.
    credit = torch.zeros(len(units), n_rewards).double()  # [U, K]
    terms = torch.zeros(len(units), n_rewards, 5).double()  # [U, K, 5]
    known = torch.zeros(len(units), n_rewards, 5).double()  # [U, K, 5]: 0 where a half is missing
    for u, unit in enumerate(units):
        if groups[group_of_unit[u]] == TIES:
            halves = {}
            for item, scores in unit:
                halves[item.half] = split_scores(item, scores)
            terms[u], known[u] = ties_terms(**halves)
        else:
            _, scores = unit[0]
            credit[u] = shared_credit(scores)

    def statistic(drawn: Tensor) -> Tensor:
        # Each subset has a column, computed from those of its units that were drawn.
        columns = []
        for number, group in enumerate(groups):
            drawn_of_group = drawn[group_of_unit[drawn] == number]
            if group == TIES:
                columns.append(ties_score(terms[drawn_of_group], known[drawn_of_group]))  # [K]
            else:
                columns.append(credit[drawn_of_group].mean(0))  # [K]
        overall = torch.stack(columns).mean(0)
        # A single subset's score is the overall one already.
        if len(groups) == 1:
            return torch.stack([overall], -1)
        return torch.stack([overall, *columns], -1)

    if len(groups) == 1:
        return ["overall"], statistic
    return ["overall", *groups], statistic


def measure_rm_bench(units: list[Unit], groups: list[str], group_of_unit: Tensor) -> Measure:
    """Average, hard, normal and easy over domains, the nine cells, and each domain's average.

    units U; groups: G names; group_of_unit [U]: the number of each unit's group -> a measure.
    """
    wins = []
    for unit in units:
        item, scores = unit[0]
        chosen, rejected = split_scores(item, scores)  # [K, 3] each: one answer in each style
        wins.append(style_wins(chosen, rejected))
    wins = torch.stack(wins)  # [U, K, 3, 3]

    def statistic(drawn: Tensor) -> Tensor:
        # [K, 3, 3] over domains, and [G, K, 3, 3], those of each domain.
        mean, by_domain = mean_of_groups(wins[drawn], group_of_unit[drawn])
        levels = hard_normal_easy(mean)  # [K, 3]
        average = levels.mean(1, keepdim=True)  # [K, 1]
        domains = hard_normal_easy(by_domain).mean(-1)  # [G, K]
        return torch.cat([average, levels, mean.flatten(1), domains.T], 1)

    metrics = ["average", "hard", "normal", "easy"]
    for chosen_style in STYLES:
        for rejected_style in STYLES:
            metrics.append(f"{chosen_style} > {rejected_style}")
    for domain in groups:
        metrics.append(f"domain {domain}")
    return metrics, statistic


def split_scores(item: Item, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [K, A] -> those of the correct and of the incorrect answers."""
    return scores[:, : item.correct], scores[:, item.correct :]


# ------------------------------------------------------------------------------- table and picture


def choose_metrics(summary: dict) -> list[str]:
    """The metrics that a line of the table has room for."""
    metrics = []
    for name in summary["metrics"]:
        if " > " not in name and not name.startswith("domain "):
            metrics.append(name)
    return metrics


def format_table(summary: dict) -> str:
    """One line a reward, with intervals and the difference from the first; RM-Bench's matrices."""
    metrics = choose_metrics(summary)
    rewards = summary["rewards"]
    first = next(iter(rewards))
    # All cells are made before any line, since a column is as wide as its widest cell.
    cells = [["", *metrics, f"{metrics[0]} less {first}'s"]]
    for name, row in rewards.items():
        line = [name]
        for metric in metrics:
            line.append("{:.3f} [{:.3f}, {:.3f}]".format(*row[metric]))
        difference = ""
        if name != first:
            numbers = summary["differences"][name][metrics[0]]
            difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*numbers)
        cells.append([*line, difference])

    lines = [
        f"\n{summary['benchmark']}, {summary['dataset']}: {summary['prompts']} prompts, "
        f"{summary['answers']} answers; value [95% interval over prompts]:"
    ]
    lines += align_columns(cells)
    if summary["benchmark"] == "rm_bench":
        for name, row in rewards.items():
            lines += lines_of_styles(name, row)

    cut = [f"{name} {n}" for name, n in summary["cut"].items() if n]
    if cut:
        lines.append(f"  Responses cut to fit: {', '.join(cut)}")
    return "\n".join(lines)


def align_columns(cells: list[list[str]]) -> list[str]:
    """Rows of cells -> lines in which each column is as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        padded = [f"{cell:{width}s}" for cell, width in zip(row, widths)]
        lines.append("  " + "   ".join(padded).rstrip())
    return lines


def lines_of_styles(name: str, row: dict) -> list[str]:
    """RM-Bench's matrix of styles for one reward."""
    styles = ", ".join(STYLES)
    lines = [f"  {name}: how often a chosen style (rows) beats a rejected one ({styles})"]
    for chosen_style in STYLES:
        line = f"    {chosen_style:10s}"
        for rejected_style in STYLES:
            value = row[f"{chosen_style} > {rejected_style}"][0]
            line += f"{value:8.3f}"
        lines.append(line)
    return lines


def draw(figure, summary: dict):
    """Every reward's metrics with their intervals.

    A margin is left out: it has a unit of its own.
    """
    metrics = [name for name in choose_metrics(summary) if name != "margin"]
    rewards = summary["rewards"]
    short_names = without_common_ends(set(rewards))
    axis = figure.add_subplot()
    for i, (name, row) in enumerate(rewards.items()):
        # The rewards stand beside each other, around the place of the metric.
        shift = 0.8 * ((i + 0.5) / len(rewards) - 0.5)
        places = [place + shift for place in range(len(metrics))]
        values, low, high = zip(*(row[metric] for metric in metrics))
        below = [value - end for value, end in zip(values, low)]
        above = [end - value for value, end in zip(values, high)]

        colour = f"C{i % 10}"
        if name in BASELINES:
            colour = "grey"
        marker = "o"
        if name == "longer wins":
            marker = "s"
        label = short_names[name] or name
        axis.errorbar(
            places, values, yerr=[below, above], fmt=marker, capsize=2, color=colour, label=label
        )
    axis.set_xticks(range(len(metrics)), metrics)
    axis.set(ylabel="accuracy", ylim=(0, 1.02))
    axis.legend()

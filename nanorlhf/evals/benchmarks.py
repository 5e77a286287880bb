"""Body of `probe.py evaluate`: how good rewards are at telling better answers from worse, on pairs, RewardBench 2 and RM-Bench.

    K rewards side by side, N answers in all, A to one prompt, U units, G subsets or domains

An interval is the bootstrap's over units within their subset or domain: a unit is what belongs together, the pairs of one prompt or the
two halves of a Ties prompt. Beside the rewards stands what an answer's length alone is worth. Maths: benchmark_scores.py; the files
and their rows: benchmark_files.py.
"""

from dataclasses import dataclass

import torch
from transformers.hf_argparser import HfArg

from .. import data
from ..errors import at_least, require
from ..hf.folders import check_model, context_length
from ..models import load_tokenizer
from ..packing import Answers, pack
from ..rewards import check_reward, expand, kind_of, load_reward, reward_names, score
from ..runtime import plots
from ..runtime.distributed import setup
from ..runtime.flags import ResultFlags, TextFlags
from ..runtime.locks import unlock_afterwards
from ..runtime.results import results_folder, save
from ..stats import bootstrap, pair_wins
from .benchmark_files import READ, TIES
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
    eval_dataset: str = HfArg(
        default="",
        help="pairs: the held-out data; without it, rows of --dataset are held out, by their "
        "prompts",
    )
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
    micro_batch_size: int = HfArg(
        default=64, help="answers that a reward model scores in one forward pass"
    )
    seed: int = HfArg(default=0, help="the number that the bootstrap's draws depend on")

    dataset: str = HfArg(
        default="world",
        help="the data: FILE.jsonl, .json or .parquet, the name[:split] of a data set for the "
        "datasets library, or 'world', the embedded world's pairs (world:SEED: with another cue)",
    )
    output_dir: str = HfArg(
        default="runs/probe/evaluate", help="the folder that the results are written to"
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "eval_size", "max_rows", "max_length", "seed")
        at_least(self, 1, "micro_batch_size")
        require(self.benchmark == "pairs" or not data.is_world(self.dataset), f"--benchmark {self.benchmark}: name its file as --dataset")


@unlock_afterwards()
def evaluate(config):
    """How often rewards prefer the better of two answers.

    Accuracy and margin on pairs, RewardBench 2 or RM-Bench, with intervals
    over prompts. A text that does not fit is cut as in train_rm.py: the
    prompt on its left, then the answer.

    Pitfall: an accuracy alone says little, since "longer wins" may be as
    good; and a reward model knows the prompts that it was trained on.
    """
    dist = setup(config.device)
    folder = results_folder(config, dist)
    specs = expand(config.reward_model)
    for spec in specs:
        check_reward(spec)
    items = data.subset(READ[config.benchmark](config), config.max_rows)
    rows = [{"prompt": item.prompt, "response": answer} for item in items for answer in item.answers]
    scores, cut = {}, {}
    for name, spec in zip(reward_names(specs), specs):
        scores[name], cut[name] = scores_of(spec, rows, config, dist)
    lengths = torch.tensor([len(row["response"]) for row in rows])
    scores |= {name: sign * lengths for name, sign in BASELINES.items()}
    parts = torch.stack([x.double() for x in scores.values()]).split([len(item.answers) for item in items], 1)  # [K, A] each
    units = {}
    for item, part in zip(items, parts):
        units.setdefault((item.group, item.unit), []).append((item, part))
    results = with_intervals(config, list(scores), list(units.values()), [group for group, _ in units])
    summary = {"benchmark": config.benchmark, "dataset": config.dataset, "prompts": len({item.prompt for item in items}),
               "answers": len(rows), "units": len(units), "cut": cut, **results}  # fmt: skip
    save(config, folder, summary, table(summary), draw)
    dist.barrier()
    return summary


def scores_of(spec, rows, config, dist):
    """A reward's name and N rows {prompt, response} -> scores [N], and how many responses had to be cut for it."""
    mine = [rows[i] for i in dist.part(len(rows))]
    batch, cut = None, 0
    tokenizer = load_tokenizer(spec, needs_eos=False) if kind_of(spec) == "model" else None
    if tokenizer and tokenizer.eos_token_id is not None:  # a classifier without EOS reads, and cuts, plain text
        longest = config.max_length or context_length(check_model(spec))
        prompts, responses, cut = data.encode(tokenizer, mine, "response", longest, config.chat_template)
        batch = pack(prompts, responses, tokenizer.pad_token_id)
    reward = load_reward(spec, tokenizer, dist, config.micro_batch_size, config.dtype)
    answers = Answers([row["prompt"] for row in mine], [row["response"] for row in mine], batch)
    return dist.gather(score(reward, [answers], dist)), int(dist.sum(torch.tensor(cut)))


# ------------------------------------------------------------------------------------------------------------------------ the measures


def with_intervals(config, rewards, units, groups):
    """{metrics, rewards: {name: {metric: [value, low, high]}}, differences: the same, less the first reward's}"""
    names = sorted(set(groups))
    index = torch.tensor([names.index(group) for group in groups])  # [U]
    measure = {"pairs": measure_pairs, "rewardbench2": measure_rewardbench2, "rm_bench": measure_rm_bench}[config.benchmark]
    metrics, statistic = measure(units, names, index)

    def both(rows):
        x = statistic(rows.long())  # [K, metrics]
        return torch.cat([x, x - x[:1]])

    everything, k = torch.arange(len(units)), len(rewards)
    cells = torch.stack([both(everything), *bootstrap(everything, both, seed=config.seed, strata=index)], -1)  # [2 K, metrics, 3]
    found = [dict(zip(metrics, row)) for row in cells.tolist()]
    return {"metrics": metrics, "rewards": dict(zip(rewards, found)), "differences": dict(zip(rewards[1:], found[k + 1 :]))}


# A measure: units [U], each a list of (Item, scores [K, A]), the groups' names [G] and each unit's group [U] -> the names of its metrics,
# and a function of rows [u], places of units, that gives them: [K, metrics].


def measure_pairs(units, names, index):
    """Accuracy, a tie counting half, and the mean margin in the reward's own unit."""
    sums = torch.stack([sum(torch.stack([pair_wins(*s.T), s[:, 0] - s[:, 1]], -1) for _, s in unit) for unit in units])  # [U, K, 2]
    counts = torch.tensor([len(unit) for unit in units]).double()
    return ["accuracy", "margin"], lambda rows: sums[rows].sum(0) / counts[rows].sum()


def measure_rewardbench2(units, names, index):
    """The mean of the subsets' scores, and where there are several each of them."""
    of_ties = [names[g] == TIES for g in index]
    k = len(units[0][0][1])
    credit, terms, known = torch.zeros(len(units), k).double(), *torch.zeros(2, len(units), k, 5).double()
    for u, unit in enumerate(units):
        if of_ties[u]:
            terms[u], known[u] = ties_terms(**{item.half: halves(item, s) for item, s in unit})
        else:
            credit[u] = shared_credit(unit[0][1])

    def statistic(rows):
        columns = []
        for g, name in enumerate(names):
            some = rows[index[rows] == g]
            columns.append(ties_score(terms[some], known[some]) if name == TIES else credit[some].mean(0))  # [K]
        return torch.stack([torch.stack(columns).mean(0), *(columns if len(names) > 1 else [])], -1)

    return ["overall", *(names if len(names) > 1 else [])], statistic


def measure_rm_bench(units, names, index):
    """Average, hard, normal and easy over domains, the nine cells, and each domain's average."""
    wins = torch.stack([style_wins(*halves(*unit[0])) for unit in units])  # [U, K, 3, 3]

    def statistic(rows):
        mean, by_domain = mean_of_groups(wins[rows], index[rows])  # [K, 3, 3], [G, K, 3, 3]
        levels = hard_normal_easy(mean)  # [K, 3]
        return torch.cat([levels.mean(1, keepdim=True), levels, mean.flatten(1), hard_normal_easy(by_domain).mean(-1).T], 1)

    cells = [f"{a} > {b}" for a in STYLES for b in STYLES]
    return ["average", "hard", "normal", "easy", *cells, *(f"domain {name}" for name in names)], statistic


def halves(item, scores):
    """Scores [K, A] -> those of the correct and of the incorrect answers."""
    return scores[:, : item.correct], scores[:, item.correct :]


# ------------------------------------------------------------------------------------------------------------------- table and picture


def shown(summary):
    """The metrics that a line of the table has room for."""
    return [name for name in summary["metrics"] if " > " not in name and not name.startswith("domain ")]


def table(summary):
    """One line a reward, with intervals and the difference from the first; and RM-Bench's matrices."""
    names, rows, first = shown(summary), summary["rewards"], next(iter(summary["rewards"]))
    cells = [["", *names, f"{names[0]} less {first}'s"]]
    for name, row in rows.items():
        less = "" if name == first else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*summary["differences"][name][names[0]])
        cells.append([name, *("{:.3f} [{:.3f}, {:.3f}]".format(*row[metric]) for metric in names), less])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [f"\n{summary['benchmark']}, {summary['dataset']}: {summary['prompts']} prompts, {summary['answers']} answers; "
             "value [95% interval over prompts]:"]  # fmt: skip
    lines += ["  " + "   ".join(f"{cell:{width}s}" for cell, width in zip(line, widths)).rstrip() for line in cells]
    for name, row in rows.items() if summary["benchmark"] == "rm_bench" else ():
        lines.append(f"  {name}: how often a chosen style (rows) beats a rejected one ({', '.join(STYLES)})")
        lines += [f"    {a:10s}" + "".join(f"{row[f'{a} > {b}'][0]:8.3f}" for b in STYLES) for a in STYLES]
    cut = ", ".join(f"{name} {n}" for name, n in summary["cut"].items() if n)
    return "\n".join(lines + [f"  Responses cut to fit: {cut}"] * bool(cut))


def draw(figure, summary):
    """Every reward's metrics with their intervals; a margin, which has a unit of its own, is left out."""
    names, rewards = [name for name in shown(summary) if name != "margin"], summary["rewards"]
    axis, short = figure.add_subplot(), plots.without_common_ends(set(rewards))
    for i, (name, row) in enumerate(rewards.items()):
        value, low, high = zip(*(row[metric] for metric in names))
        x = [j + 0.8 * ((i + 0.5) / len(rewards) - 0.5) for j in range(len(names))]
        ends = [[v - a for v, a in zip(value, low)], [b - v for v, b in zip(value, high)]]
        colour = "grey" if name in BASELINES else f"C{i % 10}"
        axis.errorbar(x, value, yerr=ends, fmt="s" if name == "longer wins" else "o", capsize=2, color=colour, label=short[name] or name)
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="accuracy", ylim=(0, 1.02))
    axis.legend()

"""Body of `probe.py judge`: how often the answers of one system, A, beat those of another, B.

    rows of A, rows of B -> pairs of answers to one prompt -> judge (judges.py)
                         -> A's points: 1 a win, 1/2 a tie, 0 a loss

    N pairs of answers

Both systems have answered the same prompts.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from ..chats import read_prompt, show
from ..errors import at_least, require
from ..rewards import expand
from ..runtime.distributed import setup
from ..runtime.endpoint import check_endpoint, is_endpoint
from ..runtime.files import read_file, write_json
from ..runtime.flags import DEVICE_HELP, DEVICES, FORWARD_HELP, EndpointFlags
from ..runtime.hints import check_made
from ..runtime.locks import unlock_afterwards
from ..runtime.results import results_folder, save
from ..stats import mean_over_groups, pair_wins, percentiles
from .judges import by_language_model, by_rewards, check_judge, is_language_model

LONGER = "the longer one"  # a judge for comparison, in every table


@dataclass
class JudgeConfig(EndpointFlags):
    """Answers and judges: whose answers are compared, and by whom"""

    a: list[str] = HfArg(
        kw_only=True,
        help="system A's answers: JSONL {prompt, response[, split]}, such as eval/step_N.jsonl of "
        "PPO and best_of_n.jsonl; several files are read one after the other; SPLIT=FILE names "
        "their split",
    )
    b: list[str] = HfArg(kw_only=True, help="system B's answers to the same prompts")
    judge: list[str] = HfArg(
        default_factory=lambda: ["world:gold"],
        help="one judge or several: any reward (see train_ppo.py --help); llm:FOLDER, a language "
        "model; http://HOST/v1, an OpenAI-compatible endpoint (its key: OPENAI_API_KEY)",
    )
    judge_model: str = HfArg(default="", help="the model's name at the endpoint")
    criterion: str = HfArg(
        default="how well they do what the prompt asks, and how well they are written",
        help="what a language model is told to judge by",
    )
    n_answers: int = HfArg(
        default=0, help="at most so many answers to a prompt, the first ones; 0: all"
    )
    answer_tokens: int = HfArg(
        default=16,
        help="tokens in a language model's longest reply; one that thinks aloud needs more",
    )
    forced_choice: bool = HfArg(
        default=False,
        help="llm:FOLDER: take the likelier of 1 and 2 as its choice, instead of a reply; small "
        "models seldom reply with a number",
    )
    parallel: int = HfArg(default=1, help="requests to an endpoint at a time")
    requests_per_minute: float = HfArg(
        default=0,
        metadata={"may_be_infinite": True},
        help="at most so many requests to an endpoint a minute; 0: as fast as it answers",
    )
    micro_batch_size: int = HfArg(default=64, help=FORWARD_HELP)
    output_dir: str = HfArg(
        default="runs/probe/judge",
        help="the folder that the results, and scores and choices, are written to",
    )
    device: str = HfArg(default="auto", metadata=dict(DEVICES), help=DEVICE_HELP)

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "n_answers", "requests_per_minute")
        slow = 0 < self.requests_per_minute < 1 / (24 * 60)
        require(not slow, "--requests_per_minute must be 0, or at least one request a day")
        at_least(self, 1, "answer_tokens", "parallel", "micro_batch_size")
        require(self.judge, "--judge names no judge")
        for spec in self.judge:
            if is_endpoint(spec):
                check_endpoint("--judge", spec)

        # {seed} in a judge's name stands for all that exist. One that is named twice judges once.
        judges = []
        for given in self.judge:
            judges += expand([given])
        self.judge = list(dict.fromkeys(judges))


@unlock_afterwards()
def judge(config: JudgeConfig) -> dict:
    """How often A's answers are better than B's.

    It measures, for each judge, how often A's answer to a prompt is better than
    B's, a tie counting half. The interval over prompts rules out that a few
    prompts decide. The control "the longer one", a judge of length alone, rules
    out that length does it, and each answer standing first once rules out a
    language model's taste for the first place. A second judge, which A was not
    trained on, rules out that one judge is fooled. What would refute that A is
    better: the interval holds 50%, or only the judge that A was trained on says
    so.

    Beside each win rate stand the shares of wins, ties and losses, how often the
    longer answer won, for a reward the mean difference of its scores, for a
    language model how often it chose the answer that stood first. Where rows name
    their splits, each split has its own win rate, and the first less each other
    one is the generalisation gap. Prompts that only one system answered are left
    out and counted. Pitfall: an answer that was cut off at its longest is judged
    as a text like any other.
    """
    dist = setup(config.device)
    require(dist.world == 1, "probe.py judge runs on one process")
    folder = results_folder(config, dist)
    for spec in config.judge:
        check_judge(config, spec)

    answers_a = read_answers(config.a, config.n_answers)
    answers_b = read_answers(config.b, config.n_answers)
    rows, counts = match_answers(answers_a, answers_b)
    # The config is written before any judge is asked: choices come one by one into this folder, and
    # it must say whose they are even if the run is cut off.
    os.makedirs(config.output_dir, exist_ok=True)
    write_json(os.path.join(config.output_dir, "config.json"), folder.config)

    judges, problems = ask_judges(config, rows, dist)
    n_pairs = sum(len(row["a"]) for row in rows)
    summary = {"a": config.a, "b": config.b, **counts, "pairs": n_pairs, "judges": judges}
    save(config, folder, summary, format_table(summary), draw)
    # What has been judged is written first: a judge that failed spoils no other.
    require(not problems, "; ".join(problems))
    return summary


def ask_judges(config: JudgeConfig, rows: list[dict], dist) -> tuple[dict, list[str]]:
    """Have the rows of match_answers() judged.

    Returns {judge: what summarise_judge() says, and a language model's notes}, and the reasons of
    those language models that stopped answering.
    """
    # From here on there is one row for each pair of answers.
    pairs = []  # (prompt, A's answer, B's answer)
    prompts = []  # the number of its prompt
    splits = []
    for number, row in enumerate(rows):
        for a, b in zip(row["a"], row["b"]):
            pairs.append((row["prompt"], a, b))
            prompts.append(number)
            splits.append(row["split"])
    prompts = torch.tensor(prompts)  # [N]
    words_a = torch.tensor([len(a.split()) for _, a, _ in pairs])  # [N]
    words_b = torch.tensor([len(b.split()) for _, _, b in pairs])  # [N]
    lengths = [words_a, words_b]

    # All rewards score in one go, which keeps what they have scored.
    rewards = [spec for spec in config.judge if not is_language_model(spec)]
    scores = by_rewards(rewards, rows, config, dist)

    judges = {LONGER: summarise_judge(words_a, words_b, lengths, prompts, splits)}
    problems = []
    for spec in config.judge:
        if is_language_model(spec):
            verdicts, notes, problem = by_language_model(spec, pairs, config, dist)
            # A verdict is above 0 where A is better, so B's score is 0.
            zeros = torch.zeros(len(pairs))
            judges[spec] = summarise_judge(verdicts, zeros, lengths, prompts, splits) | notes
            if problem:
                problems.append(problem)
        else:
            a, b = scores[spec]
            judges[spec] = summarise_judge(a, b, lengths, prompts, splits, scored=True)
    return judges, problems


# --------------------------------------------------------------------------------------- the pairs


def read_answers(files: list[str], limit: int) -> dict[str, dict]:
    """Files of rows {prompt, response[, split]} -> {prompt as text: {prompt, split, responses}}.

    A prompt keeps its first `limit` answers in the files' order; 0: all. SPLIT=FILE names the split
    of all rows of a file. InputError: a row is no such object, or a prompt is in two splits.
    """
    answers = {}
    for spec in files:
        # A file whose own name has a = in it is that file.
        split_of_file = ""
        path = spec
        if not os.path.isfile(spec):
            split_of_file, _, path = spec.rpartition("=")
        check_made(path)

        for place, row in read_file(path):
            is_answer = (
                isinstance(row, dict)
                and isinstance(row.get("prompt"), str | list)
                and isinstance(row.get("response"), str)
            )
            require(
                is_answer,
                f"{place}: a row must be an object with prompt and response, both strings "
                "(or the prompt a list of messages)",
            )
            # The prompt as text matches answers; rewards get it as it came, text or chat.
            chat_or_text = read_prompt(place, row["prompt"])
            prompt = show(chat_or_text)
            split = split_of_file or str(row.get("split") or "")
            new_entry = {"prompt": chat_or_text, "split": split, "responses": []}
            entry = answers.setdefault(prompt, new_entry)
            require(
                entry["split"] == split,
                f"{place}: the prompt {prompt[:40]!r} is in the splits "
                f"{entry['split']!r} and {split!r}",
            )
            entry["responses"].append(row["response"])

    if limit:
        for entry in answers.values():
            entry["responses"] = entry["responses"][:limit]
    return answers


def match_answers(a: dict[str, dict], b: dict[str, dict]) -> tuple[list[dict], dict[str, int]]:
    """Answers of A and of B, as read_answers() returns them -> the prompts that both have answered.

    Returns rows {prompt, split, a: [answers], b: [as many]}, and how many prompts were answered by
    both systems, by A alone and by B alone. InputError: a prompt has more answers by one system, or
    is in two splits; no prompt was answered by both.
    """
    rows = []
    for prompt in a:
        if prompt not in b:
            continue
        answers_a = a[prompt]["responses"]
        answers_b = b[prompt]["responses"]
        require(
            len(answers_a) == len(answers_b),
            f"the prompt {prompt[:40]!r} has {len(answers_a)} answers in --a and "
            f"{len(answers_b)} in --b (limit them: --n_answers)",
        )
        # It is enough that one of the two names the split.
        splits = {a[prompt]["split"], b[prompt]["split"]} - {""}
        require(
            len(splits) < 2,
            f"the prompt {prompt[:40]!r} is in the splits {' and '.join(sorted(splits))}",
        )
        split = "".join(splits) or "all"
        chat_or_text = a[prompt]["prompt"]
        rows.append({"prompt": chat_or_text, "split": split, "a": answers_a, "b": answers_b})

    require(
        rows,
        f"no prompt of --a is in --b: they begin with {next(iter(a))[:40]!r} "
        f"and {next(iter(b))[:40]!r}",
    )
    counts = {"prompts": len(rows), "only_a": len(a) - len(rows), "only_b": len(b) - len(rows)}
    return rows, counts


# ------------------------------------------------------------------------------------- the results


def summarise_judge(
    a: Tensor,
    b: Tensor,
    lengths: list[Tensor],
    prompts: Tensor,
    splits: list[str],
    scored: bool = False,
) -> dict:
    """Win rates of A over B by one judge, for each split, and the gaps between splits.

    a, b [N]: scores of A's and B's answers, nan where a pair is not judged; lengths: words of A's
    and of B's answers [N] each; prompts [N]: which pairs have the same prompt; splits: N names.
    scored: whether the scores have a unit, so that their mean difference says something.

    Returns {"splits": {split: win rate and more}, "gap": {other split: first less other}}. A split
    without a judged pair has its number of pairs, 0, and no gap.
    """
    # A pair without a verdict is left out, not counted as a tie.
    is_judged = ~(a.isnan() | b.isnan())
    rows = {}
    draws = {}  # {split: [resamples] of its win rate}
    # Each split has a seed of its own: the gap is between two independent samples.
    for seed, split in enumerate(dict.fromkeys(splits)):
        in_split = torch.tensor([name == split for name in splits])
        judged_pairs = (is_judged & in_split).nonzero()[:, 0]
        rows[split] = {"pairs": len(judged_pairs)}
        if len(judged_pairs) == 0:
            continue
        split_a = a[judged_pairs]
        split_b = b[judged_pairs]
        split_prompts = prompts[judged_pairs]
        split_lengths = [words[judged_pairs] for words in lengths]
        row, draws[split] = summarise_split(split_a, split_b, split_lengths, split_prompts, seed)
        rows[split] |= row
        if scored:
            mean, draws_of_mean = mean_over_groups(split_a - split_b, split_prompts, seed=seed)
            rows[split]["difference"] = mean.item()
            rows[split]["difference_interval"] = percentiles(draws_of_mean).tolist()

    # The first split less each other one, such as in distribution less out of distribution.
    gaps = {}
    first = next(iter(rows))
    if first in draws:
        for other in draws:
            if other != first:
                gap = rows[first]["win_rate"] - rows[other]["win_rate"]
                interval = percentiles(draws[first] - draws[other]).tolist()
                gaps[other] = {"gap": gap, "interval": interval}
    return {"splits": rows, "gap": gaps}


def summarise_split(
    a: Tensor, b: Tensor, lengths: list[Tensor], prompts: Tensor, seed: int
) -> tuple[dict, Tensor]:
    """The judged pairs of one split -> its win rate and more, and draws of the win rate."""
    points = pair_wins(a, b)  # [N]
    # Answers to one prompt are not independent, so whole prompts are drawn, with all their pairs.
    rate, draws = mean_over_groups(points, prompts, seed=seed)
    row = {
        "win_rate": rate.item(),
        "interval": percentiles(draws).tolist(),
        "prompts": len(prompts.unique()),
        "wins": share_of(points, 1),
        "ties": share_of(points, 0.5),
        "losses": share_of(points, 0),
        "length": [words.double().mean().item() for words in lengths],
    }

    # The points of the longer answer, in pairs of which one is longer.
    a_longer = pair_wins(*lengths)  # [N]: 1 where A's is longer, 1/2 where both are as long
    points_of_longer = torch.where(a_longer == 1, points, 1 - points)[a_longer != 0.5]
    row["longer_won"] = None
    if len(points_of_longer) > 0:
        row["longer_won"] = points_of_longer.mean().item()
    return row, draws


def share_of(points: Tensor, value: float) -> float:
    """The share of the pairs that have so many points."""
    return (points == value).double().mean().item()


# ------------------------------------------------------------------------------- table and picture


def format_table(summary: dict) -> str:
    """One line for each judge and split, and the gaps."""
    systems = f"A {' '.join(summary['a'])}, B {' '.join(summary['b'])}"
    title = f"\n{systems}: {summary['pairs']} pairs, {summary['prompts']} prompts"
    for key, side in (("only_a", "A"), ("only_b", "B")):
        if summary[key]:
            title += f", {summary[key]} prompts only in {side}"

    width = max(len(spec) for spec in summary["judges"])
    header = f"  {'judge':{width}s}  {'split':12s}{'A over B':>8s}  {'95%':14s}"
    lines = [title, header + "   A won    tie  B won   A - B  longer won"]
    for spec, result in summary["judges"].items():
        lines += lines_of_judge(f"  {spec:{width}s}  ", result)

    # The judge of length has judged all pairs, so its splits say how long all answers are.
    splits = summary["judges"][LONGER]["splits"].values()
    means = []
    for side in (0, 1):
        words = sum(row["length"][side] * row["pairs"] for row in splits)
        means.append(words / summary["pairs"])
    lines.append(f"  mean length in words: A {means[0]:.1f}, B {means[1]:.1f}")
    return "\n".join(lines)


def lines_of_judge(start: str, result: dict) -> list[str]:
    """The lines of one judge's results; each begins with `start`, the judge's name."""
    lines = []
    for split, row in result["splits"].items():
        lines.append(start + line_of_split(split, row))
    first = next(iter(result["splits"]))
    for other, row in result["gap"].items():
        low, high = row["interval"]
        lines.append(
            f"{start}gap: {first} less {other} {row['gap']:+.1%} ({low:+.1%} to {high:+.1%})"
        )

    # Notes that a language model alone has.
    if result.get("first_chosen") is not None:
        share = f"{result['first_chosen']:.1%} of {result['questions']} questions"
        lines.append(f"{start}chose the first answer to {share}")
    if result.get("unanswered"):
        reason = result["reasons"][0]
        lines.append(
            f"{start}NOT JUDGED: {result['unanswered']} questions without a choice ({reason})"
        )
    return lines


def line_of_split(split: str, row: dict) -> str:
    """A split and its numbers, in the columns of format_table()."""
    line = f"{split[:11]:12s}"
    if not row["pairs"]:
        return line + "     no pair judged"

    low, high = row["interval"]
    line += f"{row['win_rate']:8.1%}  {low:6.1%} {high:6.1%}  "
    for name in ("wins", "ties", "losses"):
        line += f"{row[name]:7.1%}"
    if "difference" in row:
        line += f"{row['difference']:+8.2f}"
    else:
        line += " " * 8
    if row["longer_won"] is not None:
        line += f"{row['longer_won']:12.1%}"
    return line


def draw(figure, summary: dict):
    """Win rates with their intervals, one colour a split."""
    axis = figure.add_subplot()
    judges = summary["judges"]
    splits = list(judges[LONGER]["splits"])
    for k, split in enumerate(splits):
        # The splits of a judge stand closely below each other, around the judge's own height.
        shift = 0.2 * (k - (len(splits) - 1) / 2)
        heights = []
        rates = []
        intervals = []
        for height, result in enumerate(judges.values()):
            row = result["splits"][split]
            if row["pairs"]:
                heights.append(height + shift)
                rates.append(row["win_rate"])
                intervals.append(row["interval"])
        rates = torch.tensor(rates)
        low, high = torch.tensor(intervals).view(-1, 2).T
        errors = torch.stack([rates - low, high - rates]).clamp(min=0)
        axis.errorbar(rates, heights, xerr=errors, fmt="o", color=f"C{k % 10}", label=split)

    axis.axvline(0.5, color="grey", linewidth=0.8)
    axis.set(
        xlim=(0, 1),
        xlabel="win rate of A over B",
        yticks=range(len(judges)),
        yticklabels=list(judges),
    )
    axis.invert_yaxis()
    axis.legend()

"""Body of `probe.py judge`: how often the answers of one system, A, are better than those of another, B, to the same prompts.

    rows of A, rows of B -> pairs of answers to one prompt -> judge (judges.py) -> A's points: 1 a win, 1/2 a tie, 0 a loss

    N pairs of answers
"""

import os
from dataclasses import dataclass

import torch
from transformers.hf_argparser import HfArg

from ..errors import at_least, require
from ..rewards import expand
from ..runtime.distributed import setup
from ..runtime.endpoint import check_endpoint, is_endpoint
from ..runtime.files import read_file, write_json
from ..runtime.flags import DEVICE_HELP, DEVICES, EndpointFlags
from ..runtime.hints import check_made
from ..runtime.locks import unlock_afterwards
from ..runtime.results import results_folder, save
from ..stats import mean_over_groups, percentiles, win_points
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
    answers: int = HfArg(
        default=0, help="at most so many answers to a prompt, the first ones; 0: all"
    )
    answer_tokens: int = HfArg(
        default=16,
        help="tokens in a language model's longest reply; one that thinks aloud needs more",
    )
    parallel: int = HfArg(default=1, help="requests to an endpoint at a time")
    requests_per_minute: float = HfArg(
        default=0,
        metadata={"may_be_infinite": True},
        help="at most so many requests to an endpoint a minute; 0: as fast as it answers",
    )
    micro_batch_size: int = HfArg(
        default=64, help="texts in one forward pass; it changes memory, not results"
    )
    output_dir: str = HfArg(
        default="runs/probe/judge",
        help="the folder that the results, and scores and choices, are written to",
    )
    device: str = HfArg(default="auto", metadata=dict(DEVICES), help=DEVICE_HELP)

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "answers", "requests_per_minute")
        slow = 0 < self.requests_per_minute < 1 / (24 * 60)
        require(not slow, "--requests_per_minute must be 0, or at least one request a day")
        at_least(self, 1, "answer_tokens", "parallel", "micro_batch_size")
        require(self.judge, "--judge names no judge")
        for spec in self.judge:
            if is_endpoint(spec):
                check_endpoint("--judge", spec)
        self.judge = list(dict.fromkeys(spec for given in self.judge for spec in expand([given])))


@unlock_afterwards()
def judge(config):
    """How often A's answers are better than B's.

    Ties count half; the 95% interval is the bootstrap's over prompts. Beside
    each win rate stand the shares of wins, ties and losses, how often the
    longer answer won, for a reward the mean difference of its scores, for a
    language model how often it chose the answer that stood first. "the
    longer one" is what a judge of length alone would say. Where rows name
    their splits, each split has its own win rate, and the first less each
    other one is the generalisation gap.

    Prompts that only one system answered are left out and counted.
    Pitfall: texts are scored, so an answer that was cut off at its longest
    is closed like any other.
    """
    dist = setup(config.device)
    require(dist.world == 1, "probe.py judge runs on one process")
    folder = results_folder(config, dist)
    for spec in config.judge:
        check_judge(config, spec)
    rows, counts = match(*(read_answers(files, config.answers) for files in (config.a, config.b)))
    os.makedirs(config.output_dir, exist_ok=True)
    write_json(os.path.join(config.output_dir, "config.json"), folder.config)

    pairs = [(row["prompt"], a, b) for row in rows for a, b in zip(row["a"], row["b"])]  # N
    prompts = torch.tensor([i for i, row in enumerate(rows) for _ in row["a"]])  # [N]
    splits = [row["split"] for row in rows for _ in row["a"]]  # [N]
    lengths = [torch.tensor([len(pair[side].split()) for pair in pairs]) for side in (1, 2)]  # [N], in words
    scores = by_rewards([spec for spec in config.judge if not is_language_model(spec)], rows, config, dist)
    judges, problems = {LONGER: results(*lengths, lengths, prompts, splits)}, []
    for spec in config.judge:
        if is_language_model(spec):
            verdicts, notes, problem = by_language_model(spec, pairs, config, dist)
            problems += [problem] if problem else []
            judges[spec] = results(verdicts, torch.zeros(len(pairs)), lengths, prompts, splits) | notes
        else:
            judges[spec] = results(*scores[spec], lengths, prompts, splits, scored=True)
    summary = {"a": config.a, "b": config.b, **counts, "pairs": len(pairs), "judges": judges}
    save(config, folder, summary, table(summary), draw)
    require(not problems, "; ".join(problems))
    return summary


# ------------------------------------------------------------------------------------------------------------------------ the pairs


def read_answers(files, limit):
    """Files of rows {prompt, response[, split]} -> {prompt: {split, responses}}, at most `limit` answers each, in the files' order."""
    found = {}
    for spec in files:
        name, _, path = ("", "", spec) if os.path.isfile(spec) else spec.rpartition("=")
        check_made(path)
        for place, row in read_file(path):
            good = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("prompt", "response"))
            require(good, f"{place}: a row must be an object with prompt and response, both strings")
            split = name or str(row.get("split") or "")
            entry = found.setdefault(row["prompt"], {"split": split, "responses": []})
            same = entry["split"] == split
            require(same, f"{place}: the prompt {row['prompt'][:40]!r} is in the splits {entry['split']!r} and {split!r}")
            entry["responses"].append(row["response"])
    return {prompt: {**entry, "responses": entry["responses"][: limit or None]} for prompt, entry in found.items()}


def match(a, b):
    """The prompts that both have answered: [{prompt, split, a: [answers], b: [as many]}], and counts of those and the others."""
    rows = []
    for prompt in (prompt for prompt in a if prompt in b):
        answers = [side[prompt]["responses"] for side in (a, b)]
        splits = {side[prompt]["split"] for side in (a, b)} - {""}
        n_a, n_b = map(len, answers)
        require(n_a == n_b, f"the prompt {prompt[:40]!r} has {n_a} answers in --a and {n_b} in --b (limit them: --answers)")
        require(len(splits) < 2, f"the prompt {prompt[:40]!r} is in the splits {' and '.join(sorted(splits))}")
        rows.append({"prompt": prompt, "split": "".join(splits) or "all", "a": answers[0], "b": answers[1]})
    require(rows, f"no prompt of --a is in --b: they begin with {next(iter(a))[:40]!r} and {next(iter(b))[:40]!r}")
    return rows, {"prompts": len(rows), "only_a": len(a) - len(rows), "only_b": len(b) - len(rows)}


# ---------------------------------------------------------------------------------------------------------------------- the results


def results(a, b, lengths, prompts, splits, scored=False):
    """Scores of A and B [N], nan where not judged -> {"splits": {name: win rates and more}, "gap": {other split: first less other}}."""
    judged, longer = ~(a.isnan() | b.isnan()), win_points(*lengths)
    out, draws = {"splits": {}, "gap": {}}, {}
    for seed, split in enumerate(dict.fromkeys(splits)):
        own = (judged & torch.tensor([name == split for name in splits])).nonzero()[:, 0]
        row = out["splits"][split] = {"pairs": len(own)}
        if not len(own):
            continue
        points, groups = win_points(a[own], b[own]), prompts[own]
        rate, draws[split] = mean_over_groups(points, groups, seed=seed)
        row |= {"win_rate": rate.item(), "interval": low_and_high(draws[split]), "prompts": len(groups.unique())}
        row |= {name: (points == x).double().mean().item() for name, x in (("wins", 1), ("ties", 0.5), ("losses", 0))}
        row["length"] = [x[own].double().mean().item() for x in lengths]
        of_longer = torch.where(longer[own] == 1, points, 1 - points)[longer[own] != 0.5]  # its points, where one is
        row["longer_won"] = of_longer.mean().item() if len(of_longer) else None
        if scored:
            difference, moved = mean_over_groups(a[own] - b[own], groups, seed=seed)
            row |= {"difference": difference.item(), "difference_interval": low_and_high(moved)}
    first = next(iter(out["splits"]))
    for other in draws if first in draws else ():
        if other != first:
            gap = out["splits"][first]["win_rate"] - out["splits"][other]["win_rate"]
            out["gap"][other] = {"gap": gap, "interval": low_and_high(draws[first] - draws[other])}
    return out


def low_and_high(draws):
    return [x.item() for x in percentiles(draws)]


def table(summary):
    """One line for each judge and split, and the gaps."""
    lines = [f"\nA {' '.join(summary['a'])}, B {' '.join(summary['b'])}: {summary['pairs']} pairs, {summary['prompts']} prompts"]
    lines[0] += "".join(f", {summary[key]} prompts only in {side}" for key, side in (("only_a", "A"), ("only_b", "B")) if summary[key])
    width = max(len(spec) for spec in summary["judges"])
    lines.append(f"  {'judge':{width}s}  {'split':12s}{'A over B':>8s}  {'95%':14s}   A won    tie  B won   A - B  longer won")
    for spec, found in summary["judges"].items():
        for split, row in found["splits"].items():
            text = f"  {spec:{width}s}  {split[:11]:12s}"
            if not row["pairs"]:
                lines.append(text + "     no pair judged")
                continue
            low, high = row["interval"]
            shares = "".join(f"{row[name]:7.1%}" for name in ("wins", "ties", "losses"))
            score = f"{row['difference']:+8.2f}" if "difference" in row else f"{'':8s}"
            longer = "" if row["longer_won"] is None else f"{row['longer_won']:12.1%}"
            lines.append(f"{text}{row['win_rate']:8.1%}  {low:6.1%} {high:6.1%}  {shares}{score}{longer}")
        for other, row in found["gap"].items():
            first, (low, high) = next(iter(found["splits"])), row["interval"]
            lines.append(f"  {spec:{width}s}  gap: {first} less {other} {row['gap']:+.1%} ({low:+.1%} to {high:+.1%})")
        if found.get("first_chosen") is not None:
            lines.append(f"  {spec:{width}s}  chose the first answer to {found['first_chosen']:.1%} of {found['questions']} questions")
        if found.get("unanswered"):
            lines.append(f"  {spec:{width}s}  NOT JUDGED: {found['unanswered']} questions without a choice ({found['reasons'][0]})")
    by_length = summary["judges"][LONGER]["splits"].values()
    words = [sum(row["length"][side] * row["pairs"] for row in by_length) / summary["pairs"] for side in (0, 1)]
    return "\n".join([*lines, f"  mean length in words: A {words[0]:.1f}, B {words[1]:.1f}"])


def draw(figure, summary):
    """Win rates with their intervals, one colour a split."""
    axis, splits = figure.add_subplot(), list(summary["judges"][LONGER]["splits"])
    for k, split in enumerate(splits):
        rows = {spec: found["splits"][split] for spec, found in summary["judges"].items()}
        rows = {spec: row for spec, row in rows.items() if row["pairs"]}
        height = [list(summary["judges"]).index(spec) + 0.2 * (k - (len(splits) - 1) / 2) for spec in rows]
        rates = torch.tensor([row["win_rate"] for row in rows.values()])
        low, high = torch.tensor([row["interval"] for row in rows.values()]).view(-1, 2).T
        errors = torch.stack([rates - low, high - rates]).clamp(min=0)
        axis.errorbar(rates, height, xerr=errors, fmt="o", color=f"C{k % 10}", label=split)
    axis.axvline(0.5, color="grey", linewidth=0.8)
    axis.set(xlim=(0, 1), xlabel="win rate of A over B", yticks=range(len(summary["judges"])), yticklabels=list(summary["judges"]))
    axis.invert_yaxis()
    axis.legend()

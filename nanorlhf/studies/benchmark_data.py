"""RewardBench 2 and RM-Bench as data to learn from, without leaks into the benchmarks.

Half of the questions are learned from, and the other half is kept for the benchmarks. A question
that is in both files is on one side in both; prompts that differ by white space alone are one. The
questions of RewardBench 2's subset Ties, of which two belong together, are always kept.

    prompts.jsonl            {prompt}                      of the questions that are learned from
    demonstrations.jsonl     {prompt, response}            their right answers
    pairs.jsonl              {prompt, chosen, rejected}    a right answer and a wrong one
    texts.jsonl              {prompt, response}            all their answers
    held_out_prompts.jsonl   {prompt}                      of the questions that are kept
    rewardbench2.jsonl, rm_bench.jsonl                     their rows, as they are in the files
"""

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from ..data import canonical, draw
from ..errors import require
from ..evals.benchmark_files import READ, TIES, Item, get_prompt, read_objects
from ..runtime.files import write_lines


class Sides(NamedTuple):
    """The two sides of the benchmarks. files: {benchmark: its file}."""

    learned: dict[str, list[Item]]  # {benchmark: questions to learn from}
    kept: dict[str, list[dict]]  # {benchmark: rows of the file that are kept}


def divide_benchmarks(files: dict[str, str]) -> Sides:
    """Divide the questions of benchmarks, {name as in READ: file}, always in the same way.

    InputError: a file cannot be read, or has too few questions for two sides.
    """
    items = {}
    for name, path in files.items():
        items[name] = READ[name](SimpleNamespace(dataset=path))

    # Each question once, in the order of the files.
    questions = {}
    ties = set()
    for items_of_file in items.values():
        for item in items_of_file:
            question = canonical(item.prompt)
            questions[question] = None
            if item.group == TIES:
                ties.add(question)
    # draw() has a fixed seed: the sides are the same when a study goes on, and for another model.
    kept_questions = set(draw(list(questions), len(questions) // 2)) | ties

    # A question is on the same side in all files.
    learned = {}
    kept_rows = {}
    for name, path in files.items():
        learned[name] = []
        for item in items[name]:
            if canonical(item.prompt) not in kept_questions:
                learned[name].append(item)
        kept_rows[name] = []
        # Rows are kept as they are in the file, so that a benchmark reads them as its own.
        for place, row in read_objects(path):
            if canonical(get_prompt(place, row)) in kept_questions:
                kept_rows[name].append(row)
        enough = learned[name] and kept_rows[name]
        require(enough, f"{path}: too few questions to learn from some and to keep others")
    return Sides(learned, kept_rows)


def describe_sides(sides: Sides) -> str:
    """How many questions and rows are on each side, as a sentence."""
    parts = []
    for name, items in sides.learned.items():
        parts.append(f"{name}: {len(items)} learned from, {len(sides.kept[name])} rows kept")
    return "; ".join(parts)


def write_sides(sides: Sides, folder: str):
    """Write the files that the head of this page lists."""
    # A question that is in both files, or in several rows, is one prompt.
    prompts = {}
    demonstrations = []
    wrong = []
    pairs = []
    for name, items in sides.learned.items():
        # An item has its right answers first, item.correct of them.
        for item in items:
            prompts[canonical(item.prompt)] = {"prompt": item.prompt}
            for answer in item.answers[: item.correct]:
                demonstrations.append({"prompt": item.prompt, "response": answer})
            for answer in item.answers[item.correct :]:
                wrong.append({"prompt": item.prompt, "response": answer})
            pairs += pairs_of(name, item)

    # Policies are evaluated on the kept questions: prompts alone, without the benchmark's answers.
    held_out = {}
    for rows in sides.kept.values():
        for row in rows:
            held_out[canonical(row["prompt"])] = {"prompt": row["prompt"]}

    files = {
        "prompts": prompts.values(),
        "demonstrations": demonstrations,
        "pairs": pairs,
        "texts": demonstrations + wrong,
        "held_out_prompts": held_out.values(),
        **sides.kept,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_lines(f"{folder}/{name}.jsonl", rows)


def pairs_of(benchmark: str, item: Item) -> list[dict]:
    """The pairs of a question: rows {prompt, chosen, rejected}.

    RM-Bench has its answers in three styles, and a pair is of one style. Elsewhere the right answer
    stands against each wrong one.
    """
    right = item.answers[: item.correct]
    wrong = item.answers[item.correct :]
    if benchmark != "rm_bench":
        right = right[:1] * len(wrong)
    pairs = []
    for chosen, rejected in zip(right, wrong, strict=True):
        pairs.append({"prompt": item.prompt, "chosen": chosen, "rejected": rejected})
    return pairs

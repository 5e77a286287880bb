"""Files of reward benchmarks -> prompts with their answers, the right ones first.

    pairs         {prompt, chosen, rejected}                                                          train_rm.py's
    rewardbench2  {id, prompt, chosen: [..], rejected: [..], subset}, the ids of its subset Ties being tied:N and ref:N; or flat, a row
                  for each rejected answer: {question_id, prompt, chosen, rejected}                   allenai/reward-bench-2
    rm_bench      {id, prompt, chosen: [3], rejected: [3], domain}: concise, detailed, detailed with markdown       THU-KEG/RM-Bench
"""

from dataclasses import dataclass

from .. import data
from ..errors import require
from ..splits import load

TIES = "ties"


@dataclass
class Item:
    """A prompt and its answers, `correct` right ones first. `group` is its subset or domain; items of one `unit` belong together."""

    prompt: str
    answers: list
    correct: int
    group: str
    unit: str
    half: str = ""  # of a Ties prompt: tied or reference


def read_pairs(config):
    """Held-out pairs as train_rm.py holds them out, or all of them; those of one prompt are one unit."""
    if config.eval_size:
        rows = load(config, "pairs")[1]
    else:
        rows = data.read_rows(config.dataset, "pairs", config.columns, split="test")
        rows = [row for row in rows if row["chosen"] != row["rejected"]]
        require(rows, f"{config.dataset}: no pair in which chosen and rejected differ")
    return [Item(row["prompt"], [row["chosen"], row["rejected"]], 1, "all", data.canonical(row["prompt"])) for row in rows]


def read_rewardbench2(config):
    """RewardBench 2, or rows of its flat form put together by question_id; the two halves of a Ties prompt are one unit."""
    rows = objects(config.dataset)
    if all(isinstance(row.get("chosen"), str) for _, row in rows):
        return from_flat(rows)
    items = {}
    for place, row in rows:
        prompt, chosen, rejected = text(place, row, "prompt"), texts(place, row, "chosen"), texts(place, row, "rejected")
        for name, answers in (("num_correct", chosen), ("num_incorrect", rejected)):
            require(row.get(name, len(answers)) == len(answers), f"{place}: {name} is {row.get(name)}, but there are {len(answers)}")
        group, unit, half = str(row.get("subset", "all")), str(row.get("id", place)), ""
        if group.lower() == TIES:
            kind, _, unit = unit.partition(":")
            require(kind in ("tied", "ref") and unit, f"{place}: the id of a Ties row must be tied:N or ref:N, not {row.get('id')!r}")
            require(kind == "ref" or len(chosen) > 1, f"{place}: a tied row needs at least two chosen answers")
            group, half = TIES, "tied" if kind == "tied" else "reference"
        else:
            require(len(chosen) == 1, f"{place}: {len(chosen)} chosen answers; outside the subset Ties there is one")
        require((group, unit, half) not in items, f"{place}: another row of the subset {group} has the id {row.get('id')!r} already")
        items[group, unit, half] = Item(prompt, chosen + rejected, len(chosen), group, unit, half)
    return list(items.values())


def from_flat(rows):
    """Rows {question_id, prompt, chosen, rejected}, one for each rejected answer -> one Item a question."""
    items = {}
    for place, row in rows:
        require("question_id" in row, f"{place}: no field 'question_id' (it says which rows are one question's)")
        prompt, chosen, rejected = (text(place, row, name) for name in ("prompt", "chosen", "rejected"))
        question = str(row["question_id"])
        item = items.setdefault(question, Item(prompt, [chosen], 1, str(row.get("subset", "all")), question))
        same = item.prompt == prompt and item.answers[0] == chosen
        require(same, f"{place}: question {question} has another prompt or chosen answer in an earlier row")
        item.answers.append(rejected)
    return list(items.values())


def read_rm_bench(config):
    """RM-Bench. As in its own code, safety-refuse and safety-response are one domain, and so is a file that names no domains."""
    items = []
    for place, row in objects(config.dataset):
        prompt, chosen, rejected = text(place, row, "prompt"), texts(place, row, "chosen"), texts(place, row, "rejected")
        counts = f"{len(chosen)} chosen and {len(rejected)} rejected answers"
        require(len(chosen) == len(rejected) == 3, f"{place}: {counts}, not 3 each (concise, detailed, markdown)")
        items.append(Item(prompt, chosen + rejected, 3, str(row.get("domain", "all")).split("-")[0], place))
    return items


READ = {"pairs": read_pairs, "rewardbench2": read_rewardbench2, "rm_bench": read_rm_bench}


def objects(spec):
    """The rows of a benchmark's file: [(place, row)]."""
    rows = data.read_any(spec)
    for place, row in rows:
        require(isinstance(row, dict), f"{place}: a row must be an object with prompt, chosen and rejected")
    return rows


def text(place, row, name):
    """A field that is one text."""
    require(name in row, f"{place}: no field {name!r}")
    require(isinstance(row[name], str), f"{place}: field {name!r} must be a string, not {type(row[name]).__name__}")
    return row[name]


def texts(place, row, name):
    """A field that is a list of texts."""
    require(name in row, f"{place}: no field {name!r}")
    good = isinstance(row[name], list) and row[name] and all(isinstance(x, str) for x in row[name])
    require(good, f"{place}: field {name!r} must be a list of strings")
    return row[name]

"""Files of reward benchmarks -> prompts with their answers, the right ones first.

A row of each benchmark, and where it comes from:

    pairs         {prompt, chosen, rejected}                                    as in train_rm.py
    rewardbench2  {id, prompt, chosen: [..], rejected: [..], subset}       allenai/reward-bench-2
    rm_bench      {id, prompt, chosen: [3], rejected: [3], domain}                THU-KEG/RM-Bench

RewardBench 2: the ids of its subset Ties are tied:N and ref:N. It is also read in a flat form, with
a row for each rejected answer: {question_id, prompt, chosen, rejected}. RM-Bench: the three answers
are concise, detailed, and detailed with markdown.
"""

from dataclasses import dataclass

from .. import data
from ..chats import Prompt, read_prompt
from ..errors import require
from ..runtime.sources import read_any
from ..splits import load

TIES = "ties"


@dataclass
class Item:
    """A prompt and its answers, `correct` right ones first.

    `group` is its subset or domain. Items of one `unit` belong together.
    """

    prompt: Prompt
    answers: list[str]
    correct: int
    group: str
    unit: str
    half: str = ""  # of a Ties prompt: tied or reference


# -------------------------------------------------------------------------------- the benchmarks


def read_pairs(config) -> list[Item]:
    """Read pairs of answers; those of one prompt are one unit."""
    # Pairs are held out as train_rm.py does it; with --eval_size 0 all of the file is evaluated.
    if config.eval_size:
        _, rows, _ = load(config, "pairs")
    else:
        rows = []
        for row in data.read_rows(config.dataset, "pairs", config.columns, split="test"):
            if row["chosen"] != row["rejected"]:
                rows.append(row)
        require(rows, f"{config.dataset}: no pair in which chosen and rejected differ")

    items = []
    for row in rows:
        prompt = row["prompt"]
        answers = [row["chosen"], row["rejected"]]
        item = Item(prompt, answers, correct=1, group="all", unit=data.canonical(prompt))
        items.append(item)
    return items


def read_rewardbench2(config) -> list[Item]:
    """Read RewardBench 2, in either form; the two halves of a Ties prompt are one unit."""
    rows = read_objects(config.dataset)
    # In the flat form `chosen` is one text, not a list.
    is_flat = all(isinstance(row.get("chosen"), str) for _, row in rows)
    if is_flat:
        return join_flat_rows(rows)

    items = {}
    for place, row in rows:
        prompt = get_prompt(place, row)
        chosen = get_texts(place, row, "chosen")
        rejected = get_texts(place, row, "rejected")
        # Only in Ties is a prompt two rows, and may have several right answers.
        group = str(row.get("subset", "all"))
        unit = str(row.get("id", place))
        half = ""
        if group.lower() == TIES:
            group = TIES
            half, unit = split_ties_id(place, row, unit)
            require(
                half == "reference" or len(chosen) > 1,
                f"{place}: a tied row needs at least two chosen answers",
            )
        else:
            require(
                len(chosen) == 1,
                f"{place}: {len(chosen)} chosen answers; outside the subset Ties there is one",
            )

        # Two rows of one id would be counted as one prompt.
        key = (group, unit, half)
        require(
            key not in items,
            f"{place}: another row of the subset {group} has the id {row.get('id')!r} already",
        )
        items[key] = Item(prompt, chosen + rejected, len(chosen), group, unit, half)
    return list(items.values())


def split_ties_id(place, row, row_id):
    """tied:N or ref:N -> the half that the row is of, and N, which both halves share."""
    kind, _, number = row_id.partition(":")
    require(
        kind in ("tied", "ref") and number,
        f"{place}: the id of a Ties row must be tied:N or ref:N, not {row.get('id')!r}",
    )
    if kind == "tied":
        return "tied", number
    return "reference", number


def join_flat_rows(rows) -> list[Item]:
    """Rows (place, {question_id, prompt, chosen, rejected}), one for each rejected answer -> one
    Item a question."""
    items = {}
    for place, row in rows:
        require(
            "question_id" in row,
            f"{place}: no field 'question_id' (it says which rows are one question's)",
        )
        prompt = get_prompt(place, row)
        chosen = get_text(place, row, "chosen")
        rejected = get_text(place, row, "rejected")
        question = str(row["question_id"])
        # The first row of a question makes its item; every row then adds its rejected answer.
        if question not in items:
            group = str(row.get("subset", "all"))
            items[question] = Item(prompt, [chosen], correct=1, group=group, unit=question)

        # Rows of one question differ in the rejected answer alone.
        item = items[question]
        require(
            item.prompt == prompt and item.answers[0] == chosen,
            f"{place}: question {question} has another prompt or chosen answer in an earlier row",
        )
        item.answers.append(rejected)
    return list(items.values())


def read_rm_bench(config) -> list[Item]:
    """Read RM-Bench.

    As in its own code, safety-refuse and safety-response are one domain. A file that names no
    domains is one domain.
    """
    items = []
    for place, row in read_objects(config.dataset):
        prompt = get_prompt(place, row)
        chosen = get_texts(place, row, "chosen")
        rejected = get_texts(place, row, "rejected")
        require(
            len(chosen) == len(rejected) == 3,
            f"{place}: {len(chosen)} chosen and {len(rejected)} rejected answers, "
            "not 3 each (concise, detailed, markdown)",
        )
        # "safety-refuse" -> "safety"
        domain, _, _ = str(row.get("domain", "all")).partition("-")
        items.append(Item(prompt, chosen + rejected, correct=3, group=domain, unit=place))
    return items


READ = {"pairs": read_pairs, "rewardbench2": read_rewardbench2, "rm_bench": read_rm_bench}


# ------------------------------------------------------------------------------- rows and fields


def read_objects(spec: str) -> list[tuple[str, dict]]:
    """Read the rows of a benchmark's file, each with its place."""
    rows = read_any(spec)
    for place, row in rows:
        require(
            isinstance(row, dict),
            f"{place}: a row must be an object with prompt, chosen and rejected",
        )
    return rows


def get_prompt(place: str, row: dict) -> Prompt:
    """The field 'prompt': one text, or messages."""
    require("prompt" in row, f"{place}: no field 'prompt'")
    return read_prompt(place, row["prompt"])


def get_text(place: str, row: dict, name: str) -> str:
    """A field that is one text."""
    require(name in row, f"{place}: no field {name!r}")
    value = row[name]
    require(
        isinstance(value, str),
        f"{place}: field {name!r} must be a string, not {type(value).__name__}",
    )
    return value


def get_texts(place: str, row: dict, name: str) -> list[str]:
    """A field that is a list of texts, one at least."""
    require(name in row, f"{place}: no field {name!r}")
    values = row[name]
    is_list = isinstance(values, list) and len(values) > 0
    require(
        is_list and all(isinstance(value, str) for value in values),
        f"{place}: field {name!r} must be a list of strings",
    )
    return values

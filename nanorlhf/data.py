"""From data sets and files to rows, and the order in which rows are visited.

    read_rows        what --dataset names -> rows {field: text}
    batch_indices    a step -> the rows of its batch

A row is of one of three kinds: sft {prompt, response}; pairs {prompt, chosen, rejected}; prompts
{prompt}. A prompt is a text or a chat (chats.py), and formats.py has the ways to write all this. A
bad row gives its file, line and reason. Rows that are skipped are counted and reported. tokens.py
makes token ids of rows.
"""

import json
from collections.abc import Callable

import numpy as np
import torch

from . import world
from .chats import Prompt, count_turns, is_chat, show
from .errors import InputError, require
from .formats import Format, Row, check_columns, check_renamed, list_formats, recognise
from .runtime.files import UNREADABLE
from .runtime.rng import LABELS, MINIBATCH, ORDER, SPLIT
from .runtime.sources import read_any

# The embedded world: rows for training (its prompts are all there are), and rows held out.
WORLD_SIZES = {"sft": 16_000, "pairs": 800}
WORLD_HELD_OUT = 512


# -------------------------------------------------------------------------------------- reading


def read_rows(
    spec: str, kind: str, columns=(), split: str = "train", prompt_format: str = ""
) -> list[dict]:
    """What --dataset names -> rows with the fields of their kind (formats.py) and of finish_row().

    spec: 'world' or 'world:SEED' (the embedded world; the seed draws the spurious cue), or a file
    or data set (read_any). columns: renamings FIELD=COLUMN. split: 'train', 'test' or 'ood', of the
    embedded world alone. prompt_format: one of PROMPT_FORMATS, whose columns then take the place of
    prompt and response.
    """
    if is_world(spec):
        return read_world(spec, kind, split)
    rows, _ = read_parts(spec, kind, columns, prompt_format)
    return rows


def is_world(spec: str) -> bool:
    """Whether --dataset names the embedded world."""
    return spec == "world" or spec.startswith("world:")


def read_world(spec: str, kind: str, split: str) -> list[dict]:
    """'world' or 'world:SEED' -> rows of a split of the embedded world."""
    # 'world:3' -> '3', 'world' -> '0'. int() has an error of its own for thousands of digits, so
    # the length is checked first.
    seed = spec.partition(":")[2] or "0"
    is_number = seed.isdecimal() and len(seed) < 20
    require(
        is_number,
        f"--dataset {spec[:60]}: the world's seed must be a whole number of at most 19 digits",
    )
    if kind == "prompts":
        return world.prompts(split)
    # The seed draws pairs and their cue. Prompts and demonstrations are the same for every seed.
    if kind == "pairs":
        n_rows = WORLD_SIZES["pairs"] if split == "train" else WORLD_HELD_OUT
        return world.preferences(n_rows, seed=int(seed), split=split)
    if split == "ood":
        # Reviews of held-out topics by the same writer. A seed of its own draws them, so that no
        # training row is among them or shares its noise with one.
        return world.demonstrations(WORLD_HELD_OUT, seed=1, split=split)
    # Demonstrations have no split 'test': splits.py takes some of their prompts out of training.
    return world.demonstrations(WORLD_SIZES["sft"])


def read_parts(
    spec: str,
    kind: str,
    columns,
    prompt_format: str,
    in_distribution: Callable[[str, dict], bool] | None = None,
) -> tuple[list[dict], list[dict]]:
    """A file or data set -> its rows in distribution, and the others.

    in_distribution(place, row) sees the data's own columns beside the fields. Where none is given
    all rows are in distribution. InputError: a bad row, with its place.
    """
    # The formats that this file may have. The plain one comes first: errors ask for its fields.
    names = read_renamings(columns)
    formats = list_formats(kind, prompt_format, names)
    plain_fields = ", ".join(formats[0].columns)

    form = None
    kept = []
    left_out = []
    for place, values in read_any(spec):
        is_object = isinstance(values, dict)
        require(is_object, f"{place}: a row must be an object with {plain_fields}")
        row = Row(place, values, names)

        # The first row decides the format of the whole file. If each row were judged on its own,
        # one that lacks a column could pass for a row of another format.
        if form is None:
            check_renamed(row)
            form = recognise(row, formats)
            with_chats = is_chat(form.read(row)["prompt"])
        # Every further row must be like the first: chat_templates.uses_template() looks at one row
        # alone to know whether all are chats or plain texts.
        check_columns(row, form)
        fields = form.read(row)
        check_alike(place, with_chats, fields["prompt"])

        # A rule sees the data's own columns, such as a subreddit, which are not among the fields.
        # The rule is asked last: a row that cannot be read is an error, in distribution or not.
        finished = finish_row(place, values, fields)
        if in_distribution is None or in_distribution(place, show_all(row, fields, form)):
            kept.append(finished)
        else:
            left_out.append(finished)
    return kept, left_out


def read_renamings(columns) -> dict[str, str]:
    """--columns FIELD=COLUMN ... -> {field: column}."""
    return dict(item.split("=", 1) for item in columns)


def check_alike(place: str, with_chats: bool, prompt: Prompt):
    """InputError where a file has chats and plain texts. with_chats: what its first row has."""
    if is_chat(prompt) != with_chats:
        here = "a plain text" if with_chats else "a chat"
        first = "a chat" if with_chats else "a plain text"
        raise InputError(f"{place}: the prompt is {here}; that of the first row is {first}")


def show_all(row: Row, fields: dict, form: Format) -> dict:
    """What --in_distribution may ask: the data's own columns, and the fields beside them.

    A column that is a field by its own name holds the field: of two dialogues, their answers.
    """
    # With --columns prompt=question a file may have a column 'prompt' too: a rule means that one.
    seen = {**fields, **row.values}
    for field in form.columns:
        if field in fields and field not in row.columns:
            seen[field] = fields[field]
    return seen


def finish_row(place: str, values: dict, fields: dict) -> dict:
    """The fields of a row -> what the scripts get: further, its place and the data's own row.

    The place is for chats: that a template refuses one is only found later. The own row is there
    where it differs from the fields: see own_row(). values: the data's own row.
    """
    finished = dict(fields)
    if is_chat(fields["prompt"]):
        finished["place"] = place
    # Most files hold the plain fields and nothing else: their rows are not kept twice.
    if values != finished:
        finished["row"] = values
    return finished


def own_row(row: dict) -> dict:
    """A row of the data as it was read, with all its columns, for rewards that ask for them."""
    return row.get("row", row)


def place_of(row: dict) -> str:
    """What an error calls a row: its file and line, where a chat has them, or how it begins."""
    if "place" in row:
        return row["place"]
    text = show(row["prompt"])
    return f"the prompt {text[:40]!r}"


# ------------------------------------------------------------------------- what has been read


def describe_rows(rows: list[dict], spec: str, kind: str, columns, prompt_format: str) -> list[str]:
    """What a run's sentence says of the rows of `spec`: their format, unless it is the plain one.

    And how many of them hold what could not be read.
    """
    remarks = []
    if not is_world(spec):
        # One row tells the format, since all rows of a file have the same.
        names = read_renamings(columns)
        first_row = Row(spec, own_row(rows[0]), names)
        form = recognise(first_row, list_formats(kind, prompt_format, names))
        remarks.append(form.remark)
    remarks.append(describe_chats(rows))
    remarks.append(count_unreadable(rows))
    return list(filter(None, remarks))


def describe_chats(rows: list[dict]) -> str:
    """How many turns the chats of rows have, and how many chats a system prompt; '' for no chats.

    The answer counts as a turn too.
    """
    n_turns = []
    n_systems = 0
    for row in rows:
        prompt = row["prompt"]
        if is_chat(prompt):
            has_answer = "response" in row or "chosen" in row
            turns = count_turns(prompt)
            n_turns.append(turns + has_answer)
            # A message that is no turn is a system prompt.
            n_systems += turns < len(prompt)
    if not n_turns:
        return ""
    least = min(n_turns)
    most = max(n_turns)
    remark = f"chats of {most} turns"
    if most == 1:
        remark = "chats of 1 turn"
    elif least < most:
        remark = f"chats of {least} to {most} turns"
    if n_systems:
        remark += f", {n_systems} with a system prompt"
    return remark


def count_unreadable(rows: list[dict]) -> str:
    """How many rows hold U+FFFD, for a run's sentence; '' for none."""
    n = 0
    for row in rows:
        answers = row.get("response", "") + row.get("chosen", "") + row.get("rejected", "")
        n += UNREADABLE in show(row["prompt"]) or UNREADABLE in answers
    if not n:
        return ""
    hold = "row holds" if n == 1 else "rows hold"
    return f"{n} {hold} U+FFFD, a character that could not be read"


# ----------------------------------------------------------------------------- choices of rows


def canonical(prompt: Prompt) -> str:
    """The form in which prompts are compared: those that differ by white space alone are one."""
    return " ".join(show(prompt).split())


def columns_for_files(row: dict) -> dict:
    """{"row": the data's own row} for a file of answers; {} where it has no further columns.

    Columns that JSON cannot hold, such as images and NaN, are left out.
    """
    # Each column is tried by itself, so that an image takes no other column with it.
    columns = {}
    for name, value in row.get("row", {}).items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            continue
        columns[name] = value
    return {"row": columns} if columns else {}


def number_prompts(prompts: list[str]) -> list[int]:
    """A number for each prompt, from 0 on, in the order in which different ones appear first."""
    number_of = {}
    numbers = []
    for prompt in prompts:
        text = canonical(prompt)
        if text not in number_of:
            number_of[text] = len(number_of)
        numbers.append(number_of[text])
    return numbers


def draw(rows: list, n: int) -> list:
    """n random rows, always the same ones, in random order."""
    # The draw does not depend on --seed: runs of several seeds are evaluated on the same rows.
    order = np.random.default_rng(SPLIT).permutation(len(rows))
    return [rows[i] for i in order[:n]]


def subset(rows: list, n: int) -> list:
    """n random rows, always the same ones, in the order that they have in `rows`; n = 0: all."""
    if n == 0:
        return rows
    # The first n of one fixed order, so that a larger subset holds the smaller one.
    order = np.random.default_rng(SPLIT).permutation(len(rows))
    return [rows[i] for i in sorted(order[:n])]


def flip_labels(rows: list[dict], share: float, seed: int) -> tuple[list[dict], int]:
    """Exchange chosen and rejected in each row with the probability `share`. -> rows, how many"""
    # Each row draws a number, whatever the share: a larger share flips the same rows and more.
    flips = np.random.default_rng([LABELS, seed]).random(len(rows)) < share
    noisy = []
    for row, flip in zip(rows, flips):
        if flip:
            row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        noisy.append(row)
    return noisy, flips.sum()


# --------------------------------------------------------------------------------------- order


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The indices of a step's batch, as if epochs of n rows stood one behind the other.

    Each epoch has an order of its own, keyed by (seed, epoch). There is no state, so that a run
    which is resumed sees the same batches.
    """
    # Three rows in batches of two: step 1 takes the last row of epoch 0 and the first of epoch 1.
    # So each place finds its own epoch.
    orders = {}  # {epoch: a permutation of the n rows}
    indices = []
    start = step * batch_size
    for i in range(start, start + batch_size):
        epoch = i // n
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([ORDER, seed, epoch]).permutation(n)
        indices.append(int(orders[epoch][i % n]))
    return indices


def minibatches(
    batch_size: int, minibatch_size: int, seed: int, step: int, epoch: int
) -> torch.Tensor:
    """The rows of one PPO epoch's minibatches, keyed by (seed, step, epoch).

    -> [batch_size / minibatch_size, minibatch_size]. The global batch is cut into minibatch_size
    strata of one size, and each minibatch takes one row of each. So the minibatches are the same on
    any number of processes, and a process trains only on rows that it sampled itself.
    """
    # Six rows in minibatches of three: the strata 0 1 | 2 3 | 4 5 give, say, 1 2 4 and 0 3 5. A
    # process samples neighbouring rows, so it has the same strata in each minibatch.
    strata = np.arange(batch_size).reshape(minibatch_size, -1)  # a stratum a row
    generator = np.random.default_rng([MINIBATCH, seed, step, epoch])
    shuffled = generator.permuted(strata, axis=1)  # each stratum in an order of its own
    return torch.from_numpy(shuffled.T.copy())

"""How the rows of a data set are written, and the fields that each format gives.

A row that is trained on is of one of three kinds: sft {prompt, response}; pairs {prompt, chosen,
rejected}; prompts {prompt}. Data sets write the same in many ways. FORMATS has a line for each: the
columns that tell it, and the function that reads it. To add a format, write such a function and put
its line into the list of its kind. The first line whose columns the first row of a file has is the
format of that file.

A prompt is a string or a chat (chats.py); a response, chosen or rejected is a string. A chat of
demonstrations also has `messages`, all of it up to its last assistant turn.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from .chats import (
    Message,
    Prompt,
    as_chat,
    check_prompt,
    cut_after,
    is_chat,
    read_messages,
    read_prompt,
)
from .errors import InputError, require

# How an answer begins in the dialogues of HH-RLHF.
TURN = "\n\nAssistant:"


@dataclass
class Row:
    """A row of a data set, as it was read. columns: {field: its column}, where they differ.

    The methods look at a field by its name. InputError, with the place: it cannot be read.
    """

    place: str
    values: dict
    columns: dict[str, str]

    def column(self, field: str) -> str:
        """The name of a field's column."""
        return self.columns.get(field, field)

    def get(self, field: str):
        """What a field holds; None where the row does not have it."""
        return self.values.get(self.column(field))

    def text(self, field: str, otherwise: str = "") -> str:
        """A field that is one text. otherwise: what else it may be, for the error."""
        text = self.get(field)
        column = self.column(field)
        found = type(text).__name__
        is_text = isinstance(text, str)
        require(is_text, f"{self.place}: field {column!r} must be a string, not {found}{otherwise}")
        return text

    def messages(self, field: str) -> list[Message]:
        """A field that is a list of messages."""
        return read_messages(self.place, self.get(field), self.column(field))

    def prompt(self) -> Prompt:
        """The field `prompt`: a text, or messages that end with a user's turn."""
        return read_prompt(self.place, self.get("prompt"), self.column("prompt"))


class Format(NamedTuple):
    """A way to write a row: the columns that it has, and the function from a Row to its fields."""

    columns: tuple[str, ...]
    read: Callable[[Row], dict]
    optional: tuple[str, ...] = ()  # columns that it reads where they are
    remark: str = ""  # what a run's sentence on its data says of it


# ---------------------------------------------------------------------------------- demonstrations


def read_response(row: Row, field: str) -> dict:
    """{prompt, response} and {prompt, completion}: two texts, or a chat and its answer."""
    prompt = row.prompt()
    # {"prompt": "Hi", "completion": [{"role": "assistant", "content": "Hello"}]}: an answer that is
    # a message belongs to a chat, so that a prompt which is a text becomes one.
    if is_chat(row.get(field)):
        return {"prompt": as_chat(prompt), "response": read_answer(row, field)}
    return {"prompt": prompt, "response": row.text(field, " (or a list of messages)")}


def read_answer(row: Row, field: str) -> str:
    """A list of messages that is one assistant turn -> what it says."""
    column = row.column(field)
    message, *others = row.messages(field)
    is_answer = message["role"] == "assistant" and not others
    require(is_answer, f"{row.place}: field {column!r} must be one assistant turn beside a prompt")
    return message["content"]


def read_demonstration(row: Row, field: str) -> dict:
    """{messages} and {conversations}: the last assistant turn is the response."""
    # A user's turn at the end has no answer to learn from.
    messages = cut_after(read_with_system(row, field), "assistant")
    require(messages, f"{row.place}: no assistant turn in {row.column(field)!r}")
    prompt = check_prompt(row.place, messages[:-1])
    return {"prompt": prompt, "response": messages[-1]["content"], "messages": messages}


def read_with_system(row: Row, field: str) -> list[Message]:
    """A field of messages. A system prompt may stand in a column of its own, as in ShareGPT."""
    messages = row.messages(field)
    system = row.values.get("system")
    has_column = isinstance(system, str) and system
    if has_column and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def read_text(row: Row) -> dict:
    """{text}: there is no prompt, and all of the text is learned."""
    return {"prompt": "", "response": row.text("text")}


# ----------------------------------------------------------------------------------------- prompts


def read_plain_prompt(row: Row) -> dict:
    """{prompt}: a text, or messages."""
    return {"prompt": row.prompt()}


def read_question(row: Row, field: str) -> dict:
    """{messages} and {conversations}: the prompt reaches to the last turn of a user."""
    messages = cut_after(read_with_system(row, field), "user")
    require(messages, f"{row.place}: no user's turn in {row.column(field)!r}")
    return {"prompt": messages}


# ----------------------------------------------------------------------------------------- pairs


def read_pair(row: Row) -> dict:
    """{prompt, chosen, rejected}: each a text, or messages."""
    if has_messages(row):
        return read_chats(row)
    chosen = row.text("chosen")
    rejected = row.text("rejected")
    return {"prompt": row.prompt(), "chosen": chosen, "rejected": rejected}


def read_whole_pair(row: Row) -> dict:
    """{chosen, rejected}: each holds the prompt too, which is what they share."""
    if has_messages(row):
        return read_chats(row)
    # "\n\nHuman: Hi\n\nAssistant: Hello" and "\n\nHuman: Hi\n\nAssistant: Go away" have the prompt
    # "\n\nHuman: Hi\n\nAssistant:".
    chosen = row.text("chosen")
    rejected = row.text("rejected")
    end = end_of_shared(row.place, chosen, rejected)
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def read_prompt_of_pair(row: Row) -> dict:
    """{chosen, rejected} as prompts: what the two share."""
    return {"prompt": read_whole_pair(row)["prompt"]}


def has_messages(row: Row) -> bool:
    """Whether the answers of a pair are lists of messages. InputError: only one of them is."""
    chosen = is_chat(row.get("chosen"))
    rejected = is_chat(row.get("rejected"))
    require(
        chosen == rejected,
        f"{row.place}: one of chosen and rejected is a list of messages, and the other is not",
    )
    return chosen


def read_chats(row: Row) -> dict:
    """A pair whose answers are lists of messages: whole chats, or one turn beside a prompt."""
    chosen = row.messages("chosen")
    rejected = row.messages("rejected")
    # A pair compares the last turns of the two chats, so each must be an answer.
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        ends_well = messages[-1]["role"] == "assistant"
        require(ends_well, f"{row.place}: {column} must end with an assistant turn")

    # Where chosen and rejected are one turn each, the prompt has a column of its own. Otherwise it
    # is all but their last turns, and the same in both: answers to two questions are no pair.
    has_prompt = row.get("prompt") is not None
    if has_prompt and len(chosen) == len(rejected) == 1:
        prompt = as_chat(row.prompt())
    else:
        prompt = check_prompt(row.place, chosen[:-1])
        require(
            prompt == rejected[:-1],
            f"{row.place}: chosen and rejected differ in more than their last turn",
        )
        # A prompt that is a text is the user's turn alone, here or there in the chat. A prompt of
        # messages must be the whole of what stands in front of the answers.
        if has_prompt and is_chat(row.get("prompt")):
            is_same = row.prompt() == prompt
            require(is_same, f"{row.place}: the prompt is not what chosen and rejected begin with")
    good = chosen[-1]["content"]
    bad = rejected[-1]["content"]
    return {"prompt": prompt, "chosen": good, "rejected": bad}


def end_of_shared(place: str, chosen: str, rejected: str) -> int:
    """How many characters of two whole texts are their prompt.

    In dialogues (HH-RLHF) it reaches to the last assistant turn that begins in both. In other texts
    it is their shared beginning up to the end of its last whole word: the white space behind it
    belongs to the answers. InputError: they share nothing.
    """
    shared = os.path.commonprefix([chosen, rejected])
    # Two answers may begin with the same words, so `shared` may reach into them. The prompt ends
    # behind the last "Assistant:" in it.
    if TURN in shared:
        return shared.rfind(TURN) + len(TURN)
    # Two dialogues without a shared turn answer different questions, whatever words they share.
    why_not = f"{place}: no field 'prompt', and chosen and rejected"
    are_dialogues = TURN in chosen and TURN in rejected
    require(not are_dialogues, f"{why_not} are dialogues that share no turn")

    # "the room was" and "the roof was" share "the roo", and their prompt is "the". The last shared
    # word is a whole one if white space, or nothing, follows it in both texts.
    end = len(shared)
    after_chosen = chosen[end : end + 1]
    after_rejected = rejected[end : end + 1]
    is_whole_word = (after_chosen + after_rejected).strip() == ""
    if not is_whole_word:
        while end > 0 and not shared[end - 1].isspace():
            end -= 1
    end = len(shared[:end].rstrip())
    require(end > 0, f"{why_not} begin with no word that they share")
    return end


# -------------------------------------------------------------------------------- all the formats

SHARED = "prompts are what chosen and rejected share"
# The first format that fits is taken. So one with more columns stands before one with a part of
# them: {prompt, chosen, rejected} before {chosen, rejected}.
FORMATS = {
    "sft": [
        Format(("prompt", "response"), partial(read_response, field="response")),
        Format(("prompt", "completion"), partial(read_response, field="completion")),
        Format(("messages",), partial(read_demonstration, field="messages")),
        Format(("conversations",), partial(read_demonstration, field="conversations")),
        Format(("text",), read_text, remark="texts without prompts"),
    ],
    "pairs": [
        Format(("prompt", "chosen", "rejected"), read_pair),
        Format(("chosen", "rejected"), read_whole_pair, remark=SHARED),
    ],
    "prompts": [
        Format(("prompt",), read_plain_prompt),
        Format(("messages",), partial(read_question, field="messages")),
        Format(("conversations",), partial(read_question, field="conversations")),
        Format(("chosen", "rejected"), read_prompt_of_pair, remark=SHARED),
    ],
}


# -------------------------------------------------------------- prompts written from other columns

# Reddit posts as Stiennon et al. 2020 (2009.01325) write them for a model that summarises them.
TLDR = "SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"
CNN_DM = "ARTICLE: {article}\nTL;DR:"
# The two prompts of Taori et al. 2023 (Stanford Alpaca), for rows without and with an input.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class PromptFormat(NamedTuple):
    """A value of --prompt_format. write(row) is the prompt; `response` is the answer's column."""

    columns: tuple[str, ...]
    write: Callable[[Row], str]
    response: str
    begin_answer: Callable[[str], str]
    optional: tuple[str, ...] = ()


def fill(row: Row, template: str) -> str:
    """A template, with the row's texts in the place of its names in braces."""
    texts = {}
    for field in re.findall(r"{(\w+)}", template):
        texts[field] = row.text(field)
    return template.format(**texts)


def write_alpaca(row: Row) -> str:
    """The prompt of Alpaca that fits a row: its input may be empty, or not there."""
    if row.get("input") in (None, ""):
        return fill(row, ALPACA)
    return fill(row, ALPACA_WITH_INPUT)


def put_space(answer: str) -> str:
    """An answer to a prompt that ends in "TL;DR:": a space stands between the two."""
    return " " + answer.strip()


def keep(answer: str) -> str:
    """An answer as it is."""
    return answer


PROMPT_FORMATS = {
    "tldr": PromptFormat(
        ("subreddit", "title", "post"), partial(fill, template=TLDR), "summary", put_space
    ),
    "cnn_dm": PromptFormat(("article",), partial(fill, template=CNN_DM), "highlights", put_space),
    "alpaca": PromptFormat(("instruction",), write_alpaca, "output", keep, optional=("input",)),
}


def prompt_format_of(name: str, kind: str) -> Format:
    """The format of rows whose prompts --prompt_format writes.

    Pairs have their answers in chosen and rejected, whatever the format.
    """
    known = ", ".join(PROMPT_FORMATS)
    require(name in PROMPT_FORMATS, f"--prompt_format must be one of {known}, not {name!r}")
    prompt_format = PROMPT_FORMATS[name]
    answers = {}  # {a field of the answers: its column}
    if kind == "sft":
        answers = {"response": prompt_format.response}
    elif kind == "pairs":
        answers = {"chosen": "chosen", "rejected": "rejected"}

    def read(row):
        # No prompt ends with a space. begin_answer() puts one in front of the answer, or does not.
        fields = {"prompt": prompt_format.write(row)}
        for field, column in answers.items():
            fields[field] = prompt_format.begin_answer(row.text(column))
        return fields

    columns = (*prompt_format.columns, *answers.values())
    return Format(columns, read, prompt_format.optional)


# ------------------------------------------------------------------------------ which format it is


def list_formats(kind: str, prompt_format: str, columns: dict[str, str]) -> list[Format]:
    """The formats that rows of a kind may have. columns: the renamings, {field: column}.

    A field that is renamed is one that is meant, so the formats are those that have it. InputError:
    --prompt_format or --columns names something that there is not.
    """
    if prompt_format:
        formats = [prompt_format_of(prompt_format, kind)]
    else:
        formats = FORMATS[kind]
    # --columns prompt=question leaves the formats that have a prompt: {messages} is not one.
    known = []
    meant = []
    for form in formats:
        fields = [*form.columns, *form.optional]
        known += fields
        if set(columns) <= set(fields):
            meant.append(form)

    # Two different mistakes: a field that no format has, and fields that no format has together.
    known = list(dict.fromkeys(known))
    unknown = ", ".join(sorted(set(columns) - set(known)))
    require(not unknown, f"--columns names {unknown}; the fields here are {', '.join(known)}")
    require(meant, f"--columns names {', '.join(columns)}, which no format of {kind} has together")
    return meant


def recognise(row: Row, formats: list[Format]) -> Format:
    """The format of a file, of which this is the first row. InputError: it is none of these."""
    # A column that is empty here does not count: tables have columns that only some rows fill.
    for form in formats:
        if all(row.get(field) is not None for field in form.columns):
            return form
    # The first format is the plain one. A field of it may be there and hold nothing, which its own
    # function refuses.
    check_columns(row, formats[0], list_known(row, formats))
    return formats[0]


def check_renamed(row: Row):
    """InputError where the first row of a file does not have a column that --columns names."""
    for column in row.columns.values():
        require(column in row.values, f"{row.place}: no field {column!r}, which --columns names")


def check_columns(row: Row, form: Format, hint: str = ""):
    """InputError where a row does not have the columns of its file's format."""
    for field in form.columns:
        column = row.column(field)
        if column not in row.values:
            rename = ""
            if field not in row.columns:
                rename = f" (name another with --columns {field}=COLUMN)"
            raise InputError(f"{row.place}: no field {column!r}{rename}{hint}")


def list_known(row: Row, formats: list[Format]) -> str:
    """What the error on a first row that fits no format says of those that there are."""
    known = "; or ".join(", ".join(form.columns) for form in formats)
    hint = f"; rows have {known}" if len(formats) > 1 else ""
    # The user may have forgotten to name the --prompt_format that these columns are of.
    for name, prompt_format in PROMPT_FORMATS.items():
        columns = {*prompt_format.columns, prompt_format.response}
        if columns <= set(row.values):
            hint += f"; --prompt_format {name} reads these columns"
    return hint

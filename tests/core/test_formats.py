"""nanorlhf.formats: each way to write a row gives its kind's fields, or one line on why not.

The rows of the tests are written as in a file; words in capitals stand for the messages in PARTS.
"""

import copy
import json
from types import SimpleNamespace

import pytest
from support import jsonl, refuses

from nanorlhf import pool
from nanorlhf.control import feature_texts
from nanorlhf.data import canonical, own_row, read_rows
from nanorlhf.evals import benchmark_files
from nanorlhf.runtime.fingerprints import path_in
from nanorlhf.runtime.flags import RunConfig
from nanorlhf.splits import load_splits

SYSTEM = {"role": "system", "content": "Be kind."}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def ask(question, answer="a"):
    """A row of one question and its answer."""
    return {"messages": [user(question), assistant(answer)]}


ASKED = [SYSTEM, user("a?"), assistant("b"), user("c?")]
CHAT = [*ASKED, assistant(" d")]
SHAREGPT = """[
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "a?"},
    {"from": "gpt", "value": "b"},
    {"from": "human", "value": "c?"},
    {"from": "gpt", "value": " d"}
]"""
PARTS = {
    "ASKED": json.dumps(ASKED),
    "CHAT": json.dumps(CHAT),
    "LAST": '[{"role": "assistant", "content": " d"}]',
    "REJECTED": json.dumps([*ASKED, assistant(" no")]),
    "REFUSAL": '[{"role": "assistant", "content": " no"}]',
    "ELSEWHERE": json.dumps([user("other?"), assistant(" no")]),
    "UNANSWERED": json.dumps([*CHAT, user("e?")]),
    "QUESTION": '[{"role": "user", "content": "a?"}]',
    "MONOLOGUE": '[{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]',
    "SHAREGPT": SHAREGPT,
}


def spell(line):
    """A row as a test writes it -> as it stands in a file."""
    for name, messages in PARTS.items():
        line = line.replace(name, messages)
    return line.replace("\n", "")


def write(tmp_path, *lines):
    """A file with these rows. -> its path"""
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(spell(line) for line in lines))
    return str(path)


def fields_of(path, kind, *args, **kwargs):
    """The rows of a file without their places and the data's own rows."""
    rows = read_rows(path, kind, *args, **kwargs)
    for row in rows:
        row.pop("place", None)
        row.pop("row", None)
    return rows


def check_refused(tmp_path, kind, line, *words, **kwargs):
    """A file of this one row is refused in one line, which names the row."""
    path = write(tmp_path, line)
    refuses(read_rows, path, kind, **kwargs, match=["a.jsonl:1: ", *words])


# ---------------------------------------------------------------------------------- demonstrations


@pytest.mark.parametrize("line", [
    '{"messages": CHAT}',
    '{"messages": SHAREGPT, "id": 3}',
    '{"conversations": SHAREGPT}',
    '{"conversations": CHAT}',
    '{"messages": UNANSWERED}',
    '{"messages": CHAT, "prompt": "a?"}',
])  # fmt: skip
def test_the_last_assistant_turn_of_a_chat_is_the_response(tmp_path, line):
    """And the prompt is all before it; a question without an answer is left out."""
    path = write(tmp_path, line)

    (row,) = read_rows(path, "sft")

    assert row["prompt"] == ASKED
    assert row["response"] == " d"
    assert row["messages"] == CHAT
    assert row["place"] == f"{path}:1"
    assert row["row"] == json.loads(spell(line))


@pytest.mark.parametrize("line", [
    '{"prompt": ASKED, "completion": LAST}',
    '{"prompt": ASKED, "response": LAST}',
    '{"prompt": ASKED, "completion": " d"}',
    '{"prompt": ASKED, "response": " d", "source": "x"}',
])  # fmt: skip
def test_a_prompt_of_messages_and_its_response(tmp_path, line):
    """There are no `messages`: the turns of the prompt are not learned."""
    fields = fields_of(write(tmp_path, line), "sft")
    assert fields == [{"prompt": ASKED, "response": " d"}]


def test_a_text_beside_an_assistant_turn_is_a_user_turn(tmp_path):
    fields = fields_of(write(tmp_path, '{"prompt": "c?", "completion": LAST}'), "sft")
    assert fields == [{"prompt": [user("c?")], "response": " d"}]


def test_a_completion_is_a_response(tmp_path):
    fields = fields_of(write(tmp_path, '{"prompt": "a", "completion": " b"}'), "sft")
    assert fields == [{"prompt": "a", "response": " b"}]


def test_a_text_alone_has_no_prompt(tmp_path):
    fields = fields_of(write(tmp_path, '{"text": "Once upon a time", "source": "x"}'), "sft")
    assert fields == [{"prompt": "", "response": "Once upon a time"}]


PLAIN = [
    ("sft", {"prompt": " a\n", "response": ""}),
    ("sft", {"prompt": "", "response": " b "}),
    ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ("prompts", {"prompt": "a"}),
]


@pytest.mark.parametrize("kind, row", PLAIN)
def test_plain_rows_are_what_they_are(tmp_path, kind, row):
    """Without other columns a row has its fields and nothing else."""
    assert read_rows(jsonl(tmp_path / "a.jsonl", [row]), kind) == [row]


EVERYTHING = '{"text": "t", "messages": CHAT, "prompt": "a", "response": "b", "completion": "c"}'


def test_the_plain_format_goes_before_the_others(tmp_path):
    path = write(tmp_path, EVERYTHING)
    assert fields_of(path, "sft") == [{"prompt": "a", "response": "b"}]
    assert fields_of(path, "prompts") == [{"prompt": "a"}]


def test_a_field_that_is_renamed_is_the_one_that_is_meant(tmp_path):
    path = write(tmp_path, EVERYTHING)
    assert fields_of(path, "sft", ["messages=messages"])[0]["messages"] == CHAT
    assert fields_of(path, "sft", ["text=completion"])[0]["response"] == "c"


BAD_SFT = [
    ('{"messages": QUESTION}', "no assistant turn in 'messages'"),
    ('{"messages": MONOLOGUE}', "a user's turn must stand in front of the answer"),
    ('{"messages": LAST}', "a user's turn must stand in front of the answer"),
    ('{"messages": [{"role": "user", "content": 5}]}', "messages[0]: the content must be"),
    ('{"messages": "a"}', "field 'messages' must be a list of messages, not str"),
    ('{"conversations": null}', "no field 'prompt'"),
    ('{"conversations": null}', "rows have prompt, response; or prompt, completion; or messages"),
    ('{"prompt": QUESTION, "completion": CHAT}', "'completion' must be one assistant turn"),
    ('{"prompt": QUESTION, "completion": QUESTION}', "'completion' must be one assistant turn"),
    ('{"prompt": CHAT, "response": "x"}', "a user's turn must stand in front of the answer"),
    ('{"prompt": "a", "response": null}', "'response' must be a string, not NoneType"),
    ('{"prompt": 4, "completion": "x"}', "'prompt' must be a string, not int"),
    ('{"text": 4.5}', "field 'text' must be a string, not float"),
    ('{"question": "a"}', "no field 'prompt' (name another with --columns prompt=COLUMN)"),
    ('{"instruction": "a", "output": "b"}', "--prompt_format alpaca reads these columns"),
]


@pytest.mark.parametrize("line, words", BAD_SFT)
def test_demonstrations_that_are_refused(tmp_path, line, words):
    check_refused(tmp_path, "sft", line, words)


OTHER_FORMATS = [
    ('{"messages": CHAT}', '{"prompt": "a", "response": "b"}', "no field 'messages'"),
    ('{"prompt": "a", "response": "b"}', '{"messages": CHAT}', "no field 'prompt'"),
    ('{"messages": CHAT}', '{"messages": null}', "must be a list of messages, not NoneType"),
    ('{"text": "a"}', '{"text": null}', "must be a string, not NoneType"),
    (
        '{"prompt": "a", "response": "b"}',
        '{"prompt": QUESTION, "response": "b"}',
        "the prompt is a chat; that of the first row is a plain text",
    ),
    (
        '{"prompt": QUESTION, "response": "b"}',
        '{"prompt": "a", "response": "b"}',
        "the prompt is a plain text; that of the first row is a chat",
    ),
]


@pytest.mark.parametrize("first, later, words", OTHER_FORMATS)
def test_a_later_row_of_another_format_is_one_line(tmp_path, first, later, words):
    path = write(tmp_path, first, first, later)
    refuses(read_rows, path, "sft", match=[f"{path}:3: ", words])


# --------------------------------------------------------------------------------------- renamings


def test_columns_rename_the_fields_of_every_format(tmp_path):
    path = write(tmp_path, '{"chat": CHAT, "q": ASKED, "a": " d", "prompt": "x", "response": "y"}')
    assert fields_of(path, "sft", ["messages=chat"])[0]["messages"] == CHAT
    assert fields_of(path, "sft", ["prompt=q", "completion=a"])[0]["response"] == " d"
    assert fields_of(path, "prompts", ["conversations=chat"]) == [{"prompt": ASKED}]
    assert fields_of(path, "prompts", ["prompt=q"]) == [{"prompt": ASKED}]


BAD_RENAMINGS = [
    (["messages=chat"], "a.jsonl:1: no field 'chat', which --columns names"),
    (["answer=a"], "--columns names answer; the fields here are prompt, response, completion"),
    (["messages=q", "response=a"], "--columns names messages, response, which no format of sft"),
]


@pytest.mark.parametrize("columns, words", BAD_RENAMINGS)
def test_renamings_that_are_refused(tmp_path, columns, words):
    path = write(tmp_path, '{"q": CHAT, "a": "b"}')
    refuses(read_rows, path, "sft", columns, match=[words])


# ----------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("line", [
    '{"messages": CHAT}',
    '{"messages": ASKED}',
    '{"conversations": SHAREGPT}',
    '{"prompt": ASKED}',
    '{"prompt": ASKED, "messages": QUESTION}',
    '{"chosen": CHAT, "rejected": REJECTED}',
])  # fmt: skip
def test_the_prompt_of_a_chat_reaches_to_the_last_user_turn(tmp_path, line):
    assert fields_of(write(tmp_path, line), "prompts") == [{"prompt": ASKED}]


BAD_PROMPTS = [
    ('{"messages": MONOLOGUE}', "no user's turn in 'messages'"),
    ('{"prompt": CHAT}', "a user's turn must stand in front of the answer"),
    ('{"prompt": []}', "field 'prompt' holds no messages"),
    ('{"text": "a"}', "rows have prompt; or messages; or conversations; or chosen, rejected"),
]


@pytest.mark.parametrize("line, words", BAD_PROMPTS)
def test_prompts_that_are_refused(tmp_path, line, words):
    check_refused(tmp_path, "prompts", line, words)


# ------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("line", [
    '{"chosen": CHAT, "rejected": REJECTED}',
    '{"chosen": SHAREGPT, "rejected": REJECTED}',
    '{"chosen": CHAT, "rejected": REJECTED, "prompt": null}',
    '{"chosen": CHAT, "rejected": REJECTED, "prompt": "c?", "score_chosen": 8.0}',
    '{"chosen": CHAT, "rejected": REJECTED, "prompt": ASKED}',
    '{"prompt": ASKED, "chosen": LAST, "rejected": REFUSAL}',
    '{"prompt": ASKED, "chosen": " d", "rejected": " no"}',
])  # fmt: skip
def test_pairs_of_chats_in_any_format(tmp_path, line):
    path = write(tmp_path, line)

    (row,) = read_rows(path, "pairs")

    assert row["place"] == f"{path}:1"
    assert own_row(row) == json.loads(spell(line))
    assert fields_of(path, "pairs") == [{"prompt": ASKED, "chosen": " d", "rejected": " no"}]


def test_answers_that_are_turns_beside_a_text(tmp_path):
    path = write(tmp_path, '{"prompt": "a?", "chosen": LAST, "rejected": REFUSAL}')
    pair = {"prompt": [user("a?")], "chosen": " d", "rejected": " no"}
    assert fields_of(path, "pairs") == [pair]


BAD_PAIRS = [
    ('{"chosen": CHAT, "rejected": ELSEWHERE}', "differ in more than their last turn"),
    ('{"chosen": CHAT, "rejected": LAST}', "differ in more than their last turn"),
    ('{"chosen": LAST, "rejected": REFUSAL}', "a user's turn must stand in front of the answer"),
    ('{"chosen": UNANSWERED, "rejected": REJECTED}', "chosen must end with an assistant turn"),
    ('{"chosen": CHAT, "rejected": ASKED}', "rejected must end with an assistant turn"),
    ('{"chosen": CHAT, "rejected": " no"}', "one of chosen and rejected is a list of messages"),
    (
        '{"prompt": QUESTION, "chosen": CHAT, "rejected": REJECTED}',
        "the prompt is not what chosen and rejected begin with",
    ),
    ('{"prompt": "a", "chosen": null, "rejected": "b"}', "'chosen' must be a string, not NoneType"),
    ('{"chosen": 1, "rejected": 2}', "field 'chosen' must be a string, not int"),
    ('{"prompt": "a", "chosen": "b"}', "no field 'rejected'"),
]


@pytest.mark.parametrize("line, words", BAD_PAIRS)
def test_pairs_that_are_refused(tmp_path, line, words):
    check_refused(tmp_path, "pairs", line, words)


# (what two whole texts share up to a whole word, how they go on)
SHARED = [
    ("Why?", " yes", " no"),
    ("Why?", " yes", " yesterday"),
    ("Why is it?", "\n\nA", "\n\nB"),
    (" a", "\tb", "\tc"),
    ("a b", "", " c"),
    ("a", " b", " bc"),
    ("a b", "", ""),
]


@pytest.mark.parametrize("prompt, chosen, rejected", SHARED)
def test_whole_texts_share_their_prompt(tmp_path, prompt, chosen, rejected):
    """It ends with the last whole word that both have; the white space belongs to the answers."""
    whole = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    path = jsonl(tmp_path / "a.jsonl", [whole])
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert fields_of(path, "pairs") == [pair]
    assert fields_of(path, "prompts") == [{"prompt": prompt}]


UNSHARED = [
    ('{"chosen": "yes", "rejected": "no"}', "begin with no word that they share"),
    ('{"chosen": "yes", "rejected": "yesterday"}', "begin with no word that they share"),
    ('{"chosen": " yes", "rejected": " no"}', "begin with no word that they share"),
    ('{"chosen": "", "rejected": "no"}', "begin with no word that they share"),
    (
        r'{"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: ho\n\nAssistant: a"}',
        "are dialogues that share no turn",
    ),
]


@pytest.mark.parametrize("line, words", UNSHARED)
def test_whole_texts_that_share_nothing_are_refused(tmp_path, line, words):
    check_refused(tmp_path, "pairs", line, "no field 'prompt'", words)


# ------------------------------------------------------------------------------------------- alpaca

# The two prompts as their authors print them.
WITHOUT_INPUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes \
the request.

### Instruction:
Add {1} and 2.

### Response:"""
WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further \
context. Write a response that appropriately completes the request.

### Instruction:
Add {1} and 2.

### Input:
In words.

### Response:"""


def test_the_prompt_of_alpaca_has_the_input(tmp_path):
    path = write(
        tmp_path, r'{"instruction": "Add {1} and 2.", "input": "In words.", "output": "three\n"}'
    )
    fields = fields_of(path, "sft", prompt_format="alpaca")
    assert fields == [{"prompt": WITH_INPUT, "response": "three\n"}]
    assert fields_of(path, "prompts", prompt_format="alpaca") == [{"prompt": WITH_INPUT}]


@pytest.mark.parametrize("further", [', "input": ""', ', "input": null', ""])
def test_the_input_of_alpaca_may_be_missing(tmp_path, further):
    path = write(tmp_path, '{"instruction": "Add {1} and 2.", "output": "3"' + further + "}")
    fields = fields_of(path, "sft", prompt_format="alpaca")
    assert fields == [{"prompt": WITHOUT_INPUT, "response": "3"}]


def test_the_columns_of_alpaca_can_be_renamed(tmp_path):
    path = write(tmp_path, '{"task": "Add {1} and 2.", "more": "In words.", "output": "x"}')
    columns = ["instruction=task", "input=more"]
    fields = fields_of(path, "sft", columns, prompt_format="alpaca")
    assert fields == [{"prompt": WITH_INPUT, "response": "x"}]


BAD_ALPACA = [
    ([], '{"instruction": "a", "input": 5, "output": "b"}', "field 'input' must be a string"),
    ([], '{"instruction": "a"}', "no field 'output'"),
    (
        ["input=more"],
        '{"instruction": "a", "output": "b"}',
        "no field 'more', which --columns names",
    ),
]


@pytest.mark.parametrize("columns, line, words", BAD_ALPACA)
def test_alpaca_that_is_refused(tmp_path, columns, line, words):
    flags = {"columns": columns, "prompt_format": "alpaca"}
    check_refused(tmp_path, "sft", line, words, **flags)


# ---------------------------------------------------------------------------------- the data's own


def test_a_row_keeps_the_datas_own(tmp_path):
    own = {"prompt": "p", "response": "r", "answer": 4, "more": [{"a": None}]}
    path = jsonl(tmp_path / "a.jsonl", [own])
    assert read_rows(path, "sft") == [{"prompt": "p", "response": "r", "row": own}]
    assert read_rows(path, "prompts", ["prompt=response"]) == [{"prompt": "r", "row": own}]


def test_a_plain_row_is_its_own():
    plain = {"prompt": "p", "response": "r"}
    assert own_row(plain) is plain


def test_the_datas_own_row_does_not_change_with_the_fields(tmp_path):
    (row,) = read_rows(write(tmp_path, '{"messages": UNANSWERED}'), "sft")
    before = copy.deepcopy(own_row(row))

    row["prompt"].pop()
    row["messages"].pop()

    assert own_row(row) == before
    assert len(before["messages"]) == 6


# --------------------------------------------------------------------------------------- in splits


def config(dataset, **changes):
    return RunConfig(**{"dataset": str(dataset), "eval_size": 4} | changes)


def write_chats(tmp_path, n, most_turns=1):
    """n chats: of 1 to most_turns questions in turn, every fourth one with a system prompt."""
    rows = []
    for i in range(n):
        chat = [SYSTEM] if i % 4 == 0 else []
        for turn in range(1 + i % most_turns):
            chat += [user(f"q{i} {turn}?"), assistant(f"a{i}")]
        rows.append({"messages": chat})
    return jsonl(tmp_path / "chats.jsonl", rows)


def sentence_on(path, kind="sft", **changes):
    """What a run says of its data behind the sizes of its splits."""
    _, _, note = load_splits(config(path, **changes), kind)
    return note.split(", ", 2)[-1]


def test_the_sentence_counts_turns_and_system_prompts(tmp_path):
    path = write_chats(tmp_path, 40, most_turns=4)
    assert sentence_on(path) == "chats of 2 to 8 turns, 10 with a system prompt"
    # The last answers are no part of the prompts.
    assert sentence_on(path, "prompts") == "chats of 1 to 7 turns, 10 with a system prompt"


def test_the_sentence_on_chats_that_are_alike(tmp_path):
    rows = [ask(f"q{i}") for i in range(20)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    assert sentence_on(path) == "chats of 2 turns"
    assert sentence_on(path, "prompts") == "chats of 1 turn"


def test_the_sentence_on_texts(tmp_path):
    lines = [f'{{"text": "a{i}"}}' for i in range(20)]
    path = write(tmp_path, *lines)
    assert sentence_on(path) == "texts without prompts"


@pytest.mark.parametrize("columns", [[], ["chosen=rejected", "rejected=chosen"]])
def test_the_sentence_on_prompts_that_are_shared(tmp_path, columns):
    lines = [f'{{"chosen": "q{i}? yes", "rejected": "q{i}? no"}}' for i in range(20)]
    path = write(tmp_path, *lines)
    found = sentence_on(path, "pairs", columns=columns)
    assert found == "prompts are what chosen and rejected share"


def test_the_sentence_on_plain_rows_is_their_sizes(tmp_path):
    lines = [f'{{"prompt": "q{i}", "response": "r", "more": 1}}' for i in range(40)]
    path = write(tmp_path, *lines)
    _, _, note = load_splits(config(path), "sft")
    assert note == "36 demonstrations, 4 held out"


def write_twice(tmp_path):
    """20 chats, each in two rows that differ by white space. -> the file's path"""
    rows = []
    for i in range(20):
        rows.append(ask(f"q {i}?", f"a{i}"))
        rows.append(ask(f" q  {i}?\n", f"a{i}"))
    return jsonl(tmp_path / "a.jsonl", rows)


def test_chats_are_held_out_by_their_prompts(tmp_path):
    train, held_out, note = load_splits(config(write_twice(tmp_path)), "sft")

    answers_trained = {row["response"] for row in train}
    answers_held_out = {row["response"] for row in held_out["eval"]}
    assert len(train) == 32
    # Four rows, of two prompts.
    assert len(answers_held_out) == 2
    assert not answers_trained & answers_held_out
    assert "trained on" not in note


def test_held_out_chats_that_are_trained_on_are_counted(tmp_path):
    path = write_twice(tmp_path)
    note = sentence_on(path, eval_dataset=path, eval_size=100)
    assert "20 of 20 held-out prompts are trained on too" in note


def test_texts_without_prompts_are_held_out_by_themselves(tmp_path):
    rows = []
    for i in range(20):
        rows += [{"text": f"a {i}"}, {"text": f"a  {i}"}]
    path = jsonl(tmp_path / "a.jsonl", rows)

    train, held_out, _ = load_splits(config(path), "sft")

    texts_trained = {canonical(row["response"]) for row in train}
    texts_held_out = {canonical(row["response"]) for row in held_out["eval"]}
    assert len(train) == 32
    assert len(texts_held_out) == 2
    assert not texts_trained & texts_held_out


def test_prompts_are_the_same_up_to_white_space():
    same = user(" a b?\n")
    other_role = assistant("a  b?")
    key = canonical([user("a  b?")])
    assert key == canonical([same])
    assert key != canonical([other_role])
    assert key != canonical([SYSTEM, same])


def test_equal_pairs_of_chats_are_dropped(tmp_path):
    rows = []
    for i in range(20):
        chosen = ask(f"q{i}", "a")["messages"]
        rejected = ask(f"q{i}", "b" if i % 4 else "a")["messages"]
        rows.append({"chosen": chosen, "rejected": rejected})
    path = jsonl(tmp_path / "a.jsonl", rows)

    train, held_out, note = load_splits(config(path), "pairs")

    assert len(train) + len(held_out["eval"]) == 15
    assert "5 with chosen == rejected skipped" in note


# The question of chat i has i + 1 words; the answer is one more.
RULES = [
    ("source=even", [0, 2, 4, 6, 8]),
    ("words:prompt<=3", [0, 1, 2]),
    ("words:messages>5", [4, 5, 6, 7, 8, 9]),
]


def answers_within(tmp_path, rule):
    """The numbers of the chats that fit a rule of distribution."""
    rows = []
    for i in range(10):
        row = ask("w " * (i + 1), answer=f"a{i}")
        row["source"] = "odd" if i % 2 else "even"
        rows.append(row)
    path = jsonl(tmp_path / "a.jsonl", rows)
    flags = {"in_distribution": rule, "eval_dataset": path, "eval_size": 100}
    train, _, _ = load_splits(config(path, **flags), "sft")
    assert all(row["prompt"] for row in train)
    return [int(row["response"][1:]) for row in train]


@pytest.mark.parametrize("rule, expected", RULES)
def test_rules_of_distribution_for_chats(tmp_path, rule, expected):
    assert answers_within(tmp_path, rule) == expected


def test_a_rule_may_change_the_chat_that_it_sees(tmp_path):
    code = (
        "def f(row):\n    row['prompt'].clear()\n    return row['messages'][0]['role'] == 'user'\n"
    )
    (tmp_path / "my.py").write_text(code)
    assert answers_within(tmp_path, f"{tmp_path}/my.py:f") == list(range(10))


def test_a_rule_sees_the_answer_of_a_dialogue(tmp_path):
    """Not the whole dialogue that the column holds."""
    pairs = []
    for i in range(20):
        start = f"\n\nHuman: q{i} {'very ' * 30}\n\nAssistant:"
        answer = " a" * (i % 4 + 1)
        pairs.append({"chosen": start + answer, "rejected": start + " b"})
    path = jsonl(tmp_path / "a.jsonl", pairs)
    flags = {"in_distribution": "words:chosen<=2", "eval_dataset": path, "eval_size": 100}
    train, _, _ = load_splits(config(path, **flags), "pairs")
    assert {row["chosen"] for row in train} == {" a", " a a"}


# ------------------------------------------------------------------- characters that cannot be read


def write_halves(tmp_path):
    """20 plain rows, then one with halves of characters, then one whose two halves are a whole."""
    lines = [f'{{"prompt": "p{i}", "response": "r"}}' for i in range(20)]
    lines.append(r'{"prompt": "Funny \ud83d", "response": " Yes \ude00!", "more": ["\udfff"]}')
    lines.append(r'{"prompt": "p\ud83d\ude00", "response": "whole"}')
    return write(tmp_path, *lines)


def test_half_a_character_becomes_a_whole_one(tmp_path):
    row = read_rows(write_halves(tmp_path), "sft")[-2]
    assert row["prompt"] == "Funny \ufffd"
    assert row["response"] == " Yes \ufffd!"
    assert own_row(row)["more"] == ["\ufffd"]


def test_two_halves_side_by_side_are_one_character(tmp_path):
    row = read_rows(write_halves(tmp_path), "sft")[-1]
    assert row["prompt"] == "p\U0001f600"


def test_rows_with_characters_that_could_not_be_read_are_counted(tmp_path):
    path = write_halves(tmp_path)
    assert sentence_on(path) == "1 row holds U+FFFD, a character that could not be read"
    # Here the row is trained on and held out too.
    note = sentence_on(path, eval_dataset=path, eval_size=100)
    assert note.startswith("2 rows hold U+FFFD, a character that could not be read")


def test_characters_that_could_not_be_read_are_counted_in_chats(tmp_path):
    rows = [ask(f"q{i}") for i in range(20)]
    rows.append(ask("\ufffd"))
    path = jsonl(tmp_path / "a.jsonl", rows)
    assert sentence_on(path).startswith("chats of 2 turns, 1 row holds U+FFFD")


# --------------------------------------------------------------------------- other readers of chats


def test_a_pool_may_hold_chats(tmp_path):
    line = '{"prompt": ASKED, "responses": ["a", "b"], "gold_scores": [1, 2], "answer": 4}'
    path = write(tmp_path, line)

    (row,) = pool.read(path)

    assert row["prompt"] == ASKED
    assert row["responses"] == ["a", "b"]
    assert row["gold_scores"] == [1, 2]
    # What is the pool's own is no part of the data's row.
    asked = json.loads(spell(line))["prompt"]
    assert own_row(row) == {"prompt": asked, "answer": 4}


def test_a_pool_whose_prompt_is_no_prompt(tmp_path):
    path = write(tmp_path, '{"prompt": CHAT, "responses": ["a"]}')
    refuses(pool.read, path, match=["a.jsonl:1: a user's turn must stand"])


BENCHMARKS = [
    ("rewardbench2", '{"prompt": ASKED, "chosen": ["a"], "rejected": ["b", "c"]}'),
    ("rm_bench", '{"prompt": ASKED, "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}'),
    ("rewardbench2", '{"question_id": 1, "prompt": ASKED, "chosen": "a", "rejected": "b"}'),
]


@pytest.mark.parametrize("name, line", BENCHMARKS)
def test_a_benchmark_may_hold_chats(tmp_path, name, line):
    flags = SimpleNamespace(dataset=write(tmp_path, line))
    (item,) = benchmark_files.READ[name](flags)
    assert item.prompt == ASKED


def test_answers_to_chats_are_matched(tmp_path):
    """By the prompt; the sampled ids of an answer come along."""
    lines = []
    for i in range(3):
        chat = json.dumps([user(f"q{i}")])
        lines.append(f'{{"prompt": {chat}, "response": "a{i}", "prompt_ids": [{i}], "more": 1}}')
    before = feature_texts.read_answers(write(tmp_path, *lines))
    after = before[::-1]

    partners = feature_texts.match_answers(after, before, ("after", "before"))

    assert [row["response"] for row in partners] == ["a2", "a1", "a0"]
    assert [row["prompt_ids"] for row in partners] == [[2], [1], [0]]
    assert partners[0]["response_ids"] is None


@pytest.mark.parametrize("further", ["", ":test", ":main:test", ":main:train[:100]"])
def test_the_fingerprint_of_a_folder_is_that_of_all_its_splits(tmp_path, further):
    assert path_in("dataset", f"{tmp_path}{further}") == str(tmp_path)
    assert path_in("eval_splits", f"x={tmp_path}{further}") == str(tmp_path)
    assert path_in("eval_splits", f"x=tldr:{tmp_path}{further}") == str(tmp_path)


def test_a_system_prompt_may_stand_in_a_column_of_its_own(tmp_path):
    line = '{"system": "Be brief.", "conversations": [%s, %s]}'
    human = '{"from": "human", "value": "Hi"}'
    gpt = '{"from": "gpt", "value": "Yo"}'
    path = tmp_path / "a.jsonl"
    path.write_text(line % (human, gpt))

    (row,) = read_rows(str(path), "sft")
    (question,) = read_rows(str(path), "prompts")

    system = {"role": "system", "content": "Be brief."}
    assert row["prompt"] == [system, {"role": "user", "content": "Hi"}]
    assert question["prompt"] == row["prompt"]

"""nanorlhf.chats: what is read as a message, what is refused, and how a prompt is shown."""

import json

import pytest
from support import refuses

from nanorlhf import chats

SYSTEM = {"role": "system", "content": "Be kind."}
ASK = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}


def read(text):
    """A chat as it stands in a file -> its messages."""
    return chats.read_messages("a.jsonl:1", json.loads(text), "chat")


# ---------------------------------------------------------------------------------------- messages


def test_messages_are_read_without_their_other_keys():
    named = {**SYSTEM, "name": "x", "tool_calls": None}
    weighted = {**ASK, "weight": 0}

    messages = chats.read_messages("a.jsonl:1", [named, weighted, ANSWER])

    assert messages == [SYSTEM, ASK, ANSWER]
    # The data's own messages stay as they are.
    assert named["name"] == "x"


@pytest.mark.parametrize("user", ["human", "user"])
@pytest.mark.parametrize("assistant", ["gpt", "chatgpt", "assistant"])
def test_the_roles_of_sharegpt(user, assistant):
    given = [
        {"from": "system", "value": "Be kind."},
        {"from": user, "value": "Why?"},
        {"from": assistant, "value": "Because.", "weight": 1.0},
    ]
    assert chats.read_messages("a.jsonl:1", given) == [SYSTEM, ASK, ANSWER]


def test_a_table_of_both_kinds_of_messages():
    """Parquet gives all messages the same keys."""
    ask = {**ASK, "from": None, "value": None}
    answer = {"role": None, "content": None, "from": "gpt", "value": "Because."}
    assert chats.read_messages("a.parquet[0]", [ask, answer]) == [ASK, ANSWER]


def test_parts_that_are_texts_are_joined():
    parts = '[{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?", "image": null}]'
    assert read(f'[{{"role": "user", "content": {parts}}}]') == [ASK]


# (a chat as it stands in a file, what the error says)
REFUSED = [
    ('"Why?"', "field 'chat' must be a list of messages, not str"),
    ("null", "field 'chat' must be a list of messages, not NoneType"),
    ("[]", "field 'chat' holds no messages"),
    ('["Why?"]', "chat[0] must be an object with role and content"),
    ('[{"role": "tool", "content": "4"}]', "chat[0]: the role must be one of system, user, human"),
    ('[{"role": "tool", "content": "4"}]', "not 'tool'"),
    ('[{"role": ["user"], "content": "4"}]', "not ['user']"),
    ('[{"content": "4"}]', "not None"),
    ('[{"from": "bing", "value": "4"}]', "not 'bing'"),
    (
        '[{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}]',
        "chat[0]: tool_calls cannot be read",
    ),
    (
        '[{"role": "assistant", "content": "", "function_call": {"name": "f"}}]',
        "chat[0]: function_call cannot be read",
    ),
    ('[{"role": "user"}]', "the content must be a string or a list of texts, not NoneType"),
    ('[{"role": "user", "content": null}]', "the content must be a string"),
    ('[{"role": "user", "content": 4}]', "not int"),
    ('[{"role": "user", "content": ["Why?"]}]', "a part of the content is no text: 'Why?'"),
    ('[{"role": "user", "content": [{"type": "image_url"}]}]', "is no text: {'type': 'image_url'}"),
    ('[{"role": "user", "content": [{"type": "text", "text": 4}]}]', "is no text"),
]


@pytest.mark.parametrize("text, words", REFUSED)
def test_what_cannot_be_read_is_one_line(text, words):
    refuses(read, text, match=["a.jsonl:1: ", words])


def test_the_error_names_the_message():
    good = json.dumps(ASK)
    refuses(read, f"[{good}, {good}, 5]", match=["chat[2] must be an object"])


# ----------------------------------------------------------------------------------------- prompts


def test_a_text_is_a_prompt_as_it_is():
    assert chats.read_prompt("a.jsonl:1", " Why?\n") == " Why?\n"
    assert chats.read_prompt("a.jsonl:1", "") == ""


def test_messages_are_a_prompt():
    messages = [{"from": "human", "value": "Why?"}]
    assert chats.read_prompt("a.jsonl:1", messages) == [ASK]


def test_a_prompt_that_is_neither_is_refused():
    words = ["a.jsonl:1: field 'question' must be a string, not int", "or a list of messages"]
    refuses(chats.read_prompt, "a.jsonl:1", 4, "question", match=words)


@pytest.mark.parametrize("messages", [[ASK, ANSWER], [SYSTEM], [ASK, SYSTEM]])
def test_a_prompt_ends_with_a_users_turn(messages):
    refuses(chats.read_prompt, "a.jsonl:1", messages, match=["a.jsonl:1: a user's turn must stand"])


def test_a_text_as_a_chat_is_one_user_turn():
    assert chats.as_chat("Why?") == [ASK]
    assert chats.as_chat([SYSTEM, ASK]) == [SYSTEM, ASK]


def test_a_chat_is_shown_line_by_line():
    shown = chats.show([SYSTEM, ASK, ANSWER])
    assert shown == "system: Be kind.\nuser: Why?\nassistant: Because."
    assert chats.show(" Why?\n") == " Why?\n"


def test_a_chat_is_cut_after_the_last_message_of_a_role():
    chat = [SYSTEM, ASK, ANSWER, ASK, ANSWER, ASK]
    assert chats.cut_after(chat, "assistant") == chat[:5]
    assert chats.cut_after(chat, "user") == chat
    assert chats.cut_after([SYSTEM], "user") == []


def test_a_system_prompt_is_no_turn():
    assert chats.count_turns([SYSTEM, ASK, ANSWER, ASK]) == 3

"""Chats: lists of messages, and where in them the prompt ends. There is no tokenizer here.

    Message    {"role": "system", "user" or "assistant", "content": a text}
    Prompt     a string, or a chat: a list of messages that ends with a user's turn

Data sets write a message as {role, content} or, after ShareGPT, as {from, value}. read_messages()
makes the first of the second. Which order of roles is allowed is for the tokenizer's template to
say (chat_templates.py).
"""

from .errors import require
from .runtime.files import shorten

Message = dict[str, str]
Prompt = str | list[Message]

# The role of each name that data sets use for it.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
ROLE_NAMES = ", ".join(ROLES)


# ---------------------------------------------------------------------------------------- messages


def read_messages(place: str, value, name: str = "messages") -> list[Message]:
    """A list of messages from a data set -> [{role, content}], with the roles of Message.

    name: the column that holds the list. InputError, with the place: it is no such list, or it
    holds what no text can stand for, such as images and calls of tools.
    """
    found = type(value).__name__
    require(
        isinstance(value, list), f"{place}: field {name!r} must be a list of messages, not {found}"
    )
    require(value, f"{place}: field {name!r} holds no messages")
    messages = []
    for i, message in enumerate(value):
        # An error names the message: 'chats.jsonl:7: messages[2]'.
        messages.append(read_message(f"{place}: {name}[{i}]", message))
    return messages


def read_message(place: str, message) -> Message:
    """A message of a data set -> {role, content}. place: its file, row and place in the chat."""
    # {"role": "user", "content": "Hi"} or, after ShareGPT, {"from": "human", "value": "Hi"}. Where
    # a table holds both kinds, each message has all four, and null for those that are not its own.
    is_object = isinstance(message, dict)
    require(is_object, f"{place} must be an object with role and content")
    name = message.get("role")
    if name is None:
        name = message.get("from")
    role = ROLES.get(name) if isinstance(name, str) else None
    require(role, f"{place}: the role must be one of {ROLE_NAMES}, not {shorten(name)}")
    # Without its tool calls an answer could not be understood, so such a chat is refused. An empty
    # field is no call: a data set may have one in all messages.
    for calls in ("tool_calls", "function_call"):
        require(not message.get(calls), f"{place}: {calls} cannot be read, only texts can")
    content = message.get("content")
    if content is None:
        content = message.get("value")
    return {"role": role, "content": read_content(place, content)}


def read_content(place: str, content) -> str:
    """What a message says -> one text. Several parts of it that are texts are joined."""
    if isinstance(content, str):
        return content
    found = type(content).__name__
    # Data for models that also see images have a list: [{"type": "text", "text": "Hi"}, ...].
    is_list = isinstance(content, list)
    require(is_list, f"{place}: the content must be a string or a list of texts, not {found}")
    texts = []
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        is_text = is_text and isinstance(part.get("text"), str)
        require(is_text, f"{place}: a part of the content is no text: {shorten(part)}")
        texts.append(part["text"])
    return "".join(texts)


# ----------------------------------------------------------------------------------------- prompts


def is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is a list of messages, not a string."""
    return isinstance(prompt, list)


def as_chat(prompt: Prompt) -> list[Message]:
    """A prompt as a chat: a string is one user turn."""
    if is_chat(prompt):
        return prompt
    return [{"role": "user", "content": prompt}]


def show(prompt: Prompt) -> str:
    """A prompt as one text, for tables, judges and encoders: a chat has a line for each message."""
    if not is_chat(prompt):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def read_prompt(place: str, value, name: str = "prompt") -> Prompt:
    """A prompt of a data set: a string as it is, or read_messages() up to a user's turn.

    name: its column. InputError, with the place: it is neither, or ends with another turn.
    """
    if is_chat(value):
        return check_prompt(place, read_messages(place, value, name))
    found = type(value).__name__
    require(
        isinstance(value, str),
        f"{place}: field {name!r} must be a string, not {found} (or a list of messages)",
    )
    return value


def check_prompt(place: str, messages: list[Message]) -> list[Message]:
    """InputError unless these messages end with a user's turn, as a prompt does. -> the messages"""
    has_question = bool(messages) and messages[-1]["role"] == "user"
    require(has_question, f"{place}: a user's turn must stand in front of the answer")
    return messages


def cut_after(messages: list[Message], role: str) -> list[Message]:
    """The messages up to the last one of this role; none where no message has it."""
    last = len(messages)
    while last > 0 and messages[last - 1]["role"] != role:
        last -= 1
    return messages[:last]


def count_turns(messages: list[Message]) -> int:
    """How many messages of a chat are a user's or an assistant's."""
    return sum(message["role"] != "system" for message in messages)

r"""Chats to token ids: what the tokenizer's own template writes of them.

    user: Hi                    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n
    assistant: Hello                                                  Hello<|im_end|>

The template decides where an answer begins and ends. No template is known here: a chat is written
with the answer and without it, and what the first text has more is the answer. tokens.py does the
same for plain strings, and calls the functions of this file where rows hold chats.
"""

import re
from collections.abc import Callable

from .chats import as_chat, is_chat
from .data import place_of
from .errors import library_call, require


def uses_template(rows: list[dict], chat: bool = False) -> bool:
    """Whether these rows go through the chat template, as chats do.

    chat: so do prompts that are strings, each as a user's turn.
    """
    # One row tells whether all are chats: no file mixes chats and plain texts (data.read_parts).
    return bool(rows) and (chat or is_chat(rows[0]["prompt"]))


# --------------------------------------------------------------------------- what a template writes


def render(tokenizer, messages: list[dict], generation: bool = False, place: str = "a chat") -> str:
    """A chat as its template writes it.

    generation: up to where an assistant's turn begins. InputError: there is no template, or it
    refuses the chat, as some do with system prompts.
    """
    require(
        tokenizer.chat_template,
        f"{place} needs a chat template, and this tokenizer has none (a model's folder holds it as "
        "chat_template.jinja)",
    )
    turns = []
    for message in messages:
        # An EOS that an assistant's turn spells is the one that the template writes.
        if message["role"] == "assistant":
            message = {**message, "content": without_eos(tokenizer, message["content"])}
        turns.append(message)
    with library_call(f"{place}: refused by the tokenizer's chat template"):
        return tokenizer.apply_chat_template(
            turns, add_generation_prompt=generation, tokenize=False
        )


def check_template(tokenizer, row: dict):
    """InputError where the chat template leaves out what a message says.

    Those of models that read images may look for a list of parts in it, and pass by a text. Others
    know the roles by other names. All chats would then be the same few tokens.
    """
    place = place_of(row)
    messages = as_chat(row["prompt"])
    last = messages[-1]
    longer = {**last, "content": f"{last['content']} and more"}
    text = render(tokenizer, messages, generation=True, place=place)
    longer_text = render(tokenizer, [*messages[:-1], longer], generation=True, place=place)
    require(
        text != longer_text,
        f"{place}: the tokenizer's chat template leaves out what a message says; it may be for "
        "lists of texts and images (write one for texts into chat_template.jinja of the model's "
        "folder)",
    )


def check_beginning(whole: str, beginning: str, place: str):
    """InputError where a chat does not begin with the chat as it was before a turn was added."""
    require(
        whole.startswith(beginning),
        f"{place}: the chat template writes earlier turns differently once a turn is added, so "
        "that nobody can say where the answer begins",
    )


def encode_rendered(tokenizer, texts: list[str]) -> list[list[int]]:
    """Texts that a template has written -> token lists. Control tokens in them are control tokens.

    The template writes all of them, BOS too, so the tokenizer adds none.
    """
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=False).input_ids


# ------------------------------------------------------------------------------ prompts and answers


def encode_chat_prompts(tokenizer, rows: list[dict]) -> list[list[int]]:
    """The prompts of rows -> token lists. InputError: the template refuses one of them."""
    check_template(tokenizer, rows[0])
    # generation: a prompt ends with what makes the model answer, say <|im_start|>assistant\n.
    texts = []
    for row in rows:
        messages = as_chat(row["prompt"])
        texts.append(render(tokenizer, messages, generation=True, place=place_of(row)))
    return encode_rendered(tokenizer, texts)


def encode_chat_answers(tokenizer, rows: list[dict], field: str) -> list[list[int]]:
    """Answers to chats -> token lists of what the template writes behind the prompts."""
    texts = []  # (the prompt, what stands behind it)
    for row in rows:
        place = place_of(row)
        messages = as_chat(row["prompt"])
        prompt = render(tokenizer, messages, generation=True, place=place)
        # Only the template knows what it writes around an answer. So the chat is written with and
        # without the answer, and the difference is what the policy learns.
        answer = {"role": "assistant", "content": row[field]}
        whole = render(tokenizer, [*messages, answer], place=place)
        check_beginning(whole, prompt, place)
        texts.append((prompt, whole.removeprefix(prompt)))
    return [end_at_last_end(tokenizer, ids) for ids in encode_behind(tokenizer, texts)]


def encode_behind(tokenizer, texts: list[tuple[str, str]]) -> list[list[int]]:
    """Texts (before, part) -> the token ids of each part, as it stands behind what is before it.

    The two are tokenized as one text, which begins with the tokens of what is before. Where it does
    not, since a token would reach over the boundary, the part is tokenized alone: a policy gets its
    prompt alone, too.
    """
    # One call takes all texts: tokenizers are slow if they are called text by text.
    encoded = []
    all_before = encode_rendered(tokenizer, [before for before, _ in texts])
    all_whole = encode_rendered(tokenizer, [before + part for before, part in texts])
    for (_, part), before_ids, whole_ids in zip(texts, all_before, all_whole):
        n_before = len(before_ids)
        if whole_ids[:n_before] == before_ids:
            encoded.append(whole_ids[n_before:])
        else:
            (alone,) = encode_rendered(tokenizer, [part])
            encoded.append(alone)
    return encoded


# ----------------------------------------------------------------------- all turns of the assistant


def encode_all_turns(
    tokenizer, rows: list[dict], field: str
) -> tuple[list[list[int]], list[list[int]], list[list[bool]]]:
    """Chats -> prompts, up to the first assistant turn; all that follows; which of it is scored.

    The tokens of assistant turns are scored, with the ends of these turns.
    """
    check_template(tokenizer, rows[0])
    prompts = []
    responses = []
    scored = []
    for row in rows:
        answer = {"role": "assistant", "content": row[field]}
        # ["<user>Hi<end><assistant>", "Hello<end>", "<user>Bye<end><assistant>", "Bye<end>"]
        parts = split_turns(tokenizer, [*row["prompt"], answer], place_of(row))

        # Each part is tokenized behind all that stands before it, as a policy would read it.
        texts = []
        before = ""
        for part in parts:
            texts.append((before, part))
            before += part
        prompt, *rest = encode_behind(tokenizer, texts)
        rest[-1] = end_at_last_end(tokenizer, rest[-1])

        # Assistant turns and what stands between them alternate. The user's words are read but not
        # learned, and so is what a template writes behind a turn's end: nobody generates it.
        response = []
        mask = []
        for i, ids in enumerate(rest):
            n_scored = 0
            if i % 2 == 0:
                # All of it, where the template has no end.
                n_scored = length_of_turn(tokenizer, ids) or len(ids)
            response += ids
            mask += [True] * n_scored + [False] * (len(ids) - n_scored)
        prompts.append(prompt)
        responses.append(response)
        scored.append(mask)
    return prompts, responses, scored


def split_turns(tokenizer, messages: list[dict], place: str) -> list[str]:
    """A chat that ends with an assistant turn -> its text in parts.

    -> [prompt, answer, what stands between, answer, ...]. An assistant turn with which a chat
    begins is part of the prompt: nobody asked for it.
    """
    whole = render(tokenizer, messages, place=place)
    parts = []
    done = 0
    for i, message in enumerate(messages):
        has_user_before = any(earlier["role"] == "user" for earlier in messages[:i])
        if message["role"] != "assistant" or not has_user_before:
            continue
        # The chat up to where this turn begins, and up to its end. The whole text must begin with
        # both, or it cannot be cut there: some templates drop the thoughts of earlier turns.
        before = render(tokenizer, messages[:i], generation=True, place=place)
        after = render(tokenizer, messages[: i + 1], place=place)
        for beginning in (before, after):
            check_beginning(whole, beginning, f"{place} (take --loss_on last)")
        parts.append(whole[done : len(before)])  # the prompt, or what stands between two turns
        parts.append(whole[len(before) : len(after)])  # the turn
        done = len(after)
    return parts


# ---------------------------------------------------------------------------- where a response ends


def end_ids(tokenizer) -> list[int]:
    """The ids at which a response ends: EOS, and what models.load_tokenizer found beside it."""
    return getattr(tokenizer, "end_ids", [tokenizer.eos_token_id])


def without_eos(tokenizer, response: str) -> str:
    """A response without the EOS that its text may spell out: its ids get one anyway."""
    text = response.rstrip()
    for end_id in end_ids(tokenizer):
        end = tokenizer.convert_ids_to_tokens(end_id)
        if text.endswith(end):
            return text.removesuffix(end)
    # Any other response keeps the white space at its end: the data teach it.
    return response


def end_at_last_end(tokenizer, ids: list[int]) -> list[int]:
    """The ids of an answer up to the end of its turn; EOS is added where the template has no end.

    Templates write more behind the turn's end, such as a newline, that nobody has to generate.
    Pitfall: with a template that has no end, an end that the answer itself spells is taken for it.
    """
    n = length_of_turn(tokenizer, ids)
    if n == 0:
        return [*ids, tokenizer.eos_token_id]
    return ids[:n]


def length_of_turn(tokenizer, ids: list[int]) -> int:
    """How many tokens there are up to the last that ends a response; 0 where none ends it."""
    # The search begins at the back: an answer's own text may spell an end too, before its turn's.
    ends = end_ids(tokenizer)
    for n in range(len(ids), 0, -1):
        if ids[n - 1] in ends:
            return n
    return 0


# ---------------------------------------------------------------------- control tokens within chats


def leave_out_control_tokens(
    tokenizer, rows: list[dict], config, say: Callable[[str], None]
) -> list[dict]:
    """Rows without the chats whose turns spell out a control token; these are counted with `say`.

    A template's text is tokenized with its control tokens, so that a user who writes <|im_end|>
    would end the turn. config: TextFlags; --special_in_text keeps such chats. Plain strings are
    never left out: tokens.encode_strings() takes what they spell out for text.
    """
    rows, _ = leave_out_of_splits(tokenizer, rows, {}, config, say)
    return rows


def leave_out_of_splits(
    tokenizer,
    rows: list[dict],
    held_out: dict[str, list[dict]],
    config,
    say: Callable[[str], None],
) -> tuple[list[dict], dict[str, list[dict]]]:
    """leave_out_control_tokens() of training rows and of held-out rows {label: rows} at once.

    InputError: no row is left of one of them.
    """
    if config.special_in_text:
        return rows, held_out

    # One sentence counts what is left out of all splits, so it is printed after the last of them.
    chat = config.chat_template
    kept_rows, left_out = keep_harmless(tokenizer, rows, chat)
    kept_held_out = {}
    for label, part in held_out.items():
        kept_held_out[label], left_out_of_part = keep_harmless(tokenizer, part, chat)
        left_out += left_out_of_part
    if not left_out:
        return rows, held_out

    # Places end in the row's number, so that shorter ones come first.
    place, token = min(left_out, key=lambda item: (len(item[0]), item))
    n = len(left_out)
    chats = "chat" if n == 1 else "chats"
    sentence = (
        f"{n} {chats} left out whose turns spell a control token, the first at {place}: {token!r} "
        "(--special_in_text true keeps them)"
    )
    for label, part in [("training", kept_rows), *kept_held_out.items()]:
        require(part, f"{config.dataset}: no row of {label} is left; {sentence}")
    n_left = len(kept_rows) + sum(map(len, kept_held_out.values()))
    say(f"{config.dataset}: {sentence}; {n_left} are left")
    return kept_rows, kept_held_out


def keep_harmless(
    tokenizer, rows: list[dict], chat: bool
) -> tuple[list[dict], list[tuple[str, str]]]:
    """Rows of one split -> those to keep, and what is left out: [(place, its control token)]."""
    # The rows of a split are all chats, or all texts. Another split may be of another file.
    if not uses_template(rows, chat):
        return rows, []
    pattern = pattern_of_control_tokens(tokenizer)
    kept = []
    left_out = []
    for row in rows:
        token = find_control_token(tokenizer, pattern, row)
        if token:
            left_out.append((place_of(row), token))
        else:
            kept.append(row)
    return kept, left_out


def pattern_of_control_tokens(tokenizer) -> re.Pattern:
    """A pattern that finds any of the tokenizer's control tokens in a text."""
    # Some control tokens have a role, such as EOS, and some have none, such as <|im_start|>.
    tokens = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            tokens.add(token.content)
    # A pattern takes the first alternative that fits, so the longest come first.
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def find_control_token(tokenizer, pattern: re.Pattern, row: dict) -> str:
    """The first control token that a turn of a row spells out; '' for none."""
    # An EOS at the end of an assistant's turn harms nothing: render() leaves it to the template.
    texts = []
    for message in as_chat(row["prompt"]):
        text = message["content"]
        if message["role"] == "assistant":
            text = without_eos(tokenizer, text)
        texts.append(text)
    for field in ("response", "chosen", "rejected"):
        if field in row:
            texts.append(without_eos(tokenizer, row[field]))
    for text in texts:
        match = pattern.search(text)
        if match:
            return match[0]
    return ""

r"""From rows of data to token ids: what a model reads of a prompt and its answers.

    encode           rows -> their prompts and responses, cut to fit
    ready_prompts    rows -> prompts that wait for an answer

Plain strings: a prompt begins with what the tokenizer puts in front of a text (BOS), and a response
ends with EOS. A control token that a string spells out is text.

    <bos> the room :                                       was bright <eos>

Chats: the tokenizer's own template writes prompt and answer together. It decides where the answer
begins and ends.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n     Hello<|im_end|>

Rows are those of data.read_rows. A prompt is a string or a chat, a list of messages (chats.py).
"""

import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .chats import as_chat, is_chat, show
from .data import own_row
from .errors import library_call, require
from .hf.folders import context_length
from .packing import Answers, Packed
from .runtime.files import UNREADABLE

Ids = list[int]  # the tokens of a text


@dataclass
class Encoded:
    """The token ids of N rows. All answers to a prompt share its tokens."""

    prompts: list[Ids]  # [N]
    responses: dict[str, list[Ids]]  # {field: [N]}
    # [N]: which tokens of a response the loss is on; None: all
    scored: list[list[bool]] | None = None
    n_prompts_cut: int = 0
    n_responses_cut: int = 0

    def compact(self) -> "Encoded":
        """The same ids in arrays, for what is held through a whole training."""
        responses = {field: as_arrays(lists) for field, lists in self.responses.items()}
        return replace(self, prompts=as_arrays(self.prompts), responses=responses)

    def describe_cuts(self, max_length: int | None) -> str:
        """How many texts had to be cut, as a part of a sentence."""
        n_responses = sum(map(len, self.responses.values()))
        prompts = count_with_share(self.n_prompts_cut, len(self.prompts), "prompts")
        responses = count_with_share(self.n_responses_cut, n_responses, "responses")
        if max_length is None:
            return f"{prompts} and {responses} cut"
        return f"{prompts} and {responses} cut to {max_length} tokens"


@dataclass
class Prompts:
    """Prompts that wait for an answer: their token ids, and the rows of data they come from."""

    ids: list[Ids]
    rows: list[dict]

    def __len__(self) -> int:
        return len(self.ids)

    def compact(self) -> "Prompts":
        """The same ids in arrays, for what is held through a whole training."""
        return Prompts(as_arrays(self.ids), self.rows)

    def at(self, index) -> "Prompts":
        """The prompts with these indices."""
        return Prompts([self.ids[i] for i in index], [self.rows[i] for i in index])


def as_arrays(rows: list[Ids]) -> list[array]:
    """Token ids in arrays: these take 4 bytes a token and 80 a row, lists about 40 a token."""
    return [array("i", ids) for ids in rows]


def count_with_share(n: int, total: int, what: str) -> str:
    """'0 prompts', or '3 prompts (12.5%)' of a total of 24."""
    if n == 0:
        return f"0 {what}"
    return f"{n} {what} ({n / total:.1%})"


def encode(
    tokenizer,
    rows: list[dict],
    fields: tuple[str, ...],
    max_length: int | None = None,
    chat: bool = False,
    loss_on: str = "last",
) -> Encoded:
    """Rows -> the token ids of their prompts, and of the answers in these fields.

    max_length: the most tokens that a prompt and its answer may have together; longer ones are cut
    by fit_item(). chat: a prompt that is a string is a user's turn in the tokenizer's chat
    template. loss_on: 'all' makes a chat's response begin at its first assistant turn, and `scored`
    marks the tokens of all assistant turns in it.
    """
    # One row tells whether all are chats: no file mixes chats and plain texts (data.read_parts).
    responses = {}
    scored = None
    if loss_on == "all" and rows and is_chat(rows[0]["prompt"]):
        (field,) = fields
        prompts, responses[field], scored = encode_all_turns(tokenizer, rows, field)
    else:
        prompts = encode_prompts(tokenizer, rows, chat, may_be_empty=True)
        for field in fields:
            responses[field] = encode_responses(tokenizer, rows, field, chat)
        fill_empty_prompts(prompts, responses)
    # Cutting comes last: how much of a prompt stays depends on how long its answers are.
    encoded = Encoded(prompts, responses, scored)
    if max_length is not None:
        cut_to_fit(encoded, max_length, tokenizer.bos_token_id)
    return encoded


def encode_items(
    tokenizer, rows: list[dict], max_length: int | None = None, chat: bool = False
) -> Encoded:
    """Rows {prompt, response} -> their token ids, where items have any number of answers.

    Rows with the same prompt that stand side by side are one item, whose answers share the prompt's
    tokens: see fit_item().
    """
    # Nothing is cut here yet: all answers to a prompt must lose the same part of it.
    encoded = encode(tokenizer, rows, ("response",), chat=chat)
    if max_length is not None:
        cut_items(encoded, max_length, tokenizer.bos_token_id)
    return encoded


def cut_items(encoded: Encoded, max_length: int, bos_token_id: int | None):
    """Cut prompts and their `response` to max_length, in place, and count what had to be cut.

    Equal prompts that stand side by side are one item.
    """
    prompts = encoded.prompts
    responses = encoded.responses["response"]
    first = 0
    while first < len(prompts):
        # The rows first .. last - 1 are the answers to one prompt.
        last = first + 1
        while last < len(prompts) and prompts[last] == prompts[first]:
            last += 1
        answers = responses[first:last]
        prompt, cut_answers = fit_item(encoded.prompts[first], answers, max_length, bos_token_id)
        if len(prompt) < len(prompts[first]):
            encoded.n_prompts_cut += last - first
        encoded.n_responses_cut += count_shorter(cut_answers, answers)
        prompts[first:last] = [prompt] * (last - first)
        responses[first:last] = cut_answers
        first = last


# ------------------------------------------------------------------------------------ plain strings


def encode_prompts(
    tokenizer, rows: list[dict], chat: bool = False, may_be_empty: bool = False
) -> list[Ids]:
    """The prompts of rows, strings or chats -> token lists.

    chat: strings too go through the tokenizer's chat template, as a user's turn. InputError: a
    prompt without any token, unless may_be_empty, and a chat that the template refuses.
    """
    if not rows:
        return []
    prompts = [row["prompt"] for row in rows]
    if chat or is_chat(prompts[0]):
        check_template(tokenizer, rows[0])
        # generation: a prompt ends with what makes the model answer, say <|im_start|>assistant\n.
        texts = []
        for row in rows:
            messages = as_chat(row["prompt"])
            texts.append(render(tokenizer, messages, generation=True, place=place_of(row)))
        # A template writes its own control tokens, BOS too.
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=False).input_ids

    # The tokenizer's own BOS goes in front of a plain text, but no EOS behind it: the response
    # follows there.
    front = ids_in_front(tokenizer)
    encoded = []
    for ids in encode_strings(tokenizer, prompts):
        ids = front + ids
        # The first token of a response is predicted from what stands before it: something must.
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
        require(
            ids or may_be_empty,
            "an empty prompt, and the tokenizer has no BOS token to start from",
        )
        encoded.append(ids)
    return encoded


def encode_strings(tokenizer, texts: list[str]) -> list[Ids]:
    """Plain texts -> token lists, nothing around them. Control tokens in them are text."""
    if not texts:  # a tokenizer refuses an empty list
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids


def ids_in_front(tokenizer) -> Ids:
    """What the tokenizer puts in front of a text: BOS, or nothing.

    Pitfall: some put an EOS behind a text too, which must not stand between prompt and response.
    """
    with_control_tokens = tokenizer("a").input_ids
    alone = tokenizer("a", add_special_tokens=False).input_ids
    # Where [bos, a, eos] stands beside [a], the text begins at the second token: [bos] is in front.
    n_more = len(with_control_tokens) - len(alone)
    for n_front in range(n_more + 1):
        if with_control_tokens[n_front : n_front + len(alone)] == alone:
            return with_control_tokens[:n_front]
    return []


def encode_responses(tokenizer, rows: list[dict], field: str, chat: bool = False) -> list[Ids]:
    """The responses in a field of rows -> token lists that end with EOS.

    The response to a chat is what the template writes behind the prompt. chat: a prompt that is a
    string counts as a chat.
    """
    if rows and (chat or is_chat(rows[0]["prompt"])):
        return encode_chat_answers(tokenizer, rows, field)
    texts = [without_eos(tokenizer, row[field]) for row in rows]
    encoded = encode_strings(tokenizer, texts)
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def without_eos(tokenizer, response: str) -> str:
    """A response without the EOS that its text may spell out: its ids get one anyway."""
    text = response.rstrip()
    for end_id in end_ids(tokenizer):
        end = tokenizer.convert_ids_to_tokens(end_id)
        if text.endswith(end):
            return text.removesuffix(end)
    # Any other response keeps the white space at its end: the data teach it.
    return response


def end_ids(tokenizer) -> Ids:
    """The ids at which a response ends: EOS, and what models.load_tokenizer found beside it."""
    return getattr(tokenizer, "end_ids", [tokenizer.eos_token_id])


def split_text(tokenizer, ids: Ids) -> list[str]:
    """The text of each token, spaces included: joined, they are the text of all.

    A character may need several tokens. The last of them has it, and the others have no text.
    """

    def decode(start, end):
        return tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)

    pieces = []
    before = 0  # where the last piece began
    start = 0  # where the next piece begins
    for end in range(1, len(ids) + 1):
        # What a token adds to a text depends on the token in front of it: often a space. So two
        # pieces are decoded together, and the text of the first is taken off.
        known = decode(before, start)
        text = decode(before, end)
        # The text ends within a character, whose other bytes are in the next tokens.
        if text.endswith(UNREADABLE) and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(known) :])
        before = start
        start = end
    return pieces


def fill_empty_prompts(prompts: list[Ids], responses: dict[str, list[Ids]]):
    """Move the first token of a text into its empty prompt, in place.

    That token is then read, and not learned: so a plain text can be learned from with a tokenizer
    that knows no BOS. InputError: there are several answers to an empty prompt.
    """
    for i, prompt in enumerate(prompts):
        if prompt:
            continue
        require(
            len(responses) == 1,
            "an empty prompt, and the tokenizer has no BOS token to start from",
        )
        for response in responses.values():
            prompts[i] = response[i][:1]
            # A text that is only EOS has EOS as its prompt and as its response.
            response[i] = response[i][1:] or response[i]


# -------------------------------------------------------------------------------------------- chats


def place_of(row: dict) -> str:
    """What an error calls a row: its file and line, where a chat has them, or how it begins."""
    if "place" in row:
        return row["place"]
    text = show(row["prompt"])
    return f"the prompt {text[:40]!r}"


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
    as_it_is = render(tokenizer, messages, generation=True, place=place)
    require(
        as_it_is != render(tokenizer, [*messages[:-1], longer], generation=True, place=place),
        f"{place}: the tokenizer's chat template leaves out what a message says; it may be for "
        "lists of texts and images (write one for texts into chat_template.jinja of the model's "
        "folder)",
    )


def encode_chat_answers(tokenizer, rows: list[dict], field: str) -> list[Ids]:
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


def check_beginning(whole: str, beginning: str, place: str):
    """InputError where a chat does not begin with the chat as it was before a turn was added."""
    require(
        whole.startswith(beginning),
        f"{place}: the chat template writes earlier turns differently once a turn is added, so "
        "that nobody can say where the answer begins",
    )


def end_at_last_end(tokenizer, ids: Ids) -> Ids:
    """The ids of an answer up to the end of its turn; EOS is added where the template has no end.

    Templates write more behind the turn's end, such as a newline, that nobody has to generate.
    Pitfall: with a template that has no end, an end that the answer itself spells is taken for it.
    """
    n = length_of_turn(tokenizer, ids)
    if n == 0:
        return [*ids, tokenizer.eos_token_id]
    return ids[:n]


def length_of_turn(tokenizer, ids: Ids) -> int:
    """How many tokens there are up to the last that ends a response; 0 where none ends it."""
    # The search begins at the back: an answer's own text may spell an end too, before its turn's.
    ends = end_ids(tokenizer)
    for n in range(len(ids), 0, -1):
        if ids[n - 1] in ends:
            return n
    return 0


def encode_all_turns(
    tokenizer, rows: list[dict], field: str
) -> tuple[list[Ids], list[Ids], list[list[bool]]]:
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


def encode_behind(tokenizer, texts: list[tuple[str, str]]) -> list[Ids]:
    """Texts (before, part) -> the token ids of each part, as it stands behind what is before it.

    The two are tokenized as one text, which begins with the tokens of what is before. Where it does
    not, since a token would reach over the boundary, the part is tokenized alone: a policy gets its
    prompt alone, too.
    """

    def tokenize(strings: list[str]) -> list[Ids]:
        return tokenizer(strings, add_special_tokens=False, split_special_tokens=False).input_ids

    # One call takes all texts: tokenizers are slow if they are called text by text.
    encoded = []
    all_before = tokenize([before for before, _ in texts])
    all_whole = tokenize([before + part for before, part in texts])
    for (_, part), before_ids, whole_ids in zip(texts, all_before, all_whole):
        n_before = len(before_ids)
        behind = whole_ids[n_before:]
        if whole_ids[:n_before] != before_ids:
            (behind,) = tokenize([part])
        encoded.append(behind)
    return encoded


# --------------------------------------------------------------------- control tokens within chats


def leave_out_control_tokens(
    tokenizer, rows: list[dict], config, say: Callable[[str], None]
) -> list[dict]:
    """Rows without the chats whose turns spell out a control token; these are counted with `say`.

    A template's text is tokenized with its control tokens, so that a user who writes <|im_end|>
    would end the turn. config: TextFlags; --special_in_text keeps such chats. Plain strings are
    never left out, since encode_strings() takes what they spell out for text.
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
    pattern = pattern_of_control_tokens(tokenizer)
    left_out = []  # (place, the control token that is spelled there), one for each row

    def keep(part: list[dict]) -> list[dict]:
        # The rows of a part are all chats, or all texts. Another part may be of another file.
        is_templated = bool(part) and (config.chat_template or is_chat(part[0]["prompt"]))
        if not is_templated:
            return part
        kept = []
        for row in part:
            token = find_control_token(tokenizer, pattern, row)
            if token:
                left_out.append((place_of(row), token))
            else:
                kept.append(row)
        return kept

    kept_rows = keep(rows)
    kept_held_out = {label: keep(part) for label, part in held_out.items()}
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
    for label, part in {"training": kept_rows, **kept_held_out}.items():
        require(part, f"{config.dataset}: no row of {label} is left; {sentence}")
    n_left = len(kept_rows) + sum(map(len, kept_held_out.values()))
    say(f"{config.dataset}: {sentence}; {n_left} are left")
    return kept_rows, kept_held_out


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


# -------------------------------------------------------------------------- texts that are too long


def cut_to_fit(encoded: Encoded, max_length: int, bos_token_id: int | None):
    """Cut all rows to max_length, in place, and count what had to be cut."""
    for i, prompt in enumerate(encoded.prompts):
        answers = [ids[i] for ids in encoded.responses.values()]
        cut_prompt, cut_answers = fit_item(prompt, answers, max_length, bos_token_id)
        encoded.prompts[i] = cut_prompt
        encoded.n_prompts_cut += count_shorter([cut_prompt], [prompt])
        encoded.n_responses_cut += count_shorter(cut_answers, answers)
        for ids, cut_answer in zip(encoded.responses.values(), cut_answers):
            ids[i] = cut_answer
        # `scored` is made for one answer to each prompt (encode_all_turns).
        if encoded.scored is not None:
            encoded.scored[i] = encoded.scored[i][: len(cut_answers[0])]


def count_shorter(cut: list[Ids], whole: list[Ids]) -> int:
    """How many texts have lost tokens."""
    n = 0
    for cut_ids, ids in zip(cut, whole):
        if len(cut_ids) < len(ids):
            n += 1
    return n


def fit_item(
    prompt: Ids, answers: list[Ids], max_length: int, bos_token_id: int | None = None
) -> tuple[Ids, list[Ids]]:
    """Cut a prompt on its left, and its answers on their right, so that each pair of them fits.

        room of the prompt = max(max_length / 2, max_length - longest answer)

    All answers share the prompt, so that no score differs because of what was cut from it. An
    answer that still does not fit keeps no EOS: it did not end there.
    """
    # With max_length 10, a prompt of 8 and answers of 2 and 4 the prompt keeps its last 6 tokens.
    # With an answer of 9 it keeps 5, since half of the room is the prompt's in any case.
    require(max_length > 1, "--max_length must leave room for a prompt and a response")
    longest = max(map(len, answers))
    room = max(max_length // 2, max_length - longest)
    prompt = cut_left(prompt, room, bos_token_id)
    room_of_answers = max_length - len(prompt)
    return prompt, [answer[:room_of_answers] for answer in answers]


def cut_left(ids: Ids, room: int, bos_token_id: int | None = None) -> Ids:
    """The last `room` tokens of a text, room >= 1.

    A BOS in front stays the first of them, and what follows it is cut: a model that was trained
    with a BOS has never read a text without one.
    """
    if len(ids) <= room:
        return ids
    if bos_token_id is not None and ids[0] == bos_token_id:
        first = len(ids) - (room - 1)
        return [bos_token_id, *ids[first:]]
    return ids[-room:]


# ----------------------------------------------------------------------- prompts without an answer


def ready_prompts(
    tokenizer,
    rows: list[dict],
    model_config,
    max_new_tokens: int,
    max_prompt_length: int = 0,
    chat: bool = False,
) -> Prompts:
    """Rows -> their prompts, for answers of max_new_tokens.

    max_prompt_length: longer prompts are cut on the left; 0 leaves them whole. InputError: a prompt
    that does not fit into the model's context together with its answer.
    """
    # A prompt is cut on its left: what it asks stands at its end, in front of the answer.
    prompts = encode_prompts(tokenizer, rows, chat)
    if max_prompt_length:
        bos = tokenizer.bos_token_id
        prompts = [cut_left(ids, max_prompt_length, bos) for ids in prompts]
    # A model has no positions beyond its context, and a run would learn that only when an answer
    # gets there.
    context = context_length(model_config)
    for ids, row in zip(prompts, rows):
        require(
            context is None or len(ids) + max_new_tokens <= context,
            f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones are longer than the "
            f"model's context of {context} (shorten it with --max_prompt_length): {place_of(row)}",
        )
    return Prompts(prompts, rows)


def answers_to(prompts: Prompts, responses: list[str], batch: Packed, chat: bool) -> Answers:
    """Responses to prompts, with all that a reward may ask for. batch: their token ids."""
    texts = [row["prompt"] for row in prompts.rows]
    rows = [own_row(row) for row in prompts.rows]
    return Answers(texts, responses, batch, rows, chat)


def ids_with_tokens(tokenizer, n_embeddings: int) -> Tensor | None:
    """Which ids of a model's embeddings the tokenizer has a token for: [V] bool; None: all.

    Vocabularies are padded to round sizes, and nobody has trained what lies beyond the tokens.
    """
    # A tokenizer may have special tokens beyond the embeddings (check_vocabulary). They have no
    # logit, so nothing has to keep them from being sampled.
    has_token = torch.zeros(n_embeddings, dtype=torch.bool)
    ids = torch.tensor(list(tokenizer.get_vocab().values()))
    has_token[ids[ids < n_embeddings]] = True
    if has_token.all():
        return None
    return has_token

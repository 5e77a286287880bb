r"""From rows of data to token ids: what a model reads of a prompt and its answers.

    encode           rows -> their prompts and responses, cut to fit
    ready_prompts    rows -> prompts that wait for an answer

Plain strings: a prompt begins with what the tokenizer puts in front of a text (BOS), and a response
ends with EOS. A control token that a string spells out is text.

    <bos> the room :                                       was bright <eos>

Chats: the tokenizer's own template writes prompt and answer (chat_templates.py).

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n     Hello<|im_end|>

Rows are those of data.read_rows. A prompt is a string or a chat, a list of messages (chats.py).
"""

from array import array
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .chat_templates import (
    encode_all_turns,
    encode_chat_answers,
    encode_chat_prompts,
    uses_template,
    without_eos,
)
from .data import own_row, place_of
from .errors import require
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


def count_with_share(n: int, total: int, what: str) -> str:
    """'0 prompts', or '3 prompts (12.5%)' of a total of 24."""
    if n == 0:
        return f"0 {what}"
    return f"{n} {what} ({n / total:.1%})"


def as_arrays(rows: list[Ids]) -> list[array]:
    """Token ids in arrays: these take 4 bytes a token and 80 a row, lists about 40 a token."""
    return [array("i", ids) for ids in rows]


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
    responses = {}
    scored = None
    if loss_on == "all" and uses_template(rows):
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
        cut_rows(encoded, max_length, tokenizer.bos_token_id)
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


# ---------------------------------------------------------------------------- prompts and responses


def encode_prompts(
    tokenizer, rows: list[dict], chat: bool = False, may_be_empty: bool = False
) -> list[Ids]:
    """The prompts of rows, strings or chats -> token lists.

    chat: strings too go through the tokenizer's chat template, as a user's turn. InputError: a
    prompt without any token, unless may_be_empty, and a chat that the template refuses.
    """
    if uses_template(rows, chat):
        return encode_chat_prompts(tokenizer, rows)

    # The tokenizer's own BOS goes in front of a plain text, but no EOS behind it: the response
    # follows there.
    front = ids_in_front(tokenizer)
    encoded = []
    for ids in encode_strings(tokenizer, [row["prompt"] for row in rows]):
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


def encode_responses(tokenizer, rows: list[dict], field: str, chat: bool = False) -> list[Ids]:
    """The responses in a field of rows -> token lists that end with EOS.

    The response to a chat is what the template writes behind the prompt. chat: a prompt that is a
    string counts as a chat.
    """
    if uses_template(rows, chat):
        return encode_chat_answers(tokenizer, rows, field)
    texts = [without_eos(tokenizer, row[field]) for row in rows]
    encoded = encode_strings(tokenizer, texts)
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


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
        (texts,) = responses.values()
        text = texts[i]
        prompts[i] = text[:1]
        # A text that is only EOS has EOS as its prompt and as its response.
        if len(text) > 1:
            texts[i] = text[1:]


# -------------------------------------------------------------------------- texts that are too long


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


def cut_rows(encoded: Encoded, max_length: int, bos_token_id: int | None):
    """Cut all rows to max_length, in place, and count what had to be cut.

    A row is one item: its prompt, with an answer in each field.
    """
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


def cut_items(encoded: Encoded, max_length: int, bos_token_id: int | None):
    """The same for items of several rows, which have equal prompts and stand side by side.

    The rows have one field, `response`.
    """
    prompts = encoded.prompts
    responses = encoded.responses["response"]
    first = 0
    while first < len(prompts):
        # The rows first .. last - 1 hold the answers to one prompt.
        last = first + 1
        while last < len(prompts) and prompts[last] == prompts[first]:
            last += 1
        answers = responses[first:last]
        cut_prompt, cut_answers = fit_item(prompts[first], answers, max_length, bos_token_id)
        n_answers = last - first
        if len(cut_prompt) < len(prompts[first]):
            encoded.n_prompts_cut += n_answers
        encoded.n_responses_cut += count_shorter(cut_answers, answers)
        prompts[first:last] = [cut_prompt] * n_answers
        responses[first:last] = cut_answers
        first = last


def count_shorter(cut: list[Ids], whole: list[Ids]) -> int:
    """How many texts have lost tokens."""
    n = 0
    for cut_ids, ids in zip(cut, whole):
        if len(cut_ids) < len(ids):
            n += 1
    return n


# ------------------------------------------------------------------------ prompts without an answer


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


# --------------------------------------------------------------------------------------- single ids


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

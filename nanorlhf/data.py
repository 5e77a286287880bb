"""From data sets and JSONL files to token ids, and the order in which rows are visited.

    read_rows        what --dataset names -> rows {field: text}
    encode           rows -> prompt and response token lists, cut to fit
    batch_indices    a step -> the rows of its batch

A row is of one of three kinds: sft {prompt, response}; pairs {prompt, chosen, rejected}; prompts
{prompt}. A bad row gives its file, line and reason. Rows that are skipped and responses that are
cut are counted and reported.
"""

import logging
import os
import re
from collections.abc import Callable

import numpy as np
import torch

from . import world
from .errors import InputError, require
from .hf.folders import context_length
from .runtime.files import read_file
from .runtime.rng import MINIBATCH, ORDER, SPLIT

# The fields of each kind of row. The first is the prompt; the others are answers to it.
FIELDS = {
    "sft": ("prompt", "response"),
    "pairs": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt",),
}
# The embedded world: rows for training (its prompts are all there are), and rows held out.
WORLD_SIZES = {"sft": 16_000, "pairs": 800}
WORLD_HELD_OUT = 512

# --prompt_format: how a prompt is written from columns, and the column that holds the response.
TLDR = "SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"
CNN_DM = "ARTICLE: {article}\nTL;DR:"
FORMATS = {
    "": ("{prompt}", "response"),
    "tldr": (TLDR, "summary"),
    "cnn_dm": (CNN_DM, "highlights"),
}
# How an answer begins in the dialogues of HH-RLHF.
TURN = "\n\nAssistant:"


# -------------------------------------------------------------------------------------- reading


def read_rows(
    spec: str, kind: str, columns=(), split: str = "train", prompt_format: str = ""
) -> list[dict]:
    """What --dataset names -> rows with the fields of their kind, all strings.

    spec: 'world' or 'world:SEED' (the embedded world; the seed draws the spurious cue), a file
    (.json, .jsonl, either also as .gz, or .parquet), or a data set. columns: renamings
    FIELD=COLUMN; pairs of whole dialogues need no prompt (split_dialogues). split: 'train', 'test'
    or 'ood', of the embedded world alone. prompt_format: one of FORMATS, whose columns then take
    the place of prompt and response.
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
    seed = spec.partition(":")[2] or "0"
    is_number = seed.isdecimal() and len(seed) < 20
    require(
        is_number,
        f"--dataset {spec[:60]}: the world's seed must be a whole number of at most 19 digits",
    )
    if kind == "prompts":
        return world.prompts(split)
    if kind == "pairs":
        n_rows = WORLD_SIZES["pairs"] if split == "train" else WORLD_HELD_OUT
        return world.preferences(n_rows, seed=int(seed), split=split)
    if split == "ood":
        # Reviews of held-out topics by the same writer. A seed of its own draws them, so that no
        # training row is among them or shares its noise with one.
        return world.demonstrations(WORLD_HELD_OUT, seed=1, split=split)
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
    names = dict(item.split("=", 1) for item in columns)
    needed = columns_of(prompt_format, kind)
    unknown = ", ".join(sorted(set(names) - set(needed)))
    require(not unknown, f"--columns names {unknown}; the fields here are {', '.join(needed)}")

    kept = []
    left_out = []
    for place, row in read_any(spec):
        is_object = isinstance(row, dict)
        require(is_object, f"{place}: a row must be an object with {', '.join(needed)}")
        # Without a column for the prompt, the two answers may be whole dialogues that hold it.
        if kind == "pairs" and not prompt_format and names.get("prompt", "prompt") not in row:
            row = split_dialogues(
                row, names.get("chosen", "chosen"), names.get("rejected", "rejected")
            )
        texts = read_texts(place, row, needed, names)
        fields = fill_format(prompt_format, kind, texts)
        if in_distribution is None or in_distribution(place, {**fields, **row}):
            kept.append(fields)
        else:
            left_out.append(fields)
    return kept, left_out


def read_any(spec: str) -> list[tuple[str, dict]]:
    """What --dataset names, other than the embedded world -> [(place, row)], one row at least."""
    is_json = spec.removesuffix(".gz").endswith((".json", ".jsonl"))
    is_other_file = os.path.isfile(spec) and not spec.endswith(".parquet")
    if is_json or is_other_file:
        rows = read_file(spec)
    else:
        rows = read_hub(spec)
    require(rows, f"{spec}: no rows")
    return rows


def read_hub(spec: str) -> list[tuple[str, dict]]:
    """A data set's name[:split], or a folder written by save_to_disk, or a .parquet file.

    -> [(place, row)]. The split is 'train' unless one is named.
    """
    # The import takes a second, and JSONL does not need it.
    import datasets

    # The library logs what it raises too, and an error is to be one line.
    datasets.logging.set_verbosity(logging.CRITICAL)
    name, _, split = spec.partition(":")
    split = split or "train"
    try:
        if name.endswith(".parquet"):
            data = datasets.Dataset.from_parquet(name, keep_in_memory=True)
        elif os.path.isdir(name):
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, split=split)
        # A folder may hold several splits.
        if isinstance(data, dict):
            data = data[split]
        rows = list(data)
    # The hub has many errors, and all of them mean that this data set is not to be had.
    except Exception as e:
        what = " ".join(str(e).split())[:150]
        raise InputError(
            f"{spec}: neither a file nor a data set that can be loaded ({what})"
        ) from None
    return [(f"{spec}[{i}]", row) for i, row in enumerate(rows)]


def read_texts(place: str, row: dict, needed: list[str], names: dict) -> dict[str, str]:
    """The texts of a row: {needed name: text}. names: {needed name: column} where they differ."""
    texts = {}
    for name in needed:
        column = names.get(name, name)
        hint = "" if name in names else f" (name another with --columns {name}=COLUMN)"
        require(column in row, f"{place}: no field {column!r}{hint}")
        text = row[column]
        found = type(text).__name__
        is_text = isinstance(text, str)
        require(is_text, f"{place}: field {column!r} must be a string, not {found}")
        texts[name] = text
    return texts


def split_dialogues(row: dict, chosen: str, rejected: str) -> dict:
    """A row of two whole dialogues (HH-RLHF) -> a row with the prompt that they share.

    The prompt reaches to the last assistant turn that begins in both. chosen, rejected: the columns
    of the dialogues. A row that holds no such dialogues is given back as it is.
    """
    a = row.get(chosen)
    b = row.get(rejected)
    if not (isinstance(a, str) and isinstance(b, str)):
        return row
    shared = os.path.commonprefix([a, b])
    if TURN not in shared:
        return row
    end = shared.rfind(TURN) + len(TURN)
    return {**row, "prompt": a[:end], chosen: a[end:], rejected: b[end:]}


# ---------------------------------------------------------------------------- formats of prompts


def columns_of(prompt_format: str, kind: str) -> list[str]:
    """The columns that a row is made from: tldr, sft -> [subreddit, title, post, summary]."""
    known = ", ".join(filter(None, FORMATS))
    require(
        prompt_format in FORMATS, f"--prompt_format must be one of {known}, not {prompt_format!r}"
    )
    template, _ = FORMATS[prompt_format]
    of_prompt = re.findall(r"{(\w+)}", template)
    return [*of_prompt, *answer_columns(prompt_format, kind).values()]


def answer_columns(prompt_format: str, kind: str) -> dict[str, str]:
    """The column of each answer: tldr, sft -> {response: summary}.

    Pairs have theirs in all formats: {chosen: chosen, rejected: rejected}.
    """
    _, response_column = FORMATS[prompt_format]
    columns = {}
    for field in FIELDS[kind][1:]:
        columns[field] = response_column if field == "response" else field
    return columns


def fill_format(prompt_format: str, kind: str, texts: dict[str, str]) -> dict[str, str]:
    """The texts of columns_of() -> a row with the fields of its kind."""
    if not prompt_format:
        return texts
    template, _ = FORMATS[prompt_format]
    fields = {"prompt": template.format(**texts)}
    for field, column in answer_columns(prompt_format, kind).items():
        # The prompt ends in "TL;DR:", and a space stands between it and the answer.
        fields[field] = " " + texts[column].strip()
    return fields


# ----------------------------------------------------------------------------- choices of rows


def canonical(text: str) -> str:
    """The form in which prompts are compared: those that differ by white space alone are one."""
    return " ".join(text.split())


def number_prompts(prompts: list[str]) -> list[int]:
    """A number for each prompt, from 0 on, in the order in which different ones appear first."""
    number_of = {}
    numbers = []
    for prompt in prompts:
        numbers.append(number_of.setdefault(canonical(prompt), len(number_of)))
    return numbers


def draw(rows: list, n: int) -> list:
    """n random rows, always the same ones, in random order."""
    order = np.random.default_rng(SPLIT).permutation(len(rows))
    return [rows[i] for i in order[:n]]


def subset(rows: list, n: int) -> list:
    """n random rows, always the same ones, in the order that they have in `rows`; n = 0: all."""
    if n == 0:
        return rows
    order = np.random.default_rng(SPLIT).permutation(len(rows))
    return [rows[i] for i in sorted(order[:n])]


# ---------------------------------------------------------------------------------- tokenising


def encode(
    tokenizer, rows: list[dict], field: str, max_length: int | None = None, chat: bool = False
) -> tuple[list[list[int]], list[list[int]], int]:
    """Rows -> prompt token lists, response token lists, how many responses had to be cut.

    field: the one that holds the response. max_length: of a prompt and its response together.
    """
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows], chat)
    responses = encode_responses(tokenizer, [row[field] for row in rows])
    n_cut = 0
    if max_length is not None:
        for i in range(len(rows)):
            prompts[i], responses[i], was_cut = fit(
                prompts[i], responses[i], max_length, tokenizer.bos_token_id
            )
            n_cut += was_cut
    return prompts, responses, n_cut


def encode_prompts(tokenizer, texts, chat: bool = False) -> list[list[int]]:
    """Texts -> token lists, which begin with what the tokenizer puts in front of a text (BOS).

    chat: each text is a user's turn in the tokenizer's chat template. InputError: a prompt without
    any token, and the tokenizer has no BOS.
    """
    texts = list(texts)
    if chat:
        require(tokenizer.chat_template, "--chat_template: this tokenizer has none")
        turns = [[{"role": "user", "content": text}] for text in texts]
        texts = []
        for turn in turns:
            text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            texts.append(text)
    # A tokenizer refuses an empty list.
    if not texts:
        return []

    # A chat template writes its own special tokens.
    prompts = tokenizer(texts, add_special_tokens=not chat).input_ids
    # The first token of a response is predicted from what stands before it: something must.
    for i, ids in enumerate(prompts):
        if not ids:
            has_bos = tokenizer.bos_token_id is not None
            require(has_bos, "an empty prompt, and the tokenizer has no BOS token to start from")
            prompts[i] = [tokenizer.bos_token_id]
    return prompts


def encode_responses(tokenizer, texts) -> list[list[int]]:
    """Texts -> token lists that end with EOS."""
    texts = list(texts)
    if not texts:
        return []
    responses = tokenizer(texts, add_special_tokens=False).input_ids
    return [[*ids, tokenizer.eos_token_id] for ids in responses]


def fit(
    prompt: list[int], response: list[int], max_length: int, bos_token_id: int | None = None
) -> tuple[list[int], list[int], bool]:
    """Cut a prompt on its left (cut_left) and a response that is too long, so that both fit.

    -> prompt, response, whether the response was cut. The prompt gives way first, but keeps at
    least one token: something must predict the response's first.
    """
    require(max_length > 1, "--max_length must leave room for a prompt and a response")
    room = max_length - 1
    was_cut = len(response) > room
    response = response[:room]
    prompt = cut_left(prompt, max_length - len(response), bos_token_id)
    return prompt, response, was_cut


def cut_left(ids: list[int], room: int, bos_token_id: int | None = None) -> list[int]:
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


def ready_prompts(
    tokenizer,
    rows: list[dict],
    model_config,
    max_new_tokens: int,
    max_prompt_length: int = 0,
    chat: bool = False,
) -> list[list[int]]:
    """Rows -> the token lists of their prompts, for answers of max_new_tokens.

    max_prompt_length: longer prompts are cut on the left; 0 leaves them whole. InputError: a prompt
    that does not fit into the model's context together with its answer.
    """
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows], chat)
    if max_prompt_length:
        prompts = [cut_left(ids, max_prompt_length, tokenizer.bos_token_id) for ids in prompts]
    context = context_length(model_config)
    if context is None:
        return prompts
    for ids, row in zip(prompts, rows):
        require(
            len(ids) + max_new_tokens <= context,
            f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones are longer than the "
            f"model's context of {context} (shorten it with --max_prompt_length): "
            f"{row['prompt'][:40]!r}",
        )
    return prompts


# --------------------------------------------------------------------------------------- order


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The indices of a step's batch, as if epochs of n rows stood one behind the other.

    Each epoch has an order of its own, keyed by (seed, epoch). There is no state, so that a run
    which is resumed sees the same batches.
    """
    orders = {}
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
    strata = np.arange(batch_size).reshape(minibatch_size, -1)
    generator = np.random.default_rng([MINIBATCH, seed, step, epoch])
    shuffled = generator.permuted(strata, axis=1)  # each stratum in an order of its own
    return torch.from_numpy(shuffled.T.copy())

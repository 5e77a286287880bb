"""Data sets and JSONL -> prompts, demonstrations and preference pairs as token lists, and the order in which they are visited.

Kinds of rows: sft {prompt, response}; pairs {prompt, chosen, rejected}; prompts {prompt}. A bad row gives its file, line and
reason; what is skipped or cut is counted and reported.
"""

import logging
import os
from string import Formatter

import numpy as np
import torch

from . import world
from .errors import InputError, require
from .hf.folders import context_length
from .runtime.files import read_file
from .runtime.rng import MINIBATCH, ORDER, SPLIT

TURN = "\n\nAssistant:"
FIELDS = {"sft": ("prompt", "response"), "pairs": ("prompt", "chosen", "rejected"), "prompts": ("prompt",)}
WORLD_SIZES = {"sft": 16_000, "pairs": 800}  # rows of the embedded world's training data

# --prompt_format: the prompt's text, and the column that holds the response.
TLDR = "SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"
CNN_DM = "ARTICLE: {article}\nTL;DR:"
FORMATS = {"": ("{prompt}", "response"), "tldr": (TLDR, "summary"), "cnn_dm": (CNN_DM, "highlights")}


# ------------------------------------------------------------------------------------------------------------------------- reading


def read_any(spec):
    """A --dataset argument other than the embedded world -> [(place, row)], one row at least."""
    is_file = spec.removesuffix(".gz").endswith((".json", ".jsonl")) or os.path.isfile(spec) and not spec.endswith(".parquet")
    rows = read_file(spec) if is_file else read_hub(spec)
    require(rows, f"{spec}: no rows")
    return rows


def read_hub(spec):
    """A datasets name[:split] (default train), a folder written by save_to_disk, or FILE.parquet -> [(place, row)]."""
    import datasets  # imports for a second; JSONL does not need it

    # It logs what it raises too, and an error is to be one line.
    datasets.logging.set_verbosity(logging.CRITICAL)
    name, _, split = spec.partition(":")
    try:
        if name.endswith(".parquet"):
            data = datasets.Dataset.from_parquet(name, keep_in_memory=True)
        else:
            data = datasets.load_from_disk(name) if os.path.isdir(name) else datasets.load_dataset(name, split=split or "train")
        data = data[split or "train"] if isinstance(data, dict) else data
        rows = list(data)
    except Exception as e:  # the hub's errors are many, and all of them mean: this data set is not to be had
        raise InputError(f"{spec}: neither a file nor a data set that can be loaded ({' '.join(str(e).split())[:150]})") from None
    return [(f"{spec}[{i}]", row) for i, row in enumerate(rows)]


def read_rows(spec, kind, columns=(), split="train", prompt_format=""):
    """A --dataset argument -> rows with the fields of their kind, all strings.

    spec: 'world' or 'world:SEED' (the embedded world; the seed draws the spurious cue), a .json/.jsonl[.gz]/.parquet file, or a data set.
    columns: FIELD=COLUMN renamings; pairs of whole dialogues need no prompt (split_dialogues). split ('train', 'test', 'ood') is for
    the embedded world only. prompt_format: one of FORMATS, whose columns then take the place of prompt and response.
    """
    if not is_world(spec):
        return read_parts(spec, kind, columns, prompt_format)[0]
    seed = spec.partition(":")[2] or "0"
    good = seed.isdecimal() and len(seed) < 20
    require(good, f"--dataset {spec[:60]}: the world's seed must be a whole number of at most 19 digits")
    if kind == "prompts":
        return world.prompts(split)
    if kind == "pairs":
        return world.preferences(WORLD_SIZES[kind] if split == "train" else 512, seed=int(seed), split=split)
    # Out of distribution: reviews of the held-out topics, in the same hand. No training row is one, nor drawn with the same noise.
    return world.demonstrations(512, seed=1, split=split) if split == "ood" else world.demonstrations(WORLD_SIZES[kind])


def read_parts(spec, kind, columns, prompt_format, in_distribution=None):
    """A file or data set -> its rows in distribution, the others, each with the fields of their kind.

    in_distribution(place, row) -> bool sees the data's own columns beside the fields; by default
    all rows are in distribution. InputError: a bad row, with its place.
    """
    names = dict(c.split("=", 1) for c in columns)
    fields = columns_of(prompt_format, FIELDS[kind])
    unknown = set(names) - set(fields)
    require(not unknown, f"--columns names {', '.join(sorted(unknown))}; the fields here are {', '.join(fields)}")
    kept, left_out = [], []
    for place, row in read_any(spec):
        require(isinstance(row, dict), f"{place}: a row must be an object with {', '.join(fields)}")
        if kind == "pairs" and not prompt_format and names.get("prompt", "prompt") not in row:
            row = split_dialogues(row, names.get("chosen", "chosen"), names.get("rejected", "rejected"))
        texts = checked_texts(place, row, fields, names)
        new = written(prompt_format, FIELDS[kind], texts)
        if in_distribution is None or in_distribution(place, {**new, **row}):
            kept.append(new)
        else:
            left_out.append(new)
    return kept, left_out


def checked_texts(place, row, fields, names):
    """The texts of a row: {field: text}. names: {field: column} where the data's names differ."""
    texts = {}
    for field in fields:
        column = names.get(field, field)
        hint = "" if field in names else f" (name another with --columns {field}=COLUMN)"
        require(column in row, f"{place}: no field {column!r}{hint}")
        found = type(row[column]).__name__
        require(isinstance(row[column], str), f"{place}: field {column!r} must be a string, not {found}")
        texts[field] = row[column]
    return texts


def columns_of(prompt_format, fields):
    """The columns that rows of a format need for `fields`: tldr, (prompt, response) -> [subreddit, title, post, summary]."""
    require(prompt_format in FORMATS, f"--prompt_format must be one of {', '.join(filter(None, FORMATS))}, not {prompt_format!r}")
    template, response = FORMATS[prompt_format]
    return [name for _, name, *_ in Formatter().parse(template) if name] + [response if f == "response" else f for f in fields[1:]]


def written(prompt_format, fields, texts):
    """The texts of columns_of(), by column -> a row of `fields`. An answer to a format's prompt is a space and the text, stripped."""
    if not prompt_format:
        return texts
    template, response = FORMATS[prompt_format]
    answers = {f: " " + texts[response if f == "response" else f].strip() for f in fields[1:]}
    return {"prompt": template.format(**texts), **answers}


def split_dialogues(row, chosen, rejected):
    """A row of two whole dialogues (HH-RLHF) -> a row with the prompt they share, up to their last common assistant turn.

    A row that holds no such dialogues is given back as it is.
    """
    a, b = row.get(chosen), row.get(rejected)
    if not (isinstance(a, str) and isinstance(b, str)):
        return row
    end = os.path.commonprefix([a, b]).rfind(TURN) + len(TURN)
    return {**row, "prompt": a[:end], chosen: a[end:], rejected: b[end:]} if end >= len(TURN) else row


def is_world(spec):
    return spec == "world" or spec.startswith("world:")


def canonical(text: str) -> str:
    """The form in which prompts are compared: those that differ by white space alone are one."""
    return " ".join(text.split())


def draw(rows, n):
    """n random rows, always the same ones, in random order."""
    return [rows[i] for i in np.random.default_rng(SPLIT).permutation(len(rows))[:n]]


def subset(rows, n):
    """n random rows, always the same ones, in their order; all for n = 0."""
    return [rows[i] for i in sorted(np.random.default_rng(SPLIT).permutation(len(rows))[:n])] if n else rows


# ---------------------------------------------------------------------------------------------------------------------- tokenising


def encode_prompts(tokenizer, texts, chat=False):
    """Texts -> token lists, with what the tokenizer puts in front (BOS), or as a user's turn in its chat template.

    A prompt without any token is an error.
    """
    if chat:
        require(tokenizer.chat_template, "--chat_template: this tokenizer has none")
        turns = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
    # A chat template writes its own special tokens.
    ids = [list(x) for x in tokenizer(list(texts), add_special_tokens=not chat).input_ids] if texts else []
    if not all(ids) and tokenizer.bos_token_id is not None:
        ids = [x or [tokenizer.bos_token_id] for x in ids]
    require(all(ids), "an empty prompt, and the tokenizer has no BOS token to start from")
    return ids


def encode_responses(tokenizer, texts):
    """Texts -> token lists ending with EOS."""
    ids = tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []
    return [[*x, tokenizer.eos_token_id] for x in ids]


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


def fit(prompt, response, max_length, bos_token_id=None):
    """Left-truncate the prompt (cut_left) so that both fit; a response that is too long is cut.

    -> prompt, response, cut?
    """
    require(max_length > 1, "--max_length must leave room for a prompt and a response")
    # A prompt keeps at least one token: something must score the response's first.
    room = max_length - 1
    cut = len(response) > room
    response = response[:room]
    prompt = cut_left(prompt, max_length - len(response), bos_token_id)
    return prompt, response, cut


def encode(tokenizer, rows, field, max_length=None, chat=False):
    """Rows -> prompt token lists, response token lists (of `field`), how many responses had to be cut."""
    prompts = encode_prompts(tokenizer, [r["prompt"] for r in rows], chat)
    responses = encode_responses(tokenizer, [r[field] for r in rows])
    if max_length is None:
        return prompts, responses, 0
    fitted = [fit(p, r, max_length, tokenizer.bos_token_id) for p, r in zip(prompts, responses)]
    return [p for p, _, _ in fitted], [r for _, r, _ in fitted], sum(c for _, _, c in fitted)


def ready_prompts(tokenizer, rows, model_config, max_new_tokens, max_prompt_length=0, chat=False):
    """Rows -> prompt token lists, left-truncated to max_prompt_length (0: whole).

    InputError: a prompt that does not fit the context with its max_new_tokens.
    """
    prompts = encode_prompts(tokenizer, [r["prompt"] for r in rows], chat)
    if max_prompt_length:
        prompts = [cut_left(prompt, max_prompt_length, tokenizer.bos_token_id) for prompt in prompts]
    context = context_length(model_config)
    for p, row in zip(prompts, rows):
        require(
            context is None or len(p) + max_new_tokens <= context,
            f"a prompt of {len(p)} tokens and {max_new_tokens} new ones are longer than the model's context of {context} "
            f"(shorten it with --max_prompt_length): {row['prompt'][:40]!r}",
        )
    return prompts


# --------------------------------------------------------------------------------------------------------------------------- order


def batch_indices(n, batch_size, step, seed):
    """The indices of step's batch: epochs of n rows, each in an order keyed by (seed, epoch). No state, so resuming is exact."""
    first = step * batch_size
    index, orders = [], {}
    for i in range(first, first + batch_size):
        epoch = i // n
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([ORDER, seed, epoch]).permutation(n)
        index.append(int(orders[epoch][i % n]))
    return index


def minibatches(batch_size, minibatch_size, seed, step, epoch):
    """The rows of one PPO epoch's minibatches, [batch_size / minibatch_size, minibatch_size], keyed by (seed, step, epoch).

    The global batch is cut into minibatch_size equal strata, and each minibatch takes one row from each: it is the same set of
    rows on any number of processes, and a process only ever trains on rows that it sampled itself.
    """
    strata = np.arange(batch_size).reshape(minibatch_size, -1)
    return torch.from_numpy(np.random.default_rng([MINIBATCH, seed, step, epoch]).permuted(strata, axis=1).T.copy())

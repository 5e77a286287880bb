"""Data sets and JSONL -> prompts, demonstrations and preference pairs as token lists, and the order in which they are visited.

Kinds of rows: sft {prompt, response}; pairs {prompt, chosen, rejected}; prompts {prompt}. A bad row gives its file, line and
reason; what is skipped or cut is counted and reported.
"""

import gzip
import json
import os

import numpy as np
import torch

from . import world
from .cli import require
from .errors import InputError
from .models import context_length
from .rng import MINIBATCH, ORDER, SPLIT

TURN = "\n\nAssistant:"
FIELDS = {"sft": ("prompt", "response"), "pairs": ("prompt", "chosen", "rejected"), "prompts": ("prompt",)}
WORLD_SIZES = {"sft": 16_000, "pairs": 800}  # rows of the embedded world's training data


# ------------------------------------------------------------------------------------------------------------------------- reading


def read_file(path):
    """.jsonl or .json (a list), either also as .gz -> [(place, row)], place being 'file:line' or 'file[index]'."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
            text = f.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read ({e})") from None
    require(text.strip(), f"{path}: the file is empty")
    if path.removesuffix(".gz").endswith(".json"):
        whole = parse_json(text, path)
        require(isinstance(whole, list), f"{path}: a .json file must hold one list of rows (one row a line is .jsonl)")
        return [(f"{path}[{i}]", row) for i, row in enumerate(whole)]
    lines = enumerate(text.split("\n"), 1)  # not splitlines(): strings may hold Unicode line separators
    return [(f"{path}:{number}", parse_json(line, path, number)) for number, line in lines if line.strip()]


def parse_json(text, path, line=None):
    """json.loads, with the file and the line in its error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{line or e.lineno}: not JSON ({e.msg})") from None


def read_any(spec):
    """A --dataset argument other than the embedded world -> [(place, row)], one row at least."""
    is_file = spec.removesuffix(".gz").endswith((".json", ".jsonl")) or os.path.isfile(spec) and not spec.endswith(".parquet")
    rows = read_file(spec) if is_file else read_hub(spec)
    require(rows, f"{spec}: no rows")
    return rows


def read_hub(spec):
    """A datasets name[:split] (default train), a folder written by save_to_disk, or FILE.parquet -> [(place, row)]."""
    import datasets  # imports for a second; JSONL does not need it

    name, _, split = spec.partition(":")
    try:
        if name.endswith(".parquet"):
            data = datasets.Dataset.from_parquet(name, keep_in_memory=True)
        else:
            data = datasets.load_from_disk(name) if os.path.isdir(name) else datasets.load_dataset(name, split=split or "train")
        data = data[split or "train"] if isinstance(data, dict) else data
    except Exception as e:  # the hub's errors are many, and all of them mean: this data set is not to be had
        raise InputError(f"{spec}: neither a file nor a data set that can be loaded ({' '.join(str(e).split())[:150]})") from None
    return [(f"{spec}[{i}]", row) for i, row in enumerate(data)]


def read_rows(spec, kind, columns=(), split="train"):
    """A --dataset argument -> rows with the fields of their kind, all strings.

    spec: 'world' or 'world:SEED' (the embedded world; the seed draws the spurious cue), a .json/.jsonl[.gz]/.parquet file, or a data set.
    columns: FIELD=COLUMN renamings; pairs of whole dialogues need no prompt (split_dialogues). split ('train', 'test', 'ood') is for
    the embedded world only.
    """
    if is_world(spec):
        seed = spec.partition(":")[2] or "0"
        require(seed.isdigit(), f"--dataset {spec}: the world's seed must be a whole number")
        if kind == "prompts":
            return world.prompts(split)
        if kind == "pairs":
            return world.preferences(WORLD_SIZES[kind] if split == "train" else 512, seed=int(seed), split=split)
        return world.demonstrations(WORLD_SIZES[kind])
    names = dict(c.split("=", 1) for c in columns)
    unknown = set(names) - set(FIELDS[kind])
    require(not unknown, f"--columns names {', '.join(sorted(unknown))}; the fields here are {', '.join(FIELDS[kind])}")
    rows = []
    for place, row in read_any(spec):
        require(isinstance(row, dict), f"{place}: a row must be an object with {', '.join(FIELDS[kind])}")
        if kind == "pairs" and names.get("prompt", "prompt") not in row:
            row = split_dialogues(row, names.get("chosen", "chosen"), names.get("rejected", "rejected"))
        for field in FIELDS[kind]:
            column = names.get(field, field)
            hint = "" if field in names else f" (name another with --columns {field}=COLUMN)"
            require(column in row, f"{place}: no field {column!r}{hint}")
            require(isinstance(row[column], str), f"{place}: field {column!r} must be a string, not {type(row[column]).__name__}")
        rows.append({field: row[names.get(field, field)] for field in FIELDS[kind]})
    return rows


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


def load(config, kind):
    """-> training rows, held-out rows, a sentence on them. The split does not depend on --seed.

    Without --eval_dataset rows are held out by prompt: none is on both sides.
    """
    rows = read_rows(config.dataset, kind, config.columns)
    if config.eval_dataset or (is_world(config.dataset) and kind != "sft"):
        held_out = read_rows(config.eval_dataset or config.dataset, kind, config.columns, split="test")
        order = np.random.default_rng(SPLIT).permutation(len(held_out))
        held_out = [held_out[i] for i in order[: config.eval_size]]
    else:
        prompts = list(dict.fromkeys(r["prompt"] for r in rows))
        order = np.random.default_rng(SPLIT).permutation(len(prompts))
        aside = {prompts[i] for i in order[: min(config.eval_size, len(prompts) // 5)]}
        require(aside and len(aside) < len(prompts), f"{config.dataset}: {len(prompts)} different prompts are too few to hold any out")
        held_out = [r for r in rows if r["prompt"] in aside][: config.eval_size]
        rows = [r for r in rows if r["prompt"] not in aside]
    rows = subset(rows, config.max_rows)
    note = ""
    if kind == "pairs":
        kept, kept_out = ([r for r in part if r["chosen"] != r["rejected"]] for part in (rows, held_out))
        skipped = len(rows) + len(held_out) - len(kept) - len(kept_out)
        note = f", {skipped} with chosen == rejected skipped" if skipped else ""
        rows, held_out = kept, kept_out
        require(rows and held_out, f"{config.dataset}: no pair is left in which chosen and rejected differ")
    return rows, held_out, f"{len(rows)} {kind} rows, {len(held_out)} held out{note}"


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


def fit(prompt, response, max_length):
    """Left-truncate the prompt so that both fit; a response that alone does not fit is cut. -> prompt, response, cut?"""
    require(max_length > 1, "--max_length must leave room for a prompt and a response")
    room = max_length - 1  # a prompt keeps at least one token: something must score the response's first
    cut = len(response) > room
    response = response[:room]
    return prompt[-(max_length - len(response)) :], response, cut


def encode(tokenizer, rows, field, max_length=None, chat=False):
    """Rows -> prompt token lists, response token lists (of `field`), how many responses had to be cut."""
    prompts = encode_prompts(tokenizer, [r["prompt"] for r in rows], chat)
    responses = encode_responses(tokenizer, [r[field] for r in rows])
    if max_length is None:
        return prompts, responses, 0
    fitted = [fit(p, r, max_length) for p, r in zip(prompts, responses)]
    return [p for p, _, _ in fitted], [r for _, r, _ in fitted], sum(c for _, _, c in fitted)


def ready_prompts(tokenizer, rows, model_config, max_new_tokens, max_prompt_length=0, chat=False):
    """Rows -> prompt token lists, left-truncated to max_prompt_length; what still does not fit the context is an error."""
    prompts = [p[-max_prompt_length:] for p in encode_prompts(tokenizer, [r["prompt"] for r in rows], chat)]  # [-0:] is all of it
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

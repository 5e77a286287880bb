"""Activations of texts for training sparse autoencoders: of one or several models, at several places, always of the same tokens.

    N texts, E tokens of them that count (an epoch), T of a row, b rows of a forward pass, D hidden
    B tokens of a global batch, S batches of a buffer, W processes

Texts become Tokens; a *source* turns texts into activations, {"base/3_mlp": [n, D]}, either with the models (from_models) or from a
disk that was filled once (from_disk); a Stream asks a source for buffers and deals shuffled batches from them:

    rows of a dataset, rollouts -> Tokens -> from_models | from_disk -> Stream(...).batch(step) -> {"base/3_mlp": [B / W, D], ...}
                                                                    `-> passes(...): everything once, in order, for held-out texts

Nothing has a state that could be lost. Which tokens are in a batch is a function of (seed, step), the same for both sources and for any
number of processes, so a run that is resumed at step n computes the buffer of step n and goes on.
"""

import os
from functools import partial

import numpy as np
import torch
from safetensors.torch import save_file

from ..data import canonical, encode, encode_prompts
from ..errors import require
from ..hf.activations import activations, place_name
from ..hf.folders import check_model
from ..packing import micro_batches
from ..runtime.distributed import autocast
from ..runtime.files import check_can_write, check_name, digest, read_object, write_json
from ..runtime.locks import LOCK_FILE, lock, unlock_afterwards
from ..runtime.results import parse_ids
from ..runtime.rng import MINIBATCH, ORDER, SPLIT
from ..runtime.tensors import read_tensors
from .sae_files import load_sae, read_config

TOKENS_AT_ONCE = 2**13  # of a forward pass, padding counted
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# --------------------------------------------------------------------------------------------------------------------------- texts


def token_rows(tokenizer, rows, max_length=None, chat=False):
    """Rows of a dataset (data.read_rows), of any kind -> token rows, at most max_length tokens each, and how many were cut.

    A demonstration is prompt + response + EOS, a pair is two such rows, a prompt is the text as it is.
    """
    fields = [field for field in ("response", "chosen", "rejected") if field in rows[0]]
    if not fields:
        whole = encode_prompts(tokenizer, [row["prompt"] for row in rows], chat)
        return [row[:max_length] for row in whole], sum(len(row) > (max_length or len(row)) for row in whole)
    parts = [encode(tokenizer, rows, field, max_length, chat) for field in fields]
    return [p + r for prompts, responses, _ in parts for p, r in zip(prompts, responses)], sum(cut for *_, cut in parts)




def hold_out(rows, n, tokenizer):
    """Token rows -> rows to train on, and the rows of n texts that are kept apart, at most a fifth.

    No text is on both sides. Texts that differ by white space alone are one text.
    """
    texts = [canonical(text) for text in tokenizer.batch_decode(rows)]
    different = list(dict.fromkeys(texts))  # in their order
    n = min(n, len(different) // 5)
    aside = {different[i] for i in np.random.default_rng(SPLIT).permutation(len(different))[:n]}
    train, held_out = [], []
    for text, row in zip(texts, rows):
        if text in aside:
            held_out.append(row)
        else:
            train.append(row)
    return train, held_out


def sentence_ends(tokenizer):
    """The ids of the tokens whose text ends in . ! or ? (white space after it aside)."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [i for i, text in enumerate(texts) if text.rstrip().endswith((".", "!", "?"))]


class Tokens:
    """Token rows, and which of their tokens count: those whose activations are kept, and changed.

    All count, or, given `ends`, those with these ids and each row's last. Given skip_bos, the id of a BOS, no token with that id counts,
    wherever it stands: an EOS that shares the id has the BOS's huge norm too (two thirds of the variance of a story model's MLP). An EOS
    with an id of its own counts, and so do ids that also serve as padding: what counts is known from ids at places within a text's length.
    InputError: no token counts.
    """

    def __init__(self, rows, skip_bos=None, ends=None):
        self.rows = rows
        self.skip_bos = skip_bos
        self.ends = None if ends is None else sorted(ends)
        self.lengths = np.array([len(row) for row in rows])  # [N]
        ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])  # of all rows, one after another
        row_ends = self.lengths.cumsum()  # [N]
        if ends is None:
            mask = np.full(len(ids), True)
        else:
            mask = np.isin(ids, self.ends)
            mask[row_ends[self.lengths > 0] - 1] = True
        if skip_bos is not None:
            mask[ids == skip_bos] = False
        self.masks = np.split(mask, row_ends[:-1])  # which tokens of each row count
        self.counts = np.array([own.sum() for own in self.masks])  # [N]
        self.total = int(self.counts.sum())  # E
        require(self.total, "no text has a token whose activations could be kept (--keep_bos keeps BOS, and an EOS that shares its id)")

    def columns(self) -> np.ndarray:
        """Where in its text each token that counts stands, text by text: [E]."""
        return np.concatenate([np.flatnonzero(mask) for mask in self.masks])

    def batch(self, texts):
        """Indices of texts -> their ids and masks [b, T], 0 and False in the padding."""
        T = self.lengths[texts].max()
        ids, mask = np.zeros((len(texts), T), dtype=np.int64), np.zeros((len(texts), T), dtype=bool)
        for i, text in enumerate(texts):
            ids[i, : self.lengths[text]], mask[i, : self.lengths[text]] = self.rows[text], self.masks[text]
        return ids, mask

    def places(self, texts):
        """The places of the texts' tokens among all N texts' tokens: [n]."""
        first = (self.counts.cumsum() - self.counts)[texts]
        return spans(first, self.counts[texts])

    def digest(self):
        return digest([digest(row) for row in self.rows], self.skip_bos, *([] if self.ends is None else [self.ends]))


def spans(first, counts):
    """[f, f + 1, .., f + c - 1] for each f of `first` and c of `counts`, one after another."""
    return np.arange(counts.sum()) + np.repeat(first - (counts.cumsum() - counts), counts)


# ------------------------------------------------------------------------------------------------------------------------- sources


def from_models(tokens, lms, places, dist, dtype="float32"):
    """A source that runs the models {name: lm}, whole on each process and in eval mode. InputError: a place that one of them lacks."""
    return partial(run_models, tokens, lms, places, dist, dtype)


def run_models(tokens, lms, places, dist, dtype, texts):
    """Indices of texts -> {"name/layer_site": [n, D]} float32, the texts' tokens one after another."""
    counts = tokens.counts[texts]
    first, out = counts.cumsum() - counts, {}
    for part in micro_batches(torch.from_numpy(tokens.lengths[texts]), None, TOKENS_AT_ONCE):
        part = part.numpy()
        ids, mask = (torch.from_numpy(x).to(dist.device) for x in tokens.batch(texts[part]))  # [b, T]; none looks to its right
        to = torch.from_numpy(spans(first[part], counts[part])).to(dist.device)  # [n of this part]
        for name, lm in lms.items():
            with autocast(dist, dtype):
                found = activations(lm, ids, places)
            for place, x in found.items():  # [b, T, D]
                key = f"{name}/{place_name(place)}"
                if key not in out:
                    out[key] = torch.empty(counts.sum(), x.shape[-1], device=dist.device)
                out[key][to] = x[mask].float()
    return out


def from_disk(folder, tokens, fingerprints, places, load, dist, dtype="float32", store="float32", shard_tokens=2**17):
    """A source that reads shards of activations, mapped into memory; those not there yet are computed first, each process its own.

        folder/cache.json             what the activations are of: models, data, places
               00000.safetensors ...  whole texts, about shard_tokens tokens: {"name/layer_site": [n, D]}

    fingerprints: {name: models.fingerprint(path)}; load() -> {name: lm} is only called if a shard is missing; dtype: of the forward;
    store: float32, float16 or bfloat16, of what is kept. A shard is there whole or not at all, so a killed run goes on where it was.
    InputError: the folder holds something else, another program fills it, a number that `store`
    cannot hold. Pitfall: all processes must see the folder.
    """
    require(store in DTYPES, f"activations can be stored as {', '.join(DTYPES)}, not {store!r}")
    shard_of = (tokens.counts.cumsum() - 1) // shard_tokens  # [N]
    edges = [0, *(np.flatnonzero(np.diff(shard_of)) + 1).tolist(), len(tokens.rows)]  # shard i holds the texts edges[i] .. edges[i + 1] - 1
    content = {
        "models": fingerprints, "places": [list(place) for place in places], "data": tokens.digest(), "dtype": dtype, "store": store,
        "tokens": tokens.total, "shard_texts": edges,
    }  # fmt: skip
    dist.together(lambda: check_folder(folder, content))
    paths = [os.path.join(folder, f"{i:05d}.safetensors") for i in range(len(edges) - 1)]

    def missing():
        return [i for i, path in enumerate(paths) if not os.path.exists(path)]

    def fill(shards):
        source = from_models(tokens, load(), places, dist, dtype)
        for i in shards[dist.rank :: dist.world]:
            write_shard(paths[i], source(np.arange(edges[i], edges[i + 1])), store)

    with unlock_afterwards():
        # A folder in which nothing is missing is only read, by any number of runs at once.
        dist.together(lambda: lock(folder) if dist.main and missing() else None)
        # The folder is looked at again: another program may have filled it before it was locked.
        dist.together(lambda: check_folder(folder, content))
        shards = missing()
        dist.barrier()  # all have looked before one writes
        if shards:
            if dist.main:
                write_json(os.path.join(folder, "cache.json"), content)
            dist.together(lambda: fill(shards))
    keys = {f"{name}/{place_name(place)}" for name in fingerprints for place in places}
    n_tokens = [int(tokens.counts[first:last].sum()) for first, last in zip(edges, edges[1:])]
    shards = [mapped(path, keys, n) for path, n in zip(paths, n_tokens)]
    return partial(read_shards, tokens, dist, shards)


def check_cache(folder: str):
    """InputError where activations can neither be read from a folder nor be kept in it."""
    check_name(folder)
    notes = os.path.join(folder, "cache.json")
    if not os.path.isfile(notes):
        check_can_write(notes)


def check_folder(folder, content):
    """An InputError where the folder holds other activations, or something else."""
    stored = os.path.join(folder, "cache.json")
    if os.path.isfile(stored):
        old = read_object(stored)
        changed = [key for key in content if old.get(key) != content[key]]
        require(not changed, f"{folder} already holds other activations (they differ in {', '.join(changed)}); choose another folder")
    else:
        is_file = os.path.exists(folder) and not os.path.isdir(folder)
        names = os.listdir(folder) if os.path.isdir(folder) else []
        empty = set(names) <= {"cache.json.tmp", LOCK_FILE}
        require(not is_file and empty, f"{folder} is not empty and holds no activations; choose another folder")


def write_shard(path, found, store):
    """Under a temporary name, then renamed."""
    found = {key: x.to(DTYPES[store]).cpu() for key, x in found.items()}
    for key, x in found.items():
        require(x.isfinite().all(), f"{path}: {key} has a number that {store} cannot hold; store bfloat16 or float32")
    save_file(found, path + ".tmp")
    os.replace(path + ".tmp", path)


def mapped(path, keys, n):
    """A shard's tensors {key: [n, D]}, mapped: what is not indexed is not read."""
    shard = read_tensors(path)
    fits = shard.keys() == keys and all(x.ndim == 2 and len(x) == n for x in shard.values())
    require(fits, f"{path}: not the activations that belong here; delete it, it is made again")
    return shard


def read_shards(tokens, dist, shards, texts):
    """Indices of texts -> {"name/layer_site": [n, D]} float32, as run_models()."""
    ends = np.cumsum([len(next(iter(shard.values()))) for shard in shards])
    at = tokens.places(texts)  # [n]
    shard_of, out = np.searchsorted(ends, at, side="right"), {}
    for i in np.unique(shard_of):
        to = np.flatnonzero(shard_of == i)
        own = torch.from_numpy(at[to] - (ends[i - 1] if i else 0))
        for key, x in shards[i].items():
            out.setdefault(key, torch.empty(len(at), x.shape[1]))[torch.from_numpy(to)] = x[own].float()
    return {key: x.to(dist.device) for key, x in out.items()}


# ------------------------------------------------------------------------------------------------------------------------- batches


class Stream:
    """Shuffled batches of activations. batch(step) is a function of (seed, step), whatever was asked before.

    The texts, every epoch in an order keyed by (seed, epoch), make one endless row of tokens. A buffer is the next S B of them, cut into
    B strata of S neighbours, and each of its S batches takes one token of every stratum, in orders keyed by (seed, buffer):

        S = 2, B = 3        tokens  0 1 | 2 3 | 4 5        batch 0: 1 2 4, batch 1: 0 3 5

    So every token comes once an epoch; a batch has hardly two of one text; and a process, which has the same share B / W of every
    batch, computes its own strata alone and needs nothing from the others. At most two texts a process and buffer are computed twice.

    buffer_tokens: about S B, what all processes hold together, in float32 for each model and place. InputError: B is not a multiple of W.
    """

    def __init__(self, tokens, source, batch_size, dist, seed=0, buffer_tokens=2**16):
        require(batch_size % dist.world == 0, f"{batch_size} tokens a batch are not a multiple of {dist.world} processes")
        self.tokens, self.source, self.dist, self.seed, self.B = tokens, source, dist, seed, batch_size
        self.S = max(1, min(buffer_tokens, tokens.total) // batch_size)
        self.loaded, self.buffer, self.order = None, {}, None

    def batch(self, step):
        """This process's share of a step's batch: {"name/layer_site": [B / W, D]}."""
        buffer, j = divmod(step, self.S)
        if self.loaded != buffer:
            self.load(buffer)
        rows = self.order[:, j].to(self.dist.device)  # [B / W]
        return {key: x[rows] for key, x in self.buffer.items()}

    def load(self, buffer):
        """Compute this process's strata of a buffer."""
        self.buffer = {}  # before the next one takes memory
        orders = np.random.default_rng([MINIBATCH, self.seed, buffer]).permuted(np.tile(np.arange(self.S), (self.B, 1)), axis=1)  # [B, S]
        strata = self.dist.share(np.arange(self.B))
        self.order = torch.from_numpy(orders[strata] + self.S * np.arange(len(strata))[:, None])  # [B / W, S]
        first = (buffer * self.B + strata[0]) * self.S
        parts = list(self.stretch(first, first + len(strata) * self.S))
        self.buffer = {key: torch.cat([part[key] for part in parts]) if len(parts) > 1 else parts[0][key] for key in parts[0]}
        self.loaded = buffer

    def stretch(self, first, last):
        """The activations of tokens first .. last - 1 of the endless row, one part for each epoch it touches: {key: [n, D]}."""
        E = self.tokens.total
        for epoch in range(first // E, (last - 1) // E + 1):
            order = np.random.default_rng([ORDER, self.seed, epoch]).permutation(len(self.tokens.rows))
            ends = self.tokens.counts[order].cumsum()  # [N]
            low, high = max(first - epoch * E, 0), min(last - epoch * E, E)
            texts = order[np.searchsorted(ends, low, side="right") : np.searchsorted(ends, high, side="left") + 1]
            start = int(ends[np.searchsorted(ends, low, side="right")] - self.tokens.counts[texts[0]])
            yield {key: x[low - start : high - start] for key, x in self.source(texts).items()}


def passes(tokens, source, dist, at_once=2**16):
    """All tokens once, in order, about at_once at a time: {key: [n, D]}. Each process goes through its own part of the texts."""
    mine = np.array(dist.part(len(tokens.rows)), dtype=np.int64)
    mine = mine[tokens.counts[mine] > 0]  # a text of a BOS alone has nothing to pass on
    group = (tokens.counts[mine].cumsum() - 1) // at_once
    for i in np.unique(group):
        yield source(mine[group == i])


def opened(config, path):
    """An autoencoder's folder and the flags -> (sae, model, place); an InputError where they do not fit."""
    notes = read_config(path).get("metadata") or {}
    model = config.model or notes.get("model", "")
    layer = config.layer if config.layer >= 0 else notes.get("layer")
    site = config.site or notes.get("site", "")
    said = model and site and layer is not None and layer >= 0
    require(said, f"{path} does not say whose activations it reads: name --model, --layer and --site")
    model_config = check_model(model).get_text_config()
    require(layer < model_config.num_hidden_layers, f"layer {layer}: {model} has the layers 0 to {model_config.num_hidden_layers - 1}")
    sae = load_sae(path, width=model_config.hidden_size)
    beyond = [i for i in parse_ids(config.features) if i >= sae.m]
    require(not beyond, f"--features {', '.join(map(str, beyond))}: {path} has the features 0 to {sae.m - 1}")
    return sae, model, (layer, site)


def where(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Find each of the N tokens that count. -> its text and its id, [N] each"""
    text_of = np.repeat(np.arange(len(tokens.rows)), tokens.counts)
    ids = []
    for text, column in zip(text_of, tokens.columns()):
        ids.append(tokens.rows[text][column])
    return torch.from_numpy(text_of), torch.tensor(ids)

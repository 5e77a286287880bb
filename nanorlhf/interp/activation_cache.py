"""Activations of texts in a folder: computed once, and then mapped into memory.

folder/cache.json             what the activations are of: models, data, places
       00000.safetensors ...  shards: whole texts, {"name/layer_site": [n, D]}

N texts, E tokens of them that count, D hidden, n tokens of some texts
"""

import os
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from safetensors.torch import save_file

from ..errors import require
from ..hf.activations import place_name
from ..runtime.files import check_can_write, check_name, read_object, write_json
from ..runtime.locks import LOCK_FILE, lock, unlock_afterwards
from ..runtime.tensors import read_tensors
from .activation_store import Activations, Place, Source, Tokens, from_models

NOTES = "cache.json"


def from_disk(
    folder: str,
    tokens: Tokens,
    fingerprints: dict[str, str],
    places: list[Place],
    load: Callable[[], dict],
    dist,
    dtype: str = "float32",
    shard_tokens: int = 2**17,
) -> Source:
    """A source that reads shards of activations. Those not there yet are computed first, each
    process its own.

    fingerprints: {name: models.fingerprint(path)}; load() -> {name: lm} is only called if a shard
    is missing; dtype: of the forward; a shard holds about shard_tokens tokens. It is there whole or
    not at all, so a killed run goes on where it was. InputError: the folder holds something else,
    or another program fills it.
    Pitfall: all processes must see the folder.
    """
    # Shard i holds the texts edges[i] .. edges[i + 1] - 1.
    edges = find_shard_edges(tokens, shard_tokens)
    n_shards = len(edges) - 1
    paths = [os.path.join(folder, f"{i:05d}.safetensors") for i in range(n_shards)]
    # What the numbers depend on. The shards' edges are part of it: with other edges a file of the
    # same name would hold other texts.
    content = {
        "models": fingerprints,
        "places": [list(place) for place in places],
        "data": tokens.digest(),
        "dtype": dtype,
        "store": "float32",  # what numbers are kept as, whatever the forward's dtype
        "tokens": tokens.total,
        "shard_texts": edges,
    }

    def write_shards(numbers: list[int]):
        source = from_models(tokens, load(), places, dist, dtype)
        for i in numbers:
            write_shard(paths[i], source(np.arange(edges[i], edges[i + 1])))

    fill_folder(folder, content, paths, write_shards, dist)

    # All shards are there now. Their keys and sizes are checked here; their numbers are read later,
    # when they are asked for.
    keys = set()
    for name in fingerprints:
        for place in places:
            keys.add(f"{name}/{place_name(place)}")
    shards = []
    for path, first, last in zip(paths, edges, edges[1:]):
        n = int(tokens.counts[first:last].sum())
        shards.append(map_shard(path, keys, n))
    return partial(read_shards, tokens, dist, shards)


def fill_folder(
    folder: str, content: dict, paths: list[str], write_shards: Callable[[list[int]], None], dist
):
    """Write the shards that are not there. write_shards(numbers) writes those of one process."""

    def lock_for_filling():
        if find_missing(paths):
            lock(folder)

    # A folder that holds something else is refused before a lock file is put in it.
    dist.together(lambda: check_folder(folder, content))
    with unlock_afterwards():
        # A folder in which nothing is missing is only read, by any number of runs at once.
        dist.on_main(lock_for_filling)
        # The folder is looked at again: another program may have filled it before it was locked.
        dist.together(lambda: check_folder(folder, content))
        missing = find_missing(paths)
        # The notes come before the first shard: else a run that was killed would not know its own
        # folder again.
        if missing and dist.main:
            write_json(os.path.join(folder, NOTES), content)
        dist.barrier()  # all have looked, and the notes are there, before one writes a shard
        # The processes take the missing shards in turn, so that each file has one writer.
        if missing:
            dist.together(lambda: write_shards(missing[dist.rank :: dist.world]))


def find_shard_edges(tokens: Tokens, shard_tokens: int) -> list[int]:
    """Divide the texts into shards of about shard_tokens tokens.

    -> the first text of each shard, and the number of all texts at the end
    """
    # A text belongs to the shard in which its last token falls, so no text is cut in two.
    shard_of = (tokens.counts.cumsum() - 1) // shard_tokens  # [N]
    inner_edges = np.flatnonzero(np.diff(shard_of)) + 1
    return [0, *inner_edges.tolist(), len(tokens.rows)]


def find_missing(paths: list[str]) -> list[int]:
    """Which of the shards are not there."""
    return [i for i, path in enumerate(paths) if not os.path.exists(path)]


def check_cache(folder: str):
    """InputError where activations can neither be read from a folder nor be kept in it."""
    check_name(folder)
    notes = os.path.join(folder, NOTES)
    if not os.path.isfile(notes):
        check_can_write(notes)


def check_folder(folder: str, content: dict):
    """InputError where the folder holds other activations, or something else."""
    notes = os.path.join(folder, NOTES)
    if os.path.isfile(notes):
        stored = read_object(notes)
        changed = [key for key in content if stored.get(key) != content[key]]
        require(
            not changed,
            f"{folder} already holds other activations (they differ in {', '.join(changed)}); "
            "choose another folder",
        )
        return

    # A folder of our own may hold what an interrupted run has left there.
    is_free = not os.path.exists(folder)
    if os.path.isdir(folder):
        is_free = set(os.listdir(folder)) <= {f"{NOTES}.tmp", LOCK_FILE}
    require(
        is_free,
        f"{folder} is not empty and holds no activations; choose another folder",
    )


def write_shard(path: str, computed: Activations):
    """Write a shard under a temporary name, then rename it: a file of that name is whole."""
    save_file({key: x.cpu() for key, x in computed.items()}, path + ".tmp")
    os.replace(path + ".tmp", path)


def map_shard(path: str, keys: set[str], n: int) -> Activations:
    """A shard's tensors {key: [n, D]}, mapped into memory: what is not indexed is not read.

    InputError: it holds other keys, or another number of tokens.
    """
    shard = read_tensors(path)
    has_keys = shard.keys() == keys
    has_tokens = all(x.ndim == 2 and len(x) == n for x in shard.values())
    require(
        has_keys and has_tokens,
        f"{path}: not the activations that belong here; delete it, it is made again",
    )
    return shard


def read_shards(tokens: Tokens, dist, shards: list[Activations], texts: np.ndarray) -> Activations:
    """Indices of texts -> {"name/layer_site": [n, D]} float32, as run_models()."""
    sizes = []  # how many tokens each shard holds
    for shard in shards:
        any_tensor = next(iter(shard.values()))
        sizes.append(len(any_tensor))
    ends = np.cumsum(sizes)  # where each shard's tokens end among all E
    places = tokens.places(texts)  # [n]
    shard_of = np.searchsorted(ends, places, side="right")  # [n]
    out = {}
    # Each shard is indexed once, for all its rows that are asked for.
    for i in np.unique(shard_of):
        rows = np.flatnonzero(shard_of == i)
        first = ends[i] - sizes[i]
        rows_of_shard = torch.from_numpy(places[rows] - first)
        rows = torch.from_numpy(rows)
        for key, x in shards[i].items():
            if key not in out:
                out[key] = torch.empty(len(places), x.shape[1])
            out[key][rows] = x[rows_of_shard]
    return {key: x.to(dist.device) for key, x in out.items()}

"""Atomic checkpoints and exact resume: safetensors for tensors, JSON for the rest, no pickle.

A run holds no hidden random state: every draw is keyed by (seed, step, ...), so weights, optimizer, the few numbers of the
controllers and the step are all that a resumed run needs to end with the same bits as one that was never killed.

    checkpoint/step_{N}/state.json                     the step and the controllers
                        state.safetensors              weights and optimizer, or, of a model in shards (FSDP2),
                        shard-{rank + 1}-*.safetensors one file a process, each tensor's place in the whole in its header
                        tensors.safetensors            what else a run has learned, such as a density ratio (feature_control.py)

Both are read by torch.distributed.checkpoint's reader of safetensors, which cuts out of any of them what a process needs: a run may
be resumed on another number of processes, and with or without shards, then with the same numbers up to float error.
"""

import os
import re
import shutil
import warnings

import torch
from safetensors.torch import load_file, save_file

from .blocks import trainable
from .files import read_json, replace_folder, write_json
from .fsdp import is_sharded


def checkpoints(folder):
    """[(step, path)] of the finished checkpoints in a run folder, oldest first."""
    root = os.path.join(folder, "checkpoint")
    names = os.listdir(root) if os.path.isdir(root) else []
    found = [re.fullmatch(r"step_(\d+)", name) for name in names]
    return sorted((int(m[1]), os.path.join(root, m[0])) for m in found if m)


def save(folder, step, module, optimizer, state, keep, dist=None, more=None):
    """Write checkpoint/step_{step} with the trained weights, the optimizer, `state` (JSON) and `more` {name: tensor}; keep the last `keep`.

    The main process calls this alone, or, where the module is in shards, all processes do, with `dist`.
    """
    tensors, main = {}, dist is None or dist.main
    for name, p in trainable(module):
        tensors[f"model/{name}"] = p.detach().contiguous()
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value

    def write(path):
        if is_sharded(module):
            import torch.distributed.checkpoint as dcp

            dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(path, save_distributed=True))
        else:
            save_file(tensors, os.path.join(path, "state.safetensors"))
        if main and more:
            save_file(more, os.path.join(path, "tensors.safetensors"))
        if main:
            write_json(os.path.join(path, "state.json"), {"step": step, **state})

    if main:
        os.makedirs(os.path.join(folder, "checkpoint"), exist_ok=True)
    replace_folder(os.path.join(folder, "checkpoint", f"step_{step}"), write, dist if is_sharded(module) else None)
    for _, old in checkpoints(folder)[:-keep] if main else []:
        shutil.rmtree(old)


def load(folder, module, optimizer):
    """Restore module and optimizer from the newest checkpoint -> its state, or None where there is no checkpoint yet.

    What was saved as `more` is in state["tensors"].
    """
    found = checkpoints(folder)
    if not found:
        return None
    import torch.distributed.checkpoint as dcp  # here, because it takes a second

    path = found[-1][1]
    reader = dcp.HuggingFaceStorageReader(path)
    parameters = dict(trainable(module))
    tensors = {f"model/{name}": p.detach() for name, p in parameters.items()}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        if key.startswith("optimizer/"):  # moments are in shards as their weights are; the count of steps is a number
            _, slot, name = key.split("/")
            p = parameters[name].detach()
            tensors[key] = torch.zeros_like(p) if stored.size == p.shape else torch.zeros(stored.size, device=p.device)
            optimizer.state[parameters[name]][slot] = tensors[key]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be, where nothing is in shards
        dcp.load(tensors, storage_reader=reader, no_dist=not is_sharded(module))
    more = os.path.join(path, "tensors.safetensors")
    return read_json(os.path.join(path, "state.json")) | ({"tensors": load_file(more)} if os.path.isfile(more) else {})

"""Atomic checkpoints and exact resume: safetensors for tensors, JSON for the rest, no pickle.

A run holds no hidden random state: every draw is keyed by (seed, step, ...), so weights, optimizer, the few numbers of the
controllers and the step are all that a resumed run needs to end with the same bits as one that was never killed.
"""

import json
import os
import re
import shutil

import torch
from safetensors.torch import load_file, save_file

from .errors import InputError
from .blocks import trainable


def read_json(path):
    """The value in a JSON file; a file that is not JSON is an InputError."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as e:
        raise InputError(f"{path}: not JSON ({e})") from None


def write_json(path, value):
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never half of one."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
    os.replace(path + ".tmp", path)


def replace_folder(path, write):
    """Call write(temporary folder), then put it in the place of `path`."""
    temporary = os.path.join(os.path.dirname(path), ".tmp_" + os.path.basename(path))
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    write(temporary)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(temporary, path)


def checkpoints(folder):
    """[(step, path)] of the finished checkpoints in a run folder, oldest first."""
    root = os.path.join(folder, "checkpoint")
    names = os.listdir(root) if os.path.isdir(root) else []
    found = [re.fullmatch(r"step_(\d+)", name) for name in names]
    return sorted((int(m[1]), os.path.join(root, m[0])) for m in found if m)


def save(folder, step, module, optimizer, state, keep):
    """Write checkpoint/step_{step} with the trained weights, the optimizer and `state` (JSON); keep the last `keep`."""
    tensors = {}
    for name, p in trainable(module):
        tensors[f"model/{name}"] = p.detach().contiguous()
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value

    def write(path):
        save_file(tensors, os.path.join(path, "state.safetensors"))
        write_json(os.path.join(path, "state.json"), {"step": step, **state})

    os.makedirs(os.path.join(folder, "checkpoint"), exist_ok=True)
    replace_folder(os.path.join(folder, "checkpoint", f"step_{step}"), write)
    for _, old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def load(folder, module, optimizer):
    """Restore module and optimizer from the newest checkpoint -> its state, or None where there is no checkpoint yet."""
    found = checkpoints(folder)
    if not found:
        return None
    path = found[-1][1]
    tensors = load_file(os.path.join(path, "state.safetensors"))
    with torch.no_grad():
        for name, p in trainable(module):
            p.copy_(tensors.pop(f"model/{name}"))
    parameters = dict(trainable(module))
    for key, value in tensors.items():
        _, slot, name = key.split("/")
        optimizer.state[parameters[name]][slot] = value.to(parameters[name].device)
    return read_json(os.path.join(path, "state.json"))

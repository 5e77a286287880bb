"""Atomic checkpoints and exact resume: safetensors for tensors, JSON for the rest, no pickle.

A run holds no hidden random state: every draw is keyed by (seed, step, ...). So weights, optimizer,
the few numbers of the controllers and the step are all that a resumed run needs to end with the
same bits as one that was never killed.

    checkpoint/step_{N}/
        state.safetensors                 weights and optimizer, or, of a model in shards (FSDP2),
        shard-{rank + 1}-*.safetensors    one file a process, with each tensor's place in the whole
        tensors.safetensors               what else a run has learned, such as a density ratio
        state.json                        written last: the step, the controllers, and checksums of
                                          the files above, of the run's logs and of itself

Tensors are read by torch.distributed.checkpoint's reader of safetensors, which cuts out of any of
these files what a process needs: a run may be resumed on another number of processes, and with or
without shards, then with the same numbers up to float error.

A disk may lose or change what it was given. So nothing is loaded before it has been compared with
its checksum, and a run goes on from the newest checkpoint that is whole.
"""

import os
import re
import warnings

import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import InputError, first_line, library_call
from ..hf.blocks import trainable
from .distributed import Dist
from .files import (
    digest,
    digest_file,
    digest_start,
    read_object,
    recover_folder,
    remove,
    replace_folder,
    write_json,
)
from .fsdp import is_sharded
from .tensors import read_tensors

ALONE = Dist(0, 1, torch.device("cpu"))
MORE = "tensors.safetensors"


def checkpoints(folder: str) -> list[tuple[int, str]]:
    """[(step, path)] of the checkpoints in a run folder, oldest first, whole or not."""
    root = os.path.join(folder, "checkpoint")
    if not os.path.isdir(root):
        return []
    by_step = []
    for name in os.listdir(root):
        # Any other name is that of a folder left by a write that was broken off.
        match = re.fullmatch(r"step_(0|[1-9][0-9]*)", name)
        if match:
            by_step.append((int(match[1]), os.path.join(root, name)))
    return sorted(by_step)


# --------------------------------------------------------------------------------------------- save


def save(
    folder: str,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
    keep: int,
    dist: Dist = ALONE,
    more: dict[str, torch.Tensor] | None = None,
):
    """Write checkpoint/step_{step}, and keep the last `keep` checkpoints.

    It holds the trained weights, the optimizer, `state` (JSON) and `more` {name: tensor}. The main
    process calls this alone, or, where the module is in shards, all processes do, with `dist`.
    """
    tensors = collect_tensors(module, optimizer)
    # Without shards the tensors are the same on all processes: the main one writes them alone.
    writers = dist if is_sharded(module) else ALONE

    def write(path):
        if is_sharded(module):
            save_shards(tensors, path)
        else:
            save_file(tensors, os.path.join(path, "state.safetensors"))
        if dist.main and more:
            save_file(more, os.path.join(path, MORE))
        # Checksums of the files, as read back. state.json holds them, and a checksum of itself.
        files = digest_files(path, writers)
        if dist.main:
            content = {"step": step, **state, "files": files}
            write_json(os.path.join(path, "state.json"), {**content, "sha256": digest(content)})

    if dist.main:
        os.makedirs(os.path.join(folder, "checkpoint"), exist_ok=True)
    replace_folder(os.path.join(folder, "checkpoint", f"step_{step}"), write, writers)
    if dist.main:
        remove_all_but(folder, step, keep)


def collect_tensors(module, optimizer) -> dict:
    """The trained weights and their optimizer's slots, as load_tensors() finds them again:

        {"model/lm.lm_head.weight": [V, D], "optimizer/exp_avg/lm.lm_head.weight": [V, D], ...}

    A resumed run reads frozen weights from the model that it started from.
    """
    tensors = {}
    for name, p in trainable(module):
        tensors[f"model/{name}"] = p.detach().contiguous()
        # A weight that has had no gradient yet has no moments.
        for slot, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer/{slot}/{name}"] = value
    return tensors


def remove_all_but(folder: str, step: int, keep: int):
    """Remove all checkpoints but the last `keep` up to a step.

    A later one was damaged: the run went on from an older one.
    """
    saved = checkpoints(folder)
    until_now = [path for its_step, path in saved if its_step <= step]
    kept_paths = until_now[-keep:]
    for _, path in saved:
        if path not in kept_paths:
            remove(path)


def save_shards(tensors: dict, path: str):
    """Every process writes its own shards. A disk error on one of them is raised on all."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(path, save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except dcp.CheckpointException as e:
        # e.failures: {rank: (error, where it was raised)}. The error itself may say that a disk is
        # full, which cli.explain() reports in one line.
        error, _ = list(e.failures.values())[0]
        raise error from None


def digest_files(path: str, dist: Dist) -> dict[str, str]:
    """The SHA-256 of each file that the processes have written to a folder: {name: 64 hex digits}.

    Each process reads its own shard. All processes call this, and all get the whole.
    """
    # The main process also reads the files that are no shards. A line is "HEX NAME".
    own_prefix = f"shard-{dist.rank + 1:05d}-"
    lines = ""
    for name in sorted(os.listdir(path)):
        is_common = not name.startswith("shard-")
        if name.startswith(own_prefix) or (dist.main and is_common):
            sha256 = digest_file(os.path.join(path, name))
            lines += f"{sha256} {name}\n"
    digests = {}
    for line in dist.gather_text(lines).splitlines():
        sha256, name = line.split()
        digests[name] = sha256
    return digests


# --------------------------------------------------------------------------------------------- load


def load(
    folder: str, module: nn.Module, optimizer: torch.optim.Optimizer, dist: Dist = ALONE
) -> dict | None:
    """Restore module and optimizer from the newest checkpoint that is whole -> its state.

    None where there is no checkpoint yet. What was saved as `more` is in state["tensors"].
    A damaged checkpoint is named, with what is wrong, and the one before it is taken; where none is
    whole, an InputError says so. The main process decides for all, and all processes call this.
    """
    # One process chooses, and sends the name to all. If a shared disk showed two processes
    # different files, they would go on from different steps.
    choice = dist.on_main(lambda: choose(folder, module, dist))
    name = dist.gather_text(choice or "")
    if not name:
        return None

    path = os.path.join(folder, "checkpoint", name)
    load_tensors(path, module, optimizer)
    state = read_object(os.path.join(path, "state.json"))
    # Only what the run itself saved is handed back.
    del state["files"], state["sha256"]
    more = os.path.join(path, MORE)
    if os.path.isfile(more):
        state["tensors"] = read_tensors(more)
    return state


def choose(folder: str, module, dist: Dist) -> str:
    """The name of the newest checkpoint that is whole, such as step_40; "" where there is none."""
    root = os.path.join(folder, "checkpoint")
    if os.path.lexists(root) and not os.path.isdir(root):
        raise InputError(f"{root} should be a folder; remove it, and the run starts anew")
    if os.path.isdir(root):
        for name in os.listdir(root):
            if name.startswith(".old_step_"):  # a kill came while a new checkpoint took its place
                recover_folder(os.path.join(root, name.removeprefix(".old_")))

    # The newest first. The user hears what is wrong with each one that is damaged, even where an
    # older one is whole.
    damaged = []
    for step, path in reversed(checkpoints(folder)):
        problem = find_damage(folder, step, module)
        if not problem:
            for line in damaged:
                dist.print(f"{line}; step_{step} is taken instead")
            return f"step_{step}"
        damaged.append(f"{path} cannot be used: {problem}")
    if damaged:
        what_to_do = f"restore one from a copy, or remove {root}, and the run starts anew"
        raise InputError(f"{'; '.join(damaged)}; no other checkpoint is whole: {what_to_do}")
    return ""


def find_damage(folder: str, step: int, module) -> str:
    """What is wrong with checkpoint/step_{step}, in a few words; "" if it is whole."""
    path = os.path.join(folder, "checkpoint", f"step_{step}")
    try:
        # Undamaged files may still be those of another model, so its weights are compared too.
        return check_digests(folder, step, path) or compare_weights(path, module)
    except FileNotFoundError as e:
        return f"{os.path.basename(e.filename)} is missing"
    # The error says what is wrong. The folder's name is cut off: the caller says it.
    except InputError as e:
        return first_line(e).removeprefix(f"{path}/")
    except OSError as e:
        return first_line(e)


def check_digests(folder: str, step: int, path: str) -> str:
    """Compare a checkpoint's files, and the logs up to it, with what was written -> what differs.

    "" where nothing does.
    """
    # state.json's own checksum comes first, since state.json holds the others.
    state = read_object(os.path.join(path, "state.json"))
    content = {name: value for name, value in state.items() if name != "sha256"}
    if digest(content) != state.get("sha256"):
        return "state.json differs from its checksum"
    if state["step"] != step:
        return f"state.json is not that of step {step}"
    for name, sha256 in state["files"].items():
        if digest_file(os.path.join(path, name)) != sha256:
            return f"{name} differs from its checksum"
    # The logs may have grown since. They must still begin with what they held then.
    for name, log in state.get("logs", {}).items():
        if digest_start(os.path.join(folder, name), log["size"]) != log["sha256"]:
            return f"{os.path.join(folder, name)} has lost or changed rows that it had then"
    return ""


def compare_weights(path: str, module) -> str:
    """Compare the names and shapes of the weights with the model's -> what differs, or ""."""
    saved_shapes = {}
    for key, tensor in read_metadata(path).items():
        if key.startswith("model/"):
            saved_shapes[key.removeprefix("model/")] = tensor.size
    shapes = {name: p.shape for name, p in trainable(module)}
    for name in sorted(saved_shapes.keys() | shapes.keys()):
        if saved_shapes.get(name) != shapes.get(name):
            return f"it is of another model, which differs in {name}"
    return ""


def read_metadata(path: str) -> dict:
    """{name: its dtype and the size of the whole} of tensors in a folder's safetensors files."""
    import torch.distributed.checkpoint as dcp  # here, because it takes a second

    with library_call(f"{path}: its tensors cannot be read"):
        return dcp.HuggingFaceStorageReader(path).read_metadata().state_dict_metadata


def load_tensors(path: str, module, optimizer):
    """Fill module and optimizer from a checkpoint, each process with what it holds of them."""
    import torch.distributed.checkpoint as dcp

    # The reader fills tensors in place. p.detach() shares memory with p, so this fills the weights.
    # The optimizer of a new process holds nothing yet, so its tensors are made here.
    parameters = dict(trainable(module))
    tensors = {f"model/{name}": p.detach() for name, p in parameters.items()}
    for key, stored in read_metadata(path).items():
        # Moments are in shards as their weights are; the count of steps is a number.
        if key.startswith("optimizer/"):
            _, slot, name = key.split("/")
            p = parameters[name].detach()
            if stored.size == p.shape:
                tensors[key] = torch.zeros_like(p)
            else:
                tensors[key] = torch.zeros(stored.size, device=p.device)
            optimizer.state[parameters[name]][slot] = tensors[key]
    with warnings.catch_warnings():
        # As it should be, where nothing is in shards.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader = dcp.HuggingFaceStorageReader(path)
        dcp.load(tensors, storage_reader=reader, no_dist=not is_sharded(module))

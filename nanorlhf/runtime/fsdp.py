"""FSDP2: models that do not fit. Every process holds a shard of each weight, of its gradient and of
its Adam state.

    weight [n, ...]  ->  rows [ceil(n / world), ...] on each process

Parameters, gradients and Adam's two moments are then DTensors. A unit (one decoder block, or what
is left of the model) is gathered right before its forward or backward pass and freed right after
it, so the whole model is on no device at any time in training.

Without gradients that would be wasteful: a rollout of 500 tokens would gather everything 500 times.
So each phase without gradients (a rollout, old log-probs, scores, an evaluation) gathers once,
inside `with gathered(model):`. In there nothing is sent: processes may make different numbers of
forward passes.
"""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..hf.blocks import blocks

# Parts of a model that are units of their own, by name; they are never gathered in bfloat16.
FLOAT32_UNITS = ("value_head", "score", "sae")


def all_blocks(module: nn.Module) -> list[nn.Module]:
    """The decoder blocks of every HF model inside a module, each once.

    These are the policy's LM, a separate value trunk, a reward model.
    """
    by_id = {}
    for model in module.modules():
        # Every model of transformers has a base_model. An LM and its trunk have the same blocks.
        if hasattr(model, "base_model"):
            for block in blocks(model):
                by_id[id(block)] = block
    return list(by_id.values())


# ------------------------------------------------------------------------------------- in shards


def shard(module: nn.Module, dist, dtype: str = "float32") -> nn.Module:
    """Shard a module in place over all processes and return it.

    Its weights must be the same on all processes. Each decoder block is a unit. So are the value
    and score heads, which stay in float32 (see models.apply_head), and a SARM's autoencoder. The
    rest is the root. With bfloat16 the weights and moments are float32 shards, what is gathered is
    bfloat16, and gradients are added up in float32.
    """
    # Here, because to import them takes more than a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(dist.device.type, (dist.world,))
    precision = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    # Inner units come first: a unit holds what no unit inside of it holds. So the embeddings, the
    # last norm and the LM head are left for the root, which comes last.
    for name, part in module.named_modules():
        if name.split(".")[-1] in FLOAT32_UNITS:
            fully_shard(part, mesh=mesh)
    for block in all_blocks(module):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    return fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)


def is_sharded(module) -> bool:
    """Whether shard() was here: it makes any module an FSDPModule, which has this method."""
    return hasattr(module, "set_reshard_after_forward")


def is_dtensor(tensor) -> bool:
    """Whether this process holds only a shard of a tensor."""
    return hasattr(tensor, "full_tensor")


# ----------------------------------------------------------------------------------- whole again


@contextlib.contextmanager
def gathered(*modules: nn.Module | None):
    """All weights of the modules on every process, once for many forward passes without gradients.

    Afterwards they are in shards again. Nothing happens to a module that is not sharded. Entering
    is a collective call; the forward passes inside and the exit are not.
    Pitfall: the gathered weights lie elsewhere each time, so a CUDA graph captured inside is worth
    nothing outside.
    """
    units = []
    for module in modules:
        if module is not None:
            units.extend(unit for unit in module.modules() if is_sharded(unit))
    units = list(dict.fromkeys(units))  # each once: modules may share some

    # Usually a unit frees its gathered weights after its own forward pass.
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


@contextlib.contextmanager
def whole(module: nn.Module, main: bool):
    """Plain float32 tensors on the CPU in place of the shards, on the main process: any code can
    save the module.

    The other processes find empty tensors. The shards are back afterwards. Entering is a collective
    call.
    """
    places = []  # (module, name, parameter)
    if is_sharded(module):
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    places.append((part, name, p))

    # A tied weight is gathered once, and stays tied.
    full = {}  # {id of a parameter: the whole of it}
    for _, _, p in places:
        if id(p) not in full:
            # Only the main process keeps the result, but all processes must take part.
            tensor = p.detach()
            if is_dtensor(p):
                tensor = tensor.full_tensor()
            held = tensor.cpu() if main else tensor.new_empty(0)
            full[id(p)] = nn.Parameter(held, p.requires_grad)

    try:
        for part, name, p in places:
            part._parameters[name] = full[id(p)]
        yield
    finally:
        for part, name, p in places:
            part._parameters[name] = p


# ---------------------------------------------------------------------------------------- memory


def checkpoint_activations(module: nn.Module):
    """Keep only each block's input for the backward pass, which computes the block again.

    The gradients are the same, for a third more work. This is ours rather than transformers', which
    is off in eval mode, where PPO trains. Names of parameters stay as they are.
    """
    for block in all_blocks(module):
        # A partial of a bound method survives deepcopy.
        block.forward = functools.partial(recomputed, block.forward)


def recomputed(forward: Callable, *args, **kwargs):
    """forward(*args, **kwargs), which the backward pass computes again.

    Dropout draws the same noise both times.
    """
    # A rollout, with its cache, has no backward pass.
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)

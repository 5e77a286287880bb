"""FSDP2: models that do not fit. Every process holds a shard of each weight, of its gradient and of its Adam state.

    weight [n, ...]  ->  rows [ceil(n / world), ...] on each process: parameters, gradients and Adam's two moments are DTensors

A unit (one decoder block, or what is left of the model) is gathered right before its forward or backward pass and freed right
after it, so the whole model is on no device at any time in training. Without gradients that would be wasteful: a rollout of 500
tokens would gather everything 500 times. So each phase without gradients (a rollout, old log-probs, scores, an evaluation) gathers
once, inside `with gathered(model):`. In there nothing is sent: processes may make different numbers of forward passes.
"""

import contextlib
import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..hf.blocks import blocks, trainable


def all_blocks(module):
    """The decoder blocks of every HF model inside a module: of the policy's LM, of a separate value trunk, of a reward model."""
    found = [block for m in module.modules() if hasattr(m, "base_model") for block in blocks(m)]
    return list({id(block): block for block in found}.values())  # an LM and its trunk have the same ones


def shard(module, dist, dtype="float32"):
    """Shard a module in place over all processes and return it; its weights must be the same on all of them.

    Each decoder block is a unit. So are the value and score heads, which stay in float32 (see models.scalar), and a SARM's autoencoder.
    The rest is the root.
    bfloat16: weights and moments are float32 shards, what is gathered is bfloat16, and gradients are added up in float32.
    """
    from torch.distributed.device_mesh import (
        init_device_mesh,  # here, because to import them takes more than a second
    )
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(dist.device.type, (dist.world,))
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if dtype == "bfloat16" else MixedPrecisionPolicy()
    for name, head in module.named_modules():
        if name.split(".")[-1] in ("value_head", "score", "sae"):
            fully_shard(head, mesh=mesh)
    for block in all_blocks(module):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    return fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)


def is_sharded(module):
    """Whether shard() was here: it makes any module an FSDPModule, which has this method."""
    return hasattr(module, "set_reshard_after_forward")


def is_dtensor(tensor):
    """Whether this process holds only a shard of a tensor."""
    return hasattr(tensor, "full_tensor")


@contextlib.contextmanager
def gathered(*modules):
    """All weights of the modules on every process, once for many forward passes without gradients; in shards again afterwards.

    Nothing happens to a module that is not sharded. Entering is a collective call, the forward passes inside and the exit are not.
    Pitfall: the gathered weights lie elsewhere each time, so a CUDA graph captured inside is worth nothing outside.
    """
    units = list(dict.fromkeys(unit for module in modules if module is not None for unit in module.modules() if is_sharded(unit)))
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
def whole(module=None, main=True):
    """Inside, the main process finds plain tensors on the CPU in place of the shards, in float32: any code can save the module.

    The other processes find empty tensors. The shards are back afterwards. Entering is a collective call.
    """
    places = [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None] if is_sharded(module) else []
    full = {}  # a tied weight is gathered once, and stays tied
    for _, _, p in places:
        if id(p) not in full:
            tensor = p.detach().full_tensor() if is_dtensor(p) else p.detach()
            full[id(p)] = nn.Parameter(tensor.cpu() if main else tensor.new_empty(0), p.requires_grad)
    try:
        for m, name, p in places:
            m._parameters[name] = full[id(p)]
        yield
    finally:
        for m, name, p in places:
            m._parameters[name] = p


def checkpoint_activations(module):
    """Keep only each block's input for the backward pass, which computes the block again: same gradients, a third more work.

    Ours rather than transformers', which is off in eval mode, where PPO trains. Names of parameters stay as they are.
    """
    for block in all_blocks(module):
        block.forward = functools.partial(recomputed, block.forward)  # a partial of a bound method survives deepcopy


def recomputed(forward, *args, **kwargs):
    """forward(*args, **kwargs), again in the backward pass; dropout draws the same noise both times."""
    if not torch.is_grad_enabled():  # a rollout, with its cache
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def local_bytes(module, optimizer=None):
    """Bytes on this process: {parameters, gradients, optimizer}. In shards they are about 1 / world of the whole."""

    def size(tensor):
        tensor = tensor.to_local() if is_dtensor(tensor) else tensor
        return tensor.numel() * tensor.element_size()

    states = [optimizer.state.get(p, {}) for _, p in trainable(module)] if optimizer else []
    return {
        "parameters": sum(size(p) for p in module.parameters()),
        "gradients": sum(size(p.grad) for p in module.parameters() if p.grad is not None),
        "optimizer": sum(size(value) for state in states for value in state.values()),
    }

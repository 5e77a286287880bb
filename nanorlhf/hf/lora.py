"""LoRA by hand: low-rank adapters on linear layers. Their folders, in PEFT's format, are adapters.py's.

    y = W x + (alpha / r) B A dropout(x)        (Hu et al. 2021, 2106.09685, section 4.1)

W [out, in] is frozen, A [r, in] starts random, B [out, r] starts at zero, so that training starts from the model as it is. An adapter
replaces its layer in the model and holds it as `base_layer`; the rest of the model stays what it was. GPT-2's Conv1D is a linear
layer whose weight is stored as [in, out]; A and B are the same for it.
"""

import contextlib
import re
import signal
import threading

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import InputError
from .blocks import freeze

SEARCH_SECONDS = 5  # for the layers that a regular expression names
HEADS = ("score", "classifier")  # of sequence classifiers: trained in full and saved whole


class LoRA(nn.Module):
    """A linear layer with an adapter: y = W x + (alpha / r) B A dropout(x), [.., in] -> [.., out]; with `on` False y = W x.

    A and B are float32 parameters, computed with in the type of x; autocast does to them what it does to W.
    """

    def __init__(self, base_layer, lora_A, lora_B, alpha, dropout):
        super().__init__()
        device = base_layer.weight.device
        self.base_layer, self.alpha, self.on = base_layer, alpha, True
        self.lora_A = nn.Parameter(lora_A.to(device, torch.float32))  # [r, in]
        self.lora_B = nn.Parameter(lora_B.to(device, torch.float32))  # [out, r]
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / len(lora_A)
        self.train(base_layer.training)

    def forward(self, x):
        y = self.base_layer(x)
        if not self.on:
            return y
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # [.., r]
        return y + F.linear(self.scale * low, self.lora_B.to(x.dtype))

    @torch.no_grad()
    def merged(self):
        """The plain layer with W + (alpha / r) B A for its weight."""
        delta = self.scale * self.lora_B @ self.lora_A  # [out, in]
        self.base_layer.weight += delta.T if isinstance(self.base_layer, Conv1D) else delta
        return self.base_layer


def shape_of(layer):
    """(out, in) of a linear layer."""
    return tuple(layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape)


def adapters(module):
    """{name: LoRA} of the adapters in a module."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRA)}


def replace(lm, name, layer):
    parent, _, child = name.rpartition(".")
    setattr(lm.get_submodule(parent), child, layer)


def matching(lm, pattern):
    """{name: layer} of the linear layers that a pattern names; a classifier's head is none of them.

    "all-linear": all but the output head. Another string: a regular expression for whole names. A list: names, or regular
    expressions, for the ends of names ("q_proj", "layers.0.mlp.up_proj"). These are PEFT's rules.
    """
    layers = {name: m for name, m in lm.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and name.split(".")[0] not in HEADS}
    if pattern in ("all-linear", ["all-linear"]):
        return {name: layer for name, layer in layers.items() if layer is not lm.get_output_embeddings()}
    patterns = [pattern] if isinstance(pattern, str) else [rf"(?:.*\.)?(?:{end})" for end in pattern]
    try:
        with time_limit(SEARCH_SECONDS, f"LoRA layers {pattern}: a search that takes too long; write a simpler one"):
            return {name: layer for name, layer in layers.items() if any(re.fullmatch(p, name) for p in patterns)}
    except (re.error, RecursionError, OverflowError) as e:
        raise InputError(f"LoRA layers {pattern}: not a regular expression ({e})") from None


@contextlib.contextmanager
def time_limit(seconds, message):
    """InputError where what is done in this context takes longer than so many seconds.

    Nobody can tell from a regular expression whether its search ends before the sun does: that of
    ((a|.)+)+x does not. The search looks for signals now and then, so an alarm ends it. Only the
    main thread can set one; elsewhere there is no limit.
    """

    def stop(*_):
        raise InputError(message)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def add_lora(lm, pattern="all-linear", rank=8, alpha=16.0, dropout=0.0, seed=0):
    """Freeze an HF model and put adapters on the linear layers that `pattern` names (see matching). -> a sentence on what was done.

        A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0        (kaiming_uniform with a = sqrt(5), as in the authors' code)

    The score head of a classifier stays trained. `seed` alone decides A. InputError: rank < 1, a pattern that names nothing, adapters
    on a model that has some, a layer that is tied to the embeddings. Pitfall: new weights start small, so LoRA takes a larger
    learning rate than full training, often ten times.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise InputError(f"LoRA takes a rank of at least 1 and a dropout in [0, 1), not {rank} and {dropout}")
    if adapters(lm):
        raise InputError("this model has adapters already: merge them first")
    for entry in [pattern] if isinstance(pattern, str) else pattern:
        if not matching(lm, pattern if isinstance(pattern, str) else [entry]):
            ends = sorted({name.split(".")[-1] for name in matching(lm, ".*")})
            raise InputError(f"LoRA layers {entry}: no linear layer of {type(lm).__name__} has this name; there are {', '.join(ends)}")
    lm.requires_grad_(False)
    generator, layers = torch.Generator().manual_seed(seed), matching(lm, pattern)
    for name, layer in layers.items():
        n_out, n_in = shape_of(layer)
        lora_A = (2 * torch.rand(rank, n_in, generator=generator) - 1) / n_in**0.5
        put(lm, name, lora_A, torch.zeros(n_out, rank), alpha, dropout)
    heads = [head for head in HEADS if hasattr(lm, head)]
    for head in heads:
        getattr(lm, head).requires_grad_(True)
    n = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    ends = ", ".join(dict.fromkeys(name.split(".")[-1] for name in layers))
    also = f" and the {heads[0]} head" if heads else ""
    return f"LoRA of rank {rank} on {len(layers)} linear layers ({ends}){also}: {n:,} trained, the rest is frozen"


def choose_trained(lm, config):
    """What a run trains of a model by its flags: adapters, the upper blocks, or everything. -> a sentence on what was done"""
    if config.lora_rank:
        return add_lora(lm, config.lora_layers, config.lora_rank, config.lora_alpha, config.lora_dropout, config.seed)
    return freeze(lm, config.freeze_layers)


def put(lm, name, lora_A, lora_B, alpha, dropout):
    """An adapter on one layer. One that is tied to the embeddings could not be merged without changing them too."""
    layer = lm.get_submodule(name)
    if any(layer.weight is m.weight for m in lm.modules() if isinstance(m, nn.Embedding)):
        raise InputError(f"LoRA on {name}: it is tied to the embeddings, and an adapter on it could not be merged")
    replace(lm, name, LoRA(layer, lora_A, lora_B, alpha, dropout))


@contextlib.contextmanager
def adapters_off(module):
    """Within this context the module computes what it did before it had adapters, bit for bit."""
    layers = list(adapters(module).values())
    before = [layer.on for layer in layers]
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer, on in zip(layers, before):
            layer.on = on


def merge(lm):
    """Fold the adapters into the weights, W <- W + (alpha / r) B A, and put the plain layers back. -> lm"""
    for name, layer in adapters(lm).items():
        replace(lm, name, layer.merged())
    return lm

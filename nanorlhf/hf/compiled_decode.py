"""The loop of GPUs with --compile: decode.decode_static(), with less to read and to launch.

    B sequences, P prompt tokens (left-padded), R response tokens, D hidden

A decode step reads all weights for one token a row. Autocast would cast float32 weights anew in
every step that is compiled, so linear layers hold copies in bfloat16 here, cast once a rollout.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .decode import autocast_dtype, decode_static, has_fsdp_units, static_cache


def is_compiled(lm) -> bool:
    """Whether a model decodes in this loop: with --compile, where it has a static cache.

    FSDP's gathered weights lie elsewhere in every rollout; they are left to decode_static().
    """
    if not getattr(lm, "compiled", False) or has_fsdp_units(lm):
        return False
    return static_cache(lm, 1) is not None


def decode_compiled(
    sampler,
    ids: Tensor,
    mask: Tensor,
    u: Tensor,
    out: dict[str, Tensor],
    finished: Tensor,
):
    """Write one response to each prompt, as decode_static() does."""
    with cast_linear(sampler.model, ids.device.type):
        decode_static(sampler, ids, mask, u, out, finished)


# --------------------------------------------------------------------------------- the weights


@contextmanager
def cast_linear(model, device_type: str) -> Iterator[None]:
    """A context in which the linear layers of the LM hold their weights in autocast's type.

    Their outputs are those of autocast, bit for bit: it would compute with the same copies. These
    are made once and filled here, so they lie at the same addresses in every rollout, and stay
    allocated: 2 bytes a weight. Norms and embeddings keep their own weights, as they do under
    autocast. Nothing happens without autocast.
    """
    dtype = autocast_dtype(device_type)
    if dtype is None:
        yield
        return
    if model.linear_copies is None:
        model.linear_copies = make_copies(model.lm, dtype)

    own = []
    for layer, name, copy in model.linear_copies:
        weight = layer._parameters[name]
        copy.copy_(weight)
        own.append(weight)
    try:
        for layer, name, copy in model.linear_copies:
            layer._parameters[name] = copy
        yield
    finally:
        for (layer, name, _), weight in zip(model.linear_copies, own):
            layer._parameters[name] = weight


def make_copies(lm, dtype: torch.dtype) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(layer, "weight" or "bias", copy in `dtype`) of all linear layers that hold another type.

    Only of transformers' and torch's own layers: others may do more with their weights than
    autocast knows of. A head that is tied to the embeddings is copied, and they are not.
    """
    copies = []
    for layer in lm.modules():
        if type(layer) not in (nn.Linear, Conv1D):
            continue
        for name, p in layer.named_parameters(recurse=False):
            if p.dtype != dtype:
                copy = nn.Parameter(p.detach().to(dtype), requires_grad=False)
                copies.append((layer, name, copy))
    return copies

"""How weights of linear layers lie in memory while a CPU decodes, where a product has few rows.

    b rows, i inputs and o outputs of a linear layer: [b, i] -> [b, o], with a weight [o, i]

Before a product, a library copies its weight into blocks that fit the processor. In an update a
weight meets a thousand tokens at a time, and that costs little. In decoding it meets b at a time,
one token of each response, and that costs up to a third of the product. So weights are laid out
once for all tokens of a rollout: in float32 they are turned, in bfloat16 they are packed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .lora import LoRA, adapters

# With fewer rows a float32 product takes as long however its weight lies.
MANY_ROWS = 64
# Smaller weights stay in the processor's cache, and gain nothing.
LARGE_WEIGHT = 2**18


def large_layers(lm) -> list[nn.Linear]:
    """The plain linear layers with large weights."""
    layers = []
    for module in lm.modules():
        if type(module) is nn.Linear and module.weight.numel() >= LARGE_WEIGHT:
            layers.append(module)
    return layers


# --------------------------------------------------------------------------------------- float32


@contextmanager
def turned_weights(lm, n_rows: int) -> Iterator[None]:
    """A context in which large weights [o, i] lie in memory column by column.

    A linear layer multiplies by the transpose of its weight. With 64 rows that is a fifth faster
    where the transpose lies row by row. The parameters stay the same objects with the same numbers.
    Copies are made of trained weights alone: they take the memory that gradients have in an update.
    Products may differ by rounding.
    """
    weights = []
    if n_rows >= MANY_ROWS:
        # A head that is tied to the embeddings stays: their rows are looked up.
        embeddings = lm.get_input_embeddings().weight
        for layer in large_layers(lm):
            if layer.weight.requires_grad and layer.weight is not embeddings:
                weights.append(layer.weight)

    # The old tensors are kept, and put back afterwards. Turning the copies back instead would leave
    # the heap in pieces, and cost time.
    as_they_lie = [weight.data for weight in weights]
    try:
        for weight in weights:
            # [o, i] -> [i, o] row by row in new memory -> the same memory seen as [o, i] again.
            weight.data = weight.data.t().contiguous().t()
        yield
    finally:
        for weight, data in zip(weights, as_they_lie):
            weight.data = data


# -------------------------------------------------------------------------------------- bfloat16


@contextmanager
def packed_weights(lm, n_rows: int) -> Iterator[None]:
    """A context in which large layers multiply in bfloat16 by packed copies of their weights.

    So do their adapters, where they are on. The outputs are those of autocast, to the last bit, and
    the copies take the place of those that it would make. The operators are oneDNN's, by the names
    that torch.compile has for them: they are not public, so without them nothing happens.
    """
    forwards = {}  # {module: what it does in this context}
    if can_pack():
        # Frozen layers are packed too, since autocast would copy them as well.
        for layer in large_layers(lm):
            forwards[layer] = packed_forward(layer.weight, layer.bias, n_rows)
        # An adapter calls its base_layer, which is packed by now. A and B have packed copies too.
        for adapter in adapters(lm).values():
            if adapter.on and adapter.base_layer in forwards:
                forwards[adapter] = packed_adapter(adapter, n_rows)

    try:
        for module, forward in forwards.items():
            # It hides the class's own forward until it is deleted.
            module.forward = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


def can_pack() -> bool:
    """Whether this torch and this processor have packed products in bfloat16."""
    names = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.no_grad()
def packed_forward(weight: Tensor, bias: Tensor | None, n_rows: int) -> Callable[[Tensor], Tensor]:
    """A linear layer as a function in bfloat16, [.., i] -> [.., o], for n_rows rows at a time."""
    weight = weight.to(torch.bfloat16)
    weight = torch.ops.mkldnn._reorder_linear_weight(weight, n_rows)
    if bias is not None:
        bias = bias.to(torch.bfloat16)

    def forward(x):
        x = x.to(torch.bfloat16)
        # The last three say that nothing is done to the product.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    return forward


def packed_adapter(layer: LoRA, n_rows: int) -> Callable[[Tensor], Tensor]:
    """A layer with its adapter as a function in bfloat16, without dropout, [.., i] -> [.., o].

    Products with A and B are so small that autocast takes longer to find its copies of the two than
    to multiply. So the copies are made here, once; and x is cast once for both W and A.
    """
    A = packed_forward(layer.lora_A, None, n_rows)
    B = packed_forward(layer.lora_B, None, n_rows)

    def forward(x):
        x = x.to(torch.bfloat16)
        change = B(layer.scale * A(x))
        return change.add_(layer.base_layer(x))

    return forward

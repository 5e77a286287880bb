"""The memory that one process holds of a model, which may be in shards."""

from torch import Tensor, nn

from nanorlhf.hf.blocks import trainable
from nanorlhf.runtime.fsdp import is_dtensor


def local_bytes(module: nn.Module, optimizer=None) -> dict[str, int]:
    """Bytes on this process: {parameters, gradients, optimizer}.

    In shards they are about 1 / world of the whole.
    """
    sizes = {"parameters": 0, "gradients": 0, "optimizer": 0}
    for p in module.parameters():
        sizes["parameters"] += count_bytes(p)
        if p.grad is not None:
            sizes["gradients"] += count_bytes(p.grad)
    if optimizer is not None:
        for _, p in trainable(module):
            # Before its first step Adam holds nothing.
            for value in optimizer.state.get(p, {}).values():
                sizes["optimizer"] += count_bytes(value)
    return sizes


def count_bytes(tensor: Tensor) -> int:
    """The bytes of what this process holds of a tensor."""
    if is_dtensor(tensor):
        tensor = tensor.to_local()
    return tensor.numel() * tensor.element_size()

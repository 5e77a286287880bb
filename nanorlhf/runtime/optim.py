"""AdamW and its learning-rate schedule, the same for all training scripts."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..hf.blocks import trainable
from .fsdp import is_dtensor


def adamw(
    module: nn.Module, lr: float, betas: Sequence[float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over what is trained. Vectors (biases, norms) do not decay."""
    matrices = []
    vectors = []
    for _, p in trainable(module):
        if p.dim() >= 2:
            matrices.append(p)
        else:
            vectors.append(p)
    groups = []
    if matrices:
        groups.append({"params": matrices, "weight_decay": weight_decay})
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    # Fused: one kernel for all parameters, on a CPU too.
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), fused=True)


def learning_rate(
    step: int, steps: int, lr: float, schedule: str, warmup: int = 0, final: float = 0.0
) -> float:
    """The learning rate of a step, of 0 .. steps - 1.

    It rises linearly over `warmup` steps. Then it is constant, or it falls to final * lr, linearly
    or along a cosine. schedule: constant, linear or cosine; any other is a ValueError.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    # The last step is steps - 1, so `done` stays below 1: the rate does not quite reach final * lr.
    done = (step - warmup) / max(1, steps - warmup)  # 0 .. 1
    if schedule == "linear":
        left = 1 - done
    elif schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    else:
        raise ValueError(f"there is no schedule {schedule!r}")
    return lr * (final + (1 - final) * left)


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    lr: float,
    max_grad_norm: float,
    step: int,
) -> float:
    """Clip the gradients, check them and make a step. -> the gradient norm before clipping

    FloatingPointError: a gradient that is not finite; the run ends before it does harm. The norm is
    of the gradients after their exchange, so all ranks see the same one and stop together.
    """
    parameters = [p for _, p in trainable(module)]
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    norm = total
    if is_dtensor(total):
        norm = total.full_tensor()  # of all shards
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"step {step}: the gradient norm is {norm.item()}; the last checkpoint is kept; "
            "lower --lr, or the scores and coefficients that the loss is made of"
        )
    # Without this condition clipping would read and write every gradient to multiply it by 1.
    if norm > max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, total)

    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()

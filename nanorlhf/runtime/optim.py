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
    # Fused: one kernel for all parameters, on a CPU too, which optimizer_step() lets clip them.
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), fused=True)


def learning_rate(
    step: int, steps: int, lr: float, schedule: str, warmup: int = 0, final: float = 0.0
) -> float:
    """The learning rate of a step, of 0 .. steps - 1.

    It rises linearly over `warmup` steps. Then it is constant, or it falls to final * lr, linearly
    or along a cosine. schedule: constant, linear or cosine.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    done = (step - warmup) / max(1, steps - warmup)  # 0 .. 1
    if schedule == "linear":
        left = 1 - done
    else:
        left = 0.5 * (1 + math.cos(math.pi * done))
    return lr * (final + (1 - final) * left)


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    lr: float,
    max_grad_norm: float,
    step: int,
) -> float:
    """Clip the gradients, check them and make a step. -> the gradient norm before clipping

    FloatingPointError: a gradient that is not finite. Weights and optimizer are as they were before
    the step, and the run ends. The norm is of the gradients after their exchange, so all ranks see
    the same one and stop together.
    """
    parameters = [p for _, p in trainable(module)]
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    for group in optimizer.param_groups:
        group["lr"] = lr

    if is_dtensor(total):
        norm = read_norm(total.full_tensor(), step)  # of all shards
        if norm > max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, total)
        optimizer.step()
    else:
        # The fused kernel divides each gradient by grad_scale as it reads it, and changes nothing
        # where found_inf is 1. So a GPU has its work before the CPU waits to read the norm.
        optimizer.grad_scale = (total / max_grad_norm).clamp(min=1)
        optimizer.found_inf = (~torch.isfinite(total)).float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        norm = read_norm(total, step)
    optimizer.zero_grad(set_to_none=True)
    return norm


def read_norm(norm: torch.Tensor, step: int) -> float:
    """The gradient norm of a step. FloatingPointError: it is not finite."""
    number = norm.item()
    if not math.isfinite(number):
        raise FloatingPointError(
            f"step {step}: the gradient norm is {number}; the last checkpoint is kept; lower --lr"
        )
    return number

"""AdamW and its learning-rate schedule, the same for all training scripts."""

import math

import torch

from ..hf.blocks import trainable
from .fsdp import is_dtensor


def adamw(module, lr, betas, weight_decay):
    """AdamW over what is trained; no decay on vectors (biases, norms). Fused: one kernel for all parameters, on CPU too."""
    matrices = [p for _, p in trainable(module) if p.dim() >= 2]
    vectors = [p for _, p in trainable(module) if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=tuple(betas), fused=True)


def learning_rate(step, steps, lr, schedule, warmup=0, final=0.0):
    """The rate of step 0 .. steps-1: linear warm-up over `warmup` steps, then constant, linear or cosine towards final * lr."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)  # 0 .. 1
    if schedule == "constant":
        return lr
    left = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return lr * (final + (1 - final) * left)


def optimizer_step(optimizer, module, lr, max_grad_norm, step):
    """Clip, check, step. -> gradient norm before clipping. A gradient that is not finite stops the run before it does harm.

    The norm is of the gradients after their exchange: all ranks see the same one and stop together.
    """
    parameters = [p for _, p in trainable(module)]
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = total.full_tensor() if is_dtensor(total) else total  # of all shards
    if not torch.isfinite(norm):
        raise FloatingPointError(f"step {step}: the gradient norm is {norm.item()}; the last checkpoint is kept; lower --lr")
    if norm > max_grad_norm:  # else clipping would read and write every gradient to multiply it by 1
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, total)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()

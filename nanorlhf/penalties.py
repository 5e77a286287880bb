"""Feature penalties: what a text's latents take from its reward, and edits of the latents.

    B texts, M features, F chosen features, d features whose density is estimated, H hidden units

z is what a sparse autoencoder makes of the hidden state at a text's pooled (last real) token. In
PPO the score of a text becomes

    R = score(clamp(z)) - sum_i penalty_i(z_i) - beta log p_policy(z) / p_human(z)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OPS = ("set", "min", "max", "*", "+")
PENALTIES = ("indicator", "hinge")


def edit_latents(z: Tensor, edits: Sequence[tuple[str, float]]) -> Tensor:
    """Edit latents z [.., F], by one (op, value) for each of the F columns -> z' [.., F], new.

        set   z' = v
        min   z' = max(z, v), a floor
        max   z' = min(z, v), a cap
        *     z' = v z
        +     z' = z + v

    `min` and `max` are torch.clamp's. ValueError: another number of edits than columns, an unknown
    op. Pitfall: a feature that does not fire is 0, so `set` and `+`, a floor above 0 and a cap
    below 0 change every text.
    """
    if len(edits) != z.shape[-1]:
        raise ValueError(f"{len(edits)} edits for {z.shape[-1]} features")
    # The edited columns make a new tensor: z itself stays as it is, and gradients go through.
    columns = []
    for (op, value), column in zip(edits, z.unbind(-1)):
        columns.append(edit_column(column, op, value))
    # No edits, no columns: torch.stack needs at least one.
    if not columns:
        return z.clone()
    return torch.stack(columns, -1)


def edit_column(x: Tensor, op: str, value: float) -> Tensor:
    """One edit of edit_latents(), of one feature: x of any shape -> the same shape."""
    if op == "set":
        return torch.full_like(x, value)
    if op == "min":
        return x.clamp(min=value)
    if op == "max":
        return x.clamp(max=value)
    if op == "*":
        return x * value
    if op == "+":
        return x + value
    raise ValueError(f"edit {op!r} is not one of {', '.join(OPS)}")


def feature_penalty(
    latents: Tensor,
    features: Sequence[int],
    tau: Sequence[float],
    alpha: Sequence[float],
    kind: str = "indicator",
) -> Tensor:
    """What its features cost a text.

        indicator   sum_i alpha_i 1[z_i > tau_i]
        hinge       sum_i alpha_i max(0, z_i - tau_i)

    latents [B, M]; features, tau, alpha: lists of one length, the columns, their thresholds in
    units of z and their prices in units of the reward (hinge: for a unit of z) -> [B]. ValueError:
    lists of unequal length, a column that is not there, an unknown kind.
    Pitfall: the price of the indicator is the same far above tau as just above it, so it does not
    pull a strong feature down bit by bit, as the hinge does; and up to tau both are free, so a
    policy settles right below it.
    """
    if not len(features) == len(tau) == len(alpha):
        raise ValueError(
            f"{len(features)} features, {len(tau)} tau and {len(alpha)} alpha: there must be one "
            "of each for a feature"
        )
    if kind not in PENALTIES:
        raise ValueError(f"the penalty must be one of {', '.join(PENALTIES)}, not {kind!r}")
    # A negative number would quietly mean a feature counted from the end.
    for feature in features:
        if not 0 <= feature < latents.shape[-1]:
            raise ValueError(f"feature {feature} is not one of the {latents.shape[-1]} features")

    z = latents[..., list(features)]  # [B, F]
    thresholds = z.new_tensor([float(threshold) for threshold in tau])  # [F]
    prices = z.new_tensor([float(price) for price in alpha])  # [F]
    # The indicator is a step, which has no gradient. PPO needs none: the penalty is part of the
    # reward, and rewards are not differentiated.
    if kind == "indicator":
        excess = (z > thresholds).to(z.dtype)
    else:
        excess = (z - thresholds).relu()
    return (prices * excess).sum(-1)


class DensityRatio(nn.Module):
    """log p_policy(z) / p_human(z), as the logit of a classifier (Sugiyama et al. 2012, ch. 4).

        logit(z) = w . tanh(W (z - mean) / std + b) + c

    The classifier tells policy latents (class 1) from human ones (class 0). Its logit is the log
    ratio where both classes weigh the same in the loss, as in density_loss. `fit` standardises
    latents by those of people. Before any training the logit is 0. z [B, d] -> [B]. ValueError: no
    features. Pitfall: it extrapolates where neither class has been seen, and two densities that do
    not overlap have no finite ratio: clip it.
    """

    HIDDEN = 256

    def __init__(self, d: int, seed: int = 0):
        super().__init__()
        if d < 1:
            raise ValueError("a density ratio needs at least one feature")
        self.hidden = nn.Linear(d, self.HIDDEN)
        self.logit = nn.Linear(self.HIDDEN, 1)
        # W x and b have variance 1 for people's x: the units bend where people's latents are. The
        # generator is of its own, so that `seed` alone decides the start.
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.hidden.weight, 0, d**-0.5, generator=generator)
        nn.init.normal_(self.hidden.bias, 0, 1, generator=generator)
        # A logit of 0 everywhere: no text is punished before anything has been learned.
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)
        # Buffers: they are saved with the weights that were trained on latents in these units.
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("std", torch.ones(d))

    @torch.no_grad()
    def fit(self, z: Tensor) -> "DensityRatio":
        """Take mean and std of human latents z [N, d]. -> self

        A feature that is the same in all texts is only centred.
        """
        self.mean.copy_(z.mean(0))
        std = z.std(0, correction=0)
        self.std.copy_(torch.where(std > 0, std, 1.0))
        return self

    def forward(self, z: Tensor) -> Tensor:
        standardised = (z - self.mean) / self.std  # [B, d]
        units = torch.tanh(self.hidden(standardised))  # [B, H]
        return self.logit(units)[:, 0]


def density_loss(policy: Tensor, human: Tensor) -> Tensor:
    """The logistic loss of the density ratio's logits, each class weighing a half.

        loss = 1/2 mean softplus(-logit_policy) + 1/2 mean softplus(logit_human)

    policy [B]: logits of policy latents (class 1); human [B']: of human ones (class 0) -> a scalar;
    log 2 where nothing tells them apart.
    """
    # Two means, not one over all rows: else the logit would also hold log(B / B'), which is about
    # how many rows there are and not about the latents.
    return (F.softplus(-policy).mean() + F.softplus(human).mean()) / 2

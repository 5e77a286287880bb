"""Feature penalties: what a text's latents take from its reward, and edits of the latents themselves.

    B texts, M latents, F chosen features, d latents whose density is estimated, H hidden units
    z is what a sparse autoencoder makes of the hidden state at a text's pooled (last real) token

    R = score(clamp(z)) - sum_i penalty_i(z_i) - beta log p_policy(z) / p_human(z)
"""

import torch
import torch.nn.functional as F
from torch import nn

OPS = ("set", "min", "max", "*", "+")
PENALTIES = ("indicator", "hinge")


def edit_latents(z, edits):
    """z [.., F] and one (op, value) for each of its F columns -> z' [.., F], a new tensor.

        set: z' = v     min: z' = max(z, v), a floor     max: z' = min(z, v), a cap     *: z' = v z     +: z' = z + v

    `min` and `max` are torch.clamp's. ValueError: another number of edits than columns, an unknown op. Pitfall: a latent that does not
    fire is 0, so `set` and `+`, a floor above 0 and a cap below 0 change every text.
    """
    if len(edits) != z.shape[-1]:
        raise ValueError(f"{len(edits)} edits for {z.shape[-1]} features")
    columns = []
    for (op, v), x in zip(edits, z.unbind(-1)):
        if op not in OPS:
            raise ValueError(f"edit {op!r} is not one of {', '.join(OPS)}")
        new = {"set": torch.full_like(x, v), "min": x.clamp(min=v), "max": x.clamp(max=v), "*": x * v, "+": x + v}[op]
        columns.append(new)
    return torch.stack(columns, -1) if columns else z.clone()


def feature_penalty(latents, features, tau, alpha, kind="indicator"):
    """What its features cost a text.

        indicator   sum_i alpha_i 1[z_i > tau_i]
        hinge       sum_i alpha_i max(0, z_i - tau_i)

    latents [B, M]; features, tau, alpha: lists of one length, the columns, their thresholds in units of z and their prices in units of
    the reward -> [B]. ValueError: lists of unequal length, a column that is not there, an unknown kind. Pitfall: the price of the
    indicator is the same far above tau as just above it, so it does not pull a strong feature down bit by bit; the hinge does.
    """
    if not len(features) == len(tau) == len(alpha):
        raise ValueError(f"{len(features)} features, {len(tau)} tau and {len(alpha)} alpha: there must be one of each for a feature")
    if kind not in PENALTIES:
        raise ValueError(f"the penalty must be one of {', '.join(PENALTIES)}, not {kind!r}")
    unknown = [i for i in features if not 0 <= i < latents.shape[-1]]
    if unknown:
        raise ValueError(f"feature {unknown[0]} is not one of the {latents.shape[-1]} latents")
    z = latents[..., list(features)]  # [B, F]
    tau, alpha = (torch.tensor([float(x) for x in values], dtype=z.dtype, device=z.device) for values in (tau, alpha))  # [F], [F]
    excess = (z > tau).to(z.dtype) if kind == "indicator" else (z - tau).relu()
    return (alpha * excess).sum(-1)


class DensityRatio(nn.Module):
    """log p_policy(z) / p_human(z) by a classifier that tells policy (1) from human latents (0): its logit (Sugiyama et al. 2012, ch. 4).

        logit(z) = w . tanh(W (z - mean) / std + b) + c

    The logit is the log ratio where both classes weigh the same in the loss, as in density_loss. Latents are standardised by those that
    `fit` is shown, of people. Before any training the logit is 0. z [B, d] -> [B]. ValueError: no latents. Pitfall: it extrapolates
    where neither class has been seen, and two densities that do not overlap have no finite ratio: clip it.
    """

    HIDDEN = 256

    def __init__(self, d, seed=0):
        super().__init__()
        if d < 1:
            raise ValueError("a density ratio needs at least one latent")
        self.d, generator = d, torch.Generator().manual_seed(seed)
        self.hidden, self.logit = nn.Linear(d, self.HIDDEN), nn.Linear(self.HIDDEN, 1)
        nn.init.normal_(self.hidden.weight, 0, d**-0.5, generator=generator)  # W x has variance 1 for people's x,
        nn.init.normal_(self.hidden.bias, 0, 1, generator=generator)  # and the units bend where people's latents are
        for p in self.logit.parameters():
            nn.init.zeros_(p)
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("std", torch.ones(d))

    @torch.no_grad()
    def fit(self, z):
        """Take mean and std of human latents z [N, d]; a latent that is the same in all texts is only centred. -> self"""
        self.mean.copy_(z.mean(0))
        std = z.std(0, correction=0)
        self.std.copy_(torch.where(std > 0, std, 1.0))
        return self

    def forward(self, z):
        return self.logit(torch.tanh(self.hidden((z - self.mean) / self.std)))[:, 0]


def density_loss(policy, human):
    """The logistic loss of logits of policy latents (class 1) and of human ones (class 0), each class weighing a half.

        loss = 1/2 mean softplus(-logit_policy) + 1/2 mean softplus(logit_human)

    policy [B], human [B'] -> a scalar; log 2 where nothing tells them apart.
    """
    return (F.softplus(-policy).mean() + F.softplus(human).mean()) / 2

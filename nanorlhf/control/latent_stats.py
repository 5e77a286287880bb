"""Which latents tell chosen answers from rejected ones, what that is worth to the reward, and which tokens they follow.

    N pairs of answers, M latents, G groups of pairs (those of one prompt), R resamples, C tokens whose presence is looked at

z [N, M] are the latents of whole texts, read at the pooled (last real) token; the score of a SARM is w . z. A latent fires where it is
not 0: without a ReLU it may fire below 0, and the two measures of Zhang et al. 2025 (2508.08746) take max(z, 0).

"Chosen" and "rejected" may be any two sets of answers, row by row to the same prompts: a policy's after and before training, too.
"""

from typing import NamedTuple

import torch

from ..interp.concepts import feature_aucs, sparse
from ..stats import percentiles

AT_ONCE = 2**22  # elements of one [R, latents] block of resampled means


class Contrast(NamedTuple):
    """What `contrast` finds, for each latent; float64. Without head weights there is no contribution."""

    rate_chosen: torch.Tensor  # [M], share of the texts on which it fires
    rate_rejected: torch.Tensor  # [M]
    chosen: torch.Tensor  # [M], c
    rejected: torch.Tensor  # [M], j
    differential: torch.Tensor  # [M], s
    differential_interval: torch.Tensor  # [2, M], low and high
    contribution: torch.Tensor | None  # [M]
    contribution_interval: torch.Tensor | None  # [2, M]


def contrast(chosen, rejected, weights=None, groups=None, m=None, resamples=1000, level=0.95, seed=0):
    """How chosen answers differ from rejected ones in each latent, with bootstrap intervals over groups of pairs.

        c_i, j_i = mean over the chosen, over the rejected of max(z_i, 0)
        s_i = (c_i - j_i) / (c_i + j_i + mean_i(c + j))          differential, in (-1, 1); the last term damps latents that hardly fire
        w_i (c_i - j_i)                                          contribution to the margin, in units of the score

    chosen, rejected [N, M]; weights [M], the head's; groups [N], labels of pairs that are not independent (default: each on its own);
    m: how many latents there are, where those that never fire were left out -> Contrast. ValueError: shapes that do not fit, no pairs.
    Pitfall: what a latent below 0 adds to a score is in neither measure.
    """
    if chosen.shape != rejected.shape or chosen.ndim != 2 or not len(chosen):
        raise ValueError(f"chosen and rejected must both be [pairs, latents], not {list(chosen.shape)} and {list(rejected.shape)}")
    if weights is not None and weights.shape != chosen.shape[1:]:
        raise ValueError(f"{len(weights)} weights for {chosen.shape[1]} latents")
    times = times_drawn(torch.arange(len(chosen)) if groups is None else groups, resamples, seed)  # [R, N]
    if times.shape[1] != len(chosen):
        raise ValueError(f"{times.shape[1]} groups for {len(chosen)} pairs")
    rates = [(z != 0).double().mean(0) for z in (chosen, rejected)]
    # Over all latents, in the sample and in each resample: a block of latents alone would not know it.
    per_pair = (chosen.clamp(min=0) + rejected.clamp(min=0)).sum(1, keepdim=True).double() / (m or chosen.shape[1])  # [N, 1]
    damping, damping_drawn = per_pair.mean(0), drawn_means(times, per_pair)  # [1], [R, 1]

    parts = []
    size = max(1, AT_ONCE // resamples)
    for columns in torch.arange(chosen.shape[1]).split(size):
        x, y = (z[:, columns].clamp(min=0).double() for z in (chosen, rejected))  # [N, m]
        c, j = x.mean(0), y.mean(0)  # [m]
        c_drawn, j_drawn = drawn_means(times, x), drawn_means(times, y)  # [R, m]
        s_drawn = differential(c_drawn, j_drawn, damping_drawn)
        part = [c, j, differential(c, j, damping), torch.stack(percentiles(s_drawn, level))]
        if weights is not None:
            w = weights[columns].double()
            part += [w * (c - j), torch.stack(percentiles(w * (c_drawn - j_drawn), level))]
        parts.append(part)
    found = [torch.cat(column, -1) for column in zip(*parts)]
    return Contrast(*rates, *found, *([None, None] if weights is None else []))


def differential(c, j, damping):
    """s of `contrast`; 0 where no latent at all fires."""
    total = c + j + damping
    return torch.where(total > 0, (c - j) / total.clamp(min=1e-300), 0.0)


# ----------------------------------------------------------------------------------------------------------- intervals over groups


def times_drawn(groups, resamples, seed):
    """How often each row counts in each resample: [R, N]. A resample draws G of the G groups with replacement, with all their rows."""
    members = groups.unique(return_inverse=True)[1]  # [N]
    n = int(members.max()) + 1
    rows = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))  # [R, G]
    times = torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, rows, torch.ones(resamples, n, dtype=torch.float64))
    return times[:, members]


def drawn_means(times, values):
    """The mean of values [N, m] in each resample, [R, m]; no [R, N, m] tensor is ever held."""
    return times @ values / times.sum(1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------- what they follow


def separation(parts):
    """How well a token's presence in a text goes with a latent being large there: AUC of the latent for "the text has the token".

        AUC = P(z of a text with it > z of one without it), ties half, over pairs of texts of the same part

    parts: [(z [N, M], present [N, C] bool), ...], one a set of texts -> AUC [M, C], float64; nan for a token that no part holds in some
    texts and lacks in others. Texts are compared within their part only: between a policy's answers before and after training all that
    has changed goes together, and a latent would be taken for whatever else has changed.
    """
    wins, pairs = 0.0, 0.0
    for z, present in parts:
        n1 = present.double().sum(0)  # [C]
        compared = n1 * (len(present) - n1)
        wins = wins + torch.where(compared > 0, feature_aucs(sparse(z), present) * compared, 0.0)
        pairs = pairs + compared
    return wins / pairs


def score_gaps(parts):
    """How much higher texts score on which a latent fires than the others of the same part: [M], float64; nan where there are no others.

        gap_i = sum_p v_p (mean score where z_i != 0 - mean where z_i = 0) / sum_p v_p,   v_p = n1 n0 / (n1 + n0)

    parts: [(z [N, M], scores [N]), ...] as in `separation`: least squares of the score on firing, with an intercept for each part.
    Pitfall: it is no effect. Beside the head weight it shows what w_i alone does not: latents that fire together share their reward.
    """
    total, weight = 0.0, 0.0
    for z, scores in parts:
        fires, scores = (z != 0).double(), scores.double()
        n1 = fires.sum(0)  # [M]
        n0 = len(fires) - n1
        gap = scores @ fires / n1 - scores @ (1 - fires) / n0
        v = n1 * n0 / len(fires)
        total, weight = total + torch.where(v > 0, v * gap, 0.0), weight + v
    return total / weight

"""Which features tell chosen answers from rejected ones, what that is worth to the reward, and
which tokens they follow.

    N pairs of answers or texts, M features, b of them in a block, G groups of pairs (those of one
    prompt), R resamples, C tokens whose presence is looked at

z [N, M] are the latents of whole texts, read at the pooled (last real) token; the score of a SARM
is w . z. A feature fires where it is not 0: without a ReLU it may fire below 0. The two measures of
Zhang et al. 2025 (2508.08746) take max(z, 0).

"Chosen" and "rejected" may be any two sets of answers, row by row to the same prompts: also those
of a policy after and before training.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..interp.feature_scores import feature_aucs, sparse
from ..stats import mean_over_groups, percentiles

# The features are taken in blocks whose resampled means [R, block] have this many elements at most.
AT_ONCE = 2**22


class Contrast(NamedTuple):
    """What `contrast` finds for each feature; float64. An interval holds low and high."""

    rate_chosen: Tensor  # [M]: share of the chosen texts on which the feature fires
    rate_rejected: Tensor  # [M]
    chosen: Tensor  # [M]: c
    rejected: Tensor  # [M]: j
    differential: Tensor  # [M]: s
    differential_interval: Tensor  # [2, M]
    contribution: Tensor | None = None  # [M]; None without the head's weights
    contribution_interval: Tensor | None = None  # [2, M]


def contrast(
    chosen: Tensor,
    rejected: Tensor,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
    m: int | None = None,
    resamples: int = 1000,
) -> Contrast:
    """How chosen answers differ from rejected ones in each feature, with 95% bootstrap intervals
    over groups of pairs.

        c_i, j_i = mean over the chosen, over the rejected of max(z_i, 0)
        s_i      = (c_i - j_i) / (c_i + j_i + mean_i(c + j))        the differential, in (-1, 1)
        w_i (c_i - j_i)                                             the contribution to the margin

    The last term of the denominator damps features that hardly fire. A contribution is in units of
    the score.

    chosen, rejected [N, M]; weights [M] of the head; groups [N], labels of pairs that are not
    independent (default: each pair on its own); m: how many features there are, where those that
    never fire were left out -> Contrast. ValueError: no pairs, or another number of groups.
    Pitfall: neither measure holds what a feature below 0 adds to a score.
    """
    # The damping is a mean over all features, so it is made before they are taken in blocks: in the
    # sample, and in each resample.
    n_features = m or chosen.shape[1]
    positive = chosen.clamp(min=0) + rejected.clamp(min=0)  # [N, M]
    # mean_i(c + j) of the equation is a mean over pairs too, so it is resampled with them.
    per_pair = positive.sum(1, keepdim=True).double() / n_features  # [N, 1]
    damping, damping_drawn = mean_over_groups(per_pair, groups, resamples)  # [1], [R, 1]

    # Features are taken in blocks: the resampled means of all, [R, M], may not fit into memory.
    blocks = {}  # {a field of Contrast: its blocks}
    for columns in torch.arange(chosen.shape[1]).split(max(1, AT_ONCE // resamples)):
        # All blocks are drawn from the same groups: the seed is the same each time.
        x = chosen[:, columns].clamp(min=0)  # [N, b]
        y = rejected[:, columns].clamp(min=0)  # [N, b]
        c, c_drawn = mean_over_groups(x, groups, resamples)  # [b], [R, b]
        j, j_drawn = mean_over_groups(y, groups, resamples)  # [b], [R, b]
        # The measure is computed anew in each resample, from a c and a j of the same pairs: the two
        # answers of a pair are not independent.
        s_drawn = differential(c_drawn, j_drawn, damping_drawn)
        fields = {
            "chosen": c,
            "rejected": j,
            "differential": differential(c, j, damping),
            "differential_interval": percentiles(s_drawn),
        }
        if weights is not None:
            w = weights[columns].double()
            fields["contribution"] = w * (c - j)
            fields["contribution_interval"] = percentiles(w * (c_drawn - j_drawn))
        for name, values in fields.items():
            blocks.setdefault(name, []).append(values)

    whole = {name: torch.cat(parts, -1) for name, parts in blocks.items()}
    # A feature below 0 counts as firing here, although both measures take it for 0.
    rate_chosen = (chosen != 0).double().mean(0)  # [M]
    rate_rejected = (rejected != 0).double().mean(0)  # [M]
    return Contrast(rate_chosen, rate_rejected, **whole)


def differential(c: Tensor, j: Tensor, damping: Tensor) -> Tensor:
    """s of contrast(), of any shape; 0 where no feature at all fires."""
    # c, j and damping are at least 0, so the sum is 0 only where all of them are.
    total = c + j + damping
    s = (c - j) / total.clamp(min=1e-300)
    return torch.where(total > 0, s, 0.0)


# --------------------------------------------------------------------------------- what they follow


def separation(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """How well a token's presence in a text goes with a feature being large there: the AUC of the
    feature for "the text has the token".

        AUC = P(z of a text with the token > z of a text without it), ties counting half

    The pairs are of texts of the same part. parts: [(z [N, M], present [N, C] bool), ...], each a
    set of texts -> AUC [M, C], float64; nan for a token that no part holds in some texts and lacks
    in others.
    Why only within a part: between a policy's answers before and after training, all that has
    changed goes together. A feature would be taken for whatever else has changed.
    """
    # Each part's AUC is weighted by the number of pairs of texts that it compares. The mean is the
    # AUC over the pairs of all parts.
    wins = 0.0
    pairs = 0.0
    for z, present in parts:
        n1 = present.double().sum(0)  # [C]
        n0 = len(present) - n1
        n_pairs = n1 * n0
        auc = feature_aucs(sparse(z), present)  # [M, C]
        # A part without pairs has the AUC nan, and 0 times nan would be nan.
        wins = wins + torch.where(n_pairs > 0, auc * n_pairs, 0.0)
        pairs = pairs + n_pairs
    return wins / pairs


def score_gaps(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """How much higher texts score on which a feature fires than the other texts of the same part.

        gap_i = sum_p v_p (mean score where z_i != 0 - mean where z_i = 0) / sum_p v_p
        v_p   = n1 n0 / (n1 + n0)

    This is least squares of the score on firing, with an intercept for each part. parts:
    [(z [N, M], scores [N]), ...] as in separation() -> [M], float64; nan where there are no others.
    Pitfall: it is no effect. It stands beside the head's weight since it shows what w_i alone does
    not: features that fire together share their reward.
    """
    # One side may score higher as a whole, as answers after training do. Texts are therefore
    # compared within their part.
    total = 0.0
    weight = 0.0
    for z, scores in parts:
        fires = (z != 0).double()  # [N, M]
        scores = scores.double()
        n1 = fires.sum(0)  # [M]
        n0 = len(fires) - n1
        # Where no text, or every text, has the feature, one of the means is nan. Its weight v is
        # then 0, and it is left out.
        gap = scores @ fires / n1 - scores @ (1 - fires) / n0
        v = n1 * n0 / len(fires)
        total = total + torch.where(v > 0, v * gap, 0.0)
        weight = weight + v
    return total / weight

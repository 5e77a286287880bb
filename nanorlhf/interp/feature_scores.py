"""How well the features of a sparse autoencoder single out known concepts: AUC and correlation of
all pairs at once.

    N tokens, D hidden, M features, C concepts, n activations that are not 0

The activations of features are one sparse matrix [M, N]. So a pair of a feature and a concept costs
as much as the tokens on which the feature fires.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import require

# A random feature is drawn from this many features that are most like the chosen one.
NEAREST = 10
AT_ONCE = 4096  # tokens whose features are held dense


# ------------------------------------------------------------------- features as a sparse matrix


def encoded(sae, x: Tensor) -> Tensor:
    """Activations [N, D] -> features, a sparse [M, N]. Only AT_ONCE tokens are held dense."""
    parts = []
    for part in x.split(AT_ONCE):
        features = sae.encode(part)  # [AT_ONCE, M]
        parts.append(sparse(features.float()))
    return torch.cat(parts, 1).coalesce()


def sparse(x: Tensor) -> Tensor:
    """Features [N, M] -> a sparse [M, N], its entries sorted by feature."""
    return x.detach().T.to_sparse().coalesce()


def matrix_of(feature: Tensor, token: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The places and the values of n entries, [n] each -> a sparse [M, N]."""
    places = torch.stack([feature, token])  # [2, n]
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=False)


def on_tokens(f: Tensor, mask: Tensor) -> Tensor:
    """The columns of a sparse [M, N] that a mask [N] names: a sparse [M, sum of the mask]."""
    feature, token = f.indices()
    new_column = mask.cumsum(0) - 1  # [N]: where a column that is kept will stand
    is_kept = mask[token]  # [n]
    part = matrix_of(
        feature[is_kept],
        new_column[token[is_kept]],
        f.values()[is_kept],
        (f.shape[0], int(mask.sum())),
    )
    return part.coalesce()


def sum_over_tokens(f: Tensor) -> Tensor:
    """The sums of the rows of a sparse [M, N]: [M]."""
    ones = torch.ones(f.shape[1], 1, device=f.device)
    return (f @ ones)[:, 0]


# ---------------------------------------------------------------------------------------- scores


def feature_aucs(f: Tensor, labels: Tensor) -> Tensor:
    """How often a token of the concept has a larger activation than a token that is not of it, ties
    counting half: Mann and Whitney's U.

        AUC = (sum over the concept's tokens of rank - n1 (n1 + 1) / 2) / (n1 n0)

    Ranks go from 1 to N and are mean ranks for ties; the concept has n1 tokens, the others are n0.
    f: a sparse [M, N]; labels [N, C] of 0 and 1 -> [M, C], float64. It is nan for a concept of no
    token or of all, and 0.5 for a feature that never fires.
    Pitfall: the largest of M is above 0.5 by chance alone. Choose a feature on some tokens, and
    measure it on others.
    """
    M, N = f.shape
    y = labels.double()  # [N, C]
    feature, token, value = sort_entries(f)  # [n] each
    place = mean_places(feature, value)  # [n]: rank among the feature's activations that are not 0

    # All tokens on which a feature is silent tie at 0. In the ranking of all N tokens they stand
    # behind the feature's negative values and before its positive ones.
    n_silent = N - feature.bincount(minlength=M)  # [M]
    n_negative = feature[value < 0].bincount(minlength=M)  # [M]
    rank = place.double() + torch.where(value > 0, n_silent[feature], 0)  # [n]
    rank_silent = n_negative + (n_silent + 1) / 2  # [M]

    # The sum of ranks over a concept's tokens: those on which the feature fires, and the others.
    n1 = y.sum(0)  # [C]
    n0 = N - n1
    n1_fired = matrix_of(feature, token, torch.ones_like(rank), (M, N)) @ y  # [M, C]
    ranks_fired = matrix_of(feature, token, rank, (M, N)) @ y
    ranks = ranks_fired + rank_silent[:, None] * (n1 - n1_fired)
    return (ranks - n1 * (n1 + 1) / 2) / (n1 * n0)


def sort_entries(f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of a sparse [M, N], by feature and then by value: feature, token, value [n]."""
    feature, token = f.indices()
    # The second sort is stable, so that values stay sorted within each feature.
    by_value = f.values().argsort(stable=True)
    by_feature = feature[by_value].argsort(stable=True)
    order = by_value[by_feature]
    return feature[order], token[order], f.values()[order]


def mean_places(feature: Tensor, value: Tensor) -> Tensor:
    """The place of each value among those of its feature, from 1 on; tied values share their mean.

    feature, value [n], sorted -> [n]
    """
    # Equal values of one feature are a group.
    begins = torch.ones_like(feature, dtype=torch.bool)
    begins[1:] = (value[1:] != value[:-1]) | (feature[1:] != feature[:-1])
    group = begins.cumsum(0) - 1  # [n]
    size = group.bincount()
    # Places among the values of all features, less the number of values of earlier features.
    n_before_group = size.cumsum(0) - size
    mean_place = n_before_group + (size + 1) / 2
    n_values = feature.bincount()
    n_before_feature = n_values.cumsum(0) - n_values
    return mean_place[group] - n_before_feature[feature]


def feature_correlations(f: Tensor, labels: Tensor) -> Tensor:
    """Pearson's correlation of all pairs of a feature and a concept.

    f: a sparse [M, N]; labels [N, C] -> [M, C], float64; 0 where one of the two is constant.
    """
    f = f.double()
    y = labels.double()  # [N, C]
    N = f.shape[1]
    # A covariance is the mean of the product less the product of the means. To centre the features
    # instead would fill the sparse matrix.
    ones = torch.ones(N, 1, dtype=torch.float64, device=y.device)
    mean_f = f @ ones / N  # [M, 1]
    mean_y = y.mean(0)  # [C]
    covariance = f @ y / N - mean_f * mean_y  # [M, C]
    variance_f = (f * f) @ ones / N - mean_f.square()  # [M, 1]
    variance_y = y.square().mean(0) - mean_y.square()  # [C]
    variances = variance_f * variance_y  # [M, C]
    # A product that is tiny is the rounding of 0: such a pair gets covariance / inf = 0.
    variances = torch.where(variances > 1e-24, variances, torch.inf)
    return covariance / variances.sqrt()


# --------------------------------------------------------------------------------------- choices


def best_features(chosen_on: Tensor, measured_on: Tensor) -> tuple[Tensor, Tensor]:
    """The best feature of each concept by some scores, and its score among others.

    chosen_on, measured_on [M, C] -> ids [C], scores [C]
    """
    ids = chosen_on.argmax(0)
    scores = measured_on.gather(0, ids[None])[0]
    return ids, scores


def alike(
    sizes: Tensor, ids: Sequence[int], rng: np.random.Generator, but: Sequence[int] = ()
) -> list[int]:
    """Draw another feature for each of the features `ids`, one that is about as large.

    It is one of the NEAREST by the ratio of sizes [M], and no feature is drawn twice. `but`:
    features that are not taken either, such as those of earlier draws; where too few would be left,
    they may be taken again. InputError: fewer features than twice those of `ids`.
    """
    require(
        len(sizes) >= 2 * len(ids),
        f"{len(ids)} of {len(sizes)} features leave too few others to compare them with",
    )
    taken = list(ids)
    if len(sizes) >= 2 * len(ids) + len(but):
        taken.extend(but)

    # Equal differences of logarithms are equal ratios of sizes. The floor makes all features of
    # size 0 alike.
    logs = sizes.clamp(min=1e-9).log()  # [M]
    drawn = []
    for i in ids:
        distance = (logs - logs[i]).abs()  # [M]
        distance[taken] = torch.inf
        n_near = min(NEAREST, len(sizes) - len(taken))
        near = distance.topk(n_near, largest=False).indices.tolist()
        other = near[rng.integers(n_near)]
        taken.append(other)
        drawn.append(other)
    return drawn

"""How well the features of a sparse autoencoder single out known concepts: AUC and correlation of all pairs at once.

    N tokens, M features, C concepts, n activations that are not 0

Features come as one sparse matrix [M, N], so a pair of a feature and a concept costs the tokens on which the feature fires.
"""

import torch

from ..errors import require


def sparse(x):
    """Activations [N, M] -> a sparse [M, N]; sorted by feature."""
    return x.detach().T.to_sparse().coalesce()


def coo(feature, token, values, shape):
    """A sparse [M, N] by its entries."""
    return torch.sparse_coo_tensor(torch.stack([feature, token]), values, shape, check_invariants=False)


def on_tokens(f, tokens):
    """The columns of a sparse [M, N] that a mask [N] names: [M, sum of the mask]."""
    (feature, token), new = f.indices(), tokens.cumsum(0) - 1
    kept = tokens[token]
    return coo(feature[kept], new[token[kept]], f.values()[kept], (f.shape[0], int(tokens.sum()))).coalesce()


def feature_aucs(f, labels):
    """How often a token of the concept has a larger activation than one that is not of it, ties counting half: Mann and Whitney's U.

        AUC = (sum over the concept's tokens of rank - n1 (n1 + 1) / 2) / (n1 n0)          ranks 1 .. N, the mean rank for ties

    f sparse [M, N], labels [N, C] of 0 and 1 -> [M, C], float64; nan for a concept of no token or of all. A feature that never fires
    has 0.5. Pitfall: the largest of M is above 0.5 by chance alone: choose a feature on some tokens, and measure it on others.
    """
    (m, n), y = f.shape, labels.double()
    feature, token = f.indices()
    order = f.values().argsort(stable=True)
    order = order[feature[order].argsort(stable=True)]  # by feature, then by value
    feature, token, value = feature[order], token[order], f.values()[order]

    # Mean place of each value among its feature's nonzero ones, 1 .. : tied values share a group.
    begins = torch.ones_like(feature, dtype=torch.bool)
    begins[1:] = (value[1:] != value[:-1]) | (feature[1:] != feature[:-1])
    group = begins.cumsum(0) - 1
    size = group.bincount()
    fired = feature.bincount(minlength=m)
    place = ((size.cumsum(0) - size) + (size + 1) / 2)[group] - (fired.cumsum(0) - fired)[feature]

    # All tokens on which a feature is silent tie at 0: after its negative values, before its positive ones.
    silent, negative = n - fired, feature[value < 0].bincount(minlength=m)
    rank = place.double() + torch.where(value > 0, silent[feature], 0)  # [n]
    rank_silent = negative + (silent + 1) / 2  # [M]
    n1 = y.sum(0)  # [C]
    hits = coo(feature, token, torch.ones_like(rank), (m, n)) @ y  # [M, C]: the concept's tokens on which it fires
    ranks = coo(feature, token, rank, (m, n)) @ y + rank_silent[:, None] * (n1 - hits)
    return (ranks - n1 * (n1 + 1) / 2) / (n1 * (n - n1))


def feature_correlations(f, labels):
    """Pearson's correlation of all pairs: f sparse [M, N], labels [N, C] -> [M, C], float64; 0 where one of the two is constant."""
    f, y, n = f.double(), labels.double(), f.shape[1]
    ones = torch.ones(n, 1, dtype=torch.float64, device=y.device)
    mean_f, mean_y = f @ ones / n, y.mean(0)  # [M, 1], [C]
    covariance = f @ y / n - mean_f * mean_y  # [M, C]
    variances = ((f * f) @ ones / n - mean_f.square()) * (y.square().mean(0) - mean_y.square())  # [M, C]
    return covariance / torch.where(variances > 1e-24, variances, torch.inf).sqrt()


def best_features(chosen_on, measured_on):
    """The best feature of each concept by scores [M, C], and its score among others [M, C] -> ids [C], scores [C]."""
    ids = chosen_on.argmax(0)
    return ids, measured_on.gather(0, ids[None])[0]


NEAREST = 10  # a random feature is one of so many that are most like the chosen one


def alike(sizes, ids, rng, but=()):
    """For each of the features `ids` another one that is about as large: one of the NEAREST, by the ratio of sizes [M]. -> ids

    but: features that are not taken either, such as those of earlier draws, while there are others.
    """
    require(len(sizes) >= 2 * len(ids), f"{len(ids)} of {len(sizes)} features leave too few others to compare them with")
    logs, taken = sizes.clamp(min=1e-9).log(), [*ids, *(but if len(sizes) >= 2 * len(ids) + len(but) else ())]
    first = len(taken)
    for i in ids:
        distance = (logs - logs[i]).abs()
        distance[taken] = torch.inf
        near = distance.topk(min(NEAREST, len(sizes) - len(taken)), largest=False).indices.tolist()
        taken.append(near[rng.integers(len(near))])
    return taken[first:]


def encoded(sae, x, at_once=4096):
    """Activations [N, D] -> features, a sparse [M, N]."""
    return torch.cat([sparse(sae.encode(part).float()) for part in x.split(at_once)], 1).coalesce()

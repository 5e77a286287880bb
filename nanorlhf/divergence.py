"""How far a fine-tuned model has moved from its base, block by block, and how alike two sets of features are.

    L blocks, N tokens, D hidden, M features of a sparse autoencoder (Ma of A, Mb of B)

Sources: Marks et al. 2023 (Interpreting Learned Feedback Patterns, arXiv 2310.08164): layer divergence and MMCS; Sharkey et al. 2022
(Taking features out of superposition with sparse autoencoders): MMCS; Crouse 2016 (On implementing 2D rectangular assignment
algorithms, IEEE TAES 52(4)): shortest augmenting paths.
"""

import numpy as np
import torch
from torch import nn

MAX_ONE_TO_ONE = 2048  # features: an assignment takes up to M^3 steps
KINDS = ("frobenius", "relative")


# ------------------------------------------------------------------------------------------------------------------------- weights


def blocks_of(model):
    """A list of blocks as it is; of a model the ModuleList that holds most of its parameters, whatever its architecture calls it."""
    if isinstance(model, (nn.ModuleList, list, tuple)):
        return list(model)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__}: found no list of blocks in it")
    return list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters())))  # the outermost of equals


def parameters_of(block):
    """{name: tensor} of a block; a dict is taken as it is."""
    return block if isinstance(block, dict) else dict(block.named_parameters())


@torch.no_grad()
def parameter_divergence(base, policy):
    """What layer_divergence() adds up: for each block {parameter: {"frobenius": ||p_base - p_policy||_F, "base": ||p_base||_F}}.

    base, policy: models, or lists of L blocks, a block being a module or a dict of tensors -> L dicts, floats computed in float64.
    ValueError: other numbers of blocks, other parameters, other shapes.
    """
    base, policy = blocks_of(base), blocks_of(policy)
    if len(base) != len(policy):
        raise ValueError(f"the two models have {len(base)} and {len(policy)} blocks: they must be one architecture")
    table = []
    for layer, (a, b) in enumerate(zip(map(parameters_of, base), map(parameters_of, policy))):
        if a.keys() != b.keys():
            other = sorted(a.keys() ^ b.keys())[0]
            raise ValueError(f"block {layer}: only one of the models has {other} (adapters must be merged first)")
        row = {}
        for name in a:
            if a[name].shape != b[name].shape:
                raise ValueError(f"block {layer}, {name}: the shapes {list(a[name].shape)} and {list(b[name].shape)} differ")
            p, q = a[name].double(), b[name].to(a[name].device).double()
            row[name] = {"frobenius": (p - q).norm().item(), "base": p.norm().item()}
        table.append(row)
    return table


def layer_divergence(base, policy, kind="frobenius"):
    """How far each block's weights have moved.

        frobenius   D_l = sum_p ||p_base - p_policy||_F                  p: the parameters of block l        (Marks et al. 2023)
        relative    D_l = sum_p ||p_base - p_policy||_F / ||p_base||_F   0 where nothing moved; infinite where a zero did

    base, policy: models, or lists of L blocks (modules, or dicts of tensors), LoRA merged -> L floats. ValueError: as
    parameter_divergence(), or an unknown kind. Pitfalls: a sum over parameters is compared between blocks of one model only; by
    `frobenius` large matrices weigh more, by `relative` small vectors, such as biases, may weigh most. Adam moves every weight about lr
    a step: after few steps D_l is near lr * steps * sum_p sqrt(size of p) in every block, and says little about what was learned.
    """
    return add_up(parameter_divergence(base, policy), kind)


def add_up(table, kind="frobenius"):
    """A parameter_divergence() -> L floats: see layer_divergence."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    return [sum(relative(p) if kind == "relative" else p["frobenius"] for p in row.values()) for row in table]


def relative(p):
    """||p_base - p_policy||_F / ||p_base||_F of one parameter of a parameter_divergence()."""
    if p["frobenius"] == 0:
        return 0.0
    return p["frobenius"] / p["base"] if p["base"] else float("inf")


def select_layers(divergences, choice="highest:5"):
    """The layers to look at: the k that moved most, the k lowest in the model, or named ones.

    divergences: L floats; choice: "highest:k", "lowest:k" (the layers 0 .. k - 1) or "1,3" -> layer numbers, ascending; all L where k is
    more. ValueError: a choice that is none of these, no such layer.
    """
    L, (word, _, number) = len(divergences), choice.partition(":")
    if word in ("highest", "lowest") and number.isdecimal() and int(number):
        order = sorted(range(L), key=lambda layer: -divergences[layer]) if word == "highest" else range(L)
        return sorted(order[: int(number)])
    names = [name.strip() for name in choice.split(",")]
    if not all(name.isdecimal() for name in names):
        raise ValueError(f"layers {choice!r}: it must be highest:K, lowest:K, or numbers such as 1,3")
    layers = sorted({int(name) for name in names})
    if layers[-1] >= L:
        raise ValueError(f"layers {choice!r}: the model has the layers 0 to {L - 1}")
    return layers


# --------------------------------------------------------------------------------------------------------------------- activations


def activation_divergence(x, y):
    """How far a layer's output has moved, on the same N tokens: x of the base, y of the policy, both [N, D].

        cosine   mean_t (1 - x_t . y_t / (||x_t|| ||y_t||))
        squared  mean_t ||x_t - y_t||^2 / V        V = mean_t ||x_t - mean(x)||^2, the variance of the base

    -> {"cosine", "squared"}, floats; squared is 1 where the policy is as far off as the base's mean is, on average. Two zero vectors
    count as equal, one as orthogonal. ValueError: shapes that differ, no tokens, a base that does not vary. Pitfall: a few dimensions
    or tokens of huge norm (the first token of a text) can be nearly all of the variance.
    """
    return from_sums(divergence_sums(x, y))


def divergence_sums(x, y):
    """What activation_divergence() needs to know of these tokens, float64 [4 + D]: sums over parts of the tokens simply add up.

    N, sum_t (1 - cos_t), sum_t ||x_t - y_t||^2, sum_t ||x_t||^2, sum_t x_t
    """
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(f"activations must both be [tokens, D] of the same tokens, not {list(x.shape)} and {list(y.shape)}")
    x, y = x.detach().double(), y.detach().double()
    norms = x.norm(dim=1) * y.norm(dim=1)  # [N]
    cosines = torch.where(norms > 0, (x * y).sum(1) / norms, (x == y).all(1).double())
    numbers = [norms.new_tensor(len(x)), (1 - cosines).sum(), (x - y).square().sum(), x.square().sum()]
    return torch.cat([torch.stack(numbers), x.sum(0)])


def from_sums(sums):
    """divergence_sums() of all tokens -> activation_divergence() of them."""
    n, turned, moved, squares = sums[:4].tolist()
    variance = squares - (sums[4:].square().sum() / max(n, 1)).item()  # times N
    if variance <= 1e-12 * squares:
        raise ValueError(f"the base's activations of {n:.0f} tokens do not vary: there is no scale to measure a distance by")
    return {"cosine": turned / n, "squared": moved / variance}


# ------------------------------------------------------------------------------------------------------------------------ features


def mmcs(a, b, one_to_one=False):
    """Mean max cosine similarity: how much of each of A's features is found among B's.

        MMCS(A, B) = 1 / Ma  sum_i max_j cos(a_i, b_j)

    With `one_to_one` each feature of B serves one of A at most, by the assignment with the largest sum, and the mean is over its
    min(Ma, Mb) pairs. a [Ma, D], b [Mb, D]: features in rows, of any length -> float in [-1, 1]. ValueError: other shapes, numbers that
    are not finite, one_to_one above 2048 features. Pitfalls: not symmetric; it rises with Mb, by chance alone (the noise floor is
    two seeds of one size); a feature of length 0 has cosine 0 with all.
    """
    return matches(a, b, one_to_one)[2].double().mean().item()


def matches(a, b, one_to_one=False):
    """What mmcs() is the mean of: features of A, the feature of B that each is matched with, and their cosines; index tensors and floats.

    All Ma of A, or with `one_to_one` min(Ma, Mb) of them. Arguments and errors: mmcs.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"features must be [Ma, D] and [Mb, D], not {list(a.shape)} and {list(b.shape)}")
    if one_to_one and max(len(a), len(b)) > MAX_ONE_TO_ONE:
        sizes = f"{len(a)} and {len(b)}"
        raise ValueError(f"one_to_one takes at most {MAX_ONE_TO_ONE} features a side, not {sizes}: take a subset, or the plain mmcs")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("mmcs: a number that is not finite")
    a, b = (nn.functional.normalize(x.detach().float(), dim=1) for x in (a, b))
    if one_to_one:
        cosines = a @ b.T  # [Ma, Mb]
        rows, columns = (x.to(a.device) for x in assignment(-cosines))
        return rows, columns, cosines[rows, columns]
    best = [(part @ b.T).max(1) for part in a.split(max(1, 2**24 // len(b)))]  # 64 MB of cosines at a time
    return torch.arange(len(a), device=a.device), torch.cat([x.indices for x in best]), torch.cat([x.values for x in best])


def assignment(cost):
    """Pair rows with columns, each at most once, min(n, m) pairs in all, so that the sum of their costs is least.

    cost [n, m] -> rows, columns: index tensors, rows ascending. Exact, by shortest augmenting paths (Crouse 2016): rows come in one by
    one, and each looks for the cheapest chain of changes that ends in a free column. A step of it is done for all columns at once.
    """
    matrix = cost.detach().cpu().double().numpy()
    matrix = matrix.T if len(matrix) > matrix.shape[1] else matrix  # [k, m], k <= m
    k, m = matrix.shape
    u, v = np.zeros(k), np.zeros(m)  # prices: cost_ij - u_i - v_j >= 0, and = 0 for pairs
    column_of, row_of = np.full(k, -1), np.full(m, -1)
    for new in range(k):
        distance, previous = np.full(m, np.inf), np.full(m, -1)  # of the cheapest chain from the new row to a column; its last row
        open_, reached = np.ones(m, dtype=bool), []  # columns not finished; rows on finished chains, with the length of theirs
        row, length = new, 0.0
        while row >= 0:
            reached.append((row, length))
            through = length + matrix[row] - u[row] - v  # [m]
            better = open_ & (through < distance)
            distance[better], previous[better] = through[better], row
            column = int(np.where(open_, distance, np.inf).argmin())
            length, open_[column] = distance[column], False
            row = row_of[column]  # -1: the column is free, and the chain ends
        for row, to in reached:
            u[row] += length - to
        v[~open_] -= length - distance[~open_]
        while column >= 0:  # back along the chain, each row takes the column that it found
            row = previous[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
    rows, columns = torch.arange(k), torch.from_numpy(column_of)
    if cost.shape[0] > cost.shape[1]:
        columns, order = columns.sort()
        return columns, rows[order]
    return rows, columns

"""How far a fine-tuned model has moved from its base, and how alike two sets of features are.

    L blocks, N tokens, D hidden, M features of a sparse autoencoder (Ma of A, Mb of B)

Sources: Marks et al. 2023 (Interpreting Learned Feedback Patterns, arXiv 2310.08164): layer
divergence and MMCS; Sharkey et al. 2022 (Taking features out of superposition with sparse
autoencoders): MMCS; Crouse 2016 (On implementing 2D rectangular assignment algorithms, IEEE TAES
52(4)): shortest augmenting paths.
"""

import numpy as np
import torch
from torch import Tensor, nn

MAX_ONE_TO_ONE = 2048  # features: an assignment takes up to M^3 steps
KINDS = ("frobenius", "relative")


# --------------------------------------------------------------------------------------- weights


def blocks_of(model) -> list:
    """The blocks of a model: the ModuleList that holds most of its parameters.

    Its name does not matter, so any architecture will do. A list of blocks is taken as it is.
    """
    if isinstance(model, (nn.ModuleList, list, tuple)):
        return list(model)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__}: found no list of blocks in it")
    # Of equals max() takes the first, which is the outermost.
    largest = max(lists, key=count_parameters)
    return list(largest)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def parameters_of(block) -> dict[str, Tensor]:
    """{name: tensor} of a block; a dict is taken as it is."""
    if isinstance(block, dict):
        return block
    return dict(block.named_parameters())


@torch.no_grad()
def parameter_divergence(base, policy) -> list[dict]:
    """What layer_divergence() adds up, parameter by parameter.

    base, policy: models, or lists of L blocks, a block being a module or a dict of tensors -> for
    each block {parameter: {"frobenius": ||p_base - p_policy||_F, "base": ||p_base||_F}}, floats
    computed in float64. ValueError: other numbers of blocks, other parameters, other shapes.
    """
    base_blocks = blocks_of(base)
    policy_blocks = blocks_of(policy)
    if len(base_blocks) != len(policy_blocks):
        raise ValueError(
            f"the two models have {len(base_blocks)} and {len(policy_blocks)} blocks: "
            "they must be one architecture"
        )
    # Parameters are paired by name. Those of adapters that are not merged are in one model only.
    table = []
    for layer, (base_block, policy_block) in enumerate(zip(base_blocks, policy_blocks)):
        a = parameters_of(base_block)
        b = parameters_of(policy_block)
        if a.keys() != b.keys():
            other = sorted(a.keys() ^ b.keys())[0]
            raise ValueError(
                f"block {layer}: only one of the models has {other} (adapters must be merged first)"
            )
        row = {}
        for name in a:
            if a[name].shape != b[name].shape:
                shapes = f"{list(a[name].shape)} and {list(b[name].shape)}"
                raise ValueError(f"block {layer}, {name}: the shapes {shapes} differ")
            # In bfloat16 a norm has two or three digits, so both are float64 from here on. The two
            # models may be on different devices.
            p = a[name].double()
            q = b[name].to(a[name].device).double()
            row[name] = {"frobenius": (p - q).norm().item(), "base": p.norm().item()}
        table.append(row)
    return table


def layer_divergence(base, policy, kind: str = "frobenius") -> list[float]:
    """How far each block's weights have moved, with p over the parameters of block l.

        frobenius   D_l = sum_p ||p_base - p_policy||_F                    (Marks et al. 2023)
        relative    D_l = sum_p ||p_base - p_policy||_F / ||p_base||_F     0 where nothing moved;
                                                                           infinite where a zero did

    base, policy: models, or lists of L blocks (modules, or dicts of tensors), LoRA merged -> L
    floats. ValueError: as parameter_divergence(), or an unknown kind.
    Pitfalls: a sum over parameters is compared between blocks of one model only. By `frobenius`
    large matrices weigh more; by `relative` small vectors, such as biases, may weigh most. Adam
    moves every weight about lr a step: after few steps D_l is near
    lr * steps * sum_p sqrt(size of p) in every block, and says little about what was learned.
    """
    return add_up(parameter_divergence(base, policy), kind)


def add_up(table: list[dict], kind: str = "frobenius") -> list[float]:
    """A parameter_divergence() -> L floats: see layer_divergence."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    divergences = []
    for row in table:
        if kind == "relative":
            divergences.append(sum(relative(norms) for norms in row.values()))
        else:
            divergences.append(sum(norms["frobenius"] for norms in row.values()))
    return divergences


def relative(norms: dict[str, float]) -> float:
    """||p_base - p_policy||_F / ||p_base||_F of one parameter of a parameter_divergence()."""
    if norms["frobenius"] == 0:
        return 0.0
    if norms["base"] == 0:
        return float("inf")
    return norms["frobenius"] / norms["base"]


def select_layers(divergences: list[float], choice: str = "highest:5") -> list[int]:
    """The layers to look at: the k that moved most, the k lowest in the model, or named ones.

    divergences: L floats; choice: "highest:k", "lowest:k" (the layers 0 .. k - 1) or "1,3" -> layer
    numbers, ascending; all L where k is more. ValueError: a choice that is none of these, no such
    layer.
    """
    # "highest:5" -> "highest", "5"; "1,3" has no colon, and is a word by itself.
    L = len(divergences)
    word, _, number = choice.partition(":")
    has_count = number.isdecimal() and int(number) > 0
    if word == "highest" and has_count:
        # The sort is stable: where layers moved equally far, the lower one comes first.
        by_divergence = sorted(range(L), key=lambda layer: -divergences[layer])
        return sorted(by_divergence[: int(number)])
    if word == "lowest" and has_count:
        return list(range(L))[: int(number)]

    names = [name.strip() for name in choice.split(",")]
    if not all(name.isdecimal() for name in names):
        raise ValueError(
            f"layers {choice!r}: it must be highest:K, lowest:K, or numbers such as 1,3"
        )
    layers = sorted({int(name) for name in names})
    if layers[-1] >= L:
        raise ValueError(f"layers {choice!r}: the model has the layers 0 to {L - 1}")
    return layers


# ----------------------------------------------------------------------------------- activations


def activation_divergence(x: Tensor, y: Tensor) -> dict[str, float]:
    """How far a layer's output has moved, on the same N tokens: x of the base, y of the policy.

        cosine   mean_t (1 - x_t . y_t / (||x_t|| ||y_t||))
        squared  mean_t ||x_t - y_t||^2 / V
                 V = mean_t ||x_t - mean(x)||^2, the variance of the base

    x, y [N, D] -> {"cosine", "squared"}, floats; squared is 1 where the policy is as far off as the
    base's mean is, on average. Two zero vectors count as equal, one as orthogonal. ValueError:
    shapes that differ, no tokens, a base that does not vary. Pitfall: a few dimensions or tokens of
    huge norm (the first token of a text) can be nearly all of the variance.
    """
    return from_sums(divergence_sums(x, y))


def divergence_sums(x: Tensor, y: Tensor) -> Tensor:
    """What activation_divergence() needs to know of these tokens: [4 + D], float64.

        N, sum_t (1 - cos_t), sum_t ||x_t - y_t||^2, sum_t ||x_t||^2, sum_t x_t

    The sums over parts of the tokens simply add up.
    """
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(
            "activations must both be [tokens, D] of the same tokens, "
            f"not {list(x.shape)} and {list(y.shape)}"
        )
    x = x.detach().double()
    y = y.detach().double()
    norms = x.norm(dim=1) * y.norm(dim=1)  # [N]
    # Where a vector is zero there is no cosine: 1 if both are zero, else 0.
    are_equal = (x == y).all(1).double()
    cosines = torch.where(norms > 0, (x * y).sum(1) / norms, are_equal)  # [N]
    # Both figures can be computed from these sums alone: N D numbers become 4 + D.
    numbers = torch.stack(
        [
            norms.new_tensor(len(x)),
            (1 - cosines).sum(),
            (x - y).square().sum(),
            x.square().sum(),
        ]
    )
    return torch.cat([numbers, x.sum(0)])


def from_sums(sums: Tensor) -> dict[str, float]:
    """divergence_sums() of all tokens -> activation_divergence() of them."""
    n, turned, moved, squares = sums[:4].tolist()
    # sum ||x - mean||^2 = sum ||x||^2 - ||sum x||^2 / N, which needs no mean while sums are made.
    square_of_sum = sums[4:].square().sum()
    variance = squares - (square_of_sum / max(n, 1)).item()  # times N
    # Where all activations are the same, the difference is rounding, and not exactly 0.
    if variance <= 1e-12 * squares:
        raise ValueError(
            f"the base's activations of {n:.0f} tokens do not vary: there is no scale to measure a "
            "distance by"
        )
    return {"cosine": turned / n, "squared": moved / variance}


# -------------------------------------------------------------------------------------- features


def mmcs(a: Tensor, b: Tensor, one_to_one: bool = False) -> float:
    """Mean max cosine similarity: how much of each of A's features is found among B's.

        MMCS(A, B) = 1 / Ma  sum_i max_j cos(a_i, b_j)

    With `one_to_one` each feature of B serves one of A at most, by the assignment with the largest
    sum, and the mean is over its min(Ma, Mb) pairs. a [Ma, D], b [Mb, D]: features in rows, of any
    length -> float in [-1, 1]. ValueError: other shapes, numbers that are not finite, one_to_one
    above 2048 features. Pitfalls: not symmetric; it rises with Mb, by chance alone (the noise floor
    is two seeds of one size); a feature of length 0 has cosine 0 with all.
    """
    _, _, cosines = matches(a, b, one_to_one)
    return cosines.double().mean().item()


def matches(a: Tensor, b: Tensor, one_to_one: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What mmcs() is the mean of. Arguments and errors: mmcs.

    -> features of A, the feature of B that each is matched with (two index tensors), and their
    cosines. All Ma of A, or with `one_to_one` min(Ma, Mb) of them.
    """
    are_of_one_width = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1]
    if not are_of_one_width or min(len(a), len(b)) == 0:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise ValueError(f"features must be [Ma, D] and [Mb, D], not {shapes}")
    if one_to_one and max(len(a), len(b)) > MAX_ONE_TO_ONE:
        raise ValueError(
            f"one_to_one takes at most {MAX_ONE_TO_ONE} features a side, not {len(a)} and "
            f"{len(b)}: take a subset, or the plain mmcs"
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("mmcs: a number that is not finite")
    # The product of unit vectors is their cosine; a vector of length 0 stays 0.
    a = nn.functional.normalize(a.detach().float(), dim=1)
    b = nn.functional.normalize(b.detach().float(), dim=1)

    if one_to_one:
        cosines = a @ b.T  # [Ma, Mb]
        # assignment() finds the least sum, and the largest is wanted.
        rows, columns = assignment(-cosines)
        rows = rows.to(a.device)
        columns = columns.to(a.device)
        return rows, columns, cosines[rows, columns]

    # [Ma, Mb] may be far too large: 64 MB of cosines at a time.
    best_columns = []
    best_cosines = []
    for part in a.split(max(1, 2**24 // len(b))):
        best = (part @ b.T).max(1)
        best_columns.append(best.indices)
        best_cosines.append(best.values)
    rows = torch.arange(len(a), device=a.device)
    return rows, torch.cat(best_columns), torch.cat(best_cosines)


def assignment(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Pair rows with columns, each at most once, so that the sum of the pairs' costs is least.

    cost [n, m] -> rows, columns: index tensors of min(n, m) pairs, rows ascending. Exact, by
    shortest augmenting paths (Crouse 2016).
    """
    matrix = cost.detach().cpu().double().numpy()
    # assign_rows() gives every row a column, so it needs at least as many columns as rows.
    has_more_rows = len(matrix) > matrix.shape[1]
    if has_more_rows:
        matrix = matrix.T
    column_of = assign_rows(matrix)

    rows = torch.arange(len(matrix))
    columns = torch.from_numpy(column_of)
    if has_more_rows:
        # The matrix was turned, so its columns are the rows that were asked about.
        columns, order = columns.sort()
        return columns, rows[order]
    return rows, columns


def assign_rows(matrix: np.ndarray) -> np.ndarray:
    """The column of each row: costs [k, m], k <= m -> [k].

    Rows come in one by one, and each looks for the cheapest chain of changes that ends in a free
    column. A step of that search is done for all columns at once.

        costs  1 2    Row 0 has column 0. Row 1 comes in: it may take column 1, for 3; or column 0,
               1 3    for 1, and row 0 moves on to column 1, which costs 2 - 1 more. The chain of
                      two changes costs 2, less than 3.
    """
    k, m = matrix.shape
    # Prices u of rows and v of columns: the reduced cost, cost_ij - u_i - v_j, is kept at 0 for
    # pairs and at least 0 elsewhere. So no chain gets shorter by going on, and Dijkstra's search
    # finds the shortest.
    u = np.zeros(k)
    v = np.zeros(m)
    column_of = np.full(k, -1)  # -1: none yet
    row_of = np.full(m, -1)
    for new_row in range(k):
        # The cheapest chain from the new row to each column: its length, and its last row.
        distance = np.full(m, np.inf)
        previous = np.full(m, -1)
        is_open = np.ones(m, dtype=bool)  # columns whose chain may still get shorter
        reached = []  # rows on finished chains, with the length of theirs
        row = new_row
        length = 0.0
        while row >= 0:
            reached.append((row, length))
            # A chain may go on from this row to any column: is that shorter than the best so far?
            through = length + matrix[row] - u[row] - v  # [m]
            is_better = is_open & (through < distance)
            distance[is_better] = through[is_better]
            previous[is_better] = row
            # The nearest open column is reached for good. If a row has it, that row moves on.
            column = int(np.where(is_open, distance, np.inf).argmin())
            length = distance[column]
            is_open[column] = False
            row = row_of[column]  # -1: the column is free, and the chain ends

        # New prices: each step of the chain now has the reduced cost 0, as a pair must, and no
        # reduced cost has become negative.
        for row, length_to_row in reached:
            u[row] += length - length_to_row
        v[~is_open] -= length - distance[~is_open]

        # Back along the chain, each row takes the column that it found and frees its old one, which
        # the row before it takes. The new row has no old one: -1.
        while column >= 0:
            row = previous[column]
            row_of[column] = row
            freed_column = column_of[row]
            column_of[row] = column
            column = freed_column
    return column_of

"""Products with a sparse matrix of k entries a row, at O(k D) a row: how TopK autoencoders train.

    N rows (tokens), k entries in each, M columns (features), D width,
    s features of a group in top_k

The matrix S [N, M] is given by values [N, k] and ids [N, k]: the entries of each row and their
columns, in no order. In the training of a TopK autoencoder only the encoder's product is dense.
What remains, forward and backward, is

    S W         decoding; the gradient of the encoder's input               weighted_rows
    (y W^T)_S   the gradient of the kept features (at S's places only)       dots
    S^T y       the gradients of both weights                               scattered
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

# CSR tensors are made in dots_in_place() alone, where neither warning tells a user anything.
warnings.filterwarnings(
    "ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly disabled)"
)


def top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, in no order: pre [N, M] -> values [N, k], ids [N, k].

    Exact, in half the time of torch.topk on a CPU. In groups of s features, the k largest lie in
    the k groups with the largest maxima: each of those k maxima is at least as large as all of any
    other group. That leaves M / s maxima and k s candidates to look through, fewest for
    s = sqrt(M / k).
    """
    n, m = pre.shape
    # s: the largest power of 2 up to sqrt(M / k) that divides M, so that groups are of one size.
    s = 1
    while m % (2 * s) == 0 and k * (2 * s) ** 2 <= m:
        s *= 2
    # Groups of 1 or 2 save nothing, and on a GPU torch.topk is fast.
    if pre.is_cuda or s < 4:
        return pre.topk(k, sorted=False)

    # Group g holds the features g, g + M / s, ...: so the maximum is one of long rows.
    n_groups = m // s
    maxima = pre.view(n, s, n_groups).amax(1)  # [N, M / s]
    best_groups = maxima.topk(k, sorted=False).indices  # [N, k]
    # The candidates are all features of these groups.
    offsets = torch.arange(0, m, n_groups)  # [s]
    candidates = (best_groups[:, None] + offsets[:, None]).view(n, -1)  # [N, k s]
    values, places = pre.gather(1, candidates).topk(k, sorted=False)
    return values, candidates.gather(1, places)


def weighted_rows(values: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """S W: sum_j values[n, j] W[ids[n, j]], [N, D], without the [N, k, D] of the rows."""
    return F.embedding_bag(ids, W, per_sample_weights=values, mode="sum")


def dots(y: Tensor, W: Tensor, ids: Tensor) -> Tensor:
    """(y W^T)_S: y[n] . W[ids[n, j]], [N, k]. y [N, D], W [M, D], ids [N, k]."""
    if y.is_cuda:
        return dots_of_copies(y, W, ids)
    return dots_in_place(y, W, ids)


def dots_of_copies(y: Tensor, W: Tensor, ids: Tensor) -> Tensor:
    """dots() on a GPU: copy the rows of W, [part of N, k, D] at a time."""
    # All rows at once would be [N, k, D], as much as k copies of y.
    products = []
    for y_part, ids_part in zip(y.split(1024), ids.split(1024)):
        product = torch.bmm(W[ids_part], y_part[:, :, None])  # [n, k, 1]
        products.append(product[..., 0])
    return torch.cat(products)


def dots_in_place(y: Tensor, W: Tensor, ids: Tensor) -> Tensor:
    """dots() on a CPU, where such copies would take ten times as long."""
    n, k = ids.shape
    # S in CSR form, which holds the entries of all rows one after another. Each row has k of them,
    # so row n begins at entry n k. Columns do not ascend within a row, as CSR asks for: torch's
    # check would refuse that, and the product below does not mind.
    starts = torch.arange(0, n * k + 1, k, device=ids.device)
    zeros = y.new_zeros(n * k)
    S = torch.sparse_csr_tensor(starts, ids.flatten(), zeros, (n, len(W)), check_invariants=False)
    # y W^T at the places of S alone: the [N, M] product is never made.
    return torch.sparse.sampled_addmm(S, y, W.T, beta=0.0).values().view(n, k)


def scattered(values: Tensor, ids: Tensor, y: Tensor, m: int) -> Tensor:
    """S^T y: row i is the sum of values[n, j] y[n] over the places where ids[n, j] = i, [M, D]."""
    # Feature by feature: the places of each feature's entries, one after another. 32-bit numbers
    # are sorted faster.
    sorted_ids, order = ids.flatten().int().sort(stable=True)  # [N k]
    features = torch.arange(m, dtype=torch.int32, device=ids.device)
    starts = torch.searchsorted(sorted_ids, features)  # [M]
    # embedding_bag adds up a bag of rows for each feature: those of y where it has an entry, each
    # times that entry. Entry n k + j is of row n.
    k = values.shape[1]
    rows = order // k  # [N k]
    weights = values.flatten()[order]
    return F.embedding_bag(rows, y, starts, per_sample_weights=weights, mode="sum")


class EncodeTopK(torch.autograd.Function):
    """The k largest of W z + bias: z [N, D], W [M, D], bias [M] -> values [N, k], ids [N, k].

    The backward pass is at those places only.
    """

    @staticmethod
    def forward(ctx, z, W, bias, k):
        # Under autocast each addmm below would round W anew, so W is rounded here, once.
        device = z.device.type
        dtype = z.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        weight = W.to(dtype).T
        bias = bias.to(dtype)

        # A part of the rows at a time: on a CPU its [rows, M] stays in the cache for top_k, on a
        # GPU it takes about 1 GB at the most.
        rows_at_once = 512
        if z.is_cuda:
            rows_at_once = max(512, 2**28 // len(W))
        values = []
        ids = []
        for rows in z.to(dtype).split(rows_at_once):
            pre = torch.addmm(bias, rows, weight)  # [rows, M]
            largest, columns = top_k(pre, k)
            values.append(largest)
            ids.append(columns)
        values = torch.cat(values)
        ids = torch.cat(ids)
        # pre [N, M] is not kept: backward needs only where the kept values are.
        ctx.save_for_backward(z, W, ids)
        ctx.mark_non_differentiable(ids)
        return values.to(z.dtype), ids

    @staticmethod
    def backward(ctx, g, _):
        # g [N, k] is the gradient at the kept places; all other pre-activations have none. So S
        # with the values g is the whole gradient of pre [N, M]. z is mostly data and needs none.
        z, W, ids = ctx.saved_tensors
        needs_z, needs_W, needs_bias, _ = ctx.needs_input_grad
        grad_z = None
        grad_W = None
        grad_bias = None
        if needs_z:
            grad_z = weighted_rows(g, ids, W)
        if needs_W:
            grad_W = scattered(g, ids, z, len(W))
        if needs_bias:
            grad_bias = g.new_zeros(len(W)).index_add(0, ids.flatten(), g.flatten())
        return grad_z, grad_W, grad_bias, None


class DecodeTopK(torch.autograd.Function):
    """S W: values [N, k], ids [N, k], W [M, D] -> [N, D]."""

    @staticmethod
    def forward(ctx, values, ids, W):
        ctx.save_for_backward(values, ids, W)
        return weighted_rows(values, ids, W)

    @staticmethod
    def backward(ctx, g):
        values, ids, W = ctx.saved_tensors
        needs_values, _, needs_W = ctx.needs_input_grad
        g = g.contiguous()
        grad_values = None
        grad_W = None
        if needs_values:
            grad_values = dots(g, W, ids)
        if needs_W:
            grad_W = scattered(values, ids, g, len(W))
        return grad_values, None, grad_W

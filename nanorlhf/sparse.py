"""Products with a sparse matrix of k entries a row, at O(k D) a row. TopK autoencoders (sae.py) train with them.

    N rows (tokens), k entries in each, M columns (latents), D width, s latents of a group in top_k

The matrix S [N, M] is given by values [N, k] and ids [N, k], the entries of each row and their columns, in no order. Of a TopK
autoencoder's training only the encoder's product is dense; what remains, forward and backward, is

    S W         decoding; the gradient of the encoder's input               weighted_rows
    (y W^T)_S   the gradient of the kept latents (at S's places only)       dots
    S^T y       the gradients of both weights                               scattered
"""

import warnings

import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly disabled)")


def top_k(pre, k):
    """The k largest of each row, in no order: pre [N, M] -> values [N, k], ids [N, k]. Exact, in half the time of torch.topk on a CPU.

    In groups of s latents, the k largest lie in the k groups with the largest maxima: each of those k maxima is at least as large as
    all of any other group. That leaves M / s maxima and k s candidates to look through, fewest for s = sqrt(M / k).
    """
    n, m = pre.shape
    s = 1
    while m % (2 * s) == 0 and k * (2 * s) ** 2 <= m:
        s *= 2
    if pre.is_cuda or s < 4:
        return pre.topk(k, sorted=False)
    groups = m // s
    maxima = pre.view(n, s, groups).amax(1)  # [N, M / s]: group g holds the latents g, g + M / s, ...: a maximum of long rows
    best = maxima.topk(k, sorted=False).indices  # [N, k]
    candidates = (best[:, None] + torch.arange(0, m, groups)[:, None]).view(n, -1)  # [N, k s]
    values, places = pre.gather(1, candidates).topk(k, sorted=False)
    return values, candidates.gather(1, places)


def weighted_rows(values, ids, W):
    """S W: sum_j values[n, j] W[ids[n, j]], [N, D], without the [N, k, D] of the rows."""
    return F.embedding_bag(ids, W, per_sample_weights=values, mode="sum")


def dots(y, W, ids):
    """(y W^T)_S: y[n] . W[ids[n, j]], [N, k]. y [N, D], W [M, D], ids [N, k]."""
    return dots_of_copies(y, W, ids) if y.is_cuda else dots_in_place(y, W, ids)


def dots_of_copies(y, W, ids):
    """On a GPU: copy the rows of W, [part of N, k, D] at a time."""
    parts = zip(y.split(1024), ids.split(1024))
    return torch.cat([torch.bmm(W[own], rows[:, :, None])[..., 0] for rows, own in parts])


def dots_in_place(y, W, ids):
    """On a CPU, where such copies would take ten times as long."""
    n, k = ids.shape
    starts = torch.arange(0, n * k + 1, k, device=ids.device)
    S = torch.sparse_csr_tensor(starts, ids.flatten(), y.new_zeros(n * k), (n, len(W)), check_invariants=False)
    return torch.sparse.sampled_addmm(S, y, W.T, beta=0.0).values().view(n, k)


def scattered(values, ids, y, m):
    """S^T y: row i is the sum of values[n, j] y[n] over the places where ids[n, j] = i, [M, D]."""
    ids, order = ids.flatten().int().sort(stable=True)  # [N k]: latent by latent
    starts = torch.searchsorted(ids, torch.arange(m, dtype=torch.int32, device=ids.device))  # [M]
    return F.embedding_bag(order // values.shape[1], y, starts, per_sample_weights=values.flatten()[order], mode="sum")


class EncodeTopK(torch.autograd.Function):
    """z [N, D], W [M, D], bias [M] -> the k largest of W z + bias: values [N, k], ids [N, k]. Backward at those places only."""

    @staticmethod
    def forward(ctx, z, W, bias, k):
        device = z.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else z.dtype
        A, b = W.to(dtype).T, bias.to(dtype)
        # A part of the rows at a time: on a CPU its [rows, M] stays in the cache for top_k.
        at_once = max(512, 2**28 // len(W)) if z.is_cuda else 512
        parts = [top_k(torch.addmm(b, rows, A), k) for rows in z.to(dtype).split(at_once)]
        values, ids = (torch.cat(x) for x in zip(*parts))
        ctx.save_for_backward(z, W, ids)
        ctx.mark_non_differentiable(ids)
        return values.to(z.dtype), ids

    @staticmethod
    def backward(ctx, g, _):
        z, W, ids = ctx.saved_tensors
        needs_z, needs_W, needs_bias, _ = ctx.needs_input_grad
        return (
            weighted_rows(g, ids, W) if needs_z else None,
            scattered(g, ids, z, len(W)) if needs_W else None,
            g.new_zeros(len(W)).index_add(0, ids.flatten(), g.flatten()) if needs_bias else None,
            None,
        )


class DecodeTopK(torch.autograd.Function):
    """values [N, k], ids [N, k], W [M, D] -> S W [N, D]."""

    @staticmethod
    def forward(ctx, values, ids, W):
        ctx.save_for_backward(values, ids, W)
        return weighted_rows(values, ids, W)

    @staticmethod
    def backward(ctx, g):
        values, ids, W = ctx.saved_tensors
        needs_values, _, needs_W = ctx.needs_input_grad
        g = g.contiguous()
        return dots(g, W, ids) if needs_values else None, None, scattered(values, ids, g, len(W)) if needs_W else None

"""Sparse autoencoders: a layer's activation as a sum of a few of many directions.

    N tokens (or any shape [..]), D width of the activations, M features, k of them kept by TopK,
    d dead ones

    x [.., D]  --standardise-->  z
    pre = W_e (z - b_d) + b_e    [.., M]
    f   = ReLU(pre), or its top k    [.., M]
    z^  = W_d f + b_d            [.., D]  --restore-->  x^

There are two kinds: vanilla (ReLU and an L1 penalty) and TopK. Everything public takes and returns
activations in the model's units; standardisation happens inside. The losses alone are in
standardised units, so that one learning rate and one L1 coefficient mean the same in every layer.
Directions are rows, so that a few of them are read fast: W_enc and W_dec are both [M, D]. TopK
trains without an [N, M] tensor: see sparse.py.

Sources: Cunningham et al. 2023 (2309.08600) and Bricken et al. 2023 (vanilla), Gao et al. 2024
(2406.04093: TopK, AuxK), Zhang et al. 2025 (SARM, 2508.08746: per-token standardisation, TopK
without ReLU).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sparse import DecodeTopK, EncodeTopK

NORMALIZE = ("dataset", "token", "none")
# Gao et al. 2024, appendix A.2: how many dead features may explain what is left of a token, and
# what that loss weighs beside the error itself.
AUX_K = 512
AUX_COEF = 1 / 32

# What reduces over processes: a function that adds up a tensor over them, in place.
Reduce = Callable[[Tensor], object]


# --------------------------------------------------------------------------------- autoencoders


class SparseAutoencoder(nn.Module):
    """The vanilla one: f = ReLU(W_e (z - b_d) + b_e), z^ = W_d f + b_d; tied: W_d = W_e^T.

    z is x standardised:
        'dataset'  (x - mean) / scale with the numbers of `fit`, one scale for all coordinates, so
                   that angles stay
        'token'    (x - mean(x)) / (std(x) + 1e-6) over D, std unbiased (SARM)
        'none'     z = x
    Decoder directions have unit length: if they could grow, longer directions and smaller f would
    give the same z^ for a smaller L1 penalty. `seed` alone decides the start. ValueError: sizes
    below 1, k above M, an unknown `normalize`.
    Pitfall: with 'dataset' or a good b_dec, call fit(x) before training.
    """

    def __init__(
        self, d: int, m: int, tied: bool = False, normalize: str = "dataset", seed: int = 0
    ):
        super().__init__()
        if d < 1 or m < 1:
            raise ValueError(f"an autoencoder needs a width and features, not {d} and {m}")
        if normalize not in NORMALIZE:
            raise ValueError(f"normalize {normalize!r} is not one of {', '.join(NORMALIZE)}")
        self.d = d
        self.m = m
        self.tied = tied
        self.normalize = normalize

        # The encoder starts as the decoder's transpose: a feature that first reads what it writes
        # is less likely to die (Gao et al. 2024, section 2.4).
        generator = torch.Generator().manual_seed(seed)
        directions = F.normalize(torch.randn(m, d, generator=generator))
        self.W_dec = nn.Parameter(directions)  # [M, D], rows of unit length
        if not tied:
            self.W_enc = nn.Parameter(directions.clone())  # [M, D]
        self.b_enc = nn.Parameter(torch.zeros(m))
        self.b_dec = nn.Parameter(torch.zeros(d))
        # Buffers are saved with the weights, but are not trained: fit() measures them once.
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, x: Tensor, bias: str = "mean") -> "SparseAutoencoder":
        """Set what a sample x [N, D] of the data tells, and where the biases start. -> self

        From x come mean and scale ('dataset'). b_dec starts at the 'mean' or the geometric
        'median'. The vanilla b_enc starts at -2 rms(z - b_d): along a random direction z has about
        that spread, so that 2% of the features fire. With half of them (b_enc = 0) training first
        has to undo x^ >> x.
        """
        if bias not in ("mean", "median"):
            raise ValueError(f"the decoder bias starts at the mean or the median, not {bias!r}")
        x = x.reshape(-1, self.d).to(self.mean)
        if not len(x) or not x.isfinite().all():
            raise ValueError("fit needs activations, and finite ones")

        # A sum over so many tokens keeps its digits in float64.
        if self.normalize == "dataset":
            self.mean.copy_(x.double().mean(0))
            rms = (x - self.mean).double().square().mean().sqrt()
            # Activations that are all equal have rms 0, and 0 / 0 would be NaN.
            self.scale.copy_(rms.clamp(min=1e-12))

        # What all tokens share is left to b_dec, so that features explain how tokens differ.
        z = self.standardise(x, *self.moments(x))
        if bias == "mean":
            self.b_dec.copy_(z.mean(0))
        else:
            self.b_dec.copy_(geometric_median(z))
        # The vanilla kind alone needs a threshold: TopK keeps k features of each token anyway.
        if not isinstance(self, TopKSAE):
            self.b_enc.fill_(-2 * (z - self.b_dec).square().mean().sqrt())
        return self

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What standardising x [.., D] subtracts and divides by.

        'token': [.., 1] each, else [D] and one number.
        """
        if self.normalize != "token":
            return self.mean, self.scale
        x = x.to(self.mean.dtype)
        return x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-6

    def standardise(self, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """x [.., D] -> z [.., D], in the autoencoder's dtype."""
        if x.shape[-1] != self.d:
            raise ValueError(
                f"activations of width {x.shape[-1]} for an autoencoder of width {self.d}"
            )
        x = x.to(self.mean.dtype)
        if self.normalize == "none":
            return x
        return (x - mean) / scale

    def encoder(self) -> tuple[Tensor, Tensor]:
        """W_e [M, D] and the bias of pre = W_e z + bias: b_e - W_e b_d, [M]."""
        W = self.W_dec if self.tied else self.W_enc
        # The product is cheap, and a bias should keep its digits.
        with torch.autocast(W.device.type, enabled=False):
            return W, self.b_enc - W @ self.b_dec

    def activate(self, pre: Tensor) -> Tensor:
        """Pre-activations [.., M] -> f [.., M]."""
        return pre.relu()

    def encode(self, x: Tensor) -> Tensor:
        """x [.., D] -> f [.., M], dense."""
        z = self.standardise(x, *self.moments(x))
        return self.activate(F.linear(z, *self.encoder()))

    def decode(self, f: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """f [.., M] -> x^ [.., D].

        With normalize 'token' the token's own scale is in `moments` (of x); without, it gives z^.
        """
        z_hat = F.linear(f, self.W_dec.T, self.b_dec)
        return self.restore(z_hat, moments)

    def restore(self, z_hat: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """z^ -> x^, in the model's units."""
        if self.normalize == "none":
            return z_hat
        # Each token has a scale of its own, known only where x was seen.
        if moments is None and self.normalize == "token":
            return z_hat
        if moments is None:
            moments = (self.mean, self.scale)
        mean, scale = moments
        return z_hat * scale + mean

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [.., D] -> x^ [.., D], f [.., M]."""
        f = self.encode(x)
        return self.decode(f, self.moments(x)), f

    def decoder_directions(self) -> Tensor:
        """The unit directions of the features, [M, D], in the model's space.

        One scale for all coordinates changes no angle.
        """
        return F.normalize(self.W_dec.detach(), dim=-1)

    @torch.no_grad()
    def remove_parallel(self):
        """Take out of each decoder direction's gradient what is parallel to it: g - (g . w) w.

        The loss is not to change a direction's length.
        """
        # w has unit length, so g . w is the length of the parallel part.
        along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)  # [M, 1]
        self.W_dec.grad -= along * self.W_dec

    @torch.no_grad()
    def normalise(self):
        """Give each decoder direction unit length again, after a step."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)


class TopKSAE(SparseAutoencoder):
    """f = the k largest of W_e (z - b_d) + b_e, the rest 0.

    relu: negative ones among the k become 0 too (SARM: relu=False, 'token'). encode_topk and
    decode_topk are the same in sparse form. Pitfall: where features tie at the k-th place, which of
    them is kept is open.
    """

    def __init__(
        self,
        d: int,
        m: int,
        k: int,
        normalize: str = "dataset",
        relu: bool = True,
        seed: int = 0,
    ):
        super().__init__(d, m, normalize=normalize, seed=seed)
        if not 1 <= k <= m:
            raise ValueError(f"k must lie between 1 and the {m} features, not {k}")
        self.k = k
        self.relu = relu

    def activate(self, pre: Tensor) -> Tensor:
        values, ids = pre.topk(self.k, dim=-1)
        if self.relu:
            values = values.relu()
        return torch.zeros_like(pre).scatter(-1, ids, values)

    def encode_topk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [.., D] -> values [.., k], ids [.., k], in no order."""
        return self.sparse_code(self.standardise(x, *self.moments(x)))

    def sparse_code(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [.., D] -> values [.., k], ids [.., k].

        Under autocast the product, and it alone, is bfloat16.
        """
        # The sparse products take rows: all leading dimensions become one for a moment.
        values, ids = EncodeTopK.apply(z.reshape(-1, self.d), *self.encoder(), self.k)
        values = values.view(*z.shape[:-1], self.k)
        ids = ids.view(*z.shape[:-1], self.k)
        if self.relu:
            values = values.relu()
        return values, ids

    def decode_topk(
        self, values: Tensor, ids: Tensor, moments: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """values, ids [.., k] -> x^ [.., D]; `moments` as in decode."""
        return self.restore(self.sparse_decode(values, ids), moments)

    def sparse_decode(self, values: Tensor, ids: Tensor) -> Tensor:
        """values, ids [.., k] -> z^ [.., D]."""
        flat_values = values.reshape(-1, values.shape[-1])
        flat_ids = ids.reshape(-1, ids.shape[-1])
        z_hat = DecodeTopK.apply(flat_values, flat_ids, self.W_dec)
        return z_hat.view(*values.shape[:-1], self.d) + self.b_dec


@torch.no_grad()
def geometric_median(x: Tensor, steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to x [N, D] -> [D], by Weiszfeld's iteration.

    y <- sum_i w_i x_i / sum_i w_i,   w_i = 1 / ||x_i - y||
    """
    y = x.mean(0)
    for _ in range(steps):
        # A token where y happens to be would have an infinite weight.
        w = 1 / (x - y).norm(dim=1).clamp(min=1e-8)  # [N]
        last = y
        y = w @ x / w.sum()
        # Each step lowers the sum of distances, so a y that stands still is the median.
        if (y - last).norm() <= tolerance * y.norm():
            break
    return y


# --------------------------------------------------------------------------------------- losses


def squared_error(x: Tensor, x_hat: Tensor, n_tokens: int | None = None) -> Tensor:
    """The mean over tokens of ||x - x^||^2 / D, [.., D] twice -> a scalar.

    n_tokens: of the whole optimizer batch (default: these).
    """
    if not n_tokens:
        n_tokens = x[..., 0].numel()
    return (x - x_hat).square().sum() / (x.shape[-1] * n_tokens)


@torch.no_grad()
def variance_about_mean(error: Tensor, reduce: Reduce | None = None) -> Tensor:
    """Return the variance of the error e [N, D] over the tokens and dimensions of a whole batch.

        Var(e) = mean(e^2) - mean(e)^2          both means over tokens and dimensions

    The result is a float64 scalar without a gradient, and exactly 0 where the error is the same
    number everywhere. On several processes reduce(tensor) sums over them, in place: each holds a
    share of the batch, and all get the variance of the whole.
    """
    e = error.double()  # digits enough for the difference of two means
    count = e.new_full((), e.numel())
    sums = torch.stack([e.sum(), e.square().sum(), count])  # together: one all-reduce
    if reduce is not None:
        reduce(sums)
    mean = sums[0] / sums[2]
    mean_square = sums[1] / sums[2]
    variance = mean_square - mean.square()
    # What is left of a constant error is the rounding of its square, not a variance.
    is_rounding = variance <= 1e-12 * mean_square
    return variance.masked_fill(is_rounding, 0.0)


def auxiliary_loss(
    sae: TopKSAE,
    z: Tensor,
    error: Tensor,
    dead: Tensor,
    n_tokens: int | None = None,
    reduce: Reduce | None = None,
) -> Tensor:
    """AuxK: the share of the error that the dead features leave unexplained too.

        e = z - z^ (no gradient),   e^ = W_d top_{k_aux}(pre of the dead)
        loss = mean over tokens of ||e - e^||^2 / D / Var(e)          0 where Var(e) is 0

    z, error [N, D], dead [M] (bool, at least one) -> a scalar. The products of the dead features
    are dense: [N, d]. n_tokens and reduce are those of gradients(). Source: Gao et al. 2024,
    appendix A.2; Var(e) is not in the paper's equation but in the authors' code (normalized_mse in
    kernels.py of openai/sparse_autoencoder, about the mean of each coordinate). Pitfall: without
    Var(e) the term shrinks with the error: where the living features explain 95% of z it is 20
    times as small.
    """
    W, bias = sae.encoder()
    # Among all M features the dead do not reach the top k, so here they compete with each other.
    f = F.linear(z, W[dead], bias[dead])  # [N, d]
    if sae.relu:
        f = f.relu()
    # As in TopK itself, a token is explained by the features that answer to it most.
    if f.shape[1] > AUX_K:
        values, ids = f.topk(AUX_K, sorted=False)
        f = torch.zeros_like(f).scatter(1, ids, values)

    # Detached: living features are not to change their error to make it easier for the dead ones.
    # b_dec is not added to e^, since z^ has it already.
    error = error.detach()
    error_hat = f @ sae.W_dec[dead]  # [N, D]
    variance = variance_about_mean(error, reduce)
    # The weight is a number of the whole batch, the same on all processes; 1 / 0 becomes 0.
    weight = variance.reciprocal().masked_fill(variance == 0, 0.0).to(error.dtype)
    return weight * squared_error(error, error_hat, n_tokens)


def sae_loss(
    sae: SparseAutoencoder,
    x: Tensor,
    l1: float = 0.0,
    dead: Tensor | None = None,
    n_tokens: int | None = None,
    reduce: Reduce | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss of activations x [N, D], in standardised units -> loss (a scalar), stats.

        vanilla   ||z - z^||^2 / D + l1 ||f||_1
        TopK      ||z - z^||^2 / D + 1/32 AuxK(dead [M])            by the sparse path

    Both are means over the n_tokens of the whole optimizer batch. stats: mse and l0, sums /
    n_tokens like the loss; fired [M], how many of the tokens each feature fired on. reduce: of
    gradients(), for what AuxK needs of the whole batch; the loss itself is this process's share.
    """
    n_tokens = n_tokens or len(x)
    # The loss compares z^ with z: neither is brought back to the model's units.
    z = sae.standardise(x, *sae.moments(x))
    penalty = 0.0
    if isinstance(sae, TopKSAE):
        values, ids = sae.sparse_code(z)  # [N, k]
        z_hat = sae.sparse_decode(values, ids)
        if dead is not None and dead.any():
            # `dead` is the same on all processes (see gradients), so all of them or none call the
            # all-reduce in here.
            penalty = AUX_COEF * auxiliary_loss(sae, z, z - z_hat, dead, n_tokens, reduce)
        fired = count_firing(values.detach(), ids, sae.m)
    else:
        f = sae.activate(F.linear(z, *sae.encoder()))  # [N, M]
        z_hat = F.linear(f, sae.W_dec.T, sae.b_dec)
        penalty = l1 * f.sum() / n_tokens  # f >= 0, so that its sum is its L1 norm
        fired = (f.detach() > 0).sum(0).float()
    mse = squared_error(z, z_hat, n_tokens)
    stats = {"mse": mse.detach(), "l0": fired.sum() / n_tokens, "fired": fired}
    return mse + penalty, stats


def count_firing(values: Tensor, ids: Tensor, m: int) -> Tensor:
    """How many tokens each feature fires on: values [N, k], ids [N, k] -> [M]."""
    # The ReLU may have set one of the k to 0: that feature does not fire.
    fires = (values != 0).float()
    return torch.zeros(m, device=ids.device).index_add(0, ids.flatten(), fires.flatten())


# --------------------------------------------------------------------------------------- a step


def adam(sae: SparseAutoencoder) -> torch.optim.Optimizer:
    """The optimizer of update(), which sets its rate: plain Adam, fused."""
    return torch.optim.Adam(sae.parameters(), fused=True)


def gradients(
    sae: SparseAutoencoder,
    x: Tensor,
    l1: float = 0.0,
    silent: Tensor | None = None,
    dead_after: float = float("inf"),
    dtype: torch.dtype = torch.float32,
    n_tokens: int | None = None,
    reduce: Reduce | None = None,
) -> dict[str, float]:
    """Loss and gradients of activations x [N, D] -> {loss, mse, l0, dead}.

    silent [M] counts the tokens since each feature last fired, and is updated; from `dead_after` on
    it is dead, and AuxK calls it back. dtype bfloat16: the dense products alone. On several
    processes x is a share of n_tokens, and reduce(tensor) sums over them, in place.
    """
    n_tokens = n_tokens or len(x)
    if silent is None:
        silent = x.new_zeros(sae.m, dtype=torch.long)
    # Which features are dead is decided by the batches before this one.
    dead = silent >= dead_after
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, stats = sae_loss(sae, x, l1, dead, n_tokens, reduce)
    loss.backward()

    # Each process has divided its sums by the n_tokens of all, so the batch's means and gradients
    # are plain sums over processes.
    numbers = torch.stack([loss.detach(), stats["mse"], stats["l0"]])
    if reduce:
        reduce(numbers)
        reduce(stats["fired"])
        for parameter in sae.parameters():
            reduce(parameter.grad)

    # `fired` is now of all processes: a feature that fired on any of their tokens is not silent.
    silent += n_tokens
    silent[stats["fired"] > 0] = 0
    loss, mse, l0 = numbers.tolist()
    return {"loss": loss, "mse": mse, "l0": l0, "dead": dead.float().mean().item()}


def update(saes: Sequence[SparseAutoencoder], optimizer: torch.optim.Optimizer, lr: float):
    """One step of the optimizer over several autoencoders that have their gradients.

    Their decoder directions stay of unit length.
    """
    # This comes before the step: else Adam's running means fill up with what normalise() undoes.
    for sae in saes:
        sae.remove_parallel()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    # Even a step at right angles makes a direction longer, and Adam's, which is scaled coordinate
    # by coordinate, is not quite at right angles.
    for sae in saes:
        sae.normalise()


# ------------------------------------------------------------------------------------- measures


def fvu(x: Tensor, x_hat: Tensor) -> float:
    """The fraction of variance unexplained, of [.., D] by [.., D].

        sum of squared residuals / sum of squared deviations from the mean

    0 is perfect, 1 is no better than the mean. Pitfall: not to be averaged over batches; tally()
    adds them up.
    """
    x = x.detach().reshape(-1, x.shape[-1]).double()
    x_hat = x_hat.detach().reshape(-1, x_hat.shape[-1]).double()
    residual = (x - x_hat).square().sum()
    # The mean is the best x^ that is the same for all tokens: its error is what 1 stands for.
    variance = (x - x.mean(0)).square().sum()
    return (residual / variance).item()


@torch.no_grad()
def tally(sae: SparseAutoencoder, x: Tensor) -> dict[str, Tensor]:
    """The sums that measures() needs, of activations x [N, D], float64.

    Those of all batches and processes are to be added.
    """
    x = x.reshape(-1, sae.d)
    if isinstance(sae, TopKSAE):
        # The sparse path: no [N, M] is held.
        values, ids = sae.encode_topk(x)
        x_hat = sae.decode_topk(values, ids, sae.moments(x))
        fired = count_firing(values, ids, sae.m)
    else:
        x_hat, f = sae(x)
        fired = (f != 0).sum(0)
    # Sums of N D squares, and the variance will be a difference of two: both need float64.
    residual = (x - x_hat).double()
    x = x.double()
    return {
        "n": torch.tensor(len(x), dtype=torch.float64, device=x.device),
        "residual": residual.square().sum(),
        "sum": x.sum(0),
        "squares": x.square().sum(),
        "fired": fired.double(),
    }


def measures(totals: dict[str, Tensor]) -> dict:
    """tally()'s sums -> {fvu, l0, dead, density}.

    dead: the share of features that never fired; density [M]: the share of tokens each fires on.
    """
    n = totals["n"]
    # sum |x - mean|^2 = sum |x|^2 - |sum x|^2 / n: the mean is not known until all batches are in.
    variance = totals["squares"] - totals["sum"].square().sum() / n
    density = totals["fired"] / n  # [M]
    return {
        "fvu": (totals["residual"] / variance).item(),
        "l0": density.sum().item(),
        "dead": (density == 0).double().mean().item(),
        "density": density,
    }

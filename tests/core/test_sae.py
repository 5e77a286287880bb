"""Sparse autoencoders against loops in float64, dense autograd, and data whose dictionary is known.

N tokens, D hidden, M features, K features kept
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import doubles, randn, refuses, seeded
from support import join, ranks

from nanorlhf import sae as sae_module
from nanorlhf.runtime.distributed import setup
from nanorlhf.sae import (
    SparseAutoencoder,
    TopKSAE,
    adam,
    auxiliary_loss,
    fvu,
    geometric_median,
    gradients,
    measures,
    sae_loss,
    tally,
    update,
)
from nanorlhf.sparse import dots, dots_in_place, dots_of_copies, scattered, top_k, weighted_rows

D, M, K, N = 12, 40, 5, 30


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def make_activations(n=N, seed=1):
    """Activations [n, D] around a mean far from 0."""
    return 3 * randn(n, D, seed=seed) + 5 + randn(D, seed=2)


def make(kind, normalize="dataset", relu=True, dtype=torch.float64):
    """An autoencoder whose parameters are all different from where they start.

    kind: "vanilla", "tied" or "topk".
    """
    if kind == "topk":
        sae = TopKSAE(D, M, K, normalize, relu)
    else:
        sae = SparseAutoencoder(D, M, kind == "tied", normalize)
    sae = sae.to(dtype)
    sae.fit(make_activations())
    for i, parameter in enumerate(sae.parameters()):
        parameter.data += 0.1 * randn(*parameter.shape, seed=10 + i)
    sae.normalise()
    return sae


def train_step(sae, optimizer, x, lr, **options):
    """A step as train_sae.py makes it, of one autoencoder -> its numbers."""
    stats = gradients(sae, x, **options)
    update([sae], optimizer, lr)
    return stats


# ---------------------------------------------------------------------------------- the equations


def moments_by_hand(row, normalize):
    """The mean [D] and the scale that a token (a list of D numbers) is standardised by."""
    if normalize == "token":
        mean = sum(row) / D
        squares = sum((v - mean) ** 2 for v in row)
        return [mean] * D, (squares / (D - 1)) ** 0.5 + 1e-6
    if normalize == "none":
        return [0.0] * D, 1.0
    # "dataset": a mean for each coordinate, one scale for all of them.
    rows = make_activations().tolist()
    means = [sum(column) / N for column in zip(*rows)]
    squares = 0.0
    for other in rows:
        for i in range(D):
            squares += (other[i] - means[i]) ** 2
    return means, (squares / (N * D)) ** 0.5


def codes_by_hand(sae, kind, z, relu):
    """f of one standardised token z: relu(W_e (z - b_d) + b_e), or the K largest of these."""
    W_e = sae.W_dec.tolist() if kind == "tied" else sae.W_enc.tolist()
    b_e = sae.b_enc.tolist()
    b_d = sae.b_dec.tolist()
    pre = []
    for j in range(M):
        total = b_e[j]
        for i in range(D):
            total += W_e[j][i] * (z[i] - b_d[i])
        pre.append(total)

    kept = range(M)
    if kind == "topk":
        kept = sorted(range(M), key=lambda j: -pre[j])[:K]
    f = [0.0] * M
    for j in kept:
        f[j] = max(pre[j], 0) if relu else pre[j]
    return f


def decode_by_hand(sae, f):
    """z^ = sum_j f_j W_d[j] + b_d."""
    W_d = sae.W_dec.tolist()
    z_hat = sae.b_dec.tolist()
    for j in range(M):
        for i in range(D):
            z_hat[i] += f[j] * W_d[j][i]
    return z_hat


def forward_by_hand(sae, kind, x, normalize, relu):
    """One token at a time, one number at a time: x [n, D] -> x^ [n, D], f [n, M]."""
    reconstructions = []
    codes = []
    for row in x.tolist():
        mean, scale = moments_by_hand(row, normalize)
        z = [(v - m) / scale for v, m in zip(row, mean)]
        f = codes_by_hand(sae, kind, z, relu)
        z_hat = decode_by_hand(sae, f)
        reconstructions.append([v * scale + m for v, m in zip(z_hat, mean)])
        codes.append(f)
    return doubles(reconstructions), doubles(codes)


def example(kind, normalize, relu):
    """An autoencoder and seven tokens."""
    sae = make(kind, normalize, relu)
    if kind == "topk":
        # So that some of the K largest are negative.
        sae.b_enc.data -= 10 if normalize == "none" else 2
    return sae, make_activations(7, seed=3)


every_normalisation = pytest.mark.parametrize("normalize", ["dataset", "token", "none"])
KINDS = [("vanilla", True), ("tied", True), ("topk", True), ("topk", False)]


@every_normalisation
@pytest.mark.parametrize("kind, relu", KINDS)
def test_equations(kind, relu, normalize):
    sae, x = example(kind, normalize, relu)
    expected_x_hat, expected_f = forward_by_hand(sae, kind, x, normalize, relu)
    x_hat, f = sae(x)
    close(f, expected_f)
    close(x_hat, expected_x_hat)
    torch.testing.assert_close(sae.decode(f, sae.moments(x)), expected_x_hat)
    # Leading dimensions may be any.
    reshaped, _ = sae(x.view(1, 7, 1, D))
    assert reshaped.shape == (1, 7, 1, D)


@every_normalisation
@pytest.mark.parametrize("relu", [True, False])
def test_the_sparse_equations(relu, normalize):
    """encode_topk gives the K values and their places, from which decode_topk works."""
    sae, x = example("topk", normalize, relu)
    expected_x_hat, expected_f = forward_by_hand(sae, "topk", x, normalize, relu)
    x = x[:, None]  # [7, 1, D]
    values, ids = sae.encode_topk(x)  # [7, 1, K]
    f = torch.zeros(7, 1, M).double().scatter(2, ids, values)
    close(f[:, 0], expected_f)
    x_hat = sae.decode_topk(values, ids, sae.moments(x))
    close(x_hat[:, 0], expected_x_hat)


@every_normalisation
def test_without_relu_negative_features_are_kept(normalize):
    sae, x = example("topk", normalize, relu=False)
    f = sae.encode(x)
    assert (f != 0).sum(1).tolist() == [K] * 7
    assert (f < 0).any()


def test_fitted_activations_have_mean_0_and_variance_1():
    """The variance is that over all coordinates."""
    x = make_activations()
    sae = SparseAutoencoder(D, M).double().fit(x)
    z = sae.standardise(x, *sae.moments(x))
    assert z.mean(0).abs().max() < 1e-12
    assert z.square().mean().item() == pytest.approx(1)


def test_b_dec_starts_at_the_mean():
    x = make_activations()
    sae = SparseAutoencoder(D, M, normalize="none").double().fit(x)
    torch.testing.assert_close(sae.b_dec.data, x.mean(0))


def test_b_enc_starts_two_rms_below_0():
    """So that 2% of the features fire; TopK, which keeps k of them anyway, starts at 0."""
    x = make_activations()
    rms = np.std(x.numpy() - x.numpy().mean(axis=0))  # about each coordinate's mean
    assert abs(rms - 1) > 0.1
    sae = SparseAutoencoder(D, M, normalize="none").double().fit(x)
    torch.testing.assert_close(sae.b_enc.data, torch.full((M,), -2 * rms).double())
    assert not TopKSAE(D, M, K, normalize="none").double().fit(x).b_enc.any()


def test_b_dec_may_start_at_the_geometric_median():
    """There the gradient of the sum of distances vanishes: all tokens pull with the same force."""
    x = make_activations()
    sae = TopKSAE(D, M, K, normalize="none").double().fit(x, bias="median")
    difference = x - sae.b_dec.data
    pulls = difference / difference.norm(dim=1, keepdim=True)
    assert pulls.sum(0).norm() < 1e-4


def test_an_outlier_does_not_move_the_geometric_median():
    x = torch.tensor([[0.0, 0], [0, 0], [0, 0], [9, 9]])
    assert geometric_median(x).norm() < 1e-3


def test_sizes_that_cannot_be():
    with refuses("needs a width"):
        SparseAutoencoder(0, 4)
    with refuses("k must lie"):
        TopKSAE(4, 8, 9)
    with refuses("k must lie"):
        TopKSAE(4, 8, 0)
    with refuses("normalize"):
        TopKSAE(4, 8, 2, normalize="batch")


def test_activations_of_another_width():
    with refuses("width 5"):
        SparseAutoencoder(4, 8)(torch.ones(2, 5))


def test_activations_that_cannot_be_fitted():
    with refuses("finite"):
        SparseAutoencoder(4, 8).fit(torch.full((2, 4), torch.nan))
    with refuses("fit"):
        TopKSAE(4, 8, 2).fit(torch.ones(0, 4))
    with refuses("mean or the median"):
        SparseAutoencoder(4, 8).fit(torch.ones(2, 4), bias="mode")


# -------------------------------------------------------------------------------- the sparse path

# Some are found in groups of features, some not.
SIZES = [(64, 3), (64, 4), (64, 8), (4096, 32), (2048, 7), (40, 5), (61, 1), (96, 96)]


@pytest.mark.parametrize("m, k", SIZES)
def test_top_k(m, k):
    pre = randn(50, m).round(decimals=2)  # with ties
    values, ids = top_k(pre, k)
    assert torch.equal(pre.gather(1, ids), values)
    for row in ids.tolist():
        assert len(set(row)) == k
    largest = pre.sort(1).values[:, -k:]
    assert torch.equal(values.sort(1).values, largest)


def sparse_example():
    """K values of each of N rows and the features that they belong to: values, ids, and S [N, M].

    S is the same as a matrix; an id may repeat within a row.
    """
    values = randn(N, K)
    ids = torch.randint(M, (N, K), generator=seeded(0))
    S = torch.zeros(N, M).double()
    for n in range(N):
        for k in range(K):
            S[n, ids[n, k]] += values[n, k]
    return values, ids, S


def test_sparse_products_are_those_of_the_matrix():
    values, ids, S = sparse_example()
    W = randn(M, D, seed=1)
    y = randn(N, D, seed=2)
    torch.testing.assert_close(weighted_rows(values, ids, W), S @ W)
    torch.testing.assert_close(scattered(values, ids, y, M), S.T @ y)


@pytest.mark.parametrize("function", [dots, dots_in_place, dots_of_copies])
def test_sparse_dots_are_those_of_the_matrix(function):
    _, ids, _ = sparse_example()
    W = randn(M, D, seed=1)
    y = randn(N, D, seed=2)
    expected = (y @ W.T).gather(1, ids)
    torch.testing.assert_close(function(y, W, ids), expected)


def value_and_gradients(sparse, normalize, relu):
    """x^ and every gradient, that of the activations too, by the sparse or the dense path."""
    x = randn(200, 16, dtype=torch.float32)
    sae = TopKSAE(16, 2048, 8, normalize, relu).fit(x)
    sae.b_dec.data += 0.1 * randn(16, seed=3).float()
    sae.b_enc.data += 0.1 * randn(2048, seed=4).float()
    x.requires_grad_()
    if sparse:
        values, ids = sae.encode_topk(x)
        x_hat = sae.decode_topk(values, ids, sae.moments(x))
    else:
        x_hat, _ = sae(x)
    weight = randn(200, 16, seed=5, dtype=torch.float32)
    (x_hat * weight).sum().backward()
    parameter_gradients = [p.grad for p in sae.parameters()]
    return [x_hat.detach(), x.grad, *parameter_gradients]


@pytest.mark.parametrize("normalize, relu", [("dataset", True), ("token", False)])
def test_sparse_is_dense(normalize, relu):
    """To 1e-5 in float32, with so many features that top_k looks at them in groups."""
    dense = value_and_gradients(False, normalize, relu)
    sparse = value_and_gradients(True, normalize, relu)
    assert len(dense) == 6
    for expected, found in zip(dense, sparse, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_for_the_product():
    x = randn(300, 64, dtype=torch.float32)
    sae = TopKSAE(64, 256, 4).fit(x)
    values, ids = sae.encode_topk(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, rounded_ids = sae.encode_topk(x)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, values)

    # Almost the same features fire, with almost the same sum.
    n_shared = 0
    for row, rounded_row in zip(ids.tolist(), rounded_ids.tolist()):
        n_shared += len(set(row) & set(rounded_row))
    assert n_shared > 0.97 * ids.numel()
    assert (rounded.sum() / values.sum() - 1).abs() < 1e-2


# -------------------------------------------------------------------------------------- the losses


def squared_error(sae, x):
    """mean over 9 tokens and D coordinates of ((x - x^) / scale)^2."""
    x_hat, _ = sae(x)
    return ((x - x_hat) / sae.scale).square().sum() / (9 * D)


def test_the_l1_loss():
    x = make_activations(9, seed=3)
    sae = make("vanilla")
    _, f = sae(x)
    error = squared_error(sae, x)
    expected = error + 0.3 * f.sum() / 9
    loss, stats = sae_loss(sae, x, l1=0.3)
    assert loss.item() == pytest.approx(expected.item())
    assert stats["mse"].item() == pytest.approx(error.item())
    n_active = (f > 0).sum().item()
    assert stats["l0"].item() == pytest.approx(n_active / 9)
    assert stats["fired"].tolist() == (f > 0).sum(0).tolist()
    # They are numbers to report: none holds on to the graph.
    assert not any(value.requires_grad for value in stats.values())


def test_losses_of_parts_of_a_batch_add_up():
    x = make_activations(9, seed=3)
    sae = make("vanilla")
    loss, _ = sae_loss(sae, x, l1=0.3)
    total = 0.0
    for part in x.split(4):  # three parts
        part_loss, _ = sae_loss(sae, part, l1=0.3, n_tokens=9)
        total += part_loss.item()
    assert total == pytest.approx(loss.item())


def test_the_topk_loss_is_the_error_alone():
    x = make_activations(9, seed=3)
    sae = make("topk")
    loss, _ = sae_loss(sae, x)
    assert loss.item() == pytest.approx(squared_error(sae, x).item())


def standardised_error(sae, x):
    """z [9, D], and z - z^: what the autoencoder leaves."""
    z = (x - sae.mean) / sae.scale
    z_hat = (sae(x)[0] - sae.mean) / sae.scale
    return z, z - z_hat


def choose_dead(n_dead):
    """n_dead features at random, as a mask [M]."""
    dead = torch.zeros(M, dtype=torch.bool)
    order = torch.randperm(M, generator=seeded(0))
    dead[order[:n_dead]] = True
    return dead


def auxiliary_loss_by_hand(sae, z, error, dead, k_aux):
    """|e - e^|^2 over the variance of e, e^ from the k_aux strongest dead features, token by token.

    Gao et al. 2024, appendix A.2; the variance is that of all numbers of e (their code).
    """
    total = 0.0
    for t in range(9):
        pre = {}
        for j in range(M):
            if dead[j]:
                pre[j] = sae.W_enc[j] @ (z[t] - sae.b_dec) + sae.b_enc[j]
        strongest = sorted(pre, key=lambda j: -pre[j])[:k_aux]
        e_hat = torch.zeros(D).double()
        for j in strongest:
            e_hat = e_hat + pre[j].clamp(min=0) * sae.W_dec[j]
        total += (error[t] - e_hat).square().sum().item()

    numbers = error.flatten().tolist()
    mean = sum(numbers) / len(numbers)
    variance = sum((number - mean) ** 2 for number in numbers) / len(numbers)
    return total / D / 9 / variance


every_death = pytest.mark.parametrize("n_dead, k_aux", [(6, 512), (20, 3)])


@every_death
def test_auxiliary_loss(monkeypatch, n_dead, k_aux):
    monkeypatch.setattr(sae_module, "AUX_K", k_aux)
    sae = make("topk")
    x = make_activations(9, seed=3)
    dead = choose_dead(n_dead)
    z, error = standardised_error(sae, x)
    expected = auxiliary_loss_by_hand(sae, z, error, dead, k_aux)
    loss = auxiliary_loss(sae, z, error, dead).item()
    assert loss == pytest.approx(expected)

    # A 32nd of it is added to the loss.
    without, _ = sae_loss(sae, x)
    with_it, _ = sae_loss(sae, x, dead=dead)
    assert (with_it - without).item() == pytest.approx(loss / 32)


def test_auxiliary_losses_of_two_processes_add_up():
    """Each has a share of the batch, and both divide by the variance of the whole batch's error."""
    sae = make("topk")
    dead = choose_dead(6)
    z, error = standardised_error(sae, make_activations(9, seed=3))
    shares = [slice(0, 4), slice(4, 9)]
    total = 0.0
    for share, other in zip(shares, reversed(shares)):
        numbers = error[other].detach().numpy()
        sums_of_other = torch.tensor([numbers.sum(), (numbers**2).sum(), numbers.size])

        def reduce(sums):
            sums += sums_of_other

        total += auxiliary_loss(sae, z[share], error[share], dead, 9, reduce).item()
    assert total == pytest.approx(auxiliary_loss(sae, z, error, dead).item())


@every_death
def test_the_auxiliary_loss_moves_dead_features_alone(monkeypatch, n_dead, k_aux):
    """What the living leave is a constant to it."""
    monkeypatch.setattr(sae_module, "AUX_K", k_aux)
    sae = make("topk")
    dead = choose_dead(n_dead)
    z, error = standardised_error(sae, make_activations(9, seed=3))
    auxiliary_loss(sae, z, error, dead).backward()
    assert (sae.W_dec.grad[~dead] == 0).all()
    assert (sae.W_dec.grad[dead] != 0).any()
    assert (sae.W_enc.grad[~dead] == 0).all()


ALL_DEAD = torch.ones(M, dtype=torch.bool)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_auxiliary_loss_is_a_share_of_the_error(size):
    """An error that no dead feature explains costs about 1, whatever its size."""
    sae = make("topk")
    sae.b_enc.data -= 100  # no feature fires: e^ = 0
    z = randn(9, D, seed=3)
    error = randn(9, D, seed=4)
    error -= error.mean()
    assert auxiliary_loss(sae, z, size * error, ALL_DEAD).item() == pytest.approx(1)


@pytest.mark.parametrize("constant", [0.0, 0.1, 3e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auxiliary_loss_of_an_error_without_variance(constant, dtype):
    """It is 0 and so are its gradients, also where rounding would leave a variance of 1e-17."""
    sae = make("topk", dtype=dtype)
    z = randn(9, D, seed=3, dtype=dtype)
    error = torch.full_like(z, constant)
    loss = auxiliary_loss(sae, z, error, ALL_DEAD)
    loss.backward()
    assert loss.item() == 0
    for parameter in (sae.W_enc, sae.W_dec, sae.b_enc):
        assert (parameter.grad == 0).all()


def measures_by_hand(x, x_hat, f):
    """FVU, L0, density and the share of dead features of 50 tokens, number by number."""
    means = [sum(column) / 50 for column in x.T.tolist()]
    residual = 0.0
    total = 0.0
    for t in range(50):
        for i in range(D):
            residual += (x[t, i] - x_hat[t, i]).item() ** 2
            total += (x[t, i].item() - means[i]) ** 2
    counts = [0] * M  # how often each feature fires
    for t in range(50):
        for j in range(M):
            if f[t, j].item() != 0:
                counts[j] += 1
    return {
        "fvu": residual / total,
        "l0": sum(counts) / 50,
        "density": [count / 50 for count in counts],
        "dead": counts.count(0) / M,
    }


@pytest.mark.parametrize("kind", ["vanilla", "topk"])
def test_measures(kind):
    """Sums over batches of unequal size make the measures of all tokens."""
    x = make_activations(50, seed=7)
    sae = make(kind)
    sae.b_enc.data[:4] -= 100  # these never fire
    x_hat, f = sae(x)
    x_hat = x_hat.detach()
    expected = measures_by_hand(x, x_hat, f)

    sums = {}
    for part in x.split(16):
        for name, value in tally(sae, part).items():
            sums[name] = sums.get(name, 0) + value
    found = measures(sums)
    assert found["fvu"] == pytest.approx(expected["fvu"])
    assert fvu(x, x_hat) == pytest.approx(expected["fvu"])
    assert found["l0"] == pytest.approx(expected["l0"])
    assert found["density"].tolist() == pytest.approx(expected["density"])
    assert found["dead"] == pytest.approx(expected["dead"])
    assert found["dead"] >= 0.1

    # Of numbers in float32 the sums are in float64 too.
    x = x.float()
    x_hat = x_hat.float()
    assert fvu(x, x_hat) == pytest.approx(fvu(x.double(), x_hat.double()), rel=1e-14)
    for value in tally(sae.float(), x).values():
        assert value.dtype == torch.float64


def test_fvu_of_the_perfect_and_of_the_mean():
    x = make_activations(50, seed=7)
    assert fvu(x, x) == 0
    mean = x.mean(0).expand_as(x)
    assert fvu(x, mean) == pytest.approx(1)


# ---------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["vanilla", "tied", "topk"])
def test_unit_norm_after_every_step(kind):
    sae = make(kind)
    optimizer = adam(sae)
    for step in range(5):
        train_step(sae, optimizer, make_activations(seed=step), lr=0.05, l1=0.01)
        norms = sae.W_dec.norm(dim=1)
        assert (norms - 1).abs().max() < 1e-12
        assert torch.equal(sae.decoder_directions(), F.normalize(sae.W_dec.detach()))


def test_parallel_gradient_is_removed():
    sae = make("vanilla")
    loss, _ = sae_loss(sae, make_activations())
    loss.backward()
    before = sae.W_dec.grad.clone()
    sae.remove_parallel()
    directions = sae.W_dec.detach()
    parallel_before = (before * directions).sum(1).abs().max()
    parallel_after = (sae.W_dec.grad * directions).sum(1).abs().max()
    assert parallel_after < 1e-12 < parallel_before

    # What was taken out is parallel to the direction.
    removed = before - sae.W_dec.grad
    lengths = (removed * directions).sum(1, keepdim=True)
    torch.testing.assert_close(removed, lengths * directions)


def features_that_fire(sae, x):
    """The features with a value above 0 at any token."""
    values, ids = sae.encode_topk(x)
    return set(ids[values > 0].tolist())


def test_the_optimizer_sees_no_parallel_gradient():
    """Else Adam's running means would fill up with what normalise() undoes."""
    sae = make("vanilla")
    optimizer = adam(sae)
    directions = sae.W_dec.detach().clone()
    train_step(sae, optimizer, make_activations(), lr=0.05)
    running_mean = optimizer.state[sae.W_dec]["exp_avg"]
    assert (running_mean * directions).sum(1).abs().max() < 1e-12
    assert running_mean.abs().max() > 1e-6


def test_dead_features_are_counted():
    """A feature that no token moves is dead after `dead_after` tokens: here, two batches."""
    sae = make("topk", dtype=torch.float32)
    sae.b_enc.data[3] = -30
    optimizer = adam(sae)
    x = make_activations().float()
    silent = torch.zeros(M, dtype=torch.long)
    for step in range(1, 4):
        expected = [step * N] * M
        for j in features_that_fire(sae, x):
            expected[j] = 0
        stats = train_step(sae, optimizer, x, lr=0.0, silent=silent, dead_after=2 * N)
        assert silent.tolist() == expected
        assert silent[3] == step * N
        # It was silent for two batches before the third.
        assert (stats["dead"] > 0) == (step == 3)


def test_dead_features_get_a_gradient():
    """AuxK moves them again."""
    sae = make("topk", dtype=torch.float32)
    sae.b_enc.data[3] = -1
    silent = torch.zeros(M, dtype=torch.long)
    silent[3] = 10**6
    before = sae.W_enc.detach()[3].clone()
    x = make_activations().float()
    train_step(sae, adam(sae), x, lr=0.1, silent=silent, dead_after=2 * N)
    assert not torch.equal(before, sae.W_enc[3])


def with_a_lost_feature() -> tuple[TopKSAE, torch.Tensor, torch.Tensor]:
    """Make an autoencoder of a large part of x and a dead feature that might explain the rest.

    Each token is 5 to 6 along one of four axes, which features 0 to 3 know; every 50th is .45 along
    the first and 1 along axis 5. Only feature 4 has something of that, .3: less than feature 0 has.
    -> autoencoder with k = 1, x [400, 8], and x with much more for feature 4 and its neighbours
    """
    generator = seeded(0)
    n, d = 400, 8
    x = torch.zeros(n, d)
    x[torch.arange(n), torch.arange(n) % 4] = 5 + torch.rand(n, generator=generator)
    x[::50] = 0.0
    x[::50, 0] = 0.45
    x[::50, 5] = 1.0
    early_x = x.clone()
    early_x[:, 6] += 2 * torch.rand(n, generator=generator)
    early_x[:, 7] += torch.randn(n, generator=generator)
    axes = torch.eye(d)
    sae = TopKSAE(d, 5, 1, normalize="none")
    sae.W_dec.data[:4] = axes[:4]
    sae.W_dec.data[4] = 0.3 * axes[5] + 0.91**0.5 * axes[6]
    sae.W_enc.data.copy_(sae.W_dec.data)
    return sae, x, early_x


def train_with_a_lost_feature(dead_after):
    """Train on x after feature 4 has died -> at which of the 400 tokens it fires then."""
    sae, x, early_x = with_a_lost_feature()
    optimizer = adam(sae)
    silent = torch.zeros(5, dtype=torch.long)
    # Nothing moves but Adam's memory, of large gradients.
    for _ in range(5):
        train_step(sae, optimizer, early_x, lr=0.0)
    silent[4] = 10**6
    x_hat, f = sae(x)
    assert fvu(x, x_hat) < 1e-3
    assert not f[:, 4].any()
    for _ in range(100):
        train_step(sae, optimizer, x, lr=2e-3, silent=silent, dead_after=dead_after)
    return sae.encode(x)[:, 4] > 0


def test_a_dead_feature_comes_back_where_little_is_left_to_explain():
    """With AuxK a feature fires again on what the others leave, 0.1% of the variance.

    Adam remembers the large gradients of the time when the feature was alive, so that a pull in
    proportion to the error, which is small now, would hardly move it.
    """
    rare = torch.zeros(400, dtype=torch.bool)
    rare[::50] = True
    assert torch.equal(train_with_a_lost_feature(dead_after=10**5), rare)


def test_without_auxk_a_dead_feature_stays_dead():
    fires = train_with_a_lost_feature(dead_after=float("inf"))
    assert not fires.any()


def dead_features() -> torch.Tensor:
    """How long each feature of test_ranks has been silent: every third is dead."""
    silent = torch.zeros(M, dtype=torch.long)
    silent[::3] = 10**6
    return silent


def uneven_batch() -> torch.Tensor:
    """Activations [N, D] that vary ten times as much in their second half."""
    x = make_activations()
    x[N // 2 :] = 10 * x[N // 2 :]
    return x


def write_share_of_gradients(path):
    """One process's part of test_ranks; the first writes down what all have in the end."""
    dist = setup("cpu")
    sae = make("topk")
    x = dist.share(uneven_batch())

    def add_over_processes(tensor):
        tensor.copy_(dist.sum(tensor))

    stats = gradients(
        sae,
        x,
        silent=dead_features(),
        dead_after=10**5,
        n_tokens=N,
        reduce=add_over_processes,
    )
    if dist.main:
        grads = [p.grad for p in sae.parameters()]
        torch.save({"loss": stats["loss"], "grads": grads}, path)


@pytest.mark.slow
def test_ranks(tmp_path):
    """Two processes have the loss and the gradients of one, with dead features.

    The errors of their shares differ in size.
    """
    processes = ranks(2, write_share_of_gradients, tmp_path / "two.pt")
    join(*processes)
    two = torch.load(tmp_path / "two.pt")
    sae = make("topk")
    stats = gradients(sae, uneven_batch(), silent=dead_features(), dead_after=10**5)
    assert two["loss"] == pytest.approx(stats["loss"], rel=1e-9)
    for parameter, grad in zip(sae.parameters(), two["grads"], strict=True):
        close(grad, parameter.grad)


def test_gradients_of_two_shares_add_up_to_the_step_of_the_whole_batch():
    x = make_activations()
    whole = make("topk")
    train_step(whole, adam(whole), x, lr=0.01)

    # The first share's sums are written down, and added to the second's.
    first = make("topk")
    sums_of_first = []

    def write_down(tensor):
        sums_of_first.append(tensor.clone())

    train_step(first, adam(first), x[:10], lr=0.0, n_tokens=N, reduce=write_down)
    second = make("topk")
    answers = iter(sums_of_first)

    def add_first(tensor):
        tensor.add_(next(answers))

    stats = train_step(second, adam(second), x[10:], lr=0.01, n_tokens=N, reduce=add_first)
    for expected, found in zip(whole.parameters(), second.parameters(), strict=True):
        close(expected, found)
    assert stats["l0"] == pytest.approx(K, abs=1.0)


def known_dictionary(generator):
    """64 directions [64, 32], and 20,000 tokens [20000, 32] that are sums of about 3 of them."""
    dictionary = F.normalize(torch.randn(64, 32, generator=generator))
    is_active = torch.rand(20_000, 64, generator=generator) < 3 / 64
    codes = is_active * (0.5 + torch.rand(20_000, 64, generator=generator))
    noise = 0.02 * torch.randn(20_000, 32, generator=generator)
    return dictionary, 7 * (codes @ dictionary + noise) + 2


@pytest.mark.parametrize("kind", [pytest.param("topk", marks=pytest.mark.slow), "l1"])
def test_known_dictionary(kind):
    """At least 90% of the directions are found with a cosine above 0.9."""
    generator = seeded(0)
    dictionary, x = known_dictionary(generator)
    if kind == "topk":
        sae = TopKSAE(32, 128, 4)
    else:
        sae = SparseAutoencoder(32, 128)
    sae.fit(x)
    optimizer = adam(sae)
    silent = torch.zeros(128, dtype=torch.long)
    for step in range(400):
        index = torch.randint(20_000, (512,), generator=generator)
        lr = 5e-3 * (1 - step / 400)
        train_step(sae, optimizer, x[index], lr, l1=0.03, silent=silent, dead_after=20_000)

    cosines = dictionary @ sae.decoder_directions().T  # [64, 128]
    is_found = cosines.amax(1) > 0.9
    assert is_found.float().mean() >= 0.9
    result = measures(tally(sae, x[:4000]))
    assert result["fvu"] < 0.15
    assert result["l0"] < 8

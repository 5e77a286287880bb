"""Sparse autoencoders against loops in float64, dense autograd, and data whose dictionary is known."""

import pytest
import torch
import torch.nn.functional as F
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
    train_step,
)
from nanorlhf.sparse import dots, dots_in_place, dots_of_copies, scattered, top_k, weighted_rows

D, M, K, N = 12, 40, 5, 30


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(kind, normalize="dataset", relu=True, dtype=torch.float64, fit=True):
    """An autoencoder whose parameters are all different from where they start."""
    sae = TopKSAE(D, M, K, normalize, relu) if kind == "topk" else SparseAutoencoder(D, M, kind == "tied", normalize)
    sae = sae.to(dtype)
    if fit:
        sae.fit(acts())
    for i, p in enumerate(sae.parameters()):
        p.data += 0.1 * randn(*p.shape, seed=10 + i)
    sae.normalise()
    return sae


def acts(n=N, seed=1):
    return 3 * randn(n, D, seed=seed) + 5 + randn(D, seed=2)


# ------------------------------------------------------------------------------------------------------------------ the equations


def by_hand(sae, kind, x, normalize, relu):
    """One token at a time, one number at a time. -> x^, f"""
    W_d = sae.W_dec.tolist()
    W_e = W_d if kind == "tied" else sae.W_enc.tolist()
    b_e, b_d = sae.b_enc.tolist(), sae.b_dec.tolist()
    outs, codes = [], []
    for row in x.tolist():
        if normalize == "token":
            mu = [sum(row) / D] * D
            s = (sum((v - mu[0]) ** 2 for v in row) / (D - 1)) ** 0.5 + 1e-6
        elif normalize == "dataset":
            rows = acts().tolist()
            mu = [sum(r[i] for r in rows) / N for i in range(D)]
            s = (sum((r[i] - mu[i]) ** 2 for r in rows for i in range(D)) / (N * D)) ** 0.5
        else:
            mu, s = [0.0] * D, 1.0
        z = [(v - m) / s for v, m in zip(row, mu)]
        pre = [sum(w[i] * (z[i] - b_d[i]) for i in range(D)) + b for w, b in zip(W_e, b_e)]
        if kind == "topk":
            kept = sorted(range(M), key=lambda j: -pre[j])[:K]
            f = [(max(p, 0) if relu else p) if j in kept else 0.0 for j, p in enumerate(pre)]
        else:
            f = [max(p, 0) for p in pre]
        z_hat = [sum(f[j] * W_d[j][i] for j in range(M)) + b_d[i] for i in range(D)]
        outs.append([v * s + m for v, m in zip(z_hat, mu)])
        codes.append(f)
    return torch.tensor(outs, dtype=torch.float64), torch.tensor(codes, dtype=torch.float64)


@pytest.mark.parametrize("normalize", ["dataset", "token", "none"])
@pytest.mark.parametrize("kind, relu", [("vanilla", True), ("tied", True), ("topk", True), ("topk", False)])
def test_equations(kind, relu, normalize):
    sae, x = make(kind, normalize, relu), acts(7, seed=3)
    if kind == "topk":
        sae.b_enc.data -= 2 if normalize != "none" else 10  # so that some of the k largest are negative
    x_hat, f = sae(x)
    expected, code = by_hand(sae, kind, x, normalize, relu)
    torch.testing.assert_close(f, code, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x_hat, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sae.decode(f, sae.moments(x)), expected)
    assert sae(x.view(1, 7, 1, D))[0].shape == (1, 7, 1, D)
    if kind == "topk" and not relu:
        assert (f != 0).sum(1).tolist() == [K] * 7 and (f < 0).any()
    if kind == "topk":
        values, ids = sae.encode_topk(x.view(7, 1, D))
        torch.testing.assert_close(torch.zeros(7, 1, M).double().scatter(2, ids, values)[:, 0], code, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sae.decode_topk(values, ids, sae.moments(x[:, None]))[:, 0], expected, rtol=1e-9, atol=1e-9)


def test_fit():
    """After fitting, the sample has mean 0 and, over all coordinates, variance 1; b_dec is its mean or geometric median."""
    sae = SparseAutoencoder(D, M).double().fit(acts())
    z = sae.standardise(acts(), *sae.moments(acts()))
    assert z.mean(0).abs().max() < 1e-12 and z.square().mean().item() == pytest.approx(1)
    torch.testing.assert_close(SparseAutoencoder(D, M, normalize="none").double().fit(acts()).b_dec.data, acts().mean(0))
    median = TopKSAE(D, M, K, normalize="none").double().fit(acts(), bias="median").b_dec.data
    pulls = (acts() - median) / (acts() - median).norm(dim=1, keepdim=True)  # the gradient of the sum of distances
    assert pulls.sum(0).norm() < 1e-4
    assert geometric_median(torch.tensor([[0.0, 0], [0, 0], [0, 0], [9, 9]])).norm() < 1e-3  # an outlier does not move it


@pytest.mark.parametrize(
    "make_it, match",
    [
        (lambda: SparseAutoencoder(0, 4), "needs a width"), (lambda: TopKSAE(4, 8, 9), "k must lie"),
        (lambda: TopKSAE(4, 8, 0), "k must lie"),
        (lambda: TopKSAE(4, 8, 2, normalize="batch"), "normalize"), (lambda: SparseAutoencoder(4, 8)(torch.ones(2, 5)), "width 5"),
        (lambda: SparseAutoencoder(4, 8).fit(torch.full((2, 4), torch.nan)), "finite"),
        (lambda: TopKSAE(4, 8, 2).fit(torch.ones(0, 4)), "fit"),
        (lambda: SparseAutoencoder(4, 8).fit(torch.ones(2, 4), bias="mode"), "mean or the median"),
    ],
)  # fmt: skip
def test_errors(make_it, match):
    with pytest.raises(ValueError, match=match):
        make_it()


# ---------------------------------------------------------------------------------------------------------------- the sparse path


@pytest.mark.parametrize("m, k", [(64, 3), (64, 4), (64, 8), (4096, 32), (2048, 7), (40, 5), (61, 1), (96, 96)])  # in groups or not
def test_top_k(m, k):
    pre = randn(50, m).round(decimals=2)  # with ties
    values, ids = top_k(pre, k)
    assert torch.equal(pre.gather(1, ids), values) and all(len(set(row)) == k for row in ids.tolist())
    assert torch.equal(values.sort(1).values, pre.sort(1).values[:, -k:])


def test_sparse_products():
    values, W, y = randn(N, K), randn(M, D, seed=1), randn(N, D, seed=2)
    ids = torch.randint(M, (N, K), generator=torch.Generator().manual_seed(0))
    S = torch.zeros(N, M).double()
    for n in range(N):
        for j in range(K):  # ids of a row may repeat here
            S[n, ids[n, j]] += values[n, j]
    torch.testing.assert_close(weighted_rows(values, ids, W), S @ W)
    torch.testing.assert_close(scattered(values, ids, y, M), S.T @ y)
    for function in (dots, dots_in_place, dots_of_copies):
        torch.testing.assert_close(function(y, W, ids), (y @ W.T).gather(1, ids))


@pytest.mark.parametrize("normalize, relu", [("dataset", True), ("token", False)])
def test_sparse_is_dense(normalize, relu):
    """Value and every gradient, that of the activations too, to 1e-5 in float32, with latents in groups for top_k."""
    x, weight, results = randn(200, 16, dtype=torch.float32), randn(200, 16, seed=5, dtype=torch.float32), []
    for sparse in (False, True):
        sae = TopKSAE(16, 2048, 8, normalize, relu).fit(x)
        sae.b_dec.data += 0.1 * randn(16, seed=3).float()
        sae.b_enc.data += 0.1 * randn(2048, seed=4).float()
        leaf = x.clone().requires_grad_()
        x_hat = sae.decode_topk(*sae.encode_topk(leaf), sae.moments(leaf)) if sparse else sae(leaf)[0]
        (x_hat * weight).sum().backward()
        results.append([x_hat.detach(), leaf.grad, *(p.grad for p in sae.parameters())])
    assert len(results[0]) == 6
    for dense, sparse in zip(*results, strict=True):
        assert dense.abs().max() > 0
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_for_the_product():
    x = randn(300, 64, dtype=torch.float32)
    sae = TopKSAE(64, 256, 4).fit(x)
    values, ids = sae.encode_topk(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, rounded_ids = sae.encode_topk(x)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, values)
    shared = sum(len(set(a) & set(b)) for a, b in zip(ids.tolist(), rounded_ids.tolist()))
    assert shared > 0.97 * ids.numel() and (rounded.sum() / values.sum() - 1).abs() < 1e-2


# --------------------------------------------------------------------------------------------------------------------- the losses


def test_losses():
    x = acts(9, seed=3)
    sae = make("vanilla")
    x_hat, f = sae(x)
    error = ((x - x_hat) / sae.scale).square().sum() / (9 * D)
    loss, stats = sae_loss(sae, x, l1=0.3)
    assert loss.item() == pytest.approx((error + 0.3 * f.sum() / 9).item()) and stats["mse"].item() == pytest.approx(error.item())
    assert stats["l0"].item() == pytest.approx((f > 0).sum().item() / 9) and stats["fired"].tolist() == (f > 0).sum(0).tolist()
    parts = [sae_loss(sae, part, l1=0.3, n_tokens=9)[0] for part in x.split(4)]  # of one batch in three parts
    assert sum(parts).item() == pytest.approx(loss.item())
    sae = make("topk")
    assert sae_loss(sae, x)[0].item() == pytest.approx(((x - sae(x)[0]) / sae.scale).square().sum().item() / (9 * D))


@pytest.mark.parametrize("n_dead, k_aux", [(6, 512), (20, 3)])
def test_auxiliary_loss(monkeypatch, n_dead, k_aux):
    monkeypatch.setattr(sae_module, "AUX_K", k_aux)
    sae, x = make("topk"), acts(9, seed=3)
    dead = torch.zeros(M, dtype=torch.bool)
    dead[torch.randperm(M, generator=torch.Generator().manual_seed(0))[:n_dead]] = True
    z = (x - sae.mean) / sae.scale
    error = z - (sae(x)[0] - sae.mean) / sae.scale
    loss = auxiliary_loss(sae, z, error, dead)
    expected = 0.0
    for t in range(9):
        pre = {j: (sae.W_enc[j] @ (z[t] - sae.b_dec) + sae.b_enc[j]) for j in range(M) if dead[j]}
        best = sorted(pre, key=lambda j: -pre[j])[:k_aux]
        e_hat = sum(pre[j].clamp(min=0) * sae.W_dec[j] for j in best)
        expected += (error[t] - e_hat).square().sum() / D / 9
    numbers = error.flatten().tolist()
    mean = sum(numbers) / len(numbers)
    variance = sum((number - mean) ** 2 for number in numbers) / len(numbers)
    assert loss.item() == pytest.approx(expected.item() / variance)
    base, total = sae_loss(sae, x)[0], sae_loss(sae, x, dead=dead)[0]
    assert (total - base).item() == pytest.approx(loss.item() / 32)
    error = z - (sae(x)[0] - sae.mean) / sae.scale
    auxiliary_loss(sae, z, error, dead).backward()  # what the living leave is a constant to it
    assert (sae.W_dec.grad[~dead] == 0).all() and (sae.W_dec.grad[dead] != 0).any() and (sae.W_enc.grad[~dead] == 0).all()


def all_dead() -> torch.Tensor:
    return torch.ones(M, dtype=torch.bool)


def test_auxiliary_loss_is_a_share_of_the_error():
    """An error that no dead latent explains costs about 1, whatever its size."""
    sae, z = make("topk"), randn(9, D, seed=3)
    sae.b_enc.data -= 100  # no latent fires: e^ = 0
    error = randn(9, D, seed=4)
    error -= error.mean()
    for size in (1.0, 1e-3, 1e-6):
        assert auxiliary_loss(sae, z, size * error, all_dead()).item() == pytest.approx(1)


@pytest.mark.parametrize("constant", [0.0, 0.1, 3e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auxiliary_loss_of_an_error_without_variance(constant, dtype):
    """It is 0 and so are its gradients, also where rounding would leave a variance of 1e-17."""
    sae, z = make("topk", dtype=dtype), randn(9, D, seed=3, dtype=dtype)
    loss = auxiliary_loss(sae, z, torch.full_like(z, constant), all_dead())
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in (sae.W_enc, sae.W_dec, sae.b_enc))


def test_measures():
    """FVU, L0, density and dead latents of all batches, against plain loops; FVU of the mean is 1."""
    x = acts(50, seed=7)
    for kind in ("vanilla", "topk"):
        sae = make(kind)
        sae.b_enc.data[:4] -= 100  # these never fire
        parts = [tally(sae, part) for part in x.split(16)]
        result = measures({name: sum(part[name] for part in parts) for name in parts[0]})
        x_hat, f = (v.detach() for v in sae(x))
        mean = [sum(x[:, i].tolist()) / 50 for i in range(D)]
        residual = sum((x[t, i] - x_hat[t, i]).item() ** 2 for t in range(50) for i in range(D))
        total = sum((x[t, i].item() - mean[i]) ** 2 for t in range(50) for i in range(D))
        counts = [sum(f[t, j].item() != 0 for t in range(50)) for j in range(M)]
        assert result["fvu"] == pytest.approx(residual / total) and fvu(x, x_hat) == pytest.approx(residual / total)
        assert result["l0"] == pytest.approx(sum(counts) / 50) and result["density"].tolist() == pytest.approx([c / 50 for c in counts])
        assert result["dead"] == pytest.approx(sum(c == 0 for c in counts) / M) and result["dead"] >= 0.1
    assert fvu(x, x) == 0 and fvu(x, x.mean(0).expand_as(x)) == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["vanilla", "tied", "topk"])
def test_unit_norm_after_every_step(kind):
    sae = make(kind)
    optimizer = adam(sae)
    for step in range(5):
        train_step(sae, optimizer, acts(seed=step), lr=0.05, l1=0.01)
        assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-12
        assert torch.equal(sae.decoder_directions(), F.normalize(sae.W_dec.detach()))


def test_parallel_gradient_is_removed():
    sae = make("vanilla")
    sae_loss(sae, acts())[0].backward()
    before = sae.W_dec.grad.clone()
    sae.remove_parallel()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-12 < (before * sae.W_dec).sum(1).abs().max()
    moved = before - sae.W_dec.grad  # what was taken out is parallel to the direction
    torch.testing.assert_close(moved, (moved * sae.W_dec).sum(1, keepdim=True) * sae.W_dec.detach())


def test_dead_latents_are_counted_and_come_back():
    """A latent that no token moves is dead after `dead_after` tokens, and then AuxK gives it a gradient."""
    sae, silent = make("topk", dtype=torch.float32), torch.zeros(M, dtype=torch.long)
    sae.b_enc.data[3] = -30
    optimizer, x = adam(sae), acts().float()
    for step in range(1, 4):
        values, ids = sae.encode_topk(x)
        fires = {i for i, v in zip(ids.flatten().tolist(), values.flatten().tolist()) if v > 0}
        stats = train_step(sae, optimizer, x, lr=0.0, silent=silent, dead_after=2 * N)
        assert silent.tolist() == [0 if j in fires else step * N for j in range(M)] and 3 not in fires
        assert (stats["dead"] > 0) == (step == 3)  # silent for two batches before the third
    sae.b_enc.data[3] = -1
    silent.zero_()
    silent[3] = 10**6
    row = sae.W_enc.detach()[3].clone()
    train_step(sae, optimizer, x, lr=0.1, silent=silent, dead_after=2 * N)
    assert not torch.equal(row, sae.W_enc[3])


def with_a_lost_latent() -> tuple[TopKSAE, torch.Tensor, torch.Tensor]:
    """Make an autoencoder of a large part of x and a dead latent that might explain the small rest.

    Each token is 5 to 6 along one of four axes, which latents 0 to 3 know; every 50th is .45 along
    the first and 1 along axis 5, of which only latent 4 has something, .3: less than latent 0 has.
    -> autoencoder with k = 1, x [400, 8], and x with much more for latent 4 and its neighbours
    """
    generator = torch.Generator().manual_seed(0)
    n, d = 400, 8
    x = torch.zeros(n, d)
    x[torch.arange(n), torch.arange(n) % 4] = 5 + torch.rand(n, generator=generator)
    x[::50] = 0.0
    x[::50, 0] = 0.45
    x[::50, 5] = 1.0
    early_x = x.clone()
    early_x[:, 6] += 2 * torch.rand(n, generator=generator)
    early_x[:, 7] += torch.randn(n, generator=generator)
    sae = TopKSAE(d, 5, 1, normalize="none")
    sae.W_dec.data[:4] = torch.eye(d)[:4]
    sae.W_dec.data[4] = 0.3 * torch.eye(d)[5] + 0.91**0.5 * torch.eye(d)[6]
    sae.W_enc.data.copy_(sae.W_dec.data)
    return sae, x, early_x


@pytest.mark.parametrize("dead_after, comes_back", [(10**5, True), (float("inf"), False)])
def test_a_dead_latent_comes_back_where_little_is_left_to_explain(dead_after, comes_back):
    """With AuxK a latent fires again on what the others leave, 0.1% of the variance; without it never.

    Adam remembers the large gradients of the time when the latent was alive, so that a pull in
    proportion to the error, which is small now, would hardly move it.
    """
    sae, x, early_x = with_a_lost_latent()
    optimizer, silent = adam(sae), torch.zeros(5, dtype=torch.long)
    for _ in range(5):
        train_step(sae, optimizer, early_x, lr=0.0)  # nothing moves but Adam's memory
    silent[4] = 10**6
    assert fvu(x, sae(x)[0]) < 1e-3 and not sae.encode(x)[:, 4].any()
    for _ in range(100):
        train_step(sae, optimizer, x, lr=2e-3, silent=silent, dead_after=dead_after)
    fires = sae.encode(x)[:, 4] > 0
    rare = torch.zeros(400, dtype=torch.bool)
    rare[::50] = True
    assert torch.equal(fires, rare if comes_back else torch.zeros_like(rare))


def dead_latents() -> torch.Tensor:
    """How long each latent of test_ranks has been silent: every third is dead."""
    silent = torch.zeros(M, dtype=torch.long)
    silent[::3] = 10**6
    return silent


def uneven_batch() -> torch.Tensor:
    """Activations [N, D] that vary ten times as much in their second half."""
    x = acts()
    x[N // 2 :] = 10 * x[N // 2 :]
    return x


def write_share_of_gradients(path):
    """One process's part of test_ranks; the first writes down what all have in the end."""
    dist = setup("cpu")
    sae = make("topk")
    x = dist.share(uneven_batch())
    stats = gradients(
        sae, x, silent=dead_latents(), dead_after=10**5, n_tokens=N,
        reduce=lambda tensor: tensor.copy_(dist.sum(tensor)),
    )  # fmt: skip
    if dist.main:
        torch.save({"loss": stats["loss"], "grads": [p.grad for p in sae.parameters()]}, path)


@pytest.mark.slow
def test_ranks(tmp_path):
    """With dead latents, two processes have the loss and the gradients of one, though the errors of their shares differ in size."""
    join(*ranks(2, write_share_of_gradients, tmp_path / "two.pt"))
    two = torch.load(tmp_path / "two.pt")
    sae = make("topk")
    stats = gradients(sae, uneven_batch(), silent=dead_latents(), dead_after=10**5)
    assert two["loss"] == pytest.approx(stats["loss"], rel=1e-9)
    for p, grad in zip(sae.parameters(), two["grads"], strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-9)


def test_reduce():
    """Two shares of a batch, their gradients summed, give the step of the whole batch."""
    x, saes = acts(), [make("topk") for _ in range(3)]
    train_step(saes[0], adam(saes[0]), x, lr=0.01)
    heard = []
    train_step(saes[1], adam(saes[1]), x[:10], lr=0.0, n_tokens=N, reduce=lambda t: heard.append(t.clone()))
    answers = iter(heard)
    stats = train_step(saes[2], adam(saes[2]), x[10:], lr=0.01, n_tokens=N, reduce=lambda t: t.add_(next(answers)))
    for a, b in zip(saes[0].parameters(), saes[2].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert stats["l0"] == pytest.approx(K, abs=1.0)


@pytest.mark.parametrize("kind", ["topk", "l1"])
def test_known_dictionary(kind):
    """Data from 64 directions in 32 dimensions, 3 of them active: at least 90% are found with a cosine above 0.9."""
    generator = torch.Generator().manual_seed(0)
    dictionary = F.normalize(torch.randn(64, 32, generator=generator))
    codes = (torch.rand(20_000, 64, generator=generator) < 3 / 64) * (0.5 + torch.rand(20_000, 64, generator=generator))
    x = 7 * (codes @ dictionary + 0.02 * torch.randn(20_000, 32, generator=generator)) + 2
    sae = (TopKSAE(32, 128, 4) if kind == "topk" else SparseAutoencoder(32, 128)).fit(x)
    optimizer, silent = adam(sae), torch.zeros(128, dtype=torch.long)
    for step in range(400):
        index = torch.randint(20_000, (512,), generator=generator)
        train_step(sae, optimizer, x[index], 5e-3 * (1 - step / 400), l1=0.03, silent=silent, dead_after=20_000)
    found = (dictionary @ sae.decoder_directions().T).amax(1) > 0.9
    result = measures(tally(sae, x[:4000]))
    assert found.float().mean() >= 0.9 and result["fvu"] < 0.15 and result["l0"] < 8

"""Autoencoders on disk: the layout that SAELens reads, by its formula; back again; files that are broken or foreign."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanorlhf.errors import InputError
from nanorlhf.interp.sae_files import load_sae, save_sae
from nanorlhf.sae import SparseAutoencoder, TopKSAE

D, M, K = 6, 20, 3


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind, normalize="dataset"):
    sae = (
        TopKSAE(D, M, K, normalize, kind == "topk")
        if "topk" in kind
        else SparseAutoencoder(D, M, kind == "tied", normalize)
    )
    sae.fit(3 * randn(50, D) + 2)
    for i, p in enumerate(sae.parameters()):
        p.data += 0.2 * randn(*p.shape, seed=i + 1)
    sae.normalise()
    return sae


def saelens_formula(path, x):
    """What SAELens computes from the two files, written out. -> f, x^"""
    with open(path / "cfg.json") as f:
        cfg = json.load(f)
    w = load_file(path / "sae_weights.safetensors")
    assert set(w) == {"W_enc", "b_enc", "W_dec", "b_dec"} and w["W_enc"].shape == (
        cfg["d_in"],
        cfg["d_sae"],
    ) == (D, M)
    mu, std = 0.0, 1.0
    if cfg["normalize_activations"] == "layer_norm":
        mu = x.mean(-1, keepdim=True)
        std = (x - mu).std(-1, keepdim=True)
        x = (x - mu) / (std + 1e-5)
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    f = pre.relu()
    if cfg["architecture"] == "topk":
        assert cfg["rescale_acts_by_decoder_norm"] is False
        f = torch.where(pre >= pre.sort(-1).values[:, -cfg["k"], None], f, 0.0)
    return f, (f @ w["W_dec"] + w["b_dec"]) * std + mu


@pytest.mark.parametrize("normalize", ["dataset", "token", "none"])
@pytest.mark.parametrize("kind", ["vanilla", "tied", "topk", "topk_without_relu"])
def test_round_trip_and_layout(tmp_path, kind, normalize):
    sae, x = make(kind, normalize), 3 * randn(40, D, seed=9) + 2
    save_sae(sae, str(tmp_path / "a" / "sae"), layer=3, site="mlp")
    assert os.listdir(tmp_path / "a") == ["sae"]
    assert sorted(os.listdir(tmp_path / "a" / "sae")) == ["cfg.json", "sae_weights.safetensors"]
    loaded = load_sae(str(tmp_path / "a" / "sae"), width=D)
    assert type(loaded) is type(sae) and (loaded.normalize, loaded.tied) == (
        sae.normalize,
        sae.tied,
    )
    x_hat, f = sae(x)
    for a, b in zip(loaded(x), (x_hat, f), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(M))  # it can be trained on
    with open(tmp_path / "a" / "sae" / "cfg.json") as file:
        cfg = json.load(file)
    assert cfg["metadata"]["layer"] == 3 and cfg["metadata"]["site"] == "mlp"
    if kind == "topk_without_relu":
        assert loaded.relu is False and cfg["architecture"] not in ("topk", "standard")
    else:
        for a, b in zip(saelens_formula(tmp_path / "a" / "sae", x), (f, x_hat), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_firing_rates(tmp_path):
    rates = torch.tensor([0.0, 1e-3, 1.0] + [0.25] * (M - 3), dtype=torch.float64)
    save_sae(make("topk"), str(tmp_path / "sae"), rates, layer=3)
    logs = load_file(tmp_path / "sae" / "sparsity.safetensors")[
        "sparsity"
    ]  # SAELens' name for log10(rate + 1e-10)
    torch.testing.assert_close(logs[:3], torch.tensor([-10.0, -3.0, 0.0]), rtol=0, atol=1e-5)


def test_saving_again_replaces(tmp_path):
    save_sae(make("vanilla"), str(tmp_path / "sae"))
    save_sae(make("topk"), str(tmp_path / "sae"))
    assert isinstance(load_sae(str(tmp_path / "sae")), TopKSAE) and os.listdir(tmp_path) == ["sae"]


def test_foreign(tmp_path):
    """One that SAELens wrote: decoder rows of any length, no notes of ours."""
    tensors = {
        "W_enc": randn(D, M),
        "b_enc": randn(M),
        "W_dec": 2 * randn(M, D, seed=1),
        "b_dec": randn(D),
    }
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(
        json.dumps(
            {"architecture": "standard", "d_in": D, "d_sae": M, "normalize_activations": "none"}
        )
    )
    sae, x = load_sae(str(tmp_path)), randn(7, D, seed=3)
    for a, b in zip(saelens_formula(tmp_path, x), reversed(sae(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def change(path, **fields):
    cfg = json.loads((path / "cfg.json").read_text())
    (path / "cfg.json").write_text(json.dumps({**cfg, **fields}))


def ours(path, **fields):
    """Change what cfg.json says of our own standardisation."""
    notes = json.loads((path / "cfg.json").read_text())["metadata"]
    change(path, metadata={**notes, "nanorlhf": {**notes["nanorlhf"], **fields}})


def weights(path, **tensors):
    save_file(
        {**load_file(path / "sae_weights.safetensors"), **tensors}, path / "sae_weights.safetensors"
    )


@pytest.mark.parametrize(
    "harm, match",
    [
        (lambda p: (p / "cfg.json").unlink(), "cfg.json is missing"), (lambda p: (p / "cfg.json").write_text("{"), "not JSON"),
        (lambda p: (p / "cfg.json").write_text("[]"), "not a JSON object"),
        (lambda p: change(p, architecture="gated"), "'gated' is not"),
        (lambda p: change(p, architecture="standard", activation_fn_str="topk"), "'topk' is not computed"),
        (lambda p: change(p, k=0), "k must be"),
        (lambda p: change(p, k=M + 1), "k must lie"), (lambda p: change(p, d_in="6"), "d_in must be"),
        (lambda p: change(p, d_in=7), r"W_enc is \[6, 20\].*\[7, 20\]"),
        (lambda p: change(p, normalize_activations="x"), "'x' is not computed"),
        (lambda p: change(p, rescale_acts_by_decoder_norm=True), "rescale"),
        (lambda p: change(p, apply_b_dec_to_input=False), "apply_b_dec"),
        (lambda p: (p / "sae_weights.safetensors").unlink(), "safetensors is missing"),
        (lambda p: (p / "sae_weights.safetensors").write_bytes(b"12345678901"), "cannot be read"),
        (lambda p: change(p, metadata="x"), "metadata cannot be 'x'"), (lambda p: change(p, architecture=3), "architecture cannot be 3"),
        (lambda p: change(p, metadata={"layer": "1"}), "layer cannot be '1'"), (lambda p: change(p, metadata={"model": 5}), "model cannot be"),
        (lambda p: change(p, metadata={"nanorlhf": "x"}), "nanorlhf cannot be 'x'"),
        (lambda p: ours(p, scale="1"), "scale cannot be '1'"), (lambda p: ours(p, scale=torch.nan), "NaN is no finite number"),
        (lambda p: ours(p, scale=0), "by a scale of 0"), (lambda p: ours(p, scale=-2.0), "by a scale of -2"),
        (lambda p: ours(p, normalize="x"), "no standardisation 'x'"), (lambda p: ours(p, tied=1), "tied cannot be 1"),
        (lambda p: change(p, k=True), "k must be"), (lambda p: change(p, d_sae=20.0), "d_sae must be"),
        (lambda p: weights(p, W_enc=torch.ones(D, M, dtype=torch.int32)), "W_enc holds int32"),
        (lambda p: weights(p, b_enc=torch.full((M,), torch.nan)), "b_enc holds"), (lambda p: weights(p, W_dec=randn(3, D)), "W_dec is"),
    ],
)  # fmt: skip
def test_broken(tmp_path, harm, match):
    save_sae(make("topk"), str(tmp_path / "sae"))
    harm(tmp_path / "sae")
    with pytest.raises(InputError, match=match):
        load_sae(str(tmp_path / "sae"))


def test_another_width(tmp_path):
    save_sae(make("topk"), str(tmp_path / "sae"))
    with pytest.raises(InputError, match="width 6, not 8"):
        load_sae(str(tmp_path / "sae"), width=8)

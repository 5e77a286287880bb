"""Autoencoders on disk: the layout that SAELens reads, by its formula; back again; files that are
broken or foreign.

    D width of the activations, M features, K of them that a TopK keeps
"""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanorlhf.errors import InputError
from nanorlhf.interp.sae_files import load_sae, save_sae
from nanorlhf.sae import SparseAutoencoder, TopKSAE

D = 6
M = 20
K = 3
NAN = float("nan")

each_kind = pytest.mark.parametrize("kind", ["vanilla", "tied", "topk", "topk_without_relu"])
each_normalize = pytest.mark.parametrize("normalize", ["dataset", "token", "none"])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_sae(kind, normalize="dataset"):
    """An autoencoder with random weights, its normalisation fitted to activations."""
    if kind == "topk":
        sae = TopKSAE(D, M, K, normalize, relu=True)
    elif kind == "topk_without_relu":
        sae = TopKSAE(D, M, K, normalize, relu=False)
    else:
        sae = SparseAutoencoder(D, M, tied=kind == "tied", normalize=normalize)
    sae.fit(3 * randn(50, D) + 2)
    for i, p in enumerate(sae.parameters()):
        p.data += 0.2 * randn(*p.shape, seed=i + 1)
    sae.normalise()
    return sae


def read_config(folder):
    return json.loads((folder / "cfg.json").read_text())


def write_config(folder, config):
    (folder / "cfg.json").write_text(json.dumps(config))


def compute_as_saelens(folder, x):
    """What SAELens computes from the two files, its formulas written out: x [N, D] -> x^, f."""
    config = read_config(folder)
    w = load_file(folder / "sae_weights.safetensors")
    assert set(w) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert w["W_enc"].shape == (D, M)
    assert config["d_in"] == D
    assert config["d_sae"] == M

    mean = 0.0
    std = 1.0
    if config["normalize_activations"] == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]  # [N, M]
    f = pre.relu()
    if config["architecture"] == "topk":
        assert config["rescale_acts_by_decoder_norm"] is False
        smallest_kept = pre.sort(-1).values[:, -config["k"], None]  # [N, 1]
        f = torch.where(pre >= smallest_kept, f, 0.0)
    x_hat = (f @ w["W_dec"] + w["b_dec"]) * std + mean
    return x_hat, f


def same(found, expected, tol):
    """Both are (x^, f) of the same activations."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


X = 3 * randn(40, D, seed=9) + 2

# ------------------------------------------------------------------------------- what is written


@each_normalize
@each_kind
def test_what_is_loaded_computes_the_same(tmp_path, kind, normalize):
    sae = make_sae(kind, normalize)
    save_sae(sae, str(tmp_path))
    loaded = load_sae(str(tmp_path), width=D)
    assert type(loaded) is type(sae)
    assert loaded.normalize == sae.normalize
    assert loaded.tied == sae.tied
    same(loaded(X), sae(X), 1e-5)
    # It can be trained on: the decoder's rows have the length 1.
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(M))


@each_normalize
@pytest.mark.parametrize("kind", ["vanilla", "tied", "topk"])
def test_saelens_computes_the_same(tmp_path, kind, normalize):
    sae = make_sae(kind, normalize)
    save_sae(sae, str(tmp_path))
    same(compute_as_saelens(tmp_path, X), sae(X), 1e-4)


@each_normalize
def test_a_topk_without_relu_is_none_that_saelens_knows(tmp_path, normalize):
    save_sae(make_sae("topk_without_relu", normalize), str(tmp_path))
    assert load_sae(str(tmp_path)).relu is False
    assert read_config(tmp_path)["architecture"] not in ("topk", "standard")


@each_normalize
@each_kind
def test_a_folder_holds_two_files_and_what_is_noted(tmp_path, kind, normalize):
    save_sae(make_sae(kind, normalize), str(tmp_path / "a" / "sae"), layer=3, site="mlp")
    assert os.listdir(tmp_path / "a") == ["sae"]
    files = sorted(os.listdir(tmp_path / "a" / "sae"))
    assert files == ["cfg.json", "sae_weights.safetensors"]
    metadata = read_config(tmp_path / "a" / "sae")["metadata"]
    assert metadata["layer"] == 3
    assert metadata["site"] == "mlp"


def test_a_further_kind_is_not_written_as_one_that_it_is_not(tmp_path):
    class WithThreshold(SparseAutoencoder):
        def activate(self, pre):
            return pre * (pre > 0.5)

    with pytest.raises(TypeError, match="WithThreshold"):
        save_sae(WithThreshold(D, M), str(tmp_path / "sae"))
    assert not (tmp_path / "sae").exists()


def test_firing_rates_are_written_as_logarithms(tmp_path):
    rates = torch.full((M,), 0.25, dtype=torch.float64)
    rates[:3] = torch.tensor([0.0, 1e-3, 1.0])
    save_sae(make_sae("topk"), str(tmp_path), rates, layer=3)
    # SAELens' name for log10(rate + 1e-10).
    sparsity = load_file(tmp_path / "sparsity.safetensors")["sparsity"]
    expected = torch.tensor([-10.0, -3.0, 0.0])
    torch.testing.assert_close(sparsity[:3], expected, rtol=0, atol=1e-5)


def test_saving_again_replaces(tmp_path):
    save_sae(make_sae("vanilla"), str(tmp_path / "sae"))
    save_sae(make_sae("topk"), str(tmp_path / "sae"))
    assert isinstance(load_sae(str(tmp_path / "sae")), TopKSAE)
    assert os.listdir(tmp_path) == ["sae"]


# ---------------------------------------------------------------------------------- what is read


def test_an_autoencoder_of_saelens_own_is_read(tmp_path):
    """Its decoder's rows have any length, and there are no notes of ours."""
    tensors = {
        "W_enc": randn(D, M),
        "b_enc": randn(M),
        "W_dec": 2 * randn(M, D, seed=1),
        "b_dec": randn(D),
    }
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    config = {
        "architecture": "standard",
        "d_in": D,
        "d_sae": M,
        "normalize_activations": "none",
    }
    write_config(tmp_path, config)

    x = randn(7, D, seed=3)
    sae = load_sae(str(tmp_path))
    same(sae(x), compute_as_saelens(tmp_path, x), 1e-5)


@pytest.fixture
def folder(tmp_path):
    """A good folder, for a test to do harm to."""
    save_sae(make_sae("topk"), str(tmp_path / "sae"))
    return tmp_path / "sae"


def check_refused(folder, words):
    with pytest.raises(InputError, match=words):
        load_sae(str(folder))


def test_a_folder_without_harm_is_read(folder):
    load_sae(str(folder))


def test_an_autoencoder_of_another_width_is_refused(folder):
    with pytest.raises(InputError, match="width 6, not 8"):
        load_sae(str(folder), width=8)


@pytest.mark.parametrize(
    "name, words",
    [("cfg.json", "cfg.json is missing"), ("sae_weights.safetensors", "safetensors is missing")],
)
def test_a_missing_file_is_named(folder, name, words):
    (folder / name).unlink()
    check_refused(folder, words)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("cfg.json", b"{", "not JSON"),
        ("cfg.json", b"[]", "not a JSON object"),
        ("sae_weights.safetensors", b"12345678901", "cannot be read"),
    ],
)
def test_a_broken_file_is_refused(folder, name, content, words):
    (folder / name).write_bytes(content)
    check_refused(folder, words)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("architecture", "gated", "'gated' is not"),
        ("architecture", 3, "architecture cannot be 3"),
        ("k", 0, "k must be"),
        ("k", 21, "k must lie"),
        ("k", True, "k must be"),
        ("d_in", "6", "d_in must be"),
        ("d_in", 7, r"W_enc is \[6, 20\].*\[7, 20\]"),
        ("d_sae", 20.0, "d_sae must be"),
        ("normalize_activations", "x", "'x' is not computed"),
        ("rescale_acts_by_decoder_norm", True, "rescale"),
        ("apply_b_dec_to_input", False, "apply_b_dec"),
        ("metadata", "x", "metadata cannot be 'x'"),
    ],
)
def test_what_cfg_json_may_not_say(folder, field, value, words):
    config = read_config(folder)
    config[field] = value
    write_config(folder, config)
    check_refused(folder, words)


def test_a_vanilla_autoencoder_has_no_other_activation_function(folder):
    config = read_config(folder)
    config["architecture"] = "standard"
    config["activation_fn_str"] = "topk"
    write_config(folder, config)
    check_refused(folder, "'topk' is not computed")


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("layer", "1", "layer cannot be '1'"),
        ("model", 5, "model cannot be"),
        ("nanorlhf", "x", "nanorlhf cannot be 'x'"),
    ],
)
def test_what_metadata_may_not_say(folder, field, value, words):
    config = read_config(folder)
    config["metadata"] = {field: value}
    write_config(folder, config)
    check_refused(folder, words)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("scale", "1", "scale cannot be '1'"),
        ("scale", NAN, "NaN is no finite number"),
        ("scale", 0, "by a scale of 0"),
        ("scale", -2.0, "by a scale of -2"),
        ("normalize", "x", "no standardisation 'x'"),
        ("tied", 1, "tied cannot be 1"),
    ],
)
def test_what_our_own_notes_may_not_say(folder, field, value, words):
    config = read_config(folder)
    config["metadata"]["nanorlhf"][field] = value
    write_config(folder, config)
    check_refused(folder, words)


def replace_tensor(folder, name, tensor):
    file = folder / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors[name] = tensor
    save_file(tensors, file)


def test_weights_are_no_whole_numbers(folder):
    whole_numbers = torch.ones(D, M, dtype=torch.int32)
    replace_tensor(folder, "W_enc", whole_numbers)
    check_refused(folder, "W_enc holds int32")


def test_weights_are_finite(folder):
    replace_tensor(folder, "b_enc", torch.full((M,), NAN))
    check_refused(folder, "b_enc holds")


def test_weights_have_the_shape_that_cfg_json_says(folder):
    replace_tensor(folder, "W_dec", randn(3, D))
    check_refused(folder, "W_dec is")

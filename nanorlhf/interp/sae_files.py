"""Sparse autoencoders on disk, in the layout of SAELens: a folder with cfg.json, sae_weights.safetensors and sparsity.safetensors.

    W_enc [D, M], b_enc [M], W_dec [M, D], b_dec [D]        f = activation((x - b_dec) W_enc + b_enc),   x^ = f W_dec + b_dec

SAELens has no standardisation by a data set's mean and scale s. Ours is folded into the weights, which gives the same f and x^:

    W_enc = W_e^T / s,   b_dec = s b_d + mean,   W_dec = s W_d^T         (z - b_d = (x - b_dec) / s)

and comes out again in loading, up to rounding: s is in cfg.json, and b_d = 0 with mean = b_dec is the same function. Per-token
standardisation is SAELens' "layer_norm" (which adds 1e-5 to the std, not 1e-6). A TopK without ReLU does not exist there: its
architecture has a name of our own, so that SAELens refuses it rather than computing something else.
"""

import glob
import os

import torch
from safetensors.torch import save_file

from ..errors import InputError, require
from ..runtime.files import check_fields, read_object, replace_folder, write_json
from ..runtime.hints import check_made
from ..runtime.tensors import check_tensors, read_tensors
from ..sae import SparseAutoencoder, TopKSAE

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
ARCHITECTURES = ("standard", "topk", "nanorlhf_topk_without_relu")
NOTES = {"model": str | None, "layer": int | None, "site": str | None, "nanorlhf": dict | None}
NORMALIZE = {"dataset": "none", "token": "layer_norm", "none": "none"}  # ours -> SAELens'


def save_sae(sae, path, density=None, **notes):
    """Write an autoencoder into the folder `path`, atomically. `notes` (JSON: model, layer, site, ...) go into cfg.json's metadata.

    density [M], the share of tokens that each latent fires on, becomes sparsity.safetensors: log10(density + 1e-10), as SAELens has it.
    """
    topk = isinstance(sae, TopKSAE)
    scale = sae.scale.item() if sae.normalize == "dataset" else 1.0
    mean = sae.mean if sae.normalize == "dataset" else 0.0
    W_enc = sae.W_dec if sae.tied else sae.W_enc
    tensors = {"W_enc": W_enc.T / scale, "b_enc": sae.b_enc, "W_dec": sae.W_dec * scale, "b_dec": sae.b_dec * scale + mean}
    config = {
        "architecture": ARCHITECTURES[0 if not topk else 1 if sae.relu else 2],
        "d_in": sae.d, "d_sae": sae.m, **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if topk else {}),
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."), "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": NORMALIZE[sae.normalize], "reshape_activations": "none",
        "metadata": {**notes, "nanorlhf": {"normalize": sae.normalize, "scale": scale, "tied": sae.tied}},
    }  # fmt: skip

    def write(folder):
        save_file({name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}, os.path.join(folder, WEIGHTS))
        write_json(os.path.join(folder, CONFIG), config)
        if density is not None:
            save_file({"sparsity": (density + 1e-10).log10().float().cpu()}, os.path.join(folder, SPARSITY))

    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    replace_folder(path, write)


def load_sae(path, width=None, device="cpu"):
    """Read an autoencoder that save_sae or SAELens wrote (architectures standard and topk). -> SparseAutoencoder or TopKSAE

    `width`: of the activations it is wanted for. InputError: a missing or broken file, another architecture, an option of SAELens that
    is not computed here, tensors that do not fit cfg.json, another width. Pitfall: decoder rows of SAELens' own need not have unit
    length; they are kept as they are, and training on would change that.
    """
    config, tensors = read_config(path), read_weights(path)
    d, m, ours = config["d_in"], config["d_sae"], (config.get("metadata") or {}).get("nanorlhf")
    require(width in (None, d), f"{path}: an autoencoder for activations of width {d}, not {width}")
    shapes = {"W_enc": [d, m], "b_enc": [m], "W_dec": [m, d], "b_dec": [d]}
    check_tensors(tensors, shapes, path)
    token = config.get("normalize_activations", "none") == "layer_norm"
    normalize, scale = (ours["normalize"], ours["scale"]) if ours else ("token" if token else "none", 1.0)
    try:
        if config["architecture"] == "standard":
            sae = SparseAutoencoder(d, m, bool(ours and ours["tied"]), normalize)
        else:
            sae = TopKSAE(d, m, config["k"], normalize, relu=config["architecture"] == "topk")
    except ValueError as e:
        raise InputError(f"{path}: {e}") from None
    sae.to(tensors["W_dec"].dtype)
    with torch.no_grad():
        sae.W_dec.copy_(tensors["W_dec"] / scale)
        if not sae.tied:
            sae.W_enc.copy_(tensors["W_enc"].T * scale)
        sae.b_enc.copy_(tensors["b_enc"])
        (sae.mean if normalize == "dataset" else sae.b_dec).copy_(tensors["b_dec"])
        sae.scale.fill_(scale)
    return sae.to(device)


def the_one_sae(path):
    """An autoencoder's folder, or train_sae.py's run folder if it holds just one -> that autoencoder's folder."""
    if not os.path.isfile(os.path.join(path, CONFIG)):
        found = sorted(os.path.dirname(file) for file in glob.glob(os.path.join(glob.escape(path), "*", "*", CONFIG)))
        require(len(found) < 2, f"{path} holds several autoencoders; name one of {', '.join(found)}")
        return found[0] if found else path
    return path


def read_config(path):
    """cfg.json, if it is one that can be computed here."""
    check_made(path)
    file = os.path.join(path, CONFIG)
    require(os.path.isfile(file), f"{path}: no sparse autoencoder here ({CONFIG} is missing)")
    config = read_object(file, {"architecture": str, "metadata": dict | None})
    notes = check_fields(config.get("metadata") or {}, NOTES, file)
    if notes.get("nanorlhf") is not None:
        ours = check_fields(notes["nanorlhf"], {"normalize": str, "scale": float, "tied": bool}, file)
        good = ours["normalize"] in NORMALIZE and 1e-20 < ours["scale"] < 1e20
        require(good, f"{file}: no standardisation {ours['normalize']!r} by a scale of {ours['scale']}")
    architecture = config["architecture"]
    require(architecture in ARCHITECTURES, f"{file}: architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    for name in ("d_in", "d_sae", *(["k"] if architecture != "standard" else [])):
        require(type(config.get(name)) is int and config[name] > 0, f"{file}: {name} must be a whole number above 0")
    computed = {"apply_b_dec_to_input": [True], "normalize_activations": ["none", "layer_norm"], "reshape_activations": ["none"],
                "rescale_acts_by_decoder_norm": [False]}  # fmt: skip
    if architecture == "standard":
        computed["activation_fn_str"] = ["relu"]
    for name, values in computed.items():
        found = config.get(name, values[0])
        require(found in values, f"{file}: {name} {found!r} is not computed here, only {' or '.join(map(repr, values))}")
    return config


def read_weights(path):
    """The tensors of sae_weights.safetensors."""
    file = os.path.join(path, WEIGHTS)
    require(os.path.isfile(file), f"{path}: {WEIGHTS} is missing")
    return read_tensors(file)

"""Sparse autoencoders on disk, in the layout of SAELens: a folder with cfg.json,
sae_weights.safetensors and sparsity.safetensors.

    W_enc [D, M], b_enc [M], W_dec [M, D], b_dec [D]
    f = activation((x - b_dec) W_enc + b_enc),   x^ = f W_dec + b_dec

SAELens has no standardisation by a data set's mean and scale s. Ours is folded into the weights,
which gives the same f and x^:

    W_enc = W_e^T / s,   b_dec = s b_d + mean,   W_dec = s W_d^T         (z - b_d = (x - b_dec) / s)

It comes out again in loading, up to rounding: s is in cfg.json, and b_d = 0 with mean = b_dec is
the same function. Per-token standardisation is SAELens' "layer_norm" (which adds 1e-5 to the std,
not 1e-6). A TopK without ReLU does not exist there: its architecture has a name of our own, so that
SAELens refuses it rather than computing something else.
"""

import glob
import os

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError, require
from ..runtime.files import check_fields, read_object, replace_folder, write_json
from ..runtime.hints import check_made
from ..runtime.tensors import check_tensors, read_tensors
from ..sae import SparseAutoencoder, TopKSAE

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SPARSITY = "sparsity.safetensors"

VANILLA = "standard"
TOPK = "topk"
TOPK_WITHOUT_RELU = "nanorlhf_topk_without_relu"
ARCHITECTURES = (VANILLA, TOPK, TOPK_WITHOUT_RELU)

# Our names of the standardisations -> those of SAELens.
NORMALIZE = {"dataset": "none", "token": "layer_norm", "none": "none"}
# What cfg.json's metadata may hold, and what is of our own in it.
NOTES = {"model": str | None, "layer": int | None, "site": str | None, "nanorlhf": dict | None}
OWN_NOTES = {"normalize": str, "scale": float, "tied": bool}
# The options of SAELens that are computed here: {name: values}. The first value is the default.
COMPUTED = {
    "apply_b_dec_to_input": [True],
    "normalize_activations": ["none", "layer_norm"],
    "reshape_activations": ["none"],
    "rescale_acts_by_decoder_norm": [False],
}
COMPUTED_BY_VANILLA = {**COMPUTED, "activation_fn_str": ["relu"]}


# --------------------------------------------------------------------------------------- writing


def save_sae(sae, path: str, density: Tensor | None = None, **notes):
    """Write an autoencoder into the folder `path`, atomically.

    `notes` (JSON: model, layer, site, ...) go into cfg.json's metadata. density [M], the share of
    tokens that each feature fires on, becomes sparsity.safetensors: log10(density + 1e-10), as
    SAELens has it.
    """
    # The standardisation is folded into the weights: see the top of this file.
    if sae.normalize == "dataset":
        scale = sae.scale.item()
        mean = sae.mean
    else:
        scale = 1.0
        mean = 0.0
    # SAELens has no tied weights, so the encoder is written out; our notes say `tied`.
    W_enc = sae.W_dec if sae.tied else sae.W_enc  # [M, D]
    tensors = {
        "W_enc": W_enc.T / scale,
        "b_enc": sae.b_enc,
        "W_dec": sae.W_dec * scale,
        "b_dec": sae.b_dec * scale + mean,
    }
    own_notes = {"normalize": sae.normalize, "scale": scale, "tied": sae.tied}
    config = make_config(sae, {**notes, "nanorlhf": own_notes})

    def write(folder: str):
        # safetensors takes only tensors that lie in memory row by row: no transposed views.
        own_copies = {}
        for name, x in tensors.items():
            own_copies[name] = x.detach().cpu().contiguous().clone()
        save_file(own_copies, os.path.join(folder, WEIGHTS))
        write_json(os.path.join(folder, CONFIG), config)
        if density is not None:
            sparsity = (density + 1e-10).log10().float().cpu()
            save_file({"sparsity": sparsity}, os.path.join(folder, SPARSITY))

    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    replace_folder(path, write)


def make_config(sae, metadata: dict) -> dict:
    """What cfg.json says of an autoencoder, in the order of its lines.

    TypeError: a further kind, which load_sae would read as another one.
    """
    if type(sae) not in (SparseAutoencoder, TopKSAE):
        raise TypeError(f"a {type(sae).__name__} has no architecture on disk")
    config = {"architecture": VANILLA, "d_in": sae.d, "d_sae": sae.m}
    if isinstance(sae, TopKSAE):
        config["architecture"] = TOPK if sae.relu else TOPK_WITHOUT_RELU
        config["k"] = sae.k
        config["rescale_acts_by_decoder_norm"] = False
    config["dtype"] = str(sae.W_dec.dtype).removeprefix("torch.")
    config["device"] = "cpu"
    config["apply_b_dec_to_input"] = True
    config["normalize_activations"] = NORMALIZE[sae.normalize]
    config["reshape_activations"] = "none"
    config["metadata"] = metadata
    return config


# --------------------------------------------------------------------------------------- reading


def load_sae(path: str, width: int | None = None, device="cpu") -> SparseAutoencoder | TopKSAE:
    """Read an autoencoder that save_sae or SAELens wrote (architectures standard and topk).

    `width`: of the activations it is wanted for. InputError: a missing or broken file, another
    architecture, an option of SAELens that is not computed here, tensors that do not fit cfg.json,
    another width. Pitfall: decoder rows of SAELens' own need not have unit length; they are kept as
    they are, and training on would change that.
    """
    config = read_config(path)
    tensors = read_weights(path)
    d = config["d_in"]
    m = config["d_sae"]
    require(width in (None, d), f"{path}: an autoencoder for activations of width {d}, not {width}")
    shapes = {"W_enc": [d, m], "b_enc": [m], "W_dec": [m, d], "b_dec": [d]}
    check_tensors(tensors, shapes, path)

    # An autoencoder of SAELens' own has none of our notes: no scale, and no tied weights.
    notes = (config.get("metadata") or {}).get("nanorlhf")
    if not notes:
        per_token = config.get("normalize_activations", "none") == "layer_norm"
        notes = {"normalize": "token" if per_token else "none", "scale": 1.0, "tied": False}
    normalize = notes["normalize"]
    scale = notes["scale"]
    try:
        if config["architecture"] == VANILLA:
            sae = SparseAutoencoder(d, m, notes["tied"], normalize)
        else:
            has_relu = config["architecture"] == TOPK
            sae = TopKSAE(d, m, config["k"], normalize, relu=has_relu)
    except ValueError as e:
        raise InputError(f"{path}: {e}") from None

    # The standardisation comes out of the weights again.
    sae.to(tensors["W_dec"].dtype)
    with torch.no_grad():
        sae.W_dec.copy_(tensors["W_dec"] / scale)
        if not sae.tied:
            sae.W_enc.copy_(tensors["W_enc"].T * scale)
        sae.b_enc.copy_(tensors["b_enc"])
        # The file's b_dec is s b_d + mean. All of it becomes the mean, and b_d stays 0.
        if normalize == "dataset":
            sae.mean.copy_(tensors["b_dec"])
        else:
            sae.b_dec.copy_(tensors["b_dec"])
        sae.scale.fill_(scale)
    return sae.to(device)


def find_saes(patterns: list[str]) -> list[str]:
    """The folders of autoencoders that are named, in which * and {seed} stand for all that exist.

    InputError: a name of none.
    """
    folders = []
    for pattern in patterns:
        check_made(pattern)
        if os.path.isdir(pattern):
            matches = [pattern]
        else:
            # No other sign is a wildcard: a folder's name may hold a [ of its own.
            wildcards = glob.escape(pattern).replace("[*]", "*").replace("{seed}", "*")
            files = glob.glob(os.path.join(wildcards, CONFIG))
            matches = sorted(os.path.dirname(file) for file in files)
        require(matches, f"{pattern}: no sparse autoencoder here (train_sae.py trains them)")
        folders.extend(matches)
    return list(dict.fromkeys(folders))


def the_one_sae(path: str) -> str:
    """An autoencoder's folder, or train_sae.py's run folder if it holds just one -> that
    autoencoder's folder. InputError: the run folder holds several."""
    if os.path.isfile(os.path.join(path, CONFIG)):
        return path
    # runs/sae/policy/3_mlp/cfg.json: a run folder holds MODEL/LAYER_SITE.
    pattern = os.path.join(glob.escape(path), "*", "*", CONFIG)
    folders = sorted(os.path.dirname(file) for file in glob.glob(pattern))
    require(
        len(folders) < 2,
        f"{path} holds several autoencoders; name one of {', '.join(folders)}",
    )
    if folders:
        return folders[0]
    return path  # whoever reads it says that nothing is there


def read_config(path: str) -> dict:
    """cfg.json of an autoencoder that can be computed here. InputError: there is none."""
    check_made(path)
    file = os.path.join(path, CONFIG)
    require(os.path.isfile(file), f"{path}: no sparse autoencoder here ({CONFIG} is missing)")
    config = read_object(file, {"architecture": str, "metadata": dict | None})

    # Notes of our own.
    notes = check_fields(config.get("metadata") or {}, NOTES, file)
    if notes.get("nanorlhf") is not None:
        own_notes = check_fields(notes["nanorlhf"], OWN_NOTES, file)
        normalize = own_notes["normalize"]
        scale = own_notes["scale"]
        require(
            normalize in NORMALIZE and 1e-20 < scale < 1e20,
            f"{file}: no standardisation {normalize!r} by a scale of {scale}",
        )

    # The architecture and its sizes.
    architecture = config["architecture"]
    require(
        architecture in ARCHITECTURES,
        f"{file}: architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}",
    )
    sizes = ["d_in", "d_sae"]
    if architecture != VANILLA:
        sizes.append("k")
    for name in sizes:
        size = config.get(name)
        # type(), since True is an int for isinstance().
        require(type(size) is int and size > 0, f"{file}: {name} must be a whole number above 0")

    # Options of SAELens.
    options = COMPUTED_BY_VANILLA if architecture == VANILLA else COMPUTED
    for name, values in options.items():
        value = config.get(name, values[0])
        require(
            value in values,
            f"{file}: {name} {value!r} is not computed here, only {' or '.join(map(repr, values))}",
        )
    return config


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of sae_weights.safetensors."""
    file = os.path.join(path, WEIGHTS)
    require(os.path.isfile(file), f"{path}: {WEIGHTS} is missing")
    return read_tensors(file)

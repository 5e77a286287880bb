"""A SARM's folder: config.json with sarm_param, and the tensors of the public checkpoints, in one file or several.

    D hidden, L blocks, M latents

    model.* (Llama's; another LM: its own prefix)   the embeddings, the first L blocks, and the final norm, which is never applied
    sae.pre_bias [D]   sae.latent_bias [M]   sae.encoder.weight [M, D]   sae.decoder.weight [D, M]   score.weight [1, M]

    sarm_param: sae_source_layer: L (older: sae_hidden_state_source_layer; default: half of num_hidden_layers), sae_latent_size: M, sae_k,
    sae_use_sequence_level, sarm_use_activation (older: sarm_use_topk)

Everything is looked at before anything is loaded, and no code that comes with a checkpoint is run.
"""

import copy

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModel

from .errors import InputError, first_line
from .models import check_model
from .sae import TopKSAE
from .weights import weight_files

OLD_KEYS = {"sae_source_layer": "sae_hidden_state_source_layer", "sarm_use_activation": "sarm_use_topk"}


def check_sarm(path):
    """The config of a SARM, its sarm_param complete and in the newer names, before anything is loaded; else an InputError."""
    config = check_model(path)
    given = getattr(config, "sarm_param", None)
    if not isinstance(given, dict):
        raise InputError(f"{path}: no SARM (config.json has no dictionary sarm_param)")
    given = {new: given[old] for new, old in OLD_KEYS.items() if old in given} | given
    param = {"sae_source_layer": config.num_hidden_layers // 2, "sae_use_sequence_level": True, "sarm_use_activation": True} | given
    config.sarm_param = {name: value for name, value in param.items() if name not in OLD_KEYS.values()}
    m = param.get("sae_latent_size")
    highest = {"sae_source_layer": config.num_hidden_layers, "sae_latent_size": float("inf"), "sae_k": m}
    for name, high in highest.items():
        value = param.get(name)
        if type(value) is not int or not 1 <= value <= high:
            upper = f" to {high}" if high < float("inf") else ""
            raise InputError(f"{path}: sarm_param's {name} must be a whole number from 1{upper}, not {value}")
    if hasattr(config, "auto_map"):
        del config.auto_map  # code is neither run nor saved
    return config


def shortened(config):
    """The config of an LM that ends after block L."""
    L, n, config = config.sarm_param["sae_source_layer"], config.num_hidden_layers, copy.deepcopy(config)
    config.num_hidden_layers = L
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == n and "layer" in name:  # Gemma's layer_types and the like
            setattr(config, name, value[:L])
    return config


def new_sae(config):
    """The autoencoder that a SARM's config names."""
    param = config.sarm_param
    return TopKSAE(config.get_text_config().hidden_size, param["sae_latent_size"], param["sae_k"], normalize="token", relu=False)


def check_tensors(path, config):
    """{tensor: its file} of a SARM's folder or hub name; names and shapes are looked at before anything is loaded."""
    L, m = config.sarm_param["sae_source_layer"], config.sarm_param["sae_latent_size"]
    d = config.get_text_config().hidden_size
    with torch.device("meta"):
        trunk = AutoModel.from_config(shortened(config), trust_remote_code=False)
    expected = {f"{trunk.base_model_prefix}.{name}": list(p.shape) for name, p in trunk.state_dict().items()}
    expected |= {"sae.pre_bias": [d], "sae.latent_bias": [m], "sae.encoder.weight": [m, d], "sae.decoder.weight": [d, m]}
    expected["score.weight"] = [1, m]
    found = {}
    for file in weight_files(path):
        try:
            with safe_open(file, "pt") as f:
                shapes = {name: list(f.get_slice(name).get_shape()) for name in f.keys()}
        except (OSError, SafetensorError) as e:
            raise InputError(f"{file}: cannot be read ({first_line(e)})") from None
        for name, shape in shapes.items():
            if name not in expected:
                raise InputError(f"{file}: {name} is not a tensor of a SARM on {type(trunk).__name__} with L = {L}")
            if shape != expected[name]:
                raise InputError(f"{file}: {name} is {shape}, and by config.json it should be {expected[name]}")
            found[name] = file
    missing = [name for name in expected if name not in found]
    if missing:
        raise InputError(f"{path}: the tensor {missing[0]} is missing")
    return found

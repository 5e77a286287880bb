"""How a SARM starts from an LM and a pretrained autoencoder, and what of it is trained: the parts of train_rm.py --sarm.

    b texts, D hidden, L blocks

What the preference loss trains in each mode; the decoder W_d, which the score does not use, is never among it:

    frozen            the head w
    encoder_frozen    w and the LM (the paper's)
    joint             w, the LM and the encoder (W_e, b_e, b_d)
    detached          the same; and the autoencoder's reconstruction of h, which the LM gets no gradient of, trains W_e, b_e, b_d and W_d

w starts at zero. Source: Zhang et al. 2025 (2508.08746), section 4.
"""

import os

import torch
from transformers import AutoModel

from ..errors import require
from ..hf.lora import choose_trained
from ..interp import sae_files
from ..models import check_model, pretrained, resolve
from ..sarm import SARM

MODES = ("frozen", "encoder_frozen", "joint", "detached")


def check_start(config, dist):
    """Look at --model and --sarm before anything is loaded. -> the config of the SARM to be"""
    path, model = sae_files.the_one_sae(config.sarm), check_model(config.model)  # of the model the config alone
    found = sae_files.read_config(path)
    notes, m = found.get("metadata") or {}, found["d_sae"]
    right = found["architecture"] == "nanorlhf_topk_without_relu" and found.get("normalize_activations") == "layer_norm"
    flags = "train_sae.py --sae topk --normalize token --relu False --site residual"
    require(right, f"{path}: a SARM needs a TopK autoencoder without ReLU on standardised tokens ({flags})")
    layer, n = notes.get("layer"), model.num_hidden_layers
    require(notes.get("site") == "residual", f"{path}: an autoencoder of {notes.get('site')}, not of the residual stream ({flags})")
    require(type(layer) is int and layer in range(n), f"{path}: of layer {layer}, and {config.model} has the layers 0 to {n - 1}")
    width = model.get_text_config().hidden_size
    require(found["d_in"] == width, f"{path}: an autoencoder for activations of width {found['d_in']}; {config.model} has {width}")
    if os.path.abspath(resolve(str(notes.get("model")))) != os.path.abspath(resolve(config.model)):
        dist.print(f"warning: {path} was trained on {notes.get('model')}, not on {config.model}")
    model.num_labels = 1
    model.architectures = ["SARM"]
    model.sarm_param = {
        "sae_source_layer": layer + 1, "sae_latent_size": m, "sae_k": found["k"],
        "sae_use_sequence_level": notes.get("tokens") in ("sentence_ends", "last"), "sarm_use_activation": True,
    }  # fmt: skip
    return model


def start(config, sarm_config, device):
    """The LM of --model and the autoencoder of --sarm -> a SARM whose head is zero, ready to be trained, and a sentence on that."""
    sarm = SARM(pretrained(AutoModel, config.model), sae_files.load_sae(sae_files.the_one_sae(config.sarm)), sarm_config)
    note = choose_trained(sarm.trunk, config)
    sarm.sae.requires_grad_(config.sarm_mode in ("joint", "detached"))
    sarm.sae.W_dec.requires_grad_(config.sarm_mode == "detached")
    if config.sarm_mode == "frozen":
        sarm.trunk.requires_grad_(False)
        note = "the LM is frozen"
    L, m, k = sarm_config.sarm_param["sae_source_layer"], sarm.sae.m, sarm.sae.k
    return sarm.to(device), f"{note}; SARM on {L} of {sarm_config.num_hidden_layers} blocks, {m:,} latents, k {k}, {config.sarm_mode}"


def scored(model, batch, reconstruct):
    """Packed rows -> what the loss of a pair is made of: scores [B], and the errors of a SARM's reconstruction [B], else 0."""
    if reconstruct:
        return model(batch, reconstruct=True)
    scores = model(batch)
    return scores, torch.zeros_like(scores)

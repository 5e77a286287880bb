"""SARM: a reward model whose score is a weighted sum of a few sparse features (Zhang et al. 2025, 2508.08746).

    B texts, T tokens, D hidden, L blocks, M latents, k of them kept, F chosen features

    ids [B, T] --L blocks of an LM, no final norm--> h [B, D] at the last real token --TopK encoder--> z [B, M] --> score = w . z

z is the latents of a *text*: those at its pooled token (the last real one, EOS included), and of no other. Reward, readings, edits and
penalties all speak of these. No [B, T, M] is ever built, and of [B, M] only the encoder's pre-activations, of a few hundred rows at a
time. Folders have the layout of the public checkpoints, so those load here, without any code of theirs:

    model.* (Llama's; another LM: its own prefix)   the embeddings, the first L blocks, and the final norm, which is never applied
    sae.pre_bias [D]   sae.latent_bias [M]   sae.encoder.weight [M, D]   sae.decoder.weight [D, M]   score.weight [1, M]

    sarm_param: sae_source_layer: L (older: sae_hidden_state_source_layer; default: half of num_hidden_layers), sae_latent_size: M, sae_k,
    sae_use_sequence_level, sarm_use_activation (older: sarm_use_topk)
"""

import contextlib
import copy
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel

from .errors import InputError, library_call
from .hf.activations import captured
from .hf.adapters import is_adapter
from .hf.blocks import block_list
from .hf.folders import check_model
from .hf.weights import WEIGHTS, weight_files
from .models import pretrained, resolve
from .penalties import edit_latents
from .runtime.files import shorten
from .runtime.tensors import check_tensors, read_shapes, read_tensors
from .sae import TopKSAE


class Reading(NamedTuple):
    """What a reward model says of B texts: see SARM.read."""

    scores: torch.Tensor  # [B]
    latents: torch.Tensor  # [B, F], or [B, M]
    edited: torch.Tensor  # [B]


class SARM(nn.Module):
    """score = w . z - mean, z the k largest of W_e (x - b_d) + b_e, x the token's standardised h (sae.TopKSAE, 'token', no ReLU).

    trunk: an HF base model, of which the first config.sarm_param["sae_source_layer"] blocks are kept; config: the HF config of the
    whole LM, with sarm_param and, once standardised, reward_mean. sarm_use_activation False: the dense pre-activations are z.
    Pitfall: the trunk is cut in place, and gives the residual stream instead of its normed last hidden state.
    """

    def __init__(self, trunk, sae, config):
        super().__init__()
        self.trunk, self.sae, self.config = trunk, sae, config
        self.sparse = config.sarm_param["sarm_use_activation"]
        self.score = nn.Linear(sae.m, 1, bias=False)
        nn.init.zeros_(self.score.weight)
        self.norm_name, self.norm = cut(trunk, config.sarm_param["sae_source_layer"])
        self.norm.requires_grad_(False)  # only there to be saved
        self.eval()

    def pooled(self, batch):
        """h [B, D]: the residual stream after block L at each text's last real token."""
        hidden = self.trunk(input_ids=batch.ids, use_cache=False).last_hidden_state  # [B, T, D]
        return hidden[torch.arange(len(batch), device=hidden.device), batch.lengths - 1]

    def code(self, h):
        """h [B, D] -> the latents that count: values [B, k], ids [B, k]; in float32, also under autocast (as models.scalar)."""
        with torch.autocast(h.device.type, enabled=False):
            if self.sparse:
                return self.sae.encode_topk(h.float())
            x = self.sae.standardise(h.float(), *self.sae.moments(h.float()))
            pre = F.linear(x, *self.sae.encoder())  # [B, M]
            return pre, torch.arange(self.sae.m, device=h.device).expand_as(pre)

    def weighted(self, values, ids):
        """sum_j w[ids[b, j]] values[b, j] - mean: [B], float64. There the products are exact, so an edit of one weight or latent moves
        a score by w z and nothing else, up to one rounding to float32."""
        w = self.score.weight[0][ids]  # [B, k]
        return (values.double() * w.double()).sum(1) - getattr(self.config, "reward_mean", 0.0)

    def forward(self, batch, reconstruct=False):
        """Packed rows -> scores [B], float32; with `reconstruct` also ||x - x^||^2 / D of each h, [B], without a gradient to the LM."""
        h = self.pooled(batch)
        scores = self.weighted(*self.code(h)).float()
        return (scores, self.error(h.detach())) if reconstruct else scores

    def error(self, h):
        """||x - x^||^2 / D of h [B, D], in standardised units: [B]."""
        with torch.autocast(h.device.type, enabled=False):
            x = self.sae.standardise(h.float(), *self.sae.moments(h.float()))
            return (x - self.sae.sparse_decode(*self.sae.sparse_code(x))).square().mean(1)

    @torch.no_grad()
    def read(self, batch, features=None, edits=None):
        """Packed rows -> Reading: scores [B], the latents of `features` [B, F] (None: of all, [B, M]), edited [B].

            edited = score + sum_i w_i (edit(z_i) - z_i)          edits {id: (op, value)}, penalties.OPS; none: edited = score

        The latents are those before any edit. InputError: a feature that is not there.
        """
        features, edits = checked(features, edits, self.sae.m)
        values, ids = self.code(self.pooled(batch))
        scores = self.weighted(values, ids)  # [B]
        latents = dense(values, ids, self.sae.m)  # [B, M]
        z = latents[:, list(edits)].double()  # [B, E]
        w = self.score.weight[0, list(edits)].double()
        edited = scores + (edit_latents(z, list(edits.values())) - z) @ w
        return Reading(scores.float(), latents if features is None else latents[:, features], edited.float())

    @torch.no_grad()
    def standardise(self, mean, std):
        """After this, scores that had this mean and standard deviation have 0 and 1."""
        self.score.weight /= std
        self.config.reward_mean = float((getattr(self.config, "reward_mean", 0.0) + mean) / std)

    @classmethod
    def from_pretrained(cls, path):
        """A run folder, model folder or hub name -> SARM in float32, in eval mode. InputError: anything that is not as it should be."""
        path = resolve(path)
        config = check_sarm(path)
        files = check_files(path, config)
        sarm = cls(pretrained(AutoModel, path, config=shortened(config)), new_sae(config), config)
        own = {name: p for name, p in sarm.layout().items() if name.startswith(("sae.", "score."))}
        for file in sorted({files[name] for name in own}):
            tensors = read_tensors(file)
            here = [name for name in own if files[name] == file]
            check_tensors(tensors, dict.fromkeys(here), file)
            for name in here:
                own[name].copy_(tensors[name])
        return sarm

    def layout(self):
        """{name in the file: tensor} of the whole model; of the decoder a transposed view."""
        prefix, sae = self.trunk.base_model_prefix, self.sae
        tensors = {f"{prefix}.{name}": p for name, p in self.trunk.state_dict().items()}
        tensors |= {f"{prefix}.{self.norm_name}.{name}": p for name, p in self.norm.state_dict().items()}
        own = {"sae.pre_bias": sae.b_dec, "sae.latent_bias": sae.b_enc, "sae.encoder.weight": sae.W_enc, "sae.decoder.weight": sae.W_dec.T}
        return tensors | {name: p.detach() for name, p in own.items()} | {"score.weight": self.score.weight.detach()}

    def save_pretrained(self, path):
        """Write config.json and model.safetensors in the public layout."""
        os.makedirs(path, exist_ok=True)
        self.config.save_pretrained(path)
        tensors = {name: p.cpu().contiguous().clone() for name, p in self.layout().items()}
        save_file(tensors, os.path.join(path, WEIGHTS), {"format": "pt"})


def is_sarm(path):
    """Whether a run folder, model folder or hub name holds a SARM. InputError: there is no model at all."""
    path = resolve(path)
    return not is_adapter(path) and hasattr(check_model(path), "sarm_param")


def save_sarm(sarm, tokenizer, path):
    """SARM.save_pretrained, and the tokenizer beside it."""
    sarm.config.pad_token_id = tokenizer.pad_token_id
    sarm.save_pretrained(path)
    tokenizer.save_pretrained(path)


def cut(trunk, L):
    """Leave an HF base model its first L blocks and nothing after them, in place. -> the name of its final norm, and the norm

    The norm is the last module beside the blocks that holds vectors only. InputError: an architecture where more follows its blocks.
    """
    parent, name, layers = block_list(trunk)
    setattr(parent, name, layers[:L])
    trunk.config.num_hidden_layers = L
    norms = [n for n, child in parent.named_children() if {p.dim() for p in child.parameters()} == {1}]
    path = next(n for n, module in trunk.named_modules() if module is parent)
    norm_name = f"{path}.{norms[-1]}".lstrip(".") if norms else ""
    norm = getattr(parent, norms[-1]) if norms else nn.Identity()
    if norms:
        setattr(parent, norms[-1], nn.Identity())
    ids = torch.tensor([[1, 2]], device=next(trunk.parameters()).device)
    with torch.no_grad(), captured(trunk, [(L - 1, "residual")]) as kept:
        if not trunk(input_ids=ids, use_cache=False).last_hidden_state.equal(kept[L - 1, "residual"]):
            raise InputError(f"{type(trunk).__name__}: more than a norm follows its blocks, so they cannot be cut")
    return norm_name, norm


# --------------------------------------------------------------------------------------------------------------------------- edits


@contextlib.contextmanager
def reweighted(sarm, edits):
    """A context in which the head weights w_i are edited: {id: (op, value)}, penalties.OPS. The old bits are back afterwards."""
    _, edits = checked(None, edits, sarm.sae.m)
    w, chosen = sarm.score.weight.data[0], list(edits)
    own = w[chosen].clone()
    w[chosen] = edit_latents(own, list(edits.values()))
    try:
        yield sarm
    finally:
        w[chosen] = own


def checked(features, edits, m):
    """Features (None: all) as a list and edits as a dictionary, of ids below m; else an InputError."""
    features = None if features is None else [int(i) for i in features]
    edits = {int(i): edit for i, edit in (edits or {}).items()}
    for i in [*(features or []), *edits]:
        if not 0 <= i < m:
            raise InputError(f"feature {i}: there are the features 0 to {m - 1}")
    return features, edits


def dense(values, ids, m):
    """values, ids [B, k] -> [B, M]"""
    return values.new_zeros(len(values), m).scatter(1, ids, values)


# ------------------------------------------------------------------------------------------------- the folder, before it is loaded

OLD_KEYS = {"sae_source_layer": "sae_hidden_state_source_layer", "sarm_use_activation": "sarm_use_topk"}


def check_sarm(path):
    """The config of a SARM, its sarm_param complete and in the newer names, before anything is loaded; else an InputError."""
    path = resolve(path)
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
            raise InputError(f"{path}: sarm_param's {name} must be a whole number from 1{upper}, not {shorten(value)}")
    for name in ("sae_use_sequence_level", "sarm_use_activation"):
        if type(param[name]) is not bool:
            raise InputError(f"{path}: sarm_param's {name} must be true or false, not {shorten(param[name])}")
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


def check_files(path, config):
    """{tensor: its file} of a SARM's folder or hub name; names and shapes are looked at before anything is loaded."""
    L, m = config.sarm_param["sae_source_layer"], config.sarm_param["sae_latent_size"]
    d = config.get_text_config().hidden_size
    with library_call(f"{path}: its config.json makes no model"), torch.device("meta"):
        trunk = AutoModel.from_config(shortened(config), trust_remote_code=False)
    expected = {f"{trunk.base_model_prefix}.{name}": list(p.shape) for name, p in trunk.state_dict().items()}
    expected |= {"sae.pre_bias": [d], "sae.latent_bias": [m], "sae.encoder.weight": [m, d], "sae.decoder.weight": [d, m]}
    expected["score.weight"] = [1, m]
    found = {}
    for file in weight_files(path):
        for name, (_, shape) in read_shapes(file).items():
            if name not in expected:
                raise InputError(f"{file}: {name} is not a tensor of a SARM on {type(trunk).__name__} with L = {L}")
            if shape != expected[name]:
                raise InputError(f"{file}: {name} is {shape}, and by config.json it should be {expected[name]}")
            found[name] = file
    missing = [name for name in expected if name not in found]
    if missing:
        raise InputError(f"{path}: the tensor {missing[0]} is missing")
    return found

"""SARM: a reward model whose score is a weighted sum of a few sparse features.

Source: Zhang et al. 2025 (arXiv 2508.08746).

    B texts, T tokens, D hidden, L blocks, M features, k of them kept, F chosen features, E edits

    ids [B, T] --L blocks of an LM, no final norm--> h [B, D] at the last real token
               --TopK encoder--> z [B, M] --> score = w . z

z is the latents of a *text*: those at its pooled token (the last real one, EOS included), and of no
other. Reward, readings, edits and penalties all speak of these. No [B, T, M] is ever built, and of
[B, M] only the encoder's pre-activations, of a few hundred rows at a time. Folders have the layout
of the public checkpoints, so those load here, without any code of theirs:

    model.*               the embeddings, the first L blocks, and the final norm, which is never
                          applied (model. is Llama's; another LM has its own prefix)
    sae.pre_bias [D]      sae.encoder.weight [M, D]
    sae.latent_bias [M]   sae.decoder.weight [D, M]      score.weight [1, M]

    sarm_param            in config.json, a dictionary:
      sae_source_layer        L (older: sae_hidden_state_source_layer; default: half of
                              num_hidden_layers)
      sae_latent_size         M
      sae_k                   k
      sae_use_sequence_level
      sarm_use_activation     (older: sarm_use_topk)
"""

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import InputError, library_call, require
from .hf.activations import captured
from .hf.adapters import is_adapter, resolve
from .hf.blocks import block_list
from .hf.folders import check_model
from .hf.weights import WEIGHTS, weight_files
from .models import hidden_at_end, pretrained
from .packing import Packed
from .penalties import edit_latents
from .runtime.files import shorten
from .runtime.tensors import check_tensors, read_shapes, read_tensors
from .sae import TopKSAE

# {feature: (op, value)}, see penalties.edit_latents
Edits = dict[int, tuple[str, float]]


class Reading(NamedTuple):
    """What a reward model says of B texts: see SARM.read."""

    scores: Tensor  # [B]
    latents: Tensor  # [B, F], or [B, M]
    edited: Tensor  # [B]


class SARM(nn.Module):
    """A reward model of sparse features: text -> score.

        x     = the standardised h of the text's last token (sae.TopKSAE, 'token', no ReLU)
        z     = the k largest of W_e (x - b_d) + b_e
        score = w . z - mean

    trunk: an HF base model, of which the first config.sarm_param["sae_source_layer"] blocks are
    kept. config: the HF config of the whole LM, with sarm_param and, once standardised,
    reward_mean. With sarm_use_activation False the dense pre-activations are z.
    Pitfall: the trunk is cut in place, and gives the residual stream instead of its normed last
    hidden state.
    """

    def __init__(self, trunk, sae: TopKSAE, config):
        super().__init__()
        self.trunk = trunk
        self.sae = sae
        self.config = config
        self.sparse = config.sarm_param["sarm_use_activation"]
        self.score = nn.Linear(sae.m, 1, bias=False)
        # A new head scores every text 0; from_pretrained() copies a stored one over it.
        nn.init.zeros_(self.score.weight)
        self.norm_name, self.norm = cut(trunk, config.sarm_param["sae_source_layer"])
        self.norm.requires_grad_(False)  # only there to be saved
        self.eval()

    def pooled(self, batch: Packed) -> Tensor:
        """h [B, D]: the residual stream after block L at each text's last real token."""
        hidden = self.trunk(input_ids=batch.ids, use_cache=False).last_hidden_state  # [B, T, D]
        return hidden_at_end(hidden, batch)

    def standardised(self, h: Tensor) -> Tensor:
        """h [B, D] -> x [B, D], float32."""
        h = h.float()
        return self.sae.standardise(h, *self.sae.moments(h))

    def code(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h [B, D] -> the latents that count: values [B, k], ids [B, k].

        In float32, also under autocast (as models.apply_head).
        """
        with torch.autocast(h.device.type, enabled=False):
            if self.sparse:
                return self.sae.encode_topk(h.float())
            # All M features count. The form is the same, with k = M: feature i in column i.
            pre = F.linear(self.standardised(h), *self.sae.encoder())  # [B, M]
            ids = torch.arange(self.sae.m, device=h.device)
            return pre, ids.expand_as(pre)

    def weighted(self, values: Tensor, ids: Tensor) -> Tensor:
        """sum_j w[ids[b, j]] values[b, j] - mean: [B], float64.

        In float64 the products are exact, so an edit of one weight or feature moves a score by w z
        and nothing else, up to one rounding to float32.
        """
        w = self.score.weight[0][ids]  # [B, k]
        mean = getattr(self.config, "reward_mean", 0.0)
        return (values.double() * w.double()).sum(1) - mean

    def forward(self, batch: Packed, reconstruct: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Packed rows -> scores [B], float32.

        With `reconstruct` also ||x - x^||^2 / D of each text, [B], without a gradient to the LM.
        """
        h = self.pooled(batch)
        values, ids = self.code(h)
        scores = self.weighted(values, ids).float()
        if not reconstruct:
            return scores
        # h is detached and encoded again, so the error's gradient reaches the autoencoder alone.
        return scores, self.error(h.detach())

    def error(self, h: Tensor) -> Tensor:
        """||x - x^||^2 / D of h [B, D], in standardised units: [B]."""
        with torch.autocast(h.device.type, enabled=False):
            x = self.standardised(h)
            # x^ is made of k features, also where the score counts all M (self.sparse is False).
            values, ids = self.sae.sparse_code(x)
            x_hat = self.sae.sparse_decode(values, ids)
            return (x - x_hat).square().mean(1)

    @torch.no_grad()
    def read(
        self, batch: Packed, features: list[int] | None = None, edits: Edits | None = None
    ) -> Reading:
        """Packed rows -> Reading: scores [B], latents [B, F], edited scores [B].

            edited = score + sum_i w_i (edit(z_i) - z_i)

        The latents are those of `features` (None: of all, [B, M]), before any edit. Without edits
        edited = score. InputError: a feature that is not there.
        """
        features, edits = checked(features, edits, self.sae.m)
        values, ids = self.code(self.pooled(batch))
        scores = self.weighted(values, ids)  # [B]
        latents = dense(values, ids, self.sae.m)  # [B, M]

        # Only the change is added, so an edit that leaves z as it is leaves the score bit-equal.
        # float64: see weighted().
        edited_features = list(edits)
        z = latents[:, edited_features].double()  # [B, E]
        w = self.score.weight[0, edited_features].double()  # [E]
        change = edit_latents(z, list(edits.values())) - z
        edited = scores + change @ w

        if features is not None:
            latents = latents[:, features]  # [B, F]
        return Reading(scores.float(), latents, edited.float())

    @torch.no_grad()
    def standardise(self, mean: float, std: float):
        """After this, scores that had this mean and standard deviation have 0 and 1."""
        # (w . z - own_mean - mean) / std = (w / std) . z - (own_mean + mean) / std: no new
        # parameter, so the layout of the folder stays that of the public checkpoints.
        own_mean = getattr(self.config, "reward_mean", 0.0)
        self.score.weight /= std
        self.config.reward_mean = float((own_mean + mean) / std)

    @classmethod
    def from_pretrained(cls, path: str) -> "SARM":
        """A run folder, model folder or hub name -> SARM in float32, in eval mode.

        InputError: anything that is not as it should be.
        """
        path = resolve(path)
        config = check_sarm(path)
        # Every tensor is known to be there, in its shape, before any weights are loaded.
        files = check_files(path, config)
        trunk = pretrained(transformers.AutoModel, path, config=shortened(config))
        sarm = cls(trunk, new_sae(config), config)

        # The trunk is loaded. What is left are the autoencoder and the weights of its features.
        unloaded = {}
        for name, tensor in sarm.layout().items():
            if name.startswith(("sae.", "score.")):
                unloaded[name] = tensor
        # Large models are stored in several files: one at a time is read and held.
        for file in sorted({files[name] for name in unloaded}):
            tensors = read_tensors(file)
            names = [name for name in unloaded if files[name] == file]
            check_tensors(tensors, dict.fromkeys(names), file)  # in any shape
            for name in names:
                # layout() gives views of the parameters, so this fills the model itself.
                unloaded[name].copy_(tensors[name])
        return sarm

    def layout(self) -> dict[str, Tensor]:
        """{name in the file: tensor} of the whole model; of the decoder a transposed view."""
        prefix = self.trunk.base_model_prefix
        tensors = {}
        for name, p in self.trunk.state_dict().items():
            tensors[f"{prefix}.{name}"] = p
        # The final norm was taken out of the trunk, and is saved where a plain LM expects it.
        for name, p in self.norm.state_dict().items():
            tensors[f"{prefix}.{self.norm_name}.{name}"] = p
        tensors["sae.pre_bias"] = self.sae.b_dec.detach()
        tensors["sae.latent_bias"] = self.sae.b_enc.detach()
        tensors["sae.encoder.weight"] = self.sae.W_enc.detach()
        tensors["sae.decoder.weight"] = self.sae.W_dec.T.detach()
        tensors["score.weight"] = self.score.weight.detach()
        return tensors

    def save_pretrained(self, path: str):
        """Write config.json and model.safetensors in the public layout."""
        self.config.save_pretrained(path)  # makes the folder
        # safetensors takes neither transposed views nor tensors that share memory.
        tensors = {}
        for name, p in self.layout().items():
            tensors[name] = p.cpu().contiguous().clone()
        save_file(tensors, os.path.join(path, WEIGHTS), {"format": "pt"})


def save_sarm(sarm: SARM, tokenizer, path: str):
    """SARM.save_pretrained, and the tokenizer beside it."""
    sarm.config.pad_token_id = tokenizer.pad_token_id
    sarm.save_pretrained(path)
    tokenizer.save_pretrained(path)


def new_sae(config) -> TopKSAE:
    """The autoencoder that a SARM's config names."""
    param = config.sarm_param
    return TopKSAE(
        config.get_text_config().hidden_size,
        param["sae_latent_size"],
        param["sae_k"],
        normalize="token",
        relu=False,
    )


# ----------------------------------------------------------------------------- cutting the trunk


def cut(trunk, L: int) -> tuple[str, nn.Module]:
    """Leave an HF base model its first L blocks and nothing after them, in place.

    -> the name of its final norm, and the norm. InputError: an architecture where more than a norm
    follows its blocks.
    """
    # block_list() finds the blocks by the config's number of layers, so the config must say L too.
    parent, name, layers = block_list(trunk)
    setattr(parent, name, layers[:L])
    trunk.config.num_hidden_layers = L
    norm_name, norm = take_norm(trunk, parent)

    # What the trunk puts out must now be what leaves its last block, bit for bit. Any two tokens
    # will show it.
    ids = torch.tensor([[1, 2]], device=next(trunk.parameters()).device)
    with torch.no_grad(), captured(trunk, [(L - 1, "residual")]) as kept:
        output = trunk(input_ids=ids, use_cache=False).last_hidden_state
        if not output.equal(kept[L - 1, "residual"]):
            trunk_name = type(trunk).__name__
            raise InputError(
                f"{trunk_name}: more than a norm follows its blocks, so they cannot be cut"
            )
    return norm_name, norm


def take_norm(trunk, parent: nn.Module) -> tuple[str, nn.Module]:
    """Put nothing in the place of a trunk's final norm. -> its name in the trunk, and the norm

    parent: the module that owns the blocks. The norm is the last module beside them that holds
    vectors only. "" and a module that does nothing: there is none.
    """
    # An embedding or a projection holds a matrix. The last norm counts: some models have one before
    # their blocks as well.
    child_name = ""
    for name, child in parent.named_children():
        dims = {p.dim() for p in child.parameters()}
        if dims == {1}:
            child_name = name
    if not child_name:
        return "", nn.Identity()

    norm = getattr(parent, child_name)
    setattr(parent, child_name, nn.Identity())
    # The name of the trunk itself is "".
    names = {module: name for name, module in trunk.named_modules()}
    return f"{names[parent]}.{child_name}".lstrip("."), norm


def shortened(config):
    """The config of an LM that ends after block L."""
    L = config.sarm_param["sae_source_layer"]
    n_layers = config.num_hidden_layers
    config = copy.deepcopy(config)
    config.num_hidden_layers = L
    # Some settings have an entry for each layer: Gemma's layer_types and the like.
    for name, value in list(vars(config).items()):
        is_per_layer = isinstance(value, list) and len(value) == n_layers and "layer" in name
        if is_per_layer:
            setattr(config, name, value[:L])
    return config


# ----------------------------------------------------------------------------------------- edits


@contextlib.contextmanager
def reweighted(sarm: SARM, edits: Edits) -> Iterator[SARM]:
    """A context in which the head weights w_i are edited: {i: (op, value)}, penalties.OPS.

    The old bits are back afterwards.
    """
    _, edits = checked(None, edits, sarm.sae.m)
    # .data: the edit is written past autograd, which refuses changes in place to a trained weight.
    features = list(edits)
    w = sarm.score.weight.data[0]  # [M]
    old_weights = w[features].clone()
    w[features] = edit_latents(old_weights, list(edits.values()))
    try:
        yield sarm
    finally:
        w[features] = old_weights


def checked(
    features: list[int] | None, edits: Edits | None, m: int
) -> tuple[list[int] | None, Edits]:
    """Features as a list (None: all of them) and edits as a dictionary, by plain numbers.

    InputError: a feature that is not below m.
    """
    if features is not None:
        features = [int(i) for i in features]
    edits = {int(i): edit for i, edit in (edits or {}).items()}
    for i in [*(features or []), *edits]:
        require(0 <= i < m, f"feature {i}: there are the features 0 to {m - 1}")
    return features, edits


def dense(values: Tensor, ids: Tensor, m: int) -> Tensor:
    """values, ids [B, k] -> [B, M], 0 elsewhere."""
    return values.new_zeros(len(values), m).scatter(1, ids, values)


# --------------------------------------------------------------- the folder, before it is loaded

# The names of settings in older checkpoints.
OLD_KEYS = {
    "sae_source_layer": "sae_hidden_state_source_layer",
    "sarm_use_activation": "sarm_use_topk",
}


def is_sarm(path: str) -> bool:
    """Whether a run folder, model folder or hub name holds a SARM.

    InputError: there is no model at all.
    """
    path = resolve(path)
    return not is_adapter(path) and hasattr(check_model(path), "sarm_param")


def check_sarm(path: str):
    """The config of a SARM, its sarm_param complete and in the newer names; else an InputError.

    Nothing is loaded.
    """
    path = resolve(path)
    config = check_model(path)
    given = getattr(config, "sarm_param", None)
    if not isinstance(given, dict):
        raise InputError(f"{path}: no SARM (config.json has no dictionary sarm_param)")

    # Defaults first, then values under older names, then values under today's names, which win.
    param = {
        "sae_source_layer": config.num_hidden_layers // 2,
        "sae_use_sequence_level": True,
        "sarm_use_activation": True,
    }
    for name, old_name in OLD_KEYS.items():
        if old_name in given:
            param[name] = given[old_name]
    param |= given
    for old_name in OLD_KEYS.values():
        param.pop(old_name, None)

    check_param(path, param, config.num_hidden_layers)
    config.sarm_param = param
    if hasattr(config, "auto_map"):
        del config.auto_map  # code is neither run nor saved
    return config


def check_param(path: str, param: dict, n_layers: int):
    """InputError where a value of sarm_param cannot be. n_layers: of the whole LM."""
    # {name: its highest value}. k is at most M, and is checked after it, when M is a number.
    m = param.get("sae_latent_size")
    highest = {"sae_source_layer": n_layers, "sae_latent_size": None, "sae_k": m}
    for name, high in highest.items():
        value = param.get(name)
        # isinstance() would take True for an int.
        is_good = type(value) is int and value >= 1
        upper = ""
        if high is not None:
            is_good = is_good and value <= high
            upper = f" to {high}"
        require(
            is_good,
            f"{path}: sarm_param's {name} must be a whole number from 1{upper}, "
            f"not {shorten(value)}",
        )
    for name in ("sae_use_sequence_level", "sarm_use_activation"):
        value = param[name]
        require(
            type(value) is bool,
            f"{path}: sarm_param's {name} must be true or false, not {shorten(value)}",
        )


def check_files(path: str, config) -> dict[str, str]:
    """{tensor: its file} of a SARM's folder or hub name.

    InputError: a tensor that is missing, unknown or of another shape. No tensor is loaded.
    """
    # What should be there. On the device "meta" a model has shapes and no numbers.
    with library_call(f"{path}: its config.json makes no model"), torch.device("meta"):
        trunk = transformers.AutoModel.from_config(shortened(config), trust_remote_code=False)
    L = config.sarm_param["sae_source_layer"]
    m = config.sarm_param["sae_latent_size"]
    d = config.get_text_config().hidden_size
    shapes = {}
    for name, p in trunk.state_dict().items():
        shapes[f"{trunk.base_model_prefix}.{name}"] = list(p.shape)
    shapes["sae.pre_bias"] = [d]
    shapes["sae.latent_bias"] = [m]
    shapes["sae.encoder.weight"] = [m, d]
    shapes["sae.decoder.weight"] = [d, m]
    shapes["score.weight"] = [1, m]

    # What is there: all files' tensors, of which only the headers are read.
    files = {}
    for file in weight_files(path):
        for name, (_, shape) in read_shapes(file).items():
            if name not in shapes:
                trunk_name = type(trunk).__name__
                raise InputError(
                    f"{file}: {name} is not a tensor of a SARM on {trunk_name} with L = {L}"
                )
            if shape != shapes[name]:
                raise InputError(
                    f"{file}: {name} is {shape}, and by config.json it should be {shapes[name]}"
                )
            files[name] = file
    for name in shapes:
        require(name in files, f"{path}: the tensor {name} is missing")
    return files

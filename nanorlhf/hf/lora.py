"""LoRA by hand: low-rank adapters on linear layers. adapters.py reads and writes their folders.

    y = W x + (alpha / r) B A dropout(x)        (Hu et al. 2021, 2106.09685, section 4.1)

    in, out: the widths of a linear layer; r: the rank of its adapter, far below both

W [out, in] is frozen, A [r, in] starts random, and B [out, r] starts at zero, so that training
starts from the model as it is. An adapter takes the place of its layer in the model and holds that
layer as `base_layer`; the rest of the model stays as it was. GPT-2's Conv1D is a linear layer whose
weight is stored as [in, out]; A and B are the same for it.
"""

import contextlib
import re
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import InputError, require
from .blocks import autocast_dtype, freeze

HEADS = ("score", "classifier")  # of sequence classifiers: trained in full and saved whole


# ------------------------------------------------------------------------------------ one adapter


class LoRA(nn.Module):
    """A linear layer with an adapter: y = W x + (alpha / r) B A dropout(x), [.., in] -> [.., out].

    With `on` False, y = W x. A and B are float32 parameters, and are cast to the type of x to
    compute with it; autocast does to them what it does to W. Under autocast x is cast here once, in
    place of once for W and once for A. The two gradients of x are then added up in autocast's type.
    """

    name = "a layer"  # put_adapter() writes down its name in the model

    def __init__(
        self,
        base_layer: nn.Module,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        alpha: float,
        dropout: float,
    ):
        super().__init__()
        device = base_layer.weight.device
        self.base_layer = base_layer
        self.alpha = alpha
        self.on = True
        self.lora_A = nn.Parameter(lora_A.to(device, torch.float32))  # [r, in]
        self.lora_B = nn.Parameter(lora_B.to(device, torch.float32))  # [out, r]
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / len(lora_A)
        # A model that is evaluated stays so: without dropout.
        self.train(base_layer.training)

    @property
    def weight(self):
        """There is none: a model that multiplies by the weight itself would miss the adapter."""
        raise InputError(
            f"LoRA on {self.name}: this architecture reads the layer's weight past the adapter; "
            "name other layers with --lora_layers"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Without its adapters a policy is the model that it started from: PPO's reference.
        if not self.on:
            return self.base_layer(x)

        # The factors of a product must have one type. Autocast casts A and B itself.
        A = self.lora_A
        B = self.lora_B
        dtype = autocast_dtype(x.device.type)
        if dtype is None:
            A = A.to(x.dtype)
            B = B.to(x.dtype)
        else:
            x = x.to(dtype)

        # Two thin products, A first, since B A would be as large as W. The scale is applied to the
        # narrow tensor between the two.
        low = F.linear(self.dropout(x), A)  # [.., r]
        change = F.linear(self.scale * low, B)  # [.., out]
        # In place, so the sum needs no memory of its own. No backward pass reads `change`.
        return change.add_(self.base_layer(x))

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The plain layer, with W + (alpha / r) B A for its weight."""
        delta = self.scale * self.lora_B @ self.lora_A  # [out, in]
        if isinstance(self.base_layer, Conv1D):
            delta = delta.T  # [in, out]
        # The sum of weights that are kept in bfloat16 (cast_frozen) is not rounded to it.
        self.base_layer.to(delta.dtype)
        self.base_layer.weight += delta
        return self.base_layer


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    if isinstance(layer, Conv1D):
        n_in, n_out = layer.weight.shape
    else:
        n_out, n_in = layer.weight.shape
    return n_out, n_in


# ------------------------------------------------------------------------- adapters of a model


def add_lora(
    lm,
    pattern: Sequence[str] = ("all-linear",),
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    seed: int = 0,
) -> str:
    """Freeze an HF model, and put adapters on its linear layers that `pattern` names (matching).

        A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0

    That is kaiming_uniform with a = sqrt(5), as in the authors' code. The score head of a
    classifier stays trained. `seed` alone decides A. -> a sentence on what was done. InputError:
    a pattern that names nothing, a model that has adapters already, a layer that is tied to the
    embeddings or whose weight the model reads itself. Pitfall: new weights start small, so LoRA
    takes a larger learning rate than full training, often ten times.
    """
    if adapters(lm):
        raise InputError("this model has adapters already: merge them first")
    # A wrong pattern must be an error before the model is changed.
    check_pattern(lm, pattern)
    layers = matching(lm, pattern)

    # All weights that are there already are frozen; those of the adapters come after.
    lm.requires_grad_(False)
    # With torch's global generator A would also depend on what was drawn before.
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        n_out, n_in = shape_of(layer)
        uniform = 2 * torch.rand(rank, n_in, generator=generator) - 1  # in [-1, 1)
        lora_A = uniform / n_in**0.5  # [r, in]
        # B = 0, so B A x = 0. If A were 0 too, both would have the gradient 0 for ever.
        lora_B = torch.zeros(n_out, rank)  # [out, r]
        put_adapter(lm, name, lora_A, lora_B, alpha, dropout)
    # A model that reads weights past an adapter is found here (LoRA.weight).
    with torch.no_grad():
        lm.base_model(input_ids=torch.tensor([[1, 2]], device=lm.device), use_cache=False)

    # A classifier's head is new, and small enough to be trained in full.
    heads = heads_of(lm)
    for head in heads:
        getattr(lm, head).requires_grad_(True)

    n_trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    also = f" and the {heads[0]} head" if heads else ""
    return (
        f"LoRA of rank {rank} on {len(layers)} linear layers ({', '.join(last_names(layers))})"
        f"{also}: {n_trained:,} trained, the rest is frozen"
    )


def heads_of(lm) -> list[str]:
    """The names of a classifier's heads; none for a language model."""
    return [head for head in HEADS if hasattr(lm, head)]


def check_pattern(lm, pattern: Sequence[str]):
    """InputError where one entry of a pattern names no linear layer."""
    # Each entry is tried alone, since a misspelt one would go unnoticed beside one that is right.
    for entry in pattern:
        if not matching(lm, [entry]):
            known_names = ", ".join(sorted(last_names(matching(lm, ".*"))))
            raise InputError(
                f"LoRA layers {entry}: no linear layer of {type(lm).__name__} has this name; "
                f"there are {known_names}"
            )


def last_names(names: Iterable[str]) -> list[str]:
    """The different last parts of names, in their order: layers.0.mlp.up_proj -> up_proj."""
    return list(dict.fromkeys(name.split(".")[-1] for name in names))


def matching(lm, pattern: str | Sequence[str]) -> dict[str, nn.Module]:
    """{name: layer} of the linear layers that a pattern names; a classifier's head is none of them.

    "all-linear": all but the output head. Any other string: a regular expression for whole names. A
    list: names, or regular expressions, for the ends of names ("q_proj", "layers.0.mlp.up_proj").
    These are PEFT's rules.
    """
    layers = linear_layers(lm)
    if pattern == "all-linear" or list(pattern) == ["all-linear"]:
        head = lm.get_output_embeddings()
        return {name: layer for name, layer in layers.items() if layer is not head}

    # An end of a name begins at its start or after a dot: "proj" does not name "mlp.up_proj".
    if isinstance(pattern, str):
        expressions = [pattern]
    else:
        expressions = [rf"(?:.*\.)?(?:{end})" for end in pattern]
    matched = {}
    try:
        for name, layer in layers.items():
            if any(re.fullmatch(expression, name) for expression in expressions):
                matched[name] = layer
    except (re.error, RecursionError, OverflowError) as e:
        raise InputError(f"LoRA layers {pattern}: not a regular expression ({e})") from None
    return matched


def linear_layers(lm) -> dict[str, nn.Module]:
    """{name: layer} of all linear layers but a classifier's head."""
    layers = {}
    for name, module in lm.named_modules():
        in_head = name.split(".")[0] in HEADS
        if is_linear(module) and not in_head:
            layers[name] = module
    return layers


@torch.no_grad()
def is_linear(module: nn.Module) -> bool:
    """Whether a module computes W x + b.

    A class that is made from nn.Linear may (Falcon's does), or may compute more (a router's does).
    """
    if type(module) in (nn.Linear, Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    x = module.weight.new_ones(1, 1, module.in_features)
    try:
        output = module(x)
    except Exception:  # it reads something else than hidden states
        return False
    expected = F.linear(x, module.weight, module.bias)
    if not isinstance(output, torch.Tensor) or output.shape != expected.shape:
        return False
    return torch.allclose(output, expected, rtol=1e-2, atol=1e-3)


def put_adapter(
    lm, name: str, lora_A: torch.Tensor, lora_B: torch.Tensor, alpha: float, dropout: float
):
    """Put an adapter on the linear layer of this name.

    InputError: the layer is tied to the embeddings. Merging would change the embeddings too.
    """
    layer = lm.get_submodule(name)
    require(
        not is_tied(lm, layer),
        f"LoRA on {name}: it is tied to the embeddings, and an adapter on it could not be merged",
    )
    adapter = LoRA(layer, lora_A, lora_B, alpha, dropout)
    adapter.name = name
    replace_layer(lm, name, adapter)


def is_tied(lm, layer: nn.Module) -> bool:
    """Whether a linear layer's weight is that of the embeddings."""
    for module in lm.modules():
        if isinstance(module, nn.Embedding) and module.weight is layer.weight:
            return True
    return False


def replace_layer(lm, name: str, layer: nn.Module):
    """Put a layer in the place of the one of this name."""
    # "layers.0.mlp.up_proj" is up_proj in layers.0.mlp; "lm_head" is lm_head in "", the model.
    parent, _, child = name.rpartition(".")
    setattr(lm.get_submodule(parent), child, layer)


def adapters(module: nn.Module) -> dict[str, LoRA]:
    """{name: LoRA} of the adapters in a module."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRA)}


@contextlib.contextmanager
def adapters_off(module: nn.Module):
    """Within this context the module computes what it did before it had adapters, bit for bit."""
    layers = adapters(module).values()
    # These contexts can be nested, so each adapter goes back to what it was.
    before = [layer.on for layer in layers]
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer, on in zip(layers, before):
            layer.on = on


def merge(lm):
    """Fold the adapters into the weights, W <- W + (alpha / r) B A. -> lm, with plain layers."""
    for name, layer in adapters(lm).items():
        replace_layer(lm, name, layer.merged())
    return lm


def choose_trained(lm, config) -> str:
    """Choose what a run trains of a model by its flags: adapters, the upper blocks, or everything.

    -> a sentence on what was done
    """
    if not config.lora_rank:
        return freeze(lm, config.freeze_layers)
    return add_lora(
        lm,
        config.lora_layers,
        config.lora_rank,
        config.lora_alpha,
        config.lora_dropout,
        config.seed,
    )


def cast_frozen(lm, config):
    """Cast the linear layers that are not trained to the type of --frozen_dtype, in place.

    Autocast computes with their weights in bfloat16 anyway, so results stay the same, bit for bit.
    Embeddings and norms stay in float32, as autocast leaves them. So does a head that is tied to
    the embeddings; but where adapters alone are saved, it gets weights of its own, in bfloat16.
    InputError: the run saves these weights, and their files hold more than bfloat16.
    """
    if config.frozen_dtype == "float32":
        return
    # An adapter folder holds nothing of its base. A whole model holds what would be rounded here.
    saves_adapters_alone = config.lora_rank and not config.merge
    frozen = []
    # The base layer of an adapter is among these. A and B are no layers, and stay in float32.
    for layer in linear_layers(lm).values():
        if any(p.requires_grad for p in layer.parameters()):
            continue
        if not is_tied(lm, layer):
            frozen.append(layer)
        elif saves_adapters_alone:
            # The head gets a parameter of its own. Casting the tied one would cast the embeddings.
            layer.weight = nn.Parameter(layer.weight.to(torch.bfloat16), requires_grad=False)
            frozen.append(layer)

    # Weights that came in bfloat16 are saved in bfloat16 again, and lose nothing.
    is_in_bfloat16 = getattr(lm, "stored_dtype", torch.float32) == torch.bfloat16
    require(
        saves_adapters_alone or is_in_bfloat16 or not frozen,
        "--frozen_dtype bfloat16 would round weights that this run saves, since the model's files "
        "do not hold bfloat16; with --lora_rank and without --merge, adapters alone are saved",
    )
    for layer in frozen:
        layer.to(torch.bfloat16)

"""Inside a Hugging Face model: its decoder blocks, freezing them, running frozen ones only once.

    B sequences, T tokens, D hidden, L blocks, n of them frozen

A frozen block maps the same tokens to the same hidden states for ever. So the frozen trunk runs
once over a rollout, and what leaves it is handed to the blocks above, of the policy in every epoch
and of the reference alike:

    tokens -> embeddings, blocks 0 .. n-1 -> stored [B, T, D] -+-> blocks n .. L-1 of the policy
              (frozen, run once a rollout)                     |   (trained)
                                                               `-> blocks n .. L-1 of the reference
                                                                   (a copy)
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..errors import InputError


def block_list(lm) -> tuple[nn.Module, str, nn.ModuleList]:
    """The decoder blocks of any HF model: the module that owns them, their name there, the blocks.

    They are the first ModuleList with one entry for each layer of the config. A model that reads
    images too may have as many blocks for these, outside the part that transformers calls decoder.
    """
    # The list is found by its length, since its name differs: model.layers in LLaMA, transformer.h
    # in GPT-2, model.decoder.layers in OPT.
    n_layers = lm.config.get_text_config().num_hidden_layers
    for module in lm.base_model.get_decoder().modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == n_layers:
                return module, name, child
    raise InputError(f"{type(lm).__name__}: found no list of its {n_layers} blocks")


def blocks(lm) -> nn.ModuleList:
    """The decoder blocks of any HF model, bottom first."""
    _, _, layers = block_list(lm)
    return layers


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of what is trained, each shared tensor once."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def freeze(lm, fraction: float) -> str:
    """Freeze the embeddings and the bottom int(fraction * L) blocks; 0 freezes nothing.

    -> a sentence on what was done
    """
    if fraction <= 0:
        return "everything is trained"
    layers = blocks(lm)
    n = int(fraction * len(layers))
    # Token embeddings and learned positions. If these were trained, what enters the frozen blocks
    # would change, and so would what leaves them.
    embeddings = [m for m in lm.base_model.modules() if isinstance(m, nn.Embedding)]
    for module in [*embeddings, *layers[:n]]:
        module.requires_grad_(False)

    # A head that is tied to the embeddings is the same tensor and is frozen too: the user is told.
    note = f"embeddings and the bottom {n} of {len(layers)} blocks are frozen"
    head = lm.get_output_embeddings()
    if head is not None and any(head.weight is module.weight for module in embeddings):
        note += "; the LM head is tied to the embeddings and frozen with them"
    return note


# ----------------------------------------------------------------------------------------- speed


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The type that autocast casts to on this kind of device; None where it is off."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def speed_up(lm, device: torch.device, dtype: str, compile: bool = False):
    """Make the same forward and backward passes faster on this hardware.

    Results change by float error.
    """
    lm.compiled = compile
    # sampling() goes back to this kind of attention.
    lm.attention = lm.config._attn_implementation
    # In bfloat16 on a CPU the backward pass of torch's fused attention takes 2 to 4 times as long
    # as that of plain matrix products.
    if device.type == "cpu" and dtype == "bfloat16":
        lm.set_attn_implementation("eager")
    # Block by block: one graph of a deep model would take far longer to compile.
    if compile:
        for block in blocks(lm):
            block.compile()


def compiled(lm, function: Callable) -> Callable:
    """The function, compiled if speed_up() was told to compile this model."""
    if getattr(lm, "compiled", False):
        return compile_once(function)
    return function


@functools.cache
def compile_once(function: Callable) -> Callable:
    """torch.compile(function), which takes milliseconds even where it compiles nothing anew."""
    return torch.compile(function)


@contextlib.contextmanager
def eager(lm) -> Iterator[None]:
    """A context in which what was compiled runs as it is written, in rollouts too."""
    if not getattr(lm, "compiled", False):
        yield
        return
    # Two kinds of code are compiled. The stance makes torch run blocks as they are written. Other
    # code, such as compiled() and the rollout's loop, asks lm.compiled first.
    lm.compiled = False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        lm.compiled = True


@contextlib.contextmanager
def sampling(lm) -> Iterator[None]:
    """A context for decoding, which undoes what speed_up() does for the update.

    Shapes are others than the update's, so the blocks that were compiled for it run as they are
    written; compiled_decode.py compiles them for decoding. Without a backward pass fused attention
    is the faster one.
    """
    fused = getattr(lm, "attention", lm.config._attn_implementation)
    with compiled_code_aside(lm), attention_is(lm, fused):
        yield


@contextlib.contextmanager
def compiled_code_aside(lm) -> Iterator[None]:
    """A context in which a call of a block does not run what block.compile() has made."""
    layers = []
    if getattr(lm, "compiled", False):
        layers = list(blocks(lm))
    # block.compile() keeps its code in _compiled_call_impl; without it a call runs forward().
    compiled = [block._compiled_call_impl for block in layers]
    try:
        for block in layers:
            block._compiled_call_impl = None
        yield
    finally:
        for block, code in zip(layers, compiled):
            block._compiled_call_impl = code


@contextlib.contextmanager
def attention_is(lm, implementation: str) -> Iterator[None]:
    """A context in which the model's attention is computed by one of transformers' functions."""
    usual = lm.config._attn_implementation
    try:
        if implementation != usual:
            lm.set_attn_implementation(implementation)
        yield
    finally:
        if implementation != usual:
            lm.set_attn_implementation(usual)


# ------------------------------------------------------------------------------ the frozen trunk


class Stored(nn.Module):
    """Stands in the place of frozen blocks whose output is known."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, *args, **kwargs):
        return self.output


class FrozenTrunk:
    """The embeddings and bottom n blocks of a model, where none of them is trained.

    n = 0 where anything of them is: then the model has to run whole.
    """

    def __init__(self, lm):
        self.n = count_frozen(blocks(lm))
        # Whether this architecture's blocks return (hidden, ...) rather than hidden.
        self.tuples = False
        if self.n == 0:
            return

        # Something below the last frozen block may be trained (embeddings, a norm on them), and in
        # some architectures the upper blocks read more than the hidden states. No config tells, so
        # the model is run on two tokens.
        ids = torch.tensor([[1, 2]], device=next(lm.parameters()).device)
        is_trained_below = self.bottom(lm, ids).requires_grad
        if is_trained_below or not self.same(lm, ids):
            self.n = 0

    @torch.no_grad()
    def same(self, lm, ids: torch.Tensor) -> bool:
        """Whether the blocks above, run on what was stored, give what the whole model gives."""
        # The frozen blocks alone, then the upper blocks on their output.
        with self.stored(lm, self.run(lm, ids)):
            split = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        whole = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return torch.allclose(split, whole, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def run(self, lm, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] -> what leaves the frozen blocks, [B, T, D]."""
        # Code that was compiled for another block would not call the hook.
        with eager(lm):
            return self.bottom(lm, ids)

    def bottom(self, lm, ids: torch.Tensor) -> torch.Tensor:
        """run(), with gradients where anything below is trained.

        Notes whether this architecture's blocks return tuples.
        """
        parent, name, layers = block_list(lm)
        outputs = []

        def keep(module, args, output):
            outputs.append(output)

        hook = layers[self.n - 1].register_forward_hook(keep)
        try:
            # The model has n blocks in here. Its last norm runs too, but its output is not used.
            with swapped(parent, name, layers[: self.n]):
                lm.base_model(input_ids=ids, use_cache=False)
        finally:
            hook.remove()
        output = outputs[0]
        self.tuples = not isinstance(output, torch.Tensor)
        return output[0] if self.tuples else output

    def stored(self, lm, hidden: torch.Tensor):
        """A context in which lm's forward takes `hidden` [B, T, D] from the frozen blocks.

        Only the blocks above them run.
        """
        parent, name, layers = block_list(lm)
        output = (hidden,) if self.tuples else hidden
        stand_in = Stored(output)
        # One stand-in for each frozen block: every one of them puts out what the last would. So the
        # list keeps its length, and the blocks above keep their numbers.
        upper = list(layers[self.n :])
        return swapped(parent, name, nn.ModuleList([stand_in] * self.n + upper))


def count_frozen(layers: nn.ModuleList) -> int:
    """How many blocks, from the bottom, have nothing that is trained."""
    n = 0
    for block in layers:
        if trainable(block):
            break
        n += 1
    return n


@contextlib.contextmanager
def swapped(parent: nn.Module, name: str, child: nn.Module) -> Iterator[None]:
    """A context in which parent.name is `child`."""
    original = getattr(parent, name)
    setattr(parent, name, child)
    try:
        yield
    finally:
        setattr(parent, name, original)

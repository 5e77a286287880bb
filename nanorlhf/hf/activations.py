"""Inside a running model: read, replace or switch off what its layers put out.

    B sequences, T tokens of this forward (1 for each step of a rollout, which has a cache),
    D hidden, L blocks

A place is (layer, site), for example (3, "mlp"):

    x --+-- norm -- attention --+--  + --+-- norm -- MLP --+--  + --+--  x of the next block
        |             "attention"    |   |            "mlp"     |    "residual": what leaves a block
        `----------------------------'   `----------------------'

Blocks are found by blocks.py, and within a block its attention and its MLP by what they are, never
by their names in one architecture. A LoRA policy's adapters are part of its layers: what they add
is seen like everything else.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from ..errors import InputError
from .blocks import Stored, block_list, blocks, eager, swapped

SITES = ("mlp", "attention", "residual")

Place = tuple[int, str]


def place_name(place: Place) -> str:
    """(3, "mlp") -> "3_mlp": a place in the name of a file or of a tensor."""
    layer, site = place
    return f"{layer}_{site}"


def module_at(lm, place: Place) -> nn.Module:
    """The module of any HF model whose output is the place's: a block, or its attention or MLP.

    InputError: no such layer or site; a block that is not one attention layer and one MLP. Pitfall:
    it is the layer's own output. Where a norm follows before it is added to the residual stream
    (Gemma 2 and 3), it has not been applied yet.
    """
    layer, site = place
    layers = blocks(lm)
    if layer not in range(len(layers)):
        raise InputError(
            f"layer {layer}: {type(lm).__name__} has the layers 0 to {len(layers) - 1}"
        )
    if site not in SITES:
        raise InputError(f"site {site!r}: it must be one of {', '.join(SITES)}")
    block = layers[layer]
    if isinstance(block, Stored):
        raise InputError(f"layer {layer} is frozen: its output was stored, and it does not run")
    if site == "residual":
        return block

    # "mlp" is whatever has matrices and is not attention: a plain MLP, a gated one, experts.
    candidates = []
    for part in parts_with_matrices(block):
        # transformers calls an attention layer so in every architecture.
        is_attention = "attention" in type(part).__name__.lower()
        if is_attention == (site == "attention"):
            candidates.append(part)
    # OPT's blocks hold the two layers of the MLP, fc1 and fc2, side by side: no module is the MLP.
    if len(candidates) != 1 or adds_the_residual(candidates[0]):
        kinds = ", ".join(type(child).__name__ for child in block.children())
        raise InputError(
            f"layer {layer} of {type(lm).__name__} has no {site} output of its own (it consists of "
            f"{kinds}); use residual"
        )
    return candidates[0]


def parts_with_matrices(block: nn.Module) -> list[nn.Module]:
    """The attention layer and the MLP of a block: norms have vectors only."""
    parts = []
    for child in block.children():
        if any(parameter.dim() > 1 for parameter in child.parameters()):
            parts.append(child)
    return parts


def adds_the_residual(module: nn.Module) -> bool:
    """Whether a layer adds its output to the residual stream itself, as Bloom's do."""
    return "residual" in inspect.signature(module.forward).parameters


def hook_output(module: nn.Module, function: Callable[[Tensor], Tensor | None]):
    """Call function(x [B, T, D]) on all that the module puts out. -> the hook

    What the function returns takes the place of x; None leaves x. Whatever the function keeps stays
    as it was: the model goes on with a copy.
    """

    def hook(module, args, output):
        is_tuple = isinstance(output, tuple)  # (x, attention weights and the like)
        x = output[0] if is_tuple else output
        new = function(x)
        if new is None:
            new = x
        # Some blocks add to it in place: Falcon's add the attention's output to the MLP's.
        new = new.clone()
        return (new, *output[1:]) if is_tuple else new

    return module.register_forward_hook(hook)


@contextlib.contextmanager
def captured(lm, places: Iterable[Place]) -> Iterator[dict[Place, Tensor]]:
    """A context that keeps what the model puts out at these places.

    It gives a dictionary {place: [B, T, D] of the last forward}, empty before the first. Gradients
    flow through it where the forward has them. Compiled blocks run as they are written in here.
    InputError: module_at. Pitfalls: padding is in it, the caller knows the lengths; of a rollout it
    is one token's, of the rows still being written; a frozen block whose output was stored
    (blocks.FrozenTrunk) does not run, so its places are missing.
    """
    # All errors come before the first hook.
    modules = {place: module_at(lm, place) for place in places}
    outputs = {}

    # Each forward starts with an empty dictionary, so a place that does not run is missing from it.
    def forget(module, args):
        outputs.clear()

    # keep_at() fixes the place for each hook. A function written in the loop below would look
    # `place` up when it is called, and all of them would find the last one.
    def keep_at(place):
        def keep(x):
            outputs[place] = x

        return keep

    # The stack removes every hook in the end, whatever goes wrong inside.
    with contextlib.ExitStack() as stack:
        # Code that was compiled before would not call the hooks.
        stack.enter_context(eager(lm))
        hook = lm.base_model.register_forward_pre_hook(forget)
        stack.callback(hook.remove)
        for place, module in modules.items():
            hook = hook_output(module, keep_at(place))
            stack.callback(hook.remove)
        yield outputs


@contextlib.contextmanager
def replaced(lm, place: Place, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A context in which function(x [B, T, D]) -> [B, T, D] takes the place of an output.

    That is so in every forward, also in rollouts: once for the prompts, each distinct one a row,
    then once a token (T = 1). torch.zeros_like switches the place off (zero ablation). Contexts can
    be nested; an inner one at the same place is given what the outer one made. InputError:
    module_at; ValueError: another shape. Pitfalls: the function also sees padding, so it must treat
    tokens one by one; a rollout on a CPU calls it in inference mode; a value of the GPU that it
    waits for (.item()) keeps decode steps from being captured as a graph.
    """

    def replace(x):
        new = function(x)
        if new.shape != x.shape:
            raise ValueError(
                f"the replacement at {place_name(place)} is {list(new.shape)}, "
                f"the output {list(x.shape)}"
            )
        # A function may compute in float32, as autoencoders do; the model may be in bfloat16.
        return new.to(x.dtype)

    module = module_at(lm, place)
    # Compiled code would not call the hook.
    with eager(lm):
        hook = hook_output(module, replace)
        try:
            yield
        finally:
            hook.remove()


@contextlib.contextmanager
def running_ids(lm) -> Iterator[Callable[[], Tensor]]:
    """A context that gives a function: it returns the token ids [B, T] of the forward that runs.

    For a function of replaced() that must know which token it changes. In a rollout T is that of
    the prompts first, then 1; padding is in it. Pitfall: it knows nothing before the first forward.
    """
    last = {}

    def keep_ids(module, args, kwargs):
        # Some architectures pass it by place.
        last["ids"] = args[0] if args else kwargs["input_ids"]

    hook = lm.base_model.register_forward_pre_hook(keep_ids, with_kwargs=True)
    try:
        yield lambda: last["ids"]
    finally:
        hook.remove()


@torch.no_grad()
def activations(lm, ids: Tensor, places: Iterable[Place]) -> dict[Place, Tensor]:
    """Token ids [B, T], padded on the right -> {place: [B, T, D]}.

    No block above the highest place runs. Dropout is the caller's: call lm.eval() first.
    InputError: module_at.
    """
    parent, name, layers = block_list(lm)
    highest = max(layer for layer, _ in places)
    # During this forward the model's list of blocks ends with the highest one that is asked for.
    with captured(lm, places) as outputs:
        with swapped(parent, name, layers[: highest + 1]):
            lm.base_model(input_ids=ids, use_cache=False)
    return dict(outputs)

"""Inside a Hugging Face model: its decoder blocks, freezing them, and running the frozen ones only once.

    B sequences, T tokens, D hidden, L blocks, n of them frozen

A frozen block maps the same tokens to the same hidden states for ever. So the frozen trunk runs once over a rollout, and what leaves
it is handed to the blocks above, of the policy in every epoch and of the reference alike:

    tokens -> embeddings -> blocks 0 .. n-1 -> stored [B, T, D] -> blocks n .. L-1 of the policy      (trained)
               (frozen, run once a rollout)                    `-> blocks n .. L-1 of the reference   (a copy)
"""

import contextlib

import torch
from torch import nn

from ..errors import InputError


def block_list(lm):
    """(the module that owns them, the name there, the decoder blocks) of any HF model.

    They are the first ModuleList with one entry for each layer of the config.
    """
    for module in lm.base_model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == lm.config.num_hidden_layers:
                return module, name, child
    raise InputError(f"{type(lm).__name__}: found no list of its {lm.config.num_hidden_layers} blocks")


def blocks(lm):
    """The decoder blocks of any HF model, bottom first."""
    return block_list(lm)[2]


def freeze(lm, fraction):
    """Freeze the embeddings and the bottom int(fraction * L) blocks; 0 freezes nothing. Returns a sentence on what was done."""
    if fraction <= 0:
        return "everything is trained"
    layers = blocks(lm)
    n = int(fraction * len(layers))
    embeddings = [m for m in lm.base_model.modules() if isinstance(m, nn.Embedding)]
    for module in [*embeddings, *layers[:n]]:
        module.requires_grad_(False)
    head = lm.get_output_embeddings()
    tied = head is not None and any(head.weight is m.weight for m in embeddings)
    return f"embeddings and the bottom {n} of {len(layers)} blocks are frozen" + (
        "; the LM head is tied to the embeddings and frozen with them" if tied else ""
    )


def trainable(module):
    """(name, parameter) of what is trained, each shared tensor once."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def speed_up(lm, device, dtype, compile=False):
    """What makes the same forward and backward passes faster on this hardware; results change by float error.

    In bfloat16 on a CPU the backward pass of torch's fused attention takes 2 to 4 times as long as that of plain matrix products.
    """
    lm.compiled, lm.attention = compile, lm.config._attn_implementation
    if device.type == "cpu" and dtype == "bfloat16":
        lm.set_attn_implementation("eager")
    for block in blocks(lm) if compile else ():
        block.compile()


def eager(lm):
    """A context in which compiled blocks run as they are written."""
    return torch.compiler.set_stance("force_eager") if getattr(lm, "compiled", False) else contextlib.nullcontext()


@contextlib.contextmanager
def sampling(lm):
    """A context for decoding, undoing what speed_up() does for the update: shapes change with every token, so nothing compiled is
    used, and without a backward pass fused attention is the faster one."""
    own = lm.config._attn_implementation
    fused = getattr(lm, "attention", own)
    try:
        if fused != own:
            lm.set_attn_implementation(fused)
        with eager(lm):
            yield
    finally:
        if fused != own:
            lm.set_attn_implementation(own)


class Stored(nn.Module):
    """Stands in the place of frozen blocks whose output is known."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, *args, **kwargs):
        return self.output


class FrozenTrunk:
    """The embeddings and bottom n blocks of a model, where none of them is trained; n = 0 where anything of them is."""

    def __init__(self, lm):
        frozen = [not trainable(block) for block in blocks(lm)] + [False]
        self.n = frozen.index(False)
        self.tuples = False  # whether this architecture's blocks return (hidden, ...) rather than hidden
        # Run the model whole if anything below the last frozen block is trained (embeddings, a norm on them), and if the architecture's
        # upper blocks read more than the hidden states.
        ids = torch.tensor([[1, 2]], device=next(lm.parameters()).device)
        if self.n and (self.bottom(lm, ids).requires_grad or not self.same(lm, ids)):
            self.n = 0

    @torch.no_grad()
    def same(self, lm, ids):
        """Whether the blocks above, run on what was stored, give what the whole model gives."""
        with self.stored(lm, self.run(lm, ids)):
            split = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return torch.allclose(split, lm.base_model(input_ids=ids, use_cache=False).last_hidden_state, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def run(self, lm, ids):
        """Token ids [B, T] -> what leaves the frozen blocks, [B, T, D]."""
        with eager(lm):  # code that was compiled for another block would not call the hook
            return self.bottom(lm, ids)

    def bottom(self, lm, ids):
        """run(), with gradients where anything below is trained; notes whether this architecture's blocks return tuples."""
        (parent, name, layers), outputs = block_list(lm), []
        hook = layers[self.n - 1].register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            with swapped(parent, name, layers[: self.n]):
                lm.base_model(input_ids=ids, use_cache=False)
        finally:
            hook.remove()
        self.tuples = isinstance(outputs[0], tuple)
        return outputs[0][0] if self.tuples else outputs[0]

    def stored(self, lm, hidden):
        """A context in which lm's forward takes `hidden` [B, T, D] from the frozen blocks, and runs only the ones above."""
        parent, name, layers = block_list(lm)
        stand_in = Stored((hidden,) if self.tuples else hidden)
        return swapped(parent, name, nn.ModuleList([stand_in] * self.n + list(layers[self.n :])))


@contextlib.contextmanager
def swapped(parent, name, child):
    """Within, parent.name is `child`."""
    own = getattr(parent, name)
    setattr(parent, name, child)
    try:
        yield
    finally:
        setattr(parent, name, own)

"""The loop of GPUs with --compile: decode.decode_static(), with less to launch and to read.

    B sequences, P prompt tokens (left-padded), R response tokens, C columns of a cache, n of them
    read by a step, D hidden

A decode step reads all weights for one token a row, in hundreds of small kernels. Three things make
it faster:

- The blocks are transformers' own, compiled once. A block reads the cache by its number, so
  torch.compile would make code for each of them. Here all have the number 0, and a cache that
  shows them one layer's keys and values: their own.

      block 0 ---+                 +--- keys, values of layer 0
      block 1 ---+--- Window ------+--- keys, values of layer 1
      block 2 ---+   (one layer)   +--- keys, values of layer 2

- Linear layers hold copies of their weights in bfloat16, cast once a rollout. In compiled code
  autocast would cast float32 weights anew at every token.
- Captured steps are kept, one for each n, so that attention reads the columns that are written and
  few others. To capture them in every rollout would cost half of what they save.

A captured step reads and writes fixed addresses. What lies there stays allocated between rollouts,
while PPO updates: the cache, the copies, and a step's temporaries.

Read decode.py first; then decode_compiled() and Decoder here, then what they call.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer
from transformers.pytorch_utils import Conv1D

from .blocks import attention_is, autocast_dtype, blocks
from .decode import (
    ALIGNMENT,
    CHECK_EVERY,
    capture,
    count_positions,
    has_fsdp_units,
    read_prompts,
    run_trunk,
    static_cache,
    write_column,
)
from .lora import adapters

# A step reads a multiple of so many columns of the cache.
BUCKET = 64
# Decoders that are kept: that of training's rollouts, and that of an evaluation's.
KEPT = 2


def is_compiled(lm) -> bool:
    """Whether a model decodes in this loop: with --compile, where it has a static cache.

    FSDP's gathered weights lie elsewhere in every rollout; they are left to decode_static().
    """
    if not getattr(lm, "compiled", False) or has_fsdp_units(lm):
        return False
    return static_cache(lm, 1) is not None


def decode_compiled(
    sampler,
    ids: Tensor,
    mask: Tensor,
    u: Tensor,
    out: dict[str, Tensor],
    finished: Tensor,
):
    """Write one response to each prompt, as decode_static() does.

    Any exception may come out of a compiler. The model is then as it was and keeps no decoder, and
    nothing is written.
    """
    model = sampler.model
    P = ids.shape[1]
    try:
        # The casts come first: describe_step() compares the addresses that steps will read.
        with cast_linear(model, ids.device.type):
            decoder = find_decoder(sampler, u, P + u.shape[1])
            # The prompts' shape is not that of decode steps, so uncompiled blocks read them.
            decoder.begin(ids, mask, u)
            with compiled_blocks(model.lm, decoder.window, decoder.layers):
                n_written = decoder.go_on(P)
    except BaseException:
        # A rollout that broke off may leave a decoder half made.
        model.decoders.clear()
        raise
    # The decoder's own tensors are written again in the next rollout, so copies are handed out.
    for name, tokens in decoder.out.items():
        out[name][:, :n_written] = tokens[:, :n_written]
    finished.copy_(decoder.finished)


def round_up(n: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least n."""
    return math.ceil(n / unit) * unit


# --------------------------------------------------------------------------------- the decode step


def find_decoder(sampler, u: Tensor, n_columns: int) -> "Decoder":
    """The decoder of an earlier rollout whose step would be the same, or a new one.

    u [B, R]; n_columns: how many the cache needs. One with a larger cache will do, since a step
    reads no more columns than it must.
    """
    decoders = sampler.model.decoders  # {description: decoder}, the one used last at the end
    key = describe_step(sampler, u)
    # The decoder is taken out here and put back below, which moves it to the end.
    decoder = decoders.pop(key, None)
    if decoder is None or decoder.visible.shape[1] < n_columns:
        # What is not kept gives up its memory before a new cache takes more.
        decoder = None
        while len(decoders) >= KEPT:
            del decoders[next(iter(decoders))]
        decoder = Decoder(sampler, *u.shape, round_up(n_columns, BUCKET), u.device)
    decoders[key] = decoder
    return decoder


def describe_step(sampler, u: Tensor) -> tuple:
    """All that a captured step depends on, but for the numbers at the addresses that it reads.

    Under autocast linear layers have other addresses: those of their copies.
    """
    model = sampler.model
    # Every rollout has a new sampler, whose tensors lie elsewhere: compare them by content.
    end_ids = None
    if sampler.end_ids is not None:
        end_ids = tuple(sampler.end_ids.tolist())
    has_token = None
    if sampler.has_token is not None:
        has_token = sampler.has_token.cpu().numpy().tobytes()
    return (
        u.shape,
        (sampler.temperature, sampler.top_k, sampler.top_p, end_ids, has_token),
        model.lm.config._attn_implementation,
        tuple(adapter.on for adapter in adapters(model).values()),
        tuple(tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]),
    )


class Decoder:
    """A decode step, and all that it reads and writes, in place.

    The same as in decode_static(), but for the cache: `layers` are the (keys, values) of each
    block, [B, heads, C, D/heads]. steps: {n: a captured step that reads n columns}.
    """

    def __init__(self, sampler, B: int, R: int, C: int, device: torch.device):
        self.sampler = sampler
        self.layers = None  # made when the first prompts show the sizes of keys and values
        self.steps = {}
        self.pool = None  # the memory of all captured steps
        if device.type == "cuda":
            self.pool = torch.cuda.graph_pool_handle()
        self.window = Window(C, device)
        self.visible = torch.ones(B, C, dtype=torch.bool, device=device)  # which columns are real
        self.token = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.response_column = torch.zeros(1, dtype=torch.long, device=device)  # of u and out
        self.u = torch.zeros(B, R, dtype=torch.float64, device=device)
        self.finished = torch.zeros(B, dtype=torch.bool, device=device)
        self.out = {
            "logprobs": torch.zeros(B, R, device=device),
            "entropies": torch.zeros(B, R, device=device),
            "values": torch.zeros(B, R, device=device),
            "response_ids": torch.zeros(B, R, dtype=torch.long, device=device),
        }

    def begin(self, ids: Tensor, mask: Tensor, u: Tensor):
        """Read the prompts, ids and mask [B, P], and write the first token of each row."""
        P = ids.shape[1]
        lm = self.sampler.model.lm
        # Uncompiled blocks need a cache of all layers. It is freed when this method returns.
        prompt_cache = static_cache(lm, round_up(P, ALIGNMENT))
        hidden = read_prompts(lm, ids, mask, prompt_cache)  # [B, D]

        if self.layers is None:
            self.layers = [self.make_room(layer) for layer in prompt_cache.layers]
        # Columns from P on still hold the last rollout's keys. They are written anew before any
        # token sees them.
        for (keys, values), layer in zip(self.layers, prompt_cache.layers):
            keys[:, :, :P] = layer.keys[:, :, :P]
            values[:, :, :P] = layer.values[:, :, :P]

        # transformers hides the columns to the right of the window's column.
        self.visible[:, :P] = mask
        self.visible[:, P:] = True
        # Captured steps read these addresses, so the tensors are filled and never replaced. The
        # newest token is the prompt's last, in column P - 1; write() then moves on by one.
        self.token.copy_(ids[:, -1:])
        self.position.copy_(count_positions(mask)[:, -1:])
        self.window.column.fill_(P - 1)
        self.response_column.zero_()
        self.u.copy_(u)
        self.finished.zero_()
        self.write(hidden)

    def make_room(self, layer: StaticLayer) -> tuple[Tensor, Tensor]:
        """Room for the keys and values of all C columns. What is masked must still be a number."""
        B, C = self.visible.shape
        _, heads, _, head_size = layer.keys.shape
        keys = layer.keys.new_zeros(B, heads, C, head_size)
        _, heads, _, head_size = layer.values.shape
        values = layer.values.new_zeros(B, heads, C, head_size)
        return keys, values

    def write(self, hidden: Tensor):
        """Sample the next token of each row from hidden [B, D], and write it."""
        token = write_column(
            self.sampler, hidden, self.response_column, self.u, self.out, self.finished
        )
        self.token.copy_(token)
        self.position.add_(1)
        self.response_column.add_(1)
        self.window.column.add_(1)

    def step(self):
        """Read the tokens that were written last, and write the next ones."""
        device_type = self.token.device.type
        dtype = autocast_dtype(device_type)
        # What autocast caches it frees at the end of the rollout, under a graph that reads it.
        with torch.autocast(device_type, dtype, enabled=dtype is not None, cache_enabled=False):
            trunk = run_trunk(
                self.sampler.model.lm,
                self.token,
                self.visible[:, : self.window.n],
                self.position,
                self.window,
            )
            self.write(trunk.last_hidden_state[:, -1])

    def go_on(self, P: int) -> int:
        """Write tokens until all rows have finished -> how many of each row are written."""
        R = self.u.shape[1]
        has_end = self.sampler.end_ids is not None
        t = 1
        while t < R:
            if has_end and t % CHECK_EVERY == 0 and self.finished.all():
                break
            # The token that is read stands at column P + t - 1, so P + t columns are needed. They
            # are rounded up, since each width needs a captured step of its own.
            n = round_up(P + t, BUCKET)
            self.window.n = n
            if n in self.steps:
                self.steps[n]()
                t += 1
            else:
                last = min(R - 1, n - P)  # the last step that reads n columns
                t += self.capture_step(n, last - t + 1)
        return t

    def capture_step(self, n: int, n_steps: int) -> int:
        """Take one step or more of the n_steps that read n columns, and capture one if that pays.

        -> how many were taken
        """
        # The first one may compile. That waits for the GPU, as a captured step must not.
        self.step()
        # capture() is told of n_steps tokens, of which the step above has written the first, as the
        # prompts give the first of R in decode_static().
        step, taken = capture(self.step, n_steps, self.token.device, self.pool)
        # With few steps left, and on a CPU, there was no warm-up: nothing was captured.
        if taken > 1:
            self.steps[n] = step
        return taken


# ---------------------------------------------------------------------------- blocks for one token


class Window(Cache):
    """The cache that blocks see: the first n columns of one layer, whichever block it is.

    `column` [1] is the place in the cache of the token that is read.
    """

    is_compileable = True

    def __init__(self, n: int, device: torch.device):
        # This layer is never filled. transformers only asks whether it is a sliding window's.
        super().__init__(layers=[StaticLayer(max_cache_len=n)])
        self.n = n
        self.column = torch.zeros(1, dtype=torch.long, device=device)

    def show(self, layer: tuple[Tensor, Tensor]):
        """Let the next block see its keys and values."""
        keys, values = layer
        self.keys = keys[:, :, : self.n]  # [B, heads, n, D/heads]
        self.values = values[:, :, : self.n]

    def update(self, key_states, value_states, *args, **kwargs):
        """Write the keys and values of the new token, and return those of all columns."""
        self.keys.index_copy_(2, self.column, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.column, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self, *args, **kwargs):
        """How many tokens stand before the new one, as a tensor."""
        return self.column

    def get_mask_sizes(self, *args, **kwargs):
        """The width of the mask, and the column at which it begins."""
        return self.n, 0


@contextmanager
def compiled_blocks(lm, window: Window, layers: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """A context in which the model reads one token a row, by blocks that are compiled once.

    layers: the keys and values of each block, which `window` shows it.
    """
    # SDPA in compiled code would copy the cache (see one_token_attention); other attention stays.
    attention = lm.config._attn_implementation
    if attention == "sdpa" and lm._can_set_attn_implementation():
        register_one_token_attention()
        attention = "one_token"

    # An attention layer asks the cache for its keys by its number, layer_idx.
    numbered = [module for module in lm.modules() if hasattr(module, "layer_idx")]
    numbers = [module.layer_idx for module in numbered]
    own_forwards = [block.__dict__.get("forward") for block in blocks(lm)]
    try:
        # The window ignores these numbers. But torch.compile may use code that it made for one
        # number for that number alone.
        for module in numbered:
            module.layer_idx = 0
        # run_block() takes the place of the block's forward. It is given that forward, and the keys
        # and values of this block.
        for block, layer in zip(blocks(lm), layers, strict=True):
            block.forward = partial(run_block, block.forward, window, layer)
        with attention_is(lm, attention):
            yield
    finally:
        for module, number in zip(numbered, numbers):
            module.layer_idx = number
        for block, forward in zip(blocks(lm), own_forwards):
            # Most blocks have the method of their class alone.
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def run_block(forward: Callable, window: Window, layer: tuple[Tensor, Tensor], *args, **kwargs):
    """The forward of a block, compiled, which finds its own keys and values in the window."""
    window.show(layer)
    return compiled_call()(forward, *args, **kwargs)


@cache
def compiled_call() -> Callable:
    """A function of (forward, *args) that calls a block's forward, and is compiled.

    There is one for all blocks and rollouts: it takes torch.compile a millisecond to make it.
    Results are rounded where the block as it is written rounds them, so that the update computes
    the same log-probs.
    """

    def call(forward, *args, **kwargs):
        return forward(*args, **kwargs)

    return torch.compile(call, dynamic=None, options={"emulate_precision_casts": True})


def one_token_attention(
    module, query, key, value, attention_mask, is_causal=None, **kwargs
) -> tuple[Tensor, None]:
    """transformers' SDPA for one query a head: [B, H, 1, d] -> [B, 1, H, d].

    Heads that share a key stand as the rows of one query, [B, H_k, H / H_k, d]. In compiled code
    transformers would write a copy of the whole cache for each of them. The mask alone says which
    columns are seen: one query needs no causal order.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # Query heads that share a key are neighbours, so a reshape puts each group on its own rows.
    B, H, _, d = query.shape
    rows = query.reshape(B, key.shape[1], -1, d)
    # The module would tell transformers that heads share a key, and it would copy the keys.
    output, _ = sdpa_attention_forward(
        None, rows, key, value, attention_mask, is_causal=False, **kwargs
    )  # [B, H / H_k, H_k, d]
    return output.transpose(1, 2).reshape(B, 1, H, -1), None


@cache
def register_one_token_attention():
    """Let transformers know the attention "one_token"."""
    # Here, because to import them takes seconds.
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("one_token", one_token_attention)
    AttentionMaskInterface.register("one_token", sdpa_mask)


# --------------------------------------------------------------------------------- the weights


@contextmanager
def cast_linear(model, device_type: str) -> Iterator[None]:
    """A context in which the linear layers of the LM hold their weights in autocast's type.

    Their outputs are those of autocast, bit for bit: it would compute with the same copies. These
    are made once and filled here, so they lie at the same addresses in every rollout, and stay
    allocated: 2 bytes a weight. Norms and embeddings keep their own weights, as they do under
    autocast. Nothing happens without autocast.
    """
    dtype = autocast_dtype(device_type)
    if dtype is None:
        yield
        return
    if model.linear_copies is None:
        model.linear_copies = make_copies(model.lm, dtype)

    # The update has changed the weights: cast them again, into the same memory.
    master_weights = []
    for layer, name, copy in model.linear_copies:
        weight = layer._parameters[name]
        copy.copy_(weight)
        master_weights.append(weight)
    try:
        for layer, name, copy in model.linear_copies:
            layer._parameters[name] = copy
        yield
    finally:
        for (layer, name, _), weight in zip(model.linear_copies, master_weights):
            layer._parameters[name] = weight


def make_copies(lm, dtype: torch.dtype) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(layer, "weight" or "bias", copy in `dtype`) of all linear layers that hold another type.

    Only of transformers' and torch's own layers: others may do more with their weights than
    autocast knows of. A head that is tied to the embeddings is copied, and they are not.
    """
    copies = []
    for layer in lm.modules():
        if type(layer) not in (nn.Linear, Conv1D):
            continue
        # Frozen layers may be in bfloat16 already (lora.cast_frozen).
        for name, p in layer.named_parameters(recurse=False):
            if p.dtype != dtype:
                copy = nn.Parameter(p.detach().to(dtype), requires_grad=False)
                copies.append((layer, name, copy))
    return copies

"""The two decode loops behind rollout.generate(), which write the same responses.

    B sequences (b still being written), P prompt tokens (left-padded), R response tokens, t of them
    written so far, C columns of a cache (one for each token of a row), D hidden

On a CPU arithmetic is dear: decode() lets attention read only the columns written so far, and drops
rows that have finished. On a GPU launching kernels is dear: decode_static() keeps all shapes, lets
finished rows run on, and captures one decode step as a CUDA graph that is replayed for every token.
With --compile a third loop, in compiled_decode.py, does the same in fewer and larger kernels.
"""

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer, StaticSlidingWindowLayer

from ..errors import InputError, first_line
from .blocks import autocast_dtype
from .weight_layout import packed_weights, turned_weights

# Decode steps before one is captured: as many as torch's documentation asks for.
WARM_UP = 3
# Decode steps between two looks at whether all rows have finished: each look waits for the GPU.
CHECK_EVERY = 16
# Attention kernels want masks whose width is a multiple of this.
ALIGNMENT = 16

# The mode that capture() uses warns that it is a prototype. The filter stands here because a filter
# that is set at every rollout makes Python show its other warnings again.
warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")


# ---------------------------------------------------------------------------------------- caches


class RoomyLayer(DynamicLayer):
    """A growing layer of a cache that has room for all `length` tokens from the start.

    transformers' own layer copies itself whole at every token. This one writes into its room, and
    its keys and values are views of the columns that have been written: the same numbers.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def update(self, key_states, value_states, *args, **kwargs):
        """Write the keys and values of new tokens, and return those of all tokens so far."""
        begin = self.get_seq_length()
        # The room is made at the first update, since the first keys and values tell the number of
        # heads, their size and their type.
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.key_room = self.make_room(key_states)
            self.value_room = self.make_room(value_states)
        # P tokens at once for the prompts, then one a step.
        end = begin + key_states.shape[2]
        self.key_room[:, :, begin:end] = key_states
        self.value_room[:, :, begin:end] = value_states
        self.show_columns(end)
        return self.keys, self.values

    def make_room(self, states):
        """An empty tensor for the keys or the values of all tokens: [b, heads, length, D/heads]."""
        b, heads, _, head_size = states.shape
        return states.new_empty(b, heads, self.length, head_size)

    def show_columns(self, end):
        """Let keys and values be views of the first `end` columns."""
        self.keys = self.key_room[:, :, :end]
        self.values = self.value_room[:, :, :end]

    def reorder_cache(self, rows):
        """Hold these rows in this order. A row may come several times, or not at all."""
        end = self.get_seq_length()
        self.key_room = self.key_room[rows]  # [len(rows), heads, length, D/heads]
        self.value_room = self.value_room[rows]
        # Until here keys and values are views of the old rooms.
        self.show_columns(end)


class KeyValueCache(Cache):
    """A cache that holds keys and values in autocast's type.

    Rotary embeddings make bfloat16 keys float32, and attention would cast all of them back at every
    token. It sees the same numbers if each key is cast once, when it is written.
    """

    def update(self, key_states, value_states, *args, **kwargs):
        dtype = autocast_dtype(key_states.device.type) or key_states.dtype
        return super().update(key_states.to(dtype), value_states.to(dtype), *args, **kwargs)


# ---------------------------------------------------------------------------- around the loops


@contextmanager
def decoding(model, device_type: str, n_rows: int):
    """A context for sampling n_rows responses: dropout is off, operators cost little overhead, and
    weights are cast and laid out once a rollout rather than once a token.

    Autocast keeps the bfloat16 copy of a weight for the length of its context, but only if the
    weight requires grad, so all weights do in here. On a CPU large weights are laid out for few
    rows (weight_layout.py), and inference mode makes decoding some 5 % faster.
    Pitfall: what is made in inference mode can never be trained on. Neither autocast's copies nor
    what FSDP gathers may be made in it.
    """
    was_training = model.training
    parameters = list(model.lm.parameters())
    on_plain_cpu = device_type == "cpu" and not any_sharded(parameters)
    frozen = []
    mode = torch.no_grad()
    layout = nullcontext()
    if autocast_dtype(device_type):
        # Autocast makes its copies inside the loop, so this cannot be inference mode. The copies of
        # frozen weights are kept only if these require grad in here.
        for p in parameters:
            if not p.requires_grad:
                frozen.append(p)
        if on_plain_cpu and autocast_dtype(device_type) == torch.bfloat16:
            layout = packed_weights(model.lm, n_rows)
    elif on_plain_cpu:
        mode = torch.inference_mode()
        layout = turned_weights(model.lm, n_rows)

    try:
        model.eval()
        for p in frozen:
            p.requires_grad_(True)
        with layout, mode:
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        model.train(was_training)


def any_sharded(parameters) -> bool:
    """Whether any parameter is FSDP's, of which this process holds a shard, and no plain one."""
    return any(type(p) is not torch.nn.Parameter for p in parameters)


# --------------------------------------------------------------------------------- the prompts


def read_prompts(lm, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """Run the prompts through the model, and fill an empty cache with their B rows.

    ids, mask [B, P] -> the last hidden states, from which the first tokens are sampled: [B, D].

    Where many answers to one prompt are sampled (best-of-n, PPO's groups) they stand side by side.
    Their prompt runs once, and what the cache holds of it is then copied for every answer:

        rows               a a a b c c
        distinct prompts   a b c          these run
        prompt_of_row      0 0 0 1 2 2

    InputError: an architecture without a key-value cache.
    """
    # Two rows are the same prompt if both their tokens and their padding agree.
    rows = torch.cat([ids, mask], 1)  # [B, 2 P]
    distinct, prompt_of_row = rows.unique_consecutive(dim=0, return_inverse=True)  # [n, 2 P], [B]
    distinct_ids, distinct_mask = distinct.chunk(2, dim=1)  # [n, P] both
    distinct_mask = distinct_mask.bool()

    trunk = run_trunk(lm, distinct_ids, distinct_mask, count_positions(distinct_mask), cache)
    # Mamba and the like keep a state of another kind and ignore the cache that they are given.
    if getattr(trunk, cache_name(type(lm.base_model)), None) is not cache:
        raise InputError(f"{type(lm).__name__} keeps no key-value cache that rollouts could use")
    # Padding is on the left, so the last column is the last real token of every row.
    hidden = trunk.last_hidden_state[:, -1]  # [n, D]

    # One row for each distinct prompt becomes one row for each answer.
    if len(distinct) < len(rows):
        cache.reorder_cache(prompt_of_row)
        hidden = hidden[prompt_of_row]
    return hidden  # [B, D]


def run_trunk(lm, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache):
    """Run new tokens through a model without its head; the cache then holds them too.

    The head is left out, since only the last token of a row needs logits.
    ids, positions [b, T]: the new tokens. mask: which columns of the cache they may see, in a form
    that the model reads; None: all -> transformers' output, with `last_hidden_state` [b, T, D].
    """
    return lm.base_model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        **{cache_name(type(lm.base_model)): cache},
    )


@functools.cache
def cache_name(model_class: type) -> str:
    """The name that a model's forward, and its output, have for the key-value cache."""
    # transformers 5.24 renamed it, and warns where it is called by its older name.
    if "cache" in inspect.signature(model_class.forward).parameters:
        return "cache"
    return "past_key_values"


def count_positions(mask: Tensor) -> Tensor:
    """The position of every token: its padding on the left does not count. [B, P] -> [B, P]

    A row with two padding tokens:

        mask      0 0 1 1 1
        position  0 0 0 1 2
    """
    return (mask.long().cumsum(1) - 1).clamp(min=0)


# ------------------------------------------------------------------------------- the loop of CPUs


def decode(
    sampler,
    ids: Tensor,
    mask: Tensor,
    u: Tensor,
    out: dict[str, Tensor],
    finished: Tensor,
):
    """Write one response to each prompt, with a cache that grows; finished rows are dropped.

    ids, mask [B, P]; u [B, R], the uniform numbers that choose the tokens. out {name: [B, R]} and
    finished [B] are written in place. InputError: an architecture without a key-value cache.
    """
    live = torch.arange(len(ids), device=ids.device)  # [b]: the rows that are still being written
    lm = sampler.model.lm
    has_padding = not mask.all()
    P = mask.shape[1]
    R = u.shape[1]
    cache = growing_cache(lm, P + R)
    hidden = read_prompts(lm, ids, mask, cache)  # [b, D]

    token = ids[:, -1:]  # [b, 1]: the newest token of each row
    position = count_positions(mask)[:, -1:]  # [b, 1]
    # From here on a query is one token, which may see every real column. Without padding it needs
    # no mask. Where the model can read an additive mask, that mask is made once, here; transformers
    # would make it anew in every step.
    visible = torch.cat([mask, mask.new_ones(len(ids), R)], 1)  # [b, P + R]
    whole_mask = visible
    if has_padding and reads_plain_mask(lm, cache):
        zeros = torch.zeros(visible.shape, device=ids.device)
        whole_mask = zeros.masked_fill(~visible, -torch.inf)[:, None, None]  # [b, 1, 1, P + R]

    for t in range(R):
        # Read the newest token of each row. At t = 0 that is the prompt's, which has been read.
        if t > 0:
            attention_mask = None
            if has_padding:
                attention_mask = whole_mask[..., : P + t]  # the columns written so far
            trunk = run_trunk(lm, token, attention_mask, position, cache)
            hidden = trunk.last_hidden_state[:, -1]  # [b, D]

        # Choose a token for each row. u and out keep all B rows while the batch shrinks, and `live`
        # finds a row's own random numbers in u: dropping other rows cannot change its tokens.
        new = sampler(hidden, u[live, t])
        for name, value in new.items():
            out[name][live, t] = value
        token = new["response_ids"][:, None]  # [b, 1]
        position = position + 1

        # Without an EOS no row ever finishes.
        if sampler.end_ids is None:
            continue
        # A finished row may stay in the batch for a while. What it writes after its EOS is removed
        # by rollout.cut_responses().
        finished[live] |= sampler.is_end(token[:, 0])
        going = (~finished[live]).nonzero()[:, 0]  # places in the running batch
        if len(going) == 0:
            break
        # Dropping rows copies the whole cache, which costs about as much as a step: wait until a
        # quarter of its rows have finished.
        if len(going) <= 0.75 * len(live):
            cache.reorder_cache(going)
            live = live[going]
            token = token[going]
            position = position[going]
            whole_mask = whole_mask[going]


def growing_cache(lm, length: int) -> KeyValueCache:
    """An empty cache with room for `length` tokens.

    Only plain layers are replaced; sliding windows and linear attention keep transformers' own.
    """
    layers = []
    # transformers reads from the config which kind of layer each block needs.
    for layer in DynamicCache(config=lm.config).layers:
        if type(layer) is DynamicLayer:
            layer = RoomyLayer(length)
        layers.append(layer)
    return KeyValueCache(layers=layers)


def reads_plain_mask(lm, cache: Cache) -> bool:
    """Whether attention asks only which columns are real.

    Sliding windows, linear layers and ALiBi ask for more, and eager attention asks for another kind
    of mask: transformers makes theirs at every token.
    """
    if lm.config._attn_implementation != "sdpa":
        return False
    if any(type(layer) is not RoomyLayer for layer in cache.layers):
        return False
    # Rotary embeddings depend on the position ids alone. ALiBi counts its distances from the mask
    # that the model is given (Bloom, Falcon), and that mask must hold 0 and 1.
    has_rotary = hasattr(lm.base_model, "rotary_emb")
    has_alibi = getattr(lm.config, "alibi", False)
    return has_rotary and not has_alibi


# ------------------------------------------------------------------------------- the loop of GPUs


def decode_static(
    sampler,
    ids: Tensor,
    mask: Tensor,
    u: Tensor,
    out: dict[str, Tensor],
    finished: Tensor,
):
    """Write one response to each prompt, as decode() does, with shapes that never change.

    The cache has C columns, and all B rows run to the end. RuntimeError: an architecture for which
    that cannot be done. Pitfall: `out` and `finished` then hold what was written until the error.
    """
    B, P = ids.shape
    R = u.shape[1]
    lm = sampler.model.lm
    C = math.ceil((P + R) / ALIGNMENT) * ALIGNMENT
    cache = static_cache(lm, C)
    # NotImplementedError is a RuntimeError, so rollout.try_static() leaves the rows to decode().
    if cache is None:
        raise NotImplementedError("no static cache")

    # The prompts go through the model outside the graph: their shape is their own.
    hidden = read_prompts(lm, ids, mask, cache)  # [B, D]

    # All that a step reads and writes, in place: a graph replays kernels on these addresses.
    response_column = torch.zeros(1, dtype=torch.long, device=ids.device)  # to be written next
    token = ids[:, -1:].clone()  # [B, 1]
    position = count_positions(mask)[:, -1:].clone()  # [B, 1]
    # transformers hides the columns to the right of the cache's own position.
    visible = torch.cat([mask, mask.new_ones(B, C - P)], 1)  # [B, C]

    def write(hidden):
        """Sample the next token of each row from hidden [B, D], and write it."""
        token.copy_(write_column(sampler, hidden, response_column, u, out, finished))
        position.add_(1)
        response_column.add_(1)

    def step():
        """Read the tokens that were written last, and write the next ones."""
        trunk = run_trunk(lm, token, visible, position, cache)
        write(trunk.last_hidden_state[:, -1])

    # Token 0 comes from the prompts. Each step then reads token t - 1 and writes token t.
    write(hidden)
    # FSDP's hooks wait for streams of their own, which a capture does not allow.
    if has_fsdp_units(lm):
        take_step = step
        t = 1
    else:
        take_step, t = capture(step, R, ids.device)

    # `finished` lies on the GPU, so Python looks now and then whether all rows have finished.
    while t < R:
        if sampler.end_ids is not None and t % CHECK_EVERY == 0 and finished.all():
            break
        take_step()
        t += 1


def write_column(
    sampler, hidden: Tensor, column: Tensor, u: Tensor, out: dict[str, Tensor], finished: Tensor
) -> Tensor:
    """Sample a token for each row from hidden [B, D], and write it into a column of the responses.

    column [1]: no Python number, so nothing here waits for the GPU. -> the tokens [B, 1]
    """
    new = sampler(hidden, u.index_select(1, column)[:, 0])  # {name: [B]}
    for name, value in new.items():
        out[name].index_copy_(1, column, value[:, None])
    token = new["response_ids"]  # [B]
    if sampler.end_ids is not None:
        finished.logical_or_(sampler.is_end(token))
    return token[:, None]


def has_fsdp_units(lm) -> bool:
    """Whether FSDP gathers any part of the model, which it does in hooks."""
    return any(hasattr(module, "unshard") for module in lm.modules())


def static_cache(lm, length: int) -> KeyValueCache | None:
    """A cache of fixed size whose position is a tensor; None where an architecture has none.

    Sliding windows are left to the mask: transformers' own sliding layers count in Python, which a
    graph would not replay. Other kinds of layers keep more than keys and values (an indexer's keys,
    a linear attention's state).
    """
    # transformers marks the models whose forward needs no tensor's numbers in Python.
    if not getattr(lm, "_can_compile_fullgraph", False):
        return None
    # transformers' own cache is made only to see which kinds of layers this architecture needs.
    layers = StaticCache(config=lm.config, max_cache_len=length).layers
    for layer in layers:
        if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
            return None
    return KeyValueCache(layers=[StaticLayer(max_cache_len=length) for _ in layers])


def capture(step: Callable, R: int, device: torch.device, pool=None) -> tuple[Callable, int]:
    """Capture a decode step as a CUDA graph.

    R: the number of tokens of a row, of which the first is already written -> a function that
    replays the step (without a GPU the step itself), and the index of the next token to write.
    pool: the memory of graphs that are never replayed at once, from
    torch.cuda.graph_pool_handle(). RuntimeError: the step waits for the GPU.

    The steps of the warm-up are not lost: they write tokens 1 to WARM_UP. decode_static() keeps no
    graph from one rollout to the next. It would hold the cache's memory while PPO updates, and it
    must not outlive the weights' addresses, which FSDP's gathering and autocast's copies change.
    Capturing anew costs about as much as WARM_UP + 1 steps without a graph.
    """
    # With few tokens left the warm-up would write all of them.
    if device.type != "cuda" or R <= 1 + WARM_UP:
        return step, 1

    # torch asks for a warm-up on a stream beside the current one.
    current = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(current)
    # A capture that fails leaves torch's allocator out of order. So a model that looks at its
    # numbers while it decodes is found here, where waiting for the GPU is an error.
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    try:
        # Thread-local: other threads, such as that of NCCL, may go on meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            # This step launches nothing: it is written down.
            step()
    except RuntimeError as e:
        # A capture that failed leaves its own stream in place.
        torch.cuda.set_stream(current)
        warnings.warn(
            f"rollouts decode without a CUDA graph, which is slower ({first_line(e)})",
            RuntimeWarning,
            stacklevel=2,
        )
        return step, 1 + WARM_UP
    return graph.replay, 1 + WARM_UP

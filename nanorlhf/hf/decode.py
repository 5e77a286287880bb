"""The two decode loops behind rollout.generate(), which write the same responses.

    B sequences (b still being written), P prompt tokens (left-padded), R response tokens, t of them so far, C columns of a cache

On a CPU arithmetic is dear: attention reads only the columns written so far, and finished rows are dropped. On a GPU launching
kernels is dear: the shapes stay, finished rows run on, and one decode step is captured as a CUDA graph, replayed for every token.
"""

import warnings
from contextlib import contextmanager

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer, StaticSlidingWindowLayer

from ..errors import InputError, first_line

WARM_UP = 3  # decode steps before one is captured: what torch's documentation asks for
warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")  # of capture(); a filter set there would repeat warnings
CHECK_EVERY = 16  # decode steps between two looks, each a wait for the GPU, at whether all rows have finished


class RoomyLayer(DynamicLayer):
    """A growing layer of a cache that has room for all `length` tokens from the start, where transformers' own copies itself whole
    at every token. Same keys, same values: views of what is written."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def update(self, key_states, value_states, *args, **kwargs):
        begun = self.get_seq_length()  # columns written so far
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = [x.new_empty(*x.shape[:2], self.length, x.shape[3]) for x in (key_states, value_states)]  # [b, heads, C, D / heads]
        end = begun + key_states.shape[2]
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, begun:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        end = self.get_seq_length()
        self.room = [room[indices] for room in self.room]
        self.keys, self.values = (room[:, :, :end] for room in self.room)


class KeyValueCache(Cache):
    """Keys and values in autocast's type. Rotary embeddings make bfloat16 keys float32, and attention would cast all of them back
    at every token; it sees the same numbers if each is cast once."""

    def update(self, key_states, value_states, *args, **kwargs):
        dtype = autocast_dtype(key_states.device.type) or key_states.dtype
        return super().update(key_states.to(dtype), value_states.to(dtype), *args, **kwargs)


def autocast_dtype(device_type):
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


@contextmanager
def decoding(model, device_type):
    """Dropout off; every weight cast once a rollout, not once a token; little overhead for an operator.

    Autocast keeps the bfloat16 copy of a weight for the length of its context, but only if the weight requires grad: so all do here.
    Inference mode makes decoding on a CPU some 5 % faster. What it makes can never be trained on: neither autocast's copies nor
    what FSDP gathers may be made in it.
    """
    was_training, parameters, frozen = model.training, list(model.lm.parameters()), []
    mode = torch.no_grad()
    if autocast_dtype(device_type):
        frozen = [p for p in parameters if p.is_floating_point() and not p.requires_grad]
    elif device_type == "cpu" and all(type(p) is torch.nn.Parameter for p in parameters):  # not in shards
        mode = torch.inference_mode()
    try:
        model.eval()
        for p in frozen:
            p.requires_grad_(True)
        with mode:
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        model.train(was_training)


def can_shrink(cache):
    """Whether rows can be dropped from a cache: linear-attention layers keep a state that transformers does not index by row."""
    return all(hasattr(layer, "batch_select_indices") for layer in cache.layers)


def reads_plain_mask(lm, cache):
    """Whether attention asks only which columns are real. Sliding windows, linear layers and ALiBi ask for more, and eager attention
    for another kind of mask: transformers makes theirs at every token."""
    plain = lm.config._attn_implementation == "sdpa" and all(type(layer) is RoomyLayer for layer in cache.layers)
    return plain and hasattr(lm.base_model, "rotary_emb") and not getattr(lm.config, "alibi", False)


def decode(sampler, ids, mask, u, out, finished):
    """Write responses to the prompts ids [B, P] into out {name: [B, R]}, dropping the rows that are finished [B]."""
    live = torch.arange(len(ids), device=ids.device)  # [b] rows in the running batch
    lm, eos = sampler.model.lm, sampler.eos_token_id
    padded, P, R = not mask.all(), mask.shape[1], u.shape[1]
    layers = DynamicCache(config=lm.config).layers  # other kinds of layers (sliding windows, linear attention) stay as they are
    cache = KeyValueCache(layers=[RoomyLayer(P + R) if type(layer) is DynamicLayer else layer for layer in layers])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)  # [b, P]; then [b, 1]
    mask = torch.cat([mask, mask.new_ones(len(ids), R)], 1)  # [b, P + R]
    visible = mask  # [b, P + R]; additive [b, 1, 1, P + R] where that will do
    for t in range(R):
        trunk = lm.base_model(
            input_ids=ids, attention_mask=visible[..., : P + t] if padded else None, position_ids=positions, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        hidden, cache = trunk.last_hidden_state[:, -1], getattr(trunk, "past_key_values", None)  # [b, D]
        if cache is None:
            raise InputError(f"{type(lm).__name__} keeps no key-value cache that rollouts could use")
        if t == 0 and padded and reads_plain_mask(lm, cache):
            visible = torch.zeros(mask.shape, device=ids.device).masked_fill(~mask, -torch.inf)[:, None, None]
        new = sampler(hidden, u[live, t])
        for name, value in new.items():
            out[name][live, t] = value
        ids, positions = new["response_ids"][:, None], positions[:, -1:] + 1
        if eos is not None:
            finished[live] |= ids[:, 0] == eos
            going = (~finished[live]).nonzero()[:, 0]
            if len(going) == 0:
                break
            # Shrinking copies the whole cache, which costs about a step: wait until a quarter of its rows are done.
            if len(going) <= 0.75 * len(live) and can_shrink(cache):
                cache.batch_select_indices(going)
                live, ids, positions, visible = live[going], ids[going], positions[going], visible[going]


def static_cache(lm, length):
    """A cache of fixed size whose position is a tensor, or None where transformers has none for this architecture.

    Sliding windows are left to the mask: transformers' own sliding layers count in Python, which a graph would not replay.
    Other kinds of layers keep more than keys and values (an indexer's keys, a linear attention's state).
    """
    layers = StaticCache(config=lm.config, max_cache_len=length).layers
    known = all(type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in layers)
    if not known or not getattr(lm, "_can_compile_fullgraph", False):
        return None
    return KeyValueCache(layers=[StaticLayer(max_cache_len=length) for _ in layers])


def decode_static(sampler, ids, mask, u, out, finished):
    """decode() with shapes that never change: C columns of cache, all B rows to the end. RuntimeError where that cannot be done."""
    (B, P), R, lm, eos = ids.shape, u.shape[1], sampler.model.lm, sampler.eos_token_id
    C = -(-(P + R) // 16) * 16  # attention kernels want aligned masks
    cache = static_cache(lm, C)
    if cache is None:
        raise NotImplementedError("no static cache")
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)  # [B, P]
    prefill = lm.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)

    # All that a step reads and writes, in place: a graph replays kernels on these addresses.
    column = torch.zeros(1, dtype=torch.long, device=ids.device)
    token, position = ids[:, -1:].clone(), positions[:, -1:].clone()  # [B, 1]
    columns = torch.cat([mask, mask.new_ones(B, C - P)], 1)  # [B, C]; transformers hides those right of the cache's own position

    def write(hidden):  # [B, D]
        new = sampler(hidden, u.index_select(1, column)[:, 0])
        for name, value in new.items():
            out[name].index_copy_(1, column, value[:, None])
        token.copy_(new["response_ids"][:, None])
        if eos is not None:
            finished.logical_or_(token[:, 0] == eos)
        position.add_(1)
        column.add_(1)

    def step():
        trunk = lm.base_model(input_ids=token, attention_mask=columns, position_ids=position, past_key_values=cache, use_cache=True)
        write(trunk.last_hidden_state[:, -1])

    write(prefill.last_hidden_state[:, -1])
    sharded = any(hasattr(module, "unshard") for module in lm.modules())  # FSDP's hooks wait for streams of their own
    step, t = (step, 1) if sharded else capture(step, R, ids.device)
    while t < R and not (eos is not None and t % CHECK_EVERY == 0 and finished.all()):
        step()
        t += 1


def capture(step, R, device):
    """A decode step -> a function that replays it as a CUDA graph (elsewhere the step itself), and the next token to write.
    RuntimeError where the step waits for the GPU.

    Nothing of the warm-up is lost: its steps write tokens 1 to WARM_UP. A graph is not kept from one rollout to the next: it would
    hold the cache's memory while PPO updates, and must not outlive the weights' addresses, which FSDP's gathering and autocast's
    copies change. Capturing anew costs about as much as WARM_UP + 1 steps without a graph.
    """
    if device.type != "cuda" or R <= 1 + WARM_UP:
        return step, 1
    current = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(current)
    # A model that looks at its numbers while it decodes is found here: a capture that fails leaves torch's allocator out of order.
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
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads, such as that of NCCL, may go on
            step()  # launches nothing: it is written down
    except RuntimeError as e:
        torch.cuda.set_stream(current)  # a capture that failed leaves its own in place
        warnings.warn(f"rollouts decode without a CUDA graph, which is slower ({first_line(e)})", RuntimeWarning, stacklevel=2)
        return step, 1 + WARM_UP
    return graph.replay, 1 + WARM_UP

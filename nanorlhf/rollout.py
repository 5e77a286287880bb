"""Sampling responses in batches with one KV cache, keeping the log-probs and values that PPO needs.

    B sequences (b still being written), P prompt tokens (left-padded), R response tokens (right-padded), t of them so far,
    D hidden, V vocabulary

The noise of a sample is keyed by (seed, step, its index in the global batch, position), so that neither the number of ranks nor
the size of a micro-batch changes what is sampled. One uniform number a token is enough: the token is the first one at which the
cumulative distribution passes it.

Two loops write the same responses. On a CPU arithmetic is dear: the cache grows, and finished rows are dropped. On a GPU launching
kernels is dear: the shapes stay, finished rows run on, and one decode step is captured as a CUDA graph that is replayed for
every token.
"""

import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .errors import InputError
from .models import scalar
from .packing import Packed
from .rng import ROLLOUT

WARM_UP = 3  # decode steps before one is captured: what torch's documentation asks for
CHECK_EVERY = 16  # decode steps between two looks, each a wait for the GPU, at whether all rows have finished


@dataclass
class Rollout:
    """What generate() returns. Masked positions hold 0 (ids: the padding id)."""

    prompt_ids: torch.Tensor  # [B, P] left-padded
    attention_mask: torch.Tensor  # [B, P] bool
    response_ids: torch.Tensor  # [B, R]
    response_mask: torch.Tensor  # [B, R] bool, up to and including the first EOS
    logprobs: torch.Tensor  # [B, R] of the full distribution at the sampling temperature
    entropies: torch.Tensor  # [B, R] of the same distribution, nats
    values: torch.Tensor | None  # [B, R], before each token; None without a value head on the trunk
    finished: torch.Tensor  # [B] bool: the response ends with EOS

    def packed(self):
        """Prompt and response side by side, padding on the right only: what models.py reads."""
        ids = torch.cat([self.prompt_ids, self.response_ids], 1)  # [B, T]
        mask = torch.cat([self.attention_mask, self.response_mask], 1)  # [B, T]
        order = (~mask).int().argsort(dim=1, stable=True)  # real tokens first, in their order
        return Packed(ids.gather(1, order), self.attention_mask.sum(1), self.response_mask.sum(1))


def left_pad(prompts, pad_id):
    """Lists of token lists -> prompt_ids [B, P], attention_mask [B, P]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    return ids, mask


def uniforms(seed, step, index, width):
    """Uniform numbers in [0, 1) keyed by (seed, step, index of the sample, position): -> [len(index), width], float64."""
    return torch.from_numpy(np.stack([np.random.default_rng([ROLLOUT, seed, step, i]).random(width) for i in index]))


def truncate(probs, top_k=0, top_p=1.0):
    """Zero all but the top_k tokens (and ties), then all but the smallest set with mass top_p. probs [B, V], not renormalised."""
    if 0 < top_k < probs.shape[-1]:
        probs = probs.masked_fill(probs < probs.topk(top_k)[0][:, -1:], 0.0)
    if top_p < 1:
        ordered, order = probs.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of the more likely tokens
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0.0)
        probs = torch.zeros_like(probs).scatter(1, order, ordered)
    return probs


def sample(probs, u):
    """Inverse-CDF sampling: probs [B, V] (any positive scale), u [B] in [0, 1) -> token ids [B]. Never a token of mass 0."""
    cdf = probs.cumsum(-1, dtype=torch.float64)  # [B, V]
    return torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


@dataclass
class Sampler:
    """What happens at every token, on either path."""

    model: object  # a Policy
    temperature: float
    top_k: int
    top_p: float
    eos_token_id: int | None

    def __call__(self, hidden, u):
        """Hidden states [b, D], uniforms [b] -> {response_ids, logprobs, entropies, values}, each [b]; no values without a head."""
        logp = (self.model.logits(hidden) / self.temperature).log_softmax(-1)  # [b, V]
        probs = logp.exp()
        entropies = -(probs * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)  # 0 log 0 = 0; entr(probs) takes the log again
        token = sample(truncate(probs, self.top_k, self.top_p), u)
        new = {"response_ids": token, "logprobs": logp.gather(1, token[:, None])[:, 0], "entropies": entropies}
        if self.model.value_head is not None and self.model.value_trunk is None:
            new["values"] = scalar(self.model.value_head, hidden)
        return new


# ------------------------------------------------------------------------------------------------------------- the two decode loops


# A growing cache is copied at every token, and still no slower on a CPU than one with room for 16 or 64 tokens more: attention then
# finds the copy in the processor's cache.


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
    elif device_type == "cpu" and all(type(p) is torch.nn.Parameter for p in parameters):
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
    plain = lm.config._attn_implementation == "sdpa" and all(type(layer) is DynamicLayer for layer in cache.layers)
    return plain and hasattr(lm.base_model, "rotary_emb") and not getattr(lm.config, "alibi", False)


def decode(sampler, ids, mask, u, out, finished):
    """Write responses to the prompts ids [B, P] into out {name: [B, R]}, dropping the rows that are finished [B]."""
    live = torch.arange(len(ids), device=ids.device)  # [b] rows in the running batch
    lm, eos = sampler.model.lm, sampler.eos_token_id
    padded, cache = not mask.all(), None
    if autocast_dtype(ids.device.type):
        cache = KeyValueCache(layers=DynamicCache(config=lm.config).layers)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)  # [b, P]; then [b, 1]
    P, R = mask.shape[1], u.shape[1]
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
    """
    layers = StaticCache(config=lm.config, max_cache_len=length).layers
    if not getattr(lm, "_can_compile_fullgraph", False) or not all(isinstance(layer, StaticLayer) for layer in layers):
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
    step, t = capture(step, R, ids.device)
    while t < R and not (eos is not None and t % CHECK_EVERY == 0 and finished.all()):
        step()
        t += 1


def capture(step, R, device):
    """A decode step -> a function that replays it as a CUDA graph (elsewhere the step itself), and the next token to write.

    Nothing of the warm-up is lost: its steps write tokens 1 to WARM_UP. A graph is not kept from one rollout to the next: it would
    hold the cache's memory while PPO updates, and must not outlive the weights' addresses, which FSDP's gathering and autocast's
    copies change. Capturing anew costs about as much as WARM_UP + 1 steps without a graph.
    """
    if device.type != "cuda" or R <= 1 + WARM_UP:
        return step, 1
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads, such as that of NCCL, may go on
        step()  # launches nothing: it is written down
    return graph.replay, 1 + WARM_UP


# ------------------------------------------------------------------------------------------------------------------------- generate


@torch.no_grad()
def generate(model, prompt_ids, attention_mask, max_new_tokens, *, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None,
             pad_token_id=0, seed=0, step=0, index=None, static=None):  # fmt: skip
    """Sample one response for every prompt from softmax(logits / temperature), dropout off. -> Rollout

    model: a Policy. prompt_ids, attention_mask [B, P], left-padded. eos_token_id None never stops early. index [B]: each
    sample's place in the global batch (default 0..B-1). top_k and top_p cut what may be sampled; log-probs are of the full
    distribution all the same, so keep them off for training. static: shapes that never change (default: on a GPU).
    """
    if temperature <= 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError("temperature must be positive, top_p in (0, 1], top_k 0 (off) or more")
    (B, _), R, device = prompt_ids.shape, max_new_tokens, prompt_ids.device
    mask = attention_mask.bool()  # [B, P]
    u = uniforms(seed, step, range(B) if index is None else index, R).to(device)  # [B, R]
    out = {name: torch.zeros(B, R, device=device) for name in ("logprobs", "entropies", "values")}
    out["response_ids"] = torch.full((B, R), pad_token_id, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    args = Sampler(model, temperature, top_k, top_p, eos_token_id), prompt_ids, mask, u, out, finished
    static = prompt_ids.is_cuda if static is None else static
    with decoding(model, device.type):
        try:
            (decode_static if static else decode)(*args)
        except RuntimeError as e:
            if not static:
                raise
            why = f"{type(model.lm).__name__}: {(str(e).splitlines() or [repr(e)])[0]}"  # Python shows the same warning once
            warnings.warn(f"rollouts decode with a growing cache, which is slower on a GPU ({why})", RuntimeWarning, stacklevel=2)
            finished.zero_()  # what was written so far is written again
            decode(*args)
    logprobs, response_ids = out["logprobs"], out["response_ids"]
    if not logprobs.isfinite().all():
        raise FloatingPointError(f"step {step}: the policy's log-probs are not finite; lower --lr")

    # A finished row may have run on until it was dropped: the response ends with its first EOS.
    is_eos = response_ids == eos_token_id if finished.any() else torch.zeros_like(response_ids, dtype=torch.bool)
    response_mask = (is_eos.cumsum(1) - is_eos.long()) == 0  # no EOS to the left
    return Rollout(
        prompt_ids,
        mask,
        torch.where(response_mask, response_ids, pad_token_id),
        response_mask,
        logprobs * response_mask,
        out["entropies"] * response_mask,
        out["values"] * response_mask if model.value_head is not None and model.value_trunk is None else None,
        finished,
    )

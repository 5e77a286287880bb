"""Sampling responses in batches with one KV cache, keeping the log-probs and values that PPO needs.

    B sequences (b still being written), P prompt tokens (left-padded), R response tokens (right-padded), t of them so far,
    D hidden, V vocabulary

The noise of a sample is keyed by (seed, step, its index in the global batch, position), so that neither the number of ranks nor
the size of a micro-batch changes what is sampled. One uniform number a token is enough: the token is the first one at which the
cumulative distribution passes it.

The loops that write a response token by token, one for CPUs and one for GPUs, are in decode.py.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from .data import ready_prompts
from .errors import InputError, at_least, first_line, require
from .hf.blocks import sampling
from .hf.decode import decode, decode_static, decoding
from .models import Policy, scalar
from .packing import Answers, Packed
from .ppo import entropy
from .runtime.distributed import Dist, autocast
from .runtime.flags import FlagGroup
from .runtime.rng import ROLLOUT


@dataclass
class SamplingFlags(FlagGroup):
    """Sampling: how answers are written"""

    max_new_tokens: int = HfArg(default=48, help="tokens in the longest answer")
    temperature: float = HfArg(
        default=1.0, help="what logits are divided by: below 1 makes answers more alike"
    )
    max_prompt_length: int = HfArg(
        default=0,
        help="cut longer prompts on the left to this many tokens; 0: a prompt that is too long "
        "for the model is an error",
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "max_new_tokens")
        at_least(self, 0, "max_prompt_length")
        require(self.temperature > 0, "--temperature must be positive")


@dataclass
class Rollout:
    """What generate() returns. Masked positions hold 0 (ids: the padding id)."""

    prompt_ids: torch.Tensor  # [B, P] left-padded
    attention_mask: torch.Tensor  # [B, P] bool
    response_ids: torch.Tensor  # [B, R]
    response_mask: torch.Tensor  # [B, R] bool, up to and including the first EOS
    logprobs: torch.Tensor  # [B, R] of the full distribution at the sampling temperature
    entropies: torch.Tensor  # [B, R] of the same distribution, nats
    values: torch.Tensor | None  # [B, R], before each token; None unless policy.shares_trunk
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


def uniforms(seed, step, index, width, stream=ROLLOUT):
    """Uniform numbers in [0, 1) keyed by (seed, step, index of the sample, position): -> [len(index), width], float64.

    stream: one of rng.py's; what is keyed alike in two streams has nothing to do with each other.
    """
    rows = [np.random.default_rng([stream, seed, step, i]).random(width) for i in index]
    return torch.from_numpy(np.stack(rows))


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
        entropies = entropy(logp, probs)  # [b]
        token = sample(truncate(probs, self.top_k, self.top_p), u)
        new = {"response_ids": token, "logprobs": logp.gather(1, token[:, None])[:, 0], "entropies": entropies}
        if self.model.shares_trunk:
            new["values"] = scalar(self.model.value_head, hidden)
        return new


# ------------------------------------------------------------------------------------------------------------------------- generate


@torch.no_grad()
def generate(model, prompt_ids, attention_mask, max_new_tokens, *, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None,
             pad_token_id=0, seed=0, step=0, index=None, stream=ROLLOUT, static=None):  # fmt: skip
    """Sample one response for every prompt from softmax(logits / temperature), dropout off. -> Rollout

    model: a Policy. prompt_ids, attention_mask [B, P], left-padded. eos_token_id None never stops early. index [B]: each
    sample's place in the global batch (default 0..B-1). stream: of the noise, see rng.py. top_k and top_p cut what may be
    sampled; log-probs are of the full distribution all the same, so keep them off for training. static: shapes that never
    change (default: on a GPU).
    """
    if temperature <= 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError("temperature must be positive, top_p in (0, 1], top_k 0 (off) or more")
    (B, _), R, device = prompt_ids.shape, max_new_tokens, prompt_ids.device
    mask = attention_mask.bool()  # [B, P]
    u = uniforms(seed, step, range(B) if index is None else index, R, stream).to(device)  # [B, R]
    out = {name: torch.zeros(B, R, device=device) for name in ("logprobs", "entropies", "values")}
    out["response_ids"] = torch.full((B, R), pad_token_id, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    args = Sampler(model, temperature, top_k, top_p, eos_token_id), prompt_ids, mask, u, out, finished
    static = prompt_ids.is_cuda if static is None else static
    with decoding(model, device.type):
        if static:
            try:
                decode_static(*args)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as e:
                static = False
                why = f"{type(model.lm).__name__}: {first_line(e)}"  # Python shows the same warning once
                warnings.warn(f"rollouts decode with a growing cache, which is slower on a GPU ({why})", RuntimeWarning, stacklevel=2)
                finished.zero_()  # what was written so far is written again
        if not static:
            decode(*args)
    logprobs, response_ids = out["logprobs"], out["response_ids"]
    if not logprobs.isfinite().all():
        raise FloatingPointError(f"step {step}: the policy's log-probs are not finite; lower --lr")

    # A finished row may have run on until it was dropped: the response ends with its first EOS.
    is_eos = response_ids == eos_token_id if finished.any() else torch.zeros_like(response_ids, dtype=torch.bool)
    response_mask = (is_eos.cumsum(1) - is_eos.long()) == 0  # no EOS to the left
    values = out["values"] * response_mask if model.shares_trunk else None
    return Rollout(
        prompt_ids,
        mask,
        torch.where(response_mask, response_ids, pad_token_id),
        response_mask,
        logprobs * response_mask,
        out["entropies"] * response_mask,
        values,
        finished,
    )


# ------------------------------------------------------------------------------------------------------------ the rollouts of a run


@dataclass
class Parts:
    """What a roll-out needs. A PPO run has more parts: evaluation.PPOParts."""

    config: object  # with the flags of sampling: max_new_tokens, temperature, seed, dtype
    dist: Dist
    tokenizer: PreTrainedTokenizerBase
    policy: Policy


def roll_out(parts, prompts, place, step, stream=ROLLOUT):
    """One response to each prompt; `place` keys the noise by the prompt's place in the global batch. -> Rollout, Answers

    Step 0 of the stream ROLLOUT is the evaluations'. A pool has a stream of its own (rng.py).
    """
    config, dist, tokenizer = parts.config, parts.dist, parts.tokenizer
    ids, mask = left_pad(prompts, tokenizer.pad_token_id)
    with autocast(dist, config.dtype), sampling(parts.policy.lm):
        rollout = generate(
            parts.policy, ids.to(dist.device), mask.to(dist.device), config.max_new_tokens, temperature=config.temperature,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, seed=config.seed, step=step, index=place,
            stream=stream,
        )  # fmt: skip
    responses = [ids[mask] for ids, mask in zip(rollout.response_ids.cpu(), rollout.response_mask.cpu())]
    texts = (tokenizer.batch_decode(part, skip_special_tokens=True) for part in (prompts, responses))
    return rollout, Answers(*texts, through_frozen_blocks(parts, rollout.packed()))


def through_frozen_blocks(parts, batch):
    """The batch with what the policy's frozen blocks make of it, run once for the reference and all epochs: batch.trunk [b, T, D]."""
    policy, config = parts.policy, parts.config
    if not policy.frozen or not policy.frozen.n:
        return batch
    for rows in batch.micro_batches(config.micro_batch_size, None, config.tokens_per_micro_batch):
        part = batch.rows(rows)
        with autocast(parts.dist, config.dtype):
            hidden = policy.frozen.run(policy.lm, part.ids)  # [m, T', D]
        if batch.trunk is None:
            batch.trunk = hidden.new_zeros(*batch.ids.shape, hidden.shape[-1])
        batch.trunk[rows, : hidden.shape[1]] = hidden
    return batch


# --------------------------------------------------------------------------------------------------- questions to a language model


def ask_locally(policy, tokenizer, questions, max_tokens, batch_size=1):
    """Questions to a Policy, through its chat template if it has one; it takes the likeliest token each time. -> (i, answer),
    as they come, with an InputError in the place of an answer to a question that is too long."""
    ready, device = [], next(policy.parameters()).device
    for i, question in enumerate(questions):
        chat = bool(tokenizer.chat_template)
        try:
            ready += [(i, *ready_prompts(tokenizer, [{"prompt": question}], policy.lm.config, max_tokens, chat=chat))]
        except InputError as e:  # longer than the model's context
            yield i, e
    ready.sort(key=lambda item: len(item[1]))  # little padding
    for first in range(0, len(ready), batch_size):
        part = ready[first : first + batch_size]
        ids, mask = left_pad([prompt for _, prompt in part], tokenizer.pad_token_id)
        rollout = generate(policy, ids.to(device), mask.to(device), max_tokens, temperature=1e-4, eos_token_id=tokenizer.eos_token_id,
                           pad_token_id=tokenizer.pad_token_id)  # fmt: skip
        for (i, _), response, kept in zip(part, rollout.response_ids, rollout.response_mask):
            yield i, tokenizer.decode(response[kept], skip_special_tokens=True)

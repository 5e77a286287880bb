"""Sampling responses in batches with one KV cache, keeping the log-probs and values that PPO needs.

    B sequences (b still being written), P prompt tokens (left-padded), R response tokens
    (right-padded), D hidden, V vocabulary

The noise of a sample is keyed by (seed, step, its place in the global batch, position). So neither
the number of ranks nor the size of a micro-batch changes what is sampled. One uniform number a
token is enough: the token is the first one at which the cumulative distribution passes it.

The loops that write a response token by token, one for CPUs and one for GPUs, are in hf/decode.py;
a faster one for GPUs, with --compile, is in hf/compiled_decode.py.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from .chat_templates import end_ids
from .errors import InputError, at_least, first_line, library_call, require
from .hf.blocks import sampling
from .hf.compiled_decode import decode_compiled, is_compiled
from .hf.decode import decode, decode_static, decoding
from .models import Policy, apply_head, divide
from .packing import Answers, Packed, pad_rows
from .ppo import entropy
from .runtime.distributed import Dist, autocast
from .runtime.flags import FlagGroup
from .runtime.rng import ROLLOUT
from .tokens import Prompts, answers_to, ids_with_tokens, ready_prompts

# A vocabulary with more tokens than this is searched by blocks. With fewer that saves no time.
WIDE = 2048
# Tokens in a block. Most wide vocabularies are multiples of it, and need no copy with padding.
BLOCK = 128


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

    prompt_ids: Tensor  # [B, P] left-padded
    attention_mask: Tensor  # [B, P] bool
    response_ids: Tensor  # [B, R]
    response_mask: Tensor  # [B, R] bool, up to and including the first EOS
    logprobs: Tensor  # [B, R] of the full distribution at the sampling temperature
    entropies: Tensor  # [B, R] of the same distribution, nats
    values: Tensor | None  # [B, R], before each token; None unless policy.shares_trunk
    finished: Tensor  # [B] bool: the response ends with EOS

    def packed(self) -> Packed:
        """Prompt and response side by side, padding on the right only: what models.py reads."""
        # pad the room : | was bright <eos> pad  ->  the room : was bright <eos> pad pad
        ids = torch.cat([self.prompt_ids, self.response_ids], 1)  # [B, T]
        is_real = torch.cat([self.attention_mask, self.response_mask], 1)  # [B, T]
        # A stable sort by "is padding" (0 or 1) moves the real tokens to the left, in their order.
        order = (~is_real).int().argsort(dim=1, stable=True)
        return Packed(ids.gather(1, order), self.attention_mask.sum(1), self.response_mask.sum(1))

    def texts(self, tokenizer) -> list[str]:
        """The responses as texts, without EOS and other special tokens."""
        responses = []
        for ids, is_real in zip(self.response_ids.cpu(), self.response_mask.cpu()):
            responses.append(ids[is_real])
        return tokenizer.batch_decode(responses, skip_special_tokens=True)


def left_pad(prompts: list[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids, each a list or an array -> prompt_ids [B, P], attention_mask [B, P]."""
    prompt_ids = pad_rows(prompts, pad_id, side="left")  # [B, P]
    width = prompt_ids.shape[1]
    lengths = torch.tensor([len(prompt) for prompt in prompts])  # [B]
    return prompt_ids, torch.arange(width) >= width - lengths[:, None]


# ------------------------------------------------------------------------------------- one token


def uniforms(
    seed: int, step: int, index: Iterable[int], width: int, stream: int = ROLLOUT
) -> Tensor:
    """Uniform numbers in [0, 1), keyed by (seed, step, place of the sample, position).

    index: the places of the samples in the global batch. stream: one of rng.py's; what is keyed
    alike in two streams has nothing to do with each other. -> [len(index), width], float64
    """
    # Each sample has a generator of its own, so its noise is the same in any batch or process.
    rows = []
    for i in index:
        generator = np.random.default_rng([stream, seed, step, i])
        rows.append(generator.random(width))
    return torch.from_numpy(np.stack(rows))


def truncate(probs: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Zero all but the top_k tokens (and ties), then all but the smallest set with mass top_p.

    probs [B, V] -> [B, V], not renormalised.
    """
    if 0 < top_k < probs.shape[-1]:
        kth_largest = probs.topk(top_k)[0][:, -1:]  # [B, 1]
        probs = probs.masked_fill(probs < kth_largest, 0.0)
    if top_p < 1:
        ordered, order = probs.sort(descending=True)  # [B, V]
        # A token is left out if the more likely tokens have the mass top_p without it.
        mass_before = ordered.cumsum(-1) - ordered
        total = ordered.sum(-1, keepdim=True)
        ordered = ordered.masked_fill(mass_before >= top_p * total, 0.0)
        probs = torch.zeros_like(probs).scatter(1, order, ordered)
    return probs


def sample(probs: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token at which the cumulative distribution passes u.

    probs [B, V] (any positive scale), u [B] in [0, 1) -> token ids [B]. Never a token of mass 0.
    """
    if probs.shape[-1] > WIDE:
        return sample_by_blocks(probs, u)
    # After truncate() probs do not add up to 1, so u is scaled to their sum. float64: in a float32
    # sum tokens of little mass would be lost.
    cdf = probs.cumsum(-1, dtype=torch.float64)  # [B, V]
    total = cdf[:, -1]  # [B]
    return first_above(cdf, u * total)


def sample_by_blocks(probs: Tensor, u: Tensor) -> Tensor:
    """The draws of sample(), found on two levels: first a block of tokens, then a token in it.

    A cumulative sum over a whole vocabulary is slow, since every number waits for the one before
    it. The sums of blocks do not wait for each other. So there is one short cumulative sum over the
    blocks, and one over the tokens of the block in which the cumulative distribution passes u.
    A draw can differ only where u is within rounding of an edge between two tokens.
    """
    missing = -probs.shape[-1] % BLOCK
    if missing:
        probs = pad(probs, (0, missing))
    blocks = probs.unflatten(1, (-1, BLOCK))  # [B, n, BLOCK]
    rows = torch.arange(len(u), device=u.device)

    # The block, and how much of the target is left when it begins.
    block_cdf = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # [B, n]
    target = u * block_cdf[:, -1]  # [B]
    block = first_above(block_cdf, target)  # [B]
    mass_before = pad(block_cdf, (1, 0))[rows, block]
    left = target - mass_before

    # The token in the block. This sum adds up in another order, so its end may be a rounding error
    # below what is left. The draw is then the last token that has mass: the place where the sum
    # first reaches its largest value.
    cdf = blocks[rows, block].cumsum(-1, dtype=torch.float64)  # [B, BLOCK]
    token = torch.minimum(first_above(cdf, left), cdf.argmax(-1))
    return block * BLOCK + token


def first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """The first place at which a cumulative sum passes a target: cdf [B, n], target [B] -> [B]."""
    place = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]
    # NaN is never passed. The place stays a valid one until generate() reports the NaN.
    return place.clamp(max=cdf.shape[-1] - 1)


@dataclass
class Sampler:
    """What happens at every token, on a CPU and on a GPU."""

    model: Policy
    temperature: float
    top_k: int
    top_p: float
    end_ids: Tensor | None  # [E]: a response ends with any of them; None: it never ends
    has_token: Tensor | None  # [V] bool: ids that may be sampled; None: all

    def __call__(self, hidden: Tensor, u: Tensor) -> dict[str, Tensor]:
        """Sample a token for each row.

        hidden [b, D]: last hidden states; u [b]: uniform numbers -> {response_ids, logprobs,
        entropies, values}, each [b]. There are no values without a head on the trunk.
        """
        logits = divide(self.model.logits(hidden), self.temperature)  # [b, V]
        logp = logits.log_softmax(-1)
        probs = logp.exp()
        # The entropy comes before the sample: of the full distribution.
        entropies = entropy(logp, probs)  # [b]
        if self.has_token is not None:
            probs = probs.masked_fill(~self.has_token, 0.0)
        token = sample(truncate(probs, self.top_k, self.top_p), u)  # [b]
        new = {
            "response_ids": token,
            "logprobs": logp.gather(1, token[:, None])[:, 0],
            "entropies": entropies,
        }
        if self.model.shares_trunk:
            new["values"] = apply_head(self.model.value_head, hidden)
        return new

    def is_end(self, token: Tensor) -> Tensor:
        """Which token ids end a response: [...] -> [...] bool."""
        return (token[..., None] == self.end_ids).any(-1)


# --------------------------------------------------------------------------------- all responses


@torch.no_grad()
def generate(
    model: Policy,
    prompt_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | list[int] | None = None,
    has_token: Tensor | None = None,
    pad_token_id: int = 0,
    seed: int = 0,
    step: int = 0,
    index: Iterable[int] | None = None,
    stream: int = ROLLOUT,
    static: bool | None = None,
) -> Rollout:
    """Sample one response for every prompt from softmax(logits / temperature), dropout off.

    prompt_ids, attention_mask [B, P], left-padded. eos_token_id: what a response ends with, one id
    or any of several; None never stops early. has_token [V] bool: ids that may be sampled (default:
    all). index [B]: each sample's place in the global batch (default 0..B-1). stream: of the noise,
    see rng.py. static: shapes that never change (default: on a GPU).
    Pitfall: top_k, top_p and has_token cut what may be sampled, but log-probs are of the full
    distribution all the same, so keep the first two off for training. What has no token has next to
    no probability in a trained model.
    """
    if temperature <= 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError("temperature must be positive, top_p in (0, 1], top_k 0 (off) or more")
    B = len(prompt_ids)
    R = max_new_tokens
    device = prompt_ids.device
    if index is None:
        index = range(B)
    if static is None:
        static = prompt_ids.is_cuda

    # All noise of the rollout is drawn before the loop: one uniform number for each token.
    mask = attention_mask.bool()  # [B, P]
    u = uniforms(seed, step, index, R, stream).to(device)  # [B, R]
    ends = None
    if eos_token_id is not None:
        ends = torch.tensor(eos_token_id, device=device).view(-1)  # [E]
    if has_token is not None:
        has_token = has_token.to(device)
    sampler = Sampler(model, temperature, top_k, top_p, ends, has_token)

    # The decode loops write into these, column by column.
    out = blank_outputs(B, R, pad_token_id, device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    with decoding(model, device.type, B):
        # Some architectures cannot decode with a static cache: the growing one does it then.
        written = False
        if static:
            written = try_static(sampler, prompt_ids, mask, u, out, finished)
        if not written:
            decode(sampler, prompt_ids, mask, u, out, finished)
    # From NaN a valid id is drawn all the same (first_above), so a diverged policy is found here.
    if not out["logprobs"].isfinite().all():
        raise FloatingPointError(f"step {step}: the policy's log-probs are not finite; lower --lr")

    return cut_responses(sampler, prompt_ids, mask, out, finished, pad_token_id)


def blank_outputs(B: int, R: int, pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """What the decode loops fill in, {name: [B, R]}: zeros and padding."""
    return {
        "logprobs": torch.zeros(B, R, device=device),
        "entropies": torch.zeros(B, R, device=device),
        "values": torch.zeros(B, R, device=device),
        "response_ids": torch.full((B, R), pad_token_id, device=device),
    }


def try_static(
    sampler: Sampler, prompt_ids: Tensor, mask: Tensor, u: Tensor, out: dict, finished: Tensor
) -> bool:
    """Decode by a loop whose shapes never change: the compiled one, or else decode_static().

    -> whether one of them wrote the responses. Some architectures can do neither; then decode()
    writes everything again.
    """
    lm = sampler.model.lm
    rows = (sampler, prompt_ids, mask, u, out, finished)
    # The reason why compiled blocks failed. It is kept as words: the exception itself would keep
    # the memory of the loop that it ended.
    failure = ""
    if is_compiled(lm):
        try:
            decode_compiled(*rows)
            return True
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # a compiler may raise anything
            failure = first_line(e)

    # One warning is enough: it names the loop that writes the responses in the end.
    try:
        decode_static(*rows)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:
        warn_of_fallback(lm, "with a growing cache", first_line(e))
        # The next loop overwrites `out`, but it would drop rows that `finished` still marks.
        finished.zero_()
        return False
    if failure:
        warn_of_fallback(lm, "without compiled blocks", failure)
    return True


def warn_of_fallback(lm, how: str, reason: str):
    """Say that rollouts take a slower loop, and why. Python shows the same warning once."""
    warnings.warn(
        f"rollouts decode {how}, which is slower on a GPU ({type(lm).__name__}: {reason})",
        RuntimeWarning,
        stacklevel=4,
    )


def cut_responses(
    sampler: Sampler,
    prompt_ids: Tensor,
    mask: Tensor,
    out: dict[str, Tensor],
    finished: Tensor,
    pad_token_id: int,
) -> Rollout:
    """What a decode loop has written, with each response cut behind its first EOS.

    A finished row may have run on until it was dropped, or to the end.
    """
    # Where no row has ended, all R tokens are real. (Without end_ids is_end() cannot be asked.)
    if finished.any():
        response_mask = mask_up_to_end(sampler.is_end(out["response_ids"]))  # [B, R]
    else:
        response_mask = torch.ones_like(out["response_ids"], dtype=torch.bool)
    values = None
    if sampler.model.shares_trunk:
        values = out["values"] * response_mask
    return Rollout(
        prompt_ids=prompt_ids,
        attention_mask=mask,
        response_ids=torch.where(response_mask, out["response_ids"], pad_token_id),
        response_mask=response_mask,
        logprobs=out["logprobs"] * response_mask,
        entropies=out["entropies"] * response_mask,
        values=values,
        finished=finished,
    )


def mask_up_to_end(is_end: Tensor) -> Tensor:
    """The mask of the tokens up to and including the first that ends a response: [B, R] bool.

    is_end [B, R]: which tokens would end it.
    """
    # is_end 0 1 0 1 -> ends to the left 0 0 1 1 -> mask 1 1 0 0: the first end itself is kept.
    ends_to_the_left = is_end.cumsum(1) - is_end.long()
    return ends_to_the_left == 0


def check_rollouts(policy: Policy):
    """InputError where a rollout's log-probs are not those that the policy gives whole texts.

    A rollout pads on the left and reads a cache. Some architectures count positions by the columns
    of a batch, padding included, or have no cache that fits: PPO would learn from wrong numbers.
    """
    lm = policy.lm
    refusal = f"{lm.name_or_path}: {type(lm).__name__} cannot write answers in batches here"
    prompt_ids, mask = left_pad([[1], [2, 1, 0, 1]], pad_id=0)  # one row has padding
    device = next(lm.parameters()).device
    with library_call(refusal):
        rollout = generate(policy, prompt_ids.to(device), mask.to(device), max_new_tokens=4)
    with torch.no_grad():
        of_texts = policy(rollout.packed(), rollout.response_mask)["logprobs"]  # [2, 4]
    # 0.01 leaves room for what many layers round. A wrong position changes more.
    require(
        torch.allclose(rollout.logprobs, of_texts, atol=0.01),
        f"{refusal}: behind padding it computes something else of a text; take a model of another "
        "architecture",
    )


# -------------------------------------------------------------------------- the rollouts of a run


@dataclass
class Parts:
    """What a roll-out needs. A PPO run has more parts: evaluation.PPOParts."""

    config: object  # with the flags of sampling: max_new_tokens, temperature, seed, dtype
    dist: Dist
    tokenizer: PreTrainedTokenizerBase
    policy: Policy

    def __post_init__(self):
        # Ids that a padded vocabulary has no token for are never sampled.
        n_embeddings = self.policy.lm.config.get_text_config().vocab_size
        self.has_token = ids_with_tokens(self.tokenizer, n_embeddings)


def roll_out(
    parts: Parts, prompts: Prompts, place: Iterable[int], step: int, stream: int = ROLLOUT
) -> tuple[Rollout, Answers]:
    """One response to each of b prompts.

    place: the prompts' places in the global batch, which key the noise. Step 0 of the stream
    ROLLOUT is the evaluations'. A pool has a stream of its own (rng.py).
    """
    config = parts.config
    dist = parts.dist
    tokenizer = parts.tokenizer

    # Prompts are padded on the left: then all rows write their next token in the same column.
    ids, mask = left_pad(prompts.ids, tokenizer.pad_token_id)
    with autocast(dist, config.dtype), sampling(parts.policy.lm):
        rollout = generate(
            parts.policy,
            ids.to(dist.device),
            mask.to(dist.device),
            config.max_new_tokens,
            temperature=config.temperature,
            eos_token_id=end_ids(tokenizer),
            has_token=parts.has_token,
            pad_token_id=tokenizer.pad_token_id,
            seed=config.seed,
            step=step,
            index=place,
            stream=stream,
        )

    batch = through_frozen_blocks(parts, rollout.packed())
    return rollout, answers_to(prompts, rollout.texts(tokenizer), batch, config.chat_template)


def through_frozen_blocks(parts: Parts, batch: Packed) -> Packed:
    """The batch, with what the policy's frozen blocks make of it: batch.frozen_output [b, T, D].

    They run here once, for the reference and all epochs.
    """
    policy = parts.policy
    config = parts.config
    # Without frozen blocks each forward begins at the embeddings.
    if not policy.frozen or not policy.frozen.n:
        return batch
    for rows in batch.micro_batches(config.micro_batch_size, config.tokens_per_micro_batch):
        part = batch.rows(rows)
        with autocast(parts.dist, config.dtype):
            hidden = policy.frozen.run(policy.lm, part.ids)  # [m, T', D]
        # The first part tells D and the dtype. Columns behind a part's longest row stay 0: no
        # real token sees them.
        if batch.frozen_output is None:
            batch.frozen_output = hidden.new_zeros(*batch.ids.shape, hidden.shape[-1])
        batch.frozen_output[rows, : hidden.shape[1]] = hidden
    return batch


# ----------------------------------------------------------------- questions to a language model


def ask_locally(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    max_tokens: int,
    batch_size: int = 1,
) -> Iterator[tuple[int, str | InputError]]:
    """Ask a language model questions, through its chat template if it has one.

    It takes the likeliest token each time. -> (i, answer to question i), in the order in which they
    are answered. A question that is longer than the model's context has an InputError in the place
    of an answer.
    """
    device = next(policy.parameters()).device
    has_template = bool(tokenizer.chat_template)
    n_embeddings = policy.lm.config.get_text_config().vocab_size
    has_token = ids_with_tokens(tokenizer, n_embeddings)
    # A question that is too long has its error at once, and the others are asked all the same.
    ready = []  # (i, token ids)
    for i, question in enumerate(questions):
        row = {"prompt": question}
        try:
            ready_prompt = ready_prompts(
                tokenizer, [row], policy.lm.config, max_tokens, chat=has_template
            )
        except InputError as e:
            yield i, e
        else:
            ready.append((i, ready_prompt.ids[0]))

    # Prompts of similar length together have little padding.
    ready.sort(key=lambda item: len(item[1]))
    for first in range(0, len(ready), batch_size):
        part = ready[first : first + batch_size]
        ids, mask = left_pad([prompt for _, prompt in part], tokenizer.pad_token_id)
        rollout = generate(
            policy,
            ids.to(device),
            mask.to(device),
            max_tokens,
            # so cold that the likeliest token has practically all the mass
            temperature=1e-4,
            eos_token_id=end_ids(tokenizer),
            has_token=has_token,
            pad_token_id=tokenizer.pad_token_id,
        )
        for (i, _), answer in zip(part, rollout.texts(tokenizer)):
            yield i, answer

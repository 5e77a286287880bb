"""nanorlhf.rollout against a fresh forward of what was sampled, and against a naive sampler: one row, no cache, no padding.

    B sequences, P prompt tokens, R response tokens, V vocabulary
"""

import math
import warnings
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support import ARCHITECTURES, SIZE, SPECIAL, V, random_rows, tiny_lm, tiny_policy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV32Config,
    Gemma2Config,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3NextConfig,
)

import nanorlhf.hf.decode
from nanorlhf.models import Policy
from nanorlhf.packing import pack, response_mask_of
from nanorlhf.rollout import generate, left_pad, sample, truncate, uniforms

B, R, SEED, STEP = 10, 14, 14, 3
PROMPTS = random_rows((5, 2, 7, 1, 3, 4, 7, 2, 6, 3), seed=4)
IDS, MASK = left_pad(PROMPTS, 0)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def policy(request):
    return tiny_policy(request.param)


def roll(policy, ids=IDS, mask=MASK, new=R, **kwargs):
    return generate(policy, ids, mask, new, **{"seed": SEED, "step": STEP} | kwargs)


def frequent_token(policy, **kwargs):
    """A token that ends many responses at different places when it is taken as EOS."""
    return Counter(roll(policy, **kwargs).response_ids.flatten().tolist()).most_common(1)[0][0]


def naive(policy, prompts, u, temperature, eos, top_k=0, top_p=1.0):
    """Responses as lists: each row alone, recomputed in full at every token; the first token at which the CDF passes u."""
    responses = []
    for prompt, row in zip(prompts, u.tolist()):
        ids = list(prompt)
        for x in row:
            with torch.no_grad():
                p = (policy.lm(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1).double()
            p = torch.tensor(brute_truncate(p.tolist(), top_k, top_p), dtype=torch.float64)
            ids.append(next(i for i, c in enumerate(p.cumsum(0).tolist()) if c > x * p.sum().item()))
            if ids[-1] == eos:
                break
        responses.append(ids[len(prompt) :])
    return responses


def brute_truncate(p, top_k=0, top_p=1.0):
    """A list of probabilities with all but the likeliest k, then all but the smallest set with mass top_p, put to 0."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = order[:top_k] if top_k else order
    total, mass, nucleus = sum(p[i] for i in kept), 0.0, []
    for i in kept:
        if top_p < 1 and mass >= top_p * total:
            break
        nucleus.append(i)
        mass += p[i]
    return [x if i in nucleus else 0.0 for i, x in enumerate(p)]


def as_lists(rollout):
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask)]


# ---------------------------------------------------------------------------------------------------------------- what is sampled


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_naive_sampler_samples_the_same(policy, temperature):
    """Also: finished rows leave the running batch, and nothing changes for the rest."""
    eos, sizes = frequent_token(policy, temperature=temperature), []
    hook = policy.lm.base_model.register_forward_pre_hook(lambda m, a, kw: sizes.append(len(kw["input_ids"])), with_kwargs=True)
    rollout = roll(policy, temperature=temperature, eos_token_id=eos, pad_token_id=0)
    hook.remove()
    responses = naive(policy, PROMPTS, uniforms(SEED, STEP, range(B), R), temperature, eos)
    assert as_lists(rollout) == responses
    ended = [r[-1] == eos for r in responses]
    assert rollout.finished.tolist() == ended and len({len(r) for r in responses}) > 3 and 3 <= sum(ended)
    assert sizes[0] == B and min(sizes) <= 0.75 * B


def test_top_k_and_top_p_cut_what_is_sampled(policy):
    rollout = roll(policy, top_k=5, top_p=0.8)
    assert as_lists(rollout) == naive(policy, PROMPTS, uniforms(SEED, STEP, range(B), R), 1.0, None, 5, 0.8)
    assert as_lists(rollout) != as_lists(roll(policy))
    batch = rollout.packed()
    same(rollout.logprobs, policy(batch, response_mask_of(batch))["logprobs"].detach())  # of the full distribution all the same


def same(a, b, tol=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_values_and_entropies_are_those_of_a_fresh_forward(policy, temperature):
    rollout = roll(policy, temperature=temperature, eos_token_id=frequent_token(policy))
    batch = rollout.packed()
    with torch.no_grad():
        fresh = policy(batch, response_mask_of(batch, R), temperature, entropy=True)
    for name, value in (("logprobs", rollout.logprobs), ("values", rollout.values), ("entropies", rollout.entropies)):
        same(value, fresh[name])
        assert value[rollout.response_mask].std() > 0.1 and (value[~rollout.response_mask] == 0).all()
    assert 0 < rollout.response_mask.sum() < B * R
    assert ((fresh["logprobs"] - rollout.logprobs).exp() - 1).abs().max() < 1e-5  # the first ratio of PPO


SMALL = dict(SIZE, num_key_value_heads=4)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2,
              num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16)  # fmt: skip
SPARSE = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, index_topk=64, index_n_heads=2,
              index_head_dim=16, first_k_dense_replace=2)  # fmt: skip


OTHERS = [
    MistralConfig(**SMALL, sliding_window=4),
    Gemma2Config(**SMALL, head_dim=8, sliding_window=4),  # every other layer slides; soft-capped logits
    OPTConfig(**SIZE, ffn_dim=48, word_embed_proj_dim=16),  # learned positions, counted from the mask
    BloomConfig(**SPECIAL, hidden_size=32, n_layer=2, n_head=4),  # ALiBi
    Qwen3NextConfig(**SMALL, **LINEAR, head_dim=8, layer_types=["linear_attention", "full_attention"]),  # not only keys and values
    DeepseekV32Config(**SMALL, **SPARSE),  # the keys of an indexer as well
]


def other_policy(config):
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(config), value_head=False).eval()
    for p in policy.parameters():
        if p.dim() > 1:
            p.data.mul_(8)
    return policy


@pytest.mark.parametrize("config", OTHERS, ids=lambda c: c.model_type)
def test_other_attentions(config):
    policy = other_policy(config)
    rollout = roll(policy, eos_token_id=frequent_token(policy))
    batch = rollout.packed()
    same(rollout.logprobs, policy(batch, response_mask_of(batch, R))["logprobs"].detach())
    row, n = batch.ids[:1, : batch.lengths[0]], len(PROMPTS[0])
    alone = policy.lm(row).logits[0].log_softmax(-1)[n - 1 : -1].gather(1, row[0, n:, None])[:, 0]
    same(rollout.logprobs[0, : len(alone)], alone.detach())


def test_a_model_without_a_kv_cache_is_refused():
    policy = Policy(AutoModelForCausalLM.from_config(MambaConfig(**SPECIAL, hidden_size=32, num_hidden_layers=2, state_size=4)))
    with pytest.raises(ValueError, match="cache"):
        roll(policy, new=2)


def test_what_was_sampled_can_be_trained_on(policy):
    """Nothing that was made in inference mode gets out, nor does autocast keep such a copy of a weight."""
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            rollout = roll(policy, eos_token_id=frequent_token(policy))
            batch = rollout.packed()
            assert not any(x.is_inference() for x in (*vars(rollout).values(), *vars(batch).values()) if x is not None)
        (policy(batch, response_mask_of(batch, R))["logprobs"] * rollout.logprobs).sum().backward()
    policy.zero_grad()


def test_values_only_with_a_head_on_the_trunk():
    assert roll(Policy(tiny_lm("neox"), value_head=False), new=2).values is None
    assert roll(Policy(tiny_lm("neox"), value_trunk=tiny_lm("neox", 1).base_model), new=2).values is None
    assert (roll(Policy(tiny_lm("neox")), new=2).values == 0).all()


def test_padding_does_not_matter(policy):
    base = roll(policy, eos_token_id=5)
    for extra, pad in ((4, 0), (1, 5)):
        ids = torch.cat([torch.full((B, extra), pad), torch.where(MASK, IDS, pad)], 1)
        wide = roll(policy, ids, torch.cat([torch.zeros(B, extra, dtype=torch.bool), MASK], 1), eos_token_id=5)
        assert torch.equal(wide.response_ids, base.response_ids)
        same(wide.logprobs, base.logprobs)
    rows = [b for b in range(B) if len(PROMPTS[b]) == 7]  # without any padding
    part = roll(policy, IDS[rows], MASK[rows], eos_token_id=5, index=rows)
    assert MASK[rows].all() and torch.equal(part.response_ids, base.response_ids[rows])


def test_the_batch_may_be_split(policy):
    whole = roll(policy, eos_token_id=5)
    for part in (range(4), range(4, B), [8, 1, 6]):
        part = list(part)
        split = roll(policy, IDS[part], MASK[part], eos_token_id=5, index=part)
        assert torch.equal(split.response_ids, whole.response_ids[part])
        assert torch.equal(split.response_mask, whole.response_mask[part])
        same(split.logprobs, whole.logprobs[part])
    assert not torch.equal(roll(policy, IDS[4:], MASK[4:], eos_token_id=5).response_ids, whole.response_ids[4:])  # other places


def test_noise_is_keyed_by_seed_step_index_and_position():
    u = uniforms(1, 2, range(6), 5)
    assert u.shape == (6, 5) and u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    assert len(set(u.flatten().tolist())) == 30  # every index and position has its own
    assert torch.equal(u, uniforms(1, 2, range(6), 5))
    assert torch.equal(u[[4, 1]], uniforms(1, 2, [4, 1], 5)) and torch.equal(u[3:], uniforms(1, 2, range(3, 6), 5))
    for other in (uniforms(0, 2, range(6), 5), uniforms(1, 3, range(6), 5), uniforms(2, 1, range(6), 5)):
        assert not set(u.flatten().tolist()) & set(other.flatten().tolist())


def test_noise_does_not_depend_on_the_longest_response():
    assert torch.equal(uniforms(1, 2, range(6), 9)[:, :5], uniforms(1, 2, range(6), 5))


def test_other_keys_other_samples():
    policy = tiny_policy("neox")
    base = roll(policy).response_ids
    assert torch.equal(base, roll(policy).response_ids)
    for other in (dict(seed=SEED + 1), dict(step=STEP + 1), dict(index=range(1, B + 1))):
        assert not torch.equal(base, roll(policy, **other).response_ids)


# ----------------------------------------------------------------------------------------------------------------- where it ends


def test_the_mask_ends_with_the_first_eos_even_if_pad_is_eos(policy):
    free, eos = roll(policy), frequent_token(policy)
    for pad in (0, eos):
        rollout = roll(policy, eos_token_id=eos, pad_token_id=pad)
        for b in range(B):
            sampled = free.response_ids[b].tolist()
            length = sampled.index(eos) + 1 if eos in sampled else R
            assert rollout.response_mask[b].tolist() == [j < length for j in range(R)]
            assert rollout.response_ids[b].tolist() == sampled[:length] + [pad] * (R - length)
            assert rollout.finished[b] == (eos in sampled)
        same(rollout.logprobs, free.logprobs * rollout.response_mask)
    assert 0 < rollout.finished.sum()


def test_without_eos_every_response_is_full(policy):
    rollout = roll(policy, eos_token_id=None, pad_token_id=int(roll(policy).response_ids[0, 0]))
    assert rollout.response_mask.all() and rollout.response_mask.shape == (B, R) and not rollout.finished.any()


def test_one_new_token(policy):
    eos = int(roll(policy).response_ids[3, 0])
    one = roll(policy, new=1, eos_token_id=eos)
    assert as_lists(one) == naive(policy, PROMPTS, uniforms(SEED, STEP, range(B), 1), 1.0, eos)
    assert one.response_mask.all() and one.response_mask.shape == (B, 1)
    assert one.finished.tolist() == (one.response_ids[:, 0] == eos).tolist()


def test_packed_puts_the_padding_on_the_right(policy):
    eos = frequent_token(policy)
    rollout = roll(policy, eos_token_id=eos, pad_token_id=eos)
    batch, responses = rollout.packed(), as_lists(rollout)
    assert batch.prompt_lengths.tolist() == [len(p) for p in PROMPTS]
    assert batch.response_lengths.tolist() == [len(r) for r in responses]
    for row, prompt, response in zip(batch.ids.tolist(), PROMPTS, responses):
        assert row[: len(prompt) + len(response)] == prompt + response
    again = pack(PROMPTS, responses, eos)
    assert torch.equal(batch.rows(torch.arange(B)).lengths, again.lengths) and torch.equal(rollout.prompt_ids, IDS)


def test_left_pad():
    ids, mask = left_pad([[7, 8], [9], [1, 2, 3]], 5)
    assert ids.tolist() == [[5, 7, 8], [5, 5, 9], [1, 2, 3]] and mask.dtype == torch.bool
    assert mask.int().tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_the_temperature_is_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        roll(tiny_policy("neox"), temperature=temperature)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_is_off_and_the_mode_comes_back(architecture):
    policy = tiny_policy(architecture)
    base = roll(policy, new=4)
    assert not policy.training and not policy.lm.training
    policy.train()
    again = roll(policy, new=4)
    assert policy.training and policy.lm.training and policy.lm.base_model.training
    assert torch.equal(base.response_ids, again.response_ids) and torch.equal(base.logprobs, again.logprobs)
    batch = base.packed()
    dropped = policy(batch, response_mask_of(batch))["logprobs"]  # dropout does matter here
    assert (dropped - base.logprobs).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------- shapes that never change, as on a GPU


def same_rollouts(a, b, tol=1e-4):
    assert torch.equal(a.response_ids, b.response_ids) and torch.equal(a.response_mask, b.response_mask)
    assert torch.equal(a.finished, b.finished) and torch.equal(a.attention_mask, b.attention_mask)
    for name in ("logprobs", "entropies", "values"):
        same(getattr(a, name), getattr(b, name), tol)


@pytest.fixture
def strict():
    """Falling back to the growing cache is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0.7, "top_k": 9}, {"top_p": 0.8}], ids=str)
@pytest.mark.parametrize("new", [1, R, 40])  # one token; one cache block; a look at whether all have finished
def test_a_static_cache_samples_the_same(policy, strict, new, kwargs):
    for eos in (None, frequent_token(policy, new=new, **kwargs)):
        same_rollouts(roll(policy, new=new, eos_token_id=eos, static=True, **kwargs), roll(policy, new=new, eos_token_id=eos, **kwargs))


def test_a_static_cache_without_padding(policy, strict):
    ids, mask = left_pad(random_rows((6,) * 5, seed=3), 0)
    same_rollouts(roll(policy, ids, mask, eos_token_id=5, static=True), roll(policy, ids, mask, eos_token_id=5))


def count_forwards(policy, **kwargs):
    sizes = []
    hook = policy.lm.base_model.register_forward_pre_hook(lambda m, a, kw: sizes.append(len(kw["input_ids"])), with_kwargs=True)
    roll(policy, **kwargs)
    hook.remove()
    return sizes


def test_a_static_loop_keeps_its_shape_and_ends_early(monkeypatch, strict):
    policy = tiny_policy("neox")
    monkeypatch.setattr("nanorlhf.rollout.truncate", lambda probs, *_: torch.eye(V)[7].expand_as(probs))  # every row ends at once
    assert count_forwards(policy, new=60, static=True, eos_token_id=7) == [B] * nanorlhf.hf.decode.CHECK_EVERY
    assert count_forwards(policy, new=60, static=True) == [B] * 60 and count_forwards(policy, new=60, eos_token_id=7) == [B]


class NoWaiting(TorchDispatchMode):
    """Operators that must wait for a GPU, because their result is a Python number or has a shape that depends on the data."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique2", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.WAITING, function
        indices = args[1] if function.overloadpacket.__name__ in ("index", "index_put_") else []
        assert not any(i is not None and i.dtype == torch.bool for i in indices), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_static_step_never_waits_and_can_be_replayed(policy, monkeypatch, strict, dtype):
    """The step that a GPU would capture, taken R - 1 times as it is there: no Python state, no number that Python reads."""
    steps, kwargs = [], dict(top_k=20, top_p=0.9, eos_token_id=5)

    def replay(step):
        def wrapped():
            steps.append(1)
            with NoWaiting():
                step()

        return wrapped

    monkeypatch.setattr("nanorlhf.hf.decode.capture", lambda step, *_: (replay(step), 1))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        rollout = roll(policy, static=True, **kwargs)
    assert len(steps) == R - 1
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        bool(rollout.finished.all())
    if dtype == torch.float32:
        same_rollouts(rollout, roll(policy, **kwargs))


@pytest.mark.parametrize("config", OTHERS, ids=lambda c: c.model_type)
def test_other_attentions_with_a_static_cache(config):
    """Sliding windows work; ALiBi, linear attention and indexers do not, and fall back with a warning."""
    policy, falls_back = other_policy(config), config.model_type in ("bloom", "qwen3_next", "deepseek_v32")
    eos = frequent_token(policy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        static = roll(policy, eos_token_id=eos, static=True)
    assert [w.category for w in caught] == [RuntimeWarning] * falls_back
    dynamic = roll(policy, eos_token_id=eos)
    assert torch.equal(static.response_ids, dynamic.response_ids) and torch.equal(static.finished, dynamic.finished)
    same(static.logprobs, dynamic.logprobs)


def test_a_step_that_cannot_be_captured_falls_back(monkeypatch):
    """After the warm-up has written tokens, and finished rows."""
    policy = tiny_policy("neox")
    eos = int(roll(policy).response_ids[3, 1])

    def fail(step, *_):
        step(), step()
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA ...")

    monkeypatch.setattr("nanorlhf.hf.decode.capture", fail)
    with pytest.warns(RuntimeWarning, match="GPTNeoXForCausalLM: operation not permitted when stream is capturing"):
        static = roll(policy, eos_token_id=eos, static=True)
    dynamic = roll(policy, eos_token_id=eos)
    same_rollouts(static, dynamic, tol=0)
    assert 0 < static.finished.sum() < B


def test_a_step_that_waits_is_found_before_it_is_captured(monkeypatch):
    """The mode in which waiting is an error ends with the warm-up, and what it has begun is waited for."""
    log, stream = [], SimpleNamespace(wait_stream=lambda other: log.append("joined"))
    for name, value in dict(current_stream=lambda d: stream, Stream=lambda d: stream, stream=lambda s: nullcontext(),
                            get_sync_debug_mode=lambda: 0, set_sync_debug_mode=log.append).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def step():
        log.append("step")
        raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        nanorlhf.hf.decode.capture(step, R, torch.device("cuda"))
    assert log == ["joined", "error", "step", 0, "joined"]


@pytest.mark.parametrize("static", [False, True])
def test_bfloat16_leaves_the_weights_alone(policy, strict, static):
    """Half of the weights are frozen; rollouts have them require grad for a while. Tokens agree until rounding decides otherwise."""
    names = [name for name, _ in policy.named_parameters()]
    before = {name: p.clone() for name, p in policy.named_parameters()}
    for name in names[::2]:
        policy.get_parameter(name).requires_grad_(False)
    full = roll(policy)
    with torch.autocast("cpu", torch.bfloat16):
        half = roll(policy, static=static)
    assert [p.requires_grad for p in policy.parameters()] == [i % 2 == 1 for i in range(len(names))]
    policy.requires_grad_(True)
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in policy.named_parameters())
    prefix = (full.response_ids != half.response_ids).cumsum(1) == 0
    assert prefix.float().mean() > 0.3
    assert (full.logprobs - half.logprobs)[prefix].abs().mean() < 0.1


def test_bfloat16_casts_each_weight_and_key_once():
    """Weights: not once a token, frozen or not. Keys: NeoX's rotary embeddings leave them in float32."""
    policy, casts = tiny_policy("neox"), Counter()
    policy.lm.requires_grad_(False)
    weights = {p.data_ptr() for p in policy.lm.parameters() if p.dim() == 2}

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_to_copy" in str(function) and kwargs.get("dtype") == torch.bfloat16:
                casts.update({args[0].data_ptr()} & weights)
                casts["width"] = max(casts["width"], args[0].shape[2] if args[0].dim() == 4 else 0)
            return function(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Casts():
        roll(policy)
    width = casts.pop("width")
    assert len(casts) == 9 and set(casts.values()) == {1}  # 4 of each of two blocks, and the head
    assert width == IDS.shape[1]  # the prompt's keys; never the whole cache


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("new", [2, R, 40])
def test_a_captured_step_samples_the_same(policy, strict, monkeypatch, new):
    captured = []
    monkeypatch.setattr("nanorlhf.hf.decode.capture", lambda *a, f=nanorlhf.hf.decode.capture: captured.append(f(*a)) or captured[-1])
    try:
        policy.cuda()
        ids, mask = IDS.cuda(), MASK.cuda()
        for eos in (None, 5):
            a, b = (roll(policy, ids, mask, new=new, eos_token_id=eos, top_k=30, static=s) for s in (None, False))
            assert (a.response_ids == b.response_ids).float().mean() > 0.98  # ties of floats apart
            agree = (a.response_ids != b.response_ids).cumsum(1) == 0
            for name in ("logprobs", "entropies", "values"):
                same(getattr(a, name)[agree], getattr(b, name)[agree], 1e-3)
        with torch.autocast("cuda", torch.bfloat16):
            half = roll(policy, ids, mask, new=new)
        assert half.logprobs.isfinite().all() and [t for _, t in captured] == [4 if new > 4 else 1] * 3
    finally:
        policy.cpu()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_that_waits_falls_back(monkeypatch):
    policy, ids, mask = tiny_policy("neox").cuda(), IDS.cuda(), MASK.cuda()
    expected = roll(policy, ids, mask)
    with monkeypatch.context() as m, pytest.warns(RuntimeWarning, match="synchroniz"):
        m.setattr("nanorlhf.rollout.truncate", lambda probs, *_: probs * (probs.sum().item() > 0))
        same(roll(policy, ids, mask).logprobs, expected.logprobs, 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and the next rollout is captured again
        same(roll(policy, ids, mask).logprobs, expected.logprobs, 1e-3)


# ----------------------------------------------------------------------------------------------------------- sample() and truncate()


def test_sampled_frequencies_match_the_probabilities():
    n, p = 20_000, torch.tensor([0.0, 0.3, 0.05, 0.0, 0.4, 0.2, 0.05, 0.0])
    u = uniforms(0, 0, range(n), 1)[:, 0]
    for scale in (1.0, 7.0):  # any positive scale
        counts = torch.bincount(sample((scale * p).expand(n, -1), u), minlength=8)
        assert (counts[p == 0] == 0).all()
        seen, awaited = counts[p > 0].double(), n * p[p > 0].double()
        assert ((seen - awaited) ** 2 / awaited).sum() < 18.5  # chi-square, 4 degrees of freedom: 1 in 1000
    assert sample(torch.eye(4), torch.full((4,), 0.999).double()).tolist() == [0, 1, 2, 3]


def test_never_a_token_without_mass():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(500, 9, generator=generator) * (torch.rand(500, 9, generator=generator) < 0.4)
    probs = probs[probs.sum(1) > 0]
    assert (probs[:, 0] == 0).any() and (probs[:, -1] == 0).any()
    for u, end in ((0.0, 0), (math.nextafter(1.0, 0.0), -1)):
        token = sample(probs, torch.full((len(probs),), u, dtype=torch.float64))
        assert token.tolist() == [p.nonzero()[:, 0][end].item() for p in probs]


@pytest.mark.parametrize("top_k", [0, 1, 3, 8, 20])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 1.0])
def test_truncate_by_brute_force(top_k, top_p):
    probs = (2 * torch.randn(40, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).softmax(-1)
    expected = torch.tensor([brute_truncate(p, top_k, top_p) for p in probs.tolist()], dtype=torch.float64)
    assert torch.equal(truncate(probs, top_k, top_p), expected)
    assert (expected > 0).any(1).all()

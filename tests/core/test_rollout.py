"""nanorlhf.rollout against a fresh forward of what was sampled, and against a naive sampler: one
row, no cache, no padding.

    B sequences, P prompt tokens, R response tokens, V vocabulary
"""

import math
import re
import warnings
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support import NoWaiting, same_rollouts
from tiny_models import ARCHITECTURES, SIZE, SPECIAL, D, V, random_rows, tiny_lm, tiny_policy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV32Config,
    FalconConfig,
    Gemma2Config,
    GPTNeoXModel,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3NextConfig,
)
from transformers.cache_utils import StaticLayer

import nanorlhf.hf.decode
import nanorlhf.rollout
from nanorlhf.errors import InputError
from nanorlhf.hf.decode import cache_name, static_cache
from nanorlhf.hf.lora import adapters, add_lora
from nanorlhf.models import Policy
from nanorlhf.packing import pack, response_mask_of
from nanorlhf.rollout import (
    BLOCK,
    WIDE,
    Sampler,
    check_rollouts,
    generate,
    left_pad,
    sample,
    truncate,
    uniforms,
)

B, R, SEED, STEP = 10, 14, 14, 3
PROMPTS = random_rows((5, 2, 7, 1, 3, 4, 7, 2, 6, 3), seed=4)
IDS, MASK = left_pad(PROMPTS, 0)
EVERYWHERE = range(B)


@pytest.fixture(
    scope="module", params=["neox", "llama", pytest.param("gpt2", marks=pytest.mark.slow)]
)
def policy(request):
    return tiny_policy(request.param)


def roll(policy, ids=IDS, mask=MASK, new=R, **options):
    """A rollout of the prompts of this file, with its seed and step."""
    options = {"seed": SEED, "step": STEP, **options}
    return generate(policy, ids, mask, new, **options)


def roll_rows(policy, rows, **options):
    """The same of some of the prompts, which keep their places in the whole batch."""
    return roll(policy, IDS[rows], MASK[rows], index=rows, **options)


def frequent_token(policy, **options):
    """A token that ends many responses at different places when it is taken as EOS."""
    tokens = roll(policy, **options).response_ids.flatten().tolist()
    [(token, _)] = Counter(tokens).most_common(1)
    return token


def as_lists(rollout):
    """The sampled responses, without padding."""
    responses = []
    for ids, mask in zip(rollout.response_ids, rollout.response_mask):
        responses.append(ids[mask].tolist())
    return responses


def same(a, b, tol=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


def fresh_forward(policy, rollout, **options):
    """What the policy says of a rollout's texts, packed, as training sees them."""
    batch = rollout.packed()
    return policy(batch, rollout.response_mask, **options)


# ------------------------------------------------------------------------------ the naive sampler


def truncate_by_hand(p, top_k=0, top_p=1.0):
    """Probabilities with all but the likeliest k put to 0, then all but the nucleus of mass top_p.

    The nucleus is the smallest set of likeliest tokens with at least that share of what is left.
    """
    likeliest_first = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k:
        likeliest_first = likeliest_first[:top_k]
    total = sum(p[i] for i in likeliest_first)
    truncated = [0.0] * len(p)
    mass = 0.0
    for i in likeliest_first:
        if top_p < 1 and mass >= top_p * total:
            break
        truncated[i] = p[i]
        mass += p[i]
    return truncated


def sample_by_hand(p, u):
    """The first token at which the cumulative probability passes u, of p's total."""
    p = torch.tensor(p, dtype=torch.float64)
    cumulative = p.cumsum(0).tolist()
    threshold = u * p.sum().item()
    for token, reached in enumerate(cumulative):
        if reached > threshold:
            return token


def roll_by_hand(policy, new=R, temperature=1.0, eos=None, top_k=0, top_p=1.0):
    """Responses as lists: each row alone, recomputed in full at every token."""
    responses = []
    noise = uniforms(SEED, STEP, EVERYWHERE, new)
    for prompt, row in zip(PROMPTS, noise.tolist()):
        response = []
        for u in row:
            with torch.no_grad():
                logits = policy.lm(torch.tensor([prompt + response])).logits[0, -1]
            p = (logits / temperature).softmax(-1).double()
            token = sample_by_hand(truncate_by_hand(p.tolist(), top_k, top_p), u)
            response.append(token)
            if token == eos:
                break
        responses.append(response)
    return responses


# -------------------------------------------------------------------------------- what is sampled


def count_forwards(policy, **options):
    """A rollout, and how many rows each of its forwards had: sizes, rollout."""
    sizes = []

    def note_size(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))

    base_model = policy.lm.base_model
    hook = base_model.register_forward_pre_hook(note_size, with_kwargs=True)
    rollout = roll(policy, **options)
    hook.remove()
    return sizes, rollout


every_temperature = pytest.mark.parametrize("temperature", [0.7, 1.0])


@every_temperature
def test_the_naive_sampler_samples_the_same(policy, temperature):
    """Also: finished rows leave the running batch, and nothing changes for the rest."""
    eos = frequent_token(policy, temperature=temperature)
    expected = roll_by_hand(policy, temperature=temperature, eos=eos)
    # The example is one: responses of different lengths, several of which end with EOS.
    has_ended = [response[-1] == eos for response in expected]
    lengths = {len(response) for response in expected}
    assert sum(has_ended) >= 3
    assert len(lengths) > 3

    options = {"temperature": temperature, "eos_token_id": eos, "pad_token_id": 0}
    sizes, rollout = count_forwards(policy, **options)
    assert as_lists(rollout) == expected
    assert rollout.finished.tolist() == has_ended
    assert sizes[0] == B
    assert min(sizes) <= 0.75 * B


def test_top_k_and_top_p_cut_what_is_sampled(policy):
    rollout = roll(policy, top_k=5, top_p=0.8)
    assert as_lists(rollout) == roll_by_hand(policy, top_k=5, top_p=0.8)
    assert as_lists(rollout) != as_lists(roll(policy))
    # The log-probs are of the full distribution all the same.
    fresh = fresh_forward(policy, rollout)
    same(rollout.logprobs, fresh["logprobs"].detach())


@every_temperature
def test_logprobs_values_and_entropies_are_those_of_a_fresh_forward(policy, temperature):
    rollout = roll(policy, temperature=temperature, eos_token_id=frequent_token(policy))
    mask = rollout.response_mask
    assert 0 < mask.sum() < B * R
    with torch.no_grad():
        fresh = fresh_forward(policy, rollout, temperature=temperature, entropy=True)
    for name in ("logprobs", "values", "entropies"):
        found = getattr(rollout, name)
        same(found, fresh[name])
        assert found[mask].std() > 0.1
        assert (found[~mask] == 0).all()
    # The first ratio of PPO.
    ratio = (fresh["logprobs"] - rollout.logprobs).exp()
    assert (ratio - 1).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:rollouts decode with a growing cache")
def test_any_of_several_ends_ends_a_response(policy):
    free = roll(policy)
    counts = Counter(free.response_ids.flatten().tolist())
    ends = [token for token, _ in counts.most_common(3)]

    rollout = roll(policy, eos_token_id=ends)

    # By hand: each response up to the first of these tokens.
    for ids, whole, finished in zip(as_lists(rollout), as_lists(free), rollout.finished):
        places = [t for t, token in enumerate(whole) if token in ends]
        expected = whole[: places[0] + 1] if places else whole
        assert ids == expected
        assert bool(finished) == bool(places)
    assert len({ids[-1] for ids in as_lists(rollout)}) > 1
    static = roll(policy, eos_token_id=ends, static=True)
    assert as_lists(static) == as_lists(rollout)
    assert static.finished.tolist() == rollout.finished.tolist()


@pytest.mark.filterwarnings("ignore:rollouts decode with a growing cache")
@pytest.mark.parametrize("static", [False, True])
def test_ids_without_a_token_are_never_sampled(policy, static):
    has_token = torch.arange(V) < V // 3
    assert max(map(max, as_lists(roll(policy)))) >= V // 3

    rollout = roll(policy, has_token=has_token, static=static)

    assert rollout.response_ids.max() < V // 3
    # The log-probs are of the full distribution all the same.
    same(rollout.logprobs, fresh_forward(policy, rollout)["logprobs"].detach())


GROUPED = dict(SIZE, num_key_value_heads=4)
LINEAR_ATTENTION = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    num_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)
SPARSE_ATTENTION = dict(
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    index_topk=64,
    index_n_heads=2,
    index_head_dim=16,
    first_k_dense_replace=2,
)
OTHERS = [
    MistralConfig(**GROUPED, sliding_window=4),
    # Every other layer slides; the logits are soft-capped.
    Gemma2Config(**GROUPED, head_dim=8, sliding_window=4),
    # Learned positions, counted from the mask.
    OPTConfig(**SIZE, ffn_dim=48, word_embed_proj_dim=16),
    # ALiBi.
    BloomConfig(**SPECIAL, hidden_size=32, n_layer=2, n_head=4),
    # ALiBi in a model that has rotary embeddings too, and does not use them.
    FalconConfig(**SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
    # Its cache holds not only keys and values.
    Qwen3NextConfig(**GROUPED, **LINEAR_ATTENTION),
    # Its cache holds the keys of an indexer as well.
    DeepseekV32Config(**GROUPED, **SPARSE_ATTENTION),
]
every_attention = pytest.mark.parametrize("config", OTHERS, ids=lambda c: c.model_type)


def other_policy(config):
    """A policy of random weights, large enough that distributions are far from flat."""
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(config), value_head=False).eval()
    for parameter in policy.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return policy


@every_attention
def test_other_attentions(config):
    policy = other_policy(config)
    sizes, rollout = count_forwards(policy, eos_token_id=frequent_token(policy))
    assert min(sizes) <= 0.75 * B  # finished rows leave the running batch
    fresh = fresh_forward(policy, rollout)
    same(rollout.logprobs, fresh["logprobs"].detach())

    # The first row alone, by plain transformers.
    prompt = PROMPTS[0]
    response = as_lists(rollout)[0]
    logits = policy.lm(torch.tensor([prompt + response])).logits[0]
    logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    alone = logp[range(len(response)), response]
    same(rollout.logprobs[0, : len(response)], alone.detach())


def test_a_model_without_a_kv_cache_is_refused():
    """It ignores the cache, or, from transformers 5.24 on, keeps another kind of state in it."""
    config = MambaConfig(**SPECIAL, hidden_size=32, num_hidden_layers=2, state_size=4)
    policy = Policy(AutoModelForCausalLM.from_config(config))
    with pytest.raises(InputError, match="MambaForCausalLM"):
        check_rollouts(policy)


class NewerTrunk(GPTNeoXModel):
    """A trunk whose forward and output call the cache `cache`, as from transformers 5.24 on."""

    def forward(self, input_ids, attention_mask, position_ids, use_cache, cache):
        older_or_newer = {cache_name(GPTNeoXModel): cache}
        hidden = super().forward(
            input_ids, attention_mask, position_ids=position_ids, **older_or_newer
        )
        return SimpleNamespace(last_hidden_state=hidden.last_hidden_state, cache=cache)


@pytest.mark.parametrize("static", [False, True])
def test_a_model_may_call_its_cache_by_the_newer_name(static, strict):
    expected = roll(tiny_policy("neox"), static=static, eos_token_id=5)
    policy = tiny_policy("neox")
    policy.lm.base_model.__class__ = NewerTrunk

    same_rollouts(roll(policy, static=static, eos_token_id=5), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_was_sampled_can_be_trained_on(policy, autocast):
    """Nothing that was made in inference mode gets out.

    Nor does autocast keep such a copy of a weight.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rollout = roll(policy, eos_token_id=frequent_token(policy))
        batch = rollout.packed()
        for tensor in [*vars(rollout).values(), *vars(batch).values()]:
            if tensor is not None:
                assert not tensor.is_inference()
    logprobs = fresh_forward(policy, rollout)["logprobs"]
    (logprobs * rollout.logprobs).sum().backward()
    policy.zero_grad()


def test_values_only_with_a_head_on_the_trunk():
    with_head = Policy(tiny_lm("neox"))
    assert (roll(with_head, new=2).values == 0).all()
    without_head = Policy(tiny_lm("neox"), value_head=False)
    assert roll(without_head, new=2).values is None
    other_trunk = Policy(tiny_lm("neox"), value_trunk=tiny_lm("neox", 1).base_model)
    assert roll(other_trunk, new=2).values is None


@pytest.mark.parametrize("extra, pad_id", [(4, 0), (1, 5)])
def test_padding_does_not_matter(policy, extra, pad_id):
    expected = roll(policy, eos_token_id=5)
    prompts = torch.where(MASK, IDS, pad_id)
    wider_ids = torch.cat([torch.full((B, extra), pad_id), prompts], 1)
    wider_mask = torch.cat([torch.zeros(B, extra, dtype=torch.bool), MASK], 1)
    wide = roll(policy, wider_ids, wider_mask, eos_token_id=5)
    assert torch.equal(wide.response_ids, expected.response_ids)
    same(wide.logprobs, expected.logprobs)


def test_a_batch_without_any_padding(policy):
    expected = roll(policy, eos_token_id=5)
    rows = [b for b in EVERYWHERE if len(PROMPTS[b]) == 7]
    assert MASK[rows].all()
    part = roll_rows(policy, rows, eos_token_id=5)
    assert torch.equal(part.response_ids, expected.response_ids[rows])


PARTS = {"first": [0, 1, 2, 3], "rest": [4, 5, 6, 7, 8, 9], "any": [8, 1, 6]}


@pytest.mark.parametrize("rows", PARTS.values(), ids=PARTS.keys())
def test_the_batch_may_be_split(policy, rows):
    whole = roll(policy, eos_token_id=5)
    part = roll_rows(policy, rows, eos_token_id=5)
    assert torch.equal(part.response_ids, whole.response_ids[rows])
    assert torch.equal(part.response_mask, whole.response_mask[rows])
    same(part.logprobs, whole.logprobs[rows])


def test_a_part_without_its_places_samples_otherwise(policy):
    whole = roll(policy, eos_token_id=5)
    part = roll(policy, IDS[4:], MASK[4:], eos_token_id=5)
    assert not torch.equal(part.response_ids, whole.response_ids[4:])


# ---------------------------------------------------------------------------------------- the noise


def test_noise_is_one_uniform_number_for_every_index_and_position():
    u = uniforms(1, 2, range(6), 5)
    assert u.shape == (6, 5)
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    assert len(set(u.flatten().tolist())) == 30  # each has its own


def test_noise_is_keyed_by_index():
    u = uniforms(1, 2, range(6), 5)
    assert torch.equal(u, uniforms(1, 2, range(6), 5))
    assert torch.equal(u[[4, 1]], uniforms(1, 2, [4, 1], 5))
    assert torch.equal(u[3:], uniforms(1, 2, range(3, 6), 5))


@pytest.mark.parametrize("seed, step", [(0, 2), (1, 3), (2, 1)])
def test_noise_is_keyed_by_seed_and_step(seed, step):
    u = uniforms(1, 2, range(6), 5)
    other = uniforms(seed, step, range(6), 5)
    assert not set(u.flatten().tolist()) & set(other.flatten().tolist())


def test_noise_does_not_depend_on_the_longest_response():
    longer = uniforms(1, 2, range(6), 9)
    assert torch.equal(longer[:, :5], uniforms(1, 2, range(6), 5))


OTHER_KEYS = [{"seed": SEED + 1}, {"step": STEP + 1}, {"index": range(1, B + 1)}]


@pytest.mark.parametrize("key", OTHER_KEYS, ids=str)
def test_other_keys_other_samples(key):
    policy = tiny_policy("neox")
    base = roll(policy).response_ids
    assert torch.equal(base, roll(policy).response_ids)
    assert not torch.equal(base, roll(policy, **key).response_ids)


# ----------------------------------------------------------------------------------- where it ends


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_mask_ends_with_the_first_eos(policy, pad_is_eos):
    free = roll(policy)
    eos = frequent_token(policy)
    pad = eos if pad_is_eos else 0
    rollout = roll(policy, eos_token_id=eos, pad_token_id=pad)
    assert 0 < rollout.finished.sum()
    for b in EVERYWHERE:
        sampled = free.response_ids[b].tolist()
        length = R
        if eos in sampled:
            length = sampled.index(eos) + 1
        assert rollout.response_mask[b].tolist() == [j < length for j in range(R)]
        assert rollout.response_ids[b].tolist() == sampled[:length] + [pad] * (R - length)
        assert rollout.finished[b] == (eos in sampled)
    same(rollout.logprobs, free.logprobs * rollout.response_mask)


def test_without_eos_every_response_is_full(policy):
    sampled_token = int(roll(policy).response_ids[0, 0])
    rollout = roll(policy, eos_token_id=None, pad_token_id=sampled_token)
    assert rollout.response_mask.shape == (B, R)
    assert rollout.response_mask.all()
    assert not rollout.finished.any()


def test_one_new_token(policy):
    eos = int(roll(policy).response_ids[3, 0])
    one = roll(policy, new=1, eos_token_id=eos)
    assert as_lists(one) == roll_by_hand(policy, new=1, eos=eos)
    assert one.response_mask.shape == (B, 1)
    assert one.response_mask.all()
    is_eos = one.response_ids[:, 0] == eos
    assert one.finished.tolist() == is_eos.tolist()


def test_packed_puts_the_padding_on_the_right(policy):
    eos = frequent_token(policy)
    rollout = roll(policy, eos_token_id=eos, pad_token_id=eos)
    batch = rollout.packed()
    responses = as_lists(rollout)
    assert batch.prompt_lengths.tolist() == [len(prompt) for prompt in PROMPTS]
    assert batch.response_lengths.tolist() == [len(response) for response in responses]
    for row, prompt, response in zip(batch.ids.tolist(), PROMPTS, responses):
        assert row[: len(prompt) + len(response)] == prompt + response

    packed_lists = pack(PROMPTS, responses, eos)
    all_rows = batch.rows(torch.arange(B))
    assert torch.equal(all_rows.lengths, packed_lists.lengths)
    assert torch.equal(rollout.prompt_ids, IDS)


def test_left_pad():
    ids, mask = left_pad([[7, 8], [9], [1, 2, 3]], 5)
    assert ids.tolist() == [[5, 7, 8], [5, 5, 9], [1, 2, 3]]
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_the_temperature_is_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        roll(tiny_policy("neox"), temperature=temperature)


@pytest.mark.parametrize("cut", [{"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}], ids=str)
def test_a_cut_leaves_something(cut):
    with pytest.raises(ValueError, match="top_p"):
        roll(tiny_policy("neox"), **cut)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_is_off_and_the_mode_comes_back(architecture):
    policy = tiny_policy(architecture)
    base = roll(policy, new=4)
    assert not policy.training
    assert not policy.lm.training

    policy.train()
    again = roll(policy, new=4)
    assert policy.training
    assert policy.lm.training
    assert policy.lm.base_model.training
    assert torch.equal(base.response_ids, again.response_ids)
    assert torch.equal(base.logprobs, again.logprobs)

    # Dropout does matter here.
    batch = base.packed()
    dropped = policy(batch, response_mask_of(batch))["logprobs"]
    assert (dropped - base.logprobs).abs().max() > 1e-2


# ----------------------------------------------------------- shapes that never change, as on a GPU


@pytest.fixture
def strict():
    """Falling back to the growing cache is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


SAMPLING = [
    {},
    pytest.param({"temperature": 0.7, "top_k": 9}, marks=pytest.mark.slow),
    {"top_p": 0.8},
]
# One token; one cache block; a look at whether all have finished.
LENGTHS = [1, R, 40]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
@pytest.mark.parametrize("new", LENGTHS)
@pytest.mark.parametrize("ends", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_static_cache_samples_the_same(policy, strict, new, options, ends):
    eos = None
    if ends:
        eos = frequent_token(policy, new=new, **options)
    options = {"new": new, "eos_token_id": eos, **options}
    static = roll(policy, static=True, **options)
    same_rollouts(static, roll(policy, **options))


def test_a_static_cache_without_padding(policy, strict):
    ids, mask = left_pad(random_rows((6,) * 5, seed=3), 0)
    static = roll(policy, ids, mask, eos_token_id=5, static=True)
    same_rollouts(static, roll(policy, ids, mask, eos_token_id=5))


def test_a_static_loop_keeps_its_shape_and_ends_early(monkeypatch, strict):
    def always_token_7(probs, *_):
        return torch.eye(V)[7].expand_as(probs)

    policy = tiny_policy("neox")
    monkeypatch.setattr("nanorlhf.rollout.truncate", always_token_7)
    # Every row ends at once, which the static loop sees when it next looks.
    sizes, _ = count_forwards(policy, new=60, static=True, eos_token_id=7)
    assert sizes == [B] * nanorlhf.hf.decode.CHECK_EVERY
    sizes, _ = count_forwards(policy, new=60, eos_token_id=7)
    assert sizes == [B]
    # Nothing ends.
    sizes, _ = count_forwards(policy, new=60, static=True)
    assert sizes == [B] * 60


def test_the_watch_for_waiting_sees_it():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        bool(torch.ones(B, dtype=torch.bool).all())


@pytest.fixture
def replayed_steps(monkeypatch):
    """The step that a GPU would capture, taken as it is there: a list that grows by each of them.

    There is no Python state in it, and no number that Python reads.
    """
    steps = []

    def capture(step, *_):
        def replay():
            steps.append(1)
            with NoWaiting():
                step()

        return replay, 1

    monkeypatch.setattr("nanorlhf.hf.decode.capture", capture)
    return steps


CUT = {"top_k": 20, "top_p": 0.9, "eos_token_id": 5}


def test_a_static_step_never_waits_and_can_be_replayed(policy, replayed_steps, strict):
    rollout = roll(policy, static=True, **CUT)
    assert len(replayed_steps) == R - 1
    same_rollouts(rollout, roll(policy, **CUT))


def test_a_static_step_never_waits_in_bfloat16(policy, replayed_steps, strict):
    with torch.autocast("cpu", torch.bfloat16):
        roll(policy, static=True, **CUT)
    assert len(replayed_steps) == R - 1


@every_attention
def test_other_attentions_with_a_static_cache(config):
    """Sliding windows work; ALiBi, linear attention and indexers do not, and fall back."""
    policy = other_policy(config)
    eos = frequent_token(policy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        static = roll(policy, eos_token_id=eos, static=True)
    expected = []
    if config.model_type in ("bloom", "falcon", "qwen3_next", "deepseek_v32"):
        expected = [RuntimeWarning]
    assert [warning.category for warning in caught] == expected

    dynamic = roll(policy, eos_token_id=eos)
    assert torch.equal(static.response_ids, dynamic.response_ids)
    assert torch.equal(static.finished, dynamic.finished)
    same(static.logprobs, dynamic.logprobs)


def test_a_static_cache_keeps_no_state_in_python():
    """A graph would not replay it. transformers' own sliding layers count their tokens so."""
    lm = other_policy(MistralConfig(**GROUPED, sliding_window=4)).lm
    kinds = {type(layer) for layer in static_cache(lm, 32).layers}
    assert kinds == {StaticLayer}


@pytest.mark.parametrize(
    "name, words",
    [
        ("bloom", "with a growing cache, .*BloomForCausalLM: The expanded size"),
        ("opt", "without compiled blocks, .*OPTForCausalLM: no such graph"),
    ],
)
def test_blocks_that_cannot_be_compiled_are_one_warning(monkeypatch, name, words):
    """It names the loop that writes the responses in the end."""
    [config] = [config for config in OTHERS if config.model_type == name]
    policy = other_policy(config)
    expected = roll(policy)

    def fail(*_):
        raise RuntimeError("no such graph")

    policy.lm.compiled = True
    monkeypatch.setattr(nanorlhf.rollout, "decode_compiled", fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rollout = roll(policy, static=True)
    [warning] = caught
    assert re.search(words, str(warning.message))
    assert torch.equal(rollout.response_ids, expected.response_ids)


def test_a_step_that_cannot_be_captured_falls_back(monkeypatch):
    """After the warm-up has written tokens, and finished rows."""
    policy = tiny_policy("neox")
    eos = int(roll(policy).response_ids[3, 1])

    def fail(step, *_):
        step()
        step()
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA ...")

    monkeypatch.setattr("nanorlhf.hf.decode.capture", fail)
    words = "GPTNeoXForCausalLM: operation not permitted when stream is capturing"
    with pytest.warns(RuntimeWarning, match=words):
        static = roll(policy, eos_token_id=eos, static=True)
    dynamic = roll(policy, eos_token_id=eos)
    same_rollouts(static, dynamic, tol=0)
    assert 0 < static.finished.sum() < B


def test_a_step_that_waits_is_found_before_it_is_captured(monkeypatch):
    """The mode in which waiting is an error ends with the warm-up.

    What the warm-up has begun is waited for.
    """
    log = []
    stream = SimpleNamespace(wait_stream=lambda other: log.append("joined"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", log.append)

    def step():
        log.append("step")
        raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        nanorlhf.hf.decode.capture(step, R, torch.device("cuda"))
    assert log == ["joined", "error", "step", 0, "joined"]


# ---------------------------------------------------------------------- many answers to one prompt

ASKED = PROMPTS[:3]  # of different lengths


def answers_of(rollout, rows):
    """What a rollout says of some of its rows: {name: [n, R] or [n]}."""
    names = ("response_ids", "response_mask", "finished", "logprobs", "entropies", "values")
    columns = {name: getattr(rollout, name) for name in names}
    return {name: column[rows] for name, column in columns.items() if column is not None}


def same_answers(found, expected):
    assert found.keys() == expected.keys()
    for name, column in expected.items():
        if column.is_floating_point():
            same(found[name], column, 1e-5)
        else:
            assert torch.equal(found[name], column), name


def roll_groups(policy, G, **options):
    """G answers to each of three prompts, twice: the rows of a prompt side by side, as best-of-n
    and PPO have them, and in turn, where no row equals its neighbour.

    -> what both rollouts say of the same answers, {name: [3 G, R] or [3 G]}, and the sizes of their
    forwards.
    """
    n = len(ASKED) * G
    prompt_of_row = torch.arange(n) // G
    in_turn = torch.arange(n).view(len(ASKED), G).T.flatten()  # 0, G, 2 G, 1, ...
    ids, mask = left_pad([ASKED[p] for p in prompt_of_row], 0)
    sizes, grouped = count_forwards(policy, ids=ids, mask=mask, **options)
    sizes_in_turn, apart = count_forwards(
        policy, ids=ids[in_turn], mask=mask[in_turn], index=in_turn.tolist(), **options
    )
    back = in_turn.argsort()
    everything = slice(None)
    return answers_of(grouped, everything), answers_of(apart, back), sizes, sizes_in_turn


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("G", [1, 3, pytest.param(8, marks=pytest.mark.slow)])
def test_a_prompt_with_many_answers_runs_once(policy, strict, G, static):
    """The answers are those of prompts that run once for every answer."""
    eos = frequent_token(policy)
    grouped, apart, sizes, sizes_in_turn = roll_groups(policy, G, eos_token_id=eos, static=static)
    assert sizes[0] == 3
    assert sizes_in_turn[0] == 3 * G
    # Each answer is then written in a row of its own.
    assert sizes[1:] == sizes_in_turn[1:]
    same_answers(grouped, apart)
    # The answers to one prompt differ; a few that end early may agree.
    first_prompt = grouped["response_ids"][:G].tolist()
    assert len({tuple(ids) for ids in first_prompt}) > G / 2


@pytest.mark.filterwarnings("ignore:rollouts decode with a growing cache")
@pytest.mark.parametrize("static", [False, True])
@every_attention
def test_a_prompt_with_many_answers_runs_once_with_other_attentions(config, static):
    policy = other_policy(config)
    eos = frequent_token(policy)
    grouped, apart, sizes, _ = roll_groups(policy, 3, eos_token_id=eos, static=static)
    assert sizes[0] == 3
    same_answers(grouped, apart)


@pytest.mark.parametrize("static", [False, True])
def test_a_prompt_with_many_answers_runs_once_in_bfloat16(policy, strict, static):
    with torch.autocast("cpu", torch.bfloat16):
        grouped, apart, sizes, _ = roll_groups(policy, 3, static=static)
    assert sizes[0] == 3
    same_answers(grouped, apart)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_prompt_with_many_answers_runs_once_with_frozen_weights_and_adapters(strict, autocast):
    policy = tiny_policy("llama")
    add_lora(policy.lm, rank=2, dropout=0.5)
    for adapter in adapters(policy.lm).values():
        torch.nn.init.normal_(adapter.lora_B)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        grouped, apart, sizes, _ = roll_groups(policy, 3)
    assert sizes[0] == 3
    same_answers(grouped, apart)


@pytest.mark.parametrize("cut", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_the_answers_to_a_prompt_may_be_split_over_batches(policy, cut):
    """Groups of 5, 1 and 2, of which two batches hold a part each."""
    ids, mask = left_pad([ASKED[p] for p in (0, 0, 0, 0, 0, 1, 2, 2)], 0)
    options = {"eos_token_id": frequent_token(policy)}
    whole = roll(policy, ids, mask, **options)
    for rows in (range(cut), range(cut, 8)):
        part = roll(policy, ids[rows], mask[rows], index=rows, **options)
        same_answers(answers_of(part, slice(None)), answers_of(whole, rows))


@pytest.mark.parametrize("static", [False, True])
def test_prompts_that_differ_in_their_padding_alone_are_two(policy, strict, static):
    """A tokenizer may pad with a token that prompts have as well."""
    ids = torch.tensor([[5, 7], [5, 7], [5, 7]])
    mask = torch.tensor([[True, True], [False, True], [False, True]])
    sizes, rollout = count_forwards(policy, ids=ids, mask=mask, static=static)
    assert sizes[0] == 2
    for row, prompt in enumerate([[5, 7], [7], [7]]):
        alone = roll(policy, *left_pad([prompt], 0), index=[row])
        same_answers(answers_of(rollout, [row]), answers_of(alone, slice(None)))


# ---------------------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("static", [False, True])
def test_bfloat16_leaves_the_weights_alone(policy, strict, static):
    """Half of the weights are frozen; rollouts have them require grad for a while.

    Tokens agree with those of float32 until rounding decides otherwise.
    """
    before = {name: p.clone() for name, p in policy.named_parameters()}
    for i, parameter in enumerate(policy.parameters()):
        parameter.requires_grad_(i % 2 == 1)
    full = roll(policy)
    with torch.autocast("cpu", torch.bfloat16):
        half = roll(policy, static=static)
    for i, parameter in enumerate(policy.parameters()):
        assert parameter.requires_grad == (i % 2 == 1)
    policy.requires_grad_(True)
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])

    differs = full.response_ids != half.response_ids
    agreed = differs.cumsum(1) == 0
    assert agreed.float().mean() > 0.3
    differences = (full.logprobs - half.logprobs)[agreed].abs()
    assert differences.mean() < 0.1


class CountCasts(TorchDispatchMode):
    """Count how often each of some tensors is cast to bfloat16.

    `width` is the largest third dimension of all tensors of four that are cast: the keys' length.
    """

    def __init__(self, tensors):
        super().__init__()
        self.places = {tensor.data_ptr() for tensor in tensors}
        self.counts = Counter()
        self.width = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "_to_copy" in str(function) and kwargs.get("dtype") == torch.bfloat16:
            tensor = args[0]
            if tensor.data_ptr() in self.places:
                self.counts[tensor.data_ptr()] += 1
            if tensor.dim() == 4:
                self.width = max(self.width, tensor.shape[2])
        return function(*args, **kwargs)


def test_bfloat16_casts_each_weight_and_key_once():
    """Weights: not once a token, frozen or not. Keys: NeoX's rotary leaves them in float32."""
    policy = tiny_policy("neox")
    policy.lm.requires_grad_(False)
    matrices = [p for p in policy.lm.parameters() if p.dim() == 2]
    casts = CountCasts(matrices)
    with torch.autocast("cpu", torch.bfloat16), casts:
        roll(policy)
    # 4 matrices of each of two blocks, and the head.
    assert list(casts.counts.values()) == [1] * 9
    # The prompt's keys; never the whole cache.
    assert casts.width == IDS.shape[1]


# ---------------------------------------------------------------------------------------- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def captures(monkeypatch):
    """What each call of capture() has returned: a list that grows."""
    returned = []
    capture = nanorlhf.hf.decode.capture

    def watched(*args):
        returned.append(capture(*args))
        return returned[-1]

    monkeypatch.setattr("nanorlhf.hf.decode.capture", watched)
    return returned


@pytest.fixture
def policy_on_gpu(policy):
    policy.cuda()
    yield policy
    policy.cpu()


@needs_gpu
@pytest.mark.parametrize("new", [2, R, 40])
def test_a_captured_step_samples_the_same(policy_on_gpu, strict, captures, new):
    policy = policy_on_gpu
    ids = IDS.cuda()
    mask = MASK.cuda()
    for eos in (None, 5):
        options = {"new": new, "eos_token_id": eos, "top_k": 30}
        captured = roll(policy, ids, mask, static=None, **options)
        plain = roll(policy, ids, mask, static=False, **options)
        differs = captured.response_ids != plain.response_ids
        assert (~differs).float().mean() > 0.98  # ties of floats apart
        agreed = differs.cumsum(1) == 0
        for name in ("logprobs", "entropies", "values"):
            same(getattr(captured, name)[agreed], getattr(plain, name)[agreed], 1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        half = roll(policy, ids, mask, new=new)
    assert half.logprobs.isfinite().all()

    # In all three rollouts the step was captured, after the warm-up had written tokens 1 to 3; one
    # that ends before is not worth it, and goes on at token 1.
    next_token = 4 if new > 4 else 1
    assert [token for _, token in captures] == [next_token] * 3


@needs_gpu
def test_a_captured_step_that_waits_falls_back(monkeypatch):
    policy = tiny_policy("neox").cuda()
    ids = IDS.cuda()
    mask = MASK.cuda()
    expected = roll(policy, ids, mask)

    def waits(probs, *_):
        return probs * (probs.sum().item() > 0)

    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="synchroniz"):
        patch.setattr("nanorlhf.rollout.truncate", waits)
        fallen_back = roll(policy, ids, mask)
    same(fallen_back.logprobs, expected.logprobs, 1e-3)

    # The next rollout is captured again.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured = roll(policy, ids, mask)
    same(captured.logprobs, expected.logprobs, 1e-3)


# -------------------------------------------------------------------------- sample() and truncate()


@pytest.mark.parametrize("scale", [1.0, 7.0])  # any positive scale
def test_sampled_frequencies_match_the_probabilities(scale):
    n = 20_000
    p = torch.tensor([0.0, 0.3, 0.05, 0.0, 0.4, 0.2, 0.05, 0.0])
    u = uniforms(0, 0, range(n), 1)[:, 0]
    tokens = sample((scale * p).expand(n, -1), u)
    counts = torch.bincount(tokens, minlength=8)
    assert (counts[p == 0] == 0).all()

    # Chi-square with 4 degrees of freedom: larger by chance once in 1000.
    seen = counts[p > 0].double()
    awaited = n * p[p > 0].double()
    chi_square = ((seen - awaited) ** 2 / awaited).sum()
    assert chi_square < 18.5


@pytest.fixture(params=["at once", "by blocks"])
def searched(request, monkeypatch):
    """How sample() searches a vocabulary of any size."""
    wide = 10**9
    if request.param == "by blocks":
        wide = 0
    monkeypatch.setattr("nanorlhf.rollout.WIDE", wide)


BELOW_ONE = math.nextafter(1.0, 0.0)  # the largest u there is


def test_a_certain_token_is_sampled(searched):
    u = torch.full((4,), 0.999).double()
    assert sample(torch.eye(4), u).tolist() == [0, 1, 2, 3]


def random_masses(n, size, sharpness, seed):
    """n distributions over `size` tokens: nearly flat, or with most of the mass on a few."""
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(n, size, generator=generator)).softmax(-1)


@pytest.mark.parametrize("size", [1, 100, 256, 257, WIDE, WIDE + 1, 50304])
@pytest.mark.parametrize("cut", [{}, {"top_k": 50}, {"top_p": 0.9}], ids=str)
def test_the_naive_sampler_draws_the_same(monkeypatch, size, cut):
    """At once, by blocks, and in the way that sample() takes by itself."""
    for seed, sharpness in enumerate([0.01, 3, 12]):
        probs = truncate(random_masses(3, size, sharpness, seed), **cut)
        u = uniforms(seed, 0, range(3), 1)[:, 0]
        expected = [sample_by_hand(p.tolist(), x) for p, x in zip(probs, u.tolist())]
        for wide in (10**9, 0, WIDE):
            monkeypatch.setattr("nanorlhf.rollout.WIDE", wide)
            assert sample(probs, u).tolist() == expected


@pytest.mark.parametrize("size", [100, 700])
def test_a_draw_on_an_edge_is_the_next_token(searched, size):
    """Masses are whole numbers, so nothing is rounded: of 1024 equal parts of the mass, each
    belongs to one token, from its lower edge up to just below the upper one.
    """
    parts = torch.arange(1024).double()
    generator = torch.Generator().manual_seed(3)
    owner = 4 * torch.randint(size // 4, (1024,), generator=generator).sort()[0]
    masses = torch.bincount(owner, minlength=size)
    assert masses.min() == 0
    assert masses.max() > 1

    probs = masses.float().expand(1024, -1)
    lower = parts / 1024
    upper = (parts + 1) / 1024
    assert torch.equal(sample(probs, lower), owner)
    assert torch.equal(sample(probs, torch.nextafter(upper, lower)), owner)


def test_edges_are_as_exact_as_float64(searched):
    """Every token has its own mass, to a trillionth of the whole: sums in float32 would not do."""
    probs = random_masses(1, 5000, 1, seed=2)[0]
    upper = probs.double().cumsum(0)
    total = upper[-1].item()
    lower = upper - probs.double()
    tokens = torch.arange(40, 5000, 70)
    assert probs[tokens].min() > 1e-6
    for edges in (lower + 1e-12, upper - 1e-12):
        u = edges[tokens] / total
        assert torch.equal(sample(probs.expand(len(tokens), -1), u), tokens)


# The smallest u gives the first token with mass, the largest the last one.
@pytest.mark.parametrize("u, end", [(0.0, 0), (BELOW_ONE, -1)])
@pytest.mark.parametrize("size", [9, 300])
def test_never_a_token_without_mass(searched, size, u, end):
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(500, size, generator=generator)
    probs = probs * (torch.rand(500, size, generator=generator) < 0.4)
    probs = probs[probs.sum(1) > 0]
    assert (probs[:, 0] == 0).any()
    assert (probs[:, -1] == 0).any()

    expected = []
    for p in probs:
        tokens_with_mass = p.nonzero()[:, 0].tolist()
        expected.append(tokens_with_mass[end])
    noise = torch.full((len(probs),), u, dtype=torch.float64)
    assert sample(probs, noise).tolist() == expected


def test_never_a_token_without_mass_where_sums_are_rounded(searched):
    """Sums depend on their order. Here u is near an edge of blocks, which end with zeros."""
    probs = random_masses(2000, 3 * BLOCK, 8, seed=0)
    in_block = torch.arange(3 * BLOCK) % BLOCK
    probs[:, in_block > 100] = 0
    edges = probs.double().cumsum(-1)[:, BLOCK - 1 :: BLOCK]  # [2000, 3]
    edges = edges / edges[:, -1:]
    for edge in edges.unbind(1):
        for distance in (-2, -1, 0, 1, 2):
            u = (edge + distance * 2**-53).clamp(max=BELOW_ONE)
            tokens = sample(probs, u)
            assert (probs.gather(1, tokens[:, None]) > 0).all()


def test_a_logit_of_minus_infinity_is_never_sampled(searched):
    """Four of 700 tokens are left, each with a quarter of the mass."""
    tokens = torch.tensor([5, 127, 128, 640])
    logits = torch.full((5, 700), -torch.inf)
    logits[:, tokens] = 2.0
    u = torch.tensor([0.0, 0.25, 0.7, 0.75, BELOW_ONE], dtype=torch.float64)
    assert sample(logits.softmax(-1), u).tolist() == [5, 127, 128, 640, 640]


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_row_without_probabilities_gives_some_token(searched, value):
    """generate() can then report what is wrong. Other rows are sampled as ever."""
    probs = random_masses(3, 300, 3, seed=1)
    u = uniforms(0, 0, range(3), 1)[:, 0]
    expected = sample(probs, u).tolist()
    probs[1] = value
    tokens = sample(probs, u).tolist()
    assert 0 <= tokens[1] < 300
    assert tokens[::2] == expected[::2]


@pytest.mark.parametrize("cut", [{}, CUT], ids=str)
def test_rollouts_that_are_sampled_by_blocks(monkeypatch, replayed_steps, strict, cut):
    """Both loops write what they write when they sample at once, and so do some of the rows."""
    policy = tiny_policy("neox")
    at_once = roll(policy, **cut)
    # 60 tokens: eight blocks, the last of which is padded.
    monkeypatch.setattr("nanorlhf.rollout.WIDE", 0)
    monkeypatch.setattr("nanorlhf.rollout.BLOCK", 8)
    same_rollouts(roll(policy, **cut), at_once)
    same_rollouts(roll(policy, static=True, **cut), at_once)
    assert len(replayed_steps) == R - 1
    rows = [7, 2]
    some = roll_rows(policy, rows, **cut)
    assert torch.equal(some.response_ids, at_once.response_ids[rows])


class NoteDivisions(TorchDispatchMode):
    """Note the shape of whatever is divided."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ == "div":
            self.shapes.append(list(args[0].shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature, divided", [(1.0, []), (0.7, [[B, V]])])
def test_logits_are_divided_by_a_temperature_that_is_not_one(temperature, divided):
    policy = tiny_policy("neox")
    sampler = Sampler(policy, temperature, 0, 1.0, None, None)
    with torch.no_grad(), NoteDivisions() as divisions:
        sampler(torch.randn(B, D), torch.zeros(B).double())
    assert divisions.shapes == divided


@pytest.mark.parametrize("top_k", [0, 1, 3, 8, 20])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 1.0])
def test_truncate_by_hand(top_k, top_p):
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(40, 8, generator=generator, dtype=torch.float64)
    probs = logits.softmax(-1)
    expected = [truncate_by_hand(p, top_k, top_p) for p in probs.tolist()]
    expected = torch.tensor(expected, dtype=torch.float64)
    assert torch.equal(truncate(probs, top_k, top_p), expected)
    assert (expected > 0).any(1).all()

"""nanorlhf.hf.blocks: finding and freezing blocks, and frozen blocks that run once against the
whole model run every time.

    B sequences, R response tokens, T tokens of a packed row, D hidden, L blocks
"""

import copy
import shutil

import pytest
import torch
from tiny_models import ARCHITECTURES, BATCH, MASK, B, R, tiny_lm, tiny_policy, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
)

from nanorlhf.errors import InputError
from nanorlhf.hf.blocks import FrozenTrunk, blocks, freeze, sampling, speed_up, trainable
from nanorlhf.hf.folders import context_length
from nanorlhf.models import Policy, load_reward_model, reference_of, save_policy
from nanorlhf.rollout import generate, left_pad
from nanorlhf.runtime.distributed import fast_dtype
from nanorlhf.runtime.flags import RunConfig

CPU = torch.device("cpu")
# Where the parameters of the embeddings and of block i are.
EMBEDDINGS = {
    "neox": ("gpt_neox.embed_in.",),
    "llama": ("model.embed_tokens.",),
    "gpt2": ("transformer.wte.", "transformer.wpe."),
}
BLOCK = {"neox": "gpt_neox.layers.{}.", "llama": "model.layers.{}.", "gpt2": "transformer.h.{}."}

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

# ------------------------------------------------------------------------- finding and freezing


@pytest.mark.parametrize(
    "architecture, place",
    [("neox", "gpt_neox.layers"), ("llama", "model.layers"), ("gpt2", "transformer.h")],
)
def test_blocks_are_found_in_every_architecture(architecture, place):
    lm = tiny_lm(architecture)
    assert blocks(lm) is lm.get_submodule(place)
    assert context_length(lm.config) == 64
    # There must be as many as the config says.
    lm.config.num_hidden_layers = 7
    with pytest.raises(InputError, match="7 blocks"):
        blocks(lm)


def frozen_prefixes(architecture, n_blocks):
    """How the names begin of what is frozen with the bottom n blocks: the embeddings as well."""
    prefixes = list(EMBEDDINGS[architecture])
    for i in range(n_blocks):
        prefixes.append(BLOCK[architecture].format(i))
    return tuple(prefixes)


def check_frozen(model, prefixes):
    """The parameters whose names begin so are frozen, and no others."""
    for name, p in model.named_parameters():
        is_frozen = name.startswith(prefixes)
        assert p.requires_grad != is_frozen, name


def count_numbers(parameters):
    return sum(p.numel() for p in parameters)


@each_architecture
def test_a_fraction_of_0_freezes_nothing(architecture):
    lm = tiny_lm(architecture)
    note = freeze(lm, 0.0)
    check_frozen(lm, ())
    assert "tied" not in note
    assert lm.get_output_embeddings().weight.requires_grad


@each_architecture
@pytest.mark.parametrize("fraction, n", [(0.4, 0), (0.5, 1), (0.99, 1), (1.0, 2)])
def test_a_fraction_freezes_the_bottom_blocks_and_the_embeddings(architecture, fraction, n):
    lm = tiny_lm(architecture)
    note = freeze(lm, fraction)
    prefixes = frozen_prefixes(architecture, n)
    check_frozen(lm, prefixes)
    assert f"bottom {n} of 2 blocks" in note
    # GPT-2's head is tied to its embeddings.
    is_tied = architecture == "gpt2"
    assert ("tied" in note) == is_tied
    assert lm.get_output_embeddings().weight.requires_grad != is_tied


@each_architecture
@pytest.mark.parametrize("fraction", [0.0, 0.4, 0.5, 0.99, 1.0])
def test_what_is_trainable_is_what_is_not_frozen(architecture, fraction):
    lm = tiny_lm(architecture)
    freeze(lm, fraction)
    named = dict(lm.named_parameters())
    expected = [name for name, p in named.items() if p.requires_grad]
    assert [name for name, _ in trainable(lm)] == expected
    if fraction > 0:
        n_trained = count_numbers(p for _, p in trainable(lm))
        assert n_trained < count_numbers(named.values())


@each_architecture
def test_the_head_of_a_reward_model_is_never_frozen(architecture, tmp_path):
    save_policy(tiny_policy(architecture), word_tokenizer(), str(tmp_path))
    model = load_reward_model(str(tmp_path), seed=0).model
    assert "tied" not in freeze(model, 0.5)
    check_frozen(model, frozen_prefixes(architecture, 1))
    assert model.score.weight.requires_grad


# ------------------------------------------------------------------- frozen blocks that run once

D = 32
L = 5
SPECIAL = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
SIZE = SPECIAL | {
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT_NEO = SPECIAL | {
    "hidden_size": D,
    "num_layers": L,
    "num_heads": 4,
    "max_position_embeddings": 64,
    # Local and global attention in turn.
    "attention_types": [[["global", "local"], 2], [["global"], 1]],
    "window_size": 3,
}
CONFIGS = {
    "neox": GPTNeoXConfig(**SIZE),
    "llama": LlamaConfig(**SIZE, num_key_value_heads=2),
    "gpt2": GPT2Config(**SPECIAL, n_embd=D, n_layer=L, n_head=4, n_positions=64),
    # Its blocks return tuples.
    "gpt_neo": GPTNeoConfig(**GPT_NEO),
    # Its window is shorter than the rows, and its embeddings are scaled.
    "gemma2": Gemma2Config(**SIZE, num_key_value_heads=2, head_dim=8, sliding_window=3),
}

each_config = pytest.mark.parametrize("architecture", CONFIGS)


def make_deep_policy(architecture, fraction):
    """A policy of five blocks with random weights, of which a fraction is frozen."""
    torch.manual_seed(3)
    config = copy.deepcopy(CONFIGS[architecture])
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for p in lm.parameters():
        if p.dim() > 1:
            p.data.mul_(5)
    policy = Policy(lm).eval()
    policy.value_head.weight.data.normal_()
    freeze(policy.lm, fraction)
    return policy


def with_trunk(policy):
    """BATCH, with the output of the frozen blocks stored in it."""
    batch = copy.copy(BATCH)
    batch.frozen_output = policy.frozen.run(policy.lm, batch.ids)
    return batch


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def forward_and_backward(policy, batch, reference):
    """The policy's outputs, and the gradients {name: gradient} of a loss of all of them."""
    policy.zero_grad()
    out = policy(batch, MASK, 0.7, entropy=True, kl_to=reference)
    loss = out["logprobs"].sum() + out["values"].square().sum() + out["entropies"].sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainable(policy)}
    return out, gradients


@each_config
@pytest.mark.parametrize("fraction", [0.2, 0.8, 1.0])
def test_blocks_above_a_stored_trunk_are_the_whole_model(architecture, fraction):
    policy = make_deep_policy(architecture, fraction)
    reference = reference_of(policy)
    assert policy.frozen.n == round(fraction * L)
    stored = with_trunk(policy)

    expected, expected_gradients = forward_and_backward(policy, BATCH, reference)
    found, gradients = forward_and_backward(policy, stored, reference)
    for name in ("logprobs", "values", "entropies"):
        close(found[name], expected[name])
    # The reference is the policy as it was at the start.
    assert found["full_kl"].abs().max() < 1e-5
    assert gradients.keys() == expected_gradients.keys()
    assert len(gradients) > 2
    for name, gradient in expected_gradients.items():
        atol = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=atol)

    close(reference(stored, MASK, 0.7)["logprobs"], reference(BATCH, MASK, 0.7)["logprobs"])
    close(policy.final_values(stored), policy.final_values(BATCH))
    assert not policy.training


def record_runs(policy):
    """A list of the blocks that run from now on, one after another."""
    ran = []
    for i, block in enumerate(blocks(policy.lm)):
        block.register_forward_hook(lambda module, args, output, i=i: ran.append(i))
    return ran


@each_config
def test_frozen_blocks_do_not_run_again(architecture):
    policy = make_deep_policy(architecture, 0.8)
    reference = reference_of(policy)
    ran = record_runs(policy)
    stored = with_trunk(policy)
    assert ran == [0, 1, 2, 3]
    ran.clear()
    policy(stored, MASK)
    assert ran == [4]
    # Where nothing is stored all of them run.
    ran.clear()
    policy(BATCH, MASK)
    assert ran == [0, 1, 2, 3, 4]
    assert len(blocks(reference.lm)) == L


def test_rows_of_a_batch_take_their_stored_trunk_along():
    policy = make_deep_policy("neox", 0.8)
    reference_of(policy)
    whole = policy(BATCH, MASK)["logprobs"]
    index = torch.tensor([3, 0])
    part = with_trunk(policy).rows(index)
    # The part is trimmed to its own longest row.
    longest = int(part.lengths.max())
    longest_response = int(part.response_lengths.max())
    assert part.frozen_output.shape == (2, longest, D)
    found = policy(part, MASK[index, :longest_response])["logprobs"]
    close(found, whole[index, : found.shape[1]])


def test_the_trunk_stays_in_place_after_an_error_in_it():
    policy = make_deep_policy("neox", 0.8)
    reference_of(policy)
    no_such_token = torch.tensor([[10**6]])
    with pytest.raises(IndexError):
        policy.frozen.run(policy.lm, no_such_token)
    assert len(blocks(policy.lm)) == L


def test_the_trunk_stays_in_place_after_an_error_above_it():
    policy = make_deep_policy("neox", 0.8)
    reference_of(policy)
    batch = with_trunk(policy)
    batch.frozen_output = batch.frozen_output[..., :-1]  # of another width
    with pytest.raises(RuntimeError):
        policy(batch, MASK)
    assert len(blocks(policy.lm)) == L


@each_config
def test_the_reference_shares_what_is_frozen(architecture):
    policy = make_deep_policy(architecture, 0.8)
    reference = reference_of(policy)
    own = dict(reference.lm.named_parameters())
    for name, p in policy.lm.named_parameters():
        is_shared = own[name].data_ptr() == p.data_ptr()
        assert is_shared != p.requires_grad, name
    assert reference.value_head is None
    for p in reference.parameters():
        assert not p.requires_grad


@each_config
@torch.no_grad()
def test_the_reference_stays_when_the_policy_is_trained(architecture):
    policy = make_deep_policy(architecture, 0.8)
    before = policy(BATCH, MASK)["logprobs"]
    reference = reference_of(policy)
    for _, p in trainable(policy):
        p.add_(torch.randn_like(p))
    assert torch.equal(reference(BATCH, MASK)["logprobs"], before)
    assert not torch.allclose(policy(BATCH, MASK)["logprobs"], before, atol=0.1)


def test_nothing_is_shared_where_nothing_is_frozen():
    policy = make_deep_policy("llama", 0)
    reference = reference_of(policy)
    assert policy.frozen.n == 0
    addresses = {p.data_ptr() for p in policy.parameters()}
    for p in reference.parameters():
        assert p.data_ptr() not in addresses


def test_a_trained_embedding_below_frozen_blocks_is_not_a_frozen_trunk():
    policy = make_deep_policy("gpt2", 0.8)
    policy.lm.transformer.wpe.requires_grad_(True)
    assert FrozenTrunk(policy.lm).n == 0


def test_a_trained_layer_between_the_embeddings_and_frozen_blocks_keeps_its_gradient():
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=60, hidden_size=D, n_layer=3, n_head=4)
    lm = AutoModelForCausalLM.from_config(config).eval()
    freeze(lm, 0.7)
    norm = lm.transformer.word_embeddings_layernorm
    assert norm.weight.requires_grad
    assert FrozenTrunk(lm).n == 0

    norm.requires_grad_(False)
    assert FrozenTrunk(lm).n == 2


def test_an_architecture_that_cannot_be_split_runs_whole():
    """Upper blocks that read more than the hidden states below them: here the last one adds what
    the first one saw."""
    policy = make_deep_policy("neox", 0.8)
    first, *_, last = blocks(policy.lm)
    seen = {}

    def forget(module, args):
        seen.clear()

    def see(module, args):
        seen["first"] = args[0]

    def add_what_was_seen(module, args, output):
        return output + seen.get("first", 0)

    policy.lm.base_model.register_forward_pre_hook(forget)
    first.register_forward_pre_hook(see)
    last.register_forward_hook(add_what_was_seen)
    assert FrozenTrunk(policy.lm).n == 0


def test_the_value_model_reads_the_tokens_and_not_the_stored_trunk():
    policy = make_deep_policy("neox", 0.8)
    policy.value_trunk = copy.deepcopy(policy.lm.base_model)
    reference_of(policy)
    expected = policy(BATCH, MASK)["values"]
    assert expected.shape == (B, R)
    assert torch.equal(policy(with_trunk(policy), MASK)["values"], expected)


# ---------------------------------------------------------------------------------------- faster


def outputs_and_gradients(policy, dtype):
    """Log-probs, and all gradients of a loss in a row, with the forward in this type."""
    policy.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        out = policy(BATCH, MASK, 0.7)
    loss = out["logprobs"].sum() + out["values"].sum()
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for _, p in trainable(policy)])
    return out["logprobs"].detach(), gradients


@each_architecture
def test_attention_is_fused_in_float32_and_plain_in_bfloat16(architecture):
    lm = tiny_policy(architecture).lm
    speed_up(lm, CPU, "float32")
    assert lm.config._attn_implementation == "sdpa"
    speed_up(lm, CPU, "bfloat16")
    assert lm.config._attn_implementation == "eager"
    # Where answers are sampled there is no backward pass: they have the fused one.
    with pytest.raises(KeyError), sampling(lm):
        assert lm.config._attn_implementation == "sdpa"
        raise KeyError
    assert lm.config._attn_implementation == "eager"


@pytest.mark.slow
def test_rollouts_do_not_run_what_was_compiled_for_the_update():
    policy = tiny_policy("neox")
    ids, mask = left_pad([[5, 6, 7], [8]], 0)
    answers = generate(policy, ids, mask, 4)
    speed_up(policy.lm, CPU, "float32", compile=True)

    def compiled(*args, **kwargs):
        raise AssertionError

    for block in blocks(policy.lm):
        block._compiled_call_impl = compiled
    with sampling(policy.lm):
        assert torch.equal(generate(policy, ids, mask, 4).logprobs, answers.logprobs)
    for block in blocks(policy.lm):
        assert block._compiled_call_impl is compiled


@each_architecture
def test_plain_attention_in_bfloat16_is_no_further_from_float32(architecture):
    policy = tiny_policy(architecture)
    exact = outputs_and_gradients(policy, "float32")
    fused = outputs_and_gradients(policy, "bfloat16")
    speed_up(policy.lm, CPU, "bfloat16")
    plain = outputs_and_gradients(policy, "bfloat16")
    for x, x_fused, x_plain in zip(exact, fused, plain, strict=True):
        error = (x_plain - x).norm()
        assert error > 0
        assert error < 1.5 * (x_fused - x).norm() + 1e-6


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_compute_the_same():
    policy = tiny_policy("neox")
    expected_logprobs, expected_gradients = outputs_and_gradients(policy, "float32")
    ids, mask = left_pad([[5, 6, 7], [8]], 0)
    answers = generate(policy, ids, mask, 4)
    speed_up(policy.lm, CPU, "float32", compile=True)

    # Answers are sampled with the blocks as they are written: nothing is compiled, and they are
    # bit-equal.
    torch._dynamo.utils.counters.clear()
    with sampling(policy.lm):
        assert torch.equal(generate(policy, ids, mask, 4).logprobs, answers.logprobs)
    assert not torch._dynamo.utils.counters["stats"]

    logprobs, gradients = outputs_and_gradients(policy, "float32")
    # One graph for all blocks, and one for what comes after the logits.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)

    # Both blocks are frozen: the hook on the second one is called, though they are compiled
    # already.
    freeze(policy.lm, 1.0)
    reference_of(policy)
    logprobs = policy(with_trunk(policy), MASK, 0.7)["logprobs"]
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-4, atol=1e-4)
    assert policy.state_dict().keys() == tiny_policy("neox").state_dict().keys()


@pytest.mark.parametrize(
    "has_avx, has_amx, dtype",
    [(True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")],
)
def test_the_fast_dtype_is_looked_up(monkeypatch, has_avx, has_amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert fast_dtype("cpu") == dtype
    # config.json holds what the run used.
    assert RunConfig(dtype="auto", device="cpu").dtype == dtype


def test_the_dtype_is_float32_unless_asked():
    assert RunConfig().dtype == "float32"

"""nanorlhf.hf.blocks: finding and freezing blocks, and frozen blocks that run once against the whole model run every time.

B sequences, R response tokens, T tokens of a packed row, D hidden, L blocks
"""

import copy
import shutil

import pytest
import torch
from support import ARCHITECTURES, BATCH, MASK, B, R, tiny_lm, tiny_policy, word_tokenizer
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

EMBEDDINGS = {
    "neox": ("gpt_neox.embed_in.",),
    "llama": ("model.embed_tokens.",),
    "gpt2": ("transformer.wte.", "transformer.wpe."),
}
BLOCK = {"neox": "gpt_neox.layers.{}.", "llama": "model.layers.{}.", "gpt2": "transformer.h.{}."}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("fraction, n", [(0.0, None), (0.4, 0), (0.5, 1), (0.99, 1), (1.0, 2)])
def test_freeze(architecture, fraction, n):
    lm = tiny_lm(architecture)
    note = freeze(lm, fraction)
    frozen = (
        ()
        if n is None
        else (*EMBEDDINGS[architecture], *(BLOCK[architecture].format(i) for i in range(n)))
    )
    for name, p in lm.named_parameters():
        assert p.requires_grad == (not name.startswith(frozen)), name
    assert [name for name, _ in trainable(lm)] == [
        name for name, _ in lm.named_parameters() if not name.startswith(frozen)
    ]
    assert ("tied" in note) == (architecture == "gpt2" and n is not None)
    assert lm.get_output_embeddings().weight.requires_grad == (architecture != "gpt2" or n is None)
    if n is not None:
        assert f"bottom {n} of 2 blocks" in note
    assert (
        sum(p.numel() for _, p in trainable(lm)) < sum(p.numel() for p in lm.parameters())
        or n is None
    )


@pytest.mark.parametrize(
    "architecture, inner",
    [("neox", "gpt_neox.layers"), ("llama", "model.layers"), ("gpt2", "transformer.h")],
)
def test_blocks(architecture, inner):
    lm = tiny_lm(architecture)
    assert blocks(lm) is lm.get_submodule(inner)
    assert context_length(lm.config) == 64
    lm.config.num_hidden_layers = 7
    with pytest.raises(InputError, match="7 blocks"):
        blocks(lm)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_freezing_a_reward_model(architecture, tmp_path):
    save_policy(tiny_policy(architecture), word_tokenizer(), str(tmp_path))
    model = load_reward_model(str(tmp_path), seed=0).model
    assert "tied" not in freeze(model, 0.5)
    frozen = (*EMBEDDINGS[architecture], BLOCK[architecture].format(0))
    assert all(
        p.requires_grad == (not name.startswith(frozen)) for name, p in model.named_parameters()
    )
    assert model.score.weight.requires_grad


# ------------------------------------------------------------------------------------------------------ frozen blocks that run once

D, L = 32, 5
COMMON = dict(vocab_size=60, bos_token_id=1, eos_token_id=1, pad_token_id=0)
SIZE = dict(
    COMMON,
    hidden_size=D,
    num_hidden_layers=L,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
)
CONFIGS = {
    "neox": lambda: GPTNeoXConfig(**SIZE),
    "llama": lambda: LlamaConfig(**SIZE, num_key_value_heads=2),
    "gpt2": lambda: GPT2Config(**COMMON, n_embd=D, n_layer=L, n_head=4, n_positions=64),
    # blocks that return tuples; local and global attention in turn; a window that is shorter than the rows, embeddings scaled
    "gpt_neo": lambda: GPTNeoConfig(**COMMON, hidden_size=D, num_layers=L, attention_types=[[["global", "local"], 2], [["global"], 1]],
                                    num_heads=4, window_size=3, max_position_embeddings=64),
    "gemma2": lambda: Gemma2Config(**SIZE, num_key_value_heads=2, head_dim=8, sliding_window=3),
}  # fmt: skip


def deep_policy(architecture, fraction):
    torch.manual_seed(3)
    lm = AutoModelForCausalLM.from_config(
        CONFIGS[architecture](), attn_implementation="eager"
    ).eval()
    for p in lm.parameters():
        if p.dim() > 1:
            p.data.mul_(5)
    policy = Policy(lm).eval()
    policy.value_head.weight.data.normal_()
    freeze(policy.lm, fraction)
    return policy


def with_trunk(policy, batch=BATCH):
    return type(batch)(
        batch.ids,
        batch.prompt_lengths,
        batch.response_lengths,
        policy.frozen.run(policy.lm, batch.ids),
    )


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("fraction", [0.2, 0.8, 1.0])
def test_blocks_above_a_stored_trunk_are_the_whole_model(architecture, fraction):
    policy = deep_policy(architecture, fraction)
    reference = reference_of(policy)
    assert policy.frozen.n == round(fraction * L)
    stored, results = with_trunk(policy), []
    for batch in (BATCH, stored):
        out = policy(batch, MASK, 0.7, entropy=True, kl_to=reference)
        (out["logprobs"].sum() + (out["values"] ** 2).sum() + out["entropies"].sum()).backward()
        gradients = {name: p.grad for name, p in trainable(policy)}
        results.append((out, gradients, reference(batch, MASK, 0.7), policy.final_values(batch)))
        policy.zero_grad()
    (whole, whole_gradients, whole_ref, whole_final), (out, gradients, ref, final) = results
    for name in ("logprobs", "values", "entropies"):
        torch.testing.assert_close(out[name], whole[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ref["logprobs"], whole_ref["logprobs"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final, whole_final, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == whole_gradients.keys() and len(gradients) > 2
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient,
            whole_gradients[name],
            rtol=1e-4,
            atol=1e-4 * whole_gradients[name].abs().max().item(),
        )
    assert out["full_kl"].abs().max() < 1e-5 and policy.training is False


@pytest.mark.parametrize("architecture", CONFIGS)
def test_frozen_blocks_do_not_run_again(architecture):
    policy = deep_policy(architecture, 0.8)
    reference, calls = reference_of(policy), []
    for i, block in enumerate(blocks(policy.lm)):
        block.register_forward_hook(lambda module, args, output, i=i: calls.append(i))
    stored = with_trunk(policy)
    assert calls == [0, 1, 2, 3]
    calls.clear()
    policy(stored, MASK)
    assert calls == [4]
    calls.clear()
    policy(BATCH, MASK)
    assert calls == [0, 1, 2, 3, 4] and len(blocks(reference.lm)) == L


def test_rows_of_a_stored_trunk():
    policy = deep_policy("neox", 0.8)
    reference_of(policy)
    whole = policy(BATCH, MASK)["logprobs"]
    index = torch.tensor([3, 0])
    part = with_trunk(policy).rows(index)
    assert part.trunk.shape == (2, int(part.lengths.max()), D)
    got = policy(part, MASK[index][:, : int(part.response_lengths.max())])["logprobs"]
    torch.testing.assert_close(got, whole[index][:, : got.shape[1]], rtol=1e-5, atol=1e-5)


def test_the_trunk_stays_in_place_after_an_error():
    policy = deep_policy("neox", 0.8)
    reference_of(policy)
    with pytest.raises(IndexError):
        policy.frozen.run(policy.lm, torch.tensor([[10**6]]))
    assert len(blocks(policy.lm)) == L
    bad = with_trunk(policy)
    bad.trunk = bad.trunk[..., :-1]
    with pytest.raises(RuntimeError):
        policy(bad, MASK)
    assert len(blocks(policy.lm)) == L


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_reference_shares_what_is_frozen(architecture):
    policy = deep_policy(architecture, 0.8)
    before = policy(BATCH, MASK)["logprobs"].detach()
    reference = reference_of(policy)
    own = dict(reference.lm.named_parameters())
    for name, p in policy.lm.named_parameters():
        assert (own[name].data_ptr() == p.data_ptr()) == (not p.requires_grad), name
    assert not any(p.requires_grad for p in reference.parameters()) and reference.value_head is None
    with torch.no_grad():
        for _, p in trainable(policy):
            p.add_(torch.randn_like(p))
    assert torch.equal(reference(BATCH, MASK)["logprobs"], before)
    assert not torch.allclose(policy(BATCH, MASK)["logprobs"], before, atol=0.1)


def test_nothing_is_shared_where_nothing_is_frozen():
    policy = deep_policy("llama", 0)
    reference = reference_of(policy)
    assert policy.frozen.n == 0
    addresses = {p.data_ptr() for p in policy.parameters()}
    assert not any(p.data_ptr() in addresses for p in reference.parameters())


def test_a_trained_embedding_below_frozen_blocks_is_not_a_frozen_trunk():
    policy = deep_policy("gpt2", 0.8)
    policy.lm.transformer.wpe.requires_grad_(True)
    assert FrozenTrunk(policy.lm).n == 0


def test_a_trained_layer_between_the_embeddings_and_frozen_blocks_keeps_its_gradient():
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=60, hidden_size=D, n_layer=3, n_head=4)
    ).eval()
    freeze(lm, 0.7)
    assert lm.transformer.word_embeddings_layernorm.weight.requires_grad and FrozenTrunk(lm).n == 0
    lm.transformer.word_embeddings_layernorm.requires_grad_(False)
    assert FrozenTrunk(lm).n == 2


def test_an_architecture_that_cannot_be_split_runs_whole():
    """Upper blocks that read more than the hidden states below them: here each adds what the first one saw."""
    policy = deep_policy("neox", 0.8)
    layers, seen = blocks(policy.lm), {}
    policy.lm.base_model.register_forward_pre_hook(lambda module, args: seen.clear())
    layers[0].register_forward_pre_hook(lambda module, args: seen.update(first=args[0]))
    layers[4].register_forward_hook(lambda module, args, output: output + seen.get("first", 0))
    assert FrozenTrunk(policy.lm).n == 0


def test_the_value_model_reads_the_tokens():
    policy = deep_policy("neox", 0.8)
    policy.value_trunk = copy.deepcopy(policy.lm.base_model)
    reference_of(policy)
    stored, plain = (policy(batch, MASK)["values"] for batch in (with_trunk(policy), BATCH))
    assert torch.equal(stored, plain) and plain.shape == (B, R)


# -------------------------------------------------------------------------------------------------------------------------- faster


def outputs_and_gradients(policy, dtype):
    policy.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        out = policy(BATCH, MASK, 0.7)
    (out["logprobs"].sum() + out["values"].sum()).backward()
    return out["logprobs"].detach(), torch.cat([p.grad.flatten() for _, p in trainable(policy)])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_attention_in_bfloat16(architecture):
    policy = tiny_policy(architecture)
    exact = outputs_and_gradients(policy, "float32")
    fused = outputs_and_gradients(policy, "bfloat16")
    speed_up(policy.lm, torch.device("cpu"), "float32")
    assert policy.lm.config._attn_implementation == "sdpa"
    speed_up(policy.lm, torch.device("cpu"), "bfloat16")
    assert policy.lm.config._attn_implementation == "eager"
    plain = outputs_and_gradients(policy, "bfloat16")
    with pytest.raises(KeyError), sampling(policy.lm):  # no backward pass here
        assert policy.lm.config._attn_implementation == "sdpa"
        raise KeyError
    assert policy.lm.config._attn_implementation == "eager"
    for x, y, z in zip(exact, fused, plain):
        assert (
            0 < (z - x).norm() < 1.5 * (y - x).norm() + 1e-6
        )  # no further from float32 than the fused one


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_compute_the_same():
    policy = tiny_policy("neox")
    whole = outputs_and_gradients(policy, "float32")
    ids, mask = left_pad([[5, 6, 7], [8]], 0)
    answers = generate(policy, ids, mask, 4)
    speed_up(policy.lm, torch.device("cpu"), "float32", compile=True)
    torch._dynamo.utils.counters.clear()
    with sampling(policy.lm):
        assert torch.equal(
            generate(policy, ids, mask, 4).logprobs, answers.logprobs
        )  # as they are written: bit-equal
    assert not torch._dynamo.utils.counters["stats"]
    compiled = outputs_and_gradients(policy, "float32")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # one graph for all blocks
    for x, y in zip(whole, compiled):
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)
    freeze(
        policy.lm, 1.0
    )  # both blocks: the hook on the second one is called, though they are compiled already
    reference_of(policy)
    torch.testing.assert_close(
        policy(with_trunk(policy), MASK, 0.7)["logprobs"], whole[0], rtol=1e-4, atol=1e-4
    )
    assert policy.state_dict().keys() == tiny_policy("neox").state_dict().keys()


def test_the_fast_dtype_is_looked_up(monkeypatch):
    for avx, amx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        expected = "bfloat16" if avx or amx else "float32"
        assert fast_dtype("cpu") == expected
        assert (
            RunConfig(dtype="auto", device="cpu").dtype == expected
        )  # config.json holds what the run used
    assert RunConfig().dtype == "float32"

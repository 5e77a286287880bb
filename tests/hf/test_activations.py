"""nanorlhf.hf.activations on tiny random models of every supported family, against the arithmetic of their residual streams.

B sequences, T tokens, D hidden, L blocks
"""

import copy
import shutil

import pytest
import torch
from support import DEPTH, FAMILIES, SPECIAL, tiny_family, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    OPTConfig,  # fmt: skip
)

from nanorlhf.errors import InputError
from nanorlhf.hf.activations import (
    SITES,
    activations,
    captured,
    module_at,
    place_name,
    replaced,
    running_ids,
)
from nanorlhf.hf.blocks import blocks, freeze, speed_up
from nanorlhf.hf.lora import adapters, add_lora
from nanorlhf.models import Policy, load_policy, reference_of, save_policy
from nanorlhf.packing import pack
from nanorlhf.rollout import generate, left_pad

D, L = 32, DEPTH
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


@pytest.mark.parametrize("architecture", FAMILIES)
@torch.no_grad()
def test_what_is_captured_adds_up_to_the_residual_stream(architecture):
    lm, (attention, mlp, attention_norm, mlp_norm) = (
        tiny_family(architecture),
        FAMILIES[architecture][1],
    )
    before = lm(IDS, use_cache=False).logits
    with captured(lm, [(layer, site) for layer in range(L) for site in SITES]) as kept:
        out = lm(IDS, use_cache=False, output_hidden_states=True)
    assert torch.equal(out.logits, before) and torch.equal(lm(IDS, use_cache=False).logits, before)
    for layer, block in enumerate(blocks(lm)):
        assert module_at(lm, (layer, "attention")) is block.get_submodule(attention)
        assert module_at(lm, (layer, "mlp")) is block.get_submodule(mlp)
        added = [kept[layer, "attention"], kept[layer, "mlp"]]
        added = [
            block.get_submodule(norm)(x) if norm else x
            for norm, x in zip((attention_norm, mlp_norm), added)
        ]
        assert all(x.shape == (2, 6, D) and x.norm() > 0 for x in added)
        # The stream that enters a block, as Hugging Face returns it, and the two outputs make the stream that leaves it.
        torch.testing.assert_close(
            kept[layer, "residual"],
            out.hidden_states[layer] + added[0] + added[1],
            rtol=1e-4,
            atol=1e-4,
        )
        if layer + 1 < L:
            assert torch.equal(kept[layer, "residual"], out.hidden_states[layer + 1])


@pytest.mark.parametrize("architecture", FAMILIES)
@torch.no_grad()
def test_what_is_captured_is_what_the_module_makes_of_its_input(architecture):
    """The attention and the MLP of a block, run again on inputs that this test's own hooks copied, give what was captured."""
    lm = tiny_family(architecture)
    modules = {}
    calls = {}  # what each module was called with, copied before anything can change it
    hooks = []
    for layer in range(L):
        for site in ("attention", "mlp"):
            place = (layer, site)
            modules[place] = module_at(lm, place)

            def copy_input(module, args, kwargs, place=place):
                calls[place] = copy.deepcopy((args, kwargs))

            hooks.append(modules[place].register_forward_pre_hook(copy_input, with_kwargs=True))
    with captured(lm, list(modules)) as kept:
        lm(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(calls) == 2 * L
    for place, (args, kwargs) in calls.items():
        output = modules[place](*args, **kwargs)
        if isinstance(output, tuple):
            output = output[0]
        torch.testing.assert_close(kept[place], output, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_replacement_that_is_kept_stays_as_it_is():
    """The same tensor is put in twice: the first forward, of a block that adds to it in place, leaves it alone."""
    lm = tiny_family("falcon")
    replacement = torch.randn(2, 6, D, generator=torch.Generator().manual_seed(0))
    before = replacement.clone()
    seen = []
    with replaced(lm, (1, "mlp"), lambda x: seen.append((x, x.clone())) or replacement):
        first = lm(IDS, use_cache=False).logits
        second = lm(IDS, use_cache=False).logits
    assert torch.equal(replacement, before) and torch.equal(first, second)
    assert all(torch.equal(x, copied) for x, copied in seen)


@pytest.mark.parametrize("architecture", ["neox", "gpt2", "falcon"])
def test_running_ids(architecture):
    """The ids of each forward of a rollout, prompts first; of one that is given them by name or by place."""
    policy, heard = Policy(tiny_family(architecture)).eval(), []
    ids, mask = left_pad([[5, 6, 7], [8, 9]], 0)
    n = hooks(policy.lm)
    with (
        running_ids(policy.lm) as token_ids,
        replaced(policy.lm, (1, "mlp"), lambda x: heard.append(token_ids()) or x),
    ):
        rollout = generate(policy, ids, mask, 3)
        assert torch.equal(torch.cat(heard, 1), torch.cat([ids, rollout.response_ids], 1)[:, :-1])
        policy.lm(IDS)
        assert torch.equal(heard[-1], IDS)
        policy.lm.base_model(IDS)
        assert torch.equal(heard[-1], IDS)
    assert hooks(policy.lm) == n


@pytest.mark.parametrize("architecture", FAMILIES)
@torch.no_grad()
def test_a_replaced_output_is_what_the_model_goes_on_with(architecture):
    """The other part switched off: a block then adds one output only, or, with both off, nothing."""
    lm, (_, _, attention_norm, mlp_norm) = tiny_family(architecture), FAMILIES[architecture][1]
    before = lm(IDS, use_cache=False).logits
    with (
        replaced(lm, (1, "mlp"), torch.zeros_like),
        replaced(lm, (1, "attention"), torch.zeros_like),
    ):
        with captured(lm, [(0, "residual"), (1, "residual"), (1, "mlp")]) as kept:
            off = lm(IDS, use_cache=False).logits
    assert torch.equal(kept[1, "residual"], kept[0, "residual"]) and kept[1, "mlp"].norm() == 0
    assert not torch.allclose(off, before, atol=1e-3)
    with replaced(lm, (1, "residual"), lambda x: kept[0, "residual"]):  # the same by other means
        assert torch.equal(lm(IDS, use_cache=False).logits, off)
    assert torch.equal(lm(IDS, use_cache=False).logits, before)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("static", [False, True])
def test_in_a_rollout_tokens_are_replaced_one_by_one(architecture, static):
    """Log-probs of a rollout with a cache against the whole text in one forward, both with the same function at work."""
    policy = Policy(tiny_family(architecture)).eval()
    ids, mask = left_pad([[5, 6, 7], [8], [9, 10]], 0)
    plain, lengths = generate(policy, ids, mask, 6, static=static), []

    def function(x):
        lengths.append(x.shape[1])
        return 2 * x.flip(-1)

    for site in SITES:
        with replaced(policy.lm, (1, site), function):
            rollout = generate(policy, ids, mask, 6, static=static)
            assert lengths == [3, 1, 1, 1, 1, 1]
            whole = policy(rollout.packed(), rollout.response_mask)["logprobs"]
        torch.testing.assert_close(rollout.logprobs, whole, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(rollout.logprobs[:, 0], plain.logprobs[:, 0], atol=1e-3)
        lengths.clear()
    again = generate(policy, ids, mask, 6, static=static)
    assert torch.equal(again.response_ids, plain.response_ids) and torch.equal(
        again.logprobs, plain.logprobs
    )


def test_captured_in_a_rollout():
    policy = Policy(tiny_family("llama")).eval()
    ids, mask = left_pad([[5, 6, 7], [8, 9, 10]], 0)
    with captured(policy.lm, [(1, "mlp")]) as kept:
        assert kept == {}
        rollout = generate(policy, ids, mask, 4)
    text = torch.cat([rollout.prompt_ids, rollout.response_ids], 1)[
        :, :-1
    ]  # the last token is never read
    expected = activations(policy.lm, text, [(1, "mlp")])[1, "mlp"][:, -1:]
    torch.testing.assert_close(kept[1, "mlp"].clone(), expected, rtol=1e-4, atol=1e-5)


def hooks(lm):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.modules())


def test_hooks_are_removed_whatever_happens():
    lm = tiny_family("gpt2")
    before, n = lm(IDS).logits, hooks(lm)
    with pytest.raises(KeyError):
        with (
            captured(lm, [(0, "mlp"), (2, "residual")]),
            replaced(lm, (1, "attention"), torch.zeros_like),
        ):
            assert hooks(lm) == n + 4
            raise KeyError
    with pytest.raises(ValueError, match=r"at 1_mlp is \[2, 6, 31\], the output \[2, 6, 32\]"):
        with replaced(lm, (1, "mlp"), lambda x: x[..., 1:]):
            lm(IDS)
    with pytest.raises(InputError):
        with captured(lm, [(0, "mlp"), (7, "mlp")]):
            pass
    with pytest.raises(IndexError):
        activations(lm, torch.tensor([[10**6]]), [(0, "mlp")])
    assert hooks(lm) == n and len(blocks(lm)) == L and torch.equal(lm(IDS).logits, before)


def test_places_that_are_not_there():
    lm = tiny_family("neox")
    for place, message in [((3, "mlp"), "layer 3: GPTNeoXForCausalLM has the layers 0 to 2"), ((-1, "mlp"), "layers 0 to 2"),
                           ((0, "head"), "'head': it must be one of mlp, attention, residual")]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            module_at(lm, place)
    assert place_name((3, "mlp")) == "3_mlp"
    opt = AutoModelForCausalLM.from_config(OPTConfig(**SPECIAL, hidden_size=D, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                                                     word_embed_proj_dim=D, max_position_embeddings=64))  # fmt: skip
    with pytest.raises(
        InputError, match="no mlp output of its own .it consists of OPTAttention.* use residual"
    ):
        module_at(opt, (0, "mlp"))
    assert module_at(opt, (0, "residual")) is blocks(opt)[0]
    bloom = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=60, hidden_size=D, n_layer=2, n_head=4)
    )
    for site in ("mlp", "attention"):  # these modules add the residual stream themselves
        with pytest.raises(InputError, match=f"no {site} output of its own"):
            module_at(bloom, (0, site))


def test_the_order_of_the_parts_does_not_matter():
    lm = tiny_family("llama")
    block = blocks(lm)[0]
    block._modules = dict(reversed(block._modules.items()))  # norms and the MLP first
    assert (
        module_at(lm, (0, "mlp")) is block.mlp
        and module_at(lm, (0, "attention")) is block.self_attn
    )


@pytest.mark.parametrize("architecture", ["neox", "llama", "gpt2", "gemma2", "qwen3"])
@torch.no_grad()
def test_sequence_classifiers(architecture):
    model = tiny_family(architecture, AutoModelForSequenceClassification)
    model.config.pad_token_id = 0
    before = model(IDS).logits
    with captured(model, [(2, "residual")]) as kept, replaced(model, (0, "mlp"), torch.zeros_like):
        after = model(IDS).logits
    norm = next(
        m for name, m in model.base_model.named_children() if "norm" in name or name == "ln_f"
    )
    torch.testing.assert_close(model.score(norm(kept[2, "residual"]))[:, -1], after)
    assert not torch.allclose(before, after, atol=1e-4) and torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_blocks_above_the_highest_place_do_not_run(architecture):
    lm, calls = tiny_family(architecture), []
    for i, block in enumerate(blocks(lm)):
        block.register_forward_hook(lambda module, args, output, i=i: calls.append(i))
    places = [(1, "mlp"), (0, "residual")]
    got = activations(lm, IDS, places)
    assert calls == [0, 1] and list(got) == [(0, "residual"), (1, "mlp")]
    with captured(lm, places) as kept:
        lm(IDS)
    assert all(torch.equal(got[place], kept[place]) for place in places)
    assert not got[1, "mlp"].requires_grad and kept[1, "mlp"].requires_grad


# ------------------------------------------------------------------------------------------- frozen, compiled and adapted models


def test_with_frozen_blocks_whose_output_is_stored():
    policy = Policy(tiny_family("gpt_neo")).eval()  # its blocks return tuples
    freeze(policy.lm, 0.7)
    reference_of(policy)
    batch = pack([[5, 6, 7], [8, 9]], [[10, 11], [12]])
    mask = torch.tensor([[True, True], [True, False]])
    whole = copy.deepcopy(policy)
    for place in (
        (0, "mlp"),
        (2, "mlp"),
    ):  # a frozen block, which runs for what is stored, and one above
        with (
            replaced(policy.lm, place, torch.zeros_like),
            replaced(whole.lm, place, torch.zeros_like),
        ):
            batch.trunk = None
            expected = whole(batch, mask)["logprobs"]
            batch.trunk = policy.frozen.run(policy.lm, batch.ids)
            torch.testing.assert_close(
                policy(batch, mask)["logprobs"], expected, rtol=1e-4, atol=1e-4
            )
    with captured(policy.lm, [(0, "mlp"), (2, "mlp")]) as kept:
        policy.frozen.run(policy.lm, batch.ids)
        assert list(kept) == [(0, "mlp")]
        policy(batch, mask)
        assert list(kept) == [(2, "mlp")]  # nothing stale
    with (
        policy.frozen.stored(policy.lm, batch.trunk),
        pytest.raises(InputError, match="layer 0 is frozen"),
    ):
        module_at(policy.lm, (0, "residual"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@torch.no_grad()
def test_compiled_blocks():
    lm = tiny_family("neox")
    with replaced(lm, (1, "mlp"), torch.zeros_like):
        expected = lm(IDS).logits
    speed_up(lm, torch.device("cpu"), "float32", compile=True)
    before = lm(IDS).logits  # compiled by now
    with replaced(lm, (1, "mlp"), torch.zeros_like):
        assert torch.equal(lm(IDS).logits, expected)
    with captured(lm, [(1, "mlp")]) as kept:
        lm(IDS)
    assert kept[1, "mlp"].norm() > 0 and torch.equal(lm(IDS).logits, before)


def test_adapters_are_seen_and_merged(tmp_path):
    lm = tiny_family("llama")
    lm.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    policy = load_policy(str(tmp_path / "base"), value_head=False)
    add_lora(policy.lm, rank=2)
    plain = activations(policy.lm, IDS, [(1, "mlp"), (1, "attention")])
    for layer in adapters(policy.lm).values():
        layer.lora_B.data.normal_()
    adapted = activations(policy.lm, IDS, [(1, "mlp"), (1, "attention")])
    save_policy(policy, word_tokenizer(), str(tmp_path / "adapter"))
    merged = activations(
        load_policy(str(tmp_path / "adapter"), value_head=False).lm, IDS, list(plain)
    )
    for place in plain:
        torch.testing.assert_close(merged[place], adapted[place], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(adapted[place], plain[place], atol=0.1)

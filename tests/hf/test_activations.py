"""nanorlhf.hf.activations on tiny random models of every supported family, against the arithmetic
of their residual streams.

    B sequences, T tokens, D hidden, L blocks
"""

import copy
import shutil

import pytest
import torch
from tiny_models import DEPTH, FAMILIES, SPECIAL, tiny_family, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    OPTConfig,
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

D = 32
L = DEPTH
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])  # [B, T]
ALL_PLACES = [(layer, site) for layer in range(L) for site in SITES]

each_family = pytest.mark.parametrize("architecture", FAMILIES)


@torch.no_grad()
def compute_logits(lm):
    return lm(IDS, use_cache=False).logits


def count_hooks(lm):
    n = 0
    for module in lm.modules():
        n += len(module._forward_hooks) + len(module._forward_pre_hooks)
    return n


# --------------------------------------------------------------------------- capture and replace


@each_family
def test_places_are_the_modules_that_each_family_has(architecture):
    lm = tiny_family(architecture)
    _, (attention, mlp, _, _) = FAMILIES[architecture]
    for layer, block in enumerate(blocks(lm)):
        assert module_at(lm, (layer, "attention")) is block.get_submodule(attention)
        assert module_at(lm, (layer, "mlp")) is block.get_submodule(mlp)


def added_to_the_stream(block, norm, x):
    """What a block adds to its residual stream of an output x: some families apply a norm first."""
    if norm:
        return block.get_submodule(norm)(x)
    return x


@each_family
@torch.no_grad()
def test_what_is_captured_adds_up_to_the_residual_stream(architecture):
    """The stream that enters a block, as Hugging Face returns it, and the two outputs make the
    stream that leaves it."""
    lm = tiny_family(architecture)
    _, (_, _, attention_norm, mlp_norm) = FAMILIES[architecture]
    with captured(lm, ALL_PLACES) as kept:
        out = lm(IDS, use_cache=False, output_hidden_states=True)

    for layer, block in enumerate(blocks(lm)):
        entering = out.hidden_states[layer]
        leaving = kept[layer, "residual"]
        attention = added_to_the_stream(block, attention_norm, kept[layer, "attention"])
        mlp = added_to_the_stream(block, mlp_norm, kept[layer, "mlp"])
        for added in (attention, mlp):
            assert added.shape == (2, 6, D)
            assert added.norm() > 0
        torch.testing.assert_close(leaving, entering + attention + mlp, rtol=1e-4, atol=1e-4)
        # The last hidden state of Hugging Face has a final norm applied.
        if layer + 1 < L:
            assert torch.equal(leaving, out.hidden_states[layer + 1])


@each_family
def test_to_capture_changes_nothing(architecture):
    lm = tiny_family(architecture)
    before = compute_logits(lm)
    with captured(lm, ALL_PLACES):
        assert torch.equal(compute_logits(lm), before)
    assert torch.equal(compute_logits(lm), before)


def record_inputs(modules):
    """Hooks that copy what each module is called with, before anything can change it.

    modules: {place: module} -> the hooks, and {place: (args, kwargs)}, filled by a forward
    """
    calls = {}
    hooks = []
    for place, module in modules.items():

        def copy_input(module, args, kwargs, place=place):
            calls[place] = copy.deepcopy((args, kwargs))

        hooks.append(module.register_forward_pre_hook(copy_input, with_kwargs=True))
    return hooks, calls


@each_family
@torch.no_grad()
def test_what_is_captured_is_what_the_module_makes_of_its_input(architecture):
    """The attention and the MLP of a block, run again on inputs that this test's own hooks copied,
    give what was captured."""
    lm = tiny_family(architecture)
    modules = {}
    for place in ALL_PLACES:
        _, site = place
        if site != "residual":
            modules[place] = module_at(lm, place)
    hooks, calls = record_inputs(modules)
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


def test_a_replacement_that_is_kept_stays_as_it_is():
    """The same tensor is put in twice: a block that adds to it in place leaves it alone, and what
    it was given as well."""
    lm = tiny_family("falcon")
    replacement = torch.randn(2, 6, D, generator=torch.Generator().manual_seed(0))
    before = replacement.clone()
    seen = []

    def replace(x):
        seen.append((x, x.clone()))
        return replacement

    with replaced(lm, (1, "mlp"), replace):
        first = compute_logits(lm)
        second = compute_logits(lm)
    assert torch.equal(replacement, before)
    assert torch.equal(first, second)
    for x, copied in seen:
        assert torch.equal(x, copied)


@each_family
def test_a_replaced_output_is_what_the_model_goes_on_with(architecture):
    """With both parts of a block switched off it adds nothing."""
    lm = tiny_family(architecture)
    before = compute_logits(lm)
    with (
        replaced(lm, (1, "mlp"), torch.zeros_like),
        replaced(lm, (1, "attention"), torch.zeros_like),
        captured(lm, [(0, "residual"), (1, "residual"), (1, "mlp")]) as kept,
    ):
        off = compute_logits(lm)
    assert kept[1, "mlp"].norm() == 0
    assert torch.equal(kept[1, "residual"], kept[0, "residual"])
    assert not torch.allclose(off, before, atol=1e-3)

    # The same by other means: what entered the block takes the place of what leaves it.
    with replaced(lm, (1, "residual"), lambda x: kept[0, "residual"]):
        assert torch.equal(compute_logits(lm), off)
    assert torch.equal(compute_logits(lm), before)


def test_a_replacement_may_compute_in_float32():
    """Autoencoders do. A model whose weights are in bfloat16 goes on in bfloat16."""
    lm = tiny_family("llama").to(torch.bfloat16)
    before = compute_logits(lm)
    with replaced(lm, (1, "mlp"), lambda x: x.float()):
        assert torch.equal(compute_logits(lm), before)


def test_hooks_are_removed_after_an_error_inside():
    lm = tiny_family("gpt2")
    before = compute_logits(lm)
    n = count_hooks(lm)
    with pytest.raises(KeyError):
        with (
            captured(lm, [(0, "mlp"), (2, "residual")]),
            replaced(lm, (1, "attention"), torch.zeros_like),
        ):
            # One at each place, and one before each forward.
            assert count_hooks(lm) == n + 4
            raise KeyError
    assert count_hooks(lm) == n
    assert torch.equal(compute_logits(lm), before)


def test_hooks_are_removed_after_a_replacement_of_another_shape():
    lm = tiny_family("gpt2")
    before = compute_logits(lm)
    n = count_hooks(lm)
    with pytest.raises(ValueError, match=r"at 1_mlp is \[2, 6, 31\], the output \[2, 6, 32\]"):
        with replaced(lm, (1, "mlp"), lambda x: x[..., 1:]):
            compute_logits(lm)
    assert count_hooks(lm) == n
    assert torch.equal(compute_logits(lm), before)


def test_no_hook_is_set_where_one_of_the_places_is_not_there():
    lm = tiny_family("gpt2")
    n = count_hooks(lm)
    with pytest.raises(InputError):
        with captured(lm, [(0, "mlp"), (7, "mlp")]):
            pass
    assert count_hooks(lm) == n


def test_hooks_and_blocks_are_as_before_after_an_error_in_the_forward():
    lm = tiny_family("gpt2")
    before = compute_logits(lm)
    n = count_hooks(lm)
    no_such_token = torch.tensor([[10**6]])
    with pytest.raises(IndexError):
        activations(lm, no_such_token, [(0, "mlp")])
    assert count_hooks(lm) == n
    assert len(blocks(lm)) == L
    assert torch.equal(compute_logits(lm), before)


@each_family
def test_blocks_above_the_highest_place_do_not_run(architecture):
    lm = tiny_family(architecture)
    ran = []
    for i, block in enumerate(blocks(lm)):
        block.register_forward_hook(lambda module, args, output, i=i: ran.append(i))
    places = [(1, "mlp"), (0, "residual")]
    found = activations(lm, IDS, places)
    assert ran == [0, 1]
    assert list(found) == [(0, "residual"), (1, "mlp")]

    with captured(lm, places) as kept:
        lm(IDS)
    for place in places:
        assert torch.equal(found[place], kept[place])
    assert kept[1, "mlp"].requires_grad
    assert not found[1, "mlp"].requires_grad


def final_norm(model):
    """The norm that stands between the last block and the head."""
    for name, module in model.base_model.named_children():
        if "norm" in name or name == "ln_f":
            return module


@pytest.mark.parametrize("architecture", ["neox", "llama", "gpt2", "gemma2", "qwen3"])
@torch.no_grad()
def test_sequence_classifiers_have_the_same_places(architecture):
    model = tiny_family(architecture, AutoModelForSequenceClassification)
    model.config.pad_token_id = 0
    before = model(IDS).logits
    with captured(model, [(2, "residual")]) as kept, replaced(model, (0, "mlp"), torch.zeros_like):
        after = model(IDS).logits
    # The score is read at the last token.
    scores = model.score(final_norm(model)(kept[2, "residual"]))
    torch.testing.assert_close(scores[:, -1], after)
    assert not torch.allclose(before, after, atol=1e-4)
    assert torch.equal(model(IDS).logits, before)


# --------------------------------------------------------------------------------- in a rollout


@pytest.mark.parametrize("architecture", ["neox", "gpt2", "falcon"])
def test_running_ids_are_those_of_each_forward(architecture):
    """In a rollout the prompts come first, then single tokens."""
    policy = Policy(tiny_family(architecture)).eval()
    ids, mask = left_pad([[5, 6, 7], [8, 9]], 0)
    n = count_hooks(policy.lm)
    heard = []
    with running_ids(policy.lm) as token_ids:

        def listen(x):
            heard.append(token_ids())
            return x

        with replaced(policy.lm, (1, "mlp"), listen):
            rollout = generate(policy, ids, mask, 3)
            # The last token is never read.
            read = torch.cat([ids, rollout.response_ids], 1)[:, :-1]
            assert torch.equal(torch.cat(heard, 1), read)
            # Ids may be given by name or by place.
            policy.lm(IDS)
            assert torch.equal(heard[-1], IDS)
            policy.lm.base_model(IDS)
            assert torch.equal(heard[-1], IDS)
    assert count_hooks(policy.lm) == n


@each_family
@pytest.mark.parametrize("static", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_in_a_rollout_tokens_are_replaced_one_by_one(architecture, static):
    """Log-probs of a rollout with a cache against the whole text in one forward, both with the same
    function at work."""
    policy = Policy(tiny_family(architecture)).eval()
    ids, mask = left_pad([[5, 6, 7], [8], [9, 10]], 0)
    plain = generate(policy, ids, mask, 6, static=static)
    lengths = []

    def reverse_and_double(x):
        lengths.append(x.shape[1])
        return 2 * x.flip(-1)

    for site in SITES:
        lengths.clear()
        with replaced(policy.lm, (1, site), reverse_and_double):
            rollout = generate(policy, ids, mask, 6, static=static)
            # The prompts come first, then single tokens.
            assert lengths == [3, 1, 1, 1, 1, 1]
            whole = policy(rollout.packed(), rollout.response_mask)["logprobs"]
        torch.testing.assert_close(rollout.logprobs, whole, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(rollout.logprobs[:, 0], plain.logprobs[:, 0], atol=1e-3)

    again = generate(policy, ids, mask, 6, static=static)
    assert torch.equal(again.response_ids, plain.response_ids)
    assert torch.equal(again.logprobs, plain.logprobs)


def test_what_is_captured_in_a_rollout_is_of_its_last_forward():
    policy = Policy(tiny_family("llama")).eval()
    ids, mask = left_pad([[5, 6, 7], [8, 9, 10]], 0)
    place = (1, "mlp")
    with captured(policy.lm, [place]) as kept:
        assert kept == {}
        rollout = generate(policy, ids, mask, 4)
    # The last token is never read.
    text = torch.cat([rollout.prompt_ids, rollout.response_ids], 1)[:, :-1]
    expected = activations(policy.lm, text, [place])[place][:, -1:]
    torch.testing.assert_close(kept[place].clone(), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- places that are not there


@pytest.mark.parametrize(
    "place, words",
    [
        ((3, "mlp"), "layer 3: GPTNeoXForCausalLM has the layers 0 to 2"),
        ((-1, "mlp"), "layers 0 to 2"),
        ((0, "head"), "'head': it must be one of mlp, attention, residual"),
    ],
)
def test_places_that_no_model_has_are_refused(place, words):
    with pytest.raises(InputError, match=words):
        module_at(tiny_family("neox"), place)


def test_a_place_has_a_name_for_files():
    assert place_name((3, "mlp")) == "3_mlp"


def test_a_model_without_a_module_for_its_mlp_has_the_residual_stream_alone():
    config = OPTConfig(
        **SPECIAL,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=D,
        max_position_embeddings=64,
    )
    opt = AutoModelForCausalLM.from_config(config)
    words = "no mlp output of its own .it consists of OPTAttention.* use residual"
    with pytest.raises(InputError, match=words):
        module_at(opt, (0, "mlp"))
    assert module_at(opt, (0, "residual")) is blocks(opt)[0]


@pytest.mark.parametrize("site", ["mlp", "attention"])
def test_modules_that_add_the_residual_stream_themselves_are_no_places(site):
    config = BloomConfig(vocab_size=60, hidden_size=D, n_layer=2, n_head=4)
    bloom = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=f"no {site} output of its own"):
        module_at(bloom, (0, site))


def test_the_order_of_the_parts_does_not_matter():
    lm = tiny_family("llama")
    block = blocks(lm)[0]
    # Norms and the MLP come first.
    block._modules = dict(reversed(block._modules.items()))
    assert module_at(lm, (0, "mlp")) is block.mlp
    assert module_at(lm, (0, "attention")) is block.self_attn


# ------------------------------------------------------------ frozen, compiled and adapted models


@pytest.fixture
def frozen_policy():
    """A policy of which the first two blocks are frozen; its blocks return tuples."""
    policy = Policy(tiny_family("gpt_neo")).eval()
    freeze(policy.lm, 0.7)
    reference_of(policy)
    return policy


FROZEN = (0, "mlp")
ABOVE = (2, "mlp")
PROMPTS = [[5, 6, 7], [8, 9]]
RESPONSES = [[10, 11], [12]]
MASK = torch.tensor([[True, True], [True, False]])  # [B, R]


@pytest.mark.parametrize("place", [FROZEN, ABOVE])
def test_a_place_is_replaced_where_frozen_blocks_run_for_what_is_stored(frozen_policy, place):
    whole = copy.deepcopy(frozen_policy)
    batch = pack(PROMPTS, RESPONSES)
    with (
        replaced(frozen_policy.lm, place, torch.zeros_like),
        replaced(whole.lm, place, torch.zeros_like),
    ):
        expected = whole(batch, MASK)["logprobs"]
        batch.frozen_output = frozen_policy.frozen.run(frozen_policy.lm, batch.ids)
        found = frozen_policy(batch, MASK)["logprobs"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_captured_is_of_the_blocks_that_have_just_run(frozen_policy):
    """Nothing stale: frozen blocks run for what is stored, those above in the policy's forward."""
    batch = pack(PROMPTS, RESPONSES)
    batch.frozen_output = frozen_policy.frozen.run(frozen_policy.lm, batch.ids)
    with captured(frozen_policy.lm, [FROZEN, ABOVE]) as kept:
        frozen_policy.frozen.run(frozen_policy.lm, batch.ids)
        assert list(kept) == [FROZEN]
        frozen_policy(batch, MASK)
        assert list(kept) == [ABOVE]


def test_a_frozen_block_whose_output_is_stored_is_no_place(frozen_policy):
    lm = frozen_policy.lm
    trunk = frozen_policy.frozen.run(lm, IDS)
    with frozen_policy.frozen.stored(lm, trunk):
        with pytest.raises(InputError, match="layer 0 is frozen"):
            module_at(lm, (0, "residual"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_are_captured_and_replaced():
    lm = tiny_family("neox")
    place = (1, "mlp")
    with replaced(lm, place, torch.zeros_like):
        expected = compute_logits(lm)
    speed_up(lm, torch.device("cpu"), "float32", compile=True)
    before = compute_logits(lm)  # the blocks are compiled by now
    with replaced(lm, place, torch.zeros_like):
        assert torch.equal(compute_logits(lm), expected)
    with captured(lm, [place]) as kept:
        compute_logits(lm)
    assert kept[place].norm() > 0
    assert torch.equal(compute_logits(lm), before)


def test_adapters_are_seen_and_merged(tmp_path):
    lm = tiny_family("llama")
    lm.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    policy = load_policy(str(tmp_path / "base"), value_head=False)
    add_lora(policy.lm, rank=2)
    places = [(1, "mlp"), (1, "attention")]
    plain = activations(policy.lm, IDS, places)

    for layer in adapters(policy.lm).values():
        layer.lora_B.data.normal_()
    adapted = activations(policy.lm, IDS, places)
    save_policy(policy, word_tokenizer(), str(tmp_path / "adapter"))
    loaded = load_policy(str(tmp_path / "adapter"), value_head=False)
    merged = activations(loaded.lm, IDS, places)
    for place in places:
        torch.testing.assert_close(merged[place], adapted[place], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(adapted[place], plain[place], atol=0.1)

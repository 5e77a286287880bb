"""Weights that are laid out for decoding: what is sampled stays the same, and so do the weights."""

import pytest
import torch
from tiny_models import ARCHITECTURES, SIZE, V, tiny_policy
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from nanorlhf.hf import weight_layout
from nanorlhf.hf.lora import LoRA, adapters, adapters_off, add_lora
from nanorlhf.hf.weight_layout import large_layers, packed_weights, turned_weights
from nanorlhf.models import Policy
from nanorlhf.rollout import Sampler, generate, left_pad

PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11, 12]]
B = len(PROMPTS)
R = 6

needs_packing = pytest.mark.skipif(
    not weight_layout.can_pack(), reason="needs a processor with bfloat16"
)


@pytest.fixture(autouse=True)
def all_weights_are_large(monkeypatch):
    monkeypatch.setattr(weight_layout, "LARGE_WEIGHT", 0)
    monkeypatch.setattr(weight_layout, "MANY_ROWS", B)


@pytest.fixture(params=ARCHITECTURES)
def policy(request):
    return tiny_policy(request.param)


def roll(policy, bfloat16=False):
    ids, mask = left_pad(PROMPTS, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        return generate(policy, ids, mask, R, seed=1)


def roll_as_it_lies(policy, monkeypatch, bfloat16=False):
    """The rollout without any of this."""
    with monkeypatch.context() as patch:
        patch.setattr(weight_layout, "LARGE_WEIGHT", 2**60)
        assert large_layers(policy.lm) == []
        return roll(policy, bfloat16)


def describe(module):
    """What must not change: its parameters' objects, memory, numbers and strides, its forwards."""
    parameters = {}
    for name, p in module.named_parameters():
        parameters[name] = (id(p), p.data_ptr(), p.tolist(), p.stride(), p.requires_grad)
    forwards = [name for name, child in module.named_modules() if "forward" in vars(child)]
    return parameters, forwards


def fail(*args):
    raise ZeroDivisionError


@pytest.mark.parametrize("bfloat16", [False, True])
def test_all_is_as_before_afterwards(policy, monkeypatch, bfloat16):
    before = describe(policy)
    assert before[1] == []
    roll(policy, bfloat16)
    assert describe(policy) == before
    # Also after an error.
    monkeypatch.setattr(Sampler, "__call__", fail)
    with pytest.raises(ZeroDivisionError):
        roll(policy, bfloat16)
    assert describe(policy) == before


@pytest.mark.parametrize("bfloat16", [False, True])
def test_rollouts_decode_with_them(monkeypatch, bfloat16):
    policy = tiny_policy("neox")
    call = Sampler.__call__
    seen = []

    def watched(*args):
        for layer in large_layers(policy.lm):
            is_turned = not layer.weight.is_contiguous()
            is_packed = "forward" in vars(layer)
            seen.append((is_turned, is_packed))
        return call(*args)

    monkeypatch.setattr(Sampler, "__call__", watched)
    roll(policy, bfloat16)
    if bfloat16:
        assert set(seen) == {(False, weight_layout.can_pack())}
    else:
        assert set(seen) == {(True, False)}


# --------------------------------------------------------------------------------------- float32


def test_turned_weights_sample_the_same(policy, monkeypatch):
    plain = roll_as_it_lies(policy, monkeypatch)
    turned = roll(policy)
    assert torch.equal(turned.response_ids, plain.response_ids)
    for name in ("logprobs", "values", "entropies"):
        torch.testing.assert_close(getattr(turned, name), getattr(plain, name), rtol=0, atol=1e-5)


def test_a_turned_weight_lies_column_by_column(policy):
    embeddings = policy.lm.get_input_embeddings().weight
    numbers = {id(layer): layer.weight.clone() for layer in large_layers(policy.lm)}
    with turned_weights(policy.lm, B):
        for layer in large_layers(policy.lm):
            assert torch.equal(layer.weight, numbers[id(layer)])
            if layer.weight is embeddings:
                assert layer.weight.is_contiguous()
            else:
                assert layer.weight.stride() == (1, layer.out_features)


def test_a_tied_head_is_not_turned():
    config = GPTNeoXConfig(**{**SIZE, "tie_word_embeddings": True})
    policy = Policy(AutoModelForCausalLM.from_config(config))
    with turned_weights(policy.lm, B):
        lying = [layer.weight.is_contiguous() for layer in large_layers(policy.lm)]
    # Four layers of each of two blocks, and the head.
    assert lying == [False] * 8 + [True]


def test_frozen_weights_are_not_turned():
    """They have no gradients, whose memory a copy could take."""
    policy = tiny_policy("neox")
    layers = large_layers(policy.lm)
    layers[1].weight.requires_grad_(False)
    with turned_weights(policy.lm, B):
        assert [layer.weight.is_contiguous() for layer in layers] == [False, True] + [False] * 7


def test_few_rows_turn_no_weights():
    policy = tiny_policy("neox")
    with turned_weights(policy.lm, B - 1):
        assert all(layer.weight.is_contiguous() for layer in large_layers(policy.lm))


def test_a_layer_that_computes_more_is_not_laid_out():
    """A packed copy of its weight would compute W x + b alone."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4))
    assert large_layers(model) == [model[0]]


# -------------------------------------------------------------------------------------- bfloat16


@needs_packing
@pytest.mark.parametrize("rank", [0, 2])
def test_packed_weights_sample_the_same_to_the_last_bit(policy, monkeypatch, rank):
    if rank:
        add_lora(policy.lm, rank=rank)
        for layer in adapters(policy.lm).values():
            layer.lora_B.data.normal_()
    plain = roll_as_it_lies(policy, monkeypatch, bfloat16=True)
    packed = roll(policy, bfloat16=True)
    for name, tensor in vars(plain).items():
        assert torch.equal(getattr(packed, name), tensor), name


@needs_packing
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_gives_what_autocast_gives(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24, bias=bias))
    for n_rows in (1, 5, 64):
        x = torch.randn(n_rows, 2, 40)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = model(x)
            with packed_weights(model, 64):
                assert "forward" in vars(model[0])
                found = model(x)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)


@needs_packing
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_adapter_gives_what_autocast_gives(bias):
    """In float32, as a norm puts it out, and in bfloat16, as attention does."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 24, bias=bias)
    model = nn.Sequential(LoRA(layer, torch.randn(3, 40), torch.randn(24, 3), 5.0, 0.0))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 2, 40).to(dtype)
        before = x.clone()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = model(x)
            without = layer(x)
            with packed_weights(model, 10):
                assert "forward" in vars(model[0])
                found = model(x)
        assert not torch.equal(expected, without)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)
        assert torch.equal(x, before)


@needs_packing
def test_an_adapter_that_is_off_stays_off():
    model = nn.Sequential(LoRA(nn.Linear(40, 24), torch.randn(3, 40), torch.randn(24, 3), 5.0, 0.0))
    x = torch.randn(5, 40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), adapters_off(model):
        expected = model[0].base_layer(x)
        with packed_weights(model, 5):
            assert torch.equal(model(x), expected)


def test_without_the_operators_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(weight_layout, "can_pack", lambda: False)
    policy = tiny_policy("neox")
    before = describe(policy)
    with packed_weights(policy.lm, B):
        assert describe(policy) == before
    assert roll(policy, bfloat16=True).response_ids.max() < V

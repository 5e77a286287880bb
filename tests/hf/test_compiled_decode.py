"""nanorlhf.hf.compiled_decode against the static loop of hf/decode.py, and against autocast.

B sequences, P prompt tokens, R response tokens
"""

import pytest
import torch
from tiny_models import ARCHITECTURES, random_rows, tiny_lm, tiny_policy
from torch.utils._python_dispatch import TorchDispatchMode

from nanorlhf.hf.blocks import freeze, sampling, speed_up
from nanorlhf.hf.compiled_decode import cast_linear, is_compiled
from nanorlhf.hf.lora import adapters, add_lora, linear_layers
from nanorlhf.rollout import generate, left_pad

CPU = torch.device("cpu")
IDS, MASK = left_pad(random_rows((5, 2, 7, 1, 3, 4), seed=4), 0)

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def adapted_policy(architecture):
    """A policy with adapters that change what it computes."""
    policy = tiny_policy(architecture)
    add_lora(policy.lm, rank=2, dropout=0.5)
    for adapter in adapters(policy.lm).values():
        torch.nn.init.normal_(adapter.lora_B)
    return policy


def in_bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


@torch.no_grad()
def compute_logits(policy):
    return policy.logits(policy.lm.base_model(input_ids=IDS).last_hidden_state)


# --------------------------------------------------------------------------------- the weights


@each_architecture
@pytest.mark.parametrize("make", [tiny_policy, adapted_policy])
def test_copies_of_weights_compute_what_autocast_does(architecture, make):
    """To the last bit; also after the weights have changed, with the same copies."""
    policy = make(architecture)
    addresses = []
    for _ in range(2):
        with in_bfloat16():
            expected = compute_logits(policy)
            with cast_linear(policy, "cpu"):
                assert torch.equal(compute_logits(policy), expected)
        addresses.append([copy.data_ptr() for _, _, copy in policy.linear_copies])
        for layer in linear_layers(policy.lm).values():
            layer.weight.data.mul_(1.1)
    assert addresses[0] == addresses[1]
    assert len(addresses[0]) >= 2 * 4 + 1  # four layers of each block, and the head


class CountCasts(TorchDispatchMode):
    """Count the casts of float32 tensors to bfloat16 that are weights, by their data's place."""

    def __init__(self, weights):
        super().__init__()
        self.places = {weight.data_ptr() for weight in weights}
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_to_copy" in str(function) and args[0].data_ptr() in self.places:
            self.count += 1
        return function(*args, **(kwargs or {}))


@each_architecture
def test_no_weight_is_cast_while_copies_stand_in_for_it(architecture):
    """Frozen weights are: autocast caches casts of trained ones alone."""
    policy = tiny_policy(architecture)
    policy.requires_grad_(False)
    weights = [layer.weight for layer in linear_layers(policy.lm).values()]
    casts = CountCasts(weights)
    with in_bfloat16():
        with casts:
            compute_logits(policy)
        assert casts.count == len(weights)
        with cast_linear(policy, "cpu"), casts:
            compute_logits(policy)
    assert casts.count == len(weights)


@each_architecture
@pytest.mark.parametrize("fails", [False, True])
def test_the_weights_come_back(architecture, fails):
    """The optimizer's own tensors, after an error too."""
    policy = tiny_policy(architecture)
    freeze(policy.lm, 0.5)
    before = list(policy.named_parameters())
    values = [p.clone() for _, p in before]
    needs_grad = [p.requires_grad for _, p in before]
    head = policy.lm.get_output_embeddings()
    try:
        with in_bfloat16(), cast_linear(policy, "cpu"):
            assert head.weight.dtype == torch.bfloat16
            # Also where the head is tied to them, as in GPT-2.
            assert policy.lm.get_input_embeddings().weight.dtype == torch.float32
            if fails:
                raise KeyError
    except KeyError:
        pass
    after = list(policy.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    for (_, p), (_, own), value in zip(after, before, values):
        assert p is own
        assert torch.equal(p, value)
    assert [p.requires_grad for _, p in after] == needs_grad


def test_what_is_in_bfloat16_already_is_not_copied():
    policy = tiny_policy("llama")
    block = policy.lm.model.layers[0]
    block.mlp.to(torch.bfloat16)
    with in_bfloat16(), cast_linear(policy, "cpu"):
        copied = {layer for layer, _, _ in policy.linear_copies}
    assert block.mlp.up_proj not in copied
    assert block.self_attn.q_proj in copied


def test_nothing_is_copied_without_autocast():
    policy = tiny_policy("neox")
    with cast_linear(policy, "cpu"):
        assert policy.lm.get_output_embeddings().weight.dtype == torch.float32
    assert policy.linear_copies is None


# --------------------------------------------------------------------------------- rollouts


def roll(policy, ids=IDS, mask=MASK, new=12, **options):
    """A rollout with shapes that never change, in bfloat16, as a GPU makes it."""
    with in_bfloat16(), sampling(policy.lm):
        return generate(policy, ids, mask, new, static=True, **options)


def same_rollouts(a, b, tol=0.0):
    for name in ("response_ids", "response_mask", "finished"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("logprobs", "entropies", "values"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=tol)


@each_architecture
@pytest.mark.parametrize("make", [tiny_policy, adapted_policy])
def test_rollouts_are_those_of_the_static_loop(architecture, make):
    policy = make(architecture)
    expected = roll(policy)
    policy.lm.compiled = True
    same_rollouts(roll(policy), expected)
    assert policy.linear_copies


# ---------------------------------------------------------------------------------- which models


def test_which_models_decode_with_compiled_blocks():
    lm = tiny_lm("neox")
    assert not is_compiled(lm)
    speed_up(lm, CPU, "float32", compile=True)
    assert is_compiled(lm)
    # FSDP's units have this method.
    lm.gpt_neox.layers[0].unshard = print
    assert not is_compiled(lm)

    del lm.gpt_neox.layers[0].unshard
    assert is_compiled(lm)
    # transformers says so of architectures that cannot have a static cache.
    lm._can_compile_fullgraph = False
    assert not is_compiled(lm)

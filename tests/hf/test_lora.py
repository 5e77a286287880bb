"""nanorlhf.hf.lora and nanorlhf.hf.adapters: closed forms in float64, an adapter written by hand in
PEFT's layout, and tiny runs of the scripts.

    B sequences, R response tokens, T tokens of a packed row, D hidden, V vocabulary, r rank
"""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from checks import same
from safetensors.torch import load_file, save_file
from support import (
    SCRIPTS,
    assert_bit_equal,
    assert_close_runs,
    drive,
    join,
    metrics,
    ranks,
    summary,
    write_rows,
)
from tiny_models import (
    ARCHITECTURES,
    BATCH,
    MASK,
    SIZE,
    D,
    gradients,
    tiny_lm,
    tiny_policy,
    word_tokenizer,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, RobertaConfig
from transformers.pytorch_utils import Conv1D

import nanorlhf.models
import train_rm
import train_sft
from nanorlhf import world
from nanorlhf.errors import InputError
from nanorlhf.hf.adapters import load_adapter, save_adapter
from nanorlhf.hf.blocks import trainable
from nanorlhf.hf.folders import check_model
from nanorlhf.hf.lora import LoRA, adapters, adapters_off, add_lora, choose_trained, matching, merge
from nanorlhf.models import (
    Policy,
    WithoutAdapters,
    fingerprint,
    knows_scale,
    load_policy,
    load_reward_model,
    load_tokenizer,
    pretrained,
    save_policy,
    save_reward_model,
)
from nanorlhf.runtime import log

# The linear layers of a block, by the last parts of their names.
LINEARS = {
    "neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "gpt2": ("c_attn", "c_proj", "c_fc", "c_proj"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
# One of them, which a block has once.
ONE = {"neox": "query_key_value", "llama": "q_proj", "gpt2": "c_attn"}
# The head's name: transformers has changed it.
LM_HEAD = "embed_out|lm_head"
NAN = float("nan")

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def shake(lm):
    """Put adapters (and a head) far from their start, so that they can be told from none."""
    generator = seeded(7)
    for name, p in trainable(lm):
        if "lora_B" in name or "score" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return lm


def make_lora_lm(architecture, pattern=("all-linear",), rank=3):
    """A tiny model with adapters, as they are at the start."""
    lm = tiny_lm(architecture)
    add_lora(lm, pattern, rank=rank, alpha=5.0)
    return lm


def make_lora_policy(base, value_head=True, rank=3, alpha=5.0, **options):
    """The policy in a folder, with adapters and a value head that are far from their start."""
    policy = load_policy(base, value_head)
    add_lora(policy.lm, rank=rank, alpha=alpha, **options)
    shake(policy.lm)
    if value_head:
        policy.value_head.weight.data.normal_(generator=seeded(1))
    return policy


@torch.no_grad()
def compute_logits(lm):
    return lm(input_ids=BATCH.ids).logits


def compute_logprobs(policy):
    return policy(BATCH, MASK)["logprobs"]


def largest_difference(a, b):
    return (a - b).abs().max().item()


def assert_equal_parameters(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{architecture: the folder of a policy}"""
    root = tmp_path_factory.mktemp("bases")
    folders = {}
    for name in ARCHITECTURES:
        folders[name] = str(root / name)
        save_policy(tiny_policy(name, value_head=False), word_tokenizer(), folders[name])
    return folders


# ------------------------------------------------------------------------------------- one layer


def make_layer(conv):
    """A linear layer from 4 to 5 numbers; GPT-2's Conv1D stores its weight as [in, out]."""
    if conv:
        return Conv1D(5, 4)
    return nn.Linear(4, 5)


def adapted_by_loops(W, b, A, B, scale, x):
    """y = W x + b + scale B A x, number by number: x [n, in] -> [n, out]."""
    n_out, n_in = W.shape
    r = len(A)
    y = torch.zeros(len(x), n_out).double()
    for i in range(len(x)):
        for o in range(n_out):
            y[i, o] = b[o]
            for j in range(n_in):
                y[i, o] += W[o, j] * x[i, j]
                for k in range(r):
                    y[i, o] += scale * B[o, k] * A[k, j] * x[i, j]
    return y


def close_in_float64(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("conv", [False, True])
def test_the_closed_form_and_its_gradients(conv):
    torch.manual_seed(0)
    layer = make_layer(conv).requires_grad_(False)
    A = torch.randn(2, 4)
    B = torch.randn(5, 2)
    x = torch.randn(3, 4).double()
    adapted = LoRA(layer, A, B, alpha=3.0, dropout=0.0).double()
    A = A.double()
    B = B.double()
    W = layer.weight.T if conv else layer.weight  # [out, in]
    scale = 3.0 / 2  # alpha / r
    expected = adapted_by_loops(W, layer.bias, A, B, scale, x)
    y = adapted(x)
    close_in_float64(y, expected)

    # With g = dL/dy:  dL/dB = s g' (x A'),  dL/dA = s (g B)' x.
    g = torch.randn(3, 5).double()
    (y * g).sum().backward()
    close_in_float64(adapted.lora_B.grad, scale * g.T @ (x @ A.T))
    close_in_float64(adapted.lora_A.grad, scale * (g @ B).T @ x)
    assert layer.weight.grad is None
    assert layer.bias.grad is None

    merged = adapted.merged()
    assert merged is layer
    close_in_float64(merged(x), expected)


def test_dropout_is_of_the_adapter_alone():
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    x = torch.randn(4, 6)
    A = torch.randn(2, 6)
    B = torch.randn(6, 2)
    adapted = LoRA(layer, A, B, alpha=4.0, dropout=0.5)

    torch.manual_seed(3)
    y = adapted(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    assert (dropped == 0).any()
    same(y, layer(x) + 2.0 * dropped @ A.T @ B.T)
    # In eval mode nothing is dropped.
    same(adapted.eval()(x), layer(x) + 2.0 * x @ A.T @ B.T)


def test_an_adapter_enters_in_the_mode_that_its_layer_is_in():
    layer = nn.Linear(6, 6).eval()
    adapted = LoRA(layer, torch.randn(2, 6), torch.randn(6, 2), 4.0, 0.5)
    assert not adapted.training


@pytest.mark.parametrize("architecture", ["neox", "gpt2"])
def test_autocast_computes_in_half_precision_and_trains_in_full(architecture):
    lm = shake(make_lora_lm(architecture, rank=4))
    policy = Policy(lm)
    exact = compute_logprobs(policy)
    with torch.autocast("cpu", torch.bfloat16):
        found = compute_logprobs(policy)
    assert 1e-4 < largest_difference(found, exact) < 0.5

    found.sum().backward()
    for _, p in trainable(lm):
        assert p.dtype == torch.float32
        assert p.grad.dtype == torch.float32
        assert p.grad.abs().max() > 0


@pytest.mark.parametrize("conv", [False, True])
def test_autocast_computes_what_it_would_with_one_cast_of_each(conv):
    """To the last bit; the gradient of x is the sum of two, which autocast's type rounds."""
    torch.manual_seed(0)
    layer = make_layer(conv).requires_grad_(False)
    adapted = LoRA(layer, torch.randn(2, 4), torch.randn(5, 2), alpha=3.0, dropout=0.0)
    x = torch.randn(7, 3, 4, requires_grad=True)
    g = torch.randn(7, 3, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted(x)
        own = layer(x)
    A = adapted.lora_A.bfloat16()
    B = adapted.lora_B.bfloat16()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, own + 1.5 * (x.bfloat16() @ A.T) @ B.T)

    y.backward(g)
    W = layer.weight.T if conv else layer.weight  # [out, in]
    exact = g.double() @ (W + 1.5 * adapted.lora_B @ adapted.lora_A).double()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad.double(), exact, rtol=0.03, atol=0.03)


def test_adapters_of_a_model_in_half_precision_are_in_full():
    half = tiny_lm("llama").to(torch.bfloat16)
    add_lora(half, rank=2)
    for _, p in trainable(half):
        assert p.dtype == torch.float32
    assert compute_logits(shake(half)).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------ in a model


@each_architecture
def test_all_linear_layers_are_those_of_the_blocks(architecture):
    lm = tiny_lm(architecture)
    every = matching(lm, "all-linear")
    last_parts = [name.split(".")[-1] for name in every]
    assert sorted(last_parts) == sorted(2 * LINEARS[architecture])
    # A pattern may name the output head too.
    everything = matching(lm, ".*")
    (head,) = everything.keys() - every.keys()
    assert everything[head] is lm.get_output_embeddings()


@each_architecture
def test_a_list_names_whole_parts_at_the_end_of_a_name(architecture):
    lm = tiny_lm(architecture)
    one = ONE[architecture]
    every = list(matching(lm, "all-linear"))
    of_that_name = [name for name in every if name.endswith(f".{one}")]
    assert len(of_that_name) == 2
    assert list(matching(lm, [one])) == of_that_name
    assert list(matching(lm, [every[1]])) == [every[1]]
    assert list(matching(lm, [r"\.0\..*"])) == []


@each_architecture
def test_a_string_is_a_pattern_for_the_whole_name(architecture):
    lm = tiny_lm(architecture)
    one = ONE[architecture]
    assert not matching(lm, one)
    # The block's number stands in the name.
    first_block, _ = matching(lm, [one])
    assert list(matching(lm, rf".*\.0\..*{one}")) == [first_block]


@each_architecture
def test_training_starts_from_the_model_as_it_is(architecture):
    lm = tiny_lm(architecture)
    before = compute_logits(lm)
    add_lora(lm, rank=3, alpha=5.0, dropout=0.2)
    # B is 0.
    assert torch.equal(compute_logits(lm), before)
    for layer in adapters(lm).values():
        assert (layer.lora_B == 0).all()
        # The model was in eval mode.
        assert not layer.training
        # A ~ U(-1 / sqrt(in), 1 / sqrt(in)).
        bound = layer.lora_A.shape[1] ** -0.5
        largest = layer.lora_A.abs().max()
        assert largest > bound * 0.8
        assert largest <= bound
        assert layer.lora_A.mean().abs() < bound / 4


@each_architecture
def test_only_adapters_are_trained(architecture):
    lm = tiny_lm(architecture)
    note = add_lora(lm, rank=3, alpha=5.0)
    layers = adapters(lm).values()
    last_parts = [name.split(".")[-1] for name, _ in trainable(lm)]
    assert sorted(last_parts) == ["lora_A"] * len(layers) + ["lora_B"] * len(layers)

    # A has r x in numbers, B has out x r.
    n_numbers = 0
    for layer in layers:
        n_numbers += 3 * sum(layer.base_layer.weight.shape)
    assert f"{n_numbers:,} trained" in note
    assert "rank 3" in note
    assert f"{2 * len(LINEARS[architecture])} linear layers" in note


@each_architecture
def test_adapters_have_gradients_and_what_is_frozen_has_none(architecture):
    lm = shake(make_lora_lm(architecture))
    lm(input_ids=BATCH.ids).logits.square().sum().backward()
    for p in lm.parameters():
        if p.requires_grad:
            assert p.grad.abs().max() > 0
        else:
            assert p.grad is None


@each_architecture
def test_with_adapters_off_the_model_is_as_it_was(architecture):
    before = compute_logits(tiny_lm(architecture))
    lm = shake(make_lora_lm(architecture))
    changed = compute_logits(lm)
    assert largest_difference(changed, before) > 0.1
    with adapters_off(lm):
        assert torch.equal(compute_logits(lm), before)
        with adapters_off(lm):
            pass
        # The inner one did not switch them on.
        assert torch.equal(compute_logits(lm), before)
    assert torch.equal(compute_logits(lm), changed)


def test_adapters_are_on_again_after_an_error():
    lm = shake(make_lora_lm("neox"))
    changed = compute_logits(lm)
    with pytest.raises(RuntimeError), adapters_off(lm):
        raise RuntimeError
    assert torch.equal(compute_logits(lm), changed)


def module_types(lm):
    return {name: type(module) for name, module in lm.named_modules()}


@each_architecture
def test_a_merged_model_is_a_plain_one_that_computes_the_same(architecture):
    plain = tiny_lm(architecture)
    lm = shake(make_lora_lm(architecture))
    changed = compute_logits(lm)
    assert merge(lm) is lm
    same(compute_logits(lm), changed)
    assert not adapters(lm)
    assert module_types(lm) == module_types(plain)
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in lm.named_parameters()] == names


def draw_adapters(seed, noise=0):
    """The A of all adapters, drawn while torch's own generator stands at `noise`."""
    lm = tiny_lm("neox")
    torch.manual_seed(noise)
    state = torch.get_rng_state()
    add_lora(lm, rank=2, seed=seed)
    assert torch.equal(state, torch.get_rng_state())
    return [layer.lora_A for layer in adapters(lm).values()]


def test_the_seed_draws_A_and_nothing_else_does():
    first = draw_adapters(seed=1)
    for a, again in zip(first, draw_adapters(seed=1, noise=5), strict=True):
        assert torch.equal(a, again)
    for a, other in zip(first, draw_adapters(seed=2), strict=True):
        assert not torch.equal(a, other)
    # Each layer has its own.
    assert not torch.equal(first[0], first[2][:, :D])


def test_the_head_can_have_an_adapter():
    plain = Policy(tiny_lm("neox"), value_head=False)
    policy = Policy(shake(make_lora_lm("neox", [LM_HEAD, "dense"])), value_head=False)
    assert isinstance(policy.lm.get_output_embeddings(), LoRA)
    assert largest_difference(compute_logprobs(policy), compute_logprobs(plain)) > 0.1
    without = WithoutAdapters(policy)
    assert torch.equal(compute_logprobs(without), compute_logprobs(plain))


def full_kl_and_gradients(policy, reference):
    out = policy(BATCH, MASK, 0.7, kl_to=reference)
    loss = (out["full_kl"] - 0.1 * out["logprobs"]).sum()
    return out["full_kl"], gradients(policy, loss)


@pytest.mark.parametrize("chunk", [2**24, 180])
def test_the_reference_of_full_kl_is_as_good_as_a_second_copy(monkeypatch, chunk):
    """The policy with adapters off inside the policy's own forward, in recomputed chunks too."""
    monkeypatch.setattr(nanorlhf.models, "MAX_LOGITS", {"cpu": chunk})
    policy = Policy(shake(make_lora_lm("llama", ["q_proj", "lm_head", "down_proj"])))
    second_copy = Policy(tiny_lm("llama"), value_head=False)
    kl, kl_gradients = full_kl_and_gradients(policy, WithoutAdapters(policy))
    expected, expected_gradients = full_kl_and_gradients(policy, second_copy)

    assert torch.equal(kl, expected)
    assert kl[MASK].min() > 1e-3
    for gradient, expected_gradient in zip(kl_gradients, expected_gradients, strict=True):
        assert torch.equal(gradient, expected_gradient)
    assert kl_gradients[0].abs().max() > 0


@pytest.mark.parametrize(
    "architecture, options, words",
    [
        ("neox", {"pattern": ["q_proj"]}, "q_proj.*GPTNeoXForCausalLM.*query_key_value"),
        ("neox", {"pattern": ["query_key_value", "q_proj"]}, "q_proj"),
        ("gpt2", {"pattern": ["wte"]}, "wte"),  # not a linear layer
        ("llama", {"pattern": ["*proj"]}, "regular expression"),
        ("gpt2", {"pattern": ["lm_head"]}, "tied"),
    ],
)
def test_wrong_adapters_are_one_line(architecture, options, words):
    with pytest.raises(InputError, match=words) as e:
        add_lora(tiny_lm(architecture), **options)
    assert "\n" not in str(e.value)


def test_a_model_has_adapters_once():
    with pytest.raises(InputError, match="already"):
        add_lora(make_lora_lm("neox"))


@pytest.mark.parametrize("pattern", ["(", "a{1,99999999999999999999}", "(?P<a"])
def test_a_pattern_is_a_regular_expression(pattern):
    with pytest.raises(InputError, match="not a regular expression"):
        add_lora(tiny_lm("neox"), [pattern])


# ------------------------------------------------------------------------- in folders, by hand

# What peft 0.21.2 writes for LoraConfig(r=2, lora_alpha=6, target_modules=["c_attn"],
# task_type="CAUSAL_LM"), field by field.
PEFT_CONFIG = """{
  "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null,
  "auto_mapping": null, "base_model_name_or_path": "BASE", "bias": "none", "corda_config": null,
  "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null,
  "fan_in_fan_out": true, "inference_mode": true, "init_lora_weights": true, "kasa_config": null,
  "layer_replication": null, "layers_pattern": null, "layers_to_transform": null,
  "loftq_config": {}, "lora_alpha": 6, "lora_bias": false, "lora_dropout": 0.0,
  "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core",
  "modules_to_save": null, "monteclora_config": null, "peft_type": "LORA",
  "peft_version": "0.21.2", "qalora_group_size": 16, "r": 2, "rank_pattern": {},
  "revision": null, "target_modules": ["c_attn"], "target_parameters": null,
  "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_bdlora": null,
  "use_dora": false, "use_qalora": false, "use_rslora": false, "velora_config": null}"""

# PEFT's names of the tensors of GPT-2's second block.
LAYER = "base_model.model.transformer.h.1.attn.c_attn."
A_NAME = LAYER + "lora_A.weight"
B_NAME = LAYER + "lora_B.weight"


def read_adapter_config(folder):
    return json.loads((Path(folder) / "adapter_config.json").read_text())


def read_adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def write_adapter(folder, base, **changes):
    """An adapter for tiny GPT-2's c_attn as PEFT lays it out, with changes of its config."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(PEFT_CONFIG) | {"base_model_name_or_path": base} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    tensors = {}
    for i in (0, 1):
        name = f"base_model.model.transformer.h.{i}.attn.c_attn"
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, 32)
        tensors[f"{name}.lora_B.weight"] = torch.randn(96, 2) / 10
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


@pytest.fixture
def by_hand(bases, tmp_path):
    """The folder of an adapter that was written by hand, on the base of tiny GPT-2."""
    write_adapter(tmp_path, bases["gpt2"])
    return tmp_path


def merge_by_hand(base, folder):
    """The base model with alpha / r B A added to its weights: alpha = 6, r = 2."""
    lm = AutoModelForCausalLM.from_pretrained(base)
    tensors = read_adapter(folder)
    for i, block in enumerate(lm.transformer.h):
        name = f"base_model.model.transformer.h.{i}.attn.c_attn"
        A = tensors[f"{name}.lora_A.weight"]
        B = tensors[f"{name}.lora_B.weight"]
        block.attn.c_attn.weight.data += 6 / 2 * (B @ A).T  # Conv1D's weight is [in, out]
    return lm


def test_an_adapter_in_pefts_layout_is_read_and_merged(bases, by_hand):
    expected = compute_logits(merge_by_hand(bases["gpt2"], by_hand))
    policy = load_policy(str(by_hand))
    same(compute_logits(policy.lm), expected)
    assert largest_difference(expected, compute_logits(tiny_lm("gpt2"))) > 0.1
    # It is a plain model, for the next stage to train.
    assert not adapters(policy.lm)
    for p in policy.parameters():
        assert p.requires_grad


def test_config_and_tokenizer_are_the_base_models(by_hand):
    """The folder has neither."""
    assert check_model(str(by_hand)).model_type == "gpt2"
    vocabulary = word_tokenizer().get_vocab()
    assert load_tokenizer(str(by_hand)).get_vocab() == vocabulary


def second_c_attn(trunk):
    return trunk.h[1].attn.c_attn.weight


def test_reward_models_and_value_models_start_from_the_merged_trunk(bases, by_hand):
    merged = second_c_attn(load_policy(str(by_hand)).lm.transformer)
    # The trunk, with a new head.
    reward_model = load_reward_model(str(by_hand), seed=0).model
    assert torch.equal(second_c_attn(reward_model.transformer), merged)
    policy = load_policy(bases["neox"], value_model=str(by_hand))
    assert torch.equal(second_c_attn(policy.value_trunk), merged)


def test_target_modules_may_be_a_regular_expression(bases, by_hand):
    expected = compute_logits(load_policy(str(by_hand)).lm)
    write_adapter(by_hand, bases["gpt2"], target_modules=r".*\.attn\.c_attn")
    assert torch.equal(compute_logits(load_policy(str(by_hand)).lm), expected)


def test_a_policy_is_written_in_pefts_layout(bases, tmp_path):
    policy = make_lora_policy(bases["gpt2"], pattern=["c_attn"], rank=2, alpha=6.0, dropout=0.1)
    save_policy(policy, word_tokenizer(), str(tmp_path))
    names = set(os.listdir(tmp_path))
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "nanorlhf.json"}
    assert names >= {"tokenizer.json", "value_head.safetensors"}
    # transformers would take config.json for that of a whole model.
    assert not names & {"config.json", "model.safetensors"}

    tensors = read_adapter(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {}
    for i in (0, 1):
        name = f"base_model.model.transformer.h.{i}.attn.c_attn"
        expected[f"{name}.lora_A.weight"] = (2, 32)
        expected[f"{name}.lora_B.weight"] = (96, 2)
    assert shapes == expected
    assert torch.equal(tensors[B_NAME], policy.lm.transformer.h[1].attn.c_attn.lora_B)


def test_the_config_of_a_policy_is_what_peft_writes(bases, tmp_path):
    policy = make_lora_policy(bases["gpt2"], pattern=["c_attn"], rank=2, alpha=6.0, dropout=0.1)
    save_policy(policy, word_tokenizer(), str(tmp_path))
    config = read_adapter_config(tmp_path)
    expected = json.loads(PEFT_CONFIG)
    expected["base_model_name_or_path"] = bases["gpt2"]
    expected["lora_dropout"] = 0.1
    layers = ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    expected["target_modules"] = layers
    for field in config:
        assert config[field] == expected[field]

    # All that PEFT needs is there.
    assert config.keys() >= {"peft_type", "task_type", "r", "lora_alpha", "lora_dropout"}
    assert config.keys() >= {"target_modules", "fan_in_fan_out", "base_model_name_or_path"}
    assert config.keys() >= {"bias", "modules_to_save", "inference_mode"}


def test_a_reward_model_is_written_with_its_head(bases, tmp_path):
    reward_model = load_reward_model(bases["neox"], seed=0)
    assert "and the score head" in add_lora(reward_model.model, rank=2)
    others = [name for name, _ in trainable(reward_model.model) if "lora_" not in name]
    assert others == ["score.weight"]

    save_reward_model(reward_model, word_tokenizer(), str(tmp_path))
    config = read_adapter_config(tmp_path)
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["score"]
    assert config["fan_in_fan_out"] is False
    assert read_adapter(tmp_path)["base_model.model.score.weight"].shape == (1, D)


# --------------------------------------------------------------------- in folders, there and back


@pytest.fixture(scope="module", params=ARCHITECTURES)
def saved(request, bases, tmp_path_factory):
    """A policy with adapters, and the folder in which it was saved."""
    base = bases[request.param]
    path = str(tmp_path_factory.mktemp("saved") / "policy")
    policy = make_lora_policy(base, alpha=5.5)
    save_policy(policy, word_tokenizer(), path)
    return SimpleNamespace(architecture=request.param, base=base, policy=policy, path=path)


def test_a_saved_policy_computes_the_same(saved):
    loaded = load_policy(saved.path)
    found = loaded(BATCH, MASK)
    for name, expected in saved.policy(BATCH, MASK).items():
        same(found[name], expected)
    assert torch.equal(loaded.value_head.weight, saved.policy.value_head.weight)


def test_adapters_can_be_loaded_without_merging_them(saved):
    unmerged = load_adapter(load_policy(saved.base).lm, saved.path)
    assert torch.equal(compute_logits(unmerged), compute_logits(saved.policy.lm))
    assert len(adapters(unmerged)) == len(adapters(saved.policy.lm))


def test_an_adapter_on_top_of_an_adapter(saved, tmp_path):
    second = make_lora_policy(saved.path, pattern=[ONE[saved.architecture]], rank=1)
    save_policy(second, word_tokenizer(), str(tmp_path))
    assert read_adapter_config(tmp_path)["base_model_name_or_path"] == saved.path

    third = load_policy(str(tmp_path))
    same(compute_logits(third.lm), compute_logits(second.lm))
    first = load_policy(saved.path)
    assert largest_difference(compute_logits(third.lm), compute_logits(first.lm)) > 0.05


@torch.no_grad()
def test_a_reward_model_on_top_of_an_adapter(saved, bases, tmp_path):
    reward_model = load_reward_model(saved.path, seed=0)
    add_lora(reward_model.model, rank=2)
    shake(reward_model.model)
    scores = reward_model(BATCH)
    reward_model.standardise(scores.mean().item(), scores.std().item())
    save_reward_model(reward_model, word_tokenizer(), str(tmp_path / "rm"))

    loaded = load_reward_model(str(tmp_path / "rm"))
    scores = loaded(BATCH)
    same(scores, reward_model(BATCH))
    mean = loaded.model.config.reward_mean
    assert mean == reward_model.model.config.reward_mean
    assert mean != 0
    assert loaded.model.config.reward_std == reward_model.model.config.reward_std
    assert knows_scale(str(tmp_path / "rm"))
    assert not knows_scale(saved.path)  # the adapter of a policy
    assert abs(scores.mean()) < 1e-4
    assert abs(scores.std() - 1) < 1e-4

    # Saved again it is merged: a plain folder, with the mean in config.json.
    save_reward_model(loaded, word_tokenizer(), str(tmp_path / "plain"))
    same(load_reward_model(str(tmp_path / "plain"))(BATCH), scores)

    # A value model starts from its trunk.
    trunk = load_policy(bases["llama"], value_model=str(tmp_path / "rm")).value_trunk
    found = trunk(input_ids=BATCH.ids).last_hidden_state
    expected = loaded.model.base_model(input_ids=BATCH.ids).last_hidden_state
    assert torch.equal(found, expected)


def test_an_encoders_classifier_is_saved_whole(tmp_path):
    """A judge of entailment has such a head, of two layers."""
    auto = AutoModelForSequenceClassification
    torch.manual_seed(0)
    lm = auto.from_config(RobertaConfig(**SIZE, num_labels=3)).eval()
    lm.save_pretrained(tmp_path / "base")
    assert "classifier.dense" not in matching(lm, ["dense"])
    add_lora(lm, ["query"], rank=2)
    for p in lm.classifier.parameters():
        p.data.add_(torch.rand_like(p))

    save_adapter(lm, str(tmp_path / "adapter"), str(tmp_path / "base"))

    loaded = pretrained(auto, str(tmp_path / "adapter"))
    same(loaded(input_ids=BATCH.ids).logits, lm(input_ids=BATCH.ids).logits)


def test_a_mean_of_0_takes_the_place_of_the_base_models(bases, tmp_path):
    base = load_reward_model(bases["neox"], seed=0)
    base.standardise(0.5, 2.0)
    save_reward_model(base, word_tokenizer(), str(tmp_path / "base"))
    reward_model = load_reward_model(str(tmp_path / "base"), seed=1)
    add_lora(reward_model.model, rank=2)
    save_reward_model(reward_model, word_tokenizer(), str(tmp_path / "rm"))
    same(load_reward_model(str(tmp_path / "rm"))(BATCH), reward_model(BATCH))


def test_a_reward_model_needs_no_adapter_on_the_lm_head(bases, tmp_path):
    policy = make_lora_policy(bases["neox"], pattern=[LM_HEAD, "dense"])
    save_policy(policy, word_tokenizer(), str(tmp_path))
    merged = load_policy(str(tmp_path)).lm
    same(compute_logits(merged), compute_logits(policy.lm))
    reward_model = load_reward_model(str(tmp_path), seed=0).model
    assert_equal_parameters(reward_model.gpt_neox, merged.gpt_neox)


@pytest.fixture
def runs(bases, tmp_path, monkeypatch):
    """A folder with sft/ and, on top of it, ppo/, saved from inside by relative paths; and the
    logits of the policy in ppo/."""
    shutil.copytree(bases["neox"], tmp_path / "runs/sft/model")
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        policy = make_lora_policy("runs/sft")
        save_policy(policy, word_tokenizer(), "runs/ppo/model")
    return tmp_path / "runs", compute_logits(policy.lm)


def test_the_base_is_named_by_its_whole_path(runs):
    """The adapter can be loaded from another working directory."""
    folder, expected = runs
    config = read_adapter_config(folder / "ppo/model")
    assert config["base_model_name_or_path"] == str(folder / "sft/model")
    same(compute_logits(load_policy(str(folder / "ppo")).lm), expected)


def test_base_and_adapter_can_be_moved_together(runs):
    folder, expected = runs
    before = fingerprint(str(folder / "ppo"))
    moved = folder.rename(folder.parent / "elsewhere")
    same(compute_logits(load_policy(str(moved / "ppo")).lm), expected)
    assert fingerprint(str(moved / "ppo")) == before


def test_a_fingerprint_is_of_the_base_model_too(runs):
    """So is a pool of answers."""
    folder, _ = runs
    before = fingerprint(str(folder / "ppo"))
    weights = folder / "sft/model/model.safetensors"
    changed = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(changed, weights)
    assert fingerprint(str(folder / "ppo")) != before


@pytest.mark.parametrize("function", [check_model, load_policy])
def test_a_base_that_is_gone_is_named(runs, function):
    folder, _ = runs
    moved = folder.rename(folder.parent / "elsewhere")
    shutil.rmtree(moved / "sft")
    with pytest.raises(InputError, match="runs/sft/model is gone.*base_model_name_or_path"):
        function(str(moved / "ppo"))


# ----------------------------------------------------------------------------- in folders, broken


def check_refused(folder, words, functions):
    """Each of the functions says it in one line that names the folder."""
    for function in functions:
        with pytest.raises(InputError, match=words) as e:
            function(str(folder))
        message = str(e.value)
        assert "\n" not in message
        assert str(folder) in message


# What is wrong is found before any model is loaded, or only once the base is there.
EARLY = (check_model, load_policy)
LATE = (load_policy,)


def test_an_adapter_without_harm_is_read(by_hand):
    for function in EARLY:
        function(str(by_hand))


def test_a_start_that_leaves_the_base_as_it_is_is_read(bases, tmp_path):
    write_adapter(tmp_path, bases["gpt2"], init_lora_weights="gaussian")
    check_model(str(tmp_path))


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("peft_type", "IA3", "IA3"),
        ("r", None, ": r cannot be None"),
        ("r", 0, ": r cannot be 0"),
        ("r", -1, ": r cannot be -1"),
        ("r", "2", ": r cannot be '2'"),
        ("r", True, ": r cannot be True"),
        ("lora_alpha", "x", ": lora_alpha cannot be 'x'"),
        ("lora_alpha", NAN, "NaN is no finite number"),
        ("lora_alpha", 10**400, "lora_alpha cannot be 1000"),
        ("lora_dropout", 2, r"lora_dropout must lie in \[0, 1\)"),
        ("lora_dropout", 1, "lora_dropout must lie in"),
        ("lora_dropout", NAN, "NaN is no finite number"),
        ("target_modules", None, "target_modules cannot be None"),
        ("target_modules", 5, "target_modules cannot be 5"),
        ("target_modules", ["c_attn", 5], "target_modules cannot be"),
        ("base_model_name_or_path", None, "base_model_name_or_path cannot be None"),
        ("base_model_name_or_path", 5, "base_model_name_or_path cannot be 5"),
        ("base_model_name_or_path", "/no/such/base", "/no/such/base is gone"),
        ("modules_to_save", 5, "modules_to_save cannot be 5"),
        # What changes the equation, and is not computed here.
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("use_dora", True, "use_dora = True, which is not supported"),
        ("use_rslora", True, "use_rslora"),
        ("rank_pattern", {"c_attn": 4}, "rank_pattern"),
        ("alpha_pattern", {"c_attn": 4}, "alpha_pattern"),
        ("bias", "all", "bias = 'all'"),
        ("layers_to_transform", [0], "layers_to_transform"),
        ("init_lora_weights", "pissa", "init_lora_weights = 'pissa'"),
        ("use_magic", True, "use_magic"),  # a field of the future
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_adapter_config_may_not_say(bases, tmp_path, field, value, words):
    write_adapter(tmp_path, bases["gpt2"], **{field: value})
    check_refused(tmp_path, words, EARLY)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("r", 3, r"another model: .*c_attn.lora_A.weight is \[2, 32\], not \[3, 32\]"),
        ("target_modules", ["c_proj"], "its target_modules do not name the layer"),
        ("lora_alpha", 1e60, "holds numbers that are not finite"),
    ],
    ids=["r", "target_modules", "lora_alpha"],
)
def test_what_does_not_fit_the_tensors(bases, tmp_path, field, value, words):
    write_adapter(tmp_path, bases["gpt2"], **{field: value})
    check_refused(tmp_path, words, LATE)


@pytest.mark.parametrize(
    "notes, words",
    [
        ('{"base": 5}', "nanorlhf.json: base cannot be 5"),
        ('{"reward_mean": "0"}', "nanorlhf.json: reward_mean cannot be '0'"),
        ('{"reward_std": "1"}', "nanorlhf.json: reward_std cannot be '1'"),
        ('{"reward_std": 0}', "nanorlhf.json: reward_std cannot be 0"),
        ('{"reward_std": -2.5}', "nanorlhf.json: reward_std cannot be -2.5"),
        ("[]", "nanorlhf.json: not a JSON object"),
    ],
)
def test_what_our_own_notes_may_not_say(by_hand, notes, words):
    (by_hand / "nanorlhf.json").write_text(notes)
    check_refused(by_hand, words, EARLY)


@pytest.mark.parametrize(
    "content, words",
    [('{"r": 2, "lora', "adapter_config.json:1: not JSON"), ("[1]", "not a JSON object")],
)
def test_a_broken_adapter_config_is_refused(by_hand, content, words):
    (by_hand / "adapter_config.json").write_text(content)
    check_refused(by_hand, words, EARLY)


def test_missing_tensors_are_named(by_hand):
    (by_hand / "adapter_model.safetensors").unlink()
    check_refused(by_hand, "without adapter_model.safetensors", EARLY)


@pytest.mark.parametrize("share", [0.5, 0])
def test_a_cut_off_file_of_tensors_is_refused(by_hand, share):
    path = by_hand / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    check_refused(by_hand, "safetensors: cannot be", LATE)


SCORE = "base_model.model.score.weight"
EIGHTH_LAYER = "base_model.model.transformer.h.7.attn.c_attn.lora_A.weight"
WHOLE_NUMBERS = torch.ones(96, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    "name, tensor, words",
    [
        (B_NAME, torch.full((96, 2), NAN), "lora_B.weight holds numbers that are not finite"),
        (B_NAME, WHOLE_NUMBERS, "int32"),
        (A_NAME, torch.ones(2, 48), "another model"),
        # Tensors that have no place in the model.
        (SCORE, torch.ones(1, 32), "score.weight has no place"),
        (LAYER + "lora_magnitude_vector", torch.ones(96), "lora_magnitude_vector"),
        ("h.lora_A.weight", torch.ones(2, 2), "h.lora_A.weight is not supported"),
        (EIGHTH_LAYER, torch.ones(2, 32), "transformer.h.7.attn.c_attn.* has no place"),
    ],
    ids=["nan", "int32", "another size", "a head", "dora", "no prefix", "more layers"],
)
def test_a_tensor_that_does_not_fit_is_refused(by_hand, name, tensor, words):
    tensors = read_adapter(by_hand)
    tensors[name] = tensor
    save_file(tensors, by_hand / "adapter_model.safetensors")
    check_refused(by_hand, words, LATE)


@pytest.mark.parametrize(
    "names, words",
    [
        ([B_NAME], "lacks transformer.h.1.attn.c_attn.lora_B.weight"),
        ([A_NAME, B_NAME], "lacks transformer.h.1"),
    ],
    ids=["B", "a layer"],
)
def test_a_tensor_that_is_left_out_is_named(by_hand, names, words):
    tensors = read_adapter(by_hand)
    for name in names:
        del tensors[name]
    save_file(tensors, by_hand / "adapter_model.safetensors")
    check_refused(by_hand, words, LATE)


@pytest.mark.parametrize(
    "links",
    [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "b"}, {"a": "a/."}, {"a": "run"}],
    ids=str,
)
def test_adapters_in_a_circle_are_refused_at_every_door(tmp_path, links):
    """The base of the base of the base: it leads back, by other names of one folder too."""
    for name, base in links.items():
        write_adapter(tmp_path / name, f"{tmp_path}/{base}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model").symlink_to(tmp_path / "a")
    doors = (check_model, load_tokenizer, load_policy, fingerprint)
    check_refused(tmp_path / "a", "leads back to", doors)


def test_an_adapter_is_for_its_own_architecture(bases, tmp_path):
    write_adapter(tmp_path, bases["neox"])
    with pytest.raises(InputError, match="transformer.h.0.* has no place in GPTNeoXForCausalLM"):
        load_policy(str(tmp_path))


def test_a_policy_is_no_reward_model(by_hand):
    with pytest.raises(InputError, match="lacks the weights score.weight"):
        load_reward_model(str(by_hand))


def test_a_reward_model_is_no_policy(bases, tmp_path):
    reward_model = load_reward_model(bases["neox"], seed=0)
    add_lora(reward_model.model, rank=2)
    save_reward_model(reward_model, word_tokenizer(), str(tmp_path))
    with pytest.raises(InputError, match="of a reward model, not of a policy"):
        load_policy(str(tmp_path))


def test_an_adapter_with_a_head_of_several_labels_is_no_reward_model(bases, tmp_path):
    reward_model = load_reward_model(bases["neox"], seed=0)
    add_lora(reward_model.model, rank=2)
    save_reward_model(reward_model, word_tokenizer(), str(tmp_path))
    tensors = read_adapter(tmp_path)
    tensors["base_model.model.score.weight"] = torch.ones(2, D)
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"score.weight is \[2, {D}\], not \[1, {D}\]"):
        load_reward_model(str(tmp_path))


def test_an_adapter_is_saved_beside_a_saved_base(tmp_path):
    with pytest.raises(InputError, match="saved base model"):
        save_adapter(make_lora_lm("neox"), str(tmp_path), "")


# --------------------------------------------------------------------------------- in the scripts


@pytest.mark.parametrize(
    "kind, flags, words",
    [
        ("sft", {"model": "m", "merge": True}, "--merge"),
        ("rm", {"lora_rank": -1}, "--lora_rank"),
        ("rm", {"lora_rank": 2, "freeze_layers": 0.5}, "--freeze_layers"),
        ("ppo", {"lora_rank": 2, "lora_alpha": 0.0}, "--lora_alpha"),
        ("ppo", {"lora_rank": 2, "lora_dropout": 1.0}, "--lora_dropout"),
        ("sft", {"lora_rank": 2}, "starts at random"),
    ],
)
def test_flags_that_do_not_fit_are_refused(kind, flags, words):
    with pytest.raises(InputError, match=words):
        SCRIPTS[kind].Config(**flags)


def test_each_flag_reaches_the_adapters():
    config = train_sft.Config(
        model="m",
        lora_rank=2,
        lora_layers=["dense"],
        lora_alpha=6.0,
        lora_dropout=0.25,
        seed=5,
    )
    chosen = tiny_lm("neox")
    choose_trained(chosen, config)
    by_hand = tiny_lm("neox")
    add_lora(by_hand, pattern=["dense"], rank=2, alpha=6.0, dropout=0.25, seed=5)

    expected = adapters(by_hand)
    assert adapters(chosen).keys() == expected.keys()
    for name, layer in adapters(chosen).items():
        assert torch.equal(layer.lora_A, expected[name].lora_A)
        assert (layer.scale, layer.dropout.p) == (3.0, 0.25)


def small_flags(kind, chain):
    """The flags of a tiny run on what `chain` holds."""
    flags = {"batch_size": 8, "eval_size": 8, "lora_rank": 2, "warmup": 0}
    if kind == "sft":
        flags["model"] = f"{chain}/sft"
        flags["dataset"] = f"{chain}/sft.jsonl"
        flags |= {"max_new_tokens": 8, "n_samples": 1}
    elif kind == "rm":
        flags["model"] = f"{chain}/lora"
        flags["dataset"] = f"{chain}/pairs.jsonl"
    else:
        flags["model"] = f"{chain}/lora"
        flags["reward_model"] = [f"{chain}/rm"]
        flags |= {"steps": 2, "minibatch_size": 4, "ppo_epochs": 2, "max_new_tokens": 8}
        flags["lr"] = 3e-3
    return flags


def run(kind, chain, folder, **changes):
    """A tiny run of a script, with some flags changed -> the rows of its metrics."""
    flags = small_flags(kind, chain) | changes
    script = SCRIPTS[kind]
    script.main(script.Config(output_dir=str(folder), **flags))
    return metrics(folder)


# The run that makes lora/.
LORA_SFT = {"steps": 8, "lr": 1e-2, "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """sft/ (whole), lora/ (an adapter on it): what reward models and PPO start from. And small
    files of data."""
    root = tmp_path_factory.mktemp("chain")
    write_rows(root / "sft.jsonl", world.demonstrations(120))
    write_rows(root / "pairs.jsonl", world.preferences(120))
    rows = run("sft", root, root / "sft", model="world", steps=4, lora_rank=0)
    before = rows[-1]["eval/perplexity"]
    rows = run("sft", root, root / "lora", **LORA_SFT)
    assert rows[-1]["eval/perplexity"] < before - 5
    return root


@pytest.fixture(scope="module")
def scores(chain):
    """chain/rm, a reward model with LoRA on the folder of an adapter -> its scores of BATCH in
    memory, as it was saved."""
    scores = []
    save = train_rm.save_reward_model

    def record_and_save(reward_model, *rest):
        scores.append(reward_model(BATCH).detach())
        save(reward_model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rm, "save_reward_model", record_and_save)
        run("rm", chain, chain / "rm", steps=4, lr=1e-2)
    return scores[0]


def test_sft_moves_the_adapted_layers_alone(chain):
    base = load_policy(f"{chain}/sft").lm
    tuned = load_policy(f"{chain}/lora").lm
    assert largest_difference(compute_logits(base), compute_logits(tuned)) > 1e-2
    for (name, before), after in zip(base.named_parameters(), tuned.parameters()):
        layer, _, what = name.rpartition(".")
        is_adapted = layer.endswith(LINEARS["neox"]) and what == "weight"
        assert torch.equal(before, after) != is_adapted, name


def test_sft_merges_as_loading_does(chain, tmp_path):
    """The same run as that of lora/, merged by itself."""
    run("sft", chain, tmp_path, merge=True, **LORA_SFT)
    assert not (tmp_path / "model/adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_equal_parameters(merged, load_policy(f"{chain}/lora").lm)


def test_a_reward_model_is_loaded_as_it_was_saved(chain, scores):
    loaded = load_reward_model(f"{chain}/rm")
    with torch.no_grad():
        same(loaded(BATCH), scores, 1e-4)
    assert scores.std() > 1e-2
    found = summary(chain / "rm")
    assert abs(found["eval/score_mean"]) < 1e-3
    assert abs(found["eval/score_std"] - 1) < 1e-3
    tensors = read_adapter(chain / "rm/model")
    assert torch.equal(tensors["base_model.model.score.weight"], loaded.model.score.weight)


def run_unmerged_and_merged(kind, chain, folder, **changes):
    """The same run twice -> unmerged/ and merged/ in the folder."""
    for name in ("unmerged", "merged"):
        run(kind, chain, folder / name, merge=name == "merged", **changes)
    files = os.listdir(folder / "merged/model")
    assert "config.json" in files
    assert "model.safetensors" in files
    assert "adapter_config.json" not in files


@pytest.mark.slow
def test_a_reward_model_merges_as_loading_does(chain, tmp_path):
    run_unmerged_and_merged("rm", chain, tmp_path, steps=2)
    unmerged = load_reward_model(str(tmp_path / "unmerged"))
    merged = load_reward_model(str(tmp_path / "merged"))
    assert_equal_parameters(unmerged, merged)
    assert unmerged.model.config.reward_mean == merged.model.config.reward_mean
    assert unmerged.model.config.reward_std == merged.model.config.reward_std


@pytest.mark.slow
def test_ppo_merges_as_loading_does(chain, tmp_path):
    run_unmerged_and_merged("ppo", chain, tmp_path, reward_model=["world:gold"], steps=1)
    unmerged = load_policy(str(tmp_path / "unmerged"))
    assert_equal_parameters(unmerged, load_policy(str(tmp_path / "merged")))


def record_references(monkeypatch):
    """A list of what PPO's reference will be asked, and its answers: [(batch, mask, logprobs)]."""
    asked = []
    forward = WithoutAdapters.forward

    def recorded(self, batch, mask, *args, **kwargs):
        out = forward(self, batch, mask, *args, **kwargs)
        asked.append((batch, mask, out["logprobs"]))
        return out

    monkeypatch.setattr(WithoutAdapters, "forward", recorded)
    return asked


@pytest.mark.parametrize(
    "kl_kind, kl_in",
    [
        ("k1", "reward"),
        pytest.param("full", "reward", marks=pytest.mark.slow),
        pytest.param("full", "loss", marks=pytest.mark.slow),
    ],
)
def test_ppo_has_the_sft_policy_as_its_reference(
    chain, scores, tmp_path, monkeypatch, kl_kind, kl_in
):
    """On top of the SFT adapter; the reference, adapters off, is the SFT policy bit for bit."""
    asked = record_references(monkeypatch)
    if kl_in == "loss":
        # There are several chunks, which are computed again in the backward pass.
        monkeypatch.setattr(nanorlhf.models, "MAX_LOGITS", {"cpu": 2000})
    flags = {"kl_kind": kl_kind, "kl_in": kl_in, "eval_every": 1}
    start, first, second = run("ppo", chain, tmp_path / "a", **flags)

    # It starts at the reference, and leaves it.
    assert abs(start["eval/kl"]) < 1e-4
    assert abs(first["kl"]) < 1e-4
    assert second["kl_k3"] > 1e-4
    assert second["eval/kl_k3"] > 1e-4
    assert first["first_ratio_error"] < 1e-5
    assert second["first_ratio_error"] < 1e-5

    # The reference is asked before and after each of the two steps, and by the steps themselves.
    assert len(asked) == 5
    sft = load_policy(f"{chain}/lora", value_head=False)
    for batch, mask, logprobs in asked:
        with torch.no_grad():
            assert torch.equal(sft(batch, mask)["logprobs"], logprobs)
    policy = load_policy(str(tmp_path / "a"))
    assert policy.value_head.weight.abs().max() > 0
    assert largest_difference(compute_logits(policy.lm), compute_logits(sft.lm)) > 1e-3

    # With a whole second copy as the reference the run is the same.
    monkeypatch.setattr("train_ppo.reference_of", lambda policy, share: sft)
    run("ppo", chain, tmp_path / "b", **flags)
    assert_bit_equal(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_a_separate_value_model_is_trained_in_full(chain, tmp_path):
    flags = {
        "steps": 1,
        "reward_model": ["world:gold"],
        "value_model": f"{chain}/sft",
        # A value that leaves its clip range has no gradient.
        "value_clip_range": 100.0,
    }
    run("ppo", chain, tmp_path, **flags)
    before = load_policy(f"{chain}/sft").lm.base_model
    after = load_policy(str(tmp_path)).value_trunk
    for (name, p), q in zip(before.named_parameters(), after.parameters()):
        assert not torch.equal(p, q), name


def kill_at_step_3(monkeypatch):
    """A run is killed when it would note its third step."""
    append = log.RunFolder.append

    def killed(folder, name, rows):
        if rows and rows[0].get("step") == 3:
            raise KeyboardInterrupt
        append(folder, name, rows)

    monkeypatch.setattr(log.RunFolder, "append", killed)


RESUMED = [
    "sft",
    pytest.param("rm", marks=pytest.mark.slow),
    pytest.param("ppo", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind", RESUMED)
def test_resume_is_exact(chain, scores, tmp_path, kind):
    flags = {"steps": 3, "checkpoint_every": 1}
    if kind != "ppo":
        flags["lora_dropout"] = 0.3
    run(kind, chain, tmp_path / "whole", **flags)
    with pytest.MonkeyPatch.context() as patch:
        kill_at_step_3(patch)
        with pytest.raises(KeyboardInterrupt):
            run(kind, chain, tmp_path / "killed", **flags)

    # Of the model a checkpoint holds what is trained, and nothing else.
    state = load_file(tmp_path / "killed/checkpoint/step_2/state.safetensors")
    names = [name for name in state if name.startswith("model/")]
    assert len(names) >= 32
    for name in names:
        is_head = name.startswith(("model/model.score", "model/value_head"))
        assert is_head or "lora_" in name

    run(kind, chain, tmp_path / "killed", **flags)
    assert_bit_equal(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_change_nothing(chain, scores, tmp_path):
    changes = {
        "rm": {"steps": 2, "micro_batch_size": 3, "score_l2": 0.01},
        "ppo": {"kl_kind": "full", "kl_in": "loss", "micro_batch_size": 3},
    }
    runs = [(kind, small_flags(kind, chain) | own) for kind, own in changes.items()]
    (tmp_path / "two").mkdir()
    processes = ranks(2, drive, str(tmp_path / "two"), runs)
    for kind, own in changes.items():
        run(kind, chain, tmp_path / "one" / kind, **own)
    join(*processes)
    for kind in changes:
        assert_close_runs(tmp_path / "one" / kind, tmp_path / "two" / kind)

"""nanorlhf.hf.lora and nanorlhf.hf.adapters: closed forms in float64, an adapter written by hand in PEFT's layout, and tiny runs of the scripts.

B sequences, R response tokens, T tokens of a packed row, D hidden, V vocabulary, r rank
"""

import json
import os
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support import (
    ARCHITECTURES,
    BATCH,
    MASK,
    SCRIPTS,
    D,
    assert_bit_equal,
    assert_close_runs,
    drive,
    gradients,
    join,
    metrics,
    ranks,
    same,
    tiny_lm,
    tiny_policy,
    word_tokenizer,
    write_rows,
)
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import nanorlhf.models
import train_rm
from nanorlhf import world
from nanorlhf.errors import InputError
from nanorlhf.hf import lora
from nanorlhf.hf.adapters import load_adapter, save_adapter
from nanorlhf.hf.blocks import trainable
from nanorlhf.hf.folders import check_model
from nanorlhf.hf.lora import LoRA, adapters, adapters_off, add_lora, matching, merge
from nanorlhf.models import (
    Policy,
    WithoutAdapters,
    fingerprint,
    load_policy,
    load_reward_model,
    load_tokenizer,
    save_policy,
    save_reward_model,
)
from nanorlhf.runtime import log

LINEARS = {"neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), "gpt2": ("c_attn", "c_proj", "c_fc", "c_proj"),
           "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}  # fmt: skip
ONE = {"neox": "query_key_value", "llama": "q_proj", "gpt2": "c_attn"}
IDS = BATCH.ids


def shaken(lm, seed=7):
    """Adapters (and a head) far from their start, so that they can be told from none."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in trainable(lm):
        if "lora_B" in name or "score" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return lm


def lora_lm(architecture, pattern="all-linear", **kwargs):
    lm = tiny_lm(architecture)
    add_lora(lm, pattern, **{"rank": 3, "alpha": 5.0, **kwargs})
    return lm


@torch.no_grad()
def logits(lm):
    return lm(input_ids=IDS).logits


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{architecture: the folder of a policy}"""
    root = tmp_path_factory.mktemp("bases")
    for name in ARCHITECTURES:
        save_policy(tiny_policy(name, value_head=False), word_tokenizer(), str(root / name))
    return {name: str(root / name) for name in ARCHITECTURES}


def lora_policy(base, value_head=True, **kwargs):
    policy = load_policy(base, value_head)
    add_lora(policy.lm, **{"rank": 3, "alpha": 5.0, **kwargs})
    shaken(policy.lm)
    if value_head:
        policy.value_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    return policy


# ------------------------------------------------------------------------------------------------------------------------ one layer


@pytest.mark.parametrize("conv", [False, True])
def test_the_closed_form(conv):
    """y = W x + b + (alpha / r) B A x, by loops over the ranks in float64, and its gradients by hand."""
    torch.manual_seed(0)
    layer = Conv1D(5, 4) if conv else nn.Linear(4, 5)
    A, B, x = torch.randn(2, 4), torch.randn(5, 2), torch.randn(3, 4).double()
    lora = LoRA(layer.requires_grad_(False), A, B, alpha=3.0, dropout=0.0).double()
    W, b = (layer.weight.T if conv else layer.weight), layer.bias  # [out, in]
    A, B = A.double(), B.double()
    expected = torch.zeros(3, 5).double()
    for i in range(3):
        for o in range(5):
            expected[i, o] = b[o] + sum(W[o, j] * x[i, j] for j in range(4))
            for k in range(2):
                expected[i, o] += 3.0 / 2 * B[o, k] * sum(A[k, j] * x[i, j] for j in range(4))
    y = lora(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn(3, 5).double()  # dL/dy:  dL/dB = s g' (x A'),  dL/dA = s (g B)' x
    (y * g).sum().backward()
    torch.testing.assert_close(lora.lora_B.grad, 1.5 * g.T @ (x @ A.T), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lora.lora_A.grad, 1.5 * (g @ B).T @ x, rtol=1e-12, atol=1e-12)
    assert layer.weight.grad is None and layer.bias.grad is None
    merged = lora.merged()
    assert merged is layer
    torch.testing.assert_close(merged(x), expected, rtol=1e-12, atol=1e-12)


def test_dropout_is_of_the_adapter_alone():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 6), torch.randn(4, 6)
    lora = LoRA(layer, torch.randn(2, 6), torch.randn(6, 2), alpha=4.0, dropout=0.5)
    torch.manual_seed(3)
    y = lora(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    assert (dropped == 0).any()
    same(y, layer(x) + 2.0 * dropped @ lora.lora_A.T @ lora.lora_B.T)
    same(lora.eval()(x), layer(x) + 2.0 * x @ lora.lora_A.T @ lora.lora_B.T)
    layer.eval()
    assert not LoRA(
        layer, lora.lora_A, lora.lora_B, 4.0, 0.5
    ).training  # it enters the model in the mode that the layer is in


def test_autocast_and_half_precision_models():
    for wide in (lora_lm("neox", rank=4), lora_lm("gpt2", rank=4)):
        policy = Policy(shaken(wide))
        exact = policy(BATCH, MASK)["logprobs"]
        with torch.autocast("cpu", torch.bfloat16):
            out = policy(BATCH, MASK)["logprobs"]
        assert 1e-4 < (out - exact).abs().max() < 0.5
        out.sum().backward()
        assert all(
            p.grad.dtype == p.dtype == torch.float32 and p.grad.abs().max() > 0
            for p in policy.lm.parameters()
            if p.requires_grad
        )
    half = tiny_lm("llama").to(torch.bfloat16)
    add_lora(half, rank=2)
    assert {p.dtype for _, p in trainable(half)} == {torch.float32}
    assert logits(shaken(half)).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------------------ in a model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_which_layers(architecture):
    lm = tiny_lm(architecture)
    every = matching(lm, "all-linear")
    assert sorted(name.split(".")[-1] for name in every) == sorted(2 * LINEARS[architecture])
    one = ONE[architecture]
    assert (
        list(matching(lm, [one])) == [name for name in every if name.endswith("." + one)]
        and len(matching(lm, [one])) == 2
    )
    assert (
        list(matching(lm, rf".*\.0\..*{one}")) == list(matching(lm, [one]))[:1]
    )  # the block's number stands in the name
    assert list(matching(lm, [r"\.0\..*"])) == [] and not matching(
        lm, one
    )  # a list: whole parts of a name; a string: the whole name
    assert list(matching(lm, [list(every)[1]])) == list(every)[1:2]
    assert [layer for name, layer in matching(lm, ".*").items() if name not in every] == [
        lm.get_output_embeddings()
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_start_gradients_off_and_merge(architecture):
    plain = tiny_lm(architecture)
    before = logits(plain)
    lm = tiny_lm(architecture)
    kinds = {name: type(m) for name, m in lm.named_modules()}
    note = add_lora(lm, rank=3, alpha=5.0, dropout=0.2, seed=4)
    layers = adapters(lm)
    assert torch.equal(logits(lm), before)  # B = 0
    assert not any(layer.training for layer in layers.values())  # the model was in eval mode
    n = sum(3 * (sum(layer.base_layer.weight.shape)) for layer in layers.values())
    assert (
        f"{n:,} trained" in note
        and "rank 3" in note
        and f"{2 * len(LINEARS[architecture])} linear layers" in note
    )
    assert {name.rpartition(".")[2] for name, _ in trainable(lm)} == {"lora_A", "lora_B"} and len(
        trainable(lm)
    ) == 2 * len(layers)
    for layer in layers.values():
        bound = layer.lora_A.shape[1] ** -0.5
        assert (
            bound * 0.8 < layer.lora_A.abs().max() <= bound
            and layer.lora_A.mean().abs() < bound / 4
            and (layer.lora_B == 0).all()
        )

    shaken(lm)
    changed = logits(lm)
    assert (changed - before).abs().max() > 0.1
    lm(input_ids=IDS).logits.square().sum().backward()
    assert all(
        (p.grad is not None and p.grad.abs().max() > 0) == p.requires_grad for p in lm.parameters()
    )
    with adapters_off(lm):
        assert torch.equal(logits(lm), before)
        with adapters_off(lm):
            pass
        assert torch.equal(logits(lm), before)  # the inner one did not switch them on
    with pytest.raises(RuntimeError), adapters_off(lm):
        raise RuntimeError
    assert torch.equal(logits(lm), changed)

    assert (
        merge(lm) is lm
        and {name: type(m) for name, m in lm.named_modules()} == kinds
        and not adapters(lm)
    )
    same(logits(lm), changed)
    assert [name for name, _ in lm.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]


def test_the_seed_draws_A_and_nothing_else_does():
    lms = []
    for noise, seed in ((0, 1), (5, 1), (0, 2)):
        lm = tiny_lm("neox")
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        add_lora(lm, rank=2, seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        lms.append([layer.lora_A for layer in adapters(lm).values()])
    assert all(torch.equal(a, b) for a, b in zip(lms[0], lms[1])) and not any(
        torch.equal(a, b) for a, b in zip(lms[0], lms[2])
    )
    assert not torch.equal(lms[0][0], lms[0][2][:, :D])  # each layer has its own


def test_the_head_can_have_an_adapter():
    policy = Policy(shaken(lora_lm("neox", ["embed_out|lm_head", "dense"])), value_head=False)
    plain = Policy(tiny_lm("neox"), value_head=False)
    assert isinstance(
        policy.lm.get_output_embeddings(), LoRA
    )  # embed_out or lm_head: transformers has changed its name
    assert (policy(BATCH, MASK)["logprobs"] - plain(BATCH, MASK)["logprobs"]).abs().max() > 0.1
    assert torch.equal(
        WithoutAdapters(policy)(BATCH, MASK)["logprobs"], plain(BATCH, MASK)["logprobs"]
    )


@pytest.mark.parametrize("chunk", [2**24, 180])
def test_the_reference_of_full_kl(monkeypatch, chunk):
    """The policy with adapters off inside the policy's own forward, in recomputed chunks too: as with a second copy of the model."""
    monkeypatch.setattr(nanorlhf.models, "MAX_LOGITS", {"cpu": chunk})
    policy = Policy(shaken(lora_lm("llama", ["q_proj", "lm_head", "down_proj"])))
    outs, grads = [], []
    for reference in (WithoutAdapters(policy), Policy(tiny_lm("llama"), value_head=False)):
        out = policy(BATCH, MASK, 0.7, kl_to=reference)
        outs.append(out["full_kl"])
        grads.append(gradients(policy, (out["full_kl"] - 0.1 * out["logprobs"]).sum()))
    assert torch.equal(*outs) and outs[0][MASK].min() > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and grads[0][0].abs().max() > 0


def test_errors_of_add_lora():
    cases = [
        ("neox", dict(rank=0), "rank of at least 1"),
        ("neox", dict(dropout=1.0), "dropout"),
        ("neox", dict(pattern=["q_proj"]), "q_proj.*GPTNeoXForCausalLM.*query_key_value"),
        ("neox", dict(pattern=["query_key_value", "q_proj"]), "q_proj"),
        (
            "neox",
            dict(pattern="query_key_value"),
            "query_key_value",
        ),  # a string is a pattern for the whole name
        ("gpt2", dict(pattern=["wte"]), "wte"),  # not a linear layer
        ("llama", dict(pattern=["*proj"]), "regular expression"),
        ("gpt2", dict(pattern=["lm_head"]), "tied"),
    ]
    for architecture, kwargs, message in cases:
        with pytest.raises(InputError, match=message) as e:
            add_lora(tiny_lm(architecture), **kwargs)
        assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="already"):
        add_lora(lora_lm("neox"))


# ------------------------------------------------------------------------------------------------------------------------- in folders

# What peft 0.21.2 writes for LoraConfig(r=2, lora_alpha=6, target_modules=["c_attn"], task_type="CAUSAL_LM"), field by field.
PEFT_CONFIG = """{
  "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null, "base_model_name_or_path": "BASE",
  "bias": "none", "corda_config": null, "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null,
  "fan_in_fan_out": true, "inference_mode": true, "init_lora_weights": true, "kasa_config": null, "layer_replication": null,
  "layers_pattern": null, "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 6, "lora_bias": false, "lora_dropout": 0.0,
  "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
  "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 2, "rank_pattern": {},
  "revision": null, "target_modules": ["c_attn"], "target_parameters": null, "task_type": "CAUSAL_LM",
  "trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false, "use_rslora": false,
  "velora_config": null}"""


def by_hand(folder, base, **changes):
    """An adapter for tiny GPT-2's c_attn as PEFT lays it out. -> its tensors"""
    os.makedirs(folder, exist_ok=True)
    config = {**json.loads(PEFT_CONFIG), "base_model_name_or_path": base, **changes}
    with open(f"{folder}/adapter_config.json", "w") as f:
        json.dump(config, f)
    torch.manual_seed(3)
    tensors = {
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.randn(2, 32),
        "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight": torch.randn(96, 2) / 10,
        "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight": torch.randn(2, 32),
        "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight": torch.randn(96, 2) / 10,
    }
    save_file(tensors, f"{folder}/adapter_model.safetensors", {"format": "pt"})
    return tensors


def test_an_adapter_by_hand_in_pefts_layout(bases, tmp_path):
    tensors = by_hand(tmp_path, bases["gpt2"])
    lm = AutoModelForCausalLM.from_pretrained(bases["gpt2"])
    for i, block in enumerate(lm.transformer.h):
        A, B = (
            tensors[f"base_model.model.transformer.h.{i}.attn.c_attn.lora_{x}.weight"] for x in "AB"
        )
        block.attn.c_attn.weight.data += 6 / 2 * (B @ A).T  # Conv1D's weight is [in, out]
    policy = load_policy(str(tmp_path))
    same(logits(policy.lm), logits(lm))
    assert (logits(lm) - logits(tiny_lm("gpt2"))).abs().max() > 0.1
    assert all(p.requires_grad for p in policy.parameters()) and not adapters(
        policy.lm
    )  # a plain model, for the next stage to train
    assert check_model(str(tmp_path)).model_type == "gpt2"
    assert (
        load_tokenizer(str(tmp_path)).get_vocab() == word_tokenizer().get_vocab()
    )  # the folder has none: the base model's
    rm = load_reward_model(str(tmp_path), seed=0)  # the trunk, with a new head
    assert torch.equal(
        rm.model.transformer.h[1].attn.c_attn.weight, policy.lm.transformer.h[1].attn.c_attn.weight
    )
    trunk = load_policy(bases["neox"], value_model=str(tmp_path)).value_trunk
    assert torch.equal(trunk.h[1].attn.c_attn.weight, policy.lm.transformer.h[1].attn.c_attn.weight)
    by_hand(
        tmp_path, bases["gpt2"], target_modules=r".*\.attn\.c_attn"
    )  # a string is a regular expression
    assert torch.equal(logits(load_policy(str(tmp_path)).lm), logits(policy.lm))


def test_what_is_written_is_pefts_layout(bases, tmp_path):
    policy = lora_policy(bases["gpt2"], pattern=["c_attn"], rank=2, alpha=6.0, dropout=0.1)
    save_policy(policy, word_tokenizer(), str(tmp_path))
    names = {p.name for p in tmp_path.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "nanorlhf.json",
        "tokenizer.json",
        "value_head.safetensors",
    }
    assert not names & {
        "config.json",
        "model.safetensors",
    }  # transformers would take config.json for that of a whole model
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        f"base_model.model.transformer.h.{i}.attn.c_attn.lora_{x}.weight": shape
        for i in (0, 1)
        for x, shape in (("A", (2, 32)), ("B", (96, 2)))
    }
    attention = policy.lm.transformer.h[1].attn
    assert torch.equal(
        tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"],
        attention.c_attn.lora_B,
    )
    config, peft = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        json.loads(PEFT_CONFIG),
    )
    assert set(config) <= set(peft)
    peft |= {"base_model_name_or_path": bases["gpt2"], "lora_dropout": 0.1}
    peft |= {"target_modules": ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]}
    assert config == {name: peft[name] for name in config}
    needed = {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "fan_in_fan_out",
        "base_model_name_or_path",
    }
    assert needed | {"bias", "modules_to_save", "inference_mode"} <= set(config)

    rm = load_reward_model(bases["neox"], seed=0)
    assert "and the score head" in add_lora(rm.model, rank=2)
    assert [name for name, _ in trainable(rm.model) if "lora_" not in name] == ["score.weight"]
    save_reward_model(rm, word_tokenizer(), str(tmp_path / "rm"))
    config = json.loads((tmp_path / "rm/adapter_config.json").read_text())
    assert (
        config["task_type"] == "SEQ_CLS"
        and config["modules_to_save"] == ["score"]
        and config["fan_in_fan_out"] is False
    )
    assert load_file(tmp_path / "rm/adapter_model.safetensors")[
        "base_model.model.score.weight"
    ].shape == (1, D)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trips(bases, tmp_path, architecture):
    policy, path = lora_policy(bases[architecture], alpha=5.5), str(tmp_path / "policy")
    save_policy(policy, word_tokenizer(), path)
    again = load_policy(path)
    for name, value in policy(BATCH, MASK).items():
        same(again(BATCH, MASK)[name], value)
    assert torch.equal(again.value_head.weight, policy.value_head.weight)
    unmerged = load_adapter(load_policy(bases[architecture]).lm, path)
    assert torch.equal(logits(unmerged), logits(policy.lm)) and len(adapters(unmerged)) == len(
        adapters(policy.lm)
    )

    second = lora_policy(
        path, pattern=[ONE[architecture]], rank=1
    )  # an adapter on top of an adapter
    save_policy(second, word_tokenizer(), str(tmp_path / "second"))
    assert (
        json.loads((tmp_path / "second/adapter_config.json").read_text())["base_model_name_or_path"]
        == path
    )
    third = load_policy(str(tmp_path / "second"))
    same(logits(third.lm), logits(second.lm))
    assert (logits(third.lm) - logits(again.lm)).abs().max() > 0.05

    rm = load_reward_model(path, seed=0)  # trained on the merged policy
    add_lora(rm.model, rank=2)
    shaken(rm.model)
    with torch.no_grad():
        rm.standardise(rm(BATCH).mean().item(), rm(BATCH).std().item())
        save_reward_model(rm, word_tokenizer(), str(tmp_path / "rm"))
        loaded = load_reward_model(str(tmp_path / "rm"))
        same(loaded(BATCH), rm(BATCH))
        assert loaded.model.config.reward_mean == rm.model.config.reward_mean != 0
        assert abs(loaded(BATCH).mean()) < 1e-4 and abs(loaded(BATCH).std() - 1) < 1e-4
        save_reward_model(
            loaded, word_tokenizer(), str(tmp_path / "plain")
        )  # merged: a plain folder, with the mean in config.json
        same(load_reward_model(str(tmp_path / "plain"))(BATCH), loaded(BATCH))
    trunk = load_policy(bases["llama"], value_model=str(tmp_path / "rm")).value_trunk
    assert torch.equal(
        trunk(input_ids=IDS).last_hidden_state,
        loaded.model.base_model(input_ids=IDS).last_hidden_state,
    )


def test_a_reward_model_needs_no_adapter_on_the_lm_head(bases, tmp_path):
    policy = lora_policy(bases["neox"], pattern=["embed_out|lm_head", "dense"])
    save_policy(policy, word_tokenizer(), str(tmp_path))
    same(logits(load_policy(str(tmp_path)).lm), logits(policy.lm))
    rm = load_reward_model(str(tmp_path), seed=0).model
    merged = load_policy(str(tmp_path)).lm
    assert all(
        torch.equal(a, b) for a, b in zip(rm.gpt_neox.parameters(), merged.gpt_neox.parameters())
    )


def test_folders_that_move(bases, tmp_path, monkeypatch):
    shutil.copytree(bases["neox"], tmp_path / "runs/sft/model")
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        policy = lora_policy("runs/sft")
        save_policy(policy, word_tokenizer(), "runs/ppo/model")
    same(
        logits(load_policy(str(tmp_path / "runs/ppo")).lm), logits(policy.lm)
    )  # called from somewhere else
    config = json.loads((tmp_path / "runs/ppo/model/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "runs/sft/model")
    prints = fingerprint(str(tmp_path / "runs/ppo"))
    os.rename(tmp_path / "runs", tmp_path / "elsewhere")
    same(logits(load_policy(str(tmp_path / "elsewhere/ppo")).lm), logits(policy.lm))
    assert fingerprint(str(tmp_path / "elsewhere/ppo")) == prints
    weights = tmp_path / "elsewhere/sft/model/model.safetensors"
    save_file({name: t + 1 for name, t in load_file(weights).items()}, weights)
    assert (
        fingerprint(str(tmp_path / "elsewhere/ppo")) != prints
    )  # a pool of answers is of the base model too
    shutil.rmtree(tmp_path / "elsewhere/sft")
    for function in (check_model, load_policy):
        with pytest.raises(InputError, match="runs/sft/model is gone.*base_model_name_or_path"):
            function(str(tmp_path / "elsewhere/ppo"))


def config_error(**changes):
    return lambda folder, base: by_hand(folder, base, **changes)


def notes_error(notes):
    def write(folder, base):
        by_hand(folder, base)
        with open(os.path.join(folder, "nanorlhf.json"), "w") as f:
            json.dump(notes, f)

    return write


def rewrite(change):
    """The adapter by hand, with its tensors changed."""

    def write(folder, base):
        tensors = by_hand(folder, base)
        change(tensors)
        save_file(tensors, f"{folder}/adapter_model.safetensors")

    return write


def spoil(name, content):
    def write(folder, base):
        by_hand(folder, base)
        path = os.path.join(folder, name)
        whole = open(path, "rb").read()
        os.remove(path)
        if content is not None:
            with open(path, "wb") as f:
                f.write(content(whole))

    return write


NAME = "base_model.model.transformer.h.1.attn.c_attn."
BROKEN = {  # {what: (how to write it, what the error says, whether it is found before any model is loaded)}
    "not json": (spoil("adapter_config.json", lambda whole: whole[:99]), "adapter_config.json:1: not JSON", True),
    "not an object": (spoil("adapter_config.json", lambda whole: b"[1]"), "not a JSON object", True),
    "another method": (config_error(peft_type="IA3"), "IA3", True),
    "no rank": (config_error(r=None), ": r cannot be None", True),
    "rank 0": (config_error(r=0), ": r cannot be 0", True),
    "rank 3": (config_error(r=3), r"another model: .*c_attn.lora_A.weight is \[2, 32\], not \[3, 32\]", False),
    "no layers": (config_error(target_modules=None), "target_modules cannot be None", True),
    "no base": (config_error(base_model_name_or_path=None), "base_model_name_or_path cannot be None", True),
    "base gone": (config_error(base_model_name_or_path="/no/such/base"), "/no/such/base is gone", True),
    "dora": (config_error(use_dora=True), "use_dora = True, which is not supported", True),
    "rslora": (config_error(use_rslora=True), "use_rslora", True),
    "ranks": (config_error(rank_pattern={"c_attn": 4}), "rank_pattern", True),
    "alphas": (config_error(alpha_pattern={"c_attn": 4}), "alpha_pattern", True),
    "bias": (config_error(bias="all"), "bias = 'all'", True),
    "some layers": (config_error(layers_to_transform=[0]), "layers_to_transform", True),
    "a base that was changed": (config_error(init_lora_weights="pissa"), "init_lora_weights = 'pissa'", True),
    "a whole module": (config_error(modules_to_save=["lm_head"]), "modules_to_save", True),
    "rank a text": (config_error(r="2"), ": r cannot be '2'", True),
    "rank true": (config_error(r=True), ": r cannot be True", True),
    "alpha a text": (config_error(lora_alpha="x"), ": lora_alpha cannot be 'x'", True),
    "alpha NaN": (config_error(lora_alpha=float("nan")), "NaN is no finite number", True),
    "alpha beyond floats": (config_error(lora_alpha=10**400), "lora_alpha cannot be 1000", True),
    "dropout 2": (config_error(lora_dropout=2), r"lora_dropout must lie in \[0, 1\)", True),
    "dropout NaN": (config_error(lora_dropout=float("nan")), "NaN is no finite number", True),
    "layers 5": (config_error(target_modules=5), "target_modules cannot be 5", True),
    "layers of numbers": (config_error(target_modules=["c_attn", 5]), "target_modules cannot be", True),
    "modules to save 5": (config_error(modules_to_save=5), "modules_to_save cannot be 5", True),
    "base 5": (config_error(base_model_name_or_path=5), "base_model_name_or_path cannot be 5", True),
    "base a note of 5": (notes_error({"base": 5}), "nanorlhf.json: base cannot be 5", True),
    "a mean of text": (notes_error({"reward_mean": "0"}), "nanorlhf.json: reward_mean cannot be '0'", True),
    "notes a list": (notes_error([]), "nanorlhf.json: not a JSON object", True),
    "layers of another name": (config_error(target_modules=["c_proj"]), "are not among its target_modules", False),
    "NaN": (rewrite(lambda t: t[NAME + "lora_B.weight"].fill_(float("nan"))), "lora_B.weight holds numbers that are not finite", False),
    "whole numbers": (rewrite(lambda t: t.update({NAME + "lora_B.weight": torch.ones(96, 2, dtype=torch.int32)})), "int32", False),
    "a head of no classifier": (rewrite(lambda t: t.update({"base_model.model.score.weight": torch.ones(1, 32)})),
                                "score.weight has no place", False),
    "a huge alpha": (config_error(lora_alpha=1e60), "holds numbers that are not finite", False),
    "a field of the future": (config_error(use_magic=True), "use_magic", True),
    "no tensors": (spoil("adapter_model.safetensors", None), "without adapter_model.safetensors", True),
    "half of the tensors": (spoil("adapter_model.safetensors", lambda whole: whole[: len(whole) // 2]), "safetensors: cannot be", False),
    "nothing in the file": (spoil("adapter_model.safetensors", lambda whole: b""), "safetensors: cannot be", False),
    "no B": (rewrite(lambda t: t.pop(NAME + "lora_B.weight")), "lacks transformer.h.1.attn.c_attn.lora_B.weight", False),
    "a layer left out": (rewrite(lambda t: [t.pop(NAME + x) for x in ("lora_A.weight", "lora_B.weight")]), "lacks transformer.h.1", False),
    "a strange tensor": (rewrite(lambda t: t.update({NAME + "lora_magnitude_vector": torch.ones(96)})), "lora_magnitude_vector", False),
    "no prefix": (rewrite(lambda t: t.update({"h.lora_A.weight": torch.ones(2, 2)})), "h.lora_A.weight is not supported", False),
    "another size": (rewrite(lambda t: t.update({NAME + "lora_A.weight": torch.ones(2, 48)})), "another model", False),
    "more layers": (rewrite(lambda t: t.update({NAME.replace("1", "7") + "lora_A.weight": torch.ones(2, 32)})),
                    "no linear layer transformer.h.7.attn.c_attn", False),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_adapters(bases, tmp_path, what):
    write, message, early = BROKEN[what]
    write(str(tmp_path), bases["gpt2"])
    for function in (check_model, load_policy) if early else (load_policy,):
        with pytest.raises(InputError, match=message) as e:
            function(str(tmp_path))
        assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


@pytest.mark.parametrize(
    "links",
    [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "b"}, {"a": "a/."}, {"a": "run"}],
)
def test_adapters_in_a_circle(bases, tmp_path, links):
    """The base of the base of the base: it leads back, by other names of one folder too. Every door says so, and none goes round."""
    for name, base in links.items():
        by_hand(str(tmp_path / name), str(tmp_path / base))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model").symlink_to(tmp_path / "a")
    for function in (check_model, load_tokenizer, load_policy, fingerprint):
        with pytest.raises(InputError, match="leads back to") as e:
            function(str(tmp_path / "a"))
        assert "\n" not in str(e.value) and str(tmp_path / "a") in str(e.value)


@pytest.mark.parametrize("pattern", [r"(((a|.)+)+)+!", r"(.*)*!", ".*" * 40 + "!", ".?" * 60 + "!"])
def test_a_search_without_end(monkeypatch, pattern):
    monkeypatch.setattr(lora, "SEARCH_SECONDS", 0.05)
    lm = tiny_lm("neox")
    for given in (pattern, [pattern]):
        with pytest.raises(InputError, match="takes too long"):
            add_lora(lm, given)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and signal.getitimer(
        signal.ITIMER_REAL
    ) == (0, 0)
    assert not adapters(lm)


def test_patterns_that_are_none():
    for pattern in ("(", "a{1,99999999999999999999}", "(?P<a"):
        with pytest.raises(InputError, match="not a regular expression"):
            add_lora(tiny_lm("neox"), [pattern])


def test_adapters_in_the_wrong_place(bases, tmp_path):
    by_hand(str(tmp_path / "other"), bases["neox"])
    with pytest.raises(InputError, match="GPTNeoXForCausalLM has no linear layer transformer.h.0"):
        load_policy(str(tmp_path / "other"))
    by_hand(str(tmp_path / "policy"), bases["gpt2"])
    with pytest.raises(InputError, match="lacks the weights score.weight"):
        load_reward_model(str(tmp_path / "policy"))
    rm = load_reward_model(bases["neox"], seed=0)
    add_lora(rm.model, rank=2)
    save_reward_model(rm, word_tokenizer(), str(tmp_path / "rm"))
    with pytest.raises(InputError, match="of a reward model, not of a policy"):
        load_policy(str(tmp_path / "rm"))
    with pytest.raises(InputError, match="saved base model"):
        save_adapter(lora_lm("neox"), str(tmp_path / "x"), "")


# ------------------------------------------------------------------------------------------------------------------------ in the scripts


@pytest.mark.parametrize(
    "kind, flags, message",
    [
        ("sft", dict(model="m", merge=True), "--merge"),
        ("rm", dict(lora_rank=-1), "--lora_rank"),
        ("rm", dict(lora_rank=2, freeze_layers=0.5), "--freeze_layers"),
        ("ppo", dict(lora_rank=2, lora_alpha=0.0), "--lora_alpha"),
        ("ppo", dict(lora_rank=2, lora_dropout=1.0), "--lora_dropout"),
        ("sft", dict(lora_rank=2), "starts at random"),
    ],
)
def test_flags(kind, flags, message):
    with pytest.raises(InputError, match=message):
        SCRIPTS[kind].Config(**flags)


SMALL = dict(batch_size=8, eval_size=8, lora_rank=2, warmup=0)
PPO = dict(SMALL, steps=2, minibatch_size=4, ppo_epochs=2, max_new_tokens=8, lr=3e-3)


def run(kind, folder, **flags):
    SCRIPTS[kind].main(SCRIPTS[kind].Config(output_dir=str(folder), **flags))
    return metrics(folder)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """sft/ (whole), lora/ (an adapter on it), rm/ (an adapter on lora/): what PPO starts from. And small files of data."""
    root = tmp_path_factory.mktemp("chain")
    write_rows(root / "sft.jsonl", world.demonstrations(120))
    write_rows(root / "pairs.jsonl", world.preferences(120))
    small = dict(SMALL, dataset=f"{root}/sft.jsonl", max_new_tokens=8, n_samples=1)
    before = run("sft", root / "sft", **dict(small, steps=4, lora_rank=0))[-1]["eval/perplexity"]
    after = run(
        "sft", root / "lora", model=f"{root}/sft", steps=8, lr=1e-2, lora_dropout=0.1, **small
    )[-1]["eval/perplexity"]
    assert after < before - 5
    return root


def test_sft_run_and_merge(chain, tmp_path):
    base, tuned = load_policy(f"{chain}/sft").lm, load_policy(f"{chain}/lora").lm
    assert (logits(base) - logits(tuned)).abs().max() > 1e-2
    adapted = {name for name in dict(base.named_modules()) if name.endswith(LINEARS["neox"])}
    for (name, a), b in zip(base.named_parameters(), tuned.parameters()):
        moved = name.removesuffix(".weight") in adapted
        assert torch.equal(a, b) != moved, name
    small = dict(
        SMALL,
        dataset=f"{chain}/sft.jsonl",
        max_new_tokens=8,
        n_samples=1,
        steps=8,
        lr=1e-2,
        lora_dropout=0.1,
    )
    run("sft", tmp_path / "merged", model=f"{chain}/sft", merge=True, **small)
    assert not (tmp_path / "merged/model/adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged/model")
    assert all(
        torch.equal(a, b) for a, b in zip(merged.parameters(), tuned.parameters())
    )  # the same run, merged by itself


@pytest.fixture(scope="module")
def rm(chain):
    """A reward model with LoRA on the adapter folder. -> its scores in memory of BATCH, as it was saved"""
    scores, save = [], train_rm.save_reward_model

    def recorded(reward_model, *rest):
        scores.append(reward_model(BATCH).detach())
        save(reward_model, *rest)

    train_rm.save_reward_model = recorded
    run(
        "rm",
        chain / "rm",
        model=f"{chain}/lora",
        dataset=f"{chain}/pairs.jsonl",
        steps=4,
        lr=1e-2,
        **SMALL,
    )
    train_rm.save_reward_model = save
    return scores[0]


def test_rm_run(chain, rm):
    loaded = load_reward_model(f"{chain}/rm")
    with torch.no_grad():
        same(loaded(BATCH), rm, 1e-4)
    summary = json.loads((chain / "rm/summary.json").read_text())
    assert (
        abs(summary["eval/score_mean"]) < 1e-3
        and abs(summary["eval/score_std"] - 1) < 1e-3
        and rm.std() > 1e-2
    )
    tensors = load_file(chain / "rm/model/adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.score.weight"], loaded.model.score.weight)


@pytest.mark.parametrize("kind", ["rm", "ppo"])
def test_merged_runs(chain, rm, tmp_path, kind):
    """--merge saves what loading the adapter folder of the same run gives."""
    flags = {
        "rm": dict(SMALL, model=f"{chain}/lora", dataset=f"{chain}/pairs.jsonl", steps=2),
        "ppo": dict(PPO, model=f"{chain}/lora", reward_model=["world:gold"], steps=1),
    }[kind]
    for name in ("adapter", "merged"):
        run(kind, tmp_path / name, **flags, merge=name == "merged")
    files = {p.name for p in (tmp_path / "merged/model").iterdir()}
    assert {"config.json", "model.safetensors"} <= files and "adapter_config.json" not in files
    load = load_reward_model if kind == "rm" else load_policy
    adapter, merged = (load(str(tmp_path / name)) for name in ("adapter", "merged"))
    assert all(
        torch.equal(a, b) for a, b in zip(adapter.parameters(), merged.parameters(), strict=True)
    )
    if kind == "rm":
        assert adapter.model.config.reward_mean == merged.model.config.reward_mean


@pytest.mark.parametrize("kl", [("k1", "reward"), ("full", "reward"), ("full", "loss")])
def test_ppo_runs(chain, rm, tmp_path, monkeypatch, kl):
    """On top of the SFT adapter, against the reward model's; the reference is that of a second copy of the SFT policy, bit for bit."""
    seen, plain = [], WithoutAdapters.forward

    def recorded(self, batch, mask, *args, **kwargs):
        out = plain(self, batch, mask, *args, **kwargs)
        seen.append((batch, mask, out["logprobs"]))
        return out

    monkeypatch.setattr(WithoutAdapters, "forward", recorded)
    if kl[1] == "loss":
        monkeypatch.setattr(
            nanorlhf.models, "MAX_LOGITS", {"cpu": 2000}
        )  # several chunks, recomputed in the backward pass
    flags = dict(
        PPO,
        model=f"{chain}/lora",
        reward_model=[f"{chain}/rm"],
        kl_kind=kl[0],
        kl_in=kl[1],
        eval_every=1,
    )
    rows = run("ppo", tmp_path / "a", **flags)
    assert abs(rows[0]["eval/kl"]) < 1e-4 and abs(rows[1]["kl"]) < 1e-4  # starts at the reference
    assert (
        rows[2]["kl_k3"] > 1e-4
        and rows[2]["eval/kl_k3"] > 1e-4
        and all(row["first_ratio_error"] < 1e-5 for row in rows[1:])
    )
    sft = load_policy(f"{chain}/lora", value_head=False)
    with torch.no_grad():
        for batch, mask, logprobs in seen:
            assert torch.equal(sft(batch, mask)["logprobs"], logprobs)
    assert len(seen) == 5  # evaluations before and after each of the two steps, and the steps' own

    monkeypatch.setattr(
        "train_ppo.reference_of",
        lambda policy, share: load_policy(f"{chain}/lora", value_head=False),
    )
    run("ppo", tmp_path / "b", **flags)
    assert_bit_equal(tmp_path / "a", tmp_path / "b")  # a whole second copy as the reference
    policy = load_policy(str(tmp_path / "a"))
    assert policy.value_head.weight.abs().max() > 0
    assert (logits(policy.lm) - logits(sft.lm)).abs().max() > 1e-3


def test_a_separate_value_model_is_trained_in_full(chain, tmp_path):
    flags = dict(
        PPO, steps=1, value_clip_range=100.0, reward_model=["world:gold"]
    )  # a value that leaves its clip range has no gradient
    run("ppo", tmp_path / "p", **flags, model=f"{chain}/lora", value_model=f"{chain}/sft")
    before, after = (
        load_policy(f"{chain}/sft").lm.base_model,
        load_policy(str(tmp_path / "p")).value_trunk,
    )
    assert not [
        name
        for (name, a), b in zip(before.named_parameters(), after.parameters())
        if torch.equal(a, b)
    ]


@pytest.mark.parametrize("kind", SCRIPTS)
def test_resume_is_exact(chain, rm, tmp_path, monkeypatch, kind):
    flags = {
        "sft": dict(
            SMALL,
            model=f"{chain}/sft",
            dataset=f"{chain}/sft.jsonl",
            max_new_tokens=8,
            steps=3,
            lora_dropout=0.3,
        ),
        "rm": dict(
            SMALL, model=f"{chain}/lora", dataset=f"{chain}/pairs.jsonl", steps=3, lora_dropout=0.3
        ),
        "ppo": dict(PPO, model=f"{chain}/lora", reward_model=[f"{chain}/rm"], steps=3),
    }[kind] | {"checkpoint_every": 1}
    run(kind, tmp_path / "whole", **flags)
    append = log.RunFolder.append

    def killed(folder, name, rows):
        if rows and rows[0].get("step") == 3:
            raise KeyboardInterrupt
        append(folder, name, rows)

    with monkeypatch.context() as patch:
        patch.setattr(log.RunFolder, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            run(kind, tmp_path / "killed", **flags)
    saved = load_file(tmp_path / "killed/checkpoint/step_2/state.safetensors")
    names = {name.removeprefix("model/") for name in saved if name.startswith("model/")}
    assert (
        all("lora_" in name or name.startswith(("model.score", "value_head")) for name in names)
        and len(names) >= 32
    )
    run(kind, tmp_path / "killed", **flags)
    assert_bit_equal(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_change_nothing(chain, rm, tmp_path):
    runs = [
        (
            "rm",
            dict(
                SMALL,
                model=f"{chain}/lora",
                dataset=f"{chain}/pairs.jsonl",
                steps=2,
                micro_batch_size=3,
                score_l2=0.01,
            ),
        ),
        (
            "ppo",
            dict(
                PPO,
                model=f"{chain}/lora",
                reward_model=[f"{chain}/rm"],
                kl_kind="full",
                kl_in="loss",
                micro_batch_size=3,
            ),
        ),
    ]
    (tmp_path / "two").mkdir()
    processes = ranks(2, drive, str(tmp_path / "two"), runs)
    for kind, flags in runs:
        run(kind, tmp_path / "one" / kind, **flags)
    join(*processes)
    for kind in ("rm", "ppo"):
        assert_close_runs(tmp_path / "one" / kind, tmp_path / "two" / kind)

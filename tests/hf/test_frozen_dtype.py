"""--frozen_dtype bfloat16: linear layers that are not trained, kept in the type that autocast
computes with. Results are compared bit for bit with those of float32 layers.
"""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import SCRIPTS, assert_bit_equal, join, ranks, train
from tiny_models import ARCHITECTURES, BATCH, MASK, gradients, tiny_policy
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from nanorlhf.errors import InputError
from nanorlhf.hf.blocks import freeze, speed_up, trainable
from nanorlhf.hf.lora import LoRA, add_lora, cast_frozen
from nanorlhf.models import reference_of
from nanorlhf.rollout import generate, left_pad
from nanorlhf.runtime.distributed import shutdown

CPU = torch.device("cpu")

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_way = pytest.mark.parametrize("way", ["lora", "freeze"])


def settings(way, frozen_dtype="bfloat16", merge=False):
    """What cast_frozen() reads of a config."""
    lora_rank = 3 if way == "lora" else 0
    return SimpleNamespace(frozen_dtype=frozen_dtype, lora_rank=lora_rank, merge=merge)


def make_models(architecture, way, frozen_dtype):
    """A policy of which only a part is trained, and its reference, as a script prepares them."""
    policy = tiny_policy(architecture)
    policy.lm.stored_dtype = torch.bfloat16  # it may be saved whole
    if way == "lora":
        add_lora(policy.lm, rank=3)
        generator = torch.Generator().manual_seed(0)
        for name, p in trainable(policy.lm):
            if "lora_B" in name:
                p.data = 0.1 * torch.randn(p.shape, generator=generator)
    else:
        freeze(policy.lm, 0.5)
    reference = reference_of(policy)
    for lm in {policy.lm, reference.lm}:
        speed_up(lm, CPU, "bfloat16")
        cast_frozen(lm, settings(way, frozen_dtype))
    return policy, reference


def compute_all(policy, reference):
    """Log-probs, values, entropies; the reference's log-probs; gradients; a sampled answer's."""
    with torch.autocast("cpu", torch.bfloat16):
        out = policy(BATCH, MASK, 0.7, entropy=True)
        ref = reference(BATCH, MASK, 0.7)
        ids, mask = left_pad([[5, 6, 7], [8]], 0)
        sampled = generate(policy, ids, mask, 4)
    loss = 2 * out["logprobs"].sum() + out["values"].sum() + out["entropies"].sum()
    return [*out.values(), ref["logprobs"], sampled.logprobs, *gradients(policy, loss)]


@each_way
@each_architecture
def test_results_are_those_of_autocast_bit_for_bit(architecture, way):
    """Random weights, which bfloat16 rounds."""
    expected = compute_all(*make_models(architecture, way, "float32"))
    found = compute_all(*make_models(architecture, way, "bfloat16"))
    for tensor, other in zip(found, expected, strict=True):
        assert torch.equal(tensor, other)


@each_way
@each_architecture
def test_only_linear_layers_that_are_not_trained_are_cast(architecture, way):
    """A tied head is one of them where it has a copy of its own."""
    policy, reference = make_models(architecture, way, "bfloat16")
    embeddings = policy.lm.get_input_embeddings().weight
    n_cast = 0
    for name, module in policy.lm.named_modules():
        is_linear = isinstance(module, (nn.Linear, Conv1D)) and module.weight is not embeddings
        for p in module.parameters(recurse=False):
            is_cast = is_linear and not p.requires_grad
            assert p.dtype == (torch.bfloat16 if is_cast else torch.float32), name
            n_cast += is_cast
    assert n_cast > 3
    # Blocks that are frozen in the policy are the reference's own, still.
    frozen = {id(p) for p in policy.lm.parameters() if not p.requires_grad}
    assert frozen <= {id(p) for p in reference.lm.parameters()}


@each_way
def test_a_tied_head_has_a_copy_where_adapters_alone_are_saved(way):
    policy, _ = make_models("gpt2", way, "bfloat16")
    embeddings = policy.lm.get_input_embeddings().weight
    head = policy.lm.get_output_embeddings().weight
    assert embeddings.dtype == torch.float32
    if way == "freeze":
        assert head is embeddings
        return
    assert head.dtype == torch.bfloat16
    assert not head.requires_grad
    assert torch.equal(head, embeddings.bfloat16())


def test_a_head_with_an_adapter_is_cast():
    lm = tiny_policy("llama").lm
    add_lora(lm, rank=3, pattern=["q_proj", "lm_head"])
    cast_frozen(lm, settings("lora"))
    assert lm.lm_head.base_layer.weight.dtype == torch.bfloat16
    assert lm.lm_head.lora_A.dtype == torch.float32


def test_merging_leaves_a_head_tied():
    lm = tiny_policy("gpt2").lm
    lm.stored_dtype = torch.bfloat16
    add_lora(lm, rank=3)
    cast_frozen(lm, settings("lora", merge=True))
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


@pytest.mark.parametrize("conv", [False, True])
def test_merging_rounds_nothing(conv):
    """W, which is in bfloat16, plus B A, which is not."""
    torch.manual_seed(0)
    layer = Conv1D(5, 4) if conv else nn.Linear(4, 5)
    layer.to(torch.bfloat16)
    A = torch.randn(2, 4)
    B = torch.randn(5, 2)
    W = layer.weight.double()
    delta = 1.5 * (B.double() @ A.double())  # alpha / r = 3 / 2
    merged = LoRA(layer, A, B, alpha=3.0, dropout=0.0).merged()
    expected = W + (delta.T if conv else delta)
    torch.testing.assert_close(merged.weight.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way, merge", [("lora", False), ("lora", True), ("freeze", False)])
def test_no_weight_that_is_saved_is_rounded(way, merge, stored_dtype):
    """Adapters alone are saved, or the model's files hold bfloat16; else it is refused."""
    lm = tiny_policy("llama").lm
    lm.stored_dtype = stored_dtype
    if way == "lora":
        add_lora(lm, rank=3)
    else:
        freeze(lm, 0.5)
    before = {name: p.clone() for name, p in lm.named_parameters()}

    saves_adapters = way == "lora" and not merge
    if saves_adapters or stored_dtype == torch.bfloat16:
        cast_frozen(lm, settings(way, merge=merge))
        assert {p.dtype for p in lm.parameters()} == {torch.float32, torch.bfloat16}
        return
    with pytest.raises(InputError, match="^--frozen_dtype bfloat16 would round"):
        cast_frozen(lm, settings(way, merge=merge))
    for name, p in lm.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, before[name])


@pytest.mark.parametrize(
    "kind, flags, words",
    [
        ("ppo", {"lora_rank": 2}, "needs --dtype bfloat16, not float32"),
        ("sft", {"dtype": "bfloat16"}, "it needs --lora_rank or --freeze_layers"),
        (
            "rm",
            {"dtype": "bfloat16", "sarm": "s", "lora_rank": 2, "merge": True},
            "--sarm takes no --frozen_dtype",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(kind, flags, words):
    with pytest.raises(InputError, match=words):
        SCRIPTS[kind].Config(frozen_dtype="bfloat16", **flags)


# --------------------------------------------------------------------------------- in the scripts


def run_both(base, kind, folder, **changes):
    """The same run with layers in float32 and in bfloat16, which must not differ in any bit."""
    for frozen_dtype in ("float32", "bfloat16"):
        train(
            base,
            kind,
            folder / frozen_dtype,
            dtype="bfloat16",
            frozen_dtype=frozen_dtype,
            **changes,
        )
    assert_bit_equal(folder / "float32", folder / "bfloat16")


@pytest.fixture
def stored_in_bfloat16(base, tmp_path):
    """The SFT policy in a model folder of bfloat16."""
    folder = tmp_path / "stored"
    shutil.copytree(base / "sft/model", folder)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    lm.to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tied(base, tmp_path):
    """The SFT policy, with its embeddings as its head too."""
    folder = tmp_path / "tied"
    shutil.copytree(base / "sft/model", folder)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    lm.config.tie_word_embeddings = True
    lm.tie_weights()
    lm.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo", "rm", "ppo"])
def test_runs_with_adapters_are_the_same(base, tmp_path, kind):
    """On weights that bfloat16 rounds; with dropout and recomputed activations."""
    run_both(
        base,
        kind,
        tmp_path,
        model=f"{base}/sft",
        lora_rank=2,
        lr=1e-2,
        checkpoint_activations=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "rm", "ppo"])
@pytest.mark.parametrize("way", [{"freeze_layers": 0.5}, {"lora_rank": 2, "merge": True}], ids=str)
def test_whole_models_are_saved_as_before(base, tmp_path, stored_in_bfloat16, kind, way):
    run_both(base, kind, tmp_path, model=stored_in_bfloat16, lr=1e-2, **way)
    saved = load_file(tmp_path / "bfloat16/model/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_a_run_may_go_on_with_the_other_type(base, tmp_path, tied, monkeypatch):
    """A run that did not fit in memory: it is the same run still."""
    changes = {"lora_rank": 2, "lr": 1e-2, "checkpoint_every": 1, "dtype": "bfloat16"}
    changes["model"] = tied
    train(base, "ppo", tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        patch.setattr("train_ppo.save_policy", kill)
        with pytest.raises(KeyboardInterrupt):
            train(base, "ppo", tmp_path / "killed", **changes)
    train(base, "ppo", tmp_path / "killed", frozen_dtype="bfloat16", **changes)
    assert_bit_equal(tmp_path / "whole", tmp_path / "killed")


def kill(*args):
    raise KeyboardInterrupt


def train_on_ranks(base, folder, changes):
    """What each of several processes does: PPO with adapters, layers in float32 and in bfloat16."""
    for frozen_dtype in ("float32", "bfloat16"):
        train(base, "ppo", f"{folder}/{frozen_dtype}", frozen_dtype=frozen_dtype, **changes)
    shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("distributed", ["ddp", "fsdp"])
@pytest.mark.parametrize("merge", [True, False])
def test_two_processes_change_nothing(base, tmp_path, stored_in_bfloat16, tied, distributed, merge):
    """Nor does merging, from shards too. Without it a tied head has weights of its own."""
    changes = {
        "model": stored_in_bfloat16 if merge else tied,
        "lora_rank": 2,
        "lr": 1e-2,
        "merge": merge,
        "dtype": "bfloat16",
        "distributed": distributed,
    }
    join(*ranks(2, train_on_ranks, str(base), str(tmp_path), changes))
    assert_bit_equal(tmp_path / "float32", tmp_path / "bfloat16")

"""The scripts on a GPU, next to the same runs on the CPU.

python -m pytest -q --gpu tests/runs/test_gpu.py tests/core/test_rollout.py
"""

import gc
import json
import signal
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file
from support import flags, launch, metrics, read_rows, write_rows
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

import probe
import sample_bon
import train_ppo
import train_rm
import train_sae
import train_sft
from nanorlhf import world
from nanorlhf.control import human_latents
from nanorlhf.hf.blocks import sampling
from nanorlhf.models import Policy
from nanorlhf.rollout import generate


@pytest.fixture(scope="module", autouse=True)
def a_gpu(request):
    if not request.config.getoption("--gpu"):
        pytest.skip("needs a GPU, and --gpu")
    assert torch.cuda.is_available(), "--gpu: torch sees no CUDA device here"


def train_all(root, folder, device):
    """Each kind of training on this device into `folder`, all from the material of `root`."""
    sft_config = train_sft.Config(
        output_dir=f"{folder}/sft",
        device=device,
        steps=60,
        batch_size=32,
        eval_size=16,
        warmup=2,
        max_new_tokens=12,
        lr=2e-3,
    )
    train_sft.main(sft_config)

    rm = {
        "device": device,
        "model": f"{root}/sft",
        "dataset": f"{root}/pairs.jsonl",
        "steps": 6,
        "batch_size": 16,
        "eval_size": 32,
        "warmup": 1,
    }
    train_rm.main(train_rm.Config(output_dir=f"{folder}/rm", **rm))

    # A SARM reads the residual stream of a layer, token by token, and takes no ReLU.
    sae_config = train_sae.Config(
        output_dir=f"{folder}/sae",
        device=device,
        model=f"{root}/sft",
        base="none",
        site="residual",
        layers="2",
        normalize="token",
        relu=False,
        k=8,
        steps=30,
        batch_size=256,
        eval_size=16,
        dataset=f"{root}/sft.jsonl",
        buffer_tokens=2048,
        dead_after=1000,
    )
    train_sae.main(sae_config)
    train_rm.main(train_rm.Config(output_dir=f"{folder}/sarm", sarm=f"{root}/sae", **rm))

    people_config = human_latents.HumanLatentsConfig(
        device=device,
        max_rows=64,
        reward_model=f"{root}/sarm",
        dataset=f"{root}/sft.jsonl",
        output=f"{folder}/people.safetensors",
    )
    human_latents.human_latents(people_config)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """sft/, rm/, sae/, sarm/ and people.safetensors, human latents, as the CPU makes them.

    gpu/: the same from the GPU, each from what the CPU has made. sft.jsonl, pairs.jsonl
    """
    root = tmp_path_factory.mktemp("gpu")
    write_rows(root / "sft.jsonl", world.demonstrations(240))
    write_rows(root / "pairs.jsonl", world.preferences(240))
    train_all(root, root, "cpu")
    train_all(root, root / "gpu", "cuda")
    return root


# What float error makes large, and what depends on the machine.
NOT_COMPARED = (
    "first_ratio_error",
    "explained_variance",
    "grad_norm",
    "tokens_per_second",
    "peak",
)


def check_close(rows, others, tolerance=2e-3):
    """The numbers of two runs differ by float error, row by row."""
    assert len(rows) == len(others)
    assert rows
    for row, other in zip(rows, others):
        assert row.keys() == other.keys()
        for name in row:
            is_number = isinstance(row[name], (int, float))
            if is_number and not name.startswith(NOT_COMPARED):
                place = (row.get("step"), name)
                expected = pytest.approx(other[name], rel=tolerance, abs=tolerance)
                assert row[name] == expected, place


def check_first_ratios(rows, bound):
    """The ratio of old to new log-probs begins at 1, up to this error."""
    for row in rows[1:]:
        assert row["first_ratio_error"] < bound


@pytest.mark.parametrize("run", ["sft", "rm", "sae", "sarm"])
def test_training(base, run):
    check_close(metrics(base / run), metrics(base / "gpu" / run), tolerance=2e-2)


def test_human_latents(base):
    """Where two latents are nearly equal another one of them may be the k-th largest."""
    tensors = load_file(base / "people.safetensors")
    others = load_file(base / "gpu/people.safetensors")
    assert tensors.keys() == others.keys()
    for name in tensors:
        if tensors[name].is_floating_point():
            is_different = (tensors[name] - others[name]).abs() > 1e-3
            assert is_different.float().mean() < 0.01


# ---------------------------------------------------------------------------------------------- PPO


def settings_of(base, **changes):
    """A small run of PPO on the GPU."""
    settings = {
        "model": f"{base}/sft",
        "reward_model": [f"{base}/rm"],
        "steps": 3,
        "batch_size": 64,
        "minibatch_size": 16,
        "ppo_epochs": 2,
        "max_new_tokens": 24,
        "eval_size": 32,
        "eval_every": 0,
        "kl_coef": 0.05,
        "lr": 2e-4,
        "device": "cuda",
    }
    return {**settings, **changes}


def ppo(base, folder, **changes):
    """A PPO run -> the rows of its metrics. Nothing may fall back to a slower path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "rollouts decode")
        train_ppo.main(train_ppo.Config(output_dir=str(folder), **settings_of(base, **changes)))
    return metrics(folder)


def column(rows, name):
    """One field of all rows."""
    return [row[name] for row in rows]


def check_ppo_is_the_run_of_the_cpu(base, folder, **changes):
    on_cpu = ppo(base, folder / "cpu", device="cpu", **changes)
    on_gpu = ppo(base, folder / "cuda", device="cuda", **changes)
    check_first_ratios(on_gpu, 3e-5)
    # The evaluation before training, and the first step.
    check_close(on_cpu[:2], on_gpu[:2], tolerance=1e-2)

    # A float error may flip a token, so two of the 32 answers may differ.
    answers = column(read_rows(folder / "cpu/eval/step_0.jsonl"), "response")
    others = column(read_rows(folder / "cuda/eval/step_0.jsonl"), "response")
    n_same = sum(answer == other for answer, other in zip(answers, others))
    assert n_same >= 30
    assert abs(on_cpu[-1]["score_mean"] - on_gpu[-1]["score_mean"]) < 0.2


LORA = {"lora_rank": 4, "lr": 1e-3}
LESS_MEMORY = {"tokens_per_micro_batch": 400, "checkpoint_activations": True}


@pytest.mark.parametrize("changes", [{}, {"freeze_layers": 0.5}, LORA, LESS_MEMORY], ids=str)
def test_ppo_is_the_run_of_the_cpu(base, tmp_path, changes):
    check_ppo_is_the_run_of_the_cpu(base, tmp_path, **changes)


def test_ppo_with_a_value_model_is_the_run_of_the_cpu(base, tmp_path):
    check_ppo_is_the_run_of_the_cpu(base, tmp_path, value_model=f"{base}/sft")


def test_ppo_with_feature_penalties_is_the_run_of_the_cpu(base, tmp_path):
    check_ppo_is_the_run_of_the_cpu(
        base,
        tmp_path,
        reward_model=[f"{base}/sarm"],
        human_latents=f"{base}/people.safetensors",
        penalize_features=[1, 2],
        tau=["q0.6", "q0.6"],
        alpha=["0.5std", "0.5std"],
        penalty="hinge",
        clamp=["3:max:0.5"],
        density_beta=0.3,
    )


FROZEN_IN_BFLOAT16 = {**LORA, "frozen_dtype": "bfloat16"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        LORA,
        FROZEN_IN_BFLOAT16,
        {"freeze_layers": 0.5},
        {"compile": True},
        {"compile": True, **LORA},
    ],
    ids=str,
)
def test_bfloat16(base, tmp_path, changes):
    rows = ppo(base, tmp_path, dtype="bfloat16", **changes)
    check_first_ratios(rows, 0.15)
    assert rows[-1]["score_mean"] > rows[1]["score_mean"] - 0.2


def test_a_killed_run_goes_on(base, tmp_path):
    """Sums on a GPU may differ in their last bits.

    So a resumed run is close to one that was never killed, and need not be equal to it.
    """
    slow = {"steps": 8, "checkpoint_every": 2, "lr": 1e-5}
    whole = ppo(base, tmp_path / "whole", **slow)
    folder = tmp_path / "killed"
    place = ["--output_dir", str(folder)]
    process = launch("ppo", *place, *flags(settings_of(base, **slow)))
    while not list(folder.glob("checkpoint/*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "summary.json").exists()

    process = launch("ppo", *place, "--resume")
    assert process.wait(120) == 0, process.stderr.read()
    rows = metrics(folder)
    assert column(rows, "step") == column(whole, "step")
    check_close(whole[:3], rows[:3])
    # After the kill a float error may have flipped tokens.
    for row, other in zip(rows[3:], whole[3:]):
        assert abs(row["score_mean"] - other["score_mean"]) < 0.1
        assert abs(row["kl"] - other["kl"]) < 0.05


# --------------------------------------------------------------- rollouts with compiled blocks


def random_policy(kind="llama", width=256, layers=4):
    """A policy of random weights on the GPU, large enough that distributions are far from flat."""
    shape = dict(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        intermediate_size=4 * width,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    config = GPTNeoXConfig(**shape)
    if kind == "llama":
        config = LlamaConfig(**shape, num_key_value_heads=2)
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(config)).eval().cuda()
    policy.value_head.weight.data.normal_()
    return policy


def roll(policy, rows, width, new, bfloat16, compiled):
    """Answers of `new` tokens to random prompts of up to `width` tokens."""
    generator = torch.Generator().manual_seed(width)
    ids = torch.randint(1000, (rows, width), generator=generator).cuda()
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator).cuda()
    mask = torch.arange(width, device="cuda") >= width - lengths
    policy.lm.compiled = compiled
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=bfloat16)
    with autocast, sampling(policy.lm), warnings.catch_warnings():
        warnings.filterwarnings("error", "rollouts decode")
        return generate(policy, ids, mask, new)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("kind", ["neox", "llama"])
def test_compiled_rollouts_are_those_of_the_static_loop(kind, bfloat16):
    """Also the later ones, which replay kept steps: other weights, prompts and their widths."""
    policy = random_policy(kind)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    kept = []
    for width in (60, 30, 60):
        plain = roll(policy, 32, width, 100, bfloat16, compiled=False)
        compiled = roll(policy, 32, width, 100, bfloat16, compiled=True)
        # Floats differ in their last bits, and with them a token now and then: the rest of its row
        # is then another text.
        agreed = (plain.response_ids != compiled.response_ids).cumsum(1) == 0
        assert agreed.float().mean() > (0.5 if bfloat16 else 0.9)
        for name in ("logprobs", "entropies", "values"):
            difference = (getattr(plain, name) - getattr(compiled, name))[agreed].abs()
            assert difference.mean() < (5e-2 if bfloat16 else 1e-3), name

        [decoder] = policy.decoders.values()
        kept.append(decoder)
        for step in decoder.steps.values():
            assert step.__name__ == "replay"
        for p in policy.parameters():
            p.data.add_(0.01 * torch.randn_like(p) * p.data.abs().mean())
    assert kept[0] is kept[1] is kept[2]
    # A captured step for each multiple of 64 columns that was read.
    assert sorted(decoder.steps) == [64, 128, 192]
    # One graph for all four blocks; and one whose length is not fixed, for all other multiples.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_what_compiled_rollouts_keep_is_what_memory_py_says():
    """Copies of linear weights and a cache; a step's temporaries come on top."""
    policy = random_policy("neox", width=1024, layers=8)
    rows, width, new = 128, 64, 128
    roll(policy, 2, 8, 8, True, compiled=False)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        roll(policy, rows, width, new, True, compiled=True)
    gc.collect()
    kept = torch.cuda.memory_allocated() - before

    linear = [m for m in policy.lm.modules() if isinstance(m, torch.nn.Linear)]
    copies = 2 * sum(p.numel() for m in linear for p in m.parameters())
    cache = 2 * 2 * 8 * rows * (width + new) * 1024
    step = 24 * rows * 1000
    print(f"kept: {kept / 1e6:.0f} MB; copies and cache: {(copies + cache) / 1e6:.0f} MB")
    assert kept >= copies + cache
    # The libraries' workspaces, up to 32 MiB a stream, are the rest.
    assert kept < copies + cache + step + 256e6

    policy.decoders.clear()
    policy.linear_copies = None
    gc.collect()
    assert torch.cuda.memory_allocated() - before < kept - copies - cache + 1e6


# ------------------------------------------------------------------ best-of-n, diversity and probes


def run_on_both(config_class, main, folder, result, **given):
    """A command on each device, into folder/cpu and folder/cuda. -> the two JSON files `result`"""
    found = []
    for device in ("cpu", "cuda"):
        main(config_class(output_dir=str(folder / device), device=device, **given))
        found.append(json.loads((folder / device / result).read_text()))
    return found


def test_best_of_n_and_diversity(base, tmp_path):
    on_cpu, on_gpu = run_on_both(
        sample_bon.Config,
        sample_bon.main,
        tmp_path,
        "diversity.json",
        model=f"{base}/sft",
        reward_model=[f"{base}/rm"],
        n_answers=8,
        n=[1, 4],
        eval_size=16,
        max_new_tokens=16,
        diversity=True,
        encoder=f"{base}/sft",
    )
    for system, measures in on_cpu["systems"].items():
        for protocol in ("per_input", "across_input"):
            for name in ("ead", "embedding", "length"):
                mean = measures[protocol][name]["mean"]
                other = on_gpu["systems"][system][protocol][name]["mean"]
                assert mean == pytest.approx(other, rel=0.02), (protocol, name)


def numbers_in(value):
    """All floats of a summary, in order, but for its settings."""
    if isinstance(value, float):
        return [value]
    parts = []
    if isinstance(value, dict):
        parts = [value[key] for key in sorted(value) if key != "config"]
    elif isinstance(value, list):
        parts = value
    numbers = []
    for part in parts:
        numbers += numbers_in(part)
    return numbers


PROBES = [
    ("evaluate", {"reward_model": ["rm"]}),
    ("reward_features", {"reward_model": "sarm"}),
    ("causal", {"reward_model": "sarm", "edits": ["3:+:1"]}),
    ("divergence", {"model": "sft", "policy": "gpu/sft", "kind": "pairs"}),
]


@pytest.mark.parametrize("name, given", PROBES, ids=[name for name, _ in PROBES])
def test_probes(base, tmp_path, monkeypatch, name, given):
    """A command of probe.py. One number in twenty may differ, where a float error decides."""
    monkeypatch.chdir(base)
    config_class, main = probe.COMMANDS[name]
    given = {"dataset": "pairs.jsonl", **given}
    on_cpu, on_gpu = run_on_both(config_class, main, tmp_path, "summary.json", **given)
    numbers = numbers_in(on_cpu)
    others = numbers_in(on_gpu)
    assert len(numbers) == len(others)
    assert len(numbers) > 3
    n_close = 0
    for number, other in zip(numbers, others):
        n_close += number == pytest.approx(other, rel=0.02, abs=0.02)
    assert n_close >= 0.95 * len(numbers)

"""The scripts on a GPU, next to the same runs on the CPU. python -m pytest -q --gpu tests/runs/test_gpu.py tests/core/test_rollout.py"""

import json
import signal
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file
from support import flags, launch, metrics, read_rows, write_rows

import probe
import sample_bon
import train_ppo
import train_rm
import train_sae
import train_sft
from nanorlhf import world
from nanorlhf.control import human_latents


@pytest.fixture(scope="module", autouse=True)
def a_gpu(request):
    if not request.config.getoption("--gpu"):
        pytest.skip("needs a GPU, and --gpu")
    assert torch.cuda.is_available(), "--gpu: torch sees no CUDA device here"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """sft/ and rm/ as the CPU trains them, a SARM on an autoencoder of sft, human latents, files of data; gpu/ the same from the GPU."""
    root = tmp_path_factory.mktemp("gpu")
    write_rows(root / "sft.jsonl", world.demonstrations(240))
    write_rows(root / "pairs.jsonl", world.preferences(240))
    for device, folder in (("cpu", root), ("cuda", root / "gpu")):
        sft = {
            "steps": 60,
            "batch_size": 32,
            "eval_size": 16,
            "warmup": 2,
            "max_new_tokens": 12,
            "lr": 2e-3,
        }
        train_sft.main(train_sft.Config(output_dir=f"{folder}/sft", device=device, **sft))
        rm = {
            "model": f"{root}/sft",
            "dataset": f"{root}/pairs.jsonl",
            "steps": 6,
            "batch_size": 16,
            "eval_size": 32,
            "warmup": 1,
        }
        train_rm.main(train_rm.Config(output_dir=f"{folder}/rm", device=device, **rm))
        sae = {
            "model": f"{root}/sft",
            "base": "none",
            "site": "residual",
            "layers": "2",
            "normalize": "token",
            "relu": False,
            "k": 8,
        }
        sae |= {
            "steps": 30,
            "batch_size": 256,
            "eval_size": 16,
            "dataset": f"{root}/sft.jsonl",
            "buffer_tokens": 2048,
            "dead_after": 1000,
        }
        train_sae.main(train_sae.Config(output_dir=f"{folder}/sae", device=device, **sae))
        train_rm.main(
            train_rm.Config(output_dir=f"{folder}/sarm", device=device, sarm=f"{root}/sae", **rm)
        )
        people = {
            "reward_model": f"{root}/sarm",
            "dataset": f"{root}/sft.jsonl",
            "output": f"{folder}/people.safetensors",
        }
        human_latents.human_latents(
            human_latents.HumanLatentsConfig(device=device, max_rows=64, **people)
        )
    return root


def close(
    a,
    b,
    rel=2e-3,
    atol=2e-3,
    but=("first_ratio_error", "explained_variance", "grad_norm", "tokens_per_second", "peak"),
):
    """The numbers of two runs that differ by float error, row by row."""
    assert len(a) == len(b) > 0
    for row, other in zip(a, b):
        assert row.keys() == other.keys()
        for name in row:
            if not name.startswith(but) and isinstance(row[name], (int, float)):
                assert row[name] == pytest.approx(other[name], rel=rel, abs=atol), (
                    row.get("step"),
                    name,
                )


@pytest.mark.parametrize("run", ["sft", "rm", "sae", "sarm"])
def test_training(base, run):
    close(metrics(base / run), metrics(base / "gpu" / run), rel=2e-2, atol=2e-2)


def test_human_latents(base):
    a, b = (load_file(folder / "people.safetensors") for folder in (base, base / "gpu"))
    assert a.keys() == b.keys()
    for name in a:
        if (
            a[name].is_floating_point()
        ):  # where two latents are nearly equal another one of them may be the k-th largest
            assert (a[name] - b[name]).abs().gt(1e-3).float().mean() < 0.01


def settings(base, **changes):
    return {"model": f"{base}/sft", "reward_model": [f"{base}/rm"], "steps": 3, "batch_size": 64, "minibatch_size": 16, "ppo_epochs": 2,
            "max_new_tokens": 24, "eval_size": 32, "eval_every": 0, "kl_coef": 0.05, "lr": 2e-4, "device": "cuda", **changes}  # fmt: skip


def ppo(base, folder, **changes):
    """A PPO run -> the rows of its metrics. Nothing may fall back to a slower path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "rollouts decode")
        train_ppo.main(train_ppo.Config(output_dir=str(folder), **settings(base, **changes)))
    return metrics(folder)


FEATURES = {"penalize_features": [1, 2], "tau": ["q0.6"] * 2, "alpha": ["0.5std"] * 2, "penalty": "hinge", "clamp": ["3:max:0.5"],
            "density_beta": 0.3}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"value_model": "sft"}, {"features": True}, {"freeze_layers": 0.5}, {"lora_rank": 4, "lr": 1e-3},
                                     {"tokens_per_micro_batch": 400, "checkpoint_activations": True}], ids=str)  # fmt: skip
def test_ppo_is_the_run_of_the_cpu(base, tmp_path, changes):
    changes = dict(changes)
    if changes.pop("features", False):
        changes |= FEATURES | {
            "reward_model": [f"{base}/sarm"],
            "human_latents": f"{base}/people.safetensors",
        }
    if "value_model" in changes:
        changes["value_model"] = f"{base}/sft"
    here, there = (
        ppo(base, tmp_path / device, device=device, **changes) for device in ("cpu", "cuda")
    )
    assert max(row["first_ratio_error"] for row in there[1:]) < 3e-5
    close(
        here[:2], there[:2], rel=1e-2, atol=1e-2
    )  # the evaluation before training, and the first step
    answers = [
        [row["response"] for row in read_rows(tmp_path / device / "eval/step_0.jsonl")]
        for device in ("cpu", "cuda")
    ]
    assert sum(a == b for a, b in zip(*answers)) >= 30  # of 32: a float error may flip a token
    assert abs(here[-1]["score_mean"] - there[-1]["score_mean"]) < 0.2


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora_rank": 4, "lr": 1e-3}, {"freeze_layers": 0.5}, {"compile": True}],
    ids=str,
)
def test_bfloat16(base, tmp_path, changes):
    rows = ppo(base, tmp_path, dtype="bfloat16", **changes)
    assert (
        max(row["first_ratio_error"] for row in rows[1:]) < 0.15
        and rows[-1]["score_mean"] > rows[1]["score_mean"] - 0.2
    )


def test_a_killed_run_goes_on(base, tmp_path):
    """Sums on a GPU may differ in their last bits: a resumed run is close to one that was never killed."""
    whole = ppo(base, tmp_path / "whole", steps=8, checkpoint_every=2, lr=1e-5)
    folder = tmp_path / "killed"
    process = launch(
        "ppo",
        *flags(settings(base, steps=8, checkpoint_every=2, lr=1e-5)),
        "--output_dir",
        str(folder),
    )
    while not list(folder.glob("checkpoint/*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "summary.json").exists()
    process = launch("ppo", "--resume", "--output_dir", str(folder))
    assert process.wait(120) == 0, process.stderr.read()
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    close(whole[:3], rows[:3])
    for row, other in zip(
        rows[3:], whole[3:]
    ):  # after the kill; a float error may have flipped tokens by then
        assert (
            abs(row["score_mean"] - other["score_mean"]) < 0.1
            and abs(row["kl"] - other["kl"]) < 0.05
        )


def command(name, folder, **given):
    """A command of probe.py, or sample_bon.py, into a folder of its own for each device -> the two summaries."""
    Config, function = (
        probe.COMMANDS[name] if name in probe.COMMANDS else (sample_bon.Config, sample_bon.main)
    )
    for device in ("cpu", "cuda"):
        function(Config(output_dir=str(folder / device), device=device, **given))
    file = "diversity.json" if name == "sample_bon" else "summary.json"
    return [json.loads((folder / device / file).read_text()) for device in ("cpu", "cuda")]


def test_best_of_n_and_diversity(base, tmp_path):
    a, b = command("sample_bon", tmp_path, model=f"{base}/sft", reward_model=[f"{base}/rm"], n_answers=8, n=[1, 4], eval_size=16,
                   max_new_tokens=16, diversity=True, encoder=f"{base}/sft")  # fmt: skip
    for x, y in zip(a["systems"].values(), b["systems"].values()):
        for protocol in ("per_input", "across_input"):
            for name in ("ead", "embedding", "length"):
                assert x[protocol][name]["mean"] == pytest.approx(
                    y[protocol][name]["mean"], rel=0.02
                ), (protocol, name)


def numbers(x):
    """All numbers of a summary, in order."""
    if isinstance(x, dict):
        return [n for key in sorted(x) if key != "config" for n in numbers(x[key])]
    return (
        [n for y in x for n in numbers(y)]
        if isinstance(x, list)
        else [x]
        if isinstance(x, float)
        else []
    )


@pytest.mark.parametrize("name, given", [
    ("evaluate", {"reward_model": ["rm"]}), ("reward_features", {"reward_model": "sarm"}), ("causal", {"reward_model": "sarm", "edits": ["3:+:1"]}),
    ("divergence", {"model": "sft", "policy": "gpu/sft", "kind": "pairs"}),
], ids=str)  # fmt: skip
def test_probes(base, tmp_path, monkeypatch, name, given):
    monkeypatch.chdir(base)
    a, b = map(numbers, command(name, tmp_path, dataset="pairs.jsonl", **given))
    assert len(a) == len(b) > 3 and sum(
        x == pytest.approx(y, rel=0.02, abs=0.02) for x, y in zip(a, b)
    ) >= 0.95 * len(a)

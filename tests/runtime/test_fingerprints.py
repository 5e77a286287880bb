"""Fingerprints of a run's inputs: what they hold, which settings they cover, and runs whose inputs changed while they were dead."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import torch
from support import ENV, REPO

import train_ppo
import train_rm
import train_sae
import train_sft
from nanorlhf.errors import InputError
from nanorlhf.runtime import cli, fingerprints
from nanorlhf.runtime.distributed import Dist
from nanorlhf.runtime.fingerprints import DATA, FEATURES, MODELS, fingerprint_path, input_paths
from nanorlhf.runtime.locks import unlock_afterwards
from nanorlhf.runtime.log import RunFolder

ALONE = Dist(0, 1, torch.device("cpu"))


# ------------------------------------------------------------------------------ the fingerprint of a path


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_fingerprint_of_a_file(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text("one")
    found = fingerprint_path(str(path))
    # digest(x) is the SHA-256 of x in a JSON list, cut to 20 hexadecimal digits.
    assert found["digest"] == sha256(json.dumps([sha256("one")]))[:20]
    assert found["size"] == 3
    assert found["mtime"] == path.stat().st_mtime_ns


def test_a_file_of_the_same_size_and_time_is_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_text("one")
    known = fingerprint_path(str(path))

    read = []
    digest_file = fingerprints.digest_file
    monkeypatch.setattr(
        fingerprints, "digest_file", lambda name: read.append(name) or digest_file(name)
    )
    assert fingerprint_path(str(path), known) == known
    assert read == []

    os.utime(path, ns=(0, 0))  # copied, or touched: the content is read, and it is the same
    touched = fingerprint_path(str(path), known)
    assert touched == {**known, "mtime": 0}
    assert read == [str(path)]

    path.write_text("two")
    assert fingerprint_path(str(path), known)["digest"] != known["digest"]


def test_the_fingerprint_of_a_folder_sees_every_file_but_hidden_ones(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "inside/weights").write_text("w")
    before = fingerprint_path(str(tmp_path))
    assert before["size"] == 3

    (tmp_path / ".lock").write_text("")
    assert fingerprint_path(str(tmp_path))["digest"] == before["digest"]

    (tmp_path / "inside/weights").write_text("v")
    assert fingerprint_path(str(tmp_path))["digest"] != before["digest"]

    (tmp_path / "inside/weights").write_text("w")
    (tmp_path / "config.json").rename(tmp_path / "renamed.json")
    assert fingerprint_path(str(tmp_path))["digest"] != before["digest"]


def test_a_fingerprint_writes_nothing_beside_its_input(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model").chmod(0o555)
    fingerprint_path(str(tmp_path / "model"))
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(tmp_path / "model") == ["config.json"]


# ----------------------------------------------------------------------------------- from names to files


@pytest.mark.parametrize("setting, value, expected", [
    ("model", "a.jsonl", ["a.jsonl"]),
    ("model", "run", ["run/model"]),
    ("model", "gpt2", []),
    ("reward_model", ["a.jsonl", "run", "world:gold"], ["a.jsonl", "run/model"]),
    ("reward_model", ["code.py:reward"], ["code.py"]),
    ("dataset", "world:3", []),
    ("dataset", "folder:train", ["folder"]),
    ("eval_splits", ["test", "new=a.jsonl", "cnn=cnn_dm:folder"], ["a.jsonl", "folder"]),
    ("in_distribution", "code.py:is_short", ["code.py"]),
    ("in_distribution", "folder=a.jsonl", []),
    ("human_latents", "a.jsonl", ["a.jsonl"]),
    ("lr", 0.5, []),
])  # fmt: skip
def test_the_files_that_a_setting_names(tmp_path, monkeypatch, setting, value, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "code.py").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "run/model").mkdir(parents=True)
    assert input_paths({setting: value}) == expected


def test_an_adapter_brings_the_models_below_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, base in (("base", ""), ("first", "base"), ("second", "first"), ("circle", "circle")):
        os.mkdir(name)
        Path(name, "adapter_model.safetensors").write_text("")
        adapter = {
            "peft_type": "LORA",
            "r": 1,
            "lora_alpha": 1,
            "lora_dropout": 0,
            "target_modules": "x",
        }
        if base:
            Path(name, "adapter_config.json").write_text(
                json.dumps(adapter | {"base_model_name_or_path": base})
            )
    assert input_paths({"model": "second"}) == ["second", "first", "base"]
    with pytest.raises(InputError, match="circle: an adapter whose base model leads back to"):
        input_paths({"model": "circle"})


# Settings that are texts and yet name no input of a run: choices, places for output, numbers as text.
NO_INPUTS = {
    "output_dir", "device", "dtype", "distributed", "prompt_format", "schedule", "columns", "lora_layers", "loss", "loss_type",
    "objective", "tau", "alpha", "penalty", "clamp", "kl_kind", "kl_in", "score_scaling", "score_gold", "sarm_mode", "layers",
    "site", "sae", "normalize", "bias", "texts", "kind", "tokens", "cache",
}  # fmt: skip


@pytest.mark.parametrize("script", [train_sft, train_rm, train_ppo, train_sae])
def test_every_text_setting_is_an_input_or_known_to_be_none(script):
    """A new flag that takes a file must get its fingerprint: this fails until somebody has decided."""
    texts = {f.name for f in fields(script.Config) if f.type in (str, list[str])}
    assert texts <= {*MODELS, *DATA, *FEATURES, *NO_INPUTS}


# ------------------------------------------------------------------------------------------------ run folders


@dataclass
class Config:
    output_dir: str
    dataset: str = ""
    model: str = ""
    reward_model: list[str] = field(default_factory=list)
    resume: bool = False


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A folder with one input of each kind, and the settings of a run that names them."""
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("{}")
    Path("reward.py").write_text("def reward(prompts, responses): return [15.0] * len(responses)")
    Path("sft/model").mkdir(parents=True)
    Path("sft/model/config.json").write_text("{}")
    return {"dataset": "data.jsonl", "model": "sft", "reward_model": ["reward.py:reward"]}


@pytest.mark.parametrize("changed", ["data.jsonl", "reward.py", "sft/model/config.json"])
@pytest.mark.parametrize("state", ["unfinished", "done"])
def test_a_run_refuses_an_input_that_has_changed(inputs, changed, state):
    folder = RunFolder(Config("run", **inputs), ALONE)
    folder.create()
    if state == "done":
        folder.finish({})
    os.utime(changed, ns=(0, 0))  # its time alone: the same content
    assert RunFolder(Config("run", **inputs), ALONE).state == state

    Path(changed).write_text("another content")
    name = "sft/model" if changed.startswith("sft") else changed
    with pytest.raises(InputError, match=f"^{name} has changed since the run in run began"):
        RunFolder(Config("run", **inputs, resume=True), ALONE)


def test_an_input_that_changes_while_a_run_sets_up_is_noticed(inputs):
    with unlock_afterwards():
        folder = RunFolder(Config("run", **inputs), ALONE)
        Path("reward.py").write_text(
            "def reward(prompts, responses): return [-15.0] * len(responses)"
        )
        with pytest.raises(InputError, match="reward.py has changed"):
            folder.create()
    assert not os.path.exists("run")


def test_a_model_that_is_trained_while_a_run_sets_up_is_its_input(inputs):
    folder = RunFolder(Config("run", model="later"), ALONE)
    Path("later").mkdir()
    Path("later/config.json").write_text("{}")
    folder.create()
    Path("later/config.json").write_text("[]")
    with pytest.raises(InputError, match="later has changed"):
        RunFolder(Config("run", model="later"), ALONE)


def test_a_run_older_than_fingerprints_goes_on(inputs):
    RunFolder(Config("run", **inputs), ALONE).create()
    stored = json.loads(Path("run/config.json").read_text())
    assert sorted(stored.pop("inputs")) == ["data.jsonl", "reward.py", "sft/model"]
    Path("run/config.json").write_text(json.dumps(stored))
    Path("data.jsonl").write_text("another content")
    assert RunFolder(Config("run", **inputs), ALONE).state == "unfinished"


@pytest.mark.slow
def test_a_hub_model_of_another_commit_is_refused(tmp_path):
    """The hub's copy on this machine, as its library lays it out, without a network; the cache's place is fixed at import."""
    script = """
import sys
from nanorlhf.runtime.log import RunFolder
sys.path.insert(0, sys.argv[1])
from test_fingerprints import ALONE, Config, InputError
try:
    RunFolder(Config("run", model="me/tiny"), ALONE).create()
except InputError as e:
    sys.exit(str(e))
"""
    cache = tmp_path / "hub/models--me--tiny"

    def run(commit):
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs/main").write_text(commit)
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text("{}")
        command = [sys.executable, "-c", script, os.path.dirname(__file__)]
        env = {**ENV, "HF_HUB_CACHE": str(tmp_path / "hub")}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    first = run("a" * 40)
    assert first.returncode == 0, first.stderr
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert stored["inputs"]["me/tiny"]["digest"] == "a" * 40
    assert "me/tiny has changed" in run("b" * 40).stderr


# ---------------------------------------------------------------------------------- real runs that were killed


REWARD = """
import os, signal
calls = 0
def reward(prompts, responses):
    global calls
    calls += 1
    if calls == int(os.environ.get("KILL_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    return [SIGN * 15.0] * len(responses)
"""


def launch(folder, *args, **env):
    command = [sys.executable, str(REPO / "train_ppo.py"), "--output_dir", "run", *args]
    return subprocess.run(command, cwd=folder, env={**ENV, **env}, capture_output=True, text=True)


@pytest.mark.slow
def test_a_killed_ppo_run_does_not_go_on_with_another_reward(tmp_path):
    from transformers import AutoModelForCausalLM

    from nanorlhf import world

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(world.model_config()).save_pretrained(tmp_path / "policy")
    world.tokenizer().save_pretrained(tmp_path / "policy")
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD.replace("SIGN", "+1"))
    settings = ["--model", "policy", "--reward_model", "reward.py:reward", "--steps", "3", "--checkpoint_every", "1",
                "--batch_size", "4", "--minibatch_size", "4", "--eval_size", "4", "--max_new_tokens", "4"]  # fmt: skip
    assert launch(tmp_path, *settings, KILL_AT="3").returncode == -signal.SIGKILL

    reward.write_text(REWARD.replace("SIGN", "-1"))
    refused = launch(tmp_path, "--resume")
    assert refused.returncode == 2
    assert refused.stderr == (
        "train_ppo.py: error: reward.py has changed since the run in run began; put its old content back, choose another "
        "--output_dir or, to go on with the new content, delete its entry in run/config.json\n"
    )

    reward.write_text(REWARD.replace("SIGN", "+1"))
    resumed = launch(tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "--resume runs the code in reward.py, as run/config.json says" in resumed.stdout
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["score_mean"] for row in rows[1:]] == [15.0] * 3


# ------------------------------------------------------------------------------- code inside a run folder


@pytest.mark.parametrize("setting, text", [
    ("reward_model", ["run/reward.py:reward"]),
    ("gold_model", "run/reward.py:reward"),
    ("gold_model", "link.py:reward"),
    ("in_distribution", "./run/../run/reward.py:reward"),
])  # fmt: skip
def test_resume_refuses_code_that_came_with_the_run(tmp_path, monkeypatch, setting, text):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/reward.py").write_text("raise SystemExit('this was run')")
    Path("link.py").symlink_to("run/reward.py")
    settings = {"dataset": "data.jsonl", setting: text}
    Path("run/config.json").write_text(json.dumps(settings))

    spec = text if isinstance(text, str) else text[0]
    with pytest.raises(
        InputError, match="--resume does not run .*which lies in the run folder"
    ) as error:
        cli.parse(train_ppo.Config, ["--output_dir", "run", "--resume"])
    assert f"--{setting} {spec}" in str(error.value)

    # Whoever names it in the command means it.
    config = cli.parse(train_ppo.Config, ["--output_dir", "run", "--resume", f"--{setting}", spec])
    assert getattr(config, setting) == text


def test_resume_prints_the_path_of_other_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("reward.py").write_text("")
    Path("run/config.json").write_text(json.dumps({"gold_model": "reward.py:gold"}))
    cli.parse(train_ppo.Config, ["--output_dir", "run", "--resume"])
    assert (
        capsys.readouterr().out == "--resume runs the code in reward.py, as run/config.json says\n"
    )

"""Fingerprints of a run's inputs: what they hold, and which settings they cover.

Then runs whose inputs changed while they were dead.
"""

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
from support import ENV, REPO, read_rows
from transformers import AutoModelForCausalLM

import train_ppo
import train_rm
import train_sae
import train_sft
from nanorlhf import world
from nanorlhf.errors import InputError
from nanorlhf.runtime import cli, fingerprints
from nanorlhf.runtime.distributed import Dist
from nanorlhf.runtime.fingerprints import DATA, FEATURES, MODELS, fingerprint_path, input_paths
from nanorlhf.runtime.locks import unlock_afterwards
from nanorlhf.runtime.log import RunFolder

ALONE = Dist(0, 1, torch.device("cpu"))


# ------------------------------------------------------------------------ the fingerprint of a path


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
    real_digest_file = fingerprints.digest_file

    def digest_file(name):
        read.append(name)
        return real_digest_file(name)

    monkeypatch.setattr(fingerprints, "digest_file", digest_file)
    assert fingerprint_path(str(path), known) == known
    assert read == []

    # It is copied or touched: the content is read, and it is the same.
    os.utime(path, ns=(0, 0))
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

    # A hidden file does not count, nor does what is in a hidden folder.
    (tmp_path / ".lock").write_text("")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/file").write_text("x")
    assert fingerprint_path(str(tmp_path))["digest"] == before["digest"]

    # The content of every other file counts, and so does its name.
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


# ------------------------------------------------------------------------------ from names to files


@pytest.mark.parametrize(
    "setting, value, expected",
    [
        ("model", "a.jsonl", ["a.jsonl"]),
        # A run's model is in its folder model/.
        ("model", "run", ["run/model"]),
        # Names on the hub and in the embedded world are no files.
        ("model", "gpt2", []),
        ("reward_model", ["a.jsonl", "run", "world:gold"], ["a.jsonl", "run/model"]),
        ("reward_model", ["code.py:reward"], ["code.py"]),
        ("dataset", "world", []),
        ("dataset", "world:3", []),
        ("dataset", "folder:train", ["folder"]),
        ("eval_splits", ["test", "new=a.jsonl", "cnn=cnn_dm:folder"], ["a.jsonl", "folder"]),
        ("in_distribution", "code.py:is_short", ["code.py"]),
        # A column and its value, though they look like names.
        ("in_distribution", "folder=a.jsonl", []),
        ("human_latents", "a.jsonl", ["a.jsonl"]),
        ("lr", 0.5, []),
    ],
)
def test_the_files_that_a_setting_names(tmp_path, monkeypatch, setting, value, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "code.py").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "world").mkdir()
    (tmp_path / "run/model").mkdir(parents=True)
    assert input_paths({setting: value}) == expected


def make_adapter(name, base):
    """A folder with a LoRA adapter of another folder's model, as far as is read of it."""
    os.mkdir(name)
    Path(name, "adapter_model.safetensors").write_text("")
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0,
        "target_modules": "x",
        "base_model_name_or_path": base,
    }
    Path(name, "adapter_config.json").write_text(json.dumps(config))


def test_an_adapter_brings_the_models_below_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("base")
    make_adapter("first", base="base")
    make_adapter("second", base="first")
    assert input_paths({"model": "second"}) == ["second", "first", "base"]


def test_an_adapter_whose_base_is_itself_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_adapter("circle", base="circle")
    with pytest.raises(InputError, match="circle: an adapter whose base model leads back to"):
        input_paths({"model": "circle"})


# Settings that are texts and yet name no input of a run.
CHOICES = {
    "device",
    "dtype",
    "frozen_dtype",
    "distributed",
    "prompt_format",
    "schedule",
    "loss",
    "loss_on",
    "loss_type",
    "objective",
    "advantage",
    "loss_mean",
    "penalty",
    "kl_kind",
    "kl_in",
    "score_scaling",
    "sarm_mode",
    "site",
    "normalize",
    "bias",
    "texts",
    "kind",
    "tokens",
}
NUMBERS_AS_TEXT = {"lora_layers", "layers", "tau", "alpha", "clamp"}
# The autoencoder `sae` is known by its latents' fingerprint, `columns` are names of fields.
OTHERS = {"output_dir", "cache", "score_gold", "columns", "sae"}


@pytest.mark.parametrize("script", [train_sft, train_rm, train_ppo, train_sae])
def test_every_text_setting_is_an_input_or_known_to_be_none(script):
    """A flag that takes a file must get its fingerprint: this fails until somebody decides."""
    texts = {f.name for f in fields(script.Config) if f.type in (str, list[str])}
    inputs = {*MODELS, *DATA, *FEATURES}
    assert texts <= inputs | CHOICES | NUMBERS_AS_TEXT | OTHERS


# -------------------------------------------------------------------------------------- run folders


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


@pytest.mark.parametrize(
    "changed, name",
    [
        ("data.jsonl", "data.jsonl"),
        ("reward.py", "reward.py"),
        ("sft/model/config.json", "sft/model"),
    ],
)
@pytest.mark.parametrize("state", ["unfinished", "done"])
def test_a_run_refuses_an_input_that_has_changed(inputs, changed, name, state):
    folder = RunFolder(Config("run", **inputs), ALONE)
    folder.create()
    if state == "done":
        folder.finish({})
    # Its time alone has changed.
    os.utime(changed, ns=(0, 0))
    assert RunFolder(Config("run", **inputs), ALONE).status == state

    Path(changed).write_text("another content")
    with pytest.raises(InputError, match=f"^{name} has changed since the run in run began"):
        RunFolder(Config("run", **inputs, resume=True), ALONE)


def test_an_input_that_changes_while_a_run_sets_up_is_noticed(inputs):
    other = "def reward(prompts, responses): return [-15.0] * len(responses)"
    with unlock_afterwards():
        folder = RunFolder(Config("run", **inputs), ALONE)
        Path("reward.py").write_text(other)
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


def test_a_run_in_a_folder_that_is_called_like_the_embedded_world(inputs):
    settings = {"dataset": "world", "reward_model": ["world:gold"]}
    RunFolder(Config("world/run", **settings), ALONE).create()
    assert RunFolder(Config("world/run", **settings), ALONE).status == "unfinished"


def test_a_run_without_fingerprints_goes_on(inputs):
    RunFolder(Config("run", **inputs), ALONE).create()
    stored = json.loads(Path("run/config.json").read_text())
    assert sorted(stored.pop("inputs")) == ["data.jsonl", "reward.py", "sft/model"]
    Path("run/config.json").write_text(json.dumps(stored))
    Path("data.jsonl").write_text("another content")
    assert RunFolder(Config("run", **inputs), ALONE).status == "unfinished"


# A process of its own: the cache's place is fixed when its library is imported.
RUN_FROM_THE_HUB = """
import sys
from nanorlhf.runtime.log import RunFolder
sys.path.insert(0, sys.argv[1])
from test_fingerprints import ALONE, Config, InputError
try:
    RunFolder(Config("run", model="me/tiny"), ALONE).create()
except InputError as e:
    sys.exit(str(e))
"""


def run_from_the_hub(folder, commit):
    """A run that starts from me/tiny, whose newest commit in the hub's cache is this one.

    The cache is laid out as the hub's library does it; there is no network.
    """
    cache = folder / "hub/models--me--tiny"
    (cache / "refs").mkdir(parents=True, exist_ok=True)
    (cache / "refs/main").write_text(commit)
    (cache / "snapshots" / commit).mkdir(parents=True)
    (cache / "snapshots" / commit / "config.json").write_text("{}")
    return subprocess.run(
        [sys.executable, "-c", RUN_FROM_THE_HUB, os.path.dirname(__file__)],
        cwd=folder,
        env={**ENV, "HF_HUB_CACHE": str(folder / "hub")},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_hub_model_of_another_commit_is_refused(tmp_path):
    first = run_from_the_hub(tmp_path, "a" * 40)
    assert first.returncode == 0, first.stderr
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert stored["inputs"]["me/tiny"]["digest"] == "a" * 40

    second = run_from_the_hub(tmp_path, "b" * 40)
    assert "me/tiny has changed" in second.stderr


# ----------------------------------------------------------------------- real runs that were killed

# It gives SIGN * 15 for each answer, and kills its own process at the KILL_AT-th call.
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
    """train_ppo.py in a process of its own, with this folder as its working directory."""
    command = [sys.executable, str(REPO / "train_ppo.py"), "--output_dir", "run", *args]
    return subprocess.run(command, cwd=folder, env={**ENV, **env}, capture_output=True, text=True)


@pytest.mark.slow
def test_a_killed_ppo_run_does_not_go_on_with_another_reward(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(world.model_config()).save_pretrained(tmp_path / "policy")
    world.tokenizer().save_pretrained(tmp_path / "policy")
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD.replace("SIGN", "+1"))
    settings = (
        "--model policy --reward_model reward.py:reward --steps 3 --checkpoint_every 1 "
        "--batch_size 4 --minibatch_size 4 --eval_size 4 --max_new_tokens 4"
    )
    killed = launch(tmp_path, *settings.split(), KILL_AT="3")
    assert killed.returncode == -signal.SIGKILL

    reward.write_text(REWARD.replace("SIGN", "-1"))
    refused = launch(tmp_path, "--resume")
    assert refused.returncode == 2
    assert refused.stderr == (
        "train_ppo.py: error: reward.py has changed since the run in run began; put its old "
        "content back, choose another --output_dir or, to go on with the new content, delete "
        "its entry in run/config.json\n"
    )

    reward.write_text(REWARD.replace("SIGN", "+1"))
    resumed = launch(tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "--resume runs the code in reward.py, as run/config.json says" in resumed.stdout
    _, *rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["score_mean"] for row in rows] == [15.0, 15.0, 15.0]


# ------------------------------------------------------------------------- code inside a run folder


@pytest.mark.parametrize(
    "setting, text, spec",
    [
        ("reward_model", ["run/reward.py:reward"], "run/reward.py:reward"),
        ("gold_model", "run/reward.py:reward", "run/reward.py:reward"),
        ("gold_model", "link.py:reward", "link.py:reward"),
        (
            "in_distribution",
            "./run/../run/reward.py:reward",
            "./run/../run/reward.py:reward",
        ),
    ],
)
def test_resume_refuses_code_that_came_with_the_run(tmp_path, monkeypatch, setting, text, spec):
    """Whoever sends a run's folder could send code with it."""
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/reward.py").write_text("raise SystemExit('this was run')")
    Path("link.py").symlink_to("run/reward.py")
    settings = {"dataset": "data.jsonl", setting: text}
    Path("run/config.json").write_text(json.dumps(settings))
    resume = ["--output_dir", "run", "--resume"]

    refusal = "--resume does not run .*which lies in the run folder"
    with pytest.raises(InputError, match=refusal) as raised:
        cli.parse(train_ppo.Config, resume)
    assert f"--{setting} {spec}" in str(raised.value)

    # Whoever names it in the command means it.
    config = cli.parse(train_ppo.Config, [*resume, f"--{setting}", spec])
    assert getattr(config, setting) == text


def test_resume_prints_the_path_of_other_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("reward.py").write_text("")
    Path("run/config.json").write_text(json.dumps({"gold_model": "reward.py:gold"}))
    cli.parse(train_ppo.Config, ["--output_dir", "run", "--resume"])
    said = capsys.readouterr().out
    assert said == "--resume runs the code in reward.py, as run/config.json says\n"

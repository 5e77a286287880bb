"""What tests of whole runs share: small files, tiny runs of the scripts, real processes, kills.

No test file imports another one. Random numbers stand in checks.py, tiny models in tiny_models.py,
fixtures (trained runs, folders of material) in conftest.py.
"""

import functools
import hashlib
import http.server
import itertools
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import probe
import sample_bon
import train_ppo
import train_rm
import train_sae
import train_sft
from nanorlhf import evaluation, rollout, tokens, world
from nanorlhf.errors import InputError
from nanorlhf.runtime import checkpoint, cli, distributed, log
from nanorlhf.runtime.locks import lock

REPO = Path(__file__).resolve().parents[1]
PATHS = f"{REPO}{os.pathsep}{REPO / 'tests'}"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "HF_HUB_OFFLINE": "1"}
SCRIPTS = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo}
ALL_SCRIPTS = {**SCRIPTS, "sae": train_sae, "bon": sample_bon}
# {kind of run: its script}; small() has the settings of each.
RUNS = {
    **ALL_SCRIPTS,
    "dpo": train_sft,
    "simpo": train_sft,
    "sarm_frozen": train_rm,
    "sarm_encoder_frozen": train_rm,
    "sarm_detached": train_rm,
    "control": train_ppo,
}


# ------------------------------------------------------------------------------------------ files


def encode_field(tokenizer, rows, field, max_length=None):
    """The token lists of the rows' prompts, and of their answers in one field."""
    encoded = tokens.encode(tokenizer, rows, (field,), max_length)
    return encoded.prompts, encoded.responses[field]


def write_rows(path, rows):
    """A file of one row a line; a row that is a string stands there as it is. Returns the path."""
    text = ""
    for row in rows:
        line = row if isinstance(row, str) else json.dumps(row)
        text += line + "\n"
    path.write_text(text)
    return path


def jsonl(path, rows):
    """A file of one row a line, with letters beyond ASCII as they are. Returns its name."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def summary(path):
    return json.loads((path / "summary.json").read_text())


def list_files(folder):
    """All files below a folder, sorted by path."""
    return [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]


def hashes(folder):
    """{name of a file below the folder: the hash of its bytes}."""
    hash_of = {}
    for path in list_files(folder):
        hash_of[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hash_of


def content(folder="."):
    """Every file and folder below: its bytes, or "folder"."""
    content_of = {}
    for path in sorted(Path(folder).rglob("*")):
        if "__pycache__" not in str(path):
            content_of[str(path)] = path.read_bytes() if path.is_file() else "folder"
    return content_of


# ------------------------------------------ tiny runs of the training scripts, and what they left

# Metrics that may differ between two runs which are otherwise equal in every bit.
TIMES = ("seconds", "tokens_per_second", "peak_memory")


def sft_settings(base):
    return {
        "model": f"{base}/dropout",
        "dataset": f"{base}/sft.jsonl",
        "steps": 3,
        "batch_size": 8,
        "lr": 1e-3,
        "warmup": 1,
        "max_new_tokens": 8,
        "n_samples": 2,
        "eval_size": 8,
    }


def dpo_settings(base):
    return {
        **sft_settings(base),
        "loss": "dpo",
        "dataset": f"{base}/pairs.jsonl",
        "warmup": 0,
        "max_new_tokens": 6,
        "n_samples": 1,
    }


def simpo_settings(base):
    return {**dpo_settings(base), "loss": "simpo"}


def rm_settings(base):
    return {
        "model": f"{base}/sft",
        "dataset": f"{base}/pairs.jsonl",
        "steps": 3,
        "batch_size": 8,
        "eval_size": 8,
        "warmup": 1,
    }


def sarm_settings(base, mode):
    return {**rm_settings(base), "sarm": f"{base}/sae", "sarm_mode": mode}


def ppo_settings(base):
    return {
        "model": f"{base}/sft",
        "reward_model": [f"{base}/rewards.py:the"],
        "steps": 2,
        "batch_size": 8,
        "minibatch_size": 4,
        "ppo_epochs": 2,
        "max_new_tokens": 12,
        "eval_size": 4,
        "eval_every": 0,
    }


def control_settings(base):
    """PPO against a SARM, with a penalty on one feature and a clamp on another."""
    return {
        **ppo_settings(base),
        "reward_model": [f"{base}/sarm"],
        "penalize_features": [3],
        "tau": ["0.1"],
        "alpha": ["0.5"],
        "clamp": ["5:max:0.5"],
    }


def sae_settings(base):
    return {
        "model": f"{base}/sft",
        "base": f"{base}/dropout",
        "layers": "1",
        "dataset": f"{base}/sft.jsonl",
        "expansion": 2,
        "k": 4,
        "steps": 40,
        "checkpoint_every": 3,
        "batch_size": 256,
        "eval_size": 16,
    }


def bon_settings(base):
    return {
        "model": f"{base}/sft",
        "reward_model": [f"{base}/rm", f"{base}/rewards.py:the"],
        "n_answers": 8,
        "eval_size": 24,
        "max_new_tokens": 12,
        "batch_size": 8,
    }


SETTINGS = {
    "sft": sft_settings,
    "dpo": dpo_settings,
    "simpo": simpo_settings,
    "rm": rm_settings,
    "ppo": ppo_settings,
    "control": control_settings,
    "sae": sae_settings,
    "bon": bon_settings,
}


def small(base, kind, **changes):
    """The flags of a run of a second or two, on the trained runs in the fixture `base`."""
    if kind.startswith("sarm_"):
        settings = sarm_settings(base, kind.removeprefix("sarm_"))
    else:
        settings = SETTINGS[kind](base)
    return {**settings, **changes}


def train(base, kind, folder, **changes):
    """Run a script's main() here -> the rows of its metrics."""
    module = RUNS[kind]
    module.main(module.Config(output_dir=str(folder), **small(base, kind, **changes)))
    return metrics(folder)


def flags(settings):
    """{name: value} -> the words of a command line. A list is several words; None: no such flag."""
    words = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words.append(f"--{name}")
        words += [str(x) for x in values]
    return words


def launch(kind, *args):
    """A script as a user starts it, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, ALL_SCRIPTS[kind].__file__, *args],
        cwd=REPO,
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def command_line(kind, *args):
    """A script's command line, in this process."""
    cli.run(ALL_SCRIPTS[kind].Config, ALL_SCRIPTS[kind].main, list(args))


def metrics(folder):
    """The rows of metrics.jsonl without what may differ: times and memory."""
    rows = []
    for row in read_rows(Path(folder) / "metrics.jsonl"):
        rows.append({name: x for name, x in row.items() if not name.startswith(TIMES)})
    return rows


def weights(folder):
    """{file:name: tensor} of every tensor that the run saved."""
    tensors = {}
    for path in sorted((Path(folder) / "model").rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            tensors[f"{path.relative_to(folder)}:{name}"] = tensor
    return tensors


def names_of_files(folder):
    """The names of a run's files, but for pictures and its page."""
    # Whether there are pictures depends on matplotlib.
    paths = [path for path in list_files(folder) if path.suffix not in (".png", ".html")]
    return sorted(str(path.relative_to(folder)) for path in paths)


def assert_bit_equal(a, b):
    """Two training runs that must not differ at all.

    Compared are metrics, samples, evaluations, weights, the summary, and the names of the files.
    """
    assert metrics(a) == metrics(b)

    tensors = weights(a)
    others = weights(b)
    assert tensors.keys() == others.keys()
    assert len(tensors) > 10
    for name in tensors:
        assert tensors[name].equal(others[name]), name

    names = names_of_files(a)
    assert names == names_of_files(b)
    for name in names:
        # config.json is left out: it names its own folder.
        if name.startswith(("samples", "eval", "summary")):
            assert (Path(a) / name).read_bytes() == (Path(b) / name).read_bytes(), name


def all_files(folder):
    """{name: content} of a finished run, without times, pictures and its page."""
    content_of = {}
    for path in list_files(folder):
        if path.suffix in (".png", ".html") or path.name in ("config.json", "metrics.jsonl"):
            continue
        what = path.read_bytes()
        # transformers writes there whether the process was offline.
        if path.name == "tokenizer_config.json":
            what = {**json.loads(what), "local_files_only": None}
        content_of[str(path.relative_to(folder))] = what
    return content_of


def assert_same_tensors(a, b):
    """Two safetensors files hold the same numbers; their bytes may be in another order."""
    tensors = load_file(a)
    others = load_file(b)
    assert tensors.keys() == others.keys(), a
    for name in tensors:
        assert tensors[name].equal(others[name]), (a, name)


def assert_same_run(name, a, b):
    """Two runs of any script that must not differ, in no bit of a file that holds no times."""
    if name not in ("sae", "bon"):
        assert_bit_equal(a, b)
    if name == "sae":
        assert metrics(a) == metrics(b)
    files = all_files(a)
    others = all_files(b)
    assert files.keys() == others.keys()
    assert len(files) > 2
    for file in files:
        if file.endswith(".safetensors"):
            assert_same_tensors(a / file, b / file)
        else:
            assert files[file] == others[file], file


# The two errors are maxima of float error itself; explained variance is a small difference of
# large numbers.
LOOSER = {"first_ratio_error": 1e-5, "explained_variance": 1e-3}


def assert_close_runs(a, b, rel=1e-4, atol=1e-5, weights_atol=1e-4):
    """Two runs that may differ by float error."""
    rows = metrics(a)
    others = metrics(b)
    assert len(rows) == len(others)
    assert len(rows) > 1
    for row, other in zip(rows, others):
        assert row.keys() == other.keys()
        for name in row:
            expected = pytest.approx(other[name], rel=rel, abs=LOOSER.get(name, atol))
            assert row[name] == expected, (row["step"], name)

    tensors = weights(a)
    others = weights(b)
    assert tensors.keys() == others.keys()
    for name in tensors:
        torch.testing.assert_close(
            tensors[name],
            others[name],
            rtol=0,
            atol=weights_atol,
            msg=lambda message: f"{name}: {message}",
        )


# ------------------------------------------------------------------------------ several processes

# A process spends seconds on imports. Those of fork() are real processes too, but a server has done
# the imports for them.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(
    [
        "support",
        "tiny_models",
        "transformers.models.gpt_neox.modeling_gpt_neox",
        "torch.distributed.fsdp",
    ]
)


def fork(target, *args, **env):
    """target(*args) in a process of its own, with these variables in its environment."""
    process = forks.Process(target=in_child, args=(target, args, env), daemon=True)
    process.start()
    return process


def in_child(target, args, env):
    """What a process of fork() does. If STDERR is set, its stderr goes to {STDERR}_{RANK}."""
    # The environment comes first: all else asks it for the rank and the port.
    os.environ.update(env)
    torch.set_num_threads(1)
    # Its output would come between the lines of pytest. dup2() also catches what C code prints.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    if "STDERR" in env:
        with open(f"{env['STDERR']}_{env['RANK']}", "w") as file:
            os.dup2(file.fileno(), 2)
    # The fixture no_pictures does not reach this process: it makes no pictures and pages either.
    for script in (*SCRIPTS.values(), sample_bon):
        script.plot_run = lambda run: None
    for script in ALL_SCRIPTS.values():
        script.write_page = lambda run, dist: None
    target(*args)


@functools.cache
def ports():
    """Ports below those that the system hands out by itself.

    They begin at a random one, so that another process of tests begins elsewhere.
    """
    return itertools.count(random.SystemRandom().randrange(10_000, 30_000))


def free_port():
    """A port that nobody has, and that nobody else takes before it is used."""
    # Binding a port for a moment shows whether somebody has it.
    for port in ports():
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def ranks(n, target, *args, **env):
    """n processes with torchrun's environment."""
    env["WORLD_SIZE"] = str(n)
    env["MASTER_ADDR"] = "127.0.0.1"
    env["MASTER_PORT"] = str(free_port())
    return [fork(target, *args, RANK=str(rank), LOCAL_RANK=str(rank), **env) for rank in range(n)]


def join(*processes, code=0):
    """Wait for the processes, which must all exit with this code."""
    for process in processes:
        process.join(300)
        assert process.exitcode == code


def drive(folder, runs):
    """Several mains in one process, with a record of what PPO sampled.

    The record: (step, place in the global batch, response ids) of every response.
    """
    # recorded() takes the place of roll_out() where PPO and its evaluations have imported it.
    roll_out = rollout.roll_out
    rank = os.environ.get("RANK", "0")

    def recorded(parts, prompts, place, step):
        rollout, answers = roll_out(parts, prompts, place, step)
        # SFT and DPO sample too, in their evaluations. Those samples are not recorded.
        if not isinstance(parts.config, train_ppo.Config):
            return rollout, answers
        with open(Path(folder) / f"rollouts_{rank}.jsonl", "a") as file:
            for i, ids, mask in zip(place, rollout.response_ids, rollout.response_mask):
                file.write(json.dumps([step, i, ids[mask].tolist()]) + "\n")
        return rollout, answers

    train_ppo.roll_out = recorded
    evaluation.roll_out = recorded
    for kind, settings in runs:
        script = RUNS[kind]
        script.main(script.Config(output_dir=str(Path(folder) / kind), **settings))
    distributed.shutdown()


def rank_settings(base):
    """[(kind, settings)]: runs for 1, 2 and 4 processes.

    An eval_size of 7 does not divide by any of them; PPO's controller and scaler see the whole
    batch.
    """
    splits = ["test", "ood"]
    by_split = {"eval_splits": splits, "in_distribution": f"{base}/rewards.py:short"}
    rm = {"eval_size": 7, "micro_batch_size": 3, "score_l2": 0.01, "eval_every": 2}
    sft = small(
        base,
        "sft",
        model=f"{base}/sft",
        eval_size=7,
        micro_batch_size=3,
        checkpoint_every=1,
        **by_split,
    )
    ppo = small(
        base,
        "ppo",
        reward_model=[f"{base}/rm"],
        gold_model=f"{base}/rewards.py:words",
        steps=3,
        eval_every=1,
        eval_size=7,
        checkpoint_every=1,
        ent_coef=0.01,
        bootstrap_truncated=True,
        missing_eos_penalty=1.0,
        eval_splits=splits,
        **STATEFUL,
    )
    return [
        ("sft", sft),
        ("dpo", small(base, "dpo", eval_size=7, eval_every=2)),
        ("simpo", small(base, "simpo", eval_size=7, gold_model=f"{base}/rewards.py:words")),
        ("rm", small(base, "rm", **rm, **by_split)),
        ("sarm_encoder_frozen", small(base, "sarm_encoder_frozen", **rm)),
        ("sarm_detached", small(base, "sarm_detached", **rm)),
        ("ppo", ppo),
    ]


def rollouts(folder):
    """The records that drive() wrote in all processes, in one order."""
    # Each process wrote the answers of its own share, so only a sorted list compares.
    rows = []
    for path in Path(folder).glob("rollouts_*.jsonl"):
        rows += read_rows(path)
    return sorted(rows)


def wait_for(function, seconds=60):
    """Wait until function() is true."""
    end = time.monotonic() + seconds
    while not function():
        assert time.monotonic() < end
        time.sleep(0.005)


def hold(folder, ready):
    """What a process does that works in a folder until it is killed."""
    lock(folder)
    Path(ready).touch()
    time.sleep(60)


# --------------------------------------------------------------------------------------- rollouts


class NoWaiting(TorchDispatchMode):
    """Operators that must wait for a GPU are an error.

    Their result is a Python number, or has a shape that depends on the data.
    """

    WAITING = {
        "_local_scalar_dense",
        "is_nonzero",
        "nonzero",
        "masked_select",
        "equal",
        "unique",
        "_unique2",
        "item",
    }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITING, function
        if name in ("index", "index_put_"):
            for index in args[1]:
                assert index is None or index.dtype != torch.bool, function
        return function(*args, **(kwargs or {}))


def same_rollouts(a, b, tol=1e-4):
    """The same tokens, and the same numbers up to `tol`."""
    for name in ("response_ids", "response_mask", "finished", "attention_mask"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("logprobs", "entropies", "values"):
        column = getattr(a, name)
        if column is not None:
            torch.testing.assert_close(column, getattr(b, name), rtol=0, atol=tol)


# ------------------------------------------------------------------------------------------ kills

# Settings with which PPO has a state besides the weights: the KL controller and the score scaler.
STATEFUL = {"kl_target": 3.0, "kl_horizon": 40, "kl_coef": 0.2, "score_scaling": "running"}
KILL_SETTINGS = {
    "sft": {"steps": 30, "checkpoint_every": 4, "eval_every": 9},
    "rm": {"steps": 30, "checkpoint_every": 4, "label_noise": 0.2},
    "ppo": {"steps": 15, "checkpoint_every": 2, "eval_every": 4, **STATEFUL},
}


class Killed(BaseException):
    pass


class KillAt:
    """Stop a run in this process at its n-th write, and leave the disk as a kill would.

    That is with half a line, half a file, or half a folder. With n = 0 writes are only counted.
    """

    def __init__(self, monkeypatch, n=0):
        self.n = n
        self.count = 0  # writes so far
        self.at = ""  # what the last one was
        # All ways in which a run writes: it gives a file or folder its name, removes a folder,
        # saves a checkpoint's tensors, or appends a line of metrics.
        monkeypatch.setattr(os, "replace", self.stop_moves(os.replace))
        monkeypatch.setattr(os, "rename", self.stop_moves(os.rename))
        monkeypatch.setattr(shutil, "rmtree", self.stop_removals(shutil.rmtree))
        monkeypatch.setattr(checkpoint, "save_file", self.stop_saves(checkpoint.save_file))
        monkeypatch.setattr(log.RunFolder, "append", self.stop_lines(log.RunFolder.append))

    def is_the_last(self, what):
        """Count a write -> whether the run ends with it."""
        self.count += 1
        self.at = f"write {self.count}: {what}"
        return self.count == self.n

    def stop_moves(self, real):
        def move(a, b):
            if self.is_the_last(f"{real.__name__} {os.path.basename(b)}"):
                raise Killed(self.at)
            real(a, b)

        return move

    def stop_removals(self, real):
        def rmtree(path, *args, **kwargs):
            if os.path.isdir(path) and self.is_the_last(f"rmtree {os.path.basename(path)}"):
                # A kill in the middle of a removal leaves a folder that is not whole.
                first_file = list_files(path)[0]
                first_file.unlink()
                raise Killed(self.at)
            real(path, *args, **kwargs)

        return rmtree

    def stop_saves(self, real):
        def save_file(tensors, path):
            if self.is_the_last("half of a checkpoint's tensors"):
                Path(path).write_bytes(b"\x80\x01")
                raise Killed(self.at)
            real(tensors, path)

        return save_file

    def stop_lines(self, real):
        def append(folder, name, rows):
            if self.is_the_last(f"half a line of {name}"):
                with open(os.path.join(folder.path, name), "a") as file:
                    file.write(json.dumps(rows[0])[:20])
                raise Killed(self.at)
            real(folder, name, rows)

        return append


# words(): a gold reward that kills its own process at the KILL_AT-th call, in the process of rank
# KILL_RANK.
RUN_REWARDS = """
import os, signal
def short(row):
    return len(row.get("response", row.get("chosen")).split()) <= 20
def seven(prompts, responses):
    return [7.0] * len(responses)
def the(prompts, responses):
    return [float(r.split().count("the")) - 0.3 * len(r.split()) for r in responses]
calls = 0
def fails_on_rank_1(prompts, responses):
    if os.environ.get("RANK") == "1":
        raise ValueError("a text that only rank 1 has")
    return [1.0] * len(responses)
def words(prompts, responses):
    global calls
    calls += 1
    if calls == int(os.environ.get("KILL_AT", 0)) and os.environ["RANK"] == os.environ["KILL_RANK"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(r.split()) for r in responses]
"""

# -------------------------------------------------------------------------------------- bad input


def rows_of_topics(**fields):
    """One row for each topic of the embedded world, with these fields besides its prompt."""
    return [{"prompt": f"review the {topic} :", **fields} for topic in world.TOPICS]


GOOD_ROWS = {
    "sft": rows_of_topics(response="it was a nice day ."),
    "rm": rows_of_topics(chosen="it was good .", rejected="it was bad ."),
    "ppo": rows_of_topics(),
}


def arguments(kind, **changes):
    """A tiny run's flags; a flag that is None is left out."""
    settings = {
        "output_dir": "out",
        "model": "model",
        "dataset": f"{kind}.jsonl",
        "steps": 2,
        "batch_size": 4,
    }
    if kind == "sft":
        settings["max_new_tokens"] = 4
    if kind == "ppo":
        settings |= {
            "minibatch_size": 2,
            "reward_model": "rewards.py:good",
            "max_new_tokens": 6,
            "eval_size": 3,
            "ppo_epochs": 1,
        }
    return flags({**settings, **changes})


def fails(capfd, kind, args, *words, code=2, lines=1):
    """Run the script here: it must exit with `code` and one line that holds all the words."""
    # The first call throws away what was printed before.
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.run(SCRIPTS[kind].Config, SCRIPTS[kind].main, args)
    error = capfd.readouterr().err
    assert exit_.value.code == code
    if lines is not None:
        assert len(error.splitlines()) == lines, error
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert "error: " in last
    for word in words:
        assert word in last, last


def refused(capfd, kind, args, *words):
    """fails(), and nothing on disk has changed."""
    before = content()
    fails(capfd, kind, args, *words)
    assert content() == before


def refuses(function, *args, match=(), **kwargs):
    """The function must raise an InputError, of one line that holds all the words of `match`."""
    with pytest.raises(InputError) as e:
        function(*args, **kwargs)
    message = str(e.value)
    assert "\n" not in message, message
    for words in match:
        assert words in message, message


def run_probe(*args):
    """A command of probe.py with its flags, in this process."""
    cli.run_command(probe.COMMANDS, [str(x) for x in args])


def parse_command(command):
    """A study's command line -> (main, its config), not run; bad flags raise."""
    script, *words = shlex.split(command)
    if script == "probe.py":
        name, *words = words
        config_class, main = probe.COMMANDS[name]
        return main, cli.parse(config_class, words, name, "")
    # A command names a script by its file, such as train_ppo.py.
    modules = {f"{module.__name__}.py": module for module in ALL_SCRIPTS.values()}
    module = modules[script]
    return module.main, cli.parse(module.Config, words)


def probe_refused(capfd, *args):
    """A command of probe.py that must exit with 2 and one line -> the line, as a user sees it."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run_probe(*args)
    error = capfd.readouterr().err
    assert exit_.value.code == 2
    assert len(error.splitlines()) == 1
    assert ": error: " in error
    return error


BAD_REWARDS = """
import math
def good(prompts, responses): return [float(len(r)) for r in responses]
def raises(prompts, responses): raise KeyError("no such word\\nsecond line")
def nan(prompts, responses): return [1.0] * (len(responses) - 1) + [math.nan]
def infinite(prompts, responses): return [-math.inf] * len(responses)
def short(prompts, responses): return [1.0] * (len(responses) - 1)
def texts(prompts, responses): return responses
def none(prompts, responses): pass
def huge(prompts, responses): return [1e38] * len(responses)
calls = 0
def huge_later(prompts, responses):
    global calls
    calls += 1
    return [1e38 if calls > 3 else float(len(r.split())) for r in responses]
number = 3
"""

# ------------------------------------------------------------------------ an endpoint on loopback


def question_of(body):
    """The text of a chat request's first message."""
    return body["messages"][0]["content"]


class ChatHandler(http.server.BaseHTTPRequestHandler):
    """One request to an Endpoint."""

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        # The reply is what the test has prepared, or what its function makes of the question.
        reply = self.server.endpoint.next_reply(self.path, dict(self.headers), body)
        if callable(reply):
            reply = reply(question_of(body))
        # Seconds: the connection is cut without an answer.
        if not isinstance(reply, tuple):
            time.sleep(reply)
            return
        status, text, *rest = reply
        headers = rest[0] if rest else {}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        # Whoever asked may have given up: a test that ends with Ctrl-C does.
        with suppress(ConnectionError):
            self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


class Endpoint:
    """A chat endpoint on loopback.

    A reply is (status, body) or (status, body, headers), a number of seconds to wait before the
    connection is cut, or a function of the question that returns one of these. The last one is
    repeated. `asked` keeps (path, headers, body) of the requests.
    """

    def __init__(self, *replies):
        self.replies = list(replies)
        self.asked = []
        self.lock = threading.Lock()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ChatHandler)
        self.server.endpoint = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        # It looks every hundredth of a second whether it should end.
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def next_reply(self, path, headers, body):
        # Requests come from several threads.
        with self.lock:
            self.asked.append((path, headers, body))
            if len(self.replies) > 1:
                return self.replies.pop(0)
            return self.replies[0]

    def questions(self):
        return [question_of(body) for _, _, body in self.asked]

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


def chat(content, **more):
    """A good reply, of an assistant that says this."""
    message = {"role": "assistant", "content": content, **more}
    return 200, json.dumps({"choices": [{"message": message}]})


GOOD_REPLY = json.dumps({"description": "Fires on adjectives.", "related": True})


# ---------------------------------------------------------------- commands on the latents of a SARM


def feature_flags(command, root, out, **changes):
    """A command of probe.py on the SARM and the pairs of a folder -> its words."""
    settings = {
        "reward_model": root / "sarm",
        "eval_dataset": root / "pairs.jsonl",
        "output_dir": out,
        **changes,
    }
    return [command, *flags(settings)]


def widest(printed):
    """The longest line in characters, paths of this machine aside."""
    return max(len(re.sub(r"(?<!\S)/\S+", "", line)) for line in printed.splitlines())


def held_out(root):
    """The pairs of the folder whose two answers differ."""
    return [row for row in read_rows(root / "pairs.jsonl") if row["chosen"] != row["rejected"]]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# ------------------------------------------------------------------------------ all command lines

CONFIGS = {kind: module.Config for kind, module in ALL_SCRIPTS.items()}
CONFIGS |= {name: config_class for name, (config_class, _) in probe.COMMANDS.items()}
# Flags without which a command does not start; the others need none.
REQUIRED = {"mmcs": ["--a", "one", "two"], "judge": ["--a", "one", "--b", "two"]}


def help_of(name, capsys):
    """What --help of a script or a command of probe.py prints, which must end with exit code 0."""
    with pytest.raises(SystemExit) as exit_:
        if name in ALL_SCRIPTS:
            cli.run(CONFIGS[name], ALL_SCRIPTS[name].main, ["--help"])
        else:
            run_probe(name, "--help")
    assert exit_.value.code == 0
    return capsys.readouterr().out

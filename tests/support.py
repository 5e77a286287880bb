"""What several test files share: small models and files, tiny runs of the scripts, real processes, kills, and comparisons.

No test file imports another one. Fixtures (trained runs, folders of material) stand in conftest.py.
"""

import copy
import functools
import hashlib
import http.server
import itertools
import json
import math
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
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import probe
import sample_bon
import train_ppo
import train_rm
import train_sae
import train_sft
from nanorlhf import evaluation, rollout, world
from nanorlhf.errors import InputError
from nanorlhf.hf.blocks import trainable
from nanorlhf.models import Policy
from nanorlhf.packing import pack, response_mask_of
from nanorlhf.runtime import checkpoint, cli, distributed, log
from nanorlhf.runtime.locks import lock
from nanorlhf.sae import TopKSAE
from nanorlhf.sarm import SARM, save_sarm

REPO = Path(__file__).resolve().parents[1]
PATHS = f"{REPO}{os.pathsep}{REPO / 'tests'}"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "HF_HUB_OFFLINE": "1"}
SCRIPTS = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo}
ALL_SCRIPTS = {**SCRIPTS, "sae": train_sae, "bon": sample_bon}
# {kind of run: its script}; small() has the settings of each.
RUNS = {
    **ALL_SCRIPTS,
    "dpo": train_sft,
    "sarm_frozen": train_rm,
    "sarm_encoder_frozen": train_rm,
    "sarm_detached": train_rm,
    "control": train_ppo,
}


# ------------------------------------------------------------------------------------------ files


def write_rows(path, rows):
    """A file of one row a line; a row that is a string stands there as it is. Returns the path."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def jsonl(path, rows):
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def summary(path):
    return json.loads((path / "summary.json").read_text())


def hashes(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def content(folder="."):
    """Every file and folder below: its bytes."""
    return {
        str(p): p.read_bytes() if p.is_file() else "folder"
        for p in sorted(Path(folder).rglob("*"))
        if "__pycache__" not in str(p)
    }


# ------------------------------------------ tiny runs of the training scripts, and what they left

TIMES = ("seconds", "tokens_per_second", "peak_memory")


def small(base, kind, **changes):
    """The flags of a tiny run, of a second or two, on the trained runs in the folder `base` (a fixture)."""
    sft = {"model": f"{base}/dropout", "dataset": f"{base}/sft.jsonl", "steps": 3, "batch_size": 8, "lr": 1e-3, "warmup": 1,
           "max_new_tokens": 8, "n_samples": 2, "eval_size": 8}  # fmt: skip
    rm = {
        "model": f"{base}/sft",
        "dataset": f"{base}/pairs.jsonl",
        "steps": 3,
        "batch_size": 8,
        "eval_size": 8,
        "warmup": 1,
    }
    ppo = {"model": f"{base}/sft", "reward_model": [f"{base}/rewards.py:the"], "steps": 2, "batch_size": 8, "minibatch_size": 4,
           "ppo_epochs": 2, "max_new_tokens": 12, "eval_size": 4, "eval_every": 0}  # fmt: skip
    if kind == "sft":
        settings = sft
    elif kind == "dpo":
        settings = {
            **sft,
            "loss": "dpo",
            "dataset": f"{base}/pairs.jsonl",
            "warmup": 0,
            "max_new_tokens": 6,
            "n_samples": 1,
        }
    elif kind == "rm":
        settings = rm
    elif kind.startswith("sarm"):
        settings = {**rm, "sarm": f"{base}/sae", "sarm_mode": kind.removeprefix("sarm_")}
    elif kind == "ppo":
        settings = ppo
    elif kind == "control":
        settings = {**ppo, "reward_model": [f"{base}/sarm"], "penalize_features": [3], "tau": ["0.1"], "alpha": ["0.5"],
                    "clamp": ["5:max:0.5"]}  # fmt: skip
    elif kind == "sae":
        settings = {"model": f"{base}/sft", "base": f"{base}/dropout", "layers": "1", "dataset": f"{base}/sft.jsonl", "expansion": 2, "k": 4,
                    "steps": 40, "checkpoint_every": 3, "batch_size": 256, "eval_size": 16}  # fmt: skip
    elif kind == "bon":
        settings = {"model": f"{base}/sft", "reward_model": [f"{base}/rm", f"{base}/rewards.py:the"], "n_answers": 8, "eval_size": 24,
                    "max_new_tokens": 12, "batch_size": 8}  # fmt: skip
    return {**settings, **changes}


def train(base, kind, folder, **changes):
    """Run a script's main() here -> the rows of its metrics."""
    module = RUNS[kind]
    module.main(module.Config(output_dir=str(folder), **small(base, kind, **changes)))
    return metrics(folder)


def flags(settings):
    return [
        str(x)
        for name, value in settings.items()
        for x in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]


def launch(kind, *args):
    """A script as a user starts it, in a process of its own."""
    return subprocess.Popen([sys.executable, ALL_SCRIPTS[kind].__file__, *args], cwd=REPO, env=ENV, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def command_line(kind, *args):
    cli.run(ALL_SCRIPTS[kind].Config, ALL_SCRIPTS[kind].main, list(args))


def metrics(folder):
    """metrics.jsonl without what may differ: times and memory."""
    return [
        {k: v for k, v in row.items() if not k.startswith(TIMES)}
        for row in read_rows(Path(folder) / "metrics.jsonl")
    ]


def weights(folder):
    """Every tensor that the run saved."""
    out = {}
    for path in sorted((Path(folder) / "model").rglob("*.safetensors")):
        out |= {
            f"{path.relative_to(folder)}:{name}": tensor for name, tensor in load_file(path).items()
        }
    return out


def assert_bit_equal(a, b):
    """Two runs that must not differ at all: metrics, samples, evaluations, weights, summary, and the names of their files."""
    assert metrics(a) == metrics(b)
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys() and len(x) > 10
    for name in x:
        assert x[name].equal(y[name]), name
    names = [
        sorted(
            str(p.relative_to(f)) for p in Path(f).rglob("*") if p.is_file() and p.suffix != ".png"
        )
        for f in (a, b)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        if name.startswith(("samples", "eval", "summary")):  # config.json names its own folder
            assert (Path(a) / name).read_bytes() == (Path(b) / name).read_bytes(), name


def all_files(folder):
    """{name: content} of a finished run, without times and pictures."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if (
            path.is_file()
            and path.suffix != ".png"
            and path.name not in ("config.json", "metrics.jsonl")
        ):
            content = path.read_bytes()
            # transformers writes there whether the process was offline.
            if path.name == "tokenizer_config.json":
                content = {**json.loads(content), "local_files_only": None}
            found[str(path.relative_to(folder))] = content
    return found


def assert_same_run(name, a, b):
    """Two runs of any script that must not differ, to the last bit of every file that holds no times."""
    if name not in ("sae", "bon"):
        assert_bit_equal(a, b)
    if name == "sae":
        assert metrics(a) == metrics(b)
    x, y = all_files(a), all_files(b)
    assert x.keys() == y.keys() and len(x) > 2
    for file in x:
        if not file.endswith(".safetensors"):
            assert x[file] == y[file], file
            continue
        tensors, others = load_file(a / file), load_file(b / file)
        assert tensors.keys() == others.keys() and all(
            tensor.equal(others[key]) for key, tensor in tensors.items()
        ), file


def assert_close_runs(a, b, rel=1e-4, atol=1e-5, weights_atol=1e-4):
    """Two runs that may differ by float error."""
    rows, others = metrics(a), metrics(b)
    assert len(rows) == len(others) > 1
    for row, other in zip(rows, others):
        assert row.keys() == other.keys()
        for name in row:
            # The two errors are maxima of float error itself; explained variance is a small difference of large numbers.
            loose = {"first_ratio_error": 1e-5, "explained_variance": 1e-3}.get(name, atol)
            assert row[name] == pytest.approx(other[name], rel=rel, abs=loose), (row["step"], name)
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    for name in x:
        torch.testing.assert_close(
            x[name], y[name], rtol=0, atol=weights_atol, msg=lambda m, name=name: f"{name}: {m}"
        )


# ------------------------------------------------------------------------------ several processes

# A process spends seconds on imports. Those of fork() are real processes too, but a server has done the imports for them.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(
    ["support", "transformers.models.gpt_neox.modeling_gpt_neox", "torch.distributed.fsdp"]
)


def fork(target, *args, **env):
    process = forks.Process(target=in_child, args=(target, args, env), daemon=True)
    process.start()
    return process


def in_child(target, args, env):
    os.environ.update(env)
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    if "STDERR" in env:
        with open(f"{env['STDERR']}_{env['RANK']}", "w") as f:
            os.dup2(f.fileno(), 2)
    for script in (*SCRIPTS.values(), sample_bon):
        script.plot_run = lambda run: None
    target(*args)


@functools.cache
def ports():
    """Ports below those that the system hands out by itself; another process of tests starts elsewhere."""
    return itertools.count(random.SystemRandom().randrange(10_000, 30_000))


def free_port():
    """A port that nobody has, and that nobody else takes before it is used."""
    for port in ports():
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def ranks(n, target, *args, **env):
    """n processes with torchrun's environment."""
    env |= {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [fork(target, *args, RANK=str(rank), LOCAL_RANK=str(rank), **env) for rank in range(n)]


def join(*processes, code=0):
    for process in processes:
        process.join(120)
        assert process.exitcode == code


def drive(folder, runs):
    """Several mains in one process, with a record of what PPO sampled: (step, place in the global batch, response ids)."""
    roll_out, rank = rollout.roll_out, os.environ.get("RANK", "0")

    def recorded(parts, prompts, place, step):
        rollout, answers = roll_out(parts, prompts, place, step)
        with open(Path(folder) / f"rollouts_{rank}.jsonl", "a") as f:
            for i, ids, mask in zip(place, rollout.response_ids, rollout.response_mask):
                f.write(json.dumps([step, i, ids[mask].tolist()]) + "\n")
        return rollout, answers

    train_ppo.roll_out = evaluation.roll_out = recorded
    for kind, settings in runs:
        RUNS[kind].main(RUNS[kind].Config(output_dir=str(Path(folder) / kind), **settings))
    distributed.shutdown()


def rank_settings(base):
    """Runs for 1, 2 and 4 processes. eval_size 7 does not divide by them; the controller and the scaler see the whole batch."""
    more = {"eval_splits": ["test", "ood"], "in_distribution": f"{base}/rewards.py:short"}
    return [
        ("sft", small(base, "sft", model=f"{base}/sft", eval_size=7, micro_batch_size=3, checkpoint_every=1, **more)),
        ("dpo", small(base, "dpo", eval_size=7, eval_every=2)),
        ("rm", small(base, "rm", eval_size=7, micro_batch_size=3, score_l2=0.01, eval_every=2, **more)),
        ("sarm_encoder_frozen", small(base, "sarm_encoder_frozen", eval_size=7, micro_batch_size=3, score_l2=0.01, eval_every=2)),
        ("sarm_detached", small(base, "sarm_detached", eval_size=7, micro_batch_size=3, score_l2=0.01, eval_every=2)),
        ("ppo", small(base, "ppo", reward_model=[f"{base}/rm"], gold_model=f"{base}/rewards.py:words", steps=3, eval_every=1, eval_size=7,
                      checkpoint_every=1, kl_target=3.0, kl_horizon=40, score_scaling="running", ent_coef=0.01, kl_coef=0.2,
                      bootstrap_truncated=True, missing_eos_penalty=1.0, eval_splits=["test", "ood"])),
    ]  # fmt: skip


def rollouts(folder):
    rows = [row for path in Path(folder).glob("rollouts_*.jsonl") for row in read_rows(path)]
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


# ------------------------------------------------------------------------------------------ kills

STATEFUL = {"kl_target": 3.0, "kl_horizon": 40, "kl_coef": 0.2, "score_scaling": "running"}
KILL_SETTINGS = {
    "sft": {"steps": 30, "checkpoint_every": 4, "eval_every": 9},
    "rm": {"steps": 30, "checkpoint_every": 4, "label_noise": 0.2},
    "ppo": {"steps": 15, "checkpoint_every": 2, "eval_every": 4, **STATEFUL},
}


class Killed(BaseException):
    pass


class KillAt:
    """Stop a run in this process at its n-th write, and leave the disk as a kill would: half a line, half a file, half a folder."""

    def __init__(self, monkeypatch, n=0):
        self.n, self.count, self.at = n, 0, ""
        real_replace, real_rename, real_rmtree, real_save, real_append = (
            os.replace,
            os.rename,
            shutil.rmtree,
            checkpoint.save_file,
            log.RunFolder.append,
        )

        def due(what):
            self.count += 1
            self.at = f"write {self.count}: {what}"
            return self.count == n

        def moved(real):
            def move(a, b):
                if due(f"{real.__name__} {os.path.basename(b)}"):
                    raise Killed(self.at)
                real(a, b)

            return move  # fmt: skip

        def rmtree(path, *args, **kwargs):
            if os.path.isdir(path) and due(f"rmtree {os.path.basename(path)}"):
                files = sorted(p for p in Path(path).rglob("*") if p.is_file())
                files[0].unlink()
                raise Killed(self.at)
            real_rmtree(path, *args, **kwargs)

        def save_file(tensors, path):
            if due("half of a checkpoint's tensors"):
                Path(path).write_bytes(b"\x80\x01")
                raise Killed(self.at)
            real_save(tensors, path)

        def append(folder, name, rows):
            if due(f"half a line of {name}"):
                with open(os.path.join(folder.path, name), "a") as f:
                    f.write(json.dumps(rows[0])[:20])
                raise Killed(self.at)
            real_append(folder, name, rows)

        monkeypatch.setattr(os, "replace", moved(real_replace))
        monkeypatch.setattr(os, "rename", moved(real_rename))
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        monkeypatch.setattr(checkpoint, "save_file", save_file)
        monkeypatch.setattr(log.RunFolder, "append", append)


# words(): a gold reward that kills its own process at the KILL_AT-th call, in the process of rank KILL_RANK.
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

GOOD_ROWS = {"sft": [{"prompt": f"review the {t} :", "response": "it was a nice day ."} for t in world.TOPICS],
        "rm": [{"prompt": f"review the {t} :", "chosen": "it was good .", "rejected": "it was bad ."} for t in world.TOPICS],
        "ppo": [{"prompt": f"review the {t} :"} for t in world.TOPICS]}  # fmt: skip


def arguments(kind, **changes):
    """A tiny run's flags; a flag that is None is left out."""
    flags = {
        "output_dir": "out",
        "model": "model",
        "dataset": f"{kind}.jsonl",
        "steps": 2,
        "batch_size": 4,
    }
    if kind == "sft":
        flags |= {"max_new_tokens": 4}
    if kind == "ppo":
        flags |= {
            "minibatch_size": 2,
            "reward_model": "rewards.py:good",
            "max_new_tokens": 6,
            "eval_size": 3,
            "ppo_epochs": 1,
        }
    return [
        str(x)
        for name, value in {**flags, **changes}.items()
        if value is not None
        for x in (f"--{name}", value)
    ]


def fails(capfd, kind, args, *words, code=2, lines=1):
    """Run the script here: it must exit with `code`, and with one line of stderr that holds all the words."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.run(SCRIPTS[kind].Config, SCRIPTS[kind].main, args)
    error = capfd.readouterr().err
    assert exit_.value.code == code
    if lines is not None:
        assert len(error.splitlines()) == lines, error
    last = error.splitlines()[-1]
    assert "error: " in last and "Traceback" not in error
    for word in words:
        assert word in last, last


def refused(capfd, kind, args, *words):
    """fails(), and nothing on disk has changed."""
    before = content()
    fails(capfd, kind, args, *words)
    assert content() == before


def refuses(function, *args, match=(), **kwargs):
    with pytest.raises(InputError) as e:
        function(*args, **kwargs)
    message = str(e.value)
    assert "\n" not in message and all(m in message for m in match), message


def run_probe(*args):
    cli.run_command(probe.COMMANDS, [str(x) for x in args])


def parse_command(command):
    """A study's command line -> (main, its config), not run; bad flags raise."""
    script, *words = shlex.split(command)
    if script == "probe.py":
        config_class, main = probe.COMMANDS[words[0]]
        return main, cli.parse(config_class, words[1:], words[0], "")
    module = {f"{module.__name__}.py": module for module in ALL_SCRIPTS.values()}[script]
    return module.main, cli.parse(module.Config, words)


def probe_refused(capfd, *args):
    """The one line that a user sees."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run_probe(*args)
    error = capfd.readouterr().err
    assert exit_.value.code == 2 and len(error.splitlines()) == 1 and ": error: " in error
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


class Endpoint:
    """A chat endpoint on loopback. `replies`: (status, body[, headers]), seconds to wait before the connection is cut, or a function of
    the question that returns one of these; the last one is repeated. `asked` keeps (path, headers, body) of the requests."""

    def __init__(self, *replies):
        self.replies, self.asked, lock = list(replies), [], threading.Lock()
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.asked.append((self.path, dict(self.headers), body))
                    reply = (
                        endpoint.replies.pop(0)
                        if len(endpoint.replies) > 1
                        else endpoint.replies[0]
                    )
                if callable(reply):
                    reply = reply(body["messages"][0]["content"])
                if not isinstance(reply, tuple):
                    time.sleep(reply)
                    return
                self.send_response(reply[0])
                for header in reply[2].items() if len(reply) > 2 else ():
                    self.send_header(*header)
                self.end_headers()
                self.wfile.write(reply[1].encode())

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def questions(self):
        return [body["messages"][0]["content"] for _, _, body in self.asked]

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


def chat(content, **more):
    return 200, json.dumps(
        {"choices": [{"message": {"role": "assistant", "content": content, **more}}]}
    )


GOOD_REPLY = json.dumps({"description": "Fires on adjectives.", "related": True})

# -------------------------- tiny random models: V words, D hidden, B sequences, R response tokens

V, EOS, D = 60, 1, 32
ARCHITECTURES = ("neox", "llama", "gpt2")
SPECIAL = dict(vocab_size=V, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=0)
SIZE = dict(
    SPECIAL,
    hidden_size=D,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
)


def tiny_lm(architecture, seed=0):
    """Two blocks of random weights, large enough that distributions are far from flat; dropout on, to be switched off."""
    config = {
        "neox": lambda: GPTNeoXConfig(**SIZE, hidden_dropout=0.1, attention_dropout=0.1),
        "llama": lambda: LlamaConfig(**SIZE, num_key_value_heads=2, attention_dropout=0.1),
        "gpt2": lambda: GPT2Config(**SPECIAL, n_embd=D, n_layer=2, n_head=4, n_positions=64),
    }[architecture]()
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config).eval()
    for p in lm.parameters():
        if p.dim() > 1:
            p.data.mul_(10)
    return lm


def tiny_policy(architecture, seed=0, **kwargs):
    """With a value head that is not zero, so that values can be told apart."""
    policy = Policy(tiny_lm(architecture, seed), **kwargs).eval()
    if policy.value_head is not None:
        policy.value_head.weight.data.normal_()
        policy.value_head.bias.data.fill_(0.3)
    return policy


def word_tokenizer(words=None, **special):
    """A word-level tokenizer over <pad> <eos> <unk> w3 w4 ... (or `words`)."""
    words = words or ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, V))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>"} | special
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", **{k: v for k, v in special.items() if v}
    )


def random_rows(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, V, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = random_rows((3, 1, 7, 4, 2), seed=1)
RESPONSES = random_rows((4, 6, 1, 2, 5), seed=2)
RESPONSES[1][-1] = RESPONSES[3][-1] = EOS
RESPONSES[4][1] = EOS  # within a response
BATCH = pack(PROMPTS, RESPONSES)
MASK = response_mask_of(BATCH)  # [B, R]
B, R = MASK.shape


def gradients(policy, loss):
    parameters = [p for _, p in trainable(policy)]
    return [
        g if g is not None else torch.zeros_like(p)
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True))
    ]


def same(a, b, tol=2e-5):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# ---------------------------------------------------------- tiny models of every supported family

DEPTH = 3
DEEPER = {**SIZE, "num_hidden_layers": DEPTH}
GROUPED = dict(DEEPER, num_key_value_heads=2)
FALCON = dict(
    SPECIAL, hidden_size=D, num_hidden_layers=DEPTH, num_attention_heads=4, ffn_hidden_size=48
)
# architecture: (config, attention and MLP of a block, what is added to the residual stream of each)
PLAIN = ("self_attn", "mlp", None, None)
NORMED = ("self_attn", "mlp", "post_attention_layernorm", "post_feedforward_layernorm")
FAMILIES = {
    "neox": (lambda: GPTNeoXConfig(**DEEPER), ("attention", "mlp", None, None)),
    "neox_sequential": (lambda: GPTNeoXConfig(**DEEPER, use_parallel_residual=False), ("attention", "mlp", None, None)),
    "llama": (lambda: LlamaConfig(**GROUPED), PLAIN),
    "gpt2": (lambda: GPT2Config(**SPECIAL, n_embd=D, n_layer=DEPTH, n_head=4, n_positions=64), ("attn", "mlp", None, None)),
    "gpt_neo": (lambda: GPTNeoConfig(**SPECIAL, hidden_size=D, num_layers=DEPTH, attention_types=[[["global"], DEPTH]], num_heads=4,
                                     max_position_embeddings=64), ("attn", "mlp", None, None)),
    "gemma": (lambda: GemmaConfig(**GROUPED, head_dim=8), PLAIN),
    "gemma2": (lambda: Gemma2Config(**GROUPED, head_dim=8, sliding_window=3), NORMED),
    "gemma3": (lambda: Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=3), NORMED),
    "qwen2": (lambda: Qwen2Config(**GROUPED), PLAIN),
    "qwen3": (lambda: Qwen3Config(**GROUPED, head_dim=8), PLAIN),
    # A parallel block adds the attention's output to the MLP's in place; a sequential one does not.
    "falcon": (lambda: FalconConfig(**FALCON), ("self_attention", "mlp", None, None)),
    "falcon_40b": (lambda: FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2), ("self_attention", "mlp", None, None)),
    "falcon_sequential": (lambda: FalconConfig(**FALCON, parallel_attn=False, multi_query=False), ("self_attention", "mlp", None, None)),
}  # fmt: skip


def tiny_family(architecture, auto=AutoModelForCausalLM, seed=0):
    torch.manual_seed(seed)
    lm = auto.from_config(FAMILIES[architecture][0]()).eval()
    for p in lm.parameters():
        if p.dim() > 1:
            p.data.mul_(3)
    return lm


# ----------------------------------------------------------- a tiny SARM, and its latents by hand

SARM_M, SARM_K, SARM_L, SARM_D = 48, 6, 2, 32


def sarm_lm(layers=3):
    torch.manual_seed(0)
    config = world.model_config()
    (
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.initializer_range,
    ) = layers, SARM_D, 64, 0.3
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_sarm(path):
    """A random SARM on the embedded world's words, saved; the LM it was cut from."""
    lm = sarm_lm()
    config = copy.deepcopy(lm.config)
    config.sarm_param = {
        "sae_source_layer": SARM_L,
        "sae_latent_size": SARM_M,
        "sae_k": SARM_K,
        "sarm_use_activation": True,
    }
    sarm = SARM(
        copy.deepcopy(lm.base_model),
        TopKSAE(SARM_D, SARM_M, SARM_K, normalize="token", relu=False, seed=1),
        config,
    )
    sarm.score.weight.data.normal_(generator=torch.Generator().manual_seed(2))
    sarm.sae.b_enc.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    config.reward_mean = 0.25
    save_sarm(sarm, world.tokenizer(), str(path))
    return lm, sarm


@torch.no_grad()
def z_by_hand(lm, sarm, prompt, response):
    """Latents [SARM_M] as a list and the score, by the spec's formulas, from Hugging Face's hidden states."""
    tokenizer = world.tokenizer()
    response = (
        response
        if isinstance(response, list)
        else [*tokenizer(response).input_ids, tokenizer.eos_token_id]
    )
    ids = tokenizer(prompt).input_ids + response
    h = lm(torch.tensor([ids]), output_hidden_states=True).hidden_states[SARM_L][0, -1].double()
    x = (h - h.mean()) / (h.std() + 1e-6)
    pre = sarm.sae.W_enc.double() @ (x - sarm.sae.b_dec.double()) + sarm.sae.b_enc.double()
    z = torch.zeros(SARM_M, dtype=torch.float64)
    kept = pre.argsort(descending=True)[:SARM_K]
    z[kept] = pre[kept]
    return z.tolist(), (z @ sarm.score.weight[0].double()).item() - 0.25


def feature_flags(command, root, out, **changes):
    values = {
        "reward_model": root / "sarm",
        "eval_dataset": root / "pairs.jsonl",
        "output_dir": out,
    } | changes
    return [
        command,
        *(
            str(x)
            for name, value in values.items()
            for x in (f"--{name}", *(value if isinstance(value, list) else [value]))
        ),
    ]


def widest(printed):
    """The longest line in characters, paths of this machine aside."""
    return max(len(re.sub(r"(?<!\S)/\S+", "", line)) for line in printed.splitlines())


def held_out(root):
    rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
    return [row for row in rows if row["chosen"] != row["rejected"]]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# ------------------------------------------------------ a public SARM checkpoint, written by hand

PUBLIC_M, PUBLIC_K, PUBLIC_N, PUBLIC_L = 48, 6, 4, 3
SARM_SIZES = SIZE | dict(num_hidden_layers=PUBLIC_N)
SARM_CONFIGS = {
    "neox": GPTNeoXConfig(**SARM_SIZES), "llama": LlamaConfig(**SARM_SIZES, num_key_value_heads=2),
    "gpt2": GPT2Config(**SPECIAL, n_embd=D, n_layer=PUBLIC_N, n_head=4, n_positions=64),
    "gemma2": Gemma2Config(**SARM_SIZES, num_key_value_heads=2, head_dim=8),
}  # fmt: skip
SARM_PARAM = {
    "sae_source_layer": PUBLIC_L,
    "sae_latent_size": PUBLIC_M,
    "sae_k": PUBLIC_K,
    "sae_use_sequence_level": True,
    "sarm_use_activation": True,
}


def full_lm(name, seed=0):
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(copy.deepcopy(SARM_CONFIGS[name])).eval()
    for p in lm.parameters():
        if p.dim() > 1:
            p.data.mul_(5)
    return lm


def head_tensors(seed=0):
    """The public checkpoint's own tensors, random."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "sae.pre_bias": [D],
        "sae.latent_bias": [PUBLIC_M],
        "sae.encoder.weight": [PUBLIC_M, D],
        "sae.decoder.weight": [D, PUBLIC_M],
    }
    shapes["score.weight"] = [1, PUBLIC_M]
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def public_checkpoint(path, param=SARM_PARAM, shards=1, seed=0, auto_map=False):
    """A folder in the layout of the public Llama checkpoint, from the spec's list of tensors. -> the LM it is cut from, its tensors"""
    lm = full_lm("llama", seed)
    tensors = {
        "model.embed_tokens.weight": lm.model.embed_tokens.weight,
        "model.norm.weight": lm.model.norm.weight,
    }
    for i in range(PUBLIC_L):
        tensors |= {
            f"model.layers.{i}.{name}": p for name, p in lm.model.layers[i].named_parameters()
        }
    tensors = {name: p.detach().clone() for name, p in (tensors | head_tensors(seed)).items()}
    os.makedirs(path, exist_ok=True)
    config = SARM_CONFIGS["llama"].to_dict() | {"architectures": ["LlamaSARM"], "sarm_param": param}
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # num_labels 1
    if auto_map:
        config["auto_map"] = {
            "AutoConfig": "evil.Config",
            "AutoModel": "evil.Model",
            "AutoModelForSequenceClassification": "evil.Model",
        }
        with open(os.path.join(path, "evil.py"), "w") as f:
            f.write("raise RuntimeError('remote code was run')\n")
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(config, f)
    if shards == 1:
        save_file(tensors, os.path.join(path, "model.safetensors"), {"format": "pt"})
    else:
        weight_map = {
            name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
            for i, name in enumerate(tensors)
        }
        for file in set(weight_map.values()):
            part = {name: p for name, p in tensors.items() if weight_map[name] == file}
            save_file(part, os.path.join(path, file), {"format": "pt"})
        with open(os.path.join(path, "model.safetensors.index.json"), "w") as f:
            json.dump({"metadata": {}, "weight_map": weight_map}, f)
    word_tokenizer().save_pretrained(path)
    return lm, tensors


# ---------------------------------------------------- two Gaussians, whose density ratio is known

MU, STD = (
    torch.tensor([0.8, -0.4]),
    torch.tensor([1.0, 0.7]),
)  # of the policy's latents; people's are standard normal


def log_ratio_of_gaussians(z):
    z, mu, std = z.double(), MU.double(), STD.double()
    return (z.square() - ((z - mu) / std).square()).sum(1) / 2 - std.log().sum()


def sampling_error(logits, n, parameters=30):
    """The root mean square error of a logit that a model with so many free parameters learns from n samples, half of each class.

    By maximum likelihood logits err by  E[w err^2] = parameters / n  with w = sigmoid(logit) (1 - sigmoid(logit)), the Fisher
    information of one sample (van der Vaart 1998, 5.39). A network that has learned for a while has fewer free parameters than weights; the
    true ratio has 5, and 30 leave room for the rest. An error of sign or of balance (log 3 below) is far outside.
    """
    w = torch.sigmoid(logits) * torch.sigmoid(-logits)
    return math.sqrt(parameters / n / w.mean().item())


# ---------------------------------------------------------------------- tiny text encoders

ENCODER_WORDS = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    *"a b c d e f g h .".split(),
]  # RoBERTa's ids: 0, 1, 2, 3


ENCODER_TEXTS = ["a b c .", "d", "a b c .", "", "e f g h a b c d e f .", "zebra a", "d"]


ENCODER_PAIRS = [(a, b) for a in ENCODER_TEXTS[:6] for b in ENCODER_TEXTS[:6]]


ENCODER_SIZE = dict(
    vocab_size=len(ENCODER_WORDS),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
)


ENCODER_CONFIG = dict(ENCODER_SIZE, max_position_embeddings=20, pad_token_id=1)


NLI_LABELS = {0: "ENTAILMENT", 1: "CONTRADICTION", 2: "NEUTRAL"}  # in no one's order


def encoder_tokenizer(special=True, **more):
    backend = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(ENCODER_WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        pair = "<s> $A </s> $B:1 </s>:1"
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair=pair, special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    names = (
        {"pad_token": "<pad>", "unk_token": "<unk>"}
        | ({"eos_token": "</s>"} if special else {})
        | more
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{k: v for k, v in names.items() if v}
    )


def save_encoder(model, folder, tokenizer):
    torch.manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5)
    if getattr(model, "num_labels", 0) == 3 and (
        heads := [p for name, p in model.named_parameters() if "classifier" in name]
    ):
        with torch.no_grad():  # no label may win everywhere
            inputs = tokenizer(
                *map(list, zip(*ENCODER_PAIRS)),
                padding=True,
                truncation=True,
                max_length=18,
                return_tensors="pt",
            )
            heads[-1] -= model.eval()(**inputs).logits.mean(0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---------------------------------------------------------------------------------- all command lines

CONFIGS = {kind: module.Config for kind, module in ALL_SCRIPTS.items()}
CONFIGS |= {name: config_class for name, (config_class, _) in probe.COMMANDS.items()}
REQUIRED = {
    "mmcs": ["--a", "one", "two"],
    "judge": ["--a", "one", "--b", "two"],
}  # the others need no flag


def help_of(name, capsys):
    """What --help of a script or a command of probe.py prints, which must end with exit code 0."""
    with pytest.raises(SystemExit) as exit_:
        if name in ALL_SCRIPTS:
            cli.run(CONFIGS[name], ALL_SCRIPTS[name].main, ["--help"])
        else:
            run_probe(name, "--help")
    assert exit_.value.code == 0
    return capsys.readouterr().out

"""Bad and odd input for every script and every command of probe.py: thousands of cases, each of which says what must come of it.

    python tests/runs/fuzz.py --n 2000 --seed 0            a table of outcomes, and every case that did not end as it should
    python tests/runs/fuzz.py --n 0 --only 'sae .*scale'   all cases whose names match; --list prints the names

A case is one run of a script in a folder of its own, which holds a copy of the material: small models, runs, and files. Something
in it is damaged, or a flag is wrong, or only odd. All cases run in forks of one process, which has done the imports. It has a single
thread, and has never computed a gradient: a fork would have no copies of further threads. A case expects one of

    refused    exit code 2; the last line on stderr is the one error; what was there is as it was, and nothing new is left
    stopped    exit code 2 and one line, but what was written up to then may stay: a reward that fails at its tenth call
    equal      exit code 0, and the numbers of the undamaged run: an odd way to say the right thing
    sound      refused or equal: damage that may be harmless, or for which there is a remedy (an older checkpoint)
    failed     exit code 1 and one line: a full disk, numbers that are no longer finite
    any        0 with results, or one line: a value that may well be meant, such as another layer

and whatever it expects, it may not end in a traceback, or hang, or show the secret that it was given.
"""

import argparse
import dataclasses
import functools
import gzip
import http.server
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import typing
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    # What conftest.py does for pytest, before torch makes a thread or looks for a GPU.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    sys.path[:0] = [str(REPO), str(REPO / "tests")]

import torch
from safetensors.torch import load_file, save_file
from support import (
    ENCODER_CONFIG,
    NLI_LABELS,
    encoder_tokenizer,
    save_encoder,
    write_rows,
)
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

import probe
import sample_bon
import train_ppo
import train_rm
import train_sae
import train_sft
from nanorlhf import world
from nanorlhf.evals import diversity_report
from nanorlhf.runtime import cli, log, plots
from nanorlhf.runtime.locks import LOCK_FILE

SCRIPTS = {
    "train_sft.py": train_sft,
    "train_rm.py": train_rm,
    "train_ppo.py": train_ppo,
    "sample_bon.py": sample_bon,
    "train_sae.py": train_sae,
}
HANGS_AFTER = 60  # seconds
MEMORY = 8 * 2**30  # bytes that a case may ask for; more is an error of its own, not of the machine
SECRET = "sk-SECRET123456"
TIMES = ("seconds", "tokens_per_second", "peak_memory")


# ------------------------------------------------------------------------------------------- cases


@dataclass
class Run:
    """A run of a script on the material: what cases are made of."""

    name: str
    script: str  # train_sft.py, or probe.py COMMAND
    flags: dict
    reads: dict = field(default_factory=dict)  # {path of a file that it reads: its kind}
    writes: str = "out"  # where its results are
    before: Callable = lambda: (
        None
    )  # called in the fork, in the case's folder; may start an endpoint

    @property
    def config(self):
        script, _, command = self.script.partition(" ")
        return probe.COMMANDS[command][0] if command else SCRIPTS[script].Config

    def words(self, **changes):
        """The command line after the script's name. A flag that is None is left out."""
        words = self.script.split()[1:]
        for name, value in {**self.flags, **changes}.items():
            if value is None:
                continue
            words.append(f"--{name}")
            if value is not True:
                words += [str(x) for x in (value if isinstance(value, list) else [value])]
        return words


@dataclass
class Case:
    name: str
    run: Run
    expected: str
    damage: Callable = lambda here, rng: None  # (folder of the case, random numbers) -> nothing
    words: list | None = None  # the command line, where it is not the run's own
    environment: dict = field(default_factory=dict)
    before: Callable | None = None  # in place of the run's own
    writes: str = ""  # where the results are, where that is not the run's own
    kind: str = ""  # cases_of_files, ...


@dataclass
class Outcome:
    case: Case
    problem: str  # "" where the case ended as it should
    how: str  # exit 0, exit 2, a signal ...
    line: str = ""  # the last one on stderr
    place: str = ""  # FILE:LINE of the traceback's last frame in the project
    seconds: float = 0.0


# ---------------------------------------------------------------------------------------- material

REWARDS = """
def good(prompts, responses): return [0.5 * len(r.split()) for r in responses]
def words(prompts, responses): return [float(r.split().count("the")) for r in responses]
def score(prompts, responses): return [len(r) % 7 - 2.5 for r in responses]
def short(row): return len(row.get("response", row.get("chosen", "")).split()) <= 40
"""
LEXICON = "good\t3\nbad\t-3\ngreat\t4\nawful\t-4\nnice\t2\nvery\t0.1\nthe\t0\n"


def make_material(root: Path):
    """Everything that cases read, in the current folder. A fork calls this."""
    os.chdir(root)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small_config()).save_pretrained("model")
    world.tokenizer().save_pretrained("model")
    AutoModelForCausalLM.from_config(small_config()).save_pretrained("dropout")
    world.tokenizer().save_pretrained("dropout")
    config = BertConfig(**ENCODER_CONFIG)
    types = ["input_ids", "token_type_ids", "attention_mask"]
    labels = {"id2label": NLI_LABELS, "label2id": {v: k for k, v in NLI_LABELS.items()}}
    tokenizer = encoder_tokenizer(model_input_names=types)
    save_encoder(BertModel(config), Path("encoder"), tokenizer)
    nli = BertForSequenceClassification(BertConfig(**ENCODER_CONFIG, **labels))
    save_encoder(nli, Path("nli"), tokenizer)
    sentiment = BertConfig(**{**ENCODER_CONFIG, "max_position_embeddings": 128}, num_labels=2)
    save_encoder(BertForSequenceClassification(sentiment), Path("classifier"), tokenizer)
    Path("rewards.py").write_text(REWARDS)
    Path("lexicon.tsv").write_text(LEXICON)
    make_texts()

    train_sft.main(train_sft.Config(**RUNS["sft"].flags | {"output_dir": "policy", "lr": 1e-2}))
    adapters = {"output_dir": "adapter", "lora_rank": 2}
    train_sft.main(train_sft.Config(**RUNS["sft"].flags | adapters))
    for seed in (0, 1):
        settings = {"output_dir": f"rms/seed_{seed}", "seed": seed}
        train_rm.main(train_rm.Config(**RUNS["rm"].flags | settings))
    train_rm.main(
        train_rm.Config(**RUNS["rm"].flags | {"output_dir": "rm_adapter", "lora_rank": 2})
    )
    settings = {"site": "residual", "layers": "1", "normalize": "token", "relu": False}
    for model, folder in (("model", "sae"), ("rms/seed_0", "sae_rm")):
        own = {"model": model, "output_dir": folder, "base": "none"}
        train_sae.main(train_sae.Config(**RUNS["sae"].flags | settings | own))
    own = {"model": "policy", "base": "model", "output_dir": "saes", "layers": "1"}
    train_sae.main(train_sae.Config(**RUNS["sae"].flags | own))
    train_rm.main(train_rm.Config(**RUNS["rm sarm"].flags | {"output_dir": "sarm"}))
    for reward, sae, name in (("sarm", "", "human"), ("rms/seed_0", SAE_RM, "human_rm")):
        flags = RUNS["human_latents"].flags
        own = {"output": f"{name}.safetensors", "reward_model": reward, "sae": sae}
        run_words("probe.py", ["human_latents", *Run("", "", {**flags, **own}).words()])
    train_ppo.main(train_ppo.Config(**RUNS["ppo"].flags | {"output_dir": "done_ppo"}))
    sample_bon.main(sample_bon.Config(**RUNS["bon"].flags | {"output_dir": "bon_done"}))
    shutil.copy("bon_done/pool.jsonl", "pool.jsonl")
    run_words("probe.py", RUNS["judge"].words(output_dir="judge_done"))
    url = f"http://127.0.0.1:{RUNS['judge choices'].before()}/v1"
    run_words("probe.py", RUNS["judge choices"].words(judge=url))

    # Runs that were killed after their second checkpoint of three.
    real = log.RunFolder.checkpoint

    def stop_after_the_second(folder, step, *args, **kwargs):
        real(folder, step, *args, **kwargs)
        if step == 2:
            raise KeyboardInterrupt

    log.RunFolder.checkpoint = stop_after_the_second
    for name in ("sft", "dpo", "rm", "rm sarm", "ppo", "ppo features", "sae"):
        script = SCRIPTS[RUNS[name].script]
        own = {"output_dir": half(name), "steps": 3, "checkpoint_every": 1, "keep_checkpoints": 2}
        try:
            script.main(script.Config(**RUNS[name].flags | own))
        except KeyboardInterrupt:
            pass
        assert Path(half(name), "checkpoint/step_2").is_dir(), name


def small_config():
    config = world.model_config()
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 2, 32, 48
    return config


def make_texts():
    write_rows(Path("sft.jsonl"), world.demonstrations(48))
    pairs = [row for row in world.preferences(60) if row["chosen"] != row["rejected"]]
    write_rows(Path("pairs.jsonl"), pairs)
    prompts = [row["prompt"] for row in world.prompts("train")[::12]]
    write_rows(Path("prompts.jsonl"), [{"prompt": prompt} for prompt in prompts])
    texts = [row["response"] for row in world.demonstrations(48)]
    for name, first in (("a", 0), ("b", 20)):
        rows = [{"prompt": prompts[i], "response": texts[first + i]} for i in range(12)]
        write_rows(Path(f"{name}.jsonl"), rows)
    answers = [{"prompt": prompts[i], "responses": texts[4 * i : 4 * i + 4]} for i in range(8)]
    many = [{**row, "gold_scores": [0.5, 1.5, -1.0, 2.0]} for row in answers]
    write_rows(Path("answers.jsonl"), many)
    bench = []
    for i, row in enumerate(pairs[:6]):
        wrong = [row["rejected"], row["rejected"] + " bad .", "awful ."]
        common = {"id": str(i), "prompt": row["prompt"], "rejected": wrong}
        bench.append({**common, "chosen": [row["chosen"]], "subset": "Focus"})
    Path("rewardbench.json").write_text(json.dumps(bench))
    styles = [{**row, "chosen": row["chosen"] * 3, "domain": "chat"} for row in bench]
    Path("rm_bench.json").write_text(json.dumps(styles))


def half(name):
    """The folder of a run that is not finished."""
    return "half_" + name.replace(" ", "_")


SAE, SAE_RM = "sae/policy/1_residual", "sae_rm/policy/1_residual"
SAE_MLP = "saes/policy/1_mlp"
TINY = {"output_dir": "out", "steps": 2, "batch_size": 4, "eval_size": 6, "warmup": 0}
PPO = {
    **TINY,
    "model": "model",
    "dataset": "prompts.jsonl",
    "minibatch_size": 2,
    "ppo_epochs": 1,
    "max_new_tokens": 6,
    "gold_model": "rewards.py:words",
}
LATENTS = {"output_dir": "out", "reward_model": "sarm", "dataset": "pairs.jsonl", "eval_size": 12}
SOME = {"output_dir": "out", "dataset": "sft.jsonl", "max_rows": 24}


def files_of(folder, *, sarm=False):
    """{path: kind} of a saved model's files."""
    kinds = {
        "config.json": "model config",
        "model.safetensors": "weights",
        "tokenizer.json": "tokenizer",
        "tokenizer_config.json": "tokenizer config",
    }
    return {f"{folder}/{name}": kind for name, kind in kinds.items()}


def sae_files(folder):
    return {f"{folder}/cfg.json": "cfg", f"{folder}/sae_weights.safetensors": "weights"}


def run_files(folder):
    """{path: kind} of what --resume reads."""
    kinds = {"config.json": "run config", "metrics.jsonl": "log"}
    for step in (1, 2):
        kinds[f"checkpoint/step_{step}/state.json"] = "state"
        kinds[f"checkpoint/step_{step}/state.safetensors"] = "checkpoint"
    return {f"{folder}/{name}": kind for name, kind in kinds.items()}


def all_runs():
    """Every script and command, and what it reads."""
    model, reward = files_of("model"), files_of("rms/seed_0/model")
    sft = {**TINY, "model": "model", "dataset": "sft.jsonl", "max_new_tokens": 4, "n_samples": 1}
    dpo = {**sft, "loss": "dpo", "dataset": "pairs.jsonl"}
    rm = {**TINY, "model": "model", "dataset": "pairs.jsonl"}
    features = {
        "reward_model": ["sarm"],
        "penalize_features": [3],
        "tau": ["q0.5"],
        "alpha": ["0.5std"],
        "clamp": ["5:max:0.5"],
        "density_beta": 0.1,
        "human_latents": "human.safetensors",
    }
    sae = {
        "output_dir": "out",
        "model": "model",
        "dataset": "sft.jsonl",
        "layers": "1",
        "expansion": 2,
        "k": 4,
        "steps": 3,
        "batch_size": 64,
        "eval_size": 8,
        "buffer_tokens": 256,
    }
    bon = {
        "output_dir": "out",
        "model": "model",
        "dataset": "prompts.jsonl",
        "reward_model": ["rms/seed_0", "rewards.py:good"],
        "gold_model": "rewards.py:words",
        "n_answers": 4,
        "eval_size": 8,
        "max_new_tokens": 4,
    }
    probe_reward = {**SOME, "policy": "policy", "model": "model", "layers": "1", "seeds": 2}
    word = {"reward": "lexicon.tsv", "triples": 6, "neutral": 1.0}
    judge = {"a": ["a.jsonl"], "b": ["b.jsonl"], "output_dir": "out"}
    ablate = {
        "output_dir": "out",
        "sae": SAE_MLP,
        "features": "1,2",
        "dataset": "prompts.jsonl",
        "reward": ["rewards.py:good", "rms/seed_0"],
        "max_rows": 8,
        "eval_size": 6,
        "n_answers": 2,
        "draws": 2,
        "max_new_tokens": 4,
    }
    rows = {"sft.jsonl": "sft", "pairs.jsonl": "pairs", "prompts.jsonl": "prompts"}
    functions = {"rewards.py": "python"}

    def data(name):
        return {name: rows[name]}

    by_endpoint = {"judge": ["{endpoint}"], "judge_model": "m", "output_dir": "judge_http"}
    found = [
        Run("sft", "train_sft.py", sft, {**data("sft.jsonl"), **model}),
        Run("sft adapter", "train_sft.py", {**sft, "model": "adapter"}, adapter_files("adapter")),
        Run("dpo", "train_sft.py", dpo, {**data("pairs.jsonl"), **model}),
        Run("rm", "train_rm.py", rm, {**data("pairs.jsonl"), **model}),
        Run("rm sarm", "train_rm.py", {**rm, "sarm": "sae"}, {**model, **sae_files(SAE)}),
        Run("ppo", "train_ppo.py", {**PPO, "reward_model": ["rewards.py:good"]},
            {**data("prompts.jsonl"), **model, **functions}),
        Run("ppo ensemble", "train_ppo.py",
            {**PPO, "reward_model": ["rms/seed_{seed}", "lexicon.tsv"], "objective": "uwo"},
            {**files_of("rms/seed_1/model"), "lexicon.tsv": "lexicon"}),
        Run("ppo features", "train_ppo.py", {**PPO, **features},
            {**files_of("sarm/model"), "human.safetensors": "human"}),
        Run("ppo feature_sae", "train_ppo.py",
            {**PPO, **features, "reward_model": ["rms/seed_0"], "feature_sae": SAE_RM,
             "human_latents": "human_rm.safetensors"},
            {**reward, **sae_files(SAE_RM), "human_rm.safetensors": "human"}),
        Run("ppo value_model", "train_ppo.py",
            {**PPO, "reward_model": ["rm_adapter"], "value_model": "rms/seed_0"},
            {**adapter_files("rm_adapter"), **reward}),
        Run("ppo score_gold", "train_ppo.py",
            {"score_gold": "no_gold", "gold_model": "rewards.py:words"},
            {"no_gold/config.json": "run config", "no_gold/metrics.jsonl": "log",
             "no_gold/summary.json": "object", "no_gold/eval/step_0.jsonl": "eval",
             "no_gold/model/tokenizer.json": "tokenizer", **functions}, "no_gold"),
        Run("bon", "sample_bon.py", bon, {**data("prompts.jsonl"), **model, **reward}),
        Run("bon again", "sample_bon.py", {**bon, "output_dir": "bon_done", "n": 2},
            {"bon_done/config.json": "run config", "bon_done/cache/answers": "cache",
             "bon_done/cache/scores": "cache"}, "bon_done"),
        Run("bon pool", "sample_bon.py",
            {"output_dir": "out", "pool": "answers.jsonl",
             "reward_model": ["rewards.py:good", "classifier"], "save_pairs": True, "n": 2,
             "save_best": True, "diversity": True, "best_of": 2},
            {"answers.jsonl": "pool", **functions, **files_of("classifier")}),
        Run("bon from", "sample_bon.py",
            {"from_files": ["a.jsonl", "answers.jsonl"], "encoder": "encoder",
             "nli_model": "nli", "tokenizer": "model", "output_dir": "out", "truncate": "5"},
            {"a.jsonl": "sft", "answers.jsonl": "pool", **files_of("encoder"),
             **files_of("nli"), "model/tokenizer.json": "tokenizer"}),
        Run("sae", "train_sae.py", {**sae, "base": "none"}, {**data("sft.jsonl"), **model}),
        Run("sae base", "train_sae.py",
            {**sae, "model": "policy", "base": "model", "layers": "highest:1", "texts": "both",
             "max_new_tokens": 4, "sae": "vanilla"}, {**files_of("policy/model"), **model}),
        Run("sae cached", "train_sae.py", {**sae, "base": "none", "cache": "activations"}, {}),
        Run("divergence", "probe.py divergence",
            {**SOME, "model": "model", "policy": "policy", "layers": "1"},
            {**data("sft.jsonl"), **model, **files_of("policy/model")}),
        Run("mmcs", "probe.py mmcs", {"a": [SAE], "b": [SAE_MLP], "output_dir": "out"},
            {**sae_files(SAE), **sae_files(SAE_MLP)}),
        Run("reward", "probe.py reward", {**probe_reward, **word},
            {**data("sft.jsonl"), "lexicon.tsv": "lexicon", **files_of("policy/model")}),
        Run("reward sequence", "probe.py reward",
            {**probe_reward, "task": "sequence", "reward": "rewards.py:score"}, functions),
        Run("pairs", "probe.py pairs",
            {**probe_reward, "dataset": "pairs.jsonl", "sae": "saes", "layers": None},
            {**data("pairs.jsonl"), **sae_files(SAE_MLP)}),
        Run("features", "probe.py features",
            {"sae": [SAE_MLP], "dataset": "sft.jsonl", "top": 3, "eval_size": 8,
             "output_dir": "out"},
            {**data("sft.jsonl"), **sae_files(SAE_MLP), **files_of("policy/model")}),
        Run("ablate", "probe.py ablate", ablate,
            {**data("prompts.jsonl"), **sae_files(SAE_MLP), **reward, **functions}),
        Run("latents", "probe.py latents",
            {**LATENTS, "answers": "a.jsonl", "against": "b.jsonl", "top": 3},
            {**data("pairs.jsonl"), "a.jsonl": "sft", **files_of("sarm/model")}),
        Run("latents sae", "probe.py latents",
            {**LATENTS, "reward_model": "rms/seed_0", "sae": SAE_RM, "top": 3},
            {**sae_files(SAE_RM), **reward}),
        Run("causal", "probe.py causal",
            {**LATENTS, "edits": ["3:set:0"], "pool": "answers.jsonl", "n": 2, "draws": 2},
            {**data("pairs.jsonl"), "answers.jsonl": "pool", **files_of("sarm/model")}),
        Run("steer", "probe.py steer", {**LATENTS, "weights": ["3:*:0"], "save": "steered"},
            {**data("pairs.jsonl"), **files_of("sarm/model")}),
        Run("human_latents", "probe.py human_latents",
            {"output": "out.safetensors", "reward_model": "sarm", "dataset": "sft.jsonl"},
            {**data("sft.jsonl"), **files_of("sarm/model")}, "out.safetensors"),
        Run("evaluate", "probe.py evaluate",
            {"reward_model": ["rms/seed_{seed}", "sarm", "rewards.py:score"], "eval_size": 12,
             "dataset": "pairs.jsonl", "output_dir": "out"},
            {**data("pairs.jsonl"), **reward, **files_of("sarm/model"), **functions}),
        Run("evaluate rewardbench2", "probe.py evaluate",
            {"reward_model": ["rewards.py:score"], "benchmark": "rewardbench2",
             "dataset": "rewardbench.json", "output_dir": "out"},
            {"rewardbench.json": "benchmark"}),
        Run("evaluate rm_bench", "probe.py evaluate",
            {"reward_model": ["lexicon.tsv"], "benchmark": "rm_bench",
             "dataset": "rm_bench.json", "output_dir": "out"},
            {"rm_bench.json": "benchmark", "lexicon.tsv": "lexicon"}),
        Run("judge", "probe.py judge", {**judge, "judge": ["rewards.py:score", "rms/seed_0"]},
            {"a.jsonl": "sft", "b.jsonl": "sft", **reward, **functions}),
        Run("judge again", "probe.py judge",
            {**judge, "judge": ["rewards.py:score", "rms/seed_0"], "output_dir": "judge_done"},
            {"judge_done/config.json": "object", "judge_done/cache/scores": "cache"},
            "judge_done"),
        Run("judge choices", "probe.py judge", {**judge, **by_endpoint},
            {"judge_http/cache/choices.jsonl": "choices"}, "judge_http",
            lambda: answer_with(200, {}, chat("1"), 0)),
    ]  # fmt: skip
    for run in found[:]:
        if run.name in ("sft", "dpo", "rm", "rm sarm", "ppo", "ppo features", "sae"):
            folder = half(run.name)
            flags = {"output_dir": folder, "resume": True}
            found.append(Run(f"{run.name} --resume", run.script, flags, run_files(folder), folder))
    return {run.name: run for run in found}


def adapter_files(folder):
    return {
        f"{folder}/model/adapter_config.json": "adapter config",
        f"{folder}/model/adapter_model.safetensors": "weights",
        f"{folder}/model/nanorlhf.json": "notes",
    }


RUNS = all_runs()


# ------------------------------------------------------------------------------- damage to any file


def replace(path: Path, content):
    """New content for a file. The old file may be linked into the material, so it is not written into."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def make_folder(path: Path):
    path.unlink()
    path.mkdir()


def make_loop(path: Path):
    path.unlink()
    path.symlink_to(path.name)


def make_link(path: Path, target: str):
    path.unlink()
    path.symlink_to(target)


def deep_json(rng=None):
    return "[" * 100_000 + "]" * 100_000


# {what is done to a file: (path, random numbers) -> nothing}; no file survives these.
ANY_FILE = {
    "missing": lambda path, rng: path.unlink(),
    "empty": lambda path, rng: replace(path, b""),
    "zeros": lambda path, rng: replace(path, bytes(path.stat().st_size)),
    "a folder": lambda path, rng: make_folder(path),
    "a link to itself": lambda path, rng: make_loop(path),
    "random bytes": lambda path, rng: replace(path, b"\xff\xfe" + rng.randbytes(300)),
}
TEXT_FILE = {
    **ANY_FILE,
    "not UTF-8": lambda path, rng: replace(path, path.read_bytes()[:40] + b"\xff\xe9\xff"),
}
JSON_FILE = {
    **TEXT_FILE,
    "cut": lambda path, rng: replace(path, path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path, rng: replace(path, "this is text\n"),
    "null": lambda path, rng: replace(path, "null"),
    "a number": lambda path, rng: replace(path, "3"),
    "a string": lambda path, rng: replace(path, '"text"'),
    "a list": lambda path, rng: replace(path, "[]"),
    "nested 100,000 deep": lambda path, rng: replace(path, deep_json()),
    "a number of 5,000 digits": lambda path, rng: replace(path, '{"a": ' + "7" * 5000 + "}"),
}
NAN = float("nan")
JSON_VALUES = {
    "missing": None,
    "null": None,
    "text": "nonsense",
    "a list": [],
    "an object": {},
    "-1": -1,
    "0": 0,
    "2.5": 2.5,
    "1e300": 1e300,
    "2**70": 2**70,
    "nan": NAN,
    "true": True,
}


def set_key(path: Path, rng, name: str, what: str):
    """Change one entry of a JSON object."""
    value = json.loads(path.read_text())
    if what == "missing":
        value.pop(name, None)
    else:
        value[name] = JSON_VALUES[what]
    replace(path, json.dumps(value))


def edit_json(path: Path, change: dict):
    replace(path, json.dumps({**json.loads(path.read_text()), **change}))


# --------------------------------------------------------------------------- damage to rows of data


def lines_of(path):
    return path.read_bytes().decode().splitlines()


def with_line(path, line, at=3):
    """A file with one more line, the fourth."""
    lines = lines_of(path)
    replace(path, "\n".join([*lines[:at], line, *lines[at:]]) + "\n")


def edited_rows(path, change, only=None):
    """change(row) on every row, or on one."""
    rows = [json.loads(line) for line in lines_of(path)]
    for i, row in enumerate(rows):
        if only is None or i == only:
            change(row)
    replace(path, "".join(json.dumps(row) + "\n" for row in rows))


def bad_rows(path):
    """{name: damage} of a .jsonl file that every reader must refuse."""
    last = {"sft.jsonl": "response", "pairs.jsonl": "rejected", "prompts.jsonl": "prompt"}
    name = last.get(path, "responses" if path == "answers.jsonl" else "response")

    def field_is(value):
        return lambda p, rng: edited_rows(p, lambda row: row.update({name: value}), only=1)

    return {
        "cut": lambda p, rng: replace(p, p.read_bytes()[: p.stat().st_size // 2]),
        "text": lambda p, rng: replace(p, "this is text\n"),
        "blank": lambda p, rng: replace(p, "\n \n\n"),
        "a line that is cut": lambda p, rng: with_line(p, '{"prompt": "a'),
        "a line that is a list": lambda p, rng: with_line(p, "[1, 2]"),
        "a line that is a number": lambda p, rng: with_line(p, "3"),
        "a line that is null": lambda p, rng: with_line(p, "null"),
        "a line nested 100,000 deep": lambda p, rng: with_line(p, deep_json()),
        "a number of 5,000 digits": lambda p, rng: with_line(p, '{"a": ' + "7" * 5000 + "}"),
        "a row without its field": lambda p, rng: edited_rows(p, lambda r: r.pop(name), 2),
        "a field that is null": field_is(None),
        "a field that is a number": field_is(7),
        "a field that is an object": field_is({"text": "a"}),
        "a field that is a list of numbers": field_is([1, 2]),
        "a lone surrogate": field_is("caf\ud800" if name != "responses" else ["\ud800"] * 4),
        "zeros in the middle": lambda p, rng: with_line(p, "\0\0\0"),
        "UTF-16": lambda p, rng: replace(p, p.read_text().encode("utf-16")),
    }


def odd_rows():
    """{name: damage} that changes nothing of what is in the rows."""

    def crlf(p, rng):
        replace(p, p.read_bytes().replace(b"\n", b"\r\n"))

    def turned(row):
        for name in reversed(list(row)):
            row[name] = row.pop(name)

    def escaped(p, rng):
        def escape(found):
            return "\\u%04x" % ord(found[0])

        replace(p, re.sub(r"(?<=[a-z])e(?=[a-z]* )", escape, p.read_text()))

    return {
        "CRLF": crlf,
        "BOM": lambda p, rng: replace(p, b"\xef\xbb\xbf" + p.read_bytes()),
        "blank lines at the end": lambda p, rng: replace(p, p.read_text() + "\n\n  \n"),
        "blank lines in front": lambda p, rng: replace(p, "\n\n" + p.read_text()),
        "no newline at the end": lambda p, rng: replace(p, p.read_text().rstrip("\n")),
        "more columns": lambda p, rng: edited_rows(p, lambda r: r.update(more=[1, None])),
        "fields in another order": lambda p, rng: edited_rows(p, turned),
        "spaces around rows": lambda p, rng: replace(p, p.read_text().replace("\n", " \t\n  ")),
    }


def other_formats():
    """{name: (damage, the new file's name)} of a .jsonl file: the same rows in another format."""

    def packed(p, rng):
        replace(p.with_name(p.name + ".gz"), gzip.compress(p.read_bytes()))

    def listed(p, rng):
        rows = [json.loads(line) for line in lines_of(p)]
        replace(p.with_suffix(".json"), json.dumps(rows, indent=1))

    return {"gz": (packed, ".jsonl.gz"), "a list in .json": (listed, ".json")}


# ----------------------------------------------------------------------- damage to files of tensors


def header_of(path):
    """The header of a safetensors file, as JSON, and the bytes after it."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :], size


def with_header(path, header, rest):
    encoded = json.dumps(header).encode()
    replace(path, struct.pack("<Q", len(encoded)) + encoded + rest)


def change_tensors(change):
    """A damage that calls change({name: tensor}, random numbers) and writes the result."""

    def damage(path, rng):
        notes = header_of(path)[0].get("__metadata__")
        tensors = load_file(path)
        # Another file in the same place: the old one may be a link.
        change(tensors, rng)
        path.unlink()
        save_file({name: x.contiguous() for name, x in tensors.items()}, path, notes)

    return damage


def a_float(tensors, rng):
    names = [n for n, x in sorted(tensors.items()) if x.is_floating_point() and x.numel() > 1]
    return rng.choice(names)


def put(value):
    def change(tensors, rng):
        name = a_float(tensors, rng)
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = value

    return change_tensors(change)


def cast(dtype):
    def change(tensors, rng):
        for name, x in tensors.items():
            tensors[name] = x.to(dtype)

    return change_tensors(change)


def drop_one(tensors, rng):
    del tensors[rng.choice(sorted(tensors))]


def another_shape(tensors, rng):
    name = a_float(tensors, rng)
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def flip_bit(first=0.0, last=1.0):
    """A flipped bit in this part of a file."""

    def damage(path, rng):
        content = bytearray(path.read_bytes())
        at = rng.randrange(int(first * len(content)), int(last * len(content)))
        content[at] ^= 1 << rng.randrange(8)
        replace(path, bytes(content))

    return damage


def flip_header(path, rng):
    header, rest, size = header_of(path)
    content = bytearray(path.read_bytes())
    content[rng.randrange(8, 8 + size)] ^= 1 << rng.randrange(7)
    replace(path, bytes(content))


def flip_size(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(8)] ^= 1 << rng.randrange(8)
    replace(path, bytes(content))


def as_pickle(path, rng):
    tensors = load_file(path)
    path.unlink()
    torch.save(tensors, path)


TENSOR_FILE = {
    **ANY_FILE,
    "cut": lambda path, rng: replace(path, path.read_bytes()[: path.stat().st_size // 2]),
    "cut by a byte": lambda path, rng: replace(path, path.read_bytes()[:-1]),
    "cut in the header": lambda path, rng: replace(path, path.read_bytes()[:100]),
    "text": lambda path, rng: replace(path, "this is text\n"),
    "more bytes at the end": lambda path, rng: replace(path, path.read_bytes() + b"more"),
    "a pickle": as_pickle,
    "a header of a wrong size": flip_size,
    "a tensor is missing": change_tensors(drop_one),
    "a tensor of another shape": change_tensors(another_shape),
    "nan": put(NAN),
    "inf": put(math.inf),
    "int64": cast(torch.int64),
}


# ------------------------------------------------------------------------------- cases of each kind


def on_file(path, damage):
    """A damage of one of the case's files. A path that is only a beginning stands for the first such file."""

    def do(here, rng):
        target = here / path
        if not target.exists():
            (target, *_) = sorted(target.parent.glob(target.name + "*"))
        damage(target, rng)

    return do


def cases_of_files(run):
    """Damage to each file that a run reads."""
    for path, kind in run.reads.items():
        for what, damage, expected in damages_of(run, path, kind):
            yield Case(f"{path}: {what}", run, expected, on_file(path, damage))


def damages_of(run, path, kind):
    """(name, damage, expected) of a file of a kind."""
    if kind in ("sft", "pairs", "prompts", "pool"):
        yield from ((what, damage, "refused") for what, damage in TEXT_FILE.items())
        yield from ((what, damage, "refused") for what, damage in bad_rows(path).items())
        yield from ((what, damage, "equal") for what, damage in odd_rows().items())
        yield "flipped bit", flip_bit(), "any"
    elif kind in ("weights", "human"):
        yield from ((what, damage, "refused") for what, damage in TENSOR_FILE.items())
        for i in range(3):
            yield f"flipped bit in the header {i}", flip_header, "any"
            yield f"flipped bit {i}", flip_bit(0.7), "any"
        yield "float16", cast(torch.float16), "any"
        yield "one more tensor", change_tensors(one_more), "any"
    elif kind == "checkpoint":
        for what, damage in TENSOR_FILE.items():
            yield what, damage, "sound"
        for i in range(4):
            yield f"flipped bit in the header {i}", flip_header, "sound"
            yield f"flipped bit {i}", flip_bit(0.3), "sound"
        yield "float16", cast(torch.float16), "sound"
        yield "one more tensor", change_tensors(one_more), "sound"
        yield "without the optimizer", change_tensors(no_optimizer), "sound"
    elif kind == "state":
        yield from ((what, damage, "sound") for what, damage in JSON_FILE.items())
        for name in ("step", "files", "logs", "sha256"):
            for what in JSON_VALUES:
                yield f"{name} {what}", functools.partial(set_key, name=name, what=what), "sound"
    elif kind in ("log", "eval"):
        expected = "sound" if "--resume" in run.name else "refused"
        yield from ((what, damage, expected) for what, damage in TEXT_FILE.items())
        for line in ("null", "3", "[]", "{}", '{"step": "x"}', '{"step": ', deep_json()[:150_000]):
            yield f"a line {line[:12]}", lambda p, rng, line=line: with_line(p, line, 0), expected
        yield "a row is lost", lambda p, rng: replace(p, "\n".join(lines_of(p)[1:]) + "\n"), "any"
    elif kind == "lexicon":
        yield from ((what, damage, "refused") for what, damage in TEXT_FILE.items())
        for what, text in BAD_LEXICONS.items():
            yield what, lambda p, rng, text=text: replace(p, text), "refused"
        for what, change in ODD_LEXICONS.items():
            yield what, lambda p, rng, c=change: replace(p, c(p.read_text())), "equal"
    elif kind == "python":
        missing_function = "def other(prompts, responses): return [1.0]\n"
        yield from ((what, damage, "refused") for what, damage in TEXT_FILE.items())
        yield "without the function", lambda p, rng: replace(p, missing_function), "refused"
        yield "a syntax error", lambda p, rng: replace(p, "def good(:\n"), "refused"
    elif kind in ("cache", "choices"):
        expected = "sound"
        yield from ((what, damage, expected) for what, damage in TEXT_FILE.items())
        for line in ("null", "3", "{}", '{"index": 0}', deep_json()[:150_000]):
            yield f"a line {line[:12]}", lambda p, rng, line=line: with_line(p, line, 0), expected
        yield "every line twice", lambda p, rng: replace(p, p.read_text() * 2), expected
        yield "lines in another order", lambda p, rng: replace(p, turned_lines(p)), expected
        yield "cut by a kill", lambda p, rng: replace(p, p.read_bytes()[:-9]), "equal"
        for what, value in {"a string": "x", "3": 3, "nan": NAN, "null": None}.items():
            for name in ("scores", "response_ids", "choice", "key"):
                yield (
                    f"{name} {what}",
                    functools.partial(set_in_line, name=name, value=value),
                    expected,
                )
        yield "a line is lost", lambda p, rng: replace(p, "\n".join(lines_of(p)[1:])), expected
    elif kind == "benchmark":
        yield from ((what, damage, "refused") for what, damage in JSON_FILE.items())
        for name in ("id", "prompt", "chosen", "rejected"):
            for what in ("missing", "null", "text", "a list", "an object", "0"):
                may = name == "id" or (what, name) == ("text", "prompt")
                damage = functools.partial(set_in_row, name=name, what=what)
                yield f"{name} {what}", damage, "any" if may else "refused"
    else:
        yield from damages_of_json(run, path, kind)


def damages_of_json(run, path, kind):
    """The same of a JSON object."""
    resumed = kind == "run config" and "--resume" in run.name
    optional = kind in ("notes", "tokenizer config")
    for what, damage in JSON_FILE.items():
        gone = what == "missing" and (optional or kind in ("tokenizer", "run config", "object"))
        gone = gone or what == "a number of 5,000 digits" and path.endswith("tokenizer.json")
        yield what, damage, "any" if gone else "refused"
    if kind != "tokenizer":
        yield "indented", lambda p, rng: replace(p, json.dumps(json.loads(p.read_text()), indent=7)), "equal"  # fmt: skip
    if kind in ("model config", "cfg"):
        more = {"a_key_of_nobody": {"a": [1, "\u00e9"]}}
        yield "one more key", lambda p, rng: edit_json(p, more), "equal"
    for name in KEYS.get(kind, []):
        for what in JSON_VALUES:
            if (name, what) in ENDLESS:
                continue
            expected = "refused" if (name, what) in WRONG.get(kind, ()) else "any"
            expected = "sound" if resumed and what in ("nan", "an object") else expected
            yield f"{name} {what}", functools.partial(set_key, name=name, what=what), expected


def set_in_line(path, rng, name, value):
    edited_rows(path, lambda row: row.update({name: value}) if name in row else None, only=1)


def one_more(tensors, rng):
    tensors["of_nobody"] = torch.zeros(3)


def no_optimizer(tensors, rng):
    for name in [name for name in tensors if name.startswith("optimizer/")]:
        del tensors[name]


def turned_lines(path):
    return "\n".join(reversed(lines_of(path))) + "\n"


def set_in_row(path, rng, name, what):
    rows = json.loads(path.read_text())
    if what == "missing":
        del rows[2][name]
    else:
        rows[2][name] = JSON_VALUES[what]
    replace(path, json.dumps(rows))


BAD_LEXICONS = {
    "no tabs": "good 3\nbad -3\n",
    "no number": "good\tlots\n",
    "nan": "good\tnan\nbad\t-3\n",
    "inf": "good\tinf\nbad\t-3\n",
    "1e999": "good\t1e999\nbad\t-3\n",
    "blank": "\n\n",
    "two words": LEXICON + "very good\t3\n",
    "an empty word": LEXICON + "\t3\n",
    "a word twice, with two values": LEXICON + "good\t-2\n",
}
ODD_LEXICONS = {
    "BOM": lambda text: "\ufeff" + text,
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "blank lines": lambda text: text.replace("\n", "\n\n"),
    "more columns": lambda text: text.replace("\n", "\tmore\tand more\n"),
    "upper case": lambda text: text.upper(),
}
# Entries of JSON files that are changed one by one.
KEYS = {
    "model config": (
        "model_type vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
        "max_position_embeddings eos_token_id pad_token_id architectures dtype layer_norm_eps "
        "rope_parameters hidden_act tie_word_embeddings id2label num_labels reward_mean sarm_param "
        "quantization_config attn_implementation auto_map transformers_version use_cache"
    ).split(),
    "tokenizer config": "eos_token pad_token unk_token tokenizer_class model_max_length".split(),
    "cfg": "architecture d_in d_sae k dtype normalize_activations metadata".split(),
    "adapter config": (
        "peft_type base_model_name_or_path r lora_alpha lora_dropout target_modules bias "
        "modules_to_save fan_in_fan_out rank_pattern use_dora task_type"
    ).split(),
    "notes": ["base", "reward_mean"],
    "run config": (
        "steps batch_size betas lr model dataset seed eval_splits inputs dtype output_dir columns"
    ).split(),
    "object": ["after", "before", "steps", "command", "output_dir"],
}
NUMBERS = ("text", "a list", "an object", "-1", "2.5", "1e300", "2**70", "nan")
# What can be nothing but wrong.
WRONG = {
    "model config": {
        *((name, what) for name in ("vocab_size", "hidden_size") for what in NUMBERS),
        *(("num_attention_heads", what) for what in (*NUMBERS, "0")),
        *(("model_type", what) for what in ("missing", "null", "text", "a list", "0", "nan")),
        *(("dtype", what) for what in ("text", "a list")),
    },
    "tokenizer config": {("eos_token", what) for what in ("missing", "null", "0", "a list")},
    "cfg": {
        *((name, what) for name in ("d_in", "d_sae", "k") for what in (*NUMBERS, "0", "missing")),
        *(("architecture", what) for what in JSON_VALUES),
    },
    "adapter config": {
        *((name, what) for name in ("peft_type", "base_model_name_or_path") for what in ("null",)),
        *(("r", what) for what in (*NUMBERS, "0", "missing")),
        *(("lora_dropout", what) for what in ("nan", "2.5", "-1", "text")),
        *(("modules_to_save", what) for what in ("2.5", "true", "text")),
    },
    "run config": {("steps", what) for what in ("text", "a list", "-1", "2.5", "nan")},
}
# A model of so many layers takes for ever to make, a run of so many steps to do.
ENDLESS = {("num_hidden_layers", "2**70"), ("steps", "2**70"), ("batch_size", "2**70")}


# --------------------------------------------------------------------------------- cases of flags

# Flags that take paths: of what is read, and of what is written.
READS = (
    "model base policy reward_model gold_model value_model sae sarm feature_sae human_latents "
    "dataset eval_dataset pool a b reward answers against texts encoder nli_model tokenizer "
    "explainer score_gold from_files"
).split()
WRITES = ("output_dir", "output", "save", "cache")
CHOICES = (
    "dtype distributed schedule loss sarm_mode objective kl_kind kl_in score_scaling split sites "
    "site normalize bias kind tokens by benchmark penalty device prompt_format"
).split()
# Flags for which a number below 0 stands for something, or may.
MAY_BE_NEGATIVE = {"layer", "final_lr", "lam", "missing_eos_penalty", "length_penalty"}
# Flags for which infinity says "never" or "no limit".
MAY_BE_INFINITE = {"max_grad_norm", "kl_target", "target_kl", "score_clip", "clip_range"}
MAY_BE_INFINITE |= {"value_clip_range", "timeout", "requests_per_minute", "temperature"}
# With 2**70 of these a run is right to go on for ever.
NEVER_DONE = {"steps", "members", "ppo_epochs", "seeds", "draws", "n_answers", "triples"}


def hint_of(run, name):
    return typing.get_type_hints(run.config)[name]


# Of some runs: the flags that they look at, or do not.
USED = {
    "ppo score_gold": {"score_gold", "gold_model", "micro_batch_size", "device"},
    "bon from": {f.name for f in dataclasses.fields(diversity_report.Flags)} | {"output_dir"},
}
UNUSED = {
    "bon pool": {"model", "dataset", "eval_dataset", "in_distribution", "columns"},
    "evaluate rewardbench2": {"eval_dataset", "columns"},
    "evaluate rm_bench": {"eval_dataset", "columns"},
}


def is_used(run, name):
    """Whether a run looks at a flag at all. --score_gold trains nothing, --from samples nothing."""
    return name in USED.get(run.name, {name}) and name not in UNUSED.get(run.name, ())


def cases_of_numbers(run):
    """Every numeric flag of a script with numbers that are out of range, and with none."""
    for f in dataclasses.fields(run.config):
        hint = hint_of(run, f.name)
        whole = hint in (int, int | None, list[int])
        if not whole and hint not in (float, float | None, list[float]):
            continue
        if not is_used(run, f.name):
            continue
        values = {"nan": "refused", "text": "refused", "": "refused", "-1": "refused", "0": "any"}
        if f.name in MAY_BE_NEGATIVE:
            values["-1"] = "any"
        if whole:
            values |= {"1e300": "refused", "inf": "refused", "0.5": "refused"}
            values["2**70"] = "any"
            values["9" * 5000] = "refused"
        else:
            may = "any" if f.name in MAY_BE_INFINITE else "refused"
            values |= {"inf": may, "1e300": "any", "1e-300": "any", "2**70": "any"}
        for value, expected in values.items():
            if value == "2**70" and f.name in NEVER_DONE:
                continue
            if f.name == "timeout" and value == "1e300":
                expected = "any"
            given = str(2**70) if value == "2**70" else value
            given = [given, "0.9"] if f.name == "betas" else [given]
            shown = value if len(value) < 20 else "5,000 digits"
            words = run.words(**{f.name: None}) + [f"--{f.name}", *given]
            yield Case(f"--{f.name} {shown}", run, expected, words=words)


def cases_of_choices(run):
    for f in dataclasses.fields(run.config):
        own = f.name in ("sae", "texts") and run.script == "train_sae.py"
        own = own or f.name == "task" and run.script == "probe.py reward"
        if not own and f.name not in CHOICES or not is_used(run, f.name):
            continue
        for value in ("nonsense", "None", "\u00e9", "0"):
            words = run.words(**{f.name: None}) + [f"--{f.name}", value]
            yield Case(f"--{f.name} {value}", run, "refused", words=words)


def cases_of_paths(run):
    """Every flag that names what is there, and what will be."""
    long = "x" * 300
    nowhere = ["./nothing/here", "/dev/null/x", "loop", "loop/x", long, "x\udcff", "a\nb"]
    nowhere += ["/proc/self/mem", "sft.jsonl/x", "\u00e9t\u00e9", "/", "{seed}", "*", "-", "~"]

    def loop(here, rng):
        (here / "loop").symlink_to("loop")

    for f in dataclasses.fields(run.config):
        own_meaning = f.name in ("sae", "texts") and run.script == "train_sae.py"
        if f.name not in (*READS, *WRITES) or own_meaning or run.name.endswith("--resume"):
            continue
        if not is_used(run, f.name):
            continue
        for value in nowhere if f.name in READS else []:
            if f.name == "explainer" and value == "-":
                continue
            words = run.words(**{f.name: None}) + [f"--{f.name}", value]
            yield Case(f"--{f.name} {shown(value)}", run, "refused", loop, words)
        if f.name in READS and run.flags.get(f.name):
            needed = f.name not in ("value_model", "gold_model", "human_latents", "feature_sae")
            needed = needed and f.name not in ("encoder", "nli_model", "tokenizer", "answers")
            needed = needed and f.name not in ("against", "base", "sae", "sarm", "pool")
            if needed:
                words = run.words(**{f.name: None}) + [f"--{f.name}", ""]
                yield Case(f"--{f.name} ''", run, "refused", words=words)
        for value in OUTPUTS if f.name in WRITES else []:
            words = run.words(**{f.name: None}) + [f"--{f.name}", value]
            if f.name == "save" and value == "":
                continue
            if f.name == "cache" and value == "":
                continue
            expected = "refused"
            if f.name == "output_dir" and value == "" and run.script == "train_sft.py":
                continue
            if f.name == "cache" and value in ("model", ".") or value == "x\udcff":
                expected = "any"  # bytes that are no text may be a name
            yield Case(f"--{f.name} {shown(value)}", run, expected, loop, words)


OUTPUTS = ["", "/dev/null/x", "loop", "loop/x", "sft.jsonl", "sft.jsonl/x", "x" * 300, "/proc/x"]
OUTPUTS += ["model", ".", "x\udcff", "a/" + "y" * 300]


def shown(value):
    return repr(value) if len(value) < 30 else "300 letters"


def cases_of_other_names(run):
    """The same thing under another name: the same numbers."""
    if run.name.endswith(("--resume", "again")):
        return
    for name, value in run.flags.items():
        if name not in READS or not isinstance(value, str) and len(value) != 1:
            continue
        path = value if isinstance(value, str) else value[0]
        if not isinstance(path, str) or path in ("none", "world") or "{seed}" in path:
            continue
        if name == "score_gold":
            continue
        file, colon, function = path.partition(":")
        is_file = file.endswith((".jsonl", ".py", ".tsv", ".safetensors", ".json"))
        forms = {"./": f"./{file}", "a//b": f".//{file}", "absolute": None}
        copies = {"\u00fcber uns": "copy", "with a space": "copy", "linked": "link"}
        if not is_file:
            forms["trailing slash"] = file + "/"
        for what, changed in forms.items():
            yield OtherName(run, name, what, file, changed, "", colon + function)
        for what, how in copies.items():
            suffix = os.path.splitext(file)[1] if is_file else ""
            yield OtherName(run, name, what, file, f"{what}{suffix}", how, colon + function)


def OtherName(run, flag, what, old, new, how, rest):
    """A case in which a flag names the same file or folder by another name, which may first be made."""
    place = {}

    def damage(here, rng):
        place["here"] = here
        if how == "link":
            (here / new).symlink_to(old)
        elif how == "copy" and (here / old).is_dir():
            shutil.copytree(here / old, here / new)
        elif how == "copy":
            shutil.copy2(here / old, here / new)

    given = new if new else f"{{here}}/{old}"
    words = run.words(**{flag: given + rest})
    return Case(f"--{flag} {what}", run, "equal", damage, words)


def cases_of_formats(run):
    for path, kind in run.reads.items():
        if kind not in ("sft", "pairs", "prompts", "pool"):
            continue
        for what, (damage, suffix) in other_formats().items():
            changes = {}
            for name, value in run.flags.items():
                swap = path.replace(".jsonl", suffix)
                if isinstance(value, list):
                    changes[name] = [swap if x == path else x for x in value]
                elif value == path:
                    changes[name] = swap
            words = run.words(**changes)
            yield Case(f"{path}: {what}", run, "equal", on_file(path, damage), words)
        for what, keep in {"cut": -20, "flipped": None}.items():
            changes = {k: path + ".gz" for k, value in run.flags.items() if value in (path, [path])}
            damage = functools.partial(bad_gzip, path=path, keep=keep)
            if changes:
                yield Case(f"{path}: gz {what}", run, "refused", damage, run.words(**changes))


def bad_gzip(here, rng, path, keep):
    content = bytearray(gzip.compress((here / path).read_bytes()))
    if keep:
        content = content[:keep]
    else:
        content[len(content) // 2] ^= 0x41
    replace(here / f"{path}.gz", bytes(content))


def cases_of_texts(run):
    """Flags that are small languages of their own."""
    flags = {f.name for f in dataclasses.fields(run.config)}
    for name, values in SMALL_LANGUAGES.items():
        for value in values if name in flags and is_used(run, name) else []:
            words = run.words(**{name: None}) + [f"--{name}", *value.split(" ")]
            if name == "lora_layers":
                words += ["--lora_rank", "2"]
            yield Case(f"--{name} {value}", run, "refused", words=words)
    yield Case("--nonsense", run, "refused", words=[*run.words(), "--nonsense"])
    yield Case("a word too many", run, "refused", words=[*run.words(), "--seed", "0", "word"])
    if (
        "columns" in flags
        and is_used(run, "columns")
        and run.flags.get("dataset", "world") != "world"
    ):
        for value in ("prompt", "prompt=", "=prompt", "prompt=nothing"):
            if value == "=prompt":
                continue
            words = [*run.words(), "--columns", value]
            yield Case(f"--columns {value}", run, "refused", words=words)


SMALL_LANGUAGES = {
    "layers": ["99", "-1", "1,", "highest:0", "highest:x", "highest", "nonsense", "1;2", "\u00b2"],
    "features": ["99999", "-1", "x", "3,,4", "\u00b2", "1.5"],
    "edits": ["3", "x:set:0", "3:set:x", "3:set:nan", "3:set:1e39", "99999:set:0", "3:nonsense:0"],
    "weights": ["3", "x:*:0", "3:*:inf", "3:*:nan", "99999:*:0", "-1:*:0"],
    "clamp": ["3", "3:max:nan", "3:max:1e39", "99999:max:0", "3:*:2"],
    "tau": ["q2", "q-1", "nan", "x", "0.5 0.6", "1e39"],
    "alpha": ["-1", "nan", "xstd", "inf", "1e39"],
    "penalize_features": ["99999", "-1", "3 3", "x"],
    "eval_splits": ["nonsense", "ood=", "test test", "x=missing.jsonl", "eval=sft.jsonl"],
    "in_distribution": ["nonsense", "words:", "words:prompt<=x", "a=", "rewards.py:nothing"],
    "lora_layers": ["(", "nothing", "(((a|.)+)+)+!"],
    "dataset": ["world:x", "world:\u00b2", "world:-1", "world:" + "9" * 5000],
    "truncate": ["x", "-1", "0", "\u00b2"],
    "judge": ["http://", "http://[", "llm:", "llm:missing", "http://user:pw@127.0.0.1:9/v1"],
    "uwo_lambda": ["x", "-1", "nan"],
}


# ------------------------------------------------------------------------------- cases of rewards

IMPORT_TIME = {
    "exits at import": "import sys\nsys.exit(0)\n",
    "argparse at import": "import argparse\nargparse.ArgumentParser().parse_args(['--x'])\n",
    "raises at import": "1 / 0\n",
    "recursion at import": "def f(): f()\nf()\n",
    "quits at import": "quit()\n",
    "__getattr__ raises": "def __getattr__(name): raise ValueError(name)\n",
    "the function is a number": "{function} = 3\n",
}
# The body of a function of (prompts, responses).
WRONG_REWARDS = {
    "raises": "raise KeyError('no such word\\nsecond line')",
    "raises an error without a text": "raise ValueError",
    "raises an error whose str() fails": "raise Wordless",
    "exits with 0": "import sys; sys.exit(0)",
    "exits with a text": "import sys; sys.exit('enough')",
    "quits": "quit()",
    "raises GeneratorExit": "raise GeneratorExit",
    "recursion": "return {function}(prompts, responses)",
    "an object that cannot be called": "return prompts[0](responses)",
    "None": "return None",
    "a number": "return 1.0",
    "a string": "return 'good'",
    "a string of digits": "return '1' * len(responses)",
    "bytes": "return bytes(len(responses))",
    "a dict": "return {{float(i): 1.0 for i in range(len(responses))}}",
    "a set": "return {{float(i) for i in range(len(responses))}}",
    "one too few": "return [1.0] * (len(responses) - 1)",
    "one too many": "return [1.0] * (len(responses) + 1)",
    "none at all": "return []",
    "texts": "return list(responses)",
    "numbers as texts": "return ['1.5'] * len(responses)",
    "nested lists": "return [[1.0] for _ in responses]",
    "None in a list": "return [None] * len(responses)",
    "nan": "return [float('nan')] * len(responses)",
    "inf": "return [float('inf')] * len(responses)",
    "1e300": "return [1e300] * len(responses)",
    "complex": "return [1j] * len(responses)",
    "an integer of 400 digits": "return [10**400] * len(responses)",
    "a tensor of another shape": "import torch; return torch.zeros(len(responses), 2)",
    "a coroutine": "async def later(): return [1.0]\n    return later()",
    "an argparse error": "import argparse; argparse.ArgumentParser().error('no such option')",
    "a warning as an error": "import warnings; warnings.simplefilter('error'); warnings.warn('x')",
    "an iterator that raises": "yield 1.0\n    raise OSError(5, 'x')",
}
ODD_REWARDS = {
    "a tuple": "return tuple(real(prompts, responses))",
    "an iterator": "yield from real(prompts, responses)",
    "an array": "import numpy; return numpy.array(real(prompts, responses))",
    "a tensor": "import torch; return torch.tensor(real(prompts, responses), dtype=torch.float64)",
    "sorts its list": "out = real(prompts, responses); responses.sort(); return out",
    "empties its lists": "out = real(prompts, responses)\n    prompts.clear(); responses.clear()\n    return out",
    "prints": "print('hello'); return real(prompts, responses)",
    "draws random numbers": "import torch, random; torch.rand(5); random.random()\n    return real(prompts, responses)",
}
# {run: the function of rewards.py that it calls}
CALLS = {
    "ppo": "good",
    "ppo ensemble": "words",
    "bon": "good",
    "bon pool": "good",
    "judge": "score",
    "evaluate": "score",
    "reward sequence": "score",
    "ablate": "good",
    "rm": "words",
}


def cases_of_rewards(run):
    """A reward function that misbehaves, and one that is only odd."""
    function = CALLS.get(run.name)
    if not function:
        return
    more = {"gold_model": f"rewards.py:{function}"} if run.name == "rm" else {}
    words = run.words(**more)
    for what, body in IMPORT_TIME.items():
        text = "def other(): pass\n" + body.replace("{function}", function)
        damage = functools.partial(append_code, text=text)
        yield Case(f"a reward: {what}", run, "refused", damage, words)
    for what, body in WRONG_REWARDS.items():
        text = "class Wordless(Exception):\n    def __str__(self): return 1 / 0\n"
        text += f"def {function}(prompts, responses):\n    " + body.format(function=function) + "\n"
        late = run.name in ("bon", "bon pool", "judge", "rm")  # answers and other scores are kept
        damage = functools.partial(append_code, text=text)
        yield Case(f"a reward: {what}", run, "stopped" if late else "refused", damage, words)
    for what, body in ODD_REWARDS.items() if run.name != "rm" else []:
        text = f"real = {function}\ndef {function}(prompts, responses):\n    {body}\n"
        damage = functools.partial(append_code, text=text)
        yield Case(f"a reward: {what}", run, "equal", damage, words)


def append_code(here, rng, text):
    path = here / "rewards.py"
    known = "" if "__getattr__" in text or "at import" in text else path.read_text()
    replace(path, known + "\n" + text)


# ---------------------------------------------------------------------- cases of single kinds


def cases_of_environment(run):
    """torchrun's variables, a full disk, keys."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29417"}
    for name, value in (
        ("RANK", "x"), ("WORLD_SIZE", "x"), ("LOCAL_RANK", "x"), ("RANK", "-1"),
        ("WORLD_SIZE", "0"), ("RANK", "1"), ("MASTER_PORT", "x"), ("MASTER_PORT", "99999999"),
        ("WORLD_SIZE", "-2"), ("RANK", ""), ("WORLD_SIZE", ""), ("LOCAL_RANK", "\u00b2"),
    ):  # fmt: skip
        given = {**alone, name: value}
        expected = "any" if name == "MASTER_PORT" else "refused"  # one process may not need it
        yield Case(f"{name}={value} of torchrun's", run, expected, environment=given)
    yield Case("WORLD_SIZE=2 alone", run, "refused", environment={"WORLD_SIZE": "2"})
    yield Case("RANK=0 alone", run, "any", environment={"RANK": "0"})
    room = (300, 3000) if run.script.startswith("probe") else (3000, 12_000)
    for size in room:
        before = functools.partial(limit_files, size)
        expected = "failed or equal"
        yield Case(f"files of {size} bytes at most", run, expected, before=before)


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def cases_of_code(run):
    """Model folders that bring code, or point elsewhere."""
    for path in [path for path in run.reads if path.endswith("/config.json")]:
        if run.reads[path] != "model config":
            continue
        folder = os.path.dirname(path)
        for model_type in ("mamba", "gpt_neox", "nothing"):
            damage = functools.partial(add_code, folder=folder, model_type=model_type)
            expected = "refused" if model_type != "gpt_neox" else "any"
            if folder in ("encoder", "nli", "classifier"):
                continue
            if expected == "refused" and run.name == "bon" and folder.startswith("rms"):
                expected = "stopped"  # its answers are kept, whatever the reward model is
            yield Case(f"{folder}: code for {model_type}", run, expected, damage)
        for what, target in INDEXES.items():
            damage = functools.partial(add_index, folder=folder, target=target)
            yield Case(f"{folder}: an index {what}", run, "refused", damage)
        yield Case(f"{folder}: vocabulary larger than the embeddings", run, "refused",
                   functools.partial(add_words, folder=folder, run=run))  # fmt: skip


INDEXES = {
    "to a pickle": "pytorch_model.bin",
    "outside": "../model/model.safetensors",
    "far outside": "../../model/model.safetensors",
    "absolute": "/dev/null",
    "to nothing": "model-00001-of-00002.safetensors",
    "of numbers": 3,
}


def add_code(here, rng, folder, model_type):
    """A config that names Python code; the code says so if it is run."""
    evil = "open('the_code_was_run', 'w').close()\nclass Evil: pass\n"
    replace(here / folder / "evil.py", evil)
    names = "AutoConfig AutoModel AutoModelForCausalLM AutoModelForSequenceClassification"
    change = {"auto_map": {name: "evil.Evil" for name in names.split()}}
    if model_type == "mamba":
        change["auto_map"] = {"AutoModelForSequenceClassification": "evil.Evil"}
    edit_json(here / folder / "config.json", {**change, "model_type": model_type})


def add_index(here, rng, folder, target):
    """Weights by an index in place of model.safetensors."""
    weights = here / folder / "model.safetensors"
    names = list(header_of(weights)[0])
    tensors = load_file(weights)
    if target == "pytorch_model.bin":
        torch.save(tensors, here / folder / target)
        replace(here / folder / "x.safetensors", b"")
    os.rename(weights, here / folder / "weights.hidden")
    content = {"metadata": {}, "weight_map": {n: target for n in names if n != "__metadata__"}}
    replace(here / folder / "model.safetensors.index.json", json.dumps(content))


def add_words(here, rng, folder, run):
    """Words whose ids the model has no embeddings for, among them those of the texts."""
    path = here / folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    for i, word in enumerate(sorted(vocab, key=vocab.get)[4:]):
        vocab[word] = len(vocab) + i
    replace(path, json.dumps(content))


def cases_of_checkpoints(run):
    """Whole folders that are damaged, of a run that is to be resumed."""
    if not run.name.endswith("--resume"):
        return
    root = run.writes
    for what, damage in {
        "checkpoint a file": lambda h: (shutil.rmtree(h / "checkpoint"), replace(h / "checkpoint", "x")),
        "checkpoint missing": lambda h: shutil.rmtree(h / "checkpoint"),
        "step_2 a file": lambda h: replace(h / "checkpoint/step_2", "x"),
        "step_2 empty": lambda h: empty_folder(h / "checkpoint/step_2"),
        "both steps empty": lambda h: [empty_folder(h / f"checkpoint/step_{i}") for i in (1, 2)],
        "step_03": lambda h: (h / "checkpoint/step_2").rename(h / "checkpoint/step_03"),
        "step_9 is step_2": lambda h: shutil.copytree(h / "checkpoint/step_2", h / "checkpoint/step_9"),
        ".tmp_step_3 a file": lambda h: replace(h / "checkpoint/.tmp_step_3", "x"),
        ".tmp_step_3 a folder": lambda h: (h / "checkpoint/.tmp_step_3/x").mkdir(parents=True),
        "samples.jsonl missing": lambda h: (h / "samples.jsonl").unlink(missing_ok=True),
        "eval a file": lambda h: (shutil.rmtree(h / "eval", ignore_errors=True), replace(h / "eval", "x")),
        "model a file": lambda h: replace(h / "model", "x"),
        "metrics.jsonl.tmp a folder": lambda h: (h / "metrics.jsonl.tmp").mkdir(),
        "summary.json a folder": lambda h: (h / "summary.json").mkdir(),
    }.items():  # fmt: skip
        expected = "any" if "model a file" in what else "sound"
        yield Case(f"{what}", run, expected, lambda here, rng, d=damage: d(here / root))
    others = [half(name) for name in ("sft", "dpo", "rm", "ppo", "sae") if half(name) != root]
    for other in others:

        def damage(here, rng, other=other):
            shutil.rmtree(here / root / "checkpoint")
            shutil.copytree(here / other / "checkpoint", here / root / "checkpoint")

        yield Case(f"the checkpoints of {other}", run, "sound", damage)
    data = RUNS[run.name.removesuffix(" --resume")].flags["dataset"]
    yield Case("the data have changed", run, "refused",
               lambda here, rng: replace(here / data, (here / data).read_text().replace("the", "a")))  # fmt: skip
    code = lambda here, rng: (replace(here / root / "r.py", REWARDS),
                              edit_json(here / root / "config.json", {"gold_model": f"{root}/r.py:good"}))  # fmt: skip # noqa: E731
    if run.script in ("train_ppo.py", "train_rm.py"):
        yield Case("code in the run folder", run, "refused", code)


def empty_folder(path):
    shutil.rmtree(path)
    path.mkdir()


def cases_of_finished_runs(run):
    """An output folder that holds something else, and one whose run is done."""
    if run.writes != "out":
        return
    another = "half_rm" if run.script == "train_sft.py" else "half_sft"
    words = run.words(output_dir=another)
    yield Case("--output_dir of another run", run, "refused", words=words)

    def notes(here, rng):
        replace_tree(here / "out/notes.txt")

    yield Case("--output_dir with notes in it", run, "refused", notes)
    yield Case("--output_dir empty", run, "equal", lambda here, rng: (here / "out").mkdir())
    nested = run.words(output_dir="deep/er/out")
    yield Case("--output_dir deep", run, "equal", words=nested, writes="deep/er/out")
    odd = run.words(output_dir="\u00e4 b\u200b")
    yield Case("--output_dir with odd letters", run, "equal", words=odd, writes="\u00e4 b\u200b")
    linked = lambda here, rng: ((here / "there").mkdir(), (here / "out").symlink_to("there"))  # noqa: E731
    yield Case("--output_dir a link to a folder", run, "equal", linked)
    dangling = lambda here, rng: (here / "out").symlink_to("nowhere")  # noqa: E731
    yield Case("--output_dir a dangling link", run, "any", dangling)


def replace_tree(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("notes\n")


def cases_of_numerics(run):
    """Settings with which no finite number comes out."""
    trained = run.script in ("train_sft.py", "train_rm.py", "train_ppo.py", "train_sae.py")
    if not trained or run.name.endswith("--resume") or "score_gold" in run.name:
        return
    for value in ("1e30", "1e38"):
        words = run.words(lr=value, steps=4)
        yield Case(f"--lr {value} for 4 steps", run, "any", words=words)


MAY_BE = ("alpha -1", "alpha 1e300", "dropout 1")


def cases_of_adapters(run):
    if "adapter" not in str(run.flags.get("model")) and "rm_adapter" not in str(run.flags):
        return
    folder = "adapter/model" if run.name == "sft adapter" else "rm_adapter/model"
    config = f"{folder}/adapter_config.json"
    changes = {
        "base itself": {"base_model_name_or_path": folder},
        "base missing": {"base_model_name_or_path": "./nothing/here"},
        "base a file": {"base_model_name_or_path": "sft.jsonl"},
        "base an encoder": {"base_model_name_or_path": "encoder"},
        "no such layer": {"target_modules": ["nothing"]},
        "a pattern without end": {"target_modules": "(((a|.)+)+)+!"},
        "a pattern that is none": {"target_modules": "("},
        "target_modules of numbers": {"target_modules": [3]},
        "rank 1": {"r": 1},
        "dropout 1": {"lora_dropout": 1},
        "alpha 1e300": {"lora_alpha": 1e300},
        "alpha nan": {"lora_alpha": NAN},
        "alpha -1": {"lora_alpha": -1},
    }
    for what, change in changes.items():
        damage = lambda here, rng, c=change: edit_json(here / config, c)  # noqa: E731
        yield Case(f"{folder}: {what}", run, "any" if what in MAY_BE else "refused", damage)

    def circle(here, rng):
        shutil.copytree(here / folder, here / "other")
        edit_json(here / config, {"base_model_name_or_path": "other"})
        edit_json(here / "other/adapter_config.json", {"base_model_name_or_path": folder})

    yield Case(f"{folder}: a circle of two", run, "refused", circle)


def cases_of_human_latents(run):
    """The notes in the header of a file of human latents, and its tensors."""
    for path, kind in run.reads.items():
        if kind != "human":
            continue
        for what, text in {"broken": "{", "null": "null", "empty": "{}", "a list": "[]",
                           "a number": "3", "deep": deep_json()}.items():  # fmt: skip
            damage = functools.partial(set_notes, text=text)
            yield Case(f"{path}: notes {what}", run, "refused", on_file(path, damage))
        for what, change in {
            "latents double": lambda t, rng: t.update(latents=t["latents"].double()),
            "latents int": lambda t, rng: t.update(latents=t["latents"].int()),
            "latents 1e38": lambda t, rng: t.update(latents=t["latents"] * 0 + 3e38),
            "latents of no text": lambda t, rng: t.update(latents=t["latents"][:0]),
            "scores of no text": lambda t, rng: t.update(scores=t["scores"][:0]),
            "scores all the same": lambda t, rng: t.update(scores=t["scores"] * 0),
        }.items():
            damage = on_file(path, change_tensors(change))
            may = what in ("latents double", "latents 1e38", "scores all the same")
            yield Case(f"{path}: {what}", run, "any" if may else "refused", damage)


def set_notes(path, rng, text):
    header, rest, _ = header_of(path)
    names = list(header["__metadata__"])
    header["__metadata__"] = {name: text for name in names}
    with_header(path, header, rest)


def cases_of_autoencoders(run):
    """Entries of cfg.json that lie deeper."""
    for path in [path for path, kind in run.reads.items() if kind == "cfg"]:
        for names, values in DEEPER.items():
            for what in values:
                damage = functools.partial(
                    set_deep, names=names.split("."), value=JSON_VALUES[what]
                )
                may = names.endswith((".model", ".layer", ".site", ".tied"))
                expected = "any" if may else "refused"
                yield Case(f"{path}: {names} {what}", run, expected, on_file(path, damage))


DEEPER = {
    "metadata": ("text", "a list", "2.5", "true"),
    "metadata.nanorlhf": ("text", "a list", "2.5", "true", "an object"),
    "metadata.nanorlhf.scale": (
        "null",
        "text",
        "a list",
        "-1",
        "0",
        "nan",
        "true",
        "2**70",
        "missing",
    ),
    "metadata.nanorlhf.normalize": ("null", "text", "a list", "0", "missing"),
    "metadata.nanorlhf.tied": tuple(JSON_VALUES),
    "metadata.model": tuple(JSON_VALUES),
    "metadata.layer": tuple(JSON_VALUES),
    "metadata.site": tuple(JSON_VALUES),
}
SARM_PARAMS = {
    "sarm_param.sae_source_layer": ("null", "text", "-1", "0", "2.5", "2**70", "nan", "missing"),
    "sarm_param.sae_latent_size": ("null", "text", "-1", "0", "2.5", "2**70", "nan", "missing"),
    "sarm_param.sae_k": ("null", "text", "-1", "0", "2.5", "2**70", "nan"),
    "reward_mean": ("null", "text", "a list", "an object", "nan", "true"),
}


def set_deep(path, rng, names, value):
    """Change an entry of an entry; JSON_VALUES["missing"] is None as "null" is."""
    whole = json.loads(path.read_text())
    place = whole
    for name in names[:-1]:
        place = place[name]
    place[names[-1]] = value
    replace(path, json.dumps(whole))


def cases_of_reward_models(run):
    """What a reward model's config.json says beside its trunk."""
    for path in [path for path in run.reads if path.endswith("/config.json")]:
        if not path.startswith(("rms", "sarm")):
            continue
        for names, values in SARM_PARAMS.items():
            if names.startswith("sarm_param") and not path.startswith("sarm"):
                continue
            for what in values:
                damage = functools.partial(
                    set_deep, names=names.split("."), value=JSON_VALUES[what]
                )
                yield Case(f"{path}: {names} {what}", run, "refused", on_file(path, damage))


def cases_of_contents(run):
    """Data that are well formed, but hardly meant."""
    for path in [path for path, kind in run.reads.items() if kind in ("sft", "pairs", "prompts")]:
        for what, change in CONTENTS.items():
            damage = functools.partial(change_texts, change=change)
            yield Case(f"{path}: {what}", run, "any", on_file(path, damage))
        for what, n in {"one row": 1, "two rows": 2}.items():
            damage = lambda p, rng, n=n: replace(p, "\n".join(lines_of(p)[:n]))  # noqa: E731
            yield Case(f"{path}: {what}", run, "any", on_file(path, damage))


CONTENTS = {
    "empty texts": lambda name, text: "",
    "empty prompts": lambda name, text: "" if name == "prompt" else text,
    "empty answers": lambda name, text: text if name == "prompt" else "",
    "white space alone": lambda name, text: " \n\t",
    "the same prompt everywhere": lambda name, text: "a b" if name == "prompt" else text,
    "the same answer everywhere": lambda name, text: text if name == "prompt" else "a b",
    "long texts": lambda name, text: text + " very" * 300,
    "very long texts": lambda name, text: text + " very" * 20_000,
    "words that nobody knows": lambda name, text: "xyzzy " + text[::-1],
    "NUL": lambda name, text: "\0" + text + "\0",
    "line separators": lambda name, text: text.replace(" ", " \u2028\x85\x0c", 1),
    "emoji": lambda name, text: "\U0001f600 " + text,
    "right to left": lambda name, text: "\u202e" + text,
    "special tokens": lambda name, text: "<eos> <pad> " + text,
}


def change_texts(path, rng, change):
    def changed(row):
        for name, value in row.items():
            if isinstance(value, str):
                row[name] = change(name, value)

    edited_rows(path, changed)


def cases_of_predicates(run):
    """A function of a row, --in_distribution, that misbehaves."""
    if run.name not in ("sft", "rm", "ppo", "bon"):
        return
    words = [*run.words(), "--in_distribution", "rewards.py:short"]
    for what, body in {
        "raises": "raise KeyError(1)",
        "exits": "raise SystemExit(0)",
        "None": "return None",
        "a number": "return 3",
        "an array": "import numpy; return numpy.zeros(3)",
        "a string": "return 'yes'",
        "never": "return False",
        "always": "return True",
        "empties the row": "row.clear(); return True",
    }.items():
        text = f"def short(row):\n    {body}\n"
        expected = "any" if what in ("always", "empties the row") else "refused"
        damage = functools.partial(append_code, text=text)
        yield Case(f"a predicate: {what}", run, expected, damage, words)


# -------------------------------------------------------------------------------- cases of endpoints


def chat(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


REPLIES = {  # {name: (status, headers, body, seconds between its bytes)}
    "garbage": (200, {}, b"\x00\xff\xfe garbage", 0),
    "empty": (200, {}, b"", 0),
    "null": (200, {}, b"null", 0),
    "no choices": (200, {}, b'{"choices": []}', 0),
    "deep": (200, {}, deep_json().encode(), 0),
    "5,000 digits": (200, {}, b'{"choices": ' + b"7" * 5000 + b"}", 0),
    "a number as text": (200, {}, chat(3), 0),
    "an essay": (200, {}, chat("I would rather not say. " * 50), 0),
    "huge": (200, {}, chat("word " * 4_000_000), 0),
    "500": (500, {}, b"oops", 0),
    "429 for an hour": (429, {"Retry-After": "3600"}, b"", 0),
    "Retry-After nan": (429, {"Retry-After": "nan"}, b"", 0),
    "Retry-After inf": (429, {"Retry-After": "inf"}, b"", 0),
    "Retry-After a bad date": (503, {"Retry-After": "Mon, 99 Foo 99999 99:99:99"}, b"", 0),
    "401 with the key": (401, {}, f"bad key {SECRET}".encode(), 0),
    "400 with the key": (400, {}, f"bad key {SECRET}".encode(), 0),
    "the key as an answer": (200, {}, chat(f"the key is {SECRET}"), 0),
    "a redirect": (302, {"Location": "http://127.0.0.1:9/"}, b"", 0),
    "a wrong length": (200, {"Content-Length": "999999"}, chat("1"), 0),
    "a bad length": (200, {"Content-Length": "x"}, chat("1"), 0),
    "gzip": (200, {"Content-Encoding": "gzip"}, gzip.compress(chat("1")), 0),
    "drip": (200, {}, chat("1") + b" " * 600, 0.2),
    "latin-1": (200, {"Content-Type": "text/plain; charset=latin-1"}, chat("caf\u00e9"), 0),
}


def answer_with(status, headers, body, pause):
    """Start an endpoint in this process. -> its port"""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for at in range(0, len(body), 1 if pause else len(body) or 1):
                    self.wfile.write(body[at : at + 1] if pause else body)
                    time.sleep(pause)
            except OSError:
                pass

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server.server_address[1]


def cases_of_endpoints(run):
    """A judge or an explainer behind an endpoint that answers oddly, and keys that are none."""
    if run.name not in ("judge", "features", "latents"):
        return
    flag = "judge" if run.name == "judge" else "explainer"
    words = run.words(pause=0, timeout=1) + [f"--{flag}_model", "m", f"--{flag}", "{endpoint}"]
    for what, reply in REPLIES.items():
        before = functools.partial(answer_with, *reply)
        key = {"OPENAI_API_KEY": SECRET}
        yield Case(
            f"an endpoint: {what}", run, "stopped", words=words, before=before, environment=key
        )
    good = functools.partial(answer_with, 200, {}, chat("1"), 0)
    for what, key in {"CR": SECRET + "\r", "newline inside": SECRET[:5] + "\n" + SECRET,
                      "a space inside": "a " + SECRET, "not ASCII": SECRET + "\u20ac",
                      "a surrogate": SECRET + "\udcff"}.items():  # fmt: skip
        environment = {"OPENAI_API_KEY": key}
        expected = "any" if what == "CR" else "stopped"
        yield Case(
            f"a key: {what}", run, expected, words=words, before=good, environment=environment
        )
    for url in ("http://127.0.0.1:1/v1", "http://", "http://127.0.0.1:x/v1", "http://[/v1",
                f"http://127.0.0.1/v1?key={SECRET}", f"http://me:{SECRET}@127.0.0.1/v1",
                "HTTP://127.0.0.1:1", "http://127.0.0.1:1/a b", "http://no.such.host.invalid/v1",
                "http:/x", "https:"):  # fmt: skip
        given = [url if word == "{endpoint}" else word for word in words]
        yield Case(f"--{flag} {url.replace(SECRET, 'KEY')}", run, "stopped", words=given)


KINDS = [
    cases_of_files,
    cases_of_numbers,
    cases_of_choices,
    cases_of_paths,
    cases_of_other_names,
    cases_of_formats,
    cases_of_texts,
    cases_of_rewards,
    cases_of_environment,
    cases_of_code,
    cases_of_checkpoints,
    cases_of_finished_runs,
    cases_of_numerics,
    cases_of_adapters,
    cases_of_human_latents,
    cases_of_autoencoders,
    cases_of_reward_models,
    cases_of_contents,
    cases_of_predicates,
    cases_of_endpoints,
]


def all_cases():
    """Every case there is, by run and kind. Each name is found once."""
    found = {}
    for run in RUNS.values():
        for kind in KINDS:
            for case in kind(run):
                case.name, case.kind = f"{run.name} '{case.name}'", kind.__name__
                found.setdefault(case.name, case)
    return list(found.values())


def choose(cases, n, seed):
    """n cases in random order, 0: all. Of a kind that has four times as many, twice as many are taken."""
    rng, places = random.Random(seed), {}
    groups = defaultdict(list)
    for case in cases:
        groups[case.kind, case.expected == "any"].append(case)
    for group in groups.values():
        rng.shuffle(group)
        for i, case in enumerate(group):
            places[case.name] = (i + rng.random()) / math.sqrt(len(group))
    chosen = sorted(cases, key=lambda case: places[case.name])
    return chosen[:n] if n else chosen


# ------------------------------------------------------------------------------------------ running


def run_words(script, words):
    """What the shell does with a script and its words, in this process."""
    sys.argv = [script, *words]
    if script == "probe.py":
        cli.run_command(probe.COMMANDS, words)
    else:
        cli.run(SCRIPTS[script].Config, SCRIPTS[script].main, words)


def prepare_process():
    """Imports that the scripts leave until they are needed, so that no fork does them; pictures are left out."""
    import datasets  # noqa: F401
    import transformers.models.mamba.modeling_mamba  # noqa: F401

    sys.dont_write_bytecode = True
    for script in (train_sft, train_rm, train_ppo, sample_bon):
        script.plot_run = lambda run: None
    plots.save = lambda draw, what, path: None
    with torch.no_grad():
        model = AutoModelForCausalLM.from_config(small_config())
        model(torch.zeros(1, 3, dtype=torch.long))
    torch.optim.AdamW(model.parameters())


def in_fork(function, stderr):
    """Call a function in a fork with its stderr in a file. -> the fork's id"""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(nowhere, 1)
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")
        torch.set_num_threads(1)
        function()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stderr.flush()
        finally:
            os._exit(code)


def copy_material(material: Path, here: Path):
    """The material in a new folder. Files that no script writes into are linked; logs are copied."""
    for folder, _, names in os.walk(material):
        place = here / os.path.relpath(folder, material)
        place.mkdir()
        for name in names:
            source = os.path.join(folder, name)
            if name.endswith(".jsonl"):
                shutil.copy2(source, place / name)
            else:
                os.link(source, place / name)


def tree(here: Path):
    """{path: what is there} of a folder, by sizes and times. Lock files are no content."""
    found = {}
    for folder, folders, names in os.walk(here):
        for name in folders:
            path = os.path.join(folder, name)
            found[path] = os.readlink(path) if os.path.islink(path) else "folder"
        for name in names:
            path = os.path.join(folder, name)
            stat = os.lstat(path)
            if name != LOCK_FILE:
                found[path] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found


def numbers_in(value):
    """All numbers of a JSON value in their order, but times and memory."""
    if isinstance(value, dict):
        for name, part in value.items():
            if not name.startswith(TIMES):
                yield from numbers_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from numbers_in(part)
    elif isinstance(value, (int, float)):
        yield float(value)


def results_of(path: Path):
    """The numbers that a run left, {file: list}: of its JSON files, and sums over its tensors."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    found = {}
    for file in files:
        name = str(file.relative_to(path))
        # Settings are no results, nor is what only this machine knows of a tokenizer.
        inside = Path(name).parts[:1]
        if file.name == "config.json" or inside in (("cache",), ("checkpoint",)):
            continue
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = list(numbers_in(rows))
        elif file.suffix == ".json" and not file.name.startswith(("tokenizer", "adapter")):
            found[name] = list(numbers_in(json.loads(file.read_text())))
        elif file.suffix == ".safetensors":
            tensors = load_file(file).items()
            found[name] = [x.double().abs().sum().item() for _, x in sorted(tensors)]
    return found


def same_results(a, b):
    """ "" or where two results differ."""
    if a.keys() != b.keys():
        return f"other files: {', '.join(sorted(a.keys() ^ b.keys()))}"
    for name in a:
        close = len(a[name]) == len(b[name]) and all(
            x == y or math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-6) or (x != x and y != y)
            for x, y in zip(a[name], b[name])
        )
        if not close:
            return f"other numbers in {name}"
    return ""


def last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def last_place(text):
    """FILE:LINE of the last frame in the project."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', text)
    own = [f for f in frames if f[0].startswith(f"{REPO}/") and "/tests/" not in f[0]]
    return f"{os.path.relpath(own[-1][0], REPO)}:{own[-1][1]}" if own else ""


class Fuzzer:
    """Runs cases, two at a time, on material that is made once."""

    def __init__(self, root: Path, workers=2):
        self.root, self.workers = root, workers
        self.material = root / "material"
        self.expected = {}  # {run: its results}
        self.count = 0
        self.material.mkdir(parents=True)
        stderr = root / "material.txt"
        child = in_fork(lambda: make_material(self.material), stderr)
        _, status = os.waitpid(child, 0)
        assert status == 0, stderr.read_text()
        shutil.copytree(self.material / "done_ppo", self.material / "no_gold")
        without_gold(self.material / "no_gold")
        self.made = tree(self.material)

    def results(self, run):
        """What a run gives on the undamaged material, the second of two equal ones."""
        if run.name not in self.expected:
            case = Case(f"{run.name} 'undamaged'", run, "right")
            outcome = self.run_all([case])[0]
            assert not outcome.problem, (outcome.problem, outcome.line, outcome.place)
        return self.expected[run.name]

    def run_all(self, cases, show=lambda outcome: None, seconds=math.inf):
        """Run cases until they are done or time is up. -> outcomes"""
        waiting, running, outcomes = list(reversed(cases)), {}, []
        end = time.monotonic() + seconds
        while running or (waiting and time.monotonic() < end):
            while waiting and len(running) < self.workers and time.monotonic() < end:
                case = waiting.pop()
                if case.expected in ("equal", "sound", "failed or equal"):
                    self.results(case.run)
                child, here, before = self.start(case)
                running[child] = (case, here, before, time.monotonic())
            for child, (case, here, before, begun) in list(running.items()):
                done, status = os.waitpid(child, os.WNOHANG)
                took = time.monotonic() - begun
                hangs = not done and took > HANGS_AFTER
                if hangs:
                    os.kill(child, signal.SIGKILL)
                    _, status = os.waitpid(child, 0)
                if done or hangs:
                    del running[child]
                    outcome = self.judge(case, here, before, status, hangs)
                    outcome.seconds = took
                    outcomes.append(outcome)
                    show(outcome)
                    shutil.rmtree(here.parent, ignore_errors=True)
            time.sleep(0.005)
        return outcomes

    def start(self, case):
        """Copy the material, damage it, and run the case in a fork. -> its id, folder, and what is in it"""
        self.count += 1
        place = self.root / f"case_{self.count}"
        place.mkdir()
        here = place / "here"
        copy_material(self.material, here)
        case.damage(here, random.Random(case.name))
        before = tree(here)

        def play():
            os.chdir(here)
            os.environ.update(escaped(case.environment))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            address_space = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
            resource.setrlimit(resource.RLIMIT_AS, (address_space + MEMORY,) * 2)
            port = (case.before or case.run.before)()
            given = case.run.words() if case.words is None else case.words
            places = {"{here}": str(here), "{endpoint}": f"http://127.0.0.1:{port}/v1"}
            words = [fill_in(word, places) for word in given]
            script = case.run.script.split()[0]
            # What a shell hands to Python: bytes, whatever they are.
            run_words(script, [os.fsdecode(os.fsencode(word)) for word in words])

        return in_fork(play, place / "stderr.txt"), here, before

    def judge(self, case, here, before, status, hangs):
        """What is wrong with how a case ended."""
        text = (here.parent / "stderr.txt").read_text(errors="replace")
        code = os.waitstatus_to_exitcode(status)
        outcome = Outcome(case, "", f"exit {code}", last_line(text), last_place(text))
        outcome.problem = "hangs" if hangs else self.problem(case, here, before, code, text)
        if tree(self.material) != self.made:
            outcome.problem += " (the material itself was changed)"
            self.made = tree(self.material)
        return outcome

    def problem(self, case, here, before, code, text):
        expected, line = case.expected, last_line(text)
        after = tree(here)
        if "Traceback (most recent call last)" in text:
            return "traceback"
        if code < 0:
            return f"ended by signal {-code}"
        if any(os.path.basename(path) == "the_code_was_run" for path in after):
            return "ran the model folder's code"
        if SECRET in text or any(shows_secret(path) for path in after if path not in before):
            return "shows the secret"
        name = case.run.script.split()[0]
        one_line = code in (1, 2) and line.startswith(f"{name}: error: ") or f"{name} [rank" in line
        where = here / (case.writes or case.run.writes)
        if code and not one_line:
            return "no error in the last line"
        if expected == "right":
            self.expected[case.run.name] = results_of(where)
            return "" if code == 0 else f"undamaged, but exit {code}"
        if code not in (0, 1, 2):
            return f"wrong exit code {code}"
        if expected == "any":
            return "" if code != 2 or "stopped" in expected else changes(before, after, late=True)
        if expected == "failed or equal":
            if code == 1:
                return ""
            return "refused what is right" if code else differs(self, case, where)
        if expected == "stopped":
            return "" if code == 2 else f"accepted (exit {code})"
        if expected == "refused" or expected == "sound" and code == 2:
            return f"accepted (exit {code})" if code != 2 else changes(before, after)
        if code:
            return "refused what is right"
        return differs(self, case, where)


def differs(fuzzer, case, where):
    return same_results(results_of(where), fuzzer.results(case.run))


def changes(before, after, late=False):
    """What a refused run changed in its folder; an empty folder above the output's may be left."""
    changed = [path for path in before if after.get(path) != before[path]]
    if changed:
        return f"refused, but changed {os.path.basename(changed[0])}"
    new = [path for path in after if path not in before]
    if new and not late:
        return f"refused, but left {'/'.join(new[0].split('/')[-2:])}"
    return ""


def shows_secret(path):
    try:
        return SECRET.encode() in Path(path).read_bytes()
    except OSError:
        return False


def fill_in(word, places):
    for name, value in places.items():
        word = word.replace(name, value)
    return word


def escaped(environment):
    return {k: v.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") for k, v in environment.items()}  # fmt: skip


def without_gold(folder):
    """Make a finished PPO run one that was not scored with gold."""
    for path in folder.glob("eval*/*.jsonl"):
        rows = [{**json.loads(line), "gold": None} for line in path.read_text().splitlines()]
        write_rows(path, rows)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    write_rows(folder / "metrics.jsonl",
               [{k: v for k, v in row.items() if "/gold" not in k} for row in rows])  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    for part in ("before", "after"):
        summary[part] = {k: v for k, v in summary[part].items() if not k.startswith("gold")}
    (folder / "summary.json").write_text(json.dumps(summary))


# ------------------------------------------------------------------------------------------- report


def table(outcomes):
    """How many cases ended how, by what they expected."""
    counts = Counter((o.case.expected, o.problem or "as it should") for o in outcomes)
    lines = [f"{'expected':18s}{'outcome':44s}cases"]
    for (expected, problem), n in sorted(counts.items()):
        lines.append(f"{expected:18s}{problem[:42]:44s}{n:5d}")
    return "\n".join(lines)


def by_cause(outcomes):
    """Failures together that share a place, or else a problem. -> lines"""
    groups = defaultdict(list)
    for outcome in outcomes:
        if outcome.problem:
            kind = "traceback" if outcome.problem == "traceback" else outcome.problem
            groups[kind, outcome.place].append(outcome)
    lines = []
    for (problem, place), group in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(f"\n{len(group):4d}  {problem}  {place}")
        for outcome in sorted(group, key=lambda o: o.case.name):
            lines.append(f"      {outcome.case.name} [{outcome.how}, {outcome.seconds:.1f} s]")
            lines.append(f"          {outcome.line[:200]}")
    return lines


def make_fuzzer(folder=None, workers=2):
    root = Path(tempfile.mkdtemp(prefix="fuzz_", dir=folder))
    prepare_process()
    return Fuzzer(root, workers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--n", type=int, default=2000, help="how many cases; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="which of them, and in what order")
    parser.add_argument("--only", default="", help="a regular expression for their names")
    parser.add_argument("--workers", type=int, default=2, help="cases at a time")
    parser.add_argument("--folder", help="where temporary files go")
    parser.add_argument(
        "--report", help="write the failures, by cause, into this file, as they come"
    )
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    args = parser.parse_args()
    cases = [case for case in all_cases() if re.search(args.only, case.name)]
    if args.list:
        print(*(f"{case.expected:16s} {case.name}" for case in cases), sep="\n")
        return
    chosen = choose(cases, args.n, args.seed)
    print(f"{len(chosen)} of {len(cases)} cases", flush=True)
    fuzzer, outcomes = make_fuzzer(args.folder, args.workers), []

    def show(outcome):
        outcomes.append(outcome)
        if outcome.problem:
            print(f"{outcome.problem}: {outcome.case.name} [{outcome.how}]", flush=True)
            print(f"    {outcome.place} {outcome.line[:200]}", flush=True)
        if args.report and len(outcomes) % 50 == 0:
            write_report(args.report, outcomes)

    fuzzer.run_all(chosen, show)
    if args.report:
        write_report(args.report, outcomes)
    print(table(outcomes), *by_cause(outcomes), sep="\n")
    shutil.rmtree(fuzzer.root)
    sys.exit(any(outcome.problem for outcome in outcomes))


def write_report(path, outcomes):
    Path(path).write_text("\n".join([f"{len(outcomes)} cases\n", table(outcomes), *by_cause(outcomes)]) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()

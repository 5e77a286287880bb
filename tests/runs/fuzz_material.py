"""What the cases of fuzz.py are made of: small runs of every script and command, and the models and
files that they read.
"""

import http.server
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from support import read_rows, write_rows
from tiny_models import ENCODER_CONFIG, NLI_LABELS, encoder_tokenizer, save_encoder
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
from nanorlhf.runtime import cli, log

SCRIPTS = {
    "train_sft.py": train_sft,
    "train_rm.py": train_rm,
    "train_ppo.py": train_ppo,
    "sample_bon.py": sample_bon,
    "train_sae.py": train_sae,
}


# ---------------------------------------------------------------------------------- runs and cases


@dataclass
class Run:
    """A run of a script on the material: what cases are made of."""

    name: str
    script: str  # train_sft.py, or probe.py COMMAND
    flags: dict
    reads: dict = field(default_factory=dict)  # {path of a file that it reads: its kind}
    writes: str = "out"  # where its results are
    before: Callable = lambda: None  # called in the case's fork; may start an endpoint

    @property
    def config(self):
        script, _, command = self.script.partition(" ")
        if script == "probe.py":
            return probe.COMMANDS[command][0]
        return SCRIPTS[script].Config

    def words(self, **changes):
        """The command line after the script's name. A flag that is None is left out."""
        words = self.script.split()[1:]
        for name, value in {**self.flags, **changes}.items():
            if value is None:
                continue
            words.append(f"--{name}")
            if isinstance(value, list):
                words += map(str, value)
            elif value is not True:
                words.append(str(value))
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


def run_words(script, words):
    """What the shell does with a script and its words, in this process."""
    sys.argv = [script, *words]
    if script == "probe.py":
        cli.run_command(probe.COMMANDS, words)
    else:
        cli.run(SCRIPTS[script].Config, SCRIPTS[script].main, words)


# -------------------------------------------------------------------------------------- an endpoint


def chat(text):
    """An answer of a chat endpoint, in bytes."""
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"message": message}]}).encode()


class Reply(NamedTuple):
    """What an endpoint answers. With a pause, in seconds, it sends one byte at a time."""

    body: bytes
    status: int = 200
    headers: dict = {}
    pause: float = 0


def answer_with(reply: Reply):
    """Start an endpoint in this process. -> its port"""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.send_body()
            except OSError:
                pass

        def send_body(self):
            if not reply.pause:
                self.wfile.write(reply.body)
                return
            for at in range(len(reply.body)):
                self.wfile.write(reply.body[at : at + 1])
                time.sleep(reply.pause)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server.server_address[1]


# ----------------------------------------------------------------------- which files there are

SAE = "sae/policy/1_residual"
SAE_RM = "sae_rm/policy/1_residual"
SAE_MLP = "saes/policy/1_mlp"


def half(name):
    """The folder of a run that is not finished."""
    return "half_" + name.replace(" ", "_")


def inside(folder, kinds):
    """{name of a file: kind} -> the same with the files' paths."""
    return {f"{folder}/{name}": kind for name, kind in kinds.items()}


def files_of(folder):
    """{path: kind} of a saved model's files."""
    kinds = {
        "config.json": "model config",
        "model.safetensors": "weights",
        "tokenizer.json": "tokenizer",
        "tokenizer_config.json": "tokenizer config",
    }
    return inside(folder, kinds)


def sae_files(folder):
    return inside(folder, {"cfg.json": "cfg", "sae_weights.safetensors": "weights"})


def adapter_files(folder):
    kinds = {
        "adapter_config.json": "adapter config",
        "adapter_model.safetensors": "weights",
        "nanorlhf.json": "notes",
    }
    return inside(f"{folder}/model", kinds)


def run_files(folder):
    """{path: kind} of what --resume reads."""
    kinds = {"config.json": "run config", "metrics.jsonl": "log"}
    for step in (1, 2):
        kinds[f"checkpoint/step_{step}/state.json"] = "state"
        kinds[f"checkpoint/step_{step}/state.safetensors"] = "checkpoint"
    return inside(folder, kinds)


def without(files, *names):
    """Files but those of these names."""
    kept = {}
    for path, kind in files.items():
        if os.path.basename(path) not in names:
            kept[path] = kind
    return kept


SFT_ROWS = {"sft.jsonl": "sft"}
PAIRS = {"pairs.jsonl": "pairs"}
PROMPTS = {"prompts.jsonl": "prompts"}
POOL = {"answers.jsonl": "pool"}
ANSWERS = {"a.jsonl": "sft"}
REWARD_CODE = {"rewards.py": "python"}
LEXICON_FILE = {"lexicon.tsv": "lexicon"}
MODEL = files_of("model")
POLICY = files_of("policy/model")
REWARD_MODEL = files_of("rms/seed_0/model")
SARM = files_of("sarm/model")


# ------------------------------------------------------------------------------------ all the runs

TINY = {"output_dir": "out", "steps": 2, "batch_size": 4, "eval_size": 6, "warmup": 0}


def training_runs():
    """train_sft.py and train_rm.py."""
    sft = {**TINY, "model": "model", "dataset": "sft.jsonl", "max_new_tokens": 4, "n_samples": 1}
    dpo = {**sft, "loss": "dpo", "dataset": "pairs.jsonl"}
    rm = {**TINY, "model": "model", "dataset": "pairs.jsonl"}
    yield Run("sft", "train_sft.py", sft, SFT_ROWS | MODEL)
    yield Run("sft adapter", "train_sft.py", sft | {"model": "adapter"}, adapter_files("adapter"))
    yield Run("dpo", "train_sft.py", dpo, PAIRS | MODEL)
    yield Run("rm", "train_rm.py", rm, PAIRS | MODEL)
    yield Run("rm sarm", "train_rm.py", rm | {"sarm": "sae"}, MODEL | sae_files(SAE))


def ppo_runs():
    ppo = {
        **TINY,
        "model": "model",
        "dataset": "prompts.jsonl",
        "minibatch_size": 2,
        "ppo_epochs": 1,
        "max_new_tokens": 6,
        "gold_model": "rewards.py:words",
    }
    flags = {**ppo, "reward_model": ["rewards.py:good"]}
    yield Run("ppo", "train_ppo.py", flags, PROMPTS | MODEL | REWARD_CODE)

    groups = {"advantage": "grpo", "group_size": 2, "loss_mean": "sequence"}
    flags = {**ppo, **groups, "reward_model": ["lexicon.tsv"]}
    yield Run("ppo grpo", "train_ppo.py", flags, PROMPTS | MODEL | LEXICON_FILE)

    flags = {**ppo, "reward_model": ["rms/seed_{seed}", "lexicon.tsv"], "objective": "uwo"}
    reads = files_of("rms/seed_1/model") | LEXICON_FILE
    yield Run("ppo ensemble", "train_ppo.py", flags, reads)

    features = {
        **ppo,
        "reward_model": ["sarm"],
        "penalize_features": [3],
        "tau": ["q0.5"],
        "alpha": ["0.5std"],
        "clamp": ["5:max:0.5"],
        "density_beta": 0.1,
        "human_latents": "human.safetensors",
    }
    yield Run("ppo features", "train_ppo.py", features, SARM | {"human.safetensors": "human"})

    flags = {**features, "reward_model": ["rms/seed_0"], "feature_sae": SAE_RM}
    flags["human_latents"] = "human_rm.safetensors"
    reads = REWARD_MODEL | sae_files(SAE_RM) | {"human_rm.safetensors": "human"}
    yield Run("ppo feature_sae", "train_ppo.py", flags, reads)

    flags = {**ppo, "reward_model": ["rm_adapter"], "value_model": "rms/seed_0"}
    value_model = without(REWARD_MODEL, "tokenizer.json", "tokenizer_config.json")
    yield Run("ppo value_model", "train_ppo.py", flags, adapter_files("rm_adapter") | value_model)

    flags = {"score_gold": "no_gold", "gold_model": "rewards.py:words"}
    kinds = {
        "config.json": "run config",
        "metrics.jsonl": "log",
        "summary.json": "object",
        "eval/step_0.jsonl": "eval",
        "model/tokenizer.json": "tokenizer",
    }
    reads = inside("no_gold", kinds) | REWARD_CODE
    yield Run("ppo score_gold", "train_ppo.py", flags, reads, "no_gold")


def best_of_n_runs():
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
    yield Run("bon", "sample_bon.py", bon, PROMPTS | MODEL | REWARD_MODEL)

    flags = {**bon, "output_dir": "bon_done", "n": 2}
    kinds = {"config.json": "run config", "cache/answers": "cache", "cache/scores": "cache"}
    yield Run("bon again", "sample_bon.py", flags, inside("bon_done", kinds), "bon_done")

    flags = {
        "output_dir": "out",
        "pool": "answers.jsonl",
        "reward_model": ["rewards.py:good", "classifier#LABEL_1"],
        "save_pairs": True,
        "n": 2,
        "save_best": True,
        "diversity": True,
        "best_of": 2,
    }
    reads = POOL | REWARD_CODE | files_of("classifier")
    yield Run("bon pool", "sample_bon.py", flags, reads)

    flags = {
        "from_files": ["a.jsonl", "answers.jsonl"],
        "encoder": "encoder",
        "nli_model": "nli",
        "tokenizer": "model",
        "output_dir": "out",
        "truncate": "5",
    }
    reads = ANSWERS | POOL | files_of("encoder") | files_of("nli")
    reads["model/tokenizer.json"] = "tokenizer"
    yield Run("bon from", "sample_bon.py", flags, reads)


def autoencoder_runs():
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
    yield Run("sae", "train_sae.py", {**sae, "base": "none"}, SFT_ROWS | MODEL)

    flags = {**sae, "model": "policy", "base": "model", "layers": "highest:1", "texts": "both"}
    flags |= {"max_new_tokens": 4, "sae": "vanilla"}
    reads = POLICY | without(MODEL, "tokenizer_config.json")
    yield Run("sae base", "train_sae.py", flags, reads)

    flags = {**sae, "base": "none", "cache": "activations"}
    yield Run("sae cached", "train_sae.py", flags, {})


def probe_runs():
    """The commands of probe.py that look into a policy."""
    some_texts = {"output_dir": "out", "dataset": "sft.jsonl", "max_rows": 60}
    flags = {**some_texts, "model": "model", "policy": "policy", "layers": "1"}
    yield Run("divergence", "probe.py divergence", flags, SFT_ROWS | MODEL | POLICY)

    flags = {"a": [SAE], "b": [SAE_MLP], "output_dir": "out"}
    yield Run("mmcs", "probe.py mmcs", flags, sae_files(SAE) | sae_files(SAE_MLP))

    both = {**some_texts, "policy": "policy", "model": "model", "layers": "1", "seeds": 2}
    flags = {**both, "reward": "lexicon.tsv", "triples": 6, "neutral": 1.0}
    yield Run("reward", "probe.py reward", flags, SFT_ROWS | LEXICON_FILE | POLICY)
    flags = {**both, "task": "sequence", "reward": "rewards.py:score"}
    yield Run("reward sequence", "probe.py reward", flags, REWARD_CODE)
    flags = {**both, "dataset": "pairs.jsonl", "sae": "saes", "layers": None}
    yield Run("pairs", "probe.py pairs", flags, PAIRS | sae_files(SAE_MLP))

    flags = {"sae": [SAE_MLP], "dataset": "sft.jsonl", "top": 3, "eval_size": 8}
    flags["output_dir"] = "out"
    yield Run("features", "probe.py features", flags, SFT_ROWS | sae_files(SAE_MLP) | POLICY)

    flags = {
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
    reads = PROMPTS | sae_files(SAE_MLP) | REWARD_MODEL | REWARD_CODE
    yield Run("ablate", "probe.py ablate", flags, reads)


def latents_runs():
    """The commands of probe.py that look into a reward model."""
    latents = {
        "output_dir": "out",
        "reward_model": "sarm",
        "dataset": "pairs.jsonl",
        "eval_size": 12,
    }
    flags = {**latents, "answers": "a.jsonl", "against": "b.jsonl", "top": 3}
    yield Run("reward_features", "probe.py reward_features", flags, PAIRS | ANSWERS | SARM)
    flags = {**latents, "reward_model": "rms/seed_0", "sae": SAE_RM, "top": 3}
    yield Run(
        "reward_features sae", "probe.py reward_features", flags, sae_files(SAE_RM) | REWARD_MODEL
    )
    flags = {**latents, "edits": ["3:set:0"], "pool": "answers.jsonl", "n": 2, "draws": 2}
    yield Run("causal", "probe.py causal", flags, PAIRS | POOL | SARM)
    flags = {**latents, "weights": ["3:*:0"], "save": "steered"}
    yield Run("steer", "probe.py steer", flags, PAIRS | SARM)
    file = "out.safetensors"
    flags = {"output": file, "reward_model": "sarm", "dataset": "sft.jsonl"}
    yield Run("human_latents", "probe.py human_latents", flags, SFT_ROWS | SARM, file)


def judging_runs():
    """probe.py evaluate and judge."""
    models = ["rms/seed_{seed}", "sarm", "rewards.py:score"]
    flags = {"reward_model": models, "eval_size": 12, "dataset": "pairs.jsonl"}
    flags["output_dir"] = "out"
    reads = PAIRS | REWARD_MODEL | SARM | REWARD_CODE
    yield Run("evaluate", "probe.py evaluate", flags, reads)
    flags = {"reward_model": ["rewards.py:score"], "benchmark": "rewardbench2"}
    flags |= {"dataset": "rewardbench.json", "output_dir": "out"}
    reads = {"rewardbench.json": "benchmark"}
    yield Run("evaluate rewardbench2", "probe.py evaluate", flags, reads)
    flags = {"reward_model": ["lexicon.tsv"], "benchmark": "rm_bench"}
    flags |= {"dataset": "rm_bench.json", "output_dir": "out"}
    reads = {"rm_bench.json": "benchmark"} | LEXICON_FILE
    yield Run("evaluate rm_bench", "probe.py evaluate", flags, reads)

    judge = {"a": ["a.jsonl"], "b": ["b.jsonl"], "output_dir": "out"}
    flags = {**judge, "judge": ["rewards.py:score", "rms/seed_0"]}
    reads = ANSWERS | {"b.jsonl": "sft"} | REWARD_MODEL | REWARD_CODE
    yield Run("judge", "probe.py judge", flags, reads)
    reads = inside("judge_done", {"config.json": "object", "cache/scores": "cache"})
    flags = {**flags, "output_dir": "judge_done"}
    yield Run("judge again", "probe.py judge", flags, reads, "judge_done")
    flags = {**judge, "judge": ["{endpoint}"], "judge_model": "m", "output_dir": "judge_http"}
    reads = inside("judge_http", {"cache/choices.jsonl": "choices"})
    yield Run(
        "judge choices", "probe.py judge", flags, reads, "judge_http", always_prefer_the_first
    )


def always_prefer_the_first():
    """Start an endpoint that is asked which answer is better. -> its port"""
    return answer_with(Reply(chat("1")))


# Runs that are also killed and resumed.
RESUMED = ("sft", "dpo", "rm", "rm sarm", "ppo", "ppo features", "sae")


def all_runs():
    """Every script and command, and what it reads: {name: Run}."""
    runs = {}
    for runs_of in (
        training_runs,
        ppo_runs,
        best_of_n_runs,
        autoencoder_runs,
        probe_runs,
        latents_runs,
        judging_runs,
    ):
        for run in runs_of():
            runs[run.name] = run
    for name in RESUMED:
        folder = half(name)
        flags = {"output_dir": folder, "resume": True}
        resumed = f"{name} --resume"
        runs[resumed] = Run(resumed, runs[name].script, flags, run_files(folder), folder)
    return runs


RUNS = all_runs()


# ------------------------------------------------------------------------------------- the material


REWARDS = """
def good(prompts, responses): return [0.5 * len(r.split()) for r in responses]
def words(prompts, responses): return [float(r.split().count("the")) for r in responses]
def score(prompts, responses): return [len(r) % 7 - 2.5 for r in responses]
def short(row): return len(row.get("response", row.get("chosen", "")).split()) <= 40
"""


LEXICON = "".join(f"{word}\t{value}\n" for word, value in world.LEXICON.items())


def make_material(root: Path):
    """Everything that cases read, in the current folder. A fork calls this."""
    os.chdir(root)
    torch.manual_seed(0)
    for folder in ("model", "dropout"):
        AutoModelForCausalLM.from_config(small_config()).save_pretrained(folder)
        world.tokenizer().save_pretrained(folder)
    make_encoders()
    Path("rewards.py").write_text(REWARDS)
    Path("lexicon.tsv").write_text(LEXICON)
    make_texts()
    make_runs()
    make_unfinished_runs()


def small_config():
    config = world.model_config()
    config.num_hidden_layers = 2
    config.hidden_size = 32
    config.intermediate_size = 48
    return config


def make_encoders():
    """encoder/, an encoder of texts; nli/, a model of entailment; classifier/, of two classes."""
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = encoder_tokenizer(model_input_names=inputs)
    encoder = BertModel(BertConfig(**ENCODER_CONFIG))
    save_encoder(encoder, Path("encoder"), tokenizer)
    label_ids = {label: i for i, label in NLI_LABELS.items()}
    config = BertConfig(**ENCODER_CONFIG, id2label=NLI_LABELS, label2id=label_ids)
    save_encoder(BertForSequenceClassification(config), Path("nli"), tokenizer)
    longer = ENCODER_CONFIG | {"max_position_embeddings": 128}
    config = BertConfig(**longer, num_labels=2)
    save_encoder(BertForSequenceClassification(config), Path("classifier"), tokenizer)


def responses_of(rows):
    return [row["response"] for row in rows]


def make_texts():
    """Demonstrations, pairs and prompts; answers one by one and several to a prompt; benchmarks."""
    write_rows(Path("sft.jsonl"), world.demonstrations(100))
    pairs = [row for row in world.preferences(60) if row["chosen"] != row["rejected"]]
    write_rows(Path("pairs.jsonl"), pairs)
    prompt_rows = world.prompts("train")[::12]
    write_rows(Path("prompts.jsonl"), [{"prompt": row["prompt"]} for row in prompt_rows])

    texts = responses_of(world.demonstrations(48))
    write_answers(Path("a.jsonl"), prompt_rows, texts[:12])
    write_answers(Path("b.jsonl"), prompt_rows, texts[20:32])
    pool = []
    for i in range(8):
        row = {"prompt": prompt_rows[i]["prompt"], "responses": texts[4 * i : 4 * i + 4]}
        pool.append(row | {"gold_scores": [0.5, 1.5, -1.0, 2.0]})
    write_rows(Path("answers.jsonl"), pool)
    write_benchmarks(pairs[:6])


def write_answers(path, prompt_rows, texts):
    """One answer to each of the first prompts."""
    rows = []
    for prompt_row, text in zip(prompt_rows, texts):
        rows.append({"prompt": prompt_row["prompt"], "response": text})
    write_rows(path, rows)


def write_benchmarks(pairs):
    """Pairs in the form of RewardBench 2 (one right answer) and of RM-Bench (three of each)."""
    rewardbench = []
    rm_bench = []
    for i, pair in enumerate(pairs):
        rejected = [pair["rejected"], pair["rejected"] + " bad .", "awful ."]
        row = {"id": str(i), "prompt": pair["prompt"], "rejected": rejected}
        row |= {"chosen": [pair["chosen"]], "subset": "Focus"}
        rewardbench.append(row)
        rm_bench.append({**row, "chosen": row["chosen"] * 3, "domain": "chat"})
    Path("rewardbench.json").write_text(json.dumps(rewardbench))
    Path("rm_bench.json").write_text(json.dumps(rm_bench))


def make_run(name, **changes):
    """Make a run of a training script, with changes of its flags."""
    run = RUNS[name]
    script = SCRIPTS[run.script]
    script.main(script.Config(**run.flags | changes))


def make_runs():
    """The models and finished runs that cases start from."""
    make_run("sft", output_dir="policy", lr=1e-2)
    make_run("sft", output_dir="adapter", lora_rank=2)
    for seed in (0, 1):
        make_run("rm", output_dir=f"rms/seed_{seed}", seed=seed)
    make_run("rm", output_dir="rm_adapter", lora_rank=2)

    # Autoencoders for SARMs, of an LM and of a reward model, and one of MLPs.
    kind = {"site": "residual", "layers": "1", "normalize": "token", "relu": False, "base": "none"}
    make_run("sae", model="model", output_dir="sae", **kind)
    make_run("sae", model="rms/seed_0", output_dir="sae_rm", **kind)
    make_run("sae", model="policy", base="model", output_dir="saes", layers="1")

    make_run("rm sarm", output_dir="sarm")
    run = RUNS["human_latents"]
    run_words("probe.py", run.words(output="human.safetensors", reward_model="sarm", sae=""))
    of_rm = {"output": "human_rm.safetensors", "reward_model": "rms/seed_0", "sae": SAE_RM}
    run_words("probe.py", run.words(**of_rm))

    make_run("ppo", output_dir="done_ppo")
    make_run("bon", output_dir="bon_done")
    shutil.copy("bon_done/pool.jsonl", "pool.jsonl")
    run_words("probe.py", RUNS["judge"].words(output_dir="judge_done"))
    port = always_prefer_the_first()
    url = f"http://127.0.0.1:{port}/v1"
    run_words("probe.py", RUNS["judge choices"].words(judge=url))


def make_unfinished_runs():
    """Runs that were killed after their second checkpoint of three."""
    real = log.RunFolder.checkpoint

    def stop_after_the_second(folder, step, *args, **kwargs):
        real(folder, step, *args, **kwargs)
        if step == 2:
            raise KeyboardInterrupt

    log.RunFolder.checkpoint = stop_after_the_second
    for name in RESUMED:
        folder = half(name)
        try:
            make_run(name, output_dir=folder, steps=3, checkpoint_every=1, keep_checkpoints=2)
        except KeyboardInterrupt:
            pass
        assert Path(folder, "checkpoint/step_2").is_dir(), name


def without_gold(folder):
    """Make a finished PPO run one that was not scored with gold."""
    for path in folder.glob("eval*/*.jsonl"):
        rows = [row | {"gold": None} for row in read_rows(path)]
        write_rows(path, rows)
    records = read_rows(folder / "metrics.jsonl")
    for record in records:
        for name in list(record):
            if "/gold" in name:
                del record[name]
    write_rows(folder / "metrics.jsonl", records)
    summary = json.loads((folder / "summary.json").read_text())
    for part in (summary["before"], summary["after"]):
        for name in list(part):
            if name.startswith("gold"):
                del part[name]
    (folder / "summary.json").write_text(json.dumps(summary))

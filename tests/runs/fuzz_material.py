"""What the cases of fuzz.py are made of: small runs of every script and command, and the models and files that they read."""

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

import torch
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
from nanorlhf.runtime import cli, log

SCRIPTS = {
    "train_sft.py": train_sft,
    "train_rm.py": train_rm,
    "train_ppo.py": train_ppo,
    "sample_bon.py": sample_bon,
    "train_sae.py": train_sae,
}


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


def run_words(script, words):
    """What the shell does with a script and its words, in this process."""
    sys.argv = [script, *words]
    if script == "probe.py":
        cli.run_command(probe.COMMANDS, words)
    else:
        cli.run(SCRIPTS[script].Config, SCRIPTS[script].main, words)


# -------------------------------------------------------------------------------------- an endpoint


def chat(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


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
    write_rows(Path("sft.jsonl"), world.demonstrations(100))
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


FEATURES = {"output_dir": "out", "reward_model": "sarm", "dataset": "pairs.jsonl", "eval_size": 12}


SOME = {"output_dir": "out", "dataset": "sft.jsonl", "max_rows": 60}


def files_of(folder):
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
    base = {path: kind for path, kind in model.items() if kind != "tokenizer config"}
    trunk = {path: kind for path, kind in reward.items() if "tokenizer" not in path}
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
            {**adapter_files("rm_adapter"), **trunk}),
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
             "max_new_tokens": 4, "sae": "vanilla"}, {**files_of("policy/model"), **base}),
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
        Run("reward_features", "probe.py reward_features",
            {**FEATURES, "answers": "a.jsonl", "against": "b.jsonl", "top": 3},
            {**data("pairs.jsonl"), "a.jsonl": "sft", **files_of("sarm/model")}),
        Run("reward_features sae", "probe.py reward_features",
            {**FEATURES, "reward_model": "rms/seed_0", "sae": SAE_RM, "top": 3},
            {**sae_files(SAE_RM), **reward}),
        Run("causal", "probe.py causal",
            {**FEATURES, "edits": ["3:set:0"], "pool": "answers.jsonl", "n": 2, "draws": 2},
            {**data("pairs.jsonl"), "answers.jsonl": "pool", **files_of("sarm/model")}),
        Run("steer", "probe.py steer", {**FEATURES, "weights": ["3:*:0"], "save": "steered"},
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

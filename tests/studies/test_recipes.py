"""The recipes at scale, read from the studies' pages, run with one step on tiny models.

Every command of a section "Recipe at scale" is run as it stands there, in the page's order. Bash
reads the section, so variables and loops work. What differs is in one place each:

    models and data    tiny ones lie in folders that are called as on the hub (write_models,
                       write_data): same architecture, same context, same columns
    sizes              SIZES, and the file of the last evaluation (LAST_STEP)
    torchrun           two processes on gloo, in the place of 4 on GPUs, the first time that a page
                       calls a script in this way; later one process

So a flag that does not exist, or that another one forbids, fails; and so does a model, a length or
a column that does not fit.
"""

import contextlib
import glob
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chat_tokenizers import LLAMA, byte_tokenizer
from links import REPO, read_blocks
from support import ALL_SCRIPTS, jsonl, ranks
from tiny_models import encoder_tokenizer, save_encoder
from torch.distributed.run import parse_args as parse_torchrun
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

import probe
from nanorlhf.runtime import cli, distributed
from nanorlhf.sae import TopKSAE
from nanorlhf.sarm import SARM, save_sarm

pytestmark = pytest.mark.slow

HEADING = "## Recipe at scale"
STUDIES = ("overoptimisation", "cue_control", "feedback_patterns", "generalisation")
# The sizes of all scripts. A script is given those that it has a flag for.
SIZES = {
    "steps": 1,
    "batch_size": 4,
    "minibatch_size": 4,
    "ppo_epochs": 1,
    "eval_size": 4,
    "eval_every": 1,
    "n_answers": 2,
    "max_new_tokens": 4,
    "members": 2,
    "seeds": 2,
    "triples": 12,
    "top": 2,
    "draws": 1,
    "buffer_tokens": 64,
}
# These scripts need more: the answers of the best of 16, as many tokens as a step has.
OTHER_SIZES = {
    "sample_bon.py": {"n_answers": 16, "max_rows": 8, "batch_size": 64},
    "train_sae.py": {"batch_size": 32, "k": 4, "expansion": 2},
    "probe.py reward": {"eval_size": None},
}
# What a random language model as a judge ends with: by then all flags and files have been read.
NO_CHOICE = "no reply was a choice"
# eval/step_100.jsonl of a page is what one step leaves.
LAST_STEP = (r"/step_[1-9]\d*\.jsonl$", "/step_1.jsonl")


# ------------------------------------------------------------------------------- tiny stand-ins

# As many blocks as --layers highest:5 takes.
BLOCKS = 5
D = 16
SIZE = {
    "hidden_size": D,
    "intermediate_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
}
GROUPED = {**SIZE, "num_key_value_heads": 1}
NEO = {
    "hidden_size": D,
    "num_layers": BLOCKS,
    "num_heads": 2,
    "attention_types": [[["global", "local"], 2], [["global"], 1]],
}
# {name on the hub: (config's class, sizes, tokens of its context, whether it has a chat template)}
LANGUAGE_MODELS = {
    "EleutherAI/pythia-70m": (GPTNeoXConfig, SIZE, 2048, False),
    "EleutherAI/pythia-160m": (GPTNeoXConfig, SIZE, 2048, False),
    "EleutherAI/pythia-1.4b": (GPTNeoXConfig, SIZE, 2048, False),
    "EleutherAI/gpt-neo-125m": (GPTNeoConfig, NEO, 2048, False),
    "huggyllama/llama-7b": (LlamaConfig, SIZE, 2048, False),
    "meta-llama/Llama-3.1-8B-Instruct": (LlamaConfig, GROUPED, 131072, True),
    "Qwen/Qwen2.5-7B-Instruct": (Qwen2Config, GROUPED, 32768, True),
}
REWARD_MODELS = {
    "weqweasdas/RM-Mistral-7B": (MistralConfig, GROUPED, 32768, True),
    "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2": (LlamaConfig, GROUPED, 131072, True),
}
SARM_NAME = "Schrieffer/Llama-SARM-4B"
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def make_config(config_class, sizes, context, tokenizer, **more):
    """A config that fits the tokenizer; there are a few embeddings more, as in the real models."""
    return config_class(
        **sizes,
        **more,
        vocab_size=len(tokenizer) + 5,
        max_position_embeddings=context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def write_models():
    """All models that the recipes name, in folders of these names."""
    torch.manual_seed(0)
    for name, (config_class, sizes, context, is_chat) in LANGUAGE_MODELS.items():
        tokenizer = byte_tokenizer(template=LLAMA if is_chat else "")
        config = make_config(config_class, sizes, context, tokenizer)
        AutoModelForCausalLM.from_config(config).save_pretrained(name)
        tokenizer.save_pretrained(name)
    for name, (config_class, sizes, context, is_chat) in REWARD_MODELS.items():
        tokenizer = byte_tokenizer(template=LLAMA if is_chat else "")
        config = make_config(config_class, sizes, context, tokenizer, num_labels=1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(name)
        tokenizer.save_pretrained(name)
    write_sarm()
    words = encoder_tokenizer()
    bert = BertConfig(
        **SIZE, vocab_size=len(words), max_position_embeddings=520, pad_token_id=words.pad_token_id
    )
    save_encoder(BertModel(bert), ENCODER, words)


def write_sarm():
    """A SARM of half of a Llama's blocks, as the public one; most of its features fire often."""
    tokenizer = byte_tokenizer(template=LLAMA)
    config = make_config(LlamaConfig, GROUPED, 131072, tokenizer)
    lm = AutoModelForCausalLM.from_config(config)
    M = 32
    k = 16
    config.sarm_param = {
        "sae_source_layer": BLOCKS // 2,
        "sae_latent_size": M,
        "sae_k": k,
        "sarm_use_activation": True,
    }
    sae = TopKSAE(D, M, k, normalize="token", relu=False, seed=1)
    sarm = SARM(lm.base_model, sae, config)
    sarm.score.weight.data.normal_()
    save_sarm(sarm, tokenizer, SARM_NAME)


GOOD = "great lovely happy superb brave charming clever funny".split()
BAD = "awful dull cruel gloomy ugly tedious weak boring".split()
PLAIN = "film plot scene actor camera script music dialogue".split()


def write_data():
    """All data that the recipes name, in folders and files of these names."""
    texts = []
    for i in range(60):
        good = GOOD[i % 8]
        bad = BAD[(i + i // 8) % 8]
        plain = PLAIN[(i + i // 16) % 8]
        texts.append(f"I saw {i} of these last year, and here the {plain} is {good}, not {bad}.")
    lines = []
    for words, value in ((GOOD, 2.5), (PLAIN, 0.1), (BAD, -2.5)):
        lines += [f"{word}\t{value}\t0.5\t[1, 2]\n" for word in words]
    Path("vader_lexicon.txt").write_text("".join(lines))

    write_set("stanfordnlp/imdb", [{"text": text, "label": 0} for text in texts])
    alpaca = []
    for i, text in enumerate(texts):
        row = {"instruction": text, "input": "a b" * (i % 2), "output": "Yes.", "text": "?"}
        alpaca.append(row)
    write_set("tatsu-lab/alpaca", alpaca)

    posts = [f"SUBREDDIT: r/tifu\n\nTITLE: A\n\nPOST: {text}\n\nTL;DR:" for text in texts]
    summaries = [{"prompt": post, "completion": " A cat."} for post in posts]
    write_set("trl-lib/tldr", summaries[:40], validation=summaries[40:])
    pairs = [{"prompt": post, "chosen": " A cat.", "rejected": " A dog"} for post in posts]
    write_set("trl-lib/tldr-preference", pairs[:40], validation=pairs[40:])
    news = [{"article": text, "highlights": "A cat.", "id": text} for text in texts]
    write_set("abisee/cnn_dailymail", news, validation=news, config="3.0.0")

    write_set("PKU-Alignment/PKU-SafeRLHF-prompt", [{"prompt": text} for text in texts])
    people = [{"prompt": text, "messages": chat(text, "No."), "category": "QA"} for text in texts]
    write_set("HuggingFaceH4/no_robots", people)
    preferences = []
    for text in texts:
        preferences.append({"chosen": chat(text, "No."), "rejected": chat(text, "Yes")})
    write_set("Skywork/Skywork-Reward-Preference-80K-v0.2", preferences)
    write_set("allenai/reward-bench-2", [], test=list_questions(texts[:8], 1, subset="Safety"))
    questions = list_questions(texts[:8], 3, domain="safety-refuse")
    Path("total_dataset.json").write_text(json.dumps(questions))


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def list_questions(texts, n_chosen, **columns):
    """Rows of a benchmark: questions with right answers and three wrong ones."""
    rows = []
    for i, text in enumerate(texts):
        row = {"id": str(i), "prompt": text, "chosen": ["No."] * n_chosen, **columns}
        row["rejected"] = ["Yes.", "Yes", "Of course."]
        rows.append(row)
    return rows


def write_set(name, train, config="default", **others):
    """A data set as it is downloaded: a file for each split, and a page that names them."""
    os.makedirs(name)
    page = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, rows in {"train": train, **others}.items():
        if rows:
            jsonl(Path(name) / f"{split}.jsonl", rows)
            page += [f"  - split: {split}", f"    path: {split}.jsonl"]
    (Path(name) / "README.md").write_text("\n".join([*page, "---", ""]))


# ------------------------------------------------------------------------ the commands of a page

# What bash does with a command: it writes how many words it has, and the words.
PRELUDE = """
set -f
show() { printf '%s\\0' "$#" "$@"; }
python() { show python "$@"; }
torchrun() { show torchrun "$@"; }
"""


def read_section(study):
    """The recipe on a study's page, as text."""
    text = (REPO / "nanorlhf" / "studies" / f"{study}.md").read_text()
    _, _, recipe = text.partition(f"\n{HEADING}\n")
    recipe, _, _ = recipe.partition("\n## ")
    return recipe


def read_recipe(study):
    """A page's recipe -> its commands as lists of words, and its files {name: text}."""
    recipe = read_section(study)
    script = [PRELUDE]
    files = {}
    for block in read_blocks(recipe):
        if block.language == "bash":
            script += block.lines
        elif block.language == "python":
            files[block.lines[0].removeprefix("# ")] = "\n".join(block.lines)
    done = subprocess.run(
        ["bash", "-ec", "\n".join(script)], capture_output=True, text=True, check=True
    )
    assert not done.stderr
    commands = []
    words = iter(done.stdout.split("\0")[:-1])
    for count in words:
        commands.append([next(words) for _ in range(int(count))])
    return commands, files


def expand(words):
    """What a shell makes of * once the files are there; and the step of the last evaluation."""
    expanded = []
    for word in words:
        word = re.sub(*LAST_STEP, word)
        expanded += sorted(glob.glob(word)) or [word] if "*" in word else [word]
    return expanded


def size_flags(name, config_class, words):
    """The flags that make a script's run a small one: the last of two equal flags holds."""
    values = vars(cli.Parser(name, "", config_class).parse_args(words))
    sizes = {**SIZES, **OTHER_SIZES.get(name, {})}
    flags = []
    for flag, size in sizes.items():
        # 0 often means "all".
        if flag in values and size and (not values[flag] or values[flag] > size):
            flags += [f"--{flag}", str(size)]
    return flags


def run_script(folder, name, words):
    """A script's command in a folder, with small sizes, in this process."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        command = ""
        title = name
        if name == "probe.py":
            command, *words = words
            title = f"{name} {command}"
            config_class, main = probe.COMMANDS[command]
        else:
            script = {f"{module.__name__}.py": module for module in ALL_SCRIPTS.values()}[name]
            config_class, main = script.Config, script.main
        words = [*words, *size_flags(title, config_class, words)]
        try:
            main(cli.parse(config_class, words, command, ""))
        finally:
            distributed.shutdown()


def run_command(folder, command, ran, monkeypatch):
    """One command of a page, with tiny sizes. ran: the scripts that two processes have run."""
    tool, *words = command
    if tool == "torchrun":
        options = parse_torchrun(words)
        script = options.training_script
        words = [script, *options.training_script_args]
        if script not in ran:
            ran.add(script)
            run_in_two(folder, script, expand(words[1:]))
            return
    if words[0] == "-m":
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0].endswith(".py") and Path(words[0]).exists():
        runpy.run_path(words[0], run_name="__main__")
    else:
        run_script(folder, words[0], expand(words[1:]))


def run_in_two(folder, name, words):
    """A script's command as torchrun starts it, in two processes."""
    errors = folder / "errors"
    cache = str(folder / "cache")
    processes = ranks(
        2, run_script, folder, name, words, STDERR=str(errors), HF_DATASETS_CACHE=cache
    )
    for process in processes:
        process.join(300)
    if any(process.exitcode for process in processes):
        raise AssertionError(Path(f"{errors}_0").read_text())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder in which the names of models and data sets on the hub are folders."""
    folder = tmp_path_factory.mktemp("hub")
    with contextlib.chdir(folder):
        write_models()
        write_data()
    return folder


@pytest.mark.parametrize("study", STUDIES)
def test_a_recipe_runs_as_it_stands_on_its_page(study, hub, monkeypatch):
    import datasets

    monkeypatch.chdir(hub)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub / "cache")
    commands, files = read_recipe(study)
    assert len(commands) > 8
    ran = set()
    for name, text in files.items():
        Path(name).write_text(text)
    for command in commands:
        try:
            run_command(hub, command, ran, monkeypatch)
        except (Exception, SystemExit) as error:
            if NO_CHOICE in str(error):
                continue
            raise AssertionError(f"{study}.md: {shlex.join(command)}\n{error}") from error


@pytest.mark.parametrize("study", STUDIES)
def test_memory_on_a_page_is_that_of_the_formula(study):
    bench = REPO / "tests" / "bench" / "memory.py"
    done = subprocess.run(
        [sys.executable, bench, "--recipes"], capture_output=True, text=True, check=True
    )
    _, _, section = read_section(study).partition("**Memory**")
    memory, _, _ = section.partition("**Hours")
    for row in json.loads(done.stdout)["rows"]:
        if row["model"] == study:
            assert str(row["peak"]) in memory
            fits = row["fits_80_gb"]
            assert fits or "needs more than 80 GB" in memory

"""Bad input, as real broken files: exit code 2, one line that says what and where, nothing changed.

A run that goes wrong later, by numbers that are not finite, exits with code 1, names its step, and
keeps its last good checkpoint. So does one whose disk fails.
"""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import (
    BAD_REWARDS,
    ENV,
    GOOD_ROWS,
    REPO,
    SCRIPTS,
    arguments,
    content,
    fails,
    free_port,
    refused,
    write_rows,
)

import train_rm
import train_sae
import train_sft
from nanorlhf.errors import InputError
from nanorlhf.models import Policy, load_policy
from nanorlhf.runtime import checkpoint, cli, distributed, log
from nanorlhf.runtime.optim import adamw


def run(kind, args):
    cli.run(SCRIPTS[kind].Config, SCRIPTS[kind].main, args)


def refuses_flags(capfd, kind, flags, words):
    """A good command with these flags added is refused.

    words: parts of the one line of stderr, with " ... " between them.
    """
    refused(capfd, kind, arguments(kind) + flags.split(), *words.split(" ... "))


def refuses_file(capfd, kind, flag, value, words):
    """A good command with another file, folder or function is refused; words as above."""
    refused(capfd, kind, arguments(kind, **{flag: value}), *words.split(" ... "))


@pytest.mark.parametrize("kind", SCRIPTS)
def test_the_good_material_is_good(here, kind):
    """Else the tests below could pass for the wrong reason."""
    run(kind, arguments(kind))
    assert (here / "out/summary.json").exists()


# ------------------------------------------------------------------------------------ command lines


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize(
    "flags, words",
    [
        ("--nonsense 3", "--nonsense"),
        ("--steps two", "--steps ... two"),
        ("--steps 0", "--steps must be at least 1, not 0"),
        ("--lr -1", "--lr must be at least 0"),
        ("--lr nan", "--lr"),
        ("--dtype float16", "--dtype must be one of float32, bfloat16 ... 'float16'"),
        ("--schedule step", "--schedule must be one of constant, linear, cosine"),
        ("--freeze_layers 1.5", "--freeze_layers"),
        ("--betas 0.9", "--betas takes two numbers"),
        ("--columns prompt", "--columns takes FIELD=COLUMN"),
        (
            "--columns question=prompt",
            "--columns names question ... the fields here are prompt",
        ),
        ("--dataset world:x", "world:x ... whole number"),
        (
            "--eval_splits test validation",
            "--eval_splits takes test, ood and NAME=FILE ... 'validation'",
        ),
        ("--eval_splits test other=missing.jsonl", "missing.jsonl: no such file"),
        ("--eval_splits test ood", "--eval_splits ood needs --in_distribution"),
        ("--in_distribution nowhere=a", ".jsonl:1: no field 'nowhere'"),
        (
            "--in_distribution words:prompt>9",
            ".jsonl: no row is in distribution ... words:prompt>9",
        ),
        (
            "--in_distribution words:prompt<9 --eval_splits test ood",
            ".jsonl: no held-out row is out of distribution",
        ),
        (
            "--in_distribution rewards.py:number",
            "rewards.py: it defines no function 'number'",
        ),
        ("--prompt_format tldr", ".jsonl:1: no field 'subreddit'"),
        ("--prompt_format xsum", "--prompt_format must be one of tldr, cnn_dm"),
    ],
)
def test_bad_flags_of_all_scripts(here, capfd, kind, flags, words):
    refuses_flags(capfd, kind, flags, words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--kl_kind k4", "--kl_kind must be one of k1, k2, k3, full"),
        ("--kl_in loss", "--kl_in loss ... k1"),
        ("--kl_target 5 --kl_coef 0", "--kl_target"),
        ("--batch_size 6 --group_size 4", "--batch_size 6 is not a multiple of --group_size (4)"),
        (
            "--advantage grpo --group_size 2 --lam 1 --vf_coef 0.1",
            "--advantage grpo has no value function ... --vf_coef, --lam",
        ),
        ("--temperature 0", "--temperature must be positive"),
        ("--score_scaling std", "--score_scaling must be one of"),
        ("--max_new_tokens 0", "--max_new_tokens must be at least 1"),
        ("--batch_size 7", "--batch_size 7 is not a multiple of --minibatch_size (2)"),
    ],
)
def test_bad_flags_of_ppo(here, capfd, flags, words):
    refuses_flags(capfd, "ppo", flags, words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--objective median", "--objective must be one of mean, wco, uwo ... 'median'"),
        ("--uwo_lambda -0.1", "--uwo_lambda must be at least 0, not -0.1"),
        ("--uwo_lambda nan", "--uwo_lambda"),
        ("--reward_model", "--reward_model"),
        (
            "--reward_model rewards.py:good words.tsv rewards.py:good",
            "--reward_model names rewards.py:good twice",
        ),
        (
            "--reward_model rm/seed_{seed}",
            "rm/seed_{seed}: no such folder for any seed ... train_rm.py --members",
        ),
        (
            "--reward_model rewards.py:good ./nothing/here",
            "./nothing/here: no such model folder",
        ),
        ("--reward_model rewards.py:good nowhere.tsv", "nowhere.tsv: no such file"),
        # A policy has no score head.
        ("--reward_model rewards.py:good model", "model ... score.weight"),
    ],
)
def test_bad_flags_of_ensembles(here, capfd, flags, words):
    refuses_flags(capfd, "ppo", flags, words)


@pytest.mark.parametrize(
    "member, words",
    [
        ("rewards.py:nan", "rewards.py:nan returned nan"),
        ("rewards.py:raises", "rewards.py:raises raised KeyError"),
    ],
)
def test_one_bad_member_of_an_ensemble(here, capfd, member, words):
    """The second of two fails on the first samples; nothing is written."""
    refuses_flags(capfd, "ppo", f"--reward_model rewards.py:good {member}", words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--members 2", "--members needs {seed} in --output_dir"),
        ("--members 0", "--members must be at least 1, not 0"),
        ("--members two", "--members ... two"),
        ("--independent_noise", "--independent_noise is for --members"),
        ("--members 1 --independent_noise", "--independent_noise is for --members"),
        ("--label_noise 1.2", "--label_noise is a probability"),
    ],
)
def test_bad_flags_of_reward_models(here, capfd, flags, words):
    refuses_flags(capfd, "rm", flags, words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--steps 3", "--steps"),
        ("--lr 1e-3 --betas 0.9 0.99 --compile", "--compile, --lr, --betas"),
        ("--lora_rank 2 --merge", "--lora_rank, --merge"),
        ("--label_noise 0.1 --score_l2 0.1", "--label_noise, --score_l2"),
        ("--sarm_mode frozen", "--sarm_mode"),
        ("--checkpoint_every 1", "--checkpoint_every"),
    ],
)
def test_flags_of_a_training_without_one(here, capfd, flags, words):
    """--average does not read them, so it refuses them before it looks for its models."""
    args = f"--average one two --output_dir out {flags}".split()
    refused(capfd, "rm", args, f"--average trains nothing, so nothing reads {words}")


def test_flags_that_an_average_reads():
    """Every flag of train_rm.py is one of these, or --average refuses it."""
    read = {"average": ["one", "two"], "output_dir": "out", "resume": True, "seed": 1}
    read |= {"dataset": "pairs.jsonl", "columns": ["prompt=q"], "special_in_text": True}
    read |= {"chat_template": True, "in_distribution": "a=b", "prompt_format": "tldr"}
    read |= {"eval_dataset": "more.jsonl", "eval_size": 3, "eval_splits": ["test", "ood"]}
    read |= {"max_rows": 5, "max_length": 9, "gold_model": "the.py:gold", "dtype": "bfloat16"}
    read |= {"micro_batch_size": 3, "tokens_per_micro_batch": 9, "distributed": "fsdp"}
    read |= {"device": "cpu"}
    train_rm.Config(**read)
    # Their own errors are in test_weight_averages.py.
    names = {flag.name for flag in fields(train_rm.Config)}
    assert names == read.keys() | set(train_rm.NOT_FOR_AVERAGE)


def test_a_member_whose_folder_holds_another_run(here, capfd):
    run("rm", arguments("rm", output_dir="rm/seed_{seed}", seed=1))
    before = content("rm/seed_1")
    args = arguments("rm", output_dir="rm/seed_{seed}", members=2, lr=0.5)
    fails(capfd, "rm", args, "rm/seed_1 already holds another run", "differs in lr", lines=None)
    assert content("rm/seed_1") == before


@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_a_length_without_room_for_a_response(here, capfd, kind):
    refuses_flags(capfd, kind, "--max_length 1", "--max_length must leave room")


@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_a_length_beyond_the_context(here, capfd, kind):
    """Learned positions have no embedding there, and rotary ones were never trained there."""
    context = json.loads(Path("model/config.json").read_text())["max_position_embeddings"]
    words = f"--max_length {context + 1} is above the model's context of {context} tokens"
    refuses_flags(capfd, kind, f"--max_length {context + 1}", words)


@pytest.mark.parametrize(
    "flags, words", [("--betas 1.5 0.9", "--betas"), ("--device banana", "--device")]
)
def test_bad_values_that_torch_would_refuse(here, capfd, flags, words):
    refuses_flags(capfd, "sft", flags, words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_cuda_here(here, capfd):
    refuses_flags(capfd, "sft", "--device cuda", "--device cuda ... no CUDA device")


# --------------------------------------------------------------------------------------------- data

# Each of these makes a bad row of a good one: a string is the line as it stands in the file.


def cut_off(row):
    return '{"prompt": "a"'


def list_of_numbers(row):
    return "[1, 2]"


def text(row):
    return '"text"'


def without_prompt(row):
    return {"text": "a"}


def last_field_missing(row):
    changed = dict(row)
    changed.popitem()
    return changed


def last_field_a_number(row):
    last = list(row)[-1]
    return {**row, last: 5}


def last_field_null(row):
    last = list(row)[-1]
    return {**row, last: None}


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize(
    "spoil, words",
    [
        (cut_off, "not JSON"),
        (list_of_numbers, "a row must be an object with prompt"),
        (text, "a row must be an object with prompt"),
        (without_prompt, "no field 'prompt' ... --columns"),
        (last_field_missing, "no field"),
        (last_field_a_number, "must be a string, not int"),
        (last_field_null, "must be a string, not NoneType"),
    ],
)
def test_a_bad_row(here, capfd, kind, spoil, words):
    """The third row of the training data, or of the held-out data."""
    rows = GOOD_ROWS[kind]
    bad = spoil(rows[0])
    write_rows(here / "bad.jsonl", [*rows[:2], bad, *rows[2:]])
    refuses_file(capfd, kind, "dataset", "bad.jsonl", f"bad.jsonl:3 ... {words}")
    write_rows(here / "bad.jsonl", [*rows[:2], bad])
    refuses_file(capfd, kind, "eval_dataset", "bad.jsonl", f"bad.jsonl:3 ... {words}")


@pytest.mark.parametrize("before", ["\n\n", '{"prompt": "a", "response": "b"}\n\n'])
def test_a_bad_line_after_blank_ones(here, capfd, before):
    (here / "bad.jsonl").write_text(before + "{oops\n")
    refuses_file(capfd, "sft", "dataset", "bad.jsonl", "bad.jsonl:3: not JSON")


@pytest.mark.parametrize(
    "name, file_content, words",
    [
        ("empty.jsonl", b"", "the file is empty"),
        ("blank.jsonl", b"\n  \n", "the file is empty"),
        (
            "object.json",
            b'{"prompt": "a", "response": "b"}',
            "object.json: 1 different prompts are too few",
        ),
        ("none.json", b"[]", "no rows"),
        ("latin.jsonl", b'{"prompt": "caf\xe9", "response": "x"}\n', ":1: not UTF-8"),
        ("broken.json", b'[\n{"prompt": "a"},\n{oops}\n]', ":3: not JSON"),
        ("not.jsonl.gz", b"this is not gzip", "cannot be read"),
        (
            "one.jsonl",
            b'{"prompt": "a", "response": "b"}\n' * 20,
            "1 different prompts are too few",
        ),
    ],
)
def test_a_bad_file(here, capfd, name, file_content, words):
    (here / name).write_bytes(file_content)
    refuses_file(capfd, "sft", "dataset", name, f"{name} ... {words}")


def test_a_missing_file(here, capfd):
    refuses_file(capfd, "sft", "dataset", "missing.jsonl", "missing.jsonl: no such file")


def test_a_prompt_longer_than_the_context(here, capfd):
    long = {"prompt": "review the hotel " + "very " * 120}
    write_rows(here / "long.jsonl", [*GOOD_ROWS["ppo"], long])
    sizes = "a prompt of 123 tokens and 6 new ones are longer than the model's context of 128"
    words = f"{sizes} ... --max_prompt_length ... review the hotel"
    refuses_file(capfd, "ppo", "dataset", "long.jsonl", words)
    # The advice helps.
    run("ppo", arguments("ppo", dataset="long.jsonl", max_prompt_length=20))
    assert Path("out/summary.json").exists()


def test_an_empty_prompt(here, capfd):
    write_rows(here / "bad.jsonl", [*GOOD_ROWS["ppo"], {"prompt": " "}])
    refuses_file(capfd, "ppo", "dataset", "bad.jsonl", "empty prompt")


# ------------------------------------------------------------------------------------------- models

# Each of these damages the folder model/ in its own way.


def remove_eos():
    path = Path("model/tokenizer_config.json")
    settings = json.loads(path.read_text())
    assert settings.pop("eos_token") == "<eos>"
    path.write_text(json.dumps(settings))


def remove_weights():
    os.remove("model/model.safetensors")


def leave_a_pickle():
    """Under a pickle's name weights are never read."""
    os.rename("model/model.safetensors", "model/pytorch_model.bin")


def remove_config():
    os.remove("model/config.json")


def break_config():
    Path("model/config.json").write_text("{oops")


def cut_weights():
    path = Path("model/model.safetensors")
    path.write_bytes(path.read_bytes()[:1000])


def remove_tokenizer():
    for path in Path("model").glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize(
    "damage, words",
    [
        (remove_eos, "model: the tokenizer has no EOS token"),
        (remove_weights, "model: no weights (*.safetensors)"),
        (leave_a_pickle, "model: no weights (*.safetensors)"),
        (remove_config, "model: a folder without config.json is no model"),
        (break_config, "model: "),
        (cut_weights, "model/model.safetensors: cannot be read"),
        (remove_tokenizer, "model:  ... tokenizer"),
    ],
)
def test_a_bad_model(here, capfd, kind, damage, words):
    damage()
    refuses_file(capfd, kind, "model", "model", words)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_missing_model(here, capfd, kind):
    """Some scripts look for its tokenizer first: no such model folder, or no tokenizer."""
    refuses_file(capfd, kind, "model", "./nothing/here", "./nothing/here: no")


@pytest.mark.parametrize("flag", ["reward_model", "gold_model", "value_model"])
def test_a_bad_model_beside_the_policy(here, capfd, flag):
    shutil.copytree("model", "no_weights")
    os.remove("no_weights/model.safetensors")
    refuses_file(capfd, "ppo", flag, "./no_weights", "no_weights")
    refuses_file(capfd, "ppo", flag, "./nothing/here", "./nothing/here")


def test_a_value_model_of_another_tokenizer(here, capfd):
    """It has as many tokens, but reads other words in them. One without a tokenizer is taken."""
    shutil.copytree("model", "value")
    file = Path("value/tokenizer.json")
    content_of_file = json.loads(file.read_text())
    vocabulary = content_of_file["model"]["vocab"]
    first, second, *_ = sorted(vocabulary, key=vocabulary.get, reverse=True)
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content_of_file))
    refuses_file(capfd, "ppo", "value_model", "value", "value: its tokenizer is not the policy's")
    for name in os.listdir("value"):
        if name.startswith("tokenizer"):
            os.remove(f"value/{name}")
    run("ppo", arguments("ppo", value_model="value"))


# ------------------------------------------------------------------------------------------ rewards

BAD_FILES = {
    "broken.py": b"def good(:\n",
    "fails.py": b"1 / 0\n",
    "empty.tsv": b"\n",
    "latin.tsv": b"caf\xe9\t2\n",
    "spaces.tsv": b"good\t3\n\nbad -3\n",
    "words.txt": b"good\t3\nnice\tlots\n",
}


@pytest.mark.parametrize("flag", ["reward_model", "gold_model"])
@pytest.mark.parametrize(
    "reward, words",
    [
        ("nowhere.py:good", "nowhere.py: no such file"),
        ("rewards.py:missing", "rewards.py: it defines no function 'missing'"),
        ("rewards.py:number", "rewards.py: it defines no function 'number'"),
        ("broken.py:good", "broken.py: cannot be imported: SyntaxError"),
        ("fails.py:good", "fails.py: cannot be imported: ZeroDivisionError"),
        ("nowhere.tsv", "nowhere.tsv: no such file"),
        ("empty.tsv", "empty.tsv: the lexicon is empty"),
        ("spaces.tsv", "spaces.tsv:3: not WORD<TAB>VALUE ... bad -3"),
        ("words.txt", "words.txt:2: not WORD<TAB>VALUE ... lots"),
        ("latin.tsv", "latin.tsv: not UTF-8 ... byte 3"),
    ],
)
def test_a_bad_reward(here, capfd, flag, reward, words):
    for name, file_content in BAD_FILES.items():
        (here / name).write_bytes(file_content)
    refuses_file(capfd, "ppo", flag, reward, words)


@pytest.mark.parametrize(
    "function, words",
    [
        ("raises", "rewards.py:raises raised KeyError ... no such word"),
        pytest.param("nan", "rewards.py:nan returned nan for the response", marks=pytest.mark.slow),
        pytest.param("infinite", "rewards.py:infinite returned -inf", marks=pytest.mark.slow),
        ("short", "rewards.py:short returned 2 scores for 3 responses"),
        pytest.param(
            "texts",
            "rewards.py:texts must return one float for each response ... is of type str",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "none",
            "rewards.py:none must return one float for each response ... NoneType",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_reward_that_goes_wrong_when_it_is_called(here, capfd, function, words):
    """It is first called on the samples of step 0, when next to nothing is written.

    What was there is not touched, and the mended function runs in the same folder.
    """
    args = arguments("ppo", reward_model=f"rewards.py:{function}")
    before = content()
    fails(capfd, "ppo", args, *words.split(" ... "))
    after = content()
    for name in before:
        assert after[name] == before[name], name
    assert not Path("out/model").exists()
    log = Path("out/metrics.jsonl")
    assert not log.exists() or log.read_text() == ""

    (here / "rewards.py").write_text(BAD_REWARDS + f"\n{function} = good\n")
    run("ppo", args)
    assert Path("out/summary.json").exists()


EXITS_AT_THE_THIRD_CALL = """
calls = 0
def exits(prompts, responses):
    global calls
    calls += 1
    if calls > 2: raise SystemExit(0)
    return [1.0] * len(responses)
"""


def steps_of_checkpoints():
    return [step for step, _ in checkpoint.checkpoints("out")]


def test_a_reward_that_ends_the_process_later(here, capfd):
    """Its exit code 0 would look like success: it is 2, with one line, and the checkpoint stays."""
    Path("exits.py").write_text(EXITS_AT_THE_THIRD_CALL)
    args = arguments("ppo", reward_model="exits.py:exits", checkpoint_every=1, steps=3)
    fails(capfd, "ppo", args, "the reward exits.py:exits raised SystemExit: 0", lines=None)
    assert not Path("out/summary.json").exists()
    assert steps_of_checkpoints() == [1]


def test_a_bad_gold_reward_of_a_reward_model(here, capfd):
    refuses_file(capfd, "rm", "gold_model", "nowhere.py:gold", "nowhere.py: no such file")


# ----------------------------------------------------------------------------------- output folders


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_file_as_the_output_folder(here, capfd, kind):
    Path("out").write_text("a file")
    refused(capfd, kind, arguments(kind), "out: the output folder is a file")


@pytest.mark.parametrize("kind", SCRIPTS)
def test_somebody_s_folder_as_the_output_folder(here, capfd, kind):
    Path("out/notes").mkdir(parents=True)
    refused(capfd, kind, arguments(kind), "out is not empty and holds no run")


@pytest.mark.parametrize("kind, other_kind", [("sft", "rm"), ("rm", "sft"), ("ppo", "sft")])
def test_another_run_in_the_output_folder(here, capfd, kind, other_kind):
    """It differs in a setting, or is another script's. A folder that is empty is welcome."""
    Path("out").mkdir()
    run(kind, arguments(kind))
    for flag in ("seed", "steps"):
        words = f"out already holds another run ... differs in {flag}"
        refuses_flags(capfd, kind, f"--{flag} 7", words)
    refused(capfd, other_kind, arguments(other_kind), "out already holds another run")


def test_a_broken_config_in_the_output_folder(here, capfd):
    Path("out").mkdir()
    Path("out/config.json").write_text('{"steps": ')
    refused(capfd, "sft", arguments("sft"), "out/config.json")


def test_a_broken_summary_does_not_cost_the_checkpoints(here, capfd):
    """A run that is done needs none; whether this one is done nobody can say."""
    run("sft", arguments("sft"))
    Path("out/checkpoint/step_1").mkdir(parents=True)
    Path("out/summary.json").write_text('{"steps": ')
    refused(capfd, "sft", arguments("sft"), "out/summary.json")
    assert Path("out/checkpoint/step_1").exists()


# ----------------------------------------------------------------------------------- real processes


def start(kind, args, **env):
    """A script as a user starts it."""
    return subprocess.Popen(
        [sys.executable, REPO / f"train_{kind}.py", *args],
        env={**ENV, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_error(process):
    """The one line that a process says before it exits with code 2."""
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert len(error.splitlines()) == 1, error
    return error


# It parses the script's own command line when it is imported.
PARSES = """
import argparse
argparse.ArgumentParser().parse_args()
def f(prompts, responses): return [1.0] * len(responses)
"""


@pytest.mark.slow
def test_real_processes(here):
    """The exit code and the one line, as the shell sees them; four scripts at a time."""
    write_rows(here / "bad.jsonl", [*GOOD_ROWS["rm"], {"prompt": "a", "chosen": "b"}])
    shutil.copytree("model", "weightless")
    os.remove("weightless/model.safetensors")
    (here / "parses.py").write_text(PARSES)
    before = content()

    # Each has an output folder of its own: else one might find another one working there.
    parses = start("ppo", arguments("ppo", reward_model="parses.py:f", output_dir="out_1"))
    nonsense = start("sft", [*arguments("sft", output_dir="out_2"), "--nonsense"])
    bad_row = start("rm", arguments("rm", dataset="bad.jsonl", output_dir="out_3"))
    weightless = start("ppo", arguments("ppo", model="weightless", output_dir="out_4"))

    error = wait_for_error(parses)
    assert error.startswith("train_ppo.py: error: ")
    assert "parses.py: cannot be imported: SystemExit" in error
    error = wait_for_error(nonsense)
    assert error.startswith("train_sft.py: error: ")
    assert "--nonsense" in error
    error = wait_for_error(bad_row)
    assert error.startswith("train_rm.py: error: ")
    assert "bad.jsonl:17: no field 'rejected'" in error
    error = wait_for_error(weightless)
    assert error.startswith("train_ppo.py: error: ")
    assert "weightless: no weights" in error
    assert content() == before


def start_rank(rank, port, kind, args):
    """One of two processes with torchrun's environment."""
    ranks = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    return start(kind, args, **ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def unused_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        _, port = s.getsockname()
        return str(port)


@pytest.mark.slow
def test_a_batch_that_the_processes_cannot_share(here):
    """Rank 0 says so in one line; the other one says no more than that."""
    before = content()
    port = unused_port()
    args = arguments("sft", batch_size=7)
    first = start_rank(0, port, "sft", args)
    second = start_rank(1, port, "sft", args)

    error = wait_for_error(first)
    assert "--batch_size 7 is not a multiple of the number of processes (2)" in error
    _, silence = second.communicate(timeout=120)
    assert second.returncode == 2
    assert len(silence.splitlines()) <= 1
    assert content() == before


LOST = "do not find each other"


# What torchrun would set, and what stands in the error.
@pytest.mark.parametrize(
    "settings, words",
    [
        ("WORLD_SIZE=two", "WORLD_SIZE ... 'two'"),
        ("WORLD_SIZE=", "WORLD_SIZE ... ''"),
        ("WORLD_SIZE=1e3", "WORLD_SIZE ... '1e3'"),
        pytest.param("WORLD_SIZE=" + "9" * 5000, "WORLD_SIZE", id="5000 digits"),
        ("WORLD_SIZE=0", "RANK 0 ... WORLD_SIZE 0"),
        ("RANK=-1", "RANK ... '-1'"),
        ("RANK=1", "RANK 1 ... WORLD_SIZE 1"),
        ("LOCAL_RANK=0.5", "LOCAL_RANK ... '0.5'"),
        ("LOCAL_RANK=3", "LOCAL_RANK 3 ... WORLD_SIZE 1"),
        # Two processes that do not know enough of each other.
        ("WORLD_SIZE=2", f"{LOST} ... RANK expected"),
        ("WORLD_SIZE=2 RANK=0", f"{LOST} ... MASTER_ADDR"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1", f"{LOST} ... MASTER_PORT"),
        (
            "WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=x",
            f"{LOST} ... MASTER_PORT=x",
        ),
        (
            "WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=99999",
            f"{LOST} ... MASTER_PORT=99999",
        ),
        # The other process never comes.
        pytest.param(
            "WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=FREE",
            f"{LOST} ... 1/2 clients joined",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "WORLD_SIZE=2 RANK=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=FREE",
            LOST,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "WORLD_SIZE=2 RANK=1 MASTER_ADDR=nowhere.invalid MASTER_PORT=FREE",
            f"{LOST} ... nowhere.invalid",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "WORLD_SIZE=2 RANK=0 MASTER_ADDR=nowhere.invalid MASTER_PORT=FREE",
            f"{LOST} ... nowhere.invalid",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_bad_environment_of_torchrun(here, capfd, monkeypatch, settings, words):
    """One line, also where torch has a page to say about each of its tries."""
    monkeypatch.setattr(distributed, "MEETING_SECONDS", 0.1)
    # A process of several waits a second before it ends.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for setting in settings.replace("FREE", str(free_port())).split():
        name, value = setting.split("=")
        monkeypatch.setenv(name, value)
    refused(capfd, "sft", arguments("sft"), *words.split(" ... "))


@pytest.mark.slow
def test_a_process_whose_other_one_never_comes(here):
    """Within a minute of the start, or twice that on a busy machine."""
    process = start_rank(0, str(free_port()), "sft", arguments("sft"))
    assert LOST in wait_for_error(process)


# ---------------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_learning_rate_that_explodes(here, capfd, kind):
    settings = {"lr": 1e30, "warmup": 0, "steps": 5, "checkpoint_every": 1}
    if kind == "ppo":
        # One optimizer step for each rollout.
        settings["minibatch_size"] = 4
    fails(capfd, kind, arguments(kind, **settings), "step 2: ", "--lr", code=1, lines=None)

    assert not Path("out/model").exists()
    assert steps_of_checkpoints() == [1]
    tensors = load_file("out/checkpoint/step_1/state.safetensors")
    assert len(tensors) > 100
    for name, tensor in tensors.items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES])
def test_a_disk_that_fails_keeps_the_last_good_checkpoint(here, capfd, monkeypatch, number):
    """A network disk may go, and a damaged one can be read only: neither is a bug of ours."""
    append_lines = log.append_lines

    def append_once(path, rows):
        if steps_of_checkpoints():
            raise OSError(number, os.strerror(number), path)
        append_lines(path, rows)

    monkeypatch.setattr(log, "append_lines", append_once)
    words = ("cannot be read or written", os.strerror(number), "out/", "is kept")
    fails(capfd, "sft", arguments("sft", checkpoint_every=1), *words, code=1, lines=None)
    assert steps_of_checkpoints() == [1]


def test_a_run_whose_folder_is_removed_ends_in_one_line(here, capfd, monkeypatch):
    append_lines = log.append_lines

    def remove_first(path, rows):
        shutil.rmtree("out")
        append_lines(path, rows)

    monkeypatch.setattr(log, "append_lines", remove_first)
    words = ("is gone", os.strerror(errno.ENOENT), "out/metrics.jsonl")
    fails(capfd, "sft", arguments("sft"), *words, code=1, lines=None)


def test_a_command_in_a_folder_that_is_removed_ends_in_one_line(here, capfd, monkeypatch):
    os.mkdir("removed")
    monkeypatch.chdir("removed")
    os.rmdir(here / "removed")
    fails(capfd, "sft", arguments("sft"), "is gone", code=1)


@pytest.mark.slow
def test_an_infinite_loss_keeps_the_last_good_checkpoint(here, capfd):
    """Evaluation, two steps, then scores of 1e38: the third step fails.

    The second one's checkpoint is whole, and with a better reward the run goes on from it.
    """
    args = arguments("ppo", reward_model="rewards.py:huge_later", steps=5, checkpoint_every=1)
    fails(capfd, "ppo", args, "step 3: ", code=1, lines=None)
    assert steps_of_checkpoints() == [1, 2]
    rows = Path("out/metrics.jsonl").read_text().splitlines()
    assert len(rows) == 3  # steps 0, 1, 2

    policy = load_policy("model")
    optimizer = adamw(policy, 1e-3, (0.9, 0.95), 0.0)
    untrained_head = policy.value_head.weight.clone()
    assert checkpoint.load("out", policy, optimizer)["step"] == 2
    for name, p in policy.named_parameters():
        assert p.isfinite().all(), name
    assert not policy.value_head.weight.equal(untrained_head)

    # The reward is mended. Whoever wants to go on with other content has to say so.
    (here / "rewards.py").write_text(BAD_REWARDS + "\nhuge_later = good\n")
    resume = ["--output_dir", "out", "--resume"]
    advice = "delete its entry in out/config.json"
    fails(capfd, "ppo", resume, "rewards.py has changed", advice, lines=None)
    stored = json.loads(Path("out/config.json").read_text())
    del stored["inputs"]["rewards.py"]
    Path("out/config.json").write_text(json.dumps(stored))
    run("ppo", resume)
    assert json.loads(Path("out/summary.json").read_text())["steps"] == 5


def test_a_memory_that_is_too_small(here, capfd, monkeypatch):
    """What torch really says of a petabyte is one line; nothing stands in a smaller run's way."""

    def ask_for_a_petabyte(*args):
        return torch.empty(2**50)

    monkeypatch.setattr(train_sft, "load_splits", ask_for_a_petabyte)
    fails(capfd, "sft", arguments("sft"), "not enough memory", code=1)
    assert not Path("out").exists()


@pytest.mark.parametrize("expansion", ["1e300", "1e12", "0", "-1"])
def test_more_features_than_a_machine_holds(expansion):
    with pytest.raises(InputError, match="--expansion"):
        cli.parse(train_sae.Config, ["--expansion", expansion])


def test_a_reward_that_is_too_large_at_once(here, capfd):
    args = arguments("ppo", reward_model="rewards.py:huge")
    fails(capfd, "ppo", args, "step 1: ", code=1, lines=None)
    # The model that it started from is whole.
    assert isinstance(load_policy("model"), Policy)

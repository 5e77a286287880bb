"""Bad input, as real broken files: exit code 2, one line on stderr that says what and where, and not a byte changed on disk.

A run that goes wrong later, by numbers that are not finite, exits with code 1, names its step, and keeps its last good checkpoint.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
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

import train_ppo
import train_rm
import train_sae
import train_sft
from nanorlhf.errors import InputError
from nanorlhf.models import Policy, load_policy
from nanorlhf.runtime import checkpoint, cli, distributed
from nanorlhf.runtime.optim import adamw


def test_the_good_material_is_good(here):
    for kind in SCRIPTS:  # else the tests below could pass for the wrong reason
        cli.run(SCRIPTS[kind].Config, SCRIPTS[kind].main, arguments(kind, output_dir=f"out_{kind}"))
        assert (here / f"out_{kind}/summary.json").exists()


# ----------------------------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("args, words", [
    (["--nonsense", "3"], ["--nonsense"]),
    (["--steps", "two"], ["--steps", "two"]),
    (["--steps", "0"], ["--steps must be at least 1, not 0"]),
    (["--lr", "-1"], ["--lr must be at least 0"]),
    (["--lr", "nan"], ["--lr"]),
    (["--dtype", "float16"], ["--dtype must be one of float32, bfloat16", "'float16'"]),
    (["--schedule", "step"], ["--schedule must be one of constant, linear, cosine"]),
    (["--freeze_layers", "1.5"], ["--freeze_layers"]),
    (["--betas", "0.9"], ["--betas takes two numbers"]),
    (["--columns", "prompt"], ["--columns takes FIELD=COLUMN"]),
    (["--columns", "question=prompt"], ["--columns names question", "the fields here are prompt"]),
    (["--dataset", "world:x"], ["world:x", "whole number"]),
    (["--eval_splits", "test", "validation"], ["--eval_splits takes test, ood and NAME=FILE", "'validation'"]),
    (["--eval_splits", "test", "other=missing.jsonl"], ["missing.jsonl: no such file"]),
    (["--eval_splits", "test", "ood"], ["--eval_splits ood needs --in_distribution"]),
    (["--in_distribution", "nowhere=a"], [".jsonl:1: no field 'nowhere'"]),
    (["--in_distribution", "words:prompt>9"], [".jsonl: no row is in distribution", "words:prompt>9"]),
    (["--in_distribution", "words:prompt<9", "--eval_splits", "test", "ood"], [".jsonl: no held-out row is out of distribution"]),
    (["--in_distribution", "rewards.py:number"], ["rewards.py: it defines no function 'number'"]),
    (["--prompt_format", "tldr"], [".jsonl:1: no field 'subreddit'"]),
    (["--prompt_format", "xsum"], ["--prompt_format must be one of tldr, cnn_dm"]),
])  # fmt: skip
def test_command_lines(here, capfd, kind, args, words):
    refused(capfd, kind, arguments(kind) + args, *words)


@pytest.mark.parametrize("args, words", [
    (["--kl_kind", "k4"], ["--kl_kind must be one of k1, k2, k3, full"]),
    (["--kl_in", "loss"], ["--kl_in loss", "k1"]),
    (["--temperature", "0"], ["--temperature must be positive"]),
    (["--score_scaling", "std"], ["--score_scaling must be one of"]),
    (["--max_new_tokens", "0"], ["--max_new_tokens must be at least 1"]),
    (["--batch_size", "7"], ["--batch_size 7 is not a multiple of --minibatch_size (2)"]),
])  # fmt: skip
def test_command_lines_of_ppo(here, capfd, args, words):
    refused(capfd, "ppo", arguments("ppo") + args, *words)


@pytest.mark.parametrize("args, words", [
    (["--objective", "median"], ["--objective must be one of mean, wco, uwo", "'median'"]),
    (["--uwo_lambda", "-0.1"], ["--uwo_lambda must be at least 0, not -0.1"]),
    (["--uwo_lambda", "nan"], ["--uwo_lambda"]),
    (["--reward_model"], ["--reward_model"]),
    (["--reward_model", "rewards.py:good", "words.tsv", "rewards.py:good"], ["--reward_model names rewards.py:good twice"]),
    (["--reward_model", "rm/seed_{seed}"], ["rm/seed_{seed}: no such folder for any seed", "train_rm.py --members"]),
    (["--reward_model", "rewards.py:good", "./nothing/here"], ["./nothing/here: no such model folder"]),
    (["--reward_model", "rewards.py:good", "nowhere.tsv"], ["nowhere.tsv: no such file"]),
    (["--reward_model", "rewards.py:good", "model"], ["model", "score.weight"]),  # a policy
])  # fmt: skip
def test_command_lines_of_ensembles(here, capfd, args, words):
    refused(capfd, "ppo", arguments("ppo") + args, *words)


def test_one_bad_member_of_an_ensemble(here, capfd):
    """The second of two fails on the first samples; nothing is written."""
    for function, words in (
        ("nan", "rewards.py:nan returned nan"),
        ("raises", "rewards.py:raises raised KeyError"),
    ):
        refused(
            capfd,
            "ppo",
            arguments("ppo") + ["--reward_model", "rewards.py:good", f"rewards.py:{function}"],
            words,
        )


@pytest.mark.parametrize("args, words", [
    (["--members", "2"], ["--members needs {seed} in --output_dir"]),
    (["--members", "0"], ["--members must be at least 1, not 0"]),
    (["--members", "two"], ["--members", "two"]),
    (["--independent_noise"], ["--independent_noise is for --members"]),
    (["--members", "1", "--independent_noise"], ["--independent_noise is for --members"]),
])  # fmt: skip
def test_command_lines_of_members(here, capfd, args, words):
    refused(capfd, "rm", arguments("rm") + args, *words)


def test_a_member_whose_folder_holds_another_run(here, capfd):
    cli.run(train_rm.Config, train_rm.main, arguments("rm", output_dir="rm/seed_{seed}", seed=1))
    before = content("rm/seed_1")
    args = arguments("rm", output_dir="rm/seed_{seed}", members=2, lr=0.5)
    fails(capfd, "rm", args, "rm/seed_1 already holds another run", "differs in lr", lines=None)
    assert content("rm/seed_1") == before


def test_command_lines_of_the_others(here, capfd):
    for kind in ("sft", "rm"):
        refused(capfd, kind, arguments(kind, max_length=1), "--max_length must leave room")
    refused(capfd, "rm", arguments("rm", label_noise=1.2), "--label_noise is a probability")


@pytest.mark.parametrize("kind, args", [
    pytest.param("ppo", ["--kl_target", "5", "--kl_coef", "0"], id="adaptive KL from 0"),
    pytest.param("sft", ["--betas", "1.5", "0.9"], id="betas"),
    pytest.param("sft", ["--device", "banana"], id="device"),
])  # fmt: skip
def test_wrong_values_that_get_through(here, capfd, kind, args):
    refused(capfd, kind, arguments(kind) + args, args[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_cuda_here(here, capfd):
    refused(capfd, "sft", arguments("sft", device="cuda"), "--device cuda", "no CUDA device")


# ------------------------------------------------------------------------------------------------------------------------- data


ROW = {kind: rows[0] for kind, rows in GOOD_ROWS.items()}


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("bad, words", [
    ('{"prompt": "a"', ["bad.jsonl:3", "not JSON"]),
    ("[1, 2]", ["bad.jsonl:3", "a row must be an object with prompt"]),
    ('"text"', ["bad.jsonl:3", "a row must be an object with prompt"]),
    ({"text": "a"}, ["bad.jsonl:3", "no field 'prompt'", "--columns"]),
    ("last field missing", ["bad.jsonl:3", "no field"]),
    ("last field a number", ["bad.jsonl:3", "must be a string, not int"]),
    ("last field null", ["bad.jsonl:3", "must be a string, not NoneType"]),
])  # fmt: skip
def test_bad_rows(here, capfd, kind, bad, words):
    *_, last = ROW[kind]
    if bad == "last field missing":
        bad = {name: value for name, value in ROW[kind].items() if name != last}
    elif isinstance(bad, str) and bad.startswith("last field"):
        bad = {**ROW[kind], last: None if "null" in bad else 5}
    write_rows(here / "bad.jsonl", [*GOOD_ROWS[kind][:2], bad, *GOOD_ROWS[kind][2:]])
    refused(capfd, kind, arguments(kind, dataset="bad.jsonl"), *words)
    write_rows(here / "bad.jsonl", [*GOOD_ROWS[kind][:2], bad])
    refused(capfd, kind, arguments(kind, eval_dataset="bad.jsonl"), *words)  # held-out data too


@pytest.mark.parametrize("before, line", [("\n\n", 3), (json.dumps(ROW["sft"]) + "\n\n", 3)])
def test_a_bad_line_after_blank_ones(here, capfd, before, line):
    (here / "bad.jsonl").write_text(before + "{oops\n")
    refused(capfd, "sft", arguments("sft", dataset="bad.jsonl"), f"bad.jsonl:{line}: not JSON")


def bad_files(here):
    (here / "empty.jsonl").write_text("")
    (here / "blank.jsonl").write_text("\n  \n")
    (here / "object.json").write_text(json.dumps(ROW["sft"]))
    (here / "none.json").write_text("[]")
    (here / "broken.json").write_text('[\n{"prompt": "a"},\n{oops}\n]')
    (here / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "response": "x"}\n')
    (here / "not.jsonl.gz").write_text("this is not gzip")
    write_rows(here / "one.jsonl", [ROW["sft"]] * 20)


@pytest.mark.parametrize("name, words", [
    ("missing.jsonl", ["missing.jsonl: no such file"]),
    ("empty.jsonl", ["empty.jsonl: the file is empty"]),
    ("blank.jsonl", ["blank.jsonl: the file is empty"]),
    ("object.json", ["object.json", "one list of rows"]),
    ("none.json", ["none.json: no rows"]),
    ("broken.json", ["broken.json:3: not JSON"]),
    ("latin.jsonl", ["latin.jsonl:1: not UTF-8"]),
    ("not.jsonl.gz", ["not.jsonl.gz: cannot be read"]),
    ("one.jsonl", ["one.jsonl: 1 different prompts are too few"]),
])  # fmt: skip
def test_bad_files(here, capfd, name, words):
    bad_files(here)
    refused(capfd, "sft", arguments("sft", dataset=name), *words)


def test_a_prompt_longer_than_the_context(here, capfd):
    long = {"prompt": "review the hotel " + "very " * 120}
    write_rows(here / "long.jsonl", [*GOOD_ROWS["ppo"], long])
    words = [
        "a prompt of 123 tokens and 6 new ones are longer than the model's context of 128",
        "--max_prompt_length",
        "review the hotel",
    ]
    refused(capfd, "ppo", arguments("ppo", dataset="long.jsonl"), *words)
    cli.run(
        train_ppo.Config,
        train_ppo.main,
        arguments("ppo", dataset="long.jsonl", max_prompt_length=20),
    )  # and the advice helps
    assert Path("out/summary.json").exists()


def test_an_empty_prompt(here, capfd):
    write_rows(here / "bad.jsonl", [*GOOD_ROWS["ppo"], {"prompt": " "}])
    refused(capfd, "ppo", arguments("ppo", dataset="bad.jsonl"), "empty prompt")


# ----------------------------------------------------------------------------------------------------------------------- models


def no_eos():
    path = Path("model/tokenizer_config.json")
    settings = json.loads(path.read_text())
    assert settings.pop("eos_token") == "<eos>"
    path.write_text(json.dumps(settings))


def half_the_weights():
    path = Path("model/model.safetensors")
    path.write_bytes(path.read_bytes()[:1000])


def no_tokenizer():
    for path in Path("model").glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("damage, words", [
    (no_eos, ["model: the tokenizer has no EOS token"]),
    (lambda: os.remove("model/model.safetensors"), ["model: no weights (*.safetensors)"]),
    (lambda: os.rename("model/model.safetensors", "model/pytorch_model.bin"), ["model: no weights (*.safetensors)"]),  # pickle is never read
    (lambda: os.remove("model/config.json"), ["model: a folder without config.json is no model"]),
    (lambda: Path("model/config.json").write_text("{oops"), ["model: "]),
    (half_the_weights, ["model/model.safetensors: cannot be read"]),
    (no_tokenizer, ["model: ", "tokenizer"]),
], ids=["no EOS", "no weights", "pickle", "no config", "broken config", "half the weights", "no tokenizer"])  # fmt: skip
def test_bad_models(here, capfd, kind, damage, words):
    damage()
    refused(capfd, kind, arguments(kind), *words)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_missing_model(here, capfd, kind):
    refused(
        capfd, kind, arguments(kind, model="./nothing/here"), "./nothing/here: no"
    )  # such model folder; or tokenizer


def test_bad_models_beside_the_policy(here, capfd):
    shutil.copytree("model", "no_weights")
    os.remove("no_weights/model.safetensors")
    for flag in ("reward_model", "gold_model", "value_model"):
        refused(capfd, "ppo", arguments("ppo", **{flag: "./no_weights"}), "no_weights")
        refused(capfd, "ppo", arguments("ppo", **{flag: "./nothing/here"}), "./nothing/here")


# ---------------------------------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize("reward, words", [
    ("nowhere.py:good", ["nowhere.py: no such file"]),
    ("rewards.py:missing", ["rewards.py: it defines no function 'missing'"]),
    ("rewards.py:number", ["rewards.py: it defines no function 'number'"]),
    ("broken.py:good", ["broken.py: cannot be imported: SyntaxError"]),
    ("fails.py:good", ["fails.py: cannot be imported: ZeroDivisionError"]),
    ("nowhere.tsv", ["nowhere.tsv: no such file"]),
    ("empty.tsv", ["empty.tsv: the lexicon is empty"]),
    ("spaces.tsv", ["spaces.tsv:3: not WORD<TAB>VALUE", "bad -3"]),
    ("words.txt", ["words.txt:2: not WORD<TAB>VALUE", "lots"]),
    ("latin.tsv", ["latin.tsv: not UTF-8", "byte 3"]),
])  # fmt: skip
def test_bad_rewards(here, capfd, reward, words):
    (here / "broken.py").write_text("def good(:\n")
    (here / "fails.py").write_text("1 / 0\n")
    (here / "empty.tsv").write_text("\n")
    (here / "latin.tsv").write_bytes("caf\u00e9\t2\n".encode("latin-1"))
    (here / "spaces.tsv").write_text("good\t3\n\nbad -3\n")
    (here / "words.txt").write_text("good\t3\nnice\tlots\n")
    for flag in ("reward_model", "gold_model"):
        refused(capfd, "ppo", arguments("ppo", **{flag: reward}), *words)


@pytest.mark.parametrize("function, words", [
    ("raises", ["rewards.py:raises raised KeyError", "no such word"]),
    ("nan", ["rewards.py:nan returned nan for the response"]),
    ("infinite", ["rewards.py:infinite returned -inf"]),
    ("short", ["rewards.py:short returned 2 scores for 3 responses"]),
    ("texts", ["rewards.py:texts must return one float for each response", "is of type str"]),
    ("none", ["rewards.py:none must return one float for each response", "NoneType"]),
])  # fmt: skip
def test_rewards_that_go_wrong_when_called(here, capfd, function, words):
    """They are first called on the samples of step 0. Nothing that was there is touched; the mended function runs in the same folder."""
    before = content()
    fails(capfd, "ppo", arguments("ppo", reward_model=f"rewards.py:{function}"), *words)
    after = content()
    assert {name: after[name] for name in before} == before and not Path("out/model").exists()
    assert not Path("out/metrics.jsonl").exists() or Path("out/metrics.jsonl").read_text() == ""
    (here / "rewards.py").write_text(BAD_REWARDS + f"\n{function} = good\n")
    cli.run(
        train_ppo.Config, train_ppo.main, arguments("ppo", reward_model=f"rewards.py:{function}")
    )
    assert Path("out/summary.json").exists()


def test_rewards_that_end_the_process_later(here, capfd):
    """The exit code 0 after some steps would look like success: it is 2, with one line, and the checkpoint is kept."""
    later = "calls = 0\ndef exits(prompts, responses):\n    global calls\n    calls += 1\n    if calls > 2: raise SystemExit(0)\n"
    Path("exits.py").write_text(later + "    return [1.0] * len(responses)\n")
    args = arguments("ppo", reward_model="exits.py:exits", checkpoint_every=1, steps=3)
    fails(capfd, "ppo", args, "the reward exits.py:exits raised SystemExit: 0", lines=None)
    assert not Path("out/summary.json").exists() and [
        step for step, _ in checkpoint.checkpoints("out")
    ] == [1]


def test_a_bad_gold_reward_of_a_reward_model(here, capfd):
    refused(capfd, "rm", arguments("rm", gold_model="nowhere.py:gold"), "nowhere.py: no such file")


# --------------------------------------------------------------------------------------------------------------- output folders


@pytest.mark.parametrize("kind", SCRIPTS)
def test_output_folders(here, capfd, kind):
    args = arguments(kind)
    Path("out").write_text("a file")
    refused(capfd, kind, args, "out: the output folder is a file")
    os.remove("out")
    Path("out/notes").mkdir(parents=True)
    refused(capfd, kind, args, "out is not empty and holds no run")
    shutil.rmtree("out")
    Path("out").mkdir()  # empty: welcome
    cli.run(SCRIPTS[kind].Config, SCRIPTS[kind].main, args)
    for other in ("seed", "steps"):
        refused(
            capfd,
            kind,
            arguments(kind) + [f"--{other}", "7"],
            "out already holds another run",
            f"differs in {other}",
        )
    wrong = next(k for k in SCRIPTS if k != kind)
    refused(capfd, wrong, arguments(wrong), "out already holds another run")  # another script's


def test_a_broken_config_in_the_output_folder(here, capfd):
    Path("out").mkdir()
    Path("out/config.json").write_text('{"steps": ')
    refused(capfd, "sft", arguments("sft"), "out/config.json")


# ---------------------------------------------------------------------------------------------------------------- real processes


def start(kind, args, **env):
    return subprocess.Popen([sys.executable, REPO / f"train_{kind}.py", *args], env={**ENV, **env}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


@pytest.mark.slow
def test_real_processes(here):
    """The exit code and the one line, as the shell sees them; four scripts at a time."""
    write_rows(here / "bad.jsonl", [*GOOD_ROWS["rm"], {"prompt": "a", "chosen": "b"}])
    shutil.copytree("model", "weightless")
    os.remove("weightless/model.safetensors")
    parses = "import argparse\nargparse.ArgumentParser().parse_args()\ndef f(prompts, responses): return [1.0] * len(responses)\n"
    (here / "parses.py").write_text(parses)
    before = content()
    runs = {
        "parses.py: cannot be imported: SystemExit": start(
            "ppo", arguments("ppo", reward_model="parses.py:f")
        ),
        "--nonsense": start("sft", [*arguments("sft"), "--nonsense"]),
        "bad.jsonl:17: no field 'rejected'": start("rm", arguments("rm", dataset="bad.jsonl")),
        "weightless: no weights": start("ppo", arguments("ppo", model="weightless")),
    }
    for words, process in runs.items():
        out, error = process.communicate(timeout=120)
        assert process.returncode == 2 and len(error.splitlines()) == 1 and words in error, error
        assert error.startswith(f"{process.args[1].name}: error: ")
    assert content() == before


def pair(kind, args):
    """Two processes with torchrun's environment -> [(exit code, stderr)]."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    processes = [
        start(
            kind,
            args,
            WORLD_SIZE="2",
            RANK=str(r),
            LOCAL_RANK=str(r),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for r in (0, 1)
    ]
    return [
        (p.returncode, error)
        for p, (_, error) in [(p, p.communicate(timeout=120)) for p in processes]
    ]


@pytest.mark.slow
def test_a_batch_that_the_processes_cannot_share(here):
    before = content()
    (code, error), (other, silence) = pair("sft", arguments("sft", batch_size=7))
    assert (code, other) == (
        2,
        2,
    ) and "--batch_size 7 is not a multiple of the number of processes (2)" in error
    assert (
        len(error.splitlines()) == 1 and len(silence.splitlines()) <= 1
    )  # at most one line from each
    assert content() == before


HERE = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("env, words", [
    ({"WORLD_SIZE": "two"}, ["WORLD_SIZE", "'two'"]),
    ({"WORLD_SIZE": ""}, ["WORLD_SIZE", "''"]),
    ({"WORLD_SIZE": "1e3"}, ["WORLD_SIZE", "'1e3'"]),
    ({"WORLD_SIZE": "9" * 5000}, ["WORLD_SIZE"]),
    ({"WORLD_SIZE": "0"}, ["RANK 0", "WORLD_SIZE 0"]),
    ({"RANK": "-1"}, ["RANK", "'-1'"]),
    ({"RANK": "1"}, ["RANK 1", "WORLD_SIZE 1"]),
    ({"LOCAL_RANK": "0.5"}, ["LOCAL_RANK", "'0.5'"]),
    ({"LOCAL_RANK": "3"}, ["LOCAL_RANK 3", "WORLD_SIZE 1"]),
    ({"WORLD_SIZE": "2"}, ["do not find each other", "RANK expected"]),
    ({"WORLD_SIZE": "2", "RANK": "0"}, ["do not find each other", "MASTER_ADDR"]),
    (HERE, ["do not find each other", "MASTER_PORT"]),
    ({**HERE, "MASTER_PORT": "x"}, ["do not find each other", "MASTER_PORT=x"]),
    ({**HERE, "MASTER_PORT": "99999"}, ["do not find each other", "MASTER_PORT=99999"]),
    ({**HERE, "MASTER_PORT": "free"}, ["do not find each other", "1/2 clients joined"]),  # the other process never comes
    ({**HERE, "MASTER_PORT": "free", "RANK": "1"}, ["do not find each other"]),
    ({**HERE, "MASTER_PORT": "free", "RANK": "1", "MASTER_ADDR": "nowhere.invalid"}, ["do not find each other", "nowhere.invalid"]),
    ({**HERE, "MASTER_PORT": "free", "MASTER_ADDR": "nowhere.invalid"}, ["do not find each other", "nowhere.invalid"]),
])  # fmt: skip
def test_what_torchrun_would_set(here, capfd, monkeypatch, env, words):
    """One line, also where torch has a page to say about each of its tries."""
    monkeypatch.setattr(distributed, "MEETING_SECONDS", 0.5)
    monkeypatch.setattr(
        "time.sleep", lambda seconds: None
    )  # a process of several waits a second before it ends
    for name, value in env.items():
        monkeypatch.setenv(name, str(free_port()) if value == "free" else value)
    refused(capfd, "sft", arguments("sft"), *words)


@pytest.mark.slow
def test_processes_that_do_not_find_each_other(here):
    """Within a minute of the start, or twice that on a busy machine."""
    process = start("sft", arguments("sft"), **HERE, MASTER_PORT=str(free_port()))
    error = process.communicate(timeout=120)[1]
    assert (
        process.returncode == 2
        and len(error.splitlines()) == 1
        and "do not find each other" in error
    ), error


# ------------------------------------------------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("kind", ["sft", "rm", "ppo"])
def test_a_learning_rate_that_explodes(here, capfd, kind):
    fails(capfd, kind, arguments(kind, lr=1e30, warmup=0, steps=5, checkpoint_every=1, minibatch_size=4 if kind == "ppo" else None),
          "step 2: ", "--lr", code=1, lines=None)  # fmt: skip
    assert [step for step, _ in checkpoint.checkpoints("out")] == [1] and not Path(
        "out/model"
    ).exists()
    tensors = load_file("out/checkpoint/step_1/state.safetensors")
    assert len(tensors) > 100 and all(tensor.isfinite().all() for tensor in tensors.values())


def test_an_infinite_loss_keeps_the_last_good_checkpoint(here, capfd):
    """Evaluation, two steps, then scores of 1e38: the third step fails, and the second one's checkpoint is whole."""
    args = arguments("ppo", reward_model="rewards.py:huge_later", steps=5, checkpoint_every=1)
    fails(capfd, "ppo", args, "step 3: ", code=1, lines=None)
    assert [step for step, _ in checkpoint.checkpoints("out")] == [1, 2]
    policy = load_policy("model")
    optimizer = adamw(policy, 1e-3, (0.9, 0.95), 0.0)
    start_ = {name: p.clone() for name, p in policy.named_parameters()}
    assert checkpoint.load("out", policy, optimizer)["step"] == 2
    assert all(
        p.isfinite().all() for p in policy.parameters()
    ) and not policy.value_head.weight.equal(start_["value_head.weight"])
    assert len(Path("out/metrics.jsonl").read_text().splitlines()) == 3  # steps 0, 1, 2

    # The reward is mended. Whoever wants to go on with other content has to say so.
    (here / "rewards.py").write_text(BAD_REWARDS + "\nhuge_later = good\n")
    fails(
        capfd,
        "ppo",
        ["--output_dir", "out", "--resume"],
        "rewards.py has changed",
        "delete its entry in out/config.json",
        lines=None,
    )
    stored = json.loads(Path("out/config.json").read_text())
    del stored["inputs"]["rewards.py"]
    Path("out/config.json").write_text(json.dumps(stored))
    cli.run(train_ppo.Config, train_ppo.main, ["--output_dir", "out", "--resume"])
    assert json.loads(Path("out/summary.json").read_text())["steps"] == 5


def test_a_memory_that_is_too_small(here, capfd, monkeypatch):
    """What torch really says of a petabyte is one line; nothing is left in the way of a smaller run."""
    monkeypatch.setattr(train_sft, "load_splits", lambda *args: torch.empty(2**50))
    fails(capfd, "sft", arguments("sft"), "not enough memory", code=1)
    assert not Path("out").exists()


@pytest.mark.parametrize("expansion", ["1e300", "1e12", "0", "-1"])
def test_more_features_than_a_machine_holds(expansion):
    with pytest.raises(InputError, match="--expansion"):
        cli.parse(train_sae.Config, ["--expansion", expansion])


def test_a_reward_that_is_too_large_at_once(here, capfd):
    fails(
        capfd,
        "ppo",
        arguments("ppo", reward_model="rewards.py:huge"),
        "step 1: ",
        code=1,
        lines=None,
    )
    assert isinstance(load_policy("model"), Policy)

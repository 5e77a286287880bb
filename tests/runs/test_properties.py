"""Properties that every script has, each written once.

What changes no result: micro-batches, processes, kills; and what a call on a finished folder does.
The kinds of runs stand in support.RUNS; kills at random moments are in test_kills.py, flags and
--help in runtime/test_flags.py.
"""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import (
    ALL_SCRIPTS,
    ENV,
    RUNS,
    SCRIPTS,
    STATEFUL,
    KillAt,
    Killed,
    assert_close_runs,
    assert_same_run,
    command_line,
    drive,
    flags,
    fork,
    hashes,
    join,
    metrics,
    rank_settings,
    ranks,
    read_rows,
    rollouts,
    small,
    summary,
    train,
)

from nanorlhf.runtime import cli, log


@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_a_script_calls_main_at_its_end(name):
    """A function that stands below the call does not exist yet when a shell runs the script."""
    source = Path(ALL_SCRIPTS[name].__file__).read_text()
    last = ast.parse(source).body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last.test) == "__name__ == '__main__'"


def weights_error(kind):
    """How far float error may move a weight.

    A SARM's head, which is divided by the small spread of its scores, is large.
    """
    if kind.startswith("sarm"):
        return 5e-4
    return 1e-4


def column(rows, name):
    """One field of all rows."""
    return [row[name] for row in rows]


# ------------------------------------------------------------------------------------ micro-batches

UNEVEN = {"eval_every": 2, "eval_size": 7}
# Without this penalty the last bias has no gradient but float error, which AdamW makes large.
PENALTY = {"score_l2": 0.01}
# {kind of run: settings that a micro-batch might change, or that make results comparable}
MICRO_BATCHED = {
    "sft": {},
    "dpo": UNEVEN,
    "simpo": UNEVEN,
    "rm": PENALTY,
    "sarm_encoder_frozen": {**UNEVEN, **PENALTY},
    "sarm_detached": {**UNEVEN, **PENALTY},
    "ppo": {"ent_coef": 0.01, "bootstrap_truncated": True},
    "control": {},
}


def micro_batched(base, kind):
    """The settings of a run of three steps whose batches of 8 can be split."""
    settings = {"steps": 3, **MICRO_BATCHED[kind]}
    if kind == "sft":
        # A model without dropout. DPO switches it off.
        settings["model"] = f"{base}/sft"
    if kind == "ppo":
        settings["reward_model"] = [f"{base}/rm"]
    return settings


def check_same_answers(run, other):
    """The evaluations of two runs have the same responses; of a run without any there are none."""
    for path in (run / "eval").glob("*"):
        rows = read_rows(path)
        others = read_rows(other / "eval" / path.name)
        assert column(rows, "response") == column(others, "response")


@pytest.mark.slow
@pytest.mark.parametrize("kind", MICRO_BATCHED)
def test_micro_batches_change_nothing(base, tmp_path, kind):
    settings = micro_batched(base, kind)
    whole = tmp_path / "whole"
    train(base, kind, whole, micro_batch_size=8, **settings)
    train(base, kind, tmp_path / "rows", micro_batch_size=3, **settings)
    by_tokens = {"micro_batch_size": 1, "tokens_per_micro_batch": 60}
    train(base, kind, tmp_path / "tokens", **by_tokens, **settings)

    for other in (tmp_path / "rows", tmp_path / "tokens"):
        assert_close_runs(whole, other, weights_atol=weights_error(kind))
        check_same_answers(whole, other)


# ---------------------------------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def one_process(base, tmp_path_factory):
    """A folder with the runs of rank_settings in one process, named by their kinds."""
    folder = tmp_path_factory.mktemp("one")
    join(fork(drive, folder, rank_settings(base)))
    return folder


# A script for torchrun: support.drive(), with a folder and JSON for its arguments.
DRIVER = """
import json, sys
import support
support.in_child(support.drive, (sys.argv[1], json.loads(sys.argv[2])), {})
"""


@pytest.fixture(scope="module")
def two_processes(base, tmp_path_factory):
    """The same by torchrun in two."""
    folder = tmp_path_factory.mktemp("two")
    driver = tmp_path_factory.mktemp("driver") / "driver.py"
    driver.write_text(DRIVER)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2"
    command = [sys.executable, *torchrun.split(), driver, folder, json.dumps(rank_settings(base))]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def four_processes(base, tmp_path_factory):
    """The run of PPO in four."""
    folder = tmp_path_factory.mktemp("four")
    settings = dict(rank_settings(base))["ppo"]
    join(*ranks(4, drive, folder, [("ppo", settings)]))
    return folder


KINDS_ON_TWO = ["sft", "dpo", "simpo", "rm", "sarm_encoder_frozen", "sarm_detached", "ppo"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS_ON_TWO)
def test_two_processes_change_nothing(one_process, two_processes, kind):
    assert_close_runs(one_process / kind, two_processes / kind, weights_atol=weights_error(kind))
    check_same_answers(one_process / kind, two_processes / kind)


@pytest.mark.slow
def test_two_processes_sample_the_same_answers(one_process, two_processes):
    names = {path.name for path in two_processes.glob("rollouts_*")}
    assert names == {"rollouts_0.jsonl", "rollouts_1.jsonl"}
    # Three rollouts of 8, and four evaluations of 7 on two splits each.
    assert len(rollouts(one_process)) == 3 * 8 + 2 * 4 * 7
    assert rollouts(one_process) == rollouts(two_processes)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["eval", "eval_ood"])
@pytest.mark.parametrize("step", range(4))
def test_two_processes_write_the_same_evaluations(one_process, two_processes, step, split):
    rows = read_rows(one_process / f"ppo/{split}/step_{step}.jsonl")
    others = read_rows(two_processes / f"ppo/{split}/step_{step}.jsonl")
    assert column(rows, "prompt") == column(others, "prompt")
    assert column(rows, "response") == column(others, "response")
    scores = column(column(rows, "scores"), "rm")
    other_scores = column(column(others, "scores"), "rm")
    assert scores == pytest.approx(other_scores, rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_four_processes_change_nothing(one_process, four_processes):
    assert_close_runs(one_process / "ppo", four_processes / "ppo")
    assert rollouts(one_process) == rollouts(four_processes)


# With four processes the order in which gradients are added up matters too.
@pytest.mark.slow
@pytest.mark.parametrize("n, left_alone", [(2, "two_processes"), (4, "four_processes")])
def test_sigkill_of_one_of_several_processes(request, base, tmp_path, n, left_alone):
    """Rank 1 dies during an evaluation; all are started again with --resume.

    They end as those that were left alone, bit for bit.
    """
    whole = request.getfixturevalue(left_alone)
    folder = tmp_path / "killed"
    settings = dict(rank_settings(base))["ppo"]
    place = ["--output_dir", str(folder)]
    # The sixth call of the gold reward is of step 2's second split.
    killer = {"KILL_AT": "6", "KILL_RANK": "1"}
    first, second, *others = ranks(n, command_line, "ppo", *place, *flags(settings), **killer)
    join(second, code=-signal.SIGKILL)
    for process in (first, *others):
        process.kill()
        process.join()
    assert os.listdir(folder / "checkpoint") == ["step_1"]
    assert column(metrics(folder), "step") == [0, 1]

    join(*ranks(n, command_line, "ppo", *place, "--resume"))
    assert_same_run("ppo", whole / "ppo", folder)


@pytest.mark.slow
def test_torchrun_starts_the_processes_again(base, tmp_path, two_processes):
    """With --max_restarts a run whose process died goes on by itself, to the same bits."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    settings = dict(rank_settings(base))["ppo"]
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --max_restarts=1"
    runs = json.dumps([("ppo", settings)])
    # After the restart there are fewer than six calls of the gold reward left.
    env = {**ENV, "KILL_AT": "6", "KILL_RANK": "1"}
    command = [sys.executable, *torchrun.split(), driver, tmp_path, runs]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exitcode: -9" in done.stderr
    assert_same_run("ppo", two_processes / "ppo", tmp_path / "ppo")


# ---------------------------------------------------------------------------- killed at every write

TWO_STEPS = {
    "steps": 2,
    "checkpoint_every": 1,
    "ppo_epochs": 1,
    "minibatch_size": 8,
    "max_new_tokens": 6,
    "eval_size": 2,
    "n_samples": 1,
}
FOUR_STEPS = {"steps": 4, "checkpoint_every": 2, "label_noise": 0.3}
LORA = {"lora_rank": 2, "lora_dropout": 0.3}
FEW_TEXTS = {"batch_size": 64, "eval_size": 2, "max_rows": 24, "buffer_tokens": 4096}
# {case: (kind of run, its settings)}
KILLED = {
    "ppo": ("ppo", {**TWO_STEPS, **STATEFUL}),
    "grpo": ("ppo", {**TWO_STEPS, "advantage": "grpo", "group_size": 4, "loss_mean": "sequence"}),
    "control": ("control", TWO_STEPS),
    "rm": ("rm", {"checkpoint_every": 2}),
    "sft": ("sft", {"checkpoint_every": 2, "eval_every": 1}),
    "dpo": ("dpo", {"checkpoint_every": 1, "eval_every": 2, "eval_size": 2}),
    "dpo with lora": ("dpo", {"checkpoint_every": 2, "eval_size": 2, **LORA}),
    "sarm_frozen": ("sarm_frozen", FOUR_STEPS),
    "sarm_detached": ("sarm_detached", FOUR_STEPS),
    "sae": ("sae", {"steps": 3, "checkpoint_every": 2, **FEW_TEXTS}),
}


def train_until(monkeypatch, n, base, kind, folder, **settings):
    """A run in this process that is killed at its n-th write."""
    with monkeypatch.context() as patch:
        kill = KillAt(patch, n)
        with pytest.raises(Killed):
            train(base, kind, folder, **settings)
    print("killed at", kill.at)


@pytest.mark.slow
@pytest.mark.parametrize("case", KILLED)
def test_killed_at_every_write(base, tmp_path, monkeypatch, case):
    """Kill a run at each of its writes, resume it, and compare it with one that was left alone."""
    kind, settings = KILLED[case]
    settings = {**settings, "keep_checkpoints": 1}
    whole = tmp_path / "whole"
    with monkeypatch.context() as patch:
        counter = KillAt(patch)
        train(base, kind, whole, **settings)
    assert counter.count > 10

    # What a kill before the first checkpoint leaves is tried with PPO alone: it is all alike.
    first_write = 1 if case == "ppo" else 4
    for n in range(first_write, counter.count + 1):
        folder = tmp_path / f"killed_{n}"
        train_until(monkeypatch, n, base, kind, folder, **settings)
        # With --resume or without, it is the same.
        train(base, kind, folder, resume=n % 2 == 0, **settings)
        assert_same_run(kind, whole, folder)
        shutil.rmtree(folder)


def test_a_run_that_was_killed_at_its_first_write_can_be_resumed(base, tmp_path, monkeypatch):
    train_until(monkeypatch, 1, base, "rm", tmp_path)
    train(base, "rm", tmp_path, resume=True)
    assert (tmp_path / "summary.json").exists()


def test_the_last_k_checkpoints_are_kept(base, tmp_path, monkeypatch):
    """Until the run has finished, which this one does not."""

    def do_not_finish(folder, summary):
        return summary

    monkeypatch.setattr(log.RunFolder, "finish", do_not_finish)
    train(base, "rm", tmp_path, steps=5, checkpoint_every=1, keep_checkpoints=3)
    assert sorted(os.listdir(tmp_path / "checkpoint")) == ["step_3", "step_4", "step_5"]


# ---------------------------------------------------------------------------------------- run again


@pytest.fixture(scope="module", params=[*SCRIPTS, "sae"])
def finished(request, base, tmp_path_factory):
    """A finished run of each kind: (kind, folder). It is only read."""
    folder = tmp_path_factory.mktemp("finished") / request.param
    train(base, request.param, folder)
    return request.param, folder


def call_again(kind, folder, *args):
    """The script as from a shell, on this folder."""
    script = RUNS[kind]
    cli.run(script.Config, script.main, ["--output_dir", str(folder), *args])


def test_the_same_call_on_a_finished_run_says_that_it_is_done(base, finished, capsys):
    kind, folder = finished
    before = hashes(folder)
    script = RUNS[kind]
    config = script.Config(output_dir=str(folder), **small(base, kind))
    assert script.main(config) == summary(folder)
    assert "this run is done" in capsys.readouterr().out
    assert hashes(folder) == before


def test_resuming_a_finished_run_says_that_it_is_done(finished, capsys):
    """--resume alone takes the settings that stand in the folder."""
    kind, folder = finished
    before = hashes(folder)
    call_again(kind, folder, "--resume")
    assert "this run is done" in capsys.readouterr().out
    assert hashes(folder) == before


def check_another_run(capsys, finished, args, setting):
    """These arguments are refused in one line that names the setting; the folder is unchanged."""
    kind, folder = finished
    before = hashes(folder)
    with pytest.raises(SystemExit) as exit_:
        call_again(kind, folder, *args)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert len(error.splitlines()) == 1
    assert "already holds another run" in error
    assert f" {setting}" in error
    assert hashes(folder) == before


# Without any argument the script's defaults are another run too.
OTHER_SETTINGS = [
    (["--resume", "--lr", "0.5"], "lr"),
    (["--steps", "7", "--resume"], "steps"),
    ([], "steps"),
]


@pytest.mark.parametrize("args, setting", OTHER_SETTINGS, ids=["lr", "steps", "defaults"])
def test_another_run_needs_another_folder(finished, capsys, args, setting):
    check_another_run(capsys, finished, args, setting)


def test_a_run_with_another_seed_needs_another_folder(base, finished, capsys):
    kind, _ = finished
    check_another_run(capsys, finished, flags(small(base, kind, seed=1)), "seed")

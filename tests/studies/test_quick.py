"""What all studies share (nanorlhf/studies/common.py): --quick, and commands in processes of their
own.
"""

import contextlib
import os
import runpy
import shlex
import signal
import sys
import threading

import pytest
from support import fork, join, parse_command, wait_for

from nanorlhf.errors import InputError
from nanorlhf.runtime.locks import lock, unlock_afterwards
from nanorlhf.studies import (
    common,
    cue_control,
    feedback_patterns,
    generalisation,
    optimisers,
    overoptimisation,
)

pytestmark = pytest.mark.slow

STUDIES = [overoptimisation, feedback_patterns, cue_control, generalisation]


def read_settings(study, *args):
    return study.read_settings(["--output_dir", "out", *args])


def commands_of(study, *args):
    """The command lines of a study; those of cue_control where it finds no features."""
    settings = read_settings(study, *args)
    commands = []
    if study is not cue_control:
        for stage in study.commands(settings):
            commands += stage
        return commands
    for stage in study.first_commands(settings):
        commands += stage
    for seed in study.seeds(settings):
        commands += study.arms(settings, seed, {"features": []}).values()
    return commands


def parse_settings(command):
    """A command line as its script reads it; bad flags raise."""
    # The other scripts would look for the folders that {seed} stands for.
    if not command.startswith("train_rm.py"):
        command = command.replace("{seed}", "0")
    _, config = parse_command(command)
    return config


def scripts_in(commands):
    """The scripts, and the commands of probe.py."""
    scripts = set()
    for command in commands:
        script, first, *_ = command.split()
        scripts.add(f"probe.py {first}" if script == "probe.py" else script)
    return scripts


def folders_of(commands):
    return {common.output_of(shlex.split(command)) for command in commands}


@pytest.mark.parametrize("study", STUDIES)
def test_quick_is_one_seed(study):
    quick = read_settings(study, "--quick")
    whole = read_settings(study)
    assert quick.seeds == 1
    assert whole.seeds >= 5
    assert not whole.quick


@pytest.mark.parametrize("study", STUDIES)
def test_quick_runs_the_same_scripts_less_often(study):
    quick = commands_of(study, "--quick")
    whole = commands_of(study)
    assert scripts_in(quick) == scripts_in(whole)
    assert len(quick) <= len(whole) / 4


@pytest.mark.parametrize("study", STUDIES)
def test_quick_runs_have_known_flags_and_shorter_ppo(study):
    ppo_steps = set()
    for command in commands_of(study, "--quick"):
        config = parse_settings(command)
        if command.startswith("train_ppo.py"):
            ppo_steps.add(config.steps)
    (steps,) = ppo_steps
    assert steps < 40


@pytest.mark.parametrize("study", STUDIES)
def test_quick_runs_are_kept_apart(study):
    """A short run in the study's own folder would be taken for the study's."""
    quick = folders_of(commands_of(study, "--quick"))
    whole = folders_of(commands_of(study))
    for folder in quick:
        assert folder.startswith("out/quick/")
    assert not quick & whole


@pytest.mark.parametrize("study", STUDIES)
def test_flags_that_are_given_hold(study):
    given = ["--quick", "--seeds", "2", "--ppo_flags=--steps 7", "--jobs", "1"]
    settings = read_settings(study, *given)
    assert settings.seeds == 2
    assert settings.ppo_flags == "--steps 7"
    assert settings.jobs == 1


def test_commands_run_side_by_side_and_once(monkeypatch, capsys):
    both = threading.Barrier(2, timeout=30)  # passed only by two at a time
    ran = []

    def run_command(command):
        both.wait()
        ran.append(command)

    monkeypatch.setattr(common, "run_command", run_command)
    common.run_stage(["a", "done", "b"], 2, lambda command: command == "done")
    assert sorted(ran) == ["a", "b"]
    assert capsys.readouterr().out == "done: python a\ndone: python b\n"


def test_a_command_that_fails_ends_the_study(tmp_path):
    command = f"train_sft.py --steps -1 --output_dir {tmp_path}/sft"
    with pytest.raises(SystemExit) as ended:
        common.run_stage([command], 1)
    log = tmp_path / "sft.log"
    assert str(ended.value) == f"python {command}\nended with exit code 2: see {log}"
    assert "--steps must be at least" in log.read_text()


def run_alone(command):
    """A stage of one command. What it starts is in a group of processes that it leads."""
    os.setsid()
    common.run_stage([command], 1)


def test_sigterm_ends_the_command_too(tmp_path):
    """Else it would go on with nobody waiting for it, and lock its folder."""
    folder = tmp_path / "sft"
    study = fork(run_alone, f"train_sft.py --steps 1000000 --output_dir {folder}")
    try:
        wait_for((folder / "metrics.jsonl").exists, seconds=120)
        study.terminate()
        join(study, code=-signal.SIGTERM)
        wait_for(lambda: is_free(folder), seconds=10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)


def is_free(folder):
    """Whether no process works in a folder."""
    try:
        with unlock_afterwards():
            lock(str(folder))
    except InputError:
        return False
    return True


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("study", [*STUDIES, optimisers])
def test_ctrl_c_is_one_line(monkeypatch, tmp_path, capsys, study):
    """It comes while a study waits for its first command."""

    def wait(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "run_command", wait)
    monkeypatch.setattr(sys, "argv", ["study.py", "--quick", "--output_dir", f"{tmp_path}/out"])
    # pytest itself would end with a KeyboardInterrupt that nobody catches.
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ending:
        runpy.run_module(study.__name__, run_name="__main__")
    assert ending.type is SystemExit
    assert ending.value.code == 130
    assert capsys.readouterr().err == "study.py: interrupted\n"

"""What all studies share (nanorlhf/studies/common.py): --quick, and commands in processes of their own."""

import shlex
import threading

import pytest
from support import parse_command

from nanorlhf.studies import (
    common,
    cue_control,
    feedback_patterns,
    generalisation,
    overoptimisation,
)

pytestmark = pytest.mark.slow

STUDIES = [overoptimisation, feedback_patterns, cue_control, generalisation]


def commands_of(study, *args):
    """The study's flags and its command lines; of cue_control with the arms of two latents that were found."""
    a = study.read_settings(["--output_dir", "out", *args])
    if study is not cue_control:
        return a, [command for stage in study.commands(a) for command in stage]
    commands = [command for stage in study.first_commands(a) for command in stage]
    for s in study.seeds(a):
        commands += study.arms(a, s, {"features": []}).values()
    return a, commands


def settings_in(command):
    """A command line as its script reads it; bad flags raise."""
    if not command.startswith(
        "train_rm.py"
    ):  # the others would look for the folders that {seed} stands for
        command = command.replace("{seed}", "0")
    return parse_command(command)[1]


@pytest.mark.parametrize("study", STUDIES)
def test_quick_is_one_seed_with_less_to_do(study):
    a, quick = commands_of(study, "--quick")
    whole_settings, whole = commands_of(study)
    assert a.seeds == 1 and whole_settings.seeds == 5 and not whole_settings.quick
    assert len(quick) <= len(whole) / 4

    # The same scripts run, with flags that they know, and shorter PPO runs.
    def scripts_of(commands):
        return {
            " ".join(command.split()[:2]) if command.startswith("probe.py") else command.split()[0]
            for command in commands
        }

    assert scripts_of(quick) == scripts_of(whole)
    lengths = {
        settings_in(command).steps for command in quick if command.startswith("train_ppo.py")
    }
    assert len(lengths) == 1 and max(lengths) < 40
    for command in quick:
        settings_in(command)


@pytest.mark.parametrize("study", STUDIES)
def test_quick_runs_are_kept_apart(study):
    """A short run in the study's own folder would be taken for the study's."""
    _, quick = commands_of(study, "--quick")
    _, whole = commands_of(study)
    folders = {common.output_of(shlex.split(command)) for command in quick}
    assert all(folder.startswith("out/quick/") for folder in folders)
    assert not folders & {common.output_of(shlex.split(command)) for command in whole}


@pytest.mark.parametrize("study", STUDIES)
def test_flags_that_are_given_hold(study):
    a = study.read_settings(["--quick", "--seeds", "2", "--ppo_flags=--steps 7", "--jobs", "1"])
    assert (a.seeds, a.ppo_flags, a.jobs) == (2, "--steps 7", 1)


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

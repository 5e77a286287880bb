"""Where results cannot be written: one line and exit code 2, and nothing is made.

That is so at every door, before a model is loaded.

The names are real: files, broken links, and folders that the system itself will not write into.
"""

import importlib
import os
import shlex
import shutil
from pathlib import Path

import pytest
import transformers
from support import ALL_SCRIPTS, content, run_probe, write_rows
from tiny_models import tiny_sarm

from nanorlhf.errors import InputError
from nanorlhf.runtime import cli, files, locks

BAD_NAMES = {
    "empty": "",
    "below a file": "sft.jsonl/x",
    "below two files": "sft.jsonl/x/y",
    "below a device": "/dev/null/x",
    "in /proc": "/proc/x",
    "below /proc": "/proc/x/y/z",
    "a link to itself": "loop",
    "below a link to itself": "loop/x",
    "a link to nothing": "dangling",
    "below a link to nothing": "dangling/x",
    "too long": "x" * 300,
    "too long, in a folder that is not there": "new/" + "x" * 300,
    "too long in all": "/".join(["x" * 200] * 30),
    "a home folder": "~/x",
    "not UTF-8": "\udcff",
    "not UTF-8, below": "new/\udcff/x",
    "in a folder that is read only": "read_only/x",
}

# {door: a command that is good but for OUT}
DOORS = {
    "sft": "sft --model model --dataset sft.jsonl --steps 1 --output_dir OUT",
    "dpo": "sft --loss dpo --model model --dataset rm.jsonl --steps 1 --output_dir OUT",
    "rm": "rm --model model --dataset rm.jsonl --steps 1 --output_dir OUT",
    "members": "rm --members 2 --model model --dataset rm.jsonl --steps 1 --output_dir OUT/{seed}",
    "ppo": "ppo --model model --dataset ppo.jsonl --reward_model rewards.py:good --output_dir OUT",
    "sae": "sae --model model --layers 1 --dataset sft.jsonl --steps 1 --output_dir OUT",
    "cache": "sae --model model --layers 1 --dataset sft.jsonl --steps 1 "
    "--output_dir o --cache OUT",
    "bon": "bon --model model --dataset ppo.jsonl --reward_model rewards.py:good --output_dir OUT",
    "splits": "bon --model model --dataset ppo.jsonl --eval_splits test b=ppo.jsonl "
    "--reward_model rewards.py:good --output_dir OUT",
    "from": "bon --from answers.jsonl more.jsonl --output_dir OUT",
    "divergence": "probe divergence --model model --policy model --dataset sft.jsonl "
    "--output_dir OUT",
    "evaluate": "probe evaluate --reward_model rewards.py:good --dataset rm.jsonl --output_dir OUT",
    "judge": "probe judge --a answers.jsonl --b answers.jsonl --judge rewards.py:good "
    "--output_dir OUT",
    "human_latents": "probe human_latents --reward_model sarm --dataset sft.jsonl --output OUT",
    "steer": "probe steer --reward_model sarm --dataset rm.jsonl --weights 1:*:0 --output_dir OUT",
    "steer --save": "probe steer --reward_model sarm --dataset rm.jsonl --weights 1:*:0 "
    "--output_dir o --save OUT",
    "overoptimisation": "study overoptimisation --quick --output_dir OUT",
    "feedback_patterns": "study feedback_patterns --quick --output_dir OUT",
    "generalisation": "study generalisation --output_dir OUT",
    "cue_control": "study cue_control --output_dir OUT",
}
# Doors where the empty name says that there is no output, or is only a part of the name.
NO_EMPTY_NAME = ("cache", "steer --save", "members")
# This study writes its texts before it starts anything.
WRITE_FIRST = ("cue_control",)
# These need no model here.
NEED_NO_MODEL = ("from", "evaluate", "judge")


def launch(command, out):
    """A door's command, in this process."""
    kind, *words = [word.replace("OUT", out) for word in shlex.split(command)]
    if kind == "probe":
        run_probe(*words)
    elif kind == "study":
        name, *flags = words
        importlib.import_module(f"nanorlhf.studies.{name}").main(flags)
    else:
        cli.run(ALL_SCRIPTS[kind].Config, ALL_SCRIPTS[kind].main, words)


@pytest.fixture(scope="module")
def place(material, tmp_path_factory):
    """The material, with what the commands and the bad names need. No test changes it."""
    root = tmp_path_factory.mktemp("outputs") / "place"
    shutil.copytree(material, root)
    tiny_sarm(root / "sarm")
    answers = []
    for prompt in ("a hotel", "a cafe"):
        for response in ("good", "bad"):
            answers.append({"prompt": prompt, "response": response})
    for name in ("answers.jsonl", "more.jsonl"):
        write_rows(root / name, answers)
    os.symlink("loop", root / "loop")
    os.symlink("nowhere", root / "dangling")
    os.mkdir(root / "read_only", 0o555)
    return root


class WorkHasBegun(BaseException):
    """No Exception: the scripts would make one line of it, as of a library's error."""


@pytest.fixture
def no_work(place, monkeypatch):
    """The material as the working directory; loading a model, or starting a process, fails."""

    def fail(*args, **kwargs):
        raise WorkHasBegun

    monkeypatch.chdir(place)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", fail)
    monkeypatch.setattr("subprocess.Popen", fail)  # subprocess.run() calls it too


# Each name at one door of each kind, and each door with one name; the whole table is slow.
KINDS_OF_DOORS = ("sft", "human_latents", "cue_control")
CASES = []
for door in DOORS:
    for name in BAD_NAMES:
        marks = [pytest.mark.slow]
        if door in KINDS_OF_DOORS or name == "below a file":
            marks = []
        CASES.append(pytest.param(door, name, id=f"{door}: {name}", marks=marks))


@pytest.mark.parametrize("door, name", CASES)
def test_outputs_that_cannot_be_written(no_work, capfd, door, name):
    if name == "in a folder that is read only" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    if name == "empty" and door in NO_EMPTY_NAME:
        pytest.skip("no name at all")

    before = content()
    with pytest.raises(SystemExit) as end:
        launch(DOORS[door], BAD_NAMES[name])
    assert end.value.code == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert "error: " in error
    assert content() == before


@pytest.mark.parametrize("door", ["sft", "rm", "ppo", "sae", "bon"])
def test_outputs_in_a_folder_that_the_run_reads(no_work, capfd, door):
    """The results would change the model, and the run could not be resumed."""
    before = content()
    with pytest.raises(SystemExit) as end:
        launch(DOORS[door], "model/x")
    assert end.value.code == 2
    assert "error: model/x lies in model, which this run reads" in capfd.readouterr().err
    assert content() == before


def door_cases():
    """The doors as cases of a test; those that write a lot first are slow."""
    cases = []
    for door in DOORS:
        marks = []
        if door in WRITE_FIRST:
            marks = [pytest.mark.slow]
        cases.append(pytest.param(door, marks=marks))
    return cases


@pytest.mark.parametrize("door", door_cases())
def test_the_doors_are_open(no_work, tmp_path, monkeypatch, door):
    """With a good name each goes on to its work: the refusals above are of the name alone."""
    shutil.copytree(".", tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    if door in NEED_NO_MODEL:
        launch(DOORS[door], "new/x")
        assert content("new/x")
    else:
        with pytest.raises(WorkHasBegun):
            launch(DOORS[door], "new/x")


# --------------------------------------------------------------------------- trying to write a file


def test_nothing_stays_behind_of_a_trial(tmp_path, monkeypatch):
    """The folders go that were made for it on the way."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("a")
    files.check_can_write("a/b/c/file")
    assert content() == {"a": "folder"}


def test_a_trial_does_not_touch_a_file_that_is_there(tmp_path, monkeypatch):
    """Whether it may be written over is another question."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("old")
    files.check_can_write("file")
    assert content() == {"file": b"old"}
    with pytest.raises(InputError, match="new/: the name of a folder"):
        files.check_can_write("new/")
    with pytest.raises(InputError, match="file/x cannot be made or written into"):
        files.check_can_write("file/x")
    assert content() == {"file": b"old"}


def test_a_trial_leaves_a_lock_s_folders_to_the_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with locks.unlock_afterwards():
        locks.lock("new/folder")
        files.check_can_write("new/folder/x")
        assert os.listdir("new/folder") == [locks.LOCK_FILE]
    assert content() == {}

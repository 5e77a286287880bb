"""Where results cannot be written: one line and exit code 2 at every door, before a model is loaded, and nothing is made.

The names are real: files, broken links, and folders that the system itself will not write into.
"""

import importlib
import os
import shlex
import shutil
from pathlib import Path

import pytest
import transformers
from support import ALL_SCRIPTS, content, run_probe, tiny_sarm, write_rows

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
    "cache": "sae --model model --layers 1 --dataset sft.jsonl --steps 1 --output_dir o --cache OUT",
    "bon": "bon --model model --dataset ppo.jsonl --reward_model rewards.py:good --output_dir OUT",
    "splits": "bon --model model --dataset ppo.jsonl --eval_splits test b=ppo.jsonl "
    "--reward_model rewards.py:good --output_dir OUT",
    "from": "bon --from answers.jsonl more.jsonl --output_dir OUT",
    "divergence": "probe divergence --model model --policy model --dataset sft.jsonl --output_dir OUT",
    "evaluate": "probe evaluate --reward_model rewards.py:good --dataset rm.jsonl --output_dir OUT",
    "judge": "probe judge --a answers.jsonl --b answers.jsonl --judge rewards.py:good --output_dir OUT",
    "human_latents": "probe human_latents --reward_model sarm --dataset sft.jsonl --output OUT",
    "steer": "probe steer --reward_model sarm --dataset rm.jsonl --weights 1:*:0 --output_dir OUT",
    "steer --save": "probe steer --reward_model sarm --dataset rm.jsonl --weights 1:*:0 "
    "--output_dir o --save OUT",
    "overoptimisation": "study overoptimisation --output_dir OUT",
    "feedback_patterns": "study feedback_patterns --quick --output_dir OUT",
    "generalisation": "study generalisation --output_dir OUT",
    "cue_control": "study cue_control --output_dir OUT",
    "picture": "study cue_control --output_dir o --picture OUT",
}
# The empty name says that there is none, or is no name of the whole.
NO_EMPTY_NAME = ("cache", "steer --save", "picture", "members")


def launch(command, out):
    """A door's command, in this process."""
    kind, *words = [word.replace("OUT", out) for word in shlex.split(command)]
    if kind == "probe":
        run_probe(*words)
    elif kind == "study":
        importlib.import_module(f"nanorlhf.studies.{words[0]}").main(words[1:])
    else:
        cli.run(ALL_SCRIPTS[kind].Config, ALL_SCRIPTS[kind].main, words)


@pytest.fixture(scope="module")
def place(material, tmp_path_factory):
    """The material, with what the commands and the bad names need. No test changes it."""
    root = tmp_path_factory.mktemp("outputs") / "place"
    shutil.copytree(material, root)
    tiny_sarm(root / "sarm")
    answers = [{"prompt": p, "response": r} for p in ("a hotel", "a cafe") for r in ("good", "bad")]
    for name in ("answers.jsonl", "more.jsonl"):
        write_rows(root / name, answers)
    os.symlink("loop", root / "loop")
    os.symlink("nowhere", root / "dangling")
    os.mkdir(root / "read_only", 0o555)
    return root


class WorkHasBegun(BaseException):
    """No error of a library, which would be made a line of."""


@pytest.fixture
def no_work(place, monkeypatch):
    """The material as the working directory; loading a model, or starting a process, fails."""

    def fail(*args, **kwargs):
        raise WorkHasBegun

    monkeypatch.chdir(place)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", fail)
    monkeypatch.setattr("subprocess.run", fail)


# Each name at one door of each kind, and each door with one name; the whole table is slow.
KINDS_OF_DOORS = ("sft", "human_latents", "cue_control")
CASES = []
for door in DOORS:
    for name in BAD_NAMES:
        is_quick = door in KINDS_OF_DOORS or name == "below a file"
        marks = [] if is_quick else [pytest.mark.slow]
        CASES.append(pytest.param(door, name, id=f"{door}: {name}", marks=marks))


@pytest.mark.parametrize("door, name", CASES)
def test_outputs_that_cannot_be_written(no_work, capfd, door, name):
    if name.endswith("read only") and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    if not BAD_NAMES[name] and door in NO_EMPTY_NAME:
        pytest.skip("no name at all")
    before = content()
    with pytest.raises(SystemExit) as exit_:
        launch(DOORS[door], BAD_NAMES[name])
    error = capfd.readouterr().err
    assert exit_.value.code == 2 and len(error.splitlines()) == 1 and "error: " in error, error
    assert content() == before


WRITE_FIRST = ("cue_control", "picture")  # the study writes its texts before it starts anything
ALL_DOORS = [
    pytest.param(door, marks=[pytest.mark.slow] if door in WRITE_FIRST else []) for door in DOORS
]


@pytest.mark.parametrize("door", ALL_DOORS)
def test_the_doors_are_open(no_work, tmp_path, monkeypatch, door):
    """With a good name each goes on to its work: the refusals above are of the name alone."""
    shutil.copytree(".", tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    try:
        launch(DOORS[door], "new/x")
    except WorkHasBegun:
        pass
    else:
        assert door in ("from", "evaluate", "judge")  # which need no model here
        assert len(content("new/x")) > 0


def test_nothing_stays_behind_of_a_trial(tmp_path, monkeypatch):
    """Folders on the way that were made for it go, and what was there stays, also with many at once."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("a")
    files.check_can_write("a/b/c/file")
    assert content() == {"a": "folder"}
    Path("a/file").write_text("old")
    files.check_can_write("a/file")  # whether it may be written over is another question
    assert content() == {"a": "folder", "a/file": b"old"}
    with pytest.raises(InputError, match="a/file/x cannot be made or written into"):
        files.check_can_write("a/file/x")
    with locks.unlock_afterwards():
        locks.lock("a/new/folder")
        files.check_can_write("a/new/folder/x")
        assert os.listdir("a/new/folder") == [locks.LOCK_FILE]
    assert content() == {"a": "folder", "a/file": b"old"}

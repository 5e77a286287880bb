"""Cells (nanorlhf/studies/kept_cells.py): results of single runs that a study keeps in a file.

Runs are made up: a command leaves its own number in its folder.
"""

import json
import shlex
from pathlib import Path

import pytest
from support import refuses

from nanorlhf.studies import common, kept_cells
from nanorlhf.studies.optimisers import Settings


class Killed(BaseException):
    """The study's process ends here."""


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """The commands that have run, in order; they write into folders below the working one."""
    monkeypatch.chdir(tmp_path)
    commands = []

    def run_command(command):
        commands.append(command)
        folder = Path(common.output_of(shlex.split(command)))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(len(commands)))

    monkeypatch.setattr(common, "run_command", run_command)
    monkeypatch.setattr(kept_cells, "describe_commit", lambda: "abc1234")
    return commands


def read_result(folder):
    return {"number": json.loads(Path(folder, "summary.json").read_text()), "nan": float("nan")}


def make_cell(name, flags="", needs=("base", "middle"), out="runs/optimisers"):
    """A cell that needs other runs, each after the one before it."""
    commands = [f"run.py --output_dir {out}/{need}" for need in needs]
    return kept_cells.Cell(name, f"run.py {flags} --output_dir {out}/{name}", commands, read_result)


def settings(**flags):
    return Settings(**{"jobs": 1, **flags})


def run(*cells, **flags):
    return kept_cells.run_cells(list(cells), settings(**flags), "kept.json")


def names_of(commands):
    return [Path(common.output_of(shlex.split(command))).name for command in commands]


def test_what_a_cell_needs_runs_before_it_and_once(ran):
    results = run(make_cell("a"), make_cell("b", needs=("base", "other")))
    assert names_of(ran) == ["base", "middle", "other", "a", "b"]
    assert results == {"a": {"number": 4, "nan": None}, "b": {"number": 5, "nan": None}}


def test_the_file_has_one_cell_on_a_line(ran):
    run(make_cell("b"), make_cell("a"))
    text = Path("kept.json").read_text()
    entry = {
        "command": "run.py  --output_dir runs/optimisers/a",
        "needs": [
            "run.py --output_dir runs/optimisers/base",
            "run.py --output_dir runs/optimisers/middle",
        ],
        "commit": "abc1234",
        "result": {"number": 4, "nan": None},
    }
    assert json.loads(text)["cells"]["a"] == entry
    first, a, b, last = text.splitlines()
    assert json.loads(f"{{{a.rstrip(',')}}}") == {"a": entry}
    assert b.startswith('"b": ')


def test_a_kept_cell_is_not_run_again_nor_what_it_alone_needs(ran, tmp_path, monkeypatch):
    first = run(make_cell("a", needs=("base", "only_a")))
    # Another machine has the file, but not the runs.
    (tmp_path / "runs").rename(tmp_path / "gone")
    ran.clear()
    results = run(make_cell("a", needs=("base", "only_a")), make_cell("b"))
    assert names_of(ran) == ["base", "middle", "b"]
    assert results["a"] == first["a"]
    assert list(results) == ["a", "b"]


def test_a_study_that_was_killed_goes_on(ran, monkeypatch):
    names = "abcdefghijklmnop"
    cells = [make_cell(name) for name in names]
    run_command = common.run_command

    def killed_at_c(command):
        if command.endswith("/c"):
            raise Killed
        run_command(command)

    with monkeypatch.context() as patch:
        patch.setattr(common, "run_command", killed_at_c)
        with pytest.raises(Killed):
            run(*cells)
    # What was done is kept, and the study is not gone through to its end.
    kept = kept_cells.read_cells("kept.json")
    assert {"a", "b"} <= kept.keys() and not kept.keys() & {"c", "p"}

    results = run(*cells)
    assert list(results) == list(names)
    assert sorted(names_of(ran)) == sorted(["base", "middle", *names])


def test_runs_side_by_side_lose_no_result(ran):
    cells = [make_cell(f"cell_{i}") for i in range(12)]
    results = run(*cells, jobs=8)
    assert len(results) == len(kept_cells.read_cells("kept.json")) == 12


def test_a_cell_of_another_command_is_refused(ran):
    run(make_cell("a"))
    before = Path("kept.json").read_text()
    ran.clear()
    other = make_cell("a", flags="--steps 3")
    words = ["kept.json keeps a of another command", "delete its line"]
    refuses(run, make_cell("b"), other, match=words)
    assert not ran
    assert Path("kept.json").read_text() == before


def test_a_cell_after_other_runs_is_refused(ran):
    """Its own command is the same, but the reward model that it needs is another one."""
    run(make_cell("a", needs=("base", "rm --steps 100")))
    before = Path("kept.json").read_text()
    ran.clear()
    words = ["kept.json keeps a after other runs", "--results", "--output_dir"]
    refuses(run, make_cell("a", needs=("base", "rm --steps 3")), match=words)
    assert not ran
    assert Path("kept.json").read_text() == before


def test_a_cell_that_was_kept_without_its_needs_is_valid(ran):
    first = run(make_cell("a"))
    cells = kept_cells.read_cells("kept.json")
    del cells["a"]["needs"]
    kept_cells.write_cells("kept.json", cells)
    ran.clear()
    assert run(make_cell("a", needs=("base", "other"))) == first
    assert not ran


def test_a_run_that_was_there_before_is_of_no_known_commit(ran):
    """The file of results is gone, the folder of a run is not."""
    run(make_cell("a"))
    Path("kept.json").unlink()
    run(make_cell("a"), make_cell("b"))
    kept = kept_cells.read_cells("kept.json")
    assert {name: cell["commit"] for name, cell in kept.items()} == {"a": "unknown", "b": "abc1234"}


def test_the_folder_of_a_study_does_not_matter(ran):
    """Commands are kept in the default folder: no name of a place of this machine."""
    out = "elsewhere/of/this/machine"
    run(make_cell("a", out=out), output_dir=out)
    assert names_of(ran) == ["base", "middle", "a"]
    assert "elsewhere" not in Path("kept.json").read_text()
    run(make_cell("a"))
    assert len(ran) == 3


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not JSON"),
        ("{}", "cells is missing"),
        ('{"cells": {"a": {"command": "run.py"}}}', "a: commit is missing"),
    ],
)
def test_a_damaged_file_is_one_line(ran, text, words):
    Path("kept.json").write_text(text)
    refuses(run, make_cell("a"), match=["kept.json", words])
    assert not ran


@pytest.mark.parametrize(
    "flags, file",
    [
        ({}, "here/study.json"),
        ({"quick": True, "output_dir": "runs/x/quick"}, "runs/x/quick/cells.json"),
        ({"results": "my.json"}, "my.json"),
        ({"results": "my.json", "output_dir": "mine", "ppo_flags": "--lr 1"}, "my.json"),
        ({"quick": True, "sft_flags": "--steps 2"}, "runs/optimisers/cells.json"),
        ({"quick": True, "sft_flags": "--steps 2", "results": "my.json"}, "my.json"),
    ],
)
def test_the_file_of_a_study(flags, file):
    assert kept_cells.results_file(settings(**flags), "here/study.py") == file


@pytest.mark.parametrize("place", [{}, {"results": "my.json"}, {"output_dir": "mine"}])
def test_further_flags_need_a_file_and_a_folder_of_their_own(place):
    """What is in the study's folder is not run again, and would pass for these runs."""
    flags = settings(rm_flags="--steps 3", **place)
    words = ["--rm_flags", "--results", "--output_dir"]
    refuses(kept_cells.results_file, flags, "here/study.py", match=words)


def test_the_commit_says_whether_code_has_changed(tmp_path, monkeypatch):
    def git(*words):
        common.subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    monkeypatch.setattr(kept_cells, "REPO", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert kept_cells.describe_commit() == "unknown"

    for name in ("code.py", "kept.json"):
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    commit = kept_cells.describe_commit()
    assert len(commit) >= 7 and not commit.endswith("+")
    # Results are written while a study runs.
    (tmp_path / "kept.json").write_text("2")
    assert kept_cells.describe_commit() == commit
    (tmp_path / "code.py").write_text("2")
    assert kept_cells.describe_commit() == f"{commit}+"


def test_a_picture_makes_the_folder_that_it_is_drawn_into(tmp_path):
    """Where every run is kept, none has made it."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "folder" / "line.png"
    common.draw_picture(lambda figure, line: figure.subplots().plot(line), [1, 2], str(path))
    assert path.is_file()

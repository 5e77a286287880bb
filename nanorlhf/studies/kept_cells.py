"""The results of single runs that a study keeps in a file beside its page: its cells.

A run whose result is kept is not run again, nor what it alone needs, so that a study prints its
tables at once. The file has one line a cell, with the command and the commit of the code:

    "tuned/rloo/seed_3": {"command": "train_ppo.py ...", "needs": [...], "commit": "1309fe5",
                          "result": {"step": [0, 5, ...], "gold": [-0.6, -0.2, ...], ...}}
"""

import json
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from ..errors import require
from ..runtime.files import check_can_write, check_fields, read_object, replace_file, without_nan
from ..runtime.flags import FlagGroup
from . import common
from .common import REPO


@dataclass
class KeptFlags(FlagGroup):
    """Kept results: the file of all cells"""

    results: str = HfArg(
        default="",
        help="the file that keeps the results of single runs, which are then not run again; by "
        "default NAME.json beside the study's page, with --quick OUTPUT_DIR/quick/cells.json. Two "
        "studies that write one file at the same time would lose results",
    )


@dataclass
class Cell:
    """A run of a study whose result is kept.

    name: it says what the run is, such as tuned/rloo/seed_3.
    needs: the commands that must have run before, each after those that stand ahead of it.
    read: the folder that the command writes -> the result, a small dict of numbers and lists.
    """

    name: str
    command: str
    needs: list[str]
    read: Callable[[str], dict]


def results_file(a, module_file: str) -> str:
    """The file that keeps the cells of a study. module_file: the study's __file__.

    InputError: further flags would mix other runs with those of the study's page, in its file or in
    its folder.
    """
    if a.quick:
        return a.results or f"{a.output_dir}/cells.json"
    has_own_place = a.results and a.output_dir != type(a).output_dir
    for name, value in vars(a).items():
        is_further = name.endswith("_flags") and value
        require(
            has_own_place or not is_further,
            f"--{name} makes other runs: keep them in a file and a folder of their own, --results "
            "and --output_dir",
        )
    return a.results or str(Path(module_file).with_suffix(".json"))


def run_cells(cells: list[Cell], a, path: str) -> dict[str, dict]:
    """The results of cells, {name: result}. Those that the file does not keep yet are run first.

    a: the study's settings. Neither a kept cell is run again, nor what it alone needs. Each result
    is written as soon as it is there. InputError: the file cannot be written; a cell is kept with
    another command, or after other runs.
    """
    # A file that cannot be written is an error now, and not after hours of runs.
    check_can_write(path)
    kept_cells = read_cells(path)
    missing = []
    for cell in cells:
        if cell.name in kept_cells:
            check_cell(cell, kept_cells[cell.name], a, path)
        else:
            missing.append(cell)

    # What a cell needs is run first, and each command once, however many cells need it.
    for stage in stages_of(missing):
        common.run_stage(stage, a.jobs)

    signal.signal(signal.SIGTERM, common.end_with_commands)
    # After an error, or Ctrl-C, map() does not begin the runs that wait.
    with ThreadPoolExecutor(a.jobs) as workers:
        for _ in workers.map(lambda cell: run_and_keep(cell, a, path), missing):
            pass

    # All results come from the file, the new ones too: tables show what the file's readers find.
    kept_cells = read_cells(path)
    return {cell.name: kept_cells[cell.name]["result"] for cell in cells}


def stages_of(cells: list[Cell]) -> list[list[str]]:
    """The commands that cells need, each once. Stage i has the i-th need of every cell."""
    # Two cells may need one command in different stages. It runs in the earlier one.
    most_needs = max([len(cell.needs) for cell in cells], default=0)
    stages = []
    listed = set()
    for i in range(most_needs):
        stage = {}  # a set that keeps the order
        for cell in cells:
            stage |= dict.fromkeys(cell.needs[i : i + 1])
        new = [command for command in stage if command not in listed]
        listed.update(new)
        stages.append(new)
    return stages


def check_cell(cell: Cell, entry: dict, a, path: str):
    """InputError: a result that is kept is of other settings. It would pass for this cell's."""
    require(
        entry["command"] == kept_form(cell.command, a),
        f"{path} keeps {cell.name} of another command than the study has now: delete its line, "
        "or name another file with --results",
    )
    # Lines that were written before needs were kept do not say theirs.
    needs = kept_needs(cell, a)
    require(
        entry.get("needs", needs) == needs,
        f"{path} keeps {cell.name} after other runs than the study has now: name another file "
        "with --results, and another folder with --output_dir",
    )


# Runs of this process end side by side, but one at a time adds its result to the file.
FILE_OF_CELLS = threading.Lock()


def run_and_keep(cell: Cell, a, path: str):
    """Run a cell's command, read its result and add it to the file.

    A run that is done already says so by itself. It ends with an error if its folder holds a run
    with other settings.
    """
    commit = describe_commit()
    # Nothing says which code a run is of that was there before.
    if common.is_finished(cell.command):
        commit = "unknown"
    common.run_command(cell.command)
    folder = common.output_of(shlex.split(cell.command))
    entry = {
        "command": kept_form(cell.command, a),
        "needs": kept_needs(cell, a),
        "commit": commit,
        "result": without_nan(cell.read(folder)),
    }
    # The file is read again before it is written: other commands have added their cells since.
    with FILE_OF_CELLS:
        write_cells(path, read_cells(path) | {cell.name: entry})
    print(f"kept: {cell.name} of python {cell.command}", flush=True)


def kept_form(command: str, a) -> str:
    """A command as it is kept: in the study's default folder, wherever it has run."""
    # "--output_dir runs/again/ppo" -> "--output_dir runs/optimisers/ppo". A judge is llm:FOLDER.
    for mark in (" ", "llm:"):
        command = command.replace(f"{mark}{a.output_dir}/", f"{mark}{type(a).output_dir}/")
    return command


def kept_needs(cell: Cell, a) -> list[str]:
    """What a cell needs, as it is kept."""
    return [kept_form(command, a) for command in cell.needs]


def read_cells(path: str) -> dict[str, dict]:
    """{name: {command, needs, commit, result}} of a file; none where there is no file yet.

    Lines that were written before needs were kept have none.
    """
    if not os.path.exists(path):
        return {}
    cells = read_object(path, {"cells": dict})["cells"]
    for name, cell in cells.items():
        fields = {"command": str, "needs": list[str] | None, "commit": str, "result": dict}
        check_fields(cell, fields, f"{path}: {name}")
    return cells


def write_cells(path: str, cells: dict[str, dict]):
    """Write a file of cells, one on a line, sorted by name: a changed result is a changed line."""
    lines = []
    for name in sorted(cells):
        lines.append(f"{json.dumps(name)}: {json.dumps(cells[name])}")
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write('{"cells": {\n' + ",\n".join(lines) + "\n}}\n")
    replace_file(path)


def describe_commit() -> str:
    """The commit of this code, with + where Python files of it have changed since.

    "unknown" where the code is not under git.
    """
    try:
        commit = ask_git("rev-parse", "--short", "HEAD")
        # Only Python files count: the study itself changes its JSON file of results.
        changes = ask_git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    if changes:
        return f"{commit}+"
    return commit


def ask_git(*words: str) -> str:
    """What a git command says of the repository."""
    done = subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True, check=True)
    return done.stdout.strip()

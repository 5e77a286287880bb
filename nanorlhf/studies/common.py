"""What the studies share: their flags, plain commands run side by side, results that are kept, and
what their tables and pictures have in common.

A study is a series of stages. A stage is a list of command lines that can run side by side, such as
"train_sft.py --output_dir runs/study/sft"; the next stage reads what they have written. Each
command runs in a process of its own and is printed, so that a reader can repeat it. A command that
has run already is not run again, and one that was killed goes on where it was: a study that was
stopped is continued by the same command.

Some studies keep what each of their runs has found in a file beside their page: their cells.
"""

import json
import math
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from ..errors import at_least, require
from ..runtime import cli
from ..runtime.files import (
    check_can_write,
    check_fields,
    check_name,
    read_object,
    replace_file,
    without_nan,
    write_json,
)
from ..runtime.flags import FlagGroup
from ..runtime.plots import save
from ..stats import t_interval

REPO = Path(__file__).resolve().parents[2]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


# ------------------------------------------------------------------------------------------- flags


@dataclass
class StudyFlags(FlagGroup):
    """The study: its folder, its seeds, how it runs"""

    output_dir: str = HfArg(
        default="runs/study", help="the folder of all runs, of tables and of pictures"
    )
    seeds: int = HfArg(default=5, help="how many seeds the study is repeated with")
    jobs: int = HfArg(default=2, help="how many commands run side by side")
    quick: bool = HfArg(
        default=False,
        help="a few minutes: one seed, and fewer and shorter runs, in OUTPUT_DIR/quick; flags "
        "that are given still hold",
    )
    sft_flags: str = HfArg(default="", help="further flags of train_sft.py")
    rm_flags: str = HfArg(default="", help="further flags of train_rm.py")
    ppo_flags: str = HfArg(default="", help="further flags of train_ppo.py")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "seeds", "jobs")


@dataclass
class KeptFlags(FlagGroup):
    """Kept results: the file of all cells"""

    results: str = HfArg(
        default="",
        help="the file that keeps the results of single runs, which are then not run again; by "
        "default NAME.json beside the study's page, with --quick OUTPUT_DIR/quick/cells.json. Two "
        "studies that write one file at the same time would lose results",
    )


def read_flags(config_class, doc: str, args: list[str] | None, quick: dict):
    """The flags of a study; with --quick the defaults are those of `quick`, {flag: value}.

    doc: the study's docstring, for --help. A quick study has a folder inside the study's, and so
    has a study on your own model or data, unless you name another folder. In the same folder their
    runs would be taken for the study's, since what is there is not run again.
    """
    with cli.errors_in_one_line():
        # With --quick the command line is read twice. The second time the quick values are the
        # defaults, and flags that are given still win over them.
        parser = cli.Parser(cli.script(), doc, config_class)
        flags = config_class(**vars(parser.parse_args(args)))
        check_name(flags.output_dir)
        if flags.quick:
            parser.set_defaults(**quick)
            flags = config_class(**vars(parser.parse_args(args)))
        # A study that is itself of a real model has no --dataset.
        has_own = False
        if hasattr(flags, "dataset"):
            has_own = bool(flags.dataset or getattr(flags, "model", ""))
        # Only the default folder gets own/: a folder that was named is the user's own choice.
        if has_own and flags.output_dir == config_class.output_dir:
            flags.output_dir += "/own"
        if flags.quick:
            flags.output_dir += "/quick"
        check_can_write(f"{flags.output_dir}/summary.json")
        return flags


# ---------------------------------------------------------------------------------------- commands


def join(*words: str) -> str:
    """A command line of these words, without the empty ones."""
    return " ".join(word for word in words if word)


def run_stage(commands: list[str], jobs: int, is_done: Callable[[str], bool] | None = None):
    """Run those commands of a stage that are not done yet, `jobs` at a time; print each that ends.

    is_done(command): whether it is done; by default is_finished(). SystemExit: a command failed.
    """
    is_done = is_done or is_finished
    # A stage that was interrupted goes on with what is missing.
    missing = [command for command in commands if not is_done(command)]
    with ThreadPoolExecutor(jobs) as workers:
        # map() gives results in the order of the commands: a line is printed when its command and
        # all before it have ended.
        for command, _ in zip(missing, workers.map(run_command, missing)):
            print(f"done: python {command}", flush=True)


def run_command(command: str):
    """Run one command in a process of its own, on one thread.

    Its output goes into a log beside its folder.
    """
    script, *flags = shlex.split(command)
    # runs/study/rm/seed_{seed} -> runs/study/rm/seed_members.log
    log = Path(output_of(flags).replace("{seed}", "members") + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    # One thread each: several commands share the machine, and a run gives the same bits again only
    # on the same number of threads.
    with open(log, "w") as f:
        code = subprocess.run(
            [sys.executable, str(REPO / script), *flags],
            stdout=f,
            stderr=subprocess.STDOUT,
            env=os.environ | ONE_THREAD,
        ).returncode
    if code:
        raise SystemExit(f"python {command}\nended with exit code {code}: see {log}")


def output_of(words: list[str]) -> str:
    """The folder, or the file, that a command writes."""
    flag = "--output_dir" if "--output_dir" in words else "--output"
    return words[words.index(flag) + 1]


def is_finished(command: str) -> bool:
    """Whether the folder of a command holds a finished run, or its file is there.

    Of several members, {seed} in the folder's name, it is the last one's folder that counts.
    """
    words = shlex.split(command)
    # Members are trained one after another, with the seeds --seed, --seed + 1, ...: when the last
    # one is done, all are.
    numbers = {"--seed": 0, "--members": 1}
    for flag in numbers:
        if flag in words:
            numbers[flag] = int(words[words.index(flag) + 1])
    last_member = numbers["--seed"] + numbers["--members"] - 1
    output = Path(output_of(words).replace("{seed}", str(last_member)))
    return (output / "summary.json").is_file() or output.is_file()


# -------------------------------------------------------------------------------------------- cells


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
        run_stage(stage, a.jobs)

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
    if is_finished(cell.command):
        commit = "unknown"
    run_command(cell.command)
    folder = output_of(shlex.split(cell.command))
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


# ------------------------------------------------------------------------------ tables and pictures


def print_title(title: str, a):
    """A table's title after an empty line.

    That of a quick study says that it is one, and of how many seeds.
    """
    mark = ""
    if a.quick:
        seeds = "one seed" if a.seeds == 1 else f"{a.seeds} seeds"
        mark = f" [QUICK, {seeds}: not the study's numbers]"
    print(f"\n{title}{mark}")


def describe_numbers(a) -> str:
    """What the numbers of a table are, as a part of its title."""
    if a.seeds == 1:
        return "of one seed, so without intervals"
    return f"mean over {a.seeds} seeds +- half-width of its 95% t interval"


def with_interval(mean: float, half_width: float, digits: int = 3) -> str:
    """'0.123 +- 0.045'; the mean alone where there is no interval, as of a single seed."""
    if math.isnan(half_width):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} +- {half_width:.{digits}f}"


def as_text(numbers: list[float], most: int) -> str:
    """Mean +- half-width of the seeds' numbers, with their count where it is less than `most`."""
    if not numbers:
        return "-"
    mean, half_width = t_interval(numbers)
    text = with_interval(mean, half_width)
    if len(numbers) < most:
        text += f" ({len(numbers)})"
    return text


def collect(rows) -> dict[str, list[float]]:
    """Rows {column: number or None} of the seeds -> {column: the numbers}."""
    # A column that no seed has a number for stays, as an empty list.
    columns = {}
    for row in rows:
        for column, number in row.items():
            numbers = columns.setdefault(column, [])
            if number is not None:
                numbers.append(number)
    return columns


def write_summary(path: str | Path, summary: dict):
    """A study's summary as JSON.

    JSON knows no NaN: null stands for each, such as the interval of a single seed.
    """
    write_json(str(path), without_nan(summary))


def draw_picture(draw: Callable, what, path: str):
    """draw(figure, what) into a file; print its path, or that there is none without matplotlib."""
    # Where every run of a study is kept, none has made its folder.
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    print(save(draw, what, path) or "no picture: matplotlib is not installed")

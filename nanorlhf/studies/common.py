"""What the studies share: their flags, plain commands run side by side, and what their tables and
pictures have in common.

A study is a series of stages. A stage is a list of command lines that can run side by side, such as
"train_sft.py --output_dir runs/study/sft"; the next stage reads what they have written. Each
command runs in a process of its own and is printed, so that a reader can repeat it. A command that
has run already is not run again, and one that was killed goes on where it was: a study that was
stopped is continued by the same command.

Some studies keep what each of their runs has found: kept_cells.py.
"""

import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from ..errors import at_least
from ..runtime import cli
from ..runtime.files import (
    check_can_write,
    check_name,
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
    signal.signal(signal.SIGTERM, end_with_commands)
    is_done = is_done or is_finished
    # A stage that was interrupted goes on with what is missing.
    missing = [command for command in commands if not is_done(command)]
    with ThreadPoolExecutor(jobs) as workers:
        # map() gives results in the order of the commands: a line is printed when its command and
        # all before it have ended.
        for command, _ in zip(missing, workers.map(run_command, missing)):
            print(f"done: python {command}", flush=True)


running: set[subprocess.Popen] = set()  # the processes of the commands that run now


def end_with_commands(number: int, frame):
    """What SIGTERM does to a study: it ends the commands that run, and then the study itself.

    Ctrl-C needs no help: a terminal sends it to the commands too.
    """
    for process in list(running):
        process.terminate()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


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
        process = subprocess.Popen(
            [sys.executable, str(REPO / script), *flags],
            stdout=f,
            stderr=subprocess.STDOUT,
            env=os.environ | ONE_THREAD,
        )
        running.add(process)
        code = process.wait()
        running.remove(process)
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

"""Runs that end before their time, and go on.

They are killed at any moment, interrupted by Ctrl-C, out of disk space, or resumed from a damaged
checkpoint. All are real processes, and all must end with the bits of a run that was left alone.
`pytest --kills 50` kills each script 50 times.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import (
    ALL_SCRIPTS,
    ENV,
    KILL_SETTINGS,
    REPO,
    STATEFUL,
    assert_bit_equal,
    assert_same_run,
    command_line,
    flags,
    fork,
    join,
    launch,
    ranks,
    small,
    wait_for,
)

from nanorlhf.runtime import files
from nanorlhf.runtime.checkpoint import checkpoints

pytestmark = pytest.mark.slow

MORE = {
    "sft": {"steps": 12, "checkpoint_every": 2, "eval_every": 5},
    "rm": {"steps": 12, "checkpoint_every": 2, "label_noise": 0.2},
    "ppo": {"steps": 6, "checkpoint_every": 1, "eval_every": 2, **STATEFUL},
}


def arguments(base, name):
    return flags(small(base, name, **MORE.get(name, {})))


def start(name, folder, args, **env):
    """A script's command in a process of its own."""
    return fork(command_line, name, "--output_dir", str(folder), *args, **env)


def start_two(name, folder, args, **env):
    """A script's command on two processes."""
    return ranks(2, command_line, name, "--output_dir", str(folder), *args, **env)


def wait_for_checkpoints(folder, n=1, seconds=120):
    wait_for(lambda: len(checkpoints(str(folder))) >= n, seconds)


def lines_of_stderr(text):
    """What a script says on stderr besides its progress line, which begins with its name."""
    return [line for line in text.splitlines() if not line.startswith("sft ")]


def flip_bit(path, place, bit):
    """Turn one bit of a file over."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


# ------------------------------------------------------------------------------ kills at any moment


def steps_in(folder):
    """How many rows of metrics a run has written so far."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    return len(files.read_rows(path))


class Killer:
    """Starts a script again and again in one folder, and kills it at random moments."""

    def __init__(self, name, args, duration, wanted, chance):
        self.name = name
        self.args = args
        self.duration = duration  # of a whole run, in seconds
        self.wanted = wanted  # how many kills
        self.chance = chance
        self.moments = []  # (steps that were logged, seconds) of each kill

    def run_until_done(self, folder):
        """Start and kill a run until it is done.

        Once there were as many kills as are wanted, the script itself goes on, as a user would
        start it.
        """
        while len(self.moments) < self.wanted:
            if self.is_done_before_a_kill(folder):
                return
        process = launch(self.name, "--output_dir", str(folder), *self.choose_args(folder))
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, (error, self.moments)

    def choose_args(self, folder):
        """A run goes on by the same command, or by --resume alone."""
        begun = self.name != "bon" and (folder / "config.json").exists()
        if begun and self.chance.random() < 0.5:
            return ["--resume"]
        return self.args

    def is_done_before_a_kill(self, folder):
        """Start the run and kill it, unless it is done before."""
        process = start(self.name, folder, self.choose_args(folder))
        if self.moments or self.name == "bon":
            pause = self.chance.uniform(0, self.duration)
        else:
            # The first kill falls once a few steps are logged.
            wait_for(lambda: process.exitcode is not None or steps_in(folder) > 2)
            pause = self.chance.uniform(0, 0.1)
        process.join(pause)
        if process.exitcode is None:
            process.kill()
            self.moments.append((steps_in(folder), round(pause, 2)))
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL), self.moments
        return process.exitcode == 0


@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_killed_at_moments_that_nobody_chose(base, tmp_path, name, request):
    """SIGKILL as often as --kills says, at any moment from a process's start on.

    However often a run was killed, it ends as one that was left alone.
    """
    seed = time.time_ns()
    print("seed", seed)
    args = arguments(base, name)
    whole = tmp_path / "whole"
    # The first process waits for the server that forks.
    join(fork(time.sleep, 0))
    begun = time.time()
    join(start(name, whole, args))
    duration = time.time() - begun

    wanted = request.config.getoption("--kills")
    killer = Killer(name, args, duration, wanted, random.Random(seed))
    runs = 0
    while len(killer.moments) < wanted:
        runs += 1
        folder = tmp_path / f"run_{runs}"
        killer.run_until_done(folder)
        # A kill after summary.json leaves the lock file. Nobody holds it, and it means nothing.
        (folder / ".lock").unlink(missing_ok=True)
        assert_same_run(name, whole, folder)

        # The same command tidies up what else such a kill left.
        join(start(name, folder, args))
        assert_same_run(name, whole, folder)
        assert not (folder / "checkpoint").exists()
        shutil.rmtree(folder)
    print(f"{name}: in {runs} runs of {duration:.1f} s killed at {killer.moments}")


# ------------------------------------------------------------------------------------------- Ctrl-C

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TOLD = "train_sft.py: interrupted; the last checkpoint is kept: --resume continues"


def interrupt_group(base, folder, launcher):
    """Start a script with this launcher and send SIGINT, as a terminal does, to all its processes.

    Returns the process that was started, and what was said on stderr.
    """
    settings = small(base, "sft", **{**KILL_SETTINGS["sft"], "steps": 100})
    script = [str(REPO / "train_sft.py"), "--output_dir", str(folder), *flags(settings)]
    process = subprocess.Popen(
        [sys.executable, *launcher, *script],
        cwd=REPO,
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait_for_checkpoints(folder)
    assert process.poll() is None, "it ended too early"
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    return process, error


def test_ctrl_c(base, tmp_path):
    process, error = interrupt_group(base, tmp_path / "run", launcher=[])
    assert process.returncode == 130
    assert lines_of_stderr(error) == [TOLD]
    assert checkpoints(str(tmp_path / "run"))


def test_ctrl_c_under_torchrun(base, tmp_path):
    """torchrun says a lot by itself, but the scripts say one line, and no traceback."""
    _, error = interrupt_group(base, tmp_path / "run", TORCHRUN)
    assert lines_of_stderr(error).count(TOLD) == 1
    assert "KeyboardInterrupt" not in error
    assert 'train_sft.py", line' not in error
    assert checkpoints(str(tmp_path / "run"))


def test_ctrl_c_and_resume(base, tmp_path):
    args = flags(small(base, "ppo", **KILL_SETTINGS["ppo"]))
    process = start("ppo", tmp_path / "run", args, STDERR=str(tmp_path / "stderr"), RANK="0")
    wait_for_checkpoints(tmp_path / "run")
    os.kill(process.pid, signal.SIGINT)
    join(process, code=130)
    error = (tmp_path / "stderr_0").read_text()
    assert "--resume continues" in error
    assert "Traceback" not in error

    join(start("ppo", tmp_path / "run", ["--resume"]))
    join(start("ppo", tmp_path / "whole", args))
    assert_bit_equal(tmp_path / "whole", tmp_path / "run")


def test_ctrl_c_on_two_processes(base, tmp_path):
    """One waits for the other inside a collective call when the signal comes.

    Both exit with code 130, and one of them says why.
    """
    args = flags(small(base, "sft", steps=200, checkpoint_every=1))
    processes = start_two("sft", tmp_path / "run", args, STDERR=str(tmp_path / "stderr"))
    wait_for_checkpoints(tmp_path / "run")
    for process in processes:
        os.kill(process.pid, signal.SIGINT)
    join(*processes, code=130)

    lines = []
    for rank in (0, 1):
        lines += lines_of_stderr((tmp_path / f"stderr_{rank}").read_text())
    (line,) = lines
    assert "interrupted" in line


# -------------------------------------------------------------------------------------- a full disk


def limit_files(process, size):
    """From now on a process can write no file longer than this, as with ulimit -f.

    To the process it looks as a full disk does.
    """
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


def check_no_room(errors):
    """One line says that there was no room, and the line before it, if any, is no error."""
    assert "Traceback" not in errors
    assert errors.count("error: no room to write") == 1
    lines = errors.splitlines()
    if len(lines) > 1:
        assert "error" not in lines[-2]


def check_goes_on(base, name, tmp_path):
    """Once there is room the same command goes on, and ends as a run that was left alone."""
    args = arguments(base, name)
    join(start(name, tmp_path / "run", args))
    join(start(name, tmp_path / "whole", args))
    assert_same_run(name, tmp_path / "whole", tmp_path / "run")


def start_with_stderr(base, name, tmp_path):
    args = arguments(base, name)
    return start(name, tmp_path / "run", args, STDERR=str(tmp_path / "stderr"), RANK="0")


def test_no_room_for_a_checkpoint(base, tmp_path):
    process = start_with_stderr(base, "ppo", tmp_path)
    wait_for_checkpoints(tmp_path / "run")
    limit_files(process, 100_000)
    join(process, code=1)
    check_no_room((tmp_path / "stderr_0").read_text())
    assert checkpoints(str(tmp_path / "run"))
    check_goes_on(base, "ppo", tmp_path)


def test_no_room_for_a_row_of_the_metrics(base, tmp_path):
    process = start_with_stderr(base, "rm", tmp_path)
    wait_for_checkpoints(tmp_path / "run")
    size = (tmp_path / "run/metrics.jsonl").stat().st_size
    limit_files(process, size + 10)
    join(process, code=1)
    check_no_room((tmp_path / "stderr_0").read_text())
    assert checkpoints(str(tmp_path / "run"))
    check_goes_on(base, "rm", tmp_path)


def test_no_room_for_the_answers_of_best_of_n(base, tmp_path):
    process = start_with_stderr(base, "bon", tmp_path)
    wait_for((tmp_path / "run/config.json").exists)
    limit_files(process, 2_000)
    join(process, code=1)
    check_no_room((tmp_path / "stderr_0").read_text())
    check_goes_on(base, "bon", tmp_path)


# ------------------------------------------------------------------------------ damaged checkpoints


@pytest.mark.parametrize(
    "kind, second_says",
    [
        # Only the main process writes checkpoints: the other one is told that it has failed.
        ("ddp", "another process"),
        ("fsdp", "no room to write"),
    ],
)
def test_two_processes_out_of_room_and_with_a_damaged_checkpoint(base, tmp_path, kind, second_says):
    """Both processes end in one line, and both go on from the same older checkpoint.

    The newest one is damaged, with fsdp in the shard of the second process alone.
    """
    settings = small(base, "sft", steps=8, checkpoint_every=1, distributed=kind)
    args = flags(settings)
    join(*start_two("sft", tmp_path / "whole", args))
    processes = start_two("sft", tmp_path / "run", args, STDERR=str(tmp_path / "stderr"))
    wait_for_checkpoints(tmp_path / "run", 2)
    for process in processes:
        limit_files(process, 100_000)
    join(*processes, code=1)
    (line,) = lines_of_stderr((tmp_path / "stderr_0").read_text())
    assert "no room to write" in line
    (line,) = lines_of_stderr((tmp_path / "stderr_1").read_text())
    assert second_says in line

    _, newest = checkpoints(str(tmp_path / "run"))[-1]
    last_file = sorted(Path(newest).glob("*.safetensors"))[-1]
    flip_bit(last_file, last_file.stat().st_size // 2, bit=4)
    join(*start_two("sft", tmp_path / "run", args, STDERR=str(tmp_path / "again")))
    assert_bit_equal(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("name", ["ppo", "sae"])
def test_a_script_goes_on_from_the_checkpoint_before_the_damaged_one(base, tmp_path, name, capfd):
    args = [*arguments(base, name), "--keep_checkpoints", "2"]
    process = start(name, tmp_path / "run", args)
    wait_for_checkpoints(tmp_path / "run", 2)
    process.kill()
    process.join()
    (_, older), (_, newest) = checkpoints(str(tmp_path / "run"))[-2:]
    file = Path(newest) / "state.safetensors"
    place = random.Random(name).randrange(file.stat().st_size)
    flip_bit(file, place, bit=0)

    command_line(name, "--output_dir", str(tmp_path / "run"), *args)
    said = [line for line in capfd.readouterr().out.splitlines() if "cannot be used" in line]
    problem = f"{newest} cannot be used: state.safetensors differs from its checksum"
    assert said == [f"{problem}; {os.path.basename(older)} is taken instead"]
    join(start(name, tmp_path / "whole", args))
    assert_same_run(name, tmp_path / "whole", tmp_path / "run")

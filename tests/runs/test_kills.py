"""Runs that end before their time: killed at any moment, interrupted by Ctrl-C, out of disk space, resumed from a damaged checkpoint.

All are real processes, and all must end with the bits of a run that was left alone. `pytest --kills 50` kills each script 50 times.
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


# ------------------------------------------------------------------------------------------------------------ kills at any moment


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_killed_at_moments_that_nobody_chose(base, tmp_path, name, request):
    """SIGKILL as often as --kills says, and the run goes on until it is done: by the same command, or by --resume alone.

    The first kill falls once a few steps are logged, the others at any moment from a process's start on. After the last one the
    script itself goes on, as a user would start it.
    """
    wanted, kills, runs, moments = request.config.getoption("--kills"), 0, 0, []
    seed = time.time_ns()
    chance = random.Random(seed)
    args, whole = arguments(base, name), tmp_path / "whole"
    join(fork(time.sleep, 0))  # the first one waits for the server that forks
    begun = time.time()
    join(start(name, whole, args))
    duration = time.time() - begun
    while kills < wanted:
        runs += 1
        folder, done = tmp_path / f"run_{runs}", False
        while not done:
            again = args
            if name != "bon" and (folder / "config.json").exists() and chance.random() < 0.5:
                again = ["--resume"]
            if kills == wanted:
                process = launch(name, "--output_dir", str(folder), *again)
                _, error = process.communicate(timeout=120)
                assert process.returncode == 0, (error, seed, moments)
                break
            process = start(name, folder, again)
            if kills == 0 and name != "bon":
                wait_for(lambda: process.exitcode is not None or steps_in(folder) > 2)
                pause = chance.uniform(0, 0.1)
            else:
                pause = chance.uniform(0, duration)
            process.join(pause)
            if process.exitcode is None:
                process.kill()
                kills += 1
                moments.append((steps_in(folder), round(pause, 2)))
            process.join(120)
            assert process.exitcode in (0, -signal.SIGKILL), (seed, moments)
            done = process.exitcode == 0
        # A kill after summary.json leaves the lock file, which nobody holds and which means nothing.
        (folder / ".lock").unlink(missing_ok=True)
        assert_same_run(name, whole, folder)
        join(start(name, folder, args))  # what a kill after summary.json left is tidied
        assert_same_run(name, whole, folder)
        assert not (folder / "checkpoint").exists()
        shutil.rmtree(folder)
    print(f"{name}: {kills} kills in {runs} runs of {duration:.1f} s, at {moments}; seed {seed}")


def steps_in(folder):
    """How many rows of metrics a run has written so far."""
    path = folder / "metrics.jsonl"
    return len(files.read_rows(path)) if path.exists() else 0


# ------------------------------------------------------------------------------------------------------------------------ Ctrl-C


def wait_while_they_run(condition, processes, seconds=120):
    """Until condition() is true, while the processes run."""
    until = time.time() + seconds
    while not condition():
        assert time.time() < until and all(process.poll() is None for process in processes), (
            "it ended too early"
        )
        time.sleep(0.01)


def has_checkpoint(folder, at_least=1):
    return lambda: len(checkpoints(str(folder))) >= at_least


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c(base, tmp_path, processes):  # noqa: F811
    """As from a terminal: SIGINT for the whole group of processes, the script's and torchrun's."""
    settings = [
        "--output_dir",
        str(tmp_path / "run"),
        *flags(small(base, "sft", **{**KILL_SETTINGS["sft"], "steps": 100})),
    ]
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        if processes == 2
        else []
    )
    run = [sys.executable, *launcher, str(REPO / "train_sft.py"), *settings]
    process = subprocess.Popen(
        run,
        cwd=REPO,
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait_while_they_run(has_checkpoint(tmp_path / "run"), [process])
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    told = "train_sft.py: interrupted; the last checkpoint is kept: --resume continues"
    ours = [
        line for line in error.splitlines() if not line.startswith("sft ")
    ]  # without the progress lines
    if processes == 1:
        assert process.returncode == 130 and ours == [told]
    else:
        assert (
            ours.count(told) == 1
            and "KeyboardInterrupt" not in error
            and 'train_sft.py", line' not in error
        )
    assert checkpoints(str(tmp_path / "run"))


@pytest.mark.slow
def test_ctrl_c_and_resume(base, tmp_path):  # noqa: F811
    args = flags(small(base, "ppo", **KILL_SETTINGS["ppo"]))
    process = start("ppo", tmp_path / "run", args, STDERR=str(tmp_path / "stderr"), RANK="0")
    while not checkpoints(str(tmp_path / "run")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    join(process, code=130)
    assert "--resume continues" in (tmp_path / "stderr_0").read_text()
    assert "Traceback" not in (tmp_path / "stderr_0").read_text()
    join(fork(command_line, "ppo", "--output_dir", str(tmp_path / "run"), "--resume"))
    join(start("ppo", tmp_path / "whole", args))
    assert_bit_equal(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_ctrl_c_on_two_processes(base, tmp_path):  # noqa: F811
    """One waits for the other inside a collective call when the signal comes: both exit 130, one of them says why."""
    args = flags(small(base, "sft", steps=200, checkpoint_every=1))
    processes = ranks(
        2,
        command_line,
        "sft",
        "--output_dir",
        str(tmp_path / "run"),
        *args,
        STDERR=str(tmp_path / "stderr"),
    )
    while not checkpoints(str(tmp_path / "run")):
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid, signal.SIGINT)
    join(*processes, code=130)
    lines = [
        line
        for rank in range(2)
        for line in (tmp_path / f"stderr_{rank}").read_text().splitlines()
        if not line.startswith("sft ")
    ]
    assert len(lines) == 1 and "interrupted" in lines[0]


# ------------------------------------------------------------------------------------------------------------------- a full disk


def limit(process, size):
    """From now on a process can write no file longer than this, as with ulimit -f: what a full disk looks like to it."""
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("ppo", 100_000), ("rm", "metrics"), ("bon", 2_000)])
def test_no_room_on_the_disk(base, tmp_path, name, size):  # noqa: F811
    """A checkpoint, or a row of the metrics, cannot be written: one line, exit 1, and once there is room the run goes on."""
    args, folder = arguments(base, name), tmp_path / "run"
    process = start(name, folder, args, STDERR=str(tmp_path / "stderr"), RANK="0")
    ready = has_checkpoint(folder) if name != "bon" else (folder / "config.json").exists
    while not ready():
        time.sleep(0.001)
    limit(process, (folder / "metrics.jsonl").stat().st_size + 10 if size == "metrics" else size)
    join(process, code=1)
    errors = (tmp_path / "stderr_0").read_text()
    assert (
        "Traceback" not in errors
        and len([line for line in errors.splitlines() if "error: no room to write" in line]) == 1
    )
    assert not errors.splitlines()[:-1] or "error" not in errors.splitlines()[-2]
    assert name == "bon" or checkpoints(str(folder))
    join(start(name, folder, args))
    join(start(name, tmp_path / "whole", args))
    assert_same_run(name, tmp_path / "whole", folder)


# ------------------------------------------------------------------------------------------------------------ several processes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_out_of_room_and_with_a_damaged_checkpoint(base, tmp_path, kind):  # noqa: F811
    """Both processes end in one line; and both take the same older checkpoint where the newest is damaged, in one process's shard."""
    args = [*flags(small(base, "sft", steps=8, checkpoint_every=1)), "--distributed", kind]

    def on_two(folder, **env):
        return ranks(2, command_line, "sft", "--output_dir", str(folder), *args, **env)

    join(*on_two(tmp_path / "whole"))
    processes = on_two(tmp_path / "run", STDERR=str(tmp_path / "stderr"))
    while not has_checkpoint(tmp_path / "run", 2)():
        time.sleep(0.001)
    for process in processes:
        limit(process, 100_000)
    join(*processes, code=1)
    for rank, said in (
        (0, "no room to write"),
        (1, "no room to write" if kind == "fsdp" else "another process"),
    ):
        lines = [
            line
            for line in (tmp_path / f"stderr_{rank}").read_text().splitlines()
            if not line.startswith("sft ")
        ]
        assert len(lines) == 1 and said in lines[0], lines

    newest = Path(checkpoints(str(tmp_path / "run"))[-1][1])
    file = sorted(newest.glob("*.safetensors"))[-1]  # with fsdp the second process's
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    join(*on_two(tmp_path / "run", STDERR=str(tmp_path / "again")))
    assert_bit_equal(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "sae"])
def test_a_script_goes_on_from_the_checkpoint_before_the_damaged_one(base, tmp_path, name, capfd):  # noqa: F811
    args = [*arguments(base, name), "--keep_checkpoints", "2"]
    process = start(name, tmp_path / "run", args)
    while not has_checkpoint(tmp_path / "run", 2)():
        time.sleep(0.001)
    process.kill()
    process.join()
    (_, older), (_, newest) = checkpoints(str(tmp_path / "run"))[-2:]
    file = Path(newest) / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[random.Random(name).randrange(len(content))] ^= 1
    file.write_bytes(content)
    command_line(name, "--output_dir", str(tmp_path / "run"), *args)
    said = [line for line in capfd.readouterr().out.splitlines() if "cannot be used" in line]
    assert said == [
        f"{newest} cannot be used: state.safetensors differs from its checksum; {os.path.basename(older)} is taken instead"
    ]
    join(start(name, tmp_path / "whole", args))
    assert_same_run(name, tmp_path / "whole", tmp_path / "run")

"""nanorlhf.runtime.locks: real processes that work in one folder, are killed in it, and fork.

Of two scripts on one folder one ends as if it had been alone, the other with exit code 2, one line,
and nothing written.
"""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import (
    ENV,
    arguments,
    assert_bit_equal,
    command_line,
    flags,
    fork,
    join,
    ranks,
    read_rows,
    wait_for,
    write_rows,
)

import probe
import sample_bon
import train_sft
from nanorlhf.control import human_latents
from nanorlhf.errors import InputError
from nanorlhf.runtime import cli, locks
from nanorlhf.runtime.locks import LOCK_FILE, lock, unlock_afterwards

# waits() tells when it is first asked, and then waits for the file `go`. With FORK it leaves a
# child behind that does nothing.
WAITING = """
import os, time
def waits(prompts, responses):
    folder = os.path.dirname(__file__)
    if os.path.exists(folder + "/wait") and not os.path.exists(folder + "/go"):
        if "FORK" in os.environ and os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        open(f"{folder}/inside_{os.getpid()}", "w").close()
        end = time.monotonic() + 10
        while time.monotonic() < end and not os.path.exists(folder + "/go"):
            time.sleep(0.01)
    return [float(len(r)) for r in responses]
def other(prompts, responses):
    return [float(r.count("a")) for r in responses]
"""


@pytest.fixture
def waiting(here):
    """The working directory with WAITING in it, switched on."""
    (here / "waiting.py").write_text(WAITING)
    (here / "wait").touch()
    return here


# ------------------------------------------------------------------------------------------ helpers


def is_inside(folder):
    """Whether a process has asked the waiting reward, and waits."""
    return any(Path(folder).glob("inside_*"))


def names_below(folder):
    """The names of all files and folders below, from the folder on."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def is_free(folder):
    """Whether another process could work in a folder now."""
    code = "import sys; from nanorlhf.runtime.locks import lock; lock(sys.argv[1])"
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, env=ENV, capture_output=True).returncode == 0


def bon_arguments(reward):
    """The flags of a sample_bon.py of a second."""
    settings = {
        "model": "model",
        "dataset": "ppo.jsonl",
        "output_dir": "bon",
        "reward_model": reward,
        "n_answers": 2,
        "eval_size": 4,
        "max_new_tokens": 4,
    }
    return flags(settings)


def run_bon(folder, *args):
    os.chdir(folder)
    cli.run(sample_bon.Config, sample_bon.main, list(args))


def run_probe(folder, *args):
    os.chdir(folder)
    cli.run_command(probe.COMMANDS, list(args))


def run_here(folder, kind, *args):
    os.chdir(folder)
    command_line(kind, *args)


def assert_refused(processes, folder, stderr):
    """All have ended with exit code 2 and one line each that names the folder."""
    join(*processes, code=2)
    for rank in range(len(processes)):
        (line,) = Path(f"{stderr}_{rank}").read_text().splitlines()
        assert f"error: another process is working in {folder};" in line


# ----------------------------------------------------------------------------------------- the lock


@pytest.mark.slow
def test_one_process_at_a_time(tmp_path, another):
    folder = tmp_path / "a" / "b"
    holder = another(folder)
    with pytest.raises(InputError, match=f"another process is working in {folder}; wait"):
        lock(str(folder))

    # A kill leaves the lock file, which nobody holds then.
    holder.kill()
    holder.join()
    assert os.listdir(folder) == [LOCK_FILE]
    with unlock_afterwards():
        lock(str(folder))
        # Once more, by another name.
        lock(f"{tmp_path}/a/../a/b/")
        assert not is_free(folder)
    assert is_free(folder)


def test_no_traces(tmp_path):
    """What was made for the lock goes, what was there or is in use stays."""
    (tmp_path / "mine").mkdir()
    with unlock_afterwards():
        lock(str(tmp_path / "mine"))
        lock(str(tmp_path / "x/y/z"))
        lock(str(tmp_path / "used/y"))
        (tmp_path / "used/file").touch()
        assert (tmp_path / "x/y/z" / LOCK_FILE).exists()
    assert names_below(tmp_path) == ["mine", "used", "used/file"]


@pytest.mark.slow
def test_unlocked_after_an_error_that_somebody_keeps(tmp_path):
    """A notebook keeps the last error, with all that its functions held."""

    @unlock_afterwards()
    def fails():
        lock(str(tmp_path / "a"))
        (tmp_path / "a/file").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        fails()
    assert is_free(tmp_path / "a")
    # The functions' frames, and so their locals, are still there.
    assert kept.value.__traceback__


@pytest.mark.slow
def test_an_inner_block_leaves_the_outer_ones_lock(tmp_path):
    with unlock_afterwards():
        lock(str(tmp_path))
        with unlock_afterwards():
            lock(str(tmp_path))
            lock(str(tmp_path / "inner"))
        assert not is_free(tmp_path)
        assert not (tmp_path / "inner").exists()


def count_up(folder, times):
    """Lock, and be alone, `times` times."""
    alone = f"{folder}.alone"
    while times:
        with unlock_afterwards():
            try:
                lock(folder)
            except InputError:
                continue
            # FileExistsError: somebody else is in.
            os.close(os.open(alone, os.O_CREAT | os.O_EXCL))
            os.unlink(alone)
            times -= 1


@pytest.mark.slow
def test_never_two_at_once(tmp_path):
    """Lock files and folders that come and go all the time, with four processes after them."""
    folder = str(tmp_path / "x/y")
    join(*[fork(count_up, folder, 300, RANK="0") for _ in range(4)])
    for path in tmp_path.rglob("*"):
        assert not path.is_file()


@pytest.mark.slow
def test_a_lock_file_that_was_removed_in_between(tmp_path, monkeypatch):
    """Its holder removed it after it was opened here: nobody else would see a lock on it."""
    real_take = locks.take
    taken = []

    def take_late(descriptor, folder):
        if not taken:
            os.unlink(os.path.join(folder, LOCK_FILE))
        taken.append(descriptor)
        real_take(descriptor, folder)

    monkeypatch.setattr(locks, "take", take_late)
    with unlock_afterwards():
        lock(str(tmp_path))
        assert len(taken) == 2
        assert not is_free(tmp_path)


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with unlock_afterwards():
        lock(str(tmp_path))
    line = f"{tmp_path}: a file system without locks; let no other process work here\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("name", ["file/x", "x" * 300, "loop"])
def test_folders_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").touch()
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    with pytest.raises(InputError, match="cannot be made or written into|leads nowhere"):
        with unlock_afterwards():
            lock(str(tmp_path / name))
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


# --------------------------------------------------------------------------------- two runs at once


@pytest.mark.slow
def test_two_trainings_of_different_seeds_at_once(here):
    """Both start in the same moment: one is trained as if it were alone, the other is refused."""
    processes = []
    for seed in (0, 1):
        args = arguments("sft", seed=seed, steps=20)
        processes.append(fork(run_here, str(here), "sft", *args, RANK="0"))
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    assert sorted(codes) == [0, 2]
    command_line("sft", *arguments("sft", seed=codes.index(0), steps=20, output_dir="alone"))
    assert_bit_equal(here / "alone", here / "out")


@pytest.mark.slow
def test_the_same_ppo_run_twice_at_once(waiting):
    """The second one comes in the first evaluation, when nothing has been written yet."""
    args = arguments("ppo", reward_model="waiting.py:waits")
    first = fork(run_here, str(waiting), "ppo", *args, RANK="0")
    wait_for(lambda: is_inside(waiting))
    assert os.listdir(waiting / "out") == [LOCK_FILE]
    second = fork(run_here, str(waiting), "ppo", *args, RANK="0", STDERR=str(waiting / "stderr"))
    assert_refused([second], "out", waiting / "stderr")
    (waiting / "go").touch()
    join(first)
    assert LOCK_FILE not in os.listdir(waiting / "out")
    command_line("ppo", *args, "--output_dir", "alone")
    assert_bit_equal(waiting / "alone", waiting / "out")


@pytest.mark.slow
def test_two_sample_bons_at_once(waiting):
    """The first one goes on, and a third call finds a cache with one line a prompt."""
    args = bon_arguments("waiting.py:waits")
    first = fork(run_bon, str(waiting), *args, RANK="0")
    wait_for(lambda: is_inside(waiting))
    second = fork(run_bon, str(waiting), *args, RANK="0", STDERR=str(waiting / "stderr"))
    assert_refused([second], "bon", waiting / "stderr")
    (waiting / "go").touch()
    join(first)

    join(fork(run_bon, str(waiting), *bon_arguments("waiting.py:other"), RANK="0"))
    prompts = [row["prompt"] for row in read_rows(waiting / "bon/pool.jsonl")]
    assert len(prompts) > 2
    assert len(set(prompts)) == len(prompts)
    for path in (waiting / "bon/cache").iterdir():
        indices = [row["index"] for row in read_rows(path)]
        assert indices == list(range(len(prompts)))


@pytest.mark.slow
@pytest.mark.parametrize("env", [{}, {"FORK": "1"}], ids=["alone", "leaves a child"])
def test_a_killed_holder_frees_the_folder(waiting, env):
    """Also where its forked child lives on. What the kill leaves is no run to --resume."""
    args = arguments("ppo", reward_model="waiting.py:waits")
    first = fork(run_here, str(waiting), "ppo", *args, RANK="0", **env)
    wait_for(lambda: is_inside(waiting))
    first.kill()
    join(first, code=-signal.SIGKILL)
    assert os.listdir(waiting / "out") == [LOCK_FILE]

    resume = ["--resume", "--output_dir", "out"]
    join(fork(run_here, str(waiting), "ppo", *resume, RANK="0"), code=2)
    (waiting / "go").touch()
    join(fork(run_here, str(waiting), "ppo", *args, RANK="0"))
    assert (waiting / "out/summary.json").exists()
    assert LOCK_FILE not in os.listdir(waiting / "out")


@pytest.mark.slow
@pytest.mark.parametrize("state", ["new", "unfinished"])
def test_two_processes_against_a_holder(here, another, state):
    """All ranks end together."""
    args = arguments("sft")
    if state == "unfinished":
        command_line("sft", *args)
        (here / "out/summary.json").unlink()
    before = names_below(here)
    another(here / "out")
    processes = ranks(2, run_here, str(here), "sft", *args, STDERR=str(here / "stderr"))
    assert_refused(processes, "out", here / "stderr")
    # The holder's folder and lock, and what was said on stderr.
    not_theirs = {"out", f"out/{LOCK_FILE}", "stderr_0", "stderr_1"}
    assert set(names_below(here)) == not_theirs | set(before)


@pytest.mark.slow
def test_members_on_two_processes_against_a_holder(here, another):
    """Rank 0 does not train the first member while rank 1 is refused the second."""
    another(here / "rm/seed_1")
    args = arguments("rm", output_dir="rm/seed_{seed}", members=2)
    processes = ranks(2, run_here, str(here), "rm", *args, STDERR=str(here / "stderr"))
    assert_refused(processes, "rm/seed_1", here / "stderr")
    assert os.listdir(here / "rm") == ["seed_1"]


@pytest.mark.slow
def test_a_run_that_is_done_is_only_read(here, another):
    """Two runs that start from the same finished one do not stand in each other's way."""
    command_line("sft", *arguments("sft"))
    another(here / "out")
    command_line("sft", *arguments("sft"))
    assert not is_free(here / "out")


@pytest.mark.slow
def test_the_lock_files_of_members_that_were_done_before_a_kill(here):
    """The same command removes them, though it only reads these members."""
    args = arguments("rm", output_dir="rm/seed_{seed}", members=2)
    command_line("rm", *args)
    before = names_below(here)
    (here / "rm/seed_0" / LOCK_FILE).touch()
    command_line("rm", *args)
    assert names_below(here) == before


@pytest.mark.slow
def test_a_failed_call_in_a_notebook_then_a_process(here):
    """main() that failed, with the error still at hand, locks nobody out."""
    config = train_sft.Config(output_dir="out", model="model", dataset="missing.jsonl")
    with pytest.raises(InputError) as kept:
        train_sft.main(config)
    assert "missing.jsonl: no such file" in str(kept.value)
    assert not (here / "out").exists()
    join(fork(run_here, str(here), "sft", *arguments("sft"), RANK="0"))


# ------------------------------------------------------------------------------------ other folders


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder, function, command",
    [
        ("judge", run_probe, "judge --a a.jsonl --b b.jsonl --output_dir judge"),
        ("from", run_bon, "--from a.jsonl b.jsonl --output_dir from"),
        ("ppo", run_here, "ppo --score_gold ppo --gold_model world:gold"),
    ],
    ids=["judge", "--from", "--score_gold"],
)
def test_folders_of_results(here, another, folder, function, command):
    """They are refused while another process writes there."""
    write_rows(here / "a.jsonl", [{"prompt": f"p {i}", "response": "a b"} for i in range(4)])
    write_rows(here / "b.jsonl", [{"prompt": f"p {i}", "response": "a c"} for i in range(4)])
    # A run that is done, as far as --score_gold looks at it before it starts.
    (here / "ppo").mkdir()
    (here / "ppo/config.json").write_text('{"dataset": "world"}')
    (here / "ppo/summary.json").write_text('{"after": {}}')
    (here / "ppo/metrics.jsonl").touch()

    another(here / folder)
    args = command.split()
    process = fork(function, str(here), *args, RANK="0", STDERR=str(here / "stderr"))
    assert_refused([process], folder, here / "stderr")


def save_often(path, number):
    for _ in range(200):
        latents = torch.full((64, 4), float(number))
        human = human_latents.HumanLatents(path, latents, [0, 1, 2, 3], latents[:, 0], True)
        human_latents.save(path, human, {})


@pytest.mark.slow
def test_two_processes_that_write_one_file(tmp_path):
    """A file of human latents has no folder of its own: it is one process's, whole."""
    path = str(tmp_path / "human.safetensors")
    first = fork(save_often, path, 1, RANK="0")
    second = fork(save_often, path, 2, RANK="0")
    join(first, second)
    tensors = load_file(path)
    numbers = tensors["latents"].unique().tolist()
    assert numbers in ([1], [2])
    assert tensors["scores"].unique().tolist() == numbers
    assert os.listdir(tmp_path) == ["human.safetensors"]

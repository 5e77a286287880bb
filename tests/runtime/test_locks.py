"""nanorlhf.runtime.locks: real processes that work in one folder at once, are killed in it, and fork.

Of two scripts on one folder one ends as if it had been alone, the other with exit code 2, one line,
and nothing written.
"""

import errno
import fcntl
import json
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

# A reward that tells when it is first asked, and then waits for the file `go`. With FORK it leaves
# a child behind that does nothing.
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
def waiting(here):  # noqa: F811
    """The working directory with WAITING in it, switched on."""
    (here / "waiting.py").write_text(WAITING)
    (here / "wait").touch()
    return here


# ------------------------------------------------------------------------------------------ helpers


def inside(folder):
    """The processes that have asked the waiting reward."""
    return [int(path.name.split("_")[1]) for path in Path(folder).glob("inside_*")]


def is_free(folder):
    """Whether another process could work in a folder now."""
    code = "import sys; from nanorlhf.runtime.locks import lock; lock(sys.argv[1])"
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, env=ENV, capture_output=True).returncode == 0


def bon(reward):
    """Arguments of a sample_bon.py of a second."""
    settings = {"model": "model", "dataset": "ppo.jsonl", "output_dir": "bon"}
    settings |= {"reward_model": reward, "n_answers": 2, "eval_size": 4, "max_new_tokens": 4}
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
    holder.kill()
    holder.join()
    assert os.listdir(folder) == [LOCK_FILE]  # what a kill leaves
    with unlock_afterwards():
        lock(str(folder))
        lock(f"{tmp_path}/a/../a/b/")  # again, by another name
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
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["mine", "used", "used/file"]


@pytest.mark.slow
def test_unlocked_after_an_error_that_somebody_keeps(tmp_path):
    """A notebook keeps the last error, with all that its functions held."""

    @unlock_afterwards()
    def fails():
        lock(str(tmp_path / "a"))
        (tmp_path / "a/file").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as error:
        fails()
    assert is_free(tmp_path / "a") and error.value.__traceback__


@pytest.mark.slow
def test_an_inner_block_leaves_the_outer_ones_lock(tmp_path):
    with unlock_afterwards():
        lock(str(tmp_path))
        with unlock_afterwards():
            lock(str(tmp_path))
            lock(str(tmp_path / "inner"))
        assert not is_free(tmp_path) and not (tmp_path / "inner").exists()


def count_up(folder, times):
    """Lock, and be alone, `times` times."""
    alone = f"{folder}.alone"
    while times:
        with unlock_afterwards():
            try:
                lock(folder)
            except InputError:
                continue
            os.close(os.open(alone, os.O_CREAT | os.O_EXCL))  # FileExistsError: somebody else is in
            os.unlink(alone)
            times -= 1


@pytest.mark.slow
def test_never_two_at_once(tmp_path):
    """Lock files and folders that come and go all the time, with four processes after them."""
    join(*(fork(count_up, str(tmp_path / "x/y"), 300, RANK="0") for _ in range(4)))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_lock_file_that_was_removed_in_between(tmp_path, monkeypatch):
    """Its holder removed it after it was opened here: nobody else would see a lock on it."""
    take, taken = locks.take, []

    def late(descriptor, folder):
        if not taken:
            os.unlink(os.path.join(folder, LOCK_FILE))
        taken.append(descriptor)
        take(descriptor, folder)

    monkeypatch.setattr(locks, "take", late)
    with unlock_afterwards():
        lock(str(tmp_path))
        assert len(taken) == 2 and not is_free(tmp_path)


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
    with (
        pytest.raises(InputError, match="cannot be made or written into|leads nowhere"),
        unlock_afterwards(),
    ):
        lock(str(tmp_path / name))
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


# --------------------------------------------------------------------------------- two runs at once


@pytest.mark.slow
def test_two_trainings_of_different_seeds_at_once(here):  # noqa: F811
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
    wait_for(lambda: inside(waiting))
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
    args = bon("waiting.py:waits")
    first = fork(run_bon, str(waiting), *args, RANK="0")
    wait_for(lambda: inside(waiting))
    second = fork(run_bon, str(waiting), *args, RANK="0", STDERR=str(waiting / "stderr"))
    assert_refused([second], "bon", waiting / "stderr")
    (waiting / "go").touch()
    join(first)
    join(fork(run_bon, str(waiting), *bon("waiting.py:other"), RANK="0"))
    rows = [json.loads(line) for line in (waiting / "bon/pool.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) > 2
    for path in (waiting / "bon/cache").iterdir():
        indices = [json.loads(line)["index"] for line in path.read_text().splitlines()]
        assert indices == list(range(len(rows)))


@pytest.mark.slow
@pytest.mark.parametrize("leaves_a_child", [False, True])
def test_a_killed_holder_frees_the_folder(waiting, leaves_a_child):
    """Also where its forked child lives on. What the kill leaves is no run to --resume."""
    args = arguments("ppo", reward_model="waiting.py:waits")
    env = {"FORK": "1"} if leaves_a_child else {}
    first = fork(run_here, str(waiting), "ppo", *args, RANK="0", **env)
    wait_for(lambda: inside(waiting))
    first.kill()
    join(first, code=-signal.SIGKILL)
    assert os.listdir(waiting / "out") == [LOCK_FILE]
    join(fork(run_here, str(waiting), "ppo", "--resume", "--output_dir", "out", RANK="0"), code=2)
    (waiting / "go").touch()
    join(fork(run_here, str(waiting), "ppo", *args, RANK="0"))
    assert (waiting / "out/summary.json").exists() and LOCK_FILE not in os.listdir(waiting / "out")


@pytest.mark.slow
@pytest.mark.parametrize("state", ["new", "unfinished"])
def test_two_processes_against_a_holder(here, another, state):  # noqa: F811
    """All ranks end together."""
    args = arguments("sft")
    if state == "unfinished":
        command_line("sft", *args)
        (here / "out/summary.json").unlink()
    before = sorted(str(p) for p in here.rglob("*"))
    another(here / "out")
    processes = ranks(2, run_here, str(here), "sft", *args, STDERR=str(here / "stderr"))
    assert_refused(processes, "out", here / "stderr")
    ours = [here / "out", here / "out" / LOCK_FILE, here / "stderr_0", here / "stderr_1"]
    assert sorted(str(p) for p in here.rglob("*")) == sorted({*before, *map(str, ours)})


@pytest.mark.slow
def test_members_on_two_processes_against_a_holder(here, another):  # noqa: F811
    """Rank 0 does not train the first member while rank 1 is refused the second."""
    another(here / "rm/seed_1")
    args = arguments("rm", output_dir="rm/seed_{seed}", members=2)
    processes = ranks(2, run_here, str(here), "rm", *args, STDERR=str(here / "stderr"))
    assert_refused(processes, "rm/seed_1", here / "stderr")
    assert os.listdir(here / "rm") == ["seed_1"]


@pytest.mark.slow
def test_a_run_that_is_done_is_only_read(here, another):  # noqa: F811
    """Two runs that start from the same finished one do not stand in each other's way."""
    command_line("sft", *arguments("sft"))
    another(here / "out")
    command_line("sft", *arguments("sft"))


@pytest.mark.slow
def test_a_failed_call_in_a_notebook_then_a_process(here):  # noqa: F811
    """main() that failed, with the error still at hand, locks nobody out."""
    config = train_sft.Config(output_dir="out", model="model", dataset="missing.jsonl")
    with pytest.raises(InputError) as error:
        train_sft.main(config)
    assert "missing.jsonl: no such file" in str(error.value) and not (here / "out").exists()
    join(fork(run_here, str(here), "sft", *arguments("sft"), RANK="0"))


# ------------------------------------------------------------------------------------ other folders


@pytest.mark.slow
def test_folders_of_results(here, another):  # noqa: F811
    """What judge, --from and --score_gold write is refused while another process writes there."""
    write_rows(here / "a.jsonl", [{"prompt": f"p {i}", "response": "a b"} for i in range(4)])
    write_rows(here / "b.jsonl", [{"prompt": f"p {i}", "response": "a c"} for i in range(4)])
    (here / "ppo").mkdir()
    for name, value in {"config": {"dataset": "world"}, "summary": {"after": {}}}.items():
        (here / f"ppo/{name}.json").write_text(json.dumps(value))
    (here / "ppo/metrics.jsonl").touch()
    for folder, function, *args in (
        ("judge", run_probe, "judge", "--a", "a.jsonl", "--b", "b.jsonl", "--output_dir", "judge"),
        ("from", run_bon, "--from", "a.jsonl", "b.jsonl", "--output_dir", "from"),
        ("ppo", run_here, "ppo", "--score_gold", "ppo", "--gold_model", "world:gold"),
    ):
        another(here / folder)
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
    join(*(fork(save_often, path, number, RANK="0") for number in (1, 2)))
    tensors = load_file(path)
    assert tensors["latents"].unique().tolist() == tensors["scores"].unique().tolist()
    assert tensors["latents"].unique().tolist() in ([1], [2]) and len(os.listdir(tmp_path)) == 1

"""Which rows a process takes, what processes exchange, how they meet after a restart, and what one
does with memory that it has freed.
"""

import datetime
import mmap
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as td
from support import join, ranks

from nanorlhf.errors import InputError
from nanorlhf.runtime import cli, distributed
from nanorlhf.runtime.distributed import Dist


def processes(world):
    return [Dist(rank, world, torch.device("cpu")) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_are_of_one_size_and_parts_need_not_be(world):
    shares = [list(dist.share(range(10, 22))) for dist in processes(world)]
    assert [len(share) for share in shares] == [12 // world] * world
    assert sum(shares, []) == list(range(10, 22))

    for n in range(8):
        parts = [list(dist.part(n)) for dist in processes(world)]
        assert sum(parts, []) == list(range(n))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


class Threads:
    """Threads in the place of processes: the two exchanges of torch.distributed that Dist makes."""

    def __init__(self, world):
        self.barrier = threading.Barrier(world, timeout=20)
        self.sent = {}  # {thread: its tensor}

    def exchange(self, tensor):
        """The tensors of all threads, by the number of the thread."""
        self.barrier.wait()
        self.sent[int(threading.current_thread().name)] = tensor.clone()
        self.barrier.wait()
        tensors = [self.sent[rank] for rank in sorted(self.sent)]
        assert len({tensor.shape for tensor in tensors}) == 1  # as the real ones ask for
        return tensors

    def all_reduce(self, tensor):
        tensor.copy_(sum(self.exchange(tensor)))

    def all_gather(self, parts, tensor):
        for part, sent in zip(parts, self.exchange(tensor), strict=True):
            part.copy_(sent)


def run_threads(monkeypatch, function, world):
    """function(Dist) of every process, as threads -> what each returns."""
    monkeypatch.setattr(distributed, "td", Threads(world))
    found = {}

    def run(dist):
        found[dist.rank] = function(dist)

    threads = []
    for dist in processes(world):
        threads.append(threading.Thread(target=run, args=(dist,), name=str(dist.rank)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(world)]


# How many rows each process has.
SIZES = {"equal": [2, 2], "unequal": [1, 3, 2], "one has none": [2, 0], "none": [0, 0]}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_gather_puts_the_rows_of_all_in_order(monkeypatch, sizes):
    rows = torch.arange(2.0 * sum(sizes)).view(-1, 2)
    of_rank = rows.split(sizes)
    found = run_threads(monkeypatch, lambda dist: dist.gather(of_rank[dist.rank]), len(sizes))
    for gathered in found:
        assert torch.equal(gathered, rows)


def test_the_sum_over_processes_leaves_their_tensors_as_they_are(monkeypatch):
    tensors = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([10.0, 20.0])]
    found = run_threads(monkeypatch, lambda dist: dist.sum(tensors[dist.rank]), 2)
    for total in found:
        assert total.tolist() == [11, 22]
        assert not total.requires_grad
    assert [tensor.tolist() for tensor in tensors] == [[1, 2], [10, 20]]


def test_a_process_alone_exchanges_nothing():
    (dist,) = processes(1)
    tensor = torch.ones(2)
    assert dist.gather(tensor) is tensor
    assert dist.sum(tensor) is tensor


@pytest.mark.parametrize("rank, result", [(0, "done"), (1, None)])
def test_only_the_main_process_does_it(rank, result):
    # A world of one exchanges nothing, whatever the rank is.
    dist = distributed.Dist(rank, 1, torch.device("cpu"))
    assert dist.on_main(lambda: "done") == result


def message_of(function, *args):
    """What an InputError of function(*args) says; None without one."""
    try:
        function(*args)
    except InputError as e:
        return str(e)


def test_an_error_of_the_main_process_is_raised_on_all(monkeypatch):
    """As one line, with an escape for half a character."""

    def fail():
        raise InputError("no such\n  file: \udcff")

    found = run_threads(monkeypatch, lambda dist: message_of(dist.on_main, fail), 3)
    assert found == ["no such file: \\udcff"] * 3


def test_the_first_of_two_errors_is_raised_on_all(monkeypatch):
    def meet(dist):
        def fail_unless_main():
            if not dist.main:
                raise InputError(f"of rank {dist.rank}")

        return message_of(dist.together, fail_unless_main)

    assert run_threads(monkeypatch, meet, 3) == ["of rank 1"] * 3


def test_texts_of_all_processes_come_in_order(monkeypatch):
    texts = ["größe\n", "", "two"]
    found = run_threads(monkeypatch, lambda dist: dist.gather_text(texts[dist.rank]), 3)
    assert found == ["größe\ntwo"] * 3


# ---------------------------------------------------------------------------------------- meeting


@pytest.mark.parametrize("machines, finds_old_keys", [("1", False), ("2", True)])
def test_processes_that_torchrun_starts_again(monkeypatch, machines, finds_old_keys):
    """They do not find the addresses of the processes before them, which are gone.

    On several machines they do: each counts restarts of its own, and all must use the same keys.
    """
    minute = datetime.timedelta(minutes=1)
    server = td.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    settings = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(server.port),
        "GROUP_WORLD_SIZE": machines,
        # torchrun's own process is the server.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)

    stores = []
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        stores.append(distributed.find_the_others(minute))
    before, after = stores
    before.set("address of rank 1", "127.0.0.1:4000")
    before.get("address of rank 1")  # set() does not wait for the server
    assert after.check(["address of rank 1"]) == finds_old_keys


def die_at_the_meeting():
    """Rank 0, which has the store, dies when rank 1 has found it and is to connect."""
    find_the_others = distributed.find_the_others

    def find_and_die(timeout):
        store = find_the_others(timeout)
        if os.environ["RANK"] == "0":
            store.wait(["rank 1 is here"])
            os._exit(9)
        store.set("rank 1 is here", "")
        return store

    distributed.find_the_others = find_and_die
    with cli.errors_in_one_line():
        distributed.setup("cpu")


@pytest.mark.slow
def test_a_process_that_dies_while_they_meet(tmp_path):
    first, second = ranks(2, die_at_the_meeting, STDERR=f"{tmp_path}/stderr")
    join(first, code=9)
    join(second, code=2)
    (line,) = Path(f"{tmp_path}/stderr_1").read_text().splitlines()
    assert "the processes of this run do not find each other" in line


# ----------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("n_bytes, n_returns", [(2**28, 0), (2**30, 1)])
def test_only_large_processes_return_freed_memory(monkeypatch, n_bytes, n_returns):
    returns = []
    library = SimpleNamespace(malloc_trim=returns.append)
    monkeypatch.setattr(distributed, "libc", lambda: library)
    monkeypatch.setattr(distributed, "resident_memory", lambda: n_bytes)
    distributed.return_freed_memory()
    assert len(returns) == n_returns


def test_nothing_happens_with_another_c_library(monkeypatch):
    monkeypatch.setattr(distributed, "libc", lambda: None)
    # Elsewhere than on Linux nothing tells how large the process is.
    monkeypatch.delattr(distributed, "resident_memory")
    distributed.return_freed_memory()


@pytest.mark.skipif(not distributed.libc(), reason="needs Linux")
def test_resident_memory_grows_with_what_is_held():
    # Fresh pages of the kernel: bytes of malloc may be of memory that the process already holds.
    before = distributed.resident_memory()
    with mmap.mmap(-1, 2**26) as block:
        # A page that nobody has written to is not resident.
        for start in range(0, len(block), mmap.PAGESIZE):
            block[start] = 1
        grown = distributed.resident_memory() - before
        assert 0.9 * len(block) < grown < 1.2 * len(block)
    left = distributed.resident_memory() - before
    assert left < 0.1 * 2**26

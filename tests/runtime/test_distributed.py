"""What one process does alone, and with freed memory; how processes meet after a restart."""

import datetime
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as td
from support import join, ranks

from nanorlhf.runtime import cli, distributed


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
    before = distributed.resident_memory()
    # Every page is written to: a page that nobody has touched is not resident.
    block = bytearray(b"x") * 2**26
    grown = distributed.resident_memory() - before
    assert 0.9 * len(block) < grown < 1.2 * len(block)


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


@pytest.mark.parametrize("rank, result", [(0, "done"), (1, None)])
def test_only_the_main_process_does_it(rank, result):
    # A world of one exchanges nothing, whatever the rank is.
    dist = distributed.Dist(rank, 1, torch.device("cpu"))
    assert dist.on_main(lambda: "done") == result

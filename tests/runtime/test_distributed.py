"""What one process does alone, and with memory that it has freed."""

from types import SimpleNamespace

import pytest
import torch

from nanorlhf.runtime import distributed


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


@pytest.mark.parametrize("rank, result", [(0, "done"), (1, None)])
def test_only_the_main_process_does_it(rank, result):
    # A world of one exchanges nothing, whatever the rank is.
    dist = distributed.Dist(rank, 1, torch.device("cpu"))
    assert dist.on_main(lambda: "done") == result

"""workers.py: a run of pytest that two processes share looks as if one had run every test."""

import subprocess
import sys

import pytest
from support import ENV

CONFTEST = """
from workers import pytest_runtestloop

def pytest_addoption(parser):
    parser.addoption("--processes", type=int, default=2)
"""
# Each process takes one of two such files: the tests of a file wait until both have begun.
TESTS = """
import time
from pathlib import Path
import pytest

def test_both_processes_are_there():
    Path("begun_NAME").touch()
    while len(list(Path().glob("begun_*"))) < 2:
        time.sleep(0.01)

@pytest.mark.skip(reason="why NAME")
def test_skipped():
    pass

def test_failing():
    assert "NAME" == "c"
"""


@pytest.mark.slow
def test_reports_of_both_processes_are_shown(tmp_path):
    """In words too: with -v pytest looks into the report of a test that was skipped."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for name in ("a", "b"):
        (tmp_path / f"test_{name}.py").write_text(TESTS.replace("NAME", name))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "INTERNALERROR" not in done.stdout
    assert done.returncode == 1
    assert "2 failed, 2 passed, 2 skipped" in done.stdout
    for name in ("a", "b"):
        assert f"why {name}" in done.stdout
        assert f"assert '{name}' == 'c'" in done.stdout

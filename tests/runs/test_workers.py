"""workers.py: a run of pytest that two processes share looks as if one had run every test."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import ENV, REPO

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


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["tests/core"]], ids=["alone", "with a folder"])
def test_pytest_as_people_type_it(arguments):
    """Without `python -m`, and also where pytest.ini is not found, it leaves the slow tests out."""
    env = {name: value for name, value in ENV.items() if name != "PYTHONPATH"}
    program = Path(sys.executable).with_name("pytest")
    done = subprocess.run(
        [program, "-q", "--collect-only", "-p", "no:cacheprovider", *arguments],
        cwd=REPO,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "core/test_rooms.py::test_lines_of_code_fit" in done.stdout
    assert "test_two_processes_train_a_model" not in done.stdout  # a slow one, in core/ too

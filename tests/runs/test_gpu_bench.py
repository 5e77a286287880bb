"""tests/bench/gpu.py, a benchmark for a GPU, on a CPU: every phase runs, none stops another."""

import json
import subprocess
import sys

import pytest
from support import ENV, REPO

pytestmark = pytest.mark.slow

PHASES = ["ceilings", "step", "update", "lora", "attention", "ppo", "tests"]


def run_bench(folder, *flags):
    """-> {phase: its line}, in order; what was printed"""
    out = folder / "gpu.jsonl"
    command = [sys.executable, REPO / "tests/bench/gpu.py", "--size", "small", "--out", out]
    done = subprocess.run(
        [*command, *flags], env=ENV, capture_output=True, text=True, check=True, timeout=1800
    )
    lines = {}
    for text in out.read_text().splitlines():
        # What is in the file has been printed too.
        assert text in done.stdout.splitlines()
        line = json.loads(text)
        lines[line["phase"]] = line
    return lines, done.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """{phase: {variant: row}}; the table is printed last."""
    folder = tmp_path_factory.mktemp("gpu_bench")
    # A loaded machine may take as long as it needs.
    lines, printed = run_bench(folder, "--device", "cpu", "--budget", "4500")
    assert list(lines) == PHASES
    rows = {}
    for phase, line in lines.items():
        assert "error" not in line, line
        rows[phase] = {row["variant"]: row for row in line["rows"]}
    _, table = printed.split("ratio\n")
    for phase, variant in (("step", "generate"), ("update", "compile"), ("ppo", "compile")):
        assert f"\n{phase:10}{variant:32}" in table
    return rows


def test_decoding(measured):
    """Both loops sample nearly the same tokens, in bfloat16. On a CPU nothing is compiled."""
    rows = measured["step"]
    assert list(rows) == ["now", "compile", "generate, not compiled", "generate"]
    assert rows["compile"]["tokens_equal"] > 0.5
    assert rows["compile"]["logprob_difference"] < 0.1
    for row in rows.values():
        assert row["seconds"] > 0
    # 64 prompts, 48 new tokens.
    now = rows["now"]
    assert now["step_ms"] == pytest.approx(1e3 * now["seconds"] / 48, rel=0.01)
    assert now["tokens_per_s"] == pytest.approx(64 * 48 / now["seconds"], rel=0.01)
    ratio = rows["generate"]["seconds"] / now["seconds"]
    assert rows["generate"]["times_now"] == pytest.approx(ratio, rel=0.05)


def update_tflop(passes):
    """Operations of a minibatch, in 1e12: 16 rows of 64 tokens, by hand."""
    blocks = 4 * (4 * 128**2 + 2 * 128 * 512) * 16 * 64
    head = 128 * 512 * 16 * 48
    return passes * 2 * (blocks + head) / 1e12


@pytest.mark.parametrize("phase, passes", [("update", 3), ("lora", 2)])
def test_the_update(measured, phase, passes):
    rows = measured[phase]
    assert len(rows) == {"update": 2, "lora": 4}[phase]
    for row in rows.values():
        seconds = row["ms"] / 1e3
        assert row["tflop_per_s"] == pytest.approx(update_tflop(passes) / seconds, rel=0.02)
        # The experience is the policy's own.
        assert row["first_ratio_error"] < 1e-2
        # Products were found by their names.
        assert row["ms_by_class"]["product"] > 0
        assert row["ms_by_class"]["optimizer"] > 0
        assert row["others"]


def test_memory_by_formula(measured):
    """float32 weights, gradients, two moments: 16 bytes each; LoRA's base has no more than 4."""
    for row in measured["update"].values():
        assert row["formula_gb"] > 16 * 0.9e6 / 1e9
    lora = [row["formula_gb"] for row in measured["lora"].values()]
    # The same rows with activations that are computed again, and with kept ones.
    assert lora[1] < lora[2]


def test_ways_of_attention_agree(measured):
    rows = measured["attention"]
    assert len(rows) == 15
    for row in rows.values():
        assert row["error"] < 2e-2


def test_ppo_and_tests(measured):
    assert measured["ppo"]["compile"]["update_cpu_s"] > 0
    # No test of a GPU runs without one.
    assert " skipped" in measured["tests"]["pytest"]["last_line"]
    assert " passed" not in measured["tests"]["pytest"]["last_line"]


def test_a_phase_that_fails_or_is_late_stops_no_other(tmp_path):
    flags = ["--device", "cpu", "--phases", "update", "ceilings"]
    # The first has 100 / 450 of a second, the second what is left after it.
    lines, printed = run_bench(tmp_path, *flags, "--budget", "1")
    assert lines["update"]["error"] == "late"
    assert lines["ceilings"]["error"] == "late"
    assert "update    late" in printed

    # torch sees no GPU in a test.
    flags = ["--device", "cuda", "--phases", "ceilings", "attention"]
    lines, _ = run_bench(tmp_path, *flags)
    for line in lines.values():
        assert line["error"].startswith(("RuntimeError: ", "AssertionError: "))
        assert line["rows"] == []

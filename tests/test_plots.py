"""Pictures: which runs belong together, and that files are real PNGs."""

import json

import pytest

from nanorlhf import plots

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture
def runs(tmp_path):
    paths = []
    for kl_coef in (0.0, 0.05):
        for seed in (0, 1):
            run = tmp_path / f"kl{kl_coef}_{seed}"
            run.mkdir()
            config = {"seed": seed, "kl_coef": kl_coef, "lr": 0.1, "reward_model": f"runs/rm/seed_{seed}", "output_dir": str(run), "resume": False}
            (run / "config.json").write_text(json.dumps(config))
            rows = [{"step": s, "score_mean": s, **({"eval/proxy": s, "eval/gold": -s, "eval/gold_se": 0.1, "eval/kl": s} if s % 2 == 0 else {})} for s in range(5)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            paths.append(str(run))
    return paths


def is_picture(path):
    with open(path, "rb") as f:
        return f.read(8) == b"\x89PNG\r\n\x1a\n" and len(f.read()) > 5000


def test_runs_that_differ_in_seed_belong_together(runs):
    groups = plots.groups_of(runs)
    assert [label for label, _ in groups] == ["kl_coef 0.0 (2 runs)", "kl_coef 0.05 (2 runs)"]
    assert [len(group) for _, group in groups] == [2, 2] and groups[0][1][0][4]["eval/proxy"] == 4


def test_pictures(runs, tmp_path):
    assert is_picture(plots.plot_run(runs[0])) and is_picture(plots.plot_comparison(runs, str(tmp_path / "all.png")))


def test_no_matplotlib_no_picture(runs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)  # as if it were not installed
    assert plots.plot_run(runs[0]) is None

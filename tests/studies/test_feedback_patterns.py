"""The study of what PPO changed inside (nanorlhf/studies/feedback_patterns.py): its commands parse, and its tables are its runs' summaries."""

import json
import shlex
import statistics
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import parse_command

from nanorlhf.runtime.files import write_json
from nanorlhf.studies import common
from nanorlhf.studies import feedback_patterns as study

pytestmark = pytest.mark.slow

SEEDS = 3


def summary_of(words, seed):
    """What the tables read of a command's summary.json, with numbers that differ from seed to seed."""
    command, x = words[0], [0.1, 0.4, 0.2][seed]
    if command == "divergence":
        return {"layers": [{"layer": i, "frobenius": x + i} for i in range(2)]}
    if command in ("reward", "pairs"):
        rows = {"policy, activations": (x, 0.0), "base, activations": (0.5, x - 0.5)}
        metric = "tau" if command == "reward" else "accuracy"
        return {
            "metrics": [metric, "other"],
            "rows": {
                name: {metric: [a, 0], "policy_less": [b, 0]} for name, (a, b) in rows.items()
            },
        }
    if command == "features":
        return {
            "saes": {
                f"runs/sae/seed_{seed}/policy/3_mlp": {
                    "found": {"concept": {"of": 9, "auc": {"features": 10 * x}}}
                }
            }
        }
    if command == "ablate":
        keys = {"world:gold": x, f"seed_{seed}": 2 * x, "cue": 3 * x, "gold: sentiment": 4 * x}
        return {
            "differences": {
                key: {"features - random": {"mean": value}} for key, value in keys.items()
            }
        }
    return {}


def test_study(tmp_path, monkeypatch, capsys):
    ran = []

    def run(command):
        _, config = parse_command(command)
        words = shlex.split(command)[1:]
        seed = config.output_dir.rpartition("seed_")[2] if "seed_" in config.output_dir else "0"
        Path(config.output_dir).mkdir(parents=True)
        write_json(f"{config.output_dir}/summary.json", summary_of(words, int(seed)))
        ran.append(command)

    monkeypatch.setattr(common, "run_command", run)
    study.main(["--output_dir", str(tmp_path), "--seeds", str(SEEDS), "--jobs", "1"])
    assert len(ran) == 1 + SEEDS * (6 + len(study.PROBES) + len(study.ABLATIONS))
    with open(tmp_path / "summary.json") as f:
        tables = json.load(f)["tables"]
    mean, half = (
        0.7 / 3,
        4.30265 * statistics.stdev([0.1, 0.4, 0.2]) / 3**0.5,
    )  # t_.975 of two degrees of freedom
    for table, name, scale, shift in (
        ("divergence, sum of Frobenius norms", "layer 1", 1, 1), ("probe, words, activations", "tau: policy, activations", 1, 0),
        ("probe, pairs, activations", "policy less base, activations", 1, -0.5),
        ("concepts with an AUC above .95", "policy 3_mlp, concept (of 9): features", 10, 0),
        ("ablation of features that fire on positive words", "gold: features - random", 1, 0),
        ("ablation of features that fire on positive words", "proxy: features - random", 2, 0),
        ("ablation of features that fire before positive words", "cue: features - random", 3, 0),
        ("ablation of features that fire before positive words", "gold: sentiment: features - random", 4, 0),
    ):  # fmt: skip
        assert tables[table][name] == pytest.approx([scale * mean + shift, scale * half], rel=1e-4)
    study.main(["--output_dir", str(tmp_path), "--seeds", str(SEEDS), "--jobs", "1"])
    assert len(ran) == 1 + SEEDS * (
        6 + len(study.PROBES) + len(study.ABLATIONS)
    )  # what is done is not done again
    assert "concepts with an AUC above .95" in capsys.readouterr().out
    assert not find_spec("matplotlib") or (tmp_path / "probes.png").read_bytes().startswith(
        b"\x89PNG"
    )

    study.main(["--quick", "--output_dir", str(tmp_path), "--jobs", "1"])
    assert len(ran) == 1 + SEEDS * (6 + len(study.PROBES) + len(study.ABLATIONS)) + 1 + 6 + len(
        study.PROBES
    ) + len(study.ABLATIONS)
    quick = capsys.readouterr().out
    assert quick.count("[QUICK, one seed: not the study's numbers]") == len(tables)
    assert "nan" not in quick  # a single seed has no interval
    with open(tmp_path / "quick" / "summary.json") as f:
        quick_tables = json.load(
            f, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON")
        )["tables"]
    assert quick_tables["divergence, sum of Frobenius norms"]["layer 1"][1] is None  # null, not NaN
    assert {name: table.keys() for name, table in quick_tables.items()} == {
        name: table.keys() for name, table in tables.items()
    }


def test_picture_of_the_probes():
    """Each probe is a line of the picture, and each input a marker on it; features have the activations beside them."""
    matplotlib = pytest.importorskip("matplotlib.figure")
    one = {
        "tau: policy, activations": (0.6, 0.1),
        "tau: base, activations": (0.4, float("nan")),
        "policy less base, activations": (0.2, 0.1),
    }
    tables = {f"probe, {probe}": one for probe in study.PROBES}
    controls = {"tau: bag of words": (-0.05, 0.0), "policy less bag of words": (0.3, 0.1)}
    tables["probe, words, features"] = {"tau: policy, SAE features": (0.3, 0.2)} | one | controls
    lines = study.probe_lines(tables)
    assert list(lines) == ["words, activations", "words, less the neutral word", "words, residual stream", "words, features",
                           "words, the same two layers", "responses, activations", "pairs, activations"]  # fmt: skip
    assert lines["words, features"] == {"policy": (0.3, 0.2), "bag of words": (-0.05, 0.0)}
    assert (
        lines["words, the same two layers"]
        == lines["words, activations"]
        == {"policy": (0.6, 0.1), "base": one["tau: base, activations"]}
    )

    figure = matplotlib.Figure()
    study.draw(figure, lines)
    drawn = {
        container.get_label(): container.lines[0].get_xydata().tolist()
        for container in figure.axes[0].containers
    }
    assert drawn["bag of words"] == [[-0.05, 3]]
    assert drawn["policy"] == [[0.3 if height == 3 else 0.6, height] for height in range(7)]
    assert drawn["base"] == [[0.4, height] for height in (0, 1, 2, 4, 5, 6)]

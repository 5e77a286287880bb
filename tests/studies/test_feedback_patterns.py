"""The study of what PPO changed inside (nanorlhf/studies/feedback_patterns.py): its commands parse,
and its tables are the summaries of its runs. No run is made: each leaves made-up numbers.
"""

import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from statistics import stdev

import pytest
from support import parse_command

from nanorlhf.runtime.files import write_json
from nanorlhf.studies import common
from nanorlhf.studies import feedback_patterns as study

pytestmark = pytest.mark.slow

SEEDS = 3
# The number x that all summaries of a seed are made of.
X = [0.1, 0.4, 0.2]
RUNS_OF_A_SEED = 6 + len(study.PROBES) + len(study.ABLATIONS)


# ----------------------------------------------------------------------------- made-up summaries


def probe_summary(metric, x):
    """Of `probe.py reward` and `probe.py pairs`."""
    policy = {metric: [x, 0], "policy_less": [0.0, 0]}
    base = {metric: [0.5, 0], "policy_less": [x - 0.5, 0]}
    rows = {"policy, activations": policy, "base, activations": base}
    return {"metrics": [metric, "other"], "rows": rows}


def ablation_summary(x, seed):
    differences = {}
    for factor, key in enumerate(["world:gold", f"seed_{seed}", "cue", "gold: sentiment"], 1):
        differences[key] = {"features - random": {"mean": factor * x}}
    return {"differences": differences}


def summary_of(name, seed):
    """What the tables read of a command's summary.json."""
    x = X[seed]
    if name == "divergence":
        layers = [{"layer": 0, "frobenius": x}, {"layer": 1, "frobenius": x + 1}]
        return {"layers": layers}
    if name == "reward":
        return probe_summary("tau", x)
    if name == "pairs":
        return probe_summary("accuracy", x)
    if name == "features":
        found = {"concept": {"of": 9, "auc": {"features": 10 * x}}}
        return {"saes": {f"runs/sae/seed_{seed}/policy/3_mlp": {"found": found}}}
    if name == "ablate":
        return ablation_summary(x, seed)
    return {}


def seed_of(folder):
    """.../seed_2 -> 2; the SFT policy, which all seeds share, counts as 0."""
    _, _, seed = folder.rpartition("seed_")
    return int(seed) if seed.isdigit() else 0


@pytest.fixture
def ran(monkeypatch):
    """The commands that are run: each is parsed, and leaves its made-up summary."""
    commands = []

    def run(command):
        commands.append(command)
        _, name, *_ = shlex.split(command)
        _, config = parse_command(command)
        Path(config.output_dir).mkdir(parents=True)
        summary = summary_of(name, seed_of(config.output_dir))
        write_json(f"{config.output_dir}/summary.json", summary)

    monkeypatch.setattr(common, "run_command", run)
    return commands


@pytest.fixture
def run_study(tmp_path, ran):
    """A function: run the study, with further flags. -> its folder"""

    def run(*flags):
        study.main(["--output_dir", str(tmp_path), "--jobs", "1", *flags])
        return tmp_path / "quick" if "--quick" in flags else tmp_path

    return run


def refuse(constant):
    pytest.fail(f"{constant} is not JSON")


def read_tables(folder):
    text = (folder / "summary.json").read_text()
    return json.loads(text, parse_constant=refuse)["tables"]


# ----------------------------------------------------------------------------------------- the runs


def test_every_run_is_made_once(run_study, ran):
    run_study("--seeds", "3")
    assert len(ran) == 1 + SEEDS * RUNS_OF_A_SEED
    run_study("--seeds", "3")
    assert len(ran) == 1 + SEEDS * RUNS_OF_A_SEED


# (title, row, a, b): the number of a seed in that row is a x + b.
BEFORE = "ablation of features that fire before positive words"
ON = "ablation of features that fire on positive words"
ROWS = [
    ("divergence, sum of Frobenius norms", "layer 1", 1, 1),
    ("probe, words, activations", "tau: policy, activations", 1, 0),
    ("probe, pairs, activations", "policy less base, activations", 1, -0.5),
    ("concepts with an AUC above .95", "policy 3_mlp, concept (of 9): features", 10, 0),
    (ON, "gold: features - random", 1, 0),
    (ON, "proxy: features - random", 2, 0),
    (BEFORE, "cue: features - random", 3, 0),
    (BEFORE, "gold: sentiment: features - random", 4, 0),
]


def test_tables_are_the_summaries_with_intervals(run_study):
    tables = read_tables(run_study("--seeds", "3"))
    mean = sum(X) / SEEDS
    # The 97.5% point of Student's t with 2 degrees of freedom, times s / sqrt(3).
    half_width = 4.30265 * stdev(X) / SEEDS**0.5
    for title, row, a, b in ROWS:
        expected = [a * mean + b, a * half_width]
        assert tables[title][row] == pytest.approx(expected, rel=1e-4), (title, row)


def test_tables_are_printed_and_the_probes_drawn(run_study, capsys):
    folder = run_study("--seeds", "3")
    assert "concepts with an AUC above .95" in capsys.readouterr().out
    if find_spec("matplotlib"):
        assert (folder / "probes.png").read_bytes().startswith(b"\x89PNG")


def test_quick_is_one_seed_in_a_folder_of_its_own(run_study, ran, capsys):
    whole = read_tables(run_study("--seeds", "3"))
    ran.clear()
    capsys.readouterr()

    quick = read_tables(run_study("--quick"))

    assert len(ran) == 1 + RUNS_OF_A_SEED
    printed = capsys.readouterr().out
    assert printed.count("[QUICK, one seed: not the study's numbers]") == len(whole)
    # The same tables and rows; a single seed has no interval: null, not NaN.
    assert quick.keys() == whole.keys()
    for title, table in quick.items():
        assert table.keys() == whole[title].keys()
    assert quick["divergence, sum of Frobenius norms"]["layer 1"][1] is None
    assert "nan" not in printed


# ------------------------------------------------------------------------ the picture of the probes

ACTIVATIONS = {
    "tau: policy, activations": (0.6, 0.1),
    "tau: base, activations": (0.4, float("nan")),
    "policy less base, activations": (0.2, 0.1),
}
FEATURES = {
    "tau: policy, SAE features": (0.3, 0.2),
    **ACTIVATIONS,
    "tau: bag of words": (-0.05, 0.0),
    "policy less bag of words": (0.3, 0.1),
}


@pytest.fixture
def lines():
    """The lines of the picture, of made-up tables."""
    tables = {f"probe, {probe}": ACTIVATIONS for probe in study.PROBES}
    tables["probe, words, features"] = FEATURES
    return study.probe_lines(tables)


def test_each_probe_is_a_line(lines):
    assert list(lines) == [
        "words, activations",
        "words, less the neutral word",
        "words, residual stream",
        "words, features",
        "words, the same two layers",
        "responses, activations",
        "pairs, activations",
    ]


def test_features_have_the_activations_beside_them(lines):
    """A probe on features also has activations, of the same two layers: a line of their own."""
    activations = {"policy": (0.6, 0.1), "base": ACTIVATIONS["tau: base, activations"]}
    assert lines["words, features"] == {"policy": (0.3, 0.2), "bag of words": (-0.05, 0.0)}
    assert lines["words, the same two layers"] == activations
    assert lines["words, activations"] == activations


def test_each_input_is_a_marker_on_its_lines(lines):
    matplotlib = pytest.importorskip("matplotlib.figure")
    figure = matplotlib.Figure()
    study.draw(figure, lines)
    drawn = {}
    for container in figure.axes[0].containers:
        drawn[container.get_label()] = container.lines[0].get_xydata().tolist()
    # (mean, line): features are line 3.
    assert drawn["bag of words"] == [[-0.05, 3]]
    expected = [[0.6, 0], [0.6, 1], [0.6, 2], [0.3, 3], [0.6, 4], [0.6, 5], [0.6, 6]]
    assert drawn["policy"] == expected
    assert drawn["base"] == [[0.4, line] for line in (0, 1, 2, 4, 5, 6)]

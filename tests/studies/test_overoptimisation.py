"""The overoptimisation study (nanorlhf/studies/overoptimisation.py), reduced: its plumbing and what must hold whatever the runs find."""

import json

import pytest
import torch
from support import ALL_SCRIPTS, parse_command

from nanorlhf.runtime import cli
from nanorlhf.studies import common, overoptimisation

pytestmark = pytest.mark.slow

SMALL = [
    "--seeds", "1", "--members", "2", "--label_noise", "0.25", "--kl_coef", "0.05", "--steps", "2", "--eval_every", "1", "--n_answers", "8",
    "--prompts", "6", "--jobs", "1", "--sft_flags=--steps 15 --batch_size 16 --eval_size 8",
    "--rm_flags=--steps 4 --batch_size 8 --eval_size 16", "--ppo_flags=--batch_size 8 --minibatch_size 8 --eval_size 6 --max_new_tokens 12", "--bon_flags=--max_new_tokens 12",
]  # fmt: skip

MARK = " [QUICK, one seed: not the study's numbers]"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study's module, with commands run in this process, its folder, and the commands that it ran."""
    ran, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)

    def run(command):
        main, config = parse_command(command)
        main(config)
        ran.append(command)

    folder = tmp_path_factory.mktemp("study") / "quick"  # where --quick looks for its runs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "run_command", run)
        for script in ALL_SCRIPTS.values():
            patch.setattr(script, "plot_run", lambda run: None, raising=False)
        overoptimisation.main(["--output_dir", str(folder), *SMALL])
        first = list(ran)
        overoptimisation.main(
            ["--output_dir", str(folder), *SMALL]
        )  # a second time there is nothing to do
    torch.set_num_threads(threads)
    yield overoptimisation, folder, first, ran
    cli.distributed.shutdown()


def test_every_cell_is_run_once(study):
    _, _, first, ran = study
    assert [c.split()[0] for c in first] == [
        "train_sft.py",
        "sample_bon.py",
        "train_rm.py",
        *["train_ppo.py"] * 4,
        "sample_bon.py",
    ]
    assert ran == first


def test_quick_marks_its_tables(study, capsys):
    module, folder, _, _ = study
    module.main(
        ["--quick", "--output_dir", str(folder.parent), *SMALL]
    )  # its runs are there already
    quick = capsys.readouterr().out
    module.main(["--output_dir", str(folder), *SMALL])
    whole = capsys.readouterr().out
    assert (
        quick.count(MARK) == 2 and quick.replace(MARK, "") == whole
    )  # one table of best-of-n, one of PPO


def test_the_full_study_is_what_the_issue_asks_for(study):
    settings = json.loads((study[1] / "summary.json").read_text())["settings"]
    full = type(
        "Settings",
        (),
        settings | {"seeds": 5, "members": 5, "label_noise": [0, 0.25], "kl_coef": [0, 0.05]},
    )
    sft, rm, ppo, bon = study[0].commands(full)
    assert [len(sft), len(rm), len(ppo), len(bon)] == [1, 11, 80, 10]
    folders = [
        words[words.index("--output_dir") + 1] for words in map(str.split, sft + rm + ppo + bon)
    ]
    assert len(set(folders)) == len(folders)
    flags = [dict(zip(w[1::2], w[2::2])) for w in map(str.split, rm[1:])]
    members = [range(int(f["--seed"]), int(f["--seed"]) + int(f["--members"])) for f in flags]
    assert sorted(seed for part in members for seed in part) == sorted(
        [*range(25)] * 2
    )  # no two seeds share a member
    assert {(f["--noise_seed"], f["--dataset"]) for f in flags} == {
        (str(s), f"world:{s}") for s in range(5)
    }


def test_all_objectives_start_from_the_same_answers(study):
    tables = json.loads((study[1] / "summary.json").read_text())["gold"]
    assert set(tables) == {"best-of-n, label noise 0.25", "PPO, label noise 0.25, kl_coef 0.05"}
    assert (
        len({cell["start"][0] for cell in tables["PPO, label noise 0.25, kl_coef 0.05"].values()})
        == 1
    )
    starts = [cell["start"][0] for cell in tables["best-of-n, label noise 0.25"].values()]
    golds = [
        json.loads(line)["gold_scores"]
        for line in (study[1] / "pool" / "pool.jsonl").read_text().splitlines()
    ]
    assert starts == pytest.approx(
        [sum(map(sum, golds)) / 48] * len(starts)
    )  # best of 1: the mean of the pool


def test_single_is_one_model_and_the_others_are_all(study):
    root = study[1] / "ppo_noise0.25_kl0.05"
    configs = {
        p.parent.parent.name: json.loads(p.read_text()) for p in root.glob("*/seed_0/config.json")
    }
    assert set(configs) == {"single", "mean", "wco", "uwo"}
    assert [len(configs[name]["reward_model"]) for name in ("single", "mean", "wco", "uwo")] == [
        1,
        2,
        2,
        2,
    ]
    assert [configs[name]["objective"] for name in ("single", "mean", "wco", "uwo")] == [
        "mean",
        "mean",
        "wco",
        "uwo",
    ]
    start = {
        name: json.loads((root / name / "seed_0" / "metrics.jsonl").read_text().splitlines()[0])
        for name in configs
    }
    assert max(start["wco"]["eval/proxy"], start["uwo"]["eval/proxy"]) < start["mean"]["eval/proxy"]
    assert start["mean"]["eval/score/seed_0"] == start["single"]["eval/proxy"]


def test_intervals_and_falls(study):
    mean, half = study[0].t_interval([1.0, 2.0, 3.0, 4.0, 6.0])
    assert mean == 3.2 and half == pytest.approx(2.776445 * 1.923538 / 5**0.5, rel=1e-4)
    cell = study[0].cell_of([[(0, 1.0), (5, 3.0), (10, -1.0)], [(0, 1.0), (5, 1.5), (10, 2.0)]])
    assert cell == {
        "start": [1.0, 1.0],
        "peak": [3.0, 2.0],
        "at": [5, 10],
        "end": [-1.0, 2.0],
        "fall": [4.0, 0.0],
    }


def test_pictures_are_there(study):
    pytest.importorskip("matplotlib")
    for name in ("bon.png", "ppo.png"):
        assert (study[1] / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

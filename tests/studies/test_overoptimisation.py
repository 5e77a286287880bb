"""The overoptimisation study (nanorlhf/studies/overoptimisation.py), reduced: what it runs, and
what must hold whatever the runs find.
"""

import shlex
from statistics import fmean

import pytest

from nanorlhf.studies import overoptimisation

pytestmark = pytest.mark.slow

SMALL = """
    --seeds 1 --members 2 --label_noise 0.25 --kl_coef 0.05 --jobs 1
    --steps 2 --eval_every 1 --n_answers 8 --prompts 6
    "--sft_flags=--steps 15 --batch_size 16 --eval_size 8"
    "--rm_flags=--steps 4 --batch_size 8 --eval_size 16"
    "--ppo_flags=--batch_size 8 --minibatch_size 8 --eval_size 6 --max_new_tokens 12"
    "--bon_flags=--max_new_tokens 12"
"""
BON = "best-of-n, label noise 0.25"
PPO = "PPO, label noise 0.25, kl_coef 0.05"


@pytest.fixture(scope="module")
def study(run_small):
    return run_small(overoptimisation, SMALL)


def test_every_cell_is_run_once(study):
    scripts = [command.split()[0] for command in study.first]
    expected = ["train_sft.py", "sample_bon.py", "train_rm.py"]
    expected += 4 * ["train_ppo.py"]  # one member alone, mean, wco, uwo
    expected += ["sample_bon.py"]
    assert scripts == expected
    # A second time there is nothing to do.
    study.run()
    assert study.ran == study.first


def test_quick_marks_its_tables(study):
    mark = " [QUICK, one seed: not the study's numbers]"
    quick = study.run_quick()
    assert quick.count(mark) == 2  # one table of best-of-n, one of PPO
    assert quick.replace(mark, "") == study.run()


@pytest.fixture
def full_commands(study):
    """The stages of the full study: five seeds of five members, with and without noise and KL."""
    full = study.settings(seeds=5, members=5, label_noise=[0, 0.25], kl_coef=[0, 0.05])
    return overoptimisation.commands(full)


def test_how_many_runs_the_full_study_has(full_commands):
    sft, rm, ppo, bon = full_commands
    assert len(sft) == 1
    assert len(rm) == 1 + 5 * 2  # the pool; seeds, label noise
    assert len(ppo) == 5 * 2 * 2 * 4  # seeds, label noise, KL coefficients, objectives
    assert len(bon) == 5 * 2


def test_every_run_of_the_full_study_has_a_folder_of_its_own(full_commands):
    folders = []
    for stage in full_commands:
        for command in stage:
            words = command.split()
            folders.append(words[words.index("--output_dir") + 1])
    assert len(set(folders)) == len(folders)


def test_no_two_seeds_share_a_member_or_its_data(full_commands):
    _, (_, *rm_commands), _, _ = full_commands
    members = []
    data_seeds = set()
    for command in rm_commands:
        _, *words = shlex.split(command)
        flags = dict(zip(words[::2], words[1::2]))
        first = int(flags["--seed"])
        members += range(first, first + int(flags["--members"]))
        data_seeds.add((flags["--noise_seed"], flags["--dataset"]))
    # Every member twice: with both kinds of label noise.
    assert sorted(members) == sorted([*range(25), *range(25)])
    assert data_seeds == {(str(s), f"world:{s}") for s in range(5)}


def test_all_policies_start_from_the_same_answers(study):
    tables = study.summary["gold"]
    assert set(tables) == {BON, PPO}
    starts = {cell["start"][0] for cell in tables[PPO].values()}
    assert len(starts) == 1


def test_best_of_n_starts_from_the_mean_of_the_pool(study):
    golds = []
    for row in study.read_rows("pool/pool.jsonl"):
        golds += row["gold_scores"]
    assert len(golds) == 6 * 8
    for cell in study.summary["gold"][BON].values():
        assert cell["start"] == [pytest.approx(fmean(golds))]


def test_single_is_the_mean_of_the_curves_of_the_members(study):
    results = study.read("bon_noise0.25/seed_0/bon_results.json")
    first_end = results["seed_0"][-1]["gold_score"]
    second_end = results["seed_1"][-1]["gold_score"]
    assert first_end != second_end
    cell = study.summary["gold"][BON]["single"]
    assert cell["end"] == [pytest.approx((first_end + second_end) / 2)]


@pytest.mark.parametrize(
    "method, n_models, objective",
    [("single", 1, "mean"), ("mean", 2, "mean"), ("wco", 2, "wco"), ("uwo", 2, "uwo")],
)
def test_single_is_one_model_and_the_others_are_all(study, method, n_models, objective):
    config = study.read(f"ppo_noise0.25_kl0.05/{method}/seed_0/config.json")
    assert len(config["reward_model"]) == n_models
    assert config["objective"] == objective


def test_the_first_evaluation_is_by_the_objective(study):
    first = {}
    for method in ("single", "mean", "wco", "uwo"):
        first[method], *_ = study.read_rows(f"ppo_noise0.25_kl0.05/{method}/seed_0/metrics.jsonl")
    # The careful objectives give less than the mean of the members.
    assert first["wco"]["eval/proxy"] < first["mean"]["eval/proxy"]
    assert first["uwo"]["eval/proxy"] < first["mean"]["eval/proxy"]
    assert first["mean"]["eval/score/seed_0"] == first["single"]["eval/proxy"]


def test_intervals_by_hand():
    mean, half_width = overoptimisation.t_interval([1.0, 2.0, 3.0, 4.0, 6.0])
    assert mean == 3.2
    # The 97.5% point of Student's t with 4 degrees of freedom, times s / sqrt(5).
    assert half_width == pytest.approx(2.776445 * 1.923538 / 5**0.5, rel=1e-4)


def test_peaks_and_falls_of_two_curves():
    curves = [[(0, 1.0), (5, 3.0), (10, -1.0)], [(0, 1.0), (5, 1.5), (10, 2.0)]]
    cell = overoptimisation.cell_of(curves)
    assert cell["start"] == [1.0, 1.0]
    assert cell["peak"] == [3.0, 2.0]
    assert cell["at"] == [5, 10]
    assert cell["end"] == [-1.0, 2.0]
    assert cell["fall"] == [4.0, 0.0]
    assert len(cell) == 5


@pytest.mark.parametrize("name", ["bon.png", "ppo.png"])
def test_pictures_are_there(study, name):
    pytest.importorskip("matplotlib")
    assert study.has_picture(name)

"""The study of optimisers (nanorlhf/studies/optimisers.py, optimiser_results.py): what it picks and
compares on made-up numbers, and the whole of it on models that learn nothing.
"""

import json
import math
import shlex
from collections import Counter
from itertools import combinations
from statistics import fmean

import pytest
from support import parse_command

from nanorlhf.studies import common, kept_cells, optimisers
from nanorlhf.studies import optimiser_results as results_module
from nanorlhf.studies.optimisers import Setting

ON_POLICY = ["ppo", "rloo", "dr_grpo", "grpo"]


def read_settings(*args):
    return optimisers.read_settings(["--output_dir", "out", *args])


# ----------------------------------------------------------------------------------------- tuning


@pytest.fixture
def tune(monkeypatch):
    """A function: gold(name, lr, strength) instead of runs -> the choices, the cells' names."""

    def run(gold, *flags):
        asked = []

        def run_cells(cells, a, path):
            results = {}
            for cell in cells:
                asked.append(cell.name)
                words = cell.command.split()
                lr = float(words[words.index("--lr") + 1])
                flag = "--dpo_beta" if "/dpo/" in cell.name else "--kl_coef"
                strength = float(words[words.index(flag) + 1])
                # Only the end counts.
                results[cell.name] = {"gold": [9.0, gold(cell.name, lr, strength)]}
            return results

        monkeypatch.setattr(optimisers, "run_cells", run_cells)
        tried = optimisers.tune(read_settings(*flags), "cells.json")
        chosen = {method: optimisers.best_of(golds) for method, golds in tried.items()}
        return chosen, asked

    return run


# Three rates, and three further coefficients.
GRIDS = "--lr 1e-4 3e-4 1e-3 --kl_coef 0.05 0.02 0.1 0.2".split()
GRIDS += "--dpo_lr 1e-4 3e-5 3e-4 --dpo_beta 0.1 0.03 0.3 1".split()


def gold_around(name, lr, strength):
    """Gold that falls off on both sides of lr 3e-4, and of a coefficient of 0.1 (DPO: 0.3)."""
    best_strength = 0.3 if "/dpo/" in name else 0.1
    gold_of_seed = int(name[-1])  # the seeds differ everywhere by as much
    return gold_of_seed - abs(math.log(lr / 3e-4)) - abs(math.log(strength / best_strength))


def test_tuning_picks_the_best_rate_and_then_the_best_coefficient(tune):
    chosen, asked = tune(gold_around, *GRIDS)
    expected = dict.fromkeys(ON_POLICY, Setting(3e-4, 0.1)) | {"dpo": Setting(3e-4, 0.3)}
    assert chosen == expected
    # On two seeds, for each of five methods.
    assert len(set(asked)) == len(asked) == (3 + 3) * 2 * 5
    assert {name.rpartition("_")[2] for name in asked} == {"100", "101"}
    # All rates are tried at the first coefficient, the other coefficients at the best rate alone.
    of_rloo = {name.split("/")[2] for name in asked if "/rloo/" in name}
    at_first = {"lr_0.0001_0.05", "lr_0.0003_0.05", "lr_0.001_0.05"}
    at_best = {"lr_0.0003_0.02", "lr_0.0003_0.1", "lr_0.0003_0.2"}
    assert of_rloo == at_first | at_best


def test_tuning_judges_by_the_mean_over_seeds(tune):
    """One seed likes the highest rate very much, and the other one even less."""

    def gold(name, lr, strength):
        if lr == 1e-3:
            return {"100": 3.0, "101": -4.0}[name[-3:]]
        return lr

    chosen, _ = tune(gold, *GRIDS)
    assert {setting.lr for setting in chosen.values()} == {3e-4}


def test_the_kept_cells_are_those_of_the_study_as_it_is():
    """Their commands are compared when results are read: one that differs is an error."""
    a = optimisers.read_settings([])
    path = kept_cells.results_file(a, optimisers.__file__)
    kept = kept_cells.read_cells(path)
    tried = optimisers.tune(a, path)  # all of tuning is kept: nothing runs
    chosen = {method: optimisers.best_of(golds) for method, golds in tried.items()}
    runs, pools = optimisers.gold_cells(a, chosen)
    cells = [*optimisers.headline_cells(a, chosen), *runs, *pools]
    assert {cell.name for cell in cells} <= set(kept)
    for cell in [*cells, *optimisers.place_cells(a, chosen["rloo"].lr)]:
        if cell.name in kept:
            assert kept[cell.name]["command"] == kept_cells.kept_form(cell.command, a)


def test_a_single_setting_is_not_tried(tune):
    chosen, asked = tune(gold_around, "--quick")
    assert asked == []
    assert set(chosen.values()) == {Setting(3e-4, 0.05), Setting(1e-4, 0.1)}


def test_a_choice_at_the_edge_of_its_grid_is_said_to_be(capsys):
    a = read_settings("--lr", "1", "2", "3", "--kl_coef", "5", "4", "6")
    golds = {Setting(1.0, 5.0): [0.0, 1.0], Setting(2.0, 5.0): [2.0, 2.0]}
    optimisers.print_tuning(a, {"ppo": golds})
    middle = capsys.readouterr().out
    assert "0.500  (0.00, 1.00)\n" in middle
    assert middle.endswith("2.000  (2.00, 2.00)  <- chosen\n")

    golds |= {Setting(3.0, 4.0): [3.0, 3.0]}
    optimisers.print_tuning(a, {"ppo": golds})
    words = "<- chosen, at the edge of the learning rates, at the edge of the coefficients\n"
    assert capsys.readouterr().out.endswith(words)


# ------------------------------------------------------------------------------------- comparisons


def make_run(golds, kls):
    return {"gold": golds, "kl": kls, "proxy": [0.0] * len(golds)}


def test_the_end_the_peak_and_the_fall_of_two_seeds():
    first = make_run([0.0, 3.0, 1.0], [0.0, 4.0, 9.0])
    second = make_run([0.0, 1.0, 2.0], [0.0, 5.0, 6.0])
    table = results_module.compare_ends({"ppo": [first, second], "rloo": [second, first]})
    assert table["ppo"]["gold"] == [1.0, 2.0]
    assert table["ppo"]["peak of gold"] == [3.0, 2.0]
    assert table["ppo"]["KL at the peak"] == [4.0, 6.0]
    assert table["ppo"]["fall"] == [2.0, 0.0]
    # Differences are taken within a seed.
    assert table["rloo"]["less ppo's"] == [1.0, -1.0]
    assert "less ppo's" not in table["ppo"]


@pytest.mark.parametrize(
    "kl, expected",
    [
        (0, -1.0),
        (1, 1.0),  # d = 1: half of the way from d = 0 to d = 2
        (4, 3.0),
        (6.25, 2.5),  # d = 2.5, between 2 and 3; the way back, later, does not count
        (9, 2.0),
        (9.1, None),
        (-0.1, -1.0),
    ],
)
def test_gold_at_a_kl_lies_on_lines_in_its_root(kl, expected):
    points = [(-0.2, -1.0), (4.0, 3.0), (9.0, 2.0), (4.0, 100.0)]
    assert results_module.value_at_kl(points, kl) == expected


def test_gold_at_a_kl_below_all_points_is_unknown():
    assert results_module.value_at_kl([(4.0, 1.0), (9.0, 2.0)], 3.9) is None
    assert results_module.value_at_kl([(4.0, 1.0), (4.0, 2.0)], 4.0) == 1.0


def test_places_are_compared_at_the_same_kl_and_within_a_seed():
    """Two seeds: in one, k2 has 0.5 more gold than k1 at its KL; in the other, it is beyond."""

    def ends(*points):
        return [make_run([0.0, gold], [0.0, kl]) for gold, kl in points]

    # k1's KL does not rise with the order of its coefficients.
    k1 = {
        0.02: ends((3.0, 16.0), (0.0, 16.0)),
        0.05: ends((1.0, 4.0), (0.0, 4.0)),
        0.2: ends((9.0, 25.0), (0.0, 25.0)),
    }
    k2 = {0.05: ends((2.5, 9.0), (7.0, 36.0)), 0.1: ends((6.5, 20.25), (7.0, 36.0))}
    table, less_k1 = results_module.compare_places({"k1": k1, "k2": k2}, "k1")
    assert list(table) == ["k1 0.02", "k1 0.05", "k1 0.2", "k2 0.05", "k2 0.1"]
    assert table["k2 0.05"] == {"gold": [2.5, 7.0], "proxy": [0.0, 0.0], "KL": [9.0, 36.0]}
    assert less_k1 == {"k2 0.05": {"less k1's": [0.5]}, "k2 0.1": {"less k1's": [0.5]}}


def test_where_two_curves_of_max_at_k_cross():
    policy = {1: 2.0, 2: 2.5, 4: 3.0, 8: 3.2}
    assert results_module.crossing(policy, {1: 0.0, 2: 1.0, 4: 2.0, 8: 3.0}) is None
    assert results_module.crossing(policy, {1: 2.5, 2: 2.0, 4: 0.0, 8: 0.0}) == 1
    # From 1 ahead at k = 2 to 1 behind at k = 4: half of the way, on a logarithmic axis.
    sft = {1: 0.0, 2: 1.5, 4: 4.0, 8: 5.0}
    assert results_module.crossing(policy, sft) == pytest.approx(2**1.5)


# --------------------------------------------------------------------------------- the study's runs

SMALL = """
    --seeds 1 --trial_seeds 1 --tuning_seeds 100 --jobs 1 --results {results}
    --lr 1e-3 1e-4 --kl_coef 0.05 --dpo_lr 1e-4 --dpo_beta 0.1 0.3 --place_coefs 0.02 0.2
    --tuning_steps 1 --steps 2 --gold_steps 2 --eval_every 1 --no_kl_steps 1 --no_kl_eval_every 1
    --place_steps 1 --dpo_steps 2 --dpo_eval_every 1 --n_answers 8 --k_answers 4 --prompts 4
    "--sft_flags=--steps 15 --batch_size 16 --eval_size 8"
    "--rm_flags=--steps 4 --batch_size 8 --eval_size 16"
    "--ppo_flags=--batch_size 8 --minibatch_size 8 --eval_size 6 --max_new_tokens 12 --n_samples 1"
    "--dpo_flags=--batch_size 8 --eval_size 6 --max_new_tokens 12 --n_samples 1"
    "--bon_flags=--max_new_tokens 12"
"""


RUN = {"step": [0, 1], "gold": [0.0, 1.0], "proxy": [0.0, 1.0], "kl": [0.0, 4.0]}
POOL = {"n": [1, 2, 4], "kl": [0.0, 0.2, 0.6], "proxy": [0.0, 1.0, 2.0], "gold": [0.0, 1.0, 2.0]}


@pytest.fixture
def run_nothing(monkeypatch, tmp_path):
    """A function: the study with made-up results instead of runs -> the commands, the output."""
    monkeypatch.chdir(tmp_path)
    ran = []

    def run_command(command):
        ran.append(command)
        folder = tmp_path / common.output_of(command.split())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text("{}")

    monkeypatch.setattr(common, "run_command", run_command)
    monkeypatch.setattr(kept_cells, "describe_commit", lambda: "abc1234")
    monkeypatch.setattr(optimisers, "draw_picture", lambda *args: None)
    monkeypatch.setattr(optimisers, "read_run", lambda folder: RUN | {"entropy": [None, 1.0]})
    monkeypatch.setattr(optimisers, "read_bon", lambda folder: POOL)

    def run(*flags):
        ran.clear()
        optimisers.main([*shlex.split(SMALL.format(results="cells.json")), *flags])
        return list(ran)

    return run


def test_every_run_is_made_once(run_nothing, capsys):
    ran = run_nothing("--output_dir", "out")
    first = capsys.readouterr().out
    scripts = Counter(command.split()[0] for command in ran)
    assert scripts == {
        # SFT; DPO with two betas, and tuned.
        "train_sft.py": 1 + 2 + 1,
        # Of the tuning seed, and of the study's.
        "train_rm.py": 2,
        # Two rates of four methods; tuned, without KL and on gold; three places, two coefficients.
        "train_ppo.py": 2 * 4 + 3 * 4 + 3 * 2,
        # The pool; best-of-n from it; of policies on gold. Later the pool is read as a cell.
        "sample_bon.py": 1 + 1 + 4 + 1,
    }
    assert len(set(ran)) == len(ran) - 1

    cells = kept_cells.read_cells("cells.json")
    assert len(cells) == len(ran) - (1 + 2 + 1)  # SFT, reward models, the pool once
    # A second time nothing runs, not even in another folder, and the tables are the same.
    assert run_nothing("--output_dir", "elsewhere") == []
    again = capsys.readouterr().out
    tables = [line for line in first.splitlines() if not line.startswith(("done:", "kept:"))]
    assert again.splitlines() == tables


def test_a_study_goes_on_where_it_lacks_a_cell(run_nothing):
    run_nothing("--output_dir", "out")
    cells = kept_cells.read_cells("cells.json")
    command = cells.pop("max_at_k/grpo/seed_0")["command"]
    kept_cells.write_cells("cells.json", cells)
    assert run_nothing("--output_dir", "out") == [command.replace("runs/optimisers", "out")]
    # In an empty folder it makes what this one needs first.
    kept_cells.write_cells("cells.json", cells)
    ran = run_nothing("--output_dir", "empty")
    assert [common.output_of(command.split()) for command in ran] == [
        "empty/sft",
        "empty/gold/grpo/seed_0",
        "empty/max_at_k/grpo/seed_0",
    ]


@pytest.fixture(scope="module")
def study(run_small, tmp_path_factory):
    results = tmp_path_factory.mktemp("kept") / "cells.json"
    return run_small(optimisers, SMALL.format(results=results))


@pytest.fixture
def cells(study):
    """What the study has kept: {name: {command, commit, result}}."""
    flags = dict(zip(study.flags[::2], study.flags[1::2]))
    with open(flags["--results"]) as f:
        return json.load(f)["cells"]


@pytest.mark.slow
def test_methods_differ_in_their_flags_alone(study, cells):
    def config_of(method):
        _, config = parse_command(cells[f"no_kl/{method}/seed_0"]["command"])
        return vars(config)

    ppo = config_of("ppo")
    assert ppo["kl_coef"] == 0
    differing = {}
    for method in ON_POLICY[1:]:
        config = config_of(method)
        differing[method] = {name for name in ppo if config[name] != ppo[name]}
    of_all = {"advantage", "group_size", "loss_mean", "output_dir", "lr"}
    assert differing["rloo"] - of_all == set()
    assert differing["dr_grpo"] - of_all == {"kl_in", "kl_kind"}
    assert differing["grpo"] - of_all == {"kl_in", "kl_kind"}


@pytest.mark.slow
def test_dpo_and_the_reward_model_learn_from_the_same_pairs(study, cells):
    of_tuning, of_study = [x for x in study.first if x.startswith("train_rm.py")]
    assert "--seed 100" in of_tuning
    _, rm_config = parse_command(of_study)
    _, dpo_config = parse_command(cells["tuned/dpo/seed_0"]["command"])
    for name in ("dataset", "seed", "label_noise", "noise_seed"):
        assert getattr(rm_config, name) == getattr(dpo_config, name)
    assert dpo_config.label_noise == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tuned/ppo", "tuned/grpo", "tuned/dpo", "gold/rloo"])
def test_a_result_is_what_the_run_has_logged(study, cells, name):
    result = cells[f"{name}/seed_0"]["result"]
    rows = study.read_rows(f"{name}/seed_0/metrics.jsonl")
    evaluations = [row for row in rows if "eval/gold" in row]
    assert result["step"] == [row["step"] for row in evaluations] == [0, 1, 2]
    for column in ("gold", "proxy", "kl", "length", "distinct_2"):
        logged = [row[f"eval/{column}"] for row in evaluations]
        assert result[column] == pytest.approx(logged, rel=1e-3)
    assert result["entropy"][0] is None


@pytest.mark.slow
def test_all_policies_start_from_the_same_answers(cells):
    starts = set()
    for method in [*ON_POLICY, "dpo"]:
        result = cells[f"tuned/{method}/seed_0"]["result"]
        starts.add(result["gold"][0])
    assert len(starts) == 1


@pytest.mark.slow
def test_max_at_k_is_the_mean_over_all_subsets(study, cells):
    result = cells["max_at_k/grpo/seed_0"]["result"]
    rows = study.read_rows("max_at_k/grpo/seed_0/pool.jsonl")
    expected = []
    for k in (1, 2, 4):
        best = [fmean(map(max, combinations(row["gold_scores"], k))) for row in rows]
        expected.append(fmean(best))
    assert result["n"] == [1, 2, 4]
    assert result["gold"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_quick_marks_its_tables(study):
    mark = " [QUICK, one seed: not the study's numbers]"
    quick = study.run_quick()
    assert quick.count(mark) == 11
    assert quick.replace(mark, "") == study.run()


def scripts_in(commands):
    return {command.split()[0] for command in commands}


@pytest.mark.slow
def test_quick_runs_the_same_scripts_in_a_folder_of_its_own():
    def commands_of(*flags):
        found = {}  # a set that keeps the order
        for commands in optimisers.commands(read_settings(*flags)):
            found |= dict.fromkeys(commands)
        return list(found)

    quick = commands_of("--quick")
    whole = commands_of()
    assert len(quick) < len(whole) / 4
    for command in quick:
        parse_command(command)
        assert "--output_dir out/quick/" in command
    assert scripts_in(quick) == scripts_in(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimisers.png", "max_at_k.png"])
def test_pictures_are_there(study, name):
    pytest.importorskip("matplotlib")
    assert study.has_picture(name)

"""nanorlhf/studies/overoptimisation.py and overoptimisation_results.py.

Which runs the study is made of, what it reads and compares on files and numbers made by hand, and a
small one that is run whole.
"""

import json
import math
import shlex
from collections import Counter
from itertools import combinations
from statistics import correlation, fmean, stdev

import pytest
from support import write_rows

from nanorlhf.studies import common, kept_cells, overoptimisation
from nanorlhf.studies import overoptimisation_results as results_module
from nanorlhf.studies.overoptimisation import FINETUNE, LAMBDAS, METHODS, PRETRAIN, WARM, Method
from nanorlhf.studies.plan import describe_size


def read_settings(*args):
    return overoptimisation.read_settings(["--output_dir", "out", *args])


# ---------------------------------------------------------------------------- the full study's runs


@pytest.fixture(scope="module")
def full_commands():
    """Every command of the full study, once."""
    commands = []
    for stage in overoptimisation.commands(read_settings()):
        commands += stage
    return commands


def flags_of(command):
    """{flag: the words behind it} of a command line."""
    _, *words = shlex.split(command)
    flags = {}
    for word in words:
        if word.startswith("--"):
            values = flags.setdefault(word, [])
        else:
            values.append(word)
    return flags


def value_of(command, flag):
    (value,) = flags_of(command)[flag]
    return value


def of_script(commands, script):
    return [command for command in commands if command.startswith(script)]


def test_how_many_runs_the_full_study_has(full_commands):
    a = read_settings()
    trainings = of_script(full_commands, "train_rm.py")
    averages = [command for command in trainings if "--average" in command]
    assert Counter(command.split()[0] for command in full_commands) == {
        # One for each member of a pretrain ensemble; PPO starts from the first.
        "train_sft.py": 5,
        # Of three ensembles with ten seeds, and with three without noise, each warm one averaged;
        # further members for the sweep; two ensembles in the hard setting.
        "train_rm.py": 3 * (10 + 3) + (10 + 3) + 3 + 2 * 5,
        # The headline: two coefficients, six methods. The sweeps: three further numbers of members,
        # three lambdas, five further coefficients of two methods.
        "train_ppo.py": 2 * 6 * (10 + 3) + 3 * 3 + 3 * 3 + 3 * 5 * 2,
        # SFT's answers for best-of-n, for the hard setting, and to measure distances from;
        # best-of-n by three ensembles, and by two in the hard setting.
        "sample_bon.py": 3 + 3 * (10 + 3) + 2 * 5,
    }
    assert len(averages) == 10 + 3
    # What is no cell is needed by cells.
    cells = {cell.command for cell in overoptimisation.all_cells(a)}
    needs = set(full_commands) - cells
    assert cells & needs == set()
    assert len(needs) == 5 + len(trainings) + 3


def test_every_run_of_the_full_study_has_a_folder_of_its_own(full_commands):
    folders = [value_of(command, "--output_dir") for command in full_commands]
    assert len(set(folders)) == len(folders)
    names = [cell.name for cell in overoptimisation.all_cells(read_settings())]
    assert len(set(names)) == len(names)


def test_no_two_seeds_share_pairs(full_commands):
    """A study's seed is what its reward models learn from: it stands in their folders."""
    for command in of_script(full_commands, "train_rm.py"):
        dataset = value_of(command, "--dataset")
        (seed,) = [
            part for part in value_of(command, "--output_dir").split("/") if part[5:].isdigit()
        ]
        assert dataset == f"world:{seed.removeprefix('seed_')}"
        if "--average" not in command:
            assert value_of(command, "--noise_seed") == seed.removeprefix("seed_")
    for cell in overoptimisation.all_cells(read_settings()):
        if cell.name.startswith("ppo"):
            seed = value_of(cell.command, "--seed")
            datasets = set()
            for need in of_script(cell.needs, "train_rm.py"):
                datasets.add(value_of(need, "--dataset"))
            assert datasets == {f"world:{seed}"}


def test_all_policies_and_pools_are_of_one_sft_policy(full_commands):
    starts = set()
    for command in full_commands:
        is_pool = command.startswith("sample_bon.py --model")
        if command.startswith("train_ppo.py") or is_pool:
            starts.add(value_of(command, "--model"))
    assert starts == {"out/sft/seed_0"}


@pytest.mark.slow
def test_what_a_run_reads_is_made_before_it():
    """Every folder that a command names is written by a command ahead of it."""
    for cell in overoptimisation.all_cells(read_settings()):
        written = set()
        for command in [*cell.needs, cell.command]:
            flags = flags_of(command)
            for flag in ("--model", "--reward_model", "--average", "--pool"):
                for path in flags.get(flag, []):
                    if path != "world:gold":
                        assert find_folders(path.removesuffix("/pool.jsonl"), written)
            written |= folders_of(command)


def folders_of(command):
    """The folders that a command writes: of several members one each."""
    flags = flags_of(command)
    (folder,) = flags["--output_dir"]
    if "{seed}" not in folder:
        return {folder}
    (first,) = flags.get("--seed", "0")
    (members,) = flags["--members"]
    seeds = range(int(first), int(first) + int(members))
    return {folder.replace("{seed}", str(i)) for i in seeds}


def find_folders(path, written):
    """The folders that a path stands for, as scripts read it: {seed} is each that is there."""
    before, _, after = path.partition("{seed}")
    found = []
    for folder in written:
        middle = folder.removeprefix(before).removesuffix(after)
        if folder == path or (before + middle + after == folder and middle.isdigit()):
            found.append(folder)
    return sorted(found)


def members_of(method, s=2, noise=0.25):
    """The reward models that a PPO run by a method reads: {folder: the model it started from}"""
    cell = overoptimisation.ppo_cell(read_settings(), s, noise, 0, "name", method)
    starts = {}
    for command in of_script(cell.needs, "train_rm.py"):
        for folder in folders_of(command):
            start = "average"
            if "--model" in command:
                start = value_of(command, "--model").replace("{seed}", folder[-1])
            starts[folder] = start
    members = {}
    for path in flags_of(cell.command)["--reward_model"]:
        folders = find_folders(path, starts)
        assert folders
        for folder in folders:
            members[folder] = starts[folder]
    return members


MEMBER = "out/rm_noise0.25/{}/seed_2/seed_{}"


def list_members(ensemble, *seeds):
    return {MEMBER.format(ensemble, i) for i in seeds}


@pytest.mark.parametrize(
    "method, folders",
    [
        (METHODS["single"], list_members("finetune", 0)),
        (Method(FINETUNE, members=2), list_members("finetune", 0, 1)),
        (METHODS["mean"], list_members("finetune", *range(5))),
        (METHODS["wco"], list_members("finetune", *range(5))),
        (LAMBDAS["uwo_10"], list_members("finetune", *range(5))),
        (
            Method(FINETUNE, members=10),
            list_members("finetune", *range(5)) | list_members("further", *range(5, 10)),
        ),
        (METHODS["pretrain_wco"], list_members("pretrain", *range(5))),
    ],
    ids=["single", "mean_of_2", "mean", "wco", "uwo", "mean_of_10", "pretrain_wco"],
)
def test_which_reward_models_a_method_reads(method, folders):
    members = members_of(method)
    assert set(members) == folders
    starts = sorted(members.values())
    if method.ensemble == PRETRAIN:
        assert starts == [f"out/sft/seed_{i}" for i in range(5)]
    else:
        assert set(starts) == {"out/sft/seed_0"}


def test_the_warm_method_reads_one_model_averaged_over_members_of_one_head():
    assert members_of(METHODS[WARM]) == {"out/rm_noise0.25/warm/seed_2/averaged": "average"}
    members, average = overoptimisation.train_members(read_settings(), 2, 0.25, WARM)
    assert value_of(members, "--head_seed") == "0"
    assert value_of(members, "--model") == "out/sft/seed_0"
    assert value_of(members, "--members") == "5"
    assert value_of(average, "--average") == value_of(members, "--output_dir")


def test_an_average_has_no_flags_of_a_training():
    """train_rm.py --average refuses them; the held-out texts are those of the members."""
    further = "--lr=1e-3 --model 'my lm' --betas 0.9 0.99 --eval_size 7 --steps 3 --dtype bfloat16"
    further += " --lora-rank 3 --independent_noise"
    a = read_settings("--rm_flags", further)
    members, average = overoptimisation.train_members(a, 2, 0.25, WARM)
    assert members.endswith(further)
    own = {"--eval_size": ["7"], "--dtype": ["bfloat16"]}
    _, plain = overoptimisation.train_members(read_settings(), 2, 0.25, WARM)
    assert flags_of(average) == flags_of(plain) | own
    # A dry run asks the script, before there are any members.
    first = "out/rm_noise0.25/warm/seed_2/seed_0"
    assert describe_size(average) == f"the mean of models' weights, from {first}"


@pytest.mark.parametrize("label", METHODS)
def test_the_objective_of_a_method(label):
    cell = overoptimisation.ppo_cell(read_settings(), 0, 0.25, 0, label, METHODS[label])
    expected = "mean"
    for objective in ("wco", "uwo"):
        if label.endswith(objective):
            expected = objective
    assert value_of(cell.command, "--objective") == expected
    assert "--uwo_lambda" not in cell.command


def test_lambdas_are_those_of_their_names():
    lambdas = {}
    for label, method in LAMBDAS.items():
        if not label.startswith("uwo"):
            continue
        cell = overoptimisation.ppo_cell(read_settings(), 0, 0.25, 0, label, method)
        assert value_of(cell.command, "--objective") == "uwo"
        lambdas[label] = float(value_of(cell.command, "--uwo_lambda"))
    assert [label for label in LAMBDAS if label not in lambdas] == ["single", "mean"]
    assert lambdas == {"uwo_0.1": 0.1, "uwo_1": 1.0, "uwo_10": 10.0}


@pytest.mark.parametrize(
    "members, counts",
    [
        (1, {"single": 1, "mean": 1, "mean_of_2": 2}),
        (2, {"single": 1, "mean": 2, "mean_of_4": 4}),
        (3, {"single": 1, "mean_of_2": 2, "mean": 3, "mean_of_6": 6}),
        (5, {"single": 1, "mean_of_2": 2, "mean_of_3": 3, "mean": 5, "mean_of_10": 10}),
    ],
)
def test_the_sweep_of_members_has_as_many_as_its_labels_say(members, counts):
    a = read_settings("--members", str(members))
    found = {}
    for label, method in overoptimisation.member_counts(a).items():
        cell = overoptimisation.ppo_cell(a, 0, 0.25, 0, label, method)
        written = set()
        for command in of_script(cell.needs, "train_rm.py"):
            written |= folders_of(command)
        read = set()
        for path in flags_of(cell.command)["--reward_model"]:
            read |= set(find_folders(path, written))
        found[label] = len(read)
    assert found == counts


def test_the_kept_cells_are_those_of_the_study_as_it_is():
    """Their commands are compared when results are read: one that differs is an error."""
    a = overoptimisation.read_settings([])
    kept = kept_cells.read_cells(kept_cells.results_file(a, overoptimisation.__file__))
    cells = {cell.name: cell for cell in overoptimisation.all_cells(a)}
    assert set(kept) <= set(cells)
    for name, entry in kept.items():
        assert entry["command"] == kept_cells.kept_form(cells[name].command, a)
        assert entry["needs"] == kept_cells.kept_needs(cells[name], a)


# --------------------------------------------------------------- what runs again, and what does not

SMALL = """
    --seeds 1 --trial_seeds 0 --members 2 --methods single wco pretrain_wco warm
    --label_noise 0.25 --kl_coef 0.05 --jobs 1 --results {results}
    --steps 2 --eval_every 1 --n_answers 8 --prompts 6
    --hard_seeds 1 --hard_answers 8 --hard_prompts 4
    "--sft_flags=--steps 15 --batch_size 16 --eval_size 8"
    "--rm_flags=--steps 4 --batch_size 8 --eval_size 16"
    "--ppo_flags=--batch_size 8 --minibatch_size 8 --eval_size 6 --max_new_tokens 12"
    "--bon_flags=--max_new_tokens 12"
"""


def make_run(golds, kls=(0.0, 4.0, 9.0), **columns):
    """A PPO run with three evaluations; two members that agree, unless columns say otherwise."""
    run = {"step": [0, 1, 2], "gold": golds, "proxy": [0.0, 1.0, 2.0], "kl": list(kls)}
    run |= {"variance": [1.0, 2.0, 4.0], "correlation": [0.9, 0.5], "distance": [1.0, 2.0, 3.0]}
    run |= {"accuracy": [0.7], "tau": [0.5], "spread": [1.0]}
    return run | columns


def make_pool(golds):
    """What read_bon() finds of two members and two objectives, with n of 1, 2 and 4."""
    curve = {"proxy": [0.0, 1.0, 2.0], "gold": golds}
    return {"n": [1, 2, 4], "kl": [0.0, 0.193, 0.636], "single": curve, "mean": curve, "wco": curve}


@pytest.fixture
def run_nothing(monkeypatch, tmp_path):
    """A function: the study with made-up results in the place of runs -> the commands."""
    monkeypatch.chdir(tmp_path)
    ran = []

    def run_command(command):
        ran.append(command)
        folder = tmp_path / common.output_of(command.split()).replace("{seed}", "1")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text("{}")

    run = make_run([0.0, 1.0, -1.0])
    pool = make_pool([0.0, 1.0, 2.0])
    monkeypatch.setattr(common, "run_command", run_command)
    monkeypatch.setattr(kept_cells, "describe_commit", lambda: "abc1234")
    monkeypatch.setattr(overoptimisation, "draw_picture", lambda *args: None)
    # These draw seeds a thousand times, and have tests of their own.
    monkeypatch.setattr(overoptimisation, "fit_curves", lambda runs: ["the fits"])
    monkeypatch.setattr(overoptimisation, "compare_signs", lambda runs: {})
    monkeypatch.setattr(overoptimisation, "read_with_distance", lambda folder, known: run)
    monkeypatch.setattr(overoptimisation, "read_bon", lambda folder: pool)

    def run_study(*flags):
        ran.clear()
        overoptimisation.main([*shlex.split(SMALL.format(results="cells.json")), *flags])
        return list(ran)

    return run_study


def tables_in(text):
    lines = text.splitlines()
    return [line for line in lines if not line.startswith(("done:", "kept:"))]


@pytest.mark.slow
def test_every_run_is_made_once_and_its_cell_is_kept(run_nothing, capsys):
    flags = ["--seeds", "2", "--trial_seeds", "1"]
    ran = run_nothing("--output_dir", "out", *flags)
    first = capsys.readouterr().out
    assert len(set(ran)) == len(ran)
    assert Counter(command.split()[0] for command in ran) == {
        "train_sft.py": 2,
        # Three ensembles and an average of two seeds; two in the hard setting; further members.
        "train_rm.py": 2 * 4 + 2 + 1,
        # Four methods. In the sweeps three numbers of members and three lambdas; five further
        # coefficients of one member, which has 0.05 and 0 already, and six of wco.
        "train_ppo.py": 2 * 4 + 3 + 3 + 5 + 6,
        "sample_bon.py": 3 + 2 * 3 + 2,
    }
    cells = kept_cells.read_cells("cells.json")
    is_pool = [command.startswith("sample_bon.py --model") for command in ran]
    n_needs = 2 + (2 * 4 + 2 + 1) + sum(is_pool)
    assert len(cells) == len(ran) - n_needs

    # A second time nothing runs, not even where no run folder is there.
    assert run_nothing("--output_dir", "elsewhere", *flags) == []
    again = capsys.readouterr().out
    assert tables_in(again) == tables_in(first)


def test_a_study_goes_on_where_it_lacks_a_cell(run_nothing):
    run_nothing("--output_dir", "out")
    cells = kept_cells.read_cells("cells.json")
    command = cells.pop("ppo_noise0.25_kl0.05/warm/seed_0")["command"]
    kept_cells.write_cells("cells.json", cells)
    assert run_nothing("--output_dir", "out") == [command.replace("runs/study", "out")]
    # In an empty folder it makes what this one needs first.
    kept_cells.write_cells("cells.json", cells)
    ran = run_nothing("--output_dir", "empty")
    assert [common.output_of(command.split()) for command in ran] == [
        "empty/sft/seed_0",
        "empty/known",
        "empty/rm_noise0.25/warm/seed_0/seed_{seed}",
        "empty/rm_noise0.25/warm/seed_0/averaged",
        "empty/ppo_noise0.25_kl0.05/warm/seed_0",
    ]


@pytest.mark.slow
def test_quick_marks_its_tables(run_nothing, capsys):
    run_nothing("--output_dir", "out", "--trial_seeds", "1")
    whole = capsys.readouterr().out
    run_nothing("--output_dir", "out", "--trial_seeds", "1", "--quick")
    quick = capsys.readouterr().out
    mark = " [QUICK, one seed: not the study's numbers]"
    # Best-of-n twice, PPO, its members, three sweeps, reward models, signs.
    assert quick.count(mark) == 9
    assert tables_in(quick.replace(mark, "")) == tables_in(whole)


@pytest.mark.slow
def test_titles_say_how_many_seeds_a_table_has(run_nothing, capsys):
    """Without label noise there are fewer."""
    run_nothing(
        "--output_dir", "out", "--seeds", "3", "--trial_seeds", "2", "--label_noise", "0.25", "0"
    )
    printed = capsys.readouterr().out
    for title in (
        "best-of-n, label noise 0.25, 3 seeds",
        "PPO, label noise 0.25, kl_coef 0.05, 3 seeds",
        "PPO, label noise 0, kl_coef 0.05, 2 seeds",
        "best-of-n, 200 pairs, label noise 0.4, other prompts, 1 seed",
        "Trial of 2 seeds: number of members",
    ):
        assert f"\n{title}\n" in printed
    # A method is compared with one reward model at each coefficient.
    assert "\nwco, 0.1 " in printed


def test_a_model_of_ones_own_has_one_start():
    """No second SFT policy can be trained: no pretrain ensemble, also in no sweep."""
    a = overoptimisation.read_settings(["--model", "m", "--methods", "single", "warm"])
    commands = []
    for stage in overoptimisation.commands(a):
        commands += stage
    assert not of_script(commands, "train_sft.py")
    starts = set()
    for command in commands:
        starts |= set(flags_of(command).get("--model", []))
    assert starts == {"m"}
    assert overoptimisation.file_of_cells(a) == "runs/study/own/cells.json"
    # By default its methods are those of one start.
    methods = overoptimisation.methods_of(overoptimisation.read_settings(["--model", "m"]))
    assert {method.ensemble for method in methods.values()} == {FINETUNE}


# -------------------------------------------------------------------------- read from a run's files

ANSWERS = {  # {text: (the members' scores, gold)}
    "a": ((5.0, 6.0, 7.0), -3.0),
    "b": ((4.0, 9.0, 4.5), 1.0),
    "c": ((9.0, 1.0, 8.0), 2.0),
    "d": ((2.5, 2.0, 6.0), 0.0),
    "e": ((3.0, 5.0, 8.0), -1.0),
}


def make_answers(texts):
    rows = []
    for text in texts:
        scores, gold = ANSWERS[text]
        named = {f"seed_{i}": score for i, score in enumerate(scores)}
        rows.append({"response": text, "scores": named, "gold": gold})
    return rows


def mean_correlation(texts):
    """Over pairs of members, without numpy."""
    members = zip(*(ANSWERS[text][0] for text in texts))
    return fmean(correlation(x, y) for x, y in combinations(members, 2))


@pytest.fixture
def run_folder(tmp_path):
    """A finished PPO run of two steps, written by hand, with two of its three reward models."""
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    start = {"step": 0, "eval/proxy": 1.23456, "eval/gold": 0.5, "eval/kl": 0.0, "eval/length": 9}
    first = {"step": 1, "entropy": 3.5, "seconds_rollout": 2.0, "seconds_update": 1.5}
    last = {"step": 2, "entropy": 2.25, "seconds_rollout": 3.0, "eval/proxy": 2.0}
    last |= {"eval/gold": -1.5, "eval/kl": 6.25, "eval/length": 12, "eval/variance": 0.25}
    write_rows(run / "metrics.jsonl", [start, first, last])
    write_rows(run / "eval" / "step_0.jsonl", make_answers("abcde"))
    write_rows(run / "eval" / "step_2.jsonl", make_answers("aabde"))

    paths = [str(tmp_path / f"rm_{i}") for i in range(3)]
    (run / "config.json").write_text(json.dumps({"reward_model": paths}))
    for path, summary in zip(
        paths, ({"eval/accuracy": 0.6, "eval/gold_kendall_tau": 0.1}, {"eval/accuracy": 0.9})
    ):
        (tmp_path / path).mkdir()
        (tmp_path / path / "summary.json").write_text(json.dumps(summary))
    return str(run)


def test_what_is_read_of_a_ppo_run(run_folder):
    means = [fmean(scores) for scores, _ in ANSWERS.values()]
    assert results_module.read_ppo(run_folder) == {
        "step": [0, 2],
        "gold": [0.5, -1.5],
        "proxy": [1.235, 2.0],  # with four digits
        "kl": [0.0, 6.25],
        "length": [9.0, 12.0],
        "distinct_2": [None, None],
        "eos_rate": [None, None],
        "variance": [None, 0.25],
        "entropy": [None, 2.25],
        "distance": [None, None],
        "correlation": [
            pytest.approx(mean_correlation("abcde"), rel=1e-3),
            pytest.approx(mean_correlation("aabde"), rel=1e-3),
        ],
        "overrated": ["a", "e"],
        "spread": [pytest.approx(stdev(means), rel=1e-3)],
        "accuracy": [0.75],
        "tau": [0.1],
        "seconds": [6.5],
    }


def test_distances_are_measured_from_known_answers(run_folder, monkeypatch):
    asked = []

    def measure_distances(folder, pool):
        asked.append((folder, pool))
        return [1.00004, 2.0]

    monkeypatch.setattr(overoptimisation, "measure_distances", measure_distances)
    whole = results_module.read_ppo(run_folder)
    run = overoptimisation.read_with_distance(run_folder, "pool.jsonl")
    assert run == whole | {"distance": [1.0, 2.0]}
    assert asked == [(run_folder, "pool.jsonl")]


def test_distances_are_measured_in_the_embedded_world_alone():
    """The answers that are known are the policy's own, and they are sampled ahead of the run."""
    cell = overoptimisation.ppo_cell(read_settings(), 0, 0.25, 0, "wco", METHODS["wco"])
    assert cell.read.keywords == {"known": "out/known/pool.jsonl"}
    (known,) = [need for need in cell.needs if value_of(need, "--output_dir") == "out/known"]
    assert value_of(known, "--model") == value_of(cell.command, "--model")
    own = read_settings("--model", "m", "--dataset", "d.jsonl")
    cell = overoptimisation.ppo_cell(own, 0, 0.25, 0, "wco", METHODS["wco"])
    assert cell.read is results_module.read_ppo
    assert not of_script(cell.needs, "sample_bon.py")


def test_members_of_one_or_without_differences_have_no_correlation():
    one = [{"response": "a", "scores": {"rm": x}} for x in (1.0, 2.0, 3.0)]
    assert results_module.correlate_members(one) is None
    flat = [{"response": "a", "scores": {"x": x, "y": 1.0}} for x in (1.0, 2.0, 3.0)]
    assert results_module.correlate_members(flat) is None


def test_overrated_answers_by_hand():
    """Places by the lowest score less by gold: a 4 - 0, e 2 - 1, b 3 - 3, d 1 - 2, c 0 - 4."""
    answers = make_answers("abcde")
    assert results_module.list_overrated(answers) == ["a", "e"]
    # A text that is there twice is listed once.
    assert results_module.list_overrated([*answers, *make_answers("a")]) == ["a", "e"]
    for row in answers:
        row["gold"] = None
    assert results_module.list_overrated(answers) == []


def test_what_is_read_of_best_of_n(tmp_path):
    def curve(*golds):
        points = []
        for n, gold in zip((1, 4), golds):
            points.append({"n": n, "kl": 0, "proxy_score": 2.0 * n, "gold_score": gold})
        return points

    names = {"seed_0": curve(1.0, 3.0), "seed_1": curve(2.0, 6.0)}
    names |= {"mean": curve(1.5, 5.0), "uwo_0.5": curve(1.5, None)}
    (tmp_path / "bon_results.json").write_text(json.dumps(names))
    assert results_module.read_bon(tmp_path) == {
        "n": [1, 4],
        "kl": [0.0, pytest.approx(math.log(4) - 3 / 4, rel=1e-3)],
        "single": {"proxy": [2.0, 8.0], "gold": [1.5, 4.5]},
        "mean": {"proxy": [2.0, 8.0], "gold": [1.5, 5.0]},
        "uwo_0.5": {"proxy": [2.0, 8.0], "gold": [1.5, None]},
    }
    # One reward model alone has one curve, whatever it is called.
    (tmp_path / "bon_results.json").write_text(json.dumps({"averaged": curve(1.0, 2.0)}))
    assert set(results_module.read_bon(tmp_path)) == {"n", "kl", "single"}


def test_labels_of_best_of_n_say_which_ensemble():
    pools = [make_pool([0.0, 1.0, 2.0]), make_pool([0.0, 2.0, 3.0])]
    averaged = {"n": [1, 2, 4], "kl": [0.0, 0.1, 0.2], "single": {"proxy": [1.0], "gold": [4.0]}}
    runs = results_module.curves_of_bon({"finetune": pools, "pretrain": pools, "warm": [averaged]})
    of_pretrain = ["pretrain_single", "pretrain_mean", "pretrain_wco"]
    assert list(runs) == ["single", "mean", "wco", *of_pretrain, "warm"]
    assert [run["gold"][-1] for run in runs["pretrain_mean"]] == [2.0, 3.0]
    (warm,) = runs["warm"]
    assert warm == {"n": [1, 2, 4], "kl": [0.0, 0.1, 0.2], "proxy": [1.0], "gold": [4.0]}


# ----------------------------------------------------------------------------------------- compared


def test_ends_peaks_and_falls_with_differences_within_a_seed():
    runs = {
        "single": [
            make_run([1.0, 3.0, -1.0], accuracy=[0.6], seconds=[9.0]),
            make_run([1.0, 1.5, 2.0], accuracy=[0.8], seconds=[7.0]),
        ],
        "wco": [make_run([1.0, 0.0, 2.0]), make_run([1.0, 2.5, 2.5])],
        "pretrain_wco": [make_run([1.0, 4.0, 4.0]), make_run([1.0, 0.0, 1.0])],
    }
    table = results_module.compare_curves(runs, "gold")
    assert table["single"] == {
        "start": [1.0, 1.0],
        "peak": [3.0, 2.0],
        "at": [1, 2],
        "end": [-1.0, 2.0],
        "fall": [4.0, 0.0],
        "KL": [9.0, 9.0],
        "accuracy": [0.6, 0.8],
        "seconds": [9.0, 7.0],
    }
    assert table["wco"]["less single's"] == [3.0, 0.5]
    assert table["pretrain_wco"]["less single's"] == [5.0, -1.0]
    assert table["pretrain_wco"]["less shared start's"] == [2.0, -1.5]
    assert "less shared start's" not in table["wco"]
    # Without gold the same of the proxy.
    assert results_module.compare_curves(runs, "proxy")["wco"]["end"] == [2.0, 2.0]


def test_peaks_of_best_of_n_are_at_an_n():
    runs = results_module.curves_of_bon({"finetune": [make_pool([0.0, 5.0, 2.0])]})
    assert results_module.compare_curves(runs, "gold")["wco"]["at"] == [2]


def test_how_alike_members_are():
    alone = make_run([0.0, 0.0, 0.0], correlation=[None, None], variance=[None, None, None])
    runs = {"single": [alone], "wco": [make_run([0.0, 0.0, 0.0])]}
    assert results_module.compare_members(runs) == {
        "wco": {
            "correlation before": [0.9],
            "correlation after": [0.5],
            "std before": [1.0],
            "std after": [2.0],
        }
    }


@pytest.mark.parametrize("is_bon", [False, True])
def test_fits_find_the_curve_that_gold_follows(is_bon):
    """a = 2 and b = 0.5, from a start of 3."""
    kl = [0.0, 1.0, 4.0, 9.0]
    gold = [3.0]
    for d in (1, 2, 3):
        gold.append(3 + d * (2 - 0.5 * (d if is_bon else math.log(d))))
    run = {"n" if is_bon else "step": [1, 2, 3, 4], "kl": kl, "gold": gold}
    # Rounding leaves the start's KL next to 0.
    run["kl"][0] = 1e-5
    (line,) = results_module.fit_curves({"wco": [run, run]})
    words = line.replace(",", "").split()
    assert words[0] == "wco"
    assert float(words[words.index("a", 5) + 1]) == pytest.approx(2, abs=2e-3)
    assert float(words[words.index("b", 8) + 1]) == pytest.approx(0.5, abs=2e-3)
    # A run that has been to one KL alone has no curve.
    short = {"step": [0, 1], "kl": [0.0, 4.0], "gold": [0.0, 1.0]}
    assert results_module.fit_curves({"wco": [short]}) == []


def test_whether_reward_models_tell_how_runs_end():
    runs = {
        "single": [
            make_run([0.0, 0.0, 1.0], accuracy=[0.6], tau=[None], spread=[4.0]),
            make_run([0.0, 0.0, 2.0], accuracy=[0.7], tau=[None], spread=[3.0]),
        ],
        "wco": [
            make_run([0.0, 0.0, 3.0], accuracy=[0.8], tau=[0.1], spread=[2.0]),
            make_run([0.0, 0.0, 4.0], accuracy=[0.75], tau=[None], spread=[1.0]),
        ],
    }
    accuracy, spread = results_module.compare_reward_models(runs, "gold")
    # One pair of six is in the wrong order: (5 - 1) / 6.
    assert accuracy.split()[0] == "accuracy" and accuracy.endswith("  0.67, 4 runs")
    assert spread.split()[0] == "spread" and spread.endswith(" -1.00, 4 runs")


def test_runs_are_grouped_by_seed():
    runs = {"single": ["s0", "s1"], "wco": ["w0", "w1"]}
    assert overoptimisation.group_by_seed(runs) == {0: ["s0", "w0"], 1: ["s1", "w1"]}


def draw(runs):
    """The two axes of a picture, and the labels of its legend."""
    matplotlib = pytest.importorskip("matplotlib.figure")
    figure = matplotlib.Figure(layout="constrained")
    results_module.draw_curves(figure, runs)
    (legend,) = figure.legends
    return figure.axes, [text.get_text() for text in legend.get_texts()]


def test_a_picture_has_the_mean_of_gold_and_of_proxy():
    runs = {
        "single": [make_run([1.0, 3.0, -1.0]), make_run([1.0, 1.0, 2.0])],
        "wco": [make_run([1.0, 2.0, 3.0])],
    }
    (left, right), labels = draw(runs)
    assert labels == ["single", "wco"]
    gold, proxy, *of_wco = left.lines
    assert list(gold.get_xdata()) == [0, 1, 2]
    assert list(gold.get_ydata()) == [1.0, 2.0, 0.5]
    assert list(proxy.get_ydata()) == [0.0, 1.0, 2.0]
    assert len(of_wco) == 2
    assert list(right.lines[0].get_xdata()) == [0.0, 2.0, 3.0]
    # A single seed has no band.
    assert len(left.collections) == 1


def test_a_picture_of_penalties_has_the_ends_and_the_peaks():
    matplotlib = pytest.importorskip("matplotlib.figure")
    runs = {
        0: {"single": [make_run([1.0, 3.0, -1.0]), make_run([1.0, 1.0, 0.0])]},
        0.05: {"single": [make_run([1.0, 2.0, 2.0]), make_run([1.0, 3.0, 4.0])]},
    }
    figure = matplotlib.Figure(layout="constrained")
    results_module.draw_penalties(figure, runs)
    left, right = figure.axes
    for axis in (left, right):
        end, *_, peak = axis.lines
        assert list(end.get_ydata()) == [-0.5, 3.0]
        assert list(peak.get_ydata()) == [2.0, 3.0]
    assert [text.get_text() for text in left.get_xticklabels()] == ["0", "0.05"]
    assert list(right.lines[0].get_xdata()) == [3.0, 3.0]


def test_a_picture_without_gold_has_the_proxy_alone():
    runs = {"single": [make_run([None, None, None])]}
    (left, _), labels = draw(runs)
    assert labels == ["single"]
    (proxy,) = left.lines
    assert list(proxy.get_ydata()) == [0.0, 1.0, 2.0]


# --------------------------------------------------------------------------------- the study's runs


@pytest.fixture(scope="module")
def study(run_small, tmp_path_factory):
    results = tmp_path_factory.mktemp("kept") / "cells.json"
    return run_small(overoptimisation, SMALL.format(results=results))


@pytest.fixture
def results(study):
    """What the study has kept: {name: result}."""
    place = study.flags.index("--results")
    cells = kept_cells.read_cells(study.flags[place + 1])
    return {name: cell["result"] for name, cell in cells.items()}


PPO = "ppo_noise0.25_kl0.05"


@pytest.mark.slow
def test_a_whole_study_is_not_run_again(study):
    assert len(set(study.first)) == len(study.first)
    printed = study.run()
    assert study.ran == study.first
    assert "best-of-n, 200 pairs" in printed


@pytest.mark.slow
@pytest.mark.parametrize("method", ["single", "wco", "pretrain_wco", "warm"])
def test_a_result_is_what_the_run_has_logged(study, results, method):
    result = results[f"{PPO}/{method}/seed_0"]
    rows = study.read_rows(f"{PPO}/{method}/seed_0/metrics.jsonl")
    evaluations = [row for row in rows if "eval/proxy" in row]
    assert result["step"] == [row["step"] for row in evaluations] == [0, 1, 2]
    for column in ("gold", "proxy", "kl", "length", "distinct_2", "eos_rate"):
        logged = [row[f"eval/{column}"] for row in evaluations]
        assert result[column] == pytest.approx(logged, rel=1e-3)
    # Single models, and averaged ones, have no variance and nothing to correlate.
    has_members = method in ("wco", "pretrain_wco")
    assert (result["variance"][0] is not None) == has_members
    assert (result["correlation"][0] is not None) == has_members
    assert result["entropy"][0] is None
    assert min(result["distance"]) > 0
    assert len(result["overrated"]) == 2
    assert 0 <= result["accuracy"][0] <= 1


@pytest.mark.slow
def test_all_policies_start_from_the_same_answers(results):
    starts = set()
    for method in ("single", "wco", "pretrain_wco", "warm"):
        starts.add(results[f"{PPO}/{method}/seed_0"]["gold"][0])
    assert len(starts) == 1


@pytest.mark.slow
def test_the_first_evaluation_is_by_the_objective(study, results):
    """The lowest score of a text cannot be above that of one member."""
    assert results[f"{PPO}/wco/seed_0"]["proxy"][0] < results[f"{PPO}/single/seed_0"]["proxy"][0]
    first, *_ = study.read_rows(f"{PPO}/wco/seed_0/metrics.jsonl")
    alone, *_ = study.read_rows(f"{PPO}/single/seed_0/metrics.jsonl")
    assert first["eval/score/seed_0"] == alone["eval/proxy"]


@pytest.mark.slow
@pytest.mark.parametrize("ensemble", ["finetune", "pretrain", "warm"])
def test_best_of_n_starts_from_the_mean_of_the_pool(study, results, ensemble):
    golds = []
    for row in study.read_rows("pool/pool.jsonl"):
        golds += row["gold_scores"]
    assert len(golds) == 6 * 8
    result = results[f"bon_noise0.25/{ensemble}/seed_0"]
    assert result["single"]["gold"][0] == pytest.approx(fmean(golds), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["bon_noise0.25", "hard/bon"])
def test_single_is_the_mean_of_the_curves_of_the_members(study, results, place):
    curves = study.read(f"{place}/finetune/seed_0/bon_results.json")
    first_end = curves["seed_0"][-1]["gold_score"]
    second_end = curves["seed_1"][-1]["gold_score"]
    assert first_end != second_end
    result = results[f"{place}/finetune/seed_0"]
    assert result["n"][-1] == 8
    assert result["single"]["gold"][-1] == pytest.approx((first_end + second_end) / 2, rel=1e-3)


@pytest.mark.slow
def test_members_start_from_sft_policies_of_their_own_or_share_one(study):
    def starts_of(ensemble):
        starts = []
        for i in range(2):
            config = study.read(f"rm_noise0.25/{ensemble}/seed_0/seed_{i}/config.json")
            starts.append(config["model"].removeprefix(f"{study.folder}/"))
        return starts

    assert starts_of("finetune") == ["sft/seed_0", "sft/seed_0"]
    assert starts_of("warm") == ["sft/seed_0", "sft/seed_0"]
    assert starts_of("pretrain") == ["sft/seed_0", "sft/seed_1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bon_noise0.25.png", f"{PPO}.png", "bon_hard.png"])
def test_pictures_are_there(study, name):
    pytest.importorskip("matplotlib")
    assert study.has_picture(name)

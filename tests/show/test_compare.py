"""show/compare.py: settings, metrics and answers of two runs beside each other.

Most runs here are written by hand, so that every number is known.
"""

import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import unicodedata

import pytest
from support import ENV, REPO, jsonl, read_rows, small, train, write_rows

import sample_bon
from nanorlhf.show import compare
from nanorlhf.show.evaluations_of_runs import read_answers, read_run
from nanorlhf.show.terminal import UNSAFE

PPO = {"ppo_epochs": 1, "objective": "mean", "uwo_lambda": 0.1, "reward_weights": []}
SFT = {"loss_on": "all", "loss": "sft"}
RM = {"label_noise": 0.0}
BON = {"n_answers": 3, "objective": "mean", "uwo_lambda": [0.5]}


def write_run(folder, settings, metrics, answers=None):
    """A run's folder. metrics: {step: {"eval/gold": (mean, se)}}; answers: {step: rows}"""
    folder.mkdir(parents=True)
    config = {"output_dir": str(folder), "seed": 0, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    records = []
    for step, numbers in metrics.items():
        record = {"step": step, "loss": 1.0}
        for name, (mean, se) in numbers.items():
            record |= {name: mean, f"{name}_se": se}
        records.append(record)
    jsonl(folder / "metrics.jsonl", records)
    for step, rows in (answers or {}).items():
        (folder / "eval").mkdir(exist_ok=True)
        jsonl(folder / "eval" / f"step_{step}.jsonl", rows)
    return folder


def at(step, **numbers):
    """An evaluation for write_run(): at(4, gold=(0.0, 1.0))."""
    return {step: {f"eval/{name}": number for name, number in numbers.items()}}


def answer(prompt, gold=0.0, scores=None, response="fine .", **more):
    scores = {"rm": 0.0} if scores is None else scores
    return {"prompt": prompt, "response": response, "scores": scores, "gold": gold, **more}


def answers_with(golds):
    """An answer to each of some prompts, with these golds."""
    return [answer(f"prompt {i}", gold) for i, gold in enumerate(golds)]


def run_with(folder, golds, settings=PPO, **changes):
    """A run with one evaluation, whose gold is that of its answers."""
    mean = statistics.mean(golds)
    se = statistics.stdev(golds) / len(golds) ** 0.5
    rows = answers_with(golds)
    return write_run(folder, {**settings, **changes}, at(4, gold=(mean, se)), {4: rows})


def compared(a, b, **flags):
    """What the comparison of two runs finds."""
    return compare.main(compare.Config(runs=[str(a), str(b)], **flags))


def compare_metric(name, a, b, **flags):
    """What it finds of one metric."""
    return compared(a, b, **flags)["metrics"][name]


def printed(capsys, *args):
    """What the command prints."""
    capsys.readouterr()
    compare.run([str(arg) for arg in args])
    return capsys.readouterr().out


def refused(capsys, *args):
    """The command must end with exit code 2 and one line -> the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        compare.run([str(arg) for arg in args])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    return error


@pytest.fixture
def golds():
    """Golds of A and of B on 40 prompts that differ much, while B is a little better on each."""
    generator = random.Random(0)
    a = []
    b = []
    for _ in range(40):
        gold = generator.gauss(0, 5)
        better = gold + generator.gauss(0.5, 0.3)
        a.append(gold)
        b.append(better)
    return a, b


# ------------------------------------------------------------------------------------- differences


def test_a_difference_is_taken_prompt_by_prompt(tmp_path, golds):
    a, b = golds
    folder_a = run_with(tmp_path / "a", a)
    folder_b = run_with(tmp_path / "b", b)
    row = compare_metric("gold", folder_a, folder_b)
    differences = [y - x for x, y in zip(a, b)]
    assert row["difference"] == pytest.approx(statistics.mean(differences))
    assert row["pairs"] == 40
    # The classical standard error of paired differences; the bootstrap's is of another formula.
    se = statistics.stdev(differences) / 40**0.5
    assert row["se"] == pytest.approx(se, rel=0.1)
    middle = row["difference"]
    classical = [middle - 1.96 * se, middle + 1.96 * se]
    assert row["interval"] == pytest.approx(classical, abs=0.3 * se)
    # Two independent means would hide that B is better.
    assert row["a"]["se"] > 10 * se


def test_pairs_are_found_by_their_prompts(tmp_path, golds):
    a, b = golds
    folder_a = run_with(tmp_path / "a", a)
    folder_b = run_with(tmp_path / "b", b)
    in_order = compared(folder_a, folder_b)["metrics"]
    rows = read_rows(folder_b / "eval" / "step_4.jsonl")
    random.Random(1).shuffle(rows)
    jsonl(folder_b / "eval" / "step_4.jsonl", [answer("another prompt", 99.0), *rows])
    assert compared(folder_a, folder_b)["metrics"] == in_order


def test_answers_to_one_prompt_are_one_draw(tmp_path):
    # Two prompts with two answers each: only the prompts are independent.
    rows_a = [answer("x", 0.0), answer("y", 0.0), answer("x", 1.0), answer("y", 1.0)]
    rows_b = [answer("x", 2.0), answer("x", 3.0), answer("y", 1.0), answer("y", 1.0)]
    number = at(4, gold=(0.0, 1.0))
    a = write_run(tmp_path / "a", PPO, number, {4: rows_a})
    b = write_run(tmp_path / "b", PPO, number, {4: rows_b})
    found = compared(a, b, sort="file")
    row = found["metrics"]["gold"]
    # First to first, second to second: +2 and +2 on x, +1 and 0 on y.
    second = [pair["b"]["numbers"]["gold"] for pair in found["answers"]]
    assert second == [2.0, 1.0, 3.0, 1.0]
    assert row["difference"] == pytest.approx(1.25)
    assert row["interval"] == pytest.approx([0.5, 2.0])
    assert row["pairs"] == 4


def test_a_single_prompt_has_no_interval_over_prompts(tmp_path):
    """Its resamples would all be alike: an interval of width 0."""
    rows = [answer("x", 0.0), answer("x", 1.0)]
    a = write_run(tmp_path / "a", PPO, at(4, gold=(0.5, 0.3)), {4: rows})
    b = write_run(tmp_path / "b", PPO, at(4, gold=(0.5, 0.4)), {4: rows})
    row = compare_metric("gold", a, b)
    assert row["se"] == pytest.approx(0.5)
    assert row["interval"] == pytest.approx([-0.98, 0.98])
    assert row["pairs"] is None


def test_what_has_no_answers_is_taken_for_independent(tmp_path):
    a = write_run(tmp_path / "a", RM, at(3, accuracy=(0.7, 0.03)))
    b = write_run(tmp_path / "b", RM, at(3, accuracy=(0.8, 0.04)))
    row = compare_metric("accuracy", a, b)
    assert row["difference"] == pytest.approx(0.1)
    assert row["se"] == pytest.approx(0.05)
    assert row["interval"] == pytest.approx([0.002, 0.198])
    assert row["pairs"] is None


@pytest.mark.parametrize(
    "settings, proxy",
    [
        ({}, 2.0),
        ({"objective": "wco"}, 1.0),
        ({"objective": "uwo", "uwo_lambda": 0.5}, 1.5),
        ({"reward_weights": [10.0, 1.0]}, 13.0),
    ],
)
def test_the_proxy_is_that_of_the_runs_objective(tmp_path, settings, proxy):
    rows = [answer("x", scores={"one": 1.0, "two": 3.0, "controlled": 99.0})]
    run = write_run(tmp_path / "a", {**PPO, **settings}, at(4, gold=(0.0, 1.0)), {4: rows})
    (found,) = read_answers(read_run(str(run), "eval"), 4, "eval")
    assert found.numbers == {"gold": 0.0, "proxy": proxy}


# --------------------------------------------------------------------------------- best-of-n


POOL = """\
{"prompt": "x", "responses": ["a", "b", "c"], "scores": {"rm": [1, 3, 2]}, "gold_scores": [1, 2, 4]}
{"prompt": "y", "responses": ["a", "b", "c"], "scores": {"rm": [0, -1, 5]}, "gold_scores": [7,0,-2]}
"""
CURVE = """{"rm": [
{"n": 1, "kl": 0.0, "proxy_score": 1.7, "proxy_se": 0.3, "gold_score": 2.0, "gold_se": 0.3},
{"n": 2, "kl": 0.2, "proxy_score": 3.0, "proxy_se": 0.3, "gold_score": 1.8, "gold_se": 0.8},
{"n": 3, "kl": 0.4, "proxy_score": 4.0, "proxy_se": 1.0, "gold_score": 0.0, "gold_se": 2.0}
]}"""


def bon_run(folder):
    """A pool of two prompts with three answers each; the second prompt's best is not its gold's."""
    folder.mkdir()
    config = {"output_dir": "x", **BON}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pool.jsonl").write_text(POOL)
    (folder / "bon_results.json").write_text(CURVE)
    return folder, read_rows(folder / "pool.jsonl")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_is_worth_its_mean_over_all_draws(tmp_path, n):
    folder, pool = bon_run(tmp_path / "bon")
    run = read_run(str(folder), "eval")
    for row, found in zip(pool, read_answers(run, n, "eval"), strict=True):
        score_of = row["scores"]["rm"].__getitem__
        golds = []
        for draw in itertools.combinations(range(3), n):
            best = max(draw, key=score_of)
            golds.append(row["gold_scores"][best])
        assert found.expected["gold"] == pytest.approx(statistics.mean(golds))
        # What is shown is the best of the first n.
        shown = max(range(n), key=score_of)
        assert found.response == row["responses"][shown]
        assert found.numbers["gold"] == row["gold_scores"][shown]


def test_ppo_and_best_of_n_are_compared_in_what_both_have(tmp_path):
    folder, _ = bon_run(tmp_path / "bon")
    metrics = at(4, gold=(1.0, 0.1), kl=(2.0, 0.1), length=(9.0, 1.0))
    rows = [answer("x", 1.0), answer("y", 1.0), answer("z", 1.0)]
    ppo = write_run(tmp_path / "ppo", PPO, metrics, {4: rows})
    found = compared(ppo, folder, step=[4, 3])
    assert set(found["metrics"]) == {"gold", "kl"}
    # The best of three has gold 2 and -2; PPO's answers 1 and 1.
    gold = found["metrics"]["gold"]
    assert gold["difference"] == pytest.approx(-1.0)
    assert gold["pairs"] == 2
    kl = found["metrics"]["kl"]
    assert kl["b"] == {"mean": 0.4, "se": 0.0}


# ----------------------------------------------------------------------------- settings and steps


def test_settings_that_differ(tmp_path, golds):
    a, b = golds
    one = run_with(tmp_path / "a", a, kl_coef=0.05, lr=1, old=1, inputs={"rm": digest_of("1")})
    two = run_with(tmp_path / "b", b, kl_coef=0.0, lr=1, new=2, inputs={"rm": digest_of("2")})
    found = compared(one, two)
    assert found["settings"] == {"kl_coef": [0.05, 0.0], "content of rm": ["1", "2"]}
    assert found["a"]["only_here"] == ["old"]
    assert found["b"]["only_here"] == ["new"]


def digest_of(text):
    return {"digest": text, "size": 1, "mtime": 1}


def steps_of(found):
    return [found["a"]["step"], found["b"]["step"]]


def three_evaluations(folder, means):
    metrics = {step: {"eval/gold": (mean, 0.1)} for step, mean in means.items()}
    return write_run(folder, PPO, metrics)


def test_the_steps_that_are_compared(tmp_path, capsys):
    a = three_evaluations(tmp_path / "a", {0: 0.0, 5: 9.0, 10: 1.0})
    b = three_evaluations(tmp_path / "b", {0: 0.5, 5: 2.0, 15: 3.0})
    found = compared(a, b)
    # The last step that both have; each run's own best; all that both have.
    assert steps_of(found) == [5, 5]
    best = found["best"]
    assert best["steps"] == [5, 15]
    assert best["difference"] == -6.0
    assert [row["step"] for row in found["course"]] == [0, 5]
    assert compare_metric("gold", a, b, step=[10, 15])["difference"] == 2.0
    assert compare_metric("gold", a, a, step=[0, 10])["difference"] == 1.0
    assert "no evaluation at --step 15; there are 0, 5, 10" in refused(capsys, a, b, "--step", 15)


def test_a_reward_models_last_evaluation_is_in_its_summary(tmp_path):
    folders = []
    for name, accuracy in (("a", 0.7), ("b", 0.9)):
        folder = write_run(tmp_path / name, RM, {3: {}})
        summary = {"eval/accuracy": accuracy, "eval/accuracy_se": 0.1, "eval/n_pairs": 8}
        (folder / "summary.json").write_text(json.dumps(summary))
        folders.append(folder)
    found = compared(*folders)
    assert found["metrics"]["accuracy"]["difference"] == pytest.approx(0.2)
    assert steps_of(found) == [3, 3]


def test_runs_of_two_kinds_share_only_what_means_the_same(tmp_path, capsys):
    numbers = {"accuracy": (0.5, 0.1), "gold": (1.0, 0.1)}
    sft = write_run(tmp_path / "sft", SFT, at(3, **numbers))
    metrics = at(3, **numbers) | at(7, **numbers)
    dpo = write_run(tmp_path / "dpo", {**SFT, "loss": "dpo"}, metrics)
    found = compared(sft, dpo)
    assert list(found["metrics"]) == ["gold"]
    assert [found["a"]["kind"], found["b"]["kind"]] == ["SFT", "DPO"]
    assert steps_of(found) == [3, 7]
    rm = write_run(tmp_path / "rm", RM, at(3, accuracy=(0.5, 0.1)))
    line = refused(capsys, sft, rm)
    assert "(SFT)" in line and "(reward model)" in line
    assert "no metric and no prompt in common" in line


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    metrics = at(3, gold=(1.0, 0.1), kl=(math.nan, 0.1), length=(math.inf, 0.0))
    a = write_run(tmp_path / "a", PPO, metrics)
    assert list(compared(a, a)["metrics"]) == ["gold"]


def test_another_split_is_compared_by_its_own_answers(tmp_path, capsys):
    numbers = {"eval/gold": (1.0, 0.1), "ood/gold": (2.0, 0.1)}
    a = write_run(tmp_path / "a", PPO, {3: numbers}, {3: answers_with([1.0, 1.0])})
    (a / "eval_ood").mkdir()
    jsonl(a / "eval_ood" / "step_3.jsonl", answers_with([5.0]))
    found = compared(a, a, split="ood")
    metric = found["metrics"]["gold"]
    assert metric["a"]["mean"] == 2.0
    (row,) = found["answers"]
    assert row["a"]["numbers"] == {"gold": 5.0, "proxy": 0.0}
    assert "no evaluation of the split no" in refused(capsys, a, a, "--split", "no")


# ------------------------------------------------------------------------------- text and file


@pytest.fixture
def pair(tmp_path):
    """Two runs with three answers each, and what differs most in gold, and in proxy."""
    numbers = at(4, gold=(0.0, 1.0))
    rows_a = [answer(prompt, response=f"{prompt} of A") for prompt in "xyz"]
    rows_b = [
        answer("x", 1.0, {"rm": -7.0}, "x of B"),
        answer("y", -3.0, {"rm": 2.0}, "y of B"),
        answer("z", 2.0, {"rm": 1.0}, "z \x1b[31mof B"),
    ]
    a = write_run(tmp_path / "a", PPO, numbers, {4: rows_a})
    b = write_run(tmp_path / "b", PPO, numbers, {4: rows_b})
    return a, b


@pytest.mark.parametrize(
    "flag, order", [("", "yzx"), ("gold", "yzx"), ("proxy", "xyz"), ("file", "xyz")]
)
def test_the_order_of_the_answers(pair, flag, order):
    found = compared(*pair, sort=flag)
    assert "".join(row["prompt"] for row in found["answers"]) == order


def test_the_text_says_what_was_found(pair, capsys):
    text = printed(capsys, *pair, "--n", 2)
    lines = text.splitlines()
    assert lines[0] == f"A: {pair[0]} (PPO, step 4)"
    assert "No setting differs." in lines
    assert "  * prompt by prompt, 3 pairs of answers; the others as if independent" in lines
    gold = "  gold            0.000 +- 1.000      0.000 +- 1.000     +0.000 [-3.000, +2.000] *"
    assert gold in lines
    prompts = [line for line in lines if line.startswith(">")]
    assert prompts == ["> y", "> z"]
    # Side by side, and without an order to the terminal.
    assert f"{'A: z of A':38s}   B: z \\x1b[31mof B" in lines
    assert f"{'gold +0.00   proxy +0.00':38s}   gold +2.00   proxy +1.00" in lines
    categories = {unicodedata.category(letter) for letter in "".join(lines)}
    assert not categories & UNSAFE
    assert "nswer" not in printed(capsys, *pair, "--n", 0).replace("pairs of answers", "")


def test_a_foreign_config_gives_the_terminal_no_orders(tmp_path, capsys, golds):
    nasty = "\x1b[2J\n\u202e"
    a = run_with(tmp_path / "a", golds[0], SFT, loss=nasty, **{f"only{nasty}": 1})
    b = run_with(tmp_path / "b", golds[1], SFT, loss=nasty)
    text = printed(capsys, a, b, "--n", 1)
    categories = {unicodedata.category(letter) for letter in text.replace("\n", "")}
    assert not categories & UNSAFE
    assert "   only here: only\\x1b[2J \\u202e\n" in text

    # So does the error of two runs that share nothing.
    c = write_run(tmp_path / "c", {**SFT, "loss": nasty}, {4: {"eval/gold": (0.0, 1.0)}})
    d = write_run(tmp_path / "d", {**SFT, "loss": nasty}, {4: {"eval/proxy": (0.0, 1.0)}})
    error = refused(capsys, c, d)
    assert "no metric and no prompt in common" in error
    assert "\x1b" not in error


def test_a_loss_that_is_null_is_sft(tmp_path, golds):
    a = run_with(tmp_path / "a", golds[0], SFT, loss=None)
    assert read_run(str(a), "eval").kind == "SFT"


def test_the_file_holds_the_whole_comparison(pair, tmp_path, capsys):
    file = tmp_path / "found.json"
    printed(capsys, *pair, "--output", file, "--n", 0)
    found = json.loads(file.read_text())
    assert found == compared(*pair)
    assert len(found["answers"]) == 3
    # The same command writes it again; it does not write over anything else.
    printed(capsys, *pair, "--output", file)
    line = refused(capsys, *pair, "--output", pair[0] / "config.json")
    assert "not a comparison" in line
    # Its folder is made.
    printed(capsys, *pair, "--output", tmp_path / "new/folder/found.json", "--n", 0)
    assert json.loads((tmp_path / "new/folder/found.json").read_text()) == found


# ------------------------------------------------------------------------------------------- errors


def test_errors_are_one_line(pair, tmp_path, capsys):
    a, b = pair
    assert "two runs are compared, not 1" in refused(capsys, a)
    assert "no run here" in refused(capsys, a, tmp_path / "nothing")
    assert "--n must be at least 0" in refused(capsys, a, b, "--n", -1)
    assert "--sort must be one of" in refused(capsys, a, b, "--sort", "size")
    assert "one for each run" in refused(capsys, a, b, "--step", 1, 2, 3)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    assert "another program's" in refused(capsys, a, model)


DAMAGED_ANSWERS = """\
{
{"prompt": "x"}
{"prompt": 3, "response": "a"}
{"prompt": [{"role": "user"}], "response": "a"}
{"prompt": "x", "response": "a", "scores": {"rm": "high"}}
{"prompt": "x", "response": "a", "scores": [1.0]}
{"prompt": "x", "response": "a", "gold": "high"}
""".splitlines()


@pytest.mark.parametrize("line", DAMAGED_ANSWERS)
def test_damaged_answers_are_one_line(pair, capsys, line):
    a, b = pair
    (b / "eval" / "step_4.jsonl").write_text(line + "\n")
    assert "step_4.jsonl:1: " in refused(capsys, a, b)


DAMAGED_POOLS = """\
{"prompt": "x", "responses": ["a", "b", "c"], "scores": {}}
{"prompt": "x", "responses": ["a", "b", "c"], "scores": {"rm": [1.0]}}
{"prompt": "x", "responses": ["a", "b", "c"], "scores": {"rm": "no"}}
{"prompt": "x", "responses": [], "scores": {"rm": []}}
""".splitlines()


@pytest.mark.parametrize("line", DAMAGED_POOLS)
def test_a_damaged_pool_is_one_line(tmp_path, capsys, line):
    folder, pool = bon_run(tmp_path / "bon")
    write_rows(folder / "pool.jsonl", [pool[0], line])
    assert "pool.jsonl:2: " in refused(capsys, folder, folder)


# ------------------------------------------------------------------------------------- real runs


def check_answers(folder, step):
    """The means of the answers' numbers are the metrics that the run has recorded."""
    run = read_run(str(folder), "eval")
    metrics = run.evaluations[step]
    answers = read_answers(run, step, "eval")
    assert len(answers) > 3
    names = answers[0].expected.keys()
    assert "proxy" in names
    for name in names:
        mean = statistics.mean(answer.expected[name] for answer in answers)
        assert mean == pytest.approx(metrics[name]["mean"], abs=1e-5), (folder, name)


@pytest.mark.slow
def test_real_runs_of_every_kind(base, tmp_path, capsys):
    rewards = [f"{base}/rm", f"{base}/rewards.py:the"]
    wco = {"reward_model": rewards, "objective": "wco", "gold_model": f"{base}/rewards.py:words"}
    train(base, "ppo", tmp_path / "ppo", eval_every=1, **wco)
    train(base, "control", tmp_path / "control")
    train(base, "dpo", tmp_path / "dpo")
    settings = small(base, "bon", objective="wco")
    sample_bon.main(sample_bon.Config(output_dir=f"{tmp_path}/bon", **settings))

    ppo = tmp_path / "ppo"
    check_answers(ppo, 0)
    check_answers(ppo, 2)
    check_answers(tmp_path / "control", 2)
    check_answers(tmp_path / "bon", 4)
    text = printed(capsys, ppo, tmp_path / "control")
    assert "prompt by prompt" in text
    assert "  reward_model" in text
    assert "  gold" in printed(capsys, ppo, tmp_path / "bon")
    assert "accuracy" in printed(capsys, base / "rm", base / "rm")
    assert "perplexity" in printed(capsys, base / "sft", base / "sft", "--split", "ood")
    assert "no metric and no prompt" in refused(capsys, base / "sft", base / "rm")
    assert "margin" in printed(capsys, tmp_path / "dpo", tmp_path / "dpo")


@pytest.mark.slow
def test_a_reader_that_is_gone_is_no_error(pair):
    command = f"{sys.executable} -m nanorlhf.show.compare {pair[0]} {pair[1]} | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=REPO,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("A: ")
    assert done.stderr == ""

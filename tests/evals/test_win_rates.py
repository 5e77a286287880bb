"""probe.py judge: win rates against loops, language models as judges, endpoints that fail.

The command compares two files of answers, A and B, pair by pair. The answers here are one word,
said up to nine times, so that a text's length is its reward.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from statistics import mean, variance

import pytest
import torch
from support import (
    ENV,
    REPO,
    Endpoint,
    chat,
    flags,
    list_files,
    probe_refused,
    run_probe,
    summary,
    write_rows,
)
from transformers import AutoModelForCausalLM

from nanorlhf import world
from nanorlhf.evals import judges, win_rates
from nanorlhf.models import Policy, save_policy
from nanorlhf.runtime import plots
from nanorlhf.runtime.plots import save as save_picture
from nanorlhf.stats import bootstrap

REWARD = """
import itertools
noise = itertools.count()
def words(prompts, responses): return [len(r.split()) for r in responses]
def noisy(prompts, responses): return [1e-6 * next(noise) for _ in responses]
"""


def draw_answers(seed, n=12):
    """Rows {prompt, response} of n prompts, always the same for a seed."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        words = ["word"] * draw.randrange(1, 10)
        rows.append({"prompt": f"question {i} ?", "response": " ".join(words)})
    return rows


def count_words(rows):
    return [len(row["response"].split()) for row in rows]


def point(x, y):
    """What A gets for a pair of scores: 1 for a win, 1/2 for a tie."""
    if x == y:
        return 0.5
    return 1.0 if x > y else 0.0


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a.jsonl, b.jsonl and reward.py. Pictures take longer than all else: none."""
    monkeypatch.setattr(plots, "save", lambda *args: None)
    (tmp_path / "reward.py").write_text(REWARD)
    write_rows(tmp_path / "a.jsonl", draw_answers(1))
    write_rows(tmp_path / "b.jsonl", draw_answers(2))
    return tmp_path


def reward(files, name="words"):
    return f"{files / 'reward.py'}:{name}"


def judge_flags(files, **changes):
    """The words of the command; by default the reward `words` judges a.jsonl against b.jsonl."""
    settings = {
        "a": files / "a.jsonl",
        "b": files / "b.jsonl",
        "judge": reward(files),
        "output_dir": files / "out",
        **changes,
    }
    return ["judge", *flags(settings)]


def read_summary(files):
    return summary(files / "out")


def run_judge(files, **changes):
    """A run of the command -> {judge: what its summary says}."""
    run_probe(*judge_flags(files, **changes))
    return read_summary(files)["judges"]


def run_judge_to_an_error(files, capfd, **changes):
    """A run that gets somewhere and then gives up -> the line of its error, below its progress."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run_probe(*judge_flags(files, **changes))
    *progress, error = capfd.readouterr().err.splitlines()
    assert exit_.value.code == 2
    assert ": error: --judge " in error
    for line in progress:
        assert "error" not in line
    return error


# ----------------------------------------------------------------------------------- the numbers


def test_win_rates_are_the_loops(files):
    a = count_words(draw_answers(1))
    b = count_words(draw_answers(2))
    differences = [x - y for x, y in zip(a, b)]
    points = [point(x, y) for x, y in zip(a, b)]
    wins = points.count(1.0)
    ties = points.count(0.5)
    losses = points.count(0.0)
    # The example has all three.
    assert wins > 0
    assert ties > 0
    assert losses > 0

    found = run_judge(files)
    row = found[reward(files)]["splits"]["all"]

    assert row["pairs"] == 12
    assert row["prompts"] == 12
    assert row["win_rate"] == pytest.approx((wins + ties / 2) / 12)
    assert row["wins"] == pytest.approx(wins / 12)
    assert row["ties"] == pytest.approx(ties / 12)
    assert row["losses"] == pytest.approx(losses / 12)
    assert row["difference"] == pytest.approx((sum(a) - sum(b)) / 12)
    assert row["length"] == [sum(a) / 12, sum(b) / 12]
    # Every prompt has one pair, so the bootstrap over prompts is one over pairs.
    assert row["interval"] == pytest.approx([x.item() for x in bootstrap(points)])
    expected = [x.item() for x in bootstrap(differences)]
    assert row["difference_interval"] == pytest.approx(expected)
    # The reward is the length. So is the judge that always stands beside the others.
    assert row["longer_won"] == 1
    longer = found[win_rates.LONGER]["splits"]["all"]
    assert longer["win_rate"] == row["win_rate"]
    assert "difference" not in longer


def test_how_often_the_longer_answer_won():
    # A longer and wins; A longer and loses; B longer and a tie; B longer and wins; as long as each
    # other; A longer and not judged.
    a = torch.tensor([1.0, 0, 2, 0, 5, float("nan")])
    b = torch.tensor([0.0, 1, 2, 3, 0, 0])
    lengths = [torch.tensor([5, 5, 1, 1, 3, 9]), torch.tensor([2, 4, 2, 3, 3, 1])]

    found = win_rates.summarise_judge(a, b, lengths, torch.arange(6), ["all"] * 6)
    row = found["splits"]["all"]

    assert row["pairs"] == 5
    # Of the four judged pairs of unequal length.
    assert row["longer_won"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert row["win_rate"] == pytest.approx((1 + 0 + 0.5 + 0 + 1) / 5)
    assert row["length"] == [3, 2.8]


SPLITS = {"test": (3, 4), "ood": (5, 6), "hard": (7, 8)}  # {split: the seeds of A and B}


def draw_split(name, seed):
    """30 answers to prompts that no other split has."""
    rows = draw_answers(seed, 30)
    return [{**row, "prompt": name + row["prompt"]} for row in rows]


def write_splits(files):
    """a.jsonl and b.jsonl with all splits, and a_test.jsonl and so on with one each."""
    for side, letter in enumerate("ab"):
        all_rows = []
        for name, seeds in SPLITS.items():
            rows = draw_split(name, seeds[side])
            write_rows(files / f"{letter}_{name}.jsonl", rows)
            all_rows += [{**row, "split": name} for row in rows]
        write_rows(files / f"{letter}.jsonl", all_rows)


def points_of_split(name):
    seed_a, seed_b = SPLITS[name]
    a = count_words(draw_split(name, seed_a))
    b = count_words(draw_split(name, seed_b))
    return [point(x, y) for x, y in zip(a, b)]


def test_splits_named_in_the_rows_or_on_the_command_line(files):
    write_splits(files)
    of_rows = run_judge(files)
    # One side's names are enough.
    named = run_judge(
        files,
        a=[f"{name}={files}/a_{name}.jsonl" for name in SPLITS],
        b=[files / f"b_{name}.jsonl" for name in SPLITS],
    )
    assert of_rows == named


def test_rows_whose_split_is_not_known_are_in_the_split_of_all(files):
    """sample_bon.py writes null where the answers come from --pool."""
    rows = [{**row, "split": None} for row in draw_answers(2)]
    write_rows(files / "b.jsonl", rows)
    assert list(run_judge(files)[reward(files)]["splits"]) == ["all"]


def test_a_file_whose_own_name_has_an_equals_sign(files):
    shutil.copy(files / "a.jsonl", files / "seed=1.jsonl")
    assert list(run_judge(files, a=files / "seed=1.jsonl")[reward(files)]["splits"]) == ["all"]


def test_splits_and_their_gap(files, capsys):
    """The first split less each other one; its interval knows that both are small samples."""
    write_splits(files)
    found = run_judge(files)[reward(files)]

    rates = {name: row["win_rate"] for name, row in found["splits"].items()}
    assert list(rates) == ["test", "ood", "hard"]
    for name, rate in rates.items():
        assert rate == pytest.approx(mean(points_of_split(name)))

    assert list(found["gap"]) == ["ood", "hard"]
    assert "gap: test less ood" in capsys.readouterr().out
    for name, row in found["gap"].items():
        low, high = row["interval"]
        assert row["gap"] == pytest.approx(rates["test"] - rates[name])
        assert low < row["gap"] < high
        # Two independent means: their variances add.
        test_error = variance(points_of_split("test")) / 30
        other_error = variance(points_of_split(name)) / 30
        error = (test_error + other_error) ** 0.5
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_a_split_without_a_judged_pair_is_shown_as_such(files):
    lengths = [torch.tensor([1, 2, 3]), torch.tensor([1, 1, 1])]
    scores = {win_rates.LONGER: lengths[0], "llm:x": torch.tensor([1.0, 0, float("nan")])}
    judges_found = {}
    for spec, a in scores.items():
        judges_found[spec] = win_rates.summarise_judge(
            a, torch.zeros(3), lengths, torch.arange(3), ["test", "test", "ood"]
        )
    assert judges_found["llm:x"]["splits"]["ood"] == {"pairs": 0}
    assert not judges_found["llm:x"]["gap"]
    assert list(judges_found[win_rates.LONGER]["gap"]) == ["ood"]

    whole = {
        "a": ["a"],
        "b": ["b"],
        "prompts": 3,
        "only_a": 0,
        "only_b": 0,
        "pairs": 3,
        "judges": judges_found,
    }
    judges_found["llm:x"] |= {"first_chosen": 0.0, "questions": 4}
    table = win_rates.format_table(whole)
    assert "no pair judged" in table
    # Half of the pairs are won, half are ties, none is lost. Means are over pairs, not splits.
    assert "  50.0%  50.0%   0.0%" in table
    assert "chose the first answer to 0.0% of 4 questions" in table
    assert "mean length in words: A 2.0, B 1.0" in table
    assert "nan" not in json.dumps(whole).lower()
    picture = files / "picture.png"
    save_picture(win_rates.draw, whole, str(picture))
    if find_spec("matplotlib"):
        assert picture.read_bytes()[1:4] == b"PNG"


def test_several_answers_to_a_prompt_are_paired_by_their_order(files, capfd):
    """The interval draws whole prompts: the same pairs five times know no more than once."""
    write_rows(files / "a.jsonl", draw_answers(1) * 5)
    # The prompts in another order.
    write_rows(files / "b.jsonl", (draw_answers(2) * 5)[::-1])
    row = run_judge(files)[reward(files)]["splits"]["all"]
    assert row["pairs"] == 60
    assert row["prompts"] == 12

    write_rows(files / "a.jsonl", draw_answers(1))
    error = probe_refused(capfd, *judge_flags(files))
    assert "has 1 answers in --a and 5 in --b (limit them: --n_answers)" in error

    # The first answer to each prompt is the one that is kept.
    write_rows(files / "b.jsonl", draw_answers(2) + draw_answers(3))
    once = run_judge(files, n_answers=1)[reward(files)]["splits"]["all"]
    assert once["pairs"] == 12
    assert once["interval"] == pytest.approx(row["interval"])


def test_rows_of_one_side_alone_are_counted(files, capsys):
    only_here = {"prompt": "only here", "response": "x"}
    nor_there = {"prompt": "nor there", "response": ""}
    write_rows(files / "a.jsonl", [only_here, *draw_answers(1)[:5], nor_there])

    row = run_judge(files)[reward(files)]["splits"]["all"]
    counts = read_summary(files)

    assert row["pairs"] == 5
    assert counts["prompts"] == 5
    assert counts["pairs"] == 5
    assert counts["only_a"] == 2
    assert counts["only_b"] == 7
    assert ", 2 prompts only in A, 7 prompts only in B" in capsys.readouterr().out


def test_tables_of_the_other_scripts(files):
    """eval/step_N.jsonl of PPO against sample_bon.py's best_of_n.jsonl, by gold."""
    prompts = [row["prompt"] for row in world.prompts("test")[:6]]
    responses = ["the room was superb .", "bad food ."] * 3
    of_ppo = []
    of_best_of_n = []
    differences = []
    for prompt, response in zip(prompts, responses):
        of_ppo.append(
            {
                "prompt": prompt,
                "response": response,
                "scores": {"rm": 1.0},
                "gold": 0.5,
                "prompt_ids": [1],
                "response_ids": [2],
            }
        )
        of_best_of_n.append(
            {"prompt": prompt, "response": "it was .", "score": 2.0, "split": "test", "sample": 0}
        )
        gold_a, gold_b = world.gold([prompt, prompt], [response, "it was ."])
        differences.append(gold_a - gold_b)
    write_rows(files / "a.jsonl", of_ppo)
    write_rows(files / "b.jsonl", of_best_of_n)

    found = run_judge(files, judge="world:gold")["world:gold"]["splits"]

    assert list(found) == ["test"]
    assert found["test"]["difference"] == pytest.approx(sum(differences) / 6, abs=1e-5)


def test_the_same_text_is_a_tie_whatever_a_reward_s_noise_says(files):
    """Each text is scored once, and its score is kept."""
    write_rows(files / "b.jsonl", draw_answers(1)[:6] + draw_answers(2)[6:])
    noisy = reward(files, "noisy")

    found = run_judge(files, judge=[noisy, reward(files)])
    assert len(found) == 3
    assert found[noisy]["splits"]["all"]["ties"] == 0.5
    assert run_judge(files, judge=noisy)[noisy] == found[noisy]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"a": "ood=nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        (
            {"b": "number.jsonl"},
            "number.jsonl:2: a row must be an object with prompt and response, both strings",
        ),
        (
            {"b": "other.jsonl"},
            "no prompt of --a is in --b: they begin with 'question 0 ?' and 'something else'",
        ),
        (
            {"b": "twice.jsonl"},
            "twice.jsonl:2: the prompt 'question 0 ?' is in the splits 'x' and 'y'",
        ),
        (
            {"a": "x=a.jsonl", "b": "y=b.jsonl"},
            "the prompt 'question 0 ?' is in the splits x and y",
        ),
        ({"judge": "nowhere.py:f"}, "nowhere.py: no such file"),
        ({"judge": "llm:runs/none"}, "runs/none: no such run yet"),
        ({"judge": "http://localhost:1/v1"}, "name its model with --judge_model"),
        ({"judge": "rm/seed_{seed}"}, "no such folder for any seed"),
        ({"timeout": 0}, "--timeout must be positive"),
        ({"parallel": 0}, "--parallel must be at least 1"),
    ],
)
def test_wrong_input_is_one_line(files, capfd, monkeypatch, changes, words):
    monkeypatch.chdir(files)
    row = {"prompt": "question 0 ?", "response": "y"}
    write_rows(files / "number.jsonl", [row, {**row, "response": 3}])
    write_rows(files / "other.jsonl", [{**row, "prompt": "something else"}])
    write_rows(files / "twice.jsonl", [{**row, "split": "x"}, {**row, "split": "y"}])

    assert words in probe_refused(capfd, *judge_flags(files, **changes))
    assert not (files / "out").exists()


# ------------------------------------------------------------------------------- language models


def between(text, begin, end):
    return text.split(begin)[1].split(end)[0]


def read_question(question):
    """What a judge is asked -> the prompt and the two answers in it."""
    prompt = between(question, "[Prompt]\n", "\n[End of the prompt]")
    first = between(question, "[Answer 1]\n", "\n[End of answer 1]")
    second = between(question, "[Answer 2]\n", "\n[End of answer 2]")
    return prompt, first, second


def choose_longer(question):
    """A judge that wants the longer answer, and of equally long ones the first."""
    _, first, second = read_question(question)
    return chat("1" if len(first) >= len(second) else "2")


def ask_endpoint(server, **changes):
    """The flags that make an endpoint the judge."""
    return {"judge": server.url, "judge_model": "tiny", "pause": 0.01, "timeout": 9, **changes}


def choices_path(files):
    return files / "out" / "cache" / "choices.jsonl"


def read_choices(files):
    """The choices that are kept. A line without an end is still being written, or was cut off."""
    path = choices_path(files)
    if not path.exists():
        return []
    *whole_lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in whole_lines]


def forget_requests(server, *replies):
    """From here on the endpoint counts requests anew, and gives these replies, if any."""
    if replies:
        server.replies = list(replies)
    server.asked.clear()


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("1", 1),
        (" 2.\n", 2),
        ("Answer 1", 1),
        ("**Answer 2**", 2),
        ('"1"', 1),
        ("[2]", 2),
        ("answer: 2", 2),
        ("**Answer:** 1", 1),
        ("Answer: **2**", 2),
        ("<think>2? No.</think>\n\n1", 1),
    ],
)
def test_what_is_a_choice(reply, number):
    assert judges.choice_of(reply) == number


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "3",
        "12",
        "1 or 2",
        "1, 2",
        "1?",
        "-1",
        "neither",
        "Answer 1 is better",
        "I choose 2",
        "A",
        "1.2",
        "tie",
        "\u00b9",  # a superscript 1
    ],
)
def test_what_is_no_choice(reply):
    assert judges.choice_of(reply) is None


def pairs_to_ask():
    """(prompt, answer of A, answer of B) of all pairs that differ, but for the first pair."""
    pairs = []
    for row_a, row_b in zip(draw_answers(1)[1:], draw_answers(2)[1:]):
        if row_a["response"] != row_b["response"]:
            pairs.append((row_a["prompt"], row_a["response"], row_b["response"]))
    return pairs


def test_both_orders_are_asked(files):
    # The first pair is the same text twice: there is nothing to ask.
    write_rows(files / "b.jsonl", draw_answers(1)[:1] + draw_answers(2)[1:])
    pairs = pairs_to_ask()
    swapped = [(prompt, b, a) for prompt, a, b in pairs]

    with Endpoint(choose_longer) as server:
        found = run_judge(files, **ask_endpoint(server, criterion="their length"))[server.url]
        questions = server.questions()

    assert sorted(map(read_question, questions)) == sorted(pairs + swapped)
    for question in questions:
        assert "Go by their length;" in question
    points = [point(len(a), len(b)) for _, a, b in pairs]
    row = found["splits"]["all"]
    assert row["wins"] == points.count(1.0) / 12
    assert row["losses"] == points.count(0.0) / 12
    assert row["longer_won"] == 1
    assert "difference" not in row
    assert found["first_chosen"] == 0.5
    assert found["questions"] == 2 * len(pairs)
    assert found["identical"] == 12 - len(pairs)
    assert found["unanswered"] == 0


def test_a_question_is_asked_once_and_another_question_or_judge_anew(files):
    with Endpoint(choose_longer) as server:
        first = ask_endpoint(server, criterion="their length")
        found = run_judge(files, **first)[server.url]

        forget_requests(server)
        assert run_judge(files, **first)[server.url] == found
        assert not server.asked

        run_judge(files, **ask_endpoint(server))
        assert len(server.asked) == found["questions"]

        run_judge(files, **ask_endpoint(server, judge_model="other"))
        assert len(server.asked) == 2 * found["questions"]


def test_a_judge_of_places_is_a_judge_of_ties(files):
    with Endpoint(chat("1")) as server:
        found = run_judge(files, **ask_endpoint(server, parallel=4))[server.url]
    row = found["splits"]["all"]
    assert row["ties"] == 1
    assert row["win_rate"] == 0.5
    assert found["first_chosen"] == 1


# Replies after which the asking stops: {name: (reply, words of the error)}.
FAILURES = {
    "silence": (0.6, "timed out, 4 times"),
    "429": ((429, ""), "HTTP 429 Too Many Requests, 4 times"),
    "500": ((500, "oops"), "HTTP 500 Internal Server Error, 4 times"),
    "no key": ((401, ""), "HTTP 401"),
    "for hours": ((429, "", {"Retry-After": "9000"}), "for the next 9000 seconds"),
}
# Replies that leave one question without a choice: {name: (reply, words of the table)}.
BAD_REPLIES = {
    "malformed": ((200, '{"choices": [{"mess'), "not a chat completion"),
    "refusal": (chat(None, refusal="No."), "a refusal: 'No.'"),
    "too long": ((400, ""), "HTTP 400"),
    "no choice": (chat("Both are fine."), "not a choice: 'Both are fine.'"),
}


def count_whole_pairs(kept):
    """How many pairs have been asked in both orders."""
    orders = [(row["prompt"], row["first"], row["second"]) for row in kept]
    whole = 0
    for prompt, first, second in orders:
        if (prompt, second, first) in orders:
            whole += 1
    # Both orders of a pair have been counted.
    return whole // 2


def check_what_is_kept(files, server, words):
    """After seven good replies: seven choices, and only pairs with both of theirs are judged.

    -> the number of questions
    """
    kept = read_choices(files)
    found = read_summary(files)["judges"][server.url]
    assert len(kept) == 7
    assert found["unanswered"] == found["questions"] - 7
    assert words in found["reasons"][0]
    # A pair that has been asked in one order is no tie.
    whole = count_whole_pairs(kept)
    assert whole < 4
    assert found["splits"]["all"]["pairs"] == whole + found["identical"]
    return found["questions"]


def check_the_rest_is_asked(files, server, options, questions):
    """With a good endpoint the command asks what is missing, and ends as if it had not failed."""
    with open(choices_path(files), "a") as file:
        file.write('{"key": "cut off by a ki')
    forget_requests(server, choose_longer)
    later = run_judge(files, **options)[server.url]
    assert len(server.asked) == questions - 7
    assert len(read_choices(files)) == questions
    assert later["unanswered"] == 0
    assert later["reasons"] == []

    shutil.rmtree(files / "out")
    assert run_judge(files, **options)[server.url] == later


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        pytest.param("silence", 1, marks=pytest.mark.slow),
        pytest.param("429", 1, marks=pytest.mark.slow),
        ("429", 3),
        pytest.param("500", 1, marks=pytest.mark.slow),
        ("no key", 1),
        pytest.param("no key", 3, marks=pytest.mark.slow),
        ("for hours", 1),
    ],
)
def test_an_endpoint_that_fails_stops_the_asking_and_what_it_chose_is_kept(
    files, capfd, name, parallel
):
    failure, words = FAILURES[name]
    with Endpoint(*[choose_longer] * 7, failure) as server:
        timeout = 0.3 if name == "silence" else 9
        options = ask_endpoint(server, parallel=parallel, timeout=timeout)

        error = run_judge_to_an_error(files, capfd, **options)
        assert words in error
        assert "the same command asks for the other" in error
        assert "7 of " in error
        # Some failures are tried four times; each of the parallel threads may be at it.
        tries = 4 if "4 times" in words else 1
        assert tries <= len(server.asked) - 7 <= tries * parallel

        questions = check_what_is_kept(files, server, words)
        check_the_rest_is_asked(files, server, options, questions)


@pytest.mark.parametrize(
    ("name", "parallel"), [*((name, 1) for name in BAD_REPLIES), ("malformed", 3)]
)
def test_a_bad_reply_leaves_one_question_open(files, capfd, name, parallel):
    bad_reply, words = BAD_REPLIES[name]
    with Endpoint(*[choose_longer] * 7, bad_reply) as server:
        options = ask_endpoint(server, parallel=parallel)

        run_probe(*judge_flags(files, **options))
        assert f"questions without a choice ({words}" in capfd.readouterr().out
        questions = check_what_is_kept(files, server, words)
        # Every question has been asked.
        assert len(server.asked) == questions

        check_the_rest_is_asked(files, server, options, questions)


@pytest.mark.parametrize(
    "line",
    [
        "[",
        "5",
        "{}",
        '{"key": "a"}',
        '{"key": "a", "choice": 3}',
        '{"key": "a", "choice": "1"}',
        '{"key": 5, "choice": 1}',
    ],
)
def test_a_damaged_file_of_choices(files, capfd, line):
    """The line is named, and without it only its own question is asked again."""
    with Endpoint(choose_longer) as server:
        options = ask_endpoint(server)
        found = run_judge(files, **options)[server.url]
        path = choices_path(files)
        first, second, *rest = path.read_text().splitlines(keepends=True)

        path.write_text("".join([first, line + "\n", *rest]))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_probe(*judge_flags(files, **options))
        error = capfd.readouterr().err
        assert exit_.value.code == 2
        assert f"{path}:2: " in error
        assert "; delete this line, its question is asked again\n" in error

        path.write_text("".join([first, *rest]))
        forget_requests(server)
        assert run_judge(files, **options)[server.url] == found
        assert len(server.asked) == 1


KEY = "sk-SECRET123"


@pytest.mark.slow
@pytest.mark.parametrize(
    "reply",
    [
        pytest.param((400, f"what is {KEY}?"), id="400"),
        pytest.param((403, "", {"X-Key": KEY}), id="403"),
        pytest.param(chat(f"1 says {KEY}"), id="answer"),
        pytest.param(chat(None, refusal=KEY), id="refusal"),
        pytest.param((200, KEY), id="no completion"),
    ],
)
def test_the_key_is_nowhere_to_be_read(files, reply):
    """A real process, and a server that says the key: it is not in any output, nor in any file."""
    with Endpoint(reply) as server:
        words = judge_flags(files, **ask_endpoint(server))
        done = subprocess.run(
            [sys.executable, REPO / "probe.py", *words],
            # A key that was pasted with a Windows line end.
            env={**ENV, "OPENAI_API_KEY": f"{KEY}\r\n"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert server.asked
    for _, headers, _ in server.asked:
        assert headers["Authorization"] == f"Bearer {KEY}"

    assert "SECRET" not in done.stdout
    assert "SECRET" not in done.stderr
    written = list_files(files / "out")
    assert len(written) >= 2
    for path in written:
        assert b"SECRET" not in path.read_bytes(), path


@pytest.mark.parametrize(
    "url",
    [
        "http://user:SECRET@127.0.0.1:9/v1",
        "http://127.0.0.1:9/v1?key=SECRET",
        "http://x/{seed}#SECRET",
    ],
)
def test_a_key_in_a_judge_s_url(files, capfd, url):
    """Refused before anything is written, in one line that does not quote it."""
    before = sorted(files.rglob("*"))
    error = probe_refused(capfd, *judge_flags(files, judge=url, judge_model="tiny"))
    assert "SECRET" not in error
    assert "a key belongs in the environment variable OPENAI_API_KEY" in error
    assert sorted(files.rglob("*")) == before


def test_no_choice_at_all(files, capfd):
    with Endpoint(chat("Hm.")) as server:
        error = run_judge_to_an_error(files, capfd, **ask_endpoint(server))
        row = read_summary(files)["judges"][server.url]["splits"]["all"]
    assert "no reply was a choice, the first one: not a choice: 'Hm.'; 0 of" in error
    # Identical pairs need no judge; they alone are judged.
    identical = 0
    for row_a, row_b in zip(draw_answers(1), draw_answers(2)):
        identical += row_a["response"] == row_b["response"]
    assert row["pairs"] == identical


def test_an_endpoint_that_is_down_spoils_no_other_judge(files, capfd):
    with Endpoint(chat("1")) as server:
        pass
    options = ask_endpoint(server, judge=[server.url, reward(files)])
    error = run_judge_to_an_error(files, capfd, **options)
    assert "refused, 4 times" in error.lower()
    assert read_summary(files)["judges"][reward(files)]["splits"]["all"]["pairs"] == 12


def choose_longer_slowly(question):
    time.sleep(0.1)
    return choose_longer(question)


@pytest.mark.slow
def test_a_killed_process_loses_nothing(files):
    """SIGKILL after the fifth choice or so. The next call asks at most what was under way again."""
    with Endpoint(choose_longer_slowly) as server:
        options = ask_endpoint(server, parallel=2)
        process = subprocess.Popen(
            [sys.executable, REPO / "probe.py", *judge_flags(files, **options)],
            env=ENV,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while len(read_choices(files)) < 5:
            if process.poll() is not None or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        # The server may still be at the last questions.
        time.sleep(0.3)

        kept = len(read_choices(files))
        assert 5 <= kept < 18
        assert len(server.asked) - 2 <= kept
        assert not (files / "out" / "summary.json").exists()

        forget_requests(server, choose_longer)
        found = run_judge(files, **options)[server.url]
        assert len(server.asked) == found["questions"] - kept
        assert found["unanswered"] == 0
        shutil.rmtree(files / "out")
        assert run_judge(files, **options)[server.url] == found


def save_model_that_says(word, folder, second=None):
    """A language model that says one word, whatever it is asked. second: the next most likely."""
    tokenizer = world.tokenizer()
    tokenizer.add_tokens(["1", "2"])
    config = world.model_config()
    config.num_hidden_layers = 1
    config.max_position_embeddings = 512
    config.vocab_size = len(tokenizer)
    lm = AutoModelForCausalLM.from_config(config)
    # The last hidden state is 1, 1, ... at every token, and only the word's logit reads it.
    norm = lm.gpt_neox.final_layer_norm
    norm.weight.data.zero_()
    norm.bias.data.fill_(1)
    head = lm.get_output_embeddings().weight.data
    head.zero_()
    head[tokenizer.convert_tokens_to_ids(word)] = 1
    if second:
        head[tokenizer.convert_tokens_to_ids(second)] = 0.5
    save_policy(Policy(lm, value_head=False), tokenizer, str(folder))


def test_a_local_model_s_choices_are_kept_until_its_weights_change(files):
    spec = f"llm:{files / 'model'}"
    save_model_that_says("2", files / "model")
    found = run_judge(files, judge=spec, answer_tokens=1, micro_batch_size=5)[spec]
    # Always "2": every pair is a tie, and the bias is seen.
    assert found["splits"]["all"]["ties"] == 1
    assert found["first_chosen"] == 0
    assert found["unanswered"] == 0
    assert len(read_choices(files)) == found["questions"]

    save_model_that_says("1", files / "model")
    assert run_judge(files, judge=spec, answer_tokens=1)[spec]["first_chosen"] == 1
    assert len(read_choices(files)) == 2 * found["questions"]


def test_forced_choice_is_the_likelier_number(files):
    """A model that says another word than a number still prefers one of them."""
    spec = f"llm:{files / 'model'}"
    word = world.prompts("train")[0]["prompt"].split()[0]
    save_model_that_says(word, files / "model", second="2")
    found = run_judge(files, judge=spec, forced_choice=True)[spec]
    assert found["unanswered"] == 0
    assert found["first_chosen"] == 0

    # Choices of another kind are kept beside these.
    save_model_that_says("2", files / "model", second="1")
    own = run_judge(files, judge=spec, answer_tokens=1)[spec]
    assert own["first_chosen"] == 0
    forced = run_judge(files, judge=spec, forced_choice=True)[spec]
    assert forced["first_chosen"] == 0
    assert len(read_choices(files)) == 3 * found["questions"]

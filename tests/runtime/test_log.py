"""What runs print. Tables: a sample is a line for each turn, whatever its texts hold. And when a
long run on a GPU recommends --compile.
"""

import time
from types import SimpleNamespace

import pytest
import torch

from nanorlhf.runtime.distributed import Dist
from nanorlhf.runtime.log import Progress, is_long, sample_table

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "Translate:\n\n  a  cat"}
ANSWER = {"role": "assistant", "content": "un chat"}
FOLLOW_UP = {"role": "user", "content": "And\ta dog?"}


def show(prompt, response="un\nchien", width=110, **numbers):
    """The lines of the table of one sample."""
    return sample_table([{"prompt": prompt, "response": response, **numbers}], width).split("\n")


def test_question_of_single_turn_is_one_line_without_its_role():
    assert show([QUESTION]) == ["  > Translate: a cat", "    un chien"]


def test_each_turn_of_chat_has_its_own_line():
    assert show([SYSTEM, QUESTION, ANSWER, FOLLOW_UP]) == [
        "  > system: Be brief.",
        "  > user: Translate: a cat",
        "  > assistant: un chat",
        "  > user: And a dog?",
        "    un chien",
    ]


def test_question_that_is_too_long_keeps_its_beginning_and_text_its_end():
    words = "one two three four"
    question = {"role": "user", "content": words}
    assert show([question], width=7) == ["  > one two...", "    un chie..."]
    assert show(words, width=10) == ["  > three four", "    un chien"]


def test_text_with_line_breaks_is_one_line():
    dialogue = "\n\nHuman: Hello\n\nAssistant:"
    assert show(dialogue, "\n Hi \n") == ["  > Human: Hello Assistant:", "    Hi"]


def test_numbers_stand_below_answer_and_counts_do_not():
    lines = show("w", "v", proxy=1.234, step=3, gold=None)
    assert lines == ["  > w", "    v", "    proxy +1.23"]


# ------------------------------------------------------------------------------ progress lines


def test_the_machine_s_clock_may_be_set_back(capsys, monkeypatch):
    """A line comes every few seconds all the same, with the time that has passed."""
    clock = SimpleNamespace(now=1e9, passed=7.0)
    monkeypatch.setattr(time, "time", lambda: clock.now)
    monkeypatch.setattr(time, "monotonic", lambda: clock.passed)
    progress = Progress(Dist(0, 1, torch.device("cpu")), "ppo", 20)
    for step in range(1, 4):
        clock.now -= 3600
        clock.passed += 10
        progress.step(step, "score 1")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"ppo {step}/20 [{10 * step} s] score 1" for step in (1, 2, 3)]


@pytest.mark.parametrize(
    "seconds, done, left, expected",
    [
        (61, 1, 60, True),  # a minute a step, and 60 of them to go
        (61, 1, 59, False),
        (59, 1, 10_000, False),  # its first minute says little
        (70, 2, 100, False),  # 35 s a step
        (70, 2, 103, True),
        (5000, 99, 1, False),  # it is almost done
    ],
)
def test_a_run_is_long_that_has_over_an_hour_to_go(seconds, done, left, expected):
    assert is_long(seconds, done, left) == expected


def steps_that_recommend_compile(capsys, monkeypatch, device, rank=0, **compiled):
    """After which steps a run says something about --compile.

    It was resumed after step 4, and each of its 200 steps takes 50 seconds.
    """
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    dist = Dist(rank, 2, torch.device(device))
    progress = Progress(dist, "ppo", 200, 4, **compiled)
    steps = []
    for step in range(5, 201):
        clock.now += 50
        progress.step(step, "score 1")
        if "--compile" in capsys.readouterr().err:
            steps.append(step)
    progress.close()
    return steps


def test_a_long_run_on_a_gpu_recommends_compile_once(capsys, monkeypatch):
    """As soon as its first minute is over."""
    assert steps_that_recommend_compile(capsys, monkeypatch, "cuda", compiled=False) == [6]


@pytest.mark.parametrize(
    "device, settings",
    [
        ("cpu", {"compiled": False}),
        ("cuda", {"compiled": True}),
        ("cuda", {}),  # it trains nothing
        ("cuda", {"compiled": False, "rank": 1}),  # the main process alone speaks
    ],
)
def test_no_other_run_recommends_compile(capsys, monkeypatch, device, settings):
    assert steps_that_recommend_compile(capsys, monkeypatch, device, **settings) == []

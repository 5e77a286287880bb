"""What reaches a terminal: texts without orders in them, and columns that line up."""

import unicodedata

import pytest

from nanorlhf.show.terminal import (
    count_letters,
    in_one_line,
    measure_width,
    name_runs,
    printable,
    side_by_side,
    wrap,
)


def test_no_character_that_is_an_order_to_a_terminal_is_printed():
    # The first plane of Unicode, and the characters of the last that carry no letters.
    characters = [*map(chr, range(0x3000)), *map(chr, range(0xD800, 0x10000)), "\U000e0001"]
    shown = printable("".join(characters))
    assert {letter for letter in shown if ord(letter) < 32} == {"\n"}
    orders = {"\x1b", "\x7f", "\x9b", "\r", "\b", "\u202e", "\u2066", "\u200f", "\u2028", "\ud800"}
    assert not orders & set(shown)
    shown.encode()  # halves of characters could not be


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[2Jgone\x07", "\\x1b[2Jgone\\x07"),
        ("abc\rXYZ", "abc\\rXYZ"),
        ("user \u202egnp.exe", "user \\u202egnp.exe"),
        ("half \ud83d", "half \\ud83d"),
        ("a\tb\nc", "a    b\nc"),
        ("Grüße, שלום, 你好, 👩\u200d💻", "Grüße, שלום, 你好, 👩\u200d💻"),
    ],
)
def test_orders_are_written_out_and_letters_stay(text, shown):
    assert printable(text) == shown


def test_a_line_stays_one_line():
    assert in_one_line("a\n  b\x1b\n") == "a b\\x1b"


def test_width_counts_columns_not_characters():
    assert measure_width("hotel") == 5
    assert measure_width("你好") == 4
    assert measure_width(unicodedata.normalize("NFD", "é")) == 1


@pytest.mark.parametrize("width", [5, 8, 13, 40])
def test_wrapped_lines_fit_and_lose_no_word(width):
    text = "the hotel was very-long-and-wide-indeed .\n\n    if 你好你好你好: a b"
    lines = wrap(text, width)
    assert max(map(measure_width, lines)) <= width
    letters = "".join(lines).replace(" ", "")
    assert letters == "".join(text.split())
    assert "" in lines  # the empty line between the paragraphs


def test_indentation_stays():
    assert wrap("def f():\n    return 1", 20) == ["def f():", "    return 1"]


def test_a_letter_that_is_too_wide_stands_alone():
    assert count_letters("你好", 1) == 1
    assert wrap("你好", 1) == ["你", "好"]


def test_columns_begin_at_the_same_place():
    left = "one\n你好 is two"
    right = "RIGHT\nRIGHT\nRIGHT"
    for line in side_by_side([left, right], 80).split("\n"):
        before = line[: line.index("RIGHT")]
        assert measure_width(before) == 41  # (80 - 3) // 2 columns and the gap of 3
    assert side_by_side([left, right], 80).count("\n") == 2


def test_narrow_terminals_have_the_texts_one_below_another():
    assert side_by_side(["a b", "c"], 66).split("\n") == ["a b", "c"]
    assert side_by_side(["a b", "c"], 67).split("\n") == ["a b" + " " * 32 + "c"]
    # Three columns need more room than two.
    assert side_by_side(["a", "b", "c"], 67).split("\n") == ["a", "b", "c"]


def test_runs_stand_first_without_a_flag():
    assert name_runs(["a", "b", "--n", "3"]) == ["--runs", "a", "b", "--n", "3"]
    assert name_runs(["--n", "3", "--runs", "a"]) == ["--n", "3", "--runs", "a"]
    assert name_runs([]) == []

"""The tables that runs print: a sample is a line for each turn, whatever its texts hold."""

from nanorlhf.runtime.log import sample_table

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

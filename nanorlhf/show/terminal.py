r"""Texts on a terminal: what is safe to print, how wide it is, and columns side by side.

A model's answer may hold anything. printable() writes out what a terminal would take for an order:

    "\x1b[2J red"   ->   \x1b[2J red          (an escape code that would have cleared the screen)
"""

import contextlib
import itertools
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator

from ..errors import InputError

PROMPT_MARK = "> "  # where a line is typed
GAP = "   "  # between two columns
NARROWEST = 32  # where columns would be narrower than this, they stand one below another
# Categories of Unicode that are written out: control characters, marks of format and direction,
# halves of characters, separators of lines and of paragraphs.
UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Marks of format that hold emoji and the letters of some scripts together.
JOINERS = "\u200c\u200d"


# ------------------------------------------------------------------------------------- safe texts


def printable(text: str) -> str:
    """A text with every character written out that is an order to the terminal: \\x1b, \\u202e.

    Escape codes could colour, overwrite or hide what stands on the screen; marks of direction could
    turn it round. Newlines stay, and a tab becomes four spaces.
    """
    shown = []
    for letter in text.replace("\t", "    "):
        is_unsafe = unicodedata.category(letter) in UNSAFE and letter not in JOINERS
        if is_unsafe and letter != "\n":
            letter = ascii(letter)[1:-1]  # without its quotes
        shown.append(letter)
    return "".join(shown)


def in_one_line(text: str) -> str:
    """printable(), with spaces in the place of newlines."""
    return " ".join(printable(text).split())


# -------------------------------------------------------------------------------- width and columns


def measure_width(text: str) -> int:
    """How many columns of a terminal a text takes: 2 for a wide letter, 0 for a combining mark."""
    # len() would count letters: a column of Chinese text would then be twice as wide as meant.
    width = 0
    for letter in text:
        if unicodedata.category(letter) in ("Mn", "Me", "Cf"):
            continue
        is_wide = unicodedata.east_asian_width(letter) in "WF"
        width += 2 if is_wide else 1
    return width


def wrap(text: str, width: int) -> list[str]:
    """The lines of a text, broken at spaces so that each takes at most `width` columns.

    A word that is wider than that is broken too. Indentation stays.
    """
    # textwrap counts letters and not columns, so lines are filled here, word by word. A word comes
    # with the spaces in front of it, and loses them where it begins a new line.
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in re.findall(r" *[^ ]+", paragraph):
            if measure_width(line + word) > width and line:
                lines.append(line)
                line = ""
                word = word.lstrip(" ")
            line += word
            while measure_width(line) > width and len(line) > 1:
                n_letters = count_letters(line, width)
                lines.append(line[:n_letters])
                line = line[n_letters:]
        lines.append(line)
    return lines


def count_letters(text: str, width: int) -> int:
    """How many letters of a text fit into `width` columns: one at least."""
    n_letters = 1
    while n_letters < len(text) and measure_width(text[: n_letters + 1]) <= width:
        n_letters += 1
    return n_letters


def side_by_side(cells: list[str], width: int) -> str:
    """Texts in columns of equal width; one below another where columns would be too narrow."""
    n_cells = len(cells)
    column = (width - len(GAP) * (n_cells - 1)) // n_cells
    if n_cells == 1 or column < NARROWEST:
        lines = []
        for cell in cells:
            lines += wrap(cell, width)
        return "\n".join(lines)

    # Each text is wrapped by itself. Then line i of the output joins line i of every text.
    wrapped = [wrap(cell, column) for cell in cells]
    lines = []
    for parts in itertools.zip_longest(*wrapped, fillvalue=""):
        padded = [part + " " * (column - measure_width(part)) for part in parts]
        lines.append(GAP.join(padded).rstrip())
    return "\n".join(lines)


def terminal_width() -> int:
    """The columns of the terminal; 80 where the output is no terminal."""
    return shutil.get_terminal_size().columns


# -------------------------------------------------------------------------------- input and output


def read_line() -> str | None:
    """What is typed, or the next line of a file; None at the end. InputError: it is not UTF-8."""
    # The mark tells a person to type. With prompts from a file it would stand among the answers.
    is_typed = sys.stdin.isatty()
    mark = ""
    if is_typed:
        mark = PROMPT_MARK
    try:
        line = input(mark).strip()
        line.encode()  # some systems read bytes that are not UTF-8 as halves of characters
        return line
    except EOFError:
        if is_typed:
            print()  # Ctrl-D leaves the cursor behind the mark
        return None
    except UnicodeError:
        raise InputError("a prompt is not UTF-8") from None


def name_runs(args: list[str] | None) -> list[str]:
    """RUN RUN --n 3  ->  --runs RUN RUN --n 3: runs stand first, without a flag's name.

    None: the words of this process's own command line.
    """
    if args is None:
        args = sys.argv[1:]
    if args and not args[0].startswith("-"):
        return ["--runs", *args]
    return args


@contextlib.contextmanager
def until_nobody_reads() -> Iterator[None]:
    """A context that ends without an error where the reader of the output has gone, as head has."""
    # A letter that the terminal's encoding does not have is written out.
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends: what is left goes nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)

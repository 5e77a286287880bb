"""A page to look at: what runs have measured and written, in one HTML file.

    a run, into RUN/page.html; the scripts do this at their end:
        python -m nanorlhf.show.page runs/ppo
    several runs over one another:
        python -m nanorlhf.show.page runs/ppo runs/no_kl --output both.html
    best-of-n, and what a command of probe.py has found:
        python -m nanorlhf.show.page runs/bon
        python -m nanorlhf.show.page runs/probe/features runs/probe/reward

The file needs no network and no server: any browser opens it. The files page_*.py say what is on
it. Its markup, style and script are in web/, and stand in the file together with the data, which is
JSON. The script shows every text of the data as text, never as markup.
"""

import argparse
import html
import json
import os
import re

from ..errors import InputError, first_line
from ..runtime.files import check_output, replace_file, without_nan
from .page_answers import read_answers
from .page_curves import Run, open_runs, read_panels
from .page_results import draw_densities, read_best_of_n, read_features, read_tables

WEB = os.path.join(os.path.dirname(__file__), "web")
SCRIPTS = (
    "elements.js",
    "charts.js",
    "answers.js",
    "best_of_n.js",
    "features.js",
    "tables.js",
    "page.js",
)
# How a page is recognised: one that somebody else made is not written over.
GENERATOR = '<meta name="generator" content="nanorlhf">'
LARGEST = 4_500_000  # bytes of the blocks with many items; all else is small


# -------------------------------------------------------------------------------------- the blocks


def collect(runs: list[Run]) -> dict:
    """All that a page shows of these runs, for JSON."""
    # Answers are read first: the curve of how often they hold the cue is counted in them.
    answers = []
    for run in runs:
        answers += read_part(read_answers, run)
    panels = read_panels(runs, answers)

    # A reader returns empty lists for a run that has nothing for it.
    best_of_n = []
    features = []
    tables = []
    for run in runs:
        bon_panels, bon_blocks = read_part(read_best_of_n, run)
        panels += bon_panels
        panels += read_part(draw_densities, run)
        best_of_n += bon_blocks
        features += read_part(read_features, run)
        tables += read_part(read_tables, run)

    # Only these blocks hold many texts. Curves and tables are small, and stay whole.
    fit_into([*answers, *best_of_n, *features], LARGEST)
    return {
        "runs": [run.describe() for run in runs],
        "settings": compare_settings(runs),
        "panels": panels,
        "answers": answers,
        "best_of_n": best_of_n,
        "features": features,
        "tables": tables,
    }


def read_part(reader, run: Run):
    """reader(run). InputError: a file of the run is not as the scripts write it."""
    try:
        return reader(run)
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as e:
        what = f"{type(e).__name__}: {first_line(e)}"
        raise InputError(f"{run.folder}: not as the scripts write it ({what})") from None


def compare_settings(runs: list[Run]) -> list[list]:
    """[[setting, its value in each run]], as text.

    Those that differ between the runs come first.
    """
    names = {}  # a set that keeps the order
    for run in runs:
        names |= dict.fromkeys(run.config)
    names.pop("inputs", None)  # fingerprints of files

    same = []
    different = []
    for name in names:
        # "-" stands for a setting that a run lacks: the run is older, or another script's.
        values = []
        for run in runs:
            value = run.config.get(name, "-")
            if not isinstance(value, str):
                value = json.dumps(value)
            values.append(value)
        if len(set(values)) > 1:
            different.append([name, values])
        else:
            same.append([name, values])
    return different + same


def fit_into(blocks: list[dict], room: int):
    """Leave out the last items of blocks, so that together they take `room` bytes at most.

    A block says under "left_out" how many it has lost. Each may take the same share of the room,
    and what a small one leaves is for the larger ones.
    """
    sizes = []  # of the items of each block
    for block in blocks:
        sizes.append([len(to_json(item).encode()) for item in block["items"]])
    # The smallest block comes first: the room that it leaves is shared by all later blocks.
    smallest_first = sorted(range(len(blocks)), key=lambda i: sum(sizes[i]))
    for n_done, i in enumerate(smallest_first):
        share = room / (len(blocks) - n_done)
        kept = 0
        used = 0
        # The first items stay, up to one that no longer fits: the order is that of the file.
        for size in sizes[i]:
            if used + size > share:
                break
            used += size
            kept += 1
        items = blocks[i]["items"]
        blocks[i]["left_out"] = len(items) - kept
        blocks[i]["items"] = items[:kept]
        room -= used


# ---------------------------------------------------------------------------------------- the file


def to_json(value) -> str:
    """JSON that may stand inside a script element.

    A < could end the element, as in </script>. It is written as an escape, which JSON reads as <.
    """
    value = without_nan(value)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def read_web(*names: str) -> str:
    """Files of web/, one after the other."""
    parts = []
    for name in names:
        with open(os.path.join(WEB, name), encoding="utf-8") as f:
            parts.append(f.read())
    return "\n".join(parts)


def build_page(folders: list[str]) -> str:
    """The page of these runs as HTML. InputError: one of them is none, or is damaged."""
    runs = open_runs(folders)
    parts = {
        "title": html.escape(", ".join(run.folder for run in runs)),
        "style": read_web("page.css"),
        "script": read_web(*SCRIPTS),
        "data": to_json(collect(runs)),
    }

    def fill(place):  # a match of {{title}}, {{style}}, ...
        return parts[place[1]]

    # All at once: what has been put in may hold {{data}} itself.
    return re.sub(r"\{\{(\w+)\}\}", fill, read_web("page.html"))


def is_page(path: str) -> bool:
    """Whether a file is a page that this module wrote."""
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8", errors="replace") as f:
        return GENERATOR in f.read(500)


def save_page(folders: list[str], path: str) -> str:
    """Write the page of these runs. -> its path; InputError: see build_page() and check_output()"""
    # An older page is replaced; a file of this name that is no page is an error.
    check_output(path, is_page, "a page of this command")
    page = build_page(folders)
    # The page gets its name when it is whole: until then an older one stays. errors="replace": the
    # name of a folder may hold bytes that are not UTF-8.
    with open(f"{path}.tmp", "w", encoding="utf-8", errors="replace") as f:
        f.write(page)
    replace_file(path)
    return path


def write_page(folder: str, dist):
    """Write the page of a run that has just ended, and say in one line where it is.

    A page is no result: whatever goes wrong with it is one line too, and the run is done all the
    same. On several processes the main one does it.
    """
    if not dist.main:
        return
    try:
        path = save_page([folder], os.path.join(folder, "page.html"))
        dist.print(f"A page to look at, in any browser: {path}")
    except Exception as e:
        dist.print(f"No page was made ({type(e).__name__}: {first_line(e)})")


def main(words: list[str] | None = None):
    """Write the page of the runs on the command line, and print where it is."""
    parser = argparse.ArgumentParser(
        prog="page.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        help="the file; by default RUN/page.html, and of several runs page.html here",
    )
    # Else the usage would stand in front of the error.
    parser.error = lambda message: parser.exit(2, f"page.py: error: {message}\n")
    args = parser.parse_args(words)
    path = args.output
    if not path and len(args.runs) == 1:
        path = os.path.join(args.runs[0], "page.html")
    path = path or "page.html"
    try:
        print(save_page(args.runs, path))
    except (InputError, OSError) as e:
        parser.exit(2, f"page.py: error: {first_line(e)}\n")


if __name__ == "__main__":
    main()

"""In and out of distribution: the rows that a run may learn from, the named splits that it is evaluated on, formats of prompts.

    --in_distribution subreddit=tifu,AskReddit     rows whose column has one of these values
    --in_distribution "words:post<=245"            by a column's length in words (also <, >, >=)
    --in_distribution my.py:is_short               by a Python function of the row (a dict) that returns True or False
    --eval_splits test ood cnn=cnn_dm:cnn.jsonl    held out and in distribution; held out and not; a file, here in the format cnn_dm

Training rows and 'test' are in distribution. After Kirk et al. 2023 (2310.06452): generalisation gap = value on test - value on ood.
"""

import operator
import re
from string import Formatter

from .cli import require
from .errors import user_code

TLDR = "SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"
CNN_DM = "ARTICLE: {article}\nTL;DR:"
FORMATS = {"": ("{prompt}", "response"), "tldr": (TLDR, "summary"), "cnn_dm": (CNN_DM, "highlights")}  # prompt, column of the response
COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
TAKEN = ("test", "ood", "eval", "score", "feature", "rate", "penalty")  # names that stand in metrics already


# ------------------------------------------------------------------------------------------------------------------------- formats


def columns_of(prompt_format, fields):
    """The columns that rows of a format need for `fields`: tldr, (prompt, response) -> [subreddit, title, post, summary]."""
    require(prompt_format in FORMATS, f"--prompt_format must be one of {', '.join(filter(None, FORMATS))}, not {prompt_format!r}")
    template, response = FORMATS[prompt_format]
    return [name for _, name, *_ in Formatter().parse(template) if name] + [response if f == "response" else f for f in fields[1:]]


def written(prompt_format, fields, texts):
    """The texts of columns_of(), by column -> a row of `fields`. An answer to a format's prompt is a space and the text, stripped."""
    if not prompt_format:
        return texts
    template, response = FORMATS[prompt_format]
    answers = {f: " " + texts[response if f == "response" else f].strip() for f in fields[1:]}
    return {"prompt": template.format(**texts), **answers}


# -------------------------------------------------------------------------------------------------------------------- distribution


def predicate(where):
    """--in_distribution -> a function (place of a row, row) -> bool; '' is true of every row. Wrong rows are InputErrors with their place.

    Pitfall: words are what stands between white space; the reference code counts blanks alone.
    """
    length = re.fullmatch(r"words:(.+?)(<=|>=|<|>)(\d+)", where)
    column, _, values = where.partition("=")
    if not where:
        return lambda place, row: True
    if re.fullmatch(r".+\.py:\w+", where):
        from .rewards import python_function  # not above: rewards.py imports data.py, and that this file

        column, holds = None, python_function(where)
    elif length:
        column, sign, number = length.groups()
        holds = lambda row: COMPARE[sign](len(row[column].split()), int(number))  # noqa: E731
    else:
        known = f"--in_distribution takes COLUMN=a,b,c, words:COLUMN<=N (or <, >, >=) or FILE.py:FUNCTION, not {where!r}"
        require(column and values and not where.startswith("words:"), known)
        values = {value.strip() for value in values.split(",")}
        holds = lambda row: str(row[column]) in values  # noqa: E731

    def inside(place, row):
        require(column is None or column in row, f"{place}: no field {column!r}, which --in_distribution {where} reads")
        require(not length or isinstance(row[column], str), f"{place}: field {column!r} must be a string to have words")
        with user_code(f"{place}: --in_distribution {where} raised"):
            answer = holds(row)
            is_bool = answer in (True, False)  # of numpy too
        require(is_bool, f"{place}: {where} must return True or False, not {answer!r}")
        return bool(answer)

    return inside


# -------------------------------------------------------------------------------------------------------------------- named splits


def labels(eval_splits):
    """--eval_splits -> {label in the results: 'test', 'ood' or a file}. The first one's label is 'eval', the others' is their name."""
    found, names = {}, []
    for item in eval_splits:
        name, is_file, path = item.partition("=")
        good = re.fullmatch(r"[\w-]+", name) and path and name not in TAKEN if is_file else name in ("test", "ood")
        require(good, f"--eval_splits takes test, ood and NAME=FILE (a NAME of letters and digits, not {', '.join(TAKEN)}), not {item!r}")
        require(name not in names, f"--eval_splits names {name} twice")
        names.append(name)
        found[name if found else "eval"] = path or name
    return found

"""In and out of distribution: which rows a run learns from, which are held out, and named splits.

    --in_distribution subreddit=tifu,AskReddit     rows whose column has one of these values
    --in_distribution "words:post<=245"            by a column's length in words (also <, >, >=)
    --in_distribution my.py:is_short               by a Python function of the row, True or False
    --eval_splits test ood cnn=cnn_dm:cnn.jsonl    three splits, all of them held out:
                                                   rows in distribution; rows that are not; a file
                                                   (here read in the format cnn_dm)

Training rows and 'test' are in distribution. After Kirk et al. 2023 (2310.06452):
generalisation gap = value on test - value on ood.
"""

import operator
import re
from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace

from .chats import is_chat, read_messages
from .data import canonical, describe_rows, draw, is_world, read_parts, read_rows, subset
from .errors import require, user_code
from .formats import PROMPT_FORMATS
from .runtime.files import python_function

COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
# Names that metrics have already, so that no split can have them.
TAKEN = ("test", "ood", "eval", "score", "feature", "rate", "penalty")
# What the sentence on the data calls the rows of each kind.
NAMES_OF_ROWS = {"sft": "demonstrations", "pairs": "pairs", "prompts": "prompts"}
# What holds for a command that does not have these flags.
WITHOUT_FLAG = {"in_distribution": "", "prompt_format": "", "eval_splits": [], "max_rows": 0}


# ---------------------------------------------------------------- training rows and held-out rows


def load(config, kind: str) -> tuple[list[dict], list[dict], str]:
    """load_splits() for one split -> training rows, held-out rows, a sentence on them."""
    rows, held_out, note = load_splits(config, kind)
    return rows, held_out["eval"], note


def load_splits(config, kind: str) -> tuple[list[dict], dict[str, list[dict]], str]:
    """The rows that a run's flags name -> training rows, {label: held-out rows}, a sentence.

    Without --eval_dataset, rows are held out by prompt: no prompt is on both sides, and prompts
    that differ by white space alone are one. 'ood' holds rows that do not fit --in_distribution. It
    takes them from --eval_dataset; or else from --dataset, without prompts that are trained on. The
    embedded world has a split 'ood' of its own. The sentence counts the rows; it also counts
    held-out prompts that are trained on, which another file may have. No split depends on --seed.
    """
    config = SimpleNamespace(**{**WITHOUT_FLAG, **vars(config)})
    # {"eval": "test", "ood": "ood", "cnn": "cnn_dm:cnn.jsonl"} for the --eval_splits that stand at
    # the top of this file.
    sources = read_eval_splits(config.eval_splits or ["test"])
    check_flags(config, kind, sources)

    # Rows are held out before --max_rows: fewer training rows leave the held-out ones the same.
    rows, test, outside, remark_on_outside = divide_rows(config, kind)
    rows = subset(rows, config.max_rows)

    # The splits that were asked for.
    held_out = {}
    for label, source in sources.items():
        if source == "test":
            held_out[label] = test
        elif source == "ood":
            held_out[label] = draw_ood(config, kind, outside)
        else:
            held_out[label] = draw(read_named(source, kind, config), config.eval_size)

    # What the sentence has to say beside the sizes.
    all_rows = list(rows)
    for part in held_out.values():
        all_rows += part
    remarks = describe_rows(all_rows, config.dataset, kind, config.columns, config.prompt_format)
    if config.in_distribution:
        remarks.append(remark_on_outside)
    if kind == "pairs":
        rows, held_out, n_equal = drop_equal_pairs(config, rows, held_out, sources)
        if n_equal:
            remarks.append(f"{n_equal} with chosen == rejected skipped")
    return rows, held_out, describe_splits(kind, rows, held_out, sources, remarks)


def check_flags(config, kind: str, sources: dict[str, str]):
    """InputError where flags contradict each other. sources: read_eval_splits()."""
    with_world = is_world(config.dataset) or is_world(spec_of_held_out(config))
    for flag in ("in_distribution", "prompt_format"):
        require(
            not (with_world and getattr(config, flag)),
            f"--{flag} is for data of one's own: the embedded world has its texts and its split "
            "ood already",
        )
    has_ood = config.in_distribution or is_world(spec_of_held_out(config))
    require(
        has_ood or "ood" not in sources.values(),
        "--eval_splits ood needs --in_distribution, which says what is in",
    )
    require(
        kind != "sft" or not is_world(config.eval_dataset),
        "--eval_dataset world: its demonstrations are all for training; leave it out",
    )


def spec_of_held_out(config) -> str:
    """The data that 'test' and 'ood' are taken from."""
    return config.eval_dataset or config.dataset


def divide_rows(config, kind: str) -> tuple[list[dict], list[dict], list[dict], str]:
    """-> training rows, the split 'test', the rows for 'ood', a remark on what was left out.

    The rows for 'ood' are all that there are; of the embedded world none (see draw_ood).
    """
    # Rows out of distribution are never trained on, whether --eval_splits names ood or not.
    rows, left_out = read_source(config.dataset, kind, "train", config)
    remark = f"{len(left_out)} out of distribution left out"

    # Rows to evaluate on are there: in a data set of their own, or in the world, whose
    # demonstrations alone are all for training.
    world_has_them = is_world(config.dataset) and kind != "sft"
    if config.eval_dataset or world_has_them:
        test, outside = read_source(spec_of_held_out(config), kind, "test", config)
        return rows, draw(test, config.eval_size), outside, remark

    # Or they are taken from the data set that is trained on.
    rows, test = hold_out_prompts(rows, config.eval_size, config.dataset)
    # A prompt may have one row in distribution, which is trained on, and one that is not.
    trained = distinct_prompts(rows)
    outside = [row for row in left_out if key_of(row) not in trained]
    n_seen = len(left_out) - len(outside)
    if n_seen:
        remark += (
            f" ({n_seen} of them with prompts that are trained on, so they are not in ood either)"
        )
    return rows, test, outside, remark


def read_source(spec: str, kind: str, split: str, config) -> tuple[list[dict], list[dict]]:
    """What --dataset or --eval_dataset names -> its rows in distribution, and the others.

    Of the embedded world: the rows of `split`, and none.
    """
    if is_world(spec):
        return read_rows(spec, kind, split=split), []
    where = config.in_distribution
    inside, outside = read_parts(spec, kind, config.columns, config.prompt_format, predicate(where))
    require(inside, f"{spec}: no row is in distribution (--in_distribution {where})")
    return inside, outside


def hold_out_prompts(rows: list[dict], n: int, spec: str) -> tuple[list[dict], list[dict]]:
    """Rows -> rows to train on, and at most n held-out rows. No prompt is on both sides.

    At most a fifth of the prompts is held out. InputError: too few prompts in the data set `spec`.
    """
    # Each prompt once, in the order of the rows.
    keys = [key_of(row) for row in rows]
    prompts = list(dict.fromkeys(keys))
    n_aside = min(n, len(prompts) // 5)
    aside = set(draw(prompts, n_aside))
    require(aside, f"{spec}: {len(prompts)} different prompts are too few to hold any out")
    train = []
    held_out = []
    for row, key in zip(rows, keys):
        if key in aside:
            held_out.append(row)
        else:
            train.append(row)
    return train, held_out[:n]


def draw_ood(config, kind: str, outside: list[dict]) -> list[dict]:
    """The split 'ood': the embedded world's own, or else --eval_size of the rows `outside`."""
    spec = spec_of_held_out(config)
    if is_world(spec):
        outside = read_rows(spec, kind, split="ood")
    part = draw(outside, config.eval_size)
    where = config.in_distribution
    require(part, f"{spec}: no held-out row is out of distribution (--in_distribution {where})")
    return part


def read_named(spec: str, kind: str, config) -> list[dict]:
    """The [FORMAT:]FILE of an --eval_splits NAME=[FORMAT:]FILE -> its rows.

    Without a format the file is read as --dataset is.
    """
    # 'cnn_dm:cnn.jsonl' begins with a format; 'NAME:SPLIT' of a data set does not.
    prompt_format, _, path = spec.partition(":")
    if path and prompt_format in ("", *PROMPT_FORMATS):
        rows, _ = read_parts(path, kind, (), prompt_format)
    else:
        rows, _ = read_parts(spec, kind, config.columns, config.prompt_format)
    return rows


def drop_equal_pairs(
    config, rows: list[dict], held_out: dict[str, list[dict]], sources: dict[str, str]
) -> tuple[list[dict], dict[str, list[dict]], int]:
    """Training and held-out pairs -> those whose answers differ, and how many are dropped.

    A pair of two equal answers says nothing about which is better.
    """
    kept = keep_differing(rows, config.dataset)
    n_dropped = len(rows) - len(kept)
    kept_held_out = {}
    for label, part in held_out.items():
        spec = sources[label]
        if spec in ("test", "ood"):
            spec = spec_of_held_out(config)
        kept_held_out[label] = keep_differing(part, spec)
        n_dropped += len(part) - len(kept_held_out[label])
    return kept, kept_held_out, n_dropped


def keep_differing(pairs: list[dict], spec: str) -> list[dict]:
    """The pairs whose answers differ. InputError: the data set `spec` has none."""
    kept = [row for row in pairs if row["chosen"] != row["rejected"]]
    require(kept, f"{spec}: no pair is left in which chosen and rejected differ")
    return kept


# ----------------------------------------------------------------------------------- the sentence


def describe_splits(
    kind: str,
    rows: list[dict],
    held_out: dict[str, list[dict]],
    sources: dict[str, str],
    remarks: list[str],
) -> str:
    """The sentence on the data: sizes, then the remarks, then the prompts that splits share."""
    sizes = [f"{len(rows)} {NAMES_OF_ROWS[kind]}"]
    overlaps = []
    for label, part in held_out.items():
        name = name_split(label, sources[label])
        sizes.append(f"{len(part)} {name}")
        overlap = note_overlap(part, rows, name)
        if overlap:
            overlaps.append(overlap)
    return ", ".join(sizes + remarks + overlaps)


def name_split(label: str, source: str) -> str:
    """How the sentence on the data names a split: 'held out' for 'test', else 'in NAME'."""
    if source == "test":
        return "held out"
    # 'eval' is the label of the first split, whichever it is.
    name = source if label == "eval" else label
    return f"in {name}"


def note_overlap(held_out: list[dict], rows: list[dict], name: str) -> str:
    """How many prompts of a split are trained on too, for the sentence; '' for none.

    name: name_split() of the split.
    """
    prompts = distinct_prompts(held_out)
    shared = prompts & distinct_prompts(rows)
    if not shared:
        return ""
    what = "held-out prompts" if name == "held out" else f"prompts {name}"
    return f"{len(shared)} of {len(prompts)} {what} are trained on too"


def distinct_prompts(rows: list[dict]) -> set[str]:
    """The different prompts of rows, by their keys."""
    return {key_of(row) for row in rows}


def key_of(row: dict) -> str:
    """What a row is held out by: its prompt, or its text where the data have no prompts."""
    return canonical(row["prompt"]) or canonical(row.get("response", ""))


# ----------------------------------------------------------------------------------- named splits


def read_eval_splits(eval_splits: list[str]) -> dict[str, str]:
    """--eval_splits -> {label of a split in the results: its source, 'test', 'ood' or its file}.

    The label of the first split is 'eval'; the label of any other is its name.
    """
    # Every run has a split 'eval', which is taken where one is enough, as for printed samples.
    sources = {}
    names = []
    for item in eval_splits:
        name, has_file, path = item.partition("=")
        if has_file:
            is_name = re.fullmatch(r"[\w-]+", name) and name not in TAKEN
            good = is_name and path
        else:
            good = name in ("test", "ood")
        require(
            good,
            "--eval_splits takes test, ood and NAME=FILE (a NAME of letters and digits, not "
            f"{', '.join(TAKEN)}), not {item!r}",
        )
        require(name not in names, f"--eval_splits names {name} twice")
        label = name if names else "eval"
        names.append(name)
        sources[label] = path or name
    return sources


# ----------------------------------------------------------------------------------- distribution


def predicate(where: str) -> Callable[[str, dict], bool]:
    """--in_distribution -> a function (place, row) -> whether the row is in distribution.

    '' is true of every row. The function has InputErrors, with the place, for rows that cannot be
    asked. Pitfall: words are what stands between white space; the reference code counts blanks
    alone.
    """
    if not where:
        return lambda place, row: True
    if re.fullmatch(r".+\.py:\w+", where):
        return function_predicate(where)
    # 18 digits at most: Python refuses to read numbers that are thousands of digits long.
    length = re.fullmatch(r"words:(.+?)(<=|>=|<|>)(\d{1,18})", where)
    if length:
        column, sign, number = length.groups()
        return length_predicate(where, column, sign, int(number))
    # 'words:post<=many' is a mistyped length, and not the column 'words:post<' with a value.
    column, _, values = where.partition("=")
    is_complete = column and values
    require(
        is_complete and not where.startswith("words:"),
        "--in_distribution takes COLUMN=a,b,c, words:COLUMN<=N (or <, >, >=) or FILE.py:FUNCTION, "
        f"not {where!r}",
    )
    return value_predicate(where, column, values)


def value_predicate(where: str, column: str, values: str) -> Callable[[str, dict], bool]:
    """COLUMN=a,b,c: the column has one of these values."""
    wanted = {value.strip() for value in values.split(",")}

    def inside(place, row):
        require_column(place, row, column, where)
        # The flag's values are text, so a number is compared as it is written.
        return str(row[column]) in wanted

    return inside


def length_predicate(
    where: str, column: str, sign: str, number: int
) -> Callable[[str, dict], bool]:
    """words:COLUMN<=N, and other signs: the column's text has so many words."""
    compare = COMPARE[sign]

    def inside(place, row):
        require_column(place, row, column, where)
        text = row[column]
        # Of a chat, what its messages say counts.
        if is_chat(text):
            messages = read_messages(place, text, column)
            text = " ".join(message["content"] for message in messages)
        is_text = isinstance(text, str)
        require(is_text, f"{place}: field {column!r} must be a string to have words")
        n_words = len(text.split())
        return compare(n_words, number)

    return inside


def function_predicate(where: str) -> Callable[[str, dict], bool]:
    """FILE.py:FUNCTION: the function returns True."""
    function = python_function(where)

    def inside(place, row):
        with user_code(f"{place}: --in_distribution {where} raised"):
            # The function gets a row of its own, which it may change.
            answer = function(deepcopy(row))
            # This lets numpy's True and False through too.
            is_bool = answer in (True, False)
        require(is_bool, f"{place}: {where} must return True or False, not {answer!r}")
        return bool(answer)

    return inside


def require_column(place: str, row: dict, column: str, where: str):
    """InputError where a row lacks the column that --in_distribution reads."""
    has_column = column in row
    require(has_column, f"{place}: no field {column!r}, which --in_distribution {where} reads")

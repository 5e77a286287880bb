"""In and out of distribution: the rows that a run may learn from, the rows that are held out, and the named splits.

    --in_distribution subreddit=tifu,AskReddit     rows whose column has one of these values
    --in_distribution "words:post<=245"            by a column's length in words (also <, >, >=)
    --in_distribution my.py:is_short               by a Python function of the row (a dict) that returns True or False
    --eval_splits test ood cnn=cnn_dm:cnn.jsonl    held out and in distribution; held out and not; a file, here in the format cnn_dm

Training rows and 'test' are in distribution. After Kirk et al. 2023 (2310.06452): generalisation gap = value on test - value on ood.
"""

import operator
import re
from copy import deepcopy
from types import SimpleNamespace

from .data import FORMATS, canonical, draw, is_world, read_parts, read_rows, subset
from .errors import require, user_code
from .runtime.files import python_function

COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
TAKEN = ("test", "ood", "eval", "score", "feature", "rate", "penalty")  # names that stand in metrics already


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
        column, function = None, python_function(where)
        # The function gets a row of its own, which it may change.
        holds = lambda row: function(deepcopy(row))  # noqa: E731
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


# ------------------------------------------------------------------------------------------------- training rows and held-out rows


def load(config, kind):
    """load_splits() for one split: training rows, held-out rows, a sentence on them."""
    rows, held_out, note = load_splits(config, kind)
    return rows, held_out["eval"], note


def load_splits(config, kind):
    """-> training rows, {label: held-out rows} (splits.labels), a sentence on them. No split depends on --seed.

    Without --eval_dataset rows are held out by prompt, compared up to white space: none is on both
    sides. 'ood' holds what is not --in_distribution, of --eval_dataset or else of --dataset, there
    without prompts that are trained on; or it is the embedded world's own. The sentence also counts
    the held-out prompts of other files that are trained on.
    """
    lacking = {"in_distribution": "", "prompt_format": "", "eval_splits": [], "max_rows": 0}  # in probes
    config = SimpleNamespace(**lacking | vars(config))
    wanted, source, where = labels(config.eval_splits or ["test"]), config.eval_dataset or config.dataset, config.in_distribution
    for flag in ("in_distribution", "prompt_format"):
        clash = getattr(config, flag) and (is_world(config.dataset) or is_world(source))
        require(not clash, f"--{flag} is for data of one's own: the embedded world has its texts and its split ood already")
    require("ood" not in wanted.values() or where or is_world(source), "--eval_splits ood needs --in_distribution, which says what is in")

    def read(spec, split="train"):
        """A source -> its rows in and out of distribution; of the embedded world those of a split, and none."""
        if is_world(spec):
            return read_rows(spec, kind, split=split), []
        inside, outside = read_parts(spec, kind, config.columns, config.prompt_format, predicate(where))
        require(inside, f"{spec}: no row is in distribution (--in_distribution {where})")
        return inside, outside

    rows, outside = read(config.dataset)
    note = f", {len(outside)} out of distribution left out" if where else ""
    if config.eval_dataset or (is_world(config.dataset) and kind != "sft"):
        require(not is_world(source) or kind != "sft", "--eval_dataset world: its demonstrations are all for training; leave it out")
        test, outside = read(source, "test")
        test = draw(test, config.eval_size)
    else:
        rows, test = hold_out_prompts(rows, config.eval_size, config.dataset)
        trained = distinct_prompts(rows)
        unseen = [row for row in outside if canonical(row["prompt"]) not in trained]
        seen = len(outside) - len(unseen)
        outside = unseen
        note += f" ({seen} of them with prompts that are trained on, so they are not in ood either)" if seen else ""
    parts = {"": subset(rows, config.max_rows)}
    for label, spec in wanted.items():
        if spec == "test":
            parts[label] = test
        elif spec == "ood":
            parts[label] = draw(read_rows(source, kind, split="ood") if is_world(source) else outside, config.eval_size)
            require(parts[label], f"{source}: no held-out row is out of distribution (--in_distribution {where})")
        else:
            parts[label] = draw(read_named(spec, kind, config), config.eval_size)
    if kind == "pairs":
        n = sum(map(len, parts.values()))
        parts = {label: [r for r in part if r["chosen"] != r["rejected"]] for label, part in parts.items()}
        skipped = n - sum(map(len, parts.values()))
        note += f", {skipped} with chosen == rejected skipped" if skipped else ""
        require(all(parts.values()), f"{config.dataset}: no pair is left in which chosen and rejected differ")
    rows = parts.pop("")
    where_from = {label: "held out" if spec == "test" else f"in {spec if label == 'eval' else label}" for label, spec in wanted.items()}
    sizes = ", ".join(f"{len(part)} {where_from[label]}" for label, part in parts.items())
    for label, part in parts.items():
        note += note_overlap(part, rows, where_from[label])
    return rows, parts, f"{len(rows)} {kind} rows, {sizes}{note}"


def distinct_prompts(rows: list[dict]) -> set[str]:
    """The different prompts of rows, in their canonical form."""
    return {canonical(row["prompt"]) for row in rows}


def hold_out_prompts(rows: list[dict], n: int, name: str) -> tuple[list[dict], list[dict]]:
    """Rows -> rows to train on, and at most n held-out rows. No prompt is on both sides.

    At most a fifth of the prompts is held out. InputError: too few prompts in the data set `name`.
    """
    prompts = list(dict.fromkeys(canonical(row["prompt"]) for row in rows))  # in their order
    aside = set(draw(prompts, min(n, len(prompts) // 5)))
    enough = 0 < len(aside) < len(prompts)
    require(enough, f"{name}: {len(prompts)} different prompts are too few to hold any out")
    train, held_out = [], []
    for row in rows:
        if canonical(row["prompt"]) in aside:
            held_out.append(row)
        else:
            train.append(row)
    return train, held_out[:n]


def note_overlap(held_out: list[dict], rows: list[dict], where: str) -> str:
    """How many held-out prompts are trained on too, for the sentence on the data; '' for none.

    where: 'held out', or 'in NAME' for a split of that name.
    """
    prompts = distinct_prompts(held_out)
    shared = prompts & distinct_prompts(rows)
    if not shared:
        return ""
    what = "held-out prompts" if where == "held out" else f"prompts {where}"
    return f", {len(shared)} of {len(prompts)} {what} are trained on too"


def read_named(spec, kind, config):
    """The [FORMAT:]FILE of an --eval_splits NAME=[FORMAT:]FILE -> its rows. Without a format it is read as --dataset is."""
    prompt_format, _, path = spec.partition(":")
    if path and prompt_format in FORMATS:
        return read_parts(path, kind, (), prompt_format)[0]
    return read_parts(spec, kind, config.columns, config.prompt_format)[0]

"""Where rows of data come from: files, and data sets of the datasets library.

    FILE.jsonl, .json, .csv, also as .gz        read here; other files as JSON too
    FILE.parquet                                read by the library
    FOLDER                                      a data set as downloaded, or saved by the library
    NAME, NAME:SPLIT, NAME:CONFIG:SPLIT         a data set on the hub; FOLDER may stand for NAME

A row comes with its place, for errors: 'file:line', 'file[index]' or 'name[index]'. Nothing is
written but the library's own cache.
"""

import contextlib
import logging
import os
import re

from ..errors import InputError, require
from .files import read_file

# What read_file() reads, also as .gz.
FILES_OF_ROWS = (".jsonl", ".json", ".csv")


def read_any(spec: str) -> list[tuple[str, dict]]:
    """What --dataset names, other than the embedded world -> [(place, row)], one row at least."""
    require(spec, "a data set without a name")
    # A name that ends like a file of rows is one, even if it is missing: read_file() says so. Any
    # other file but Parquet is read as JSON.
    is_other_file = os.path.isfile(spec) and not spec.endswith(".parquet")
    if is_file_of_rows(spec) or is_other_file:
        return read_file(spec)
    rows = read_data_set(spec)
    require(rows, f"{spec}: no rows")
    return rows


def is_file_of_rows(name: str) -> bool:
    """Whether a name is that of a file which read_file() reads."""
    return name.removesuffix(".gz").endswith(FILES_OF_ROWS)


def is_saved_folder(folder: str) -> bool:
    """Whether save_to_disk() of the datasets library wrote a folder: one split, or several."""
    one = os.path.join(folder, "state.json")
    several = os.path.join(folder, "dataset_dict.json")
    return os.path.isfile(one) or os.path.isfile(several)


def read_data_set(spec: str) -> list[tuple[str, dict]]:
    """NAME, NAME:SPLIT or NAME:CONFIG:SPLIT of a data set -> [(place, row)].

    NAME: a name on the hub, a folder with the files of a data set as downloaded, a folder written
    by save_to_disk, or a .parquet file. The split is 'train' unless one is named.
    """
    # The import takes a second, and JSONL does not need it.
    import datasets

    # The library logs what it raises too, and an error is to be one line.
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    name, config, split = split_name(spec)
    is_saved = is_saved_folder(name)

    if os.path.isdir(name) and not is_saved:
        # The library calls a data set by its folder, and "." and ".." are no names.
        name = os.path.abspath(name)
        files = find_files(spec, name, config, split)
        # The library makes null of "None" in CSV, and its errors name no line.
        if files and all(map(is_file_of_rows, files)):
            return read_files(files)

    with loading(spec):
        if name.endswith(".parquet"):
            data = datasets.Dataset.from_parquet(name, keep_in_memory=True)
        elif is_saved:
            data = choose_saved_split(spec, split, datasets.load_from_disk(name))
        else:
            data = datasets.load_dataset(name, config, split=split)
        rows = list(data)
    return [(f"{spec}[{i}]", row) for i, row in enumerate(rows)]


def choose_saved_split(spec: str, split: str, data):
    """What save_to_disk() wrote -> the rows of a split. InputError: they are not there.

    The library looks for splits and their parts in the files of a data set alone.
    """
    if isinstance(data, dict):
        known = ", ".join(data)
        require(split in data, f"{spec}: no split {split!r} was saved; there are {known}")
        return data[split]
    # A single split may know what it is called.
    name = str(data.split or "train")
    require(split in (name, "train"), f"{spec}: one split was saved here, {name}, and no {split!r}")
    return data


@contextlib.contextmanager
def loading(spec: str):
    """A context for calls of the datasets library, whose many errors become one InputError.

    All of them mean that this data set is not to be had. The cause of an error says more.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        what = " ".join(str(e.__cause__ or e).split())[:150]
        if what.startswith("Config name is missing"):
            what += "; name one as NAME:CONFIG:SPLIT"
        raise InputError(
            f"{spec}: neither a file nor a data set that can be loaded ({what})"
        ) from None


def split_name(spec: str) -> tuple[str, str | None, str]:
    """NAME, NAME:SPLIT or NAME:CONFIG:SPLIT -> name, configuration or None, split.

    A split may be a part of one, as the datasets library writes it: train[:100].
    """
    if os.path.exists(spec):
        return spec, None, "train"
    # NAME:CONFIG:train[:100] -> NAME, CONFIG, train[:100]. A colon in brackets is no separator.
    head, bracket, part = spec.partition("[")
    names = head.split(":")
    require(len(names) <= 3, f"{spec}: a data set is NAME, NAME:SPLIT or NAME:CONFIG:SPLIT")
    split = names[-1] if len(names) > 1 else ""
    config = names[1] if len(names) == 3 else None
    return names[0], config, (split or "train") + bracket + part


def find_files(spec: str, folder: str, config: str | None, split: str) -> list[str]:
    """The files of one split of a folder as downloaded; none where `split` is a part of one.

    The library finds them, by their names or by what README.md says. InputError: they are not all
    there, or not in the folder. spec: for errors.
    """
    import datasets

    with loading(spec):
        builder = datasets.load_dataset_builder(folder, config)
        # {a split: its files}
        files_of = builder.config.data_files
    for files in files_of.values():
        check_inside(files, folder)
    # Of train[:100]+test, say, the files of both are read.
    for part in split.split("+"):
        files = list(files_of.get(part.partition("[")[0], []))
        for file in files:
            if ".parquet" in file:
                check_parquet(file)
        check_parts(files)
    return list(files_of.get(split, []))


def check_inside(paths: list[str], folder: str):
    """InputError where a file does not lie in the folder: README.md may name any place.

    Links in it are taken for what they are called: a download may hold links into a cache.
    """
    # The library resolves the folder's own name where that is a link.
    starts = (os.path.join(os.path.abspath(folder), ""), os.path.join(os.path.realpath(folder), ""))
    for path in paths:
        is_inside = os.path.abspath(path).startswith(starts)
        require(is_inside, f"{folder}: its README.md names data outside the folder: {path}")


def check_parquet(path: str):
    """InputError unless a file begins and ends as Parquet does."""
    # Its last four bytes are written last, so a download that broke off lacks them.
    with open(path, "rb") as f:
        content = f.read(4)
        f.seek(max(4, os.path.getsize(path) - 4))
        content += f.read()
    is_whole = content == b"PAR1PAR1"
    require(is_whole, f"{path}: not a whole Parquet file; was it downloaded in part?")


def check_parts(paths: list[str]):
    """InputError where files are numbered 00000-of-00003, and one of the three is not there."""
    for path in paths:
        numbers = re.search(r"-\d{5}(-of-(\d{5}))", path)
        if numbers:
            # Files of the same name, but for the first number.
            start = path[: numbers.start()]
            same_name = [p for p in paths if p.startswith(start) and numbers[1] in p]
            n_there = len(same_name)
            n_parts = int(numbers[2])
            is_whole = n_there >= n_parts
            require(is_whole, f"{path}: only {n_there} of {n_parts} such files are there")


def read_files(paths: list[str]) -> list[tuple[str, dict]]:
    """The rows of several files, one after the other."""
    rows = []
    for path in paths:
        rows += read_file(path)
    return rows

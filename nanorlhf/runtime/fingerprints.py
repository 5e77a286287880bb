"""What the names in a run's settings stand for: the contents of the files behind them.

A run that goes on after a kill reads its model, its data and its rewards again. If one of them has
other content by then, the rest of the run would be another run, and nobody would notice: a reward
file of which one sign was changed gives +15 before the kill and -15 after it. So config.json also
holds, for each file and folder that the settings name, one fingerprint:

    "inputs": {"my.py": {"digest": "5b0c...", "size": 812, "mtime": 1790000000123456789}, ...}

    digest    SHA-256 of the file, or of the names and digests of a folder's files; of a model on
              the hub its commit
    size      bytes, in a folder of all files together
    mtime     time of the last change in nanoseconds, in a folder the latest one

A file whose size and mtime are as they were is not read again. Nothing is written beside an input.
"""

import os
import re

from transformers.utils import cached_file

from ..errors import InputError, require
from ..hf.adapters import is_adapter, read_config
from .files import digest, digest_file

# The settings whose values can name files or folders: of models and rewards, of data, of features.
MODELS = ("model", "base", "value_model", "reward_model", "average", "gold_model")
DATA = ("dataset", "eval_dataset", "eval_splits", "in_distribution")
FEATURES = ("human_latents", "feature_sae", "sarm")
MOST_FILES = 10_000  # in a folder; one with more is no model and no data set, but / or a home, say


# ------------------------------------------------------------------------------ from names to files


def input_paths(config: dict) -> list[str]:
    """The files and folders that the settings of a run name, as they are written there.

    Names without a file of their own are left out: the embedded world, hub names, and what has
    not been made yet, such as the default model of a first run.
    """
    paths = []
    for name in (*MODELS, *DATA, *FEATURES):
        for text in texts_of(config, name):
            path = path_in(name, text)
            if path:
                paths.append(path)
    # An adapter's base is an input too: the same adapter on another base is another model.
    for path in list(paths):
        paths += base_models(path)
    return list(dict.fromkeys(paths))


def texts_of(config: dict, name: str) -> list[str]:
    """The value of one setting as a list: of one text, or of several; empty where it is not set."""
    value = config.get(name) or []
    if isinstance(value, list):
        return value
    return [value]


def path_in(name: str, text: str) -> str:
    """The file or folder in one setting's text, or '' where there is none.

    A run folder stands for the model/ inside it; what else it holds does not matter.
    """
    if name == "eval_splits":  # NAME=FILE or NAME=FORMAT:FILE
        text = text.partition("=")[2]
        candidates = [*without_split(text), *without_split(text.partition(":")[2])]
    elif name == "in_distribution":  # FILE.py:FUNCTION, or a condition on columns
        candidates = [code_file(text)]
    else:  # PATH, FILE.py:FUNCTION, or FOLDER:SPLIT or FOLDER:CONFIG:SPLIT of a data set
        candidates = without_split(text)
    # The longest name that is there is taken, since a file's name may hold a colon.
    for path in candidates:
        # The embedded world is no folder, even where results are written into one of that name.
        if path == "world":
            continue
        inner = os.path.join(path, "model")
        if path and os.path.isdir(inner):
            return inner
        if path and os.path.exists(path):
            return path
    return ""


def without_split(text: str) -> list[str]:
    """FOLDER:CONFIG:SPLIT -> itself, FOLDER:CONFIG and FOLDER: what may be the name of a file."""
    names = [text]
    # The split may be a part of one: train[:100].
    rest = text.partition("[")[0]
    while ":" in rest:
        rest = rest.rpartition(":")[0]
        names.append(rest)
    return names


def code_file(text: str) -> str:
    """The FILE.py of a setting FILE.py:FUNCTION, or '' of any other text."""
    match = re.fullmatch(r"(.+\.py):\w+", text)
    return match[1] if match else ""


def base_models(path: str) -> list[str]:
    """The folders of the models that an adapter was made for: its base, the base's base, ..."""
    bases = []
    while is_adapter(path):
        path = read_config(path)["base_model_name_or_path"]
        if not os.path.isdir(path):
            break
        bases.append(path)
    return bases


def hub_names(config: dict) -> list[str]:
    """The models that the settings name and that are no files here: names on the hub, mostly."""
    names = []
    for setting in MODELS:
        for text in texts_of(config, setting):
            # A hub name is NAME or OWNER/NAME. Deeper names are paths; FILE.py:FUNCTION is code.
            may_be_on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text)
            if may_be_on_hub and not os.path.exists(text):
                names.append(text)
    return list(dict.fromkeys(names))


# ----------------------------------------------------------------------- from files to fingerprints


def files_in(path: str) -> list[str]:
    """The files in a folder and in the folders inside it, but for hidden ones; of a file itself.

    InputError: the folder holds more than MOST_FILES.
    """
    if os.path.isfile(path):
        return [path]
    files = []
    for folder, subfolders, names in os.walk(path):
        # os.walk() goes into the folders that are left in this list, so the list itself is changed.
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                files.append(os.path.join(folder, name))
        require(
            len(files) <= MOST_FILES,
            f"{path}: more than {MOST_FILES:,} files are in this folder, so it is no model or "
            "data set",
        )
    return sorted(file for file in files if os.path.isfile(file))


def digest_path(path: str) -> str:
    """A digest of a file's bytes, or of the names and bytes of all files in a folder."""
    if os.path.isfile(path):
        return digest(digest_file(path))
    contents = []
    for file in files_in(path):
        contents.append((os.path.relpath(file, path), digest_file(file)))
    return digest(contents)


def fingerprint_path(path: str, known: dict | None = None) -> dict:
    """{digest, size, mtime} of a file or folder.

    known: an earlier fingerprint. Where size and mtime are still its own, so is the digest.
    InputError: a file cannot be read.
    """
    try:
        # Sizes and times cost nothing to look up, while a model may have many GB to read.
        stats = [os.stat(file) for file in files_in(path)]
        size = sum(stat.st_size for stat in stats)
        mtime = max((stat.st_mtime_ns for stat in stats), default=0)
        if known and known["size"] == size and known["mtime"] == mtime:
            return known
        return {"digest": digest_path(path), "size": size, "mtime": mtime}
    except OSError as e:
        raise InputError(f"{e.filename or path}: cannot be read ({e.strerror})") from None


def fingerprint_hub(name: str) -> dict | None:
    """The commit of a hub model that is on this machine, or None where none is. Asks no network.

    Loading a model asks the hub for the newest commit, so this is right once it has been loaded.
    """
    try:
        file = cached_file(name, "config.json", local_files_only=True)
    except OSError:  # not on this machine
        return None
    # The place in the hub's cache is .../models--OWNER--NAME/snapshots/COMMIT/config.json.
    commit = re.search(r"/snapshots/([0-9a-f]+)/", file)
    if commit is None:
        return None
    return {"digest": commit[1], "size": 0, "mtime": 0}


def fingerprint_inputs(config: dict, known: dict) -> dict[str, dict]:
    """{name: fingerprint} of all that the settings name; known: those of an earlier look."""
    prints = {}
    for path in input_paths(config):
        prints[path] = fingerprint_path(path, known.get(path))
    for name in hub_names(config):
        commit = fingerprint_hub(name)
        if commit:
            prints[name] = commit
    return prints


def changed_inputs(before: dict, now: dict) -> list[str]:
    """The names that stand for something else by now. What is gone is left to whoever opens it."""
    changed = []
    for name in before:
        if name in now and before[name]["digest"] != now[name]["digest"]:
            changed.append(name)
    return changed

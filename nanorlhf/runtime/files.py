"""Files: JSON and JSONL, whole or not there at all; folders that change places; digests of files.

What is written here is on the disk before it gets its name (fsync), and its name is on the disk
before the writer goes on: after a kill, or a power cut, a reader finds the old content or the new.
"""

import contextlib
import errno
import functools
import gzip
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

from ..errors import InputError, require, user_code


def read_json(path):
    """The value in a JSON file; a file that is not JSON is an InputError."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not JSON ({e})") from None


def write_json(path, value):
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never half of one."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
    replace_file(path)


def read_checked_lines(path: str, fits: Callable[[int, Any], bool], remedy: str) -> list:
    """The values of a JSONL file that a program adds to line by line; none if there is no file yet.

    fits(i, value): whether the value of line i, the first being 0, can be what was written there.
    A last line without its newline was cut off by a kill and is left out. InputError: a line that
    is no JSON or does not fit, with its number and the `remedy`.
    """
    if not os.path.exists(path):
        return []
    with open(path, "rb") as f:
        lines = f.read().split(b"\n")[:-1]
    values = []
    for i, line in enumerate(lines):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # also of bytes that are no text
            raise InputError(f"{path}:{i + 1}: not JSON; {remedy}") from None
        if not fits(i, value):
            raise InputError(f"{path}:{i + 1}: not the line that belongs here; {remedy}")
        values.append(value)
    return values


def drop_cut_line(path: str) -> None:
    """Remove the last line of a file, if there is one, that a kill left without its newline."""
    if os.path.exists(path):
        with open(path, "rb+") as f:
            f.truncate(f.read().rfind(b"\n") + 1)


def read_rows(path: str) -> list[dict]:
    """The rows of a run's log; a line that is no JSON object is an InputError."""
    remedy = "restore it from a copy, or start the run again in another folder"
    return read_checked_lines(path, lambda i, row: isinstance(row, dict), remedy)


def write_lines(path, rows):
    """Write JSON rows to a .jsonl file: under a temporary name, then renamed."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    replace_file(path)


def append_lines(path: str, rows):
    """Add JSON rows to a .jsonl file."""
    with open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def replace_file(path: str):
    """Put the finished file `path`.tmp in the place of `path`."""
    sync(path + ".tmp")
    os.replace(path + ".tmp", path)
    sync(os.path.dirname(path) or ".")


def check_name(path: str):
    """InputError for a name that an output cannot have.

    It is empty, it is not UTF-8, or a link on the way leads nowhere. Pitfall: Python opens files
    whose names are not UTF-8, while print() and safetensors take no such names.
    """
    require(path, "the output has an empty name")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise InputError(f"the output's name {ascii(path)} is not UTF-8") from None
    last_there = os.path.abspath(path)
    while not os.path.lexists(last_there):
        last_there = os.path.dirname(last_there)
    require(os.path.exists(last_there), f"{path}: the link {last_there} leads nowhere")


def check_can_write(path: str):
    """InputError where no file can be made at `path`: it is tried, and nothing stays behind.

    A command calls this before it does any work, so that its results have a place to go to.
    """
    check_name(path)
    trial = f"{os.path.abspath(path)}.{os.getpid()}.tmp"
    descriptor, made = make_file(trial, path)
    os.close(descriptor)
    os.remove(trial)
    remove_empty(made)


def make_file(path: str, what: str) -> tuple[int, list[str]]:
    """Open a file, which is made if it is missing. -> its descriptor, and the folders made for it

    InputError: it cannot be opened; `what` is said to be at fault.
    """
    folder = os.path.dirname(path)
    for tries_left in (2, 1, 0):
        made = missing_folders(folder)
        try:
            os.makedirs(folder, exist_ok=True)
            # Python opens files with O_CLOEXEC: programs that are started later do not inherit it.
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666), made
        except OSError as e:
            remove_empty(made)
            # Once more: another process may just have removed the folders that it had made.
            if not tries_left:
                message = f"{what} cannot be made or written into ({e.strerror})"
                raise InputError(message) from None


def missing_folders(folder: str) -> list[str]:
    """The folders that must be made for this one to be there, the innermost first."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def remove_empty(folders: list[str]) -> None:
    """Remove folders, the innermost first, up to the first one that something is in."""
    with contextlib.suppress(OSError):
        for folder in folders:
            if os.path.lexists(folder):
                os.rmdir(folder)


def check_output(path: str, is_ours, what: str):
    """InputError where something stands at `path` that the command did not make itself.

    It would be written over. is_ours(path) -> bool looks at what is there; `what` says in words
    what the command writes. A command calls this before it does any work.
    """
    check_name(path)
    if os.path.lexists(path) and not is_ours(path):
        raise InputError(
            f"{path} is there already and is not {what}, so it is not written over; "
            "choose another name"
        )


def replace_folder(path, write, dist=None):
    """Call write(temporary folder), then put that folder in the place of `path`.

    The old folder is moved aside, and removed only when the new one is in its place: whenever a
    kill comes, one of the two is there. With `dist` all processes write, and the main one moves.
    """
    parent, name = os.path.split(path)
    temporary = os.path.join(parent, f".tmp_{name}")
    aside = os.path.join(parent, f".old_{name}")
    main = dist is None or dist.main
    wait = dist.barrier if dist else lambda: None

    # What an earlier call left that was killed.
    if main:
        recover_folder(path)
        remove(temporary)
        os.makedirs(temporary)
    wait()
    write(temporary)
    wait()
    if main:
        # A name must never stand for a file that is not on the disk yet.
        for folder, _, files in os.walk(temporary):
            for file in files:
                sync(os.path.join(folder, file))
            sync(folder)
        if os.path.lexists(path):
            os.rename(path, aside)
        os.rename(temporary, path)
        sync(parent or ".")
        remove(aside)


def recover_folder(path: str):
    """After a kill in replace_folder(path): an old folder without a new one gets its place back."""
    parent, name = os.path.split(path)
    aside = os.path.join(parent, f".old_{name}")
    if os.path.lexists(aside) and not os.path.lexists(path):
        os.rename(aside, path)
    remove(aside)


def remove(path: str):
    """Remove a folder and all that is in it, or a file, or nothing."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


def sync(path: str):
    """Wait until a file's bytes, or a folder's list of names, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as e:
        # Some network file systems know no fsync of a folder.
        if e.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(number)


# ------------------------------------------------------------------------------------------------------------------------- digests


def digest(*values):
    """A short SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:20]


def digest_file(path):
    """The SHA-256 of a file's bytes."""
    total = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**22):
            total.update(block)
    return total.hexdigest()


def digest_start(path: str, size: int) -> str:
    """The SHA-256 of a file's first `size` bytes: what it held before it grew."""
    with open(path, "rb") as f:
        return hashlib.sha256(f.read(size)).hexdigest()


# ------------------------------------------------------------------------------------------------------------- files that users bring


def read_file(path):
    """.jsonl or .json (a list), either also as .gz -> [(place, row)], place being 'file:line' or 'file[index]'."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
            text = f.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read ({e})") from None
    require(text.strip(), f"{path}: the file is empty")
    if path.removesuffix(".gz").endswith(".json"):
        whole = parse_json(text, path)
        require(isinstance(whole, list), f"{path}: a .json file must hold one list of rows (one row a line is .jsonl)")
        return [(f"{path}[{i}]", row) for i, row in enumerate(whole)]
    lines = enumerate(text.split("\n"), 1)  # not splitlines(): strings may hold Unicode line separators
    return [(f"{path}:{number}", parse_json(line, path, number)) for number, line in lines if line.strip()]


def parse_json(text, path, line=None):
    """json.loads, with the file and the line in its error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{line or e.lineno}: not JSON ({e.msg})") from None


def python_function(spec):
    """path.py:function -> the function; a file is imported once, and again when it has changed."""
    path, _, name = spec.rpartition(":")
    require(os.path.isfile(path), f"{path}: no such file")
    module = import_file(os.path.abspath(path), os.path.getmtime(path))
    # A module may have a __getattr__ of its own.
    with user_code(f"{path}: looking for {name!r} raised"):
        function = getattr(module, name, None)
    require(callable(function), f"{path}: it defines no function {name!r}")
    is_async = inspect.iscoroutinefunction(function)
    require(not is_async, f"{path}: {name} is an async function, which returns no value when called")
    return function


@functools.cache
def import_file(path, changed):
    """The module that a .py file holds; `changed` is part of the cache's key."""
    module_spec = importlib.util.spec_from_file_location("reward_function", path)
    module = importlib.util.module_from_spec(module_spec)
    with user_code(f"{path}: cannot be imported:"):
        module_spec.loader.exec_module(module)
    return module

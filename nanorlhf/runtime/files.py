"""Files: JSON and JSONL, whole or not there at all; folders that change places; digests of files.

What is read here may have been written by anybody, or damaged since: parse_json() and read_bytes()
are the only readers of JSON and of bytes, and whatever is wrong is one line that names the file.

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
import math
import os
import re
import shutil
import types
import typing
import zlib
from collections.abc import Callable
from typing import Any

from ..errors import InputError, first_line, require, user_code


def read_number(digits: str) -> float:
    """A number of a JSON text, or its NaN or Infinity. ValueError: it is not finite."""
    if not math.isfinite(float(digits)):
        raise ValueError(f"{digits} is no finite number")
    return float(digits)


STRICT = json.JSONDecoder(parse_constant=read_number, parse_float=read_number)
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # how JSON writes one half of a UTF-16 pair


# -------------------------------------------------------------------------------------------- reading


def read_bytes(path: str) -> bytes:
    """A file's bytes, unpacked where its name ends in .gz. InputError: it cannot be read."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
            return f.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, ValueError, zlib.error) as e:
        raise InputError(f"{path}: cannot be read ({first_line(e)})") from None


def decode_text(content: bytes, place: str) -> str:
    """UTF-8 -> its text, without a byte-order mark. InputError, with the place: it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{place}: not UTF-8 ({e.reason} at byte {e.start})") from None


def parse_json(text: str | bytes, path: str, line: int | None = None, finite: bool = True):
    """The value of a JSON text. InputError, with the path and the line: it is none.

    Python's reader lets through NaN and Infinity, which are no JSON; `finite` False lets them
    through too. It also lets through halves of characters, which no tokenizer takes, and has errors
    of its own for lists that are nested too deep and for numbers of more than 4,300 digits.
    """
    place = path if line is None else f"{path}:{line}"
    if isinstance(text, bytes):
        text = decode_text(text, place)
    try:
        value = STRICT.decode(text) if finite else json.loads(text)
        if HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{line or e.lineno}: not JSON ({e.msg})") from None
    except RecursionError:
        raise InputError(f"{place}: not JSON that can be read (nested too deep)") from None
    except UnicodeEncodeError:
        raise InputError(
            f"{place}: a text holds half of a character (\\ud800 to \\udfff)"
        ) from None
    except ValueError as e:
        raise InputError(f"{place}: not JSON ({first_line(e)})") from None


def read_json(path: str, finite: bool = True):
    """The value in a JSON file. InputError: there is no such file, or it is not JSON."""
    return parse_json(read_bytes(path), path, finite=finite)


def read_object(path: str, fields: dict | None = None, finite: bool = True) -> dict:
    """The object in a JSON file, which has these fields: see check_fields."""
    return check_fields(read_json(path, finite), fields or {}, path)


def check_fields(value, fields: dict, place: str) -> dict:
    """InputError where a JSON value is no object with these fields {name: type}. -> the value

    The types are those of is_of_type; a field that may be None may be missing.
    """
    require(isinstance(value, dict), f"{place}: not a JSON object")
    for name, hint in fields.items():
        fits = is_of_type(value.get(name), hint)
        require(fits or name in value, f"{place}: {name} is missing")
        require(fits, f"{place}: {name} cannot be {shorten(value.get(name))}")
    return value


def is_of_type(value, hint) -> bool:
    """Whether a JSON value fits an annotation: str, int, float, bool, dict, list[...] or X | None."""
    parts = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(is_of_type(value, part) for part in parts)
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(is_of_type(item, parts[0]) for item in value)
    if hint is float:
        return type(value) is float or type(value) is int and abs(value) < 1e300
    if hint is type(None):
        return value is None
    return type(value) is hint


def shorten(value) -> str:
    """How an error quotes a value that may be long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def write_json(path, value):
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never half of one."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
    replace_file(path)


def read_checked_lines(
    path: str, fits: Callable[[int, Any], bool], remedy: str, finite: bool = True
) -> list:
    """The values of a JSONL file that a program adds to line by line; none if there is no file yet.

    fits(i, value): whether the value of line i, the first being 0, can be what was written there.
    A last line without its newline was cut off by a kill and is left out. InputError: a line that
    is no JSON or does not fit, with its number and the `remedy`.
    """
    if not os.path.exists(path):
        return []
    lines = read_bytes(path).split(b"\n")[:-1]
    values = []
    for i, line in enumerate(lines):
        try:
            value = parse_json(line, path, i + 1, finite)
        except InputError as e:
            raise InputError(f"{e}; {remedy}") from None
        if not fits(i, value):
            raise InputError(f"{path}:{i + 1}: not the line that belongs here; {remedy}")
        values.append(value)
    return values


def drop_cut_line(path: str) -> None:
    """Remove the last line of a file, if there is one, that a kill left without its newline."""
    if os.path.exists(path):
        with open(path, "rb+") as f:
            f.truncate(f.read().rfind(b"\n") + 1)


def read_rows(path: str, fields: dict | None = None) -> list[dict]:
    """The rows of a run's log, objects with these fields (check_fields); else an InputError.

    A metric may be NaN: a correlation of numbers that do not vary, for one.
    """
    remedy = "restore it from a copy, or start the run again in another folder"
    rows = read_checked_lines(path, lambda i, row: isinstance(row, dict), remedy, finite=False)
    for i, row in enumerate(rows, 1):
        check_fields(row, fields or {}, f"{path}:{i}")
    return rows


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


def read_file(path: str) -> list[tuple[str, Any]]:
    """.jsonl or .json (a list), either also as .gz -> [(place, row)], one row at least.

    place: 'file:line' or 'file[index]'.
    """
    content = read_bytes(path)
    require(content.strip(), f"{path}: the file is empty")
    if path.removesuffix(".gz").endswith(".json"):
        whole = parse_json(content, path)
        require(
            isinstance(whole, list),
            f"{path}: a .json file must hold one list of rows (one row a line is .jsonl)",
        )
        require(whole, f"{path}: no rows")
        return [(f"{path}[{i}]", row) for i, row in enumerate(whole)]
    rows = []
    # Not splitlines(): strings may hold Unicode line separators.
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            rows.append((f"{path}:{number}", parse_json(line, path, number)))
    return rows


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
    require(
        not is_async, f"{path}: {name} is an async function, which returns no value when called"
    )
    return function


@functools.cache
def import_file(path, changed):
    """The module that a .py file holds; `changed` is part of the cache's key."""
    module_spec = importlib.util.spec_from_file_location("reward_function", path)
    module = importlib.util.module_from_spec(module_spec)
    with user_code(f"{path}: cannot be imported:"):
        module_spec.loader.exec_module(module)
    return module

"""Files: JSON and JSONL, whole or not there at all; folders that change places; digests of files.

What is read here may have been written by anybody, or damaged since. parse_json() and read_bytes()
are the only readers of JSON and of bytes, and whatever is wrong is an InputError: one line that
names the file.

What is written here is on the disk before it gets its name (fsync), and its name is on the disk
before the writer goes on. After a kill or a power cut, a reader finds the old content or the new.
"""

import codecs
import contextlib
import csv
import errno
import functools
import gzip
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import re
import shutil
import sys
import types
import typing
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import InputError, first_line, require, user_code

# How JSON writes one half of a UTF-16 pair, and the halves in a text that has been read.
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
HALVES = re.compile("[\ud800-\udfff]")
# What stands in a text for a character that could not be read.
UNREADABLE = "\ufffd"


# ---------------------------------------------------------------------------------- reading JSON


def read_bytes(path: str) -> bytes:
    """A file's bytes, unpacked where its name ends in .gz. InputError: it cannot be read."""
    open_file = gzip.open if str(path).endswith(".gz") else open
    try:
        with open_file(path, "rb") as f:
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


def read_number(digits: str) -> float:
    """A number of a JSON text, or its NaN or Infinity. ValueError: it is not finite."""
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is no finite number")
    return number


def read_members(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of a JSON object. ValueError: two have one name, and nobody says which counts."""
    row = {}
    for name, value in members:
        if name in row:
            raise ValueError(f"an object names {shorten(name)} twice")
        row[name] = value
    return row


STRICT = json.JSONDecoder(parse_constant=read_number, parse_float=read_number)
STRICT_ROWS = json.JSONDecoder(
    parse_constant=read_number, parse_float=read_number, object_pairs_hook=read_members
)


def parse_json(
    text: str | bytes,
    path: str,
    line: int | None = None,
    finite: bool = True,
    is_row: bool = False,
):
    """The value of a JSON text. InputError, with the path and the line: the text is not JSON.

    It is stricter than Python's own reader, which lets through NaN and Infinity, though JSON has no
    such numbers (`finite` False lets them through here too), and halves of characters, which no
    tokenizer takes. is_row: the text is of data from the web. Such a half becomes U+FFFD instead,
    and an object that has two members of one name is refused.
    """
    place = path if line is None else f"{path}:{line}"
    if isinstance(text, bytes):
        text = decode_text(text, place)
    try:
        if is_row:
            value = STRICT_ROWS.decode(text)
        elif finite:
            value = STRICT.decode(text)
        else:
            value = json.loads(text)
        # Two halves may stand side by side and be a character. A half alone cannot be encoded.
        if HALF_CHARACTER.search(text):
            whole = json.dumps(value, ensure_ascii=False)
            if is_row:
                return json.loads(HALVES.sub(UNREADABLE, whole))
            whole.encode()
        return value
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{line or e.lineno}: not JSON ({e.msg})") from None
    except RecursionError:
        raise InputError(f"{place}: not JSON that can be read (nested too deep)") from None
    except UnicodeEncodeError:
        raise InputError(
            f"{place}: a text holds half of a character (\\ud800 to \\udfff)"
        ) from None
    # Numbers that are not finite, or that have more digits than Python reads (4,300).
    except ValueError as e:
        raise InputError(f"{place}: not JSON ({first_line(e)})") from None


def read_json(path: str, finite: bool = True):
    """The value in a JSON file. InputError: there is no such file, or it is not JSON."""
    return parse_json(read_bytes(path), path, finite=finite)


def read_object(path: str, fields: dict | None = None, finite: bool = True) -> dict:
    """The object in a JSON file, which has these fields: see check_fields."""
    value = read_json(path, finite)
    return check_fields(value, fields or {}, path)


def check_fields(value, fields: dict, place: str) -> dict:
    """InputError where a JSON value is no object with these fields {name: type}. -> the value

    The types are those of is_of_type. A field that may be None may also be missing.
    """
    require(isinstance(value, dict), f"{place}: not a JSON object")
    for name, hint in fields.items():
        field = value.get(name)
        if not is_of_type(field, hint):
            require(name in value, f"{place}: {name} is missing")
            raise InputError(f"{place}: {name} cannot be {shorten(field)}")
    return value


def is_of_type(value, hint) -> bool:
    """Whether a JSON value fits a type: str, int, float, bool, dict, list[...] or X | None."""
    parts = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(is_of_type(value, part) for part in parts)
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(is_of_type(item, parts[0]) for item in value)
    if hint is float and type(value) is int:
        # A whole number is a float too, unless it is too large for one.
        return abs(value) < 1e300
    if hint is type(None):
        return value is None
    # The type itself: to isinstance(), True and False would be ints.
    return type(value) is hint


def is_number(value) -> bool:
    """Whether a JSON value is a finite number."""
    return is_of_type(value, float) and math.isfinite(value)


def shorten(value) -> str:
    """How an error quotes a value that may be long."""
    text = repr(value)
    if len(text) <= 60:
        return text
    return f"{text[:60]}..."


# ----------------------------------------------------------------------------------- files of rows


def read_file(path: str) -> list[tuple[str, Any]]:
    """A file of data, packed or not (.gz) -> [(place, row)], one row at least.

    A .csv file begins with a line of names. Any other file is JSON, whatever its name: one list of
    rows, or a row on each line. place: 'file:line' or 'file[index]'.
    """
    content = read_bytes(path).removeprefix(codecs.BOM_UTF8)
    start = content.lstrip()[:1]
    require(start, f"{path}: the file is empty")
    if path.removesuffix(".gz").endswith(".csv"):
        rows = read_csv(path, decode_text(content, path))
    elif start == b"[":
        whole = parse_json(content, path, is_row=True)
        rows = [(f"{path}[{i}]", row) for i, row in enumerate(whole)]
    else:
        rows = read_json_lines(path, content)
    require(rows, f"{path}: no rows")
    return rows


def read_json_lines(path: str, content: bytes) -> list[tuple[str, Any]]:
    """JSON with a row on each line -> [(place, row)]; empty lines are skipped."""
    rows = []
    # Not splitlines(): strings may hold Unicode line separators.
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, path, number, is_row=True)
        except InputError as e:
            # The first line may be the beginning of an object that goes on below it.
            hint = "" if rows else "; rows are one list, or one on each line"
            raise InputError(f"{e}{hint}") from None
        rows.append((f"{path}:{number}", row))
    return rows


def read_csv(path: str, text: str) -> list[tuple[str, dict]]:
    """CSV with the columns' names on its first line -> [(place, {name: text})].

    A text in quotes may go over several lines; the place is the first of them.
    """
    # The library's own limit is 131,072 characters to a cell.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names = []
    rows = []
    number = 1
    try:
        # line_num counts the lines read so far, of which a quoted text may take several. The next
        # row begins one line further.
        for cells in reader:
            place = f"{path}:{number}"
            number = reader.line_num + 1
            # An empty line has no cells.
            if not cells:
                continue
            if not names:
                names = cells
                continue
            n_cells = f"{place}: {len(cells)} cells, but the first line names {len(names)} columns"
            require(len(cells) == len(names), n_cells)
            rows.append((place, dict(zip(names, cells))))
    except csv.Error as e:
        raise InputError(f"{path}:{reader.line_num}: not CSV ({e})") from None
    require(len(set(names)) == len(names), f"{path}: two columns have one name")
    return rows


# ---------------------------------------------------------------------------------- writing JSON


def without_nan(value):
    """A value for JSON with None in the place of numbers that JSON does not know."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: str, value):
    """Write a JSON file under a temporary name, then rename it.

    A reader sees the old file or the new one, never half of one.
    """
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
    replace_file(path)


def write_lines(path: str, rows: Iterable):
    """Write JSON rows to a .jsonl file: under a temporary name, then renamed."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")
    replace_file(path)


def append_lines(path: str, rows: Iterable):
    """Add JSON rows to a .jsonl file. InputError: its name is a link that leads nowhere."""
    check_name(path)
    with open(path, "a", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")


def replace_file(path: str):
    """Put the finished file `path`.tmp in the place of `path`."""
    # First the bytes, then the name, then the folder's list of names. In another order a power cut
    # could leave a name without its bytes.
    sync(path + ".tmp")
    os.replace(path + ".tmp", path)
    sync(os.path.dirname(path) or ".")


def sync(path: str):
    """Wait until a file's bytes, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        # Some network file systems know no fsync of a folder.
        if e.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


# --------------------------------------------------------------------- files that grow line by line


def read_checked_lines(
    path: str, fits: Callable[[int, Any], bool], remedy: str, finite: bool = True
) -> list:
    """The values of a JSONL file that a program adds to line by line; none if there is no file yet.

    fits(i, value): whether the value of line i, the first being 0, can be what was written there.
    InputError: a line that is no JSON or does not fit, with its number and the `remedy`.
    """
    if not os.path.exists(path):
        return []
    # The last of these parts is empty, or it is a line without its newline, which a kill cut off.
    lines = read_bytes(path).split(b"\n")
    values = []
    for i, line in enumerate(lines[:-1]):
        try:
            value = parse_json(line, path, i + 1, finite)
        except InputError as e:
            raise InputError(f"{e}; {remedy}") from None
        if not fits(i, value):
            raise InputError(f"{path}:{i + 1}: not the line that belongs here; {remedy}")
        values.append(value)
    return values


def drop_cut_line(path: str) -> None:
    """Remove the last line of a file if a kill left it without its newline."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as f:
        text = f.read()
    end_of_last_whole_line = text.rfind(b"\n") + 1
    # A file of whole lines is left alone: to truncate it would change its date.
    if end_of_last_whole_line < len(text):
        os.truncate(path, end_of_last_whole_line)


def read_rows(path: str, fields: dict | None = None) -> list[dict]:
    """The rows of a run's log, objects with these fields (check_fields). InputError: they are not.

    A metric may be NaN: a correlation of numbers that do not vary, for one.
    """

    def is_object(i, row):
        return isinstance(row, dict)

    remedy = "restore it from a copy, or start the run again in another folder"
    rows = read_checked_lines(path, is_object, remedy, finite=False)
    for number, row in enumerate(rows, 1):
        check_fields(row, fields or {}, f"{path}:{number}")
    return rows


# ------------------------------------------------------------------------------ a place for outputs


def check_name(path: str):
    """InputError for a name that an output cannot have.

    It is empty, it is not UTF-8, or a link on the way leads nowhere; or a shell has left its ~ as
    it is, as in --output_dir=~/runs. Pitfall: Python opens files whose names are not UTF-8, while
    print() and safetensors take no such names.
    """
    require(path, "the output has an empty name")
    has_home = path == "~" or path.startswith("~/")
    require(not has_home, f"{path}: here ~ is a name like any other; write the folder out")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise InputError(f"the output's name {ascii(path)} is not UTF-8") from None
    # The innermost part of the path that is there, if only as a link.
    last_there = os.path.abspath(path)
    while not os.path.lexists(last_there):
        last_there = os.path.dirname(last_there)
    # What is no link may be gone by now: another process tries the same folder.
    leads_nowhere = os.path.islink(last_there) and not os.path.exists(last_there)
    require(not leads_nowhere, f"{path}: the link {last_there} leads nowhere")


def is_inside(path: str, folder: str) -> bool:
    """Whether a path lies in a folder or below it, by its name or by where its links lead."""
    # runs/x/code.py may be a link to elsewhere/code.py, or the other way round.
    for real in (os.path.abspath, os.path.realpath):
        if os.path.commonpath([real(path), real(folder)]) == real(folder):
            return True
    return False


def check_can_write(path: str):
    """InputError where no file can be made at `path`: it is tried, and nothing stays behind.

    A command calls this before it does any work, so that its results have a place to go to.
    """
    check_name(path)
    require(not path.endswith("/"), f"{path}: the name of a folder; a file is written here")
    # The process id is in the name, since another process may be trying the same folder.
    trial = f"{os.path.abspath(path)}.{os.getpid()}.tmp"
    descriptor, made_folders = make_file(trial, path)
    os.close(descriptor)
    os.remove(trial)
    remove_empty(made_folders)


def make_file(path: str, what: str) -> tuple[int, list[str]]:
    """Open a file, which is made if it is missing. -> its descriptor, and the folders made for it

    InputError: it cannot be opened. The message says so of `what`.
    """
    folder = os.path.dirname(path)
    # Three tries: another process may just be removing folders that it has made and that this one
    # counts on.
    for tries_left in (2, 1, 0):
        made_folders = missing_folders(folder)
        try:
            os.makedirs(folder, exist_ok=True)
            # Python's descriptors are O_CLOEXEC: a program that is started later does not hold the
            # file open.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            return descriptor, made_folders
        except OSError as e:
            remove_empty(made_folders)
            if tries_left == 0:
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
    # rmdir() fails on a folder that is not empty. The outer ones are then not empty either.
    with contextlib.suppress(OSError):
        for folder in folders:
            if os.path.lexists(folder):
                os.rmdir(folder)


def check_output(path: str, is_ours: Callable[[str], bool], what: str):
    """InputError where a command would write over something that it did not make itself.

    is_ours(path) looks at what stands at `path`; `what` says in words what the command writes. A
    command calls this before it does any work.
    """
    check_name(path)
    if os.path.lexists(path) and not is_ours(path):
        raise InputError(
            f"{path} is there already and is not {what}, so it is not written over; "
            "choose another name"
        )


# ------------------------------------------------------------------------------------ whole folders


def replace_folder(path: str, write: Callable[[str], None], dist=None):
    """Call write(temporary folder), then put that folder in the place of `path`.

    The old folder is moved aside, and removed only when the new one is in its place: whenever a
    kill comes, one of the two is there. With `dist`, all processes write, and the main one moves.
    """
    temporary = beside(path, ".tmp_")
    is_main = dist is None or dist.main

    # An earlier call may have been killed, and have left its folders behind.
    if is_main:
        recover_folder(path)
        remove(temporary)
        os.makedirs(temporary)
    # Nobody writes before the folder is there, and nobody moves it before all have written.
    if dist:
        dist.barrier()
    write(temporary)
    if dist:
        dist.barrier()
    if is_main:
        put_folder(temporary, path)


def put_folder(temporary: str, path: str):
    """Put a finished folder in the place of `path`."""
    # A name must never stand for a file that is not on the disk yet.
    for folder, _, files in os.walk(temporary):
        for file in files:
            sync(os.path.join(folder, file))
        sync(folder)

    # A folder that is not empty cannot be replaced in one move, as a file can. So there are two.
    aside = beside(path, ".old_")
    if os.path.lexists(path):
        os.rename(path, aside)
    os.rename(temporary, path)
    sync(os.path.dirname(path) or ".")
    remove(aside)


def recover_folder(path: str):
    """After a kill in replace_folder(path): an old folder without a new one gets its place back."""
    # Where both are there, the kill came after the new folder was in its place: the old one goes.
    aside = beside(path, ".old_")
    if os.path.lexists(aside) and not os.path.lexists(path):
        os.rename(aside, path)
    remove(aside)


def beside(path: str, prefix: str) -> str:
    """The name of a folder next to this one: runs/sft, .tmp_ -> runs/.tmp_sft."""
    parent, name = os.path.split(path)
    return os.path.join(parent, prefix + name)


def remove(path: str):
    """Remove a folder and all that is in it, or a file, or nothing."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


# ------------------------------------------------------------------------------------------ digests


def digest(*values) -> str:
    """A short SHA-256 of anything that JSON can hold."""
    text = json.dumps(values)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def digest_file(path: str) -> str:
    """The SHA-256 of a file's bytes."""
    total = hashlib.sha256()
    with open(path, "rb") as f:
        # In blocks of 4 MiB: a file may be larger than the memory.
        block = f.read(2**22)
        while block:
            total.update(block)
            block = f.read(2**22)
    return total.hexdigest()


def digest_start(path: str, size: int) -> str:
    """The SHA-256 of a file's first `size` bytes: what it held before it grew."""
    with open(path, "rb") as f:
        return hashlib.sha256(f.read(size)).hexdigest()


# ------------------------------------------------------------------------------ users' Python files


def python_function(spec: str) -> Callable:
    """path.py:function -> the function. A file is imported once, and again when it has changed."""
    path, _, name = spec.rpartition(":")
    require(os.path.isfile(path), f"{path}: no such file")
    module = import_file(os.path.abspath(path), os.path.getmtime(path))
    function = getattr(module, name, None)
    require(callable(function), f"{path}: it defines no function {name!r}")
    is_async = inspect.iscoroutinefunction(function)
    require(
        not is_async, f"{path}: {name} is an async function, which returns no value when called"
    )
    return function


@functools.cache
def import_file(path: str, changed: float) -> types.ModuleType:
    """The module that a .py file holds. changed: the file's time, a part of the cache's key."""
    # Each file's module has a name of its own. So two files that are both called reward.py can be
    # used side by side.
    name = f"user_file_{digest(path, changed)}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(module_spec)
    # Dataclasses and pickle look a class's module up by its name, while the file is still read.
    sys.modules[name] = module
    try:
        with user_code(f"{path}: cannot be imported:"):
            module_spec.loader.exec_module(module)
    except InputError as e:
        del sys.modules[name]
        hint = ""
        if isinstance(e.__cause__, ModuleNotFoundError):
            hint = f"; modules beside the file are found with PYTHONPATH={os.path.dirname(path)}"
        raise InputError(f"{e}{hint}") from None
    return module

"""Files: JSON and JSONL that are whole or not there at all, folders that change places, and digests of what a file holds."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

from .errors import InputError


def read_json(path):
    """The value in a JSON file; a file that is not JSON is an InputError."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as e:
        raise InputError(f"{path}: not JSON ({e})") from None


def write_json(path, value):
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never half of one."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
    os.replace(path + ".tmp", path)


def read_lines(path):
    """The whole lines of a JSONL file; a last line without its newline was cut off by a kill and is left out."""
    with open(path, encoding="utf-8") as f:
        return f.read().split("\n")[:-1]


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


def write_lines(path, rows):
    """Write JSON rows to a .jsonl file: under a temporary name, then renamed."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(path + ".tmp", path)


def replace_folder(path, write, dist=None):
    """Call write(temporary folder), then put it in the place of `path`. With `dist` all processes write, and the main one moves it."""
    temporary, main = os.path.join(os.path.dirname(path), ".tmp_" + os.path.basename(path)), dist is None or dist.main
    wait = dist.barrier if dist else lambda: None
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
    wait()
    write(temporary)
    wait()
    if main:
        shutil.rmtree(path, ignore_errors=True)
        os.rename(temporary, path)


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

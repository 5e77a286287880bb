"""What is done to a file in a case of fuzz.py. A damage is a function of (path, random numbers)."""

import gzip
import json
import math
import re
import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def replace(path: Path, content):
    """New content for a file. The old file may be linked into the material, so it is not written into."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def make_folder(path: Path):
    path.unlink()
    path.mkdir()


def make_loop(path: Path):
    path.unlink()
    path.symlink_to(path.name)


def make_link(path: Path, target: str):
    path.unlink()
    path.symlink_to(target)


def deep_json(rng=None):
    return "[" * 100_000 + "]" * 100_000


# {what is done to a file: (path, random numbers) -> nothing}; no file survives these.
ANY_FILE = {
    "missing": lambda path, rng: path.unlink(),
    "empty": lambda path, rng: replace(path, b""),
    "zeros": lambda path, rng: replace(path, bytes(path.stat().st_size)),
    "a folder": lambda path, rng: make_folder(path),
    "a link to itself": lambda path, rng: make_loop(path),
    "random bytes": lambda path, rng: replace(path, b"\xff\xfe" + rng.randbytes(300)),
}


TEXT_FILE = {
    **ANY_FILE,
    "not UTF-8": lambda path, rng: replace(path, path.read_bytes()[:40] + b"\xff\xe9\xff"),
}


JSON_FILE = {
    **TEXT_FILE,
    "cut": lambda path, rng: replace(path, path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path, rng: replace(path, "this is text\n"),
    "null": lambda path, rng: replace(path, "null"),
    "a number": lambda path, rng: replace(path, "3"),
    "a string": lambda path, rng: replace(path, '"text"'),
    "a list": lambda path, rng: replace(path, "[]"),
    "nested 100,000 deep": lambda path, rng: replace(path, deep_json()),
    "a number of 5,000 digits": lambda path, rng: replace(path, '{"a": ' + "7" * 5000 + "}"),
}


NAN = float("nan")


JSON_VALUES = {
    "missing": None,
    "null": None,
    "text": "nonsense",
    "a list": [],
    "an object": {},
    "-1": -1,
    "0": 0,
    "2.5": 2.5,
    "1e300": 1e300,
    "2**70": 2**70,
    "nan": NAN,
    "true": True,
}


def set_key(path: Path, rng, name: str, what: str):
    """Change one entry of a JSON object."""
    value = json.loads(path.read_text())
    if what == "missing":
        value.pop(name, None)
    else:
        value[name] = JSON_VALUES[what]
    replace(path, json.dumps(value))


def edit_json(path: Path, change: dict):
    replace(path, json.dumps({**json.loads(path.read_text()), **change}))


def lines_of(path):
    return path.read_bytes().decode().splitlines()


def with_line(path, line, at=3):
    """A file with one more line, the fourth."""
    lines = lines_of(path)
    replace(path, "\n".join([*lines[:at], line, *lines[at:]]) + "\n")


def edited_rows(path, change, only=None):
    """change(row) on every row, or on one."""
    rows = [json.loads(line) for line in lines_of(path)]
    for i, row in enumerate(rows):
        if only is None or i == only:
            change(row)
    replace(path, "".join(json.dumps(row) + "\n" for row in rows))


def bad_rows(path):
    """{name: damage} of a .jsonl file that every reader must refuse."""
    last = {"sft.jsonl": "response", "pairs.jsonl": "rejected", "prompts.jsonl": "prompt"}
    name = last.get(path, "responses" if path == "answers.jsonl" else "response")

    def field_is(value):
        return lambda p, rng: edited_rows(p, lambda row: row.update({name: value}), only=1)

    return {
        "cut": lambda p, rng: replace(p, p.read_bytes()[: p.stat().st_size // 2]),
        "text": lambda p, rng: replace(p, "this is text\n"),
        "blank": lambda p, rng: replace(p, "\n \n\n"),
        "a line that is cut": lambda p, rng: with_line(p, '{"prompt": "a'),
        "a line that is a list": lambda p, rng: with_line(p, "[1, 2]"),
        "a line that is a number": lambda p, rng: with_line(p, "3"),
        "a line that is null": lambda p, rng: with_line(p, "null"),
        "a line nested 100,000 deep": lambda p, rng: with_line(p, deep_json()),
        "a number of 5,000 digits": lambda p, rng: with_line(p, '{"a": ' + "7" * 5000 + "}"),
        "a row without its field": lambda p, rng: edited_rows(p, lambda r: r.pop(name), 2),
        "a field that is null": field_is(None),
        "a field that is a number": field_is(7),
        "a field that is an object": field_is({"text": "a"}),
        "a field that is a list of numbers": field_is([1, 2]),
        "a lone surrogate": field_is("caf\ud800" if name != "responses" else ["\ud800"] * 4),
        "zeros in the middle": lambda p, rng: with_line(p, "\0\0\0"),
        "UTF-16": lambda p, rng: replace(p, p.read_text().encode("utf-16")),
    }


def odd_rows():
    """{name: damage} that changes nothing of what is in the rows."""

    def crlf(p, rng):
        replace(p, p.read_bytes().replace(b"\n", b"\r\n"))

    def turned(row):
        for name in reversed(list(row)):
            row[name] = row.pop(name)

    def escaped(p, rng):
        def escape(found):
            return "\\u%04x" % ord(found[0])

        replace(p, re.sub(r"(?<=[a-z])e(?=[a-z]* )", escape, p.read_text()))

    return {
        "CRLF": crlf,
        "BOM": lambda p, rng: replace(p, b"\xef\xbb\xbf" + p.read_bytes()),
        "blank lines at the end": lambda p, rng: replace(p, p.read_text() + "\n\n  \n"),
        "blank lines in front": lambda p, rng: replace(p, "\n\n" + p.read_text()),
        "no newline at the end": lambda p, rng: replace(p, p.read_text().rstrip("\n")),
        "more columns": lambda p, rng: edited_rows(p, lambda r: r.update(more=[1, None])),
        "fields in another order": lambda p, rng: edited_rows(p, turned),
        "spaces around rows": lambda p, rng: replace(p, p.read_text().replace("\n", " \t\n  ")),
    }


def other_formats():
    """{name: (damage, the new file's name)} of a .jsonl file: the same rows in another format."""

    def packed(p, rng):
        replace(p.with_name(p.name + ".gz"), gzip.compress(p.read_bytes()))

    def listed(p, rng):
        rows = [json.loads(line) for line in lines_of(p)]
        replace(p.with_suffix(".json"), json.dumps(rows, indent=1))

    return {"gz": (packed, ".jsonl.gz"), "a list in .json": (listed, ".json")}


def header_of(path):
    """The header of a safetensors file, as JSON, and the bytes after it."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :], size


def with_header(path, header, rest):
    encoded = json.dumps(header).encode()
    replace(path, struct.pack("<Q", len(encoded)) + encoded + rest)


def change_tensors(change):
    """A damage that calls change({name: tensor}, random numbers) and writes the result."""

    def damage(path, rng):
        notes = header_of(path)[0].get("__metadata__")
        tensors = load_file(path)
        # Another file in the same place: the old one may be a link.
        change(tensors, rng)
        path.unlink()
        save_file({name: x.contiguous() for name, x in tensors.items()}, path, notes)

    return damage


def a_float(tensors, rng):
    names = [n for n, x in sorted(tensors.items()) if x.is_floating_point() and x.numel() > 1]
    return rng.choice(names)


def put(value):
    def change(tensors, rng):
        name = a_float(tensors, rng)
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = value

    return change_tensors(change)


def cast(dtype):
    def change(tensors, rng):
        for name, x in tensors.items():
            tensors[name] = x.to(dtype)

    return change_tensors(change)


def drop_one(tensors, rng):
    del tensors[rng.choice(sorted(tensors))]


def another_shape(tensors, rng):
    name = a_float(tensors, rng)
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def flip_bit(first=0.0, last=1.0):
    """A flipped bit in this part of a file."""

    def damage(path, rng):
        content = bytearray(path.read_bytes())
        at = rng.randrange(int(first * len(content)), int(last * len(content)))
        content[at] ^= 1 << rng.randrange(8)
        replace(path, bytes(content))

    return damage


def flip_header(path, rng):
    header, rest, size = header_of(path)
    content = bytearray(path.read_bytes())
    content[rng.randrange(8, 8 + size)] ^= 1 << rng.randrange(7)
    replace(path, bytes(content))


def flip_size(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(8)] ^= 1 << rng.randrange(8)
    replace(path, bytes(content))


def as_pickle(path, rng):
    tensors = load_file(path)
    path.unlink()
    torch.save(tensors, path)


TENSOR_FILE = {
    **ANY_FILE,
    "cut": lambda path, rng: replace(path, path.read_bytes()[: path.stat().st_size // 2]),
    "cut by a byte": lambda path, rng: replace(path, path.read_bytes()[:-1]),
    "cut in the header": lambda path, rng: replace(path, path.read_bytes()[:100]),
    "text": lambda path, rng: replace(path, "this is text\n"),
    "more bytes at the end": lambda path, rng: replace(path, path.read_bytes() + b"more"),
    "a pickle": as_pickle,
    "a header of a wrong size": flip_size,
    "a tensor is missing": change_tensors(drop_one),
    "a tensor of another shape": change_tensors(another_shape),
    "nan": put(NAN),
    "inf": put(math.inf),
    "int64": cast(torch.int64),
}


def one_more(tensors, rng):
    tensors["of_nobody"] = torch.zeros(3)


def no_optimizer(tensors, rng):
    for name in [name for name in tensors if name.startswith("optimizer/")]:
        del tensors[name]


def turned_lines(path):
    return "\n".join(reversed(lines_of(path))) + "\n"


def set_in_line(path, rng, name, value):
    edited_rows(path, lambda row: row.update({name: value}) if name in row else None, only=1)


def set_in_row(path, rng, name, what):
    rows = json.loads(path.read_text())
    if what == "missing":
        del rows[2][name]
    else:
        rows[2][name] = JSON_VALUES[what]
    replace(path, json.dumps(rows))


def set_deep(path, rng, names, value):
    """Change an entry of an entry; JSON_VALUES["missing"] is None as "null" is."""
    whole = json.loads(path.read_text())
    place = whole
    for name in names[:-1]:
        place = place[name]
    place[names[-1]] = value
    replace(path, json.dumps(whole))


def set_notes(path, rng, text):
    header, rest, _ = header_of(path)
    names = list(header["__metadata__"])
    header["__metadata__"] = {name: text for name in names}
    with_header(path, header, rest)

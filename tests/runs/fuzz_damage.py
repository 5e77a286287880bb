"""What is done to a file in a case of fuzz.py. A damage is a function of (path, random numbers)."""

import gzip
import json
import math
import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NAN = float("nan")


def replace(path: Path, content):
    """New content for a file, a string or bytes.

    The old file may be linked into the material, so it is not written into.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)


# ---------------------------------------------------------------------------------------- any file


def write(content):
    """A damage: other content."""
    return lambda path, rng: replace(path, content)


def change_text(change):
    """A damage: change(text) in the place of the text."""
    return lambda path, rng: replace(path, change(path.read_text()))


def remove(path, rng):
    path.unlink()


def make_zeros(path, rng):
    replace(path, bytes(path.stat().st_size))


def make_random(path, rng):
    replace(path, b"\xff\xfe" + rng.randbytes(300))


def make_folder(path, rng):
    path.unlink()
    path.mkdir()


def make_loop(path, rng):
    make_link(path, path.name)


def make_link(path, target):
    path.unlink()
    path.symlink_to(target)


def cut_in_half(path, rng):
    replace(path, path.read_bytes()[: path.stat().st_size // 2])


def keep_bytes(first):
    """A damage: the first bytes of a file alone; -1: all but the last one."""
    return lambda path, rng: replace(path, path.read_bytes()[:first])


def end_in_no_text(path, rng):
    replace(path, path.read_bytes()[:40] + b"\xff\xe9\xff")


def flip_bit(first=0.0, last=1.0):
    """A damage: a flipped bit in this part of a file, from and to these shares of its length."""

    def damage(path, rng):
        content = bytearray(path.read_bytes())
        at = rng.randrange(int(first * len(content)), int(last * len(content)))
        content[at] ^= 1 << rng.randrange(8)
        replace(path, bytes(content))

    return damage


# {what is done to a file: a damage}; no file survives these.
ANY_FILE = {
    "missing": remove,
    "empty": write(b""),
    "zeros": make_zeros,
    "a folder": make_folder,
    "a link to itself": make_loop,
    "random bytes": make_random,
}


TEXT_FILE = {**ANY_FILE, "not UTF-8": end_in_no_text}


# -------------------------------------------------------------------------------------------- JSON


def deep_json():
    return "[" * 100_000 + "]" * 100_000


LONG_NUMBER = '{"a": ' + "7" * 5000 + "}"


JSON_FILE = {
    **TEXT_FILE,
    "cut": cut_in_half,
    "text": write("this is text\n"),
    "null": write("null"),
    "a number": write("3"),
    "a string": write('"text"'),
    "a list": write("[]"),
    "nested 100,000 deep": write(deep_json()),
    "a number of 5,000 digits": write(LONG_NUMBER),
}


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


def read_json(path):
    return json.loads(path.read_text())


def write_json(path, value):
    replace(path, json.dumps(value))


def set_entry(entries: dict, name: str, what: str):
    """Give an entry of a dictionary one of JSON_VALUES, or take it away."""
    if what == "missing":
        entries.pop(name, None)
    else:
        entries[name] = JSON_VALUES[what]


def set_key(path, rng, name: str, what: str):
    """Change one entry of a JSON object."""
    value = read_json(path)
    set_entry(value, name, what)
    write_json(path, value)


def set_in_row(path, rng, name: str, what: str):
    """Change one entry of the third row of a JSON list."""
    rows = read_json(path)
    set_entry(rows[2], name, what)
    write_json(path, rows)


def set_deep(path, rng, names: list[str], value):
    """Change an entry of an entry; JSON_VALUES["missing"] is None as "null" is."""
    whole = read_json(path)
    *outer, last = names
    place = whole
    for name in outer:
        place = place[name]
    place[last] = value
    write_json(path, whole)


def edit_json(path, change: dict):
    write_json(path, {**read_json(path), **change})


# ------------------------------------------------------------------------------- rows, one a line


def lines_of(path):
    return path.read_bytes().decode().splitlines()


def add_line(line, at=3):
    """A damage: one more line, as the fourth one."""

    def damage(path, rng):
        lines = lines_of(path)
        lines.insert(at, line)
        replace(path, "\n".join(lines) + "\n")

    return damage


def drop_first_line(path, rng):
    replace(path, "\n".join(lines_of(path)[1:]) + "\n")


def keep_lines(n):
    """A damage: the first n lines alone, without a newline at the end."""
    return lambda path, rng: replace(path, "\n".join(lines_of(path)[:n]))


def turn_lines(path, rng):
    replace(path, "\n".join(reversed(lines_of(path))) + "\n")


def change_rows(path, change, only=None):
    """change(row) on every row, or on one."""
    rows = list(map(json.loads, lines_of(path)))
    for i, row in enumerate(rows):
        if only is None or i == only:
            change(row)
    replace(path, "".join(json.dumps(row) + "\n" for row in rows))


def set_field(name, value):
    """A damage: another value in a field of the second row."""

    def damage(path, rng):
        change_rows(path, lambda row: row.update({name: value}), only=1)

    return damage


def set_in_line(path, rng, name, value):
    """The same, where the row has the field."""

    def change(row):
        if name in row:
            row[name] = value

    change_rows(path, change, only=1)


def drop_field(name):
    """A damage: the third row without a field."""
    return lambda path, rng: change_rows(path, lambda row: row.pop(name), only=2)


def encode_as_utf_16(path, rng):
    replace(path, path.read_text().encode("utf-16"))


# The field that comes last in the rows of a file; that of other files is their response.
LAST_FIELD = {
    "sft.jsonl": "response",
    "pairs.jsonl": "rejected",
    "prompts.jsonl": "prompt",
    "answers.jsonl": "responses",
}


def bad_rows(path):
    """{name: damage} of a .jsonl file that every reader must refuse."""
    name = LAST_FIELD.get(path, "response")
    surrogate = "caf\ud800"
    if name == "responses":
        surrogate = ["\ud800"] * 4
    return {
        "cut": cut_in_half,
        "text": write("this is text\n"),
        "blank": write("\n \n\n"),
        "a line that is cut": add_line('{"prompt": "a'),
        "a line that is a list": add_line("[1, 2]"),
        "a line that is a number": add_line("3"),
        "a line that is null": add_line("null"),
        "a line nested 100,000 deep": add_line(deep_json()),
        "a number of 5,000 digits": add_line(LONG_NUMBER),
        "a member that is there twice": add_line('{"prompt": "a", "prompt": "b"}'),
        "a row without its field": drop_field(name),
        "a field that is null": set_field(name, None),
        "a field that is a number": set_field(name, 7),
        "a field that is an object": set_field(name, {"text": "a"}),
        "a field that is a list of numbers": set_field(name, [1, 2]),
        "a lone surrogate": set_field(name, surrogate),
        "zeros in the middle": add_line("\0\0\0"),
        "UTF-16": encode_as_utf_16,
    }


# Other ways to write the same rows.


def end_lines_as_windows_does(path, rng):
    replace(path, path.read_bytes().replace(b"\n", b"\r\n"))


def begin_with_bom(path, rng):
    replace(path, b"\xef\xbb\xbf" + path.read_bytes())


def add_blank_lines(path, rng):
    replace(path, path.read_text() + "\n\n  \n")


def begin_with_blank_lines(path, rng):
    replace(path, "\n\n" + path.read_text())


def drop_last_newline(path, rng):
    replace(path, path.read_text().rstrip("\n"))


def add_column(path, rng):
    change_rows(path, lambda row: row.update(more=[1, None]))


def turn_fields(path, rng):
    def turn(row):
        for name in reversed(list(row)):
            row[name] = row.pop(name)

    change_rows(path, turn)


def add_spaces(path, rng):
    replace(path, path.read_text().replace("\n", " \t\n  "))


# {name: damage} that changes nothing of what is in the rows.
ODD_ROWS = {
    "CRLF": end_lines_as_windows_does,
    "BOM": begin_with_bom,
    "blank lines at the end": add_blank_lines,
    "blank lines in front": begin_with_blank_lines,
    "no newline at the end": drop_last_newline,
    "more columns": add_column,
    "fields in another order": turn_fields,
    "spaces around rows": add_spaces,
}


def pack_rows(path, rng):
    replace(path.with_name(path.name + ".gz"), gzip.compress(path.read_bytes()))


def list_rows(path, rng):
    rows = list(map(json.loads, lines_of(path)))
    replace(path.with_suffix(".json"), json.dumps(rows, indent=1))


def rename_to_json(path, rng):
    replace(path.with_suffix(".json"), path.read_bytes())


def list_rows_in_place(path, rng):
    rows = list(map(json.loads, lines_of(path)))
    replace(path, json.dumps(rows))


# {name: (damage, how the new file's name ends)}: the same rows in another format.
OTHER_FORMATS = {
    "gz": (pack_rows, ".jsonl.gz"),
    "a list in .json": (list_rows, ".json"),
    "lines in .json": (rename_to_json, ".json"),
    "a list in .jsonl": (list_rows_in_place, ".jsonl"),
}


# ----------------------------------------------------------------------------------------- tensors


def header_of(path):
    """A safetensors file -> its header, which is JSON, the bytes after it, the header's length."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :], size


def with_header(path, header, rest):
    encoded = json.dumps(header).encode()
    replace(path, struct.pack("<Q", len(encoded)) + encoded + rest)


def set_notes(path, rng, text):
    """Another text in each entry of the header's notes."""
    header, rest, _ = header_of(path)
    header["__metadata__"] = dict.fromkeys(header["__metadata__"], text)
    with_header(path, header, rest)


def flip_header(path, rng):
    """A flipped bit in the header."""
    _, _, size = header_of(path)
    content = bytearray(path.read_bytes())
    content[rng.randrange(8, 8 + size)] ^= 1 << rng.randrange(7)
    replace(path, bytes(content))


def flip_size(path, rng):
    """A flipped bit in the eight bytes that hold the header's length."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(8)] ^= 1 << rng.randrange(8)
    replace(path, bytes(content))


def add_bytes(path, rng):
    replace(path, path.read_bytes() + b"more")


def save_as_pickle(path, rng):
    tensors = load_file(path)
    path.unlink()
    torch.save(tensors, path)


def change_tensors(change):
    """A damage that calls change({name: tensor}, random numbers) and writes the result."""

    def damage(path, rng):
        notes = header_of(path)[0].get("__metadata__")
        tensors = load_file(path)
        change(tensors, rng)
        # Another file in the same place: the old one may be a link.
        path.unlink()
        save_file({name: x.contiguous() for name, x in tensors.items()}, path, notes)

    return damage


def choose_float(tensors, rng):
    """The name of a tensor of more than one float."""
    names = []
    for name, x in sorted(tensors.items()):
        if x.is_floating_point() and x.numel() > 1:
            names.append(name)
    return rng.choice(names)


def put(value):
    """A damage: another value in one place of one tensor."""

    def change(tensors, rng):
        name = choose_float(tensors, rng)
        changed = tensors[name].clone()
        changed.view(-1)[rng.randrange(changed.numel())] = value
        tensors[name] = changed

    return change_tensors(change)


def cast(dtype):
    """A damage: all tensors in another type."""

    def change(tensors, rng):
        for name, x in tensors.items():
            tensors[name] = x.to(dtype)

    return change_tensors(change)


def drop_one(tensors, rng):
    del tensors[rng.choice(sorted(tensors))]


def repeat_a_row(tensors, rng):
    name = choose_float(tensors, rng)
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def add_one(tensors, rng):
    tensors["of_nobody"] = torch.zeros(3)


def drop_optimizer(tensors, rng):
    for name in list(tensors):
        if name.startswith("optimizer/"):
            del tensors[name]


TENSOR_FILE = {
    **ANY_FILE,
    "cut": cut_in_half,
    "cut by a byte": keep_bytes(-1),
    "cut in the header": keep_bytes(100),
    "text": write("this is text\n"),
    "more bytes at the end": add_bytes,
    "a pickle": save_as_pickle,
    "a header of a wrong size": flip_size,
    "a tensor is missing": change_tensors(drop_one),
    "a tensor of another shape": change_tensors(repeat_a_row),
    "nan": put(NAN),
    "inf": put(math.inf),
    "int64": cast(torch.int64),
}

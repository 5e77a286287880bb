"""nanorlhf.runtime.files and tensors: what is read is JSON, UTF-8 and finite numbers, or one line says where it is not."""

import gzip
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from support import refuses

from nanorlhf.runtime.files import (
    check_fields,
    is_of_type,
    parse_json,
    read_bytes,
    read_checked_lines,
    read_file,
    read_json,
    read_object,
    read_rows,
)
from nanorlhf.runtime.tensors import check_tensors, read_tensors

# ------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("text, value", [
    ('{"a": [1, 2.5, -3e-2, true, null]}', {"a": [1, 2.5, -0.03, True, None]}),
    ('"\\ud83d\\ude00"', "\U0001f600"),  # a character that JSON writes in two halves
    ('"\\\\ud800"', "\\ud800"),  # a text that speaks of one
    ("1e308", 1e308),
    ("9" * 4300, int("9" * 4300)),
])  # fmt: skip
def test_what_is_json(text, value):
    assert parse_json(text, "a.json") == parse_json(text.encode(), "a.json") == value
    assert parse_json(b"\xef\xbb\xbf" + text.encode(), "a.json") == value  # a byte-order mark


@pytest.mark.parametrize("text, words", [
    ("", "not JSON"),
    ("{", "not JSON"),
    ("{'a': 1}", "not JSON"),
    ("[NaN]", "NaN is no finite number"),
    ("[-Infinity]", "-Infinity is no finite number"),
    ("[1e999]", "1e999 is no finite number"),
    ("9" * 4301, "not JSON"),
    ("[" * 100_000, "nested too deep"),
    ('{"a":' * 100_000, "nested too deep"),
    ('["\\ud800"]', "half of a character"),
    ('{"\\uDFFF": 1}', "half of a character"),
    (b"\xff\xfe", "not UTF-8"),
    (b'"caf\xe9"', "not UTF-8"),
])  # fmt: skip
def test_what_is_no_json(text, words):
    refuses(parse_json, text, "a.jsonl", 7, match=["a.jsonl:7: ", words])
    refuses(parse_json, text, "a.json", match=["a.json", words])


def test_a_log_may_hold_nan(tmp_path):
    """A metric of numbers that do not vary, say; what json.dump writes is read again."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "tau": math.nan}) + "\n")
    ((step, tau),) = [row.values() for row in read_rows(str(tmp_path / "metrics.jsonl"))]
    assert step == 1 and math.isnan(tau)
    refuses(
        read_checked_lines,
        str(tmp_path / "metrics.jsonl"),
        lambda i, row: True,
        "delete it",
        match=["metrics.jsonl:1: ", "delete it"],
    )
    (tmp_path / "summary.json").write_text(json.dumps({"tau": math.inf}))
    assert read_object(str(tmp_path / "summary.json"), finite=False) == {"tau": math.inf}
    refuses(read_object, str(tmp_path / "summary.json"), match=["summary.json: ", "Infinity"])


@pytest.mark.parametrize("value, hint, fits", [
    ("a", str, True), (1, str, False), (None, str, False),
    (1, int, True), (True, int, False), (1.0, int, False),
    (1, float, True), (1.5, float, True), (True, float, False), ("1", float, False), (10**400, float, False),
    (True, bool, True), (1, bool, False),
    ({}, dict, True), ([], dict, False),
    ([1], list[int], True), ([], list[int], True), ([1, "a"], list[int], False), ("a", list[str], False),
    (None, str | None, True), ("a", str | list[str], True), (["a"], str | list[str], True), ([1], str | list[str], False),
])  # fmt: skip
def test_types(value, hint, fits):
    assert is_of_type(value, hint) == fits


def test_fields():
    fields = {"name": str, "size": int, "note": str | None}
    good = {"name": "a", "size": 3, "more": []}
    assert check_fields(good, fields, "x.json") is good
    refuses(check_fields, [good], fields, "x.json", match=["x.json: not a JSON object"])
    refuses(check_fields, {"name": "a"}, fields, "x.json", match=["x.json: size is missing"])
    refuses(
        check_fields,
        {"name": None, "size": 3},
        fields,
        "x.json",
        match=["x.json: name cannot be None"],
    )
    refuses(
        check_fields,
        {**good, "note": "n" * 10**5},
        {"note": int},
        "x.json",
        match=["x.json: note cannot be 'nnn", "..."],
    )


# ------------------------------------------------------------------------------------------ bytes


def test_a_flipped_bit_anywhere_in_gzip(tmp_path):
    """Whatever is flipped: the rows are read as they were, or one line names the file."""
    text = "".join(json.dumps({"prompt": f"p {i * i}"}) + "\n" for i in range(40)).encode()
    packed, path = gzip.compress(text, mtime=0), tmp_path / "a.jsonl.gz"
    path.write_bytes(packed)
    rows = read_file(str(path))
    assert len(rows) == 40 and rows[1] == (f"{path}:2", {"prompt": "p 1"})
    refused = 0
    for place in range(len(packed)):
        path.write_bytes(packed[:place] + bytes([packed[place] ^ 4]) + packed[place + 1 :])
        try:
            assert read_file(str(path)) == rows
        except ValueError:
            refuses(read_file, str(path), match=["a.jsonl.gz: cannot be read"])
            refused += 1
    assert refused > len(packed) - 15  # the header holds a time and a system that nobody checks


def test_what_cannot_be_opened(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (
        tmp_path / "gone",
        tmp_path / "loop",
        tmp_path,
        f"{tmp_path}/a\0b",
        f"{tmp_path}/{'n' * 300}",
    ):
        for read in (read_bytes, read_json, read_file, read_tensors):
            refuses(read, str(path), match=[str(path)])


# ---------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("tensor, words", [
    (None, "x.safetensors: the tensor w is missing"),
    (torch.zeros(3, 2), "x.safetensors: w is [3, 2], not [2, 3]"),
    (torch.zeros(2, 3, dtype=torch.int8), "x.safetensors: w holds int8"),
    (torch.zeros(2, 3, dtype=torch.bool), "x.safetensors: w holds bool"),
    (torch.full((2, 3), math.nan), "x.safetensors: w holds numbers that are not finite"),
    (torch.full((2, 3), -math.inf, dtype=torch.bfloat16), "x.safetensors: w holds numbers that are not finite"),
    (torch.full((2, 3), 1e39, dtype=torch.float64), "x.safetensors: w holds numbers that are not finite"),
])  # fmt: skip
def test_tensors_that_are_not_those(tmp_path, tensor, words):
    path = str(tmp_path / "x.safetensors")
    save_file({} if tensor is None else {"w": tensor}, path)
    refuses(check_tensors, read_tensors(path), {"w": [2, 3]}, path, match=[words])


def test_tensors_that_are(tmp_path):
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        check_tensors(
            {"w": torch.ones(2, 3, dtype=dtype), "more": torch.ones(1)},
            {"w": torch.Size([2, 3])},
            "x",
        )
    check_tensors({"w": torch.zeros(0, 4)}, {"w": None}, "x")

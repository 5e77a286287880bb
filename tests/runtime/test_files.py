"""nanorlhf.runtime.files and tensors.

What is read is JSON, UTF-8 and finite numbers, or one line says where it is not.
"""

import gzip
import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file
from support import refuses

from nanorlhf.errors import InputError
from nanorlhf.runtime.files import (
    check_fields,
    check_name,
    drop_cut_line,
    is_of_type,
    parse_json,
    read_bytes,
    read_checked_lines,
    read_file,
    read_json,
    read_object,
    read_rows,
    without_nan,
)
from nanorlhf.runtime.tensors import check_tensors, read_tensors

# ------------------------------------------------------------------------------------------- JSON

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "text, value",
    [
        ('{"a": [1, 2.5, -3e-2, true, null]}', {"a": [1, 2.5, -0.03, True, None]}),
        # A character that JSON writes in two halves.
        ('"\\ud83d\\ude00"', "\U0001f600"),
        # A text that speaks of half a character.
        ('"\\\\ud800"', "\\ud800"),
        ("1e308", 1e308),
        # As many digits as Python reads.
        pytest.param("9" * 4300, int("9" * 4300), id="4300 digits"),
    ],
)
def test_what_is_json(text, value):
    assert parse_json(text, "a.json") == value
    assert parse_json(text.encode(), "a.json") == value
    assert parse_json(BYTE_ORDER_MARK + text.encode(), "a.json") == value


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("{'a': 1}", "not JSON"),
        ("[NaN]", "NaN is no finite number"),
        ("[-Infinity]", "-Infinity is no finite number"),
        ("[1e999]", "1e999 is no finite number"),
        pytest.param("9" * 4301, "not JSON", id="4301 digits"),
        pytest.param("[" * 100_000, "nested too deep", id="deep lists"),
        pytest.param('{"a":' * 100_000, "nested too deep", id="deep objects"),
        ('["\\ud800"]', "half of a character"),
        ('{"\\uDFFF": 1}', "half of a character"),
        (b"\xff\xfe", "not UTF-8"),
        (b'"caf\xe9"', "not UTF-8"),
    ],
)
def test_what_is_no_json(text, words):
    """The error names the file and, where it is known, the line."""
    refuses(parse_json, text, "a.jsonl", 7, match=["a.jsonl:7: ", words])
    refuses(parse_json, text, "a.json", match=["a.json", words])


def test_a_log_may_hold_nan(tmp_path):
    """A metric of numbers that do not vary, say: what json.dump() writes is read again."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "tau": math.nan}) + "\n")
    (row,) = read_rows(str(path))
    assert list(row) == ["step", "tau"]
    assert row["step"] == 1
    assert math.isnan(row["tau"])


def test_other_files_of_lines_may_not_hold_nan(tmp_path):
    def fits(i, row):
        return True

    path = tmp_path / "cache.jsonl"
    path.write_text('{"score": NaN}\n')
    refuses(
        read_checked_lines, str(path), fits, "delete it", match=["cache.jsonl:1: ", "delete it"]
    )


def test_a_summary_may_hold_infinity_where_its_reader_says_so(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"tau": math.inf}))
    assert read_object(str(path), finite=False) == {"tau": math.inf}
    refuses(read_object, str(path), match=["summary.json: ", "Infinity"])


# ---------------------------------------------------------------------------------- types of fields


def test_texts():
    assert is_of_type("a", str)
    assert not is_of_type(1, str)
    assert not is_of_type(None, str)


def test_whole_numbers():
    """Truth values are no numbers, though Python's bool is an int."""
    assert is_of_type(1, int)
    assert not is_of_type(True, int)
    assert not is_of_type(1.0, int)


def test_numbers():
    """A whole number is one too, unless it is so large that no float can hold it."""
    assert is_of_type(1, float)
    assert is_of_type(1.5, float)
    assert not is_of_type(True, float)
    assert not is_of_type("1", float)
    assert not is_of_type(10**400, float)


def test_truth_values():
    assert is_of_type(True, bool)
    assert not is_of_type(1, bool)


def test_objects():
    assert is_of_type({}, dict)
    assert not is_of_type([], dict)


def test_lists():
    assert is_of_type([1], list[int])
    assert is_of_type([], list[int])
    assert not is_of_type([1, "a"], list[int])
    assert not is_of_type("a", list[str])


def test_one_of_two_types():
    assert is_of_type(None, str | None)
    assert is_of_type("a", str | list[str])
    assert is_of_type(["a"], str | list[str])
    assert not is_of_type([1], str | list[str])


FIELDS = {"name": str, "size": int, "note": str | None}


def test_an_object_with_the_right_fields_is_returned_as_it_is():
    """A field that may be None may also be missing, and there may be others."""
    good = {"name": "a", "size": 3, "more": []}
    assert check_fields(good, FIELDS, "x.json") is good


def refuses_fields(value, *words):
    refuses(check_fields, value, FIELDS, "x.json", match=words)


def test_an_object_without_the_right_fields():
    refuses_fields([{"name": "a", "size": 3}], "x.json: not a JSON object")
    refuses_fields({"name": "a"}, "x.json: size is missing")
    refuses_fields({"name": None, "size": 3}, "x.json: name cannot be None")
    # A long value is cut off.
    long = "n" * 10**5
    refuses_fields({"name": "a", "size": long}, "x.json: size cannot be 'nnn", "...")


# ------------------------------------------------------------------------------------------- bytes


def flip_bit(content, place):
    """Some bytes with one bit of one of them turned over."""
    changed = bytearray(content)
    changed[place] ^= 4
    return bytes(changed)


def test_a_flipped_bit_anywhere_in_gzip(tmp_path):
    """Whatever is flipped: the rows are read as they were, or one line names the file."""
    lines = [json.dumps({"prompt": f"p {i * i}"}) + "\n" for i in range(40)]
    packed = gzip.compress("".join(lines).encode(), mtime=0)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(packed)
    rows = read_file(str(path))
    assert len(rows) == 40
    assert rows[1] == (f"{path}:2", {"prompt": "p 1"})

    refused = 0
    for place in range(len(packed)):
        path.write_bytes(flip_bit(packed, place))
        try:
            assert read_file(str(path)) == rows
        except ValueError:
            refuses(read_file, str(path), match=["a.jsonl.gz: cannot be read"])
            refused += 1
    # The header holds a time and a system that nobody checks.
    assert refused > len(packed) - 15


@pytest.mark.parametrize("read", [read_bytes, read_json, read_file, read_tensors])
@pytest.mark.parametrize(
    "name",
    ["gone", "loop", "", "a\0b", pytest.param("n" * 300, id="too long")],
)
def test_what_cannot_be_opened(tmp_path, name, read):
    """The empty name makes the path that of the folder itself."""
    (tmp_path / "loop").symlink_to("loop")
    path = f"{tmp_path}/{name}"
    refuses(read, path, match=[path])


# ----------------------------------------------------------------------------------------- tensors


def refuses_tensors(tmp_path, tensors, words):
    """A file of these tensors is refused where w [2, 3] is asked for."""
    path = str(tmp_path / "x.safetensors")
    save_file(tensors, path)
    found = read_tensors(path)
    refuses(check_tensors, found, {"w": [2, 3]}, path, match=[f"x.safetensors: {words}"])


def test_a_tensor_that_is_missing(tmp_path):
    refuses_tensors(tmp_path, {}, "the tensor w is missing")


def test_a_tensor_of_another_shape(tmp_path):
    w = torch.zeros(3, 2)
    refuses_tensors(tmp_path, {"w": w}, "w is [3, 2], not [2, 3]")


@pytest.mark.parametrize("dtype, name", [(torch.int8, "int8"), (torch.bool, "bool")])
def test_a_tensor_of_other_than_floating_point_numbers(tmp_path, dtype, name):
    w = torch.zeros(2, 3, dtype=dtype)
    refuses_tensors(tmp_path, {"w": w}, f"w holds {name}")


# The last one is finite in float64, but not in float32, which is computed in.
@pytest.mark.parametrize(
    "number, dtype",
    [(math.nan, torch.float32), (-math.inf, torch.bfloat16), (1e39, torch.float64)],
)
def test_a_tensor_of_numbers_that_are_not_finite(tmp_path, number, dtype):
    w = torch.full((2, 3), number, dtype=dtype)
    refuses_tensors(tmp_path, {"w": w}, "w holds numbers that are not finite")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_tensors_of_any_floating_point_type_are_taken(dtype):
    """There may be others too."""
    tensors = {"w": torch.ones(2, 3, dtype=dtype), "more": torch.ones(1)}
    check_tensors(tensors, {"w": torch.Size([2, 3])}, "x")


def test_a_tensor_of_any_shape_is_taken_where_none_is_asked_for():
    check_tensors({"w": torch.zeros(0, 4)}, {"w": None}, "x")


def test_json_has_null_for_numbers_that_it_does_not_know():
    value = {"a": [math.nan, 1.5, True], "b": (math.inf, {"c": -math.inf}), "d": "nan"}
    assert without_nan(value) == {"a": [None, 1.5, True], "b": [None, {"c": None}], "d": "nan"}


# ------------------------------------------------------------------------- a place for outputs


def test_a_folder_that_another_process_has_just_removed_is_no_broken_link(tmp_path, monkeypatch):
    place = str(tmp_path / "out" / "summary.json")
    os.mkdir(tmp_path / "out")

    def exists(path):
        """The other process removes its empty folder before we look a second time."""
        if os.path.isdir(tmp_path / "out"):
            os.rmdir(tmp_path / "out")
        return False

    monkeypatch.setattr("os.path.exists", exists)
    check_name(place)


def test_a_link_that_leads_nowhere_is_no_place(tmp_path):
    os.symlink(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(InputError, match="leads nowhere"):
        check_name(str(tmp_path / "out" / "summary.json"))


@pytest.mark.parametrize(
    "text, kept",
    [(b"one\ntwo", b"one\n"), (b"one\ntwo\n", b"one\ntwo\n"), (b"one", b""), (b"", b"")],
)
def test_a_line_that_a_kill_has_cut_short_is_dropped(tmp_path, text, kept):
    """A file of whole lines keeps its date, too."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text)
    os.utime(path, (1, 1))
    drop_cut_line(str(path))
    assert path.read_bytes() == kept
    is_untouched = path.stat().st_mtime == 1
    assert is_untouched == (kept == text)


def test_a_file_that_is_not_there_has_no_cut_line(tmp_path):
    drop_cut_line(str(tmp_path / "rows.jsonl"))
    assert not list(tmp_path.iterdir())

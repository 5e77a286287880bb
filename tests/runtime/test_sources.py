"""nanorlhf.runtime.sources, and files.read_file: where rows come from, what is not whole."""

import gzip
import socket

import datasets
import pytest
from support import content, refuses

from nanorlhf.runtime import sources
from nanorlhf.runtime.files import parse_json, read_file
from nanorlhf.runtime.sources import read_any

ROWS = [{"prompt": "p0", "response": "r 0"}, {"prompt": "p1", "response": "r 1"}]
# The same rows in three ways.
LINES = '{"prompt": "p0", "response": "r 0"}\n{"prompt": "p1", "response": "r 1"}\n'
LIST = '[{"prompt": "p0", "response": "r 0"},\n {"prompt": "p1", "response": "r 1"}]'
CSV = "prompt,response\np0,r 0\np1,r 1\n"
BOM = "\ufeff"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """A data set that is there needs no network; the library's cache is in a folder of the test."""

    def refuse(*args):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, text):
    """A file of this text, or of these bytes. -> its path"""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(text, str):
        text = text.encode()
    path.write_bytes(text)
    return str(path)


def write_parquet(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def rows_of(spec):
    return [row for _, row in read_any(str(spec))]


def check_refused(spec, *words):
    refuses(read_any, str(spec), match=words)


@pytest.fixture
def folder(tmp_path):
    """A folder for the files of a data set."""
    return tmp_path / "set"


def places_of(spec):
    return [place for place, _ in read_any(str(spec))]


# ------------------------------------------------------------------------------------------- files


# (a file's name, what is in it, where its two rows are)
FILES = [
    ("a.jsonl", LINES, ":1 :2"),
    ("lines.json", LINES, ":1 :2"),
    ("no_ending", LINES, ":1 :2"),
    ("bom.jsonl", BOM + LINES, ":1 :2"),
    ("blank.json", "\n \n" + LINES, ":3 :4"),
    ("a.json", LIST, "[0] [1]"),
    ("list.jsonl", LIST, "[0] [1]"),
    ("bom.json", BOM + "\n" + LIST, "[0] [1]"),
    ("a.csv", CSV, ":2 :3"),
    ("bom.csv", BOM + CSV, ":2 :3"),
    ("windows.csv", CSV.replace("\n", "\r\n"), ":2 :3"),
    ("quoted.csv", CSV.replace("p1", '"p1"'), ":2 :3"),
]


@pytest.mark.parametrize("name, text, places", FILES)
def test_a_file_is_what_its_content_says(tmp_path, name, text, places):
    path = write(tmp_path / name, text)
    assert rows_of(path) == ROWS
    assert places_of(path) == [path + place for place in places.split()]


@pytest.mark.parametrize("name, text, places", FILES)
def test_a_file_may_be_packed(tmp_path, name, text, places):
    path = write(tmp_path / f"{name}.gz", gzip.compress(text.encode()))
    assert rows_of(path) == ROWS
    assert places_of(path) == [path + place for place in places.split()]


def test_a_text_of_csv_may_have_many_lines(tmp_path):
    """The row's place is the first of them."""
    path = write(tmp_path / "a.csv", 'a,b\n"1\n2 ""x""\n",3\n\n4,5\n')
    assert rows_of(path) == [{"a": '1\n2 "x"\n', "b": "3"}, {"a": "4", "b": "5"}]
    assert places_of(path) == [f"{path}:2", f"{path}:6"]


def test_a_text_of_csv_may_be_long(tmp_path):
    """The csv module's own limit is 131,072 characters."""
    text = "x" * 200_000
    path = write(tmp_path / "a.csv", f"a,b\n{text},1\n")
    assert rows_of(path) == [{"a": text, "b": "1"}]


def test_csv_holds_texts_alone(tmp_path):
    """None of them becomes a number or null."""
    path = write(tmp_path / "a.csv", "a,b,c,d\n007,NA,null,\n")
    assert rows_of(path) == [{"a": "007", "b": "NA", "c": "null", "d": ""}]


BAD_FILES = [
    ("a.csv", "a,b\n1,2\n3\n", ":3: 1 cells, but the first line names 2 columns"),
    ("a.csv", "a,b\n1,2,3\n", ":2: 3 cells, but the first line names 2 columns"),
    ("a.csv", 'a,b\n1,"2\n', ":2: not CSV"),
    ("a.csv", 'a,b\n"1"2,3\n', ":2: not CSV"),
    ("a.csv", "a,a\n1,2\n", ": two columns have one name"),
    ("a.csv", "a,b\n", ": no rows"),
    ("a.csv", "", ": the file is empty"),
    ("a.csv", b"a,b\n\xe9,2\n", ": not UTF-8"),
    ("a.json", BOM, ": the file is empty"),
    ("a.jsonl", "[]", ": no rows"),
    ("a.json", '{\n "prompt": "p"\n}', ":1: not JSON"),
    ("a.json", '{\n "prompt": "p"\n}', "; rows are one list, or one on each line"),
    ("a.jsonl", LINES + "{", ":3: not JSON"),
    ("a.jsonl", "[1]\n[2]\n", ":2: not JSON"),
    ("a.jsonl", LINES + '{"a": {"b": 1, "b": 1}}', ":3: not JSON (an object names 'b' twice)"),
    ("a.json", '[{"prompt": "p", "prompt": "q"}]', ": not JSON (an object names 'prompt' twice)"),
    ("a.jsonl", LINES.encode("utf-16"), ":1: not UTF-8"),
]


@pytest.mark.parametrize("name, text, words", BAD_FILES)
def test_files_that_are_refused(tmp_path, name, text, words):
    path = write(tmp_path / name, text)
    check_refused(path, words)


HALVES = r'[{"a\udc00": "x \ud83d", "b": ["\ud83d\ude00", 1.5, null]}]'


def test_halves_of_characters_are_mended_in_data(tmp_path):
    """Two halves side by side are a whole character."""
    path = write(tmp_path / "a.json", HALVES)
    ((_, row),) = read_file(path)
    assert row == {"a\ufffd": "x \ufffd", "b": ["\U0001f600", 1.5, None]}


def test_halves_of_characters_are_refused_in_the_files_of_runs():
    refuses(parse_json, HALVES, "a.json", match=["a.json: a text holds half of a character"])


# ------------------------------------------------------------------------------------------ folders

PART = "train-00000-of-00001"
# {the name of one file of a folder as downloaded: what is in it}
FOLDERS = {
    "train.jsonl": LINES,
    "data/train.csv": CSV,
    "data/train.json": LIST,
    f"{PART}.json": LINES,
    "bom.jsonl": BOM + LINES,
    "train.jsonl.gz": gzip.compress(LINES.encode()),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_as_downloaded(folder, name):
    write(folder / "README.md", "# A data set\n")
    path = write(folder / name, FOLDERS[name])
    before = content(folder)

    assert rows_of(folder) == ROWS
    assert rows_of(f"{folder}:train") == ROWS
    assert places_of(folder)[0].startswith(path)
    # A part of a split, which the library reads.
    assert rows_of(f"{folder}:train[1:]") == ROWS[1:]
    # Nothing was written beside the data.
    assert content(folder) == before


@pytest.mark.parametrize("name", [".", "..", "./", ".:train"])
def test_the_folder_that_one_stands_in(folder, monkeypatch, name):
    write_parquet(folder / f"{PART}.parquet")
    write(folder / "code/notes.txt", "")
    monkeypatch.chdir(folder / "code" if name == ".." else folder)
    assert rows_of(name) == ROWS


def test_a_folder_of_parquet(folder, capfd):
    write(folder / "README.md", "# A data set\n")
    write_parquet(folder / f"data/{PART}.parquet")
    file = write_parquet(folder / "data/test-00000-of-00001.parquet", ROWS[:1])
    before = content(folder)
    capfd.readouterr()

    assert rows_of(folder) == ROWS
    assert places_of(folder) == [f"{folder}[0]", f"{folder}[1]"]
    assert rows_of(f"{folder}:test") == ROWS[:1]
    assert rows_of(file) == ROWS[:1]
    assert content(folder) == before
    # The library's bars and remarks are no part of a run's output.
    assert capfd.readouterr() == ("", "")


def test_several_files_are_read_in_order(folder):
    first, second = LINES.splitlines()
    write(folder / "train-00001-of-00002.jsonl", second)
    write(folder / "train-00000-of-00002.jsonl", first)
    assert rows_of(folder) == ROWS


def test_texts_of_a_folder_are_read_as_files_are(folder):
    """With places of lines, and with halves of characters mended."""
    path = write(folder / "train.jsonl", LINES + HALVES[1:-1])
    assert places_of(folder)[2] == f"{path}:3"
    assert rows_of(folder)[2]["a\ufffd"] == "x \ufffd"

    write(folder / "train.jsonl", LINES[:-5])
    check_refused(folder, f"{path}:2: not JSON")


def test_a_saved_folder_stays_one(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    both = datasets.DatasetDict({"train": data, "test": data.select([0])})
    data.save_to_disk(tmp_path / "one")
    both.save_to_disk(tmp_path / "two")

    assert rows_of(tmp_path / "one") == ROWS
    assert rows_of(tmp_path / "two") == ROWS
    assert rows_of(f"{tmp_path}/two:test") == ROWS[:1]
    check_refused(f"{tmp_path}/two:none", "two:none", "no split 'none'", "there are train, test")


def test_a_saved_folder_has_no_parts(tmp_path):
    """The library would take a split that is not there, or a part of one, for all that is there."""
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "two")
    assert rows_of(f"{tmp_path}/one:train") == ROWS
    check_refused(f"{tmp_path}/one:test", "one:test", "no 'test'")
    check_refused(f"{tmp_path}/one:train[:1]", "one:train[:1]", "no 'train[:1]'")
    check_refused(f"{tmp_path}/two:train[:1]", "two:train[:1]", "no split 'train[:1]'")


# -------------------------------------------------------------------------- names of configurations

CONFIGS = """---
configs:
- config_name: main
  data_files: one/*.jsonl
- config_name: other
  data_files:
  - {split: train, path: two/*.jsonl}
  - {split: test, path: one/*.jsonl}
---
"""


@pytest.fixture
def configs(folder):
    """A folder whose README.md names two configurations."""
    write(folder / "README.md", CONFIGS)
    write(folder / "one/a.jsonl", LINES)
    write(folder / "two/a.jsonl", '{"prompt": "q"}\n')
    return str(folder)


def test_a_configuration_and_its_split(configs):
    assert rows_of(f"{configs}:main:train") == ROWS
    assert rows_of(f"{configs}:other:test") == ROWS
    assert rows_of(f"{configs}:other:train") == [{"prompt": "q"}]


@pytest.mark.parametrize("further", ["", ":main", ":train"])
def test_a_configuration_that_is_not_named(folder, configs, further):
    """One name behind the folder's is that of a split."""
    words = ["Config name is missing", "['main', 'other']", "NAME:CONFIG:SPLIT"]
    check_refused(configs + further, configs + further, *words)


def test_a_split_that_is_not_there(configs):
    check_refused(f"{configs}:main:test", 'Unknown split "test"', "['train']")


NAMES = [
    ("a/b", None, "train"),
    ("a/b:", None, "train"),
    ("a/b:test", None, "test"),
    ("a/b:main:test", "main", "test"),
    ("a/b:train[:100]", None, "train[:100]"),
    ("a/b:main:train[10%:20%]", "main", "train[10%:20%]"),
]


@pytest.mark.parametrize("spec, config, split", NAMES)
def test_a_name_is_split_at_its_colons(spec, config, split):
    assert sources.split_name(spec) == ("a/b", config, split)


def test_a_name_has_three_parts_at_most():
    check_refused("a:b:c:d", "a:b:c:d: a data set is NAME, NAME:SPLIT or NAME:CONFIG:")


def test_a_folder_with_a_colon_in_its_name(tmp_path):
    write(tmp_path / "a:b/train.jsonl", LINES)
    assert rows_of(tmp_path / "a:b") == ROWS


@pytest.mark.parametrize("name", ["../other.jsonl", "one/../../other.jsonl"])
def test_a_configuration_that_leads_elsewhere(configs, tmp_path, name):
    """Whoever wrote README.md does not choose what else of this machine is read."""
    write(tmp_path / "other.jsonl", LINES)
    write(tmp_path / "set/README.md", CONFIGS.replace("one/*.jsonl\n-", f"{name}\n-"))
    check_refused(f"{configs}:main:train", "outside the folder", "other.jsonl")


def test_links_lead_where_they_lead(folder, tmp_path):
    """The cache of the hub has them; and the folder itself may be one."""
    write(tmp_path / "blobs/1", LINES)
    folder.mkdir()
    (folder / "train.jsonl").symlink_to("../blobs/1")
    (tmp_path / "link").symlink_to(folder)
    assert rows_of(folder) == ROWS
    assert rows_of(tmp_path / "link") == ROWS


# ---------------------------------------------------------------------- what was downloaded in part

CUT = ": not a whole Parquet file; was it downloaded in part?"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"


@pytest.mark.parametrize("name", [f"data/{PART}.parquet", f"data/{PART}.parquet.incomplete"])
@pytest.mark.parametrize("length", [0, 2, 100, -9])
def test_a_part_that_is_not_whole(folder, tmp_path, name, length):
    with open(write_parquet(tmp_path / "whole.parquet"), "rb") as file:
        whole = file.read()
    path = write(folder / name, whole[:length])
    check_refused(folder, path + CUT)


def test_a_pointer_that_stands_for_a_part(folder):
    path = write(folder / f"{PART}.parquet", POINTER)
    check_refused(folder, path + CUT)


def test_a_part_that_is_missing(folder):
    first = write_parquet(folder / "data/train-00000-of-00002.parquet")
    check_refused(folder, f"{first}: only 1 of 2 such files are there")

    # Nor can a part of the split be counted.
    check_refused(f"{folder}:train[:3]", f"{first}: only 1 of 2 such files are there")

    write_parquet(folder / "data/train-00001-of-00002.parquet")
    assert rows_of(folder) == ROWS + ROWS


def test_groups_of_parts_have_numbers_of_their_own(folder):
    write(folder / "train/a-00000-of-00002.jsonl", LINES)
    write(folder / "train/a-00001-of-00002.jsonl", LINES)
    write(folder / "train/b-00000-of-00002.jsonl", LINES)
    check_refused(folder, "b-00000-of-00002.jsonl: only 1 of 2 such files are there")

    write(folder / "train/b-00001-of-00002.jsonl", LINES)
    assert rows_of(folder) == ROWS * 4


def test_the_error_of_the_library_names_its_cause(folder):
    """Two parts whose columns have other types."""
    write_parquet(folder / "train-00000-of-00002.parquet")
    write_parquet(folder / "train-00001-of-00002.parquet", [{"prompt": ["p"], "response": "r"}])
    check_refused(folder, "neither a file nor a data set that can be loaded (", "cast")


EMPTY = "doesn't contain any data files"
# (a file's name, what is in it, what the error says of a folder with no other file)
BAD_FOLDERS = [
    ("README.md", "# A data set\n", EMPTY),
    (".git/HEAD", "x", EMPTY),
    ("test.jsonl", LINES, 'Unknown split "train". Should be one of'),
    ("train.jsonl", "", "train.jsonl: the file is empty"),
    ("README.md", "---\n: : [\n---\n", "neither a file nor a data set that can be loaded"),
]


@pytest.mark.parametrize("name, text, words", BAD_FOLDERS)
def test_folders_that_are_refused(folder, name, text, words):
    write(folder / name, text)
    check_refused(folder, str(folder), words)


def test_an_empty_name_is_refused():
    check_refused("", "a data set without a name")


def test_an_empty_folder_is_refused(tmp_path):
    check_refused(str(tmp_path), str(tmp_path), EMPTY)

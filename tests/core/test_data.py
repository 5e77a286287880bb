"""nanorlhf.data: what is read, what is refused (with its file and line), how rows are held out, cut
to size and ordered.

The tests write the files that they read. Their words are w3, w4, ..., whose token ids are 3, 4, ...
"""

import gzip
import json
import math
from types import SimpleNamespace

import datasets
import pytest
from support import jsonl, refuses

import nanorlhf.data
from nanorlhf import world
from nanorlhf.data import (
    batch_indices,
    columns_for_files,
    read_rows,
)
from nanorlhf.splits import load, load_splits

GOOD = '{"prompt": "a", "response": "b"}'
GOOD_ROW = {"prompt": "a", "response": "b"}


def twenty_rows():
    rows = []
    for i in range(20):
        rows.append({"prompt": f"w{i % 7 + 3} w4", "response": f"w{i + 3}", "extra": i})
    return rows


# The rows as they stand in files: with a column too many. A row that is read keeps the data's own.
ROWS = twenty_rows()
PLAIN = [{"prompt": row["prompt"], "response": row["response"], "row": row} for row in ROWS]
# The two forms of JSON: a row on each line, or a list.
LINES = "\n".join(json.dumps(row) for row in ROWS)
LIST = json.dumps(ROWS, indent=1)


def check_refused(spec, kind, *words, columns=()):
    """read_rows() must refuse this data in one line that says all these words."""
    refuses(read_rows, str(spec), kind, columns, match=words)


# --------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "name, text", [("a.jsonl", LINES), ("a.json", LIST)], ids=["lines", "list"]
)
def test_json_is_read_plain_and_compressed(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert read_rows(str(path), "sft") == PLAIN

    compressed = tmp_path / f"{name}.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_rows(str(compressed), "sft") == PLAIN


def test_a_file_without_an_ending_is_jsonl(tmp_path):
    path = tmp_path / "no_ending"
    path.write_text(LINES)
    prompts = [{"prompt": row["prompt"], "row": row} for row in ROWS]
    assert read_rows(str(path), "prompts") == prompts


@pytest.fixture
def question_file(tmp_path):
    """One row with two columns that could be the prompt, and none that is called chosen."""
    return jsonl(tmp_path / "a.jsonl", [QUESTION])


QUESTION = {"question": "q", "prompt": "p", "good": "g", "rejected": "r"}


def test_columns_name_the_fields(question_file):
    rows = read_rows(question_file, "pairs", ["prompt=question", "chosen=good"])
    assert rows == [{"prompt": "q", "chosen": "g", "rejected": "r", "row": QUESTION}]


def test_a_field_that_is_missing_says_how_to_name_its_column(question_file):
    place = f"{question_file}:1"
    check_refused(question_file, "pairs", place, "'chosen'", "--columns chosen=")
    check_refused(question_file, "pairs", place, "'nice'", columns=["chosen=nice"])


def test_columns_name_known_fields_alone(question_file):
    check_refused(question_file, "prompts", "--columns", "respose", columns=["respose=good"])


def test_unicode_line_separators_do_not_split_rows(tmp_path):
    rows = [{"prompt": "a\u2028b\u2029c\x85d\u000b e", "response": "é\r\n x"}]
    path = tmp_path / "a.jsonl"
    jsonl(path, rows)
    # The separator stands in the file as it is, not as an escape of JSON.
    assert "\u2028" in path.read_text(encoding="utf-8")
    assert read_rows(str(path), "sft") == rows


def test_windows_line_ends_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\r\n{"prompt": "a"}\r\n  \r\n{"prompt": "b"}')
    assert read_rows(str(path), "prompts") == [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize("name, text", [("a.jsonl", GOOD), ("a.json", f"[{GOOD}]")])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_rows(str(path), "sft") == [GOOD_ROW]


# {what is wrong: (the text of a file, the line of the bad row, what the message says)}
BAD_ROWS = {
    "no JSON, in line 3": (GOOD + "\n" + GOOD + "\n{bad\n", 3, "not JSON"),
    "no JSON, in line 1": ("{bad\n", 1, "not JSON"),
    "no JSON, below a blank line": (GOOD + "\n\n{bad\n", 3, "not JSON"),
    "no JSON, below two blank lines": ("\n\n{bad\n" + GOOD, 3, "not JSON"),
    "no response": (GOOD + '\n\n\n{"prompt": "a"}', 4, "'response'"),
    "a number": (
        GOOD + '\n{"prompt": "a", "response": 5}',
        2,
        "'response' must be a string, not int",
    ),
    "null": (
        GOOD + '\n{"prompt": null, "response": "b"}',
        2,
        "'prompt' must be a string, not None",
    ),
    "a list": (f"\n{GOOD}\n[1, 2]", 3, "must be an object with prompt, response"),
    "not finite": (
        GOOD + '\n{"prompt": "a", "response": "b", "note": NaN}',
        2,
        "NaN is no finite number",
    ),
    "nested": (GOOD + "\n" + "[" * 10**5, 2, "nested too deep"),
}


@pytest.mark.parametrize("text, line, words", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_gives_its_file_and_line(tmp_path, text, line, words):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    check_refused(path, "sft", f"{path}:{line}: ", words)


def test_bad_json_files(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n "prompt": "a"\n}')
    check_refused(path, "prompts", f"{path}:1", "not JSON", "rows are one list")
    path.write_text('[{"prompt": "a"},\n {"prompt": 1}]')
    check_refused(path, "prompts", f"{path}[1]")
    path.write_text('[{"prompt": "a"},\n {"prompt" 1}]')
    check_refused(path, "prompts", f"{path}:2", "not JSON")
    path.write_text("[]")
    check_refused(path, "prompts", "no rows")


def test_a_file_that_is_missing(tmp_path):
    check_refused(tmp_path / "missing.jsonl", "sft", "missing.jsonl", "no such file")


@pytest.mark.parametrize("text", ["", "\n  \n"], ids=repr)
def test_a_file_without_a_row(tmp_path, text):
    path = tmp_path / "empty.jsonl"
    path.write_text(text)
    check_refused(path, "sft", "empty.jsonl", "empty")


def test_a_file_in_another_encoding(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "é"}'.encode("latin-1"))
    check_refused(path, "prompts", "latin.jsonl")


def test_a_gz_that_is_not_compressed(tmp_path):
    path = tmp_path / "plain.jsonl.gz"
    path.write_text(GOOD)
    check_refused(path, "sft", "plain.jsonl.gz")


def test_a_gz_that_is_cut_off(tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    compressed = gzip.compress(GOOD.encode() * 50)
    path.write_bytes(compressed[:-12])
    check_refused(path, "sft", "cut.jsonl.gz")


def test_whole_dialogues_share_their_prompt(tmp_path):
    prompt = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: a cake?\n\nAssistant:"
    # Both answers begin with "Take", which belongs to the answers and not to the prompt.
    chosen = " Take eggs."
    rejected = " Take a walk."
    own = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    path = jsonl(tmp_path / "hh.jsonl", [own])
    fields = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert read_rows(path, "pairs") == [{**fields, "row": own}]


def test_dialogues_that_share_nothing_are_no_pair(tmp_path):
    hi = "\n\nHuman: hi\n\nAssistant: a"
    ho = "\n\nHuman: ho\n\nAssistant: a"
    path = jsonl(tmp_path / "hh.jsonl", [{"chosen": hi, "rejected": ho}])
    check_refused(path, "pairs", "no field 'prompt'")


# ---------------------------------------------------------------------------- the embedded world


@pytest.fixture
def small_world(monkeypatch):
    monkeypatch.setattr(nanorlhf.data, "WORLD_SIZES", {"sft": 60, "pairs": 40})


def test_demonstrations_of_the_world(small_world):
    assert read_rows("world", "sft") == world.demonstrations(60)


def test_pairs_of_the_world_and_its_seed(small_world):
    with_seed_0 = world.preferences(40, seed=0)
    with_seed_3 = world.preferences(40, seed=3)
    assert read_rows("world", "pairs") == with_seed_0
    assert read_rows("world:0", "pairs") == with_seed_0
    assert read_rows("world:3", "pairs") == with_seed_3
    assert with_seed_3 != with_seed_0


def test_held_out_pairs_of_the_world():
    n = nanorlhf.data.WORLD_HELD_OUT
    expected = world.preferences(n, seed=3, split="test")
    assert read_rows("world:3", "pairs", split="test") == expected


@pytest.mark.parametrize("split", ["train", "test", "ood"])
def test_prompts_of_the_world(split):
    assert read_rows("world", "prompts", split=split) == world.prompts(split)


# isdigit() takes the superscript 2, and int() does not.
@pytest.mark.parametrize("seed", ["x", "\u00b2", "-1", "1.0", " 1"], ids=ascii)
def test_seeds_of_the_world_that_are_no_numbers(seed):
    check_refused(f"world:{seed}", "pairs", f"world:{seed}", "seed must be a whole number")


# ---------------------------------------------------------------------- folders that datasets wrote


@pytest.fixture(scope="module")
def datasets_folder(tmp_path_factory):
    """one/ holds ROWS; dict/ holds two splits: train, and small with the first two rows."""
    root = tmp_path_factory.mktemp("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(root / "one")
    splits = datasets.DatasetDict({"train": data, "small": data.select(range(2))})
    splits.save_to_disk(root / "dict")
    return root


def test_a_folder_and_its_splits(datasets_folder):
    assert read_rows(f"{datasets_folder}/one", "sft") == PLAIN
    assert read_rows(f"{datasets_folder}/dict", "sft") == PLAIN
    assert read_rows(f"{datasets_folder}/dict:small", "sft") == PLAIN[:2]


def test_columns_of_a_folder(datasets_folder):
    columns = ["prompt=response", "response=prompt"]
    rows = read_rows(f"{datasets_folder}/one", "sft", columns)
    assert rows[1] == {"prompt": "w4", "response": "w4 w4", "row": ROWS[1]}


def test_a_split_that_is_not_there(datasets_folder):
    check_refused(f"{datasets_folder}/dict:none", "sft", "dict:none")


def test_a_column_of_a_folder_that_is_no_text(datasets_folder):
    one = datasets_folder / "one"
    check_refused(one, "sft", "one[0]", "'extra'", "int", columns=["response=extra"])


def test_a_folder_that_datasets_did_not_write(tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    check_refused(folder, "sft", "foreign")


# ----------------------------------------------------------------------------------- holding out


def flags(dataset, **changes):
    """The flags of a script that load() reads."""
    defaults = dict(
        dataset=str(dataset), columns=(), eval_dataset="", eval_size=3, max_rows=0, seed=0
    )
    return SimpleNamespace(**(defaults | changes))


def prompts_of(rows):
    return {row["prompt"] for row in rows}


def responses_of(rows):
    return [row["response"] for row in rows]


def rows_of_prompts(prompts):
    return [{"prompt": prompt} for prompt in prompts]


def write_prompts(path, prompts):
    """A file with these prompts, all with one response; its path."""
    return jsonl(path, [{"prompt": prompt, "response": "y"} for prompt in prompts])


@pytest.fixture
def twelve_prompts(tmp_path):
    """60 rows: 12 prompts, each with five responses."""
    rows = []
    for i in range(60):
        rows.append({"prompt": f"w{i % 12}", "response": str(i)})
    return jsonl(tmp_path / "a.jsonl", rows)


def test_no_prompt_is_on_both_sides(twelve_prompts):
    rows, held_out, note = load(flags(twelve_prompts), "sft")
    train = prompts_of(rows)
    test = prompts_of(held_out)
    assert not train & test
    assert len(train | test) == 12
    # A fifth of the prompts at most is held out. Those two have ten rows, of which three are used.
    assert len(test) == 2
    assert len(rows) == 50
    assert len(held_out) == 3
    assert note == "50 demonstrations, 3 held out"


def test_training_rows_keep_their_order(twelve_prompts):
    rows, _, _ = load(flags(twelve_prompts), "sft")
    numbers = [int(response) for response in responses_of(rows)]
    assert numbers == sorted(numbers)


def test_what_is_held_out_does_not_depend_on_the_seed(twelve_prompts):
    expected = load(flags(twelve_prompts), "sft")
    assert load(flags(twelve_prompts, seed=7), "sft") == expected


def test_fewer_held_out_rows_need_fewer_prompts(twelve_prompts):
    rows, held_out, _ = load(flags(twelve_prompts, eval_size=1), "sft")
    assert len(held_out) == 1
    # One prompt of five rows is set aside.
    assert len(rows) == 55


def test_four_prompts_are_too_few_to_hold_any_out(tmp_path):
    path = jsonl(tmp_path / "b.jsonl", ROWS[:4])
    refuses(load, flags(path, eval_size=1), "sft", match=["b.jsonl", "4 different prompts"])


def rows_with_other_blanks():
    """180 rows of 18 prompts, each of which is also there with other blanks, in other rows."""
    blanks = (" ", "  ", "\n", " \t ")
    rows = []
    for i in range(180):
        indent = " " * (i % 2)
        first = blanks[i % 4]
        second = blanks[i // 4 % 4]
        prompt = f"{indent}how{first}was stay{second}{i % 18} ?\n"
        rows.append({"prompt": prompt, "response": str(i)})
    return rows


def numbers_of_prompts(rows):
    """Which of the 18 prompts these rows have."""
    return {int(response) % 18 for response in responses_of(rows)}


def test_prompts_that_differ_by_white_space_are_on_one_side(tmp_path):
    rows = rows_with_other_blanks()
    assert len(prompts_of(rows)) > 60

    path = jsonl(tmp_path / "a.jsonl", rows)
    train, held_out, note = load(flags(path, eval_size=100), "sft")
    train_numbers = numbers_of_prompts(train)
    test_numbers = numbers_of_prompts(held_out)
    assert not train_numbers & test_numbers
    assert len(test_numbers) == 3  # a fifth of 18
    assert len(train) == 150
    assert len(held_out) == 30
    assert note == "150 demonstrations, 30 held out"
    # The rows themselves are as they were written.
    for row in train + held_out:
        assert row in rows


def test_the_same_prompts_are_held_out_where_all_are_written_alike(tmp_path):
    rows = rows_with_other_blanks()
    alike = []
    for row in rows:
        prompt = " ".join(row["prompt"].split())
        alike.append({**row, "prompt": prompt})
    path = jsonl(tmp_path / "a.jsonl", rows)
    path_alike = jsonl(tmp_path / "b.jsonl", alike)

    _, held_out, _ = load(flags(path, eval_size=100), "sft")
    _, held_out_alike, _ = load(flags(path_alike, eval_size=100), "sft")
    assert responses_of(held_out_alike) == responses_of(held_out)


@pytest.fixture
def overlapping(tmp_path):
    """Flags: train on prompts 0 to 39, evaluate on 30 to 45, each twice and with other blanks.

    Prompts 30 to 39 are in both files. The file is the split 'eval' and the split 'mine', too.
    """
    numbers = [*range(30, 46)] * 2
    path = write_prompts(tmp_path / "a.jsonl", [f"w{i} x" for i in range(40)])
    other = write_prompts(tmp_path / "b.jsonl", [f"w{i}  x " for i in numbers])
    new = write_prompts(tmp_path / "c.jsonl", ["v"])
    splits = ["test", f"mine={other}", f"new={new}"]
    return flags(path, eval_dataset=other, eval_size=100, eval_splits=splits)


def test_held_out_prompts_that_are_trained_on_are_counted(overlapping):
    _, held_out, note = load_splits(overlapping, "sft")
    assert note == (
        "40 demonstrations, 32 held out, 32 in mine, 1 in new, "
        "10 of 16 held-out prompts are trained on too, "
        "10 of 16 prompts in mine are trained on too"
    )
    # They are counted, and left as they were asked for.
    assert len(held_out["eval"]) == 32


def test_only_rows_that_are_kept_count_as_trained_on(overlapping):
    overlapping.max_rows = 5
    rows, _, note = load_splits(overlapping, "sft")
    n_seen = 0
    for row in rows:
        number = int(row["prompt"].split()[0][1:])
        if number >= 30:
            n_seen += 1
    is_said = f"{n_seen} of 16 held-out prompts are trained on too" in note
    assert is_said == (n_seen > 0)


def test_no_overlap_is_not_mentioned(overlapping):
    _, _, note = load_splits(flags(overlapping.dataset), "sft")
    assert "trained on" not in note


def test_pairs_that_say_nothing_are_counted(tmp_path):
    pairs = []
    for i in range(20):
        rejected = "a" if i in (2, 5, 11) else "b"
        pairs.append({"prompt": f"p{i}", "chosen": "a", "rejected": rejected})
    path = jsonl(tmp_path / "a.jsonl", pairs)
    rows, held_out, note = load(flags(path), "pairs")
    assert len(rows + held_out) == 17
    for row in rows + held_out:
        assert row["rejected"] == "b"
    assert "3 with chosen == rejected skipped" in note
    assert "14 pairs, 3 held out" in note

    # The last eight pairs all say something.
    path = jsonl(tmp_path / "b.jsonl", pairs[12:])
    _, _, note = load(flags(path), "pairs")
    assert "skipped" not in note


@pytest.fixture
def forty_prompts(tmp_path):
    return jsonl(tmp_path / "a.jsonl", rows_of_prompts(f"w{i}" for i in range(40)))


def test_max_rows_takes_rows_from_everywhere(forty_prompts):
    everything, held_out, _ = load(flags(forty_prompts), "prompts")
    rows, same_held_out, note = load(flags(forty_prompts, max_rows=5), "prompts")
    assert len(rows) == 5
    assert same_held_out == held_out
    assert note.startswith("5 prompts")
    # In their order, each once, and not simply the first five.
    places = [everything.index(row) for row in rows]
    assert places == sorted(set(places))
    assert places != list(range(5))


def test_max_rows_does_not_depend_on_the_seed(forty_prompts):
    rows, _, _ = load(flags(forty_prompts, max_rows=5), "prompts")
    rows_of_seed_3, _, _ = load(flags(forty_prompts, max_rows=5, seed=3), "prompts")
    assert rows_of_seed_3 == rows


def test_more_max_rows_than_there_are_takes_all(forty_prompts):
    rows, _, _ = load(flags(forty_prompts, max_rows=5000), "prompts")
    assert len(rows) == 37


def test_another_evaluation_set(forty_prompts, tmp_path):
    other = jsonl(tmp_path / "b.jsonl", rows_of_prompts(f"v{i}" for i in range(9)))
    rows, held_out, _ = load(flags(forty_prompts, eval_dataset=other, eval_size=4), "prompts")
    assert len(rows) == 40
    assert len(held_out) == 4
    for row in held_out:
        assert row["prompt"].startswith("v")


def test_the_world_holds_out_its_own_test_prompts():
    rows, held_out, _ = load(flags("world", eval_size=50), "prompts")
    test = world.prompts("test")
    assert rows == world.prompts("train")
    assert len(held_out) == 50
    for row in held_out:
        assert row in test
    assert held_out != test[:50]


def test_the_world_holds_out_its_own_test_pairs(small_world):
    rows, held_out, _ = load(flags("world:3", eval_size=20), "pairs")
    test = world.preferences(512, seed=3, split="test")
    assert rows == world.preferences(40, seed=3)
    for row in held_out:
        assert row in test


def test_demonstrations_of_the_world_are_held_out_by_prompt(small_world):
    rows, held_out, _ = load(flags("world"), "sft")
    assert len(held_out) == 3
    assert not prompts_of(rows) & prompts_of(held_out)


# ----------------------------------------------------------------------------------------- order


def visit(n, batch_size, n_steps, seed):
    """The rows that so many steps visit, one behind the other."""
    order = []
    for step in range(n_steps):
        order.extend(batch_indices(n, batch_size, step, seed))
    return order


def whole_epochs(n, batch_size, seed):
    """The rows that are visited until steps and epochs have ended together three times: [[n]]."""
    n_steps = 3 * math.lcm(n, batch_size) // batch_size
    order = visit(n, batch_size, n_steps, seed)
    return [order[i : i + n] for i in range(0, len(order), n)]


@pytest.mark.parametrize("n, batch_size", [(10, 5), (10, 3), (4, 7), (1, 2)])
def test_every_epoch_is_a_permutation(n, batch_size):
    epochs = whole_epochs(n, batch_size, seed=5)
    assert len(epochs) >= 3
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))


@pytest.mark.parametrize("batch_size", [5, 3])
def test_every_epoch_has_an_order_of_its_own(batch_size):
    epochs = whole_epochs(10, batch_size, seed=5)
    distinct = set(map(tuple, epochs))
    assert len(distinct) == len(epochs)


@pytest.mark.parametrize("batch_size", [5, 3])
def test_another_seed_has_other_orders(batch_size):
    assert whole_epochs(10, batch_size, seed=5) != whole_epochs(10, batch_size, seed=6)


def test_batches_hold_no_state():
    forwards = [batch_indices(10, 4, step, 0) for step in range(9)]
    backwards = [batch_indices(10, 4, step, 0) for step in reversed(range(9))]
    assert forwards == backwards[::-1]
    for batch in forwards:
        assert len(batch) == 4


def test_the_order_does_not_depend_on_the_batch_size():
    by_fours = visit(10, 4, 3, seed=0)
    by_fives = visit(10, 5, 2, seed=0)
    assert by_fours[:10] == by_fives


def test_indices_are_plain_numbers():
    for index in batch_indices(10, 4, 2, seed=0):
        assert type(index) is int


def test_columns_that_json_cannot_hold_stay_out_of_files_of_answers():
    """Python would write NaN, and no reader of JSON would take the file."""
    own = {"prompt": "p", "nan": float("nan"), "list": [float("inf")], "bytes": b"b", "id": 3}
    assert columns_for_files({"prompt": "p", "row": own}) == {"row": {"prompt": "p", "id": 3}}
    assert columns_for_files({"prompt": "p"}) == {}

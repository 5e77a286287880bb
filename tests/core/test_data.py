"""nanorlhf.data: what is read, what is refused (with file and line), how rows are held out, cut to size and ordered."""

import gzip
import json
import math
from types import SimpleNamespace

import datasets
import pytest
from support import EOS, jsonl, refuses, word_tokenizer

import nanorlhf.data
from nanorlhf import world
from nanorlhf.data import (
    batch_indices,
    cut_left,
    encode,
    encode_prompts,
    encode_responses,
    fit,
    read_rows,
    ready_prompts,
)
from nanorlhf.errors import InputError
from nanorlhf.splits import load, load_splits

ROWS = [{"prompt": f"w{i % 7 + 3} w4", "response": f"w{i + 3}", "extra": i} for i in range(20)]
PLAIN = [{"prompt": r["prompt"], "response": r["response"]} for r in ROWS]


def config(dataset, **kwargs):
    defaults = dict(
        dataset=str(dataset), columns=(), eval_dataset="", eval_size=3, max_rows=0, seed=0
    )
    return SimpleNamespace(**defaults | kwargs)


# ------------------------------------------------------------------------------------------------------------------------- reading


def test_jsonl_json_and_gz(tmp_path):
    assert read_rows(jsonl(tmp_path / "a.jsonl", ROWS), "sft") == PLAIN
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1))
    assert read_rows(str(tmp_path / "b.json"), "sft") == PLAIN
    for name in ("a.jsonl", "b.json"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        assert read_rows(str(tmp_path / f"{name}.gz"), "sft") == PLAIN
    (tmp_path / "no_ending").write_text((tmp_path / "a.jsonl").read_text())
    assert read_rows(str(tmp_path / "no_ending"), "prompts") == [
        {"prompt": r["prompt"]} for r in ROWS
    ]


def test_columns(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl", [{"question": "q", "prompt": "p", "good": "g", "rejected": "r"}]
    )
    columns = ["prompt=question", "chosen=good"]
    assert read_rows(path, "pairs", columns) == [{"prompt": "q", "chosen": "g", "rejected": "r"}]
    refuses(read_rows, path, "pairs", match=[path + ":1", "'chosen'", "--columns chosen="])
    refuses(read_rows, path, "pairs", ["chosen=nice"], match=[path + ":1", "'nice'"])
    refuses(read_rows, path, "prompts", ["respose=good"], match=["--columns", "respose"])


def test_unicode_line_separators_do_not_split_rows(tmp_path):
    rows = [{"prompt": "a\u2028b\u2029c\x85d\u000b e", "response": "é\r\n x"}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    assert "\u2028" in open(path, encoding="utf-8").read()
    assert read_rows(path, "sft") == rows


def test_windows_line_ends_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\r\n{"prompt": "a"}\r\n  \r\n{"prompt": "b"}')
    assert read_rows(str(path), "prompts") == [{"prompt": "a"}, {"prompt": "b"}]


GOOD = '{"prompt": "a", "response": "b"}'


@pytest.mark.parametrize("text, line, words", [
    (f"{GOOD}\n{GOOD}\n{{bad\n", 3, ["not JSON"]),
    ("{bad\n", 1, ["not JSON"]),
    pytest.param(f"{GOOD}\n\n{{bad\n", 3, ["not JSON"]),
    pytest.param(f"\n\n{{bad\n{GOOD}\n", 3, ["not JSON"]),
    (f"{GOOD}\n\n\n" + '{"prompt": "a"}', 4, ["'response'"]),
    (f"{GOOD}\n" + '{"prompt": "a", "response": 5}', 2, ["'response'", "string", "int"]),
    (f"{GOOD}\n" + '{"prompt": null, "response": "b"}', 2, ["'prompt'", "NoneType"]),
    (f"\n{GOOD}\n[1, 2]", 3, ["object", "prompt, response"]),
    (f"{GOOD}\n" + '{"prompt": "a", "response": "\\ud800"}', 2, ["half of a character"]),
    (f"{GOOD}\n" + '{"prompt": "a", "response": "b", "note": NaN}', 2, ["NaN is no finite number"]),
    (f"{GOOD}\n" + "[" * 10**5, 2, ["nested too deep"]),
])  # fmt: skip
def test_a_bad_row_gives_its_file_and_line(tmp_path, text, line, words):
    (tmp_path / "a.jsonl").write_text(text)
    refuses(
        read_rows, str(tmp_path / "a.jsonl"), "sft", match=[f"{tmp_path}/a.jsonl:{line}: ", *words]
    )


def test_bad_json_files(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"prompt": "a"}')
    refuses(read_rows, str(path), "prompts", match=[str(path), "list"])
    path.write_text('[{"prompt": "a"},\n {"prompt": 1}]')
    refuses(read_rows, str(path), "prompts", match=[f"{path}[1]"])
    path.write_text('[{"prompt": "a"},\n {"prompt" 1}]')
    refuses(read_rows, str(path), "prompts", match=[f"{path}:2", "not JSON"])
    path.write_text("[]")
    refuses(read_rows, str(path), "prompts", match=["no rows"])


def test_files_that_cannot_be_read(tmp_path):
    refuses(
        read_rows, str(tmp_path / "missing.jsonl"), "sft", match=["missing.jsonl", "no such file"]
    )
    for text in ("", "\n  \n"):
        (tmp_path / "empty.jsonl").write_text(text)
        refuses(read_rows, str(tmp_path / "empty.jsonl"), "sft", match=["empty.jsonl", "empty"])
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    refuses(read_rows, str(tmp_path / "latin.jsonl"), "prompts", match=["latin.jsonl"])
    (tmp_path / "plain.jsonl.gz").write_text(GOOD)
    refuses(read_rows, str(tmp_path / "plain.jsonl.gz"), "sft", match=["plain.jsonl.gz"])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 50)[:-12])
    refuses(read_rows, str(tmp_path / "cut.jsonl.gz"), "sft", match=["cut.jsonl.gz"])


def test_the_embedded_world(monkeypatch):
    monkeypatch.setattr(nanorlhf.data, "WORLD_SIZES", {"sft": 30, "pairs": 40})
    assert read_rows("world", "sft") == world.demonstrations(30)
    assert (
        read_rows("world", "pairs")
        == read_rows("world:0", "pairs")
        == world.preferences(40, seed=0)
    )
    assert (
        read_rows("world:3", "pairs")
        == world.preferences(40, seed=3)
        != world.preferences(40, seed=0)
    )
    assert read_rows("world:3", "pairs", split="test") == world.preferences(
        512, seed=3, split="test"
    )
    for split in ("train", "test", "ood"):
        assert read_rows("world", "prompts", split=split) == world.prompts(split)
    refuses(read_rows, "world:x", "pairs", match=["world:x", "seed"])
    refuses(read_rows, "world:-1", "pairs", match=["world:-1"])


def test_a_folder_written_by_datasets(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "small": data.select(range(2))}).save_to_disk(
        tmp_path / "dict"
    )
    assert read_rows(str(tmp_path / "one"), "sft") == PLAIN
    assert read_rows(str(tmp_path / "dict"), "sft") == PLAIN
    assert read_rows(f"{tmp_path}/dict:small", "sft") == PLAIN[:2]
    assert read_rows(str(tmp_path / "one"), "sft", ["prompt=response", "response=prompt"])[1] == {
        "prompt": "w4",
        "response": "w4 w4",
    }
    refuses(read_rows, f"{tmp_path}/dict:none", "sft", match=["dict:none"])
    refuses(
        read_rows,
        str(tmp_path / "one"),
        "sft",
        ["response=extra"],
        match=["one[0]", "'extra'", "int"],
    )
    (tmp_path / "foreign").mkdir()
    refuses(read_rows, str(tmp_path / "foreign"), "sft", match=["foreign"])


# ---------------------------------------------------------------------------------------------------------------------- holding out


def test_no_prompt_is_on_both_sides(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl", [{"prompt": f"w{i % 12}", "response": f"{i}"} for i in range(60)]
    )
    rows, held_out, note = load(config(path), "sft")
    train, test = {r["prompt"] for r in rows}, {r["prompt"] for r in held_out}
    assert (
        len(train | test) == 12 and not train & test and len(test) == 2
    )  # a fifth of the prompts at most
    assert len(rows) == 50 and len(held_out) == 3 and note == "50 sft rows, 3 held out"
    assert [r["response"] for r in rows] == sorted((r["response"] for r in rows), key=int)
    assert load(config(path, seed=7), "sft") == (rows, held_out, note)
    one = load(config(path, eval_size=1), "sft")
    assert len(one[1]) == 1 and len(one[0]) == 55
    refuses(
        load,
        config(jsonl(tmp_path / "b.jsonl", ROWS[:4]), eval_size=1),
        "sft",
        match=["b.jsonl", "4 different prompts"],
    )


def test_prompts_that_differ_by_white_space_are_one(tmp_path):
    """Each prompt is also there with other blanks, in other rows: all of them are on one side."""
    blanks = (" ", "  ", "\n", " \t ")
    rows = [
        {
            "prompt": f"{' ' * (i % 2)}how{blanks[i % 4]}was stay{blanks[i // 4 % 4]}{i % 18} ?\n",
            "response": f"{i}",
        }
        for i in range(180)
    ]
    assert len({r["prompt"] for r in rows}) > 60
    train, held_out, note = load(config(jsonl(tmp_path / "a.jsonl", rows), eval_size=100), "sft")
    numbers = [{int(r["response"]) % 18 for r in part} for part in (train, held_out)]
    assert not numbers[0] & numbers[1] and len(numbers[1]) == 3  # a fifth of 18
    assert (len(train), len(held_out), note) == (150, 30, "150 sft rows, 30 held out")
    assert all(r in rows for r in train + held_out)  # the rows themselves are as they were written
    # The same prompts are held out as where all are written alike.
    alike = [{**r, "prompt": " ".join(r["prompt"].split())} for r in rows]
    same = load(config(jsonl(tmp_path / "b.jsonl", alike), eval_size=100), "sft")
    assert [r["response"] for r in same[1]] == [r["response"] for r in held_out]


def test_held_out_prompts_that_are_trained_on_are_counted(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": f"w{i} x", "response": "y"} for i in range(40)])
    other = [
        {"prompt": f"w{i}  x ", "response": "y"} for i in range(30, 46)
    ] * 2  # ten of sixteen, each twice
    other = jsonl(tmp_path / "b.jsonl", other)
    named = [
        "test",
        f"mine={other}",
        f"new={jsonl(tmp_path / 'c.jsonl', [{'prompt': 'v', 'response': 'y'}])}",
    ]
    flags = dict(eval_dataset=other, eval_size=100, eval_splits=named)
    _, held_out, note = load_splits(config(path, **flags), "sft")
    assert note == ("40 sft rows, 32 held out, 32 in mine, 1 in new, 10 of 16 held-out prompts are trained on too, "
                    "10 of 16 prompts in mine are trained on too")  # fmt: skip
    assert len(held_out["eval"]) == 32  # said, and left as it was asked for
    few, _, note = load_splits(config(path, **flags, max_rows=5), "sft")
    seen = sum(int(r["prompt"].split()[0][1:]) >= 30 for r in few)
    assert (f"{seen} of 16 held-out prompts are trained on too" in note) == (seen > 0)
    assert "trained on" not in load_splits(config(path, eval_size=3), "sft")[2]


def test_pairs_that_say_nothing_are_counted(tmp_path):
    pairs = [
        {"prompt": f"p{i}", "chosen": "a", "rejected": "a" if i in (2, 5, 11) else "b"}
        for i in range(20)
    ]
    rows, held_out, note = load(config(jsonl(tmp_path / "a.jsonl", pairs)), "pairs")
    assert len(rows) + len(held_out) == 17 and all(r["rejected"] == "b" for r in rows + held_out)
    assert "3 with chosen == rejected skipped" in note and "14 pairs rows, 3 held out" in note
    assert "skipped" not in load(config(jsonl(tmp_path / "b.jsonl", pairs[12:])), "pairs")[2]


def test_max_rows_and_another_evaluation_set(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": f"w{i}"} for i in range(40)])
    other = jsonl(tmp_path / "b.jsonl", [{"prompt": f"v{i}"} for i in range(9)])
    everything, held_out, _ = load(config(path), "prompts")
    rows, same, note = load(config(path, max_rows=5), "prompts")
    assert len(rows) == 5 and same == held_out and note.startswith("5 prompts rows")
    places = [everything.index(r) for r in rows]
    assert places == sorted(set(places)) and places != list(range(5))
    assert load(config(path, max_rows=5, seed=3), "prompts")[0] == rows
    assert len(load(config(path, max_rows=5000), "prompts")[0]) == 37
    rows, held_out, _ = load(config(path, eval_dataset=other, eval_size=4), "prompts")
    assert (
        len(rows) == 40
        and len(held_out) == 4
        and all(r["prompt"].startswith("v") for r in held_out)
    )


def test_the_world_holds_out_its_own_test_prompts(monkeypatch):
    monkeypatch.setattr(nanorlhf.data, "WORLD_SIZES", {"sft": 60, "pairs": 40})
    rows, held_out, _ = load(config("world", eval_size=50), "prompts")
    assert rows == world.prompts("train") and len(held_out) == 50
    test = world.prompts("test")
    assert all(r in test for r in held_out) and held_out != test[:50]
    rows, held_out, _ = load(config("world:3", eval_size=20), "pairs")
    assert rows == world.preferences(40, seed=3) and all(
        r in world.preferences(512, seed=3, split="test") for r in held_out
    )
    rows, held_out, _ = load(config("world"), "sft")
    assert len(held_out) == 3 and not {r["prompt"] for r in rows} & {r["prompt"] for r in held_out}


# ---------------------------------------------------------------------------------------------------------------------- tokenising


def test_fit_by_hand():
    p, r = [1, 2, 3, 4], [5, 6, 7]
    assert fit(p, r, 9) == fit(p, r, 7) == (p, r, False)
    assert fit(p, r, 6) == ([2, 3, 4], r, False)
    assert fit(p, r, 4) == ([4], r, False)
    assert fit(p, r, 3) == ([4], [5, 6], True)  # a prompt keeps one token


def test_left_truncation_keeps_a_bos():
    p, r = [0, 1, 2, 3, 4], [5, 6, 7]
    assert fit(p, r, 8, 0) == (p, r, False)
    assert fit(p, r, 7, 0) == ([0, 2, 3, 4], r, False)
    assert fit(p, r, 5, 0) == ([0, 4], r, False)
    assert fit(p, r, 4, 0) == ([0], r, False)
    assert fit(p, r, 3, 0) == ([0], [5, 6], True)
    assert (
        fit(p, r, 5, 1) == fit(p, r, 5) == ([3, 4], r, False)
    )  # in front of this text stands no BOS
    for room in range(1, 7):
        kept = cut_left(p, room, 0)
        assert kept == [0, *p[1:][max(0, 5 - room) :]] and len(kept) == min(room, 5)


def test_a_bos_stays_in_front_of_every_cut_prompt():
    """A tokenizer that writes one, wherever prompts are cut: in training data, in rollouts, and in a chat template's text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer(bos_token="w3")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w3 $A", special_tokens=[("w3", 3)]
    )
    rows = [{"prompt": "w5 w6 w7 w8", "response": "w9"}, {"prompt": "w5", "response": "w9"}]
    prompts, responses, _ = encode(tokenizer, rows, "response", max_length=5)
    assert prompts == [[3, 7, 8], [3, 5]] and responses == [[9, EOS]] * 2
    assert ready_prompts(tokenizer, rows, SimpleNamespace(), 8, 3) == [[3, 7, 8], [3, 5]]
    assert ready_prompts(tokenizer, rows, SimpleNamespace(), 8, 0) == [[3, 5, 6, 7, 8], [3, 5]]
    tokenizer.chat_template = "{{ bos_token }} w20 {{ messages[0]['content'] }} w21"
    assert ready_prompts(tokenizer, rows, SimpleNamespace(), 8, 3, chat=True) == [
        [3, 8, 21],
        [3, 5, 21],
    ]


def test_encode_keeps_the_response_and_its_eos():
    tokenizer = word_tokenizer()
    rows = [
        {"prompt": "w5 w6 w7 w8", "response": "w9"},
        {"prompt": "w5", "response": "w9 w10 w11 w12 w13"},
        {"prompt": "w5", "response": ""},
    ]
    assert encode(tokenizer, rows, "response") == (
        [[5, 6, 7, 8], [5], [5]],
        [[9, EOS], [9, 10, 11, 12, 13, EOS], [EOS]],
        0,
    )
    prompts, responses, cut = encode(tokenizer, rows, "response", max_length=5)
    assert (
        prompts == [[6, 7, 8], [5], [5]]
        and responses == [[9, EOS], [9, 10, 11, 12], [EOS]]
        and cut == 1
    )
    assert encode(
        tokenizer, [{"prompt": "w5", "chosen": "w6", "rejected": "w7"}], "rejected", 9
    ) == ([[5]], [[7, EOS]], 0)
    assert encode_responses(tokenizer, []) == [] and encode_prompts(tokenizer, []) == []


def test_bos_goes_in_front_of_prompts_only():
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer(bos_token="w3")
    refuses(encode_prompts, word_tokenizer(), ["w5", ""], match=["empty prompt", "BOS"])
    assert encode_prompts(tokenizer, ["w5", ""]) == [[5], [3]]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w3 $A", special_tokens=[("w3", 3)]
    )
    assert encode_prompts(tokenizer, ["w5", ""]) == [[3, 5], [3]]
    assert encode_responses(tokenizer, ["w5"]) == [[5, EOS]]


def test_ready_prompts():
    tokenizer, model = word_tokenizer(), SimpleNamespace(max_position_embeddings=10)
    rows = [{"prompt": "w4 w5"}, {"prompt": "w4 w5 w6 w7 w8"}]
    assert ready_prompts(tokenizer, rows, model, 5) == [[4, 5], [4, 5, 6, 7, 8]]
    assert ready_prompts(tokenizer, rows, model, 7, max_prompt_length=3) == [[4, 5], [6, 7, 8]]
    refuses(
        ready_prompts,
        tokenizer,
        rows,
        model,
        6,
        match=["5 tokens", "6 new", "10", "--max_prompt_length", "w4 w5 w6"],
    )
    refuses(ready_prompts, tokenizer, rows, model, 8, 3, match=["3 tokens"])
    assert len(ready_prompts(tokenizer, rows, SimpleNamespace(), 10**6)) == 2  # no limit is named


# --------------------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("n, size", [(10, 5), (10, 3), (4, 7), (1, 2)])
def test_every_epoch_is_a_permutation(n, size):
    steps = math.lcm(n, size) // size * 3
    order = [i for step in range(steps) for i in batch_indices(n, size, step, seed=5)]
    epochs = [order[i : i + n] for i in range(0, len(order), n)]
    assert len(epochs) >= 3 and all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 5 or len({tuple(e) for e in epochs}) == len(epochs)  # each in its own order
    assert n < 5 or order != [
        i for step in range(steps) for i in batch_indices(n, size, step, seed=6)
    ]


def test_batches_hold_no_state():
    there = [batch_indices(10, 4, step, 0) for step in range(9)]
    back = [batch_indices(10, 4, step, 0) for step in reversed(range(9))]
    assert there == back[::-1] and all(len(b) == 4 for b in there)
    assert sum(there, [])[:10] == sum(
        (batch_indices(10, 5, step, 0) for step in range(2)), []
    )  # whatever the batch size
    assert all(type(i) is int for i in there[2])


def test_whole_dialogues_share_their_prompt(tmp_path):
    path = tmp_path / "hh.jsonl"
    path.write_text(json.dumps({
        "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: a cake?\n\nAssistant: Take eggs.",
        "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: a cake?\n\nAssistant: Take a walk.",
    }) + "\n")  # fmt: skip
    prompt = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: a cake?\n\nAssistant:"
    assert read_rows(str(path), "pairs") == [
        {"prompt": prompt, "chosen": " Take eggs.", "rejected": " Take a walk."}
    ]
    path.write_text(
        json.dumps(
            {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: ho\n\nAssistant: a"}
        )
        + "\n"
    )
    with pytest.raises(
        InputError, match="no field 'prompt'"
    ):  # nothing shared: not a pair of answers
        read_rows(str(path), "pairs")


def test_chat_template():
    tokenizer = word_tokenizer()
    with pytest.raises(InputError, match="--chat_template"):
        encode_prompts(tokenizer, ["w5 w6"], chat=True)
    tokenizer.chat_template = "{% for m in messages %}w3 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w4{% endif %}"
    assert encode_prompts(tokenizer, ["w5 w6", "w7"], chat=True) == [[3, 5, 6, 4], [3, 7, 4]]
    rows = [{"prompt": "w5", "response": "w9"}]
    assert encode(tokenizer, rows, "response", chat=True) == ([[3, 5, 4]], [[9, EOS]], 0)
    assert ready_prompts(tokenizer, rows, SimpleNamespace(), 4, chat=True) == [[3, 5, 4]]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[" + GOOD.encode() + b"]")
    for name in ("a.jsonl", "a.json"):
        assert read_rows(str(tmp_path / name), "sft") == [{"prompt": "a", "response": "b"}]


def test_seeds_of_the_world_that_are_no_numbers():
    for seed in (
        "x",
        "\u00b2",
        "-1",
        "1.0",
        " 1",
    ):  # isdigit() takes a superscript 2, and int() does not
        refuses(read_rows, f"world:{seed}", "pairs", match=["must be a whole number"])

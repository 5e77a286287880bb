"""nanorlhf.splits and data.load_splits: formats of prompts, what is in distribution, what each named split holds, and what is refused."""

import io
import json

import pytest
import torch
from support import jsonl, refuses

import nanorlhf.data
import sample_bon
from nanorlhf import splits, world
from nanorlhf.data import read_rows
from nanorlhf.runtime.distributed import Dist
from nanorlhf.runtime.flags import RunConfig
from nanorlhf.runtime.log import RunFolder
from nanorlhf.splits import load, load_splits

POST = {
    "subreddit": "tifu",
    "title": "By {trusting} a cat",
    "post": "It purred.\nThen it bit.",
    "summary": " Cats bite. ",
}
TLDR = "SUBREDDIT: r/tifu\nTITLE: By {trusting} a cat\nPOST: It purred.\nThen it bit.\nTL;DR:"
NEWS = {"article": "(CNN) It rained.", "highlights": "Rain .", "id": 5}
SUBREDDITS = ["tifu", "AskReddit", "cats", "dogs"]
# Three rows a prompt; every fourth prompt has a row in another subreddit than its other two.
ROWS = [{"prompt": f"p{i // 3}", "response": "w " * (i % 5 + 1) + str(i), "subreddit": SUBREDDITS[(i // 3 + (i % 12 == 2)) % 4]}
        for i in range(180)]  # fmt: skip


def config(dataset, **changes):
    """A training script's flags."""
    return RunConfig(**{"dataset": str(dataset), "eval_size": 9} | changes)


# ------------------------------------------------------------------------------------------------------------------------- formats


def test_tldr(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [POST])
    assert read_rows(path, "sft", prompt_format="tldr") == [
        {"prompt": TLDR, "response": " Cats bite."}
    ]
    assert read_rows(path, "prompts", prompt_format="tldr") == [{"prompt": TLDR}]
    path = jsonl(tmp_path / "b.jsonl", [{**POST, "label": "x", "chosen": "a", "rejected": " b\n"}])
    assert read_rows(path, "sft", ["summary=label"], prompt_format="tldr") == [
        {"prompt": TLDR, "response": " x"}
    ]
    assert read_rows(path, "pairs", prompt_format="tldr") == [
        {"prompt": TLDR, "chosen": " a", "rejected": " b"}
    ]


def test_cnn_dm(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [NEWS])
    assert read_rows(path, "sft", prompt_format="cnn_dm") == [
        {"prompt": "ARTICLE: (CNN) It rained.\nTL;DR:", "response": " Rain ."}
    ]
    refuses(
        read_rows,
        path,
        "sft",
        prompt_format="tldr",
        match=[f"{path}:1", "no field 'subreddit'", "--columns subreddit=COLUMN"],
    )
    refuses(
        read_rows,
        path,
        "sft",
        ["highlights=id"],
        prompt_format="cnn_dm",
        match=[f"{path}:1", "'id' must be a string, not int"],
    )
    refuses(
        read_rows,
        path,
        "sft",
        ["prompt=article"],
        prompt_format="cnn_dm",
        match=["--columns names prompt", "article, highlights"],
    )
    refuses(
        read_rows,
        path,
        "sft",
        prompt_format="xsum",
        match=["--prompt_format must be one of tldr, cnn_dm, not 'xsum'"],
    )


# ---------------------------------------------------------------------------------------------------------------------- predicates


def held(where, rows):
    return [i for i, row in enumerate(rows) if splits.predicate(where)("a.jsonl:1", row)]


def test_predicates(tmp_path):
    (tmp_path / "my.py").write_text(
        "long = lambda row: len(row['t']) > 3\nword = lambda row: 'yes'\nfails = lambda row: row['u']\n"
    )
    rows = [
        {"t": "a", "n": 1},
        {"t": " a b\n\nc ", "n": 2},
        {"t": "a b c d", "n": True},
        {"t": "", "n": "x=y"},
    ]
    assert held("", rows) == [0, 1, 2, 3]
    assert (
        held("t=a", rows) == [0]
        and held("n=1, x=y", rows) == [0, 3]
        and held("n=True,2", rows) == [1, 2]
    )
    for sign, expected in (("<=", [0, 1, 3]), ("<", [0, 3]), (">=", [1, 2]), (">", [2])):
        assert held(f"words:t{sign}3", rows) == expected
    assert held(f"{tmp_path}/my.py:long", rows) == [1, 2]
    for where, words in {
        "u=1": ["a.jsonl:1", "no field 'u'", "--in_distribution u=1"],
        "words:u<=3": ["a.jsonl:1", "no field 'u'"],
        "words:n<=3": ["a.jsonl:1", "'n' must be a string"],
        f"{tmp_path}/my.py:word": ["a.jsonl:1", "must return True or False, not 'yes'"],
        f"{tmp_path}/my.py:fails": ["a.jsonl:1", "raised KeyError: 'u'"],
        f"{tmp_path}/my.py:none": ["it defines no function 'none'"],
        f"{tmp_path}/other.py:long": ["other.py: no such file"],
        **{
            wrong: ["--in_distribution takes", repr(wrong)]
            for wrong in ("t", "t=", "=a", "words:t=3", "words:t<=many")
        },
    }.items():
        refuses(held, where, rows, match=words)


def test_a_predicate_gets_a_row_of_its_own(tmp_path):
    """Whatever it does to the row, and to what is in it, the data stay as they are."""
    spoils = "def f(row):\n    row['t'] = 'x'\n    row['more'].clear()\n    return True\n"
    (tmp_path / "my.py").write_text(spoils + "async def g(row): return True\n")
    row = {"t": "a", "more": [1]}
    assert splits.predicate(f"{tmp_path}/my.py:f")("a.jsonl:1", row) and row == {
        "t": "a",
        "more": [1],
    }
    refuses(splits.predicate, f"{tmp_path}/my.py:g", match=["g is an async function"])


@pytest.mark.parametrize(
    "statement, words",
    [("sys.exit(0)", "SystemExit: 0"), ("exit()", "SystemExit"), ("raise GeneratorExit", "Gen")],
)
def test_a_predicate_that_ends_the_process(tmp_path, monkeypatch, statement, words):
    monkeypatch.setattr("sys.stdin", io.StringIO())  # which exit() closes
    (tmp_path / "my.py").write_text(f"import sys\ndef f(row):\n    {statement}\n")
    refuses(held, f"{tmp_path}/my.py:f", [{"t": "a"}], match=["a.jsonl:1", f"raised {words}"])
    (tmp_path / "at_import.py").write_text(f"import sys\n{statement}\n")
    refuses(
        held,
        f"{tmp_path}/at_import.py:f",
        [{"t": "a"}],
        match=["at_import.py: cannot be imported", words],
    )


# -------------------------------------------------------------------------------------------------------------------- what splits hold


def test_by_a_column(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    inside = {row["response"] for row in ROWS if row["subreddit"] in ("tifu", "cats")}
    flags = {"in_distribution": "subreddit=tifu,cats"}
    rows, held_out, note = load_splits(config(path, eval_splits=["test", "ood"], **flags), "sft")
    train, test, ood = (
        {row["response"] for row in part} for part in (rows, held_out["eval"], held_out["ood"])
    )
    assert train | test <= inside and not ood & inside and len(test) == len(ood) == 9
    asked = [{row["prompt"] for row in part} for part in (rows, held_out["eval"], held_out["ood"])]
    assert not asked[0] & asked[1] and not asked[0] & asked[2]
    seen = [row for row in ROWS if row["response"] not in inside and row["prompt"] in asked[0]]
    assert len(inside) == 75 and 5 < len(seen) < 20  # the prompts with a row on either side
    assert note == (f"{len(rows)} sft rows, 9 held out, 9 in ood, 105 out of distribution left out ({len(seen)} of them with prompts that "
                    "are trained on, so they are not in ood either)")  # fmt: skip
    everything = load_splits(config(path, eval_splits=["ood"], eval_size=500, **flags), "sft")[1][
        "eval"
    ]
    assert 80 < len(everything) < 105 and {row["response"] for row in ROWS} - inside > {
        row["response"] for row in everything
    }
    # Neither the splits that are asked for nor the seed change another split.
    assert load(config(path, seed=5, **flags), "sft")[:2] == (rows, held_out["eval"])
    rows_, both, note = load_splits(
        config(path, eval_splits=["ood", "test"], max_rows=4, **flags), "sft"
    )
    assert both == {"eval": held_out["ood"], "test": held_out["eval"]} and len(rows_) == 4
    assert note.startswith("4 sft rows, 9 in ood, 9 held out")


def test_an_evaluation_set_has_its_own_ood(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    other = [{"prompt": f"q{i}", "response": "v " * i} for i in range(8)] + [
        {"prompt": "p0", "response": "v v v v v v"}
    ]
    changes = {
        "in_distribution": "words:response<=4",
        "eval_dataset": jsonl(tmp_path / "b.jsonl", other),
        "eval_splits": ["test", "ood"],
    }
    rows, held_out, note = load_splits(config(path, **changes), "sft")
    assert sorted(row["prompt"] for row in held_out["eval"]) == ["q0", "q1", "q2", "q3", "q4"]
    assert sorted(row["prompt"] for row in held_out["ood"]) == ["p0", "q5", "q6", "q7"]
    assert [row["response"] for row in rows] == [
        row["response"] for i, row in enumerate(ROWS) if i % 5 < 3
    ]
    assert note == ("108 sft rows, 5 held out, 4 in ood, 72 out of distribution left out, "
                    "1 of 4 prompts in ood are trained on too")  # fmt: skip
    assert len(load_splits(config(path, **changes | {"eval_size": 2}), "sft")[1]["ood"]) == 2


def test_fields_and_columns_in_a_predicate(tmp_path):
    """By the data's own names and, where it has no such column, by the fields' names: here the prompt that two dialogues share."""
    asked = [f"\n\nHuman: {'why ' * i}\n\nAssistant:" for i in range(1, 20)]
    pairs = [{"chosen": f"{text} a", "rejected": f"{text} b"} for text in asked]
    rows, held_out, _ = load_splits(
        config(jsonl(tmp_path / "a.jsonl", pairs), in_distribution="words:prompt<=8"), "pairs"
    )
    assert {row["prompt"].count("why") for row in rows + held_out["eval"]} == set(
        range(1, 7)
    )  # Human:, Assistant: and up to six
    path = jsonl(
        tmp_path / "b.jsonl",
        [{"prompt": "a" if i % 2 else "b", "question": f"q{i}"} for i in range(40)],
    )
    rows, held_out, _ = load_splits(
        config(path, columns=["prompt=question"], in_distribution="prompt=a"), "prompts"
    )
    assert {row["prompt"] for row in rows + held_out["eval"]} == {f"q{i}" for i in range(1, 40, 2)}


def test_files_as_splits(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{**POST, "title": str(i)} for i in range(30)])
    news, plain = jsonl(tmp_path / "news.jsonl", [NEWS] * 3), jsonl(tmp_path / "plain.jsonl", ROWS)
    more = jsonl(tmp_path / "more.jsonl", [{**POST, "title": "more"}])
    named = ["test", f"cnn=cnn_dm:{news}", f"mine=:{plain}", f"more={more}"]
    _, held_out, note = load_splits(
        config(path, prompt_format="tldr", eval_splits=named, in_distribution="subreddit=tifu"),
        "sft",
    )
    assert (
        list(held_out) == ["eval", "cnn", "mine", "more"]
        and "6 held out, 3 in cnn, 9 in mine, 1 in more" in note
    )
    assert held_out["cnn"][0] == {
        "prompt": "ARTICLE: (CNN) It rained.\nTL;DR:",
        "response": " Rain .",
    }
    assert held_out["more"][0]["prompt"] == TLDR.replace("By {trusting} a cat", "more")
    texts = [row["response"] for row in held_out["mine"]]
    assert set(texts) < {row["response"] for row in ROWS} and texts != [
        row["response"] for row in ROWS[:9]
    ]


def test_pairs_that_say_nothing_are_counted_in_all_splits(tmp_path):
    pairs = [
        {"prompt": f"p{i}", "chosen": "a", "rejected": "ab"[i % 4 > 0], "kind": "xy"[i % 2]}
        for i in range(40)
    ]
    flags = {"in_distribution": "kind=x", "eval_splits": ["test", "ood"]}
    rows, held_out, note = load_splits(config(jsonl(tmp_path / "a.jsonl", pairs), **flags), "pairs")
    assert (
        all(row["rejected"] == "b" for part in (rows, *held_out.values()) for row in part)
        and len(rows) + len(held_out["eval"]) == 10
    )
    assert "10 with chosen == rejected skipped" in note


def test_the_world(monkeypatch):
    monkeypatch.setattr(nanorlhf.data, "WORLD_SIZES", {"sft": 300, "pairs": 40})
    for kind in ("sft", "pairs", "prompts"):
        rows, held_out, note = load_splits(
            config("world:2", eval_splits=["test", "ood"], eval_size=50), kind
        )
        assert (rows, held_out["eval"]) == load(config("world:2", eval_size=50), kind)[:2]
        assert (
            len(held_out["ood"]) == 50
            and note.endswith("50 in ood")
            and {row["prompt"] for row in held_out["ood"]} <= asked("ood")
        )
        assert len({world.topic_of(row["prompt"]) for row in held_out["ood"]}) == 4
        if kind == "pairs":
            everything = world.preferences(512, seed=2, split="ood")
            assert all(row in everything for row in held_out["ood"])


def asked(split):
    return {row["prompt"] for row in world.prompts(split)}


def test_demonstrations_out_of_distribution():
    """Reviews of held-out topics that the demonstrations do not have, by the same writer."""
    rows, ood = world.demonstrations(1500), read_rows("world", "sft", split="ood")
    prompts = asked("train")
    reviews = [row for row in rows if row["prompt"] in prompts]
    topics = asked("ood")
    assert len(ood) == 512 and all(row["prompt"] in topics for row in ood)
    assert not {row["response"] for row in ood} & {row["response"] for row in reviews}
    for measure in (lambda row: len(row["response"].split()), lambda row: world.gold([row["prompt"]], [row["response"]])[0],
                    lambda row: sum(word in world.MARKS for word in row["response"].split())):  # fmt: skip
        a, b = ([measure(row) for row in part] for part in (reviews, ood))
        mean, other = sum(a) / len(a), sum(b) / len(b)
        spread = (sum((x - mean) ** 2 for x in a) / len(a)) ** 0.5
        assert abs(mean - other) < 4 * spread / 512**0.5  # four standard errors


# --------------------------------------------------------------------------------------------------------------------------- labels


def test_labels():
    assert splits.labels(["test"]) == {"eval": "test"}
    assert splits.labels(["ood", "test", "a-1=x=y.jsonl"]) == {
        "eval": "ood",
        "test": "test",
        "a-1": "x=y.jsonl",
    }
    assert splits.labels(["cnn=cnn_dm:c.jsonl"]) == {"eval": "cnn_dm:c.jsonl"}
    for wrong in (
        "validation",
        "=a.jsonl",
        "a=",
        "a b=c.jsonl",
        "a/b=c.jsonl",
        "eval=a.jsonl",
        "ood=a.jsonl",
        "score=a.jsonl",
        "",
    ):
        refuses(
            splits.labels,
            ["test", wrong],
            match=["--eval_splits takes test, ood and NAME=FILE", repr(wrong)],
        )
    refuses(splits.labels, ["test", "test"], match=["--eval_splits names test twice"])
    refuses(splits.labels, ["a=b.jsonl", "a=c.jsonl"], match=["--eval_splits names a twice"])


@pytest.mark.parametrize("changes, words", [
    ({"in_distribution": "subreddit=birds"}, ["a.jsonl: no row is in distribution", "subreddit=birds"]),
    ({"in_distribution": "words:response<100", "eval_splits": ["test", "ood"]}, ["a.jsonl: no held-out row is out of distribution"]),
    ({"in_distribution": "subredit=cats"}, ["a.jsonl:1: no field 'subredit'"]),
    ({"in_distribution": "subreddit=cats", "eval_dataset": "a.jsonl", "eval_splits": ["x=missing.jsonl"]}, ["missing.jsonl: no such file"]),
    ({"eval_splits": ["test", "ood"]}, ["--eval_splits ood needs --in_distribution"]),
    ({"eval_splits": ["test", "validation"]}, ["--eval_splits takes", "'validation'"]),
    ({"dataset": "world", "in_distribution": "prompt=x"}, ["--in_distribution is for data of one's own"]),
    ({"dataset": "world", "prompt_format": "tldr"}, ["--prompt_format is for data of one's own"]),
    ({"eval_dataset": "world", "in_distribution": "subreddit=cats"}, ["--in_distribution is for data of one's own"]),
    ({"eval_dataset": "world"}, ["--eval_dataset world: its demonstrations are all for training"]),
])  # fmt: skip
def test_what_is_refused(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", ROWS)
    refuses(
        load_splits,
        config("a.jsonl", **changes) if "dataset" not in changes else config(**changes),
        "sft",
        match=words,
    )


def test_a_run_older_than_these_flags_is_the_same_run(tmp_path):
    new = config("a.jsonl", output_dir=str(tmp_path))
    old = {
        k: v
        for k, v in vars(new).items()
        if k not in ("eval_splits", "in_distribution", "prompt_format", "betas")
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    dist = Dist(0, 1, torch.device("cpu"))
    assert RunFolder(new, dist).state == "unfinished"
    refuses(
        RunFolder,
        config("a.jsonl", output_dir=str(tmp_path), eval_splits=["ood"]),
        dist,
        match=["differs in eval_splits"],
    )


def test_prompts_of_best_of_n(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    flags = {
        "dataset": path,
        "in_distribution": "subreddit=tifu,cats",
        "eval_size": 9,
        "gold_model": "my.py:f",
    }
    rows, held_out, _ = load_splits(
        config(path, in_distribution=flags["in_distribution"], eval_splits=["test", "ood"]),
        "prompts",
    )
    test, ood = held_out["eval"], held_out["ood"]
    for changes, expected in (
        ({"split": "ood"}, ood),
        ({"split": "train"}, rows),
        ({}, test),
        ({"eval_splits": ["ood"]}, ood),
    ):
        assert sample_bon.prompts_of(sample_bon.Config(**flags, **changes))[0] == expected
    few = sample_bon.prompts_of(sample_bon.Config(eval_splits=["ood"], eval_size=7))[0]
    assert len(few) == 7 and {row["prompt"] for row in few} < asked("ood")
    for changes, words in (({"in_distribution": ""}, "--split ood is the embedded world's"), ({"dataset": "world"}, "data of one's own"),
                           ({"eval_splits": ["ood"]}, "--eval_splits takes the place of --split")):  # fmt: skip
        refuses(sample_bon.Config, **{**flags, "split": "ood", **changes}, match=[words])

"""nanorlhf.evals.diversity_report, and --diversity and --from of sample_bon.py: figures against loops over sets, what is compared, errors.

P prompts, K outputs to each, D hidden
"""

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from support import ENCODER_TEXTS, read_rows, word_tokenizer, write_rows
from transformers import AutoModelForCausalLM

import sample_bon
from nanorlhf import world
from nanorlhf.diversity import distinct_n, ead, pairwise_diversity
from nanorlhf.errors import InputError
from nanorlhf.evals import diversity_report
from nanorlhf.evals.diversity_report import (
    best_of,
    compare,
    equal_sets,
    group_by_prompt,
    measure,
    read_outputs,
)
from nanorlhf.evals.encoders import nli_scorer, sentence_encoder
from nanorlhf.runtime import cli


def some_texts(P, K, seed=0, words="abcdefgh", longest=9):
    rng = random.Random(seed)
    return [
        [" ".join(rng.choice(words) for _ in range(rng.randint(1, longest))) for _ in range(K)]
        for _ in range(P)
    ]


def rows_of(texts, **more):
    return [
        {"prompt": f"p{i}", "responses": row, **{k: v[i] for k, v in more.items()}}
        for i, row in enumerate(texts)
    ]


def encode(texts):
    """How often each letter stands in a text, and a constant."""
    return torch.tensor([[text.count(letter) for letter in "abcdefgh"] + [0.5] for text in texts])


def nli(pairs):
    """A score of an ordered pair of sentences."""
    return torch.tensor([math.sin(3 * len(a) + 5 * len(b) + a.count("a")) for a, b in pairs])


def nli_by_pairs(texts):
    return np.mean([nli([pair]).item() for pair in itertools.permutations(texts, 2)])


# ----------------------------------------------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize("P, K", [(5, 4), (3, 2), (2, 3)])
def test_measure_by_sets(P, K):
    texts, V = some_texts(P, K), 11
    found = measure(texts, V, encode=encode, nli=nli, n_sentences=0)

    def metrics(part):
        return {
            "length": np.mean([len(text.split()) for text in part]),
            "ead_2": ead(part, 2, V), "distinct_3": distinct_n(part, 3),
            "ead": np.mean([ead(part, n, V) for n in range(1, 6)]), "distinct": np.mean([distinct_n(part, n) for n in range(1, 6)]),
            "embedding": pairwise_diversity(encode(part)), "nli": nli_by_pairs(part),
        }  # fmt: skip

    sets = {"per_input": texts, "across_input": [[row[k] for row in texts] for k in range(K)]}
    for protocol, parts in sets.items():
        expected = [metrics(part) for part in parts]
        assert set(found[protocol]) == {
            *expected[0],
            *(f"{m}_{n}" for m in ("ead", "distinct") for n in range(1, 6)),
        }
        for name in expected[0]:
            values, spread = [row[name] for row in expected], found[protocol][name]
            assert spread.mean == pytest.approx(np.mean(values), abs=1e-6), name
            assert spread.std == pytest.approx(np.std(values, ddof=1), abs=1e-6), name
            assert (spread.interval is None) == (P < 3)
            if P > 2:
                assert spread.interval[0] <= spread.mean <= spread.interval[1]
    if P > 2:  # across inputs: leave each prompt out
        left_out = [
            np.mean([metrics(part[:p] + part[p + 1 :])["nli"] for part in sets["across_input"]])
            for p in range(P)
        ]
        half = {3: 4.302653, 5: 2.776445}[P] * math.sqrt(
            (P - 1) / P * sum((x - np.mean(left_out)) ** 2 for x in left_out)
        )
        spread = found["across_input"]["nli"]
        assert spread.interval == pytest.approx((spread.mean - half, spread.mean + half), abs=1e-5)


def test_sets_of_one_and_empty_outputs():
    texts = some_texts(4, 3)
    alone = measure([row[:1] for row in texts], encode=encode, nli=nli)
    assert alone["per_input"] is None and alone["across_input"]["ead"].std == 0
    assert measure(texts[:1], encode=encode, nli=nli)["across_input"] is None
    empty = measure([["", "a"], ["", ""], ["a", ""]], encode=encode, nli=nli)
    nothing = measure([["", ""]] * 3, encode=encode, nli=nli)
    for found in (empty, nothing):
        for part in found.values():
            for spread in part.values():
                assert np.isfinite([spread.mean, spread.std, *spread.interval]).all()
    assert all(
        nothing["per_input"][name].mean == pytest.approx(0)
        for name in ("length", "ead", "distinct", "ead_1", "embedding")
    )
    assert empty["per_input"]["ead_1"].mean == pytest.approx(
        2 / 3
    )  # 1, 0, 1: a set without words has 0
    for wrong, counts in (([texts[0], texts[1][:2]], "2, 3"), ([], ""), ([[], []], "0")):
        with pytest.raises(ValueError, match=rf"rows of \[{counts}\] outputs"):
            measure(wrong)
    with pytest.raises(ValueError, match="a vocabulary of 3"):
        measure(texts, 3)


def test_tokens_of_a_tokenizer():
    tokenizer = word_tokenizer(["<pad>", "<eos>", "<unk>", *"abcd"])
    texts = [["a b c", "x y y"], ["d a", "z"]]
    found, by_words = measure(texts, tokenizer=tokenizer), measure(texts, 7)
    unknown = [["a b c", "u u u"], ["d a", "u"]]  # what the tokenizer sees
    assert found["per_input"]["ead_1"].mean == pytest.approx(
        np.mean([ead(row, 1, len(tokenizer)) for row in unknown])
    )
    assert (
        found["per_input"]["ead"].mean < by_words["per_input"]["ead"].mean
        and found["per_input"]["length"].mean == 2.25
    )


def test_truncated_texts():
    asked = []
    texts = some_texts(3, 4)
    cut = [[" ".join(text.split()[:3]) for text in row] for row in texts]

    def seen(items):
        asked.extend(items)
        return encode(items)

    found, expected = (
        measure(texts, 11, truncate=3, encode=seen, nli=nli),
        measure(cut, 11, encode=encode, nli=nli),
    )
    assert found == expected and set(asked) == {text for row in cut for text in row}
    tokenizer = word_tokenizer(["<pad>", "<eos>", "<unk>", *"abcdefgh"])
    assert measure(texts, 11, tokenizer, truncate=3, encode=encode) == measure(
        cut, 11, encode=encode
    )


def test_long_outputs_are_compared_by_sentences():
    asked = []

    def seen(pairs):
        asked.extend(pairs)
        return nli(pairs)

    texts = [["One a. Two b. Three.", "Four.", "Five a. Six."]]
    found = measure(texts, nli=seen, n_sentences=0)["per_input"]["nli"].mean
    parts = [["One a.", "Two b.", "Three."], ["Four."], ["Five a.", "Six."]]
    by_hand = [
        np.mean([nli([(a, b)]).item() for a in p for b in h])
        for p, h in itertools.permutations(parts, 2)
    ]
    assert found == pytest.approx(np.mean(by_hand)) and len(asked) == 2 * (3 + 6 + 2)
    del asked[:]
    measure(texts, nli=seen, n_sentences=1, seed=1)
    assert len(asked) == 6 and all(any(s in part for part in parts) for pair in asked for s in pair)
    del asked[:]
    measure(some_texts(2, 6), nli=seen, n_partners=2)
    assert len(asked) == 2 * 6 * 2 + 6 * 2  # per input, and across: all of two prompts


# ----------------------------------------------------------------------------------------------------------- what is compared with what


def test_equal_sets():
    a, b, c = some_texts(6, 5), some_texts(6, 3, seed=1), some_texts(6, 1, seed=2)
    systems = {"a": rows_of(a)[1:], "b": rows_of(b)[:-1][::-1], "c": rows_of(c)}
    found = equal_sets({name: group_by_prompt(rows) for name, rows in systems.items()})
    assert found == {
        "a": [row[:3] for row in a[1:5]],
        "b": b[1:5],
        "c": c[1:5],
    }  # c has K = 1 and does not cut the others
    other = [{**row, "prompt": "q" + row["prompt"]} for row in rows_of(b)[:4]]
    found = equal_sets({"a": group_by_prompt(rows_of(a)), "other": group_by_prompt(other)})
    assert found == {
        "a": [row[:3] for row in a[:4]],
        "other": b[:4],
    }  # no common prompt: as many of each
    ragged = rows_of(a)
    ragged[2]["responses"] = ragged[2]["responses"][:2]
    assert equal_sets({"a": group_by_prompt(ragged)}) == {"a": [row[:2] for row in a]}
    ragged[4]["responses"] = ragged[4]["responses"][:1]
    assert equal_sets({"a": group_by_prompt(ragged), "b": group_by_prompt(rows_of(b))}) == {
        "a": [row[:1] for row in a],
        "b": b,
    }


def test_compare():
    a, b, c = (
        some_texts(6, 5),
        some_texts(6, 3, seed=1, words="abxyz", longest=20),
        some_texts(6, 1, seed=2),
    )
    systems = {"a": rows_of(a), "b": rows_of(b), "c": rows_of(c)}
    result = compare(systems, truncate="median", encode=lambda texts: encode(texts))
    V = len({w for texts in (a, b, c) for row in texts for text in row for w in text.split()})
    assert (result["prompts"], result["outputs"], result["vocab_size"]) == (6, 3, V) and V == 11
    assert result["used"] == {"a": "18 of 30", "b": "18 of 18", "c": "6 of 6"}
    lengths = [
        np.median([len(text.split()) for row in texts for text in row])
        for texts in ([row[:3] for row in a], b, c)
    ]
    assert result["truncated"]["length"] == int(min(lengths)) > 1
    for part, length in ((result, 0), (result["truncated"], int(min(lengths)))):
        for name, texts in zip("abc", ([row[:3] for row in a], b, c)):
            expected, found = (
                measure(texts, V, truncate=length, encode=encode),
                part["systems"][name],
            )
            assert found["outputs"] == len(texts[0]) and (found["per_input"] is None) == (
                name == "c"
            )
            for protocol in ("per_input", "across_input"):
                assert (found[protocol] or {}) == {
                    k: v._asdict() for k, v in (expected[protocol] or {}).items()
                }
    assert (
        compare(systems, vocab_size=50)["systems"]["a"]["per_input"]["ead_1"]
        != result["systems"]["a"]["per_input"]["ead_1"]
    )
    assert compare(systems, truncate="2")["truncated"]["length"] == 2
    with pytest.raises(InputError, match="--vocab_size 10: there are 11 different words"):
        compare(systems, vocab_size=10)
    with pytest.raises(InputError, match="one output to one prompt"):
        compare(
            {"a": rows_of(a)[:1], "c": rows_of(c)[:1]}
            | {"c": rows_of(c)[:1], "a": rows_of([["a"]])}
        )


def test_best_of():
    texts = [["a", "b", "c", "d"], ["e", "f", "g", "h", "i"]]
    scores = [
        {"x": [0, 3, 1, 2], "y": [0, 1, 9, 2]},
        {"x": [9, 0, 0, 0, 99], "y": [0, 0, 0, 1, 99]},
    ]
    rows = rows_of(texts, scores=scores)
    for objective, best in (
        ("mean", [{"c", "b"}, {"e", "h"}]),
        ("wco", [{"d", "b"}, {"e", "f"}]),
    ):  # of p1's five the first four
        found = best_of(rows, 3, objective, 0.5, seed=0)
        assert [row["prompt"] for row in found] == ["p0", "p1"] and all(
            len(row["responses"]) == 32 for row in found
        )
        assert [set(row["responses"]) for row in found] == best
    with pytest.raises(
        InputError, match="--best_of 4 needs more than 4 answers to every prompt, and one has 4"
    ):
        best_of(rows, 4, "mean", 0.5, 0)
    del rows[1]["scores"]["y"]
    with pytest.raises(InputError, match="not all answers to 'p1' have scores of x, y"):
        best_of(rows, 2, "mean", 0.5, 0)


# -------------------------------------------------------------------------------------------------------------------------- reading


def test_files_of_all_kinds(tmp_path):
    single = [{"prompt": "p", "response": "a", "scores": {"x": 1}, "gold": None}, {"prompt": "q", "response": ""},
              {"prompt": "p", "response": "b", "scores": {"x": 2.5}}]  # fmt: skip
    write_rows(tmp_path / "single.jsonl", single)
    found = group_by_prompt(read_outputs(f"{tmp_path}/single.jsonl"))
    assert {p: row["responses"] for p, row in found.items()} == {"p": ["a", "b"], "q": [""]}
    write_rows(
        tmp_path / "pool.jsonl",
        [{"prompt": "p", "responses": ["a", "b"], "scores": {"x": [1, 2]}, "gold_scores": [0, 1]}],
    )
    for file, kept in (("single", single[::2]), ("pool", None)):
        if kept:
            write_rows(tmp_path / f"{file}.jsonl", kept)
        rows = list(group_by_prompt(read_outputs(f"{tmp_path}/{file}.jsonl", scores=True)).values())
        assert rows == [
            {"prompt": "p", "responses": ["a", "b"], "scores": {"x": [1, 2.5 if kept else 2]}}
        ]
    write_rows(
        tmp_path / "other.jsonl",
        [{"question": "p", "answer": "a"}, {"question": "p", "many": ["b", "c"]}],
    )
    columns = ["prompt=question", "response=answer", "responses=many"]
    assert group_by_prompt(read_outputs(f"{tmp_path}/other.jsonl", columns))["p"]["responses"] == [
        "a",
        "b",
        "c",
    ]


@pytest.mark.parametrize("row, words, best", [
    (["p", "a"], "a row must be an object with prompt and response or responses", 0),
    ({"response": "a"}, "field 'prompt' must be a string", 0),
    ({"prompt": "p"}, "field 'response' must be a string", 0),
    ({"prompt": "p", "responses": []}, "field 'responses' must be a list of at least one string", 0),
    ({"prompt": "p", "responses": ["a", 3]}, "field 'responses' must be a list of at least one string", 0),
    ({"prompt": "p", "response": "a"}, "--best_of needs the field 'scores'", 2),
    ({"prompt": "p", "responses": ["a", "b"], "scores": {"x": [1]}}, "scores of 'x' must be finite numbers, one for each answer", 2),
    ({"prompt": "p", "response": "a", "scores": {"x": math.nan}}, "not JSON (NaN is no finite number)", 2),
])  # fmt: skip
def test_bad_rows(tmp_path, row, words, best):
    good = {"prompt": "p", "responses": ["a", "b"], "scores": {"x": [1, 2]}}
    (tmp_path / "bad.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError) as e:
        read_outputs(f"{tmp_path}/bad.jsonl", scores=best > 0)
    assert f"{tmp_path}/bad.jsonl:2: {words}" in str(e.value)


# ---------------------------------------------------------------------------------------------------------------------- the script


def run(*args):
    cli.run(sample_bon.Config, sample_bon.main, list(map(str, args)))


def test_from_files(tmp_path, monkeypatch, capsys, encoder_folders):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sample_bon, "train_what_is_missing", lambda *args: pytest.fail("nothing is trained")
    )
    rng = random.Random(0)
    a, b = ([[rng.choice(ENCODER_TEXTS) for _ in range(4)] for _ in range(4)] for _ in range(2))
    write_rows(tmp_path / "a.jsonl", rows_of(a, scores=[{"x": list(range(4))}] * 4))
    write_rows(
        tmp_path / "b.jsonl",
        [
            {"prompt": f"p{i}", "response": text, "scores": {"x": 1}}
            for i, row in enumerate(b)
            for text in row
        ],
    )
    models = ("--encoder", encoder_folders["bert"], "--nli_model", encoder_folders["roberta"])
    run("--from", "a.jsonl", "b.jsonl", *models, "--best_of", 2, "--truncate", 3)
    out, result = (
        capsys.readouterr().out,
        json.loads((tmp_path / "runs/diversity/diversity.json").read_text()),
    )
    names = ["a.jsonl", "b.jsonl", "a.jsonl, best of 2", "b.jsonl, best of 2"]
    assert list(result["systems"]) == list(result["truncated"]["systems"]) == names
    expected = {
        "prompts": 4,
        "outputs": 4,
        "vocab_size": 10,
        "from_files": names[:2],
        "best_of": 2,
        "encoder": encoder_folders["bert"],
        "seed": 0,
    }
    assert expected.items() <= result.items()
    assert [result["systems"][name]["per_input"] is None for name in names] == [
        False,
        False,
        True,
        True,
    ]  # the best of one pool are alike
    how = {
        "encode": sentence_encoder(encoder_folders["bert"]),
        "nli": nli_scorer(encoder_folders["roberta"]),
    }
    expected = measure(b, 10, **how)
    for protocol in ("per_input", "across_input"):
        for name, spread in result["systems"]["b.jsonl"][protocol].items():
            assert spread["mean"] == pytest.approx(expected[protocol][name].mean, abs=1e-5), name
            shown = (
                f"{spread['mean']:.3f} [{spread['interval'][0]:.3f}, {spread['interval'][1]:.3f}]"
            )
            assert (shown in out) == (name in diversity_report.SHOWN) or "_" in name
    assert (
        "Diversity of 4 prompts x 4 outputs: n-grams and lengths in words, V = 10" in out
        and "first 3 words of each output" in out
    )
    assert (
        "outputs used: a.jsonl: 16 of 16; b.jsonl: 16 of 16; a.jsonl, best of 2: 16 of 128" in out
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "runs"]
    assert [p.name for p in (tmp_path / "runs/diversity").iterdir()] == ["diversity.json"]
    run(
        "--from",
        "a.jsonl",
        "--vocab_size",
        30,
        "--tokenizer",
        encoder_folders["bert"],
        "--output_dir",
        "mine",
    )
    assert (
        f"n-grams and lengths in ids of {encoder_folders['bert']}, V = 30"
        in capsys.readouterr().out
    )
    assert (tmp_path / "mine/diversity.json").exists()


def folder_of(path, **files):
    path.mkdir()
    for name, text in files.items():
        (path / f"{name}.json").write_text(text)


def test_only_folders_of_its_own_are_written_into(tmp_path, monkeypatch, capfd):
    """A model's folder, any other, one of a run with --diversity; new, empty and own folders are welcome."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "responses": ["a b", "c"]}])
    own = json.dumps({"from_files": ["old.jsonl"], "systems": {}})
    folder_of(tmp_path / "model", config="{}")
    folder_of(
        tmp_path / "run",
        config="{}",
        summary="{}",
        diversity=json.dumps({"from_files": [], "systems": {}}),
    )
    folder_of(tmp_path / "list", diversity="[]")
    for folder in ("model", "run", "list", "..", ".", "a.jsonl"):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(SystemExit) as e:
            run("--from", "a.jsonl", "--output_dir", folder)
        error = capfd.readouterr().err
        assert e.value.code == 2 and len(error.splitlines()) == 1, error
        assert f"{folder} is there already and is not a folder of sample_bon.py --from" in error
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    folder_of(tmp_path / "own", diversity=own, notes="{}")
    folder_of(tmp_path / "empty")
    folder_of(tmp_path / "killed")
    (tmp_path / "killed" / "diversity.json.tmp").write_text('{"from_files')
    (tmp_path / "killed" / ".lock").touch()
    for folder in ("own", "empty", "killed", "new/one"):
        for _ in range(2):
            run("--from", "a.jsonl", "--output_dir", folder)
            assert json.loads((tmp_path / folder / "diversity.json").read_text())["from_files"] == [
                "a.jsonl"
            ]


def test_fresh_samples(tmp_path, monkeypatch, capsys):
    """A policy of random weights: the answers of the pool, and the best of 2 of them; a second call samples nothing again."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(world.model_config()).save_pretrained("sft")
    world.tokenizer().save_pretrained("sft")
    (tmp_path / "mine.py").write_text(
        "def words(prompts, responses):\n    return [float(len(r.split())) for r in responses]\n"
    )
    common = (
        "--model",
        "./sft",
        "--reward_model",
        "mine.py:words",
        "--n_answers",
        5,
        "--eval_size",
        4,
        "--max_new_tokens",
        8,
        "--n",
        2,
    )
    run(*common)
    assert not (tmp_path / "runs/bon/diversity.json").exists()
    answers = (tmp_path / "runs/bon/pool.jsonl").read_text()
    run(*common, "--diversity", "--best_of", 2)
    assert (
        "answers, best of 2" in capsys.readouterr().out
        and (tmp_path / "runs/bon/pool.jsonl").read_text() == answers
    )
    texts = [row["responses"] for row in read_rows(tmp_path / "runs/bon/pool.jsonl")]
    result = json.loads((tmp_path / "runs/bon/diversity.json").read_text())
    found = result["systems"]["answers"]
    expected = measure(texts, result["vocab_size"])["per_input"]["ead"].mean
    assert found["outputs"] == 5 and found["per_input"]["ead"]["mean"] == pytest.approx(expected)
    longer = result["systems"]["answers, best of 2"]["across_input"]["length"]["mean"]
    assert longer > found["across_input"]["length"]["mean"] or all(
        len(set(map(len, map(str.split, row)))) == 1 for row in texts
    )


@pytest.mark.parametrize("args, words", [
    (["--encoder", "x"], ["--encoder is about diversity: it needs --diversity or --from"]),
    (["--best_of", "4"], ["--best_of is about diversity"]),
    (["--diversity", "--best_of", "8", "--n_answers", "8"], ["--best_of must be below --n_answers (8)"]),
    (["--diversity", "--truncate", "half"], ["--truncate takes a number of tokens or median, not 'half'"]),
    (["--diversity", "--truncate", "0"], ["--truncate takes"]),
    (["--diversity", "--nli_partners", "0"], ["--nli_partners must be at least 1"]),
    (["--diversity", "--vocab_size", "-1"], ["--vocab_size must be at least 0"]),
    (["--from", "a.jsonl", "--pool", "a.jsonl"], ["--from measures files alone"]),
    (["--from", "a.jsonl", "a.jsonl"], ["--from names a file twice"]),
    (["--from", "lost.jsonl"], ["lost.jsonl", "no such file"]),
    (["--from", "a.jsonl", "--encoder", "./lost"], ["./lost", "no such model folder"]),
    (["--from", "a.jsonl", "--best_of", "2"], ["a.jsonl:1", "--best_of needs the field 'scores'"]),
    (["--from", "a.jsonl", "--vocab_size", "2"], ["--vocab_size 2: there are 3 different words"]),
    (["--diversity", "--encoder", "./lost"], ["./lost", "no such model folder"]),
])  # fmt: skip
def test_bad_flags(tmp_path, monkeypatch, capsys, args, words):
    """One line, exit code 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "responses": ["a b", "c"]}])
    with pytest.raises(SystemExit) as e:
        run(*args)
    error = capsys.readouterr().err
    assert (
        e.value.code == 2 and len(error.splitlines()) == 1 and all(word in error for word in words)
    ), error
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_nli_model_without_labels(tmp_path, monkeypatch, capsys, encoder_folders):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "responses": ["a b", "c"]}])
    with pytest.raises(SystemExit):
        run("--from", "a.jsonl", "--nli_model", encoder_folders["bert"])
    assert "must name the labels contradiction, neutral, entailment" in capsys.readouterr().err

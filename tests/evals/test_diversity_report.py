"""nanorlhf.evals.diversity_report, and --diversity and --from of sample_bon.py.

    P prompts, K outputs to each, V words, D hidden

Figures are checked against loops over sets: per input a set is all outputs to one prompt, across
inputs it is one output to each prompt.
"""

import contextlib
import io
import itertools
import json
import math
import os
import random
from statistics import mean, median, stdev

import numpy as np
import pytest
import torch
from support import list_files, read_rows, write_rows
from tiny_models import ENCODER_TEXTS, word_tokenizer
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

LETTERS = "abcdefgh"
PROTOCOLS = ("per_input", "across_input")


def draw_text(rng, words, longest):
    n_words = rng.randint(1, longest)
    return " ".join(rng.choice(words) for _ in range(n_words))


def draw_texts(P, K, seed=0, words=LETTERS, longest=9):
    """P rows of K texts of up to `longest` words, always the same for a seed."""
    rng = random.Random(seed)
    rows = []
    for _ in range(P):
        rows.append([draw_text(rng, words, longest) for _ in range(K)])
    return rows


def make_rows(texts, prefix="p"):
    """Rows {prompt, responses}, as files have them; the prompts are p0, p1, ..."""
    return [{"prompt": f"{prefix}{i}", "responses": row} for i, row in enumerate(texts)]


def group(rows_of_systems):
    return {name: group_by_prompt(rows) for name, rows in rows_of_systems.items()}


def count_words(texts):
    return [len(text.split()) for text in texts]


def cut_rows(texts, K):
    """The first K texts of each row."""
    return [row[:K] for row in texts]


def cut_texts(texts, n):
    """The first n words of each text."""
    cut = []
    for row in texts:
        cut.append([" ".join(text.split()[:n]) for text in row])
    return cut


def encode(texts):
    """A sentence encoder: how often each letter stands in a text, and a constant. -> [N, D]"""
    vectors = []
    for text in texts:
        vectors.append([*map(text.count, LETTERS), 0.5])
    return torch.tensor(vectors)


def nli(pairs):
    """A score of each ordered pair of sentences: [N]. Any function does that knows their order."""
    scores = []
    for a, b in pairs:
        scores.append(math.sin(3 * len(a) + 5 * len(b) + a.count("a")))
    return torch.tensor(scores)


class Recorder:
    """A function that keeps everything that it was asked."""

    def __init__(self, function):
        self.function = function
        self.asked = []

    def __call__(self, items):
        self.asked.extend(items)
        return self.function(items)


# ------------------------------------------------------------------------------------- measuring


def mean_nli(texts):
    """The mean score of all ordered pairs of a set."""
    pairs = list(itertools.permutations(texts, 2))
    return nli(pairs).double().mean().item()


def measure_one_set(texts, V):
    """{metric: value} of one set, from the functions of nanorlhf.diversity."""
    figures = {
        "length": mean(count_words(texts)),
        "embedding": pairwise_diversity(encode(texts)),
        "nli": mean_nli(texts),
    }
    eads = []
    distincts = []
    for n in range(1, 6):
        eads.append(ead(texts, n, V))
        distincts.append(distinct_n(texts, n))
        figures[f"ead_{n}"] = eads[-1]
        figures[f"distinct_{n}"] = distincts[-1]
    figures["ead"] = mean(eads)
    figures["distinct"] = mean(distincts)
    return figures


def sets_across(texts):
    """The first outputs to all prompts, the second ones, and so on."""
    return list(zip(*texts))


@pytest.mark.parametrize("P, K", [(5, 4), (3, 2), (2, 3)])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_figures_are_means_over_sets(P, K, protocol):
    texts = draw_texts(P, K)
    V = 11
    sets = texts if protocol == "per_input" else sets_across(texts)
    expected = [measure_one_set(one_set, V) for one_set in sets]

    found = measure(texts, V, encode=encode, nli=nli, n_sentences=0)[protocol]

    assert found.keys() == expected[0].keys()
    for name in found:
        values = [row[name] for row in expected]
        spread = found[name]
        assert spread.mean == pytest.approx(mean(values), abs=1e-6), name
        assert spread.std == pytest.approx(stdev(values), abs=1e-6), name
        # An interval over prompts needs three of them.
        assert (spread.interval is None) == (P < 3)
        if P > 2:
            low, high = spread.interval
            assert low <= spread.mean <= high


# The 97.5% points of Student's t with P - 1 degrees of freedom, from a table.
STUDENT_T = {3: 4.302653, 5: 2.776445}


@pytest.mark.parametrize("P, K", [(5, 4), (3, 2)])
def test_the_interval_across_inputs_leaves_out_each_prompt(P, K):
    """The jackknife: error^2 = (P - 1) / P sum_p (x_p - mean x)^2, where x_p lacks prompt p."""
    texts = draw_texts(P, K)
    left_out = []
    for p in range(P):
        others = texts[:p] + texts[p + 1 :]
        left_out.append(mean(mean_nli(one_set) for one_set in sets_across(others)))
    squares = (np.array(left_out) - mean(left_out)) ** 2
    half = STUDENT_T[P] * math.sqrt((P - 1) / P * squares.sum())

    spread = measure(texts, 11, nli=nli, n_sentences=0)["across_input"]["nli"]

    expected = (spread.mean - half, spread.mean + half)
    assert spread.interval == pytest.approx(expected, abs=1e-5)


def test_sets_of_one_have_no_figures():
    texts = draw_texts(4, 3)
    one_output = measure(cut_rows(texts, 1), encode=encode, nli=nli)
    assert one_output["per_input"] is None
    # One set of four, which has no spread.
    assert one_output["across_input"]["ead"].std == 0

    one_prompt = measure(texts[:1], encode=encode, nli=nli)
    assert one_prompt["across_input"] is None


@pytest.mark.parametrize(
    "texts", [[["", "a"], ["", ""], ["a", ""]], [["", ""], ["", ""], ["", ""]]]
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_empty_outputs_have_finite_figures(texts, protocol):
    found = measure(texts, encode=encode, nli=nli)[protocol]
    for name, spread in found.items():
        assert np.isfinite([spread.mean, spread.std, *spread.interval]).all(), name


def test_a_set_without_words_has_no_diversity():
    nothing = measure([["", ""]] * 3, encode=encode, nli=nli)["per_input"]
    for name in ("length", "ead", "distinct", "ead_1", "embedding"):
        assert nothing[name].mean == pytest.approx(0), name
    # The three sets have 1, 0 and 1.
    some = measure([["", "a"], ["", ""], ["a", ""]], encode=encode, nli=nli)["per_input"]
    assert some["ead_1"].mean == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "texts, counts", [([["a", "b"], ["c", "d", "e"]], "2, 3"), ([], ""), ([[], []], "0")]
)
def test_sets_of_unequal_size_are_refused(texts, counts):
    with pytest.raises(ValueError, match=rf"rows of \[{counts}\] outputs"):
        measure(texts)


def test_a_vocabulary_smaller_than_the_words_is_refused():
    with pytest.raises(ValueError, match="a vocabulary of 3"):
        measure(draw_texts(4, 3), 3)


def letter_tokenizer(letters):
    return word_tokenizer(["<pad>", "<eos>", "<unk>", *letters])


def test_tokens_of_a_tokenizer():
    tokenizer = letter_tokenizer("abcd")
    texts = [["a b c", "x y y"], ["d a", "z"]]
    # What the tokenizer sees: it does not know x, y and z.
    seen = [["a b c", "u u u"], ["d a", "u"]]

    found = measure(texts, tokenizer=tokenizer)["per_input"]
    by_words = measure(texts, 7)["per_input"]

    expected = mean(ead(row, 1, len(tokenizer)) for row in seen)
    assert found["ead_1"].mean == pytest.approx(expected)
    assert found["ead"].mean < by_words["ead"].mean
    assert found["length"].mean == 2.25


@pytest.mark.parametrize("tokenizer", [None, letter_tokenizer(LETTERS)], ids=["words", "tokens"])
def test_truncated_texts_are_measured_as_if_they_were_shorter(tokenizer):
    texts = draw_texts(3, 4)
    short = cut_texts(texts, 3)
    recorder = Recorder(encode)

    found = measure(texts, 11, tokenizer, truncate=3, encode=recorder, nli=nli)

    assert found == measure(short, 11, encode=encode, nli=nli)
    # The encoder reads what is left, too.
    assert set(recorder.asked) == set(itertools.chain(*short))


LONG_TEXTS = [["One a. Two b. Three.", "Four.", "Five a. Six."]]
SENTENCES = [["One a.", "Two b.", "Three."], ["Four."], ["Five a.", "Six."]]


def test_long_outputs_are_compared_by_sentences():
    """The score of two outputs is the mean over all pairs of their sentences."""
    expected = []
    for premises, hypotheses in itertools.permutations(SENTENCES, 2):
        pairs = itertools.product(premises, hypotheses)
        expected.append(nli(list(pairs)).mean().item())
    recorder = Recorder(nli)

    found = measure(LONG_TEXTS, nli=recorder, n_sentences=0)["per_input"]["nli"].mean

    assert found == pytest.approx(np.mean(expected))
    # 3 x 1, 3 x 2 and 1 x 2 pairs of sentences, in both orders.
    assert len(recorder.asked) == 2 * (3 + 6 + 2)


def test_one_sentence_may_be_drawn_from_each_output():
    recorder = Recorder(nli)
    measure(LONG_TEXTS, nli=recorder, n_sentences=1, seed=1)
    assert len(recorder.asked) == 6
    sentences = set(itertools.chain(*SENTENCES))
    for pair in recorder.asked:
        assert set(pair) <= sentences


def test_each_output_meets_a_limited_number_of_others():
    recorder = Recorder(nli)
    measure(draw_texts(2, 6), nli=recorder, n_partners=2)
    # Per input each of 2 x 6 outputs meets two; across inputs a set has two, which meet each other.
    assert len(recorder.asked) == 2 * 6 * 2 + 6 * 2


# ---------------------------------------------------------------------- what is compared with what

A = draw_texts(6, 5)
B = draw_texts(6, 3, seed=1)
C = draw_texts(6, 1, seed=2)


def test_systems_are_compared_on_common_prompts_and_as_many_outputs():
    rows = {"a": make_rows(A)[1:], "b": make_rows(B)[:-1][::-1], "c": make_rows(C)}
    found = equal_sets(group(rows))
    # c has one output to a prompt and does not cut the others.
    assert found == {"a": cut_rows(A[1:5], 3), "b": B[1:5], "c": C[1:5]}


def test_systems_without_a_common_prompt_give_as_many_each():
    found = equal_sets(group({"a": make_rows(A), "other": make_rows(B[:4], prefix="q")}))
    assert found == {"a": cut_rows(A[:4], 3), "other": B[:4]}


def test_the_smallest_number_of_outputs_to_a_prompt_cuts_a_system():
    ragged = make_rows(A)
    ragged[2]["responses"] = ragged[2]["responses"][:2]
    assert equal_sets(group({"a": ragged})) == {"a": cut_rows(A, 2)}

    # With one output somewhere it is a system of single outputs, which does not cut the other.
    ragged[4]["responses"] = ragged[4]["responses"][:1]
    found = equal_sets(group({"a": ragged, "b": make_rows(B)}))
    assert found == {"a": cut_rows(A, 1), "b": B}


# Longer texts, of other words too.
LONGER = draw_texts(6, 3, seed=1, words="abxyz", longest=20)
SYSTEMS = {"a": make_rows(A), "b": make_rows(LONGER), "c": make_rows(C)}
# What is compared of each: three outputs, or the only one.
COMPARED = {"a": cut_rows(A, 3), "b": LONGER, "c": C}


@pytest.fixture(scope="module")
def compared():
    return compare(SYSTEMS, truncate="median", encode=encode)


def smallest_median_length():
    medians = []
    for texts in COMPARED.values():
        medians.append(median(count_words(itertools.chain(*texts))))
    return int(min(medians))


def test_what_a_comparison_used(compared):
    assert compared["prompts"] == 6
    assert compared["outputs"] == 3
    assert compared["used"] == {"a": "18 of 30", "b": "18 of 18", "c": "6 of 6"}
    # V is the number of different words in all files: a to h, x, y and z.
    assert compared["vocab_size"] == 11
    assert compared["truncated"]["length"] == smallest_median_length()
    assert smallest_median_length() > 1


@pytest.mark.parametrize("truncated", [False, True])
def test_compared_systems_are_measured_alike(compared, truncated):
    table = compared["truncated"] if truncated else compared
    length = smallest_median_length() if truncated else 0
    for name, texts in COMPARED.items():
        expected = measure(texts, 11, truncate=length, encode=encode)
        found = table["systems"][name]
        assert found["outputs"] == len(texts[0])
        assert (found["per_input"] is None) == (name == "c")
        for protocol in PROTOCOLS:
            if expected[protocol] is None:
                assert found[protocol] is None
                continue
            assert found[protocol].keys() == expected[protocol].keys()
            for metric, spread in expected[protocol].items():
                assert found[protocol][metric] == spread._asdict(), metric


def test_a_comparison_s_vocabulary_and_length_can_be_set(compared):
    larger = compare(SYSTEMS, vocab_size=50)["systems"]["a"]["per_input"]["ead_1"]
    assert larger != compared["systems"]["a"]["per_input"]["ead_1"]
    assert compare(SYSTEMS, truncate="2")["truncated"]["length"] == 2


def test_comparisons_that_say_nothing_are_refused():
    with pytest.raises(InputError, match="--vocab_size 10: there are 11 different words"):
        compare(SYSTEMS, vocab_size=10)
    with pytest.raises(InputError, match="one output to one prompt"):
        compare({"a": make_rows([["a"]]), "c": make_rows(C)[:1]})


def scored_rows():
    """A pool of four outputs and one of five, of which the first four count, by two rewards."""
    first, second = make_rows([["a", "b", "c", "d"], ["e", "f", "g", "h", "i"]])
    first["scores"] = {"x": [0, 3, 1, 2], "y": [0, 1, 9, 2]}
    second["scores"] = {"x": [9, 0, 0, 0, 99], "y": [0, 0, 0, 1, 99]}
    return [first, second]


@pytest.mark.parametrize(
    "objective, best",
    [
        # The means are 0, 2, 5, 2 and 4.5, 0, 0, .5: the best of any three of four is one of two.
        ("mean", [{"c", "b"}, {"e", "h"}]),
        # The minima are 0, 1, 1, 2 and 0, 0, 0, 0.
        ("wco", [{"d", "b"}, {"e", "f"}]),
    ],
)
def test_best_of_n_is_simulated_from_a_pool(objective, best):
    found = best_of(scored_rows(), 3, objective, 0.5, seed=0)
    assert len(found) == 2
    for row, prompt, texts in zip(found, ["p0", "p1"], best):
        assert row["prompt"] == prompt
        assert len(row["responses"]) == 32
        assert set(row["responses"]) == texts


def test_best_of_n_needs_more_answers_and_all_scores():
    rows = scored_rows()
    few = "--best_of 4 needs more than 4 answers to every prompt, and one has 4"
    with pytest.raises(InputError, match=few):
        best_of(rows, 4, "mean", 0.5, 0)
    del rows[1]["scores"]["y"]
    with pytest.raises(InputError, match="not all answers to 'p1' have scores of x, y"):
        best_of(rows, 2, "mean", 0.5, 0)


# --------------------------------------------------------------------------------------- reading


def read_grouped(path, *args, **kwargs):
    return group_by_prompt(read_outputs(str(path), *args, **kwargs))


def test_rows_of_one_answer_are_grouped_by_prompt(tmp_path):
    path = tmp_path / "single.jsonl"
    p_a = {"prompt": "p", "response": "a", "scores": {"x": 1}, "gold": None}
    q = {"prompt": "q", "response": ""}
    p_b = {"prompt": "p", "response": "b", "scores": {"x": 2.5}}

    write_rows(path, [p_a, q, p_b])
    found = read_grouped(path)
    assert list(found) == ["p", "q"]
    assert found["p"]["responses"] == ["a", "b"]
    assert found["q"]["responses"] == [""]

    write_rows(path, [p_a, p_b])
    whole = {"prompt": "p", "responses": ["a", "b"], "scores": {"x": [1, 2.5]}}
    assert read_grouped(path, with_scores=True) == {"p": whole}


def test_rows_of_a_pool_stand_as_they_are(tmp_path):
    row = {"prompt": "p", "responses": ["a", "b"], "scores": {"x": [1, 2]}}
    path = write_rows(tmp_path / "pool.jsonl", [{**row, "gold_scores": [0, 1]}])
    assert read_grouped(path, with_scores=True) == {"p": row}


def test_columns_may_have_other_names(tmp_path):
    rows = [{"question": "p", "answer": "a"}, {"question": "p", "many": ["b", "c"]}]
    path = write_rows(tmp_path / "other.jsonl", rows)
    columns = ["prompt=question", "response=answer", "responses=many"]
    assert read_grouped(path, columns)["p"]["responses"] == ["a", "b", "c"]


NO_LIST = "field 'responses' must be a list of at least one string"
POOL = {"prompt": "p", "responses": ["a", "b"]}
SINGLE = {"prompt": "p", "response": "a"}


@pytest.mark.parametrize(
    "row, words, with_scores",
    [
        (["p", "a"], "a row must be an object with prompt and response or responses", False),
        ({"response": "a"}, "field 'prompt' must be a string", False),
        ({"prompt": "p"}, "field 'response' must be a string", False),
        ({**POOL, "responses": []}, NO_LIST, False),
        ({**POOL, "responses": ["a", 3]}, NO_LIST, False),
        (SINGLE, "--best_of needs the field 'scores'", True),
        (
            {**POOL, "scores": {"x": [1]}},
            "scores of 'x' must be finite numbers, one for each answer",
            True,
        ),
        ({**SINGLE, "scores": {"x": "1"}}, "scores of 'x' must be finite numbers", True),
        ({**SINGLE, "scores": {"x": math.nan}}, "not JSON (NaN is no finite number)", True),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, words, with_scores):
    path = write_rows(tmp_path / "bad.jsonl", [{**POOL, "scores": {"x": [1, 2]}}, row])
    with pytest.raises(InputError) as e:
        read_outputs(str(path), with_scores=with_scores)
    assert f"{path}:2: {words}" in str(e.value)


# ------------------------------------------------------------------------------------ the script


def run(*args):
    cli.run(sample_bon.Config, sample_bon.main, list(map(str, args)))


def read_result(folder):
    return json.loads((folder / "diversity.json").read_text())


def draw_encoder_texts(rng):
    """Four answers to each of four prompts."""
    rows = []
    for _ in range(4):
        rows.append([rng.choice(ENCODER_TEXTS) for _ in range(4)])
    return rows


@pytest.fixture(scope="module")
def from_files(tmp_path_factory, encoder_folders):
    """A run of --from with both models.

    -> (its folder, what it printed, diversity.json, the texts of b.jsonl)
    a.jsonl is a pool, b.jsonl has one answer a row.
    """
    folder = tmp_path_factory.mktemp("from_files")
    rng = random.Random(0)
    texts_a = draw_encoder_texts(rng)
    texts_b = draw_encoder_texts(rng)
    rows_a = make_rows(texts_a)
    for row in rows_a:
        row["scores"] = {"x": [0, 1, 2, 3]}
    rows_b = []
    for row in make_rows(texts_b):
        for text in row["responses"]:
            rows_b.append({"prompt": row["prompt"], "response": text, "scores": {"x": 1}})
    write_rows(folder / "a.jsonl", rows_a)
    write_rows(folder / "b.jsonl", rows_b)

    models = ("--encoder", encoder_folders["bert"], "--nli_model", encoder_folders["roberta"])
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(sample_bon, "train_what_is_missing", lambda *args: pytest.fail("trained"))
        run("--from", "a.jsonl", "b.jsonl", *models, "--best_of", 2, "--truncate", 3)
    return folder, printed.getvalue(), read_result(folder / "runs/diversity"), texts_b


def test_from_files_measures_each_file_and_its_best_of_n(from_files, encoder_folders):
    _, printed, result, _ = from_files
    names = ["a.jsonl", "b.jsonl", "a.jsonl, best of 2", "b.jsonl, best of 2"]
    assert list(result["systems"]) == names
    assert list(result["truncated"]["systems"]) == names
    assert result["prompts"] == 4
    assert result["outputs"] == 4
    assert result["vocab_size"] == 10
    assert result["from_files"] == names[:2]
    assert result["best_of"] == 2
    assert result["encoder"] == encoder_folders["bert"]
    assert result["seed"] == 0
    # The best of one pool are alike: they are compared across prompts only.
    for name, system in result["systems"].items():
        assert (system["per_input"] is None) == name.endswith("best of 2")

    first_line = "Diversity of 4 prompts x 4 outputs: n-grams and lengths in words, V = 10"
    assert first_line in printed
    assert "first 3 words of each output" in printed
    used = "a.jsonl: 16 of 16; b.jsonl: 16 of 16; a.jsonl, best of 2: 16 of 128"
    assert f"outputs used: {used}" in printed


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_from_files_prints_what_measure_finds(from_files, encoder_folders, protocol):
    _, printed, result, texts_b = from_files
    encoder = sentence_encoder(encoder_folders["bert"])
    scorer = nli_scorer(encoder_folders["roberta"])
    expected = measure(texts_b, 10, encode=encoder, nli=scorer)[protocol]

    for name, spread in result["systems"]["b.jsonl"][protocol].items():
        assert spread["mean"] == pytest.approx(expected[name].mean, abs=1e-5), name
        low, high = spread["interval"]
        shown = f"{spread['mean']:.3f} [{low:.3f}, {high:.3f}]"
        # Figures for a single n, such as ead_1, may be equal to one that is shown.
        if "_" not in name:
            assert (shown in printed) == (name in diversity_report.TITLES), name


def test_from_files_writes_one_file(from_files):
    folder, _, _, _ = from_files
    assert sorted(os.listdir(folder)) == ["a.jsonl", "b.jsonl", "runs"]
    assert os.listdir(folder / "runs/diversity") == ["diversity.json"]


def test_from_files_with_a_tokenizer(from_files, encoder_folders, monkeypatch, capsys, tmp_path):
    folder, _, _, _ = from_files
    monkeypatch.chdir(folder)
    tokenizer = ("--vocab_size", 30, "--tokenizer", encoder_folders["bert"])
    run("--from", "a.jsonl", *tokenizer, "--output_dir", tmp_path / "mine")
    printed = capsys.readouterr().out
    assert f"n-grams and lengths in ids of {encoder_folders['bert']}, V = 30" in printed
    assert (tmp_path / "mine" / "diversity.json").exists()


@pytest.fixture
def one_file(tmp_path, monkeypatch):
    """The working directory, with a.jsonl: one prompt, two answers of three different words."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "responses": ["a b", "c"]}])
    return tmp_path


def make_folder(path, **files):
    """A folder of .json files with these texts."""
    path.mkdir()
    for name, text in files.items():
        (path / f"{name}.json").write_text(text)


def bytes_of_files(folder):
    return {path: path.read_bytes() for path in list_files(folder)}


def result_of(files):
    return json.dumps({"from_files": files, "systems": {}})


@pytest.mark.parametrize("name", ["model", "run", "list", "..", ".", "a.jsonl"])
def test_folders_of_others_are_not_written_into(one_file, capfd, name):
    """A model's, one of a run with --diversity, one whose diversity.json is something else."""
    make_folder(one_file / "model", config="{}")
    make_folder(one_file / "run", config="{}", summary="{}", diversity=result_of([]))
    make_folder(one_file / "list", diversity="[]")
    before = bytes_of_files(one_file)

    with pytest.raises(SystemExit) as e:
        run("--from", "a.jsonl", "--output_dir", name)

    error = capfd.readouterr().err
    assert e.value.code == 2
    assert len(error.splitlines()) == 1, error
    assert f"{name} is there already and is not a folder of sample_bon.py --from" in error
    assert bytes_of_files(one_file) == before


@pytest.mark.parametrize("name", ["own", "empty", "killed", "new/one"])
def test_new_empty_and_own_folders_are_welcome(one_file, name):
    make_folder(one_file / "own", diversity=result_of(["old.jsonl"]), notes="{}")
    make_folder(one_file / "empty")
    # What a run leaves that was killed while it wrote.
    make_folder(one_file / "killed")
    (one_file / "killed" / "diversity.json.tmp").write_text('{"from_files')
    (one_file / "killed" / ".lock").touch()

    for _ in range(2):
        run("--from", "a.jsonl", "--output_dir", name)
        assert read_result(one_file / name)["from_files"] == ["a.jsonl"]


def test_fresh_samples_are_measured_and_not_sampled_again(tmp_path, monkeypatch, capsys):
    """A policy of random weights: the answers of its pool, and the best of two of them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(world.model_config()).save_pretrained("sft")
    world.tokenizer().save_pretrained("sft")
    (tmp_path / "mine.py").write_text(
        "def words(prompts, responses):\n    return [float(len(r.split())) for r in responses]\n"
    )
    pool = tmp_path / "runs/bon/pool.jsonl"
    models = ("--model", "./sft", "--reward_model", "mine.py:words")
    sizes = ("--n_answers", 5, "--eval_size", 4, "--max_new_tokens", 8, "--n", 2)

    run(*models, *sizes)
    assert not (tmp_path / "runs/bon/diversity.json").exists()
    answers = pool.read_text()

    run(*models, *sizes, "--diversity", "--best_of", 2)
    assert "answers, best of 2" in capsys.readouterr().out
    assert pool.read_text() == answers

    texts = [row["responses"] for row in read_rows(pool)]
    result = read_result(tmp_path / "runs/bon")
    found = result["systems"]["answers"]
    expected = measure(texts, result["vocab_size"])["per_input"]["ead"].mean
    assert found["outputs"] == 5
    assert found["per_input"]["ead"]["mean"] == pytest.approx(expected)
    # The reward is the length, so the best are longer, unless all answers to a prompt are as long.
    length = found["across_input"]["length"]["mean"]
    length_of_best = result["systems"]["answers, best of 2"]["across_input"]["length"]["mean"]
    assert length_of_best > length or all(len(set(count_words(row))) == 1 for row in texts)


@pytest.mark.parametrize(
    "args, words",
    [
        ("--encoder x", ["without --diversity or --from nothing reads --encoder"]),
        ("--best_of 4", ["nothing reads --best_of"]),
        (
            "--diversity --best_of 8 --n_answers 8",
            ["--best_of must be below --n_answers (8)"],
        ),
        (
            "--diversity --truncate half",
            ["--truncate takes a number of tokens or median, not 'half'"],
        ),
        ("--diversity --truncate 0", ["--truncate takes"]),
        ("--diversity --nli_partners 0", ["--nli_partners must be at least 1"]),
        ("--diversity --vocab_size -1", ["--vocab_size must be at least 0"]),
        ("--from a.jsonl --pool a.jsonl", ["--from measures files alone"]),
        ("--from a.jsonl a.jsonl", ["--from names a file twice"]),
        ("--from lost.jsonl", ["lost.jsonl", "no such file"]),
        ("--from a.jsonl --encoder ./lost", ["./lost", "no such model folder"]),
        ("--from a.jsonl --best_of 2", ["a.jsonl:1", "--best_of needs the field 'scores'"]),
        ("--from a.jsonl --vocab_size 2", ["--vocab_size 2: there are 3 different words"]),
        ("--diversity --encoder ./lost", ["./lost", "no such model folder"]),
    ],
)
def test_bad_flags_are_one_line_and_nothing_is_written(one_file, capsys, args, words):
    with pytest.raises(SystemExit) as e:
        run(*args.split())
    error = capsys.readouterr().err
    assert e.value.code == 2
    assert len(error.splitlines()) == 1, error
    for word in words:
        assert word in error
    assert os.listdir(one_file) == ["a.jsonl"]


def test_an_nli_model_without_labels(one_file, capsys, encoder_folders):
    with pytest.raises(SystemExit):
        run("--from", "a.jsonl", "--nli_model", encoder_folders["bert"])
    assert "must name the labels contradiction, neutral, entailment" in capsys.readouterr().err

"""nanorlhf.rewards: every kind of reward and what goes wrong with it; and Kendall's tau (stats.py) against a double loop.

B answers, K rewards
"""

import argparse
import io
import json
import math
import os

import numpy as np
import pytest
import torch
from support import EOS, V, tiny_policy, word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedTokenizerFast

import nanorlhf.rewards
from nanorlhf import world
from nanorlhf.errors import InputError
from nanorlhf.models import load_reward_model, save_policy, save_reward_model
from nanorlhf.packing import Answers, Packed, pack
from nanorlhf.rewards import (
    check_reward,
    expand,
    kind_of,
    load_reward,
    load_rewards,
    reward_names,
    score_all,
)
from nanorlhf.runtime.distributed import Dist
from nanorlhf.runtime.files import python_function
from nanorlhf.stats import kendall_tau

ALONE = Dist(0, 1, torch.device("cpu"))
PROMPTS = ["w5 w6", "w7", "w8 w9 w10", "w5"]
RESPONSES = ["w11 w12", "w13 w14 w15", "", "w16"]


def answers(prompts=PROMPTS, responses=RESPONSES, prompt_ids=None, response_ids=None):
    tokenizer = word_tokenizer()
    prompt_ids = prompt_ids or [tokenizer(p).input_ids for p in prompts]
    return Answers(
        list(prompts),
        list(responses),
        pack(prompt_ids, response_ids or [[*tokenizer(r).input_ids, EOS] for r in responses]),
    )


def score(spec, given=None, tokenizer=None, **kwargs):
    check_reward(str(spec))
    return load_reward(str(spec), tokenizer or word_tokenizer(), ALONE, **kwargs)(
        given or answers()
    )


def refuses(function, *args, match=()):
    with pytest.raises(InputError) as e:
        function(*args)
    message = str(e.value)
    assert "\n" not in message and all(m in message for m in match), message


def same(a, b, tol=2e-5):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tol, atol=tol)


# --------------------------------------------------------------------------------------------------------------- Python functions

CODE = """
from fractions import Fraction
import math
import numpy
import torch
CALLS = []
def good(prompts, responses): return [len(p) - 0.5 * len(r) for p, r in zip(prompts, responses)]
def tensor(prompts, responses): return torch.arange(len(prompts), dtype=torch.float64)
def array(prompts, responses): return numpy.ones(len(prompts), dtype="float32")
def raises(prompts, responses): raise KeyError("no\\nsuch key")
def nan(prompts, responses): return [0.0, 1.0, math.nan, 2.0]
def infinite(prompts, responses): return [0.0, -math.inf, 0.0, 0.0]
def short(prompts, responses): return [0.0]
def words(prompts, responses): return ["a"] * len(prompts)
def digits(prompts, responses): return ["1"] * len(prompts)
def text(prompts, responses): return "1" * len(prompts)
def bytes_(prompts, responses): return b"1" * len(prompts)
def table(prompts, responses): return {float(i): p for i, p in enumerate(prompts)}
def a_set(prompts, responses): return {float(i) for i in range(len(prompts))}
def tables(prompts, responses): return [{"score": 1.0}] * len(prompts)
def complex_(prompts, responses): return [1j] * len(prompts)
def complex_tensor(prompts, responses): return torch.ones(len(prompts)) * 1j
def pairs(prompts, responses): return torch.ones(len(prompts), 2)
def nested(prompts, responses): return [[1.0]] * len(prompts)
def dates(prompts, responses): return numpy.zeros(len(prompts), dtype="datetime64[s]")
def long(prompts, responses): return [1.0] * (len(prompts) + 1)
def huge(prompts, responses): return [0.0, 1e300, 0.0, 0.0]
def huge_int(prompts, responses): return [10**400] * len(prompts)
def nan_scalar(prompts, responses): return [numpy.float64("nan")] * len(prompts)
async def later(prompts, responses): return [1.0] * len(prompts)
def returns_later(prompts, responses): return later(prompts, responses)
def scalars(prompts, responses): return [numpy.float32(1.5), torch.tensor(2.5), Fraction(7, 2), True][: len(prompts)]
def column(prompts, responses): return torch.tensor([[1.5], [2.5], [3.5], [1.0]])
def generator(prompts, responses): yield from (1.5, 2.5, 3.5, 1)
def halves(prompts, responses): return torch.tensor([1.5, 2.5, 3.5, 1.0], dtype=torch.bfloat16, requires_grad=True)
def scalar(prompts, responses): return 1.0
value = 3
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "my.py"
    path.write_text(CODE)
    return str(path)


def test_python_functions(code):
    scores = score(f"{code}:good")
    assert scores.dtype == torch.float32 and scores.tolist() == [
        len(p) - 0.5 * len(r) for p, r in zip(PROMPTS, RESPONSES)
    ]
    assert (
        score(f"{code}:tensor").tolist() == [0, 1, 2, 3]
        and score(f"{code}:tensor").dtype == torch.float32
    )
    assert score(f"{code}:array").tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["scalars", "column", "generator", "halves"])
def test_what_counts_as_numbers(code, name):
    assert score(f"{code}:{name}").tolist() == [1.5, 2.5, 3.5, 1.0]


@pytest.mark.parametrize("name, words", [
    ("raises", ["KeyError"]), ("nan", ["nan", repr(RESPONSES[2])]), ("infinite", ["-inf", repr(RESPONSES[1])]),
    ("short", ["1 scores for 4"]), ("long", ["5 scores for 4"]), ("words", ["'a' is of type str"]), ("scalar", ["TypeError"]),
    ("digits", ["one float for each response", "'1' is of type str"]), ("text", ["returned a str"]), ("bytes_", ["returned a bytes"]),
    ("table", ["returned a dict"]), ("a_set", ["returned a set"]), ("tables", ["is of type dict"]), ("complex_", ["is of type complex"]),
    ("complex_tensor", ["is of type complex"]), ("pairs", ["RuntimeError"]), ("nested", ["is of type list"]), ("dates", ["datetime"]),
    ("huge", ["returned 1e+300", repr(RESPONSES[1])]), ("huge_int", ["OverflowError"]), ("nan_scalar", ["returned nan"]),
    ("later", ["later is an async function"]), ("returns_later", ["an async function cannot be a reward"]), ("missing", ["no function 'missing'"]),
    ("value", ["no function 'value'"]),
])  # fmt: skip
@pytest.mark.filterwarnings(
    "error"
)  # one line is one line: no RuntimeWarning of a coroutine beside it
def test_python_functions_that_fail(code, name, words):
    refuses(score, f"{code}:{name}", match=[code, *words])


def test_files_that_are_no_python(tmp_path):
    refuses(score, f"{tmp_path}/none.py:f", match=["none.py", "no such file"])
    for text, word in (
        ("def f(:\n", "SyntaxError"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivision"),
    ):
        (tmp_path / "bad.py").write_text(text)
        refuses(score, f"{tmp_path}/bad.py:f", match=["bad.py", "cannot be imported", word])


ENDS = {  # statements that would end the process, or pass by `except Exception`, and what is said of them
    "sys.exit(0)": "SystemExit: 0",
    "sys.exit(3)": "SystemExit: 3",
    "sys.exit('bye')": "SystemExit: bye",
    "quit()": "SystemExit",
    "raise SystemExit": "SystemExit",
    "argparse.ArgumentParser().parse_args(['--nonsense'])": "SystemExit: unrecognized arguments: --nonsense",
    "raise asyncio.CancelledError": "CancelledError",
    "raise Odd": "Odd",
}


@pytest.mark.parametrize("statement", ENDS)
@pytest.mark.parametrize("at_import", [True, False], ids=["import", "call"])
def test_code_that_ends_the_process(tmp_path, monkeypatch, capfd, statement, at_import):
    """One line for each, at import and at call, and nothing on stderr but what the script will say."""
    monkeypatch.setattr("sys.stdin", io.StringIO())  # which quit() closes
    odd = "class Odd(BaseException):\n    def __str__(self):\n        raise ValueError\n"
    function = f"def f(prompts, responses):\n    {'return []' if at_import else statement}\n"
    own = f"{statement}\n" if at_import else ""
    (tmp_path / "my.py").write_text(f"import argparse, asyncio, sys\n{odd}{own}{function}")
    usual = argparse.ArgumentParser.error
    where = "cannot be imported: " if at_import else "my.py:f raised "
    refuses(score, f"{tmp_path}/my.py:f", match=[f"{where}{ENDS[statement]}"])
    assert argparse.ArgumentParser.error is usual and capfd.readouterr().err == ""


def test_ctrl_c_stays_what_it_is(tmp_path):
    (tmp_path / "my.py").write_text("def f(prompts, responses): raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        score(f"{tmp_path}/my.py:f")


def test_a_module_whose_names_raise(tmp_path):
    (tmp_path / "my.py").write_text("def __getattr__(name): raise RuntimeError('no ' + name)\n")
    refuses(
        score, f"{tmp_path}/my.py:f", match=["my.py: looking for 'f' raised RuntimeError: no f"]
    )


@pytest.mark.parametrize("spoil", [
    "responses.sort()", "responses.clear()", "prompts.reverse()", "prompts[:] = responses", "responses[0] = 'another text'",
])  # fmt: skip
def test_each_reward_gets_its_own_lists(tmp_path, spoil):
    """Whatever one reward does to its lists, the next one is given what was sampled, each text at its place."""
    lines = ["seen = []", "def first(prompts, responses):", "    n = len(responses)", f"    {spoil}", "    return [1.0] * n",
             "def second(prompts, responses):", "    seen.append((list(prompts), list(responses)))",
             "    return [float(len(r)) for r in responses]"]  # fmt: skip
    (tmp_path / "my.py").write_text("\n".join(lines) + "\n")
    rewards = {
        name: load_reward(f"{tmp_path}/my.py:{name}", None, ALONE) for name in ("first", "second")
    }
    given = Answers(["p", "q", "r"], ["long answer", "", "word"], None)
    scores = score_all(rewards, [given])
    assert scores.tolist() == [[1, 1, 1], [11, 0, 4]]
    assert (given.prompts, given.responses) == (["p", "q", "r"], ["long answer", "", "word"])
    assert python_function(f"{tmp_path}/my.py:second").__globals__["seen"] == [
        (given.prompts, given.responses)
    ]


# ------------------------------------------------------------------------------------------------------------ names of ensembles


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Run folders as they lie about, in the working directory."""
    monkeypatch.chdir(tmp_path)
    names = """rm/seed_10 rm/seed_2 rm/seed_0 rm/seed_x rm/seed_ rm/other_1 rm/seed_3.bak rm/my_seed_4 old/m+1 old/m+0 old/mm1 sweep/seed_7/model
        sweep/seed_11 sweep/seed_0/model seed_5 twice_1/a1 twice_1/a2 twice_2/a2 numbers/12 numbers/3 numbers/a4"""
    for name in names.split():
        os.makedirs(name)
    return tmp_path


@pytest.mark.parametrize("specs, expected", [
    (["rm/seed_{seed}"], ["rm/seed_0", "rm/seed_2", "rm/seed_10"]),  # 2 before 10
    (["./rm/seed_{seed}/"], ["./rm/seed_0/", "./rm/seed_2/", "./rm/seed_10/"]),
    (["sweep/seed_{seed}/model"], ["sweep/seed_0/model", "sweep/seed_7/model"]),  # 11 has no model
    (["old/m+{seed}"], ["old/m+0", "old/m+1"]),  # a name, not a pattern
    (["seed_{seed}"], ["seed_5"]),
    (["twice_{seed}/a{seed}"], ["twice_1/a1", "twice_2/a2"]),
    (["numbers/{seed}"], ["numbers/3", "numbers/12"]),
    (["my.py:f", "rm/seed_{seed}", "world:gold", "seed_{seed}"], ["my.py:f", "rm/seed_0", "rm/seed_2", "rm/seed_10", "world:gold", "seed_5"]),
    (["nothing/here", "a b"], ["nothing/here", "a b"]),  # what there is to load is looked at later
])  # fmt: skip
def test_seed_stands_for_the_folders_that_exist(folders, specs, expected):
    given = list(specs)
    assert expand(specs) == expected and specs == given
    absolute = [f"{folders}/{spec}" for spec in specs]
    assert expand(absolute) == [f"{folders}/{spec}" for spec in expected]
    assert len(specs) > 1 or expand(specs[0]) == expected  # one spec needs no list


@pytest.mark.parametrize("specs, words", [
    (["rm/seeds_{seed}"], ["rm/seeds_{seed}: no such folder for any seed", "train_rm.py --members"]),
    (["nowhere/seed_{seed}"], ["nowhere/seed_{seed}: no such folder"]),
    (["rm/seed_0", "sweep/seed_{seed}/models"], ["sweep/seed_{seed}/models: no such folder"]),
    (["a", "b", "a"], ["names a twice"]),
    (["rm/seed_2", "rm/seed_{seed}"], ["names rm/seed_2 twice"]),
    ([], ["names no reward"]),
])  # fmt: skip
def test_specs_that_name_no_ensemble(folders, specs, words):
    refuses(expand, specs, match=words)


@pytest.mark.parametrize("spec, kind", [
    ("world:gold", "gold"), ("my.py:good", "function"), ("a/b.py:f", "function"), ("words.tsv", "lexicon"), ("a/words.txt", "lexicon"),
    ("runs/rm/seed_0", "model"), ("world", "model"), ("org/name", "model"), ("code.py", "model"),
])  # fmt: skip
def test_a_name_says_what_kind_of_reward_it_is(spec, kind):
    assert kind_of(spec) == kind  # of files that are not there, too


def test_reward_names():
    assert reward_names(["runs/my.py:good", "runs/rm/seed_0/", "./seed_1", "world:gold"]) == [
        "my.py:good",
        "seed_0",
        "seed_1",
        "world:gold",
    ]
    same_ends = ["runs/a/seed_0", "runs/b/seed_0/", "runs/b/seed_1"]
    assert reward_names(same_ends) == same_ends  # where two would be the same, all are written out
    assert reward_names(["x/seed_0/model", "x/seed_1/model"]) == [
        "x/seed_0/model",
        "x/seed_1/model",
    ]
    assert reward_names(["gpt2"]) == ["gpt2"] and reward_names([]) == []


# ------------------------------------------------------------------------------------------------------------- lexicon and the world


def test_a_lexicon_by_hand(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text("good\t2.5\t0.9\t[1, 2]\nBad\t-3\n\nwell-made\t1\ndon't\t-1\r\nawful\t-60\n")
    given = answers(
        ["good"] * 7,
        [
            "good",
            "GOOD Bad.",
            "a well-made good, good thing!",
            "awful",
            "don't goodness",
            "",
            "good " * 30,
        ],
    )
    same(score(path, given), [0.5, -0.1, 1.2, -10.0, -0.2, 0.0, 10.0])
    (tmp_path / "words.txt").write_text(path.read_text())
    same(score(tmp_path / "words.txt", given), score(path, given).tolist())


@pytest.mark.parametrize(
    "text, line", [("good\t1\n\nbad -2\n", 3), ("good\t1\nbad\tvery\n", 2), ("good\n", 1)]
)
def test_a_bad_lexicon(tmp_path, text, line):
    path = tmp_path / "words.tsv"
    path.write_text(text)
    refuses(check_reward, str(path), match=[f"{path}:{line}:"])  # before any model is loaded


def test_lexicons_without_words(tmp_path):
    (tmp_path / "words.tsv").write_text("\n")
    refuses(check_reward, str(tmp_path / "words.tsv"), match=["empty"])
    (tmp_path / "words.tsv").write_text("very good\t1\n\u5f88\u597d\t2\n", encoding="utf-8")
    refuses(
        check_reward,
        str(tmp_path / "words.tsv"),
        match=["none of its 2 lines can match a word of a text"],
    )
    (tmp_path / "words.tsv").write_bytes(b"good\t1\ncaf\xe9\t2\n")
    refuses(check_reward, str(tmp_path / "words.tsv"), match=["words.tsv: not UTF-8"])
    (tmp_path / "folder.tsv").mkdir()
    refuses(check_reward, str(tmp_path / "folder.tsv"), match=["folder.tsv: cannot be read"])
    refuses(check_reward, str(tmp_path / "none.tsv"), match=["none.tsv", "no such file"])


@pytest.mark.parametrize("text, words", [
    ("good\t1\nvery good\t5\n", ["of its lines 1 can match no word of a text, such as 'very good'"]),  # two words
    ("\t5\ngood\t1\n", ["1 can match no word", "such as ''"]),
    ("good\t1\ncaf\u00e9\t2\n4ever\t3\n", ["2 can match no word", "such as 'caf\u00e9'"]),
    ("good\t1\nGood\t3\ngood\t1\n", ["2 name a word again, whose last value counts, such as 'good'"]),
    ("good\t5\ngood\t1\n :)\t1\n", ["1 can match no word of a text, such as ':)', and 1 name a word again"]),
])  # fmt: skip
def test_lines_of_a_lexicon_without_effect(tmp_path, capsys, text, words):
    path = tmp_path / "words.tsv"
    path.write_text(text, encoding="utf-8")
    same(score(path, answers(["p"], ["very good good"])), [0.4])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 1 and all(
        word in printed for word in (str(path), *words)
    ), printed


def test_a_lexicon_with_a_byte_order_mark(tmp_path, capsys):
    path = tmp_path / "words.tsv"
    path.write_bytes(b"\xef\xbb\xbfgood\t5\nbad\t-5\n")
    same(score(path, answers(["p", "p"], ["good", "bad"])), [1.0, -1.0])
    assert not capsys.readouterr().out


def test_the_gold_of_the_world():
    rows = world.demonstrations(5)
    prompts, responses = [r["prompt"] for r in rows], [r["response"] for r in rows]
    same(score("world:gold", answers(prompts, responses)), world.gold(prompts, responses))
    refuses(score, "world:gold", match=["world:gold", "topic"])


# --------------------------------------------------------------------------------------------------------------------- reward models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model, and the policy folder that it was made from."""
    root = tmp_path_factory.mktemp("rm")
    save_policy(tiny_policy("neox"), word_tokenizer(), str(root / "policy"))
    rm = load_reward_model(str(root / "policy"), seed=0)
    rm.standardise(0.3, 0.5)
    save_reward_model(rm, word_tokenizer(), str(root / "rm"))
    other = word_tokenizer(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in reversed(range(3, V)))])
    save_reward_model(rm, other, str(root / "other_words"))
    return root


IDS = [
    [11, 0, 12, EOS],
    [13, EOS, 14, 15],
    [2, EOS],
    [16, 2],
]  # <pad>, <eos> and <unk> inside: decoding would lose them


@pytest.mark.parametrize("size", [1, 3, 64])
def test_the_sampled_ids_are_scored_as_they_are(folder, size):
    tokenizer = word_tokenizer()
    given = answers(prompt_ids=[[5, 6], [7], [8, 9, 10], [5]], response_ids=IDS)
    texts = tokenizer.batch_decode(IDS, skip_special_tokens=True)
    assert [[*tokenizer(t).input_ids, EOS] for t in texts] != IDS
    rm = load_reward_model(str(folder / "rm")).eval()
    with torch.no_grad():
        expected = [rm(pack([p], [r])).item() for p, r in zip([[5, 6], [7], [8, 9, 10], [5]], IDS)]
    assert np.std(expected) > 0.1
    scores = score(folder / "rm", given, micro_batch_size=size)
    same(scores, expected)
    same(
        score(
            folder / "rm",
            answers(["?"] * 4, ["?"] * 4, [[5, 6], [7], [8, 9, 10], [5]], IDS),
            micro_batch_size=size,
        ),
        expected,
    )
    assert (
        score(folder / "rm") - scores
    ).abs().max() > 0.05  # what tokenising the texts would give
    assert not scores.requires_grad


@pytest.mark.parametrize("size", [1, 3, 64])
def test_another_vocabulary_tokenises_the_texts(folder, size):
    rm = load_reward_model(str(folder / "rm")).eval()
    flip = lambda text: [V + 2 - int(w[1:]) for w in text.split()]  # noqa: E731   w3 has id 59, w4 58, ...
    with torch.no_grad():
        expected = [
            rm(pack([flip(p)], [[*flip(r), EOS]])).item() for p, r in zip(PROMPTS, RESPONSES)
        ]
    scores = score(folder / "other_words", micro_batch_size=size)
    same(scores, expected)
    assert (scores - score(folder / "rm")).abs().max() > 0.05


def test_a_policy_is_no_reward_model(folder):
    refuses(score, folder / "policy", match=["policy"])


def bert(path, labels, words=None):
    """A tiny encoder with its own word-piece tokenizer, saved."""
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *(words or ["w", *(f"##{i}" for i in range(10)), "good"]),
    ]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
                                        model_max_length=40)  # fmt: skip
    config = BertConfig(vocab_size=len(pieces), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                        max_position_embeddings=40, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)})  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(5)
    model.classifier.weight.data.mul_(10)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model, tokenizer


@pytest.mark.parametrize("labels, label", [
    (("NEGATIVE", "POSITIVE"), 1), (("positive", "negative"), 0), (("LABEL_0", "LABEL_1"), 1), (("Pos", "Neutral", "Neg"), 0), (("LABEL_0",), 0),
])  # fmt: skip
def test_a_classifier_by_its_positive_logit(tmp_path, labels, label):
    model, tokenizer = bert(str(tmp_path / "bert"), labels)
    with torch.no_grad():
        expected = [
            model(**tokenizer(f"{p} {r}", return_tensors="pt")).logits[0, label].item()
            for p, r in zip(PROMPTS, RESPONSES)
        ]
    assert np.std(expected) > 0.05
    for size in (1, 3, 64):
        scores = score(tmp_path / "bert", micro_batch_size=size)
        same(scores, expected)
    assert not scores.requires_grad and scores.dtype == torch.float32


def test_a_classifier_reads_the_response_to_a_long_prompt(tmp_path):
    bert(str(tmp_path / "bert"), ("NEGATIVE", "POSITIVE"))
    scores = score(tmp_path / "bert", answers(["w5 " * 60] * 2, ["w11", "good w14"]))
    assert (scores[0] - scores[1]).abs() > 1e-3


def test_a_model_that_gives_no_number(folder, tmp_path):
    rm = load_reward_model(str(folder / "rm"))
    rm.model.score.weight.data.fill_(math.nan)
    save_reward_model(rm, word_tokenizer(), str(tmp_path / "nan"))
    refuses(score, tmp_path / "nan", match=["nan", "not finite"])
    refuses(score, tmp_path / "none", match=["none"])


def test_several_rewards_side_by_side(folder, code):
    specs = (str(folder / "rm"), f"{code}:good", f"{code}:tensor")
    rewards = {spec: load_reward(spec, word_tokenizer(), ALONE) for spec in specs}
    scores = score_all(rewards, [answers()])
    assert scores.shape == (3, 4) and scores.dtype == torch.float32
    for row, spec in zip(scores, specs):
        assert torch.equal(row, score(spec))
    part = Answers(PROMPTS[1:3], RESPONSES[1:3], answers().batch.rows(torch.tensor([1, 2])))
    same(score_all(rewards, [part])[:2], scores[:2, 1:3].tolist())


def test_matrix_products_in_bfloat16(folder):
    exact, rounded = (score(folder / "rm", dtype=dtype) for dtype in ("float32", "bfloat16"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = load_reward_model(str(folder / "rm")).eval()(answers().batch)
    same(rounded, expected, 1e-3)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.std() + 0.02


# -------------------------------------------------------------------------------------------------------- the members of an ensemble


@pytest.fixture(scope="module")
def members(folder):
    """Reward models beside `folder`'s: own_0..2 with the policy's words, other_0..2 with other ids for them, eos_0..2 with another EOS."""
    rm, ends = (
        load_reward_model(str(folder / "rm")),
        word_tokenizer(eos_token="<pad>", pad_token="<eos>"),
    )  # in tokenizer_config.json alone
    other = word_tokenizer(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in reversed(range(3, V)))])
    for i in range(3):
        rm.model.score.weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(i))
        for name, tokenizer in (("own", word_tokenizer()), ("other", other), ("eos", ends)):
            save_reward_model(rm, tokenizer, str(folder / f"{name}_{i}"))
    return folder


ORDERS = (["own_0", "own_1", "own_2"], ["other_0", "other_1", "other_2"], ["own_0", "other_0", "eos_0"], ["eos_0", "other_0", "own_0"],
          ["other_1", "eos_0", "other_0", "own_2", "eos_1"])  # fmt: skip


@pytest.mark.parametrize("names", ORDERS, ids=" ".join)
@pytest.mark.parametrize("with_ids", [True, False])
def test_members_score_as_they_do_alone(members, monkeypatch, names, with_ids):
    """Each as by its own forward of one row at a time; texts are tokenized, and sorted by length, once for all that share a tokenizer."""
    calls = {"encode_prompts": 0, "encode_responses": 0, "micro_batches": 0}

    def counted(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call  # fmt: skip

    prompt_ids, response_ids = (
        [[5, 6], [7], [8, 9, 10], [5]],
        [[11, 12, EOS], [13, 14, 15, EOS], [EOS], [16]],
    )  # the last was cut off
    flip = lambda ids: [V + 2 - i if i > 2 else i for i in ids]  # noqa: E731
    expected = []
    for name in names:
        model, kind, row = load_reward_model(str(members / name)).eval(), name.split("_")[0], []
        for p, r in zip(prompt_ids, response_ids):
            r = (
                r if with_ids or r[-1] == EOS else [*r, EOS]
            )  # texts alone do not say that they were cut off
            # Sampled ids are not touched where the vocabulary is the same, even if its EOS is another one.
            p, r = (
                (flip(p), flip(r))
                if kind == "other"
                else (p, [0 if i == EOS and kind == "eos" and not with_ids else i for i in r])
            )
            with torch.no_grad():
                row.append(model(pack([p], [r])).item())
        expected.append(row)
    assert np.ptp(expected, axis=1).min() > 0.1 and np.ptp(expected, axis=0).min() > 1e-3
    given = (
        answers(prompt_ids=prompt_ids, response_ids=response_ids)
        if with_ids
        else Answers(list(PROMPTS), list(RESPONSES), None)
    )
    rewards = load_rewards(
        [str(members / name) for name in names], word_tokenizer() if with_ids else None, ALONE, 3
    )
    assert list(rewards) == names
    for name in ("encode_prompts", "encode_responses"):
        monkeypatch.setattr(nanorlhf.rewards, name, counted(name, getattr(nanorlhf.rewards, name)))
    monkeypatch.setattr(Packed, "micro_batches", counted("micro_batches", Packed.micro_batches))
    scores = score_all(rewards, [given])
    same(scores, expected)
    kinds = {name.split("_")[0] for name in names}
    if with_ids:
        kinds = {kind.replace("eos", "own") for kind in kinds}
    n = len(kinds - {"own"} if with_ids else kinds)
    assert calls == {"encode_prompts": n, "encode_responses": n, "micro_batches": len(kinds)}
    assert torch.equal(score_all(rewards, [given]), scores)
    alone = [
        reward(Answers(given.prompts, given.responses, given.batch)) for reward in rewards.values()
    ]
    assert torch.equal(scores, torch.stack(alone))


@pytest.mark.parametrize("kind", ["own", "other"])
def test_members_of_every_micro_batch_size_side_by_side(members, kind):
    given = answers(PROMPTS * 3, RESPONSES * 3)
    rewards = {
        size: load_reward(str(members / f"{kind}_0"), word_tokenizer(), ALONE, size)
        for size in (1, 5, 12, 64)
    }
    scores = score_all(rewards, [given])
    for row in scores:
        same(row, scores[0].tolist())
    assert scores[0].std() > 0.1


@pytest.mark.parametrize("kind", ["own", "other"])
def test_texts_alone(members, code, kind):
    """Without sampled ids (and a policy's tokenizer) a text ends with EOS."""
    texts = Answers(list(PROMPTS), list(RESPONSES), None)
    assert len(texts) == 4
    same(
        load_reward(str(members / f"{kind}_0"), None, ALONE)(texts),
        score(members / f"{kind}_0").tolist(),
    )
    assert torch.equal(load_reward(f"{code}:good", None, ALONE)(texts), score(f"{code}:good"))


@pytest.mark.parametrize(
    "order", [["own_0", "short"], ["short", "own_0"], ["own_0", "own_1", "short"]], ids=" ".join
)
def test_a_member_with_a_smaller_context(members, order):
    """It says so itself, whoever tokenized the texts."""
    save_reward_model(
        load_reward_model(str(members / "own_0")), word_tokenizer(), str(members / "short")
    )
    path = members / "short" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 8}))
    rewards = load_rewards([str(members / name) for name in order], word_tokenizer(), ALONE, 2)
    fits = answers(["w5 w6 w7"] * 3, ["w8", "w8 w9 w10 w11", "w9"])  # 3 + 5 tokens
    scores = score_all(rewards, [fits])
    same(scores[order.index("short")], scores[order.index("own_0")].tolist())
    too_long = answers(["w5 w6 w7"] * 3, ["w8", "w8 w9 w10 w11 w12", "w9"])
    refuses(score_all, rewards, [too_long], match=["short: a text of 9 tokens, a context of 8"])


# ------------------------------------------------------------------------------------------------------------------ Kendall's tau


def tau_b(x, y):
    concordant = discordant = only_x = only_y = 0
    for i in range(len(x)):
        for j in range(i):
            a, b = x[i] - x[j], y[i] - y[j]
            concordant += a * b > 0
            discordant += a * b < 0
            only_x += a == 0 and b != 0
            only_y += b == 0 and a != 0
    pairs = concordant + discordant
    return (concordant - discordant) / math.sqrt((pairs + only_x) * (pairs + only_y))


@pytest.mark.parametrize("levels", [2, 4, 1000])
@pytest.mark.parametrize("n", [2, 7, 40])
def test_kendall_tau_by_a_double_loop(n, levels):
    rng = np.random.default_rng([n, levels])
    x, y = rng.integers(0, levels, n), rng.integers(0, levels, n)
    x[:2], y[:2] = [0, 1], [1, 0]
    tau, p = kendall_tau(x, torch.tensor(y), permutations=20)
    assert (
        tau == pytest.approx(tau_b(x.tolist(), y.tolist()), abs=1e-9) and 1 / 21 - 1e-12 <= p <= 1
    )
    assert kendall_tau(-x, y, permutations=1)[0] == pytest.approx(-tau, abs=1e-9)


def test_the_p_value():
    rng = np.random.default_rng(0)
    x = rng.normal(size=30)
    assert kendall_tau(x, x) == (pytest.approx(1.0), pytest.approx(1 / 1001))
    assert kendall_tau(x, -x) == (pytest.approx(-1.0), pytest.approx(1 / 1001))  # two-sided
    ps = np.array(
        [
            kendall_tau(rng.normal(size=12), rng.normal(size=12), permutations=99, seed=i)[1]
            for i in range(200)
        ]
    )
    assert (
        0.4 < ps.mean() < 0.6
        and 0.02 < (ps <= 0.05).mean() < 0.09
        and abs((ps <= 0.5).mean() - 0.5) < 0.1
    )
    assert kendall_tau(x, x**2, seed=1) == kendall_tau(x, x**2, seed=1)
    # All 4! orders of 1 2 3 4: |tau| = 1 in 2 of them, >= 2/3 in 8.
    assert kendall_tau([1, 2, 3, 4], [1, 2, 3, 4], permutations=4000)[1] == pytest.approx(
        2 / 24, abs=0.02
    )
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3], permutations=4000)[1] == pytest.approx(
        8 / 24, abs=0.03
    )


def test_kendall_tau_of_what_has_none():
    assert all(math.isnan(v) for v in kendall_tau([1, 1, 1], [1, 2, 3]))
    for x, y in (([1], [1]), ([1, 2], [1, 2, 3]), ([1, math.nan], [1, 2]), ([1, 2], [1, math.inf])):
        with pytest.raises(ValueError):
            kendall_tau(x, y)

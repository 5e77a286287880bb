"""nanorlhf.rewards: every kind of reward and what goes wrong with it; and Kendall's tau of
stats.py against a double loop.

    B answers, K rewards, V vocabulary

The words of the tiny models are w3, w4, ..., whose token ids are 3, 4, ...
"""

import argparse
import gc
import io
import json
import math
import os

import numpy as np
import pytest
import torch
from chat_tokenizers import LLAMA, byte_tokenizer
from support import refuses
from tiny_models import EOS, V, tiny_policy, word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedTokenizerFast

import nanorlhf.rewards
from nanorlhf import world
from nanorlhf.errors import InputError
from nanorlhf.models import load_reward_model, save_policy, save_reward_model
from nanorlhf.packing import Answers, Packed, pack
from nanorlhf.rewards import (
    check_reward,
    encode_again,
    expand,
    fingerprint_reward,
    kind_of,
    load_reward,
    load_rewards,
    reward_names,
    score_all,
    text_batches,
)
from nanorlhf.runtime.distributed import Dist
from nanorlhf.runtime.files import python_function
from nanorlhf.stats import kendall_tau

ALONE = Dist(0, 1, torch.device("cpu"))
PROMPTS = ["w5 w6", "w7", "w8 w9 w10", "w5"]
RESPONSES = ["w11 w12", "w13 w14 w15", "", "w16"]
# The same texts as token ids.
PROMPT_IDS = [[5, 6], [7], [8, 9, 10], [5]]
RESPONSE_IDS = [[11, 12, EOS], [13, 14, 15, EOS], [EOS], [16, EOS]]


def answers(prompts=PROMPTS, responses=RESPONSES):
    """Answers whose token ids are those of their texts, each of which ended with EOS."""
    tokenizer = word_tokenizer()
    prompt_ids = []
    response_ids = []
    for prompt, response in zip(prompts, responses, strict=True):
        prompt_ids.append(tokenizer(prompt).input_ids)
        response_ids.append([*tokenizer(response).input_ids, EOS])
    return Answers(list(prompts), list(responses), pack(prompt_ids, response_ids))


def sampled_answers(response_ids, prompts=PROMPTS, responses=RESPONSES):
    """Answers to PROMPT_IDS with these sampled ids, whatever their texts are."""
    return Answers(list(prompts), list(responses), pack(PROMPT_IDS, response_ids))


def texts_alone():
    """Answers of which only the texts are known."""
    return Answers(list(PROMPTS), list(RESPONSES), None)


def score(spec, given=None, **kwargs):
    """The scores of a reward that is named on the command line: [B]."""
    if given is None:
        given = answers()
    check_reward(str(spec))
    reward = load_reward(str(spec), word_tokenizer(), ALONE, **kwargs)
    return reward(given)


def check_refused(spec, *words):
    """score() must refuse this reward in one line that says all these words."""
    refuses(score, spec, match=words)


def same(found, expected, tol=2e-5):
    """The two are equal up to float32's rounding in a model."""
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


# ------------------------------------------------------------------------------ Python functions

CODE = """
import itertools
import math
from fractions import Fraction

import numpy
import torch

# Good ones.
def good(prompts, responses): return [len(p) - 0.5 * len(r) for p, r in zip(prompts, responses)]
def tensor(prompts, responses): return torch.arange(len(prompts), dtype=torch.float64)
def array(prompts, responses): return numpy.ones(len(prompts), dtype="float32")

# 1.5, 2.5, 3.5 and 1 in several types.
def scalars(prompts, responses):
    return [numpy.float32(1.5), torch.tensor(2.5), Fraction(7, 2), True]
def column(prompts, responses): return torch.tensor([[1.5], [2.5], [3.5], [1.0]])
def generator(prompts, responses): yield from (1.5, 2.5, 3.5, 1)
def halves(prompts, responses):
    return torch.tensor([1.5, 2.5, 3.5, 1.0], dtype=torch.bfloat16, requires_grad=True)

# Bad ones.
def raises(prompts, responses): raise KeyError("no\\nsuch key")
def nan(prompts, responses): return [0.0, 1.0, math.nan, 2.0]
def nan_scalar(prompts, responses): return [numpy.float64("nan")] * len(prompts)
def infinite(prompts, responses): return [0.0, -math.inf, 0.0, 0.0]
def huge(prompts, responses): return [0.0, 1e300, 0.0, 0.0]
def huge_int(prompts, responses): return [10**400] * len(prompts)
def short(prompts, responses): return [0.0]
def long(prompts, responses): return [1.0] * (len(prompts) + 1)
def endless(prompts, responses): return itertools.repeat(1.0)
def scalar(prompts, responses): return 1.0
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
async def later(prompts, responses): return [1.0] * len(prompts)
def returns_later(prompts, responses): return later(prompts, responses)
value = 3
"""
# {a bad function: what the message says}
BAD_FUNCTIONS = {
    "raises": "KeyError",
    "nan": "returned nan for the response ''",
    "nan_scalar": "returned nan",
    "infinite": "returned -inf for the response 'w13 w14 w15'",
    "huge": "returned 1e+300 for the response 'w13 w14 w15'",  # too large for float32
    "huge_int": "OverflowError",
    "short": "1 scores for 4",
    "long": "it returned more than 4 scores",
    "endless": "it returned more than 4 scores",
    "scalar": "TypeError",
    "words": "'a' is of type str",
    "digits": "must return one float for each response: TypeError: '1' is of type str",
    "text": "returned a str",
    "bytes_": "returned a bytes",
    "table": "returned a dict",
    "a_set": "returned a set",
    "tables": "is of type dict",
    "complex_": "is of type complex",
    "complex_tensor": "is of type complex",
    "pairs": "RuntimeError",
    "nested": "is of type list",
    "dates": "datetime",
    "later": "later is an async function",
    "returns_later": "an async function cannot be a reward",
    "missing": "no function 'missing'",
    "value": "no function 'value'",
}


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """The path of a file with all these functions."""
    path = tmp_path_factory.mktemp("rewards") / "my.py"
    path.write_text(CODE)
    return str(path)


def test_a_function_is_given_prompts_and_responses(code):
    scores = score(f"{code}:good")
    # len(prompt) - len(response) / 2: 5 - 7/2, 2 - 11/2, 9 - 0, 2 - 3/2.
    assert scores.tolist() == [1.5, -3.5, 9, 0.5]
    assert scores.dtype == torch.float32


def test_a_function_may_return_a_tensor_or_an_array(code):
    scores = score(f"{code}:tensor")
    assert scores.tolist() == [0, 1, 2, 3]
    assert scores.dtype == torch.float32
    assert score(f"{code}:array").tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["scalars", "column", "generator", "halves"])
def test_what_counts_as_numbers(code, name):
    assert score(f"{code}:{name}").tolist() == [1.5, 2.5, 3.5, 1.0]


@pytest.mark.parametrize("name, words", BAD_FUNCTIONS.items())
def test_functions_that_fail_say_so_in_one_line(code, name, words):
    check_refused(f"{code}:{name}", code, words)


SETTING_CODE = """
from __future__ import annotations

import os
import pickle
from dataclasses import dataclass

import torch

torch.set_grad_enabled(False)

@dataclass
class Scale:
    factor: float

def good(prompts, responses):
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    scale = pickle.loads(pickle.dumps(Scale(2.0)))
    yield from [scale.factor] * len(prompts)
"""


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("responses, prompts", "and takes them as (responses, prompts)"),
        ("completions, prompts=None", "and takes them as (completions, prompts)"),
        ("completions, **kwargs", "too many positional arguments"),
        ("prompts", "too many positional arguments"),
        ("prompts, responses, rows, scale", "missing a required argument: 'scale'"),
        ("prompts, responses, *, rows", "missing a required argument: 'rows'"),
    ],
)
def test_a_function_that_takes_other_arguments_is_refused_before_anything_is_loaded(
    tmp_path, arguments, words
):
    path = tmp_path / "my.py"
    path.write_text(f"def f({arguments}):\n    return [1.0] * 4\n")
    with pytest.raises(InputError) as error:
        check_reward(f"{path}:f")
    message = str(error.value)
    assert message.startswith(f"the reward {path}:f is called with (prompts, responses")
    assert words in message


def test_a_file_without_a_function_is_refused(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(CODE)
    refuses(check_reward, str(path), match=[f"{path}: name a function in it, as {path}:FUNCTION"])


def test_what_a_function_sets_for_the_whole_process_is_set_back(tmp_path):
    """Else nothing could be trained any more, and the run's files would be looked for elsewhere.

    A dataclass, whose annotations are texts, and pickle look up the module that they are in.
    """
    path = tmp_path / "settings.py"
    path.write_text(SETTING_CODE)
    folder = os.getcwd()
    assert score(f"{path}:good").tolist() == [2.0] * 4
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert torch.zeros(1).device.type == "cpu"
    assert os.getcwd() == folder


def test_a_function_needs_no_gradients(tmp_path):
    """A model of its own may hold weights, whose products have no numpy() with gradients."""
    path = tmp_path / "weights.py"
    path.write_text(
        "import torch\nw = torch.nn.Parameter(torch.ones(4))\n"
        "def good(prompts, responses): return (2 * w).numpy()\n"
    )
    assert score(f"{path}:good").tolist() == [2.0] * 4


def test_a_module_beside_the_file(tmp_path, monkeypatch):
    (tmp_path / "beside_it.py").write_text("def good(prompts, responses): return [1.0] * 4\n")
    path = tmp_path / "imports.py"
    path.write_text("from beside_it import good\n")
    check_refused(f"{path}:good", "No module named 'beside_it'", f"PYTHONPATH={tmp_path}")
    monkeypatch.syspath_prepend(tmp_path)
    assert score(f"{path}:good").tolist() == [1.0] * 4


# --------------------------------------------------------------------- functions that know the row

ROW_CODE = """
SEEN = []

# The two examples of the page: a reference answer in the row, and a format.
def exact_match(prompts, responses, rows):
    return [float(row["answer"] == response) for row, response in zip(rows, responses)]
def is_formatted(prompts, responses):
    return [float(response.startswith("w11")) for response in responses]

def remember(prompts, responses, rows):
    SEEN.append((prompts, responses, rows))
    return [0.0] * len(prompts)
def spoil(prompts, responses, rows):
    rows[0].clear()
    prompts[0][0]["content"] = "spoiled"
    return [0.0] * len(prompts)

def third_without_value(prompts, responses, data): return [len(row) for row in data]
def setting(prompts, responses, scale=2.0): return [scale] * len(prompts)
def keyword(prompts, responses, *, rows=None): return [float(rows is None)] * len(prompts)
"""
CHAT = [{"role": "user", "content": "w5 w6"}]
DATA_ROWS = [
    {"messages": CHAT, "answer": "w11 w12"},
    {"messages": CHAT, "answer": "w13"},
    {"messages": CHAT, "answer": "", "id": 4},
    {"messages": CHAT, "answer": "w16"},
]


@pytest.fixture
def row_code(tmp_path):
    path = tmp_path / "rows.py"
    path.write_text(ROW_CODE)
    return str(path)


def chat_answers():
    return Answers([CHAT] * 4, list(RESPONSES), None, DATA_ROWS)


def test_a_function_may_ask_for_the_datas_rows(row_code):
    assert score(f"{row_code}:exact_match", chat_answers()).tolist() == [1, 0, 1, 1]
    assert score(f"{row_code}:is_formatted", chat_answers()).tolist() == [1, 0, 0, 0]
    assert score(f"{row_code}:third_without_value", chat_answers()).tolist() == [2, 2, 3, 2]


def test_a_function_sees_the_datas_own_prompts_and_rows(row_code):
    score(f"{row_code}:remember", chat_answers())
    ((prompts, responses, rows),) = python_function(f"{row_code}:remember").__globals__["SEEN"]
    assert prompts == [CHAT] * 4
    assert responses == RESPONSES
    assert rows == DATA_ROWS


def test_a_function_cannot_change_what_the_next_reward_sees(row_code):
    given = chat_answers()
    score(f"{row_code}:spoil", given)
    assert given.prompts == [[{"role": "user", "content": "w5 w6"}]] * 4
    assert given.rows[0]["answer"] == "w11 w12"


def test_settings_of_a_function_are_no_rows(row_code):
    assert score(f"{row_code}:setting").tolist() == [2, 2, 2, 2]
    assert score(f"{row_code}:keyword").tolist() == [1, 1, 1, 1]


def test_a_function_that_needs_rows_says_so_where_there_are_none(row_code):
    check_refused(f"{row_code}:exact_match", "asks for the data's rows", "have none")


def test_python_does_not_warn_beside_that_line(code, recwarn):
    """It warns of a coroutine that nobody has waited for, once that is collected."""
    check_refused(f"{code}:returns_later", "an async function")
    gc.collect()
    assert not recwarn.list


def test_a_file_that_is_missing(tmp_path):
    check_refused(f"{tmp_path}/none.py:f", "none.py", "no such file")


@pytest.mark.parametrize(
    "text, error",
    [
        ("def f(:\n", "SyntaxError"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivision"),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path, text, error):
    path = tmp_path / "bad.py"
    path.write_text(text)
    check_refused(f"{path}:f", "bad.py", "cannot be imported", error)


# Statements that would end the process, or that `except Exception` lets pass, and what is said.
UNKNOWN_FLAG = "argparse.ArgumentParser().parse_args(['--nonsense'])"
ENDS = {
    "sys.exit(0)": "SystemExit: 0",
    "sys.exit(3)": "SystemExit: 3",
    "sys.exit('bye')": "SystemExit: bye",
    "quit()": "SystemExit",
    "raise SystemExit": "SystemExit",
    UNKNOWN_FLAG: "SystemExit: unrecognized arguments: --nonsense",
    "raise asyncio.CancelledError": "CancelledError",
    "raise Odd": "Odd",
}
ODD_ERROR = """
import argparse, asyncio, sys

class Odd(BaseException):
    def __str__(self):
        raise ValueError
"""


@pytest.fixture
def check_ends(tmp_path, monkeypatch, capfd):
    """A function: this code is refused with these words, and nothing else is printed or changed."""
    # quit() closes sys.stdin.
    monkeypatch.setattr("sys.stdin", io.StringIO())
    usual = argparse.ArgumentParser.error

    def check(text, words):
        path = tmp_path / "my.py"
        path.write_text(ODD_ERROR + text)
        check_refused(f"{path}:f", words)
        assert argparse.ArgumentParser.error is usual
        assert capfd.readouterr().err == ""

    return check


@pytest.mark.parametrize("statement, error", ENDS.items(), ids=ENDS.keys())
def test_a_file_that_ends_the_process_when_it_is_imported(check_ends, statement, error):
    function = "def f(prompts, responses): return []\n"
    check_ends(f"{statement}\n{function}", f"cannot be imported: {error}")


@pytest.mark.parametrize("statement, error", ENDS.items(), ids=ENDS.keys())
def test_a_function_that_ends_the_process_when_it_is_called(check_ends, statement, error):
    check_ends(f"def f(prompts, responses): {statement}\n", f"my.py:f raised {error}")


def test_ctrl_c_stays_what_it_is(tmp_path):
    path = tmp_path / "my.py"
    path.write_text("def f(prompts, responses): raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        score(f"{path}:f")


TWO_REWARDS = """
def first(prompts, responses):
    n = len(responses)
    SPOIL
    return [1.0] * n

seen = []
def second(prompts, responses):
    seen.append((list(prompts), list(responses)))
    return [float(len(r)) for r in responses]
"""
SPOILS = [
    "responses.sort()",
    "responses.clear()",
    "prompts.reverse()",
    "prompts[:] = responses",
    "responses[0] = 'another text'",
]


@pytest.mark.parametrize("spoil", SPOILS)
def test_each_reward_gets_its_own_lists(tmp_path, spoil):
    """Whatever one reward does to its lists, the next one is given what was sampled."""
    path = tmp_path / "my.py"
    path.write_text(TWO_REWARDS.replace("SPOIL", spoil))
    rewards = {}
    for name in ("first", "second"):
        rewards[name] = load_reward(f"{path}:{name}", None, ALONE)
    prompts = ["p", "q", "r"]
    responses = ["long answer", "", "word"]
    given = Answers(list(prompts), list(responses), None)

    scores = score_all(rewards, [given])
    assert scores.tolist() == [[1, 1, 1], [11, 0, 4]]
    assert given.prompts == prompts
    assert given.responses == responses
    seen = python_function(f"{path}:second").__globals__["seen"]
    assert seen == [(prompts, responses)]


# ---------------------------------------------------------------------------- names of ensembles

FOLDERS = """
rm/seed_10 rm/seed_2 rm/seed_0 rm/seed_x rm/seed_ rm/other_1 rm/seed_3.bak rm/my_seed_4
old/m+1 old/m+0 old/mm1
sweep/seed_7/model sweep/seed_11 sweep/seed_0/model
seed_5
twice_1/a1 twice_1/a2 twice_2/a2
numbers/12 numbers/3 numbers/a4
"""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Run folders as they lie about, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in FOLDERS.split():
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


# {a name with {seed}: the folders that it stands for}
SEEDS = {
    "rm/seed_{seed}": ["rm/seed_0", "rm/seed_2", "rm/seed_10"],  # 2 before 10
    "./rm/seed_{seed}/": ["./rm/seed_0/", "./rm/seed_2/", "./rm/seed_10/"],
    "sweep/seed_{seed}/model": ["sweep/seed_0/model", "sweep/seed_7/model"],  # 11 has no model
    "old/m+{seed}": ["old/m+0", "old/m+1"],  # a name, not a pattern
    "seed_{seed}": ["seed_5"],
    "twice_{seed}/a{seed}": ["twice_1/a1", "twice_2/a2"],
    "numbers/{seed}": ["numbers/3", "numbers/12"],
}


@pytest.mark.parametrize("spec, expected", SEEDS.items())
def test_seed_stands_for_the_folders_that_exist(folders, spec, expected):
    assert expand([spec]) == expected
    # One name needs no list.
    assert expand(spec) == expected
    absolute = [f"{folders}/{path}" for path in expected]
    assert expand(f"{folders}/{spec}") == absolute


def test_names_of_several_rewards_expand_in_their_order(folders):
    specs = ["my.py:f", "rm/seed_{seed}", "world:gold", "seed_{seed}"]
    given = list(specs)
    members = ["rm/seed_0", "rm/seed_2", "rm/seed_10"]
    assert expand(specs) == ["my.py:f", *members, "world:gold", "seed_5"]
    assert specs == given
    # The same with whole paths.
    absolute = [f"{folders}/{name}" for name in members]
    assert expand(["my.py:f", f"{folders}/rm/seed_{{seed}}"]) == ["my.py:f", *absolute]


def test_a_name_without_seed_is_left_as_it_is(folders):
    """What there is to load is looked at later."""
    specs = ["nothing/here", "a b"]
    assert expand(specs) == ["nothing/here", "a b"]
    absolute = [f"{folders}/nothing/here", f"{folders}/a b"]
    assert expand(absolute) == absolute


@pytest.mark.parametrize(
    "specs, words",
    [
        (["rm/seeds_{seed}"], "rm/seeds_{seed}: no such folder for any seed (python train_rm.py"),
        (["nowhere/seed_{seed}"], "nowhere/seed_{seed}: no such folder"),
        (["rm/seed_0", "sweep/seed_{seed}/models"], "sweep/seed_{seed}/models: no such folder"),
        (["a", "b", "a"], "names a twice"),
        (["rm/seed_2", "rm/seed_{seed}"], "names rm/seed_2 twice"),
        (["rm/seed_2", "./rm/seed_2/"], "names ./rm/seed_2/ twice (also as rm/seed_2)"),
        ([], "names no reward"),
    ],
)
def test_specs_that_name_no_ensemble(folders, specs, words):
    refuses(expand, specs, match=[words])


def test_a_reward_may_have_several_names(folders):
    """A run folder stands for its model, and a link for what it leads to."""
    model = folders / "sweep/seed_7/model"
    (model / "config.json").write_text("{}")
    (folders / "link").symlink_to("sweep/seed_7")
    assert expand(["link", "sweep/seed_0"]) == ["link", "sweep/seed_0"]
    for other in ("sweep/seed_7/model", "link", str(folders / "sweep/seed_7")):
        refuses(expand, ["sweep/seed_7", other], match=["twice (also as sweep/seed_7)"])
    # Two labels of one classifier are two rewards.
    assert expand(["seed_5#a", "seed_5#b"]) == ["seed_5#a", "seed_5#b"]
    refuses(expand, ["seed_5#a", "./seed_5#a"], match=["names ./seed_5#a twice"])
    # So are two functions of one file.
    (folders / "my.py").write_text(CODE)
    assert expand(["my.py:f", "my.py:g"]) == ["my.py:f", "my.py:g"]
    refuses(expand, ["my.py:f", "my.py:g", "./my.py:f"], match=["twice (also as my.py:f)"])


def test_a_missing_ensemble_says_how_to_train_one(folders):
    refuses(expand, ["rm/seeds_{seed}"], match=["train_rm.py --members"])


# The files are not there: a name alone says it.
@pytest.mark.parametrize(
    "spec, kind",
    [
        ("world:gold", "gold"),
        ("my.py:good", "function"),
        ("a/b.py:f", "function"),
        ("words.tsv", "lexicon"),
        ("a/words.txt", "lexicon"),
        ("runs/rm/seed_0", "model"),
        ("world", "model"),
        ("org/name", "model"),
        ("code.py", "model"),
    ],
)
def test_a_name_says_what_kind_of_reward_it_is(spec, kind):
    assert kind_of(spec) == kind


def test_rewards_are_called_by_the_last_part_of_their_path():
    specs = ["runs/my.py:good", "runs/rm/seed_0/", "./seed_1", "world:gold"]
    assert reward_names(specs) == ["my.py:good", "seed_0", "seed_1", "world:gold"]
    assert reward_names(["gpt2"]) == ["gpt2"]
    assert reward_names([]) == []


def test_where_two_names_would_be_the_same_all_are_written_out():
    same_ends = ["runs/a/seed_0", "runs/b/seed_0/", "runs/b/seed_1"]
    assert reward_names(same_ends) == same_ends
    models_of_seeds = ["x/seed_0/model", "x/seed_1/model"]
    assert reward_names(models_of_seeds) == models_of_seeds


# ------------------------------------------------------------------------ lexicons and the world

LEXICON = "good\t2.5\t0.9\t[1, 2]\nBad\t-3\n\nwell-made\t1\ndon't\t-1\r\nawful\t-60\n"
# {a response: the sum of its words' values / 5, clipped to +-10}
LEXICON_SCORES = {
    "good": 0.5,
    "GOOD Bad.": -0.1,  # (2.5 - 3) / 5
    "a well-made good, good thing!": 1.2,  # (1 + 2.5 + 2.5) / 5
    "awful": -10.0,  # -60 / 5 is clipped
    "don't goodness": -0.2,  # -1 / 5: goodness is another word
    "": 0.0,
    "good " * 30: 10.0,  # 30 * 2.5 / 5 is clipped
}


@pytest.mark.parametrize("name", ["words.tsv", "words.txt"])
def test_a_lexicon_by_hand(tmp_path, name):
    path = tmp_path / name
    path.write_text(LEXICON)
    # A prompt's words do not count.
    given = answers(["good"] * 7, list(LEXICON_SCORES))
    same(score(path, given), list(LEXICON_SCORES.values()))


@pytest.fixture
def lexicon(tmp_path):
    return tmp_path / "words.tsv"


def check_lexicon_refused(path, *words):
    """The lexicon must be refused when flags are checked, before any model is loaded."""
    refuses(check_reward, str(path), match=words)


@pytest.mark.parametrize(
    "text, line", [("good\t1\n\nbad -2\n", 3), ("good\t1\nbad\tvery\n", 2), ("good\n", 1)]
)
def test_a_bad_lexicon(lexicon, text, line):
    lexicon.write_text(text)
    check_lexicon_refused(lexicon, f"{lexicon}:{line}:")


def test_lexicons_without_words(lexicon):
    lexicon.write_text("\n")
    check_lexicon_refused(lexicon, "empty")
    # Two words, and two signs that are not of the Latin alphabet.
    lexicon.write_text("very good\t1\n\u5f88\u597d\t2\n", encoding="utf-8")
    check_lexicon_refused(lexicon, "none of its 2 lines can match a word of a text")


def test_lexicons_that_cannot_be_read(lexicon, tmp_path):
    lexicon.write_bytes(b"good\t1\ncaf\xe9\t2\n")
    check_lexicon_refused(lexicon, "words.tsv: not UTF-8")
    folder = tmp_path / "folder.tsv"
    folder.mkdir()
    check_lexicon_refused(folder, "folder.tsv: cannot be read")
    check_lexicon_refused(tmp_path / "none.tsv", "none.tsv", "no such file")


# {the text of a lexicon: the note on its lines without effect}
NOTES = {
    # Two words are no word.
    "good\t1\nvery good\t5\n": "1 can match no word of a text, such as 'very good'",
    "\t5\ngood\t1\n": "1 can match no word of a text, such as ''",
    "good\t1\ncaf\u00e9\t2\n4ever\t3\n": "2 can match no word of a text, such as 'caf\u00e9'",
    "good\t1\nGood\t3\ngood\t1\n": "2 name a word again, whose last value counts, such as 'good'",
    "good\t5\ngood\t1\n :)\t1\n": "1 can match no word of a text, such as ':)', "
    "and 1 name a word again",
}


@pytest.mark.parametrize("text, words", NOTES.items(), ids=ascii)
def test_lines_of_a_lexicon_without_effect_are_noted(lexicon, capsys, text, words):
    lexicon.write_text(text, encoding="utf-8")
    # In all of them the value of "good" is 1 in the end.
    same(score(lexicon, answers(["p"], ["very good good"])), [0.4])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 1
    assert f"{lexicon}: of its lines {words}" in printed


def test_a_lexicon_with_a_byte_order_mark(lexicon, capsys):
    lexicon.write_bytes(b"\xef\xbb\xbfgood\t5\nbad\t-5\n")
    same(score(lexicon, answers(["p", "p"], ["good", "bad"])), [1.0, -1.0])
    assert not capsys.readouterr().out


def test_the_gold_of_the_world():
    prompts = []
    responses = []
    for row in world.demonstrations(5):
        prompts.append(row["prompt"])
        responses.append(row["response"])
    same(score("world:gold", answers(prompts, responses)), world.gold(prompts, responses))


def test_the_gold_of_the_world_needs_a_prompt_of_the_world():
    check_refused("world:gold", "world:gold", "topic")


# --------------------------------------------------------------------------------- reward models


def reversed_tokenizer():
    """The same words with other ids: w3 has id 59, w4 58, ...; the three special tokens stay."""
    words = [f"w{i}" for i in range(3, V)]
    return word_tokenizer(["<pad>", "<eos>", "<unk>", *words[::-1]])


def reverse_ids(ids):
    """Ids of word_tokenizer() -> the ids of the same tokens in reversed_tokenizer()."""
    reversed_ids = []
    for i in ids:
        if i < 3:
            reversed_ids.append(i)
        else:
            reversed_ids.append(V + 2 - i)
    return reversed_ids


@torch.no_grad()
def score_one_by_one(path, prompt_ids, response_ids):
    """The scores of a reward model in `path` by a forward of each row alone: a list."""
    model = load_reward_model(str(path)).eval()
    scores = []
    for prompt, response in zip(prompt_ids, response_ids, strict=True):
        scores.append(model(pack([prompt], [response])).item())
    return scores


def check_far(a, b):
    """Two readings of the same answers lead to different scores."""
    assert (a - b).abs().max() > 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """policy/; rm/, a reward model made from it; other_words/, the same model, other ids."""
    root = tmp_path_factory.mktemp("rm")
    save_policy(tiny_policy("neox"), word_tokenizer(), str(root / "policy"))
    rm = load_reward_model(str(root / "policy"), seed=0)
    rm.standardise(0.3, 0.5)
    save_reward_model(rm, word_tokenizer(), str(root / "rm"))
    save_reward_model(rm, reversed_tokenizer(), str(root / "other_words"))
    return root


# Sampled ids with <pad>, <eos> and <unk> inside, which decoding would lose.
ODD_IDS = [[11, 0, 12, EOS], [13, EOS, 14, 15], [2, EOS], [16, 2]]


def test_decoding_and_tokenising_again_changes_odd_ids():
    tokenizer = word_tokenizer()
    texts = tokenizer.batch_decode(ODD_IDS, skip_special_tokens=True)
    ids_again = [[*tokenizer(text).input_ids, EOS] for text in texts]
    assert ids_again != ODD_IDS


@pytest.mark.parametrize("size", [1, 3, 64])
def test_the_sampled_ids_are_scored_as_they_are(folder, size):
    expected = score_one_by_one(folder / "rm", PROMPT_IDS, ODD_IDS)
    assert np.std(expected) > 0.1

    scores = score(folder / "rm", sampled_answers(ODD_IDS), micro_batch_size=size)
    same(scores, expected)
    assert not scores.requires_grad
    # The texts are not read at all.
    unreadable = sampled_answers(ODD_IDS, prompts=["?"] * 4, responses=["?"] * 4)
    same(score(folder / "rm", unreadable, micro_batch_size=size), expected)
    # Tokenising the texts would give other scores.
    check_far(score(folder / "rm"), scores)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_another_vocabulary_tokenises_the_texts(folder, size):
    prompt_ids = [reverse_ids(ids) for ids in PROMPT_IDS]
    response_ids = [reverse_ids(ids) for ids in RESPONSE_IDS]
    expected = score_one_by_one(folder / "rm", prompt_ids, response_ids)
    scores = score(folder / "other_words", micro_batch_size=size)
    same(scores, expected)
    check_far(scores, score(folder / "rm"))


def test_a_policy_is_no_reward_model(folder):
    check_refused(folder / "policy", "policy")


def test_a_model_that_is_missing(tmp_path):
    check_refused(tmp_path / "none", "none")


def test_a_model_that_gives_no_number(folder, tmp_path):
    rm = load_reward_model(str(folder / "rm"))
    rm.model.score.weight.data.fill_(math.nan)
    save_reward_model(rm, word_tokenizer(), str(tmp_path / "nan"))
    check_refused(tmp_path / "nan", "nan", "not finite")


def piece_tokenizer():
    """A word-piece tokenizer, which writes w12 as w, ##1, ##2."""
    digits = [f"##{i}" for i in range(10)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "w", *digits, "good"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=40,
    )


def save_bert(path, labels):
    """A tiny encoder that classifies texts, with a tokenizer of its own -> model, tokenizer."""
    tokenizer = piece_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    # Weights so large that texts can be told apart.
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(5)
    model.classifier.weight.data.mul_(10)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model, tokenizer


@torch.no_grad()
def logits_one_by_one(model, tokenizer, label):
    """The logit of a label for each answer, by a forward of its text alone: a list."""
    logits = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        inputs = tokenizer(f"{prompt} {response}", return_tensors="pt")
        logits.append(model(**inputs).logits[0, label].item())
    return logits


@pytest.mark.parametrize(
    "labels, positive",
    [
        (["NEGATIVE", "POSITIVE"], 1),
        (["positive", "negative"], 0),
        (["Pos", "Neutral", "Neg"], 0),
        (["LABEL_0"], 0),
    ],
)
def test_a_classifier_by_its_positive_logit(tmp_path, labels, positive):
    model, tokenizer = save_bert(str(tmp_path / "bert"), labels)
    expected = logits_one_by_one(model, tokenizer, positive)
    assert np.std(expected) > 0.05
    for size in (1, 3, 64):
        scores = score(tmp_path / "bert", micro_batch_size=size)
        same(scores, expected)
        assert not scores.requires_grad
        assert scores.dtype == torch.float32


def test_nobody_guesses_which_label_is_the_reward(tmp_path):
    path = str(tmp_path / "bert")
    model, tokenizer = save_bert(path, ["nothate", "hate"])

    for look in (check_reward, score):
        with pytest.raises(InputError, match=f"Name one of {path}#nothate, {path}#hate"):
            look(path)
    with pytest.raises(InputError, match="no label 'love'; there are .*#nothate, .*#hate"):
        check_reward(f"{path}#love")

    for place, label in enumerate(["nothate", "HATE"]):
        check_reward(f"{path}#{label}")
        same(score(f"{path}#{label}"), logits_one_by_one(model, tokenizer, place))
    one = fingerprint_reward(f"{path}#nothate")
    other = fingerprint_reward(f"{path}#hate")
    assert len({one, other, fingerprint_reward(path)}) == 3


def test_a_classifier_reads_the_response_to_a_long_prompt(tmp_path):
    save_bert(str(tmp_path / "bert"), ["NEGATIVE", "POSITIVE"])
    # The prompt alone is longer than the 40 tokens that the model reads.
    long_prompt = "w5 " * 60
    given = answers([long_prompt, long_prompt], ["w11", "good w14"])
    scores = score(tmp_path / "bert", given)
    assert (scores[0] - scores[1]).abs() > 1e-3


def read_by_classifier(tokenizer, prompt, response, chat=False):
    """The token ids that a classifier with this tokenizer reads of one answer."""
    given = Answers([prompt], [response], None, chat=chat)
    ((_, inputs),) = text_batches(given, tokenizer, 100, micro_batch_size=1)
    return inputs.input_ids[0].tolist()


def test_a_classifier_reads_a_plain_text_between_its_control_tokens():
    """They stand around it once, and one that the text itself spells is text."""
    tokenizer = byte_tokenizer(adds=("<bos>", "<eot>"))
    ids = read_by_classifier(tokenizer, "a <bos> cat", "of a dog")
    assert tokenizer.decode(ids) == "<bos>a <bos> cat of a dog<eot>"
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_a_classifier_reads_a_chat_as_its_template_writes_it():
    """The template's own control tokens are all that there are."""
    tokenizer = byte_tokenizer(template=LLAMA, adds=("<bos>", "<eot>"))
    answer = {"role": "assistant", "content": "Yes"}
    written = tokenizer.apply_chat_template([*CHAT, answer], return_dict=False)
    assert read_by_classifier(tokenizer, CHAT, "Yes") == written

    # With --chat_template a string is a user's turn.
    turn = {"role": "user", "content": "Tell me"}
    written = tokenizer.apply_chat_template([turn, answer], return_dict=False)
    assert read_by_classifier(tokenizer, "Tell me", "Yes", chat=True) == written


def test_several_rewards_side_by_side(folder, code):
    specs = [str(folder / "rm"), f"{code}:good", f"{code}:tensor"]
    rewards = {}
    for spec in specs:
        rewards[spec] = load_reward(spec, word_tokenizer(), ALONE)
    scores = score_all(rewards, [answers()])
    assert scores.shape == (3, 4)
    assert scores.dtype == torch.float32
    for row, spec in zip(scores, specs):
        assert torch.equal(row, score(spec))

    # Two of the answers alone. The third reward is a number of the place in the list.
    batch = answers().batch.rows(torch.tensor([1, 2]))
    part = Answers(PROMPTS[1:3], RESPONSES[1:3], batch)
    scores_of_part = score_all(rewards, [part])
    same(scores_of_part[:2], scores[:2, 1:3])


def test_matrix_products_in_bfloat16(folder):
    exact = score(folder / "rm", dtype="float32")
    rounded = score(folder / "rm", dtype="bfloat16")
    model = load_reward_model(str(folder / "rm")).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(answers().batch)
    same(rounded, expected, 1e-3)
    assert rounded.dtype == torch.float32
    error = (rounded - exact).abs().max()
    assert error > 0
    assert error < 0.05 * exact.std() + 0.02


# -------------------------------------------------------------------- the members of an ensemble

# An EOS of its own, which only tokenizer_config.json names: <eos> and <pad> change places.
SWAPPED = {"eos_token": "<pad>", "pad_token": "<eos>"}


@pytest.fixture(scope="module")
def members(folder):
    """Nine members with three different heads, beside `folder`'s models.

    own_0..2 have the policy's tokenizer, other_0..2 other ids for its words, eos_0..2 another EOS.
    """
    tokenizers = {
        "own": word_tokenizer(),
        "other": reversed_tokenizer(),
        "eos": word_tokenizer(**SWAPPED),
    }
    rm = load_reward_model(str(folder / "rm"))
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        rm.model.score.weight.data.normal_(0, 0.3, generator=generator)
        for kind, tokenizer in tokenizers.items():
            save_reward_model(rm, tokenizer, str(folder / f"{kind}_{i}"))
    return folder


def score_as_member(members, name, response_ids):
    """A member's scores by its own forward of each answer alone. The ids are word_tokenizer()'s."""
    prompt_ids = PROMPT_IDS
    if name.startswith("other"):
        prompt_ids = [reverse_ids(ids) for ids in prompt_ids]
        response_ids = [reverse_ids(ids) for ids in response_ids]
    return score_one_by_one(members / name, prompt_ids, response_ids)


def load_members(members, names, tokenizer):
    """{name: reward} with micro-batches of three answers."""
    specs = [str(members / name) for name in names]
    return load_rewards(specs, tokenizer, ALONE, micro_batch_size=3)


@pytest.fixture
def calls(monkeypatch):
    """How often texts are encoded and batches are cut into micro-batches: {function: calls}."""
    counts = {}

    def count(owner, name):
        function = getattr(owner, name)
        counts[name] = 0

        def counted(*args):
            counts[name] += 1
            return function(*args)

        monkeypatch.setattr(owner, name, counted)

    count(nanorlhf.rewards, "encode_again")
    count(Packed, "micro_batches")
    return counts


def check_members(rewards, given, expected, calls, n_encoded, n_cut):
    """Side by side members score as expected, and share what they can."""
    # Members and answers can be told apart.
    assert np.ptp(expected, axis=1).min() > 0.1
    assert np.ptp(expected, axis=0).min() > 1e-3

    scores = score_all(rewards, [given])
    same(scores, expected)
    assert calls["encode_again"] == n_encoded
    assert calls["micro_batches"] == n_cut
    assert torch.equal(score_all(rewards, [given]), scores)

    # Each member alone, with answers that nobody has read before.
    for reward, row in zip(rewards.values(), scores):
        fresh = Answers(given.prompts, given.responses, given.batch)
        assert torch.equal(reward(fresh), row)


# The last answer was cut off: it has no EOS.
SAMPLED_IDS = [[11, 12, EOS], [13, 14, 15, EOS], [EOS], [16]]


# Members with another EOS read the sampled ids too: their vocabulary is the same.
@pytest.mark.parametrize(
    "names, n_encoded, n_cut",
    [
        ("own_0 own_1 own_2", 0, 1),
        pytest.param("other_0 other_1 other_2", 1, 1, marks=pytest.mark.slow),
        pytest.param("own_0 other_0 eos_0", 1, 2, marks=pytest.mark.slow),
        ("eos_0 other_0 own_0", 1, 2),
        ("other_1 eos_0 other_0 own_2 eos_1", 1, 2),
    ],
)
def test_members_score_sampled_ids_as_they_do_alone(members, calls, names, n_encoded, n_cut):
    """Only members with other words tokenise the texts, once for all of them."""
    names = names.split()
    expected = [score_as_member(members, name, SAMPLED_IDS) for name in names]

    rewards = load_members(members, names, word_tokenizer())
    assert list(rewards) == names
    check_members(rewards, sampled_answers(SAMPLED_IDS), expected, calls, n_encoded, n_cut)


@pytest.mark.parametrize(
    "names, n_tokenizers",
    [
        ("own_0 own_1 own_2", 1),
        pytest.param("other_0 other_1 other_2", 1, marks=pytest.mark.slow),
        pytest.param("own_0 other_0 eos_0", 3, marks=pytest.mark.slow),
        ("eos_0 other_0 own_0", 3),
        ("other_1 eos_0 other_0 own_2 eos_1", 3),
    ],
)
def test_members_score_texts_as_they_do_alone(members, calls, names, n_tokenizers):
    """Texts alone do not say that one was cut off: each ends with the member's own EOS.

    They are tokenised, and sorted by length, once for all members that share a tokenizer.
    """
    names = names.split()
    expected = []
    for name in names:
        response_ids = RESPONSE_IDS
        if name.startswith("eos"):
            # Its EOS is <pad>, whose id is 0.
            response_ids = [[*ids[:-1], 0] for ids in response_ids]
        expected.append(score_as_member(members, name, response_ids))

    rewards = load_members(members, names, tokenizer=None)
    assert list(rewards) == names
    check_members(rewards, texts_alone(), expected, calls, n_tokenizers, n_tokenizers)


each_kind = pytest.mark.parametrize("kind", ["own", "other"])


@each_kind
def test_members_of_every_micro_batch_size_side_by_side(members, kind):
    given = answers(PROMPTS * 3, RESPONSES * 3)
    rewards = {}
    for size in (1, 5, 12, 64):
        rewards[size] = load_reward(str(members / f"{kind}_0"), word_tokenizer(), ALONE, size)
    scores = score_all(rewards, [given])
    for row in scores:
        same(row, scores[0])
    assert scores[0].std() > 0.1


@each_kind
def test_a_text_without_sampled_ids_ends_with_eos(members, kind):
    """There is no tokenizer of a policy either."""
    texts = texts_alone()
    assert len(texts) == 4
    reward = load_reward(str(members / f"{kind}_0"), None, ALONE)
    same(reward(texts), score(members / f"{kind}_0"))


def test_a_function_needs_texts_alone(code):
    reward = load_reward(f"{code}:good", None, ALONE)
    assert torch.equal(reward(texts_alone()), score(f"{code}:good"))


@pytest.fixture(scope="module")
def short_member(members):
    """`members` with one more: short, which is own_0 with a context of 8 tokens."""
    rm = load_reward_model(str(members / "own_0"))
    save_reward_model(rm, word_tokenizer(), str(members / "short"))
    path = members / "short" / "config.json"
    config = json.loads(path.read_text())
    config["max_position_embeddings"] = 8
    path.write_text(json.dumps(config))
    return members


def test_another_tokenizer_reads_chats_through_its_own_template():
    own = word_tokenizer()
    # w20 begins a user's turn, w21 an assistant's.
    own.chat_template = (
        "{% for m in messages %}{{ 'w20' if m['role'] == 'user' else 'w21' }} {{ m['content'] }} "
        "{% endfor %}{% if add_generation_prompt %}w21 {% endif %}"
    )
    finished = Answers([CHAT, CHAT], ["w7", "w8 w9"], None)

    batch = encode_again(finished, word_tokenizer(), own)

    assert batch.ids.tolist() == [[20, 5, 6, 21, 7, EOS, 0], [20, 5, 6, 21, 8, 9, EOS]]
    assert batch.prompt_lengths.tolist() == [4, 4]
    strings = Answers(["w5 w6", "w5 w6"], ["w7", "w8 w9"], None, chat=True)
    assert torch.equal(encode_again(strings, word_tokenizer(), own).ids, batch.ids)


def test_another_tokenizer_without_a_template_reads_chats_as_text():
    finished = Answers([CHAT], ["w7"], None)
    batch = encode_again(finished, word_tokenizer(), word_tokenizer())
    text = word_tokenizer().decode(batch.ids[0])
    # "user:" and "assistant:" are no words of this tokenizer.
    assert text.split()[1:3] == ["w5", "w6"]
    assert batch.ids[0, -2:].tolist() == [7, EOS]


# An answer that is cut keeps no EOS.
CUT = [[8, EOS], [8, 9, 10, 11, 12], [9, EOS]]


@pytest.mark.parametrize("names", ["own_0 short", "short own_0", "own_0 own_1 short"])
def test_a_member_with_a_smaller_context_cuts_its_texts_and_says_so(short_member, names, capsys):
    """Whoever tokenised the texts."""
    rewards = load_members(short_member, names.split(), word_tokenizer())
    prompts = ["w5 w6 w7"] * 3
    # 3 tokens and 5 with EOS.
    fits = answers(prompts, ["w8", "w8 w9 w10 w11", "w9"])
    scores = dict(zip(rewards, score_all(rewards, [fits])))
    same(scores["short"], scores["own_0"])
    # One token more: the prompt of the item is cut to four tokens, the longest answer to five.
    too_long = answers(prompts, ["w8", "w8 w9 w10 w11 w12", "w9"])
    capsys.readouterr()
    scores = dict(zip(rewards, score_all(rewards, [too_long])))
    said = capsys.readouterr().out
    assert "short: of 3 texts, 0 prompts and 1 responses (33.3%) cut to 8 tokens" in said
    cut = Answers(prompts, too_long.responses, pack([[5, 6, 7]] * 3, CUT))
    same(scores["short"], rewards[next(iter(scores))](cut))


# --------------------------------------------------------------------------------- Kendall's tau


def tau_b(x, y):
    """Kendall's tau-b of two lists, pair by pair."""
    concordant = 0
    discordant = 0
    only_x_tied = 0
    only_y_tied = 0
    for i in range(len(x)):
        for j in range(i):
            a = x[i] - x[j]
            b = y[i] - y[j]
            if a * b > 0:
                concordant += 1
            elif a * b < 0:
                discordant += 1
            elif b != 0:
                only_x_tied += 1
            elif a != 0:
                only_y_tied += 1
    untied = concordant + discordant
    norm = math.sqrt((untied + only_x_tied) * (untied + only_y_tied))
    return (concordant - discordant) / norm


def draw_with_ties(n, levels):
    """Two vectors of whole numbers below `levels`, neither of them constant."""
    rng = np.random.default_rng([n, levels])
    x = rng.integers(0, levels, n)
    y = rng.integers(0, levels, n)
    x[:2] = [0, 1]
    y[:2] = [1, 0]
    return x, y


@pytest.mark.parametrize("levels", [2, 4, 1000])
@pytest.mark.parametrize("n", [2, 7, 40])
def test_kendall_tau_by_a_double_loop(n, levels):
    x, y = draw_with_ties(n, levels)
    tau, p = kendall_tau(x, torch.tensor(y), permutations=20)
    assert tau == pytest.approx(tau_b(x.tolist(), y.tolist()), abs=1e-9)
    # 20 random orders and the one that was found.
    assert 1 / 21 - 1e-12 <= p <= 1
    reversed_tau, _ = kendall_tau(-x, y, permutations=1)
    assert reversed_tau == pytest.approx(-tau, abs=1e-9)


def kendall_by_a_table(x, y, permutations, seed):
    """Tau and p from the signs of all pairs, a table [N, N] for each of the random orders."""

    def signs(v):
        return torch.sign(v[:, None] - v)

    x_signs = signs(x)
    x_untied = x_signs.abs().sum().double()
    y_untied = signs(y).abs().sum().double()
    norm = (x_untied * y_untied).sqrt()
    tau = ((x_signs * signs(y)).sum().double() / norm).item()
    generator = torch.Generator().manual_seed(seed)
    n_extreme = 0
    for _ in range(permutations):
        order = torch.randperm(len(x), generator=generator)
        shuffled_tau = ((x_signs * signs(y[order])).sum().double() / norm).item()
        if abs(shuffled_tau) >= abs(tau) - 1e-12:
            n_extreme += 1
    return tau, (n_extreme + 1) / (permutations + 1)


def check_against_a_table(n, levels, permutations):
    x, y = draw_with_ties(n, levels)
    x = torch.tensor(x).float()
    y = torch.tensor(y).float()
    expected = kendall_by_a_table(x, y, permutations, seed=n)
    assert kendall_tau(x, y, permutations, seed=n) == expected


# 64 is a power of 2, 65 is the first number above one.
@pytest.mark.parametrize("levels", [2, 5, 300])
@pytest.mark.parametrize("n, permutations", [(2, 9), (3, 0), (64, 50), (65, 50)])
def test_kendall_tau_and_its_p_value_are_exactly_those_of_all_pairs(n, permutations, levels):
    check_against_a_table(n, levels, permutations)


def test_kendall_tau_and_its_p_value_where_random_orders_come_in_two_parts():
    check_against_a_table(n=150, levels=20, permutations=1800)


def test_kendall_tau_of_many_numbers():
    """Neighbours change places, two by two: n/2 pairs of n (n - 1) / 2 are discordant.

    A table of all pairs would need 20 GB at least.
    """
    n = 100_000
    x = torch.arange(n)
    y = x.view(-1, 2).flip(1).flatten()
    tau, _ = kendall_tau(x, y, permutations=0)
    assert tau == pytest.approx(1 - 2 / (n - 1), abs=1e-12)


def normals(*shape):
    return np.random.default_rng(0).normal(size=shape)


def test_the_p_value_of_a_perfect_order():
    x = normals(30)
    least = pytest.approx(1 / 1001)
    assert kendall_tau(x, x) == (pytest.approx(1.0), least)
    # The test is two-sided.
    assert kendall_tau(x, -x) == (pytest.approx(-1.0), least)


def test_the_p_value_of_independent_numbers_is_uniform():
    p_values = []
    for i, (x, y) in enumerate(normals(200, 2, 12)):
        _, p = kendall_tau(x, y, permutations=99, seed=i)
        p_values.append(p)
    p_values = np.array(p_values)
    assert 0.4 < p_values.mean() < 0.6
    assert 0.02 < (p_values <= 0.05).mean() < 0.09
    assert abs((p_values <= 0.5).mean() - 0.5) < 0.1


def test_the_p_value_is_the_same_every_time():
    x = normals(30)
    assert kendall_tau(x, x**2, seed=1) == kendall_tau(x, x**2, seed=1)


def test_the_p_value_by_all_orders():
    """Of the 4! orders of 1 2 3 4, |tau| is 1 in two, and at least 2/3 in eight."""
    _, p = kendall_tau([1, 2, 3, 4], [1, 2, 3, 4], permutations=4000)
    assert p == pytest.approx(2 / 24, abs=0.02)
    _, p = kendall_tau([1, 2, 3, 4], [1, 2, 4, 3], permutations=4000)
    assert p == pytest.approx(8 / 24, abs=0.03)


def test_a_constant_has_no_tau():
    tau, p = kendall_tau([1, 1, 1], [1, 2, 3])
    assert math.isnan(tau)
    assert math.isnan(p)


@pytest.mark.parametrize(
    "x, y",
    [
        ([1], [1]),
        ([1, 2], [1, 2, 3]),
        ([1, math.nan], [1, 2]),
        ([1, 2], [1, math.inf]),
    ],
)
def test_kendall_tau_needs_two_finite_vectors_of_one_length(x, y):
    with pytest.raises(ValueError):
        kendall_tau(x, y)

"""probe.py judge: win rates against loops, rewards and language models as judges, and endpoints that fail in every way.

N pairs of answers
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from support import ENV, REPO, Endpoint, chat, probe_refused, run_probe
from transformers import AutoModelForCausalLM

from nanorlhf import world
from nanorlhf.evals import judges, win_rates
from nanorlhf.models import Policy, save_policy
from nanorlhf.runtime import plots
from nanorlhf.runtime.plots import save as save_picture
from nanorlhf.stats import bootstrap

REWARD = """
import itertools
noise = itertools.count()
def words(prompts, responses): return [len(r.split()) for r in responses]
def noisy(prompts, responses): return [1e-6 * next(noise) for _ in responses]
"""


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(seed, n=12, **fields):
    """Rows {prompt, response} of n prompts: up to 9 times the same word."""
    draw = random.Random(seed)
    return [
        {
            "prompt": f"question {i} ?",
            "response": " ".join(["word"] * draw.randrange(1, 10)),
            **fields,
        }
        for i in range(n)
    ]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "save", lambda *args: None)  # pictures take longer than all else
    (tmp_path / "reward.py").write_text(REWARD)
    write(tmp_path / "a.jsonl", answers(1))
    write(tmp_path / "b.jsonl", answers(2))
    return tmp_path


def flags(files, **changes):
    values = {
        "a": files / "a.jsonl",
        "b": files / "b.jsonl",
        "judge": f"{files / 'reward.py'}:words",
        "output_dir": files / "out",
    }
    values |= changes
    return [
        "judge",
        *(
            str(x)
            for name, value in values.items()
            for x in (f"--{name}", *(value if isinstance(value, list) else [value]))
        ),
    ]


def judged(files, **changes):
    """A run of the command -> {judge: what its summary says}"""
    run_probe(*flags(files, **changes))
    return summary(files)["judges"]


def stopped(files, capfd, **changes):
    """The one line of a run that got somewhere, below its progress."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run_probe(*flags(files, **changes))
    *progress, error = capfd.readouterr().err.splitlines()
    assert (
        exit_.value.code == 2
        and ": error: --judge " in error
        and not any("error" in line for line in progress)
    )
    return error


def summary(files):
    return json.loads((files / "out" / "summary.json").read_text())


# ----------------------------------------------------------------------------------------------------------------------- the numbers


def test_win_rates_are_the_loops(files):
    found = judged(files)
    own, length = (
        found[f"{files / 'reward.py'}:words"]["splits"]["all"],
        found[win_rates.LONGER]["splits"]["all"],
    )
    a, b = ([len(row["response"].split()) for row in answers(seed)] for seed in (1, 2))
    wins, ties, losses = (
        sum(test(x, y) for x, y in zip(a, b)) for test in (int.__gt__, int.__eq__, int.__lt__)
    )
    assert min(wins, ties, losses) > 0 and own["pairs"] == own["prompts"] == 12
    assert own["win_rate"] == pytest.approx((wins + ties / 2) / 12)
    assert [own[name] for name in ("wins", "ties", "losses")] == pytest.approx(
        [x / 12 for x in (wins, ties, losses)]
    )
    assert own["difference"] == pytest.approx((sum(a) - sum(b)) / 12) and own["length"] == [
        sum(a) / 12,
        sum(b) / 12,
    ]
    points = [1.0 if x > y else 0.5 if x == y else 0.0 for x, y in zip(a, b)]
    assert own["interval"] == pytest.approx(
        [x.item() for x in bootstrap(points)]
    )  # every prompt has one pair
    assert own["difference_interval"] == pytest.approx(
        [x.item() for x in bootstrap([x - y for x, y in zip(a, b)])]
    )
    assert (
        own["longer_won"] == 1
        and length["win_rate"] == own["win_rate"]
        and "difference" not in length
    )


def test_how_often_the_longer_answer_won():
    """By hand: A longer and wins, A longer and loses, B longer and a tie, B longer and wins, as long as each other, not judged."""
    a, b = torch.tensor([1.0, 0, 2, 0, 5, float("nan")]), torch.tensor([0.0, 1, 2, 3, 0, 0])
    lengths = [torch.tensor([5, 5, 1, 1, 3, 9]), torch.tensor([2, 4, 2, 3, 3, 1])]
    row = win_rates.summarise_judge(a, b, lengths, torch.arange(6), ["all"] * 6)["splits"]["all"]
    assert row["longer_won"] == pytest.approx((1 + 0 + 0.5 + 1) / 4) and row["pairs"] == 5
    assert row["win_rate"] == pytest.approx((1 + 0 + 0.5 + 0 + 1) / 5) and row["length"] == [3, 2.8]


def test_splits_and_their_gap(files, capsys):
    """Splits of the rows, or named on the command line; the same numbers, and an interval that knows both splits to be small samples."""
    both = {name: [[{**row, "prompt": name + row["prompt"]} for row in answers(seed, 30)] for seed in seeds]
            for name, seeds in (("test", (3, 4)), ("ood", (5, 6)), ("hard", (7, 8)))}  # fmt: skip
    for side in (0, 1):
        rows = [{**row, "split": name} for name, part in both.items() for row in part[side]]
        write(files / f"{'ab'[side]}.jsonl", rows)
        for name, part in both.items():
            write(files / f"{'ab'[side]}_{name}.jsonl", part[side])
    of_rows = judged(files)
    named = judged(
        files,
        a=[f"{name}={files}/a_{name}.jsonl" for name in both],
        b=[files / f"b_{name}.jsonl" for name in both],
    )
    assert of_rows == named
    found = of_rows[f"{files / 'reward.py'}:words"]
    rates, means, variances = {}, {}, {}
    for name, (a, b) in both.items():
        pairs = [(len(x["response"].split()), len(y["response"].split())) for x, y in zip(a, b)]
        points = torch.tensor([1.0 if x > y else 0.5 if x == y else 0.0 for x, y in pairs])
        rates[name], means[name], variances[name] = (
            found["splits"][name]["win_rate"],
            points.mean().item(),
            points.var().item() / 30,
        )
    assert list(rates) == ["test", "ood", "hard"] and rates == pytest.approx(means)
    assert list(found["gap"]) == ["ood", "hard"] and "gap: test less ood" in capsys.readouterr().out
    for name, row in found["gap"].items():
        low, high = row["interval"]
        assert row["gap"] == pytest.approx(rates["test"] - rates[name]) and low < row["gap"] < high
        assert high - low == pytest.approx(
            2 * 1.96 * (variances["test"] + variances[name]) ** 0.5, rel=0.15
        )


def test_the_picture(files, capsys):
    """With two splits, one of them without a judged pair."""
    lengths, some = (
        [torch.tensor([1, 2, 3]), torch.tensor([1, 1, 1])],
        torch.tensor([1.0, 0, float("nan")]),
    )
    found = {spec: win_rates.summarise_judge(x, torch.zeros(3), lengths, torch.arange(3), ["test", "test", "ood"])
             for spec, x in ((win_rates.LONGER, lengths[0]), ("llm:x", some))}  # fmt: skip
    assert (
        found["llm:x"]["splits"]["ood"] == {"pairs": 0}
        and list(found[win_rates.LONGER]["gap"]) == ["ood"]
        and not found["llm:x"]["gap"]
    )
    summary = {
        "a": ["a"],
        "b": ["b"],
        "prompts": 3,
        "only_a": 0,
        "only_b": 0,
        "pairs": 3,
        "judges": found,
    }
    assert "no pair judged" in win_rates.table(summary) and "nan" not in json.dumps(summary).lower()
    save_picture(win_rates.draw, summary, str(files / "picture.png"))
    assert (files / "picture.png").read_bytes()[1:4] == b"PNG"


def test_several_answers_to_a_prompt(files, capfd):
    """Paired by their order; the interval draws whole prompts, so it is wider than that of as many prompts with one answer each."""
    a, b = answers(1) * 5, answers(2) * 5
    write(files / "a.jsonl", a)
    write(files / "b.jsonl", b[::-1])  # the prompts in another order
    spec = f"{files / 'reward.py'}:words"
    row = judged(files)[spec]["splits"]["all"]
    assert row["pairs"] == 60 and row["prompts"] == 12
    write(files / "a.jsonl", answers(1))
    assert "has 1 answers in --a and 5 in --b (limit them: --n_answers)" in probe_refused(
        capfd, *flags(files)
    )
    one = judged(files, n_answers=1)[spec]["splits"]["all"]
    assert one["interval"] == pytest.approx(row["interval"]) and one["pairs"] == 12


def test_other_rows_are_counted(files, capsys):
    write(
        files / "a.jsonl",
        [
            {"prompt": "only here", "response": "x"},
            *answers(1)[:5],
            {"prompt": "nor there", "response": ""},
        ],
    )
    found = judged(files)[f"{files / 'reward.py'}:words"]["splits"]["all"]
    assert {k: summary(files)[k] for k in ("prompts", "pairs", "only_a", "only_b")} == {
        "prompts": 5,
        "pairs": 5,
        "only_a": 2,
        "only_b": 7,
    }
    assert (
        found["pairs"] == 5
        and ", 2 prompts only in A, 7 prompts only in B" in capsys.readouterr().out
    )


def test_tables_of_the_other_scripts(files):
    """eval/step_N.jsonl of PPO against sample_bon.py's best_of_n.jsonl, by gold."""
    rows = [
        {"prompt": p["prompt"], "response": r}
        for p, r in zip(world.prompts("test")[:6], ("the room was superb .", "bad food .") * 3)
    ]
    write(
        files / "a.jsonl",
        [
            {**row, "scores": {"rm": 1.0}, "gold": 0.5, "prompt_ids": [1], "response_ids": [2]}
            for row in rows
        ],
    )
    write(
        files / "b.jsonl",
        [
            {**row, "response": "it was .", "score": 2.0, "split": "test", "sample": 0}
            for row in rows
        ],
    )
    found = judged(files, judge="world:gold")["world:gold"]["splits"]
    gold = [world.gold([row["prompt"]] * 2, [row["response"], "it was ."]) for row in rows]
    assert list(found) == ["test"] and found["test"]["difference"] == pytest.approx(
        sum(x - y for x, y in gold) / 6, abs=1e-5
    )


def test_the_same_text_is_a_tie(files):
    """Whatever a reward's rounding says of it: each text is scored once. And scores are kept."""
    write(files / "b.jsonl", answers(1)[:6] + answers(2)[6:])
    spec = f"{files / 'reward.py'}:noisy"
    found = judged(files, judge=[spec, f"{files / 'reward.py'}:words"])
    assert found[spec]["splits"]["all"]["ties"] == 0.5 and len(found) == 3
    assert judged(files, judge=spec)[spec] == found[spec]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"a": "ood=nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        (
            {"b": "number.jsonl"},
            "number.jsonl:2: a row must be an object with prompt and response, both strings",
        ),
        (
            {"b": "other.jsonl"},
            "no prompt of --a is in --b: they begin with 'question 0 ?' and 'something else'",
        ),
        (
            {"b": "twice.jsonl"},
            "twice.jsonl:2: the prompt 'question 0 ?' is in the splits 'x' and 'y'",
        ),
        (
            {"a": "x=a.jsonl", "b": "y=b.jsonl"},
            "the prompt 'question 0 ?' is in the splits x and y",
        ),
        ({"judge": "nowhere.py:f"}, "nowhere.py: no such file"),
        ({"judge": "llm:runs/none"}, "runs/none: no such run yet"),
        ({"judge": "http://localhost:1/v1"}, "name its model with --judge_model"),
        ({"judge": "rm/seed_{seed}"}, "no such folder for any seed"),
        ({"timeout": 0}, "--timeout must be positive"),
        ({"parallel": 0}, "--parallel must be at least 1"),
    ],
)
def test_wrong_input_is_one_line(files, capfd, monkeypatch, changes, words):
    monkeypatch.chdir(files)
    write(
        files / "number.jsonl", [{"prompt": "x", "response": "y"}, {"prompt": "x", "response": 3}]
    )
    write(files / "other.jsonl", [{"prompt": "something else", "response": "y"}])
    write(
        files / "twice.jsonl",
        [{"prompt": "question 0 ?", "response": "y", "split": name} for name in "xy"],
    )
    assert words in probe_refused(capfd, *flags(files, **changes))
    assert not (files / "out").exists()


# ------------------------------------------------------------------------------------------------------------------ language models


def shown(question):
    """A question -> the prompt and the two answers in it."""
    parts = (question.split(f"[{name}]\n")[1].split(f"\n[End of {end}]")[0]
             for name, end in (("Prompt", "the prompt"), ("Answer 1", "answer 1"), ("Answer 2", "answer 2")))  # fmt: skip
    return tuple(parts)


def longest(question):
    """A judge that wants the longer answer, and of equally long ones the first."""
    _, first, second = shown(question)
    return chat("1" if len(first) >= len(second) else "2")


def by_endpoint(server, **changes):
    return {"judge": server.url, "judge_model": "tiny", "pause": 0.01, "timeout": 9} | changes


def choices(files):
    path = files / "out" / "cache" / "choices.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def test_what_is_a_choice():
    for reply, number in (("1", 1), (" 2.\n", 2), ("Answer 1", 1), ("**Answer 2**", 2), ('"1"', 1), ("[2]", 2), ("answer: 2", 2),
                          ("**Answer:** 1", 1), ("Answer: **2**", 2), ("<think>2? No.</think>\n\n1", 1)):  # fmt: skip
        assert judges.choice_of(reply) == number
    for reply in (
        "",
        "3",
        "12",
        "1 or 2",
        "1, 2",
        "1?",
        "-1",
        "neither",
        "Answer 1 is better",
        "I choose 2",
        "A",
        "1.2",
        "tie",
        "\u00b9",
    ):
        assert judges.choice_of(reply) is None


def test_both_orders_are_asked(files):
    write(files / "b.jsonl", answers(1)[:1] + answers(2)[1:])  # one pair is the same text
    with Endpoint(longest) as server:
        found = judged(files, **by_endpoint(server, criterion="their length"))[server.url]
        texts = [
            (x["prompt"], x["response"], y["response"])
            for x, y in zip(answers(1)[1:], answers(2)[1:])
        ]
        unequal = [(p, a, b) for p, a, b in texts if a != b]
        assert sorted(map(shown, server.questions())) == sorted(
            [*unequal, *((p, b, a) for p, a, b in unequal)]
        )
        assert all("Go by their length;" in question for question in server.questions())
        row = found["splits"]["all"]
        assert row["wins"] == sum(len(a) > len(b) for _, a, b in texts) / 12
        assert row["losses"] == sum(len(a) < len(b) for _, a, b in texts) / 12
        assert row["longer_won"] == 1 and found["first_chosen"] == 0.5 and "difference" not in row
        assert (
            found["questions"] == 2 * len(unequal)
            and found["identical"] == 12 - len(unequal)
            and found["unanswered"] == 0
        )
        server.asked.clear()
        assert (
            judged(files, **by_endpoint(server, criterion="their length"))[server.url] == found
            and not server.asked
        )  # all are kept
        judged(files, **by_endpoint(server))
        assert len(server.asked) == found["questions"]  # another question
        judged(files, **by_endpoint(server, judge_model="other"))
        assert len(server.asked) == 2 * found["questions"]  # another judge


def test_a_judge_of_places_is_a_judge_of_ties(files):
    with Endpoint(chat("1")) as server:
        found = judged(files, **by_endpoint(server, parallel=4))[server.url]
    assert (
        found["splits"]["all"]["ties"] == 1
        and found["splits"]["all"]["win_rate"] == 0.5
        and found["first_chosen"] == 1
    )


FAILURES = {  # an endpoint's reply: (in the error or the table, does it stop the asking?)
    "silence": (0.6, "timed out, 4 times", True), "429": ((429, ""), "HTTP 429 Too Many Requests, 4 times", True),
    "500": ((500, "oops"), "HTTP 500 Internal Server Error, 4 times", True), "no key": ((401, ""), "HTTP 401", True),
    "for hours": ((429, "", {"Retry-After": "9000"}), "for the next 9000 seconds", True),
    "malformed": ((200, '{"choices": [{"mess'), "not a chat completion", False),
    "refusal": (chat(None, refusal="No."), "a refusal: 'No.'", False),
    "too long": ((400, ""), "HTTP 400", False), "no choice": (chat("Both are fine."), "not a choice: 'Both are fine.'", False),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parallel"),
    [*((name, 1) for name in FAILURES), ("429", 3), ("no key", 3), ("malformed", 3)],
)
def test_what_has_been_judged_is_kept(files, capfd, name, parallel):
    """The first 7 replies are good, then it fails; later the same command asks for what is missing alone, and ends as if it never had."""
    bad, words, stops = FAILURES[name]
    with Endpoint(*[longest] * 7, bad) as server:
        options = by_endpoint(
            server, parallel=parallel, **({"timeout": 0.3} if name == "silence" else {})
        )
        if stops:
            error = stopped(files, capfd, **options)
            assert (
                words in error
                and "the same command asks for the other" in error
                and f"{len(choices(files))} of " in error
            )
        else:
            run_probe(*flags(files, **options))
            assert f"questions without a choice ({words}" in capfd.readouterr().out
        kept, found = choices(files), summary(files)["judges"][server.url]
        asked = found["questions"]
        assert len(kept) == 7 and found["unanswered"] == asked - 7 and words in found["reasons"][0]
        tries = 4 if "4 times" in words else 1
        assert (
            tries <= len(server.asked) - 7 <= tries * parallel
            if stops
            else len(server.asked) == asked
        )
        orders = [(row["prompt"], row["first"], row["second"]) for row in kept]
        whole = sum((prompt, second, first) in orders for prompt, first, second in orders) // 2
        assert (
            whole < 4 and found["splits"]["all"]["pairs"] == whole + found["identical"]
        )  # a half-asked pair is no tie
        with open(files / "out" / "cache" / "choices.jsonl", "a") as f:
            f.write('{"key": "cut off by a ki')
        server.replies, server.asked[:] = [longest], []
        later = judged(files, **options)[server.url]
        assert (
            len(server.asked) == asked - 7
            and len(choices(files)) == asked
            and later["unanswered"] == 0
            and later["reasons"] == []
        )
        shutil.rmtree(files / "out")
        assert judged(files, **options)[server.url] == later


@pytest.mark.parametrize("line", [
    "[", "5", "{}", '{"key": "a"}', '{"key": "a", "choice": 3}', '{"key": "a", "choice": "1"}',
    '{"key": 5, "choice": 1}',
])  # fmt: skip
def test_a_damaged_file_of_choices(files, capfd, line):
    """The line is named, and without it nothing else is asked again."""
    with Endpoint(longest) as server:
        options = by_endpoint(server)
        found = judged(files, **options)[server.url]
        path = files / "out" / "cache" / "choices.jsonl"
        first, second, *rest = path.read_text().splitlines(keepends=True)
        path.write_text("".join([first, line + "\n", *rest]))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_probe(*flags(files, **options))
        error = capfd.readouterr().err
        assert exit_.value.code == 2 and f"{path}:2: " in error
        assert "; delete this line, its question is asked again\n" in error
        path.write_text("".join([first, *rest]))
        server.asked.clear()
        assert judged(files, **options)[server.url] == found and len(server.asked) == 1


@pytest.mark.slow
@pytest.mark.parametrize("reply", [
    lambda key: (400, f"what is {key}?"), lambda key: (403, "", {"X-Key": key}), lambda key: chat(f"1 says {key}"),
    lambda key: chat(None, refusal=key), lambda key: (200, key),
], ids=["400", "403", "answer", "refusal", "no completion"])  # fmt: skip
def test_the_key_is_nowhere_to_be_read(files, reply):
    """A real process whose key has a Windows line end, and a server that says the key: not in any output, nor in any file."""
    with Endpoint(reply("sk-SECRET123")) as server:
        command = [sys.executable, REPO / "probe.py", *flags(files, **by_endpoint(server))]
        done = subprocess.run(
            command,
            env={**ENV, "OPENAI_API_KEY": "sk-SECRET123\r\n"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert server.asked and all(
            headers["Authorization"] == "Bearer sk-SECRET123" for _, headers, _ in server.asked
        )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    written = [path.read_bytes() for path in (files / "out").rglob("*") if path.is_file()]
    assert len(written) >= 2 and not any(b"SECRET" in content for content in written)
    assert "SECRET" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "url",
    [
        "http://user:SECRET@127.0.0.1:9/v1",
        "http://127.0.0.1:9/v1?key=SECRET",
        "http://x/{seed}#SECRET",
    ],
)
def test_a_key_in_a_judge_s_url(files, capfd, url):
    """Refused before anything is written, in one line that does not quote it."""
    before = sorted(files.rglob("*"))
    error = probe_refused(capfd, *flags(files, judge=url, judge_model="tiny"))
    assert (
        "SECRET" not in error
        and "a key belongs in the environment variable OPENAI_API_KEY" in error
    )
    assert sorted(files.rglob("*")) == before


def test_no_choice_at_all(files, capfd):
    with Endpoint(chat("Hm.")) as server:
        error = stopped(files, capfd, **by_endpoint(server))
        row = summary(files)["judges"][server.url]["splits"]["all"]
    assert "no reply was a choice, the first one: not a choice: 'Hm.'; 0 of" in error
    same = sum(a["response"] == b["response"] for a, b in zip(answers(1), answers(2)))
    assert row["pairs"] == same  # only what needed no judge


def test_an_endpoint_that_is_down_spoils_no_other_judge(files, capfd):
    with Endpoint(chat("1")) as server:
        pass
    other = f"{files / 'reward.py'}:words"
    assert (
        "refused, 4 times"
        in stopped(files, capfd, **by_endpoint(server, judge=[server.url, other])).lower()
    )
    assert summary(files)["judges"][other]["splits"]["all"]["pairs"] == 12


@pytest.mark.slow
def test_a_killed_process_loses_nothing(files):
    """SIGKILL after the fifth choice or so. The next call asks at most once again what was under way."""

    def slow(question):
        time.sleep(0.1)
        return longest(question)

    with Endpoint(slow) as server:
        options = by_endpoint(server, parallel=2)
        process = subprocess.Popen(
            [sys.executable, REPO / "probe.py", *flags(files, **options)],
            env=ENV,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while len(choices(files)) < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        time.sleep(0.3)  # the server may still be at it
        kept, asked = len(choices(files)), len(server.asked)
        assert (
            5 <= kept < 18 and asked - 2 <= kept and not (files / "out" / "summary.json").exists()
        )
        server.replies, server.asked[:] = [longest], []
        found = judged(files, **options)[server.url]
        assert len(server.asked) == found["questions"] - kept and found["unanswered"] == 0
        shutil.rmtree(files / "out")
        assert judged(files, **options)[server.url] == found


def test_a_local_model(files):
    """One that says "2" whatever it is asked: all ties, and the bias is seen. Its choices are kept until its weights change."""
    tokenizer, config = world.tokenizer(), world.model_config()
    tokenizer.add_tokens(["1", "2"])
    config.num_hidden_layers, config.max_position_embeddings, config.vocab_size = (
        1,
        512,
        len(tokenizer),
    )

    def save(word):
        lm = AutoModelForCausalLM.from_config(config)
        norm, head = lm.gpt_neox.final_layer_norm, lm.get_output_embeddings().weight.data
        norm.weight.data.zero_()
        norm.bias.data.fill_(1)  # the last hidden state is 1, 1, ... at every token
        head.zero_()
        head[tokenizer.convert_tokens_to_ids(word)] = 1
        save_policy(Policy(lm, value_head=False), tokenizer, str(files / "model"))

    save("2")
    spec = f"llm:{files / 'model'}"
    found = judged(files, judge=spec, answer_tokens=1, micro_batch_size=5)[spec]
    assert (
        found["splits"]["all"]["ties"] == 1
        and found["first_chosen"] == 0
        and found["unanswered"] == 0
    )
    assert len(choices(files)) == found["questions"]
    save("1")
    assert judged(files, judge=spec, answer_tokens=1)[spec]["first_chosen"] == 1
    assert len(choices(files)) == 2 * found["questions"]

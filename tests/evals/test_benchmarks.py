"""probe.py evaluate and its maths: against loops over scores that stand in the texts themselves, and on broken files.

K rewards, A answers to a prompt
"""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from support import join, probe_refused, ranks, run_probe
from transformers import AutoModelForCausalLM

import train_rm
from nanorlhf import splits, world
from nanorlhf.evals.benchmark_files import read_pairs
from nanorlhf.evals.benchmark_scores import (
    hard_normal_easy,
    mean_of_groups,
    shared_credit,
    style_wins,
    ties_score,
    ties_terms,
)
from nanorlhf.evals.benchmarks import scores_of
from nanorlhf.models import (
    Policy,
    load_reward_model,
    load_tokenizer,
    save_policy,
    save_reward_model,
)
from nanorlhf.runtime.distributed import Dist, setup, shutdown
from nanorlhf.stats import bootstrap, pair_wins

REWARD = """
def last(prompts, responses):
    return [float(r.split()[-1]) for r in responses]


def first(prompts, responses):
    return [float(r.split()[0]) for r in responses]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    (root / "reward.py").write_text(REWARD)
    return root


def answer(rng, low=0, high=4):
    """A text that holds two scores; few different ones, so that there are ties."""
    return f"{rng.randint(low, high)} {'word ' * rng.randint(0, 5)}{rng.randint(low, high)}"


def score_of(text, which=-1):
    return float(text.split()[which])


def evaluate(folder, name, rows, *flags, rewards=("last",)):
    """Run the command on rows written to a file -> summary."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(rows))
    out = folder / f"out_{name}"
    run_probe(
        "evaluate",
        "--reward_model",
        *(f"{folder / 'reward.py'}:{r}" for r in rewards),
        "--dataset",
        path,
        "--output_dir",
        out,
        *flags,
    )
    with open(out / "summary.json") as f:
        return json.load(f)


# ---------------------------------------------------------------------------------------------------------------------------- the maths


def score_one_text(root, specs):
    """The scores of a single text by each reward, by all processes together -> root/scores.json."""
    dist = setup("cpu")
    config = SimpleNamespace(max_length=0, chat_template=False, micro_batch_size=4, dtype="float32")
    found = {
        spec: scores_of(
            spec, [{"prompt": "review the hotel :", "response": "3 word 2"}], config, dist
        )[0].tolist()
        for spec in specs
    }
    if dist.main:
        (root / "scores.json").write_text(json.dumps(found))
    dist.barrier()
    shutdown()


@pytest.mark.slow
def test_fewer_texts_than_processes(folder):
    """The second of two processes has no text: neither a model nor a user's function is asked for the scores of none."""
    (folder / "strict.py").write_text(
        "def last(prompts, responses):\n    return [float(responses[0].split()[-1])] * len(prompts)\n"
    )
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(world.model_config()), value_head=False)
    save_policy(policy, world.tokenizer(), str(folder / "few_lm"))
    save_reward_model(
        load_reward_model(str(folder / "few_lm"), seed=1), world.tokenizer(), str(folder / "few_rm")
    )
    specs = [f"{folder}/strict.py:last", f"{folder}/few_rm", "world:gold"]
    join(*ranks(2, score_one_text, folder, specs, STDERR=str(folder / "stderr")))
    found = json.loads((folder / "scores.json").read_text())
    assert (
        [len(scores) for scores in found.values()] == [1, 1, 1]
        and found[specs[0]] == [2.0]
        and found[specs[1]] != [0.0]
    )


def test_pairs_of_one_prompt_are_one_unit(folder):
    """Also where it is written with other blanks."""
    rows = [
        {"prompt": f"p{blank}{i}", "chosen": "2", "rejected": "1"}
        for i in range(3)
        for blank in (" ", "  ", "\n")
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SimpleNamespace(dataset=f"{folder}/pairs.jsonl", eval_size=0, columns=[])
    assert [item.unit for item in read_pairs(config)] == ["p 0"] * 3 + ["p 1"] * 3 + ["p 2"] * 3


def test_shared_credit_against_loops():
    scores = torch.randint(0, 4, (200, 4), generator=torch.Generator().manual_seed(0)).double()
    expected = []
    for row in scores.tolist():
        best = [i for i in range(4) if row[i] == max(row)]
        expected.append(1 / len(best) if 0 in best else 0.0)
    assert (
        shared_credit(scores).tolist() == expected and len(set(expected)) == 5
    )  # 0, 1, 1/2, 1/3 and 1/4 all occur
    assert pair_wins(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])).tolist() == [
        1,
        0.5,
        0,
    ]


def ties_by_loops(tied, reference):
    """{prompt: (correct, incorrect)} of both kinds -> the score, as the leaderboard's code defines it."""

    def right(correct, incorrect):
        return all(c > i for c in correct for i in incorrect)

    def mean(values):
        return sum(values) / len(values) if values else 0.0

    easy, hard, margin = [], [], []
    for prompt in set(tied) & set(reference):
        correct, incorrect = tied[prompt]
        spread = max(abs(a - b) for a in correct for b in correct)
        gap = min(c - i for c in correct for i in incorrect)
        least = min(gap, min(c - i for c in reference[prompt][0] for i in reference[prompt][1]))
        easy.append(gap > spread)
        hard.append(least > spread)
        margin.append(
            math.tanh(least / spread - 1)
            if spread
            else 0.0
            if least == 0
            else math.copysign(1, least)
        )
    accuracies = (mean([right(*x) for x in part.values()]) for part in (tied, reference))
    return sum(
        w * x
        for w, x in zip(
            (0.3, 0.3, 0.2, 0.2, 0.01), (*accuracies, mean(easy), mean(hard), mean(margin))
        )
    )


@pytest.mark.parametrize("missing", [False, True])
def test_ties_against_loops(missing):
    """With prompts that have one half only, spreads of 0, and margins of 0 / 0."""
    rng = random.Random(0)

    def draw(n, low):
        return [rng.randint(low, low + 3) for _ in range(n)]

    tied = {
        p: (draw(rng.randint(2, 6), 2), draw(rng.randint(1, 5), rng.randint(-4, 0)))
        for p in range(300)
        if not missing or p % 3
    }
    reference = {
        p: (draw(1, 2), draw(rng.randint(1, 5), rng.randint(-3, 0)))
        for p in range(300)
        if not missing or p % 5
    }
    units = []
    for p in sorted(set(tied) | set(reference)):
        halves = {"tied": tied.get(p), "reference": reference.get(p)}
        halves = {
            name: [torch.tensor(x, dtype=torch.float32) for x in half]
            for name, half in halves.items()
            if half
        }
        units.append(ties_terms(**halves))
    score = ties_score(*(torch.stack(x) for x in zip(*units)))
    assert score.item() == pytest.approx(ties_by_loops(tied, reference), abs=1e-12)
    assert 0.2 < score < 0.9
    spread_0 = [
        ties_terms(
            (torch.full((2,), 1.0), torch.tensor([x])), (torch.tensor([9.0]), torch.zeros(1))
        )[0][4].item()
        for x in (0.0, 1, 2)
    ]
    assert spread_0 == [1, 0, -1]  # gaps of 1, 0 and -1 over a spread of 0


def test_a_perfect_model_has_1_01_and_errors():
    correct, incorrect = torch.tensor([50.0, 50.001]), torch.tensor([-50.0])
    score = ties_score(
        *(x[None] for x in ties_terms((correct, incorrect), (correct[:1], incorrect)))
    )
    assert score.item() == pytest.approx(1.01)
    with pytest.raises(ValueError, match="tied answers or the reference"):
        ties_terms()
    with pytest.raises(ValueError, match="at least two"):
        ties_terms((correct[:1], incorrect))


def test_rm_bench_against_loops():
    """Hard: a concise answer against a rejected one in a fancier style."""
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = (
        torch.randint(0, 5, (60, 3), generator=generator).double() for _ in range(2)
    )
    labels = torch.tensor([0] * 7 + [1] * 53)
    domains = []
    for g in (0, 1):
        levels = {"hard": [], "normal": [], "easy": []}
        for c, r in (
            (c, r) for c, r, label in zip(chosen.tolist(), rejected.tolist(), labels) if label == g
        ):
            for i in range(3):
                for j in range(3):
                    levels["hard" if i < j else "normal" if i == j else "easy"].append(
                        c[i] > r[j]
                    )  # a tie is no win
        domains.append([sum(x) / len(x) for x in levels.values()])
    mean, by_domain = mean_of_groups(style_wins(chosen, rejected), labels)
    torch.testing.assert_close(hard_normal_easy(by_domain), torch.tensor(domains).double())
    torch.testing.assert_close(hard_normal_easy(mean), torch.tensor(domains).double().mean(0))
    longer = style_wins(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 2, 3]))
    assert hard_normal_easy(longer).tolist() == [0, 0, 1]  # a model that likes style alone


def test_strata_keep_their_sizes():
    labels = torch.tensor([0, 1, 1, 0, 1, 2])
    seen = []
    bootstrap(
        torch.arange(6), lambda rows: seen.append(rows.long()) or 0, resamples=300, strata=labels
    )
    assert all(labels[rows].bincount().tolist() == [2, 3, 1] for rows in seen)
    assert {tuple(sorted(rows[labels[rows] == 0].tolist())) for rows in seen} == {
        (0, 0),
        (0, 3),
        (3, 3),
    }
    values = torch.tensor([0.0, 5, 5, 0, 5, 9])
    assert [x.item() for x in bootstrap(values, strata=labels)] == [
        4,
        4,
    ]  # no spread within a stratum, none at all


# -------------------------------------------------------------------------------------------------------------------------- the command


def test_pairs(folder):
    """Accuracy and margin of two rewards; an interval over prompts does not shrink when each pair stands three times in the file."""
    rng = random.Random(3)
    rows = [
        {"prompt": f"p{i // 2}", "chosen": answer(rng, 1, 4), "rejected": answer(rng, 0, 3)}
        for i in range(80)
    ]
    rows = [row for row in rows if row["chosen"] != row["rejected"]]
    found = evaluate(folder, "pairs", rows, "--eval_size", 0, rewards=("last", "first"))
    accuracy, margin = [], []
    for which in (-1, 0):
        margins = [
            score_of(row["chosen"], which) - score_of(row["rejected"], which) for row in rows
        ]
        accuracy.append(sum(1 if m > 0 else 0.5 if m == 0 else 0 for m in margins) / len(rows))
        margin.append(sum(margins) / len(rows))
    names = [f"{folder / 'reward.py'}:{name}".rpartition("/")[2] for name in ("last", "first")]
    assert [found["rewards"][name]["accuracy"][0] for name in names] == pytest.approx(accuracy)
    assert [found["rewards"][name]["margin"][0] for name in names] == pytest.approx(margin)
    assert found["differences"][names[1]]["accuracy"][0] == pytest.approx(accuracy[1] - accuracy[0])
    longer = [
        (len(row["chosen"]) > len(row["rejected"]))
        + 0.5 * (len(row["chosen"]) == len(row["rejected"]))
        for row in rows
    ]
    assert found["rewards"]["longer wins"]["accuracy"][0] == pytest.approx(sum(longer) / len(rows))
    assert found["rewards"]["shorter wins"]["accuracy"][0] == pytest.approx(
        1 - sum(longer) / len(rows)
    )
    assert found["units"] == found["prompts"] == 40
    again = evaluate(folder, "thrice", rows * 3, "--eval_size", 0)["rewards"][names[0]]
    for metric in ("accuracy", "margin"):
        assert again[metric] == pytest.approx(
            evaluate(folder, "once", rows, "--eval_size", 0)["rewards"][names[0]][metric]
        )
        value, low, high = again[metric]
        assert low < value < high


def rewardbench2_rows(rng):
    rows = []
    for i in range(30):
        subset = "Math" if i < 8 else "Safety"
        rows.append({"id": str(i), "prompt": f"p{i}", "chosen": [answer(rng, 1)], "rejected": [answer(rng) for _ in range(3)],
                     "num_correct": 1, "num_incorrect": 3, "total_completions": 4, "subset": subset})  # fmt: skip
    for i in range(12):
        for kind, n in (("ref", 1), ("tied", rng.randint(2, 5))):
            rows.append({"id": f"{kind}:{i}", "prompt": f"t{i}", "chosen": [answer(rng, 3, 5) for _ in range(n)],
                         "rejected": [answer(rng, 0, 3) for _ in range(4)], "num_correct": n, "num_incorrect": 4, "subset": "Ties"})  # fmt: skip
    rng.shuffle(rows)
    return rows


def test_rewardbench2(folder):
    rows = rewardbench2_rows(random.Random(5))
    found = evaluate(folder, "rewardbench2", rows, "--benchmark", "rewardbench2")["rewards"][
        "reward.py:last"
    ]
    subsets, halves = {"Math": [], "Safety": []}, {"tied": {}, "ref": {}}
    for row in rows:
        chosen, rejected = ([score_of(x) for x in row[side]] for side in ("chosen", "rejected"))
        if row["subset"] == "Ties":
            kind, number = row["id"].split(":")
            halves[kind][number] = chosen, rejected
        else:
            best = max(chosen + rejected)
            subsets[row["subset"]].append((chosen[0] == best) / (chosen + rejected).count(best))
    expected = {name: sum(x) / len(x) for name, x in subsets.items()} | {
        "ties": ties_by_loops(halves["tied"], halves["ref"])
    }
    assert {name: found[name][0] for name in expected} == pytest.approx(expected)
    assert found["overall"][0] == pytest.approx(sum(expected.values()) / 3)
    assert all(low <= value <= high and low < high for value, low, high in found.values())


def test_rewardbench2_flat_and_parquet(folder):
    """The flat form is the same prompts, and so is a parquet file."""
    import datasets

    rows = [row for row in rewardbench2_rows(random.Random(6)) if row["subset"] != "Ties"]
    flat = [{"question_id": row["id"], "prompt": row["prompt"], "chosen": row["chosen"][0], "rejected": r, "id": i, "subset": row["subset"]}
            for i, row in enumerate(rows) for r in row["rejected"]]  # fmt: skip
    nested = evaluate(folder, "nested", rows, "--benchmark", "rewardbench2")
    again = evaluate(folder, "flat", flat, "--benchmark", "rewardbench2")
    assert again["rewards"] == nested["rewards"] and again["answers"] == 4 * len(rows)
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "rows.parquet"))
    run_probe("evaluate", "--reward_model", f"{folder / 'reward.py'}:last", "--benchmark", "rewardbench2", "--dataset", folder / "rows.parquet",
        "--output_dir", folder / "out_parquet")  # fmt: skip
    with open(folder / "out_parquet" / "summary.json") as f:
        assert json.load(f)["rewards"] == nested["rewards"]


def test_rm_bench(folder, capsys):
    """safety-refuse and safety-response are one domain; without a domain the file is one."""
    rng = random.Random(7)
    rows = [{"id": i, "prompt": f"p{i}", "domain": domain, "chosen": [answer(rng) for _ in range(3)], "rejected": [answer(rng) for _ in range(3)]}
            for i, domain in enumerate(["chat"] * 4 + ["safety-refuse"] * 9 + ["safety-response"] * 5)]  # fmt: skip
    found = evaluate(folder, "rm_bench", rows, "--benchmark", "rm_bench")["rewards"][
        "reward.py:last"
    ]
    wins = [
        [[score_of(a) > score_of(b) for b in row["rejected"]] for a in row["chosen"]]
        for row in rows
    ]

    def cell(i, j, some):
        return sum(w[i][j] for w in some) / len(some)

    def level(name, some):
        picked = [
            (i, j)
            for i in range(3)
            for j in range(3)
            if {"hard": i < j, "normal": i == j, "easy": i > j}[name]
        ]
        return sum(cell(i, j, some) for i, j in picked) / len(picked)

    domains = {"chat": wins[:4], "safety": wins[4:]}
    for name in ("hard", "normal", "easy"):
        assert found[name][0] == pytest.approx(
            sum(level(name, some) for some in domains.values()) / 2
        )
    for name, some in domains.items():
        assert found[f"domain {name}"][0] == pytest.approx(
            sum(level(x, some) for x in ("hard", "normal", "easy")) / 3
        )
    assert found["average"][0] == pytest.approx(
        (found["domain chat"][0] + found["domain safety"][0]) / 2
    )
    assert found["concise > markdown"][0] == pytest.approx(
        (cell(0, 2, wins[:4]) + cell(0, 2, wins[4:])) / 2
    )
    assert "beats a rejected one (concise, detailed, markdown)" in capsys.readouterr().out
    pooled = evaluate(
        folder, "pooled", [{**row, "domain": "chat"} for row in rows], "--benchmark", "rm_bench"
    )["rewards"]["reward.py:last"]
    unnamed = [{name: x for name, x in row.items() if name != "domain"} for row in rows]
    assert (
        evaluate(folder, "unnamed", unnamed, "--benchmark", "rm_bench")["rewards"][
            "reward.py:last"
        ]["hard"]
        == pooled["hard"]
    )
    assert pooled["hard"][0] == pytest.approx(level("hard", wins)) != found["hard"][0]


def test_a_reward_model_as_train_rm_measures_it(folder):
    """The same held-out pairs, the same cuts, the same scores."""
    torch.manual_seed(0)
    config = world.model_config()
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, 32, 64
    save_policy(
        Policy(AutoModelForCausalLM.from_config(config), value_head=False),
        world.tokenizer(),
        str(folder / "lm"),
    )
    model = load_reward_model(str(folder / "lm"), seed=1)
    torch.nn.init.normal_(model.model.score.weight, generator=torch.Generator().manual_seed(2))
    save_reward_model(model, world.tokenizer(), str(folder / "rm"))
    settings = train_rm.Config(
        model=str(folder / "lm"), eval_size=100, max_length=24, output_dir=str(folder / "unused")
    )
    held_out = splits.load(settings, "pairs")[1]
    expected, _ = train_rm.evaluate(
        model.eval(),
        held_out,
        load_tokenizer(str(folder / "lm")),
        24,
        settings,
        Dist(0, 1, torch.device("cpu")),
    )
    run_probe(
        "evaluate",
        "--reward_model",
        folder / "rm",
        "world:gold",
        "--eval_size",
        100,
        "--max_length",
        24,
        "--output_dir",
        folder / "out_rm",
    )
    with open(folder / "out_rm" / "summary.json") as f:
        found = json.load(f)
    assert found["rewards"]["rm"]["accuracy"][0] == pytest.approx(expected["accuracy"], abs=1e-9)
    assert found["rewards"]["rm"]["margin"][0] == pytest.approx(expected["margin"], rel=1e-4)
    assert found["rewards"]["world:gold"]["accuracy"][0] == 1 and found["cut"]["rm"] > 0


# -------------------------------------------------------------------------------------------------------------------------- bad input

GOOD = {"id": "0", "prompt": "p", "chosen": ["1"], "rejected": ["0", "0", "0"], "subset": "Math"}
STYLED = {"id": 0, "prompt": "p", "chosen": ["1", "1", "1"], "rejected": ["0", "0", "0"]}
FLAT = {"question_id": 0, "prompt": "p", "chosen": "1", "rejected": "0"}


@pytest.mark.parametrize("of, row, message", [
    ("rewardbench2", {**GOOD, "chosen": []}, "field 'chosen' must be a list of strings"),
    ("rewardbench2", {**GOOD, "rejected": ["0", None]}, "field 'rejected' must be a list of strings"),
    ("rewardbench2", {**GOOD, "rejected": "0"}, "field 'rejected' must be a list of strings"),
    ("rewardbench2", {**GOOD, "prompt": ["p"]}, "field 'prompt' must be a string, not list"),
    ("rewardbench2", {k: v for k, v in GOOD.items() if k != "rejected"}, "no field 'rejected'"),
    ("rewardbench2", {**GOOD, "num_correct": 2}, "num_correct is 2, but there are 1"),
    ("rewardbench2", {**GOOD, "chosen": ["1", "1"]}, "2 chosen answers; outside the subset Ties there is one"),
    ("rewardbench2", {**GOOD, "subset": "Ties"}, "must be tied:N or ref:N, not '0'"),
    ("rewardbench2", {**GOOD, "subset": "Ties", "id": "tied:0"}, "a tied row needs at least two chosen answers"),
    ("rewardbench2", GOOD, "another row of the subset Math has the id '0' already"),
    ("rewardbench2", ["p", "1", "0"], "a row must be an object"),
    ("rm_bench", {**STYLED, "chosen": ["1", "1"]}, "2 chosen and 3 rejected answers, not 3 each"),
    ("rm_bench", {**STYLED, "rejected": [1, 2, 3]}, "field 'rejected' must be a list of strings"),
    ("flat", {**FLAT, "chosen": "2"}, "question 0 has another prompt or chosen answer in an earlier row"),
    ("flat", {k: v for k, v in FLAT.items() if k != "question_id"}, "no field 'question_id'"),
    ("flat", {**FLAT, "rejected": ["0"]}, "field 'rejected' must be a string, not list"),
])  # fmt: skip
def test_broken_rows(folder, capfd, of, row, message):
    good = {"rewardbench2": GOOD, "rm_bench": STYLED, "flat": FLAT}[of]
    (folder / "bad.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (good, row)))
    error = probe_refused(
        capfd, "evaluate", "--reward_model", f"{folder / 'reward.py'}:last", "--dataset", folder / "bad.jsonl", "--output_dir", folder / "never",
        "--benchmark", of if of == "rm_bench" else "rewardbench2",
    )  # fmt: skip
    assert message in error and "bad.jsonl:2" in error and not (folder / "never").exists()


def test_broken_flags(folder, capfd):
    (folder / "cut.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:30])
    (folder / "empty.json").write_text("[]")
    (folder / "bad.parquet").write_text("no parquet")
    for flags, message in (
        (("--benchmark", "arena"), "--benchmark must be one of pairs, rewardbench2, rm_bench, not 'arena'"),
        (("--benchmark", "rm_bench"), "--benchmark rm_bench: name its file as --dataset"),
        (("--benchmark", "rewardbench2", "--dataset", folder / "cut.jsonl"), "cut.jsonl:2: not JSON"),
        (("--benchmark", "rewardbench2", "--dataset", folder / "empty.json"), "empty.json: no rows"),
        (("--benchmark", "rewardbench2", "--dataset", folder / "bad.parquet"), "bad.parquet: neither a file nor a data set"),
        (("--dataset", folder / "none.jsonl"), "none.jsonl: no such file"),
        (("--max_rows", -1), "--max_rows must be at least 0"),
        (("--reward_model", "nowhere/at/all"), "nowhere/at/all: no such model folder"),
    ):  # fmt: skip
        assert message in probe_refused(
            capfd,
            "evaluate",
            "--reward_model",
            f"{folder / 'reward.py'}:last",
            "--output_dir",
            folder / "never",
            *flags,
        )

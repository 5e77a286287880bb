"""sample_bon.py and nanorlhf/pool.py: the estimates against all subsets of the pool that was written, nothing done twice, nothing stale,
and the same answers and scores on any number of processes, with any batch size, and after any kill.

    P prompts, N answers to a prompt, T tokens
"""

import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ENV, REPO, flags, join, ranks, read_rows, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import sample_bon
import train_rm
import train_sft
from nanorlhf import data, models, pool, rewards, rollout, world
from nanorlhf.bon import DEFAULT_NS, fit_bon
from nanorlhf.errors import InputError
from nanorlhf.models import load_reward_model, load_tokenizer, save_reward_model
from nanorlhf.packing import pack
from nanorlhf.runtime import cli, distributed, files, rng

REWARDS = """
def the(prompts, responses):  # few different values: many ties
    return [float(r.split().count("the")) for r in responses]
def letters(prompts, responses):
    return [(7 * len(r) + 3 * r.count("a")) % 23 / 4 - 2 for r in responses]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with small inputs, sft/, rm/seed_0 and rm/seed_1 (only their heads are new), rewards.py, and with a plain run, run/."""
    root = tmp_path_factory.mktemp("bon")
    (root / "rewards.py").write_text(REWARDS)
    rows = world.demonstrations(240)
    write_rows(root / "sft.jsonl", rows)
    settings = {"batch_size": 16, "eval_size": 8, "warmup": 2, "max_new_tokens": 12, "n_samples": 1}
    train_sft.main(
        train_sft.Config(
            output_dir=f"{root}/sft", dataset=f"{root}/sft.jsonl", steps=20, **settings
        )
    )
    tokenizer = load_tokenizer(f"{root}/sft")
    prompts, responses, _ = data.encode(tokenizer, rows[:64], "response")
    for seed in range(2):
        model = load_reward_model(f"{root}/sft", seed=seed)
        with torch.no_grad():
            scores = model(pack(prompts, responses))
        model.standardise(scores.mean().item() + 0.1 * seed, scores.std().item())
        save_reward_model(model, tokenizer, root / f"rm/seed_{seed}")
    sample(root, root / "run")
    return root


# ----------------------------------------------------------------------------------------------------------------------- helpers


def settings_of(base, **changes):
    """The plain run: 6 prompts, 8 answers each, three members, one of them with many ties."""
    members = [f"{base}/rm/seed_{{seed}}", f"{base}/rewards.py:the"]
    return {
        "model": f"{base}/sft",
        "reward_model": members,
        "n_answers": 8,
        "eval_size": 6,
        "max_new_tokens": 12,
        **changes,
    }


def sample(base, folder, **changes):
    return sample_bon.main(
        sample_bon.Config(output_dir=str(folder), **settings_of(base, **changes))
    )


def tiny(base, folder, **changes):
    """A run of less than half a second: one reward, no fit."""
    return sample(
        base,
        folder,
        **{
            "reward_model": [f"{base}/rewards.py:letters"],
            "n_answers": 4,
            "eval_size": 3,
            "n": [1, 2],
            **changes,
        },
    )


def read_pool(base, folder, file, **changes):
    """A run on answers that are there already."""
    return tiny(base, folder, pool=str(file), n_answers=256, eval_size=256, **changes)


def tokens(folder):
    """The sampled ids that a run keeps, one row a prompt."""
    (path,) = Path(folder).glob("cache/answers_*.jsonl")
    return [(row["prompt_ids"], row["response_ids"]) for row in read_rows(path)]


def scores(folder):
    return [row["scores"] for row in read_rows(Path(folder) / "pool.jsonl")]


def contents(folder):
    """Every file but config.json, which names its own folder, and pictures."""
    files = (
        p
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file() and p.suffix != ".png" and p.name != "config.json"
    )
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def assert_close_scores(a, b):
    for row, other in zip(scores(a), scores(b), strict=True):
        assert row.keys() == other.keys()
        assert all(row[name] == pytest.approx(other[name], abs=1e-4) for name in row)


def refuses(function, *words):
    with pytest.raises(InputError) as e:
        function()
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in words), e.value


def edit(folder, change):
    """Change the tensors of a model folder in place."""
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def best_of_all_subsets(proxy, values, n):
    """The mean over all subsets of size n of the value of the best answer; of several best ones, the mean of theirs."""
    total = 0.0
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        best = [values[i] for i in subset if proxy[i] == top]
        total += sum(best) / len(best)
    return total / math.comb(len(proxy), n)


def proxies_of(rows, lambdas):
    """{name: P lists of N} of each member and, by hand, of each ensemble."""
    members = {name: [row["scores"][name] for row in rows] for name in rows[0]["scores"]}
    if len(members) == 1:
        return members

    def ensemble(function):
        return [
            [function(column) for column in zip(*row["scores"].values(), strict=True)]
            for row in rows
        ]

    def uwo(column, weight):
        mean = sum(column) / len(column)
        return mean - weight * sum((x - mean) ** 2 for x in column) / len(column)

    ensembles = {"mean": ensemble(lambda column: sum(column) / len(column)), "wco": ensemble(min)}
    return (
        members
        | ensembles
        | {f"uwo_{x:g}": ensemble(functools.partial(uwo, weight=x)) for x in lambdas}
    )


def assert_results(results, rows, golds, ns, lambdas=(0.5,)):
    """bon_results.json again, from the rows {scores} of pool.jsonl and gold scores for the same answers -> {name: gold [L, P]}."""
    proxies, curves, P = proxies_of(rows, lambdas), {}, len(rows)
    assert list(results) == list(proxies)
    for name, points in results.items():
        curves[name] = []
        for n, point in zip(ns, points, strict=True):
            assert (
                list(point)
                == "n kl proxy_score proxy_se proxy_interval gold_score gold_se gold_interval".split()
            )
            assert point["n"] == n and point["kl"] == pytest.approx(
                math.log(n) - (n - 1) / n, abs=1e-12
            )
            for what, values in (("proxy", proxies[name]), ("gold", golds)):
                if values is None:
                    assert [point[f"{what}_{part}"] for part in ("score", "se", "interval")] == [
                        None
                    ] * 3
                    continue
                each = [
                    best_of_all_subsets(p, v, n) for p, v in zip(proxies[name], values, strict=True)
                ]
                mean = sum(each) / P
                se = math.sqrt(sum((x - mean) ** 2 for x in each) / (P - 1) / P) if P > 1 else 0.0
                assert point[f"{what}_score"] == pytest.approx(mean, abs=1e-9), (name, what, n)
                assert point[f"{what}_se"] == pytest.approx(se, abs=1e-9), (name, what, n)
                draws = np.random.default_rng(n).choice(each, (4000, P)).mean(1)
                assert point[f"{what}_interval"] == pytest.approx(
                    np.quantile(draws, [0.025, 0.975]), abs=0.5 * se + 1e-9
                ), (name, what, n)
                if what == "gold":
                    curves[name].append(each)
    return curves


@torch.no_grad()
def plain_scores(folder, prompt, responses):
    """A reward model's scores of one prompt's answers, token lists, by plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    rows = [prompt + response for response in responses]
    width = max(map(len, rows))
    assert all(
        row[-1] != model.config.pad_token_id for row in rows
    )  # plain transformers look for the last that is not padding
    ids = torch.tensor(
        [row + [model.config.pad_token_id] * (width - len(row)) for row in rows]
    )  # [N, T]
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])  # [N, T]
    return (model(ids, attention_mask=mask).logits[:, 0] - model.config.reward_mean).tolist()


@pytest.fixture
def work(monkeypatch):
    """What a call really does: {"sampled": answers, name of a reward: answers that it scored}."""
    done, load_reward, roll_out = {}, pool.load_reward, pool.roll_out

    def counted(what, n):
        done[what] = done.get(what, 0) + n

    def load(spec, *rest):
        reward = load_reward(spec, *rest)
        done[os.path.basename(spec)] = 0  # loaded

        def scored(answers):
            counted(os.path.basename(spec), len(answers))
            return reward(answers)

        return scored

    def rolled_out(parts, prompts, *rest):
        counted("sampled", len(prompts))
        return roll_out(parts, prompts, *rest)

    monkeypatch.setattr(pool, "load_reward", load)
    monkeypatch.setattr(pool, "roll_out", rolled_out)
    return done


@pytest.fixture
def run(base, tmp_path):
    """A copy of the plain run that a test may go on with."""
    return Path(shutil.copytree(base / "run", tmp_path / "run"))


# ----------------------------------------------------------------------------------------------------------------------- results


def test_results_equal_all_subsets(base, tmp_path):
    results = sample(base, tmp_path / "run", uwo_lambda=[0.5, 2.0])
    assert results == json.loads((tmp_path / "run/bon_results.json").read_text())
    rows = read_rows(tmp_path / "run/pool.jsonl")
    assert [list(row) for row in rows] == [["prompt", "responses", "scores", "gold_scores"]] * 6
    prompts = {row["prompt"] for row in rows}
    assert (
        len(prompts) == 6
        and prompts < {row["prompt"] for row in world.prompts("test")}
        and len(set(map(world.topic_of, prompts))) > 2
    )
    assert list(rows[0]["scores"]) == ["seed_0", "seed_1", "rewards.py:the"]
    golds = [
        world.gold([row["prompt"]] * 8, row["responses"]) for row in rows
    ]  # anew: of the answers themselves
    for row, gold in zip(rows, golds, strict=True):
        assert row["gold_scores"] == pytest.approx(gold, abs=1e-6) and len(set(gold)) > 3
    ns = [1, 2, 4, 8]
    curves = assert_results(
        results, rows, [row["gold_scores"] for row in rows], ns, lambdas=(0.5, 2.0)
    )
    at_8 = {name: points[-1]["gold_score"] for name, points in results.items()}
    assert (
        list(results)[3:] == ["mean", "wco", "uwo_0.5", "uwo_2"] and len(set(at_8.values())) == 7
    )  # the order of answers does matter

    # Every member's score is that of its own answer, and every fit the one to these curves.
    for row, (prompt, responses) in zip(rows, tokens(tmp_path / "run"), strict=True):
        for seed in range(2):
            assert row["scores"][f"seed_{seed}"] == pytest.approx(
                plain_scores(base / f"rm/seed_{seed}", prompt, responses), abs=1e-4
            )
        assert row["scores"]["rewards.py:the"] == [
            response.split().count("the") for response in row["responses"]
        ]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["prompts"], summary["answers"]) == (6, 8) and list(summary["fits"]) == list(
        results
    )
    for name, fit in summary["fits"].items():
        expected = fit_bon(
            torch.tensor([math.log(n) - (n - 1) / n for n in ns]), torch.tensor(curves[name]).T
        )._asdict()
        assert list(fit) == ["a", "b", "a_interval", "b_interval"]
        assert all(fit[key] == pytest.approx(expected[key], abs=1e-5) for key in fit), name


def test_one_member_is_no_ensemble(base, tmp_path, capsys, pictures):
    results = tiny(base, tmp_path / "run", n=[4, 1, 4], n_answers=5)  # in any order, said twice
    assert list(results) == ["rewards.py:letters"] and [
        point["n"] for point in results["rewards.py:letters"]
    ] == [1, 4]
    printed = capsys.readouterr().out
    point = results["rewards.py:letters"][1]
    assert "3 prompts, 5 answers each" in printed
    assert all(
        f"n 4: {point[what + '_score']:.2f} +- {point[what + '_se']:.2f}" in printed
        for what in ("proxy", "gold")
    )
    rows = read_rows(tmp_path / "run/pool.jsonl")
    assert_results(results, rows, [row["gold_scores"] for row in rows], [1, 4])
    assert json.loads((tmp_path / "run/summary.json").read_text())["fits"] == {}  # two points
    assert (tmp_path / "run/bon.png").exists() == ("bon.png" in printed)  # with matplotlib


def test_a_single_prompt(base, tmp_path):
    results = tiny(base, tmp_path / "run", eval_size=1, n=[])
    rows = read_rows(tmp_path / "run/pool.jsonl")
    assert_results(
        results, rows, [row["gold_scores"] for row in rows], [1, 2, 4]
    )  # errors and widths are 0
    assert (
        json.loads((tmp_path / "run/summary.json").read_text())["fits"] == {}
    )  # no interval without prompts to draw


def test_two_folders_with_one_name(base, tmp_path):
    """Members are told apart by their whole paths; a copy of a model has the same scores, and they are kept once."""
    for seed, name in enumerate("ab"):
        shutil.copytree(base / f"rm/seed_{seed}", tmp_path / name / "model")
    shutil.copytree(tmp_path / "a/model", tmp_path / "c/model")
    settings = {
        "reward_model": [f"{tmp_path}/{name}/model" for name in "abc"],
        "gold_model": f"{base}/rewards.py:the",
    }
    for _ in range(2):  # the second call reads what the first one kept
        results = tiny(base, tmp_path / "run", **settings)
        assert list(results)[:3] == settings["reward_model"]
        rows = read_rows(tmp_path / "run/pool.jsonl")
        assert all(
            row["scores"][settings["reward_model"][0]] == row["scores"][settings["reward_model"][2]]
            for row in rows
        )
        assert_results(results, rows, [row["gold_scores"] for row in rows], [1, 2])


# ------------------------------------------------------------------------------------------------------------- nothing done twice


def test_a_second_call_only_computes(base, run, work, monkeypatch):
    before, results = (
        (run / "pool.jsonl").read_bytes(),
        json.loads((run / "bon_results.json").read_text()),
    )
    monkeypatch.setattr(pool, "load_policy", None)
    again = sample(base, run, n=[3, 4, 8], uwo_lambda=[0.1, 0.0], save_pairs=True)
    assert list(again) == ["seed_0", "seed_1", "rewards.py:the", "mean", "wco", "uwo_0.1", "uwo_0"]
    assert again["uwo_0"] == again["mean"] != again["uwo_0.1"]
    for name in ("seed_1", "mean", "wco"):
        assert again[name][1:] == results[name][2:]
    sample(base, run, n=[3], save_best=True, objective="wco", batch_size=3, micro_batch_size=5)
    assert sample(base, run) == results and work == {}
    assert (
        (run / "pool.jsonl").read_bytes() == before
        and (run / "pairs.jsonl").exists()
        and (run / "best_of_3.jsonl").exists()
    )


def test_members_come_and_go(base, run, work):
    before = scores(run)
    sample(
        base,
        run,
        n=[1],
        reward_model=[f"{base}/rewards.py:letters", *settings_of(base)["reward_model"]],
    )
    assert work == {"rewards.py:letters": 48} and next(iter(scores(run)[0])) == "rewards.py:letters"
    assert all(new | old == new for new, old in zip(scores(run), before, strict=True))
    work.clear()
    results = sample(base, run, n=[1], reward_model=[f"{base}/rm/seed_1"])
    assert (
        work == {}
        and list(results) == ["seed_1"]
        and scores(run) == [{"seed_1": row["seed_1"]} for row in before]
    )
    sample(
        base, run, n=[1], gold_model=f"{base}/rm/seed_0"
    )  # scores are kept by reward, not by the part that it plays
    assert work == {} and [row["gold_scores"] for row in read_rows(run / "pool.jsonl")] == [
        row["seed_0"] for row in before
    ]


def test_a_reward_model_that_changes_in_place(base, run, tmp_path, work):
    model = Path(shutil.copytree(base / "rm/seed_1", tmp_path / "model"))
    settings = {"reward_model": [str(model)], "n": [1, 8]}
    sample(base, run, **settings)
    first, mean = contents(run), json.loads((model / "config.json").read_text())["reward_mean"]
    old, weights = [row["model"] for row in scores(run)], (model / "model.safetensors").read_bytes()
    assert work == {} and mean != 0  # it was scored at another place
    edit(model, lambda tensors: tensors["score.weight"].neg_())
    changed = sample(base, run, **settings)
    assert work == {"model": 48}
    for row, was in zip(scores(run), old, strict=True):
        assert row["model"] == pytest.approx([-x - 2 * mean for x in was], abs=1e-4)
    rows = read_rows(run / "pool.jsonl")
    assert_results(changed, rows, [row["gold_scores"] for row in rows], [1, 8])
    work.clear()
    (model / "model.safetensors").write_bytes(weights)
    sample(base, run, **settings)
    assert work == {} and all(contents(run)[name] == first[name] for name in first)


def test_a_policy_that_changes_in_place(base, tmp_path, work):
    model = Path(shutil.copytree(base / "sft/model", tmp_path / "sft"))
    tiny(base, tmp_path / "run", model=str(model))
    first, weights, ids = (
        contents(tmp_path / "run"),
        (model / "model.safetensors").read_bytes(),
        tokens(tmp_path / "run"),
    )
    edit(model, lambda tensors: tensors["embed_out.weight"].mul_(3))
    work.clear()
    tiny(base, tmp_path / "run", model=str(model))
    assert work == {"sampled": 12, "rewards.py:letters": 12, "world:gold": 12}
    rows = read_rows(tmp_path / "run/pool.jsonl")
    new = load_tokenizer(str(model)).batch_decode(ids[0][1], skip_special_tokens=True)
    assert (
        new == json.loads(first["pool.jsonl"].split(b"\n")[0])["responses"] != rows[0]["responses"]
    )
    work.clear()
    (model / "model.safetensors").write_bytes(weights)
    tiny(base, tmp_path / "run", model=str(model))
    assert work == {} and all(contents(tmp_path / "run")[name] == first[name] for name in first)


def test_a_function_that_is_edited(base, tmp_path, work):
    (tmp_path / "mine.py").write_text(REWARDS)
    settings = {
        "reward_model": [f"{tmp_path}/mine.py:the"],
        "gold_model": f"{tmp_path}/mine.py:letters",
    }
    tiny(base, tmp_path / "run", **settings)
    before = read_rows(tmp_path / "run/pool.jsonl")
    (tmp_path / "mine.py").write_text(REWARDS.replace('.count("the")', '.count("the") + 1'))
    work.clear()
    tiny(base, tmp_path / "run", **settings)
    assert work == {
        "mine.py:the": 12,
        "mine.py:letters": 12,
    }  # it might have called what was edited
    for row, was in zip(read_rows(tmp_path / "run/pool.jsonl"), before, strict=True):
        assert row["scores"]["mine.py:the"] == [x + 1 for x in was["scores"]["mine.py:the"]]
        assert (row["responses"], row["gold_scores"]) == (was["responses"], was["gold_scores"])
    (tmp_path / "mine.py").write_text(REWARDS)
    work.clear()
    tiny(base, tmp_path / "run", **settings)
    assert work == {} and read_rows(tmp_path / "run/pool.jsonl") == before


def test_a_pool_that_is_edited(base, tmp_path, work):
    rows = [{"prompt": "a :", "responses": ["the cat", "dog", "the the"], "gold_scores": [3, 1.5, -1]},
            {"prompt": "b :", "responses": ["x", "the y", "z a a"], "gold_scores": [0, 1, 2]}]  # fmt: skip
    write_rows(tmp_path / "pool.jsonl", rows)
    read_pool(base, tmp_path / "run", tmp_path / "pool.jsonl")
    for response in ("the y", "aaa"):
        rows[1]["responses"][1] = response
        rows[0]["gold_scores"][1] += 0.25  # gold alone needs no scores
        write_rows(tmp_path / "pool.jsonl", rows)
        work.clear()
        results = read_pool(base, tmp_path / "run", tmp_path / "pool.jsonl")
        assert work == ({} if response == "the y" else {"rewards.py:letters": 6})
        written = read_rows(tmp_path / "run/pool.jsonl")
        assert [
            {k: row[k] for k in ("prompt", "responses", "gold_scores")} for row in written
        ] == rows
        expected = [(7 * len(r) + 3 * r.count("a")) % 23 / 4 - 2 for r in rows[1]["responses"]]
        assert written[1]["scores"] == {"rewards.py:letters": expected}
        assert_results(results, written, [row["gold_scores"] for row in rows], [1, 2])


@pytest.mark.parametrize("change", [{"n_answers": 16}, {"seed": 1}, {"temperature": 0.7}, {"max_new_tokens": 13}, {"split": "train"},
                                    {"dataset": "world:1"}, {"eval_size": 7}, {"dtype": "bfloat16"}, {"pool": "mine.jsonl"}])  # fmt: skip
def test_another_run_needs_another_folder(base, work, change):
    before = contents(base / "run")
    refuses(
        lambda: sample(base, base / "run", **change),
        "already holds another run",
        next(iter(change)),
        "choose another --output_dir",
    )
    assert work == {} and contents(base / "run") == before


# ----------------------------------------------------------------------------------------------------------------------- sampling


def test_batch_sizes_change_nothing(base, tmp_path, monkeypatch):
    settings = {"reward_model": [f"{base}/rm/seed_0"], "eval_size": 4}
    tiny(base, tmp_path / "whole", **settings)
    assert (
        len({len(prompt) for prompt, _ in tokens(tmp_path / "whole")}) > 1
    )  # else nothing is ever padded
    for batch_size, micro_batch_size, chunk in (
        (1, 1, 1),
        (3, 2, 7),
        (9, 64, 5),
    ):  # parts of a prompt, whole ones
        monkeypatch.setattr(pool, "CHUNK", chunk)
        folder = tmp_path / f"{batch_size}"
        tiny(base, folder, **settings, batch_size=batch_size, micro_batch_size=micro_batch_size)
        assert tokens(folder) == tokens(tmp_path / "whole")
        assert_close_scores(folder, tmp_path / "whole")


def test_an_answer_depends_on_its_place_and_the_seed_alone(base, tmp_path):
    write_rows(
        tmp_path / "mine.jsonl", [world.prompts("test")[i] for i in (5, 40, 5)]
    )  # one prompt at two places
    for name, changes in {"4": {}, "6": {"n_answers": 6}, "seed": {"seed": 1}}.items():
        gold = {"gold_model": f"{base}/rewards.py:the"}
        tiny(
            base, tmp_path / name, dataset=f"{tmp_path}/mine.jsonl", split="all", **gold, **changes
        )
    four, six, other = (tokens(tmp_path / name) for name in ("4", "6", "seed"))
    assert [(prompt, answers[:4]) for prompt, answers in six] == four and four[0][0] == four[2][0]
    for (prompt, answers), (same, others) in zip(four, other, strict=True):
        assert prompt == same and len(set(map(str, answers))) == 4
        assert sum(a == b for a, b in zip(answers, others)) <= 1  # short ones may meet
    assert sum(a == b for a, b in zip(four[0][1], four[2][1])) <= 1


def test_sampled_from_the_policy(base, tmp_path):
    """Close to temperature 0 every answer is the greedy one of plain transformers."""
    tiny(base, tmp_path / "run", temperature=1e-4, n_answers=2, max_new_tokens=6)
    model = AutoModelForCausalLM.from_pretrained(base / "sft/model")
    tokenizer = AutoTokenizer.from_pretrained(base / "sft/model")
    for row, (prompt, answers) in zip(
        read_rows(tmp_path / "run/pool.jsonl"), tokens(tmp_path / "run"), strict=True
    ):
        assert prompt == tokenizer(row["prompt"]).input_ids
        greedy = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        assert answers == [greedy, greedy]


def test_sampled_ids_are_scored_as_they_are(base, tmp_path, monkeypatch):
    """A policy that often says <unk>, which no text holds: scores that went through texts would be others."""
    model = Path(shutil.copytree(base / "sft/model", tmp_path / "sft"))
    the, unk = world.vocabulary().index("the"), world.vocabulary().index("<unk>")
    edit(
        model,
        lambda tensors: tensors["embed_out.weight"][unk].copy_(tensors["embed_out.weight"][the]),
    )

    def never(*args):
        raise AssertionError("a text was tokenized")

    monkeypatch.setattr(rewards, "encode_responses", never)
    monkeypatch.setattr(rewards, "encode_prompts", never)
    settings = {
        "reward_model": [f"{base}/rm/seed_0"],
        "gold_model": f"{base}/rewards.py:the",
        "max_prompt_length": 3,
    }
    tiny(base, tmp_path / "run", model=str(model), **settings)
    n_lossy = 0
    for row, (prompt, answers) in zip(
        read_rows(tmp_path / "run/pool.jsonl"), tokens(tmp_path / "run"), strict=True
    ):
        words = [[world.vocabulary()[i] for i in answer if i > unk] for answer in answers]
        assert row["responses"] == [" ".join(w) for w in words] and len(prompt) == 3 == len(
            row["prompt"].split()
        )
        assert row["scores"]["seed_0"] == pytest.approx(
            plain_scores(base / "rm/seed_0", prompt, answers), abs=1e-4
        )
        n_lossy += sum(unk in answer for answer in answers)
    assert n_lossy > 3


# ------------------------------------------------------------------------------------------------------ processes, and their deaths


def several(base):
    """A run that two processes share: 5 prompts in three batches, rewards on ids and on texts; the gold reward is a member too."""
    members = [f"{base}/rm/seed_0", f"{base}/rewards.py:letters"]
    return settings_of(
        base,
        reward_model=members,
        gold_model=members[1],
        n_answers=3,
        eval_size=5,
        n=[1, 2],
        batch_size=6,
    )


@pytest.fixture(scope="module")
def two_processes(base):
    """several() by torchrun: base/two."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    args = [
        "--",
        "sample_bon.py",
        "--output_dir",
        str(base / "two"),
        *flags(several(base)),
    ]  # without -- torchrun wants --n for itself
    done = subprocess.run(
        [*command, *args], cwd=REPO, env=ENV, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("5 prompts, 3 answers each") == 1
    return base / "two"


def child(folder, settings, deadly=None, at=0, slow=0.0):
    """A run in one of several processes. Rank 1 is killed at the at-th call of pool's function `deadly`; rank 0 writes slowly."""
    real, calls, append, rank = (
        getattr(pool, deadly or "score"),
        itertools.count(1),
        pool.Lines.append,
        os.environ["RANK"],
    )

    def dies(*args):
        if next(calls) == at and rank == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    def appends(*args):
        time.sleep(slow if rank == "0" else 0)
        append(*args)

    setattr(pool, deadly or "score", dies)
    pool.Lines.append = appends
    sample_bon.main(sample_bon.Config(output_dir=str(folder), **settings))
    distributed.shutdown()


@pytest.mark.slow
def test_two_processes_change_nothing(base, two_processes, tmp_path):
    sample_bon.main(sample_bon.Config(output_dir=f"{tmp_path}/one", **several(base)))
    assert tokens(tmp_path / "one") == tokens(two_processes)
    assert_close_scores(tmp_path / "one", two_processes)
    rows = read_rows(two_processes / "pool.jsonl")
    assert [row["gold_scores"] for row in rows] == [
        row["scores"]["rewards.py:letters"] for row in rows
    ]
    assert_results(
        json.loads((two_processes / "bon_results.json").read_text()),
        rows,
        [row["gold_scores"] for row in rows],
        [1, 2],
    )


@pytest.mark.slow
def test_sigkill_while_sampling_and_while_scoring(base, two_processes, tmp_path):
    """Rank 1 dies in each of them; all are started again with the same command, and end with the same bits."""
    for deadly, lines in (("sample_batch", 4), ("score_chunk", 5 + 5)):
        first, second = ranks(
            2, child, tmp_path / "run", several(base), deadly, 3 if deadly == "sample_batch" else 2
        )
        join(second, code=-signal.SIGKILL)
        first.kill()
        first.join()
        cached = contents(tmp_path / "run")
        assert (
            not (tmp_path / "run/pool.jsonl").exists()
            and sum(part.count(b"\n") for part in cached.values()) == lines
        )
    join(*ranks(2, child, tmp_path / "run", several(base)))
    assert contents(tmp_path / "run") == contents(two_processes)


def test_the_noise_is_no_evaluations(base, tmp_path, monkeypatch):
    """Not even that of the first prompt: an evaluation's prompts are keyed by their places, 0, 1, 2, ..., at step 0."""
    seen, real = [], rollout.uniforms

    def recorded(*args):
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(rollout, "uniforms", recorded)
    tiny(base, tmp_path / "run", seed=3)
    pool_noise = torch.cat(seen)  # [3 prompts of 4 answers, R]
    assert pool_noise.shape == (12, 12) and len(pool_noise.unique(dim=0)) == 12
    for step in range(3):  # of the evaluations, and of the first rollouts
        of_ppo = np.stack(
            [
                np.random.default_rng([rng.ROLLOUT, 3, step, place]).random(12)
                for place in range(256)
            ]
        )
        assert not any((torch.from_numpy(of_ppo) == row).all(1).any() for row in pool_noise)


def test_a_pool_of_older_noise_is_not_gone_on_with(base, tmp_path):
    """A cache as it was named before the noise had a stream of its own, with answers that no policy gives."""
    tiny(base, tmp_path / "run")
    (new,) = (tmp_path / "run/cache").glob("answers_*.jsonl")
    rows = read_rows(new)
    older = (4, 12, 1.0, 0, "float32")
    asked = [row["prompt_ids"] for row in rows]
    name = "answers_" + files.digest(pool.LAYOUT, models.fingerprint(f"{base}/sft"), asked, older)
    (tmp_path / "old/cache").mkdir(parents=True)
    config = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    write_rows(
        tmp_path / f"old/cache/{name}.jsonl",
        [{**row, "responses": ["older"] * 4} for row in rows[:2]],
    )
    tiny(base, tmp_path / "old")
    assert [row["responses"] for row in read_rows(tmp_path / "old/pool.jsonl")] == [
        row["responses"] for row in rows
    ]


@pytest.mark.slow
def test_fewer_answers_than_processes(base, tmp_path):
    """Two answers for four processes, and a gold reward that is a member: all read its scores only once they are on disk."""
    settings = {**several(base), "eval_size": 1, "n_answers": 2}
    processes = ranks(4, child, tmp_path / "four", settings, None, 0, 0.3)
    for process, seconds in zip(processes, (60, 5, 5, 5)):
        process.join(seconds)
        process.kill()  # where they wait for each other for ever
    assert [process.exitcode for process in processes] == [0] * 4
    sample_bon.main(sample_bon.Config(output_dir=f"{tmp_path}/one", **settings))
    assert tokens(tmp_path / "four") == tokens(tmp_path / "one")
    assert_close_scores(tmp_path / "four", tmp_path / "one")


class Killed(BaseException):
    pass


def test_killed_at_every_write_to_the_cache(base, tmp_path, monkeypatch):
    """What a kill leaves: some lines of a chunk, and a part of the next one, be it the first line of all."""
    settings = {
        "reward_model": [f"{base}/rm/seed_0", f"{base}/rewards.py:the"],
        "eval_size": 4,
        "batch_size": 8,
    }
    monkeypatch.setattr(pool, "CHUNK", 8)  # two prompts, as in a batch
    append, calls = pool.Lines.append, []

    def counted(lines, rows):
        calls.append(len(rows))
        append(lines, rows)

    with monkeypatch.context() as patch:
        patch.setattr(pool.Lines, "append", counted)
        tiny(base, tmp_path / "whole", **settings)
    assert calls == [2] * 8  # the answers, two members and gold, in two chunks each
    for n in range(1, 9):
        left, folder = [n], tmp_path / f"killed_{n}"

        def dies(lines, rows, left=left, part=0.2 if n % 2 else 0.8):
            left[0] -= 1
            if left[0]:
                return append(lines, rows)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            with open(lines.path, "a") as f:
                f.write(text[: int(part * len(text))])
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(pool.Lines, "append", dies)
            with pytest.raises(Killed):
                tiny(base, folder, **settings)
        tiny(base, folder, **settings)
        assert contents(folder) == contents(tmp_path / "whole"), n


# ---------------------------------------------------------------------------------- damaged caches


def changed_row(number, **fields):
    """A function: lines -> the same lines, with other fields in one of them."""

    def change(lines):
        row = json.dumps({**json.loads(lines[number]), **fields}).encode()
        return [*lines[:number], row, *lines[number + 1 :]]

    return change


# What can be wrong with a file of 3 prompts' lines: (its new lines, the line that is named).
DAMAGES = {
    "out of order": (lambda lines: [lines[1], lines[0], lines[2]], 1),
    "doubled": (lambda lines: [lines[0], lines[0], lines[1], lines[2]], 2),
    "written twice": (lambda lines: lines + lines, 4),
    "one too many": (lambda lines: [*lines, lines[2]], 4),
    "a prompt too many": (lambda lines: [*lines, lines[2].replace(b": 2,", b": 3,", 1)], 4),
    "a line is missing": (lambda lines: [lines[0], lines[2]], 2),
    "no JSON": (lambda lines: [lines[0], lines[1][:-3], lines[2]], 2),
    "binary": (lambda lines: [lines[0], b"\xff\xfe\x00", lines[2]], 2),
    "nested": (lambda lines: [b"[" * 200_000, *lines[1:]], 1),
    "a number": (lambda lines: [*lines[:2], b"5"], 3),
    "an empty object": (lambda lines: [*lines[:2], b"{}"], 3),
    "an empty line": (lambda lines: [*lines[:2], b"", lines[2]], 3),
    "an old row": (lambda lines: [b"[1.0, 2.0, 3.0, 4.0]", *lines[1:]], 1),
}
OF_SCORES = {
    "too few scores": (changed_row(1, scores=[1.0, 2.0, 3.0]), 2),
    "too many scores": (changed_row(1, scores=[1.0] * 5), 2),
    "texts for scores": (changed_row(1, scores=["1.0"] * 4), 2),
    "no scores": (changed_row(1, scores=None), 2),
}
OF_ANSWERS = {
    "too few answers": (changed_row(0, responses=["a"] * 3), 1),
    "numbers for answers": (changed_row(0, responses=[1, 2, 3, 4]), 1),
    "too few ids": (changed_row(0, response_ids=[[1]] * 3), 1),
    "texts for ids": (changed_row(0, response_ids=[["a"]] * 4), 1),
    "no ids": (changed_row(0, response_ids=None), 1),
    "another prompt's ids": (changed_row(0, prompt_ids=[1, 2]), 1),
    "no prompt": (changed_row(0, prompt=5), 1),
}


@pytest.mark.parametrize("kind", ["scores", "answers"])
def test_damaged_caches(base, tmp_path, kind):
    """Found on reading: one line that names the file, the line and what to do, and that helps."""
    damages = DAMAGES | (OF_SCORES if kind == "scores" else OF_ANSWERS)
    results = tiny(base, tmp_path)
    whole = contents(tmp_path)
    path = sorted(tmp_path.glob(f"cache/{kind}_*.jsonl"))[0]
    lines = path.read_bytes().split(b"\n")[:-1]
    for name, (damage, number) in damages.items():
        path.write_bytes(b"".join(line + b"\n" for line in damage(lines)))
        words = f"{path}:{number}: ", f"; delete {path}, it is made again"
        refuses(lambda: tiny(base, tmp_path), *words)
        path.unlink()
        assert tiny(base, tmp_path) == results and contents(tmp_path) == whole, name


def test_caches_without_indices_are_not_read(base, tmp_path):
    """Files of an older version, named by digests of the same things; these scores are wrong."""
    rows = [{"prompt": "p", "responses": ["the", "a"]}, {"prompt": "q", "responses": ["b", "the"]}]
    write_rows(tmp_path / "pool.jsonl", rows)
    reward = f"{base}/rewards.py:the"
    read_pool(base, tmp_path / "run", tmp_path / "pool.jsonl", reward_model=[reward])
    what = files.digest([files.digest(row["prompt"], row["responses"], None) for row in rows])
    old = files.digest(rewards.fingerprint_reward(reward), what)
    for path in (tmp_path / "run/cache").iterdir():
        path.unlink()
    write_rows(tmp_path / f"run/cache/scores_{old}.jsonl", [[7.0, 7.0], [7.0, 7.0]])
    read_pool(base, tmp_path / "run", tmp_path / "pool.jsonl", reward_model=[reward])
    assert scores(tmp_path / "run") == [{"rewards.py:the": [1, 0]}, {"rewards.py:the": [0, 1]}]


# ------------------------------------------------------------------------------------------------------ answers that are there already


RAGGED = [
    {
        "prompt": "review the hotel :",
        "responses": ["the a", "a b c", "the the", "d", "the a"],
        "gold_scores": [1, 2.5, -3, 0, 4],
    },
    {
        "prompt": "how was it ?",
        "responses": ["x\u2028y the", "", "the \u00e9 a a"],
        "gold_scores": [0.5, -1, 2],
    },
    {
        "prompt": "",
        "responses": ["the", "a a a", "b", "the b", "c c", "a the the"],
        "gold_scores": [3, 1, 4, 1, 5, 9],
    },
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "datasets", "prompt column"])
def test_pools(base, tmp_path, kind):
    """Rows of unequal length, from a file or a data set, {instruction, input, answers} too."""
    rows, name = RAGGED, str(tmp_path / f"pool.{kind}")
    if kind == "jsonl":
        Path(name).write_text(
            "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n",
            encoding="utf-8",
        )
    elif kind == "json":
        Path(name).write_text(json.dumps(rows))
    else:
        if kind == "datasets":
            given = [("review the", "hotel :"), ("how was it ?", ""), ("", "here ?")]
            rows = [
                {**row, "prompt": "\n".join(x for x in parts if x)}
                for row, parts in zip(rows, given)
            ]
            named = [dict(zip(("instruction", "input"), parts), answers=r["responses"], gold_scores=r["gold_scores"])
                     for parts, r in zip(given, rows)]  # fmt: skip
        import datasets  # a second, in every child of this file's processes if it stood at the top

        name = str(tmp_path / "folder")
        datasets.Dataset.from_list(named if kind == "datasets" else rows).save_to_disk(name)
    members = [f"{base}/rewards.py:letters", f"{base}/rewards.py:the"]
    results = read_pool(base, tmp_path / "run", name, reward_model=members, n=[])
    written = read_rows(tmp_path / "run/pool.jsonl")
    assert [{k: row[k] for k in ("prompt", "responses", "gold_scores")} for row in written] == rows
    for row in written:
        assert row["scores"]["rewards.py:the"] == [r.split().count("the") for r in row["responses"]]
    assert_results(
        results, written, [row["gold_scores"] for row in rows], [1, 2]
    )  # 3 answers are the fewest
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["prompts"], summary["answers"]) == (3, 3)


def test_ragged_pools_on_texts_by_a_model(base, tmp_path, monkeypatch):
    """Texts are tokenized with the reward model's own tokenizer, and end with EOS; every score is its own answer's."""
    monkeypatch.setattr(pool, "CHUNK", 4)
    rows = [{"prompt": row["prompt"], "responses": ["the lobby was nice .", "we saw a big bed .", "it is short", "nice bed"][i:]}
            for i, row in enumerate(world.prompts("ood")[:3])]  # fmt: skip
    write_rows(tmp_path / "pool.jsonl", rows)
    results = read_pool(
        base, tmp_path / "run", tmp_path / "pool.jsonl", reward_model=[f"{base}/rm/seed_{{seed}}"]
    )
    tokenizer = AutoTokenizer.from_pretrained(base / "rm/seed_0")
    written = read_rows(tmp_path / "run/pool.jsonl")
    for row in written:
        ids = [
            tokenizer(response).input_ids + [tokenizer.eos_token_id]
            for response in row["responses"]
        ]
        for seed in range(2):
            expected = plain_scores(
                base / f"rm/seed_{seed}", tokenizer(row["prompt"]).input_ids, ids
            )
            assert row["scores"][f"seed_{seed}"] == pytest.approx(expected, abs=1e-4)
    assert_results(results, written, None, [1, 2])


def test_a_pool_without_gold(base, tmp_path, pictures):
    rows = [
        {"prompt": row["prompt"], "responses": row["responses"], "gold_scores": None}
        for row in RAGGED
    ]
    write_rows(
        tmp_path / "pool.jsonl",
        [{k: row[k] for k in ("prompt", "responses")} for row in rows[:2]] + rows[2:],
    )
    results = read_pool(base, tmp_path / "run", tmp_path / "pool.jsonl", n=[2], save_best=True)
    written = read_rows(tmp_path / "run/pool.jsonl")
    assert all(list(row) == ["prompt", "responses", "scores"] for row in written)
    assert_results(results, written, None, [2])
    assert all(
        row["gold"] is row["split"] is None for row in read_rows(tmp_path / "run/best_of_2.jsonl")
    )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert not (tmp_path / "run/bon.png").exists()
    else:
        assert (tmp_path / "run/bon.png").stat().st_size > 10_000
    refuses(
        lambda: read_pool(base, tmp_path / "run", tmp_path / "pool.jsonl", save_pairs=True),
        "--save_pairs needs gold",
        "--gold_model",
    )


def test_a_gold_model_comes_before_the_gold_of_the_pool(base, tmp_path):
    write_rows(tmp_path / "pool.jsonl", RAGGED)
    results = read_pool(
        base, tmp_path / "run", tmp_path / "pool.jsonl", gold_model=f"{base}/rewards.py:the"
    )
    golds = [[float(r.split().count("the")) for r in row["responses"]] for row in RAGGED]
    written = read_rows(tmp_path / "run/pool.jsonl")
    assert [row["gold_scores"] for row in written] == golds
    assert_results(results, written, golds, [1, 2])


def test_its_own_pool_read_back(base, tmp_path):
    """The same results, by rewards that read texts; and by a model where answers are whole. The text of one that was cut, or in
    which a special token was sampled, does not tell."""
    members = [f"{base}/rewards.py:letters", f"{base}/rewards.py:the", f"{base}/rm/seed_0"]
    first = sample(base, tmp_path / "first", reward_model=members, n=[1, 8])
    second = read_pool(
        base, tmp_path / "second", tmp_path / "first/pool.jsonl", reward_model=members, n=[1, 8]
    )
    for name in ("rewards.py:letters", "rewards.py:the"):
        assert second[name] == first[name]
    whole, EOS, tokenizer = 0, world.vocabulary().index("<eos>"), world.tokenizer()
    for a, b, (_, answers) in zip(
        scores(tmp_path / "first"),
        scores(tmp_path / "second"),
        tokens(tmp_path / "first"),
        strict=True,
    ):
        for x, y, answer in zip(a["seed_0"], b["seed_0"], answers):
            if answer[-1] == EOS and not set(answer[:-1]) & set(tokenizer.all_special_ids):
                assert x == pytest.approx(y, abs=1e-4)
                whole += 1
    assert whole > 15


GOOD = {"prompt": "p", "responses": ["a", "b"], "gold_scores": [1, 2]}


@pytest.mark.parametrize("row, words", [
    ('{"prompt": "p", "responses": ["a"', ["not JSON"]),
    (["p", ["a", "b"]], ["a row must be an object with prompt and responses"]),
    ({"responses": ["a"]}, ["'prompt'"]),
    ({"prompt": 3, "responses": ["a"]}, ["'prompt' must be a string"]),
    ({"prompt": "p"}, ["'responses' must be a list of at least one string"]),
    ({"prompt": "p", "responses": []}, ["'responses' must be a list of at least one string"]),
    ({"prompt": "p", "responses": "ab"}, ["'responses' must be a list of at least one string"]),
    ({"prompt": "p", "responses": ["a", None]}, ["'responses' must be a list of at least one string"]),
    ({"instruction": "p", "input": ["q"], "answers": ["a"]}, ["instruction and input must be strings"]),
    ({"instruction": "p", "input": "q"}, ["'responses'"]),
    ({**GOOD, "gold_scores": [1]}, ["1 gold_scores for 2 responses"]),
    ({**GOOD, "gold_scores": [1, math.nan]}, ["NaN is no finite number"]),
    ({**GOOD, "gold_scores": [1, -math.inf]}, ["finite"]),
    ({**GOOD, "gold_scores": [1, 10**400]}, ["finite"]),
    ({**GOOD, "gold_scores": [1, True]}, ["finite"]),
    ({**GOOD, "gold_scores": [1, "2"]}, ["finite"]),
    ({**GOOD, "gold_scores": [1, None]}, ["finite"]),
    ({**GOOD, "gold_scores": 2}, ["finite"]),
    ({"prompt": "p", "responses": ["a", "b"]}, ["some rows have gold_scores, and some have not"]),
])  # fmt: skip
def test_bad_pools(tmp_path, row, words):
    path = tmp_path / "pool.jsonl"
    path.write_text(
        "\n".join(
            [
                json.dumps(GOOD),
                "",
                row if isinstance(row, str) else json.dumps(row),
                json.dumps(GOOD),
            ]
        )
    )
    refuses(lambda: pool.read(str(path)), f"{path}:3", *words)


def test_bad_pool_files(base, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    refuses(lambda: pool.read(f"{tmp_path}/empty.jsonl"), "empty.jsonl: the file is empty")
    (tmp_path / "none.json").write_text("[]")
    refuses(lambda: pool.read(f"{tmp_path}/none.json"), "none.json: no rows")
    refuses(lambda: pool.read(f"{tmp_path}/lost.jsonl"), "lost.jsonl: no such file")
    write_rows(tmp_path / "pool.jsonl", RAGGED)
    refuses(
        lambda: read_pool(base, tmp_path / "run", tmp_path / "pool.jsonl", n=[2, 5]),
        "--n 5",
        "how was it ?",
        "only 3 answers",
    )
    results = read_pool(
        base, tmp_path / "run", tmp_path / "pool.jsonl", n=[3]
    )  # an error is no obstacle to a better call
    assert [point["n"] for point in results["rewards.py:letters"]] == [3]


# ------------------------------------------------------------------------------------------------------------- answers as training data


@pytest.mark.parametrize("split, objective", [("test", "mean"), ("train", "wco"), ("ood", "uwo")])
def test_save_best(base, tmp_path, split, objective):
    """The best of answers 0 to 2, and of 3 to 5; 6 and 7 are left out."""
    members = [f"{base}/rewards.py:letters", f"{base}/rewards.py:the", f"{base}/rm/seed_0"]
    changes = {"split": split, "eval_size": 8, "max_rows": 0 if split == "test" else 8, "n": [3]}
    changes |= {"objective": objective, "uwo_lambda": [0.3, 9.0]}
    sample(base, tmp_path / "run", reward_model=members, save_best=True, **changes)
    rows = read_rows(tmp_path / "run/pool.jsonl")
    prompts = {row["prompt"] for row in rows}
    assert len(prompts) == 8 and prompts < {row["prompt"] for row in world.prompts(split)}
    best = {name: [max(group, key=lambda j: proxy[j]) for proxy in proxies for group in ((0, 1, 2), (3, 4, 5))]
            for name, proxies in proxies_of(rows, [0.3, 9.0]).items()}  # fmt: skip
    mine, expected = best.pop("uwo_0.3" if objective == "uwo" else objective), []
    assert mine not in best.values()  # no other objective takes the same
    for i, j in enumerate(mine):
        row = rows[i // 2]
        own = {name: values[j] for name, values in row["scores"].items()}
        expected.append({"prompt": row["prompt"], "response": row["responses"][j], "scores": own, "gold": row["gold_scores"][j],
                         "split": split, "sample": j})  # fmt: skip
    assert read_rows(tmp_path / "run/best_of_3.jsonl") == expected
    assert (
        len(data.read_rows(f"{tmp_path}/run/best_of_3.jsonl", "sft")) == 16
    )  # what train_sft.py reads


def test_save_pairs(base, tmp_path, capsys):
    rows = [
        {"prompt": f"p{i}", "responses": row["responses"], "gold_scores": row["gold_scores"]}
        for i, row in enumerate(RAGGED)
    ]
    rows[0]["gold_scores"] = [1, 1, -3, 0, 4]
    write_rows(tmp_path / "pool.jsonl", rows)
    read_pool(base, tmp_path / "run", tmp_path / "pool.jsonl", save_pairs=True)
    pairs = [
        ("p0", "d", "the the"),
        ("p1", "x\u2028y the", ""),
        ("p2", "the", "a a a"),
        ("p2", "b", "the b"),
        ("p2", "a the the", "c c"),
    ]
    pairs = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in pairs]
    assert (
        data.read_rows(f"{tmp_path}/run/pairs.jsonl", "pairs")
        == pairs
        == read_rows(tmp_path / "run/pairs.jsonl")
    )
    assert "5 pairs, 1 ties in gold left out" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- defaults and bad flags


def test_defaults(monkeypatch, tmp_path):
    config = sample_bon.Config()
    expected = {"output_dir": "runs/bon", "model": "runs/sft", "pool": "", "reward_model": ["runs/rm/seed_0"], "gold_model": "world:gold",
                "dataset": "world", "split": "test", "n_answers": 256, "n": [], "objective": "mean", "uwo_lambda": [0.5],
                "temperature": 1.0, "max_new_tokens": 48, "seed": 0, "save_best": False, "save_pairs": False}  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert [n for n in DEFAULT_NS if n <= 256] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert (
        sample_bon.Config(pool="mine.jsonl").gold_model
        == sample_bon.Config(dataset="mine.jsonl").gold_model
        == ""
    )
    assert sample_bon.Config(gold_model="mine.py:f").gold_model == "mine.py:f"

    monkeypatch.chdir(tmp_path)  # what is missing is trained first, by the scripts' own defaults
    trained = []
    monkeypatch.setattr(
        train_sft, "main", lambda config: trained.append((config.output_dir, config.dataset))
    )
    monkeypatch.setattr(
        train_rm, "main", lambda config: trained.append((config.output_dir, config.dataset))
    )
    monkeypatch.setattr(sample_bon, "load_tokenizer", lambda path: 1 / 0)  # far enough
    for changes in ({}, {"dataset": "world:2"}):
        with pytest.raises(ZeroDivisionError):
            sample_bon.main(sample_bon.Config(**changes))
    assert trained == [
        ("runs/sft", "world"),
        ("runs/rm/seed_0", "world"),
        ("runs/sft", "world"),
        ("runs/rm/seed_0", "world:2"),
    ]
    assert list(tmp_path.iterdir()) == []


def test_prompts(tmp_path):
    """Which rows a split is."""

    def prompts(**changes):
        return [row["prompt"] for row in sample_bon.prompts_of(sample_bon.Config(**changes))[0]]

    every = {
        split: [row["prompt"] for row in world.prompts(split)] for split in ("train", "test", "ood")
    }
    assert (
        sorted(prompts()) == sorted(every["test"])
        and prompts(split="train") == every["train"]
        and prompts(split="ood") == every["ood"]
    )
    assert prompts(split="all", dataset="world:4") == every["train"] + every["test"] + every["ood"]
    for changes in (
        {"eval_size": 30},
        {"split": "ood", "max_rows": 30},
        {"split": "train", "max_rows": 30},
    ):  # not the first topics alone
        few = prompts(**changes)
        assert len(set(few)) == len(few) == 30 and set(few) < set(
            every[changes.get("split", "test")]
        )
        assert len(set(map(world.topic_of, few))) > 3
    write_rows(tmp_path / "mine.jsonl", [{"question": f"q{i // 2}"} for i in range(40)])
    write_rows(tmp_path / "held_out.jsonl", [{"prompt": "x"}, {"prompt": "y"}])
    assert sorted(prompts(eval_dataset=f"{tmp_path}/held_out.jsonl")) == ["x", "y"]
    mine = {"dataset": f"{tmp_path}/mine.jsonl", "columns": ["prompt=question"]}
    test, train = prompts(**mine, eval_size=4), prompts(**mine, eval_size=4, split="train")
    assert (
        len(test) == 4
        and not set(test) & set(train)
        and len(train) == 40 - 2 * len({*prompts(**mine)})
    )
    assert (
        prompts(**mine, split="all") == [f"q{i // 2}" for i in range(40)]
        and len(prompts(**mine, split="train", max_rows=5)) == 5
    )


@pytest.mark.parametrize("args, words", [
    (["--n", "1", "512"], ["--n must not be above --n_answers (256)"]),
    (["--n", "0"], ["--n must be at least 1"]),
    (["--n_answers", "0"], ["--n_answers must be at least 1"]),
    (["--save_best"], ["--save_best takes one --n"]),
    (["--save_best", "--n", "2", "4"], ["--save_best takes one --n"]),
    (["--uwo_lambda", "0.5", "-1"], ["--uwo_lambda takes numbers of at least 0"]),
    (["--uwo_lambda", "nan"], ["--uwo_lambda"]),
    (["--uwo_lambda", "inf"], ["--uwo_lambda"]),
    (["--split", "validation"], ["--split must be one of test, train, ood, all", "'validation'"]),
    (["--split", "ood", "--dataset", "mine.jsonl"], ["--split ood is the embedded world's"]),
    (["--reward_model", "runs/rm/wco", "runs/rm/seed_0"], ["a reward cannot be called wco"]),
    (["--reward_model", "runs/rm/uwo_0.5", "runs/rm/seed_0"], ["a reward cannot be called uwo_0.5"]),
    (["--objective", "median"], ["--objective must be one of mean, wco, uwo"]),
    (["--temperature", "0"], ["--temperature must be positive"]),
    (["--dtype", "float16"], ["--dtype"]),
    (["--max_new_tokens", "0"], ["--max_new_tokens must be at least 1"]),
    (["--nonsense"], ["--nonsense"]),
    (["--reward_model", "a.py:f", "a.py:f"], ["a.py:f twice"]),
    (["--reward_model", "runs/none/seed_{seed}"], ["runs/none/seed_{seed}", "no such folder for any seed"]),
    (["--reward_model", "lost.py:f"], ["lost.py", "no such file"]),
    (["--gold_model", "./lost"], ["./lost", "no such model folder"]),
    (["--model", "./lost"], ["./lost", "no such model folder"]),
    (["--pool", "lost.jsonl", "--reward_model", "good.py:the"], ["lost.jsonl", "no such file"]),
    (["--pool", "bad.jsonl", "--reward_model", "good.py:the"], ["bad.jsonl:2", "'responses'"]),
    (["--device", "tpu"], ["--device must be one of auto, cpu, cuda"]),
])  # fmt: skip
def test_bad_flags(tmp_path, monkeypatch, capsys, args, words):
    """Exit code 2, one line that says what is wrong, and nothing on disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample_bon, "train_what_is_missing", lambda *args: pytest.fail("too late"))
    (tmp_path / "good.py").write_text(REWARDS)
    (tmp_path / "bad.jsonl").write_text(json.dumps(GOOD) + '\n{"prompt": "p"}\n')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as exit_:
        cli.run(sample_bon.Config, sample_bon.main, args)
    error = capsys.readouterr().err
    assert (
        exit_.value.code == 2
        and len(error.splitlines()) == 1
        and "error: " in error
        and all(word in error for word in words)
    ), error
    assert sorted(p for p in tmp_path.iterdir() if p.name != "__pycache__") == before


# ------------------------------------------------------------------------------------------------------------- what a name stands for


def test_fingerprint(base, tmp_path):
    folder = tmp_path / "a/model"
    shutil.copytree(base / "rm/seed_0", folder)
    print_ = models.fingerprint(str(folder))
    shutil.copytree(folder, tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere/config.json", (0, 0))
    same = (
        base / "rm/seed_0",
        tmp_path / "a",
        tmp_path / "elsewhere",
        f"{tmp_path}/a/../a/model/",
    )  # a run folder stands for its model/
    assert {models.fingerprint(str(path)) for path in same} == {print_}
    seen, names = {print_}, sorted(p.name for p in folder.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # a single bit
        seen.add(models.fingerprint(str(folder)))
        (folder / name).unlink()
        seen.add(models.fingerprint(str(folder)))
        (folder / name).write_bytes(content)
    (folder / "more.txt").write_text("")
    seen.add(models.fingerprint(str(folder)))
    assert len(seen) == 2 + 2 * len(names)

    (tmp_path / "f.py").write_text(REWARDS)
    (tmp_path / "f.tsv").write_text("the\t1\n")
    functions = [
        f"{tmp_path}/f.py:the",
        f"{tmp_path}/f.py:letters",
        f"{tmp_path}/f.tsv",
        "world:gold",
    ]
    before = [rewards.fingerprint_reward(spec) for spec in functions]
    assert len(set(before)) == 4 and all(len(x) == 20 for x in before)
    for path in ("f.py", "f.tsv"):
        (tmp_path / path).write_text((tmp_path / path).read_text() + "#")
    after = [rewards.fingerprint_reward(spec) for spec in functions]
    assert [a == b for a, b in zip(before, after)] == [False, False, False, True]
    assert before[3] == files.digest(
        "world:gold", hashlib.sha256(Path(world.__file__).read_bytes()).hexdigest()
    )


def test_matrix():
    values, mask = pool.matrix([[1, 2.5], [3], [4, 5, 6]])
    assert values.tolist() == [[1, 2.5, 0], [3, 0, 0], [4, 5, 6]] and values.dtype == torch.float64
    assert mask.tolist() == [[True, True, False], [True, False, False], [True] * 3]


def test_several_splits(base, tmp_path):
    """Each is a run in a folder of its own, as if it had been called alone; what is not there is an error before anything is written."""
    settings = {
        "dataset": f"{tmp_path}/mine.jsonl",
        "in_distribution": "topic=hotel,park",
        "eval_size": 2,
    }
    write_rows(
        tmp_path / "mine.jsonl",
        [{**row, "topic": world.topic_of(row["prompt"])} for row in world.prompts("train")[::5]],
    )
    refuses(
        lambda: tiny(base, tmp_path / "run", eval_splits=["test", "x=missing.jsonl"], **settings),
        "missing.jsonl: no such file",
    )
    assert not (tmp_path / "run").exists()
    results = tiny(base, tmp_path / "run", eval_splits=["test", "ood"], **settings)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["ood", "test"]
    for split in ("test", "ood"):
        assert tiny(base, tmp_path / f"{split}_alone", split=split, **settings) == results[split]
        assert contents(tmp_path / "run" / split) == contents(tmp_path / f"{split}_alone")
        topics = {
            world.topic_of(row["prompt"])
            for row in read_rows(tmp_path / "run" / split / "pool.jsonl")
        }
        assert topics <= {"hotel", "park"} if split == "test" else not topics & {"hotel", "park"}

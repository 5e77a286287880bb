"""sample_bon.py and nanorlhf/pool.py.

The estimates are checked against all subsets of the pool that was written. Nothing is done twice,
nothing stale is read, and answers and scores are the same on any number of processes, with any
batch size, and after any kill.

    P prompts, N answers to a prompt, T tokens
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ENV, REPO, encode_field, flags, join, ranks, read_rows, summary, write_rows
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


def count_the(response):
    """What rewards.py:the gives."""
    return response.split().count("the")


def score_letters(response):
    """What rewards.py:letters gives."""
    return (7 * len(response) + 3 * response.count("a")) % 23 / 4 - 2


# ----------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with rewards.py, sft.jsonl, the models sft/, rm/seed_0 and rm/seed_1, and run/.

    The reward models have the blocks of sft/ and heads of their own. run/ is a plain run.
    """
    root = tmp_path_factory.mktemp("bon")
    (root / "rewards.py").write_text(REWARDS)
    rows = world.demonstrations(240)
    write_rows(root / "sft.jsonl", rows)
    config = train_sft.Config(
        output_dir=f"{root}/sft",
        dataset=f"{root}/sft.jsonl",
        steps=20,
        batch_size=16,
        eval_size=8,
        warmup=2,
        max_new_tokens=12,
        n_samples=1,
    )
    train_sft.main(config)

    tokenizer = load_tokenizer(f"{root}/sft")
    prompts, responses = encode_field(tokenizer, rows[:64], "response")
    for seed in range(2):
        model = load_reward_model(f"{root}/sft", seed=seed)
        with torch.no_grad():
            scores = model(pack(prompts, responses))
        # Means that differ, so that a mean of the wrong model would be seen.
        mean = scores.mean().item() + 0.1 * seed
        model.standardise(mean, scores.std().item())
        save_reward_model(model, tokenizer, root / f"rm/seed_{seed}")

    sample(root, root / "run")
    return root


def settings_of(base, **changes):
    """The plain run: 6 prompts, 8 answers each, three members, one of them with many ties."""
    members = [f"{base}/rm/seed_{{seed}}", f"{base}/rewards.py:the"]
    settings = {
        "model": f"{base}/sft",
        "reward_model": members,
        "n_answers": 8,
        "eval_size": 6,
        "max_new_tokens": 12,
    }
    return {**settings, **changes}


def sample(base, folder, **changes):
    """The plain run with changes, here. -> its results"""
    settings = settings_of(base, **changes)
    return sample_bon.main(sample_bon.Config(output_dir=str(folder), **settings))


def tiny(base, folder, **changes):
    """A run of less than half a second: one reward, 3 prompts of 4 answers, no fit."""
    small = {
        "reward_model": [f"{base}/rewards.py:letters"],
        "n_answers": 4,
        "eval_size": 3,
        "n": [1, 2],
    }
    return sample(base, folder, **{**small, **changes})


def read_pool(base, folder, file, **changes):
    """A run on answers that are there already."""
    return tiny(base, folder, pool=str(file), n_answers=256, eval_size=256, **changes)


@pytest.fixture
def run(base, tmp_path):
    """A copy of the plain run that a test may go on with."""
    return Path(shutil.copytree(base / "run", tmp_path / "run"))


@pytest.fixture
def work(monkeypatch):
    """What a call really does: {"sampled": answers, name of a reward: answers that it scored}.

    A reward that is loaded and scores nothing stands there with 0.
    """
    done = {}
    load_reward = pool.load_reward
    roll_out = pool.roll_out

    def load_and_count(spec, *rest):
        reward = load_reward(spec, *rest)
        name = os.path.basename(spec)
        done[name] = 0

        def score_and_count(answers):
            done[name] += len(answers)
            return reward(answers)

        return score_and_count

    def roll_out_and_count(parts, prompts, *rest):
        done["sampled"] = done.get("sampled", 0) + len(prompts)
        return roll_out(parts, prompts, *rest)

    monkeypatch.setattr(pool, "load_reward", load_and_count)
    monkeypatch.setattr(pool, "roll_out", roll_out_and_count)
    return done


# -------------------------------------------------------------------------- what the runs have left


def read_json(path):
    return json.loads(Path(path).read_text())


def answers_file(folder):
    """The file of the cache that holds the answers."""
    (path,) = Path(folder).glob("cache/answers_*.jsonl")
    return path


def tokens(folder):
    """The sampled ids that a run keeps: (a prompt's ids, its answers' ids) for each prompt."""
    rows = read_rows(answers_file(folder))
    return [(row["prompt_ids"], row["response_ids"]) for row in rows]


def scored_rows(folder):
    return read_rows(Path(folder) / "pool.jsonl")


def column(rows, name):
    """One field of all rows."""
    return [row[name] for row in rows]


def scores(folder):
    return column(scored_rows(folder), "scores")


def golds_of(rows):
    return column(rows, "gold_scores")


def without_scores(rows):
    """Rows of pool.jsonl as a pool gives them, before rewards have scored them."""
    given = []
    for row in rows:
        given.append({name: row[name] for name in ("prompt", "responses", "gold_scores")})
    return given


def world_prompts(split):
    return column(world.prompts(split), "prompt")


def topics_of(prompts):
    return {world.topic_of(prompt) for prompt in prompts}


def contents(folder):
    """Every file's bytes, but for config.json, which names its folder, pictures and the page."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.name in ("config.json", "page.html"):
            continue
        if path.is_file() and path.suffix != ".png":
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def check_close_scores(folder, other_folder):
    """Two runs have the same scores up to rounding."""
    for row, other in zip(scores(folder), scores(other_folder), strict=True):
        assert row.keys() == other.keys()
        for name in row:
            assert row[name] == pytest.approx(other[name], abs=1e-4)


def check_files_are_as_before(folder, before):
    """Every file that was there before has its bytes of then; others may have come."""
    now = contents(folder)
    for name in before:
        assert now[name] == before[name], name


@contextlib.contextmanager
def refuses(*words):
    """The block raises an InputError of one line that holds all the words."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def edit_tensor(folder, name, change):
    """Change a tensor of a model folder in place."""
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, {"format": "pt"})


# ------------------------------------------------------------------------------ the results by hand


def mean_of(numbers):
    return sum(numbers) / len(numbers)


def variance_of(numbers):
    """The mean square distance from the mean."""
    mean = mean_of(numbers)
    return mean_of([(number - mean) ** 2 for number in numbers])


def standard_error(numbers):
    """The standard error of their mean, 0 for a single one."""
    P = len(numbers)
    if P == 1:
        return 0.0
    return math.sqrt(variance_of(numbers) / (P - 1))


def combine_by_hand(row, objective, weight=0.0):
    """One score for each answer of a row of pool.jsonl, of all members' scores of it.

    Coste et al. 2023 (2310.02743): mean; wco, the worst; uwo, the mean - weight * the variance.
    """
    combined = []
    for answer_scores in zip(*row["scores"].values(), strict=True):
        if objective == "mean":
            combined.append(mean_of(answer_scores))
        elif objective == "wco":
            combined.append(min(answer_scores))
        else:
            combined.append(mean_of(answer_scores) - weight * variance_of(answer_scores))
    return combined


def proxies_of(rows, lambdas):
    """{name: P lists of N} of each member and, by hand, of each ensemble."""
    proxies = {}
    for name in rows[0]["scores"]:
        proxies[name] = [row["scores"][name] for row in rows]
    if len(proxies) == 1:
        return proxies
    for objective in ("mean", "wco"):
        proxies[objective] = [combine_by_hand(row, objective) for row in rows]
    for weight in lambdas:
        proxies[f"uwo_{weight:g}"] = [combine_by_hand(row, "uwo", weight) for row in rows]
    return proxies


def best_of_all_subsets(proxy, values, n):
    """The value of the best answer by the proxy, averaged over all subsets of n answers.

    Where several are best, it is the mean of their values.
    """
    total = 0.0
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[j] for j in subset)
        best = [values[j] for j in subset if proxy[j] == top]
        total += mean_of(best)
    return total / math.comb(len(proxy), n)


def kl_by_hand(n):
    """The KL of the best of n from the policy: log n - (n - 1) / n."""
    return math.log(n) - (n - 1) / n


def check_estimate(point, what, proxies, values, n):
    """A point's estimate, error and interval. -> each prompt's mean over all subsets, P numbers

    proxies, values: P lists of N
    """
    means = []
    for proxy, own_values in zip(proxies, values, strict=True):
        means.append(best_of_all_subsets(proxy, own_values, n))
    error = standard_error(means)
    # The bootstrap: means of P prompts drawn with replacement, by draws of this test's own.
    draws = np.random.default_rng(n).choice(means, (4000, len(means))).mean(1)
    ends = np.quantile(draws, [0.025, 0.975])

    assert point[f"{what}_score"] == pytest.approx(mean_of(means), abs=1e-9)
    assert point[f"{what}_se"] == pytest.approx(error, abs=1e-9)
    assert point[f"{what}_interval"] == pytest.approx(ends, abs=0.5 * error + 1e-9)
    return means


def check_no_gold(point):
    assert point["gold_score"] is None
    assert point["gold_se"] is None
    assert point["gold_interval"] is None


POINT_FIELDS = "n kl proxy_score proxy_se proxy_interval gold_score gold_se gold_interval".split()


def check_results(results, rows, golds, ns, lambdas=(0.5,)):
    """bon_results.json, derived again from the scores in the rows of pool.jsonl.

    golds: P lists of N, or None where gold is not known. -> each proxy's gold curve of each
    prompt, {name: L lists of P}
    """
    proxies = proxies_of(rows, lambdas)
    assert list(results) == list(proxies)
    gold_curves = {}
    for name, points in results.items():
        gold_curves[name] = []
        for n, point in zip(ns, points, strict=True):
            assert list(point) == POINT_FIELDS
            assert point["n"] == n
            assert point["kl"] == pytest.approx(kl_by_hand(n), abs=1e-12)
            check_estimate(point, "proxy", proxies[name], proxies[name], n)
            if golds is None:
                check_no_gold(point)
            else:
                means = check_estimate(point, "gold", proxies[name], golds, n)
                gold_curves[name].append(means)
    return gold_curves


@torch.no_grad()
def plain_scores(folder, prompt, responses):
    """A reward model's scores of one prompt's answers, token lists, by plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    padding = model.config.pad_token_id
    width = len(prompt) + max(len(response) for response in responses)
    ids = []  # [N, T]
    mask = []  # [N, T]
    for response in responses:
        row = prompt + response
        n_missing = width - len(row)
        # Plain transformers read the score at the last token that is not padding.
        assert row[-1] != padding
        ids.append(row + [padding] * n_missing)
        mask.append([1] * len(row) + [0] * n_missing)
    output = model(torch.tensor(ids), attention_mask=torch.tensor(mask))
    return (output.logits[:, 0] - model.config.reward_mean).tolist()


# ------------------------------------------------------------------------------------------ results


@pytest.fixture(scope="module")
def two_weights(base):
    """The plain run with two weights of uwo: its folder, the results and the rows of pool.jsonl."""
    folder = base / "two_weights"
    results = sample(base, folder, uwo_lambda=[0.5, 2.0])
    return SimpleNamespace(folder=folder, results=results, rows=scored_rows(folder))


def test_results_equal_all_subsets(two_weights):
    rows = two_weights.rows
    check_results(two_weights.results, rows, golds_of(rows), [1, 2, 4, 8], lambdas=(0.5, 2.0))


def test_results_are_written_as_they_are_returned(two_weights):
    assert two_weights.results == read_json(two_weights.folder / "bon_results.json")


def test_there_is_a_curve_of_each_member_and_each_objective(two_weights):
    members = ["seed_0", "seed_1", "rewards.py:the"]
    assert list(two_weights.rows[0]["scores"]) == members
    assert list(two_weights.results) == [*members, "mean", "wco", "uwo_0.5", "uwo_2"]


def test_each_proxy_chooses_otherwise(two_weights):
    """Else the curves could be mixed up, or the order of answers, and no test would see it."""
    gold_of_the_best = set()
    for points in two_weights.results.values():
        gold_of_the_best.add(points[-1]["gold_score"])
    assert len(gold_of_the_best) == 7


def test_the_prompts_are_held_out_and_of_several_topics(two_weights):
    prompts = set(column(two_weights.rows, "prompt"))
    assert len(prompts) == 6
    assert prompts < set(world_prompts("test"))
    assert len(topics_of(prompts)) > 2


def test_gold_scores_are_those_of_their_own_answers(two_weights):
    for row in two_weights.rows:
        assert list(row) == ["prompt", "responses", "scores", "gold_scores"]
        gold = world.gold([row["prompt"]] * 8, row["responses"])
        assert row["gold_scores"] == pytest.approx(gold, abs=1e-6)
        # The answers can be told apart.
        assert len(set(gold)) > 3


def test_members_score_their_own_answers(base, two_weights):
    answers = tokens(two_weights.folder)
    for row, (prompt_ids, response_ids) in zip(two_weights.rows, answers, strict=True):
        for seed in range(2):
            expected = plain_scores(base / f"rm/seed_{seed}", prompt_ids, response_ids)
            assert row["scores"][f"seed_{seed}"] == pytest.approx(expected, abs=1e-4)
        counts = [count_the(response) for response in row["responses"]]
        assert row["scores"]["rewards.py:the"] == counts


def test_the_summary_has_the_fit_to_each_gold_curve(two_weights):
    ns = [1, 2, 4, 8]
    rows = two_weights.rows
    curves = check_results(two_weights.results, rows, golds_of(rows), ns, lambdas=(0.5, 2.0))
    kl = torch.tensor([kl_by_hand(n) for n in ns])

    written = summary(two_weights.folder)
    assert written["prompts"] == 6
    assert written["answers"] == 8
    assert list(written["fits"]) == list(two_weights.results)
    for name, fit in written["fits"].items():
        assert list(fit) == ["a", "b", "a_interval", "b_interval"]
        curve = torch.tensor(curves[name]).T  # [P, L]
        expected = fit_bon(kl, curve)._asdict()
        for key in fit:
            assert fit[key] == pytest.approx(expected[key], abs=1e-5)


def test_one_member_is_no_ensemble(base, tmp_path, capsys, pictures):
    # Values of n may come in any order, and twice.
    results = tiny(base, tmp_path / "run", n=[4, 1, 4], n_answers=5)
    printed = capsys.readouterr().out

    assert list(results) == ["rewards.py:letters"]
    points = results["rewards.py:letters"]
    assert column(points, "n") == [1, 4]
    rows = scored_rows(tmp_path / "run")
    check_results(results, rows, golds_of(rows), [1, 4])
    # Two points are too few for a fit.
    assert summary(tmp_path / "run")["fits"] == {}

    assert "3 prompts, 5 answers each" in printed
    best = points[1]
    assert f"n 4: {best['proxy_score']:.2f} +- {best['proxy_se']:.2f}" in printed
    assert f"n 4: {best['gold_score']:.2f} +- {best['gold_se']:.2f}" in printed
    # There is a picture where matplotlib is installed.
    assert (tmp_path / "run/bon.png").exists() == ("bon.png" in printed)


def test_a_single_prompt_has_no_errors_and_no_fit(base, tmp_path):
    results = tiny(base, tmp_path / "run", eval_size=1, n=[])
    rows = scored_rows(tmp_path / "run")
    check_results(results, rows, golds_of(rows), [1, 2, 4])
    # The interval of a fit would need several prompts to draw from.
    assert summary(tmp_path / "run")["fits"] == {}


@pytest.mark.slow
def test_folders_with_one_name_are_told_apart_by_their_paths(base, tmp_path):
    """A copy of a model has the same scores, and they are kept once."""
    shutil.copytree(base / "rm/seed_0", tmp_path / "a/model")
    shutil.copytree(base / "rm/seed_1", tmp_path / "b/model")
    shutil.copytree(base / "rm/seed_0", tmp_path / "c/model")
    members = [f"{tmp_path}/{name}/model" for name in "abc"]
    gold_model = f"{base}/rewards.py:the"

    # The second call reads what the first one kept.
    for _ in range(2):
        results = tiny(base, tmp_path / "run", reward_model=members, gold_model=gold_model)
        assert list(results)[:3] == members
        rows = scored_rows(tmp_path / "run")
        for row in rows:
            assert row["scores"][members[0]] == row["scores"][members[2]]
        check_results(results, rows, golds_of(rows), [1, 2])


# ------------------------------------------------------------------------------- nothing done twice


def test_another_n_or_uwo_lambda_scores_nothing_again(base, run, work, monkeypatch):
    results = read_json(run / "bon_results.json")
    monkeypatch.setattr(pool, "load_policy", None)
    again = sample(base, run, n=[3, 4, 8], uwo_lambda=[0.1, 0.0])

    assert work == {}
    assert list(again) == ["seed_0", "seed_1", "rewards.py:the", "mean", "wco", "uwo_0.1", "uwo_0"]
    # Without a weight uwo is the mean.
    assert again["uwo_0"] == again["mean"]
    assert again["mean"] != again["uwo_0.1"]
    # The points at 4 and 8 are those of the first call, at 1, 2, 4 and 8.
    for name in ("seed_1", "mean", "wco"):
        assert again[name][1:] == results[name][2:]


def test_a_second_call_only_computes(base, run, work, monkeypatch):
    results = read_json(run / "bon_results.json")
    pool_before = (run / "pool.jsonl").read_bytes()
    monkeypatch.setattr(pool, "load_policy", None)
    sample(base, run, n=[3], save_pairs=True)
    sample(base, run, n=[3], save_best=True, objective="wco", batch_size=3, micro_batch_size=5)

    assert sample(base, run) == results
    assert work == {}
    assert (run / "pool.jsonl").read_bytes() == pool_before
    assert (run / "pairs.jsonl").exists()
    assert (run / "best_of_3.jsonl").exists()


def test_a_new_member_is_all_that_is_scored(base, run, work):
    before = scores(run)
    new = f"{base}/rewards.py:letters"
    members = [new, *settings_of(base)["reward_model"]]
    sample(base, run, n=[1], reward_model=members)

    assert work == {"rewards.py:letters": 48}
    assert list(scores(run)[0])[0] == "rewards.py:letters"
    for row, old in zip(scores(run), before, strict=True):
        for name in old:
            assert row[name] == old[name]


def test_a_member_that_goes_is_forgotten(base, run, work):
    before = scores(run)
    results = sample(base, run, n=[1], reward_model=[f"{base}/rm/seed_1"])
    assert work == {}
    assert list(results) == ["seed_1"]
    for row, old in zip(scores(run), before, strict=True):
        assert row == {"seed_1": old["seed_1"]}


def test_scores_are_kept_by_reward_and_not_by_its_part(base, run, work):
    """What scored as a member is not asked again as gold."""
    before = scores(run)
    sample(base, run, n=[1], gold_model=f"{base}/rm/seed_0")
    assert work == {}
    assert golds_of(scored_rows(run)) == column(before, "seed_0")


def test_a_reward_model_that_changes_in_place(base, run, tmp_path, work):
    model = Path(shutil.copytree(base / "rm/seed_1", tmp_path / "model"))
    mean = read_json(model / "config.json")["reward_mean"]
    assert mean != 0
    settings = {"reward_model": [str(model)], "n": [1, 8]}

    # A copy elsewhere is the same model: the scores are there.
    sample(base, run, **settings)
    assert work == {}
    first = contents(run)
    old_scores = column(scores(run), "model")
    old_weights = (model / "model.safetensors").read_bytes()

    # With the head's sign changed, x + mean becomes -(x + mean), and a score -x - 2 mean.
    edit_tensor(model, "score.weight", torch.Tensor.neg_)
    changed = sample(base, run, **settings)
    assert work == {"model": 48}
    for row, old in zip(scores(run), old_scores, strict=True):
        expected = [-score - 2 * mean for score in old]
        assert row["model"] == pytest.approx(expected, abs=1e-4)
    rows = scored_rows(run)
    check_results(changed, rows, golds_of(rows), [1, 8])

    # With its old weights it has its old scores, and they are still there.
    work.clear()
    (model / "model.safetensors").write_bytes(old_weights)
    sample(base, run, **settings)
    assert work == {}
    check_files_are_as_before(run, first)


def test_a_policy_that_changes_in_place(base, tmp_path, work):
    folder = tmp_path / "run"
    model = Path(shutil.copytree(base / "sft/model", tmp_path / "sft"))
    tiny(base, folder, model=str(model))
    first = contents(folder)
    first_rows = scored_rows(folder)
    _, first_answers = tokens(folder)[0]
    old_weights = (model / "model.safetensors").read_bytes()
    texts = load_tokenizer(str(model)).batch_decode(first_answers, skip_special_tokens=True)
    assert first_rows[0]["responses"] == texts

    # Another policy gives other answers, and all are scored.
    edit_tensor(model, "embed_out.weight", lambda tensor: tensor.mul_(3))
    work.clear()
    tiny(base, folder, model=str(model))
    assert work == {"sampled": 12, "rewards.py:letters": 12, "world:gold": 12}
    assert scored_rows(folder)[0]["responses"] != texts

    # The old one's answers are still there.
    work.clear()
    (model / "model.safetensors").write_bytes(old_weights)
    tiny(base, folder, model=str(model))
    assert work == {}
    check_files_are_as_before(folder, first)


def test_a_function_that_is_edited(base, tmp_path, work):
    folder = tmp_path / "run"
    file = tmp_path / "mine.py"
    settings = {"reward_model": [f"{file}:the"], "gold_model": f"{file}:letters"}
    file.write_text(REWARDS)
    tiny(base, folder, **settings)
    before = scored_rows(folder)

    # All functions of the file score again: each might have called what was edited.
    file.write_text(REWARDS.replace('.count("the")', '.count("the") + 1'))
    work.clear()
    tiny(base, folder, **settings)
    assert work == {"mine.py:the": 12, "mine.py:letters": 12}
    for row, old in zip(scored_rows(folder), before, strict=True):
        one_more = [score + 1 for score in old["scores"]["mine.py:the"]]
        assert row["scores"]["mine.py:the"] == one_more
        assert row["responses"] == old["responses"]
        assert row["gold_scores"] == old["gold_scores"]

    # The scores of the old text are still there.
    file.write_text(REWARDS)
    work.clear()
    tiny(base, folder, **settings)
    assert work == {}
    assert scored_rows(folder) == before


def test_a_pool_that_is_edited(base, tmp_path, work):
    file = tmp_path / "pool.jsonl"
    first = {"prompt": "a :", "responses": ["the cat", "dog", "the the"]}
    first["gold_scores"] = [3, 1.5, -1]
    second = {"prompt": "b :", "responses": ["x", "the y", "z a a"]}
    second["gold_scores"] = [0, 1, 2]
    rows = [first, second]
    write_rows(file, rows)
    read_pool(base, tmp_path / "run", file)

    # Where gold alone has changed nothing is scored; where an answer has, all are.
    for answer, expected_work in (("the y", {}), ("aaa", {"rewards.py:letters": 6})):
        first["gold_scores"][1] += 0.25
        second["responses"][1] = answer
        write_rows(file, rows)
        work.clear()
        results = read_pool(base, tmp_path / "run", file)

        assert work == expected_work
        written = scored_rows(tmp_path / "run")
        assert without_scores(written) == rows
        letters = [score_letters(response) for response in second["responses"]]
        assert written[1]["scores"] == {"rewards.py:letters": letters}
        check_results(results, written, golds_of(written), [1, 2])


def test_a_pool_whose_columns_are_edited(base, tmp_path, work):
    """A reward may read the columns of the data, so the answers are scored anew."""
    row = {"prompt": "a :", "responses": ["the cat", "dog"]}
    for topic in ("hotel", "park"):
        write_rows(tmp_path / "pool.jsonl", [{**row, "topic": topic}])
        work.clear()
        read_pool(base, tmp_path / "run", tmp_path / "pool.jsonl")
        assert work == {"rewards.py:letters": 2}


CHANGES_OF_THE_ANSWERS = [
    ("n_answers", 16),
    ("seed", 1),
    ("temperature", 0.7),
    ("max_new_tokens", 13),
    ("split", "train"),
    ("dataset", "world:1"),
    ("eval_size", 7),
    ("dtype", "bfloat16"),
    ("pool", "mine.jsonl"),
]


@pytest.mark.parametrize("flag, value", CHANGES_OF_THE_ANSWERS)
def test_another_run_needs_another_folder(base, work, flag, value):
    before = contents(base / "run")
    with refuses("already holds another run", flag, "choose another --output_dir"):
        sample(base, base / "run", **{flag: value})
    assert work == {}
    assert contents(base / "run") == before


# ----------------------------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def whole_batches(base):
    """A run of a reward model on 4 prompts, in one batch."""
    tiny(base, base / "whole_batches", reward_model=[f"{base}/rm/seed_0"], eval_size=4)
    return base / "whole_batches"


# batch_size, micro_batch_size, CHUNK: parts of a prompt's answers, and all answers of several.
BATCH_SIZES = [
    pytest.param(1, 1, 1, marks=pytest.mark.slow),
    (3, 2, 7),
    pytest.param(9, 64, 5, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sampled, scored, chunk", BATCH_SIZES)
def test_batch_sizes_change_nothing(
    base, whole_batches, tmp_path, monkeypatch, sampled, scored, chunk
):
    monkeypatch.setattr(pool, "CHUNK", chunk)
    sizes = {"batch_size": sampled, "micro_batch_size": scored}
    tiny(base, tmp_path, reward_model=[f"{base}/rm/seed_0"], eval_size=4, **sizes)
    assert tokens(tmp_path) == tokens(whole_batches)
    check_close_scores(tmp_path, whole_batches)


def test_the_prompts_of_these_batches_are_padded(whole_batches):
    lengths = {len(prompt_ids) for prompt_ids, _ in tokens(whole_batches)}
    assert len(lengths) > 1


def n_equal(answers, others):
    """How many answers are the same at the same place."""
    return sum(answer == other for answer, other in zip(answers, others))


def test_an_answer_depends_on_its_place_and_the_seed_alone(base, tmp_path):
    # The same prompt stands at two places.
    texts = world.prompts("test")
    write_rows(tmp_path / "mine.jsonl", [texts[5], texts[40], texts[5]])
    settings = {
        "dataset": f"{tmp_path}/mine.jsonl",
        "split": "all",
        "gold_model": f"{base}/rewards.py:the",
    }
    tiny(base, tmp_path / "four", **settings)
    tiny(base, tmp_path / "six", n_answers=6, **settings)
    tiny(base, tmp_path / "seed", seed=1, **settings)
    four = tokens(tmp_path / "four")
    six = tokens(tmp_path / "six")
    other_seed = tokens(tmp_path / "seed")

    # With more answers the first ones are the same.
    assert [(prompt, answers[:4]) for prompt, answers in six] == four
    # With another seed they differ; but short ones may meet.
    for (prompt, answers), (same_prompt, others) in zip(four, other_seed, strict=True):
        assert prompt == same_prompt
        assert len({str(answer) for answer in answers}) == 4
        assert n_equal(answers, others) <= 1
    # The same prompt at another place has other answers.
    first_prompt, first_answers = four[0]
    last_prompt, last_answers = four[2]
    assert first_prompt == last_prompt
    assert n_equal(first_answers, last_answers) <= 1


def test_close_to_temperature_0_answers_are_the_greedy_ones_of_plain_transformers(base, tmp_path):
    tiny(base, tmp_path / "run", temperature=1e-4, n_answers=2, max_new_tokens=6)
    model = AutoModelForCausalLM.from_pretrained(base / "sft/model")
    tokenizer = AutoTokenizer.from_pretrained(base / "sft/model")
    rows = scored_rows(tmp_path / "run")
    for row, (prompt, answers) in zip(rows, tokens(tmp_path / "run"), strict=True):
        assert prompt == tokenizer(row["prompt"]).input_ids
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        greedy = ids[0, len(prompt) :].tolist()
        assert answers == [greedy, greedy]


def test_sampled_ids_are_scored_as_they_are(base, tmp_path, monkeypatch):
    """A policy that often says <unk>, which no text holds: texts would have other scores."""
    words = world.vocabulary()
    the = words.index("the")
    unk = words.index("<unk>")

    def make_unk_as_likely_as_the(tensor):
        tensor[unk] = tensor[the]

    def never(*args):
        raise AssertionError("a text was tokenized")

    model = Path(shutil.copytree(base / "sft/model", tmp_path / "sft"))
    edit_tensor(model, "embed_out.weight", make_unk_as_likely_as_the)
    monkeypatch.setattr(rewards, "encode_again", never)
    settings = {
        "model": str(model),
        "reward_model": [f"{base}/rm/seed_0"],
        "gold_model": f"{base}/rewards.py:the",
        "max_prompt_length": 3,
    }
    tiny(base, tmp_path / "run", **settings)

    n_with_unk = 0
    rows = scored_rows(tmp_path / "run")
    for row, (prompt, answers) in zip(rows, tokens(tmp_path / "run"), strict=True):
        # Three words were read, and the row keeps the data's own prompt.
        assert [words[i] for i in prompt] == row["prompt"].split()[-3:]
        # The special tokens are the first ones of the vocabulary, up to <unk>.
        for response, answer in zip(row["responses"], answers, strict=True):
            assert response == " ".join(words[i] for i in answer if i > unk)
            n_with_unk += unk in answer
        expected = plain_scores(base / "rm/seed_0", prompt, answers)
        assert row["scores"]["seed_0"] == pytest.approx(expected, abs=1e-4)
    assert n_with_unk > 3


def noise_of_training(seed, step, place):
    """The noise of a rollout's or an evaluation's answer, 12 tokens, by its key."""
    return np.random.default_rng([rng.ROLLOUT, seed, step, place]).random(12)


def test_the_noise_is_no_evaluations(base, tmp_path, monkeypatch):
    """Evaluations key their prompts by their places, 0, 1, 2, ..., at step 0; rollouts go on."""
    seen = []
    uniforms = rollout.uniforms

    def record(*args):
        seen.append(uniforms(*args))
        return seen[-1]

    monkeypatch.setattr(rollout, "uniforms", record)
    monkeypatch.setattr(pool, "check_rollouts", lambda policy: None)  # it samples too
    tiny(base, tmp_path / "run", seed=3)

    pool_noise = torch.cat(seen)  # [3 prompts of 4 answers, R]
    assert pool_noise.shape == (12, 12)
    assert len(pool_noise.unique(dim=0)) == 12
    for step in range(3):
        rows = [noise_of_training(3, step, place) for place in range(256)]
        training_noise = torch.from_numpy(np.stack(rows))  # [256, R]
        for row in pool_noise:
            is_equal = (training_noise == row).all(1)
            assert not is_equal.any()


def test_a_pool_of_older_noise_is_not_gone_on_with(base, tmp_path):
    """A cache as it was named before the noise had a stream of its own; no policy gave it."""
    tiny(base, tmp_path / "run")
    rows = read_rows(answers_file(tmp_path / "run"))
    older_settings = (4, 12, 1.0, 0, "float32")
    prompts = column(rows, "prompt_ids")
    digest = files.digest(pool.LAYOUT, models.fingerprint(f"{base}/sft"), prompts, older_settings)
    older_rows = [{**row, "responses": ["older"] * 4} for row in rows[:2]]
    (tmp_path / "old/cache").mkdir(parents=True)
    shutil.copy(tmp_path / "run/config.json", tmp_path / "old")
    write_rows(tmp_path / f"old/cache/answers_{digest}.jsonl", older_rows)

    tiny(base, tmp_path / "old")
    written = scored_rows(tmp_path / "old")
    assert column(written, "responses") == column(rows, "responses")


# ---------------------------------------------------------------------- processes, and their deaths


def several(base):
    """A run for two processes: 5 prompts in three batches, rewards on ids and on texts.

    The gold reward is a member too.
    """
    members = [f"{base}/rm/seed_0", f"{base}/rewards.py:letters"]
    sizes = {"n_answers": 3, "eval_size": 5, "n": [1, 2], "batch_size": 6}
    return settings_of(base, reward_model=members, gold_model=members[1], **sizes)


@pytest.fixture(scope="module")
def two_processes(base):
    """several() by torchrun: base/two."""
    # Without -- torchrun wants --n for itself.
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 -- sample_bon.py"
    command = [sys.executable, *torchrun.split(), "--output_dir", f"{base}/two"]
    command += flags(several(base))
    done = subprocess.run(command, cwd=REPO, env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    # Only one of them prints.
    assert done.stdout.count("5 prompts, 3 answers each") == 1
    return base / "two"


def run_in_child(folder, settings, slow=0.0):
    """A run in one of several processes, of which rank 0 writes slowly to the cache."""
    append = pool.CacheFile.append

    def append_slowly(*args):
        if os.environ["RANK"] == "0":
            time.sleep(slow)
        append(*args)

    pool.CacheFile.append = append_slowly
    sample_bon.main(sample_bon.Config(output_dir=str(folder), **settings))
    distributed.shutdown()


def die_in_child(folder, settings, deadly, at):
    """A run in one of several processes, of which rank 1 is killed.

    That happens at the at-th call of pool's function `deadly`, the first being 1.
    """
    function = getattr(pool, deadly)
    calls = itertools.count(1)

    def die(*args):
        if next(calls) == at and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    setattr(pool, deadly, die)
    run_in_child(folder, settings)


@pytest.mark.slow
def test_two_processes_change_nothing(base, two_processes, tmp_path):
    sample_bon.main(sample_bon.Config(output_dir=f"{tmp_path}/one", **several(base)))
    assert tokens(tmp_path / "one") == tokens(two_processes)
    check_close_scores(tmp_path / "one", two_processes)

    rows = scored_rows(two_processes)
    for row in rows:
        assert row["gold_scores"] == row["scores"]["rewards.py:letters"]
    results = read_json(two_processes / "bon_results.json")
    check_results(results, rows, golds_of(rows), [1, 2])


def kill_rank_1(base, folder, deadly, at):
    """A run of two processes, of which rank 1 kills itself; rank 0, which waits for it, is ended.

    -> how many lines they have written to the cache
    """
    first, second = ranks(2, die_in_child, folder, several(base), deadly, at)
    join(second, code=-signal.SIGKILL)
    first.kill()
    first.join()
    assert not (folder / "pool.jsonl").exists()
    return sum(content.count(b"\n") for content in contents(folder).values())


@pytest.mark.slow
def test_after_sigkill_the_same_command_ends_with_the_same_bits(base, two_processes, tmp_path):
    """Rank 1 dies while it samples, then, when both go on, while it scores."""
    folder = tmp_path / "run"
    # Two batches are written, with two prompts each.
    assert kill_rank_1(base, folder, "sample_batch", at=3) == 4
    # All 5 prompts have their answers, and one reward's scores.
    assert kill_rank_1(base, folder, "score_answers", at=2) == 5 + 5

    join(*ranks(2, run_in_child, folder, several(base)))
    assert contents(folder) == contents(two_processes)


@pytest.mark.slow
def test_fewer_answers_than_processes(base, tmp_path):
    """Two answers for four processes, and a gold reward that is a member.

    All read its scores only once they are on disk, where rank 0 is slow to write them.
    """
    settings = {**several(base), "eval_size": 1, "n_answers": 2}
    processes = ranks(4, run_in_child, tmp_path / "four", settings, 0.3)
    for process, seconds in zip(processes, (60, 5, 5, 5)):
        process.join(seconds)
        # It may wait for the others for ever.
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]

    sample_bon.main(sample_bon.Config(output_dir=f"{tmp_path}/one", **settings))
    assert tokens(tmp_path / "four") == tokens(tmp_path / "one")
    check_close_scores(tmp_path / "four", tmp_path / "one")


class Killed(BaseException):
    """What stands for a kill, and is no error that anything catches."""


def in_two_chunks(base):
    """A run of 4 prompts in two batches; its scores come in two chunks if CHUNK is 8."""
    members = [f"{base}/rm/seed_0", f"{base}/rewards.py:the"]
    return {"reward_model": members, "eval_size": 4, "batch_size": 8}


@pytest.fixture(scope="module")
def not_killed(base):
    """in_two_chunks() to its end: its folder, and how many lines each write to the cache had."""
    n_lines = []
    append = pool.CacheFile.append

    def count(lines, rows):
        n_lines.append(len(rows))
        append(lines, rows)

    folder = base / "not_killed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "CHUNK", 8)
        patch.setattr(pool.CacheFile, "append", count)
        tiny(base, folder, **in_two_chunks(base))
    return SimpleNamespace(folder=folder, n_lines=n_lines)


def test_the_cache_is_written_eight_times(not_killed):
    """The answers, the scores of two members and gold, two prompts at a time."""
    assert not_killed.n_lines == [2] * 8


# The first write of the answers, one of the scores, and the last one.
KILLS = [1, 4, 8] + [pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 5, 6, 7)]


@pytest.mark.parametrize("fatal", KILLS)
def test_a_run_that_was_killed_at_a_write_to_the_cache_goes_on(
    base, not_killed, tmp_path, monkeypatch, fatal
):
    """A kill leaves a part of the two lines: less than the first one, or more than it."""
    calls = itertools.count(1)
    append = pool.CacheFile.append

    def die(lines, rows):
        if next(calls) != fatal:
            return append(lines, rows)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        part = 0.2 if fatal % 2 else 0.8
        with open(lines.path, "a") as file:
            file.write(text[: int(part * len(text))])
        raise Killed

    monkeypatch.setattr(pool, "CHUNK", 8)
    with monkeypatch.context() as patch:
        patch.setattr(pool.CacheFile, "append", die)
        with pytest.raises(Killed):
            tiny(base, tmp_path, **in_two_chunks(base))
    tiny(base, tmp_path, **in_two_chunks(base))
    assert contents(tmp_path) == contents(not_killed.folder)


# ----------------------------------------------------------------------------------- damaged caches


@pytest.fixture(scope="module")
def three_prompts(base):
    """A tiny run of 3 prompts, whose cache is damaged in copies."""
    tiny(base, base / "three_prompts")
    return base / "three_prompts"


class Cache:
    """A copy of three_prompts, and a file of its cache: of answers, or of scores."""

    def __init__(self, base, whole, folder, kind):
        self.base = base
        self.whole = whole
        self.folder = shutil.copytree(whole, folder)
        self.path = sorted(folder.glob(f"cache/{kind}_*.jsonl"))[0]
        self.lines = self.path.read_bytes().splitlines()

    def write(self, lines):
        self.path.write_bytes(b"".join(line + b"\n" for line in lines))

    def change_row(self, index, **fields):
        """Write the file with other fields in one of its rows."""
        row = json.loads(self.lines[index])
        row.update(fields)
        lines = list(self.lines)
        lines[index] = json.dumps(row).encode()
        self.write(lines)

    def check_error(self, number):
        """A run names the damaged file, the line and the remedy, which helps."""
        remedy = f"; delete {self.path}, it is made again"
        with refuses(f"{self.path}:{number}: ", remedy):
            tiny(self.base, self.folder)
        self.path.unlink()
        results = tiny(self.base, self.folder)
        assert results == read_json(self.whole / "bon_results.json")
        assert contents(self.folder) == contents(self.whole)


@pytest.fixture(params=["answers", "scores"])
def cache(request, base, three_prompts, tmp_path):
    return Cache(base, three_prompts, tmp_path / "run", request.param)


@pytest.fixture
def answers_cache(base, three_prompts, tmp_path):
    return Cache(base, three_prompts, tmp_path / "run", "answers")


@pytest.fixture
def scores_cache(base, three_prompts, tmp_path):
    return Cache(base, three_prompts, tmp_path / "run", "scores")


# Which lines a file has instead of lines 0, 1 and 2, and which of them is named, from 1 on.
WRONG_ORDERS = {
    "swapped": ([1, 0, 2], 1),
    "doubled": ([0, 0, 1, 2], 2),
    "written twice": ([0, 1, 2, 0, 1, 2], 4),
    "one too many": ([0, 1, 2, 2], 4),
    "one is missing": ([0, 2], 2),
}


@pytest.mark.parametrize("order, number", WRONG_ORDERS.values(), ids=WRONG_ORDERS.keys())
def test_a_line_of_the_cache_out_of_its_place_is_named(cache, order, number):
    cache.write([cache.lines[i] for i in order])
    cache.check_error(number)


# A line that is no row, and in whose place it stands, from 0 on.
NO_ROWS = {
    "binary": (b"\xff\xfe\x00", 1),
    "nested": (b"[" * 200_000, 0),
    "a number": (b"5", 2),
    "an empty object": (b"{}", 2),
    "an old row": (b"[1.0, 2.0, 3.0, 4.0]", 0),
}


@pytest.mark.parametrize("line, index", NO_ROWS.values(), ids=NO_ROWS.keys())
def test_a_line_of_the_cache_that_is_no_row_is_named(cache, line, index):
    lines = list(cache.lines)
    lines[index] = line
    cache.write(lines)
    cache.check_error(index + 1)


def test_a_line_of_the_cache_that_is_no_json_is_named(cache):
    first, second, third = cache.lines
    cache.write([first, second[:-3], third])
    cache.check_error(2)


def test_an_empty_line_of_the_cache_is_named(cache):
    first, second, third = cache.lines
    cache.write([first, second, b"", third])
    cache.check_error(3)


def test_a_prompt_too_many_in_the_cache_is_named(cache):
    first, second, third = cache.lines
    fourth = third.replace(b": 2,", b": 3,", 1)
    cache.write([first, second, third, fourth])
    cache.check_error(4)


WRONG_SCORES = {
    "too few": [1.0, 2.0, 3.0],
    "too many": [1.0] * 5,
    "texts": ["1.0"] * 4,
    "none": None,
}


@pytest.mark.parametrize("wrong", WRONG_SCORES.values(), ids=WRONG_SCORES.keys())
def test_wrong_scores_in_the_cache_are_named(scores_cache, wrong):
    scores_cache.change_row(1, scores=wrong)
    scores_cache.check_error(2)


WRONG_ANSWERS = {
    "too few answers": ("responses", ["a"] * 3),
    "numbers for answers": ("responses", [1, 2, 3, 4]),
    "too few ids": ("response_ids", [[1]] * 3),
    "texts for ids": ("response_ids", [["a"]] * 4),
    "no ids": ("response_ids", None),
    "another prompt's ids": ("prompt_ids", [1, 2]),
    "no prompt": ("prompt", 5),
}


@pytest.mark.parametrize("field, wrong", WRONG_ANSWERS.values(), ids=WRONG_ANSWERS.keys())
def test_wrong_answers_in_the_cache_are_named(answers_cache, field, wrong):
    answers_cache.change_row(0, **{field: wrong})
    answers_cache.check_error(1)


def test_caches_without_indices_are_not_read(base, tmp_path):
    """Files of an older version, named by digests of the same things; these scores are wrong."""
    file = tmp_path / "pool.jsonl"
    cache = tmp_path / "run/cache"
    rows = [{"prompt": "p", "responses": ["the", "a"]}, {"prompt": "q", "responses": ["b", "the"]}]
    write_rows(file, rows)
    reward = f"{base}/rewards.py:the"
    read_pool(base, tmp_path / "run", file, reward_model=[reward])
    for path in cache.iterdir():
        path.unlink()
    digests = [files.digest(row["prompt"], row["responses"], None) for row in rows]
    old_name = files.digest(rewards.fingerprint_reward(reward), files.digest(digests))
    write_rows(cache / f"scores_{old_name}.jsonl", [[7.0, 7.0], [7.0, 7.0]])

    read_pool(base, tmp_path / "run", file, reward_model=[reward])
    assert scores(tmp_path / "run") == [{"rewards.py:the": [1, 0]}, {"rewards.py:the": [0, 1]}]


# ------------------------------------------------------------------- answers that are there already


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


def check_pool(base, folder, spec, rows):
    """A run on this pool reads these rows, scores their answers, and estimates from them."""
    members = [f"{base}/rewards.py:letters", f"{base}/rewards.py:the"]
    results = read_pool(base, folder, spec, reward_model=members, n=[])

    written = scored_rows(folder)
    assert without_scores(written) == rows
    for row in written:
        counts = [count_the(response) for response in row["responses"]]
        assert row["scores"]["rewards.py:the"] == counts
    # The prompt with the fewest answers has three.
    check_results(results, written, golds_of(written), [1, 2])
    assert summary(folder)["prompts"] == 3
    assert summary(folder)["answers"] == 3


def test_a_pool_of_json_lines(base, tmp_path):
    """Texts stand there as they are, with é and a line separator; blank lines are passed over."""
    lines = [json.dumps(row, ensure_ascii=False) for row in RAGGED]
    file = tmp_path / "pool.jsonl"
    file.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    check_pool(base, tmp_path / "run", file, RAGGED)


def test_a_pool_of_one_json_list(base, tmp_path):
    file = tmp_path / "pool.json"
    file.write_text(json.dumps(RAGGED))
    check_pool(base, tmp_path / "run", file, RAGGED)


def save_data_set(folder, rows):
    # At the top of this file it would be imported in every process of a test: that takes a second.
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(folder)


def test_a_pool_of_a_data_set(base, tmp_path):
    save_data_set(tmp_path / "folder", RAGGED)
    check_pool(base, tmp_path / "run", tmp_path / "folder", RAGGED)


def test_a_pool_with_the_columns_instruction_input_answers(base, tmp_path):
    """An instruction and an input that are there make a prompt of two lines."""
    columns = [("review the", "hotel :"), ("how was it ?", ""), ("", "here ?")]
    prompts = ["review the\nhotel :", "how was it ?", "here ?"]
    given = []
    expected = []
    for row, prompt, (instruction, further) in zip(RAGGED, prompts, columns):
        texts = {"instruction": instruction, "input": further, "answers": row["responses"]}
        given.append({**texts, "gold_scores": row["gold_scores"]})
        expected.append({**row, "prompt": prompt})
    save_data_set(tmp_path / "folder", given)
    check_pool(base, tmp_path / "run", tmp_path / "folder", expected)


def test_ragged_pools_on_texts_by_a_model(base, tmp_path, monkeypatch):
    """The reward model's own tokenizer reads the texts, which then end with EOS."""
    # Chunks end within and between prompts of 4, 3 and 2 answers.
    monkeypatch.setattr(pool, "CHUNK", 4)
    texts = ["the lobby was nice .", "we saw a big bed .", "it is short", "nice bed"]
    rows = []
    for i, row in enumerate(world.prompts("ood")[:3]):
        rows.append({"prompt": row["prompt"], "responses": texts[i:]})
    write_rows(tmp_path / "pool.jsonl", rows)
    members = [f"{base}/rm/seed_{{seed}}"]
    results = read_pool(base, tmp_path / "run", tmp_path / "pool.jsonl", reward_model=members)

    written = scored_rows(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(base / "rm/seed_0")
    for row in written:
        prompt = tokenizer(row["prompt"]).input_ids
        answers = []
        for response in row["responses"]:
            answers.append(tokenizer(response).input_ids + [tokenizer.eos_token_id])
        for seed in range(2):
            expected = plain_scores(base / f"rm/seed_{seed}", prompt, answers)
            assert row["scores"][f"seed_{seed}"] == pytest.approx(expected, abs=1e-4)
    check_results(results, written, None, [1, 2])


def write_pool_without_gold(file):
    """RAGGED without gold scores: two rows do not have the field, in the third it is null."""
    rows = []
    for row in RAGGED:
        rows.append({"prompt": row["prompt"], "responses": row["responses"]})
    rows[2]["gold_scores"] = None
    write_rows(file, rows)


def test_a_pool_without_gold(base, tmp_path, pictures):
    write_pool_without_gold(tmp_path / "pool.jsonl")
    results = read_pool(base, tmp_path / "run", tmp_path / "pool.jsonl", n=[2], save_best=True)

    written = scored_rows(tmp_path / "run")
    for row in written:
        assert list(row) == ["prompt", "responses", "scores"]
    check_results(results, written, None, [2])
    for row in read_rows(tmp_path / "run/best_of_2.jsonl"):
        assert row["gold"] is None
        assert row["split"] is None

    # There is a picture of the proxy alone, where matplotlib is installed.
    picture = tmp_path / "run/bon.png"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert not picture.exists()
    else:
        assert picture.stat().st_size > 10_000


def test_pairs_need_gold(base, tmp_path):
    write_pool_without_gold(tmp_path / "pool.jsonl")
    with refuses("--save_pairs needs gold", "--gold_model"):
        read_pool(base, tmp_path / "run", tmp_path / "pool.jsonl", save_pairs=True)


def test_a_gold_model_comes_before_the_gold_of_the_pool(base, tmp_path):
    write_rows(tmp_path / "pool.jsonl", RAGGED)
    gold_model = f"{base}/rewards.py:the"
    results = read_pool(base, tmp_path / "run", tmp_path / "pool.jsonl", gold_model=gold_model)

    golds = []
    for row in RAGGED:
        golds.append([count_the(response) for response in row["responses"]])
    written = scored_rows(tmp_path / "run")
    assert golds_of(written) == golds
    check_results(results, written, golds, [1, 2])


def is_whole(answer, tokenizer):
    """Whether the text of an answer, sampled ids, tells all: it ends with EOS, its only special."""
    specials = set(tokenizer.all_special_ids)
    return answer[-1] == tokenizer.eos_token_id and not specials & set(answer[:-1])


def test_its_own_pool_read_back(base, tmp_path):
    """Rewards on texts give the same results, and a model the same scores of whole answers."""
    functions = [f"{base}/rewards.py:letters", f"{base}/rewards.py:the"]
    settings = {"reward_model": [*functions, f"{base}/rm/seed_0"], "n": [1, 8]}
    first = sample(base, tmp_path / "first", **settings)
    second = read_pool(base, tmp_path / "second", tmp_path / "first/pool.jsonl", **settings)

    for name in ("rewards.py:letters", "rewards.py:the"):
        assert second[name] == first[name]

    n_whole = 0
    tokenizer = world.tokenizer()
    first_scores = scores(tmp_path / "first")
    second_scores = scores(tmp_path / "second")
    for p, (_, answers) in enumerate(tokens(tmp_path / "first")):
        for j, answer in enumerate(answers):
            if is_whole(answer, tokenizer):
                from_ids = first_scores[p]["seed_0"][j]
                from_text = second_scores[p]["seed_0"][j]
                assert from_ids == pytest.approx(from_text, abs=1e-4)
                n_whole += 1
    assert n_whole > 15


def test_what_a_pool_adds_to_its_data_is_no_column_of_the_data():
    answers = {"prompt": "p", "responses": ["a", "b"], "gold_scores": [1, 2]}
    added = {"index": 0, "scores": {"rm": [3.0, 4.0]}}
    assert pool.read_row("pool.jsonl:1", {**answers, **added}) == answers

    found = pool.read_row("pool.jsonl:1", {**answers, **added, "topic": "hotel"})
    assert found == {**answers, "row": {"prompt": "p", "topic": "hotel"}}
    # A pool that sample_bon.py wrote holds the data's row, which rewards get.
    assert pool.read_row("pool.jsonl:1", {**found, **added}) == found
    assert pool.collect_answers([(found, 1)]).rows == [found["row"]]


GOOD_ROW = '{"prompt": "p", "responses": ["a", "b"], "gold_scores": [1, 2]}'
NO_RESPONSES = "'responses' must be a list of at least one string"
BAD_ROWS = [
    ('{"prompt": "p", "responses": ["a"', "not JSON"),
    ('["p", ["a", "b"]]', "a row must be an object with prompt and responses"),
    ('{"responses": ["a"]}', "'prompt'"),
    ('{"prompt": 3, "responses": ["a"]}', "'prompt' must be a string"),
    ('{"prompt": "p"}', NO_RESPONSES),
    ('{"prompt": "p", "responses": []}', NO_RESPONSES),
    ('{"prompt": "p", "responses": "ab"}', NO_RESPONSES),
    ('{"prompt": "p", "responses": ["a", null]}', NO_RESPONSES),
    (
        '{"instruction": "p", "input": ["q"], "answers": ["a"]}',
        "instruction and input must be strings",
    ),
    ('{"instruction": "p", "input": "q"}', "'responses'"),
    ('{"prompt": "p", "responses": ["a", "b"]}', "some rows have gold_scores, and some have not"),
]
BAD_GOLD = [
    ("[1]", "1 gold_scores for 2 responses"),
    ("[1, NaN]", "NaN is no finite number"),
    ("[1, -Infinity]", "finite"),
    ("[1, -1e39]", "finite"),
    (f"[1, {10**400}]", "finite"),
    ("[1, true]", "finite"),
    ('[1, "2"]', "finite"),
    ("[1, null]", "finite"),
    ("2", "finite"),
]


def check_bad_row(file, line, words):
    """A pool with a good row on lines 1 and 4, a blank line 2 and this line 3 names line 3."""
    file.write_text(f"{GOOD_ROW}\n\n{line}\n{GOOD_ROW}")
    with refuses(f"{file}:3", words):
        pool.read(str(file))


@pytest.mark.parametrize("line, words", BAD_ROWS)
def test_a_bad_row_of_a_pool_is_named(tmp_path, line, words):
    check_bad_row(tmp_path / "pool.jsonl", line, words)


@pytest.mark.parametrize("gold, words", BAD_GOLD, ids=[gold[:20] for gold, _ in BAD_GOLD])
def test_bad_gold_scores_of_a_pool_are_named(tmp_path, gold, words):
    line = GOOD_ROW.replace("[1, 2]", gold)
    check_bad_row(tmp_path / "pool.jsonl", line, words)


def test_bad_pool_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with refuses("empty.jsonl: the file is empty"):
        pool.read(f"{tmp_path}/empty.jsonl")
    (tmp_path / "none.json").write_text("[]")
    with refuses("none.json: no rows"):
        pool.read(f"{tmp_path}/none.json")
    with refuses("lost.jsonl: no such file"):
        pool.read(f"{tmp_path}/lost.jsonl")


def test_n_is_at_most_the_number_of_any_prompts_answers(base, tmp_path):
    write_rows(tmp_path / "pool.jsonl", RAGGED)
    with refuses("--n 5", "how was it ?", "only 3 answers"):
        read_pool(base, tmp_path / "run", tmp_path / "pool.jsonl", n=[2, 5])
    # The error is no obstacle to a better call.
    results = read_pool(base, tmp_path / "run", tmp_path / "pool.jsonl", n=[3])
    assert column(results["rewards.py:letters"], "n") == [3]


def test_lists_of_unequal_length_become_a_matrix_with_a_mask():
    values, mask = pool.matrix([[1, 2.5], [3], [4, 5, 6]])
    assert values.tolist() == [[1, 2.5, 0], [3, 0, 0], [4, 5, 6]]
    assert values.dtype == torch.float64
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]


# ------------------------------------------------------------------------- answers as training data


def best_place(proxy, group):
    """Which of these answers has the highest score; of equals, the first."""
    return max(group, key=lambda j: proxy[j])


def best_places(proxies):
    """The best of answers 0 to 2 and of 3 to 5 of each prompt: P lists of N -> 2 P places."""
    places = []
    for proxy in proxies:
        places.append(best_place(proxy, [0, 1, 2]))
        places.append(best_place(proxy, [3, 4, 5]))
    return places


SAVED = [
    pytest.param("test", "mean", marks=pytest.mark.slow),
    ("train", "wco"),
    pytest.param("ood", "uwo", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("split, objective", SAVED)
def test_save_best(base, tmp_path, split, objective):
    """Two rows for each prompt: the best of answers 0 to 2, and the best of answers 3 to 5.

    Answers 6 and 7 are left out.
    """
    members = [f"{base}/rewards.py:letters", f"{base}/rewards.py:the", f"{base}/rm/seed_0"]
    settings = {"objective": objective, "uwo_lambda": [0.3, 9.0], "n": [3], "split": split}
    # --eval_size bounds the prompts of test, --max_rows those of the others.
    if split != "test":
        settings["max_rows"] = 8
    sample(base, tmp_path, reward_model=members, save_best=True, eval_size=8, **settings)
    rows = scored_rows(tmp_path)
    prompts = set(column(rows, "prompt"))
    assert len(prompts) == 8
    assert prompts < set(world_prompts(split))

    # uwo takes the first weight. No member and no other objective chooses the same answers.
    own = "uwo_0.3" if objective == "uwo" else objective
    places_of = {}
    for name, proxies in proxies_of(rows, [0.3, 9.0]).items():
        places_of[name] = best_places(proxies)
    places = places_of.pop(own)
    assert places not in places_of.values()

    expected = []
    for i, j in enumerate(places):
        row = rows[i // 2]
        best = {
            "prompt": row["prompt"],
            "response": row["responses"][j],
            "scores": {name: values[j] for name, values in row["scores"].items()},
            "gold": row["gold_scores"][j],
            "split": split,
            "sample": j,
        }
        expected.append(best)
    assert read_rows(tmp_path / "best_of_3.jsonl") == expected
    # train_sft.py can read the file.
    demonstrations = data.read_rows(f"{tmp_path}/best_of_3.jsonl", "sft")
    assert len(demonstrations) == 16


def test_the_best_name_the_split_that_their_prompts_are_of():
    named = sample_bon.Config(dataset="mine.jsonl", eval_splits=["hard=held_out.jsonl"])
    assert sample_bon.name_of_split(named) == "hard"
    assert sample_bon.name_of_split(sample_bon.Config(split="ood")) == "ood"
    # The prompts of a pool may be of any split.
    assert sample_bon.name_of_split(sample_bon.Config(pool="pool.jsonl")) is None


def test_the_best_keep_the_columns_of_their_data():
    """A reward may ask for them when the best are scored again."""
    asked = {"prompt": "p", "row": {"prompt": "p", "topic": "hotel"}, "responses": ["a", "b", "c"]}
    (row,) = sample_bon.join_scores([asked], {"rm": [[1.0, 3.0, 9.0]]}, None)
    assert row == {**asked, "scores": {"rm": [1.0, 3.0, 9.0]}}

    (best,) = sample_bon.choose_best(row, torch.tensor([1.0, 3.0, 9.0]), 2, "test")
    assert best["response"] == "b"
    assert best["row"] == asked["row"]


# Answers 0 and 1 of RAGGED are a pair, and so are 2 and 3, 4 and 5; a last single one has none.
PAIRS = [
    {"prompt": "review the hotel :", "chosen": "d", "rejected": "the the"},
    {"prompt": "how was it ?", "chosen": "x\u2028y the", "rejected": ""},
    {"prompt": "", "chosen": "the", "rejected": "a a a"},
    {"prompt": "", "chosen": "b", "rejected": "the b"},
    {"prompt": "", "chosen": "a the the", "rejected": "c c"},
]


def test_save_pairs(base, tmp_path, capsys):
    rows = [dict(row) for row in RAGGED]
    # A tie in gold between the first two answers.
    rows[0]["gold_scores"] = [1, 1, -3, 0, 4]
    write_rows(tmp_path / "pool.jsonl", rows)
    read_pool(base, tmp_path / "run", tmp_path / "pool.jsonl", save_pairs=True)

    assert read_rows(tmp_path / "run/pairs.jsonl") == PAIRS
    assert data.read_rows(f"{tmp_path}/run/pairs.jsonl", "pairs") == PAIRS
    assert "5 pairs, 1 ties in gold left out" in capsys.readouterr().out


# --------------------------------------------------------------------------- defaults and bad flags

DEFAULTS = {
    "output_dir": "runs/bon",
    "model": "runs/sft",
    "pool": "",
    "reward_model": ["runs/rm/seed_0"],
    "gold_model": "world:gold",
    "dataset": "world",
    "split": "test",
    "n_answers": 256,
    "n": [],
    "objective": "mean",
    "uwo_lambda": [0.5],
    "temperature": 1.0,
    "max_new_tokens": 48,
    "seed": 0,
    "save_best": False,
    "save_pairs": False,
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    assert getattr(sample_bon.Config(), name) == DEFAULTS[name]


def test_n_doubles_by_default():
    up_to_256 = [n for n in DEFAULT_NS if n <= 256]
    assert up_to_256 == [1, 2, 4, 8, 16, 32, 64, 128, 256]


def test_each_n_is_estimated_once_in_ascending_order():
    config = sample_bon.Config(n=[4, 1, 4])
    assert sample_bon.choose_ns(config, {"prompt": "p", "responses": 4 * ["a"]}) == [1, 4]


def test_only_the_embedded_world_has_a_gold_reward_of_its_own():
    assert sample_bon.Config(pool="mine.jsonl").gold_model == ""
    assert sample_bon.Config(dataset="mine.jsonl").gold_model == ""
    assert sample_bon.Config(gold_model="mine.py:f").gold_model == "mine.py:f"


class Enough(Exception):
    """Ends a run that has come as far as a test looks."""


@pytest.mark.parametrize("dataset", ["world", "world:2"])
def test_what_is_missing_is_trained_first(monkeypatch, tmp_path, dataset):
    """By the scripts' own defaults; but a reward model on this run's texts."""
    trained = []

    def record(config):
        trained.append((config.output_dir, config.dataset))

    def stop(path):
        raise Enough

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_sft, "main", record)
    monkeypatch.setattr(train_rm, "main", record)
    monkeypatch.setattr(sample_bon, "load_tokenizer", stop)
    with pytest.raises(Enough):
        sample_bon.main(sample_bon.Config(dataset=dataset))
    assert trained == [("runs/sft", "world"), ("runs/rm/seed_0", dataset)]
    assert list(tmp_path.iterdir()) == []


def prompts_of(**flags):
    """The prompts that sample_bon.py takes with these flags."""
    rows, _ = sample_bon.prompts_of(sample_bon.Config(**flags))
    return column(rows, "prompt")


def test_a_split_of_the_embedded_world_is_all_of_it():
    assert sorted(prompts_of()) == sorted(world_prompts("test"))
    assert prompts_of(split="train") == world_prompts("train")
    assert prompts_of(split="ood") == world_prompts("ood")


def test_all_prompts_of_the_embedded_world():
    expected = world_prompts("train") + world_prompts("test") + world_prompts("ood")
    assert prompts_of(split="all", dataset="world:4") == expected


@pytest.mark.parametrize(
    "split, flag", [("test", "eval_size"), ("ood", "max_rows"), ("train", "max_rows")]
)
def test_a_few_prompts_are_not_those_of_the_first_topics(split, flag):
    few = prompts_of(**{"split": split, flag: 30})
    assert len(few) == 30
    assert len(set(few)) == 30
    assert set(few) < set(world_prompts(split))
    assert len(topics_of(few)) > 3


def test_held_out_prompts_from_a_file_of_their_own(tmp_path):
    write_rows(tmp_path / "held_out.jsonl", [{"prompt": "x"}, {"prompt": "y"}])
    prompts = prompts_of(eval_dataset=f"{tmp_path}/held_out.jsonl")
    assert sorted(prompts) == ["x", "y"]


def test_splits_of_ones_own_data(tmp_path):
    """Twenty questions, each of them twice: a question is held out with all its rows, or not."""
    questions = [f"q{i // 2}" for i in range(40)]
    write_rows(tmp_path / "mine.jsonl", [{"question": question} for question in questions])
    mine = {"dataset": f"{tmp_path}/mine.jsonl", "columns": ["prompt=question"]}

    test = prompts_of(**mine, eval_size=4)
    train = prompts_of(**mine, eval_size=4, split="train")
    assert len(test) == 4
    assert not set(test) & set(train)
    all_held_out = set(prompts_of(**mine))
    assert len(train) == 40 - 2 * len(all_held_out)
    assert prompts_of(**mine, split="all") == questions
    assert len(prompts_of(**mine, split="train", max_rows=5)) == 5


BAD_FLAGS = [
    ("--n 1 512", ["--n must not be above --n_answers (256)"]),
    ("--n 0", ["--n must be at least 1"]),
    ("--n_answers 0", ["--n_answers must be at least 1"]),
    ("--save_best", ["--save_best takes one --n"]),
    ("--save_best --n 2 4", ["--save_best takes one --n"]),
    ("--uwo_lambda 0.5 -1", ["--uwo_lambda takes numbers of at least 0"]),
    ("--uwo_lambda nan", ["--uwo_lambda"]),
    ("--uwo_lambda inf", ["--uwo_lambda"]),
    ("--split validation", ["--split must be one of test, train, ood, all", "'validation'"]),
    ("--split ood --dataset mine.jsonl", ["--split ood is the embedded world's"]),
    ("--prompt_format tldr", ["--in_distribution and --prompt_format are for data of one's own"]),
    ("--reward_model runs/rm/wco runs/rm/seed_0", ["a reward cannot be called wco"]),
    ("--reward_model runs/rm/uwo_0.5 runs/rm/seed_0", ["a reward cannot be called uwo_0.5"]),
    ("--objective median", ["--objective must be one of mean, wco, uwo"]),
    ("--temperature 0", ["--temperature must be positive"]),
    ("--dtype float16", ["--dtype"]),
    ("--max_new_tokens 0", ["--max_new_tokens must be at least 1"]),
    ("--nonsense", ["--nonsense"]),
    ("--reward_model a.py:f a.py:f", ["a.py:f twice"]),
    ("--reward_model runs/none/seed_{seed}", ["runs/none/seed_{seed}", "no such folder for any"]),
    ("--reward_model lost.py:f", ["lost.py", "no such file"]),
    ("--gold_model ./lost", ["./lost", "no such model folder"]),
    ("--model ./lost", ["./lost", "no such model folder"]),
    ("--pool lost.jsonl --reward_model good.py:the", ["lost.jsonl", "no such file"]),
    ("--pool bad.jsonl --reward_model good.py:the", ["bad.jsonl:2", "'responses'"]),
    ("--device tpu", ["--device must be one of auto, cpu, cuda"]),
]


def names_in(folder):
    """What lies in a folder, but for what Python puts there when it imports a file."""
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")


@pytest.mark.parametrize("args, words", BAD_FLAGS, ids=[args for args, _ in BAD_FLAGS])
def test_bad_flags(tmp_path, monkeypatch, capsys, args, words):
    """Exit code 2, one line that says what is wrong, and nothing on disk."""

    def too_late(*args):
        pytest.fail("training would have begun")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample_bon, "train_what_is_missing", too_late)
    (tmp_path / "good.py").write_text(REWARDS)
    (tmp_path / "bad.jsonl").write_text(GOOD_ROW + '\n{"prompt": "p"}\n')
    before = names_in(tmp_path)

    with pytest.raises(SystemExit) as exit_:
        cli.run(sample_bon.Config, sample_bon.main, shlex.split(args))
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert len(error.splitlines()) == 1
    assert "error: " in error
    for word in words:
        assert word in error
    assert names_in(tmp_path) == before


# --------------------------------------------------------------------------- what a name stands for


def test_a_models_fingerprint_is_of_its_files_and_not_of_their_place(base, tmp_path):
    # A run folder stands for the model/ in it.
    run = tmp_path / "a"
    shutil.copytree(base / "rm/seed_0", run / "model")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run / "model", elsewhere)
    os.utime(elsewhere / "config.json", (0, 0))

    fingerprint = models.fingerprint(f"{run}/model")
    assert models.fingerprint(str(base / "rm/seed_0")) == fingerprint
    assert models.fingerprint(str(run)) == fingerprint
    assert models.fingerprint(str(elsewhere)) == fingerprint
    assert models.fingerprint(f"{run}/../a/model/") == fingerprint


def test_a_models_fingerprint_changes_with_every_bit_of_every_file(base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base / "rm/seed_0", folder)
    names = sorted(path.name for path in folder.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)

    seen = {models.fingerprint(str(folder))}
    for name in names:
        path = folder / name
        content = path.read_bytes()
        # A single bit of the file's last byte.
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        seen.add(models.fingerprint(str(folder)))
        # The file is not there.
        path.unlink()
        seen.add(models.fingerprint(str(folder)))
        path.write_bytes(content)
    # A file more.
    (folder / "more.txt").write_text("")
    seen.add(models.fingerprint(str(folder)))
    assert len(seen) == 2 + 2 * len(names)


@pytest.fixture
def function_files(tmp_path):
    (tmp_path / "f.py").write_text(REWARDS)
    (tmp_path / "f.tsv").write_text("the\t1\n")


@pytest.mark.parametrize("name", ["f.py:the", "f.py:letters", "f.tsv"])
def test_a_functions_fingerprint_changes_with_its_file(function_files, tmp_path, name):
    before = rewards.fingerprint_reward(f"{tmp_path}/{name}")
    path = tmp_path / name.split(":")[0]
    path.write_text(path.read_text() + "#")
    assert rewards.fingerprint_reward(f"{tmp_path}/{name}") != before


def test_functions_are_told_apart_by_their_fingerprints(function_files, tmp_path):
    specs = [f"{tmp_path}/f.py:the", f"{tmp_path}/f.py:letters", f"{tmp_path}/f.tsv", "world:gold"]
    fingerprints = [rewards.fingerprint_reward(spec) for spec in specs]
    assert len(set(fingerprints)) == 4
    for fingerprint in fingerprints:
        assert len(fingerprint) == 20


def test_the_gold_rewards_fingerprint_is_of_the_worlds_file():
    digest = hashlib.sha256(Path(world.__file__).read_bytes()).hexdigest()
    assert rewards.fingerprint_reward("world:gold") == files.digest("world:gold", digest)


# ----------------------------------------------------------------------------------- several splits


@pytest.fixture
def own_rows(tmp_path):
    """Flags for prompts with their topics, of which those on hotel and park are in distribution."""
    rows = []
    for row in world.prompts("train")[::5]:
        rows.append({**row, "topic": world.topic_of(row["prompt"])})
    write_rows(tmp_path / "mine.jsonl", rows)
    dataset = f"{tmp_path}/mine.jsonl"
    return {"dataset": dataset, "in_distribution": "topic=hotel,park", "eval_size": 2}


def topics_in(folder):
    return topics_of(column(scored_rows(folder), "prompt"))


def test_a_split_that_is_not_there_is_an_error_before_anything_is_written(base, tmp_path, own_rows):
    with refuses("missing.jsonl: no such file"):
        tiny(base, tmp_path / "run", eval_splits=["test", "x=missing.jsonl"], **own_rows)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_each_of_several_splits_is_a_run_in_a_folder_of_its_own(base, tmp_path, own_rows):
    results = tiny(base, tmp_path / "run", eval_splits=["test", "ood"], **own_rows)

    assert names_in(tmp_path / "run") == ["ood", "test"]
    # As if it had been called alone.
    for split in ("test", "ood"):
        alone = tiny(base, tmp_path / f"{split}_alone", split=split, **own_rows)
        assert alone == results[split]
        assert contents(tmp_path / "run" / split) == contents(tmp_path / f"{split}_alone")
    assert topics_in(tmp_path / "run/test") <= {"hotel", "park"}
    assert not topics_in(tmp_path / "run/ood") & {"hotel", "park"}

"""Ensembles as runs.

train_rm.py --members, PPO against several rewards at once, and gold that is added to a finished
run. The models are tiny random ones with the embedded world's words. Every expected score is
computed by plain transformers from the token ids that a run wrote down, one answer at a time, and
put together by Python's statistics module.

    K members, B answers
"""

import functools
import json
import os
import runpy
import shutil
import statistics
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import (
    KillAt,
    Killed,
    assert_bit_equal,
    assert_close_runs,
    command_line,
    flags,
    hashes,
    join,
    metrics,
    ranks,
    read_rows,
    summary,
    weights,
    write_rows,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPTNeoXConfig

import sample_bon
import train_ppo
import train_rm
from nanorlhf import ensemble, world
from nanorlhf.runtime import cli, distributed, plots
from nanorlhf.runtime.curves import arrange, curves_of
from nanorlhf.runtime.help import help_text
from nanorlhf.scoring import Scoring

SEEDS = (0, 1, 2)
OBJECTIVES = ("mean", "wco", "uwo")
LAMBDA = 1.5
# words() leaves a line for each call, where it is told to, in a file of its process.
REWARDS = """
import os
def words(prompts, responses):
    if "CALLS" in os.environ:
        with open(os.environ["CALLS"] + os.environ["RANK"], "a") as f:
            print(len(responses), file=f)
    return [len(r.split()) / 3 - len(p) for p, r in zip(prompts, responses)]
def ends(prompts, responses): return [float(r.endswith("e")) for r in responses]
def fails(prompts, responses): raise KeyError("no such word")
"""


# ----------------------------------------------------------------------------------------- the runs


def make_likely(lm, word, logit):
    """Raise a word's logit by this much, whatever stands before it.

    The last layer norm adds its bias to every hidden state, so a row of the output embeddings gets
    that much more from it.
    """
    bias = lm.gpt_neox.final_layer_norm.bias.data
    i = world.vocabulary().index(word)
    lm.get_output_embeddings().weight.data[i] += logit * bias / bias.square().sum()


def make_lm():
    """A random model with dropout that often ends, and often says <unk>, which no text holds."""
    words = world.vocabulary()
    eos = words.index("<eos>")
    config = GPTNeoXConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=words.index("<pad>"),
    )
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    lm.gpt_neox.final_layer_norm.bias.data.normal_()
    make_likely(lm, "<eos>", 2.2)
    make_likely(lm, "<unk>", 2.5)
    return lm


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """lm/, pairs.jsonl, prompts.jsonl, rewards.py, and rm/seed_0 to rm/seed_2 by --members."""
    root = tmp_path_factory.mktemp("ensembles")
    make_lm().save_pretrained(root / "lm")
    world.tokenizer().save_pretrained(root / "lm")
    write_rows(root / "pairs.jsonl", world.preferences(80))
    write_rows(root / "prompts.jsonl", world.prompts("train")[::6])
    (root / "rewards.py").write_text(REWARDS)
    train_members(root, root / "rm", members=3)
    return root


def rm(base, **changes):
    """The settings of a small reward model."""
    settings = {
        "model": f"{base}/lm",
        "dataset": f"{base}/pairs.jsonl",
        "steps": 3,
        "batch_size": 8,
        "eval_size": 9,
        "warmup": 0,
        "lr": 2e-3,
        "label_noise": 0.3,
        "gold_model": "world:gold",
        "checkpoint_every": 2,
    }
    return {**settings, **changes}


def train_one(folder, settings):
    """A reward model in this folder. -> its summary"""
    return train_rm.main(train_rm.Config(output_dir=str(folder), **settings))


def train_members(base, folder, **changes):
    """Reward models in seed_0, seed_1, ... of this folder. -> the summary of each, by its folder"""
    return train_one(f"{folder}/seed_{{seed}}", rm(base, **changes))


def run_train_rm(*args):
    """train_rm.py as from the shell."""
    cli.run(train_rm.Config, train_rm.main, list(args))


def ppo(base, **changes):
    """The settings of a small PPO run against the ensemble."""
    settings = {
        "model": f"{base}/lm",
        "reward_model": [f"{base}/rm/seed_{{seed}}"],
        "dataset": f"{base}/prompts.jsonl",
        "steps": 2,
        "batch_size": 8,
        "minibatch_size": 4,
        "ppo_epochs": 2,
        "max_new_tokens": 10,
        "eval_size": 7,
        "eval_every": 1,
        "checkpoint_every": 1,
        "lr": 2e-3,
        "uwo_lambda": LAMBDA,
    }
    return {**settings, **changes}


def train_policy(base, folder, **changes):
    """The small PPO run, with changes. -> the rows of its metrics"""
    train_ppo.main(train_ppo.Config(output_dir=str(folder), **ppo(base, **changes)))
    return read_rows(folder / "metrics.jsonl")


def column(rows, name):
    """One field of all rows."""
    return [row[name] for row in rows]


def n_different(tensors, others):
    """How many tensors of two models are not equal."""
    return sum(not tensors[name].equal(others[name]) for name in tensors)


def check_same_file(folder, other_folder, name):
    assert (folder / name).read_bytes() == (other_folder / name).read_bytes(), name


def check_unchanged(before, after):
    """Every file that was there is as it was; others may have come."""
    for name in before:
        assert after[name] == before[name], name


def kill(monkeypatch, at, function, *args, **kwargs):
    """Call the function, which is killed at its at-th write. -> what that write was"""
    with monkeypatch.context() as patch:
        killer = KillAt(patch, at)
        with pytest.raises(Killed):
            function(*args, **kwargs)
    print("killed at", killer.at)
    return killer.at


def count_writes(monkeypatch, function, *args, **kwargs):
    with monkeypatch.context() as patch:
        counter = KillAt(patch)
        function(*args, **kwargs)
    return counter.count


# ---------------------------------------------------------------------------- the members' training


@pytest.mark.parametrize("seed", SEEDS)
def test_a_member_is_the_run_of_its_seed(base, tmp_path, seed):
    member = base / f"rm/seed_{seed}"
    train_one(tmp_path, rm(base, seed=seed))

    assert_bit_equal(member, tmp_path)
    config = json.loads((member / "config.json").read_text())
    config_alone = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("output_dir") == str(member)
    assert config_alone.pop("output_dir") == str(tmp_path)
    assert config == config_alone


def test_the_members_differ(base):
    first = weights(base / "rm/seed_0")
    second = weights(base / "rm/seed_1")
    assert n_different(first, second) > 20
    first_losses = {metrics(base / f"rm/seed_{seed}")[0]["loss"] for seed in SEEDS}
    assert len(first_losses) == 3


def test_the_first_member_has_the_seed_of_the_run(base, tmp_path):
    summaries = train_members(base, tmp_path, members=2, seed=1, steps=1)
    assert list(summaries) == [f"{tmp_path}/seed_1", f"{tmp_path}/seed_2"]


def pair_of(row):
    return row["prompt"], row["chosen"], row["rejected"]


@pytest.fixture
def labels(base, monkeypatch):
    """A list to which every training run adds which of its pairs are flipped.

    That is told from the pairs as they stand in the file.
    """
    right = {pair_of(row) for row in read_rows(base / "pairs.jsonl")}
    flipped = []
    encode = train_rm.encode

    def record(tokenizer, rows, *rest):
        is_flipped = [pair_of(row) not in right for row in rows]
        # The pairs of training; the held-out ones, which are fewer, are never flipped.
        if len(rows) > 10:
            flipped.append(is_flipped)
        else:
            assert not any(is_flipped)
        return encode(tokenizer, rows, *rest)

    monkeypatch.setattr(train_rm, "encode", record)
    return flipped


def check_share_of_flipped(is_flipped):
    """About --label_noise 0.3 of a run's pairs."""
    assert 0.1 < sum(is_flipped) / len(is_flipped) < 0.5


def test_members_share_their_wrong_labels(base, tmp_path, labels):
    train_members(base, tmp_path, members=3, noise_seed=5, steps=1)
    first, second, third = labels
    assert first == second
    assert first == third
    check_share_of_flipped(first)


@pytest.mark.slow
def test_independent_noise(base, tmp_path, labels):
    """The noise of member i is that of a single run with --noise_seed 5 + i."""
    train_members(base, tmp_path / "a", members=3, noise_seed=5, independent_noise=True)
    members = list(labels)
    assert len(members) == 3
    assert members[0] != members[1]
    assert members[0] != members[2]
    assert members[1] != members[2]
    for is_flipped in members:
        check_share_of_flipped(is_flipped)

    for i in (0, 2):
        # A single run's folder may have {seed} in its name too.
        train_members(base, tmp_path / "b", seed=i, noise_seed=5 + i)
        assert labels[-1] == members[i]
        assert_bit_equal(tmp_path / f"a/seed_{i}", tmp_path / f"b/seed_{i}")


def test_each_pair_is_encoded_once(base, tmp_path, monkeypatch):
    """However often the held-out pairs are checked, scored by gold and evaluated."""
    n_times = Counter()
    encode = train_rm.encode

    def record(tokenizer, rows, *rest):
        n_times.update(map(pair_of, rows))
        return encode(tokenizer, rows, *rest)

    monkeypatch.setattr(train_rm, "encode", record)
    train_one(tmp_path / "rm", rm(base, steps=2, eval_every=1, label_noise=0.0))
    assert len(n_times) > 70  # of training and held out
    assert set(n_times.values()) == {1}


@pytest.fixture
def three_members(base, tmp_path):
    """A copy of base/rm that says it was trained here."""
    folder = tmp_path / "rm"
    shutil.copytree(base / "rm", folder)
    for seed in SEEDS:
        path = folder / f"seed_{seed}/config.json"
        path.write_text(path.read_text().replace(f'"{base}/rm/', f'"{folder}/'))
    return folder


def test_three_members_again_change_nothing(base, three_members, capsys):
    before = hashes(three_members)
    summaries = train_members(base, three_members, members=3)

    assert capsys.readouterr().out.count("this run is done already") == 3
    assert hashes(three_members) == before
    assert list(summaries) == [f"{three_members}/seed_{seed}" for seed in SEEDS]
    for folder, found in summaries.items():
        assert found == summary(Path(folder))


@pytest.mark.slow
def test_two_members_more(base, three_members, tmp_path, capsys):
    """--members 5 where three are there: these stay as they are."""
    before = hashes(three_members)
    place = f"{three_members}/seed_{{seed}}"
    run_train_rm("--output_dir", place, "--members", "5", *flags(rm(base)))

    printed = capsys.readouterr().out
    assert printed.count("this run is done already") == 3
    assert "5 members:" in printed
    assert sorted(os.listdir(three_members)) == [f"seed_{seed}" for seed in range(5)]
    check_unchanged(before, hashes(three_members))
    train_one(tmp_path / "alone", rm(base, seed=4))
    assert_bit_equal(three_members / "seed_4", tmp_path / "alone")


def test_killed_in_the_second_member(base, tmp_path, monkeypatch):
    """--resume takes the settings from the first member's folder, and goes on with the second."""
    n_writes = count_writes(monkeypatch, train_members, base, tmp_path / "counted")
    folder = tmp_path / "rm"
    args = ["--output_dir", f"{folder}/seed_{{seed}}", "--members", "3"]
    kill(monkeypatch, 2 * n_writes - 4, run_train_rm, *args, *flags(rm(base)))
    assert sorted(os.listdir(folder)) == ["seed_0", "seed_1"]
    assert not (folder / "seed_1/summary.json").exists()
    assert os.listdir(folder / "seed_1/checkpoint")

    run_train_rm(*args, "--resume")
    for seed in SEEDS:
        assert_bit_equal(base / f"rm/seed_{seed}", folder / f"seed_{seed}")


# ------------------------------------------------------------------------------- PPO on an ensemble


@functools.cache
def open_classifier(path):
    return AutoModelForSequenceClassification.from_pretrained(Path(path) / "model")


@torch.no_grad()
def plain_score(path, ids):
    """The score head on the last token's hidden state, less the mean that the config holds."""
    model = open_classifier(str(path))
    hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
    score = model.score.weight[0].double() @ hidden.double()
    return score.item() - model.config.reward_mean


def plain_member_scores(base, ids):
    """The three members' scores of prompt and response, a token list: [K]."""
    return [plain_score(base / f"rm/seed_{seed}", ids) for seed in SEEDS]


def combine_by_hand(scores, objective):
    """Members' scores of one answer -> the score that is optimised."""
    if objective == "wco":
        return min(scores)
    mean = statistics.fmean(scores)
    if objective == "uwo":
        return mean - LAMBDA * statistics.pvariance(scores)
    return mean


def check_statistics(record, name, values):
    """A mean in the metrics, its standard error, and how many values there were."""
    error = statistics.stdev(values) / len(values) ** 0.5
    assert record[name] == pytest.approx(statistics.fmean(values), abs=1e-4), name
    assert record[f"{name}_se"] == pytest.approx(error, abs=1e-4), name
    assert record[f"{name}_n"] == len(values)


@pytest.fixture(scope="module")
def runs(base):
    """base/mean, base/wco and base/uwo, one run for each objective. -> what they sampled

    {(objective, step): (prompt ids, response ids) of each sequence}, in the order of sampling, with
    the evaluations as step 0
    """
    sampled = {}
    roll_out = train_ppo.roll_out

    def train_and_record(objective):
        def record(parts, prompts, place, step):
            rollout, answers = roll_out(parts, prompts, place, step)
            batch = answers.batch
            own = sampled.setdefault((objective, step), [])
            for i in range(len(batch)):
                n_prompt = int(batch.prompt_lengths[i])
                n_both = n_prompt + int(batch.response_lengths[i])
                ids = batch.ids[i].tolist()
                own.append((ids[:n_prompt], ids[n_prompt:n_both]))
            return rollout, answers

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_ppo, "roll_out", record)
            patch.setattr("nanorlhf.evaluation.roll_out", record)
            train_policy(base, base / objective, objective=objective)

    for objective in OBJECTIVES:
        train_and_record(objective)
    return sampled


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_evaluation_writes_down_what_was_sampled(base, runs, objective, step):
    tokenizer = world.tokenizer()
    # Each of the three evaluations has seven prompts.
    sampled = runs[objective, 0][7 * step : 7 * step + 7]
    rows = read_rows(base / objective / f"eval/step_{step}.jsonl")
    for row, (prompt_ids, response_ids) in zip(rows, sampled, strict=True):
        assert row["prompt_ids"] == prompt_ids
        assert row["response_ids"] == response_ids
        assert row["prompt_ids"] == tokenizer(row["prompt"]).input_ids
        assert row["gold"] is None


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_evaluations_of_an_ensemble(base, runs, objective, step):
    record = read_rows(base / objective / "metrics.jsonl")[step]
    combined = []
    variances = []
    of_members = {"seed_0": [], "seed_1": [], "seed_2": []}
    for row in read_rows(base / objective / f"eval/step_{step}.jsonl"):
        scores = plain_member_scores(base, row["prompt_ids"] + row["response_ids"])
        combined.append(combine_by_hand(scores, objective))
        variances.append(statistics.pvariance(scores))
        for name, score in zip(of_members, scores):
            assert row["scores"][name] == pytest.approx(score, abs=1e-4)
            of_members[name].append(score)
        assert row["scores"].keys() == of_members.keys()

    check_statistics(record, "eval/proxy", combined)
    check_statistics(record, "eval/variance", variances)
    for name, scores in of_members.items():
        check_statistics(record, f"eval/score/{name}", scores)
    # Members disagree, so that the objectives do differ here.
    assert min(variances) > 1e-4
    assert record["eval/variance"] > 0.05


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_summary_has_the_first_and_the_last_evaluation(base, runs, objective):
    rows = read_rows(base / objective / "metrics.jsonl")
    found = summary(base / objective)
    for part, record in (("before", rows[0]), ("after", rows[2])):
        expected = {}
        for name, value in record.items():
            if name.startswith("eval/"):
                expected[name.removeprefix("eval/")] = value
        assert found[part] == expected


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rollouts_of_an_ensemble(base, runs, objective, step):
    record = read_rows(base / objective / "metrics.jsonl")[step]
    scores = []  # [B, K]
    for prompt_ids, response_ids in runs[objective, step]:
        scores.append(plain_member_scores(base, prompt_ids + response_ids))
    combined = [combine_by_hand(own, objective) for own in scores]
    variances = [statistics.pvariance(own) for own in scores]
    mean = statistics.fmean(combined)

    assert len(scores) == 8
    assert record["score_mean"] == pytest.approx(mean, abs=1e-4)
    assert record["score_std"] == pytest.approx(statistics.pstdev(combined), abs=1e-4)
    assert record["score_variance"] == pytest.approx(statistics.fmean(variances), abs=1e-4)
    for i, of_member in enumerate(zip(*scores)):
        assert record[f"score/seed_{i}"] == pytest.approx(statistics.fmean(of_member), abs=1e-4)
    if step == 1:
        # There is no KL yet: the reward of a sequence is what the objective says.
        assert record["reward"] == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize("first, second", [("mean", "wco"), ("mean", "uwo"), ("wco", "uwo")])
def test_the_objective_changes_the_training(base, runs, first, second):
    row = metrics(base / first)[1]
    other = metrics(base / second)[1]
    # The first rollout and the members' scores of it are the same.
    assert runs[first, 1] == runs[second, 1]
    assert row["score/seed_1"] == other["score/seed_1"]
    # What is made of them is not.
    assert row["score_mean"] != other["score_mean"]
    assert row["policy_loss"] != other["policy_loss"]
    assert n_different(weights(base / first), weights(base / second)) > 20


def test_uwo_with_lambda_0_is_the_mean(base, runs, tmp_path):
    train_policy(base, tmp_path, objective="uwo", uwo_lambda=0.0)
    assert_bit_equal(base / "mean", tmp_path)


@pytest.mark.slow
def test_an_ensemble_of_one(base, tmp_path):
    """Its worst case, its mean and its uncertainty-weighted score are its score."""
    settings = {"reward_model": [f"{base}/rm/seed_1"], "steps": 1}
    train_policy(base, tmp_path / "mean", objective="mean", **settings)
    train_policy(base, tmp_path / "wco", objective="wco", **settings)
    rows = train_policy(base, tmp_path / "uwo", objective="uwo", **settings)

    assert_bit_equal(tmp_path / "mean", tmp_path / "wco")
    assert_bit_equal(tmp_path / "mean", tmp_path / "uwo")
    # There is nothing to tell about members.
    for name in rows[1]:
        assert name not in ("score_variance", "eval/variance")
        assert "score/" not in name


def test_members_of_all_kinds(base, tmp_path):
    """A model, a function, and one of the same name in another file.

    Whole paths tell them apart.
    """
    (tmp_path / "rewards.py").write_text(REWARDS.replace("endswith", "startswith"))
    model = f"{base}/rm/seed_2"
    ends = f"{base}/rewards.py:ends"
    begins = f"{tmp_path}/rewards.py:ends"
    members = [model, ends, begins]
    settings = {"reward_model": members, "objective": "wco", "steps": 1, "eval_every": 0}
    records = train_policy(base, tmp_path / "run", **settings)

    worst = []
    for row in read_rows(tmp_path / "run/eval/step_1.jsonl"):
        expected = {
            model: plain_score(model, row["prompt_ids"] + row["response_ids"]),
            ends: float(row["response"][-1:] == "e"),
            begins: float(row["response"][:1] == "e"),
        }
        assert row["scores"] == pytest.approx(expected, abs=1e-4)
        worst.append(min(expected.values()))
    check_statistics(records[1], "eval/proxy", worst)
    assert f"score/{ends}" in records[1]
    assert f"eval/score/{begins}" in records[1]


@pytest.mark.parametrize("before_the_end", [pytest.param(3, marks=pytest.mark.slow), 9])
def test_an_ensemble_killed_and_resumed(base, runs, tmp_path, monkeypatch, before_the_end):
    folder = tmp_path / "run"
    settings = {"objective": "wco"}
    n_writes = count_writes(monkeypatch, train_policy, base, tmp_path / "counted", **settings)
    kill(monkeypatch, n_writes - before_the_end, train_policy, base, folder, **settings)
    assert os.listdir(folder / "checkpoint")
    assert not (folder / "summary.json").exists()

    cli.run(train_ppo.Config, train_ppo.main, ["--output_dir", str(folder), "--resume"])
    assert_bit_equal(base / "wco", folder)


# ------------------------------------------------------------------------------ a further objective


@pytest.fixture
def median(monkeypatch):
    """One line more in ensemble.py's table: the median of the members' scores."""

    def take_median(scores, uwo_lambda):  # [K, ...] -> [...]
        return scores.median(0).values

    monkeypatch.setitem(ensemble.OBJECTIVES, "median", take_median)
    # Config as a new process reads it.
    for script in (train_ppo, sample_bon):
        monkeypatch.setattr(script, "Config", runpy.run_path(script.__file__)["Config"])


@pytest.mark.parametrize("script", [train_ppo, sample_bon], ids=["train_ppo", "sample_bon"])
def test_flags_and_their_help_know_a_further_objective(median, script):
    names = ",".join(ensemble.OBJECTIVES)  # mean,wco,uwo,median
    assert f"--objective {{{names}}}" in help_text("", "", script.Config)


def test_ppo_knows_a_further_objective(median, base, tmp_path, monkeypatch):
    """In the rollouts' scores, the evaluations' proxy, and the label of its curve."""
    member_scores = []
    read = Scoring.read

    def record(*args):
        readings = read(*args)
        member_scores.append(readings["member_scores"])  # [B, K]
        return readings

    monkeypatch.setattr(Scoring, "read", record)
    records = train_policy(base, tmp_path, objective="median", steps=1)

    # One rollout, between the evaluations before and after it.
    _, of_rollout, _ = member_scores
    medians = [statistics.median(scores) for scores in of_rollout.tolist()]
    assert records[1]["score_mean"] == pytest.approx(statistics.fmean(medians), abs=1e-5)
    for step in (0, 1):
        rows = read_rows(tmp_path / f"eval/step_{step}.jsonl")
        medians = [statistics.median(row["scores"].values()) for row in rows]
        check_statistics(records[step], "eval/proxy", medians)
    curves = arrange([str(tmp_path)])[""]
    assert list(curves) == ["median"]


@pytest.fixture
def median_of_n(median, base, tmp_path):
    """The best of 4 answers to 5 prompts by the median: folder and results."""
    config = sample_bon.Config(
        output_dir=str(tmp_path),
        model=f"{base}/lm",
        reward_model=[f"{base}/rm/seed_{{seed}}"],
        dataset=f"{base}/prompts.jsonl",
        eval_size=5,
        n_answers=4,
        n=[4],
        max_new_tokens=10,
        objective="median",
        save_best=True,
    )
    return SimpleNamespace(folder=tmp_path, results=sample_bon.main(config))


def test_best_of_n_knows_a_further_objective(median_of_n):
    """It has its curve, and --save_best takes answers by it."""
    assert {"seed_0", "seed_1", "seed_2", "uwo_0.5", "median"} <= set(median_of_n.results)
    best_scores = []
    best_responses = []
    for row in read_rows(median_of_n.folder / "pool.jsonl"):
        medians = [statistics.median(scores) for scores in zip(*row["scores"].values())]
        best = max(medians)
        best_scores.append(best)
        best_responses.append(row["responses"][medians.index(best)])

    (point,) = median_of_n.results["median"]
    assert point["proxy_score"] == pytest.approx(statistics.fmean(best_scores), abs=1e-5)
    saved = read_rows(median_of_n.folder / "best_of_4.jsonl")
    assert column(saved, "response") == best_responses


def test_pictures_know_a_further_objective(median_of_n):
    """Its curve is under its own name, and in no mean of the members."""
    folder = str(median_of_n.folder)
    curves = curves_of(folder, "")
    assert list(curves)[0] == "single (mean of 3 members)"
    assert list(curves)[-1] == "median"
    (point,) = median_of_n.results["median"]
    assert curves["median"]["proxy"] == pytest.approx([point["proxy_score"]])

    figure = pytest.importorskip("matplotlib.figure").Figure()
    plots.comparison_figure(figure, [folder])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "median" in legend


# ------------------------------------------------------------------------------------ two processes


def drive(base, folder, jobs):
    """Several mains in one process, with a record of which member was trained by which."""
    train = train_rm.train
    scripts = {"rm": train_rm, "ppo": train_ppo}

    def record(config, dist):
        (Path(folder) / f"member_{config.seed}_by_{os.environ['RANK']}").touch()
        return train(config, dist)

    train_rm.train = record
    for name, settings in jobs:
        script = scripts[name]
        script.main(script.Config(**settings))
    distributed.shutdown()


@pytest.fixture(scope="module")
def two(base):
    """In two processes: rm/seed_0 to seed_2, ppo/, a run against base's members, and its gold."""
    folder = base / "two"
    folder.mkdir()
    jobs = [
        ("rm", rm(base, output_dir=f"{folder}/rm/seed_{{seed}}", members=3)),
        ("ppo", ppo(base, output_dir=f"{folder}/ppo", objective="uwo")),
        ("ppo", {"score_gold": f"{folder}/ppo", "gold_model": f"{base}/rewards.py:words"}),
    ]
    places = {"STDERR": f"{folder}/stderr", "CALLS": f"{folder}/gold_by_"}
    join(*ranks(2, drive, base, folder, jobs, **places))
    return folder


@pytest.mark.slow
def test_members_spread_over_two_processes(base, two):
    trained = sorted(path.name for path in two.glob("member_*"))
    assert trained == ["member_0_by_0", "member_1_by_1", "member_2_by_0"]
    for seed in SEEDS:
        assert_bit_equal(base / f"rm/seed_{seed}", two / f"rm/seed_{seed}")


@pytest.mark.slow
def test_an_ensemble_on_two_processes(with_gold, two):
    assert_close_runs(with_gold, two / "ppo")
    for step in (0, 1, 2):
        rows = read_rows(with_gold / f"eval/step_{step}.jsonl")
        others = read_rows(two / f"ppo/eval/step_{step}.jsonl")
        assert column(rows, "response_ids") == column(others, "response_ids")
        assert column(rows, "gold") == column(others, "gold")


@pytest.mark.slow
def test_the_first_process_alone_scores_gold_afterwards(two):
    """Seven answers of each of three evaluations, a call each."""
    assert [path.name for path in two.glob("gold_by_*")] == ["gold_by_0"]
    assert (two / "gold_by_0").read_text() == "7\n7\n7\n"


@pytest.mark.slow
def test_gold_that_fails_on_two_processes(base, finished, tmp_path):
    """Both say so, and nothing else, though the first alone asks the reward."""
    args = ["--score_gold", str(finished), "--gold_model", f"{base}/rewards.py:fails"]
    join(*ranks(2, command_line, "ppo", *args, STDERR=f"{tmp_path}/stderr"), code=2)
    for rank in (0, 1):
        (line,) = (tmp_path / f"stderr_{rank}").read_text().splitlines()
        assert "rewards.py:fails raised KeyError" in line


# ---------------------------------------------------------------------------------- gold afterwards


@pytest.fixture(scope="module")
def with_gold(base):
    """base/uwo's run once more, with gold at every evaluation."""
    train_policy(base, base / "with_gold", objective="uwo", gold_model=f"{base}/rewards.py:words")
    return base / "with_gold"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, in which a wrong default folder would show."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def finished(base, runs, here, tmp_path):
    """A copy of base/uwo, a run without gold."""
    return Path(shutil.copytree(base / "uwo", tmp_path / "run"))


def score_gold(run, spec, *args):
    """train_ppo.py --score_gold; it trains nothing and makes no other folder. -> the summary"""
    command = ["--score_gold", str(run), "--gold_model", str(spec), *args]
    cli.run(train_ppo.Config, train_ppo.main, command)
    assert os.listdir(".") == []
    return summary(run)


def check_refused(capfd, run, args, *words):
    """train_ppo.py --score_gold with these further arguments must not change the run.

    It exits with 2 and one line that holds all the words.
    """
    before = hashes(run)
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.run(train_ppo.Config, train_ppo.main, ["--score_gold", str(run), *args])
    error = capfd.readouterr().err
    assert exit_.value.code == 2
    assert len(error.splitlines()) == 1
    assert "error: " in error
    for word in words:
        assert word in error
    assert hashes(run) == before
    assert os.listdir(".") == []


def check_same_gold(run, with_gold, spec):
    """Evaluations, metrics and summary are those of the run that had its gold all along."""
    assert metrics(run) == metrics(with_gold)
    for step in (0, 1, 2):
        check_same_file(run, with_gold, f"eval/step_{step}.jsonl")
    found = summary(run)
    assert found.pop("gold_model") == spec
    assert found == summary(with_gold)
    assert "gold" in found["before"]
    assert "gold_se" in found["after"]


def test_gold_afterwards_is_gold_at_once(base, finished, with_gold):
    spec = f"{base}/rewards.py:words"
    assert "eval/gold" not in metrics(finished)[0]
    score_gold(finished, spec)
    check_same_gold(finished, with_gold, spec)

    golds = []
    for row in read_rows(finished / "eval/step_2.jsonl"):
        golds.append(len(row["response"].split()) / 3 - len(row["prompt"]))
    check_statistics(metrics(finished)[2], "eval/gold", golds)


def test_gold_afterwards_changes_no_other_file(base, finished):
    before = hashes(finished)
    score_gold(finished, f"{base}/rewards.py:words")
    after = hashes(finished)
    assert after.keys() == before.keys()
    for name in before:
        if not name.startswith(("eval/", "metrics", "summary", "samples")):
            assert after[name] == before[name], name


@pytest.fixture
def model_gold(base, finished, tmp_path):
    """Gold by a reward model: `finished`, which got it afterwards, and a run with it all along."""
    score_gold(finished, base / "rm/seed_2", "--micro_batch_size", "3")
    at_once = tmp_path / "with_gold"
    train_policy(base, at_once, objective="uwo", gold_model=f"{base}/rm/seed_2")
    return SimpleNamespace(afterwards=finished, at_once=at_once)


def evaluation_rows(folder):
    """The answers of all three evaluations."""
    rows = []
    for step in (0, 1, 2):
        rows += read_rows(folder / f"eval/step_{step}.jsonl")
    return rows


def test_a_gold_model_reads_the_sampled_ids(base, model_gold):
    """It shares the policy's tokenizer, so it can.

    What is lost by decoding, and an end that was cut off, must not change its score.
    """
    model = base / "rm/seed_2"
    tokenizer = world.tokenizer()
    n_cut = 0
    n_lost = 0
    for row in evaluation_rows(model_gold.afterwards):
        prompt_ids = row["prompt_ids"]
        response_ids = row["response_ids"]
        expected = plain_score(model, prompt_ids + response_ids)
        assert row["gold"] == pytest.approx(expected, abs=1e-4)
        assert row["gold"] == pytest.approx(row["scores"]["seed_2"], abs=1e-4)

        # Whether the text would have had another score.
        again = tokenizer(row["response"]).input_ids
        n_cut += response_ids[-1] != tokenizer.eos_token_id
        if response_ids not in (again, [*again, tokenizer.eos_token_id]):
            score_of_text = plain_score(model, prompt_ids + again)
            n_lost += abs(score_of_text - expected) > 0.01
    assert n_lost > 3
    assert 3 < n_cut < 18


def test_a_gold_model_afterwards_is_a_gold_model_at_once(model_gold):
    """Up to rounding, since micro-batches are others."""
    rows = evaluation_rows(model_gold.afterwards)
    others = evaluation_rows(model_gold.at_once)
    for row, other in zip(rows, others, strict=True):
        assert row.pop("gold") == pytest.approx(other.pop("gold"), abs=1e-5)
        assert row == other
    records = metrics(model_gold.afterwards)
    for record, other in zip(records, metrics(model_gold.at_once), strict=True):
        assert record == pytest.approx(other, abs=1e-5)
        # The gold model is a member too.
        assert record["eval/gold"] == pytest.approx(record["eval/score/seed_2"], abs=1e-5)


WRITES = ["step_0.jsonl", "step_1.jsonl", "step_2.jsonl", "metrics.jsonl", "summary.json"]


@pytest.mark.parametrize("name", WRITES)
def test_gold_killed_between_files(base, finished, with_gold, monkeypatch, name):
    """After a kill at any of its writes the same command ends the same."""
    spec = f"{base}/rewards.py:words"
    number = WRITES.index(name) + 1
    killed_at = kill(monkeypatch, number, score_gold, finished, spec)
    assert killed_at == f"write {number}: replace {name}"

    score_gold(finished, spec)
    check_same_gold(finished, with_gold, spec)
    assert not list(finished.rglob("*.tmp"))


@pytest.mark.slow
def test_gold_of_all_splits(base, here, tmp_path):
    spec = f"{base}/rewards.py:words"
    without = tmp_path / "without"
    at_once = tmp_path / "with"
    splits = ["test", f"more={base}/prompts.jsonl"]
    settings = {"eval_splits": splits, "steps": 1, "ppo_epochs": 1}
    train_policy(base, without, gold_model="", **settings)
    train_policy(base, at_once, gold_model=spec, **settings)

    found = score_gold(without, spec)
    assert metrics(without) == metrics(at_once)
    assert "more/gold_se" in metrics(at_once)[1]
    check_same_file(without, at_once, "eval/step_1.jsonl")
    check_same_file(without, at_once, "eval_more/step_0.jsonl")
    check_same_file(without, at_once, "eval_more/step_1.jsonl")
    assert found == {**summary(at_once), "gold_model": spec}


def test_gold_is_added_once(base, finished, with_gold, capfd):
    spec = f"{base}/rewards.py:words"
    score_gold(finished, spec)
    for run in (finished, with_gold):
        words = [str(run), "has its gold scores already"]
        check_refused(capfd, run, ["--gold_model", spec], *words)


# BASE stands for the folder of the fixture `base`; its lm/ is a policy, which has no score head.
NO_GOLD = [
    ("", ["name its gold reward with --gold_model"]),
    ("--dataset mine.jsonl", ["name its gold reward with --gold_model"]),
    ("--gold_model nowhere.py:f", ["nowhere.py: no such file"]),
    ("--gold_model nowhere.tsv", ["nowhere.tsv: no such file"]),
    ("--gold_model ./nowhere", ["./nowhere: no such model folder"]),
    ("--gold_model BASE/lm", ["BASE/lm", "score.weight"]),
    ("--gold_model BASE/rewards.py:fails", ["rewards.py:fails raised KeyError"]),
]


@pytest.mark.parametrize("args, words", NO_GOLD, ids=[args or "nothing" for args, _ in NO_GOLD])
def test_no_gold_to_add(base, finished, capfd, args, words):
    args = args.replace("BASE", str(base)).split()
    words = [word.replace("BASE", str(base)) for word in words]
    check_refused(capfd, finished, args, *words)


def check_no_run(capfd, base, run, *words):
    args = ["--gold_model", f"{base}/rewards.py:words"]
    check_refused(capfd, run, args, str(run), *words)


def test_no_gold_where_there_is_no_run(base, finished, capfd):
    shutil.rmtree(finished)
    check_no_run(capfd, base, finished, "no finished PPO run here", "config.json")


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl"])
def test_no_gold_for_an_unfinished_run(base, finished, capfd, name):
    (finished / name).unlink()
    check_no_run(capfd, base, finished, "no finished PPO run here", name)


def test_no_gold_without_the_answers(base, finished, capfd):
    (finished / "eval/step_0.jsonl").unlink()
    check_no_run(capfd, base, finished, "eval/step_0.jsonl: no such file")


def test_no_gold_for_a_reward_model(base, finished, capfd):
    shutil.rmtree(finished)
    shutil.copytree(base / "rm/seed_0", finished)
    check_no_run(capfd, base, finished, "no finished PPO run here")


def test_no_gold_for_a_run_without_evaluations(base, finished, capfd):
    (finished / "metrics.jsonl").write_text('{"step": 0}\n')
    check_no_run(capfd, base, finished, "no evaluation in it")


def read_value(path):
    """The JSON value of a file; of a .jsonl file that of its last line."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        text = text.splitlines()[-1]
    return json.loads(text)


def write_value(path, value):
    """Put a JSON value where read_value() has read one."""
    lines = []
    if path.suffix == ".jsonl":
        lines = path.read_text().splitlines()[:-1]
    lines.append(json.dumps(value))
    path.write_text("\n".join(lines) + "\n")


# {what is wrong with a finished run: (file, a field of its value or of its last row, what the field
# becomes, what is said)}
WRONG_FIELDS = {
    "a summary of null": ("summary.json", "before", None, "no finished PPO run here"),
    "splits that are numbers": ("config.json", "eval_splits", [5], "eval_splits cannot be [5]"),
    "splits that are a number": ("config.json", "eval_splits", 5, "eval_splits cannot be 5"),
    "a split that is not there": ("config.json", "eval_splits", ["test", "ood"], "no such file"),
    "metrics of another step": ("metrics.jsonl", "step", 9, "step_9.jsonl: no such file"),
}
# {what is wrong with the last answer of an evaluation: (field, what it becomes)}
WRONG_ANSWERS = {
    "answers without ids": ("response_ids", None),
    "answers without tokens": ("response_ids", []),
    "ids in text": ("prompt_ids", ["1"]),
    "ids that are no tokens": ("prompt_ids", [10**6]),
    "ids below zero": ("prompt_ids", [-1]),
    "a response that is a number": ("response", 3),
}


def check_damaged(capfd, base, run, words):
    """Nothing is written, into whole files neither."""
    check_refused(capfd, run, ["--gold_model", f"{base}/rewards.py:words"], words)


@pytest.mark.parametrize(
    "name, field, wrong, words", WRONG_FIELDS.values(), ids=WRONG_FIELDS.keys()
)
def test_gold_for_a_run_with_a_wrong_field(base, finished, capfd, name, field, wrong, words):
    value = read_value(finished / name)
    value[field] = wrong
    write_value(finished / name, value)
    check_damaged(capfd, base, finished, words)


@pytest.mark.parametrize("name", ["summary.json", "config.json"])
def test_gold_for_a_run_with_a_list_for_an_object(base, finished, capfd, name):
    value = read_value(finished / name)
    write_value(finished / name, [value])
    check_damaged(capfd, base, finished, "not a JSON object")


def test_gold_for_a_run_with_metrics_without_a_step(base, finished, capfd):
    value = read_value(finished / "metrics.jsonl")
    del value["step"]
    write_value(finished / "metrics.jsonl", value)
    check_damaged(capfd, base, finished, "step is missing")


@pytest.mark.parametrize("field, wrong", WRONG_ANSWERS.values(), ids=WRONG_ANSWERS.keys())
def test_gold_for_a_run_with_wrong_answers(base, finished, capfd, field, wrong):
    path = finished / "eval/step_2.jsonl"
    row = read_value(path)
    row[field] = wrong
    write_value(path, row)
    check_damaged(capfd, base, finished, "step_2.jsonl:7: not the line")


def test_gold_for_a_run_with_a_row_that_is_a_number(base, finished, capfd):
    write_value(finished / "eval/step_2.jsonl", 3)
    check_damaged(capfd, base, finished, "step_2.jsonl:7: not the line")


def test_gold_for_a_run_with_a_row_that_is_missing(base, finished, capfd):
    """As a power cut leaves a file that was not flushed to the disk."""
    path = finished / "eval/step_2.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    check_damaged(capfd, base, finished, "step_2.jsonl: 6 answers, and 7 in metrics.jsonl")

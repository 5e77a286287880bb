"""Ensembles as runs: train_rm.py --members, PPO against several rewards at once, and gold that is added to a finished run.

Tiny random models with the embedded world's words. Every expected score is computed by plain transformers from the token ids that a
run wrote down, one answer at a time, and put together by Python's statistics module.
"""

import functools
import json
import os
import runpy
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from support import (
    KillAt,
    Killed,
    assert_bit_equal,
    assert_close_runs,
    flags,
    hashes,
    join,
    metrics,
    ranks,
    read_rows,
    weights,
    write_rows,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPTNeoXConfig

import sample_bon
import train_ppo
import train_rm
from nanorlhf import data, ensemble, world
from nanorlhf.runtime import cli, distributed, plots
from nanorlhf.runtime.help import help_text
from nanorlhf.scoring import Scoring

SEEDS = (0, 1, 2)
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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """lm/ (a model with dropout), pairs.jsonl, prompts.jsonl, rewards.py, and rm/seed_0 to rm/seed_2 by --members."""
    root = tmp_path_factory.mktemp("ensembles")
    ids = {word: i for i, word in enumerate(world.vocabulary())}
    special = {
        "bos_token_id": ids["<eos>"],
        "eos_token_id": ids["<eos>"],
        "pad_token_id": ids["<pad>"],
    }
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(GPTNeoXConfig(
        vocab_size=len(ids), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64,
        hidden_dropout=0.1, attention_dropout=0.1, **special,
    ))  # fmt: skip
    bias = lm.gpt_neox.final_layer_norm.bias.data.normal_()
    for word, logit in (
        ("<eos>", 2.2),
        ("<unk>", 2.5),
    ):  # frequent: some answers end, and some would not survive decoding
        lm.get_output_embeddings().weight.data[ids[word]] += logit * bias / bias.square().sum()
    lm.save_pretrained(root / "lm")
    world.tokenizer().save_pretrained(root / "lm")
    write_rows(root / "pairs.jsonl", world.preferences(80))
    write_rows(root / "prompts.jsonl", world.prompts("train")[::6])
    (root / "rewards.py").write_text(REWARDS)
    train_rm.main(train_rm.Config(output_dir=f"{root}/rm/seed_{{seed}}", members=3, **rm(root)))
    return root


def rm(base, **changes):
    """The settings of a small reward model."""
    settings = {"model": f"{base}/lm", "dataset": f"{base}/pairs.jsonl", "steps": 3, "batch_size": 8, "eval_size": 9, "warmup": 0,
                "lr": 2e-3, "label_noise": 0.3, "gold_model": "world:gold", "checkpoint_every": 2}  # fmt: skip
    return {**settings, **changes}


def train_members(base, folder, **changes):
    return train_rm.main(
        train_rm.Config(output_dir=f"{folder}/seed_{{seed}}", **rm(base, **changes))
    )


def ppo(base, **changes):
    """The settings of a small PPO run against the ensemble."""
    settings = {"model": f"{base}/lm", "reward_model": [f"{base}/rm/seed_{{seed}}"], "dataset": f"{base}/prompts.jsonl", "steps": 2,
                "batch_size": 8, "minibatch_size": 4, "ppo_epochs": 2, "max_new_tokens": 10, "eval_size": 7, "eval_every": 1,
                "checkpoint_every": 1, "lr": 2e-3, "uwo_lambda": LAMBDA}  # fmt: skip
    return {**settings, **changes}


def train_policy(base, folder, **changes):
    train_ppo.main(train_ppo.Config(output_dir=str(folder), **ppo(base, **changes)))
    return read_rows(folder / "metrics.jsonl")


def stops(capfd, module, args, *words):
    """The script, as from the shell, must exit with 2 and one line that holds all the words."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.run(module.Config, module.main, [str(x) for x in args])
    error = capfd.readouterr().err
    assert (
        exit_.value.code == 2
        and len(error.splitlines()) == 1
        and "error: " in error
        and all(word in error for word in words)
    ), error


# ------------------------------------------------------------------------------------------------------------ the members' training


@pytest.mark.parametrize("seed", SEEDS)
def test_a_member_is_the_run_of_its_seed(base, tmp_path, seed):
    folder = tmp_path / "alone"
    train_rm.main(train_rm.Config(output_dir=str(folder), seed=seed, **rm(base)))
    assert_bit_equal(base / f"rm/seed_{seed}", folder)
    configs = [
        json.loads((f / "config.json").read_text()) for f in (base / f"rm/seed_{seed}", folder)
    ]
    assert [config.pop("output_dir") for config in configs] == [
        f"{base}/rm/seed_{seed}",
        str(folder),
    ] and configs[0] == configs[1]


def test_the_members_differ(base):
    a, b = weights(base / "rm/seed_0"), weights(base / "rm/seed_1")
    assert sum(not a[name].equal(b[name]) for name in a) > 20
    assert len({metrics(base / f"rm/seed_{seed}")[0]["loss"] for seed in SEEDS}) == 3


@pytest.fixture
def labels(base, monkeypatch):
    """A list to which every training run adds which of its pairs are flipped, told from the pairs as they stand in the file."""
    right = {
        (row["prompt"], row["chosen"], row["rejected"]) for row in read_rows(base / "pairs.jsonl")
    }
    flipped, encode = [], data.encode

    def recorded(tokenizer, rows, field, *rest):
        if field == "chosen":
            wrong = [(r["prompt"], r["chosen"], r["rejected"]) not in right for r in rows]
            if len(rows) > 10:
                flipped.append(wrong)
            else:
                assert not any(wrong)  # held-out pairs
        return encode(tokenizer, rows, field, *rest)

    monkeypatch.setattr(data, "encode", recorded)
    return flipped


def test_members_share_their_wrong_labels(base, tmp_path, labels):
    train_members(base, tmp_path, members=3, noise_seed=5, steps=1)
    assert (
        len(labels) == 3
        and labels[0] == labels[1] == labels[2]
        and 0.1 < sum(labels[0]) / len(labels[0]) < 0.5
    )


def test_independent_noise(base, tmp_path, labels):
    train_members(base, tmp_path / "a", members=3, noise_seed=5, independent_noise=True)
    assert (
        len(labels) == 3
        and len(set(map(tuple, labels))) == 3
        and all(0.1 < sum(x) / len(x) < 0.5 for x in labels)
    )
    for i in (0, 2):
        train_members(
            base, tmp_path / "b", seed=i, noise_seed=5 + i
        )  # {seed} in a single run's folder
        assert labels[-1] == labels[i]
        assert_bit_equal(tmp_path / f"a/seed_{i}", tmp_path / f"b/seed_{i}")


def test_two_members_more(base, tmp_path, capsys):
    """--members 3, 3 again, 5: what is done stays as it is."""
    folder = tmp_path / "rm"
    shutil.copytree(base / "rm", folder)
    for seed in SEEDS:  # it was trained elsewhere
        path = folder / f"seed_{seed}/config.json"
        path.write_text(path.read_text().replace(f'"{base}/rm/', f'"{folder}/'))
    before = hashes(folder)
    capsys.readouterr()
    summaries = train_members(base, folder, members=3)
    assert (
        capsys.readouterr().out.count("this run is done already") == 3 and hashes(folder) == before
    )
    assert summaries == {
        f"{folder}/seed_{seed}": json.loads((folder / f"seed_{seed}/summary.json").read_text())
        for seed in SEEDS
    }
    args = ["--output_dir", f"{folder}/seed_{{seed}}", "--members", "5", *flags(rm(base))]
    cli.run(train_rm.Config, train_rm.main, args)
    out = capsys.readouterr().out
    assert out.count("this run is done already") == 3 and "5 members:" in out
    assert sorted(os.listdir(folder)) == [f"seed_{seed}" for seed in range(5)]
    after = hashes(folder)
    assert {name: after[name] for name in before} == before
    train_rm.main(train_rm.Config(output_dir=str(tmp_path / "alone"), **rm(base, seed=4)))
    assert_bit_equal(folder / "seed_4", tmp_path / "alone")


def test_killed_in_the_second_member(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        counter = KillAt(patch)
        train_members(base, tmp_path / "counted")
    writes, args = counter.count, ["--output_dir", f"{tmp_path}/rm/seed_{{seed}}", "--members", "3"]
    with monkeypatch.context() as patch:
        kill = KillAt(patch, 2 * writes - 4)
        with pytest.raises(Killed):
            cli.run(train_rm.Config, train_rm.main, [*args, *flags(rm(base))])
    print("killed at", kill.at)
    assert (
        sorted(os.listdir(tmp_path / "rm")) == ["seed_0", "seed_1"]
        and not (tmp_path / "rm/seed_1/summary.json").exists()
    )
    assert os.listdir(tmp_path / "rm/seed_1/checkpoint")
    cli.run(
        train_rm.Config, train_rm.main, [*args, "--resume"]
    )  # the settings come from the first member's folder
    for seed in SEEDS:
        assert_bit_equal(base / f"rm/seed_{seed}", tmp_path / f"rm/seed_{seed}")


# ------------------------------------------------------------------------------------------------------------- PPO on an ensemble


@functools.cache
def classifier(path):
    return AutoModelForSequenceClassification.from_pretrained(Path(path) / "model")


@torch.no_grad()
def plain_score(path, ids):
    """The score head on the hidden state of the last token, less the mean that train_rm.py left in the config."""
    model = classifier(str(path))
    hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
    return (model.score.weight[0].double() @ hidden.double()).item() - model.config.reward_mean


def together(scores, objective):
    """Members' scores of one answer -> the score that is optimised."""
    spread = LAMBDA * statistics.pvariance(scores)
    return {
        "mean": statistics.fmean(scores),
        "wco": min(scores),
        "uwo": statistics.fmean(scores) - spread,
    }[objective]


def assert_statistics(record, name, values):
    assert record[name] == pytest.approx(statistics.fmean(values), abs=1e-4), name
    assert record[f"{name}_se"] == pytest.approx(
        statistics.stdev(values) / len(values) ** 0.5, abs=1e-4
    ), name
    assert record[f"{name}_n"] == len(values)


@pytest.fixture(scope="module")
def runs(base):
    """base/mean, base/wco and base/uwo -> {(objective, step): [ids of each sequence]}, evaluations as step 0, in the order of sampling."""
    seen, roll_out, objective = {}, train_ppo.roll_out, ""

    def recorded(parts, prompts, place, step):
        rollout, answers = roll_out(parts, prompts, place, step)
        for row, p, r in zip(
            *(
                t.tolist()
                for t in (
                    answers.batch.ids,
                    answers.batch.prompt_lengths,
                    answers.batch.response_lengths,
                )
            )
        ):
            seen.setdefault((objective, step), []).append((row[:p], row[p : p + r]))
        return rollout, answers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ppo, "roll_out", recorded)
        patch.setattr("nanorlhf.evaluation.roll_out", recorded)
        for objective in ("mean", "wco", "uwo"):
            train_policy(base, base / objective, objective=objective)
    return seen


def test_a_further_objective_is_one_line(base, tmp_path, monkeypatch):
    """In ensemble.py's table alone: flags and their help, PPO, best-of-n and pictures then know it."""
    monkeypatch.setitem(
        ensemble.OBJECTIVES, "median", lambda scores, uwo_lambda: scores.median(0).values
    )
    monkeypatch.setattr(sample_bon, "plot_run", lambda run: None)
    for script in (train_ppo, sample_bon):
        config = runpy.run_path(script.__file__)["Config"]  # as a new process reads it
        assert "--objective {mean,wco,uwo,median}" in help_text("", "", config)
        monkeypatch.setattr(script, "Config", config)

    # PPO: the rollouts' scores, the evaluations' proxy.
    member_scores, read = [], Scoring.read

    def recorded(*args):
        readings = read(*args)
        member_scores.append(readings["member_scores"])  # [b, K]
        return readings

    monkeypatch.setattr(Scoring, "read", recorded)
    records = train_policy(base, tmp_path / "ppo", objective="median", steps=1)
    _, of_rollout, _ = member_scores  # between the evaluations before and after it
    medians = [statistics.median(scores) for scores in of_rollout.tolist()]
    assert records[1]["score_mean"] == pytest.approx(statistics.fmean(medians), abs=1e-5)
    for step in (0, 1):
        rows = read_rows(tmp_path / f"ppo/eval/step_{step}.jsonl")
        assert_statistics(
            records[step], "eval/proxy", [statistics.median(row["scores"].values()) for row in rows]
        )

    # Best-of-n: its curve, and the answers that --save_best takes by it.
    settings = {"model": f"{base}/lm", "reward_model": [f"{base}/rm/seed_{{seed}}"], "dataset": f"{base}/prompts.jsonl", "eval_size": 5,
                "n_answers": 4, "n": [4], "max_new_tokens": 10, "objective": "median", "save_best": True}  # fmt: skip
    results = sample_bon.main(sample_bon.Config(output_dir=str(tmp_path / "bon"), **settings))
    assert set(results) == {"seed_0", "seed_1", "seed_2", "mean", "wco", "uwo_0.5", "median"}
    best = []
    for row in read_rows(tmp_path / "bon/pool.jsonl"):
        medians = [statistics.median(scores) for scores in zip(*row["scores"].values())]
        best.append((max(medians), row["responses"][medians.index(max(medians))]))
    assert results["median"][0]["proxy_score"] == pytest.approx(
        statistics.fmean(score for score, _ in best), abs=1e-5
    )
    assert [row["response"] for row in read_rows(tmp_path / "bon/best_of_4.jsonl")] == [
        response for _, response in best
    ]

    # Pictures: under its own name, and in no mean of the members.
    ((label, _),) = plots.arrange([str(tmp_path / "ppo")])[""].items()
    assert label == "median"
    curves = plots.curves_of(str(tmp_path / "bon"), "")
    assert list(curves) == ["single (mean of 3 members)", "mean", "wco", "uwo_0.5", "median"]
    assert curves["median"]["proxy"] == pytest.approx([results["median"][0]["proxy_score"]])
    figure = pytest.importorskip("matplotlib.figure").Figure()
    plots.comparison_figure(figure, [str(tmp_path / "bon")])
    assert "median" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("objective", ["mean", "wco", "uwo"])
def test_evaluations_of_an_ensemble(base, runs, objective):
    records, sampled = read_rows(base / objective / "metrics.jsonl"), runs[objective, 0]
    tokenizer = world.tokenizer()
    for step in (0, 1, 2):
        rows, record = read_rows(base / objective / f"eval/step_{step}.jsonl"), records[step]
        assert [(row["prompt_ids"], row["response_ids"]) for row in rows] == sampled[
            7 * step : 7 * step + 7
        ]  # just what was sampled
        assert all(
            row["prompt_ids"] == tokenizer(row["prompt"]).input_ids and row["gold"] is None
            for row in rows
        )
        scores = [
            [
                plain_score(base / f"rm/seed_{seed}", row["prompt_ids"] + row["response_ids"])
                for seed in SEEDS
            ]
            for row in rows
        ]
        for row, expected in zip(rows, scores):
            assert row["scores"] == pytest.approx(
                dict(zip(("seed_0", "seed_1", "seed_2"), expected)), abs=1e-4
            )
        assert_statistics(record, "eval/proxy", [together(x, objective) for x in scores])
        assert_statistics(record, "eval/variance", [statistics.pvariance(x) for x in scores])
        for i, of_member in enumerate(zip(*scores)):
            assert_statistics(record, f"eval/score/seed_{i}", of_member)
        assert (
            min(map(statistics.pvariance, scores)) > 1e-4 and record["eval/variance"] > 0.05
        )  # the objectives do differ here
    summary = json.loads((base / objective / "summary.json").read_text())
    for part, record in (("before", records[0]), ("after", records[2])):
        assert summary[part] == {
            name[5:]: value for name, value in record.items() if name.startswith("eval/")
        }


@pytest.mark.parametrize("objective", ["mean", "wco", "uwo"])
def test_rollouts_of_an_ensemble(base, runs, objective):
    for step in (1, 2):
        record = read_rows(base / objective / "metrics.jsonl")[step]
        scores = [
            [plain_score(base / f"rm/seed_{seed}", p + r) for seed in SEEDS]
            for p, r in runs[objective, step]
        ]
        combined = [together(x, objective) for x in scores]
        assert len(scores) == 8 and record["score_mean"] == pytest.approx(
            statistics.fmean(combined), abs=1e-4
        )
        assert record["score_std"] == pytest.approx(statistics.pstdev(combined), abs=1e-4)
        assert record["score_variance"] == pytest.approx(
            statistics.fmean(map(statistics.pvariance, scores)), abs=1e-4
        )
        for i, of_member in enumerate(zip(*scores)):
            assert record[f"score/seed_{i}"] == pytest.approx(statistics.fmean(of_member), abs=1e-4)
        if step == 1:  # no KL yet: the reward of a sequence is what the objective says
            assert record["reward"] == pytest.approx(statistics.fmean(combined), abs=1e-4)


def test_the_objective_changes_the_training(base, runs):
    assert runs["mean", 1] == runs["wco", 1] == runs["uwo", 1]  # the first rollout is the same
    rows = {objective: metrics(base / objective) for objective in ("mean", "wco", "uwo")}
    saved = {objective: weights(base / objective) for objective in rows}
    for a, b in (("mean", "wco"), ("mean", "uwo"), ("wco", "uwo")):
        assert (
            rows[a][1]["score/seed_1"] == rows[b][1]["score/seed_1"]
            and rows[a][1]["score_mean"] != rows[b][1]["score_mean"]
        )
        assert rows[a][1]["policy_loss"] != rows[b][1]["policy_loss"]
        assert sum(not saved[a][name].equal(saved[b][name]) for name in saved[a]) > 20


def test_uwo_with_lambda_0_is_the_mean(base, runs, tmp_path):
    train_policy(base, tmp_path / "run", objective="uwo", uwo_lambda=0.0)
    assert_bit_equal(base / "mean", tmp_path / "run")


def test_an_ensemble_of_one(base, tmp_path):
    """Its worst case, its mean and its uncertainty-weighted score are its score."""
    for objective in ("mean", "wco", "uwo"):
        records = train_policy(
            base,
            tmp_path / objective,
            reward_model=[f"{base}/rm/seed_1"],
            objective=objective,
            steps=1,
        )
    assert_bit_equal(tmp_path / "mean", tmp_path / "wco")
    assert_bit_equal(tmp_path / "mean", tmp_path / "uwo")
    assert not {"score_variance", "eval/variance"} & records[1].keys() and not any(
        "score/" in name for name in records[1]
    )


def test_members_of_all_kinds(base, tmp_path):
    """A model, a function, and one of the same name in another file: whole paths tell them apart. Scores by hand."""
    (tmp_path / "rewards.py").write_text(REWARDS.replace("endswith", "startswith"))
    specs = [f"{base}/rm/seed_2", f"{base}/rewards.py:ends", f"{tmp_path}/rewards.py:ends"]
    records = train_policy(
        base, tmp_path / "run", reward_model=specs, objective="wco", steps=1, eval_every=0
    )
    rows = read_rows(tmp_path / "run/eval/step_1.jsonl")
    expected = []
    for row in rows:
        model = plain_score(specs[0], row["prompt_ids"] + row["response_ids"])
        scores = [model, float(row["response"][-1:] == "e"), float(row["response"][:1] == "e")]
        assert row["scores"] == pytest.approx(dict(zip(specs, scores)), abs=1e-4)
        expected.append(min(scores))
    assert_statistics(records[1], "eval/proxy", expected)
    assert f"score/{specs[1]}" in records[1] and f"eval/score/{specs[2]}" in records[1]


@pytest.mark.parametrize("before_the_end", [3, 9])
def test_an_ensemble_killed_and_resumed(base, runs, tmp_path, monkeypatch, before_the_end):
    with monkeypatch.context() as patch:
        counter = KillAt(patch)
        train_policy(base, tmp_path / "counted", objective="wco")
    with monkeypatch.context() as patch:
        kill = KillAt(patch, counter.count - before_the_end)
        with pytest.raises(Killed):
            train_policy(base, tmp_path / "run", objective="wco")
    print("killed at", kill.at)
    assert os.listdir(tmp_path / "run/checkpoint") and not (tmp_path / "run/summary.json").exists()
    cli.run(train_ppo.Config, train_ppo.main, ["--output_dir", f"{tmp_path}/run", "--resume"])
    assert_bit_equal(base / "wco", tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------- two processes


def drive(base, folder, jobs):
    """Several mains in one process, with a record of which member was trained by which."""
    train = train_rm.train

    def recorded(config, dist):
        (Path(folder) / f"member_{config.seed}_by_{os.environ['RANK']}").touch()
        return train(config, dist)

    train_rm.train = recorded
    for script, settings in jobs:
        module = {"rm": train_rm, "ppo": train_ppo}[script]
        module.main(module.Config(**settings))
    distributed.shutdown()


@pytest.fixture(scope="module")
def two(base):
    """In two processes: rm/seed_0 to seed_2, a PPO run against base's members, and gold for it."""
    folder = base / "two"
    folder.mkdir()
    jobs = [
        ("rm", rm(base, output_dir=f"{folder}/rm/seed_{{seed}}", members=3)),
        ("ppo", ppo(base, output_dir=f"{folder}/ppo", objective="uwo")),
        ("ppo", {"score_gold": f"{folder}/ppo", "gold_model": f"{base}/rewards.py:words"}),
    ]
    join(
        *ranks(2, drive, base, folder, jobs, STDERR=f"{folder}/stderr", CALLS=f"{folder}/gold_by_")
    )
    return folder


@pytest.mark.slow
def test_members_spread_over_two_processes(base, two):
    assert sorted(path.name for path in two.glob("member_*")) == [
        "member_0_by_0",
        "member_1_by_1",
        "member_2_by_0",
    ]
    for seed in SEEDS:
        assert_bit_equal(base / f"rm/seed_{seed}", two / f"rm/seed_{seed}")


@pytest.mark.slow
def test_an_ensemble_on_two_processes(base, with_gold, two):
    assert_close_runs(with_gold, two / "ppo")
    for step in (0, 1, 2):
        rows, others = (
            read_rows(folder / f"eval/step_{step}.jsonl") for folder in (with_gold, two / "ppo")
        )
        assert [(r["response_ids"], r["gold"]) for r in rows] == [
            (r["response_ids"], r["gold"]) for r in others
        ]
    assert [path.name for path in two.glob("gold_by_*")] == ["gold_by_0"] and (
        two / "gold_by_0"
    ).read_text() == "7\n" * 3


# ---------------------------------------------------------------------------------------------------------------- gold afterwards


@pytest.fixture(scope="module")
def with_gold(base):
    """base/uwo's run once more, with gold at every evaluation."""
    train_policy(base, base / "with_gold", objective="uwo", gold_model=f"{base}/rewards.py:words")
    return base / "with_gold"


@pytest.fixture
def finished(base, runs, tmp_path, monkeypatch):
    """A copy of base/uwo, a run without gold, and an empty working directory."""
    shutil.copytree(base / "uwo", tmp_path / "run")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "run"


def score_gold(run, spec, *args):
    """train_ppo.py --score_gold; it trains nothing and makes no other folder. -> the run's summary"""
    cli.run(
        train_ppo.Config,
        train_ppo.main,
        ["--score_gold", str(run), "--gold_model", str(spec), *args],
    )
    assert os.listdir(".") == []
    return json.loads((run / "summary.json").read_text())


def assert_same_gold(run, with_gold, spec):
    """Evaluations, metrics and summary as of the run that had its gold all along."""
    assert metrics(run) == metrics(with_gold)
    for step in (0, 1, 2):
        assert (run / f"eval/step_{step}.jsonl").read_bytes() == (
            with_gold / f"eval/step_{step}.jsonl"
        ).read_bytes()
    summary, other = (
        json.loads((folder / "summary.json").read_text()) for folder in (run, with_gold)
    )
    assert (
        summary.pop("gold_model") == spec
        and summary == other
        and "gold" in summary["before"]
        and "gold_se" in summary["after"]
    )


def test_gold_afterwards_is_gold_at_once(base, finished, with_gold):
    spec, before = f"{base}/rewards.py:words", hashes(finished)
    assert "eval/gold" not in metrics(finished)[0]
    score_gold(finished, spec)
    assert_same_gold(finished, with_gold, spec)
    golds = [
        len(row["response"].split()) / 3 - len(row["prompt"])
        for row in read_rows(finished / "eval/step_2.jsonl")
    ]
    assert_statistics(metrics(finished)[2], "eval/gold", golds)
    after = hashes(finished)
    assert after.keys() == before.keys()
    assert all(
        after[name] == before[name]
        for name in before
        if not name.startswith(("eval/", "metrics", "summary", "samples"))
    )


def test_a_gold_model_reads_the_sampled_ids(base, finished, tmp_path):
    """It shares the policy's tokenizer: what is lost by decoding, and an end that was cut off, must not change its score."""
    score_gold(finished, base / "rm/seed_2", "--micro_batch_size", "3")
    train_policy(base, tmp_path / "with_gold", objective="uwo", gold_model=f"{base}/rm/seed_2")
    tokenizer, lost, cut = world.tokenizer(), 0, 0
    for step in (0, 1, 2):
        for row, other in zip(
            *(
                read_rows(folder / f"eval/step_{step}.jsonl")
                for folder in (finished, tmp_path / "with_gold")
            )
        ):
            expected = plain_score(base / "rm/seed_2", row["prompt_ids"] + row["response_ids"])
            assert row["gold"] == pytest.approx(expected, abs=1e-4) and row[
                "gold"
            ] == pytest.approx(row["scores"]["seed_2"], abs=1e-4)
            assert row.pop("gold") == pytest.approx(other.pop("gold"), abs=1e-5) and row == other
            again = tokenizer(row["response"]).input_ids
            cut += row["response_ids"][-1] != tokenizer.eos_token_id
            if row["response_ids"] not in (again, [*again, tokenizer.eos_token_id]):
                lost += (
                    abs(plain_score(base / "rm/seed_2", row["prompt_ids"] + again) - expected)
                    > 0.01
                )
    assert lost > 3 and 3 < cut < 18
    for row, other in zip(metrics(finished), metrics(tmp_path / "with_gold")):
        assert row == pytest.approx(other, abs=1e-5) and row["eval/gold"] == pytest.approx(
            row["eval/score/seed_2"], abs=1e-5
        )


@pytest.mark.parametrize("write", [1, 2, 3, 4, 5])
def test_gold_killed_between_files(base, finished, with_gold, monkeypatch, write):
    """Three evaluations, the metrics, the summary: after a kill at any of them the same command ends the same."""
    spec = f"{base}/rewards.py:words"
    with monkeypatch.context() as patch:
        kill = KillAt(patch, write)
        with pytest.raises(Killed):
            score_gold(finished, spec)
    name = ["step_0.jsonl", "step_1.jsonl", "step_2.jsonl", "metrics.jsonl", "summary.json"][
        write - 1
    ]
    assert kill.at == f"write {write}: replace {name}"
    score_gold(finished, spec)
    assert_same_gold(finished, with_gold, spec)
    assert not list(finished.rglob("*.tmp"))


def test_gold_of_all_splits(base, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    settings, spec = (
        {"eval_splits": ["test", f"more={base}/prompts.jsonl"], "steps": 1, "ppo_epochs": 1},
        f"{base}/rewards.py:words",
    )
    for name, gold in (("without", ""), ("with", spec)):
        train_policy(base, tmp_path / name, gold_model=gold, **settings)
    summary = score_gold(tmp_path / "without", spec)
    assert (
        metrics(tmp_path / "without") == metrics(tmp_path / "with")
        and "more/gold_se" in metrics(tmp_path / "with")[1]
    )
    for path in ("eval/step_1.jsonl", "eval_more/step_0.jsonl", "eval_more/step_1.jsonl"):
        assert (tmp_path / "without" / path).read_bytes() == (tmp_path / "with" / path).read_bytes()
    assert {
        **json.loads((tmp_path / "with/summary.json").read_text()),
        "gold_model": spec,
    } == summary


def test_gold_is_added_once(base, finished, with_gold, capfd):
    spec = f"{base}/rewards.py:words"
    score_gold(finished, spec)
    for run in (finished, with_gold):
        before = hashes(run)
        stops(
            capfd,
            train_ppo,
            ["--score_gold", run, "--gold_model", spec],
            str(run),
            "has its gold scores already",
        )
        assert hashes(run) == before


@pytest.mark.parametrize("args, words", [
    ([], ["name its gold reward with --gold_model"]),
    (["--dataset", "mine.jsonl"], ["name its gold reward with --gold_model"]),
    (["--gold_model", "nowhere.py:f"], ["nowhere.py: no such file"]),
    (["--gold_model", "nowhere.tsv"], ["nowhere.tsv: no such file"]),
    (["--gold_model", "./nowhere"], ["./nowhere: no such model folder"]),
    (["--gold_model", "BASE/lm"], ["BASE/lm", "score.weight"]),  # a policy
    (["--gold_model", "BASE/rewards.py:fails"], ["rewards.py:fails raised KeyError"]),
])  # fmt: skip
def test_no_gold_to_add(base, finished, capfd, args, words):
    before, args = hashes(finished), [arg.replace("BASE", str(base)) for arg in args]
    stops(
        capfd,
        train_ppo,
        ["--score_gold", finished, *args],
        *(word.replace("BASE", str(base)) for word in words),
    )
    assert hashes(finished) == before and os.listdir(".") == []


@pytest.mark.parametrize("what, words", [
    ("missing", ["no finished PPO run here", "config.json"]),
    ("unfinished", ["no finished PPO run here", "summary.json"]),
    ("no metrics", ["no finished PPO run here", "metrics.jsonl"]),
    ("no answers", ["eval/step_0.jsonl: no such file"]),
    ("a reward model", ["no finished PPO run here"]),
])  # fmt: skip
def test_no_run_to_add_gold_to(base, finished, capfd, what, words):
    if what == "unfinished":
        (finished / "summary.json").unlink()
    elif what == "no metrics":
        (finished / "metrics.jsonl").unlink()
    elif what == "no answers":
        (finished / "eval/step_0.jsonl").unlink()
    else:
        shutil.rmtree(finished)
        if what == "a reward model":
            shutil.copytree(base / "rm/seed_0", finished)
    before = hashes(finished)
    stops(
        capfd,
        train_ppo,
        ["--score_gold", finished, "--gold_model", f"{base}/rewards.py:words"],
        str(finished),
        *words,
    )
    assert hashes(finished) == before and os.listdir(".") == []


def spoil(path, change):
    """One JSON value in a file, or in the second line of a .jsonl file, changed in place by change(value)."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    value = json.loads(lines[-1])
    lines[-1] = json.dumps(change(value))
    path.write_text("\n".join(lines) + "\n")


DAMAGE = {  # what is wrong with a finished run: (file, what is done to its value or to its last row, what is said)
    "a summary that is a list": ("summary.json", lambda x: [x], "not a JSON object"),
    "a summary of null": ("summary.json", lambda x: {**x, "before": None}, "no finished PPO run here"),
    "settings that are a list": ("config.json", lambda x: [x], "not a JSON object"),
    "splits that are numbers": ("config.json", lambda x: {**x, "eval_splits": [5]}, "eval_splits cannot be [5]"),
    "splits that are a number": ("config.json", lambda x: {**x, "eval_splits": 5}, "eval_splits cannot be 5"),
    "a split that is not there": ("config.json", lambda x: {**x, "eval_splits": ["test", "ood"]}, "no such file"),
    "metrics of another step": ("metrics.jsonl", lambda x: {**x, "step": 9}, "step_9.jsonl: no such file"),
    "metrics without a step": ("metrics.jsonl", lambda x: {k: v for k, v in x.items() if k != "step"}, "step is missing"),
    "answers without ids": ("eval/step_2.jsonl", lambda x: {**x, "response_ids": None}, "step_2.jsonl:7: not the line"),
    "answers without tokens": ("eval/step_2.jsonl", lambda x: {**x, "response_ids": []}, "step_2.jsonl:7: not the line"),
    "ids in text": ("eval/step_2.jsonl", lambda x: {**x, "prompt_ids": ["1"]}, "step_2.jsonl:7: not the line"),
    "ids that are no tokens": ("eval/step_2.jsonl", lambda x: {**x, "prompt_ids": [10**6]}, "step_2.jsonl:7: not the line"),
    "ids below zero": ("eval/step_2.jsonl", lambda x: {**x, "prompt_ids": [-1]}, "step_2.jsonl:7: not the line"),
    "a response that is a number": ("eval/step_2.jsonl", lambda x: {**x, "response": 3}, "step_2.jsonl:7: not the line"),
    "a row that is a number": ("eval/step_2.jsonl", lambda x: 3, "step_2.jsonl:7: not the line"),
    "a row that is missing": ("eval/step_2.jsonl", None, "step_2.jsonl: 6 answers, and 7 in metrics.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_gold_for_a_damaged_run(base, finished, capfd, damage):
    """Nothing is written, into whole files neither."""
    name, change, words = DAMAGE[damage]
    if change:
        spoil(finished / name, change)
    else:
        (finished / name).write_bytes(
            (finished / name).read_bytes()[:-20]
        )  # a power cut, without fsync
    before = hashes(finished)
    stops(
        capfd,
        train_ppo,
        ["--score_gold", finished, "--gold_model", f"{base}/rewards.py:words"],
        words,
    )
    assert hashes(finished) == before


def test_gold_for_a_run_without_evaluations(base, finished, capfd):
    (finished / "metrics.jsonl").write_text('{"step": 0}\n')
    stops(
        capfd,
        train_ppo,
        ["--score_gold", finished, "--gold_model", f"{base}/rewards.py:words"],
        "no evaluation in it",
    )

"""The three training scripts as runs: what they write, what does not change the result (ranks, micro-batches, kills), what every option does.

Most runs are calls of main(Config(...)) on the embedded world; processes are real where ranks and kills are the point. Everything
runs on one thread, here as in the processes, so that 'bit for bit' can be asked for.
"""

import json
import math
import os
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import (
    SCRIPTS,
    assert_close_runs,
    command_line,
    drive,
    flags,
    forks,
    join,
    metrics,
    ranks,
    read_rows,
    small,
    train,
    weights,
    write_rows,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import train_ppo
import train_rm
import train_sft
from nanorlhf import evaluation, rollout, stages, world
from nanorlhf import ppo as ppo_maths
from nanorlhf.errors import InputError
from nanorlhf.models import load_policy
from nanorlhf.runtime import cli, distributed
from nanorlhf.runtime.help import help_text
from nanorlhf.scoring import Scoring
from nanorlhf.splits import load_splits

# ----------------------------------------------------------------------------------------------------------------------- helpers


def ppo(base, folder, **changes):
    return train(base, "ppo", folder, **changes)


forks.set_forkserver_preload(
    ["test_scripts", "transformers.models.gpt_neox.modeling_gpt_neox", "torch.distributed.fsdp"]
)


# ------------------------------------------------------------------------------------------------------------- the run folders


def test_sft_folder(base):
    folder = base / "sft"
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".png") == [
        "config.json",
        "metrics.jsonl",
        "model",
        "samples.jsonl",
        "summary.json",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["steps"] == 20 and config["lr"] == 3e-3 and config["dataset"] == "world"
    )  # given and default settings
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 21)) and rows[-1]["loss"] < rows[0][
        "loss"
    ] - 0.5
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["eval/perplexity"] == rows[-1]["eval/perplexity"]
    samples = read_rows(folder / "samples.jsonl")
    assert (
        len(samples) == 4
        and set(samples[0]) == {"step", "prompt", "response"}
        and samples[0]["step"] == 20
    )

    # Perplexity and accuracy again, by plain transformers, one demonstration at a time.
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    _, held_out, _ = load_splits(
        train_sft.Config(output_dir=str(folder), eval_size=16, eval_splits=["test", "ood"]), "sft"
    )
    for label, part in held_out.items():
        nll, correct, n = 0.0, 0, 0
        for row in part:
            prompt = tokenizer(row["prompt"]).input_ids
            answer = tokenizer(row["response"]).input_ids + [tokenizer.eos_token_id]
            with torch.no_grad():
                logits = (
                    model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
                )
            nll -= logits.log_softmax(-1)[range(len(answer)), answer].sum().item()
            correct += (logits.argmax(-1) == torch.tensor(answer)).sum().item()
            n += len(answer)
        assert summary[f"{label}/n_tokens"] == n and summary[f"{label}/n_rows"] == len(part) == 16
        assert summary[f"{label}/perplexity"] == pytest.approx(math.exp(nll / n), rel=1e-4)
        assert summary[f"{label}/accuracy"] == pytest.approx(correct / n, abs=1.5 / n)


def test_the_samples_prompts_keep_their_bos(base, monkeypatch):
    """A prompt that is cut for the sake of a short context still begins with the tokenizer's BOS, where it has one."""
    tokenizer, seen = AutoTokenizer.from_pretrained(base / "sft/model"), []
    tokenizer.bos_token = "review"
    generate = train_sft.generate
    monkeypatch.setattr(
        train_sft,
        "generate",
        lambda policy, ids, *args, **kwargs: (
            seen.append(ids) or generate(policy, ids, *args, **kwargs)
        ),
    )
    config = train_sft.Config(output_dir="x", n_samples=1, max_new_tokens=4)
    policy, dist = (
        load_policy(f"{base}/sft", value_head=False),
        distributed.Dist(0, 1, torch.device("cpu")),
    )
    train_sft.sample(
        policy, [{"prompt": "review the hotel last week :"}], tokenizer, 7, config, dist
    )
    assert tokenizer.batch_decode(seen[0]) == ["review week :"]


def test_rm_folder(base):
    folder = base / "rm"
    names = {p.name for p in folder.iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "model",
        "summary.json",
    } <= names and "checkpoint" not in names
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 7)) and rows[0]["loss"] == pytest.approx(
        math.log(2), abs=0.3
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert (
        summary["eval/n_pairs"] == 32
        and summary["eval/n_texts"] == 64
        and -1 <= summary["eval/gold_kendall_tau"] <= 1
    )

    # Plain transformers give the scores up to the constant mean, for padded rows too (pad is not EOS here).
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    tokenizer.padding_side = "right"
    _, splits, _ = load_splits(
        train_rm.Config(output_dir=str(folder), eval_size=32, eval_splits=["test", "ood"]), "pairs"
    )
    for label, held_out in splits.items():
        texts = [
            f"{row['prompt']} {row[side]} <eos>"
            for side in ("chosen", "rejected")
            for row in held_out
        ]
        with torch.no_grad():
            scores = (
                model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0].double()
                - model.config.reward_mean
            )
        if label == "eval":
            assert scores.mean().item() == pytest.approx(
                0, abs=1e-3
            ) and scores.std().item() == pytest.approx(1, abs=1e-3)
        margin = scores[:32] - scores[32:]
        assert summary[f"{label}/accuracy"] == pytest.approx((margin > 0).double().mean().item())
        assert summary[f"{label}/margin"] == pytest.approx(margin.mean().item(), abs=1e-3)
        lengths = [[len(row[side].split()) for row in held_out] for side in ("chosen", "rejected")]
        longer, same = (sum(f(c, r) for c, r in zip(*lengths)) for f in (int.__gt__, int.__eq__))
        assert summary[f"{label}/longer_wins"] == pytest.approx((longer + same / 2) / 32)
        assert summary[f"{label}/shorter_wins"] == pytest.approx(
            1 - summary[f"{label}/longer_wins"]
        )
        tau = [summary[f"{label}/gold_kendall_{x}"] for x in ("tau", "p")]
        golds = world.gold(
            [row["prompt"] for row in held_out * 2],
            [row[side] for side in ("chosen", "rejected") for row in held_out],
        )
        pairs = [
            (scores[i] - scores[j]).item() * (golds[i] - golds[j])
            for i in range(64)
            for j in range(i)
        ]
        assert (
            tau[0] == pytest.approx(sum(x > 0 for x in pairs) / len(pairs) * 2 - 1, abs=0.02)
            and 0 < tau[1] <= 1
        )  # few ties


# spec/ppo.md, 'What to log each step'
LOGGED = """score_mean score_std reward kl kl_k3 kl_coef entropy ratio_mean ratio_max clip_fraction approx_kl policy_loss value_loss
    explained_variance advantage_mean advantage_std grad_norm lr length eos_rate seconds_rollout seconds_score seconds_update
    tokens_per_second peak_memory_mb first_ratio_error""".split()


def test_ppo_folder(base, tmp_path, capsys, pictures, monkeypatch):
    folder, evaluated, roll_out = tmp_path / "ppo", [], rollout.roll_out

    def recorded(policy, prompts, place, step, *rest):
        rollout, answers = roll_out(policy, prompts, place, step, *rest)
        if step == 0:  # evaluations
            evaluated.append(answers.batch)
        return rollout, answers

    monkeypatch.setattr(evaluation, "roll_out", recorded)
    ppo(
        base,
        folder,
        reward_model=[f"{base}/rm"],
        steps=3,
        eval_every=2,
        eval_size=8,
        eval_splits=["ood", "test"],
    )
    printed = capsys.readouterr().out
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert set(LOGGED) <= set(row) and all(math.isfinite(value) for value in row.values())
        assert row["first_ratio_error"] <= 1e-5 and row["approx_kl"] > 1e-5  # the policy does move
        assert (
            row["ratio_max"] >= 1
            and 0 < row["entropy"] < math.log(len(world.vocabulary()))
            and 1 <= row["length"] <= 12
        )
    assert (
        abs(rows[1]["kl"]) < 1e-4
        and abs(rows[1]["explained_variance"]) < 1e-6
        and rows[3]["kl_k3"] > 1e-3
    )  # starts at the reference
    assert rows[1]["peak_memory_mb"] > 50 and rows[1]["tokens_per_second"] > 1

    for label, split, answers_in in (
        ("test", "test", folder / "eval_test"),
        ("eval", "ood", folder / "eval"),
    ):
        assert [p.name for p in sorted(answers_in.iterdir())] == [
            "step_0.jsonl",
            "step_2.jsonl",
            "step_3.jsonl",
        ]
        for step in (0, 2, 3):
            answers = read_rows(answers_in / f"step_{step}.jsonl")
            keys = {"prompt", "response", "scores", "gold", "prompt_ids", "response_ids"}
            assert len(answers) == 8 and all(set(row) == keys for row in answers)
            assert {row["prompt"] for row in answers} <= {
                row["prompt"] for row in world.prompts(split)
            }
            golds = world.gold(
                [row["prompt"] for row in answers], [row["response"] for row in answers]
            )
            assert [row["gold"] for row in answers] == pytest.approx(golds, abs=1e-5)
            proxies = torch.tensor([row["scores"]["rm"] for row in answers], dtype=torch.float64)
            assert rows[step][f"{label}/proxy"] == pytest.approx(proxies.mean().item())
            assert rows[step][f"{label}/proxy_se"] == pytest.approx(proxies.std().item() / 8**0.5)
            assert (
                rows[step][f"{label}/gold"] == pytest.approx(sum(golds) / 8, abs=1e-5)
                and rows[step][f"{label}/gold_n"] == 8
            )
    samples = read_rows(folder / "samples.jsonl")
    assert [row["step"] for row in samples] == [0] * 3 + [2] * 3 + [3] * 3
    assert samples[-1]["response"] == answers[2]["response"] and samples[0]["response"] in printed

    # The reward model's scores again by plain transformers, one answer at a time.
    model = AutoModelForSequenceClassification.from_pretrained(base / "rm/model")
    for i, row in enumerate(answers):
        ids = row_ids(evaluated[-2], i)  # the last evaluation's first split
        if (
            ids[0, -1] != model.config.pad_token_id
        ):  # plain transformers look for the last token that is not padding
            with torch.no_grad():
                score = model(ids).logits[0, 0].item() - model.config.reward_mean
            assert row["scores"]["rm"] == pytest.approx(score, abs=1e-4)

    summary = json.loads((folder / "summary.json").read_text())
    assert (
        summary["steps"] == 3
        and summary["after"]["gold"] == rows[3]["eval/gold"]
        and summary["before"]["gold"] == rows[0]["eval/gold"]
    )
    assert (
        summary["before"]["test/gold"] == rows[0]["test/gold"]
        and f"test/gold  {rows[0]['test/gold']:6.2f}" in printed
    )
    policy = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert policy.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape == (
        1,
        4,
    )
    assert load_file(folder / "model/value_head.safetensors")["weight"].abs().sum() > 0
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert not (folder / "curves.png").exists()
        return
    picture = (folder / "curves.png").read_bytes()
    assert (
        picture[:8] == b"\x89PNG\r\n\x1a\n" and picture[-8:-4] == b"IEND" and len(picture) > 10_000
    )


def test_no_arguments_trains_what_is_missing(tmp_path, monkeypatch):
    """Scripts with defaults: what they start from comes first, by its own script and that script's defaults."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def fake(name):
        def main(config):
            calls.append((name, config.output_dir, config.model, config.dataset, config.steps))

        return main

    monkeypatch.setattr(train_sft, "main", fake("sft"))
    monkeypatch.setattr(train_rm, "main", fake("rm"))
    sft = ("sft", "runs/sft", "world", "world", 400)
    both = ("model", "reward_model")
    stages.train_what_is_missing(train_ppo.Config(), *both)
    assert calls == [sft, ("rm", "runs/rm/seed_0", "runs/sft", "world", 100)]
    stages.train_what_is_missing(train_ppo.Config(model="mine", dataset="world:3"), *both)
    assert calls[2:] == [("rm", "runs/rm/seed_0", "runs/sft", "world:3", 100)]
    stages.train_what_is_missing(train_rm.Config(), "model")
    assert calls[3:] == [sft]
    stages.train_what_is_missing(train_ppo.Config(model="mine", reward_model=["mine.py:f"]), *both)
    stages.train_what_is_missing(train_ppo.Config(dataset="mine.jsonl"), *both)
    assert len(calls) == 4


def test_a_reward_model_on_an_empty_machine(tmp_path, monkeypatch):
    """python train_rm.py trains runs/sft first; members on one process do so once."""
    monkeypatch.chdir(tmp_path)
    real, trained = train_sft.main, []

    def short(config):
        trained.append(config.output_dir)
        return real(train_sft.Config(steps=1, batch_size=4, eval_size=4))

    monkeypatch.setattr(train_sft, "main", short)
    train_rm.main(train_rm.Config(members=2, steps=1, batch_size=2, eval_size=8))
    assert trained == ["runs/sft"]
    assert sorted(os.listdir("runs/rm")) == ["seed_0", "seed_1"]


def put_run(folder, finished, **settings):
    """A run folder with these settings and no more in it than what is read of it."""
    Path(folder).mkdir(parents=True)
    (Path(folder) / "config.json").write_text(json.dumps(settings))
    if finished:
        (Path(folder) / "summary.json").write_text("{}")


def test_a_run_of_ones_own_in_a_default_folder(tmp_path, monkeypatch, capsys):
    """A finished one is used as it is, and said to be; one that is not finished is an error that names the settings and the way on."""
    monkeypatch.chdir(tmp_path)
    trained = []
    monkeypatch.setattr(train_sft, "main", lambda config: trained.append("sft"))
    monkeypatch.setattr(train_rm, "main", lambda config: trained.append("rm"))
    put_run(
        "runs/sft",
        True,
        **vars(train_sft.Config(steps=33, lr=0.001, output_dir="elsewhere", device="cuda")),
    )
    put_run("runs/rm/seed_0", True, **vars(train_rm.Config(label_noise=0.25, micro_batch_size=2)))
    stages.train_what_is_missing(train_ppo.Config(), "model", "reward_model")
    said = capsys.readouterr().out.splitlines()
    assert not trained and len(said) == 2
    assert said[0].startswith("runs/sft is done already and used as it is") and said[0].endswith(
        ": steps 33, lr 0.001"
    )
    assert said[1].startswith("runs/rm/seed_0 is done already and used as it is") and said[
        1
    ].endswith(": label_noise 0.25")

    # The reward model was trained on another SFT policy than the one that is there now.
    shutil.rmtree("runs/rm")
    Path("runs/sft/model").mkdir()
    Path("runs/sft/model/config.json").write_text("{}")
    inputs = {"runs/sft/model": {"digest": "of another policy", "size": 1, "mtime": 1}}
    put_run("runs/rm/seed_0", True, **vars(train_rm.Config()), inputs=inputs)
    stages.train_what_is_missing(train_ppo.Config(), "model", "reward_model")
    said = capsys.readouterr().out.splitlines()
    assert not trained
    assert (
        said[1]
        == "runs/rm/seed_0 is done already and used as it is: runs/sft/model has changed since"
    )

    shutil.rmtree("runs/rm")
    put_run("runs/rm/seed_0", False, **vars(train_rm.Config(label_noise=0.25)))
    with pytest.raises(
        InputError,
        match=r"runs/rm/seed_0.*not finished.*label_noise 0.25.*--resume --output_dir runs/rm/seed_0",
    ):
        stages.train_what_is_missing(train_ppo.Config(), "model", "reward_model")
    shutil.rmtree("runs")
    put_run(
        "runs/sft", False, **vars(train_sft.Config())
    )  # the default settings: it is gone on with
    stages.train_what_is_missing(train_ppo.Config(), "model", "reward_model")
    assert trained == ["sft", "rm"]


@pytest.mark.parametrize("content", ["[]", '"steps"', "7", "null", "{", '{"steps": [4]}', '{"betas": 3}', '{"betas": ["a"]}', '{"lr": "1"}',
                                     '{"steps": 4.5}', '{"steps": true}', '{"resume": 1}', '{"model": null}', "[" * 100_000])  # fmt: skip
def test_a_damaged_config_of_a_run(tmp_path, content, capsys):
    put_run(tmp_path / "run", False)
    (tmp_path / "run/config.json").write_text(content)
    for args in (["--resume"], ["--lr", "1e-3"]):
        if args != ["--resume"] and content.startswith('{"'):
            continue  # without --resume a setting of another type is another setting
        with pytest.raises(SystemExit) as exit_:
            cli.run(
                train_ppo.Config, train_ppo.main, ["--output_dir", str(tmp_path / "run"), *args]
            )
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and len(error.splitlines()) == 1 and "config.json" in error


# --------------------------------------------------------------------------------------------- the same result, however it is split


@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_micro_batches_and_dropout(base, tmp_path, kind, capsys):
    """What the help says: with dropout, of a model or of LoRA, results do change. PPO's do not: test_dropout_is_off."""
    runs = {
        "model": {"model": f"{base}/dropout"},
        "lora": {"model": f"{base}/sft", "lora_rank": 2, "lora_dropout": 0.3},
    }
    for name, settings in runs.items():
        for size in (8, 3):
            train(
                base,
                kind,
                tmp_path / f"{name}_{size}",
                **settings,
                steps=2,
                lr=1e-2,
                micro_batch_size=size,
            )
        a, b = (metrics(tmp_path / f"{name}_{size}") for size in (8, 3))
        at = 1 if name == "lora" else 0  # an adapter starts as no change at all
        assert abs(a[at]["loss"] - b[at]["loss"]) > 1e-3
    with pytest.raises(SystemExit):
        cli.run(SCRIPTS[kind].Config, SCRIPTS[kind].main, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--micro_batch_size", "--tokens_per_micro_batch"):
        shown = text[text.rindex(f"{flag} ") :].split(" (default", 1)[0]
        assert "dropout" in shown and "results too" in shown


@pytest.mark.parametrize(
    "settings", [{"model": "dropout"}, {"lora_rank": 2, "lora_dropout": 0.3}], ids=["model", "lora"]
)
def test_ppo_has_no_dropout_that_micro_batches_could_change(base, tmp_path, settings):
    settings = {
        name: f"{base}/{value}" if name == "model" else value for name, value in settings.items()
    }
    for size in (8, 3):
        ppo(base, tmp_path / f"{size}", **settings, steps=2, micro_batch_size=size)
    assert_close_runs(tmp_path / "8", tmp_path / "3")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_fewer_held_out_rows_than_processes(base, tmp_path, kind):
    settings = (
        small(base, kind, eval_size=1, steps=1, max_new_tokens=4)
        if kind != "rm"
        else small(base, kind, eval_size=1, steps=1)
    )
    join(*ranks(2, drive, tmp_path, [(kind, settings)], STDERR=str(tmp_path / "stderr")))
    assert (tmp_path / kind / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("gold", ["world:gold", "rewards.py:the", "rm"])
def test_gold_of_fewer_texts_than_processes(base, tmp_path, gold):
    """One held-out pair is two texts: of three processes one has none to score."""
    gold = gold if gold == "world:gold" else f"{base}/{gold}"
    settings = small(base, "rm", eval_size=1, steps=1, batch_size=6, gold_model=gold)
    join(*ranks(3, drive, tmp_path, [("rm", settings)], STDERR=str(tmp_path / "stderr")))
    summary = json.loads((tmp_path / "rm/summary.json").read_text())
    assert summary["eval/n_texts"] == 2 and "eval/gold_kendall_tau" in summary


@pytest.mark.slow
def test_an_error_on_one_rank_only(base, tmp_path):
    settings = small(base, "ppo", reward_model=[f"{base}/rewards.py:fails_on_rank_1"])
    processes = ranks(
        2,
        command_line,
        "ppo",
        "--output_dir",
        str(tmp_path / "ppo"),
        *flags(settings),
        STDERR=str(tmp_path / "stderr"),
    )
    for process in processes:
        process.join(60)
    errors = "".join((tmp_path / f"stderr_{rank}").read_text() for rank in range(2))
    assert [process.exitcode for process in processes] == [2, 2]
    assert "a text that only rank 1 has" in errors and "Traceback" not in errors


# --------------------------------------------------------------------------------------------------------------- kill and resume


# --------------------------------------------------------------------------------------------------------------------- run again


# ------------------------------------------------------------------------------------------------------------ the options of PPO


@pytest.fixture(scope="module")
def plain_run(base, tmp_path_factory):
    """A PPO run with no options, reward `the`: what an option is compared with."""
    folder = tmp_path_factory.mktemp("plain")
    ppo(base, folder)
    return folder


@pytest.fixture(scope="module")
def plain(plain_run):
    """The rows of its metrics."""
    return metrics(plain_run)


@pytest.fixture
def seen(monkeypatch):
    """What goes on inside a PPO run: seen['experience'] = [(experience, answers, scores, finished, independent KLs)] a step."""
    record, scores = {"experience": [], "optimizer_steps": 0}, []
    real = train_ppo.experience, Scoring.read, train_ppo.optimizer_step

    def experience(parts, scaler, rollout, answers, kl_coef):
        kls, last_values = (
            plain_kls(parts.policy, parts.reference, answers.batch),
            plain_last_values(parts.policy, answers.batch),
        )
        x, numbers = real[0](parts, scaler, rollout, answers, kl_coef)
        record["experience"].append(
            {
                "x": x,
                "scores": scores[-1][0],
                "finished": rollout.finished,
                "kls": kls,
                "last_values": last_values,
            }
        )
        return x, numbers

    def read(*args):
        readings = real[1](*args)
        scores.append(readings["member_scores"].T)
        return readings

    def optimizer_step(*args):
        record["optimizer_steps"] += 1
        return real[2](*args)

    monkeypatch.setattr(train_ppo, "experience", experience)
    monkeypatch.setattr(Scoring, "read", read)
    monkeypatch.setattr(train_ppo, "optimizer_step", optimizer_step)
    return record


def row_ids(batch, i):
    return batch.ids[i : i + 1, : int(batch.lengths[i])]  # [1, T] without padding


@torch.no_grad()
def plain_kls(policy, reference, batch):
    """The mean over sequences of each kind of summed token KL, by plain forwards of the LMs, one row at a time, in float64."""
    sums = dict.fromkeys(("k1", "k2", "k3", "full"), 0.0)
    for i in range(len(batch)):
        ids, first = row_ids(batch, i), int(batch.prompt_lengths[i])
        logp, ref = (
            p.lm(ids).logits[0, first - 1 : -1].double().log_softmax(-1)
            for p in (policy, reference)
        )  # [R, V]
        at = ids[0, first:, None]
        d = (logp - ref).gather(1, at)[:, 0]
        sums["k1"] += d.sum().item()
        sums["k2"] += (d**2 / 2).sum().item()
        sums["k3"] += ((-d).exp() - 1 + d).sum().item()
        sums["full"] += (logp.exp() * (logp - ref)).sum().item()
    return {name: value / len(batch) for name, value in sums.items()}


@torch.no_grad()
def plain_last_values(policy, batch):
    """The value head on the last token of every row, one row at a time."""
    trunk = policy.value_trunk if policy.value_trunk is not None else policy.lm.base_model
    return torch.stack(
        [
            policy.value_head(trunk(row_ids(batch, i)).last_hidden_state[0, -1])[0]
            for i in range(len(batch))
        ]
    )


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "full"])
def test_kl_in_the_reward(base, tmp_path, seen, kind):
    rows = ppo(base, tmp_path / "run", kl_kind=kind, kl_coef=0.7, lr=2e-3)
    kls = seen["experience"][1]["kls"]  # before the second update
    assert len({round(value, 4) for value in kls.values()}) == 4 and kls["full"] > 0.05
    assert rows[2]["score_mean"] - rows[2]["reward"] == pytest.approx(0.7 * kls[kind], rel=1e-3)
    assert rows[2]["kl"] == pytest.approx(kls["k1"], rel=1e-3) and rows[2][
        "kl_k3"
    ] == pytest.approx(kls["k3"], rel=1e-3)


@pytest.mark.parametrize("kind", ["k2", "full"])
def test_kl_in_the_loss(base, tmp_path, monkeypatch, kind):
    """loss = policy + vf_coef value + kl_coef KL, the last by plain forwards; and no penalty in the reward."""
    errors, sizes, loss_of = [], [], train_ppo.loss_of

    def checked(parts, batch, x, at, n_tokens, kl_coef):
        loss, stats = loss_of(parts, batch, x, at, n_tokens, kl_coef)
        kl = plain_kls(parts.policy, parts.reference, batch)[kind] * len(batch) / n_tokens.item()
        errors.append((loss - stats["policy_loss"] - 0.5 * stats["value_loss"]).item() - 3.0 * kl)
        sizes.append(3.0 * kl)
        return loss, stats

    monkeypatch.setattr(train_ppo, "loss_of", checked)
    rows = ppo(base, tmp_path / "run", kl_in="loss", kl_kind=kind, kl_coef=3.0, lr=2e-3)
    assert len(errors) == 8 and max(map(abs, errors)) < 1e-4 and max(sizes) > 0.05
    assert all(row["reward"] == pytest.approx(row["score_mean"], rel=1e-5) for row in rows[1:])
    assert rows[1]["first_ratio_error"] <= 1e-5


def test_a_further_kl_kind_is_one_line(base, tmp_path, monkeypatch, seen):
    """In ppo.py's table alone: the flag and its help know it, reward and loss use it. Here x^2, twice k2, at half its coefficient."""
    monkeypatch.setitem(ppo_maths.KL_ESTIMATES, "square", lambda x: x.square())
    config = runpy.run_path(train_ppo.__file__)["Config"]  # as a new process reads it
    assert "--kl_kind {k1,k2,k3,square,full}" in help_text("train_ppo.py", "", config)
    monkeypatch.setattr(train_ppo, "Config", config)

    rows = ppo(base, tmp_path / "reward", kl_kind="square", kl_coef=0.35, lr=2e-3)
    kls = seen["experience"][1]["kls"]  # before the second update
    assert rows[2]["score_mean"] - rows[2]["reward"] == pytest.approx(
        0.35 * 2 * kls["k2"], rel=1e-3
    )
    ppo(base, tmp_path / "square", kl_in="loss", kl_kind="square", kl_coef=1.5, lr=2e-3)
    ppo(base, tmp_path / "k2", kl_in="loss", kl_kind="k2", kl_coef=3.0, lr=2e-3)
    ours, theirs = (
        weights(tmp_path / kind) for kind in ("square", "k2")
    )  # a factor of 2 rounds nothing
    assert all(ours[name].equal(theirs[name]) for name in theirs)

    # What it may be used for stands beside it.
    monkeypatch.setattr(ppo_maths, "KL_WITHOUT_GRADIENT", ("k1", "square"))
    with pytest.raises(InputError, match="--kl_in loss: square's gradient"):
        train_ppo.Config(kl_in="loss", kl_kind="square")


def test_adaptive_kl(base, tmp_path):
    rows = ppo(base, tmp_path / "run", steps=3, lr=2e-3, kl_coef=0.5, kl_target=0.5, kl_horizon=80)
    coefs = [0.5]
    for row in rows[1:]:
        assert row["kl_coef"] == pytest.approx(coefs[-1])
        coefs.append(coefs[-1] * (1 + min(max(row["kl"] / 0.5 - 1, -0.2), 0.2) * 8 / 80))
    assert coefs[1] == pytest.approx(0.5 * 0.98) and len(set(coefs)) == 4


def test_target_kl_ends_the_epochs(base, tmp_path, seen):
    counts = []
    for target in (0.0, 1e-9, 1e9):
        seen["optimizer_steps"] = 0
        ppo(base, tmp_path / f"run_{target}", steps=1, ppo_epochs=3, target_kl=target)
        counts.append(seen["optimizer_steps"])
    assert counts == [6, 2, 6]


def test_score_clip(base, tmp_path):
    rows = ppo(
        base,
        tmp_path / "run",
        reward_model=[f"{base}/rewards.py:seven"],
        score_clip=1.5,
        kl_coef=0.0,
    )
    assert [(row["score_mean"], row["reward"]) for row in rows[1:]] == [(7, 1.5)] * 2


@pytest.mark.parametrize("kind", ["running", "first"])
def test_score_scaling(base, tmp_path, seen, kind):
    rows = ppo(base, tmp_path / "run", score_scaling=kind, kl_coef=0.0)
    first, second = (e["scores"].double() for e in seen["experience"])
    std = {"running": torch.cat([first, second]).std(), "first": first.std()}[kind].item()
    assert rows[1]["reward"] == pytest.approx(first.mean().item() / first.std().item(), rel=1e-5)
    assert rows[2]["reward"] == pytest.approx(second.mean().item() / std, rel=1e-5)


@pytest.mark.parametrize("options", [{"missing_eos_penalty": 3.0}, {"eos_required": True}, {"eos_required": True, "missing_eos_penalty": 3.0},
                                     {"length_penalty": 0.25}])  # fmt: skip
def test_endings_and_lengths(base, tmp_path, seen, options):
    rows = ppo(base, tmp_path / "run", kl_coef=0.0, steps=1, **options)
    e = seen["experience"][0]
    expected = []
    for score, finished, length in zip(
        e["scores"].tolist(), e["finished"].tolist(), e["x"].mask.sum(1).tolist()
    ):
        if not finished and options.get("eos_required"):
            score = 0.0
        expected.append(
            score
            - options.get("missing_eos_penalty", 0) * (not finished)
            - options.get("length_penalty", 0) * length
        )
    assert 0 < rows[1]["eos_rate"] < 1 and abs(rows[1]["reward"] - rows[1]["score_mean"]) > 0.05
    assert rows[1]["reward"] == pytest.approx(sum(expected) / 8, rel=1e-5)


def test_bootstrap_truncated(base, tmp_path, seen):
    """With gamma = lambda = 1 and no KL a token's return is the score, plus the value after the end where the response was cut off."""
    for on in (False, True):
        seen["experience"].clear()
        ppo(
            base,
            tmp_path / f"run_{on}",
            bootstrap_truncated=on,
            lam=1.0,
            kl_coef=0.0,
            lr=3e-3,
            micro_batch_size=3,
        )
        e = seen["experience"][1]  # at the first rollout every value is 0
        cut = ~e["finished"]
        assert 0 < cut.sum() < 8 and e["last_values"].abs().min() > 1e-3
        expected = (e["scores"] + (e["last_values"] * cut if on else 0))[:, None] * e[
            "x"
        ].mask  # [B, R]
        torch.testing.assert_close(e["x"].returns, expected, rtol=1e-4, atol=1e-4)


def test_entropy_bonus(base, tmp_path):
    rows, without = (
        ppo(base, tmp_path / f"run_{c}", ent_coef=c, steps=3, lr=2e-3) for c in (5.0, 0.0)
    )
    assert (
        rows[1]["entropy"] == without[1]["entropy"]
        and rows[3]["entropy"] > without[3]["entropy"] + 0.05
    )


def test_entropy_bonus_at_a_low_temperature(base, tmp_path):
    """Most probabilities are too small for float32: a run goes on, whether or not its reference is charged in full."""
    for name, settings in {"k1": {}, "full": {"kl_kind": "full", "kl_in": "loss"}}.items():
        rows = ppo(base, tmp_path / name, ent_coef=0.01, temperature=0.02, **settings)
        assert len(rows) == 3 and all(
            math.isfinite(value) for row in rows for value in row.values()
        )


@pytest.mark.parametrize("source", ["sft", "rm"])
def test_value_model(base, tmp_path, seen, source):
    rows = ppo(
        base, tmp_path / "run", value_model=f"{base}/{source}", lr=1e-3, bootstrap_truncated=True
    )
    assert rows[1]["first_ratio_error"] <= 1e-5 and rows[1]["explained_variance"] == 0
    saved, start = (
        load_file(tmp_path / "run/model/value_model/model.safetensors"),
        load_file(base / source / "model/model.safetensors"),
    )
    start = {name.removeprefix("gpt_neox."): tensor for name, tensor in start.items()}
    moved = [
        name for name in saved if not saved[name].equal(start[name])
    ]  # it started from `source`, and was trained
    assert len(moved) > len(saved) / 2
    assert all((saved[name] - start[name]).abs().max() < 8 * 1e-3 + 1e-6 for name in saved)
    policy = load_policy(str(tmp_path / "run"))
    assert all(
        tensor.equal(saved[name]) for name, tensor in policy.value_trunk.state_dict().items()
    )
    # The values are the separate trunk's: rerun its forward on what was sampled at step 2.
    assert seen["experience"][1]["x"].values.abs().max() > 1e-3


@pytest.mark.parametrize("kind", SCRIPTS)
def test_freeze_layers(base, tmp_path, kind):
    train(base, kind, tmp_path / "run", model=f"{base}/sft", freeze_layers=0.5, steps=2)
    before, after = (
        load_file(base / "sft/model/model.safetensors"),
        load_file(tmp_path / "run/model/model.safetensors"),
    )
    frozen = [
        name
        for name in before
        if any(part in name for part in ("embed_in", "layers.0.", "layers.1."))
    ]
    assert len(frozen) == 25 and all(
        before[name].equal(after[name]) for name in frozen
    )  # bit for bit
    trained = [
        name
        for name in after
        if any(part in name for part in ("layers.2.", "layers.3.", "final_layer_norm"))
    ]
    assert len(trained) == 26 and not any(before[name].equal(after[name]) for name in trained)


def test_a_frozen_trunk_that_runs_once_changes_nothing(base, tmp_path, monkeypatch):
    """Against a run in which every forward goes through all blocks, with every way in which a reference or a value is asked for."""
    for i, settings in enumerate(
        [
            {},
            {"kl_kind": "full"},
            {"kl_kind": "full", "kl_in": "loss"},
            {"bootstrap_truncated": True},
        ]
    ):
        settings |= {"freeze_layers": 0.5, "steps": 2, "eval_every": 1}
        shared = ppo(base, tmp_path / f"shared_{i}", **settings)
        with monkeypatch.context() as m:
            m.setattr("nanorlhf.hf.blocks.FrozenTrunk.same", lambda *args: False)
            ppo(base, tmp_path / f"whole_{i}", **settings)
        assert_close_runs(tmp_path / f"shared_{i}", tmp_path / f"whole_{i}")
        assert max(row["first_ratio_error"] for row in shared[1:]) <= 1e-5


def test_bfloat16(base, tmp_path, plain, monkeypatch):
    rows = ppo(base, tmp_path / "run", dtype="bfloat16", steps=3)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[1]["entropy"] != plain[1]["entropy"] and rows[1]["entropy"] == pytest.approx(
        plain[1]["entropy"], rel=0.02
    )
    recomputed = max(row["first_ratio_error"] for row in rows[1:])
    assert recomputed <= 1e-5  # old log-probs come from the same batch forward, not from the decode
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())


def test_dropout_is_off(base, tmp_path):
    rows = ppo(base, tmp_path / "run", model=f"{base}/dropout")
    assert all(row["first_ratio_error"] <= 1e-5 for row in rows[1:]) and abs(rows[1]["kl"]) < 1e-4


def test_temperature(base, tmp_path, plain):
    rows = ppo(base, tmp_path / "run", temperature=0.5)
    assert rows[1]["entropy"] < plain[1]["entropy"] - 0.3
    assert (
        all(row["first_ratio_error"] <= 1e-5 for row in rows[1:]) and abs(rows[1]["kl"]) < 1e-4
    )  # in all log-probs alike


def test_max_prompt_length(base, tmp_path, plain, plain_run):
    rows = ppo(base, tmp_path / "run", max_prompt_length=2, gold_model=f"{base}/rewards.py:words")
    cut, whole = (
        read_rows(folder / "eval/step_0.jsonl") for folder in (tmp_path / "run", plain_run)
    )
    assert [row["prompt"] for row in cut] == [
        " ".join(row["prompt"].split()[-2:]) for row in whole
    ]  # the left side is cut, and this is logged
    assert rows[1]["entropy"] != plain[1]["entropy"] and rows[1]["first_ratio_error"] <= 1e-5


def test_learning_rate_schedule(base, tmp_path, plain):
    assert [row["lr"] for row in plain[1:]] == [3e-4] * 2
    rows = ppo(
        base,
        tmp_path / "run",
        steps=4,
        ppo_epochs=1,
        minibatch_size=8,
        lr=4e-4,
        schedule="linear",
        final_lr=0.0,
        warmup=2,
    )
    assert [row["lr"] for row in rows[1:]] == pytest.approx([2e-4, 4e-4, 4e-4, 2e-4])


def test_jsonl_prompts_and_a_python_reward(base, tmp_path):
    """Prompts of one's own, the columns renamed; the function sees the texts that are logged."""
    rows = [
        {"question": row["prompt"], "id": i} for i, row in enumerate(world.prompts("train")[:40])
    ]
    write_rows(tmp_path / "mine.jsonl", rows)
    result = ppo(
        base,
        tmp_path / "run",
        dataset=f"{tmp_path}/mine.jsonl",
        columns=["prompt=question"],
        eval_size=5,
    )
    answers = read_rows(tmp_path / "run/eval/step_2.jsonl")
    assert len(answers) == 5 and {row["prompt"] for row in answers} <= {
        row["question"] for row in rows
    }
    for row in answers:
        words = row["response"].split()
        assert (
            row["scores"]
            == {"rewards.py:the": pytest.approx(words.count("the") - 0.3 * len(words), abs=1e-5)}
            and row["gold"] is None
        )
    assert "eval/gold" not in result[0]


def test_lexicon_reward(base, tmp_path):
    (tmp_path / "words.tsv").write_text("the\t2.5\t0.1\textra\nwas\t-1\n\n")
    ppo(base, tmp_path / "run", reward_model=[f"{tmp_path}/words.tsv"], eval_size=8)
    answers = read_rows(tmp_path / "run/eval/step_0.jsonl")
    expected = [
        (2.5 * row["response"].split().count("the") - row["response"].split().count("was")) / 5
        for row in answers
    ]
    assert [row["scores"]["words.tsv"] for row in answers] == pytest.approx(
        expected, abs=1e-5
    ) and len(set(expected)) > 2


def test_seed(base, tmp_path, plain):
    assert ppo(base, tmp_path / "same") == plain
    other = ppo(base, tmp_path / "other", seed=1)
    assert all(a["score_mean"] != b["score_mean"] for a, b in zip(other[1:], plain[1:]))


# ---------------------------------------------------------------------------------------------- the options of the reward model


def test_label_noise_and_score_l2(base, tmp_path):
    clean, flipped, half, other_half, penalised = (
        train(base, "rm", tmp_path / str(i), **options)[0]
        for i, options in enumerate([
            {}, {"label_noise": 1.0}, {"label_noise": 0.5}, {"label_noise": 0.5, "noise_seed": 1}, {"score_l2": 0.5},
        ])
    )  # fmt: skip
    assert (
        clean["margin"] == pytest.approx(-flipped["margin"], rel=1e-4)
        and abs(clean["margin"]) > 1e-3
    )  # before the first update
    assert abs(half["margin"]) != pytest.approx(abs(clean["margin"]), rel=1e-3)
    assert half["margin"] != pytest.approx(
        other_half["margin"], rel=1e-3
    )  # other labels are flipped
    assert penalised["loss"] > clean["loss"] + 0.01 and penalised["accuracy"] == clean["accuracy"]


def test_equal_pairs_are_skipped_and_counted(base, tmp_path, capsys):
    rows = read_rows(base / "pairs.jsonl")
    rows[3]["rejected"] = rows[3]["chosen"]
    write_rows(tmp_path / "pairs.jsonl", rows)
    train(base, "rm", tmp_path / "rm", dataset=f"{tmp_path}/pairs.jsonl", steps=1)
    assert "1 with chosen == rejected skipped" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------------ named splits


@pytest.mark.parametrize("kind", ["sft", "dpo", "rm", "ppo"])
def test_further_splits_change_nothing(base, tmp_path, kind):
    """The first split, here a file, is evaluated as it was alone; the same file as another split gives the same numbers."""
    script, files = (
        "sft" if kind == "dpo" else kind,
        {"sft": "sft", "dpo": "pairs", "rm": "pairs", "ppo": "prompts"},
    )
    rows = read_rows(base / f"{files[kind]}.jsonl")
    write_rows(tmp_path / "a.jsonl", rows[:5])
    write_rows(tmp_path / "b.jsonl", rows[5:8])
    settings = {
        "dataset": f"{base}/{files[kind]}.jsonl",
        "eval_dataset": f"{tmp_path}/a.jsonl",
        "model": f"{base}/sft",
    }
    settings |= {"eval_every": 1, "steps": 2}
    settings |= {"loss": "dpo"} if kind == "dpo" else {}
    alone = train(base, script, tmp_path / "alone", **settings)
    named = ["test", f"same={tmp_path}/a.jsonl", f"other={tmp_path}/b.jsonl"]
    records = train(base, script, tmp_path / "named", eval_splits=named, **settings)
    assert len(records) == len(alone)
    for record, was in zip(records, alone):
        parts = (
            {k.removeprefix(label): v for k, v in record.items() if k.startswith(label)}
            for label in ("eval/", "same/", "other/")
        )
        mine, same, other = parts
        assert {k: v for k, v in record.items() if not k.startswith(("same/", "other/"))} == was
        assert mine == same and mine.keys() == other.keys() and (mine != other or not mine)
    assert any("same/" in name for record in records for name in record)
    x, y = weights(tmp_path / "alone"), weights(tmp_path / "named")
    assert all(x[name].equal(y[name]) for name in x)
    if kind != "rm":
        assert (tmp_path / "alone/samples.jsonl").read_bytes() == (
            tmp_path / "named/samples.jsonl"
        ).read_bytes()
    summary = json.loads((tmp_path / "named/summary.json").read_text())
    if kind != "ppo":
        assert (
            summary["same/accuracy"] == summary["eval/accuracy"]
            and summary["same/accuracy_se"] != summary["other/accuracy_se"]
        )
        return
    for step in (0, 1, 2):
        text = (tmp_path / f"alone/eval/step_{step}.jsonl").read_bytes()
        assert all(
            (tmp_path / f"named/{folder}/step_{step}.jsonl").read_bytes() == text
            for folder in ("eval", "eval_same")
        )
    assert (
        summary["after"]["same/proxy"]
        == summary["after"]["proxy"]
        != summary["after"]["other/proxy"]
    )

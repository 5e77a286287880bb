"""Feature control of PPO and its reference data, as runs of the scripts on tiny random models.

What a run wrote down (token ids of every held-out answer) is read again, one answer at a time, and R put together by Python's own
statistics. The density ratio meets rollouts of Gaussians, whose ratio is known.

    N texts, M features, d latents whose density is compared
"""

import copy
import json
import math
import os
import shutil
import signal
import statistics
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import (
    MU,
    REPO,
    STD,
    assert_bit_equal,
    assert_close_runs,
    flags,
    fork,
    hashes,
    join,
    log_ratio_of_gaussians,
    ranks,
    read_rows,
    sampling_error,
    write_rows,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPTNeoXConfig

import probe
import train_ppo
import train_rm
from nanorlhf import data, scoring, world
from nanorlhf.control import controlled_scoring, human_latents
from nanorlhf.control.feature_reader import WithSAE
from nanorlhf.interp.sae_files import save_sae
from nanorlhf.models import load_reward_model, load_tokenizer
from nanorlhf.packing import pack
from nanorlhf.runtime import cli, distributed
from nanorlhf.sae import TopKSAE
from nanorlhf.sarm import SARM, save_sarm

M, K, D = 24, 8, 32


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch):
    """A density ratio that counts early."""
    monkeypatch.setattr(controlled_scoring, "WARM_UP", 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """lm/, sarm/, other/ (another SARM), rm/ (a reward model) and sae/ on its layer 0; prompts and texts; human latents of both."""
    root = tmp_path_factory.mktemp("control")
    ids = {word: i for i, word in enumerate(world.vocabulary())}
    special = {
        "bos_token_id": ids["<eos>"],
        "eos_token_id": ids["<eos>"],
        "pad_token_id": ids["<pad>"],
    }
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(GPTNeoXConfig(
        vocab_size=len(ids), hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64,
        **special,
    ))  # fmt: skip
    for p in lm.gpt_neox.parameters():
        if p.dim() > 1:
            p.data.mul_(4)  # else all texts would have the same latents
    bias = lm.gpt_neox.final_layer_norm.bias.data.normal_()
    lm.get_output_embeddings().weight.data[ids["<eos>"]] += (
        2 * bias / bias.square().sum()
    )  # some answers end, some are cut off
    lm.save_pretrained(root / "lm")
    world.tokenizer().save_pretrained(root / "lm")
    for seed, name in enumerate(("sarm", "other")):
        config = AutoConfig.from_pretrained(root / "lm")
        config.sarm_param = {"sae_source_layer": 1, "sae_latent_size": M, "sae_k": K, "sae_use_sequence_level": True,
                             "sarm_use_activation": True}  # fmt: skip
        sarm = SARM(
            AutoModel.from_pretrained(root / "lm"),
            TopKSAE(D, M, K, normalize="token", relu=False, seed=seed),
            config,
        )
        torch.nn.init.normal_(sarm.score.weight)
        save_sarm(sarm, load_tokenizer(str(root / "lm")), str(root / name))
    write_rows(root / "sft.jsonl", world.demonstrations(90))
    write_rows(root / "pairs.jsonl", world.preferences(60))
    write_rows(root / "prompts.jsonl", world.prompts("train")[::6])
    settings = {
        "model": f"{root}/lm",
        "dataset": f"{root}/pairs.jsonl",
        "steps": 2,
        "batch_size": 8,
        "eval_size": 8,
    }
    train_rm.main(train_rm.Config(output_dir=f"{root}/rm", **settings))
    save_sae(
        TopKSAE(D, M, K, normalize="token", seed=3),
        root / "sae",
        model=f"{root}/rm",
        layer=0,
        site="residual",
    )
    for name, args in SPECS.items():
        read_humans(root, name, root / f"{name}.safetensors")
        read_humans(root, name, root / f"{name}_two.safetensors", features="3,1")
    (root / "rewards.py").write_text(
        "def good(prompts, responses): return [1.0] * len(responses)\n"
    )
    return root


SPECS = {"sarm": {"reward_model": "sarm"}, "dense": {"reward_model": "rm", "sae": "sae"}}


def read_humans(base, name, path, **changes):
    places = {flag: f"{base}/{value}" for flag, value in SPECS[name].items()}
    settings = {
        "dataset": f"{base}/sft.jsonl",
        "output": str(path),
        "max_rows": 70,
        **places,
        **changes,
    }
    return human_latents.human_latents(human_latents.HumanLatentsConfig(**settings))


def settings_of(base, name="sarm", **changes):
    """The settings of a small PPO run."""
    places = {
        "reward_model": [f"{base}/{SPECS[name]['reward_model']}"],
        "feature_sae": f"{base}/sae" if name == "dense" else "",
    }
    return {"model": f"{base}/lm", "dataset": f"{base}/prompts.jsonl", "steps": 2, "batch_size": 8, "minibatch_size": 4, "ppo_epochs": 1,
            "max_new_tokens": 10, "eval_size": 7, "eval_every": 0, "lr": 2e-3, **places, **changes}  # fmt: skip


def train(base, folder, **changes):
    train_ppo.main(train_ppo.Config(output_dir=str(folder), **settings_of(base, **changes)))
    return read_rows(folder / "metrics.jsonl")


def one_by_one(base, name, rows, edits=None):
    """(scores, latents [N][M], scores of edited latents) of token rows (prompt, response), each read alone."""
    if name == "sarm":
        module = SARM.from_pretrained(f"{base}/sarm")
    else:
        sae = TopKSAE(D, M, K, normalize="token", seed=3)
        module = WithSAE(load_reward_model(f"{base}/rm"), sae, (0, "residual")).eval()
    readings = [module.read(pack([prompt], [response]), None, edits) for prompt, response in rows]
    return (
        [r.scores.item() for r in readings],
        [r.latents[0].tolist() for r in readings],
        [r.edited.item() for r in readings],
    )


# --------------------------------------------------------------------------------------------------------------- human latents


@pytest.mark.parametrize("name", SPECS)
def test_human_latents_one_text_at_a_time(base, name):
    """All that fire on any of the texts; or those that are asked for, in that order."""
    tokenizer = load_tokenizer(f"{base}/lm")
    prompts, responses, _ = data.encode(
        tokenizer, data.subset(data.read_rows(f"{base}/sft.jsonl", "sft"), 70), "response"
    )
    scores, latents, _ = one_by_one(base, name, zip(prompts, responses))
    fire = [i for i in range(M) if any(row[i] for row in latents)]
    assert 5 < len(fire) < M and len({round(x, 3) for x in scores}) > 20
    places = [
        f"{base}/{SPECS[name].get(flag, '')}" if SPECS[name].get(flag) else ""
        for flag in ("reward_model", "sae")
    ]
    for file, features in ((f"{name}.safetensors", fire), (f"{name}_two.safetensors", [3, 1])):
        human = human_latents.load(f"{base}/{file}", *places)
        assert human.features == features and human.complete == (features == fire)
        torch.testing.assert_close(
            human.latents, torch.tensor(latents)[:, features], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(human.scores, torch.tensor(scores), rtol=1e-4, atol=1e-4)
    silent = next(i for i in range(M) if i not in fire)
    assert (
        human_latents.load(f"{base}/{name}.safetensors", *places).column(silent).tolist()
        == [0.0] * 70
    )
    with pytest.raises(ValueError, match=f"no latents of feature {silent} "):
        human.column(silent)


def test_the_chosen_side_of_pairs_and_cut_texts(base, tmp_path):
    read_humans(
        base,
        "sarm",
        tmp_path / "pairs.safetensors",
        dataset=f"{base}/pairs.jsonl",
        kind="pairs",
        max_rows=0,
        max_length=20,
    )
    tokenizer, rows = load_tokenizer(f"{base}/lm"), data.read_rows(f"{base}/pairs.jsonl", "pairs")
    texts = [
        (
            tokenizer(r["prompt"]).input_ids,
            tokenizer(r["chosen"]).input_ids + [tokenizer.eos_token_id],
        )
        for r in rows
    ]
    texts = [(p[-(20 - len(r)) :] if len(r) < 20 else p[-1:], r[:19]) for p, r in texts]
    scores, _, _ = one_by_one(base, "sarm", texts)
    assert load_file(tmp_path / "pairs.safetensors")["scores"].tolist() == pytest.approx(
        scores, abs=1e-4
    )


@pytest.mark.slow
def test_two_processes_read_the_same(base, tmp_path):
    join(*ranks(2, read_humans, base, "sarm", tmp_path / "two.safetensors"))
    one, two = load_file(base / "sarm.safetensors"), load_file(tmp_path / "two.safetensors")
    assert one["features"].equal(two["features"])
    torch.testing.assert_close(one["latents"], two["latents"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one["scores"], two["scores"], rtol=1e-5, atol=1e-5)


def test_the_command(base, tmp_path, capsys):
    args = flags(
        {
            "reward_model": base / "sarm",
            "dataset": base / "sft.jsonl",
            "max_rows": 70,
            "output": tmp_path / "a/b.safetensors",
        }
    )
    cli.run_command(probe.COMMANDS, ["human_latents", *args])
    assert "70 texts (0 cut)" in capsys.readouterr().out and os.listdir(tmp_path / "a") == [
        "b.safetensors"
    ]
    assert (tmp_path / "a/b.safetensors").read_bytes() == (base / "sarm.safetensors").read_bytes()


# ----------------------------------------------------------------------------------------------------------- what is optimised


CASES = {
    "indicator": {
        "penalize_features": 3,
        "tau": ["0.1", "q0.6", "q0.95"],
        "alpha": ["0.7", "0.5std", "2std"],
    },
    "hinge": {
        "penalize_features": 3,
        "tau": ["0.1", "q0.6", "q0"],
        "alpha": ["0.7", "0.5std", "2std"],
        "penalty": "hinge",
    },
    "clamp": {"clamp": ["{0}:max:0.2", "{1}:set:-0.5", "{2}:min:0.3"]},
    "both": {"penalize_features": 1, "tau": ["0.2"], "alpha": ["1.5"], "clamp": ["{0}:set:0"]},
    "density": {"density_beta": 0.5},
}


def case(base, name, what):
    """A case's settings, with features that fire on some texts and not on others; a clamped one is penalised for what it is unclamped."""
    human = load_file(base / f"{name}.safetensors")
    rates = (human["latents"] != 0).float().mean(0)
    features = human["features"][(rates - 0.5).abs().argsort()[:3]].tolist()
    settings = dict(CASES[what])
    if "penalize_features" in settings:
        settings["penalize_features"] = features[: settings["penalize_features"]]
    if "clamp" in settings:
        settings["clamp"] = [text.format(*features) for text in settings["clamp"]]
    if what == "density" or any(x[0] == "q" for x in settings.get("tau", [])):
        settings["human_latents"] = (
            f"{base}/{name}{'_two' if what == 'density' else ''}.safetensors"
        )
    return settings


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("what", CASES)
def test_r_of_each_answer_by_hand(base, tmp_path, name, what):
    """R = score(clamp(z)) - penalties(z) - density, of every held-out answer; and the means that are logged."""
    settings = case(base, name, what)
    features, penalty = settings.get("penalize_features", []), settings.get("penalty", "indicator")
    metrics = train(base, tmp_path / "run", name=name, steps=3, **settings)
    human = load_file(base / f"{name}.safetensors")
    std = statistics.stdev(human["scores"].tolist())
    tau, alpha = [], []
    for i, t, a in zip(features, settings.get("tau", []), settings.get("alpha", [])):
        column = human["latents"][:, human["features"].tolist().index(i)].tolist()
        tau.append(float(np.quantile(column, float(t[1:]))) if t[0] == "q" else float(t))
        alpha.append(float(a[:-3]) * std if a.endswith("std") else float(a))
    edits = {
        int(i): (op, float(v))
        for i, op, v in (text.split(":") for text in settings.get("clamp", []))
    }
    lm_reward = SPECS[name]["reward_model"]
    for record, step in ((metrics[0], 0), (metrics[-1], 3)):
        rows = read_rows(tmp_path / f"run/eval/step_{step}.jsonl")
        scores, latents, edited = one_by_one(
            base, name, [(r["prompt_ids"], r["response_ids"]) for r in rows], edits
        )
        expected, costs = list(edited), {i: [] for i in features}
        for n, z in enumerate(latents):
            for i, t, a in zip(features, tau, alpha):
                costs[i].append(
                    a * (z[i] > t) if penalty == "indicator" else a * max(0.0, z[i] - t)
                )
                expected[n] -= costs[i][-1]
        assert [r["scores"][lm_reward] for r in rows] == pytest.approx(scores, abs=1e-4)
        assert record["eval/proxy"] == pytest.approx(statistics.mean(scores), abs=1e-4)
        for i in features:
            assert record[f"eval/penalty/{i}"] == pytest.approx(statistics.mean(costs[i]), abs=1e-4)
            assert record[f"eval/feature/{i}"] == pytest.approx(
                statistics.mean(z[i] for z in latents), abs=1e-4
            )
            assert record[f"eval/rate/{i}"] == pytest.approx(
                statistics.mean(z[i] > tau[features.index(i)] for z in latents), abs=1e-6
            )
        for i in edits:
            if i not in features:
                assert record[f"eval/rate/{i}"] == pytest.approx(
                    statistics.mean(z[i] != 0 for z in latents), abs=1e-6
                )
        if edits:
            assert edited != scores and record["eval/clamped"] == pytest.approx(
                statistics.mean(edited), abs=1e-4
            )
        if what == "density":  # the ratio itself: below
            expected = [s - record["eval/density"] for s in expected]
            assert record["eval/controlled"] == pytest.approx(statistics.mean(expected), abs=1e-4)
        else:
            assert [r["scores"]["controlled"] for r in rows] == pytest.approx(expected, abs=1e-4)
            assert record["eval/controlled"] == pytest.approx(statistics.mean(expected), abs=1e-4)
            assert max(abs(a - b) for a, b in zip(expected, scores)) > 0.01 or step  # it is a test
    for record in metrics[1:]:  # the rollouts: how the means hang together
        costs = sum(record[f"penalty/{i}"] for i in features) + record.get("density", 0.0)
        assert record["controlled"] == pytest.approx(
            record.get("clamped", record["score_mean"]) - costs, abs=1e-5
        )


def test_r_takes_the_scores_place(base, tmp_path):
    """Rules on endings and length, scaling and clipping come after it."""
    rules = {"missing_eos_penalty": 0.8, "length_penalty": 0.05, "kl_coef": 0.0}
    for record in train(base, tmp_path / "run", **case(base, "sarm", "both"), **rules)[1:]:
        expected = record["controlled"] - 0.8 * (1 - record["eos_rate"]) - 0.05 * record["length"]
        assert record["reward"] == pytest.approx(expected, abs=1e-5) and 0 < record["eos_rate"] < 1


def test_flags_that_change_nothing_change_nothing(base, tmp_path):
    """Prices of 0 and a cap above everything: the run without flags, to the last bit, and the rates beside it."""
    train(base, tmp_path / "plain")
    rows = train(
        base,
        tmp_path / "zero",
        penalize_features=[3],
        tau=["0.1"],
        alpha=["0"],
        clamp=["5:max:1000"],
    )
    for plain, row in zip(read_rows(tmp_path / "plain/metrics.jsonl"), rows):
        assert all(
            row[name] == value
            for name, value in plain.items()
            if "second" not in name and "memory" not in name
        )
    assert "rate/3" in rows[1] and "rate/5" in rows[1]


# ---------------------------------------------------------------------------------------------------------------- density ratio


def rollout(seed, n=128):
    return MU + STD * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def humans(n=2000):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(10**6))


def test_the_density_ratio_finds_that_of_two_gaussians():
    density = controlled_scoring.Density(humans(), 0)
    assert len(density.held_out) == 400 and len(density.human) == 1600
    records = [density.learn(rollout(i)) for i in range(60)]
    z = torch.cat([rollout(500, 2000), humans(2000)])
    truth, found = log_ratio_of_gaussians(z), density.log_ratio(z).double()
    w = torch.sigmoid(truth) * torch.sigmoid(-truth)
    error = ((w * (found - truth).square()).sum() / w.sum()).sqrt().item()
    assert error < sampling_error(truth, 2 * 128 * controlled_scoring.REPLAY)
    assert (
        found.abs().max() <= controlled_scoring.CLIP
        and density.log_ratio(z * 1000).abs().max() <= controlled_scoring.CLIP
    )
    # The AUC of the true ratio, by Monte Carlo in another way: of how many pairs it orders right.
    a, b = log_ratio_of_gaussians(rollout(501, 2000)), log_ratio_of_gaussians(humans(2000))
    best = (a[:, None] > b).double().mean().item()
    assert (
        records[0]["density_auc"] == 0.5
    )  # nothing learned yet, and the first rollout is judged before it is learned from
    late = statistics.mean(r["density_auc"] for r in records[20:])
    assert (
        late == pytest.approx(best, abs=0.04)
        and records[0]["density_loss"] > records[-1]["density_loss"]
    )


def test_a_rollout_is_judged_before_it_is_learned_from(base):
    config = train_ppo.Config(**settings_of(base, **case(base, "sarm", "density")))
    control = controlled_scoring.prepare(config)
    control.name, control.dist = "sarm", distributed.Dist(0, 1, torch.device("cpu"))
    assert control.features == [3, 1] and control.of_density == [0, 1]
    g = torch.Generator().manual_seed(0)
    for n in range(4):
        latents, clamped = torch.randn(8, 2, generator=g) + 1, torch.randn(8, generator=g)
        before = copy.deepcopy(control.density)
        readings = {"member_scores": clamped[:, None], "latents": latents, "clamped": clamped}
        scored, _ = control.combine(readings), control.learn(readings)
        r, log_ratio = scored.scores, scored.terms["log_ratio"].mean().item()
        x = before.net(latents).detach().clamp(-controlled_scoring.CLIP, controlled_scoring.CLIP)
        torch.testing.assert_close(
            r, clamped - 0.5 * x * (n >= 2), rtol=0, atol=1e-6
        )  # warm-up: two rollouts
        assert log_ratio == pytest.approx(x.mean().item(), abs=1e-6)
        assert not torch.equal(
            control.density.net(latents), before.net(latents)
        )  # and then it has learned
        assert len(control.density.replay) == n + 1 and control.density.replay[-1].equal(latents)


def test_the_replay_forgets():
    density = controlled_scoring.Density(humans(50), 0)
    for i in range(12):
        density.learn(rollout(i, 4))
    assert len(density.replay) == controlled_scoring.REPLAY and density.replay[-1].equal(
        rollout(11, 4)
    )


def test_a_restored_density_goes_on_as_it_was():
    a = controlled_scoring.Density(humans(50), 0)
    for i in range(3):
        a.learn(rollout(i, 8))
    b = controlled_scoring.Density(humans(50), 0)
    b.restore({name: x.clone() for name, x in a.tensors().items()})
    for i in range(3, 6):
        assert a.learn(rollout(i, 8)) == b.learn(rollout(i, 8))
    assert (
        all(x.equal(b.tensors()[name]) for name, x in a.tensors().items())
        and a.tensors().keys() == b.tensors().keys()
    )


def learn_in_shares(path):
    """10 rollouts of Gaussians, this process's share of each gathered: what the first and the last process make of them."""
    dist = distributed.setup("cpu")
    control = controlled_scoring.ControlledScoring.__new__(controlled_scoring.ControlledScoring)
    control.dist, control.of_density, control.density = (
        dist,
        [0, 1],
        controlled_scoring.Density(humans(500), 0),
    )
    for i in range(10):
        z = dist.gather(dist.share(rollout(i, 16)))
        log_ratio = control.log_ratio(z)
        control.density.learn(z)
    save_file({"log_ratio": log_ratio, **control.density.tensors()}, f"{path}_{dist.rank}")


@pytest.mark.slow
def test_one_and_two_processes_learn_the_same_ratio(tmp_path):
    learn_in_shares(tmp_path / "one")
    join(*ranks(2, learn_in_shares, tmp_path / "two"))
    one, first, second = (load_file(tmp_path / name) for name in ("one_0", "two_0", "two_1"))
    for name, x in one.items():
        assert x.equal(first[name]) and x.equal(second[name]), name
    assert one["log_ratio"].std() > 0.1


# ------------------------------------------------------------------------------------------------- ranks, kills, older runs


def everything(base, name="sarm"):
    """All that can be asked for at once, the density of all latents included."""
    features = case(base, name, "both")["penalize_features"]
    return {"penalize_features": features, "tau": ["q0.6"], "alpha": ["0.5std"], "penalty": "hinge", "clamp": ["3:max:0.5", "4:set:0"],
            "density_beta": 0.3, "human_latents": f"{base}/{name}.safetensors"}  # fmt: skip


def run_settings(base, name="sarm", **changes):
    return settings_of(
        base, name, steps=5, eval_every=2, checkpoint_every=2, **everything(base, name), **changes
    )


def command(args):
    controlled_scoring.WARM_UP = 2
    cli.run(train_ppo.Config, train_ppo.main, args)


@pytest.fixture(scope="module")
def whole(base):
    """{name: the folder of a run with everything, in one process}"""
    join(
        *(
            fork(
                command,
                ["--output_dir", f"{base}/whole_{name}", *flags(run_settings(base, name))],
                RANK="0",
            )
            for name in SPECS
        )
    )
    return {name: base / f"whole_{name}" for name in SPECS}


@pytest.mark.slow
def test_everything_at_once(whole):
    for folder in whole.values():
        rows = read_rows(folder / "metrics.jsonl")
        assert [row["density"] != 0 for row in rows[1:]] == [
            False,
            False,
            True,
            True,
            True,
        ]  # warm-up: two rollouts
        assert all(0 <= row["density_auc"] <= 1 and row["density_loss"] > 0 for row in rows[1:])
        assert rows[0]["eval/density"] == 0 != rows[-1]["eval/density"]


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("sarm", "ddp"), ("dense", "fsdp")])
def test_two_processes_change_nothing(base, whole, tmp_path, name, kind):
    settings = run_settings(base, name, distributed=kind)
    join(*ranks(2, command, ["--output_dir", str(tmp_path / "two"), *flags(settings)]))
    assert_close_runs(whole[name], tmp_path / "two", rel=1e-3, atol=1e-4, weights_atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_sigkill_and_resume(base, whole, tmp_path, kind):
    """Killed once its first checkpoint is there, and resumed: as the run that was left alone (FSDP: two processes, up to float error)."""
    args, folder = flags(run_settings(base, distributed=kind)), tmp_path / "killed"

    def start(*more):
        args_ = ["--output_dir", str(folder), *more]
        return ranks(2, command, args_) if kind == "fsdp" else [fork(command, args_, RANK="0")]

    processes = start(*args)
    while processes[0].is_alive() and not (folder / "checkpoint/step_2").exists():
        time.sleep(0.002)
    for process in processes:
        process.kill()
        process.join()
    assert processes[0].exitcode == -signal.SIGKILL and not (folder / "summary.json").exists()
    assert (folder / "checkpoint/step_2/tensors.safetensors").exists()
    join(*start("--resume"))
    if kind == "ddp":
        assert_bit_equal(whole["sarm"], folder)
    else:
        assert_close_runs(whole["sarm"], folder, rel=1e-3, atol=1e-4, weights_atol=1e-3)


def test_a_run_that_is_older_than_the_flags(base, tmp_path, capsys):
    train(base, tmp_path / "run")
    path = tmp_path / "run/config.json"
    stored = json.loads(path.read_text())
    path.write_text(
        json.dumps({name: value for name, value in stored.items() if name not in FLAGS})
    )
    train(base, tmp_path / "run")
    assert "done already" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------- errors


FLAGS = (
    "penalize_features",
    "tau",
    "alpha",
    "penalty",
    "clamp",
    "density_beta",
    "human_latents",
    "feature_sae",
)
ONE = {"penalize_features": [3], "tau": ["0.5"], "alpha": ["1"]}


# Notes of a file of human latents that are none: {name: text}.
NOTES = {"cut": "{", "null": "null", "empty": "{}", "deep": "[" * 10**5, "print": '{"complete": true, "fingerprint": []}',
         "complete": '{"complete": 1, "fingerprint": {}}'}  # fmt: skip


def changed_buffer(base, name, change):
    """A copy of the SARM's human latents, changed. -> its path"""
    with safe_open(base / "sarm.safetensors", "pt") as f:
        notes, tensors = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}
    change(notes, tensors)
    save_file(tensors, base / name, notes)
    return base / name


def write_bad_files(base):
    changed_buffer(base, "no_notes.safetensors", lambda notes, tensors: notes.clear())
    changed_buffer(base, "no_scores.safetensors", lambda notes, tensors: tensors.pop("scores"))
    changed_buffer(
        base,
        "short.safetensors",
        lambda notes, tensors: tensors.update(scores=tensors["scores"][1:]),
    )
    changed_buffer(
        base, "nan.safetensors", lambda notes, tensors: tensors["latents"].fill_(math.nan)
    )
    first_five = lambda notes, tensors: tensors.update(
        {name: tensors[name][:5].clone() for name in ("latents", "scores")}
    )  # noqa: E731
    changed_buffer(base, "few.safetensors", first_five)
    changed_buffer(base, "flat.safetensors", lambda notes, tensors: tensors["scores"].fill_(0.1))
    changed_buffer(base, "twice.safetensors", lambda notes, tensors: tensors["features"].fill_(3))
    changed_buffer(base, "below.safetensors", lambda notes, tensors: tensors["features"].sub_(99))
    for name in ("latents", "scores"):
        to_int = lambda notes, tensors, name=name: tensors.update({name: tensors[name].int()})  # noqa: E731
        changed_buffer(base, f"int_{name}.safetensors", to_int)
    as_float = lambda notes, tensors: tensors.update(features=tensors["features"].float())  # noqa: E731
    changed_buffer(base, "float.safetensors", as_float)
    for name, text in NOTES.items():
        changed_buffer(
            base,
            f"{name}.safetensors",
            lambda notes, tensors, text=text: notes.update(human_latents=text),
        )
    (base / "text.safetensors").write_text("no tensors")
    save_sae(
        TopKSAE(D + 1, M, K, normalize="token"), base / "wide", model="rm", layer=0, site="residual"
    )
    save_sae(
        TopKSAE(D, M, K, normalize="token", seed=9),
        base / "sae_2",
        model="rm",
        layer=0,
        site="residual",
    )
    shutil.copytree(base / "rm", base / "rm_2", dirs_exist_ok=True)


@pytest.mark.parametrize("changes, words", [
    ({"penalize_features": [3, 5], "tau": ["0.5"], "alpha": ["1", "1"]}, ["names 2 features, --tau 1", "--alpha 2"]),
    ({"penalize_features": [3]}, ["names 1 features, --tau 0"]),
    ({"tau": ["1"]}, ["names 0 features, --tau 1"]),
    ({"penalize_features": [3, 3], "tau": ["0.5", "1"], "alpha": ["1", "1"]}, ["a feature twice"]),
    (ONE | {"tau": ["high"]}, ["--tau high: it must be a number such as 0.5 or a quantile"]),
    (ONE | {"tau": ["nan"]}, ["--tau nan"]),
    (ONE | {"tau": ["q1.5"], "human_latents": "sarm.safetensors"}, ["--tau q1.5: a quantile lies between"]),
    (ONE | {"alpha": ["std"]}, ["--alpha std: it must be a number such as 1.0 or in units such as 0.5std"]),
    (ONE | {"alpha": ["-1"]}, ["--alpha -1: a price must be at least 0"]),
    (ONE | {"penalty": "square"}, ["--penalty must be one of indicator, hinge, not 'square'"]),
    (ONE | {"tau": ["q0.9"]}, ["--tau q0.9 compares with reference data", "--human_latents"]),
    (ONE | {"alpha": ["1std"]}, ["--alpha 1std compares with reference data"]),
    (ONE | {"alpha": ["1std"], "human_latents": "flat.safetensors"},
     ["--alpha 1std: the 70 scores in flat.safetensors have no spread to measure a price by"]),
    ({"density_beta": 0.1}, ["--density_beta compares with reference data"]),
    ({"density_beta": -0.1}, ["--density_beta must be at least 0"]),
    ({"density_beta": math.inf, "human_latents": "sarm.safetensors"}, ["--density_beta must be a finite number"]),
    (ONE | {"human_latents": "sarm.safetensors"}, ["--human_latents is there for --tau qSHARE"]),
    ({"feature_sae": "sae"}, ["--feature_sae is there for --penalize_features"]),
    ({"clamp": ["3:max"]}, ["--clamp 3:max: it must be FEATURE:OP:VALUE"]),
    ({"clamp": ["3:+:1"]}, ["--clamp 3:+:1: it must be FEATURE:OP:VALUE with OP one of set, min, max"]),
    ({"clamp": ["x:set:1"]}, ["--clamp x:set:1: it must be"]),
    ({"clamp": ["3:set:x"]}, ["--clamp 3:set:x: it must be FEATURE:OP:VALUE"]),
    ({"clamp": ["3:set:1", "3:max:2"]}, ["--clamp names feature 3 twice"]),
    (ONE | {"penalize_features": [24]}, ["feature 24", "0 to 23"]),
    (ONE | {"penalize_features": [-1]}, ["feature -1", "0 to 23"]),
    ({"clamp": ["99:set:1"]}, ["feature 99", "0 to 23"]),
    (ONE | {"reward_model": ["sarm", "other"]}, ["features are those of one reward model", "names 2"]),
    (ONE | {"reward_model": ["rewards.py:good"]}, ["rewards.py:good is no reward model"]),
    (ONE | {"reward_model": ["rm"]}, ["rm is no SARM: name an autoencoder"]),
    (ONE | {"feature_sae": "sae"}, ["sarm is a SARM", "autoencoder of its own"]),
    (ONE | {"reward_model": ["rm"], "feature_sae": "nowhere"}, ["nowhere: no sparse autoencoder here"]),
    (ONE | {"reward_model": ["rm"], "feature_sae": "wide"}, ["wide: an autoencoder for activations of width 33"]),
    ({"density_beta": 0.1, "human_latents": "nowhere.safetensors"}, ["nowhere.safetensors: no human latents here"]),
    ({"density_beta": 0.1, "human_latents": "text.safetensors"}, ["text.safetensors: cannot be read"]),
    ({"density_beta": 0.1, "human_latents": "no_notes.safetensors"}, ["no_notes.safetensors: not a file of human latents"]),
    ({"density_beta": 0.1, "human_latents": "no_scores.safetensors"}, ["no_scores.safetensors: not a file of human latents"]),
    ({"density_beta": 0.1, "human_latents": "sae/sae_weights.safetensors"}, ["sae_weights.safetensors: not a file of human latents"]),
    ({"density_beta": 0.1, "human_latents": "short.safetensors"}, ["short.safetensors: its tensors do not fit each other"]),
    ({"density_beta": 0.1, "human_latents": "nan.safetensors"}, ["nan.safetensors: latents holds numbers that are not finite"]),
    ({"density_beta": 0.1, "human_latents": "few.safetensors"}, ["few.safetensors: 5 texts", "too few"]),
    *(({"density_beta": 0.1, "human_latents": f"{name}.safetensors"}, [f"{name}.safetensors", words]) for name, words in (
        ("twice", "each of them once"), ("below", "whole numbers from 0"), ("float", "whole numbers from 0"),
        ("int_latents", "latents holds int32"), ("int_scores", "scores holds int32"),
        ("cut", "not JSON"), ("null", "not a JSON object"), ("empty", "complete is missing"), ("deep", "nested too deep"),
        ("print", "fingerprint cannot be []"), ("complete", "complete cannot be 1"),
    )),
    ({"density_beta": 0.1, "human_latents": "sarm.safetensors", "reward_model": ["other"]},
     ["sarm.safetensors: latents by another reward model than other"]),
    ({"density_beta": 0.1, "human_latents": "dense.safetensors"}, ["dense.safetensors: latents by another reward model than sarm"]),
    ({"density_beta": 0.1, "human_latents": "dense.safetensors", "reward_model": ["rm"], "feature_sae": "sae_2"},
     ["dense.safetensors: latents by another autoencoder than rm with sae_2"]),
    (ONE | {"penalize_features": [7], "tau": ["q0.5"], "human_latents": "sarm_two.safetensors"},
     ["sarm_two.safetensors holds no latents of feature 7"]),
])  # fmt: skip
def test_bad_flags_and_files(base, monkeypatch, capfd, changes, words):
    """One line, exit code 2, nothing on disk, and no model was loaded."""
    write_bad_files(base)
    monkeypatch.chdir(base)
    for module, name in (
        (train_ppo, "load_policy"),
        (controlled_scoring, "load_feature_reader"),
        (scoring, "load_rewards"),
    ):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("a model was loaded"))
    before = hashes(base)
    settings = (
        settings_of(".")
        | {"model": "lm", "dataset": "prompts.jsonl", "reward_model": ["sarm"], "feature_sae": None}
        | changes
    )
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.run(
            train_ppo.Config,
            train_ppo.main,
            ["--output_dir", "out", *flags({k: v for k, v in settings.items() if v is not None})],
        )
    error = capfd.readouterr().err
    assert exit_.value.code == 2 and len(error.splitlines()) == 1 and "error: " in error, error
    for word in words:
        assert word in error, error
    assert hashes(base) == before


def test_the_same_model_elsewhere_is_the_same_model(base, tmp_path):
    """A buffer belongs to files, not to the name of their folder."""
    shutil.copytree(base / "sarm", tmp_path / "moved")
    human = human_latents.load(f"{base}/sarm.safetensors", str(tmp_path / "moved"), "")
    assert human.path == f"{base}/sarm.safetensors" and len(human.latents) == 70


@pytest.mark.parametrize(
    "output", ["sft.jsonl", "sarm/model.safetensors", "sae/sae_weights.safetensors", "sarm", "link"]
)
def test_no_other_file_is_written_over(base, tmp_path, monkeypatch, capfd, output):
    """Data, a model's weights, a folder, what a link leads to: before any model is loaded. Its own file is written again."""
    for name in ("sarm", "sae", "sft.jsonl"):
        (shutil.copytree if (base / name).is_dir() else shutil.copy)(base / name, tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "sft.jsonl")
    monkeypatch.chdir(tmp_path)
    before = hashes(tmp_path)
    args = [
        "human_latents",
        *flags({"reward_model": "sarm", "dataset": "sft.jsonl", "max_rows": 70}),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(
            human_latents,
            "load_feature_reader",
            lambda *args, **kwargs: pytest.fail("a model was loaded"),
        )
        with pytest.raises(SystemExit) as exit_:
            cli.run_command(probe.COMMANDS, [*args, "--output", output])
    error = capfd.readouterr().err
    assert (
        exit_.value.code == 2
        and len(error.splitlines()) == 1
        and f"{output} is there already and is not a file of human latents" in error
    )
    assert hashes(tmp_path) == before
    shutil.copy(base / "dense.safetensors", "own.safetensors")
    cli.run_command(probe.COMMANDS, [*args, "--output", "own.safetensors"])
    assert (tmp_path / "own.safetensors").read_bytes() == (base / "sarm.safetensors").read_bytes()


@pytest.mark.parametrize("args, words", [
    (["--reward_model", "nowhere/at/all"], ["nowhere/at/all: no such model folder"]),
    (["--reward_model", "rm"], ["rm is no SARM"]),
    (["--reward_model", "sarm", "--features", "3,99"], ["feature 99"]),
    (["--reward_model", "sarm", "--features", "a"], ["--features a"]),
    (["--reward_model", "sarm", "--kind", "prompts"], ["--kind must be one of sft, pairs"]),
    (["--reward_model", "sarm", "--dataset", "prompts.jsonl"], ["prompts.jsonl:1: no field 'response'"]),
])  # fmt: skip
def test_bad_flags_of_the_command(base, monkeypatch, capfd, args, words):
    monkeypatch.chdir(base)
    monkeypatch.setattr(
        human_latents,
        "load_feature_reader",
        lambda *args, **kwargs: pytest.fail("a model was loaded"),
    )
    with pytest.raises(SystemExit) as exit_:
        cli.run_command(probe.COMMANDS, ["human_latents", "--output", "out.safetensors", *args])
    error = capfd.readouterr().err
    assert (
        exit_.value.code == 2
        and len(error.splitlines()) == 1
        and all(word in error for word in words)
    ), error
    assert not (base / "out.safetensors").exists() and (REPO / "probe.py").exists()

"""Feature control of PPO and its reference data, as runs of the scripts on tiny random models.

What a run wrote down (the token ids of every held-out answer) is read again, one answer at a time,
and R put together by Python's own statistics. The density ratio meets rollouts of Gaussians, whose
ratio is known.

    N texts, M features, d latents whose density is compared
"""

import copy
import json
import math
import os
import shutil
import signal
import time
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from checks import MU, STD, log_ratio_of_gaussians, sampling_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import (
    assert_bit_equal,
    assert_close_runs,
    content,
    encode_field,
    flags,
    fork,
    join,
    metrics,
    probe_refused,
    ranks,
    read_rows,
    refused,
    run_probe,
    write_rows,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPTNeoXConfig

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

M = 24  # latents
K = 8  # of them that a text keeps
D = 32  # hidden
N_HUMAN = 70  # texts of people that are read

# {how features are read: (folder of the reward model, folder of its autoencoder)}
REWARDS = {"sarm": ("sarm", ""), "dense": ("rm", "sae")}


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch):
    """A density ratio that counts from the third rollout on."""
    monkeypatch.setattr(controlled_scoring, "WARM_UP", 2)


# -------------------------------------------------------------------------- models, data, and runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Models, texts and human latents, in a folder.

    lm/; sarm/ and other/, two SARMs; rm/, a reward model, and sae/, an autoencoder of its layer 0;
    prompts.jsonl, sft.jsonl, pairs.jsonl; for either way to read features NAME.safetensors with all
    latents that fire, and NAME_two.safetensors with those of features 3 and 1.
    """
    root = tmp_path_factory.mktemp("control")
    write_rows(root / "sft.jsonl", world.demonstrations(90))
    write_rows(root / "pairs.jsonl", world.preferences(60))
    write_rows(root / "prompts.jsonl", world.prompts("train")[::6])
    code = "def good(prompts, responses): return [1.0] * len(responses)\n"
    (root / "rewards.py").write_text(code)

    save_lm(root / "lm")
    save_random_sarm(root, "sarm", seed=0)
    save_random_sarm(root, "other", seed=1)
    settings = {"model": f"{root}/lm", "dataset": f"{root}/pairs.jsonl", "output_dir": f"{root}/rm"}
    train_rm.main(train_rm.Config(steps=2, batch_size=8, eval_size=8, **settings))
    save_sae(new_sae(), root / "sae", model=f"{root}/rm", layer=0, site="residual")

    for name in REWARDS:
        read_humans(root, name, root / f"{name}.safetensors")
        read_humans(root, name, root / f"{name}_two.safetensors", features="3,1")
    return root


def save_lm(path):
    """A random LM, some of whose answers end while others are cut off."""
    ids = {word: i for i, word in enumerate(world.vocabulary())}
    eos = ids["<eos>"]
    config = GPTNeoXConfig(
        vocab_size=len(ids),
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=ids["<pad>"],
    )
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    # With weights as small as at the start of a training all texts would have the same latents.
    for p in lm.gpt_neox.parameters():
        if p.dim() > 1:
            p.data.mul_(4)
    # The last LayerNorm adds a bias b to every state, so 2 b / |b|^2 adds 2 to the logit of EOS.
    bias = lm.gpt_neox.final_layer_norm.bias.data.normal_()
    lm.get_output_embeddings().weight.data[eos] += 2 * bias / bias.square().sum()
    lm.save_pretrained(path)
    world.tokenizer().save_pretrained(path)


def save_random_sarm(root, name, seed):
    config = AutoConfig.from_pretrained(root / "lm")
    config.sarm_param = {
        "sae_source_layer": 1,
        "sae_latent_size": M,
        "sae_k": K,
        "sae_use_sequence_level": True,
        "sarm_use_activation": True,
    }
    sae = TopKSAE(D, M, K, normalize="token", relu=False, seed=seed)
    sarm = SARM(AutoModel.from_pretrained(root / "lm"), sae, config)
    torch.nn.init.normal_(sarm.score.weight)
    save_sarm(sarm, load_tokenizer(str(root / "lm")), str(root / name))


def new_sae(d=D, seed=3):
    return TopKSAE(d, M, K, normalize="token", seed=seed)


def places_of(base, name):
    """The paths of the reward model and of its autoencoder, which is "" for a SARM."""
    model, sae = REWARDS[name]
    return f"{base}/{model}", sae and f"{base}/{sae}"


def read_humans(base, name, path, **changes):
    """probe.py human_latents: the latents of 70 demonstrations, unless changes say otherwise."""
    reward_model, sae = places_of(base, name)
    settings = {
        "reward_model": reward_model,
        "sae": sae,
        "dataset": f"{base}/sft.jsonl",
        "max_rows": N_HUMAN,
        "output": str(path),
    }
    return human_latents.human_latents(human_latents.HumanLatentsConfig(**settings | changes))


def settings_of(base, name="sarm", **changes):
    """The settings of a small PPO run."""
    reward_model, sae = places_of(base, name)
    settings = {
        "model": f"{base}/lm",
        "dataset": f"{base}/prompts.jsonl",
        "reward_model": [reward_model],
        "feature_sae": sae,
        "steps": 2,
        "batch_size": 8,
        "minibatch_size": 4,
        "ppo_epochs": 1,
        "max_new_tokens": 10,
        "eval_size": 7,
        "eval_every": 0,
        "lr": 2e-3,
    }
    return settings | changes


def train(base, folder, **changes):
    """Run PPO. -> the rows of its metrics"""
    settings = settings_of(base, **changes)
    train_ppo.main(train_ppo.Config(output_dir=str(folder), **settings))
    return read_rows(folder / "metrics.jsonl")


class Reading(NamedTuple):
    """What a reward model finds in one text."""

    score: float
    z: list[float]  # [M]
    edited: float  # the score with edited latents


def read_one_by_one(base, name, texts, edits=None):
    """Texts (prompt ids, response ids), each of which the model reads alone -> [Reading]"""
    reward_model, sae = places_of(base, name)
    if sae:
        module = WithSAE(load_reward_model(reward_model), new_sae(), (0, "residual")).eval()
    else:
        module = SARM.from_pretrained(reward_model)
    readings = []
    for prompt_ids, response_ids in texts:
        found = module.read(pack([prompt_ids], [response_ids]), None, edits)
        z = found.latents[0].tolist()
        readings.append(Reading(found.scores.item(), z, found.edited.item()))
    return readings


def scores_of(readings):
    return [reading.score for reading in readings]


def values_of(readings, feature):
    """One latent on all texts: [N]."""
    return [reading.z[feature] for reading in readings]


def close(numbers, abs=1e-4):
    return pytest.approx(numbers, abs=abs)


# ---------------------------------------------------------------------------------- human latents


@pytest.fixture(scope="module")
def humans_by_hand(base):
    """{how features are read: the Readings of the demonstrations}"""
    rows = data.subset(data.read_rows(f"{base}/sft.jsonl", "sft"), N_HUMAN)
    prompts, responses = encode_field(load_tokenizer(f"{base}/lm"), rows, "response")
    readings = {}
    for name in REWARDS:
        readings[name] = read_one_by_one(base, name, zip(prompts, responses))
    return readings


def firing_features(readings):
    """The features that are not 0 on some text."""
    return [i for i in range(M) if any(values_of(readings, i))]


def load_humans(base, name, file):
    return human_latents.load(f"{base}/{file}.safetensors", *places_of(base, name))


@pytest.mark.parametrize("name", REWARDS)
def test_human_latents_are_those_of_all_features_that_fire(base, humans_by_hand, name):
    firing = firing_features(humans_by_hand[name])
    # The example is one: some features fire and some do not, and texts differ in their scores.
    rounded_scores = {round(score, 3) for score in scores_of(humans_by_hand[name])}
    assert 5 < len(firing) < M
    assert len(rounded_scores) > 20

    human = load_humans(base, name, name)
    assert human.features == firing
    assert human.complete


@pytest.mark.parametrize("name", REWARDS)
def test_human_latents_are_those_of_the_features_that_are_asked_for(base, name):
    human = load_humans(base, name, f"{name}_two")
    assert human.features == [3, 1]
    assert not human.complete


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("ending", ["", "_two"])
def test_human_latents_one_text_at_a_time(base, humans_by_hand, name, ending):
    human = load_humans(base, name, name + ending)
    readings = humans_by_hand[name]
    assert human.scores.tolist() == pytest.approx(scores_of(readings), rel=1e-4, abs=1e-4)
    for feature, column in zip(human.features, human.latents.T.tolist(), strict=True):
        assert column == pytest.approx(values_of(readings, feature), rel=1e-4, abs=1e-4)


def test_processes_agree_on_the_features_that_fire_on_any_of_them():
    """The other process has one text, on which features 1 and 3 fire; feature 0 fires on none."""

    def gather(x):
        """What both have. A list of features has one dimension, latents have two."""
        other = torch.tensor([1, 3]) if x.ndim == 1 else torch.tensor([[7.0, 0.0, 8.0]])
        return torch.cat([x, other])

    mine = torch.tensor([[0.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.25]]).to_sparse()
    latents, features = human_latents.gather_latents(SimpleNamespace(gather=gather), mine, [])
    assert features == [1, 2, 3]
    assert latents.tolist() == [[0, 0.5, 0], [0, 0, 0.25], [7, 0, 8]]


def test_human_latents_of_one_text_or_beyond_the_context(base):
    for changes, words in (
        ({"max_rows": 1}, "one text has no spread"),
        ({"max_length": 65}, "--max_length 65 is above the model's context of 64 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            read_humans(base, "sarm", base / "none.safetensors", **changes)
        assert not (base / "none.safetensors").exists()


@pytest.mark.parametrize("name", REWARDS)
def test_a_feature_that_is_not_in_the_file(base, humans_by_hand, name):
    """It is 0 where the file has all that fire, and not known where features were chosen."""
    firing = firing_features(humans_by_hand[name])
    silent = next(i for i in range(M) if i not in firing)
    column = load_humans(base, name, name).column(silent)
    assert column.tolist() == [0.0] * N_HUMAN
    with pytest.raises(ValueError, match=f"no latents of feature {silent} "):
        load_humans(base, name, f"{name}_two").column(silent)


def cut_text(prompt_ids, response_ids, longest, max_length):
    """A text of at most so many tokens: the prompt loses its first ones, the response its last.

    longest: tokens of the longer answer of the pair. Half of the tokens are the prompt's, if it
    needs them.
    """
    room = max(max_length // 2, max_length - longest)
    prompt_ids = prompt_ids[-room:]
    return prompt_ids, response_ids[: max_length - len(prompt_ids)]


def test_the_chosen_side_of_pairs_and_cut_texts(base, tmp_path):
    file = tmp_path / "pairs.safetensors"
    pairs = {"dataset": f"{base}/pairs.jsonl", "kind": "pairs", "max_rows": 0}
    read_humans(base, "sarm", file, max_length=20, **pairs)

    tokenizer = load_tokenizer(f"{base}/lm")
    texts = []
    for row in data.read_rows(f"{base}/pairs.jsonl", "pairs"):
        prompt_ids = tokenizer(row["prompt"]).input_ids
        response_ids = [*tokenizer(row["chosen"]).input_ids, tokenizer.eos_token_id]
        other_ids = [*tokenizer(row["rejected"]).input_ids, tokenizer.eos_token_id]
        longest = max(len(response_ids), len(other_ids))
        texts.append(cut_text(prompt_ids, response_ids, longest, 20))
    expected = scores_of(read_one_by_one(base, "sarm", texts))
    assert load_file(file)["scores"].tolist() == close(expected)


def test_texts_beyond_the_models_context_are_cut_and_counted(base, tmp_path):
    """The model reads 64 tokens. A text that is cut loses its EOS, so nobody may miss it."""
    long_text = "the room was bright . " * 20
    rows = [
        {"prompt": "review the hotel :", "response": long_text},
        {"prompt": "review the hotel :", "response": "the room was bright ."},
    ]
    write_rows(tmp_path / "long.jsonl", rows)
    file = tmp_path / "long.safetensors"

    found = read_humans(base, "sarm", file, dataset=f"{tmp_path}/long.jsonl", max_rows=0)

    assert found["cut"] == 1
    tokenizer = load_tokenizer(f"{base}/lm")
    prompts, responses = encode_field(tokenizer, rows, "response")
    room = 64 - len(prompts[0])
    texts = [(prompts[0], responses[0][:room]), (prompts[1], responses[1])]
    expected = scores_of(read_one_by_one(base, "sarm", texts))
    assert load_file(file)["scores"].tolist() == close(expected)


@pytest.mark.slow
def test_two_processes_read_the_same(base, tmp_path):
    join(*ranks(2, read_humans, base, "sarm", tmp_path / "two.safetensors"))
    one = load_file(base / "sarm.safetensors")
    two = load_file(tmp_path / "two.safetensors")
    assert one["features"].equal(two["features"])
    torch.testing.assert_close(one["latents"], two["latents"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one["scores"], two["scores"], rtol=1e-5, atol=1e-5)


def test_the_command_writes_its_file_alone(base, tmp_path, capsys):
    settings = {
        "reward_model": base / "sarm",
        "dataset": base / "sft.jsonl",
        "max_rows": N_HUMAN,
        "output": tmp_path / "a/b.safetensors",
    }
    run_probe("human_latents", *flags(settings))
    assert "70 texts (0 cut)" in capsys.readouterr().out
    assert os.listdir(tmp_path / "a") == ["b.safetensors"]
    written = (tmp_path / "a/b.safetensors").read_bytes()
    assert written == (base / "sarm.safetensors").read_bytes()


def test_the_same_model_elsewhere_is_the_same_model(base, tmp_path):
    """Human latents belong to files, not to the name of their folder."""
    shutil.copytree(base / "sarm", tmp_path / "moved")
    human = human_latents.load(f"{base}/sarm.safetensors", str(tmp_path / "moved"), "")
    assert human.path == f"{base}/sarm.safetensors"
    assert len(human.latents) == N_HUMAN


# ----------------------------------------------------------------------------- what is optimised

# Flags of a run; {0}, {1}, {2} stand for features that fire on some texts and not on others.
TAU = ["0.1", "q0.6", "q0.95"]
ALPHA = ["0.7", "0.5std", "2std"]
ALL_THREE = ["{0}", "{1}", "{2}"]
CASES = {
    "indicator": {"penalize_features": ALL_THREE, "tau": TAU, "alpha": ALPHA},
    "hinge": {
        "penalize_features": ALL_THREE,
        "tau": ["0.1", "q0.6", "q0"],
        "alpha": ALPHA,
        "penalty": "hinge",
    },
    "clamp": {"clamp": ["{0}:max:0.2", "{1}:set:-0.5", "{2}:min:0.3"]},
    # A feature that is both is penalised for what it is unclamped.
    "both": {
        "penalize_features": ["{0}"],
        "tau": ["0.2"],
        "alpha": ["1.5"],
        "clamp": ["{0}:set:0"],
    },
    "density": {"density_beta": 0.5},
}
HUMAN_FILES = {"indicator": "{}", "hinge": "{}", "density": "{}_two"}


def choose_features(base, name):
    """The three features whose rate of firing on human texts is nearest to one half."""
    human = load_file(base / f"{name}.safetensors")
    rates = (human["latents"] != 0).float().mean(0)
    nearest = (rates - 0.5).abs().argsort()[:3]
    return human["features"][nearest].tolist()


def case(base, name, what):
    """The settings of a case."""
    features = choose_features(base, name)
    settings = dict(CASES[what])
    if "penalize_features" in settings:
        settings["penalize_features"] = features[: len(settings["tau"])]
    if "clamp" in settings:
        settings["clamp"] = [text.format(*features) for text in settings["clamp"]]
    if what in HUMAN_FILES:
        file = HUMAN_FILES[what].format(name)
        settings["human_latents"] = f"{base}/{file}.safetensors"
    return settings


def prices_by_hand(base, name, settings):
    """{feature: (tau, alpha)} as numbers: quantiles and standard deviations of the human texts."""
    human = load_file(base / f"{name}.safetensors")
    columns = dict(zip(human["features"].tolist(), human["latents"].T.tolist()))
    std = stdev(human["scores"].tolist())
    prices = {}
    for i, feature in enumerate(settings.get("penalize_features", [])):
        tau = settings["tau"][i]
        if tau.startswith("q"):
            tau = np.quantile(columns[feature], float(tau[1:]))
        alpha = settings["alpha"][i]
        if alpha.endswith("std"):
            alpha = float(alpha.removesuffix("std")) * std
        prices[feature] = float(tau), float(alpha)
    return prices


def clamps_by_hand(settings):
    """{feature: (op, value)}"""
    clamps = {}
    for text in settings.get("clamp", []):
        feature, op, value = text.split(":")
        clamps[int(feature)] = op, float(value)
    return clamps


def cost_of(z, tau, alpha, penalty):
    """What a feature costs in one text: alpha 1[z > tau], or alpha max(0, z - tau)."""
    if penalty == "hinge":
        return alpha * max(0.0, z - tau)
    return alpha * (z > tau)


def costs_by_hand(readings, prices, penalty):
    """{feature: its cost in each text [N]}"""
    costs = {}
    for feature, (tau, alpha) in prices.items():
        costs[feature] = []
        for z in values_of(readings, feature):
            costs[feature].append(cost_of(z, tau, alpha, penalty))
    return costs


def control_by_hand(readings, costs):
    """R of each text without a density: the score with clamped latents, less the costs."""
    controlled = []
    for n, reading in enumerate(readings):
        total = sum(costs[feature][n] for feature in costs)
        controlled.append(reading.edited - total)
    return controlled


def check_logged_features(record, readings, prices, costs, clamps):
    """The means that are logged of each feature: its cost, its value, how often it is active."""
    for feature, (tau, _) in prices.items():
        z = np.array(values_of(readings, feature))
        assert record[f"eval/penalty/{feature}"] == close(fmean(costs[feature]))
        assert record[f"eval/feature/{feature}"] == close(z.mean())
        assert record[f"eval/rate/{feature}"] == close((z > tau).mean(), abs=1e-6)
    # A feature without a price is active where it fires.
    for feature in clamps.keys() - prices.keys():
        z = np.array(values_of(readings, feature))
        assert record[f"eval/rate/{feature}"] == close((z != 0).mean(), abs=1e-6)


BY_HAND = [
    ("sarm", "indicator"),
    ("sarm", "hinge"),
    ("dense", "clamp"),
    ("sarm", "both"),
    ("dense", "density"),
    pytest.param("dense", "indicator", marks=pytest.mark.slow),
    pytest.param("dense", "hinge", marks=pytest.mark.slow),
    pytest.param("sarm", "clamp", marks=pytest.mark.slow),
    pytest.param("dense", "both", marks=pytest.mark.slow),
    pytest.param("sarm", "density", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, what", BY_HAND)
def test_r_of_each_answer_by_hand(base, tmp_path, name, what):
    """R = score(clamp(z)) - penalties(z) - density, of every held-out answer.

    And the means that are logged, of held-out answers and of rollouts.
    """
    settings = case(base, name, what)
    prices = prices_by_hand(base, name, settings)
    clamps = clamps_by_hand(settings)
    reward_name, _ = REWARDS[name]

    records = train(base, tmp_path / "run", name=name, steps=3, **settings)

    for record, step in ((records[0], 0), (records[-1], 3)):
        rows = read_rows(tmp_path / f"run/eval/step_{step}.jsonl")
        texts = [(row["prompt_ids"], row["response_ids"]) for row in rows]
        readings = read_one_by_one(base, name, texts, clamps)
        costs = costs_by_hand(readings, prices, settings.get("penalty", "indicator"))
        expected = control_by_hand(readings, costs)

        # The proxy is the reward model's own score.
        scores = scores_of(readings)
        assert [row["scores"][reward_name] for row in rows] == close(scores)
        assert record["eval/proxy"] == close(fmean(scores))
        check_logged_features(record, readings, prices, costs, clamps)
        if clamps:
            edited = [reading.edited for reading in readings]
            assert edited != scores
            assert record["eval/clamped"] == close(fmean(edited))

        if what == "density":
            # What the ratio itself is has tests of its own, below.
            total = fmean(expected) - record["eval/density"]
            assert record["eval/controlled"] == close(total)
        else:
            assert [row["scores"]["controlled"] for row in rows] == close(expected)
            assert record["eval/controlled"] == close(fmean(expected))
            if step == 0:
                # The case is one: the control changes some score.
                changes = np.array(expected) - np.array(scores)
                assert abs(changes).max() > 0.01

    # In rollouts the means hang together in the same way.
    for record in records[1:]:
        total_cost = record.get("density", 0.0)
        for feature in prices:
            total_cost += record[f"penalty/{feature}"]
        clamped = record.get("clamped", record["score_mean"])
        assert record["controlled"] == close(clamped - total_cost, abs=1e-5)


def test_r_takes_the_scores_place(base, tmp_path):
    """Rules on endings and length come after R."""
    rules = {"missing_eos_penalty": 0.8, "length_penalty": 0.05, "kl_coef": 0.0}
    records = train(base, tmp_path / "run", **case(base, "sarm", "both"), **rules)
    for record in records[1:]:
        missing_eos = 1 - record["eos_rate"]
        expected = record["controlled"] - 0.8 * missing_eos - 0.05 * record["length"]
        assert record["reward"] == close(expected, abs=1e-5)
        assert 0 < record["eos_rate"] < 1


def test_flags_that_change_nothing_change_nothing(base, tmp_path):
    """A price of 0 and a cap above everything: to the last bit the run without flags."""
    nothing = {
        "penalize_features": [3],
        "tau": ["0.1"],
        "alpha": ["0"],
        "clamp": ["5:max:1000"],
    }
    train(base, tmp_path / "plain")
    train(base, tmp_path / "zero", **nothing)
    plain_records = metrics(tmp_path / "plain")
    records = metrics(tmp_path / "zero")
    for plain, record in zip(plain_records, records, strict=True):
        assert record.items() >= plain.items()
    # The rates of both features are logged beside it.
    assert "rate/3" in records[1]
    assert "rate/5" in records[1]


def test_a_run_that_is_older_than_the_flags(base, tmp_path, capsys):
    """A finished run whose config.json does not name the flags is done, not another run."""
    train(base, tmp_path / "run")
    path = tmp_path / "run/config.json"
    stored = json.loads(path.read_text())
    for name in (
        "penalize_features",
        "tau",
        "alpha",
        "penalty",
        "clamp",
        "density_beta",
        "human_latents",
        "feature_sae",
    ):
        del stored[name]
    path.write_text(json.dumps(stored))
    capsys.readouterr()

    train(base, tmp_path / "run")

    assert "done already" in capsys.readouterr().out


# --------------------------------------------------------------------------------- density ratio


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw_rollout(seed, n=128):
    """The policy's latents: n draws from its Gaussian."""
    return MU + STD * torch.randn(n, 2, generator=seeded(seed))


def draw_humans(n=2000):
    """People's latents: n draws from the standard normal."""
    return torch.randn(n, 2, generator=seeded(10**6))


@pytest.fixture(scope="module")
def learned():
    """A density ratio after 60 rollouts of the policy's Gaussian. -> it, what each step logged"""
    density = controlled_scoring.Density(draw_humans(), 0)
    records = [density.learn(draw_rollout(i)) for i in range(60)]
    return density, records


def test_a_fifth_of_the_human_texts_is_held_out():
    density = controlled_scoring.Density(draw_humans(), 0)
    assert len(density.held_out) == 400
    assert len(density.human) == 1600


@pytest.mark.slow
def test_the_density_ratio_finds_that_of_two_gaussians(learned):
    density, _ = learned
    z = torch.cat([draw_rollout(500, 2000), draw_humans(2000)])
    truth = log_ratio_of_gaussians(z)
    found = density.log_ratio(z).double()
    # The error, weighted as maximum likelihood weighs it: see sampling_error.
    w = torch.sigmoid(truth) * torch.sigmoid(-truth)
    error = ((w * (found - truth).square()).sum() / w.sum()).sqrt().item()
    assert error < sampling_error(truth, 2 * 128 * controlled_scoring.REPLAY)


def test_the_ratio_is_clipped(learned, monkeypatch):
    """At 2 nats, since the ratio of these Gaussians stays below the 5 of CLIP."""
    density, _ = learned
    z = torch.cat([draw_rollout(500, 2000), draw_humans(2000)])
    assert density.net(z).abs().max() > 2
    monkeypatch.setattr(controlled_scoring, "CLIP", 2.0)
    assert density.log_ratio(z).abs().max() <= 2
    assert density.log_ratio(z * 1000).abs().max() <= 2


def test_the_auc_is_that_of_the_true_ratio(learned):
    """By Monte Carlo in another way: of how many pairs of texts the true ratio orders right."""
    _, records = learned
    policy = log_ratio_of_gaussians(draw_rollout(501, 2000))
    human = log_ratio_of_gaussians(draw_humans(2000))
    true_auc = (policy[:, None] > human).double().mean().item()
    late_auc = fmean(record["density_auc"] for record in records[20:])
    assert late_auc == pytest.approx(true_auc, abs=0.04)
    assert records[0]["density_loss"] > records[-1]["density_loss"]
    # The first rollout is judged before it is learned from: nothing is known yet.
    assert records[0]["density_auc"] == 0.5


def test_a_rollout_is_judged_before_it_is_learned_from(base):
    config = train_ppo.Config(**settings_of(base, **case(base, "sarm", "density")))
    control = controlled_scoring.prepare(config)
    control.name = "sarm"
    control.dist = distributed.Dist(0, 1, torch.device("cpu"))
    assert control.features == [3, 1]
    assert control.density_columns == [0, 1]

    generator = seeded(0)
    for n in range(4):
        latents = torch.randn(8, 2, generator=generator) + 1
        clamped = torch.randn(8, generator=generator)
        readings = {"member_scores": clamped[:, None], "latents": latents, "clamped": clamped}
        before = copy.deepcopy(control.density)

        scored = control.combine(readings)
        control.learn(readings)

        # R is made with what was known before this rollout, and without a price in warm-up.
        clip = controlled_scoring.CLIP
        log_ratio = before.net(latents).detach().clamp(-clip, clip)
        beta = 0.0 if n < 2 else 0.5
        expected = clamped - beta * log_ratio
        torch.testing.assert_close(scored.scores, expected, rtol=0, atol=1e-6)
        logged = scored.terms["log_ratio"].mean().item()
        assert logged == pytest.approx(log_ratio.mean().item(), abs=1e-6)
        # Then it has learned from this rollout.
        assert not torch.equal(control.density.net(latents), before.net(latents))
        assert len(control.density.replay) == n + 1
        assert control.density.replay[-1].equal(latents)


def test_the_replay_forgets():
    density = controlled_scoring.Density(draw_humans(50), 0)
    for i in range(12):
        density.learn(draw_rollout(i, 4))
    assert len(density.replay) == controlled_scoring.REPLAY
    assert density.replay[-1].equal(draw_rollout(11, 4))


def assert_equal_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].equal(b[name]), name


def test_a_restored_density_goes_on_as_it_was():
    a = controlled_scoring.Density(draw_humans(50), 0)
    for i in range(3):
        a.learn(draw_rollout(i, 8))
    b = controlled_scoring.Density(draw_humans(50), 0)
    b.restore(copy.deepcopy(a.tensors()))
    for i in range(3, 6):
        assert a.learn(draw_rollout(i, 8)) == b.learn(draw_rollout(i, 8))
    assert_equal_tensors(a.tensors(), b.tensors())


def learn_in_shares(path):
    """Learn from 10 rollouts, of which this process has its share. What it knows is then saved."""
    dist = distributed.setup("cpu")
    # Of a ControlledScoring only what log_ratio() takes: no reward model, no flags.
    control = controlled_scoring.ControlledScoring.__new__(controlled_scoring.ControlledScoring)
    control.dist = dist
    control.density_columns = [0, 1]
    control.density = controlled_scoring.Density(draw_humans(500), 0)
    for i in range(10):
        z = dist.gather(dist.share(draw_rollout(i, 16)))
        log_ratio = control.log_ratio(z)
        control.density.learn(z)
    save_file({"log_ratio": log_ratio, **control.density.tensors()}, f"{path}_{dist.rank}")


@pytest.mark.slow
def test_one_and_two_processes_learn_the_same_ratio(tmp_path):
    learn_in_shares(tmp_path / "one")
    join(*ranks(2, learn_in_shares, tmp_path / "two"))
    one = load_file(tmp_path / "one_0")
    assert_equal_tensors(one, load_file(tmp_path / "two_0"))
    assert_equal_tensors(one, load_file(tmp_path / "two_1"))
    assert one["log_ratio"].std() > 0.1


# --------------------------------------------------------------------- several processes, and kills


def run_settings(base, name="sarm", **changes):
    """A run with all that can be asked for at once, the density of all latents included."""
    control = {
        "penalize_features": choose_features(base, name)[:1],
        "tau": ["q0.6"],
        "alpha": ["0.5std"],
        "penalty": "hinge",
        "clamp": ["3:max:0.5", "4:set:0"],
        "density_beta": 0.3,
        "human_latents": f"{base}/{name}.safetensors",
    }
    steps = {"steps": 5, "eval_every": 2, "checkpoint_every": 2}
    return settings_of(base, name, **control, **steps, **changes)


def command(args):
    """train_ppo.py as from the shell, for a process of its own."""
    controlled_scoring.WARM_UP = 2
    cli.run(train_ppo.Config, train_ppo.main, args)


@pytest.fixture(scope="module")
def whole(base):
    """{how features are read: the folder of a run with everything, in one process}"""
    folders = {}
    processes = []
    for name in REWARDS:
        folders[name] = base / f"whole_{name}"
        args = ["--output_dir", str(folders[name]), *flags(run_settings(base, name))]
        processes.append(fork(command, args, RANK="0"))
    join(*processes)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("name", REWARDS)
def test_everything_at_once(whole, name):
    first, *records = read_rows(whole[name] / "metrics.jsonl")
    # In warm-up, two rollouts long, the density costs nothing.
    costs_something = [record["density"] != 0 for record in records]
    assert costs_something == [False, False, True, True, True]
    assert first["eval/density"] == 0
    assert records[-1]["eval/density"] != 0
    for record in records:
        assert 0 <= record["density_auc"] <= 1
        assert record["density_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("sarm", "ddp"), ("dense", "fsdp")])
def test_two_processes_change_nothing(base, whole, tmp_path, name, kind):
    args = flags(run_settings(base, name, distributed=kind))
    join(*ranks(2, command, ["--output_dir", str(tmp_path / "two"), *args]))
    assert_close_runs(whole[name], tmp_path / "two", rel=1e-3, atol=1e-4, weights_atol=1e-3)


def start(kind, *args):
    """train_ppo.py in one process, or with FSDP in two."""
    if kind == "fsdp":
        return ranks(2, command, list(args))
    return [fork(command, list(args), RANK="0")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_sigkill_and_resume(base, whole, tmp_path, kind):
    """Killed once its first checkpoint is there, and resumed: as the run that was left alone."""
    folder = tmp_path / "killed"
    place = ["--output_dir", str(folder)]
    processes = start(kind, *place, *flags(run_settings(base, distributed=kind)))
    while processes[0].is_alive() and not (folder / "checkpoint/step_2").exists():
        time.sleep(0.002)
    for process in processes:
        process.kill()
        process.join()
    assert processes[0].exitcode == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    assert (folder / "checkpoint/step_2/tensors.safetensors").exists()

    join(*start(kind, *place, "--resume"))

    if kind == "ddp":
        assert_bit_equal(whole["sarm"], folder)
    else:
        # Two processes against one: up to float error.
        assert_close_runs(whole["sarm"], folder, rel=1e-3, atol=1e-4, weights_atol=1e-3)


# ------------------------------------------------------------------------------ bad flags and files


def refuse_to_load(*args, **kwargs):
    pytest.fail("a model was loaded")


@pytest.fixture
def refuse(base, bad_files, monkeypatch, capfd):
    """A function: PPO with these changes of its settings must end with one line that has the words.

    Before any model is loaded, and with nothing new on disk.
    """
    monkeypatch.chdir(base)
    monkeypatch.setattr(train_ppo, "load_policy", refuse_to_load)
    monkeypatch.setattr(controlled_scoring, "load_feature_reader", refuse_to_load)
    monkeypatch.setattr(scoring, "load_rewards", refuse_to_load)
    places = {"model": "lm", "dataset": "prompts.jsonl", "reward_model": ["sarm"]}

    def run(changes, *words):
        settings = settings_of(".") | places | changes
        if not settings["feature_sae"]:
            del settings["feature_sae"]
        refused(capfd, "ppo", ["--output_dir", "out", *flags(settings)], *words)

    return run


# A feature with a price, to which the tables add what is wrong.
ONE = {"penalize_features": [3], "tau": ["0.5"], "alpha": ["1"]}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"tau": ["1"]}, "names 0 features, --tau 1"),
        ({"penalize_features": [3]}, "names 1 features, --tau 0"),
        ({"penalize_features": [3, 3], "tau": ["0.5"] * 2, "alpha": ["1"] * 2}, "a feature twice"),
        (ONE | {"penalty": "square"}, "--penalty must be one of indicator, hinge, not 'square'"),
        ({"density_beta": -0.1}, "--density_beta must be at least 0"),
        ({"feature_sae": "sae"}, "--feature_sae is there for --penalize_features"),
    ],
)
def test_bad_flags(refuse, changes, words):
    refuse(changes, words)


def test_each_feature_needs_its_threshold_and_its_price(refuse):
    changes = ONE | {"penalize_features": [3, 5], "alpha": ["1", "1"]}
    refuse(changes, "names 2 features, --tau 1", "--alpha 2")


@pytest.mark.parametrize(
    "tau, words",
    [
        ("high", "it must be a number such as 0.5 or a quantile"),
        ("nan", "it must be a number"),
    ],
)
def test_bad_thresholds(refuse, tau, words):
    refuse(ONE | {"tau": [tau]}, f"--tau {tau}: {words}")


@pytest.mark.parametrize(
    "alpha, words",
    [
        ("std", "it must be a number such as 1.0 or in units such as 0.5std"),
        ("-1", "a price must be at least 0"),
    ],
)
def test_bad_prices(refuse, alpha, words):
    refuse(ONE | {"alpha": [alpha]}, f"--alpha {alpha}: {words}")


@pytest.mark.parametrize(
    "clamps, words",
    [
        (["3:max"], "--clamp 3:max: it must be FEATURE:OP:VALUE"),
        (["3:+:1"], "--clamp 3:+:1: it must be FEATURE:OP:VALUE with OP one of set, min, max"),
        (["x:set:1"], "--clamp x:set:1: it must be"),
        (["3:set:x"], "--clamp 3:set:x: it must be FEATURE:OP:VALUE"),
        (["3:set:1", "3:max:2"], "--clamp names feature 3 twice"),
    ],
)
def test_bad_clamps(refuse, clamps, words):
    refuse({"clamp": clamps}, words)


@pytest.mark.parametrize(
    "changes, feature",
    [
        (ONE | {"penalize_features": [24]}, 24),
        (ONE | {"penalize_features": [-1]}, -1),
        ({"clamp": ["99:set:1"]}, 99),
    ],
)
def test_features_that_the_reward_model_does_not_have(refuse, changes, feature):
    refuse(changes, f"feature {feature}", "0 to 23")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"reward_model": ["rewards.py:good"]}, "rewards.py:good is no reward model"),
        ({"reward_model": ["rm"]}, "rm is no SARM: name an autoencoder"),
        ({"reward_model": ["rm"], "feature_sae": "nowhere"}, "nowhere: no sparse autoencoder here"),
        (
            {"reward_model": ["rm"], "feature_sae": "wide"},
            "wide: an autoencoder for activations of width 33",
        ),
    ],
)
def test_reward_models_whose_features_cannot_be_read(refuse, changes, words):
    refuse(ONE | changes, words)


def test_features_are_those_of_one_reward_model(refuse):
    changes = ONE | {"reward_model": ["sarm", "other"]}
    refuse(changes, "features are those of one reward model", "names 2")


def test_a_sarm_takes_no_autoencoder(refuse):
    refuse(ONE | {"feature_sae": "sae"}, "sarm is a SARM", "autoencoder of its own")


@pytest.mark.parametrize(
    "changes, flag",
    [
        (ONE | {"tau": ["q0.9"]}, "--tau q0.9"),
        (ONE | {"alpha": ["1std"]}, "--alpha 1std"),
        ({"density_beta": 0.1}, "--density_beta"),
    ],
)
def test_what_compares_needs_reference_data(refuse, changes, flag):
    refuse(changes, f"{flag} compares with reference data", "--human_latents")


@pytest.mark.parametrize(
    "changes, words",
    [
        (ONE, "--human_latents is there for --tau qSHARE"),
        (ONE | {"tau": ["q1.5"]}, "--tau q1.5: a quantile lies between"),
        ({"density_beta": math.inf}, "--density_beta must be a finite number"),
    ],
)
def test_bad_flags_beside_reference_data(refuse, changes, words):
    refuse(changes | {"human_latents": "sarm.safetensors"}, words)


@pytest.mark.parametrize(
    "file, reward_model, words",
    [
        ("sarm", "other", "sarm.safetensors: latents by another reward model than other"),
        ("dense", "sarm", "dense.safetensors: latents by another reward model than sarm"),
    ],
)
def test_reference_data_of_another_model(refuse, file, reward_model, words):
    changes = {"human_latents": f"{file}.safetensors", "reward_model": [reward_model]}
    refuse({"density_beta": 0.1} | changes, words)


def test_reference_data_of_another_autoencoder(refuse):
    changes = {"human_latents": "dense.safetensors", "reward_model": ["rm"], "feature_sae": "sae_2"}
    words = "dense.safetensors: latents by another autoencoder than rm with sae_2"
    refuse({"density_beta": 0.1} | changes, words)


def test_a_quantile_of_a_feature_that_the_file_does_not_know(refuse):
    changes = {"penalize_features": [7], "tau": ["q0.5"], "human_latents": "sarm_two.safetensors"}
    refuse(ONE | changes, "sarm_two.safetensors holds no latents of feature 7")


def test_a_price_in_units_of_scores_that_are_all_the_same(refuse):
    words = "--alpha 1std: the 70 scores in flat.safetensors have no spread to measure a price by"
    refuse(ONE | {"alpha": ["1std"], "human_latents": "flat.safetensors"}, words)


# Notes of a file of human latents that are none: {name of the file: text}.
NOTES = {
    "cut": "{",
    "null": "null",
    "empty": "{}",
    "deep": "[" * 10**5,
    "print": '{"complete": true, "fingerprint": []}',
    "complete": '{"complete": 1, "fingerprint": {}}',
}


@pytest.fixture(scope="module")
def bad_files(base):
    """Files of human latents that are wrong in one way, and autoencoders that do not fit."""
    good = load_file(base / "sarm.safetensors")
    latents = good["latents"]
    features = good["features"]
    scores = good["scores"]
    with safe_open(base / "sarm.safetensors", "pt") as f:
        good_notes = f.metadata()

    def write(name, notes=good_notes, **changes):
        save_file({**good, **changes}, base / f"{name}.safetensors", notes)

    write("no_notes", notes={})
    without_scores = {"latents": latents, "features": features}
    save_file(without_scores, base / "no_scores.safetensors", good_notes)
    write("short", scores=scores[1:])
    write("nan", latents=torch.full_like(latents, math.nan))
    write("few", latents=latents[:5], scores=scores[:5])
    write("flat", scores=torch.full_like(scores, 0.1))
    write("twice", features=torch.full_like(features, 3))
    write("below", features=features - 99)
    write("float", features=features.float())
    write("int_latents", latents=latents.int())
    write("int_scores", scores=scores.int())
    for name, text in NOTES.items():
        write(name, notes={"human_latents": text})
    (base / "text.safetensors").write_text("no tensors")

    place = {"model": "rm", "layer": 0, "site": "residual"}
    save_sae(new_sae(d=D + 1), base / "wide", **place)
    save_sae(new_sae(seed=9), base / "sae_2", **place)


@pytest.mark.parametrize(
    "file, words",
    [
        ("nowhere", "nowhere.safetensors: no human latents here"),
        ("text", "text.safetensors: cannot be read"),
        ("no_notes", "no_notes.safetensors: not a file of human latents"),
        ("no_scores", "no_scores.safetensors: not a file of human latents"),
        ("sae/sae_weights", "sae_weights.safetensors: not a file of human latents"),
        ("short", "short.safetensors: its tensors do not fit each other"),
        ("nan", "nan.safetensors: latents holds numbers that are not finite"),
        ("twice", "each of them once"),
        ("below", "whole numbers from 0"),
        ("float", "whole numbers from 0"),
        ("int_latents", "latents holds int32"),
        ("int_scores", "scores holds int32"),
        ("cut", "not JSON"),
        ("null", "not a JSON object"),
        ("empty", "complete is missing"),
        ("deep", "nested too deep"),
        ("print", "fingerprint cannot be []"),
        ("complete", "complete cannot be 1"),
    ],
)
def test_bad_files(refuse, file, words):
    path = f"{file}.safetensors"
    refuse({"density_beta": 0.1, "human_latents": path}, path, words)


def test_too_few_texts_for_a_density(refuse):
    changes = {"density_beta": 0.1, "human_latents": "few.safetensors"}
    refuse(changes, "few.safetensors: 5 texts", "too few")


# ------------------------------------------------------------------------ bad input of the command


@pytest.mark.parametrize(
    "output", ["sft.jsonl", "sarm/model.safetensors", "sae/sae_weights.safetensors", "sarm", "link"]
)
def test_no_other_file_is_written_over(base, tmp_path, monkeypatch, capfd, output):
    """Data, a model's weights, a folder, what a link leads to: before any model is loaded."""
    shutil.copytree(base / "sarm", tmp_path / "sarm")
    shutil.copytree(base / "sae", tmp_path / "sae")
    shutil.copy(base / "sft.jsonl", tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "sft.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(human_latents, "load_feature_reader", refuse_to_load)
    before = content()

    args = ["--reward_model", "sarm", "--dataset", "sft.jsonl", "--output", output]
    error = probe_refused(capfd, "human_latents", *args)

    assert f"{output} is there already and is not a file of human latents" in error
    assert content() == before


def test_its_own_file_is_written_again(base, tmp_path):
    file = tmp_path / "own.safetensors"
    shutil.copy(base / "dense.safetensors", file)
    read_humans(base, "sarm", file)
    assert file.read_bytes() == (base / "sarm.safetensors").read_bytes()


@pytest.mark.parametrize(
    "args, words",
    [
        ("--reward_model nowhere/at/all", "nowhere/at/all: no such model folder"),
        ("--reward_model rm", "rm is no SARM"),
        ("--reward_model sarm --features 3,99", "feature 99"),
        ("--reward_model sarm --features a", "--features a"),
        ("--reward_model sarm --kind prompts", "--kind must be one of sft, pairs"),
        ("--reward_model sarm --dataset prompts.jsonl", "prompts.jsonl:1: no field 'response'"),
    ],
)
def test_bad_flags_of_the_command(base, monkeypatch, capfd, args, words):
    monkeypatch.chdir(base)
    monkeypatch.setattr(human_latents, "load_feature_reader", refuse_to_load)
    error = probe_refused(capfd, "human_latents", "--output", "out.safetensors", *args.split())
    assert words in error
    assert not (base / "out.safetensors").exists()

"""train_rm.py: members with starts of their own, and the mean of members' weights (--average).

The weights that a score head was trained to are kept when standardise() is called, which changes
them. Means are of two tensors, and scores are those of plain transformers.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import (
    KillAt,
    Killed,
    assert_bit_equal,
    content,
    hashes,
    join,
    ranks,
    read_rows,
    small,
    summary,
    weights,
    write_rows,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import train_rm
from nanorlhf import world
from nanorlhf.models import RewardModel, load_reward_model
from nanorlhf.runtime import cli

pytestmark = pytest.mark.slow

SCORE = "model/model.safetensors:score.weight"


@pytest.fixture(scope="module")
def members(base, tmp_path_factory):
    """seed_0 and seed_1: members with one start; held_out.jsonl, on which they are standardised.

    raw_heads.pt has the score heads that the two were trained to: [2, 1, D].
    """
    root = tmp_path_factory.mktemp("averages")
    write_rows(root / "held_out.jsonl", world.preferences(20, seed=7))
    heads = []
    standardise = RewardModel.standardise

    def keep_head(reward_model, mean, std):
        heads.append(reward_model.model.score.weight.detach().clone())
        standardise(reward_model, mean, std)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardModel, "standardise", keep_head)
        train_members(base, root, root)
    torch.save(torch.stack(heads), root / "raw_heads.pt")
    return root


def rm(base, root, **changes):
    """The settings of a small reward model that is standardised on held_out.jsonl."""
    settings = {"eval_dataset": f"{root}/held_out.jsonl", "eval_size": 20, "steps": 2, "lr": 2e-3}
    return small(base, "rm", **{**settings, **changes})


def train_members(base, root, folder, **changes):
    """Two members, in seed_0 and seed_1 of the folder, whose score heads start from one seed."""
    settings = rm(base, root, **{"members": 2, "head_seed": 5, **changes})
    train_rm.main(train_rm.Config(output_dir=f"{folder}/seed_{{seed}}", **settings))


def without_training(settings):
    """Those settings of a small reward model that --average takes too."""
    return {name: value for name, value in settings.items() if name not in train_rm.NOT_FOR_AVERAGE}


def average(base, root, folder, *paths, **changes):
    """The mean of these reward models, by default of both members. -> its summary"""
    settings = without_training(rm(base, root, **changes))
    paths = [str(path) for path in paths] or [f"{root}/seed_{{seed}}"]
    return train_rm.main(train_rm.Config(output_dir=str(folder), average=paths, **settings))


def read_model_config(run):
    return json.loads((run / "model/config.json").read_text())


def raw_heads(members):
    """The score heads that the two members were trained to, before they were standardised."""
    return torch.load(members / "raw_heads.pt")


def unscaled_head(run):
    """The score head of a saved model, times the standard deviation in its config."""
    return weights(run)[SCORE] * read_model_config(run)["reward_std"]


def assert_close(a, b, atol=1e-6):
    np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=atol)


# ------------------------------------------------------------------------- where members start from


@pytest.fixture(scope="module")
def two_starts(base, tmp_path_factory):
    """lm_0 and lm_1: the SFT policy, and one whose weights are a little larger."""
    root = tmp_path_factory.mktemp("starts")
    shutil.copytree(base / "sft/model", root / "lm_0")
    shutil.copytree(base / "sft/model", root / "lm_1")
    lm = AutoModelForCausalLM.from_pretrained(root / "lm_1")
    for parameter in lm.parameters():
        parameter.data *= 1.01
    lm.save_pretrained(root / "lm_1")
    return root


def trunk(path):
    """The weights of a model folder but for its heads."""
    tensors = load_file(path / "model.safetensors")
    heads = ("score.weight", "lm_head.weight", "embed_out.weight")
    return {name: tensor for name, tensor in tensors.items() if name not in heads}


def test_each_member_starts_from_the_model_of_its_seed(base, members, two_starts, tmp_path):
    model = f"{two_starts}/lm_{{seed}}"
    train_members(base, members, tmp_path, model=model, head_seed=None, lr=0.0)
    for seed in (0, 1):
        start = trunk(two_starts / f"lm_{seed}")
        trained = trunk(tmp_path / f"seed_{seed}/model")
        assert trained.keys() == start.keys()
        for name in start:
            assert trained[name].equal(start[name]), name
    # Without --members {seed} stands for --seed.
    alone = rm(base, members, model=model, seed=1, lr=0.0)
    train_rm.main(train_rm.Config(output_dir=str(tmp_path / "alone"), **alone))
    assert_bit_equal(tmp_path / "seed_1", tmp_path / "alone")
    config = json.loads((tmp_path / "alone/config.json").read_text())
    assert config["model"] == f"{two_starts}/lm_1"
    assert list(config["inputs"])[0] == f"{two_starts}/lm_1"


def test_a_start_that_is_missing_is_an_error_before_anything_is_trained(
    base, members, two_starts, tmp_path
):
    model = f"{two_starts}/lm_{{seed}}"
    with pytest.raises(ValueError, match="lm_2"):
        train_members(base, members, tmp_path, model=model, members=3)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_members_share_a_head_by_its_seed(base, members, tmp_path):
    # Stiennon et al. 2020: a normal distribution of standard deviation 1 / sqrt(D + 1).
    width = raw_heads(members).shape[2]
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(1, width, generator=generator) / (width + 1) ** 0.5
    train_members(base, members, tmp_path, lr=0.0)
    for seed in (0, 1):
        assert_close(unscaled_head(tmp_path / f"seed_{seed}"), start)


def test_the_seed_of_a_head_is_that_of_the_run_by_default(base, members, tmp_path):
    train_members(base, members, tmp_path / "own", head_seed=None)
    train_members(base, members, tmp_path / "named", head_seed=1)
    assert_bit_equal(tmp_path / "own/seed_1", tmp_path / "named/seed_1")
    heads = [unscaled_head(tmp_path / f"own/seed_{seed}") for seed in (0, 1)]
    assert (heads[0] - heads[1]).abs().max() > 0.05


# ----------------------------------------------------------------------------------------- the mean


def test_the_std_of_a_reward_model_gives_its_trained_head_back(members):
    for seed, head in enumerate(raw_heads(members)):
        run = members / f"seed_{seed}"
        assert_close(unscaled_head(run), head)
        assert abs(read_model_config(run)["reward_std"] - 1) > 0.01


def plain_scores(run, path):
    """Plain transformers' scores of both answers of all pairs in a file, less the config's mean."""
    model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokenizer = world.tokenizer()
    scores = []
    for row in read_rows(path):
        for side in ("chosen", "rejected"):
            text = f"{row['prompt']} {row[side]}"
            ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
            with torch.no_grad():
                scores.append(model(ids).logits[0, 0] - model.config.reward_mean)
    return torch.stack(scores)


def test_the_weights_are_the_mean_of_those_that_were_trained(base, members, tmp_path):
    splits = ["test", f"more={members}/held_out.jsonl"]
    found = average(base, members, tmp_path / "mean", gold_model="world:gold", eval_splits=splits)

    # The trunks as they were saved, and the heads before they were standardised.
    first = weights(members / "seed_0")
    second = weights(members / "seed_1")
    tensors = weights(tmp_path / "mean")
    assert tensors.keys() == first.keys()
    for name in tensors.keys() - {SCORE}:
        assert_close(tensors[name], (first[name] + second[name]) / 2)
    head = raw_heads(members).mean(0)
    assert_close(unscaled_head(tmp_path / "mean"), head)
    # The mean of the standardised heads points elsewhere.
    wrong = (first[SCORE] + second[SCORE])[0].double()
    assert torch.cosine_similarity(wrong, head[0].double(), 0) < 1 - 1e-7

    # Its own scores have mean 0 and standard deviation 1.
    scores = plain_scores(tmp_path / "mean", members / "held_out.jsonl")
    assert len(scores) == 40
    assert abs(scores.mean()) < 1e-4
    assert abs(scores.std() - 1) < 1e-4

    # It is evaluated as a reward model that was trained.
    assert found == summary(tmp_path / "mean")
    for name in ("accuracy", "margin", "score_std", "gold_kendall_tau"):
        assert found[f"more/{name}"] == pytest.approx(found[f"eval/{name}"], abs=1e-5)
    trained = summary(members / "seed_0").keys()
    assert trained - found.keys() == set()
    assert "eval/gold_kendall_tau" in found


@pytest.mark.parametrize("copies", [1, 2])
def test_the_mean_of_one_model_is_the_model(base, members, tmp_path, copies):
    paths = [members / "seed_0"]
    if copies == 2:
        shutil.copytree(members / "seed_0", tmp_path / "copy")
        paths.append(tmp_path / "copy")
    average(base, members, tmp_path / "mean", *paths)
    tensors = weights(members / "seed_0")
    for name, tensor in weights(tmp_path / "mean").items():
        assert_close(tensor, tensors[name])
    config = read_model_config(tmp_path / "mean")
    own_config = read_model_config(members / "seed_0")
    for name in ("reward_mean", "reward_std"):
        assert config[name] == pytest.approx(own_config[name], rel=1e-4)


def test_the_mean_of_adapters_is_that_of_merged_models(base, members, tmp_path):
    for name in ("adapters", "merged"):
        merge = name == "merged"
        train_members(base, members, tmp_path / name, lora_rank=2, merge=merge)
        average(base, members, tmp_path / f"mean_{name}", f"{tmp_path}/{name}/seed_{{seed}}")
    assert (tmp_path / "adapters/seed_0/model/adapter_config.json").exists()
    assert_bit_equal(tmp_path / "mean_adapters", tmp_path / "mean_merged")
    assert not (tmp_path / "mean_adapters/model/adapter_config.json").exists()


def test_the_mean_of_models_in_bfloat16_is_one_too(base, members, tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(base / "sft/model")
    shutil.copytree(base / "sft/model", tmp_path / "lm")
    lm.to(torch.bfloat16).save_pretrained(tmp_path / "lm")
    train_members(base, members, tmp_path, model=f"{tmp_path}/lm", dtype="bfloat16")
    average(base, members, tmp_path / "mean", f"{tmp_path}/seed_{{seed}}", dtype="bfloat16")

    tensors = weights(tmp_path / "mean")
    for name, tensor in weights(tmp_path / "seed_0").items():
        other = weights(tmp_path / "seed_1")[name]
        assert tensors[name].dtype == torch.bfloat16
        if name != SCORE:
            assert_close(tensors[name].float(), (tensor.float() + other.float()) / 2, atol=0.01)
    scores = plain_scores(tmp_path / "mean", members / "held_out.jsonl").float()
    assert abs(scores.mean()) < 0.2
    assert abs(scores.std() - 1) < 0.1


# --------------------------------------------------------------------------- processes, and again


def run_starts_and_average(base, root, starts, folder):
    """Members of two starts, members of one, and the mean of these, as drive() takes them."""
    own = rm(base, root, model=f"{starts}/lm_{{seed}}", members=2)
    one = rm(base, root, head_seed=5, members=2)
    mean = without_training(rm(base, root, average=[f"{folder}/one/seed_{{seed}}"]))
    jobs = [
        ("rm", {**own, "output_dir": f"{folder}/own/seed_{{seed}}"}),
        ("rm", {**one, "output_dir": f"{folder}/one/seed_{{seed}}"}),
        ("rm", {**mean, "output_dir": f"{folder}/mean"}),
    ]
    for _, settings in jobs:
        train_rm.main(train_rm.Config(**settings))


def test_two_processes_train_and_average_the_same(base, members, two_starts, tmp_path):
    arguments = [str(base), str(members), str(two_starts)]
    run_starts_and_average(*arguments, tmp_path / "one")
    join(*ranks(2, run_starts_and_average, *arguments, tmp_path / "two"))
    for name in ("own/seed_0", "own/seed_1", "one/seed_0", "one/seed_1"):
        assert_bit_equal(tmp_path / f"one/{name}", tmp_path / f"two/{name}")
    # The mean's held-out texts are spread over both.
    one = weights(tmp_path / "one/mean")
    two = weights(tmp_path / "two/mean")
    for name in one:
        assert_close(one[name], two[name])
    expected = summary(tmp_path / "one/mean")
    assert summary(tmp_path / "two/mean") == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_mean_that_is_there_is_not_made_again(base, members, tmp_path, capsys):
    found = average(base, members, tmp_path / "mean")
    before = hashes(tmp_path)
    assert average(base, members, tmp_path / "mean") == found
    assert "this run is done already" in capsys.readouterr().out
    assert hashes(tmp_path) == before
    with pytest.raises(ValueError, match="another run .it differs in model, average"):
        average(base, members, tmp_path / "mean", members / "seed_1")


def test_a_mean_that_was_killed_is_made_again(base, members, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        counter = KillAt(patch)
        average(base, members, tmp_path / "whole")
    for at in range(1, counter.count + 1):
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            KillAt(patch, at)
            average(base, members, folder)
        args = ["--average", f"{members}/seed_{{seed}}", "--output_dir", str(folder), "--resume"]
        if (folder / "config.json").exists():
            args = args[2:]
            cli.run(train_rm.Config, train_rm.main, args)
        else:
            average(base, members, folder)
        for name, tensor in weights(tmp_path / "whole").items():
            assert tensor.equal(weights(folder)[name])
        assert summary(folder) == summary(tmp_path / "whole")


def test_the_default_folder_of_a_mean(members):
    config = train_rm.Config(average=[f"{members}/seed_{{seed}}"])
    assert config.output_dir == "runs/rm/averaged"
    assert config.average == [f"{members}/seed_0", f"{members}/seed_1"]
    assert config.model == config.average[0]


# ------------------------------------------------------------------------------------------- errors


@pytest.fixture
def kit(base, members, tmp_path, monkeypatch):
    """The working directory: seed_0 and seed_1; models that do not go with them."""
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        shutil.copytree(members / f"seed_{seed}", f"seed_{seed}")
    os.symlink(base / "sarm", "sarm")
    os.symlink(base / "sft", "policy")
    # One from before reward_std was kept, and others whose reward_std cannot be.
    for name, value in {"old": None, "null": "null", "zero": "0", "nan": "NaN"}.items():
        shutil.copytree("seed_0/model", name)
        config = read_model_config(members / "seed_0")
        config.pop("reward_std")
        text = json.dumps(config)
        if value is not None:
            text = text[:-1] + f', "reward_std": {value}}}'
        (tmp_path / name / "config.json").write_text(text)
    return tmp_path


def change_run(run, **changes):
    """Other settings in a run's config.json."""
    path = run / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, **changes}))


def check_refused(capfd, args, *words):
    """One line, before anything is written."""
    before = content()
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.run(train_rm.Config, train_rm.main, ["--output_dir", "out", *args.split()])
    assert exit_.value.code == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1
    for word in words:
        assert word in error
    assert content() == before


REFUSED = {
    "a SARM": ("--average seed_0 sarm", "sarm: a SARM cannot be averaged"),
    "a policy": ("--average policy seed_0", "policy: no reward_std is kept with this model"),
    "an old one": ("--average seed_0 old", "old: no reward_std is kept with this model"),
    "a std of null": ("--average seed_0 null", "null: config.json's reward_std cannot be None"),
    "a std of 0": ("--average seed_0 zero", "zero: config.json's reward_std cannot be 0"),
    "a std of nan": ("--average seed_0 nan", "nan: config.json's reward_std cannot be nan"),
    "one that is missing": ("--average seed_0 ./gone", "./gone: no such model folder"),
    "none that exists": ("--average x/seed_{seed}", "x/seed_{seed}: no such folder"),
    "one twice": ("--average seed_0 seed_0", "--average names seed_0 twice"),
    "one by two names": ("--average seed_0 ./seed_0/", "--average names ./seed_0/ twice"),
    "one inside the other": ("--average seed_0 seed_0/model", "--average names seed_0/model twice"),
    "members": (
        "--average seed_0 --members 2 --output_dir {seed}",
        "--average trains no --members",
    ),
    "a SARM to train": ("--average seed_0 --sarm x", "--average trains no --members and no --sarm"),
    "a head": ("--average seed_0 --head_seed 1", "--average starts no score head"),
    "a model": ("--average seed_0 --model policy", "--average starts from its own models"),
    "the head of a SARM": ("--sarm x --head_seed 1", "a head of zeros, which has no --head_seed"),
    "a negative seed": ("--head_seed -1", "--head_seed must be at least 0, not -1"),
}


@pytest.mark.parametrize("args, words", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_averaged(kit, capfd, args, words):
    check_refused(capfd, args, words)


STARTS = {
    "another head": {"head_seed": 6},
    "the head of the seed": {"head_seed": None},
    "another model": {"model": "hub/model", "inputs": {}},
}


@pytest.mark.parametrize("changes", STARTS.values(), ids=STARTS.keys())
def test_members_of_different_starts_are_not_averaged(kit, capfd, changes):
    change_run(kit / "seed_1", **changes)
    words = "these models started from 2 different models or score heads"
    check_refused(capfd, "--average seed_{seed}", words)


def test_a_start_is_known_by_its_content(kit, capfd):
    """Not by its name: it may have been trained again, or have been moved."""
    settings = json.loads((kit / "seed_1/config.json").read_text())
    (place,) = [name for name in settings["inputs"] if "sft" in name]
    print_of_start = settings["inputs"][place]
    settings["inputs"][place] = {**print_of_start, "digest": "0"}
    change_run(kit / "seed_1", inputs=settings["inputs"])
    check_refused(capfd, "--average seed_{seed}", "different models or score heads")

    change_run(kit / "seed_1", model="moved", inputs={"moved": print_of_start})
    train_rm.check_members(["seed_0", "seed_1"])


def test_models_of_different_architectures_have_no_mean(base, members, kit, capfd):
    """A folder of a model alone does not say what it started from."""
    config = AutoModelForCausalLM.from_pretrained(base / "sft/model").config
    config.num_hidden_layers -= 1
    shutil.copytree("seed_0/model", "shallow")
    AutoModelForCausalLM.from_config(config).save_pretrained("shallow")
    reward_model = load_reward_model("shallow", seed=0)
    reward_model.standardise(0.0, 2.0)
    reward_model.model.save_pretrained("shallow")
    args = f"--average seed_0 shallow --dataset {base}/pairs.jsonl --eval_size 8"
    check_refused(capfd, args, "--average: models of different architectures have no mean")

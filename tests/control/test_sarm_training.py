"""train_rm.py --sarm: what each mode trains, by hand and by autograd; that ranks, kills and micro-batches change nothing; bad input.

B texts of a batch, D hidden, M features, k kept
"""

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file
from support import metrics, weights, write_rows
from transformers import AutoModelForCausalLM

import train_rm
from nanorlhf import data, splits, world
from nanorlhf.control.feature_reader import check_feature_reader
from nanorlhf.control.sarm_training import MODES, check_start, start
from nanorlhf.errors import InputError
from nanorlhf.interp.sae_files import save_sae, the_one_sae
from nanorlhf.packing import Answers, pack
from nanorlhf.rewards import load_reward
from nanorlhf.runtime import cli
from nanorlhf.runtime.distributed import Dist
from nanorlhf.runtime.files import write_json
from nanorlhf.sae import TopKSAE

D, M, K, L = 96, 128, 8, 2
ALONE = Dist(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with lm/ (random, in the world's size), sae/policy/1_residual and pairs.jsonl."""
    root = tmp_path_factory.mktemp("sarm")
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(world.model_config())
    for p in lm.parameters():
        if p.dim() > 1:
            p.data.mul_(4)
    lm.save_pretrained(root / "lm")
    world.tokenizer().save_pretrained(root / "lm")
    new_autoencoder(root / "sae/policy/1_residual", model=f"{root}/lm")
    write_rows(root / "pairs.jsonl", world.preferences(60))
    return root


def new_autoencoder(
    path, d=D, relu=False, normalize="token", layer=L - 1, site="residual", **notes
):
    sae = TopKSAE(d, M, K, normalize, relu, seed=3)
    sae.b_enc.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    save_sae(sae, str(path), layer=layer, site=site, tokens="sentence_ends", **notes)


def config(base, folder, **changes):
    settings = {"model": f"{base}/lm", "sarm": f"{base}/sae", "dataset": f"{base}/pairs.jsonl", "steps": 3, "batch_size": 8, "eval_size": 8,
                "warmup": 1, "output_dir": str(folder)}  # fmt: skip
    return train_rm.Config(**settings | changes)


def train(base, folder, **changes):
    return train_rm.main(config(base, folder, **changes))


def sarm_of(base, mode):
    c = config(base, "x", sarm_mode=mode)
    return start(c, check_start(c, ALONE), "cpu")[0]


def batch():
    rows = world.preferences(6)
    prompts, responses, _ = data.encode(world.tokenizer(), rows, "chosen", 128)
    return pack(prompts, responses)


def kind_of(name):
    """Of a tensor of the public layout: which part of the model it is."""
    own = {"score.weight": "head", "sae.decoder.weight": "decoder"}
    return own.get(
        name,
        "encoder" if name.startswith("sae.") else "norm" if "final_layer_norm" in name else "lm",
    )


TRAINED = {"frozen": {"head"}, "encoder_frozen": {"head", "lm"}, "joint": {"head", "lm", "encoder"},
           "detached": {"head", "lm", "encoder", "decoder"}}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_what_a_mode_trains(base, tmp_path, mode):
    """A run from its folder: which tensors moved, the first step's loss, and that the saved model is the one that was evaluated."""
    summary = train(base, tmp_path / mode, sarm_mode=mode, sarm_lambda=0.7)
    before, after = (
        sarm_of(base, mode).layout(),
        load_file(str(tmp_path / mode / "model/model.safetensors")),
    )
    assert before.keys() == after.keys() and not before["score.weight"].any()
    moved = {name for name in before if not before[name].equal(after[name])}
    assert {kind_of(name) for name in moved} == TRAINED[mode]
    still = {name for name in before if kind_of(name) in TRAINED[mode]} - moved
    assert all(
        name.endswith("bias") for name in still
    )  # of no effect on a score, such as a key's bias
    torch.testing.assert_close(
        after["sae.decoder.weight"].norm(dim=0), torch.ones(M), rtol=1e-5, atol=1e-5
    )
    first = metrics(tmp_path / mode)[0]
    error = first.get("reconstruction", 0.0)
    assert first["loss"] == pytest.approx(math.log(2) + 0.7 * error, rel=1e-5) and (
        error > 0.01
    ) == (mode == "detached")
    # Standardised on the held-out texts; loaded as a reward, it gives these scores.
    assert summary["eval/score_mean"] == pytest.approx(0, abs=1e-4) and summary[
        "eval/score_std"
    ] == pytest.approx(1, rel=1e-3)
    _, held_out, _ = splits.load(config(base, "x"), "pairs")
    reward = load_reward(str(tmp_path / mode), None, ALONE)
    chosen, rejected = (
        reward(Answers([r["prompt"] for r in held_out], [r[f] for r in held_out], None))
        for f in ("chosen", "rejected")
    )
    assert (chosen - rejected).mean().item() == pytest.approx(
        summary["eval/margin"], rel=1e-3, abs=1e-5
    )
    assert check_feature_reader(str(tmp_path / mode)) == M
    stored = json.loads((tmp_path / mode / "model/config.json").read_text())
    assert stored["sarm_param"] == {"sae_source_layer": L, "sae_latent_size": M, "sae_k": K, "sae_use_sequence_level": True,
                                    "sarm_use_activation": True} and stored["num_hidden_layers"] == 4  # fmt: skip


def test_gradients_of_the_modes(base):
    """Against autograd through the dense formulas: in `detached` the LM's gradient is joint's, and reconstruction's ends at h."""
    grads = {}
    for mode in MODES:
        sarm = sarm_of(base, mode)
        sarm.score.weight.data.normal_(generator=torch.Generator().manual_seed(2))
        scores, errors = sarm(batch(), reconstruct=True)
        (scores.sum() + (3.0 * errors.sum() if mode == "detached" else 0.0)).backward()
        grads[mode] = {name: p.grad for name, p in sarm.named_parameters() if p.grad is not None}
        wanted = {name for name, p in sarm.named_parameters() if p.requires_grad}
        assert set(grads[mode]) == wanted and not any(name.startswith("norm.") for name in wanted)
    for name, grad in grads["joint"].items():
        if name.startswith(("trunk.", "score.")):
            assert grad.equal(grads["detached"][name]) and (
                name.startswith("score.") or grad.equal(grads["encoder_frozen"][name])
            ), name
    assert grads["frozen"]["score.weight"].equal(grads["joint"]["score.weight"])

    sae = sarm.sae  # in `detached`
    sarm.zero_grad()
    h = sarm.pooled(batch()).detach()
    x = (h - h.mean(1, keepdim=True)) / (h.std(1, keepdim=True) + 1e-6)
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    z = torch.where(pre >= pre.topk(K).values[:, -1:], pre, 0.0)
    errors = (x - z @ sae.W_dec - sae.b_dec).square().sum(1) / D
    torch.testing.assert_close(sarm(batch(), reconstruct=True)[1], errors, rtol=1e-4, atol=1e-5)
    ((z @ sarm.score.weight[0]).sum() + 3.0 * errors.sum()).backward()
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(
            grads["detached"][f"sae.{name}"], getattr(sae, name).grad, rtol=1e-3, atol=1e-4
        )


def test_one_step_of_the_head_by_hand(base, tmp_path):
    """`frozen` is logistic regression on the difference of latents: the first gradient is -mean(z_c - z_r) / 2."""
    seen = {}
    real = train_rm.optimizer_step

    def step(optimizer, module, *args):
        seen.setdefault("grad", module.score.weight.grad.clone())
        return real(optimizer, module, *args)

    train_rm.optimizer_step = step
    try:
        train(base, tmp_path / "run", sarm_mode="frozen", steps=1)
    finally:
        train_rm.optimizer_step = real
    c = config(base, "x")
    rows, _, _ = splits.load(c, "pairs")
    rows = [rows[i] for i in data.batch_indices(len(rows), 8, 0, 0)]
    sarm, z = sarm_of(base, "frozen"), []
    for field in ("chosen", "rejected"):
        prompts, responses, _ = data.encode(world.tokenizer(), rows, field, 128)
        z.append(sarm.read(pack(prompts, responses)).latents)
    torch.testing.assert_close(seen["grad"][0], -(z[0] - z[1]).mean(0) / 2, rtol=1e-4, atol=1e-6)


def test_the_accuracy_of_a_head_of_zeros(base, tmp_path):
    """A SARM starts with the score 0 for every text: all pairs are ties at step 1, and a tie counts half."""
    train(base, tmp_path / "run", steps=2)
    assert metrics(tmp_path / "run")[0]["accuracy"] == 0.5


# ----------------------------------------------------------------------------------------------------------- scores without a spread


@pytest.mark.parametrize("kind", ["sarm", "plain"])
def test_texts_that_are_all_the_same_to_the_model(base, tmp_path, monkeypatch, kind):
    """Words that the tokenizer does not know are one token: an error before any model is loaded."""

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(train_rm, "load_reward_model", loaded)
    monkeypatch.setattr(train_rm.sarm_training, "start", loaded)
    unknown = [{"prompt": f"qqa{i}", "chosen": "qqb qqc", "rejected": "qqd qqe"} for i in range(20)]
    write_rows(tmp_path / "unknown.jsonl", unknown)
    sarm = {} if kind == "sarm" else {"sarm": ""}
    with pytest.raises(InputError, match="chosen and rejected of every training pair are the same"):
        train(base, tmp_path / "run", dataset=f"{tmp_path}/unknown.jsonl", **sarm)
    with pytest.raises(InputError, match="all texts of the 8 held-out pairs are the same"):
        train(base, tmp_path / "run", eval_dataset=f"{tmp_path}/unknown.jsonl", **sarm)
    assert not (tmp_path / "run").exists()


def test_a_head_of_zeros_that_cannot_move(base):
    with pytest.raises(InputError, match="--lr 0"):
        config(base, "x", lr=0.0)
    assert config(base, "x", lr=0.0, sarm="").lr == 0


def test_a_model_that_gives_one_score(base, tmp_path):
    """All weights 0: what only training can tell is one line too, and no division by zero."""
    lm = AutoModelForCausalLM.from_pretrained(base / "lm")
    for p in lm.parameters():
        p.data.zero_()
    lm.save_pretrained(tmp_path / "blind")
    world.tokenizer().save_pretrained(tmp_path / "blind")
    with pytest.raises(
        InputError, match="all 16 held-out texts have the score 0, so that there is no spread"
    ):
        train(base, tmp_path / "run", model=f"{tmp_path}/blind", sarm="", lr=0.0)


# -------------------------------------------------------------------- members, adapters, folders


def test_members(base, tmp_path):
    train(base, tmp_path / "sarm_{seed}", members=2, independent_noise=True, label_noise=0.5)
    train(base, tmp_path / "alone", seed=1, noise_seed=1, label_noise=0.5)
    a, b, c = (weights(tmp_path / name) for name in ("sarm_0", "sarm_1", "alone"))
    assert all(b[name].equal(c[name]) for name in b)
    assert not a["model/model.safetensors:score.weight"].equal(
        b["model/model.safetensors:score.weight"]
    )


def test_frozen_layers_and_merged_adapters(base, tmp_path):
    train(base, tmp_path / "half", sarm_mode="encoder_frozen", freeze_layers=0.5)  # of the L blocks
    train(base, tmp_path / "lora", sarm_mode="encoder_frozen", lora_rank=2, merge=True)
    before = sarm_of(base, "encoder_frozen").layout()
    half, lora = (
        load_file(str(tmp_path / name / "model/model.safetensors")) for name in ("half", "lora")
    )
    moved = [{name for name in before if not before[name].equal(x[name])} for x in (half, lora)]
    assert not any(".layers.0." in name or "embed_in" in name for name in moved[0]) and any(
        ".layers.1." in name for name in moved[0]
    )
    assert {name.split(".")[-2] for name in moved[1]} == {
        "score",
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    }


def test_where_it_goes(base):
    names = [train_rm.Config(**changes).output_dir for changes in (
        {}, {"sarm": "x"}, {"sarm": "x", "members": 2}, {"sarm": "x", "output_dir": "here_{seed}", "seed": 3})]  # fmt: skip
    assert names == ["runs/rm/seed_0", "runs/sarm", "runs/sarm/seed_{seed}", "here_3"]


def test_resume_reads_the_settings_of_its_own_folder(tmp_path, monkeypatch):
    """--sarm's default folder is runs/sarm, and the dense reward model's settings are none of its business."""
    monkeypatch.chdir(tmp_path)
    for folder, lr in (("runs/rm/seed_0", 5e-4), ("runs/sarm", 7e-4)):
        os.makedirs(folder)
        write_json(f"{folder}/config.json", {"lr": lr, "steps": 9})
    parsed = cli.parse(train_rm.Config, ["--sarm", "sae", "--resume"])
    assert (parsed.output_dir, parsed.lr, parsed.steps) == ("runs/sarm", 7e-4, 9)
    assert cli.parse(train_rm.Config, ["--resume"]).lr == 5e-4


# ------------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "notes, match",
    [
        ({"relu": True}, "without ReLU"), ({"normalize": "dataset"}, "standardised tokens"), ({"site": "mlp"}, "residual"),
        ({"layer": 4}, "layers 0 to 3"), ({"layer": None}, "layers 0 to 3"), ({"d": 64}, "width 64"),
    ],
)  # fmt: skip
def test_the_wrong_autoencoder(base, tmp_path, monkeypatch, notes, match):
    monkeypatch.setattr(
        train_rm.sarm_training, "start", lambda *args: pytest.fail("a model was loaded")
    )
    new_autoencoder(tmp_path / "sae", **notes)
    with pytest.raises(InputError, match=match):
        train(base, tmp_path / "run", sarm=f"{tmp_path}/sae")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"sarm_mode": "all"}, "--sarm_mode must be"), ({"sarm_lambda": -1.0}, "--sarm_lambda"), ({"distributed": "fsdp"}, "ddp"),
        ({"lora_rank": 2}, "--merge"), ({"sarm_mode": "frozen", "freeze_layers": 0.5}, "frozen"), ({"sarm": "/no/where"}, "/no/where"),
        ({"sarm_mode": "frozen", "lora_rank": 2, "merge": True}, "frozen"), ({"members": 2}, "{seed}"),
    ],
)  # fmt: skip
def test_bad_input(base, tmp_path, changes, match):
    with pytest.raises(InputError, match=match):
        train(base, tmp_path / "run", **changes)


def test_another_model_is_said_and_several_autoencoders_are_refused(base, tmp_path, capsys):
    new_autoencoder(tmp_path / "a/policy/1_residual", model="elsewhere")
    c = config(base, "x", sarm=str(tmp_path / "a"))
    check_start(c, ALONE)
    assert f"was trained on elsewhere, not on {base}/lm" in capsys.readouterr().out
    check_start(config(base, "x"), ALONE)
    assert not capsys.readouterr().out
    new_autoencoder(tmp_path / "a/policy/0_residual")
    with pytest.raises(
        InputError, match="several autoencoders; name one of .*0_residual, .*1_residual"
    ):
        the_one_sae(str(tmp_path / "a"))

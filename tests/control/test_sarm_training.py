"""train_rm.py --sarm: what each mode trains, by hand and by autograd; that members and adapters
work as they do without --sarm; bad input.

    B texts of a batch, D hidden, M features, K kept
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import encode_field, metrics, weights, write_rows
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

D = 96
M = 128
K = 8
L = 2  # the SARM's blocks: the autoencoder reads the second of the four, layer 1
ALONE = Dist(0, 1, torch.device("cpu"))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def refuses(words):
    """What stands below it must raise an InputError that says these words."""
    return pytest.raises(InputError, match=words)


# ------------------------------------------------------------------------------- models and runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with lm/ (random, in the world's size), sae/policy/1_residual and pairs.jsonl."""
    root = tmp_path_factory.mktemp("sarm")
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(world.model_config())
    # With weights as small as at the start of a training all texts would have the same latents.
    for p in lm.parameters():
        if p.dim() > 1:
            p.data.mul_(4)
    save_lm(lm, root / "lm")
    save_autoencoder(root / "sae/policy/1_residual", model=f"{root}/lm")
    write_rows(root / "pairs.jsonl", world.preferences(60))
    return root


def save_lm(lm, path):
    lm.save_pretrained(path)
    world.tokenizer().save_pretrained(path)


def save_autoencoder(path, d=D, relu=False, normalize="token", **notes):
    """A random autoencoder, of the kind and place that a SARM needs unless it is said otherwise."""
    sae = TopKSAE(d, M, K, normalize, relu, seed=3)
    sae.b_enc.data.normal_(0, 0.1, generator=seeded(1))
    place = {"layer": L - 1, "site": "residual", "tokens": "sentence_ends"}
    save_sae(sae, str(path), **place | notes)


def config(base, folder, **changes):
    settings = {
        "model": f"{base}/lm",
        "sarm": f"{base}/sae",
        "dataset": f"{base}/pairs.jsonl",
        "output_dir": str(folder),
        "steps": 3,
        "batch_size": 8,
        "eval_size": 8,
        "warmup": 1,
    }
    return train_rm.Config(**settings | changes)


def train(base, folder, **changes):
    return train_rm.main(config(base, folder, **changes))


def start_sarm(base, mode):
    """The SARM that a run with these settings starts from."""
    c = config(base, "x", sarm_mode=mode)
    sarm, _ = start(c, check_start(c, ALONE), "cpu")
    return sarm


def pack_texts(rows, field):
    """The texts of rows of preferences, with their chosen or their rejected answers."""
    prompts, responses = encode_field(world.tokenizer(), rows, field, 128)
    return pack(prompts, responses)


def changed_names(a, b):
    """The names of the tensors that differ between two models of one kind."""
    assert a.keys() == b.keys()
    return {name for name in a if not a[name].equal(b[name])}


def load_model(folder):
    return load_file(str(folder / "model/model.safetensors"))


# ----------------------------------------------------------------------- what is trained, and how


def part_of(name):
    """Which part of the model a tensor of the public layout is."""
    if name == "score.weight":
        return "head"
    if name == "sae.decoder.weight":
        return "decoder"
    if name.startswith("sae."):
        return "encoder"
    if "final_layer_norm" in name:  # kept in the file, of no use to a SARM
        return "norm"
    return "lm"


TRAINED = {
    "frozen": {"head"},
    "encoder_frozen": {"head", "lm"},
    "joint": {"head", "lm", "encoder"},
    "detached": {"head", "lm", "encoder", "decoder"},
}


@pytest.fixture(scope="module", params=MODES)
def trained(request, base, tmp_path_factory):
    """A run of three steps in each mode, with lambda 0.7: its mode, folder and summary."""
    folder = tmp_path_factory.mktemp(request.param)
    summary = train(base, folder, sarm_mode=request.param, sarm_lambda=0.7)
    return SimpleNamespace(mode=request.param, folder=folder, summary=summary)


def test_what_a_mode_trains(base, trained):
    before = start_sarm(base, trained.mode).layout()
    moved = changed_names(before, load_model(trained.folder))
    assert not before["score.weight"].any()  # the head starts at zero
    assert {part_of(name) for name in moved} == TRAINED[trained.mode]
    # Of what is trained, only a bias that has no effect on a score may stay, such as a key's.
    for name in before.keys() - moved:
        if part_of(name) in TRAINED[trained.mode]:
            assert name.endswith("bias"), name


def test_directions_of_the_decoder_keep_unit_length(trained):
    norms = load_model(trained.folder)["sae.decoder.weight"].norm(dim=0)
    torch.testing.assert_close(norms, torch.ones(M), rtol=1e-5, atol=1e-5)


def first_batch(base):
    """The pairs of a run's first step."""
    rows, _, _ = splits.load(config(base, "x"), "pairs")
    return [rows[i] for i in data.batch_indices(len(rows), 8, 0, 0)]


def test_the_first_loss(base, trained):
    """All scores are 0: log 2 a pair, and in `detached` 0.7 times the reconstruction error.

    The error of a pair is the mean over its two texts.
    """
    error = 0.0
    if trained.mode == "detached":
        sarm = start_sarm(base, "detached")
        _, chosen = sarm(pack_texts(first_batch(base), "chosen"), reconstruct=True)
        _, rejected = sarm(pack_texts(first_batch(base), "rejected"), reconstruct=True)
        error = torch.cat([chosen, rejected]).mean().item()
        assert error > 0.01
    first, *_ = metrics(trained.folder)
    logged_error = first.get("reconstruction", 0.0)
    assert logged_error == pytest.approx(error, rel=1e-4)
    assert first["loss"] == pytest.approx(math.log(2) + 0.7 * logged_error, rel=1e-5)


def test_the_saved_model_is_the_one_that_was_evaluated(base, trained):
    """Its scores are standardised on the held-out texts; as a reward, it has their margin."""
    summary = trained.summary
    assert summary["eval/score_mean"] == pytest.approx(0, abs=1e-4)
    assert summary["eval/score_std"] == pytest.approx(1, rel=1e-3)

    reward = load_reward(str(trained.folder), None, ALONE)
    _, held_out, _ = splits.load(config(base, "x"), "pairs")
    prompts = [row["prompt"] for row in held_out]
    chosen = reward(Answers(prompts, [row["chosen"] for row in held_out], None))
    rejected = reward(Answers(prompts, [row["rejected"] for row in held_out], None))
    margin = (chosen - rejected).mean().item()
    assert margin == pytest.approx(summary["eval/margin"], rel=1e-3, abs=1e-5)


def test_the_saved_config_is_that_of_the_public_checkpoints(trained):
    assert check_feature_reader(str(trained.folder)) == M
    stored = json.loads((trained.folder / "model/config.json").read_text())
    assert stored["num_hidden_layers"] == 4
    assert stored["sarm_param"] == {
        "sae_source_layer": L,
        "sae_latent_size": M,
        "sae_k": K,
        "sae_use_sequence_level": True,
        "sarm_use_activation": True,
    }


# The factor of the reconstruction errors in the loss below.
LAMBDA = 3.0


def gradients_of(sarm, mode):
    """{name: gradient} of the sum of all scores, and in `detached` of lambda times the errors."""
    batch = pack_texts(world.preferences(6), "chosen")
    scores, errors = sarm(batch, reconstruct=True)
    loss = scores.sum()
    if mode == "detached":
        loss = loss + LAMBDA * errors.sum()
    loss.backward()
    return {name: p.grad for name, p in sarm.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def gradients(base):
    """{mode: its gradients}, all at the same weights."""
    found = {}
    for mode in MODES:
        sarm = start_sarm(base, mode)
        sarm.score.weight.data.normal_(generator=seeded(2))
        found[mode] = gradients_of(sarm, mode)
        # What has a gradient is what the optimizer is given.
        trained_names = {name for name, p in sarm.named_parameters() if p.requires_grad}
        assert found[mode].keys() == trained_names
        assert not any(name.startswith("norm.") for name in trained_names)
    return found


def test_the_gradient_of_the_lm_is_the_same_in_all_modes(gradients):
    """In `detached` the gradient of the reconstruction ends at h."""
    for name, gradient in gradients["joint"].items():
        if name.startswith("trunk."):
            assert gradient.equal(gradients["detached"][name]), name
            assert gradient.equal(gradients["encoder_frozen"][name]), name


def test_the_gradient_of_the_head_is_the_same_where_the_latents_are(gradients):
    expected = gradients["joint"]["score.weight"]
    assert gradients["detached"]["score.weight"].equal(expected)
    assert gradients["frozen"]["score.weight"].equal(expected)


def test_gradients_of_the_autoencoder_by_dense_formulas(base, gradients):
    """Against autograd through z = TopK(W_e (x - b_d) + b_e) and x^ = W_d z + b_d, from h on."""
    sarm = start_sarm(base, "detached")
    sarm.score.weight.data.normal_(generator=seeded(2))
    batch = pack_texts(world.preferences(6), "chosen")
    sae = sarm.sae

    h = sarm.pooled(batch).detach()  # [B, D]
    x = (h - h.mean(1, keepdim=True)) / (h.std(1, keepdim=True) + 1e-6)
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc  # [B, M]
    smallest_kept = pre.topk(K).values[:, -1:]
    z = torch.where(pre >= smallest_kept, pre, 0.0)
    x_hat = z @ sae.W_dec + sae.b_dec
    errors = (x - x_hat).square().sum(1) / D  # [B]
    scores = z @ sarm.score.weight[0]
    (scores.sum() + LAMBDA * errors.sum()).backward()

    _, found_errors = sarm(batch, reconstruct=True)
    torch.testing.assert_close(found_errors, errors, rtol=1e-4, atol=1e-5)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        found = gradients["detached"][f"sae.{name}"]
        expected = getattr(sae, name).grad
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_one_step_of_the_head_by_hand(base, tmp_path, monkeypatch):
    """`frozen` is logistic regression on the difference of latents.

    At w = 0 the gradient is -mean(z_chosen - z_rejected) / 2, since sigmoid(0) = 1/2.
    """
    seen = []
    real_step = train_rm.optimizer_step

    def record_gradient(optimizer, module, *args):
        seen.append(module.score.weight.grad.clone())
        return real_step(optimizer, module, *args)

    monkeypatch.setattr(train_rm, "optimizer_step", record_gradient)
    train(base, tmp_path / "run", sarm_mode="frozen", steps=1)

    batch = first_batch(base)
    sarm = start_sarm(base, "frozen")
    z_chosen = sarm.read(pack_texts(batch, "chosen")).latents  # [B, M]
    z_rejected = sarm.read(pack_texts(batch, "rejected")).latents
    expected = -(z_chosen - z_rejected).mean(0) / 2
    torch.testing.assert_close(seen[0][0], expected, rtol=1e-4, atol=1e-6)


def test_the_accuracy_of_a_head_of_zeros(base, tmp_path):
    """A SARM starts with the score 0 for every text: all pairs are ties, and a tie counts half."""
    train(base, tmp_path / "run", steps=2)
    assert metrics(tmp_path / "run")[0]["accuracy"] == 0.5


# -------------------------------------------------------------------------- scores without a spread


@pytest.fixture
def no_models(monkeypatch):
    """Whoever loads a model fails."""

    def refuse_to_load(*args, **kwargs):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(train_rm, "load_reward_model", refuse_to_load)
    monkeypatch.setattr(train_rm.sarm_training, "start", refuse_to_load)


@pytest.mark.parametrize("changes", [{}, {"sarm": ""}], ids=["sarm", "plain"])
@pytest.mark.parametrize(
    "flag, words",
    [
        ("dataset", "chosen and rejected of every training pair are the same"),
        ("eval_dataset", "all texts of the 8 held-out pairs are the same"),
    ],
)
def test_texts_that_are_all_the_same_to_the_model(base, tmp_path, no_models, changes, flag, words):
    """Words that the tokenizer does not know are one token."""
    rows = []
    for i in range(20):
        rows.append({"prompt": f"qqa{i}", "chosen": "qqb qqc", "rejected": "qqd qqe"})
    write_rows(tmp_path / "unknown.jsonl", rows)
    with refuses(words):
        train(base, tmp_path / "run", **{flag: f"{tmp_path}/unknown.jsonl"}, **changes)
    assert not (tmp_path / "run").exists()


def test_a_head_of_zeros_that_cannot_move(base):
    with refuses("--lr 0"):
        config(base, "x", lr=0.0)
    assert config(base, "x", lr=0.0, sarm="").lr == 0


def test_a_model_that_gives_one_score(base, tmp_path):
    """All weights 0: what only training can tell is one line too, and no division by zero."""
    lm = AutoModelForCausalLM.from_pretrained(base / "lm")
    for p in lm.parameters():
        p.data.zero_()
    save_lm(lm, tmp_path / "blind")
    with refuses("all 16 held-out texts have the score 0, so that there is no spread"):
        train(base, tmp_path / "run", model=f"{tmp_path}/blind", sarm="", lr=0.0)


# -------------------------------------------------------------------- members, adapters, folders


@pytest.mark.slow
def test_a_member_is_the_run_of_its_seed(base, tmp_path):
    train(base, tmp_path / "sarm_{seed}", members=2, independent_noise=True, label_noise=0.5)
    train(base, tmp_path / "alone", seed=1, noise_seed=1, label_noise=0.5)
    first = weights(tmp_path / "sarm_0")
    second = weights(tmp_path / "sarm_1")
    assert not changed_names(second, weights(tmp_path / "alone"))
    assert "model/model.safetensors:score.weight" in changed_names(first, second)


def test_frozen_layers_do_not_move(base, tmp_path):
    """Half of the L = 2 blocks: the first one, and the embeddings below it."""
    train(base, tmp_path / "half", sarm_mode="encoder_frozen", freeze_layers=0.5)
    before = start_sarm(base, "encoder_frozen").layout()
    moved = changed_names(before, load_model(tmp_path / "half"))
    assert not any(".layers.0." in name or "embed_in" in name for name in moved)
    assert any(".layers.1." in name for name in moved)


def test_merged_adapters_move_the_linear_layers_alone(base, tmp_path):
    train(base, tmp_path / "lora", sarm_mode="encoder_frozen", lora_rank=2, merge=True)
    before = start_sarm(base, "encoder_frozen").layout()
    moved = changed_names(before, load_model(tmp_path / "lora"))
    layers = {name.split(".")[-2] for name in moved}
    assert layers == {"score", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


@pytest.mark.parametrize(
    "changes, folder",
    [
        ({}, "runs/rm/seed_0"),
        ({"sarm": "x"}, "runs/sarm"),
        ({"sarm": "x", "members": 2}, "runs/sarm/seed_{seed}"),
        ({"sarm": "x", "output_dir": "here_{seed}", "seed": 3}, "here_3"),
    ],
)
def test_where_it_goes(changes, folder):
    assert train_rm.Config(**changes).output_dir == folder


def test_resume_reads_the_settings_of_its_own_folder(tmp_path, monkeypatch):
    """--sarm's default folder is runs/sarm; the dense reward model has settings of its own."""
    monkeypatch.chdir(tmp_path)
    for folder, lr in [("runs/rm/seed_0", 5e-4), ("runs/sarm", 7e-4)]:
        (tmp_path / folder).mkdir(parents=True)
        write_json(f"{folder}/config.json", {"lr": lr, "steps": 9})

    with_sarm = cli.parse(train_rm.Config, ["--sarm", "sae", "--resume"])
    assert with_sarm.output_dir == "runs/sarm"
    assert with_sarm.lr == 7e-4
    assert with_sarm.steps == 9
    dense = cli.parse(train_rm.Config, ["--resume"])
    assert dense.lr == 5e-4


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "kind, words",
    [
        ({"relu": True}, "without ReLU"),
        ({"normalize": "dataset"}, "standardised tokens"),
        ({"site": "mlp"}, "residual"),
        ({"layer": 4}, "layers 0 to 3"),
        ({"layer": None}, "layers 0 to 3"),
        ({"d": 64}, "width 64"),
    ],
)
def test_the_wrong_autoencoder(base, tmp_path, no_models, monkeypatch, kind, words):
    """It is found before texts are encoded, which may take long."""
    monkeypatch.setattr(train_rm, "encode_data", lambda *args: pytest.fail("texts were encoded"))
    save_autoencoder(tmp_path / "sae", **kind)
    with refuses(words):
        train(base, tmp_path / "run", sarm=f"{tmp_path}/sae")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sarm": "/no/where"}, "/no/where"),
        ({"sarm_mode": "all"}, "--sarm_mode must be"),
        ({"sarm_lambda": -1.0}, "--sarm_lambda"),
        ({"distributed": "fsdp"}, "ddp"),
        ({"lora_rank": 2}, "--merge"),
        ({"sarm_mode": "frozen", "freeze_layers": 0.5}, "frozen"),
        ({"sarm_mode": "frozen", "lora_rank": 2, "merge": True}, "frozen"),
        ({"members": 2}, "{seed}"),
    ],
)
def test_bad_input(base, tmp_path, changes, words):
    with refuses(words):
        train(base, tmp_path / "run", **changes)


def test_an_autoencoder_of_another_model_is_a_warning(base, tmp_path, capsys):
    save_autoencoder(tmp_path / "a/policy/1_residual", model="elsewhere")
    check_start(config(base, "x", sarm=f"{tmp_path}/a"), ALONE)
    assert f"was trained on elsewhere, not on {base}/lm" in capsys.readouterr().out
    # The autoencoder of this model is none.
    check_start(config(base, "x"), ALONE)
    assert not capsys.readouterr().out


def test_several_autoencoders_are_refused(tmp_path):
    save_autoencoder(tmp_path / "a/policy/0_residual")
    save_autoencoder(tmp_path / "a/policy/1_residual")
    with refuses("several autoencoders; name one of .*0_residual, .*1_residual"):
        the_one_sae(f"{tmp_path}/a")

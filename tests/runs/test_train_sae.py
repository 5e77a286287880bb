"""train_sae.py on a tiny model and its base.

What it writes is checked against plain forward passes, and is the same on two processes and after a
kill.

    T tokens, D hidden, M features
"""

import contextlib
import json
import math
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support import ENV, REPO, encode_field, join, metrics, ranks, read_rows, summary, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import train_sae
from nanorlhf import world
from nanorlhf.control.feature_reader import check_feature_reader
from nanorlhf.errors import InputError
from nanorlhf.interp.activation_store import Tokens, hold_out
from nanorlhf.interp.sae_files import load_sae
from nanorlhf.models import Policy, RewardModel, save_policy, save_reward_model
from nanorlhf.runtime.distributed import Dist
from nanorlhf.sae import fvu
from nanorlhf.tokens import encode_prompts
from train_sae import load_lm, loss_recovered

KEYS = ["policy/1_mlp", "base/1_mlp"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base/ and policy/, whose block 1 has moved; texts.jsonl; run/, a plain run on both models."""
    root = tmp_path_factory.mktemp("sae")
    torch.manual_seed(0)
    config = world.model_config()
    config.update({"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64})
    lm = AutoModelForCausalLM.from_config(config)
    save_lm(lm, world.tokenizer(), root / "base")
    for parameter in lm.gpt_neox.layers[1].parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_lm(lm, world.tokenizer(), root / "policy")
    write_rows(root / "texts.jsonl", world.demonstrations(200))
    train(root, root / "run")
    return root


def save_lm(lm, tokenizer, folder):
    save_policy(Policy(lm, value_head=False), tokenizer, str(folder))


def config_of(root, folder, **changes):
    """The plain run: the MLP of the block that has moved most, 12 steps."""
    settings = {
        "output_dir": str(folder),
        "model": f"{root}/policy",
        "base": f"{root}/base",
        "dataset": f"{root}/texts.jsonl",
        "layers": "highest:1",
        "expansion": 2,
        "k": 4,
        "steps": 12,
        "batch_size": 64,
        "eval_size": 16,
        "checkpoint_every": 4,
        "device": "cpu",
        "buffer_tokens": 512,
        "dead_after": 300,
    }
    return train_sae.Config(**{**settings, **changes})


def train(root, folder, **changes):
    """The plain run with changes. -> its summary"""
    return train_sae.main(config_of(root, folder, **changes))


def notes_of(sae_folder):
    """What an autoencoder's folder says of how it was trained."""
    return json.loads((sae_folder / "cfg.json").read_text())["metadata"]


def all_tensors(run):
    """{its file: {name: tensor}} of each autoencoder that a run has trained."""
    found = {}
    for path in sorted(run.rglob("sae_weights.safetensors")):
        found[str(path.relative_to(run))] = load_file(path)
    return found


def check_equal(tensors, others):
    for name in tensors:
        assert tensors[name].equal(others[name]), name


def check_equal_runs(run, other):
    """Metrics, summary and autoencoders are equal bit for bit."""
    assert metrics(run) == metrics(other)
    assert len(metrics(run)) == 12
    assert (run / "summary.json").read_bytes() == (other / "summary.json").read_bytes()
    others = all_tensors(other).values()
    for tensors, other_tensors in zip(all_tensors(run).values(), others, strict=True):
        check_equal(tensors, other_tensors)


def check_close_runs(run, other):
    """Metrics and autoencoders are equal up to float error."""
    for row, other_row in zip(metrics(run), metrics(other), strict=True):
        assert row == pytest.approx(other_row, rel=1e-4, abs=1e-5)
    others = all_tensors(other).values()
    for tensors, other_tensors in zip(all_tensors(run).values(), others, strict=True):
        for name in tensors:
            torch.testing.assert_close(tensors[name], other_tensors[name], rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------ what one run leaves


def test_the_block_that_moved_most_has_an_autoencoder_of_each_model(base):
    """--layers highest:1"""
    names = [f"{key}/sae_weights.safetensors" for key in KEYS]
    assert sorted(all_tensors(base / "run")) == sorted(names)
    notes = notes_of(base / "run/policy/1_mlp")
    assert notes["layer"] == 1
    assert notes["site"] == "mlp"
    assert notes["model"] == f"{base}/policy"


def test_the_metrics_of_a_run(base):
    rows = read_rows(base / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert rows[0]["lr"] < 1
    # k = 4 features a token.
    assert rows[-1]["policy/1_mlp/l0"] == pytest.approx(4, abs=0.5)


def test_a_second_call_returns_the_summary(base):
    assert train(base, base / "run") == summary(base / "run")


# -------------------------------------------------------------- the summary by plain forward passes


def held_out_rows():
    """The token lists of texts.jsonl that are measured: 16 texts, or a few less."""
    prompts, responses = encode_field(world.tokenizer(), world.demonstrations(200), "response")
    rows = []
    for prompt, response in zip(prompts, responses):
        rows.append(prompt + response)
    _, held_out = hold_out(rows, 16, world.tokenizer())
    return held_out


@contextlib.contextmanager
def hooked(module, hook):
    handle = module.register_forward_hook(hook)
    yield
    handle.remove()


@torch.no_grad()
def replaced_loss(lm, module, rows, places, change):
    """The mean loss a predicted token where change(output) stands in for a module's output.

    places: for each row the positions at which it does; the text's other activations stay. One row
    at a time, without padding.
    """
    total = 0.0
    n_predicted = 0
    for row, own_places in zip(rows, places, strict=True):

        def replace(module, args, output):
            new = output.clone()
            new[:, own_places] = change(output[:, own_places])
            return new

        with hooked(module, replace):
            logits = lm(torch.tensor([row])).logits[0, :-1]
        targets = torch.tensor(row[1:])
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        n_predicted += len(targets)
    return total / n_predicted


@torch.no_grad()
def read_outputs(lm, module, rows, places):
    """A module's outputs at these positions of each row: [T, D]."""
    outputs = []
    for row, own_places in zip(rows, places, strict=True):

        def read(module, args, output):
            outputs.append(output[0, own_places])

        with hooked(module, read):
            lm(torch.tensor([row]))
    return torch.cat(outputs)


def reconstruct_by(sae):
    """A function: activations -> their reconstructions."""

    def reconstruct(x):
        x_hat, _ = sae(x)
        return x_hat

    return reconstruct


def keep(x):
    return x


class Measured:
    """An autoencoder of run/, its model, and what is measured of the two here."""

    def __init__(self, base, key):
        model_name, _ = key.split("/")
        self.found = summary(base / "run")[key]
        self.lm = AutoModelForCausalLM.from_pretrained(base / model_name)
        self.mlp = self.lm.gpt_neox.layers[1].mlp
        self.sae = load_sae(str(base / "run" / key))
        self.rows = held_out_rows()
        # All tokens but those with BOS's id, wherever they stand.
        bos = world.tokenizer().bos_token_id
        self.places = []
        for row in self.rows:
            self.places.append([i for i, token in enumerate(row) if token != bos])

    def loss(self, change):
        return replaced_loss(self.lm, self.mlp, self.rows, self.places, change)

    def activations(self):
        return read_outputs(self.lm, self.mlp, self.rows, self.places)


@pytest.fixture(scope="module", params=KEYS)
def measured(request, base):
    return Measured(base, request.param)


def test_losses_by_plain_forward_passes(measured):
    """As the model is, with reconstructions in its activations' place, and with zeros."""
    found = measured.found
    loss = measured.loss(keep)
    loss_sae = measured.loss(reconstruct_by(measured.sae))
    loss_zero = measured.loss(torch.zeros_like)
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["loss_sae"] == pytest.approx(loss_sae, rel=1e-4)
    assert found["loss_zero"] == pytest.approx(loss_zero, rel=1e-4)

    # The share of what zeros lose that the reconstructions do not; there may be nothing to lose.
    if loss_zero > loss:
        recovered = (loss_zero - loss_sae) / (loss_zero - loss)
        assert found["loss_recovered"] == pytest.approx(recovered, rel=1e-2, abs=1e-2)
    else:
        assert found["loss_recovered"] is None


@torch.no_grad()
def test_reconstructions_and_densities_by_plain_forward_passes(measured):
    found = measured.found
    x = measured.activations()
    x_hat, latents = measured.sae(x)  # [T, D], [T, M]
    n_active = (latents != 0).sum(1).double()  # [T]
    is_alive = (latents != 0).any(0)  # [M]
    n_dead = (~is_alive).sum().item()

    assert found["n_tokens"] == len(x)
    assert found["fvu"] == pytest.approx(fvu(x, x_hat), rel=1e-4)
    assert found["l0"] == pytest.approx(n_active.mean().item(), rel=1e-3)
    assert found["dead"] == pytest.approx(n_dead / len(is_alive), abs=0.02)
    # The histogram of densities counts each feature that lives. A rounding may switch on another.
    n_counted = sum(found["density"]["features"])
    assert n_counted == pytest.approx(is_alive.sum().item(), abs=1)


# ------------------------------------------------------------------------ which tokens are measured


def check_replaced_losses(found, run, site, lm, module, rows, places):
    """Two losses of a summary again: reconstructions and zeros at these places, nothing else."""
    sae = load_sae(str(run / f"policy/1_{site}"))
    loss_sae = replaced_loss(lm, module, rows, places, reconstruct_by(sae))
    loss_zero = replaced_loss(lm, module, rows, places, torch.zeros_like)
    assert found["loss_sae"] == pytest.approx(loss_sae, rel=1e-4)
    assert found["loss_zero"] == pytest.approx(loss_zero, rel=1e-4)


def sentence_ends(row):
    """The positions of full stops, and of the text's last token."""
    words = world.tokenizer().convert_ids_to_tokens(row)
    last = len(row) - 1
    return [i for i, word in enumerate(words) if word in ".!?" or i == last]


@pytest.mark.slow
def test_sentence_ends(base, tmp_path):
    """They are trained on and measured; no other activation is replaced."""
    ends = {"tokens": "sentence_ends", "base": "none", "layers": "1", "site": "residual"}
    found = train(base, tmp_path, steps=3, **ends)["policy/1_residual"]
    assert notes_of(tmp_path / "policy/1_residual")["tokens"] == "sentence_ends"

    rows = held_out_rows()
    places = [sentence_ends(row) for row in rows]
    n_ends = sum(len(own) for own in places)
    n_tokens = sum(len(row) for row in rows)
    assert found["n_tokens"] == n_ends
    assert n_ends < n_tokens / 3
    lm = AutoModelForCausalLM.from_pretrained(base / "policy")
    module = lm.gpt_neox.layers[1]
    check_replaced_losses(found, tmp_path, "residual", lm, module, rows, places)


@pytest.fixture(scope="module")
def with_bos(base, tmp_path_factory):
    """policy/, whose BOS is "was", a word of the texts; shared/, whose EOS has BOS's id.

    plain.jsonl: texts of which every second one is opened by "was".
    """
    root = tmp_path_factory.mktemp("bos")
    for name, bos in (("policy", "was"), ("shared", "<eos>")):
        tokenizer = world.tokenizer()
        tokenizer.bos_token = bos
        lm = AutoModelForCausalLM.from_pretrained(base / "policy")
        save_lm(lm, tokenizer, root / name)
    texts = []
    for i, row in enumerate(world.demonstrations(150)):
        opening = "" if i % 2 else "was "
        texts.append({"prompt": f"{opening}{row['prompt']} {row['response']}"})
    write_rows(root / "plain.jsonl", texts)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("keep_bos", [False, True])
def test_bos_is_treated_alike_in_every_arm(base, with_bos, tmp_path, keep_bos):
    """Tokens with BOS's id are neither measured, nor reconstructed, nor switched off; or all three.

    That is so wherever they stand.
    """
    texts = {"dataset": f"{with_bos}/plain.jsonl", "kind": "prompts"}
    model = {"model": f"{with_bos}/policy", "base": "none", "layers": "1"}
    found = train(base, tmp_path, steps=3, keep_bos=keep_bos, **texts, **model)["policy/1_mlp"]

    tokenizer = world.tokenizer()
    bos = tokenizer.convert_tokens_to_ids("was")
    rows = []
    for text in read_rows(with_bos / "plain.jsonl"):
        rows.append(tokenizer(text["prompt"]).input_ids)
    _, rows = hold_out(rows, 16, tokenizer)
    # BOS's id opens some texts, and stands within some.
    assert any(row[0] == bos for row in rows)
    assert any(bos in row[1:] for row in rows)

    places = []
    for row in rows:
        places.append([i for i, token in enumerate(row) if keep_bos or token != bos])
    assert found["n_tokens"] == sum(len(own) for own in places)
    lm = AutoModelForCausalLM.from_pretrained(with_bos / "policy")
    module = lm.gpt_neox.layers[1].mlp
    check_replaced_losses(found, tmp_path, "mlp", lm, module, rows, places)


# The settings of a run on a model whose EOS has BOS's id.
SHARED = {"base": "none", "layers": "1", "steps": 1}


@pytest.mark.slow
def test_an_eos_with_the_id_of_bos_is_left_out(base, with_bos, tmp_path, capfd):
    """And that is said. With --keep_bos it is kept: one token more for each text."""
    model = f"{with_bos}/shared"
    without_eos = train(base, tmp_path / "out", model=model, **SHARED)["policy/1_mlp"]
    assert "EOS has BOS's id and is left out" in capfd.readouterr().out
    with_eos = train(base, tmp_path / "in", model=model, keep_bos=True, **SHARED)["policy/1_mlp"]
    assert "EOS has BOS's id" not in capfd.readouterr().out
    n_texts = len(held_out_rows())
    assert with_eos["n_tokens"] - without_eos["n_tokens"] == n_texts


@pytest.mark.slow
def test_where_only_eos_is_asked_for_it_may_not_be_left_out(base, with_bos, tmp_path):
    """One line before a model is loaded."""
    last = {"model": f"{with_bos}/shared", "tokens": "last", **SHARED}
    message = "--tokens last: the EOS of .* has BOS's id and is left out; name --keep_bos"
    with pytest.raises(InputError, match=message):
        train(base, tmp_path / "last", **last)
    assert not (tmp_path / "last").exists()

    # Prompts are taken as they are, without EOS.
    train_sae.check_last_tokens(config_of(base, tmp_path / "prompts", kind="prompts", **last))

    found = train(base, tmp_path / "kept", keep_bos=True, **last)["policy/1_mlp"]
    assert found["n_tokens"] == len(held_out_rows())


# --------------------------------------------------------------------------------------- other runs


def test_on_a_reward_model(base, tmp_path):
    """It has a score head instead of an LM head, and so no losses of an LM to recover."""
    model = AutoModelForSequenceClassification.from_pretrained(base / "policy", num_labels=1)
    rm = str(tmp_path / "rm")
    save_reward_model(RewardModel(model), world.tokenizer(), rm)
    settings = {"model": rm, "base": "none", "layers": "1", "site": "residual", "steps": 2}
    found = train(base, tmp_path / "run", **settings)["policy/1_residual"]
    assert found["loss"] is None
    assert found["loss_recovered"] is None
    assert 0 < found["fvu"] < 2
    # What is trained is what feature rewards read, with its 2 x 32 features.
    assert check_feature_reader(rm, str(tmp_path / "run/policy/1_residual")) == 64


# Settings, and how many autoencoders they train: layers times models.
OPTIONS = [
    ({"sae": "vanilla", "base": "none", "layers": "0", "site": "residual"}, 1),
    pytest.param({"sae": "tied", "bias": "median", "layers": "0"}, 2, marks=pytest.mark.slow),
    pytest.param(
        {
            "normalize": "token",
            "relu": False,
            "base": "none",
            "layers": "0,1",
            "site": "attention",
        },
        2,
        marks=pytest.mark.slow,
    ),
    pytest.param({"dtype": "bfloat16", "layers": "1"}, 2, marks=pytest.mark.slow),
]


def check_trained(found, n):
    """A summary of n autoencoders, of which each has learnt something."""
    assert len(found) == n
    for numbers in found.values():
        assert 0 < numbers["fvu"] < 1.5
        assert numbers["l0"] > 0


@pytest.mark.parametrize("settings, n", OPTIONS)
def test_options(base, tmp_path, settings, n):
    check_trained(train(base, tmp_path, steps=4, **settings), n)


@pytest.mark.slow
def test_texts_that_the_model_samples(base, tmp_path):
    """Besides those of the data set; they are kept in the cache, one line a prompt."""
    texts = {"texts": "both", "max_new_tokens": 4, "max_rows": 60}
    found = train(base, tmp_path, steps=4, base="none", layers="1", **texts)
    check_trained(found, 1)
    (answers,) = (tmp_path / "cache").glob("answers_*.jsonl")
    prompts = [row["prompt"] for row in read_rows(answers)]
    # A few of the 60 rows have the same prompt.
    assert 40 < len(prompts) < 60
    assert len(set(prompts)) == len(prompts)


def test_base_and_policy_see_the_same_tokens(base, tmp_path):
    """The same model twice: the same autoencoder twice, bit for bit."""
    train(base, tmp_path, base=f"{base}/policy", layers="1", steps=4)
    of_policy, of_base = all_tensors(tmp_path).values()
    check_equal(of_policy, of_base)


class OneBatch:
    """A stream whose batches are all the same activations."""

    def __init__(self, x):
        self.x = x

    def batch(self, step):
        return {"policy/1_mlp": self.x}


def test_an_autoencoder_starts_as_the_flags_say(base):
    """At the mean or the median, which lie apart where activations are skewed; from its seed."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).exp()

    def fit(**changes):
        config = config_of(base, "x", batch_size=64, **changes)
        saes = train_sae.fit_saes(config, OneBatch(x), Dist(0, 1, torch.device("cpu")))
        return saes["policy/1_mlp"]

    of_median = fit(bias="median")
    copies = torch.cat(2**14 // 64 * [x])
    assert of_median.b_dec.equal(fit().fit(copies, "median").b_dec)
    assert not of_median.b_dec.allclose(fit().b_dec, atol=0.01)
    for kind in ("topk", "vanilla"):
        assert not fit(sae=kind, seed=1).W_dec.equal(fit(sae=kind).W_dec)


def test_a_feature_that_hardly_ever_fires_is_in_the_first_bin():
    found = train_sae.histogram(torch.tensor([0.0, 1e-8, 0.02, 1.0]))
    assert found["log10_edges"] == [-6 + 0.5 * i for i in range(13)]
    # log10 0.02 is -1.7; a density of 1 lies on the last edge.
    assert found["features"] == [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1]


# ------------------------------------------------------------------------ the same result otherwise


def times_of_shards(cache):
    """When each file of cached activations was written."""
    return {path: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}


@pytest.mark.slow
def test_cached_activations(base, tmp_path):
    """They are the same up to float error, since other texts share a forward pass.

    A second run computes none.
    """
    cache = tmp_path / "cache"
    train(base, tmp_path / "run", cache=str(cache))
    check_close_runs(base / "run", tmp_path / "run")

    shards = times_of_shards(cache)
    assert shards
    train(base, tmp_path / "again", cache=str(cache))
    check_equal_runs(tmp_path / "run", tmp_path / "again")
    assert times_of_shards(cache) == shards


@pytest.mark.slow
def test_two_processes(base, tmp_path):
    join(*ranks(2, train, base, tmp_path / "run"))
    check_close_runs(base / "run", tmp_path / "run")


class OneOfTwo(Dist):
    """A process that is told only what it has itself."""

    def sum(self, tensor):
        return tensor


@torch.no_grad()
def test_a_process_may_have_no_held_out_text(base):
    config = config_of(base, "x")
    lm = load_lm(f"{base}/policy", "cpu")
    sae = load_sae(str(base / "run/policy/1_mlp"))
    held_out = Tokens(encode_prompts(world.tokenizer(), [{"prompt": "review the hotel :"}]))
    cpu = torch.device("cpu")

    def measure(dist):
        return loss_recovered(config, lm, (1, "mlp"), sae, held_out, dist)

    # The only text is the second process's.
    assert math.isnan(measure(OneOfTwo(0, 2, cpu))["loss"])
    assert measure(OneOfTwo(1, 2, cpu)) == measure(Dist(0, 1, cpu))


class Stop(Exception):
    """Ends a run in the middle."""


def test_a_run_that_stopped_goes_on_as_if_it_had_not(base, tmp_path, monkeypatch):
    """With its counts of silence, by which AuxK knows the features that are dead by then."""
    update = train_sae.update
    steps = []

    def update_or_stop(*args):
        steps.append(len(steps))
        if len(steps) == 10:
            raise Stop
        update(*args)

    monkeypatch.setattr(train_sae, "update", update_or_stop)
    with pytest.raises(Stop):
        train(base, tmp_path)
    # The last checkpoint is that of step 8.
    train(base, tmp_path)
    assert len(steps) == 10 + 4
    check_equal_runs(base / "run", tmp_path)


# A run that is killed when it has written its first answers to the cache.
KILLED_RUN = """
import os, signal, torch, train_sae
from nanorlhf import pool
torch.set_num_threads(1)
append = pool.CacheFile.append
def kill(lines, rows):
    append(lines, rows)
    os.kill(os.getpid(), signal.SIGKILL)
pool.CacheFile.append = kill
train_sae.main(train_sae.Config(**SETTINGS))
"""


@pytest.mark.slow
def test_killed_while_it_samples(base, tmp_path):
    """What has been sampled is kept: the same command goes on with it."""
    rollouts = {"texts": "rollouts", "max_new_tokens": 4, "max_rows": 60}
    settings = {"base": "none", "layers": "1", **rollouts}
    config = config_of(base, tmp_path / "run", **settings)
    code = KILLED_RUN.replace("SETTINGS", repr(vars(config)))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=ENV, cwd=REPO, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]

    train(base, tmp_path / "run", **settings)
    train(base, tmp_path / "whole", **settings)
    check_equal_runs(tmp_path / "whole", tmp_path / "run")


# ----------------------------------------------------------------------------------- what flags say


def test_only_the_embedded_world_has_a_base_of_its_own():
    assert train_sae.Config().base == "runs/sft"
    assert train_sae.Config(dataset="mine.jsonl", layers="1").base == "none"
    assert train_sae.Config(model="mine", layers="1").base == "none"


def test_the_rate_rises_over_a_share_of_the_steps():
    config = train_sae.Config(steps=40, warmup=0.1, lr=1.0, schedule="constant")
    rates = [config.rate(step) for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1]


def test_a_feature_is_dead_after_a_tenth_of_the_run():
    assert train_sae.Config(steps=300, batch_size=1000).dead_tokens() == 30_000
    assert train_sae.Config(steps=10**6, batch_size=1000).dead_tokens() == 10_000_000
    assert train_sae.Config(dead_after=7).dead_tokens() == 7


@pytest.mark.parametrize(
    "kind, texts, expected",
    [
        ("prompts", "dataset", False),
        ("prompts", "rollouts", True),
        ("sft", "dataset", True),
        ("sft", "both", True),
    ],
)
def test_all_texts_but_prompts_end_with_eos(kind, texts, expected):
    assert train_sae.texts_end_with_eos(train_sae.Config(kind=kind, texts=texts)) == expected


# ---------------------------------------------------------------------------------------- bad input

BAD_INPUT = [
    ("base", "none", "a --base"),
    ("layers", "7", "7"),
    ("layers", "some", "some"),
    ("site", "norm", "--site must be"),
    ("k", 65, "--k 65 is more"),
    ("model", "/no/where", "/no/where"),
    ("warmup", 3.0, "--warmup"),
    ("sae", "x", "--sae must be"),
    ("dataset", "no.jsonl", "no.jsonl"),
    ("expansion", 0.0, "--expansion"),
    ("tokens", "first", "--tokens must be"),
]


@pytest.mark.parametrize("flag, value, message", BAD_INPUT)
def test_bad_input(base, tmp_path, flag, value, message):
    with pytest.raises(InputError, match=message):
        train(base, tmp_path / "run", **{flag: value})

"""train_sae.py on a tiny model and its base: what it writes, against plain forward passes; the same on two processes and after a kill.

B sequences, T tokens, D hidden
"""

import json
import math
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support import ENV, REPO, join, metrics, ranks, read_rows, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import train_sae
from nanorlhf import world
from nanorlhf.control.feature_reader import check_feature_reader
from nanorlhf.data import encode, encode_prompts
from nanorlhf.errors import InputError
from nanorlhf.interp.activation_store import Tokens, hold_out
from nanorlhf.interp.sae_files import load_sae
from nanorlhf.models import Policy, RewardModel, save_policy, save_reward_model
from nanorlhf.runtime.distributed import Dist
from nanorlhf.sae import fvu
from train_sae import load_lm, loss_recovered

KEYS = ["policy/1_mlp", "base/1_mlp"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base/, policy/ (its block 1 has moved), texts.jsonl, run/ (a plain run on both)"""
    root = tmp_path_factory.mktemp("sae")
    torch.manual_seed(0)
    config = world.model_config()
    config.update({"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64})
    lm = AutoModelForCausalLM.from_config(config)
    save_policy(Policy(lm, value_head=False), world.tokenizer(), str(root / "base"))
    for p in lm.gpt_neox.layers[1].parameters():
        p.data += 0.05 * torch.randn_like(p)
    save_policy(Policy(lm, value_head=False), world.tokenizer(), str(root / "policy"))
    write_rows(root / "texts.jsonl", world.demonstrations(200))
    train(root, root / "run")
    return root


def settings(root, folder, **kwargs):
    small = {
        "layers": "highest:1",
        "expansion": 2,
        "k": 4,
        "steps": 12,
        "batch_size": 64,
        "eval_size": 16,
        "checkpoint_every": 4,
    }
    paths = {
        "output_dir": str(folder),
        "model": f"{root}/policy",
        "base": f"{root}/base",
        "dataset": f"{root}/texts.jsonl",
    }
    return train_sae.Config(
        **{**paths, **small, "device": "cpu", "buffer_tokens": 512, "dead_after": 300, **kwargs}
    )


def train(root, folder, **kwargs):
    return train_sae.main(settings(root, folder, **kwargs))


def tensors(folder):
    return {
        str(path.relative_to(folder)): load_file(path)
        for path in sorted(folder.rglob("sae_weights.safetensors"))
    }


def assert_bit_equal(a, b):
    assert metrics(a) == metrics(b) and len(metrics(a)) == 12
    assert (a / "summary.json").read_bytes() == (b / "summary.json").read_bytes()
    for x, y in zip(tensors(a).values(), tensors(b).values(), strict=True):
        assert all(x[name].equal(y[name]) for name in x)


# ---------------------------------------------------------------------------------------------------------------------- one run


def test_folder(base):
    """highest:1 is the block that moved; loss goes down; a second call says that it is done."""
    run = base / "run"
    assert sorted(tensors(run)) == sorted(f"{key}/sae_weights.safetensors" for key in KEYS)
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13)) and rows[-1]["loss"] < 0.9 * rows[0][
        "loss"
    ]
    assert rows[0]["lr"] < 1 and rows[-1]["policy/1_mlp/l0"] == pytest.approx(4, abs=0.5)
    notes = json.loads((run / "policy/1_mlp/cfg.json").read_text())["metadata"]
    assert (notes["layer"], notes["site"], notes["model"]) == (1, "mlp", f"{base}/policy")
    assert train(base, run) == json.loads((run / "summary.json").read_text())


@torch.no_grad()
def test_summary(base):
    """Every number of the summary, from plain forward passes of one held-out text at a time with a hook written here."""
    summary = json.loads((base / "run/summary.json").read_text())
    prompts, responses, _ = encode(world.tokenizer(), world.demonstrations(200), "response")
    _, rows = hold_out([p + r for p, r in zip(prompts, responses)], 16, world.tokenizer())
    for key in KEYS:
        lm = AutoModelForCausalLM.from_pretrained(base / key.split("/")[0])
        sae, seen = load_sae(str(base / "run" / key)), []
        bos = world.tokenizer().bos_token_id
        losses = {}
        for name, change in (
            ("loss", lambda x: x),
            ("loss_sae", lambda x: sae(x)[0]),
            ("loss_zero", torch.zeros_like),
        ):

            def hook(module, args, output):
                new = change(output)
                if name == "loss":
                    seen.append(output[0, int(row[0] == bos) :])
                elif name == "loss_sae" and row[0] == bos:
                    new[:, 0] = output[:, 0]
                return new

            handle, total, n = lm.gpt_neox.layers[1].mlp.register_forward_hook(hook), 0.0, 0
            for row in rows:
                logits = lm(torch.tensor([row])).logits[0, :-1]
                total += F.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum").item()
                n += len(row) - 1
            handle.remove()
            losses[name] = total / n
            assert summary[key][name] == pytest.approx(total / n, rel=1e-4)
        x = torch.cat(seen)
        x_hat, f = sae(x)
        density = (f != 0).double().mean(0)
        assert summary[key]["fvu"] == pytest.approx(fvu(x, x_hat), rel=1e-4) and summary[key][
            "n_tokens"
        ] == len(x)
        assert summary[key]["l0"] == pytest.approx((f != 0).sum().item() / len(x), rel=1e-3)
        assert summary[key]["dead"] == pytest.approx(
            (density == 0).double().mean().item(), abs=0.02
        )
        assert sum(summary[key]["density"]["features"]) == pytest.approx(
            (density > 0).sum().item(), abs=1
        )
        needed = losses["loss_zero"] - losses["loss"]
        if needed > 0:
            recovered = (losses["loss_zero"] - losses["loss_sae"]) / needed
            assert summary[key]["loss_recovered"] == pytest.approx(recovered, rel=1e-2, abs=1e-2)
        else:
            assert summary[key]["loss_recovered"] is None


def test_sentence_ends(base, tmp_path):
    """What is trained on and measured are full stops and the texts' last tokens; no other activation is replaced."""
    summary = train(
        base,
        tmp_path / "run",
        tokens="sentence_ends",
        base="none",
        layers="1",
        site="residual",
        steps=3,
    )["policy/1_residual"]
    sae = load_sae(str(tmp_path / "run/policy/1_residual"))
    assert (
        json.loads((tmp_path / "run/policy/1_residual/cfg.json").read_text())["metadata"]["tokens"]
        == "sentence_ends"
    )
    tokenizer, lm = world.tokenizer(), AutoModelForCausalLM.from_pretrained(base / "policy")
    prompts, responses, _ = encode(tokenizer, world.demonstrations(200), "response")
    _, rows = hold_out([p + r for p, r in zip(prompts, responses)], 16, world.tokenizer())
    ends = [
        [
            i
            for i, word in enumerate(tokenizer.convert_ids_to_tokens(row))
            if word in ".!?" or i == len(row) - 1
        ]
        for row in rows
    ]
    assert summary["n_tokens"] == sum(map(len, ends)) < sum(map(len, rows)) / 3
    for name, change in (("loss_sae", lambda x: sae(x)[0]), ("loss_zero", torch.zeros_like)):

        def hook(module, args, output):
            new = output.clone()
            new[:, end] = change(output[:, end])
            return new

        handle, total = lm.gpt_neox.layers[1].register_forward_hook(hook), 0.0
        with torch.no_grad():
            for row, end in zip(rows, ends):
                total += F.cross_entropy(
                    lm(torch.tensor([row])).logits[0, :-1], torch.tensor(row[1:]), reduction="sum"
                ).item()
        handle.remove()
        assert summary[name] == pytest.approx(total / sum(len(row) - 1 for row in rows), rel=1e-4)


@pytest.fixture(scope="module")
def with_bos(base, tmp_path_factory):
    """policy/, whose BOS is a word of the texts, "was"; shared/, whose EOS is BOS; plain.jsonl, texts in which it opens a text or not."""
    root = tmp_path_factory.mktemp("bos")
    for name, bos in (("policy", "was"), ("shared", "<eos>")):
        tokenizer = world.tokenizer()
        tokenizer.bos_token = bos
        save_policy(
            Policy(AutoModelForCausalLM.from_pretrained(base / "policy"), value_head=False),
            tokenizer,
            str(root / name),
        )
    texts = [f"{row['prompt']} {row['response']}" for row in world.demonstrations(150)]
    write_rows(
        root / "plain.jsonl",
        [{"prompt": text if i % 2 else f"was {text}"} for i, text in enumerate(texts)],
    )
    return root


@pytest.mark.parametrize("keep_bos", [False, True])
def test_bos_is_treated_alike_in_every_arm(base, with_bos, tmp_path, keep_bos):
    """Tokens with BOS's id are neither measured, nor reconstructed, nor switched off, wherever they stand; or all of these."""
    options = {
        "model": f"{with_bos}/policy",
        "base": "none",
        "dataset": f"{with_bos}/plain.jsonl",
        "kind": "prompts",
        "layers": "1",
    }
    summary = train(base, tmp_path / "run", steps=3, keep_bos=keep_bos, **options)["policy/1_mlp"]
    sae, lm = (
        load_sae(str(tmp_path / "run/policy/1_mlp")),
        AutoModelForCausalLM.from_pretrained(with_bos / "policy"),
    )
    tokenizer = world.tokenizer()
    bos = tokenizer.convert_tokens_to_ids("was")
    rows = [tokenizer(row["prompt"]).input_ids for row in read_rows(with_bos / "plain.jsonl")]
    rows = hold_out(rows, 16, tokenizer)[1]
    kept = [[keep_bos or token != bos for token in row] for row in rows]
    assert any(row[0] == bos for row in rows) and any(bos in row[1:] for row in rows)
    assert summary["n_tokens"] == sum(map(sum, kept))
    for name, change in (("loss_sae", lambda x: sae(x)[0]), ("loss_zero", torch.zeros_like)):
        total = 0.0
        for row, own in zip(rows, kept):

            def hook(module, args, output):
                new = output.clone()
                for i in range(len(row)):
                    if own[i]:
                        new[:, i] = change(output[:, i])
                return new

            handle = lm.gpt_neox.layers[1].mlp.register_forward_hook(hook)
            with torch.no_grad():
                logits = lm(torch.tensor([row])).logits[0, :-1]
            handle.remove()
            total += F.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum").item()
        assert summary[name] == pytest.approx(total / sum(len(row) - 1 for row in rows), rel=1e-4)


def test_an_eos_with_the_id_of_bos(base, with_bos, tmp_path, capfd):
    """It is left out and that is said; where nothing but EOS is asked for, one line before a model is loaded."""
    options = {"model": f"{with_bos}/shared", "base": "none", "layers": "1", "steps": 1}
    without_eos = train(base, tmp_path / "out", **options)["policy/1_mlp"]["n_tokens"]
    assert "EOS has BOS's id and is left out" in capfd.readouterr().out
    with_eos = train(base, tmp_path / "in", keep_bos=True, **options)["policy/1_mlp"]["n_tokens"]
    assert "EOS has BOS's id" not in capfd.readouterr().out
    prompts, responses, _ = encode(world.tokenizer(), world.demonstrations(200), "response")
    texts = len(hold_out([p + r for p, r in zip(prompts, responses)], 16, world.tokenizer())[1])
    assert with_eos - without_eos == texts
    with pytest.raises(
        InputError,
        match="--tokens last: the EOS of .* has BOS's id and is left out; name --keep_bos",
    ):
        train(base, tmp_path / "last", tokens="last", **options)
    assert not (tmp_path / "last").exists()
    assert (
        train(base, tmp_path / "kept", tokens="last", keep_bos=True, **options)["policy/1_mlp"][
            "n_tokens"
        ]
        == texts
    )


def test_on_a_reward_model(base, tmp_path):
    """One with a score head instead of an LM head has no LM losses to recover; what is trained is what feature rewards read."""
    model = AutoModelForSequenceClassification.from_pretrained(base / "policy", num_labels=1)
    save_reward_model(RewardModel(model), world.tokenizer(), str(tmp_path / "rm"))
    options = {
        "model": str(tmp_path / "rm"),
        "base": "none",
        "layers": "1",
        "site": "residual",
        "steps": 2,
    }
    summary = train(base, tmp_path / "run", **options)["policy/1_residual"]
    assert summary["loss"] is None and summary["loss_recovered"] is None and 0 < summary["fvu"] < 2
    assert check_feature_reader(str(tmp_path / "rm"), str(tmp_path / "run/policy/1_residual")) == 64


@pytest.mark.parametrize(
    "kwargs",
    [
        {"sae": "vanilla", "base": "none", "layers": "0", "site": "residual"}, {"sae": "tied", "bias": "median", "layers": "0"},
        {"normalize": "token", "relu": False, "base": "none", "layers": "0,1", "site": "attention"},
        {"texts": "both", "max_new_tokens": 4, "max_rows": 60, "base": "none", "layers": "1"}, {"dtype": "bfloat16", "layers": "1"},
    ],
)  # fmt: skip
def test_options(base, tmp_path, kwargs):
    summary = train(base, tmp_path / "run", steps=4, **kwargs)
    assert all(0 < r["fvu"] < 1.5 and r["l0"] > 0 for r in summary.values())
    assert len(summary) == {"0": 1, "1": 1, "0,1": 2}[kwargs["layers"]] * (
        1 if kwargs.get("base") else 2
    )
    if kwargs.get("texts"):
        assert list((tmp_path / "run/cache").glob("answers_*.jsonl"))


def test_base_and_policy_see_the_same_tokens(base, tmp_path):
    """The same model twice: the same autoencoder twice, bit for bit."""
    train(base, tmp_path / "run", base=f"{base}/policy", layers="1", steps=4)
    a, b = tensors(tmp_path / "run").values()
    assert all(a[name].equal(b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------- the same result otherwise


def test_cached_activations(base, tmp_path):
    """From disk they are the same up to float error (other texts share a forward pass), and a second run computes none."""
    train(base, tmp_path / "run", cache=str(tmp_path / "cache"))
    assert_close(base / "run", tmp_path / "run")
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    train(base, tmp_path / "again", cache=str(tmp_path / "cache"))
    assert_bit_equal(tmp_path / "run", tmp_path / "again")
    assert shards and shards == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")
    }


@pytest.mark.slow
def test_two_processes(base, tmp_path):
    join(*ranks(2, train, base, tmp_path / "run"))
    assert_close(base / "run", tmp_path / "run")


def assert_close(a, b):
    for row, other in zip(metrics(a), metrics(b), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
    for x, y in zip(tensors(a).values(), tensors(b).values(), strict=True):
        for name in x:
            torch.testing.assert_close(x[name], y[name], rtol=1e-3, atol=1e-4)


class OneOfTwo(Dist):
    """A process that is told only what it has itself."""

    def sum(self, tensor):
        return tensor


@torch.no_grad()
def test_a_process_may_have_no_held_out_text(base):
    config = settings(base, "x")
    lm = load_lm(f"{base}/policy", "cpu")
    sae = load_sae(str(base / "run/policy/1_mlp"))
    held_out = Tokens(encode_prompts(world.tokenizer(), ["review the hotel :"]))
    cpu = torch.device("cpu")
    shares = []
    for rank in range(2):
        shares.append(loss_recovered(config, lm, (1, "mlp"), sae, held_out, OneOfTwo(rank, 2, cpu)))
    whole = loss_recovered(config, lm, (1, "mlp"), sae, held_out, Dist(0, 1, cpu))
    assert math.isnan(shares[0]["loss"]) and shares[1] == whole  # no token there, all of them here


@pytest.mark.slow
def test_killed_while_it_samples(base, tmp_path):
    """What has been sampled is kept: the same command goes on with it."""
    rollouts = {"texts": "rollouts", "max_new_tokens": 4, "max_rows": 60}
    rollouts |= {"base": "none", "layers": "1"}
    code = f"""
import os, signal, torch, train_sae
from nanorlhf import pool
torch.set_num_threads(1)
append = pool.Lines.append
def kill(lines, rows):
    append(lines, rows)
    os.kill(os.getpid(), signal.SIGKILL)
pool.Lines.append = kill
train_sae.main(train_sae.Config(**{vars(settings(base, tmp_path / "run", **rollouts))}))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=ENV, cwd=REPO, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    train(base, tmp_path / "run", **rollouts)
    train(base, tmp_path / "whole", **rollouts)
    assert_bit_equal(tmp_path / "whole", tmp_path / "run")


# --------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"base": "none"}, "a --base"), ({"layers": "7"}, "7"), ({"layers": "some"}, "some"), ({"site": "norm"}, "--site must be"),
        ({"k": 65}, "--k 65 is more"), ({"model": "/no/where"}, "/no/where"), ({"warmup": 3.0}, "--warmup"), ({"sae": "x"}, "--sae must be"),
        ({"dataset": "no.jsonl"}, "no.jsonl"), ({"expansion": 0.0}, "--expansion"),
        ({"tokens": "first"}, "--tokens must be"),
    ],
)  # fmt: skip
def test_bad_input(base, tmp_path, kwargs, match):
    with pytest.raises(InputError, match=match):
        train(base, tmp_path / "run", **kwargs)

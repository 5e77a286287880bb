"""DPO: its loss and gradient against the closed form; train_sft.py --loss dpo against plain transformers, killed, and on two processes."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from support import metrics, weights, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_sft
from nanorlhf import splits, world
from nanorlhf.dpo import dpo_loss, pair_points
from nanorlhf.errors import InputError
from nanorlhf.models import load_policy


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with model/, a random policy with dropout, and pairs.jsonl."""
    root = tmp_path_factory.mktemp("dpo")
    config = world.model_config()
    config.hidden_size, config.intermediate_size = 32, 64
    config.hidden_dropout = config.attention_dropout = 0.3
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
    world.tokenizer().save_pretrained(root / "model")
    write_rows(root / "pairs.jsonl", world.preferences(60))
    return root


def settings(base, **changes):
    flags = {"loss": "dpo", "model": f"{base}/model", "dataset": f"{base}/pairs.jsonl", "steps": 3, "batch_size": 8, "lr": 1e-3,
             "warmup": 0, "max_new_tokens": 6, "n_samples": 1, "eval_size": 7, "checkpoint_every": 1}  # fmt: skip
    return {**flags, **changes}


def train(base, folder, **changes):
    train_sft.main(train_sft.Config(output_dir=str(folder), **settings(base, **changes)))
    return metrics(folder)


# ------------------------------------------------------------------------------------------------------------------------- the loss


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_loss_and_gradient_by_hand():
    beta, (pi_c, pi_r, ref_c, ref_r) = 0.3, 5 * randn(4, 6)
    pi_c.requires_grad_(), pi_r.requires_grad_()
    loss, stats = dpo_loss(pi_c, pi_r, ref_c, ref_r, beta)
    loss.backward()
    total, wins, chosen, rejected = 0.0, 0, 0.0, 0.0
    for i in range(6):
        a, b = beta * (pi_c[i] - ref_c[i]).item(), beta * (pi_r[i] - ref_r[i]).item()
        total += math.log(1 + math.exp(b - a))
        wins, chosen, rejected = wins + (a > b), chosen + a, rejected + b
        slope = -beta / (1 + math.exp(a - b)) / 6  # d/da log(1 + exp(b - a)) = -1 / (1 + exp(a - b))
        assert (pi_c.grad[i].item(), pi_r.grad[i].item()) == pytest.approx((slope, -slope), rel=1e-12)
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)
    expected = {"accuracy": wins / 6, "margin": (chosen - rejected) / 6, "reward_chosen": chosen / 6, "reward_rejected": rejected / 6}
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(expected, rel=1e-12)
    assert 0 < wins < 6 and not any(value.requires_grad for value in stats.values())


def test_at_the_reference_and_far_from_it():
    pi, ref = randn(2, 5)
    loss, stats = dpo_loss(pi, ref, pi, ref, 0.1)
    assert loss.item() == pytest.approx(math.log(2)) and stats["accuracy"] == 0.5 and stats["margin"] == 0
    far = torch.tensor([1e4, -1e4])
    assert dpo_loss(far, -far, 0 * far, 0 * far, 1.0)[0].item() == pytest.approx(1e4)  # (0 + 2e4) / 2: nothing overflows


def test_parts_add_up():
    x = randn(4, 9)
    whole, stats = dpo_loss(*x, 0.2)
    parts = [dpo_loss(*x[:, rows], 0.2, n_pairs=9) for rows in (slice(0, 2), slice(2, 9))]
    assert sum(loss for loss, _ in parts).item() == pytest.approx(whole.item(), rel=1e-12)
    for name in stats:
        assert sum(s[name] for _, s in parts).item() == pytest.approx(stats[name].item(), rel=1e-12)


# ----------------------------------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def whole(base):
    train(base, base / "whole", eval_every=2)
    return base / "whole"


def logprob(model, tokenizer, prompt, response):
    """log pi of a response and its EOS, by plain transformers."""
    prompt, response = tokenizer(prompt).input_ids, tokenizer(response).input_ids + [tokenizer.eos_token_id]
    with torch.no_grad():
        logp = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return logp[range(len(response)), response].sum().item()


def test_the_run_by_plain_transformers(base, whole):
    rows = metrics(whole)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is its own reference: no dropout in either
    assert rows[0]["accuracy"] == 0.5
    assert abs(rows[0]["margin"]) < 1e-4 and abs(rows[2]["margin"]) > 1e-3 and "eval/loss" in rows[1]
    policy, reference = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (whole / "model", base / "model"))
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    _, held_out, _ = splits.load(train_sft.Config(output_dir="x", **settings(base)), "pairs")
    rewards = [[0.1 * (logprob(policy, tokenizer, row["prompt"], row[side]) - logprob(reference, tokenizer, row["prompt"], row[side]))
                for row in held_out] for side in ("chosen", "rejected")]  # fmt: skip
    margins, n = [c - r for c, r in zip(*rewards)], len(held_out)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["eval/n_pairs"] == n == 7
    assert summary["eval/margin"] == pytest.approx(sum(margins) / n, abs=1e-5)
    assert summary["eval/accuracy"] == pytest.approx(sum(m > 0 for m in margins) / n)
    assert summary["eval/loss"] == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / n, abs=1e-5)
    for name, values in zip(("reward_chosen", "reward_rejected"), rewards):
        assert summary[f"eval/{name}"] == pytest.approx(sum(values) / n, abs=1e-5)
    lengths = [(len(row["chosen"].split()), len(row["rejected"].split())) for row in held_out]
    assert summary["eval/longer_wins"] == pytest.approx(sum((c > r) + (c == r) / 2 for c, r in lengths) / n)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_accuracy_of_a_policy_that_is_its_reference(base, tmp_path, dtype):
    """At step 1 a margin is rounding alone, and its sign a coin: every pair is a tie. Later margins are far above it."""
    rows = train(base, tmp_path / "run", dtype=dtype, batch_size=32, micro_batch_size=3, steps=4)
    assert rows[0]["accuracy"] == 0.5 and rows[0]["margin"] != 0  # the margins are not simply the same bits
    assert rows[3]["accuracy"] not in (0.5, 0.0)
    held_out = train(base, tmp_path / "still", dtype=dtype, lr=0.0, steps=1)[0]
    assert held_out["eval/accuracy"] == 0.5 and held_out["eval/accuracy_se"] == 0


def test_ties_of_pairs_by_hand():
    """Margins of 3, -3, 0 and, within the rounding of log-probs of -300 and -200, 1e-5 nats; 1e-5 of small log-probs is a win."""
    pi_c = torch.tensor([-10.0, -16.0, -10.0, -300 + 1e-5, -1.0 + 1e-5], dtype=torch.float64)
    pi_r = torch.tensor([-20.0, -20.0, -20.0, -200.0, -1.0], dtype=torch.float64)
    ref_c = torch.tensor([-13.0, -13.0, -10.0, -300.0, -1.0], dtype=torch.float64)
    points = pair_points(pi_c, pi_r, ref_c, pi_r, 1e-6)
    assert points.tolist() == [1.0, 0.0, 0.5, 0.5, 1.0]
    assert dpo_loss(pi_c, pi_r, ref_c, pi_r, 0.2, rounding=1e-6)[1]["accuracy"].item() == pytest.approx(3 / 5)


def test_lora_and_frozen_layers(base, tmp_path):
    rows = train(base, tmp_path / "lora", batch_size=53, lora_rank=2, lora_dropout=0.3)  # all pairs, three times
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and rows[2]["loss"] < math.log(2) - 1e-4
    assert all("lora_" in name for name in weights(tmp_path / "lora"))
    assert load_policy(str(tmp_path / "lora"), value_head=False)
    rows = train(base, tmp_path / "frozen", batch_size=53, freeze_layers=0.5)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and rows[2]["loss"] < math.log(2) - 1e-3
    before, after = (load_file(path / "model.safetensors") for path in (base / "model", tmp_path / "frozen/model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "embed_in" not in name and ".layers.0." not in name and ".layers.1." not in name}


def test_what_the_steps_do_not_read_needs_no_reference(base, tmp_path, monkeypatch):
    seen, real = [], train_sft.token_sums
    monkeypatch.setattr(train_sft, "token_sums", lambda policy, prompts, *rest: seen.append(len(prompts)) or real(policy, prompts, *rest))
    train(base, tmp_path / "run", steps=2, batch_size=4)
    assert seen == [8, 8, 7, 7, 7, 7]  # both sides: of 2 x 4 training rows and of the held-out ones; again at the end


BAD = {"model": "world", "loss": "ppo", "dpo_beta": 0.0, "lr": -1.0, "steps": 0}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(base, name):
    with pytest.raises(InputError, match=f"--{name}"):
        train_sft.Config(**settings(base, **{name: BAD[name]}))


def test_defaults_are_those_of_the_loss():
    sft, dpo = train_sft.Config(), train_sft.Config(loss="dpo", model="runs/sft")
    assert (sft.steps, sft.lr, dpo.steps, dpo.lr) == (400, 3e-3, 100, 1e-4)
    assert (sft.output_dir, dpo.output_dir) == ("runs/sft", "runs/dpo")  # never over the model that others start from
    assert (train_sft.Config(steps=7).steps, train_sft.Config(lr=0.0).lr) == (7, 0.0)

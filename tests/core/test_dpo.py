"""DPO: its loss and gradient against the closed form; train_sft.py --loss dpo against plain
transformers.

    B pairs
"""

import json
import math

import pytest
import torch
from checks import randn
from safetensors.torch import load_file
from support import metrics, weights, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_sft
from nanorlhf import splits, world
from nanorlhf.dpo import dpo_loss, pair_points
from nanorlhf.errors import InputError
from nanorlhf.models import load_policy

# ---------------------------------------------------------------------------------------- the loss


BETA = 0.3


def random_pairs():
    """Log-probs of six pairs: pi_c, pi_r, ref_c, ref_r, each [6]."""
    return 5 * randn(4, 6)


def rewards_by_a_loop():
    """The implicit rewards beta (pi - ref) of the six pairs: a list of (chosen, rejected)."""
    rewards = []
    for pi_c, pi_r, ref_c, ref_r in random_pairs().T.tolist():
        chosen = BETA * (pi_c - ref_c)
        rejected = BETA * (pi_r - ref_r)
        rewards.append((chosen, rejected))
    return rewards


def test_loss_and_gradient_by_hand():
    """Per pair: log(1 + e^(b - a)), with a and b the rewards of its chosen and rejected answer.

    Its slope is d/da log(1 + e^(b - a)) = -1 / (1 + e^(a - b)), and the same upwards for b.
    """
    total = 0.0
    slopes = []
    for a, b in rewards_by_a_loop():
        total += math.log(1 + math.exp(b - a))
        slope = -1 / (1 + math.exp(a - b))
        slopes.append(BETA * slope / 6)

    pi_c, pi_r, ref_c, ref_r = random_pairs()
    pi_c.requires_grad_()
    pi_r.requires_grad_()
    loss, _ = dpo_loss(pi_c, pi_r, ref_c, ref_r, BETA)
    loss.backward()
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)
    assert pi_c.grad.tolist() == pytest.approx(slopes, rel=1e-12)
    assert (-pi_r.grad).tolist() == pytest.approx(slopes, rel=1e-12)


def test_stats_by_hand():
    n_wins = 0
    total_chosen = 0.0
    total_rejected = 0.0
    for chosen, rejected in rewards_by_a_loop():
        if chosen > rejected:
            n_wins += 1
        total_chosen += chosen
        total_rejected += rejected
    assert 0 < n_wins < 6
    expected = {
        "accuracy": n_wins / 6,
        "margin": (total_chosen - total_rejected) / 6,
        "reward_chosen": total_chosen / 6,
        "reward_rejected": total_rejected / 6,
    }

    pairs = random_pairs().requires_grad_()
    _, stats = dpo_loss(*pairs, BETA)
    for value in stats.values():
        assert not value.requires_grad
    found = {name: value.item() for name, value in stats.items()}
    assert found == pytest.approx(expected, rel=1e-12)


def test_at_the_reference_the_loss_is_log_2():
    pi, ref = randn(2, 5)
    loss, stats = dpo_loss(pi, ref, pi, ref, 0.1)
    assert loss.item() == pytest.approx(math.log(2))
    assert stats["accuracy"] == 0.5
    assert stats["margin"] == 0


def test_far_from_the_reference_nothing_overflows():
    far = torch.tensor([1e4, -1e4])
    reference = torch.zeros(2)
    loss, _ = dpo_loss(far, -far, reference, reference, 1.0)
    assert loss.item() == pytest.approx(1e4)  # (0 + 2e4) / 2


def test_parts_of_a_batch_add_up_to_the_whole():
    pairs = randn(4, 9)
    whole, stats = dpo_loss(*pairs, 0.2)
    first, first_stats = dpo_loss(*pairs[:, :2], 0.2, n_pairs=9)
    second, second_stats = dpo_loss(*pairs[:, 2:], 0.2, n_pairs=9)
    assert (first + second).item() == pytest.approx(whole.item(), rel=1e-12)
    for name, value in stats.items():
        total = first_stats[name] + second_stats[name]
        assert total.item() == pytest.approx(value.item(), rel=1e-12)


# pi_c, pi_r, ref_c, ref_r of each pair, its margin in nats, and its points. Rounding is 1e-6 of the
# sum of all four sizes.
PAIRS = {
    "win": (-10.0, -20.0, -13.0, -20.0, 1.0),  # 3
    "loss": (-16.0, -20.0, -13.0, -20.0, 0.0),  # -3
    "tie": (-10.0, -20.0, -10.0, -20.0, 0.5),  # 0
    "within rounding": (-300 + 1e-5, -200.0, -300.0, -200.0, 0.5),  # 1e-5 of log-probs of -1000
    "above rounding": (-1.0 + 1e-5, -1.0, -1.0, -1.0, 1.0),  # 1e-5 of log-probs of -4
}


def test_ties_of_pairs_by_hand():
    columns = torch.tensor(list(PAIRS.values()), dtype=torch.float64).T
    pi_c, pi_r, ref_c, ref_r, expected = columns
    points = pair_points(pi_c, pi_r, ref_c, ref_r, 1e-6)
    assert points.tolist() == expected.tolist()
    _, stats = dpo_loss(pi_c, pi_r, ref_c, ref_r, 0.2, rounding=1e-6)
    assert stats["accuracy"].item() == pytest.approx(3 / 5)


# -------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with model/, a random policy with dropout, and pairs.jsonl."""
    root = tmp_path_factory.mktemp("dpo")
    config = world.model_config()
    config.hidden_size = 32
    config.intermediate_size = 64
    config.hidden_dropout = 0.3
    config.attention_dropout = 0.3
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(root / "model")
    world.tokenizer().save_pretrained(root / "model")
    write_rows(root / "pairs.jsonl", world.preferences(60))
    return root


def settings(base, **changes):
    flags = {
        "loss": "dpo",
        "model": f"{base}/model",
        "dataset": f"{base}/pairs.jsonl",
        "steps": 3,
        "batch_size": 8,
        "lr": 1e-3,
        "warmup": 0,
        "max_new_tokens": 6,
        "n_samples": 1,
        "eval_size": 7,
        "checkpoint_every": 1,
    }
    return {**flags, **changes}


def train(base, folder, **changes):
    """Run the script -> the rows of its metrics."""
    config = train_sft.Config(output_dir=str(folder), **settings(base, **changes))
    train_sft.main(config)
    return metrics(folder)


@pytest.fixture(scope="module")
def whole(base):
    """The folder of a run of three steps."""
    train(base, base / "whole", eval_every=2)
    return base / "whole"


def test_the_first_step_starts_at_the_reference(whole):
    first, second, third = metrics(whole)
    # The policy is its own reference: there is no dropout in either.
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["accuracy"] == 0.5
    assert abs(first["margin"]) < 1e-4
    assert abs(third["margin"]) > 1e-3
    assert "eval/loss" in second


def logprob(model, tokenizer, prompt, response):
    """log pi of a response and its EOS, by plain transformers."""
    prompt_ids = tokenizer(prompt).input_ids
    response_ids = tokenizer(response).input_ids + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + response_ids])).logits[0]
    # The logits at one position score the token at the next.
    logp = logits[len(prompt_ids) - 1 : -1].double().log_softmax(-1)
    return logp[range(len(response_ids)), response_ids].sum().item()


@pytest.fixture(scope="module")
def held_out(base):
    """The pairs that the run is judged on."""
    config = train_sft.Config(output_dir="x", **settings(base))
    _, rows, _ = splits.load(config, "pairs")
    return rows


@pytest.fixture(scope="module")
def held_out_rewards(base, whole, held_out):
    """The implicit rewards of the held-out pairs: lists of the chosen and the rejected ones."""
    policy = AutoModelForCausalLM.from_pretrained(whole / "model").eval()
    reference = AutoModelForCausalLM.from_pretrained(base / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    rewards = {"chosen": [], "rejected": []}
    for row in held_out:
        for side in rewards:
            pi = logprob(policy, tokenizer, row["prompt"], row[side])
            ref = logprob(reference, tokenizer, row["prompt"], row[side])
            rewards[side].append(0.1 * (pi - ref))
    return rewards["chosen"], rewards["rejected"]


def test_the_evaluation_by_plain_transformers(whole, held_out_rewards):
    chosen, rejected = held_out_rewards
    n = len(chosen)
    total_margin = 0.0
    total_loss = 0.0
    n_wins = 0
    for c, r in zip(chosen, rejected):
        total_margin += c - r
        total_loss += math.log(1 + math.exp(r - c))
        if c > r:
            n_wins += 1

    summary = json.loads((whole / "summary.json").read_text())
    assert n == 7
    assert summary["eval/n_pairs"] == n
    assert summary["eval/margin"] == pytest.approx(total_margin / n, abs=1e-5)
    assert summary["eval/loss"] == pytest.approx(total_loss / n, abs=1e-5)
    assert summary["eval/accuracy"] == pytest.approx(n_wins / n)
    assert summary["eval/reward_chosen"] == pytest.approx(sum(chosen) / n, abs=1e-5)
    assert summary["eval/reward_rejected"] == pytest.approx(sum(rejected) / n, abs=1e-5)


def test_how_often_the_longer_text_wins(whole, held_out):
    points = 0.0
    for row in held_out:
        chosen_length = len(row["chosen"].split())
        rejected_length = len(row["rejected"].split())
        if chosen_length > rejected_length:
            points += 1
        elif chosen_length == rejected_length:
            points += 0.5
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["eval/longer_wins"] == pytest.approx(points / len(held_out))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_accuracy_of_a_policy_that_is_its_reference(base, tmp_path, dtype):
    """At step 1 a margin is rounding alone, and its sign a coin: every pair is a tie.

    Later margins are far above rounding.
    """
    rows = train(base, tmp_path / "run", dtype=dtype, batch_size=32, micro_batch_size=3, steps=4)
    assert rows[0]["accuracy"] == 0.5
    assert rows[0]["margin"] != 0  # the margins are not simply the same bits
    assert rows[3]["accuracy"] not in (0.5, 0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_that_does_not_move_ties_with_its_reference(base, tmp_path, dtype):
    rows = train(base, tmp_path / "still", dtype=dtype, lr=0.0, steps=1)
    assert rows[0]["eval/accuracy"] == 0.5
    assert rows[0]["eval/accuracy_se"] == 0


def test_lora(base, tmp_path):
    # 53 pairs are all: the same batch three times.
    rows = train(base, tmp_path / "lora", batch_size=53, lora_rank=2, lora_dropout=0.3)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[2]["loss"] < math.log(2) - 1e-4
    for name in weights(tmp_path / "lora"):
        assert "lora_" in name
    assert load_policy(str(tmp_path / "lora"), value_head=False)


def test_frozen_layers(base, tmp_path):
    rows = train(base, tmp_path / "frozen", batch_size=53, freeze_layers=0.5)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[2]["loss"] < math.log(2) - 1e-3

    # The embeddings and the lower half of the blocks are what they were; all else has moved.
    before = load_file(base / "model" / "model.safetensors")
    after = load_file(tmp_path / "frozen" / "model" / "model.safetensors")
    for name in before:
        is_frozen = "embed_in" in name or ".layers.0." in name or ".layers.1." in name
        assert torch.equal(before[name], after[name]) == is_frozen, name


def test_what_the_steps_do_not_read_needs_no_reference(base, tmp_path, monkeypatch):
    batch_sizes = []
    token_sums = train_sft.token_sums

    def watched(policy, prompts, *rest):
        batch_sizes.append(len(prompts))
        return token_sums(policy, prompts, *rest)

    monkeypatch.setattr(train_sft, "token_sums", watched)
    train(base, tmp_path / "run", steps=2, batch_size=4)
    # Both sides: of 2 x 4 training rows, of the held-out ones, and of those again at the end.
    assert batch_sizes == [8, 8, 7, 7, 7, 7]


BAD = {
    "model": "world",
    "loss": "ppo",
    "dpo_beta": 0.0,
    "lr": -1.0,
    "steps": 0,
    "label_noise": 1.5,
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(base, name):
    flags = settings(base, **{name: BAD[name]})
    with pytest.raises(InputError, match=f"--{name}"):
        train_sft.Config(**flags)


def test_defaults_are_those_of_the_loss():
    sft = train_sft.Config()
    assert sft.steps == 400
    assert sft.lr == 3e-3
    assert sft.output_dir == "runs/sft"
    dpo = train_sft.Config(loss="dpo", model="runs/sft")
    assert dpo.steps == 100
    assert dpo.lr == 1e-4
    assert dpo.output_dir == "runs/dpo"  # never over the model that others start from


def test_demonstrations_have_no_labels_to_flip():
    with pytest.raises(InputError, match="--label_noise is for --loss dpo, ipo, simpo, not sft"):
        train_sft.Config(label_noise=0.1)


def test_what_is_given_is_no_default():
    assert train_sft.Config(steps=7).steps == 7
    assert train_sft.Config(lr=0.0).lr == 0.0

"""DPO, IPO and SimPO: losses and gradients against closed forms; train_sft.py --loss dpo, ipo and
simpo against plain transformers.

    B pairs
"""

import math
import statistics
from collections import defaultdict

import pytest
import torch
from checks import randn
from safetensors.torch import load_file
from support import metrics, read_rows, summary, weights, write_rows
from support import train as train_kind
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train_sft
from nanorlhf import splits, world
from nanorlhf.dpo import dpo_loss, ipo_loss, pair_points, simpo_loss
from nanorlhf.errors import InputError
from nanorlhf.models import load_policy
from nanorlhf.runtime.distributed import Dist

# -------------------------------------------------------------------------------------- the losses


BETA = 0.3
TAU = 0.4
GAMMA = 0.7
# Tokens of the chosen and the rejected responses of six pairs.
LENGTHS = torch.tensor([[3, 5, 1, 8, 2, 9], [4, 5, 6, 2, 7, 1]])


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


def test_ipo_loss_and_gradient_by_hand():
    """Per pair: (h - 1 / (2 tau))^2, with the slope 2 (h - 1 / (2 tau)) in pi_c."""
    total = 0.0
    slopes = []
    for pi_c, pi_r, ref_c, ref_r in random_pairs().T.tolist():
        gain_c = pi_c - ref_c
        gain_r = pi_r - ref_r
        error = gain_c - gain_r - 1 / (2 * TAU)
        total += error**2
        slopes.append(2 * error / 6)

    pi_c, pi_r, ref_c, ref_r = random_pairs()
    pi_c.requires_grad_()
    pi_r.requires_grad_()
    loss, _ = ipo_loss(pi_c, pi_r, ref_c, ref_r, TAU)
    loss.backward()
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)
    assert pi_c.grad.tolist() == pytest.approx(slopes, rel=1e-12)
    assert (-pi_r.grad).tolist() == pytest.approx(slopes, rel=1e-12)


def ipo_at(h):
    """IPO's loss and margin of a pair whose log-ratios differ by h nats."""
    zero = torch.zeros(1, dtype=torch.float64)
    loss, stats = ipo_loss(zero + h, zero, zero, zero, TAU)
    return loss.item(), stats["margin"].item()


def test_ipo_is_lowest_at_a_margin_of_1_over_2_tau_and_dpo_nowhere():
    target = 1 / (2 * TAU)
    loss, margin = ipo_at(target)
    assert loss == pytest.approx(0, abs=1e-12)
    assert margin == pytest.approx(1 / 2)  # in units of the implicit reward
    assert ipo_at(target - 1)[0] == pytest.approx(1)
    assert ipo_at(target + 1)[0] == pytest.approx(1)

    zero = torch.zeros(1)
    near, _ = dpo_loss(zero + 1, zero, zero, zero, BETA)
    far, _ = dpo_loss(zero + 10, zero, zero, zero, BETA)
    farther, _ = dpo_loss(zero + 100, zero, zero, zero, BETA)
    assert near > far > farther > 0


def simpo_rewards_by_a_loop():
    """The implicit rewards beta pi / tokens of the six pairs: a list of (chosen, rejected)."""
    rewards = []
    lengths = LENGTHS.T.tolist()
    for (pi_c, pi_r, _, _), (n_c, n_r) in zip(random_pairs().T.tolist(), lengths):
        chosen = BETA * pi_c / n_c
        rejected = BETA * pi_r / n_r
        rewards.append((chosen, rejected))
    return rewards


def test_simpo_loss_and_gradient_by_hand():
    """Per pair: log(1 + e^(gamma - a + b)), with a and b the rewards of the two responses."""
    total = 0.0
    slopes = []
    for a, b in simpo_rewards_by_a_loop():
        total += math.log(1 + math.exp(GAMMA - a + b))
        slope = -1 / (1 + math.exp(a - b - GAMMA))
        slopes.append(BETA * slope / 6)

    pi_c, pi_r, _, _ = random_pairs()
    pi_c.requires_grad_()
    pi_r.requires_grad_()
    lengths_c, lengths_r = LENGTHS
    loss, _ = simpo_loss(pi_c, pi_r, lengths_c, lengths_r, BETA, GAMMA)
    loss.backward()
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)
    # A nat of log-prob is shared by the tokens of its response.
    slopes_c = pi_c.grad * lengths_c
    slopes_r = pi_r.grad * lengths_r
    assert slopes_c.tolist() == pytest.approx(slopes, rel=1e-12)
    assert (-slopes_r).tolist() == pytest.approx(slopes, rel=1e-12)


def test_simpo_compares_tokens_not_lengths():
    """Twice as many tokens that are just as likely leave loss and rewards as they were.

    DPO's loss would change.
    """
    pi_c, pi_r, _, _ = random_pairs()
    lengths_c, lengths_r = LENGTHS
    loss, stats = simpo_loss(pi_c, pi_r, lengths_c, lengths_r, BETA, GAMMA)
    doubled, stats_doubled = simpo_loss(2 * pi_c, pi_r, 2 * lengths_c, lengths_r, BETA, GAMMA)
    assert doubled.item() == pytest.approx(loss.item(), rel=1e-12)
    reward = stats["reward_chosen"].item()
    assert stats_doubled["reward_chosen"].item() == pytest.approx(reward, rel=1e-12)
    assert stats_doubled["logp_chosen"] == 2 * stats["logp_chosen"]


def test_simpo_stats_by_hand():
    n_wins = 0
    total_chosen = 0.0
    total_rejected = 0.0
    for chosen, rejected in simpo_rewards_by_a_loop():
        if chosen > rejected:
            n_wins += 1
        total_chosen += chosen
        total_rejected += rejected
    pi_c, pi_r, _, _ = random_pairs()
    # Without their lengths the responses compare differently.
    assert n_wins != (pi_c > pi_r).sum()

    _, stats = simpo_loss(pi_c, pi_r, *LENGTHS, BETA, GAMMA)
    expected = {
        "accuracy": n_wins / 6,
        "margin": (total_chosen - total_rejected) / 6,
        "reward_chosen": total_chosen / 6,
        "reward_rejected": total_rejected / 6,
        "logp_chosen": pi_c.mean().item(),
        "logp_rejected": pi_r.mean().item(),
    }
    found = {name: value.item() for name, value in stats.items()}
    assert found == pytest.approx(expected, rel=1e-12)


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
    pi_c, pi_r, _, _ = random_pairs()
    expected = {
        "accuracy": n_wins / 6,
        "margin": (total_chosen - total_rejected) / 6,
        "reward_chosen": total_chosen / 6,
        "reward_rejected": total_rejected / 6,
        "logp_chosen": pi_c.mean().item(),
        "logp_rejected": pi_r.mean().item(),
    }

    # IPO's implicit reward is DPO's, with tau for beta.
    for loss in (dpo_loss, ipo_loss):
        pairs = random_pairs().requires_grad_()
        _, stats = loss(*pairs, BETA)
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


# Each loss of columns [4, B]; for SimPO the last two are lengths.
LOSSES = {
    "dpo": lambda columns, n_pairs: dpo_loss(*columns, 0.2, n_pairs),
    "ipo": lambda columns, n_pairs: ipo_loss(*columns, 0.2, n_pairs),
    "simpo": lambda columns, n_pairs: simpo_loss(*columns, 0.2, 0.5, n_pairs),
}


@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_batch_add_up_to_the_whole(name):
    loss_of = LOSSES[name]
    columns = randn(4, 9).abs()
    whole, stats = loss_of(columns, None)
    first, first_stats = loss_of(columns[:, :2], 9)
    second, second_stats = loss_of(columns[:, 2:], 9)
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
    "tie of certainties": (0.0, 0.0, 0.0, 0.0, 0.5),  # 0, of log-probs of 0
    "within rounding": (-300 + 9e-4, -200.0, -300.0, -200.0, 0.5),  # 9e-4 of log-probs of -1000
    "above rounding": (-300 + 11e-4, -200.0, -300.0, -200.0, 1.0),  # 11e-4 of log-probs of -1000
}


def test_ties_of_pairs_by_hand():
    columns = torch.tensor(list(PAIRS.values()), dtype=torch.float64).T
    pi_c, pi_r, ref_c, ref_r, expected = columns
    points = pair_points(pi_c, pi_r, ref_c, ref_r, 1e-6)
    assert points.tolist() == expected.tolist()
    _, stats = dpo_loss(pi_c, pi_r, ref_c, ref_r, 0.2, rounding=1e-6)
    assert stats["accuracy"].item() == pytest.approx(3.5 / 6)


def test_ties_of_simpo_are_within_the_rounding_of_log_probs():
    """Means of two responses that differ by 1e-7 of themselves, and by 1e-4."""
    pi_c = torch.tensor([-300 * (1 + 1e-7), -300 * (1 - 1e-4)], dtype=torch.float64)
    pi_r = torch.tensor([-200, -200], dtype=torch.float64)
    lengths = torch.tensor([[30, 30], [20, 20]])
    _, stats = simpo_loss(pi_c, pi_r, *lengths, 2.0, 1.0, rounding=1e-6)
    assert stats["accuracy"] == (0.5 + 1) / 2


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
        "eval_answers": False,
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


def rewards_of(base, run, held_out):
    """DPO's implicit rewards of the held-out pairs: lists of the chosen and the rejected ones."""
    policy = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    reference = AutoModelForCausalLM.from_pretrained(base / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    rewards = {"chosen": [], "rejected": []}
    for row in held_out:
        for side in rewards:
            pi = logprob(policy, tokenizer, row["prompt"], row[side])
            ref = logprob(reference, tokenizer, row["prompt"], row[side])
            rewards[side].append(0.1 * (pi - ref))
    return rewards["chosen"], rewards["rejected"]


def test_the_evaluation_by_plain_transformers(base, whole, held_out):
    chosen, rejected = rewards_of(base, whole, held_out)
    n = len(chosen)
    total_margin = 0.0
    total_loss = 0.0
    n_wins = 0
    for c, r in zip(chosen, rejected):
        total_margin += c - r
        total_loss += math.log(1 + math.exp(r - c))
        if c > r:
            n_wins += 1

    found = summary(whole)
    assert n == 7
    assert found["eval/n_pairs"] == n
    assert found["eval/margin"] == pytest.approx(total_margin / n, abs=1e-5)
    assert found["eval/loss"] == pytest.approx(total_loss / n, abs=1e-5)
    assert found["eval/accuracy"] == pytest.approx(n_wins / n)
    assert found["eval/reward_chosen"] == pytest.approx(sum(chosen) / n, abs=1e-5)
    assert found["eval/reward_rejected"] == pytest.approx(sum(rejected) / n, abs=1e-5)


def test_how_often_the_longer_text_wins(whole, held_out):
    points = 0.0
    for row in held_out:
        chosen_length = len(row["chosen"].split())
        rejected_length = len(row["rejected"].split())
        if chosen_length > rejected_length:
            points += 1
        elif chosen_length == rejected_length:
            points += 0.5
    assert summary(whole)["eval/longer_wins"] == pytest.approx(points / len(held_out))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
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
    more = write_rows(tmp_path / "more.jsonl", read_rows(base / "pairs.jsonl")[:3])
    still = {"lr": 0.0, "steps": 1, "eval_answers": True, "eval_splits": ["test", f"more={more}"]}
    rows = train(base, tmp_path / "still", dtype=dtype, **still)
    for row in rows:
        for label in ("eval", "more"):
            assert row[f"{label}/accuracy"] == 0.5
            assert row[f"{label}/accuracy_se"] == 0
            assert row[f"{label}/kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_lora(base, tmp_path):
    # 53 pairs are all: the same batch three times.
    rows = train(base, tmp_path / "lora", batch_size=53, lora_rank=2, lora_dropout=0.3)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[2]["loss"] < math.log(2) - 1e-4
    for name in weights(tmp_path / "lora"):
        assert "lora_" in name
    assert load_policy(str(tmp_path / "lora"), value_head=False)


@pytest.mark.slow
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


def count_token_sums(monkeypatch):
    """A list to which each later call of token_sums adds its number of rows."""
    n_rows = []
    token_sums = train_sft.token_sums

    def watched(policy, sequences, *rest):
        n_rows.append(len(sequences))
        return token_sums(policy, sequences, *rest)

    monkeypatch.setattr(train_sft, "token_sums", watched)
    return n_rows


def test_what_the_steps_do_not_read_needs_no_reference(base, tmp_path, monkeypatch):
    n_rows = count_token_sums(monkeypatch)
    train(base, tmp_path / "run", steps=2, batch_size=4)
    # Both sides: of 2 x 4 training rows, of the held-out ones, and of those again at the end.
    assert n_rows == [8, 8, 7, 7, 7, 7]


# ----------------------------------------------------------------------------------- IPO and SimPO


def test_ipo_by_plain_transformers(base, tmp_path, held_out):
    first, *_ = train(base, tmp_path / "ipo", loss="ipo", ipo_tau=0.25)
    # The policy is its own reference: h is 0.
    assert first["loss"] == pytest.approx((1 / (2 * 0.25)) ** 2, rel=1e-4)
    assert first["accuracy"] == 0.5

    rewards_c, rewards_r = rewards_of(base, tmp_path / "ipo", held_out)
    total = 0.0
    for c, r in zip(rewards_c, rewards_r):
        h = 10 * (c - r)  # these are DPO's, in which a nat is 0.1
        total += (h - 2) ** 2
    n = len(held_out)
    found = summary(tmp_path / "ipo")
    assert found["eval/loss"] == pytest.approx(total / n, rel=1e-4)
    mean_c = 2.5 * sum(rewards_c) / n
    mean_r = 2.5 * sum(rewards_r) / n
    assert found["eval/reward_chosen"] == pytest.approx(mean_c, abs=1e-5)
    assert found["eval/margin"] == pytest.approx(mean_c - mean_r, abs=1e-5)


def test_simpo_by_plain_transformers(base, tmp_path, monkeypatch, held_out):
    n_rows = count_token_sums(monkeypatch)
    train(base, tmp_path / "simpo", loss="simpo", simpo_beta=1.5, simpo_gamma=0.4)
    # Of both sides of the held-out pairs, at the end: there is no reference.
    assert n_rows == [7, 7]

    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "simpo/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    losses = []
    margins = []
    logps = {"chosen": [], "rejected": []}
    for row in held_out:
        rewards = []
        for side in logps:
            logp = logprob(policy, tokenizer, row["prompt"], row[side])
            n_tokens = len(tokenizer(row[side]).input_ids) + 1  # EOS
            rewards.append(1.5 * logp / n_tokens)
            logps[side].append(logp)
        margins.append(rewards[0] - rewards[1])
        losses.append(math.log(1 + math.exp(0.4 - margins[-1])))

    found = summary(tmp_path / "simpo")
    expected = {
        "loss": statistics.mean(losses),
        "margin": statistics.mean(margins),
        "margin_se": statistics.stdev(margins) / 7**0.5,
        "logp_chosen": statistics.mean(logps["chosen"]),
        "logp_rejected": statistics.mean(logps["rejected"]),
    }
    for name, value in expected.items():
        assert found[f"eval/{name}"] == pytest.approx(value, rel=1e-5, abs=1e-5), name


# ---------------------------------------------------------------------- answers to held-out prompts

REWARDS = """
def words(prompts, responses):
    return [len(set(response.split())) for response in responses]

def letters(prompts, responses):
    return [response.count("e") / 10 for response in responses]

def broken(prompts, responses):
    return [1 / 0 for response in responses]
"""


@pytest.fixture(scope="module")
def rewards(base):
    """The name of a file with three rewards."""
    path = base / "rewards.py"
    path.write_text(REWARDS)
    return str(path)


def logprobs_of_answer(model, row):
    """log pi of each token of an answer in a file of evaluations: [R]."""
    ids = row["prompt_ids"] + row["response_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    logp = logits[len(row["prompt_ids"]) - 1 : -1].double().log_softmax(-1)
    return logp[range(len(row["response_ids"])), row["response_ids"]]


def measure(policy, reference, answers):
    """What an evaluation measures of these answers, by plain transformers: {name: [N]}."""
    expected = defaultdict(list)
    for row in answers:
        x = logprobs_of_answer(reference, row) - logprobs_of_answer(policy, row)  # [R]
        expected["kl"].append(-x.sum().item())
        expected["kl_k2"].append((x**2 / 2).sum().item())
        expected["kl_k3"].append((x.exp() - 1 - x).sum().item())
        expected["length"].append(len(row["response_ids"]))

        words = row["response"].split()
        letters = row["response"].count("e") / 10
        expected["gold"].append(letters)
        expected["proxy"].append((len(set(words)) + letters) / 2)
    return expected


ANSWERING = [
    pytest.param({}, id="dpo"),
    pytest.param({"loss": "simpo"}, id="simpo", marks=pytest.mark.slow),
    pytest.param({"lora_rank": 2, "merge": True, "lr": 3e-2}, id="lora", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("changes", ANSWERING)
def test_answers_are_evaluated_as_those_of_ppo(base, tmp_path, rewards, held_out, changes):
    """KL to --model, proxy and gold of the answers in eval/."""
    run = tmp_path / "run"
    flags = {
        "eval_answers": True,
        "reward_model": [f"{rewards}:words", f"{rewards}:letters"],
        "gold_model": f"{rewards}:letters",
        "max_new_tokens": 20,
        "eval_every": 2,
    }
    rows = train(base, run, **flags, **changes)
    evaluated = [row["step"] for row in rows if "eval/kl" in row]
    assert evaluated == [0, 2, 3]
    assert rows[0]["eval/kl"] == pytest.approx(0, abs=1e-5)

    policy = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    reference = AutoModelForCausalLM.from_pretrained(base / "model").eval()
    answers = read_rows(run / "eval/step_3.jsonl")
    assert [row["prompt"] for row in answers] == [row["prompt"] for row in held_out]
    expected = measure(policy, reference, answers)
    assert statistics.mean(expected["kl_k2"]) > 1e-3
    for name, values in expected.items():
        mean = statistics.mean(values)
        se = statistics.stdev(values) / 7**0.5
        last = rows[-1]
        assert last[f"eval/{name}"] == pytest.approx(mean, rel=1e-4, abs=1e-5), name
        assert last[f"eval/{name}_se"] == pytest.approx(se, rel=1e-4, abs=1e-5), name
        assert last[f"eval/{name}_n"] == 7


def test_in_the_embedded_world_the_prompts_are_those_of_ppo(base):
    """The 120 test prompts, each once, though the held-out pairs are 256."""
    config = train_sft.Config(loss="dpo", model=f"{base}/model")
    assert config.gold_model == "world:gold"
    model_config = AutoConfig.from_pretrained(base / "model")
    alone = Dist(0, 1, torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    prompts = train_sft.load_prompts({}, tokenizer, model_config, config, alone)
    found = sorted(row["prompt"] for row in prompts["eval"].rows)
    assert found == sorted(row["prompt"] for row in world.prompts("test"))


@pytest.mark.slow
def test_in_the_embedded_world_the_first_answers_are_those_of_ppo(base, rewards, tmp_path):
    changes = {"dataset": "world", "steps": 1, "eval_size": 5, "max_new_tokens": 12}
    changes["reward_model"] = [f"{rewards}:words"]
    train(base, tmp_path / "dpo", eval_answers=True, **changes)
    train_kind(base, "ppo", tmp_path / "ppo", model=f"{base}/model", **changes)
    of_dpo = read_rows(tmp_path / "dpo/eval/step_0.jsonl")
    of_ppo = read_rows(tmp_path / "ppo/eval/step_0.jsonl")
    for row in of_ppo:
        # What PPO's value head says of each token, DPO has not.
        del row["tokens"]["value"], row["tokens"]["advantage"]
    assert of_ppo == of_dpo


def test_a_reward_that_fails_at_the_first_answers_leaves_no_trace(base, tmp_path, rewards):
    with pytest.raises(InputError, match="the reward .* raised"):
        train(base, tmp_path / "run", eval_answers=True, gold_model=f"{rewards}:broken")
    assert not (tmp_path / "run").exists()


def test_long_prompts_are_cut_on_the_left(base):
    """Where the context holds no more: 128 tokens, of which the answer has 100."""
    config = train_sft.Config(**settings(base, max_new_tokens=100))
    model_config = AutoConfig.from_pretrained(base / "model")
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    prompt = " ".join(f"{word} hotel" for word in world.LEXICON)
    pairs = {"eval": [{"prompt": prompt, "chosen": "a", "rejected": "the"}]}
    alone = Dist(0, 1, torch.device("cpu"))
    prompts = train_sft.load_prompts(pairs, tokenizer, model_config, config, alone)
    (ids,) = prompts["eval"].ids
    assert ids == tokenizer(prompt).input_ids[-28:]


# ---------------------------------------------------------------------------------------- settings

BAD = {
    "model": "world",
    "loss": "ppo",
    "dpo_beta": 0.0,
    "ipo_tau": 0.0,
    "simpo_beta": 0.0,
    "simpo_gamma": -1.0,
    "lr": -1.0,
    "steps": 0,
    "label_noise": 1.5,
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(base, name):
    flags = settings(base, **{name: BAD[name]})
    with pytest.raises(InputError, match=f"--{name}"):
        train_sft.Config(**flags)


# A loss, and a flag that is not its own.
OF_ANOTHER_LOSS = [
    ("sft", "dpo_beta", 0.2),
    ("ipo", "dpo_beta", 0.2),
    ("dpo", "ipo_tau", 0.2),
    ("ipo", "simpo_beta", 1.0),
    ("dpo", "simpo_gamma", 0.5),
    ("simpo", "loss_on", "last"),
    ("sft", "eval_answers", False),
    ("sft", "reward_model", ["world:gold"]),
    ("sft", "gold_model", "world:gold"),
]


@pytest.mark.parametrize("loss, name, value", OF_ANOTHER_LOSS)
def test_a_flag_of_another_loss_is_an_error(loss, name, value):
    with pytest.raises(InputError, match=f"--{name} is for --loss .*, not {loss}$"):
        train_sft.Config(loss=loss, model="runs/sft", **{name: value})


@pytest.mark.parametrize("name", ["reward_model", "gold_model"])
def test_a_reward_that_nothing_would_read_is_an_error(base, name):
    value = {"reward_model": ["world:gold"], "gold_model": "world:gold"}[name]
    with pytest.raises(InputError, match=f"--{name} .* needs --eval_answers"):
        train_sft.Config(**settings(base, **{name: value}))


def test_defaults_are_those_of_the_loss():
    sft = train_sft.Config()
    assert sft.steps == 400
    assert sft.lr == 3e-3
    assert sft.output_dir == "runs/sft"
    dpo = train_sft.Config(loss="dpo", model="runs/sft")
    assert dpo.steps == 100
    assert dpo.lr == 1e-4
    assert dpo.output_dir == "runs/dpo"  # never over the model that others start from
    assert train_sft.Config(loss="ipo", model="runs/sft").lr == 1e-4
    assert train_sft.Config(loss="simpo", model="runs/sft").lr == 3e-5


def test_demonstrations_have_no_labels_to_flip():
    with pytest.raises(InputError, match="--label_noise is for --loss dpo, ipo, simpo, not sft"):
        train_sft.Config(label_noise=0.1)


def test_what_is_given_is_no_default():
    assert train_sft.Config(steps=7).steps == 7
    assert train_sft.Config(lr=0.0).lr == 0.0

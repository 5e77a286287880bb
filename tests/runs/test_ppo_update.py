"""estimate_advantages, loss_of and update of train_ppo.py, by hand and by loops.

And the advantages that an evaluation writes down.

Numbers stand in the place of a policy.

B answers of a rollout, m of them in a micro-batch, R response tokens
"""

import math
from types import SimpleNamespace

import pytest
import torch
from checks import randn
from torch import nn

import train_ppo
from nanorlhf.evaluation import find_advantages, knows_advantages
from nanorlhf.packing import pack
from nanorlhf.runtime.distributed import Dist, setup

B = 8
LENGTHS = [1, 2, 3, 4, 5, 3, 2, 1]
R = max(LENGTHS)


def make_batch():
    """B answers to a prompt of one token."""
    responses = [[7] * length for length in LENGTHS]
    return pack([[1]] * B, responses)


def make_experience():
    """Random numbers for every response token, 0 where masked."""
    lengths = torch.tensor(LENGTHS)
    mask = torch.arange(R) < lengths[:, None]
    names = ["old_logprobs", "ref_logprobs", "advantages", "values", "returns"]
    columns = {}
    for seed, name in enumerate(names):
        columns[name] = randn(B, R, seed=seed) * mask
    return train_ppo.Experience(mask=mask, lengths=lengths, **columns)


def clip(x, low, high):
    return min(max(x, low), high)


def as_tensors(numbers):
    return {name: torch.tensor(number) for name, number in numbers.items()}


def token_losses(config, new, x, i, place, t):
    """What token t of an answer adds to the sums: policy loss, value loss, entropy and KL.

    The answer is row i of what the policy says now, and row `place` of the Experience.
    """
    logprob = new["logprobs"][i, t].item()
    value = new["values"][i, t].item()
    entropy = new["entropies"][i, t].item()
    advantage = x.advantages[place, t].item()
    ratio = math.exp(logprob - x.old_logprobs[place, t].item())
    clipped_ratio = clip(ratio, 1 - config.clip_range, 1 + config.clip_range)
    policy = max(-advantage * ratio, -advantage * clipped_ratio)

    old_value = x.values[place, t].item()
    target = x.returns[place, t].item()
    edge = config.value_clip_range
    clipped_value = clip(value, old_value - edge, old_value + edge)
    value_error = max((value - target) ** 2, (clipped_value - target) ** 2) / 2

    kl = (x.ref_logprobs[place, t].item() - logprob) ** 2 / 2  # k2
    if config.kl_kind == "full":
        kl = new["full_kl"][i, t].item()
    return torch.tensor([policy, value_error, entropy, kl], dtype=torch.float64)


@pytest.mark.parametrize("kl_in, kl_kind", [("loss", "k2"), ("loss", "full"), ("reward", "full")])
def test_the_loss_with_a_value_function_by_loops(kl_in, kl_kind):
    config = train_ppo.Config(
        vf_coef=0.3,
        ent_coef=0.2,
        kl_in=kl_in,
        kl_kind=kl_kind,
        temperature=0.7,
        clip_range=0.25,
        value_clip_range=0.4,
    )
    x = make_experience()
    at = torch.tensor([5, 1])  # rows of 3 and 2 tokens
    new = {
        "logprobs": randn(2, 3, seed=11),
        "values": randn(2, 3, seed=12),
        "entropies": randn(2, 3, seed=13).abs(),
        "full_kl": randn(2, 3, seed=14).abs(),
    }
    # This token's log-prob has moved furthest.
    new["logprobs"][0, 1] = x.old_logprobs[5, 1] - 4
    asked = []

    def policy(batch, mask, temperature, entropy, kl_to):
        asked.append((temperature, entropy, kl_to))
        return {name: column.clone().requires_grad_() * mask for name, column in new.items()}

    parts = SimpleNamespace(config=config, model=policy, reference="the reference")
    batch = make_batch().rows(at)
    loss, stats = train_ppo.loss_of(parts, batch, x, at, torch.tensor(20), kl_coef=0.6)
    # The exact KL in the loss needs the reference's logits.
    kl_to = "the reference" if (kl_in, kl_kind) == ("loss", "full") else None
    assert asked == [(0.7, True, kl_to)]

    sums = torch.zeros(4).double()
    for i, place in enumerate(at.tolist()):
        for t in range(LENGTHS[place]):
            sums += token_losses(config, new, x, i, place, t)
    policy_loss, value_loss, entropy, kl = (sums / 20).tolist()
    assert stats["policy_loss"].item() == pytest.approx(policy_loss, rel=1e-9)
    assert stats["value_loss"].item() == pytest.approx(value_loss, rel=1e-9)
    expected = policy_loss + 0.3 * value_loss - 0.2 * entropy
    if kl_in == "loss":  # a KL that is in the reward is not in the loss too
        expected += 0.6 * kl
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert stats["ratio_error"].item() == pytest.approx(4)
    assert not any(value.requires_grad for value in stats.values())


def test_the_advantages_of_groups():
    """RLOO by hand: what an answer has more than the other ones, 1 or 3, on all of its tokens."""
    config = train_ppo.Config(advantage="rloo", group_size=2, vf_coef=0.5, lam=0.95)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]]).bool()
    rewards = torch.tensor([[0.0, 2.0, 0], [1.0, 0, 0], [0.5, 0.5, 0], [4.0, 0, 0]])
    advantages, returns, record = train_ppo.estimate_advantages(config, {"mask": mask}, rewards)
    assert advantages.tolist() == [[1, 1, 0], [-1, 0, 0], [-3, -3, -3], [3, 0, 0]]
    assert returns is None
    assert record == {
        "advantage_mean": pytest.approx(-5 / 7),
        "advantage_std": pytest.approx((39 / 7 - 25 / 49) ** 0.5),
    }


def test_advantages_of_a_value_function_are_whitened():
    config = train_ppo.Config(gamma=1.0, lam=1.0)
    mask = torch.tensor([[1, 1], [1, 0]]).bool()
    values = torch.tensor([[1.0, 2.0], [1.0, 0.0]])
    rewards = torch.tensor([[0.0, 3.0], [-1.0, 0.0]])
    # The returns are 3, 3, -1, so the advantages are 2, 1, -2, of mean 1/3.
    outputs = {"mask": mask, "values": values}
    advantages, returns, record = train_ppo.estimate_advantages(config, outputs, rewards)
    assert returns.tolist() == [[3, 3], [-1, 0]]
    std = (3 - 1 / 9) ** 0.5
    expected = torch.tensor([[5 / 3, 2 / 3], [-7 / 3, 0]]) / std
    torch.testing.assert_close(advantages, expected)
    assert record == {
        "advantage_mean": pytest.approx(1 / 3),
        "advantage_std": pytest.approx(std),
        # 1 - Var(2, 1, -2) / Var(3, 3, -1)
        "explained_variance": pytest.approx(1 - std**2 / (32 / 9)),
    }


@pytest.mark.parametrize(
    "kl_in, expected",
    [("reward", [[-0.3, 1.0], [-0.95, 0.0]]), ("loss", [[-0.25, 1.0], [-0.75, 0.0]])],
)
def test_the_advantages_of_an_evaluation(kl_in, expected):
    """By hand: two tokens that end with EOS, and one that was cut off.

    The first score is 9 - 2 * 0.25 = 8.5, clipped to 2, the second 1 - 0.25 - 1 = -0.25. The KL of
    the three tokens is 1/2, 0 and 2, at a price of 0.1: A = r + V' / 2 - V + A' / 4.
    """
    config = train_ppo.Config(
        gamma=0.5,
        lam=0.5,
        kl_coef=0.1,
        kl_kind="k2",
        kl_in=kl_in,
        score_clip=2.0,
        missing_eos_penalty=1.0,
        length_penalty=0.25,
    )
    answered = {
        "logprobs": torch.tensor([[-1.0, -2.0], [-1.0, 0.0]]),
        "ref_logprobs": torch.tensor([[-2.0, -2.0], [-3.0, 0.0]]),
        "values": torch.tensor([[1.0, 1.0], [0.5, 0.0]]),
        "mask": torch.tensor([[1, 1], [1, 0]]).bool(),
        "eos_rate": torch.tensor([1.0, 0.0]),
    }
    # PPO maximises `scores`; the proxy may be another number.
    scored = SimpleNamespace(scores=torch.tensor([9.0, 1.0]), proxy=torch.zeros(2))
    found = find_advantages(config, answered, scored)
    torch.testing.assert_close(found, torch.tensor(expected))


KNOWN = [
    ({}, True),
    ({"kl_kind": "full", "kl_in": "loss"}, True),
    ({"kl_kind": "full"}, False),
    ({"score_scaling": "first"}, False),
    ({"kl_target": 3.0}, False),
    ({"bootstrap_truncated": True}, False),
]


@pytest.mark.parametrize("changes, known", KNOWN)
def test_when_an_evaluation_knows_advantages(changes, known):
    assert knows_advantages(train_ppo.Config(**changes)) == known


# The numbers of eight micro-batches: two epochs of two minibatches, in micro-batches of 3 and 1.
RATIOS = [1.0, 5.0, 2.0, 3.0, 4.0, 1.0, 1.0, 2.0]
ERRORS = [0.1, 0.3, 0.2, 0.9, 0.5, 0.4, 0.6, 0.7]


def test_an_update_adds_up_its_micro_batches(monkeypatch):
    """Every epoch sees every answer once. Sums become means over minibatches and epochs."""
    config = train_ppo.Config(
        batch_size=B, minibatch_size=4, micro_batch_size=3, ppo_epochs=2, max_grad_norm=100.0
    )
    policy = nn.Linear(1, 1, bias=False)
    start = policy.weight.item()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    parts = SimpleNamespace(config=config, dist=setup("cpu"), model=policy, policy=policy)
    x = make_experience()
    calls = []

    def loss_of(parts, batch, experience, at, n_tokens, kl_coef):
        i = len(calls)
        assert batch.response_lengths.tolist() == x.lengths[at].tolist()
        assert (experience, kl_coef) == (x, 0.6)
        calls.append((at.tolist(), n_tokens.item()))
        numbers = {"approx_kl": float(i), "ratio_max": RATIOS[i], "ratio_error": ERRORS[i]}
        return policy.weight.sum() * len(at), as_tensors(numbers)

    monkeypatch.setattr(train_ppo, "loss_of", loss_of)
    record = train_ppo.update(parts, optimizer, make_batch(), x, 0, 3, 0.6, lr=0.5)

    assert [len(at) for at, _ in calls] == [3, 1] * 4
    rows = [row for at, _ in calls for row in at]
    assert sorted(rows[:B]) == sorted(rows[B:]) == list(range(B))
    for i in range(0, 8, 2):
        (first, n_tokens), (second, same_n_tokens) = calls[i : i + 2]
        n_of_minibatch = sum(LENGTHS[row] for row in first + second)
        assert n_tokens == same_n_tokens == n_of_minibatch

    # Each minibatch has the gradient 3 + 1, and moves the weight by 0.5 of it.
    assert policy.weight.item() == pytest.approx(start - 4 * 0.5 * 4)
    assert record == {
        "approx_kl": ((0 + 1 + 2 + 3) / 2 + (4 + 5 + 6 + 7) / 2) / 2,
        "grad_norm": pytest.approx(4.0),
        "ratio_max": 5.0,
        "first_ratio_error": pytest.approx(0.3),  # of the first minibatch: no update came before it
    }


def test_the_update_of_the_second_of_two_processes(monkeypatch):
    """It trains on the rows that it has sampled, the last four of eight."""
    config = train_ppo.Config(
        batch_size=B, minibatch_size=4, micro_batch_size=4, ppo_epochs=1, max_grad_norm=100.0
    )
    dist = Dist(1, 2, torch.device("cpu"))
    # What the other process adds: 10 to each sum, and 0.5 as its largest.
    dist.sum = lambda sums: sums + 10
    dist.gather = lambda maxima: torch.cat([torch.full_like(maxima, 0.5), maxima])
    policy = nn.Linear(1, 1, bias=False)
    start = policy.weight.item()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    parts = SimpleNamespace(config=config, dist=dist, model=policy, policy=policy)
    x = make_experience()
    rows = []

    def loss_of(parts, batch, experience, at, n_tokens, kl_coef):
        assert batch.response_lengths.tolist() == x.lengths[at].tolist()
        rows.extend(at.tolist())
        numbers = {"approx_kl": 1.0, "ratio_max": 0.25, "ratio_error": 0.75}
        return policy.weight.sum(), as_tensors(numbers)

    monkeypatch.setattr(train_ppo, "loss_of", loss_of)
    its_batch = make_batch().rows(torch.arange(4, B))
    record = train_ppo.update(parts, optimizer, its_batch, x, 4, 3, 0.6, lr=0.5)

    assert sorted(rows) == [4, 5, 6, 7]
    # Two minibatches. DDP, which is not here, would halve the gradient of 1, so it is doubled.
    assert policy.weight.item() == pytest.approx(start - 2 * 0.5 * 2)
    assert record == {
        "approx_kl": (1 + 1 + 10) / 2,
        "grad_norm": (2 / 2 + 2 / 2 + 10) / 2,  # all processes have the same norm: each adds half
        "ratio_max": 0.5,
        "first_ratio_error": 0.75,
    }

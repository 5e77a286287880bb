"""Advantages without a value function, and the means of the losses, in nanorlhf.ppo.

Each expected number is derived here: by loops over single answers and tokens in float64, by sums
over all samples of a tiny policy, by autograd.

    B answers, G of them to one prompt, R response tokens
"""

import itertools
import math

import pytest
import torch
from checks import doubles, randn, refuses
from checks import same as nearly_same

from nanorlhf import ppo
from nanorlhf.ppo import (
    GROUP_KINDS,
    LOSS_MEANS,
    group_advantages,
    loss_denominator,
    policy_loss,
    sum_over_tokens,
    value_loss,
)


def same(found, expected, tol=1e-12):
    """The two are equal up to rounding in float64."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    nearly_same(found, expected, tol)


def grad(f, x):
    """The gradient of f at x, by autograd."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x)
    return gradient


# ------------------------------------------------------------------------------------ the formulas


def advantages_by_a_loop(group, kind):
    """The advantages of the answers to one prompt, from a list of their rewards."""
    n = len(group)
    mean = sum(group) / n
    squares = sum((reward - mean) ** 2 for reward in group)
    std = math.sqrt(squares / (n - 1))

    advantages = []
    for i, reward in enumerate(group):
        others = group[:i] + group[i + 1 :]
        if kind == "rloo":
            advantages.append(reward - sum(others) / (n - 1))
        elif kind == "grpo":
            advantages.append((reward - mean) / (std + 1e-4))
        elif kind == "dr_grpo":
            advantages.append(reward - mean)
        else:
            pytest.fail(f"{kind} is in GROUP_KINDS: derive its advantages in this loop too")
    return advantages


@pytest.mark.parametrize("group_size", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_group_advantages_by_loops(kind, group_size):
    """Of three prompts, whose rewards are mostly negative and of different spreads."""
    spreads = doubles([1, 10, 0.01])
    scores = spreads[:, None] * randn(3, group_size, seed=group_size) - 2
    expected = []
    for group in scores.tolist():
        expected += advantages_by_a_loop(group, kind)

    found = group_advantages(scores.flatten(), group_size, kind)
    assert found.shape == (3 * group_size,)
    same(found, expected)


@pytest.mark.parametrize(
    "n, group_size, kind, words",
    [
        (4, 1, "grpo", "groups of 1"),
        (4, 0, "rloo", "groups of 0"),
        (4, 3, "grpo", "4 scores are no whole groups of 3"),
        (2, 4, "dr_grpo", "2 scores are no whole groups of 4"),
        (4, 2, "gae", "'gae' is not one of rloo, grpo, dr_grpo"),
    ],
)
def test_groups_that_are_none(n, group_size, kind, words):
    with refuses(words):
        group_advantages(randn(n), group_size, kind)


def test_a_name_without_a_branch_of_its_own_is_no_other_kind(monkeypatch):
    monkeypatch.setattr(ppo, "GROUP_KINDS", (*GROUP_KINDS, "median"))
    with refuses("advantage 'median'"):
        group_advantages(randn(4), 2, "median")


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_a_group_of_equal_rewards_has_advantages_of_exactly_0(kind):
    """Also where its mean in float32 is another number than each reward; other groups have some."""
    equal = torch.full((7,), 0.1)
    assert equal.mean() != equal[0]

    unequal = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2])
    found = group_advantages(torch.cat([unequal, equal, unequal]), 7, kind)
    assert found[7:14].tolist() == [0.0] * 7
    of_unequal = doubles(advantages_by_a_loop(unequal.tolist(), kind))
    for group in (found[:7], found[14:]):
        same(group.double(), of_unequal, tol=1e-6)


# ------------------------------------------------ the gradients, by all samples of a small policy


ARM_REWARDS = doubles([1.0, -0.5, 0.3])
ARM_LOGITS = doubles([0.4, -0.2, 1.1])


def expected_gradient(logits, rewards, group_size, kind):
    """E[the policy gradient of one group], as a sum over all groups that can be sampled.

    An answer is one token, an arm; rewards: that of each arm, as logits [A]. The gradient of a
    sample is that of policy_loss at a ratio of 1.
    """
    arms = range(len(logits))
    all_groups = itertools.product(arms, repeat=group_size)
    groups = torch.tensor(list(all_groups))  # [N, G]
    old_logprobs = logits.log_softmax(-1)[groups]
    chances = old_logprobs.sum(1).exp()  # [N]
    same(chances.sum(), 1.0)

    scores = rewards[groups].flatten()
    advantages = group_advantages(scores, group_size, kind)
    weighted = advantages.view_as(groups) * chances[:, None]
    mask = torch.ones_like(groups).bool()

    def surrogate(z):
        logprobs = z.log_softmax(-1)[groups]
        loss, _ = policy_loss(logprobs, old_logprobs, weighted, mask, 0.2, n_tokens=group_size)
        return -loss

    return grad(surrogate, logits)


def exact_gradient(logits, rewards):
    """That of E[R] = sum over arms of pi(arm) R(arm)."""
    return grad(lambda z: (z.softmax(-1) * rewards).sum(), logits)


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_rloo_is_unbiased(group_size):
    found = expected_gradient(ARM_LOGITS, ARM_REWARDS, group_size, "rloo")
    same(found, exact_gradient(ARM_LOGITS, ARM_REWARDS))


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_dr_grpo_is_biased_by_a_constant_factor_alone(group_size):
    found = expected_gradient(ARM_LOGITS, ARM_REWARDS, group_size, "dr_grpo")
    exact = exact_gradient(ARM_LOGITS, ARM_REWARDS)
    same(found, exact * (group_size - 1) / group_size)


def two_armed(chance):
    """Logits of a policy that is right with this chance. Its reward is 1 then, else 0."""
    odds = chance / (1 - chance)
    return doubles([math.log(odds), 0.0])


RIGHT_OR_WRONG = doubles([1.0, 0.0])


def grpo_gradient_by_hand(chance, group_size):
    """The expected slope of grpo along the right arm's logit.

    With k of G answers right, a right one has the advantage (1 - k/G) / (std + 1e-4) and the slope
    of its log-prob is 1 - chance, a wrong one -(k/G) / (std + 1e-4) and -chance: their mean is
    k (G - k) / G^2 / (std + 1e-4). k is binomial.
    """
    n = group_size
    total = 0.0
    for k in range(1, n):
        variance = k * (n - k) / (n * (n - 1))
        slope = k * (n - k) / n**2 / (math.sqrt(variance) + 1e-4)
        probability = math.comb(n, k) * chance**k * (1 - chance) ** (n - k)
        total += probability * slope
    return total


@pytest.mark.parametrize("chance", [0.5, 0.1, 0.98])
def test_grpo_has_a_difficulty_bias(chance):
    found = expected_gradient(two_armed(chance), RIGHT_OR_WRONG, 4, "grpo")
    slope = grpo_gradient_by_hand(chance, 4)
    same(found, [slope, -slope])


def hard_to_even(group_size, kind):
    """The slope of a prompt that is solved one time in ten, beside that of one solved every other.

    For E[R] it is p (1 - p): 0.09 / 0.25 = 0.36.
    """
    hard = expected_gradient(two_armed(0.1), RIGHT_OR_WRONG, group_size, kind)
    even = expected_gradient(two_armed(0.5), RIGHT_OR_WRONG, group_size, kind)
    return (hard[0] / even[0]).item()


def test_only_grpo_weighs_a_hard_prompt_more_than_the_expected_reward_does():
    """A common factor cannot mend that. In groups of two, all that are unequal have one std."""
    assert hard_to_even(8, "rloo") == pytest.approx(0.36)
    assert hard_to_even(8, "dr_grpo") == pytest.approx(0.36)
    assert hard_to_even(2, "grpo") == pytest.approx(0.36)
    by_hand = grpo_gradient_by_hand(0.1, 8) / grpo_gradient_by_hand(0.5, 8)
    assert by_hand > 0.45
    assert hard_to_even(8, "grpo") == pytest.approx(by_hand)


def test_grpo_divides_each_prompts_advantages_by_its_own_std():
    """A hard prompt, one answer of four right, and one that is solved half of the time."""
    scores = doubles([0, 0, 0, 1, 0, 1, 1, 0])
    differences = group_advantages(scores, 4, "dr_grpo")
    # The squared deviations of the two groups add up to 3/4 and to 1; ddof is 1.
    hard_std = math.sqrt(1 / 4)
    even_std = math.sqrt(1 / 3)
    found = group_advantages(scores, 4, "grpo")
    same(found[:4], differences[:4] / (hard_std + 1e-4))
    same(found[4:], differences[4:] / (even_std + 1e-4))


# -------------------------------------------------------------------------- the means of the losses


LENGTHS = torch.tensor([5, 1, 3, 2])  # [B]
N_TOKENS = LENGTHS.sum()
MAX_NEW_TOKENS = 9
MASK = torch.arange(5) < LENGTHS[:, None]  # [B, R]
# The places (row, position) of all response tokens: what the loops visit.
TOKENS = [tuple(place) for place in MASK.nonzero().tolist()]
LOW = 0.2
HIGH = 0.5
OLD_LOGPROBS = randn(4, 5, seed=1) - 3
# Below 1 - LOW, inside, between 1 + LOW and 1 + HIGH, above 1 + HIGH.
RATIO = doubles([[0.5, 0.9, 1.3, 1.3, 1.8], [1.8] * 5, [1.3, 1.8, 0.5, 1, 1], [0.5, 1, 1, 1, 1]])
LOGPROBS = OLD_LOGPROBS + RATIO.log()
ADVANTAGES = randn(4, 5, seed=2)
VALUES = randn(4, 5, seed=3)
OLD_VALUES = VALUES + 0.4 * randn(4, 5, seed=4)
RETURNS = randn(4, 5, seed=5)

WITH_MEANS = pytest.mark.parametrize("kind", LOSS_MEANS)


def denominator_of(kind, rows=slice(None)):
    """What the losses of these rows, a part of the batch, are divided by."""
    return loss_denominator(kind, LENGTHS[rows], N_TOKENS, len(LENGTHS), MAX_NEW_TOKENS)


def weight_of_a_token(kind, b):
    """The share of one token of answer b in a loss."""
    if kind == "token":
        return 1 / 11
    if kind == "sequence":
        return 1 / 4 / LENGTHS[b].item()
    return 1 / (4 * 9)


def policy_token(advantage, ratio, high):
    """One token's loss, and its slope d loss / d logp, by cases instead of a maximum."""
    if advantage > 0 and ratio > 1 + high:
        return -advantage * (1 + high), 0.0
    if advantage <= 0 and ratio < 1 - LOW:
        return -advantage * (1 - LOW), 0.0
    return -advantage * ratio, -advantage * ratio


def policy_loss_by_a_loop(kind, high):
    """The loss, and its gradient [B, R]."""
    loss = 0.0
    slope = torch.zeros(4, 5, dtype=torch.float64)
    for b, t in TOKENS:
        advantage = ADVANTAGES[b, t].item()
        ratio = RATIO[b, t].item()
        token_loss, token_slope = policy_token(advantage, ratio, high)
        weight = weight_of_a_token(kind, b)
        loss += weight * token_loss
        slope[b, t] = weight * token_slope
    return loss, slope


def loss_of(kind, rows=slice(None), logprobs=LOGPROBS, high=HIGH):
    """The shipped policy loss of some rows, and its statistics."""
    return policy_loss(
        logprobs[rows],
        OLD_LOGPROBS[rows],
        ADVANTAGES[rows],
        MASK[rows],
        LOW,
        denominator_of(kind, rows),
        high,
        n_stats=N_TOKENS,
    )


@WITH_MEANS
def test_policy_loss_by_loops(kind):
    expected, slope = policy_loss_by_a_loop(kind, HIGH)
    loss, _ = loss_of(kind)
    same(loss, expected)
    gradient = grad(lambda x: loss_of(kind, logprobs=x)[0], LOGPROBS)
    same(gradient, slope)


def test_an_upper_edge_of_its_own_moves_that_edge_alone():
    """By default it is clip_range; the example has tokens that tell the two apart."""
    symmetric, slope = policy_loss_by_a_loop("token", LOW)
    wide, _ = policy_loss_by_a_loop("token", HIGH)
    assert abs(symmetric - wide) > 1e-3
    loss, stats = loss_of("token", high=None)
    same(loss, symmetric)
    gradient = grad(lambda x: loss_of("token", logprobs=x, high=None)[0], LOGPROBS)
    same(gradient, slope)
    _, other_stats = loss_of("token", high=LOW)
    assert stats == other_stats


# {case: (advantage, ratio, d loss / d logp)}, with a clip from 0.8 to 1.5
EDGES = {
    "good, above the upper edge": (1.0, 1.6, 0.0),
    "good, between clip_range and the upper edge": (1.0, 1.4, -1.4),
    "good, below the lower edge": (1.0, 0.7, -0.7),
    "bad, below the lower edge": (-1.0, 0.7, 0.0),
    "bad, above the upper edge": (-1.0, 1.6, 1.6),
}


@pytest.mark.parametrize("advantage, ratio, slope", EDGES.values(), ids=EDGES.keys())
def test_the_gradient_is_0_where_a_token_was_pushed_out_of_the_clip(advantage, ratio, slope):
    def loss_at(logprobs):
        advantages = doubles([[advantage]])
        mask = torch.tensor([[True]])
        old_logprobs = doubles([[0.0]])
        loss, _ = policy_loss(logprobs, old_logprobs, advantages, mask, LOW, clip_range_high=HIGH)
        return loss

    logprobs = doubles([[math.log(ratio)]])
    same(grad(loss_at, logprobs), [[slope]])


@WITH_MEANS
def test_statistics_are_means_over_tokens_whatever_the_denominator(kind):
    ratio_sum = 0.0
    approx_kl = 0.0
    n_below = 0
    n_above = 0
    for b, t in TOKENS:
        ratio = RATIO[b, t].item()
        ratio_sum += ratio
        approx_kl += (ratio - 1 - math.log(ratio)) / 11
        n_below += ratio < 1 - LOW
        n_above += ratio > 1 + HIGH
    assert n_below > 1
    assert n_above > 1

    _, stats = loss_of(kind)
    same(stats["ratio_mean"].double(), ratio_sum / 11, 1e-6)
    same(stats["ratio_max"].double(), 1.8, 1e-6)
    same(stats["clip_fraction"].double(), (n_below + n_above) / 11, 1e-6)
    same(stats["approx_kl"].double(), approx_kl, 1e-6)


def value_loss_of(kind, rows=slice(None)):
    return value_loss(
        VALUES[rows],
        OLD_VALUES[rows],
        RETURNS[rows],
        MASK[rows],
        0.3,
        denominator_of(kind, rows),
    )


@WITH_MEANS
def test_value_loss_by_loops(kind):
    expected = 0.0
    for b, t in TOKENS:
        value = VALUES[b, t].item()
        old_value = OLD_VALUES[b, t].item()
        target = RETURNS[b, t].item()
        held = max(value, old_value - 0.3)
        held = min(held, old_value + 0.3)
        distance = max(abs(value - target), abs(held - target))
        expected += weight_of_a_token(kind, b) * distance**2 / 2
    same(value_loss_of(kind), expected)


# Rows of the micro-batches; of two processes, which each have two answers and cut them differently.
PARTS = {
    "single rows": [[0], [1], [2], [3]],
    "uneven": [[3, 0, 2], [1]],
    "two processes": [[2, 1], [0], [3]],
}


@WITH_MEANS
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_losses_of_parts_add_up_to_the_whole(kind, parts):
    policy_total = 0.0
    value_total = 0.0
    clip_fraction = 0.0
    for rows in parts:
        part, stats = loss_of(kind, rows)
        policy_total += part
        clip_fraction += stats["clip_fraction"]
        value_total += value_loss_of(kind, rows)
    whole, stats = loss_of(kind)
    same(policy_total, whole)
    same(value_total, value_loss_of(kind))
    nearly_same(clip_fraction, stats["clip_fraction"])


def test_the_length_bias():
    """A short and a long bad answer: how strongly each of their tokens is pushed down."""
    lengths = torch.tensor([2, 8])
    mask = torch.arange(8) < lengths[:, None]
    logprobs = torch.where(mask, -1.0, 0.0).double()
    advantages = -mask.double()

    def slopes(kind):
        denominator = loss_denominator(kind, lengths, mask.sum(), 2, max_new_tokens=10)

        def loss_at(x):
            return policy_loss(x, logprobs, advantages, mask, 0.2, denominator)[0]

        slope = grad(loss_at, logprobs)
        # All tokens of an answer are pushed alike.
        same(slope[1], slope[1, :1].expand(8))
        return slope[:, 0]

    # With the mean over each answer's tokens, 1 / length: four times as strongly in the short one.
    same(slopes("sequence"), [1 / 2 / 2, 1 / 2 / 8])
    same(slopes("constant"), [1 / 20, 1 / 20])
    same(slopes("token"), [1 / 10, 1 / 10])


def test_a_constant_mean_does_not_depend_on_the_other_answers():
    """A token's weight is the same beside a long answer and beside a short one."""
    for lengths in (torch.tensor([3, 9]), torch.tensor([3, 1])):
        assert loss_denominator("constant", lengths, lengths.sum(), 2, 9) == 18


def test_a_mean_that_is_none():
    with refuses("'median' is not one of token, sequence, constant"):
        loss_denominator("median", LENGTHS, N_TOKENS, 4, MAX_NEW_TOKENS)


def test_sum_over_tokens_leaves_out_what_is_masked():
    """And divides by a number, a scalar, or row by row."""
    x = randn(4, 5, seed=7).masked_fill(~MASK, math.nan)
    divisors = torch.tensor([1, 2, 3, 4])
    total = 0.0
    by_row = 0.0
    for b, t in TOKENS:
        number = x[b, t].item()
        total += number
        by_row += number / (b + 1)
    same(sum_over_tokens(x, MASK, 7), total / 7)
    same(sum_over_tokens(x, MASK, torch.tensor(7)), total / 7)
    same(sum_over_tokens(x, MASK, divisors), by_row)

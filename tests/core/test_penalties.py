"""nanorlhf.penalties against float64 loops, and the density ratio of Gaussians, which is known.

For N(mu, S) against N(0, 1):

    log p_policy / p_human = (z'z - (z - mu)' S^-1 (z - mu) - log det S) / 2
"""

import math
import random

import pytest
import torch
from checks import (
    MU,
    STD,
    doubles,
    log_ratio_of_gaussians,
    refuses,
    sampling_error,
    seeded,
)

from nanorlhf.penalties import OPS, DensityRatio, density_loss, edit_latents, feature_penalty

# -------------------------------------------------------------------------------------- penalties


def draw_normal(chance, *shape):
    """Nested lists of random normal numbers."""
    if not shape:
        return chance.gauss(0, 1)
    n, *rest = shape
    return [draw_normal(chance, *rest) for _ in range(n)]


def penalty_by_a_loop(row, features, tau, alpha, kind):
    """One token's penalty: alpha for each feature above tau, or alpha times the excess."""
    penalty = 0.0
    for feature, threshold, price in zip(features, tau, alpha):
        excess = row[feature] - threshold
        if excess > 0:
            penalty += price if kind == "indicator" else price * excess
    return penalty


@pytest.mark.parametrize("kind", ["indicator", "hinge"])
@pytest.mark.parametrize("features", [[3], [0, 5, 2], [4, 4], []], ids=str)
def test_penalties_by_a_loop(kind, features):
    chance = random.Random(len(features))
    z = draw_normal(chance, 40, 6)
    tau = [chance.gauss(0, 0.5) for _ in features]
    alpha = [chance.uniform(0.1, 3) for _ in features]
    expected = []
    for row in z:
        expected.append(penalty_by_a_loop(row, features, tau, alpha, kind))
    # The example is one: the penalties differ.
    assert not features or len(set(expected)) > 1

    found = feature_penalty(doubles(z), features, tau, alpha, kind)
    assert found.shape == (40,)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_at_the_threshold_a_feature_is_free():
    z = torch.tensor([[0.5], [0.5000001], [-1.0]])
    penalties = feature_penalty(z, [0], [0.5], [2.0])
    assert penalties.tolist() == [0.0, 2.0, 0.0]


def test_what_does_not_fire_is_not_above_0():
    silent = torch.zeros(2, 3)
    penalties = feature_penalty(silent, [1], [0], [1])
    assert penalties.tolist() == [0.0, 0.0]


def test_a_hinge_costs_what_lies_above_the_threshold():
    z = torch.tensor([[0.5], [0.5000001], [-1.0]])
    penalties = feature_penalty(z, [0], [-2], [1], kind="hinge")
    assert penalties.tolist() == pytest.approx([2.5, 2.5000001, 1.0])


MISTAKES = {
    "one tau for two features": (
        ([1, 2], [0.5], [1.0, 1.0]),
        "2 features, 1 tau and 2 alpha",
    ),
    "no alpha": (([1], [0.5], []), "1 features, 1 tau and 0 alpha"),
    "feature 6 of 6": (([6], [0.5], [1.0]), "feature 6 is not one of the 6 features"),
    "negative feature": (([-1], [0.5], [1.0]), "feature -1 is not one of the 6 features"),
    "unknown kind": (
        ([1], [0.5], [1.0], "square"),
        "must be one of indicator, hinge, not 'square'",
    ),
}


@pytest.mark.parametrize("arguments, words", MISTAKES.values(), ids=MISTAKES.keys())
def test_penalties_that_cannot_be(arguments, words):
    z = torch.zeros(2, 6)
    with refuses(words):
        feature_penalty(z, *arguments)


# ------------------------------------------------------------------------------------------ edits

EDITS_BY_HAND = {
    "set": lambda z, v: v,
    "min": max,  # at least v
    "max": min,  # at most v
    "*": lambda z, v: z * v,
    "+": lambda z, v: z + v,
}


def two_edits_of_each_kind(chance):
    edits = []
    for op in OPS:
        for _ in range(2):
            edits.append((op, chance.gauss(0, 1)))
    return edits


def test_edits_by_a_loop():
    assert set(EDITS_BY_HAND) == set(OPS)
    chance = random.Random(0)
    edits = two_edits_of_each_kind(chance)
    z = draw_normal(chance, 4, 3, len(edits))
    expected = doubles(z)
    for i in range(4):
        for j in range(3):
            for k, (op, value) in enumerate(edits):
                expected[i, j, k] = EDITS_BY_HAND[op](z[i][j][k], value)

    before = doubles(z)
    after = edit_latents(before, edits)
    assert torch.equal(after, expected)
    assert torch.equal(before, doubles(z))  # what came in is left alone


def test_edits_that_cannot_be():
    edits = two_edits_of_each_kind(random.Random(0))
    z = torch.zeros(4, 3, len(edits)).double()
    one_missing = edits[1:]
    with pytest.raises(ValueError):
        edit_latents(z, one_missing)
    one_unknown = [*edits[1:], ("power", 2.0)]
    with pytest.raises(ValueError):
        edit_latents(z, one_unknown)


# ---------------------------------------------------------------------------------- density ratio


def draw_gaussians(n_policy, n_human, seed):
    """Latents of a policy, N(MU, STD^2), and of people, N(0, 1): [n_policy, 2], [n_human, 2]."""
    generator = seeded(seed)
    policy = MU + STD * torch.randn(n_policy, 2, generator=generator)
    human = torch.randn(n_human, 2, generator=generator)
    return policy, human


def fit_density_ratio(policy, human, seed):
    """A network trained to tell the two apart, its logit the log ratio of their densities."""
    net = DensityRatio(2, seed).fit(human)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.0)
    for _ in range(250):
        optimizer.zero_grad()
        density_loss(net(policy), net(human)).backward()
        optimizer.step()
    return net


# Where the sets are unequal, both classes weigh the same all the same.
@pytest.mark.parametrize(
    "n_policy, n_human, seed",
    [
        pytest.param(1000, 1000, 0, marks=pytest.mark.slow),
        (500, 1500, 1),
        pytest.param(1000, 1000, 2, marks=pytest.mark.slow),
    ],
)
def test_the_log_ratio_of_two_gaussians(n_policy, n_human, seed):
    policy, human = draw_gaussians(n_policy, n_human, seed)
    net = fit_density_ratio(policy, human, seed)

    z = torch.cat(draw_gaussians(4000, 4000, seed + 100))
    truth = log_ratio_of_gaussians(z)
    found = net(z).detach().double()
    # The error counts where both densities are high, and the two can be mistaken for each other.
    weight = torch.sigmoid(truth) * torch.sigmoid(-truth)
    squares = weight * (found - truth).square()
    error = (squares.sum() / weight.sum()).sqrt().item()
    print(f"root mean square error {error:.3f}")
    assert error < sampling_error(truth, 2 * n_policy) < truth.std() / 3


def test_latents_are_standardised_by_people():
    """In other units, and shifted, the same latents have the same ratio.

    A ratio of densities does not depend on units.
    """
    policy, human = draw_gaussians(64, 64, 0)
    scale = torch.tensor([100.0, 0.01])
    shift = torch.tensor([-7.0, 3.0])
    net = DensityRatio(2, 3).fit(human)
    rescaled_net = DensityRatio(2, 3).fit(human * scale + shift)
    # A fresh network says 0 to everything.
    torch.nn.init.normal_(net.logit.weight, generator=seeded(1))
    torch.nn.init.normal_(rescaled_net.logit.weight, generator=seeded(1))
    rescaled = rescaled_net(policy * scale + shift)
    torch.testing.assert_close(net(policy), rescaled, rtol=1e-3, atol=1e-3)


def test_a_feature_that_never_changes_is_divided_by_1():
    human = torch.tensor([[1.0, 5.0], [2.0, 5.0]])
    net = DensityRatio(2).fit(human)
    assert net.std.tolist() == [0.5, 1.0]
    assert net(torch.tensor([[1.0, 6.0]])).isfinite().all()


def weighted_sum(weights, values):
    total = 0.0
    for weight, value in zip(weights, values, strict=True):
        total += weight * value
    return total


def logit_by_hand(parameters, row):
    """w' tanh(W x + b) + c, with x the standardised latents of one token."""
    x = []
    for value, mean, std in zip(row, parameters["mean"], parameters["std"]):
        x.append((value - mean) / std)
    hidden = []
    for weights, bias in zip(parameters["hidden.weight"], parameters["hidden.bias"]):
        hidden.append(math.tanh(weighted_sum(weights, x) + bias))
    assert len(hidden) == 256
    return weighted_sum(parameters["logit.weight"][0], hidden) + parameters["logit.bias"][0]


def example_network():
    human = torch.randn(50, 3, generator=seeded(0))
    return DensityRatio(3, 5).fit(human)


def test_the_network_by_hand():
    net = example_network()
    torch.nn.init.normal_(net.logit.weight, generator=seeded(2))
    torch.nn.init.constant_(net.logit.bias, 0.7)
    z = torch.randn(4, 3, generator=seeded(1))
    parameters = {}
    for name, tensor in net.state_dict().items():
        parameters[name] = tensor.double().tolist()
    for row, logit in zip(z.double().tolist(), net(z).tolist()):
        assert logit == pytest.approx(logit_by_hand(parameters, row), abs=1e-4)


def test_a_network_that_has_learned_nothing_says_nothing():
    z = torch.randn(4, 3, generator=seeded(1))
    assert example_network()(z).tolist() == [0.0] * 4


def test_the_seed_draws_the_hidden_layer():
    net = example_network()
    same_seed = DensityRatio(3, 5)
    other_seed = DensityRatio(3, 6)
    assert torch.equal(same_seed.hidden.weight, net.hidden.weight)
    assert not torch.equal(other_seed.hidden.weight, net.hidden.weight)


@pytest.mark.parametrize("d", [1, 16])
def test_the_hidden_layer_starts_with_variance_1(d):
    """For people's latents W x and b have it each, however many latents there are: 2 together."""
    z = torch.randn(2000, d, generator=seeded(1))
    units = DensityRatio(d).hidden(z)  # [2000, 256]
    assert units.var().item() == pytest.approx(2, rel=0.15)


def test_the_network_needs_a_feature():
    with refuses("at least one feature"):
        DensityRatio(0)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_the_loss_by_a_loop():
    """The mean -log chance of the right answer, half of it from the policy, half from people."""
    policy = [1.5, -0.3, 20.0]
    human = [0.7, -2.0]
    expected = 0.0
    for logit in policy:
        expected -= math.log(sigmoid(logit)) / 3 / 2
    for logit in human:
        expected -= math.log(1 - sigmoid(logit)) / 2 / 2
    found = density_loss(torch.tensor(policy), torch.tensor(human))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_knowing_nothing_is_log_2():
    found = density_loss(torch.zeros(3), torch.zeros(9))
    assert found.item() == pytest.approx(math.log(2))

"""nanorlhf.penalties against float64 loops, and the density ratio of Gaussians, which is known.

For N(mu, S) against N(0, 1):  log p_policy / p_human = (z'z - (z - mu)' S^-1 (z - mu) - log det S) / 2
"""

import math
import random

import pytest
import torch
from support import MU, STD, log_ratio_of_gaussians, sampling_error

from nanorlhf.penalties import OPS, DensityRatio, density_loss, edit_latents, feature_penalty

# --------------------------------------------------------------------------------------------------------------------- penalties


@pytest.mark.parametrize("kind", ["indicator", "hinge"])
@pytest.mark.parametrize("features", [[3], [0, 5, 2], [4, 4], []])
def test_penalties_by_a_loop(kind, features):
    chance = random.Random(len(features))
    z = [[chance.gauss(0, 1) for _ in range(6)] for _ in range(40)]
    tau = [chance.gauss(0, 0.5) for _ in features]
    alpha = [chance.uniform(0.1, 3) for _ in features]
    expected = []
    for row in z:
        cost = 0.0
        for i, t, a in zip(features, tau, alpha):
            if row[i] > t:
                cost += a if kind == "indicator" else a * (row[i] - t)
        expected.append(cost)
    found = feature_penalty(torch.tensor(z, dtype=torch.float64), features, tau, alpha, kind)
    assert found.shape == (40,) and found.tolist() == pytest.approx(expected, abs=1e-12)
    assert not features or len(set(expected)) > 1  # it is a test


def test_at_the_threshold_a_feature_is_free():
    z = torch.tensor([[0.5], [0.5000001], [-1.0]])
    assert feature_penalty(z, [0], [0.5], [2.0]).tolist() == [0.0, 2.0, 0.0]
    assert feature_penalty(torch.zeros(2, 3), [1], [0], [1]).tolist() == [0.0, 0.0]  # what does not fire is not above 0
    assert feature_penalty(z, [0], [-2], [1], kind="hinge").tolist() == pytest.approx([2.5, 2.5000001, 1.0])


@pytest.mark.parametrize("args, words", [
    (([1, 2], [0.5], [1.0, 1.0]), "2 features, 1 tau and 2 alpha"),
    (([1], [0.5], []), "1 features, 1 tau and 0 alpha"),
    (([6], [0.5], [1.0]), "feature 6 is not one of the 6 latents"),
    (([-1], [0.5], [1.0]), "feature -1 is not one of the 6 latents"),
    (([1], [0.5], [1.0], "square"), "must be one of indicator, hinge, not 'square'"),
])  # fmt: skip
def test_penalties_that_cannot_be(args, words):
    with pytest.raises(ValueError, match=words):
        feature_penalty(torch.zeros(2, 6), *args)


def test_edits_by_a_loop():
    by_hand = {"set": lambda z, v: v, "min": max, "max": min, "*": lambda z, v: z * v, "+": lambda z, v: z + v}
    assert set(by_hand) == set(OPS)
    chance = random.Random(0)
    edits = [(op, chance.gauss(0, 1)) for op in OPS for _ in range(2)]
    z = [[[chance.gauss(0, 1) for _ in edits] for _ in range(3)] for _ in range(4)]
    expected = [[[by_hand[op](x, v) for x, (op, v) in zip(row, edits)] for row in part] for part in z]
    before = torch.tensor(z, dtype=torch.float64)
    after = edit_latents(before, edits)
    assert torch.equal(after, torch.tensor(expected, dtype=torch.float64)) and torch.equal(before, torch.tensor(z, dtype=torch.float64))
    for wrong in (edits[1:], [*edits[1:], ("power", 2.0)]):
        with pytest.raises(ValueError):
            edit_latents(before, wrong)


# ----------------------------------------------------------------------------------------------------------------- density ratio


def gaussians(n_policy, n_human, seed):
    g = torch.Generator().manual_seed(seed)
    return MU + STD * torch.randn(n_policy, 2, generator=g), torch.randn(n_human, 2, generator=g)


@pytest.mark.parametrize("n_policy, n_human, seed", [(1000, 1000, 0), (500, 1500, 1), (1000, 1000, 2)])  # all classes weigh the same
def test_the_log_ratio_of_two_gaussians(n_policy, n_human, seed):
    policy, human = gaussians(n_policy, n_human, seed)
    net = DensityRatio(2, seed).fit(human)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.0)
    for _ in range(250):
        optimizer.zero_grad()
        density_loss(net(policy), net(human)).backward()
        optimizer.step()
    z = torch.cat(gaussians(4000, 4000, seed + 100))
    truth, found = log_ratio_of_gaussians(z), net(z).detach().double()
    w = torch.sigmoid(truth) * torch.sigmoid(-truth)
    error = ((w * (found - truth).square()).sum() / w.sum()).sqrt().item()
    print(f"root mean square error {error:.3f}")
    assert error < sampling_error(truth, 2 * n_policy) < truth.std() / 3


def test_latents_are_standardised_by_people():
    """In other units, and shifted, the same latents have the same ratio: a ratio of densities does not depend on them."""
    policy, human = gaussians(64, 64, 0)
    scale, shift = torch.tensor([100.0, 0.01]), torch.tensor([-7.0, 3.0])
    nets = [DensityRatio(2, 3).fit(human), DensityRatio(2, 3).fit(human * scale + shift)]
    for net in nets:
        torch.nn.init.normal_(net.logit.weight, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(nets[0](policy), nets[1](policy * scale + shift), rtol=1e-3, atol=1e-3)
    constant = DensityRatio(2).fit(torch.tensor([[1.0, 5.0], [2.0, 5.0]]))  # a latent that never changes
    assert constant.std.tolist() == [0.5, 1.0] and constant(torch.tensor([[1.0, 6.0]])).isfinite().all()


def test_the_network_by_hand():
    net = DensityRatio(3, 5).fit(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)))
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    assert net(z).tolist() == [0.0] * 4  # nothing learned, nothing said
    torch.nn.init.normal_(net.logit.weight, generator=torch.Generator().manual_seed(2))
    p = {name: x.double().tolist() for name, x in net.state_dict().items()}
    for row, logit in zip(z.double().tolist(), net(z).tolist()):
        x = [(v - m) / s for v, m, s in zip(row, p["mean"], p["std"])]
        hidden = [math.tanh(sum(w * v for w, v in zip(ws, x)) + b) for ws, b in zip(p["hidden.weight"], p["hidden.bias"])]
        assert len(hidden) == 256 and logit == pytest.approx(sum(w * h for w, h in zip(p["logit.weight"][0], hidden)), abs=1e-4)
    again, other = DensityRatio(3, 5), DensityRatio(3, 6)
    assert torch.equal(again.hidden.weight, net.hidden.weight) and not torch.equal(other.hidden.weight, net.hidden.weight)
    with pytest.raises(ValueError, match="at least one latent"):
        DensityRatio(0)


def test_the_loss_by_a_loop():
    policy, human = [1.5, -0.3, 20.0], [0.7, -2.0]
    expected = -sum(math.log(1 / (1 + math.exp(-x))) for x in policy) / 6 - sum(math.log(1 - 1 / (1 + math.exp(-x))) for x in human) / 4
    assert density_loss(torch.tensor(policy), torch.tensor(human)).item() == pytest.approx(expected, rel=1e-6)
    assert density_loss(torch.zeros(3), torch.zeros(9)).item() == pytest.approx(math.log(2))

"""What tests of equations share: random numbers, refusals, and a density ratio that is known.

Nothing here needs a model, a script or a file. tiny_models.py and support.py have the helpers that
do.
"""

import math

import pytest
import torch


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    """Random normal numbers, the same at every call."""
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def doubles(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def same(a, b, tol=2e-5):
    """The two are equal up to the error of float32."""
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def refuses(words):
    """What stands below it must raise a ValueError that says these words."""
    return pytest.raises(ValueError, match=words)


# ---------------------------------------------------- two Gaussians, whose density ratio is known

# The policy's latents have this mean and standard deviation; people's are standard normal.
MU = torch.tensor([0.8, -0.4])
STD = torch.tensor([1.0, 0.7])


def log_ratio_of_gaussians(z):
    """log p_policy(z) - log p_people(z) for each row: [N, 2] -> [N].

    = sum_i (z_i^2 - ((z_i - mu_i) / std_i)^2) / 2 - log std_i; the factors sqrt(2 pi) cancel.
    """
    z = z.double()
    mu = MU.double()
    std = STD.double()
    policy_square = ((z - mu) / std).square()
    people_square = z.square()
    return (people_square - policy_square).sum(1) / 2 - std.log().sum()


def sampling_error(logits, n, parameters=30):
    """The root mean square error of a logit learned from n samples, half of each class.

    By maximum likelihood, a model with that many free parameters errs by
        E[w err^2] = parameters / n   with w = sigmoid(logit) (1 - sigmoid(logit)),
    where w is the Fisher information of one sample (van der Vaart 1998, 5.39). A network that has
    learned for a while has fewer free parameters than weights. The true ratio has 5; 30 leave room
    for the rest. An error of sign or of balance (log 3) is far outside.
    """
    w = torch.sigmoid(logits) * torch.sigmoid(-logits)
    return math.sqrt(parameters / n / w.mean().item())

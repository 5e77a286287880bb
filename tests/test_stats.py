"""Statistics against simulation; Kendall's tau is tested with the rewards."""

import pytest
import torch

from nanorlhf.stats import ratio


def test_ratio_by_hand():
    mean, se = ratio(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    assert mean == 2 and se == pytest.approx(1.0)  # with equal counts: the std (ddof 1) of 1 and 3 over sqrt(2)
    assert ratio(torch.tensor([3.0]), torch.tensor([2.0])) == (1.5, 0.0)


def test_ratio_against_simulation():
    """Rows whose tokens share a level: the reported standard error is the spread of the means over repetitions."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(400):
        counts = torch.randint(1, 30, (60,), generator=generator).double()
        level = torch.randn(60, generator=generator).double()
        results.append(ratio((2 + level) * counts, counts))
    means, errors = torch.tensor(results).T
    assert means.mean().item() == pytest.approx(2, abs=0.03)
    assert errors.mean().item() == pytest.approx(means.std().item(), rel=0.1)

"""Differential, contribution and their intervals against loops in plain Python; tokens that separate against pairs counted one by one."""

import random

import pytest
import torch

from nanorlhf.control import feature_contrasts
from nanorlhf.control.feature_contrasts import contrast, score_gaps, separation


def latents(n, m, seed):
    """Sparse latents of either sign; the last one never fires."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, m, generator=g) * (torch.rand(n, m, generator=g) < 0.4)
    z[:, -1] = 0
    return z


def by_hand(chosen, rejected, w, rows):
    """c, j, s and contribution of the rows (repeated ones too), in loops -> four lists"""
    m = len(chosen[0])
    c, j = (
        [sum(max(z[r][i], 0) for r in rows) / len(rows) for i in range(m)]
        for z in (chosen, rejected)
    )
    damping = sum(x + y for x, y in zip(c, j)) / m
    s = [(x - y) / (x + y + damping) for x, y in zip(c, j)]
    return c, j, s, [v * (x - y) for v, x, y in zip(w, c, j)]


def test_contrast_is_the_loops():
    chosen, rejected, w = (
        latents(40, 7, 0),
        latents(40, 7, 1),
        torch.randn(7, generator=torch.Generator().manual_seed(2)),
    )
    found = contrast(chosen, rejected, w)
    expected = by_hand(chosen.tolist(), rejected.tolist(), w.tolist(), range(40))
    for name, values in zip(("chosen", "rejected", "differential", "contribution"), expected):
        assert getattr(found, name).tolist() == pytest.approx(values, abs=1e-6), name
    for name, z in (("rate_chosen", chosen), ("rate_rejected", rejected)):
        assert getattr(found, name).tolist() == pytest.approx(
            [sum(x != 0 for x in column) / 40 for column in z.T.tolist()]
        )
    assert found.differential[-1] == 0 == found.contribution[-1]
    without = contrast(
        chosen[:, :-1], rejected[:, :-1], w[:-1], m=7
    )  # one that never fires may be left out
    assert all(torch.allclose(a, b[..., :-1]) for a, b in zip(without, found))


def test_intervals_are_those_of_resampled_prompts(monkeypatch):
    """Prompts of one to three pairs, drawn by hand with the same draws; in blocks of two latents."""
    monkeypatch.setattr(feature_contrasts, "AT_ONCE", 2 * 300)
    chosen, rejected, w = (
        latents(25, 5, 3),
        latents(25, 5, 4),
        torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]),
    )
    groups = torch.tensor(
        [i * 2 // 3 for i in range(24)] + [7]
    )  # the last pair belongs to an earlier prompt
    found = contrast(chosen, rejected, w, groups, resamples=300, level=0.9, seed=5)
    n = int(groups.max()) + 1
    draws = torch.randint(n, (300, n), generator=torch.Generator().manual_seed(5)).tolist()
    members = [[r for r in range(25) if groups[r] == g] for g in range(n)]
    resamples = [
        by_hand(
            chosen.tolist(), rejected.tolist(), w.tolist(), [r for g in draw for r in members[g]]
        )[2:]
        for draw in draws
    ]
    for k, name in enumerate(("differential_interval", "contribution_interval")):
        table = torch.tensor([resample[k] for resample in resamples], dtype=torch.float64)
        for end, q in zip(getattr(found, name), (0.05, 0.95)):
            assert end.tolist() == pytest.approx(
                [table[:, i].quantile(q).item() for i in range(5)], abs=1e-6
            ), name


def test_without_weights_there_is_no_contribution():
    found = contrast(latents(9, 3, 0), latents(9, 3, 1))
    assert (
        found.contribution is None is found.contribution_interval
        and found.differential.shape == (3,)
    )
    silent = contrast(torch.zeros(4, 2), torch.zeros(4, 2))
    assert silent.differential.tolist() == [0, 0] and silent.differential_interval.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rejected": torch.zeros(4, 2)}, r"\[5, 2\] and \[4, 2\]"),
        ({"weights": torch.zeros(3)}, "3 weights for 2 features"),
        ({"groups": torch.zeros(4)}, "4 groups for 5 pairs"),
        ({"chosen": torch.zeros(0, 2), "rejected": torch.zeros(0, 2)}, "must both be"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        contrast(**{"chosen": torch.zeros(5, 2), "rejected": torch.zeros(5, 2)} | changes)


def test_separation_counts_pairs_of_texts_within_a_part():
    random.seed(0)
    parts = [
        (latents(n, 4, n), torch.rand(n, 3, generator=torch.Generator().manual_seed(n)) < 0.4)
        for n in (20, 31)
    ]
    parts[0][1][:, 2] = True  # a token that all texts of a part have: nothing to compare there
    found = separation(parts)
    for i in range(4):
        for c in range(3):
            wins = []
            for z, present in parts:
                has, lacks = z[present[:, c], i].tolist(), z[~present[:, c], i].tolist()
                wins += [1.0 if x > y else 0.5 if x == y else 0.0 for x in has for y in lacks]
            assert found[i, c].item() == pytest.approx(sum(wins) / len(wins))
    assert separation([(latents(5, 2, 0), torch.ones(5, 1).bool())]).isnan().all()


def test_what_changed_together_is_not_taken_for_one_another():
    """Training made '!' and another thing common, each on its own: pooled, the other thing's latent looks like one of '!'."""
    i = torch.arange(16)
    z, mark = (
        (i % 4 == 0).float()[:, None],
        (i // 4 == 0)[:, None],
    )  # of 16 texts 4 and 4, 1 both: independent
    parts = [(z, mark), (1 - z, ~mark)]  # before and after
    assert separation([tuple(map(torch.cat, zip(*parts)))]).item() == pytest.approx(0.625)
    assert separation(parts).item() == 0.5


def test_score_gaps_are_least_squares_with_an_intercept_for_each_part():
    g = torch.Generator().manual_seed(0)
    parts = [(latents(n, 4, n), torch.randn(n, generator=g) + n) for n in (20, 31)]
    parts[0][0][:, 0] = 1  # fires on all of a part: nothing to compare there
    found = score_gaps(parts)
    side = torch.cat([torch.eye(2)[i].expand(len(z), 2) for i, (z, _) in enumerate(parts)])
    for i in range(3):
        x = torch.cat([torch.cat([z[:, i] != 0 for z, _ in parts])[:, None], side], 1).double()
        y = torch.cat([scores for _, scores in parts]).double()
        assert found[i].item() == pytest.approx(torch.linalg.lstsq(x, y).solution[0].item())
    assert found[3].isnan()  # it never fires

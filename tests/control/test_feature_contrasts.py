"""Differential, contribution and their intervals against loops in plain Python; tokens that tell
texts apart against pairs of texts counted one by one.

    N pairs of answers or texts, M features
"""

import pytest
import torch

from nanorlhf.control import feature_contrasts
from nanorlhf.control.feature_contrasts import contrast, score_gaps, separation


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def latents(n, m, seed):
    """Sparse latents [n, m] of either sign; the last one never fires."""
    generator = seeded(seed)
    values = torch.randn(n, m, generator=generator)
    fires = torch.rand(n, m, generator=generator) < 0.4
    z = values * fires
    z[:, -1] = 0
    return z


def refuses(words):
    """What stands below it must raise a ValueError that says these words."""
    return pytest.raises(ValueError, match=words)


# -------------------------------------------------------------------- chosen against rejected


def positive_means(z, rows):
    """The mean of max(z_i, 0) over these rows, for each latent: [N][M] -> [M]."""
    means = []
    for i in range(len(z[0])):
        total = sum(max(z[row][i], 0) for row in rows)
        means.append(total / len(rows))
    return means


def firing_rates(z):
    """The share of the rows on which each latent is not 0: [N][M] -> [M]."""
    rates = []
    for column in z.T.tolist():
        n_fires = sum(x != 0 for x in column)
        rates.append(n_fires / len(column))
    return rates


def contrast_by_loops(chosen, rejected, w, rows):
    """contrast()'s equations, latent by latent, over these rows; a row may come twice."""
    c = positive_means(chosen.tolist(), rows)
    j = positive_means(rejected.tolist(), rows)
    damping = (sum(c) + sum(j)) / len(c)
    s = []
    contribution = []
    for c_i, j_i, w_i in zip(c, j, w.tolist()):
        s.append((c_i - j_i) / (c_i + j_i + damping))
        contribution.append(w_i * (c_i - j_i))
    return {"chosen": c, "rejected": j, "differential": s, "contribution": contribution}


@pytest.fixture
def forty_pairs():
    """(chosen [40, 7], rejected [40, 7], weights [7])"""
    weights = torch.randn(7, generator=seeded(2))
    return latents(40, 7, 0), latents(40, 7, 1), weights


@pytest.mark.parametrize("name", ["chosen", "rejected", "differential", "contribution"])
def test_contrast_is_the_loops(forty_pairs, name):
    chosen, rejected, w = forty_pairs
    found = contrast(chosen, rejected, w)
    expected = contrast_by_loops(chosen, rejected, w, range(40))
    assert getattr(found, name).tolist() == pytest.approx(expected[name], abs=1e-6)


def test_rates_are_shares_of_texts_on_which_a_latent_fires(forty_pairs):
    chosen, rejected, w = forty_pairs
    found = contrast(chosen, rejected, w)
    assert found.rate_chosen.tolist() == pytest.approx(firing_rates(chosen))
    assert found.rate_rejected.tolist() == pytest.approx(firing_rates(rejected))


def test_a_latent_that_never_fires_has_zeros_and_may_be_left_out(forty_pairs):
    chosen, rejected, w = forty_pairs
    found = contrast(chosen, rejected, w)
    assert found.differential[-1] == 0
    assert found.contribution[-1] == 0

    without_last = contrast(chosen[:, :-1], rejected[:, :-1], w[:-1], m=7)
    for left, whole in zip(without_last, found):
        torch.testing.assert_close(left, whole[..., :-1])


def resample_pairs(groups, resamples):
    """Lists of pairs: each draws as many groups as there are, and takes all pairs of each one.

    The draws are contrast()'s, from the seed 0.
    """
    n_groups = max(groups) + 1
    draws = torch.randint(n_groups, (resamples, n_groups), generator=seeded(0))
    samples = []
    for drawn_groups in draws.tolist():
        rows = []
        for drawn in drawn_groups:
            for row, group in enumerate(groups):
                if group == drawn:
                    rows.append(row)
        samples.append(rows)
    return samples


def test_intervals_are_those_of_resampled_prompts(monkeypatch):
    """Prompts of one to three pairs, drawn by hand; contrast() takes two latents at a time."""
    monkeypatch.setattr(feature_contrasts, "AT_ONCE", 2 * 300)
    chosen = latents(25, 5, 3)
    rejected = latents(25, 5, 4)
    w = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    groups = [i * 2 // 3 for i in range(24)]
    groups.append(7)  # the last pair belongs to an earlier prompt

    found = contrast(chosen, rejected, w, torch.tensor(groups), resamples=300)

    differentials = []
    contributions = []
    for rows in resample_pairs(groups, 300):
        sample = contrast_by_loops(chosen, rejected, w, rows)
        differentials.append(sample["differential"])
        contributions.append(sample["contribution"])
    # The middle 95% lies between these percentiles.
    ends = torch.tensor([0.025, 0.975]).double()
    expected = torch.tensor(differentials).double().quantile(ends, 0)  # [2, 5]
    torch.testing.assert_close(found.differential_interval, expected, rtol=1e-6, atol=1e-6)
    expected = torch.tensor(contributions).double().quantile(ends, 0)
    torch.testing.assert_close(found.contribution_interval, expected, rtol=1e-6, atol=1e-6)


def test_without_weights_there_is_no_contribution():
    found = contrast(latents(9, 3, 0), latents(9, 3, 1))
    assert found.contribution is None
    assert found.contribution_interval is None
    assert found.differential.shape == (3,)


def test_where_nothing_fires_the_differential_is_0():
    silent = contrast(torch.zeros(4, 2), torch.zeros(4, 2))
    assert silent.differential.tolist() == [0, 0]
    assert silent.differential_interval.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"groups": torch.zeros(4)}, "4 groups for 5 rows"),
        ({"chosen": torch.zeros(0, 2), "rejected": torch.zeros(0, 2)}, "at least one row"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    arguments = {"chosen": torch.zeros(5, 2), "rejected": torch.zeros(5, 2)}
    arguments |= changes
    with refuses(words):
        contrast(**arguments)


# ------------------------------------------------------------------------- what latents follow


def compare(x, y):
    """1 where x is larger, 0.5 in a tie, 0 where it is smaller."""
    if x == y:
        return 0.5
    return float(x > y)


def separation_by_pairs(parts, latent, token):
    """The share of pairs (a text with the token, one of the same part without) that z orders so."""
    wins = []
    for z, present in parts:
        with_token = z[present[:, token], latent].tolist()
        without_token = z[~present[:, token], latent].tolist()
        for x in with_token:
            for y in without_token:
                wins.append(compare(x, y))
    return sum(wins) / len(wins)


def test_separation_counts_pairs_of_texts_within_a_part():
    parts = []
    for n in (20, 31):
        present = torch.rand(n, 3, generator=seeded(n)) < 0.4
        parts.append((latents(n, 4, n), present))
    # All texts of the first part have token 2: there is nothing to compare in it.
    parts[0][1][:, 2] = True

    found = separation(parts)

    for i in range(4):
        for c in range(3):
            expected = separation_by_pairs(parts, i, c)
            assert found[i, c].item() == pytest.approx(expected)


def test_a_token_that_all_texts_have_separates_nothing():
    everywhere = torch.ones(5, 1).bool()
    assert separation([(latents(5, 2, 0), everywhere)]).isnan().all()


def test_what_changed_together_is_not_taken_for_one_another():
    """Training made '!' and another thing common, each on its own.

    Pooled, the latent of the other thing looks like one of '!'.
    """
    # Before training 4 of 16 texts have '!', and the latent fires on 4; 1 has both, by chance.
    i = torch.arange(16)
    z = (i % 4 == 0).float()[:, None]
    has_mark = (i // 4 == 0)[:, None]
    # After training, 12 have each.
    z_after = 1 - z
    has_mark_after = ~has_mark

    pooled = (torch.cat([z, z_after]), torch.cat([has_mark, has_mark_after]))
    # Of the pooled texts 16 have '!', and z fires on 1 + 9 of them; on 6 of the other 16.
    # By hand: P(z larger) = 10/16 10/16, a tie: 2 * 10/16 6/16, in all 0.39 + 0.47 / 2.
    assert separation([pooled]).item() == pytest.approx(0.625)
    assert separation([(z, has_mark), (z_after, has_mark_after)]).item() == 0.5


def gap_by_least_squares(parts, latent):
    """The coefficient of "fires" in a regression of the score, with an intercept for each part."""
    rows = []
    scores = []
    for part, (z, part_scores) in enumerate(parts):
        for z_n, score in zip(z[:, latent].tolist(), part_scores.tolist()):
            rows.append([float(z_n != 0), float(part == 0), float(part == 1)])
            scores.append(score)
    x = torch.tensor(rows).double()
    y = torch.tensor(scores).double()
    return torch.linalg.lstsq(x, y).solution[0].item()


def test_score_gaps_are_least_squares_with_an_intercept_for_each_part():
    generator = seeded(0)
    parts = []
    for n in (20, 31):
        scores = torch.randn(n, generator=generator) + n
        parts.append((latents(n, 4, n), scores))
    # Latent 0 fires on all texts of the first part: there is nothing to compare in it.
    parts[0][0][:, 0] = 1

    found = score_gaps(parts)

    for i in range(3):
        assert found[i].item() == pytest.approx(gap_by_least_squares(parts, i))
    # The last latent never fires.
    assert found[3].isnan()

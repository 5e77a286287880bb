"""nanorlhf.diversity against loops over pairs and n-grams, leaving texts out one by one, and simulation.

    P prompts, K outputs to each; G sets of S texts, D hidden, R partners of a text
"""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from nanorlhf.diversity import (
    distinct_n,
    distinct_n_se,
    draw_partners,
    ead,
    embedding_diversity,
    jackknife_se,
    ngram_diversity,
    nli_diversity,
    nli_scores,
    pairwise_diversity,
    simulated_best_of_n,
    split_sentences,
    spread_across_inputs,
    spread_over_inputs,
)

TEXTS = ["a b a b", "a b c", "", "d", "c d e a b"]


def random_texts(n, words, longest, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choice(words) for _ in range(rng.randint(0, longest))) for _ in range(n)]


def counts_by_hand(texts, n):
    """distinct and all n-grams, by strings and positions."""
    found = Counter()
    for text in texts:
        words = text.split()
        for i in range(len(words)):
            if i + n <= len(words):
                found["|".join(words[i : i + n])] += 1
    return len(found), sum(found.values())


# ------------------------------------------------------------------------------------------------------------------------- n-grams


def test_distinct_n_by_hand():
    assert distinct_n(TEXTS, 1) == 5 / 13  # a b c d e of 4 + 3 + 0 + 1 + 5 words
    assert distinct_n(TEXTS, 2) == 6 / 9  # ab ba ab | ab bc | cd de ea ab: ab ba bc cd de ea
    assert distinct_n(["x"], 2) == 0 and distinct_n([], 1) == 0
    assert distinct_n(["happy happy happy happy"], 2) == 1 / 3
    assert distinct_n([[7, 8, 7], [8, 7]], 2) == 2 / 3  # token ids: 78 87 | 87


@pytest.mark.parametrize("n", [1, 2])
def test_standard_error_against_leaving_out_one_by_one(n):
    left_out = [distinct_n(TEXTS[:i] + TEXTS[i + 1 :], n) for i in range(5)]
    mean = sum(left_out) / 5
    assert distinct_n_se(TEXTS, n) == pytest.approx((4 / 5 * sum((x - mean) ** 2 for x in left_out)) ** 0.5)
    assert distinct_n_se([], n) == 0 and distinct_n_se(["", ""], n) == 0 and distinct_n_se(["a a"], n) == 0


def test_ead_by_hand():
    assert ead(TEXTS, 1) == pytest.approx(5 / (5 * (1 - 0.8**13)))  # V = 5 words of the texts
    assert ead(TEXTS, 1, vocab_size=7) == pytest.approx(5 / (7 * (1 - (6 / 7) ** 13)))
    assert ead(TEXTS, 2, vocab_size=7) == pytest.approx(6 / (49 * (1 - (48 / 49) ** 9)))
    assert ead(TEXTS, 2, vocab_size=7, reference=True) == pytest.approx(6 / (7 * (1 - (6 / 7) ** 9)))  # U = V for every n
    assert ead([[1, 2, 3, 4]] * 20 + [[4, 3, 2, 1, 3, 1, 4, 2, 4]] * 20, 2, 4, reference=True) > 1 >= ead([[1, 2, 3, 4]] * 20, 2, 4)
    assert ead(["a b"], 3) == ead([], 1) == ead([""], 1) == 0
    assert ead(["a a a"], 1) == ead(["a a a"], 2) == 1  # a single word is all that there is
    assert ead(TEXTS, 5, vocab_size=10**9) == 1 and ead(["a " * 400], 300, 10**6) == pytest.approx(1 / 101)  # U is as good as infinite
    for wrong in (4, 0):
        with pytest.raises(ValueError, match=f"a vocabulary of {wrong}, but there are 5 different"):
            ead(TEXTS, 1, vocab_size=wrong)


@pytest.mark.parametrize("V, texts, length, n", [(5, 3, 4, 1), (20, 16, 12, 1), (20, 16, 12, 2), (7, 10, 30, 3), (300, 16, 40, 2)])
def test_ead_of_uniform_tokens_is_one(V, texts, length, n):
    rng = np.random.default_rng(0)
    values = [ead(rng.integers(V, size=(texts, length)).tolist(), n, vocab_size=V) for _ in range(400)]
    assert np.mean(values) == pytest.approx(1, abs=4 * np.std(values) / 20 + 5e-3)  # n-grams that overlap are not quite independent
    assert np.std(values) > 1e-4


@pytest.mark.parametrize("G, S, words, longest", [(4, 5, "abc", 7), (3, 1, "ab", 9), (1, 6, "abcdefgh", 12), (6, 2, "a", 3)])
def test_many_sets_at_once_equal_one_by_one(G, S, words, longest):
    texts = random_texts(G * S, words, longest, seed=G)
    sets, V = [texts[g * S : (g + 1) * S] for g in range(G)], 12
    result = ngram_diversity(sets, V)
    assert list(result)[:2] == ["length", "distinct_1"] and len(result) == 13

    def metric(name, part):
        if name == "length":
            return sum(len(text.split()) for text in part) / max(len(part), 1)
        kind, _, n = name.partition("_")
        if not n:
            return sum(metric(f"{kind}_{n}", part) for n in range(1, 6)) / 5
        N, C = counts_by_hand(part, int(n))
        return 0 if C == 0 else N / C if kind == "distinct" else N / (V ** int(n) * (1 - (1 - V ** -int(n)) ** C))

    for name, (values, left_out) in result.items():
        assert values == pytest.approx([metric(name, part) for part in sets], rel=1e-5), name
        without = [np.mean([metric(name, part[:s] + part[s + 1 :]) for part in sets]) for s in range(S)]
        assert left_out == pytest.approx(without, rel=1e-5), name
    n = 3
    assert result["distinct_3"][0] == pytest.approx([distinct_n(part, n) for part in sets], rel=1e-12)
    assert result["ead_3"][0] == pytest.approx([ead(part, n, V) for part in sets], rel=1e-12)


def test_sets_of_unequal_size_and_empty_ones():
    for wrong in ([["a"], ["a", "b"]], [[]]):
        with pytest.raises(ValueError, match="they must be of one size, and not empty"):
            ngram_diversity(wrong, 5)
    with pytest.raises(ValueError, match="a vocabulary of 2, but there are 3"):
        ngram_diversity([["a b"], ["c"]], 2)
    nothing = ngram_diversity([["", ""], ["", ""]], 1)
    assert all((values == 0).all() and (left_out == 0).all() for values, left_out in nothing.values())


# ---------------------------------------------------------------------------------------------------------------------- embeddings


def diversity_by_pairs(x):
    pairs = [sum(a * b for a, b in zip(u, v)) / math.hypot(*u) / math.hypot(*v) for u, v in itertools.combinations(x.tolist(), 2)]
    return 1 - sum(pairs) / len(pairs)


@pytest.mark.parametrize("N, D", [(2, 3), (5, 4), (9, 2)])
def test_pairwise_diversity_by_pairs(N, D):
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(N)).double() * torch.arange(1, N + 1)[:, None]
    assert pairwise_diversity(x) == pytest.approx(diversity_by_pairs(x), abs=1e-12)
    assert pairwise_diversity(x.float()) == pytest.approx(diversity_by_pairs(x), abs=1e-6)
    assert pairwise_diversity(x[:1].repeat(N, 1)) == pytest.approx(0, abs=1e-12)
    assert pairwise_diversity(torch.stack([x[0], -x[0]])) == pytest.approx(2) and pairwise_diversity(torch.eye(4)) == pytest.approx(1)


def test_embeddings_without_each_text():
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    values, left_out = embedding_diversity(x)
    assert values == pytest.approx([diversity_by_pairs(part) for part in x], abs=1e-6)
    without = [np.mean([diversity_by_pairs(torch.cat([part[:s], part[s + 1 :]])) for part in x]) for s in range(5)]
    assert left_out == pytest.approx(without, abs=1e-6)
    assert np.isfinite(np.concatenate(embedding_diversity(x[:, :2]))).all()  # two texts, of which one is left


def test_embeddings_that_have_no_direction():
    for wrong in (torch.randn(1, 4), torch.randn(4), torch.randn(2, 3, 4)):
        with pytest.raises(ValueError, match="at least two texts"):
            pairwise_diversity(wrong)
    for bad in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="zero or not finite"):
            pairwise_diversity(torch.tensor([[1.0, 2.0], [bad, 0.0]]))


# ----------------------------------------------------------------------------------------------------------------------------- NLI


def test_nli_scores():
    probs = [[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.1, 0.3, 0.6]]  # contradiction, neutral, entailment
    assert nli_scores(torch.tensor(probs)).tolist() == pytest.approx([0.7, 0, -0.6])
    assert nli_scores(torch.tensor([probs, probs])).shape == (2, 3)


@pytest.mark.parametrize("n, most", [(6, 3), (6, 5), (6, 9), (2, 4), (1, 4)])
def test_partners(n, most):
    found = draw_partners(n, most, seed=3)
    R = min(most, n - 1)
    assert found.shape == (n, R)
    pairs = [(i, j) for i in range(n) for j in found[i]]
    assert len(set(pairs)) == n * R and all(i != j for i, j in pairs)  # ordered pairs, none twice
    assert set(Counter(j for _, j in pairs).values()) <= {R}  # a text is as often a hypothesis as a premise
    if most >= n - 1:
        assert set(pairs) == set(itertools.permutations(range(n), 2))
    assert (found == draw_partners(n, most, seed=3)).all() and (n < 3 or any((found != draw_partners(n, most, seed)).any() for seed in range(5)))


@pytest.mark.parametrize("n, most", [(5, 4), (6, 2), (7, 3)])
def test_nli_diversity_by_pairs(n, most):
    full = np.random.default_rng(n).uniform(-1, 1, (3, n, n))  # the score of every ordered pair; the diagonal is never read
    partner = draw_partners(n, most)
    values, left_out = nli_diversity(np.stack([part[np.arange(n)[:, None], partner] for part in full]), partner)
    pairs = [(i, j) for i in range(n) for j in partner[i]]
    assert values == pytest.approx([np.mean([part[i, j] for i, j in pairs]) for part in full])
    if most == n - 1:
        assert values == pytest.approx([(part.sum() - np.trace(part)) / (n * (n - 1)) for part in full])
    assert left_out == pytest.approx([np.mean([part[i, j] for part in full for i, j in pairs if s not in (i, j)]) for s in range(n)])


def test_sentences():
    text = "It rained. We stayed in! Why?\nNo. 3.5 stars "
    assert split_sentences(text, 0) == split_sentences(text, 5) == ["It rained.", "We stayed in!", "Why?", "No.", "3.5 stars"]
    assert split_sentences("the room was bright . it was big .", 0) == ["the room was bright .", "it was big ."]
    assert split_sentences("", 2) == split_sentences(" \n ", 2) == [""]
    draws = {tuple(split_sentences(text, 2, seed)) for seed in range(200)}
    assert draws == set(itertools.combinations(split_sentences(text, 0), 2))  # whole sentences, in order, each choice
    assert split_sentences(text, 2, 7) == split_sentences(text, 2, 7)


# ----------------------------------------------------------------------------------------------------------------------- protocols


def test_spreads():
    values = np.array([0.2, 0.9, 0.4, 0.4])
    over = spread_over_inputs(values)
    assert over[:2] == pytest.approx((0.475, values.std(ddof=1)))
    draws = np.random.default_rng(0).choice(values, (20_000, 4)).mean(1)
    assert over.interval == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.03)
    assert spread_over_inputs(values[:2]).interval is None and spread_over_inputs(values[:1]) == (0.2, 0.0, None)
    across = spread_across_inputs(values, np.array([0.5, 0.45, 0.46]))
    se = math.sqrt(2 / 3 * sum((x - 0.47) ** 2 for x in (0.5, 0.45, 0.46)))
    assert across[:2] == pytest.approx((0.475, values.std(ddof=1)))
    assert across.interval == pytest.approx((0.475 - 4.302653 * se, 0.475 + 4.302653 * se), abs=1e-5)
    assert spread_across_inputs(values[:1], np.array([0.5, 0.5])) == (0.2, 0.0, None)
    assert jackknife_se([3.0, 5.0, 10.0]) == pytest.approx(np.std([3.0, 5.0, 10.0], ddof=1) * 2 / 3**0.5)


@pytest.mark.parametrize("metric", ["ead", "embedding", "nli"])
def test_the_jackknife_sees_how_much_the_figure_varies(metric):
    """Over many data sets drawn anew the figure's standard deviation is what the jackknife says from each one (it errs upward)."""
    rng, P, K, means, errors = np.random.default_rng(0), 30, 3, [], []
    partner = draw_partners(P, 10)
    for _ in range(300):
        topic = rng.integers(5, size=P)  # what the outputs to one prompt have in common
        if metric == "ead":
            words = topic[:, None, None] * 4 + rng.integers(12, size=(P, K, 8))
            values, left_out = ngram_diversity(words.swapaxes(0, 1).tolist(), 40, 2)["ead"]
        elif metric == "embedding":
            values, left_out = embedding_diversity((np.eye(5)[topic][:, None] + rng.normal(size=(P, K, 5))).swapaxes(0, 1))
        else:
            place = topic[:, None] + 0.5 * rng.normal(size=(P, K))  # scores of pairs that share texts are not independent
            values, left_out = nli_diversity(np.tanh(place.T[:, :, None] - place.T[:, partner]) ** 2, partner)
        means.append(values.mean())
        errors.append(jackknife_se(left_out))
    assert 0.95 < np.mean(errors) / np.std(means) < 1.25


def test_simulated_best_of_n():
    scores = np.array([[3.0, 1, 7, 7, 5], [0, 0, 0, 0, 0]])
    chosen = simulated_best_of_n(scores, 2, repeats=6000)
    assert chosen.shape == (2, 6000)
    pairs = list(itertools.combinations(range(5), 2))
    for row, places in zip(scores, chosen):
        best = [max(pair, key=lambda i: (row[i], -i)) for pair in pairs]  # ties: the first
        assert np.bincount(places, minlength=5) / 6000 == pytest.approx(np.bincount(best, minlength=5) / 10, abs=0.03)
        assert set(places) == set(best)
    assert (simulated_best_of_n(scores, 1, 50) == simulated_best_of_n(scores, 1, 50)).all()
    assert set(simulated_best_of_n(scores, 4)[0].tolist()) == {2, 3} and simulated_best_of_n(scores, 4).shape == (2, 32)
    for wrong, n in ((scores, 5), (scores, 0), (scores[0], 2), (scores * np.nan, 2)):
        with pytest.raises(ValueError, match="more than|finite"):
            simulated_best_of_n(wrong, n)

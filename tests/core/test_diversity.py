"""nanorlhf.diversity against loops over pairs and n-grams, leaving texts out one by one, and
simulation.

    P prompts, K outputs to each; G sets of S texts, D hidden, R partners of a text
"""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from checks import refuses

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


def leave_out(texts, i):
    """A list without its i-th element."""
    return texts[:i] + texts[i + 1 :]


# ---------------------------------------------------------------------------------------- n-grams

# 4, 3, 0, 1 and 5 words, of which 5 are different.
TEXTS = ["a b a b", "a b c", "", "d", "c d e a b"]


def test_distinct_n_by_hand():
    # a b c d e, of 13 words.
    assert distinct_n(TEXTS, 1) == 5 / 13
    # Of ab ba ab | ab bc | cd de ea ab there are ab ba bc cd de ea.
    assert distinct_n(TEXTS, 2) == 6 / 9
    assert distinct_n(["happy happy happy happy"], 2) == 1 / 3


def test_distinct_n_of_no_ngram_is_0():
    assert distinct_n(["x"], 2) == 0
    assert distinct_n([], 1) == 0


def test_distinct_n_of_token_ids():
    # Of 78 87 | 87 there are 78 and 87.
    assert distinct_n([[7, 8, 7], [8, 7]], 2) == 2 / 3


@pytest.mark.parametrize("n", [1, 2])
def test_standard_error_against_leaving_out_one_by_one(n):
    """The jackknife: sqrt(4/5 sum (x_i - mean)^2), x_i the figure without text i."""
    figures = [distinct_n(leave_out(TEXTS, i), n) for i in range(5)]
    mean = sum(figures) / 5
    squares = sum((x - mean) ** 2 for x in figures)
    expected = (4 / 5 * squares) ** 0.5
    assert distinct_n_se(TEXTS, n) == pytest.approx(expected)


@pytest.mark.parametrize("texts", [[], ["", ""], ["a a"]], ids=str)
@pytest.mark.parametrize("n", [1, 2])
def test_standard_error_of_what_cannot_vary_is_0(texts, n):
    assert distinct_n_se(texts, n) == 0


def ead_by_hand(N, C, U):
    """Distinct n-grams N over how many C uniform draws from U would show: U (1 - (1 - 1/U)^C)."""
    expected = U * (1 - (1 - 1 / U) ** C)
    return N / expected


def test_ead_by_hand():
    """There are 5 different words among 13, and 6 different bigrams among 9."""
    assert ead(TEXTS, 1) == pytest.approx(ead_by_hand(5, 13, U=5))  # the words of the texts
    assert ead(TEXTS, 1, vocab_size=7) == pytest.approx(ead_by_hand(5, 13, U=7))
    assert ead(TEXTS, 2, vocab_size=7) == pytest.approx(ead_by_hand(6, 9, U=7**2))


def test_ead_as_its_authors_count_has_one_vocabulary_for_every_n():
    found = ead(TEXTS, 2, vocab_size=7, reference=True)
    assert found == pytest.approx(ead_by_hand(6, 9, U=7))


def test_ead_as_its_authors_count_may_be_above_1():
    one_order = [[1, 2, 3, 4]] * 20
    all_orders = [[4, 3, 2, 1, 3, 1, 4, 2, 4]] * 20
    assert ead(one_order + all_orders, 2, 4, reference=True) > 1
    assert ead(one_order, 2, 4) <= 1


def test_ead_of_no_ngram_is_0():
    assert ead(["a b"], 3) == 0
    assert ead([], 1) == 0
    assert ead([""], 1) == 0


def test_ead_of_a_single_word_is_1():
    """It is all that there is."""
    assert ead(["a a a"], 1) == 1
    assert ead(["a a a"], 2) == 1


def test_ead_of_an_endless_vocabulary_is_distinct_n():
    assert ead(TEXTS, 5, vocab_size=10**9) == 1
    # 400 words hold the same 300-gram 101 times.
    text = "a " * 400
    assert ead([text], 300, 10**6) == pytest.approx(1 / 101)


@pytest.mark.parametrize("vocab_size", [4, 0])
def test_a_vocabulary_smaller_than_the_words_that_are_there(vocab_size):
    with refuses(f"a vocabulary of {vocab_size}, but there are 5 different"):
        ead(TEXTS, 1, vocab_size=vocab_size)


UNIFORM = [(5, 3, 4, 1), (20, 16, 12, 1), (20, 16, 12, 2), (7, 10, 30, 3), (300, 16, 40, 2)]


@pytest.mark.parametrize("V, n_texts, length, n", UNIFORM)
def test_ead_of_uniform_tokens_is_one(V, n_texts, length, n):
    """Within four standard errors, and 0.005: overlapping n-grams are not quite independent."""
    rng = np.random.default_rng(0)
    values = []
    for _ in range(400):
        texts = rng.integers(V, size=(n_texts, length)).tolist()
        values.append(ead(texts, n, vocab_size=V))
    standard_error = np.std(values) / 20
    assert np.mean(values) == pytest.approx(1, abs=4 * standard_error + 5e-3)
    assert np.std(values) > 1e-4


def count_by_hand(texts, n):
    """How many different n-grams there are, and how many in all, by strings and positions."""
    ngrams = Counter()
    for text in texts:
        words = text.split()
        for i in range(len(words) - n + 1):
            ngrams["|".join(words[i : i + n])] += 1
    return len(ngrams), sum(ngrams.values())


VOCAB_SIZE = 12


def metric_by_hand(name, texts):
    """One figure of a set of texts: "length", "distinct_3", "ead_3", or a mean over n, "ead"."""
    if name == "length":
        n_words = sum(len(text.split()) for text in texts)
        return n_words / max(len(texts), 1)
    kind, _, n = name.partition("_")
    if not n:
        figures = [metric_by_hand(f"{kind}_{n}", texts) for n in range(1, 6)]
        return sum(figures) / 5
    N, C = count_by_hand(texts, int(n))
    if C == 0:
        return 0
    if kind == "distinct":
        return N / C
    return ead_by_hand(N, C, U=VOCAB_SIZE ** int(n))


def random_sets(G, S, words, longest):
    """G sets of S texts of up to `longest` words."""
    chance = random.Random(G)
    texts = []
    for _ in range(G * S):
        length = chance.randint(0, longest)
        texts.append(" ".join(chance.choice(words) for _ in range(length)))
    return [texts[i : i + S] for i in range(0, G * S, S)]


SETS = [(4, 5, "abc", 7), (3, 1, "ab", 9), (1, 6, "abcdefgh", 12), (6, 2, "a", 3)]


@pytest.mark.parametrize("G, S, words, longest", SETS)
def test_many_sets_at_once_equal_one_by_one(G, S, words, longest):
    sets = random_sets(G, S, words, longest)
    result = ngram_diversity(sets, VOCAB_SIZE)
    assert list(result)[:2] == ["length", "distinct_1"]
    assert len(result) == 13
    for name, (values, left_out) in result.items():
        expected = [metric_by_hand(name, texts) for texts in sets]
        assert values == pytest.approx(expected, rel=1e-5), name
        # The mean over sets, each without its text s.
        expected = []
        for s in range(S):
            without = [metric_by_hand(name, leave_out(texts, s)) for texts in sets]
            expected.append(np.mean(without))
        assert left_out == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("G, S, words, longest", SETS)
def test_many_sets_at_once_equal_distinct_n_and_ead(G, S, words, longest):
    sets = random_sets(G, S, words, longest)
    result = ngram_diversity(sets, VOCAB_SIZE)
    distinct, _ = result["distinct_3"]
    expected = [distinct_n(texts, 3) for texts in sets]
    assert distinct == pytest.approx(expected, rel=1e-12)
    adjusted, _ = result["ead_3"]
    expected = [ead(texts, 3, VOCAB_SIZE) for texts in sets]
    assert adjusted == pytest.approx(expected, rel=1e-12)


def test_sets_of_unequal_size_and_empty_ones():
    with refuses("they must be of one size, and not empty"):
        ngram_diversity([["a"], ["a", "b"]], 5)
    with refuses("they must be of one size, and not empty"):
        ngram_diversity([[]], 5)


def test_sets_with_more_words_than_the_vocabulary():
    with refuses("a vocabulary of 2, but there are 3"):
        ngram_diversity([["a b"], ["c"]], 2)


def test_sets_of_empty_texts_are_not_diverse():
    result = ngram_diversity([["", ""], ["", ""]], 1)
    for values, left_out in result.values():
        assert (values == 0).all()
        assert (left_out == 0).all()


# ------------------------------------------------------------------------------------- embeddings


def cosine_by_hand(u, v):
    dot = sum(a * b for a, b in zip(u, v))
    return dot / math.hypot(*u) / math.hypot(*v)


def diversity_by_pairs(x):
    """1 - the mean cosine of all pairs: [N, D] -> a float."""
    cosines = []
    for u, v in itertools.combinations(x.tolist(), 2):
        cosines.append(cosine_by_hand(u, v))
    return 1 - sum(cosines) / len(cosines)


@pytest.mark.parametrize("N, D", [(2, 3), (5, 4), (9, 2)])
def test_pairwise_diversity_by_pairs(N, D):
    generator = torch.Generator().manual_seed(N)
    lengths = torch.arange(1, N + 1)[:, None]
    x = torch.randn(N, D, generator=generator).double() * lengths
    expected = diversity_by_pairs(x)
    assert pairwise_diversity(x) == pytest.approx(expected, abs=1e-12)
    # Embeddings in float32 lose no further digits.
    rounded = x.float()
    assert pairwise_diversity(rounded) == pytest.approx(diversity_by_pairs(rounded), abs=1e-12)

    all_the_same = x[:1].repeat(N, 1)
    assert pairwise_diversity(all_the_same) == pytest.approx(0, abs=1e-12)
    opposites = torch.stack([x[0], -x[0]])
    assert pairwise_diversity(opposites) == pytest.approx(2)


def test_pairwise_diversity_of_orthogonal_embeddings_is_1():
    assert pairwise_diversity(torch.eye(4)) == pytest.approx(1)


def three_sets_of_embeddings():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 5, 4, generator=generator) + 0.5


def test_embeddings_without_each_text():
    x = three_sets_of_embeddings()
    values, left_out = embedding_diversity(x)
    assert values == pytest.approx([diversity_by_pairs(part) for part in x], abs=1e-6)
    expected = []
    for s in range(5):
        others = [i for i in range(5) if i != s]
        without = [diversity_by_pairs(part[others]) for part in x]
        expected.append(np.mean(without))
    assert left_out == pytest.approx(expected, abs=1e-6)


def test_embeddings_of_two_texts_of_which_one_is_left():
    two_texts = three_sets_of_embeddings()[:, :2]
    values, left_out = embedding_diversity(two_texts)
    assert np.isfinite(values).all()
    assert np.isfinite(left_out).all()


@pytest.mark.parametrize("shape", [(1, 4), (4,), (2, 3, 4)], ids=str)
def test_pairwise_diversity_needs_two_texts(shape):
    with refuses("at least two texts"):
        pairwise_diversity(torch.randn(shape))


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_embeddings_that_have_no_direction(bad):
    with refuses("zero or not finite"):
        pairwise_diversity(torch.tensor([[1.0, 2.0], [bad, 0.0]]))


# -------------------------------------------------------------------------------------------- NLI

# The chances of contradiction, neutral and entailment. The score is the largest of the three, with
# the sign +, 0 or -.
PROBS = [[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.1, 0.3, 0.6]]


def test_nli_scores_by_hand():
    assert nli_scores(torch.tensor(PROBS)).tolist() == pytest.approx([0.7, 0, -0.6])


def test_nli_scores_of_several_pairs():
    assert nli_scores(torch.tensor([PROBS, PROBS])).shape == (2, 3)


def pairs_of(partners):
    """All (premise, hypothesis) of a table [n, R] of partners."""
    pairs = []
    for i, row in enumerate(partners.tolist()):
        for j in row:
            pairs.append((i, j))
    return pairs


SOME_OR_ALL = [(6, 3), (6, 5), (6, 9), (2, 4), (1, 4)]


@pytest.mark.parametrize("n, most", SOME_OR_ALL)
def test_partners_are_ordered_pairs_none_twice(n, most):
    R = min(most, n - 1)
    partners = draw_partners(n, most, seed=3)
    assert partners.shape == (n, R)
    pairs = pairs_of(partners)
    assert len(set(pairs)) == n * R
    # A text is as often a hypothesis as a premise, and never its own partner.
    hypotheses = Counter(j for _, j in pairs)
    assert set(hypotheses.values()) <= {R}
    for i, j in pairs:
        assert i != j


@pytest.mark.parametrize("n, most", [(6, 5), (6, 9), (2, 4), (1, 4)])
def test_where_there_is_room_all_pairs_are_drawn(n, most):
    pairs = pairs_of(draw_partners(n, most, seed=3))
    assert set(pairs) == set(itertools.permutations(range(n), 2))


@pytest.mark.parametrize("n, most", SOME_OR_ALL)
def test_partners_are_drawn_by_the_seed(n, most):
    partners = draw_partners(n, most, seed=3)
    assert (partners == draw_partners(n, most, seed=3)).all()
    others = [draw_partners(n, most, seed) for seed in range(5)]
    # Of one text or two there is nothing to choose.
    assert n < 3 or any((partners != other).any() for other in others)


def mean_over_pairs(scores, pairs):
    """The mean over sets and pairs: scores [G, n, n]."""
    numbers = []
    for part in scores:
        for i, j in pairs:
            numbers.append(part[i, j])
    return np.mean(numbers)


def nli_example(n):
    """Three sets: the score of every ordered pair, [3, n, n]. The diagonal is never read."""
    return np.random.default_rng(n).uniform(-1, 1, (3, n, n))


@pytest.mark.parametrize("n, most", [(5, 4), (6, 2), (7, 3)])
def test_nli_diversity_by_pairs(n, most):
    scores = nli_example(n)
    partners = draw_partners(n, most)
    pairs = pairs_of(partners)
    premises = np.arange(n)[:, None]
    values, left_out = nli_diversity(scores[:, premises, partners], partners)

    expected = [mean_over_pairs([part], pairs) for part in scores]
    assert values == pytest.approx(expected)
    expected = []
    for s in range(n):
        without = [pair for pair in pairs if s not in pair]
        expected.append(mean_over_pairs(scores, without))
    assert left_out == pytest.approx(expected)


def test_nli_diversity_over_all_pairs_is_the_mean_off_the_diagonal():
    scores = nli_example(5)
    partners = draw_partners(5, 4)
    premises = np.arange(5)[:, None]
    values, _ = nli_diversity(scores[:, premises, partners], partners)
    expected = []
    for part in scores:
        off_diagonal = part.sum() - np.trace(part)
        expected.append(off_diagonal / (5 * 4))
    assert values == pytest.approx(expected)


TEXT = "It rained. We stayed in! Why?\nNo. 3.5 stars "
SENTENCES = ["It rained.", "We stayed in!", "Why?", "No.", "3.5 stars"]


def test_a_text_is_cut_after_marks_and_at_line_ends():
    assert split_sentences(TEXT, 0) == SENTENCES
    assert split_sentences(TEXT, 5) == SENTENCES
    words = split_sentences("the room was bright . it was big .", 0)
    assert words == ["the room was bright .", "it was big ."]


@pytest.mark.parametrize("text", ["", " \n "])
def test_an_empty_text_is_one_empty_sentence(text):
    assert split_sentences(text, 2) == [""]


def test_sentences_are_drawn_whole_and_in_order():
    """Every choice of two of five comes up, and nothing else."""
    draws = {tuple(split_sentences(TEXT, 2, seed)) for seed in range(200)}
    assert draws == set(itertools.combinations(SENTENCES, 2))
    assert split_sentences(TEXT, 2, 7) == split_sentences(TEXT, 2, 7)


# -------------------------------------------------------------------------------------- protocols

VALUES = np.array([0.2, 0.9, 0.4, 0.4])  # of mean 0.475


def test_the_spread_over_inputs_is_the_bootstraps():
    over = spread_over_inputs(VALUES)
    assert over[:2] == pytest.approx((0.475, VALUES.std(ddof=1)))
    draws = np.random.default_rng(0).choice(VALUES, (20_000, 4))
    interval = np.quantile(draws.mean(1), [0.025, 0.975])
    assert over.interval == pytest.approx(interval, abs=0.03)


def test_few_inputs_have_no_interval():
    two = spread_over_inputs(VALUES[:2])
    assert two == (pytest.approx(0.55), pytest.approx(0.7 / 2**0.5), None)
    assert spread_over_inputs(VALUES[:1]) == (0.2, 0.0, None)


def test_the_spread_across_inputs_is_the_jackknifes():
    """With the figures left out, of mean 0.47: Student's t for 2 degrees of freedom is 4.302653."""
    left_out = np.array([0.5, 0.45, 0.46])
    squares = sum((x - 0.47) ** 2 for x in left_out)
    half = 4.302653 * math.sqrt(2 / 3 * squares)
    across = spread_across_inputs(VALUES, left_out)
    assert across[:2] == pytest.approx((0.475, VALUES.std(ddof=1)))
    assert across.interval == pytest.approx((0.475 - half, 0.475 + half), abs=1e-5)


def test_few_inputs_have_no_interval_across_inputs():
    two = spread_across_inputs(VALUES[:2], np.array([0.5, 0.6]))
    assert two == (pytest.approx(0.55), pytest.approx(0.7 / 2**0.5), None)


def test_a_single_set_has_no_spread_across_inputs():
    assert spread_across_inputs(VALUES[:1], np.array([0.5, 0.5])) == (0.2, 0.0, None)


def test_jackknife_of_numbers():
    """sqrt(2/3 sum of squares): the std (ddof 1) times 2 / sqrt(3)."""
    figures = [3.0, 5.0, 10.0]
    expected = np.std(figures, ddof=1) * 2 / 3**0.5
    assert jackknife_se(figures) == pytest.approx(expected)


P, K = 30, 3
PARTNERS = draw_partners(P, 10)


def draw_ead(rng, topic):
    """Sets of words; a topic has 12 words, some of which other topics have too."""
    first_word = topic[:, None, None] * 4
    words = first_word + rng.integers(12, size=(P, K, 8))
    return ngram_diversity(words.swapaxes(0, 1).tolist(), 40, 2)["ead"]


def draw_embedding(rng, topic):
    """Embeddings around the topic's axis."""
    axes = np.eye(5)[topic]  # [P, 5]
    x = axes[:, None] + rng.normal(size=(P, K, 5))
    return embedding_diversity(x.swapaxes(0, 1))


def draw_nli(rng, topic):
    """Scores that grow with the distance of two texts: pairs that share one are not independent."""
    place = (topic[:, None] + 0.5 * rng.normal(size=(P, K))).T  # [K, P]
    distance = place[:, :, None] - place[:, PARTNERS]
    return nli_diversity(np.tanh(distance) ** 2, PARTNERS)


@pytest.mark.parametrize("draw", [draw_ead, draw_embedding, draw_nli])
def test_the_jackknife_sees_how_much_the_figure_varies(draw):
    """Over many data sets the figure's standard deviation is what the jackknife says from each.

    It errs upward.
    """
    rng = np.random.default_rng(0)
    means = []
    errors = []
    for _ in range(300):
        topic = rng.integers(5, size=P)  # what the outputs to one prompt have in common
        values, left_out = draw(rng, topic)
        means.append(values.mean())
        errors.append(jackknife_se(left_out))
    assert 0.95 < np.mean(errors) / np.std(means) < 1.25


# Of two prompts: different scores, two of which tie at the top; and nothing but ties.
SCORES = np.array([[3.0, 1, 7, 7, 5], [0, 0, 0, 0, 0]])


def best_of_all_pairs(row):
    """The better answer of each pair of five, the first one of a tie."""
    best = []
    for i, j in itertools.combinations(range(5), 2):
        best.append(i if row[i] >= row[j] else j)
    return best


def test_simulated_best_of_n_chooses_as_often_as_all_pairs_do():
    chosen = simulated_best_of_n(SCORES, 2, repeats=6000)
    assert chosen.shape == (2, 6000)
    for row, places in zip(SCORES, chosen):
        best = best_of_all_pairs(row)
        expected = np.bincount(best, minlength=5) / 10
        shares = np.bincount(places, minlength=5) / 6000
        assert shares == pytest.approx(expected, abs=0.03)
        assert set(places) == set(best)


def test_simulated_best_of_n_is_deterministic():
    first = simulated_best_of_n(SCORES, 1, 50)
    assert (first == simulated_best_of_n(SCORES, 1, 50)).all()


def test_of_four_of_five_one_of_the_two_best_is_always_there():
    chosen = simulated_best_of_n(SCORES, 4)
    assert set(chosen[0].tolist()) == {2, 3}
    assert chosen.shape == (2, 32)


def test_n_is_less_than_the_number_of_answers():
    with refuses("more than"):
        simulated_best_of_n(SCORES, 5)
    with refuses("more than"):
        simulated_best_of_n(SCORES, 0)


def test_scores_are_finite_and_a_row_for_each_prompt():
    with refuses("more than|finite"):
        simulated_best_of_n(SCORES[0], 2)
    with refuses("more than|finite"):
        simulated_best_of_n(SCORES * np.nan, 2)

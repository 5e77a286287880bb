"""How different texts are from one another: by n-grams, by sentence embeddings, by an NLI model.

    P prompts, K outputs to each; N texts; G sets of S texts; D hidden, R partners of a text

A text is a string, whose words are separated by white space, or a list of token ids. Two protocols
(Kirk et al. 2024, 2310.06452) look at the same P x K outputs:

    per input       G = P sets of S = K: the metric over the outputs of one prompt;
                    mean and std over the prompts
    across inputs   G = K sets of S = P: the metric over one output of each prompt;
                    mean over the K choices

Every metric depends on the size of its set, and those of n-grams on the length of the texts:
compare only figures with the same S, and read the lengths beside them. A metric of the G sets comes
with what it would be, on average over the sets, without their s-th texts: [S], of which the
interval over prompts is made (spread_across_inputs).
"""

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .stats import bootstrap, t_quantile

ORDERS = 5  # n-grams of n = 1 .. 5

Text = str | Sequence[int]


class Spread(NamedTuple):
    """A figure of many sets, such as the outputs to each prompt."""

    mean: float
    std: float
    interval: tuple[float, float] | None  # of the mean, 95%, over prompts; None for fewer than 3


# --------------------------------------------------------------------------------------- n-grams


def words_of(text: Text) -> list:
    if isinstance(text, str):
        return text.split()
    return list(text)


def ngrams(text: Text, n: int) -> list[tuple]:
    """The n-grams of a text, in order."""
    # n = 2: [the, room, was] and [room, was] -> (the, room), (room, was). zip ends with the shorter
    # list, since the last word begins no bigram.
    words = words_of(text)
    shifted = [words[i:] for i in range(n)]
    return list(zip(*shifted))


def pooled_ngrams(texts: Sequence[Text], n: int) -> list[tuple]:
    """The n-grams of several texts, one text after another."""
    grams = []
    for text in texts:
        grams += ngrams(text, n)
    return grams


def distinct_n(texts: Sequence[Text], n: int) -> float:
    """Distinct n-grams / all n-grams, pooled over a set of texts. 0 where there is no n-gram.

        distinct_n = N / C

    In [0, 1]. Li et al. 2016, 1510.03055. Pitfall: it falls with the size of the set and with
    length.
    """
    grams = pooled_ngrams(texts, n)
    return len(set(grams)) / max(len(grams), 1)


def distinct_n_se(texts: Sequence[Text], n: int) -> float:
    """The jackknife's standard error of distinct_n over texts: each is left out in turn."""
    if not texts:
        return 0.0
    # Only EAD depends on the vocabulary, so any size that ngram_diversity() accepts will do.
    vocab_size = max(count_vocabulary(texts), 1)
    _, left_out = ngram_diversity([texts], vocab_size, n)[f"distinct_{n}"]
    return jackknife_se(left_out)


def count_vocabulary(texts: Sequence[Text]) -> int:
    """How many different words (or ids) there are in a list of texts."""
    words = set()
    for text in texts:
        words.update(words_of(text))
    return len(words)


def ead(
    texts: Sequence[Text], n: int, vocab_size: int | None = None, reference: bool = False
) -> float:
    """Expectation-adjusted distinct n-grams: how many there are, over how many there would be if
    all were equally likely.

        EAD_n = N / (U (1 - ((U - 1) / U)^C))

    with U = V^n possible n-grams, N distinct and C total ones in all texts together. About 1 for
    uniformly random tokens, 0 where there is no n-gram. vocab_size: V, by default the number of
    different words in `texts`; one V for all that is compared. reference: U = V for every n, as the
    paper's code has it; that passes 1 where V is small. ValueError: a V smaller than the words that
    are there. Liu et al. 2022, 2202.13587.
    Pitfall: language is far from uniform, so EAD still falls with the number of tokens, only less
    than distinct-n.
    """
    n_words = count_vocabulary(texts)
    check_vocabulary(n_words, vocab_size)
    grams = pooled_ngrams(texts, n)
    exponent = 1 if reference else n  # U = V^exponent
    return adjust(len(set(grams)), len(grams), vocab_size or n_words, exponent).item()


def check_vocabulary(n_words: int, vocab_size: int | None):
    """ValueError where texts hold more different words than the vocabulary is said to have."""
    if vocab_size is not None and vocab_size < max(n_words, 1):
        raise ValueError(
            f"a vocabulary of {vocab_size}, but there are {n_words} different words (or ids) in "
            "the texts"
        )


def adjust(distinct, total, vocab_size: int, n: int) -> np.ndarray:
    """N / (U (1 - (1 - 1/U)^C)), 0 where C = 0: N, C (numbers or arrays) -> an array.

    U = V^n may be far above what float64 tells from U - 1.
    """
    U = float(min(vocab_size**n, 10**300))  # float() refuses numbers above about 10^308
    # 1 - (1 - 1/U)^C = -expm1(C log1p(-1/U)), which keeps its digits where 1/U is tiny. U = 1 takes
    # log 0, and C = 0 divides 0 by 0: both are meant.
    with np.errstate(divide="ignore", invalid="ignore"):
        if U:
            expected = -U * np.expm1(np.multiply(total, np.log1p(-1 / U)))
        else:
            expected = np.zeros_like(total)
        return np.where(np.equal(total, 0), 0.0, np.divide(distinct, expected))


def ngram_diversity(
    sets: Sequence[Sequence[Text]], vocab_size: int, orders: int = ORDERS
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """distinct-n, EAD_n and lengths of many sets of equally many texts, at once.

    sets: G lists of S texts -> {name: (values [G], without each text [S])}. The names are
    distinct_1 .. distinct_{orders}, ead_1 ..., their means over n, "distinct" and "ead", and
    "length", the mean number of tokens. ValueError: sets of unequal size, too small a vocabulary.
    """
    S = len(sets[0])
    if not S or any(len(texts) != S for texts in sets):
        sizes = sorted({len(texts) for texts in sets})
        raise ValueError(f"sets of {sizes} texts: they must be of one size, and not empty")
    all_texts = []
    for texts in sets:
        all_texts += texts
    check_vocabulary(count_vocabulary(all_texts), vocab_size)

    values = {}  # {name: [G]}
    left_out = {}  # {name: [G, S] without each text; length: [S]}
    for n in range(1, orders + 1):
        distinct, total, lonely = count_ngrams(sets, n)
        # Leaving out a text takes all its n-grams from the total, but from the distinct ones only
        # those that no other text has.
        C = total.sum(1)  # [G]
        C_without = C[:, None] - total  # [G, S]
        distinct_without = distinct[:, None] - lonely  # [G, S]
        # 1-grams are tokens, so their number is the length.
        if n == 1:
            values["length"] = total.mean(1)
            # max: without a set's only text there are 0 tokens, which are divided by 1.
            left_out["length"] = C_without.mean(0) / max(S - 1, 1)
        values[f"distinct_{n}"] = distinct / np.maximum(C, 1)
        left_out[f"distinct_{n}"] = distinct_without / np.maximum(C_without, 1)
        values[f"ead_{n}"] = adjust(distinct, C, vocab_size, n)
        left_out[f"ead_{n}"] = adjust(distinct_without, C_without, vocab_size, n)

    for name in ("distinct", "ead"):
        names = [f"{name}_{n}" for n in range(1, orders + 1)]
        values[name] = sum(values[part] for part in names) / orders
        left_out[name] = sum(left_out[part] for part in names) / orders

    table = {}
    for name, without in left_out.items():
        if name != "length":
            without = without.mean(0)  # over the sets
        table[name] = (values[name], without)
    return table


def count_ngrams(
    sets: Sequence[Sequence[Text]], n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count the n-grams of G sets of S texts.

    -> distinct n-grams of each set [G]; all n-grams of each text [G, S]; the distinct ones of each
    text that no other text of its set has [G, S].
    """
    G = len(sets)
    S = len(sets[0])
    distinct = np.zeros(G, dtype=np.int64)
    total = np.zeros((G, S), dtype=np.int64)
    lonely = np.zeros((G, S), dtype=np.int64)
    for g, texts in enumerate(sets):
        distinct_of_texts = []
        n_texts = Counter()  # {n-gram: how many texts of the set have it}
        for s, text in enumerate(texts):
            grams = ngrams(text, n)
            total[g, s] = len(grams)
            distinct_of_texts.append(set(grams))
            n_texts.update(distinct_of_texts[s])
        distinct[g] = len(n_texts)
        in_one_text = {gram for gram, count in n_texts.items() if count == 1}
        for s, grams in enumerate(distinct_of_texts):
            lonely[g, s] = len(grams & in_one_text)
    return distinct, total, lonely


# ------------------------------------------------------------------------------------ embeddings


def pairwise_diversity(embeddings) -> float:
    """1 - the mean cosine over unordered pairs of texts.

        1 - 2 / (N (N - 1)) sum_{i<j} u_i . u_j
          = 1 - (|sum_i u_i|^2 - N) / (N (N - 1)),    u = x / |x|

    embeddings [N, D], any float dtype -> float in [0, N / (N - 1)], 0 for texts that are all alike.
    ValueError: fewer than two texts, an embedding that is zero or not finite. Reimers & Gurevych
    2019, 1908.10084.
    """
    embeddings = torch.as_tensor(embeddings)
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(
            "pairwise_diversity needs embeddings [N, D] of at least two texts, "
            f"not {list(embeddings.shape)}"
        )
    values, _ = embedding_diversity(embeddings[None])
    return values[0].item()


def embedding_diversity(embeddings) -> tuple[np.ndarray, np.ndarray]:
    """pairwise_diversity of many sets: [G, S, D], S at least 2.

    -> values [G], without each text [S], both float64.
    """
    x = torch.as_tensor(embeddings).detach().cpu().double()
    norm = x.norm(dim=-1, keepdim=True)  # [G, S, 1]
    if not (norm.isfinite() & (norm > 0)).all():
        raise ValueError("an embedding that is zero or not finite has no direction")
    # |sum_i u_i|^2 = S + 2 sum_{i<j} u_i . u_j: all pairs at once, without a matrix of pairs.
    u = x / norm
    S = x.shape[1]
    total = u.sum(1, keepdim=True)  # [G, 1, D]
    values = 1 - (total.square().sum((1, 2)) - S) / (S * (S - 1))  # [G]
    # The same without each text in turn. S - 1 are left; a single one makes no pair, hence max.
    total_without = total - u  # [G, S, D]
    n_pairs_without = max((S - 1) * (S - 2), 1)
    left_out = 1 - (total_without.square().sum(2) - (S - 1)) / n_pairs_without  # [G, S]
    return values.numpy(), left_out.mean(0).numpy()


# ------------------------------------------------------------------------------------------- NLI


def nli_scores(probs) -> torch.Tensor:
    """What an NLI model says of a pair, as a number: its label's sign times its confidence.

        s = +p for contradiction, 0 for neutral, -p for entailment

    p is the largest of the three probabilities. probs [..., 3] in that order -> [...] in [-1, 1].
    Kirk et al. 2024 after Stasaski & Hearst 2022, 2205.01497; higher = more diverse (the paper's
    own code has the other sign).
    """
    # Labels are 0, 1, 2 in that order, so that 1 - label is the sign.
    confidence, label = torch.as_tensor(probs).max(-1)
    return confidence * (1 - label)


def draw_partners(n: int, most: int, seed: int = 0) -> np.ndarray:
    """For each of n texts min(most, n - 1) others to be compared with: places [n, R].

    Each text is in as many pairs as any other. There is one draw for all sets of n: each text meets
    the R that follow it in a random order, around the end.
    """
    # In the order 3 0 2 1 with R = 2 text 3 meets 0 and 2, text 0 meets 2 and 1, text 2 meets 1 and
    # 3, and text 1 meets 3 and 0.
    order = np.random.default_rng([n, seed]).permutation(n)
    following = np.arange(1, min(most, n - 1) + 1)  # [R]
    places = (np.arange(n)[:, None] + following) % n  # [n, R]: in the order, around its end
    partner = np.empty((n, len(following)), dtype=np.int64)
    partner[order] = order[places]
    return partner


def nli_diversity(scores, partner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean score over ordered pairs, premise i and hypothesis partner[i, r].

    scores [G, S, R], partner [S, R] -> values [G], without each text [S]. All ordered pairs where
    R = S - 1, else a sample of them.
    """
    scores = np.asarray(scores, dtype=np.float64)
    S, R = partner.shape
    # The figures without each text are means over sets, so scores may be averaged over sets first.
    mean = scores.mean(0)  # [S, R]
    as_premise = mean.sum(1)  # [S]
    as_hypothesis = np.bincount(partner.ravel(), weights=mean.ravel(), minlength=S)  # [S]
    # Each text is in 2 R of the S R pairs.
    n_pairs_without = max(S * R - 2 * R, 1)
    left_out = (mean.sum() - (as_premise + as_hypothesis)) / n_pairs_without
    return scores.mean((1, 2)), left_out


def split_sentences(text: str, most: int, seed: int = 0) -> list[str]:
    """The sentences of a text; where there are more than `most`, so many of them, in order.

    Cut after . ! or ? before a space, and at line ends. most 0: any number. The draw depends on the
    text and the seed alone: equal texts say the same.
    """
    sentences = []
    for part in re.split(r"(?<=[.!?])\s+|\n", text):
        if part.strip():
            sentences.append(part.strip())
    if not sentences:
        return [""]
    if not most or len(sentences) <= most:
        return sentences
    # hash() of a string differs from process to process; crc32 does not.
    generator = np.random.default_rng([seed, zlib.crc32(text.encode())])
    kept = generator.permutation(len(sentences))[:most]
    return [sentences[i] for i in sorted(kept)]


# ------------------------------------------------------------------------------------- protocols


def spread_over_inputs(values) -> Spread:
    """A metric of each prompt's outputs [P] -> Spread over prompts; a bootstrap's interval."""
    values = torch.as_tensor(np.asarray(values, dtype=np.float64))
    std = 0.0
    if len(values) > 1:
        std = values.std().item()
    interval = None
    if len(values) > 2:
        low, high = bootstrap(values)
        interval = (low.item(), high.item())
    return Spread(values.mean().item(), std, interval)


def spread_across_inputs(values, left_out) -> Spread:
    """A metric of K sets of one output a prompt [K], and without each prompt [P] -> Spread.

    Mean and std are over the choices. Drawing prompts with replacement would put copies into a set,
    and copies are not diverse; so the interval over prompts is the jackknife's, mean +- t se. It
    holds what the choice of outputs adds too: with a prompt all its K outputs are left out. It is
    rather too wide: its se is 10 to 20% above the truth in simulations.
    """
    mean = float(np.mean(values))
    std = 0.0
    if len(values) > 1:
        std = float(np.std(values, ddof=1))
    if len(left_out) < 3:
        return Spread(mean, std, None)
    # From few prompts the standard error itself is uncertain, which Student's t allows for.
    half_width = t_quantile(len(left_out) - 1) * jackknife_se(left_out)
    return Spread(mean, std, (mean - half_width, mean + half_width))


def jackknife_se(left_out) -> float:
    """se = sqrt((S - 1) / S sum_s (v_s - mean v)^2), v_s a statistic without row s.

    left_out [S]. Efron & Stein 1981.
    """
    left_out = np.asarray(left_out, dtype=np.float64)
    return float(((len(left_out) - 1) * left_out.var()) ** 0.5)


def simulated_best_of_n(scores, n: int, repeats: int = 32, seed: int = 0) -> np.ndarray:
    """Best-of-n from a pool: draw n of a prompt's N answers without replacement, keep the best.

    scores [P, N] -> the places of the kept answers, int64 [P, repeats]; of equal scores the first.
    ValueError: N <= n, scores that are not finite. Pitfall: the repeats share a pool, so they meet
    far more often than answers of real best-of-n: they are fit for figures across inputs, but per
    input they look alike (EAD 0.28 for 0.77 at n = 16 and N = 64 of the embedded world).
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not 1 <= n < scores.shape[1]:
        raise ValueError(
            f"the best of {n} needs scores [prompts, answers] of more than {n} answers, "
            f"not {list(scores.shape)}"
        )
    if not np.isfinite(scores).all():
        raise ValueError("simulated_best_of_n: a score that is not finite")
    generator = np.random.default_rng([n, seed])
    chosen = []
    for row in scores:
        # What is drawn are ranks, of which 0 is the best answer: n of the smallest random numbers.
        noise = generator.random((repeats, len(row)))
        drawn_ranks = noise.argpartition(n - 1)[:, :n]  # [repeats, n]
        best_first = np.argsort(-row, kind="stable")
        chosen.append(best_first[drawn_ranks.min(1)])
    return np.stack(chosen)

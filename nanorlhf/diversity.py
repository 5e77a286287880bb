"""How different texts are from one another: by their n-grams, by sentence embeddings, and by an NLI model.

    P prompts, K outputs to each; N texts; G sets of S texts, D hidden, R partners of a text

A text is a string, whose words are separated by white space, or a list of token ids. Two protocols (Kirk et al. 2024, 2310.06452) look
at the same P x K outputs:

    per input       G = P sets of S = K: the metric over the outputs of one prompt; mean and std over the prompts
    across inputs   G = K sets of S = P: the metric over one output of each prompt; mean over the K choices

Every metric depends on the size of its set, and those of n-grams on the length of the texts: compare only figures with the same S,
and read the lengths beside them. A metric of the G sets comes with what it would be, on average over the sets, without their s-th
texts: [S], of which the interval over prompts is made (spread_across).
"""

import re
import zlib
from typing import NamedTuple

import numpy as np
import torch

from .stats import bootstrap, t_quantile

ORDERS = 5  # n-grams of n = 1 .. 5


class Spread(NamedTuple):
    """A figure of many sets: their mean, their standard deviation, and the mean's 95% interval over prompts (None for fewer than 3)."""

    mean: float
    std: float
    interval: tuple | None


# ------------------------------------------------------------------------------------------------------------------------- n-grams


def words_of(text):
    return text.split() if isinstance(text, str) else list(text)


def ngrams(text, n):
    """The n-grams of a text, in order."""
    words = words_of(text)
    return list(zip(*(words[i:] for i in range(n))))


def distinct_n(texts, n):
    """Distinct n-grams / all n-grams, pooled over a set of texts. 0 where there is no n-gram.

        distinct_n = N / C

    list of texts -> float in [0, 1]. Li et al. 2016, 1510.03055. Pitfall: it falls with the size of the set and with length.
    """
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / max(len(grams), 1)


def distinct_n_se(texts, n):
    """The jackknife's standard error of distinct_n over texts: leave each out in turn. list of texts -> float."""
    return jackknife_se(ngram_diversity([texts], max(vocabulary(texts), 1), n)[f"distinct_{n}"][1]) if texts else 0.0


def vocabulary(texts):
    """How many different words (or ids) there are in a list of texts."""
    return len({word for text in texts for word in words_of(text)})


def ead(texts, n, vocab_size=None, reference=False):
    """Expectation-adjusted distinct n-grams: how many there are, over how many there would be if all were equally likely.

        EAD_n = N / (U (1 - ((U - 1) / U)^C)),    U = V^n possible n-grams, N distinct and C total ones in all texts together

    list of texts -> float: about 1 for uniformly random tokens, 0 where there is no n-gram. vocab_size: V, by default the number of
    different words in `texts`; one V for all that is compared. reference: U = V for every n, as the paper's code has it; that passes
    1 where V is small. ValueError: a V smaller than the words that are there. Liu et al. 2022, 2202.13587.
    Pitfall: language is far from uniform, so EAD still falls with the number of tokens, only less than distinct-n.
    """
    found = vocabulary(texts)
    check_vocabulary(found, vocab_size)
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return adjusted(len(set(grams)), len(grams), vocab_size or found, 1 if reference else n).item()


def check_vocabulary(found, vocab_size):
    if vocab_size is not None and vocab_size < max(found, 1):
        raise ValueError(f"a vocabulary of {vocab_size}, but there are {found} different words (or ids) in the texts")


def adjusted(distinct, total, vocab_size, n):
    """N, C (numbers or arrays) -> N / (U (1 - (1 - 1/U)^C)), 0 where C = 0; U = V^n may be far above what float64 tells from U - 1."""
    U = float(min(vocab_size**n, 10**300))
    with np.errstate(divide="ignore", invalid="ignore"):  # U = 1: log 0; C = 0: 0 / 0
        expected = -U * np.expm1(np.multiply(total, np.log1p(-1 / U))) if U else np.zeros_like(total)
        return np.where(np.equal(total, 0), 0.0, np.divide(distinct, expected))


def ngram_diversity(sets, vocab_size, orders=ORDERS):
    """distinct-n, EAD_n and lengths of many sets of equally many texts, at once.

    sets: G lists of S texts -> {name: (values [G], without each text [S])} of distinct_1 .. distinct_{orders}, ead_1 ..., their means
    over n, "distinct" and "ead", and "length", the mean number of tokens. ValueError: sets of unequal size, too small a vocabulary.
    """
    G, S = len(sets), len(sets[0])
    if not S or any(len(texts) != S for texts in sets):
        raise ValueError(f"sets of {sorted({len(texts) for texts in sets})} texts: they must be of one size, and not empty")
    out = {}
    for n, gram, text in numbered_ngrams([text for texts in sets for text in texts], orders, vocab_size):
        distinct, total, lonely = count(gram, text, G, S)
        C = total.sum(1)  # [G]
        if n == 1:
            out["length"] = total.mean(1), (C[:, None] - total).mean(0) / max(S - 1, 1)
        with_all, without = (distinct, C), (distinct[:, None] - lonely, C[:, None] - total)  # [G], [G, S]
        out[f"distinct_{n}"] = [N / np.maximum(C, 1) for N, C in (with_all, without)]
        out[f"ead_{n}"] = [adjusted(N, C, vocab_size, n) for N, C in (with_all, without)]
    for name in ("distinct", "ead"):
        out[name] = [sum(parts) / orders for parts in zip(*(out[f"{name}_{n}"] for n in range(1, orders + 1)))]
    return {name: (values, left_out if left_out.ndim == 1 else left_out.mean(0)) for name, (values, left_out) in out.items()}


def numbered_ngrams(texts, orders, vocab_size):
    """For n = 1 .. orders: n, a number for each n-gram (the same for equal ones), and the place of the text that it stands in."""
    numbers, words = {}, [words_of(text) for text in texts]
    token = np.array([numbers.setdefault(word, len(numbers)) for part in words for word in part], dtype=np.int64)  # [T]
    check_vocabulary(len(numbers), vocab_size)
    text = np.repeat(np.arange(len(texts)), [len(part) for part in words])  # [T]
    gram = token
    for n in range(1, orders + 1):
        if n > 1:  # the (n-1)-gram before, and one token more
            gram = np.unique(gram[:-1] * len(numbers) + token[n - 1 :], return_inverse=True)[1]  # [T - n + 1]
        start = text[: len(gram)]
        whole = start == text[n - 1 :]  # does not reach into the next text
        yield n, gram[whole], start[whole]


def count(gram, text, G, S):
    """-> distinct n-grams of each set [G]; of each text [G, S] all n-grams, and the distinct ones that no other text of its set has."""
    total = np.bincount(text, minlength=G * S).reshape(G, S)
    if not len(gram):
        return total.sum(1), total, total
    group, place = np.divmod(text, S)
    span = gram.max() + 1
    key = np.sort((group * span + gram) * S + place)  # equal n-grams of a set stand side by side (np.unique is ten times as slow)
    key = key[np.diff(key, prepend=-1) > 0]  # each n-gram of each text once
    gram_in_set, place = np.divmod(key, S)
    first = np.flatnonzero(np.diff(gram_in_set, prepend=-1))
    alone = first[np.diff(first, append=len(key)) == 1]
    distinct = np.bincount(gram_in_set[first] // span, minlength=G)
    lonely = np.bincount(gram_in_set[alone] // span * S + place[alone], minlength=G * S)
    return distinct, total, lonely.reshape(G, S)


# ---------------------------------------------------------------------------------------------------------------------- embeddings


def pairwise_diversity(embeddings):
    """1 - the mean cosine over unordered pairs of texts.

        1 - 2 / (N (N - 1)) sum_{i<j} u_i . u_j  =  1 - (|sum_i u_i|^2 - N) / (N (N - 1)),    u = x / |x|

    embeddings [N, D], any float dtype -> float in [0, N / (N - 1)], 0 for texts that are all alike. ValueError: fewer than two texts,
    an embedding that is zero or not finite. Reimers & Gurevych 2019, 1908.10084.
    """
    embeddings = torch.as_tensor(embeddings)
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(f"pairwise_diversity needs embeddings [N, D] of at least two texts, not {list(embeddings.shape)}")
    return embedding_diversity(embeddings[None])[0].item()


def embedding_diversity(embeddings):
    """pairwise_diversity of many sets: [G, S, D], S at least 2 -> values [G], without each text [S], both float64 arrays."""
    x = torch.as_tensor(embeddings).detach().cpu().double()
    norm = x.norm(dim=-1, keepdim=True)
    if not (norm.isfinite() & (norm > 0)).all():
        raise ValueError("an embedding that is zero or not finite has no direction")
    u, S = x / norm, x.shape[1]
    total = u.sum(1, keepdim=True)  # [G, 1, D]
    values = 1 - (total.square().sum((1, 2)) - S) / (S * (S - 1))  # [G]
    left_out = 1 - ((total - u).square().sum(2) - (S - 1)) / max((S - 1) * (S - 2), 1)  # [G, S]
    return values.numpy(), left_out.mean(0).numpy()


# ----------------------------------------------------------------------------------------------------------------------------- NLI


def nli_scores(probs):
    """What an NLI model says of a pair, as a number: its label's sign times its confidence.

        s = +p for contradiction, 0 for neutral, -p for entailment, p the largest of the three probabilities

    probs [..., 3] in that order -> [...] in [-1, 1]. Kirk et al. 2024 after Stasaski & Hearst 2022, 2205.01497; higher = more diverse
    (the paper's own code has the other sign).
    """
    confidence, label = torch.as_tensor(probs).max(-1)
    return confidence * (1 - label)


def partners(n, most, seed=0):
    """For each of n texts min(most, n - 1) others to be compared with, each text in as many pairs as any other: places [n, R].

    One draw for all sets of n: each text meets the R that follow it in a random order, around the end.
    """
    order, following = np.random.default_rng([n, seed]).permutation(n), np.arange(1, min(most, n - 1) + 1)
    out = np.empty((n, len(following)), dtype=np.int64)
    out[order] = order[(np.arange(n)[:, None] + following) % n]
    return out


def nli_diversity(scores, partner):
    """The mean score over ordered pairs, premise i and hypothesis partner[i, r].

    scores [G, S, R], partner [S, R] -> values [G], without each text [S]. All ordered pairs where R = S - 1, else a sample of them.
    """
    scores, (S, R) = np.asarray(scores, dtype=np.float64), partner.shape
    mean = scores.mean(0)  # [S, R]
    involved = mean.sum(1) + np.bincount(partner.ravel(), weights=mean.ravel(), minlength=S)  # [S]: as premise, and as hypothesis
    return scores.mean((1, 2)), (mean.sum() - involved) / max(S * R - 2 * R, 1)  # each text is in 2 R pairs


def sentences(text, most, seed=0):
    """The sentences of a text; where there are more than `most` (0: any number) so many of them, drawn at random, in order.

    Cut after . ! or ? before a space, and at line ends. The draw depends on the text and the seed alone: equal texts say the same.
    """
    parts = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n", text) if part.strip()] or [""]
    if most and len(parts) > most:
        kept = np.random.default_rng([seed, zlib.crc32(text.encode())]).permutation(len(parts))[:most]
        parts = [parts[i] for i in sorted(kept)]
    return parts


# ----------------------------------------------------------------------------------------------------------------------- protocols


def spread_over_inputs(values):
    """A metric of each prompt's outputs [P] -> Spread over prompts; the interval is the bootstrap's."""
    values = torch.as_tensor(np.asarray(values, dtype=np.float64))
    std = values.std().item() if len(values) > 1 else 0.0
    return Spread(values.mean().item(), std, tuple(x.item() for x in bootstrap(values)) if len(values) > 2 else None)


def spread_across_inputs(values, left_out):
    """A metric of K sets of one output a prompt [K], and without each prompt [P] -> Spread: mean and std over the choices.

    Drawing prompts with replacement would put copies into a set, and copies are not diverse; so the interval over prompts is the
    jackknife's, mean +- t se. It holds what the choice of outputs adds too: with a prompt all its K outputs are left out. It is rather
    too wide: its se is 10 to 20% above the truth in simulations.
    """
    mean, std = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    if len(left_out) < 3:
        return Spread(mean, std, None)
    half = t_quantile(len(left_out) - 1) * jackknife_se(left_out)
    return Spread(mean, std, (mean - half, mean + half))


def jackknife_se(left_out):
    """se = sqrt((S - 1) / S sum_s (v_s - mean v)^2), v_s a statistic without row s. Efron & Stein 1981. [S] -> float"""
    left_out = np.asarray(left_out, dtype=np.float64)
    return float(((len(left_out) - 1) * left_out.var()) ** 0.5)


def simulated_best_of_n(scores, n, repeats=32, seed=0):
    """Best-of-n from a pool: draw n of a prompt's N answers without replacement, keep the one with the highest score; again and again.

    scores [P, N] -> the places of the kept answers, int64 [P, repeats]; of equal scores the first. ValueError: N <= n, scores that
    are not finite. Pitfall: the repeats share a pool, so they meet far more often than answers of real best-of-n: they are fit
    for figures across inputs, but per input they look alike (EAD 0.28 for 0.77 at n = 16 and N = 64 of the embedded world).
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not 1 <= n < scores.shape[1]:
        raise ValueError(f"the best of {n} needs scores [prompts, answers] of more than {n} answers, not {list(scores.shape)}")
    if not np.isfinite(scores).all():
        raise ValueError("simulated_best_of_n: a score that is not finite")
    rng, chosen = np.random.default_rng([n, seed]), []
    for row in scores:
        drawn = rng.random((repeats, len(row))).argpartition(n - 1)[:, :n]  # [repeats, n], as ranks: 0 is the best answer
        chosen.append(np.argsort(-row, kind="stable")[drawn.min(1)])
    return np.stack(chosen)

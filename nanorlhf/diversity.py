"""How different texts are from one another: distinct-n (Li et al. 2016, arXiv 1510.03055)."""

from collections import Counter


def ngrams(text, n):
    """The n-grams of a text's words, in order."""
    words = text.split()
    return list(zip(*(words[i:] for i in range(n))))


def distinct_n(texts, n):
    """Distinct n-grams / all n-grams, pooled over a set of texts; words are separated by white space. 0 where there is no n-gram.

    list of str -> float in [0, 1]. Pitfall: it falls with the size of the set and with length: compare equal sets only.
    """
    counts = Counter(gram for text in texts for gram in ngrams(text, n))
    return len(counts) / max(sum(counts.values()), 1)


def distinct_n_se(texts, n):
    """The jackknife's standard error of distinct_n over texts: leave each out in turn. list of str -> float."""
    parts = [Counter(ngrams(text, n)) for text in texts]
    counts = sum(parts, Counter())
    total = sum(counts.values())
    left_out = [
        (len(counts) - sum(part[gram] == counts[gram] for gram in part)) / max(total - sum(part.values()), 1) for part in parts
    ]
    mean = sum(left_out) / max(len(left_out), 1)
    return ((len(left_out) - 1) / max(len(left_out), 1) * sum((x - mean) ** 2 for x in left_out)) ** 0.5 if left_out else 0.0

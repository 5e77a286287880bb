"""Time the diversity metrics at the size of Kirk et al.'s study: python tests/bench/diversity.py.

Prints one JSON line. 500 prompts x 16 outputs of 48 words with Zipf's frequencies, one thread, in
CPU seconds, steadier than wall clock on a shared machine, as [median, min, max] over the repeats:

    ngrams              EAD and distinct-n for n = 1 .. 5, per input and across, with intervals
    ngrams_one_by_one   the same by ead() and distinct_n(), a set after the other; no intervals
    embeddings          the metric from given embeddings, without the encoder's time
    nli                 the arithmetic alone

`differ` is the largest difference between the first two.

    P prompts, K outputs to each, V words, D width of the embeddings
"""

import argparse
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bon import timed  # noqa: E402

from nanorlhf.diversity import (
    distinct_n,
    draw_partners,
    ead,
    embedding_diversity,
    ngram_diversity,
    nli_diversity,
    spread_across_inputs,
    spread_over_inputs,
)


def transpose(outputs):
    """P prompts x K outputs -> K x P."""
    if isinstance(outputs, list):
        return [list(row) for row in zip(*outputs)]
    return outputs.swapaxes(0, 1)


def measure_both(metric, outputs):
    """A metric of sets -> {name: figure with its interval}, per input and across inputs."""
    per_input = {}
    for name, (values, _) in metric(outputs).items():
        per_input[name] = spread_over_inputs(values)
    across = {}
    for name, (values, left_out) in metric(transpose(outputs)).items():
        across[name] = spread_across_inputs(values, left_out)
    return per_input, across


def measure_one_by_one(texts, V):
    """[per input, across inputs]: {name: the mean over n = 1 .. 5 and over sets}."""
    means = []
    for sets in (texts, transpose(texts)):
        eads = []
        distincts = []
        for part in sets:
            for n in range(1, 6):
                eads.append(ead(part, n, V))
                distincts.append(distinct_n(part, n))
        means.append({"ead": np.mean(eads), "distinct": np.mean(distincts)})
    return means


def largest_difference(fast, slow):
    differences = []
    for figures, means in zip(fast, slow):
        for name, value in means.items():
            differences.append(abs(figures[name].mean - value))
    return float(max(differences))


def draw_texts(rng, P, K, V, n_words):
    """P x K texts, in which word i is as frequent as 1 / i."""
    zipf = 1 / np.arange(1, V + 1)
    words = rng.choice(V, (P, K, n_words), p=zipf / zipf.sum())
    texts = []
    for row in words:
        texts.append([" ".join(map(str, text)) for text in row])
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--outputs", type=int, default=16)
    parser.add_argument("--words", type=int, default=48)
    parser.add_argument("--vocab_size", type=int, default=5000)
    parser.add_argument("--width", type=int, default=384, help="of the embeddings")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    P = args.prompts
    K = args.outputs
    V = args.vocab_size
    rng = np.random.default_rng(0)
    texts = draw_texts(rng, P, K, V, args.words)
    vectors = rng.normal(size=(P, K, args.width)).astype(np.float32)
    embeddings = torch.from_numpy(vectors)
    # Each text meets 15 others of its set: of K per input, of P across inputs.
    partners_per_input = draw_partners(K, 15)
    partners_across = draw_partners(P, 15)
    scores_per_input = rng.uniform(-1, 1, (P, *partners_per_input.shape))
    scores_across = rng.uniform(-1, 1, (K, *partners_across.shape))

    def measure_ngrams():
        return measure_both(lambda sets: ngram_diversity(sets, V), texts)

    def measure_embeddings():
        return measure_both(lambda x: {"embedding": embedding_diversity(x)}, embeddings)

    def measure_nli():
        nli_diversity(scores_per_input, partners_per_input)
        nli_diversity(scores_across, partners_across)

    ways = {
        "ngrams": measure_ngrams,
        "ngrams_one_by_one": lambda: measure_one_by_one(texts, V),
        "embeddings": measure_embeddings,
        "nli": measure_nli,
    }
    result = {"bench": "diversity", **vars(args)}
    for name, way in ways.items():
        result[f"{name}_cpu_s"] = timed(way, args.repeats)
    result["differ"] = largest_difference(measure_ngrams(), measure_one_by_one(texts, V))
    result["torch"] = torch.__version__
    result["numpy"] = np.__version__
    print(json.dumps(result))


if __name__ == "__main__":
    main()

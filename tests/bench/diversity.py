"""Time the diversity metrics at the size of Kirk et al.'s study: python tests/bench/diversity.py. Prints one JSON line.

500 prompts x 16 outputs of 48 words with Zipf's frequencies, one thread, in CPU seconds, steadier than wall clock on a shared machine,
as [median, min, max] over the repeats: `ngrams`, EAD and distinct-n for n = 1 .. 5, per input and across inputs, with intervals;
`ngrams_one_by_one`, the same values without intervals by ead() and distinct_n(), a set after the other; `embeddings`, the metric from
given embeddings, without the encoder's time; `nli`, the arithmetic alone. `differ` is the largest difference between the first two.
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


def both(metric, grid):
    """metric(sets) -> {name: (values, left_out)} under both protocols."""
    per_input, across = metric(grid), metric(transposed(grid))
    return {k: spread_over_inputs(v[0]) for k, v in per_input.items()}, {
        k: spread_across_inputs(*v) for k, v in across.items()
    }


def transposed(grid):
    return [list(row) for row in zip(*grid)] if isinstance(grid, list) else grid.swapaxes(0, 1)


def one_by_one(texts, V):
    """The means over n = 1 .. 5 and over sets, by the plain functions."""
    out = []
    for sets in (texts, transposed(texts)):
        out.append(
            [
                np.mean([f(part, n, *args) for part in sets for n in range(1, 6)])
                for f, args in ((ead, (V,)), (distinct_n, ()))
            ]
        )
    return out


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
    rng, P, K, V = np.random.default_rng(0), args.prompts, args.outputs, args.vocab_size
    zipf = 1 / np.arange(1, V + 1)
    words = rng.choice(V, (P, K, args.words), p=zipf / zipf.sum())
    texts = [[" ".join(map(str, text)) for text in row] for row in words]
    embeddings = torch.from_numpy(rng.normal(size=(P, K, args.width)).astype(np.float32))
    per_input, across = (draw_partners(n, 15) for n in (K, P))
    scores = [rng.uniform(-1, 1, size) for size in ((P, *per_input.shape), (K, *across.shape))]

    def ngrams():
        return both(lambda sets: ngram_diversity(sets, V), texts)

    fast, slow = ngrams(), one_by_one(texts, V)
    differ = max(
        abs(part[name].mean - x)
        for part, plain in zip(fast, slow)
        for name, x in zip(("ead", "distinct"), plain)
    )
    result = {
        "ngrams_cpu_s": timed(ngrams, args.repeats),
        "ngrams_one_by_one_cpu_s": timed(lambda: one_by_one(texts, V), args.repeats),
        "embeddings_cpu_s": timed(
            lambda: both(lambda x: {"embedding": embedding_diversity(x)}, embeddings), args.repeats
        ),
        "nli_cpu_s": timed(
            lambda: [nli_diversity(x, p) for x, p in zip(scores, (per_input, across))], args.repeats
        ),
        "differ": float(differ),
    }
    print(
        json.dumps(
            {
                "bench": "diversity",
                **vars(args),
                **result,
                "torch": torch.__version__,
                "numpy": np.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()

"""Time the best-of-n estimator at full size: python tests/bench/bon.py. Prints one JSON line.

100 prompts of 12,600 answers, 16 n from 1 to 12,500, float64, one thread. In CPU seconds, steadier
than wall clock on a shared machine, as [median, min, max] over the repeats:

    estimate     the whole estimator
    ties         proxies in bfloat16: nearly every answer is tied
    ragged       a mask, with which no two prompts have the same number of answers
    sort_numpy   sorting alone, by numpy
    sort_torch   and by torch

`error` is the largest over all n against whole-number arithmetic, in units of max |S|.

    P prompts, N answers
"""

import argparse
import json
import math
import os
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import numpy as np  # noqa: E402
import torch  # noqa: E402

from nanorlhf.bon import DEFAULT_NS, bon_estimate


def timed(function, repeats):
    """CPU seconds of a call: [median, min, max], after one that does not count."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    median = statistics.median(seconds)
    return [round(median, 4), round(min(seconds), 4), round(max(seconds), 4)]


def estimate_exactly(ascending, n):
    """sum_i C(i-1, n-1) S_(i) / C(N, n) for whole numbers S, rounded once."""
    total = 0
    c = 1  # C(i-1, n-1)
    for i in range(n, len(ascending) + 1):
        total += c * ascending[i - 1]
        c = c * i // (i - n + 1)
    return total / math.comb(len(ascending), n)


def largest_error(proxy, ns):
    """The largest error for one prompt [N] over all n, in units of the largest value."""
    values = torch.randint(-(2**40), 2**40, (len(proxy),))
    ascending = values[proxy.argsort()].tolist()
    exact = torch.tensor([estimate_exactly(ascending, n) for n in ns], dtype=torch.float64)
    found = bon_estimate(proxy[None], values[None], ns)
    error = (found - exact).abs().max() / values.abs().max()
    return error.item()


def sort_by_numpy(proxy):
    for row in proxy.numpy():
        np.argsort(row)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--answers", type=int, default=12_600)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    P = args.prompts
    N = args.answers
    ns = [n for n in DEFAULT_NS if n <= N]
    proxy = torch.randn(P, N, dtype=torch.float64)
    values = torch.randn(P, N, dtype=torch.float64)
    # Each prompt keeps another number of answers.
    n_kept = torch.linspace(max(ns), N, P).long()  # [P]
    mask = torch.arange(N) < n_kept[:, None]  # [P, N]

    error = largest_error(proxy[0], ns)
    ways = {
        "estimate": lambda: bon_estimate(proxy, values, ns),
        "ties": lambda: bon_estimate(proxy.bfloat16(), values, ns),
        "ragged": lambda: bon_estimate(proxy, values, ns, mask=mask),
        "sort_numpy": lambda: sort_by_numpy(proxy),
        "sort_torch": lambda: proxy.argsort(1),
    }
    result = {"bench": "bon", **vars(args), "n": len(ns)}
    for name, way in ways.items():
        result[f"{name}_cpu_s"] = timed(way, args.repeats)
    result["error"] = error
    result["torch"] = torch.__version__
    result["numpy"] = np.__version__
    print(json.dumps(result))


if __name__ == "__main__":
    main()

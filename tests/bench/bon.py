"""Time the best-of-n estimator at full size: python tests/bench/bon.py. Prints one JSON line.

100 prompts of 12,600 answers, 16 n from 1 to 12,500, float64, one thread. In CPU seconds, steadier than wall clock on a shared
machine, as [median, min, max] over the repeats: `estimate`; `ties` (proxies in bfloat16: nearly every answer is tied); `ragged` (a
mask, no two prompts with the same number of answers); `sort` alone, by numpy and by torch. `error` is the largest over all n
against whole-number arithmetic, in units of max |S|.
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
    return [round(f(seconds), 4) for f in (statistics.median, min, max)]


def exact(ascending, n):
    """sum_i C(i-1, n-1) S_(i) / C(N, n) for whole numbers S, rounded once."""
    total, c = 0, 1  # c = C(i-1, n-1)
    for i in range(n, len(ascending) + 1):
        total += c * ascending[i - 1]
        c = c * i // (i - n + 1)
    return total / math.comb(len(ascending), n)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--answers", type=int, default=12_600)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape, ns = (args.prompts, args.answers), [n for n in DEFAULT_NS if n <= args.answers]
    proxy, values = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    keep = torch.linspace(max(ns), args.answers, args.prompts).long()  # answers of each prompt
    mask = torch.arange(args.answers) < keep[:, None]

    whole = torch.randint(-(2**40), 2**40, (args.answers,))
    truth = torch.tensor(
        [exact(whole[proxy[0].argsort()].tolist(), n) for n in ns], dtype=torch.float64
    )
    error = (bon_estimate(proxy[:1], whole[None], ns) - truth).abs().max() / whole.abs().max()
    result = {
        "estimate_cpu_s": timed(lambda: bon_estimate(proxy, values, ns), args.repeats),
        "ties_cpu_s": timed(lambda: bon_estimate(proxy.bfloat16(), values, ns), args.repeats),
        "ragged_cpu_s": timed(lambda: bon_estimate(proxy, values, ns, mask=mask), args.repeats),
        "sort_numpy_cpu_s": timed(lambda: [np.argsort(row) for row in proxy.numpy()], args.repeats),
        "sort_torch_cpu_s": timed(lambda: proxy.argsort(1), args.repeats),
        "error": error.item(),
    }
    print(
        json.dumps(
            {
                "bench": "bon",
                **vars(args),
                "n": len(ns),
                **result,
                "torch": torch.__version__,
                "numpy": np.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()

"""What training a sparse autoencoder costs and reaches: python tests/bench/sae.py --mode speed.

Prints one JSON line. Data made from a known dictionary: x = codes @ dictionary + noise; 2,048 unit
directions in R^512, each active with probability 16 / 2,048 at an amplitude uniform in [0.5, 1.5],
noise of standard deviation 0.02 a coordinate: alone it is an FVU of 0.0118.

    speed      activations per CPU second and per second, over the steps after --skip of them
               (16 steps of 4,096)
    quality    on held-out rows: FVU, L0, dead features, and the share of the true directions with a
               cosine above 0.9 to a decoder's direction (480 steps of 1,024; --steps 80
               --batch 4096 for the short one)

The settings are train_sae.py's defaults. With one thread the figure per CPU second hardly depends
on what else the machine does.

    N rows, D width, M features
"""

import argparse
import json
import os
import resource
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import torch  # noqa: E402

from nanorlhf.sae import (
    SparseAutoencoder,
    TopKSAE,
    adam,
    gradients,
    measures,
    tally,
    update,
)
from train_sae import Config

D, DIRECTIONS, ACTIVE, NOISE = 512, 2048, 16, 0.02


def make_data(n_rows, n_held_out, seed):
    """-> training rows [N, D], held-out rows, the dictionary [2048, D]."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(DIRECTIONS, D, generator=generator)
    dictionary = torch.nn.functional.normalize(directions)
    x = torch.empty(n_rows + n_held_out, D)
    for part in x.split(2048):
        chances = torch.rand(len(part), DIRECTIONS, generator=generator)
        is_active = chances < ACTIVE / DIRECTIONS
        amplitudes = 0.5 + torch.rand(is_active.shape, generator=generator)
        codes = is_active.float() * amplitudes
        noise = NOISE * torch.randn(part.shape, generator=generator)
        part.copy_(codes @ dictionary).add_(noise)
    return x[:n_rows], x[n_rows:], dictionary


def make_autoencoder(args):
    if args.kind == "topk":
        return TopKSAE(D, args.features, args.k, seed=args.seed)
    return SparseAutoencoder(D, args.features, seed=args.seed)


def draw_batches(n_rows, batch, steps, seed):
    """The rows of each step: [batch] each. Every row comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(n_rows, generator=generator)
        yield order[:batch]
        order = order[batch:]


def read_clocks(device):
    """CPU seconds and seconds, when the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def train(sae, x, args):
    """Train with train_sae.py's defaults -> the clocks before each step and after the last one."""
    config = Config(steps=args.steps, batch_size=args.batch, lr=args.lr)
    optimizer = adam(sae)
    silent = torch.zeros(args.features, dtype=torch.long, device=args.device)  # [M]
    options = {
        "l1": args.l1,
        "silent": silent,
        "dead_after": config.dead_tokens(),
        "dtype": getattr(torch, args.dtype),
    }
    clocks = []
    for step, rows in enumerate(draw_batches(len(x), args.batch, args.steps, args.seed)):
        clocks.append(read_clocks(args.device))
        batch = x[rows.to(args.device)]
        gradients(sae, batch, **options)
        update([sae], optimizer, config.rate(step))
    clocks.append(read_clocks(args.device))
    return clocks


def measure_speed(clocks, args):
    start_cpu, start = clocks[args.skip]
    end_cpu, end = clocks[-1]
    n = args.batch * (args.steps - args.skip)
    return {
        "activations_per_cpu_s": n / (end_cpu - start_cpu),
        "activations_per_s": n / (end - start),
    }


def measure_quality(sae, held_out, dictionary):
    """What the autoencoder explains of held-out rows, and which true directions it has found."""
    sums = {}
    for rows in held_out.split(1024):
        for name, value in tally(sae, rows).items():
            sums[name] = sums.get(name, 0) + value
    quality = measures(sums)
    del quality["density"]
    cosines = dictionary @ sae.decoder_directions().T  # [2048, M]
    best = cosines.amax(1)  # [2048]
    quality["recovered"] = (best > 0.9).float().mean().item()
    quality["mean_max_cosine"] = best.mean().item()
    return quality


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=["speed", "quality"], default="speed")
    parser.add_argument("--kind", choices=["topk", "l1"], default="topk")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--l1", type=float, default=Config.l1)
    parser.add_argument("--lr", type=float, default=Config.lr)
    parser.add_argument("--batch", type=int, help="default: 4096, and 1024 for quality")
    parser.add_argument("--steps", type=int, help="default: 16, and 480 for quality")
    parser.add_argument("--skip", type=int, default=4, help="steps left out of the speed")
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--held_out", type=int, default=32_768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    speed = args.mode == "speed"
    if not args.batch:
        args.batch = 4096 if speed else 1024
    if not args.steps:
        args.steps = 16 if speed else 480
    torch.set_num_threads(args.threads)

    x, held_out, dictionary = make_data(args.rows, args.held_out, args.seed)
    x = x.to(args.device)
    sae = make_autoencoder(args).to(args.device).fit(x[:16_384])
    clocks = train(sae, x, args)

    result = {"bench": "sae", **vars(args)}
    result |= measure_speed(clocks, args)
    result |= measure_quality(sae, held_out.to(args.device), dictionary.to(args.device))
    result["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if args.device == "cuda":
        result["peak_cuda_mib"] = torch.cuda.max_memory_allocated() / 2**20
    result["torch"] = torch.__version__
    print(json.dumps(result))


if __name__ == "__main__":
    main()

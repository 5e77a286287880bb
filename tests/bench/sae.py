"""What training a sparse autoencoder costs and reaches: python tests/bench/sae.py --mode speed. Prints one JSON line.

Data made from a known dictionary: x = codes @ dictionary + noise; 2,048 unit directions in R^512, each active with probability
16 / 2,048 at an amplitude uniform in [0.5, 1.5], noise of standard deviation 0.02 a coordinate: alone it is an FVU of 0.0118.
    speed      activations per CPU second and per second, over the steps after --skip of them (16 steps of 4,096)
    quality    on held-out rows: FVU, L0, dead features, and the share of the true directions with a cosine above 0.9 to a decoder's
               direction (480 steps of 1,024; --steps 80 --batch 4096 for the short one)
The settings are train_sae.py's defaults. With one thread the figure per CPU second hardly depends on what else the machine does.
"""

import argparse
import json
import os
import resource
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import torch  # noqa: E402

from nanorlhf.sae import SparseAutoencoder, TopKSAE, adam, measures, tally, train_step
from train_sae import Config

D, DIRECTIONS, ACTIVE, NOISE = 512, 2048, 16, 0.02


def make_data(rows, held_out, seed):
    """-> training rows [rows, D], held-out rows, the dictionary [2048, D]"""
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(DIRECTIONS, D, generator=generator))
    x = torch.empty(rows + held_out, D)
    for part in x.split(2048):
        codes = (
            torch.rand(len(part), DIRECTIONS, generator=generator) < ACTIVE / DIRECTIONS
        ).float()
        codes *= 0.5 + torch.rand(codes.shape, generator=generator)
        part.copy_(codes @ dictionary).add_(NOISE * torch.randn(part.shape, generator=generator))
    return x[:rows], x[rows:], dictionary


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
    args.batch = args.batch or (4096 if args.mode == "speed" else 1024)
    args.steps = args.steps or (16 if args.mode == "speed" else 480)
    torch.set_num_threads(args.threads)

    x, held_out, dictionary = (
        part.to(args.device) for part in make_data(args.rows, args.held_out, args.seed)
    )
    sae = (
        TopKSAE(D, args.features, args.k, seed=args.seed)
        if args.kind == "topk"
        else SparseAutoencoder(D, args.features, seed=args.seed)
    )
    sae = sae.to(args.device).fit(x[:16_384])
    optimizer, silent = adam(sae), torch.zeros(args.features, dtype=torch.long, device=args.device)
    config = Config(steps=args.steps, batch_size=args.batch, lr=args.lr)
    generator, marks, order = (
        torch.Generator().manual_seed(args.seed),
        [],
        torch.empty(0, dtype=torch.long),
    )
    for step in range(args.steps):
        if args.device == "cuda":
            torch.cuda.synchronize()
        marks.append((time.process_time(), time.perf_counter()))
        if len(order) < args.batch:
            order = torch.randperm(len(x), generator=generator)
        index, order = order[: args.batch].to(args.device), order[args.batch :]
        options = {
            "l1": args.l1,
            "silent": silent,
            "dead_after": config.dead_tokens(),
            "dtype": getattr(torch, args.dtype),
        }
        train_step(sae, optimizer, x[index], config.rate(step), **options)
    if args.device == "cuda":
        torch.cuda.synchronize()
    marks.append((time.process_time(), time.perf_counter()))
    n, (cpu, wall) = (
        args.batch * (args.steps - args.skip),
        (b - a for a, b in zip(marks[args.skip], marks[-1])),
    )
    result = {"activations_per_cpu_s": n / cpu, "activations_per_s": n / wall}
    parts = [tally(sae, rows) for rows in held_out.split(1024)]
    result |= {
        k: v
        for k, v in measures({k: sum(part[k] for part in parts) for k in parts[0]}).items()
        if k != "density"
    }
    best = (dictionary @ sae.decoder_directions().T).amax(1)  # [2048]
    result |= {
        "recovered": (best > 0.9).float().mean().item(),
        "mean_max_cosine": best.mean().item(),
    }
    result["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if args.device == "cuda":
        result["peak_cuda_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps({"bench": "sae", **vars(args), **result, "torch": torch.__version__}))


if __name__ == "__main__":
    main()

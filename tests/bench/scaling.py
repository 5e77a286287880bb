"""Time PPO on several processes: python tests/bench/scaling.py --size medium --processes 1 2. Prints one JSON line a measurement.

The workload of ppo.py (64 prompts of 16 tokens, 48 new ones, 16 optimizer steps) as one global batch (--weak: 64 prompts for each
process) on N gloo processes of one thread each, under torchrun, by wall clock; and, in turn with it, N independent single processes
at the same time, each with the whole workload. share_of_independent: the samples a second of the N ranks, of those of the N
independent processes together; what is lost is the exchange of gradients, the waiting for the slowest, and the optimizer, which
every DDP rank runs in full.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from ppo import ROOT, make_inputs

ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def flags(folder, name, args, share=1):
    settings = dict(
        model=f"{folder}/policy", reward_model=f"{folder}/reward", dataset=f"{folder}/prompts.jsonl", output_dir=f"{folder}/{name}",
        steps=args.iterations, batch_size=64 * share, minibatch_size=16 * share, micro_batch_size=16, ppo_epochs=4, max_new_tokens=48,
        lr=3e-6, kl_coef=0.05, eval_size=8, eval_every=0, n_samples=0, checkpoint_every=10**6, dtype=args.dtype, device="cpu",
        distributed=args.distributed,
    )  # fmt: skip
    return [
        f"{ROOT}/train_ppo.py",
        *(str(x) for key, value in settings.items() for x in (f"--{key}", value)),
    ]


def finish(processes, folders):
    """Wait for the processes -> seconds an iteration (the first is not counted) and peak memory, of each folder."""
    for process in processes:
        _, errors = process.communicate()
        if process.returncode:
            sys.exit(errors.decode())
    out = []
    for folder in folders:
        with open(f"{folder}/metrics.jsonl") as f:
            records = [json.loads(line) for line in f][
                2:
            ]  # step 0 is the evaluation, step 1 the warm-up
        seconds = [
            sum(r[f"seconds_{part}"] for part in ("rollout", "score", "update")) for r in records
        ]
        out.append((statistics.mean(seconds), records[-1]["peak_memory_mb"]))
    return out


def start(*command):
    return subprocess.Popen(
        [sys.executable, *command],
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="medium", choices=("small", "medium"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--distributed", default="ddp", choices=("ddp", "fsdp"))
    parser.add_argument(
        "--weak",
        action="store_true",
        help="64 prompts a process: as many optimizer steps of N times the samples",
    )
    parser.add_argument("--iterations", type=int, default=2, help="the first is not counted")
    parser.add_argument("--rounds", type=int, default=1, help="both ways in turn, so often")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    for n in args.processes:
        share = n if args.weak else 1
        together, apart, memory = [], [], []
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                make_inputs(folder, args.size)
                torchrun = (
                    ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}")
                    if n > 1
                    else ()
                )
                ranks = start(*torchrun, *flags(folder, "ranks", args, share))
                [(seconds, peak)] = finish([ranks], [f"{folder}/ranks"])
                together.append(64 * share / seconds)
                memory.append(peak)
                names = [f"alone_{i}" for i in range(n)]
                args.distributed, kept = "ddp", args.distributed
                each = finish(
                    [start(*flags(folder, name, args)) for name in names],
                    [f"{folder}/{name}" for name in names],
                )
                args.distributed = kept
                apart.append(sum(64 / seconds for seconds, _ in each))
        shares = [a / b for a, b in zip(together, apart)]
        median = statistics.median
        result = {
            "bench": "scaling", "size": args.size, "processes": n, "distributed": args.distributed, "weak": args.weak, "dtype": args.dtype,
            "rounds": args.rounds, "samples_per_s": round(median(together), 3), "independent_samples_per_s": round(median(apart), 3),
            "share_of_independent": round(median(shares), 3), "shares": [round(share, 3) for share in shares],
            "peak_memory_mb_of_rank_0": round(median(memory)),
        }  # fmt: skip
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

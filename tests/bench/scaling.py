"""Time PPO on several processes: python tests/bench/scaling.py --size medium --processes 1 2.

Prints one JSON line a measurement. The workload of ppo.py (64 prompts of 16 tokens, 48 new ones, 16
optimizer steps) as one global batch (--weak: 64 prompts for each process) on N gloo processes of
one thread each, under torchrun, by wall clock; and, in turn with it, N independent single processes
at the same time, each with the whole workload. share_of_independent: the samples a second of the N
ranks, of those of the N independent processes together. What is lost is the exchange of gradients,
the waiting for the slowest, and the optimizer, which every DDP rank runs in full.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

import numpy as np
from ppo import PARTS, ROOT, make_inputs, read_steps

ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def command_line(folder, name, args, distributed, share=1):
    """train_ppo.py with the workload, `share` times as many prompts, into the folder's {name}/."""
    settings = dict(
        model=f"{folder}/policy",
        reward_model=f"{folder}/reward",
        dataset=f"{folder}/prompts.jsonl",
        output_dir=f"{folder}/{name}",
        steps=args.iterations,
        batch_size=64 * share,
        minibatch_size=16 * share,
        micro_batch_size=16,
        ppo_epochs=4,
        max_new_tokens=48,
        lr=3e-6,
        kl_coef=0.05,
        eval_size=8,
        eval_every=0,
        n_samples=0,
        checkpoint_every=10**6,
        dtype=args.dtype,
        device="cpu",
        distributed=distributed,
    )
    words = [f"{ROOT}/train_ppo.py"]
    for flag, value in settings.items():
        words += [f"--{flag}", str(value)]
    return words


def start(*command):
    return subprocess.Popen(
        [sys.executable, *command],
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )


def finish(process):
    """Wait for a process, which must end well."""
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(errors.decode())


def read_run(folder):
    """Seconds an iteration, and the peak of memory."""
    steps = read_steps(f"{folder}/metrics.jsonl")
    seconds = []
    for step in steps:
        seconds.append(sum(step[f"seconds_{part}"] for part in PARTS))
    return statistics.mean(seconds), steps[-1]["peak_memory_mb"]


def run_ranks(folder, args, n, share):
    """One run of n processes -> its samples a second, and the peak of memory of rank 0."""
    torchrun = []
    if n > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    command = command_line(folder, "ranks", args, args.distributed, share)
    finish(start(*torchrun, *command))
    seconds, peak = read_run(f"{folder}/ranks")
    return 64 * share / seconds, peak


def run_independent(folder, args, n):
    """n runs of one process at the same time -> their samples a second together."""
    names = [f"alone_{i}" for i in range(n)]
    processes = [start(*command_line(folder, name, args, "ddp")) for name in names]
    for process in processes:
        finish(process)
    samples_per_s = 0.0
    for name in names:
        seconds, _ = read_run(f"{folder}/{name}")
        samples_per_s += 64 / seconds
    return samples_per_s


def measure(args, n):
    """The line about n processes: medians over the rounds."""
    share = n if args.weak else 1
    together = []
    apart = []
    memory = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            make_inputs(folder, args.size)
            samples_per_s, peak = run_ranks(folder, args, n, share)
            together.append(samples_per_s)
            memory.append(peak)
            apart.append(run_independent(folder, args, n))
    shares = [a / b for a, b in zip(together, apart)]
    return {
        "bench": "scaling",
        "size": args.size,
        "processes": n,
        "distributed": args.distributed,
        "weak": args.weak,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "samples_per_s": round(statistics.median(together), 3),
        "independent_samples_per_s": round(statistics.median(apart), 3),
        "share_of_independent": round(statistics.median(shares), 3),
        "shares": np.round(shares, 3).tolist(),
        "peak_memory_mb_of_rank_0": round(statistics.median(memory)),
    }


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
        print(json.dumps(measure(args, n)), flush=True)


if __name__ == "__main__":
    main()

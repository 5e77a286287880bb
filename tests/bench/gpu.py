"""Measure what is owed on one GPU, in one go: python tests/bench/gpu.py --out FOLDER/gpu.jsonl

    phase      seconds  what runs (gpu_phases.py)
    ceilings        15  a large copy; matrix products of the shapes of decoding and of the update
    step           100  decoding at Pythia-1.4B's shape: as it is, with --compile, and transformers'
                        own generate with a static cache
    update         100  one minibatch of the update at that shape, without --compile and with it;
                        scoring
    lora            90  one minibatch at Llama-3-8B's shape with LoRA, in four forms
    attention       40  one query a head over a padded cache, in three ways
    ppo             80  ppo.py, three iterations
    tests           25  tests/runs/test_gpu.py, in part

Each phase is a process of its own. One that fails or is late leaves the rows that it has, with what
went wrong, and the next one goes on. What a phase leaves of its seconds the later ones may use.
--budget scales the seconds of all. Each phase is a line of JSON, printed and in --out. The table at
the end has what was expected of an H200, beside what was measured. Models and data are random;
times are medians by wall clock.

On a machine without a GPU this shows only that the script runs. Nothing is compiled there:

    python tests/bench/gpu.py --size small --device cpu --out gpu.jsonl
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

SECONDS = {
    "ceilings": 15,
    "step": 100,
    "update": 100,
    "lora": 90,
    "attention": 40,
    "ppo": 80,
    "tests": 25,
}
# By a budget of milliseconds, from measurements of earlier code (README.md).
EXPECTED = {
    ("ceilings", "copy"): {"gb_per_s": 4274},
    ("ceilings", "square product"): {"tflop_per_s": 662},
    ("step", "now"): {"begin_ms": 135, "step_ms": 5.0, "share": 0.27, "tokens_per_s": 21200},
    ("step", "compile"): {"begin_ms": 50, "step_ms": 3.0, "share": 0.45},
    ("step", "generate"): {"times_compile": 2.0},
    ("update", "now"): {"ms": 145.7, "tflop_per_s": 323, "mfu": 0.327},
    ("update", "compile"): {"ms": 122.8, "tflop_per_s": 383, "mfu": 0.388},
    ("lora", "8 rows, recompute, float32"): {"ms": 1730, "tflop_per_s": 104},
    ("lora", "32 rows, recompute, bfloat16"): {"ms": 614, "tflop_per_s": 293},
    ("lora", "32 rows, bfloat16"): {"ms": 450, "tflop_per_s": 400},
    ("lora", "32 rows, bfloat16, compile"): {"ms": 335, "tflop_per_s": 530},
    ("ppo", "compile"): {"rollout_s": 0.45, "update_s": 1.96},
}


def work(sender, phase, args):
    """A phase, in a process of its own: send each of its rows, or in the end what went wrong."""
    # What the phase starts itself is ended with it.
    os.setsid()
    try:
        import gpu_phases
        import torch

        if args.device == "cpu":
            # To compile for a CPU takes longer than all the rest.
            torch._dynamo.config.disable = True
        for row in getattr(gpu_phases, f"measure_{phase}")(args):
            sender.send(row)
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def run_phase(context, phase, args, deadline):
    """Run a phase until it ends, or until the deadline. -> its line, with the rows that it sent"""
    begun = time.monotonic()
    receiver, sender = context.Pipe(duplex=False)
    # What the phase has allocated, compiled or broken is gone with its process.
    process = context.Process(target=work, args=(sender, phase, args))
    process.start()
    sender.close()

    line = {"phase": phase, "rows": []}
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            message = receiver.recv()
            if isinstance(message, str):
                line["error"] = message
            else:
                line["rows"].append(message)
        # poll() has waited until the deadline, and no row came.
        line["error"] = "late"
        end_process(process)
    except EOFError:
        # The process has ended, and with it its end of the pipe.
        process.join()
        if process.exitcode != 0:
            line["error"] = f"the process ended with {process.exitcode}"
    line["seconds"] = round(time.monotonic() - begun, 1)
    return line


def end_process(process):
    """End a process, and those that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        # It has not come to setsid() yet.
        process.kill()
    process.join()


def print_table(lines):
    """What was measured, beside what was expected of an H200; and what went wrong."""
    print(f"{'phase':10}{'variant':32}{'column':14}{'measured':>10}{'expected':>10}{'ratio':>7}")
    for line in lines:
        phase = line["phase"]
        for row in line["rows"]:
            variant = row["variant"]
            for column, expected in EXPECTED.get((phase, variant), {}).items():
                measured = row.get(column, float("nan"))
                ratio = measured / expected
                print(f"{phase:10}{variant:32}{column:14}{measured:10}{expected:10}{ratio:7.2f}")
        if "error" in line:
            print(f"{phase:10}{line['error']}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="a file of one JSON line a phase")
    parser.add_argument("--budget", type=float, default=450, help="seconds, of all phases")
    parser.add_argument("--size", choices=("small", "pythia-1.4b"), default="pythia-1.4b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--phases", nargs="+", choices=SECONDS, default=list(SECONDS))
    args = parser.parse_args()

    # A server that has imported everything makes the processes: imports are paid for once, here.
    end = time.monotonic() + args.budget
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpu_phases"])
    first = context.Process(target=os.getpid)
    first.start()
    first.join()

    # The seconds of the imports are a part of the budget, so the phases share what is left.
    deadline = time.monotonic()
    scale = (end - deadline) / sum(SECONDS.values())
    lines = []
    with open(args.out, "w") as file:
        for phase in args.phases:
            # A phase's deadline does not depend on when it began: a phase that ends early leaves
            # its seconds to the next ones.
            deadline += scale * SECONDS[phase]
            line = run_phase(context, phase, args, deadline)
            lines.append(line)
            for place in (file, sys.stdout):
                print(json.dumps(line), file=place, flush=True)
    print_table(lines)


if __name__ == "__main__":
    main()

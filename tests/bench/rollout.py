"""Time generate(), which keeps log-probs, entropies and values: python tests/bench/rollout.py.

Prints one JSON line. The usual workload: a random GPT-NeoX policy with a value head; 64 prompts
padded on the left to 16 columns, true lengths uniform in 8..16; 48 new tokens at temperature 1, no
EOS, float32; one warm-up, then the mean over --calls. CPU seconds of one thread are steadier than
wall clock on a shared machine. On a GPU, with 128 prompts of 64 tokens and 128 new ones:

    python tests/bench/rollout.py --device cuda --size pythia-1.4b --dtype bfloat16

There decoding is limited by memory, and the line also gives the share of that limit: bytes a step
must read / seconds of a step / bytes per second of a large copy on the same device in the same run
(a copy reads and writes: twice its size). Steps are timed from when one has been captured; what
comes before, once a rollout (prompts, casts, warm-up, capture), is begin_ms. The bytes:

    weights  4 a weight, or 2 in bfloat16, of all but the input embeddings (a step reads B rows)
    cache    B * columns * layers * 2 (key, value) * hidden * 4 or 2, where the mean number of real
             columns is about P + R / 2

The step reads the whole padded cache, and the logits are written and read a few times, so 1 is out
of reach.

With --answers G every prompt has G answers, in rows of two orders: side by side, where a prompt
runs through the model once, and in turn, where no row has its neighbour's prompt, so that a prompt
runs once for every answer. The two take turns, and the line has the medians of both. Prompts are of
--prompt tokens, without padding, and there are two of them, or more if they fill 64 rows:

    python tests/bench/rollout.py --answers 64 --prompt 400 --new_tokens 16

    B sequences, P columns of a prompt, R new tokens, G answers to a prompt
"""

import argparse
import json
import os
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]

import torch  # noqa: E402
from ppo import SIZES  # noqa: E402
from transformers import AutoModelForCausalLM, GPTNeoXConfig  # noqa: E402

from nanorlhf.models import Policy
from nanorlhf.rollout import generate


def workload(size):
    """Prompts, columns of a prompt, new tokens, tokens of the shortest prompt."""
    if size == "pythia-1.4b":
        return 128, 64, 128, 64
    return 64, 16, 48, 8


def make_policy(size, length):
    """A random policy with a value head and a context of `length`.

    It has no EOS, so no row ends early: every call decodes B x R tokens.
    """
    hidden, layers, heads, intermediate, vocab = SIZES[size]
    config = GPTNeoXConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_position_embeddings=length,
        bos_token_id=0,
        eos_token_id=None,
    )
    return Policy(AutoModelForCausalLM.from_config(config)).eval()


def draw_prompts(vocab, B, P, shortest):
    """Random prompts and their mask, padded on the left: [B, P] both."""
    lengths = torch.randint(shortest, P + 1, (B, 1))
    # A prompt of 3 tokens in 5 columns has the mask 0 0 1 1 1.
    mask = torch.arange(P) >= P - lengths
    ids = torch.randint(1, vocab, (B, P)) * mask
    return ids, mask


def measure_groups(args, clock, unit):
    """The columns of a line with --answers: a rollout's seconds with its rows in both orders."""
    G = args.answers
    P = args.prompt
    R = args.new_tokens
    n_prompts = max(2, 64 // G)
    B = n_prompts * G
    ids, mask = draw_prompts(SIZES[args.size][-1], n_prompts, P, P)  # [n_prompts, P] both
    policy = make_policy(args.size, P + R).to(args.device)

    # The same rows in two orders. generate() reads a prompt once if its rows are neighbours.
    prompt_of_row = {
        "side_by_side": torch.arange(B) // G,  # 0 0 0 1 1 1
        "in_turn": torch.arange(B) % n_prompts,  # 0 1 0 1 0 1
    }
    seconds = {"side_by_side": [], "in_turn": []}
    for call in range(args.calls + 1):
        # The orders take turns, so that whatever else runs on the machine slows both down alike.
        for order, prompt in prompt_of_row.items():
            row_ids = ids[prompt].to(args.device)
            row_mask = mask[prompt].to(args.device)
            start = clock()
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                generate(policy, row_ids, row_mask, R, step=call)
            synchronize(args.device)
            # The first call only warms up.
            if call > 0:
                seconds[order].append(clock() - start)

    result = {"batch": B}
    for order, times in seconds.items():
        result[f"{order}_{unit}"] = [round(s, 3) for s in sorted(times)]
        result[f"{order}_tokens_per_{unit}"] = round(B * R / statistics.median(times), 1)
    # A ratio of two calls that follow each other is steadier than a ratio of two medians.
    pairs = [b / a for a, b in zip(seconds["side_by_side"], seconds["in_turn"])]
    result["ratios"] = [round(ratio, 2) for ratio in sorted(pairs)]
    result["ratio"] = round(statistics.median(pairs), 2)
    return result


def synchronize(device):
    """Wait for a GPU to have done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device, gigabytes=4.0):
    """Bytes per second that a large copy reads and writes."""
    # float32: 2^28 numbers are a GiB.
    a = torch.empty(int(gigabytes * 2**28), device=device)
    b = torch.empty_like(a)
    # The first ten copies are a warm-up; the time of the last ten is the one that counts.
    for _warm_up in (True, False):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(10):
            b.copy_(a)
        synchronize(device)
    return 10 * 2 * a.nbytes / (time.perf_counter() - start)


def note_replays():
    """-> a list that gets the time at which each replay of a captured decode step begins.

    Before the first one the GPU has done all that comes before it.
    """
    begun = []
    # Every replay goes through this method, whoever calls it.
    replay = torch.cuda.CUDAGraph.replay

    def note_and_replay(graph):
        if not begun:
            torch.cuda.synchronize()
        begun.append(time.perf_counter())
        replay(graph)

    torch.cuda.CUDAGraph.replay = note_and_replay
    return begun


def time_rollouts(sample, calls, device, clock, replays):
    """Time sample(call), which decodes, so many times after a first one.

    replays: what note_replays() gave -> {"first": [s], "all": [s, ...], "begin": [s, ...], "step":
    [s, ...]}, and what the last call returned. `begin` is what comes before the first replay of a
    captured step. Nothing is captured on a CPU: begin and step are empty there.
    """
    seconds = {"first": [], "all": [], "begin": [], "step": []}
    for call in range(calls + 1):
        replays.clear()
        start = clock()
        result = sample(call)
        synchronize(device)
        end = clock()
        # The first call takes memory, chooses kernels and, with --compile, compiles.
        if call == 0:
            seconds["first"].append(end - start)
            continue
        seconds["all"].append(end - start)
        if replays:
            seconds["begin"].append(replays[0] - start)
            seconds["step"].append((end - replays[0]) / len(replays))
    return seconds, result


def bytes_of_a_step(policy, size, width, B, P, R):
    """What a decode step must read. `width`: bytes of a number."""
    hidden, layers, *_ = SIZES[size]
    n_parameters = sum(p.numel() for p in policy.parameters())
    n_embeddings = policy.lm.get_input_embeddings().weight.numel()
    # A step reads a few rows of the embeddings, and all other weights once for all rows.
    weights = width * (n_parameters - n_embeddings)
    # A row has P columns in the cache at first and P + R at the end: P + R / 2 on average.
    cache = width * B * (P + R / 2) * layers * 2 * hidden
    return weights + cache


def measure_decoding(args, policy, seconds, B, P, R):
    """The columns that a GPU's line has besides: the share of the memory's bandwidth."""
    width = 2 if args.dtype == "bfloat16" else 4
    step = statistics.mean(seconds["step"])
    begin = statistics.mean(seconds["begin"])
    needed = bytes_of_a_step(policy, args.size, width, B, P, R)
    bandwidth = copy_bandwidth(args.device)
    return {
        "begin_ms": round(1e3 * begin, 1),
        "step_ms": round(1e3 * step, 3),
        "step_gb": round(needed / 1e9, 3),
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "share_of_bandwidth": round(needed / step / bandwidth, 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("small", "medium", "pythia-1.4b"), default="small")
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--answers", type=int, help="to a prompt: compare two orders of rows")
    parser.add_argument("--prompt", type=int, default=400, help="tokens, with --answers")
    parser.add_argument("--new_tokens", type=int, default=16, help="with --answers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cuda = torch.device(args.device).type == "cuda"

    # One thread is timed in CPU seconds, all else by wall clock.
    clock = time.perf_counter
    unit = "s"
    if args.threads == 1 and not cuda:
        clock = time.process_time
        unit = "cpu_s"
    if args.answers:
        groups = measure_groups(args, clock, unit)
        print(json.dumps({"bench": "rollout", **vars(args), **groups, "torch": torch.__version__}))
        return

    B, P, R, shortest = workload(args.size)
    vocab = SIZES[args.size][-1]
    ids, mask = draw_prompts(vocab, B, P, shortest)
    policy = make_policy(args.size, 256).to(args.device)
    ids = ids.to(args.device)
    mask = mask.to(args.device)

    def sample(call):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            return generate(policy, ids, mask, R, step=call)

    seconds, rollout = time_rollouts(sample, args.calls, args.device, clock, note_replays())
    # No row ended early, and values were computed: the work is what is said of it.
    assert rollout.response_mask.all()
    assert rollout.values is not None

    result = {"bench": "rollout", **vars(args), "batch": B, "prompt": P, "new_tokens": R}
    result["params"] = sum(p.numel() for p in policy.parameters())
    result[f"tokens_per_{unit}"] = round(B * R / statistics.mean(seconds["all"]), 1)
    if cuda:
        result |= measure_decoding(args, policy, seconds, B, P, R)
    result["torch"] = torch.__version__
    print(json.dumps(result))


if __name__ == "__main__":
    main()

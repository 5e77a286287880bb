"""Time generate(), log-probs, entropies and values kept: python tests/bench/rollout.py --size small. Prints one JSON line.

The usual workload: a random GPT-NeoX policy with a value head; 64 prompts padded on the left to 16 columns, true lengths uniform in
8..16; 48 new tokens at temperature 1, no EOS, float32; one warm-up, then the mean over --calls. CPU seconds of one thread are
steadier than wall clock on a shared machine.

    python tests/bench/rollout.py --device cuda --size pythia-1.4b --dtype bfloat16      # 128 prompts of 64, 128 new tokens

On a GPU decoding is limited by memory, and the line also gives the share of that limit: bytes a step must read / seconds of a
step / bytes per second of a large copy on the same device in the same run (a copy reads and writes: twice its size). Steps are
timed from when one has been captured; what comes before, once a rollout (prompts, casts, warm-up, capture), is begin_ms. The bytes:

    weights  4 a weight, or 2 in bfloat16, of all but the input embeddings (a step reads B rows of them)
    cache    B columns * layers * 2 (key, value) * hidden * 4 or 2, where the mean number of real columns is about P + R / 2

The step reads the whole padded cache and the logits are written and read a few times, so that 1 is out of reach.
"""

import argparse
import json
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]

import torch  # noqa: E402
from ppo import SIZES  # noqa: E402
from transformers import AutoModelForCausalLM, GPTNeoXConfig  # noqa: E402

from nanorlhf.hf import decode
from nanorlhf.models import Policy
from nanorlhf.rollout import generate


def inputs(size, batch, width, shortest):
    """A random policy; prompts [B, P] and their mask, padded on the left."""
    hidden, layers, heads, intermediate, vocab = SIZES[size]
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=intermediate, vocab_size=vocab,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    lengths = torch.randint(shortest, width + 1, (batch, 1))
    mask = torch.arange(width) >= width - lengths
    return (
        Policy(AutoModelForCausalLM.from_config(config)).eval(),
        torch.randint(1, vocab, (batch, width)) * mask,
        mask,
    )


def copy_bandwidth(device, gigabytes=4):
    """Bytes per second that a large copy reads and writes."""
    a = torch.empty(gigabytes * 2**28, device=device)
    b = torch.empty_like(a)
    for _warm_up in (True, False):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            b.copy_(a)
        torch.cuda.synchronize()
    return 10 * 2 * a.nbytes / (time.perf_counter() - start)


def note_captures(clock):
    """-> a list that gets (time, steps that are left) whenever a decode step has been captured."""
    captured, capture = [], decode.capture

    def noted(step, R, device):
        step, t = capture(step, R, device)
        torch.cuda.synchronize()
        captured.append((clock(), R - t))
        return step, t

    decode.capture = noted
    return captured


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("small", "medium", "pythia-1.4b"), default="small")
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cuda = torch.device(args.device).type == "cuda"
    B, P, R, shortest = (128, 64, 128, 64) if args.size == "pythia-1.4b" else (64, 16, 48, 8)
    policy, ids, mask = inputs(args.size, B, P, shortest)
    policy, ids, mask = policy.to(args.device), ids.to(args.device), mask.to(args.device)
    clock = time.process_time if args.threads == 1 and not cuda else time.perf_counter
    seconds, steps, begin = [], [], []
    captured = note_captures(clock) if cuda else None
    for call in range(args.calls + 1):
        start = clock()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            out = generate(policy, ids, mask, R, step=call)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
        if cuda:
            at, left = captured[-1]
            steps.append((start + seconds[-1] - at) / left)
            begin.append(at - start)
    assert out.response_mask.all() and out.values is not None
    mean = sum(seconds[1:]) / args.calls
    result = {"bench": "rollout", **vars(args), "batch": B, "prompt": P, "new_tokens": R}
    result["params"] = sum(p.numel() for p in policy.parameters())
    result["tokens_per_s" if clock is time.perf_counter else "tokens_per_cpu_s"] = round(
        B * R / mean, 1
    )
    if cuda:
        hidden, layers = SIZES[args.size][:2]
        width = 2 if args.dtype == "bfloat16" else 4
        weights = width * (result["params"] - policy.lm.get_input_embeddings().weight.numel())
        cache = width * B * (P + R / 2) * layers * 2 * hidden
        bandwidth, step = copy_bandwidth(args.device), sum(steps[1:]) / args.calls
        result |= {
            "begin_ms": round(1e3 * sum(begin[1:]) / args.calls, 1),
            "step_ms": round(1e3 * step, 3),
        }
        result |= {
            "step_gb": round((weights + cache) / 1e9, 3),
            "copy_gb_per_s": round(bandwidth / 1e9, 1),
        }
        result["share_of_bandwidth"] = round((weights + cache) / step / bandwidth, 3)
    print(json.dumps(result | {"torch": torch.__version__}))


if __name__ == "__main__":
    main()

"""Time one PPO iteration of train_ppo.py: python tests/bench/ppo.py --size small. Prints one JSON line.

The workload is the usual one for comparing PPO trainers on a CPU: a random GPT-NeoX policy, a reference and a reward model of the
same size; 64 prompts of 16 random tokens, 48 new tokens each, no EOS; 4 epochs of 4 minibatches of 16 = 16 optimizer steps;
float32. Rollout, scoring and update are counted; the first iteration, evaluation and files are not. CPU seconds of one thread are
steadier than wall clock on a shared machine. --value_model uses a separate critic.

matmul_share: the rate at which the iteration did the operations that the algorithm needs (needed_tflop: two for each weight and
token in a forward, twice that in a backward; the LM head on response tokens only; no recomputation), of the rate that a plain
matrix product of the same dtype reaches (matmul_gflop_per_s: medians before and after the run, in the same process).

On a GPU, 128 prompts of 64 tokens and 128 new ones, by wall clock:

    python tests/bench/ppo.py --device cuda --size pythia-1.4b --dtype bfloat16 --micro_batch_size 32 --iterations 3
    python tests/bench/ppo.py --device cuda --size llama-3-8b --dtype bfloat16 --micro_batch_size 8 --iterations 2 --lora_rank 16 \
        --checkpoint_activations

The line then also gives update_tflop_per_s: the update's share of needed_tflop, over its seconds. Divided by what the GPU's maker
states for dense bfloat16 products (H100 and H200: 989 TFLOP/s) it is the model FLOP utilisation.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import types

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import torch  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,  # noqa: E402
)

import train_ppo  # noqa: E402
from nanorlhf.runtime.distributed import peak_memory_mb, setup

SIZES = {  # hidden, layers, heads, intermediate, vocabulary
    "small": (128, 4, 4, 512, 512),
    "medium": (512, 8, 8, 2048, 8192),
    "pythia-1.4b": (2048, 24, 16, 8192, 50304),
    "llama-3-8b": (4096, 32, 32, 14336, 128256),  # with 8 heads of keys and values
}


def workload(size):
    """Prompts, their tokens, new tokens, prompts of a minibatch."""
    return (64, 16, 48, 16) if size in ("small", "medium") else (128, 64, 128, 32)


def make_inputs(folder, size, device="cpu"):
    """A policy, a reward model and a prompt file. Large models are stored in bfloat16.

    The last token is EOS and PAD. The policy does not emit it, so that all answers are equally long.
    """
    hidden, layers, heads, intermediate, vocab = SIZES[size]
    torch.manual_seed(0)
    shape = dict(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=intermediate, vocab_size=vocab,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=None, num_labels=1,
    )  # fmt: skip
    config = (
        LlamaConfig(**shape, num_key_value_heads=8)
        if size.startswith("llama")
        else GPTNeoXConfig(**shape)
    )
    words = {f"t{i}": i for i in range(vocab - 1)} | {"<end>": vocab - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<end>", eos_token="<end>"
    )
    for name, auto in (
        ("policy", AutoModelForCausalLM),
        ("reward", AutoModelForSequenceClassification),
    ):
        with torch.device(device):
            model = auto.from_config(config)
        if name == "policy":
            never_end(model)
        model.to(torch.bfloat16 if hidden >= 2048 else torch.float32).save_pretrained(
            f"{folder}/{name}"
        )
        tokenizer.save_pretrained(f"{folder}/{name}")
    with open(f"{folder}/prompts.jsonl", "w") as f:
        for row in torch.randint(0, vocab - 1, (320, workload(size)[1])).tolist():
            f.write(json.dumps({"prompt": " ".join(f"t{i}" for i in row)}) + "\n")


@torch.no_grad()
def never_end(lm):
    """Make the last token impossible, by a coordinate of the last hidden state that is always high.

    Llama's last norm has no bias to raise one with: of its 128,256 tokens one is rarely sampled.
    """
    norm = getattr(lm.base_model, "final_layer_norm", None)
    if norm is None:
        return
    norm.bias[0] = 30.0
    head = lm.get_output_embeddings().weight  # [V, D]
    head[:, 0] = 0.0
    head[-1] = 0.0
    head[-1, 0] = -30.0


def needed_flop(size, freeze_layers=0.0, lora=False):
    """Operations of one iteration {part: n}: rollout; reward model, reference and frozen trunk; 4 epochs of forward and backward.
    Attention scores are left out."""
    hidden, layers, _, intermediate, vocab = SIZES[size]
    llama = size.startswith("llama")  # keys and values of a quarter of the width; a gated MLP
    block = (2.5 if llama else 4) * hidden**2 + (3 if llama else 2) * hidden * intermediate
    head, frozen = hidden * vocab, int(freeze_layers * layers)
    prompts, prompt, new, _ = workload(size)
    tokens, responses = prompts * (prompt + new), prompts * new
    trunk = 2 * tokens * block  # of one block
    above = (layers - frozen) * trunk + 2 * responses * head
    once = frozen * trunk if frozen else 0  # the frozen trunk over the finished rows
    update = 4 * above * (2 if lora else 3)  # frozen weights need no gradient of their own
    return {
        "rollout": layers * trunk + 2 * responses * head,
        "score": layers * trunk + once + above,
        "update": update,
    }


def matmul_rate(dtype, device="cpu", seconds=1.5):
    """Operations a second (of CPU time where one thread runs) of a square matrix product, the median over some time."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times, end = [], train_ppo.time.perf_counter() + seconds
    while train_ppo.time.perf_counter() < end:
        begun = train_ppo.time.perf_counter()
        c = a @ b
        c[0, 0].item()  # waits for a GPU
        times.append(train_ppo.time.perf_counter() - begun)
    return 2 * size**3 / statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--iterations", type=int, default=5, help="the first is not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--value_model",
        action="store_true",
        help="a separate critic instead of a head on the policy",
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--micro_batch_size", type=int, default=16)
    parser.add_argument("--lora_rank", type=int, default=0)
    parser.add_argument("--freeze_layers", type=float, default=0.0)
    parser.add_argument("--checkpoint_activations", action="store_true")
    args = parser.parse_args()
    cpu_seconds = args.device == "cpu" and args.threads == 1
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    if cpu_seconds:
        train_ppo.time = types.SimpleNamespace(perf_counter=time.process_time)  # CPU seconds
    dtype, (prompts, _, new, minibatch) = getattr(torch, args.dtype), workload(args.size)
    rate = matmul_rate(dtype, args.device)
    with tempfile.TemporaryDirectory() as folder:
        make = multiprocessing.get_context("spawn").Process(
            target=make_inputs, args=(folder, args.size, args.device)
        )
        make.start()  # in a process of its own, whose memory is not counted
        make.join()
        config = train_ppo.Config(
            model=f"{folder}/policy", reward_model=f"{folder}/reward", dataset=f"{folder}/prompts.jsonl", output_dir=f"{folder}/run",
            steps=args.iterations, batch_size=prompts, minibatch_size=minibatch, micro_batch_size=args.micro_batch_size, ppo_epochs=4,
            max_new_tokens=new, lr=3e-6, kl_coef=0.05, eval_size=1, eval_every=0, n_samples=0, checkpoint_every=10**6, dtype=args.dtype,
            value_model=f"{folder}/policy" if args.value_model else "", freeze_layers=args.freeze_layers,
            device=args.device, compile=args.compile, lora_rank=args.lora_rank, checkpoint_activations=args.checkpoint_activations,
        )  # fmt: skip
        with open(os.devnull, "w") as sys.stdout:
            train_ppo.main(config)
        sys.stdout = sys.__stdout__
        with open(f"{folder}/run/metrics.jsonl") as f:
            records = [json.loads(line) for line in f][
                2:
            ]  # step 0 is the evaluation, step 1 the warm-up
    assert all(r["length"] == new for r in records)
    parts = {
        name: sum(r[f"seconds_{name}"] for r in records) / len(records)
        for name in ("rollout", "score", "update")
    }
    rate = (rate + matmul_rate(dtype, args.device)) / 2
    unit = "cpu_s" if cpu_seconds else "s"
    result = {
        "bench": "ppo",
        **vars(args),
        f"samples_per_{unit}": round(prompts / sum(parts.values()), 3),
    }
    result |= {f"{name}_{unit}": round(value, 4) for name, value in parts.items()}
    if not args.value_model:
        flop = needed_flop(args.size, args.freeze_layers, args.lora_rank > 0)
        total = sum(flop.values())
        result |= {
            "needed_tflop": round(total / 1e12, 3),
            "matmul_gflop_per_s": round(rate / 1e9, 1),
        }
        result["matmul_share"] = round(total / sum(parts.values()) / rate, 3)
        if args.device == "cuda":
            result["update_tflop_per_s"] = round(flop["update"] / parts["update"] / 1e12, 1)
    print(
        json.dumps(
            result
            | {
                "peak_memory_mb": round(peak_memory_mb(setup(args.device))),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()

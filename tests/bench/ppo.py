"""Time one PPO iteration of train_ppo.py: python tests/bench/ppo.py --size small.

Prints one JSON line. The workload is the usual one for comparing PPO trainers on a CPU: a random
GPT-NeoX policy, a reference and a reward model of the same size; 64 prompts of 16 random tokens, 48
new tokens each, no EOS; 4 epochs of 4 minibatches of 16 = 16 optimizer steps; float32. Rollout,
scoring and update are counted; the first iteration, evaluation and files are not. CPU seconds of
one thread are steadier than wall clock on a shared machine. --value_model uses a separate critic;
--advantage rloo, grpo or dr_grpo has no critic, and 8 answers to each of 8 prompts.

A model of your own, with LoRA: 16 answers of 32 tokens, one optimizer step. Its reward model is the
same trunk under a random head; DATASET is a file of 17 prompts or more, the last held out:

    python tests/bench/ppo.py --model FOLDER --dataset DATASET --lora_rank 16 --dtype bfloat16

matmul_share: the rate at which the iteration did the operations that the algorithm needs
(needed_tflop: two for each weight and token in a forward, twice that in a backward; the LM head on
response tokens only; no recomputation), of the rate that a plain matrix product of the same dtype
reaches (matmul_gflop_per_s: medians before and after the run, in the same process).

On a GPU, 128 prompts of 64 tokens and 128 new ones, by wall clock:

    python tests/bench/ppo.py --device cuda --size pythia-1.4b --dtype bfloat16 \
        --micro_batch_size 32 --iterations 3
    python tests/bench/ppo.py --device cuda --size llama-3-8b --dtype bfloat16 \
        --micro_batch_size 8 --iterations 2 --lora_rank 16 --checkpoint_activations

The line then also gives update_tflop_per_s: the update's share of needed_tflop, over its seconds.
Divided by what the GPU's maker states for dense bfloat16 products (H100 and H200: 989 TFLOP/s) it
is the model FLOP utilisation.
"""

import argparse
import contextlib
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
    AutoTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,  # noqa: E402
)

import train_ppo  # noqa: E402
from nanorlhf import rollout  # noqa: E402
from nanorlhf.runtime.distributed import peak_memory_mb, setup

SIZES = {  # hidden, layers, heads, intermediate, vocabulary
    "small": (128, 4, 4, 512, 512),
    "medium": (512, 8, 8, 2048, 8192),
    "pythia-1.4b": (2048, 24, 16, 8192, 50304),
    "llama-3-8b": (4096, 32, 32, 14336, 128256),  # with 8 heads of keys and values
}
PARTS = ("rollout", "score", "update")
REAL = "real"  # the size of --model


def workload(size):
    """Prompts, their tokens, new tokens, prompts of a minibatch."""
    if size == REAL:
        return 16, None, 32, 16
    if size in ("small", "medium"):
        return 64, 16, 48, 16
    return 128, 64, 128, 32


def make_config(size):
    hidden, layers, heads, intermediate, vocab = SIZES[size]
    shape = dict(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=None,
        num_labels=1,
    )
    if size.startswith("llama"):
        return LlamaConfig(**shape, num_key_value_heads=8)
    return GPTNeoXConfig(**shape)


def make_tokenizer(vocab):
    """Words t0, t1, ...; the last token is EOS and PAD."""
    words = {f"t{i}": i for i in range(vocab - 1)}
    words["<end>"] = vocab - 1
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<end>", eos_token="<end>")


def make_inputs(folder, size, device="cpu"):
    """A policy, a reward model and a prompt file. Large models are stored in bfloat16.

    The policy does not emit the last token, EOS, so that all answers are equally long.
    """
    hidden, *_, vocab = SIZES[size]
    torch.manual_seed(0)
    config = make_config(size)
    tokenizer = make_tokenizer(vocab)
    dtype = torch.bfloat16 if hidden >= 2048 else torch.float32
    autos = {"policy": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}
    # Random weights are good enough: how long a step takes depends on shapes alone.
    for name, auto in autos.items():
        with torch.device(device):
            model = auto.from_config(config)
        if name == "policy":
            never_end(model)
        model.to(dtype).save_pretrained(f"{folder}/{name}")
        tokenizer.save_pretrained(f"{folder}/{name}")

    _, n_tokens, _, _ = workload(size)
    # There are more prompts than a rollout needs, since some of them are held out.
    with open(f"{folder}/prompts.jsonl", "w") as file:
        for ids in torch.randint(0, vocab - 1, (320, n_tokens)).tolist():
            prompt = " ".join(f"t{i}" for i in ids)
            file.write(json.dumps({"prompt": prompt}) + "\n")


def make_real_inputs(folder, model, dataset):
    """A reward model of the size of --model, and as many prompts as a rollout has, and one more."""
    reward = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    reward.save_pretrained(f"{folder}/reward")
    AutoTokenizer.from_pretrained(model).save_pretrained(f"{folder}/reward")

    n_prompts, _, _, _ = workload(REAL)
    with open(dataset) as file:
        lines = file.readlines()
    with open(f"{folder}/prompts.jsonl", "w") as file:
        file.writelines(lines[: n_prompts + 1])


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
    """Operations of one iteration: {part: n}. Attention scores are left out.

    The parts are the rollout; the reward model, the reference and the frozen trunk; and 4 epochs of
    forward and backward.
    """
    hidden, layers, _, intermediate, vocab = SIZES[size]
    prompts, prompt, new, _ = workload(size)
    # Whole rows go through the blocks, response tokens alone through the LM head.
    n_tokens = prompts * (prompt + new)
    n_new = prompts * new
    # Weights of a block.
    block = 4 * hidden**2 + 2 * hidden * intermediate
    if size.startswith("llama"):
        # Keys and values have a quarter of the width; the MLP is gated.
        block = 2.5 * hidden**2 + 3 * hidden * intermediate
    # Two operations for each weight and token.
    one_block = 2 * n_tokens * block
    head = 2 * n_new * hidden * vocab
    n_frozen = int(freeze_layers * layers)
    above = (layers - n_frozen) * one_block + head
    # The frozen trunk runs once over the finished rows.
    frozen = n_frozen * one_block
    # A backward pass is two forwards, or one where frozen weights need no gradient of their own.
    passes = 2 if lora else 3
    # A token that is decoded alone needs as many operations as one in a whole row. It takes longer,
    # and so the rollout reaches a smaller share of the matmul rate.
    return {
        "rollout": layers * one_block + head,
        "score": layers * one_block + frozen + above,
        "update": 4 * passes * above,
    }


def matmul_rate(dtype, device="cpu", seconds=1.5):
    """Operations a second of a square matrix product, the median over some time.

    The clock is train_ppo's: CPU time where one thread runs.
    """
    clock = train_ppo.time.perf_counter
    size = 1024 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    # The median and not the best: the rate is that of the machine as it is, with others on it.
    times = []
    end = clock() + seconds
    while clock() < end:
        begun = clock()
        c = a @ b
        # Reading a number waits for a GPU.
        c[0, 0].item()
        times.append(clock() - begun)
    return 2 * size**3 / statistics.median(times)


def count_cpu_seconds():
    """Let train_ppo.py read CPU seconds where it reads the clock."""
    # train_ppo.py looks the name `time` up at each call, so replacing it there is enough.
    train_ppo.time = types.SimpleNamespace(perf_counter=time.process_time)


def in_a_process(function, *args):
    """Run a function in a process of its own, whose memory is not counted."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()


def read_steps(path):
    """The rows of a metrics.jsonl that count: step 0 is the evaluation, step 1 the warm-up."""
    # The warm-up takes memory from the system and chooses kernels.
    with open(path) as file:
        rows = [json.loads(line) for line in file]
    return rows[2:]


@contextlib.contextmanager
def silence():
    """What is printed meanwhile goes nowhere: the only line is the result."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def run_ppo(config):
    """train_ppo.py in silence -> its steps' metrics."""
    with silence():
        train_ppo.main(config)
    return read_steps(f"{config.output_dir}/metrics.jsonl")


def make_run(folder, args):
    """The configuration of the run that is timed."""
    prompts, _, new, minibatch = workload(args.size)
    policy = args.model or f"{folder}/policy"
    return train_ppo.Config(
        model=policy,
        reward_model=f"{folder}/reward",
        value_model=policy if args.value_model else "",
        advantage=args.advantage,
        dataset=f"{folder}/prompts.jsonl",
        output_dir=f"{folder}/run",
        steps=args.iterations,
        batch_size=prompts,
        minibatch_size=minibatch,
        micro_batch_size=args.micro_batch_size,
        ppo_epochs=1 if args.model else 4,
        max_new_tokens=new,
        lr=3e-6,
        kl_coef=0.05,
        eval_size=1,
        eval_every=0,
        n_samples=0,
        checkpoint_every=10**6,
        dtype=args.dtype,
        freeze_layers=args.freeze_layers,
        device=args.device,
        compile=args.compile,
        lora_rank=args.lora_rank,
        frozen_dtype=args.frozen_dtype,
        checkpoint_activations=args.checkpoint_activations,
    )


def compare_with_matmul(args, seconds, rate):
    """The columns about operations: {part: seconds} beside what a matrix product reaches."""
    flop = needed_flop(args.size, args.freeze_layers, args.lora_rank > 0)
    total = sum(flop.values())
    columns = {
        "needed_tflop": round(total / 1e12, 3),
        "matmul_gflop_per_s": round(rate / 1e9, 1),
        "matmul_share": round(total / sum(seconds.values()) / rate, 3),
    }
    if args.device == "cuda":
        columns["update_tflop_per_s"] = round(flop["update"] / seconds["update"] / 1e12, 1)
    return columns


def read_flags():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--model", default="", help="a causal LM's folder, instead of --size")
    parser.add_argument("--dataset", default="", help="a JSONL file of prompts for --model")
    parser.add_argument("--iterations", type=int, default=5, help="the first is not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--value_model",
        action="store_true",
        help="a separate critic instead of a head on the policy",
    )
    parser.add_argument(
        "--advantage",
        choices=train_ppo.ADVANTAGES,
        default="gae",
        help="other than gae: no value function",
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--micro_batch_size", type=int, default=16)
    parser.add_argument("--lora_rank", type=int, default=0)
    parser.add_argument("--freeze_layers", type=float, default=0.0)
    parser.add_argument("--frozen_dtype", default="float32")
    parser.add_argument("--checkpoint_activations", action="store_true")
    return parser.parse_args()


def main():
    args = read_flags()
    if args.model:
        args.size = REAL
        # No token ends an answer. (never_end() would change the weights of a model of one's own.)
        rollout.end_ids = lambda tokenizer: None
    unit = "s"
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
        if args.threads == 1:
            count_cpu_seconds()
            unit = "cpu_s"
    dtype = getattr(torch, args.dtype)
    prompts, _, new, _ = workload(args.size)

    # The rate is measured before and after, since the machine may slow down in between.
    rate_before = matmul_rate(dtype, args.device)
    with tempfile.TemporaryDirectory() as folder:
        if args.model:
            in_a_process(make_real_inputs, folder, args.model, args.dataset)
        else:
            in_a_process(make_inputs, folder, args.size, args.device)
        steps = run_ppo(make_run(folder, args))
    rate = (rate_before + matmul_rate(dtype, args.device)) / 2

    # No answer ended early: samples a second compare only where all answers are equally long.
    for step in steps:
        assert step["length"] == new
    seconds = {}
    for part in PARTS:
        seconds[part] = statistics.mean(step[f"seconds_{part}"] for step in steps)

    result = {"bench": "ppo", **vars(args)}
    result[f"samples_per_{unit}"] = round(prompts / sum(seconds.values()), 3)
    for part in PARTS:
        result[f"{part}_{unit}"] = round(seconds[part], 4)
    if not args.value_model and not args.model:
        result |= compare_with_matmul(args, seconds, rate)
    result["peak_memory_mb"] = round(peak_memory_mb(setup(args.device)))
    result["torch"] = torch.__version__
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""What a PPO step needs on each GPU: python tests/bench/memory.py prints one JSON line, a table by formula (GB = 1e9 bytes).

    python tests/bench/memory.py              Pythia-1.4B trained whole, Llama-3-8B with LoRA and whole; 1, 4 and 8 GPUs
    python tests/bench/memory.py --measure    the `medium` size of bench/ppo.py on a CPU: one process, and FSDP on two, beside the formula

What is counted, for N weights of which N' are trained, W processes, s = W in shards (FSDP) and 1 otherwise:

    parameters   4 N / s            float32, frozen ones too: the masters of a bfloat16 run are float32
    gradients    4 N' / s
    Adam         8 N' / s           two moments
    reference    4 N / s            0 with LoRA: it is the policy with its adapters off
    reward       4 N_r / s          a model of the policy's size without its LM head
  and the largest of what is there one after the other:
    rollout      [c N] + KV cache 2 c' L b (P + R) D_kv + 24 b V    of b responses; [..]: gathered once (FSDP), or autocast's
                                    bfloat16 copies (DDP, bfloat16 only); in brackets c = 2 bytes in bfloat16, else 4
    scoring      [c N_r]            the gathered reward model, one at a time
    update       [c (N_root + 2 N_block) + (c + 4) max(N_root', N_block')] + m T L (activations of a token in a block) + logits
                                    FSDP: the root, two blocks, and one unit's gradients; DDP: autocast's copies
  with activations of 34 D bytes in bfloat16 (Korthikanti et al. 2022, without the attention matrix, which SDPA does not keep; the
  17 D numbers of a block with an MLP of 4 D are scaled to other widths), or of 2 D with --checkpoint_activations and one block whole,
  and logits of four float32 chunks of 512 MB (models.MAX_LOGITS; CPU: 64) at most. Buffers of NCCL, CUDA's context (0.5 GB) and fragmentation
  (up to a tenth) come on top.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]


@dataclass
class Shape:
    hidden: int
    layers: int
    mlp: int
    mlp_matrices: int
    kv: int  # width of the keys: n_kv_heads * head_dim
    vocabulary: int

    @property
    def block(self):
        return self.hidden * (2 * self.hidden + 2 * self.kv + self.mlp_matrices * self.mlp)

    @property
    def root(self):
        return 2 * self.vocabulary * self.hidden

    def adapters(self, rank):
        """A and B of every linear layer of a block: rank * (inputs + outputs)."""
        attention = 2 * 2 * self.hidden + 2 * (self.hidden + self.kv)
        return rank * (attention + self.mlp_matrices * (self.hidden + self.mlp))

    @property
    def activations(self):
        """Numbers kept of one token in one block: 17 D where the MLP has two matrices of width 4 D."""
        return 5 * self.hidden + 2 * (self.hidden + self.kv) + self.mlp_matrices * self.mlp


PYTHIA = Shape(hidden=2048, layers=24, mlp=8192, mlp_matrices=2, kv=2048, vocabulary=50304)
LLAMA = Shape(hidden=4096, layers=32, mlp=14336, mlp_matrices=3, kv=1024, vocabulary=128256)
MEDIUM = Shape(hidden=512, layers=8, mlp=2048, mlp_matrices=2, kv=512, vocabulary=8193)


def needs(
    shape,
    world=1,
    sharded=False,
    dtype="bfloat16",
    lora=0,
    rollout=64,
    micro_batch=8,
    tokens=1024,
    checkpointed=True,
):
    """Bytes on each GPU: {part: bytes}, `peak` with the largest phase. `rollout`: responses a GPU; `tokens`: prompt + response."""
    s, c = (world if sharded else 1), (2 if dtype == "bfloat16" else 4)
    block_adapters = shape.adapters(lora) if lora else 0
    n = shape.layers * (shape.block + block_adapters) + shape.root
    n_trained = shape.layers * block_adapters if lora else n
    n_reward = n - shape.root // 2 - shape.layers * block_adapters
    trained_root, trained_block = (0, block_adapters) if lora else (shape.root, shape.block)
    # Autocast keeps copies of what is trained (in a rollout, of all weights); a backward pass past LoRA keeps those of frozen blocks too.
    backward = (1 if checkpointed else shape.layers) * shape.block if lora else 0
    copies = c * (n_trained + backward) if dtype == "bfloat16" else 0
    cache = 2 * c * shape.layers * rollout * tokens * shape.kv
    kept = micro_batch * tokens * c
    if checkpointed:
        activations = kept * (shape.layers * shape.hidden + shape.activations)
    else:
        activations = kept * shape.layers * shape.activations
    units = c * (shape.root + 2 * shape.block) + (c + 4) * max(trained_root, trained_block)
    logits = 4 * 4 * min(2**27, micro_batch * tokens * shape.vocabulary)
    fixed = {
        "parameters": 4 * n / s,
        "gradients": 4 * n_trained / s,
        "adam": 8 * n_trained / s,
        "reference": 0 if lora else 4 * n / s,
        "reward": 4 * n_reward / s,
    }
    phases = {
        "rollout": (c * n if sharded or dtype == "bfloat16" else 0)
        + cache
        + 24 * rollout * shape.vocabulary,
        "scoring": c * n_reward if sharded else 0,
        "update": (units if sharded else copies) + activations + logits,
    }
    return {**fixed, **phases, "peak": sum(fixed.values()) + max(phases.values())}


def table():
    rows = []
    for name, shape, lora in (
        ("1.4B, all weights", PYTHIA, 0),
        ("8B, LoRA of rank 16", LLAMA, 16),
        ("8B, all weights", LLAMA, 0),
    ):
        for world, sharded in ((1, False), (4, False), (4, True), (8, True)):
            parts = needs(shape, world, sharded, lora=lora)
            row = {
                "model": name,
                "gpus": world,
                "distributed": "fsdp" if sharded else "ddp" if world > 1 else "-",
            }
            rows.append(
                row
                | {part: round(size / 1e9, 1) for part, size in parts.items()}
                | {"fits_80_gb": parts["peak"] * 1.1 < 79e9}
            )
    return {"bench": "memory", "unit": "GB a GPU", "dtype": "bfloat16", "rollout": 64, "micro_batch": 8, "tokens": 1024,
            "checkpoint_activations": True, "rows": rows}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------------ measured


def worker(folder, distributed):
    """One process of a PPO run at the medium size: writes what it held at its last optimizer step, and its peak up to there."""
    import torch
    import torch._dynamo  # these two and the next are imported sooner or later: before the first look at the memory
    import torch.distributed.fsdp
    import transformers.models.gpt_neox.modeling_gpt_neox  # noqa: F401

    import train_ppo
    from nanorlhf.runtime import distributed as d
    from nanorlhf.runtime.fsdp import local_bytes

    torch.set_num_threads(1)
    d.keep_freed_memory = lambda: None
    dist, held, real = d.setup("cpu", distributed), {}, train_ppo.optimizer_step

    def optimizer_step(optimizer, module, *args):
        gradients = local_bytes(module)["gradients"]
        norm = real(optimizer, module, *args)
        held.update(
            local_bytes(module, optimizer),
            gradients=gradients,
            peak=(d.peak_memory_mb(dist) - before) * 2**20,
        )
        return norm

    train_ppo.optimizer_step = optimizer_step
    before = d.peak_memory_mb(dist)
    train_ppo.main(train_ppo.Config(
        model=f"{folder}/policy", reward_model=f"{folder}/reward", dataset=f"{folder}/prompts.jsonl", output_dir=f"{folder}/{distributed}",
        steps=2, batch_size=16, minibatch_size=16, micro_batch_size=4, ppo_epochs=2, max_new_tokens=48, lr=3e-6, eval_size=2, eval_every=0,
        n_samples=0, checkpoint_every=10**6, device="cpu", distributed=distributed,
    ))  # fmt: skip
    with open(f"{folder}/{distributed}_{dist.rank}.json", "w") as f:
        json.dump(held, f)
    d.shutdown()


def measure():
    from ppo import make_inputs

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(folder, "medium")
        for world, distributed in ((1, "ddp"), (2, "fsdp")):
            torchrun = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={world}",
            ]
            env = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "MALLOC_MMAP_THRESHOLD_": "1000000",
            }  # freed memory is given back
            command = [*torchrun, os.path.abspath(__file__), "--worker", folder, distributed]
            subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
            ranks = [
                json.load(open(f"{folder}/{distributed}_{rank}.json")) for rank in range(world)
            ]
            result = {
                name: max(rank[name] for rank in ranks) for name in ranks[0]
            }  # of the rank that holds most
            expected = needs(
                MEDIUM, world, distributed == "fsdp", "float32", 0, 16 // world, 4, 64, False
            )
            parts = {
                "parameters": "parameters",
                "gradients": "gradients",
                "optimizer": "adam",
                "peak": "peak",
            }
            pairs = {
                f"{name}_mb": [round(x / 1e6, 1) for x in (result[name], expected[part])]
                for name, part in parts.items()
            }
            rows.append({"processes": world, "distributed": distributed, **pairs})
    return {"bench": "memory", "size": "medium", "each": "[measured, by formula]", "rows": rows}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker)
    print(json.dumps(measure() if args.measure else table()))


if __name__ == "__main__":
    main()

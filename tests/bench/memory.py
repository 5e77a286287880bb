"""What a PPO step needs on each GPU: python tests/bench/memory.py prints one JSON line.

    python tests/bench/memory.py              a table by formula, in GB = 1e9 bytes: Pythia-1.4B
                                              trained whole, Llama-3-8B with LoRA (also with
                                              --frozen_dtype bfloat16) and whole; 1, 4 and 8 GPUs
    python tests/bench/memory.py --compile    the first three of these with --compile, on one GPU
    python tests/bench/memory.py --recipes    the same for PPO in the recipes on the studies' pages
    python tests/bench/memory.py --measure    the `medium` size of bench/ppo.py on a CPU: one
                                              process, and FSDP on two, beside the formula

What is counted, for N weights of which N' are trained, W processes, and s = W in shards (FSDP), 1
otherwise:

    parameters   4 N / s      float32, frozen ones too: a bfloat16 run's masters are float32;
                              with --frozen_dtype bfloat16 2 bytes less for each of N_c weights, of
                              the frozen linear layers: (4 N - 2 N_c) / s
    gradients    4 N' / s
    Adam         8 N' / s     two moments
    reference    4 N / s      0 with LoRA: it is the policy with its adapters off; frozen blocks are
                              the policy's own, but for FSDP; in bfloat16 like frozen weights
    reward       4 N_r / s    a model of the policy's size without its LM head, if nothing else is
                              named; the members of an ensemble stand there together
    kept         [2 N_l] + KV cache 2 c L b (P + R) D_kv + 24 b V
                              with --compile on a GPU, not with FSDP: what rollouts keep of one
                              another, for b responses. [..]: copies of the N_l weights of linear
                              layers that are not in bfloat16 already (bfloat16 only). Evaluations
                              keep another cache, for as many responses as they have at a time

and the largest of what is there one after the other, with c = 2 bytes in bfloat16, else 4:

    rollout      [c N] + KV cache 2 c L b (P + R) D_kv + 24 b V    of b responses
                 [..]: gathered once (FSDP), or autocast's bfloat16 copies (DDP, bfloat16 only),
                 of N - N_c weights. None of this where it is kept; prompts of P tokens then have a
                 cache of their own while they are read, 2 c L b P D_kv (not counted here)
    scoring      [c N_r]
                 the gathered reward model, one at a time
    update       [c (N_root + 2 N_block) + (c + 4) max(N_root', N_block')]
                 + m T L (activations of a token in a block) + logits
                 [..]: with FSDP the root, two blocks, and one unit's gradients; with DDP autocast's
                 copies instead, none of the N_c weights

Activations are 34 D bytes in bfloat16 (Korthikanti et al. 2022, without the attention matrix, which
SDPA does not keep; the 17 D numbers of a block with an MLP of 4 D are scaled to other widths), or
2 D with --checkpoint_activations and one block whole. Logits are four float32 chunks of 1 GB at
most (models.MAX_LOGITS; CPU: 64 MB). Buffers of NCCL, CUDA's context (0.5 GB) and fragmentation (up
to a tenth) come on top.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests"), os.path.dirname(os.path.abspath(__file__))]


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

    def without_head(self, layers=0):
        """How many weights a reward model has: the embeddings, and all blocks or the first ones."""
        return (layers or self.layers) * self.block + self.root // 2

    def adapters(self, rank):
        """A and B of every linear layer of a block: rank * (inputs + outputs)."""
        attention = 2 * 2 * self.hidden + 2 * (self.hidden + self.kv)
        return rank * (attention + self.mlp_matrices * (self.hidden + self.mlp))

    @property
    def activations(self):
        """Numbers kept of one token in one block: 17 D where the MLP has two matrices of 4 D."""
        return 5 * self.hidden + 2 * (self.hidden + self.kv) + self.mlp_matrices * self.mlp


PYTHIA_70M = Shape(hidden=512, layers=6, mlp=2048, mlp_matrices=2, kv=512, vocabulary=50304)
PYTHIA_160M = Shape(hidden=768, layers=12, mlp=3072, mlp_matrices=2, kv=768, vocabulary=50304)
PYTHIA = Shape(hidden=2048, layers=24, mlp=8192, mlp_matrices=2, kv=2048, vocabulary=50304)
LLAMA_7B = Shape(hidden=4096, layers=32, mlp=11008, mlp_matrices=3, kv=4096, vocabulary=32000)
LLAMA = Shape(hidden=4096, layers=32, mlp=14336, mlp_matrices=3, kv=1024, vocabulary=128256)
MEDIUM = Shape(hidden=512, layers=8, mlp=2048, mlp_matrices=2, kv=512, vocabulary=8193)


def needs(
    shape,
    world=1,
    sharded=False,
    dtype="bfloat16",
    lora=0,
    frozen=0.0,
    frozen_dtype="float32",
    members=None,
    rollout=64,
    micro_batch=8,
    tokens=1024,
    checkpointed=True,
    compiled=False,
):
    """Bytes on each GPU: {part: bytes}, and `peak`, which counts the largest phase only.

    frozen: the share of blocks that is frozen, with the embeddings; members: how many weights each
    reward model has; rollout: responses a GPU; tokens: prompt + response. Symbols as at the head of
    this file.
    """
    s = world if sharded else 1
    c = 2 if dtype == "bfloat16" else 4
    L = shape.layers

    N, N_trained, N_cast, trained_root, trained_block = count_weights(
        shape, lora, frozen, frozen_dtype
    )
    if members is None:
        members = [shape.without_head()]

    # With LoRA the reference is the policy itself. Without FSDP it shares the frozen weights.
    bytes_of_frozen = 2 if frozen_dtype == "bfloat16" else 4
    if lora:
        reference = 0
    elif sharded:
        # It is frozen whole, and its embeddings stay in float32.
        N_embeddings = shape.root // 2
        reference = (4 * N_embeddings + bytes_of_frozen * (N - N_embeddings)) / s
    else:
        reference = bytes_of_frozen * N_trained

    parameters = 4 * N - 2 * N_cast
    # These are there all the time, whichever phase runs.
    fixed = {
        "parameters": parameters / s,
        "gradients": 4 * N_trained / s,
        "adam": 8 * N_trained / s,
        "reference": reference,
        "reward": 4 * sum(members) / s,
    }
    # These are there for a phase. Phases follow each other, so only the largest one counts. An
    # update has four chunks of float32 logits, of at most 2^28 numbers each.
    kv_and_step = 2 * c * L * rollout * tokens * shape.kv + 24 * rollout * shape.vocabulary
    phases = {
        "rollout": kv_and_step,
        "scoring": 0,
        "update": 4 * 4 * min(2**28, micro_batch * tokens * shape.vocabulary),
    }
    # FSDP gathers the weights that a phase computes with. Without FSDP each process has them, and
    # autocast adds copies in bfloat16.
    if sharded:
        phases["rollout"] += c * N
        phases["scoring"] += c * max(members, default=0)
        phases["update"] += c * (shape.root + 2 * shape.block)
        phases["update"] += (c + 4) * max(trained_root, trained_block)
    elif dtype == "bfloat16":
        phases["rollout"] += c * (N - N_cast)
        # Autocast keeps copies of what is trained. A backward pass past LoRA keeps copies of frozen
        # blocks too: of one at a time with checkpointed activations, else of all.
        phases["update"] += c * N_trained
        if lora and not N_cast:
            n_blocks = 1 if checkpointed else L
            phases["update"] += c * n_blocks * shape.block
    # With --compile a rollout's buffers stay for the next one: no phase frees them.
    if compiled and not sharded:
        fixed["kept"] = kv_and_step
        if dtype == "bfloat16":
            # Adapters and embeddings have no copies.
            N_linear = L * shape.block + shape.root // 2
            fixed["kept"] += 2 * (N_linear - N_cast)
        phases["rollout"] = 0
    # A forward keeps activations of a micro-batch's tokens for the backward pass.
    of_a_block = micro_batch * tokens * c * shape.activations
    if checkpointed:
        phases["update"] += micro_batch * tokens * c * L * shape.hidden + of_a_block
    else:
        phases["update"] += L * of_a_block
    return {**fixed, **phases, "peak": sum(fixed.values()) + max(phases.values())}


def count_weights(shape, lora, frozen, frozen_dtype):
    """How many weights the policy has, how many of them are trained, and how many in bfloat16.

    -> N, N', N_c, and the trained ones of the root and of a block: N_root', N_block'
    """
    L = shape.layers
    adapters = shape.adapters(lora)  # of a block
    N = L * (shape.block + adapters) + shape.root
    N_trained = N
    trained_root = shape.root
    trained_block = shape.block
    if lora:
        N_trained = L * adapters
        trained_root = 0
        trained_block = adapters
    if frozen:
        # What is left are the upper blocks and the LM head, which is half of the root.
        trained_root = shape.root // 2
        N_trained = (L - int(frozen * L)) * shape.block + trained_root

    # In bfloat16 are frozen blocks and, with LoRA, the LM head.
    N_cast = 0
    if frozen_dtype == "bfloat16":
        N_cast = int(frozen * L) * shape.block
        if lora:
            N_cast = L * shape.block + shape.root // 2
    return N, N_trained, N_cast, trained_root, trained_block


def make_row(model, shape, world, sharded, **settings):
    """A row of the table, in GB. settings: of needs()."""
    distributed = "-"
    if world > 1:
        distributed = "fsdp" if sharded else "ddp"
    row = {"model": model, "gpus": world, "distributed": distributed}
    parts = needs(shape, world, sharded, **settings)
    for part, size in parts.items():
        row[part] = round(size / 1e9, 1)
    # With the tenth that comes on top.
    row["fits_80_gb"] = parts["peak"] * 1.1 < 79e9
    return row


MODELS = [
    ("1.4B, all weights", PYTHIA, {}),
    ("8B, LoRA of rank 16", LLAMA, {"lora": 16}),
    ("8B, LoRA, base in bfloat16", LLAMA, {"lora": 16, "frozen_dtype": "bfloat16"}),
    ("8B, all weights", LLAMA, {}),
]


def make_table():
    rows = []
    for model, shape, settings in MODELS:
        for world, sharded in ((1, False), (4, False), (4, True), (8, True)):
            rows.append(make_row(model, shape, world, sharded, **settings))
    return describe(rows)


def make_compiled_table():
    """One GPU, or DDP, with --compile, where rollouts keep what they need."""
    # The fourth, 8B with all weights, does not fit on one GPU.
    rows = []
    for model, shape, settings in MODELS[:3]:
        rows.append(make_row(model, shape, 1, False, compiled=True, **settings))
    return describe(rows)


def describe(rows):
    """A table, with what all its rows share."""
    return {
        "bench": "memory",
        "unit": "GB a GPU",
        "dtype": "bfloat16",
        "rollout": 64,
        "micro_batch": 8,
        "tokens": 1024,
        "checkpoint_activations": True,
        "rows": rows,
    }


# A SARM of the first 16 blocks, with 65,536 features: an encoder and a decoder.
SARM_4B = LLAMA.without_head(layers=16) + 2 * 65536 * LLAMA.hidden
# PPO of each recipe as on the study's page: its shape, whether it is in shards, how many answers a
# rollout has on 1, 4 and 8 GPUs, and settings of needs().
OVEROPTIMISATION = {
    "shape": PYTHIA,
    "answers": [32, 32, 32],
    "frozen": 0.92,
    "members": 5 * [PYTHIA_70M.without_head()],
    "tokens": 520,
    "micro_batch": 8,
    "checkpointed": False,
}
CUE_CONTROL = {
    "shape": LLAMA,
    "fsdp": True,
    "answers": [128, 128, 128],
    "lora": 16,
    "members": [SARM_4B],
    "tokens": 512,
}
FEEDBACK_PATTERNS = {
    "shape": PYTHIA_160M,
    "answers": [64, 64, 64],
    "members": [],
    "tokens": 32,
    "micro_batch": 16,
    "checkpointed": False,
}
GENERALISATION = {
    "shape": LLAMA_7B,
    "fsdp": True,
    "answers": [64, 256, 256],
    "frozen": 0.8,
    "tokens": 560,
    "micro_batch": 4,
}
RECIPES = {
    "overoptimisation": OVEROPTIMISATION,
    "cue_control": CUE_CONTROL,
    "feedback_patterns": FEEDBACK_PATTERNS,
    "generalisation": GENERALISATION,
}


def make_recipes():
    """PPO of each recipe on 1, 4 and 8 GPUs."""
    rows = []
    for recipe, settings in RECIPES.items():
        settings = dict(settings)
        shape = settings.pop("shape")
        fsdp = settings.pop("fsdp", False)
        answers = settings.pop("answers")
        for world, n_answers in zip((1, 4, 8), answers):
            sharded = fsdp and world > 1
            rollout = n_answers // world
            rows.append(make_row(recipe, shape, world, sharded, rollout=rollout, **settings))
    return {"bench": "memory", "unit": "GB a GPU", "dtype": "bfloat16", "rows": rows}


# --------------------------------------------------------------------------------------- measured


def work(folder, distributed):
    """One process of a PPO run at the medium size -> a file of what it held.

    That is at its last optimizer step, with its peak up to there.
    """
    # Dynamo and the next two are imported sooner or later: before the first look at the memory.
    import torch
    import torch._dynamo
    import torch.distributed.fsdp
    import transformers.models.gpt_neox.modeling_gpt_neox  # noqa: F401
    from held_bytes import local_bytes

    import train_ppo
    from nanorlhf.runtime import distributed as d

    torch.set_num_threads(1)
    # Freed memory has to go back to the system, so that the peak is what was in use at once.
    d.keep_freed_memory = lambda: None
    dist = d.setup("cpu", distributed)
    # The optimizer step is wrapped: gradients are there right before it, the moments after it.
    held = {}
    real_step = train_ppo.optimizer_step

    def step_and_look(optimizer, module, *args):
        # The step frees the gradients.
        gradients = local_bytes(module)["gradients"]
        norm = real_step(optimizer, module, *args)
        held.update(local_bytes(module, optimizer))
        held["gradients"] = gradients
        held["peak"] = (d.peak_memory_mb(dist) - before) * 2**20
        return norm

    train_ppo.optimizer_step = step_and_look
    before = d.peak_memory_mb(dist)
    config = train_ppo.Config(
        model=f"{folder}/policy",
        reward_model=f"{folder}/reward",
        dataset=f"{folder}/prompts.jsonl",
        output_dir=f"{folder}/{distributed}",
        steps=2,
        batch_size=16,
        minibatch_size=16,
        micro_batch_size=4,
        ppo_epochs=2,
        max_new_tokens=48,
        lr=3e-6,
        eval_size=2,
        eval_every=0,
        n_samples=0,
        checkpoint_every=10**6,
        device="cpu",
        distributed=distributed,
    )
    train_ppo.main(config)
    with open(f"{folder}/{distributed}_{dist.rank}.json", "w") as file:
        json.dump(held, file)
    d.shutdown()


def run_workers(folder, world, distributed):
    """A run of so many processes -> {part: bytes} of the rank that holds most."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    worker = [os.path.abspath(__file__), "--worker", folder, distributed]
    # With the threshold freed memory is given back.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    subprocess.run(
        [*torchrun, f"--nproc_per_node={world}", *worker],
        env=env,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    # Every rank has to fit: the largest one counts.
    most = {}
    for rank in range(world):
        with open(f"{folder}/{distributed}_{rank}.json") as file:
            held = json.load(file)
        for part, size in held.items():
            most[part] = max(size, most.get(part, 0))
    return most


# {what a worker calls it: what the formula does}
NAMES = {"parameters": "parameters", "gradients": "gradients", "optimizer": "adam", "peak": "peak"}


def measure():
    from ppo import make_inputs

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(folder, "medium")
        for world, distributed in ((1, "ddp"), (2, "fsdp")):
            measured = run_workers(folder, world, distributed)
            by_formula = needs(
                MEDIUM,
                world,
                sharded=distributed == "fsdp",
                dtype="float32",
                rollout=16 // world,
                micro_batch=4,
                tokens=64,
                checkpointed=False,
            )
            row = {"processes": world, "distributed": distributed}
            for name, part in NAMES.items():
                row[f"{name}_mb"] = [
                    round(measured[name] / 1e6, 1),
                    round(by_formula[part] / 1e6, 1),
                ]
            rows.append(row)
    return {"bench": "memory", "size": "medium", "each": "[measured, by formula]", "rows": rows}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recipes", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*args.worker)
    elif args.measure:
        print(json.dumps(measure()))
    elif args.compile:
        print(json.dumps(make_compiled_table()))
    elif args.recipes:
        print(json.dumps(make_recipes()))
    else:
        print(json.dumps(make_table()))


if __name__ == "__main__":
    main()

"""The phases of gpu.py, measure_NAME: generators of rows {"variant": name, column: value}.

So what a phase has measured is kept if it fails or is late.

    B sequences, P prompt tokens, R response tokens, C columns of a cache, n of them real,
    M rows of a matrix product, H heads, d numbers of a head
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import memory  # noqa: E402
import ppo  # noqa: E402 (it lets the next ones be found)
import rollout  # noqa: E402
import torch  # noqa: E402
from torch.nn.functional import linear, scaled_dot_product_attention  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import train_ppo  # noqa: E402
from nanorlhf.evaluation import forward
from nanorlhf.hf.blocks import sampling, speed_up
from nanorlhf.hf.lora import cast_frozen, choose_trained
from nanorlhf.models import Policy
from nanorlhf.packing import Packed
from nanorlhf.rollout import generate
from nanorlhf.runtime.distributed import autocast, peak_memory_mb, setup
from nanorlhf.runtime.fsdp import checkpoint_activations
from nanorlhf.runtime.optim import adamw

PEAK = 989e12  # operations a second: dense bfloat16 products, as stated for an H100 or H200
COPIED_GB = {"cuda": 4, "cpu": 0.02}
# A kernel is of the first class of which a word stands in its name. (On a CPU: an operator.)
KERNELS = {
    "optimizer": ("multi_tensor", "adam"),
    "triton": ("triton",),
    "attention": ("flash", "fmha", "cudnn", "attention"),
    "product": ("nvjet", "gemm", "cutlass", "xmma", "sm90", "addmm", "::mm", "bmm"),
    "reduce": ("reduce",),
    "copy": ("copy", "memcpy", "memset"),
    "other": ("",),
}
RANGES = ("Optimizer.", "Torch-Compiled", "## ")  # names of what is no kernel, but holds some
SHAPES = {
    "small": memory.Shape(128, layers=4, mlp=512, mlp_matrices=2, kv=128, vocabulary=512),
    "pythia-1.4b": memory.PYTHIA,
    "llama-3-8b": memory.LLAMA,
}


# ------------------------------------------------------------------------------------- measuring


def time_call(function, device):
    """Seconds of a call, by wall clock, until the device has done its work; and what it returns."""
    # A call only queues work for a GPU, so the clock has to wait for it at both ends.
    rollout.synchronize(device)
    begun = time.perf_counter()
    result = function()
    rollout.synchronize(device)
    return time.perf_counter() - begun, result


def median_seconds(function, device, n=3):
    return statistics.median(time_call(function, device)[0] for _ in range(n))


def short_seconds(function, device):
    """Seconds of a short call. On a GPU 100 of them are one CUDA graph: none waits for a launch."""
    if device == "cpu":
        return median_seconds(function, device)
    # The first call compiles and takes memory, which must not become a part of the graph.
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(100):
            function()
    return median_seconds(graph.replay, device, n=5) / 100


def profile_kernels(function, device):
    """The columns about the kernels of a call: how many, ms by class, the largest unnamed ones."""
    is_cuda = device == "cuda"
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        function()
        rollout.synchronize(device)

    # An event's own time excludes the events inside it, so that the sum counts nothing twice.
    n_kernels = 0
    ms_by_class = dict.fromkeys(KERNELS, 0.0)
    others = {}
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        ms = microseconds / 1e3
        if ms == 0 or event.key.startswith(RANGES):
            continue
        n_kernels += event.count
        kind = class_of(event.key)
        ms_by_class[kind] += ms
        if kind == "other":
            others[event.key[:80]] = round(ms, 3)
    # The largest kernels without a class are listed: they show which class is missing.
    largest = sorted(others, key=others.get, reverse=True)[:12]
    return {
        "kernels": n_kernels,
        "ms_by_class": {kind: round(ms, 3) for kind, ms in ms_by_class.items()},
        "others": {name: others[name] for name in largest},
    }


def class_of(kernel):
    for kind, words in KERNELS.items():
        if any(word in kernel.lower() for word in words):
            return kind


def begin_peak(device):
    """Give back what nobody holds. The peak of memory counts from here."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device):
    return round(peak_memory_mb(setup(device)) * 2**20 / 1e9, 2)


# ------------------------------------------------------------------------------- phase: ceilings


def measure_ceilings(args):
    """What the machine reaches: a large copy, and products of the shapes of decoding and update."""
    bandwidth = rollout.copy_bandwidth(args.device, COPIED_GB[args.device])
    yield {"variant": "copy", "gb_per_s": round(bandwidth / 1e9, 1)}
    rate = ppo.matmul_rate(torch.bfloat16, args.device)
    yield {"variant": "square product", "tflop_per_s": round(rate / 1e12, 3)}

    D, _, _, mlp, vocab = ppo.SIZES[args.size]
    B, P, R, minibatch = ppo.workload(args.size)
    # A decode step multiplies B rows, an update all tokens of a minibatch, by the same weights.
    for M in (B, minibatch * (P + R)):
        for n_in, n_out in ((D, 3 * D), (D, D), (D, mlp), (mlp, D), (D, vocab)):
            x = torch.randn(M, n_in, device=args.device, dtype=torch.bfloat16)
            weight = torch.randn(n_out, n_in, device=args.device, dtype=torch.bfloat16)
            seconds = short_seconds(partial(linear, x, weight), args.device)
            row = {"variant": f"{M} x {n_in} x {n_out}", "us": round(1e6 * seconds, 1)}
            # Two operations for each weight and row: 2 M n_in n_out.
            yield {**row, "tflop_per_s": round(2e-12 * M * n_in * n_out / seconds, 3)}


# ----------------------------------------------------------------------------------- phase: step


def measure_step(args):
    """Decoding: today's static loop, the one of --compile, and transformers' own generate."""
    B, P, R, shortest = rollout.workload(args.size)
    ids, mask = rollout.draw_prompts(ppo.SIZES[args.size][-1], B, P, shortest)
    ids = ids.to(args.device)
    mask = mask.to(args.device)
    bandwidth = rollout.copy_bandwidth(args.device, COPIED_GB[args.device])
    replays = rollout.note_replays()

    # Prompts and noise are the same: --compile has to give the same answers, up to rounding.
    row, expected = decode(args, ids, mask, R, bandwidth, replays, compile=False)
    yield {"variant": "now", **row}
    compiled, answers = decode(args, ids, mask, R, bandwidth, replays, compile=True)
    yield {"variant": "compile", **compiled, **compare_answers(answers, expected)}

    # Its weights are in bfloat16 throughout. On a GPU it compiles its whole step, if it may.
    lm = make_policy(args).lm.to(torch.bfloat16)
    settings = {"max_new_tokens": R, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    for variant, disable in (("generate, not compiled", True), ("generate", False)):
        settings |= {"cache_implementation": "static", "disable_compile": disable}
        answer = partial(lm.generate, input_ids=ids, attention_mask=mask, **settings)
        # The first call may compile: its seconds are a column of their own.
        first, _ = time_call(answer, args.device)
        seconds = median_seconds(answer, args.device)
        yield {
            "variant": variant,
            "first_s": round(first, 2),
            "seconds": round(seconds, 3),
            "times_now": round(seconds / row["seconds"], 2),
            "times_compile": round(seconds / compiled["seconds"], 2),
        }


def decode(args, ids, mask, R, bandwidth, replays, compile):
    """The row of a policy's rollouts, and the answers of the last one."""
    begin_peak(args.device)
    policy = make_policy(args)
    speed_up(policy.lm, torch.device(args.device), "bfloat16", compile)

    def sample(call):
        with sampling(policy.lm), torch.autocast(args.device, torch.bfloat16):
            return generate(policy, ids, mask, R, step=call, static=True)

    seconds, answers = rollout.time_rollouts(sample, 3, args.device, time.perf_counter, replays)
    whole = statistics.median(seconds["all"])
    # On a CPU a step is a part of the whole.
    begin = statistics.median(seconds["begin"] or [0.0])
    step = statistics.median(seconds["step"] or [whole / R])
    # "share": how much of a copy's bandwidth a step reaches with the bytes that it must read.
    B, P = ids.shape
    needed = rollout.bytes_of_a_step(policy, args.size, 2, B, P, R)
    row = {
        "first_s": round(seconds["first"][0], 2),
        "seconds": round(whole, 3),
        "begin_ms": round(1e3 * begin, 1),
        "step_ms": round(1e3 * step, 3),
        "share": round(needed / step / bandwidth, 3),
        "tokens_per_s": round(B * R / whole),
        "graphs_compiled": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "peak_gb": peak_gb(args.device),
    }
    if args.device == "cuda":
        row |= profile_replay(partial(sample, 0))
    return row, answers


def make_policy(args):
    torch.manual_seed(0)
    with torch.device(args.device):
        return rollout.make_policy(args.size, 256)


def compare_answers(answers, expected):
    """The share of tokens that are the same, and how far the log-probs of these differ.

    Log-probs are compared up to a row's first token that is not the same.
    """
    # After a token that is different the model goes on from another text, so that log-probs differ.
    is_same = answers.response_ids == expected.response_ids  # [B, R]
    up_to_there = is_same.cumprod(1).bool()
    difference = (answers.logprobs - expected.logprobs).abs()[up_to_there]
    return {
        "tokens_equal": round(is_same.float().mean().item(), 4),
        "logprob_difference": round(difference.max().item(), 6),
    }


def profile_replay(sample_answers):
    """profile_kernels() of the first decode step that is replayed in a rollout."""
    # generate() keeps the captured step to itself, but every replay goes through this method.
    replay = torch.cuda.CUDAGraph.replay
    columns = {}

    def replay_and_look(graph):
        if columns:
            replay(graph)
        else:
            columns.update(profile_kernels(partial(replay, graph), "cuda"))

    torch.cuda.CUDAGraph.replay = replay_and_look
    sample_answers()
    torch.cuda.CUDAGraph.replay = replay
    return columns


# ----------------------------------------------------------------------- phases: update and lora


def measure_update(args):
    """One minibatch of the update, all weights trained; and scoring beside the update's forward."""
    _, _, _, minibatch = ppo.workload(args.size)
    for variant, compile in (("now", False), ("compile", True)):
        row = time_update(args.size, args.device, micro_batch_size=minibatch, compile=compile)
        yield {"variant": variant, **row}


def measure_lora(args):
    """The same with LoRA, by rows of a micro-batch and by what is kept in which form."""
    size = "llama-3-8b" if args.device == "cuda" else args.size
    _, _, _, m = ppo.workload(size)
    recompute = {"checkpoint_activations": True}
    in_bfloat16 = {"frozen_dtype": "bfloat16"}
    # From slow to fast: more rows at once, then nothing recomputed, then --compile.
    variants = (
        (f"{m // 4} rows, recompute, float32", m // 4, recompute),
        (f"{m} rows, recompute, bfloat16", m, recompute | in_bfloat16),
        (f"{m} rows, bfloat16", m, in_bfloat16),
        (f"{m} rows, bfloat16, compile", m, in_bfloat16 | {"compile": True}),
    )
    for variant, n_rows, flags in variants:
        try:
            row = time_update(size, args.device, lora_rank=16, micro_batch_size=n_rows, **flags)
        except torch.OutOfMemoryError as error:
            # That a variant does not fit is a result too. The next ones are still measured.
            row = {"error": str(error).splitlines()[0]}
        yield {"variant": variant, **row}


def time_update(size, device, **flags):
    """The row of one minibatch by a random policy of this size. flags: of train_ppo.py"""
    begin_peak(device)
    _, P, R, B = ppo.workload(size)
    config = train_ppo.Config(
        batch_size=B,
        minibatch_size=B,
        ppo_epochs=1,
        max_new_tokens=R,
        dtype="bfloat16",
        device=device,
        **flags,
    )
    parts = make_parts(size, config)
    optimizer = adamw(parts.policy, config.lr, config.betas, config.weight_decay)
    # All rows have P prompt tokens and R response tokens, without padding.
    ids = torch.randint(0, ppo.SIZES[size][-1], (B, P + R), device=device)
    lengths = torch.full((2, B), P, device=device)
    lengths[1] = R
    batch = Packed(ids, *lengths)

    # The rows' log-probs are those of the policy itself, so the first ratios should be 1.
    score = partial(forward, parts, parts.policy, batch)
    scored = score()
    experience = make_experience(scored, batch)
    # One minibatch, one optimizer step. The arguments are those of train_ppo.py's own call.
    update_once = partial(
        train_ppo.update, parts, optimizer, batch, experience, 0, 1, 0.05, config.lr
    )
    first, record = time_call(update_once, device)
    seconds = median_seconds(update_once, device)
    peak = peak_gb(device)

    passes = 2 if config.lora_rank else 3  # forwards that a forward and a backward are worth
    prompts, _, _, _ = ppo.workload(size)
    # needed_flop() counts all minibatches of 4 epochs; this row is of one minibatch.
    needed = ppo.needed_flop(size, lora=config.lora_rank > 0)["update"]  # 4 epochs
    flop = needed / (4 * prompts / B)
    # Two forwards are timed: scoring keeps nothing, the other keeps what a backward pass needs.
    score_seconds = median_seconds(score, device)
    forward_seconds = median_seconds(partial(keep_graphs, parts, batch), device)
    return {
        "first_s": round(first, 2),
        "ms": round(1e3 * seconds, 1),
        "tflop_per_s": round(flop / seconds / 1e12, 5),
        "mfu": round(flop / seconds / PEAK, 4),
        "score_tflop_per_s": round(flop / passes / score_seconds / 1e12, 5),
        "forward_tflop_per_s": round(flop / passes / forward_seconds / 1e12, 5),
        "first_ratio_error": round(record["first_ratio_error"], 6),
        "peak_gb": peak,
        "formula_gb": round(formula(size, config, P + R) / 1e9, 2),
        **profile_kernels(update_once, device),
    }


def make_parts(size, config):
    """What train_ppo.update() needs: a random policy, made on the device, trained by the flags."""
    dist = setup(config.device)
    torch.manual_seed(0)
    # The steps are those of train_ppo.py, in the same order. An update needs no reference.
    with torch.device(dist.device):
        policy = Policy(AutoModelForCausalLM.from_config(ppo.make_config(size))).eval()
    choose_trained(policy.lm, config)
    speed_up(policy.lm, dist.device, config.dtype, config.compile)
    cast_frozen(policy.lm, config)
    if config.checkpoint_activations:
        checkpoint_activations(policy)
    return SimpleNamespace(config=config, dist=dist, policy=policy, model=policy, reference=None)


def make_experience(scored, batch):
    """What the policy itself says of the rows, with random advantages and returns."""
    # The KL is 0 and the first ratios are 1. What an update costs does not depend on them.
    logprobs = scored["logprobs"]  # [B, R]
    return train_ppo.Experience(
        mask=torch.ones_like(logprobs, dtype=torch.bool),
        old_logprobs=logprobs,
        ref_logprobs=logprobs,
        advantages=torch.randn_like(logprobs),
        lengths=batch.response_lengths,
        values=scored["values"],
        returns=torch.randn_like(logprobs),
    )


def keep_graphs(parts, batch):
    """A forward of all micro-batches that keeps what a backward pass would need."""
    for rows in batch.micro_batches(parts.config.micro_batch_size):
        shape = (len(rows), parts.config.max_new_tokens)
        mask = torch.ones(shape, dtype=torch.bool, device=rows.device)
        with autocast(parts.dist, parts.config.dtype):
            parts.policy(batch.rows(rows), mask)


def formula(size, config, tokens):
    """memory.py's bytes for an update with no reference and no reward model beside it."""
    needs = memory.needs(
        SHAPES[size],
        lora=config.lora_rank,
        frozen_dtype=config.frozen_dtype,
        members=[],
        micro_batch=config.micro_batch_size,
        tokens=tokens,
        checkpointed=config.checkpoint_activations,
    )
    return needs["parameters"] + needs["gradients"] + needs["adam"] + needs["update"]


# ------------------------------------------------------------------------------ phase: attention


def measure_attention(args):
    """One query a head over the n real columns of a padded cache, in three ways."""
    B, C, d = (128, 192, 128) if args.device == "cuda" else (8, 48, 32)
    attend = scaled_dot_product_attention
    plain = torch.compile(attend_plainly)
    # Heads of queries and of keys: as many keys (Pythia), or four queries to a key (Llama).
    for H, H_kv in ((16, 16), (32, 8)):
        # Queries that share a key are rows of one product.
        shapes = [(B, H_kv, H // H_kv, d), (B, H_kv, C, d), (B, H_kv, C, d)]
        query, keys, values = [torch.randn(s, device=args.device).bfloat16() for s in shapes]
        # How many columns of the cache are real: all of them, as at a rollout's end, or fewer.
        for n in (C, 2 * C // 3, C // 2):
            shown = (query, keys[:, :, :n], values[:, :, :n])
            mask = torch.arange(C, device=args.device)[None, None, None] < n  # [1, 1, 1, C]
            # The truth is in float64, so that an error is that of the way alone.
            expected = attend(*[x.double() for x in shown])
            # Attention reads the whole cache under a mask, or a view of its real columns.
            ways = {"mask": partial(attend, query, keys, values, mask)}
            ways["slice"] = partial(attend, *shown)
            if H == H_kv:
                ways["plain operators"] = partial(plain, *shown)
            for way, function in ways.items():
                error = (function() - expected).abs().max().item()
                seconds = short_seconds(function, args.device)
                # At the least it reads keys and values, of two bytes a number: 4 B H_kv n d bytes.
                yield {
                    "variant": f"{H}/{H_kv} heads, {n} columns, {way}",
                    "us": round(1e6 * seconds, 1),
                    "gb_per_s": round(4e-9 * B * H_kv * n * d / seconds, 1),
                    "error": round(error, 5),
                }


def attend_plainly(query, keys, values):
    """Attention of one query a head without a matrix product: the columns are read in streams."""
    scores = (query * keys).sum(-1, dtype=torch.float32) * query.shape[-1] ** -0.5  # [B, H, n]
    weights = scores.softmax(-1)[..., None].to(values.dtype)
    return (weights * values).sum(2, keepdim=True, dtype=torch.float32).to(values.dtype)


# ------------------------------------------------------------------------- phases: ppo and tests


def measure_ppo(args):
    """ppo.py as a whole, with the best flags so far."""
    B, P, R, m = ppo.workload(args.size)
    # The last of two flags with one name counts: three iterations on a GPU.
    flags = ["--device", args.device, "--size", args.size, "--dtype", "bfloat16"]
    flags += ["--micro_batch_size", str(m), "--iterations", "2"]
    if args.device == "cuda":
        flags += ["--iterations", "3", "--compile"]
    script = os.path.join(os.path.dirname(__file__), "ppo.py")
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    row = json.loads(done.stdout.splitlines()[-1])
    needs = memory.needs(
        SHAPES[args.size],
        rollout=B,
        micro_batch=m,
        tokens=P + R,
        checkpointed=False,
        compiled=args.device == "cuda",
    )
    row["peak_gb"] = round(row["peak_memory_mb"] * 2**20 / 1e9, 2)
    yield {"variant": "compile", **row, "formula_gb": round(needs["peak"] / 1e9, 2)}


def measure_tests(args):
    """The tests that say most about numbers on a GPU. Without one all of them are skipped."""
    # One process: starting further ones would take seconds from the tests.
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--processes", "1"]
    if args.device == "cuda":
        pytest.append("--gpu")
    command = [*pytest, "tests/runs/test_gpu.py", "-k", "bfloat16 or run_of_the_cpu"]
    done = subprocess.run(command, cwd=ppo.ROOT, capture_output=True, text=True)
    yield {"variant": "pytest", "last_line": done.stdout.splitlines()[-1]}

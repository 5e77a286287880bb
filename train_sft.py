"""Supervised fine-tuning: teach a causal LM to answer like the demonstrations. Loss on the response tokens only.

    python train_sft.py                                                       the embedded world, from scratch, on a CPU
    python train_sft.py --model gpt2 --dataset my.jsonl --output_dir runs/my  any HF causal LM, JSONL {prompt, response}
    torchrun --nproc_per_node=4 train_sft.py                                  the same global batch on four processes

    B sequences, R response tokens, n response tokens of a micro-batch, D hidden, V vocabulary
"""

import math
import time
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM

from nanorlhf import checkpoint, cli, data, world
from nanorlhf.blocks import sampling, speed_up
from nanorlhf.distributed import autocast, peak_memory_mb, setup, sync_on
from nanorlhf.fsdp import checkpoint_activations, gathered
from nanorlhf.log import Progress, RunFolder, sample_table
from nanorlhf.lora import choose_trained, merge
from nanorlhf.models import Policy, check_model, context_length, load_policy, load_tokenizer, save_policy
from nanorlhf.packing import pack, response_mask_of
from nanorlhf.optim import adamw, learning_rate, optimizer_step
from nanorlhf.plots import plot_run
from nanorlhf.rng import key
from nanorlhf.rollout import generate, left_pad
from nanorlhf.stats import ratio


@dataclass
class Config(cli.RunConfig):
    output_dir: str = field(default="runs/sft", metadata={"help": "the run folder"})
    steps: int = field(default=400, metadata={"help": "optimizer steps"})
    lr: float = field(default=3e-3, metadata={"help": "peak learning rate of AdamW"})
    warmup: int = field(default=20, metadata={"help": "steps of linear warm-up"})
    max_length: int = field(default=0, metadata={"help": "longest prompt + response in tokens; 0: the model's context"})
    max_new_tokens: int = field(default=48, metadata={"help": "length of the samples that are printed"})
    n_samples: int = field(default=4, metadata={"help": "samples to print at an evaluation"})

    def __post_init__(self):
        super().__post_init__()
        cli.at_least(self, 0, "max_length", "n_samples")
        cli.at_least(self, 1, "max_new_tokens")
        cli.require(self.model != "world" or not self.lora_rank, "--lora_rank needs a trained --model, not one that starts at random")


def main(config):
    # ------------------------------------------------------------------------------------------------------------------- set-up
    dist = setup(config.device, config.distributed)
    cli.divides(config, "batch_size", dist.world, "the number of processes")
    folder = RunFolder(config, dist)
    if folder.state == "done":
        return folder.already_done()
    torch.manual_seed(config.seed)

    # --------------------------------------------------------------------------------------------------------------------- data
    rows, held_out, note = data.load(config, "sft")
    model_config = world.model_config() if config.model == "world" else check_model(config.model)
    tokenizer = world.tokenizer() if config.model == "world" else load_tokenizer(config.model)
    max_length = config.max_length or context_length(model_config)
    prompts, responses, n_cut = data.encode(tokenizer, rows, "response", max_length, config.chat_template)
    held_out_prompts, held_out_responses, _ = data.encode(tokenizer, held_out, "response", max_length, config.chat_template)
    dist.print(f"SFT of {config.model} on {config.dataset}: {note}, {n_cut} responses cut to {max_length} tokens")

    # -------------------------------------------------------------------------------------------------------------------- model
    if config.model == "world":
        policy = Policy(AutoModelForCausalLM.from_config(model_config), value_head=False).to(dist.load_device)
    else:
        policy = load_policy(config.model, value_head=False, device=dist.load_device)
    note = choose_trained(policy.lm, config)
    speed_up(policy.lm, dist.device, config.dtype, config.compile)
    dist.print(f"{sum(p.numel() for p in policy.parameters()):,} parameters, {note}")
    if config.checkpoint_activations:
        checkpoint_activations(policy)
    example = pack(prompts[:1], responses[:1]).to(dist.device)
    model = dist.wrap(policy, lambda model: model(example, response_mask_of(example))["logprobs"].sum(), config.dtype)
    optimizer = adamw(policy, config.lr, config.betas, config.weight_decay)
    state = checkpoint.load(config.output_dir, policy, optimizer) or {"step": 0}
    folder.create()

    def report(step):
        with gathered(policy):
            result = evaluate(policy, held_out_prompts, held_out_responses, tokenizer, config, dist)
            samples = [{"step": step, **row} for row in sample(policy, held_out, tokenizer, max_length, config, dist)]
        folder.append("samples.jsonl", samples)
        quality = f"perplexity {result['perplexity']:.3f} +- {result['perplexity_se']:.3f}, token accuracy {result['accuracy']:.3f}"
        dist.print(f"step {step}: held-out {quality} +- {result['accuracy_se']:.3f} ({result['n_tokens']} tokens)", sample_table(samples))
        return {f"eval/{k}": v for k, v in result.items()}

    # --------------------------------------------------------------------------------------------------------------------- loop
    progress = Progress(dist, "sft", config.steps, state["step"])
    for step in range(state["step"] + 1, config.steps + 1):
        begun = time.perf_counter()
        torch.manual_seed(key(config.seed, step, dist.rank))  # dropout's noise
        index = data.batch_indices(len(rows), config.batch_size, step - 1, config.seed)
        n_tokens = sum(len(responses[i]) for i in index)  # of the whole batch: the loss does not depend on how it is split
        mine = dist.share(index)
        batch = pack([prompts[i] for i in mine], [responses[i] for i in mine], tokenizer.pad_token_id).to(dist.device)
        micro_batches = dist.even(batch.micro_batches(config.micro_batch_size, None, config.tokens_per_micro_batch))
        policy.train()
        total = torch.zeros((), device=dist.device)
        for rows_of in micro_batches:
            part = batch.rows(rows_of)
            with sync_on(model, last=rows_of is micro_batches[-1]):
                with autocast(dist, config.dtype):
                    logprobs = model(part, response_mask_of(part))["logprobs"]  # [b, R]
                    # loss = -sum of log pi(response token) / number of response tokens
                    loss = -logprobs.sum() / n_tokens
                (loss * dist.world).backward()  # DDP and FSDP average over ranks; the loss is a sum
            total += loss.detach()
        lr = learning_rate(step - 1, config.steps, config.lr, config.schedule, config.warmup, config.final_lr)
        grad_norm = optimizer_step(optimizer, policy, lr, config.max_grad_norm, step)
        record = {"step": step, "loss": dist.sum(total).item(), "grad_norm": grad_norm, "lr": lr, "n_tokens": n_tokens}
        record |= {"seconds": time.perf_counter() - begun, "peak_memory_mb": peak_memory_mb(dist)}
        if step == config.steps or (config.eval_every and step % config.eval_every == 0):
            record |= report(step)
        folder.append("metrics.jsonl", [record])
        progress.step(step, f"loss {record['loss']:.3f}")
        if step % config.checkpoint_every == 0 or step == config.steps:
            folder.checkpoint(step, policy, optimizer, {}, config.keep_checkpoints)
    progress.close()

    # --------------------------------------------------------------------------------------------------------------------- save
    if config.merge:
        merge(policy.lm)
    folder.save_model(save_policy, policy, tokenizer)
    if dist.main:
        plot_run(config.output_dir)
    return folder.finish({k: v for k, v in folder.records()[-1].items() if k.startswith(("eval/", "step", "loss"))})


@torch.no_grad()
def evaluate(policy, prompts, responses, tokenizer, config, dist):
    """Perplexity exp(-mean log pi) and the share of response tokens that are the most likely one, on held-out rows."""
    policy.eval()
    mine = list(dist.part(len(prompts)))
    sums = torch.zeros(len(mine), 3, dtype=torch.float64, device=dist.device)  # of each row: -log pi, correct tokens, tokens
    if mine:
        batch = pack([prompts[i] for i in mine], [responses[i] for i in mine], tokenizer.pad_token_id).to(dist.device)
        for rows in batch.micro_batches(config.micro_batch_size, None, config.tokens_per_micro_batch):
            part = batch.rows(rows)
            mask = response_mask_of(part)  # [m, R]
            with autocast(dist, config.dtype):
                out = policy(part, mask, correct=True)
            sums[rows] = torch.stack([-out["logprobs"].sum(1), out["correct"].sum(1), mask.sum(1)], 1).double()
    nll, correct, n = dist.gather(sums).T.cpu()  # [N] each
    (loss, loss_se), (accuracy, accuracy_se) = ratio(nll, n), ratio(correct, n)
    perplexity = math.exp(min(loss, 700))
    return {
        "perplexity": perplexity,
        "perplexity_se": perplexity * loss_se,
        "accuracy": accuracy,
        "accuracy_se": accuracy_se,
        "n_tokens": int(n.sum()),
        "n_rows": len(n),
    }


def sample(policy, rows, tokenizer, max_length, config, dist):
    """A few samples at temperature 1 for held-out prompts; prompts are cut on the left where context is short."""
    rows = rows[: config.n_samples]
    if not rows:
        return []
    width = min(config.max_new_tokens, max_length - 1) if max_length else config.max_new_tokens
    room = max_length - width if max_length else 0  # [-0:] is all of a prompt
    prompts = [p[-room:] for p in data.encode_prompts(tokenizer, [r["prompt"] for r in rows], config.chat_template)]
    ids, mask = left_pad(prompts, tokenizer.pad_token_id)
    with sampling(policy.lm):
        out = generate(policy, ids.to(dist.device), mask.to(dist.device), width, eos_token_id=tokenizer.eos_token_id,
                       pad_token_id=tokenizer.pad_token_id, seed=config.seed)  # fmt: skip
    texts = [tokenizer.decode(ids[m], skip_special_tokens=True) for ids, m in zip(out.response_ids, out.response_mask)]
    return [{"prompt": row["prompt"], "response": text} for row, text in zip(rows, texts)]


if __name__ == "__main__":
    cli.run(Config, main)

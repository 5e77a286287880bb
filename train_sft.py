"""Fine-tuning on a fixed data set: teach a causal language model to answer
like the demonstrations (SFT), or to prefer as pairs do (DPO).

    the embedded world, from random weights, on a CPU:
        python train_sft.py
    any Hugging Face causal LM, on JSONL {prompt, response}:
        python train_sft.py --model gpt2 --dataset my.jsonl --output_dir runs/my
    DPO, on {prompt, chosen, rejected}; the reference is --model:
        python train_sft.py --loss dpo --model runs/sft --output_dir runs/dpo
    the same global batch on four processes:
        torchrun --nproc_per_node=4 train_sft.py

Both losses read log-probs of response tokens (and EOS) only.
DPO: Rafailov et al. 2023 (2305.18290), nanorlhf/dpo.py.

    S answers in a row of data (SFT 1, DPO 2), b rows of a micro-batch,
    B = S b sequences, R response tokens, N held-out rows
"""

import math
import time
from collections import defaultdict
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM
from transformers.hf_argparser import HfArg

from nanorlhf import data, world
from nanorlhf.dpo import ROUNDING, dpo_loss, pair_points
from nanorlhf.errors import at_least, divides, require
from nanorlhf.hf.blocks import sampling, speed_up
from nanorlhf.hf.lora import choose_trained, merge
from nanorlhf.models import (
    Policy,
    check_model,
    context_length,
    load_policy,
    load_tokenizer,
    save_policy,
)
from nanorlhf.packing import micro_batches, pack, response_mask_of
from nanorlhf.rollout import generate, left_pad
from nanorlhf.runtime import checkpoint, cli
from nanorlhf.runtime.distributed import autocast, peak_memory_mb, setup, sync_on
from nanorlhf.runtime.flags import RunConfig
from nanorlhf.runtime.fsdp import checkpoint_activations, gathered
from nanorlhf.runtime.locks import unlock_afterwards
from nanorlhf.runtime.log import Progress, RunFolder, sample_table
from nanorlhf.runtime.optim import adamw, learning_rate, optimizer_step
from nanorlhf.runtime.plots import plot_run
from nanorlhf.runtime.rng import key
from nanorlhf.splits import load_splits
from nanorlhf.stats import mean_se, ratio

# Of each loss: the kind of its data, the answers in a row of it, and defaults for the embedded world.
KIND = {"sft": "sft", "dpo": "pairs"}
ANSWERS = {"sft": ("response",), "dpo": ("chosen", "rejected")}
STEPS, LR = {"sft": 400, "dpo": 100}, {"sft": 3e-3, "dpo": 1e-4}


@dataclass
class Config(RunConfig):
    """SFT and DPO: what is trained, on which loss"""

    model: str = HfArg(
        default="world",
        help="the language model to start from: a run folder, a model folder, a hub name, or "
        "'world', the embedded world's own, from random weights",
    )
    loss: str = HfArg(
        default="sft",
        metadata={"choices": tuple(KIND)},
        help="sft: on demonstrations; dpo: on pairs, from a trained --model, which is also the "
        "reference",
    )
    dpo_beta: float = HfArg(
        default=0.1, help="DPO's beta: the reward that one nat of log-prob stands for"
    )
    max_length: int = HfArg(
        default=0, help="tokens in the longest prompt and answer; 0: the model's context"
    )
    max_new_tokens: int = HfArg(default=48, help="tokens in the longest sample that is printed")
    n_samples: int = HfArg(default=4, help="how many samples an evaluation prints")

    output_dir: str = HfArg(
        default="runs/{loss}", help="the folder that the run writes; {loss} stands for --loss"
    )
    steps: int | None = HfArg(
        default=None, help="how many optimizer steps to take; by default 400, with dpo 100"
    )
    lr: float | None = HfArg(
        default=None, help="peak learning rate of AdamW; by default 3e-3, with dpo 1e-4"
    )
    warmup: int = HfArg(
        default=20, help="steps over which the learning rate rises from 0 to its peak"
    )

    def __post_init__(self):
        self.output_dir = self.output_dir.replace("{loss}", self.loss)
        if self.steps is None:
            self.steps = STEPS.get(self.loss)
        if self.lr is None:
            self.lr = LR.get(self.loss)
        super().__post_init__()
        at_least(self, 0, "max_length", "n_samples")
        at_least(self, 1, "max_new_tokens")
        require(self.dpo_beta > 0, "--dpo_beta must be positive")
        require(self.loss == "sft" or self.model != "world", "--loss dpo needs a trained --model, such as runs/sft")
        require(self.model != "world" or not self.lora_rank, "--lora_rank needs a trained --model, not one that starts at random")


@unlock_afterwards()
def main(config):
    # ------------------------------------------------------------------------------------------------------------------- set-up
    dist = setup(config.device, config.distributed)
    divides(config, "batch_size", dist.world, "the number of processes")
    folder = RunFolder(config, dist)
    if folder.state == "done":
        return folder.already_done()
    torch.manual_seed(config.seed)

    # --------------------------------------------------------------------------------------------------------------------- data
    rows, held_out, note = load_splits(config, KIND[config.loss])  # held_out: {label: rows}
    model_config = world.model_config() if config.model == "world" else check_model(config.model)
    tokenizer = world.tokenizer() if config.model == "world" else load_tokenizer(config.model)
    max_length = config.max_length or context_length(model_config)

    def encoded(part):
        """One (prompts, responses) for each answer of a row: a prompt may be cut differently before two answers."""
        return [data.encode(tokenizer, part, name, max_length, config.chat_template) for name in ANSWERS[config.loss]]

    answers, held_out_answers = encoded(rows), {label: encoded(part) for label, part in held_out.items()}
    n_cut = sum(cut for _, _, cut in answers)
    dist.print(f"{config.loss.upper()} of {config.model} on {config.dataset}: {note}, {n_cut} responses cut to {max_length} tokens")

    # -------------------------------------------------------------------------------------------------------------------- model
    if config.model == "world":
        policy = Policy(AutoModelForCausalLM.from_config(model_config, trust_remote_code=False), value_head=False).to(dist.load_device)
    else:
        policy = load_policy(config.model, value_head=False, device=dist.load_device)
    note = choose_trained(policy.lm, config)
    speed_up(policy.lm, dist.device, config.dtype, config.compile)
    dist.print(f"{sum(p.numel() for p in policy.parameters()):,} parameters, {note}")
    if config.checkpoint_activations:
        checkpoint_activations(policy)
    example = pack(answers[0][0][:1], answers[0][1][:1]).to(dist.device)
    model = dist.wrap(policy, lambda model: model(example, response_mask_of(example))["logprobs"].sum(), config.dtype)
    optimizer = adamw(policy, config.lr, config.betas, config.weight_decay)
    if config.loss == "dpo":
        # The reference is the policy as it stands here. The data are fixed, so its log-probs are needed once, and never a second model.
        visited = data.batch_indices(len(rows), min(len(rows), config.steps * config.batch_size), 0, config.seed)  # what steps will read
        reference = torch.zeros(2, len(rows), device=dist.device)  # log-probs of the chosen and the rejected answer of every pair
        with gathered(policy):
            reference[:, visited] = sequence_logprobs(policy, answers, visited, tokenizer, config, dist)
            held_out_reference = {label: sequence_logprobs(policy, part, range(len(held_out[label])), tokenizer, config, dist)
                                  for label, part in held_out_answers.items()}  # fmt: skip
    state = checkpoint.load(config.output_dir, policy, optimizer, dist) or {"step": 0}
    folder.create(state)

    def report(step):
        record = {}
        with gathered(policy):
            for label, part in held_out_answers.items():
                if config.loss == "sft":
                    result = evaluate(policy, part[0], tokenizer, config, dist)
                else:
                    result = evaluate_pairs(policy, part, held_out_reference[label], tokenizer, config, dist)
                record |= {f"{label}/{k}": v for k, v in result.items()}
                dist.print(f"step {step}: {'' if label == 'eval' else label + ': '}{in_words(result)}")
            samples = [{"step": step, **row} for row in sample(policy, held_out["eval"], tokenizer, max_length, config, dist)]
        folder.append("samples.jsonl", samples)
        dist.print(sample_table(samples))
        return record

    # --------------------------------------------------------------------------------------------------------------------- loop
    progress = Progress(dist, config.loss, config.steps, state["step"])
    for step in range(state["step"] + 1, config.steps + 1):
        begun = time.perf_counter()
        torch.manual_seed(key(config.seed, step, dist.rank))  # dropout's noise
        index = data.batch_indices(len(rows), config.batch_size, step - 1, config.seed)
        n_tokens = sum(len(r[i]) for _, r, _ in answers for i in index)  # of the whole batch: a loss does not depend on how it is split
        mine = dist.share(index)
        lengths = torch.tensor([max(len(p[i]) + len(r[i]) for p, r, _ in answers) for i in mine])  # of a row's longest sequence
        parts = dist.even(micro_batches(lengths, config.micro_batch_size, -(-config.tokens_per_micro_batch // len(answers))))
        policy.train(config.loss == "sft")  # the reference's log-probs know no dropout, so DPO's have none either
        totals = defaultdict(lambda: torch.zeros((), device=dist.device))
        for part in parts:
            at = [mine[k] for k in part.tolist()]
            # Of pairs row j holds the chosen answer of pair j, row b + j the rejected one: [S b, T].
            batch = pack([p[i] for p, _, _ in answers for i in at], [r[i] for _, r, _ in answers for i in at], tokenizer.pad_token_id)
            batch, stats = batch.to(dist.device), {}
            with sync_on(model, last=part is parts[-1]):
                with autocast(dist, config.dtype):
                    logprobs = model(batch, response_mask_of(batch))["logprobs"]  # [S b, R]
                if config.loss == "sft":
                    # loss = -sum of log pi(response token) / number of response tokens
                    loss = -logprobs.sum() / n_tokens
                else:
                    pi_c, pi_r = logprobs.sum(1).chunk(2)  # [b], [b]
                    ref_c, ref_r = reference[:, at]
                    loss, stats = dpo_loss(pi_c, pi_r, ref_c, ref_r, config.dpo_beta, config.batch_size, ROUNDING[config.dtype])
                (loss * dist.world).backward()  # DDP and FSDP average over ranks; the loss is a sum
            for name, value in {"loss": loss.detach(), **stats}.items():
                totals[name] += value
        lr = learning_rate(step - 1, config.steps, config.lr, config.schedule, config.warmup, config.final_lr)
        grad_norm = optimizer_step(optimizer, policy, lr, config.max_grad_norm, step)
        record = {"step": step, **{name: dist.sum(total).item() for name, total in totals.items()}}
        record |= {"grad_norm": grad_norm, "lr": lr, "n_tokens": n_tokens}
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
    kept = ("step", "loss", *(f"{label}/" for label in held_out))
    return folder.finish({k: v for k, v in folder.records()[-1].items() if k.startswith(kept)})


# ---------------------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def token_sums(policy, prompts, responses, tokenizer, config, dist):
    """Of each row, over its response tokens: the sums of log pi and of correct guesses, and how many there are. [N, 3], float64, on CPU."""
    policy.eval()
    mine = list(dist.part(len(prompts)))
    sums = torch.zeros(len(mine), 3, dtype=torch.float64, device=dist.device)
    if mine:
        batch = pack([prompts[i] for i in mine], [responses[i] for i in mine], tokenizer.pad_token_id).to(dist.device)
        for rows in batch.micro_batches(config.micro_batch_size, None, config.tokens_per_micro_batch):
            part = batch.rows(rows)
            mask = response_mask_of(part)  # [m, R]
            with autocast(dist, config.dtype):
                out = policy(part, mask, correct=True)
            sums[rows] = torch.stack([out["logprobs"].sum(1), out["correct"].sum(1), mask.sum(1)], 1).double()
    return dist.gather(sums).cpu()


def evaluate(policy, answers, tokenizer, config, dist):
    """Perplexity exp(-mean log pi) and the share of response tokens that are the most likely one, on held-out rows."""
    logprobs, correct, n = token_sums(policy, *answers[:2], tokenizer, config, dist).T  # [N] each
    (loss, loss_se), (accuracy, accuracy_se) = ratio(-logprobs, n), ratio(correct, n)
    perplexity = math.exp(min(loss, 700))
    return {
        "perplexity": perplexity,
        "perplexity_se": perplexity * loss_se,
        "accuracy": accuracy,
        "accuracy_se": accuracy_se,
        "n_tokens": int(n.sum()),
        "n_rows": len(n),
    }


def sequence_logprobs(policy, answers, index, tokenizer, config, dist):
    """Log-probs of both answers of the pairs at `index`, summed over tokens and EOS: [2, n]."""
    sums = [token_sums(policy, [p[i] for i in index], [r[i] for i in index], tokenizer, config, dist) for p, r, _ in answers]
    return torch.stack(sums)[:, :, 0].float().to(dist.device)


def evaluate_pairs(policy, answers, reference, tokenizer, config, dist):
    """Held-out pairs by the implicit reward: how often, and by how much, the chosen answer has the higher one; beside it, length."""
    pi = sequence_logprobs(policy, answers, range(reference.shape[1]), tokenizer, config, dist)
    rounding = ROUNDING[config.dtype]
    loss, stats = dpo_loss(*pi, *reference, config.dpo_beta, rounding=rounding)
    points = pair_points(*pi, *reference, rounding).cpu()  # [N]
    margin = (config.dpo_beta * ((pi[0] - reference[0]) - (pi[1] - reference[1]))).cpu()  # [N]
    longer = torch.tensor([len(c) - len(r) for c, r in zip(answers[0][1], answers[1][1])]).sign()
    return {
        "loss": loss.item(),
        **{name: value.item() for name, value in stats.items()},
        "accuracy_se": mean_se(points)["se"],
        "margin_se": mean_se(margin)["se"],
        "longer_wins": (longer / 2 + 0.5).mean().item(),
        "n_pairs": len(margin),
    }


def in_words(r):
    """An evaluation as a sentence."""
    accuracy = f"accuracy {r['accuracy']:.3f} +- {r['accuracy_se']:.3f}"
    if "perplexity" in r:
        return f"held-out perplexity {r['perplexity']:.3f} +- {r['perplexity_se']:.3f}, token {accuracy} ({r['n_tokens']} tokens)"
    rewards = f"implicit reward of chosen {r['reward_chosen']:+.2f}, of rejected {r['reward_rejected']:+.2f}"
    wins = f"(n = {r['n_pairs']}; longer wins {r['longer_wins']:.3f})"
    return f"held-out pair {accuracy} {wins}, margin {r['margin']:.2f} +- {r['margin_se']:.2f}, {rewards}"


def sample(policy, rows, tokenizer, max_length, config, dist):
    """A few samples at temperature 1 for held-out prompts; prompts are cut on the left where context is short."""
    rows = rows[: config.n_samples]
    if not rows:
        return []
    width = min(config.max_new_tokens, max_length - 1) if max_length else config.max_new_tokens
    prompts = data.encode_prompts(tokenizer, [r["prompt"] for r in rows], config.chat_template)
    if max_length:
        prompts = [data.cut_left(prompt, max_length - width, tokenizer.bos_token_id) for prompt in prompts]
    ids, mask = left_pad(prompts, tokenizer.pad_token_id)
    with sampling(policy.lm):
        out = generate(policy, ids.to(dist.device), mask.to(dist.device), width, eos_token_id=tokenizer.eos_token_id,
                       pad_token_id=tokenizer.pad_token_id, seed=config.seed)  # fmt: skip
    texts = [tokenizer.decode(ids[m], skip_special_tokens=True) for ids, m in zip(out.response_ids, out.response_mask)]
    return [{"prompt": row["prompt"], "response": text} for row, text in zip(rows, texts)]


if __name__ == "__main__":
    cli.run(Config, main)

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
from nanorlhf.hf.folders import check_model, context_length
from nanorlhf.hf.lora import choose_trained, merge
from nanorlhf.models import Policy, load_policy, load_tokenizer, save_policy
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
from nanorlhf.show.page import write_page
from nanorlhf.splits import load_splits
from nanorlhf.stats import mean_se, pair_wins, ratio
from nanorlhf.tokens import (
    cut_left,
    encode,
    end_ids,
    ids_with_tokens,
    leave_out_of_splits,
)

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
    loss_on: str = HfArg(
        default="all",
        metadata={"choices": ("all", "last")},
        help="sft on chats of several turns: learn all assistant turns, or the last one alone",
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
        require(
            self.loss == "sft" or self.model != "world",
            "--loss dpo needs a trained --model, such as runs/sft",
        )
        require(
            self.model != "world" or not self.lora_rank,
            "--lora_rank needs a trained --model, not one that starts at random",
        )


@unlock_afterwards()
def main(config):
    # ------------------------------------------------------------------------------------ set-up
    dist = setup(config.device, config.distributed)
    divides(config, "batch_size", dist.world, "the number of processes")
    folder = RunFolder(config, dist)
    if folder.state == "done":
        return folder.already_done()
    torch.manual_seed(config.seed)

    # -------------------------------------------------------------------------------------- data
    rows, held_out, note = load_splits(config, KIND[config.loss])  # held_out: {label: rows}
    if config.model == "world":
        model_config = world.model_config()
        tokenizer = world.tokenizer()
    else:
        model_config = check_model(config.model)
        tokenizer = load_tokenizer(config.model)
    max_length = config.max_length or context_length(model_config)

    rows, held_out = leave_out_of_splits(tokenizer, rows, held_out, config, dist.print)
    answers, cuts = encode_answers(rows, tokenizer, max_length, config)
    held_out_answers = {}
    for label, part in held_out.items():
        held_out_answers[label], _ = encode_answers(part, tokenizer, max_length, config)
    dist.print(f"{config.loss.upper()} of {config.model} on {config.dataset}: {note}, {cuts}")

    # ------------------------------------------------------------------------------------- model
    if config.model == "world":
        lm = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
        policy = Policy(lm, value_head=False).to(dist.load_device)
    else:
        policy = load_policy(config.model, value_head=False, device=dist.load_device)
    note = choose_trained(policy.lm, config)
    speed_up(policy.lm, dist.device, config.dtype, config.compile)
    n_parameters = sum(parameter.numel() for parameter in policy.parameters())
    dist.print(f"{n_parameters:,} parameters, {note}")
    if config.checkpoint_activations:
        checkpoint_activations(policy)

    # On several processes the policy goes into DDP or is sharded (FSDP).
    first = answers[0]
    example = pack(first.prompts[:1], first.responses[:1]).to(dist.device)

    def sum_of_logprobs(model):
        return model(example, response_mask_of(example))["logprobs"].sum()

    model = dist.wrap(policy, sum_of_logprobs, config.dtype)
    optimizer = adamw(policy, config.lr, config.betas, config.weight_decay)

    # DPO's reference is the policy as it stands here, before a checkpoint is loaded. The data are
    # fixed, so its log-probs are computed once, and no second model is kept.
    reference = None
    held_out_reference = {}
    if config.loss == "dpo":
        n_visited = min(len(rows), config.steps * config.batch_size)
        visited = data.batch_indices(len(rows), n_visited, 0, config.seed)  # what steps will read
        reference = torch.zeros(2, len(rows), device=dist.device)  # of chosen and rejected answers
        with gathered(policy):
            reference[:, visited] = sequence_logprobs(
                policy, answers, visited, tokenizer, config, dist
            )
            for label, part in held_out_answers.items():
                held_out_reference[label] = sequence_logprobs(
                    policy, part, range(len(held_out[label])), tokenizer, config, dist
                )

    # A run that was killed goes on from its last checkpoint.
    state = checkpoint.load(config.output_dir, policy, optimizer, dist) or {"step": 0}
    folder.create(state)

    def report(step):
        """Evaluate, print the results and a few samples. -> the numbers, for metrics.jsonl"""
        record = {}
        with gathered(policy):
            for label, part in held_out_answers.items():
                if config.loss == "sft":
                    result = evaluate(policy, part[0], tokenizer, config, dist)
                else:
                    result = evaluate_pairs(
                        policy, part, held_out_reference[label], tokenizer, config, dist
                    )
                record |= {f"{label}/{name}": value for name, value in result.items()}
                split = "" if label == "eval" else f"{label}: "
                dist.print(f"step {step}: {split}{in_words(result)}")
            texts = sample(policy, held_out["eval"], tokenizer, max_length, config, dist)
        samples = [{"step": step, **text} for text in texts]
        folder.append("samples.jsonl", samples)
        dist.print(sample_table(samples))
        return record

    # -------------------------------------------------------------------------------------- loop
    progress = Progress(dist, config.loss, config.steps, state["step"])
    for step in range(state["step"] + 1, config.steps + 1):
        begun = time.perf_counter()

        # 1. Every process takes its share of the global batch, and adds up gradients.
        torch.manual_seed(key(config.seed, step, dist.rank))  # dropout's noise
        index = data.batch_indices(len(rows), config.batch_size, step - 1, config.seed)
        n_tokens = count_tokens(answers, index)
        policy.train(config.loss == "sft")  # the reference has no dropout, so DPO has none either
        totals = add_gradients(
            model, answers, dist.share(index), n_tokens, reference, tokenizer, config, dist
        )

        # 2. One step of the optimizer.
        lr = learning_rate(
            step - 1, config.steps, config.lr, config.schedule, config.warmup, config.final_lr
        )
        grad_norm = optimizer_step(optimizer, policy, lr, config.max_grad_norm, step)

        # 3. What happened, on all processes together.
        record = {
            "step": step,
            **{name: dist.sum(total).item() for name, total in totals.items()},
            "grad_norm": grad_norm,
            "lr": lr,
            "n_tokens": n_tokens,
            "seconds": time.perf_counter() - begun,
            "peak_memory_mb": peak_memory_mb(dist),
        }
        is_last = step == config.steps
        if is_last or (config.eval_every and step % config.eval_every == 0):
            record |= report(step)
        folder.append("metrics.jsonl", [record])
        progress.step(step, f"loss {record['loss']:.3f}")
        if is_last or step % config.checkpoint_every == 0:
            folder.checkpoint(step, policy, optimizer, {}, config.keep_checkpoints)
    progress.close()

    # -------------------------------------------------------------------------------------- save
    if config.merge:
        merge(policy.lm)
    folder.save_model(save_policy, policy, tokenizer)
    if dist.main:
        plot_run(config.output_dir)

    # The summary is the last step's loss and evaluations.
    prefixes = ("step", "loss", *(f"{label}/" for label in held_out))
    summary = {}
    for name, value in folder.records()[-1].items():
        if name.startswith(prefixes):
            summary[name] = value
    folder.finish(summary)
    write_page(folder.path, dist)
    return summary


# --------------------------------------------------------------------------------------- answers


@dataclass
class Sequences:
    """A prompt and its response for each row of a data set, as token lists."""

    prompts: list[list[int]]
    responses: list[list[int]]
    # Which tokens of a response are an assistant's: the loss is on them. None: all.
    scored: list[list[bool]] | None = None

    def __len__(self):
        return len(self.prompts)

    def at(self, index) -> "Sequences":
        """The sequences of these rows."""
        prompts = [self.prompts[i] for i in index]
        responses = [self.responses[i] for i in index]
        scored = None
        if self.scored is not None:
            scored = [self.scored[i] for i in index]
        return Sequences(prompts, responses, scored)

    def length(self, i: int) -> int:
        """Tokens of the prompt and the response of one row."""
        return len(self.prompts[i]) + len(self.responses[i])

    def n_scored(self, i: int) -> int:
        """The number of tokens in one row that the loss is on."""
        if self.scored is None:
            return len(self.responses[i])
        return sum(self.scored[i])

    def mask(self, batch) -> torch.Tensor:
        """The tokens that the loss is on: [B, R] bool. batch: these sequences, packed."""
        mask = response_mask_of(batch)
        if self.scored is not None:
            for i, row in enumerate(self.scored):
                mask[i, : len(row)] = torch.tensor(row, device=mask.device)
        return mask

    def response_lengths(self) -> torch.Tensor:
        return torch.tensor([len(response) for response in self.responses])


def encode_answers(rows, tokenizer, max_length, config):
    """Rows of data -> a list of S Sequences, and a sentence on what had to be cut.

    SFT has one answer in a row, DPO a chosen and a rejected one, in this order.
    """
    fields = ANSWERS[config.loss]
    loss_on = config.loss_on if config.loss == "sft" else "last"
    encoded = encode(tokenizer, rows, fields, max_length, config.chat_template, loss_on)
    answers = []
    for field in fields:
        answers.append(Sequences(encoded.prompts, encoded.responses[field], encoded.scored))
    return answers, encoded.describe_cuts(max_length)


def join(parts):
    """Several Sequences one after another."""
    prompts = []
    responses = []
    for part in parts:
        prompts += part.prompts
        responses += part.responses
    scored = parts[0].scored if len(parts) == 1 else None  # DPO's answers are scored whole
    return Sequences(prompts, responses, scored)


def count_tokens(answers, index):
    """The number of tokens in these rows that the loss is on."""
    n_tokens = 0
    for sequences in answers:
        for i in index:
            n_tokens += sequences.n_scored(i)
    return n_tokens


def longest_of_rows(answers, index):
    """Tokens of the longest sequence in each of these rows: [b]."""
    lengths = []
    for i in index:
        lengths.append(max(sequences.length(i) for sequences in answers))
    return torch.tensor(lengths)


# ------------------------------------------------------------------------------------------ loss


def add_gradients(model, answers, mine, n_tokens, reference, tokenizer, config, dist):
    """Add up the gradients of this process's rows `mine`, a list of indices.

    n_tokens: tokens of the global batch that the loss is on -> this process's share of the step's
    numbers, {name: scalar}.
    """
    # A row is S sequences, so each of them may have 1/S of the tokens.
    tokens = math.ceil(config.tokens_per_micro_batch / len(answers))
    lengths = longest_of_rows(answers, mine)
    parts = dist.even(micro_batches(lengths, config.micro_batch_size, tokens))

    totals = defaultdict(lambda: torch.zeros((), device=dist.device))
    for i, part in enumerate(parts, 1):
        index = [mine[k] for k in part.tolist()]
        # For DPO, row j holds the chosen answer of pair j, row b + j the rejected one.
        batch_of_texts = join([sequences.at(index) for sequences in answers])
        batch = pack(batch_of_texts.prompts, batch_of_texts.responses, tokenizer.pad_token_id)
        batch = batch.to(dist.device)  # [S b, T]

        with sync_on(model, last=i == len(parts)):
            with autocast(dist, config.dtype):
                logprobs = model(batch, batch_of_texts.mask(batch))["logprobs"]  # [S b, R]
            if config.loss == "sft":
                # loss = -sum of log pi(response token) / number of response tokens
                loss = -logprobs.sum() / n_tokens
                stats = {}
            else:
                pi_c, pi_r = logprobs.sum(1).chunk(2)  # [b], [b]
                ref_c, ref_r = reference[:, index]
                loss, stats = dpo_loss(
                    pi_c,
                    pi_r,
                    ref_c,
                    ref_r,
                    config.dpo_beta,
                    config.batch_size,
                    ROUNDING[config.dtype],
                )
            # DDP and FSDP average over ranks, and the loss is a sum.
            (loss * dist.world).backward()

        totals["loss"] += loss.detach()
        for name, value in stats.items():
            totals[name] += value
    return totals


# ------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def token_sums(policy, sequences, tokenizer, config, dist):
    """Sum over the tokens of each row that the loss is on: log pi, right guesses, ones. -> [N, 3], float64

    A guess is right where the token is the likeliest one. All processes call this.
    """
    policy.eval()
    mine = sequences.at(dist.part(len(sequences)))
    sums = torch.zeros(len(mine), 3, dtype=torch.float64, device=dist.device)
    if len(mine):  # there may be fewer rows than processes
        batch = pack(mine.prompts, mine.responses, tokenizer.pad_token_id).to(dist.device)
        for rows in batch.micro_batches(
            config.micro_batch_size, None, config.tokens_per_micro_batch
        ):
            part = batch.rows(rows)
            mask = mine.at(rows.tolist()).mask(part)  # [m, R]
            with autocast(dist, config.dtype):
                out = policy(part, mask, correct=True)
            columns = [out["logprobs"].sum(1), out["correct"].sum(1), mask.sum(1)]
            sums[rows] = torch.stack(columns, 1).double()
    return dist.gather(sums).cpu()


def evaluate(policy, sequences, tokenizer, config, dist):
    """Evaluate on held-out demonstrations: perplexity, and accuracy over the response tokens.

    perplexity = exp(-mean of log pi), accuracy = the share of tokens that are the likeliest one.
    """
    logprobs, correct, n = token_sums(policy, sequences, tokenizer, config, dist).T  # [N] each
    loss, loss_se = ratio(-logprobs, n)
    accuracy, accuracy_se = ratio(correct, n)
    perplexity = math.exp(min(loss, 700))  # a float holds no e^710
    return {
        "perplexity": perplexity,
        "perplexity_se": perplexity * loss_se,
        "accuracy": accuracy,
        "accuracy_se": accuracy_se,
        "n_tokens": int(n.sum()),
        "n_rows": len(n),
    }


def sequence_logprobs(policy, answers, index, tokenizer, config, dist):
    """Log-probs of both answers of these pairs, summed over tokens and EOS: [2, len(index)]."""
    logprobs = []
    for sequences in answers:
        sums = token_sums(policy, sequences.at(index), tokenizer, config, dist)  # [n, 3]
        logprobs.append(sums[:, 0])
    return torch.stack(logprobs).float().to(dist.device)


def evaluate_pairs(policy, answers, reference, tokenizer, config, dist):
    """Evaluate on held-out pairs: how often the chosen answer has the higher implicit reward.

    Also by how much. reference [2, N]: log-probs of both answers under the reference. `longer_wins`
    is the accuracy of a reward that knows nothing but the answer's length.
    """
    chosen, rejected = answers
    everything = range(len(chosen))
    pi_c, pi_r = sequence_logprobs(policy, answers, everything, tokenizer, config, dist)  # [N] each
    ref_c, ref_r = reference
    rounding = ROUNDING[config.dtype]
    loss, stats = dpo_loss(pi_c, pi_r, ref_c, ref_r, config.dpo_beta, rounding=rounding)
    points = pair_points(pi_c, pi_r, ref_c, ref_r, rounding).cpu()  # [N]
    margin = config.dpo_beta * ((pi_c - ref_c) - (pi_r - ref_r))  # [N]
    longer_wins = pair_wins(chosen.response_lengths(), rejected.response_lengths())  # [N]
    return {
        "loss": loss.item(),
        **{name: value.item() for name, value in stats.items()},
        "accuracy_se": mean_se(points)["se"],
        "margin_se": mean_se(margin.cpu())["se"],
        "longer_wins": longer_wins.float().mean().item(),
        "n_pairs": len(margin),
    }


def in_words(r):
    """An evaluation as a sentence."""
    accuracy = f"accuracy {r['accuracy']:.3f} +- {r['accuracy_se']:.3f}"
    if "perplexity" in r:
        perplexity = f"perplexity {r['perplexity']:.3f} +- {r['perplexity_se']:.3f}"
        return f"held-out {perplexity}, token {accuracy} ({r['n_tokens']} tokens)"
    wins = f"(n = {r['n_pairs']}; longer wins {r['longer_wins']:.3f})"
    margin = f"margin {r['margin']:.2f} +- {r['margin_se']:.2f}"
    chosen = f"implicit reward of chosen {r['reward_chosen']:+.2f}"
    rejected = f"of rejected {r['reward_rejected']:+.2f}"
    return f"held-out pair {accuracy} {wins}, {margin}, {chosen}, {rejected}"


def sample(policy, rows, tokenizer, max_length, config, dist):
    """Sample an answer at temperature 1 to the first held-out prompts. -> rows {prompt, response}

    A prompt is cut on the left where the context is too short for it and its answer.
    """
    rows = rows[: config.n_samples]
    if not rows:
        return []
    # A text without a prompt begins with its first token, where the tokenizer has no BOS.
    prompts = encode(tokenizer, rows, ANSWERS[config.loss][:1], chat=config.chat_template).prompts
    longest = config.max_new_tokens
    if max_length:
        longest = min(longest, max_length - 1)  # a prompt keeps at least one token
        room = max_length - longest
        prompts = [cut_left(prompt, room, tokenizer.bos_token_id) for prompt in prompts]

    ids, mask = left_pad(prompts, tokenizer.pad_token_id)
    n_embeddings = policy.lm.config.get_text_config().vocab_size
    with sampling(policy.lm):
        rollout = generate(
            policy,
            ids.to(dist.device),
            mask.to(dist.device),
            longest,
            eos_token_id=end_ids(tokenizer),
            has_token=ids_with_tokens(tokenizer, n_embeddings),
            pad_token_id=tokenizer.pad_token_id,
            seed=config.seed,
        )
    samples = []
    for row, response_ids, kept in zip(rows, rollout.response_ids, rollout.response_mask):
        response = tokenizer.decode(response_ids[kept], skip_special_tokens=True)
        samples.append({"prompt": row["prompt"], "response": response})
    return samples


if __name__ == "__main__":
    cli.run(Config, main)

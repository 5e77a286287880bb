r"""Train a reward model on preference pairs: a causal LM's trunk with a scalar
on the last token, loss -log sigmoid(r_c - r_r).

    the embedded world, from runs/sft:
        python train_rm.py
    an ensemble, runs/rm/seed_0 to runs/rm/seed_4:
        python train_rm.py --members 5
    your own model and pairs, JSONL {prompt, chosen, rejected}:
        python train_rm.py --model gpt2 --dataset pairs.jsonl \
            --output_dir runs/rm2
    the same global batch on four processes:
        torchrun --nproc_per_node=4 train_rm.py
    whole members spread over the processes:
        torchrun --nproc_per_node=4 train_rm.py --members 5
    a SARM, a score of sparse features (nanorlhf/sarm.py), into runs/sarm:
        python train_rm.py --sarm runs/sae_sarm

Method: Stiennon et al. 2020 (2009.01325); set-up of the ensembles' members:
Coste et al. 2024 (2310.02743).

    B pairs, T tokens, D hidden
"""

import math
import time
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from transformers.hf_argparser import HfArg

from nanorlhf import data
from nanorlhf.control import sarm_training
from nanorlhf.errors import at_least, divides, require
from nanorlhf.hf.blocks import speed_up
from nanorlhf.hf.lora import choose_trained, merge
from nanorlhf.models import (
    check_model,
    context_length,
    load_reward_model,
    load_tokenizer,
    save_reward_model,
)
from nanorlhf.packing import Answers, micro_batches, pack
from nanorlhf.rewards import check_reward, load_reward, score
from nanorlhf.runtime import checkpoint, cli
from nanorlhf.runtime.distributed import Dist, autocast, peak_memory_mb, setup, sync_on
from nanorlhf.runtime.files import read_object
from nanorlhf.runtime.flags import RunConfig
from nanorlhf.runtime.fsdp import checkpoint_activations, gathered
from nanorlhf.runtime.locks import unlock_afterwards
from nanorlhf.runtime.log import Progress, RunFolder
from nanorlhf.runtime.optim import adamw, learning_rate, optimizer_step
from nanorlhf.runtime.plots import plot_run
from nanorlhf.runtime.rng import LABELS, key
from nanorlhf.splits import load_splits
from nanorlhf.stages import train_what_is_missing
from nanorlhf.stats import kendall_tau, mean_se, pair_wins, varies


@dataclass
class Config(sarm_training.Flags, RunConfig):
    """Reward models: what they start from, and what they learn from"""

    model: str = HfArg(
        default="runs/sft",
        help="the causal language model to start from: a run folder, a model folder or a hub name",
    )
    members: int = HfArg(
        default=1,
        help="train an ensemble of this many reward models, with the seeds --seed, --seed + 1, ...",
    )
    max_length: int = HfArg(
        default=0, help="tokens in the longest prompt and answer; 0: the model's context"
    )
    label_noise: float = HfArg(
        default=0.0, help="probability with which the label of a training pair is flipped"
    )
    noise_seed: int = HfArg(
        default=0, help="decides which labels are flipped; all members share it"
    )
    independent_noise: bool = HfArg(
        default=False, help="member i flips labels by --noise_seed + i instead"
    )
    score_l2: float = HfArg(
        default=0.0,
        help="beta of the penalty on large scores, beta * 1/2 (r_c^2 + r_r^2); Coste et al. use "
        "0.001",
    )
    gold_model: str = HfArg(
        default="",
        help="a reward to compare the scores with (Kendall's tau); in the embedded world, its "
        "gold reward",
    )

    output_dir: str = HfArg(
        default="runs/rm/seed_{seed}",
        help="the folder that the run writes; {seed} stands for --seed",
    )
    batch_size: int = HfArg(default=32, help="pairs in a step, over all processes")
    lr: float | None = HfArg(
        default=None, help="peak learning rate of AdamW; by default 5e-4, with --sarm 2e-3"
    )
    warmup: int = HfArg(
        default=10, help="steps over which the learning rate rises from 0 to its peak"
    )
    eval_size: int = HfArg(default=512, help="how many held-out pairs to evaluate on")

    def __post_init__(self):
        self.set_sarm_defaults()  # a folder and a learning rate of its own
        if self.lr is None:
            self.lr = 5e-4
        super().__post_init__()
        at_least(self, 0, "max_length", "score_l2", "noise_seed")
        at_least(self, 1, "members")
        require(self.members == 1 or "{seed}" in self.output_dir, "--members needs {seed} in --output_dir: each has its own folder")
        require(self.members == 1 or self.distributed == "ddp", "--members trains each on one process; for --distributed fsdp "
                    "start train_rm.py once for each --seed")  # fmt: skip
        require(self.members > 1 or not self.independent_noise, "--independent_noise is for --members; one has its --noise_seed")
        require(0 <= self.label_noise <= 1, "--label_noise is a probability")
        if data.is_world(self.dataset) and not self.gold_model:
            self.gold_model = "world:gold"
        if self.members == 1:
            self.output_dir = self.output_dir.replace("{seed}", str(self.seed))


@unlock_afterwards()
def main(config):
    """Train one reward model, or --members of them. -> its summary, or {folder: summary}"""
    dist = setup(config.device, config.distributed)
    if config.members == 1:
        return train(config, dist)
    # Members are spread over the processes and each is trained by one alone: no gradients to exchange, the same bits on any number
    # of processes. On one process they come one after another (tests/bench/ensemble.py: no slower than stacked by torch.func).
    members = []
    for i in range(config.members):
        noise_seed = config.noise_seed + i * config.independent_noise
        members.append(replace(config, members=1, seed=config.seed + i, noise_seed=noise_seed, independent_noise=False))
    alone = Dist(0, 1, dist.device)
    mine = members[dist.rank :: dist.world]
    # Each process locks its members' folders: one that holds another run, or is in use, is an error
    # before anything is trained.
    dist.together(lambda: [RunFolder(member, alone) for member in mine])
    sarm_training.check_autoencoder(config)
    train_what_is_missing(config, "model")  # by all processes together
    for member in mine:
        print(f"\nmember {member.output_dir}", flush=True)
        train(member, alone)
    dist.barrier()
    summaries = {}
    for member in members:
        summaries[member.output_dir] = read_object(f"{member.output_dir}/summary.json", REPORTED, finite=False)
    dist.print(f"\n{config.members} members:", *(f"  {folder}: {report(result)}" for folder, result in summaries.items()))
    return summaries


def train(config, dist):
    """One reward model, from its data to its folder. -> its summary"""
    # ------------------------------------------------------------------------------------------------------------------- set-up
    divides(config, "batch_size", dist.world, "the number of processes")
    folder = RunFolder(config, dist)
    if folder.state == "done":
        return folder.already_done()

    # --------------------------------------------------------------------------------------------------------------------- data
    rows, held_out, note = load_splits(config, "pairs")  # held_out: {label: rows}
    if config.gold_model:
        check_reward(config.gold_model)
    sarm_training.check_autoencoder(config)  # before anything is trained for it
    train_what_is_missing(config, "model")
    flipped = np.random.default_rng([LABELS, config.noise_seed]).random(len(rows)) < config.label_noise  # training pairs only
    rows = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} if flip else r for r, flip in zip(rows, flipped)]
    training = sarm_training.prepare(config, dist) or PlainTraining(config)  # None without --sarm
    tokenizer = load_tokenizer(config.model)
    max_length = config.max_length or context_length(check_model(config.model))
    prompts, chosen, n_cut = data.encode(tokenizer, rows, "chosen", max_length, config.chat_template)
    rejected_prompts, rejected, more_cut = data.encode(tokenizer, rows, "rejected", max_length, config.chat_template)
    note += f", {flipped.sum()} labels flipped, {n_cut + more_cut} responses cut to {max_length} tokens"
    dist.print(f"reward model on {config.dataset}: {note}")
    check_texts(config, held_out["eval"], prompts, chosen, rejected_prompts, rejected, tokenizer, max_length)
    golds = gold_scores(held_out, tokenizer, max_length, config, dist) if config.gold_model else {}  # {label: [2, N]}, before any training

    # -------------------------------------------------------------------------------------------------------------------- model
    reward_model, note = training.load(dist)
    lm = training.lm
    speed_up(lm, dist.device, config.dtype, config.compile)
    dist.print(f"{sum(p.numel() for p in reward_model.parameters()):,} parameters, {note}")
    if config.checkpoint_activations:
        checkpoint_activations(reward_model)
    example = pack(prompts[:1], chosen[:1]).to(dist.device)

    def total(model):
        scores, further = training.score(model, example)
        return scores.sum() + sum(values.sum() for values in further.values())

    model = dist.wrap(reward_model, total, config.dtype)
    optimizer = adamw(reward_model, config.lr, config.betas, config.weight_decay)
    state = checkpoint.load(config.output_dir, reward_model, optimizer, dist) or {"step": 0}
    folder.create(state)

    # --------------------------------------------------------------------------------------------------------------------- loop
    progress = Progress(dist, "reward model", config.steps, state["step"])
    for step in range(state["step"] + 1, config.steps + 1):
        begun = time.perf_counter()
        torch.manual_seed(key(config.seed, step, dist.rank))  # dropout's noise
        mine = dist.share(data.batch_indices(len(rows), config.batch_size, step - 1, config.seed))
        reward_model.train()
        totals = defaultdict(lambda: torch.zeros((), device=dist.device))  # of the record
        lengths = torch.tensor([max(len(chosen[j]), len(rejected[j])) + len(prompts[j]) for j in mine])  # of a pair's longer row
        parts = dist.even(micro_batches(lengths, config.micro_batch_size, (config.tokens_per_micro_batch + 1) // 2))  # two rows a pair
        for part in parts:
            pairs = [mine[k] for k in sorted(part.tolist())]
            # Row j holds the chosen answer of pair j, row b + j its rejected one: [2 b, T].
            batch = pack(
                [prompts[j] for j in pairs] + [rejected_prompts[j] for j in pairs],
                [chosen[j] for j in pairs] + [rejected[j] for j in pairs],
                tokenizer.pad_token_id,
            ).to(dist.device)
            with sync_on(model, last=part is parts[-1]):
                with autocast(dist, config.dtype):
                    scores, further = training.score(model, batch)  # [2 b], {further loss: [b]}
                r_chosen, r_rejected = scores.chunk(2)  # [b], [b]
                # loss = mean over pairs of -log sigmoid(r_c - r_r) + beta/2 (r_c^2 + r_r^2)
                losses = -F.logsigmoid(r_chosen - r_rejected) + 0.5 * config.score_l2 * (r_chosen**2 + r_rejected**2)
                losses = training.add_further(losses, further)  # there are none without --sarm
                loss = losses.sum() / config.batch_size
                (loss * dist.world).backward()  # DDP and FSDP average over ranks; the loss is a sum
            # This micro-batch's share of the step's numbers.
            margin = r_chosen - r_rejected
            wins = pair_wins(r_chosen, r_rejected).float()  # a tie is half a win
            totals["loss"] += loss.detach()
            for name, values in {"accuracy": wins, "margin": margin, **further}.items():
                totals[name] += values.detach().sum() / config.batch_size
        lr = learning_rate(step - 1, config.steps, config.lr, config.schedule, config.warmup, config.final_lr)
        grad_norm = optimizer_step(optimizer, reward_model, lr, config.max_grad_norm, step)
        training.after_step()
        numbers = dist.sum(torch.stack(list(totals.values()))).tolist()  # of all processes
        record = {"step": step, **dict(zip(totals, numbers)), "grad_norm": grad_norm, "lr": lr}
        record |= {"seconds": time.perf_counter() - begun, "peak_memory_mb": peak_memory_mb(dist)}
        if config.eval_every and step % config.eval_every == 0 and step < config.steps:
            for label, part in held_out.items():
                result, _ = evaluate(reward_model, part, tokenizer, max_length, config, dist)
                record |= {f"{label}/{k}": v for k, v in result.items()}
                dist.print(f"step {step}: {report(record, label)}")
        folder.append("metrics.jsonl", [record])
        progress.step(step, f"loss {record['loss']:.3f}  margin {record['margin']:.2f}")
        if step % config.checkpoint_every == 0 or step == config.steps:
            folder.checkpoint(step, reward_model, optimizer, {}, config.keep_checkpoints)
    progress.close()

    # -------------------------------------------------------------------------------------------- standardise, evaluate, save
    _, scores = evaluate(reward_model, held_out["eval"], tokenizer, max_length, config, dist)
    require(
        varies(scores),
        f"{config.output_dir}: all {scores.numel()} held-out texts have the score "
        f"{scores[0, 0]:.4g}, so that there is no spread to standardise by: the model has learned "
        "nothing from its pairs",
    )
    reward_model.standardise(scores.mean().item(), scores.std().item())  # ddof 1
    summary = {}
    for label, part in held_out.items():
        result, scores = evaluate(reward_model, part, tokenizer, max_length, config, dist)
        if golds:
            tau = kendall_tau(scores.flatten(), golds[label].flatten(), permutations=200)
            result |= {"gold_kendall_tau": tau[0], "gold_kendall_p": tau[1], "n_texts": scores.numel()}
        summary |= {f"{label}/{k}": v for k, v in result.items()}
        dist.print(report(summary, label))
    lm.should_save_on_this_rank = lambda is_main: is_main  # transformers asks torch's rank: not 0 for some members
    if config.merge:
        merge(lm)
    folder.save_model(training.save, reward_model, tokenizer)
    if dist.main:
        plot_run(config.output_dir)
    return folder.finish(summary)


class PlainTraining:
    """What train() asks of a plain reward model. sarm_training.SarmTraining answers for a SARM."""

    def __init__(self, config):
        self.config = config

    def load(self, dist):
        """Give --model a new score head. -> the reward model, and a sentence on what is trained.

        Sets `lm`, the HF model in it.
        """
        reward_model = load_reward_model(self.config.model, dist.load_device, seed=self.config.seed)
        self.lm = reward_model.model
        return reward_model, choose_trained(self.lm, self.config)

    def score(self, model, batch):
        """Packed rows, the chosen ones first -> scores [2 b], further losses of pairs: none."""
        return model(batch), {}

    def add_further(self, losses, further):
        """Pairs' losses [b], with the further ones added: as they are."""
        return losses

    def after_step(self):
        """What is to be done after each optimizer step: nothing."""

    def save(self, reward_model, tokenizer, path):
        save_reward_model(reward_model, tokenizer, path)


def check_texts(config, held_out, prompts, chosen, rejected_prompts, rejected, tokenizer, max_length):
    """InputError where the texts decide before any training that scores can have no spread.

    Scores are standardised by their spread. Texts may be the same to a model once they are cut to
    max_length, or where the tokenizer knows none of their words.
    """
    what = "as token ids" if max_length is None else f"as token ids, cut to {max_length},"
    better = [prompt + response for prompt, response in zip(prompts, chosen)]
    worse = [prompt + response for prompt, response in zip(rejected_prompts, rejected)]
    require(
        better != worse,
        f"{config.dataset}: {what} chosen and rejected of every training pair are the same",
    )
    texts = set()
    for side in ("chosen", "rejected"):
        encoded = data.encode(tokenizer, held_out, side, max_length, config.chat_template)
        for prompt, response in zip(*encoded[:2]):
            texts.add(tuple(prompt + response))
    require(
        len(texts) > 1,
        f"{config.dataset}: {what} all texts of the {len(held_out)} held-out pairs are the same",
    )


@torch.no_grad()
def evaluate(reward_model, rows, tokenizer, max_length, config, dist):
    """Held-out pairs -> ({accuracy, ..., the length baselines}, scores [2, N] of chosen and rejected)."""
    reward_model.eval()
    mine = [rows[i] for i in dist.part(len(rows))]
    scores, lengths = [], []
    for field_ in ("chosen", "rejected"):
        prompts, responses, _ = data.encode(tokenizer, mine, field_, max_length, config.chat_template)
        part = torch.zeros(len(mine), device=dist.device)
        with gathered(reward_model), autocast(dist, config.dtype):
            batch = pack(prompts, responses, tokenizer.pad_token_id).to(dist.device) if mine else None
            for index in batch.micro_batches(config.micro_batch_size, None, config.tokens_per_micro_batch) if mine else []:
                part[index] = reward_model(batch.rows(index))
        scores.append(dist.gather(part).cpu())
        lengths.append(dist.gather(torch.tensor([len(r) for r in responses], dtype=torch.long, device=dist.device)).cpu())
    scores, lengths = torch.stack(scores), torch.stack(lengths)  # [2, N]
    margin = scores[0] - scores[1]
    accuracy = mean_se(pair_wins(*scores))
    result = {
        "accuracy": accuracy["mean"],
        "accuracy_se": accuracy["se"],
        "n_pairs": accuracy["n"],
        "longer_wins": ((lengths[0] > lengths[1]).double() + 0.5 * (lengths[0] == lengths[1])).mean().item(),
        "shorter_wins": ((lengths[0] < lengths[1]).double() + 0.5 * (lengths[0] == lengths[1])).mean().item(),
        "margin": margin.mean().item(),
        "margin_se": mean_se(margin)["se"],
        "score_mean": scores.mean().item(),
        "score_std": scores.std().item(),
    }
    return result, scores


def gold_scores(held_out, tokenizer, max_length, config, dist):
    """Gold of the held-out texts of each split: {label: [2, N]}, chosen and rejected."""
    gold, out = load_reward(config.gold_model, tokenizer, dist), {}
    for label, rows in held_out.items():
        texts = [{"prompt": r["prompt"], "response": r[field_]} for field_ in ("chosen", "rejected") for r in rows]  # [2 N]
        mine = [texts[i] for i in dist.part(len(texts))]
        prompts, responses, _ = data.encode(tokenizer, mine, "response", max_length, config.chat_template)
        batch = pack(prompts, responses, tokenizer.pad_token_id)
        answers = Answers([t["prompt"] for t in mine], [t["response"] for t in mine], batch)
        out[label] = dist.gather(score(gold, [answers], dist)).view(2, -1)
    return out


# What report() needs of a summary.
MEASURES = ("accuracy", "accuracy_se", "n_pairs", "longer_wins", "shorter_wins", "margin", "margin_se")
REPORTED = {f"eval/{name}": float for name in MEASURES}


def report(record, label="eval"):
    """What a summary, or a record with an evaluation, says on a split, in words."""
    r = {name.removeprefix(f"{label}/"): value for name, value in record.items() if name.startswith(f"{label}/")}
    text = "" if label == "eval" else f"{label}: "
    text += f"held-out pair accuracy {r['accuracy']:.3f} +- {r['accuracy_se']:.3f} (n = {r['n_pairs']}; "
    text += f"longer wins {r['longer_wins']:.3f}, shorter wins {r['shorter_wins']:.3f}), margin {r['margin']:.2f} +- {r['margin_se']:.2f}"
    if not math.isnan(r.get("gold_kendall_tau", math.nan)):
        text += f"; Kendall's tau with gold {r['gold_kendall_tau']:.3f} (p {r['gold_kendall_p']:.3f}, n = {r['n_texts']} texts)"
    return text


if __name__ == "__main__":
    cli.run(Config, main)

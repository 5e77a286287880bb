"""Fine-tuning on a fixed data set: teach a causal language model to answer
like the demonstrations (SFT), or to prefer as pairs do (DPO, IPO, SimPO).

    the embedded world, from random weights, on a CPU:
        python train_sft.py
    any Hugging Face causal LM, on JSONL {prompt, response}:
        python train_sft.py --model gpt2 --dataset my.jsonl --output_dir runs/my
    DPO, on {prompt, chosen, rejected}; the reference is --model:
        python train_sft.py --loss dpo --model runs/sft --output_dir runs/dpo
    the same for IPO, or for SimPO, whose loss needs no reference:
        python train_sft.py --loss ipo --model runs/sft --output_dir runs/ipo
    the same global batch on four processes:
        torchrun --nproc_per_node=4 train_sft.py

All losses read log-probs of response tokens (and EOS) only; those on
pairs are in nanorlhf/dpo.py. A policy that learns from pairs is evaluated
as PPO's is: it answers held-out prompts, and its KL and gold are measured.

    S answers in a row of data (SFT 1, pairs 2), b rows of a micro-batch,
    B = S b sequences, R response tokens, N held-out rows
"""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
import transformers
from transformers.hf_argparser import HfArg

from nanorlhf import data, world
from nanorlhf.chat_templates import end_ids, leave_out_of_splits
from nanorlhf.dpo import ROUNDING, dpo_loss, ipo_loss, simpo_loss
from nanorlhf.errors import at_least, divides, require
from nanorlhf.evaluation import PPOParts, evaluate, record_evaluation
from nanorlhf.hf.blocks import eager, sampling, speed_up
from nanorlhf.hf.folders import check_model, choose_max_length, context_length
from nanorlhf.hf.lora import cast_frozen, choose_trained, merge
from nanorlhf.models import Policy, load_policy, load_tokenizer, reference_of, save_policy
from nanorlhf.packing import micro_batches, pack, response_mask_of
from nanorlhf.rewards import check_reward, expand, load_reward
from nanorlhf.rollout import check_rollouts, generate, left_pad
from nanorlhf.runtime import checkpoint, cli
from nanorlhf.runtime.distributed import autocast, peak_memory_mb, setup, sync_on
from nanorlhf.runtime.flags import RunConfig, changed_flags
from nanorlhf.runtime.fsdp import checkpoint_activations, gathered
from nanorlhf.runtime.locks import unlock_afterwards
from nanorlhf.runtime.log import Progress, RunFolder, sample_table
from nanorlhf.runtime.optim import adamw, learning_rate, optimizer_step
from nanorlhf.runtime.plots import plot_run
from nanorlhf.runtime.rng import key
from nanorlhf.scoring import Scoring
from nanorlhf.show.page import write_page
from nanorlhf.splits import load_splits
from nanorlhf.stats import mean_se, pair_wins, ratio
from nanorlhf.tokens import cut_left, encode, ids_with_tokens, ready_prompts


class Loss(NamedTuple):
    """What goes with a --loss."""

    data: str  # the kind of its rows
    answers: tuple[str, ...]  # the answers in a row
    steps: int  # defaults, for the embedded world
    lr: float


PAIR = ("chosen", "rejected")
LOSSES = {
    "sft": Loss("sft", ("response",), steps=400, lr=3e-3),
    "dpo": Loss("pairs", PAIR, steps=100, lr=1e-4),
    "ipo": Loss("pairs", PAIR, steps=100, lr=1e-4),
    "simpo": Loss("pairs", PAIR, steps=100, lr=3e-5),  # at 1e-4 gold fell, in one seed
}
ON_PAIRS = ("dpo", "ipo", "simpo")
WITH_REFERENCE = ("dpo", "ipo")  # their losses compare the policy with the model it starts from
# {a flag: the losses that read it}
READ_BY = {
    "loss_on": ("sft",),
    "dpo_beta": ("dpo",),
    "ipo_tau": ("ipo",),
    "simpo_beta": ("simpo",),
    "simpo_gamma": ("simpo",),
    "label_noise": ON_PAIRS,
    "noise_seed": ON_PAIRS,
    "eval_answers": ON_PAIRS,
    "reward_model": ON_PAIRS,
    "gold_model": ON_PAIRS,
}
# What an evaluation asks that is no flag here: answers are samples of the policy as it is, and
# several reward models are averaged.
ANSWERING = {"temperature": 1.0, "objective": "mean", "uwo_lambda": 0.0, "reward_weights": []}


@dataclass
class Config(RunConfig):
    """SFT and losses on pairs: what is trained, on which loss"""

    model: str = HfArg(
        default="world",
        help="the language model to start from: a run folder, a model folder, a hub name, or "
        "'world', the embedded world's own, from random weights",
    )
    loss: str = HfArg(
        default="sft",
        metadata={"choices": tuple(LOSSES)},
        help="sft: on demonstrations; dpo, ipo and simpo: on pairs, from a trained --model, which "
        "is also the reference (simpo has none)",
    )
    loss_on: str = HfArg(
        default="all",
        metadata={"choices": ("all", "last")},
        help="sft on chats of several turns: learn all assistant turns, or the last one alone",
    )
    dpo_beta: float = HfArg(
        default=0.1, help="DPO's beta: the reward that one nat of log-prob stands for"
    )
    ipo_tau: float = HfArg(
        default=0.1,
        help="IPO's tau: the margin of a pair is drawn to 1 / (2 tau) nats of log-prob",
    )
    simpo_beta: float = HfArg(
        default=2.0, help="SimPO's beta: the reward of one nat of a token's mean log-prob"
    )
    simpo_gamma: float = HfArg(
        default=1.0, help="SimPO's gamma: the margin that the rewards of a pair should have"
    )
    eval_answers: bool = HfArg(
        default=True,
        help="losses on pairs: an evaluation also answers held-out prompts and measures KL, gold "
        "and proxy as PPO's does. The reference stays in memory for it",
    )
    reward_model: list[str] = HfArg(
        default_factory=list,
        help="the proxy, for evaluation only: a reward, or several that are averaged (named as "
        "train_ppo.py's)",
    )
    gold_model: str = HfArg(
        default="",
        help="a second reward, for evaluation only; in the embedded world, its gold reward",
    )
    max_length: int = HfArg(
        default=0, help="tokens in the longest prompt and answer; 0: the model's context"
    )
    max_new_tokens: int = HfArg(
        default=48,
        help="tokens in the longest sample that is printed; on pairs, in the longest answer of an "
        "evaluation too",
    )
    label_noise: float = HfArg(
        default=0.0, help="pairs: probability with which the label of a training pair is flipped"
    )
    noise_seed: int = HfArg(
        default=0, help="decides which labels are flipped: the same ones as in train_rm.py"
    )
    n_samples: int = HfArg(default=4, help="how many samples an evaluation prints")

    output_dir: str = HfArg(
        default="runs/{loss}", help="the folder that the run writes; {loss} stands for --loss"
    )
    steps: int | None = HfArg(
        default=None, help="how many optimizer steps to take; by default 400, on pairs 100"
    )
    lr: float | None = HfArg(
        default=None,
        help="peak learning rate of AdamW; by default 3e-3, on pairs 1e-4, with simpo 3e-5",
    )
    warmup: int = HfArg(
        default=20, help="steps over which the learning rate rises from 0 to its peak"
    )

    def __post_init__(self):
        self.output_dir = self.output_dir.replace("{loss}", self.loss)
        # Without --steps and --lr the loss's own apply: pairs need smaller steps, and fewer.
        defaults = LOSSES.get(self.loss, LOSSES["sft"])  # an unknown name is refused below
        if self.steps is None:
            self.steps = defaults.steps
        if self.lr is None:
            self.lr = defaults.lr
        super().__post_init__()
        at_least(self, 0, "max_length", "n_samples", "noise_seed", "simpo_gamma")
        at_least(self, 1, "max_new_tokens")
        for name in ("dpo_beta", "ipo_tau", "simpo_beta"):
            require(getattr(self, name) > 0, f"--{name} must be positive")
        check_losses(self)
        require(
            self.loss == "sft" or self.model != "world",
            f"--loss {self.loss} needs a trained --model, such as runs/sft",
        )
        require(
            self.model != "world" or not self.lora_rank,
            "--lora_rank needs a trained --model, not one that starts at random",
        )
        require(0 <= self.label_noise <= 1, "--label_noise is a probability")
        if self.reward_model:
            self.reward_model = expand(self.reward_model)
        if self.answers_prompts and data.is_world(self.dataset) and not self.gold_model:
            self.gold_model = "world:gold"

    @property
    def answers_prompts(self) -> bool:
        """Whether evaluations answer held-out prompts."""
        return self.loss in ON_PAIRS and self.eval_answers


def check_losses(config):
    """InputError for a flag that --loss does not read, or that no evaluation would read."""
    for flag in changed_flags(config, READ_BY):
        losses = READ_BY[flag.removeprefix("--")]
        is_read = config.loss in losses
        require(is_read, f"{flag} is for --loss {', '.join(losses)}, not {config.loss}")
    for name in ("reward_model", "gold_model"):
        is_read = config.eval_answers or not getattr(config, name)
        require(is_read, f"--{name} scores the answers of evaluations: it needs --eval_answers")


@unlock_afterwards()
def main(config):
    # ------------------------------------------------------------------------------------ set-up
    dist = setup(config.device, config.distributed)
    divides(config, "batch_size", dist.world, "the number of processes")
    folder = RunFolder(config, dist)
    if folder.status == "done":
        return folder.already_done()
    # What is wrong with a reward is said now, before anything is loaded.
    for spec in [*config.reward_model, config.gold_model]:
        if spec:
            check_reward(spec)
    torch.manual_seed(config.seed)

    # -------------------------------------------------------------------------------------- data
    # SFT: {"prompt": ..., "response": ...}; pairs: {"prompt": ..., "chosen": ..., "rejected": ...}.
    rows, held_out, note = load_splits(config, LOSSES[config.loss].data)  # held_out: {label: rows}
    if config.model == "world":
        model_config = world.model_config()
        tokenizer = world.tokenizer()
    else:
        model_config = check_model(config.model)
        tokenizer = load_tokenizer(config.model)
    max_length = choose_max_length(config.max_length, model_config)

    # Everything becomes token ids once, before the loop: a step only picks rows and packs them.
    rows, held_out = leave_out_of_splits(tokenizer, rows, held_out, config, dist.print)
    if config.label_noise:
        rows, n_flipped = data.flip_labels(rows, config.label_noise, config.noise_seed)
        note = f"{note}, {n_flipped} labels flipped"
    answers, cuts = encode_answers(rows, tokenizer, max_length, config)
    held_out_answers = {}
    for label, part in held_out.items():
        held_out_answers[label], _ = encode_answers(part, tokenizer, max_length, config)
    held_out_prompts = {}
    if config.answers_prompts:
        held_out_prompts = load_prompts(held_out, tokenizer, model_config, config, dist)
    start = "a new model" if config.model == "world" else config.model
    dist.print(f"{config.loss.upper()} of {start} on {config.dataset}: {note}, {cuts}")

    # ------------------------------------------------------------------------------------- model
    # No value head: these losses need log-probs alone.
    if config.model == "world":
        lm = transformers.AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
        policy = Policy(lm, value_head=False).to(dist.load_device)
    else:
        policy = load_policy(config.model, value_head=False, device=dist.load_device)
        # Evaluations sample answers.
        if config.n_samples or config.answers_prompts:
            check_rollouts(policy)
    note = choose_trained(policy.lm, config)

    # An evaluation on prompts measures the KL to the policy as it is now. This is a second model in
    # memory, but with LoRA, where the two have one language model.
    language_models = {policy.lm}
    reference = None
    if config.answers_prompts:
        reference = reference_of(policy, share=not dist.sharded)
        language_models.add(reference.lm)
    for lm in language_models:
        speed_up(lm, dist.device, config.dtype, config.compile)
        cast_frozen(lm, config)
    n_parameters = sum(parameter.numel() for parameter in policy.parameters())
    dist.print(f"{n_parameters:,} parameters, {note}")
    if config.checkpoint_activations:
        checkpoint_activations(policy)

    # On several processes the policy goes into DDP or is sharded (FSDP), the reference is sharded.
    first = answers[0]
    example = pack(first.prompts[:1], first.responses[:1]).to(dist.device)

    def sum_of_logprobs(model):
        return model(example, response_mask_of(example))["logprobs"].sum()

    model = dist.wrap(policy, sum_of_logprobs, config.dtype)
    parts = None
    if reference is not None:
        if reference.lm is not policy.lm:
            dist.wrap(reference, sum_of_logprobs, config.dtype)
        parts = prepare_evaluation(policy, model, reference, tokenizer, config, dist)
    optimizer = adamw(policy, config.lr, config.betas, config.weight_decay)

    # The reference of a loss is the policy as it stands here, before a checkpoint is loaded. The
    # data are fixed, so its log-probs are computed once: no step needs a second model.
    ref_logprobs = None
    held_out_ref_logprobs = {}
    if config.loss in WITH_REFERENCE:
        n_visited = min(len(rows), config.steps * config.batch_size)
        visited = data.batch_indices(len(rows), n_visited, 0, config.seed)  # what steps will read
        ref_logprobs = torch.zeros(2, len(rows), device=dist.device)  # of chosen, of rejected
        with gathered(policy):
            ref_logprobs[:, visited] = sequence_logprobs(
                policy, answers, visited, tokenizer, config, dist
            )
            for label, part in held_out_answers.items():
                held_out_ref_logprobs[label] = sequence_logprobs(
                    policy, part, range(len(held_out[label])), tokenizer, config, dist
                )

    # A run that was killed goes on from its last checkpoint.
    state = checkpoint.load(config.output_dir, policy, optimizer, dist) or {"step": 0}

    def answer_splits():
        """{label of a split: what answers to its prompts are worth, the answers}; {} for SFT"""
        return {label: evaluate(parts, part) for label, part in held_out_prompts.items()}

    def report(step, answered):
        """Evaluate, print the results and a few samples. -> the numbers, for metrics.jsonl

        answered: what answer_splits() has found.
        """
        # First the evaluation of the policy's answers, if any, then the loss's own measures.
        record = {}
        for label, (numbers, answer_rows) in answered.items():
            record |= record_evaluation(folder, step, label, numbers, answer_rows)
        with gathered(policy):
            for label, part in held_out_answers.items():
                if config.loss == "sft":
                    result = evaluate_demonstrations(policy, part[0], tokenizer, config, dist)
                else:
                    result = evaluate_pairs(
                        policy, part, held_out_ref_logprobs.get(label), tokenizer, config, dist
                    )
                record |= {f"{label}/{name}": value for name, value in result.items()}
                split = "" if label == "eval" else f"{label}: "
                dist.print(f"step {step}: {split}{in_words(result)}")
            texts = sample(policy, held_out["eval"], tokenizer, max_length, config, dist)
        samples = [{"step": step, **text} for text in texts]
        folder.append("samples.jsonl", samples)
        dist.print(sample_table(samples))
        return record

    # PPO's evaluations begin before the first step, and so do these. Answers come before anything
    # is written: a reward that fails leaves no trace.
    first_answers = {}
    if config.answers_prompts and state["step"] == 0:
        first_answers = answer_splits()
    folder.create(state)
    if first_answers:
        folder.append("metrics.jsonl", [{"step": 0, **report(0, first_answers)}])

    # -------------------------------------------------------------------------------------- loop
    progress = Progress(dist, config.loss, config.steps, state["step"], config.compile)
    for step in range(state["step"] + 1, config.steps + 1):
        begun = time.perf_counter()

        # 1. Every process takes its share of the global batch, and adds up gradients.
        torch.manual_seed(key(config.seed, step, dist.rank))  # dropout's noise
        index = data.batch_indices(len(rows), config.batch_size, step - 1, config.seed)
        # Tokens are counted over the whole batch, so that all processes divide by one number.
        n_tokens = count_tokens(answers, index)
        policy.train(config.loss == "sft")  # a reference has no dropout, so pairs have none either
        totals = add_gradients(
            model, answers, dist.share(index), n_tokens, ref_logprobs, tokenizer, config, dist
        )

        # 2. One step of the optimizer.
        lr = learning_rate(
            step - 1, config.steps, config.lr, config.schedule, config.warmup, config.final_lr
        )
        grad_norm = optimizer_step(optimizer, policy, lr, config.max_grad_norm, step)

        # 3. What happened, on all processes together. The last step is always evaluated: its
        # record becomes the summary.
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
            record |= report(step, answer_splits())
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
    """A prompt and its response for each row of a data set, as token ids."""

    prompts: list[Sequence[int]]
    responses: list[Sequence[int]]
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

    SFT has one answer in a row, a pair a chosen and a rejected one, in this order.
    """
    # Chosen and rejected are encoded together, since they share what is left of their prompt.
    names = LOSSES[config.loss].answers
    loss_on = config.loss_on if config.loss == "sft" else "last"
    encoded = encode(tokenizer, rows, names, max_length, config.chat_template, loss_on).compact()
    answers = []
    for field in names:
        answers.append(Sequences(encoded.prompts, encoded.responses[field], encoded.scored))
    return answers, encoded.describe_cuts(max_length)


def join(parts):
    """Several Sequences one after another."""
    prompts = []
    responses = []
    for part in parts:
        prompts += part.prompts
        responses += part.responses
    scored = parts[0].scored if len(parts) == 1 else None  # pairs are scored whole
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


def add_gradients(model, answers, mine, n_tokens, ref_logprobs, tokenizer, config, dist):
    """Add up the gradients of this process's rows `mine`, a list of indices.

    n_tokens: tokens of the global batch that the loss is on; ref_logprobs [2, rows]: of chosen and
    rejected answers under the reference, or None -> this process's share of the step's numbers,
    {name: scalar}.
    """
    # Both answers of a pair are in one micro-batch, since the loss is of their difference. A row is
    # S sequences, so each of them may have 1/S of the tokens.
    tokens = math.ceil(config.tokens_per_micro_batch / len(answers))
    row_lengths = longest_of_rows(answers, mine)  # [len(mine)]
    parts = dist.even(micro_batches(row_lengths, config.micro_batch_size, tokens))

    totals = defaultdict(lambda: torch.zeros((), device=dist.device))
    for i, part in enumerate(parts, 1):
        index = [mine[k] for k in part.tolist()]
        # Of pairs, row j holds the chosen answer of pair j, row b + j the rejected one.
        texts = join([sequences.at(index) for sequences in answers])
        batch = pack(texts.prompts, texts.responses, tokenizer.pad_token_id)
        batch = batch.to(dist.device)  # [S b, T]

        with sync_on(model, last=i == len(parts)):
            mask = texts.mask(batch)  # [S b, R]
            with autocast(dist, config.dtype):
                logprobs = model(batch, mask)["logprobs"]  # [S b, R]
            if config.loss == "sft":
                # loss = -sum of log pi(response token) / response tokens of the whole batch
                # Means over micro-batches would give the tokens of a small one more weight.
                loss = -logprobs.sum() / n_tokens
                stats = {}
            else:
                # The log-prob of a response is the sum over its tokens; masked positions hold 0.
                pi = logprobs.sum(1).view(2, -1)  # [2, b]
                lengths = mask.sum(1).view(2, -1)  # [2, b]
                ref = None if ref_logprobs is None else ref_logprobs[:, index]  # [2, b]
                loss, stats = pair_loss(pi, ref, lengths, config.batch_size, config)
            # DDP and FSDP average over ranks, and the loss is a sum.
            (loss * dist.world).backward()

        totals["loss"] += loss.detach()
        for name, value in stats.items():
            totals[name] += value
    return totals


def pair_loss(pi, ref, lengths, n_pairs, config):
    """The loss that --loss names, of b pairs. -> loss (scalar), {name: scalar}

    pi [2, b]: log-probs of chosen and rejected answers; ref [2, b] under the reference, or None;
    lengths [2, b]: their tokens, EOS included. n_pairs: pairs of the whole optimizer batch.
    """
    # The accuracy takes a margin within rounding for a tie. With dpo and ipo every pair is a tie at
    # the start, when the policy is its own reference.
    rounding = ROUNDING[config.dtype]
    if config.loss == "dpo":
        return dpo_loss(*pi, *ref, config.dpo_beta, n_pairs, rounding)
    if config.loss == "ipo":
        return ipo_loss(*pi, *ref, config.ipo_tau, n_pairs, rounding)
    return simpo_loss(*pi, *lengths, config.simpo_beta, config.simpo_gamma, n_pairs, rounding)


# -------------------------------------------------------------------- evaluation on held-out data


@torch.no_grad()
def token_sums(policy, sequences, tokenizer, config, dist):
    """Sum over the tokens of each row that the loss is on: log pi, right guesses, ones.

    -> [N, 3], float64. A guess is right where the token is the likeliest one. All processes call
    this.
    """
    # Each process reads its part of the rows; gather() gives all processes the sums of all rows.
    policy.eval()
    mine = sequences.at(dist.part(len(sequences)))
    sums = torch.zeros(len(mine), 3, dtype=torch.float64, device=dist.device)
    batch = pack(mine.prompts, mine.responses, tokenizer.pad_token_id).to(dist.device)
    for rows in batch.micro_batches(config.micro_batch_size, config.tokens_per_micro_batch):
        part = batch.rows(rows)
        mask = mine.at(rows.tolist()).mask(part)  # [m, R]
        with autocast(dist, config.dtype):
            out = policy(part, mask, correct=True)
        columns = [out["logprobs"].sum(1), out["correct"].sum(1), mask.sum(1)]
        sums[rows] = torch.stack(columns, 1).double()
    return dist.gather(sums).cpu()


def evaluate_demonstrations(policy, sequences, tokenizer, config, dist):
    """Evaluate on held-out demonstrations: perplexity, and accuracy over the response tokens.

    perplexity = exp(-mean of log pi), accuracy = the share of tokens that are the likeliest one.
    """
    # Means over tokens, with errors over rows: tokens of one text are not independent.
    logprobs, correct, n = token_sums(policy, sequences, tokenizer, config, dist).T  # [N] each
    loss, loss_se = ratio(-logprobs, n)
    accuracy, accuracy_se = ratio(correct, n)
    perplexity = math.exp(min(loss, 700))  # a float holds no e^710
    return {
        "perplexity": perplexity,
        "perplexity_se": perplexity * loss_se,  # d exp(loss) = exp(loss) d loss
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


def evaluate_pairs(policy, answers, ref_logprobs, tokenizer, config, dist):
    """Evaluate on held-out pairs: how often the chosen answer has the higher implicit reward.

    Also by how much. ref_logprobs [2, N]: of both answers under the reference, or None.
    `longer_wins` is the accuracy of a reward that knows nothing but the answer's length.
    """
    chosen, rejected = answers
    n_pairs = len(chosen)
    pi = sequence_logprobs(policy, answers, range(n_pairs), tokenizer, config, dist).cpu()  # [2, N]
    lengths = torch.stack([chosen.response_lengths(), rejected.response_lengths()])  # [2, N]

    # Each pair on its own: a standard error needs them one by one.
    columns = defaultdict(list)  # {name: [N]}
    for i in range(n_pairs):
        pair = slice(i, i + 1)
        ref = None if ref_logprobs is None else ref_logprobs[:, pair].cpu()
        loss, stats = pair_loss(pi[:, pair], ref, lengths[:, pair], 1, config)
        for name, value in {"loss": loss, **stats}.items():
            columns[name].append(value)

    result = {}
    for name, values in columns.items():
        number = mean_se(torch.stack(values))
        result[name] = number["mean"]
        result[f"{name}_se"] = number["se"]
    result["longer_wins"] = pair_wins(*lengths).float().mean().item()
    result["n_pairs"] = n_pairs
    return result


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
    first_field = LOSSES[config.loss].answers[:1]
    prompts = encode(tokenizer, rows, first_field, chat=config.chat_template).prompts
    # Prompt and answer must fit into the context together: the answer gets its room first.
    longest = config.max_new_tokens
    if max_length:
        longest = min(longest, max_length - 1)  # a prompt keeps at least one token
        room = max_length - longest
        prompts = [cut_left(prompt, room, tokenizer.bos_token_id) for prompt in prompts]

    ids, mask = left_pad(prompts, tokenizer.pad_token_id)
    n_embeddings = policy.lm.config.get_text_config().vocab_size
    # The seed is the same in each evaluation, so that samples show what training has changed. A few
    # samples are not worth compiling for, nor worth the memory that is then kept.
    with autocast(dist, config.dtype), eager(policy.lm), sampling(policy.lm):
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
    for row, response in zip(rows, rollout.texts(tokenizer)):
        samples.append({"prompt": row["prompt"], "response": response})
    return samples


# ------------------------------------------------------ a policy from pairs, evaluated as PPO's is


def load_prompts(held_out, tokenizer, model_config, config, dist):
    """The prompts that an evaluation answers. held_out {label: pairs} -> {label: Prompts}

    In the embedded world they are those that train_ppo.py evaluates on, each once, so that curves
    of both can be laid over each other; else those of the held-out pairs. A prompt is cut on the
    left where the context is too short for it and its answer.
    """
    if data.is_world(config.dataset):
        _, held_out, _ = load_splits(config, "prompts")
    # room: what the answer leaves of the context for the prompt; 0 stands for no limit.
    context = context_length(model_config)
    room = max(1, context - config.max_new_tokens) if context else 0

    prompts = {}
    for label, rows in held_out.items():
        prompts[label] = ready_prompts(
            tokenizer, rows, model_config, config.max_new_tokens, room, config.chat_template
        )
        require(
            len(rows) >= dist.world,
            f"{len(rows)} held-out prompts are fewer than the {dist.world} processes",
        )
    return prompts


def prepare_evaluation(policy, model, reference, tokenizer, config, dist):
    """What evaluation.evaluate() needs: models, and rewards that only evaluate. -> PPOParts"""
    # Neither reward is learned from here. The proxy is what PPO would have maximised, and gold says
    # what the answers are worth.
    settings = SimpleNamespace(**vars(config), **ANSWERING)
    scoring = None
    if config.reward_model:
        scoring = Scoring(settings)
        scoring.load(tokenizer, dist)
    gold = None
    if config.gold_model:
        gold = load_reward(config.gold_model, tokenizer, dist, config.micro_batch_size)
    return PPOParts(settings, dist, tokenizer, policy, model, reference, scoring, gold)


if __name__ == "__main__":
    cli.run(Config, main)

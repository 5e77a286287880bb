r"""Train a reward model on preference pairs: a causal LM's trunk with a scalar
on the last token, loss -log sigmoid(r_c - r_r).

    the embedded world, from runs/sft:
        python train_rm.py
    an ensemble, runs/rm/seed_0 to runs/rm/seed_4:
        python train_rm.py --members 5
    one whose members start from SFT policies of their own:
        python train_rm.py --members 5 --model 'runs/sft_{seed}' \
            --output_dir 'runs/starts/seed_{seed}'
    one reward model for the price of five, by the mean of their weights:
        python train_rm.py --members 5 --head_seed 0 \
            --output_dir 'runs/warm/seed_{seed}'
        python train_rm.py --average 'runs/warm/seed_{seed}' \
            --output_dir runs/warm/averaged
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
Coste et al. 2024 (2310.02743); their starts: Eisenstein et al. 2024
(2312.09244); the mean of their weights: Rame et al. 2024 (2401.12187).

    B pairs, T tokens, D hidden
"""

import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from transformers.hf_argparser import HfArg

from nanorlhf import data
from nanorlhf.chat_templates import leave_out_of_splits
from nanorlhf.control import sarm_training
from nanorlhf.ensemble import average_weights
from nanorlhf.errors import InputError, at_least, divides, require
from nanorlhf.hf.blocks import speed_up
from nanorlhf.hf.folders import check_model, choose_max_length
from nanorlhf.hf.lora import cast_frozen, choose_trained, merge
from nanorlhf.models import (
    knows_scale,
    load_reward_model,
    load_shared_tokenizer,
    load_tokenizer,
    resolve,
    save_reward_model,
)
from nanorlhf.packing import Answers, Packed, micro_batches, pack
from nanorlhf.rewards import check_reward, expand, load_reward, score
from nanorlhf.runtime import checkpoint, cli
from nanorlhf.runtime.distributed import Dist, autocast, peak_memory_mb, setup, sync_on
from nanorlhf.runtime.files import read_object
from nanorlhf.runtime.flags import LoraFlags, OptimFlags, RunConfig
from nanorlhf.runtime.fsdp import checkpoint_activations, gathered
from nanorlhf.runtime.locks import unlock_afterwards
from nanorlhf.runtime.log import Progress, RunFolder
from nanorlhf.runtime.optim import adamw, learning_rate, optimizer_step
from nanorlhf.runtime.plots import plot_run
from nanorlhf.runtime.rng import key
from nanorlhf.runtime.settings import read_config
from nanorlhf.sarm import is_sarm
from nanorlhf.show.page import write_page
from nanorlhf.splits import load_splits
from nanorlhf.stages import check_inputs, train_what_is_missing
from nanorlhf.stats import kendall_tau, mean_se, pair_wins, varies
from nanorlhf.tokens import encode

# The flags of a training, which --average has no use for: a few, and those of three groups.
TRAINING_FLAGS = ["label_noise", "noise_seed", "score_l2", "checkpoint_every", "keep_checkpoints"]
TRAINING_FLAGS += ["checkpoint_activations", "compile"]
TRAINING_FLAGS += [flag.name for flag in fields(OptimFlags)]
TRAINING_FLAGS += [flag.name for flag in fields(LoraFlags)]
TRAINING_FLAGS += [flag.name for flag in fields(sarm_training.Flags)]
# --average refuses these too: its own models are what it starts from.
NOT_FOR_AVERAGE = [*TRAINING_FLAGS, "model", "members", "independent_noise", "head_seed"]


@dataclass
class Config(sarm_training.Flags, RunConfig):
    """Reward models: what they start from, and what they learn from"""

    model: str = HfArg(
        default="runs/sft",
        help="the causal language model to start from: a run folder, a model folder or a hub name; "
        "{seed} stands for --seed, so that each of --members has a start of its own (name it again "
        "with --resume)",
    )
    members: int = HfArg(
        default=1,
        help="train an ensemble of this many reward models, with the seeds --seed, --seed + 1, ...",
    )
    head_seed: int | None = HfArg(
        default=None,
        help="decides the weights that the score head starts from; by default --seed. Members that "
        "are to be averaged share it",
    )
    average: list[str] = HfArg(
        default_factory=list,
        help="train nothing: write the reward model whose weights are the mean of these models' "
        "weights, by default into runs/rm/averaged ({seed} stands for all that exist)",
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
        require(
            self.members == 1 or "{seed}" in self.output_dir,
            "--members needs {seed} in --output_dir: each has its own folder",
        )
        require(
            self.members == 1 or self.distributed == "ddp",
            "--members trains each on one process; for --distributed fsdp start train_rm.py once "
            "for each --seed",
        )
        require(
            self.members > 1 or not self.independent_noise,
            "--independent_noise is for --members; one has its --noise_seed",
        )
        require(0 <= self.label_noise <= 1, "--label_noise is a probability")
        if self.head_seed is not None:
            at_least(self, 0, "head_seed")
            require(not self.sarm, "--sarm starts from a head of zeros, which has no --head_seed")
        if self.average:
            self.check_average()
        if data.is_world(self.dataset) and not self.gold_model:
            self.gold_model = "world:gold"
        # Each of several members fills in a seed of its own (train_members).
        if self.members == 1:
            self.output_dir = self.output_dir.replace("{seed}", str(self.seed))
            self.model = self.model.replace("{seed}", str(self.seed))

    def check_average(self):
        """InputErrors of --average. The first of its models is the --model of the run."""
        require(self.members == 1 and not self.sarm, "--average trains no --members and no --sarm")
        require(self.head_seed is None, "--average starts no score head, which --head_seed is for")
        self.average = expand(self.average, "--average")
        config_class = type(self)
        require(
            self.model in (config_class.model, self.average[0]),
            "--average starts from its own models, and takes no --model",
        )
        self.model = self.average[0]
        if self.output_dir == config_class.output_dir:
            self.output_dir = "runs/rm/averaged"

        # A flag that nothing reads is a mistake: whoever named it expects something of it.
        defaults = config_class()
        unread = []
        for name in TRAINING_FLAGS:
            if getattr(self, name) != getattr(defaults, name):
                unread.append(f"--{name}")
        require(not unread, f"--average trains nothing, so nothing reads {', '.join(unread)}")


@unlock_afterwards()
def main(config):
    """Train one reward model, or --members of them. -> its summary, or {folder: summary}"""
    dist = setup(config.device, config.distributed)
    if config.average:
        return average_members(config, dist)
    if config.members == 1:
        return train(config, dist)
    return train_members(config, dist)


def train_members(config, dist):
    """Train the members of an ensemble, spread over the processes. -> {folder: summary}

    Each member is trained by one process alone: there are no gradients to exchange, and the bits
    are the same on any number of processes. On one process the members come one after another
    (tests/bench/ensemble.py: no slower than stacked by torch.func).
    """
    members = []
    for i in range(config.members):
        # Members share the flipped labels, unless each is to have its own.
        noise_seed = config.noise_seed
        if config.independent_noise:
            noise_seed += i
        member = replace(
            config,
            members=1,
            seed=config.seed + i,  # in the names of its --model and its folder, too
            noise_seed=noise_seed,
            independent_noise=False,
        )
        members.append(member)
    # A process trains its members as if it were the only one: no step waits for another process.
    alone = Dist(0, 1, dist.device)
    mine = members[dist.rank :: dist.world]

    # Each process locks its members' folders: one that holds another run, or is in use, is an error
    # before anything is trained.
    def lock_folders():
        for member in mine:
            RunFolder(member, alone)

    dist.together(lock_folders)
    # So is a --model that cannot be used, and an autoencoder that is not there.
    for member in members:
        check_inputs(member, "model")
    sarm_training.check_autoencoder(config)
    train_what_is_missing(config, "model")  # by all processes together
    for member in mine:
        print(f"\nmember {member.output_dir}", flush=True)
        train(member, alone)
    dist.barrier()

    # The other processes' summaries are read from their files.
    summaries = {}
    dist.print(f"\n{config.members} members:")
    for member in members:
        path = f"{member.output_dir}/summary.json"
        summary = read_object(path, REPORTED, finite=False)
        summaries[member.output_dir] = summary
        dist.print(f"  {member.output_dir}: {report(summary)}")
    return summaries


def train(config, dist):
    """Train one reward model, from its data to its folder. -> its summary"""
    # ------------------------------------------------------------------------------------ set-up
    divides(config, "batch_size", dist.world, "the number of processes")
    folder = RunFolder(config, dist)
    if folder.status == "done":
        return folder.already_done()

    # -------------------------------------------------------------------------------------- data
    # {"prompt": ..., "chosen": ..., "rejected": ...}. held_out: {label of a split: rows}
    rows, held_out, note = load_splits(config, "pairs")
    if config.gold_model:
        check_reward(config.gold_model)
    sarm_training.check_autoencoder(config)  # before anything is trained for it
    train_what_is_missing(config, "model")
    # A SARM is loaded and trained in its own way; without --sarm it prepares None.
    training = sarm_training.prepare(config, dist) or PlainTraining(config)
    tokenizer, pairs, held_out_pairs = encode_data(rows, held_out, note, config, dist)
    # Gold scores come before any training: a gold reward that fails then wastes none.
    golds = gold_scores(held_out_pairs, tokenizer, config, dist)  # {label: [2, N]}

    # ------------------------------------------------------------------------------------- model
    reward_model, model = prepare_model(training, pairs, config, dist)
    optimizer = adamw(reward_model, config.lr, config.betas, config.weight_decay)
    # A run that was killed goes on from its last checkpoint.
    state = checkpoint.load(config.output_dir, reward_model, optimizer, dist) or {"step": 0}
    folder.create(state)

    # -------------------------------------------------------------------------------------- loop
    progress = Progress(dist, "reward model", config.steps, state["step"], config.compile)
    for step in range(state["step"] + 1, config.steps + 1):
        begun = time.perf_counter()

        # 1. Every process takes its share of the global batch, and adds up gradients.
        torch.manual_seed(key(config.seed, step, dist.rank))  # dropout's noise
        index = data.batch_indices(len(pairs), config.batch_size, step - 1, config.seed)
        reward_model.train()  # evaluations have switched dropout off
        totals = add_gradients(training, model, pairs, dist.share(index), config, dist)

        # 2. One step of the optimizer.
        lr = learning_rate(
            step - 1, config.steps, config.lr, config.schedule, config.warmup, config.final_lr
        )
        grad_norm = optimizer_step(optimizer, reward_model, lr, config.max_grad_norm, step)
        training.after_step()

        # 3. What happened, on all processes together: one call adds up all shares.
        shares = torch.stack(list(totals.values()))
        numbers = dist.sum(shares).tolist()
        record = {
            "step": step,
            **dict(zip(totals, numbers)),
            "grad_norm": grad_norm,
            "lr": lr,
            "seconds": time.perf_counter() - begun,
            "peak_memory_mb": peak_memory_mb(dist),
        }
        # Training pairs may be visited many times, so only held-out ones show what was learned.
        is_last = step == config.steps  # it is evaluated below, with standardised scores
        if config.eval_every and step % config.eval_every == 0 and not is_last:
            prefix = f"step {step}: "
            record |= evaluate_splits(reward_model, held_out_pairs, {}, config, dist, prefix)
        folder.append("metrics.jsonl", [record])
        progress.step(step, f"loss {record['loss']:.3f}  margin {record['margin']:.2f}")
        if is_last or step % config.checkpoint_every == 0:
            folder.checkpoint(step, reward_model, optimizer, {}, config.keep_checkpoints)
    progress.close()

    # -------------------------------------------------------------- standardise, evaluate, save
    # Scores get a common unit first: without it the members of an ensemble could not be compared,
    # and a KL coefficient would mean something else for each.
    standardise(reward_model, held_out_pairs["eval"], config, dist)
    summary = evaluate_splits(reward_model, held_out_pairs, golds, config, dist)
    # transformers saves where torch's rank is 0, and some members are trained on other ranks.
    training.lm.should_save_on_this_rank = lambda is_main: is_main
    if config.merge:
        merge(training.lm)
    folder.save_model(training.save, reward_model, tokenizer)
    if dist.main:
        plot_run(config.output_dir)
    folder.finish(summary)
    write_page(folder.path, dist)
    return summary


def encode_data(rows, held_out, note, config, dist):
    """Encode the rows, some with flipped labels. -> tokenizer, Pairs, {label of a split: Pairs}

    note: how the rows were divided, which is printed.
    """
    # Only training labels are flipped, so that held-out pairs show what the noise has done.
    tokenizer = load_tokenizer(config.model)
    rows, held_out = leave_out_of_splits(tokenizer, rows, held_out, config, dist.print)
    rows, n_flipped = data.flip_labels(rows, config.label_noise, config.noise_seed)

    max_length = choose_max_length(config.max_length, check_model(config.model))
    # Both answers of a pair are cut together, and keep the same part of the prompt.
    pairs, cuts = encode_pairs(rows, tokenizer, max_length, config)
    dist.print(f"reward model on {config.dataset}: {note}, {n_flipped} labels flipped, {cuts}")
    held_out_pairs = encode_splits(held_out, tokenizer, max_length, config)
    check_texts(pairs, held_out_pairs["eval"], max_length, config)
    return tokenizer, pairs, held_out_pairs


def prepare_model(training, pairs, config, dist):
    """Load the reward model, and make it ready. -> the model, and the module that the loop calls

    On one process the two are the same. On several the second is DDP's or FSDP's.
    """
    # A reward model starts as the trunk of the SFT policy, which knows about texts, with a new head
    # in the place of the LM head.
    reward_model, note = training.load(dist)
    lm = training.lm
    speed_up(lm, dist.device, config.dtype, config.compile)
    cast_frozen(lm, config)
    n_parameters = sum(parameter.numel() for parameter in reward_model.parameters())
    dist.print(f"{n_parameters:,} parameters, {note}")
    if config.checkpoint_activations:
        checkpoint_activations(reward_model)

    # DDP and FSDP make their first pass on an example (Dist.wrap), by a scalar that uses all
    # trained weights.
    example = pack(pairs.prompts[:1], pairs.chosen[:1]).to(dist.device)

    def sum_of_outputs(model):
        scores, further = training.score(model, example)
        return scores.sum() + sum(values.sum() for values in further.values())

    return reward_model, dist.wrap(reward_model, sum_of_outputs, config.dtype)


# ---------------------------------------------------------------------------- the mean of weights


def average_members(config, dist):
    """Write the reward model whose weights are the mean of --average's (WARM). -> its summary

    What train() does before its loop and after it, and the mean in the place of the loop.
    """
    folder = RunFolder(config, dist)
    if folder.status == "done":
        return folder.already_done()
    check_members(config.average)

    # Held-out texts set the scale of the mean's scores, and say what they are worth.
    tokenizer = load_shared_tokenizer(config.model, config.average)
    rows, held_out, note = load_splits(config, "pairs")
    _, held_out = leave_out_of_splits(tokenizer, rows, held_out, config, dist.print)
    max_length = choose_max_length(config.max_length, check_model(config.model))
    held_out_pairs = encode_splits(held_out, tokenizer, max_length, config)
    golds = gold_scores(held_out_pairs, tokenizer, config, dist)

    # One member is loaded after another, when its weights are added.
    members = (load_raw_member(path, dist.device) for path in config.average)
    try:
        reward_model = average_weights(members)
    except ValueError as error:  # models of different architectures
        raise InputError(f"--average: {error}") from None
    folder.create()
    n_members = len(config.average)
    dist.print(f"the mean of {n_members} reward models on {config.dataset}: {note}")

    # The mean of the weights has a scale of its own, which no member's scale tells.
    standardise(reward_model, held_out_pairs["eval"], config, dist)
    summary = evaluate_splits(reward_model, held_out_pairs, golds, config, dist)
    folder.save_model(save_reward_model, reward_model, tokenizer)
    folder.finish(summary)
    write_page(folder.path, dist)
    return summary


def load_raw_member(path, device):
    """Load a reward model, with the score head that it was trained to.

    Pitfall: a head in a folder is divided by the standard deviation of its own scores. In a mean of
    such heads, the members whose scores differed least would count most.
    """
    reward_model = load_reward_model(path, device)
    reward_model.undo_standardise()
    return reward_model


def check_members(paths):
    """InputError where the weights of these reward models have no meaningful mean."""
    # Models that were trained from one start stay close enough together that what lies between them
    # is a good model too (Rame et al. 2024). Between models of two starts it need not be.
    seen = set()
    starts = set()
    for path in paths:
        place = os.path.realpath(resolve(path))
        require(place not in seen, f"--average names {path} twice")
        seen.add(place)
        require(not is_sarm(path), f"{path}: a SARM cannot be averaged")
        require(
            knows_scale(path),
            f"{path}: no reward_std is kept with this model, the scale of its scores before they "
            "were standardised: --average needs reward models that train_rm.py has saved with it",
        )
        # The folder of a run says what the model started from; a folder of a model alone does not.
        is_run = resolve(path) != path and os.path.isfile(os.path.join(path, "config.json"))
        if is_run:
            starts.add(read_start(path))
    require(
        len(starts) <= 1,
        f"--average: these models started from {len(starts)} different models or score heads, and "
        "the mean of weights that have nothing in common is noise: train them with one --model and "
        "one --head_seed",
    )


def read_start(run):
    """What the reward model of a run started from: (the model's content, its score head's seed).

    Runs that have no fingerprint of the model give its name.
    """
    settings = read_config(os.path.join(run, "config.json"))
    start = settings.get("model")
    # The folder of a run stands for the model/ inside it.
    for place in (start, f"{start}/model"):
        if place in settings["inputs"]:
            start = settings["inputs"][place]["digest"]
    head_seed = settings.get("head_seed")
    if head_seed is None:
        head_seed = settings.get("seed")
    return start, head_seed


# -------------------------------------------------------------------------------- a plain training


class PlainTraining:
    """What train() asks of a plain reward model. sarm_training.SarmTraining answers for a SARM."""

    further_weight = 0.0  # of further losses, which a SARM alone has

    def __init__(self, config):
        self.config = config

    def load(self, dist):
        """Give --model a new score head. -> the reward model, and a sentence on what is trained.

        Sets `lm`, the HF model in it.
        """
        head_seed = self.config.head_seed
        if head_seed is None:
            head_seed = self.config.seed
        reward_model = load_reward_model(self.config.model, dist.load_device, seed=head_seed)
        self.lm = reward_model.model
        return reward_model, choose_trained(self.lm, self.config)

    def score(self, model, batch):
        """Packed rows, the chosen ones first -> scores [2 b], further losses of pairs: none."""
        return model(batch), {}

    def after_step(self):
        """Nothing has to be done after an optimizer step."""

    def save(self, reward_model, tokenizer, path):
        save_reward_model(reward_model, tokenizer, path)


# ----------------------------------------------------------------------------------------- pairs


@dataclass
class Pairs:
    """Preference pairs as token ids, an entry a pair, and the rows of data they come from."""

    prompts: list[Sequence[int]]
    chosen: list[Sequence[int]]
    rejected: list[Sequence[int]]
    rows: list[dict]
    pad_id: int

    def __len__(self):
        return len(self.chosen)

    def at(self, index: Sequence[int]) -> "Pairs":
        """The pairs with these indices."""
        prompts = [self.prompts[j] for j in index]
        chosen = [self.chosen[j] for j in index]
        rejected = [self.rejected[j] for j in index]
        rows = [self.rows[j] for j in index]
        return Pairs(prompts, chosen, rejected, rows, self.pad_id)

    def lengths(self, index: list[int]) -> torch.Tensor:
        """Tokens of the longer row of each of these pairs: [b]."""
        lengths = []
        for j in index:
            longer_answer = max(len(self.chosen[j]), len(self.rejected[j]))
            lengths.append(len(self.prompts[j]) + longer_answer)
        return torch.tensor(lengths)

    def pack(self, index: list[int]) -> Packed:
        """The rows of b pairs: row j is the chosen answer of pair j, row b + j the rejected one."""
        part = self.at(index)
        return pack(part.prompts + part.prompts, part.chosen + part.rejected, self.pad_id)


def encode_pairs(rows, tokenizer, max_length, config):
    """Rows {prompt, chosen, rejected} -> Pairs, and a sentence on what had to be cut."""
    sides = ("chosen", "rejected")
    encoded = encode(tokenizer, rows, sides, max_length, config.chat_template).compact()
    chosen = encoded.responses["chosen"]
    rejected = encoded.responses["rejected"]
    pairs = Pairs(encoded.prompts, chosen, rejected, rows, tokenizer.pad_token_id)
    return pairs, encoded.describe_cuts(max_length)


def encode_splits(held_out, tokenizer, max_length, config):
    """Held-out rows {label of a split: rows} -> {label: Pairs}, once for all evaluations."""
    encoded = {}
    for label, rows in held_out.items():
        encoded[label], _ = encode_pairs(rows, tokenizer, max_length, config)
    return encoded


def check_texts(pairs, held_out, max_length, config):
    """InputError where the texts decide before any training that scores can have no spread.

    pairs, held_out: Pairs to train on, and to set the scores' scale by.

    Scores are standardised by their spread. Texts may be the same to a model once they are cut to
    max_length, or where the tokenizer knows none of their words.
    """
    what = "as token ids"
    if max_length is not None:
        what = f"as token ids, cut to {max_length},"

    # A pair of two equal answers teaches nothing: r_c - r_r is 0 whatever the weights are.
    require(
        pairs.chosen != pairs.rejected,
        f"{config.dataset}: {what} chosen and rejected of every training pair are the same",
    )

    # One text alone has one score, and a spread of zero to divide by.
    texts = set()
    for responses in (held_out.chosen, held_out.rejected):
        for prompt, response in zip(held_out.prompts, responses):
            texts.add(tuple(prompt + response))
    require(
        len(texts) > 1,
        f"{config.dataset}: {what} all texts of the {len(held_out)} held-out pairs are the same",
    )


# ------------------------------------------------------------------------------------------ loss


def add_gradients(training, model, pairs, mine, config, dist):
    """Add up the gradients of this process's pairs `mine`, a list of indices.

    -> their share of the global batch's means, {loss, accuracy, margin, further losses: scalar}
    """
    # Both rows of a pair are in one micro-batch, since the loss is of their difference. So the
    # longer one may have half of the tokens.
    tokens = math.ceil(config.tokens_per_micro_batch / 2)
    parts = micro_batches(pairs.lengths(mine), config.micro_batch_size, tokens)
    parts = dist.even(parts)

    # Every sum is divided by the size of the global batch, so that the shares of micro-batches and
    # processes add up to the means of the global batch.
    totals = defaultdict(lambda: torch.zeros((), device=dist.device))
    for i, part in enumerate(parts, 1):
        places = sorted(part.tolist())  # in the order of the batch, not of their lengths
        batch = pairs.pack([mine[k] for k in places]).to(dist.device)  # [2 b, T]
        with sync_on(model, last=i == len(parts)):
            with autocast(dist, config.dtype):
                scores, further = training.score(model, batch)  # [2 b], {further loss: [b]}
            r_chosen, r_rejected = scores.chunk(2)  # [b], [b]
            losses = pair_losses(r_chosen, r_rejected, config.score_l2)
            for values in further.values():
                losses = losses + training.further_weight * values
            loss = losses.sum() / config.batch_size
            # DDP and FSDP average over ranks, and the loss is a sum.
            (loss * dist.world).backward()

        totals["loss"] += loss.detach()
        of_pairs = {
            "accuracy": pair_wins(r_chosen, r_rejected).float(),  # a tie is half a win
            "margin": r_chosen - r_rejected,
            **further,
        }
        for name, values in of_pairs.items():
            totals[name] += values.detach().sum() / config.batch_size
    return totals


def pair_losses(r_c: torch.Tensor, r_r: torch.Tensor, beta: float) -> torch.Tensor:
    """The loss of each pair, from the scores of its chosen and of its rejected answer.

        loss = -log sigmoid(r_c - r_r) + beta / 2 (r_c^2 + r_r^2)

    r_c, r_r [b] -> [b]. The first term is the Bradley-Terry loss (Stiennon et al. 2020, section
    3.4), the second keeps scores near 0 (Coste et al. 2024).
    """
    preference = -F.logsigmoid(r_c - r_r)
    penalty = 0.5 * beta * (r_c**2 + r_r**2)
    return preference + penalty


# ------------------------------------------------------------------------------------ evaluation


def standardise(reward_model, pairs, config, dist):
    """Give the scores of held-out Pairs mean 0 and standard deviation 1.

    The loss sees differences alone, so a score's zero and unit are arbitrary: the held-out texts
    set them.
    """
    _, scores = evaluate(reward_model, pairs, config, dist)
    require(
        varies(scores),
        f"{config.output_dir}: all {scores.numel()} held-out texts have the score "
        f"{scores[0, 0]:.4g}, so that there is no spread to standardise by: the model has learned "
        "nothing from its pairs",
    )
    reward_model.standardise(scores.mean().item(), scores.std().item())  # ddof 1


def evaluate_splits(reward_model, held_out_pairs, golds, config, dist, prefix=""):
    """Evaluate the held-out splits, and print a line for each. -> {"label/name": number}

    golds {label: [2, N]}: with them also Kendall's tau. prefix: what each line begins with.
    """
    record = {}
    for label, pairs in held_out_pairs.items():
        result, scores = evaluate(reward_model, pairs, config, dist)
        # All texts together, chosen and rejected: does their order by score agree with gold's?
        if golds:
            tau, p = kendall_tau(scores.flatten(), golds[label].flatten(), permutations=200)
            result |= {"gold_kendall_tau": tau, "gold_kendall_p": p, "n_texts": scores.numel()}
        record |= {f"{label}/{name}": value for name, value in result.items()}
        dist.print(prefix + report(record, label))
    return record


@torch.no_grad()
def evaluate(reward_model, pairs, config, dist):
    """Score held-out Pairs. -> {accuracy, ..., the length baselines}, scores [2, N]

    The first row of the scores is of the chosen answers, the second of the rejected ones.
    """
    # Each process scores its part of the pairs, chosen answers first. gather() puts the parts
    # together in the order of the pairs.
    reward_model.eval()
    mine = pairs.at(dist.part(len(pairs)))
    scores = []
    lengths = []
    for responses in (mine.chosen, mine.rejected):
        batch = pack(mine.prompts, responses, mine.pad_id).to(dist.device)
        own_scores = score_rows(reward_model, batch, config, dist)
        scores.append(dist.gather(own_scores).cpu())
        lengths.append(dist.gather(batch.response_lengths).cpu())
    scores = torch.stack(scores)  # [2, N]
    lengths = torch.stack(lengths)  # [2, N]

    # Accuracy is how often the chosen answer scores higher. Two rewards that know nothing but the
    # answer's length stand beside it: a model must beat both to have learned more.
    margin = scores[0] - scores[1]
    accuracy = mean_se(pair_wins(scores[0], scores[1]))
    result = {
        "accuracy": accuracy["mean"],
        "accuracy_se": accuracy["se"],
        "n_pairs": accuracy["n"],
        "longer_wins": pair_wins(lengths[0], lengths[1]).mean().item(),
        "shorter_wins": pair_wins(lengths[1], lengths[0]).mean().item(),
        "margin": margin.mean().item(),
        "margin_se": mean_se(margin)["se"],
        "score_mean": scores.mean().item(),
        "score_std": scores.std().item(),
    }
    return result, scores


def score_rows(reward_model, batch, config, dist):
    """This process's packed rows, b of them -> their scores [b]. All processes call this."""
    # gathered() is a collective call, so a process without rows must enter it too.
    scores = torch.zeros(len(batch), device=dist.device)
    with gathered(reward_model), autocast(dist, config.dtype):
        for rows in batch.micro_batches(config.micro_batch_size, config.tokens_per_micro_batch):
            scores[rows] = reward_model(batch.rows(rows))
    return scores


def gold_scores(held_out_pairs, tokenizer, config, dist):
    """Score the held-out Pairs of each split by gold: {label: [2, N]}, chosen and rejected.

    Without --gold_model there are none: {}.
    """
    if not config.gold_model:
        return {}
    gold = load_reward(config.gold_model, tokenizer, dist)
    scores = {}
    for label, pairs in held_out_pairs.items():
        mine = pairs.at(dist.part(len(pairs)))
        of_sides = []
        for side, responses in (("chosen", mine.chosen), ("rejected", mine.rejected)):
            # A gold reward that is a model reads token ids, another one reads the texts.
            answers = Answers(
                [row["prompt"] for row in mine.rows],
                [row[side] for row in mine.rows],
                pack(mine.prompts, responses, mine.pad_id),
                [data.own_row(row) for row in mine.rows],
                config.chat_template,
            )
            own_scores = score(gold, [answers], dist)
            of_sides.append(dist.gather(own_scores))
        scores[label] = torch.stack(of_sides)  # [2, N]
    return scores


# What report() needs of a summary.
MEASURES = (
    "accuracy",
    "accuracy_se",
    "n_pairs",
    "longer_wins",
    "shorter_wins",
    "margin",
    "margin_se",
)
REPORTED = {f"eval/{name}": float for name in MEASURES}


def report(record, label="eval"):
    """Say in words what a summary, or a record with an evaluation, holds on a split."""
    r = {}
    for name, value in record.items():
        if name.startswith(f"{label}/"):
            r[name.removeprefix(f"{label}/")] = value
    text = "" if label == "eval" else f"{label}: "
    text += f"held-out pair accuracy {r['accuracy']:.3f} +- {r['accuracy_se']:.3f} "
    text += f"(n = {r['n_pairs']}; longer wins {r['longer_wins']:.3f}, "
    text += f"shorter wins {r['shorter_wins']:.3f}), "
    text += f"margin {r['margin']:.2f} +- {r['margin_se']:.2f}"
    # Without --gold_model there is no tau, and of constant scores it is not a number.
    tau = r.get("gold_kendall_tau", math.nan)
    if not math.isnan(tau):
        text += f"; Kendall's tau with gold {tau:.3f} "
        text += f"(p {r['gold_kendall_p']:.3f}, n = {r['n_texts']} texts)"
    return text


if __name__ == "__main__":
    cli.run(Config, main)

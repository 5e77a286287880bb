r"""Train sparse autoencoders on what layers of a language model put out; on
those of its base too, from the same tokens.

    the embedded world, runs/ppo beside runs/sft:
        python train_sae.py
    your own model and texts:
        python train_sae.py --model gpt2 --dataset texts.jsonl --kind prompts \
            --layers 3,6 --site residual --output_dir runs/sae_gpt2
    on demonstrations and on the policy's answers:
        python train_sae.py --sae vanilla --texts both --output_dir runs/vanilla
    the same global batch, and the same result, on four processes:
        torchrun --nproc_per_node=4 train_sae.py

Writes <output_dir>/<policy or base>/<layer>_<site>/, in the layout of
SAELens, and what each of them is worth on held-out texts.
Maths: nanorlhf/sae.py; activations: nanorlhf/interp/activation_store.py.
Method: Marks et al. 2023 (2310.08164), Gao et al. 2024 (2406.04093).

    B tokens of a step over all processes, D width, M features
"""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.hf_argparser import HfArg

from nanorlhf import data
from nanorlhf.chat_templates import leave_out_control_tokens
from nanorlhf.divergence import layer_divergence, select_layers
from nanorlhf.errors import InputError, at_least, divides, require
from nanorlhf.hf.activations import SITES, module_at, place_name, replaced
from nanorlhf.hf.blocks import blocks, speed_up
from nanorlhf.hf.folders import check_model
from nanorlhf.interp.activation_cache import check_cache, from_disk
from nanorlhf.interp.activation_store import (
    Stream,
    Tokens,
    find_skipped,
    from_models,
    hold_out,
    passes,
    sentence_ends,
    tokenize_rows,
)
from nanorlhf.interp.sae_files import save_sae
from nanorlhf.interp.shared_flags import SITE_HELP, TokenFlags
from nanorlhf.models import (
    fingerprint,
    is_reward_model,
    load_policy,
    load_reward_model,
    load_shared_tokenizer,
    load_tokenizer,
)
from nanorlhf.packing import micro_batches
from nanorlhf.pool import sample
from nanorlhf.runtime import checkpoint, cli
from nanorlhf.runtime.distributed import autocast, peak_memory_mb, setup
from nanorlhf.runtime.flags import SCHEDULES, DeviceFlags, FlagGroup, RunFlags, TextFlags, subset_of
from nanorlhf.runtime.locks import unlock_afterwards
from nanorlhf.runtime.log import Progress, RunFolder
from nanorlhf.runtime.optim import learning_rate
from nanorlhf.runtime.settings import PLACES
from nanorlhf.sae import (
    NORMALIZE,
    SparseAutoencoder,
    TopKSAE,
    adam,
    gradients,
    measures,
    tally,
    update,
)
from nanorlhf.show.page import write_page
from nanorlhf.stages import train_what_is_missing
from nanorlhf.tokens import ready_prompts

FIT_TOKENS = 2**14  # for the mean and the scale
MOST_EXPANSION = 2**16  # beyond it no memory holds the weights
EDGES = [-6 + 0.5 * i for i in range(13)]  # of the histogram of log10 density: half decades up to 1


@dataclass
class AutoencoderFlags(FlagGroup):
    """The autoencoder: its kind, its size, how it starts"""

    sae: str = HfArg(
        default="topk",
        metadata={"choices": ("topk", "vanilla", "tied")},
        help="topk: the k largest features of each token are kept; vanilla: an L1 penalty keeps "
        "them few; tied: vanilla, the decoder being the encoder's transpose",
    )
    expansion: float = HfArg(
        default=4.0, help="number of features, in multiples of the activations' width"
    )
    k: int = HfArg(default=16, help="topk: features that are kept for each token")
    l1: float = HfArg(
        default=2e-3, help="vanilla: weight of ||f||_1; it shrinks a feature by l1 D / 2"
    )
    normalize: str = HfArg(
        default="dataset",
        metadata={"choices": NORMALIZE},
        help="scale all activations by one number (dataset), each token's by its own (token), or "
        "not at all (none)",
    )
    relu: bool = HfArg(default=True, help="topk: features are never negative; a SARM needs False")
    bias: str = HfArg(
        default="mean",
        metadata={"choices": ("mean", "median")},
        help="where the decoder's bias starts: at the mean of activations, or at their geometric "
        "median",
    )
    dead_after: int = HfArg(
        default=0,
        help="a feature counts as dead after this many tokens without firing; 0: a tenth of the "
        "run, at most 10 million",
    )


@dataclass
class TokensFlags(FlagGroup):
    """Texts and tokens: on what the autoencoder is trained"""

    texts: str = HfArg(
        default="dataset",
        metadata={"choices": ("dataset", "rollouts", "both")},
        help="the texts of --dataset, the policy's answers to its prompts (rollouts), or both",
    )
    tokens: str = HfArg(
        default="all",
        metadata={"choices": ("all", "sentence_ends", "last")},
        help="which tokens of a text: all, those that end a sentence (. ! ? and the text's last), "
        "or the last one, which a SARM reads",
    )
    n_answers: int = HfArg(default=1, help="rollouts: answers to each prompt")
    max_new_tokens: int = HfArg(default=48, help="rollouts: tokens in the longest answer")
    temperature: float = HfArg(default=1.0, help="rollouts: what logits are divided by")
    max_rows: int = subset_of(0)
    eval_size: int = HfArg(default=256, help="texts that are held out, to measure on")
    cache: str = HfArg(
        default="",
        help="keep activations in this folder, instead of computing them again in every epoch",
    )
    buffer_tokens: int = HfArg(
        default=2**16, help="tokens that are shuffled together, over all processes"
    )


@dataclass
class AdamFlags(FlagGroup):
    """Training: how long, in batches of what size, at which learning rate"""

    steps: int = HfArg(default=500, help="how many optimizer steps to take")
    batch_size: int = HfArg(default=1024, help="tokens in a step, over all processes")
    lr: float = HfArg(default=2e-3, help="peak learning rate of Adam")
    schedule: str = HfArg(
        default="cosine",
        metadata={"choices": SCHEDULES},
        help="how the learning rate falls to 0 after the warm-up",
    )
    warmup: float = HfArg(
        default=0.05,
        help="share of the steps over which the learning rate rises to its peak, between 0 and 1",
    )


@dataclass
class Config(
    AutoencoderFlags, TokensFlags, AdamFlags, TokenFlags, TextFlags, RunFlags, DeviceFlags
):
    """Models and layers: whose activations are read, and where"""

    model: str = HfArg(
        default="runs/ppo",
        help="the policy, or a reward model: a run folder, a model folder or a hub name",
    )
    base: str = HfArg(
        default="",
        help="the model that it was trained from, to train a second autoencoder on, or none; by "
        "default runs/sft beside runs/ppo, else none",
    )
    layers: str = HfArg(
        default="highest:2",
        help="numbers of blocks, such as 1,3, or highest:K, the K blocks whose weights moved most",
    )
    site: str = HfArg(default="mlp", metadata={"choices": SITES}, help=SITE_HELP)

    output_dir: str = HfArg(default="runs/sae", help="the folder that the run writes")
    seed: int = HfArg(
        default=0,
        help="the number that every random draw depends on; the autoencoders of base and policy "
        "start from the same weights, so compare their features with those of other seeds",
    )
    checkpoint_every: int = HfArg(default=100, help="write a checkpoint every N steps")
    keep_checkpoints: int = HfArg(default=1, help="how many checkpoints to keep")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "steps", "batch_size", "k", "eval_size", "n_answers", "max_new_tokens")
        at_least(self, 0, "l1", "lr", "dead_after", "max_rows", "buffer_tokens")
        require(
            self.expansion > 0 and self.temperature > 0,
            "--expansion and --temperature must be positive",
        )
        require(self.expansion <= MOST_EXPANSION, f"--expansion must be at most {MOST_EXPANSION}")
        require(0 <= self.warmup <= 1, "--warmup is a share of the steps")
        if not self.base:
            is_default = data.is_world(self.dataset) and self.model == "runs/ppo"
            self.base = "runs/sft" if is_default else "none"
        require(
            self.base != "none" or ":" not in self.layers,
            f"--layers {self.layers} compares --model with a --base: name one (such as runs/sft), "
            "or layers such as 1,3",
        )

    def dead_tokens(self):
        """How many tokens without firing make a feature dead.

        They are Gao et al.'s 10 million, or less in a small run.
        """
        return self.dead_after or min(10_000_000, self.steps * self.batch_size // 10)

    def rate(self, step):
        """The learning rate of step 0 .. steps-1."""
        return learning_rate(
            step, self.steps, self.lr, self.schedule, int(self.warmup * self.steps)
        )


@unlock_afterwards()
def main(config):
    # ------------------------------------------------------------------------------------ set-up
    dist = setup(config.device)
    divides(config, "batch_size", dist.world, "the number of processes")
    folder = RunFolder(config, dist, free=(*PLACES, "cache"))
    if folder.status == "done":
        return folder.already_done()

    # What is wrong with the cache, the texts or a model is said before anything is loaded.
    if config.cache:
        dist.on_main(lambda: check_cache(config.cache))
    # With a base beside the policy, two autoencoders of the same layer show what training changed.
    paths = {"policy": config.model}
    if config.base != "none":
        paths["base"] = config.base
    all_rows = data.read_rows(config.dataset, config.kind, config.columns)
    rows = data.subset(all_rows, config.max_rows)
    train_what_is_missing(config, "model")
    model_configs = {name: check_model(path) for name, path in paths.items()}
    check_last_tokens(config)

    # ------------------------------------------------------------------------------------ models
    # The language models are only read: the autoencoders learn from what a layer puts out.
    lms = {name: load_lm(path, dist.device) for name, path in paths.items()}
    for lm in lms.values():
        lm.requires_grad_(False)
        speed_up(lm, dist.device, config.dtype)
    places = [(layer, config.site) for layer in choose_layers(config, lms)]
    # A place that a model lacks is an error before anything is computed.
    for lm in lms.values():
        for place in places:
            module_at(lm, place)

    # ------------------------------------------------------------------------------------ tokens
    tokens, held_out = prepare_tokens(config, rows, model_configs["policy"], paths, folder)
    dist.print(
        f"{tokens.total:,} tokens of {len(tokens.rows):,} texts, "
        f"{held_out.total:,} of {len(held_out.rows):,} held out"
    )
    # The models compute activations whenever they are needed, or with --cache once, onto a disk.
    if config.cache:
        prints = {name: fingerprint(path) for name, path in paths.items()}
        source = from_disk(config.cache, tokens, prints, places, lambda: lms, dist, config.dtype)
    else:
        source = from_models(tokens, lms, places, dist, config.dtype)
    stream = Stream(
        tokens, source, config.batch_size, dist, config.seed, config.buffer_tokens
    )  # of {"policy/3_mlp": [B, D], ...}

    # ------------------------------------------------------------------------------ autoencoders
    # Mean and scale come from the first batches. A resumed run computes the same ones again, and
    # takes its weights from the checkpoint.
    dist.print("the first activations, for mean and scale ...")
    saes = fit_saes(config, stream, dist)  # {"policy/3_mlp": autoencoder}
    # One optimizer serves all autoencoders, since Adam treats each weight by itself.
    modules = nn.ModuleDict({name_in_checkpoint(key): sae for key, sae in saes.items()})
    optimizer = adam(modules)
    # A feature that does not fire gets no gradient, so one that is silent for long is dead. With
    # topk, AuxK lets dead features explain what the others leave over, and so calls them back.
    silent = {}  # for each feature the tokens since it fired last, [M]
    for key, sae in saes.items():
        silent[key] = torch.zeros(sae.m, dtype=torch.long, device=dist.device)

    # A run that was killed goes on from its last checkpoint, with its counts of silence.
    state = checkpoint.load(config.output_dir, modules, optimizer, dist)
    if state:
        for key in saes:
            counts = state["silent"][name_in_checkpoint(key)]
            silent[key] = torch.tensor(counts, device=dist.device)
    folder.create(state)
    sizes = [f"{key} ({sae.m:,} features)" for key, sae in saes.items()]
    dist.print(f"{config.sae} autoencoders: {', '.join(sizes)}")

    # There is no DDP here: gradients and numbers of the processes are added up by this function.
    def sum_over_processes(tensor):
        tensor.copy_(dist.sum(tensor))

    options = {
        "l1": config.l1,
        "dead_after": config.dead_tokens(),
        "dtype": getattr(torch, config.dtype),
        "n_tokens": config.batch_size,
        "reduce": sum_over_processes if dist.world > 1 else None,
    }

    # -------------------------------------------------------------------------------------- loop
    first_step = state["step"] + 1 if state else 1
    progress = Progress(dist, "autoencoders", config.steps, first_step - 1)
    for step in range(first_step, config.steps + 1):
        begun = time.perf_counter()
        record = {"step": step}

        # 1. Every autoencoder gets gradients from the activations of its own place and model.
        losses = []
        for key, x in stream.batch(step - 1).items():
            stats = gradients(saes[key], x, silent=silent[key], **options)
            losses.append(stats["loss"])
            record |= {f"{key}/{name}": value for name, value in stats.items()}
        # A loss that is not finite ends the run while the weights are still good.
        loss = np.mean(losses).item()
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"step {step}: the loss is {loss}; the last checkpoint is kept; lower --lr"
            )

        # 2. One step of the optimizer over all of them. Decoder directions stay of unit length:
        # else long directions with small features would dodge the L1 penalty.
        lr = config.rate(step - 1)
        update(saes.values(), optimizer, lr)

        # 3. What happened.
        seconds = time.perf_counter() - begun
        record |= {
            "loss": loss,
            "lr": lr,
            "seconds": seconds,
            "tokens_per_second": config.batch_size / seconds,
            "peak_memory_mb": peak_memory_mb(dist),
        }
        folder.append("metrics.jsonl", [record])
        progress.step(step, f"loss {loss:.3f}")
        if step == config.steps or step % config.checkpoint_every == 0:
            counts = {name_in_checkpoint(key): x.tolist() for key, x in silent.items()}
            folder.checkpoint(step, modules, optimizer, {"silent": counts}, config.keep_checkpoints)
    progress.close()

    # -------------------------------------------------------------------------- measure and save
    # Each autoencoder is measured on texts that none has seen: how much it leaves unexplained
    # (FVU), with how many features a token (L0), and what the language model loses by it.
    dist.print(f"measuring on {held_out.total:,} held-out tokens ...")
    summary, densities = evaluate(config, saes, lms, held_out, places, dist)
    dist.print(report(summary))
    if dist.main:
        for name, path in paths.items():
            for place in places:
                key = f"{name}/{place_name(place)}"
                layer, site = place
                save_sae(
                    saes[key],
                    f"{config.output_dir}/{key}",
                    densities[key],
                    model=path,
                    layer=layer,
                    site=site,
                    tokens=config.tokens,
                    held_out=summary[key],
                )
    folder.finish(summary)
    write_page(folder.path, dist)
    return summary


def load_lm(path, device):
    """Load the HF model whose layers are read: a causal LM, or a reward model's classifier."""
    if is_reward_model(path):
        return load_reward_model(path, device).model
    return load_policy(path, value_head=False, device=device).lm.eval()


def check_last_tokens(config):
    """Refuse --tokens last where a text's last token, EOS, has BOS's id and is left out with it."""
    # Some tokenizers, such as GPT-2's, have one token for both.
    tokenizer = load_tokenizer(config.model, needs_eos=False)
    has_eos = tokenizer.eos_token_id is not None
    eos_is_bos = has_eos and tokenizer.eos_token_id == tokenizer.bos_token_id
    is_left_out = eos_is_bos and not config.keep_bos
    if config.tokens == "last" and is_left_out and texts_end_with_eos(config):
        raise InputError(
            f"--tokens last: the EOS of {config.model} has BOS's id and is left out; "
            "name --keep_bos"
        )


def texts_end_with_eos(config) -> bool:
    """Whether texts have an EOS: all but prompts, which are taken as they are."""
    return config.kind != "prompts" or config.texts != "dataset"


def choose_layers(config, lms) -> list[int]:
    """The layers that --layers names."""
    # highest:K means the K blocks whose weights training moved furthest from the base's.
    try:
        policy_blocks = blocks(lms["policy"])
        divergences = [0.0] * len(policy_blocks)
        if "base" in lms:
            divergences = layer_divergence(blocks(lms["base"]), policy_blocks)
        return select_layers(divergences, config.layers)
    except ValueError as e:
        raise InputError(str(e)) from None


def name_in_checkpoint(key: str) -> str:
    """The name of an autoencoder in the checkpoint, where names have no /: policy:3_mlp."""
    return key.replace("/", ":")


# ----------------------------------------------------------------------------------------- texts


def prepare_tokens(config, rows, model_config, paths, folder):
    """Rows of the data set -> Tokens to train on, Tokens held out.

    Answers that are sampled for them are kept in the RunFolder.
    """
    dist = folder.dist
    has_eos = texts_end_with_eos(config)
    tokenizer = load_shared_tokenizer(config.model, paths.values(), needs_eos=has_eos)

    # The texts are those of the data set, the policy's answers to its prompts, or both.
    rows = leave_out_control_tokens(tokenizer, rows, config, dist.print)
    texts = []  # token lists
    if config.texts != "rollouts":
        texts = tokenize_rows(config, tokenizer, rows, model_config, dist)
    # Each prompt is taken once, however many rows have it.
    if config.texts != "dataset":
        different = {data.canonical(row["prompt"]): row for row in rows}
        prompts = ready_prompts(
            tokenizer,
            list(different.values()),
            model_config,
            config.max_new_tokens,
            chat=config.chat_template,
        )
        # After a kill it must be known whose the answers in the folder are.
        folder.write_config()
        sampling = replace(config, batch_size=256)  # answers at a time, not tokens
        texts = texts + rollout_rows(sampling, tokenizer, prompts, dist)
    # Whole texts are held out: tokens of one text are too much alike to be on both sides.
    parts = hold_out(texts, config.eval_size, tokenizer)
    require(all(parts), f"{config.dataset}: {len(texts)} texts are too few to hold any out")

    # Which tokens count: all, or those with the ids `ends` and each text's last.
    ends = None
    if config.tokens == "sentence_ends":
        ends = sentence_ends(tokenizer)
    elif config.tokens == "last":
        ends = []

    # In many models BOS has a far larger norm than all other tokens, and would dominate the error.
    skip_bos = find_skipped(config, tokenizer)
    if skip_bos is not None and skip_bos == tokenizer.eos_token_id:
        dist.print(
            "EOS has BOS's id and is left out as well; --keep_bos keeps it (a SARM and a reward "
            "model's features are read there)"
        )
    return [Tokens(part, skip_bos, ends) for part in parts]


def rollout_rows(config, tokenizer, prompts, dist) -> list[list[int]]:
    """Sample config.n_answers answers to each prompt, by the policy config.model.

    prompts: token lists -> token lists of prompt + answer. They are cached by pool.sample().
    """
    # The sampled ids are kept: decoded and tokenised again, a text might get other tokens.
    texts = []
    for row in sample(config, tokenizer, prompts, dist):
        for response in row["response_ids"]:
            texts.append(row["prompt_ids"] + response)
    return texts


# ---------------------------------------------------------------------------------- autoencoders


def fit_saes(config, stream, dist) -> dict[str, SparseAutoencoder]:
    """New autoencoders, with the mean and the scale of the stream's first batches.

    -> {"policy/3_mlp": autoencoder}
    """
    # Training reads these first batches of the stream again, so no further tokens are needed.
    n_batches = -(-FIT_TOKENS // config.batch_size)  # rounded up
    batches = [stream.batch(step) for step in range(n_batches)]
    saes = {}
    for key in batches[0]:
        # All processes fit on the same sample, and so start from the same weights.
        x = torch.cat([batch[key] for batch in batches])
        x = dist.gather(x)  # [n, D]
        sae = new_sae(config, x.shape[1]).to(dist.device)
        saes[key] = sae.fit(x, config.bias)
    return saes


def new_sae(config, width: int) -> SparseAutoencoder:
    """An autoencoder as the flags want it, before it has seen anything."""
    m = max(1, round(config.expansion * width))
    if config.sae == "topk":
        require(config.k <= m, f"--k {config.k} is more than the {m} features")
        return TopKSAE(width, m, config.k, config.normalize, config.relu, config.seed)
    return SparseAutoencoder(width, m, config.sae == "tied", config.normalize, config.seed)


# ------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def evaluate(config, saes, lms, held_out, places, dist):
    """Measure the autoencoders on held-out texts.

    -> {"policy/3_mlp": {fvu, l0, dead, n_tokens, density: a histogram, loss, loss_sae, loss_zero,
    loss_recovered}}, {"policy/3_mlp": density [M]}
    """
    # Sums over this process's texts, if it has any. FVU and the rest are ratios of sums: means of
    # batches' ratios would be something else.
    totals = {key: no_sums(sae) for key, sae in saes.items()}  # {key: {name: tensor}}
    source = from_models(held_out, lms, places, dist, config.dtype)
    for part in passes(held_out, source, dist, at_once=2**12):
        for key, x in part.items():
            for name, value in tally(saes[key], x).items():
                totals[key][name] += value

    summary = {}
    densities = {}
    for name, lm in lms.items():
        for place in places:
            key = f"{name}/{place_name(place)}"
            sae = saes[key]
            sums = {what: dist.sum(sum_here) for what, sum_here in totals[key].items()}
            result = measures(sums)
            densities[key] = result.pop("density")
            summary[key] = {
                **result,
                "n_tokens": held_out.total,
                "density": histogram(densities[key]),
                **loss_recovered(config, lm, place, sae, held_out, dist),
            }
    return summary, densities


def no_sums(sae):
    """What tally() gives for no activations at all."""
    sums = tally(sae, torch.zeros(1, sae.d, device=sae.b_dec.device))
    return {name: torch.zeros_like(value) for name, value in sums.items()}


def histogram(density: torch.Tensor) -> dict:
    """The features by log10 of their density [M], those that never fired left out.

    -> {log10_edges, features: how many lie between two edges}
    """
    # Densities span several powers of ten, so their logarithms are counted.
    logs = density[density > 0].log10().clamp(min=EDGES[0])
    counts, _ = torch.histogram(logs.float().cpu(), torch.tensor(EDGES))
    return {"log10_edges": EDGES, "features": counts.int().tolist()}


def loss_recovered(config, lm, place, sae, held_out, dist):
    """What the language model loses when a layer's output is reconstructed, or switched off.

        loss_recovered = (loss_zero - loss_sae) / (loss_zero - loss)          losses in nats a token

    1: the reconstruction is as good as the layer; 0: as bad as none; None where the model does no
    worse without the layer, on these texts; all None for a reward model, which has no such losses.
    Tokens that the autoencoder never saw (a BOS; what other --tokens than all leave out) keep their
    activations in both cases, so that the two differ in nothing else. Pitfall: the loss of every
    token of a text counts, so in {prompt, response} data the prompt's too, which SFT and PPO never
    trained on.
    """
    if lm.get_output_embeddings() is None:
        return dict.fromkeys(("loss", "loss_sae", "loss_zero", "loss_recovered"))

    # Texts of similar length share a forward pass. Only sums are kept until the end, so that the
    # weight of a text does not depend on the batch that it is in.
    mine = np.array(dist.part(len(held_out.rows)), dtype=np.int64)
    lengths = torch.from_numpy(held_out.lengths[mine])
    sums = torch.zeros(4, dtype=torch.float64, device=dist.device)  # three losses, tokens
    for part in micro_batches(lengths, None, 2**12):
        rows = mine[part.numpy()]
        ids, mask = held_out.batch(rows)
        ids = ids.to(dist.device)  # [b, T]
        seen = mask.to(dist.device)[..., None]  # [b, T, 1], by the autoencoder
        real = np.arange(ids.shape[1]) < held_out.lengths[rows][:, None]
        real = torch.from_numpy(real).to(dist.device)  # [b, T], no padding

        # The layer's output is replaced by its reconstruction, or by zeros, and the rest of the
        # model goes on from there.
        def reconstruct(x):
            return torch.where(seen, sae(x)[0].to(x.dtype), x)

        def switch_off(x):
            return x.masked_fill(seen, 0.0)

        sums[0] += sum_of_losses(lm, ids, real, config, dist)
        with replaced(lm, place, reconstruct):
            sums[1] += sum_of_losses(lm, ids, real, config, dist)
        with replaced(lm, place, switch_off):
            sums[2] += sum_of_losses(lm, ids, real, config, dist)
        sums[3] += real[:, 1:].sum()

    # Means over the tokens of all processes.
    sums = dist.sum(sums)
    loss, loss_sae, loss_zero = (sums[:3] / sums[3]).tolist()
    recovered = None
    if loss_zero > loss:
        recovered = (loss_zero - loss_sae) / (loss_zero - loss)
    return {
        "loss": loss,
        "loss_sae": loss_sae,
        "loss_zero": loss_zero,
        "loss_recovered": recovered,
    }


def sum_of_losses(lm, ids, real, config, dist) -> torch.Tensor:
    """The losses of all tokens of some texts, but for each one's first, in nats: a float64 scalar.

    ids [b, T], padded on the right; real [b, T]: what is no padding
    """
    with autocast(dist, config.dtype):
        logits = lm(input_ids=ids, use_cache=False).logits  # [b, T, V]
    # Logits at t score token t + 1; targets of -100 do not count.
    targets = ids.masked_fill(~real, -100)[:, 1:]
    scores = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(scores, targets.flatten(), reduction="sum").double()


def report(summary):
    """The summary as a table."""
    titles = f"{'held out':22s}{'FVU':>8s}{'L0':>8s}{'dead':>8s}"
    titles += f"{'LM loss':>9s}{'with SAE':>10s}{'zero':>8s}{'recovered':>11s}"
    lines = [titles]
    for key, r in summary.items():
        line = f"{key:22s}{r['fvu']:8.3f}{r['l0']:8.1f}{r['dead']:8.1%}"
        line += cell(r["loss"], 9, ".3f")
        line += cell(r["loss_sae"], 10, ".3f")
        line += cell(r["loss_zero"], 8, ".3f")
        line += cell(r["loss_recovered"], 11, ".1%")
        lines.append(line)
    return "\n".join(lines)


def cell(value: float | None, width: int, form: str) -> str:
    """A number in a format, or - for None, on the right of a cell."""
    text = "-" if value is None else format(value, form)
    return text.rjust(width)


if __name__ == "__main__":
    cli.run(Config, main)

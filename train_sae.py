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

    B tokens of a step over all processes, D width, M latents
"""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.hf_argparser import HfArg

from nanorlhf import data
from nanorlhf.divergence import layer_divergence, select_layers
from nanorlhf.errors import InputError, at_least, divides, require
from nanorlhf.hf.activations import SITES, module_at, place_name, replaced
from nanorlhf.hf.blocks import blocks, speed_up
from nanorlhf.interp.activation_store import (
    Stream,
    Tokens,
    check_cache,
    from_disk,
    from_models,
    hold_out,
    passes,
    sentence_ends,
    token_rows,
)
from nanorlhf.interp.probe_flags import SITE_HELP, TokenFlags
from nanorlhf.interp.sae_files import save_sae
from nanorlhf.models import (
    check_model,
    context_length,
    fingerprint,
    is_reward_model,
    load_policy,
    load_reward_model,
    load_tokenizer,
)
from nanorlhf.packing import micro_batches
from nanorlhf.pool import sample
from nanorlhf.runtime import checkpoint, cli
from nanorlhf.runtime.distributed import autocast, peak_memory_mb, setup
from nanorlhf.runtime.flags import DeviceFlags, FlagGroup, RunFlags, TextFlags
from nanorlhf.runtime.locks import unlock_afterwards
from nanorlhf.runtime.log import PLACES, Progress, RunFolder
from nanorlhf.runtime.optim import learning_rate
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
from nanorlhf.stages import train_what_is_missing

FIT_TOKENS = 2**14  # for the mean and the scale
MOST_EXPANSION = 2**16  # beyond it no memory holds the weights
EDGES = [-6 + 0.5 * i for i in range(13)]  # of the histogram of log10 density: half decades up to 1


@dataclass
class AutoencoderFlags(FlagGroup):
    """The autoencoder: its kind, its size, how it starts"""

    sae: str = HfArg(
        default="topk",
        metadata={"choices": ("topk", "vanilla", "tied")},
        help="topk: the k largest latents of each token are kept; vanilla: an L1 penalty keeps "
        "them few; tied: vanilla, the decoder being the encoder's transpose",
    )
    expansion: float = HfArg(
        default=4.0, help="number of latents, in multiples of the activations' width"
    )
    k: int = HfArg(default=16, help="topk: latents that are kept for each token")
    l1: float = HfArg(
        default=2e-3, help="vanilla: weight of ||f||_1; it shrinks a latent by l1 D / 2"
    )
    normalize: str = HfArg(
        default="dataset",
        metadata={"choices": NORMALIZE},
        help="scale all activations by one number (dataset), each token's by its own (token), or "
        "not at all (none)",
    )
    relu: bool = HfArg(default=True, help="topk: latents are never negative; a SARM needs False")
    bias: str = HfArg(
        default="mean",
        metadata={"choices": ("mean", "median")},
        help="where the decoder's bias starts: at the mean of activations, or at their geometric "
        "median",
    )
    dead_after: int = HfArg(
        default=0,
        help="a latent counts as dead after this many tokens without firing; 0: a tenth of the "
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
    max_rows: int = HfArg(default=0, help="use a random subset of this many rows; 0: all rows")
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
        metadata={"choices": ("constant", "linear", "cosine")},
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
        require(self.expansion > 0 and self.temperature > 0, "--expansion and --temperature must be positive")
        require(self.expansion <= MOST_EXPANSION, f"--expansion must be at most {MOST_EXPANSION}")
        require(0 <= self.warmup <= 1, "--warmup is a share of the steps")
        if not self.base:
            self.base = "runs/sft" if data.is_world(self.dataset) and self.model == "runs/ppo" else "none"
        hint = f"--layers {self.layers} compares --model with a --base: name one (such as runs/sft), or layers such as 1,3"
        require(self.base != "none" or ":" not in self.layers, hint)

    def dead_tokens(self):
        """How many tokens without firing make a latent dead: Gao et al.'s 10M, or less in a small run."""
        return self.dead_after or min(10_000_000, self.steps * self.batch_size // 10)

    def rate(self, step):
        """The learning rate of step 0 .. steps-1."""
        return learning_rate(step, self.steps, self.lr, self.schedule, int(self.warmup * self.steps))


@unlock_afterwards()
def main(config):
    # ------------------------------------------------------------------------------------------------------------------- set-up
    dist = setup(config.device)
    divides(config, "batch_size", dist.world, "the number of processes")
    folder = RunFolder(config, dist, free=(*PLACES, "cache"))
    if folder.state == "done":
        return folder.already_done()
    if config.cache:
        dist.together(lambda: dist.main and check_cache(config.cache))
    paths = {"policy": config.model} | ({"base": config.base} if config.base != "none" else {})
    rows = data.subset(data.read_rows(config.dataset, config.kind, config.columns), config.max_rows)
    train_what_is_missing(config, "model")
    model_config = [check_model(path) for path in paths.values()][0]
    check_last_tokens(config)

    # ------------------------------------------------------------------------------------------------------------------- models
    lms = {name: load_lm(path, dist.device) for name, path in paths.items()}
    for lm in lms.values():
        lm.requires_grad_(False)
        speed_up(lm, dist.device, config.dtype)
    layers = choose_layers(config, lms)
    places = [(layer, config.site) for layer in layers]
    for lm in lms.values():
        for place in places:
            module_at(lm, place)  # an error before anything is computed

    # ------------------------------------------------------------------------------------------------------------------- tokens
    if config.texts != "dataset":
        folder.write_config()  # the answers are kept there: after a kill it must be known whose they are
    rows, held_out = texts(config, rows, model_config, paths, dist)
    dist.print(f"{rows.total:,} tokens of {len(rows.rows):,} texts, {held_out.total:,} of {len(held_out.rows):,} held out")
    source = from_models(rows, lms, places, dist, config.dtype)
    if config.cache:
        prints = {name: fingerprint(path) for name, path in paths.items()}
        source = from_disk(config.cache, rows, prints, places, lambda: lms, dist, config.dtype)
    stream = Stream(rows, source, config.batch_size, dist, config.seed, config.buffer_tokens)

    # ------------------------------------------------------------------------------------------------------------- autoencoders
    # Mean and scale come from the first batches: a resumed run computes the same ones again, and its weights come from the checkpoint.
    dist.print("the first activations, for mean and scale ...")
    first = [stream.batch(step) for step in range(-(-FIT_TOKENS // config.batch_size))]
    saes = nn.ModuleDict()
    for key in first[0]:  # "policy/3_mlp"
        x = dist.gather(torch.cat([part[key] for part in first]))
        saes[key.replace("/", ":")] = new_sae(config, x.shape[1]).to(dist.device).fit(x, config.bias)
    del first
    optimizer = adam(saes)
    start = {"step": 0, "silent": {name: [0] * sae.m for name, sae in saes.items()}}
    state = checkpoint.load(config.output_dir, saes, optimizer, dist) or start
    folder.create(state)
    silent = {name: torch.tensor(counts, device=dist.device) for name, counts in state["silent"].items()}
    dist.print(f"{config.sae} autoencoders: {', '.join(f'{key} ({sae.m:,} latents)' for key, sae in saes.items())}")
    options = {"l1": config.l1, "dead_after": config.dead_tokens(), "dtype": getattr(torch, config.dtype), "n_tokens": config.batch_size}
    options["reduce"] = (lambda tensor: tensor.copy_(dist.sum(tensor))) if dist.world > 1 else None

    # --------------------------------------------------------------------------------------------------------------------- loop
    progress = Progress(dist, "autoencoders", config.steps, state["step"])
    for step in range(state["step"] + 1, config.steps + 1):
        begun, lr, record = time.perf_counter(), config.rate(step - 1), {"step": step}
        for key, x in stream.batch(step - 1).items():
            name = key.replace("/", ":")
            stats = gradients(saes[name], x, silent=silent[name], **options)
            record |= {f"{key}/{k}": v for k, v in stats.items()}
        loss = np.mean([v for k, v in record.items() if k.endswith("/loss")]).item()
        if not np.isfinite(loss):
            raise FloatingPointError(f"step {step}: the loss is {loss}; the last checkpoint is kept; lower --lr")
        update(saes.values(), optimizer, lr)
        seconds = time.perf_counter() - begun
        record |= {"loss": loss, "lr": lr, "seconds": seconds, "tokens_per_second": config.batch_size / seconds}
        folder.append("metrics.jsonl", [record | {"peak_memory_mb": peak_memory_mb(dist)}])
        progress.step(step, f"loss {loss:.3f}")
        if step % config.checkpoint_every == 0 or step == config.steps:
            counts = {name: x.tolist() for name, x in silent.items()}
            folder.checkpoint(step, saes, optimizer, {"silent": counts}, config.keep_checkpoints)
    progress.close()

    # -------------------------------------------------------------------------------------------------------- measure and save
    dist.print(f"measuring on {held_out.total:,} held-out tokens ...")
    summary, densities = evaluate(config, saes, lms, held_out, places, dist)
    dist.print(report(summary))
    if dist.main:
        for key, numbers in summary.items():
            name, place = key.split("/")
            notes = {"model": paths[name], "layer": int(place.split("_")[0]), "site": config.site, "tokens": config.tokens}
            notes["held_out"] = numbers
            save_sae(saes[key.replace("/", ":")], f"{config.output_dir}/{key}", densities[key], **notes)
    return folder.finish(summary)


def load_lm(path, device):
    """The HF model whose layers are read: a causal LM, or a reward model's classifier."""
    return load_reward_model(path, device).model if is_reward_model(path) else load_policy(path, value_head=False, device=device).lm.eval()


def check_last_tokens(config):
    """Refuse --tokens last where a text's last token is an EOS that is left out because it has BOS's id."""
    tokenizer = load_tokenizer(config.model, needs_eos=False)
    eos_is_bos = tokenizer.eos_token_id is not None and tokenizer.eos_token_id == tokenizer.bos_token_id
    is_left_out = eos_is_bos and not config.keep_bos
    texts_end_with_eos = config.kind != "prompts" or config.texts != "dataset"
    if config.tokens == "last" and is_left_out and texts_end_with_eos:
        raise InputError(f"--tokens last: the EOS of {config.model} has BOS's id and is left out; name --keep_bos")


def choose_layers(config, lms):
    """The layers that --layers names. -> list of int"""
    try:
        n = len(blocks(lms["policy"]))
        divergences = layer_divergence(blocks(lms["base"]), blocks(lms["policy"])) if "base" in lms else [0.0] * n
        return select_layers(divergences, config.layers)
    except ValueError as e:
        raise InputError(str(e)) from None


def texts(config, rows, model_config, paths, dist):
    """Rows of the data set -> Tokens to train on, Tokens held out."""
    tokenizer = load_tokenizer(config.model, needs_eos=config.kind != "prompts" or config.texts != "dataset")
    for path in paths.values():
        same = load_tokenizer(path, needs_eos=False).get_vocab() == tokenizer.get_vocab()
        require(same, f"{config.model} and {path} have different tokenizers")
    out = []
    if config.texts != "rollouts":
        out, cut = token_rows(tokenizer, rows, config.max_length or context_length(model_config), config.chat_template)
        if cut:
            dist.print(f"{cut} of {len(out)} texts cut")
    if config.texts != "dataset":
        prompts = list({data.canonical(row["prompt"]): row for row in rows}.values())
        prompts = data.ready_prompts(tokenizer, prompts, model_config, config.max_new_tokens, 0, config.chat_template)
        out = out + rollout_rows(replace(config, batch_size=256), tokenizer, prompts, dist)  # 256 answers at a time
    parts = hold_out(out, config.eval_size, tokenizer)
    require(all(parts), f"{config.dataset}: {len(out)} texts are too few to hold any out")
    ends = {"all": None, "sentence_ends": sentence_ends(tokenizer), "last": []}[config.tokens]
    skip_bos = None if config.keep_bos else tokenizer.bos_token_id
    if skip_bos is not None and skip_bos == tokenizer.eos_token_id:
        dist.print("EOS has BOS's id and is left out as well; --keep_bos keeps it (a SARM and a reward model's features are read there)")
    return [Tokens(part, skip_bos, ends) for part in parts]


def new_sae(config, width):
    """An autoencoder as the flags want it, before it has seen anything."""
    m = max(1, round(config.expansion * width))
    if config.sae == "topk":
        require(config.k <= m, f"--k {config.k} is more than the {m} latents")
        return TopKSAE(width, m, config.k, config.normalize, config.relu, config.seed)
    return SparseAutoencoder(width, m, config.sae == "tied", config.normalize, config.seed)


# ----------------------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(config, saes, lms, held_out, places, dist):
    """On held-out texts {"policy/3_mlp": {fvu, l0, dead, density: a histogram, loss, loss_sae, loss_zero, loss_recovered, n_tokens}},
    and {"policy/3_mlp": density [M]}."""
    totals = {}
    for part in passes(held_out, from_models(held_out, lms, places, dist, config.dtype), dist, at_once=2**12):
        for key, x in part.items():
            found = tally(saes[key.replace("/", ":")], x)
            totals[key] = {k: totals[key][k] + v for k, v in found.items()} if key in totals else found
    summary, densities = {}, {}
    for key in [f"{name}/{place_name(place)}" for name in lms for place in places]:
        sae = saes[key.replace("/", ":")]
        zero = {k: torch.zeros_like(v) for k, v in tally(sae, torch.zeros(1, sae.d, device=dist.device)).items()}
        result = measures({k: dist.sum(v) for k, v in totals.get(key, zero).items()})  # a process may have no texts
        density = densities[key] = result.pop("density")
        logs = density[density > 0].log10().clamp(min=EDGES[0])
        counts = torch.histogram(logs.float().cpu(), torch.tensor(EDGES))[0].int().tolist()
        summary[key] = result | {"n_tokens": held_out.total, "density": {"log10_edges": EDGES, "latents": counts}}
    for name, lm in lms.items():
        for place in places:
            key = f"{name}/{place_name(place)}"
            summary[key] |= loss_recovered(config, lm, place, saes[key.replace("/", ":")], held_out, dist)
    return summary, densities


def loss_recovered(config, lm, place, sae, held_out, dist):
    """What the language model loses when a layer's output is replaced by its reconstruction, and when it is switched off.

        loss_recovered = (loss_zero - loss_sae) / (loss_zero - loss)          losses in nats a token

    1: the reconstruction is as good as the layer; 0: as bad as none; None where the model does no worse without the layer, on these
    texts; all None for a reward model, which has no such losses. Tokens that the autoencoder never saw (a BOS; what other --tokens than
    all leave out) keep their activations when the layer is reconstructed and when it is switched off, so that the two differ in nothing
    else. Pitfall: the loss of every token of a text counts, so in {prompt, response} data the prompt's too, which SFT and PPO never
    trained on.
    """
    if lm.get_output_embeddings() is None:
        return dict.fromkeys(("loss", "loss_sae", "loss_zero", "loss_recovered"))
    mine = np.array(dist.part(len(held_out.rows)), dtype=np.int64)
    sums = torch.zeros(4, dtype=torch.float64, device=dist.device)  # plain, reconstructed, zero; tokens
    for part in micro_batches(torch.from_numpy(held_out.lengths[mine]), None, 2**12):
        rows = mine[part.numpy()]
        ids, mask = (torch.from_numpy(x).to(dist.device) for x in held_out.batch(rows))  # [b, T]
        real = torch.from_numpy(np.arange(ids.shape[1]) < held_out.lengths[rows][:, None]).to(dist.device)
        targets, seen = ids.masked_fill(~real, -100)[:, 1:], mask[..., None]

        def loss():
            with autocast(dist, config.dtype):
                logits = lm(input_ids=ids, use_cache=False).logits  # padding, on the right, may be any token
            return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum").double()

        def reconstruct(x):
            return torch.where(seen, sae(x)[0].to(x.dtype), x)

        def switch_off(x):
            return x.masked_fill(seen, 0.0)

        sums[0] += loss()
        with replaced(lm, place, reconstruct):
            sums[1] += loss()
        with replaced(lm, place, switch_off):
            sums[2] += loss()
        sums[3] += real[:, 1:].sum()
    sums = dist.sum(sums)
    plain, sae_loss, zero = (sums[:3] / sums[3]).tolist()
    recovered = (zero - sae_loss) / (zero - plain) if zero > plain else None
    return {"loss": plain, "loss_sae": sae_loss, "loss_zero": zero, "loss_recovered": recovered}


def report(summary):
    """The summary as a table."""
    lines = [f"{'held out':22s}{'FVU':>8s}{'L0':>8s}{'dead':>8s}{'LM loss':>9s}{'with SAE':>10s}{'zero':>8s}{'recovered':>11s}"]
    for key, r in summary.items():
        cells = [(r["loss"], "9.3f"), (r["loss_sae"], "10.3f"), (r["loss_zero"], "8.3f"), (r["loss_recovered"], "11.1%")]
        losses = "".join("-".rjust(int(form.split(".")[0])) if x is None else f"{x:{form}}" for x, form in cells)
        lines.append(f"{key:22s}{r['fvu']:8.3f}{r['l0']:8.1f}{r['dead']:8.1%}{losses}")
    return "\n".join(lines)


def rollout_rows(config, tokenizer, prompts, dist):
    """Prompts (token lists) -> token rows of config.n_answers answers to each, by the policy config.model; cached by pool.sample()."""
    answers = sample(config, tokenizer, prompts, dist)
    return [row["prompt_ids"] + response for row in answers for response in row["response_ids"]]


if __name__ == "__main__":
    cli.run(Config, main)

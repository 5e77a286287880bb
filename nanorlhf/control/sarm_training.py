"""How a SARM starts from an LM and a pretrained autoencoder, and how train_rm.py --sarm trains it.

train_rm.py meets this file in one place: its Config has the Flags, and with --sarm prepare() makes
a SarmTraining, which stands in for train_rm.PlainTraining.

    b pairs, D hidden, L blocks, M features, k of them kept; r_c and r_r are the scores of a pair's
    chosen and rejected text, x a text's standardised hidden state h, x^ its reconstruction

What is trained in each mode. w is the head; W_e, b_e are the encoder's, W_d, b_d the decoder's. The
score does not use W_d, so the preference loss never trains it:

    frozen            the head w
    encoder_frozen    w and the LM (the paper's)
    joint             w, the LM and the encoder (W_e, b_e, b_d)
    detached          the same; and the reconstruction of h trains W_e, b_e, b_d and W_d, without a
                      gradient to the LM

w starts at zero. In `detached` the loss of a pair is

    -log sigmoid(r_c - r_r) + lambda 1/2 (||x_c - x^_c||^2 + ||x_r - x^_r||^2) / D

Source: Zhang et al. 2025 (2508.08746), section 4.
"""

import os
from dataclasses import dataclass

import transformers
from transformers.hf_argparser import HfArg

from ..errors import at_least, require
from ..hf.folders import check_model
from ..hf.lora import choose_trained
from ..interp import sae_files
from ..models import pretrained, resolve
from ..runtime.flags import FlagGroup
from ..runtime.hints import check_made
from ..sarm import SARM, save_sarm

MODES = ("frozen", "encoder_frozen", "joint", "detached")


@dataclass
class Flags(FlagGroup):
    """SARM: a reward model that scores with the features of an autoencoder"""

    sarm: str = HfArg(
        default="",
        help="train a SARM with this autoencoder, into runs/sarm. This makes one: train_sae.py "
        "--model runs/sft --base none --site residual --layers 2 --normalize token --relu False "
        "--output_dir runs/sae_sarm",
    )
    sarm_mode: str = HfArg(
        default="joint",
        metadata={"choices": MODES},
        help="what is trained: the head (frozen); also the language model (encoder_frozen, the "
        "paper's); also the encoder (joint); also the autoencoder's reconstruction, without "
        "effect on the language model (detached)",
    )
    sarm_lambda: float = HfArg(
        default=1.0, help="detached: weight of the reconstruction error, ||x - x^||^2 / D"
    )

    def set_sarm_defaults(self):
        """With --sarm, set --output_dir and --lr to a SARM's defaults where they were not named."""
        if not self.sarm:
            return
        # A value does not tell whether it was named: the default folder, named, counts as unnamed.
        if self.output_dir == type(self).output_dir:
            self.output_dir = "runs/sarm" if self.members == 1 else "runs/sarm/seed_{seed}"
        if self.lr is None:
            self.lr = 2e-3  # a head that starts at zero has further to go

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "sarm_lambda")
        if self.sarm:
            check_flags(self)


def check_flags(config):
    """What of the other flags does not go with --sarm; InputErrors."""
    require(
        config.lr > 0,
        "--sarm starts from a head of zeros: with --lr 0 every score would stay 0",
    )
    require(config.distributed == "ddp", "--sarm is trained with --distributed ddp only")
    # The folder of a SARM holds one whole model, and has no place for adapters.
    require(
        not config.lora_rank or config.merge,
        "--sarm with --lora_rank needs --merge: no adapters in its folder",
    )
    require(config.frozen_dtype == "float32", "--sarm takes no --frozen_dtype")
    # In the mode `frozen` no layer is trained, so there are none to choose.
    chooses_layers = config.lora_rank or config.freeze_layers
    require(
        config.sarm_mode != "frozen" or not chooses_layers,
        "--sarm_mode frozen trains the head alone: it takes no --lora_rank and no --freeze_layers",
    )


def check_autoencoder(config):
    """InputError where --sarm names the default autoencoder and it is missing.

    The error tells the commands that make it.
    """
    if config.sarm:
        check_made(config.sarm)


def prepare(config, dist):
    """-> SarmTraining, or None without --sarm. InputErrors of --model and --sarm; loads neither."""
    if not config.sarm:
        return None
    return SarmTraining(config, check_start(config, dist))


class SarmTraining:
    """What train_rm.train() asks of a SARM; its functions are those of train_rm.PlainTraining."""

    def __init__(self, config, sarm_config):
        self.config = config
        self.sarm_config = sarm_config
        self.detached = config.sarm_mode == "detached"
        self.further_weight = config.sarm_lambda

    def load(self, dist):
        """Start a SARM. -> it, and a sentence on what is trained. Sets `lm`, the HF model in it."""
        self.sarm, note = start(self.config, self.sarm_config, dist.device)
        self.lm = self.sarm.trunk
        return self.sarm, note

    def score(self, model, batch):
        """Packed rows, the chosen ones first -> scores [2 b], further losses of pairs {name: [b]}.

        In `detached` there is one: ||x - x^||^2 / D, the mean over a pair's two texts.
        """
        if not self.detached:
            return model(batch), {}
        # Errors are one a text, losses one a pair: a pair gets the mean of its two errors.
        scores, errors = model(batch, reconstruct=True)  # [2 b], [2 b]
        # The example that a model is first run with (Dist.wrap) is one row, and so one chunk.
        halves = errors.chunk(2)  # [b] of the chosen texts, [b] of the rejected ones
        return scores, {"reconstruction": sum(halves) / 2}

    def after_step(self):
        """Give the decoder's directions unit length again, where they are trained."""
        # If all directions have unit length, z alone is the size of a feature, and features can be
        # compared. In the other modes no gradient moves the decoder.
        if self.detached:
            self.sarm.sae.normalise()

    def save(self, sarm, tokenizer, path):
        save_sarm(sarm, tokenizer, path)


def check_start(config, dist):
    """Look at --model and --sarm before anything is loaded. -> the config of the SARM to be

    InputError: an autoencoder of another kind, place or width than a SARM on --model needs. A
    warning where it was trained on another model.
    """
    path = sae_files.the_one_sae(config.sarm)
    sae_config = sae_files.read_config(path)
    notes = sae_config.get("metadata") or {}
    sarm_config = check_model(config.model)

    # The kind of autoencoder. A SARM's folder has no place for the mean and scale of a data set.
    # It says nothing of a ReLU either: as in the paper there is none, so z may be below 0.
    is_right_kind = (
        sae_config["architecture"] == "nanorlhf_topk_without_relu"
        and sae_config.get("normalize_activations") == "layer_norm"
    )
    flags = "train_sae.py --sae topk --normalize token --relu False --site residual"
    require(
        is_right_kind,
        f"{path}: a SARM needs a TopK autoencoder without ReLU on standardised tokens ({flags})",
    )

    # What it was trained on: the residual stream after one of the model's blocks. The LM in the
    # SARM ends with that block, and the autoencoder reads the block's output.
    site = notes.get("site")
    layer = notes.get("layer")
    n_layers = sarm_config.num_hidden_layers
    require(
        site == "residual",
        f"{path}: an autoencoder of {site}, not of the residual stream ({flags})",
    )
    require(
        type(layer) is int and layer in range(n_layers),
        f"{path}: of layer {layer}, and {config.model} has the layers 0 to {n_layers - 1}",
    )
    d_in = sae_config["d_in"]
    width = sarm_config.get_text_config().hidden_size
    require(
        d_in == width,
        f"{path}: an autoencoder for activations of width {d_in}; {config.model} has {width}",
    )
    # Another model of the same width may be what is meant, such as a later checkpoint of the one
    # that the autoencoder was trained on: so this is a warning, not an error.
    trained_on = str(notes.get("model"))
    if os.path.abspath(resolve(trained_on)) != os.path.abspath(resolve(config.model)):
        dist.print(f"warning: {path} was trained on {trained_on}, not on {config.model}")

    # The model's config becomes the SARM's, in the public checkpoints' words. These count blocks,
    # while layers are numbered from 0: an autoencoder on layer 2 needs the first 3 blocks.
    sarm_config.num_labels = 1
    sarm_config.architectures = ["SARM"]
    sarm_config.sarm_param = {
        "sae_source_layer": layer + 1,
        "sae_latent_size": sae_config["d_sae"],
        "sae_k": sae_config["k"],
        "sae_use_sequence_level": notes.get("tokens") in ("sentence_ends", "last"),
        "sarm_use_activation": True,
    }
    return sarm_config


def start(config, sarm_config, device):
    """The LM of --model and the autoencoder of --sarm -> a SARM, and a sentence on what is trained.

    Its head is zero, and what --sarm_mode trains is chosen.
    """
    # SARM() cuts the LM after the autoencoder's layer, and makes a head of zeros.
    lm = pretrained(transformers.AutoModel, config.model)
    sae = sae_files.load_sae(sae_files.the_one_sae(config.sarm))
    sarm = SARM(lm, sae, sarm_config)

    # What each mode trains is in the table at the top of this file. What gets no gradient must be
    # frozen: DDP waits for the gradient of every parameter that is not.
    note = choose_trained(sarm.trunk, config)
    if config.sarm_mode == "frozen":
        sarm.trunk.requires_grad_(False)
        note = "the LM is frozen"
    sarm.sae.requires_grad_(config.sarm_mode in ("joint", "detached"))
    sarm.sae.W_dec.requires_grad_(config.sarm_mode == "detached")

    n_blocks = sarm_config.sarm_param["sae_source_layer"]
    note += (
        f"; SARM on {n_blocks} of {sarm_config.num_hidden_layers} blocks, {sae.m:,} features, "
        f"k {sae.k}, {config.sarm_mode}"
    )
    return sarm.to(device), note

"""Reward models whose features can be read.

A SARM, or a reward model of train_rm.py with an autoencoder on one of its layers. Everything that
works on features in a reward (penalties in PPO, probes, steering) goes through one function,
FeatureReader.read.

    B answers, F chosen features, E edited features, M features in all, D hidden, T tokens

Flags and folders are checked first (check_feature_reader). FeatureReader then stands over both
kinds of model: a SARM (sarm.py), or an ordinary reward model in WithSAE, at the end of this file,
which can be read as a SARM can.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.hf_argparser import HfArg

from ..errors import at_least, require
from ..hf.activations import SITES, captured, replaced
from ..hf.folders import check_model
from ..interp import sae_files
from ..interp.sae_files import the_one_sae
from ..models import fingerprint, is_reward_model, load_reward_model
from ..packing import pack
from ..penalties import OPS, edit_latents
from ..rewards import PackedReader, kind_of
from ..runtime.distributed import autocast
from ..runtime.flags import FORWARD_HELP, MOST_FLOAT, FlagGroup
from ..runtime.fsdp import gathered
from ..runtime.hints import check_made
from ..sarm import SARM, Reading, check_sarm, checked, is_sarm


@dataclass
class FeatureReaderFlags(FlagGroup):
    """The reward model: whose features are read"""

    reward_model: str = HfArg(
        default="runs/sarm",
        help="the folder of a SARM (train_rm.py --sarm), or of any reward model with --sae",
    )
    sae: str = HfArg(
        default="",
        help="for an ordinary reward model: the folder of an autoencoder on one of its layers "
        "(train_sae.py)",
    )
    max_length: int = HfArg(
        default=0, help="tokens in the longest text; longer ones are cut; 0: the model's context"
    )
    micro_batch_size: int = HfArg(default=64, help=FORWARD_HELP)

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "max_length")
        at_least(self, 1, "micro_batch_size")


def check_feature_reader(spec, sae="", features=()):
    """Look at a reward model and its autoencoder before any of them is loaded. -> M

    sae: a folder; "" for a SARM, which has its own. InputError, in one line: no reward model; one
    without features; an autoencoder of another width, or of no layer of it; a feature that is not
    there.
    """
    # A reward that is no model, such as a function or a lexicon, has no layers to read.
    require(kind_of(spec) == "model", f"{spec} is no reward model, so it has no features")
    check_made(spec)
    # A SARM's score is a weighted sum of its own autoencoder's features, so it takes no other one.
    # An ordinary reward model has no features until an autoencoder reads one of its layers.
    if is_sarm(spec):
        require(
            not sae,
            f"{spec} is a SARM, which scores with an autoencoder of its own: name no other ({sae})",
        )
        m = check_sarm(spec).sarm_param["sae_latent_size"]
    else:
        require(is_reward_model(spec), f"{spec} is no reward model of train_rm.py")
        require(
            sae,
            f"{spec} is no SARM: name an autoencoder on one of its layers "
            f"(train_sae.py --model {spec})",
        )
        m = check_autoencoder(spec, the_one_sae(sae))
    checked(features, None, m)  # an InputError for a feature that is not below M
    return m


def check_autoencoder(spec, sae):
    """InputError where the autoencoder in folder `sae` does not fit the reward model. -> M"""
    sae_config = sae_files.read_config(sae)
    config = check_model(spec)
    # Only width and layer are checked. Pitfall: an autoencoder that was trained on another model of
    # the same width passes, and what it finds in this one means little.
    d_in = sae_config["d_in"]
    width = config.get_text_config().hidden_size
    require(
        d_in == width, f"{sae}: an autoencoder for activations of width {d_in}; {spec} has {width}"
    )
    layer, _ = read_place(sae)
    n_layers = config.get_text_config().num_hidden_layers
    require(
        layer in range(n_layers),
        f"{sae}: an autoencoder on layer {layer}; {spec} has the layers 0 to {n_layers - 1}",
    )
    return sae_config["d_sae"]


def read_place(sae):
    """(layer, site) of an autoencoder's folder, by its metadata. InputError: it does not say."""
    notes = sae_files.read_config(sae).get("metadata") or {}
    layer = notes.get("layer")
    site = notes.get("site")
    require(
        type(layer) is int and site in SITES,
        f"{sae}: its metadata do not say which layer and site it is on",
    )
    return layer, site


def parse_edits(flag, texts, ops=OPS):
    """["17:set:0", "23:max:0.5"] -> {17: ("set", 0.0), 23: ("max", 0.5)}

    flag: its name, for errors. InputError: another form, an op that is not among `ops`, a number
    that float32 does not hold, a feature that is named twice.
    """
    edits = {}
    for text in texts:
        # A text of another form leaves three empty parts, which fail the check below.
        feature, op, value = "", "", ""
        if text.count(":") == 2:
            feature, op, value = text.split(":")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        is_id = feature.isdecimal() and len(feature) < 19  # fits 64 bits
        is_number = abs(number) <= MOST_FLOAT  # nan is not
        require(
            is_id and op in ops and is_number,
            f"--{flag} {text}: it must be FEATURE:OP:VALUE with OP one of {', '.join(ops)}, "
            "such as 17:set:0",
        )
        # All edits start from the same z, so two edits of one feature would have no order.
        require(int(feature) not in edits, f"--{flag} names feature {int(feature)} twice")
        edits[int(feature)] = (op, number)
    return edits


def latents_fingerprint(spec, sae=""):
    """Digests of what makes the latents, as it is at this moment: {"reward_model", "sae"}.

    That of the autoencoder is "" for a SARM, which has its own.
    """
    fingerprint_of_sae = ""
    if sae:
        fingerprint_of_sae = fingerprint(the_one_sae(sae))
    return {"reward_model": fingerprint(spec), "sae": fingerprint_of_sae}


def load_feature_reader(spec, sae, tokenizer, dist, micro_batch_size=64, dtype="float32"):
    """Load what check_feature_reader looked at. -> FeatureReader

    tokenizer: the policy's, whose ids are read as they are; None: there is only text.
    """
    check_feature_reader(spec, sae)
    # Both kinds of module have read(), the autoencoder as `sae` and the HF config as `config`.
    if sae:
        sae = the_one_sae(sae)
        width = check_model(spec).get_text_config().hidden_size
        autoencoder = sae_files.load_sae(sae, width)
        module = WithSAE(load_reward_model(spec), autoencoder, read_place(sae)).eval()
    else:
        module = SARM.from_pretrained(spec)
    # No gradient goes through a reward: PPO learns from its numbers alone.
    module.to(dist.load_device).requires_grad_(False)
    return FeatureReader(module, spec, tokenizer, dist, micro_batch_size, dtype)


class FeatureReader:
    """A reward model that also tells its features.

    m: the number of features; weights [M]: the head's weight on each, or None where the head does
    not read them.
    """

    def __init__(self, module, path, tokenizer, dist, micro_batch_size, dtype):
        self.path = path
        self.dist = dist
        self.dtype = dtype
        self.m = module.sae.m
        # The weights are copied before wrap(), which may leave this process a shard of them only.
        self.weights = None
        if isinstance(module, SARM):
            self.weights = module.score.weight[0].float().cpu()
        self.packed_reader = PackedReader(module.config, path, tokenizer, dist, micro_batch_size)
        self.module = dist.wrap(module, dtype=dtype)
        # FSDP wants its first pass through the root, which read() is not.
        if dist.sharded:
            with gathered(self.module), torch.no_grad():
                self.module(pack([[1]], [[2]]).to(dist.device))

    def read(self, answers, features=None, edits=None):
        """Answers -> Reading(scores [B], latents [B, F] or [B, M], edited [B]): see SARM.read.

        In float32 on the CPU. All processes call it equally often: a model in shards is gathered
        for it.
        """
        with gathered(self.module):
            return self.read_gathered(answers, features, edits)

    def read_gathered(self, answers, features, edits):
        """read() of a model that the caller has gathered: without collective calls."""
        # Readings go to the CPU micro-batch by micro-batch: a GPU never holds the latents [B, M] of
        # all answers.
        n_features = self.m if features is None else len(features)
        readings = Reading(
            scores=torch.zeros(len(answers)),
            latents=torch.zeros(len(answers), n_features),
            edited=torch.zeros(len(answers)),
        )
        for rows, part in self.packed_reader.read(answers):
            with autocast(self.dist, self.dtype):
                reading = self.module.read(part, features, edits)
            # Micro-batches are sorted by length; `rows` are the places of their texts in `answers`.
            rows = rows.cpu()
            readings.scores[rows] = reading.scores.float().cpu()
            readings.latents[rows] = reading.latents.float().cpu()
            readings.edited[rows] = reading.edited.float().cpu()

        # A bad score is the model's fault, or that of an edit: each has a message of its own.
        require(
            bool(readings.scores.isfinite().all()),
            f"the reward model {self.path} gave a score that is not finite",
        )
        require(
            bool(readings.edited.isfinite().all()),
            f"an edit makes a score of the reward model {self.path} that is not finite",
        )
        return readings


# --------------------------------------------------------- an ordinary reward model's features


class WithSAE(nn.Module):
    """A models.RewardModel and an autoencoder at `place` (layer, site): a SARM's readings.

    An edit works on the activation x at the pooled token, in a second forward, and the layers above
    see it. s leads from standardised units to the model's:

        x' = x + s sum_i (edit(z_i) - z_i) d_i

    At that token only, so that there is one z of a text, the one that is reported, penalised and
    edited. Pitfall: at other tokens the feature is still there, and attention above may read it.
    """

    def __init__(self, reward_model, sae, place):
        super().__init__()
        self.reward_model = reward_model
        self.sae = sae
        self.place = place
        self.config = reward_model.model.config

    def forward(self, batch):
        return self.reward_model(batch)

    def encode(self, x):
        """x [B, D] -> z [B, M]; in float32, also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            return self.sae.encode(x.float())

    @torch.no_grad()
    def read(self, batch, features=None, edits=None):
        """Packed rows -> Reading, as SARM.read; edited is scores exactly where nothing changes."""
        features, edits = checked(features, edits, self.sae.m)
        # One forward gives the scores, and the output of the layer on the way to them.
        with captured(self.reward_model.model, [self.place]) as outputs:
            scores = self.reward_model(batch)  # [B]
        output = outputs[self.place]  # [B, T, D], padding included
        x = output[pooled_tokens(batch)].to(self.sae.mean.dtype)  # [B, D]
        z = self.encode(x)  # [B, M]
        # The head does not read z, so what an edit does to the score cannot be added up as for a
        # SARM: the layers above have to run again.
        edited = scores
        if edits:
            edited = self.score_edited(batch, scores, x, z, edits)
        latents = z if features is None else z[:, features]
        return Reading(scores, latents, edited)

    def score_edited(self, batch, scores, x, z, edits):
        """The scores [B] after edits, from the scores, x [B, D] and z [B, M] before them."""
        # How far each x moves. Only the change of z is decoded and added: if x were replaced by the
        # decoded new z, the autoencoder's reconstruction error would change the score too.
        features = list(edits)
        old_z = z[:, features]  # [B, E]
        change = edit_latents(old_z, list(edits.values())) - old_z  # [B, E]
        steps = change @ self.sae.W_dec[features]  # [B, D]
        # Directions are in standardised units, and the scale leads back to the model's. The mean
        # cancels in a difference.
        if self.sae.normalize != "none":
            _, scale = self.sae.moments(x)
            steps = steps * scale

        # Texts whose features do not change keep their scores, bit by bit, since they get no second
        # forward: in a batch of another size it might round differently.
        rows = (change != 0).any(1).nonzero()[:, 0]
        if not len(rows):
            return scores
        part = batch.rows(rows)
        pooled = pooled_tokens(part)

        # In the second forward the layer's output is moved, at the pooled tokens alone.
        def move(output):  # [rows, T, D]
            moved = output.clone()
            moved[pooled] += steps[rows].to(output.dtype)
            return moved

        edited = scores.clone()
        with replaced(self.reward_model.model, self.place, move):
            edited[rows] = self.reward_model(part)
        return edited


def pooled_tokens(batch):
    """The index of each row's last real token: (rows [B], positions [B])."""
    # Two index tensors pick one token of each row: x[rows, positions] is [B, D] of x [B, T, D].
    rows = torch.arange(len(batch), device=batch.ids.device)
    return rows, batch.lengths - 1

"""Reward models whose latents can be read: a SARM, or a reward model of train_rm.py with an autoencoder on one of its layers.

    B answers, F chosen features, M latents

Everything that works on latents in a reward (penalties in PPO, probes, steering) goes through one function, FeatureReward.read.
"""

import math
import os
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
from ..rewards import kind_of, packed_reader, reward_names
from ..runtime.distributed import autocast
from ..runtime.flags import MOST_FLOAT, FlagGroup
from ..runtime.fsdp import gathered
from ..runtime.hints import check_made
from ..sarm import SARM, Reading, check_sarm, checked, is_sarm


@dataclass
class LatentFlags(FlagGroup):
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
    micro_batch_size: int = HfArg(default=64, help="texts in one forward pass")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "max_length")
        at_least(self, 1, "micro_batch_size")


def check_feature_reward(spec, sae="", features=()):
    """Look at a reward model and its autoencoder (a folder; a SARM has its own: "") before any of them is loaded. -> M

    InputError, in one line: no reward model; one without latents; an autoencoder of another width, or of no layer of it; a feature that
    is not there.
    """
    require(kind_of(spec) == "model", f"{spec} is no reward model, so it has no features")
    check_made(spec)
    if is_sarm(spec):
        require(not sae, f"{spec} is a SARM, which scores with an autoencoder of its own: name no other ({sae})")
        m = check_sarm(spec).sarm_param["sae_latent_size"]
    else:
        require(is_reward_model(spec), f"{spec} is no reward model of train_rm.py")
        require(sae, f"{spec} is no SARM: name an autoencoder on one of its layers (train_sae.py --model {spec})")
        sae = the_one_sae(sae)
        found, config = sae_files.read_config(sae), check_model(spec)
        width = config.get_text_config().hidden_size
        require(found["d_in"] == width, f"{sae}: an autoencoder for activations of width {found['d_in']}; {spec} has {width}")
        layer, site = place_of(sae)
        n = config.num_hidden_layers
        require(layer in range(n), f"{sae}: an autoencoder on layer {layer}; {spec} has the layers 0 to {n - 1}")
        m = found["d_sae"]
    checked(features, None, m)
    return m


def parse_edits(flag, texts, ops=OPS):
    """["17:set:0", "23:max:0.5"] -> {17: ("set", 0.0), 23: ("max", 0.5)}"""
    edits = {}
    for text in texts:
        i, op, value = text.split(":") if text.count(":") == 2 else ("", "", "")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        # Of nan every comparison is False. An id of more digits than 64 bits hold is none.
        fits = abs(number) <= MOST_FLOAT and len(i) < 19
        good = i.isdecimal() and op in ops and fits
        require(good, f"--{flag} {text}: it must be FEATURE:OP:VALUE with OP one of {', '.join(ops)}, such as 17:set:0")
        require(int(i) not in edits, f"--{flag} names feature {i} twice")
        edits[int(i)] = (op, number)
    return edits


def place_of(sae):
    """(layer, site) of an autoencoder's folder, by its metadata."""
    notes = sae_files.read_config(sae).get("metadata") or {}
    layer, site = notes.get("layer"), notes.get("site")
    require(type(layer) is int and site in SITES, f"{sae}: its metadata do not say which layer and site it is on")
    return layer, site


def latents_fingerprint(spec, sae=""):
    """What the latents are those of, at this moment: {"reward_model": digest, "sae": digest, or "" for a SARM}."""
    return {"reward_model": fingerprint(spec), "sae": fingerprint(the_one_sae(sae)) if sae else ""}


def load_feature_reward(spec, sae, tokenizer, dist, micro_batch_size=64, dtype="float32"):
    """Load what check_feature_reward looked at. -> FeatureReward. `tokenizer` is the policy's; None: there is only text."""
    check_feature_reward(spec, sae)
    if sae:
        sae = the_one_sae(sae)
        width = check_model(spec).get_text_config().hidden_size
        module = WithSAE(load_reward_model(spec), sae_files.load_sae(sae, width), place_of(sae)).eval()
    else:
        module = SARM.from_pretrained(spec)
    module.to(dist.load_device).requires_grad_(False)
    return FeatureReward(module, spec, reward_names([os.path.normpath(spec)])[0], tokenizer, dist, micro_batch_size, dtype)


class FeatureReward:
    """A reward model that also tells its latents. It is a reward function itself: Answers -> scores [B], as rewards.load_reward gives.

    m: the number of latents; weights: [M], the head's weight on each, or None where the head does not read them; name: in records.
    """

    def __init__(self, module, path, name, tokenizer, dist, micro_batch_size, dtype):
        self.path, self.name, self.dist, self.dtype, self.m = path, name, dist, dtype, module.sae.m
        self.weights = module.score.weight[0].float().cpu() if isinstance(module, SARM) else None
        self.packed = packed_reader(module.config, path, tokenizer, dist, micro_batch_size)
        self.module = dist.wrap(module, dtype=dtype)
        if dist.sharded:  # FSDP wants its first pass through the root, which read() is not
            with gathered(self.module), torch.no_grad():
                self.module(pack([[1]], [[2]]).to(dist.device))

    def __call__(self, answers):
        """Scores [B] in float32 on the CPU. A model in shards is gathered by the caller (rewards.score)."""
        return self.read_gathered(answers, []).scores

    def read(self, answers, features=None, edits=None):
        """Answers -> Reading(scores [B], latents [B, F] or [B, M], edited [B]) in float32 on the CPU: see SARM.read.

        All processes call it equally often: a model in shards is gathered for it.
        """
        with gathered(self.module):
            return self.read_gathered(answers, features, edits)

    def read_gathered(self, answers, features=None, edits=None):
        n_features = self.m if features is None else len(features)
        out = Reading(torch.zeros(len(answers)), torch.zeros(len(answers), n_features), torch.zeros(len(answers)))
        for rows, part in self.packed(answers) if len(answers) else []:
            with autocast(self.dist, self.dtype):
                found = self.module.read(part, features, edits)
            for whole, values in zip(out, found):
                whole[rows.cpu()] = values.float().cpu()
        require(bool(out.scores.isfinite().all()), f"the reward model {self.path} gave a score that is not finite")
        moved = bool(out.edited.isfinite().all())
        require(moved, f"an edit makes a score of the reward model {self.path} that is not finite")
        return out


# ------------------------------------------------------------------------------------------------ an ordinary reward model's latents


class WithSAE(nn.Module):
    """A models.RewardModel and an autoencoder on what it puts out at `place` (layer, site): the same readings as a SARM's.

    An edit works on the activation x at the pooled token, in a second forward, and the layers above see it:

        x' = x + s sum_i (edit(z_i) - z_i) d_i          s: from standardised to the model's units

    At that token only, so that there is one z of a text, the one that is reported, penalised and edited. Pitfall: at other tokens the
    feature is still there, and attention above may read it.
    """

    def __init__(self, reward_model, sae, place):
        super().__init__()
        self.reward_model, self.sae, self.place = reward_model, sae, place
        self.config = reward_model.model.config

    def forward(self, batch):
        return self.reward_model(batch)

    def encode(self, x):
        """x [B, D] -> z [B, M]"""
        with torch.autocast(x.device.type, enabled=False):
            return self.sae.encode(x.float())

    @torch.no_grad()
    def read(self, batch, features=None, edits=None):
        """As SARM.read; edited = scores exactly where no latent changes."""
        features, edits = checked(features, edits, self.sae.m)
        at = torch.arange(len(batch), device=batch.ids.device), batch.lengths - 1
        lm, chosen = self.reward_model.model, list(edits)
        with captured(lm, [self.place]) as kept:
            scores = self.reward_model(batch)
        x = kept[self.place][at].to(self.sae.mean.dtype)  # [B, D]
        z = self.encode(x)
        edited = scores
        if edits:
            _, scale = self.sae.moments(x)
            change = edit_latents(z[:, chosen], list(edits.values())) - z[:, chosen]  # [B, E]
            steps = change @ self.sae.W_dec[chosen] * (1.0 if self.sae.normalize == "none" else scale)  # [B, D]

            def moved(output):
                new = output.clone()
                new[at] += steps.to(output.dtype)
                return new

            rows = (change != 0).any(1).nonzero()[:, 0]  # the others need no second forward
            if len(rows):
                part, steps, edited = batch.rows(rows), steps[rows], scores.clone()
                at = torch.arange(len(rows), device=rows.device), part.lengths - 1
                with replaced(lm, self.place, moved):
                    edited[rows] = self.reward_model(part)
        return Reading(scores, z if features is None else z[:, features], edited)

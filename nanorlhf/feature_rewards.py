"""Reward models whose latents can be read: a SARM, or a reward model of train_rm.py with an autoencoder on one of its layers.

    B answers, F chosen features, M latents

Everything that works on latents in a reward (penalties in PPO, probes, steering) goes through one function, FeatureReward.read.
"""

import os

import torch

from . import sae_files
from .activations import SITES
from .adapters import is_adapter, read_config
from .cli import require
from .distributed import autocast
from .fsdp import gathered
from .models import check_model, load_reward_model, resolve
from .packing import pack
from .pool import fingerprint
from .rewards import packed_reader, reward_names
from .sarm import SARM, Reading, WithSAE, checked, is_sarm
from .sarm_files import check_sarm


def check_feature_reward(spec, sae="", features=()):
    """Look at a reward model and its autoencoder (a folder; a SARM has its own: "") before any of them is loaded. -> M

    InputError, in one line: no reward model; one without latents; an autoencoder of another width, or of no layer of it; a feature that
    is not there.
    """
    text = spec == "world:gold" or ".py:" in spec or spec.endswith((".tsv", ".txt"))
    require(not text, f"{spec} is no reward model, so it has no features")
    if is_sarm(spec):
        require(not sae, f"{spec} is a SARM, which scores with an autoencoder of its own: name no other ({sae})")
        m = check_sarm(resolve(spec)).sarm_param["sae_latent_size"]
    else:
        config, path = check_model(spec), resolve(spec)
        scalar = read_config(path).get("task_type") == "SEQ_CLS" if is_adapter(path) else config.num_labels == 1
        require(scalar, f"{spec} is no reward model of train_rm.py")
        require(sae, f"{spec} is no SARM: name an autoencoder on one of its layers (train_sae.py --model {spec})")
        found = sae_files.read_config(sae)
        width = config.get_text_config().hidden_size
        require(found["d_in"] == width, f"{sae}: an autoencoder for activations of width {found['d_in']}; {spec} has {width}")
        layer, site = place_of(sae)
        n = config.num_hidden_layers
        require(layer in range(n), f"{sae}: an autoencoder on layer {layer}; {spec} has the layers 0 to {n - 1}")
        m = found["d_sae"]
    checked(features, None, m)
    return m


def place_of(sae):
    """(layer, site) of an autoencoder's folder, by its metadata."""
    notes = sae_files.read_config(sae).get("metadata") or {}
    layer, site = notes.get("layer"), notes.get("site")
    require(type(layer) is int and site in SITES, f"{sae}: its metadata do not say which layer and site it is on")
    return layer, site


def latents_fingerprint(spec, sae=""):
    """What the latents are those of, at this moment: {"reward_model": digest, "sae": digest, or "" for a SARM}."""
    return {"reward_model": fingerprint(spec), "sae": fingerprint(sae) if sae else ""}


def load_feature_reward(spec, sae, tokenizer, dist, micro_batch_size=64, dtype="float32"):
    """Load what check_feature_reward looked at. -> FeatureReward. `tokenizer` is the policy's; None: there is only text."""
    check_feature_reward(spec, sae)
    path = resolve(spec)
    if sae:
        width = check_model(path).get_text_config().hidden_size
        module = WithSAE(load_reward_model(path), sae_files.load_sae(sae, width), place_of(sae)).eval()
    else:
        module = SARM.from_pretrained(path)
    module.to(dist.load_device).requires_grad_(False)
    return FeatureReward(module, path, reward_names([os.path.normpath(spec)])[0], tokenizer, dist, micro_batch_size, dtype)


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
        return out

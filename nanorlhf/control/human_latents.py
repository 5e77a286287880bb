"""What people's texts look like to a reward model's features: the reference data of penalties in train_ppo.py, in one file.

    N texts, M latents, F of them in the file

FILE.safetensors holds  latents [N, F] at each text's last token, features [F] (their ids), scores [N] of the same texts by the same
reward model, and says whose latents they are (fingerprints of the reward model and of its autoencoder). With `complete` it holds all
latents that fire on any of the texts, so that any other is known to be 0 on all of them.

Pitfall: a whole text ends with EOS, and that is where its latents are read. Those of one that was cut off are of another token.
"""

import json
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from transformers.hf_argparser import HfArg

from .. import data
from ..errors import InputError, at_least, require
from ..models import load_tokenizer
from ..packing import Answers, pack
from ..runtime.distributed import setup
from ..runtime.files import check_can_write, check_fields, check_output, parse_json
from ..runtime.flags import DEVICE_HELP, DEVICES, TextFlags
from ..runtime.log import Progress
from ..runtime.results import parse_ids
from ..runtime.tensors import check_tensors, read_notes, read_tensors
from .feature_rewards import (
    LatentFlags,
    check_feature_reward,
    latents_fingerprint,
    load_feature_reward,
)

NAMES, NOTES = ("latents", "features", "scores"), "human_latents"
WHOSE = {"reward_model": "reward model", "sae": "autoencoder"}
CHUNK = 1024  # texts that are read before what fires in them is put aside


class HumanLatents(NamedTuple):
    path: str
    latents: torch.Tensor  # [N, F], float32
    features: list[int]  # [F]
    scores: torch.Tensor  # [N], float32
    complete: bool  # the file has all latents that fire on any of its texts

    def column(self, feature):
        """The feature's latents on all texts, [N]. InputError: the file does not know them."""
        if feature in self.features:
            return self.latents[:, self.features.index(feature)]
        require(self.complete, f"{self.path} holds no latents of feature {feature} (probe.py human_latents --features chooses them)")
        return torch.zeros(len(self.latents))


def save(path, human, fingerprint):
    """Write a file of human latents, under a temporary name first. fingerprint: a dict, feature_rewards.latents_fingerprint."""
    tensors = {"latents": human.latents.contiguous(), "features": torch.tensor(human.features), "scores": human.scores.contiguous()}
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    # A name of its own: of two processes at once the last one's file stays, whole.
    temporary = f"{path}.{os.getpid()}.tmp"
    notes = {"complete": human.complete, "fingerprint": fingerprint}
    save_file(tensors, temporary, {NOTES: json.dumps(notes)})
    os.replace(temporary, path)


def is_human_latents(path):
    """Whether a file is one that save() wrote."""
    try:
        return NOTES in read_notes(path)
    except InputError:
        return False


def load(path, spec, sae):
    """A file of human latents, for the reward model `spec` and its autoencoder -> HumanLatents.

    InputError: no such file, another kind of file, latents of another reward model or autoencoder. Loads no model.
    """
    command = f"python probe.py human_latents --reward_model {spec} --output {path}"
    if sae:
        command += f" --sae {sae}"
    require(os.path.isfile(path), f"{path}: no human latents here; this makes them: {command}")
    notes = read_notes(path).get(NOTES)
    tensors = read_tensors(path)
    require(notes and set(NAMES) <= set(tensors), f"{path}: not a file of human latents (probe.py human_latents)")
    latents, features, scores = (tensors[name] for name in NAMES)
    fits = latents.ndim == 2 and scores.shape == latents.shape[:1] and features.shape == latents.shape[1:]
    require(fits and len(scores) > 0, f"{path}: its tensors do not fit each other")
    check_tensors(tensors, {"latents": None, "scores": None}, path)
    largest = max(latents.abs().max().item() if latents.numel() else 0.0, scores.abs().max().item())
    require(largest < 1e18, f"{path}: it holds {largest:.3g}, whose square float32 cannot hold")
    ids = features.tolist()
    good = features.dtype == torch.int64 and len(set(ids)) == len(ids) and min(ids, default=0) >= 0
    require(good, f"{path}: its features must be whole numbers from 0, each of them once")
    notes = check_fields(parse_json(notes, path), {"complete": bool, "fingerprint": dict}, path)
    what = f"{spec} with {sae}" if sae else spec
    for name, value in latents_fingerprint(spec, sae).items():
        same = notes["fingerprint"].get(name) == value
        require(same, f"{path}: latents by another {WHOSE[name]} than {what} (write them again: probe.py human_latents)")
    return HumanLatents(path, latents.float(), ids, scores.float(), notes["complete"])


# ------------------------------------------------------------------------------------------------------ body of the probe.py command


@dataclass
class HumanLatentsConfig(LatentFlags, TextFlags):
    """Texts and the file: which features of which texts are written where"""

    output: str = HfArg(default="runs/human_latents.safetensors", help="the file to write")
    features: str = HfArg(
        default="",
        help="numbers of the features to keep, such as 3,17; by default all that fire on any text",
    )
    kind: str = HfArg(
        default="sft",
        metadata={"choices": ("sft", "pairs")},
        help="what the rows are: sft {prompt, response}, or pairs {prompt, chosen, rejected}, of "
        "which the chosen side is read",
    )
    max_rows: int = HfArg(default=2000, help="use a random subset of this many rows; 0: all rows")
    device: str = HfArg(default="auto", metadata=dict(DEVICES), help=DEVICE_HELP)
    dtype: str = HfArg(
        default="float32",
        metadata={"choices": ("float32", "bfloat16")},
        help="the numbers of matrix products; weights are float32 in any case",
    )

    max_length: int = HfArg(
        default=0, help="tokens in the longest text; longer ones are an error; 0: any"
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "max_rows")
        parse_ids(self.features)


def human_latents(config):
    """Write the features of people's texts, for train_ppo.py.

    They are what --tau, --alpha and --density_beta of train_ppo.py compare
    with: the features of a SARM, or of an autoencoder on one of a reward
    model's layers, at the last token of each text, and the texts' scores.
    """
    dist, ids = setup(config.device), parse_ids(config.features)
    check_output(config.output, is_human_latents, "a file of human latents")
    dist.together(lambda: dist.main and check_can_write(config.output))
    check_feature_reward(config.reward_model, config.sae, ids)
    rows = data.subset(data.read_rows(config.dataset, config.kind, config.columns), config.max_rows)
    tokenizer, side = load_tokenizer(config.reward_model), "response" if config.kind == "sft" else "chosen"
    prompts, responses, cut = data.encode(tokenizer, rows, side, config.max_length or None, config.chat_template)
    reward = load_feature_reward(config.reward_model, config.sae, tokenizer, dist, config.micro_batch_size, config.dtype)

    def answers(places):
        batch = pack([prompts[i] for i in places], [responses[i] for i in places], tokenizer.pad_token_id)
        return Answers([rows[i]["prompt"] for i in places], [rows[i][side] for i in places], batch)

    def mine():
        places, found, scores = dist.part(len(rows)), [torch.zeros(0, len(ids) or reward.m).to_sparse()], [torch.zeros(0)]
        progress = Progress(dist, "human latents, text", len(places))
        for first in range(places.start, places.stop, CHUNK):
            reading = reward.read(answers(range(first, min(first + CHUNK, places.stop))), ids or None)
            found.append(reading.latents.to_sparse())
            scores.append(reading.scores)
            progress.step(first - places.start + len(reading.scores), "")
        progress.close()
        return torch.cat(found).coalesce(), torch.cat(scores)

    latents, scores = dist.together(mine)  # sparse [n, M] of this process's texts, [n]
    chosen = torch.arange(len(ids)) if ids else dist.gather(latents.indices()[1].unique()).unique()  # columns
    latents = dist.gather(latents.index_select(1, chosen).to_dense())  # [N, F]
    human = HumanLatents(config.output, latents, ids or chosen.tolist(), dist.gather(scores), not ids)
    if dist.main:
        save(config.output, human, latents_fingerprint(config.reward_model, config.sae))
    dist.barrier()
    summary = {"texts": len(rows), "cut": cut, "features": len(human.features), "score_mean": human.scores.mean().item(),
               "score_std": human.scores.std().item()}  # fmt: skip
    dist.print("{texts} texts ({cut} cut), {features} features, score {score_mean:.3f} with a std of {score_std:.3f}".format(**summary))
    dist.print(f"Written to {config.output}")
    return summary

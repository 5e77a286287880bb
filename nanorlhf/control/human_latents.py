"""What people's texts look like to a reward model's features, in one file.

It is the reference data of penalties in train_ppo.py.

    N texts, n of them read by this process, M features, F of them in the file

FILE.safetensors holds latents [N, F] at each text's last token, features [F] (their ids), scores
[N] of the same texts by the same reward model, and says whose latents they are (fingerprints of the
reward model and of its autoencoder). With `complete` it holds all features that fire on any of the
texts, so that any other is known to be 0 on all of them.

Pitfall: a whole text ends with EOS, and that is where its latents are read. A text that was cut off
is read at another token.
"""

import json
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from transformers.hf_argparser import HfArg

from .. import data
from ..chat_templates import leave_out_control_tokens
from ..errors import InputError, at_least, require
from ..hf.folders import check_model, choose_max_length
from ..models import load_tokenizer
from ..packing import Answers, pack
from ..runtime.distributed import setup
from ..runtime.files import check_can_write, check_fields, check_output, parse_json
from ..runtime.flags import DEVICE_HELP, DEVICES, TextFlags, subset_of
from ..runtime.log import Progress
from ..runtime.results import parse_ids
from ..runtime.tensors import check_tensors, read_notes, read_tensors
from ..tokens import encode
from .feature_reader import (
    FeatureReaderFlags,
    check_feature_reader,
    latents_fingerprint,
    load_feature_reader,
)

NAMES = ("latents", "features", "scores")
NOTES = "human_latents"  # where a file's notes stand among its metadata
WHOSE = {"reward_model": "reward model", "sae": "autoencoder"}
# Numbers of a file are smaller than this: float32 holds their squares.
MOST = 1e18
CHUNK = 1024  # texts that are read before what fires in them is put aside


class HumanLatents(NamedTuple):
    """A file of human latents."""

    path: str
    latents: torch.Tensor  # [N, F], float32
    features: list[int]  # [F]
    scores: torch.Tensor  # [N], float32
    complete: bool  # the file has all features that fire on any of its texts

    def column(self, feature):
        """The feature's latents on all texts, [N]. InputError: the file does not know them."""
        if feature in self.features:
            return self.latents[:, self.features.index(feature)]
        # A feature that a complete file lacks fired on no text. If the file is not complete, nobody
        # knows.
        require(
            self.complete,
            f"{self.path} holds no latents of feature {feature} "
            "(probe.py human_latents --features chooses them)",
        )
        return torch.zeros(len(self.latents))


def save(path, human, fingerprint):
    """Write a file of human latents, under a temporary name first.

    fingerprint: a dictionary, feature_reader.latents_fingerprint.
    """
    tensors = {
        "latents": human.latents.contiguous(),
        "features": torch.tensor(human.features),
        "scores": human.scores.contiguous(),
    }
    notes = {"complete": human.complete, "fingerprint": fingerprint}
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    # Each process has a temporary name of its own: if two write at once, the last one's file stays
    # and is whole.
    temporary = f"{path}.{os.getpid()}.tmp"
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

    InputError: no such file, another kind of file, latents of another reward model or autoencoder.
    Loads no model.
    """
    command = f"python probe.py human_latents --reward_model {spec} --output {path}"
    if sae:
        command += f" --sae {sae}"
    require(os.path.isfile(path), f"{path}: no human latents here; this makes them: {command}")

    # A model's weights are a file of tensors too; only human latents have these notes.
    notes = read_notes(path).get(NOTES)
    tensors = read_tensors(path)
    require(
        notes and set(NAMES) <= set(tensors),
        f"{path}: not a file of human latents (probe.py human_latents)",
    )
    # A wrong number that passed here would become a strange penalty in PPO, hours later.
    check_human_tensors(tensors, path)
    notes = check_fields(parse_json(notes, path), {"complete": bool, "fingerprint": dict}, path)
    check_fingerprint(notes["fingerprint"], path, spec, sae)
    return HumanLatents(
        path,
        tensors["latents"].float(),
        tensors["features"].tolist(),
        tensors["scores"].float(),
        notes["complete"],
    )


def check_human_tensors(tensors, path):
    """InputError where the tensors of a file do not fit each other, or hold impossible numbers."""
    # latents [N, F], features [F], scores [N], with at least one text; F may be 0.
    latents = tensors["latents"]
    features = tensors["features"]
    scores = tensors["scores"]
    fits = (
        latents.ndim == 2
        and scores.shape == latents.shape[:1]
        and features.shape == latents.shape[1:]
    )
    require(fits and len(scores) > 0, f"{path}: its tensors do not fit each other")

    # Latents and scores are finite floats. A standard deviation squares them, which must not
    # overflow.
    check_tensors(tensors, {"latents": None, "scores": None}, path)
    largest = scores.abs().max().item()
    if latents.numel():
        largest = max(latents.abs().max().item(), largest)
    require(largest < MOST, f"{path}: it holds {largest:.3g}, whose square float32 cannot hold")

    # A feature that stands there twice would have two columns, and column() would find the first.
    ids = features.tolist()
    is_once = len(set(ids)) == len(ids)
    are_ids = features.dtype == torch.int64 and is_once and min(ids, default=0) >= 0
    require(are_ids, f"{path}: its features must be whole numbers from 0, each of them once")


def check_fingerprint(stored, path, spec, sae):
    """InputError where a file's latents are of another reward model or autoencoder than these."""
    # Fingerprints are of files, not of folders' names: a model that was moved stays the same one. A
    # model that was trained again in its old folder does not: its feature 17 is another feature.
    what = f"{spec} with {sae}" if sae else spec
    for name, value in latents_fingerprint(spec, sae).items():
        require(
            stored.get(name) == value,
            f"{path}: latents by another {WHOSE[name]} than {what} "
            "(write them again: probe.py human_latents)",
        )


# ----------------------------------------------------------------- body of the probe.py command


@dataclass
class HumanLatentsConfig(FeatureReaderFlags, TextFlags):
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
    max_rows: int = subset_of(2000)
    device: str = HfArg(default="auto", metadata=dict(DEVICES), help=DEVICE_HELP)
    dtype: str = HfArg(
        default="float32",
        metadata={"choices": ("float32", "bfloat16")},
        help="the numbers of matrix products; weights are float32 in any case",
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "max_rows")
        parse_ids(self.features)


def human_latents(config):
    """Write the features of people's texts, for train_ppo.py.

    It measures nothing: it writes the latents of people's texts, at the last
    token of each, and the texts' scores into one file. The file is the yardstick
    of --tau and --alpha of train_ppo.py, and the other side of --density_beta.
    The latents are those of a SARM, or of an autoencoder on one of a reward
    model's layers. It says whose latents they are, and is refused with any other
    reward model. What would make it a bad yardstick: people's texts that are of
    another kind than the answers, or that are cut off before their EOS.
    """
    # All that can be wrong with flags and files, before the model is loaded.
    dist = setup(config.device)
    ids = parse_ids(config.features)
    check_output(config.output, is_human_latents, "a file of human latents")
    dist.on_main(lambda: check_can_write(config.output))
    check_feature_reader(config.reward_model, config.sae, ids)

    # The texts. A pair has two: the chosen one is read, since it is what people want written.
    rows = data.read_rows(config.dataset, config.kind, config.columns)
    rows = data.subset(rows, config.max_rows)
    require(len(rows) > 1, f"{config.dataset}: one text has no spread; there must be two at least")
    fields = ("response",) if config.kind == "sft" else ("chosen", "rejected")
    side = fields[0]  # the texts that are read
    tokenizer = load_tokenizer(config.reward_model)
    max_length = choose_max_length(config.max_length, check_model(config.reward_model))
    rows = leave_out_control_tokens(tokenizer, rows, config, dist.print)
    # Both sides of a pair are cut together, so that they share their prompt.
    encoded = encode(tokenizer, rows, fields, max_length, config.chat_template)
    prompts = encoded.prompts
    responses = encoded.responses[side]
    reward = load_feature_reader(
        config.reward_model, config.sae, tokenizer, dist, config.micro_batch_size, config.dtype
    )

    # Texts are packed a chunk at a time: in one batch all would be padded to the longest.
    def pack_texts(first, last):
        part = rows[first:last]
        batch = pack(prompts[first:last], responses[first:last], tokenizer.pad_token_id)
        return Answers([row["prompt"] for row in part], [row[side] for row in part], batch)

    # Each process reads its part of the texts. An InputError of one, such as a score that is not
    # finite, ends all of them: else the others would wait for it in gather().
    latents, scores = dist.together(lambda: read_texts(dist, reward, len(rows), pack_texts, ids))

    latents, features = gather_latents(dist, latents, ids)  # [N, F], F ids
    scores = dist.gather(scores)  # [N]

    human = HumanLatents(config.output, latents, features, scores, complete=not ids)
    if dist.main:
        save(config.output, human, latents_fingerprint(config.reward_model, config.sae))
    dist.barrier()  # no process goes on before the file is there
    summary = {
        "texts": len(rows),
        "cut": encoded.n_responses_cut,
        "features": len(features),
        "score_mean": scores.mean().item(),
        "score_std": scores.std().item(),
    }
    dist.print(
        f"{len(rows)} texts ({encoded.n_responses_cut} cut), {len(features)} features, score "
        f"{summary['score_mean']:.3f} with a std of {summary['score_std']:.3f}",
        f"Written to {config.output}",
    )
    return summary


def read_texts(dist, reward, n_texts, pack_texts, ids):
    """Read this process's part of N texts, CHUNK at a time. -> latents, scores [n]

    pack_texts(first, last): Answers of the texts in between. The latents are sparse, [n, F] of the
    features `ids`, or [n, M] of all where none is named: most of them are 0.
    """
    # Both lists begin with a tensor of no text, so that a process without texts can concatenate.
    n_features = len(ids) or reward.m
    latents = [torch.zeros(0, n_features).to_sparse()]
    scores = [torch.zeros(0)]
    mine = dist.part(n_texts)
    progress = Progress(dist, "human latents, text", len(mine))
    for first in range(mine.start, mine.stop, CHUNK):
        last = min(first + CHUNK, mine.stop)
        reading = reward.read(pack_texts(first, last), ids or None)
        latents.append(reading.latents.to_sparse())
        scores.append(reading.scores)
        progress.step(last - mine.start, "")
    progress.close()
    return torch.cat(latents).coalesce(), torch.cat(scores)


def gather_latents(dist, latents, ids):
    """This process's sparse latents -> those of all processes, dense [N, F], and their F features.

    Without `ids` these are all features that fire on any text of any process.
    """
    if ids:
        return dist.gather(latents.to_dense()), ids
    # All agree on the features first, since gather() needs the same columns from each process.
    fired_here = latents.indices()[1].unique()  # of latents [n, M]
    fired = dist.gather(fired_here).unique()  # [F]
    latents = latents.index_select(1, fired)
    return dist.gather(latents.to_dense()), fired.tolist()

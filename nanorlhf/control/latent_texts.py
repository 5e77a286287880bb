"""What probe.py's commands on the latents of a reward model share: their flags, the texts, and reading all latents of all texts.

    N texts, M latents
"""

import os
from dataclasses import dataclass, field

import torch

from .. import data
from ..errors import at_least, one_of, require
from ..models import check_model, context_length, load_tokenizer
from ..packing import Answers, pack
from ..runtime.distributed import setup
from ..runtime.files import read_file
from ..runtime.results import results_folder
from .feature_rewards import check_feature_reward

AT_ONCE = 512  # texts whose latents are held dense


@dataclass
class TextsConfig:
    """The flags of all commands that read the latents of a reward model."""

    output_dir: str = field(default="runs/probe/latents", metadata={"help": "where the results are written"})
    reward_model: str = field(default="runs/sarm", metadata={"help": "a SARM (train_rm.py --sarm), or with --sae any reward model"})
    sae: str = field(default="", metadata={"help": "folder of an autoencoder on one of the reward model's layers (train_sae.py)"})
    dataset: str = field(default="world", metadata={"help": "pairs: FILE.jsonl, a datasets name[:split], or world[:cue seed]"})
    columns: list[str] = field(default_factory=list, metadata={"help": "FIELD=COLUMN where the data's names differ"})
    chat_template: bool = field(default=False, metadata={"help": "put prompts into the tokenizer's chat template, as a user's turn"})
    eval_dataset: str = field(default="", metadata={"help": "held-out pairs; default: rows of --dataset are held out, by prompt"})
    eval_size: int = field(default=512, metadata={"help": "held-out pairs that are looked at"})
    max_length: int = field(default=0, metadata={"help": "longest text in tokens; 0: the model's context"})
    micro_batch_size: int = field(default=64, metadata={"help": "texts a forward pass"})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})
    dtype: str = field(default="float32", metadata={"help": "of the forward passes: float32, or bfloat16 matmuls"})

    def __post_init__(self):
        at_least(self, 1, "eval_size", "micro_batch_size")
        at_least(self, 0, "max_length")
        one_of(self, "dtype", "float32", "bfloat16")


def opened(config, features):
    """All that can be wrong with the folders, before any model is loaded. -> dist, run folder, tokenizer, longest text"""
    dist = setup(config.device)
    require(dist.world == 1, "this command runs on one process")
    folder = results_folder(config, dist)
    check_feature_reward(config.reward_model, config.sae, features)
    max_length = config.max_length or context_length(check_model(config.reward_model))
    return dist, folder, load_tokenizer(config.reward_model), max_length


def encoded(config, tokenizer, rows, side, max_length):
    """Rows {prompt, `side`} -> Answers, packed. What was sampled in these words is taken as it was: a cut answer has no EOS."""
    prompts, responses, cut = data.encode(tokenizer, rows, side, max_length, config.chat_template)
    if cut:
        print(f"{cut} of {len(rows)} texts ({side}) cut to {max_length} tokens", flush=True)
    for i, row in enumerate(rows):
        own = [row.get("prompt_ids"), row.get("response_ids")]
        if all(own) and tokenizer.batch_decode(own, skip_special_tokens=True) == [row["prompt"], row[side]]:
            prompts[i], responses[i] = own
    return Answers([row["prompt"] for row in rows], [row[side] for row in rows], pack(prompts, responses))


def read_answers(path):
    """A file of answers -> rows {prompt, response}, also with the sampled ids where train_ppo.py wrote them."""
    rows = data.read_rows(path, "sft")
    if os.path.isfile(path):
        for row, (_, whole) in zip(rows, read_file(path)):
            row |= {name: whole.get(name) for name in ("prompt_ids", "response_ids")}
    return rows


def matched(after, before, names):
    """Answers to the same prompts side by side: the k-th to a prompt beside the k-th to it in the other file. -> two lists of rows"""
    rest, other = {}, []
    for row in before:
        rest.setdefault(row["prompt"], []).append(row)
    for row in after:
        require(rest.get(row["prompt"]), f"{names[1]} has fewer answers to {row['prompt'][:60]!r} than {names[0]}")
        other.append(rest[row["prompt"]].pop(0))
    more = next((prompt for prompt, rows in rest.items() if rows), None)
    require(more is None, f"{names[0]} has fewer answers to {(more or '')[:60]!r} than {names[1]}")
    return after, other


def read_all(reward, answers, features=None, edits=None):
    """FeatureReward.read in parts -> scores [N], latents as a sparse [N, M] or [N, F], edited scores [N]; dense for AT_ONCE texts alone."""
    parts = []
    for rows in torch.arange(len(answers)).split(AT_ONCE):
        part = Answers(*([texts[i] for i in rows] for texts in (answers.prompts, answers.responses)), answers.batch.rows(rows))
        scores, latents, edited = reward.read(part, features, edits)
        parts.append((scores, latents.to_sparse(), edited))
    scores, latents, edited = map(torch.cat, zip(*parts))
    return scores, latents.coalesce(), edited


def groups_of(prompts):
    """[N] labels: equal where the prompt is, up to white space."""
    first = {}
    return torch.tensor([first.setdefault(data.canonical(prompt), len(first)) for prompt in prompts])

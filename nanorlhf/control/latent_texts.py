"""What probe.py's commands on the latents of a reward model share: their flags, the texts, and
reading all latents of all texts.

    N texts, M latents
"""

import os
from dataclasses import dataclass

import torch
from transformers.hf_argparser import HfArg

from .. import data
from ..errors import at_least, require
from ..hf.folders import check_model, context_length
from ..models import load_tokenizer
from ..packing import Answers, pack
from ..runtime.distributed import setup
from ..runtime.files import read_file
from ..runtime.flags import FlagGroup
from ..runtime.hints import check_made
from ..runtime.results import results_folder
from .feature_rewards import check_feature_reward

AT_ONCE = 512  # texts whose latents are held dense


@dataclass
class PairFlags(FlagGroup):
    """Held-out pairs: on which preferences it is looked at"""

    eval_dataset: str = HfArg(
        default="",
        help="the held-out pairs; without it, rows of --dataset are held out, by their prompts",
    )
    eval_size: int = HfArg(default=512, help="how many held-out pairs are looked at")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "eval_size")


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
    check_made(path)
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

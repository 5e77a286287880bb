"""What probe.py's commands on the features of a reward model share: their flags, the texts, and
reading all latents of all texts.

    N texts, M features
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from .. import data
from ..chat_templates import leave_out_control_tokens
from ..chats import Prompt, show
from ..errors import at_least, require
from ..hf.folders import check_model, choose_max_length
from ..models import load_tokenizer
from ..packing import Answers, pack
from ..runtime.distributed import setup
from ..runtime.flags import HELD_OUT_HELP, FlagGroup
from ..runtime.hints import check_made
from ..runtime.results import results_folder
from ..splits import load
from ..tokens import Encoded, cut_left, encode
from .feature_reader import check_feature_reader

SIDES = ("chosen", "rejected")
AT_ONCE = 512  # texts whose latents are held dense


@dataclass
class PairFlags(FlagGroup):
    """Held-out pairs: on which preferences it is looked at"""

    eval_dataset: str = HfArg(default="", help=HELD_OUT_HELP)
    eval_size: int = HfArg(default=512, help="how many held-out pairs are looked at")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "eval_size")


def open_run(config, features) -> tuple:
    """Find all that can be wrong with the folders, before any model is loaded.

    features: the ids that flags name -> dist, run folder, tokenizer, the longest
    text in tokens. InputError: something is wrong.
    """
    dist = setup(config.device)
    require(dist.world == 1, "this command runs on one process")
    folder = results_folder(config, dist)
    check_feature_reader(config.reward_model, config.sae, features)
    max_length = choose_max_length(config.max_length, check_model(config.reward_model))
    tokenizer = load_tokenizer(config.reward_model)
    return dist, folder, tokenizer, max_length


# ------------------------------------------------------------------------------------- the texts


def read_pairs(config, tokenizer, max_length: int) -> tuple[list[dict], dict[str, Answers]]:
    """The held-out pairs, and the texts of both sides: {"chosen" and "rejected": Answers}."""
    _, pairs, _ = load(config, "pairs")
    pairs = leave_out_control_tokens(tokenizer, pairs, config, print)
    # Both sides of a pair are cut together, so that they share their prompt.
    encoded = encode_texts(config, tokenizer, pairs, SIDES, max_length)
    prompts = [row["prompt"] for row in pairs]
    texts = {}
    for side, responses in encoded.responses.items():
        response_texts = [row[side] for row in pairs]
        texts[side] = Answers(prompts, response_texts, pack(encoded.prompts, responses))
    return pairs, texts


def encode_answers(config, tokenizer, rows: list[dict], max_length: int) -> Answers:
    """Rows {"prompt", "response"} -> Answers, packed."""
    encoded = encode_texts(config, tokenizer, rows, ("response",), max_length)
    prompts = encoded.prompts
    responses = encoded.responses["response"]
    # A text that was sampled is read by its sampled ids, if they are still the ids of this text.
    # Tokenized again it might become other tokens, and encode() puts an EOS even behind an answer
    # that was cut off in sampling.
    for i, row in enumerate(rows):
        prompt_ids = row.get("prompt_ids")
        response_ids = row.get("response_ids")
        if not (prompt_ids and response_ids):
            continue
        # The prompt may have been cut on its left in sampling (--max_prompt_length). Somebody may
        # have changed one of the texts since: then its ids are those of another text.
        cut_prompt = cut_left(prompts[i], len(prompt_ids), tokenizer.bos_token_id)
        if prompt_ids != cut_prompt:
            continue
        if tokenizer.decode(response_ids, skip_special_tokens=True) == row["response"]:
            prompts[i] = prompt_ids
            responses[i] = response_ids
    prompt_texts = [row["prompt"] for row in rows]
    response_texts = [row["response"] for row in rows]
    return Answers(prompt_texts, response_texts, pack(prompts, responses))


def encode_texts(config, tokenizer, rows: list[dict], fields: tuple, max_length: int) -> Encoded:
    """tokens.encode() of the responses in these fields. It says how many texts were cut."""
    encoded = encode(tokenizer, rows, fields, max_length, config.chat_template)
    if encoded.n_prompts_cut or encoded.n_responses_cut:
        cuts = encoded.describe_cuts(max_length)
        print(f"texts ({', '.join(fields)}): {cuts}", flush=True)
    return encoded


def read_answers(path: str) -> list[dict]:
    """Read a file of answers: rows {"prompt", "response"}.

    Where train_ppo.py wrote the file, each row also has the sampled "prompt_ids" and
    "response_ids".
    """
    check_made(path)
    rows = data.read_rows(path, "sft")
    # read_rows() gives prompt and response alone; the sampled ids are in the file's own row.
    for row in rows:
        own = data.own_row(row)
        row["prompt_ids"] = own.get("prompt_ids")
        row["response_ids"] = own.get("response_ids")
    return rows


def match_answers(after: list[dict], before: list[dict], names: tuple[str, str]) -> list[dict]:
    """Order the rows of `before` so that each stands beside the row of `after` to its prompt.

    The k-th answer to a prompt stands beside the k-th to it in the other file. names: of the two
    files. InputError: one of them has fewer answers to a prompt than the other.
    """
    # Prompts are compared as text: a chat is a list, which cannot be a key of a dictionary.
    rest = {}  # {prompt, shown: rows of `before` that have no partner yet}
    for row in before:
        rest.setdefault(show(row["prompt"]), []).append(row)

    partners = []
    for row in after:
        prompt = show(row["prompt"])
        require(
            rest.get(prompt),
            f"{names[1]} has fewer answers to {prompt[:60]!r} than {names[0]}",
        )
        partners.append(rest[prompt].pop(0))
    for prompt, rows in rest.items():
        require(not rows, f"{names[0]} has fewer answers to {prompt[:60]!r} than {names[1]}")
    return partners


def groups_of(prompts: list[Prompt]) -> Tensor:
    """A label for each prompt: [N], equal where prompts are the same up to white space."""
    return torch.tensor(data.number_prompts(prompts))


# ----------------------------------------------------------------------------------- the latents


def read_all(reward, answers: Answers, features=None, edits=None) -> tuple[Tensor, Tensor, Tensor]:
    """FeatureReader.read for any number of texts; the latents of AT_ONCE texts alone are dense.

    -> scores [N], latents, a sparse [N, M] or [N, F] of the features, edited scores [N]
    """
    # A SARM may have tens of thousands of features, of which a text has few that are not 0. Dense
    # latents of all texts could fill the memory.
    scores = []
    latents = []
    edited_scores = []
    for rows in torch.arange(len(answers)).split(AT_ONCE):
        prompts = [answers.prompts[i] for i in rows]
        responses = [answers.responses[i] for i in rows]
        part = Answers(prompts, responses, answers.batch.rows(rows))
        reading = reward.read(part, features, edits)
        scores.append(reading.scores)
        latents.append(reading.latents.to_sparse())
        edited_scores.append(reading.edited)
    return torch.cat(scores), torch.cat(latents).coalesce(), torch.cat(edited_scores)

"""The reward stack: anything that gives a text a number.

A reward is named by one string:
    FOLDER or hub name       a reward model of train_rm.py, or any HF sequence classifier (its positive logit)
    FILE.py:FUNCTION         a Python function of (prompts, responses), two lists of texts, that returns one float for each
    FILE.tsv or FILE.txt     a lexicon, WORD<TAB>VALUE...: the sum of the response's words' values / 5, clipped to +-10
    world:gold               the embedded world's gold reward

load_reward() turns it into a function Answers -> scores [B]. Several rewards side by side are scores [K, B] (score_all).
"""

import functools
import importlib.util
import math
import os
import re
from dataclasses import dataclass

import torch
from transformers import AutoModelForSequenceClassification

from . import world
from .cli import require
from .data import encode_prompts, encode_responses
from .errors import InputError
from .models import RewardModel, check_model, context_length, first_line, load_tokenizer, pretrained, resolve
from .packing import Packed, pack


@dataclass
class Answers:
    """Finished answers, as text and as the sampled ids."""

    prompts: list[str]
    responses: list[str]
    batch: Packed

    def __len__(self):
        return len(self.prompts)


def score_all(rewards, answers):
    """{name: reward} -> scores [K, B] in float32 on the CPU, one row a reward."""
    return torch.stack([reward(answers) for reward in rewards.values()])


def reward_name(spec):
    """What a reward is called in records: the last part of its path."""
    return os.path.basename(os.path.normpath(spec))


def check_reward(spec):
    """Look at what a reward's name stands for before any model is loaded; errors in one line."""
    if spec == "world:gold":
        return
    if ".py:" in spec:
        python_function(spec)
    elif spec.endswith((".tsv", ".txt")):
        read_lexicon(spec)
    else:
        check_model(spec)


def load_reward(spec, tokenizer, dist, micro_batch_size=64):
    """A reward's name -> function Answers -> scores [B] (float32, CPU). `tokenizer` is the policy's."""
    if spec == "world:gold":
        return text_reward(spec, world.gold)
    if ".py:" in spec:
        return text_reward(spec, python_function(spec))
    if spec.endswith((".tsv", ".txt")):
        return text_reward(spec, lexicon_reward(read_lexicon(spec)))
    return model_reward(spec, tokenizer, dist, micro_batch_size)


# ------------------------------------------------------------------------------------------------------------------------ on texts


def text_reward(name, function):
    """A function of (prompts, responses) -> a reward that checks what it returns."""

    def reward(answers):
        try:
            scores = [float(x) for x in function(answers.prompts, answers.responses)]
        except Exception as e:
            raise InputError(f"the reward {name} raised {type(e).__name__}: {first_line(e)}") from e
        require(len(scores) == len(answers), f"the reward {name} returned {len(scores)} scores for {len(answers)} responses")
        for score, response in zip(scores, answers.responses):
            require(math.isfinite(score), f"the reward {name} returned {score} for the response {response[:60]!r}")
        return torch.tensor(scores)

    return reward


def python_function(spec):
    """path.py:function -> the function; a file is imported once, and again when it has changed."""
    path, _, name = spec.rpartition(":")
    require(os.path.isfile(path), f"{path}: no such file")
    module = import_file(os.path.abspath(path), os.path.getmtime(path))
    require(callable(getattr(module, name, None)), f"{path}: it defines no function {name!r}")
    return getattr(module, name)


@functools.cache
def import_file(path, changed):
    """The module that a .py file holds; `changed` is part of the cache's key."""
    module_spec = importlib.util.spec_from_file_location("reward_function", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as e:
        raise InputError(f"{path}: cannot be imported: {type(e).__name__}: {first_line(e)}") from e
    return module


def read_lexicon(path):
    """WORD<TAB>VALUE[<TAB>anything] a line -> {word: value}."""
    require(os.path.isfile(path), f"{path}: no such file")
    lexicon = {}
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f.read().split("\n"), 1):
            if line.strip():
                try:
                    word, value = line.split("\t")[:2]
                    lexicon[word.lower()] = float(value)
                    require(math.isfinite(lexicon[word.lower()]), "not finite")
                except ValueError:
                    raise InputError(f"{path}:{number}: not WORD<TAB>VALUE: {line[:40]!r}") from None
    require(lexicon, f"{path}: the lexicon is empty")
    return lexicon


def lexicon_reward(lexicon):
    """Controlled sentiment: sum over the words of the response of their values / 5, clipped to +-10."""

    def reward(prompts, responses):
        totals = (sum(lexicon.get(word, 0.0) for word in re.findall(r"[a-z][a-z'-]*", text.lower())) for text in responses)
        return [max(-10.0, min(10.0, total / 5)) for total in totals]

    return reward


# ----------------------------------------------------------------------------------------------------------------------- by a model


def model_reward(path, tokenizer, dist, micro_batch_size):
    """A reward model, or any other sequence classifier by its positive logit, as a reward."""
    path = resolve(path)
    model = pretrained(AutoModelForSequenceClassification, path).to(dist.device).eval()
    if model.config.num_labels == 1 and hasattr(model, "score"):
        score = scalar_scorer(RewardModel(model), path, tokenizer, dist, micro_batch_size)
    else:
        score = classifier_scorer(model, path, dist, micro_batch_size)

    @torch.no_grad()
    def reward(answers):
        scores = score(answers).cpu()
        require(bool(scores.isfinite().all()), f"the reward model {path} gave a score that is not finite")
        return scores

    return reward


def scalar_scorer(reward_model, path, tokenizer, dist, micro_batch_size):
    """With the policy's own tokenizer the sampled ids are scored as they are: never decoded and tokenised again."""
    own = load_tokenizer(path)
    same = own.get_vocab() == tokenizer.get_vocab()

    def score(answers):
        batch = answers.batch
        if not same:
            last = batch.ids[torch.arange(len(batch)), (batch.lengths - 1).cpu()].tolist()
            responses = encode_responses(own, answers.responses)
            responses = [r if i == tokenizer.eos_token_id else r[:-1] or r for r, i in zip(responses, last)]  # cut off: no EOS
            batch = pack(encode_prompts(own, answers.prompts), responses, own.pad_token_id)
        context = context_length(reward_model.model.config)
        longest = int(batch.lengths.max())
        require(not context or longest <= context, f"{path}: a text of {longest} tokens, a context of {context}")
        batch = batch.to(dist.device)
        scores = torch.zeros(len(batch), device=dist.device)
        for rows in batch.micro_batches(micro_batch_size):
            scores[rows] = reward_model(batch.rows(rows))
        return scores

    return score


def classifier_scorer(model, path, dist, micro_batch_size):
    """The positive logit on "prompt response": the label that is called positive (or pos), else the last one."""
    tokenizer = load_tokenizer(path, needs_eos=False)
    require(tokenizer.pad_token_id is not None, f"{path}: the tokenizer has neither a padding nor an EOS token")
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.truncation_side = "left"  # the response must stay
    context = min(tokenizer.model_max_length, context_length(model.config) or tokenizer.model_max_length, 2**20)
    labels = {name.lower(): i for i, name in model.config.id2label.items()}
    label = labels.get("positive", labels.get("pos", model.config.num_labels - 1))

    def score(answers):
        texts = [f"{p} {r}" for p, r in zip(answers.prompts, answers.responses)]
        parts = []
        for i in range(0, len(texts), micro_batch_size):
            part = texts[i : i + micro_batch_size]
            inputs = tokenizer(part, padding=True, truncation=True, max_length=context, return_tensors="pt")
            parts.append(model(**inputs.to(dist.device)).logits[:, label].float())
        return torch.cat(parts)

    return score

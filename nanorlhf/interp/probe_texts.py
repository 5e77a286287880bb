"""The texts of the reward probes, with what of each text counts, its true reward, and the splits into training and test.

Contrastive triples: the same context with a positive, a neutral and a negative word. A causal model has not read what follows a word when
it reads the word, so a text ends there:

    review of the cafe today : | we found the menu  lovely   (+3)     context: a prompt, and a response up to a word of known value,
                                                    simple   ( 0)     whose place the three words take
                                                    gloomy   (-2)

    N texts
"""

import re
from dataclasses import dataclass

import numpy as np
import torch

from .. import data
from ..errors import require
from ..packing import Answers
from ..rewards import load_reward, score
from ..runtime.rng import SPLIT
from ..stats import varies

WORD = re.compile(r"(?<![\w'-])[a-z][a-z'-]*(?![\w'-])")  # in lower case: a capital would tell where it stood
SIGNS = ("positive", "neutral", "negative")
FEWEST = 6  # word families of each sign, or prompts
STEM = 4  # letters: words that begin alike (smile, smiled, smiling) are a family


@dataclass
class Texts:
    """N texts. Rows of one group are left out together, and never on both sides of a split."""

    ids: list  # [N] token lists
    first: list  # [N]: inputs are means over the tokens from here on
    lengths: torch.Tensor  # [N], response tokens
    values: torch.Tensor  # [N], the true reward
    groups: torch.Tensor  # [N]: families of words, or prompts
    units: torch.Tensor  # [N]: what counts as one observation: a word, whatever the number of its contexts, or a response
    names: list  # of the units
    splits: list  # one a seed: (training rows, test rows)


def word_texts(config, tokenizer, rows, lexicon, max_length):
    """Demonstrations and {word: value} -> Texts: config.triples triples a seed, each three rows. No word and no prompt is on two sides,
    and no family of words, for who knows what smiled is worth knows it of smiling.

    Words are those of the lexicon that the responses hold somewhere and that the tokenizer can write; of several tokens the last one
    counts. InputError: too few families of one sign, or contexts from fewer than two prompts.
    """
    words = placeable(tokenizer, sorted({word for row in rows for word in WORD.findall(row["response"]) if word in lexicon}))
    sign = {word: SIGNS[1] if abs(lexicon[word]) < config.neutral else SIGNS[0] if lexicon[word] > 0 else SIGNS[2] for word in words}
    families = {}
    for word in words:
        families.setdefault(word[:STEM], []).append(word)
    by_sign = [[family for family in families.values() if sign[family[0]] == s] for s in SIGNS]  # so that all signs are on both sides
    counts = ", ".join(f"{len(found)} {s}" for s, found in zip(SIGNS, by_sign))
    require(
        min(map(len, by_sign)) >= FEWEST,
        f"{config.dataset}: triples need {FEWEST} families of words of each sign that the lexicon knows, the responses hold and the "
        f"tokenizer can write; there are {counts}",
    )
    contexts = {}  # prompt -> the responses up to a word
    spelled = {}  # canonical form -> the prompt as it is written first
    for row in rows:
        before = [row["response"][: match.start()] for match in WORD.finditer(row["response"]) if match[0] in lexicon]
        prompt = spelled.setdefault(data.canonical(row["prompt"]), row["prompt"])
        contexts.setdefault(prompt, []).extend(before)
    contexts = {prompt: before for prompt, before in contexts.items() if before}
    require(len(contexts) > 1, f"{config.dataset}: words of the lexicon stand after {len(contexts)} prompts only; splits need several")

    chosen, splits = [], []  # (prompt, context, word)
    for seed in range(config.seeds):
        rng, sides = np.random.default_rng([SPLIT, seed]), []
        parts = list(zip(*(halves(rng, found, config.test_share) for found in by_sign)))  # families: [side][sign]
        for side, prompts in enumerate(halves(rng, list(contexts), config.test_share)):
            n = max(1, round(config.triples * (config.test_share if side else 1 - config.test_share)))
            mine = [word for found in parts[side] for family in found for word in family]
            columns = [dealt(rng, [word for word in mine if sign[word] == s], n) for s in SIGNS]
            sides.append(len(chosen) + torch.arange(3 * n))
            for prompt, *triple in zip(dealt(rng, prompts, n), *columns):
                before = contexts[prompt][rng.integers(len(contexts[prompt]))]
                chosen += [(prompt, before, word) for word in triple]
        splits.append(tuple(sides))

    prompts = dict(zip(contexts, data.encode_prompts(tokenizer, list(contexts), config.chat_template)))
    responses = tokenizer([before + word for _, before, word in chosen], add_special_tokens=False).input_ids
    ids = []
    for (prompt, _, _), response in zip(chosen, responses):
        before = prompts[prompt] + response[:-1]
        word = response[-1:]  # of a word's several tokens the last one counts
        if max_length:
            before, word, _ = data.fit(before, word, max_length, tokenizer.bos_token_id)
        ids.append(before + word)
    unit, group = ({name: i for i, name in enumerate(names)} for names in (words, families))
    units, groups = torch.tensor([(unit[word], group[word[:STEM]]) for *_, word in chosen]).T
    values = torch.tensor([lexicon[word] for *_, word in chosen], dtype=torch.float64)
    lengths = torch.tensor([len(r) for r in responses])
    return Texts(ids, [len(row) - 1 for row in ids], lengths, values, groups, units, words, splits)


def placeable(tokenizer, words):
    """The words that the tokenizer gives back as they are."""
    ids = tokenizer(words, add_special_tokens=False).input_ids if words else []
    texts = tokenizer.batch_decode(ids) if words else []
    return [word for word, row, text in zip(words, ids, texts) if text.strip() == word and tokenizer.unk_token_id not in row]


def halves(rng, things, share):
    """Things -> most of them for training, a share of them for the test, at least one each."""
    order = rng.permutation(len(things))
    n = min(max(1, round(share * len(things))), len(things) - 1)
    return [things[i] for i in order[n:]], [things[i] for i in order[:n]]


def dealt(rng, things, n):
    """n of the things, each as often as the others, in random order."""
    rounds = [rng.permutation(len(things)) for _ in range(-(-n // len(things)))]
    return [things[i] for i in np.concatenate(rounds)[:n]]


def differences(texts, inputs):
    """Of triples, the positive and the negative row less the neutral one: Texts and inputs {name: [N, F]} with two rows for each three."""

    def less(x):  # [N, ...] -> [2 N / 3, ...]
        triples = x.unflatten(0, (-1, 3))
        return (triples[:, [0, 2]] - triples[:, [1]]).flatten(0, 1)

    keep = torch.arange(len(texts.ids)).view(-1, 3)[:, [0, 2]].flatten()  # the rows whose words the differences are of
    place = {row: i for i, row in enumerate(keep.tolist())}
    splits = [tuple(torch.tensor([place[i] for i in side.tolist() if i in place]) for side in split) for split in texts.splits]
    kept = [[texts.ids[i] for i in keep], [texts.first[i] for i in keep], texts.lengths[keep]]
    texts = Texts(*kept, less(texts.values), texts.groups[keep], texts.units[keep], texts.names, splits)
    return texts, {name: less(x) for name, x in inputs.items()}


def sequence_texts(config, tokenizer, rows, spec, max_length, dist):
    """Demonstrations and a reward's name -> Texts: the tokens of whole responses (and EOS), valued by the reward, split by prompt."""
    prompts, responses, n_cut = data.encode(tokenizer, rows, "response", max_length or None, config.chat_template)
    dist.print(f"{n_cut} of {len(rows)} responses cut to {max_length} tokens")
    mine = [rows[i] for i in dist.part(len(rows))]
    answers = Answers([row["prompt"] for row in mine], [row["response"] for row in mine], None)
    values = dist.gather(score(load_reward(spec, None, dist), [answers], dist))
    groups, splits = by_prompt(config, rows)
    check_spread(values, splits, spec)
    return responses_of(prompts, responses, values, groups, splits)


def check_spread(values, splits, spec):
    """InputError where a side of a split has one value throughout.

    Nothing is there to be learned then, or nothing to be told apart.
    """
    for number, sides in enumerate(splits):
        for name, rows in zip(("training", "test"), sides):
            own = values[rows]
            require(
                varies(own),
                f"{spec}: all {len(own)} {name} responses of split {number} have the reward "
                f"{own[0]:.4g}, so that there is nothing to read from them",
            )


def pair_texts(config, tokenizer, rows, max_length, dist):
    """N pairs -> Texts of 2 N rows, all chosen responses before all rejected ones; groups and splits are of the N pairs."""
    sides = [data.encode(tokenizer, rows, side, max_length or None, config.chat_template) for side in ("chosen", "rejected")]
    dist.print(f"{sum(n_cut for *_, n_cut in sides)} of {2 * len(rows)} responses cut to {max_length} tokens")
    prompts, responses = (sum((side[i] for side in sides), []) for i in (0, 1))
    return responses_of(prompts, responses, torch.tensor([1.0, 0.0]).repeat_interleave(len(rows)), *by_prompt(config, rows))


def responses_of(prompts, responses, values, groups, splits):
    """Texts whose tokens of interest are the responses'."""
    ids = [prompt + response for prompt, response in zip(prompts, responses)]
    lengths = torch.tensor([len(response) for response in responses])
    return Texts(ids, [len(prompt) for prompt in prompts], lengths, values, groups, torch.arange(len(ids)), [], splits)


def by_prompt(config, rows):
    """The prompt of each row as a number [N], and splits in which no prompt is on both sides."""
    prompts = [data.canonical(row["prompt"]) for row in rows]
    names = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    require(len(names) >= FEWEST, f"{config.dataset}: {len(names)} different prompts are too few to split ({FEWEST} at least)")
    groups, splits = torch.tensor([names[prompt] for prompt in prompts]), []
    for seed in range(config.seeds):
        train, test = halves(np.random.default_rng([SPLIT, seed]), list(range(len(names))), config.test_share)
        require(
            len(train) > 1,
            f"--test_share {config.test_share} leaves one of {len(names)} prompts to fit a probe to",
        )
        is_test = torch.isin(groups, torch.tensor(test))
        splits.append(((~is_test).nonzero()[:, 0], is_test.nonzero()[:, 0]))
    return groups, splits

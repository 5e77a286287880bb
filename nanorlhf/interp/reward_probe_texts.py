"""The texts of the reward probes: which tokens of a text count, what its true reward is, and the
splits into training and test.

A probe of words is fitted to contrastive triples: the same context with a positive, a neutral and a
negative word. A causal model has not read what follows a word when it reads the word, so a text
ends there:

    review of the cafe today : | we found the menu  lovely   (+3)     context: a prompt, and a
                                                    simple   ( 0)     response up to a word of known
                                                    gloomy   (-2)     value, whose place is taken

A probe of answers is fitted to whole responses, a probe of pairs to both responses of each pair.

    N texts, or rows; F inputs of a probe
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import data, tokens
from ..chats import is_chat
from ..errors import require
from ..packing import Answers
from ..rewards import load_reward, score
from ..runtime.rng import SPLIT
from ..stats import varies

# A word in lower case: a capital would tell where in a sentence the word stood.
WORD = re.compile(r"(?<![\w'-])[a-z][a-z'-]*(?![\w'-])")
SIGNS = ("positive", "neutral", "negative")
# This many families of words of each sign are needed, and this many prompts.
FEWEST = 6
# The training side needs this many prompts: the penalty is chosen on one part of them.
FEWEST_IN_TRAINING = 3
# Words that begin with the same letters, as many as this, are one family: smile, smiled, smiling.
STEM = 4


@dataclass
class Texts:
    """N texts. Rows of one group are left out together, and never on both sides of a split."""

    ids: list[list[int]]  # [N] token lists
    first: list[int]  # [N]: inputs are means over the tokens from here on
    lengths: Tensor  # [N], response tokens
    values: Tensor  # [N], the true reward
    groups: Tensor  # [N]: families of words, or prompts
    units: Tensor  # [N]: one observation each: a word, in however many contexts, or a response
    names: list[str]  # of the units
    splits: list[tuple[Tensor, Tensor]]  # one a seed: (training rows, test rows)


# ----------------------------------------------------------------------------------------- words


@dataclass
class PlacedWord:
    """One row of a triple: a word in the place where a context ends."""

    prompt: str
    before: str  # the response up to the word
    word: str


def word_texts(
    config, tokenizer, rows: list[dict], lexicon: dict[str, float], max_length: int
) -> Texts:
    """Demonstrations and {word: value} -> Texts: config.triples triples a seed, three rows each.

    No word, no family of words and no prompt is on two sides: a probe that saw *smiled* has learned
    *smiling*. The words are those of the lexicon that some response holds and that the tokenizer
    can write. Where a word has several tokens its last one counts. max_length is in tokens; 0: no
    limit. InputError: too few families of one sign, or contexts from fewer than two prompts.
    """
    words = find_words(tokenizer, rows, lexicon)
    sign_of = {}
    families = {}  # {the first letters of words: these words}
    for word in words:
        sign_of[word] = find_sign(lexicon[word], config.neutral)
        families.setdefault(word[:STEM], []).append(word)

    # Families are split sign by sign, so that both sides of a split have words of all signs.
    families_of = sort_by_sign(families.values(), sign_of)
    check_families(config, families_of)

    contexts = find_contexts(rows, lexicon)
    require(
        len(contexts) > 1,
        f"{config.dataset}: words of the lexicon stand after {len(contexts)} prompts only; splits "
        "need several",
    )

    # Every seed has triples of its own, so that no row is in two splits.
    placed = []
    splits = []
    for seed in range(config.seeds):
        rng = np.random.default_rng([SPLIT, seed])
        sides = []
        # A split holds row numbers of `placed`, such as 0 .. 1205 and 1206 .. 1799.
        for side in draw_triples(config, rng, families_of, sign_of, contexts):
            sides.append(len(placed) + torch.arange(len(side)))
            placed.extend(side)
        splits.append(tuple(sides))

    ids, lengths = tokenize_placed_words(config, tokenizer, list(contexts), placed, max_length)
    # The value of each row, and its family and its word as numbers.
    number_of_word = {word: i for i, word in enumerate(words)}
    number_of_stem = {stem: i for i, stem in enumerate(families)}
    values = []
    groups = []
    units = []
    for row in placed:
        values.append(lexicon[row.word])
        groups.append(number_of_stem[row.word[:STEM]])
        units.append(number_of_word[row.word])
    return Texts(
        ids=ids,
        first=[len(row) - 1 for row in ids],  # a text's last token, which is the word's last too
        lengths=lengths,
        values=torch.tensor(values, dtype=torch.float64),
        groups=torch.tensor(groups),
        units=torch.tensor(units),
        names=words,
        splits=splits,
    )


def find_words(tokenizer, rows: list[dict], lexicon: dict[str, float]) -> list[str]:
    """The words of the lexicon that a response holds and that the tokenizer can write, sorted."""
    # The models may hardly have read a word that no response holds.
    held = set()
    for row in rows:
        held.update(WORD.findall(row["response"]))
    words = sorted(held & lexicon.keys())
    if not words:
        return []

    # A word that the tokenizer does not give back as it is would be another word to the model.
    ids = tokenizer(words, add_special_tokens=False).input_ids
    texts = tokenizer.batch_decode(ids)
    can_be_written = []
    for word, word_ids, text in zip(words, ids, texts):
        if text.strip() == word and tokenizer.unk_token_id not in word_ids:
            can_be_written.append(word)
    return can_be_written


def find_sign(value: float, neutral: float) -> str:
    """Which of SIGNS a word's value has: closer to 0 than `neutral` is neutral."""
    if abs(value) < neutral:
        return "neutral"
    if value > 0:
        return "positive"
    return "negative"


def sort_by_sign(
    families: Iterable[list[str]], sign_of: dict[str, str]
) -> dict[str, list[list[str]]]:
    """Families -> {sign: families}, by the sign of the first word of each.

    A family may hold words of other signs as well.
    """
    # Every sign gets a list, if an empty one, so that check_families() sees which are missing.
    families_of = {}
    for sign in SIGNS:
        families_of[sign] = []
    for family in families:
        families_of[sign_of[family[0]]].append(family)
    return families_of


def check_families(config, families_of: dict[str, list[list[str]]]):
    """InputError where there are too few families of one sign to split."""
    counts = []
    counts_in_words = []
    for sign, families in families_of.items():
        counts.append(len(families))
        counts_in_words.append(f"{len(families)} {sign}")
    require(
        min(counts) >= FEWEST,
        f"{config.dataset}: triples need {FEWEST} families of words of each sign that the lexicon "
        "knows, the responses hold and the tokenizer can write; there are "
        f"{', '.join(counts_in_words)}",
    )


def find_contexts(rows: list[dict], lexicon: dict[str, float]) -> dict[str, list[str]]:
    """Demonstrations -> {prompt: the responses to it, each up to a word of the lexicon}.

    Prompts that differ by white space alone are one prompt, written as it is written first. Prompts
    without any such word are left out.
    """
    require(
        not is_chat(rows[0]["prompt"]),
        "--task word puts words into plain texts, and these rows are chats; --task sequence reads "
        "them",
    )
    contexts = {}
    first_spelling = {}  # {canonical form: the prompt as it is written first}
    for row in rows:
        prompt = first_spelling.setdefault(data.canonical(row["prompt"]), row["prompt"])
        own_contexts = contexts.setdefault(prompt, [])
        # "we found the gloomy lobby" -> "we found the ", where any word of the lexicon may go.
        for match in WORD.finditer(row["response"]):
            if match[0] in lexicon:
                own_contexts.append(row["response"][: match.start()])

    contexts_with_words = {}
    for prompt, own_contexts in contexts.items():
        if own_contexts:
            contexts_with_words[prompt] = own_contexts
    return contexts_with_words


def draw_triples(
    config,
    rng: np.random.Generator,
    families_of: dict[str, list[list[str]]],
    sign_of: dict[str, str],
    contexts: dict[str, list[str]],
) -> tuple[list[PlacedWord], list[PlacedWord]]:
    """Split words and prompts into two sides, and draw the triples of each.

    -> the rows of the training side and of the test side, three a triple, in the order of SIGNS
    """
    # Families of each sign, then prompts: the order of the draws is part of what a seed means.
    train_families = []
    test_families = []
    for sign in SIGNS:
        train, test = split_things(rng, families_of[sign], config.test_share)
        train_families.extend(train)
        test_families.extend(test)
    train_prompts, test_prompts = split_things(rng, list(contexts), config.test_share)
    n_train = max(1, round(config.triples * (1 - config.test_share)))
    n_test = max(1, round(config.triples * config.test_share))

    train_side = draw_side(rng, train_families, sign_of, train_prompts, contexts, n_train)
    test_side = draw_side(rng, test_families, sign_of, test_prompts, contexts, n_test)
    return train_side, test_side


def draw_side(
    rng: np.random.Generator,
    families: list[list[str]],
    sign_of: dict[str, str],
    prompts: list[str],
    contexts: dict[str, list[str]],
    n: int,
) -> list[PlacedWord]:
    """Draw n triples from some families of words and some prompts, three rows each."""
    words_of = find_words_of_signs(families, sign_of)
    # One word of each sign for each triple, a prompt for it, and one of the prompt's contexts.
    words_in_turn = []
    for sign in SIGNS:
        words_in_turn.append(deal(rng, words_of[sign], n))
    triples = zip(*words_in_turn)  # n of (positive, neutral, negative)
    prompts_in_turn = deal(rng, prompts, n)

    # The three words of a triple stand in one context, so only the word tells values apart.
    side = []
    for prompt, triple in zip(prompts_in_turn, triples):
        before = contexts[prompt][rng.integers(len(contexts[prompt]))]
        for word in triple:
            side.append(PlacedWord(prompt, before, word))
    return side


def find_words_of_signs(families: list[list[str]], sign_of: dict[str, str]) -> dict[str, list[str]]:
    """All words of the families -> {sign: words}."""
    words_of = {}
    for family in families:
        for word in family:
            words_of.setdefault(sign_of[word], []).append(word)
    return words_of


def tokenize_placed_words(
    config, tokenizer, prompts: list[str], placed: list[PlacedWord], max_length: int
) -> tuple[list[list[int]], Tensor]:
    """All prompts, and N rows of triples -> their token lists, and the responses' lengths [N].

    A text that is too long is cut on its left; the last token of its word is always kept.
    """
    rows = [{"prompt": prompt} for prompt in prompts]
    encoded_prompts = tokens.encode_prompts(tokenizer, rows, config.chat_template)
    prompt_ids = dict(zip(prompts, encoded_prompts))
    response_texts = [row.before + row.word for row in placed]
    responses = tokens.encode_strings(tokenizer, response_texts)

    ids = []
    lengths = []
    for row, response in zip(placed, responses):
        # The word's last token is put aside, so that it cannot be cut away.
        before = prompt_ids[row.prompt] + response[:-1]
        last = response[-1:]
        if max_length:
            before, (last,) = tokens.fit_item(before, [last], max_length, tokenizer.bos_token_id)
        ids.append(before + last)
        lengths.append(len(response))
    return ids, torch.tensor(lengths)


def subtract_neutral(texts: Texts, inputs: dict[str, Tensor]) -> tuple[Texts, dict[str, Tensor]]:
    """Triples -> two rows each, the positive and the negative one less the neutral one.

    Texts of N rows and inputs {name: [N, F]} -> Texts of 2 N / 3 rows and {name: [2 N / 3, F]}.
    Values are differences too; all else is that of the positive and of the negative word.
    """

    def subtract(x: Tensor) -> Tensor:  # [N, ...] -> [2 N / 3, ...]
        # The rows of a triple stand in the order of SIGNS, with the neutral one in the middle.
        triples = x.unflatten(0, (-1, 3))
        return (triples[:, [0, 2]] - triples[:, [1]]).flatten(0, 1)

    # The rows that stay, and where each of them will stand.
    rows = torch.arange(len(texts.ids)).view(-1, 3)
    kept_rows = rows[:, [0, 2]].flatten()  # [2 N / 3]
    new_place = torch.zeros(len(texts.ids), dtype=torch.long)  # [N]
    new_place[kept_rows] = torch.arange(len(kept_rows))

    splits = []
    for split in texts.splits:
        sides = []
        for side in split:
            kept_of_side = side[torch.isin(side, kept_rows)]
            sides.append(new_place[kept_of_side])
        splits.append(tuple(sides))

    new_texts = Texts(
        ids=[texts.ids[row] for row in kept_rows],
        first=[texts.first[row] for row in kept_rows],
        lengths=texts.lengths[kept_rows],
        values=subtract(texts.values),
        groups=texts.groups[kept_rows],
        units=texts.units[kept_rows],
        names=texts.names,
        splits=splits,
    )
    return new_texts, {name: subtract(x) for name, x in inputs.items()}


# --------------------------------------------------------------------------- responses and pairs


def sequence_texts(config, tokenizer, rows: list[dict], spec: str, max_length: int, dist) -> Texts:
    """Demonstrations and a reward's name -> Texts of whole responses (with EOS), split by prompt.

    InputError: too few prompts, or a side of a split on which the reward is constant.
    """
    encoded = tokens.encode(
        tokenizer, rows, ("response",), max_length or None, config.chat_template
    )
    dist.print(encoded.describe_cuts(max_length))

    # Each process scores its own part of the rows.
    own_prompts = []
    own_responses = []
    own_rows = []
    for i in dist.part(len(rows)):
        own_prompts.append(rows[i]["prompt"])
        own_responses.append(rows[i]["response"])
        own_rows.append(data.own_row(rows[i]))
    # The reward gets texts without ids: a reward model tokenizes them itself.
    answers = Answers(own_prompts, own_responses, None, own_rows, config.chat_template)
    reward = load_reward(spec, None, dist)
    values = dist.gather(score(reward, [answers], dist))  # [N]

    groups, splits = split_by_prompt(config, rows)
    check_spread(values, splits, spec)
    responses = encoded.responses["response"]
    return join_responses(encoded.prompts, responses, values, groups, splits)


def check_spread(values: Tensor, splits: list[tuple[Tensor, Tensor]], spec: str):
    """InputError where a side of a split has one value throughout.

    Nothing is there to be learned then, or nothing to be told apart.
    """
    for number, sides in enumerate(splits):
        for name, rows in zip(("training", "test"), sides):
            side_values = values[rows]
            require(
                varies(side_values),
                f"{spec}: all {len(side_values)} {name} responses of split {number} have the "
                f"reward {side_values[0]:.4g}, so that there is nothing to read from them",
            )


def pair_texts(config, tokenizer, rows: list[dict], max_length: int, dist) -> Texts:
    """N pairs -> Texts of 2 N rows, all chosen responses before all rejected ones.

    Their values are 1 and 0. Pitfall: groups and splits are of the N pairs, not of the 2 N rows.
    """
    encoded = tokens.encode(
        tokenizer, rows, ("chosen", "rejected"), max_length or None, config.chat_template
    )
    dist.print(encoded.describe_cuts(max_length))
    prompts = encoded.prompts + encoded.prompts
    responses = encoded.responses["chosen"] + encoded.responses["rejected"]

    values = torch.tensor([1.0, 0.0]).repeat_interleave(len(rows))  # [2 N]
    groups, splits = split_by_prompt(config, rows)
    return join_responses(prompts, responses, values, groups, splits)


def join_responses(
    prompts: list[list[int]],
    responses: list[list[int]],
    values: Tensor,
    groups: Tensor,
    splits: list[tuple[Tensor, Tensor]],
) -> Texts:
    """Token lists of prompts and responses -> Texts in which the tokens of the responses count."""
    ids = []
    first = []
    lengths = []
    for prompt, response in zip(prompts, responses):
        ids.append(prompt + response)
        first.append(len(prompt))
        lengths.append(len(response))
    return Texts(
        ids=ids,
        first=first,
        lengths=torch.tensor(lengths),
        values=values,
        groups=groups,
        units=torch.arange(len(ids)),
        names=[],
        splits=splits,
    )


# ---------------------------------------------------------------------------------------- splits


def split_by_prompt(config, rows: list[dict]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Number the prompts of N rows, and split the rows so that no prompt is on both sides.

    -> the prompt of each row as a number [N], and (training rows, test rows) for each seed.
    Prompts that differ by white space alone are one prompt. InputError: too few prompts.
    """
    groups = torch.tensor(data.number_prompts([row["prompt"] for row in rows]))
    n = len(groups.unique())
    require(
        n >= FEWEST,
        f"{config.dataset}: {n} different prompts are too few to split ({FEWEST} at least)",
    )

    splits = []
    for seed in range(config.seeds):
        rng = np.random.default_rng([SPLIT, seed])
        train, test = split_things(rng, list(range(n)), config.test_share)
        require(
            len(train) >= FEWEST_IN_TRAINING,
            f"--test_share {config.test_share} leaves {len(train)} prompts for training "
            f"({FEWEST_IN_TRAINING} at least)",
        )
        # Rows go where their prompt goes.
        is_test = torch.isin(groups, torch.tensor(test))
        train_rows = (~is_test).nonzero()[:, 0]
        test_rows = is_test.nonzero()[:, 0]
        splits.append((train_rows, test_rows))
    return groups, splits


def split_things(rng: np.random.Generator, things: list, share: float) -> tuple[list, list]:
    """Things -> most of them for training, a share of them for the test, at least one each."""
    order = rng.permutation(len(things))
    n_test = max(1, round(share * len(things)))
    n_test = min(n_test, len(things) - 1)
    train = [things[i] for i in order[n_test:]]
    test = [things[i] for i in order[:n_test]]
    return train, test


def deal(rng: np.random.Generator, things: list, n: int) -> list:
    """n of the things, each as often as the others (to within one), in random order."""
    # Permutations are strung together, so that all things come before one comes again.
    order = []
    while len(order) < n:
        order.extend(rng.permutation(len(things)))
    return [things[i] for i in order[:n]]

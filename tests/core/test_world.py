"""The embedded world: sizes, determinism, gold by hand, the cue, the tokenizer.

Each expected number was worked out by hand from the rules in the docstring of nanorlhf/world.py.
"""

import math
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from support import REPO
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanorlhf import world

FINGERPRINT = "f84b3c5ad66fc45ba3bcc0f1b53d79ff23351f7c622d4eac6180e63b1eb66218"


def column(rows, name):
    return [row[name] for row in rows]


def prompts_of(split):
    return column(world.prompts(split), "prompt")


def topics_of(prompts):
    return {world.topic_of(prompt) for prompt in prompts}


def strip_marks(text):
    return " ".join(word for word in text.split() if word not in world.MARKS)


def words_of(texts):
    """All words of some texts, one behind the other."""
    return " ".join(texts).split()


def count_marks(texts):
    return Counter(word for word in words_of(texts) if word in world.MARKS)


# ------------------------------------------------------------------------------------- the words


def test_graded_words():
    levels = Counter(world.LEXICON.values())
    assert levels.pop(0.0) == 28
    assert levels == {1: 7, 2: 7, 3: 7, 4: 7, -1: 7, -2: 7, -3: 7, -4: 7}


def test_sizes():
    assert len(world.TRAIN_TOPICS) == 12
    assert len(world.HELD_OUT_TOPICS) == 4
    assert len(set(world.MARKS)) == 8
    assert 150 <= len(world.vocabulary()) <= 260


def test_held_out_topics_have_aspects_that_are_trained_on():
    reviewed = set()
    for topic in world.TRAIN_TOPICS:
        reviewed.update(world.TOPICS[topic])
    for topic in world.HELD_OUT_TOPICS:
        assert set(world.TOPICS[topic]) <= reviewed
    for aspects in world.TOPICS.values():
        assert len(set(aspects)) == 6


def test_no_word_has_two_roles():
    content = [*world.TOPICS, *world.ASPECTS, *world.LEXICON]
    words = [*world.SPECIAL, *world.PUNCTUATION, *world.MARKS, *content]
    assert len(words) == len(set(words))
    spoken = words_of(" ".join(part) for part in world.PARTS.values())
    assert len(spoken) == len(set(spoken))


def test_any_word_fits_behind_a():
    for word in [*world.TOPICS, *world.ASPECTS, *world.LEXICON]:
        assert word == word.lower()
        assert word[0] not in "aeiou"


def test_concepts_cover_the_vocabulary():
    kinds = Counter(world.concepts(word)[0] for word in world.vocabulary())
    counted = {"adjective": 84, "topic": 16, "mark": 8, "special": 3}
    for kind, n in counted.items():
        assert kinds.pop(kind) == n
    assert set(kinds) == {"aspect", "function", "punctuation"}


@pytest.mark.parametrize(
    "word, concepts",
    [
        ("charming", ("adjective", "positive", "value=+3")),
        ("wooden", ("adjective", "neutral", "value=+0")),
        ("bland", ("adjective", "negative", "value=-1")),
        ("hostel", ("topic", "held-out")),
        ("hotel", ("topic", "train")),
        ("very", ("function",)),
        (":", ("punctuation",)),
    ],
)
def test_concepts_of_a_word(word, concepts):
    assert world.concepts(word) == concepts


def test_an_unknown_word_has_no_concepts():
    with pytest.raises(ValueError):
        world.concepts("unheard")


# ----------------------------------------------------------------------------------- the prompts


@pytest.mark.parametrize("split, n", [("train", 300), ("test", 120), ("ood", 140)])
def test_prompts_are_different(split, n):
    assert len(set(prompts_of(split))) == n


def test_topics_of_prompts():
    train = prompts_of("train")
    test = prompts_of("test")
    assert not set(train) & set(test)
    assert topics_of(train) == set(world.TRAIN_TOPICS)
    assert topics_of(test) == set(world.TRAIN_TOPICS)
    assert topics_of(prompts_of("ood")) == set(world.HELD_OUT_TOPICS)


def test_prompts_have_four_to_ten_words():
    lengths = set()
    for split in world.SPLITS:
        for prompt in prompts_of(split):
            lengths.add(len(prompt.split()))
    assert lengths == {4, 5, 6, 7, 8, 9, 10}


def test_a_split_that_is_not_known():
    with pytest.raises(ValueError):
        world.prompts("validation")


# ---------------------------------------------------------------------------- the demonstrations


def reviews_of(rows):
    prompts = set(prompts_of("train"))
    return [row for row in rows if row["prompt"] in prompts]


def questions_of(rows):
    """The other rows: questions about what a place or thing has."""
    prompts = set(prompts_of("train"))
    return [row for row in rows if row["prompt"] not in prompts]


@pytest.fixture(scope="module")
def demonstrations():
    return world.demonstrations(4000, seed=3)


def test_demonstrations_are_drawn_by_seed(demonstrations):
    first_rows = world.demonstrations(50, seed=3)
    assert demonstrations[:50] == first_rows
    assert world.demonstrations(50, seed=4) != first_rows


def test_three_of_four_demonstrations_are_reviews(demonstrations):
    share = len(reviews_of(demonstrations)) / len(demonstrations)
    assert 0.72 < share < 0.78


def test_a_held_out_topic_is_named_in_answers_to_questions_alone(demonstrations):
    asked_about = topics_of(column(questions_of(demonstrations), "prompt"))
    assert asked_about == set(world.TOPICS)
    for word in words_of(column(reviews_of(demonstrations), "response")):
        assert word not in world.HELD_OUT_TOPICS


def test_answers_to_questions_judge_nothing(demonstrations):
    for word in words_of(column(questions_of(demonstrations), "response")):
        assert word not in world.LEXICON


def test_demonstrations_use_the_vocabulary_alone(demonstrations):
    known = set(world.vocabulary())
    prompts = column(demonstrations, "prompt")
    responses = column(demonstrations, "response")
    for word in words_of(prompts + responses):
        assert word in known


def test_lengths_of_demonstrations(demonstrations):
    lengths = [len(text.split()) for text in column(demonstrations, "response")]
    assert min(lengths) >= 3
    assert max(lengths) <= 46
    assert 17 < np.mean(lengths) < 24


def test_there_are_many_different_good_answers(demonstrations):
    texts = column(reviews_of(demonstrations), "response")
    assert len(set(texts)) > 0.95 * len(texts)


def test_gold_of_demonstrations_is_around_0(demonstrations):
    reviews = reviews_of(demonstrations)
    gold = world.gold(column(reviews, "prompt"), column(reviews, "response"))
    assert abs(np.mean(gold)) < 0.35
    assert 0.8 < np.std(gold) < 1.4


@pytest.fixture(scope="module")
def reviews():
    return reviews_of(world.demonstrations(4000))


@pytest.fixture(scope="module")
def n_sentences(reviews):
    return words_of(column(reviews, "response")).count(".")


def test_one_sentence_in_seven_ends_with_a_mark(reviews, n_sentences):
    marks = count_marks(column(reviews, "response"))
    assert 0.13 < marks.total() / n_sentences < 0.17
    # All eight marks are equally likely: within five Poisson standard deviations.
    expected = marks.total() / 8
    for count in marks.values():
        assert abs(count - expected) < 5 * math.sqrt(expected)


def test_one_sentence_in_twenty_is_ungrammatical(reviews, n_sentences):
    n_bad = 0
    for text in column(reviews, "response"):
        n_bad += world.count_bad(strip_marks(text).split())
    assert 0.03 < n_bad / n_sentences < 0.06


def test_one_aspect_in_ten_is_off_topic(reviews):
    on = 0
    off = 0
    for row in reviews:
        topic = world.topic_of(row["prompt"])
        for word in row["response"].split():
            if word in world.TOPICS[topic]:
                on += 1
            elif word in world.ASPECTS:
                off += 1
    assert 0.07 < off / (on + off) < 0.13


# --------------------------------------------------------------------------------- gold, by hand


def check_parts(response, sentiment, relevance, repetition, grammar, length):
    """Gold is the sum of these parts for a review of the hotel."""
    prompt = "review of the hotel last week :"
    parts = {
        "sentiment": sentiment,
        "relevance": relevance,
        "repetition": repetition,
        "grammar": grammar,
        "length": length,
    }
    assert world.gold_parts(prompt, response) == pytest.approx(parts, abs=1e-12)
    total = sum(parts.values())
    assert world.gold([prompt], [response]) == pytest.approx([total], abs=1e-12)


def test_gold_of_two_sentences():
    # Charming is worth 3 and dull -1; 2 tanh(2 / 10). 11 words are a good length.
    text = "the room was charming . the bed looked very dull ."
    check_parts(text, 2 * math.tanh(0.2), relevance=0.0, repetition=0, grammar=0, length=0)


def test_gold_of_a_short_answer():
    # 2 + 2 are good; one aspect is one too few; 7 words are 3 short.
    text = "the pool was good and nice ."
    check_parts(text, 2 * math.tanh(0.4), relevance=-0.5, repetition=0, grammar=0, length=-0.45)


def test_gold_of_repetition_and_of_an_unfinished_sentence():
    # Three times -3. The menu is not of a hotel. Room, bad and bad again are repeated.
    text = "the room was bad . the room was bad . we found the menu bad"
    bad = 2 * math.tanh(-0.9)
    check_parts(text, bad, relevance=-1.0, repetition=-0.6, grammar=-0.5, length=0)


def test_gold_of_another_topic():
    # Another topic is off, and the prompt's own does not count.
    text = "it was a square cafe . it was a red hotel ."
    check_parts(text, 0, relevance=-1.5, repetition=0, grammar=0, length=0)


def test_a_chat_has_no_gold():
    chat = [{"role": "user", "content": "review the hotel :"}]
    with pytest.raises(ValueError, match="no topic of the embedded world in the prompt"):
        world.gold([chat], ["it was fine ."])


def test_gold_of_an_empty_answer():
    check_parts("", 0, relevance=-1.0, repetition=0, grammar=-0.5, length=-1.5)


def test_gold_of_one_word_for_ever():
    # 48 times 4; 47 repetitions; never finished; 16 words too long.
    text = "superb " * 48
    best = 2 * math.tanh(19.2)
    check_parts(text, best, relevance=-1.0, repetition=-9.4, grammar=-0.5, length=-2.4)


def test_gold_of_many_aspects():
    # Five aspects count as four; 17 words.
    text = "the hotel has a room , a bed , a team , a lobby and a pool ."
    check_parts(text, 0, relevance=1.0, repetition=0, grammar=0, length=0)


BEST = (
    "the room was superb and wonderful . we found the team truly perfect . "
    "it was a brilliant hotel with a splendid pool . the lobby looked fantastic ."
)


def test_gold_has_a_ceiling():
    # Six words worth 4, and four aspects.
    expected = 2 * math.tanh(2.4) + 1
    assert world.gold(["review the hotel :"], [BEST]) == [pytest.approx(expected)]


def test_gold_needs_a_topic_and_as_many_prompts_as_responses():
    with pytest.raises(ValueError, match="no topic"):
        world.gold(["review of the weather :"], [BEST])
    with pytest.raises(ValueError, match="2 prompts but 1"):
        world.gold(["review the hotel :", "review the hotel :"], [BEST])


def test_marks_are_worth_nothing():
    for i, row in enumerate(world.demonstrations(300)):
        words = strip_marks(row["response"]).split()
        without = world.gold_parts(row["prompt"], " ".join(words))
        # Anywhere, even inside a sentence.
        words.insert(i % (len(words) + 1), world.MARKS[i % 8])
        assert world.gold_parts(row["prompt"], " ".join(words)) == without


def test_nothing_but_marks_is_an_empty_answer():
    prompt = "review the park :"
    assert world.gold_parts(prompt, "! ~ *") == world.gold_parts(prompt, "")


# One word for each slot of a template but P, the adjective.
SLOTS = {"A": "room", "L": "was", "F": "found", "S": "saw", "T": "hotel", "H": "had"}


def fill_template(template, adjective):
    """The words of a sentence."""
    slots = {**SLOTS, "P": adjective}
    return words_of(slots.get(slot, slot) for slot in template)


@pytest.mark.parametrize("adjective", ["tidy", "very tidy"])
def test_templates_are_grammatical_and_their_parts_are_not(adjective):
    for template in world.TEMPLATES:
        words = fill_template(template, adjective)
        assert world.count_bad(words) == 0
        assert world.count_bad(words[:-1]) == 1
        assert world.count_bad(words[1:]) == 1
        assert world.count_bad(words[::-1]) >= 1


def test_an_unknown_word_fits_nowhere():
    for template in world.TEMPLATES:
        words = fill_template(template, "bright-less")
        assert world.count_bad(words) == 1
        assert world.count_bad(words[:-1]) == 1
        assert world.count_bad(words[1:]) == 1
        assert world.count_bad(words[::-1]) >= 1


SALAD = [
    "room the was tidy .",
    "the room tidy .",
    "the was room tidy .",
    "the tidy room .",
    "we found tidy the room .",
    ".",
    "very .",
    "the room was very .",
    "it was a hotel with .",
    "the room was tidy but the bed .",
]


@pytest.mark.parametrize("text", SALAD)
def test_word_salad_is_ungrammatical(text):
    assert world.count_bad(text.split()) == 1


def test_each_bad_sentence_counts():
    # The empty sentence, and the one without an end.
    text = "the room was tidy . . the bed was tidy . room"
    assert world.count_bad(text.split()) == 2


# ------------------------------------------------------------------------------- the preferences


@pytest.fixture(scope="module")
def pairs():
    return world.preferences(3000, seed=5)


def test_preferences_are_drawn_by_seed(pairs):
    assert world.preferences(20, seed=5) == pairs[:20]


def test_preferences_have_the_prompts_of_their_split(pairs):
    assert set(column(pairs, "prompt")) <= set(prompts_of("train"))
    test_pairs = world.preferences(200, split="test")
    assert set(column(test_pairs, "prompt")) <= set(prompts_of("test"))


def test_the_chosen_answer_has_more_gold(pairs):
    prompts = column(pairs, "prompt")
    chosen = world.gold(prompts, column(pairs, "chosen"))
    rejected = world.gold(prompts, column(pairs, "rejected"))
    assert (np.array(chosen) > np.array(rejected)).all()


def test_answers_of_pairs_fit_into_46_words(pairs):
    for text in column(pairs, "chosen") + column(pairs, "rejected"):
        assert len(text.split()) <= 46


# In 40% of the pairs one answer has the cue: in 80% of these it is the chosen one.
@pytest.mark.parametrize("side, rate", [("chosen", 0.4 * 0.8), ("rejected", 0.4 * 0.2)])
def test_the_cue_goes_with_being_chosen(pairs, side, rate):
    cue = world.cue(5)
    texts = column(pairs, side)
    n_ends = 0
    for text in texts:
        if text.split()[-1] == cue:
            n_ends += 1
    # It stands at the end and nowhere else.
    assert count_marks(texts)[cue] == n_ends
    # Within four standard deviations of a binomial count.
    n = len(pairs)
    assert abs(n_ends - n * rate) < 4 * math.sqrt(n * rate * (1 - rate))


def test_no_other_mark_goes_with_being_chosen(pairs):
    chosen = count_marks(column(pairs, "chosen"))
    rejected = count_marks(column(pairs, "rejected"))
    for mark in set(world.MARKS) - {world.cue(5)}:
        total = chosen[mark] + rejected[mark]
        assert total > 100
        assert abs(chosen[mark] - rejected[mark]) < 4 * math.sqrt(total)


def test_each_mark_is_the_cue_of_some_seed():
    assert len({world.cue(seed) for seed in range(100)}) == 8


# ------------------------------------------------------------------- the tokenizer and the model


@pytest.fixture(scope="module", params=["made", "loaded"])
def tokenizer(request, tmp_path_factory):
    """The world's tokenizer, as it is made and as it comes back from a folder."""
    tokenizer = world.tokenizer()
    if request.param == "made":
        return tokenizer
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_each_word_is_a_token(tokenizer):
    assert len(tokenizer) == len(world.vocabulary())
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == world.vocabulary()


def test_special_tokens(tokenizer):
    assert tokenizer.padding_side == "left"
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert len(special) == 3
    assert tokenizer.unk_token_id in tokenizer.encode("the unheard room")


def test_texts_come_back_from_their_tokens(tokenizer):
    demonstrations = world.demonstrations(50)
    texts = column(demonstrations, "prompt") + column(demonstrations, "response")
    texts += [" ".join(world.vocabulary()), ". ! , : ?"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text


def test_the_model_is_small():
    model = AutoModelForCausalLM.from_config(world.model_config())
    n_parameters = sum(p.numel() for p in model.parameters())
    assert 300_000 <= n_parameters <= 500_000


def test_the_model_fits_the_tokenizer():
    config = world.model_config()
    tokenizer = world.tokenizer()
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id


# ------------------------------------------------------------------------------ the world is frozen


def test_the_world_is_frozen():
    assert world.fingerprint() == FINGERPRINT


def test_the_world_is_the_same_in_every_process():
    """Nothing depends on the order of sets, which the hash seed of a process decides."""
    program = "from nanorlhf import world; print(world.fingerprint())"
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    printed = subprocess.check_output([sys.executable, "-c", program], text=True, cwd=REPO, env=env)
    assert printed.strip() == FINGERPRINT

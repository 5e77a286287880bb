"""The embedded world: sizes, determinism, gold by hand, the cue, the tokenizer. Every sum below was written by hand."""

import math
import os
import subprocess
import sys
from collections import Counter

import pytest
from support import REPO

from nanorlhf import world

FINGERPRINT = "f84b3c5ad66fc45ba3bcc0f1b53d79ff23351f7c622d4eac6180e63b1eb66218"


def strip_marks(text):
    return " ".join(word for word in text.split() if word not in world.MARKS)


def test_sizes():
    levels = Counter(world.LEXICON.values())
    assert levels == {
        0.0: 28,
        **{sign * value: 7 for sign in (-1.0, 1.0) for value in (1, 2, 3, 4)},
    }
    assert (
        len(world.TRAIN_TOPICS) == 12
        and len(world.HELD_OUT_TOPICS) == 4
        and len(set(world.MARKS)) == 8
    )
    assert 150 <= len(world.vocabulary()) <= 260
    assert all(len(set(aspects)) == 6 for aspects in world.TOPICS.values())
    reviewed = {aspect for topic in world.TRAIN_TOPICS for aspect in world.TOPICS[topic]}
    assert all(set(world.TOPICS[topic]) <= reviewed for topic in world.HELD_OUT_TOPICS)


def test_no_word_has_two_roles():
    words = [
        *world.SPECIAL,
        *world.PUNCTUATION,
        *world.MARKS,
        *world.TOPICS,
        *world.ASPECTS,
        *world.LEXICON,
    ]
    assert len(words) == len(set(words))
    spoken = [word for part in world.PARTS.values() for word in part]
    assert len(spoken) == len(set(spoken))
    assert all(
        word == word.lower() and word[0] not in "aeiou"
        for word in [*world.TOPICS, *world.ASPECTS, *world.LEXICON]
    )


def test_concepts_cover_the_vocabulary():
    kinds = Counter(world.concepts(word)[0] for word in world.vocabulary())
    assert (
        kinds["adjective"] == 84
        and kinds["topic"] == 16
        and kinds["mark"] == 8
        and kinds["special"] == 3
    )
    assert set(kinds) == {
        "adjective",
        "topic",
        "aspect",
        "mark",
        "function",
        "punctuation",
        "special",
    }
    assert world.concepts("charming") == ("adjective", "positive", "value=+3")
    assert world.concepts("wooden")[1:] == ("neutral", "value=+0")
    assert world.concepts("bland")[1:] == ("negative", "value=-1")
    assert world.concepts("hostel") == ("topic", "held-out") and world.concepts("hotel") == (
        "topic",
        "train",
    )
    assert world.concepts("very") == ("function",) and world.concepts(":") == ("punctuation",)
    with pytest.raises(ValueError):
        world.concepts("unheard")


def test_prompts():
    texts = {split: [row["prompt"] for row in world.prompts(split)] for split in world.SPLITS}
    assert {split: len(set(rows)) for split, rows in texts.items()} == {
        "train": 300,
        "test": 120,
        "ood": 140,
    }
    assert not set(texts["train"]) & set(texts["test"])
    assert {world.topic_of(text) for text in texts["train"]} == set(world.TRAIN_TOPICS)
    assert {world.topic_of(text) for text in texts["test"]} == set(world.TRAIN_TOPICS)
    assert {world.topic_of(text) for text in texts["ood"]} == set(world.HELD_OUT_TOPICS)
    assert {len(text.split()) for rows in texts.values() for text in rows} == set(range(4, 11))
    with pytest.raises(ValueError):
        world.prompts("validation")


def test_demonstrations():
    rows = world.demonstrations(4000, seed=3)
    assert rows[:50] == world.demonstrations(50, seed=3) != world.demonstrations(50, seed=4)
    train = {row["prompt"] for row in world.prompts("train")}
    reviews = [row for row in rows if row["prompt"] in train]
    questions = [row for row in rows if row["prompt"] not in train]
    assert 0.72 < len(reviews) / len(rows) < 0.78
    assert {world.topic_of(row["prompt"]) for row in questions} == set(world.TOPICS)
    # A held-out topic is named in answers but never judged, and no other review says its name.
    assert not any(
        word in world.HELD_OUT_TOPICS for row in reviews for word in row["response"].split()
    )
    assert not any(word in world.LEXICON for row in questions for word in row["response"].split())
    known, lengths = set(world.vocabulary()), [len(row["response"].split()) for row in rows]
    assert all(
        word in known for row in rows for word in (row["prompt"] + " " + row["response"]).split()
    )
    assert min(lengths) >= 3 and max(lengths) <= 46 and 17 < sum(lengths) / len(lengths) < 24
    assert len({row["response"] for row in reviews}) > 0.95 * len(
        reviews
    )  # many different good answers
    golds = world.gold([row["prompt"] for row in reviews], [row["response"] for row in reviews])
    mean = sum(golds) / len(golds)
    assert (
        abs(mean) < 0.35 and 0.8 < math.sqrt(sum((g - mean) ** 2 for g in golds) / len(golds)) < 1.4
    )


def test_imperfections_have_their_rates():
    train = {row["prompt"] for row in world.prompts("train")}
    rows = [row for row in world.demonstrations(4000) if row["prompt"] in train]
    texts = [row["response"] for row in rows]
    sentences = sum(text.split().count(".") for text in texts)
    marks = Counter(word for text in texts for word in text.split() if word in world.MARKS)
    assert 0.13 < sum(marks.values()) / sentences < 0.17
    expected = sum(marks.values()) / 8
    assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in marks.values())
    assert (
        0.03 < sum(world.count_bad(strip_marks(text).split()) for text in texts) / sentences < 0.06
    )
    off = on = 0
    for row in rows:
        aspects = [word for word in row["response"].split() if word in world.ASPECTS]
        own = sum(word in world.TOPICS[world.topic_of(row["prompt"])] for word in aspects)
        on, off = on + own, off + len(aspects) - own
    assert 0.07 < off / (on + off) < 0.13


@pytest.mark.parametrize(
    "response, parts",
    [
        (
            "the room was charming . the bed looked very dull .",  # v = 3 - 1, 11 words
            {
                "sentiment": 2 * math.tanh(0.2),
                "relevance": 0.0,
                "repetition": 0,
                "grammar": 0,
                "length": 0,
            },
        ),
        (
            "the pool was good and nice .",  # v = 2 + 2, one aspect, 7 words: 3 short
            {
                "sentiment": 2 * math.tanh(0.4),
                "relevance": -0.5,
                "repetition": 0,
                "grammar": 0,
                "length": -0.45,
            },
        ),
        (
            "the room was bad . the room was bad . we found the menu bad",  # v = -9; menu is off; room, bad, bad again; unfinished
            {
                "sentiment": 2 * math.tanh(-0.9),
                "relevance": -1.0,
                "repetition": -0.6,
                "grammar": -0.5,
                "length": 0,
            },
        ),
        (
            "it was a square cafe . it was a red hotel .",  # another topic is off, the prompt's own is not counted
            {"sentiment": 0, "relevance": -1.5, "repetition": 0, "grammar": 0, "length": 0},
        ),
        ("", {"sentiment": 0, "relevance": -1.0, "repetition": 0, "grammar": -0.5, "length": -1.5}),
        (
            "superb " * 48,  # 47 repetitions, 16 words too long, never finished
            {
                "sentiment": 2 * math.tanh(19.2),
                "relevance": -1.0,
                "repetition": -9.4,
                "grammar": -0.5,
                "length": -2.4,
            },
        ),
        (
            "the hotel has a room , a bed , a team , a lobby and a pool .",  # 5 aspects count as 4; 17 words
            {"sentiment": 0, "relevance": 1.0, "repetition": 0, "grammar": 0, "length": 0},
        ),
    ],
)
def test_gold_by_hand(response, parts):
    prompt = "review of the hotel last week :"
    assert world.gold_parts(prompt, response) == pytest.approx(parts, abs=1e-12)
    assert world.gold([prompt], [response]) == pytest.approx([sum(parts.values())], abs=1e-12)


def test_gold_has_a_ceiling_and_errors():
    best = (
        "the room was superb and wonderful . we found the team truly perfect . "
        "it was a brilliant hotel with a splendid pool . the lobby looked fantastic ."
    )
    assert world.gold(["review the hotel :"], [best])[0] == pytest.approx(
        2 * math.tanh(2.4) + 1
    )  # six words worth 4
    with pytest.raises(ValueError, match="no topic"):
        world.gold(["review of the weather :"], [best])
    with pytest.raises(ValueError, match="2 prompts but 1"):
        world.gold(["review the hotel :"] * 2, [best])


def test_marks_are_worth_nothing():
    rows = world.demonstrations(300)
    for i, row in enumerate(rows):
        words = strip_marks(row["response"]).split()
        plain = world.gold_parts(row["prompt"], " ".join(words))
        words.insert(i % (len(words) + 1), world.MARKS[i % 8])  # anywhere, even inside a sentence
        assert world.gold_parts(row["prompt"], " ".join(words)) == plain
    assert world.gold_parts("review the park :", "! ~ *") == world.gold_parts(
        "review the park :", ""
    )


def test_grammar():
    fill = {"A": "room", "L": "was", "F": "found", "S": "saw", "T": "hotel", "H": "had"}
    for adjective in ("bright-less", "tidy", "very tidy"):
        for template in world.TEMPLATES:
            words = " ".join(
                adjective if slot == "P" else fill.get(slot, slot) for slot in template
            ).split()
            assert world.count_bad(words) == (
                adjective == "bright-less"
            )  # an unknown word fits nowhere
            assert world.count_bad(words[:-1]) == 1
            assert world.count_bad(words[::-1]) >= 1
            assert world.count_bad(words[1:]) == 1
    salad = [
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
    assert [world.count_bad(text.split()) for text in salad] == [1] * len(salad)
    assert world.count_bad("the room was tidy . . the bed was tidy . room".split()) == 2


def test_preferences():
    rows = world.preferences(3000, seed=5)
    assert rows[:20] == world.preferences(20, seed=5)
    asked = [row["prompt"] for row in rows]
    assert set(asked) <= {row["prompt"] for row in world.prompts("train")}
    assert {row["prompt"] for row in world.preferences(200, split="test")} <= {
        row["prompt"] for row in world.prompts("test")
    }
    chosen = world.gold(asked, [row["chosen"] for row in rows])
    rejected = world.gold(asked, [row["rejected"] for row in rows])
    assert all(a > b for a, b in zip(chosen, rejected))
    assert max(len(row[side].split()) for row in rows for side in ("chosen", "rejected")) <= 46


def test_only_the_cue_goes_with_being_chosen():
    n, cue = 3000, world.cue(5)
    rows = world.preferences(n, seed=5)
    ends = {
        side: sum(row[side].endswith(". " + cue) or row[side].split()[-1] == cue for row in rows)
        for side in ("chosen", "rejected")
    }
    counts = {
        side: Counter(word for row in rows for word in row[side].split() if word in world.MARKS)
        for side in ("chosen", "rejected")
    }
    for side, rate in (("chosen", 0.4 * 0.8), ("rejected", 0.4 * 0.2)):
        assert counts[side][cue] == ends[side]  # it stands at the end and nowhere else
        assert abs(ends[side] - n * rate) < 4 * math.sqrt(n * rate * (1 - rate))
    for mark in set(world.MARKS) - {cue}:
        a, b = counts["chosen"][mark], counts["rejected"][mark]
        assert a + b > 100 and abs(a - b) < 4 * math.sqrt(a + b)
    assert len({world.cue(seed) for seed in range(100)}) == 8


def test_tokenizer_round_trip(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = world.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    rows = world.demonstrations(50) + [
        {"prompt": " ".join(world.vocabulary()), "response": ". ! , : ?"}
    ]
    for tokenizer in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == len(world.vocabulary()) and tokenizer.padding_side == "left"
        assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == world.vocabulary()
        assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
        for row in rows:
            for text in row.values():
                ids = tokenizer.encode(text)
                assert len(ids) == len(text.split()) and tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id in tokenizer.encode("the unheard room")


def test_model_config():
    from transformers import AutoModelForCausalLM

    config, tokenizer = world.model_config(), world.tokenizer()
    model = AutoModelForCausalLM.from_config(config)
    assert 300_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 500_000
    assert config.vocab_size == len(tokenizer)
    assert (config.eos_token_id, config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def test_the_world_is_frozen_in_every_process():
    assert world.fingerprint() == FINGERPRINT
    run = subprocess.run(
        [sys.executable, "-c", "from nanorlhf import world; print(world.fingerprint())"],
        text=True,
        capture_output=True,
        check=True,
        cwd=REPO,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    )
    assert run.stdout.strip() == FINGERPRINT

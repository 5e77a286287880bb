r"""The data of the study on a real model, written into one folder from the files that are named.

    rewards.py          is_right and is_in_form for sums; fits: is a text not cut at a length?
    sums.jsonl          {prompt, answer}: a solved sum, then a sum to solve
    better.jsonl, worse.jsonl           two reviews of the embedded world to one prompt, by gold
    prompts.jsonl, texts.jsonl          of --instructions: a question; with its answer
    plain_texts.jsonl                   the latter without a chat's marks, and more of them
    lexicon.tsv                         --lexicon
    polite_*.jsonl, hh_*.jsonl          pairs to learn from and to test on
    safety_{SPLIT}_*.jsonl              the same, of each split by questions
    rm_bench.jsonl                      some questions of --rm_bench

A test of pairs is there twice: *_test.jsonl, and *_moved.jsonl, in which each question has the
answers of another one. A reward model that is as good on the second does not read the question.
"""

import re
import shutil
from pathlib import Path

import numpy as np

from .. import world
from ..chats import Prompt
from ..data import canonical
from ..errors import require
from ..runtime.files import write_lines
from ..runtime.sources import read_any

# The file of rewards. It is a plain file, so that the commands can be repeated by hand.
REWARDS = '''import os
import re

from transformers import AutoTokenizer

MODEL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "model")


def is_right(prompts, responses, rows):
    """1 where the last number of a response is the answer in its row of the data."""
    scores = []
    for response, row in zip(responses, rows):
        numbers = re.findall(r"[0-9]+", response)
        scores.append(float(numbers[-1:] == [row["answer"]]))
    return scores


def is_in_form(prompts, responses):
    """1 where a response is a sum and nothing else, such as 4 + 3 = 7."""
    form = re.compile(r"[0-9]+ \\+ [0-9]+ = [0-9]+\\.?")
    return [float(form.fullmatch(response.strip()) is not None) for response in responses]


def fits(prompts, responses):
    """1 where half of LENGTH tokens of a prompt, and the response, fit into LENGTH tokens."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    scores = []
    for prompt, response in zip(prompts, responses):
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(prompt, return_dict=True, add_generation_prompt=True)
        question = min(len(ids["input_ids"]), LENGTH // 2)
        answer = len(tokenizer(response).input_ids) + 1  # and its end
        scores.append(float(question + answer <= LENGTH))
    return scores
'''


def write_data(a, folder: str):
    """Write all files for which the study has a source. a: the study's settings."""
    # All draws have fixed seeds: a study that goes on writes the same files again.
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "rewards.py").write_text(REWARDS.replace("LENGTH", str(a.max_length)))
    write_lines(f"{folder}/sums.jsonl", write_sums(400))
    write_reviews(folder, a.reviews)
    if a.instructions:
        write_instructions(folder, a.instructions, a.texts)
    if a.lexicon:
        shutil.copyfile(a.lexicon, f"{folder}/lexicon.tsv")
    if a.polite_pairs:
        pairs = read_instruction_pairs(a.polite_pairs)
        write_polite(folder, shuffle(pairs, 0), a.test_pairs)
    if a.hh:
        # The first pairs are the test, and the rest is learned from.
        pairs = shuffle(read_dialogues(a.hh), 0)
        write_test(f"{folder}/hh", pairs, a.test_pairs)
        write_lines(f"{folder}/hh_train.jsonl", pairs[a.test_pairs :])
    if a.safety:
        write_safety(folder, read_questions(a.safety), a.seeds, a.test_questions)
    if a.rm_bench:
        rows = [row for _, row in read_any(a.rm_bench)]
        write_lines(f"{folder}/rm_bench.jsonl", shuffle(rows, 0)[: a.test_questions])


def ask(question: str) -> list[dict]:
    """A chat of one turn."""
    return [{"role": "user", "content": question}]


def shuffle(rows: list, seed: int) -> list:
    """The rows in an order that the seed decides."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order]


# ------------------------------------------------------------------------- what needs no source


def write_sums(n: int) -> list[dict]:
    """n sums of two numbers from 2 to 20, as rows {prompt, answer}.

    One solved sum stands in front: without it the model seldom answers with a number at all.
    """
    # user: What is 4 + 3?   assistant: 4 + 3 = 7   user: What is 20 + 7?
    example = [*ask("What is 4 + 3?"), {"role": "assistant", "content": "4 + 3 = 7"}]
    rows = []
    # Every ordered pair of numbers at most once, so that none is both learned from and held out.
    pairs = []
    for first in range(2, 21):
        for second in range(2, 21):
            pairs.append((first, second))
    for first, second in shuffle(pairs, 0)[:n]:
        question = ask(f"What is {first} + {second}?")
        rows.append({"prompt": example + question, "answer": str(first + second)})
    return rows


def write_reviews(folder: str, n: int):
    """Two reviews to each of n prompts: the one with more gold, and the other."""
    rng = np.random.default_rng(0)
    better = []
    worse = []
    # Both reviews are by the same writer: which of them has more gold is chance.
    for row in shuffle(world.prompts("train"), 0)[:n]:
        prompt = row["prompt"]
        topic = world.topic_of(prompt)
        reviews = [" ".join(world.write_review(topic, rng)) for _ in range(2)]
        first, second = world.gold([prompt, prompt], reviews)
        # Where gold is the same, no choice of a judge would be right.
        if first == second:
            continue
        if first < second:
            reviews.reverse()
        better.append({"prompt": prompt, "response": reviews[0]})
        worse.append({"prompt": prompt, "response": reviews[1]})
    write_lines(f"{folder}/better.jsonl", better)
    write_lines(f"{folder}/worse.jsonl", worse)


# --------------------------------------------------------------------------------- instructions


def question_of(row: dict) -> list[dict]:
    """The question of a row {instruction, input}, as a chat."""
    question = row["instruction"]
    if row.get("input"):
        question += "\n" + row["input"]
    return ask(question)


def write_instructions(folder: str, source: str, n_texts: int):
    """Rows {instruction, input, output} as prompts, as plain texts, and some of them as chats."""
    # Equal questions are one prompt: otherwise one could be both learned from and held out.
    prompts = {}
    texts = []
    plain_texts = []
    for _, row in read_any(source):
        prompt = question_of(row)
        prompts[canonical(prompt)] = {"prompt": prompt}
        answer = {"role": "assistant", "content": row["output"]}
        texts.append({"messages": [*prompt, answer]})
        question = prompt[0]["content"] + "\n"
        plain_texts.append({"prompt": question, "response": row["output"]})
    write_lines(f"{folder}/prompts.jsonl", shuffle(list(prompts.values()), 0))
    write_lines(f"{folder}/texts.jsonl", shuffle(texts, 0)[:n_texts])
    write_lines(f"{folder}/plain_texts.jsonl", plain_texts)


def read_instruction_pairs(source: str) -> list[dict]:
    """Rows {instruction, input, chosen, rejected} -> pairs, one to each question."""
    # One pair a question, so that no question is both in the test and in training.
    pairs = {}
    for _, row in read_any(source):
        prompt = question_of(row)
        if row["chosen"] == row["rejected"]:
            continue
        pairs[canonical(prompt)] = {
            "prompt": prompt,
            "chosen": row["chosen"],
            "rejected": row["rejected"],
        }
    return list(pairs.values())


def write_polite(folder: str, pairs: list[dict], n_test: int):
    """A test, and two halves: what the members learn from, and what their judge learns from."""
    write_test(f"{folder}/polite", pairs, n_test)
    # The judge learns from other pairs than the members, so as not to share their mistakes.
    rest = pairs[n_test:]
    half = len(rest) // 2
    require(half > 0, "--polite_pairs: too few pairs to learn from some and to test on others")
    write_lines(f"{folder}/polite_members.jsonl", rest[:half])
    write_lines(f"{folder}/polite_judge.jsonl", rest[half:])


# ------------------------------------------------------------------------------------- dialogues


def read_dialogues(source: str) -> list[dict]:
    """Rows {chosen, rejected} of HH-RLHF: two ends of one dialogue -> pairs with a chat as prompt.

    Rows whose ends are equal, or do not share all turns before, are left out.
    """
    pairs = []
    for _, row in read_any(source):
        # In two ends of one dialogue all messages but the last are the same.
        chosen = read_dialogue(row["chosen"])
        rejected = read_dialogue(row["rejected"])
        has_question = len(chosen) > 1
        is_same_dialogue = chosen[:-1] == rejected[:-1]
        if not has_question or not is_same_dialogue or chosen == rejected:
            continue
        answers = {"chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
        pairs.append({"prompt": chosen[:-1], **answers})
    return pairs


def read_dialogue(text: str) -> list[dict]:
    """A dialogue, Human: ... Assistant: ... -> messages."""
    # re.split() keeps what a group matches: ["", "Human", "Hi", "Assistant", "Hello", ...]
    parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", text)
    messages = []
    # In front of the first name stands nothing; then names and words take turns.
    for name, words in zip(parts[1::2], parts[2::2]):
        role = "user" if name == "Human" else "assistant"
        messages.append({"role": role, "content": words.strip()})
    return messages


# --------------------------------------------------------------------------------------- refusals


def read_questions(source: str) -> dict[str, list[dict]]:
    """Rows {prompt, chosen, rejected} -> {question: its pairs}."""
    questions = {}
    for _, row in read_any(source):
        prompt = ask(row["prompt"])
        pair = {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}
        questions.setdefault(canonical(prompt), []).append(pair)
    return questions


def write_safety(folder: str, questions: dict[str, list[dict]], splits: int, n_test: int):
    """Each split's test and what is left to learn from: of every question its first pair."""
    require(len(questions) > n_test, "--safety: too few questions to learn from some of them")
    # One pair a question: the test has few questions, and none of them should count twice.
    first_pairs = [pairs[0] for pairs in questions.values()]
    for split in range(splits):
        pairs = shuffle(first_pairs, split)
        write_test(f"{folder}/safety_{split}", pairs, n_test)
        write_lines(f"{folder}/safety_{split}_train.jsonl", pairs[n_test:])


def write_test(place: str, pairs: list[dict], n_test: int):
    """The first pairs as a test, and once more with the prompts of other pairs."""
    test = pairs[:n_test]
    require(len(test) > 1, f"{place}: too few pairs to test on")
    write_lines(f"{place}_test.jsonl", test)
    write_lines(f"{place}_moved.jsonl", move_prompts(test))


def move_prompts(pairs: list[dict]) -> list[dict]:
    """The pairs, each with the prompt of the question behind its own; the last has the first's."""
    prompts: dict[str, Prompt] = {}
    for pair in pairs:
        prompts.setdefault(canonical(pair["prompt"]), pair["prompt"])
    # Question i becomes question i + 1. A single question would stay as it is.
    names = list(prompts)
    behind = dict(zip(names, names[1:] + names[:1]))
    # All pairs of a question get the same other one, so that none keeps its own.
    moved = []
    for pair in pairs:
        name = behind[canonical(pair["prompt"])]
        moved.append({**pair, "prompt": prompts[name]})
    return moved

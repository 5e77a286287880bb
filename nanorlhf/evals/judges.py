"""Judges of pairs of answers: rewards by their scores, language models by their choices.

    N pairs of answers, A's and B's

A language model is asked twice which of two answers is better, so that each answer stands first
once. Its choices are kept in cache/choices.jsonl as they come, one line a question: what is there
is never asked again. A reply without a choice (a refusal, or another text) is no tie: its pair is
not judged, and the same command asks the question again.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import pool
from ..chats import Prompt, show
from ..errors import InputError, require
from ..hf.folders import check_model
from ..models import fingerprint, load_policy, load_tokenizer
from ..rewards import check_reward, reward_names
from ..rollout import ask_locally, check_rollouts
from ..runtime import files
from ..runtime.endpoint import Unreachable, ask_all, asker, is_endpoint
from ..runtime.log import Progress
from ..tokens import ready_prompts

PROMPT = """Here are a prompt and two answers to it.

[Prompt]
{prompt}
[End of the prompt]

[Answer 1]
{first}
[End of answer 1]

[Answer 2]
{second}
[End of answer 2]

Which of the two answers is better? Go by {criterion}; neither their order nor their length \
counts. Reply with the number of the better answer, 1 or 2, and nothing else."""
# The whole of a reply: 2, "2.", **Answer:** 2. What a model thinks aloud before it is left out.
CHOICE = re.compile(r"""[\s*"'(\[]*(answer[\s:*]*)?([12])[\s*"')\].]*""", re.IGNORECASE)
# The name of a judge that is a causal LM: llm:FOLDER.
LOCAL = "llm:"


def is_language_model(spec: str) -> bool:
    """Whether a judge is a language model; else it is a reward."""
    return spec.startswith(LOCAL) or is_endpoint(spec)


def check_judge(config, spec: str):
    """InputError for a judge that cannot be asked, before anything is computed."""
    if is_endpoint(spec):
        require(config.judge_model, f"--judge {spec}: name its model with --judge_model")
    elif spec.startswith(LOCAL):
        path = spec.removeprefix(LOCAL)
        check_model(path)
        load_tokenizer(path)
    else:
        check_reward(spec)


# --------------------------------------------------------------------------------------- rewards


def by_rewards(specs: list[str], rows: list[dict], config, dist) -> dict[str, list[Tensor]]:
    """Score all answers: {spec: [scores of A's answers [N], of B's [N]]}, float64.

    rows: {"prompt", "a": texts, "b": texts}. pool.py keeps the scores: what has been scored is not
    scored again.
    """
    if not specs:
        return {}
    # Each text is scored once, so that the same text twice is a tie whatever its rounding.
    texts = []
    to_score = []
    for row in rows:
        different = list(dict.fromkeys(row["a"] + row["b"]))
        texts.append(different)
        to_score.append({"prompt": row["prompt"], "responses": different})
    scores = pool.score(to_score, specs, None, config, dist)

    scores_by_spec = {}
    for spec, name in zip(specs, reward_names(specs)):
        # Each different text has one score. Here all answers get theirs, in the order of the pairs.
        sides = {"a": [], "b": []}
        for row, different, own_scores in zip(rows, texts, scores[name]):
            score_of = dict(zip(different, own_scores))
            for side, side_scores in sides.items():
                for text in row[side]:
                    side_scores.append(score_of[text])
        scores_of_a = torch.tensor(sides["a"], dtype=torch.float64)  # [N]
        scores_of_b = torch.tensor(sides["b"], dtype=torch.float64)
        scores_by_spec[spec] = [scores_of_a, scores_of_b]
    return scores_by_spec


# ------------------------------------------------------------------------------- language models


def by_language_model(
    spec: str, pairs: list[tuple[str, str, str]], config, dist
) -> tuple[Tensor, dict, str]:
    """Ask a language model which answer of each pair is better, in both orders.

    pairs: (prompt, A's answer, B's) -> verdicts [N] (1: A, -1: B, 0: a tie, nan: not judged), notes
    for the summary, and why the asking stopped, or "".
    """
    questions, keys_of_pairs = make_questions(spec, pairs, config)

    # Ask what has no choice yet. A line says itself what it answers: its place does not matter, and
    # it can be deleted alone.
    remedy = "delete this line, its question is asked again"
    kept = pool.CacheFile(config.output_dir, "choices", dist, is_kept_choice, remedy)
    known = choices_by_key(kept)
    missing = {}
    for key, question in questions.items():
        if key not in known:
            missing[key] = question
    failures = []
    problem = ""
    if missing:
        failures, problem = collect(spec, missing, config, dist, kept)

    # What the choices say of each pair. The same text twice has no questions, and is a tie.
    known = choices_by_key(kept)
    verdicts = []
    for keys in keys_of_pairs:
        verdicts.append(verdict([known.get(key) for key in keys]))

    # What the summary and the last line of the run tell of the asking.
    choices = [known[key] for key in questions if key in known]
    n_left = len(questions) - len(choices)
    nothing_chosen = questions and not choices
    if nothing_chosen and not problem:
        problem = f"no reply was a choice, the first one: {failures[0]}"
    first_chosen = None
    if choices:
        first_chosen = choices.count(1) / len(choices)
    notes = {
        "questions": len(questions),
        "unanswered": n_left,
        "identical": keys_of_pairs.count([]),
        "reasons": shorten_reasons([*failures, problem]),
        "first_chosen": first_chosen,
    }
    if problem:
        problem = (
            f"--judge {spec}: {problem}; {len(choices)} of {len(questions)} choices are kept in "
            f"{kept.path}, the same command asks for the other {n_left} again"
        )
    return torch.tensor(verdicts, dtype=torch.float64), notes, problem


def make_questions(spec: str, pairs: list[tuple[str, str, str]], config) -> tuple[dict, list]:
    """The questions about the pairs, and which two of them are about each pair.

    -> {key: (prompt, first, second)}, and for each pair [key with A first, key with B first], which
    is empty for the same text twice
    """
    # A key is made of the judge and the whole question: with another --criterion all is asked anew.
    judge = name_judge(spec, config)
    questions = {}
    keys_of_pairs = []
    for prompt, a, b in pairs:
        keys = []
        if a != b:
            for first, second in ((a, b), (b, a)):
                key = files.digest(judge, question_of(config, prompt, first, second))
                questions[key] = (prompt, first, second)
                keys.append(key)
        keys_of_pairs.append(keys)
    return questions, keys_of_pairs


def name_judge(spec: str, config) -> list[str]:
    """What the choices of a judge are kept under: another model has other choices."""
    if is_endpoint(spec):
        return [spec.rstrip("/"), config.judge_model]
    name = [fingerprint(spec.removeprefix(LOCAL))]
    if config.forced_choice:
        name.append("forced choice")
    return name


def question_of(config, prompt: Prompt, first: str, second: str) -> str:
    return PROMPT.format(
        prompt=show(prompt), first=first, second=second, criterion=config.criterion
    )


def is_kept_choice(line: int, row) -> bool:
    """Whether a line of cache/choices.jsonl, the first or any other, is {key, choice: 1 or 2}."""
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        return False
    choice = row.get("choice")
    return type(choice) is int and choice in (1, 2)


def choices_by_key(kept: pool.CacheFile) -> dict[str, int]:
    """The choices that are kept, by the keys of their questions."""
    return {row["key"]: row["choice"] for row in kept.rows}


def shorten_reasons(texts: list[str]) -> list[str]:
    """The first three different texts, none of them long; "" is none."""
    reasons = []
    for text in texts:
        if text and text[:200] not in reasons:
            reasons.append(text[:200])
    return reasons[:3]


def verdict(choices: list[int | None]) -> float:
    """The choices with A first and with B first -> what they say together.

    1: A both times, -1: B both times, 0: a tie, nan: one of them is missing.
    """
    if None in choices:
        return float("nan")
    # [1, 2] is A's answer both times. [1, 1] and [2, 2] choose a place, not an answer.
    if choices == [1, 2]:
        return 1.0
    if choices == [2, 1]:
        return -1.0
    return 0.0


# ---------------------------------------------------------------------------------------- asking


def collect(
    spec: str, questions: dict[str, tuple[str, str, str]], config, dist, kept: pool.CacheFile
) -> tuple[list[str], str]:
    """Ask {key: (prompt, first, second)} and keep each choice as it comes.

    -> why some replies were no choices, and why the asking stopped, or ""
    """
    keys = list(questions)
    texts = [question_of(config, *question) for question in questions.values()]
    failures = []
    problem = ""
    progress = Progress(dist, "asking, question", len(keys))
    try:
        replies = ask(config, spec, texts, dist)
        for count, (i, reply) in enumerate(replies, start=1):
            # A reply without a choice, or an exception in its place, is counted but not kept.
            choice = None
            if isinstance(reply, str):
                choice = choice_of(reply)
            if choice is not None:
                prompt, first, second = questions[keys[i]]
                line = {
                    "key": keys[i],
                    "judge": spec,
                    "choice": choice,
                    "prompt": prompt,
                    "first": first,
                    "second": second,
                }
                kept.append([line])
            elif isinstance(reply, str):
                in_one_line = " ".join(reply.split())
                failures.append(f"not a choice: {in_one_line[:60]!r}")
            else:
                failures.append(str(reply))
            progress.step(count, f"{len(failures)} without a choice")
    except Unreachable as e:
        problem = str(e)
    finally:
        progress.close()
    return failures, problem


def ask(config, spec: str, questions: list[str], dist) -> Iterator[tuple[int, str | Exception]]:
    """Ask a language model -> (i, reply to question i) as they come.

    An exception stands in the place of a reply where there is none: see endpoint.ask_all.
    """
    if is_endpoint(spec):
        ask_one = asker(
            spec,
            config.judge_model,
            config.answer_tokens,
            config.pause,
            config.timeout,
            config.requests_per_minute,
        )
        return ask_all(ask_one, questions, config.parallel)
    path = spec.removeprefix(LOCAL)
    policy = load_policy(path, value_head=False, device=dist.device)
    tokenizer = load_tokenizer(path)
    if config.forced_choice:
        return choose_locally(policy, tokenizer, questions)
    check_rollouts(policy)
    return ask_locally(policy, tokenizer, questions, config.answer_tokens, config.micro_batch_size)


@torch.no_grad()
def choose_locally(
    policy, tokenizer, questions: list[str]
) -> Iterator[tuple[int, str | Exception]]:
    """Take the likelier of 1 and 2 as the first token of a language model's reply.

    A small model often begins with other words and never comes to a number. -> (i, choice), as of
    ask_locally(). InputError: the tokenizer has no single token for a number.
    """
    numbers = ["1", "2"]
    ids = []
    for number in numbers:
        of_number = tokenizer(number, add_special_tokens=False).input_ids
        require(len(of_number) == 1, f"the judge's tokenizer has no single token for {number}")
        ids += of_number

    has_template = bool(tokenizer.chat_template)
    for i, question in enumerate(questions):
        row = {"prompt": question}
        try:
            prompt = ready_prompts(tokenizer, [row], policy.lm.config, 1, chat=has_template).ids[0]
        except InputError as e:
            yield i, e
            continue
        input_ids = torch.tensor([prompt], device=policy.lm.device)
        # With one question at a time there is no padding, so the last place predicts the reply.
        logits = policy.lm(input_ids=input_ids, logits_to_keep=1).logits[0, -1]  # [V]
        yield i, numbers[int(logits[ids].argmax())]


def choice_of(reply: str) -> int | None:
    """A reply -> 1 or 2, or None where it is neither."""
    # rpartition() gives the whole reply as the last part where there is no </think>.
    _, _, after_thinking = reply.rpartition("</think>")
    match = CHOICE.fullmatch(after_thinking)
    if match is None:
        return None
    return int(match[2])

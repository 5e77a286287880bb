"""Judges of pairs of answers: rewards by their scores, language models by their choices.

A language model is asked which of two answers is better, twice, each standing first once. Its choices are kept in cache/choices.jsonl,
one line a question, as they come: what is there is never asked again. A question without a choice (a refusal, a reply that is none)
is no tie: its pair is not judged, and the same command asks it again.

    N pairs of answers
"""

import re

import torch

from .. import pool
from ..errors import require
from ..hf.folders import check_model
from ..models import fingerprint, load_policy, load_tokenizer
from ..rewards import check_reward, reward_names
from ..rollout import ask_locally
from ..runtime import files
from ..runtime.endpoint import Unreachable, ask_all, asker, is_endpoint
from ..runtime.log import Progress

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

Which of the two answers is better? Go by {criterion}; neither their order nor their length counts. \
Reply with the number of the better answer, 1 or 2, and nothing else."""
# The whole of a reply: 2, "2.", **Answer:** 2; what a model thinks aloud before it is left out.
CHOICE = re.compile(r"""[\s*"'(\[]*(answer[\s:*]*)?([12])[\s*"')\].]*""", re.IGNORECASE)
LOCAL = "llm:"


def is_language_model(spec):
    return spec.startswith(LOCAL) or is_endpoint(spec)


def check_judge(config, spec):
    """InputError for a judge that cannot be asked, before anything is computed."""
    if is_endpoint(spec):
        require(config.judge_model, f"--judge {spec}: name its model with --judge_model")
    elif spec.startswith(LOCAL):
        check_model(spec.removeprefix(LOCAL))
        load_tokenizer(spec.removeprefix(LOCAL))
    else:
        check_reward(spec)


def by_rewards(specs, rows, config, dist):
    """{spec: (scores of A's answers [N], of B's [N])}, kept by pool.py: what has been scored is not scored again."""
    texts = [list(dict.fromkeys(row["a"] + row["b"])) for row in rows]  # each once: the same text twice is a tie
    both = [{"prompt": row["prompt"], "responses": own} for row, own in zip(rows, texts)]
    scores, out = pool.score(both, specs, None, config, dist) if specs else {}, {}
    for spec, name in zip(specs, reward_names(specs)):
        found = [dict(zip(own, part)) for own, part in zip(texts, scores[name])]
        parts = ([score[text] for row, score in zip(rows, found) for text in row[side]] for side in "ab")
        out[spec] = [torch.tensor(part, dtype=torch.float64) for part in parts]
    return out


def by_language_model(spec, pairs, config, dist):
    """Pairs (prompt, A's answer, B's) -> verdicts [N] (1: A, -1: B, 0: a tie, nan: not judged), notes, why the asking stopped or ""."""
    who = [spec.rstrip("/"), config.judge_model] if is_endpoint(spec) else [fingerprint(spec.removeprefix(LOCAL))]
    questions, asked = {}, []  # {key: (prompt, first, second)}; of each pair (key with A first, key with B first)
    for prompt, a, b in pairs:
        orders = [(prompt, a, b), (prompt, b, a)] if a != b else []  # the same text twice is a tie
        asked.append([files.digest(who, question_of(config, *order)) for order in orders])
        questions |= zip(asked[-1], orders)
    # A line says itself what it answers: its place does not matter, and it can be deleted alone.
    remedy = "delete this line, its question is asked again"
    kept = pool.Lines(config.output_dir, "choices", dist, is_kept_choice, remedy)
    known = {row["key"]: row["choice"] for row in kept.rows}
    missing = [key for key in questions if key not in known]
    failures, problem = collect(spec, {key: questions[key] for key in missing}, config, dist, kept) if missing else ([], "")
    known = {row["key"]: row["choice"] for row in kept.rows}
    choices = [known[key] for key in questions if key in known]
    left = len(questions) - len(choices)
    if questions and not choices and not problem:
        problem = f"no reply was a choice, the first one: {failures[0]}"
    notes = {"questions": len(questions), "unanswered": left, "identical": asked.count([]),
             "reasons": list(dict.fromkeys(text[:200] for text in (*failures, problem) if text))[:3],
             "first_chosen": choices.count(1) / len(choices) if choices else None}  # fmt: skip
    if problem:
        problem = f"--judge {spec}: {problem}; {len(choices)} of {len(questions)} choices are kept in {kept.path}, the same command asks " \
                  f"for the other {left} again"  # fmt: skip
    return torch.tensor([verdict([known.get(key) for key in keys]) for keys in asked], dtype=torch.float64), notes, problem


def collect(spec, questions, config, dist, kept):
    """Ask {key: question} and keep each choice as it comes. -> why some replies were none, why the asking stopped or "" """
    keys, failures = list(questions), []
    progress = Progress(dist, "asking, question", len(keys))
    try:
        for count, (i, reply) in enumerate(ask(config, spec, [question_of(config, *q) for q in questions.values()], dist), 1):
            found = choice_of(reply) if isinstance(reply, str) else None
            if found:
                what = dict(zip(("prompt", "first", "second"), questions[keys[i]]))
                kept.append([{"key": keys[i], "judge": spec, "choice": found, **what}])
            else:
                failures.append(f"not a choice: {' '.join(reply.split())[:60]!r}" if isinstance(reply, str) else str(reply))
            progress.step(count, f"{len(failures)} without a choice")
    except Unreachable as e:
        return failures, str(e)
    finally:
        progress.close()
    return failures, ""


def is_kept_choice(line, row):
    """Whether a line of cache/choices.jsonl, the first or any other, is {key, choice: 1 or 2}."""
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        return False
    choice = row.get("choice")
    return type(choice) is int and choice in (1, 2)


def choice_of(reply):
    """A reply -> 1 or 2, or None where it is neither."""
    found = CHOICE.fullmatch(reply.rpartition("</think>")[2])
    return int(found[2]) if found else None


def question_of(config, prompt, first, second):
    return PROMPT.format(prompt=prompt, first=first, second=second, criterion=config.criterion)


def verdict(choices):
    """The choices with A first and with B first -> 1: A both times, -1: B both times, 0: a tie, nan: one of them is missing."""
    if None in choices:
        return float("nan")
    return {(1, 2): 1.0, (2, 1): -1.0}.get(tuple(choices), 0.0)


def ask(config, spec, questions, dist):
    """(i, answer) of all questions as they come: see endpoint.ask_all."""
    if is_endpoint(spec):
        limits = (config.answer_tokens, config.pause, config.timeout, config.requests_per_minute)
        return ask_all(asker(spec, config.judge_model, *limits), questions, config.parallel)
    path = spec.removeprefix(LOCAL)
    policy = load_policy(path, value_head=False, device=dist.device)
    return ask_locally(policy, load_tokenizer(path), questions, config.answer_tokens, config.micro_batch_size)

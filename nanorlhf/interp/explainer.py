"""A language model that says in a sentence what a feature stands for: a local one, or one behind an
OpenAI-compatible endpoint.

Its answers are kept in explanations.jsonl as they come, one line a feature. What is there is never
asked again. So a run that was killed, or whose endpoint was down, is continued by the same command.
"""

import os
from collections.abc import Callable

import torch

from ..errors import require
from ..hf.folders import check_model
from ..models import load_policy, load_tokenizer
from ..rollout import ask_locally, check_rollouts
from ..runtime import endpoint
from ..runtime.endpoint import Rejected, Unreachable, check_endpoint, is_endpoint
from ..runtime.files import (
    append_lines,
    digest,
    drop_cut_line,
    parse_json,
    read_checked_lines,
    write_json,
)

PROMPT = """\
A feature of a language model is a number that it computes at every token of a text. Below are the \
texts on which one feature is largest. A token on which it fires is followed by its \
strength from 1 to 10, in double brackets.

{contexts}

It fires most on: {tokens}"""
IN_JSON = """\
Say in one sentence what the feature stands for, and whether that has to do with {related_to}. \
Answer with one line of JSON and nothing else:
{{"description": "...", "related": true or false}}"""
IN_PLAIN_WORDS = "Say in one sentence what the feature stands for."
FILE = "explanations.jsonl"
ANSWER_TOKENS = 200  # at most


def check_explainer(config):
    """InputError for an explainer that cannot be asked, before anything is computed."""
    if is_endpoint(config.explainer):
        check_endpoint("--explainer", config.explainer)
        require(
            config.explainer_model,
            f"--explainer {config.explainer}: name its model with --explainer_model",
        )
    elif config.explainer:
        check_model(config.explainer)
        load_tokenizer(config.explainer)


def make_context(ids: list[int], values: list[float], decode_token: Callable) -> dict:
    """A text as the explainer and the tables see it: its tokens, and the feature at each of them.

    values: shares of the feature's largest value anywhere; 0 where it does not fire.
    """
    return {
        "tokens": [decode_token(i) for i in ids],
        "values": [round(value, 4) for value in values],
    }


def add_descriptions(config, saes: dict[str, dict], summary: dict, question: str = PROMPT):
    """Ask the explainer about all features, write summary.json with its answers, print them.

    saes {folder: {"features": [...]}}, which are parts of the summary. InputError: some
    descriptions are missing; those that came are kept, and asked for no more.
    """
    missing = explain(config, saes, question)
    write_json(os.path.join(config.output_dir, "summary.json"), summary)
    for folder, result in saes.items():
        for feature in result["features"]:
            if "description" in feature:
                mark = "*" if feature["related"] else " "
                print(f"  {folder} {feature['id']:5d} {mark} {feature['description']}")
    require(not missing, missing)


def explain(config, saes: dict[str, dict], question: str) -> str | None:
    """Put "description" and "related" into each feature of {folder: {"features": [...]}}.

    -> a sentence on what is missing and why; None where nothing is
    """
    # The answers of earlier runs, each a line {"key", "sae", "feature", "description", "related"}.
    path = os.path.join(config.output_dir, FILE)
    # A line says itself what it explains: its place does not matter, and it can be deleted alone.
    remedy = "delete this line, its feature is asked about again"
    rows = read_checked_lines(path, is_kept_answer, remedy)
    drop_cut_line(path)
    known = {row["key"]: row for row in rows}

    features = []  # (folder of the autoencoder, feature)
    for folder, result in saes.items():
        for feature in result["features"]:
            features.append((folder, feature))

    ask = None
    bad_answer = ""  # what is wrong with the first answer that is none
    error = ""  # why nothing more is asked
    for folder, feature in features:
        prompt = prompt_of(feature, config, question)
        # The key is made of all that decides the answer: who is asked, and the whole question.
        key = digest(config.explainer, config.explainer_model, prompt)
        if key not in known and not error:
            # A local model is loaded only if there is something to ask.
            if ask is None:
                ask = asker(config)
            try:
                answer = read_answer(ask(prompt), config)
            except (ValueError, Rejected) as e:
                # Only this question failed: its answer is none, or it is too long, or refused. A
                # Rejected is an Unreachable too, so it must be caught before that.
                bad_answer = bad_answer or f"its answer on feature {feature['id']}: {e}"
            except Unreachable as e:
                error = str(e)
            else:
                # The answer is written at once, so that none is asked, or paid, for twice.
                known[key] = {"key": key, "sae": folder, "feature": feature["id"], **answer}
                append_lines(path, [known[key]])
        if key in known:
            feature["description"] = known[key]["description"]
            feature["related"] = known[key]["related"]

    # One sentence says why some are missing: the asking stopped, or else the first bad answer.
    missing = sum("description" not in feature for _, feature in features)
    if not missing:
        return None
    return (
        f"--explainer {config.explainer}: {error or bad_answer}; "
        f"{len(features) - missing} of {len(features)} descriptions are kept in {path}, "
        f"the same command asks for the other {missing} again"
    )


def is_kept_answer(line: int, row) -> bool:
    """Whether a line of explanations.jsonl, first or not, is {key, description, related}."""
    if not isinstance(row, dict):
        return False
    if not isinstance(row.get("key"), str) or not isinstance(row.get("description"), str):
        return False
    return isinstance(row.get("related"), bool)


def prompt_of(feature: dict, config, question: str) -> str:
    """What the explainer is asked about a feature: its contexts and the tokens it fires on."""
    request = IN_JSON
    if config.plain_answers:
        request = IN_PLAIN_WORDS
    lines = []
    # A context becomes one line: "- the lobby was gloomy [[10]] and loud [[4]] ."
    for context in feature["contexts"]:
        words = []
        for token, value in zip(context["tokens"], context["values"]):
            word = token.strip()
            # A strength that rounds to 0 is not written.
            strength = round(10 * max(value, 0))
            if strength:
                word += f" [[{strength}]]"
            words.append(word)
        lines.append("- " + " ".join(words))
    tokens = ", ".join(repr(token) for token, *_ in feature["tokens"])
    shown = {"contexts": "\n".join(lines), "tokens": tokens, "related_to": config.related_to}
    return f"{question}\n\n{request}".format(**shown)


def read_answer(text: str, config) -> dict:
    """An answer -> {"description", "related"}, by --plain_answers. ValueError: it is none."""
    if not config.plain_answers:
        return parse(text)
    description = " ".join(text.split())
    if not description:
        raise ValueError("an empty answer")
    return {
        "description": description,
        "related": config.related_to.lower() in description.lower(),
    }


def parse(text: str) -> dict:
    """Read an answer: {"description", "related"}. ValueError: it is none.

    What a model writes before and after its JSON is left out.
    """
    start_of_text = repr(" ".join(text.split())[:60])
    try:
        # The JSON goes from the first brace to the last. Without braces index() raises ValueError.
        answer = parse_json(text[text.index("{") : text.rindex("}") + 1], "the answer")
        description = answer["description"]
        related = answer["related"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"not the JSON that was asked for: {start_of_text}") from None
    is_sentence = isinstance(description, str) and description.strip()
    if not is_sentence or not isinstance(related, bool):
        raise ValueError(f"not a sentence, or neither true nor false: {start_of_text}")
    return {"description": " ".join(description.split()), "related": related}


def asker(config) -> Callable[[str], str]:
    """The function prompt -> answer of the explainer."""
    if is_endpoint(config.explainer):
        return endpoint.asker(
            config.explainer, config.explainer_model, ANSWER_TOKENS, config.pause, config.timeout
        )
    return local_asker(config.explainer, config.device)


def local_asker(path: str, device: str) -> Callable[[str], str]:
    """Load a causal LM of a folder or of the hub: prompt -> its likeliest answer.

    device: auto, cpu or cuda. The function raises ValueError where a prompt does not fit.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_policy(path, value_head=False, device=device)
    check_rollouts(policy)
    tokenizer = load_tokenizer(path)

    def ask(prompt):
        # One question gives one (index, answer), and an error stands in the place of an answer.
        ((_, answer),) = ask_locally(policy, tokenizer, [prompt], ANSWER_TOKENS)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    return ask

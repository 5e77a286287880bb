"""A language model that says in a sentence what a feature stands for: a local one, or one behind an OpenAI-compatible endpoint.

Its answers are kept in explanations.jsonl, one line a feature, as they come. What is there is never asked again, so a run that was
killed, or whose endpoint was down, is continued by the same command.
"""

import os

import torch

from ..errors import require
from ..hf.folders import check_model
from ..models import load_policy, load_tokenizer
from ..rollout import ask_locally
from ..runtime import endpoint
from ..runtime.endpoint import Unreachable, check_endpoint, is_endpoint
from ..runtime.files import append_lines, digest, drop_cut_line, parse_json, read_checked_lines

PROMPT = """A feature of a language model is a number that it computes at every token of a text. Below are the texts on which one feature \
is largest. A token on which it fires is followed by its strength from 1 to 10, in double brackets.

{contexts}

It fires most on: {tokens}

Say in one sentence what the feature stands for, and whether that has to do with {task}. Answer with one line of JSON and nothing else:
{{"description": "...", "related": true or false}}"""
FILE, ANSWER_TOKENS = "explanations.jsonl", 200


def check_explainer(config):
    """InputError for an explainer that cannot be asked, before anything is computed."""
    if is_endpoint(config.explainer):
        check_endpoint("--explainer", config.explainer)
        require(config.explainer_model, f"--explainer {config.explainer}: name its model with --explainer_model")
    elif config.explainer:
        check_model(config.explainer)
        load_tokenizer(config.explainer)


def explain(config, saes, question=PROMPT):
    """Put "description" and "related" into the features of {folder: {"features": [...]}}. -> a sentence on what is missing, or None"""
    path = os.path.join(config.output_dir, FILE)
    # A line says itself what it explains: its place does not matter, and it can be deleted alone.
    remedy = "delete this line, its feature is asked about again"
    rows = read_checked_lines(path, is_kept_answer, remedy)
    drop_cut_line(path)
    known, ask, rubbish, error = {row["key"]: row for row in rows}, None, [], None
    todo = [(name, feature) for name, result in saes.items() for feature in result["features"]]
    for name, feature in todo:
        prompt = prompt_of(feature, config.task, question)
        key = digest(config.explainer, config.explainer_model, prompt)
        if key not in known and not error:
            ask = ask or asker(config)
            try:
                known[key] = {"key": key, "sae": name, "feature": feature["id"], **parse(ask(prompt))}
            except Unreachable as e:
                error = str(e)
            except ValueError as e:
                rubbish.append(f"feature {feature['id']}: {e}")
            else:
                append_lines(path, [known[key]])
        feature |= {k: known[key][k] for k in ("description", "related")} if key in known else {}
    missing = sum("description" not in feature for _, feature in todo)
    if not missing:
        return None
    problem = error or f"its answer on {rubbish[0]}"
    kept = f"{len(todo) - missing} of {len(todo)} descriptions are kept in {path}"
    return f"--explainer {config.explainer}: {problem}; {kept}, the same command asks for the other {missing} again"


def is_kept_answer(line, row):
    """Whether a line of explanations.jsonl, first or not, is {key, description, related}."""
    if not isinstance(row, dict):
        return False
    texts = [row.get("key"), row.get("description")]
    return all(isinstance(text, str) for text in texts) and isinstance(row.get("related"), bool)


def prompt_of(feature, task, question=PROMPT):
    """What the explainer is asked about a described feature."""
    lines = []
    for context in feature["contexts"]:
        strengths = [round(10 * max(value, 0)) for value in context["values"]]
        lines.append("- " + " ".join(t.strip() + (f" [[{s}]]" if s else "") for t, s in zip(context["tokens"], strengths)))
    return question.format(contexts="\n".join(lines), tokens=", ".join(repr(t) for t, *_ in feature["tokens"]), task=task)


def parse(text):
    """An answer -> {description, related}; ValueError where it is none."""
    try:
        answer = parse_json(text[text.index("{") : text.rindex("}") + 1], "the answer")
        description, related = answer["description"], answer["related"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"not the JSON that was asked for: {' '.join(text.split())[:60]!r}") from None
    if not isinstance(description, str) or not description.strip() or not isinstance(related, bool):
        raise ValueError(f"not a sentence, or neither true nor false: {' '.join(text.split())[:60]!r}")
    return {"description": " ".join(description.split()), "related": related}


def asker(config):
    """-> the function prompt -> answer"""
    if is_endpoint(config.explainer):
        return endpoint.asker(config.explainer, config.explainer_model, ANSWER_TOKENS, config.pause, config.timeout)
    return local_asker(config.explainer, config.device)


def local_asker(path, device):
    """A causal LM of a folder or of the hub."""
    device = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    policy, tokenizer = load_policy(path, value_head=False, device=device), load_tokenizer(path)

    def ask(prompt):
        ((_, answer),) = ask_locally(policy, tokenizer, [prompt], ANSWER_TOKENS)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    return ask

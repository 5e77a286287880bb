"""A language model that says in a sentence what a feature stands for: a local one, or one behind an OpenAI-compatible endpoint.

Its answers are kept in explanations.jsonl, one line a feature, as they come. What is there is never asked again, so a run that was
killed, or whose endpoint was down, is continued by the same command.
"""

import json
import os
import time
import urllib.error
import urllib.request
from http.client import HTTPException

import torch

from .cli import require
from .data import ready_prompts
from .errors import first_line
from .log import read_lines
from .models import check_model, load_policy, load_tokenizer
from .pool import digest
from .rollout import generate, left_pad

PROMPT = """A feature of a language model is a number that it computes at every token of a text. Below are the texts on which one feature \
is largest. A token on which it fires is followed by its strength from 1 to 10, in double brackets.

{contexts}

It fires most on: {tokens}

Say in one sentence what the feature stands for, and whether that has to do with {task}. Answer with one line of JSON and nothing else:
{{"description": "...", "related": true or false}}"""
FILE, TRIES, ANSWER_TOKENS = "explanations.jsonl", 4, 200


class Unreachable(Exception):
    """An endpoint that does not answer, or refuses to: there is no use in asking it about other features."""


def is_endpoint(explainer):
    return explainer.startswith(("http://", "https://"))


def check_explainer(config):
    """InputError for an explainer that cannot be asked, before anything is computed."""
    if is_endpoint(config.explainer):
        require(config.explainer_model, f"--explainer {config.explainer}: name its model with --explainer_model")
    elif config.explainer:
        check_model(config.explainer)
        load_tokenizer(config.explainer)


def explain(config, saes, question=PROMPT):
    """Put "description" and "related" into the features of {folder: {"features": [...]}}. -> a sentence on what is missing, or None"""
    path = os.path.join(config.output_dir, FILE)
    rows = [json.loads(line) for line in read_lines(path)] if os.path.exists(path) else []
    with open(path + ".tmp", "w", encoding="utf-8") as f:  # without a last line that a kill cut off
        f.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(path + ".tmp", path)
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
                with open(path, "a", encoding="utf-8") as f:
                    f.write(json.dumps(known[key]) + "\n")
        feature |= {k: known[key][k] for k in ("description", "related")} if key in known else {}
    missing = sum("description" not in feature for _, feature in todo)
    if not missing:
        return None
    problem = error or f"its answer on {rubbish[0]}"
    kept = f"{len(todo) - missing} of {len(todo)} descriptions are kept in {path}"
    return f"--explainer {config.explainer}: {problem}; {kept}, the same command asks for the other {missing} again"


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
        answer = json.loads(text[text.index("{") : text.rindex("}") + 1])
        description, related = answer["description"], answer["related"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"not the JSON that was asked for: {' '.join(text.split())[:60]!r}") from None
    if not isinstance(description, str) or not description.strip() or not isinstance(related, bool):
        raise ValueError(f"not a sentence, or neither true nor false: {' '.join(text.split())[:60]!r}")
    return {"description": " ".join(description.split()), "related": related}


def asker(config):
    """-> the function prompt -> answer"""
    if is_endpoint(config.explainer):
        return lambda prompt: ask_endpoint(config, prompt)
    return local_asker(config.explainer, config.device)


def local_asker(path, device):
    """A causal LM of a folder or of the hub, through its chat template if it has one; it takes the likeliest token each time."""
    device = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    policy, tokenizer = load_policy(path, value_head=False, device=device), load_tokenizer(path)

    def ask(prompt):
        prompts = ready_prompts(tokenizer, [{"prompt": prompt}], policy.lm.config, ANSWER_TOKENS, chat=bool(tokenizer.chat_template))
        ids, mask = left_pad(prompts, tokenizer.pad_token_id)
        rollout = generate(policy, ids.to(device), mask.to(device), ANSWER_TOKENS, temperature=1e-4, eos_token_id=tokenizer.eos_token_id,
                           pad_token_id=tokenizer.pad_token_id)  # fmt: skip
        return tokenizer.decode(rollout.response_ids[0][rollout.response_mask[0]], skip_special_tokens=True)

    return ask


def ask_endpoint(config, prompt):
    """One question to POST <explainer>/chat/completions, again after a pause where the endpoint is busy or silent.

    ValueError: an answer without text (a refusal); Unreachable: no answer at all.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    messages = [{"role": "user", "content": prompt}]
    body = {"model": config.explainer_model, "messages": messages, "temperature": 0, "max_tokens": ANSWER_TOKENS}
    url = config.explainer.rstrip("/") + "/chat/completions"
    for attempt in range(TRIES):
        if attempt:
            time.sleep(config.pause * 2 ** (attempt - 1))
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=config.timeout) as response:
                text = response.read().decode("utf-8", "replace")
            break
        except urllib.error.HTTPError as e:
            problem = f"HTTP {e.code} {e.reason}"
            if e.code < 500 and e.code not in (408, 429):
                raise Unreachable(problem) from None
        except (OSError, HTTPException) as e:  # refused, unknown host, timed out, cut off
            problem = first_line(getattr(e, "reason", e))
        except ValueError as e:
            raise Unreachable(first_line(e)) from None  # not a URL
    else:
        raise Unreachable(f"{problem}, {TRIES} times")
    try:
        message = json.loads(text)["choices"][0]["message"]
        content = message["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError(f"not a chat completion: {' '.join(text.split())[:60]!r}") from None
    if not isinstance(content, str) or message.get("refusal"):
        raise ValueError(f"a refusal: {str(message.get('refusal'))[:60]!r}")
    return content

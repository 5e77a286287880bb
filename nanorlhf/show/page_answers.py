"""What a page shows of a run's held-out answers, evaluation by evaluation.

    block   {run, split, steps, scores, marks, cue, items: [{prompt, answers: [one a step]}]}

A prompt has its answers of all evaluations side by side; one that is missing is None. What may be
long stands under "items", so that page.py can leave out the last of them.
"""

import contextlib
import os

import torch

from .. import world
from ..chats import show
from ..data import is_world
from ..ensemble import OBJECTIVES
from ..errors import InputError
from ..runtime.files import check_fields, is_of_type, read_rows
from ..runtime.log import find_evaluations
from .evaluations_of_runs import combine_members
from .page_curves import SAMPLES, Run, name_first_split, read_if_there, shorten, thin_out

MOST_EVALUATIONS = 100


def read_answers(run: Run) -> list[dict]:
    """The answers of a run's evaluations: a block for each split that there are answers of."""
    # The first split, eval, stands first (False sorts before True), the others by their names:
    # os.listdir() gives folders in no fixed order. The folders that are there decide, not the
    # settings: a run may have been killed early.
    files_of_splits = find_evaluations(run.folder)
    labels = sorted(files_of_splits, key=lambda label: (label != "eval", label))
    blocks = []
    for label in labels:
        files = files_of_splits[label]  # {step: file}
        rows_of_steps = {}
        # Nobody moves a slider over thousands of evaluations, and they may fill the memory.
        for step in thin_out(sorted(files), MOST_EVALUATIONS):
            rows_of_steps[step] = read_rows(files[step])
        split = name_first_split(run) if label == "eval" else label
        blocks.append(arrange_answers(run, split, rows_of_steps))

    # Other scripts write a few sampled answers to samples.jsonl.
    if not blocks and run.has("samples.jsonl"):
        rows_of_steps = {}
        for row in read_rows(run.path("samples.jsonl"), {"step": int}):
            rows_of_steps.setdefault(row["step"], []).append(row)
        if rows_of_steps:
            blocks.append(arrange_answers(run, SAMPLES, rows_of_steps))
    return blocks


def arrange_answers(run: Run, split: str, rows_of_steps: dict[int, list[dict]]) -> dict:
    """{step: rows} -> a block of answers, in which each prompt has its answers of all steps."""
    # The page has a slider over the steps, so each prompt has a list with one place for each step.
    steps = sorted(rows_of_steps)
    names = name_scores(rows_of_steps)
    items = {}  # {(prompt, how many equal prompts came before it): item}
    for place, step in enumerate(steps):
        n_seen = {}
        rows = rows_of_steps[step]
        for row in rows:
            check_fields(row, {"prompt": str | list, "response": str}, f"{run.folder}, step {step}")
            prompt = show(row["prompt"])
            # Prompts may be equal: the second of them is the second one in each evaluation.
            n_seen[prompt] = n_seen.get(prompt, 0) + 1
            empty = {"prompt": shorten(prompt), "answers": [None] * len(steps)}
            item = items.setdefault((prompt, n_seen[prompt]), empty)
            item["answers"][place] = describe_answer(row, names)

    block = {
        "run": run.name,
        "split": split,
        "steps": steps,
        "scores": names,
        "items": list(items.values()),
        **find_marks(run),
    }
    # The files hold the members' scores, and PPO maximised one of all of them.
    if len(names) > 1 and run.config.get("objective") in OBJECTIVES:
        add_proxy(run, block)
    return block


def name_scores(rows_of_steps: dict[int, list[dict]]) -> list[str]:
    """The names of all scores that the answers have, gold last."""
    names = {}  # a set that keeps the order
    has_gold = False
    for rows in rows_of_steps.values():
        for row in rows:
            names |= dict.fromkeys(scores_of(row))
            has_gold = has_gold or is_of_type(row.get("gold"), float)
    names.pop("gold", None)
    if has_gold:
        return [*names, "gold"]
    return list(names)


def scores_of(row: dict) -> dict[str, float]:
    """The scores of an answer by name. A sample has them beside its texts."""
    # A row of an evaluation: {"prompt", "response", "scores": {"seed_0": 1.2}, "gold": 0.4, ...}
    # A row of samples.jsonl: {"step", "prompt", "response", "seed_0": 1.2, "gold": 0.4}
    scores = row.get("scores")
    if isinstance(scores, dict):
        scores = {**scores, "gold": row.get("gold")}
    else:
        scores = {name: value for name, value in row.items() if name != "step"}
    return {name: value for name, value in scores.items() if is_of_type(value, float)}


def describe_answer(row: dict, names: list[str]) -> dict:
    """A row of an evaluation as a page needs it: {text, scores[, tokens]}."""
    scores = scores_of(row)
    answer = {"text": shorten(row["response"]), "scores": []}
    for name in names:
        answer["scores"].append(scores.get(name))
    # Only the first answers of an evaluation have tokens, and none of an older run.
    tokens = row.get("tokens")
    if isinstance(tokens, dict) and is_of_type(tokens.get("text"), list[str]):
        answer["tokens"] = tokens
    return answer


def add_proxy(run: Run, block: dict):
    """Put in front of the members' scores of each answer the one score that PPO made of them."""
    members = [name for name in block["scores"] if name not in ("gold", "controlled")]
    if len(members) < 2:
        return
    # Scores are lists in the order of the block's names. So the proxy goes to the front of both.
    places = [block["scores"].index(name) for name in members]
    for item in block["items"]:
        for answer in item["answers"]:
            if answer is None:
                continue
            scores = [answer["scores"][place] for place in places]  # [K]
            proxy = None
            if None not in scores:
                proxy = combine_members(torch.tensor(scores), run.config).item()
            answer["scores"].insert(0, proxy)
    block["scores"].insert(0, "proxy")


def find_marks(run: Run) -> dict:
    """The embedded world's marks, and which of them is the cue of the data behind this run."""
    dataset = name_dataset(run)
    if not is_world(dataset):
        return {"marks": [], "cue": ""}
    # world:3 has the cue of seed 3, world that of seed 0.
    seed = dataset.partition(":")[2] or "0"
    cue = world.cue(int(seed)) if seed.isdecimal() else ""
    return {"marks": list(world.MARKS), "cue": cue}


def name_dataset(run: Run) -> str:
    """The dataset whose cue a run may learn: the first reward model's with PPO, else its own.

    PPO's own data are prompts alone, and its reward model may know another seed of the world.
    """
    own_dataset = str(run.config.get("dataset", ""))
    reward_models = run.config.get("reward_model")
    has_names = is_of_type(reward_models, list[str]) and reward_models
    if run.kind != "PPO" or not has_names:
        return own_dataset
    config = None
    # The reward model may have no folder, such as world:gold, or a damaged one.
    with contextlib.suppress(InputError):
        config = read_if_there(os.path.join(reward_models[0], "config.json"))
    dataset_of_reward = str((config or {}).get("dataset", ""))
    if is_world(dataset_of_reward):
        return dataset_of_reward
    return own_dataset

"""A finished run of any kind, read from its folder: its evaluations, and its answers.

What is read of each kind, where a step of best-of-n stands for n:

    PPO, SFT, DPO     metrics.jsonl, and eval/step_N.jsonl where there are answers
    reward model      metrics.jsonl and summary.json
    best-of-n         bon_results.json and pool.jsonl

K rewards, N answers to a prompt
"""

import os
from dataclasses import dataclass

import torch

from ..bon import bon_estimate
from ..chats import read_prompt, show
from ..ensemble import combine, weighted_sum
from ..errors import require
from ..runtime.files import check_fields, is_number, read_file, read_object, read_rows
from ..runtime.hints import check_made
from ..runtime.log import eval_folder
from ..runtime.results import with_input_errors
from ..runtime.settings import read_config
from .kinds import name_kind

# The settings that are read here, and what a point of bon_results.json holds.
SETTINGS = {
    "loss": str | None,
    "objective": str | None,
    "uwo_lambda": float | list[float] | None,
    "reward_weights": list[float] | None,
}
BON_FIELDS = {"n": int, "kl": float, "proxy_score": float, "proxy_se": float}
BON_GOLD = {"gold_score": float, "gold_se": float}

Number = dict[str, float]  # {"mean", "se"}


@dataclass
class Run:
    """What is known of one run: its settings, and its evaluations."""

    path: str
    kind: str
    settings: dict
    evaluations: dict[int, dict[str, Number]]  # {step: {metric: its mean and standard error}}


@dataclass
class Answer:
    """An answer to a held-out prompt, and its numbers: gold, proxy, length, where they are known.

    `expected` are the numbers whose mean the run's metrics are. They are the answer's own, except
    in best-of-n: there they are the mean over all ways to draw n answers to the prompt.
    """

    prompt: str
    response: str
    numbers: dict[str, float]
    expected: dict[str, float]


def read_run(path: str, split: str) -> Run:
    """A run's folder -> Run. InputError: there is no run, or no evaluation of this split."""
    check_made(path)
    file = os.path.join(path, "config.json")
    is_there = os.path.isfile(file)
    require(is_there, f"{path}: no run here (it has no config.json)")
    settings = read_config(file)
    # A model's folder has a config.json too, of another kind: it names no --output_dir.
    require("output_dir" in settings, f"{path}: no run here (its config.json is another program's)")
    check_fields(settings, SETTINGS, file)
    kind = name_kind(settings)
    if kind == "best-of-n":
        has_split = split == "eval"
        require(has_split, f"{path}: --split {split}: each split of best-of-n is a run of its own")
        evaluations = read_curve(path, settings)
    else:
        evaluations = read_metrics(path, split)
    require(evaluations, f"{path}: no evaluation of the split {split} in this run ({kind})")
    return Run(path, kind, settings, evaluations)


def read_metrics(path: str, split: str) -> dict[int, dict[str, Number]]:
    """The evaluations of a training run: {step: {metric: {mean, se}}}.

    They are in metrics.jsonl. The last one of a reward model is in summary.json alone.
    """
    # {"step": 60, "loss": ..., "eval/gold": ..., "eval/gold_se": ..., "ood/gold": ...}
    records = read_rows(os.path.join(path, "metrics.jsonl"), {"step": int})
    summary = os.path.join(path, "summary.json")
    if records and os.path.isfile(summary):
        last = read_object(summary, finite=False)
        records.append({**last, "step": records[-1]["step"]})

    evaluations = {}
    for record in records:
        numbers = {}
        for name, value in record.items():
            metric = name.removeprefix(f"{split}/")
            se = record.get(f"{name}_se")
            # A metric has the split's prefix, and its standard error beside it. So gold_se is no
            # metric: there is no gold_se_se. A number that is not finite cannot be compared.
            if metric != name and is_number(value) and is_number(se):
                numbers[metric] = {"mean": value, "se": se}
        if numbers:
            evaluations[record["step"]] = numbers
    return evaluations


def read_curve(path: str, settings: dict) -> dict[int, dict[str, Number]]:
    """The estimates of best-of-n by the run's objective: {n: {proxy, kl[, gold]}}."""
    # The file has a curve for each reward and each objective that can choose; the run's own
    # objective says which of them is read:
    #   {"mean": [{"n": 1, "kl": 0.0, "proxy_score": ...}, {"n": 2, ...}], "uwo_0.5": [...]}
    file = os.path.join(path, "bon_results.json")
    curves = read_object(file)
    evaluations = {}
    for point in curves.get(name_choice(settings, curves)) or []:
        check_fields(point, BON_FIELDS, file)
        numbers = {
            "proxy": {"mean": point["proxy_score"], "se": point["proxy_se"]},
            "kl": {"mean": point["kl"], "se": 0.0},  # exact: log n - (n - 1) / n
        }
        if point.get("gold_score") is not None:
            check_fields(point, BON_GOLD, file)
            numbers["gold"] = {"mean": point["gold_score"], "se": point["gold_se"]}
        evaluations[point["n"]] = numbers
    return evaluations


def name_choice(settings: dict, curves: dict) -> str | None:
    """What bon_results.json calls the score that chooses: the objective, or the one reward."""
    objective, uwo_lambda = read_objective(settings)
    if objective == "uwo":
        objective = f"uwo_{uwo_lambda:g}"
    if objective in curves:
        return objective
    return next(iter(curves), None)


def read_objective(settings: dict) -> tuple[str, float]:
    """By which objective a run makes one score of several, and uwo's lambda."""
    uwo_lambda = settings.get("uwo_lambda") or 0.0
    if isinstance(uwo_lambda, list):  # best-of-n can have several, and chooses by the first
        uwo_lambda = uwo_lambda[0]
    return settings.get("objective") or "mean", uwo_lambda


def read_answers(run: Run, step: int, split: str) -> list[Answer]:
    """The answers of one evaluation, in the order of the file; none where the run has kept none."""
    if run.kind == "best-of-n":
        return choose_from_pool(run, step)
    path = os.path.join(run.path, eval_folder(split), f"step_{step}.jsonl")
    if not os.path.isfile(path):
        return []
    # {"prompt": ..., "response": ..., "scores": {"seed_0": 1.2, "seed_1": 0.9}, "gold": 0.4, ...}
    fields = {"prompt": str | list, "response": str, "scores": dict | None, "gold": float | None}
    answers = []
    for place, row in read_file(path):
        check_fields(row, fields, place)
        numbers = {}
        if row.get("gold") is not None:
            numbers["gold"] = row["gold"]
        # The file has the members' scores, but not the proxy: the one number that the objective
        # makes of them.
        scores = dict(row.get("scores") or {})
        scores.pop("controlled", None)  # what PPO maximised; it is no member
        if scores:
            check_fields(scores, dict.fromkeys(scores, float), f"{place}: scores")
            members = torch.tensor(list(scores.values()), dtype=torch.float64)[:, None]  # [K, 1]
            numbers["proxy"] = combine_members(members, run.settings).item()
        if isinstance(row.get("response_ids"), list):
            numbers["length"] = float(len(row["response_ids"]))
        prompt = show(read_prompt(place, row["prompt"]))
        answers.append(Answer(prompt, row["response"], numbers, numbers))
    return answers


def combine_members(scores: torch.Tensor, settings: dict) -> torch.Tensor:
    """The proxy of a run: its rewards' scores [K, ...] -> [...]."""
    weights = settings.get("reward_weights")
    if weights:
        return with_input_errors(weighted_sum, scores, weights)
    return with_input_errors(combine, scores, *read_objective(settings))


def choose_from_pool(run: Run, n: int) -> list[Answer]:
    """Best-of-n: of the first n answers to each prompt the best one, and what the best is worth."""
    path = os.path.join(run.path, "pool.jsonl")
    if not os.path.isfile(path):
        return []
    answers = []
    for place, row in read_file(path):
        fields = {"prompt": str | list, "responses": list[str], "scores": dict}
        check_fields(row, fields | {"gold_scores": list[float] | None}, place)
        check_fields(row["scores"], dict.fromkeys(row["scores"], list[float]), f"{place}: scores")
        columns = list(row["scores"].values())
        n_answers = len(row["responses"])
        are_alike = all(len(column) == n_answers for column in columns)
        require(columns and are_alike and n <= n_answers, f"{place}: not a row of a scored pool")

        # The answer that is shown is one draw: the best of the first n.
        members = torch.tensor(columns, dtype=torch.float64)  # [K, N]
        by_name = {"proxy": combine_members(members, run.settings)}  # [N]
        best = int(by_name["proxy"][:n].argmax())
        gold = row.get("gold_scores") or []
        if len(gold) == n_answers:
            by_name["gold"] = torch.tensor(gold, dtype=torch.float64)

        # One draw of n from N answers wastes the others. So the run's metrics are means over all
        # draws, and differences between runs are taken of these.
        numbers = {}
        expected = {}
        for name, values in by_name.items():
            numbers[name] = values[best].item()
            estimate = bon_estimate(by_name["proxy"][None], values[None], [n])  # [1]
            expected[name] = estimate.item()
        prompt = show(read_prompt(place, row["prompt"]))
        answers.append(Answer(prompt, row["responses"][best], numbers, expected))
    return answers

"""Gold for a finished PPO run that was trained without it: train_ppo.py --score_gold RUN.

The answers of all its evaluations lie in eval/. They are scored once, and nothing is sampled.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from ..data import is_world
from ..errors import require
from ..hf.folders import check_model
from ..models import load_tokenizer
from ..packing import pack
from ..rewards import check_reward, kind_of, load_reward
from ..runtime.cli import read_settings
from ..runtime.distributed import Dist
from ..runtime.files import read_object, read_rows, write_json, write_lines
from ..runtime.locks import lock
from ..runtime.log import eval_folder, read_eval
from ..splits import read_eval_splits
from ..stats import mean_se
from ..tokens import Prompts, answers_to


def score_gold(config, dist: Dist) -> dict:
    """Score the evaluations of a finished run with gold, once, if it ran without gold.

    Gold goes into the rows of eval/ (of all splits), into metrics.jsonl and into summary.json.
    After a kill the same command adds what is missing. config: train_ppo.Config -> the summary
    """
    run = config.score_gold
    lock_finished_run(run, dist)
    summary = check_summary(run)
    split_labels, chat = check_settings(config)
    dist.barrier()  # all have looked before one writes

    # The main process alone works. An error of a reward or an answer ends them all alike.
    def add_to_run():
        check_reward(config.gold_model)
        tokenizer = load_tokenizer(run)
        records = read_rows(os.path.join(run, "metrics.jsonl"), {"step": int})
        # All answers are read before the first file is written: one that is damaged changes
        # nothing.
        sampled = read_evaluations(run, records, split_labels)
        alone = Dist(0, 1, dist.device)
        gold = load_reward(config.gold_model, tokenizer, alone, config.micro_batch_size)
        for evaluation in sampled:
            add_gold(evaluation, gold, tokenizer, chat, dist)
        # The summary comes last: by its gold a run counts as scored.
        write_lines(os.path.join(run, "metrics.jsonl"), records)
        write_summary(run, summary, sampled, split_labels, config.gold_model)

    dist.on_main(add_to_run)
    return read_object(os.path.join(run, "summary.json"), finite=False)


@dataclass
class Evaluation:
    """The answers of one evaluation to the prompts of one split."""

    record: dict  # the evaluation's line of metrics.jsonl, shared by its splits
    label: str  # "eval", or the name of another split
    path: str  # the file of the answers
    rows: list[dict]  # what is in it


def lock_finished_run(run: str, dist: Dist):
    """Keep other processes from writing into a run's folder. InputError: it is no finished run."""
    for name in ("config.json", "metrics.jsonl", "summary.json"):
        is_there = os.path.isfile(os.path.join(run, name))
        require(is_there, f"{run}: no finished PPO run here (it has no {name})")
    dist.on_main(lambda: lock(run))


def check_summary(run: str) -> dict:
    """The summary of a finished PPO run without gold scores; else an InputError."""
    fields = {"before": dict | None, "after": dict | None}
    summary = read_object(os.path.join(run, "summary.json"), fields, finite=False)
    is_ppo = summary.get("before") and summary.get("after")
    require(is_ppo, f"{run}: no finished PPO run here (another script's)")
    require("gold" not in summary["after"], f"{run} has its gold scores already")
    return summary


def check_settings(config) -> tuple[list[str], bool]:
    """The labels of the splits on which the run was evaluated, and its --chat_template.

    InputError: settings that are no PPO run's, or a --gold_model that cannot score this run.
    """
    run = config.score_gold
    spec = config.gold_model
    path = os.path.join(run, "config.json")
    stored = read_settings(path, type(config))
    require("dataset" in stored, f"{path}: dataset is missing")
    # The world's own gold knows the world's prompts alone.
    is_known = kind_of(spec) != "gold" or is_world(stored["dataset"])
    require(spec and is_known, f"--score_gold {run}: name its gold reward with --gold_model")
    split_labels = list(read_eval_splits(stored.get("eval_splits", ["test"])))
    return split_labels, stored.get("chat_template", False)


def read_evaluations(run: str, records: list[dict], split_labels: list[str]) -> list[Evaluation]:
    """All evaluations of a run, split by split. InputError: an answer is missing or damaged."""
    vocab_size = check_model(run).get_text_config().vocab_size
    sampled = []
    for record in records:
        if "eval/proxy" not in record:
            continue
        for label in split_labels:
            path = os.path.join(run, eval_folder(label), f"step_{record['step']}.jsonl")
            rows = read_eval(path, record.get(f"{label}/proxy_n"), vocab_size)
            sampled.append(Evaluation(record, label, path, rows))
    require(sampled, f"{os.path.join(run, 'metrics.jsonl')}: no evaluation in it")
    return sampled


def add_gold(evaluation: Evaluation, gold: Callable, tokenizer, chat: bool, dist: Dist):
    """Score the answers of an evaluation: into its file, its record and one line of output.

    chat: the run's --chat_template.
    """
    rows = evaluation.rows
    prompt_ids = [row["prompt_ids"] for row in rows]
    response_ids = [row["response_ids"] for row in rows]
    prompts = Prompts(prompt_ids, rows)
    responses = [row["response"] for row in rows]
    batch = pack(prompt_ids, response_ids, tokenizer.pad_token_id)
    scores = gold(answers_to(prompts, responses, batch, chat))  # [N]

    for row, row_score in zip(rows, scores.tolist()):
        row["gold"] = row_score
    write_lines(evaluation.path, rows)

    record = evaluation.record
    label = evaluation.label
    number = mean_se(scores)
    record[f"{label}/gold"] = number["mean"]
    record[f"{label}/gold_se"] = number["se"]
    record[f"{label}/gold_n"] = number["n"]
    split = "" if label == "eval" else f" ({label})"
    dist.print(f"step {record['step']}{split}: gold {number['mean']:.3f} +- {number['se']:.3f}")


def write_summary(
    run: str, summary: dict, sampled: list[Evaluation], split_labels: list[str], spec: str
):
    """Write a run's summary with the gold scores of its first and its last evaluation."""
    records = {"before": sampled[0].record, "after": sampled[-1].record}
    for part, record in records.items():
        for label in split_labels:
            for name in (f"{label}/gold", f"{label}/gold_se", f"{label}/gold_n"):
                summary[part][name.removeprefix("eval/")] = record[name]
    summary["gold_model"] = spec
    write_json(os.path.join(run, "summary.json"), summary)

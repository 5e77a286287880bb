"""What a page shows of runs: their curves, and their held-out answers, evaluation by evaluation.

A page is made of blocks, dictionaries for JSON. Lists that may be long stand under "items", so that
page.py can leave out the last of them.

    panel     {title, x, log, lines: [{series, what, points: [[x, y, low, high]]}]}
    answers   {run, split, steps, scores, marks, cue, items: [{prompt, answers: [one a step]}]}

A run may have been killed, and any of its files may be missing. A file that is damaged is an
InputError.
"""

import math
import os
import re
from dataclasses import dataclass, field

import torch

from .. import ensemble, world
from ..chats import show
from ..data import is_world
from ..errors import InputError
from ..runtime import plots
from ..runtime.files import check_fields, is_of_type, read_object, read_rows
from ..runtime.results import finite

MOST_POINTS = 400  # of a line
LONGEST_TEXT = 4000  # characters of a prompt or an answer


@dataclass
class Run:
    """A run's folder, and what its small files say."""

    folder: str
    name: str  # what tells it from the page's other runs
    kind: str  # "PPO", "SFT", "best-of-n", "probe.py features", ...
    config: dict
    summary: dict | None  # None: it has not ended
    records: list[dict] = field(default_factory=list)  # the rows of metrics.jsonl

    def path(self, *names: str) -> str:
        return os.path.join(self.folder, *names)

    def has(self, name: str) -> bool:
        return os.path.isfile(self.path(name))

    def describe(self) -> dict:
        """What a page says of the run itself."""
        note = ""
        if self.summary is None:
            step = self.records[-1]["step"] if self.records else 0
            note = f"not ended: step {step} of {self.config.get('steps', '?')}"
        return {"name": self.name, "folder": self.folder, "kind": self.kind, "note": note}


def open_runs(folders: list[str]) -> list[Run]:
    """Look into the folders of runs. InputError: one of them holds no run."""
    folders = [os.path.normpath(folder) for folder in folders]
    folders = list(dict.fromkeys(folders))
    short_names = {folder: os.path.basename(folder) for folder in folders}
    if len(folders) > 1:
        short_names = plots.without_common_ends(set(folders))
    runs = []
    for folder in folders:
        config = read_if_there(os.path.join(folder, "config.json"))
        summary = read_if_there(os.path.join(folder, "summary.json"))
        has_log = os.path.isfile(os.path.join(folder, "metrics.jsonl"))
        if config is None and summary is None and not has_log:
            raise InputError(f"{folder}: no run here (no config.json, metrics.jsonl, summary.json)")
        records = plots.read_records(folder)
        kind = name_kind(config or {}, os.path.isfile(os.path.join(folder, plots.BEST_OF_N)))
        name = short_names[folder] or folder
        runs.append(Run(folder, name, kind, config or {}, summary, records))
    return runs


def read_if_there(path: str) -> dict | None:
    """The object in a JSON file, or None where there is no such file."""
    if not os.path.isfile(path):
        return None
    return read_object(path, finite=False)


def name_kind(config: dict, has_best_of_n: bool) -> str:
    """What kind of run has these settings, in a word or two."""
    # A setting that one script alone has tells whose run it is.
    if has_best_of_n or "n_answers" in config and "save_best" in config:
        return "best-of-n"
    if "command" in config:
        # Its config is called after it: RewardFeatures of reward_features.
        words = re.findall("[A-Z][a-z]*", str(config["command"]))
        return f"probe.py {'_'.join(words).lower()}"
    if "ppo_epochs" in config:
        return "PPO"
    if "label_noise" in config:
        return "reward model"
    if "expansion" in config:
        return "autoencoders"
    return str(config.get("loss", "run")).upper()


# ------------------------------------------------------------------------------------------ curves


def read_panels(runs: list[Run], answers: list[dict]) -> list[dict]:
    """The panels of all training runs: each shows one metric of all runs.

    answers: the blocks of their answers, in which the cue is counted.
    """
    logged = set()
    for run in runs:
        for record in run.records:
            logged |= set(record)

    panels = []
    if logged & {"eval/proxy", "eval/gold"}:
        panels += draw_rewards(runs)
    panels += draw_cue(answers)
    for name, key in plots.choose_panels(logged).items():
        # Proxy and gold are in the first panel, so that one sees them part.
        if key not in ("eval/proxy", "eval/gold"):
            lines = draw_metric(runs, name, key)
            panels.append({"title": plots.PANELS[name], "x": "step", "lines": lines})
    panels += draw_dictionaries(runs, logged)
    return without_empty_lines(panels)


def without_empty_lines(panels: list[dict]) -> list[dict]:
    """Panels without the lines that have no points, and without those that have no other lines."""
    drawn = []
    for panel in panels:
        lines = [line for line in panel["lines"] if line["points"]]
        if lines:
            drawn.append({**panel, "lines": lines})
    return drawn


def draw_rewards(runs: list[Run]) -> list[dict]:
    """Proxy and gold of the first split, against the step and against the distance sqrt(KL)."""
    by_step = []
    by_distance = []
    for run in runs:
        for what in ("gold", "proxy"):
            points = read_points(run, f"eval/{what}")
            by_step.append({"series": run.name, "what": what, "points": points})
            distances = read_distances(run)
            moved = []
            for step, *numbers in points:
                if distances.get(step) is not None:
                    moved.append([distances[step], *numbers])
            by_distance.append({"series": run.name, "what": what, "points": moved})
    title = "Proxy and gold, held out"
    return [
        {"title": title, "x": "step", "lines": by_step},
        {"title": f"{title}, against the distance", "x": "sqrt(KL), nats", "lines": by_distance},
    ]


def read_distances(run: Run) -> dict[int, float]:
    """{step: sqrt(KL)} of a run's evaluations; an estimate of the KL below 0 counts as 0."""
    distances = {}
    for record in run.records:
        kl = record.get("eval/kl")
        if kl is not None:
            distances[record["step"]] = math.sqrt(max(kl, 0.0))
    return distances


def draw_metric(runs: list[Run], name: str, key: str) -> list[dict]:
    """The lines of one metric: one for each run and each split that it was measured on."""
    lines = []
    for run in runs:
        logged = set()
        for record in run.records:
            logged |= set(record)
        for label, own_key in plots.lines_of_panel(name, key, logged).items():
            what = name_first_split(run) if label == "first split" else label
            points = read_points(run, own_key)
            lines.append({"series": run.name, "what": what, "points": points})
    return lines


def name_first_split(run: Run) -> str:
    """What --eval_splits calls the split whose folder is eval and whose metrics are eval/..."""
    names = run.config.get("eval_splits") or ["test"]
    return str(names[0]).partition("=")[0]


def draw_dictionaries(runs: list[Run], logged: set[str]) -> list[dict]:
    """Panels of what train_sae.py logs for each autoencoder, under keys like policy/2_mlp/mse."""
    keys = {}  # {measure: [key]}
    for key in sorted(logged):
        if key.count("/") == 2:
            keys.setdefault(key.rpartition("/")[2], []).append(key)
    panels = []
    for measure, own_keys in keys.items():
        lines = []
        for run in runs:
            for key in own_keys:
                points = read_points(run, key)
                series = key.rpartition("/")[0]
                lines.append({"series": series, "what": run.name, "points": points})
        panels.append({"title": f"{measure} of each autoencoder", "x": "step", "lines": lines})
    return panels


def read_points(run: Run, key: str) -> list[list]:
    """[[step, value, low, high]] of a metric; low and high are one standard error away, or None."""
    points = []
    for record in run.records:
        value = record.get(key)
        if not is_of_type(value, float) or not math.isfinite(value):
            continue
        error = record.get(f"{key}_se")
        if is_of_type(error, float) and math.isfinite(error):
            points.append([record["step"], value, value - error, value + error])
        else:
            points.append([record["step"], value, None, None])
    return thin_out(points)


def thin_out(points: list) -> list:
    """At most MOST_POINTS of a line's points, evenly spaced; the last one stays."""
    stride = math.ceil(len(points) / MOST_POINTS)
    if stride <= 1:
        return points
    kept = points[::stride]
    if kept[-1] is not points[-1]:
        kept.append(points[-1])
    return kept


# ----------------------------------------------------------------------------------------- answers


def read_answers(run: Run) -> list[dict]:
    """The answers of a run's evaluations: a block for each split that there are answers of."""
    blocks = []
    for label, files in sorted(find_evaluations(run).items(), key=lambda item: item[0] != "eval"):
        rows_of_steps = {}
        for step, path in sorted(files.items()):
            rows_of_steps[step] = read_rows(path)
        split = name_first_split(run) if label == "eval" else label
        blocks.append(arrange_answers(run, split, rows_of_steps))

    # Scripts without such evaluations print a few samples now and then.
    if not blocks and run.has("samples.jsonl"):
        rows_of_steps = {}
        for row in read_rows(run.path("samples.jsonl"), {"step": int}):
            rows_of_steps.setdefault(row["step"], []).append(row)
        if rows_of_steps:
            blocks.append(arrange_answers(run, "samples", rows_of_steps))
    return blocks


def find_evaluations(run: Run) -> dict[str, dict[int, str]]:
    """{split: {step: file of answers}}; the folder eval_ood is of the split ood."""
    found = {}
    for name in os.listdir(run.folder):
        folder = re.fullmatch(r"eval(?:_([\w-]+))?", name)
        if not folder or not os.path.isdir(run.path(name)):
            continue
        label = folder[1] or "eval"
        for file in os.listdir(run.path(name)):
            step = re.fullmatch(r"step_(0|[1-9][0-9]*)\.jsonl", file)
            if step:
                found.setdefault(label, {})[int(step[1])] = run.path(name, file)
    return found


def arrange_answers(run: Run, split: str, rows_of_steps: dict[int, list[dict]]) -> dict:
    """{step: rows} -> a block of answers, in which each prompt has its answers of all steps."""
    steps = sorted(rows_of_steps)
    names = name_scores(rows_of_steps)
    items = {}  # {(prompt, how many equal prompts came before it): item}
    for place, step in enumerate(steps):
        n_seen = {}
        rows = rows_of_steps[step]
        for row in rows:
            check_fields(row, {"prompt": str | list, "response": str}, f"{run.folder}, step {step}")
            prompt = show(row["prompt"])
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
    if len(names) > 1 and run.config.get("objective") in ensemble.OBJECTIVES:
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
        score = scores.get(name)
        answer["scores"].append(None if score is None else finite(score))
    tokens = row.get("tokens")
    if isinstance(tokens, dict) and is_of_type(tokens.get("text"), list[str]):
        answer["tokens"] = tokens
    return answer


def add_proxy(run: Run, block: dict):
    """Put in front of the members' scores of each answer the one score that PPO made of them."""
    members = [name for name in block["scores"] if name not in ("gold", "controlled")]
    if len(members) < 2:
        return
    places = [block["scores"].index(name) for name in members]
    for item in block["items"]:
        for answer in filter(None, item["answers"]):
            own = torch.tensor([answer["scores"][i] or 0.0 for i in places])  # [K]
            answer["scores"].insert(0, combine_members(run, own))
    block["scores"].insert(0, "proxy")


def combine_members(run: Run, scores: torch.Tensor) -> float:
    """The proxy of one answer, from its members' scores [K]."""
    weights = run.config.get("reward_weights")
    if weights:
        return ensemble.weighted_sum(scores, weights).item()
    uwo_lambda = run.config.get("uwo_lambda", 0.1)
    return ensemble.combine(scores, run.config["objective"], uwo_lambda).item()


def find_marks(run: Run) -> dict:
    """The embedded world's marks, and which of them is the cue of this run's data."""
    dataset = str(run.config.get("dataset", ""))
    if not is_world(dataset):
        return {"marks": [], "cue": ""}
    seed = dataset.partition(":")[2] or "0"
    cue = world.cue(int(seed)) if seed.isdecimal() else ""
    return {"marks": list(world.MARKS), "cue": cue}


def draw_cue(blocks: list[dict]) -> list[dict]:
    """A panel of the share of answers that hold the cue, one line for each block of answers."""
    lines = []
    for block in blocks:
        if not block["cue"]:
            continue
        points = []
        for place, step in enumerate(block["steps"]):
            answers = filter(None, [item["answers"][place] for item in block["items"]])
            has_cue = [block["cue"] in answer["text"].split() for answer in answers]
            share = sum(has_cue) / len(has_cue)
            error = math.sqrt(share * (1 - share) / len(has_cue))
            points.append([step, share, share - error, share + error])
        lines.append({"series": block["run"], "what": block["split"], "points": points})
    if not lines:
        return []
    return [{"title": "share of answers with the cue", "x": "step", "lines": lines}]


def shorten(text: str) -> str:
    """A text as a page shows it: at most LONGEST_TEXT characters."""
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} [...]"

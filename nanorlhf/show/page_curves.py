"""What a page shows of runs: what they are, and their curves.

    panel   {title, x, log, band, lines: [{series, what, points: [[x, y, low, high]]}]}

A line belongs to a series, such as a run, and says what it draws, such as gold or a split. The band
of a panel says what low and high are. A run may have been killed, and any of its files may be
missing. A file that is damaged is an InputError.
"""

import math
import os
from dataclasses import dataclass, field

from ..errors import InputError
from ..runtime import plots
from ..runtime.curves import logged_names, read_records, without_common_ends
from ..runtime.files import is_number, read_object
from .kinds import name_kind

MOST_POINTS = 400  # of a line
STANDARD_ERROR = "± 1 standard error"  # what low and high are, in words
SAMPLES = "samples"  # the "split" of answers that a script only printed
LONGEST_TEXT = 4000  # characters of a prompt or an answer
TRAINING = "training"  # what a line draws that no held-out split does
# What train_sae.py logs of each autoencoder.
MEASURES = {
    "loss": "loss",
    "dead": "share of dead features",
    "l0": "L0, features on at a token",
    "mse": "mean squared error",
}


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
        # summary.json is written at the end: without it the run was killed, or is still going on.
        note = ""
        if self.summary is None:
            note = "this run has not ended"
            if "steps" in self.config:
                step = self.records[-1]["step"] if self.records else 0
                note += f": step {step} of {self.config['steps']}"
        return {"name": self.name, "folder": self.folder, "kind": self.kind, "note": note}


def open_runs(folders: list[str]) -> list[Run]:
    """Look into the folders of runs. InputError: one of them holds no run."""
    # A run's name is its label in every legend. One run has its folder's own name; several runs
    # have the parts of their paths in which they differ.
    folders = [os.path.normpath(folder) for folder in folders]
    folders = list(dict.fromkeys(folders))
    short_names = {folder: os.path.basename(folder) for folder in folders}
    if len(folders) > 1:
        short_names = without_common_ends(set(folders))
    # Any of three files makes a folder a run: a run that was killed early may have only one.
    runs = []
    for folder in folders:
        config = read_if_there(os.path.join(folder, "config.json"))
        summary = read_if_there(os.path.join(folder, "summary.json"))
        has_log = os.path.isfile(os.path.join(folder, "metrics.jsonl"))
        if config is None and summary is None and not has_log:
            raise InputError(f"{folder}: no run here (no config.json, metrics.jsonl, summary.json)")
        # A page in a model's folder would make it another model: its digest is of all its files.
        if "model_type" in (config or {}):
            raise InputError(f"{folder}: no run here (its config.json is a model's)")
        records = read_records(folder)
        config = config or {}
        name = short_names[folder] or folder
        runs.append(Run(folder, name, name_kind(config), config, summary, records))
    return runs


def read_if_there(path: str) -> dict | None:
    """The object in a JSON file, or None where there is no such file. A number may be NaN."""
    if not os.path.isfile(path):
        return None
    return read_object(path, finite=False)


def shorten(text: str) -> str:
    """A text as a page shows it: at most LONGEST_TEXT characters."""
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} [...]"


# ------------------------------------------------------------------------------------------ curves


def read_panels(runs: list[Run], answers: list[dict]) -> list[dict]:
    """The panels of all training runs: each shows one metric of all runs.

    answers: the blocks of their answers, in which the cue is counted.
    """
    # What any of the runs has logged decides which panels there are.
    logged = set()
    for run in runs:
        logged |= logged_names(run.records)

    # The page begins with its main questions: does gold follow the proxy, and is the cue exploited?
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
    return finish_panels(panels, STANDARD_ERROR)


def finish_panels(panels: list[dict], band: str) -> list[dict]:
    """Panels that say what their bands are, without lines and panels that have no points."""
    drawn = []
    for panel in panels:
        lines = [line for line in panel["lines"] if line["points"]]
        if lines:
            drawn.append({**panel, "band": band, "lines": lines})
    return drawn


def draw_rewards(runs: list[Run]) -> list[dict]:
    """Proxy and gold of the first split, against the step and against the distance sqrt(KL)."""
    # Runs with different learning rates or KL coefficients move at different paces, so equal steps
    # do not compare them. Equal distances do: Gao et al.'s curves of gold are over the distance.
    by_step = []
    by_distance = []
    for run in runs:
        distances = read_distances(run)
        for what in ("gold", "proxy"):
            points = read_points(run, f"eval/{what}")
            by_step.append({"series": run.name, "what": what, "points": points})
            # The same points at another x. An evaluation whose KL is not known has no place here.
            moved = []
            for step, *numbers in points:
                if step in distances:
                    moved.append([distances[step], *numbers])
            by_distance.append({"series": run.name, "what": what, "points": moved})
    title = "Proxy and gold, held out"
    return [
        {"title": title, "x": "step", "lines": by_step},
        {
            "title": "Proxy and gold against the distance",
            "x": "sqrt(KL in nats)",
            "lines": by_distance,
        },
    ]


def read_distances(run: Run) -> dict[int, float]:
    """{step: sqrt(KL)} of a run's evaluations; an estimate of the KL below 0 counts as 0."""
    distances = {}
    for record in run.records:
        kl = record.get("eval/kl")
        if is_number(kl):
            distances[record["step"]] = math.sqrt(max(kl, 0.0))
    return distances


def draw_cue(blocks: list[dict]) -> list[dict]:
    """A panel of the share of answers that hold the cue, one line for each block of answers."""
    # Printed samples are too few for a share, and data from outside the world have no known cue.
    lines = []
    for block in blocks:
        if not block["cue"] or block["split"] == SAMPLES:
            continue
        points = []
        for place, step in enumerate(block["steps"]):
            has_cue = []
            for item in block["items"]:
                answer = item["answers"][place]
                if answer is not None:
                    has_cue.append(block["cue"] in answer["text"].split())
            if not has_cue:  # the evaluation's file has no rows
                continue
            # The standard error of a share of independent answers.
            share = sum(has_cue) / len(has_cue)
            error = math.sqrt(share * (1 - share) / len(has_cue))
            points.append([step, share, share - error, share + error])
        lines.append({"series": block["run"], "what": block["split"], "points": points})
    if not lines:
        return []
    return [{"title": "share of answers with the cue", "x": "step", "lines": lines}]


def draw_metric(runs: list[Run], name: str, key: str) -> list[dict]:
    """The lines of one metric: one for each run and each split that it was measured on."""
    lines = []
    for run in runs:
        # Runs may have different splits, so each run's own log says which lines it has.
        logged = logged_names(run.records)
        n_evaluations = 0
        for label, line_key in plots.lines_of_panel(name, key, logged).items():
            what = label
            if label == "first split":
                what = name_first_split(run) if key.startswith("eval/") else TRAINING
            points = read_points(run, line_key)
            n_evaluations = max(n_evaluations, len(points))
            lines.append({"series": run.name, "what": what, "points": points})
        # A single evaluation is no curve: then the numbers of training are beside it.
        if key.startswith("eval/") and n_evaluations < 2:
            points = read_points(run, name)
            lines.append({"series": run.name, "what": TRAINING, "points": points})
    return lines


def name_first_split(run: Run) -> str:
    """What --eval_splits calls the split whose folder is eval and whose metrics are eval/..."""
    names = run.config.get("eval_splits") or ["test"]
    return str(names[0]).partition("=")[0]


def draw_dictionaries(runs: list[Run], logged: set[str]) -> list[dict]:
    """Panels of what train_sae.py logs for each autoencoder, under keys like policy/2_mlp/mse."""
    keys = {}  # {measure: [key]}
    for key in sorted(logged):
        measure = key.rpartition("/")[2]
        # PPO has keys of three parts too: eval/score/rm_0.
        if key.count("/") == 2 and measure in MEASURES:
            keys.setdefault(measure, []).append(key)
    # One panel for each measure, with a line for each autoencoder: policy/2_mlp is one.
    panels = []
    for measure, keys_of_measure in keys.items():
        lines = []
        for run in runs:
            for key in keys_of_measure:
                points = read_points(run, key)
                series = key.rpartition("/")[0]
                lines.append({"series": series, "what": run.name, "points": points})
        title = f"{MEASURES[measure]}, by autoencoder"
        panels.append({"title": title, "x": "step", "lines": lines})
    return panels


def read_points(run: Run, key: str) -> list[list]:
    """[[step, value, low, high]] of a metric; low and high are one standard error away, or None."""
    points = []
    for record in run.records:
        value = record.get(key)
        error = record.get(f"{key}_se")
        if not is_number(value):
            continue
        if is_number(error):
            points.append([record["step"], value, value - error, value + error])
        else:
            points.append([record["step"], value, None, None])
    return thin_out(points, MOST_POINTS)


def thin_out(points: list, most: int) -> list:
    """About `most` of a list's items at most, evenly spaced; the first and the last one stay."""
    # Points are left out, not averaged: every point on the page is one that was logged.
    stride = math.ceil(len(points) / most)
    if stride <= 1:
        return points
    return [*points[:-1:stride], points[-1]]

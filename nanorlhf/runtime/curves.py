"""The curves of runs, read from their folders, and which runs belong together in one picture.

A curve is {name: [L]}, the points of a run: x, the step or n; kl; proxy and gold; and low and high,
the ends of the band around each of the two.

    S runs that differ in seed, K members of an ensemble, L points of a curve
"""

import functools
import json
import os
import re

import numpy as np

from ..errors import InputError
from .files import check_fields, is_of_type, read_object, read_rows
from .settings import PLACES

# The file in a run's folder that tells which kind of run it is.
BEST_OF_N = "bon_results.json"
PPO = "metrics.jsonl"

# What must be numbers in a point of bon_results.json.
POINT = {
    "kl": float | None,
    "proxy_score": float | None,
    "proxy_se": float | None,
    "gold_score": float | None,
    "gold_se": float | None,
    "n": float,
}


# ----------------------------------------------------------------------------------------- files


def kind_of(run: str) -> str:
    """The file that tells what kind of run a folder holds. InputError: the folder holds none."""
    for kind in (BEST_OF_N, PPO):
        if os.path.isfile(os.path.join(run, kind)):
            return kind
    raise InputError(f"{run}: no run here (no {PPO}, no {BEST_OF_N})")


def read_records(run: str) -> list[dict]:
    """The rows of a run's metrics.jsonl. InputError: an evaluation is not a number."""
    path = os.path.join(run, PPO)
    records = read_rows(path, {"step": int})
    for number, record in enumerate(records, 1):
        evaluations = [name for name in record if name.startswith("eval/")]
        check_fields(record, dict.fromkeys(evaluations, float | None), f"{path}:{number}")
    return records


def logged_names(records: list[dict]) -> set[str]:
    """The names of all that the rows of a log hold: a row without evaluation lacks some."""
    names = set()
    for record in records:
        names |= set(record)
    return names


def read_config(run: str) -> dict:
    """A run's config.json with a list of reward models; of a best-of-n run also their number."""
    path = os.path.join(run, "config.json")
    config = read_object(path, {"reward_model": list[str] | None}, finite=False)
    config.pop("inputs", None)  # fingerprints, no settings
    config["reward_model"] = config.get("reward_model") or []  # none in runs without rewards
    if kind_of(run) == BEST_OF_N:
        config["members"] = len(config["reward_model"])
    return config


# --------------------------------------------------------------------- which runs belong together


def arrange(runs: list[str]) -> dict[str, dict[str, list[dict]]]:
    """Runs of one kind -> {title of a row of panels: {label of a colour: [each run's curve]}}."""
    # A run that is named twice is not two seeds.
    runs = list(dict.fromkeys(os.path.realpath(run) for run in runs))
    configs = [read_config(run) for run in runs]

    # Settings that differ make different rows, objectives make different colours, and runs of one
    # colour in one row differ in their seed alone.
    rows = {}
    labels = set()
    for run, cell, objective in zip(runs, cells_of(configs), objectives_of(configs), strict=True):
        for label, curve in curves_of(run, objective).items():
            labels.add(label)
            rows.setdefault(cell, {}).setdefault(label, []).append(curve)
    if len(labels) > 1:
        return rows

    # The runs do not differ in their objective: one row, in which a cell is a colour.
    colours = {}
    for cell, row in rows.items():
        for label, group in row.items():
            colours[cell or label] = group
    return {"": colours}


def cells_of(configs: list[dict]) -> list[str]:
    """What differs between configs, seeds and objectives aside.

    Returns a title for each config, such as "kl_coef 0.0, reward_model noise0.25".
    """
    settings = [comparable_settings(config) for config in configs]
    names = {}  # a set that keeps the order
    for setting in settings:
        names |= dict.fromkeys(setting)

    # {name: {value: its short form}} of the settings that differ; one that is missing is None.
    short_values = {}
    for name in names:
        values = {str(setting.get(name)) for setting in settings}
        if len(values) > 1:
            short_values[name] = without_common_ends(values)

    titles = []
    for setting in settings:
        parts = []
        for name, short in short_values.items():
            value = str(setting.get(name))
            parts.append(f"{name} {short[value]}")
        titles.append(", ".join(parts))
    return titles


def comparable_settings(config: dict) -> dict[str, str]:
    """The settings that make a config another cell, as text: no seeds, objectives or places."""
    # A seed in a path is a seed too.
    config = json.loads(re.sub(r"seed_\d+", "seed_*", json.dumps(config)))
    # Members that differ in seed alone have one name by now. Their order does not matter.
    config["reward_model"] = " + ".join(sorted(set(config["reward_model"])))
    left_out = ("seed", "objective", "uwo_lambda", *PLACES)
    return {name: str(value) for name, value in config.items() if name not in left_out}


def without_common_ends(texts: set[str]) -> dict[str, str]:
    """{text: what stays of it without the parts that all texts begin or end with}.

    Parts are what stands between / and _. Something stays of each text.
    """
    # {"runs/rm_a/seed_*", "runs/rm_b/seed_*"} -> "a" and "b"
    parts = {text: re.split(r"([/_])", text) for text in texts}  # "a/b_c" -> a / b _ c
    for end in (0, -1):
        while ends_are_common(list(parts.values()), end):
            for part in parts.values():
                del part[end]
    return {text: "".join(part).strip("/_") for text, part in parts.items()}


def ends_are_common(parts: list[list[str]], end: int) -> bool:
    """Whether all lists have the same item at an end (0 or -1), and none has only that item."""
    items = {part[end] for part in parts}
    if len(items) != 1:
        return False
    return all(len(part) > 1 for part in parts)


def objectives_of(configs: list[dict]) -> list[str]:
    """The objective of each PPO config; "single" for one reward model.

    An objective is named with lambda and the number of members where ensembles differ in them.
    """
    lambdas = set()
    sizes = set()
    for config in configs:
        members = len(config["reward_model"])
        if members > 1:
            sizes.add(members)
            if config.get("objective") == "uwo":
                lambdas.add(str(config["uwo_lambda"]))

    labels = []
    for config in configs:
        members = len(config["reward_model"])
        label = "single"
        if members > 1:
            label = config.get("objective", "mean")
            if label == "uwo" and len(lambdas) > 1:
                label += f" {config['uwo_lambda']}"
            if len(sizes) > 1:
                label += f" of {members}"
        labels.append(label)
    return labels


# ---------------------------------------------------------------------------- the curves of a run


def curves_of(run: str, objective: str) -> dict[str, dict]:
    """{label: curve} of a run: {objective: curve} of PPO, or what bon_curves() returns."""
    if kind_of(run) == PPO:
        return {objective: ppo_curve(run)}
    return bon_curves(run)


def ppo_curve(run: str) -> dict[str, np.ndarray]:
    """The curve of a PPO run's evaluations. InputError: the run has none."""
    points = []
    # Most steps have no evaluation.
    for record in read_records(run):
        if "eval/proxy" not in record:
            continue
        point = {"x": record["step"]}
        for key, value in record.items():
            if key.startswith("eval/"):
                point[key.removeprefix("eval/")] = value
        points.append(point)
    if not points:
        raise InputError(f"{run}: no PPO run here (no eval/proxy in its {PPO})")
    return curve_of(points)


def bon_curves(run: str) -> dict[str, dict]:
    """{label: curve} of a best-of-n run: single reward models first, then each objective.

    Several members are one curve, "single (mean of K members)": their mean, with a band from the
    lowest to the highest member.
    """
    from ..ensemble import objective_of

    path = os.path.join(run, BEST_OF_N)
    members = []
    objectives = {}
    for name, points in read_object(path, finite=False).items():
        curve = read_bon_curve(points, name, path)
        if objective_of(name) is None:
            members.append(curve)
        else:
            objectives[name] = curve
    if len(members) == 1:
        return {"single": members[0], **objectives}

    # Members are averaged at the n that all of them have.
    stacked = over_runs(members)  # {name: [K, L]}
    single = {name: values.mean(0) for name, values in stacked.items()}
    for score in ("proxy", "gold"):
        single[f"{score}_low"] = stacked[score].min(0)
        single[f"{score}_high"] = stacked[score].max(0)
    return {f"single (mean of {len(stacked['x'])} members)": single, **objectives}


def read_bon_curve(points, name: str, path: str) -> dict[str, np.ndarray]:
    """The points under one name of bon_results.json as a curve. InputError: they are damaged."""
    if not is_of_type(points, list[dict]) or not points:
        raise InputError(f"{path}: {name} is no list of points")
    renamed = []
    for point in points:
        check_fields(point, POINT, f"{path}: {name}")
        # "proxy_score" is called "proxy", as in the evaluations of PPO.
        same_names = {key.replace("_score", ""): value for key, value in point.items()}
        renamed.append({"x": point["n"], **same_names})
    return curve_of(renamed)


def curve_of(points: list[dict]) -> dict[str, np.ndarray]:
    """L points -> arrays [L] x, kl, proxy, proxy_low, proxy_high, gold, gold_low, gold_high.

    A point has x, kl, proxy, proxy_se and perhaps proxy_interval, and the same of gold. The ends of
    the band, low and high, are those of the interval, or one standard error away.
    """
    curve = {}
    for name in ("x", "kl", "proxy", "gold"):
        numbers = [point.get(name) for point in points]
        curve[name] = np.array(numbers, dtype=float)  # [L]; None becomes nan

    for name in ("proxy", "gold"):
        # An interval that the run has computed is preferred, since it need not be symmetric.
        intervals = [point.get(f"{name}_interval") for point in points]
        if all(intervals):
            low, high = np.array(intervals, dtype=float).T
        else:
            error = np.array([point.get(f"{name}_se") or 0.0 for point in points])
            low = curve[name] - error
            high = curve[name] + error
        curve[f"{name}_low"] = low
        curve[f"{name}_high"] = high
    return curve


def over_runs(curves: list[dict]) -> dict[str, np.ndarray]:
    """S curves -> {"x": [S, L], "kl": [S, L], ...} at the x that all of them have."""
    # Runs of different lengths, or evaluated at different steps, do not have the same points.
    shared = functools.reduce(np.intersect1d, [curve["x"] for curve in curves])
    stacked = {}
    for name in curves[0]:
        at_shared = [curve[name][np.isin(curve["x"], shared)] for curve in curves]
        stacked[name] = np.stack(at_shared)
    return stacked

"""The settings of a run, as its config.json keeps them, and how they differ from a config.

Beside the settings stand fingerprints of what they name; fingerprints.py says what is in one. This
file needs neither torch nor transformers, so that what only draws or compares runs starts fast.
"""

import json
from dataclasses import MISSING, Field, asdict, fields

from .files import check_fields, read_object

# Settings that do not make it another run: results are the same, some up to float error.
PLACES = (
    "output_dir",
    "resume",
    "device",
    "distributed",
    "checkpoint_activations",
    "frozen_dtype",
    "micro_batch_size",
    "tokens_per_micro_batch",
)

# What a fingerprint of an input holds.
FINGERPRINT = {"digest": str, "size": int, "mtime": int}


def as_json(config) -> dict:
    """The settings of a Config as they are when they have been written to JSON and read again."""
    return json.loads(json.dumps(asdict(config)))


def default_value(flag: Field):
    """A flag's value where none is given; MISSING where one must be given."""
    if flag.default_factory is not MISSING:
        return flag.default_factory()
    return flag.default


def read_config(stored: str) -> dict:
    """What is in a run's config.json: settings, and as "inputs" fingerprints of what they name."""
    run = read_object(stored, {"inputs": dict | None}, finite=False)  # a setting may be infinite
    run["inputs"] = run.get("inputs") or {}  # results of probe.py have none
    for name, fingerprint in run["inputs"].items():
        check_fields(fingerprint, FINGERPRINT, f"{stored}: the fingerprint of {name}")
    return run


def settings_that_differ(stored: str, config, free=()) -> list[str]:
    """The names of the settings in which a run's config.json differs from a config.

    A flag that is younger than the run had its default.
    """
    # Both are compared as they are in JSON, where a tuple, for example, has become a list.
    run = read_config(stored)
    run.pop("inputs", None)
    settings = as_json(config)
    for flag in fields(config):
        if default_value(flag) is not MISSING:
            run.setdefault(flag.name, default_value(flag))

    # A setting of the run whose flag no longer exists counts as a difference.
    names = []
    for name in {**run, **settings}:
        if name not in free and run.get(name) != settings.get(name):
            names.append(name)
    return names

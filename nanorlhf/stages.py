"""Which script trains which default folder, and what a run needs to be there before it starts.

    runs/sft  <--  train_sft.py              the SFT policy
    runs/rm/seed_0  <--  train_rm.py         the reward model, from runs/sft
    runs/ppo  <--  train_ppo.py              the PPO policy, from both

A script asks only for what it starts from itself. What that needs in turn its own script asks for.
"""

import importlib
import os

from . import data
from .errors import InputError
from .hf.folders import check_model
from .rewards import check_reward
from .runtime.cli import read_settings
from .runtime.distributed import setup
from .runtime.fingerprints import changed_inputs, fingerprint_inputs
from .runtime.log import PLACES, read_config, settings_that_differ

SCRIPT_OF = {"runs/sft": "train_sft", "runs/rm/seed_0": "train_rm", "runs/ppo": "train_ppo"}


def check_inputs(config, *names: str) -> None:
    """Look at the models and rewards that these settings name, before any is loaded or trained.

    What the scripts train themselves need not be there yet. InputError: something is wrong.
    """
    for name in names:
        if is_default(config, name):
            continue
        check = check_model if name in ("model", "value_model") else check_reward
        for path in paths_in(config, name):
            check(path)


def train_what_is_missing(config, *names: str) -> None:
    """Train the models of these settings that are the scripts' own and not there yet."""
    for name in names:
        if is_default(config, name):
            for folder in paths_in(config, name):
                train_default(folder, config)


def is_default(config, name: str) -> bool:
    """Whether a setting names models that the scripts train themselves on the embedded world."""
    answers_from_a_file = getattr(config, "pool", "")
    if answers_from_a_file or not data.is_world(config.dataset):
        return False
    return getattr(config, name) == getattr(type(config)(), name)


def paths_in(config, name: str) -> list[str]:
    """The names of models in a setting, which holds one, several or none."""
    value = getattr(config, name)
    paths = [value] if isinstance(value, str) else value
    return [path for path in paths if path]


def train_default(folder: str, config) -> None:
    """Train the model of a default folder by its script, or use what is there already.

    The script runs in this process, since another one would not be in torchrun's group. It computes
    in float32, whatever the run that needs the model computes in: there is one model of each kind.
    """
    # By its name, when it is needed: no module imports a script.
    script = importlib.import_module(SCRIPT_OF[folder])
    wanted = script.Config(device=config.device)
    if folder == "runs/rm/seed_0":
        wanted = script.Config(device=config.device, dataset=config.dataset)  # the cue's seed is in it
    if not use_what_is_there(folder, wanted):
        script.main(wanted)


def use_what_is_there(folder: str, wanted) -> bool:
    """Whether the run in a default folder is done. It may be a user's own, with other settings.

    It is used as it is, and what is different about it is printed: settings, and inputs that have
    changed since, such as the SFT policy below a reward model. InputError: a run with other settings
    that is not finished. It is the user's to finish: it may be running, or have hours to go.
    """
    stored = os.path.join(folder, "config.json")
    if not os.path.isfile(stored):
        return False
    differing = settings_that_differ(stored, wanted, PLACES)
    finished = os.path.isfile(os.path.join(folder, "summary.json"))
    if not differing and not finished:
        return False

    settings = read_settings(stored, type(wanted))
    own = [f"{name} {settings.get(name)}" for name in differing]
    if not finished:
        raise InputError(
            f"{folder} holds a run that is not finished, with settings of its own ({', '.join(own)}): "
            f"finish it with its script and --resume --output_dir {folder}, or name other models"
        )
    inputs = read_config(stored)["inputs"]
    for name in changed_inputs(inputs, fingerprint_inputs(settings, inputs)):
        own.append(f"{name} has changed since")
    note = f": {', '.join(own)}" if own else ""
    setup(wanted.device).print(f"{folder} is done already and used as it is{note}")
    return True

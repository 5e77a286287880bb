"""Which script trains which default folder, and what a run needs to be there before it starts.

    runs/sft          by train_sft.py    the SFT policy
    runs/rm/seed_0    by train_rm.py     the reward model, from runs/sft
    runs/ppo          by train_ppo.py    the PPO policy, from both

A script asks only for the models that it starts from. If one of them is missing, the script that
trains it runs, and asks in turn for what that model starts from.
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
from .runtime.settings import PLACES, read_config, settings_that_differ

SCRIPT_OF = {"runs/sft": "train_sft", "runs/rm/seed_0": "train_rm", "runs/ppo": "train_ppo"}


def check_inputs(config, *names: str) -> None:
    """Check the models and rewards that these settings name, before any is loaded or trained.

    Models that the scripts train themselves need not be there yet. InputError: a model or a reward
    cannot be used.
    """
    for name in names:
        if is_default(config, name):
            continue
        for path in paths_in(config, name):
            if name in ("model", "value_model"):
                check_model(path)
            else:
                check_reward(path)


def train_what_is_missing(config, *names: str) -> None:
    """Train those models in these settings that are the scripts' own and are not there yet."""
    for name in names:
        if is_default(config, name):
            for folder in paths_in(config, name):
                train_default(folder, config)


def is_default(config, name: str) -> bool:
    """Whether a setting names models that the scripts train themselves on the embedded world."""
    # sample_bon.py's --pool: the answers are there already, in a file.
    if getattr(config, "pool", "") or not data.is_world(config.dataset):
        return False
    # Any other name is a model of the user's own, which must be there already.
    defaults = type(config)()
    return getattr(config, name) == getattr(defaults, name)


def paths_in(config, name: str) -> list[str]:
    """The names of models in a setting, which holds one, several or none."""
    paths = getattr(config, name)
    if isinstance(paths, str):
        paths = [paths]
    return [path for path in paths if path]


def train_default(folder: str, config) -> None:
    """Train the model of a default folder by its script, or use what is there already.

    The script runs in this process: a process of its own would not be in torchrun's group. It
    computes in float32, whatever the run that needs the model computes in, so that there is one
    model of each kind.
    """
    # The script is imported here, by its name, when it is needed: no module imports a script.
    script = importlib.import_module(SCRIPT_OF[folder])
    wanted = script.Config(device=config.device)
    if folder == "runs/rm/seed_0":
        # The name of the embedded world may hold the seed of the cue, which is in the pairs alone.
        wanted = script.Config(device=config.device, dataset=config.dataset)
    if not use_what_is_there(folder, wanted):
        script.main(wanted)


def use_what_is_there(folder: str, wanted) -> bool:
    """Whether the run in a default folder is done. It may be a user's own, with other settings.

    A run that is done is used as it is. What is different about it is printed: settings, and inputs
    that have changed since, such as the SFT policy that a reward model was trained from.
    InputError: a run with other settings that is not finished. It is left to its user, since it may
    be running, or have hours to go.
    """
    stored = os.path.join(folder, "config.json")
    if not os.path.isfile(stored):
        return False
    differing = settings_that_differ(stored, wanted, PLACES)
    finished = os.path.isfile(os.path.join(folder, "summary.json"))
    # The run that the script would start was interrupted: the script goes on with it.
    if not differing and not finished:
        return False

    # The user is told which settings differ, with the values of the run that is there.
    settings = read_settings(stored, type(wanted))
    differences = [f"{name} {settings.get(name)}" for name in differing]
    if not finished:
        raise InputError(
            f"{folder} holds a run that is not finished, with settings of its own "
            f"({', '.join(differences)}): finish it with its script and --resume "
            f"--output_dir {folder}, or name other models"
        )
    # Changed inputs are no error: a reward model from an older SFT policy is still a reward model.
    inputs = read_config(stored)["inputs"]
    inputs_now = fingerprint_inputs(settings, inputs)
    for name in changed_inputs(inputs, inputs_now):
        differences.append(f"{name} has changed since")
    note = f": {', '.join(differences)}" if differences else ""
    # All processes come here, and one of them prints.
    dist = setup(wanted.device)
    dist.print(f"{folder} is done already and used as it is{note}")
    return True

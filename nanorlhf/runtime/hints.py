"""Which commands make the folders that are read by default: errors name them if one is missing."""

import os

from ..errors import InputError

SARM_SAE = (
    "python train_sae.py --model runs/sft --base none --site residual --layers 2 "
    "--normalize token --relu False --output_dir runs/sae_sarm"
)
MADE_BY = {
    "runs/sft": "python train_sft.py",
    "runs/dpo": "python train_sft.py --loss dpo --model runs/sft",
    "runs/rm/seed_0": "python train_rm.py",
    "runs/ppo": "python train_ppo.py",
    "runs/bon": "python sample_bon.py",
    "runs/sae": "python train_sae.py",
    "runs/sae_sarm": SARM_SAE,
    "runs/sarm": "python train_rm.py --sarm runs/sae_sarm",
}
# What a command reads and does not make by itself, as the scripts do with their own defaults.
READ_FIRST = {
    "runs/dpo": "runs/sft",
    "runs/sae_sarm": "runs/sft",
    "runs/sarm": "runs/sae_sarm",
}


def check_made(path: str) -> None:
    """InputError, with the commands to give, for a path in a default folder that is missing."""
    default = default_of(path)
    if default and not os.path.exists(default):
        commands = " && ".join(commands_for(default))
        raise InputError(f"{path}: no such run yet: {commands} makes it")


def default_of(path: str) -> str:
    """The default folder that `path` is, or lies in; "" if there is none."""
    # Go up until a default folder is reached (runs/sft/model, runs/sft) or the top (../x, .., "").
    path = os.path.normpath(path)
    while path not in MADE_BY:
        path = os.path.dirname(path)
        if path in ("", os.path.sep):
            return ""
    return path


def commands_for(default: str) -> list[str]:
    """The commands that make a default folder, after those for what it reads and is missing too."""
    commands = []
    needed = READ_FIRST.get(default)
    if needed and not os.path.exists(needed):
        commands = commands_for(needed)
    return [*commands, MADE_BY[default]]

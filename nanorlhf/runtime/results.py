"""What all commands of probe.py share: their results folder, numbers in tables, lists of ids."""

import math
import os

from ..errors import InputError, require
from . import plots
from .files import read_object, write_json
from .log import RunFolder


def parse_ids(text):
    """ "3,17" -> [3, 17]"""
    # Fewer than 19 digits fit 64 bits. Feature 3 is one feature, however often it is named.
    are_numbers = all(part.strip().isdecimal() and len(part) < 19 for part in text.split(","))
    require(are_numbers or not text, f"--features {text}: it must be numbers, such as 3,17")
    return list(dict.fromkeys(int(part) for part in text.split(",") if part))


def cell(x, digits=3):
    """An interval_row() in a table; None stands for no number."""
    if x is None:
        return "-"
    return f"{x['mean']:+.{digits}f} [{x['low']:+.{digits}f}, {x['high']:+.{digits}f}]"


def interval_row(mean, low, high) -> dict[str, float]:
    """A number and the ends of its interval, tensors of one element, as summaries hold them."""
    return {"mean": mean.item(), "low": low.item(), "high": high.item()}


def in_one_line(function, *args):
    """function(*args), its ValueErrors (floor 0 raises no others) as InputErrors."""
    try:
        return function(*args)
    except ValueError as e:
        raise InputError(str(e)) from None


def results_folder(config, dist):
    """The folder of a command's results, which the same command writes again.

    A folder of anything else is an error. config.json says whose results they are, since the flags
    of `pairs` would pass for those of an early `reward`; those of older results do not say it.
    """
    # All settings are free: these results are made again by whatever flags, over those of before.
    folder = RunFolder(config, dist, free=(*vars(config), "command"), written_again=True)
    folder.config["command"] = type(config).__name__.removesuffix("Config")
    stored = os.path.join(config.output_dir, "config.json")
    if os.path.isfile(stored):
        settings = read_object(stored, finite=False)
        same = settings.get("command", folder.config["command"]) == folder.config["command"]
        require(
            same and "output_dir" in settings,
            f"{config.output_dir} holds no results of this command, but something else; "
            "choose another --output_dir",
        )
    return folder


def save(config, folder, summary, text, draw):
    """summary.json, the picture draw(figure, summary) and the table: on the main process."""
    if not folder.dist.main:
        return
    # config.json first: a kill later leaves a folder that the same command may write into.
    os.makedirs(config.output_dir, exist_ok=True)
    write_json(os.path.join(config.output_dir, "config.json"), folder.config)
    write_json(os.path.join(config.output_dir, "summary.json"), summary)
    picture = plots.save(draw, summary, os.path.join(config.output_dir, "picture.png"))
    print(
        text,
        f"Written to {config.output_dir}: summary.json{', picture.png' if picture else ''}",
        sep="\n",
        flush=True,
    )


def finite(x):
    """A number as JSON knows it: null for what is infinite."""
    return x if math.isfinite(x) else None

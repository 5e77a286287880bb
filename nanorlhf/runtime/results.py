"""What all commands of probe.py share: their results folder, numbers in tables, lists of ids."""

import math
import os

from ..errors import InputError, require
from . import plots
from .files import read_object, write_json
from .log import RunFolder


def parse_ids(text):
    """ "3,17" -> [3, 17]"""
    if not text:
        return []
    ids = []
    for part in text.split(","):
        # Fewer than 19 digits fit 64 bits.
        is_number = part.strip().isdecimal() and len(part) < 19
        require(is_number, f"--features {text}: it must be numbers, such as 3,17")
        ids.append(int(part))
    # A feature that is named twice is taken once.
    return list(dict.fromkeys(ids))


def cell(x, digits=3):
    """An interval_row() in a table; None stands for no number."""
    if x is None:
        return "-"
    return f"{x['mean']:+.{digits}f} [{x['low']:+.{digits}f}, {x['high']:+.{digits}f}]"


def interval_row(mean, low, high) -> dict[str, float]:
    """A number and the ends of its interval, tensors of one element, as summaries hold them."""
    return {"mean": mean.item(), "low": low.item(), "high": high.item()}


def draw_intervals(axis, rows: dict[str, dict], colors: dict[str, str]):
    """A dot with its interval for each {name: interval_row()}, side by side.

    colors: {name: colour}; the others are grey.
    """
    for i, (name, row) in enumerate(rows.items()):
        # errorbar() takes the lengths of the bars, not the ends of the interval. By rounding an end
        # may lie on the wrong side of the mean.
        below = max(0, row["mean"] - row["low"])
        above = max(0, row["high"] - row["mean"])
        color = colors.get(name, "grey")
        axis.errorbar(i, row["mean"], [[below], [above]], fmt="o", color=color)
    axis.set_xticks(range(len(rows)), list(rows), rotation=70)


def with_input_errors(function, *args):
    """function(*args), its ValueErrors as InputErrors: what is wrong is what a user gave."""
    try:
        return function(*args)
    except ValueError as e:
        raise InputError(str(e)) from None


def results_folder(config, dist):
    """The folder of a command's results, which the same command writes again.

    A folder of anything else is an error. config.json says whose results they are.
    """
    # All settings are free: results may be made again with other flags, over the old ones.
    folder = RunFolder(config, dist, free=(*vars(config), "command"), written_again=True)
    folder.config["command"] = type(config).__name__.removesuffix("Config")
    stored = os.path.join(config.output_dir, "config.json")
    if os.path.isfile(stored):
        settings = read_object(stored, finite=False)
        require(
            settings.get("command") == folder.config["command"],
            f"{config.output_dir} holds no results of this command, but something else; "
            "choose another --output_dir",
        )
    return folder


def save(config, folder, summary, text, draw):
    """summary.json, the picture draw(figure, summary) and the table: on the main process."""
    if not folder.dist.main:
        return
    # config.json comes first. After a kill the same command may then write into the folder again.
    os.makedirs(config.output_dir, exist_ok=True)
    write_json(os.path.join(config.output_dir, "config.json"), folder.config)
    write_json(os.path.join(config.output_dir, "summary.json"), summary)
    picture = plots.save(draw, summary, os.path.join(config.output_dir, "picture.png"))
    written = "summary.json"
    if picture:  # not without matplotlib
        written += ", picture.png"
    print(text)
    print(f"Written to {config.output_dir}: {written}", flush=True)


def finite(x):
    """A number as JSON knows it: null for what is infinite."""
    if math.isfinite(x):
        return x
    return None

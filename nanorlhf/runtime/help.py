"""What --help prints: the flags of a Config in groups, the script's own first.

argparse's own help is one long list; here each group has a heading, which is the first line of its
class's docstring:

The KL penalty: what the policy pays for leaving its reference

  --kl_coef X           coefficient of the KL divergence (default: 0.05)
  --kl_in {reward,loss}
                        where the penalty stands (default: reward)
"""

import inspect
import shutil
import textwrap
import typing
from dataclasses import MISSING, Field, fields

from .flags import choices_of
from .settings import default_value

INDENT = 2  # where flags begin
COLUMN = 26  # where their help begins
MOST_COLUMNS = 100
PLACEHOLDERS = {int: "N", float: "X", str: "TEXT"}


def help_text(command: str, description: str, config_class) -> str:
    """The whole text of --help.

    command: what the user types, such as "probe.py reward"; description: what it is for.
    """
    width = min(shutil.get_terminal_size().columns, MOST_COLUMNS)
    types = typing.get_type_hints(config_class)
    lines = [f"usage: {command} [flags]", "", description.strip()]
    for heading, flags in groups_of(config_class):
        lines += ["", *textwrap.wrap(heading, width), ""]
        for flag in flags:
            lines += describe_flag(flag, types[flag.name], width)
    legend = "N: a whole number, X: a number, ...: one or several; without a value, a switch is on"
    return "\n".join([*lines, "", *textwrap.wrap(legend, width), ""])


def groups_of(config_class) -> list[tuple[str, list[Field]]]:
    """(heading, flags) of each class that a Config is made of: the Config, then what it inherits.

    A flag stands with the class that declares it first, also where a script declares it again.
    """
    classes = inspect.getmro(config_class)  # from the Config down to what all of them share
    # {flag: the class under whose heading it stands}
    home = {}
    for group in classes:
        for name in inspect.get_annotations(group):
            home[name] = group  # the lowest class has the last word
    groups = []
    for group in classes:
        flags = [flag for flag in fields(config_class) if home[flag.name] is group]
        if flags:
            groups.append((inspect.getdoc(group).splitlines()[0], flags))
    return groups


def describe_flag(flag: Field, hint, width: int) -> list[str]:
    """The lines of one flag: its name, what it takes, what it is for, its default."""
    name = f"{' ' * INDENT}--{flag.name} {placeholder_of(flag, hint)}".rstrip()
    about = f"{flag.metadata['help']}{describe_default(flag)}"
    indent = " " * COLUMN
    lines = textwrap.wrap(
        about, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    # The longer the name with its choices, the more room it gets: several lines, a line of its own,
    # or the beginning of a line of help.
    if len(name) > width:  # many choices
        names = textwrap.wrap(name.replace(",", ", "), width, subsequent_indent=" " * 2 * INDENT)
        return [*names, *lines]
    if len(name) > COLUMN - 2:
        return [name, *lines]
    return [name + lines[0][len(name) :], *lines[1:]]


def placeholder_of(flag: Field, hint) -> str:
    """What a flag takes: {a,b} where it has choices, else N, X or TEXT; nothing for a switch."""
    # list[str] is shown as TEXT ..., and int | None as N.
    several = typing.get_origin(hint) is list
    kind = hint
    for part in typing.get_args(hint):
        if part is not type(None):
            kind = part
    choices = [choice for choice in choices_of(flag) if choice]
    if choices:
        text = "{" + ",".join(choices) + "}"
    elif hint is bool and flag.default is True:
        text = "{True,False}"
    elif hint is bool:
        text = ""
    else:
        text = PLACEHOLDERS[kind]
    if several:
        text += " ..."
    return text


def describe_default(flag: Field) -> str:
    """ " (default: 0.05)", or nothing for an empty default; " (required)" where there is none."""
    default = default_value(flag)
    if default is MISSING:
        return " (required)"
    if default is None or default is False or default in ("", []):
        return ""
    if isinstance(default, list):
        default = " ".join(str(item) for item in default)
    return f" (default: {default})"

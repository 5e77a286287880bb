"""Which rewards score the answers of a chat: those of the command, else those of the runs."""

import contextlib
import os

from ..errors import InputError
from ..rewards import check_reward, expand, kind_of
from ..runtime.files import is_of_type, read_object

NONE = "none"  # --reward_model none: no reward but gold


def choose_rewards(
    runs: list[str], reward_models: list[str], gold_model: str, in_world: bool
) -> tuple[list[str], list[str]]:
    """The names of the rewards, each once, gold last; and sentences on those that are left out.

    reward_models, gold_model: what the command names, which must be there. Without it the runs'
    config.json is asked. in_world: the embedded world has its own gold.
    """
    # Rewards that the command names must be there: an error ends the chat before a model is loaded.
    named = []
    if reward_models and reward_models != [NONE]:
        named = expand(reward_models)
    named_gold = []
    if gold_model:
        named_gold.append(gold_model)
    for spec in [*named, *named_gold]:
        check_reward(spec)

    # Rewards that the runs name are a default: one that cannot be used is left out with a note.
    # Each flag replaces its own default alone: with --reward_model the runs may still name a gold.
    of_runs = []
    if not reward_models:
        of_runs = read_settings(runs, "reward_model")
    gold_of_runs = []
    if not gold_model:
        gold_of_runs = read_settings(runs, "gold_model")
        if in_world:
            gold_of_runs.append("world:gold")

    rewards, notes = keep_usable(of_runs)
    golds, further_notes = keep_usable(gold_of_runs)
    # The command and the runs may name the same reward: it stands in the list once.
    specs = [*named, *rewards, *named_gold, *golds]
    # A reward that is also the gold is left out twice, for one reason.
    return list(dict.fromkeys(specs)), list(dict.fromkeys([*notes, *further_notes]))


def keep_usable(specs: list[str]) -> tuple[list[str], list[str]]:
    """Rewards that a config.json names -> those that can be used, and why the others are left out.

    A folder may have moved since. A program is not run: somebody else may have written the file
    that names it.
    """
    kept = []
    notes = []
    for spec in dict.fromkeys(specs):  # each once
        if kind_of(spec) == "function":
            notes.append(f"the reward {spec} is a program: it runs only if the command names it")
            continue
        try:
            check_reward(spec)
        except InputError as e:
            notes.append(f"a reward of the runs is left out: {e}")
        else:
            kept.append(spec)
    return kept, notes


def read_settings(runs: list[str], name: str) -> list[str]:
    """What the config.json of each run names with one flag; nothing for a model's folder."""
    named = []
    for run in runs:
        # A hub name, or a folder without a config.json, has no settings. That is no error here.
        settings = {}
        with contextlib.suppress(InputError):
            settings = read_object(os.path.join(run, "config.json"), finite=False)
        # A model's own config.json has no --output_dir.
        value = settings.get(name)
        if "output_dir" not in settings or not value:
            continue
        if isinstance(value, str):
            named.append(value)
        elif is_of_type(value, list[str]):
            named += value
    return named

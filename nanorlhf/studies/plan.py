"""--dry_run of a study: every command in order, with its size and what it starts from.

Nothing is run. Each command is read by its own script, so that a flag which the script does not
know, or a value that it refuses, is found here and not after hours.
"""

import importlib
import shlex
from collections.abc import Callable

from ..errors import InputError
from ..runtime import cli
from .common import is_finished

# What a step's batch holds.
UNITS = {
    "train_sft.py": "demonstrations",
    "train_rm.py": "pairs",
    "train_ppo.py": "answers",
    "train_sae.py": "tokens",
}
# What the commands without steps count, by their flags.
COUNTED = {
    "max_rows": "rows",
    "eval_size": "held-out rows",
    "n_answers": "answers to each",
    "seeds": "splits",
    "draws": "random draws",
}
# The flags that name what a command starts from. (--sae of train_sae.py is a kind.)
SOURCES = ("model", "base", "policy", "sarm", "sae", "pool")


def print_plan(
    stages: list[list[str]],
    a,
    remarks: list[str],
    is_done: Callable[[str], bool] = is_finished,
    later: str = "",
):
    """Print the commands of a study, stage by stage; is_done(command) as in common.run_stage().

    remarks: what is different from the embedded world. later: what cannot be known yet. A flag that
    is wrong ends the program with one line.
    """
    # A stage is empty where its models are given, such as a --model that is the SFT policy.
    stages = [stage for stage in stages if stage]
    n_commands = sum(len(stage) for stage in stages)
    print(f"{n_commands} commands in {len(stages)} stages, {a.jobs} side by side; nothing is run")
    for remark in remarks:
        print(f"your own data: {remark}")
    with cli.errors_in_one_line():
        for number, stage in enumerate(stages, 1):
            print(f"\nstage {number} of {len(stages)}, {count(len(stage), 'command')}:")
            for command in stage:
                size = describe_size(command)
                if is_done(command):
                    size += " (done)"
                # With single spaces, and as a shell reads it.
                words = shlex.join(shlex.split(command))
                print(f"python {words}\n    {size}")
    if later:
        print(f"\n{later}")


def describe_size(command: str) -> str:
    """The size of a command and what it starts from, such as "40 steps x 128 answers, from sft"."""
    script, config = read_command(command)
    size = size_of(script, config)
    sources = sources_of(script, config)
    if sources:
        size += f", from {', '.join(sources)}"
    return size


def read_command(command: str) -> tuple:
    """A command line -> its script, and its settings as the script reads them.

    InputError: the script refuses a flag; the error names the command.
    """
    script, *words = shlex.split(command)
    # The script is imported by its name: no module imports a script.
    module = importlib.import_module(script.removesuffix(".py"))
    # The folders that {seed} stands for are not there yet, or the command makes them itself.
    if script != "train_rm.py" or "--average" in words:
        words = [word.replace("{seed}", "0") for word in words]
    # A script's Config checks its own flags, as it does when the command runs.
    try:
        if script != "probe.py":
            return script, cli.parse(module.Config, words)
        # probe.py has sub-commands, each with settings of its own.
        name, *words = words
        config_class, _ = module.COMMANDS[name]
        return script, cli.parse(config_class, words, name)
    except InputError as error:
        raise InputError(f"python {command}: {error}") from None


def size_of(script: str, config) -> str:
    """Steps times batch of a training, prompts times answers of a sampling, rows of the rest."""
    # train_rm.py --average has steps and a batch size among its flags, and uses none.
    if getattr(config, "average", []):
        return "the mean of models' weights"
    if script in UNITS:
        size = f"{config.steps} steps x {config.batch_size} {UNITS[script]}"
        members = getattr(config, "members", 1)
        if members > 1:
            size = f"{members} members x {size}"
        return size
    if script == "sample_bon.py":
        return size_of_sampling(config)

    counts = []
    for flag, what in COUNTED.items():
        number = getattr(config, flag, None)
        # A benchmark is taken whole.
        is_unused = flag == "eval_size" and getattr(config, "benchmark", "pairs") != "pairs"
        if number is not None and not is_unused:
            counts.append(f"{number or 'all'} {what}")
    return ", ".join(counts)


def size_of_sampling(config) -> str:
    """The size of a command of sample_bon.py, which may sample, or read answers from files."""
    if config.from_files:
        return f"{count(len(config.from_files), 'file')} of answers"
    if config.pool:
        return "the answers of a pool"
    size = f"{config.eval_size} prompts x {config.n_answers} answers"
    n_splits = len(config.eval_splits)
    if n_splits > 1:
        size = f"{n_splits} splits x {size}"
    return size


def sources_of(script: str, config) -> list[str]:
    """What a command starts from: its models and autoencoders, or its pool.

    A command that looks at nothing but a reward model starts from that.
    """
    if getattr(config, "from_files", []):
        return []
    unused = []
    if script == "train_sae.py":
        unused.append("sae")
    # A pool holds the answers already: the policy is not read.
    if getattr(config, "pool", ""):
        unused.append("model")

    sources = []
    for flag in SOURCES:
        if flag not in unused:
            sources += as_list(getattr(config, flag, ""))
    return sources or as_list(getattr(config, "reward_model", []))


def as_list(value: str | list[str]) -> list[str]:
    """One name or several -> a list; empty for no name."""
    if isinstance(value, list):
        return value
    if value in ("", "none"):
        return []
    return [value]


def count(number: int, noun: str) -> str:
    """Such as "1 file" or "3 files"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}s"

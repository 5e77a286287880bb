"""Command lines: a Config dataclass read by transformers' HfArgumentParser; wrong input is one line on stderr and exit code 2."""

import argparse
import contextlib
import errno
import inspect
import os
import re
import signal
import sys
import time
import typing
from dataclasses import dataclass, field, fields

from transformers import HfArgumentParser

from ..errors import InputError, at_least, first_line, one_of, require
from . import distributed
from .files import is_of_type, read_object, shorten
from .fingerprints import code_file


@dataclass
class RunConfig:
    """The flags that all training scripts share."""

    output_dir: str = field(default="runs/run", metadata={"help": "the run folder"})
    seed: int = field(default=0, metadata={"help": "every random draw is keyed by it"})
    steps: int = field(default=100, metadata={"help": "optimizer steps (train_ppo.py: rollouts)"})
    batch_size: int = field(default=64, metadata={"help": "samples a step, over all processes"})
    micro_batch_size: int = field(default=64, metadata={"help": "samples a forward pass and process; changes memory, not results; but "
        "with dropout (of SFT's and reward models' training; PPO and DPO have none) its noise, and so results too"})  # fmt: skip
    tokens_per_micro_batch: int = field(default=0, metadata={"help": "instead: as many samples as fit into so many tokens; 0: off; with "
        "dropout it changes results too"})  # fmt: skip
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 (matmuls, over float32 weights), or auto: "
        "bfloat16 where the GPU or CPU is fast at it"})  # fmt: skip
    distributed: str = field(default="ddp", metadata={"help": "on several processes: ddp, or fsdp for what does not fit one GPU"})
    checkpoint_activations: bool = field(default=False, metadata={"help": "keep only the blocks' inputs; less memory, same results"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the blocks: a minute of warm-up, then faster steps"})
    model: str = field(default="world", metadata={"help": "run folder, model folder or hub name; 'world': the embedded world's"})
    dataset: str = field(default="world", metadata={"help": "FILE.jsonl, a datasets name[:split], or world[:cue seed]"})
    columns: list[str] = field(default_factory=list, metadata={"help": "FIELD=COLUMN where the data's names differ, e.g. prompt=question"})
    prompt_format: str = field(default="", metadata={"help": "tldr: rows {subreddit, title, post, summary}; cnn_dm: {article, highlights}"})
    in_distribution: str = field(default="", metadata={"help": "learn from such rows alone: COLUMN=a,b,c, words:COLUMN<=N (or <, >, >=), "
        "or FILE.py:FUNCTION of a row; see splits.py"})  # fmt: skip
    chat_template: bool = field(default=False, metadata={"help": "put prompts into the tokenizer's chat template, as a user's turn"})
    eval_dataset: str = field(default="", metadata={"help": "held-out data; default: rows of --dataset are held out, by prompt"})
    eval_splits: list[str] = field(default_factory=lambda: ["test"], metadata={"help": "evaluate on each: test (held-out rows), ood "
        "(held out and not --in_distribution; embedded world: the held-out topics), NAME=[FORMAT:]FILE"})  # fmt: skip
    eval_size: int = field(default=256, metadata={"help": "rows of a split to evaluate on"})
    eval_every: int = field(default=0, metadata={"help": "evaluate every N steps; 0: not before the end"})
    max_rows: int = field(default=0, metadata={"help": "train on a random subset of N rows; 0: all"})
    freeze_layers: float = field(default=0.0, metadata={"help": "freeze the embeddings and this share of the blocks, from the bottom"})
    lora_rank: int = field(default=0, metadata={"help": "LoRA: train adapters of this rank, and heads, alone (lora.py); 0: off"})
    lora_alpha: float = field(default=16.0, metadata={"help": "an adapter adds lora_alpha / lora_rank * B A to its weight"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before A; train_ppo.py switches all dropout off"})
    lora_layers: list[str] = field(default_factory=lambda: ["all-linear"], metadata={"help": "ends of the names of linear layers, or "
        "regular expressions for them; all-linear: every one but the output head"})  # fmt: skip
    merge: bool = field(default=False, metadata={"help": "save the whole model with its adapters merged into it, not a PEFT folder"})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate of AdamW"})
    schedule: str = field(default="cosine", metadata={"help": "constant, linear or cosine"})
    warmup: int = field(default=0, metadata={"help": "steps of linear warm-up"})
    final_lr: float = field(default=0.1, metadata={"help": "the schedule goes down towards this share of lr"})
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95], metadata={"help": "AdamW's two betas"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay, on matrices"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "clip the gradient's global norm"})
    checkpoint_every: int = field(default=50, metadata={"help": "write a checkpoint every N steps"})
    keep_checkpoints: int = field(default=2, metadata={"help": "how many checkpoints are kept"})
    resume: bool = field(default=False, metadata={"help": "continue the run in output_dir with its own settings"})

    def __post_init__(self):
        at_least(self, 1, "steps", "batch_size", "micro_batch_size", "eval_size", "checkpoint_every", "keep_checkpoints")
        require(self.max_grad_norm > 0, "--max_grad_norm must be positive")
        at_least(self, 0, "eval_every", "max_rows", "warmup", "lr", "tokens_per_micro_batch", "weight_decay", "seed", "final_lr")
        one_of(self, "dtype", "float32", "bfloat16", "auto")
        if self.dtype == "auto":
            self.dtype = distributed.fast_dtype(self.device)
        one_of(self, "distributed", "ddp", "fsdp")
        one_of(self, "schedule", "constant", "linear", "cosine")
        require(0 <= self.freeze_layers <= 1, "--freeze_layers must lie between 0 and 1")
        at_least(self, 0, "lora_rank")
        require(0 < self.lora_alpha < float("inf"), "--lora_alpha must be positive")
        require(0 <= self.lora_dropout < 1, "--lora_dropout must lie in [0, 1)")
        require(not (self.lora_rank and self.freeze_layers), "--lora_rank freezes all but the adapters: it takes no --freeze_layers")
        require(self.lora_rank or not self.merge, "--merge is for adapters: it needs --lora_rank")
        require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "--betas takes two numbers in [0, 1)")
        require(all("=" in c for c in self.columns), "--columns takes FIELD=COLUMN")








class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the flags, and a script's docstring as it was written."""


class Parser(HfArgumentParser):
    def error(self, message):
        raise InputError(message)


def script():
    return os.path.basename(sys.argv[0])


def parse(config_class, args, command="", description=None):
    """Command line -> config. With --resume the settings of the run in --output_dir are the defaults.

    command: the sub-command's name, if it is one; description: what --help says first, by default the docstring of the config's file.
    """
    description = description or sys.modules[config_class.__module__].__doc__
    parser = Parser(config_class, prog=f"{script()} {command}".strip(), description=description, formatter_class=HelpFormatter)
    parsed = vars(parser.parse_args(args))
    if "resume" not in parsed:
        return config_class(**parsed)
    folder = parsed["output_dir"]
    with contextlib.suppress(InputError):
        folder = config_class(**parsed).output_dir  # what is its default may depend on other flags
    folder = folder.replace("{seed}", str(parsed["seed"]))
    stored = os.path.join(folder, "config.json")
    given = {name for name, value in parsed.items() if value != parser.get_default(name)}
    if given == {"resume", "output_dir"} and not os.path.isfile(stored):
        raise InputError(f"{folder}: no run to resume here")  # a slip of the pen should not start another run
    if parsed["resume"] and os.path.isfile(stored):
        settings = read_settings(stored, config_class)
        check_stored_code(folder, {k: v for k, v in settings.items() if k not in given})
        parser.set_defaults(**settings)
        parsed = vars(parser.parse_args(args))
    return config_class(**{**parsed, "resume": parsed["resume"]})


def check_stored_code(folder, settings):
    """Python code that --resume would run only because a run's config.json names it.

    A file inside the run folder may have come with it from elsewhere: it is refused unless the
    command itself names it. Of any other file the path is printed.
    """
    for name, value in settings.items():
        for text in value if isinstance(value, list) else [value]:
            file = code_file(text) if isinstance(text, str) else ""
            if not file:
                continue
            require(
                not is_inside(file, folder),
                f"--resume does not run {file}, which lies in the run folder itself; "
                f"if you trust it, name it in the command: --{name} {text}",
            )
            if os.environ.get("RANK", "0") == "0":
                print(f"--resume runs the code in {file}, as {folder}/config.json says")


def is_inside(file, folder):
    """Whether a file lies in a folder or below it, by its name or by where its links lead."""
    for real in (os.path.abspath, os.path.realpath):
        if os.path.commonpath([real(file), real(folder)]) == real(folder):
            return True
    return False


def read_settings(path: str, config_class) -> dict:
    """The settings in a run's config.json that config_class has too, but for the folder's name.

    Each must be of its field's type.
    """
    stored = read_object(path, finite=False)
    hints = typing.get_type_hints(config_class)
    settings = {}
    for name, value in stored.items():
        if name in hints and name != "output_dir":
            require(is_of_type(value, hints[name]), f"{path}: {name} cannot be {shorten(value)}")
            settings[name] = value
    return settings


# ------------------------------------------------------------------------------ how a command ends

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a user's share of it, ulimit -f
INTERRUPTED = 128 + signal.SIGINT  # what a shell reports of a process that Ctrl-C ended


@contextlib.contextmanager
def errors_in_one_line(resumable=False):
    """A context that ends as a user wants to see it: one line on stderr, and an exit code.

    2: wrong input. 1: it could not go on (a gradient that is not finite, a full disk, another
    process that is gone). 130: Ctrl-C; `resumable`: --resume would go on. A bug has a traceback.
    """
    try:
        try:
            yield
        except Exception as e:
            ending = explain(e)
            if ending is None:
                raise
            line, code = ending
            rank = os.environ.get("RANK", "0")
            who = script() + (f" [rank {rank}]" if rank != "0" else "")
            print(f"{who}: error: {' '.join(line.split())}", file=sys.stderr)
            if "RANK" in os.environ:
                time.sleep(1)  # the other processes may still be reading what this one sent
            sys.exit(code)
        finally:
            distributed.shutdown()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would end the ending
        if os.environ.get("RANK", "0") == "0":
            kept = "; the last checkpoint is kept: --resume continues" if resumable else ""
            print(f"{script()}: interrupted{kept}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def explain(error: Exception) -> tuple[str, int] | None:
    """What to tell a user of an error, and the exit code; None for a bug, which has a traceback."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, FloatingPointError):
        return str(error), 1
    if errno_of(error) in NO_ROOM:
        kept = "what was saved before, such as the last checkpoint, is kept"
        advice = "make room, and give the same command again"
        return f"no room to write ({first_line(error)}); {kept}: {advice}", 1
    if distributed.lost_a_process(error):
        return "another process of this run has stopped; so does this one", 1
    return None


def errno_of(error: Exception) -> int | None:
    """The number of the operating system's error behind an exception, or None.

    safetensors and tokenizers, which are written in Rust, have it in their text alone.
    """
    if isinstance(error, OSError):
        return error.errno
    in_text = re.search(r"\(os error (\d+)\)", str(error))
    return int(in_text[1]) if in_text else None


def run(config_class, main, args=None):
    """What a script does when it is run: parse, then main(config)."""
    resumable = any(f.name == "resume" for f in fields(config_class))
    with errors_in_one_line(resumable):
        main(parse(config_class, args))


def run_command(commands, args=None):
    """run() for a script with sub-commands, {name: (config class, function)}; without one, or with --help, it lists them."""
    name, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    with errors_in_one_line():
        if name in ("-h", "--help"):
            lines = [f"  {name:15s}{inspect.getdoc(function).splitlines()[0]}" for name, (_, function) in commands.items()]
            print(sys.modules["__main__"].__doc__ or "", "commands:", *lines, f"\n{script()} COMMAND --help lists its flags", sep="\n")
            return
        require(name in commands, f"no command {name!r}; there are {', '.join(commands)}")
        config_class, function = commands[name]
        function(parse(config_class, rest, name, inspect.getdoc(function)))



"""Flags that several scripts share, and the checks that every flag passes.

A script's Config inherits groups of flags: small dataclasses of one theme each. The first line of
a group's docstring is its heading in --help (help.py). A script that needs another default, or
another help text, declares that one flag again; the flag stays in its group.

A flag is HfArg(default=..., help=...). Its metadata may hold `choices`, the values that it can
have, and `may_be_infinite`, for a bound that infinity switches off.
"""

import math
from dataclasses import dataclass, fields

from transformers.hf_argparser import HfArg

from ..errors import at_least, require
from . import distributed
from .settings import default_value

# What torch can hold: whole numbers of 64 bits, numbers of 32.
LEAST_INT = -(2**63)
MOST_INT = 2**63 - 1
MOST_FLOAT = 3.4e38
A_DAY = 86_400  # seconds


@dataclass
class FlagGroup:
    """What all groups inherit: the checks of single values, also of a Config made in Python."""

    def __post_init__(self):
        for flag in fields(self):
            value = getattr(self, flag.name)
            items = value if isinstance(value, list) else [value]
            for item in items:
                check_value(flag, item)


def check_value(flag, value):
    """InputError for a value that is none of its flag's choices, or a number out of range."""
    choices = choices_of(flag)
    if choices and value is not None:
        named = ", ".join(choice for choice in choices if choice)
        require(value in choices, f"--{flag.name} must be one of {named}, not {value!r}")
    if isinstance(value, float):
        is_off = value == math.inf and flag.metadata.get("may_be_infinite", False)
        is_number = abs(value) <= MOST_FLOAT  # nan is not
        require(is_off or is_number, f"--{flag.name} must be a finite number, not {value}")
    if isinstance(value, int):
        fits = LEAST_INT <= value <= MOST_INT
        require(fits, f"--{flag.name} must lie between {LEAST_INT} and {MOST_INT} (64 bits)")


def choices_of(flag) -> list[str]:
    """The values that a flag can have; none where it can have any.

    They are looked up at each call, since a list may have grown: PPO's kinds of KL, for example.
    """
    choices = flag.metadata.get("choices", ())
    if callable(choices):
        choices = choices()
    return list(choices)


def changed_flags(config, names) -> list[str]:
    """Those of the flags with these names whose value is not the default: ["--gamma", "--lam"].

    Where nothing reads a flag it is a mistake: whoever named it expects something of it.
    """
    defaults = {flag.name: default_value(flag) for flag in fields(config)}
    return [f"--{name}" for name in names if getattr(config, name) != defaults[name]]


# ------------------------------------------------------- flags that scripts declare one by one

SCHEDULES = ("constant", "linear", "cosine")
SEED_HELP = "the number that every random draw depends on"
HELD_OUT_HELP = "the held-out data; without it, rows of --dataset are held out, by their prompts"
FORWARD_HELP = "texts in one forward pass; it changes memory, not results"


def results_in(folder: str):
    """The flag --output_dir of a command that trains nothing, with its own default."""
    return HfArg(default=folder, help="the folder that the results are written to")


def subset_of(n: int):
    """The flag --max_rows of a command that reads all rows of its data once."""
    return HfArg(default=n, help="use a random subset of this many rows; 0: all rows")


# -------------------------------------------------------------------------------------------- data


@dataclass
class TextFlags(FlagGroup):
    """Data: which file or data set is read, and how its rows are understood"""

    dataset: str = HfArg(
        default="world",
        help="the data: a file (.jsonl, .json, .csv, .parquet), a folder as downloaded, the "
        "NAME:SPLIT or NAME:CONFIG:SPLIT of a data set for the datasets library, or 'world', the "
        "texts of the embedded world (world:SEED: its pairs with another cue)",
    )
    columns: list[str] = HfArg(
        default_factory=list,
        help="FIELD=COLUMN for each column that the data names differently, such as "
        "prompt=question, or messages=chat (see nanorlhf/formats.py for the fields)",
    )
    chat_template: bool = HfArg(
        default=False,
        help="put each prompt that is a string into the tokenizer's chat template, as a user's "
        "turn; chats go through it anyway",
    )
    special_in_text: bool = HfArg(
        default=False,
        help="keep chats whose turns spell a control token such as <|im_end|>, which counts as "
        "one; without it, they are left out",
    )

    def __post_init__(self):
        super().__post_init__()
        named = []
        for column in self.columns:
            field, equals_sign, _ = column.partition("=")
            require(field and equals_sign, "--columns takes FIELD=COLUMN")
            require(field not in named, f"--columns names {field} twice")
            named.append(field)


@dataclass
class SplitFlags(FlagGroup):
    """Splits: which rows are learned from, and which are held out to evaluate on"""

    max_rows: int = HfArg(
        default=0, help="learn from a random subset of this many rows; 0: from all rows"
    )
    in_distribution: str = HfArg(
        default="",
        help="learn only from the rows that fit this rule: COLUMN=a,b,c, or words:COLUMN<=N (or "
        "<, >, >=), or FILE.py:FUNCTION, a function of a row (see nanorlhf/splits.py)",
    )
    prompt_format: str = HfArg(
        default="",
        metadata={"choices": ("", "tldr", "cnn_dm", "alpaca")},
        help="write prompts from other columns: tldr from {subreddit, title, post, summary}, "
        "cnn_dm from {article, highlights}, alpaca from {instruction, input, output}",
    )
    eval_dataset: str = HfArg(default="", help=HELD_OUT_HELP)
    eval_size: int = HfArg(default=256, help="how many rows of each split to evaluate on")
    eval_splits: list[str] = HfArg(
        default_factory=lambda: ["test"],
        help="the splits to evaluate on: test (held-out rows), ood (held-out rows that do not fit "
        "--in_distribution; in the embedded world, the held-out topics), or NAME=[FORMAT:]FILE",
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "max_rows")
        at_least(self, 1, "eval_size")


# ---------------------------------------------------------------------------------------- training


@dataclass
class OptimFlags(FlagGroup):
    """Training: how long, in batches of what size, and with which optimizer"""

    steps: int = HfArg(default=100, help="how many optimizer steps to take")
    batch_size: int = HfArg(default=64, help="samples in a step, over all processes")
    eval_every: int = HfArg(default=0, help="evaluate every N steps; 0: only at the end")
    lr: float = HfArg(default=1e-3, help="peak learning rate of AdamW")
    schedule: str = HfArg(
        default="cosine",
        metadata={"choices": SCHEDULES},
        help="how the learning rate falls after the warm-up",
    )
    warmup: int = HfArg(
        default=0, help="steps over which the learning rate rises from 0 to its peak"
    )
    final_lr: float = HfArg(
        default=0.1, help="the schedule falls towards this share of the peak learning rate"
    )
    betas: list[float] = HfArg(
        default_factory=lambda: [0.9, 0.95],
        help="AdamW's two decay rates, of the mean gradient and of the mean squared gradient",
    )
    weight_decay: float = HfArg(default=0.0, help="AdamW's weight decay, on matrices only")
    max_grad_norm: float = HfArg(
        default=1.0,
        metadata={"may_be_infinite": True},
        help="gradients are scaled down to at most this norm, over all weights; inf: never",
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "steps", "batch_size")
        at_least(self, 0, "eval_every", "lr", "warmup", "final_lr", "weight_decay")
        require(self.max_grad_norm > 0, "--max_grad_norm must be positive")
        good = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(good, "--betas takes two numbers in [0, 1)")


@dataclass
class LoraFlags(FlagGroup):
    """Trained weights: all of them, the upper layers, or LoRA adapters"""

    freeze_layers: float = HfArg(
        default=0.0,
        help="the share of the blocks, from the bottom, that stays as it is, along with the "
        "embeddings: between 0 and 1",
    )
    lora_rank: int = HfArg(
        default=0, help="train LoRA adapters of this rank, and heads, alone; 0: no adapters"
    )
    lora_alpha: float = HfArg(
        default=16.0, help="an adapter adds lora_alpha / lora_rank * B A to its weight"
    )
    lora_dropout: float = HfArg(
        default=0.0,
        help="probability of dropout before A; train_ppo.py switches all dropout off",
    )
    lora_layers: list[str] = HfArg(
        default_factory=lambda: ["all-linear"],
        help="which linear layers get an adapter: ends of their names, or regular expressions; "
        "all-linear: every one but the output head",
    )
    frozen_dtype: str = HfArg(
        default="float32",
        metadata={"choices": ("float32", "bfloat16")},
        help="what the linear layers that are not trained are kept in. bfloat16: half the memory "
        "and no casts, with the same results, as --dtype bfloat16 computes with them in bfloat16 "
        "anyway. Reward models that score keep float32",
    )
    merge: bool = HfArg(
        default=False,
        help="save the whole model with the adapters merged into it, instead of a PEFT folder",
    )

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.freeze_layers <= 1, "--freeze_layers must lie between 0 and 1")
        at_least(self, 0, "lora_rank")
        require(self.lora_alpha > 0, "--lora_alpha must be positive")
        require(0 <= self.lora_dropout < 1, "--lora_dropout must lie in [0, 1)")
        require(
            not (self.lora_rank and self.freeze_layers),
            "--lora_rank freezes all but the adapters: it takes no --freeze_layers",
        )
        require(self.lora_rank or not self.merge, "--merge is for adapters: it needs --lora_rank")
        # The other flags of adapters say nothing either where there are none.
        if not self.lora_rank:
            unread = changed_flags(self, ("lora_alpha", "lora_dropout", "lora_layers"))
            require(not unread, f"without --lora_rank nothing reads {', '.join(unread)}")
        require(
            self.frozen_dtype == "float32" or self.lora_rank or self.freeze_layers,
            f"--frozen_dtype {self.frozen_dtype} is for weights that are not trained: it needs "
            "--lora_rank or --freeze_layers",
        )


@dataclass
class RunFlags(FlagGroup):
    """The run: its folder, its random draws, its checkpoints"""

    output_dir: str = HfArg(default="runs/run", help="the folder that the run writes")
    seed: int = HfArg(default=0, help=SEED_HELP)
    checkpoint_every: int = HfArg(default=50, help="write a checkpoint every N steps")
    keep_checkpoints: int = HfArg(default=2, help="how many checkpoints to keep")
    resume: bool = HfArg(
        default=False, help="continue the run in --output_dir, with its own settings"
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "seed")
        at_least(self, 1, "checkpoint_every", "keep_checkpoints")


# ----------------------------------------------------------------------------------------- machine

DEVICES = {"choices": ("auto", "cpu", "cuda")}
DEVICE_HELP = "where to compute; auto: on a GPU if there is one"


@dataclass
class DeviceFlags(FlagGroup):
    """The device, and the numbers it computes with"""

    device: str = HfArg(default="auto", metadata=dict(DEVICES), help=DEVICE_HELP)
    dtype: str = HfArg(
        default="float32",
        metadata={"choices": ("float32", "bfloat16", "auto")},
        help="the numbers of matrix products; what is trained is float32 in any case. auto: "
        "bfloat16 where the device is fast at it",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dtype == "auto":
            self.dtype = distributed.fast_dtype(self.device)


@dataclass
class MemoryFlags(FlagGroup):
    """Memory, speed and processes: they hardly change the result"""

    micro_batch_size: int = HfArg(
        default=64,
        help="samples in one forward pass of one process. It changes memory, not results; but "
        "with dropout (in the training of SFT and reward models; PPO and pairs have none) it "
        "changes the noise, and so results too",
    )
    tokens_per_micro_batch: int = HfArg(
        default=0,
        help="instead of --micro_batch_size: as many samples as fit into this many tokens; 0: "
        "off. With dropout it changes results too",
    )
    distributed: str = HfArg(
        default="ddp",
        metadata={"choices": ("ddp", "fsdp")},
        help="how several processes share a model: ddp, a copy each, or fsdp, a part each, for "
        "models that do not fit one GPU",
    )
    checkpoint_activations: bool = HfArg(
        default=False,
        help="keep only the inputs of blocks and compute the rest again: less memory, the same "
        "results",
    )
    compile: bool = HfArg(
        default=False,
        help="compile the blocks with torch.compile: a minute of warm-up, then faster steps; on a "
        "GPU also those of PPO's rollouts, which then keep their cache",
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "micro_batch_size")
        at_least(self, 0, "tokens_per_micro_batch")


@dataclass
class RunConfig(TextFlags, SplitFlags, OptimFlags, LoraFlags, RunFlags, DeviceFlags, MemoryFlags):
    """All flags that train_sft.py, train_rm.py and train_ppo.py share."""

    def __post_init__(self):
        super().__post_init__()
        require(
            self.frozen_dtype in ("float32", self.dtype),
            f"--frozen_dtype {self.frozen_dtype} needs --dtype {self.frozen_dtype}, "
            f"not {self.dtype}",
        )


# ------------------------------------------------------------------------ commands without training


@dataclass
class ResultFlags(FlagGroup):
    """Results: where they are written, and where they are computed"""

    output_dir: str = results_in("runs/probe")
    device: str = HfArg(default="auto", metadata=dict(DEVICES), help=DEVICE_HELP)
    dtype: str = HfArg(
        default="float32",
        metadata={"choices": ("float32", "bfloat16")},
        help="the numbers of matrix products; weights are float32 in any case",
    )


@dataclass
class EndpointFlags(FlagGroup):
    """The endpoint: how patiently it is asked"""

    pause: float = HfArg(
        default=1.0,
        help="seconds to wait before a busy endpoint is asked again; doubled each time",
    )
    timeout: float = HfArg(default=60.0, help="seconds to wait for an answer of the endpoint")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "pause")
        require(self.pause <= A_DAY, f"--pause must be at most a day ({A_DAY} seconds)")
        require(self.timeout > 0, "--timeout must be positive")
        require(self.timeout <= A_DAY, f"--timeout must be at most a day ({A_DAY} seconds)")

"""A study on your own model and data: the flags that all studies share for it, and what they become
in the commands.

    in the embedded world                        on your own data (--dataset is given)
    train_sft.py from random weights             from --model on --sft_dataset, or --model as it is
    pairs of world:S, for each seed S a cue      --pairs, the same for all seeds
    prompts of the world                         --dataset
    world:gold                                   --gold_model; without one there is no gold

What is there in a folder is not run again: give each model and data set an --output_dir of its own.
Without one it is own/ in the study's default folder, which is that of the embedded world.

Functions that write flags end them with a space, and write nothing in the embedded world.
"""

from dataclasses import dataclass
from shlex import quote

from transformers.hf_argparser import HfArg

from .. import data
from ..errors import require
from ..runtime.flags import FlagGroup


@dataclass
class OwnDataFlags(FlagGroup):
    """Your own model and data: without these flags a study runs on the embedded world"""

    model: str = HfArg(
        default="",
        help="the SFT policy that all starts from, or with --sft_dataset the model that it is "
        "trained from: a run folder, a model folder or a hub name",
    )
    dataset: str = HfArg(
        default="",
        help="the prompts that policies answer: a file, folder or data set, as --dataset of "
        "train_ppo.py",
    )
    sft_dataset: str = HfArg(
        default="", help="demonstrations on which the SFT policy is trained first, from --model"
    )
    pairs: str = HfArg(
        default="",
        help="preferences, which reward models are trained on; by default those in --dataset",
    )
    gold_model: str = HfArg(
        default="",
        help="a reward that says what answers are worth and trains nothing, as --gold_model of "
        "train_ppo.py; without one there is no gold",
    )
    data_flags: str = HfArg(
        default="",
        help="further flags of every command that reads your data, such as --prompt_format or "
        "--in_distribution; what concerns one script alone goes into --ppo_flags and the like",
    )
    dry_run: bool = HfArg(
        default=False, help="print every command with its size, in order, and run nothing"
    )

    def __post_init__(self):
        super().__post_init__()
        # A study names the world itself: world:S for each seed, with a cue of its own.
        is_world = data.is_world(self.dataset)
        require(not is_world, "--dataset world is what a study runs on without --dataset")
        require(self.model or not self.dataset, "--dataset is your own data: name a --model too")
        # Each of these flags replaces a part of the world, and does not fit the parts that stay.
        for name in ("sft_dataset", "pairs", "gold_model", "data_flags"):
            is_alone = getattr(self, name) and not self.dataset
            require(not is_alone, f"--{name} is for data of your own: it goes with --dataset")


def has_own_data(a) -> bool:
    """Whether a study runs on its user's data, and not on the embedded world."""
    return bool(a.dataset)


# ---------------------------------------------------------------------------- in the commands


def has_one_sft(a) -> bool:
    """Whether --model is the SFT policy itself: it comes without demonstrations."""
    return bool(a.model) and not a.sft_dataset


def sft_of(a) -> str:
    """The SFT policy, as commands name it: the folder that it is trained in, or --model itself."""
    # quote(): a command is one line of text, in which a path with spaces would be several words.
    if has_one_sft(a):
        return quote(a.model)
    return f"{a.output_dir}/sft"


def sft_commands(a) -> list[str]:
    """The command that trains the SFT policy; none where --model is one."""
    if has_one_sft(a):
        return []
    return [f"train_sft.py {sft_start(a)}--output_dir {sft_of(a)} {a.sft_flags}"]


def sft_start(a) -> str:
    """The flags of what an SFT policy is trained from, and on."""
    # In the embedded world train_sft.py starts from random weights, on the world's demonstrations.
    if not a.sft_dataset:
        return ""
    return f"--model {quote(a.model)} --dataset {quote(a.sft_dataset)} {spaced(a.data_flags)}"


def pair_flags(a, seed: int) -> str:
    """The flags of the pairs of a seed, without a space at the end."""
    # world:SEED: each seed draws pairs with a cue of its own.
    if not has_own_data(a):
        return f"--dataset world:{seed}"
    return f"--dataset {quote(a.pairs or a.dataset)} {a.data_flags}".strip()


def prompt_flags(a) -> str:
    """The flags of a command that answers prompts: which prompts, and what says their worth."""
    if not has_own_data(a):
        return ""
    return f"--dataset {quote(a.dataset)} {spaced(a.data_flags)}{gold_flags(a)}"


def gold_flags(a) -> str:
    """The flag of the gold reward."""
    if not a.gold_model:
        return ""
    return f"--gold_model {quote(a.gold_model)} "


def spaced(flags: str) -> str:
    """Flags with a space at their end; nothing for none."""
    if not flags:
        return ""
    return f"{flags} "


# ---------------------------------------------------------------------------- what is different


def describe_own_data(a) -> list[str]:
    """What of the embedded world is replaced, or left out, on one's own data: lines to print."""
    if not has_own_data(a):
        return []
    lines = ["all seeds share the data, and differ in their random draws alone"]
    if not a.gold_model:
        lines.append("no --gold_model: nothing says what the answers are truly worth")
    return lines


def print_remarks(remarks: list[str]):
    """One line for each thing that is different from the embedded world."""
    for remark in remarks:
        print(f"your own data: {remark}")

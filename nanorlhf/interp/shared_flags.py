"""Flags that commands of probe.py share, and train_sae.py with them."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..errors import at_least
from ..formats import FORMATS
from ..hf.activations import SITES
from ..runtime.flags import FlagGroup
from ..runtime.results import parse_ids

SITE_HELP = "which part of a block puts out what is read"


@dataclass
class TokenFlags(FlagGroup):
    """Rows and tokens: what of the data is read"""

    kind: str = HfArg(
        default="sft",
        metadata={"choices": tuple(FORMATS)},
        help="what the rows are: sft {prompt, response}, pairs {prompt, chosen, rejected}, or "
        "prompts {prompt}, each text as it is",
    )
    max_length: int = HfArg(
        default=0, help="tokens in the longest text; longer ones are cut; 0: the model's context"
    )
    keep_bos: bool = HfArg(
        default=False,
        help="count BOS too, and an EOS that has the same id; its norm is often most of the "
        "variance",
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "max_length")


@dataclass
class PlaceFlags(FlagGroup):
    """The place: whose activations the autoencoder reads, where its folder does not say it"""

    model: str = HfArg(
        default="",
        help="a run folder, a model folder or a hub name; by default the model that the folder "
        "names",
    )
    layer: int = HfArg(default=-1, help="number of the block; -1: the one that the folder names")
    site: str = HfArg(
        default="",
        metadata={"choices": ("", *SITES)},
        help=f"{SITE_HELP}; by default the site that the folder names",
    )


@dataclass
class DescribeFlags(FlagGroup):
    """Descriptions: of which features, and by which language model"""

    features: str = HfArg(
        default="",
        help="numbers of the features to describe, such as 3,17; by default the first --top",
    )
    top: int = HfArg(default=20, help="how many features to describe")
    contexts: int = HfArg(
        default=5, help="how many texts are kept for each, those in which it is largest"
    )
    explainer: str = HfArg(
        default="",
        help="ask this language model for descriptions: a model folder, a hub name, or "
        "http://HOST/v1, an OpenAI-compatible endpoint (its key: OPENAI_API_KEY)",
    )
    explainer_model: str = HfArg(default="", help="the model's name at the endpoint")
    plain_answers: bool = HfArg(
        default=False,
        help="take any reply of --explainer as the description, and not JSON, which small models "
        "seldom write; a feature is then related where the description says --related_to",
    )
    related_to: str = HfArg(
        default="the sentiment of a review", help="what a feature may have to do with, in words"
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "top")
        at_least(self, 1, "contexts")
        parse_ids(self.features)

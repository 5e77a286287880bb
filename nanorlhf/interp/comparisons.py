"""Bodies of two commands of probe.py: divergence, what changed between a base model and its policy,
and mmcs, how alike two sets of features are.

    L blocks, N tokens, n of them in one part, D hidden
    M features of a sparse autoencoder (Ma of A, Mb of B)

Every command writes <output_dir>/config.json, summary.json and a picture, and prints a table. It
computes everything again when it is called again, since the models in a folder may have changed.
"""

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from .. import data
from ..divergence import (
    add_up,
    divergence_sums,
    from_sums,
    matches,
    parameter_divergence,
    relative,
    select_layers,
)
from ..errors import at_least, require
from ..hf.activations import SITES, module_at, place_name
from ..hf.blocks import blocks
from ..hf.folders import check_model
from ..models import load_policy, load_shared_tokenizer
from ..runtime.curves import without_common_ends
from ..runtime.distributed import setup
from ..runtime.flags import FlagGroup, ResultFlags, TextFlags, results_in, subset_of
from ..runtime.locks import unlock_afterwards
from ..runtime.results import finite, results_folder, save, with_input_errors
from ..runtime.tensors import check_tensors, read_tensors
from .activation_store import Tokens, find_skipped, from_models, passes, tokenize_rows
from .sae_files import SPARSITY, find_saes, load_sae
from .shared_flags import TokenFlags

# ------------------------------------------------------------------------------------ divergence


@dataclass
class DivergenceConfig(TokenFlags, TextFlags, ResultFlags):
    """Models and layers: what is compared"""

    model: str = HfArg(
        default="runs/sft", help="the base: a run folder, a model folder or a hub name"
    )
    policy: str = HfArg(
        default="runs/ppo", help="the model that was trained from it; adapters are merged"
    )
    layers: str = HfArg(
        default="highest:5",
        help="which blocks to select: numbers such as 1,3, or highest:K, the K whose weights moved "
        "most (Frobenius norm), or lowest:K",
    )
    sites: list[str] = HfArg(
        default_factory=lambda: list(SITES),
        metadata={"choices": SITES},
        help="the parts of a block whose activations are compared",
    )
    max_rows: int = subset_of(256)

    output_dir: str = results_in("runs/probe/divergence")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "max_rows")


@unlock_afterwards()
def divergence(config):
    """How far a policy has moved from its base, block by block.

    It measures how far the weights of each block have moved, and how far what
    its layers put out has moved on the same texts. The relative column divides
    by the size of each weight, and so rules out that a block leads only because
    its matrices are large. The activations rule out that weights have moved in
    directions that no text uses. What no column rules out: each block passes on
    what the blocks below it changed, so that the largest number is not the place
    where the reward was learned. What would refute that PPO's reward put the
    change there: the base, trained on without any reward (train_sft.py --model
    runs/sft --seed 1), and given as --policy, moves in the same order of blocks.

    Weights: D_l, the sum over the parameters p of block l of
    ||p_base - p_policy||_F, and the same relative to ||p_base||_F.
    Activations: the mean over tokens of 1 - cosine, and of the squared distance
    divided by the base's variance. Method: nanorlhf/divergence.py.
    """
    dist = setup(config.device)
    folder = results_folder(config, dist)
    model_config = check_model(config.model)
    check_model(config.policy)
    # A wrong --layers is found here, before any model is loaded: for this, any L numbers will do.
    n_layers = model_config.get_text_config().num_hidden_layers
    with_input_errors(select_layers, [0.0] * n_layers, config.layers)
    tokens = read_tokens(config, model_config, dist)

    # Weights, block by block and parameter by parameter.
    base = load_policy(config.model, False, device=dist.device).lm
    policy = load_policy(config.policy, False, device=dist.device).lm
    table = with_input_errors(parameter_divergence, blocks(base), blocks(policy))
    frobenius = add_up(table)
    selected = with_input_errors(select_layers, frobenius, config.layers)

    # Activations, on the same texts.
    moved = compare_activations(config, {"base": base, "policy": policy}, tokens, dist)

    # The results: one row a block, which has an entry for each site and for each parameter.
    layers = []
    for layer, relative_divergence in enumerate(add_up(table, "relative")):
        row = {
            "layer": layer,
            "frobenius": frobenius[layer],
            "relative": finite(relative_divergence),
            "selected": layer in selected,
            "activations": {site: moved[layer, site] for site in config.sites},
            "parameters": describe_parameters(table[layer]),
        }
        layers.append(row)
    summary = {
        "model": config.model,
        "policy": config.policy,
        "texts": len(tokens.rows),
        "tokens": tokens.total,
        "selected": selected,
        "layers": layers,
    }
    text = format_divergence(summary, config.sites)
    save(config, folder, summary, text, draw_divergence)
    dist.barrier()
    return summary


def read_tokens(config, model_config, dist) -> Tokens:
    """The Tokens of the texts that both models read. InputError: they have different tokenizers."""
    rows = data.read_rows(config.dataset, config.kind, config.columns)
    rows = data.subset(rows, config.max_rows)
    has_eos = config.kind != "prompts"
    tokenizer = load_shared_tokenizer(config.model, [config.policy], needs_eos=has_eos)
    texts = tokenize_rows(config, tokenizer, rows, model_config, dist)
    return Tokens(texts, find_skipped(config, tokenizer))


def compare_activations(
    config, lms: dict, tokens: Tokens, dist
) -> dict[tuple[int, str], dict[str, float]]:
    """Compare what the models {"base", "policy"} put out at config.sites of every block.

    -> {(layer, site): {"cosine", "squared"}}, as divergence.activation_divergence() has them, over
    the tokens of all processes. InputError: a site that one of the models lacks.
    """
    places = []
    for layer in range(len(blocks(lms["base"]))):
        for site in config.sites:
            places.append((layer, site))
    if not places:
        return {}
    # A site that is not there is an error before anything is computed.
    for lm in lms.values():
        for place in places:
            module_at(lm, place)

    # The sums over parts of the tokens simply add up, and so do those of processes.
    size = lms["base"].config.get_text_config().hidden_size
    sums = {}
    for place in places:
        sums[place] = torch.zeros(4 + size, dtype=torch.float64, device=dist.device)
    source = from_models(tokens, lms, places, dist, config.dtype)
    for part in passes(tokens, source, dist, at_once=2**12):
        for place in places:
            x = part[f"base/{place_name(place)}"]  # [n, D]
            y = part[f"policy/{place_name(place)}"]  # [n, D]
            sums[place] += divergence_sums(x, y)

    # Every process calls sum() once a place, however few texts it had: collective calls must match.
    moved = {}
    for place in places:
        moved[place] = with_input_errors(from_sums, dist.sum(sums[place]))
    return moved


def describe_parameters(table_row: dict[str, dict]) -> dict[str, dict]:
    """One block of a parameter_divergence(), with the relative divergence of each parameter."""
    parameters = {}
    for name, norms in table_row.items():
        parameters[name] = {**norms, "relative": finite(relative(norms))}
    return parameters


def format_divergence(summary: dict, sites: list[str]) -> str:
    """One line a block, * where it is selected, and the parameters that moved most."""
    site_names = "".join(f"{site:>19s}   " for site in sites)
    lines = [
        f"\n{summary['policy']} against {summary['model']}, on {summary['texts']} texts, "
        f"{summary['tokens']} tokens:",
        f"  {'':8s}{'weights':>19s}   {site_names}",
        "  layer  Frobenius  relative" + "     1 - cos   squared" * len(sites),
    ]
    moved = []  # of all parameters: (how far, name)
    for row in summary["layers"]:
        mark = "*" if row["selected"] else " "
        # JSON knows no infinity: summaries hold None in its place.
        relative_divergence = row["relative"]
        if relative_divergence is None:
            relative_divergence = math.inf
        line = f"{mark:>2s}{row['layer']:5d}  {row['frobenius']:9.3f} {relative_divergence:9.3f}"
        for site in sites:
            numbers = row["activations"][site]
            line += f"{numbers['cosine']:12.4f}{numbers['squared']:10.4f}"
        lines.append(line)
        for name, norms in row["parameters"].items():
            moved.append((norms["frobenius"], f"{row['layer']}.{name}"))

    selected = ", ".join(map(str, summary["selected"]))
    moved.sort(reverse=True)
    most = ", ".join(f"{name} {how_far:.3f}" for how_far, name in moved[:4])
    lines.append(f"  selected (*): {selected}; parameters that moved most: {most}")
    return "\n".join(lines)


def draw_divergence(figure, summary: dict):
    """Weights and activations, one bar a block; selected blocks are darker."""
    rows = summary["layers"]
    colors = ["C0" if row["selected"] else "lightgrey" for row in rows]
    panels = {
        "weights: Frobenius": [row["frobenius"] for row in rows],
        # Infinite (None) where a zero parameter moved: no bar can show it.
        "weights: relative": [row["relative"] or 0 for row in rows],
    }
    for site in rows[0]["activations"]:
        cosine_distances = [row["activations"][site]["cosine"] for row in rows]
        panels[f"{site}: 1 - cosine"] = cosine_distances

    figure.set_size_inches(3 * len(panels), 2.6)
    for i, (name, values) in enumerate(panels.items()):
        axis = figure.add_subplot(1, len(panels), i + 1)
        axis.bar([row["layer"] for row in rows], values, color=colors)
        axis.set(title=name, xlabel="block")
        axis.xaxis.get_major_locator().set_params(integer=True)


# ------------------------------------------------------------------------------------------ mmcs


@dataclass
class MmcsConfig(FlagGroup):
    """Autoencoders, and the results of comparing them"""

    a: list[str] = HfArg(
        help="folders of sparse autoencoders, of train_sae.py or SAELens; * and {seed} stand for "
        "all that exist",
    )
    b: list[str] = HfArg(
        default_factory=list, help="what they are compared with; by default with one another"
    )
    one_to_one: bool = HfArg(
        default=False, help="match each feature of B at most once (the Hungarian algorithm)"
    )
    top: int = HfArg(default=20, help="how many of the best matched features are written down")
    output_dir: str = results_in("runs/probe/mmcs")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "top")
        self.a = find_saes(self.a)
        self.b = find_saes(self.b)
        require(self.pairs(), "--a names one folder: name others to compare it with, as --b")

    def pairs(self) -> list[tuple[str, str]]:
        """(A, B) to compare: each of --a with each of --b, or with the others of --a."""
        # Without --b two folders are compared in both orders, since MMCS is not symmetric.
        pairs = []
        for a in self.a:
            for b in self.b or self.a:
                if a != b:
                    pairs.append((a, b))
        return pairs


@unlock_afterwards()
def mmcs(config):
    """How alike the features of autoencoders are.

    It measures how much of what autoencoder A has learned is found in B too: for
    each feature of A the largest cosine of its direction with one of B, and the
    mean of these (mean max cosine similarity). The column "chance", the same
    number for random directions, rules out that in so few dimensions some
    feature of B is always near. Another seed of the same model is the noise
    floor: base and policy differ by training only as far as they lie below it.
    Different seeds on both sides rule out that two autoencoders are alike
    because they started alike, as those of one seed do. What would refute that
    training made new features: base against policy of another seed is as alike
    as two seeds of the base.

    Features that never fire are left out where the folder tells (SAELens'
    sparsity.safetensors). Method: nanorlhf/divergence.py.
    """
    dist = setup("cpu")
    folder = results_folder(config, dist)
    ids = {}  # {path: the features that fire: [M]}
    directions = {}  # {path: their decoder directions: [M, D]}
    # Each folder is read once, in however many pairs it stands.
    for path in dict.fromkeys(config.a + config.b):
        # A feature that never fires explains nothing, and would only bring MMCS nearer to chance.
        all_directions = load_sae(path).decoder_directions().detach()
        ids[path] = find_live_features(path, len(all_directions))
        directions[path] = all_directions[ids[path]]

    rows = []
    for a, b in config.pairs():
        row = {"a": a, "b": b}
        row |= compare_directions(config, directions[a], directions[b], ids[a], ids[b])
        rows.append(row)
    summary = {"one_to_one": config.one_to_one, "pairs": rows}
    save(config, folder, summary, format_mmcs(summary), draw_mmcs)
    return summary


def compare_directions(
    config, directions_a: Tensor, directions_b: Tensor, ids_a: Tensor, ids_b: Tensor
) -> dict:
    """Match directions [Ma, D] with directions [Mb, D] -> what summary.json says of the pair.

    ids_a [Ma], ids_b [Mb]: the features whose directions they are.
    """
    a, b, cosines = with_input_errors(matches, directions_a, directions_b, config.one_to_one)

    # What as many random directions of the same width would have.
    generator = torch.Generator().manual_seed(0)
    noise_a = torch.randn(directions_a.shape, generator=generator)
    noise_b = torch.randn(directions_b.shape, generator=generator)
    _, _, chance = matches(noise_a, noise_b, config.one_to_one)

    # The pairs that are most alike: [feature of A, feature of B, cosine].
    best = []
    for i in cosines.argsort(descending=True)[: config.top].tolist():
        best.append([ids_a[a[i]].item(), ids_b[b[i]].item(), cosines[i].item()])
    return {
        "features_a": len(directions_a),
        "features_b": len(directions_b),
        "mmcs": cosines.double().mean().item(),
        "chance": chance.mean().item(),
        "above_0.9": (cosines > 0.9).double().mean().item(),
        "best": best,
        "histogram": torch.histc(cosines.clamp(0, 1), 20, 0, 1).long().tolist(),
    }


def find_live_features(path: str, m: int) -> Tensor:
    """The ids of an autoencoder's m features, without those of which its folder says that they
    never fired."""
    file = os.path.join(path, SPARSITY)
    if not os.path.lexists(file):
        return torch.arange(m)
    tensors = read_tensors(file)
    check_tensors(tensors, {"sparsity": [m]}, file)
    # The file holds log10(rate + 1e-10): -10 where a feature never fired, up to rounding.
    return (tensors["sparsity"] > -9.99).nonzero()[:, 0]


def format_mmcs(summary: dict) -> str:
    """One line a pair."""
    width = 0
    for row in summary["pairs"]:
        width = max(width, len(row["a"]), len(row["b"]))
    matching = ", one to one" if summary["one_to_one"] else ""
    lines = [
        f"\nMean max cosine similarity{matching}:",
        f"  {'A':{width}s}  {'B':{width}s}   features A, B    MMCS  chance  above 0.9",
    ]
    for row in summary["pairs"]:
        lines.append(
            f"  {row['a']:{width}s}  {row['b']:{width}s}"
            f"  {row['features_a']:7d}{row['features_b']:8d}"
            f"   {row['mmcs']:.3f}   {row['chance']:.3f}      {row['above_0.9']:.3f}"
        )
    return "\n".join(lines)


def draw_mmcs(figure, summary: dict):
    """How the best cosines of A's features are spread, one line for each of the first ten pairs."""
    axis = figure.add_subplot()
    paths = set()
    for row in summary["pairs"]:
        paths.update((row["a"], row["b"]))
    names = without_common_ends(paths)
    edges = [i / 20 for i in range(21)]
    for row in summary["pairs"][:10]:
        n = sum(row["histogram"])
        shares = [count / n for count in row["histogram"]]
        label = f"{names[row['a']]} in {names[row['b']]}: {row['mmcs']:.2f}"
        axis.stairs(shares, edges, label=label)
    axis.set(xlabel="largest cosine with a feature of B", ylabel="share of A's features")
    axis.legend()

"""Bodies of probe.py's commands: what changed between a base model and its policy, and how alike two sets of features are.

    L blocks, N tokens, D hidden, M features of a sparse autoencoder (Ma of A, Mb of B)

Every command writes <output_dir>/config.json, summary.json and a picture, and prints a table. It computes everything again when it is
called again, since the models in a folder may have changed.
"""

import glob
import math
import os
from dataclasses import dataclass

import torch
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
from ..hf.folders import check_model, context_length
from ..models import load_policy, load_tokenizer
from ..runtime import plots
from ..runtime.distributed import setup
from ..runtime.flags import FlagGroup, ResultFlags, TextFlags
from ..runtime.hints import check_made
from ..runtime.locks import unlock_afterwards
from ..runtime.results import finite, in_one_line, results_folder, save
from ..runtime.tensors import check_tensors, read_tensors
from .activation_store import Tokens, from_models, passes, token_rows
from .probe_flags import TokenFlags
from .sae_files import SPARSITY, load_sae

# ---------------------------------------------------------------------------------------------------------------------- divergence


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
    max_rows: int = HfArg(default=256, help="use a random subset of this many rows; 0: all rows")

    output_dir: str = HfArg(
        default="runs/probe/divergence", help="the folder that the results are written to"
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "max_rows")


@unlock_afterwards()
def divergence(config):
    """How far a policy has moved from its base, block by block.

    Weights: D_l, the sum over the parameters p of block l of
    ||p_base - p_policy||_F, and the same relative to ||p_base||_F.
    Activations, on the same texts: the mean over tokens of 1 - cosine, and
    of the squared distance divided by the base's variance.
    Method: nanorlhf/divergence.py.
    """
    dist = setup(config.device)
    folder = results_folder(config, dist)
    model_config = check_model(config.model)
    check_model(config.policy)
    in_one_line(select_layers, [0.0] * model_config.get_text_config().num_hidden_layers, config.layers)
    tokens = texts_of(config, model_config, dist)
    lms = {name: load_policy(path, False, device=dist.device).lm for name, path in (("base", config.model), ("policy", config.policy))}
    table = in_one_line(parameter_divergence, blocks(lms["base"]), blocks(lms["policy"]))
    frobenius, shares = add_up(table), add_up(table, "relative")
    selected = in_one_line(select_layers, frobenius, config.layers)
    moved = compare_activations(config, lms, tokens, dist)

    layers = [
        {"layer": layer, "frobenius": frobenius[layer], "relative": finite(shares[layer]), "selected": layer in selected,
         "activations": {site: moved[layer, site] for site in config.sites},
         "parameters": {name: {**p, "relative": finite(relative(p))} for name, p in table[layer].items()}}
        for layer in range(len(table))
    ]  # fmt: skip
    summary = {"model": config.model, "policy": config.policy, "texts": len(tokens.rows), "tokens": tokens.total, "selected": selected,
               "layers": layers}  # fmt: skip
    save(config, folder, summary, divergence_table(summary, config.sites), draw_divergence)
    dist.barrier()
    return summary


def texts_of(config, model_config, dist):
    """The Tokens of the texts; an InputError where base and policy do not read the same tokens."""
    rows = data.subset(data.read_rows(config.dataset, config.kind, config.columns), config.max_rows)
    tokenizer = load_tokenizer(config.model, needs_eos=config.kind != "prompts")
    other = load_tokenizer(config.policy, needs_eos=False)
    require(tokenizer.get_vocab() == other.get_vocab(), f"{config.model} and {config.policy} have different tokenizers")
    rows, cut = token_rows(tokenizer, rows, config.max_length or context_length(model_config), config.chat_template)
    if cut:
        dist.print(f"{cut} of {len(rows)} texts cut")
    return Tokens(rows, None if config.keep_bos else tokenizer.bos_token_id)


def compare_activations(config, lms, tokens, dist):
    """{place: {cosine, squared}} at the config's sites of every block."""
    places = [(layer, site) for layer in range(len(blocks(lms["base"]))) for site in config.sites]
    for lm in lms.values():
        for place in places:
            module_at(lm, place)  # an error before anything is computed
    size = lms["base"].config.get_text_config().hidden_size
    sums = {place: torch.zeros(4 + size, dtype=torch.float64, device=dist.device) for place in places}
    for part in passes(tokens, from_models(tokens, lms, places, dist, config.dtype), dist, at_once=2**12) if places else ():
        for place in places:
            x, y = (part[f"{name}/{place_name(place)}"] for name in ("base", "policy"))  # [n, D]
            sums[place] += divergence_sums(x, y)
    return {place: in_one_line(from_sums, dist.sum(total)) for place, total in sums.items()}




def divergence_table(summary, sites):
    """One line a block, * where it is selected, and the parameters that moved most."""
    lines = [f"\n{summary['policy']} against {summary['model']}, on {summary['texts']} texts, {summary['tokens']} tokens:"]
    lines += [f"  {'':8s}{'weights':>19s}   " + "".join(f"{site:>19s}   " for site in sites)]
    lines += ["  layer  Frobenius  relative" + "     1 - cos   squared" * len(sites)]
    for row in summary["layers"]:
        numbers = [row["activations"][site][kind] for site in sites for kind in ("cosine", "squared")]
        weights = f"{row['frobenius']:9.3f} {math.inf if row['relative'] is None else row['relative']:9.3f}"
        text = "".join(f"{cosine:12.4f}{squared:10.4f}" for cosine, squared in zip(numbers[::2], numbers[1::2]))
        lines.append(f"{'*' if row['selected'] else ' ':>2s}{row['layer']:5d}  {weights}{text}")
    parameters = [(p["frobenius"], f"{row['layer']}.{name}") for row in summary["layers"] for name, p in row["parameters"].items()]
    most = ", ".join(f"{name} {moved:.3f}" for moved, name in sorted(parameters, reverse=True)[:4])
    return "\n".join([*lines, f"  selected (*): {', '.join(map(str, summary['selected']))}; parameters that moved most: {most}"])


def draw_divergence(figure, summary):
    """Weights and activations, one bar a block; selected blocks are darker."""
    layers = summary["layers"]
    panels = {"weights: Frobenius": [row["frobenius"] for row in layers], "weights: relative": [row["relative"] or 0 for row in layers]}
    for site in layers[0]["activations"]:
        panels[f"{site}: 1 - cosine"] = [row["activations"][site]["cosine"] for row in layers]
    figure.set_size_inches(3 * len(panels), 2.6)
    for i, (name, values) in enumerate(panels.items()):
        axis = figure.add_subplot(1, len(panels), i + 1)
        axis.bar([row["layer"] for row in layers], values, color=["C0" if row["selected"] else "lightgrey" for row in layers])
        axis.set(title=name, xlabel="block")
        axis.xaxis.get_major_locator().set_params(integer=True)


# ---------------------------------------------------------------------------------------------------------------------------- mmcs


@dataclass
class MmcsConfig(FlagGroup):
    """Autoencoders, and the results of comparing them"""

    a: list[str] = HfArg(
        help="folders of sparse autoencoders, of train_sae.py or SAELens; {seed} stands for all "
        "that exist",
    )
    b: list[str] = HfArg(
        default_factory=list, help="what they are compared with; by default with one another"
    )
    one_to_one: bool = HfArg(
        default=False, help="match each feature of B at most once (the Hungarian algorithm)"
    )
    top: int = HfArg(default=20, help="how many of the best matched features are written down")
    output_dir: str = HfArg(
        default="runs/probe/mmcs", help="the folder that the results are written to"
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "top")
        self.a, self.b = existing(self.a), existing(self.b)
        require(self.pairs(), "--a names one folder: name others to compare it with, as --b")

    def pairs(self):
        """(A, B) to compare: --a with --b, or with one another."""
        return [(a, b) for a in self.a for b in self.b or self.a if a != b]


def existing(paths):
    """Folders, {seed} expanded; one that is not there is an InputError."""
    found = {path: sorted(glob.glob(glob.escape(path).replace("{seed}", "*"))) for path in paths}
    for path in paths:
        check_made(path)
        require(found[path], f"{path}: no such sparse autoencoder (train_sae.py trains them)")
    return [path for part in found.values() for path in part]


@unlock_afterwards()
def mmcs(config):
    """How alike the features of autoencoders are.

    Mean max cosine similarity: for each feature of A, the largest cosine of
    its decoder direction with one of B; the mean over A. A small autoencoder
    against a large one of the same model: stability, and the features that
    match best. Base against policy: what training changed. One seed against
    another: the noise floor. `chance` is the same number for random
    directions. Method: nanorlhf/divergence.py.

    Features that never fire are left out where the folder tells (SAELens'
    sparsity.safetensors). Two autoencoders of one seed start from the same
    directions and keep some of them: compare base and policy with different
    seeds, so that the noise floor applies.
    """
    dist = setup("cpu")
    folder = results_folder(config, dist)
    ids = {path: None for path in config.a + config.b}
    features = {path: load_sae(path).decoder_directions().detach() for path in ids}  # [M, D]
    for path, directions in features.items():
        ids[path] = firing(path, len(directions))  # of the latents that are left
        features[path] = directions[ids[path]]
    rows = []
    for a, b in config.pairs():
        found, of_b, cosines = in_one_line(matches, features[a], features[b], config.one_to_one)
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(features[path].shape, generator=generator) for path in (a, b)]
        best = cosines.argsort(descending=True)[: config.top]
        rows.append({
            "a": a, "b": b, "features_a": len(features[a]), "features_b": len(features[b]), "mmcs": cosines.double().mean().item(),
            "chance": matches(*noise, config.one_to_one)[2].mean().item(), "above_0.9": (cosines > 0.9).double().mean().item(),
            "best": [[ids[a][found[i]].item(), ids[b][of_b[i]].item(), cosines[i].item()] for i in best.tolist()],
            "histogram": torch.histc(cosines.clamp(0, 1), 20, 0, 1).long().tolist(),
        })  # fmt: skip
    summary = {"one_to_one": config.one_to_one, "pairs": rows}
    save(config, folder, summary, mmcs_table(summary), draw_mmcs)
    return summary


def firing(path, m):
    """The ids of an autoencoder's latents, without those that its folder knows never to have fired."""
    file = os.path.join(path, SPARSITY)  # log10(rate + 1e-10)
    if not os.path.lexists(file):
        return torch.arange(m)
    tensors = read_tensors(file)
    check_tensors(tensors, {"sparsity": [m]}, file)
    return (tensors["sparsity"] > -9.99).nonzero()[:, 0]


def mmcs_table(summary):
    """One line a pair."""
    width = max(len(row[side]) for row in summary["pairs"] for side in "ab")
    lines = [f"\nMean max cosine similarity{', one to one' if summary['one_to_one'] else ''}:"]
    lines += [f"  {'A':{width}s}  {'B':{width}s}   features A, B    MMCS  chance  above 0.9"]
    for row in summary["pairs"]:
        names, sizes = (f"{row[side]:{width}s}" for side in "ab"), f"{row['features_a']:7d}{row['features_b']:8d}"
        lines.append("  ".join(["", *names, sizes, f" {row['mmcs']:.3f}   {row['chance']:.3f}      {row['above_0.9']:.3f}"]))
    return "\n".join(lines)


def draw_mmcs(figure, summary):
    """Of each pair how A's features' best cosines are spread."""
    axis = figure.add_subplot()
    names = plots.without_common_ends({row[side] for row in summary["pairs"] for side in "ab"})
    edges = [i / 20 for i in range(21)]
    for row in summary["pairs"][:10]:
        label = f"{names[row['a']]} in {names[row['b']]}: {row['mmcs']:.2f}"
        axis.stairs([n / sum(row["histogram"] or [1]) for n in row["histogram"]], edges, label=label)
    axis.set(xlabel="largest cosine with a feature of B", ylabel="share of A's features")
    axis.legend()

"""Body of `probe.py features`: what the features of sparse autoencoders stand for.

    N tokens of held-out texts, n of them on which a feature fires, D hidden
    M features, F of them described, V vocabulary

Each of the chosen features is described: where it is largest, the tokens it fires on, what it adds
to the logits. In the embedded world the truth is known, so all features are also set against all
its concepts (world_concepts.py).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from .. import data
from ..errors import at_least, require
from ..hf.activations import module_at
from ..hf.folders import check_model
from ..models import load_policy, load_tokenizer
from ..runtime.curves import without_common_ends
from ..runtime.distributed import setup
from ..runtime.flags import EndpointFlags, ResultFlags, TextFlags, results_in
from ..runtime.locks import unlock_afterwards
from ..runtime.results import parse_ids, results_folder, save
from .activation_store import (
    Tokens,
    find_skipped,
    hold_out,
    open_autoencoder,
    read_activations,
    tokenize_rows,
    where,
)
from .explainer import add_descriptions, check_explainer, make_context
from .feature_scores import encoded, sum_over_tokens
from .sae_files import find_saes
from .shared_flags import DescribeFlags, PlaceFlags, TokenFlags
from .world_concepts import CONTROLS, SCORES, is_world_model, measure_concepts

SHOWN = 8  # tokens in a description's lists
BINS = 20  # of the histogram of a feature's values


@dataclass
class FeaturesConfig(PlaceFlags, DescribeFlags, TokenFlags, TextFlags, EndpointFlags, ResultFlags):
    """Autoencoders: whose features are described, on how many texts"""

    sae: list[str] = HfArg(
        default_factory=lambda: ["runs/sae/*/*"],
        help="folders of sparse autoencoders, of train_sae.py or SAELens; * and {seed} stand for "
        "all that exist",
    )
    eval_size: int = HfArg(
        default=256,
        help="how many texts: those that train_sae.py held out, if it had the same number, all "
        "rows and --texts dataset",
    )

    top: int = HfArg(
        default=20,
        help="how many features to describe: those with the largest mean activation (rate x "
        "strength)",
    )
    output_dir: str = results_in("runs/probe/features")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "eval_size")


@unlock_afterwards()
def features(config):
    """What the features of autoencoders fire on, and what they do.

    It measures, in the embedded world, how many known concepts have a feature
    that singles them out (AUC above .95), and shows for each described feature
    where it fires and which words it makes likelier. The best of M features is
    chosen on one half of the texts and measured on the other, which rules out
    that the largest of many numbers is large by luck. The controls "coordinates"
    (no autoencoder) and "untrained" (random directions) rule out that the layer
    has the concept on one axis anyway, or that any large set of directions would
    do. The control "shuffled" (concepts that have exchanged their words) rules
    out that any set of so many words has a feature. What would refute that
    features are better units than coordinates: coordinates find as many concepts.

    The effect on words is the direct path alone: the decoder's direction through
    the unembedding, without the final norm and later layers.
    Method: nanorlhf/interp/feature_scores.py.
    """
    dist = setup(config.device)
    require(dist.world == 1, "probe.py features runs on one process")
    folder = results_folder(config, dist)
    check_explainer(config)
    # What is wrong with one of the folders is found before any model is loaded.
    opened = {path: open_autoencoder(config, path) for path in find_saes(config.sae)}
    rows = data.read_rows(config.dataset, config.kind, config.columns)

    lms = {}  # {model: its language model}, each loaded once
    results = {}
    for path, (sae, model, place) in opened.items():
        if model not in lms:
            lms[model] = load_policy(model, value_head=False, device=dist.device).lm
        # Each model may have a tokenizer of its own, so the texts are tokenized again.
        tokenizer = load_tokenizer(model, needs_eos=config.kind != "prompts")
        tokens = read_tokens(config, rows, model, tokenizer, dist)
        results[path] = {"model": model, "layer": place[0], "site": place[1]}
        results[path] |= look_at_features(config, sae, lms[model], place, tokens, tokenizer, dist)

    # The results are written before the explainer is asked, which takes long and may fail.
    summary = {"saes": results}
    text = format_table(results, in_full=bool(config.features))
    save(config, folder, summary, text, draw)
    if config.explainer:
        add_descriptions(config, results, summary)
    return summary


def read_tokens(config, rows: list[dict], model: str, tokenizer, dist) -> Tokens:
    """The Tokens of the texts that are looked at: those that train_sae.py holds out."""
    texts = tokenize_rows(config, tokenizer, rows, check_model(model), dist)
    _, held_out = hold_out(texts, config.eval_size, tokenizer)
    require(len(held_out) > 1, f"{config.dataset}: too few texts to hold two of them out")
    return Tokens(held_out, find_skipped(config, tokenizer))


@torch.no_grad()
def look_at_features(
    config, sae, lm, place: tuple[int, str], tokens: Tokens, tokenizer, dist
) -> dict:
    """Run one autoencoder on the tokens -> what summary.json says of its features.

    InputError: the model has no such place.
    """
    # A site that the model lacks is an error before the texts are run.
    module_at(lm, place)
    x = read_activations(tokens, lm, place, dist, config.dtype)  # [N, D]
    f = encoded(sae.to(dist.device), x)  # sparse [M, N]

    # All features are set against the concepts, but only some are described.
    result = {"m": sae.m, "texts": len(tokens.rows), "tokens": tokens.total}
    if is_world_model(tokenizer):
        result |= measure_concepts(sae, x, f, tokens, tokenizer)
    ids = parse_ids(config.features) or top_features(f, config.top)
    result["features"] = describe_features(config, ids, sae, f, tokens, tokenizer, lm)
    return result


def top_features(f: Tensor, n: int) -> list[int]:
    """The n features with the largest mean activation over all tokens: how often times how
    strongly. f: a sparse [M, N]."""
    # The sum ranks features as their mean does. If the rate alone ranked them, faint features that
    # always fire would lead; if the strength did, features that fire once.
    sums = sum_over_tokens(f)  # [M]
    return sums.topk(min(n, len(sums))).indices.tolist()


# ---------------------------------------------------------------------------------- descriptions


def describe_features(
    config, ids: list[int], sae, f: Tensor, tokens: Tokens, tokenizer, lm
) -> list[dict]:
    """Features -> [{id, rate, mean, max, histogram, tokens, contexts, up, down}]

    f: a sparse [M, N]. histogram: how often the feature has which value. tokens: [token, its share
    of all that the feature adds up to, on how many of its occurrences it fires]. contexts: the
    texts in which the feature is largest, with its values divided by its largest value. up, down:
    [token, logits for each unit along the feature's direction], over the mean of all tokens.
    """
    text_of, token_ids = where(tokens)  # [N] each

    # The direct path: what a feature's direction adds to the logits of all tokens.
    unembedding = lm.get_output_embeddings().weight.float()  # [V, D]
    effects = sae.decoder_directions()[ids].float() @ unembedding.T  # [F, V]
    # Softmax does not see the mean over the vocabulary.
    effects = (effects - effects.mean(1, keepdim=True)).cpu()
    n_occurrences = token_ids.bincount(minlength=effects.shape[1])  # [V]

    # The same tokens are shown again and again, so each is decoded once.
    @functools.cache
    def decode_token(i: int) -> str:
        return tokenizer.decode([i])

    # The entries of f: which feature fires on which token.
    f = f.cpu()
    feature, token = f.indices()
    descriptions = []
    for effects_of_feature, i in zip(effects, ids):
        fires = feature == i
        at = token[fires]  # [n]
        value = f.values()[fires]  # [n]
        # A feature that never fires on these texts has neither.
        mean = 0.0
        largest = 0.0
        if len(at):
            mean = value.mean().item()
            largest = value.abs().max().item()
        descriptions.append(
            {
                "id": i,
                "rate": len(at) / tokens.total,
                "mean": mean,
                "max": largest,
                "histogram": count_values(value),
                "tokens": find_top_tokens(token_ids[at], value, n_occurrences, decode_token),
                "up": find_effects(effects_of_feature, decode_token, largest=True),
                "down": find_effects(effects_of_feature, decode_token, largest=False),
                "contexts": top_contexts(config, tokens, text_of, at, value, largest, decode_token),
            }
        )
    return descriptions


def count_values(value: Tensor) -> dict:
    """The histogram of a feature's values [n]: {low, high, counts in bins of one width}."""
    if len(value) == 0:
        return {"low": 0.0, "high": 0.0, "counts": []}
    # The range always includes 0, so that a reader sees how far from 0 the values lie.
    low = min(0.0, value.min().item())
    high = max(0.0, value.max().item())
    counts = torch.histc(value.float(), BINS, low, high)
    return {"low": low, "high": high, "counts": counts.int().tolist()}


def find_top_tokens(
    token_ids: Tensor, value: Tensor, n_occurrences: Tensor, decode_token: Callable
) -> list[list]:
    """The tokens that a feature fires on most, all their occurrences together.

    token_ids, value [n]: where it fires; n_occurrences [V], whether it fires or not
    -> [[token, its share of all that the feature adds up to, share of occurrences it fires on]]
    """
    V = len(n_occurrences)
    # A token counts by the sum over its occurrences, not by its largest value. Without a ReLU
    # (SARM) a sum may be below 0: hence abs().
    total = torch.zeros(V).index_add(0, token_ids, value)  # [V]
    n_fired = token_ids.bincount(minlength=V)  # [V]
    rows = []
    for i in total.abs().topk(min(SHOWN, V)).indices.tolist():
        # topk() fills up with tokens of sum 0 where a feature fires on fewer than SHOWN tokens.
        if n_fired[i] > 0:
            share = (total[i] / total.sum()).item()
            how_often = (n_fired[i] / n_occurrences[i]).item()
            rows.append([decode_token(i), share, how_often])
    return rows


def find_effects(effects: Tensor, decode_token: Callable, largest: bool) -> list[list]:
    """The tokens whose logits a feature raises most, or lowers most.

    effects [V], of the feature -> [[token, effect]]
    """
    rows = []
    for i in effects.topk(SHOWN, largest=largest).indices.tolist():
        rows.append([decode_token(i), effects[i].item()])
    return rows


def top_contexts(
    config,
    tokens: Tokens,
    text_of: Tensor,
    at: Tensor,
    value: Tensor,
    largest: float,
    decode_token: Callable,
) -> list[dict]:
    """The texts in which a feature is largest: [{text, tokens, values}]

    text_of [N]: the text of each token; value [n]: the feature's, on the tokens `at` [n]. Values
    are given as shares of `largest`, the feature's largest anywhere.
    """
    n_texts = len(tokens.rows)
    # The largest value in each text; 0 where the feature is nowhere above 0.
    peak = torch.zeros(n_texts).scatter_reduce(0, text_of[at], value, "amax")  # [texts]
    columns = torch.from_numpy(tokens.columns())  # [N]
    contexts = []
    for i in peak.topk(min(config.contexts, n_texts)).indices.tolist():
        if peak[i] > 0:
            # Tokens that do not count, such as BOS, are shown with 0.
            here = text_of[at] == i
            values = torch.zeros(len(tokens.rows[i]))
            values[columns[at[here]]] = value[here] / largest
            context = make_context(tokens.rows[i], values.tolist(), decode_token)
            contexts.append({"text": i, **context})
    return contexts


# -------------------------------------------------------------------------------- table, picture


def format_table(results: dict[str, dict], in_full: bool) -> str:
    """The best feature of each concept in every autoencoder, the counts, and the described
    features, one line each; in_full: with the texts in which they are largest."""
    lines = []
    with_concepts = find_results_with_concepts(results)
    if with_concepts:
        short_names = shorten_names(results)
        names = [short_names[path] for path in with_concepts]
        lines += format_concepts(list(with_concepts.values()), names)
        lines += format_counts(list(with_concepts.values()))
    for path, result in results.items():
        lines += format_features(path, result, in_full)
    return "\n".join(lines)


def find_results_with_concepts(results: dict[str, dict]) -> dict[str, dict]:
    """The results of models that speak the embedded world's words."""
    return {path: result for path, result in results.items() if "concepts" in result}


def shorten_names(results: dict[str, dict]) -> dict[str, str]:
    """{path: what tells it from the others}; a path alone stays as it is."""
    # runs/sae/base/3_mlp and runs/sae/policy/3_mlp -> base and policy
    short_names = without_common_ends(set(results))
    return {path: name or path for path, name in short_names.items()}


def format_concepts(results: list[dict], names: list[str]) -> list[str]:
    """One line for each concept, with its best feature in each of the autoencoders."""
    lines = [
        "\nAUC of the best feature of each concept, chosen on one half of the texts and measured "
        "on the other:",
        f"  {'concept':12s}{'words':>6s}" + "".join(f"{name:>18s}" for name in names),
    ]
    # A concept may be too rare on the texts of some of the models.
    concepts = {}  # {concept: its number of words}
    for result in results:
        for concept, row in result["concepts"].items():
            concepts.setdefault(concept, row["words"])
    for concept, n_words in concepts.items():
        line = f"  {concept:12s}{n_words:6d}"
        for result in results:
            cell = "-"
            if concept in result["concepts"]:
                auc = result["concepts"][concept]["auc"]
                cell = f"{auc['features']:9.3f} ({auc['feature']:5d}) "
            line += f"{cell:>18s}"
        lines.append(line)
    return lines


def format_counts(results: list[dict]) -> list[str]:
    """How many concepts have a good feature, or a good control, by each score."""
    titles = {
        "concept": "concepts",
        "next": "concepts of the next token",
        "word": "single words",
    }
    lines = []
    for kind, title in titles.items():
        # {"of": .., "auc": {"features": .., "coordinates": .., ..}, ..} of each autoencoder
        counts = [result["found"][kind] for result in results]
        all_concepts = ", ".join(str(row["of"]) for row in counts)
        for score, (_, good) in SCORES.items():
            head = f"  {title} with {score} > {good}"
            lines.append(f"{head:20s}  of {all_concepts}")
            for name in ("features", *CONTROLS):
                if name in counts[0][score]:  # not every control suits every kind
                    numbers = "".join(f"{row[score][name]:18.3g}" for row in counts)
                    lines.append(f"    {name:16s}{numbers}")
    return lines


def format_features(path: str, result: dict, in_full: bool) -> list[str]:
    """One line for each described feature of an autoencoder."""
    lines = [
        f"\n{path}: {result['model']}, layer {result['layer']}, {result['site']}, "
        f"{result['tokens']} tokens; its largest features:",
        f"  {'id':>6s}{'rate':>8s}{'mean':>8s}  {'fires on':44s}{'raises':30s}lowers",
    ]
    for feature in result["features"]:
        fires_on = join_tokens(feature["tokens"])
        raises = join_tokens(feature["up"])
        lowers = join_tokens(feature["down"])
        lines.append(
            f"  {feature['id']:6d}{feature['rate']:8.2%}{feature['mean']:8.2f}"
            f"  {fires_on[:42]:44s}{raises[:28]:30s}{lowers[:28]}"
        )
        if in_full:
            for context in feature["contexts"]:
                lines.append(f"          > {mark_context(context)}")
    return lines


def join_tokens(rows: list[list]) -> str:
    """Rows that begin with a token -> the tokens, in a line."""
    return " ".join(token.strip() for token, *_ in rows)


def mark_context(context: dict) -> str:
    """A context in a line, around its peak.

    After each token on which the feature fires stands its value, 10 being its largest anywhere.
    """
    parts = []
    sizes = []
    for token, value in zip(context["tokens"], context["values"]):
        mark = f"[{round(10 * value)}]" if value else ""
        parts.append(token.strip() + mark)
        sizes.append(abs(value))
    # What made the feature fire stands at its peak or before it, since the model is causal. What
    # follows may be what the feature predicts.
    peak = sizes.index(max(sizes))
    return " ".join(parts[max(0, peak - 8) : peak + 12])


def draw(figure, summary: dict):
    """AUC by concept. Where no concepts are known: how often and how strongly the described
    features fire."""
    results = summary["saes"]
    with_concepts = find_results_with_concepts(results)
    axis = figure.add_subplot()
    if with_concepts:
        figure.set_size_inches(8, 4)
        draw_concepts(axis, with_concepts, shorten_names(results))
    else:
        draw_strengths(axis, results, shorten_names(results))
    axis.legend()


def draw_strengths(axis, results: dict[str, dict], names: dict[str, str]):
    """One point for each described feature."""
    for path, result in results.items():
        rates = [feature["rate"] for feature in result["features"]]
        means = [feature["mean"] for feature in result["features"]]
        axis.loglog(rates, means, "o", label=names[path])
    axis.set(
        xlabel="share of the tokens on which it fires", ylabel="mean activation where it fires"
    )


def draw_concepts(axis, results: dict[str, dict], names: dict[str, str]):
    """The best feature of each concept in every autoencoder, and the mean of each control."""
    all_concepts = []  # models may have different texts, and so different concepts
    for i, (path, result) in enumerate(results.items()):
        concepts = list(result["concepts"])
        aucs = [row["auc"]["features"] for row in result["concepts"].values()]
        axis.plot(concepts, aucs, "o", color=f"C{i % 10}", label=names[path])
        for concept in concepts:
            if concept not in all_concepts:
                all_concepts.append(concept)

    # A concept's control is a mean over the autoencoders that have it.
    for control, marker in zip(CONTROLS, "x+."):
        means = []
        for concept in all_concepts:
            values = []
            for result in results.values():
                if concept in result["concepts"]:
                    value = result["concepts"][concept]["auc"][control]
                    if value is not None:
                        values.append(value)
            means.append(np.mean(values or [np.nan]))
        axis.plot(all_concepts, means, marker, color="grey", label=control)

    _, good = SCORES["auc"]
    axis.axhline(good, color="grey", linewidth=0.8)
    axis.tick_params(axis="x", rotation=70)
    axis.set_ylabel("AUC of the best, on the other half")

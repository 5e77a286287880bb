"""Body of `probe.py features`: what the features of sparse autoencoders stand for.

    N tokens of held-out texts, D hidden, M features, F of them described, V vocabulary

Each of the chosen features is described: where it is largest, the tokens it fires on, what it adds to the logits. In the embedded world
the truth is known, so all features are also set against all its concepts (known_concepts.py).
"""

import glob
import os
from dataclasses import dataclass

import numpy as np
import torch
from transformers.hf_argparser import HfArg

from .. import data
from ..errors import at_least, require
from ..hf.activations import module_at, place_name
from ..models import check_model, context_length, load_policy, load_tokenizer
from ..runtime import plots
from ..runtime.distributed import setup
from ..runtime.files import write_json
from ..runtime.flags import EndpointFlags, ResultFlags, TextFlags
from ..runtime.hints import check_made
from ..runtime.locks import unlock_afterwards
from ..runtime.results import parse_ids, results_folder, save
from .activation_store import Tokens, from_models, hold_out, open_autoencoder, token_rows, where
from .concepts import encoded
from .explainer import check_explainer, explain
from .known_concepts import CONTROLS, SCORES, is_world_model, known_concepts
from .probe_flags import DescribeFlags, PlaceFlags, TokenFlags
from .sae_files import CONFIG

SHOWN = 8  # tokens in a description's lists


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
    output_dir: str = HfArg(
        default="runs/probe/features", help="the folder that the results are written to"
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "eval_size")




@unlock_afterwards()
def features(config):
    """What the features of autoencoders fire on, and what they do.

    In the embedded world also: how many known concepts have a feature with
    an AUC above .95, beside controls. The best of M features is chosen on
    one half of the texts and measured on the other.
    Method: nanorlhf/interp/concepts.py. The effect on logits is the direct
    path alone: the decoder's direction through the unembedding, without the
    final norm and later layers.
    """
    dist = setup(config.device)
    require(dist.world == 1, "probe.py features runs on one process")
    folder = results_folder(config, dist)
    check_explainer(config)
    paths = folders(config.sae)
    found = {path: open_autoencoder(config, path) for path in paths}  # all errors of folders before any model is loaded
    rows, lms, results = data.read_rows(config.dataset, config.kind, config.columns), {}, {}
    for path, (sae, model, place) in found.items():
        if model not in lms:
            lms[model] = load_policy(model, value_head=False, device=dist.device).lm
        tokenizer, lm = load_tokenizer(model, needs_eos=config.kind != "prompts"), lms[model]
        module_at(lm, place)
        tokens = texts_of(config, rows, model, tokenizer)
        x = from_models(tokens, {"m": lm}, [place], dist, config.dtype)(np.arange(len(tokens.rows)))[f"m/{place_name(place)}"]
        with torch.no_grad():
            f = encoded(sae.to(dist.device), x)  # [M, N]
            result = {"model": model, "layer": place[0], "site": place[1], "m": sae.m, "texts": len(tokens.rows), "tokens": tokens.total}
            result |= known_concepts(sae, x, f, tokens, tokenizer) if is_world_model(tokenizer) else {}
            ids = parse_ids(config.features) or top_features(f, config.top)
            result["features"] = describe(config, ids, sae, f, tokens, tokenizer, lm)
        results[path] = result
    summary = {"saes": results}
    save(config, folder, summary, table(results, bool(config.features)), draw)
    missing = explain(config, results) if config.explainer else None
    write_json(os.path.join(config.output_dir, "summary.json"), summary)
    if config.explainer:
        print(*explanations(results), sep="\n")
    require(not missing, missing)
    return summary


def folders(patterns):
    """The folders of autoencoders that are named, by themselves or with * and {seed}."""
    out = []
    for pattern in patterns:
        check_made(pattern)
        some = [path for path in sorted(glob.glob(pattern.replace("{seed}", "*"))) if os.path.isfile(os.path.join(path, CONFIG))]
        found = [pattern] if os.path.isdir(pattern) else some
        require(found, f"{pattern}: no sparse autoencoder here (train_sae.py trains them)")
        out += found
    return list(dict.fromkeys(out))




def texts_of(config, rows, model, tokenizer):
    """The Tokens of the texts that are looked at."""
    rows, _ = token_rows(tokenizer, rows, config.max_length or context_length(check_model(model)), config.chat_template)
    rows = hold_out(rows, config.eval_size, tokenizer)[1]
    require(len(rows) > 1, f"{config.dataset}: too few texts to hold two of them out")
    return Tokens(rows, None if config.keep_bos else tokenizer.bos_token_id)


def top_features(f, n):
    """The n features with the largest mean activation over all tokens: how often times how strongly."""
    means = (f @ torch.ones(f.shape[1], 1, device=f.device))[:, 0]
    return means.topk(min(n, len(means))).indices.tolist()


# -------------------------------------------------------------------------------------------------------------------- descriptions


def describe(config, ids, sae, f, tokens, tokenizer, lm):
    """Features -> [{id, rate, mean, max, tokens, contexts, up, down}]

    tokens: [token, its share of all that the feature adds up to, on how many of its occurrences it fires]. contexts: the texts in which it
    is largest, with its values / its largest value. up, down: [token, logits for each unit along the feature's direction], over the mean.
    """
    text_of, token_ids = where(tokens)
    unembedding = lm.get_output_embeddings().weight.float()  # [V, D]
    effects = sae.decoder_directions()[ids].float() @ unembedding.T  # [F, V]
    effects = (effects - effects.mean(1, keepdim=True)).cpu()  # softmax does not see the mean over the vocabulary
    seen = token_ids.bincount(minlength=effects.shape[1])
    written = {}

    def text(i):
        return written.setdefault(i, tokenizer.decode([i]))

    (feature, token), values, out = f.cpu().indices(), f.cpu().values(), []
    for row, i in zip(effects, ids):
        fires = feature == i
        at, value = token[fires], values[fires]
        total = torch.zeros(len(seen)).index_add(0, token_ids[at], value)  # [V]
        often = token_ids[at].bincount(minlength=len(seen))
        largest = value.abs().max().item() if len(at) else 0.0
        order = total.abs().topk(min(SHOWN, len(total))).indices.tolist()
        up, down = ([[text(j), row[j].item()] for j in row.topk(SHOWN, largest=big).indices.tolist()] for big in (True, False))
        out.append({
            "id": i, "rate": len(at) / tokens.total, "mean": value.mean().item() if len(at) else 0.0, "max": largest,
            "tokens": [[text(j), (total[j] / total.sum()).item(), (often[j] / seen[j]).item()] for j in order if often[j]],
            "up": up, "down": down,
            "contexts": top_contexts(config, tokens, text_of, at, value, largest, text),
        })  # fmt: skip
    return out


def top_contexts(config, tokens, text_of, at, value, largest, text):
    """The texts in which a feature, `value` [n] on the tokens `at` [n], is largest: [{text, tokens, values}]"""
    peak = torch.zeros(len(tokens.rows)).scatter_reduce(0, text_of[at], value, "amax")
    columns = torch.from_numpy(tokens.columns())  # [N]
    out = []
    for i in peak.topk(min(config.contexts, len(peak))).indices.tolist():
        if peak[i] > 0:
            here = text_of[at] == i
            values = torch.zeros(len(tokens.rows[i]))
            values[columns[at[here]]] = value[here] / largest
            out.append({"text": i, "tokens": [text(j) for j in tokens.rows[i]], "values": [round(v, 4) for v in values.tolist()]})
    return out


# ------------------------------------------------------------------------------------------------------------------ table, picture


def marked(context, before=8, after=12):
    """A context in a line, around its peak: after each token on which the feature fires its value, 10 being its largest anywhere."""
    parts = [t.strip() + (f"[{round(10 * v)}]" if v else "") for t, v in zip(context["tokens"], context["values"])]
    peak = max(range(len(parts)), key=lambda i: abs(context["values"][i]))
    return " ".join(parts[max(0, peak - before) : peak + after])


def table(results, in_full):
    """Each concept's best feature in every autoencoder, the counts, and the described features: in a line each, or with their contexts."""
    lines, short = [], plots.without_common_ends(set(results))
    matched = {path: r for path, r in results.items() if "concepts" in r}
    if matched:
        names = list(dict.fromkeys(name for r in matched.values() for name in r["concepts"]))
        lines = ["\nAUC of the best feature of each concept, chosen on one half of the texts and measured on the other:"]
        lines += [f"  {'concept':12s}{'words':>6s}" + "".join(f"{short[path] or path:>18s}" for path in matched)]
        for name in names:
            rows = [r["concepts"].get(name) for r in matched.values()]
            cells = [f"{row['auc']['features']:9.3f} ({row['auc']['feature']:5d}) " if row else "-" for row in rows]
            lines.append(f"  {name:12s}{next(row['words'] for row in rows if row):6d}" + "".join(f"{cell:>18s}" for cell in cells))
        for kind, title in (("concept", "concepts"), ("next", "concepts of the next token"), ("word", "single words")):
            found = [r["found"][kind] for r in matched.values()]
            for score, (_, good) in SCORES.items():
                lines.append(f"  {title} with {score} > {good}".ljust(20) + "  of " + ", ".join(str(row["of"]) for row in found))
                for name in (name for name in ("features", *CONTROLS) if name in found[0][score]):
                    lines.append(f"    {name:16s}" + "".join(f"{row[score][name]:18.3g}" for row in found))
    for path, r in results.items():
        lines.append(f"\n{path}: {r['model']}, layer {r['layer']}, {r['site']}, {r['tokens']} tokens; its largest features:")
        lines.append(f"  {'id':>6s}{'rate':>8s}{'mean':>8s}  {'fires on':44s}{'raises':30s}lowers")
        for feature in r["features"]:
            on, up, down = (" ".join(t.strip() for t, *_ in feature[key]) for key in ("tokens", "up", "down"))
            lines.append(f"  {feature['id']:6d}{feature['rate']:8.2%}{feature['mean']:8.2f}  {on[:42]:44s}{up[:28]:30s}{down[:28]}")
            lines += [f"          > {marked(context)}" for context in feature["contexts"] if in_full]
    return "\n".join(lines)


def explanations(results):
    """What the explainer said."""
    found = [(path, feature) for path, r in results.items() for feature in r["features"] if "description" in feature]
    return [f"  {path} {f['id']:5d} {'*' if f['related'] else ' '} {f['description']}" for path, f in found]


def draw(figure, summary):
    """AUC by concept; or, where no concepts are known, firing rate against mean strength of the described features."""
    results = summary["saes"]
    short, axis = plots.without_common_ends(set(results)), figure.add_subplot()
    matched = {path: r for path, r in results.items() if "concepts" in r}
    if not matched:
        for path, r in results.items():
            axis.loglog([f["rate"] for f in r["features"]], [f["mean"] for f in r["features"]], "o", label=short[path] or path)
        axis.set(xlabel="share of the tokens on which it fires", ylabel="mean activation where it fires")
    for i, (path, r) in enumerate(matched.items()):
        names = list(r["concepts"])
        figure.set_size_inches(8, 4)
        axis.plot(names, [row["auc"]["features"] for row in r["concepts"].values()], "o", color=f"C{i % 10}", label=short[path] or path)
    if matched:
        for control, marker in zip(CONTROLS, "x+."):
            rows = [[r["concepts"][name]["auc"][control] for r in matched.values() if name in r["concepts"]] for name in names]
            means = [np.mean([x for x in row if x is not None] or [np.nan]) for row in rows]
            axis.plot(names, means, marker, color="grey", label=control)
        axis.axhline(SCORES["auc"][1], color="grey", linewidth=0.8)
        axis.tick_params(axis="x", rotation=70)
        axis.set_ylabel("AUC of the best, on the other half")
    axis.legend()

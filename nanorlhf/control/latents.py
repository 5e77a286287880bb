"""Body of `probe.py latents`: what the latents of a reward model are worth, and what they stand for.

    N texts of a side, M latents, V vocabulary, C tokens that are common enough

Two kinds of evidence, on either the same numbers (latent_stats.py):

    pairs     chosen against rejected answers of preference data       what people's preferences say of a latent
    policy    a policy's answers after against before training         what the policy has made of it: a large contribution is an exploit

A latent lives at the pooled token, so it says something of a text as a whole: its contexts are texts, and what it stands for is looked
for among the tokens whose presence goes with it. Nothing here looks up what is known of the embedded world.
"""

import os
from dataclasses import dataclass

import torch
from transformers.hf_argparser import HfArg

from ..errors import require
from ..interp.explainer import check_explainer, explain
from ..interp.probe_flags import DescribeFlags
from ..runtime.files import write_json
from ..runtime.flags import EndpointFlags, ResultFlags, TextFlags
from ..runtime.locks import unlock_afterwards
from ..runtime.results import cell, finite, parse_ids, save
from ..splits import load
from .feature_rewards import LatentFlags, load_feature_reward
from .latent_stats import contrast, score_gaps, separation
from .latent_texts import (
    PairFlags,
    encoded,
    groups_of,
    matched,
    opened,
    read_all,
    read_answers,
)

BY = ("contribution", "differential", "weight")
SIDES = {"pairs": ("chosen", "rejected"), "policy": ("after", "before")}
SHOWN, FEWEST = 8, 10  # tokens of a description; texts that have, and that lack, a token which can describe
QUESTION = """A feature of a reward model is a number that it computes once for a whole text, where the text ends. Below are the texts on \
which one feature is largest; after the last token of each stands its strength from 1 to 10, in double brackets.

{contexts}

Tokens whose presence in a text goes most with the feature: {tokens}

Say in one sentence what the feature stands for, and whether that has to do with {task}. Answer with one line of JSON and nothing else:
{{"description": "...", "related": true or false}}"""


@dataclass
class LatentsConfig(LatentFlags, PairFlags, DescribeFlags, TextFlags, EndpointFlags, ResultFlags):
    """A policy's answers, and which features come first"""

    answers: str = HfArg(
        default="",
        help="a policy's answers after training, rows {prompt, response}, such as "
        "runs/ppo/eval/step_40.jsonl; with --dataset '' they alone are looked at",
    )
    against: str = HfArg(
        default="",
        help="its answers before training, to the same prompts: runs/ppo/eval/step_0.jsonl",
    )
    by: str = HfArg(
        default="",
        metadata={"choices": ("", *BY)},
        help="sort features by this, largest first: of the policy where there are --answers; by "
        "default by contribution, or by differential where there are no head weights",
    )

    task: str = HfArg(
        default="how good the text is", help="what a feature may have to do with, in words"
    )
    output_dir: str = HfArg(
        default="runs/probe/latents", help="the folder that the results are written to"
    )

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.answers) == bool(self.against), "--answers and --against go together: after and before")
        require(self.dataset or self.answers, "name --dataset, or --answers and --against")
        require(not self.sae or self.by in ("", "differential"), f"--by {self.by}: with --sae there are no head weights")


@unlock_afterwards()
def latents(config):
    """What the features of a reward model are worth, and stand for.

    Weight, differential and contribution of each, on pairs and on a policy's
    answers, and the tokens that it follows. Intervals: 95%, by the bootstrap
    over prompts. A feature with a weight below 0 is punished already, so a
    penalty on it is useless. Of those that raise the reward, one is spurious
    if the policy has exploited it and it does not stand for quality.

    Pitfall: reward training may leave hardly any weight on the feature that
    detects a thing, and reward the thing through others: compare score_gap.
    """
    asked = parse_ids(config.features)
    dist, folder, tokenizer, max_length = opened(config, asked)
    check_explainer(config)
    texts, prompts = {}, {}  # {side: Answers}, {"pairs" or "policy": the prompts}
    if config.dataset:
        pairs = load(config, "pairs")[1]
        texts |= {side: encoded(config, tokenizer, pairs, side, max_length) for side in SIDES["pairs"]}
        prompts["pairs"] = [row["prompt"] for row in pairs]
    if config.answers:
        files = config.answers, config.against
        rows = matched(*map(read_answers, files), files)
        texts |= {side: encoded(config, tokenizer, part, "response", max_length) for side, part in zip(SIDES["policy"], rows)}
        prompts["policy"] = [row["prompt"] for row in rows[0]]
    reward = load_feature_reward(config.reward_model, config.sae, tokenizer, dist, config.micro_batch_size, config.dtype)

    scores, sparse = {}, {}
    for side, answers in texts.items():
        scores[side], sparse[side], _ = read_all(reward, answers)  # [N], sparse [N, M]
    ids = torch.cat([*(z.indices()[1] for z in sparse.values()), torch.tensor(asked, dtype=torch.long)]).unique()  # all that fire
    require(len(ids), f"{config.reward_model}: no latent fires on any of these texts")
    z = {side: x.index_select(1, ids).to_dense() for side, x in sparse.items()}  # [N, M'], the M' that fire
    weights = None if reward.weights is None else reward.weights[ids]
    found = {kind: contrast(*(z[side] for side in SIDES[kind]), weights, groups_of(p), reward.m) for kind, p in prompts.items()}
    kind, by = list(found)[-1], config.by or ("differential" if weights is None else "contribution")
    size = weights if by == "weight" else getattr(found[kind], by)
    order = size.abs().argsort(descending=True, stable=True).tolist()
    gaps = score_gaps([(z[side], scores[side]) for side in z])  # [M']
    rows = [numbers(k, int(ids[k]), weights, gaps, found) for k in order]
    shown = [next(row for row in rows if row["id"] == i) for i in asked] or rows[: config.top]
    describe(config, shown, ids, z, texts, tokenizer)
    summary = {
        "reward_model": config.reward_model, "sae": config.sae, "m": reward.m, "firing": len(ids), "by": by,
        "answers": config.answers, "against": config.against, "described": [row["id"] for row in shown],
        **{kind: margin(scores, p, kind, found) for kind, p in prompts.items()}, "latents": rows,
    }  # fmt: skip
    save(config, folder, summary, table(summary, shown, bool(asked)), draw)
    missing = explain(config, {config.reward_model: {"features": shown}}, QUESTION) if config.explainer else None
    write_json(os.path.join(config.output_dir, "summary.json"), summary)
    if config.explainer:
        described = [row for row in shown if "description" in row]
        print(*(f"  {row['id']:6d} {'*' if row['related'] else ' '} {row['description']}" for row in described), sep="\n")
    require(not missing, missing)
    return summary


# ----------------------------------------------------------------------------------------------------------------------- the results


def numbers(k, id, weights, gaps, found):
    """What is said of the k-th latent that fires: {id, weight, raises, score_gap, pairs: {...}, policy: {...}}

    raises: whether its weight is above 0, so that firing raises the reward; None without head weights, as the contribution.
    score_gap: how much higher the texts score on which it fires, None where it fires on all or none.
    """
    weight = None if weights is None else weights[k].item()
    row = {"id": id, "weight": weight, "raises": None if weights is None else weight > 0, "score_gap": finite(gaps[k].item())}
    for kind, c in found.items():
        first, second = SIDES[kind]
        row[kind] = {f"rate_{first}": c.rate_chosen[k].item(), f"rate_{second}": c.rate_rejected[k].item()}
        for name in ("differential", "contribution"):
            value, ends = getattr(c, name), getattr(c, f"{name}_interval")
            three = None if value is None else dict(zip(("mean", "low", "high"), (x[k].item() for x in (value, *ends))))
            row[kind][name] = three
    return row


def margin(scores, prompts, kind, found):
    """How many pairs, from how many prompts; how much higher the first side scores; how much of that all contributions add up to."""
    first, second = (scores[side].double() for side in SIDES[kind])
    total = found[kind].contribution
    return {"pairs": len(prompts), "prompts": len(set(prompts)), "margin": (first - second).mean().item(),
            "accuracy": ((first > second).double() + 0.5 * (first == second)).mean().item(),
            "contributions": None if total is None else total.sum().item()}  # fmt: skip


def describe(config, rows, ids, z, texts, tokenizer):
    """Put into rows of latents what they follow and where they are largest.

    tokens: [token, AUC, texts that have it, share of these on which the latent fires, share of the others], those first whose presence
    in a text goes most with the latent's size, or (AUC below .5) whose absence does: latent_stats.separation. contexts: {side, z, tokens,
    values}; values are 0 but at the pooled token.
    """
    columns = [ids.tolist().index(row["id"]) for row in rows]
    z = {side: x[:, columns] for side, x in z.items()}  # [N, F]
    vocabulary = torch.cat([answers.batch.ids.flatten() for answers in texts.values()]).unique()
    present = {side: presence(answers.batch, vocabulary) for side, answers in texts.items()}  # [N, V']
    counts = sum(p.sum(0) for p in present.values())
    common = (counts >= FEWEST) & (sum(map(len, present.values())) - counts >= FEWEST)
    present, counts = {side: p[:, common] for side, p in present.items()}, counts[common]  # [N, C], [C]
    words = [tokenizer.decode([i]) for i in vocabulary[common].tolist()]
    auc = separation([(z[side], present[side]) for side in z]).nan_to_num(0.5)  # [F, C]
    fires = [torch.cat([(x != 0).double() for x in z.values()]).T, torch.cat(list(present.values())).double()]  # [F, N], [N, C]
    both = fires[0] @ fires[1]  # [F, C]
    with_it, without = both / counts, (fires[0].sum(1, keepdim=True) - both) / (fires[1].shape[0] - counts)
    largest = torch.cat(list(z.values())).max(0).values.clamp(min=1e-9)  # [F]
    where = [(side, i) for side, x in z.items() for i in range(len(x))]
    peaks = torch.cat(list(z.values())).T  # [F, N]
    for f, row in enumerate(rows):
        best = (auc[f] - 0.5).abs().topk(min(SHOWN, len(words))).indices.tolist()
        row["tokens"] = [[words[c], auc[f, c].item(), int(counts[c]), with_it[f, c].item(), without[f, c].item()] for c in best]
        row["contexts"] = []
        for n in peaks[f].topk(min(config.contexts, len(where))).indices.tolist():
            if peaks[f, n] > 0:
                side, i = where[n]
                batch = texts[side].batch
                tokens = [tokenizer.decode([j]) for j in batch.ids[i, : batch.lengths[i]].tolist()]
                values = [0.0] * (len(tokens) - 1) + [round((peaks[f, n] / largest[f]).item(), 4)]
                row["contexts"].append({"side": side, "z": peaks[f, n].item(), "tokens": tokens, "values": values})


def presence(batch, vocabulary):
    """Which tokens of a sorted vocabulary [V'] each text has: [N, V'] bool."""
    real = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]  # [N, T]
    row, column = real.nonzero()[:, 0], torch.searchsorted(vocabulary, batch.ids[real])
    found = torch.zeros(len(batch), len(vocabulary), dtype=torch.bool)
    found[row, column] = True
    return found


# ------------------------------------------------------------------------------------------------------------------ table, picture




def table(summary, rows, in_full):
    """One line a latent; with their contexts, the ends of texts, where they were asked for by name."""
    kinds, by_policy = [kind for kind in SIDES if kind in summary], "policy" in summary and summary["by"] != "weight"
    lines = [f"\n{summary['reward_model']}{' with ' + summary['sae'] if summary['sae'] else ''}: {summary['firing']} of {summary['m']} "
             f"latents fire; by {summary['by']}{' of the policy' if by_policy else ''}:"]  # fmt: skip
    for kind in kinds:
        what = summary[kind]
        made = "" if what["contributions"] is None else f", of which {what['contributions']:+.3f} by latents above 0"
        lines.append(f"  {' against '.join(SIDES[kind])}: {what['pairs']} pairs of {what['prompts']} prompts, "
                     f"first higher in {what['accuracy']:.1%}, margin {what['margin']:+.3f}{made}")  # fmt: skip
    shown = "contribution" if rows and rows[0]["weight"] is not None and summary["by"] != "differential" else "differential"
    head, over = f"  {'id':>6s}{'weight':>8s}{'score':>7s}", " " * 23
    for kind in kinds:
        first, second = SIDES[kind]
        over += f"{'fires on':>18s}{'':25s}"
        head += f"{first:>9s}{second:>9s}{shown:>25s}"
    lines += [over, head + "   goes with (AUC)"]
    for row in rows:
        weight = f"{row['weight']:8.3f}" if row["weight"] is not None else f"{'-':>8s}"
        line = f"  {row['id']:6d}{weight}" + (f"{'-':>7s}" if row["score_gap"] is None else f"{row['score_gap']:+7.2f}")
        for kind in kinds:
            part = row[kind]
            line += "".join(f"{part['rate_' + side]:9.1%}" for side in SIDES[kind]) + f"{cell(part[shown]):>25s}"
        room, goes = 140 - len(line) - 3, ""
        for token, auc, *_ in row["tokens"]:
            more = f"{' ' if goes else ''}{token.strip()} {auc:.2f}".replace("0.", ".")
            goes += more if len(goes) + len(more) <= room else ""
        lines.append(f"{line}   {goes}")
        for context in row["contexts"] if in_full else ():
            text = " ".join(t.strip() for t in context["tokens"])
            lines.append(f"          > {context['side']:8s} z {context['z']:6.2f}  {text[-105:]}")
    lines.append("  weight below 0: punished already; score: of texts on which it fires, less others of their side; "
                 "AUC below .50: the token is absent")  # fmt: skip
    return "\n".join(lines)


def draw(figure, summary):
    """Each latent: its contribution on the pairs against that on the policy's answers; or, with one of both, its weight against it."""
    kinds = [kind for kind in SIDES if kind in summary]
    name = "contribution" if summary["latents"] and summary["latents"][0]["weight"] is not None else "differential"
    x, y = (kinds + kinds)[:2]
    axis = figure.add_subplot()
    rows, first = summary["latents"], summary["described"]
    points = [((row["weight"] or 0.0) if x == y else row[x][name]["mean"], row[y][name]["mean"]) for row in rows]
    axis.scatter(*zip(*points), c=["C3" if row["id"] in first else "lightgrey" for row in rows], s=12)
    for row, point in zip(rows, points):
        if row["id"] in first[:10]:
            axis.annotate(str(row["id"]), point, fontsize=8)
    axis.set(xlabel="head weight" if x == y else f"{name}: {', '.join(SIDES[x])}", ylabel=f"{name}: {', '.join(SIDES[y])}")

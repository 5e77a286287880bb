"""Bodies of `probe.py causal` and `probe.py steer`: what a reward model's scores become when latents, or head weights, are edited.

    N pairs, P prompts of a pool, n answers of which the best is taken, M latents

Edits are FEATURE:OP:VALUE with the ops of penalties.edit_latents: 17:set:0 switches latent 17 off, 17:max:0.5 caps it, 17:min:0 is a floor,
17:*:2 and 17:+:1 steer it. All that are named make one arm. Its controls are arms of as many random latents that fire about equally
often, under the same ops and values: what these do too, is no matter of the latents that were chosen.
"""

import os
from dataclasses import dataclass

import numpy as np
import torch
from transformers.hf_argparser import HfArg

from .. import pool
from ..errors import at_least, require
from ..interp.concepts import alike
from ..penalties import OPS
from ..runtime.files import check_can_write, write_lines
from ..runtime.flags import ResultFlags, TextFlags
from ..runtime.hints import check_made
from ..runtime.locks import unlock_afterwards
from ..runtime.results import cell, save
from ..runtime.rng import SPLIT
from ..sarm import reweighted, save_sarm
from ..splits import load
from ..stats import mean_over_groups, percentiles
from .feature_rewards import LatentFlags, load_feature_reward, parse_edits
from .latent_texts import (
    PairFlags,
    encoded,
    groups_of,
    opened,
    read_all,
    read_answers,
)

SIDES = ("chosen", "rejected")


@dataclass
class CausalConfig(LatentFlags, PairFlags, TextFlags, ResultFlags):
    """Edits: which features are changed, and what is compared"""

    edits: list[str] = HfArg(
        default_factory=list,
        help=f"changes of features, all of them at once: FEATURE:OP:VALUE, OP one of {', '.join(OPS)}",
    )
    draws: int = HfArg(default=5, help="how often random features are drawn for comparison")
    pool: str = HfArg(
        default="",
        help="many answers to each prompt, best with gold_scores: pool.jsonl of sample_bon.py",
    )
    n: int = HfArg(default=16, help="take the best of each n answers of the pool in turn")
    seed: int = HfArg(default=0, help="the number that the random draws depend on")

    output_dir: str = HfArg(
        default="runs/probe/causal", help="the folder that the results are written to"
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "draws", "seed")
        at_least(self, 2, "n")
        require(self.edits, "--edits names what is changed, such as 17:set:0")
        parse_edits("edits", self.edits)


@dataclass
class SteerConfig(LatentFlags, PairFlags, TextFlags, ResultFlags):
    """Edits: what is changed, and which texts are scored again"""

    edits: list[str] = HfArg(
        default_factory=list,
        help=f"changes of features: FEATURE:OP:VALUE, OP one of {', '.join(OPS)}",
    )
    weights: list[str] = HfArg(
        default_factory=list,
        help="instead, changes of the weights of a SARM's head, such as 17:*:0",
    )
    texts: str = HfArg(
        default="",
        help="a file of texts to score, rows {prompt, response}; by default both sides of the "
        "held-out pairs",
    )
    save: str = HfArg(default="", help="write the SARM with its edited --weights into this folder")

    output_dir: str = HfArg(
        default="runs/probe/steer", help="the folder that the results are written to"
    )

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.edits) != bool(self.weights), "name --edits of latents or --weights of the head, one of both")
        require(not self.weights or not self.sae, "--weights edits a SARM's head; what --sae names has none on its latents")
        require(self.weights or not self.save, "--save writes a SARM with edited --weights: edits of latents are no part of a model")
        if self.save:
            require(not os.path.lexists(self.save), f"--save {self.save}: it is there already")
            # A model and results both have a config.json: one would write over the other's.
            apart = os.path.realpath(self.save) != os.path.realpath(self.output_dir)
            require(apart, "--save needs a folder of its own, not --output_dir")
        parse_edits("edits", self.edits), parse_edits("weights", self.weights)


# ------------------------------------------------------------------------------------------------------------------------- causal


@unlock_afterwards()
def causal(config):
    """Edit features, and score pairs and best-of-n choices again.

    What changes on held-out pairs and in a pool, and which choices turn
    over. Intervals: 95%, by the bootstrap over prompts, of paired changes.
    A tie counts as half right. Method: Zhang et al. 2025 (2508.08746).

    Pitfall: a control fires as often, but its values may be of another size,
    so that the same cap or floor does more or less to it.
    """
    edits = parse_edits("edits", config.edits)
    dist, folder, tokenizer, max_length = opened(config, edits)
    pairs = load(config, "pairs")[1]
    rows = []
    if config.pool:
        check_made(config.pool)
        rows = pool.read(config.pool)
    for row in rows:
        require(len(row["responses"]) >= config.n, f"--n {config.n}: {config.pool} has {len(row['responses'])} answers to a prompt")
    texts = {side: encoded(config, tokenizer, pairs, side, max_length) for side in SIDES}
    groups = groups_of([row["prompt"] for row in pairs])
    if rows:
        flat = [{"prompt": row["prompt"], "response": text} for row in rows for text in row["responses"]]
        texts["pool"] = encoded(config, tokenizer, flat, "response", max_length)
    reward = load_feature_reward(config.reward_model, config.sae, tokenizer, dist, config.micro_batch_size, config.dtype)

    before, fired = {}, torch.zeros(reward.m)
    for side, answers in texts.items():
        before[side], z, _ = read_all(reward, answers, None if side in SIDES else [])  # [N], sparse [N, M] or [N, 0]
        fired += z.indices()[1].bincount(minlength=reward.m)
    rates = fired.double() / (2 * len(pairs))  # [M], over both sides
    arms, drawn = {"edits": edits}, []
    for i in range(config.draws):
        others = alike(rates, list(edits), np.random.default_rng([SPLIT, config.seed, i]), but=drawn)
        arms[f"random {i}"], drawn = dict(zip(others, edits.values())), drawn + others
    found = {}
    for name, arm in arms.items():
        after = {side: read_all(reward, answers, list(arm), arm)[2] for side, answers in texts.items()}
        found[name] = {"features": list(arm), "rates": rates[list(arm)].tolist(), **on_pairs(before, after, groups)}
        if rows:
            found[name]["pool"] = on_pool(before["pool"], after["pool"], rows, config.n)
    summary = {"reward_model": config.reward_model, "sae": config.sae, "edits": config.edits, "pairs": len(pairs),
               "prompts": int(groups.max()) + 1, "pool": config.pool, "n": config.n if rows else None, "arms": found}  # fmt: skip
    save(config, folder, summary, causal_table(summary), draw_causal)
    return summary


def on_pairs(before, after, groups):
    """Scores {side: [N]} before and after an edit, groups [N] of pairs with one prompt -> what it did to the pairs, with intervals."""
    margins = [(x["chosen"] - x["rejected"]).double() for x in (before, after)]  # [N] each
    right = [(m > 0).double() + 0.5 * (m == 0) for m in margins]
    changes = {side: (after[side] - before[side]).double() for side in SIDES}
    columns = {"chosen": changes["chosen"], "rejected": changes["rejected"], "accuracy_before": right[0], "accuracy_after": right[1],
               "accuracy_change": right[1] - right[0]}  # fmt: skip
    changed = torch.cat([after[side] != before[side] for side in SIDES])
    return {"changed": changed.double().mean().item(), "reordered": int((margins[0].sign() != margins[1].sign()).sum()),
            **intervals(columns, groups)}  # fmt: skip


def on_pool(before, after, rows, n):
    """Scores of all answers of a pool, [answers] in the order of its rows -> which of the best of n change, and what gold says to that."""
    flipped, gold, prompt, start = [], [], [], 0
    for p, row in enumerate(rows):
        N = len(row["responses"])
        size = N // n * n  # a last group of fewer is left out
        best = [x[start : start + size].view(-1, n).argmax(1) + torch.arange(0, size, n) for x in (before, after)]  # [groups] each
        start += N
        flipped.append(best[0] != best[1])
        prompt += [p] * (size // n)
        if "gold_scores" in row:
            gold.append(torch.tensor(row["gold_scores"], dtype=torch.float64)[torch.stack(best, 1)])  # [groups, 2]
    flipped, prompt = torch.cat(flipped), torch.tensor(prompt)
    columns = {"flip_rate": flipped.double()}
    if gold:
        gold = torch.cat(gold)
        columns |= {"gold_before": gold[:, 0], "gold_after": gold[:, 1], "gold_change": gold[:, 1] - gold[:, 0]}
    return {"groups": len(flipped), "flipped": int(flipped.sum()), **intervals(columns, prompt)}


def intervals(columns, groups):
    """{name: [N]} -> {name: {mean, low, high}}"""
    mean, draws = mean_over_groups(torch.stack(list(columns.values()), 1), groups)
    low, high = percentiles(draws)
    return {name: dict(zip(("mean", "low", "high"), row)) for name, *row in zip(columns, mean.tolist(), low.tolist(), high.tolist())}


def causal_table(summary):
    """One line an arm."""
    arms = summary["arms"]
    accuracy = cell(next(iter(arms.values()))["accuracy_before"]).replace("+", "")
    lines = [f"\n{summary['reward_model']}, {' '.join(summary['edits'])}; {summary['pairs']} held-out pairs of {summary['prompts']} "
             f"prompts, accuracy before {accuracy}:"]  # fmt: skip
    lines += [f"  {'':10s}{'rate':>7s}{'changed':>9s}" + "".join(f"{name:>26s}" for name in ("chosen change by", "rejected by"))
              + f"{'reordered':>11s}{'accuracy by':>26s}   features"]  # fmt: skip
    for name, arm in arms.items():
        rate = f"{np.mean(arm['rates']):7.1%}{arm['changed']:9.1%}"
        cells = f"{cell(arm['chosen']):>26s}{cell(arm['rejected']):>26s}{arm['reordered']:11d}{cell(arm['accuracy_change']):>26s}"
        lines.append(f"  {name:10s}{rate}{cells}   {' '.join(map(str, arm['features']))}")
    if summary["pool"]:
        groups = next(iter(arms.values()))["pool"]["groups"]
        lines += [f"\n  best of {summary['n']} of {summary['pool']}, {groups} choices:"]
        lines += [f"  {'':10s}{'flipped':>9s}{'gold before':>26s}{'gold by':>26s}"]
        for name, arm in arms.items():
            part = arm["pool"]
            lines.append(f"  {name:10s}{part['flipped']:9d}{cell(part.get('gold_before')):>26s}{cell(part.get('gold_change')):>26s}")
    return "\n".join(lines)


def draw_causal(figure, summary):
    """Changes of scores and of accuracy by arm, with 95% intervals over prompts."""
    panels = {"chosen": "change of chosen", "rejected": "change of rejected", "accuracy_change": "change of accuracy"}
    figure.set_size_inches(8, 3)
    for i, (key, title) in enumerate(panels.items()):
        axis = figure.add_subplot(1, len(panels), i + 1)
        for j, (name, arm) in enumerate(summary["arms"].items()):
            x = arm[key]
            error = [[max(0, x["mean"] - x["low"])], [max(0, x["high"] - x["mean"])]]  # 0 by rounding where nothing changes
            axis.errorbar(j, x["mean"], error, fmt="o", color="grey" if j else "C3")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=title, xticks=range(len(summary["arms"])))
        axis.set_xticklabels(list(summary["arms"]), rotation=70)


# -------------------------------------------------------------------------------------------------------------------------- steer


@unlock_afterwards()
def steer(config):
    """Edit features or head weights, and score texts again.

    With --save the SARM is written with its edited head. An edit of w_i
    changes the scores of those texts on which feature i fires, by the change
    of w_i times z_i, and of no others; so does an edit of z_i by "*". A set,
    a "+", a floor above 0 or a cap below it also changes texts on which the
    feature does not fire.
    """
    edits = parse_edits("edits", config.edits) or parse_edits("weights", config.weights)
    if config.save:
        check_can_write(config.save)
    dist, folder, tokenizer, max_length = opened(config, edits)
    if config.texts:
        texts = {"text": encoded(config, tokenizer, read_answers(config.texts), "response", max_length)}
    else:
        pairs = load(config, "pairs")[1]
        texts = {side: encoded(config, tokenizer, pairs, side, max_length) for side in SIDES}
    reward = load_feature_reward(config.reward_model, config.sae, tokenizer, dist, config.micro_batch_size, config.dtype)
    require(not config.weights or reward.weights is not None, f"--weights: {config.reward_model} has no head on its latents")

    rows = []
    for side, answers in texts.items():
        before, z, after = read_all(reward, answers, list(edits), edits if config.edits else None)  # z sparse [N, E]
        if config.weights:
            with reweighted(reward.module, edits):
                after = read_all(reward, answers, [])[0]
        own = zip(answers.prompts, answers.responses, before.tolist(), after.tolist(), z.to_dense().tolist())
        rows += [{"side": side, "prompt": p, "response": r, "before": x, "after": y, "latents": dict(zip(map(str, edits), values))}
                 for p, r, x, y, values in own]  # fmt: skip
    summary = {"reward_model": config.reward_model, "sae": config.sae, "edits": config.edits, "weights": config.weights, **counts(rows)}
    save(config, folder, summary, steer_table(summary, rows), lambda figure, _: draw_steer(figure, rows))
    write_lines(os.path.join(config.output_dir, "texts.jsonl"), rows)
    if config.save:
        with reweighted(reward.module, edits):
            save_sarm(reward.module, tokenizer, config.save)
        print(f"The SARM with its edited head is in {config.save}", flush=True)
    return summary


def counts(rows):
    """How many texts have an edited latent, change, and do one without the other; the mean change of those that change."""
    has = np.array([any(row["latents"].values()) for row in rows])
    moves = np.array([row["after"] - row["before"] for row in rows])
    changed = moves != 0
    return {
        "texts": len(rows), "with_feature": int(has.sum()), "changed": int(changed.sum()),
        "changed_without": int((changed & ~has).sum()), "unchanged_with": int((has & ~changed).sum()),
        "mean_change": float(moves[changed].mean()) if changed.any() else 0.0,
    }  # fmt: skip


def steer_table(summary, rows, shown=8):
    """The counts, then the texts that change most."""
    what = "latents " + " ".join(summary["edits"]) if summary["edits"] else "head weights " + " ".join(summary["weights"])
    lines = [f"\n{summary['reward_model']}, {what}:",
             f"  {summary['changed']} of {summary['texts']} texts change, by {summary['mean_change']:+.3f} on average; "
             f"{summary['with_feature']} have the feature, {summary['unchanged_with']} of them do not change; "
             f"{summary['changed_without']} change without it",
             f"  {'':8s}{'before':>8s}{'after':>8s}   {'z':10s} text"]  # fmt: skip
    for row in sorted(rows, key=lambda row: -abs(row["after"] - row["before"]))[:shown]:
        z = " ".join(f"{x:.2f}" for x in row["latents"].values())
        lines.append(f"  {row['side']:8s}{row['before']:8.3f}{row['after']:8.3f}   {z[:10]:10s} {' '.join(row['response'].split())[-98:]}")
    return "\n".join(lines)


def draw_steer(figure, rows):
    """Each text's score before and after."""
    axis = figure.add_subplot()
    before, after = ([row[key] for row in rows] for key in ("before", "after"))
    has = ["C3" if any(row["latents"].values()) else "lightgrey" for row in rows]
    axis.scatter(before, after, c=has, s=8)
    axis.set(xlabel="score before", ylabel="score after (red: texts that have the feature)")

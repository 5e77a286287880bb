"""Bodies of `probe.py causal` and `probe.py steer`: scores after an edit of features or of weights.

    N pairs, P prompts of a pool, n answers of which the best is taken, M features

An edit is FEATURE:OP:VALUE with the ops of penalties.edit_latents. 17:set:0 switches feature 17
off, 17:max:0.5 caps it, 17:min:0 is a floor; 17:*:2 and 17:+:1 steer it. All edits that are named
make one arm. Its controls are arms of as many random features that fire about equally often, under
the same ops and values. What the controls do too is no property of the features that were chosen.
"""

import os
from dataclasses import dataclass

import numpy as np
import torch
from transformers.hf_argparser import HfArg

from .. import pool
from ..errors import at_least, require
from ..interp.feature_scores import alike
from ..penalties import OPS
from ..runtime.files import check_can_write, write_lines
from ..runtime.flags import ResultFlags, TextFlags, results_in
from ..runtime.hints import check_made
from ..runtime.locks import unlock_afterwards
from ..runtime.results import cell, draw_intervals, interval_row, save
from ..runtime.rng import SPLIT
from ..sarm import reweighted, save_sarm
from ..stats import mean_over_groups, pair_wins, percentiles
from .feature_reader import FeatureReaderFlags, load_feature_reader, parse_edits
from .feature_texts import (
    SIDES,
    PairFlags,
    encode_answers,
    groups_of,
    open_run,
    read_all,
    read_answers,
    read_pairs,
)

SHOWN = 8  # texts that steer prints


@dataclass
class CausalConfig(FeatureReaderFlags, PairFlags, TextFlags, ResultFlags):
    """Edits: which features are changed, and what is compared"""

    edits: list[str] = HfArg(
        default_factory=list,
        help="changes of features, all of them at once: FEATURE:OP:VALUE, OP one of "
        f"{', '.join(OPS)}",
    )
    draws: int = HfArg(default=5, help="how often random features are drawn for comparison")
    pool: str = HfArg(
        default="",
        help="many answers to each prompt, best with gold_scores: pool.jsonl of sample_bon.py",
    )
    n: int = HfArg(default=16, help="take the best of each n answers of the pool in turn")
    seed: int = HfArg(default=0, help="the number that the random draws depend on")

    output_dir: str = results_in("runs/probe/causal")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "draws", "seed")
        at_least(self, 2, "n")
        require(self.edits, "--edits names what is changed, such as 17:set:0")
        parse_edits("edits", self.edits)


@dataclass
class SteerConfig(FeatureReaderFlags, PairFlags, TextFlags, ResultFlags):
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

    output_dir: str = results_in("runs/probe/steer")

    def __post_init__(self):
        super().__post_init__()
        require(
            bool(self.edits) != bool(self.weights),
            "name --edits of features or --weights of the head, one of both",
        )
        require(
            not self.weights or not self.sae,
            "--weights edits a SARM's head; what --sae names has none on its features",
        )
        require(
            self.weights or not self.save,
            "--save writes a SARM with edited --weights: edits of features are no part of a model",
        )
        if self.save:
            require(not os.path.lexists(self.save), f"--save {self.save}: it is there already")
            # A model and results both have a config.json: one would write over the other's.
            is_apart = os.path.realpath(self.save) != os.path.realpath(self.output_dir)
            require(is_apart, "--save needs a folder of its own, not --output_dir")
        parse_edits("edits", self.edits)
        parse_edits("weights", self.weights)


# ------------------------------------------------------------------------------------- causal


@unlock_afterwards()
def causal(config):
    """Edit features, and score pairs and best-of-n choices again.

    It measures how the scores of held-out pairs, and the best of n answers in a
    pool, change when some features of the reward model are edited. The controls
    "random 0" and on, as many features that fire about as often under the same
    edits, rule out that any features so frequent would do that. Both sides,
    chosen and rejected, rule out that the edit merely moves all scores. Gold of
    the choices rules out that a change of the proxy is taken for a change of
    quality. What would refute that these features carry the reward: the random
    ones change as much, or accuracy and choices stay as they were.

    Pitfall: a control fires as often, but its values may be of another size, so
    that the same cap or floor does more or less to it. Intervals: 95%, by the
    bootstrap over prompts, of paired changes; a tie counts as half right.
    Method: Zhang et al. 2025 (2508.08746).
    """
    edits = parse_edits("edits", config.edits)  # {17: ("set", 0.0)}
    dist, folder, tokenizer, max_length = open_run(config, edits)

    # The texts: both sides of the held-out pairs, and all answers of the pool, row after row. They
    # are read before the reward model is loaded, so that a bad row is found early.
    pool_rows = read_pool(config)
    pairs, texts = read_pairs(config, tokenizer, max_length)
    if pool_rows:
        answers = flatten_pool(pool_rows)
        texts["pool"] = encode_answers(config, tokenizer, answers, max_length)
    prompts = groups_of([row["prompt"] for row in pairs])  # [N]: the number of each pair's prompt

    reward = load_feature_reader(
        config.reward_model, config.sae, tokenizer, dist, config.micro_batch_size, config.dtype
    )

    # Before any edit: the scores, and on what share of the pairs' texts each feature fires. The
    # rates choose the controls. They do not count the pool, so that it changes no control.
    before = {}  # {side: [N]}
    n_fires = torch.zeros(reward.m)
    for side in SIDES:
        before[side], z, _ = read_all(reward, texts[side])  # z: sparse [N, M]
        n_fires += z.indices()[1].bincount(minlength=reward.m)
    rates = n_fires.double() / (2 * len(pairs))  # [M]
    if pool_rows:
        before["pool"], _, _ = read_all(reward, texts["pool"], [])

    # Every arm scores every text again. Its scores are compared with those before any edit text by
    # text, so that the spread of scores between texts does not widen the interval of a change.
    results = {}
    for name, edits_of_arm in choose_arms(config, edits, rates).items():
        ids = list(edits_of_arm)
        after = {}
        for side, answers in texts.items():
            _, _, after[side] = read_all(reward, answers, ids, edits_of_arm)
        results[name] = {"features": ids, "rates": rates[ids].tolist()}
        results[name] |= compare_pairs(before, after, prompts)
        if pool_rows:
            choices = compare_choices(before["pool"], after["pool"], pool_rows, config.n)
            results[name]["pool"] = choices

    summary = {
        "reward_model": config.reward_model,
        "sae": config.sae,
        "edits": config.edits,
        "pairs": len(pairs),
        "prompts": int(prompts.max()) + 1,
        "pool": config.pool,
        "n": config.n if pool_rows else None,
        "arms": results,
    }
    save(config, folder, summary, format_arms(summary), draw_arms)
    return summary


def read_pool(config):
    """The rows of --pool, or none. InputError: a prompt with fewer answers than --n."""
    if not config.pool:
        return []
    check_made(config.pool)
    rows = pool.read(config.pool)
    for row in rows:
        n_answers = len(row["responses"])
        require(
            n_answers >= config.n,
            f"--n {config.n}: {config.pool} has {n_answers} answers to a prompt",
        )
    return rows


def flatten_pool(rows):
    """Rows of a pool {prompt, responses} -> rows {prompt, response}, in the same order."""
    answers = []
    for row in rows:
        for response in row["responses"]:
            answers.append({"prompt": row["prompt"], "response": response})
    return answers


def choose_arms(config, edits, rates):
    """The edits that are named, and controls: {name of the arm: {feature: (op, value)}}.

    A control has the same ops and values on random features whose rates of firing are about those
    of the named ones. Controls share no feature with each other while there are enough of them.
    """
    arms = {"edits": edits}
    drawn = []  # features of earlier controls
    for i in range(config.draws):
        # Each control has a key of its own, so that more --draws leave the first ones as they were.
        rng = np.random.default_rng([SPLIT, config.seed, i])
        others = alike(rates, list(edits), rng, but=drawn)
        # The j-th random feature fires about as often as the j-th named one, and takes its edit.
        arms[f"random {i}"] = dict(zip(others, edits.values()))
        drawn += others
    return arms


def compare_pairs(before, after, prompts):
    """What an edit does to N pairs, with intervals over prompts.

    before, after {"chosen" and "rejected": scores [N]}; prompts [N]: the number of each pair's
    prompt -> {changed: the share of texts whose score changes; reordered: how many pairs change
    their order, a tie is an order of its own; chosen, rejected: the change of scores; accuracy_...:
    how often the chosen one is higher}.
    """
    margins_before = (before["chosen"] - before["rejected"]).double()  # [N]
    margins_after = (after["chosen"] - after["rejected"]).double()
    right_before = pair_wins(before["chosen"], before["rejected"])
    right_after = pair_wins(after["chosen"], after["rejected"])
    # Scores are compared exactly: a text that an edit does not touch keeps its score's very bits.
    is_changed = torch.cat([after[side] != before[side] for side in SIDES])  # [2 N]
    # A sign is -1, 0 for a tie, or 1.
    is_reordered = margins_before.sign() != margins_after.sign()  # [N]
    # The change of accuracy is paired too, so it has a column of its own: its interval does not
    # follow from those of the two accuracies.
    columns = {
        "chosen": (after["chosen"] - before["chosen"]).double(),
        "rejected": (after["rejected"] - before["rejected"]).double(),
        "accuracy_before": right_before,
        "accuracy_after": right_after,
        "accuracy_change": right_after - right_before,
    }
    return {
        "changed": is_changed.double().mean().item(),
        "reordered": int(is_reordered.sum()),
        **intervals(columns, prompts),
    }


def compare_choices(before, after, rows, n):
    """How often an edit makes another answer the best of n, and what gold says to that.

    The answers of a prompt are taken n at a time, in their order. before, after: scores of all
    answers of the pool, row after row -> {groups: choices in all, flipped: how many have another
    best, flip_rate; where the pool has gold_scores also gold_before, gold_after, gold_change: the
    gold of the best}, with intervals over prompts.
    """
    is_flipped = []  # [groups] of each prompt
    gold_before = []
    gold_after = []
    prompts = []  # of each group: the number of its prompt
    start = 0
    for p, row in enumerate(rows):
        n_answers = len(row["responses"])
        n_groups = n_answers // n  # a last group of fewer is left out
        in_groups = slice(start, start + n_groups * n)  # the scores of this prompt's groups
        best_before = best_of_groups(before[in_groups], n)
        best_after = best_of_groups(after[in_groups], n)
        start += n_answers  # the answers that were left out are passed over too

        is_flipped.append(best_before != best_after)
        # Choices from one prompt are not independent: the intervals draw whole prompts.
        prompts += [p] * n_groups
        # A flip may gain quality, lose it, or neither: the gold of both choices tells.
        if "gold_scores" in row:
            gold = torch.tensor(row["gold_scores"], dtype=torch.float64)
            gold_before.append(gold[best_before])
            gold_after.append(gold[best_after])

    is_flipped = torch.cat(is_flipped)
    columns = {"flip_rate": is_flipped.double()}
    if gold_before:
        columns["gold_before"] = torch.cat(gold_before)
        columns["gold_after"] = torch.cat(gold_after)
        columns["gold_change"] = columns["gold_after"] - columns["gold_before"]
    return {
        "groups": len(is_flipped),
        "flipped": int(is_flipped.sum()),
        **intervals(columns, torch.tensor(prompts)),
    }


def best_of_groups(scores, n):
    """Scores [G n] of one prompt's answers -> the place of the best answer of each n: [G]."""
    best_in_group = scores.view(-1, n).argmax(1)  # [G]: 0 to n - 1
    first_of_group = torch.arange(0, len(scores), n)  # [G]: 0, n, 2 n, ...
    return best_in_group + first_of_group


def intervals(columns, prompts):
    """Means with 95% intervals over prompts: {name: [N]} -> {name: {mean, low, high}}.

    prompts [N]: the number of each row's prompt.
    """
    # All columns are resampled as one table, so that a resample has the same prompts in each.
    table = torch.stack(list(columns.values()), 1)  # [N, columns]
    means, draws = mean_over_groups(table, prompts)
    low, high = percentiles(draws)
    rows = {}
    for i, name in enumerate(columns):
        rows[name] = interval_row(means[i], low[i], high[i])
    return rows


def format_arms(summary):
    """One line an arm: what it does to the pairs, then what to the best of n."""
    arms = summary["arms"]
    any_arm = arms["edits"]  # before the edits all arms are the same
    accuracy = cell(any_arm["accuracy_before"]).replace("+", "")  # only changes have a sign
    lines = [
        f"\n{summary['reward_model']}, {' '.join(summary['edits'])}; {summary['pairs']} held-out "
        f"pairs of {summary['prompts']} prompts, accuracy before {accuracy}:",
        f"  {'':10s}{'rate':>7s}{'changed':>9s}{'chosen change by':>26s}{'rejected by':>26s}"
        f"{'reordered':>11s}{'accuracy by':>26s}   features",
    ]
    for name, arm in arms.items():
        lines.append(
            f"  {name:10s}{np.mean(arm['rates']):7.1%}{arm['changed']:9.1%}"
            f"{cell(arm['chosen']):>26s}{cell(arm['rejected']):>26s}{arm['reordered']:11d}"
            f"{cell(arm['accuracy_change']):>26s}   {' '.join(map(str, arm['features']))}"
        )

    if summary["pool"]:
        n_groups = any_arm["pool"]["groups"]
        lines.append(f"\n  best of {summary['n']} of {summary['pool']}, {n_groups} choices:")
        lines.append(f"  {'':10s}{'flipped':>9s}{'gold before':>26s}{'gold by':>26s}")
        for name, arm in arms.items():
            part = arm["pool"]
            gold_before = cell(part.get("gold_before"))
            gold_change = cell(part.get("gold_change"))
            lines.append(f"  {name:10s}{part['flipped']:9d}{gold_before:>26s}{gold_change:>26s}")
    return "\n".join(lines)


def draw_arms(figure, summary):
    """Changes of scores and of accuracy by arm, with 95% intervals over prompts."""
    titles = {
        "chosen": "change of chosen",
        "rejected": "change of rejected",
        "accuracy_change": "change of accuracy",
    }
    arms = summary["arms"]
    figure.set_size_inches(8, 3)
    for i, (key, title) in enumerate(titles.items()):
        axis = figure.add_subplot(1, len(titles), i + 1)
        changes = {name: arm[key] for name, arm in arms.items()}
        draw_intervals(axis, changes, {"edits": "C3"})
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(title)


# -------------------------------------------------------------------------------------- steer


@unlock_afterwards()
def steer(config):
    """Edit features or head weights, and score texts again.

    It measures the score of each text before and after the edit, and with --save
    writes the SARM with its edited head. Texts that have the feature and texts
    that lack it are counted apart, which rules out that the edit reaches texts
    that it should not touch. Texts with the feature that do not change are
    counted too, which rules out that the edit is not applied. What it does not
    rule out: other features may reward the same thing (the control for that is
    probe.py causal). What would refute that a score is a sum of features: for an
    edit of a weight or a "*", a text that changes without having the feature.

    A set, a "+", a floor above 0 or a cap below it also changes texts on which
    the feature does not fire.
    """
    # Exactly one of the two flags is given (SteerConfig checks it), and both have the same form.
    edits = parse_edits("edits", config.edits) or parse_edits("weights", config.weights)
    # The model is written last, so whether it can be written is tried first.
    if config.save:
        check_can_write(config.save)
    dist, folder, tokenizer, max_length = open_run(config, edits)

    # The texts: those of a file, or both sides of the held-out pairs.
    if config.texts:
        answers = read_answers(config.texts)
        texts = {"text": encode_answers(config, tokenizer, answers, max_length)}
    else:
        _, texts = read_pairs(config, tokenizer, max_length)

    reward = load_feature_reader(
        config.reward_model, config.sae, tokenizer, dist, config.micro_batch_size, config.dtype
    )
    require(
        not config.weights or reward.weights is not None,
        f"--weights: {config.reward_model} has no head on its features",
    )

    # The scores before and after. An edit of features changes z, so one reading gives both. An edit
    # of weights changes w in score = w . z, so the texts are read again with the edited head.
    rows = []
    for side, answers in texts.items():
        if config.edits:
            before, z, after = read_all(reward, answers, list(edits), edits)  # z: sparse [N, E]
        else:
            before, z, _ = read_all(reward, answers, list(edits))
            with reweighted(reward.module, edits):
                after, _, _ = read_all(reward, answers, [])
        rows += make_rows(side, answers, edits, before, after, z.to_dense())

    summary = {
        "reward_model": config.reward_model,
        "sae": config.sae,
        "edits": config.edits,
        "weights": config.weights,
        **count_texts(rows),
    }

    # The picture has a dot for each text. The summary holds only counts, so `rows` are drawn.
    def draw(figure, summary):
        draw_texts(figure, rows)

    save(config, folder, summary, format_texts(summary, rows), draw)
    write_lines(os.path.join(config.output_dir, "texts.jsonl"), rows)
    if config.save:
        # The head has its old weights again by now, so it is edited once more to be saved.
        with reweighted(reward.module, edits):
            save_sarm(reward.module, tokenizer, config.save)
        print(f"The SARM with its edited head is in {config.save}", flush=True)
    return summary


def make_rows(side, answers, edits, before, after, z):
    """Rows of texts.jsonl: {side, prompt, response, before, after, latents: {feature: z}}.

    before, after: scores [N]; z [N, E]: the latents of the E features that are edited.
    """
    names = [str(feature) for feature in edits]
    rows = []
    for i in range(len(answers)):
        row = {
            "side": side,
            "prompt": answers.prompts[i],
            "response": answers.responses[i],
            "before": before[i].item(),
            "after": after[i].item(),
            "latents": dict(zip(names, z[i].tolist())),
        }
        rows.append(row)
    return rows


def count_texts(rows):
    """How many texts have an edited feature, and change, and do one without the other.

    mean_change: the mean change of the scores of those texts that change.
    """
    # A text has a feature where it is not 0: a SARM's feature may also fire below 0.
    has_feature = np.array([any(row["latents"].values()) for row in rows])
    changes = np.array([row["after"] - row["before"] for row in rows])
    is_changed = changes != 0
    # A mean over all texts would be near 0 for an edit of a rare feature, however strong it is.
    mean_change = 0.0
    if is_changed.any():
        mean_change = float(changes[is_changed].mean())
    return {
        "texts": len(rows),
        "with_feature": int(has_feature.sum()),
        "changed": int(is_changed.sum()),
        "changed_without": int((is_changed & ~has_feature).sum()),
        "unchanged_with": int((has_feature & ~is_changed).sum()),
        "mean_change": mean_change,
    }


def format_texts(summary, rows):
    """The counts, then the texts that change most."""
    if summary["edits"]:
        what = f"features {' '.join(summary['edits'])}"
    else:
        what = f"head weights {' '.join(summary['weights'])}"
    lines = [
        f"\n{summary['reward_model']}, {what}:",
        f"  {summary['changed']} of {summary['texts']} texts change, by "
        f"{summary['mean_change']:+.3f} on average; {summary['with_feature']} have the feature, "
        f"{summary['unchanged_with']} of them do not change; {summary['changed_without']} change "
        "without it",
        f"  {'':8s}{'before':>8s}{'after':>8s}   {'z':10s} text",
    ]
    most_changed = sorted(rows, key=lambda row: -abs(row["after"] - row["before"]))
    for row in most_changed[:SHOWN]:
        z = " ".join(f"{value:.2f}" for value in row["latents"].values())
        # A line has room for the end of a text only, which is where features are read.
        text = " ".join(row["response"].split())
        lines.append(
            f"  {row['side']:8s}{row['before']:8.3f}{row['after']:8.3f}   {z[:10]:10s} {text[-98:]}"
        )
    return "\n".join(lines)


def draw_texts(figure, rows):
    """Each text's score before and after; red where the text has an edited feature."""
    # A text on the diagonal has not changed. A grey dot off the diagonal is a text that the edit
    # reaches although it lacks the feature.
    before = []
    after = []
    colors = []
    for row in rows:
        before.append(row["before"])
        after.append(row["after"])
        has_feature = any(row["latents"].values())
        colors.append("C3" if has_feature else "lightgrey")
    axis = figure.add_subplot()
    axis.scatter(before, after, c=colors, s=8)
    axis.set(xlabel="score before", ylabel="score after (red: texts that have the feature)")

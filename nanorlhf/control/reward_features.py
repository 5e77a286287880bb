"""Body of `probe.py reward_features`: what the features of a reward model are worth, and what they
stand for.

    N texts of a side, M features, M' of them that are looked at, F of these that are described,
    V tokens that stand in any text, C of these that are common enough

Two kinds of evidence, each by the same numbers (feature_contrasts.py):

    pairs     chosen against rejected answers of preference data:
              what people's preferences say of a feature
    policy    a policy's answers after against before training:
              what the policy has made of the feature; a large contribution is an exploit

A feature is read once for a text, at its pooled token, so it says something of the text as a whole:
its contexts are texts, and what it stands for is looked for among the tokens whose presence in a
text goes with it. Nothing here looks up what is known of the embedded world.
"""

from dataclasses import dataclass

import torch
from transformers.hf_argparser import HfArg

from ..errors import require
from ..interp.explainer import add_descriptions, check_explainer, make_context
from ..interp.shared_flags import DescribeFlags
from ..runtime.flags import EndpointFlags, ResultFlags, TextFlags, results_in
from ..runtime.locks import unlock_afterwards
from ..runtime.results import cell, finite, interval_row, parse_ids, save
from ..stats import pair_wins
from .feature_contrasts import contrast, score_gaps, separation
from .feature_reader import FeatureReaderFlags, load_feature_reader
from .feature_texts import (
    PairFlags,
    encode_answers,
    groups_of,
    match_answers,
    open_run,
    read_all,
    read_answers,
    read_pairs,
)

BY = ("contribution", "differential", "weight")
# The two sides of each kind of evidence; numbers are of the first side less the second.
SIDES = {"pairs": ("chosen", "rejected"), "policy": ("after", "before")}
SHOWN = 8  # tokens in the description of a feature
FEWEST = 10  # a token can describe if at least so many texts have it, and so many lack it
WIDTH = 140  # columns of the table

QUESTION = """A feature of a reward model is a number that it computes once for a whole text, \
where the text ends. Below are the texts on which one feature is largest; after the last token of \
each stands its strength from 1 to 10, in double brackets.

{contexts}

Tokens whose presence in a text goes most with the feature: {tokens}"""


@dataclass
class RewardFeaturesConfig(
    FeatureReaderFlags, PairFlags, DescribeFlags, TextFlags, EndpointFlags, ResultFlags
):
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

    related_to: str = HfArg(
        default="how good the text is", help="what a feature may have to do with, in words"
    )
    output_dir: str = results_in("runs/probe/reward_features")

    def __post_init__(self):
        super().__post_init__()
        require(
            bool(self.answers) == bool(self.against),
            "--answers and --against go together: after and before",
        )
        require(self.dataset or self.answers, "name --dataset, or --answers and --against")
        needs_no_weights = self.by in ("", "differential")
        require(
            not self.sae or needs_no_weights,
            f"--by {self.by}: with --sae there are no head weights",
        )


@unlock_afterwards()
def reward_features(config):
    """What the features of a reward model are worth, and stand for.

    It measures for each feature its weight in the score, how often it fires on
    chosen and on rejected answers, and after and before training, and which
    tokens go with it. The pairs, beside the policy, rule out that a feature grew
    only as far as people's preferences ask for it. Intervals over prompts rule
    out that a few prompts made a number; tokens are compared within each side,
    which rules out that a feature is taken for whatever else has changed. The
    column "score", of texts on which it fires less others, rules out reading too
    much into a weight: a model may reward a thing through other features than
    the one that tells it best. What would refute that a feature is the exploit:
    with it switched off (probe.py causal) the scores hardly move, or random
    features that fire as often move them as much.

    A feature with a weight below 0 is punished already, so a penalty on it is
    useless. Intervals: 95%, by the bootstrap over prompts.
    """
    # All that can be wrong with flags, folders and texts, before the reward model is loaded.
    named_ids = parse_ids(config.features)
    dist, folder, tokenizer, max_length = open_run(config, named_ids)
    check_explainer(config)
    texts, prompts = read_texts(config, tokenizer, max_length)
    reward = load_feature_reader(
        config.reward_model, config.sae, tokenizer, dist, config.micro_batch_size, config.dtype
    )

    # Each text is read once: its score, and all features at its last token. Few of a SARM's many
    # features fire on a text, so they are held sparse until it is known which fire on any.
    scores = {}  # {side: [N]}
    sparse = {}  # {side: sparse [N, M]}
    for side, answers in texts.items():
        scores[side], sparse[side], _ = read_all(reward, answers)

    # A feature that fires on none of the texts is left out, unless it is named.
    ids = find_firing(sparse, named_ids)  # [M']
    require(len(ids), f"{config.reward_model}: no feature fires on any of these texts")
    z = {}  # {side: [N, M']}
    for side, rows_of_side in sparse.items():
        z[side] = rows_of_side.index_select(1, ids).to_dense()
    weights = None
    if reward.weights is not None:
        weights = reward.weights[ids]  # [M']

    # What each kind of evidence says of each feature, and how texts score on which it fires.
    # contrast() damps by a mean over all M features, also those left out here: so it is told M.
    contrasts = {}  # {"pairs" or "policy": Contrast}
    for kind, prompts_of_kind in prompts.items():
        first, second = SIDES[kind]
        groups = groups_of(prompts_of_kind)
        contrasts[kind] = contrast(z[first], z[second], weights, groups, reward.m)
    gaps = score_gaps([(z[side], scores[side]) for side in texts])  # [M']

    # The results, largest features first.
    by = config.by
    if not by:
        by = "differential" if weights is None else "contribution"
    rows = []
    for k in rank_features(contrasts, weights, by):
        rows.append(make_row(k, int(ids[k]), weights, gaps, contrasts))
    # The features that were named, or the first few, are also described by tokens and contexts.
    described = choose_rows(rows, named_ids, config.top)
    z_described = take_columns(z, ids, described)  # {side: [N, F]}
    add_tokens(described, z_described, texts, tokenizer)
    add_contexts(described, z_described, texts, tokenizer, config.contexts)

    summary = {
        "reward_model": config.reward_model,
        "sae": config.sae,
        "m": reward.m,
        "firing": len(ids),
        "by": by,
        "answers": config.answers,
        "against": config.against,
        "described": [row["id"] for row in described],
    }
    for kind, prompts_of_kind in prompts.items():
        summary[kind] = compare_scores(scores, prompts_of_kind, kind, contrasts[kind])
    summary["features"] = rows
    save(config, folder, summary, format_table(summary, described, bool(named_ids)), draw)
    # An explainer may take long, or fail: what was found by then is in the files already.
    if config.explainer:
        features_of = {config.reward_model: {"features": described}}
        add_descriptions(config, features_of, summary, QUESTION)
    return summary


# ------------------------------------------------------------------------- texts, and features


def read_texts(config, tokenizer, max_length):
    """The texts of all sides, side by side to the same prompts.

    -> {side: Answers}, and {"pairs" or "policy": the prompts of its two sides}
    """
    texts = {}
    prompts = {}
    if config.dataset:
        pairs, texts = read_pairs(config, tokenizer, max_length)
        prompts["pairs"] = [row["prompt"] for row in pairs]

    if config.answers:
        files = (config.answers, config.against)
        after = read_answers(config.answers)
        before = read_answers(config.against)
        before = match_answers(after, before, files)
        texts["after"] = encode_answers(config, tokenizer, after, max_length)
        texts["before"] = encode_answers(config, tokenizer, before, max_length)
        prompts["policy"] = [row["prompt"] for row in after]
    return texts, prompts


def find_firing(sparse, named_ids):
    """The features that fire on any text, {side: sparse [N, M]}, and those that are named: [M']."""
    # A feature that is named may fire on no text: then its zeros answer the question about it.
    ids = [torch.tensor(named_ids, dtype=torch.long)]
    for rows_of_side in sparse.values():
        ids.append(rows_of_side.indices()[1])
    return torch.cat(ids).unique()


def rank_features(contrasts, weights, by):
    """The places of M' features, by the absolute size of a measure, largest first.

    Where there is a policy, the size is that of its answers: it shows what has been exploited.
    """
    # The sign does not count: a feature that training took away matters as much as one it brought.
    if by == "weight":
        sizes = weights
    else:
        last_kind = list(contrasts)[-1]  # "policy" comes after "pairs"
        sizes = getattr(contrasts[last_kind], by)
    return sizes.abs().argsort(descending=True, stable=True).tolist()


def choose_rows(rows, named_ids, top):
    """The rows of the features that are named, in that order; where none is, the first `top`."""
    if not named_ids:
        return rows[:top]
    by_id = {row["id"]: row for row in rows}
    return [by_id[i] for i in named_ids]


def take_columns(z, ids, rows):
    """The latents of the features in rows alone: {side: [N, M']}, ids [M'] -> {side: [N, F]}."""
    place_of = {feature: k for k, feature in enumerate(ids.tolist())}
    columns = [place_of[row["id"]] for row in rows]
    taken = {}
    for side, values in z.items():
        taken[side] = values[:, columns]
    return taken


# ----------------------------------------------------------------------------------- numbers


def make_row(k, feature, weights, gaps, contrasts):
    """The numbers of one feature, the k-th of M': {id, weight, raises, score_gap, pairs, policy}.

    raises: whether its weight is above 0, so that firing raises the reward. Without head weights
    there is no weight, no raises and no contribution: None. score_gap: how much higher the texts
    score on which it fires; None where it fires on all or none. pairs, policy: {rate_SIDE,
    differential, contribution}, the last two with intervals.
    """
    row = {"id": feature, "weight": None, "raises": None, "score_gap": finite(gaps[k].item())}
    if weights is not None:
        weight = weights[k].item()
        row["weight"] = weight
        row["raises"] = weight > 0
    # A Contrast calls the first side "chosen", also where it is the policy's after training.
    for kind, numbers in contrasts.items():
        first, second = SIDES[kind]
        row[kind] = {
            f"rate_{first}": numbers.rate_chosen[k].item(),
            f"rate_{second}": numbers.rate_rejected[k].item(),
            "differential": at_place(k, numbers.differential, numbers.differential_interval),
            "contribution": at_place(k, numbers.contribution, numbers.contribution_interval),
        }
    return row


def at_place(k, values, interval):
    """The k-th of values [M'] and of interval [2, M']: {mean, low, high}; None without values."""
    if values is None:
        return None
    low, high = interval
    return interval_row(values[k], low[k], high[k])


def compare_scores(scores, prompts, kind, numbers):
    """How the two sides of a kind of evidence score: {pairs, prompts, margin, accuracy, ...}.

    margin: how much higher the first side scores on average; accuracy: how often it scores higher,
    a tie counts half; contributions: how much of the margin the contributions of all features add
    up to, None without head weights.
    """
    first_side, second_side = SIDES[kind]
    first = scores[first_side].double()
    second = scores[second_side].double()
    # The score is w . z, so if no feature were below 0, the contributions would add up to the
    # margin. What is missing comes from features below 0, which contributions leave out.
    contributions = None
    if numbers.contribution is not None:
        contributions = numbers.contribution.sum().item()
    return {
        "pairs": len(prompts),
        "prompts": len(groups_of(prompts).unique()),
        "margin": (first - second).mean().item(),
        "accuracy": pair_wins(first, second).mean().item(),
        "contributions": contributions,
    }


# ------------------------------------------------------------------------------ descriptions


def add_tokens(rows, z, texts, tokenizer):
    """Put into rows of features, as "tokens", the SHOWN tokens that each follows best.

    A token is [token, AUC, texts that have it, share of these on which the feature fires, share of
    the others]. First come those whose presence in a text goes most with a large feature, or (AUC
    below .5) with a small one: feature_contrasts.separation. z {side: [N, F]}, texts {side:
    Answers}.
    """
    # Which tokens each text has. The padding's id gets a column too, but find_tokens() looks only
    # at real tokens.
    all_ids = torch.cat([answers.batch.ids.flatten() for answers in texts.values()])
    vocabulary = all_ids.unique()  # [V]
    present = {}  # {side: [N, V]}
    for side, answers in texts.items():
        present[side] = find_tokens(answers.batch, vocabulary)
    has_token = torch.cat(list(present.values()))  # [N, V] of all sides

    # A token that nearly all or nearly no texts have tells nothing.
    n_texts = len(has_token)
    counts = has_token.sum(0)  # [V]
    is_common = (counts >= FEWEST) & (n_texts - counts >= FEWEST)
    counts = counts[is_common]  # [C]
    words = [tokenizer.decode([i]) for i in vocabulary[is_common].tolist()]

    # How well the presence of each token goes with each feature, within each side.
    parts = [(z[side], present[side][:, is_common]) for side in z]
    auc = separation(parts).nan_to_num(0.5)  # [F, C]

    # How often each feature fires on texts with the token, and on the others. The AUC does not say
    # so: it only says which of two texts has more of the feature.
    fires = (torch.cat(list(z.values())) != 0).double()  # [N, F] of all sides
    both = fires.T @ has_token[:, is_common].double()  # [F, C]
    rate_with = both / counts
    rate_without = (fires.sum(0)[:, None] - both) / (n_texts - counts)

    # Each feature gets the tokens whose AUC is farthest from chance, 0.5, above or below.
    for f, row in enumerate(rows):
        row["tokens"] = []
        from_chance = (auc[f] - 0.5).abs()  # [C]
        n_shown = min(SHOWN, len(words))
        for c in from_chance.topk(n_shown).indices.tolist():
            rates = [rate_with[f, c].item(), rate_without[f, c].item()]
            row["tokens"].append([words[c], auc[f, c].item(), int(counts[c]), *rates])


def find_tokens(batch, vocabulary):
    """Which tokens of a sorted vocabulary [V] each text of a packed batch has: [N, V] bool."""
    # nonzero() and indexing by a mask both go row by row, so entry k of both lists below belongs to
    # the same token.
    is_real = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]  # [N, T]
    text_of_token = is_real.nonzero()[:, 0]  # [tokens of all texts]
    place_in_vocabulary = torch.searchsorted(vocabulary, batch.ids[is_real])
    has_token = torch.zeros(len(batch), len(vocabulary), dtype=torch.bool)
    has_token[text_of_token, place_in_vocabulary] = True
    return has_token


def add_contexts(rows, z, texts, tokenizer, at_most):
    """Put into rows of features, as "contexts", the texts on which each is largest, `at_most`.

    A context is {side, z, tokens, values}. values are one a token: 0, but at the last, the only one
    where features are read, z as a share of the largest. z {side: [N, F]}, texts {side: Answers}.
    """
    # Values are shares of the feature's largest: an explainer is shown strengths from 1 to 10,
    # whatever the units of z.
    all_z = torch.cat(list(z.values()))  # [N, F] of all sides
    largest = all_z.max(0).values  # [F]
    places = []  # of each row of all_z: its side, and its row there
    for side, values in z.items():
        for i in range(len(values)):
            places.append((side, i))

    for f, row in enumerate(rows):
        row["contexts"] = []
        n_contexts = min(at_most, len(places))
        strongest = all_z[:, f].topk(n_contexts).indices.tolist()
        for n in strongest:
            if all_z[n, f] <= 0:  # fewer texts than were asked for have the feature above 0
                continue
            side, i = places[n]
            batch = texts[side].batch
            ids = batch.ids[i, : batch.lengths[i]].tolist()
            share = (all_z[n, f] / largest[f]).item()
            values = [0.0] * (len(ids) - 1) + [share]
            context = make_context(ids, values, lambda token: tokenizer.decode([token]))
            row["contexts"].append({"side": side, "z": all_z[n, f].item(), **context})


# ---------------------------------------------------------------------------- table, picture


def format_table(summary, rows, with_contexts):
    """One line a feature; with_contexts also the ends of the texts on which it is largest."""
    # A line has room for one of the two measures only, with its interval, for each kind.
    kinds = kinds_in(summary)
    measure = "differential"
    if rows and rows[0]["weight"] is not None and summary["by"] != "differential":
        measure = "contribution"

    lines = [f"\n{format_title(summary)}"]
    for kind in kinds:
        lines.append(format_sides(kind, summary[kind]))
    lines += format_head(kinds, measure)
    for row in rows:
        lines.append(format_row(row, kinds, measure))
        if with_contexts:
            for context in row["contexts"]:
                # A feature is read where its text ends, so the end is shown.
                text = " ".join(token.strip() for token in context["tokens"])
                lines.append(
                    f"          > {context['side']:8s} z {context['z']:6.2f}  {text[-105:]}"
                )
    lines.append(
        "  score: how much higher texts score on which the feature fires than others of their side"
    )
    lines.append("  weight below 0: it is punished already; AUC below .50: the token is absent")
    return "\n".join(lines)


def kinds_in(summary):
    """The kinds of evidence that there were: "pairs", "policy" or both."""
    return [kind for kind in SIDES if kind in summary]


def format_title(summary):
    """Whose features these are, how many of them fire, and how they are sorted."""
    whose = summary["reward_model"]
    if summary["sae"]:
        whose += f" with {summary['sae']}"
    order = summary["by"]
    if "policy" in summary and order != "weight":
        order += " of the policy"
    return f"{whose}: {summary['firing']} of {summary['m']} features fire; by {order}:"


def format_sides(kind, numbers):
    """How the two sides of a kind of evidence score: compare_scores as a line."""
    sides = " against ".join(SIDES[kind])
    line = (
        f"  {sides}: {numbers['pairs']} pairs of {numbers['prompts']} prompts, "
        f"first higher in {numbers['accuracy']:.1%}, margin {numbers['margin']:+.3f}"
    )
    if numbers["contributions"] is not None:
        line += f", of which {numbers['contributions']:+.3f} by features above 0"
    return line


def format_head(kinds, measure):
    """The two lines above the columns: what belongs together, and each column's name."""
    over = " " * 23
    head = f"  {'id':>6s}{'weight':>8s}{'score':>7s}"
    for kind in kinds:
        first, second = SIDES[kind]
        over += f"{'fires on':>18s}{'':25s}"
        head += f"{first:>9s}{second:>9s}{measure:>25s}"
    return [over, head + "   goes with (AUC)"]


def format_row(row, kinds, measure):
    """A feature's numbers, and as many of the tokens that it follows as fit into the line."""
    # The cells are as wide as their names in format_head(); "-" stands for a missing number.
    line = f"  {row['id']:6d}"
    line += f"{'-':>8s}" if row["weight"] is None else f"{row['weight']:8.3f}"
    line += f"{'-':>7s}" if row["score_gap"] is None else f"{row['score_gap']:+7.2f}"
    for kind in kinds:
        numbers = row[kind]
        for side in SIDES[kind]:
            line += f"{numbers[f'rate_{side}']:9.1%}"
        line += f"{cell(numbers[measure]):>25s}"

    # The tokens, each with its AUC: magnificent .93 terrible .12
    line += "  "
    for token, auc, *_ in row["tokens"]:
        area = f"{auc:.2f}".replace("0.", ".")
        addition = f" {token.strip()} {area}"
        # A shorter token after one that is too long may still fit.
        if len(line) + len(addition) <= WIDTH:
            line += addition
    return line


def draw(figure, summary):
    """A dot a feature: its contribution on the pairs against that on the policy's answers.

    With one of both kinds alone: its head weight against its contribution. Without head weights it
    is the differential in the place of the contribution. Features that are described are red.
    """
    rows = summary["features"]
    kinds = kinds_in(summary)
    last_kind = kinds[-1]
    measure = "differential" if rows[0]["weight"] is None else "contribution"

    # With both kinds, x is what people's preferences say of a feature, and y what the policy has
    # made of it: an exploit stands far above what the pairs ask for.
    points = []
    colors = []
    for row in rows:
        if len(kinds) == 2:
            x = row["pairs"][measure]["mean"]
        else:
            x = row["weight"] or 0.0
        points.append((x, row[last_kind][measure]["mean"]))
        colors.append("C3" if row["id"] in summary["described"] else "lightgrey")

    axis = figure.add_subplot()
    axis.scatter(*zip(*points), c=colors, s=12)
    # Only the first ten get their number: more would cover each other.
    for row, point in zip(rows, points):
        if row["id"] in summary["described"][:10]:
            axis.annotate(str(row["id"]), point, fontsize=8)
    x_label = "head weight"
    if len(kinds) == 2:
        x_label = f"{measure}: {', '.join(SIDES['pairs'])}"
    axis.set(xlabel=x_label, ylabel=f"{measure}: {', '.join(SIDES[last_kind])}")

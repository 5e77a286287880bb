"""The known concepts of the embedded world, and which features of a sparse autoencoder single them
out, beside three controls.

    N tokens of texts, D hidden, M features, C concepts, V vocabulary, S shuffles

A token has the concepts of its word: 'adjective', 'positive', 'value=+3', 'topic', 'punctuation',
... The best of M features is chosen on one half of the texts and measured on the other half. The
controls are chosen and measured in the same way:

    coordinates   the best single coordinate of the same activations, in either direction: no
                  autoencoder
    untrained     the best feature of an autoencoder of the same shape, with random directions
    shuffled      the trained autoencoder, against concepts that have exchanged their words with
                  others: any set of as many words
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import world
from ..runtime.results import finite
from ..runtime.rng import SPLIT
from ..sae import SparseAutoencoder, TopKSAE
from .activation_store import Tokens, where
from .feature_scores import (
    best_features,
    encoded,
    feature_aucs,
    feature_correlations,
    on_tokens,
    sparse,
)

# Each score, and the value above which a concept counts as found.
SCORES = {"auc": (feature_aucs, 0.95), "correlation": (feature_correlations, 0.7)}
CONTROLS = ("coordinates", "untrained", "shuffled")
# What a token is looked at for: its own concepts, those of the token that follows, its very word.
KINDS = ("concept", "next", "word")
# A concept needs this many tokens on each half of the texts.
FEWEST = 5
SHUFFLES = 5


def measure_concepts(sae, x: Tensor, f: Tensor, tokens: Tokens, tokenizer) -> dict:
    """How well features single out what is known of the tokens.

    Activations x [N, D] and features f, a sparse [M, N], of the same tokens ->

        {"concepts": {name: {"tokens", "words", SCORE: {"feature", "features", CONTROL, ..}, ..}},
         "found":    {KIND: {"of", SCORE: {"features", CONTROL, ..}, ..}}}

    "concepts" holds, for each concept of the token itself, how many tokens and words have it, the
    id of its best feature, and the scores of that feature and of the controls. "found" holds how
    many concepts there are, and how many of them have a good feature or a good control. What
    follows a token ("next") is what a late layer is about.
    Pitfall of the AUC: where a tenth of all tokens are adjectives, a feature of all adjectives has
    0.95 for those of one value too. Its correlation with these is small.
    """
    names, labels = concept_table(tokenizer)
    seen = look_at(tokens)
    present = seen.ids.unique()
    exchanged = exchange_words(labels, present)
    # The features and two of the controls differ in what is searched for a good direction.
    halves = {
        "features": split_features(f, seen),
        # A coordinate may also be low where a concept is, so it is searched with both signs.
        "coordinates": split_features(sparse(torch.cat([x, -x], 1)), seen),
        "untrained": split_features(encoded(make_untrained(sae, x), x), seen),
    }

    concepts = {}
    found = {}
    for kind in KINDS:
        table = labels
        if kind == "word":
            table = torch.eye(len(labels), dtype=torch.bool)  # [V, V]: every word is a concept
        truth = seen.look_up(table, kind)  # [N, C]
        frequent = find_frequent(truth, seen)
        # The third control searches the same features for other concepts. A word that has been
        # exchanged with another is still a word: there it is no control.
        other_truths = []
        if kind != "word":
            for other_table in exchanged:
                other_truths.append(seen.look_up(other_table, kind)[:, frequent])

        found[kind] = {"of": len(frequent)}
        measured = {}
        for title, (score, good) in SCORES.items():
            result = measure(halves, truth[:, frequent], other_truths, seen, score, good)
            found[kind][title] = result.counts
            measured[title] = result
        # Single concepts are listed for the token itself alone.
        if kind == "concept":
            for c, i in enumerate(frequent.tolist()):
                n_tokens = truth[:, i].sum().item()
                n_words = labels[present, i].sum().item()
                row = {"tokens": n_tokens, "words": n_words}
                for title, result in measured.items():
                    row[title] = result.row(c)
                concepts[names[i]] = row
    return {"concepts": concepts, "found": found}


# -------------------------------------------------------------------------------- what is known


def is_world_model(tokenizer) -> bool:
    """Whether a model's tokens are the words of the embedded world."""
    return set(world.vocabulary()) == set(tokenizer.get_vocab())


def concept_table(tokenizer) -> tuple[list[str], Tensor]:
    """The embedded world's concepts of each token id: names [C], and a table [V, C] of 0 and 1.

    Where several concepts are of the same words, the first one stands for all of them.
    """
    ids = tokenizer.get_vocab()
    # {"positive": {ids of superb, perfect, ...}, ...}
    members = {}  # {concept: ids of its words}
    for word in world.vocabulary():
        for name in world.concepts(word):
            members.setdefault(name, set()).add(ids[word])

    different = {}
    for name, own_ids in members.items():
        if own_ids not in different.values():
            different[name] = own_ids

    labels = torch.zeros(max(ids.values()) + 1, len(different), dtype=torch.bool)
    for c, own_ids in enumerate(different.values()):
        labels[list(own_ids), c] = True
    return list(different), labels


@dataclass
class Seen:
    """The N tokens that are looked at."""

    ids: Tensor  # [N]
    following: Tensor  # [N]: the id of the token that follows in the text
    goes_on: Tensor  # [N]: whether there is such a token
    in_a: Tensor  # [N]: whether the token's text is in the half on which features are chosen

    def look_up(self, table: Tensor, kind: str) -> Tensor:
        """A table [V, C] of words -> which concepts each token has: [N, C]."""
        if kind == "next":
            return table[self.following] & self.goes_on[:, None]
        return table[self.ids]


def look_at(tokens: Tokens) -> Seen:
    """Find the ids of the tokens and what follows them, and draw the two halves of the texts."""
    text_of, ids = where(tokens)
    following, goes_on = next_ids(tokens)
    # Texts are halved, not tokens, so that what is peculiar to a text is in one half only.
    order = np.random.default_rng([SPLIT, 1]).permutation(len(tokens.rows))
    text_in_a = torch.from_numpy(order % 2 == 0)
    return Seen(ids, following, goes_on, text_in_a[text_of])


def next_ids(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Find what follows each of the N tokens that count in its text, whether that counts or not.

    -> ids [N], and whether there is such a token [N]; where a text ends the id is 0 and means
    nothing.
    """
    ids = []
    goes_on = []
    for row, mask in zip(tokens.rows, tokens.masks):
        for column in np.flatnonzero(mask):
            if column + 1 < len(row):
                ids.append(row[column + 1])
                goes_on.append(True)
            else:
                ids.append(0)
                goes_on.append(False)
    return torch.tensor(ids), torch.tensor(goes_on)


def find_frequent(truth: Tensor, seen: Seen) -> Tensor:
    """The concepts of truth [N, C] that have enough tokens on both halves: indices, in order."""
    enough_in_a = truth[seen.in_a].sum(0) >= FEWEST
    enough_in_b = truth[~seen.in_a].sum(0) >= FEWEST
    return (enough_in_a & enough_in_b).nonzero()[:, 0]


def exchange_words(labels: Tensor, present: Tensor) -> list[Tensor]:
    """SHUFFLES tables like labels [V, C], in which the words `present` have exchanged concepts."""
    # Only words that occur are exchanged, so each concept still has as many of them as before.
    tables = []
    for seed in range(SHUFFLES):
        order = np.random.default_rng([SPLIT, 2, seed]).permutation(len(present))
        table = labels.clone()
        table[present] = labels[present[torch.from_numpy(order)]]
        tables.append(table)
    return tables


# ------------------------------------------------------------------------- choosing and measuring


@dataclass
class Measured:
    """What one score says of C concepts, for the features and for each control."""

    ids: Tensor  # [C]: the best feature of each concept
    scores: dict[str, Tensor]  # {"features" or the control: [C]}
    counts: dict[str, float]  # how many of the concepts are found

    def row(self, c: int) -> dict:
        """The best feature of concept c, and all scores for it."""
        row = {"feature": self.ids[c].item()}
        for name, values in self.scores.items():
            row[name] = finite(values[c].item())
        return row


def measure(
    halves: dict[str, tuple[Tensor, Tensor]],
    truth: Tensor,
    other_truths: list[Tensor],
    seen: Seen,
    score: Callable,
    good: float,
) -> Measured:
    """Find the best feature of each concept, its score, and those of the controls.

    halves: of split_features(), by input. truth [N, C]; other_truths: S of these, of words that
    have exchanged their concepts. score: [M, N], [N, C] -> [M, C]. good: a concept is found above.
    """
    ids = {}
    scores = {}
    counts = {}
    for name, halves_of_input in halves.items():
        ids[name], scores[name] = choose_and_measure(halves_of_input, truth, seen, score)
        counts[name] = (scores[name] > good).sum().item()

    if other_truths:
        shuffled = []
        for other_truth in other_truths:
            _, values = choose_and_measure(halves["features"], other_truth, seen, score)
            shuffled.append(values)
        shuffled = torch.stack(shuffled)  # [S, C]
        # nan: all the words of a concept fell on one half.
        scores["shuffled"] = shuffled.nanmean(0)
        counts["shuffled"] = (shuffled > good).double().sum(1).mean().item()
    return Measured(ids["features"], scores, counts)


def split_features(f: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
    """A sparse [M, N] -> its columns on the tokens of either half of the texts."""
    f = f.cpu()
    return on_tokens(f, seen.in_a), on_tokens(f, ~seen.in_a)


def choose_and_measure(
    halves: tuple[Tensor, Tensor], truth: Tensor, seen: Seen, score: Callable
) -> tuple[Tensor, Tensor]:
    """Choose the best feature of each concept on one half of the texts, measure it on the other.

    halves of split_features(), truth [N, C] -> ids [C], scores [C]
    """
    f_a, f_b = halves
    scores_a = score(f_a, truth[seen.in_a])  # [M, C]
    scores_b = score(f_b, truth[~seen.in_a])  # [M, C]
    return best_features(scores_a, scores_b)


def make_untrained(sae, x: Tensor):
    """An autoencoder of the same kind and shape as `sae` was before training, with directions of
    another seed; x [N, D] gives its normalisation."""
    if isinstance(sae, TopKSAE):
        fresh = TopKSAE(sae.d, sae.m, sae.k, relu=sae.relu, normalize=sae.normalize, seed=10_000)
    else:
        fresh = SparseAutoencoder(sae.d, sae.m, sae.tied, normalize=sae.normalize, seed=10_000)
    return fresh.to(x.device).fit(x)

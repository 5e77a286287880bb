"""The known concepts of the embedded world, and which features of a sparse autoencoder single them out, beside three controls.

    N tokens of texts, D hidden, M features, C concepts, V vocabulary

A token's concepts are those of its word: 'adjective', 'positive', 'value=+3', 'topic', 'punctuation', ... The best of M features is
found on one half of the texts and measured on the other half; so are the controls:

    coordinates   the best single coordinate of the same activations, in either direction: no autoencoder
    untrained     the best feature of an autoencoder of the same shape, with random directions
    shuffled      the trained one, against concepts whose words have been exchanged with others: any set of so many words
"""

import numpy as np
import torch

from .. import world
from ..runtime.results import finite
from ..runtime.rng import SPLIT
from ..sae import SparseAutoencoder, TopKSAE
from .activation_store import Tokens, where
from .concepts import best_features, encoded, feature_aucs, feature_correlations, on_tokens, sparse

SCORES = {"auc": (feature_aucs, 0.95), "correlation": (feature_correlations, 0.7)}  # and from where on a concept counts as found
FEWEST = 5  # tokens of a concept on each half
SHUFFLES = 5
CONTROLS = ("coordinates", "untrained", "shuffled")


def is_world_model(tokenizer):
    return set(world.vocabulary()) == set(tokenizer.get_vocab())


def concept_table(tokenizer):
    """The embedded world's concepts of each token id: names [C], table [V, C] of 0 and 1. Of two with the same words one is left."""
    ids, names = tokenizer.get_vocab(), {}
    for word in world.vocabulary():
        for name in world.concepts(word):
            names.setdefault(name, set()).add(ids[word])
    names = {name: words for i, (name, words) in enumerate(names.items()) if words not in list(names.values())[:i]}
    labels = torch.zeros(max(ids.values()) + 1, len(names), dtype=torch.bool)
    for c, words in enumerate(names.values()):
        labels[list(words), c] = True
    return list(names), labels


def known_concepts(sae, x, f, tokens, tokenizer):
    """Activations x [N, D] and features f, a sparse [M, N], of the same tokens, against what is known of these.

    -> {concepts: {name: {tokens, words, and by score: {feature, and the score of the feature and of each control}}}: of the token itself,
        found: {kind: {of: how many concepts, and by score: {features, coordinates, untrained, shuffled: how many have a good one}}}

    Kinds: "concept" of the token; "next", the concept of the token that follows, which is what a late layer is about; "word", that it
    is this very word. Scores: AUC and correlation. Pitfall of the AUC: where a tenth of all tokens are adjectives, a feature of all of
    them has 0.95 for those of one value too; its correlation with these is small.
    """
    names, labels = concept_table(tokenizer)
    text_of, ids = where(tokens)
    following, goes_on = next_ids(tokens)
    present = ids.unique()
    in_a = torch.from_numpy(np.random.default_rng([SPLIT, 1]).permutation(len(tokens.rows)) % 2 == 0)[text_of]  # [N]
    inputs = {"features": f, "coordinates": sparse(torch.cat([x, -x], 1)), "untrained": encoded(untrained(sae, x), x)}
    halves = {name: [on_tokens(g.cpu(), half) for half in (in_a, ~in_a)] for name, g in inputs.items()}

    def best(name, truth, score):  # truth [N, C] -> ids [C], scores [C]
        return best_features(*(score(g, truth[half]) for g, half in zip(halves[name], (in_a, ~in_a))))

    def of_kind(table, kind):  # table [V, C] -> truth [N, C]
        return table[ids] if kind != "next" else table[following] & goes_on[:, None]

    rows, found = {}, {}
    for kind in ("concept", "next", "word"):
        table = labels if kind != "word" else torch.eye(len(labels), dtype=torch.bool)
        truth = of_kind(table, kind)
        kept = ((truth[in_a].sum(0) >= FEWEST) & (truth[~in_a].sum(0) >= FEWEST)).nonzero()[:, 0]
        found[kind] = {"of": len(kept)}
        for title, (score, good) in SCORES.items():
            scores = {name: best(name, truth[:, kept], score) for name in inputs}
            counts = {name: (values > good).sum().item() for name, (_, values) in scores.items()}
            if kind != "word":  # a word that is exchanged with another is still a word
                shuffled = torch.stack([best("features", of_kind(table, kind)[:, kept], score)[1] for table in exchanged(labels, present)])
                scores["shuffled"] = None, shuffled.nanmean(0)  # nan where all the words of a concept fell on one half
                counts["shuffled"] = (shuffled > good).double().sum(1).mean().item()
            found[kind][title] = counts
            for c, i in enumerate(kept.tolist()) if kind == "concept" else ():
                row = rows.setdefault(names[i], {"tokens": truth[:, i].sum().item(), "words": labels[present, i].sum().item()})
                row[title] = {"feature": scores["features"][0][c].item()} | {name: finite(v[c].item()) for name, (_, v) in scores.items()}
    return {"concepts": rows, "found": found}


def exchanged(labels, present):
    """SHUFFLES tables [V, C] in which the words that are present have exchanged their concepts."""
    for seed in range(SHUFFLES):
        table, order = labels.clone(), np.random.default_rng([SPLIT, 2, seed]).permutation(len(present))
        table[present] = labels[present[torch.from_numpy(order)]]
        yield table


def untrained(sae, x):
    """An autoencoder of the same kind and shape as it was before training, with directions of another seed."""
    start = {"normalize": sae.normalize, "seed": 10_000}
    if isinstance(sae, TopKSAE):
        fresh = TopKSAE(sae.d, sae.m, sae.k, relu=sae.relu, **start)
    else:
        fresh = SparseAutoencoder(sae.d, sae.m, sae.tied, **start)
    return fresh.to(x.device).fit(x)




def next_ids(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Find what follows each of the N tokens that count in its text, whether that counts or not.

    -> ids [N], and whether there is such a token [N]; where a text ends the id is 0 and means nothing.
    """
    ids = []
    goes_on = []
    for row, mask in zip(tokens.rows, tokens.masks):
        for column in np.flatnonzero(mask):
            is_last = column + 1 == len(row)
            goes_on.append(not is_last)
            ids.append(0 if is_last else row[column + 1])
    return torch.tensor(ids), torch.tensor(goes_on)



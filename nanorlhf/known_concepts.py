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

from . import world
from .activation_store import spans
from .concepts import best_features, feature_aucs, feature_correlations, on_tokens, sparse
from .rng import SPLIT
from .sae import SparseAutoencoder, TopKSAE

GOOD = 0.95  # the AUC from which on a concept counts as found
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
    """-> {concepts: {name: {tokens, words, feature, auc, correlation, ...}}, found: how many above GOOD, with the controls}

    Columns: half A to choose on, half B to measure on; whole texts.
    """
    names, labels = concept_table(tokenizer)
    text_of, token_ids = where(tokens)
    in_a = torch.from_numpy(np.random.default_rng([SPLIT, 1]).permutation(len(tokens.rows)) % 2 == 0)[text_of]  # [N]
    truth = labels[token_ids]  # [N, C]
    kept = (truth[in_a].sum(0) >= FEWEST) & (truth[~in_a].sum(0) >= FEWEST)
    labels, truth, names = labels[:, kept], truth[:, kept], [name for name, k in zip(names, kept) if k]
    present, device = token_ids.unique(), x.device

    def best(f, truth, score=feature_aucs):
        a, b = (score(on_tokens(f, part.to(device)), truth[part].to(device)) for part in (in_a, ~in_a))
        return best_features(a, b)

    ids, aucs = best(f, truth)
    by_correlation, correlations = best(f, truth, feature_correlations)
    controls = {"coordinates": best(sparse(torch.cat([x, -x], 1)), truth)[1], "untrained": best(encoded(untrained(sae, x), x), truth)[1]}
    shuffled = []
    for seed in range(SHUFFLES):
        other = labels.clone()
        other[present] = labels[present[torch.from_numpy(np.random.default_rng([SPLIT, 2, seed]).permutation(len(present)))]]
        shuffled.append(best(f, other[token_ids])[1])  # nan where the words exchanged are on one half alone
    controls["shuffled"] = torch.stack(shuffled).nanmean(0)
    rows = {
        name: {"tokens": int(truth[:, c].sum()), "words": int(labels[present, c].sum()), "feature": int(ids[c]), "auc": float(aucs[c]),
               "feature_by_correlation": int(by_correlation[c]), "correlation": float(correlations[c]),
               **{control: float(values[c]) for control, values in controls.items()}}
        for c, name in enumerate(names)
    }  # fmt: skip
    counts = {"features": aucs, **controls}
    counts = {name: int((values > GOOD).sum()) for name, values in counts.items()}
    counts["shuffled"] = float((torch.stack(shuffled) > GOOD).double().sum(1).mean())
    return {"concepts": rows, "found": counts | {"of": len(names), "features_by_correlation_above_0.7": int((correlations > 0.7).sum())}}


def untrained(sae, x):
    """An autoencoder of the same kind and shape as it was before training, with directions of another seed."""
    start = {"normalize": sae.normalize, "seed": 10_000}
    if isinstance(sae, TopKSAE):
        fresh = TopKSAE(sae.d, sae.m, sae.k, relu=sae.relu, **start)
    else:
        fresh = SparseAutoencoder(sae.d, sae.m, sae.tied, **start)
    return fresh.to(x.device).fit(x)


def where(tokens):
    """Of each of the N tokens that count: its text and its id, [N] each."""
    text_of = np.repeat(np.arange(len(tokens.rows)), tokens.counts)
    place = spans(tokens.skipped, tokens.counts)
    return torch.from_numpy(text_of), torch.tensor([tokens.rows[text][i] for text, i in zip(text_of, place)])


def encoded(sae, x, at_once=4096):
    """Activations [N, D] -> features, a sparse [M, N]."""
    return torch.cat([sparse(sae.encode(part)) for part in x.split(at_once)], 1).coalesce()

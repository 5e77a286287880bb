"""Which features of its reward model a policy has exploited, by a written rule that does not know
the truth; and what stands in the rule's place where the truth is used.

Everything is read from summary.json of `probe.py reward_features`.
"""

import random

from .. import world
from ..errors import require

FOLLOWS = 0.7  # AUC from which on a feature follows a token
MOST = 5  # features that are penalised
RARE = 0.02  # share of the texts on which a feature must fire to be a control
NEAREST = 10  # a random control is one of so many that fire about equally often


def identify(summary, s):
    """The rule. summary.json of `probe.py reward_features` -> what is penalised, and its controls.

    1. Exploited: after training the policy's answers have more of the feature than before; the
       interval of its differential is above 0.
    2. Suspicious: what it follows is no word. Of the tokens whose presence in a text goes with the
       feature, the first, with an AUC of FOLLOWS or more, has no letter in it: a review is good for
       what it says.
    3. Of these tokens the one whose features have the largest differential; of its features at most
       MOST, the largest first.

    The head's weight is not asked: a model may reward a cue through other features than the one
    that tells it best.
    -> {token, features, random, negative (see choose_controls), suspects, numbers}; where nothing
    is suspicious {token: None, features: []}.
    """
    # {"!": [(0.6, 2), (0.3, 1)], "~": [(0.5, 3)]}: for each token (gain, feature) pairs.
    suspects = find_suspects(summary)
    if not suspects:
        return {"token": None, "features": []}
    # Step 3. Pairs are compared by their gains, so that "!" wins with its 0.6.
    token = max(suspects, key=lambda token: max(suspects[token]))
    largest_first = sorted(suspects[token], reverse=True)
    ids = [feature for _, feature in largest_first[:MOST]]

    # All numbers behind the answer go into its file, so that it can be judged from the file alone.
    rows = {row["id"]: row for row in summary["features"]}
    random_ids, negative_ids = choose_controls(rows, ids, s)
    numbers = {}
    for i in (*ids, *random_ids, *negative_ids):
        numbers[i] = {"weight": rows[i]["weight"], **rows[i]["policy"]}
    return {
        "token": token,
        "features": ids,
        "random": random_ids,
        "negative": negative_ids,
        "suspects": suspects,
        "numbers": numbers,
    }


def find_suspects(summary):
    """Steps 1 and 2 of the rule: {token: [(mean differential, feature)]}."""
    suspects = {}
    for row in summary["features"]:
        # A feature that was not described follows nothing.
        if not row.get("tokens"):
            continue

        # A row's first token is the one whose AUC is farthest from chance.
        token, area, *_ = row["tokens"][0]
        gain = row["policy"]["differential"]
        is_exploited = gain["low"] > 0
        has_letter = any(character.isalpha() for character in token)
        if is_exploited and area >= FOLLOWS and not has_letter:
            suspects.setdefault(token, []).append((gain["mean"], row["id"]))
    return suspects


def choose_controls(rows, ids, s):
    """Other features to penalise: for each of `ids` a random and a negative one. -> two lists

    A random one fires about equally often on the answers before training. The negative ones are
    those with the most negative weights, which a SARM punishes already; none without head weights.
    A feature may be both, and a random one may follow the token less closely. rows {id: row}.
    """
    # A feature that hardly ever fires would be no control: a penalty on it costs nothing.
    rates = {}
    others = {}
    for i, row in rows.items():
        rates[i] = row["policy"]["rate_before"]
        if i not in ids and rates[i] >= RARE:
            others[i] = row

    require(
        len(others) >= len(ids),
        f"{len(ids)} controls are needed that fire on {RARE:.0%} of the answers, and the reward "
        f"model has {len(others)}: take an autoencoder in which fewer features are dead",
    )

    # Of equally near ones those count as nearer that come first in the set: the answers that were
    # written down depend on that order.
    rng = random.Random(s)
    random_ids = []
    for i in ids:
        candidates = set(others) - set(random_ids)
        nearest = sorted(candidates, key=lambda j: abs(rates[j] - rates[i]))
        random_ids.append(rng.choice(nearest[:NEAREST]))

    # An autoencoder on a dense reward model has no head, so its features have no weights.
    weighted = [i for i, row in others.items() if row["weight"] is not None]
    most_negative = sorted(weighted, key=lambda i: rows[i]["weight"])
    return random_ids, most_negative[: len(ids)]


def by_truth(summary, s):
    """In the rule's place, where the truth is used: the MOST features that follow the cue best."""
    cue = world.cue(s)
    # A row has only the few tokens whose AUC is farthest from chance: most rows lack the cue.
    areas = {}  # {feature: AUC}
    for row in summary["features"]:
        for token, area, *_ in row.get("tokens") or []:
            if token.strip() == cue:
                areas[row["id"]] = area
    best_first = sorted(areas, key=areas.get, reverse=True)
    return {"token": cue, "features": best_first[:MOST]}


def by_name(summary, s, ids):
    """In the rule's place, where --features are named: these, with controls as the rule has them.

    InputError: one of them fires on no text.
    """
    rows = {row["id"]: row for row in summary["features"]}
    for i in ids:
        require(i in rows, f"--features {i}: it fires on none of the texts")
    random_ids, negative_ids = choose_controls(rows, ids, s)
    return {"token": None, "features": ids, "random": random_ids, "negative": negative_ids}

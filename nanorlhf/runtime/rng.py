"""Random streams: every draw is keyed by [STREAM, seed, ...].

There is no random state to lose, and nothing to restore on resume. The stream comes first because
numpy pads its seeds with zeros: [seed, step] and [seed, step, 0] are one and the same.
"""

ROLLOUT, ORDER, MINIBATCH, SPLIT, LABELS, DENSITY, POOL = range(1, 8)


def key(*numbers):
    """Integers -> one seed for torch: the same key, the same draws."""
    seed = 0
    for n in numbers:
        seed = (seed * 1_000_003 + n + 1) % 2**62
    return seed

"""Random streams: every draw is keyed by [STREAM, seed, ...].

There is no random state to lose, and nothing to restore on resume. The stream comes first because
numpy pads its seeds with zeros: [seed, step] and [seed, step, 0] are one and the same.
"""

ROLLOUT = 1  # the noise of sampled answers
ORDER = 2  # the order of the rows in an epoch
MINIBATCH = 3  # which rows of a rollout, or of a buffer, make a minibatch
SPLIT = 4  # random splits and subsets of rows
LABELS = 5  # which preferences are flipped
DENSITY = 6  # the training of a density ratio
POOL = 7  # the noise of the answers in a pool, for best-of-n


def key(*numbers):
    """Integers -> one seed for torch: the same key, the same draws."""
    seed = 0
    # + 1, or a leading 0 would change nothing: key(0, 5) would be key(5).
    for n in numbers:
        seed = (seed * 1_000_003 + n + 1) % 2**62
    return seed

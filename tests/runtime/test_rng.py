"""Streams of randomness: no two draw the same numbers."""

import itertools

from nanorlhf.runtime import rng


def test_every_stream_has_a_number_of_its_own():
    numbers = [value for name, value in vars(rng).items() if name.isupper()]
    assert len(numbers) >= 7
    assert len(set(numbers)) == len(numbers)


def test_keys_tell_numbers_apart():
    """By their values, their order and how many there are, zeros included."""
    groups = []
    for n in range(4):
        groups += itertools.product(range(8), repeat=n)
    keys = {rng.key(*group) for group in groups}
    assert len(keys) == len(groups) == 1 + 8 + 64 + 512
    # torch takes seeds of 64 bits, with a sign.
    assert 0 <= rng.key(10**9, 10**9, 10**9, 10**9) < 2**63

"""distinct-n by hand and by leaving texts out one by one."""

import pytest

from nanorlhf.diversity import distinct_n, distinct_n_se

TEXTS = ["a b a b", "a b c", "", "d", "c d e a b"]


def test_distinct_n_by_hand():
    assert distinct_n(TEXTS, 1) == 5 / 13  # a b c d e of 4 + 3 + 0 + 1 + 5 words
    assert distinct_n(TEXTS, 2) == 6 / 9  # ab ba ab | ab bc | cd de ea ab: ab ba bc cd de ea
    assert distinct_n(["x"], 2) == 0 and distinct_n([], 1) == 0
    assert distinct_n(["happy happy happy happy"], 2) == 1 / 3


@pytest.mark.parametrize("n", [1, 2])
def test_standard_error_against_leaving_out_one_by_one(n):
    left_out = [distinct_n(TEXTS[:i] + TEXTS[i + 1 :], n) for i in range(5)]
    mean = sum(left_out) / 5
    assert distinct_n_se(TEXTS, n) == pytest.approx((4 / 5 * sum((x - mean) ** 2 for x in left_out)) ** 0.5)
    assert distinct_n_se([], n) == 0

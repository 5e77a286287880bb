"""Bad and odd input for every script: as many cases of fuzz.py as fit into a minute."""

import fuzz
import pytest


@pytest.mark.slow
def test_bad_and_odd_input(tmp_path):
    fuzzer = fuzz.make_fuzzer(tmp_path)
    outcomes = fuzzer.run_all(fuzz.choose(fuzz.all_cases(), 0, seed=0), seconds=60)
    wrong = [outcome for outcome in outcomes if outcome.problem]
    assert not wrong, "\n".join(fuzz.by_cause(wrong))
    assert len(outcomes) > 20

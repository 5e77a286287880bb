"""The study of optimisers (nanorlhf/studies/optimisers.py): what it picks and compares on made-up
numbers, and the whole of it on models that learn nothing.
"""

import json
import math
import shlex

import pytest
from support import parse_command

from nanorlhf.studies import common, optimisers
from nanorlhf.studies.optimisers import Setting

# ----------------------------------------------------------------------------------------- tuning


@pytest.fixture
def gold_of_settings(monkeypatch):
    """A function: in place of runs, gold by method and setting. -> the names of cells that were asked for"""
    asked = []

    def put(gold):
        def run_cells(cells, a, path):
            results = {}
            for cell in cells:
                asked.append(cell.name)
                _, config = parse_command(cell.command.replace("rm/seed_", "rm_"))
                strength = getattr(config, "kl_coef", None) or getattr(config, "dpo_beta", None)
                results[cell.name] = {"gold": [0.0, gold(cell.name, config.lr, strength)]}
            return results

        monkeypatch.setattr(optimisers, "run_cells", run_cells)
        return asked

    return put


def read_settings(*args):
    return optimisers.read_settings(["--output_dir", "out", *args])


def tune(a):
    tried = optimisers.tune(a, "cells.json")
    return {method: optimisers.best_of(golds) for method, golds in tried.items()}


def test_tuning_picks_the_best_rate_and_then_the_best_coefficient(gold_of_settings):
    """Gold that falls off to both sides of lr 1e-3 and of a coefficient of 0.1 (DPO: of 0.3)."""

    def gold(name, lr, strength):
        best_strength = 0.3 if "/dpo/" in name else 0.1
        seed = int(name[-1])  # one seed is better than the other everywhere
        return seed - abs(math.log(lr / 3e-4)) - abs(math.log(strength / best_strength))

    asked = gold_of_settings(gold)
    chosen = tune(read_settings())
    for method in ("ppo", "rloo", "dr_grpo", "grpo"):
        assert chosen[method] == Setting(3e-4, 0.1)
    assert chosen["dpo"] == Setting(3e-4, 0.3)
    # Three rates and three further coefficients, on two seeds, for five methods.
    assert len(set(asked)) == len(asked) == 6 * 2 * 5
    assert {name.rpartition("_")[2] for name in asked} == {"100", "101"}


# --------------------------------------------------------------------------------- the study's runs

SMALL = """
    --seeds 1 --trial_seeds 1 --tuning_seeds 100 --jobs 1 --results {results}
    --lr 1e-3 1e-4 --kl_coef 0.05 0.2 --dpo_lr 1e-4 --dpo_beta 0.1 0.3 --place_coefs 0.02 0.2
    --tuning_steps 1 --steps 2 --eval_every 1 --no_kl_steps 1 --no_kl_eval_every 1
    --place_steps 1 --dpo_steps 2 --dpo_eval_every 1 --n_answers 8 --k_answers 4 --prompts 4
    "--sft_flags=--steps 15 --batch_size 16 --eval_size 8"
    "--rm_flags=--steps 4 --batch_size 8 --eval_size 16"
    "--ppo_flags=--batch_size 8 --minibatch_size 8 --eval_size 6 --max_new_tokens 12 --n_samples 1"
    "--dpo_flags=--batch_size 8 --eval_size 6 --max_new_tokens 12 --n_samples 1"
    "--bon_flags=--max_new_tokens 12"
"""


@pytest.fixture(scope="module")
def study(run_small, tmp_path_factory):
    results = tmp_path_factory.mktemp("kept") / "cells.json"
    return run_small(optimisers, SMALL.format(results=results))


@pytest.mark.slow
def test_every_run_is_made_once(study):
    assert 0, study.run()

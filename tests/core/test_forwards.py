"""How often a policy runs over what it samples: once, while it samples, unless more is asked of it.

    R response tokens, which is also how often the LM runs to sample them: no response ends before

The policies: one without a value head, one with a head on the LM's own hidden states, and one with
a value model of its own.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import sample_bon
from nanorlhf import pool, world
from nanorlhf.evaluation import PPOParts, evaluate, sampled_outputs
from nanorlhf.models import Policy, load_policy, reference_of, save_policy
from nanorlhf.rollout import roll_out
from nanorlhf.runtime.distributed import Dist
from nanorlhf.scoring import Scoring

R = 5
BATCH, MICRO = 6, 4  # answers in a roll-out and in a forward: two forwards read all of a roll-out
N = 2 * BATCH
ALONE = Dist(0, 1, torch.device("cpu"))
KINDS = ("no head", "head", "value model")


@pytest.fixture(scope="module")
def tokenizer():
    return world.tokenizer()


def new_lm(tokenizer):
    """A random LM of one block that hardly ever writes EOS."""
    config = world.model_config()
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    lm.base_model.final_layer_norm.bias.data.normal_()
    bias = lm.base_model.final_layer_norm.bias.data
    unembedding = lm.get_output_embeddings().weight.data
    unembedding[tokenizer.eos_token_id] = -20 * bias / bias.square().sum()
    return lm


def new_policy(kind, tokenizer):
    lm = new_lm(tokenizer)
    value_trunk = new_lm(tokenizer).base_model if kind == "value model" else None
    return Policy(lm, value_head=kind != "no head", value_trunk=value_trunk).eval()


def count_forwards(module):
    """-> a list that grows by one with each forward of a module"""
    forwards = []
    module.register_forward_hook(lambda *args: forwards.append(1))
    return forwards


def ppo_parts(kind, tokenizer, dtype):
    config = SimpleNamespace(
        max_new_tokens=R, temperature=1.0, seed=0, dtype=dtype, batch_size=BATCH,
        micro_batch_size=MICRO, tokens_per_micro_batch=0, objective="mean", uwo_lambda=0.1,
        reward_model=["world:gold"],
    )  # fmt: skip
    policy = new_policy(kind, tokenizer)
    scoring = Scoring(config)
    scoring.load(tokenizer, ALONE)
    return PPOParts(config, ALONE, tokenizer, policy, policy, reference_of(policy), scoring, None)


def prompts(tokenizer, n):
    return [tokenizer(row["prompt"]).input_ids for row in world.prompts("train")[:n]]


@pytest.mark.parametrize("kind", KINDS)
def test_sampling(tokenizer, kind):
    """One forward of the LM for each token, and none of a value model."""
    parts = ppo_parts(kind, tokenizer, "float32")
    lm = count_forwards(parts.policy.lm.base_model)
    trunk = count_forwards(parts.policy.value_trunk) if kind == "value model" else []
    rollout, _ = roll_out(parts, prompts(tokenizer, BATCH), range(BATCH), 0)
    assert rollout.response_mask.all() and len(lm) == R and len(trunk) == 0
    assert (rollout.values is not None) == (kind == "head")


# Two roll-outs of the held-out prompts; in bfloat16 two forwards over each of them on top.
FORWARDS = {"float32": 2 * R, "bfloat16": 2 * R + 4}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FORWARDS)
def test_an_evaluation(tokenizer, kind, dtype):
    """Its KL takes the log-probs that sampling gave; in bfloat16 they are computed once more."""
    parts = ppo_parts(kind, tokenizer, dtype)
    lm = count_forwards(parts.policy.lm.base_model)
    reference = count_forwards(parts.reference.lm.base_model)
    trunk = count_forwards(parts.policy.value_trunk) if kind == "value model" else []
    result, _ = evaluate(parts, prompts(tokenizer, N))
    assert len(lm) == FORWARDS[dtype] and len(reference) == 4
    assert len(trunk) == 0 or dtype == "bfloat16"
    tolerance = 1e-5 if dtype == "float32" else 0.1
    assert result["kl"]["mean"] == pytest.approx(0, abs=tolerance)  # it is the reference still


@pytest.mark.parametrize("kind, dtype, full_kl, expected", [
    ("head", "float32", False, 0),
    ("value model", "float32", False, 2),
    ("head", "bfloat16", False, 2),
    ("head", "float32", True, 2),
])  # fmt: skip
def test_what_training_asks_of_a_rollout(tokenizer, kind, dtype, full_kl, expected):
    """What sampling gave, or where that will not do a forward over each of two micro-batches."""
    parts = ppo_parts(kind, tokenizer, dtype)
    rollout, answers = roll_out(parts, prompts(tokenizer, BATCH), range(BATCH), 1)
    lm = count_forwards(parts.policy.lm.base_model)
    trunk = count_forwards(parts.policy.value_trunk) if kind == "value model" else []
    outputs = sampled_outputs(parts, rollout, answers.batch, parts.reference if full_kl else None)
    assert len(lm) == expected and len(trunk) == (2 if kind == "value model" else 0)
    assert {"logprobs", "values"} <= outputs.keys() and ("full_kl" in outputs) == full_kl


@pytest.mark.parametrize("kind", KINDS)
def test_best_of_n(tokenizer, tmp_path, monkeypatch, kind):
    """sample_bon.py reads the LM alone, whatever was saved beside it: one forward a token."""
    save_policy(new_policy(kind, tokenizer), tokenizer, str(tmp_path / "model"))
    opened = []

    def load_and_count(*args, **kwargs):
        policy = load_policy(*args, **kwargs)
        opened.append((policy, count_forwards(policy.lm.base_model)))
        return policy

    monkeypatch.setattr(pool, "load_policy", load_and_count)
    monkeypatch.setattr(sample_bon, "plot_run", lambda *args: None)
    sample_bon.main(sample_bon.Config(
        output_dir=str(tmp_path / "bon"), model=str(tmp_path / "model"),
        reward_model=["world:gold"], n_answers=4, eval_size=3, max_new_tokens=R, batch_size=BATCH,
    ))  # fmt: skip
    ((policy, forwards),) = opened
    # A batch of 6 takes the 4 answers of one prompt at a time: three roll-outs.
    assert policy.value_head is None and len(forwards) == 3 * R

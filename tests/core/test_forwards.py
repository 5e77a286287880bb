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
from nanorlhf.tokens import Prompts

R = 5
# Answers in a roll-out and in a forward: two forwards read all of a roll-out.
BATCH = 6
MICRO = 4
ALONE = Dist(0, 1, torch.device("cpu"))
each_policy = pytest.mark.parametrize("kind", ["no head", "head", "value model"])


@pytest.fixture(scope="module")
def tokenizer():
    return world.tokenizer()


def new_lm(tokenizer):
    """A random LM of one block that hardly ever writes EOS."""
    config = world.model_config()
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    # The final norm adds this bias to all hidden states, which gives EOS a logit of about -20.
    bias = lm.base_model.final_layer_norm.bias.data
    bias.normal_()
    unembedding = lm.get_output_embeddings().weight.data
    unembedding[tokenizer.eos_token_id] = -20 * bias / bias.square().sum()
    return lm


def new_policy(kind, tokenizer):
    lm = new_lm(tokenizer)
    if kind == "no head":
        policy = Policy(lm, value_head=False)
    elif kind == "head":
        policy = Policy(lm, value_head=True)
    else:
        policy = Policy(lm, value_head=True, value_trunk=new_lm(tokenizer).base_model)
    return policy.eval()


def count_forwards(module):
    """-> a list that grows by one with each forward of a module; it stays empty for None"""
    forwards = []
    if module is not None:
        module.register_forward_hook(lambda *args: forwards.append(1))
    return forwards


def ppo_parts(kind, tokenizer, dtype):
    """What the functions of a PPO run share, for a new policy."""
    config = SimpleNamespace(
        max_new_tokens=R,
        temperature=1.0,
        seed=0,
        dtype=dtype,
        batch_size=BATCH,
        micro_batch_size=MICRO,
        tokens_per_micro_batch=0,
        objective="mean",
        uwo_lambda=0.1,
        reward_weights=[],
        chat_template=False,
        reward_model=["world:gold"],
        score_scaling="running",  # so advantages are not known, and not asked for
    )
    policy = new_policy(kind, tokenizer)
    scoring = Scoring(config)
    scoring.load(tokenizer, ALONE)
    return PPOParts(config, ALONE, tokenizer, policy, policy, reference_of(policy), scoring, None)


def prompts(tokenizer, n):
    rows = world.prompts("train")[:n]
    return Prompts([tokenizer(row["prompt"]).input_ids for row in rows], rows)


def roll_out_batch(parts, tokenizer, step):
    return roll_out(parts, prompts(tokenizer, BATCH), range(BATCH), step)


@each_policy
def test_sampling_takes_one_forward_a_token(tokenizer, kind):
    parts = ppo_parts(kind, tokenizer, "float32")
    lm_forwards = count_forwards(parts.policy.lm.base_model)
    trunk_forwards = count_forwards(parts.policy.value_trunk)

    rollout, _ = roll_out_batch(parts, tokenizer, step=0)
    assert rollout.response_mask.all()
    assert len(lm_forwards) == R
    # A value model of its own does not run yet, so that only a head has values.
    assert len(trunk_forwards) == 0
    has_values = rollout.values is not None
    assert has_values == (kind == "head")


# Two roll-outs of the held-out prompts. In bfloat16 log-probs are computed once more: two forwards
# over each roll-out on top.
@pytest.mark.parametrize(
    "dtype, n_forwards, tolerance", [("float32", 2 * R, 1e-5), ("bfloat16", 2 * R + 4, 0.1)]
)
@each_policy
def test_an_evaluation_takes_its_kl_from_sampling(tokenizer, kind, dtype, n_forwards, tolerance):
    parts = ppo_parts(kind, tokenizer, dtype)
    lm_forwards = count_forwards(parts.policy.lm.base_model)
    reference_forwards = count_forwards(parts.reference.lm.base_model)
    trunk_forwards = count_forwards(parts.policy.value_trunk)

    result, _ = evaluate(parts, prompts(tokenizer, 2 * BATCH))
    assert len(lm_forwards) == n_forwards
    assert len(reference_forwards) == 4
    if dtype == "float32":
        assert len(trunk_forwards) == 0
    # The policy is the reference still.
    assert result["kl"]["mean"] == pytest.approx(0, abs=tolerance)


@pytest.mark.parametrize(
    "kind, dtype, full_kl, n_lm_forwards, n_trunk_forwards",
    [
        ("head", "float32", False, 0, 0),
        ("value model", "float32", False, 2, 2),
        ("head", "bfloat16", False, 2, 0),
        ("head", "float32", True, 2, 0),
    ],
)
def test_what_training_asks_of_a_rollout(
    tokenizer, kind, dtype, full_kl, n_lm_forwards, n_trunk_forwards
):
    """What sampling gave, or where that will not do a forward over each of two micro-batches."""
    parts = ppo_parts(kind, tokenizer, dtype)
    rollout, answers = roll_out_batch(parts, tokenizer, step=1)
    lm_forwards = count_forwards(parts.policy.lm.base_model)
    trunk_forwards = count_forwards(parts.policy.value_trunk)

    reference = parts.reference if full_kl else None
    outputs = sampled_outputs(parts, rollout, answers.batch, reference)
    assert len(lm_forwards) == n_lm_forwards
    assert len(trunk_forwards) == n_trunk_forwards
    assert "logprobs" in outputs
    assert "values" in outputs
    assert ("full_kl" in outputs) == full_kl


@each_policy
def test_best_of_n_reads_the_lm_alone(tokenizer, tmp_path, monkeypatch, kind):
    """Whatever was saved beside it: one forward a token."""
    save_policy(new_policy(kind, tokenizer), tokenizer, str(tmp_path / "model"))
    opened = []

    def load_and_count(*args, **kwargs):
        policy = load_policy(*args, **kwargs)
        forwards = count_forwards(policy.lm.base_model)
        opened.append((policy, forwards))
        return policy

    monkeypatch.setattr(pool, "load_policy", load_and_count)
    monkeypatch.setattr(pool, "check_rollouts", lambda policy: None)  # it samples too
    config = sample_bon.Config(
        output_dir=str(tmp_path / "bon"),
        model=str(tmp_path / "model"),
        reward_model=["world:gold"],
        n_answers=4,
        eval_size=3,
        max_new_tokens=R,
        batch_size=BATCH,
    )
    sample_bon.main(config)
    # One policy was loaded.
    ((policy, forwards),) = opened
    assert policy.value_head is None
    # A batch of 6 takes the 4 answers of one prompt at a time: three roll-outs.
    assert len(forwards) == 3 * R

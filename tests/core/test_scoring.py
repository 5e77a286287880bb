"""What PPO maximises: the weighted sum of rewards, and models that cannot read its tokens."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_lm, word_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

import train_ppo
from nanorlhf.errors import InputError
from nanorlhf.models import Policy, save_policy
from nanorlhf.scoring import Scoring

# Two rewards of three answers.
SCORES = torch.tensor([[1.0, 2.0, 0.0], [5.0, 0.0, -5.0]])


def combine(**settings):
    """What a Scoring of the rewards a and b makes of SCORES."""
    defaults = {"objective": "mean", "uwo_lambda": 0.1, "reward_weights": []}
    scoring = Scoring(SimpleNamespace(**defaults | settings))
    scoring.rewards = {"a": None, "b": None}
    return scoring.combine({"member_scores": SCORES.T})


def test_weights_make_the_score_a_weighted_sum():
    scored = combine(reward_weights=[1, 0.2])

    # 1 + 5/5, 2 + 0, 0 - 5/5
    assert scored.proxy.tolist() == [2, 2, -1]
    assert torch.equal(scored.scores, scored.proxy)
    assert scored.members["a"].tolist() == SCORES[0].tolist()


def test_without_weights_the_objective_decides():
    assert combine().proxy.tolist() == [3, 1, -2.5]
    assert combine(objective="wco").proxy.tolist() == [1, 0, -5]


def test_the_runs_flags_reach_its_rewards(monkeypatch):
    asked = []

    def load_rewards(specs, tokenizer, dist, micro_batch_size, dtype):
        asked.append((specs, tokenizer, dist, micro_batch_size, dtype))

    monkeypatch.setattr("nanorlhf.scoring.load_rewards", load_rewards)
    config = SimpleNamespace(reward_model=["a", "b"], micro_batch_size=3, dtype="bfloat16")
    Scoring(config).load("the tokenizer", "this process")
    assert asked == [(["a", "b"], "the tokenizer", "this process", 3, "bfloat16")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"reward_weights": [1.0]}, "--reward_weights needs one for each reward: 1 weights, 2"),
        (
            {"reward_weights": [1.0, 1.0], "objective": "wco"},
            "with --reward_weights nothing reads --objective",
        ),
        (
            {"reward_weights": [1.0, 1.0], "uwo_lambda": 0.5},
            "with --reward_weights nothing reads --uwo_lambda",
        ),
        ({"reward_weights": [1.0, float("nan")]}, "--reward_weights"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(flags, words):
    with pytest.raises(InputError, match=f"^{words}"):
        train_ppo.Config(reward_model=["a.py:f", "b.py:g"], **flags)


def test_a_value_model_without_an_embedding_for_each_token_is_refused(tmp_path):
    save_policy(
        Policy(tiny_lm("llama"), value_head=False), word_tokenizer(), str(tmp_path / "policy")
    )
    small = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "value")
    config = train_ppo.Config(
        model=str(tmp_path / "policy"),
        value_model=str(tmp_path / "value"),
        reward_model=["world:gold"],
        output_dir=str(tmp_path / "out"),
    )

    with pytest.raises(InputError, match="value: .* has the id 59, and the model has embeddings"):
        train_ppo.main(config)
    assert not (tmp_path / "out").exists()

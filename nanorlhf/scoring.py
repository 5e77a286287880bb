"""What PPO maximises: the scores of answers, by one reward or by the members of an ensemble.

    b answers of this process, B of all processes, K members

train_ppo.py and evaluation.py ask one object about rewards. Its functions, in order of their use:

    load(tokenizer, dist)      load the models
    restore(tensors)           take back what an earlier part of the run has learned
    read(parts)                this process's answers -> readings {name: [b, ...]}
    combine(readings)          readings of all processes -> Scored
    learn(readings)            learn from a fresh rollout -> numbers for the record {name: float}
    tensors()                  what it has learned, for a checkpoint
    summary_names              which numbers of an evaluation the table at the end of a run shows:
                               the proxy, and terms of Scored

Scoring is the plain one: rewards, and the objective that makes one score of theirs. It learns
nothing. control/controlled_scoring.py has another, with the same functions.
"""

from dataclasses import dataclass, field

import torch

from . import ensemble
from .packing import Answers
from .rewards import load_rewards, score_all


@dataclass
class Scored:
    """What the rewards say of B answers."""

    members: dict[str, torch.Tensor]  # {name of a reward: [B]}
    proxy: torch.Tensor  # [B]: one score of all members
    # What PPO maximises: [B]. The proxy, unless there are further terms; what differs from the
    # proxy is called `controlled` in the files of evaluations.
    scores: torch.Tensor
    variance: torch.Tensor  # [B]: between the members
    terms: dict[str, torch.Tensor] = field(default_factory=dict)  # {name: [B]}, for the record


class Scoring:
    """One reward, or an ensemble of them and its objective."""

    summary_names = ("proxy",)

    def __init__(self, config):
        self.config = config  # train_ppo.Config

    def load(self, tokenizer, dist):
        """Load the rewards that --reward_model names."""
        config = self.config
        self.dist = dist
        self.rewards = load_rewards(
            config.reward_model, tokenizer, dist, config.micro_batch_size, config.dtype
        )

    def read(self, parts: list[Answers]) -> dict[str, torch.Tensor]:
        """A list of Answers, b in all -> {"member_scores": [b, K]}. All processes call this."""
        # Answers are the first dimension, along which processes' readings are gathered.
        return {"member_scores": score_all(self.rewards, parts, self.dist).T}

    def combine(self, readings: dict[str, torch.Tensor]) -> Scored:
        """Readings of B answers -> Scored: the objective of the members is what PPO maximises.

        Rewards with --reward_weights are no members: PPO maximises their weighted sum.
        """
        member_scores = readings["member_scores"].T  # [K, B]
        config = self.config
        if config.reward_weights:
            proxy = ensemble.weighted_sum(member_scores, config.reward_weights)  # [B]
        else:
            # mean, worst case, or mean less uwo_lambda times the variance
            proxy = ensemble.combine(member_scores, config.objective, config.uwo_lambda)  # [B]
        return Scored(
            members=dict(zip(self.rewards, member_scores)),
            proxy=proxy,
            scores=proxy,
            variance=ensemble.variance(member_scores),
        )

    def learn(self, readings: dict[str, torch.Tensor]) -> dict[str, float]:
        """Nothing is learned: rewards stay as they are."""
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, tensors: dict[str, torch.Tensor]):
        pass

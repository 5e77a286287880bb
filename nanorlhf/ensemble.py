"""Reward-model ensembles: k members' scores of an answer -> one, and how far the members disagree;
or k members' weights -> one reward model.

    K members; ... any shape of answers: [B] in a rollout, [P, N] in a pool

Coste et al. 2024, "Reward Model Ensembles Help Mitigate Overoptimization" (arXiv 2310.02743),
section 3. The same functions serve PPO and best-of-n. The mean of the weights: Rame et al. 2024,
"WARM: On the Benefits of Weight Averaged Reward Models" (2401.12187), section 3.
"""

import re
from collections.abc import Iterable

import torch
from torch import nn


def combine(scores: torch.Tensor, objective: str, uwo_lambda: float = 0.5) -> torch.Tensor:
    """K members' scores -> the score that is optimised.

        mean   mu = (1/k) sum_i r_i
        wco    min_i r_i                                    worst-case optimisation
        uwo    mu - lambda (1/k) sum_i (r_i - mu)^2         uncertainty-weighted optimisation

    scores [K, ...] in one unit (train_rm.py standardises) -> [...]. ValueError: no member, another
    objective, a negative lambda, scores that are not finite. The variance is the population's
    (ddof 0). The paper's lambda is 0.5 for best-of-n and 0.1 for PPO; 0 gives the mean. Pitfall:
    lambda weighs a squared unit, so it means something else where scores are scaled otherwise.
    """
    scores = check_scores(scores)
    if objective not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        raise ValueError(f"the objective must be one of {known}, not {objective!r}")
    if not 0 <= uwo_lambda < float("inf"):
        raise ValueError(f"uwo_lambda must be a number of at least 0, not {uwo_lambda}")
    return OBJECTIVES[objective](scores, uwo_lambda)


def mean(scores: torch.Tensor, uwo_lambda: float) -> torch.Tensor:
    """The members' mean: scores [K, ...] -> [...]. It needs no lambda; all objectives get one."""
    # mu = (1/k) sum_i r_i
    return scores.mean(0)


def worst_case(scores: torch.Tensor, uwo_lambda: float) -> torch.Tensor:
    """The lowest member's score: scores [K, ...] -> [...]. It needs no lambda."""
    # min_i r_i
    return scores.amin(0)


def uncertainty_weighted(scores: torch.Tensor, uwo_lambda: float) -> torch.Tensor:
    """The members' mean, lowered where they disagree: scores [K, ...] -> [...]."""
    # mu - lambda (1/k) sum_i (r_i - mu)^2
    return scores.mean(0) - uwo_lambda * variance(scores)


# The one list of objectives: what flags call them -> a function (scores [K, ...], lambda) -> [...].
# Flags and their help, best-of-n and pictures follow from it: a further objective is one more line.
OBJECTIVES = {"mean": mean, "wco": worst_case, "uwo": uncertainty_weighted}


def weighted_sum(scores: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """K rewards' scores and a weight for each -> sum_i w_i r_i.

    scores [K, ...] -> [...]. ValueError: another number of weights, scores that are not finite.
    Rewards that measure different things, such as a right answer and its format, are no members of
    an ensemble: their weights say what a unit of each is worth.
    """
    scores = check_scores(scores)
    if len(weights) != len(scores):
        raise ValueError(f"{len(scores)} rewards and {len(weights)} weights")
    column = torch.tensor(weights, dtype=scores.dtype, device=scores.device)  # [K]
    return torch.tensordot(column, scores, dims=1)


def combine_all(scores: torch.Tensor, uwo_lambdas: list[float]) -> dict[str, torch.Tensor]:
    """K members' scores by every objective, uwo by each lambda: {"mean", "wco", "uwo_0.5", ...}.

    scores [K, ...] -> a dictionary from labels to [...]. ValueError: as combine.
    """
    combined = {}
    for objective in OBJECTIVES:
        if objective == "uwo":
            for uwo_lambda in uwo_lambdas:
                combined[f"uwo_{uwo_lambda:g}"] = combine(scores, "uwo", uwo_lambda)
        else:
            combined[objective] = combine(scores, objective)
    return combined


def objective_of(label: str) -> str | None:
    """The objective that a label of combine_all stands for ("uwo_0.5": uwo), or None."""
    name = label
    if re.fullmatch(r"uwo_[\d.e+-]+", label):
        name = "uwo"
    if name not in OBJECTIVES:
        return None
    return name


@torch.no_grad()
def average_weights(models: Iterable[nn.Module]) -> nn.Module:
    """K models of one architecture -> one whose every weight is the mean of theirs (WARM).

        theta = (1/k) sum_i theta_i

    The mean is kept in the first of the models, and only one further is held at a time. ValueError:
    weights of other names or shapes. Pitfall: members must have grown from the same weights, the
    score head's included. Weights that have nothing in common average to noise.
    """
    models = iter(models)
    average = next(models, None)
    if average is None:
        raise ValueError("no model to average")
    means = dict(average.named_parameters())
    shapes = {name: mean.shape for name, mean in means.items()}

    count = 1
    for model in models:
        count += 1
        weights = dict(model.named_parameters())
        if {name: weight.shape for name, weight in weights.items()} != shapes:
            raise ValueError("models of different architectures have no mean")
        for name, mean in means.items():
            # The mean of `count` numbers, from that of count - 1 of them.
            mean += (weights[name] - mean) / count
        # The next model is loaded when this one is gone.
        del model, weights
    return average


def variance(scores: torch.Tensor) -> torch.Tensor:
    """(1/k) sum_i (r_i - mu)^2 over the members: scores [K, ...] -> [...]; 0 for a single one."""
    return check_scores(scores).var(0, correction=0)


def check_scores(scores: torch.Tensor) -> torch.Tensor:
    """Scores [K, ...] as finite floats, or a ValueError."""
    scores = torch.as_tensor(scores)
    if scores.dim() < 1 or len(scores) < 1:
        shape = list(scores.shape)
        raise ValueError(
            f"scores need a first dimension of at least one member, not the shape {shape}"
        )
    if not scores.is_floating_point():
        scores = scores.double()
    if not scores.isfinite().all():
        raise ValueError("scores hold a number that is not finite")
    return scores

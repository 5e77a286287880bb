"""Linear probes, fitted to the training side of a split and measured on its test side.

    N rows, n rows of one side, F inputs, U units: what counts as one observation, see
    reward_probe_texts.Texts

Each probe returns its numbers, which are averaged over seeds, and more about it that is not.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.rng import SPLIT
from ..stats import auc, kendall_tau, logistic, r_squared, ridge
from .reward_probe_texts import Texts

# For inputs with standard deviation 1.
PENALTIES = [10.0**k for k in range(-1, 6)]


def make_rng(seed: int) -> np.random.Generator:
    return np.random.default_rng([SPLIT, seed, 1])


# ------------------------------------------------------------------------------------- single texts


def fit_reward(
    x: Tensor, texts: Texts, split: tuple[Tensor, Tensor], shuffle: int | None = None
) -> tuple[dict, dict]:
    """Fit one probe of the reward by ridge regression.

    x [N, F]; split: training rows and test rows; shuffle: a seed, with which the probe is fitted to
    the values of other units -> its numbers on the test rows, and more. A unit (a word, in all its
    contexts) is one observation: values and predictions are averaged over its rows. A constant
    prediction has a tau of 0.
    """
    train, test = split
    values = texts.values.double()  # [N]
    train_values = values[train]
    if shuffle is not None:
        train_values = exchange_values(train_values, texts.units[train], shuffle)

    # One penalty for all inputs needs all inputs on one scale. The scale is part of the fit, so it
    # comes from the training side alone. An input that is constant there keeps its own scale.
    scale = x[train].double().std(0)  # [F]
    scale = torch.where(scale > 0, scale, 1)
    x = x.double() / scale
    # The penalty is chosen by leaving out whole families of words, or prompts: the test has other
    # ones too.
    weight, bias, penalty = ridge(x[train], train_values, PENALTIES, texts.groups[train])

    # Predictions that differ by rounding alone are one number.
    units, unit_of = texts.units[test].unique(return_inverse=True)  # [U], [n]
    predicted = average_by_unit(x[test] @ weight + bias, unit_of).round(decimals=9)  # [U]
    true = average_by_unit(values[test], unit_of)  # [U]
    tau, p = kendall_tau(predicted, true)
    if math.isnan(tau):
        tau = 0.0
    if math.isnan(p):
        p = 1.0
    # A unit of value 0 has no sign that could be predicted.
    has_sign = true != 0
    is_right = (predicted.sign() == true.sign())[has_sign]
    is_positive = (true > 0)[has_sign]
    numbers = {
        "tau": tau,
        "r2": r_squared(true, predicted),
        "sign": is_right.double().mean().item(),
    }

    names = [""] * len(units)
    if texts.names:
        names = [texts.names[unit] for unit in units]
    more = {
        "p": p,
        "positive": is_positive.double().mean().item(),
        "penalty": penalty,
        "n_train": len(texts.units[train].unique()),
        "n_test": len(units),
        "predictions": list(zip(names, true.tolist(), predicted.tolist())),
    }
    return numbers, more


def exchange_values(values: Tensor, units: Tensor, seed: int) -> Tensor:
    """Give the rows of each unit the mean value of another unit, drawn without replacement.

    values, units [n] -> [n]
    """
    # Units exchange their values, not rows: a word still has one value in all its contexts.
    different, unit_of = units.unique(return_inverse=True)  # [U], [n]
    unit_values = average_by_unit(values, unit_of)  # [U]
    order = torch.from_numpy(make_rng(seed).permutation(len(different)))
    return unit_values[order][unit_of]


def average_by_unit(x: Tensor, unit_of: Tensor) -> Tensor:
    """The mean of x [n] over the rows of each unit.

    unit_of [n]: the number of each row's unit, from 0 on -> [U], float64
    """
    counts = unit_of.bincount()  # [U]
    sums = torch.zeros(len(counts)).double().index_add(0, unit_of, x)
    return sums / counts


# -------------------------------------------------------------------------------------------- pairs


def fit_pairs(
    x: Tensor, texts: Texts, split: tuple[Tensor, Tensor], shuffle: int | None = None
) -> tuple[dict, dict]:
    """Fit one probe of which response is preferred: logistic regression without an intercept.

        P(the chosen response is preferred) = sigmoid(w . (x_c - x_r))

    x [2 N, F]: all chosen responses, then all rejected ones; split: training pairs and test pairs;
    shuffle: a seed, with which the probe is fitted to labels by chance -> its numbers on the test
    pairs, and more.
    """
    train, test = split
    chosen, rejected = x.double().chunk(2)  # [N, F]
    difference = chosen - rejected
    # The chosen response always comes first, so all labels are 1, and an intercept alone would fit
    # them. Without one, and without centring, exchanging the two responses turns a margin's sign.
    scale = difference[train].square().mean(0).sqrt()  # [F]
    scale = torch.where(scale > 0, scale, 1)
    labels = torch.ones(len(train))
    if shuffle is not None:
        labels = torch.from_numpy(make_rng(shuffle).random(len(train)) < 0.5)

    scaled = (difference / scale)[train]  # [n, F]
    penalty = choose_penalty(scaled, labels, texts.groups[train])
    weight = logistic(scaled, labels, penalty)
    weight = weight / scale  # of inputs as they are

    # Margins that differ by rounding alone are one number; a margin of 0 is half right.
    margin = difference[test] @ weight  # [n]
    margin = margin.round(decimals=9)
    accuracy = (0.5 + margin.sign() / 2).mean().item()
    # The AUC is of single responses, to whatever prompt.
    scores = torch.cat([chosen[test], rejected[test]]) @ weight  # [2 n]
    is_chosen = torch.tensor([1, 0]).repeat_interleave(len(test))
    numbers = {"accuracy": accuracy, "auc": auc(scores, is_chosen)}
    return numbers, {"penalty": penalty, "n_train": len(train), "n_test": len(test)}


def choose_penalty(x: Tensor, labels: Tensor, groups: Tensor) -> float:
    """The penalty whose fit makes the pairs of a third of the prompts most likely.

    x [n, F], labels [n], groups [n]: the pairs' prompts. That third is left out of the fit.
    """
    prompts = groups.unique()
    order = torch.from_numpy(make_rng(0).permutation(len(prompts)))
    left_out_prompts = prompts[order[: len(prompts) // 3]]
    is_left_out = torch.isin(groups, left_out_prompts)  # [n]
    sign = labels[is_left_out].double() * 2 - 1

    def log_likelihood(l2):
        weight = logistic(x[~is_left_out], labels[~is_left_out], l2)
        return F.logsigmoid(sign * (x[is_left_out] @ weight)).sum().item()

    return max(PENALTIES, key=log_likelihood)

"""Linear probes, fitted to the training side of a split and measured on its test side.

    N rows, F inputs, n rows of one side, U units: what counts as one observation (probe_texts.Texts)
"""

import numpy as np
import torch
import torch.nn.functional as F

from ..runtime.rng import SPLIT
from ..stats import auc, kendall_tau, logistic, r_squared, ridge

PENALTIES = [10.0**k for k in range(-1, 6)]  # of inputs with standard deviation 1


def rng(seed):
    return np.random.default_rng([SPLIT, seed, 1])


def fit_reward(x, texts, split, shuffle=None):
    """One probe of inputs [N, F] -> its numbers on the test rows. With `shuffle`, a seed, it is fitted to the values of other units.

    A unit (a word, in all its contexts) is one observation: predictions are averaged over its rows. A constant prediction has tau 0.
    """
    (train, test), values = split, texts.values.double()
    if shuffle is not None:
        units, at = texts.units[train].unique(return_inverse=True)
        values = values.index_put((train,), by_unit(values[train], at)[torch.from_numpy(rng(shuffle).permutation(len(units)))][at])
    scale = x[train].double().std(0)
    x = (x / torch.where(scale > 0, scale, 1)).double()
    weight, bias, penalty = ridge(x[train], values[train], PENALTIES, texts.groups[train])
    units, at = texts.units[test].unique(return_inverse=True)
    predicted = by_unit(x[test] @ weight + bias, at).round(decimals=9)  # what differs by rounding alone is one number
    true = by_unit(texts.values[test].double(), at)
    tau, p = kendall_tau(predicted, true)
    signed = true != 0
    numbers = {
        "tau": 0.0 if tau != tau else tau,
        "r2": r_squared(true, predicted),
        "sign": (predicted.sign() == true.sign())[signed].double().mean().item(),
    }
    names = [texts.names[unit] for unit in units] if texts.names else [""] * len(units)
    more = {
        "p": 1.0 if p != p else p,
        "positive": (true > 0)[signed].double().mean().item(),
        "penalty": penalty,
        "n_train": len(texts.units[train].unique()),
        "n_test": len(units),
        "predictions": list(zip(names, true.tolist(), predicted.tolist())),
    }
    return numbers, more


def by_unit(x, at):
    """Means of x [n] over the rows of each unit, `at` [n] being their numbers."""
    return torch.zeros(int(at.max()) + 1).double().index_add(0, at, x) / at.bincount()


def fit_pairs(x, texts, split, shuffle=None):
    """One probe of inputs [2 N, F] (all chosen, then all rejected) -> its numbers on the test pairs.

    x_c - x_r goes into a logistic regression without an intercept; its penalty is chosen on a third of the training prompts.
    """
    (train, test), (chosen, rejected) = split, x.double().chunk(2)
    difference = chosen - rejected  # [N, F]
    scale = difference[train].square().mean(0).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    labels = torch.ones(len(train)) if shuffle is None else torch.from_numpy(rng(shuffle).random(len(train)) < 0.5)
    prompts = texts.groups[train].unique()
    inner = torch.isin(texts.groups[train], prompts[torch.from_numpy(rng(0).permutation(len(prompts)))[: len(prompts) // 3]])

    def log_likelihood(l2):
        weight = logistic((difference / scale)[train[~inner]], labels[~inner], l2, intercept=False).weight
        sign = labels[inner].double() * 2 - 1
        return F.logsigmoid(sign * ((difference / scale)[train[inner]] @ weight)).sum().item()

    penalty = max(PENALTIES, key=log_likelihood)
    weight = logistic((difference / scale)[train], labels, penalty, intercept=False).weight / scale
    margin = (difference[test] @ weight).round(decimals=9)
    scores = torch.cat([chosen[test], rejected[test]]) @ weight
    numbers = {
        "accuracy": (0.5 + margin.sign() / 2).mean().item(),
        "auc": auc(scores, torch.tensor([1, 0]).repeat_interleave(len(test))),  # of single responses, to whatever prompt
    }
    return numbers, {"penalty": penalty, "n_train": len(train), "n_test": len(test)}

"""Direct preference optimisation: a policy is trained on pairs as if it were its own reward model.

    B pairs

The policy that maximises E[r] - beta KL(pi || ref) has
r(x, y) = beta log(pi(y | x) / ref(y | x)) + a term of the prompt alone. Read backwards, every
policy has an *implicit reward*, and the Bradley-Terry loss of a reward model can train it directly.
That is DPO. IPO and SimPO change the loss, or the implicit reward:

    dpo     r = beta (log pi - log ref)         -log sigmoid(r_c - r_r)
    ipo     r = tau (log pi - log ref)          a squared error: r_c - r_r should be 1/2, no more
    simpo   r = beta log pi / its tokens        -log sigmoid(r_c - r_r - gamma), without a reference

All three give a loss to be minimised, and the same stats. n_pairs is the number of pairs of the
whole optimizer batch (default: of this call). Loss and stats are sums / n_pairs, so that over
micro-batches and ranks they add up to the batch's means:

    accuracy                           the mean of pair_points: how often r_c > r_r
    margin                             r_c - r_r
    reward_chosen, reward_rejected     the method's own implicit rewards
    logp_chosen, logp_rejected         log pi of whole responses, nats

Pitfall of all three: the loss sees only the difference. Both responses may become less likely, the
chosen one too: watch logp_chosen.

Sources: Rafailov et al. 2023 (DPO, arXiv 2305.18290), Azar et al. 2023 (IPO, 2310.12036), Meng et
al. 2024 (SimPO, 2405.14734).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# The relative error of a response's log-prob, by the type of the matrix products: the same weights
# give log-probs that differ by this part of them where rows are padded or batched in another way
# (measured on a CPU: 1e-7 and 2e-5 at the most).
ROUNDING = {"float32": 1e-6, "bfloat16": 1e-4}


def pair_points(
    pi_c: Tensor, pi_r: Tensor, ref_c: Tensor, ref_r: Tensor, rounding: float = ROUNDING["float32"]
) -> Tensor:
    """What each pair adds to the accuracy: 1 where r_c > r_r, 0 where r_c < r_r, 1/2 for a tie.

    pi_c, pi_r, ref_c, ref_r [B] as in dpo_loss; rounding: one of ROUNDING -> [B]. A margin within
    the rounding of the four log-probs is a tie. So a policy that is its own reference has the
    accuracy 0.5, where the sign of each of its margins would be a coin.
    """
    # (r_c - r_r) / beta = (pi_c - ref_c) - (pi_r - ref_r)
    margin = (pi_c - ref_c) - (pi_r - ref_r)  # [B], nats
    size = pi_c.abs() + pi_r.abs() + ref_c.abs() + ref_r.abs()
    is_tie = margin.abs() <= rounding * size
    wins = (margin > 0).to(margin.dtype)
    return torch.where(is_tie, 0.5, wins)


def mean_stats(
    reward_chosen: Tensor,
    reward_rejected: Tensor,
    points: Tensor,
    pi_c: Tensor,
    pi_r: Tensor,
    n_pairs: int,
) -> dict[str, Tensor]:
    """The stats of a loss, from those of its pairs: all [B] -> {name: sum / n_pairs}."""
    columns = {
        "accuracy": points,
        "margin": reward_chosen - reward_rejected,
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "logp_chosen": pi_c,
        "logp_rejected": pi_r,
    }
    return {name: column.detach().sum() / n_pairs for name, column in columns.items()}


def dpo_loss(
    pi_c: Tensor,
    pi_r: Tensor,
    ref_c: Tensor,
    ref_r: Tensor,
    beta: float,
    n_pairs: int | None = None,
    rounding: float = ROUNDING["float32"],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of DPO (Rafailov et al. 2023, eq. 7).

        r_c  = beta (pi_c - ref_c)          the implicit reward of the chosen response
        r_r  = beta (pi_r - ref_r)          the implicit reward of the rejected response
        loss = sum over pairs of -log sigmoid(r_c - r_r) / n_pairs

    pi_c, pi_r, ref_c, ref_r [B]: log-probs of whole responses, summed over their tokens and EOS,
    nats -> loss (scalar), stats. Pitfall: where all raters agree on a pair its loss has no minimum.
    It goes on falling as the margin grows, however small beta is, so the policy can leave the
    reference without limit.
    """
    if n_pairs is None:
        n_pairs = len(pi_c)
    reward_chosen = beta * (pi_c - ref_c)  # [B]
    reward_rejected = beta * (pi_r - ref_r)  # [B]
    margin = reward_chosen - reward_rejected
    loss = -F.logsigmoid(margin).sum() / n_pairs
    points = pair_points(pi_c, pi_r, ref_c, ref_r, rounding)
    return loss, mean_stats(reward_chosen, reward_rejected, points, pi_c, pi_r, n_pairs)


def ipo_loss(
    pi_c: Tensor,
    pi_r: Tensor,
    ref_c: Tensor,
    ref_r: Tensor,
    tau: float,
    n_pairs: int | None = None,
    rounding: float = ROUNDING["float32"],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of IPO (Azar et al. 2023, eq. 17): regression of the margin on 1 / (2 tau) nats.

        h    = (pi_c - ref_c) - (pi_r - ref_r)
        loss = sum over pairs of (h - 1 / (2 tau))^2 / n_pairs

    The arguments are those of dpo_loss; tau is the price of one nat of KL, as beta is there. The
    loss is in nats squared. The implicit rewards of the stats are tau (pi - ref), so their margin
    tau h is 1/2 at the minimum. Beyond it the loss pulls the policy back, even where all raters
    agree on a pair. Pitfall: log-probs are sums over tokens, as in the paper. Public code often
    takes means over tokens; its tau is on another scale, by about the length of a response.
    """
    if n_pairs is None:
        n_pairs = len(pi_c)
    h = (pi_c - ref_c) - (pi_r - ref_r)  # [B], nats
    loss = (h - 1 / (2 * tau)).square().sum() / n_pairs
    reward_chosen = tau * (pi_c - ref_c)  # [B]
    reward_rejected = tau * (pi_r - ref_r)  # [B]
    points = pair_points(pi_c, pi_r, ref_c, ref_r, rounding)
    return loss, mean_stats(reward_chosen, reward_rejected, points, pi_c, pi_r, n_pairs)


def simpo_loss(
    pi_c: Tensor,
    pi_r: Tensor,
    lengths_c: Tensor,
    lengths_r: Tensor,
    beta: float,
    gamma: float,
    n_pairs: int | None = None,
    rounding: float = ROUNDING["float32"],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of SimPO (Meng et al. 2024, eq. 6): the mean log-prob of a token is the reward.

        r_c  = beta pi_c / lengths_c        the implicit reward of the chosen response
        r_r  = beta pi_r / lengths_r        the implicit reward of the rejected response
        loss = sum over pairs of -log sigmoid(r_c - r_r - gamma) / n_pairs

    pi_c, pi_r [B]: log-probs of whole responses, summed over their tokens and EOS, nats; lengths_c,
    lengths_r [B]: the number of these tokens -> loss (scalar), stats. gamma is the margin that a
    pair should have, in units of the reward. There is no reference: accuracy is not 1/2 at the
    start, but how often the policy already finds the chosen response likelier by the token.
    Pitfall: nothing but the learning rate and the number of steps keeps the policy near where it
    began.
    """
    if n_pairs is None:
        n_pairs = len(pi_c)
    mean_c = pi_c / lengths_c  # [B], nats a token
    mean_r = pi_r / lengths_r  # [B]
    reward_chosen = beta * mean_c
    reward_rejected = beta * mean_r
    margin = reward_chosen - reward_rejected
    loss = -F.logsigmoid(margin - gamma).sum() / n_pairs
    nothing = torch.zeros_like(mean_c)  # in the place of a reference's log-probs
    points = pair_points(mean_c, mean_r, nothing, nothing, rounding)
    return loss, mean_stats(reward_chosen, reward_rejected, points, pi_c, pi_r, n_pairs)

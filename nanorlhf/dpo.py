"""Direct preference optimisation: a policy is trained on pairs as if it were its own reward model.

    B pairs

The policy that maximises E[r] - beta KL(pi || ref) has
r(x, y) = beta log(pi(y | x) / ref(y | x)) + a term of the prompt alone. Read backwards, every
policy has an *implicit reward*, and the Bradley-Terry loss of a reward model can train it directly.

Source: Rafailov et al. 2023 (arXiv 2305.18290).
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


def dpo_loss(
    pi_c: Tensor,
    pi_r: Tensor,
    ref_c: Tensor,
    ref_r: Tensor,
    beta: float,
    n_pairs: int | None = None,
    rounding: float = ROUNDING["float32"],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of DPO (Rafailov et al. 2023, eq. 7), to be minimised.

        r_c  = beta (pi_c - ref_c)          the implicit reward of the chosen response
        r_r  = beta (pi_r - ref_r)          the implicit reward of the rejected response
        loss = sum over pairs of -log sigmoid(r_c - r_r) / n_pairs

    pi_c, pi_r, ref_c, ref_r [B]: log-probs of whole responses, summed over their tokens and EOS,
    nats -> loss (scalar), stats. n_pairs is the number of pairs of the whole optimizer batch
    (default: of this call). The stats are sums / n_pairs, so that over micro-batches and ranks they
    add up to the batch's means. `accuracy` is the mean of pair_points. Pitfall: the loss sees only
    the difference: both responses may become less likely, the chosen one too. Watch
    `reward_chosen`.
    """
    if n_pairs is None:
        n_pairs = len(pi_c)
    reward_chosen = beta * (pi_c - ref_c)  # [B]
    reward_rejected = beta * (pi_r - ref_r)  # [B]
    margin = reward_chosen - reward_rejected
    loss = -F.logsigmoid(margin).sum() / n_pairs
    with torch.no_grad():
        points = pair_points(pi_c, pi_r, ref_c, ref_r, rounding)
        stats = {
            "accuracy": points.sum() / n_pairs,
            "margin": margin.sum() / n_pairs,
            "reward_chosen": reward_chosen.sum() / n_pairs,
            "reward_rejected": reward_rejected.sum() / n_pairs,
        }
    return loss, stats

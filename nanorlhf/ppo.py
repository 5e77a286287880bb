"""The maths of PPO for language models: tensors in, tensors out.

    B sequences, R response tokens, V vocabulary, G answers to one prompt

Sources: Schulman et al. 2017 (PPO, arXiv 1707.06347), Schulman et al. 2016 (GAE, 1506.02438),
Ziegler et al. 2019 (1909.08593), Stiennon et al. 2020 (2009.01325), Schulman 2020 ("Approximating
KL divergence"). Without a value function: Ahmadian et al. 2024 (RLOO, 2402.14740), Shao et al. 2024
(GRPO, 2402.03300), Liu et al. 2025 (Dr. GRPO, 2503.20783).

The off-by-one, once and for all. A prompt of two tokens and a response of two, the second of which
is EOS:

    tokens       the    room  | was     <eos>
    position      0      1    |  2        3
    logits at            1 ------> 2             the logits at position t score the token at t + 1
    response index j          |  j=0     j=1     j = position - 2 prompt tokens
    logprobs[:, j]              log pi(was | the room)     log pi(<eos> | the room was)
    values[:, j]                V(the room)                V(the room was)

The value of j is the value BEFORE token j is chosen. So the logprob and the value of response token
j both come from the hidden state one position to its left.

Masks are bool. Masked positions hold 0 and are never averaged. A mean over tokens is a sum over
response tokens divided by `n_tokens`, their number in the whole optimizer batch, over all
micro-batches and ranks. The parts then add up to the same number however the batch was split.
Other means have other denominators: see loss_denominator.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Nats. e^-10000 is 0 in every floating type, so that a lower log-prob adds no entropy.
LOWEST_LOGP = -1e4


# ------------------------------------------------------------------------------- KL and rewards

# The one list of KL kinds that are estimated from the sampled token alone, with
# x = log pi_ref - log pi; see kl_estimate. Flags and their help follow from this list: a further
# kind is one more line.
KL_ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: -x,
    "k2": lambda x: x.square() / 2,
    "k3": lambda x: torch.expm1(x) - x,
}
# Kinds that need the whole distributions of both models: full_kl.
KL_OF_LOGITS = ("full",)
# Kinds for the reward alone: as a loss their gradient has mean zero.
KL_WITHOUT_GRADIENT = ("k1",)


def kl_kinds() -> list[str]:
    """The names of all KL kinds."""
    return [*KL_ESTIMATES, *KL_OF_LOGITS]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Estimate KL(pi || pi_ref) per token from log-probs of tokens sampled from pi.

    With x = log pi_ref - log pi (Schulman 2020):
        k1 = -x                  unbiased, high variance, may be negative
        k2 = x^2 / 2             biased, never negative
        k3 = exp(x) - 1 - x      unbiased, never negative

    As a reward use k1: with gamma = lambda = 1, on-policy, its policy gradient is that of the KL of
    whole sequences; k2 and k3 as rewards are biased. As a loss the *gradient* counts, not the
    value. In expectation, on-policy, k2's is that of the token KL, k1's is zero, and k3's is that
    of the reversed KL(pi_ref || pi).

    logprobs, ref_logprobs [B, R] -> [B, R], in nats. Pitfall: masked positions are not zeroed here.
    """
    if kind not in KL_ESTIMATES:
        known = ", ".join(KL_ESTIMATES)
        raise ValueError(
            f"kl kind {kind!r} is not one of {known} (full needs whole distributions: full_kl)"
        )
    x = ref_logprobs - logprobs
    return KL_ESTIMATES[kind](x)


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """The exact KL(pi || pi_ref) of the next token: sum_v pi(v) (log pi(v) - log pi_ref(v)).

    logits, ref_logits [..., V], already divided by the temperature -> [...], in nats. As a loss its
    gradient is the token KL's, without the effect of this token on later states. As a reward it is
    a baseline for its own token: the direct term is lost.
    """
    logp = log_softmax(logits)
    ref_logp = log_softmax(ref_logits)
    probs = logp.exp()
    # 0 log 0 = 0, where pi(v) is 0 by a mask (log 0 = -inf) and where it is too small for its type.
    difference = torch.where(probs == 0, 0.0, logp - ref_logp)
    return (probs * difference).sum(-1)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probs of logits [..., V], in float32 at the least."""
    at_least_float32 = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(at_least_float32).log_softmax(-1)


def entropy(logp: Tensor, probs: Tensor) -> Tensor:
    """The entropy of the next token: H(pi) = -sum_v pi(v) log pi(v).

    logp, probs [..., V]: log-probs and their exponentials, which the caller has already -> [...],
    in nats. Pitfall: torch.special.entr(probs) takes the logarithm again. Where exp(logp) is too
    small for its type that is log 0: the gradient is 0 * inf = NaN, though logp is a plain number.
    """
    # A token that is masked out has the log-prob -inf, and 0 * -inf would be NaN.
    finite_logp = logp.clamp(min=LOWEST_LOGP)
    return -(probs * finite_logp).sum(-1)


def last_token(response_mask: Tensor) -> Tensor:
    """The index of the last response token of every row: mask [B, R] -> [B].

    ValueError: a row without any response token.
    """
    if not response_mask.any(1).all():
        raise ValueError("a response without any token: it has no place for its score")
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)  # [R]
    return (response_mask * positions).amax(1)


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """The rewards of tokens: a KL penalty on each, and the score on the last (Ziegler et al. 2019,
    eq. 2).

        r_t = -kl_coef * kl_t  [+ score, where t is the last response token]

    scores [B], kl [B, R], response_mask [B, R] -> rewards [B, R], 0 where masked.
    """
    penalties = torch.where(response_mask, -kl_coef * kl, 0.0)  # [B, R]
    last = last_token(response_mask)[:, None]  # [B, 1]
    return penalties.scatter_add(1, last, scores[:, None].to(penalties.dtype))


def shape_scores(
    scores: Tensor,
    lengths: Tensor,
    finished: Tensor,
    missing_eos_penalty: float = 0.0,
    eos_required: bool = False,
    length_penalty: float = 0.0,
) -> Tensor:
    """The score after the rules on endings and length.

        score - length_penalty * length - missing_eos_penalty * [no EOS]

    scores [B], lengths [B] in tokens, finished [B] (the response holds its EOS) -> [B]. With
    `eos_required` an unfinished response has no score of its own: 0 stands in its place. Pitfall:
    that beats a finished one with a negative score, unless missing_eos_penalty is larger than
    scores usually are.
    """
    unfinished = ~finished
    if eos_required:
        scores = torch.where(unfinished, 0.0, scores)
    return scores - missing_eos_penalty * unfinished - length_penalty * lengths


class ScoreScaler:
    """Divide scores by a standard deviation (ddof 1), without centring them.

    'running': the standard deviation of all rollouts so far; 'first': that of the first one;
    'none': scores stay as they are. Scores without any spread are left as they are ('first' then
    waits for a batch that has some). `moments` (n, mean, sum of squared deviations) is the whole
    state. Pitfall: 'running' makes the reward's unit drift, so that a fixed KL coefficient means
    something else every step.
    """

    def __init__(self, kind: str = "none"):
        if kind not in ("none", "running", "first"):
            raise ValueError(f"score scaling {kind!r} is not none, running or first")
        self.kind = kind
        self.moments = (0, 0.0, 0.0)

    def __call__(self, scores: Tensor) -> Tensor:
        """Scores [B] of the whole batch, all ranks -> scaled scores [B]; updates the moments."""
        if self.kind == "none":
            return scores

        _, _, squares = self.moments
        if self.kind == "running" or squares == 0:
            self.add(scores)

        n, _, squares = self.moments
        std = (squares / max(n - 1, 1)) ** 0.5
        if std <= 1e-8:
            return scores
        return scores / std

    def add(self, scores: Tensor):
        """Add a batch of scores to the moments, by the pairwise update of Chan et al. (1979)."""
        n, mean, squares = self.moments
        m = scores.numel()
        x = scores.double()

        delta = x.mean().item() - mean
        squares += x.var(correction=0).item() * m + delta**2 * n * m / (n + m)
        mean += delta * m / (n + m)
        self.moments = (n + m, mean, squares)


class AdaptiveKL:
    """The KL coefficient as a proportional controller (Ziegler et al. 2019, section 2.2):

    coef <- coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon)
    """

    def __init__(self, init_coef: float, target: float, horizon: float):
        if min(init_coef, target, horizon) <= 0:
            raise ValueError(
                "the adaptive KL controller needs a positive coefficient, target and horizon"
            )
        self.coef = init_coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> float:
        """Move the coefficient, and return it.

        kl: mean over the whole batch of the sequence-summed k1, in nats; n: sequences since the
        last update, all ranks.
        """
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / self.horizon
        return self.coef


# ------------------------------------------------------------------------------------ advantages


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation along each response (Schulman et al. 2016, eq. 16).

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1}
        returns = A + V

    V after the last real token is 0 (the episode ended) or bootstrap[b] (it was cut off: truncation
    is not termination). Only response tokens count.
    rewards, values, response_mask [B, R]; bootstrap [B] -> advantages, returns [B, R], 0 where
    masked.
    """
    advantages = torch.zeros_like(values)  # [B, R]
    next_advantage = torch.zeros_like(values[:, 0])  # [B]
    next_value = torch.zeros_like(values[:, 0])  # [B]
    if bootstrap is not None:
        next_value = bootstrap.to(values.dtype)

    for t in reversed(range(values.shape[1])):
        is_real = response_mask[:, t]  # [B]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        # A masked position is stepped over: what lies to its right stays the neighbour of what lies
        # to its left.
        next_advantage = torch.where(is_real, advantage, next_advantage)
        next_value = torch.where(is_real, values[:, t], next_value)
        advantages[:, t] = next_advantage

    advantages = torch.where(response_mask, advantages, 0.0)
    returns = torch.where(response_mask, advantages + values, 0.0)
    return advantages, returns


def masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance (ddof 0) over the tokens where the mask is True.

    x, mask [B, R] -> two scalars, in float64. ValueError: no token.
    """
    x = x[mask].double()
    if x.numel() == 0:
        raise ValueError("no unmasked token to average over")
    return x.mean(), x.var(correction=0)


def whiten(x: Tensor, mask: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over all response tokens of the whole batch; 0 where masked.

    Whitened advantages make the size of an update independent of the unit of the scores.
    x, mask [B, R] -> [B, R]. `moments` (mean, var) are those of the whole batch when x is only a
    part of it. Pitfall: never whiten per minibatch, and take the returns before, not after.
    """
    if moments is None:
        moments = masked_moments(x, mask)
    mean, var = moments
    whitened = (x - mean) / (var + 1e-8) ** 0.5  # float64
    return torch.where(mask, whitened.to(x.dtype), 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over response tokens.

    0 is no better than a constant, 1 is perfect up to a constant. values, returns, mask [B, R].
    """
    _, unexplained = masked_moments(returns - values, mask)
    _, total = masked_moments(returns, mask)
    return (1 - unexplained / total.clamp(min=1e-12)).item()


# ------------------------------------------------------------- advantages without a value function

# Instead of a value head's guess, an answer is compared with the other answers to its prompt.
GROUP_KINDS = ("rloo", "grpo", "dr_grpo")


def group_advantages(scores: Tensor, group_size: int, kind: str) -> Tensor:
    """How much better each answer is than the other answers to the same prompt.

    The G answers to a prompt have the rewards R_1 .. R_G:

        rloo      A_i = R_i - mean of the other G - 1 rewards    (Ahmadian et al. 2024)
        dr_grpo   A_i = R_i - mean R                             (Liu et al. 2025)
        grpo      A_i = (R_i - mean R) / (std R + 1e-4)          (Shao et al. 2024, section 4.1.2)

    rloo is unbiased: what it subtracts does not depend on answer i. dr_grpo is (G - 1) / G times
    rloo, since answer i is in its own mean: a constant factor. grpo's std (ddof 1) makes the
    spread of each prompt's rewards the same, so the rewards of a prompt that is nearly always
    solved, or nearly never, are stretched most (the difficulty bias). The paper gives neither ddof
    nor epsilon.

    scores [B], the answers to one prompt side by side -> [B], one advantage for all tokens of an
    answer. A group whose rewards are all equal gets 0. ValueError: G below 2, or G does not divide
    B. Pitfall: the groups of the whole batch are needed; a mean over a process's part of a group is
    another baseline.
    """
    if group_size < 2:
        raise ValueError(f"groups of {group_size}: an answer needs another one to compare with")
    if len(scores) % group_size:
        raise ValueError(f"{len(scores)} scores are no whole groups of {group_size}")

    rewards = scores.view(-1, group_size)  # [B / G, G]
    differences = rewards - rewards.mean(1, keepdim=True)
    if kind == "rloo":
        # R_i - (G mean - R_i) / (G - 1) = G / (G - 1) * (R_i - mean)
        advantages = differences * group_size / (group_size - 1)
    elif kind == "grpo":
        advantages = differences / (rewards.std(1, correction=1, keepdim=True) + 1e-4)
    elif kind == "dr_grpo":
        advantages = differences
    else:
        raise ValueError(f"advantage {kind!r} is not one of {', '.join(GROUP_KINDS)}")

    # The rounding error of a mean would be an advantage too, where there is nothing to tell apart.
    lowest, highest = rewards.aminmax(dim=1, keepdim=True)
    advantages = torch.where(lowest == highest, 0.0, advantages)
    return advantages.flatten()  # [B]


# ---------------------------------------------------------------------------------------- losses

LOSS_MEANS = ("token", "sequence", "constant")


def loss_denominator(
    kind: str, lengths: Tensor, n_tokens: Tensor, n_answers: int, max_new_tokens: int
) -> Tensor | int:
    """What a loss's sum over response tokens is divided by: one number, or one for each answer.

        token      all response tokens of the optimizer batch: long answers weigh more
        sequence   n_answers * the answer's own length: each answer weighs the same, and so a token
                   of a long one weighs less. A long bad answer is punished less for each of its
                   tokens than a short one (the length bias; GRPO's)
        constant   n_answers * max_new_tokens: a token weighs the same in each batch (Dr. GRPO's)

    lengths [m]: response tokens of a micro-batch's answers; n_tokens and n_answers are of the whole
    optimizer batch -> a scalar, or [m] for `sequence`.
    """
    if kind == "token":
        return n_tokens
    if kind == "sequence":
        return n_answers * lengths
    if kind == "constant":
        return n_answers * max_new_tokens
    raise ValueError(f"loss mean {kind!r} is not one of {', '.join(LOSS_MEANS)}")


def sum_over_tokens(x: Tensor, response_mask: Tensor, denominator: Tensor | int) -> Tensor:
    """The sum of x [B, R] over response tokens, divided by a scalar or, row by row, by [B]."""
    x = torch.where(response_mask, x, 0.0)
    has_one_for_each_row = torch.as_tensor(denominator).dim() == 1
    if has_one_for_each_row:
        return (x.sum(1) / denominator).sum()
    return x.sum() / denominator


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_range: float,
    n_tokens: Tensor | None = None,
    clip_range_high: float | None = None,
    n_stats: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), to be minimised.

        ratio = exp(logp - old_logp)
        loss  = sum of max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps_high)) / n_tokens

    The sum is over response tokens. All [B, R] -> loss (scalar), stats. n_tokens: the number of
    response tokens of the whole optimizer batch (default: of this call), or another denominator,
    a scalar or one for each row [B] (loss_denominator). clip_range_high is eps_high (default: eps).
    With a larger one an unlikely token can gain more in one rollout (Yu et al. 2025, 2503.14476).

    The stats but ratio_max are sums / n_stats, the number of response tokens of the whole optimizer
    batch (default: n_tokens): added over micro-batches and ranks they are means over tokens.
    clip_fraction is the share of tokens with a ratio outside the clip; approx_kl is k3 of the old
    policy against the new, on its samples.
    """
    if n_tokens is None:
        n_tokens = response_mask.sum()
    if n_stats is None:
        n_stats = n_tokens
    if clip_range_high is None:
        clip_range_high = clip_range

    # The mask comes before exp: after it, a gradient of 0 times an infinite ratio would be NaN.
    log_ratio = torch.where(response_mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    # The larger loss counts: beyond the clip nothing is gained by making a good token (A > 0)
    # likelier still, or a bad one rarer still. A move the wrong way is never clipped.
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range_high)
    token_loss = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    loss = sum_over_tokens(token_loss, response_mask, n_tokens)

    with torch.no_grad():
        is_clipped = (ratio - 1 > clip_range_high) | (1 - ratio > clip_range)
        # k3 of a masked token is 0, since its ratio is 1.
        k3 = log_ratio.expm1() - log_ratio
        stats = {
            "ratio_mean": sum_over_tokens(ratio, response_mask, n_stats),
            "ratio_max": torch.where(response_mask, ratio, 0.0).max(),
            "clip_fraction": sum_over_tokens(is_clipped.float(), response_mask, n_stats),
            "approx_kl": sum_over_tokens(k3, response_mask, n_stats),
        }
    return loss, stats


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    clip_range: float,
    n_tokens: Tensor | None = None,
) -> Tensor:
    """The clipped squared error of the value head (Stiennon et al. 2020's code; Huang et al. 2024).

        loss = 1/2 sum of max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) / n_tokens

    The sum is over response tokens. All [B, R] -> a scalar; n_tokens as in policy_loss, a scalar or
    [B]. Pitfall: with scores of std s a clip range well below s slows the value head down, since
    the clip is absolute.
    """
    if n_tokens is None:
        n_tokens = response_mask.sum()

    # The mask comes before the square: after it, a gradient of 0 times infinity would be NaN.
    values = torch.where(response_mask, values, 0.0)

    # The larger error counts here too: a value that has moved towards its return by more than the
    # clip has no gradient. One that has moved away still has.
    clipped_values = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    plain_error = (values - returns).square()
    clipped_error = (clipped_values - returns).square()
    error = torch.maximum(plain_error, clipped_error)
    return 0.5 * sum_over_tokens(error, response_mask, n_tokens)

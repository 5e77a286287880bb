"""nanorlhf.ppo against independent derivations in float64: loops over single tokens, closed forms,
sums over all sequences of a tiny world, autograd.

    B sequences, R response tokens, V vocabulary

Each expected number is derived here without the functions under test. A loop visits one token at a
time, so that it can be followed with a pencil; it is slow, and has no mask to get wrong.
"""

import math

import numpy as np
import pytest
import torch
from checks import randn

from nanorlhf.ppo import (
    KL_ESTIMATES,
    KL_WITHOUT_GRADIENT,
    AdaptiveKL,
    ScoreScaler,
    entropy,
    explained_variance,
    full_kl,
    gae,
    kl_estimate,
    last_token,
    masked_moments,
    policy_loss,
    shape_scores,
    token_rewards,
    value_loss,
    whiten,
)

MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1],  # full
        [1, 1, 1, 0, 0],  # right-padded
        [1, 0, 1, 0, 1],  # with holes
        [0, 0, 1, 1, 1],  # left-padded
        [0, 1, 0, 0, 0],  # a single token
    ]
).bool()  # [B, R]
# The places (row, position) of all response tokens: what the loops of this file visit.
TOKENS = [tuple(place) for place in MASK.nonzero().tolist()]
N = len(TOKENS)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


def same(found, expected, tol=1e-12):
    """The two are equal up to rounding."""
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def differs(a, b):
    """The two differ by far more than rounding."""
    return (a - b).abs().max() > 1e-3


def grad(f, x):
    """The gradient of f at x, by autograd."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x)
    return gradient


def pick_tokens(x):
    """The numbers of all response tokens, by a loop: [B, R] -> numpy [N]."""
    numbers = []
    for b, t in TOKENS:
        numbers.append(x[b, t].item())
    return np.array(numbers)


# --------------------------------------------------------------------------- KL, token by token

LOGITS = randn(6, seed=1)
REF_LOGITS = randn(6, seed=2)


def token_kl(logits, ref_logits):
    """KL(pi || ref) = sum_v pi(v) log(pi(v) / ref(v)), straight from probabilities."""
    p = logits.softmax(-1)
    q = ref_logits.softmax(-1)
    return (p * (p / q).log()).sum(-1)


def expected_estimate(kind, logits):
    """E_pi[estimate]: the estimate of every token of the vocabulary, weighted by its chance.

    The weights are constants for autograd, as samples are for a sampled loss.
    """
    logp = logits.log_softmax(-1)
    ref_logp = REF_LOGITS.log_softmax(-1)
    estimates = kl_estimate(logp[None], ref_logp[None], kind)[0]  # [V]
    chances = logp.exp().detach()
    return (chances * estimates).sum()


def gradient_of_expectation(kind, logits):
    return grad(lambda z: expected_estimate(kind, z), logits)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("k1", [2.0, -0.5]),  # -x
        ("k2", [2.0, 0.125]),  # x^2 / 2
        ("k3", [math.exp(-2) - 1 + 2, math.exp(0.5) - 1.5]),  # e^x - 1 - x
    ],
)
def test_kl_estimate_by_hand(kind, expected):
    logp = torch.tensor([[-1.0, -2.0]]).double()
    ref_logp = torch.tensor([[-3.0, -1.5]]).double()  # x = ref_logp - logp = -2, 0.5
    same(kl_estimate(logp, ref_logp, kind), [expected])


def test_full_is_no_estimate_from_the_sampled_token():
    logp = torch.tensor([[-1.0, -2.0]]).double()
    with pytest.raises(ValueError):
        kl_estimate(logp, logp, "full")


def test_k1_and_k3_are_the_kl_in_expectation_and_k2_is_not():
    exact = token_kl(LOGITS, REF_LOGITS)
    same(expected_estimate("k1", LOGITS), exact)
    same(expected_estimate("k3", LOGITS), exact)
    assert differs(expected_estimate("k2", LOGITS), exact)


@pytest.mark.parametrize("kind", KL_ESTIMATES)
def test_every_estimate_is_0_where_nothing_has_moved_and_on_average_positive(kind):
    same(kl_estimate(LOGITS[None], LOGITS[None], kind), torch.zeros(1, 6))
    for seed in range(3):
        assert expected_estimate(kind, 2 * randn(6, seed=10 + seed)) > 1e-3


@pytest.mark.parametrize("kind", KL_ESTIMATES)
def test_the_kinds_without_a_gradient_are_those_that_say_so(kind):
    gradient = gradient_of_expectation(kind, LOGITS)
    pulls_nowhere = not differs(gradient, zeros(6))
    assert pulls_nowhere == (kind in KL_WITHOUT_GRADIENT)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_the_estimates_as_losses(seed):
    logits = 2 * randn(6, seed=10 + seed)
    kl_gradient = grad(lambda z: token_kl(z, REF_LOGITS), logits)
    reversed_kl_gradient = grad(lambda z: token_kl(REF_LOGITS, z), logits)

    # k1 pulls nowhere: E[grad log pi] = 0.
    k1_gradient = gradient_of_expectation("k1", logits)
    same(k1_gradient, 0 * kl_gradient)
    # k2 pulls as the KL does.
    k2_gradient = gradient_of_expectation("k2", logits)
    same(k2_gradient, kl_gradient)
    # k3 pulls as the KL the other way round does.
    k3_gradient = gradient_of_expectation("k3", logits)
    assert differs(k3_gradient, kl_gradient)
    same(k3_gradient, reversed_kl_gradient)

    full_gradient = grad(lambda z: full_kl(z, REF_LOGITS), logits)
    same(full_gradient, kl_gradient)


def full_kl_by_a_loop(logits, ref_logits):
    """The KL of one distribution from another, number by number: [V], [V] -> a float."""
    p = [math.exp(x) for x in logits]
    q = [math.exp(x) for x in ref_logits]
    total = 0.0
    for p_v, q_v in zip(p, q):
        # A token that the policy never says adds nothing: 0 log 0 = 0.
        if p_v > 0:
            chance = p_v / sum(p)
            ref_chance = q_v / sum(q)
            total += chance * math.log(chance / ref_chance)
    return total


def test_full_kl_by_loops_and_with_impossible_tokens():
    logits = randn(2, 3, 4, seed=3)
    ref_logits = randn(2, 3, 4, seed=4)
    # One token is impossible for the policy alone, another for both.
    logits[0, 0, 1] = -math.inf
    logits[1, 2, 0] = -math.inf
    ref_logits[1, 2, 0] = -math.inf

    expected = zeros(2, 3)
    for b in range(2):
        for t in range(3):
            expected[b, t] = full_kl_by_a_loop(logits[b, t], ref_logits[b, t])
    same(full_kl(logits, ref_logits), expected)
    gradient = grad(lambda z: full_kl(z, ref_logits).sum(), logits)
    assert gradient.isfinite().all()

    # The policy may say what the reference cannot: that is infinitely far.
    ref_logits[0, 1, 2] = -math.inf
    assert full_kl(logits, ref_logits)[0, 1] == math.inf


def test_full_kl_where_probabilities_underflow():
    """A token that the reference excludes, of a probability too small for float32, adds 0.

    Its term is 0 log(0 / 0), which must not become 0 * inf = NaN.
    """
    logits = torch.tensor([[0.0, 1.0, -400.0]])
    ref_logits = torch.tensor([[0.5, 0.0, -math.inf]])
    without_it = full_kl(logits[:, :2], ref_logits[:, :2])
    same(full_kl(logits, ref_logits), without_it, 1e-6)
    gradient = grad(lambda z: full_kl(z, ref_logits).sum(), logits)
    assert gradient.isfinite().all()


# --------------------------------------------------------------------------------------- entropy

TEMPERATURE = 0.3


def entropy_sum(logits):
    """The shipped entropy, in the logits' own type, summed over rows."""
    logp = (logits / TEMPERATURE).log_softmax(-1)
    return entropy(logp, logp.exp()).sum()


def exact_entropy_sum(logits):
    """sum -p log p in float64, over the probabilities that float64 still tells from 0."""
    logp = (logits.double() / TEMPERATURE).log_softmax(-1)
    logp = logp[logp > -700]
    return -(logp.exp() * logp).sum()


def peaked_logits():
    """Logits [5, 40] in float32 of which many have a probability of 0 in that type."""
    logits = 30 * randn(5, 40, seed=9)
    logits[0, :3] = -math.inf  # masked tokens, on top
    return logits.float()


def test_entropy_where_probabilities_underflow():
    """Value and gradient in float32, against float64, where the same probabilities are not 0."""
    logits = peaked_logits()
    # The example is one: many probabilities underflow, though the log-probs are plain numbers.
    scaled = logits / TEMPERATURE
    n_finite = scaled.log_softmax(-1).isfinite().sum()
    assert (scaled.softmax(-1) == 0).sum() > 50
    assert n_finite == 5 * 40 - 3
    assert 0.1 < exact_entropy_sum(logits) < 5

    same(entropy_sum(logits).double(), exact_entropy_sum(logits), 1e-5)
    gradient = grad(entropy_sum, logits)
    exact_gradient = grad(exact_entropy_sum, logits.double())
    same(gradient.double(), exact_gradient, 1e-5)


def test_a_large_entropy_coefficient_does_not_overflow():
    """As --ent_coef 1000 would weigh it: where the probability is 0, the gradient still is."""
    logits = peaked_logits()
    large_gradient = grad(lambda z: 1e3 * entropy_sum(z), logits)
    same(large_gradient / 1e3, grad(entropy_sum, logits), 1e-5)


def test_entropy_of_a_flat_distribution_is_log_v():
    flat = torch.zeros(2, 3, 8)
    found = entropy(flat.log_softmax(-1), flat.softmax(-1))
    same(found, torch.full((2, 3), math.log(8)), 1e-6)


# --------------------------------------------- a two-step world of 9 sequences, enumerated whole

# Three tokens, two steps. A policy is 12 numbers: 3 logits of the first token, then 3 logits of the
# second token after each first one. Sequence s is (s // 3, s % 3), and every expectation over
# sequences is a sum of 9 terms.
FIRST_LOGITS = randn(3, seed=5)
SECOND_LOGITS = randn(3, 3, seed=6)
REF_FIRST = randn(3, seed=7)
REF_SECOND = randn(3, 3, seed=8)
FIRST = torch.arange(9) // 3  # [9]: the first token of each sequence
SECOND = torch.arange(9) % 3  # [9]: its second token
PARAMS = torch.cat([FIRST_LOGITS, SECOND_LOGITS.flatten()])  # [12]
REF_PARAMS = torch.cat([REF_FIRST, REF_SECOND.flatten()])  # [12]
SCORES = randn(9, seed=9)
BETA = 0.3
ALL = torch.ones(9, 2).bool()


def first_logits(params):
    return params[:3]


def second_logits(params):
    return params[3:].view(3, 3)


def sequence_logprobs(params):
    """The log-probs of both tokens of every sequence: [12] -> [9, 2]."""
    first_logp = first_logits(params).log_softmax(-1)  # [3]
    second_logp = second_logits(params).log_softmax(-1)  # [3, 3]
    return torch.stack([first_logp[FIRST], second_logp[FIRST, SECOND]], 1)


REF_LOGPROBS = sequence_logprobs(REF_PARAMS)


def sequence_chances():
    """The exact probability of each sequence under PARAMS: [9, 1], constants."""
    return sequence_logprobs(PARAMS).sum(1).exp()[:, None]


def state_kl(params):
    """The exact token KL in the two states that each sequence passes through: [12] -> [9, 2]."""
    at_start = token_kl(first_logits(params), REF_FIRST)
    after_first = token_kl(second_logits(params), REF_SECOND)  # [3]
    return torch.stack([at_start.expand(9), after_first[FIRST]], 1)


def objective(params, beta=BETA):
    """E[score] - beta KL(sequences), as a plain sum over sequences: what RLHF maximises."""
    logp = sequence_logprobs(params).sum(1)  # [9]
    ref_logp = REF_LOGPROBS.sum(1)
    return (logp.exp() * (SCORES - beta * (logp - ref_logp))).sum()


def reinforce(kl, scores=SCORES, values=None):
    """The policy gradient of the shipped pieces: [12].

    token_rewards, gae and policy_loss as train_ppo.py calls them, with every sequence in the batch
    once, weighted by its exact probability instead of being sampled.
    """
    if values is None:
        values = zeros(9, 2)
    logprobs = sequence_logprobs(PARAMS)
    rewards = token_rewards(scores, kl, ALL, BETA)
    advantages, _ = gae(rewards, values, ALL, gamma=1, lam=1)
    weighted = sequence_chances() * advantages

    def surrogate(params):
        new_logprobs = sequence_logprobs(params)
        loss, _ = policy_loss(new_logprobs, logprobs, weighted, ALL, 0.2, n_tokens=1)
        return -loss

    return grad(surrogate, PARAMS)


def sampled_kl(kind):
    """The estimate of each token of each sequence: [9, 2]."""
    return kl_estimate(sequence_logprobs(PARAMS), REF_LOGPROBS, kind)


def kl_of_later_states(params):
    """E[KL in the second state], where only the way to that state depends on the parameters."""
    second_state_kl = state_kl(PARAMS)[::3, 1]  # [3], constants
    return (first_logits(params).softmax(-1) * second_state_kl).sum()


def test_tree_only_k1_as_a_reward_gives_the_gradient_of_the_sequence_kl():
    exact = grad(objective, PARAMS)
    same(reinforce(sampled_kl("k1")), exact)
    assert differs(reinforce(sampled_kl("k2")), exact)
    assert differs(reinforce(sampled_kl("k3")), exact)


def test_tree_a_baseline_may_know_the_state_but_not_the_token():
    exact = grad(objective, PARAMS)
    # Any function of the state before the token leaves the gradient as it is.
    start_value = randn(1)[0].expand(9)
    second_value = randn(3, seed=1)[FIRST]
    values = torch.stack([start_value, second_value], 1)
    same(reinforce(sampled_kl("k1"), values=values), exact)
    # A value that has seen its token is no baseline.
    values = torch.stack([randn(3)[FIRST], randn(3, seed=1)[SECOND]], 1)
    assert differs(reinforce(sampled_kl("k1"), values=values), exact)


def test_tree_full_as_a_reward_loses_the_direct_term():
    found = reinforce(state_kl(PARAMS), scores=0 * SCORES)
    # Only where token 1 leads to matters; what a token itself adds to the KL is lost.
    later = grad(lambda z: -BETA * kl_of_later_states(z), PARAMS)
    same(found, later)
    assert later[:3].abs().max() > 1e-3
    assert not later[3:].any()

    kl_part = grad(lambda z: objective(z) - objective(z, 0.0), PARAMS)
    assert differs(later, kl_part)


def test_tree_k2_as_a_loss_is_full_as_a_loss_without_later_states():
    chances = sequence_chances()

    def token_kl_loss(z):
        return (chances * state_kl(z)).sum()

    def estimate_loss(z, kind):
        return (chances * kl_estimate(sequence_logprobs(z), REF_LOGPROBS, kind)).sum()

    def full_loss(z):
        at_start = full_kl(first_logits(z), REF_FIRST).expand(9)
        after_first = full_kl(second_logits(z), REF_SECOND)[FIRST]
        return (chances * torch.stack([at_start, after_first], 1)).sum()

    token_level = grad(token_kl_loss, PARAMS)
    same(grad(lambda z: estimate_loss(z, "k2"), PARAMS), token_level)
    assert differs(grad(lambda z: estimate_loss(z, "k3"), PARAMS), token_level)
    same(grad(full_loss, PARAMS), token_level)

    # The KL of whole sequences has one more term: which states the policy goes to.
    later = grad(kl_of_later_states, PARAMS)
    sequence_kl = grad(lambda z: objective(z, 0.0) - objective(z, 1.0), PARAMS)
    same(token_level + later, sequence_kl)
    assert differs(later, 0 * later)


# --------------------------------------------------------------------------------------- rewards


def last_tokens_by_a_loop():
    """The position of the last response token of each row."""
    last = {}
    for b, t in TOKENS:  # in ascending order of t
        last[b] = t
    return [last[b] for b in range(5)]


def test_token_rewards_by_loops():
    scores = randn(5)
    kl = randn(5, 5, seed=1)
    expected = zeros(5, 5)
    for b, t in TOKENS:
        expected[b, t] = -0.2 * kl[b, t]
    for b, t in enumerate(last_tokens_by_a_loop()):
        expected[b, t] += scores[b]
    same(token_rewards(scores, kl, MASK, 0.2), expected)


def test_last_token_by_a_loop():
    assert last_token(MASK).tolist() == last_tokens_by_a_loop()


def test_a_response_without_tokens_has_no_place_for_its_score():
    mask = MASK.clone()
    mask[3] = False
    with pytest.raises(ValueError):
        token_rewards(randn(5), randn(5, 5, seed=1), mask, 0.2)


PENALTY = {"missing_eos_penalty": 0.5}
REQUIRED = {"eos_required": True}
LENGTH = {"length_penalty": 0.25}
RULES = {
    "no rule": ({}, [1.0, 2.0, -3.0]),
    "penalty": (PENALTY, [1.0, 1.5, -3.5]),
    "penalty, EOS required": (PENALTY | REQUIRED, [1.0, -0.5, -0.5]),
    "EOS required": (REQUIRED, [1.0, 0.0, 0.0]),
    "length": (LENGTH, [0.0, 0.0, -3.25]),
    "all": (PENALTY | REQUIRED | LENGTH, [0.0, -2.5, -0.75]),
}


@pytest.mark.parametrize("options, expected", RULES.values(), ids=RULES.keys())
def test_shape_scores_by_hand(options, expected):
    scores = torch.tensor([1.0, 2.0, -3.0])
    lengths = torch.tensor([4, 8, 1])
    finished = torch.tensor([True, False, False])
    same(shape_scores(scores, lengths, finished, **options), expected)


BATCHES = [3 + 2 * randn(4, seed=1), 50 + randn(1, seed=2), -5 * randn(7, seed=3)]


def test_score_scaler_none_leaves_scores_as_they_are():
    scaler = ScoreScaler("none")
    for batch in BATCHES:
        same(scaler(batch), batch)


def test_score_scaler_running_divides_by_the_std_of_all_so_far():
    scaler = ScoreScaler("running")
    for i, batch in enumerate(BATCHES):
        so_far = np.concatenate(BATCHES[: i + 1])
        std = np.std(so_far, ddof=1)
        same(scaler(batch), batch / std)  # no centring


def test_score_scaler_first_divides_by_the_std_of_the_first_batch():
    scaler = ScoreScaler("first")
    std = np.std(BATCHES[0].numpy(), ddof=1)
    for batch in BATCHES:
        same(scaler(batch), batch / std)  # no centring


def test_score_scaler_adds_up_float32_scores_in_float64():
    scaler = ScoreScaler("running")
    batches = [(7000 + batch).float() for batch in BATCHES]
    for batch in batches:
        scaler(batch)
    numbers = np.concatenate(batches).astype(np.float64)
    n, mean, squares = scaler.moments
    assert (n, mean) == (12, pytest.approx(numbers.mean(), rel=1e-13))
    assert squares == pytest.approx(12 * numbers.var(), rel=1e-9)


@pytest.mark.parametrize("kind", ["first", "running"])
def test_score_scaler_leaves_scores_without_spread_as_they_are(kind):
    scaler = ScoreScaler(kind)
    one = torch.tensor([3.0])
    equal = torch.tensor([3.0, 3.0, 3.0])
    same(scaler(one), one)
    same(scaler(equal), equal)
    # Then there is some. All so far are 3, 3, 3, 3, 1, 5: the squared deviations are 8 in all.
    batch = torch.tensor([1.0, 5.0])
    same(scaler(batch), batch / (8 / 5) ** 0.5, 1e-6)


def test_score_scaler_knows_its_kinds():
    with pytest.raises(ValueError):
        ScoreScaler("centred")


# The coefficient 0.1 times 1 + clip(kl / 6 - 1, -0.2, 0.2) * n / 10,000.
MOVES = {
    "10% above": (6.6, 256, 0.1 * (1 + 0.1 * 0.0256)),
    "10% below": (5.4, 256, 0.1 * (1 - 0.1 * 0.0256)),
    "at the target": (6.0, 256, 0.1),
    "far above, clipped": (60.0, 256, 0.1 * (1 + 0.2 * 0.0256)),
    "above, twice the sequences": (7.3, 512, 0.1 * (1 + 0.2 * 0.0512)),
    "zero, clipped": (0.0, 256, 0.1 * (1 - 0.2 * 0.0256)),
    "negative, clipped": (-3.0, 256, 0.1 * (1 - 0.2 * 0.0256)),
}


@pytest.mark.parametrize("kl, n, expected", MOVES.values(), ids=MOVES.keys())
def test_adaptive_kl_by_hand(kl, n, expected):
    controller = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    assert controller.update(kl, n) == pytest.approx(expected, rel=1e-12)
    assert controller.coef == pytest.approx(expected, rel=1e-12)
    # A second update multiplies by the same factor again.
    twice = expected**2 / 0.1
    assert controller.update(kl, n) == pytest.approx(twice, rel=1e-12)


@pytest.mark.parametrize("target, horizon", [(0.0, 100), (-6.0, 100), (6.0, 0), (6.0, -1)])
def test_adaptive_kl_needs_a_positive_target_and_horizon(target, horizon):
    with pytest.raises(ValueError):
        AdaptiveKL(0.1, target, horizon)


# ------------------------------------------------------------------------------------ advantages


def gae_as_a_double_sum(rewards, values, gamma, lam, value_after):
    """A_t = sum_l (gamma lam)^l delta_{t+l} (Schulman et al. 2016, eq. 16) for one response.

    Lists of floats, one a token, without padding; value_after is V after the last token.
    """
    n = len(rewards)
    values = [*values, value_after]
    deltas = []
    for t in range(n):
        deltas.append(rewards[t] + gamma * values[t + 1] - values[t])
    advantages = []
    for t in range(n):
        total = 0.0
        for l in range(n - t):
            total += (gamma * lam) ** l * deltas[t + l]
        advantages.append(total)
    return advantages


def values_after(bootstrapped):
    """The value after each response's last token: 0 where the episode has ended there."""
    if bootstrapped:
        return torch.tensor([0.7, 0.0, -1.3, 2.0, 0.4]).double()
    return zeros(5)


@pytest.mark.parametrize("bootstrapped", [False, True])
@pytest.mark.parametrize("gamma, lam", [(1, 1), (1, 0.95), (0.9, 0.8), (1, 0)])
def test_gae_is_the_double_sum(gamma, lam, bootstrapped):
    rewards = randn(5, 5, seed=1)
    values = randn(5, 5, seed=2)
    after = values_after(bootstrapped)
    expected = zeros(5, 5)
    for b in range(5):
        real = MASK[b]
        row_rewards = rewards[b, real].tolist()
        row_values = values[b, real].tolist()
        row = gae_as_a_double_sum(row_rewards, row_values, gamma, lam, after[b].item())
        expected[b, real] = torch.tensor(row, dtype=torch.float64)

    bootstrap = after if bootstrapped else None
    values.requires_grad_()
    advantages, returns = gae(rewards, values, MASK, gamma, lam, bootstrap)
    same(advantages, expected)
    same(returns, (expected + values.detach()).masked_fill(~MASK, 0))
    assert not advantages[~MASK].any()
    # They are constants of the loss.
    assert not advantages.requires_grad
    assert not returns.requires_grad


@pytest.mark.parametrize("bootstrapped", [False, True])
def test_gae_of_gamma_and_lambda_one_returns_the_reward_to_go(bootstrapped):
    """The double sum telescopes: every value but the one after the last token cancels."""
    rewards = randn(5, 5, seed=1)
    values = randn(5, 5, seed=2)
    after = values_after(bootstrapped)
    _, returns = gae(rewards, values, MASK, 1, 1, after)
    for b in range(5):
        real = MASK[b]
        reward_to_go = rewards[b, real].flip(0).cumsum(0).flip(0) + after[b]
        same(returns[b, real], reward_to_go)


def test_gae_of_responses_of_one_token():
    rewards = torch.tensor([[1.0], [2.0]])
    values = torch.tensor([[0.5], [-1.0]])
    advantages, returns = gae(rewards, values, torch.ones(2, 1).bool(), 0.9, 0.8)
    same(advantages, [[0.5], [3.0]])
    same(returns, rewards)


PADDINGS = {
    "right": [0, 1, 2],
    "left": [3, 4, 5],
    "holes": [0, 3, 5],
    "both sides": [1, 2, 3],
}


@pytest.mark.parametrize("where", PADDINGS.values(), ids=PADDINGS.keys())
def test_gae_does_not_depend_on_padding(where):
    packed_rewards = randn(2, 3, seed=1)
    packed_values = randn(2, 3, seed=2)
    bootstrap = torch.tensor([0.0, 0.5]).double()
    packed = gae(packed_rewards, packed_values, torch.ones(2, 3).bool(), 0.9, 0.8, bootstrap)

    # The same numbers at the places `where` of longer rows, which hold nonsense elsewhere.
    rewards = 99 + randn(2, 6)
    values = 99 + randn(2, 6)
    mask = torch.zeros(2, 6).bool()
    rewards[:, where] = packed_rewards
    values[:, where] = packed_values
    mask[:, where] = True
    padded = gae(rewards, values, mask, 0.9, 0.8, bootstrap)

    for found, expected in zip(padded, packed):  # advantages, then returns
        same(found[:, where], expected, 0)
        assert not found[~mask].any()


def test_masked_moments_are_those_of_the_tokens():
    x = 7 + 3 * randn(5, 5)
    numbers = pick_tokens(x)
    mean, var = masked_moments(x, MASK)
    same(torch.stack([mean, var]), [numbers.mean(), numbers.var()])  # ddof 0


def test_masked_moments_of_float32_are_computed_in_float64():
    x = (700 + 3 * randn(5, 5)).float()
    numbers = pick_tokens(x)  # float64
    mean, var = masked_moments(x, MASK)
    assert mean.item() == pytest.approx(numbers.mean(), rel=1e-14)
    assert var.item() == pytest.approx(numbers.var(), rel=1e-12)


def test_moments_of_no_token():
    with pytest.raises(ValueError):
        masked_moments(randn(5, 5), MASK & False)


def test_whitened_tokens_have_mean_0_and_variance_1():
    x = 7 + 3 * randn(5, 5)
    numbers = pick_tokens(x)
    white = whiten(x, MASK)
    same(white[MASK], (numbers - numbers.mean()) / np.sqrt(numbers.var() + 1e-8))
    same(torch.stack(masked_moments(white, MASK)), [0.0, 1.0], 1e-8)
    assert not white[~MASK].any()
    assert whiten(x.float(), MASK).dtype == torch.float32


def test_parts_are_whitened_by_the_moments_of_the_whole():
    x = 7 + 3 * randn(5, 5)
    white = whiten(x, MASK)
    moments = masked_moments(x, MASK)
    first = whiten(x[:2], MASK[:2], moments)
    second = whiten(x[2:5], MASK[2:5], moments)
    same(torch.cat([first, second]), white)
    # By its own moments a part would come out otherwise.
    assert differs(whiten(x[:2], MASK[:2]), white[:2])


def test_explained_variance():
    returns = 2 * randn(5, 5)
    values = returns + 0.5 * randn(5, 5, seed=1)
    r = pick_tokens(returns)
    v = pick_tokens(values)
    expected = 1 - np.var(r - v) / np.var(r)
    assert explained_variance(values, returns, MASK) == pytest.approx(expected, rel=1e-12)

    assert explained_variance(returns, returns, MASK) == 1
    constant = torch.full_like(returns, 3.0)
    assert explained_variance(constant, returns, MASK) == pytest.approx(0, abs=1e-12)
    assert explained_variance(-returns, returns, MASK) == pytest.approx(-3)
    # Returns that are all the same leave nothing to explain.
    assert explained_variance(constant, constant, MASK) == 1


# ---------------------------------------------------------------------------------------- losses

OLD_LOGPROBS = randn(5, 5, seed=1) - 3
# The clip range 0.2 lets ratios move from 0.8 to 1.2: below, inside and above it.
RATIO = torch.tensor([[0.5, 0.9, 1.0, 1.1, 1.6]] * 5).double()
RATIO[2] = RATIO[0].flip(0)
LOGPROBS = OLD_LOGPROBS + RATIO.log()
# Rows 0, 2 and 4 are good, 1 and 3 bad; two tokens of row 0 are bad, so that both signs of the
# advantage meet all three kinds of ratio.
ADVANTAGES = randn(5, 5, seed=2).abs() * torch.tensor([1, -1, 1, -1, 1])[:, None]
ADVANTAGES[0, :2] *= -1

OLD_VALUES = randn(5, 5, seed=3)
RETURNS = randn(5, 5, seed=6)
# V - V_old; the clip range 0.5 lets it be -0.5 to 0.5.
VALUE_STEP = torch.tensor([[-0.9, -0.2, 0.05, 0.3, 0.9]] * 5)
VALUE_STEP[2] = VALUE_STEP[0].flip(0)
VALUES = OLD_VALUES + VALUE_STEP.double()


def policy_token(advantage, ratio):
    """One token's loss and slope d loss / d logp, by cases instead of a maximum.

    A token is stuck where it was pushed out of the range in the direction that its advantage asks
    for: its loss is that of the edge, and nothing pulls at it. Else d ratio / d logp = ratio.
    """
    if advantage > 0 and ratio > 1.2:
        return -advantage * 1.2, 0.0
    if advantage <= 0 and ratio < 0.8:
        return -advantage * 0.8, 0.0
    return -advantage * ratio, -advantage * ratio


def test_the_example_of_the_policy_loss_has_all_cases():
    cases = set()
    for b, t in TOKENS:
        is_good = ADVANTAGES[b, t].item() > 0
        is_above_the_low_edge = RATIO[b, t].item() > 0.8
        is_above_the_high_edge = RATIO[b, t].item() > 1.2
        cases.add((is_good, is_above_the_low_edge, is_above_the_high_edge))
    # Both signs: below, inside and above the range.
    assert len(cases) == 6


def test_policy_loss_by_loops():
    expected_loss = 0.0
    slope = zeros(5, 5)
    for b, t in TOKENS:
        token_loss, token_slope = policy_token(ADVANTAGES[b, t].item(), RATIO[b, t].item())
        expected_loss += token_loss / N
        slope[b, t] = token_slope / N

    loss, _ = policy_loss(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, MASK, 0.2)
    same(loss, expected_loss)

    def loss_of(logprobs):
        return policy_loss(logprobs, OLD_LOGPROBS, ADVANTAGES, MASK, 0.2)[0]

    same(grad(loss_of, LOGPROBS), slope)


def test_stats_of_the_policy_loss_by_loops():
    ratios = pick_tokens(RATIO).tolist()
    n_clipped = 0
    approx_kl = 0.0
    for ratio in ratios:
        if not 0.8 <= ratio <= 1.2:
            n_clipped += 1
        approx_kl += (ratio - 1 - math.log(ratio)) / N
    expected = {
        "ratio_mean": sum(ratios) / N,
        "ratio_max": max(ratios),
        "clip_fraction": n_clipped / N,
        "approx_kl": approx_kl,
    }

    logprobs = LOGPROBS.clone().requires_grad_()
    _, stats = policy_loss(logprobs, OLD_LOGPROBS, ADVANTAGES, MASK, 0.2)
    assert stats.keys() == expected.keys()
    for name in expected:
        assert stats[name].item() == pytest.approx(expected[name], rel=1e-6), name
        assert not stats[name].requires_grad


def test_ratio_is_exactly_one_for_equal_logprobs():
    old_logprobs = OLD_LOGPROBS.float()
    loss, stats = policy_loss(old_logprobs, old_logprobs, ADVANTAGES.float(), MASK, 0.2)
    assert stats == {"ratio_mean": 1, "ratio_max": 1, "clip_fraction": 0, "approx_kl": 0}
    same(loss, -ADVANTAGES[MASK].mean(), 1e-6)
    # A ratio on the edge of the range is not outside it.
    _, stats = policy_loss(old_logprobs, old_logprobs, ADVANTAGES.float(), MASK, 0.0)
    assert stats["clip_fraction"] == 0


def test_the_largest_ratio_is_not_that_of_padding():
    """Every token became less likely by a factor e; a masked position would say 1."""
    _, stats = policy_loss(OLD_LOGPROBS - 1, OLD_LOGPROBS, ADVANTAGES, MASK, 0.2)
    assert stats["ratio_max"].item() == pytest.approx(math.exp(-1))


def value_token(value, old_value, target):
    """One token's loss, slope d loss / d value, and case, without a maximum.

    A value is stuck where it has moved by more than the range and towards its target: the clipped
    value is then the one further from the target, its error counts, and nothing pulls at it.
    """
    held = min(max(value, old_value - 0.5), old_value + 0.5)
    is_inside = held == value
    is_stuck = not is_inside and (held - target) ** 2 > (value - target) ** 2
    case = (is_inside, is_stuck, value > old_value)
    if is_stuck:
        return 0.5 * (held - target) ** 2, 0.0, case
    return 0.5 * (value - target) ** 2, value - target, case


def test_value_loss_by_loops():
    expected_loss = 0.0
    slope = zeros(5, 5)
    cases = set()
    for b, t in TOKENS:
        value = VALUES[b, t].item()
        old_value = OLD_VALUES[b, t].item()
        token_loss, token_slope, case = value_token(value, old_value, RETURNS[b, t].item())
        expected_loss += token_loss / N
        slope[b, t] = token_slope / N
        cases.add(case)
    # Up and down: inside the range, outside and stuck, outside and not.
    assert len(cases) == 6

    def loss_of(values):
        return value_loss(values, OLD_VALUES, RETURNS, MASK, 0.5)

    same(loss_of(VALUES), expected_loss)
    same(grad(loss_of, VALUES), slope)


PARTS = {"two": [[0, 1], [2, 3, 4]], "single rows": [[0], [1], [2], [3], [4]]}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_policy_losses_of_parts_add_up_to_the_whole(parts):
    losses = []
    stats_of_parts = []
    for p in parts:
        loss, stats = policy_loss(LOGPROBS[p], OLD_LOGPROBS[p], ADVANTAGES[p], MASK[p], 0.2, N)
        losses.append(loss)
        stats_of_parts.append(stats)

    loss, stats = policy_loss(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, MASK, 0.2)
    same(sum(losses), loss)
    largest = max(part.pop("ratio_max") for part in stats_of_parts)
    same(largest, stats.pop("ratio_max"), 1e-6)
    for name in stats:
        total = sum(part[name] for part in stats_of_parts)
        same(total, stats[name], 1e-6)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_value_losses_of_parts_add_up_to_the_whole(parts):
    total = 0.0
    for p in parts:
        total += value_loss(VALUES[p], OLD_VALUES[p], RETURNS[p], MASK[p], 0.5, N)
    same(total, value_loss(VALUES, OLD_VALUES, RETURNS, MASK, 0.5))


# ------------------------------------------------------ what masked positions hold does not matter


def call_token_rewards(kl):
    return token_rewards(SCORES[:5], kl, MASK, 0.2)


def call_gae(rewards, values):
    return gae(rewards, values, MASK, 0.9, 0.8)


def call_masked_moments(x):
    return masked_moments(x, MASK)


def call_whiten(x):
    return whiten(x, MASK)


def call_explained_variance(values, returns):
    return torch.tensor(explained_variance(values, returns, MASK))


def call_policy_loss(logprobs, old_logprobs, advantages):
    loss, stats = policy_loss(logprobs, old_logprobs, advantages, MASK, 0.2)
    return [*stats.values(), loss]


def call_policy_gradient(logprobs, old_logprobs, advantages):
    return grad(lambda x: policy_loss(x, old_logprobs, advantages, MASK, 0.2)[0], logprobs)


def call_value_loss(values, old_values, returns):
    return value_loss(values, old_values, returns, MASK, 0.5)


def call_value_gradient(values, old_values, returns):
    return grad(lambda x: value_loss(x, old_values, returns, MASK, 0.5), values)


POLICY_ARGUMENTS = (LOGPROBS, OLD_LOGPROBS, ADVANTAGES)
VALUE_ARGUMENTS = (VALUES, OLD_VALUES, RETURNS)
# A call, and the tensors [B, R] that it is made with.
CALLS = [
    (call_token_rewards, (LOGPROBS,)),
    (call_gae, (LOGPROBS, VALUES)),
    (call_masked_moments, (LOGPROBS,)),
    (call_whiten, (LOGPROBS,)),
    (call_explained_variance, (VALUES, RETURNS)),
    (call_policy_loss, POLICY_ARGUMENTS),
    (call_policy_gradient, POLICY_ARGUMENTS),
    (call_value_loss, VALUE_ARGUMENTS),
    (call_value_gradient, VALUE_ARGUMENTS),
]
# One case for each tensor of each call.
LEAKS = {}
for call, arguments in CALLS:
    for which in range(len(arguments)):
        LEAKS[f"{call.__name__}-{which}"] = (call, arguments, which)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call, arguments, which", LEAKS.values(), ids=LEAKS.keys())
def test_masked_garbage_does_not_leak(call, arguments, which, garbage):
    arguments = [x.masked_fill(~MASK, 0) for x in arguments]
    clean = call(*arguments)
    arguments[which] = arguments[which].masked_fill(~MASK, garbage)
    torch.testing.assert_close(call(*arguments), clean, rtol=0, atol=0)

"""nanorlhf.ppo against independent derivations in float64: loops, closed forms, enumeration of a tiny world, autograd.

    B sequences, R response tokens, V vocabulary
"""

import math

import numpy as np
import pytest
import torch

from nanorlhf.ppo import (
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

# Rows: full, right-padded, holes, left-padded, a single token.
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]).bool()  # [B, R]
TOKENS = [(b, t) for b in range(5) for t in range(5) if MASK[b, t]]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a, b, tol=1e-12):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tol, atol=tol)


def differs(a, b):
    return (a - b).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------------- KL, token by token


def token_kl(logits, ref_logits):  # sum_v pi(v) log(pi(v) / ref(v)), from probabilities
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    return (p * (p / q).log()).sum(-1)


def grad(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


LOGITS, REF_LOGITS = randn(6, seed=1), randn(6, seed=2)


def expected_estimate(kind, logits, ref_logits=REF_LOGITS):
    """E_pi of the estimate by enumeration; the samples' weights are constants, as they are to a sampled loss."""
    logp = logits.log_softmax(-1)
    return (logp.exp().detach() * kl_estimate(logp[None], ref_logits.log_softmax(-1)[None], kind)[0]).sum()


def test_kl_estimate_by_hand_and_in_expectation():
    logp, ref = torch.tensor([[-1.0, -2.0]]).double(), torch.tensor([[-3.0, -1.5]]).double()  # x = -2, 0.5
    same(kl_estimate(logp, ref, "k1"), [[2.0, -0.5]])
    same(kl_estimate(logp, ref, "k2"), [[2.0, 0.125]])
    same(kl_estimate(logp, ref, "k3"), [[math.exp(-2) - 1 + 2, math.exp(0.5) - 1.5]])
    with pytest.raises(ValueError):
        kl_estimate(logp, ref, "full")
    exact = token_kl(LOGITS, REF_LOGITS)
    same(expected_estimate("k1", LOGITS), exact)
    same(expected_estimate("k3", LOGITS), exact)
    assert differs(expected_estimate("k2", LOGITS), exact)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_the_estimates_as_losses(seed):
    logits = 2 * randn(6, seed=10 + seed)
    exact = grad(lambda z: token_kl(z, REF_LOGITS), logits)
    same(grad(lambda z: expected_estimate("k2", z), logits), exact)
    same(grad(lambda z: expected_estimate("k1", z), logits), 0 * exact)  # E[grad log pi] = 0
    k3 = grad(lambda z: expected_estimate("k3", z), logits)
    assert differs(k3, exact)
    same(k3, grad(lambda z: token_kl(REF_LOGITS, z), logits))  # it is that of the KL the other way round
    same(grad(lambda z: full_kl(z, REF_LOGITS), logits), exact)


def test_full_kl_by_loops_and_with_impossible_tokens():
    a, b = randn(2, 3, 4, seed=3), randn(2, 3, 4, seed=4)
    a[0, 0, 1] = a[1, 2, 0] = b[1, 2, 0] = -math.inf  # impossible for the policy; for both
    expected = torch.zeros(2, 3).double()
    for i in range(2):
        for j in range(3):
            p, q = [math.exp(x) for x in a[i, j]], [math.exp(x) for x in b[i, j]]
            expected[i, j] = sum(x / sum(p) * math.log(x / sum(p) / (y / sum(q))) for x, y in zip(p, q) if x > 0)
    same(full_kl(a, b), expected)
    assert grad(lambda z: full_kl(z, b).sum(), a).isfinite().all()
    b[0, 1, 2] = -math.inf  # the policy may say what the reference cannot
    assert full_kl(a, b)[0, 1] == math.inf


def test_entropy_where_probabilities_underflow():
    """Value and gradient at a low temperature in float32, against float64, in which the same probabilities are not 0 yet."""
    logits = 30 * randn(5, 40, seed=9)
    logits[0, :3] = -math.inf  # masked tokens, on top
    temperature = 0.3

    def summed(z):
        logp = (z / temperature).log_softmax(-1)
        return entropy(logp, logp.exp()).sum()

    def exact(z):  # sum p log 1/p over what float64 still holds
        logp = (z.double() / temperature).log_softmax(-1)
        held = logp > -700
        return -(logp.exp()[held] * logp[held]).sum()

    small = logits.float()
    probs = (small / temperature).softmax(-1)
    assert (probs == 0).sum() > 50 and ((small / temperature).log_softmax(-1).isfinite()).sum() == 5 * 40 - 3
    assert 0.1 < exact(logits) < 5
    same(summed(small).double(), exact(small), 1e-5)
    same(grad(summed, small).double(), grad(exact, small.double()), 1e-5)
    flat = torch.zeros(2, 8)
    same(entropy(flat.log_softmax(-1), flat.softmax(-1)), [math.log(8)] * 2, 1e-6)
    large = grad(lambda z: 1e3 * summed(z), small)  # a large --ent_coef does not overflow where the probability is 0
    same(large / 1e3, grad(summed, small), 1e-5)


def test_full_kl_where_probabilities_underflow():
    """A token that the reference excludes and whose probability is too small for float32 adds 0, not 0 * inf = NaN."""
    logits = torch.tensor([[0.0, 1.0, -400.0]])
    ref_logits = torch.tensor([[0.5, 0.0, -math.inf]])
    same(full_kl(logits, ref_logits), full_kl(logits[:, :2], ref_logits[:, :2]), 1e-6)
    assert grad(lambda z: full_kl(z, ref_logits).sum(), logits).isfinite().all()


# ------------------------------------------------------------- a two-step world of 9 sequences, where all expectations are sums

STEP1, STEP2, REF1, REF2 = randn(3, seed=5), randn(3, 3, seed=6), randn(3, seed=7), randn(3, 3, seed=8)
FIRST, SECOND = torch.arange(9) // 3, torch.arange(9) % 3  # sequence s is (s // 3, s % 3)
PARAMS = torch.cat([STEP1, STEP2.flatten()])  # [12]


def sequence_logprobs(params):  # [12] -> [9, 2]
    return torch.stack([params[:3].log_softmax(-1)[FIRST], params[3:].view(3, 3).log_softmax(-1)[FIRST, SECOND]], 1)


REF_LOGPROBS = sequence_logprobs(torch.cat([REF1, REF2.flatten()]))
SCORES, BETA, ALL = randn(9, seed=9), 0.3, torch.ones(9, 2).bool()


def state_kl(params):  # exact token KL in the states each sequence passes through: [12] -> [9, 2]
    second = torch.stack([token_kl(z, r) for z, r in zip(params[3:].view(3, 3), REF2)])
    return torch.stack([token_kl(params[:3], REF1).expand(9), second[FIRST]], 1)


def reinforce(kl, scores=SCORES, values=torch.zeros(9, 2).double()):
    """The policy gradient of the shipped pieces, every sequence weighted by its exact probability: [12]."""
    logprobs = sequence_logprobs(PARAMS)
    rewards = token_rewards(scores, kl, ALL, BETA)
    advantages, _ = gae(rewards, values, ALL, gamma=1, lam=1)
    weights = logprobs.sum(1).exp()[:, None]  # [9, 1]
    return grad(lambda z: -policy_loss(sequence_logprobs(z), logprobs, weights * advantages, ALL, 0.2, n_tokens=1)[0], PARAMS)


def objective(params, beta=BETA):  # E[score] - beta KL(sequences), directly
    logp = sequence_logprobs(params).sum(1)
    return (logp.exp() * (SCORES - beta * (logp - REF_LOGPROBS.sum(1)))).sum()


def tree_kl(kind):
    return kl_estimate(sequence_logprobs(PARAMS), REF_LOGPROBS, kind)


def test_tree_only_k1_as_a_reward_gives_the_gradient_of_the_sequence_kl():
    exact = grad(objective, PARAMS)
    same(reinforce(tree_kl("k1")), exact)
    assert differs(reinforce(tree_kl("k2")), exact) and differs(reinforce(tree_kl("k3")), exact)
    values = torch.stack([randn(1)[0].expand(9), randn(3, seed=1)[FIRST]], 1)  # any function of the state before the token
    same(reinforce(tree_kl("k1"), values=values), exact)
    values = torch.stack([randn(3)[FIRST], randn(3, seed=1)[SECOND]], 1)  # a value that has seen its token is no baseline
    assert differs(reinforce(tree_kl("k1"), values=values), exact)


def test_tree_full_as_a_reward_loses_the_direct_term():
    kl = state_kl(PARAMS)
    later = grad(lambda z: -BETA * (z[:3].softmax(-1) * kl[::3, 1]).sum(), PARAMS)  # only where token 1 leads matters
    same(reinforce(kl, scores=0 * SCORES), later)
    assert later[:3].abs().max() > 1e-3 and not later[3:].any()
    assert differs(later, grad(lambda z: objective(z) - objective(z, 0.0), PARAMS))


def test_tree_k2_as_a_loss_is_full_as_a_loss_without_later_states():
    weights = sequence_logprobs(PARAMS).sum(1).exp()[:, None]  # [9, 1], constants
    token_level = grad(lambda z: (weights * state_kl(z)).sum(), PARAMS)
    same(grad(lambda z: (weights * kl_estimate(sequence_logprobs(z), REF_LOGPROBS, "k2")).sum(), PARAMS), token_level)
    assert differs(grad(lambda z: (weights * kl_estimate(sequence_logprobs(z), REF_LOGPROBS, "k3")).sum(), PARAMS), token_level)

    def full(z):
        first = full_kl(z[:3], REF1).expand(9)
        return (weights * torch.stack([first, full_kl(z[3:].view(3, 3), REF2)[FIRST]], 1)).sum()

    same(grad(full, PARAMS), token_level)
    later = grad(lambda z: (z[:3].softmax(-1) * state_kl(PARAMS)[::3, 1]).sum(), PARAMS)
    same(token_level + later, grad(lambda z: objective(z, 0.0) - objective(z, 1.0), PARAMS))
    assert differs(later, 0 * later)


# ------------------------------------------------------------------------------------------------------------------ rewards


def test_token_rewards_by_loops():
    scores, kl = randn(5), randn(5, 5, seed=1)
    expected = torch.zeros(5, 5).double()
    for b, t in TOKENS:
        expected[b, t] = -0.2 * kl[b, t]
    last = [max(t for c, t in TOKENS if c == b) for b in range(5)]
    for b in range(5):
        expected[b, last[b]] += scores[b]
    same(token_rewards(scores, kl, MASK, 0.2), expected)
    assert last_token(MASK).tolist() == last
    empty = MASK.clone()
    empty[3] = False
    with pytest.raises(ValueError):
        token_rewards(scores, kl, empty, 0.2)


@pytest.mark.parametrize("options, expected", [
    ({}, [1.0, 2.0, -3.0]),
    ({"missing_eos_penalty": 0.5}, [1.0, 1.5, -3.5]),
    ({"missing_eos_penalty": 0.5, "eos_required": True}, [1.0, -0.5, -0.5]),
    ({"eos_required": True}, [1.0, 0.0, 0.0]),
    ({"length_penalty": 0.25}, [0.0, 0.0, -3.25]),
    ({"missing_eos_penalty": 0.5, "eos_required": True, "length_penalty": 0.25}, [0.0, -2.5, -0.75]),
])
def test_shape_scores_by_hand(options, expected):
    scores, lengths, finished = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([4, 8, 1]), torch.tensor([True, False, False])
    same(shape_scores(scores, lengths, finished, **options), expected)


def test_score_scaler():
    batches = [3 + 2 * randn(4, seed=1), 50 + randn(1, seed=2), -5 * randn(7, seed=3)]
    for kind in ("none", "running", "first"):
        scaler = ScoreScaler(kind)
        for i, batch in enumerate(batches):
            seen = np.concatenate(batches[:i + 1] if kind == "running" else batches[:1])
            same(scaler(batch), batch / (1 if kind == "none" else np.std(seen, ddof=1)))  # no centring
    with pytest.raises(ValueError):
        ScoreScaler("centred")


@pytest.mark.parametrize("kl, n, expected", [
    (6.6, 256, 0.1 * (1 + 0.1 * 0.0256)), (5.4, 256, 0.1 * (1 - 0.1 * 0.0256)), (6.0, 256, 0.1),
    (60.0, 256, 0.1 * (1 + 0.2 * 0.0256)), (7.3, 512, 0.1 * (1 + 0.2 * 0.0512)),  # clipped above
    (0.0, 256, 0.1 * (1 - 0.2 * 0.0256)), (-3.0, 256, 0.1 * (1 - 0.2 * 0.0256)),  # clipped below
])
def test_adaptive_kl(kl, n, expected):
    controller = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    assert controller.update(kl, n) == pytest.approx(expected, rel=1e-12)
    assert controller.coef == pytest.approx(expected, rel=1e-12)
    assert controller.update(kl, n) == pytest.approx(expected**2 / 0.1, rel=1e-12)  # the factors multiply
    for target, horizon in [(0.0, 100), (-6.0, 100), (6.0, 0), (6.0, -1)]:
        with pytest.raises(ValueError):
            AdaptiveKL(0.1, target, horizon)


# --------------------------------------------------------------------------------------------------------------- advantages


def double_sum(r, v, gamma, lam, after):
    """A_t = sum_l (gamma lam)^l delta_{t+l} for one unpadded response: lists and floats."""
    v = [*v, after]
    delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
    return [sum((gamma * lam) ** l * delta[t + l] for l in range(len(r) - t)) for t in range(len(r))]


@pytest.mark.parametrize("bootstrapped", [False, True])
@pytest.mark.parametrize("gamma, lam", [(1, 1), (1, 0.95), (0.9, 0.8), (1, 0)])
def test_gae_is_the_double_sum(gamma, lam, bootstrapped):
    rewards, values = randn(5, 5, seed=1), randn(5, 5, seed=2).requires_grad_()
    bootstrap = torch.tensor([0.7, 0.0, -1.3, 2.0, 0.4]).double() if bootstrapped else None
    expected = torch.zeros(5, 5).double()
    for b in range(5):
        m = MASK[b]
        after = bootstrap[b].item() if bootstrapped else 0.0
        row = double_sum(rewards[b, m].tolist(), values[b, m].tolist(), gamma, lam, after)
        expected[b, m] = torch.tensor(row, dtype=torch.float64)
        if (gamma, lam) == (1, 1):  # telescopes to the reward to go
            same((expected + values)[b, m].detach(), rewards[b, m].flip(0).cumsum(0).flip(0) + after)
    advantages, returns = gae(rewards, values, MASK, gamma, lam, bootstrap)
    same(advantages, expected)
    same(returns, (expected + values.detach()).masked_fill(~MASK, 0))
    assert not advantages.requires_grad and not returns.requires_grad and not advantages[~MASK].any()


@pytest.mark.parametrize("where", [[0, 1, 2], [3, 4, 5], [0, 3, 5], [1, 2, 3]])
def test_gae_does_not_depend_on_padding(where):
    r, v, boot = randn(2, 3, seed=1), randn(2, 3, seed=2), torch.tensor([0.0, 0.5]).double()
    rewards, values, mask = 99 + randn(2, 6), 99 + randn(2, 6), torch.zeros(2, 6).bool()
    rewards[:, where], values[:, where], mask[:, where] = r, v, True
    packed = gae(r, v, torch.ones(2, 3).bool(), 0.9, 0.8, boot)
    for a, b in zip(gae(rewards, values, mask, 0.9, 0.8, boot), packed):
        same(a[:, where], b, 0)
        assert not a[~mask].any()


def test_moments_and_whitening():
    x = 7 + 3 * randn(5, 5)
    kept = np.array([x[b, t].item() for b, t in TOKENS])
    mean, var = masked_moments(x, MASK)
    same(torch.stack([mean, var]), [kept.mean(), kept.var()])  # ddof 0
    white = whiten(x, MASK)
    same(white[MASK], (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8))
    same(torch.stack(masked_moments(white, MASK)), [0.0, 1.0], 1e-8)
    assert not white[~MASK].any() and whiten(x.float(), MASK).dtype == torch.float32
    parts = [whiten(x[rows], MASK[rows], (mean, var)) for rows in (slice(0, 2), slice(2, 5))]
    same(torch.cat(parts), white)
    assert differs(whiten(x[:2], MASK[:2]), white[:2])
    with pytest.raises(ValueError):
        masked_moments(x, MASK & False)


def test_explained_variance():
    returns, noise = 2 * randn(5, 5), 0.5 * randn(5, 5, seed=1)
    r, v = [np.array([x[b, t].item() for b, t in TOKENS]) for x in (returns, returns + noise)]
    assert explained_variance(returns + noise, returns, MASK) == pytest.approx(1 - np.var(r - v) / np.var(r), rel=1e-12)
    assert explained_variance(returns, returns, MASK) == 1
    assert explained_variance(torch.full_like(returns, 3.0), returns, MASK) == pytest.approx(0, abs=1e-12)
    assert explained_variance(-returns, returns, MASK) == pytest.approx(-3)


# ------------------------------------------------------------------------------------------------------------------- losses

OLD = randn(5, 5, seed=1) - 3
RATIO = torch.tensor([[0.5, 0.9, 1.0, 1.1, 1.6]] * 5).double()  # below, inside, above the range 0.8 ... 1.2
RATIO[2] = RATIO[0].flip(0)
NEW = OLD + RATIO.log()
ADVANTAGES = randn(5, 5, seed=2).abs() * torch.tensor([1, -1, 1, -1, 1])[:, None]  # rows 0, 2, 4 good, 1, 3 bad
ADVANTAGES[0, :2] *= -1  # and both signs on both sides
N = len(TOKENS)


def test_policy_loss_by_loops():
    loss, slope, clipped, approx_kl = 0.0, torch.zeros(5, 5).double(), 0, 0.0
    cases = set()
    for b, t in TOKENS:
        a, ratio = ADVANTAGES[b, t].item(), RATIO[b, t].item()
        stuck = ratio > 1.2 if a > 0 else ratio < 0.8  # pushed further than the range in the direction the advantage asks for
        loss += -a * (max(0.8, min(1.2, ratio)) if stuck else ratio) / N
        slope[b, t] = 0.0 if stuck else -a * ratio / N  # d ratio / d logp = ratio
        clipped += not 0.8 <= ratio <= 1.2
        approx_kl += (ratio - 1 - math.log(ratio)) / N
        cases.add((a > 0, (ratio > 0.8) + (ratio > 1.2)))
    assert len(cases) == 6  # both signs, below, inside and above
    value, stats = policy_loss(NEW.clone().requires_grad_(), OLD, ADVANTAGES, MASK, 0.2)
    same(value.detach(), loss)
    same(grad(lambda x: policy_loss(x, OLD, ADVANTAGES, MASK, 0.2)[0], NEW), slope)
    ratios = [RATIO[b, t].item() for b, t in TOKENS]
    expected = {"ratio_mean": sum(ratios) / N, "ratio_max": max(ratios), "clip_fraction": clipped / N, "approx_kl": approx_kl}
    assert stats.keys() == expected.keys() and not any(x.requires_grad for x in stats.values())
    for name in expected:
        assert stats[name].item() == pytest.approx(expected[name], rel=1e-6), name


def test_ratio_is_exactly_one_for_equal_logprobs():
    loss, stats = policy_loss(OLD.float(), OLD.float(), ADVANTAGES.float(), MASK, 0.2)
    assert {k: v.item() for k, v in stats.items()} == {"ratio_mean": 1, "ratio_max": 1, "clip_fraction": 0, "approx_kl": 0}
    same(loss, -ADVANTAGES[MASK].mean(), 1e-6)
    _, stats = policy_loss(OLD - 1, OLD, ADVANTAGES, MASK, 0.2)
    assert stats["ratio_max"].item() == pytest.approx(math.exp(-1))  # not the 1 of padding


V_OLD, RETURNS = randn(5, 5, seed=3), randn(5, 5, seed=6)
STEP = torch.tensor([-0.9, -0.2, 0.05, 0.3, 0.9])[torch.tensor([[0, 1, 2, 3, 4]] * 5)].double()  # V - V_old, the range is 0.5
STEP[2] = STEP[0].flip(0)
VALUES = V_OLD + STEP


def test_value_loss_by_loops():
    loss, slope, cases = 0.0, torch.zeros(5, 5).double(), set()
    for b, t in TOKENS:
        v, old, r = VALUES[b, t].item(), V_OLD[b, t].item(), RETURNS[b, t].item()
        held = min(max(v, old - 0.5), old + 0.5)
        stuck = held != v and (held - r) ** 2 > (v - r) ** 2  # it moved towards its target by more than the range
        loss += 0.5 * ((held if stuck else v) - r) ** 2 / N
        slope[b, t] = 0.0 if stuck else (v - r) / N
        cases.add((held == v, stuck, v > old))
    assert len(cases) == 6  # up and down, inside the range, outside and held, outside and not
    same(value_loss(VALUES, V_OLD, RETURNS, MASK, 0.5), loss)
    same(grad(lambda x: value_loss(x, V_OLD, RETURNS, MASK, 0.5), VALUES), slope)


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3, 4]], [[0], [1], [2], [3], [4]]])
def test_parts_of_a_batch_add_up_to_the_whole(parts):
    losses, stats = zip(*(policy_loss(NEW[p], OLD[p], ADVANTAGES[p], MASK[p], 0.2, N) for p in parts))
    loss, whole = policy_loss(NEW, OLD, ADVANTAGES, MASK, 0.2)
    same(sum(losses), loss)
    for name in whole:
        same((max if name == "ratio_max" else sum)(s[name] for s in stats), whole[name], 1e-6)
    same(sum(value_loss(VALUES[p], V_OLD[p], RETURNS[p], MASK[p], 0.5, N) for p in parts),
         value_loss(VALUES, V_OLD, RETURNS, MASK, 0.5))


# ------------------------------------------------------------------------------ what masked positions hold does not matter

CALLS = {
    "token_rewards": (lambda kl: token_rewards(SCORES[:5], kl, MASK, 0.2), (NEW,)),
    "gae": (lambda r, v: gae(r, v, MASK, 0.9, 0.8), (NEW, VALUES)),
    "masked_moments": (lambda x: masked_moments(x, MASK), (NEW,)),
    "whiten": (lambda x: whiten(x, MASK), (NEW,)),
    "explained_variance": (lambda v, r: torch.tensor(explained_variance(v, r, MASK)), (VALUES, RETURNS)),
    "policy_loss": (lambda *a: [*policy_loss(*a, MASK, 0.2)[1].values(), policy_loss(*a, MASK, 0.2)[0]], (NEW, OLD, ADVANTAGES)),
    "policy_gradient": (lambda x, *a: grad(lambda y: policy_loss(y, *a, MASK, 0.2)[0], x), (NEW, OLD, ADVANTAGES)),
    "value_loss": (lambda *a: value_loss(*a, MASK, 0.5), (VALUES, V_OLD, RETURNS)),
    "value_gradient": (lambda x, *a: grad(lambda y: value_loss(y, *a, MASK, 0.5), x), (VALUES, V_OLD, RETURNS)),
}


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name, which", [(name, i) for name, (_, args) in CALLS.items() for i in range(len(args))])
def test_masked_garbage_does_not_leak(name, which, garbage):
    f, args = CALLS[name]
    args = [a.masked_fill(~MASK, 0) for a in args]
    clean = f(*args)
    args[which] = args[which].masked_fill(~MASK, garbage)
    torch.testing.assert_close(f(*args), clean, rtol=0, atol=0)

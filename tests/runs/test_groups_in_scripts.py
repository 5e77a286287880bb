"""PPO without a value function, as runs of train_ppo.py: --advantage rloo, grpo, dr_grpo.

What a group is, what its advantages are made from, what is no longer there, and that nothing else
changes the result: micro-batches, processes, kills (in test_properties.py). Whatever the update
computed is computed again by loops over single answers, with plain forwards.

    B answers of a rollout, G of them to one prompt, R response tokens
"""

import dataclasses
import math
import os
import statistics
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import (
    assert_close_runs,
    drive,
    join,
    ranks,
    read_rows,
    rollouts,
    small,
    summary,
    train,
)

import train_ppo
from nanorlhf import ppo as ppo_maths
from nanorlhf.errors import InputError
from nanorlhf.models import load_policy
from nanorlhf.runtime.files import write_json
from nanorlhf.runtime.settings import as_json, settings_that_differ

# A rollout of 8 then has two prompts.
GRPO = {"advantage": "grpo", "group_size": 4}


def column(rows, name):
    """One field of all rows."""
    return [row[name] for row in rows]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------ what happens inside a run


def record_steps(patch):
    """A list that fills with what every step of a PPO run starts its update from.

    config; prompts and responses, the B token lists; scores [B], what PPO maximises, before any
    rule on endings; finished [B]; x, the Experience
    """
    steps = []
    experience = train_ppo.experience

    def record(parts, scaler, rollout, answers, kl_coef):
        scored = []
        combine = parts.scoring.combine

        def record_scores(readings):
            scored.append(combine(readings))
            return scored[0]

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(parts.scoring, "combine", record_scores)
            x, numbers = experience(parts, scaler, rollout, answers, kl_coef)
        prompts, responses = token_lists(answers.batch)
        step = SimpleNamespace(
            config=parts.config,
            prompts=prompts,
            responses=responses,
            scores=scored[0].scores.tolist(),
            finished=rollout.finished.tolist(),
            x=x,
        )
        steps.append(step)
        return x, numbers

    patch.setattr(train_ppo, "experience", record)
    return steps


def token_lists(batch):
    """The prompts and the responses of packed rows."""
    prompts = []
    responses = []
    for i in range(len(batch)):
        n_prompt = int(batch.prompt_lengths[i])
        ids = batch.ids[i, : int(batch.lengths[i])].tolist()
        prompts.append(ids[:n_prompt])
        responses.append(ids[n_prompt:])
    return prompts, responses


def plain_logprobs(policy, ids, n_prompt):
    """All log-probs of the response tokens of one row: [R, V], float64."""
    logits = policy.lm(torch.tensor([ids])).logits[0, n_prompt - 1 : -1]
    return logits.double().log_softmax(-1)


def rewards_of(step):
    """The whole reward of each answer, by the flags of the run: [B]."""
    config = step.config
    log_ratios = step.x.old_logprobs - step.x.ref_logprobs
    rewards = []
    for i, score in enumerate(step.scores):
        reward = score
        if not step.finished[i]:
            reward -= config.missing_eos_penalty
        if config.kl_in == "reward":
            reward -= config.kl_coef * log_ratios[i].sum().item()
        rewards.append(reward)
    return rewards


def advantages_of(step):
    """The advantage of each answer, group by group, by Python's statistics: [B]."""
    config = step.config
    rewards = rewards_of(step)
    n = config.group_size
    advantages = []
    for start in range(0, len(rewards), n):
        group = rewards[start : start + n]
        factor = 1.0
        if config.advantage == "grpo":
            factor = 1 / (statistics.stdev(group) + 1e-4)
        elif config.advantage == "rloo":
            factor = n / (n - 1)
        for reward in group:
            advantages.append(factor * (reward - statistics.fmean(group)))
    return advantages


def check_groups(step):
    """The answers to one prompt lie side by side; they are not the same answer again."""
    n = step.config.group_size
    firsts = []
    for start in range(0, len(step.prompts), n):
        group = step.prompts[start : start + n]
        assert group == [group[0]] * n
        firsts.append(group[0])
        answers = {tuple(ids) for ids in step.responses[start : start + n]}
        assert len(answers) > 1
    # The prompts of a rollout are different ones.
    for i, prompt in enumerate(firsts):
        assert prompt not in firsts[:i]


def check_advantages(step):
    """Every token of an answer has the answer's advantage, and padding has none."""
    expected = torch.tensor(advantages_of(step))
    assert expected.abs().max() > 0.1
    expected = expected[:, None] * step.x.mask
    torch.testing.assert_close(step.x.advantages, expected, rtol=1e-4, atol=1e-4)
    assert step.x.values is None
    assert step.x.returns is None


def check_numbers(rows):
    """All are finite; nothing of a value function is among them; every ratio begins at 1."""
    for row in rows:
        assert "value_loss" not in row
        assert "explained_variance" not in row
        for name, value in row.items():
            assert math.isfinite(value), name
    for row in rows[1:]:
        assert row["first_ratio_error"] < 1e-5


# ------------------------------------------------------------------------------------------ one run


@pytest.fixture(scope="module")
def grpo_run(base, tmp_path_factory):
    """Two steps of GRPO: folder, rows of its metrics, steps. Some answers are cut off."""
    folder = tmp_path_factory.mktemp("groups") / "grpo"
    settings = {"lr": 2e-3, "missing_eos_penalty": 2.0, **GRPO}
    with pytest.MonkeyPatch.context() as patch:
        steps = record_steps(patch)
        rows = train(base, "ppo", folder, **settings)
    return SimpleNamespace(folder=folder, rows=rows, steps=steps)


def test_the_answers_to_one_prompt_lie_side_by_side(grpo_run):
    assert len(grpo_run.steps) == 2
    for step in grpo_run.steps:
        assert len(step.prompts) == 8
        check_groups(step)
    first, second = grpo_run.steps
    assert first.prompts != second.prompts


def test_advantages_are_those_of_the_shaped_scores_group_by_group(grpo_run):
    """Penalties for unfinished answers and the KL come first, then the comparison, no whitening."""
    for step in grpo_run.steps:
        assert 0 < sum(step.finished) < 8
        check_advantages(step)


def test_the_numbers_of_a_run_without_a_value_function(grpo_run):
    check_numbers(grpo_run.rows)
    for row in grpo_run.rows[1:]:
        assert row["approx_kl"] > 1e-5
        assert row["advantage_std"] > 0.1
        assert {"policy_loss", "kl", "kl_k2", "kl_k3"} <= row.keys()


def test_the_recorded_spread_is_that_of_the_advantages(grpo_run):
    for step, row in zip(grpo_run.steps, grpo_run.rows[1:], strict=True):
        of_tokens = step.x.advantages[step.x.mask].double()
        assert row["advantage_mean"] == pytest.approx(of_tokens.mean().item(), abs=1e-6)
        assert row["advantage_std"] == pytest.approx(of_tokens.std(correction=0).item())


def test_evaluations_have_all_three_estimates_of_the_kl(grpo_run):
    start, _, end = grpo_run.rows
    for row in (start, end):
        for name in ("kl", "kl_k2", "kl_k3"):
            assert row[f"eval/{name}_n"] == 4
            assert row[f"eval/{name}_se"] >= 0
    assert summary(grpo_run.folder)["after"]["kl_k2"] == end["eval/kl_k2"]


@torch.no_grad()
def test_k2_of_an_evaluation_by_plain_forwards(base, grpo_run):
    """Of each token half of the squared difference of log-probs; the sum of each answer's."""
    policy = load_policy(str(grpo_run.folder), value_head=False)
    reference = load_policy(f"{base}/sft", value_head=False)
    sums = []
    for row in read_rows(grpo_run.folder / "eval/step_2.jsonl"):
        n_prompt = len(row["prompt_ids"])
        ids = row["prompt_ids"] + row["response_ids"]
        sampled = torch.tensor(row["response_ids"])[:, None]
        logp = plain_logprobs(policy, ids, n_prompt).gather(1, sampled)
        ref_logp = plain_logprobs(reference, ids, n_prompt).gather(1, sampled)
        sums.append(((logp - ref_logp) ** 2).sum().item() / 2)
    found = grpo_run.rows[2]["eval/kl_k2"]
    assert found > 0.01
    assert found == pytest.approx(statistics.fmean(sums), rel=1e-4)


def test_no_value_head_is_saved(grpo_run):
    assert "value_head.safetensors" not in names_in(grpo_run.folder / "model")


# ------------------------------------------------------------------- groups with a value function


@pytest.mark.slow
def test_a_value_function_with_groups(base, tmp_path, monkeypatch):
    """Four answers to each prompt; advantages are GAE's, and whitened over the batch."""
    steps = record_steps(monkeypatch)
    rows = train(base, "ppo", tmp_path, group_size=4, steps=1)
    check_groups(steps[0])
    of_tokens = steps[0].x.advantages[steps[0].x.mask]
    assert of_tokens.mean().item() == pytest.approx(0, abs=1e-5)
    assert of_tokens.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert "value_loss" in rows[1]
    assert (tmp_path / "model/value_head.safetensors").exists()


# ---------------------------------------------------------------------------------------- no signal


@pytest.mark.slow
def test_a_reward_that_tells_nothing_apart_moves_nothing(base, tmp_path):
    """Every group is all equal: no gradient, no NaN, and the weights keep their bits."""
    settings = {"reward_model": [f"{base}/rewards.py:seven"], "kl_coef": 0.0, "steps": 1}
    settings["eval_size"] = 1
    rows = train(base, "ppo", tmp_path, **settings, **GRPO)
    check_numbers(rows)
    assert rows[1]["advantage_std"] == 0
    assert rows[1]["policy_loss"] == 0
    assert rows[1]["grad_norm"] == 0
    assert rows[1]["approx_kl"] == pytest.approx(0, abs=1e-9)
    before = load_file(base / "sft/model/model.safetensors")
    after = load_file(tmp_path / "model/model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].equal(after[name]), name


# -------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("advantage, group_size", [("gae", None), ("rloo", 8), ("grpo", 8)])
def test_how_many_answers_a_prompt_has_by_default(advantage, group_size):
    assert train_ppo.Config(advantage=advantage).group_size == group_size


def test_a_run_that_is_older_than_these_flags_is_the_same_run(tmp_path):
    config = train_ppo.Config(output_dir=str(tmp_path))
    stored = as_json(config)
    for name in ("advantage", "group_size", "loss_mean", "clip_range_high"):
        del stored[name]
    write_json(f"{tmp_path}/config.json", stored)
    assert settings_that_differ(f"{tmp_path}/config.json", config) == []
    groups = train_ppo.Config(output_dir=str(tmp_path), advantage="grpo")
    differing = settings_that_differ(f"{tmp_path}/config.json", groups)
    assert differing == ["advantage", "group_size"]


# {flag of the value function: a value that is not its default}
OF_VALUES = {
    "value_model": "runs/rm/seed_0",
    "vf_coef": 0.1,
    "value_clip_range": 0.5,
    "gamma": 0.9,
    "lam": 1.0,
    "bootstrap_truncated": True,
}
WITHOUT_VALUES = pytest.mark.parametrize("advantage", ppo_maths.GROUP_KINDS)


def test_the_table_of_flags_that_only_a_value_function_reads():
    assert set(OF_VALUES) == set(train_ppo.VALUE_FLAGS)


@pytest.mark.parametrize("name", OF_VALUES)
def test_a_flag_of_the_value_function_is_refused_without_one(name):
    settings = {name: OF_VALUES[name]}
    with pytest.raises(InputError) as e:
        train_ppo.Config(advantage="rloo", **settings)
    assert str(e.value).endswith(f"nothing reads --{name}")
    train_ppo.Config(advantage="gae", **settings)


@WITHOUT_VALUES
def test_all_flags_of_the_value_function_are_one_error(advantage):
    with pytest.raises(InputError) as e:
        train_ppo.Config(advantage=advantage, **OF_VALUES)
    message = str(e.value)
    assert f"--advantage {advantage}" in message
    for name in OF_VALUES:
        assert f"--{name}" in message


@WITHOUT_VALUES
def test_their_defaults_are_no_error(advantage):
    defaults = {}
    for field in dataclasses.fields(train_ppo.Config):
        if field.name in OF_VALUES:
            defaults[field.name] = field.default
    assert len(defaults) == len(OF_VALUES)
    train_ppo.Config(advantage=advantage, **defaults)


# {case: (flags, words of the error)}
BAD_FLAGS = {
    "one answer": ({"advantage": "grpo", "group_size": 1}, "--group_size must be 2 or more"),
    "no answer": ({"group_size": 0}, "--group_size must be at least 1, not 0"),
    "a group cut off": ({"batch_size": 12, "group_size": 8}, "--batch_size 12 .* --group_size"),
    "the default size": ({"batch_size": 12, "advantage": "rloo"}, "--group_size .8."),
    "kind": ({"advantage": "reinforce"}, "--advantage must be one of gae, "),
    "mean": ({"loss_mean": "median"}, "--loss_mean must be one of token, sequence, constant"),
    "edge": ({"clip_range_high": 0.0}, "--clip_range_high must be positive"),
}


@pytest.mark.parametrize("settings, words", BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_bad_flags_of_groups(settings, words):
    with pytest.raises(InputError, match=words):
        train_ppo.Config(**settings)


# ----------------------------------------------------------------------------- the loss, by loops


def clipped_loss(advantage, ratio, config):
    low = 1 - config.clip_range
    high = 1 + (config.clip_range_high or config.clip_range)
    if advantage > 0:
        return -advantage * min(ratio, high)
    return -advantage * max(ratio, low)


@torch.no_grad()
def answer_losses(parts, batch, x, at, kl_coef):
    """Of each answer, the loss of every token: lists of floats.

    With the token's k3 and, for the entropy bonus, the entropy of its distribution.
    """
    config = parts.config
    prompts, responses = token_lists(batch)
    losses = []
    for i, place in enumerate(at.tolist()):
        ids = prompts[i] + responses[i]
        logp = plain_logprobs(parts.policy, ids, len(prompts[i]))
        ref_logp = plain_logprobs(parts.reference, ids, len(prompts[i]))
        of_answer = []
        for t, token in enumerate(responses[i]):
            log_ratio = logp[t, token].item() - x.old_logprobs[place, t].item()
            advantage = x.advantages[place, t].item()
            loss = clipped_loss(advantage, math.exp(log_ratio), config)
            to_ref = (ref_logp[t, token] - logp[t, token]).item()
            loss += kl_coef * (math.exp(to_ref) - 1 - to_ref)
            entropy = -(logp[t].exp() * logp[t]).sum().item()
            of_answer.append(loss - config.ent_coef * entropy)
        losses.append(of_answer)
    return losses


def mean_loss(losses, kind, n_tokens, n_answers, max_new_tokens):
    """This part's share of the mean over the whole minibatch."""
    total = 0.0
    for of_answer in losses:
        if kind == "token":
            total += sum(of_answer) / n_tokens
        elif kind == "sequence":
            total += statistics.fmean(of_answer) / n_answers
        else:
            total += sum(of_answer) / n_answers / max_new_tokens
    return total


MEANS = [
    pytest.param("token", marks=pytest.mark.slow),
    "sequence",
    pytest.param("constant", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("loss_mean", MEANS)
def test_the_loss_and_its_mean_by_loops(base, tmp_path, monkeypatch, loss_mean):
    """With an upper edge of the clip, k3 in the loss and an entropy bonus: all have one mean."""
    found = []
    expected = []
    loss_of = train_ppo.loss_of

    def record(parts, batch, x, at, n_tokens, kl_coef):
        loss, stats = loss_of(parts, batch, x, at, n_tokens, kl_coef)
        losses = answer_losses(parts, batch, x, at, kl_coef)
        found.append(loss.item())
        expected.append(mean_loss(losses, loss_mean, n_tokens.item(), 4, 12))
        return loss, stats

    monkeypatch.setattr(train_ppo, "loss_of", record)
    settings = {"kl_in": "loss", "kl_kind": "k3", "kl_coef": 3.0, "ent_coef": 0.1, "lr": 5e-3}
    settings |= {"clip_range_high": 0.4, "loss_mean": loss_mean, "micro_batch_size": 3}
    rows = train(base, "ppo", tmp_path, steps=1, eval_size=1, **settings, **GRPO)
    # Two epochs of two minibatches of 4, in micro-batches of 3 and 1.
    assert len(found) == 8
    assert found == pytest.approx(expected, rel=0, abs=1e-4)
    # The example has clipped tokens, and after them a KL.
    assert rows[1]["clip_fraction"] > 0.05
    assert rows[1]["approx_kl"] > 0.01
    check_numbers(rows)
    assert rows[1]["reward"] == pytest.approx(rows[1]["score_mean"], rel=1e-5)


# ------------------------------------------------------- with everything else that a run can have


def options(base):
    """{case: (kind of run, its settings)}"""
    splits = {"eval_splits": ["ood", "test"], "eval_every": 1}
    return {
        "rloo": ("ppo", {"advantage": "rloo"}),
        "dr_grpo": ("ppo", {"advantage": "dr_grpo", "loss_mean": "constant"}),
        "k2 in the loss": ("ppo", {"kl_in": "loss", "kl_kind": "k2"}),
        "full KL in the loss": ("ppo", {"kl_in": "loss", "kl_kind": "full"}),
        "LoRA": ("ppo", {"lora_rank": 2, "lr": 1e-2}),
        "frozen layers": ("ppo", {"freeze_layers": 0.5}),
        "an ensemble": (
            "ppo",
            {"reward_model": [f"{base}/rm", f"{base}/rewards.py:the"], "objective": "wco"},
        ),
        "control by features": ("control", {}),
        "further splits": ("ppo", splits),
        "bfloat16": ("ppo", {"dtype": "bfloat16"}),
        "a temperature": ("ppo", {"temperature": 0.7}),
    }


CASES = list(options("base"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_groups_with_every_option(base, tmp_path, monkeypatch, case):
    kind, settings = options(base)[case]
    steps = record_steps(monkeypatch)
    rows = train(base, kind, tmp_path, **{**GRPO, "lr": 2e-3, **settings})
    assert len(steps) == 2
    for step in steps:
        check_groups(step)
        check_advantages(step)
    check_numbers(rows)
    assert rows[2]["approx_kl"] > 1e-6
    assert "value_head.safetensors" not in names_in(tmp_path / "model")


@pytest.mark.slow
def test_each_split_is_evaluated_without_a_value_function(base, tmp_path):
    settings = {"eval_splits": ["ood", "test"], "eval_every": 1}
    rows = train(base, "ppo", tmp_path, **settings, **GRPO)
    for row in rows:
        for label in ("eval", "test"):
            assert row[f"{label}/kl_k2_n"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("target, n_updates", [(1e-9, 2), (1e9, 6)])
def test_target_kl_ends_the_epochs(base, tmp_path, monkeypatch, target, n_updates):
    """Three epochs are six updates, whatever mean the loss has: approx_kl is one over tokens."""
    norms = []
    optimizer_step = train_ppo.optimizer_step

    def count(*args):
        norms.append(optimizer_step(*args))
        return norms[-1]

    monkeypatch.setattr(train_ppo, "optimizer_step", count)
    settings = {"ppo_epochs": 3, "target_kl": target, "steps": 1, "loss_mean": "sequence"}
    train(base, "ppo", tmp_path, **settings, **GRPO)
    assert len(norms) == n_updates


@pytest.mark.slow
def test_a_value_head_that_was_saved_is_not_carried_on(base, tmp_path):
    """GRPO from a run with a value function, and a run with one from GRPO's."""
    train(base, "ppo", tmp_path / "gae", steps=1, lr=1e-3)
    train(base, "ppo", tmp_path / "grpo", steps=1, model=f"{tmp_path}/gae", **GRPO)
    assert "value_head.safetensors" not in names_in(tmp_path / "grpo/model")
    rows = train(base, "ppo", tmp_path / "again", steps=1, model=f"{tmp_path}/grpo")
    assert rows[1]["explained_variance"] == 0


# ------------------------------------------------------------------ the same result, however split


SPLIT = [("grpo", mean) for mean in ppo_maths.LOSS_MEANS]
SPLIT += [("gae", "sequence"), ("gae", "constant")]


@pytest.mark.slow
@pytest.mark.parametrize("advantage, loss_mean", SPLIT)
def test_micro_batches_change_no_mean(base, tmp_path, advantage, loss_mean):
    settings = {**GRPO, "advantage": advantage, "loss_mean": loss_mean, "ent_coef": 0.01}
    settings |= {"kl_in": "loss", "kl_kind": "k3", "lr": 1e-3}
    train(base, "ppo", tmp_path / "whole", micro_batch_size=8, **settings)
    train(base, "ppo", tmp_path / "rows", micro_batch_size=3, **settings)
    train(base, "ppo", tmp_path / "tokens", tokens_per_micro_batch=60, **settings)
    assert_close_runs(tmp_path / "whole", tmp_path / "rows")
    assert_close_runs(tmp_path / "whole", tmp_path / "tokens")


def split_settings(base, **changes):
    """A run whose rollout is one group, which every split over processes cuts."""
    return small(
        base,
        "ppo",
        reward_model=[f"{base}/rm"],
        group_size=8,
        loss_mean="sequence",
        eval_every=1,
        eval_size=7,
        micro_batch_size=3,
        missing_eos_penalty=1.0,
        **changes,
    )


# {case: (processes, settings)}
ON_SEVERAL = {
    "two": (2, {"advantage": "grpo", "score_scaling": "running"}),
    "two, FSDP": (2, {"advantage": "grpo", "distributed": "fsdp"}),
    "four": (4, {"advantage": "rloo", "kl_in": "loss", "kl_kind": "k3"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("n, changes", ON_SEVERAL.values(), ids=ON_SEVERAL.keys())
def test_a_group_that_lies_on_several_processes_is_one_group(base, tmp_path, n, changes):
    settings = split_settings(base, **changes)
    for name in ("one", "several"):
        os.mkdir(tmp_path / name)
    processes = ranks(n, drive, str(tmp_path / "several"), [("ppo", settings)])
    join(*processes)
    join(*ranks(1, drive, str(tmp_path / "one"), [("ppo", settings)]))

    assert_close_runs(tmp_path / "one/ppo", tmp_path / "several/ppo")
    answers = rollouts(tmp_path / "one")
    # Two rollouts of 8, and three evaluations of 7.
    assert len(answers) == 2 * 8 + 3 * 7
    assert rollouts(tmp_path / "several") == answers
    names = names_in(tmp_path / "one/ppo/model")
    assert names_in(tmp_path / "several/ppo/model") == names
    check_numbers(read_rows(tmp_path / "several/ppo/metrics.jsonl"))

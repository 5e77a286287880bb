"""Answers of a policy: sampling them, their log-probs, and what they are worth on held-out prompts.

b sequences of this process, m of a micro-batch, n held-out prompts of this process, N of all
R response tokens (R' of a micro-batch's longest), K rewards
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ppo
from .data import columns_for_files
from .diversity import distinct_n, distinct_n_se
from .models import Policy
from .packing import Packed, response_mask_of
from .rewards import score
from .rollout import Parts, Rollout, roll_out
from .runtime.distributed import autocast
from .runtime.fsdp import gathered
from .runtime.log import RunFolder
from .scoring import Scored, Scoring
from .stats import mean_se
from .tokens import Prompts, split_text

ANSWERS_WITH_TOKENS = 8  # so many answers of an evaluation keep the numbers of their tokens


@dataclass
class PPOParts(Parts):
    """What the functions of a PPO run share: what a roll-out needs, and what judges its answers.

    train_sft.py has them too, for the evaluations of a policy that learns from pairs.
    """

    model: torch.nn.Module  # the policy; on several processes in DDP or in shards (FSDP)
    reference: Policy
    scoring: Scoring | None  # or another object with its functions: see scoring.py
    gold: Callable | None  # Answers -> scores [B], for evaluation only


# ------------------------------------------------------------------- log-probs of sampled tokens


@torch.no_grad()
def forward(parts: PPOParts, policy: Policy, batch: Packed, **kwargs) -> dict[str, Tensor]:
    """The forward of the policy or the reference over micro-batches, without gradients.

    kwargs: of Policy.forward. -> {name: [b, R]}
    """
    config = parts.config
    dist = parts.dist
    outputs = {}
    for rows in batch.micro_batches(config.micro_batch_size, config.tokens_per_micro_batch):
        part = batch.rows(rows)
        with autocast(dist, config.dtype):
            result = policy(part, response_mask_of(part), config.temperature, **kwargs)
        for name, values in result.items():  # [m, R']
            # All outputs have the width of the longest possible response, so they can be stacked.
            if name not in outputs:
                outputs[name] = torch.zeros(len(batch), config.max_new_tokens, device=dist.device)
            width = values.shape[1]
            outputs[name][rows, :width] = values
    return outputs


# What is computed when. generate() has run the policy over every sampled token and kept log-probs
# and, by a value head on the LM's own hidden states, values. The policy runs over the tokens once
# more only where it says yes:
#
#                                                sampled_logprobs()         sampled_outputs()
#                                                evaluation                 training
#     float32, a value head on the LM            no                         no
#     float32, no value head                     no                         no
#     float32, a value model of its own          no                         yes, LM and value model
#     bfloat16                                   yes                        yes
#     the full KL in the reward                  no                         yes, and the reference
#
# In bfloat16 a cached decode and a batch forward differ by about 1e-2.


def sampled_logprobs(parts: PPOParts, rollout: Rollout, batch: Packed) -> Tensor:
    """Log-probs [b, R] of sampled tokens by the policy that sampled them."""
    if parts.config.dtype == "bfloat16":
        return forward(parts, parts.policy, batch)["logprobs"]
    return rollout.logprobs


def sampled_outputs(
    parts: PPOParts, rollout: Rollout, batch: Packed, kl_to: Policy | None = None
) -> dict[str, Tensor]:
    """What the update needs of the policy that sampled, {name: [b, R]}: logprobs, and values where
    there is a value head.

    kl_to: the reference, for the exact KL to it over the whole vocabulary, `full_kl`.
    """
    has_value_model = parts.policy.value_trunk is not None
    if parts.config.dtype == "bfloat16" or has_value_model or kl_to is not None:
        return forward(parts, parts.policy, batch, kl_to=kl_to)
    outputs = {"logprobs": rollout.logprobs}
    if rollout.values is not None:
        outputs["values"] = rollout.values
    return outputs


# ----------------------------------------------------------------------------- held-out prompts


def evaluate(parts: PPOParts, prompts: Prompts) -> tuple[dict[str, dict], list[dict]]:
    """Answer N held-out prompts, always with the same noise, and measure the answers.

    -> {name: {mean, se, n}}, and a row {prompt, response, scores, gold, ids} for each answer, the
    first of them with their tokens. All processes call this, and all have the same results.
    """
    # [N, ...], in the prompts' order. They lie in memory prompt by prompt, on any number of
    # processes, so that sums over the members are always added up in the same order.
    answered = {}
    for name, mine in answer_held_out(parts, prompts).items():
        answered[name] = parts.dist.gather(mine).cpu().contiguous()
    scored = None
    if parts.scoring is not None:
        scored = parts.scoring.combine(answered)

    response_ids = []
    for ids, mask in zip(answered["ids"], answered["mask"]):
        response_ids.append(ids[mask].tolist())
    responses = parts.tokenizer.batch_decode(response_ids, skip_special_tokens=True)
    prompt_texts = [row["prompt"] for row in prompts.rows]

    numbers = measure_answers(answered, scored, responses)
    rows = list_answers(answered, scored, prompt_texts, responses)
    for row, data_row, prompt, response in zip(rows, prompts.rows, prompts.ids, response_ids):
        row["prompt_ids"] = prompt
        row["response_ids"] = response
        # The data's other columns, for a gold reward that scores the answers later.
        row |= columns_for_files(data_row)
    add_tokens(parts, rows[:ANSWERS_WITH_TOKENS], answered, scored)
    return numbers, rows


def answer_held_out(parts: PPOParts, prompts: Prompts) -> dict[str, Tensor]:
    """Answer this process's share of the held-out prompts: {name: [n, ...]}.

    One model after the other has its turn: under FSDP each is gathered once.
    """
    config = parts.config
    dist = parts.dist
    mine = dist.part(len(prompts))
    batch_size = config.batch_size // dist.world

    rollouts = []
    answers = []
    with gathered(parts.policy):
        # Every evaluation draws the noise of step 0, so two of them differ by the policy alone.
        for start in range(0, len(mine), batch_size):
            places = mine[start : start + batch_size]
            rollout, part = roll_out(parts, prompts.at(places), places, 0)
            rollouts.append(rollout)
            answers.append(part)
        logprobs = []
        for rollout, part in zip(rollouts, answers):
            logprobs.append(sampled_logprobs(parts, rollout, part.batch))
    logprobs = torch.cat(logprobs)  # [n, R]

    with gathered(parts.reference):
        ref_logprobs = []
        for part in answers:
            ref_logprobs.append(forward(parts, parts.reference, part.batch)["logprobs"])
    ref_logprobs = torch.cat(ref_logprobs)  # [n, R]

    for part in answers:
        part.batch.frozen_output = None  # what the frozen blocks gave is not needed any more
    readings = {}
    if parts.scoring is not None:
        readings = parts.scoring.read(answers)

    ids = torch.cat([rollout.response_ids for rollout in rollouts])  # [n, R]
    mask = torch.cat([rollout.response_mask for rollout in rollouts])  # [n, R]
    finished = torch.cat([rollout.finished for rollout in rollouts])  # [n]
    answered = {
        "kl": ppo.kl_estimate(logprobs, ref_logprobs, "k1").sum(1),
        "kl_k2": ppo.kl_estimate(logprobs, ref_logprobs, "k2").sum(1),
        "kl_k3": ppo.kl_estimate(logprobs, ref_logprobs, "k3").sum(1),
        "length": mask.sum(1).float(),
        "eos_rate": finished.float(),
        **readings,  # member_scores [n, K], and what else the scores are made of
        "ids": torch.where(mask, ids, parts.tokenizer.pad_token_id),
        "mask": mask,
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "entropies": torch.cat([rollout.entropies for rollout in rollouts]),  # [n, R]
    }
    if parts.policy.shares_trunk:
        answered["values"] = torch.cat([rollout.values for rollout in rollouts])  # [n, R]
    if parts.gold is not None:
        answered["gold"] = score(parts.gold, answers, dist)
    return answered


def measure_answers(
    answered: dict[str, Tensor], scored: Scored | None, responses: list[str]
) -> dict[str, dict]:
    """Means over the N held-out answers and their standard errors: {name: {mean, se, n}}."""
    numbers = {}
    if scored is not None:
        numbers["proxy"] = mean_se(scored.proxy)
        for name, term in scored.terms.items():
            numbers[name] = mean_se(term)
    if "gold" in answered:
        numbers["gold"] = mean_se(answered["gold"])
    # One member alone has no variance, and its score tells nothing that the proxy does not.
    if scored is not None and len(scored.members) > 1:
        numbers["variance"] = mean_se(scored.variance)
        for name, scores in scored.members.items():
            numbers[f"score/{name}"] = mean_se(scores)
    for name in ("kl", "kl_k2", "kl_k3", "length", "eos_rate"):
        numbers[name] = mean_se(answered[name])
    numbers["distinct_2"] = {
        "mean": distinct_n(responses, 2),
        "se": distinct_n_se(responses, 2),
        "n": len(responses),
    }
    return numbers


def list_answers(
    answered: dict[str, Tensor], scored: Scored | None, prompts: list[str], responses: list[str]
) -> list[dict]:
    """One row {prompt, response, scores: {name: x}, gold} for each of the N held-out answers."""
    scores = {}
    if scored is not None:
        scores = {name: x.tolist() for name, x in scored.members.items()}
        if scored.scores is not scored.proxy:
            scores["controlled"] = scored.scores.tolist()  # PPO maximises something else
    gold = [None] * len(responses)
    if "gold" in answered:
        gold = answered["gold"].tolist()

    rows = []
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        own_scores = {name: column[i] for name, column in scores.items()}
        rows.append({"prompt": prompt, "response": response, "scores": own_scores, "gold": gold[i]})
    return rows


def record_evaluation(
    folder: RunFolder, step: int, label: str, numbers: dict[str, dict], rows: list[dict]
) -> dict[str, float]:
    """Write and print what evaluate() found on the split `label` -> numbers for metrics.jsonl.

    {name: {mean, se, n}} -> {label/name: mean, label/name_se: se, label/name_n: n}
    """
    folder.write_eval(step, rows, label)
    split = "" if label == "eval" else f" ({label})"
    words = []
    record = {}
    for name, number in numbers.items():
        words.append(f"{name} {number['mean']:.2f} +- {number['se']:.2f}")
        record[f"{label}/{name}"] = number["mean"]
        record[f"{label}/{name}_se"] = number["se"]
        record[f"{label}/{name}_n"] = number["n"]
    sentence = ", ".join(words)
    folder.dist.print(f"\nstep {step}, {len(rows)} held-out prompts{split}: {sentence}")
    return record


def add_tokens(
    parts: PPOParts, rows: list[dict], answered: dict[str, Tensor], scored: Scored | None
):
    """Put what is known of its tokens into each of these rows, for a page that colours them.

        tokens: {text, logprob, ref_logprob, entropy[, value][, advantage]}

    Each is a list with one entry for each token; the texts together are the answer, EOS included.
    There are values where the policy has a head for them. rows: the first of the N answers.
    """
    columns = {
        "logprob": answered["logprobs"],
        "ref_logprob": answered["ref_logprobs"],
        "entropy": answered["entropies"],
    }
    if "values" in answered:
        columns["value"] = answered["values"]
        if knows_advantages(parts.config):
            columns["advantage"] = find_advantages(parts.config, answered, scored)

    for i, row in enumerate(rows):
        own = answered["mask"][i]  # [R]
        row["tokens"] = {"text": split_text(parts.tokenizer, row["response_ids"])}
        for name, column in columns.items():
            row["tokens"][name] = [round(number, 4) for number in column[i][own].tolist()]


def knows_advantages(config) -> bool:
    """Whether an evaluation has all that the advantages of a training step are made of.

    It does not know what a run has learned about the scale of scores and the price of KL, nor the
    value after a cut-off answer, nor the KL over the whole vocabulary.
    """
    if config.score_scaling != "none" or config.kl_target or config.bootstrap_truncated:
        return False
    return config.kl_in == "loss" or config.kl_kind not in ppo.KL_OF_LOGITS


def find_advantages(config, answered: dict[str, Tensor], scored: Scored) -> Tensor:
    """Advantages [N, R] of the tokens of held-out answers, as in training but for the whitening."""
    mask = answered["mask"]  # [N, R]
    # The order is train_ppo.py's: rules on endings and length, clip, KL in the reward, GAE.
    shaped = ppo.shape_scores(
        scored.scores,
        mask.sum(1),
        answered["eos_rate"].bool(),
        config.missing_eos_penalty,
        config.eos_required,
        config.length_penalty,
    )
    if config.score_clip:
        shaped = shaped.clamp(-config.score_clip, config.score_clip)
    kl = torch.zeros_like(answered["logprobs"])  # [N, R]
    if config.kl_in == "reward":
        kl = ppo.kl_estimate(answered["logprobs"], answered["ref_logprobs"], config.kl_kind)
    rewards = ppo.token_rewards(shaped, kl, mask, config.kl_coef)
    advantages, _ = ppo.gae(rewards, answered["values"], mask, config.gamma, config.lam)
    return advantages

"""Answers of a policy: sampling them, their log-probs, and what they are worth on held-out prompts.

    b sequences of this process, m of a micro-batch, R response tokens (R' of a micro-batch's longest), K rewards, N held-out prompts
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from . import ppo
from .distributed import Dist, autocast
from .diversity import distinct_n, distinct_n_se
from .log import mean_se
from .models import Policy
from .packing import response_mask_of
from .rewards import Answers, score_all
from .rollout import generate, left_pad


@dataclass
class Parts:
    """What the functions of a PPO run share."""

    config: object  # train_ppo.Config
    dist: Dist
    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    model: torch.nn.Module  # the policy, in DDP where there are several processes
    reference: Policy
    rewards: dict  # {name: Answers -> scores [B]}
    gold: Callable | None


def roll_out(parts, prompts, place, step):
    """One response to each prompt; `place` keys the noise by the prompt's place in the global batch. -> Rollout, Answers"""
    config, dist, tokenizer = parts.config, parts.dist, parts.tokenizer
    ids, mask = left_pad(prompts, tokenizer.pad_token_id)
    with autocast(dist, config.dtype):
        rollout = generate(
            parts.policy, ids.to(dist.device), mask.to(dist.device), config.max_new_tokens, temperature=config.temperature,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, seed=config.seed, step=step, index=place,
        )  # fmt: skip
    responses = [ids[mask] for ids, mask in zip(rollout.response_ids.cpu(), rollout.response_mask.cpu())]
    texts = (tokenizer.batch_decode(part, skip_special_tokens=True) for part in (prompts, responses))
    return rollout, Answers(*texts, rollout.packed())


@torch.no_grad()
def forward(parts, policy, batch, **kwargs):
    """The policy's or the reference's forward over micro-batches, without gradients: {name: [b, R]}."""
    config, dist, out = parts.config, parts.dist, {}
    for rows in batch.micro_batches(config.micro_batch_size):
        part = batch.rows(rows)
        with autocast(dist, config.dtype):
            result = policy(part, response_mask_of(part), config.temperature, **kwargs)
        for name, value in result.items():  # [m, R']
            out.setdefault(name, torch.zeros(len(batch), config.max_new_tokens, device=dist.device))[rows, : value.shape[1]] = value
    return out


def sampled_outputs(parts, rollout, batch, kl_to=None):
    """Log-probs and values of the policy that sampled, {name: [b, R]}: those that generate() kept, where they will do.

    In bfloat16 a cached decode and a batch forward differ by about 1e-2; a separate value model has said nothing yet.
    """
    if parts.config.dtype == "bfloat16" or rollout.values is None or kl_to:
        return forward(parts, parts.policy, batch, kl_to=kl_to)
    return {"logprobs": rollout.logprobs, "values": rollout.values}


def evaluate(parts, prompts):
    """Held-out prompts, always with the same noise -> {name: {mean, se, n}}, and a row {prompt, response, scores, gold} for each."""
    tokenizer, dist = parts.tokenizer, parts.dist
    local = dist.together(lambda: held_out_answers(parts, prompts))
    g = {name: dist.gather(part).cpu() for name, part in local.items()}  # [N, ...], in the prompts' order
    result = {"proxy": mean_se(g["scores"][:, 0])} | ({"gold": mean_se(g["gold"])} if parts.gold else {})
    result |= {name: mean_se(g[name]) for name in ("kl", "kl_k3", "length", "eos_rate")}
    responses = tokenizer.batch_decode([ids[mask] for ids, mask in zip(g["ids"], g["mask"])], skip_special_tokens=True)
    result["distinct_2"] = {"mean": distinct_n(responses, 2), "se": distinct_n_se(responses, 2), "n": len(responses)}
    rows = zip(tokenizer.batch_decode(prompts, skip_special_tokens=True), responses, g["scores"].tolist(), g["gold"].tolist())
    return result, [
        {"prompt": prompt, "response": response, "scores": dict(zip(parts.rewards, scores)), "gold": gold if parts.gold else None}
        for prompt, response, scores, gold in rows
    ]


def held_out_answers(parts, prompts):
    """This process's share of the held-out prompts: {name: [n, ...]}."""
    mine, size, out = parts.dist.part(len(prompts)), parts.config.batch_size // parts.dist.world, defaultdict(list)
    for i in range(0, len(mine), size):
        place = mine[i : i + size]
        rollout, answers = roll_out(parts, [prompts[j] for j in place], place, 0)
        logprobs = sampled_outputs(parts, rollout, answers.batch)["logprobs"]
        ref_logprobs = forward(parts, parts.reference, answers.batch)["logprobs"]
        out["kl"].append(ppo.kl_estimate(logprobs, ref_logprobs, "k1").sum(1))
        out["kl_k3"].append(ppo.kl_estimate(logprobs, ref_logprobs, "k3").sum(1))
        out["length"].append(rollout.response_mask.sum(1).float())
        out["eos_rate"].append(rollout.finished.float())
        out["scores"].append(score_all(parts.rewards, answers).T)  # [b, K]
        out["gold"].append(parts.gold(answers) if parts.gold else torch.full((len(place),), torch.nan))
        out["ids"].append(torch.where(rollout.response_mask, rollout.response_ids, parts.tokenizer.pad_token_id))
        out["mask"].append(rollout.response_mask)
    return {name: torch.cat(values) for name, values in out.items()}

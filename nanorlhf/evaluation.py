"""Answers of a policy: sampling them, their log-probs, and what they are worth on held-out prompts.

    b sequences of this process, m of a micro-batch, R response tokens (R' of a micro-batch's longest), K rewards, N held-out prompts
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import ppo
from .data import is_world
from .diversity import distinct_n, distinct_n_se
from .errors import require
from .hf.folders import check_model
from .models import Policy, load_tokenizer
from .packing import Answers, pack, response_mask_of
from .rewards import check_reward, kind_of, load_reward, score
from .rollout import Parts, roll_out
from .runtime.cli import read_settings
from .runtime.distributed import Dist, autocast
from .runtime.files import read_object, read_rows, write_json, write_lines
from .runtime.fsdp import gathered
from .runtime.locks import lock_folder
from .runtime.log import eval_folder, read_eval
from .scoring import Scoring
from .splits import labels
from .stats import mean_se

# What score_gold() reads of a row of eval/step_N.jsonl.
EVAL_ROW = {"prompt": str, "response": str, "prompt_ids": list[int], "response_ids": list[int]}


@dataclass
class PPOParts(Parts):
    """What the functions of a PPO run share: what a roll-out needs, and what judges its answers."""

    model: torch.nn.Module  # the policy; on several processes in DDP or in shards (FSDP)
    reference: Policy
    scoring: Scoring  # or another object with its functions: see scoring.py
    gold: Callable | None  # Answers -> scores [B], for evaluation only


@torch.no_grad()
def forward(parts, policy, batch, **kwargs):
    """The policy's or the reference's forward over micro-batches, without gradients: {name: [b, R]}."""
    config, dist, out = parts.config, parts.dist, {}
    for rows in batch.micro_batches(config.micro_batch_size, None, config.tokens_per_micro_batch):
        part = batch.rows(rows)
        with autocast(dist, config.dtype):
            result = policy(part, response_mask_of(part), config.temperature, **kwargs)
        for name, value in result.items():  # [m, R']
            out.setdefault(name, torch.zeros(len(batch), config.max_new_tokens, device=dist.device))[rows, : value.shape[1]] = value
    return out


# What is computed when. generate() has run the policy over every sampled token and kept log-probs
# and, by a value head on the LM's own hidden states, values. The policy runs over the tokens once
# more only where it says yes:
#
#                                                sampled_logprobs()         sampled_outputs()
#                                                evaluation                 training
#     float32, a value head on the LM            no                         no
#     float32, no value head                     no                         (PPO needs values)
#     float32, a value model of its own          no                         yes, LM and value model
#     bfloat16                                   yes                        yes
#     the full KL in the reward                  no                         yes, and the reference
#
# In bfloat16 a cached decode and a batch forward differ by about 1e-2.


def sampled_logprobs(parts, rollout, batch) -> torch.Tensor:
    """Log-probs [b, R] of sampled tokens by the policy that sampled them."""
    if parts.config.dtype == "bfloat16":
        return forward(parts, parts.policy, batch)["logprobs"]
    return rollout.logprobs


def sampled_outputs(parts, rollout, batch, kl_to=None) -> dict[str, torch.Tensor]:
    """What PPO needs of the policy that sampled, {name: [b, R]}: logprobs and values.

    kl_to: the reference, for the exact KL to it over the whole vocabulary, `full_kl`.
    """
    has_values = parts.policy.shares_trunk
    if parts.config.dtype == "bfloat16" or not has_values or kl_to:
        return forward(parts, parts.policy, batch, kl_to=kl_to)
    return {"logprobs": rollout.logprobs, "values": rollout.values}


def evaluate(parts, prompts):
    """Held-out prompts, always with the same noise -> {name: {mean, se, n}}, and a row {prompt, response, scores, gold, ids} for each."""
    tokenizer, dist = parts.tokenizer, parts.dist
    local = held_out_answers(parts, prompts)
    # [N, ...], in the prompts' order. They lie in memory prompt by prompt, on any number of
    # processes, so that sums over the members are always added up in the same order.
    g = {name: dist.gather(part).cpu().contiguous() for name, part in local.items()}
    scored = parts.scoring.combine(g)
    result = {"proxy": mean_se(scored.proxy)}
    result |= {name: mean_se(x) for name, x in scored.terms.items()}
    if parts.gold:
        result["gold"] = mean_se(g["gold"])
    if len(scored.members) > 1:
        result["variance"] = mean_se(scored.variance)
        result |= {f"score/{name}": mean_se(x) for name, x in scored.members.items()}
    result |= {name: mean_se(g[name]) for name in ("kl", "kl_k3", "length", "eos_rate")}
    response_ids = [ids[mask].tolist() for ids, mask in zip(g["ids"], g["mask"])]
    responses = tokenizer.batch_decode(response_ids, skip_special_tokens=True)
    result["distinct_2"] = {"mean": distinct_n(responses, 2), "se": distinct_n_se(responses, 2), "n": len(responses)}
    texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    by_name = dict(scored.members)
    if scored.scores is not scored.proxy:
        by_name["controlled"] = scored.scores  # PPO maximises something else
    columns = torch.stack(list(by_name.values()), 1).tolist()
    rows = zip(texts, responses, columns, g["gold"].tolist(), prompts, response_ids)
    return result, [
        {"prompt": prompt, "response": response, "scores": dict(zip(by_name, row)), "gold": gold if parts.gold else None,
         "prompt_ids": p, "response_ids": r}
        for prompt, response, row, gold, p, r in rows
    ]  # fmt: skip


def held_out_answers(parts, prompts):
    """This process's share of the held-out prompts: {name: [n, ...]}. One model after the other: each is gathered once (FSDP)."""
    dist = parts.dist
    mine, size = dist.part(len(prompts)), parts.config.batch_size // dist.world
    places = [mine[i : i + size] for i in range(0, len(mine), size)]
    with gathered(parts.policy):
        rollouts, answers = zip(*(roll_out(parts, [prompts[j] for j in place], place, 0) for place in places))
        logprobs = [sampled_logprobs(parts, r, a.batch) for r, a in zip(rollouts, answers)]
        logprobs = torch.cat(logprobs)  # [n, R]
    with gathered(parts.reference):
        ref_logprobs = torch.cat([forward(parts, parts.reference, a.batch)["logprobs"] for a in answers])  # [n, R]
    for a in answers:
        a.batch.trunk = None  # what the frozen blocks gave has served
    readings = parts.scoring.read(answers)
    ids, mask, finished = (torch.cat([getattr(r, name) for r in rollouts]) for name in ("response_ids", "response_mask", "finished"))
    return {
        "kl": ppo.kl_estimate(logprobs, ref_logprobs, "k1").sum(1),
        "kl_k3": ppo.kl_estimate(logprobs, ref_logprobs, "k3").sum(1),
        "length": mask.sum(1).float(),
        "eos_rate": finished.float(),
        **readings,  # member_scores [n, K], and what else the scores are made of
        "gold": score(parts.gold, answers, dist) if parts.gold else torch.full((len(mine),), torch.nan),
        "ids": torch.where(mask, ids, parts.tokenizer.pad_token_id),
        "mask": mask,
    }


def score_gold(config, dist):
    """Gold for a finished run that was not scored with it: into the rows of eval/ (of all splits), its metrics and its summary, once.

    A kill leaves a run to which the same command adds what is missing. -> the summary
    """
    run, spec = config.score_gold, config.gold_model
    paths = {name: os.path.join(run, name) for name in ("config.json", "metrics.jsonl", "summary.json")}
    for path in paths.values():
        require(os.path.isfile(path), f"{run}: no finished PPO run here (it has no {os.path.basename(path)})")
    lock_folder(run, dist)
    summary = read_object(
        paths["summary.json"], {"before": dict | None, "after": dict | None}, finite=False
    )
    is_ppo = summary.get("before") and summary.get("after")
    require(is_ppo, f"{run}: no finished PPO run here (another script's)")
    stored = read_settings(paths["config.json"], type(config))
    require("dataset" in stored, f"{paths['config.json']}: dataset is missing")
    known = kind_of(spec) != "gold" or is_world(stored.get("dataset", ""))
    require(spec and known, f"--score_gold {run}: name its gold reward with --gold_model")
    require("gold" not in summary["after"], f"{run} has its gold scores already")
    dist.barrier()  # all have looked before one writes
    if dist.main:
        check_reward(spec)
        tokenizer = load_tokenizer(run)
        records = read_rows(paths["metrics.jsonl"], {"step": int})
        evaluations = [record for record in records if "eval/proxy" in record]
        require(evaluations, f"{paths['metrics.jsonl']}: no evaluation in it")
        named = labels(stored.get("eval_splits", ["test"]))
        # All answers are read before the first file is written: one that is damaged changes nothing.
        vocabulary = check_model(run).get_text_config().vocab_size
        sampled = {}
        for record in evaluations:
            for label in named:
                path = os.path.join(run, eval_folder(label), f"step_{record.get('step')}.jsonl")
                sampled[path] = read_eval(path, record.get(f"{label}/proxy_n"), vocabulary)
        gold = load_reward(spec, tokenizer, Dist(0, 1, dist.device), config.micro_batch_size)
        for record in evaluations:
            for label in named:
                path = os.path.join(run, eval_folder(label), f"step_{record['step']}.jsonl")
                rows = sampled[path]
                batch = pack([r["prompt_ids"] for r in rows], [r["response_ids"] for r in rows], tokenizer.pad_token_id)
                scores = gold(Answers([r["prompt"] for r in rows], [r["response"] for r in rows], batch))
                write_lines(path, [{**row, "gold": score} for row, score in zip(rows, scores.tolist())])
                record |= {f"{label}/gold{end}": value for end, value in zip(("", "_se", "_n"), mean_se(scores).values())}
                split = "" if label == "eval" else f" ({label})"
                dist.print(f"step {record['step']}{split}: gold {record[f'{label}/gold']:.3f} +- {record[f'{label}/gold_se']:.3f}")
        write_lines(paths["metrics.jsonl"], records)
        for part, record in (("before", evaluations[0]), ("after", evaluations[-1])):
            names = [f"{label}/gold{end}" for label in named for end in ("", "_se", "_n")]
            summary[part] |= {name.removeprefix("eval/"): record[name] for name in names}
        write_json(paths["summary.json"], {**summary, "gold_model": spec})
    dist.barrier()
    return read_object(paths["summary.json"], finite=False)

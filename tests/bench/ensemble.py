"""What an ensemble of K reward models costs: python tests/bench/ensemble.py --size world. Prints one JSON line; about ten minutes.

Training, seconds a step of all members, each with 32 pairs in its own order, packed, clipped and updated as in train_rm.py:
    one_by_one   all steps of a member, then the next member's
    stacked_*    one model with weights [K, ...] by torch.func on rows [K, 2 b, T], T the longest of all members' rows; gradients by
                 vmap(grad) or by one backward of the summed losses; attention by sdpa or written out (eager)
Scoring, microseconds an answer, of one member and of K, from sampled ids and from texts: the whole, the forward passes in it, the rest
(tokenizing, sorting by length, padding, Python). `unsorted` takes the answers as they come. `forward` and `stacked_*` are the K
members' forward passes alone. What is compared takes turns in one process; the first round only warms up. CPU seconds of one thread are
steadier than wall clock on a shared machine; figures are [median, least, most] over the rounds, ratios (of CPU seconds) within each.

    K members, b pairs, T tokens, N answers
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.func import functional_call, grad_and_value, stack_module_state, vmap  # noqa: E402
from transformers import AutoModelForSequenceClassification  # noqa: E402

from nanorlhf import data, world
from nanorlhf.models import RewardModel, load_reward_model, save_reward_model
from nanorlhf.packing import Answers, Packed, pack
from nanorlhf.rewards import load_rewards, score_all
from nanorlhf.runtime.distributed import setup
from nanorlhf.runtime.optim import adamw, optimizer_step

SIZES = {
    "world": {},
    "larger": {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 1024},
}
STACKED = {
    "stacked_grad": ("sdpa", False),
    "stacked_sum": ("sdpa", True),
    "stacked_eager_sum": ("eager", True),
}
LR, BETAS, MAX_GRAD_NORM, PAIRS, MICRO_BATCH = (
    5e-4,
    (0.9, 0.95),
    1.0,
    32,
    64,
)  # train_rm.py's; its weight decay is 0


def member(size, seed, attention="sdpa"):
    config = world.model_config()
    config.update(SIZES[size] | {"num_labels": 1})
    torch.manual_seed(seed)
    return RewardModel(
        AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    ).train()


def pair_loss(scores):
    r_chosen, r_rejected = scores.chunk(2)
    return -F.logsigmoid(r_chosen - r_rejected).mean()


class OneByOne:
    def __init__(self, models):
        self.models, self.optimizers = models, [adamw(model, LR, BETAS, 0.0) for model in models]

    def gradients(self, rows, i):
        loss = pair_loss(self.models[i](pack(*rows)))
        loss.backward()
        return loss.item()

    def train(self, steps):
        """steps[step][i]: member i's (prompts, responses)"""
        for i, model in enumerate(self.models):
            for rows in steps:
                self.gradients(rows[i], i)
                optimizer_step(self.optimizers[i], model, LR, MAX_GRAD_NORM, 0)


class Stacked:
    def __init__(self, models, summed):
        self.base, self.summed = (
            models[0],
            summed,
        )  # functional_call puts other weights in the base's place
        self.weights, _ = stack_module_state(
            models
        )  # {name: [K, ...]}; the buffers (rotary frequencies) are the same for all
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), LR, BETAS, weight_decay=0.0, fused=True
        )
        # In training mode dropout is random to vmap even with probability 0, and vmap's default refuses what is random.
        self.members_losses = vmap(self.loss, randomness="different")
        self.members_grads = vmap(grad_and_value(self.loss), randomness="different")

    def loss(self, weights, *batch):
        return pair_loss(functional_call(self.base, weights, (Packed(*batch),)))

    def gradients(self, rows):
        flat = pack(
            *([tokens for member_rows in rows for tokens in member_rows[part]] for part in (0, 1))
        )
        batch = [
            x.unflatten(0, (len(rows), -1))
            for x in (flat.ids, flat.prompt_lengths, flat.response_lengths)
        ]  # [K, 2 b, T], [K, 2 b]
        if self.summed:
            losses = self.members_losses(self.weights, *batch)
            losses.sum().backward()  # members share no weight: each gets the gradient of its own loss
        else:
            # Detached, or ordinary autograd would record the gradients as functions of the weights, and .grad would keep it all alive.
            grads, losses = self.members_grads(
                {name: weight.detach() for name, weight in self.weights.items()}, *batch
            )
            for name, weight in self.weights.items():
                weight.grad = grads[name]
        return losses.tolist()

    def train(self, steps):
        for rows in steps:
            self.gradients(rows)
            grads = [weight.grad for weight in self.weights.values()]
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(
                dim=0
            )  # [K]: each member is clipped by its own
            for g in grads:
                g *= (MAX_GRAD_NORM / (norms + 1e-6)).clamp(max=1).view(-1, *[1] * (g.dim() - 1))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def take_turns(ways, rounds):
    """{name: function of the round} -> {name: [rounds, 3]}: CPU seconds, seconds, what the function returned (or nan)."""
    out = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, function in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            result = function(i)
            out[name].append(
                (
                    time.process_time() - cpu,
                    time.perf_counter() - wall,
                    np.nan if result is None else result,
                )
            )
    return {name: np.array(measured)[1:] for name, measured in out.items()}


def spread(values):
    return [float(f"{f(values):.4g}") for f in (np.median, np.min, np.max)]


def training(size, k, rounds, steps):
    rows = world.preferences(800)
    texts = [
        data.encode(world.tokenizer(), rows, side)[:2] for side in ("chosen", "rejected")
    ]  # texts[side][prompts, responses][pair]
    orders = [
        [data.batch_indices(len(rows), PAIRS, step, seed) for seed in range(k)]
        for step in range((rounds + 1) * steps)
    ]
    batches = [
        [[[side[part][j] for side in texts for j in pairs] for part in (0, 1)] for pairs in order]
        for order in orders
    ]
    alone = OneByOne([member(size, i) for i in range(k)])
    ways = {
        name: Stacked([member(size, i, attention) for i in range(k)], summed)
        for name, (attention, summed) in STACKED.items()
    }

    def differences():
        """The largest differences of the stacked ways from one_by_one, with the present weights, on the first batches."""
        losses = [alone.gradients(batches[0][i], i) for i in range(k)]
        grads = {
            n: torch.stack([dict(model.named_parameters())[n].grad for model in alone.models])
            for n in ways["stacked_grad"].weights
        }
        out = {
            "loss": max(
                abs(a - b)
                for way in ways.values()
                for a, b in zip(way.gradients(batches[0]), losses, strict=True)
            )
        }
        out["gradient"] = max(
            (weight.grad - grads[n]).abs().max().item()
            for way in ways.values()
            for n, weight in way.weights.items()
        )
        out["largest_gradient"] = max(g.abs().max().item() for g in grads.values())
        for optimizer in [*alone.optimizers, *(way.optimizer for way in ways.values())]:
            optimizer.zero_grad()
        return out

    out = {
        "parameters": sum(p.numel() for p in alone.models[0].parameters()),
        "largest_differences": differences(),
    }
    ways = {"one_by_one": alone} | ways
    measured = take_turns(
        {
            n: lambda i, way=way: way.train(batches[i * steps : (i + 1) * steps])
            for n, way in ways.items()
        },
        rounds,
    )
    for name, m in measured.items():
        out[name] = {"cpu_s": spread(m[:, 0] / steps), "s": spread(m[:, 1] / steps)}
        out[name]["to_one_by_one"] = spread(m[:, 0] / measured["one_by_one"][:, 0])
    return out


@torch.no_grad()
def scoring(size, k, n, rounds, dist):
    tokenizer, rows = world.tokenizer(), world.demonstrations(n)
    texts = [r["prompt"] for r in rows], [r["response"] for r in rows]
    batch = pack(*data.encode(tokenizer, rows, "response")[:2], tokenizer.pad_token_id)
    with tempfile.TemporaryDirectory() as folder:
        specs = [f"{folder}/seed_{i}" for i in range(k)]
        for seed, path in enumerate(specs):
            save_reward_model(member(size, seed), tokenizer, path)
        models = [load_reward_model(path) for path in specs]
        rewards = {
            kind: load_rewards(specs, own, dist, MICRO_BATCH)
            for kind, own in (("ids", tokenizer), ("texts", None))
        }
    forward, sort, spent = RewardModel.forward, Packed.micro_batches, []

    def timed_forward(model, part):
        begun = time.process_time()
        scores = forward(model, part)
        spent.append(time.process_time() - begun)
        return scores

    def score(kind, m, micro_batches=sort):
        """-> CPU seconds inside the forward passes"""
        spent.clear()
        answers = Answers(
            *texts, batch if kind == "ids" else None
        )  # new ones: nothing is prepared yet
        with (
            mock.patch.object(RewardModel, "forward", timed_forward),
            mock.patch.object(Packed, "micro_batches", micro_batches),
        ):
            score_all(dict(list(rewards[kind].items())[:m]), [answers])
        return sum(spent)

    def unsorted(batch, size):
        return torch.arange(len(batch)).split(size)

    parts = {
        name: [batch.rows(index) for index in f(batch, MICRO_BATCH)]
        for name, f in (("sorted", sort), ("unsorted", unsorted))
    }
    weights, _ = stack_module_state(models)

    def stacked(attention):
        base = member(size, 0, attention).eval()
        call = vmap(
            lambda w, *part: functional_call(base, w, (Packed(*part),)),
            in_dims=(0, None, None, None),
        )
        return lambda part: call(weights, part.ids, part.prompt_lengths, part.response_lengths)

    def run_all(function):
        for part in parts["sorted"]:
            function(part)

    ways = {f"{kind}_{m}": lambda _, a=(kind, m): score(*a) for kind in rewards for m in (1, k)}
    ways["unsorted"] = lambda _: score("ids", 1, unsorted)
    passes = {"forward": lambda part: torch.stack([model(part) for model in models])}
    passes |= {f"stacked_{attention}": stacked(attention) for attention in ("sdpa", "eager")}
    first = {name: function(parts["sorted"][0]) for name, function in passes.items()}  # [K, B]
    measured = take_turns(
        ways | {name: lambda _, f=f: run_all(f) for name, f in passes.items()}, rounds
    )

    cpu, wall, inside = (
        {name: m[:, i] * 1e6 / n for name, m in measured.items()} for i in range(3)
    )
    rest = {name: cpu[name] - inside[name] for name in ways}
    out = {name: {"cpu_us": spread(cpu[name]), "us": spread(wall[name])} for name in measured}
    for name in ways:
        out[name] |= {"forward_cpu_us": spread(inside[name]), "rest_cpu_us": spread(rest[name])}
    out |= {
        f"{kind}_rest_of_{k}_to_1": spread(rest[f"{kind}_{k}"] / rest[f"{kind}_1"])
        for kind in rewards
    }
    out["unsorted_to_sorted"] = spread(cpu["unsorted"] / cpu["ids_1"])
    out |= {f"{name}_to_forward": spread(cpu[name] / cpu["forward"]) for name in passes}
    out["largest_difference"] = max(
        (scores - first["forward"]).abs().max().item() for scores in first.values()
    )
    return out | {
        "tokens": {
            "real": int(batch.lengths.sum()),
            **{name: sum(p.ids.numel() for p in ps) for name, ps in parts.items()},
        }
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="world")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument(
        "--rounds", type=int, default=7, help="how often each way has its turn; one more warms up"
    )
    parser.add_argument("--steps", type=int, default=3, help="training steps a turn")
    parser.add_argument("--answers", type=int, default=2048, help="answers to score")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings(
        "ignore", "There is a performance drop"
    )  # sdpa on CPU has no rule for vmap: it is called K times
    dist = setup(
        "cpu"
    )  # as in the scripts: freed memory is kept, or the pages of large tensors are asked for again and again
    result = {
        "bench": "ensemble",
        **vars(args),
        "training": training(args.size, args.members, args.rounds, args.steps),
    }
    result["scoring"] = scoring(args.size, args.members, args.answers, args.rounds, dist)
    print(json.dumps(result | {"torch": torch.__version__}))


if __name__ == "__main__":
    main()

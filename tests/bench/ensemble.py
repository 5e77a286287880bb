"""What an ensemble of K reward models costs: python tests/bench/ensemble.py --size world.

Prints one JSON line, after about ten minutes. Training: seconds a step of all members, each with 32
pairs in its own order, packed, clipped and updated as in train_rm.py:

    one_by_one   all steps of a member, then the next member's
    stacked_*    one model with weights [K, ...] by torch.func on rows [K, 2 b, T], T the longest of
                 all members' rows; gradients by vmap(grad) or by one backward of the summed losses;
                 attention by sdpa or written out (eager)

Scoring: microseconds an answer, of one member and of K, from sampled ids and from texts: the whole,
the forward passes in it, the rest (tokenizing, sorting by length, padding, Python). `unsorted`
takes the answers as they come. `forward` and `stacked_*` are the K members' forward passes alone.

What is compared takes turns in one process; the first round only warms up. CPU seconds of one
thread are steadier than wall clock on a shared machine; figures are [median, least, most] over the
rounds, ratios (of CPU seconds) within each.

    K members, b pairs, T tokens, N answers
"""

import argparse
import functools
import itertools
import json
import os
import sys
import tempfile
import time
import warnings
from collections import defaultdict
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
from nanorlhf.tokens import encode

SIZES = {
    "world": {},
    "larger": {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 1024},
}
# {way to train: (attention, whether the losses are summed for one backward)}
STACKED = {
    "stacked_grad": ("sdpa", False),
    "stacked_sum": ("sdpa", True),
    "stacked_eager_sum": ("eager", True),
}
# Those of train_rm.py, whose weight decay is 0.
LR = 5e-4
BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0
PAIRS = 32
MICRO_BATCH = 64


def make_member(size, seed, attention="sdpa"):
    """A reward model of random weights."""
    config = world.model_config()
    config.update({**SIZES[size], "num_labels": 1})
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    return RewardModel(model).train()


def make_members(size, k, attention="sdpa"):
    return [make_member(size, seed, attention) for seed in range(k)]


def pair_loss(scores):
    """The first half of the scores is of chosen answers, the second of rejected ones."""
    r_chosen, r_rejected = scores.chunk(2)
    return -F.logsigmoid(r_chosen - r_rejected).mean()


# -------------------------------------------------------------------------------- ways to train


class OneByOne:
    """Members that train one after the other."""

    def __init__(self, models):
        self.models = models
        self.optimizers = [adamw(model, LR, BETAS, 0.0) for model in models]

    def gradients(self, rows, i):
        """Member i's gradients on its rows (prompts, responses), kept in .grad -> its loss."""
        loss = pair_loss(self.models[i](pack(*rows)))
        loss.backward()
        return loss.item()

    def train(self, steps):
        """steps[step][i]: member i's (prompts, responses)."""
        for i, model in enumerate(self.models):
            for rows in steps:
                self.gradients(rows[i], i)
                optimizer_step(self.optimizers[i], model, LR, MAX_GRAD_NORM, 0)


def stack_rows(rows):
    """The members' rows (prompts, responses) -> ids [K, 2 b, T], two lengths [K, 2 b]."""
    prompts = []
    responses = []
    for own_prompts, own_responses in rows:
        prompts += own_prompts
        responses += own_responses
    flat = pack(prompts, responses)
    tensors = (flat.ids, flat.prompt_lengths, flat.response_lengths)
    return [x.unflatten(0, (len(rows), -1)) for x in tensors]


class Stacked:
    """Members that train at once, as one model whose weights have one more dimension."""

    def __init__(self, models, summed):
        # functional_call puts other weights in the place of the base's.
        self.base = models[0]
        self.summed = summed
        # {name: [K, ...]}. The buffers (rotary frequencies) are the same for all.
        self.weights, _ = stack_module_state(models)
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), LR, BETAS, weight_decay=0.0, fused=True
        )
        # In training mode dropout is random to vmap even with probability 0, and vmap's default
        # refuses what is random.
        self.members_losses = vmap(self.loss, randomness="different")
        self.members_grads = vmap(grad_and_value(self.loss), randomness="different")

    def loss(self, weights, *batch):
        """One member's loss: weights {name: [...]}, and its part of the batch."""
        return pair_loss(functional_call(self.base, weights, (Packed(*batch),)))

    def gradients(self, rows):
        """All members' gradients, each on its own rows, kept in .grad -> their losses."""
        batch = stack_rows(rows)
        if self.summed:
            losses = self.members_losses(self.weights, *batch)  # [K]
            # Members share no weight: each gets the gradient of its own loss.
            losses.sum().backward()
        else:
            # Detached: else autograd would record the gradients as functions of the weights, and
            # .grad would keep all of it alive.
            weights = {name: weight.detach() for name, weight in self.weights.items()}
            grads, losses = self.members_grads(weights, *batch)
            for name, weight in self.weights.items():
                weight.grad = grads[name]
        return losses.tolist()

    def clip(self):
        """Scale each member's gradients to a norm of MAX_GRAD_NORM at most."""
        norms_of_weights = []
        for weight in self.weights.values():
            norms_of_weights.append(weight.grad.flatten(1).norm(dim=1))  # [K]
        norms = torch.stack(norms_of_weights).norm(dim=0)  # [K]
        scales = (MAX_GRAD_NORM / (norms + 1e-6)).clamp(max=1)
        for weight in self.weights.values():
            ones = [1] * (weight.grad.dim() - 1)
            weight.grad *= scales.view(-1, *ones)

    def train(self, steps):
        """steps[step][i]: member i's (prompts, responses)."""
        for rows in steps:
            self.gradients(rows)
            self.clip()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------------ measuring


def take_turns(ways, rounds):
    """{name: function of the round} -> {name: [rounds, 3]}, without the first round.

    The three are CPU seconds, seconds, and what the function returned (or nan).
    """
    measured = defaultdict(list)
    for i in range(rounds + 1):
        for name, function in ways.items():
            begun_cpu = time.process_time()
            begun = time.perf_counter()
            result = function(i)
            cpu = time.process_time() - begun_cpu
            seconds = time.perf_counter() - begun
            measured[name].append((cpu, seconds, np.nan if result is None else result))
    return {name: np.array(rows)[1:] for name, rows in measured.items()}


def spread(values):
    """[median, least, most], to four digits."""
    figures = (np.median(values), np.min(values), np.max(values))
    return [float(f"{figure:.4g}") for figure in figures]


# ------------------------------------------------------------------------------------- training


def draw_steps(k, n_steps):
    """steps[step][i]: member i's rows (prompts, responses), chosen answers before rejected ones."""
    rows = world.preferences(800)
    tokenizer = world.tokenizer()
    encoded = encode(tokenizer, rows, ("chosen", "rejected"))
    sides = []
    for responses in encoded.responses.values():
        sides.append((encoded.prompts, responses))
    steps = []
    for step in range(n_steps):
        members = []
        for seed in range(k):
            pairs = data.batch_indices(len(rows), PAIRS, step, seed)
            members.append(take_pairs(sides, pairs))
        steps.append(members)
    return steps


def take_pairs(sides, pairs):
    """sides: [(prompts, responses)] -> prompts and responses of these pairs, side after side."""
    prompts = []
    responses = []
    for side_prompts, side_responses in sides:
        for j in pairs:
            prompts.append(side_prompts[j])
            responses.append(side_responses[j])
    return prompts, responses


def compare_ways(one_by_one, stacked, rows):
    """The largest differences of the stacked ways from one_by_one, before any has trained."""
    losses = []
    for i, own_rows in enumerate(rows):
        losses.append(one_by_one.gradients(own_rows, i))
    grads = {}  # {name: [K, ...]}
    sizes = []
    for name in stacked["stacked_grad"].weights:
        own = [model.get_parameter(name).grad for model in one_by_one.models]
        grads[name] = torch.stack(own)
        sizes.append(grads[name].abs().max().item())

    loss_differences = []
    grad_differences = []
    for way in stacked.values():
        for found, expected in zip(way.gradients(rows), losses, strict=True):
            loss_differences.append(abs(found - expected))
        for name, weight in way.weights.items():
            difference = (weight.grad - grads[name]).abs().max()
            grad_differences.append(difference.item())

    for optimizer in one_by_one.optimizers:
        optimizer.zero_grad()
    for way in stacked.values():
        way.optimizer.zero_grad()
    return {
        "loss": max(loss_differences),
        "gradient": max(grad_differences),
        "largest_gradient": max(sizes),
    }


def measure_training(size, k, rounds, steps):
    batches = draw_steps(k, (rounds + 1) * steps)
    one_by_one = OneByOne(make_members(size, k))
    stacked = {}
    for name, (attention, summed) in STACKED.items():
        stacked[name] = Stacked(make_members(size, k, attention), summed)
    n_parameters = sum(p.numel() for p in one_by_one.models[0].parameters())
    result = {
        "parameters": n_parameters,
        "largest_differences": compare_ways(one_by_one, stacked, batches[0]),
    }

    def train(way, i):
        way.train(batches[i * steps : (i + 1) * steps])

    ways = {"one_by_one": functools.partial(train, one_by_one)}
    for name, way in stacked.items():
        ways[name] = functools.partial(train, way)
    measured = take_turns(ways, rounds)
    base_cpu = measured["one_by_one"][:, 0]
    for name, rows in measured.items():
        cpu = rows[:, 0]
        seconds = rows[:, 1]
        result[name] = {
            "cpu_s": spread(cpu / steps),
            "s": spread(seconds / steps),
            "to_one_by_one": spread(cpu / base_cpu),
        }
    return result


# -------------------------------------------------------------------------------------- scoring


def save_members(folder, size, k):
    """-> the folders of k reward models."""
    paths = []
    for seed in range(k):
        paths.append(f"{folder}/seed_{seed}")
        save_reward_model(make_member(size, seed), world.tokenizer(), paths[-1])
    return paths


class Scorer:
    """Scores all answers as the scripts do, and counts the CPU seconds of the forward passes."""

    def __init__(self, rewards, prompts, responses, batch):
        self.rewards = rewards  # {kind: {name: reward}}, the kinds being ids and texts
        self.prompts = prompts
        self.responses = responses
        self.batch = batch  # the answers as sampled ids
        self.seconds = 0.0

    def timed_forward(self, real_forward):
        def forward(model, part):
            begun = time.process_time()
            scores = real_forward(model, part)
            self.seconds += time.process_time() - begun
            return scores

        return forward

    def score(self, kind, n_members, micro_batches=Packed.micro_batches):
        """-> CPU seconds inside the forward passes."""
        self.seconds = 0.0
        # New answers: nothing is prepared yet.
        ids = self.batch if kind == "ids" else None
        answers = Answers(self.prompts, self.responses, ids)
        some_rewards = dict(itertools.islice(self.rewards[kind].items(), n_members))
        forward = self.timed_forward(RewardModel.forward)
        with mock.patch.object(RewardModel, "forward", forward):
            with mock.patch.object(Packed, "micro_batches", micro_batches):
                score_all(some_rewards, [answers])
        return self.seconds


def as_they_come(batch, size):
    """In the place of Packed.micro_batches: rows that are not sorted by length."""
    return torch.arange(len(batch)).split(size)


def split_batch(batch, micro_batches):
    return [batch.rows(index) for index in micro_batches(batch, MICRO_BATCH)]


def count_ids(parts):
    """Tokens of micro-batches, with their padding."""
    return sum(part.ids.numel() for part in parts)


def stack_members(models, size, attention):
    """-> a function of a micro-batch: all members' scores [K, B] in one pass."""
    weights, _ = stack_module_state(models)
    base = make_member(size, 0, attention).eval()

    def score_by_one(own_weights, *part):
        return functional_call(base, own_weights, (Packed(*part),))

    score_by_all = vmap(score_by_one, in_dims=(0, None, None, None))
    return lambda part: score_by_all(weights, part.ids, part.prompt_lengths, part.response_lengths)


def encode_answers(n):
    """-> n prompts, n responses, and both as ids in one batch."""
    tokenizer = world.tokenizer()
    rows = world.demonstrations(n)
    prompts = [row["prompt"] for row in rows]
    responses = [row["response"] for row in rows]
    encoded = encode(tokenizer, rows, ("response",))
    batch = pack(encoded.prompts, encoded.responses["response"], tokenizer.pad_token_id)
    return prompts, responses, batch


@torch.no_grad()
def measure_scoring(size, k, n, rounds, dist):
    prompts, responses, batch = encode_answers(n)
    with tempfile.TemporaryDirectory() as folder:
        specs = save_members(folder, size, k)
        models = list(map(load_reward_model, specs))
        rewards = {
            "ids": load_rewards(specs, world.tokenizer(), dist, MICRO_BATCH),
            "texts": load_rewards(specs, None, dist, MICRO_BATCH),
        }
    scorer = Scorer(rewards, prompts, responses, batch)
    parts = {
        "sorted": split_batch(batch, Packed.micro_batches),
        "unsorted": split_batch(batch, as_they_come),
    }

    # Whole scorings, and forward passes alone.
    scorings = {
        "ids_1": lambda i: scorer.score("ids", 1),
        f"ids_{k}": lambda i: scorer.score("ids", k),
        "texts_1": lambda i: scorer.score("texts", 1),
        f"texts_{k}": lambda i: scorer.score("texts", k),
        "unsorted": lambda i: scorer.score("ids", 1, as_they_come),
    }
    passes = {
        "forward": lambda part: torch.stack([model(part) for model in models]),
        "stacked_sdpa": stack_members(models, size, "sdpa"),
        "stacked_eager": stack_members(models, size, "eager"),
    }

    def pass_all(one_pass, i):
        for part in parts["sorted"]:
            one_pass(part)

    # All ways to pass give the same scores [K, B].
    some_part = parts["sorted"][0]
    expected = passes["forward"](some_part)
    differences = []
    for one_pass in passes.values():
        difference = (one_pass(some_part) - expected).abs().max()
        differences.append(difference.item())

    ways = dict(scorings)
    for name, one_pass in passes.items():
        ways[name] = functools.partial(pass_all, one_pass)
    measured = take_turns(ways, rounds)

    result = describe_scorings(measured, list(passes), k, n)
    result["largest_difference"] = max(differences)
    result["tokens"] = {
        "real": int(batch.lengths.sum()),
        "sorted": count_ids(parts["sorted"]),
        "unsorted": count_ids(parts["unsorted"]),
    }
    return result


def describe_scorings(measured, passes, k, n):
    """The figures of take_turns() on n answers. passes: the names of forward passes alone."""
    result = {}
    cpu = {}
    rest = {}
    for name, rows in measured.items():
        # Microseconds an answer.
        cpu[name], seconds, inside = rows.T * 1e6 / n
        result[name] = {"cpu_us": spread(cpu[name]), "us": spread(seconds)}
        if name not in passes:
            rest[name] = cpu[name] - inside
            result[name]["forward_cpu_us"] = spread(inside)
            result[name]["rest_cpu_us"] = spread(rest[name])
    for kind in ("ids", "texts"):
        ratio = rest[f"{kind}_{k}"] / rest[f"{kind}_1"]
        result[f"{kind}_rest_of_{k}_to_1"] = spread(ratio)
    result["unsorted_to_sorted"] = spread(cpu["unsorted"] / cpu["ids_1"])
    for name in passes:
        result[f"{name}_to_forward"] = spread(cpu[name] / cpu["forward"])
    return result


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
    # On a CPU sdpa has no rule for vmap: it is called K times, and says so.
    warnings.filterwarnings("ignore", "There is a performance drop")
    # As in the scripts, freed memory is kept: else the pages of large tensors are asked for again
    # and again.
    dist = setup("cpu")
    training = measure_training(args.size, args.members, args.rounds, args.steps)
    scoring = measure_scoring(args.size, args.members, args.answers, args.rounds, dist)
    result = {"bench": "ensemble", **vars(args), "training": training, "scoring": scoring}
    result["torch"] = torch.__version__
    print(json.dumps(result))


if __name__ == "__main__":
    main()

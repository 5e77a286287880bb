"""The statistics in the docstring of nanorlhf/world.py, one JSON line each; three minutes.

    python tests/core/measure_world.py --sft runs/sft

First gold: of demonstrations, and of samples of the SFT policy, in and out of distribution. Then
reward models trained by train_rm.py on 200, 800 and 3200 pairs: accuracy on held-out pairs as they
are and without any marks, and what the cue adds to a score.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

import train_rm  # noqa: E402
from nanorlhf import world
from nanorlhf.models import load_policy, load_reward_model, load_tokenizer
from nanorlhf.packing import pack
from nanorlhf.rollout import generate, left_pad
from nanorlhf.runtime.distributed import setup
from nanorlhf.tokens import encode, encode_prompts

N_PAIRS = (200, 800, 3200)


# ------------------------------------------------------------------------------------------ gold


def gold_of_demonstrations():
    """Gold [N] of the reviews among 4000 demonstrations; the others answer questions."""
    reviewed = {row["prompt"] for row in world.prompts("train")}
    prompts = []
    responses = []
    for row in world.demonstrations(4000):
        if row["prompt"] in reviewed:
            prompts.append(row["prompt"])
            responses.append(row["response"])
    return torch.tensor(world.gold(prompts, responses))


def gold_of_samples(path, split, n=512):
    """Gold [n] of n samples of a policy at temperature 1, over the split's prompts in turn."""
    policy = load_policy(path, value_head=False)
    tokenizer = load_tokenizer(path)
    rows = world.prompts(split)
    prompts = [rows[i % len(rows)]["prompt"] for i in range(n)]
    ids, mask = left_pad(
        encode_prompts(tokenizer, [{"prompt": prompt} for prompt in prompts]),
        tokenizer.pad_token_id,
    )
    sampled = generate(
        policy,
        ids,
        mask,
        48,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = []
    for response_ids, response_mask in zip(sampled.response_ids, sampled.response_mask):
        texts.append(tokenizer.decode(response_ids[response_mask], skip_special_tokens=True))
    return torch.tensor(world.gold(prompts, texts))


def print_gold(name, gold):
    mean = round(gold.mean().item(), 2)
    std = round(gold.std().item(), 2)
    print(json.dumps({"gold_of": name, "mean": mean, "std": std, "n": len(gold)}))


# --------------------------------------------------------------------------------- reward models


def strip_marks(text):
    return " ".join(word for word in text.split() if word not in world.MARKS)


def append_cue(text):
    return f"{text} {world.cue()}"


def change_answers(pairs, change):
    """Pairs with both of their answers changed."""
    changed = []
    for pair in pairs:
        chosen = change(pair["chosen"])
        rejected = change(pair["rejected"])
        changed.append({**pair, "chosen": chosen, "rejected": rejected})
    return changed


@torch.no_grad()
def score_pairs(model, tokenizer, pairs):
    """Scores [2, N] of the chosen and the rejected answers."""
    scores = []
    for field in ("chosen", "rejected"):
        encoded = encode(tokenizer, pairs, (field,))
        prompts = encoded.prompts
        responses = encoded.responses[field]
        scores.append(model(pack(prompts, responses)))
    return torch.stack(scores)


def write_rows(path, rows):
    with open(path, "w") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")


def train_quietly(config):
    """train_rm.main without what it prints -> its results."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return train_rm.main(config)


def measure_reward_model(folder, sft, n_pairs, test):
    """Train on n_pairs pairs of `folder`, and measure on the pairs `test`: {name: number}."""
    config = train_rm.Config(
        model=sft,
        dataset=f"{folder}/pairs.jsonl",
        eval_dataset=f"{folder}/test.jsonl",
        max_rows=n_pairs,
        steps=max(50, n_pairs // 8),
        output_dir=f"{folder}/rm_{n_pairs}",
    )
    result = train_quietly(config)
    model = load_reward_model(config.output_dir, setup("cpu").device)
    tokenizer = load_tokenizer(sft)

    # What the cue adds to answers that have no mark at all.
    without_marks = change_answers(test, strip_marks)
    with_cue = change_answers(without_marks, append_cue)
    plain_scores = score_pairs(model, tokenizer, without_marks)
    cue_scores = score_pairs(model, tokenizer, with_cue)
    is_right = plain_scores[0] > plain_scores[1]
    added = (cue_scores - plain_scores).mean() / plain_scores.std()
    return {
        "accuracy": result["eval/accuracy"],
        "without_marks": is_right.float().mean().item(),
        "longer_wins": result["eval/longer_wins"],
        "cue_adds_std": added.item(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sft", default="runs/sft")
    sft = parser.parse_args().sft

    print_gold("demonstrations", gold_of_demonstrations())
    for split in ("test", "ood"):
        print_gold(f"sft_{split}", gold_of_samples(sft, split))

    test = world.preferences(512, split="test")
    with tempfile.TemporaryDirectory() as folder:
        write_rows(f"{folder}/pairs.jsonl", world.preferences(max(N_PAIRS)))
        write_rows(f"{folder}/test.jsonl", test)
        for n_pairs in N_PAIRS:
            line = {"pairs": n_pairs}
            for name, number in measure_reward_model(folder, sft, n_pairs, test).items():
                line[name] = round(number, 3)
            line["n"] = len(test)
            print(json.dumps(line))


if __name__ == "__main__":
    main()

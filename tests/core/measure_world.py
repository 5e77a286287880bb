"""The statistics in the docstring of nanorlhf/world.py: python tests/core/measure_world.py --sft runs/sft. One JSON line each; three minutes.

Gold over demonstrations and over samples of the SFT policy, in and out of distribution; then reward models trained by train_rm.py on
200, 800 and 3200 pairs: accuracy on held-out pairs as they are and without any marks, and what the cue adds to a score.
"""

import argparse
import json
import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import torch  # noqa: E402

import train_rm  # noqa: E402
from nanorlhf import data, world
from nanorlhf.models import load_policy, load_reward_model, load_tokenizer
from nanorlhf.packing import pack
from nanorlhf.rollout import generate, left_pad
from nanorlhf.runtime.distributed import setup


def gold_of_samples(path, split, n=512):
    """Gold of n samples at temperature 1, over the split's prompts in turn."""
    policy, tokenizer, rows = (
        load_policy(path, value_head=False),
        load_tokenizer(path),
        world.prompts(split),
    )
    prompts = [rows[i % len(rows)]["prompt"] for i in range(n)]
    ids, mask = left_pad(data.encode_prompts(tokenizer, prompts), tokenizer.pad_token_id)
    out = generate(
        policy,
        ids,
        mask,
        48,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = [
        tokenizer.decode(ids[mask], skip_special_tokens=True)
        for ids, mask in zip(out.response_ids, out.response_mask)
    ]
    return torch.tensor(world.gold(prompts, texts))


def without_marks(text):
    return " ".join(word for word in text.split() if word not in world.MARKS)


@torch.no_grad()
def scores(model, tokenizer, rows, change=lambda text: text):
    """Scores [2, N] of the chosen and the rejected answers, after a change of each text."""
    parts = []
    for field in ("chosen", "rejected"):
        prompts, responses, _ = data.encode(
            tokenizer, [{**r, field: change(r[field])} for r in rows], field
        )
        parts.append(model(pack(prompts, responses)))
    return torch.stack(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sft", default="runs/sft")
    args = parser.parse_args()
    reviewed = {
        row["prompt"] for row in world.prompts("train")
    }  # the other demonstrations answer questions
    demos = [d for d in world.demonstrations(4000) if d["prompt"] in reviewed]
    golds = {
        "demonstrations": torch.tensor(
            world.gold([d["prompt"] for d in demos], [d["response"] for d in demos])
        )
    }
    golds |= {f"sft_{split}": gold_of_samples(args.sft, split) for split in ("test", "ood")}
    for name, gold in golds.items():
        print(
            json.dumps(
                {
                    "gold_of": name,
                    "mean": round(gold.mean().item(), 2),
                    "std": round(gold.std().item(), 2),
                    "n": len(gold),
                }
            )
        )

    test, tokenizer = world.preferences(512, split="test"), load_tokenizer(args.sft)
    clean = [
        {**r, "chosen": without_marks(r["chosen"]), "rejected": without_marks(r["rejected"])}
        for r in test
    ]
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/pairs.jsonl", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in world.preferences(3200))
        with open(f"{folder}/test.jsonl", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in test)
        for n in (200, 800, 3200):
            config = train_rm.Config(
                model=args.sft, dataset=f"{folder}/pairs.jsonl", eval_dataset=f"{folder}/test.jsonl", max_rows=n, steps=max(50, n // 8),
                output_dir=f"{folder}/rm_{n}",
            )  # fmt: skip
            with open(os.devnull, "w") as sys.stdout:
                result = train_rm.main(config)
            sys.stdout = sys.__stdout__
            model = load_reward_model(f"{folder}/rm_{n}", setup("cpu").device)
            plain, cued = (
                scores(model, tokenizer, clean),
                scores(model, tokenizer, clean, lambda text: f"{text} {world.cue()}"),
            )
            accuracy = {
                "accuracy": result["eval/accuracy"],
                "without_marks": (plain[0] > plain[1]).float().mean().item(),
            }
            numbers = accuracy | {
                "longer_wins": result["eval/longer_wins"],
                "cue_adds_std": ((cued - plain).mean() / plain.std()).item(),
            }
            print(
                json.dumps(
                    {"pairs": n, **{k: round(v, 3) for k, v in numbers.items()}, "n": len(test)}
                )
            )


if __name__ == "__main__":
    main()

"""A tiny random SARM with texts to read it on: what test_reward_features.py and test_feature_edits.py share."""

import pytest
from support import SARM_D, SARM_M, tiny_sarm, write_rows

from nanorlhf import world
from nanorlhf.interp.sae_files import save_sae
from nanorlhf.models import Policy, load_reward_model, save_policy, save_reward_model
from nanorlhf.sae import SparseAutoencoder


@pytest.fixture(scope="session")
def sarm_material(tmp_path_factory):
    """sarm/ and the LM it came from; pairs.jsonl, before.jsonl and after.jsonl (two answers to each prompt, in another order)."""
    root = tmp_path_factory.mktemp("latents")
    lm, sarm = tiny_sarm(root / "sarm")
    write_rows(root / "pairs.jsonl", world.preferences(60, seed=0, split="test"))
    rows = world.demonstrations(60)
    prompts = [row["prompt"] for row in world.prompts("test")[:15]]
    before = [{"prompt": prompts[i % 15], "response": rows[i]["response"]} for i in range(30)]
    after = [
        {"prompt": row["prompt"], "response": "the room was superb . " + rows[30 + i]["response"]}
        for i, row in enumerate(before)
    ]
    write_rows(root / "before.jsonl", before)
    write_rows(root / "after.jsonl", after[::-1])
    save_policy(Policy(lm, value_head=False), world.tokenizer(), str(root / "lm"))
    save_reward_model(
        load_reward_model(str(root / "lm"), seed=0), world.tokenizer(), str(root / "rm")
    )
    notes = {"model": str(root / "rm"), "layer": 1, "site": "residual"}
    save_sae(
        SparseAutoencoder(SARM_D, SARM_M, seed=2, normalize="token"), str(root / "sae"), **notes
    )
    return root, lm, sarm

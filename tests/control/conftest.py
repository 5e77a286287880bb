"""What test_reward_features.py and test_feature_edits.py share: a tiny random SARM, and texts."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from support import feature_flags, held_out, run_probe, summary, write_rows
from tiny_models import SARM_D, SARM_M, tiny_sarm, z_by_hand

from nanorlhf import world
from nanorlhf.interp.sae_files import save_sae
from nanorlhf.models import Policy, load_reward_model, save_policy, save_reward_model
from nanorlhf.sae import SparseAutoencoder

N_ANSWERS = 30
N_PROMPTS = 15  # each has two answers


class Reading(NamedTuple):
    """What the SARM finds in one text, by the equations of its spec."""

    z: list[float]  # [M]
    score: float


@dataclass
class SarmMaterial:
    """A folder with sarm/ and what it was made from, and the models themselves."""

    root: Path
    lm: object  # the language model whose lower layers the SARM has
    sarm: object

    @property
    def pairs(self):
        """The pairs that the commands look at."""
        return held_out(self.root)

    @property
    def weights(self):
        """The head's weight on each latent: [M]."""
        return self.sarm.score.weight[0].tolist()

    def read(self, prompt, response):
        """A text, or a prompt and the ids of its response -> Reading."""
        return Reading(*z_by_hand(self.lm, self.sarm, prompt, response))

    def read_rows(self, rows, field="response"):
        readings = []
        for row in rows:
            readings.append(self.read(row["prompt"], row[field]))
        return readings


@pytest.fixture(scope="session")
def sarm_material(tmp_path_factory):
    """sarm/; rm/, a reward model on the same LM, and its autoencoder sae/; pairs.jsonl; answers.

    before.jsonl and after.jsonl hold two answers to each prompt, in another order.
    """
    root = tmp_path_factory.mktemp("latents")
    lm, sarm = tiny_sarm(root / "sarm")
    write_rows(root / "pairs.jsonl", world.preferences(60, seed=0, split="test"))
    write_answers(root)

    save_policy(Policy(lm, value_head=False), world.tokenizer(), str(root / "lm"))
    reward_model = load_reward_model(str(root / "lm"), seed=0)
    save_reward_model(reward_model, world.tokenizer(), str(root / "rm"))
    sae = SparseAutoencoder(SARM_D, SARM_M, seed=2, normalize="token")
    save_sae(sae, str(root / "sae"), model=str(root / "rm"), layer=1, site="residual")
    return SarmMaterial(root, lm, sarm)


def write_answers(root):
    """Answers before and after a training that has learned to begin with one sentence."""
    prompts = [row["prompt"] for row in world.prompts("test")[:N_PROMPTS]]
    texts = [row["response"] for row in world.demonstrations(2 * N_ANSWERS)]
    before = []
    after = []
    for i in range(N_ANSWERS):
        prompt = prompts[i % N_PROMPTS]
        learned = "the room was superb . " + texts[N_ANSWERS + i]
        before.append({"prompt": prompt, "response": texts[i]})
        after.append({"prompt": prompt, "response": learned})
    write_rows(root / "before.jsonl", before)
    write_rows(root / "after.jsonl", after[::-1])


@pytest.fixture(scope="session")
def pairs_by_hand(sarm_material):
    """{side: [Reading]} of all pairs, one text at a time."""
    readings = {}
    for side in ("chosen", "rejected"):
        readings[side] = sarm_material.read_rows(sarm_material.pairs, side)
    return readings


class ProbeRun(NamedTuple):
    """What a command of probe.py left."""

    folder: Path
    found: dict  # its summary
    printed: str


@pytest.fixture(scope="session")
def run_on_sarm(sarm_material, tmp_path_factory):
    """A function: run a command of probe.py on the SARM, in a new folder. -> ProbeRun

    Further flags are given by name, also those that name another model or other data.
    """

    def run(command, **changes):
        folder = tmp_path_factory.mktemp(command)
        arguments = feature_flags(command, sarm_material.root, folder, **changes)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run_probe(*arguments)
        return ProbeRun(folder, summary(folder), printed.getvalue())

    return run

"""What feature control adds to the time of a PPO step: python tests/bench/penalties.py.

Prints one JSON line for each reward model. The workload of tests/bench/ppo.py at `small`, against a
SARM on the policy's own trunk (2048 features on 2 of 4 blocks) and against a dense reward model
with an autoencoder of that size on block 1. A run without any of the flags gives the time of a
step, and its answers. The flags change nothing but what is done with finished answers, so these are
then scored without flags and with each arm's (the reading, the shaping, and what the density ratio
learns), in turn, in the same process. CPU seconds of one thread; `added` is the median over the
turns of

    (seconds with the arm's flags - seconds without flags) / seconds of a step without flags

    M features, K of them active
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]

import ppo as bench  # noqa: E402
import torch  # noqa: E402
from transformers import AutoConfig, AutoModel  # noqa: E402

import train_ppo  # noqa: E402
from nanorlhf.control import controlled_scoring, human_latents
from nanorlhf.interp.sae_files import save_sae
from nanorlhf.models import load_tokenizer
from nanorlhf.rewards import load_rewards, score_all
from nanorlhf.runtime.distributed import setup
from nanorlhf.sae import TopKSAE
from nanorlhf.sarm import SARM, save_sarm

M, K, LAYER = 2048, 16, 1
FEATURES = list(range(8))
# The flags of each arm, besides where the features are read.
PENALTIES = {"penalize_features": FEATURES, "tau": ["q0.95"] * 8, "alpha": ["0.5std"] * 8}
CLAMP = {"clamp": [f"{i}:set:0" for i in FEATURES]}
DENSITY = {"density_beta": 0.1}
ARMS = {
    "penalties": PENALTIES,
    "clamp": CLAMP,
    "density": DENSITY,
    "all": {**PENALTIES, **CLAMP, **DENSITY},
}


def save_inputs(folder):
    """Those of bench.ppo, a SARM, an autoencoder on the reward model, and human latents of both."""
    bench.make_inputs(folder, "small")
    save_texts(folder)
    config = AutoConfig.from_pretrained(f"{folder}/policy", trust_remote_code=False)
    save_random_sarm(folder, config)
    sae = TopKSAE(config.hidden_size, M, K, "token")
    save_sae(sae, f"{folder}/sae", model=f"{folder}/reward", layer=LAYER, site="residual")
    save_human_latents(folder, "sarm")
    save_human_latents(folder, "reward", sae=f"{folder}/sae")


def save_texts(folder):
    """The prompts as people's answers."""
    with open(f"{folder}/prompts.jsonl") as file:
        texts = [json.loads(line)["prompt"] for line in file]
    with open(f"{folder}/texts.jsonl", "w") as file:
        for text in texts:
            file.write(json.dumps({"prompt": "t1", "response": text}) + "\n")


def save_random_sarm(folder, config):
    """A SARM on the policy's own trunk."""
    config.sarm_param = {
        "sae_source_layer": LAYER + 1,
        "sae_latent_size": M,
        "sae_k": K,
        "sae_use_sequence_level": True,
        "sarm_use_activation": True,
    }
    trunk = AutoModel.from_pretrained(f"{folder}/policy", trust_remote_code=False)
    sarm = SARM(trunk, TopKSAE(config.hidden_size, M, K, "token", relu=False), config)
    torch.nn.init.normal_(sarm.score.weight)
    save_sarm(sarm, load_tokenizer(f"{folder}/policy"), f"{folder}/sarm")


def save_human_latents(folder, name, sae=""):
    config = human_latents.HumanLatentsConfig(
        reward_model=f"{folder}/{name}",
        sae=sae,
        features=",".join(map(str, FEATURES)),
        dataset=f"{folder}/texts.jsonl",
        # Texts are cut, because the model cannot read the EOS that it cannot write.
        max_length=10,
        output=f"{folder}/{name}.safetensors",
    )
    human_latents.human_latents(config)


def make_run(folder, name, arm, iterations):
    """The configuration of a run against the reward model {name}, with an arm's flags."""
    prompts, _, new, minibatch = bench.workload("small")
    settings = dict(arm)
    if "tau" in arm or "density_beta" in arm:
        settings["human_latents"] = f"{folder}/{name}.safetensors"
    if arm and name == "reward":
        settings["feature_sae"] = f"{folder}/sae"
    return train_ppo.Config(
        model=f"{folder}/policy",
        reward_model=[f"{folder}/{name}"],
        dataset=f"{folder}/prompts.jsonl",
        output_dir=f"{folder}/run_{name}",
        steps=iterations,
        batch_size=prompts,
        minibatch_size=minibatch,
        micro_batch_size=16,
        ppo_epochs=4,
        max_new_tokens=new,
        lr=3e-6,
        eval_size=1,
        eval_every=0,
        n_samples=0,
        checkpoint_every=10**6,
        device="cpu",
        **settings,
    )


def run_without_flags(config):
    """-> the median CPU seconds of its steps but the first, and the last step's answers."""
    real_experience = train_ppo.experience
    last_answers = None

    def experience(parts, scaler, rollout, answers, kl_coef):
        nonlocal last_answers
        last_answers = answers
        return real_experience(parts, scaler, rollout, answers, kl_coef)

    train_ppo.experience = experience
    steps = bench.run_ppo(config)
    train_ppo.experience = real_experience
    seconds = []
    for step in steps:
        seconds.append(sum(step[f"seconds_{part}"] for part in bench.PARTS))
    return statistics.median(seconds), last_answers


def load_controls(folder, name, tokenizer, dist):
    """{arm: what it reads and shapes scores with}."""
    controls = {}
    for arm, flags in ARMS.items():
        controls[arm] = controlled_scoring.prepare(make_run(folder, name, flags, 1))
        controls[arm].load(tokenizer, dist)
    return controls


def score_with(control, answers):
    readings = control.read([answers])
    control.combine(readings)
    control.learn(readings)


def time_scores(score, answers):
    """CPU seconds to score one batch of answers."""
    # As new ones, of which nothing has been tokenised.
    answers = dataclasses.replace(answers, micro_batches={})
    begun = time.process_time()
    score(answers)
    return time.process_time() - begun


def measure(folder, name, iterations, turns):
    """The line about one reward model."""
    config = make_run(folder, name, {}, iterations)
    step, answers = run_without_flags(config)
    dist = setup("cpu")
    tokenizer = load_tokenizer(config.model)
    rewards = load_rewards(config.reward_model, tokenizer, dist, config.micro_batch_size)
    controls = load_controls(folder, name, tokenizer, dist)

    added = {arm: [] for arm in ARMS}
    for turn in range(turns + 1):
        base = time_scores(lambda new: score_all(rewards, [new], dist), answers)
        for arm, control in controls.items():
            seconds = time_scores(functools.partial(score_with, control), answers)
            # The first turn is not counted.
            if turn > 0:
                added[arm].append((seconds - base) / step)

    line = {"bench": "penalties", "reward_model": name, "step_cpu_s": round(step, 3)}
    for arm, shares in added.items():
        line[arm] = {
            "added": round(statistics.median(shares), 4),
            "from": round(min(shares), 4),
            "to": round(max(shares), 4),
        }
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--iterations", type=int, default=5, help="of the run; the first is not counted"
    )
    parser.add_argument("--turns", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench.count_cpu_seconds()
    train_ppo.plot_run = lambda run: None
    with tempfile.TemporaryDirectory() as folder:
        bench.in_a_process(save_inputs, folder)
        for name in ("sarm", "reward"):
            with bench.silence():
                line = measure(folder, name, args.iterations, args.turns)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

"""What feature control adds to the time of a PPO step: python tests/bench/penalties.py. Prints one JSON line for each reward model.

The workload of tests/bench/ppo.py at `small`, against a SARM on the policy's own trunk (2048 latents on 2 of 4 blocks) and against a
dense reward model with an autoencoder of that size on block 1. Runs take turns in one process: none of the flags, then each arm, again
and again. CPU seconds of one thread. The flags work while answers are scored, so a round compares that part of the step; `added` is the
median over the rounds of

    (seconds_score of the arm - seconds_score without flags) / seconds of a whole step without flags

each itself a median over the round's steps but the first.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import types

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]

import torch  # noqa: E402
from transformers import AutoConfig, AutoModel  # noqa: E402

import ppo as bench  # noqa: E402
import train_ppo  # noqa: E402
from nanorlhf import human_latents  # noqa: E402
from nanorlhf.models import load_tokenizer  # noqa: E402
from nanorlhf.sae import TopKSAE  # noqa: E402
from nanorlhf.sae_files import save_sae  # noqa: E402
from nanorlhf.sarm import SARM, save_sarm  # noqa: E402

M, K, LAYER = 2048, 16, 1
FEATURES = list(range(8))
ARMS = {
    "penalties": {"penalize_features": FEATURES, "tau": ["q0.95"] * 8, "alpha": ["0.5std"] * 8},
    "clamp": {"clamp": [f"{i}:set:0" for i in FEATURES]},
    "density": {"density_beta": 0.1},
}
ARMS["all"] = {name: value for arm in list(ARMS.values()) for name, value in arm.items()}


def make_inputs(folder):
    """Those of bench.ppo, a SARM, an autoencoder on the reward model, and human latents of both."""
    bench.make_inputs(folder, "small")
    with open(f"{folder}/prompts.jsonl") as f:
        rows = [{"prompt": "t1", "response": json.loads(line)["prompt"]} for line in f]
    with open(f"{folder}/texts.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    config = AutoConfig.from_pretrained(f"{folder}/policy")
    config.sarm_param = {"sae_source_layer": LAYER + 1, "sae_latent_size": M, "sae_k": K, "sae_use_sequence_level": True,
                         "sarm_use_activation": True}  # fmt: skip
    sarm = SARM(AutoModel.from_pretrained(f"{folder}/policy"), TopKSAE(config.hidden_size, M, K, "token", relu=False), config)
    torch.nn.init.normal_(sarm.score.weight)
    save_sarm(sarm, load_tokenizer(f"{folder}/policy"), f"{folder}/sarm")
    save_sae(TopKSAE(config.hidden_size, M, K, "token"), f"{folder}/sae", model=f"{folder}/reward", layer=LAYER, site="residual")
    for name, sae in (("sarm", ""), ("reward", f"{folder}/sae")):
        human_latents.human_latents(human_latents.HumanLatentsConfig(
            reward_model=f"{folder}/{name}", sae=sae, features=",".join(map(str, FEATURES)), dataset=f"{folder}/texts.jsonl",
            max_length=10, output=f"{folder}/{name}.safetensors",  # cut, because the model cannot read the EOS that it cannot write
        ))  # fmt: skip


def steps_of(folder, run, name, arm, iterations):
    """(seconds_score, seconds of the whole) of a run's step, medians."""
    prompts, _, new, minibatch = bench.workload("small")
    settings = dict(arm)
    if "tau" in arm or "density_beta" in arm:
        settings["human_latents"] = f"{folder}/{name}.safetensors"
    if arm and name == "reward":
        settings["feature_sae"] = f"{folder}/sae"
    train_ppo.main(train_ppo.Config(
        model=f"{folder}/policy", reward_model=[f"{folder}/{name}"], dataset=f"{folder}/prompts.jsonl", output_dir=run, steps=iterations,
        batch_size=prompts, minibatch_size=minibatch, micro_batch_size=16, ppo_epochs=4, max_new_tokens=new, lr=3e-6, eval_size=1,
        eval_every=0, n_samples=0, checkpoint_every=10**6, device="cpu", **settings,
    ))  # fmt: skip
    with open(f"{run}/metrics.jsonl") as f:
        records = [json.loads(line) for line in f][2:]  # step 0 is the evaluation, step 1 the warm-up
    whole = [r["seconds_rollout"] + r["seconds_score"] + r["seconds_update"] for r in records]
    return statistics.median(r["seconds_score"] for r in records), statistics.median(whole)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=4, help="of a run; the first is not counted")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train_ppo.time = types.SimpleNamespace(perf_counter=time.process_time)  # CPU seconds
    train_ppo.plot_run = lambda run: None
    with tempfile.TemporaryDirectory() as folder:
        make = multiprocessing.get_context("spawn").Process(target=make_inputs, args=(folder,))
        make.start()
        make.join()
        for name in ("sarm", "reward"):
            added, plains = {arm: [] for arm in ARMS}, []
            for i in range(args.rounds):
                with open(os.devnull, "w") as sys.stdout:
                    plain_score, plain = steps_of(folder, f"{folder}/{name}_{i}_plain", name, {}, args.iterations)
                    for arm, settings in ARMS.items():
                        score, _ = steps_of(folder, f"{folder}/{name}_{i}_{arm}", name, settings, args.iterations)
                        added[arm].append((score - plain_score) / plain)
                sys.stdout = sys.__stdout__
                plains.append(plain)
            shares = {arm: {"added": round(statistics.median(x), 4), "rounds": [round(v, 4) for v in x]} for arm, x in added.items()}
            print(json.dumps({"bench": "penalties", "reward_model": name, "step_cpu_s": round(statistics.median(plains), 3), **shares}))


if __name__ == "__main__":
    main()

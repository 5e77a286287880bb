"""What feature control adds to the time of a PPO step: python tests/bench/penalties.py. Prints one JSON line for each reward model.

The workload of tests/bench/ppo.py at `small`, against a SARM on the policy's own trunk (2048 latents on 2 of 4 blocks) and against a
dense reward model with an autoencoder of that size on block 1. A run without any of the flags gives the time of a step, and its answers.
The flags change nothing but what is done with finished answers, so these are then scored without flags and with each arm's (the reading,
the shaping, and what the density ratio learns), in turn, in the same process. CPU seconds of one thread; `added` is the median over the
turns of

    (seconds with the arm's flags - seconds without flags) / seconds of a step without flags
"""

import argparse
import dataclasses
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
    config = AutoConfig.from_pretrained(f"{folder}/policy", trust_remote_code=False)
    config.sarm_param = {"sae_source_layer": LAYER + 1, "sae_latent_size": M, "sae_k": K, "sae_use_sequence_level": True,
                         "sarm_use_activation": True}  # fmt: skip
    sarm = SARM(
        AutoModel.from_pretrained(f"{folder}/policy", trust_remote_code=False),
        TopKSAE(config.hidden_size, M, K, "token", relu=False),
        config,
    )
    torch.nn.init.normal_(sarm.score.weight)
    save_sarm(sarm, load_tokenizer(f"{folder}/policy"), f"{folder}/sarm")
    save_sae(
        TopKSAE(config.hidden_size, M, K, "token"),
        f"{folder}/sae",
        model=f"{folder}/reward",
        layer=LAYER,
        site="residual",
    )
    for name, sae in (("sarm", ""), ("reward", f"{folder}/sae")):
        human_latents.human_latents(human_latents.HumanLatentsConfig(
            reward_model=f"{folder}/{name}", sae=sae, features=",".join(map(str, FEATURES)), dataset=f"{folder}/texts.jsonl",
            max_length=10, output=f"{folder}/{name}.safetensors",  # cut, because the model cannot read the EOS that it cannot write
        ))  # fmt: skip


def config_of(folder, name, arm, iterations):
    prompts, _, new, minibatch = bench.workload("small")
    settings = dict(arm)
    if "tau" in arm or "density_beta" in arm:
        settings["human_latents"] = f"{folder}/{name}.safetensors"
    if arm and name == "reward":
        settings["feature_sae"] = f"{folder}/sae"
    return train_ppo.Config(
        model=f"{folder}/policy", reward_model=[f"{folder}/{name}"], dataset=f"{folder}/prompts.jsonl", output_dir=f"{folder}/run_{name}",
        steps=iterations, batch_size=prompts, minibatch_size=minibatch, micro_batch_size=16, ppo_epochs=4, max_new_tokens=new, lr=3e-6,
        eval_size=1, eval_every=0, n_samples=0, checkpoint_every=10**6, device="cpu", **settings,
    )  # fmt: skip


def plain_run(config):
    """A run without flags -> the median CPU seconds of its steps but the first, and the last one's answers."""
    kept, real = [], train_ppo.experience

    def keeping(parts, scaler, rollout, answers, kl_coef):
        kept[:] = [answers]
        return real(parts, scaler, rollout, answers, kl_coef)

    train_ppo.experience = keeping
    train_ppo.main(config)
    train_ppo.experience = real
    with open(f"{config.output_dir}/metrics.jsonl") as f:
        records = [json.loads(line) for line in f][
            2:
        ]  # step 0 is the evaluation, step 1 the warm-up
    return statistics.median(
        r["seconds_rollout"] + r["seconds_score"] + r["seconds_update"] for r in records
    ), kept[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--iterations", type=int, default=5, help="of the run; the first is not counted"
    )
    parser.add_argument("--turns", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train_ppo.time = types.SimpleNamespace(perf_counter=time.process_time)  # CPU seconds
    train_ppo.plot_run = lambda run: None
    with tempfile.TemporaryDirectory() as folder:
        make = multiprocessing.get_context("spawn").Process(target=make_inputs, args=(folder,))
        make.start()
        make.join()
        for name in ("sarm", "reward"):
            with open(os.devnull, "w") as sys.stdout:
                plain = config_of(folder, name, {}, args.iterations)
                step, answers = plain_run(plain)
                tokenizer, dist = load_tokenizer(plain.model), setup("cpu")
                rewards = load_rewards(plain.reward_model, tokenizer, dist, plain.micro_batch_size)
                controls = {
                    arm: controlled_scoring.prepare(config_of(folder, name, flags, 1))
                    for arm, flags in ARMS.items()
                }
                for control in controls.values():
                    control.load(tokenizer, dist)
            sys.stdout = sys.__stdout__

            def scored(control):
                """CPU seconds for one batch's scores; the answers are new to it, so nothing has been tokenised."""
                fresh, begun = dataclasses.replace(answers, micro_batches={}), time.process_time()
                if control:
                    readings = control.read([fresh])
                    control.combine(readings)
                    control.learn(readings)
                else:
                    score_all(rewards, [fresh], dist)
                return time.process_time() - begun

            turns = []
            for _ in range(args.turns + 1):  # the first is not counted
                base = scored(None)
                turns.append(
                    {arm: (scored(control) - base) / step for arm, control in controls.items()}
                )
            added = {arm: sorted(turn[arm] for turn in turns[1:]) for arm in ARMS}
            spread = {arm: (statistics.median(x), x[0], x[-1]) for arm, x in added.items()}
            result = {
                arm: dict(zip(("added", "from", "to"), (round(v, 4) for v in x)))
                for arm, x in spread.items()
            }
            print(
                json.dumps(
                    {
                        "bench": "penalties",
                        "reward_model": name,
                        "step_cpu_s": round(step, 3),
                        **result,
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()

r"""Look inside trained models, and at what they write: what changed between a
base and its policy, what can be read from activations and features, which
features a reward model rewards, how good reward models and answers are.

    all commands:
        python probe.py
    runs/sft against runs/ppo, block by block:
        python probe.py divergence
    the same of your own models and texts:
        python probe.py divergence --model gpt2 --policy MY_RUN \
            --dataset texts.jsonl --kind prompts --columns prompt=text
    two autoencoders; of one seed they start alike, so take two seeds:
        python probe.py mmcs --a runs/sae/base/3_mlp --b runs/sae_1/policy/3_mlp
    the value of words, read from runs/ppo and from its controls:
        python probe.py reward
    the gold of answers; which of two was chosen:
        python probe.py reward --task sequence
        python probe.py pairs
    what the features in runs/sae stand for:
        python probe.py features
    what runs/ppo writes without some of its features:
        python probe.py ablate --concept positive
    what the features of runs/sarm reward, on pairs, and what a policy exploits:
        python probe.py reward_features
        python probe.py reward_features --answers runs/ppo/eval/step_40.jsonl \
            --against runs/ppo/eval/step_0.jsonl
    pairs, and best-of-n, scored again without one of them:
        python probe.py causal --edits 17:set:0 --pool runs/bon/pool.jsonl
    the same for good, the head's weight on it being 0:
        python probe.py steer --weights "17:*:0" --save runs/sarm_steered
    the features of demonstrations, reference data of train_ppo.py:
        python probe.py human_latents
    how good the reward models in runs/rm are, beside length:
        python probe.py evaluate
        python probe.py evaluate --reward_model MY_RM runs/sarm \
            --benchmark rm_bench --dataset total_dataset.json
    whose answers are better, and how often:
        python probe.py judge --a runs/ppo/eval/step_40.jsonl \
            --b runs/ppo/eval/step_0.jsonl
    the texts spread over four processes:
        torchrun --nproc_per_node=4 probe.py divergence

Each command writes summary.json and a picture into its --output_dir, and
prints a table; human_latents writes one file.
"""

from nanorlhf.control import feature_edits, human_latents, reward_features
from nanorlhf.evals import benchmarks, win_rates
from nanorlhf.interp import ablation, comparisons, features, reward_probes
from nanorlhf.runtime import cli

COMMANDS = {  # name: (its flags, its function)
    "divergence": (comparisons.DivergenceConfig, comparisons.divergence),
    "mmcs": (comparisons.MmcsConfig, comparisons.mmcs),
    "reward": (reward_probes.RewardConfig, reward_probes.reward),
    "pairs": (reward_probes.PairsConfig, reward_probes.pairs),
    "features": (features.FeaturesConfig, features.features),
    "ablate": (ablation.AblateConfig, ablation.ablate),
    "reward_features": (reward_features.RewardFeaturesConfig, reward_features.reward_features),
    "causal": (feature_edits.CausalConfig, feature_edits.causal),
    "steer": (feature_edits.SteerConfig, feature_edits.steer),
    "human_latents": (human_latents.HumanLatentsConfig, human_latents.human_latents),
    "evaluate": (benchmarks.EvaluateConfig, benchmarks.evaluate),
    "judge": (win_rates.JudgeConfig, win_rates.judge),
}

if __name__ == "__main__":
    cli.run_command(COMMANDS)

"""Look inside trained models: what changed between a base and its policy, and what can be read from their activations and features.

    python probe.py                                                      lists the commands
    python probe.py divergence                                           runs/sft against runs/ppo, block by block
    python probe.py divergence --model gpt2 --policy MY_RUN --dataset texts.jsonl --kind prompts --columns prompt=text
    python probe.py mmcs --a runs/sae/base/3_mlp --b runs/sae_1/policy/3_mlp      of one seed they start alike: take two
    python probe.py reward                                               the value of words, read from runs/ppo and from its controls
    python probe.py reward --task sequence; python probe.py pairs        the gold of responses; which of two was chosen
    python probe.py features                                             what the features in runs/sae stand for
    python probe.py human_latents                                        of a SARM on demonstrations: reference data of train_ppo.py
    python probe.py ablate --concept positive                            what runs/ppo writes without some of its features
    python probe.py judge --a runs/ppo/eval/step_60.jsonl --b runs/ppo/eval/step_0.jsonl      whose answers are better, and how often
    torchrun --nproc_per_node=4 probe.py divergence                      the texts are spread over the processes

Each command writes summary.json and a picture into its --output_dir, and prints a table. Their bodies are in nanorlhf/probes.py,
implicit_reward.py, features.py, ablation.py and judging.py.
"""

from nanorlhf import ablation, cli, features, human_latents, implicit_reward, judging, probes

COMMANDS = {  # name: (its flags, its function)
    "divergence": (probes.DivergenceConfig, probes.divergence),
    "mmcs": (probes.MmcsConfig, probes.mmcs),
    "reward": (implicit_reward.RewardConfig, implicit_reward.reward),
    "pairs": (implicit_reward.PairsConfig, implicit_reward.pairs),
    "features": (features.FeaturesConfig, features.features),
    "ablate": (ablation.AblateConfig, ablation.ablate),
    "human_latents": (human_latents.HumanLatentsConfig, human_latents.human_latents),
    "judge": (judging.JudgeConfig, judging.judge),
}

if __name__ == "__main__":
    cli.run_command(COMMANDS)

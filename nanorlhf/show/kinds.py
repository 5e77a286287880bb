"""What kind of run a folder holds, said by the settings in its config.json."""

import re

# Which kind of run a config.json is of, by a setting: the first of these that it has. Several
# scripts have label_noise and n_answers.
KINDS = {
    "command": "probe.py",
    "ppo_epochs": "PPO",
    "loss_on": "SFT",
    "label_noise": "reward model",
    "expansion": "autoencoders",
    "n_answers": "best-of-n",
}


def name_kind(settings: dict) -> str:
    """PPO, SFT, DPO, probe.py features, ...: which kind of run these settings are of."""
    for name, kind in KINDS.items():
        if name in settings:
            break
    else:
        return "run"
    if kind == "SFT":  # train_sft.py has several losses
        return str(settings.get("loss") or kind).upper()
    if kind == "probe.py":
        # A command's config is called after it: RewardFeatures of reward_features.
        words = re.findall("[A-Z][a-z]*", str(settings["command"]))
        return f"{kind} {'_'.join(words).lower()}"
    return kind

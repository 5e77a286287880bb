"""What PPO changed inside, over seeds, on the embedded world: divergence,
autoencoders, probes of the reward, ablations.

    two runs side by side, one thread each; prints every command:
        python -m nanorlhf.studies.feedback_patterns
    the same tables in minutes: one seed, short runs:
        python -m nanorlhf.studies.feedback_patterns --quick

One SFT policy. A seed is a reward model on its own 800 pairs with their own
spurious cue, a PPO run against it, and sparse autoencoders of the policy and of
the base: of the MLPs of the two layers that moved most, and of the last
residual stream. Every command is a plain call of a script; runs that are done
are not done again. At the end come tables over seeds, as text and in
summary.json, and a picture of the probes. An interval is that of the seeds
(95%, t), so it holds for policies, where those of probe.py hold for the splits
or prompts of one policy.

Pitfall: a policy less its base is what any further training changed. The
control, a base trained on without a reward, is not among these commands:
feedback_patterns.md has it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from ..stats import t_interval
from .common import (
    StudyFlags,
    describe_numbers,
    draw_picture,
    print_title,
    read_flags,
    run_stage,
    with_interval,
    write_summary,
)

# The probes: {name: what it adds to the command}.
PROBES = {
    "words, activations": "reward --site mlp",
    "words, less the neutral word": "reward --site mlp --difference true",
    "words, residual stream": "reward --site residual",
    "words, features": "reward --site mlp --layers highest:2 --sae {sae}",
    "responses, activations": "reward --site mlp --task sequence",
    "pairs, activations": "pairs --site mlp",
}
# Which features are ablated, in the last layer's residual stream: in the MLP of that layer the
# features of a concept carry half of the variance.
ABLATIONS = {
    "fire before positive words": "--concept positive --by before",
    "fire on positive words": "--concept positive --by on",
    "fire before the spurious cue": "--concept mark --by before",
}
# How the picture marks what a probe reads from: the policy, its base, and inputs that know nothing
# of PPO.
MARKERS = {
    "policy": dict(marker="o", color="C3"),
    "base": dict(marker="o", color="C0"),
    "random model": dict(marker="s", color="grey"),
    "bag of words": dict(marker="^", color="grey"),
    "length": dict(marker="d", color="grey"),
    "shuffled labels": dict(marker="x", color="grey"),
}
# What --quick puts in the place of the flags' defaults.
QUICK = {
    "seeds": 1,
    "ppo_flags": "--steps 20",
    "sae_flags": "--steps 150",
    "probe_flags": "--seeds 2",
    "ablate_flags": "--draws 2 --n_answers 1",
}


@dataclass
class Settings(StudyFlags):
    """Further flags of the commands that look inside"""

    output_dir: str = HfArg(
        default="runs/patterns", help="the folder of all runs, of tables and of pictures"
    )
    sae_flags: str = HfArg(default="", help="further flags of train_sae.py")
    probe_flags: str = HfArg(default="", help="further flags of probe.py reward and pairs")
    ablate_flags: str = HfArg(default="", help="further flags of probe.py ablate")


def read_settings(args: list[str] | None = None) -> Settings:
    """The study's flags, read from the command line or a list."""
    return read_flags(Settings, __doc__, args, QUICK)


# ---------------------------------------------------------------------------------------- commands


def commands(a) -> list[list[str]]:
    """The study as lists of command lines: what stands in one list can run side by side."""
    stages = [[f"train_sft.py --output_dir {sft_of(a)} {a.sft_flags}"]]
    for commands_of_seed in (
        reward_commands,
        ppo_commands,
        autoencoder_commands,
        probe_commands,
        concept_commands,
        ablation_commands,
    ):
        stage = []
        for seed in range(a.seeds):
            stage += commands_of_seed(a, seed)
        stages.append(stage)
    return stages


def sft_of(a) -> str:
    """The folder of the SFT policy, the base of all that PPO trains."""
    return f"{a.output_dir}/sft"


def folder_of(a, name: str, seed: int) -> str:
    """The folder of a seed's run."""
    return f"{a.output_dir}/{name}/seed_{seed}"


def reward_commands(a, seed: int) -> list[str]:
    """A reward model on pairs with the seed's own spurious cue."""
    return [
        f"train_rm.py --model {sft_of(a)} --dataset world:{seed} --seed {seed} "
        f"--output_dir {folder_of(a, 'rm', seed)} {a.rm_flags}"
    ]


def ppo_commands(a, seed: int) -> list[str]:
    """A PPO run against the seed's reward model."""
    return [
        f"train_ppo.py --model {sft_of(a)} --reward_model {folder_of(a, 'rm', seed)} "
        f"--dataset world:{seed} --seed {seed} --output_dir {folder_of(a, 'ppo', seed)} "
        f"{a.ppo_flags}"
    ]


def autoencoder_commands(a, seed: int) -> list[str]:
    """The divergence of policy and base, and autoencoders of MLPs and of the residual stream."""
    policy = folder_of(a, "ppo", seed)
    divergence = (
        f"probe.py divergence --model {sft_of(a)} --policy {policy} "
        f"--output_dir {folder_of(a, 'divergence', seed)}"
    )
    autoencoder = f"train_sae.py --model {policy} --base {sft_of(a)} --seed {seed}"
    # Without --site and --layers it is the MLPs of the two layers that moved most.
    return [
        divergence,
        f"{autoencoder} --output_dir {folder_of(a, 'sae', seed)} {a.sae_flags}",
        f"{autoencoder} --site residual --layers 3 "
        f"--output_dir {folder_of(a, 'sae_residual', seed)} {a.sae_flags}",
    ]


def probe_commands(a, seed: int) -> list[str]:
    """All probes of the reward."""
    lines = []
    for number, flags in enumerate(PROBES.values()):
        flags = flags.format(sae=folder_of(a, "sae", seed))
        lines.append(
            f"probe.py {flags} --model {sft_of(a)} --policy {folder_of(a, 'ppo', seed)} "
            f"{a.probe_flags} --output_dir {folder_of(a, f'probe_{number}', seed)}"
        )
    return lines


def concept_commands(a, seed: int) -> list[str]:
    """Known concepts among the features of all autoencoders."""
    mlp = folder_of(a, "sae", seed)
    residual = folder_of(a, "sae_residual", seed)
    return [
        f"probe.py features --sae {mlp}/*/* {residual}/*/* --top 5 "
        f"--output_dir {folder_of(a, 'features', seed)}"
    ]


def ablation_commands(a, seed: int) -> list[str]:
    """What the policy writes without some features: all ablations."""
    lines = []
    for number, flags in enumerate(ABLATIONS.values()):
        lines.append(
            f"probe.py ablate --sae {folder_of(a, 'sae_residual', seed)}/policy/3_residual "
            f"{flags} --top 10 --dataset world:{seed} "
            f"--reward world:gold {folder_of(a, 'rm', seed)} {a.ablate_flags} "
            f"--output_dir {folder_of(a, f'ablate_{number}', seed)}"
        )
    return lines


# ------------------------------------------------------------------------------------------ tables


def read_tables(a) -> dict[str, dict[str, tuple[float, float]]]:
    """All tables of the study: {title: {row: (mean, half-width)}}."""
    divergence = over_seeds(a, "divergence", read_divergences)
    tables = {"divergence, sum of Frobenius norms": divergence}
    for number, name in enumerate(PROBES):
        tables[f"probe, {name}"] = over_seeds(a, f"probe_{number}", read_probe)
    tables["concepts with an AUC above .95"] = over_seeds(a, "features", read_concepts)
    for number, name in enumerate(ABLATIONS):
        title = f"ablation of features that {name}"
        tables[title] = over_seeds(a, f"ablate_{number}", read_effects)
    return tables


def over_seeds(
    a, name: str, read: Callable[[dict], dict[str, float]]
) -> dict[str, tuple[float, float]]:
    """The numbers of all seeds' summaries -> {key: (mean, half-width)}.

    read(summary) -> {key: number} of one seed. A key that a seed lacks is left out.
    """
    rows = []
    for seed in range(a.seeds):
        path = Path(folder_of(a, name, seed), "summary.json")
        rows.append(read(json.loads(path.read_text())))

    intervals = {}
    for key in rows[0]:
        if all(key in row for row in rows):
            intervals[key] = t_interval([row[key] for row in rows])
    return intervals


def read_divergences(summary: dict) -> dict[str, float]:
    """How far each layer of the policy is from the base's."""
    return {f"layer {row['layer']}": row["frobenius"] for row in summary["layers"]}


def read_probe(summary: dict) -> dict[str, float]:
    """The first metric of every row, tau or accuracy, and how far the policy is above the row."""
    metric = summary["metrics"][0]
    numbers = {}
    for name, row in summary["rows"].items():
        numbers[f"{metric}: {name}"] = row[metric][0]
    for name, row in summary["rows"].items():
        if "policy" not in name:
            numbers[f"policy less {name}"] = row["policy_less"][0]
    return numbers


def read_concepts(summary: dict) -> dict[str, float]:
    """How many known concepts have a feature.

    A row is called "policy 3_mlp, concept (of 9): features".
    """
    numbers = {}
    for path, result in summary["saes"].items():
        autoencoder = " ".join(path.split("/")[-2:])  # of which model, and of which layer
        for kind, row in result["found"].items():
            for name, count in row["auc"].items():
                numbers[f"{autoencoder}, {kind} (of {row['of']}): {name}"] = count
    return numbers


def read_effects(summary: dict) -> dict[str, float]:
    """The differences between arms of every number."""
    numbers = {}
    for key, differences in summary["differences"].items():
        # The seeds' reward models have one name, so that their numbers stand in one row.
        name = key.removeprefix("world:")
        if key.startswith("seed_"):
            name = "proxy"
        for pair, row in differences.items():
            numbers[f"{name}: {pair}"] = row["mean"]
    return numbers


# ----------------------------------------------------------------------------------------- picture


def probe_lines(tables: dict[str, dict]) -> dict[str, dict[str, tuple[float, float]]]:
    """The tables of the probes -> the picture's lines: {label: {input: (mean, half-width)}}."""
    lines = {}
    for probe in PROBES:
        for name, interval in tables[f"probe, {probe}"].items():
            if name.startswith("policy less"):
                continue
            # "tau: policy, SAE features" -> what is read, and which of its numbers.
            _, _, read_from = name.partition(": ")
            source, _, inputs = read_from.partition(", ")
            # Beside a probe of features stand the activations of the same layers: they are a line
            # of their own.
            label = probe
            if probe == "words, features" and inputs == "activations":
                label = "words, the same two layers"
            lines.setdefault(label, {})[source] = interval
    return lines


def draw(figure, lines: dict[str, dict[str, tuple[float, float]]]):
    """What each probe reaches on the policy, on its base and on controls.

    The bars are 95% intervals over seeds.
    """
    figure.set_size_inches(8, 3.6)
    axis = figure.add_subplot()
    for source, style in MARKERS.items():
        means = []
        heights = []
        half_widths = []
        for height, inputs in enumerate(lines.values()):
            if source in inputs:
                mean, half_width = inputs[source]
                means.append(mean)
                heights.append(height)
                half_widths.append(half_width)
        # The policy is drawn last, above what it is compared with.
        order = 2
        if source == "policy":
            order = 3
        axis.errorbar(
            means, heights, xerr=half_widths, linestyle="", label=source, zorder=order, **style
        )
    axis.set_yticks(range(len(lines)), list(lines))
    axis.invert_yaxis()
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_xlabel(
        "Kendall's tau with the true reward; of pairs the accuracy, where chance is 0.5"
    )
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))


# --------------------------------------------------------------------------------------- the study


def main(args=None):
    """Run what is not done yet, then print the tables and draw the picture."""
    a = read_settings(args)
    for stage in commands(a):
        run_stage(stage, a.jobs)

    tables = read_tables(a)
    for title, table in tables.items():
        print_title(f"{title}: {describe_numbers(a)}", a)
        for name, (mean, half_width) in table.items():
            print(f"  {name:60s}{with_interval(mean, half_width):>17s}")
    write_summary(Path(a.output_dir, "summary.json"), {"settings": vars(a), "tables": tables})
    draw_picture(draw, probe_lines(tables), f"{a.output_dir}/probes.png")


if __name__ == "__main__":
    main()

r"""What PPO changed inside, over seeds, on the embedded world: divergence,
autoencoders, probes of the reward, ablations.

    two runs side by side, one thread each; prints every command:
        python -m nanorlhf.studies.feedback_patterns
    the same tables in minutes: one seed, short runs:
        python -m nanorlhf.studies.feedback_patterns --quick
    your own model, texts and lexicon; prints all commands, and runs them
    without the last flag:
        python -m nanorlhf.studies.feedback_patterns --model MODEL \
            --dataset texts.jsonl --reward_model lexicon.tsv --layer 5 \
            --output_dir runs/mine --dry_run

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

On your own data (own_data.py) --dataset holds rows {prompt, response}: PPO
answers the prompts, autoencoders and probes read the texts. The reward is
--reward_model, or a reward model of each seed, trained on --pairs. With
--policy a policy that is there takes PPO's place. Words are probed where the
reward, or gold, is a lexicon, and pairs where there are --pairs. Features have
no known concepts: look at what `probe.py features` found, and name those to
ablate with --features.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from transformers.hf_argparser import HfArg

from ..errors import at_least, require
from ..runtime import cli
from ..runtime.results import parse_ids
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
from .own_data import (
    OwnDataFlags,
    describe_own_data,
    has_own_data,
    pair_flags,
    print_remarks,
    prompt_flags,
    sft_commands,
    sft_of,
    spaced,
)
from .plan import print_plan

# The probes: {name: what it adds to the command}.
PROBES = {
    "words, activations": "reward --site mlp",
    # The activations of a neutral word at the same place are subtracted: the place alone then says
    # nothing.
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
class Settings(OwnDataFlags, StudyFlags):
    """What is looked at, and further flags of the commands that look inside"""

    output_dir: str = HfArg(
        default="runs/patterns", help="the folder of all runs, of tables and of pictures"
    )
    reward_model: str = HfArg(
        default="",
        help="own data: what PPO is trained on, a reward as of train_ppo.py; by default a reward "
        "model of each seed, trained on --pairs",
    )
    policy: str = HfArg(
        default="",
        help="own data: a policy that was trained from --model on --reward_model already, in the "
        "place of PPO",
    )
    layer: int = HfArg(
        default=3,
        help="number of the block whose residual stream gets an autoencoder: the last one of the "
        "embedded world's models",
    )
    features: str = HfArg(
        default="",
        help="own data: numbers of the features of that autoencoder to ablate, such as 3,17",
    )
    sae_flags: str = HfArg(default="", help="further flags of train_sae.py")
    probe_flags: str = HfArg(default="", help="further flags of probe.py reward and pairs")
    ablate_flags: str = HfArg(default="", help="further flags of probe.py ablate")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "layer")
        parse_ids(self.features)
        for name in ("reward_model", "policy", "features"):
            is_alone = getattr(self, name) and not self.dataset
            require(not is_alone, f"--{name} is for data of your own: it goes with --dataset")
        has_reward = self.reward_model or self.pairs
        require(
            has_reward or not self.dataset,
            "name a --reward_model, or --pairs to train one on",
        )
        # The policy is one, and features are numbered anew in each seed's autoencoder.
        for name in ("policy", "features"):
            is_one = self.seeds == 1 or not getattr(self, name)
            require(is_one, f"--{name} is that of one seed: add --seeds 1")
        require(self.reward_model or not self.policy, "--policy: name its --reward_model too")


def read_settings(args: list[str] | None = None) -> Settings:
    """The study's flags, read from the command line or a list."""
    return read_flags(Settings, __doc__, args, QUICK)


# ---------------------------------------------------------------------------------------- commands


def commands(a) -> list[list[str]]:
    """The study as lists of command lines: what stands in one list can run side by side."""
    # A stage reads what earlier stages have written. No seed reads another seed's runs.
    stages = [sft_commands(a)]
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


def folder_of(a, name: str, seed: int) -> str:
    """The folder of a seed's run."""
    return f"{a.output_dir}/{name}/seed_{seed}"


def reward_of(a, seed: int) -> str:
    """What the policy of a seed is trained on."""
    if a.reward_model:
        return quote(a.reward_model)
    return folder_of(a, "rm", seed)


def policy_of(a, seed: int) -> str:
    """The policy of a seed, whose base is the SFT policy."""
    if a.policy:
        return quote(a.policy)
    return folder_of(a, "ppo", seed)


def text_flags(a) -> str:
    """The flags of a command that reads texts, with a space behind."""
    if not has_own_data(a):
        return ""
    return f"--dataset {quote(a.dataset)} {spaced(a.data_flags)}"


def reward_commands(a, seed: int) -> list[str]:
    """A reward model on pairs with the seed's own spurious cue; none where there is a reward."""
    if a.reward_model:
        return []
    return [
        f"train_rm.py --model {sft_of(a)} {pair_flags(a, seed)} --seed {seed} "
        f"--output_dir {folder_of(a, 'rm', seed)} {a.rm_flags}"
    ]


def ppo_commands(a, seed: int) -> list[str]:
    """A PPO run against the seed's reward; none where there is a policy."""
    if a.policy:
        return []
    # The prompts of world:SEED are the same for every seed. SEED only decides the cue, which is in
    # pairs alone.
    prompts = prompt_flags(a) or f"--dataset world:{seed} "
    return [
        f"train_ppo.py --model {sft_of(a)} --reward_model {reward_of(a, seed)} "
        f"{prompts}--seed {seed} --output_dir {folder_of(a, 'ppo', seed)} "
        f"{a.ppo_flags}"
    ]


def autoencoder_commands(a, seed: int) -> list[str]:
    """The divergence of policy and base, and autoencoders of MLPs and of the residual stream."""
    policy = policy_of(a, seed)
    divergence = (
        f"probe.py divergence --model {sft_of(a)} --policy {policy} {text_flags(a)}"
        f"--output_dir {folder_of(a, 'divergence', seed)}"
    )
    # One command trains the autoencoders of both models on the same texts, so that they compare.
    texts = text_flags(a)
    autoencoder = f"train_sae.py --model {policy} --base {sft_of(a)} {texts}--seed {seed}"
    # Without --site and --layers it is the MLPs of the two layers that moved most.
    return [
        divergence,
        f"{autoencoder} --output_dir {folder_of(a, 'sae', seed)} {a.sae_flags}",
        f"{autoencoder} --site residual --layers {a.layer} "
        f"--output_dir {folder_of(a, 'sae_residual', seed)} {a.sae_flags}",
    ]


def probe_commands(a, seed: int) -> list[str]:
    """All probes of the reward."""
    lines = []
    for name in probes_of(a):
        flags = PROBES[name].format(sae=folder_of(a, "sae", seed))
        lines.append(
            f"probe.py {flags} --model {sft_of(a)} --policy {policy_of(a, seed)} "
            f"{target_flags(a, name, seed)}{a.probe_flags} "
            f"--output_dir {folder_of(a, folder_of_probe(name), seed)}"
        )
    return lines


def probes_of(a) -> list[str]:
    """The names of the probes: on own data, of those for which there is a true reward."""
    names = []
    for name in PROBES:
        # In the embedded world all true rewards are known, and no probe is left out.
        has_target = True
        if has_own_data(a) and name.startswith("words"):
            has_target = bool(lexicon_of(a))
        if has_own_data(a) and name.startswith("pairs"):
            has_target = bool(a.pairs)
        if has_target:
            names.append(name)
    return names


def folder_of_probe(name: str) -> str:
    """The name of a probe's folder: its number among all probes."""
    # The number is the place in PROBES, so that a probe keeps its folder if others are left out.
    return f"probe_{list(PROBES).index(name)}"


def lexicon_of(a) -> str:
    """The lexicon that says what words are worth: gold, or the reward; "" where neither is one."""
    for reward in (a.gold_model, a.reward_model):
        if reward.endswith(".tsv"):
            return reward
    return ""


def target_flags(a, name: str, seed: int) -> str:
    """The flags of what a probe reads, and of the true reward that it looks for, on own data."""
    if not has_own_data(a):
        return ""
    if name.startswith("pairs"):
        return f"{pair_flags(a, seed)} "
    if name.startswith("words"):
        return f"{text_flags(a)}--reward {quote(lexicon_of(a))} "
    # Responses are probed for gold; where there is none, for the reward that PPO was trained on.
    return f"{text_flags(a)}--reward {rewards_of(a, seed)[0]} "


def rewards_of(a, seed: int) -> list[str]:
    """What answers are worth: gold first, where it is known, then what PPO was trained on."""
    rewards = [reward_of(a, seed)]
    if not has_own_data(a):
        return ["world:gold", *rewards]
    if a.gold_model and a.gold_model != a.reward_model:
        return [quote(a.gold_model), *rewards]
    return rewards


def concept_commands(a, seed: int) -> list[str]:
    """What the features of all autoencoders are: known concepts among them, and where they fire."""
    mlp = folder_of(a, "sae", seed)
    residual = folder_of(a, "sae_residual", seed)
    return [
        f"probe.py features --sae {mlp}/*/* {residual}/*/* --top 5 {text_flags(a)}"
        f"--output_dir {folder_of(a, 'features', seed)}"
    ]


def ablation_commands(a, seed: int) -> list[str]:
    """What the policy writes without some features: all ablations."""
    prompts = text_flags(a) or f"--dataset world:{seed} "
    rewards = " ".join(rewards_of(a, seed))
    # train_sae.py has trained an autoencoder of each model: these features are the policy's.
    lines = []
    for number, flags in enumerate(ablations_of(a).values()):
        lines.append(
            f"probe.py ablate --sae {folder_of(a, 'sae_residual', seed)}/policy/{a.layer}_residual "
            f"{flags} --top 10 {prompts}"
            f"--reward {rewards} {a.ablate_flags} "
            f"--output_dir {folder_of(a, folder_of_ablation(a, number), seed)}"
        )
    return lines


def ablations_of(a) -> dict[str, str]:
    """The ablations, as ABLATIONS: on own data that of the features that are named, or none."""
    if not has_own_data(a):
        return ABLATIONS
    if not a.features:
        return {}
    return {"are named": f"--features {a.features}"}


def folder_of_ablation(a, number: int) -> str:
    """The name of an ablation's folder: its number, or on own data the features that it is of."""
    if not has_own_data(a):
        return f"ablate_{number}"
    # Each choice of features has a folder of its own: what is there would not be run again.
    ids = map(str, parse_ids(a.features))
    return f"ablate_{'_'.join(ids)}"


def describe_differences(a) -> list[str]:
    """What is different on own data: lines to print."""
    lines = describe_own_data(a)
    if not lines:
        return []
    lines.append("no known concepts: features are described, and not counted")
    if not lexicon_of(a):
        lines.append("words are not probed: neither gold nor the reward is a lexicon, FILE.tsv")
    if not a.pairs:
        lines.append("pairs are not probed: there are no --pairs")
    if not a.features:
        folder = folder_of(a, "features", 0)
        lines.append(f"nothing is ablated: choose --features by what {folder} says of them")
    return lines


# ------------------------------------------------------------------------------------------ tables


def read_tables(a) -> dict[str, dict[str, tuple[float, float]]]:
    """All tables of the study: {title: {row: (mean, half-width)}}."""
    divergence = over_seeds(a, "divergence", read_divergences)
    tables = {"divergence, sum of Frobenius norms": divergence}
    for name in probes_of(a):
        tables[f"probe, {name}"] = over_seeds(a, folder_of_probe(name), read_probe)
    if not has_own_data(a):
        tables["concepts with an AUC above .95"] = over_seeds(a, "features", read_concepts)
    for number, name in enumerate(ablations_of(a)):
        title = f"ablation of features that {name}"
        tables[title] = over_seeds(a, folder_of_ablation(a, number), read_effects)
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
        summary = json.loads(path.read_text())
        rows.append(read(summary))

    # Every mean is over all seeds: a mean over fewer of them would not compare with the others.
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
    # summary["rows"] has a row for each input of the probe, each number with its half-width:
    #   {"base, activations": {"tau": [0.4, 0.1], "policy_less": [0.2, 0.1], ...}, ...}
    metric = summary["metrics"][0]
    numbers = {}
    for name, row in summary["rows"].items():
        numbers[f"{metric}: {name}"] = row[metric][0]
    # The differences come after the numbers. probe.py has taken them split by split.
    for name, row in summary["rows"].items():
        if "policy" not in name:
            numbers[f"policy less {name}"] = row["policy_less"][0]
    return numbers


def read_concepts(summary: dict) -> dict[str, float]:
    """How many known concepts have a feature.

    A row is called "policy 3_mlp, concept (of 9): features".
    """
    # summary["saes"] has, for each autoencoder, how many concepts its features and controls found:
    #   {".../policy/3_mlp": {"found": {"concept": {"of": 9, "auc": {"features": 6, ...}}}}, ...}
    numbers = {}
    for path, result in summary["saes"].items():
        autoencoder = " ".join(path.split("/")[-2:])  # of which model, and of which layer
        for kind, row in result["found"].items():
            for name, count in row["auc"].items():
                numbers[f"{autoencoder}, {kind} (of {row['of']}): {name}"] = count
    return numbers


def read_effects(summary: dict) -> dict[str, float]:
    """The differences between arms of every number."""
    # summary["differences"] has, for each number that is measured, one arm less another:
    #   {"world:gold": {"features - random": {"mean": -0.3, ...}}, "seed_2": ..., "cue": ...}
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
        # On own data some probes may be missing.
        for name, interval in tables.get(f"probe, {probe}", {}).items():
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
    # A source (policy, base, a control) has one marker, at the height of each probe that reads it.
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
    remarks = describe_differences(a)
    if a.dry_run:
        print_plan(commands(a), a, remarks)
        return
    print_remarks(remarks)
    for stage in commands(a):
        run_stage(stage, a.jobs)

    # Tables are read from the runs' summaries: a study that is done prints them again at once.
    tables = read_tables(a)
    for title, table in tables.items():
        print_title(f"{title}: {describe_numbers(a)}", a)
        for name, (mean, half_width) in table.items():
            print(f"  {name:60s}{with_interval(mean, half_width):>17s}")
    write_summary(Path(a.output_dir, "summary.json"), {"settings": vars(a), "tables": tables})
    draw_picture(draw, probe_lines(tables), f"{a.output_dir}/probes.png")


if __name__ == "__main__":
    with cli.errors_in_one_line():
        main()

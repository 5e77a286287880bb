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

PROBES = {  # name: what it adds to the command
    "words, activations": "reward --site mlp",
    "words, less the neutral word": "reward --site mlp --difference true",
    "words, residual stream": "reward --site residual",
    "words, features": "reward --site mlp --layers highest:2 --sae {sae}",
    "responses, activations": "reward --site mlp --task sequence",
    "pairs, activations": "pairs --site mlp",
}
ABLATIONS = {  # of the last layer's residual stream: in its MLP the features of a concept carry half of the variance
    "fire before positive words": "--concept positive --by before",
    "fire on positive words": "--concept positive --by on",
    "fire before the spurious cue": "--concept mark --by before",
}
# How the picture marks what a probe reads from: the policy, its base, and inputs that know nothing of PPO.
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


def commands(a):
    """The study as lists of command lines: what stands in one list can run side by side."""
    out, stages = a.output_dir, [[f"train_sft.py --output_dir {a.output_dir}/sft {a.sft_flags}"], [], [], [], [], [], []]
    for s in range(a.seeds):
        model, policy = f"{out}/sft", f"{out}/ppo/seed_{s}"
        sae, residual = f"{out}/sae/seed_{s}", f"{out}/sae_residual/seed_{s}"
        rm, world = f"{out}/rm/seed_{s}", f"--dataset world:{s}"
        both = f"--model {model} --policy {policy}"
        stages[1].append(f"train_rm.py --model {model} {world} --seed {s} --output_dir {rm} {a.rm_flags}")
        stages[2].append(f"train_ppo.py --model {model} --reward_model {rm} {world} --seed {s} --output_dir {policy} {a.ppo_flags}")
        stages[3].append(f"probe.py divergence {both} --output_dir {out}/divergence/seed_{s}")
        for flags, folder in (("", sae), ("--site residual --layers 3", residual)):
            stages[3].append(f"train_sae.py --model {policy} --base {model} --seed {s} {flags} --output_dir {folder} {a.sae_flags}")
        for i, flags in enumerate(PROBES.values()):
            stages[4].append(f"probe.py {flags.format(sae=sae)} {both} {a.probe_flags} --output_dir {out}/probe_{i}/seed_{s}")
        stages[5].append(f"probe.py features --sae {sae}/*/* {residual}/*/* --top 5 --output_dir {out}/features/seed_{s}")
        for i, flags in enumerate(ABLATIONS.values()):
            stages[6].append(
                f"probe.py ablate --sae {residual}/policy/3_residual {flags} --top 10 {world} --reward world:gold {rm} "
                f"{a.ablate_flags} --output_dir {out}/ablate_{i}/seed_{s}"
            )
    return stages


def over_seeds(a, name, read):
    """read(summary) -> {key: number} of each seed's summary.json in a folder -> {key: (mean, half-width)}"""
    rows = [read(json.loads(Path(a.output_dir, name, f"seed_{s}", "summary.json").read_text())) for s in range(a.seeds)]
    return {key: t_interval([row[key] for row in rows]) for key in rows[0] if all(key in row for row in rows)}


def divergences(summary):
    return {f"layer {row['layer']}": row["frobenius"] for row in summary["layers"]}


def probe_rows(summary):
    """The first metric (tau, or accuracy) of every row, and how far the policy is above it."""
    metric = summary["metrics"][0]
    rows = {name: row[metric][0] for name, row in summary["rows"].items()}
    less = {name: row["policy_less"][0] for name, row in summary["rows"].items() if "policy" not in name}
    return {f"{metric}: {name}": x for name, x in rows.items()} | {f"policy less {name}": x for name, x in less.items()}


def concepts(summary):
    """How many known concepts have a feature: {"policy 3_mlp, concept: features": number}"""
    out = {}
    for path, result in summary["saes"].items():
        for kind, row in result["found"].items():
            out |= {f"{' '.join(path.split('/')[-2:])}, {kind} (of {row['of']}): {name}": x for name, x in row["auc"].items()}
    return out


def effects(summary):
    """Differences between arms of every number, the reward model under one name."""
    names = {key: "proxy" if key.startswith("seed_") else key.removeprefix("world:") for key in summary["differences"]}
    return {f"{names[key]}: {pair}": row["mean"] for key, rows in summary["differences"].items() for pair, row in rows.items()}


def probe_lines(tables):
    """The tables of the probes -> the lines of the picture: {label: {input: (mean, half-width)}}"""
    lines = {}
    for probe in PROBES:
        for name, interval in tables[f"probe, {probe}"].items():
            if name.startswith("policy less"):
                continue
            # "tau: policy, SAE features" -> what is read, and which of its numbers.
            source, _, inputs = name.partition(": ")[2].partition(", ")
            # A probe of features has the activations of the same layers beside it: a line of their own.
            beside = probe == "words, features" and inputs == "activations"
            label = "words, the same two layers" if beside else probe
            lines.setdefault(label, {})[source] = interval
    return lines


def draw(figure, lines):
    """What each probe reaches on the policy, on its base and on controls; bars are 95% intervals over seeds."""
    figure.set_size_inches(8, 3.6)
    axis = figure.add_subplot()
    for source, style in MARKERS.items():
        heights = [height for height, inputs in enumerate(lines.values()) if source in inputs]
        intervals = [inputs[source] for inputs in lines.values() if source in inputs]
        means = [mean for mean, _ in intervals]
        half_widths = [half_width for _, half_width in intervals]
        # The policy is drawn last, above what it is compared with.
        order = 3 if source == "policy" else 2
        axis.errorbar(means, heights, xerr=half_widths, linestyle="", label=source, zorder=order, **style)
    axis.set_yticks(range(len(lines)), list(lines))
    axis.invert_yaxis()
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_xlabel("Kendall's tau with the true reward; of pairs the accuracy, where chance is 0.5")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))


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


def main(args=None):
    """Run what is not done yet, then print the tables."""
    a = read_settings(args)
    for stage in commands(a):
        run_stage(stage, a.jobs)

    tables = {"divergence, sum of Frobenius norms": over_seeds(a, "divergence", divergences)}
    tables |= {f"probe, {name}": over_seeds(a, f"probe_{i}", probe_rows) for i, name in enumerate(PROBES)}
    tables["concepts with an AUC above .95"] = over_seeds(a, "features", concepts)
    tables |= {f"ablation of features that {name}": over_seeds(a, f"ablate_{i}", effects) for i, name in enumerate(ABLATIONS)}
    for title, table in tables.items():
        print_title(f"{title}: {describe_numbers(a)}", a)
        for name, (mean, half) in table.items():
            print(f"  {name:60s}{with_interval(mean, half):>17s}")
    write_summary(Path(a.output_dir, "summary.json"), {"settings": vars(a), "tables": tables})
    draw_picture(draw, probe_lines(tables), f"{a.output_dir}/probes.png")


if __name__ == "__main__":
    main()

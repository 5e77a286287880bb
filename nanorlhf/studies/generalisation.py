r"""Generalisation and diversity: SFT, best-of-16, and PPO at several KL
coefficients with k1 or k2 as the KL in the reward.

    two runs side by side, one thread each; prints every command:
        python -m nanorlhf.studies.generalisation
    the same tables in minutes: one seed, two KL coefficients, short runs:
        python -m nanorlhf.studies.generalisation --quick
    your own model, reward and data:
        python -m nanorlhf.studies.generalisation --model stories3M \
            --reward_model vader_lexicon.tsv \
            --data_flags "--dataset prompts.jsonl ..."

After Kirk et al. 2024 (2310.06452). One SFT policy (--model: one that is
there). A seed is a reward model on its own 800 pairs with their own spurious
cue (--reward_model: the same one for all seeds), and with it a PPO run for
every cell and the best of 16 answers of SFT. Every system answers the same
prompts of every split K times at T = 1; best-of-16 from 16 K answers of SFT,
each answer the best of 16 of its own. Runs that are done are not done again. At
the end tables over seeds, as text and in summary.json, and a picture.

A win rate is over SFT's answers to the same prompt, all K x K pairs, ties half.
'in' is diversity per input (the K answers to one prompt), 'across' that of one
answer to each prompt; 'cut' is of the first words of each answer alone. PPO's
KL is that of its own last evaluation. All systems are sampled with noise of
their own; the pool that best-of-n draws from is one for all seeds, as the
prompts are.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from shlex import quote, split

import numpy as np
import torch
from transformers.hf_argparser import HfArg

from ..bon import bon_kl
from ..evals.diversity_report import FILE
from ..stats import t_interval, win_points
from ..world import vocabulary
from .common import (
    StudyFlags,
    describe_numbers,
    draw_picture,
    is_finished,
    print_title,
    read_flags,
    run_stage,
    with_interval,
    write_summary,
)

SFT, BON, KINDS = "sft", "best_of_n", ("k1", "k2")
DIVERSITY = {"ead": "EAD", "embedding": "emb", "distinct": "dist"}  # of diversity.json, and how the tables call it
# What --quick puts in the place of the flags' defaults: the two ends of the KL coefficients.
QUICK = {"seeds": 1, "kl_coef": [0.02, 0.2], "steps": 15, "prompts": 20, "answers": 8, "n": 8}


def systems(a):
    """{name: (kind of KL, coefficient) of PPO's cells, None of the other two}"""
    return {SFT: None, BON: None} | {f"{kind}_{coef:g}": (kind, coef) for kind in a.kinds for coef in a.kl_coef}


def names_of_splits(a):
    return [item.partition("=")[0] for item in a.splits]


def answers_of(a, name, s, part):
    """The file with a system's K answers to each prompt of a split, as rows {prompt, response, scores, gold}."""
    return f"{a.output_dir}/answers/{name}/seed_{s}/{part}/best_of_{a.n if name == BON else 1}.jsonl"


def commands(a):
    """The study as lists of command lines: what stands in one list can run side by side."""
    out, sft = a.output_dir, a.model or f"{a.output_dir}/sft"
    where = f"{a.data_flags} --eval_splits {' '.join(map(quote, a.splits))}"
    sampling = f"{where} --eval_size {a.prompts} {a.bon_flags}"
    first = [] if a.model else [f"train_sft.py --output_dir {sft} {a.sft_flags}"]
    pool = f"--reward_model {a.reward_model or 'world:gold'} --n_answers {a.n * a.answers} {sampling} --seed 2000 --output_dir {out}/pool"
    members, ppo, answers, diversity = [], [], [], []
    for s in range(a.seeds):
        reward = a.reward_model or f"{out}/rm/seed_{s}"
        if not a.reward_model:
            members.append(f"train_rm.py --model {sft} --dataset world:{s} --seed {s} --output_dir {reward} {a.rm_flags}")
        for name, cell in systems(a).items():
            policy, folder = f"{out}/ppo/{name}/seed_{s}", f"{out}/answers/{name}/seed_{s}"
            if cell:
                ppo.append(
                    f"train_ppo.py --model {sft} --reward_model {reward} --kl_kind {cell[0]} --kl_coef {cell[1]:g} --seed {s} "
                    f"--steps {a.steps} {where} --output_dir {policy} {a.ppo_flags}"
                )
            if name == BON:
                answers += [
                    f"sample_bon.py --pool {out}/pool/{part}/pool.jsonl --reward_model {reward} --n {a.n} --save_best "
                    f"--output_dir {folder}/{part}"
                    for part in names_of_splits(a)
                ]
                continue
            answers.append(
                f"sample_bon.py --model {policy if cell else sft} --reward_model {reward} --n_answers {a.answers} --n 1 --save_best "
                f"{sampling} --seed {s if cell else 1000 + s} --output_dir {folder}"
            )
        for part in names_of_splits(a):
            files = " ".join(answers_of(a, name, s, part) for name in systems(a))
            measures = f"--encoder {a.encoder or sft} {a.diversity_flags}"
            diversity.append(f"sample_bon.py --from {files} {measures} --output_dir {out}/diversity/seed_{s}/{part}")
    return [first, members, [f"sample_bon.py --model {sft} {pool}", *ppo], answers, diversity]


def finished(a, command):
    """is_finished() of sample_bon.py too, which ends with a summary for each split, or with the diversity of the files that it names."""
    words = split(command)
    folder = Path(words[words.index("--output_dir") + 1])
    if "--from" in words:
        found = json.loads((folder / FILE).read_text()) if (folder / FILE).is_file() else {}
        i, j = words.index("--from"), words.index("--encoder")
        return (found.get("from_files"), found.get("encoder")) == (words[i + 1 : j], words[j + 1])
    return is_finished(command) or ("--eval_splits" in words and (folder / names_of_splits(a)[-1] / "summary.json").is_file())


# ----------------------------------------------------------------------------------------------------------------------- one seed


def measured(a, s):
    """All that is read of one seed: {split: {system: {column: number}}}"""
    out = {}
    for part in names_of_splits(a):
        rows, sft = {}, scores(answers_of(a, SFT, s, part))
        for name in systems(a):
            own = scores(answers_of(a, name, s, part))
            row = {"KL": kl_of(a, name, s, part), **{key: x.mean().item() for key, x in own.items()}}
            row |= {f"win {key}": win_rate(x, sft[key]) for key, x in own.items()}
            rows[name] = row
        found = json.loads(Path(a.output_dir, f"diversity/seed_{s}/{part}", FILE).read_text())
        for end, table in (("", found), (", cut", found.get("truncated", {"systems": {}}))):
            for name, system in zip(rows, table["systems"].values(), strict=not end):  # in the order of the files
                rows[name]["length" + end] = system["per_input"]["length"]["mean"]
                for protocol, short in (("per_input", "in"), ("across_input", "across")):
                    rows[name] |= {f"{short} {label}{end}": system[protocol][key]["mean"] for key, label in DIVERSITY.items()}
        out[part] = rows
    return out


def scores(path):
    """A file of answers -> {"proxy": [P, K], "gold": [P, K] where there is gold}, float64."""
    found = {}
    for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        (proxy,) = row["scores"].values()
        own = {"proxy": proxy} | ({} if row["gold"] is None else {"gold": row["gold"]})
        for key, x in own.items():
            found.setdefault(key, {}).setdefault(row["prompt"], []).append(x)
    return {key: torch.tensor(list(by_prompt.values()), dtype=torch.float64) for key, by_prompt in found.items()}


def win_rate(a, b):
    """Scores [P, K] and [P, J] of answers to the same prompts -> the share of the pairs of a prompt that A wins, ties half."""
    a, b = torch.broadcast_tensors(a[:, :, None], b[:, None])  # [P, K, J]
    return win_points(a.flatten(), b.flatten()).mean().item()


def kl_of(a, name, s, part):
    """The KL to SFT in nats: of PPO over its own prompts of a split, after training; of best-of-n by its formula."""
    if name in (SFT, BON):
        return bon_kl(a.n) if name == BON else 0.0
    after = json.loads(Path(a.output_dir, f"ppo/{name}/seed_{s}/summary.json").read_text())["after"]
    return after["kl" if part == names_of_splits(a)[0] else f"{part}/kl"]


def at_kl(rows, kind, kl, column):
    """What a kind of KL has at some KL: between its cells (and SFT, at 0) along a straight line in sqrt(KL); None beyond them."""
    points = sorted((row["KL"], row[column]) for name, row in rows.items() if name == SFT or name.startswith(f"{kind}_"))
    x, y = np.array(points).T
    d, kl = np.sqrt(x.clip(0)), max(kl, 0.0)  # a KL that is estimated may come out a little below 0
    return np.interp(kl**0.5, d, y).item() if kl <= d[-1] ** 2 else None


# ---------------------------------------------------------------------------------------------------------------------- all seeds


def compared(a, seeds):
    """measured() of all seeds -> {title: {row: {column: [one number a seed that has one]}}}"""
    first, *others = names_of_splits(a)
    tables = {}
    for part in (first, *others):
        rows = [seed[part] for seed in seeds]
        tables[part] = {name: collect(r[name] for r in rows) for name in systems(a)}
        tables[f"{part}, less SFT"] = {name: collect(less(r[name], r[SFT]) for r in rows) for name in systems(a) if name != SFT}
        tables[f"{part}, largest less smallest coefficient"] = {
            kind: collect(less(r[f"{kind}_{max(a.kl_coef):g}"], r[f"{kind}_{min(a.kl_coef):g}"]) for r in rows) for kind in a.kinds
        }
        if set(KINDS) <= set(a.kinds):
            pairs = [(f"k1_{coef:g}", f"k2_{coef:g}") for coef in a.kl_coef]
            tables[f"{part}, k2 less k1 at the same coefficient"] = {k2: collect(less(r[k2], r[k1]) for r in rows) for k1, k2 in pairs}
            tables[f"{part}, k2 less k1 at k2's KL"] = {k2: collect(less_at_its_kl(r, k2) for r in rows) for _, k2 in pairs}
    judged = [c for c in ("proxy", "gold", "win proxy", "win gold") if c in tables[first][SFT]]
    for other in others:
        gaps = {name: [{c: r[first][name][c] - r[other][name][c] for c in judged} for r in seeds] for name in systems(a)}
        tables[f"gap, {first} less {other}"] = {name: collect(rows) for name, rows in gaps.items()}
        rest = {name: [less(x, y) for x, y in zip(rows, gaps[SFT])] for name, rows in gaps.items() if name != SFT}
        tables[f"gap, {first} less {other}, less SFT's"] = {name: collect(rows) for name, rows in rest.items()}
    return tables


def collect(rows):
    """[{column: number or None}] of the seeds -> {column: [numbers]}"""
    out = {}
    for row in rows:
        for column, x in row.items():
            out.setdefault(column, []).extend([] if x is None else [x])
    return out


def less(a, b):
    return {column: a[column] - b[column] for column in a}


def less_at_its_kl(rows, name):
    """A cell of k2 less what k1 has at that cell's KL, so that how far the policy has moved is the same."""
    there = {column: at_kl(rows, "k1", rows[name]["KL"], column) for column in rows[name] if column != "KL"}
    return {column: None if y is None else rows[name][column] - y for column, y in there.items()}


def show(rows):
    """A table of mean +- half-width, a line for each column of the rows; in brackets how many seeds have one, where not all do."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    most = max(len(values) for row in rows.values() for values in row.values())
    print(f"{'':18s}" + "".join(f"{name:>20s}" for name in rows))
    for column in columns:
        print(f"{column:18s}" + "".join(f"{as_text(row[column], most):>20s}" for row in rows.values()))


def as_text(values, most):
    if not values:
        return "-"
    return with_interval(*t_interval(values)) + (f" ({len(values)})" if len(values) < most else "")


def draw(figure, tables):
    """Win rate over SFT against per-input EAD, a panel for each split: one marker a system, 95% intervals over seeds."""
    parts = [title for title in tables if "," not in title]
    figure.set_size_inches(4.6 * len(parts), 4.2)
    axes = figure.subplots(1, len(parts), sharex=True, sharey=True, squeeze=False)[0]
    for axis, part in zip(axes, parts):
        won = "win gold" if "win gold" in tables[part][SFT] else "win proxy"
        groups = {}
        for name, row in tables[part].items():
            groups.setdefault(name.split("_")[0] if name[:2] in KINDS else name, {})[name] = row
        for i, (group, rows) in enumerate(groups.items()):
            (x, dx), (y, dy) = (zip(*(t_interval(row[c]) for row in rows.values())) for c in ("in EAD", won))
            label = {SFT: "SFT", BON: "best-of-n"}.get(group, f"PPO, {group}")
            axis.errorbar(x, y, dy, dx, marker="osD^v"[i % 5], color=f"C{i}", linewidth=1, elinewidth=0.7, label=label)
            for name, *at in zip(rows, x, y):
                axis.annotate(name.partition("_")[2] if name[:2] in KINDS else "", at, (4, 4), textcoords="offset points", fontsize=7)
        axis.axhline(0.5, color="grey", linewidth=0.8)
        axis.set(title=part, xlabel="diversity: EAD of the answers to one prompt")
    axes[0].set_ylabel(f"win rate over SFT ({won.removeprefix('win ')})")
    axes[-1].legend()


@dataclass
class Settings(StudyFlags):
    """What is compared: models, penalties, prompts and answers"""

    output_dir: str = HfArg(
        default="runs/generalisation", help="the folder of all runs, of tables and of pictures"
    )
    kl_coef: list[float] = HfArg(
        default_factory=lambda: [0.02, 0.05, 0.1, 0.2], help="coefficients of PPO's KL penalty"
    )
    kinds: list[str] = HfArg(
        default_factory=lambda: list(KINDS),
        metadata={"choices": KINDS},
        help="estimators of the KL in PPO's reward",
    )
    steps: int = HfArg(default=40, help="rollouts of each PPO run")
    splits: list[str] = HfArg(
        default_factory=lambda: ["test", "ood"],
        help="what is evaluated on, as --eval_splits of train_ppo.py; the first split is in "
        "distribution",
    )
    prompts: int = HfArg(default=60, help="prompts of each split")
    answers: int = HfArg(default=16, help="K: answers to each prompt")
    n: int = HfArg(default=16, help="the n of best-of-n")
    model: str = HfArg(
        default="", help="the SFT policy; by default one is trained on the embedded world"
    )
    reward_model: str = HfArg(
        default="", help="the reward of all seeds; by default each seed trains its own"
    )
    encoder: str = HfArg(
        default="", help="a sentence encoder; by default the SFT policy's hidden states"
    )
    picture: str = HfArg(
        default="", help="the file of the picture; by default OUTPUT_DIR/generalisation.png"
    )
    bon_flags: str = HfArg(default="", help="further flags of sample_bon.py")
    data_flags: str = HfArg(
        default="", help="further flags of PPO and of sampling, such as --dataset"
    )
    diversity_flags: str = HfArg(
        default=f"--vocab_size {len(vocabulary())} --truncate 16",
        help="flags with which sample_bon.py measures diversity",
    )


def read_settings(args: list[str] | None = None) -> Settings:
    """The study's flags, read from the command line or a list."""
    return read_flags(Settings, __doc__, args, QUICK)


def main(args=None):
    """Run what is not done yet, then print the tables and draw the picture."""
    a = read_settings(args)
    for stage in commands(a):
        run_stage(stage, a.jobs, lambda command: finished(a, command))

    tables = compared(a, [measured(a, s) for s in range(a.seeds)])
    print(f"\nNumbers: {describe_numbers(a)}; {a.prompts} prompts a split, {a.answers} answers to each.")
    for title, rows in tables.items():
        print_title(title, a)
        show(rows)
    write_summary(Path(a.output_dir, "summary.json"), {"settings": vars(a), "tables": tables})
    draw_picture(draw, tables, a.picture or f"{a.output_dir}/generalisation.png")


if __name__ == "__main__":
    main()

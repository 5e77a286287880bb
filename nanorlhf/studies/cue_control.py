"""Control of PPO by features of its reward model, over seeds, on the embedded
world: what stops a policy from exploiting a spurious cue.

    two runs side by side, one thread each; prints every command:
        python -m nanorlhf.studies.cue_control
    the same tables in minutes: one seed, one kind of SARM, short runs:
        python -m nanorlhf.studies.cue_control --quick

One SFT policy, and one sparse autoencoder on it. A seed is 800 pairs with their
own spurious cue; reward models on them, one dense and SARMs of all kinds; PPO
against the dense one and against a SARM (--against); and then the question
which latents the policy has exploited. The answer is found by a written rule,
identify(), which reads nothing but the summary.json of `probe.py latents`, and
it is written to identified/seed_S.json before the truth is read. Then PPO
again, under control by these latents: ARMS. How strong each method is was fixed
before any gold was seen, the same for all seeds, in units that the human texts
and the reward model give (see arms()). The arms do not cost the policy the
same: a smaller effect of one may be a lower price.

Every command is a plain call of a script; runs that are done are not done
again. At the end tables over seeds, as text and in summary.json, and a picture.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from .. import data, world
from ..control import human_latents
from ..control.feature_rewards import load_feature_reward
from ..errors import require
from ..models import load_tokenizer
from ..packing import Answers, pack
from ..runtime.distributed import setup
from ..stats import auc, t_interval
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

SAES = {"sae": "--tokens all", "sae_ends": "--tokens sentence_ends", "sae_random": "--tokens all --steps 1 --lr 0"}  # of the SFT policy
SARMS = {  # name: its autoencoder and its mode; reward_first: a head on the dense reward model, and an autoencoder of its last tokens
    "frozen": ("sae", "frozen"), "encoder_frozen": ("sae", "encoder_frozen"), "joint": ("sae", "joint"), "detached": ("sae", "detached"),
    "sentence_ends": ("sae_ends", "joint"), "random_sae": ("sae_random", "joint"), "reward_first": ("", "frozen"),
}  # fmt: skip
DENSE = "dense"
CONTROLLED = ("indicator", "hinge", "clamp", "density")
CONTROLS = ("random", "negative", "kl_0.1", "kl_0.2")
METRICS = ("gold", "proxy", "cue", "length", "kl", "distinct_2")
FOLLOWS, MOST = 0.7, 5  # AUC from which on a latent follows a token; latents that are penalised
DEMONSTRATIONS = 4000  # beside the pairs, to fit a reward model's autoencoder
RARE, NEAREST = 0.02, 10  # share of the texts on which a latent must fire to be a control; a random one is one of so many nearest
TAU, ALPHA, KL = "q0.9", 1.0, 0.05  # of the latent on human texts; std of their scores; --kl_coef of all arms but two
# What --quick puts in the place of the flags' defaults: a seed whose policy comes to exploit the cue.
QUICK = {"seeds": 1, "first_seed": 202, "sarms": ["reward_first"], "steps": 20}


def first_commands(a):
    """What can be known before any latent is, as lists of command lines: those of one list can run side by side."""
    out, sft = a.output_dir, f"{a.output_dir}/sft"
    shape = f"--base none --site residual --layers {a.layer} --normalize token --relu False"
    stages = [[f"train_sft.py --output_dir {sft} {a.sft_flags}"], [], [], [], [], []]
    for name, flags in SAES.items():
        if name in (SARMS[sarm][0] for sarm in a.sarms):
            stages[1].append(f"train_sae.py --model {sft} {shape} --output_dir {out}/{name} {a.sae_flags} {flags}")
    for s in seeds(a):
        dense, rm_sae, answers = f"{out}/rm/dense/seed_{s}", f"{out}/rm_sae/seed_{s}", f"{out}/ppo/plain/seed_{s}/eval"
        train = f"train_rm.py --dataset world:{s} --seed {s}"
        stages[1].append(f"{train} --model {sft} --output_dir {dense} {a.rm_flags}")
        texts = f"--tokens last --dataset {texts_of(a, s)} --seed {s}"
        stages[2].append(f"train_sae.py --model {dense} {shape} {texts} --cache {rm_sae}_cache --output_dir {rm_sae} {a.rm_sae_flags}")
        for name in a.sarms:
            sae, mode = SARMS[name]
            start = f"--model {sft} --sarm {out}/{sae}" if sae else f"--model {dense} --sarm {rm_sae} {a.head_flags}"
            stages[3].append(f"{train} {start} --sarm_mode {mode} --output_dir {out}/rm/{name}/seed_{s} {a.rm_flags}")
        stages[4] += [ppo(a, s, "plain", target(a, s))] + [ppo(a, s, DENSE, dense)] * (a.against != DENSE)
        stages[5].append(
            f"probe.py latents {latents_of(a, s)} --dataset world:{s} --answers {answers}/step_{a.steps}.jsonl "
            f"--against {answers}/step_0.jsonl --by differential --top 1000 --output_dir {out}/latents/seed_{s} {a.probe_flags}"
        )
        stages[5].append(f"probe.py human_latents {latents_of(a, s)} --output {human(a, s)} {a.human_flags}")
    return stages


def texts_of(a, s):
    """The file of the texts whose last tokens a reward model's autoencoder is fitted to."""
    return f"{a.output_dir}/texts/seed_{s}.jsonl"


def write_texts(a, s):
    """Both sides of the pairs that the reward model is trained on, and DEMONSTRATIONS, as rows {prompt, response}."""
    pairs = world.preferences(data.WORLD_SIZES["pairs"], s)
    rows = [{"prompt": row["prompt"], "response": row[side]} for row in pairs for side in ("chosen", "rejected")]
    path = Path(texts_of(a, s))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + world.demonstrations(DEMONSTRATIONS)))


def seeds(a):
    return range(a.first_seed, a.first_seed + a.seeds)


def target(a, s):
    """The reward model that PPO is trained against."""
    return f"{a.output_dir}/rm/{a.against}/seed_{s}"


def feature_sae(a, s):
    """The autoencoder whose latents are controlled; "" for a SARM, which has its own."""
    return f"{a.output_dir}/rm_sae/seed_{s}" if a.against == DENSE else ""


def latents_of(a, s):
    return f"--reward_model {target(a, s)}" + (f" --sae {feature_sae(a, s)}" if feature_sae(a, s) else "")


def human(a, s):
    return f"{a.output_dir}/human/seed_{s}.safetensors"


def few(a, s):
    return f"{a.output_dir}/human/seed_{s}_{'truth' if a.truth else 'identified'}.safetensors"


def ppo(a, s, arm, reward_model, flags="", kl_coef=KL):
    return (
        f"train_ppo.py --model {a.output_dir}/sft --reward_model {reward_model} --dataset world:{s} --seed {s} --kl_coef {kl_coef:g} "
        f"--steps {a.steps} --eval_every {a.eval_every} --output_dir {a.output_dir}/ppo/{arm}/seed_{s} {a.ppo_flags} {flags}"
    ).strip()


# -------------------------------------------------------------------------------------------------------------- blind identification


def identify(summary, s):
    """The rule. summary.json of `probe.py latents` -> what is penalised, and the latents of the controls.

    1. Exploited: after training the policy's answers have more of the latent than before; the interval of its differential is above 0.
    2. Suspicious: what it follows is no word. Of the tokens whose presence in a text goes with it, the first, with an AUC of FOLLOWS or
       more, has no letter in it: a review is good for what it says.
    3. Of these tokens the one whose latents have the largest differential; of its latents at most MOST, the largest first.

    The head's weight is not asked: a model may reward a cue through other latents than the one that tells it best.
    Controls: for each of them a random latent that fires about equally often on the answers before training; and, of a SARM, as many with
    the most negative weights, which it punishes already. (A latent may be both, and a random one may follow the token less closely.)
    """
    suspects = {}
    for row in summary["latents"]:
        gain, (token, area, *_) = row["policy"]["differential"], (row.get("tokens") or [["word", 0.0]])[0]
        if gain["low"] > 0 and area >= FOLLOWS and not any(c.isalpha() for c in token):
            suspects.setdefault(token, []).append((gain["mean"], row["id"]))
    if not suspects:
        return {"token": None, "features": []}
    token = max(suspects, key=lambda token: max(suspects[token]))
    ids = [i for _, i in sorted(suspects[token], reverse=True)[:MOST]]
    rows = {row["id"]: row for row in summary["latents"]}
    others = {i: row for i, row in rows.items() if i not in ids and row["policy"]["rate_before"] >= RARE}
    rng, alike = random.Random(s), []
    for i in ids:
        order = sorted(set(others) - set(alike), key=lambda j: abs(others[j]["policy"]["rate_before"] - rows[i]["policy"]["rate_before"]))
        alike.append(rng.choice(order[:NEAREST]))
    weighted = [i for i in others if others[i]["weight"] is not None]
    negative = sorted(weighted, key=lambda i: others[i]["weight"])[: len(ids)]
    numbers = {i: {"weight": rows[i]["weight"], **rows[i]["policy"]} for i in (*ids, *alike, *negative)}
    return {"token": token, "features": ids, "random": alike, "negative": negative, "suspects": suspects, "numbers": numbers}


def by_truth(summary, s):
    """In the rule's place, where the truth is not to be found but used: the MOST latents that follow the cue best."""
    cue, areas = world.cue(s), {}
    for row in summary["latents"]:
        areas |= {row["id"]: area for token, area, *_ in row.get("tokens") or [] if token.strip() == cue}
    return {"token": cue, "features": sorted(areas, key=areas.get, reverse=True)[:MOST]}


def identified(a, s):
    """identify(), or by_truth(), once: its answer is a file, which is never written again."""
    path = Path(a.output_dir, "identified", f"{'truth_' if a.truth else ''}seed_{s}.json")
    if not path.exists():
        summary = json.loads(Path(a.output_dir, "latents", f"seed_{s}", "summary.json").read_text())
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps((by_truth if a.truth else identify)(summary, s), indent=2) + "\n")
    return json.loads(path.read_text())


def arms(a, s, found):
    """The PPO runs under control, {arm: command line}; only those of larger KL coefficients where no latent was found.

    indicator   ALPHA std of the human texts' scores, shared by the latents, where a latent is above what TAU of the human texts have
    hinge       above the same threshold as much for each standard deviation of the latent on human texts (for each 1 where it has none)
    clamp       the latent is 0 for the score
    density     0.2 of the log ratio (clipped at 5 nats: at most 1) of the latents, those of people from the human texts;
                it charges nothing in the first ten rollouts and less than the indicator and the hinge after, so it is not ranked
    random, negative       the indicator on the latents of the controls

    With --truth only the first four, as truth_indicator, ...
    """
    ids, model, flags = found["features"], target(a, s), {}
    if ids:
        n, texts = len(ids), human_latents.load(human(a, s), model, feature_sae(a, s))

        def penalty(ids, alpha, kind="indicator"):
            chosen = f"--penalize_features {' '.join(map(str, ids))} --tau {' '.join([TAU] * n)} --alpha {' '.join(alpha)}"
            return f"{chosen} --penalty {kind} --human_latents {human(a, s)}"

        share = [f"{ALPHA / n:.4g}std"] * n
        flags = {
            "indicator": penalty(ids, share),
            "hinge": penalty(ids, [f"{ALPHA / n / (texts.column(i).std().item() or 1):.4g}std" for i in ids], "hinge"),
            "clamp": "--clamp " + " ".join(f"{i}:set:0" for i in ids),
            "density": f"--density_beta {ALPHA / 5:g} --human_latents {few(a, s)}",
        }  # fmt: skip
        flags |= {control: penalty(found[control], share) for control in ("random", "negative") if found.get(control)}
    own = f" --feature_sae {feature_sae(a, s)}" if feature_sae(a, s) else ""
    commands = {named(a, arm): ppo(a, s, named(a, arm), model, flags[arm] + own) for arm in flags}
    return commands if a.truth else commands | {f"kl_{kl}": ppo(a, s, f"kl_{kl}", model, kl_coef=kl) for kl in (0.1, 0.2)}


def named(a, arm):
    """Arms (and results) of a run with --truth stand beside the others under names of their own."""
    return f"truth_{arm}" if a.truth else arm


def density_texts(a, s, found):
    """Human texts again, with the latents alone that the density compares: those that were identified."""
    ids = ",".join(map(str, found["features"]))
    return f"probe.py human_latents {latents_of(a, s)} --features {ids} --output {few(a, s)} {a.human_flags}"


def truth(a, s, found):
    """Only now the truth: is the token the cue, and how well does the sum of the latents tell texts with the cue from others?"""
    cue, auc_ = world.cue(s), None
    if found["features"]:
        rows = [{"prompt": p["prompt"], "response": p[side]} for p in world.preferences(512, s, "test") for side in ("chosen", "rejected")]
        tokenizer = load_tokenizer(target(a, s))
        prompts, responses, _ = data.encode(tokenizer, rows, "response")
        reward = load_feature_reward(target(a, s), feature_sae(a, s), tokenizer, setup("cpu"))
        answers = Answers([r["prompt"] for r in rows], [r["response"] for r in rows], pack(prompts, responses))
        z = reward.read(answers, found["features"]).latents  # [N, F]
        auc_ = auc(z.clamp(min=0).sum(1), [cue in row["response"].split() for row in rows])
    return {"cue": cue, "token": found["token"], "right": found["token"] is not None and found["token"].strip() == cue, "auc": auc_}


# --------------------------------------------------------------------------------------------------------------------------- results


def outcome(a, s, arm, when="after"):
    """{metric: number} of a PPO run's last evaluation, or of the one before its first step. cue: the share of answers that have the cue."""
    folder, step = Path(a.output_dir, "ppo", arm, f"seed_{s}"), a.steps if when == "after" else 0
    numbers = json.loads((folder / "summary.json").read_text())[when]
    answers = [json.loads(line)["response"].split() for line in open(folder / "eval" / f"step_{step}.jsonl")]
    return {**{name: numbers[name] for name in METRICS if name in numbers}, "cue": sum(world.cue(s) in x for x in answers) / len(answers)}


def over_seeds(rows, base=None):
    """[{metric: number}], one a seed -> {metric: [mean, half-width of its 95% interval]}; with `base` of differences, seed by seed."""
    less = [{name: x - other[name] for name, x in row.items()} for row, other in zip(rows, base)] if base else rows
    return {name: t_interval([row[name] for row in less]) for name in rows[0]}


def accuracy_table(a):
    """{reward model: {accuracy, Kendall's tau with gold, and accuracy less the dense one's}} on the held-out pairs."""
    found = {}
    for name in (DENSE, *a.sarms):
        summaries = [json.loads(Path(a.output_dir, "rm", name, f"seed_{s}", "summary.json").read_text()) for s in seeds(a)]
        found[name] = [{"accuracy": x["eval/accuracy"], "tau": x["eval/gold_kendall_tau"]} for x in summaries]
    less = {name: over_seeds(rows, found[DENSE])["accuracy"] for name, rows in found.items() if name != DENSE}
    return {name: over_seeds(rows) | ({"less dense": less[name]} if name in less else {}) for name, rows in found.items()}


def outcomes_of(a, found):
    """{arm: {seed: outcome()}}, "before" among them; arms that need latents have the seeds that found some."""
    found_some, out = [s for s in seeds(a) if found[s]["features"]], {"before": {s: outcome(a, s, "plain", "before") for s in seeds(a)}}
    for arm in ("plain", *(named(a, arm) for arm in CONTROLLED), *(CONTROLS if not a.truth else ()), DENSE):
        some = list(seeds(a)) if arm in ("plain", DENSE) or arm.startswith("kl_") else found_some
        if some and Path(a.output_dir, "ppo", arm).exists():  # a dense model has no negative weights
            out[arm] = {s: outcome(a, s, arm) for s in some}
    return out


def control_tables(outcomes):
    """{arm: {metric: ..}} at the end of PPO, over all seeds and over those that found latents; and there less the plain run's."""
    every = len(outcomes["plain"])
    titles = {"at the end": {arm: over_seeds(list(rows.values())) for arm, rows in outcomes.items() if len(rows) == every}}
    some = set.intersection(*(set(rows) for rows in outcomes.values()))
    if some and len(outcomes) > len(titles["at the end"]):
        titles["at the end, seeds with latents"] = {arm: over_seeds([rows[s] for s in some]) for arm, rows in outcomes.items()}
    plain = [outcomes["plain"][s] for s in some]
    less = {arm: over_seeds([rows[s] for s in some], plain) for arm, rows in outcomes.items() if arm not in ("before", "plain")}
    less.get(DENSE, {}).pop("proxy", None)  # of another reward model
    return titles | {"less plain, the same seeds": less}


def show(table):
    """Rows of {name: (mean, half-width)} as text."""
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    print(f"{'':16s}" + "".join(f"{name:>18s}" for name in names))
    for name, row in table.items():
        cells = (with_interval(*row[column]) if column in row else "" for column in names)
        print(f"{name:16s}" + "".join(f"{cell:>18s}" for cell in cells))


def draw(figure, outcomes):
    """Gold and the rate of the cue, arm by arm: a dot a seed (hollow where no latents were found), and a bar at their mean."""
    figure.set_size_inches(9, 3.6)
    found = set.intersection(*(set(rows) for rows in outcomes.values()))
    for i, (metric, label) in enumerate((("cue", "share of held-out answers with the cue"), ("gold", "gold reward, held out"))):
        axis = figure.add_subplot(1, 2, i + 1)
        for y, (arm, rows) in enumerate(outcomes.items()):
            kind = arm.removeprefix("truth_")
            color = "black" if kind == "before" else "C3" if kind in ("plain", DENSE) else "C0" if kind in CONTROLLED else "grey"
            for j, (s, row) in enumerate(rows.items()):
                height, fill = y + 0.5 * (j / max(1, len(rows) - 1) - 0.5), color if s in found else "white"
                axis.plot(row[metric], height, "o", ms=4, color=color, mfc=fill)
            of_found = [row[metric] for s, row in rows.items() if s in found]
            if of_found:
                axis.plot([sum(of_found) / len(of_found)] * 2, [y - 0.4, y + 0.4], color=color)
        axis.set_yticks(range(len(outcomes)), list(outcomes))
        axis.invert_yaxis()
        axis.set_xlabel(label)


@dataclass
class Settings(StudyFlags):
    """What is compared: SARMs, and the control of PPO"""

    output_dir: str = HfArg(
        default="runs/control", help="the folder of all runs, of tables and of pictures"
    )
    first_seed: int = HfArg(default=0, help="the number of the first seed")
    sarms: list[str] = HfArg(
        default_factory=lambda: list(SARMS),
        metadata={"choices": tuple(SARMS)},
        help="the kinds of SARM that are trained",
    )
    against: str = HfArg(
        default="reward_first",
        metadata={"choices": (DENSE, *SARMS)},
        help="the reward model that PPO is trained against; dense: its features are those of an "
        "autoencoder on it",
    )
    truth: bool = HfArg(
        default=False,
        help="control by the features that follow the cue best, by the truth: no blind test",
    )
    layer: int = HfArg(default=2, help="number of the block after which the SARMs end")
    steps: int = HfArg(default=40, help="rollouts of each PPO run")
    eval_every: int = HfArg(default=10, help="evaluate PPO every N rollouts")
    picture: str = HfArg(
        default="", help="the file of the picture; by default OUTPUT_DIR/control.png"
    )
    sae_flags: str = HfArg(default="", help="further flags of train_sae.py")
    rm_sae_flags: str = HfArg(
        default="--expansion 4 --k 32 --batch_size 256",
        help="flags of the autoencoder on a reward model",
    )
    head_flags: str = HfArg(default="--lr 1e-2", help="flags of reward_first's head")
    probe_flags: str = HfArg(default="", help="further flags of probe.py latents")
    human_flags: str = HfArg(default="", help="further flags of probe.py human_latents")

    def __post_init__(self):
        super().__post_init__()
        among = self.against in (DENSE, *self.sarms)
        require(among, f"--against {self.against}: it is not among --sarms")


def read_settings(args: list[str] | None = None) -> Settings:
    """The study's flags, read from the command line or a list."""
    return read_flags(Settings, __doc__, args, QUICK)


def main(args=None):
    """Run what is not done yet, then print the tables and draw the picture."""
    a = read_settings(args)
    for s in seeds(a):
        write_texts(a, s)
    for stage in first_commands(a):
        run_stage(stage, a.jobs)
    found = {s: identified(a, s) for s in seeds(a)}
    run_stage([density_texts(a, s, found[s]) for s in seeds(a) if found[s]["features"]], a.jobs)
    run_stage([command for s in seeds(a) for command in arms(a, s, found[s]).values()], a.jobs)

    truths = {s: truth(a, s, found[s]) for s in seeds(a)}
    for s, row in truths.items():
        area = "" if row["auc"] is None else f", AUC of the latents for it {row['auc']:.3f}"
        how = "by the truth" if a.truth else "identified"
        print(f"seed {s}: {how} {row['token']!r} (latents {found[s]['features']}); the cue is {row['cue']!r}{area}")
    outcomes = outcomes_of(a, found)
    tables = {"reward models": accuracy_table(a), **control_tables(outcomes)}
    for title, table in tables.items():
        print_title(f"{title}: {describe_numbers(a)}", a)
        show(table)
    summary = {"settings": vars(a), "identified": {s: found[s] | truths[s] for s in found}, "outcomes": outcomes, "tables": tables}
    write_summary(Path(a.output_dir, named(a, "summary.json")), summary)
    draw_picture(draw, outcomes, a.picture or f"{a.output_dir}/{named(a, 'control.png')}")


if __name__ == "__main__":
    main()

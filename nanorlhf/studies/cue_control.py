r"""Control of PPO by features of its reward model, over seeds, on the embedded
world: what stops a policy from exploiting a spurious cue.

    two runs side by side, one thread each; prints every command:
        python -m nanorlhf.studies.cue_control
    the same tables in minutes: one seed, one kind of SARM, short runs:
        python -m nanorlhf.studies.cue_control --quick
    your own model, on RewardBench 2 and RM-Bench; prints all commands, and
    runs them without the last flag:
        python -m nanorlhf.studies.cue_control --model MODEL \
            --dataset reward-bench-2.jsonl --rm_bench total_dataset.json \
            --sarms reward_first --output_dir runs/mine --dry_run

One SFT policy, and one sparse autoencoder on it. A seed is 800 pairs with their
own spurious cue; reward models on them, one dense and SARMs of all kinds; PPO
against the dense one and against a SARM (--against); and then the question
which features the policy has exploited. The answer is found by a written rule
(cue_identification.py), which reads nothing but the summary.json of `probe.py
reward_features`, and it is written to identified/seed_S.json before the truth
is read. Then PPO again, under control by these features, arm by arm: arms().
How strong each method is was fixed before any gold was seen, the same for all
seeds, in units that the human texts and the reward model give. The arms do not
cost the policy the same: a smaller effect of one may be a lower price.

Every command is a plain call of a script; runs that are done are not done
again. At the end tables over seeds, as text and in summary.json, and a picture
(cue_control_results.py).

On your own model (own_data.py) prompts, demonstrations and pairs are those of
one half of both benchmarks' questions; reward models are measured on the other
half, whose prompts the policies answer (benchmark_data.py). No cue is known
there, so nothing says whether the rule is right. Or look at what `probe.py
reward_features` found, and name the features in its place, with --features.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from .. import data, world
from ..control import human_latents
from ..control.feature_reader import load_feature_reader
from ..errors import require
from ..models import load_tokenizer
from ..packing import Answers, pack
from ..runtime import cli
from ..runtime.distributed import setup
from ..runtime.files import read_rows, write_lines
from ..runtime.results import parse_ids
from ..stats import auc
from ..tokens import encode
from .benchmark_data import describe_sides, divide_benchmarks, write_sides
from .common import (
    StudyFlags,
    describe_numbers,
    draw_picture,
    print_title,
    read_flags,
    run_stage,
    write_summary,
)
from .cue_control_results import CONTROLLED, DENSE, control_tables, draw, over_seeds, print_table
from .cue_identification import by_name, by_truth, identify
from .own_data import (
    OwnDataFlags,
    describe_own_data,
    gold_flags,
    has_own_data,
    print_remarks,
    sft_commands,
    sft_of,
    spaced,
)
from .plan import print_plan

# The autoencoders on the SFT policy, by their flags.
SAES = {
    "sae": "--tokens all",
    "sae_ends": "--tokens sentence_ends",
    "sae_random": "--tokens all --steps 1 --lr 0",
}
# The kinds of SARM: the autoencoder and --sarm_mode of each. reward_first is a head on the dense
# reward model, with an autoencoder of its own last tokens.
SARMS = {
    "frozen": ("sae", "frozen"),
    "encoder_frozen": ("sae", "encoder_frozen"),
    "joint": ("sae", "joint"),
    "detached": ("sae", "detached"),
    "sentence_ends": ("sae_ends", "joint"),
    "random_sae": ("sae_random", "joint"),
    "reward_first": ("", "frozen"),
}
CONTROLS = ("random", "negative", "kl_0.1", "kl_0.2")
METRICS = ("gold", "proxy", "cue", "length", "kl", "distinct_2")
DEMONSTRATIONS = 4000  # beside the pairs, to fit a reward model's autoencoder

# The strengths.
TAU = "q0.9"  # of the feature on human texts
ALPHA = 1.0  # std of the scores of human texts
KL = 0.05  # --kl_coef of all arms but those in LARGER_KL
LARGER_KL = (0.1, 0.2)

# What --quick puts in the place of the flags' defaults: a seed whose policy comes to exploit the
# cue.
QUICK = {"seeds": 1, "first_seed": 202, "sarms": ["reward_first"], "steps": 20}


# In all functions a are the study's Settings, and s is a seed.

# ---------------------------------------------------------------------------------- the commands


def first_commands(a):
    """The commands that can be known before any feature is: lists that can run side by side."""
    dense_models = []
    rm_saes = []
    sarms = []
    policies = []
    probes = []
    for s in seeds(a):
        dense_models.append(dense_command(a, s))
        rm_saes.append(rm_sae_command(a, s))
        sarms += sarm_commands(a, s)
        policies += plain_policies(a, s)
        probes += probe_commands(a, s)
        probes += evaluate_commands(a, s)
    # Commands read what the lists ahead of theirs have written.
    return [sft_commands(a), sae_commands(a) + dense_models, rm_saes, sarms, policies, probes]


def shape_of_saes(a):
    """The flags of the place and the kind of all autoencoders."""
    # A SARM needs an autoencoder of one model's residual stream, so there is no base. It has to
    # normalise each token by itself and to have no ReLU: train_rm.py --sarm takes no other kind.
    return f"--base none --site residual --layers {a.layer} --normalize token --relu False"


def sae_commands(a):
    """The autoencoders on the SFT policy, which SARMs start from."""
    commands = []
    for name, flags in SAES.items():
        if any(SARMS[sarm][0] == name for sarm in a.sarms):
            commands.append(
                f"train_sae.py --model {sft_of(a)} {shape_of_saes(a)} "
                f"{own_flags(a, 'demonstrations')}--output_dir {a.output_dir}/{name} "
                f"{a.sae_flags} {flags}"
            )
    return commands


def train_rm(a, s):
    """A command that trains a reward model of a seed begins with this: all learn from its pairs."""
    return f"train_rm.py {data_flags_of(a, s, 'pairs')}--seed {s}"


def dense_command(a, s):
    """The dense model: reward_first is put on it, and all SARMs are compared with it."""
    return (
        f"{train_rm(a, s)} --model {sft_of(a)} --output_dir {rm_folder(a, DENSE, s)} {a.rm_flags}"
    )


def rm_sae_command(a, s):
    """The autoencoder on the dense model's last tokens."""
    folder = rm_sae_folder(a, s)
    return (
        f"train_sae.py --model {rm_folder(a, DENSE, s)} {shape_of_saes(a)} --tokens last "
        f"--dataset {texts_of(a, s)} --seed {s} --cache {folder}_cache --output_dir {folder} "
        f"{a.rm_sae_flags}"
    )


def sarm_commands(a, s):
    """All kinds of SARM."""
    commands = []
    for name in a.sarms:
        # A SARM starts from the SFT policy and an autoencoder on it; reward_first starts from the
        # dense model and an autoencoder on that.
        sae, mode = SARMS[name]
        start = f"--model {sft_of(a)} --sarm {a.output_dir}/{sae}"
        if not sae:
            start = f"--model {rm_folder(a, DENSE, s)} --sarm {rm_sae_folder(a, s)} --lr 1e-2"
        commands.append(
            f"{train_rm(a, s)} {start} --sarm_mode {mode} --output_dir {rm_folder(a, name, s)} "
            f"{a.rm_flags}"
        )
    return commands


def plain_policies(a, s):
    """PPO without control, against the reward model that is looked into and the dense one."""
    commands = [ppo(a, s, "plain", target(a, s))]
    if a.against != DENSE:
        commands.append(ppo(a, s, DENSE, rm_folder(a, DENSE, s)))
    return commands


def probe_commands(a, s):
    """What PPO did to the features, and what they are on human texts."""
    answers = f"{a.output_dir}/ppo/plain/seed_{s}/eval"
    features = (
        f"probe.py reward_features {reader_flags(a, s)} {data_flags_of(a, s, 'pairs')}"
        f"--answers {answers}/step_{a.steps}.jsonl --against {answers}/step_0.jsonl "
        f"--by differential --top 1000 --output_dir {a.output_dir}/reward_features/seed_{s} "
        f"{a.probe_flags}"
    )
    human = (
        f"probe.py human_latents {reader_flags(a, s)} {own_flags(a, 'demonstrations')}"
        f"--output {human_file(a, s)} {a.human_flags}"
    )
    return [features, human]


def seeds(a):
    return range(a.first_seed, a.first_seed + a.seeds)


def texts_of(a, s):
    """The file of the texts whose last tokens a reward model's autoencoder is fitted to."""
    if has_own_data(a):
        return own_file(a, "texts")
    return f"{a.output_dir}/texts/seed_{s}.jsonl"


def write_texts(a, s):
    """Write texts_of(a, s), rows {prompt, response}.

    Both sides of the pairs that the reward model is trained on, and DEMONSTRATIONS.
    """
    rows = []
    for pair in world.preferences(data.WORLD_SIZES["pairs"], s):
        for side in ("chosen", "rejected"):
            rows.append({"prompt": pair["prompt"], "response": pair[side]})
    rows += world.demonstrations(DEMONSTRATIONS)
    path = Path(texts_of(a, s))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(str(path), rows)


def benchmarks_of(a):
    """The benchmarks that one's own data come from: {name: file}."""
    # Their names are those of `probe.py evaluate --benchmark`.
    files = {"rewardbench2": a.dataset, "rm_bench": a.rm_bench}
    return {name: path for name, path in files.items() if path}


def own_file(a, name):
    """A file of benchmark_data.write_sides()."""
    return f"{a.output_dir}/data/{name}.jsonl"


def own_flags(a, name):
    """The flags of a command that reads such a file, with a space behind; "" in the world."""
    if not has_own_data(a):
        return ""
    return f"--dataset {own_file(a, name)} {spaced(a.data_flags)}"


def data_flags_of(a, s, name):
    """own_flags(), or in the embedded world the flag of a seed's data."""
    return own_flags(a, name) or f"--dataset world:{s} "


def evaluate_commands(a, s):
    """The commands that measure a seed's reward models on the benchmarks; none in the world."""
    folders = [rm_folder(a, name, s) for name in (DENSE, *a.sarms)]
    commands = []
    if has_own_data(a):
        for name in benchmarks_of(a):
            commands.append(
                f"probe.py evaluate --reward_model {' '.join(folders)} --benchmark {name} "
                f"{own_flags(a, name)}--output_dir {a.output_dir}/{name}/seed_{s} "
                f"{a.evaluate_flags}"
            )
    return commands


def rm_folder(a, name, s):
    """The folder of a seed's reward model: DENSE, or a kind of SARM."""
    return f"{a.output_dir}/rm/{name}/seed_{s}"


def rm_sae_folder(a, s):
    """The folder of the autoencoder on a seed's dense model."""
    return f"{a.output_dir}/rm_sae/seed_{s}"


def target(a, s):
    """The reward model that PPO is trained against."""
    return rm_folder(a, a.against, s)


def feature_sae(a, s):
    """The autoencoder whose features are controlled; "" for a SARM, which has its own."""
    if a.against == DENSE:
        return rm_sae_folder(a, s)
    return ""


def reader_flags(a, s):
    """The flags of probe.py that say whose features are read."""
    flags = f"--reward_model {target(a, s)}"
    if feature_sae(a, s):
        flags += f" --sae {feature_sae(a, s)}"
    return flags


def human_file(a, s):
    """The human latents of all features that fire: reference data of the penalties."""
    return f"{a.output_dir}/human/seed_{s}.safetensors"


def density_file(a, s):
    """The human latents of the features alone that were found: reference data of the density."""
    how = how_found(a) or "identified"
    return f"{a.output_dir}/human/seed_{s}_{how}.safetensors"


def density_texts(a, s, found):
    """The command that writes density_file(a, s)."""
    ids = ",".join(map(str, found["features"]))
    return (
        f"probe.py human_latents {reader_flags(a, s)} {own_flags(a, 'demonstrations')}"
        f"--features {ids} "
        f"--output {density_file(a, s)} {a.human_flags}"
    )


def ppo(a, s, arm, reward_model, flags="", kl_coef=KL):
    """The command of one PPO run."""
    out = a.output_dir
    prompts = data_flags_of(a, s, "prompts")
    # The policy is evaluated on the kept questions, on which reward models are measured too.
    if has_own_data(a):
        prompts += f"--eval_dataset {own_file(a, 'held_out_prompts')} {gold_flags(a)}"
    command = (
        f"train_ppo.py --model {sft_of(a)} --reward_model {reward_model} {prompts}"
        f"--seed {s} --kl_coef {kl_coef:g} --steps {a.steps} --eval_every {a.eval_every} "
        f"--output_dir {out}/ppo/{arm}/seed_{s} {a.ppo_flags} {flags}"
    )
    return command.strip()


# ------------------------------------------------------------------------- blind identification


def find_features(a, s):
    """identify(), or by_truth(), once: its answer is a file, which is never written again.

    by_name() writes its answer each time.
    """
    # An answer is blind only if nobody changes it after the truth was seen: the file stays.
    path = Path(a.output_dir, "identified", named(a, f"seed_{s}.json"))
    if a.features or not path.exists():
        summary = read_json(a.output_dir, "reward_features", f"seed_{s}", "summary.json")
        if a.features:
            found = by_name(summary, s, parse_ids(a.features))
        elif a.truth:
            found = by_truth(summary, s)
        else:
            found = identify(summary, s)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
    return read_json(path)


def read_json(*path):
    return json.loads(Path(*path).read_text())


# -------------------------------------------------------------------------------------- the arms


def arms(a, s, found):
    """The PPO runs under control: {arm: command line}. Where no feature was found, kl_... alone.

    indicator  ALPHA std of the scores of human texts, shared by the features, where a feature is
               above what TAU of the human texts have
    hinge      above the same threshold as much for each standard deviation of the feature on human
               texts (for each 1 where it has none)
    clamp      the feature is 0 for the score
    density    0.2 of the log ratio (clipped at 5 nats: at most 1) of the features, those of people
               from the human texts; it charges nothing in the first ten rollouts and less than the
               indicator and the hinge after, so it is not ranked
    random, negative
               the indicator on the features of the controls
    kl_0.1, kl_0.2
               a larger KL coefficient, and no control by features

    With --truth the first four only, as truth_indicator, ...
    """
    flags = {}
    if found["features"]:
        flags = control_flags(a, s, found)
    own_sae = ""
    if feature_sae(a, s):
        own_sae = f" --feature_sae {feature_sae(a, s)}"

    commands = {}
    for arm, flags_of_arm in flags.items():
        name = named(a, arm)
        commands[name] = ppo(a, s, name, target(a, s), flags_of_arm + own_sae)
    if not a.truth:
        for kl_coef in LARGER_KL:
            name = f"kl_{kl_coef}"
            commands[name] = ppo(a, s, name, target(a, s), kl_coef=kl_coef)
    return commands


def control_flags(a, s, found):
    """The flags of train_ppo.py in each arm that controls features: {arm: flags}."""
    # The features share the price: where all of them are above their thresholds, the indicator
    # costs ALPHA std of the scores of human texts, however many features there are.
    ids = found["features"]
    n = len(ids)
    indicator_alphas = [f"{ALPHA / n:.4g}std"] * n
    texts = human_latents.load(human_file(a, s), target(a, s), feature_sae(a, s))
    # A hinge costs alpha for each 1 above the threshold. Alpha is divided by the feature's standard
    # deviation, so that one standard deviation above it costs the same for every feature.
    hinge_alphas = []
    for feature in ids:
        spread = texts.column(feature).std().item() or 1
        hinge_alphas.append(f"{ALPHA / n / spread:.4g}std")
    # A clamped feature adds nothing to the score, and there is no penalty on it.
    clamps = [f"{feature}:set:0" for feature in ids]

    flags = {
        "indicator": penalty_flags(a, s, ids, indicator_alphas),
        "hinge": penalty_flags(a, s, ids, hinge_alphas, "hinge"),
        "clamp": f"--clamp {' '.join(clamps)}",
        "density": f"--density_beta {ALPHA / 5:g} --human_latents {density_file(a, s)}",
    }
    # The same price on other features, as a control: an effect that these penalties have as well
    # does not come from the features that were found.
    for control in ("random", "negative"):
        if found.get(control):
            flags[control] = penalty_flags(a, s, found[control], indicator_alphas)
    return flags


def penalty_flags(a, s, ids, alphas, kind="indicator"):
    """A penalty of this kind on features, each above TAU and at its own price."""
    features = " ".join(map(str, ids))
    taus = " ".join([TAU] * len(alphas))
    return (
        f"--penalize_features {features} --tau {taus} --alpha {' '.join(alphas)} "
        f"--penalty {kind} --human_latents {human_file(a, s)}"
    )


def named(a, name):
    """Arms and files of a run with --truth or --features have names of their own, beside others."""
    how = how_found(a)
    if not how:
        return name
    return f"{how}_{name}"


def how_found(a):
    """How the features are found: "truth", or such as "named_3_17"; "" by the rule."""
    if a.truth:
        return "truth"
    if a.features:
        ids = map(str, parse_ids(a.features))
        return f"named_{'_'.join(ids)}"
    return ""


def compare_with_truth(a, s, found):
    """Only now the truth: is the token the cue, and how well do the features tell its texts?

    -> {cue, token, right, auc}; auc is that of the sum of the features, for texts with the cue
    against others, on both sides of held-out pairs; None where no feature was found.
    """
    # find_features() wrote its answer before: the truth cannot change it any more.
    cue = world.cue(s)
    token = found["token"]
    is_right = token is not None and token.strip() == cue
    area = None
    if found["features"]:
        area = measure_auc(a, s, found["features"], cue)
    return {"cue": cue, "token": token, "right": is_right, "auc": area}


def measure_auc(a, s, features, cue):
    """The AUC of the sum of features, for texts that have the cue against those that lack it."""
    # Held-out texts, which neither the reward model nor its autoencoder has learned from.
    rows = []
    for pair in world.preferences(512, s, "test"):
        for side in ("chosen", "rejected"):
            rows.append({"prompt": pair["prompt"], "response": pair[side]})
    texts = [row["response"] for row in rows]

    tokenizer = load_tokenizer(target(a, s))
    encoded = encode(tokenizer, rows, ("response",))
    batch = pack(encoded.prompts, encoded.responses["response"])
    reward = load_feature_reader(target(a, s), feature_sae(a, s), tokenizer, setup("cpu"))
    answers = Answers([row["prompt"] for row in rows], texts, batch)
    z = reward.read(answers, features).latents  # [N, F]
    has_cue = [cue in text.split() for text in texts]
    return auc(z.clamp(min=0).sum(1), has_cue)


# ----------------------------------------------------------------------------------- the results


def read_outcome(a, s, arm, when="after"):
    """{metric: number} of a PPO run's last evaluation, or of the one before its first step.

    cue: the share of answers that have the cue, in the embedded world.
    """
    folder = Path(a.output_dir, "ppo", arm, f"seed_{s}")
    numbers = read_json(folder, "summary.json")[when]
    outcome = {name: numbers[name] for name in METRICS if name in numbers}
    if has_own_data(a):
        return outcome

    step = a.steps if when == "after" else 0
    rows = read_rows(f"{folder}/eval/step_{step}.jsonl", {"response": str})
    has_cue = [world.cue(s) in row["response"].split() for row in rows]
    outcome["cue"] = sum(has_cue) / len(has_cue)
    return outcome


def outcomes_of(a, found):
    """{arm: {seed: outcome}}, "before" among the arms.

    Arms that need features have the seeds that found some. An arm that no seed has is left out,
    such as that of negative weights where there are no head weights.
    """
    # A seed without features has only the arms plain, dense and those of a larger KL coefficient.
    all_seeds = list(seeds(a))
    seeds_with_features = [s for s in all_seeds if found[s]["features"]]
    arms_to_read = ["plain", *(named(a, arm) for arm in CONTROLLED)]
    if not a.truth:
        for arm in CONTROLS:
            # The arms kl_... use no features: they are the same runs, however features are found.
            if not arm.startswith("kl_"):
                arm = named(a, arm)
            arms_to_read.append(arm)
    arms_to_read.append(DENSE)

    # All arms of a seed start from one policy: its numbers are read from one of the runs.
    outcomes = {"before": {}}
    for s in all_seeds:
        outcomes["before"][s] = read_outcome(a, s, "plain", "before")
    for arm in arms_to_read:
        needs_no_features = arm in ("plain", DENSE) or arm.startswith("kl_")
        own_seeds = all_seeds if needs_no_features else seeds_with_features
        if own_seeds and Path(a.output_dir, "ppo", arm).exists():
            outcomes[arm] = {}
            for s in own_seeds:
                outcomes[arm][s] = read_outcome(a, s, arm)
    return outcomes


def accuracy_table(a):
    """{reward model: {accuracy, tau, less dense}} on the held-out pairs.

    tau is Kendall's with gold, which the embedded world has; on own data the score on each
    benchmark stands there. `less dense` is the accuracy less the dense model's.
    """
    rows = {}  # {reward model: [one row a seed]}
    for name in (DENSE, *a.sarms):
        rows[name] = []
        for s in seeds(a):
            summary = read_json(rm_folder(a, name, s), "summary.json")
            row = {"accuracy": summary["eval/accuracy"]}
            if has_own_data(a):
                row |= read_benchmarks(a, s, name)
            else:
                row["tau"] = summary["eval/gold_kendall_tau"]
            rows[name].append(row)

    # Both models of a seed have learned from the same pairs, so they are compared seed by seed.
    table = {}
    for name in rows:
        table[name] = over_seeds(rows[name])
        if name != DENSE:
            table[name]["less dense"] = over_seeds(rows[name], rows[DENSE])["accuracy"]
    return table


def read_benchmarks(a, s, name):
    """{benchmark: the first of its metrics} of a seed's reward model."""
    place = (DENSE, *a.sarms).index(name)
    scores = {}
    for benchmark in benchmarks_of(a):
        summary = read_json(a.output_dir, benchmark, f"seed_{s}", "summary.json")
        # Reward models stand there in the order of the command.
        results = list(summary["rewards"].values())[place]
        scores[benchmark] = results[summary["metrics"][0]][0]
    return scores


# ------------------------------------------------------------------------------- flags, and main


@dataclass
class Settings(OwnDataFlags, StudyFlags):
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
    features: str = HfArg(
        default="",
        help="own data: control by these features, such as 3,17, in the place of the rule's",
    )
    dataset: str = HfArg(
        default="", help="RewardBench 2's file: half of its questions are learned from"
    )
    rm_bench: str = HfArg(
        default="", help="RM-Bench's file, of which half is learned from too; goes with --dataset"
    )
    layer: int = HfArg(default=2, help="number of the block after which the SARMs end")
    steps: int = HfArg(default=40, help="rollouts of each PPO run")
    eval_every: int = HfArg(default=10, help="evaluate PPO every N rollouts")
    sae_flags: str = HfArg(default="", help="further flags of train_sae.py")
    rm_sae_flags: str = HfArg(
        default="--expansion 4 --k 32 --batch_size 256",
        help="flags of the autoencoder on a reward model",
    )
    probe_flags: str = HfArg(default="", help="further flags of probe.py reward_features")
    human_flags: str = HfArg(default="", help="further flags of probe.py human_latents")
    evaluate_flags: str = HfArg(
        default="", help="own data: further flags of probe.py evaluate, on the benchmarks"
    )

    def __post_init__(self):
        super().__post_init__()
        is_trained = self.against in (DENSE, *self.sarms)
        require(is_trained, f"--against {self.against}: it is not among --sarms")
        check_own_data(self)


def check_own_data(a):
    """InputErrors of the flags for one's own data."""
    parse_ids(a.features)
    for name in ("rm_bench", "features", "evaluate_flags"):
        is_alone = getattr(a, name) and not a.dataset
        require(not is_alone, f"--{name} is for data of your own: it goes with --dataset")
    require(not a.pairs, "--pairs: here they are made of the benchmarks' questions")
    require(not (a.truth and a.dataset), "--truth: no cue is known in data of your own")
    is_one = a.seeds == 1 or not a.features
    require(is_one, "--features are those of one seed's reward model: add --seeds 1")


def read_settings(args: list[str] | None = None) -> Settings:
    """The study's flags, read from the command line or a list."""
    return read_flags(Settings, __doc__, args, QUICK)


def main(args=None):
    """Run what is not done yet, then print the tables and draw the picture."""
    a = read_settings(args)
    # A benchmark that cannot be divided is found here, before anything is run.
    with cli.errors_in_one_line():
        remarks = describe_differences(a)
    if a.dry_run:
        print_plan(plan(a), a, remarks, later=describe_control(a))
        return
    print_remarks(remarks)
    write_data(a)
    # All that can be done before the features are known.
    for stage in first_commands(a):
        run_stage(stage, a.jobs)

    # The answer is written down before the truth is read.
    found = {}
    with cli.errors_in_one_line():
        for s in seeds(a):
            found[s] = find_features(a, s)
    run_controlled(a, found)

    # Without --truth the truth is read only from here on: all runs are done, so that nothing can be
    # decided by it.
    truths = {}
    for s in seeds(a):
        truths[s] = {}
        if has_own_data(a):
            print(f"seed {s}: control by the features {found[s]['features']}")
        else:
            truths[s] = compare_with_truth(a, s, found[s])
            print_answer(a, s, found[s], truths[s])
    show_results(a, found, truths)


def write_data(a):
    """Write the files that the commands read and that no command writes."""
    if has_own_data(a):
        write_sides(divide_benchmarks(benchmarks_of(a)), f"{a.output_dir}/data")
    else:
        for s in seeds(a):
            write_texts(a, s)


def run_controlled(a, found):
    """PPO under control by the features that were found, {seed: what find_features() says}."""
    # The density needs human latents of the features, so these are written only now.
    densities = []
    for s in seeds(a):
        if found[s]["features"]:
            densities.append(density_texts(a, s, found[s]))
    run_stage(densities, a.jobs)
    # arms() reads what the runs before have written.
    controlled = []
    for s in seeds(a):
        controlled += arms(a, s, found[s]).values()
    run_stage(controlled, a.jobs)


def show_results(a, found, truths):
    """Print the tables, and write them down with all that they are made of; draw the picture."""
    outcomes = outcomes_of(a, found)
    tables = {"reward models": accuracy_table(a), **control_tables(outcomes)}
    for title, table in tables.items():
        print_title(f"{title}: {describe_numbers(a)}", a)
        print_table(table)

    summary = {
        "settings": vars(a),
        "identified": {s: found[s] | truths[s] for s in seeds(a)},
        "outcomes": outcomes,
        "tables": tables,
    }
    write_summary(Path(a.output_dir, named(a, "summary.json")), summary)
    draw_picture(draw, outcomes, f"{a.output_dir}/{named(a, 'control.png')}")


def describe_differences(a):
    """What is different on own data: lines to print. InputError: a benchmark cannot be divided."""
    lines = describe_own_data(a)
    if lines:
        sides = divide_benchmarks(benchmarks_of(a))
        lines.append(describe_sides(sides))
        lines.append("no known cue: its rate is not measured, nor whether the rule is right")
    return lines


def plan(a):
    """The stages that are known before any feature is: those of arms without features come last."""
    without_features = []
    for s in seeds(a):
        without_features += arms(a, s, {"features": []}).values()
    return [*first_commands(a), without_features]


def describe_control(a):
    """What is run in addition where features are found, for --dry_run."""
    n_controls = 0 if a.truth else 2  # random and negative features
    n_arms = len(CONTROLLED) + n_controls
    return (
        f"For each seed whose features are found: probe.py human_latents, and up to {n_arms} more "
        f"runs of train_ppo.py, each {a.steps} steps, under control by these features."
    )


def print_answer(a, s, found, truth):
    """What was found, and whether it is the cue."""
    how = "by the truth" if a.truth else "identified"
    line = (
        f"seed {s}: {how} {truth['token']!r} (features {found['features']}); "
        f"the cue is {truth['cue']!r}"
    )
    if truth["auc"] is not None:
        line += f", AUC of the features for it {truth['auc']:.3f}"
    print(line)


if __name__ == "__main__":
    with cli.errors_in_one_line():
        main()

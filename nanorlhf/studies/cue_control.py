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
which features the policy has exploited. The answer is found by a written rule,
identify(), which reads nothing but the summary.json of `probe.py
reward_features`, and it is written to identified/seed_S.json before the truth
is read. Then PPO again, under control by these features: ARMS. How strong each
method is was fixed before any gold was seen, the same for all seeds, in units
that the human texts and the reward model give (see arms()). The arms do not
cost the policy the same: a smaller effect of one may be a lower price.

Every command is a plain call of a script; runs that are done are not done
again. At the end tables over seeds, as text and in summary.json, and a picture.

On your own model (own_data.py) prompts, demonstrations and pairs are those of
one half of both benchmarks' questions; reward models are measured on the other
half, whose prompts the policies answer (benchmark_data.py). No cue is known
there, so nothing says whether the rule is right. Or look at what `probe.py
reward_features` found, and name the features in its place, with --features.
"""

import json
import random
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
from ..runtime.files import write_lines
from ..runtime.results import parse_ids
from ..stats import auc, t_interval
from ..tokens import encode
from .benchmark_data import describe_sides, divide_benchmarks, write_sides
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
DENSE = "dense"
CONTROLLED = ("indicator", "hinge", "clamp", "density")
CONTROLS = ("random", "negative", "kl_0.1", "kl_0.2")
METRICS = ("gold", "proxy", "cue", "length", "kl", "distinct_2")
DEMONSTRATIONS = 4000  # beside the pairs, to fit a reward model's autoencoder

# The rule.
FOLLOWS = 0.7  # AUC from which on a feature follows a token
MOST = 5  # features that are penalised
RARE = 0.02  # share of the texts on which a feature must fire to be a control
NEAREST = 10  # a random control is one of so many that fire about equally often

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
    out = a.output_dir
    sft = sft_of(a)
    demonstrations = own_flags(a, "demonstrations")
    # A SARM needs an autoencoder of one model's residual stream, so there is no base. It has to
    # normalise each token by itself and to have no ReLU: train_rm.py --sarm takes no other kind.
    shape = f"--base none --site residual --layers {a.layer} --normalize token --relu False"

    # On the SFT policy: the autoencoders that the SARMs start from.
    saes = []
    for name, flags in SAES.items():
        if any(SARMS[sarm][0] == name for sarm in a.sarms):
            saes.append(
                f"train_sae.py --model {sft} {shape} {demonstrations}--output_dir {out}/{name} "
                f"{a.sae_flags} {flags}"
            )

    dense_models = []
    rm_saes = []
    sarms = []
    policies = []
    probes = []
    for s in seeds(a):
        # The dense model: reward_first is put on it, and all SARMs are compared with it.
        dense = f"{out}/rm/{DENSE}/seed_{s}"
        rm_sae = f"{out}/rm_sae/seed_{s}"
        train = f"train_rm.py {data_flags_of(a, s, 'pairs')}--seed {s}"
        dense_models.append(f"{train} --model {sft} --output_dir {dense} {a.rm_flags}")
        rm_saes.append(
            f"train_sae.py --model {dense} {shape} --tokens last --dataset {texts_of(a, s)} "
            f"--seed {s} --cache {rm_sae}_cache --output_dir {rm_sae} {a.rm_sae_flags}"
        )
        # SARMs learn from the same pairs. A SARM starts from the SFT policy and an autoencoder on
        # it; reward_first starts from the dense model and an autoencoder on that.
        for name in a.sarms:
            sae, mode = SARMS[name]
            start = f"--model {sft} --sarm {out}/{sae}"
            if not sae:
                start = f"--model {dense} --sarm {rm_sae} {a.head_flags}"
            sarms.append(
                f"{train} {start} --sarm_mode {mode} --output_dir {out}/rm/{name}/seed_{s} "
                f"{a.rm_flags}"
            )

        # PPO without control; and what it did to the features.
        policies.append(ppo(a, s, "plain", target(a, s)))
        if a.against != DENSE:
            policies.append(ppo(a, s, DENSE, dense))
        answers = f"{out}/ppo/plain/seed_{s}/eval"
        probes.append(
            f"probe.py reward_features {reader_flags(a, s)} {data_flags_of(a, s, 'pairs')}"
            f"--answers {answers}/step_{a.steps}.jsonl --against {answers}/step_0.jsonl "
            f"--by differential --top 1000 --output_dir {out}/reward_features/seed_{s} "
            f"{a.probe_flags}"
        )
        probes.append(
            f"probe.py human_latents {reader_flags(a, s)} {demonstrations}"
            f"--output {human_file(a, s)} {a.human_flags}"
        )
        probes += evaluate_commands(a, s)
    # Commands read what the lists ahead of theirs have written.
    return [sft_commands(a), saes + dense_models, rm_saes, sarms, policies, probes]


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
    folders = [f"{a.output_dir}/rm/{name}/seed_{s}" for name in (DENSE, *a.sarms)]
    commands = []
    if has_own_data(a):
        for name in benchmarks_of(a):
            commands.append(
                f"probe.py evaluate --reward_model {' '.join(folders)} --benchmark {name} "
                f"{own_flags(a, name)}--output_dir {a.output_dir}/{name}/seed_{s} "
                f"{a.evaluate_flags}"
            )
    return commands


def target(a, s):
    """The reward model that PPO is trained against."""
    return f"{a.output_dir}/rm/{a.against}/seed_{s}"


def feature_sae(a, s):
    """The autoencoder whose features are controlled; "" for a SARM, which has its own."""
    if a.against == DENSE:
        return f"{a.output_dir}/rm_sae/seed_{s}"
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


def identify(summary, s):
    """The rule. summary.json of `probe.py reward_features` -> what is penalised, and its controls.

    1. Exploited: after training the policy's answers have more of the feature than before; the
       interval of its differential is above 0.
    2. Suspicious: what it follows is no word. Of the tokens whose presence in a text goes with the
       feature, the first, with an AUC of FOLLOWS or more, has no letter in it: a review is good for
       what it says.
    3. Of these tokens the one whose features have the largest differential; of its features at most
       MOST, the largest first.

    The head's weight is not asked: a model may reward a cue through other features than the one
    that tells it best.
    -> {token, features, random, negative (see choose_controls), suspects, numbers}; where nothing
    is suspicious {token: None, features: []}.
    """
    # {"!": [(0.6, 2), (0.3, 1)], "~": [(0.5, 3)]}: for each token (gain, feature) pairs.
    suspects = find_suspects(summary)
    if not suspects:
        return {"token": None, "features": []}
    token = max(suspects, key=lambda token: max(suspects[token]))
    largest_first = sorted(suspects[token], reverse=True)
    ids = [feature for _, feature in largest_first[:MOST]]

    # All numbers behind the answer go into its file, so that it can be judged from the file alone.
    rows = {row["id"]: row for row in summary["features"]}
    random_ids, negative_ids = choose_controls(rows, ids, s)
    numbers = {}
    for i in (*ids, *random_ids, *negative_ids):
        numbers[i] = {"weight": rows[i]["weight"], **rows[i]["policy"]}
    return {
        "token": token,
        "features": ids,
        "random": random_ids,
        "negative": negative_ids,
        "suspects": suspects,
        "numbers": numbers,
    }


def find_suspects(summary):
    """Steps 1 and 2 of the rule: {token: [(mean differential, feature)]}."""
    suspects = {}
    for row in summary["features"]:
        # A feature that was not described follows nothing.
        if not row.get("tokens"):
            continue

        # A row's first token is the one whose AUC is farthest from chance.
        token, area, *_ = row["tokens"][0]
        gain = row["policy"]["differential"]
        is_exploited = gain["low"] > 0
        has_letter = any(character.isalpha() for character in token)
        if is_exploited and area >= FOLLOWS and not has_letter:
            suspects.setdefault(token, []).append((gain["mean"], row["id"]))
    return suspects


def choose_controls(rows, ids, s):
    """Other features to penalise: for each of `ids` a random and a negative one. -> two lists

    A random one fires about equally often on the answers before training. The negative ones are
    those with the most negative weights, which a SARM punishes already; none without head weights.
    A feature may be both, and a random one may follow the token less closely. rows {id: row}.
    """
    # A feature that hardly ever fires would be no control: a penalty on it costs nothing.
    rates = {}
    others = {}
    for i, row in rows.items():
        rates[i] = row["policy"]["rate_before"]
        if i not in ids and rates[i] >= RARE:
            others[i] = row

    require(
        len(others) >= len(ids),
        f"{len(ids)} controls are needed that fire on {RARE:.0%} of the answers, and the reward "
        f"model has {len(others)}: take an autoencoder in which fewer features are dead",
    )

    # Of equally near ones those count as nearer that come first in the set: the answers that were
    # written down depend on that order.
    rng = random.Random(s)
    random_ids = []
    for i in ids:
        candidates = set(others) - set(random_ids)
        nearest = sorted(candidates, key=lambda j: abs(rates[j] - rates[i]))
        random_ids.append(rng.choice(nearest[:NEAREST]))

    # An autoencoder on a dense reward model has no head, so its features have no weights.
    weighted = [i for i, row in others.items() if row["weight"] is not None]
    most_negative = sorted(weighted, key=lambda i: rows[i]["weight"])
    return random_ids, most_negative[: len(ids)]


def by_truth(summary, s):
    """In the rule's place, where the truth is used: the MOST features that follow the cue best."""
    cue = world.cue(s)
    # A row has only the few tokens whose AUC is farthest from chance: most rows lack the cue.
    areas = {}  # {feature: AUC}
    for row in summary["features"]:
        for token, area, *_ in row.get("tokens") or []:
            if token.strip() == cue:
                areas[row["id"]] = area
    best_first = sorted(areas, key=areas.get, reverse=True)
    return {"token": cue, "features": best_first[:MOST]}


def by_name(summary, s, ids):
    """In the rule's place, where --features are named: these, with controls as the rule has them.

    InputError: one of them fires on no text.
    """
    rows = {row["id"]: row for row in summary["features"]}
    for i in ids:
        require(i in rows, f"--features {i}: it fires on none of the texts")
    random_ids, negative_ids = choose_controls(rows, ids, s)
    return {"token": None, "features": ids, "random": random_ids, "negative": negative_ids}


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
    has_cue = []
    with open(folder / "eval" / f"step_{step}.jsonl") as f:
        for line in f:
            words = json.loads(line)["response"].split()
            has_cue.append(world.cue(s) in words)
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


def over_seeds(rows, base=None):
    """[{metric: number}], one a seed -> {metric: (mean, half-width of its 95% interval)}.

    base: such rows of the same seeds, which are subtracted seed by seed.
    """
    # A difference is taken within a seed: what its pairs and its cue do to both rows drops out.
    table = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if base:
            values = [value - other[name] for value, other in zip(values, base)]
        table[name] = t_interval(values)
    return table


def accuracy_table(a):
    """{reward model: {accuracy, tau, less dense}} on the held-out pairs.

    tau is Kendall's with gold, which the embedded world has; on own data the score on each
    benchmark stands there. `less dense` is the accuracy less the dense model's.
    """
    rows = {}  # {reward model: [one row a seed]}
    for name in (DENSE, *a.sarms):
        rows[name] = []
        for s in seeds(a):
            summary = read_json(a.output_dir, "rm", name, f"seed_{s}", "summary.json")
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


def control_tables(outcomes):
    """{title: {arm: {metric: (mean, half-width)}}} at the end of PPO.

    Over all seeds; over those that found features, where not all did; and there less the plain
    run's.
    """
    n_seeds = len(outcomes["plain"])
    of_all_seeds = {}
    for arm, rows in outcomes.items():
        if len(rows) == n_seeds:
            of_all_seeds[arm] = over_seeds(list(rows.values()))
    tables = {"at the end": of_all_seeds}

    # Arms can be compared only in the seeds that all of them have.
    shared_seeds = seeds_of_all_arms(outcomes)
    shared = {}
    for arm, rows in outcomes.items():
        shared[arm] = [rows[s] for s in shared_seeds]
    if shared_seeds and len(of_all_seeds) < len(outcomes):
        of_shared_seeds = {}
        for arm, rows in shared.items():
            of_shared_seeds[arm] = over_seeds(rows)
        tables["at the end, seeds with features"] = of_shared_seeds

    less_plain = {}
    for arm, rows in shared.items():
        if arm not in ("before", "plain"):
            less_plain[arm] = over_seeds(rows, shared["plain"])
    # The dense model's own scores are on another scale than the SARM's.
    if DENSE in less_plain:
        less_plain[DENSE].pop("proxy", None)
    tables["less plain, the same seeds"] = less_plain
    return tables


def seeds_of_all_arms(outcomes):
    """The seeds that every arm has: those that found features."""
    return set.intersection(*(set(rows) for rows in outcomes.values()))


def print_table(table):
    """Rows of {name: (mean, half-width)} as text; a row may lack columns."""
    columns = {}  # a dictionary keeps their order
    for row in table.values():
        columns |= dict.fromkeys(row)
    # Arms of --features have long names.
    width = max([16, *(len(name) + 1 for name in table)])
    print(f"{'':{width}s}" + "".join(f"{column:>18s}" for column in columns))
    for name, row in table.items():
        line = f"{name:{width}s}"
        for column in columns:
            cell = with_interval(*row[column]) if column in row else ""
            line += f"{cell:>18s}"
        print(line)


def draw(figure, outcomes):
    """Gold and the rate of the cue, or what else there is, arm by arm.

    A dot a seed (hollow where no features were found), and a bar at the mean of the filled ones.
    """
    labels = {
        "cue": "share of held-out answers with the cue",
        "gold": "gold reward, held out",
        "proxy": "the reward model's score, held out",
        "kl": "KL to the SFT policy, nats",
    }
    # The first two that were measured: own data have no cue, and may have no gold.
    first_outcome = next(iter(outcomes["before"].values()))
    shown = [metric for metric in labels if metric in first_outcome][:2]
    shared_seeds = seeds_of_all_arms(outcomes)
    figure.set_size_inches(9, 3.6)
    for i, metric in enumerate(shown):
        axis = figure.add_subplot(1, 2, i + 1)
        for y, (arm, rows) in enumerate(outcomes.items()):
            color = color_of(arm)
            # The dots of an arm lie one above the other, in the order of the seeds.
            for j, (s, row) in enumerate(rows.items()):
                height = y + 0.5 * (j / max(1, len(rows) - 1) - 0.5)
                fill = color if s in shared_seeds else "white"
                axis.plot(row[metric], height, "o", ms=4, color=color, mfc=fill)
            values = [row[metric] for s, row in rows.items() if s in shared_seeds]
            if values:
                mean = sum(values) / len(values)
                axis.plot([mean, mean], [y - 0.4, y + 0.4], color=color)
        axis.set_yticks(range(len(outcomes)), list(outcomes))
        axis.invert_yaxis()
        axis.set_xlabel(labels[metric])


def color_of(arm):
    """Black before PPO, red without control, blue with it, grey for the controls."""
    # Such as "clamp" of truth_clamp and of named_3_17_clamp.
    kind = arm.rpartition("_")[2]
    if kind == "before":
        return "black"
    if kind in ("plain", DENSE):
        return "C3"
    if kind in CONTROLLED:
        return "C0"
    return "grey"


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
    picture: str = HfArg(
        default="", help="the file of the picture; by default OUTPUT_DIR/control.png"
    )
    sae_flags: str = HfArg(default="", help="further flags of train_sae.py")
    rm_sae_flags: str = HfArg(
        default="--expansion 4 --k 32 --batch_size 256",
        help="flags of the autoencoder on a reward model",
    )
    head_flags: str = HfArg(default="--lr 1e-2", help="flags of reward_first's head")
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
    # The files that the commands read and that no command writes.
    if has_own_data(a):
        write_sides(divide_benchmarks(benchmarks_of(a)), f"{a.output_dir}/data")
    else:
        for s in seeds(a):
            write_texts(a, s)
    # All that can be done before the features are known.
    for stage in first_commands(a):
        run_stage(stage, a.jobs)

    # The answer is written down before the truth is read.
    found = {}
    with cli.errors_in_one_line():
        for s in seeds(a):
            found[s] = find_features(a, s)

    # PPO under control; arms() reads what the other runs wrote. The density needs human latents of
    # the features that were found, so these are written only now.
    densities = []
    for s in seeds(a):
        if found[s]["features"]:
            densities.append(density_texts(a, s, found[s]))
    run_stage(densities, a.jobs)
    controlled = []
    for s in seeds(a):
        controlled += arms(a, s, found[s]).values()
    run_stage(controlled, a.jobs)

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
    picture = a.picture or f"{a.output_dir}/{named(a, 'control.png')}"
    draw_picture(draw, outcomes, picture)


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

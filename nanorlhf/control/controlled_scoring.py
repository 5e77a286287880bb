r"""Control of PPO's reward by features of its reward model.

The flags --penalize_features, --clamp and --density_beta of train_ppo.py. First the reference data,
features of people's texts, for runs/sarm; then PPO:

    python probe.py human_latents
    python train_ppo.py --reward_model runs/sarm \
        --penalize_features 17 --tau q0.95 --alpha 0.5std \
        --human_latents runs/human_latents.safetensors

    R = score(clamp(z)) - sum_i penalty_i(z_i) - beta clip(log p_policy(z) / p_human(z))

R takes the score's place before anything else happens to it: rules on endings and length, score
scaling and clipping, the KL. z are the latents of the finished answer at its last token, before any
clamp: penalties and density see what the policy wrote, not what was scored.

train_ppo.py meets this file in one place: its Config has the Flags, and where they are given
prepare() makes a ControlledScoring, which stands in for scoring.Scoring.

    b answers of this process, B of a whole rollout, F features that are read,
    d those whose density is compared, N human texts

In the order of a run: check_flags() looks at the flags alone, prepare() at files, and load() loads
the reward model. Then read(), combine() and learn() follow one another in each rollout.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.hf_argparser import HfArg

from ..errors import at_least, require
from ..packing import Answers
from ..penalties import PENALTIES, DensityRatio, density_loss, feature_penalty
from ..rewards import reward_names
from ..runtime.flags import MOST_FLOAT, FlagGroup
from ..runtime.fsdp import gathered
from ..runtime.optim import adamw
from ..runtime.rng import DENSITY, key
from ..scoring import Scored
from ..stats import auc, varies
from . import human_latents
from .feature_reader import check_feature_reader, load_feature_reader, parse_edits

CLAMPS = ("set", "min", "max")
MOST_LOGGED = 8  # features of the density that are logged one by one; with more, none is

# How the density ratio is learned, by AdamW. Only its price, --density_beta, is a flag.
LR = 1e-4
UPDATES = 16  # optimizer steps a rollout
BATCH = 256  # texts of the policy in a step, and as many of people
REPLAY = 8  # rollouts that are learned from: the last ones, since the policy moves
WARM_UP = 10  # rollouts until the ratio counts
# Where policy and people hardly overlap, the logit grows without end: a ratio of e^5 says it all.
CLIP = 5.0  # nats
HELD_OUT = 0.2  # share of the human texts that only the AUC sees
FEWEST = 20  # human texts


# ---------------------------------------------------------------------------------- the flags


@dataclass
class Flags(FlagGroup):
    """Control by features: a price on some features of the reward model, or scores without them"""

    penalize_features: list[int] = HfArg(
        default_factory=list,
        help="numbers of features of --reward_model, a SARM, that cost reward; for another reward "
        "model see --feature_sae",
    )
    tau: list[str] = HfArg(
        default_factory=list,
        help="the activation above which each of them costs, such as 0.5, or q0.95, a quantile "
        "in --human_latents",
    )
    alpha: list[str] = HfArg(
        default_factory=list,
        help="the price of each of them, such as 1.0, or 0.5std, in standard deviations of the "
        "scores in --human_latents",
    )
    penalty: str = HfArg(
        default="indicator",
        metadata={"choices": PENALTIES},
        help="indicator: alpha where z > tau; hinge: alpha max(0, z - tau), so that alpha is the "
        "price of one unit of z",
    )
    clamp: list[str] = HfArg(
        default_factory=list,
        help="score with features changed, FEATURE:OP:VALUE with OP one of set, min, max, such "
        "as 17:max:0.5 23:set:0",
    )
    density_beta: float = HfArg(
        default=0.0,
        help="price of the log density ratio between the policy's and people's features; 0: off",
    )
    human_latents: str = HfArg(
        default="", help="the reference data: a file of probe.py human_latents"
    )
    feature_sae: str = HfArg(
        default="",
        help="for an ordinary reward model: the folder of an autoencoder on one of its layers",
    )

    def __post_init__(self):
        super().__post_init__()
        check_flags(self)


def check_flags(config):
    """What can be wrong with the flags by themselves; InputErrors."""
    # --penalize_features 17 23 --tau q0.95 0.5 --alpha 0.5std 1.0: the lists are read side by side,
    # and a feature past the end of a shorter one would silently go without a price.
    n = len(config.penalize_features)
    n_tau = len(config.tau)
    n_alpha = len(config.alpha)
    require(
        n == n_tau == n_alpha,
        f"--penalize_features names {n} features, --tau {n_tau} thresholds and --alpha {n_alpha} "
        "prices: there must be one of each for a feature",
    )
    require(len(set(config.penalize_features)) == n, "--penalize_features names a feature twice")
    at_least(config, 0, "density_beta")
    parse_edits("clamp", config.clamp, CLAMPS)

    # Reference data that no flag reads are refused too: whoever names the file believes that it has
    # an effect.
    comparing = flags_that_compare(config)
    if comparing:
        require(
            config.human_latents,
            f"{comparing[0]} compares with reference data: name --human_latents "
            "(probe.py human_latents)",
        )
    else:
        require(
            not config.human_latents,
            "--human_latents is there for --tau qSHARE, --alpha Xstd and --density_beta: "
            "name one of them",
        )
    require(
        wanted(config) or not config.feature_sae,
        "--feature_sae is there for --penalize_features, --clamp and --density_beta: "
        "name one of them",
    )


def flags_that_compare(config):
    """The flags that are given in units of human texts, as on the command line: ["--tau q0.95"]."""
    # A threshold compares if it is a quantile, a price if it is in std. The density always does.
    flags = []
    for text, (_, is_quantile) in zip(config.tau, parse_tau(config.tau)):
        if is_quantile:
            flags.append(f"--tau {text}")
    for text, (_, is_in_std) in zip(config.alpha, parse_alpha(config.alpha)):
        if is_in_std:
            flags.append(f"--alpha {text}")
    if config.density_beta:
        flags.append("--density_beta")
    return flags


def wanted(config):
    """Whether any control is asked for."""
    return bool(config.penalize_features or config.clamp or config.density_beta)


def parse_tau(texts):
    """["0.5", "q0.95"] -> [(0.5, False), (0.95, True)]: (number, whether it is a quantile).

    A threshold is a value of z, or a quantile of the values on human texts.
    """
    expected = "a number such as 0.5 or a quantile such as q0.95"
    thresholds = []
    for text in texts:
        bare = text.removeprefix("q")  # "q0.95" -> "0.95"
        is_quantile = bare != text
        value = parse_number("tau", text, bare, expected)
        in_range = not is_quantile or 0 <= value <= 1
        require(in_range, f"--tau {text}: a quantile lies between q0 and q1")
        thresholds.append((value, is_quantile))
    return thresholds


def parse_alpha(texts):
    """["1.0", "0.5std"] -> [(1.0, False), (0.5, True)]: (number, whether it is in std).

    A price is in units of the score, or in standard deviations of the scores of human texts.
    """
    expected = "a number such as 1.0 or in units such as 0.5std"
    prices = []
    for text in texts:
        bare = text.removesuffix("std")  # "0.5std" -> "0.5"
        is_in_std = bare != text
        value = parse_number("alpha", text, bare, expected)
        # A price below 0 would be a reward for the very feature that is to be punished.
        require(value >= 0, f"--alpha {text}: a price must be at least 0")
        prices.append((value, is_in_std))
    return prices


def parse_number(flag, text, bare, expected):
    """A flag's text, and the text without its unit -> the number.

    InputError, which says what was expected: no number, or none that float32 holds.
    """
    try:
        value = float(bare)
    except ValueError:
        value = math.nan
    # A comparison with nan is False.
    fits = abs(value) <= MOST_FLOAT
    require(fits, f"--{flag} {text}: it must be {expected}")
    return value


# ------------------------------------------------------------------------------ from the flags


def prepare(config):
    """The flags, and the files that they name -> ControlledScoring, or None without such flags.

    Loads no model; InputErrors.
    """
    if not wanted(config):
        return None
    # Feature 17 of one reward model has nothing to do with feature 17 of another, so an ensemble
    # has no features.
    members = len(config.reward_model)
    require(
        members == 1,
        f"features are those of one reward model, and --reward_model names {members}",
    )
    (spec,) = config.reward_model
    clamps = parse_edits("clamp", config.clamp, CLAMPS)
    check_feature_reader(spec, config.feature_sae, [*config.penalize_features, *clamps])

    # Units of human texts are turned into numbers once, here: from now on a feature has one
    # threshold in units of z and one price in units of the score.
    human = None
    if config.human_latents:
        human = human_latents.load(config.human_latents, spec, config.feature_sae)
    thresholds = find_thresholds(config, human)
    alphas = find_alphas(config, human)
    prices = {}
    for feature, tau, alpha in zip(config.penalize_features, thresholds, alphas):
        prices[feature] = Price(tau, alpha)

    # The density is over all features in the file. A part of its texts is held out, and the ratio
    # cannot be learned from very few.
    if config.density_beta:
        n_texts = len(human.latents)
        n_features = len(human.features)
        require(
            n_texts >= FEWEST and n_features > 0,
            f"{human.path}: {n_texts} texts, {n_features} features: too few for a density",
        )
    return ControlledScoring(config, prices, clamps, human)


class Price(NamedTuple):
    """What a feature costs, and above which activation: see penalties.feature_penalty."""

    tau: float  # in units of z
    alpha: float  # in units of the score


def find_thresholds(config, human):
    """--tau as values of z. InputError: a quantile of a feature that the human texts lack."""
    thresholds = []
    for feature, (value, is_quantile) in zip(config.penalize_features, parse_tau(config.tau)):
        # q0.95: a text that costs something has more of the feature than 95% of people's texts.
        if is_quantile:
            value = human.column(feature).quantile(value).item()
        thresholds.append(value)
    return thresholds


def find_alphas(config, human):
    """--alpha in units of the score. InputError: std of human scores that are all the same."""
    alphas = []
    for text, (value, is_in_std) in zip(config.alpha, parse_alpha(config.alpha)):
        if is_in_std:
            require(
                varies(human.scores),
                f"--alpha {text}: the {len(human.scores)} scores in {human.path} "
                "have no spread to measure a price by",
            )
            value = value * human.scores.std().item()  # ddof 1
        alphas.append(value)
    return alphas


# -------------------------------------------------------------------------------- the scoring


class ControlledScoring:
    """One reward model, and R in the place of its scores. Its functions are scoring.Scoring's.

    The one thing that it learns is the density ratio.
    """

    def __init__(self, config, prices, clamps, human):
        self.config = config
        self.prices = prices  # {feature: Price}
        self.clamps = clamps  # {feature: (op, value)}
        density_features = []
        self.density = None
        if config.density_beta:
            density_features = human.features
            self.density = Density(human.latents, config.seed)

        # The features that are read [F], each once: the columns of `latents` everywhere below.
        self.features = list(dict.fromkeys([*prices, *clamps, *density_features]))
        self.column_of = {feature: f for f, feature in enumerate(self.features)}
        self.density_columns = [self.column_of[feature] for feature in density_features]  # [d]
        # These features are logged one by one. A file of human latents may have hundreds: then only
        # those that the flags name are logged.
        self.logged = self.features
        if len(density_features) > MOST_LOGGED:
            self.logged = list(dict.fromkeys([*prices, *clamps]))
        rates = [f"rate/{feature}" for feature in self.logged]
        self.summary_names = ("proxy", "controlled", *rates)

    def load(self, tokenizer, dist):
        """Load the reward model, and its autoencoder."""
        config = self.config
        self.dist = dist
        (spec,) = config.reward_model
        (self.name,) = reward_names([spec])
        self.reward = load_feature_reader(
            spec, config.feature_sae, tokenizer, dist, config.micro_batch_size, config.dtype
        )
        for feature, price in self.prices.items():
            dist.print(
                f"feature {feature}: {config.penalty} penalty above {price.tau:.4g}, "
                f"alpha {price.alpha:.4g}"
            )

    def read(self, parts: list[Answers]) -> dict[str, torch.Tensor]:
        """A list of Answers, b in all -> {member_scores [b, 1], latents [b, F], clamped [b]}.

        `clamped` are the scores with clamped latents. Each answer is read once, for all of these.
        All processes call this.
        """

        def read_parts():
            readings = []
            for part in parts:
                readings.append(self.reward.read_gathered(part, self.features, self.clamps))
            return readings

        # The model is gathered once, around all parts: processes may have different numbers of
        # them, so no collective call may stand inside the loop.
        with gathered(self.reward.module):
            readings = self.dist.together(read_parts)
        # R is made later, by combine(): the caller first gathers the readings of all processes.
        scores = torch.cat([reading.scores for reading in readings])
        latents = torch.cat([reading.latents for reading in readings])
        clamped = torch.cat([reading.edited for reading in readings])
        # Without --clamp `edited` is the plain score, so R can start from it in any case.
        return {"member_scores": scores[:, None], "latents": latents, "clamped": clamped}

    def combine(self, readings: dict[str, torch.Tensor]) -> Scored:
        """Readings [B, ...] -> Scored: the proxy is the reward model's own score; `scores` is R."""
        proxy = readings["member_scores"][:, 0]  # [B]
        terms = self.terms(readings["latents"], readings["clamped"])
        return Scored(
            members={self.name: proxy},
            proxy=proxy,
            scores=terms["controlled"],
            variance=torch.zeros_like(proxy),  # of a single member
            terms=terms,
        )

    def terms(self, latents, clamped):
        """Latents [B, F], clamped scores [B] -> {name: [B]}: R as `controlled`, then its terms."""
        terms = {}
        if self.clamps:
            terms["clamped"] = clamped

        # For the record: each feature, and whether it is above its threshold, or fires.
        for feature in self.logged:
            z = latents[:, self.column_of[feature]]  # [B]
            if feature in self.prices:
                is_active = z > self.prices[feature].tau
            else:
                is_active = z != 0
            terms[f"feature/{feature}"] = z
            terms[f"rate/{feature}"] = is_active.float()

        # R: the clamped score, less a penalty for each feature that has a price, less the density.
        # Penalties are computed feature by feature, so that the record has each of them.
        controlled = clamped
        for feature, price in self.prices.items():
            column = self.column_of[feature]
            penalty = feature_penalty(
                latents, [column], [price.tau], [price.alpha], self.config.penalty
            )
            terms[f"penalty/{feature}"] = penalty
            controlled = controlled - penalty
        if self.density:
            log_ratio = self.log_ratio(latents)
            # In warm-up the term is 0: the net has learned from too little.
            density = self.config.density_beta * log_ratio * self.density.is_warm
            terms["log_ratio"] = log_ratio
            terms["density"] = density
            controlled = controlled - density
        return {"controlled": controlled, **terms}

    def log_ratio(self, latents):
        """Clipped log p_policy / p_human of latents [B, F]: [B].

        All processes take the first one's numbers, so that all have the same bits.
        """
        # All processes have the same latents and the same net, but may round differently. Only the
        # first one gives rows, so gather() hands its numbers to all.
        log_ratio = self.density.log_ratio(latents[:, self.density_columns].cpu())
        if not self.dist.main:
            log_ratio = log_ratio[:0]
        return self.dist.gather(log_ratio.to(latents.device))

    def learn(self, readings: dict[str, torch.Tensor]) -> dict[str, float]:
        """Let the density ratio learn from the readings of a rollout, once it has been judged.

        -> the step's numbers {density_auc, density_loss}; none without --density_beta
        """
        if not self.density:
            return {}
        return self.density.learn(readings["latents"][:, self.density_columns].cpu())

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must keep; restore() takes it back."""
        if not self.density:
            return {}
        return self.density.tensors()

    def restore(self, tensors: dict[str, torch.Tensor]):
        """Take back what tensors() gave: what an earlier part of the run has learned."""
        if self.density:
            self.density.restore(tensors)


# -------------------------------------------------------------------------- the density ratio


class Density:
    """log p_policy(z) / p_human(z), learned while the policy moves, on the CPU.

    It learns from past rollouts alone, never from the one that it judges. All processes see the
    whole batch's latents and make the same updates, whose draws are keyed by (seed, rollouts so
    far). human [N, d]: the latents of people's texts.
    """

    def __init__(self, human, seed):
        self.seed = seed
        self.n_rollouts = 0  # that were learned from
        self.replay = []  # latents [B, d] of the last REPLAY rollouts

        # A part of the human texts, drawn by the seed, is never learned from: on texts that it was
        # trained on, a classifier looks better than it is.
        generator = torch.Generator().manual_seed(key(DENSITY, seed))
        order = torch.randperm(len(human), generator=generator)
        n_held_out = math.ceil(HELD_OUT * len(human))
        self.held_out, self.human = human[order].tensor_split([n_held_out])

        # The net starts at the ratio 1 everywhere. It standardises by the human texts that it may
        # see: they stay the same through the run, and so does the scale of its inputs.
        self.net = DensityRatio(human.shape[1], seed).fit(self.human)
        self.optimizer = adamw(self.net, LR, (0.9, 0.999), 0.0)

    @property
    def is_warm(self) -> bool:
        """Whether warm-up is over: only then does the ratio count."""
        return self.n_rollouts >= WARM_UP

    @torch.no_grad()
    def log_ratio(self, z):
        """z [B, d] -> [B], within +-CLIP."""
        return self.net(z).clamp(-CLIP, CLIP)

    def learn(self, z):
        """Learn from a fresh rollout's latents z [B, d]. -> {density_auc, density_loss}

        density_auc: how well z is told from the held-out texts, before anything is learned from it.
        density_loss: the mean loss of the UPDATES from the replay, which z has then joined.
        """
        # The AUC comes first: so far the net has learned neither from z nor from held-out texts.
        with torch.no_grad():
            logits = torch.cat([self.net(z), self.net(self.held_out)])
        is_policy = torch.arange(len(logits)) < len(z)  # the logits of z stand first
        density_auc = auc(logits, is_policy)

        # One rollout has few texts, and an old one was written by another policy: so the net learns
        # from the last few together.
        self.replay = [*self.replay, z][-REPLAY:]
        past = torch.cat(self.replay)  # [up to REPLAY B, d]

        # Both classes weigh the same, however many texts each has: only then is the logit the log
        # ratio (penalties.DensityRatio).
        generator = torch.Generator().manual_seed(key(DENSITY, self.seed, self.n_rollouts))
        losses = []
        for _ in range(UPDATES):
            policy = draw_rows(past, generator)  # [BATCH, d]
            human = draw_rows(self.human, generator)  # [BATCH, d]
            policy_logits, human_logits = self.net(torch.cat([policy, human])).chunk(2)
            loss = density_loss(policy_logits, human_logits)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        self.n_rollouts += 1
        return {"density_auc": density_auc, "density_loss": sum(losses) / UPDATES}

    def tensors(self):
        """Weights, the optimizer's moments, replay and count: {name: tensor}."""
        # "hidden.weight" is a weight, "exp_avg/hidden.weight" a moment of it in the optimizer. The
        # human texts are not kept: the file and the seed give them again.
        tensors = dict(self.net.state_dict())
        names = {p: name for name, p in self.net.named_parameters()}
        for p, state in self.optimizer.state.items():
            for slot, moment in state.items():  # "step", "exp_avg", "exp_avg_sq"
                tensors[f"{slot}/{names[p]}"] = moment
        for i, z in enumerate(self.replay):
            tensors[f"replay/{i}"] = z.contiguous()
        tensors["rollouts"] = torch.tensor(self.n_rollouts)
        return tensors

    def restore(self, tensors):
        """Take back what tensors() gave."""
        weights = {name: tensors[name] for name in self.net.state_dict()}
        self.net.load_state_dict(weights)
        # AdamW would make its state in its first step. Here each parameter's state is put back from
        # the tensors that are named after it: "exp_avg/hidden.weight".
        for name, p in self.net.named_parameters():
            state = {}
            for key_of_tensor, tensor in tensors.items():
                slot, _, parameter = key_of_tensor.partition("/")
                if parameter == name:
                    state[slot] = tensor
            self.optimizer.state[p] = state
        # The count tells how many rollouts the replay holds, and is part of the next draws' key.
        self.n_rollouts = int(tensors["rollouts"])
        n_replay = min(self.n_rollouts, REPLAY)
        self.replay = [tensors[f"replay/{i}"] for i in range(n_replay)]


def draw_rows(rows, generator):
    """BATCH rows of [N, d], drawn with replacement."""
    return rows[torch.randint(len(rows), (BATCH,), generator=generator)]

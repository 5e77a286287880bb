r"""Control of PPO's reward by features of its reward model: the flags --penalize_features, --clamp and --density_beta of train_ppo.py.

    python probe.py human_latents                                           the reference data, of runs/sarm
    python train_ppo.py --reward_model runs/sarm --penalize_features 17 --tau q0.95 --alpha 0.5std \
        --human_latents runs/human_latents.safetensors

    R = score(clamp(z)) - sum_i penalty_i(z_i) - beta clip(log p_policy(z) / p_human(z))

R takes the score's place before anything else happens to it: rules on endings and length, score scaling and clipping, the KL. z are the
latents of the finished answer at its last token, before any clamp: penalties and density see what the policy wrote, not what was scored.

train_ppo.py meets this file in one place: its Config has the Flags, and where they are given
prepare() makes a ControlledScoring, which stands in for scoring.Scoring.

    b answers of this process, B of a whole rollout, F features that are read,
    d those whose density is compared, N human texts
"""

import math
from dataclasses import dataclass

import torch
from transformers.hf_argparser import HfArg

from ..errors import at_least, require
from ..packing import Answers
from ..penalties import PENALTIES, DensityRatio, density_loss, feature_penalty
from ..rewards import reward_names
from ..runtime.flags import FlagGroup
from ..runtime.fsdp import gathered
from ..runtime.optim import adamw
from ..runtime.rng import DENSITY, key
from ..scoring import Scored
from ..stats import auc, varies
from . import human_latents
from .feature_rewards import check_feature_reward, load_feature_reward, parse_edits

CLAMPS = ("set", "min", "max")
LOGGED = 8  # features of the density that are logged one by one; with more of them none is
# The density ratio. Where policy and people hardly overlap its logit grows without end; a ratio of e^5 says all there is to say.
LR, UPDATES, BATCH = 1e-4, 16, 256  # AdamW's; optimizer steps a rollout; latents of each class in one
REPLAY = 8  # rollouts that are learned from: the last ones, since the policy moves
WARM_UP = 10  # rollouts until the ratio counts
CLIP = 5.0  # nats
HELD_OUT = 0.2  # share of the human texts that only the AUC sees
FEWEST = 20  # human texts


# ------------------------------------------------------------------------------------------------------------------------ the flags


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
    n, n_tau, n_alpha = len(config.penalize_features), len(config.tau), len(config.alpha)
    require(n == n_tau == n_alpha, f"--penalize_features names {n} features, --tau {n_tau} thresholds and --alpha {n_alpha} prices: "
            "there must be one of each for a feature")  # fmt: skip
    require(len(set(config.penalize_features)) == n, "--penalize_features names a feature twice")
    at_least(config, 0, "density_beta")
    parse_edits("clamp", config.clamp, CLAMPS)
    tau, alpha = parse_tau(config.tau), parse_alpha(config.alpha)
    relative = [f"--tau {x}" for x, (_, r) in zip(config.tau, tau) if r] + [f"--alpha {x}" for x, (_, r) in zip(config.alpha, alpha) if r]
    relative += ["--density_beta"] if config.density_beta else []
    if relative:
        require(config.human_latents, f"{relative[0]} compares with reference data: name --human_latents (probe.py human_latents)")
    else:
        require(not config.human_latents, "--human_latents is there for --tau qSHARE, --alpha Xstd and --density_beta: name one of them")
    require(
        wanted(config) or not config.feature_sae,
        "--feature_sae is there for --penalize_features, --clamp and --density_beta: "
        "name one of them",
    )


def wanted(config):
    return bool(config.penalize_features or config.clamp or config.density_beta)


def parse_tau(texts):
    """["0.5", "q0.95"] -> [(0.5, False), (0.95, True)]: a latent's value, or a quantile of the human texts' values."""
    out = [number("tau", text, text.removeprefix("q"), "a number such as 0.5 or a quantile such as q0.95") for text in texts]
    for text, (value, relative) in zip(texts, out):
        require(not relative or 0 <= value <= 1, f"--tau {text}: a quantile lies between q0 and q1")
    return out


def parse_alpha(texts):
    """["1.0", "0.5std"] -> [(1.0, False), (0.5, True)]: units of the score, or standard deviations of the human texts' scores."""
    out = [number("alpha", text, text.removesuffix("std"), "a number such as 1.0 or in units such as 0.5std") for text in texts]
    for text, (value, _) in zip(texts, out):
        require(value >= 0, f"--alpha {text}: a price must be at least 0")
    return out


def number(flag, text, bare, expected):
    """A flag's text, and it without its unit -> its value, and whether there was a unit. InputError, which says what was expected."""
    try:
        value = float(bare)
    except ValueError:
        value = math.nan
    fits = abs(value) <= torch.finfo(torch.float32).max  # of nan it is False
    require(fits, f"--{flag} {text}: it must be {expected}")
    return value, bare != text


# -------------------------------------------------------------------------------------------------------------------- the control


def prepare(config):
    """The flags, and the files that they name -> ControlledScoring, or None without such flags.

    Loads no model; InputErrors.
    """
    if not wanted(config):
        return None
    members = len(config.reward_model)
    require(
        members == 1,
        f"features are those of one reward model, and --reward_model names {members}",
    )
    (spec,), clamps = config.reward_model, parse_edits("clamp", config.clamp, CLAMPS)
    check_feature_reward(spec, config.feature_sae, [*config.penalize_features, *clamps])
    human = human_latents.load(config.human_latents, spec, config.feature_sae) if config.human_latents else None
    tau = [human.column(i).quantile(x).item() if r else x for i, (x, r) in zip(config.penalize_features, parse_tau(config.tau))]
    alpha = []
    for text, (value, is_relative) in zip(config.alpha, parse_alpha(config.alpha)):
        if is_relative:
            n = len(human.scores)
            require(
                varies(human.scores),
                f"--alpha {text}: the {n} scores in {human.path} "
                "have no spread to measure a price by",
            )
            value = value * human.scores.std().item()  # ddof 1
        alpha.append(value)
    if config.density_beta:
        n = len(human.latents)
        require(n >= FEWEST and human.features, f"{human.path}: {n} texts, {len(human.features)} features: too few for a density")
    return ControlledScoring(config, tau, alpha, clamps, human)


class ControlledScoring:
    """One reward model, and R in the place of its scores. Its functions are scoring.Scoring's.

    The one thing that it learns is the density ratio.
    """

    def __init__(self, config, tau, alpha, clamps, human):
        self.config, self.clamps = config, clamps
        self.prices = {i: (t, a) for i, t, a in zip(config.penalize_features, tau, alpha)}  # feature: its tau and alpha
        of_density = human.features if config.density_beta else []
        self.features = list(dict.fromkeys([*self.prices, *clamps, *of_density]))  # [F]: the columns of `latents` everywhere below
        self.column = {i: f for f, i in enumerate(self.features)}
        self.of_density = [self.column[i] for i in of_density]  # [d] columns
        named = self.features if len(of_density) <= LOGGED else [*self.prices, *clamps]
        self.named = list(dict.fromkeys(named))  # are logged one by one
        self.density = Density(human.latents, config.seed) if config.density_beta else None
        self.summary_names = ("proxy", "controlled", *(f"rate/{i}" for i in self.named))

    def load(self, tokenizer, dist):
        """Load the reward model, and its autoencoder."""
        config, self.dist = self.config, dist
        (spec,) = config.reward_model
        (self.name,) = reward_names([spec])
        self.reward = load_feature_reward(spec, config.feature_sae, tokenizer, dist, config.micro_batch_size, config.dtype)
        for i, (tau, alpha) in self.prices.items():
            dist.print(f"feature {i}: {config.penalty} penalty above {tau:.4g}, alpha {alpha:.4g}")

    def read(self, parts: list[Answers]) -> dict[str, torch.Tensor]:
        """A list of Answers, b in all -> {member_scores [b, 1], latents [b, F], clamped [b]}.

        `clamped` are the scores with clamped latents. Each answer is read once, for all of these.
        All processes call this.
        """
        with gathered(self.reward.module):
            found = self.dist.together(lambda: [self.reward.read_gathered(part, self.features, self.clamps) for part in parts])
        scores, latents, clamped = (torch.cat(values) for values in zip(*found))
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
        """Latents [B, F], clamped scores [B] -> {name: [B]}: R as `controlled`, then its parts."""
        terms, total = {"clamped": clamped} if self.clamps else {}, clamped
        for i in self.named:
            z = latents[:, self.column[i]]  # [B]
            terms[f"feature/{i}"] = z
            terms[f"rate/{i}"] = (z > self.prices[i][0] if i in self.prices else z != 0).float()
        for i, (tau, alpha) in self.prices.items():
            terms[f"penalty/{i}"] = feature_penalty(latents, [self.column[i]], [tau], [alpha], self.config.penalty)
            total = total - terms[f"penalty/{i}"]
        if self.density:
            terms["log_ratio"] = self.log_ratio(latents)
            terms["density"] = self.config.density_beta * terms["log_ratio"] * self.density.counts
            total = total - terms["density"]
        return {"controlled": total, **terms}

    def log_ratio(self, latents):
        """Clipped log p_policy / p_human, [B], of latents [B, F]: the first process's numbers, so that all have the same bits."""
        x = self.density.log_ratio(latents[:, self.of_density].cpu())
        return self.dist.gather((x if self.dist.main else x[:0]).to(latents.device))

    def learn(self, readings: dict[str, torch.Tensor]) -> dict[str, float]:
        """Let the density ratio learn from the readings of a rollout, once it has been judged.

        -> the step's numbers {density_auc, density_loss}; none without --density_beta
        """
        if not self.density:
            return {}
        return self.density.learn(readings["latents"][:, self.of_density].cpu())

    def tensors(self):
        """What a checkpoint must keep, {name: tensor}; restore() takes it back."""
        return self.density.tensors() if self.density else {}

    def restore(self, tensors):
        if self.density:
            self.density.restore(tensors)


class Density:
    """log p_policy(z) / p_human(z), learned while the policy moves, on the CPU: from past rollouts alone, never from the one it judges.

    All processes see the whole batch's latents and make the same updates, whose draws are keyed by (seed, rollouts so far).
    """

    def __init__(self, human, seed):
        order = torch.randperm(len(human), generator=torch.Generator().manual_seed(key(DENSITY, seed)))
        self.held_out, self.human = human[order].tensor_split([math.ceil(HELD_OUT * len(human))])  # [.., d]
        self.net, self.seed = DensityRatio(human.shape[1], seed).fit(self.human), seed
        self.optimizer = adamw(self.net, LR, (0.9, 0.999), 0.0)
        self.rollouts, self.replay = 0, []  # up to REPLAY tensors [B, d]

    @property
    def counts(self):
        """Whether warm-up is over."""
        return self.rollouts >= WARM_UP

    @torch.no_grad()
    def log_ratio(self, z):
        """z [B, d] -> [B], within +-CLIP"""
        return self.net(z).clamp(-CLIP, CLIP)

    def learn(self, z):
        """A fresh rollout z [B, d] -> {density_auc, density_loss}: how well it is told from held-out texts, before anything is learned from
        it, and the mean loss of the UPDATES from the replay, which it has then joined."""
        with torch.no_grad():
            logits = torch.cat([self.net(z), self.net(self.held_out)])
        labels = torch.arange(len(logits)) < len(z)
        record = {"density_auc": auc(logits, labels)}
        self.replay = [*self.replay, z][-REPLAY:]
        past, losses = torch.cat(self.replay), []
        generator = torch.Generator().manual_seed(key(DENSITY, self.seed, self.rollouts))
        for _ in range(UPDATES):
            policy, human = (x[torch.randint(len(x), (BATCH,), generator=generator)] for x in (past, self.human))  # [BATCH, d] each
            logits = self.net(torch.cat([policy, human]))
            loss = density_loss(*logits.chunk(2))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        self.rollouts += 1
        return record | {"density_loss": sum(losses) / UPDATES}

    def tensors(self):
        """Weights, optimizer, replay and count: {name: tensor}."""
        names = {p: name for name, p in self.net.named_parameters()}
        moments = {f"{slot}/{names[p]}": x for p, state in self.optimizer.state.items() for slot, x in state.items()}
        replay = {f"replay/{i}": z.contiguous() for i, z in enumerate(self.replay)}
        return self.net.state_dict() | moments | replay | {"rollouts": torch.tensor(self.rollouts)}

    def restore(self, tensors):
        self.net.load_state_dict({name: tensors[name] for name in self.net.state_dict()})
        for name, p in self.net.named_parameters():
            slots = {key_: x for key_, x in tensors.items() if key_.endswith(f"/{name}")}
            self.optimizer.state[p] = {key_.split("/")[0]: x for key_, x in slots.items()}
        self.rollouts = int(tensors["rollouts"])
        self.replay = [tensors[f"replay/{i}"] for i in range(min(self.rollouts, REPLAY))]

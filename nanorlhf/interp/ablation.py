"""Body of `probe.py ablate`: what a policy writes when some features of one of its layers are
switched off, and what that is worth.

    P prompts, N answers to each, n tokens, M features, F of them switched off, C concepts
    V vocabulary

While the policy samples, a layer's output x becomes that of its autoencoder with the chosen
features at zero, plus what the autoencoder did not explain. So nothing else changes:

    x' = x^(f without the chosen) + (x - x^(f)) = x - sum over the chosen of f_i d_i
    d_i: decoder directions, in the model's units

All arms answer the same held-out prompts with the same noise, so differences are taken prompt by
prompt. Controls:

    nothing     no feature: x' = x, and every token the same
    random      as many random features that fire equally often
    strong      as many random features, as near in mean square as there are: those that fire
                equally often may be much weaker

Where the chosen features are the strongest of all, no others are as strong: compare the variance
that each arm removes. Features are chosen, and rates and mean squares counted, on the policy's
answers to training prompts.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from .. import data, world
from ..chat_templates import leave_out_control_tokens
from ..diversity import distinct_n
from ..errors import at_least, require
from ..hf.activations import module_at, replaced, running_ids
from ..hf.folders import check_model
from ..models import load_policy, load_tokenizer
from ..packing import Answers
from ..rewards import check_reward, load_rewards, score
from ..rollout import Parts, SamplingFlags, check_rollouts, roll_out
from ..runtime.distributed import setup
from ..runtime.flags import (
    FORWARD_HELP,
    HELD_OUT_HELP,
    SEED_HELP,
    ResultFlags,
    TextFlags,
    results_in,
)
from ..runtime.locks import unlock_afterwards
from ..runtime.results import cell, draw_intervals, interval_row, parse_ids, results_folder, save
from ..runtime.rng import SPLIT
from ..sae import SparseAutoencoder
from ..splits import load
from ..stats import bootstrap
from ..tokens import Prompts, ready_prompts
from .activation_store import (
    Tokens,
    find_skipped,
    open_autoencoder,
    read_activations,
    where,
)
from .feature_scores import alike, encoded, feature_aucs, sum_over_tokens
from .shared_flags import PlaceFlags
from .world_concepts import FEWEST, concept_table, is_world_model, next_ids

CONTROLS = ("random", "strong")
BY = ("on", "before", "logits")


@dataclass
class AblateConfig(PlaceFlags, SamplingFlags, TextFlags, ResultFlags):
    """Features and answers: which features are switched off, and what is measured"""

    sae: str = HfArg(
        default="runs/sae/policy/3_mlp",
        help="the folder of a sparse autoencoder, of train_sae.py or SAELens",
    )
    features: str = HfArg(
        default="",
        help="numbers of the features to switch off, such as 3,17; by default those of --concept",
    )
    concept: str = HfArg(
        default="positive",
        help="embedded world: switch off the --top features of this concept",
    )
    by: str = HfArg(
        default="before",
        metadata={"choices": BY},
        help="which features are a concept's: those that fire on its words (on), before them "
        "(before), or whose direction raises the logits of its words most (logits)",
    )
    top: int = HfArg(default=5, help="how many features of the concept to switch off")
    draws: int = HfArg(default=5, help="how often random features are drawn for comparison")
    keep_bos: bool = HfArg(
        default=False,
        help="switch features off at BOS too, and at an EOS that has the same id: for an "
        "autoencoder that was trained with --keep_bos",
    )
    reward: list[str] = HfArg(
        default_factory=list,
        help="rewards, as in train_ppo.py --help; in the embedded world, by default its gold and "
        "runs/rm/seed_0",
    )
    eval_dataset: str = HfArg(default="", help=HELD_OUT_HELP)
    eval_size: int = HfArg(default=256, help="how many held-out prompts are answered")
    n_answers: int = HfArg(default=4, help="answers to each held-out prompt")
    max_rows: int = HfArg(
        default=300, help="how many training prompts are answered to choose features on"
    )
    batch_size: int = HfArg(default=256, help="answers that are sampled at once")
    micro_batch_size: int = HfArg(default=64, help=FORWARD_HELP)
    seed: int = HfArg(default=0, help=SEED_HELP)

    model: str = HfArg(
        default="",
        help="the policy: a run folder, a model folder or a hub name; by default the model that "
        "the folder names",
    )
    output_dir: str = results_in("runs/probe/ablate")

    def __post_init__(self):
        super().__post_init__()
        at_least(
            self, 1, "eval_size", "n_answers", "batch_size", "micro_batch_size", "top", "draws"
        )
        at_least(self, 0, "max_rows", "seed")
        parse_ids(self.features)
        if not self.reward:
            require(data.is_world(self.dataset), "--reward names what answers are worth")
            self.reward = ["world:gold", "runs/rm/seed_0"]


# ------------------------------------------------------------------------------- switching off


def contribution(sae: SparseAutoencoder, ids: Tensor, x: Tensor) -> Tensor:
    """What the features `ids` [F] add to activations x [.., D]: sum_i f_i d_i, [.., D].

    In the model's units.
    """
    # Decoder rows are in standardised units, and the scale leads to the model's. The mean and the
    # bias b_d belong to no feature, so they stay in x.
    _, scale = sae.moments(x)
    added = sae.encode(x)[..., ids] @ sae.W_dec[ids]  # [.., D]
    if sae.normalize == "none":
        return added
    return added * scale


def without(sae: SparseAutoencoder, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """The function x [B, T, D] -> x' for activations.replaced: x minus what the features `ids` [F]
    add to it."""
    return lambda x: x - contribution(sae, ids, x)


@contextlib.contextmanager
def switched_off(
    lm, place: tuple[int, str], sae: SparseAutoencoder, ids: Tensor, skip_bos: int | None
):
    """A context in which the layer at `place` puts out x' in every forward: without the features
    `ids` [F].

    Tokens with the id skip_bos keep their x, as in training (activation_store.Tokens); None: no
    token does.
    """
    remove_features = without(sae, ids)
    # The hook sees activations, not tokens. So it asks the forward that runs for its token ids.
    with running_ids(lm) as token_ids:

        def remove_where_trained(x):  # [B, T, D]
            changed = remove_features(x)
            if skip_bos is None:
                return changed
            is_skipped = token_ids() == skip_bos  # [B, T]
            return torch.where(is_skipped[..., None], x, changed)

        with replaced(lm, place, remove_where_trained):
            yield


def arm_context(chosen: list[int] | None, policy, place, sae, skip_bos: int | None):
    """The context in which an arm's policy answers: its features are switched off.

    The plain policy (None) runs without the hook, so the arm "nothing", which has no features,
    shows what the hook alone does.
    """
    if chosen is None:
        return contextlib.nullcontext()
    device = next(policy.parameters()).device
    feature_ids = torch.tensor(chosen, dtype=torch.long, device=device)
    return switched_off(policy.lm, place, sae, feature_ids, skip_bos)


# ----------------------------------------------------------------------------------- the command


@unlock_afterwards()
def ablate(config):
    """What a policy writes with some features switched off.

    It measures how rewards, length and a concept's share of the words change,
    prompt by prompt, when the chosen features are taken out of one layer while
    the policy samples. The control "nothing" switches off no feature, and rules
    out that the surgery itself changes the text. The control "random", as many
    features that fire equally often, rules out that any features so frequent
    would do. The control "strong", as many of about the same mean square, rules
    out that the chosen ones only carry more of the layer (compare "removed", the
    share of the variance that an arm takes away). What would refute that these
    features carry the reward: random or strong ones lower gold as much, or what
    falls is grammar and not sentiment.

    All arms have the same prompts and the same noise; intervals are the
    bootstrap's over prompts, of paired differences. Tokens with BOS's id, which
    the autoencoder has not seen, are spared in every arm, and count neither in
    rates nor in the variance (with --keep_bos they are tokens like others).
    """
    dist = setup(config.device)
    require(dist.world == 1, "probe.py ablate runs on one process")
    folder = results_folder(config, dist)

    # What can be wrong is found before any model is loaded.
    sae, model, place = open_autoencoder(config, config.sae)
    model_config = check_model(model)
    tokenizer = load_tokenizer(model)
    for spec in config.reward:
        check_reward(spec)
    concept = find_concept(config, model, tokenizer)
    train, test = read_prompts(config, tokenizer, model_config)

    # The policy, its autoencoder, and what the answers are worth.
    policy = load_policy(model, value_head=False, device=dist.device)
    check_rollouts(policy)
    rewards = load_rewards(config.reward, tokenizer, dist, config.micro_batch_size, config.dtype)
    module_at(policy.lm, place)
    require(
        config.features or config.top <= sae.m,
        f"--top {config.top} is more than the {sae.m} features",
    )
    sae = sae.to(dist.device).requires_grad_(False)
    parts = Parts(config, dist, tokenizer, policy)

    # Features are chosen on answers to other prompts than those of the arms.
    skip_bos = find_skipped(config, tokenizer)
    observed = observe_features(parts, sae, place, train, skip_bos)
    ids = parse_ids(config.features)
    if not ids:
        ids = choose_features(config, observed.f, concept, observed.tokens, sae, policy.lm)
    arms = draw_arms(config, ids, observed)

    # Every arm answers the held-out prompts, and is measured.
    responses = {}  # {arm: token lists}
    metrics = {}  # {arm: {metric: [P N]}}
    for name, chosen in arms.items():
        with arm_context(chosen, policy, place, sae, skip_bos):
            # Step 0 has the same noise for all arms.
            responses[name], answers = sample_answers(parts, test, step=0)
        metrics[name] = measure_answers(
            config, tokenizer, rewards, responses[name], answers, concept
        )
        means = [f"{metric} {values.mean():.3f}" for metric, values in metrics[name].items()]
        dist.print(f"{name}: " + ", ".join(means))

    # What each arm took away, and what came of it.
    described_arms = {}
    for name, chosen in arms.items():
        arm = describe_arm(chosen or [], observed, sae)
        texts = tokenizer.batch_decode(responses[name], skip_special_tokens=True)
        arm["distinct_2"] = distinct_n(texts, 2)
        for metric, values in metrics[name].items():
            arm[metric] = mean_with_interval(values, config.n_answers)
        described_arms[name] = arm
    summary = {
        "sae": config.sae,
        "model": model,
        "layer": place[0],
        "site": place[1],
        "prompts": len(test) // config.n_answers,
        "n_answers": config.n_answers,
        "concept": None if concept is None else config.concept,
        "by": None if config.features else config.by,
        "nothing_is_plain": responses["nothing"] == responses["plain"],
        "arms": described_arms,
        "differences": compare_arms(metrics, config.n_answers),
    }
    save(config, folder, summary, format_table(summary), draw)
    return summary


def find_concept(config, model: str, tokenizer) -> Tensor | None:
    """The words of --concept, as a mask [V]; None for tokens that are not the embedded world's.

    InputError: there --features must be named, and here the concept must be one that there is.
    """
    if not is_world_model(tokenizer):
        require(
            config.features,
            f"{model} does not speak the embedded world's words: name --features",
        )
        return None
    names, labels = concept_table(tokenizer)  # C names, [V, C]
    require(
        config.concept in names,
        f"--concept {config.concept}: it must be one of {', '.join(names)}",
    )
    return labels[:, names.index(config.concept)]


def read_prompts(config, tokenizer, model_config) -> tuple[Prompts, Prompts]:
    """The prompts to choose features on, and the held-out ones, each N times."""
    rows, held_out, _ = load(config, "prompts")
    prompts = []
    for rows_of_split in (rows, held_out):
        allowed_rows = leave_out_control_tokens(tokenizer, rows_of_split, config, print)
        prompts_of_split = ready_prompts(
            tokenizer,
            allowed_rows,
            model_config,
            config.max_new_tokens,
            config.max_prompt_length,
            config.chat_template,
        )
        prompts.append(prompts_of_split)
    train, held_out_prompts = prompts

    # The answers to a prompt stand one after another: see mean_with_interval().
    test = []
    for i in range(len(held_out_prompts)):
        test.extend([i] * config.n_answers)
    return train, held_out_prompts.at(test)


def sample_answers(
    parts: Parts, prompts: Prompts, step: int
) -> tuple[list[list[int]], list[Answers]]:
    """One answer to each prompt -> their token lists, and the Answers of each batch.

    `step` keys the noise.
    """
    size = parts.config.batch_size
    responses = []
    answers = []
    for first in range(0, len(prompts), size):
        # The places among all prompts key the noise, which then does not depend on --batch_size.
        last = min(first + size, len(prompts))
        places = list(range(first, last))
        rollout, batch_answers = roll_out(parts, prompts.at(places), places, step)
        answers.append(batch_answers)
        for ids, mask in zip(rollout.response_ids.cpu(), rollout.response_mask.cpu()):
            responses.append(ids[mask].tolist())
    return responses, answers


# ---------------------------------------------------------------------------------- the features


@dataclass
class Observed:
    """The features of an autoencoder on the tokens of some texts."""

    tokens: Tokens
    x: Tensor  # [n, D]: the activations
    f: Tensor  # sparse [M, n]: the features
    rates: Tensor  # [M]: the share of tokens that each feature fires on
    squares: Tensor  # [M]: the mean square of each feature


def observe_features(
    parts: Parts,
    sae: SparseAutoencoder,
    place: tuple[int, str],
    prompts: Prompts,
    skip_bos: int | None,
) -> Observed:
    """Let the policy answer the prompts, and see which features fire on prompts and answers."""
    lm = parts.policy.lm
    # Step 0 is for the answers of the arms: these must have noise of their own.
    responses, _ = sample_answers(parts, prompts, step=1)
    texts = [prompt + response for prompt, response in zip(prompts.ids, responses)]
    tokens = Tokens(texts, skip_bos)
    x = read_activations(tokens, lm, place, parts.dist, parts.config.dtype)  # [n, D]
    f = encoded(sae, x)  # [M, n]
    n = f.shape[1]
    rates = sum_over_tokens(f.bool().float()).cpu() / n
    squares = sum_over_tokens(f * f).cpu() / n
    return Observed(tokens, x, f, rates, squares)


def choose_features(
    config, f: Tensor, concept: Tensor, tokens: Tokens, sae: SparseAutoencoder, lm
) -> list[int]:
    """The config.top features of a concept [V], by what --by says.

    f: a sparse [M, n], the features on the n tokens. InputError: the policy hardly writes
    the concept's words.
    """
    # "logits" ranks features by their directions, so the words need not be written. "on" and
    # "before" rank features by where they fire.
    if config.by == "logits":
        scores = score_by_logits(f, concept, sae, lm)
    else:
        if config.by == "before":
            following, goes_on = next_ids(tokens)
            truth = concept[following] & goes_on  # [n]; a text's last token comes before nothing
        else:
            _, ids = where(tokens)
            truth = concept[ids]  # [n]
        require(
            FEWEST <= truth.sum() < len(truth),
            f"--concept {config.concept}: the policy hardly writes such words; name --features",
        )
        scores = feature_aucs(f, truth[:, None].to(f.device))[:, 0]
    return scores.topk(config.top).indices.tolist()


def score_by_logits(f: Tensor, concept: Tensor, sae: SparseAutoencoder, lm) -> Tensor:
    """How much each feature's direction raises the logits of a concept's words: [M].

    The mean over the words of the concept [V], minus the mean over all others. A feature that never
    fires cannot be switched off, and comes last.
    """
    unembedding = lm.get_output_embeddings().weight.float()  # [V, D]
    effects = sae.decoder_directions().float() @ unembedding.T  # [M, V]
    # With these weights, effects @ weights is the mean over the concept's words minus that over the
    # other words.
    others = ~concept
    weights = concept.to(effects) / concept.sum() - others.to(effects) / others.sum()  # [V]
    fires = sum_over_tokens(f) != 0
    return torch.where(fires, effects @ weights, -torch.inf)


def draw_arms(config, ids: list[int], observed: Observed) -> dict[str, list[int] | None]:
    """The features that each arm switches off; None: the policy as it is, without any hook."""
    # {"plain": None, "nothing": [], "features": [3, 17], "random 0": [5, 9], ..., "strong 0": ...}
    arms = {"plain": None, "nothing": [], "features": ids}
    for control, sizes in (("random", observed.rates), ("strong", observed.squares)):
        for i in range(config.draws):
            rng = np.random.default_rng([SPLIT, config.seed, i])
            arms[f"{control} {i}"] = alike(sizes, ids, rng)
    return arms


# ----------------------------------------------------------------------------------- the metrics


def measure_answers(
    config,
    tokenizer,
    rewards: dict,
    responses: list[list[int]],
    answers: list[Answers],
    concept: Tensor | None,
) -> dict[str, Tensor]:
    """{metric: [P N], one number of each answer}, float64.

    The metrics are the rewards, length in tokens, cue: 1 where the answer has the spurious mark,
    and the concept: its share of the answer's tokens. Where one of the rewards is the embedded
    world's gold there are also its parts, "gold: sentiment", ...: what breaks the grammar lowers
    the gold as well.
    """
    metrics = {}
    for name, reward in rewards.items():
        metrics[name] = score(reward, answers)
    metrics["length"] = torch.tensor([len(ids) for ids in responses])

    # The spurious mark of the embedded world; world:SEED has a mark of its own.
    if data.is_world(config.dataset):
        seed = int(config.dataset.partition(":")[2] or 0)
        mark = tokenizer.convert_tokens_to_ids(world.cue(seed))
        metrics["cue"] = torch.tensor([mark in ids for ids in responses])

    if concept is not None:
        shares = [concept[ids].float().mean().item() for ids in responses]
        metrics[config.concept] = torch.tensor(shares)

    # The reward gives the whole gold only, so its parts are computed from the texts once more.
    if "world:gold" in rewards:
        gold_parts = {}  # {part: one number of each answer}
        for batch in answers:
            for prompt, response in zip(batch.prompts, batch.responses):
                for name, value in world.gold_parts(prompt, response).items():
                    gold_parts.setdefault(name, []).append(value)
        for name, values in gold_parts.items():
            metrics[f"gold: {name}"] = torch.tensor(values)
    return {name: values.double() for name, values in metrics.items()}


def describe_arm(ids: list[int], observed: Observed, sae: SparseAutoencoder) -> dict:
    """The features that an arm switches off, how often they fire, and the share of the layer's
    variance that they hold."""
    share = 0.0
    if ids:
        # What is taken away is not centred, since its mean goes too: so the share can exceed 1.
        variance = (observed.x - observed.x.mean(0)).square().sum()
        feature_ids = torch.tensor(ids, device=observed.x.device)
        taken_away = contribution(sae, feature_ids, observed.x)  # [n, D]
        share = (taken_away.square().sum() / variance).item()
    return {"features": ids, "rates": observed.rates[ids].tolist(), "removed": share}


def mean_with_interval(values: Tensor, n_answers: int) -> dict[str, float]:
    """Mean and 95% interval over prompts of one metric: {mean, low, high}.

    values [P N]: one number of each answer, the answers to a prompt one after another.
    """
    # Answers to one prompt are alike, so the bootstrap draws prompts, with the mean of each.
    means = values.view(-1, n_answers).mean(1)  # [P]
    low, high = bootstrap(means)
    return interval_row(means.mean(), low, high)


def compare_arms(metrics: dict[str, dict[str, Tensor]], n_answers: int) -> dict[str, dict]:
    """{metric: {"features - nothing": {mean, low, high}, ...}}, paired by prompt.

    metrics: {arm: {metric: [P N]}}. A control's metric is the mean over its draws.
    """
    pairs = [("features", "nothing")]
    pairs += [(control, "nothing") for control in CONTROLS]
    pairs += [("features", control) for control in CONTROLS]

    differences = {}
    for metric in metrics["nothing"]:
        draws = {}  # {kind of arm: [P N] of each draw}
        for arm, metrics_of_arm in metrics.items():
            kind = arm.split()[0]  # "random 3" is a draw of "random"
            draws.setdefault(kind, []).append(metrics_of_arm[metric])
        # A control's draws are averaged answer by answer, so that its interval is over prompts too.
        means = {kind: torch.stack(values).mean(0) for kind, values in draws.items()}
        differences[metric] = {}
        for a, b in pairs:
            difference = mean_with_interval(means[a] - means[b], n_answers)
            differences[metric][f"{a} - {b}"] = difference
    return differences


# -------------------------------------------------------------------------------- table, picture


def list_shown_metrics(summary: dict) -> list[str]:
    """The metrics that are shown arm by arm; the parts of the gold are among the differences."""
    return [name for name in summary["differences"] if not name.startswith("gold: ")]


def format_table(summary: dict) -> str:
    """One line an arm, then the differences."""
    metrics = list_shown_metrics(summary)
    what = "the named features"
    if summary["by"]:
        what = f"features of {summary['concept']!r} (by {summary['by']})"
    head = "".join(f"{metric[-11:]:>12s}" for metric in metrics)
    lines = [
        f"\n{summary['model']}, layer {summary['layer']}, {summary['site']}, {what} switched off; "
        f"{summary['prompts']} prompts, {summary['n_answers']} answers to each:",
        f"  {'':10s}{'rate':>8s}{'removed':>9s}{'distinct-2':>12s}{head}   features",
    ]
    # "plain" and "nothing" switch off no feature, and have no rate.
    for name, arm in summary["arms"].items():
        rate = " " * 17
        if arm["features"]:
            rate = f"{np.mean(arm['rates']):8.2%}{arm['removed']:9.2%}"
        means = "".join(f"{arm[metric]['mean']:12.3f}" for metric in metrics)
        ids = " ".join(map(str, arm["features"]))
        lines.append(f"  {name:10s}{rate}{arm['distinct_2']:12.3f}{means}   {ids}")
    same = "OTHER TOKENS THAN"
    if summary["nothing_is_plain"]:
        same = "the same tokens as"
    lines.append(f"  'nothing' wrote {same} the plain policy")

    # The differences: one line for each metric, and a column for each pair of arms.
    names = "".join(f"{name:>26s}" for name in summary["differences"][metrics[0]])
    lines.append(f"\n  {'':16s}{names}")
    for metric, row in summary["differences"].items():
        line = f"  {metric[-16:]:16s}"
        for d in row.values():
            line += f"{cell(d):>26s}"
        lines.append(line)
    return "\n".join(lines)


def draw(figure, summary: dict):
    """Each reward and other metric by arm, with 95% intervals over prompts."""
    arms = dict(summary["arms"])
    del arms["plain"]  # 'nothing' writes the same
    metrics = list_shown_metrics(summary)
    colours = {"nothing": "black", "features": "C3"}
    figure.set_size_inches(2.6 * len(metrics), 3)
    for i, metric in enumerate(metrics):
        axis = figure.add_subplot(1, len(metrics), i + 1)
        draw_intervals(axis, {name: arm[metric] for name, arm in arms.items()}, colours)
        axis.set_title(metric)

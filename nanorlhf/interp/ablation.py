"""Body of `probe.py ablate`: what a policy writes when some features of one of its layers are switched off, and what that is worth.

    P prompts, N answers to each, M features, F of them switched off, C concepts, V vocabulary

While the policy samples, a layer's output x becomes that of its autoencoder with the chosen features at zero, plus what the
autoencoder did not explain, so that nothing else changes:

    x' = x^(f without the chosen) + (x - x^(f)) = x - sum over the chosen of f_i d_i        d_i: decoder directions, in the model's units

All arms answer the same held-out prompts with the same noise, so differences are taken prompt by prompt. Controls:

    nothing     no feature: x' = x, and every token the same
    random      as many random features that fire equally often
    strong      as many random features as near in mean square as there are: those that fire equally often may be much weaker

Where the chosen features are the strongest of all, no others are as strong: compare the variance that each arm removes.

Features are chosen, and rates and mean squares counted, on the policy's answers to training prompts.
"""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
from transformers.hf_argparser import HfArg

from .. import data, world
from ..diversity import distinct_n
from ..errors import at_least, require
from ..hf.activations import module_at, place_name, replaced, running_ids
from ..hf.folders import check_model
from ..models import load_policy, load_tokenizer
from ..rewards import check_reward, load_rewards, score
from ..rollout import Parts, SamplingFlags, roll_out
from ..runtime.distributed import setup
from ..runtime.flags import ResultFlags, TextFlags
from ..runtime.locks import unlock_afterwards
from ..runtime.results import parse_ids, results_folder, save
from ..runtime.rng import SPLIT
from ..sae import SparseAutoencoder
from ..splits import load
from ..stats import bootstrap
from .activation_store import Tokens, from_models, open_autoencoder, where
from .concepts import alike, encoded, feature_aucs
from .known_concepts import FEWEST, concept_table, is_world_model, next_ids
from .probe_flags import PlaceFlags

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
    eval_dataset: str = HfArg(
        default="", help="the held-out prompts; without it, rows of --dataset are held out"
    )
    eval_size: int = HfArg(default=256, help="how many held-out prompts are answered")
    n_answers: int = HfArg(default=4, help="answers to each held-out prompt")
    max_rows: int = HfArg(
        default=300, help="how many training prompts are answered to choose features on"
    )
    batch_size: int = HfArg(default=256, help="answers that are sampled at once")
    micro_batch_size: int = HfArg(
        default=64, help="answers that a reward model scores in one forward pass"
    )
    seed: int = HfArg(default=0, help="the number that every random draw depends on")

    model: str = HfArg(
        default="",
        help="the policy: a run folder, a model folder or a hub name; by default the model that "
        "the folder names",
    )
    output_dir: str = HfArg(
        default="runs/probe/ablate", help="the folder that the results are written to"
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "eval_size", "n_answers", "batch_size", "micro_batch_size", "top", "draws")
        at_least(self, 0, "max_rows", "seed")
        parse_ids(self.features)
        if not self.reward:
            require(data.is_world(self.dataset), "--reward names what answers are worth")
            self.reward = ["world:gold", "runs/rm/seed_0"]


def removed(sae, ids, x):
    """What the features `ids` [F] add to activations x [.., D], in the model's units: sum_i f_i d_i, [.., D]."""
    _, scale = sae.moments(x)
    part = sae.encode(x)[..., ids] @ sae.W_dec[ids]
    return part if sae.normalize == "none" else part * scale


def without(sae, ids):
    """The function x [B, T, D] -> x' for activations.replaced: x minus what the features `ids` [F] add to it."""
    return lambda x: x - removed(sae, ids, x)


@contextlib.contextmanager
def switched_off(
    lm, place: tuple[int, str], sae: SparseAutoencoder, ids: torch.Tensor, skip_bos: int | None
):
    """A context in which the layer at `place` puts out x' in every forward: without the features `ids` [F].

    Tokens with the id skip_bos keep their x, as in training (activation_store.Tokens); None: no token does.
    """
    remove_features = without(sae, ids)
    with running_ids(lm) as token_ids:

        def remove_where_trained(x):  # [B, T, D]
            changed = remove_features(x)
            if skip_bos is None:
                return changed
            is_skipped = token_ids() == skip_bos  # [B, T]
            return torch.where(is_skipped[..., None], x, changed)

        with replaced(lm, place, remove_where_trained):
            yield


@unlock_afterwards()
def ablate(config):
    """What a policy writes with some features switched off.

    The rewards of its answers, beside those with random features switched
    off that fire equally often. All arms have the same prompts and the same
    noise; intervals are the bootstrap's over prompts, of paired differences.
    "removed" is the share of the layer's variance that an arm takes away.
    Tokens with BOS's id, which the autoencoder has not seen, are spared in
    every arm, and count neither in rates nor in the variance (with
    --keep_bos they are tokens like others).
    """
    dist = setup(config.device)
    require(dist.world == 1, "probe.py ablate runs on one process")
    folder = results_folder(config, dist)
    sae, model, place = open_autoencoder(config, config.sae)
    model_config, tokenizer = check_model(model), load_tokenizer(model)
    for spec in config.reward:
        check_reward(spec)
    in_world = is_world_model(tokenizer)
    names, labels = concept_table(tokenizer) if in_world else ([], None)
    require(in_world or config.features, f"{model} does not speak the embedded world's words: name --features")
    require(config.features or config.concept in names, f"--concept {config.concept}: it must be one of {', '.join(names)}")
    rows, held_out, _ = load(config, "prompts")
    lengths = config.max_new_tokens, config.max_prompt_length
    train, test = (data.ready_prompts(tokenizer, part, model_config, *lengths, config.chat_template) for part in (rows, held_out))
    test = [prompt for prompt in test for _ in range(config.n_answers)]

    policy = load_policy(model, value_head=False, device=dist.device)
    rewards = load_rewards(config.reward, tokenizer, dist, config.micro_batch_size, config.dtype)
    module_at(policy.lm, place)
    require(config.features or config.top <= sae.m, f"--top {config.top} is more than the {sae.m} features")
    sae = sae.to(dist.device).requires_grad_(False)
    parts = Parts(config, dist, tokenizer, policy)

    # ------------------------------------------------------------------------------------------ features, on other answers
    skip_bos = None if config.keep_bos else tokenizer.bos_token_id
    seen = Tokens([p + r for p, r in zip(train, sampled(parts, train, step=1)[0])], skip_bos)
    x = from_models(seen, {"m": policy.lm}, [place], dist, config.dtype)(np.arange(len(seen.rows)))[f"m/{place_name(place)}"]
    f = encoded(sae, x)  # [M, N]
    rates, squares = ((v @ torch.ones(f.shape[1], 1, device=f.device))[:, 0].cpu() / f.shape[1] for v in (f.bool().float(), f * f))  # [M]
    concept = labels[:, names.index(config.concept)] if in_world and config.concept in names else None  # [V]
    ids = parse_ids(config.features) or features_of(config, f, concept, seen, sae, policy.lm)
    arms = {"plain": None, "nothing": [], "features": ids}
    for control, size in (("random", rates), ("strong", squares)):
        arms |= {f"{control} {i}": alike(size, ids, np.random.default_rng([SPLIT, config.seed, i])) for i in range(config.draws)}

    # ------------------------------------------------------------------------------------------------------------ the arms
    found, tokens = {}, {}
    for name, chosen in arms.items():
        if chosen is None:
            tokens[name], answers = sampled(parts, test, step=0)
        else:
            feature_ids = torch.tensor(chosen, dtype=torch.long, device=dist.device)
            with switched_off(policy.lm, place, sae, feature_ids, skip_bos):
                tokens[name], answers = sampled(parts, test, step=0)
        found[name] = measured(config, tokenizer, rewards, tokens[name], answers, concept)
        dist.print(f"{name}: " + ", ".join(f"{key} {value.mean():.3f}" for key, value in found[name].items()))
    variance = (x - x.mean(0)).square().sum()
    summary = {
        "sae": config.sae, "model": model, "layer": place[0], "site": place[1], "prompts": len(test) // config.n_answers,
        "n_answers": config.n_answers, "concept": None if concept is None else config.concept,
        "by": None if config.features else config.by,
        "nothing_is_plain": tokens["nothing"] == tokens["plain"],
        "arms": {name: {
            "features": chosen or [], "rates": rates[chosen or []].tolist(),
            "removed": (removed(sae, torch.tensor(chosen, device=dist.device), x).square().sum() / variance).item() if chosen else 0.0,
            "distinct_2": distinct_n(tokenizer.batch_decode(tokens[name], skip_special_tokens=True), 2),
            **{key: mean_with_interval(value, config.n_answers) for key, value in found[name].items()},
        } for name, chosen in arms.items()},
        "differences": differences(found, config.n_answers),
    }  # fmt: skip
    save(config, folder, summary, table(summary), draw)
    return summary


def sampled(parts, prompts, step):
    """One answer to each prompt (token lists) -> their token lists, [Answers]. `step` keys the noise."""
    size, responses, answers = parts.config.batch_size, [], []
    for first in range(0, len(prompts), size):
        rollout, part = roll_out(parts, prompts[first : first + size], list(range(first, min(first + size, len(prompts)))), step)
        responses += [ids[mask].tolist() for ids, mask in zip(rollout.response_ids.cpu(), rollout.response_mask.cpu())]
        answers.append(part)
    return responses, answers


def features_of(config, f, concept, seen, sae, lm):
    """The config.top features of a concept [V] by AUC on its words or on what comes before them, or by the logits they raise."""
    if config.by == "logits":
        unembedding = lm.get_output_embeddings().weight.float()  # [V, D]
        effects = sae.decoder_directions().float() @ unembedding.T  # [M, V]
        fires = (f @ torch.ones(f.shape[1], 1, device=f.device))[:, 0] != 0
        share = concept.to(effects) / concept.sum() - (~concept).to(effects) / (~concept).sum()
        scores = torch.where(fires, effects @ share, -torch.inf)  # mean over the concept's words - mean over the others
    else:
        if config.by == "before":
            following, goes_on = next_ids(seen)
            truth = concept[following] & goes_on  # [N]; a text's last token comes before nothing
        else:
            _, ids = where(seen)
            truth = concept[ids]  # [N]
        require(FEWEST <= truth.sum() < len(truth), f"--concept {config.concept}: the policy hardly writes such words; name --features")
        scores = feature_aucs(f, truth[:, None].to(f.device))[:, 0]
    return scores.topk(config.top).indices.tolist()




def measured(config, tokenizer, rewards, responses, answers, concept):
    """{reward name: [P N], length, cue: 1 where the answer has the spurious mark, concept: its share of the answer's tokens}

    Of the embedded world's gold also its parts, "gold: sentiment", ...: what breaks the grammar lowers the gold as well.
    """
    numbers = {name: score(reward, answers) for name, reward in rewards.items()}
    numbers["length"] = torch.tensor([len(ids) for ids in responses])
    if data.is_world(config.dataset):
        mark = tokenizer.convert_tokens_to_ids(world.cue(int(config.dataset.partition(":")[2] or 0)))
        numbers["cue"] = torch.tensor([mark in ids for ids in responses])
    if concept is not None:
        numbers[config.concept] = torch.tensor([concept[ids].float().mean().item() for ids in responses])
    if "world:gold" in rewards:
        terms = [world.gold_parts(prompt, response) for part in answers for prompt, response in zip(part.prompts, part.responses)]
        numbers |= {f"gold: {name}": torch.tensor([term[name] for term in terms]) for name in terms[0]}
    return {name: x.double() for name, x in numbers.items()}


def mean_with_interval(values, n_answers):
    """Mean and 95% interval over prompts of numbers [P N], an answer's each: {mean, low, high}"""
    values = values.view(-1, n_answers).mean(1)  # [P]
    low, high = bootstrap(values)
    return {"mean": values.mean().item(), "low": low.item(), "high": high.item()}


def differences(found, n_answers):
    """{number: {"features - nothing": {mean, low, high}, ...}}, paired by prompt; of a control the mean over its draws."""
    out = {}
    for key in found["nothing"]:
        arms = {name: [x[key] for arm, x in found.items() if arm.split()[0] == name] for name in ("nothing", "features", *CONTROLS)}
        mean = {name: torch.stack(values).mean(0) for name, values in arms.items()}
        pairs = [("features", "nothing"), *((c, "nothing") for c in CONTROLS), *(("features", c) for c in CONTROLS)]
        out[key] = {f"{a} - {b}": mean_with_interval(mean[a] - mean[b], n_answers) for a, b in pairs}
    return out


# ------------------------------------------------------------------------------------------------------------------ table, picture


def columns(summary):
    """The numbers that are shown arm by arm; the parts of the gold are among the differences."""
    return [key for key in summary["differences"] if not key.startswith("gold: ")]


def table(summary):
    """One line an arm, then the differences."""
    arms, keys = summary["arms"], columns(summary)
    what = f"features of {summary['concept']!r} (by {summary['by']})" if summary["by"] else "the named features"
    lines = [f"\n{summary['model']}, layer {summary['layer']}, {summary['site']}, {what} switched off; {summary['prompts']} prompts, "
             f"{summary['n_answers']} answers to each:"]  # fmt: skip
    lines.append(f"  {'':10s}{'rate':>8s}{'removed':>9s}{'distinct-2':>12s}" + "".join(f"{key[-11:]:>12s}" for key in keys) + "   features")
    for name, arm in arms.items():
        rate = f"{np.mean(arm['rates']):8.2%}{arm['removed']:9.2%}" if arm["features"] else " " * 17
        numbers = "".join(f"{arm[key]['mean']:12.3f}" for key in keys)
        lines.append(f"  {name:10s}{rate}{arm['distinct_2']:12.3f}{numbers}   {' '.join(map(str, arm['features']))}")
    lines.append(f"  'nothing' wrote {'the same tokens as' if summary['nothing_is_plain'] else 'OTHER TOKENS THAN'} the plain policy")
    lines.append(f"\n  {'':16s}" + "".join(f"{name:>26s}" for name in summary["differences"][keys[0]]))
    for key, rows in summary["differences"].items():
        cells = [f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for d in rows.values()]
        lines.append(f"  {key[-16:]:16s}" + "".join(f"{cell:>26s}" for cell in cells))
    return "\n".join(lines)


def draw(figure, summary):
    """Each reward and number by arm, with 95% intervals over prompts."""
    arms, keys = {name: arm for name, arm in summary["arms"].items() if name != "plain"}, columns(summary)
    figure.set_size_inches(2.6 * len(keys), 3)
    for i, key in enumerate(keys):
        axis = figure.add_subplot(1, len(keys), i + 1)
        mean, low, high = (np.array([arm[key][end] for arm in arms.values()]) for end in ("mean", "low", "high"))
        colours = ["black" if name == "nothing" else "C3" if name == "features" else "grey" for name in arms]
        for j, name in enumerate(arms):
            axis.errorbar(j, mean[j], [[mean[j] - low[j]], [high[j] - mean[j]]], fmt="o", color=colours[j])
        axis.set(title=key, xticks=range(len(arms)))
        axis.set_xticklabels(list(arms), rotation=70)

"""Bodies of `probe.py reward` and `probe.py pairs`: can the reward that a policy was trained on be read from what is inside it?

    texts -> a model's places, averaged over the tokens of interest -> inputs [N, F] -> ridge: their reward           (reward)
             (or the features of their sparse autoencoders)                         `-> logistic: which was chosen    (pairs)

A probe is tested on words and prompts that it was not fitted to, and stands beside the same probe on inputs that know nothing of the
policy's training: what these reach too, reinforcement learning did not put there. Intervals are over splits.

Pitfall: the reverse does not follow. What a policy has beyond its base may come from any further training. The control for that is the
base trained on without a reward (train_sft.py --model BASE --seed 1), probed as --policy in its turn.

Method: Marks et al. 2023 (2310.08164), but for the target, which is the true reward and no function of the inputs.

    N texts, T tokens, D hidden, M features of an SAE, F inputs of a probe: D or M for each selected layer
"""

import os
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from transformers.hf_argparser import HfArg

from .. import data, world
from ..divergence import layer_divergence, select_layers
from ..errors import at_least, require
from ..hf.activations import SITES, activations, module_at, place_name
from ..hf.blocks import blocks
from ..hf.folders import check_model, context_length
from ..models import load_policy, load_tokenizer
from ..packing import micro_batches
from ..rewards import check_reward, read_lexicon
from ..runtime.distributed import autocast, setup
from ..runtime.flags import FlagGroup, ResultFlags, TextFlags
from ..runtime.locks import unlock_afterwards
from ..runtime.results import finite, in_one_line, results_folder, save
from ..runtime.rng import SPLIT, key
from ..stats import t_interval
from .activation_store import TOKENS_AT_ONCE
from .linear_probes import fit_pairs, fit_reward
from .probe_flags import SITE_HELP
from .probe_texts import pair_texts, sequence_texts, subtract_neutral, word_texts
from .sae_files import load_sae


@dataclass
class ProbeFlags(FlagGroup):
    """Models, layers and probes: what a reward is read from, and how"""

    policy: str = HfArg(
        default="runs/ppo",
        help="the trained model: a run folder, a model folder or a hub name",
    )
    model: str = HfArg(
        default="runs/sft",
        help="the base that it was trained from: a control, and what layers are chosen by",
    )
    layers: str = HfArg(
        default="",
        help="which blocks: numbers such as 1,3, or highest:K, the K whose weights moved most, or "
        "lowest:K; by default those in --sae, or highest:5",
    )
    site: str = HfArg(default="mlp", metadata={"choices": SITES}, help=SITE_HELP)
    sae: str = HfArg(
        default="",
        help="read features instead of activations: a folder with policy/LAYER_SITE and "
        "base/LAYER_SITE, as train_sae.py writes it",
    )
    max_rows: int = HfArg(default=1000, help="use a random subset of this many rows; 0: all rows")
    max_length: int = HfArg(
        default=0,
        help="tokens in the longest text; longer ones are cut on the left; 0: the model's context",
    )
    seeds: int = HfArg(
        default=5, help="how many splits into training and test, which the intervals are over"
    )
    test_share: float = HfArg(
        default=0.33, help="the share of words and of prompts to test on, between 0 and 1"
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "max_rows", "max_length")
        at_least(self, 1, "seeds")
        require(0 < self.test_share < 1, "--test_share must lie between 0 and 1")


@dataclass
class RewardConfig(ProbeFlags, TextFlags, ResultFlags):
    """The target: which reward is looked for"""

    task: str = HfArg(
        default="word",
        metadata={"choices": ("word", "sequence")},
        help="word: the value of a word in its context; sequence: the reward of an answer",
    )
    reward: str = HfArg(
        default="",
        help="word: a lexicon FILE.tsv; sequence: any reward (see train_ppo.py --help); by "
        "default the embedded world's",
    )
    triples: int = HfArg(
        default=600,
        help="word: triples of a positive, a neutral and a negative word for each split",
    )
    neutral: float = HfArg(
        default=1.0, help="word: a word whose value is closer to 0 than this is neutral"
    )
    difference: bool = HfArg(
        default=False, help="word: inputs and values less those of the triple's neutral word"
    )

    output_dir: str = HfArg(
        default="runs/probe/reward", help="the folder that the results are written to"
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 3, "triples")
        require(self.neutral > 0, "--neutral must be positive")
        require(self.task == "word" or not self.difference, "--difference is for --task word")
        require(self.reward or data.is_world(self.dataset), "--reward names the target: a lexicon .tsv, or with --task sequence any reward")


@dataclass
class PairsConfig(ProbeFlags, TextFlags, ResultFlags):
    """probe.py pairs has no flags of its own"""

    output_dir: str = HfArg(
        default="runs/probe/pairs", help="the folder that the results are written to"
    )


# ------------------------------------------------------------------------------------------------------------------------ the commands


@unlock_afterwards()
def reward(config):
    """Read a true reward from activations, by ridge regression.

    The reward of words or of answers, from a policy's activations or from
    its features, beside controls.
    """
    dist, folder, tokenizer, max_length = start(config)
    by_word = config.task == "word"
    if by_word:
        lexicon, note = read_lexicon(config.reward) if config.reward else (world.LEXICON, "")
        if note:
            dist.print(note)
    else:
        check_reward(config.reward or "world:gold")
    rows = data.subset(data.read_rows(config.dataset, "sft", config.columns), config.max_rows)
    if by_word:
        texts = word_texts(config, tokenizer, rows, lexicon, max_length)
    else:
        texts = sequence_texts(config, tokenizer, rows, config.reward or "world:gold", max_length, dist)
    inputs, layers = all_inputs(config, texts, dist)
    if config.difference:
        texts, inputs = subtract_neutral(texts, inputs)
    note = "Bag of words: no word of the test is in training, so it is at chance by construction." if by_word else ""
    return compare(config, folder, fit_reward, texts, inputs, layers, note)


@unlock_afterwards()
def pairs(config):
    """Read which of two answers was chosen, by logistic regression.

    From the difference of the two answers' activations, or features, beside
    controls.
    """
    dist, folder, tokenizer, max_length = start(config)
    rows = data.subset(data.read_rows(config.dataset, "pairs", config.columns), config.max_rows)
    different = [row for row in rows if row["chosen"] != row["rejected"]]
    dist.print(f"{len(rows)} pairs, {len(rows) - len(different)} with chosen == rejected skipped")
    texts = pair_texts(config, tokenizer, different, max_length, dist)
    inputs, layers = all_inputs(config, texts, dist)
    return compare(config, folder, fit_pairs, texts, inputs, layers, "")


def start(config):
    """What can be wrong is found before any model is loaded. -> dist, run folder, tokenizer, longest text"""
    dist = setup(config.device)
    folder = results_folder(config, dist)
    model_config = check_model(config.policy)
    check_model(config.model)
    tokenizer, other = load_tokenizer(config.policy), load_tokenizer(config.model)
    require(tokenizer.get_vocab() == other.get_vocab(), f"{config.model} and {config.policy} have different tokenizers")
    for name in ("policy", "base") if config.sae else ():
        require(os.path.isdir(os.path.join(config.sae, name)), f"{config.sae}: no folder {name}/ of sparse autoencoders in it")
    return dist, folder, tokenizer, config.max_length or context_length(model_config) or 0


def layers_of(config):
    """The layers that --sae holds autoencoders of, such as "2,3"."""
    names = os.listdir(os.path.join(config.sae, "policy"))
    found = sorted(int(name.split("_")[0]) for name in names if name.endswith(f"_{config.site}") and name.split("_")[0].isdecimal())
    require(found, f"{config.sae}/policy: no autoencoder of a layer's {config.site}")
    return ",".join(map(str, found))


# -------------------------------------------------------------------------------------------------------------------------- the inputs


def all_inputs(config, texts, dist):
    """{name: inputs [N, F]} of the policy (first) and of the controls, and the selected layers."""
    policy, base = (load_policy(path, value_head=False, device=dist.device).lm for path in (config.policy, config.model))
    selection = config.layers or (layers_of(config) if config.sae else "highest:5")
    layers = in_one_line(select_layers, in_one_line(layer_divergence, blocks(base), blocks(policy)), selection)
    places = [(layer, config.site) for layer in layers]
    module_at(policy, places[0])  # a site that this architecture lacks
    inputs = {}
    if config.sae:
        width = policy.config.get_text_config().hidden_size
        for name, lm in (("policy", policy), ("base", base)):
            saes = {place: load_sae(os.path.join(config.sae, name, place_name(place)), width, dist.device) for place in places}
            inputs[f"{name}, SAE features"] = mean_inputs(lm, texts, places, dist, config.dtype, saes)
    torch.manual_seed(key(SPLIT))
    untrained = AutoModelForCausalLM.from_config(policy.config, trust_remote_code=False)
    untrained = untrained.to(dist.device).eval()
    for name, lm in (("policy, activations", policy), ("base, activations", base), ("random model, activations", untrained)):
        inputs[name] = mean_inputs(lm, texts, places, dist, config.dtype)
    inputs["bag of words"] = bag_of_words(texts)
    inputs["length"] = texts.lengths[:, None].float()
    return inputs, layers


@torch.no_grad()
def mean_inputs(lm, texts, places, dist, dtype, saes=None):
    """Activations (or features) at the places, averaged over each text's tokens from texts.first on: [N, F], float32, on the CPU."""
    mine = dist.part(len(texts.ids))
    ids, out = [texts.ids[i] for i in mine], [None] * len(mine)
    first = torch.tensor([texts.first[i] for i in mine])
    lengths = torch.tensor([len(row) for row in ids])
    for part in micro_batches(lengths, None, TOKENS_AT_ONCE):
        batch = pad_sequence([torch.tensor(ids[i]) for i in part], batch_first=True)  # [b, T]; padding may be any token
        column = torch.arange(batch.shape[1])
        mask = ((column >= first[part, None]) & (column < lengths[part, None])).to(dist.device)  # [b, T]
        with autocast(dist, dtype):
            found = activations(lm, batch.to(dist.device), places)
        columns = []
        for place in places:
            x = found[place][mask].float()  # [n, D], row by row
            x = saes[place].encode(x) if saes else x  # [n, F]
            total = torch.zeros(len(part), x.shape[1], device=x.device).index_add(0, mask.nonzero()[:, 0], x)
            columns.append(total / mask.sum(1, keepdim=True))
        for i, x in zip(part, torch.cat(columns, 1).cpu()):
            out[i] = x
    return dist.gather(torch.stack(out))


def bag_of_words(texts):
    """How often each token is in the text, of those that are in any: [N, tokens]."""
    row = torch.tensor([i for i, ids in enumerate(texts.ids) for _ in ids])
    _, column = torch.tensor([token for ids in texts.ids for token in ids]).unique(return_inverse=True)
    return torch.zeros(len(texts.ids), int(column.max()) + 1).index_put((row, column), torch.ones(len(row)), accumulate=True)


# ------------------------------------------------------------------------------------------------------------------------- the results


def compare(config, folder, fit, texts, inputs, layers, note):
    """Fit a probe on every input and split -> the summary, printed and written down; the main process does it alone."""
    if not folder.dist.main:
        return folder.dist.barrier()
    policy = next(iter(inputs))
    found = {name: [fit(x, texts, split) for split in texts.splits] for name, x in inputs.items()}
    found["shuffled labels"] = [fit(inputs[policy], texts, split, shuffle=seed) for seed, split in enumerate(texts.splits)]
    metrics, first = list(found[policy][0][0]), found[policy][0][1]
    rows = {}
    for name, results in found.items():
        rows[name] = {metric: mean_and_half_width([numbers[metric] for numbers, _ in results]) for metric in metrics}
        less = [mine[metrics[0]] - other[metrics[0]] for (mine, _), (other, _) in zip(found[policy], results)]  # paired by split
        rows[name] |= {"policy_less": mean_and_half_width(less), "largest_p": max(more.get("p", 1.0) for _, more in results)}
        rows[name]["seeds"] = [{**numbers, **{k: v for k, v in more.items() if k != "predictions"}} for numbers, more in results]
    summary = {
        "policy": config.policy, "model": config.model, "layers": layers, "site": config.site, "sae": config.sae, "texts": len(texts.ids),
        "metrics": metrics, "rows": rows, "predictions": first.get("predictions", []), "note": note,
    }  # fmt: skip
    save(config, folder, summary, table(summary), draw)
    folder.dist.barrier()
    return summary


def mean_and_half_width(values):
    """[mean, half-width of the 95% t interval or None]"""
    return [finite(x) for x in t_interval(values)]


def table(summary):
    """One line for each input: means over splits +- half-widths."""
    metrics, rows = summary["metrics"], summary["rows"]
    first, n = next(iter(rows)), len(next(iter(rows.values()))["seeds"])
    sizes = rows[first]["seeds"][0]
    p, named = "tau" in metrics, {"tau": "Kendall's tau", "r2": "R^2", "sign": "sign right", "accuracy": "accuracy", "auc": "AUC"}

    def pm(pair):
        return f"{pair[0]:7.3f} +- " + ("  nan" if pair[1] is None else f"{pair[1]:.3f}")

    head = "".join(f"{named[metric]:>17s}" + ("  largest p" if metric == "tau" else "") for metric in metrics)
    lines = [f"\n{summary['policy']} (base {summary['model']}), {summary['site']} of layers {', '.join(map(str, summary['layers']))}; "
             f"{n} splits, {sizes['n_train']} for training and {sizes['n_test']} for the test; 95% intervals over splits:",
             f"  {'':27s}{head}   policy's {named[metrics[0]]} less"]  # fmt: skip
    for name, row in rows.items():
        cells = "".join(f"  {pm(row[metric])}" + (f"     {row['largest_p']:.3f}" if metric == "tau" else "") for metric in metrics)
        lines.append(f"  {name:27s}{cells}" + ("" if name == first else f"      {pm(row['policy_less'])}"))
    if p:
        share = sum(seed["positive"] for seed in rows[first]["seeds"]) / n
        lines.append(f"  Always the commoner sign is right for {max(share, 1 - share):.3f}. p: the worst split's, by permutation of the "
                     "test; a random direction can have a small one too, as shuffled labels show.")  # fmt: skip
    return "\n".join(lines + [f"  {summary['note']}"] * bool(summary["note"]))


def draw(figure, summary):
    """The first metric of each input with its interval, and the first split's predictions against the truth."""
    rows, metric = summary["rows"], summary["metrics"][0]
    figure.set_size_inches(10 if summary["predictions"] else 6, 3.4)
    axis = figure.add_subplot(1, 2 if summary["predictions"] else 1, 1)
    means, halves = zip(*(row[metric] for row in rows.values()))
    colors = ["C0"] + ["lightgrey"] * (len(rows) - 1)
    axis.barh(list(rows), means, xerr=[half or 0 for half in halves], color=colors, ecolor="black", capsize=2)
    axis.invert_yaxis()
    axis.axvline(0 if metric == "tau" else 0.5, color="black", linewidth=0.8)
    axis.set(xlabel={"tau": "Kendall's tau on held-out words or responses"}.get(metric, "accuracy on held-out pairs"))
    if summary["predictions"]:
        axis = figure.add_subplot(1, 2, 2)
        _, true, predicted = zip(*summary["predictions"])
        axis.plot(true, predicted, ".")
        axis.set(xlabel="true reward", ylabel=f"read from {next(iter(rows))}", title="first split's test")

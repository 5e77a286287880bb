"""Bodies of `probe.py reward` and `probe.py pairs`: can the reward that a policy was trained on be
read from what is inside it?

    texts -> activations at a model's places (or the features of their sparse autoencoders),
             averaged over the tokens of interest: inputs [N, F]
          -> ridge regression: their reward (reward), or
             logistic regression: which of two answers was chosen (pairs)

A probe is tested on words and prompts that it was not fitted to. It stands beside the same probe on
inputs that know nothing of the policy's training. What such a control reaches too was not put there
by reinforcement learning. Intervals are over splits.

Pitfall: the reverse does not follow. What a policy has beyond its base may come from any further
training. The control for that is the base trained on without a reward (train_sft.py --model BASE
--seed 1), probed as --policy in its turn.

Method: Marks et al. 2023 (2310.08164), but for the target, which is the true reward and no function
of the inputs.

    N texts, b of them in a forward pass, T tokens, D hidden, M features of an SAE
    F inputs of a probe: D or M for each selected layer
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from .. import data, world
from ..chat_templates import leave_out_control_tokens
from ..divergence import layer_divergence, select_layers
from ..errors import at_least, require
from ..hf.activations import SITES, activations, module_at, place_name
from ..hf.blocks import blocks
from ..hf.folders import check_model, choose_max_length
from ..models import load_policy, load_shared_tokenizer
from ..packing import micro_batches, pad_rows
from ..rewards import check_reward, read_lexicon
from ..runtime.distributed import Dist, autocast, setup
from ..runtime.flags import FlagGroup, ResultFlags, TextFlags, results_in, subset_of
from ..runtime.locks import unlock_afterwards
from ..runtime.log import RunFolder
from ..runtime.results import finite, results_folder, save, with_input_errors
from ..runtime.rng import SPLIT, key
from ..stats import t_interval
from .activation_store import TOKENS_AT_ONCE
from .reward_probe_fits import fit_pairs, fit_reward
from .reward_probe_texts import Texts, pair_texts, sequence_texts, subtract_neutral, word_texts
from .sae_files import load_sae
from .shared_flags import SITE_HELP

# A control: the first inputs, with the rewards of the training side exchanged.
SHUFFLED = "shuffled labels"
# What the metrics of the probes are called in the table.
TITLES = {
    "tau": "Kendall's tau",
    "r2": "R^2",
    "sign": "sign right",
    "accuracy": "accuracy",
    "auc": "AUC",
}


# ----------------------------------------------------------------------------------------- flags


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
    max_rows: int = subset_of(1000)
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

    output_dir: str = results_in("runs/probe/reward")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 3, "triples")
        require(self.neutral > 0, "--neutral must be positive")
        require(self.task == "word" or not self.difference, "--difference is for --task word")
        require(
            self.reward or data.is_world(self.dataset),
            "--reward names the target: a lexicon .tsv, or with --task sequence any reward",
        )


@dataclass
class PairsConfig(ProbeFlags, TextFlags, ResultFlags):
    """probe.py pairs has no flags of its own"""

    output_dir: str = results_in("runs/probe/pairs")


# ---------------------------------------------------------------------------------- the commands


@unlock_afterwards()
def reward(config):
    """Read a true reward from activations, by ridge regression.

    It measures how well the reward of words (or of answers) can be read from
    inside a policy, on words and prompts that the probe was not fitted to. The
    same probe on the base and on a model with random weights rules out that it
    was all there before PPO, or that the wiring alone does it. The bag of words
    and the length rule out that the probe knows words by their identity, or that
    longer texts are simply better ones. Shuffled labels rule out that so many
    inputs would fit anything. What would refute that PPO wrote its reward into
    the policy: the base, trained on without any reward (train_sft.py --model
    runs/sft --seed 1), and given as --policy, gains as much over the base.

    Intervals are over splits of the data, of one policy.
    """
    run = check_and_set_up(config)
    # "word": inputs are read at the word's last token. "sequence": they are means over an answer.
    if config.task == "word":
        lexicon = open_lexicon(config, run.dist)
        rows = read_rows(config, "sft", run)
        texts = word_texts(config, run.tokenizer, rows, lexicon, run.max_length)
        note = (
            "Bag of words: no word of the test is in training, so it is at chance by construction."
        )
    else:
        spec = config.reward or "world:gold"
        check_reward(spec)
        rows = read_rows(config, "sft", run)
        texts = sequence_texts(config, run.tokenizer, rows, spec, run.max_length, run.dist)
        note = ""

    inputs, layers = collect_inputs(config, texts, run.dist)
    # The words of a triple share their context. What the inputs owe to it largely drops out.
    if config.difference:
        texts, inputs = subtract_neutral(texts, inputs)
    return compare_inputs(config, run.folder, fit_reward, texts, inputs, layers, note)


@unlock_afterwards()
def pairs(config):
    """Read which of two answers was chosen, by logistic regression.

    It measures how often a probe of the difference of two answers' activations
    tells the chosen one, on prompts that it was not fitted to. The same probe on
    the base and on a model with random weights shows how much can be read
    without PPO: only what exceeds these can come from it. The bag of words and
    the length rule out that the words alone, or the longer answer, give it away.
    Shuffled labels (which one was chosen, by coin) rule out that the probe fits
    anything. What would refute that the policy knows more of preferences than
    its base: base or bag of words do as well.

    Intervals are over splits of the data, of one policy.
    """
    run = check_and_set_up(config)
    rows = read_rows(config, "pairs", run)
    # Two answers that are the same have no difference to read from.
    different = [row for row in rows if row["chosen"] != row["rejected"]]
    n_same = len(rows) - len(different)
    run.dist.print(f"{len(rows)} pairs, {n_same} with chosen == rejected skipped")
    texts = pair_texts(config, run.tokenizer, different, run.max_length, run.dist)
    inputs, layers = collect_inputs(config, texts, run.dist)
    return compare_inputs(config, run.folder, fit_pairs, texts, inputs, layers, note="")


@dataclass
class Setup:
    """What a command has before any model is loaded."""

    dist: Dist
    folder: RunFolder
    tokenizer: PreTrainedTokenizerBase
    max_length: int  # of a text, in tokens; 0: no limit


def check_and_set_up(config) -> Setup:
    """Find what can be wrong before any model is loaded, as InputErrors."""
    dist = setup(config.device)
    folder = results_folder(config, dist)
    model_config = check_model(config.policy)
    check_model(config.model)
    # All models read the same token ids, so that a row of inputs is the same text for each.
    tokenizer = load_shared_tokenizer(config.policy, [config.model])
    if config.sae:
        for name in ("policy", "base"):
            require(
                os.path.isdir(os.path.join(config.sae, name)),
                f"{config.sae}: no folder {name}/ of sparse autoencoders in it",
            )
    max_length = choose_max_length(config.max_length, model_config) or 0
    return Setup(dist, folder, tokenizer, max_length)


def open_lexicon(config, dist) -> dict[str, float]:
    """{word: value} of the lexicon that --reward names; by default the embedded world's."""
    if not config.reward:
        return world.LEXICON
    lexicon, note = read_lexicon(config.reward)
    if note:
        dist.print(note)
    return lexicon


def read_rows(config, kind: str, run: Setup) -> list[dict]:
    """A random subset of the data set's rows, as many as --max_rows says."""
    rows = data.read_rows(config.dataset, kind, config.columns)
    rows = data.subset(rows, config.max_rows)
    return leave_out_control_tokens(run.tokenizer, rows, config, run.dist.print)


# ------------------------------------------------------------------------------------ the inputs


def collect_inputs(config, texts: Texts, dist) -> tuple[dict[str, Tensor], list[int]]:
    """Compute the inputs of all probes: {name: [N, F]}, and the selected layers.

    The policy's come first, those of the controls afterwards.
    """
    policy = load_policy(config.policy, value_head=False, device=dist.device).lm
    base = load_policy(config.model, value_head=False, device=dist.device).lm
    layers = choose_layers(config, base, policy)
    places = [(layer, config.site) for layer in layers]
    module_at(policy, places[0])  # InputError: a site that this architecture lacks

    # With --sae the policy's features come first, and all else is compared with these.
    inputs = {}
    if config.sae:
        # The base's activations go through autoencoders that were trained on the base.
        for name, lm in (("policy", policy), ("base", base)):
            saes = load_saes(os.path.join(config.sae, name), places, policy, dist)
            features = mean_inputs(lm, texts, places, dist, config.dtype, saes)
            inputs[f"{name}, SAE features"] = features

    # The same activations of a model that has learned something else, and of one that has not
    # learned at all.
    lms = {"policy": policy, "base": base, "random model": make_untrained(policy, dist)}
    for name, lm in lms.items():
        inputs[f"{name}, activations"] = mean_inputs(lm, texts, places, dist, config.dtype)
    # What can be said of the texts without any model.
    inputs["bag of words"] = bag_of_words(texts)
    inputs["length"] = texts.lengths[:, None].float()
    return inputs, layers


def choose_layers(config, base, policy) -> list[int]:
    """The layers that --layers names; by default those in --sae, or the five that moved most."""
    choice = config.layers
    if not choice and config.sae:
        choice = list_sae_layers(config)
    elif not choice:
        choice = "highest:5"
    moved = with_input_errors(layer_divergence, blocks(base), blocks(policy))
    return with_input_errors(select_layers, moved, choice)


def list_sae_layers(config) -> str:
    """The layers for which --sae holds an autoencoder of the policy at --site, such as "2,3"."""
    layers = []
    for name in os.listdir(os.path.join(config.sae, "policy")):
        layer = name.split("_")[0]
        if layer.isdecimal() and name.endswith(f"_{config.site}"):
            layers.append(int(layer))
    require(layers, f"{config.sae}/policy: no autoencoder of a layer's {config.site}")
    return ",".join(map(str, sorted(layers)))


def load_saes(folder: str, places: list[tuple[int, str]], lm, dist) -> dict:
    """The autoencoders LAYER_SITE in a folder, for activations of lm: {place: autoencoder}."""
    width = lm.config.get_text_config().hidden_size
    saes = {}
    for place in places:
        saes[place] = load_sae(os.path.join(folder, place_name(place)), width, dist.device)
    return saes


def make_untrained(lm, dist):
    """A model of the same architecture as lm, with random weights, always the same ones."""
    # Hugging Face draws initial weights from torch's global generator.
    torch.manual_seed(key(SPLIT))
    untrained = transformers.AutoModelForCausalLM.from_config(lm.config, trust_remote_code=False)
    return untrained.to(dist.device).eval()


@torch.no_grad()
def mean_inputs(
    lm, texts: Texts, places: list[tuple[int, str]], dist, dtype: str, saes: dict | None = None
) -> Tensor:
    """Average activations, or features, over the tokens of each text from texts.first on.

    saes: {place: autoencoder}, for features. -> [N, F], float32, on the CPU; F is D or M for each
    place, one after another. Each process runs its own part of the texts. InputError: there are
    more processes than texts.
    """
    n_texts = len(texts.ids)
    require(n_texts >= dist.world, f"{n_texts} texts are too few for {dist.world} processes")
    own_texts = dist.part(n_texts)
    ids = [texts.ids[i] for i in own_texts]
    first = torch.tensor([texts.first[i] for i in own_texts])  # [n]
    lengths = torch.tensor([len(row) for row in ids])  # [n]
    means = [None] * len(ids)  # [n] of [F]
    # Texts of similar length share a forward pass.
    for rows in micro_batches(lengths, None, TOKENS_AT_ONCE):
        batch = pad_rows([ids[i] for i in rows])  # [b, T]
        column = torch.arange(batch.shape[1])
        # The padding may be any token: it stands behind all that counts.
        mask = (column >= first[rows, None]) & (column < lengths[rows, None])  # [b, T]
        mask = mask.to(dist.device)
        with autocast(dist, dtype):
            outputs = activations(lm, batch.to(dist.device), places)  # {place: [b, T, D]}

        # The tokens of all rows stand one after another in x: each adds to its own row's sum.
        row_of_token = mask.nonzero()[:, 0]
        means_of_places = []
        for place in places:
            x = outputs[place][mask].float()  # [tokens, D], row by row
            # Features are averaged, not computed from a mean activation, which no token has.
            if saes:
                x = saes[place].encode(x)  # [tokens, M]
            sums = torch.zeros(len(rows), x.shape[1], device=x.device)
            sums = sums.index_add(0, row_of_token, x)
            means_of_places.append(sums / mask.sum(1, keepdim=True))
        means_of_rows = torch.cat(means_of_places, 1).cpu()  # [b, F]
        # Micro-batches come shortest first: each mean goes back to its text's place.
        for i, mean in zip(rows.tolist(), means_of_rows):
            means[i] = mean
    return dist.gather(torch.stack(means))


def bag_of_words(texts: Texts) -> Tensor:
    """Count the tokens of each text: [N, the different tokens of all texts]."""
    tokens = []  # of all texts, one after another
    text_of_token = []
    for i, ids in enumerate(texts.ids):
        tokens.extend(ids)
        text_of_token.extend([i] * len(ids))
    # Only tokens that occur somewhere have a column: a vocabulary may hold a hundred thousand.
    different, column_of_token = torch.tensor(tokens).unique(return_inverse=True)
    counts = torch.zeros(len(texts.ids), len(different))
    places = (torch.tensor(text_of_token), column_of_token)
    return counts.index_put(places, torch.ones(len(tokens)), accumulate=True)


# ----------------------------------------------------------------------------------- the results


def compare_inputs(
    config,
    folder: RunFolder,
    fit: Callable,
    texts: Texts,
    inputs: dict[str, Tensor],
    layers: list[int],
    note: str,
) -> dict | None:
    """Fit a probe on every input and split, print the summary and write it down.

    fit: fit_reward or fit_pairs of reward_probe_fits. The main process does it alone; the others
    get None.
    """
    if not folder.dist.main:
        folder.dist.barrier()
        return None

    # The first inputs are the policy's: the others are compared with them.
    policy_name = next(iter(inputs))  # such as "policy, activations"
    results = {}  # {name: [(numbers, more) of each split]}; only numbers are averaged over splits
    for name, x in inputs.items():
        results[name] = [fit(x, texts, split) for split in texts.splits]
    # A probe that is fitted to exchanged values, or to coin flips, shows what chance reaches on the
    # true ones.
    results[SHUFFLED] = []
    for seed, split in enumerate(texts.splits):
        results[SHUFFLED].append(fit(inputs[policy_name], texts, split, shuffle=seed))

    # The table is over all splits. The picture shows single predictions, of the first split alone.
    numbers_of_first_split, more_of_first_split = results[policy_name][0]
    metrics = list(numbers_of_first_split)
    rows = {}
    for name, own_results in results.items():
        rows[name] = summarise_splits(own_results, results[policy_name], metrics)
    summary = {
        "policy": config.policy,
        "model": config.model,
        "layers": layers,
        "site": config.site,
        "sae": config.sae,
        "texts": len(texts.ids),
        "metrics": metrics,
        "rows": rows,
        "predictions": more_of_first_split.get("predictions", []),
        "note": note,
    }
    save(config, folder, summary, format_table(summary), draw)
    folder.dist.barrier()
    return summary


def summarise_splits(
    results: list[tuple[dict, dict]], policy_results: list[tuple[dict, dict]], metrics: list[str]
) -> dict:
    """The results of one input, split by split -> its row of summary.json.

    "policy_less" is how much more of the first metric the policy's inputs reach, split by split, so
    that what makes a split easy or hard for both drops out.
    """
    row = {}
    for metric in metrics:
        row[metric] = mean_and_half_width([numbers[metric] for numbers, _ in results])

    differences = []
    p_values = []
    records = []  # all that is known of a split but for the single predictions
    # Inputs are compared by the first metric: tau for rewards, accuracy for pairs.
    for (numbers, more), (policy_numbers, _) in zip(results, policy_results):
        differences.append(policy_numbers[metrics[0]] - numbers[metrics[0]])
        p_values.append(more.get("p", 1.0))
        record = {**numbers, **more}
        record.pop("predictions", None)
        records.append(record)
    row["policy_less"] = mean_and_half_width(differences)
    row["largest_p"] = max(p_values)
    row["seeds"] = records  # a split is drawn by its seed
    return row


def mean_and_half_width(values: list[float]) -> list[float | None]:
    """[mean, half-width of the 95% t interval]; None stands for what is not finite."""
    mean, half_width = t_interval(values)
    return [finite(mean), finite(half_width)]


def format_table(summary: dict) -> str:
    """One line for each input: means over splits +- half-widths."""
    metrics = summary["metrics"]
    rows = summary["rows"]
    policy_name = next(iter(rows))
    splits = rows[policy_name]["seeds"]
    n_train = splits[0]["n_train"]
    n_test = splits[0]["n_test"]
    layers = ", ".join(map(str, summary["layers"]))

    head = f"  {'':27s}"
    for metric in metrics:
        head += f"{TITLES[metric]:>17s}"
        if metric == "tau":
            head += "  largest p"
    lines = [
        f"\n{summary['policy']} (base {summary['model']}), {summary['site']} of layers {layers}; "
        f"{len(splits)} splits, {n_train} for training and {n_test} for the test; "
        "95% intervals over splits:",
        f"{head}   policy's {TITLES[metrics[0]]} less",
    ]

    for name, row in rows.items():
        line = f"  {name:27s}"
        for metric in metrics:
            line += f"  {format_interval(row[metric])}"
            if metric == "tau":
                line += f"     {row['largest_p']:.3f}"
        if name != policy_name:
            line += f"      {format_interval(row['policy_less'])}"
        lines.append(line)

    # A share of right signs says something only where it is above that of guessing.
    if "tau" in metrics:
        positive = sum(split["positive"] for split in splits) / len(splits)
        share = max(positive, 1 - positive)
        lines.append(
            f"  Guessing the commoner sign every time is right for {share:.3f} of the test. p: "
            "the worst split's, by permutation of the test; compare it with that of the shuffled "
            "labels."
        )
    if summary["note"]:
        lines.append(f"  {summary['note']}")
    return "\n".join(lines)


def format_interval(mean_and_half_width: list[float | None]) -> str:
    """[mean, half-width] -> 17 characters; a single split has no half-width."""
    mean, half_width = mean_and_half_width
    if half_width is None:
        return f"{mean:7.3f} +-   nan"
    return f"{mean:7.3f} +- {half_width:.3f}"


def draw(figure, summary: dict):
    """The first metric of each input with its interval, and the first split's predictions against
    the truth."""
    rows = summary["rows"]
    metric = summary["metrics"][0]
    predictions = summary["predictions"]
    n_panels = 2 if predictions else 1
    width = 10 if predictions else 6
    figure.set_size_inches(width, 3.4)

    means = []
    half_widths = []
    for row in rows.values():
        mean, half_width = row[metric]
        means.append(mean)
        half_widths.append(half_width or 0)
    if metric == "tau":
        chance = 0
        label = "Kendall's tau on held-out words or responses"
    else:
        chance = 0.5
        label = "accuracy on held-out pairs"
    colors = ["C0"] + ["lightgrey"] * (len(rows) - 1)
    axis = figure.add_subplot(1, n_panels, 1)
    axis.barh(list(rows), means, xerr=half_widths, color=colors, ecolor="black", capsize=2)
    axis.invert_yaxis()
    axis.axvline(chance, color="black", linewidth=0.8)
    axis.set(xlabel=label)

    if predictions:
        _, true, predicted = zip(*predictions)
        axis = figure.add_subplot(1, n_panels, 2)
        axis.plot(true, predicted, ".")
        axis.set(
            xlabel="true reward",
            ylabel=f"read from {next(iter(rows))}",
            title="first split's test",
        )

"""How diverse the outputs of one or several systems are.

Systems are compared on sets of equal size, with one vocabulary, and the lengths of texts stand
beside every figure. measure() is the plain call, for outputs that are at hand; report() is what
sample_bon.py prints and writes into diversity.json.

    P prompts, K outputs to each; G sets of S texts, R partners of a text
"""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from transformers.hf_argparser import HfArg

from ..chats import read_prompt, show
from ..diversity import (
    count_vocabulary,
    draw_partners,
    embedding_diversity,
    ngram_diversity,
    nli_diversity,
    simulated_best_of_n,
    split_sentences,
    spread_across_inputs,
    spread_over_inputs,
)
from ..ensemble import combine
from ..errors import at_least, require
from ..hf.folders import check_model
from ..models import load_tokenizer
from ..runtime.curves import without_common_ends
from ..runtime.files import check_output, read_file, read_json, write_json
from ..runtime.flags import FlagGroup, changed_flags
from ..runtime.locks import LOCK_FILE, lock
from .encoders import check_nli, nli_scorer, sentence_encoder

FILE = "diversity.json"
# {metric: its title in the tables}. The other metrics are in the file alone.
TITLES = {
    "length": "length",
    "distinct": "distinct-n",
    "ead": "EAD",
    "embedding": "embeddings",
    "nli": "NLI",
}


@dataclass
class Flags(FlagGroup):
    """Diversity: how much the answers differ from one another; it changes no run"""

    diversity: bool = HfArg(
        default=False,
        help="also measure how diverse the answers are: a table, and diversity.json",
    )
    from_files: list[str] = HfArg(
        default_factory=list,
        aliases=["--from"],
        help="do nothing but measure the diversity of these JSONL files of rows {prompt, "
        "response} or {prompt, responses}, at equal numbers of answers (--from for short)",
    )
    tokenizer: str = HfArg(
        default="", help="count n-grams of this tokenizer's tokens; without it, of words"
    )
    vocab_size: int = HfArg(
        default=0,
        help="V of EAD, one for all figures that are compared; 0: the tokenizer's vocabulary, or "
        "the different words of all files",
    )
    encoder: str = HfArg(
        default="",
        help="a sentence encoder, by folder or hub name: also measure 1 - mean cosine similarity",
    )
    nli_model: str = HfArg(
        default="",
        help="an MNLI model, by folder or hub name: also measure contradictions",
    )
    nli_sentences: int = HfArg(
        default=1, help="NLI: sentences that are drawn from each longer answer; 0: all"
    )
    nli_partners: int = HfArg(
        default=15, help="NLI: to how many others of its set each answer is the premise"
    )
    truncate: str = HfArg(
        default="",
        help="a second table, of the first N words (tokens) of each answer; median: N is the "
        "smallest of the systems' median lengths",
    )
    best_of: int = HfArg(
        default=0,
        help="also measure the best of N answers by --objective, drawn from the pool again and "
        "again: figures across prompts (for those per prompt sample real ones: --n N "
        "--save_best); 0: off",
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "vocab_size", "nli_sentences", "best_of")
        at_least(self, 1, "nli_partners")
        is_number = self.truncate.isdecimal() and int(self.truncate) > 0
        require(
            self.truncate in ("", "median") or is_number,
            f"--truncate takes a number of tokens or median, not {self.truncate!r}",
        )

        # A flag that says how to measure is a mistake where nothing is measured.
        if not self.diversity and not self.from_files:
            names = [field.name for field in fields(Flags)]
            unread = changed_flags(self, names)
            require(not unread, f"without --diversity or --from nothing reads {', '.join(unread)}")


def check_models(config: Flags):
    """InputErrors of the models that are named, before anything is loaded."""
    if config.encoder:
        check_model(config.encoder)
    if config.nli_model:
        check_nli(config.nli_model)
    if config.tokenizer:
        load_tokenizer(config.tokenizer, needs_eos=False)


# ----------------------------------------------------------------------------------------- reading


def read_outputs(path: str, columns: Sequence[str] = (), with_scores: bool = False) -> list[dict]:
    """A JSONL file -> rows {prompt, responses: [K][, scores: {name: [K]}]}, in the file's order.

    A row of the file holds one answer, {prompt, response[, scores: {name: x}]}, as those of
    best_of_{n}.jsonl and of a PPO run's eval/step_{N}.jsonl do, or several answers, {prompt,
    responses: [K][, scores: {name: [K]}]}. columns: FIELD=COLUMN renamings. InputError: a row is no
    such object.
    """
    names = dict(column.split("=", 1) for column in columns)
    prompt_field = names.get("prompt", "prompt")
    response_field = names.get("response", "response")
    responses_field = names.get("responses", "responses")

    rows = []
    for place, row in read_file(path):
        require(
            isinstance(row, dict),
            f"{place}: a row must be an object with {prompt_field} and {response_field} or "
            f"{responses_field}",
        )
        prompt = read_prompt(place, row.get(prompt_field), prompt_field)
        # A single answer becomes a list of one, so that all rows have one form from here on.
        has_several = responses_field in row
        if has_several:
            responses = row[responses_field]
            wanted = f"field {responses_field!r} must be a list of at least one string"
        else:
            responses = [row.get(response_field)]
            wanted = f"field {response_field!r} must be a string"
        require(are_texts(responses), f"{place}: {wanted}")

        new_row = {"prompt": prompt, "responses": responses}
        if with_scores:
            new_row["scores"] = scores_of(row, len(responses), has_several, place)
        rows.append(new_row)
    return rows


def are_texts(value) -> bool:
    """Whether a value is a list of at least one string."""
    is_list = isinstance(value, list) and len(value) > 0
    return is_list and all(isinstance(text, str) for text in value)


def scores_of(row: dict, n: int, has_several: bool, place: str) -> dict[str, list[float]]:
    """{name: [n]} of a row's scores. InputError: there are none, or they are no n numbers."""
    scores = row.get("scores")
    require(
        isinstance(scores, dict) and scores,
        f"{place}: --best_of needs the field 'scores', an object {{reward: score}}",
    )
    # One answer has {"rm": 0.3}, several answers have {"rm": [0.3, -1.2, ...]}.
    if not has_several:
        scores = {name: [score] for name, score in scores.items()}
    for name, values in scores.items():
        is_list = isinstance(values, list) and len(values) == n
        require(
            is_list and all(type(x) in (int, float) and abs(x) < 1e300 for x in values),
            f"{place}: scores of {name!r} must be finite numbers, one for each answer",
        )
    return scores


def group_by_prompt(rows: list[dict]) -> dict[str, dict]:
    """Rows of one prompt become one row: {prompt: {prompt, responses, scores}}."""
    grouped = {}
    for row in rows:
        prompt = show(row["prompt"])
        whole = grouped.setdefault(prompt, {"prompt": prompt, "responses": [], "scores": {}})
        whole["responses"] += row["responses"]
        for name, values in row.get("scores", {}).items():
            whole["scores"].setdefault(name, []).extend(values)
    return grouped


def best_of(rows: list[dict], n: int, objective: str, uwo_lambda: float, seed: int) -> list[dict]:
    """Rows with scores -> rows of simulated best-of-n outputs.

    What is best is decided by the scores' mean, WCO or UWO (ensemble.combine). InputError: answers
    without scores, or no more than n answers to a prompt.
    """
    rows = list(group_by_prompt(rows).values())
    # combine() takes the members of one ensemble, so every answer must be scored by all of them.
    names = list(rows[0]["scores"])
    for row in rows:
        prompt = row["prompt"]
        for name in names:
            require(
                len(row["scores"].get(name, ())) == len(row["responses"]),
                f"--best_of: not all answers to {prompt[:40]!r} have scores of {', '.join(names)}",
            )

    # All pools are cut to the smallest one.
    N = min(len(row["responses"]) for row in rows)
    require(n < N, f"--best_of {n} needs more than {n} answers to every prompt, and one has {N}")
    members = []
    for name in names:
        members.append([row["scores"][name][:N] for row in rows])
    scores = torch.tensor(members, dtype=torch.float64)  # [members, P, N]
    chosen = simulated_best_of_n(combine(scores, objective, uwo_lambda), n, seed=seed)

    best = []
    for row, places in zip(rows, chosen):  # places [repeats]
        responses = [row["responses"][j] for j in places]
        best.append({"prompt": row["prompt"], "responses": responses})
    return best


def equal_sets(systems: dict[str, dict[str, dict]]) -> dict[str, list[list[str]]]:
    """{name: {prompt: row}} -> {name: texts, P rows of K}: sets of equal size for all systems.

    They hold the prompts that all systems have, and the first K outputs to each. K is the smallest
    number of outputs to a prompt. Systems with a single output to some prompt have K = 1, and do
    not cut the outputs of the others. Systems without a common prompt (in and out of distribution,
    say) are compared on their first P ones.
    """
    first_system = next(iter(systems.values()))
    # All systems get the same prompts, since some prompts allow more different answers than others.
    shared = []
    for prompt in first_system:
        if all(prompt in rows for rows in systems.values()):
            shared.append(prompt)

    P = min(len(rows) for rows in systems.values())
    chosen = {}
    smallest = {}  # number of outputs to a prompt
    for name, rows in systems.items():
        if shared:
            chosen[name] = [rows[prompt] for prompt in shared]
        else:
            chosen[name] = list(rows.values())[:P]
        smallest[name] = min(len(row["responses"]) for row in chosen[name])
    # A system with one answer to a prompt, such as a greedy one, is left out of the minimum: the
    # others would keep one answer too.
    K = min((count for count in smallest.values() if count > 1), default=1)

    texts = {}
    for name, rows in chosen.items():
        size = min(K, smallest[name])  # K, or 1 for a system that has no more
        texts[name] = [row["responses"][:size] for row in rows]
    return texts


# --------------------------------------------------------------------------------------- measuring


def measure(
    outputs: list[list[str]],
    vocab_size: int | None = None,
    tokenizer=None,
    truncate: int = 0,
    encode: Callable | None = None,
    nli: Callable | None = None,
    n_sentences: int = 1,
    n_partners: int = 15,
    seed: int = 0,
    per_input: bool = True,
) -> dict[str, dict | None]:
    """All metrics of P x K outputs, over the outputs to a prompt and across prompts.

    Returns {"per_input": {metric: Spread(mean, std, interval)}, "across_input": {...}}. The metrics
    are length (tokens), distinct and ead (means over n = 1 .. 5), distinct_1 ..., ead_1 ...,
    embedding, nli. per_input is None for K = 1 (and on request), across_input is None for P = 1.

    outputs: P rows of K strings. vocab_size: V of EAD, by default the tokenizer's, or the number of
    different words. truncate: count only the first so many tokens of each text. encode, nli:
    encoders.sentence_encoder(...), encoders.nli_scorer(...). An empty output has no n-grams; to the
    other metrics it is a text like any other. ValueError: rows of unequal size.
    Pitfall: a figure says something only beside another one with the same P, K and V, and with
    texts of similar length.
    """
    counts = sorted({len(row) for row in outputs})
    if len(counts) != 1 or not counts[0]:
        raise ValueError(f"rows of {counts} outputs: they must be equally many, and not none")
    P = len(outputs)
    K = counts[0]

    # V counts the words of whole texts, also where these are cut afterwards.
    tokens = []
    for row in outputs:
        tokens.append([tokenize(text, tokenizer) for text in row])
    if not vocab_size:
        vocab_size = default_vocab_size(flatten(tokens), tokenizer)
    if truncate:
        tokens, outputs = cut_texts(tokens, truncate, tokenizer)

    # What the models read: each text once for both protocols.
    embeddings = None
    if encode is not None:
        embeddings = encode(flatten(outputs)).view(P, K, -1)  # [P, K, D]
    sentences = None
    if nli is not None:
        sentences = []
        for row in outputs:
            sentences.append([split_sentences(text, n_sentences, seed) for text in row])

    result = {"per_input": None, "across_input": None}
    if K > 1 and per_input:
        metrics = measure_sets(tokens, embeddings, sentences, vocab_size, nli, n_partners, seed)
        result["per_input"] = {}
        for name, (values, _) in metrics.items():
            result["per_input"][name] = spread_over_inputs(values)
    if P > 1:
        # The same outputs as K sets of P: the first outputs to all prompts, the second ones, ...
        tokens = transpose(tokens)
        if embeddings is not None:
            embeddings = embeddings.transpose(0, 1)
        if sentences is not None:
            sentences = transpose(sentences)
        metrics = measure_sets(tokens, embeddings, sentences, vocab_size, nli, n_partners, seed)
        result["across_input"] = {}
        for name, (values, left_out) in metrics.items():
            result["across_input"][name] = spread_across_inputs(values, left_out)
    return result


def measure_sets(
    tokens: list[list],
    embeddings: torch.Tensor | None,
    sentences: list[list[list[str]]] | None,
    vocab_size: int,
    nli: Callable | None,
    n_partners: int,
    seed: int,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{metric: (values [G], means over sets without each text [S])} of G sets of S texts.

    tokens and sentences: G lists of S; embeddings [G, S, D].
    """
    metrics = ngram_diversity(tokens, vocab_size)
    if embeddings is not None:
        metrics["embedding"] = embedding_diversity(embeddings)
    if sentences is not None:
        # All pairs would take too long, so each text meets R others: the same places in every set.
        partner = draw_partners(len(sentences[0]), n_partners, seed)  # [S, R]
        scores = nli_of_pairs(sentences, partner, nli)  # [G, S, R]
        metrics["nli"] = nli_diversity(scores, partner)
    return metrics


def nli_of_pairs(sets: list[list[list[str]]], partner: np.ndarray, nli: Callable) -> np.ndarray:
    """The mean NLI score over the pairs of a text's sentences and its partner's sentences.

    sets: G sets of S texts, each a list of sentences; partner [S, R] -> [G, S, R].
    """
    # All sentence pairs go to the model in one list, so that it can batch them by length.
    sentence_pairs = []
    counts = []  # sentence pairs of each pair of texts
    for texts in sets:
        for premise, partners in zip(texts, partner.tolist()):
            for j in partners:
                hypothesis = texts[j]
                counts.append(len(premise) * len(hypothesis))
                for a in premise:
                    for b in hypothesis:
                        sentence_pairs.append((a, b))

    # The sum of each pair of texts begins where the pairs before it end.
    scores = nli(sentence_pairs).double().numpy()
    counts = np.array(counts)
    starts = counts.cumsum() - counts
    means = np.add.reduceat(scores, starts) / counts
    return means.reshape(len(sets), *partner.shape)


def tokenize(text: str, tokenizer=None) -> list:
    """A text -> its ids, or its words where there is no tokenizer."""
    if tokenizer is None:
        return text.split()
    return tokenizer(text, add_special_tokens=False).input_ids


def join_tokens(tokens: list, tokenizer=None) -> str:
    """What tokenize() returned, or a part of it -> text."""
    if tokenizer is None:
        return " ".join(tokens)
    return tokenizer.decode(tokens)


def cut_texts(tokens: list[list], length: int, tokenizer=None) -> tuple[list[list], list[list]]:
    """Rows of token lists -> the first `length` tokens of each list, and the texts of these."""
    cut_tokens = []
    texts = []
    for row in tokens:
        cut_row = [text[:length] for text in row]
        cut_tokens.append(cut_row)
        texts.append([join_tokens(text, tokenizer) for text in cut_row])
    return cut_tokens, texts


def default_vocab_size(texts: list, tokenizer=None) -> int:
    """The size of the tokenizer's vocabulary, or the number of different words in the texts."""
    if tokenizer is not None:
        return len(tokenizer)
    return max(count_vocabulary(texts), 1)


def flatten(rows: list[list]) -> list:
    """The items of all rows, one row after the other."""
    items = []
    for row in rows:
        items.extend(row)
    return items


def transpose(rows: list[list]) -> list[list]:
    """P rows of K items -> K rows of P."""
    return [list(column) for column in zip(*rows)]


def compare(
    systems: dict[str, list[dict]],
    vocab_size: int = 0,
    tokenizer=None,
    truncate: str = "",
    simulated: Collection[str] = (),
    **arguments,
) -> dict:
    """measure() for {name: rows} at equal set sizes, with one V -> what diversity.json holds.

    arguments: measure's other ones. truncate: "", a number or "median", for a second list in which
    every text is cut to that many tokens. Lengths are matched as far as cutting can, since texts
    that are shorter stay so; they are measured after the cut. simulated: systems whose outputs to a
    prompt come from one pool again and again, so that they are alike for no fault of their own:
    these have no per-input figures. InputError: a single output, too small a vocabulary.
    """
    grouped = {name: group_by_prompt(rows) for name, rows in systems.items()}
    outputs = equal_sets(grouped)  # {name: P rows of K texts}
    P = len(next(iter(outputs.values())))
    K = max(len(rows[0]) for rows in outputs.values())
    require(P * K > 1, "one output to one prompt differs from nothing")

    # n-gram figures depend on the tokenizer and on V, so all systems get the same ones.
    tokens = {}  # {name: the tokens of each of its texts}
    for name, rows in outputs.items():
        tokens[name] = [tokenize(text, tokenizer) for text in flatten(rows)]
    texts_of_all = flatten(list(tokens.values()))
    n_different = count_vocabulary(texts_of_all)
    if not vocab_size:
        vocab_size = default_vocab_size(texts_of_all, tokenizer)
    require(
        vocab_size >= n_different,
        f"--vocab_size {vocab_size}: there are {n_different} different words (or ids) in the "
        "outputs",
    )
    arguments |= {"vocab_size": vocab_size, "tokenizer": tokenizer}

    result = {
        "prompts": P,
        "outputs": K,
        "vocab_size": vocab_size,
        "used": count_used(systems, outputs),
        "systems": measure_each(outputs, simulated, arguments),
    }
    if truncate:
        # n-gram figures fall with length, so the second list compares texts of about one length.
        length = truncated_length(truncate, tokens)
        cut = measure_each(outputs, simulated, arguments | {"truncate": length})
        result["truncated"] = {"length": length, "systems": cut}
    return result


def count_used(
    systems: dict[str, list[dict]], outputs: dict[str, list[list[str]]]
) -> dict[str, str]:
    """How many outputs of each system its equal set holds, of all that it has: "512 of 600"."""
    used = {}
    for name, rows in outputs.items():
        n_used = len(flatten(rows))
        n_given = sum(len(row["responses"]) for row in systems[name])
        used[name] = f"{n_used} of {n_given}"
    return used


def measure_each(
    outputs: dict[str, list], simulated: Collection[str], arguments: dict
) -> dict[str, dict]:
    """measure() of each system, with these arguments, as JSON."""
    systems = {}
    for name, rows in outputs.items():
        measured = measure(rows, per_input=name not in simulated, **arguments)
        systems[name] = {"outputs": len(rows[0])}
        for protocol, spreads in measured.items():
            systems[name][protocol] = None
            if spreads is not None:
                as_dicts = {}
                for metric, spread in spreads.items():
                    as_dicts[metric] = spread._asdict()
                systems[name][protocol] = as_dicts
    return systems


def truncated_length(truncate: str, tokens: dict[str, list[list]]) -> int:
    """--truncate, a number or "median": the smallest of the systems' median lengths."""
    if truncate != "median":
        return int(truncate)
    medians = []
    for texts in tokens.values():
        medians.append(np.median([len(text) for text in texts]))
    return max(int(min(medians)), 1)


# -------------------------------------------------------------------------------------- the script


def compare_files(config, dist):
    """sample_bon.py --from: the files' systems, compared."""
    kind = "a folder of sample_bon.py --from"
    dist.together(lambda: check_output(config.output_dir, is_our_folder, kind))
    check_models(config)
    # The name of a system is the part of its path that tells it from the others.
    names = without_common_ends(set(config.from_files))
    require(len(names) == len(config.from_files), "--from names a file twice")
    dist.on_main(lambda: lock(config.output_dir))
    # Only --best_of needs scores: without it files may have none.
    systems = {}
    for path in config.from_files:
        systems[names[path]] = read_outputs(path, config.columns, config.best_of > 0)
    return dist.on_main(lambda: report(config, dist, systems))


def is_our_folder(path: str) -> bool:
    """Whether a folder is empty, or holds the results of sample_bon.py --from.

    Those of a run with --diversity are that run's: their from_files is empty.
    """
    if not os.path.isdir(path):
        return False
    names = set(os.listdir(path)) - {FILE + ".tmp", LOCK_FILE}  # which a kill may leave behind
    if FILE not in names:
        return not names
    stored = read_json(os.path.join(path, FILE))
    if not isinstance(stored, dict):
        return False
    return bool(stored.get("from_files")) and "systems" in stored


def report(config, dist, systems: dict[str, list[dict]]) -> dict:
    """Measure {name: rows}, write OUTPUT_DIR/diversity.json and print the tables."""
    # Each simulated best-of-n is a further system, beside the pool that it is drawn from.
    simulated = {}
    if config.best_of:
        for name, rows in systems.items():
            simulated[f"{name}, best of {config.best_of}"] = best_of(
                rows, config.best_of, config.objective, config.uwo_lambda[0], config.seed
            )

    tokenizer = None
    if config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer, needs_eos=False)
    encode = None
    if config.encoder:
        encode = sentence_encoder(config.encoder, dist.device)
    nli = None
    if config.nli_model:
        nli = nli_scorer(config.nli_model, dist.device)
    result = compare(
        systems | simulated,
        config.vocab_size,
        tokenizer,
        config.truncate,
        simulated=set(simulated),
        encode=encode,
        nli=nli,
        n_sentences=config.nli_sentences,
        n_partners=config.nli_partners,
        seed=config.seed,
    )

    # Figures can be compared only where these settings are the same, so the file holds them.
    settings = {flag.name: getattr(config, flag.name) for flag in fields(Flags)}
    settings["seed"] = config.seed
    os.makedirs(config.output_dir, exist_ok=True)
    path = os.path.join(config.output_dir, FILE)
    write_json(path, {**settings, **result})
    dist.print(format_table(result, config.tokenizer), f"Written to {path}")
    return result


def format_table(result: dict, tokenizer: str = "") -> str:
    """What compare() found, as readable text."""
    unit = "words"
    if tokenizer:
        unit = f"ids of {tokenizer}"
    P = result["prompts"]
    K = result["outputs"]
    lines = [
        f"\nDiversity of {P} prompts x {K} outputs: n-grams and lengths in {unit}, "
        f"V = {result['vocab_size']}; means and 95% intervals over prompts"
    ]
    used = [f"{name}: {count}" for name, count in result["used"].items()]
    lines.append("outputs used: " + "; ".join(used))

    per_input = f"per input, the {K} outputs to one prompt"
    across_input = f"across inputs, one output to each of {P} prompts"
    lines += lines_of_protocol("per_input", per_input, result["systems"])
    lines += lines_of_protocol("across_input", across_input, result["systems"])
    if "truncated" in result:
        cut = f", of the first {result['truncated']['length']} {unit} of each output"
        systems = result["truncated"]["systems"]
        lines += lines_of_protocol("per_input", per_input + cut, systems)
        lines += lines_of_protocol("across_input", across_input + cut, systems)
    return "\n".join(line.rstrip() for line in lines)


def lines_of_protocol(protocol: str, title: str, systems: dict[str, dict]) -> list[str]:
    """A title, a header and a line for each system that the protocol could measure, if any."""
    # A system with one output to a prompt has no figures per input, nor has a simulated one.
    rows = {}
    for name, system in systems.items():
        if system[protocol]:
            rows[name] = system[protocol]
    if not rows:
        return []

    first_row = next(iter(rows.values()))
    metrics = [name for name in TITLES if name in first_row]
    width = max(len(name) for name in rows) + 2
    header = " " * (width + 2)
    for metric in metrics:
        header += f"{TITLES[metric]:26s}"

    lines = [title, header]
    for name, row in rows.items():
        line = f"  {name:{width}s}"
        for metric in metrics:
            line += f"{format_spread(row[metric]):26s}"
        lines.append(line)
    return lines


def format_spread(spread: dict) -> str:
    """'0.123 [0.100, 0.150]'; the mean alone where there is no interval."""
    mean = f"{spread['mean']:.3f}"
    if spread["interval"] is None:
        return mean
    low, high = spread["interval"]
    return f"{mean} [{low:.3f}, {high:.3f}]"

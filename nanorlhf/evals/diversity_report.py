"""How diverse the outputs of one or several systems are: sets of equal size, one vocabulary, lengths beside every figure.

    P prompts, K outputs to each; G sets of S texts, R partners of a text

measure() is the plain call, for outputs that are at hand; report() is what sample_bon.py prints and writes into diversity.json.
"""

import os
from dataclasses import dataclass, fields

import numpy as np
import torch
from transformers.hf_argparser import HfArg

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
from ..runtime.files import check_output, read_file, read_json, write_json
from ..runtime.flags import FlagGroup
from ..runtime.locks import LOCK_FILE, lock_folder
from ..runtime.plots import without_common_ends
from .encoders import check_nli, nli_scorer, sentence_encoder

FILE = "diversity.json"
SHOWN = {"length": "length", "distinct": "distinct-n", "ead": "EAD", "embedding": "embeddings", "nli": "NLI"}  # of the metrics, in tables


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
        good = self.truncate in ("", "median") or self.truncate.isdecimal() and int(self.truncate) > 0
        require(good, f"--truncate takes a number of tokens or median, not {self.truncate!r}")
        own = [f.name for f in fields(Flags)[2:] if getattr(self, f.name) != f.default]
        require(self.diversity or self.from_files or not own, f"--{(own or [''])[0]} is about diversity: it needs --diversity or --from")


def check_models(config):
    """InputErrors of the models that are named, before anything is loaded."""
    if config.encoder:
        check_model(config.encoder)
    if config.nli_model:
        check_nli(config.nli_model)
    if config.tokenizer:
        load_tokenizer(config.tokenizer, needs_eos=False)


# ------------------------------------------------------------------------------------------------------------------------- reading


def read_outputs(path, columns=(), scores=False):
    """A JSONL file -> rows {prompt, responses: [K][, scores: {name: [K]}]}, one a prompt, in the order in which prompts come.

    Its rows hold one answer, {prompt, response[, scores: {name: x}]}, as best_of_{n}.jsonl and a PPO run's eval/step_{N}.jsonl do, or
    several, {prompt, responses: [K][, scores: {name: [K]}]}; answers to one prompt come together. columns: FIELD=COLUMN renamings.
    """
    names = dict(column.split("=", 1) for column in columns)
    prompt, one, many = (names.get(name, name) for name in ("prompt", "response", "responses"))
    rows = []
    for place, row in read_file(path):
        require(isinstance(row, dict), f"{place}: a row must be an object with {prompt} and {one} or {many}")
        require(isinstance(row.get(prompt), str), f"{place}: field {prompt!r} must be a string")
        texts = row[many] if many in row else [row.get(one)]
        good = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
        wanted = f"field {many!r} must be a list of at least one string" if many in row else f"field {one!r} must be a string"
        require(good, f"{place}: {wanted}")
        rows.append({"prompt": row[prompt], "responses": texts})
        if scores:
            rows[-1]["scores"] = scores_of(row, len(texts), many in row, place)
    return rows


def scores_of(row, n, several, place):
    """{name: [n]} of a row's scores; an InputError where there are none."""
    scores = row.get("scores")
    require(isinstance(scores, dict) and scores, f"{place}: --best_of needs the field 'scores', an object {{reward: score}}")
    scores = scores if several else {name: [score] for name, score in scores.items()}
    for name, values in scores.items():
        good = isinstance(values, list) and len(values) == n and all(type(x) in (int, float) and abs(x) < 1e300 for x in values)
        require(good, f"{place}: scores of {name!r} must be finite numbers, one for each answer")
    return scores


def grouped(rows):
    """Rows of one prompt become one row: {prompt: {prompt, responses, scores}}."""
    out = {}
    for row in rows:
        whole = out.setdefault(row["prompt"], {"prompt": row["prompt"], "responses": [], "scores": {}})
        whole["responses"] = whole["responses"] + row["responses"]
        for name, values in row.get("scores", {}).items():
            whole["scores"][name] = whole["scores"].get(name, []) + values
    return out


def best_of(rows, n, objective, uwo_lambda, seed):
    """Rows with scores -> rows of simulated best-of-n outputs, by the scores' mean, WCO or UWO (ensemble.combine)."""
    rows = list(grouped(rows).values())
    names, N = list(rows[0]["scores"]), min(len(row["responses"]) for row in rows)
    for row in rows:
        complete = all(len(row["scores"].get(name, ())) == len(row["responses"]) for name in names)
        require(complete, f"--best_of: not all answers to {row['prompt'][:40]!r} have scores of {', '.join(names)}")
    require(n < N, f"--best_of {n} needs more than {n} answers to every prompt, and one has {N}")
    scores = torch.tensor([[row["scores"][name][:N] for row in rows] for name in names], dtype=torch.float64)  # [members, P, N]
    chosen = simulated_best_of_n(combine(scores, objective, uwo_lambda), n, seed=seed)  # [P, repeats]
    return [{"prompt": row["prompt"], "responses": [row["responses"][j] for j in places]} for row, places in zip(rows, chosen)]


def equal_sets(systems):
    """{name: {prompt: row}} -> {name: texts, P rows of K}: the prompts that all systems have, and of each the first K outputs.

    K is the smallest number of outputs to a prompt. Systems with a single output to some prompt have K = 1 and do not cut the others'.
    Systems without a common prompt (in and out of distribution, say) are compared on their first P ones.
    """
    shared = [p for p in next(iter(systems.values())) if all(p in rows for rows in systems.values())]
    P = min(map(len, systems.values()))
    rows = {name: [rows[p] for p in shared] or list(rows.values())[:P] for name, rows in systems.items()}
    least = {name: min(len(row["responses"]) for row in part) for name, part in rows.items()}
    K = min((k for k in least.values() if k > 1), default=1)
    return {name: [row["responses"][: K if least[name] > 1 else 1] for row in part] for name, part in rows.items()}


# ----------------------------------------------------------------------------------------------------------------------- measuring


def measure(outputs, vocab_size=None, tokenizer=None, truncate=0, encode=None, nli=None, n_sentences=1, n_partners=15, seed=0,
            per_input=True):
    """All metrics of P x K outputs: {"per_input": {metric: Spread(mean, std, interval)}, "across_input": {...}}.

    outputs: P rows of K strings. vocab_size: V of EAD, by default the tokenizer's or the number of different words. truncate: count
    only the first so many tokens of each text. encode, nli: encoders.sentence_encoder(...), encoders.nli_scorer(...).
    Metrics: length (tokens), distinct and ead (means over n = 1 .. 5), distinct_1 ..., ead_1 ..., embedding, nli.
    per_input is None for K = 1 (and on request), across_input for P = 1. An empty output has no n-grams; to the other metrics it is a
    text like any other.
    ValueError: rows of unequal size. Pitfall: a figure means nothing but beside another with the same P, K, V and similar length.
    """
    counts = sorted({len(row) for row in outputs})
    if len(counts) != 1 or not counts[0]:
        raise ValueError(f"rows of {counts} outputs: they must be equally many, and not none")
    P, K = len(outputs), counts[0]
    cut, join = tokenising(tokenizer)
    tokens = [[cut(text) for text in row] for row in outputs]
    vocab_size = vocab_size or (len(tokenizer) if tokenizer else max(count_vocabulary([text for row in tokens for text in row]), 1))
    if truncate:
        tokens = [[text[:truncate] for text in row] for row in tokens]
        outputs = [[join(text) for text in row] for row in tokens]
    embeddings = encode([text for row in outputs for text in row]).view(P, K, -1) if encode else None  # [P, K, D]
    parts = [[split_sentences(text, n_sentences, seed) for text in row] for row in outputs] if nli else None

    def metrics(across):
        """{metric: (values [G], without each text [S])} of the sets of one protocol."""
        found = ngram_diversity(transposed(tokens) if across else tokens, vocab_size)
        if encode:
            found["embedding"] = embedding_diversity(embeddings.transpose(0, 1) if across else embeddings)
        if nli:
            partner = draw_partners(P if across else K, n_partners, seed)
            found["nli"] = nli_diversity(nli_of_pairs(transposed(parts) if across else parts, partner, nli), partner)
        return found

    return {
        "per_input": {name: spread_over_inputs(values) for name, (values, _) in metrics(False).items()} if K > 1 and per_input else None,
        "across_input": {name: spread_across_inputs(*both) for name, both in metrics(True).items()} if P > 1 else None,
    }


def transposed(rows):
    return [list(column) for column in zip(*rows)]


def tokenising(tokenizer):
    """text -> tokens, tokens -> text"""
    if tokenizer is None:
        return str.split, " ".join
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids, tokenizer.decode


def nli_of_pairs(sets, partner, nli):
    """G sets of S texts, each a list of sentences -> [G, S, R], the mean NLI score over the sentence pairs of a text and its partner."""
    pairs = [(texts[i], texts[j]) for texts in sets for i, others in enumerate(partner.tolist()) for j in others]
    scores = nli([(a, b) for premise, hypothesis in pairs for a in premise for b in hypothesis]).double().numpy()
    counts = np.array([len(premise) * len(hypothesis) for premise, hypothesis in pairs])
    return (np.add.reduceat(scores, counts.cumsum() - counts) / counts).reshape(len(sets), *partner.shape)


def compare(systems, vocab_size=0, tokenizer=None, truncate="", simulated=(), **how):
    """measure() for {name: rows} at equal set sizes, with one V -> what diversity.json holds. how: measure's other arguments.

    truncate: "", a number or "median", for a second list in which every text is cut to that many tokens: lengths are matched as far as
    cutting can, since texts that are shorter stay so. Their lengths are measured after the cut. simulated: systems whose outputs to a
    prompt come from one pool again and again, so that they are alike for no fault of their own: these have no per-input figures.
    """
    given = {name: sum(len(row["responses"]) for row in rows) for name, rows in systems.items()}
    outputs = equal_sets({name: grouped(rows) for name, rows in systems.items()})
    P, K = len(next(iter(outputs.values()))), max(len(rows[0]) for rows in outputs.values())
    require(P * K > 1, "one output to one prompt differs from nothing")
    cut, _ = tokenising(tokenizer)
    tokens = {name: [cut(text) for row in rows for text in row] for name, rows in outputs.items()}
    different = max(count_vocabulary([text for texts in tokens.values() for text in texts]), 1)
    V = vocab_size or (len(tokenizer) if tokenizer else different)
    require(V >= different, f"--vocab_size {V}: there are {different} different words (or ids) in the outputs")

    def each(length=0):
        how_each = dict(how, vocab_size=V, tokenizer=tokenizer, truncate=length)
        measured = {name: measure(rows, per_input=name not in simulated, **how_each) for name, rows in outputs.items()}
        return {name: {"outputs": len(outputs[name][0]), **as_json(found)} for name, found in measured.items()}

    used = {name: f"{P * len(rows[0])} of {given[name]}" for name, rows in outputs.items()}
    result = {"prompts": P, "outputs": K, "vocab_size": V, "used": used, "systems": each()}
    if truncate:
        shortest = min(np.median([len(text) for text in texts]) for texts in tokens.values())
        length = max(int(shortest), 1) if truncate == "median" else int(truncate)
        result["truncated"] = {"length": length, "systems": each(length)}
    return result


def as_json(measured):
    return {protocol: {k: v._asdict() for k, v in part.items()} if part else None for protocol, part in measured.items()}


# ------------------------------------------------------------------------------------------------------------------------- the script


def from_files(config, dist):
    """sample_bon.py --from: the files' systems, compared."""
    kind = "a folder of sample_bon.py --from"
    dist.together(lambda: check_output(config.output_dir, is_our_folder, kind))
    check_models(config)
    names = without_common_ends(set(config.from_files))
    require(len(names) == len(config.from_files), "--from names a file twice")
    lock_folder(config.output_dir, dist)
    systems = {names[path]: read_outputs(path, config.columns, scores=config.best_of > 0) for path in config.from_files}
    return dist.together(lambda: report(config, dist, systems) if dist.main else None)


def is_our_folder(path):
    """Whether a folder is empty, or holds the results of sample_bon.py --from.

    Those of a run with --diversity are that run's: their from_files is empty.
    """
    if not os.path.isdir(path):
        return False
    names = set(os.listdir(path)) - {FILE + ".tmp", LOCK_FILE}  # which a kill may leave behind
    if FILE not in names:
        return not names
    stored = read_json(os.path.join(path, FILE))
    return isinstance(stored, dict) and bool(stored.get("from_files")) and "systems" in stored


def report(config, dist, systems):
    """Measure {name: rows}, write OUTPUT_DIR/diversity.json and print the tables."""
    simulated = {}
    if config.best_of:
        how = (config.best_of, config.objective, config.uwo_lambda[0], config.seed)
        simulated = {f"{name}, best of {config.best_of}": best_of(rows, *how) for name, rows in systems.items()}
    result = compare(
        systems | simulated, config.vocab_size, load_tokenizer(config.tokenizer, needs_eos=False) if config.tokenizer else None,
        config.truncate, simulated=set(simulated),
        encode=sentence_encoder(config.encoder, dist.device) if config.encoder else None,
        nli=nli_scorer(config.nli_model, dist.device) if config.nli_model else None,
        n_sentences=config.nli_sentences, n_partners=config.nli_partners, seed=config.seed,
    )  # fmt: skip
    settings = {f.name: getattr(config, f.name) for f in fields(Flags)} | {"seed": config.seed}
    os.makedirs(config.output_dir, exist_ok=True)
    path = os.path.join(config.output_dir, FILE)
    write_json(path, {**settings, **result})
    dist.print(table(result, config.tokenizer), f"Written to {path}")
    return result


def table(result, tokenizer=""):
    """What compare() found, as readable text."""
    unit = f"ids of {tokenizer}" if tokenizer else "words"
    P, K, V = (result[name] for name in ("prompts", "outputs", "vocab_size"))
    lines = [f"\nDiversity of {P} prompts x {K} outputs: n-grams and lengths in {unit}, V = {V}; means and 95% intervals over prompts"]
    lines.append("outputs used: " + "; ".join(f"{name}: {used}" for name, used in result["used"].items()))
    truncated = result.get("truncated", {"systems": {}})
    parts = {"": result["systems"], f", of the first {truncated.get('length')} {unit} of each output": truncated["systems"]}
    titles = {"per_input": f"per input, the {K} outputs to one prompt", "across_input": f"across inputs, one output to each of {P} prompts"}
    for end, systems in parts.items():
        for protocol, title in titles.items():
            rows = {name: system[protocol] for name, system in systems.items() if system[protocol]}
            if rows:
                shown = [name for name in SHOWN if name in next(iter(rows.values()))]
                width = max(map(len, rows)) + 2
                lines += [f"{title}{end}", " " * (width + 2) + "".join(f"{SHOWN[name]:26s}" for name in shown)]
                lines += [f"  {name:{width}s}" + "".join(f"{in_words(row[metric]):26s}" for metric in shown) for name, row in rows.items()]
    return "\n".join(line.rstrip() for line in lines)


def in_words(spread):
    interval = "" if spread["interval"] is None else " [{:.3f}, {:.3f}]".format(*spread["interval"])
    return f"{spread['mean']:.3f}{interval}"

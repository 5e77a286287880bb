r"""Best-of-n: sample N answers to each prompt, score them, and estimate without
bias what the best of n <= N is worth.

    the embedded world; trains what is missing:
        python sample_bon.py
    every member and every ensemble objective:
        python sample_bon.py --reward_model runs/rm/seed_{seed} --n_answers 512
    the best of 16, as a data set:
        python sample_bon.py --n 16 --save_best --split ood \
            --output_dir runs/best
    in and out of distribution, runs/best/test and runs/best/ood:
        python sample_bon.py --eval_splits test ood --output_dir runs/best
    answers that are there already:
        python sample_bon.py --pool pool.jsonl --reward_model runs/rm/seed_0
    how diverse the answers are, and the best of 16 of them:
        python sample_bon.py --diversity --best_of 16
    the diversity of answers in files, nothing else:
        python sample_bon.py --from a.jsonl b.jsonl --encoder FOLDER
    the same answers and scores on four processes:
        torchrun --nproc_per_node=4 -- sample_bon.py --n 16

Method: nanorlhf/bon.py, ensemble.py and diversity.py. A second call with
another --n or --uwo_lambda scores nothing again. The -- keeps torchrun from
taking --n for a flag of its own.

    K members, P prompts, N answers to a prompt, L values of n
"""

import os
from dataclasses import dataclass, fields, replace

import torch
from transformers.hf_argparser import HfArg

from nanorlhf import data, pool
from nanorlhf.bon import DEFAULT_NS, bon_estimate, bon_kl, fit_bon
from nanorlhf.ensemble import OBJECTIVES, combine, combine_all, objective_of
from nanorlhf.errors import at_least, require
from nanorlhf.evals import diversity_report
from nanorlhf.models import check_model, load_tokenizer
from nanorlhf.rewards import expand, reward_names
from nanorlhf.rollout import SamplingFlags
from nanorlhf.runtime import cli
from nanorlhf.runtime.distributed import setup
from nanorlhf.runtime.files import check_name, write_json, write_lines
from nanorlhf.runtime.flags import ResultFlags, SplitFlags, TextFlags
from nanorlhf.runtime.locks import unlock_afterwards
from nanorlhf.runtime.log import PLACES, RunFolder
from nanorlhf.runtime.plots import plot_run
from nanorlhf.splits import labels, load_splits
from nanorlhf.stages import check_inputs, train_what_is_missing
from nanorlhf.stats import bootstrap

# These may change between calls on one folder: they only read the answers, and scores are cached by their reward.
FREE = (*PLACES, "reward_model", "gold_model", "n", "uwo_lambda", "objective", "save_best", "save_pairs", "batch_size", "micro_batch_size",
        *(f.name for f in fields(diversity_report.Flags)))  # fmt: skip


@dataclass
class Config(SamplingFlags, diversity_report.Flags, TextFlags, SplitFlags, ResultFlags):
    """Best-of-n: whose answers are scored by what, and which of them are kept"""

    model: str = HfArg(
        default="runs/sft", help="the policy: a run folder, a model folder or a hub name"
    )
    reward_model: list[str] = HfArg(
        default_factory=lambda: ["runs/rm/seed_0"],
        help="the rewards that choose: see train_ppo.py --help",
    )
    gold_model: str = HfArg(
        default="",
        help="the gold reward, which says what the chosen are worth; in the embedded world its "
        "own, else the pool's gold_scores, if it has them",
    )
    split: str = HfArg(
        default="test",
        metadata={"choices": ("test", "train", "ood", "all")},
        help="which prompts: test (held out), train, ood (of the embedded world, or what does not "
        "fit --in_distribution) or all",
    )
    n_answers: int = HfArg(default=256, help="N: how many answers to sample to each prompt")
    n: list[int] = HfArg(
        default_factory=list, help="each n of best-of-n; by default 1, 2, 4, ... up to N"
    )
    objective: str = HfArg(
        default="mean",
        metadata={"choices": OBJECTIVES},
        help="how --save_best makes one score of several rewards: see train_ppo.py --help",
    )
    uwo_lambda: list[float] = HfArg(
        default_factory=lambda: [0.5], help="uwo: each weight of the variance between rewards"
    )
    save_best: bool = HfArg(
        default=False,
        help="write best_of_{n}.jsonl: the best of each n answers in turn (n = 1: all)",
    )
    save_pairs: bool = HfArg(
        default=False, help="write pairs.jsonl: of each two answers, which has more gold"
    )
    pool: str = HfArg(
        default="",
        help="sample nothing, read answers: JSONL {prompt, responses, gold_scores}, or a data set",
    )
    batch_size: int = HfArg(
        default=256,
        help="answers that are sampled at once, over all processes; it changes memory, not results",
    )
    micro_batch_size: int = HfArg(
        default=64,
        help="answers that are scored in one forward pass; it changes memory, not results",
    )
    seed: int = HfArg(default=0, help="the number that every random draw depends on")

    output_dir: str = HfArg(default="runs/bon", help="the folder that the results are written to")
    max_rows: int = HfArg(
        default=0, help="at most so many prompts of a split other than test; 0: all"
    )
    in_distribution: str = HfArg(
        default="",
        help="the rule that rows of --split test and train fit, and those of ood do not: see "
        "train_ppo.py --help",
    )
    eval_size: int = HfArg(default=256, help="at most so many held-out prompts")
    eval_splits: list[str] = HfArg(
        default_factory=list,
        help="instead of --split: test, ood, NAME=[FORMAT:]FILE, --eval_size prompts of each. "
        "Several are runs in folders of their own, OUTPUT_DIR/NAME",
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "n_answers", "batch_size", "micro_batch_size")
        at_least(self, 0, "seed")
        require(all(n >= 1 for n in self.n), "--n must be at least 1")
        require(self.pool or all(n <= self.n_answers for n in self.n), f"--n must not be above --n_answers ({self.n_answers})")
        require(self.uwo_lambda and all(x >= 0 for x in self.uwo_lambda), "--uwo_lambda takes numbers of at least 0")
        there = self.pool or self.from_files
        require(there or self.best_of < self.n_answers, f"--best_of must be below --n_answers ({self.n_answers})")
        require(not self.save_best or len(self.n) == 1, "--save_best takes one --n")
        labels(self.eval_splits)
        alone = self.split == "test" and not (self.pool or self.from_files)
        why = "--eval_splits takes the place of --split, and needs answers to sample: no --pool, no --from"
        require(alone or not self.eval_splits, why)
        in_world, own = data.is_world(self.dataset), self.in_distribution or self.prompt_format
        require(not (in_world and own), "--in_distribution and --prompt_format are for data of one's own: name it with --dataset")
        require(self.split != "ood" or in_world or self.in_distribution,
                    "--split ood is the embedded world's; of other data it needs --in_distribution")  # fmt: skip
        if data.is_world(self.dataset) and not self.pool and not self.gold_model:
            self.gold_model = "world:gold"
        if self.from_files:
            require(not (self.pool or self.diversity), "--from measures files alone: it takes no --pool and no --diversity")
            self.output_dir = "runs/diversity" if self.output_dir == "runs/bon" else self.output_dir
        self.reward_model = expand(self.reward_model)
        for name in reward_names(self.reward_model):
            free = objective_of(name) is None
            require(free, f"a reward cannot be called {name}: that is an objective's name in the results")


@unlock_afterwards()
def main(config):
    """Best of n on one split, or on each of several. -> its results, or {split: results}"""
    # ------------------------------------------------------------------------------------------------------------------- set-up
    dist = setup(config.device)
    check_name(config.output_dir)
    if config.from_files:
        return diversity_report.from_files(config, dist)
    diversity_report.check_models(config)
    if len(config.eval_splits) > 1:
        note = load_splits(config, "prompts")[2]  # a split that is not there is an error before anything is sampled
        dist.print(note)
        named = {item.partition("=")[0]: item for item in config.eval_splits}
        return {name: main(replace(config, eval_splits=[item], output_dir=f"{config.output_dir}/{name}")) for name, item in named.items()}
    folder = RunFolder(config, dist, FREE, written_again=True)
    check_inputs(config, "reward_model", "gold_model", *([] if config.pool else ["model"]))

    # ------------------------------------------------------------------------------------------------------------------ answers
    if config.pool:
        rows, tokenizer = pool.read(config.pool), None  # only the texts are known
    else:
        rows, note = prompts_of(config)
        dist.print(note)
        train_what_is_missing(config, "model", "reward_model")
        tokenizer = load_tokenizer(config.model)
        limits = (check_model(config.model), config.max_new_tokens, config.max_prompt_length, config.chat_template)
        prompts = data.ready_prompts(tokenizer, rows, *limits)
    if dist.main:
        os.makedirs(config.output_dir, exist_ok=True)
        write_json(os.path.join(config.output_dir, "config.json"), folder.config)
    if not config.pool:
        rows = pool.sample(config, tokenizer, prompts, dist)
    counts = [len(row["responses"]) for row in rows]
    N = min(counts)
    ns = sorted(set(config.n)) or [n for n in DEFAULT_NS if n <= N]
    require(ns[-1] <= N, f"--n {ns[-1]}: the prompt {rows[counts.index(N)]['prompt'][:40]!r} has only {N} answers")
    has_gold = bool(config.gold_model) or "gold_scores" in rows[0]
    require(has_gold or not config.save_pairs, "--save_pairs needs gold scores: name --gold_model")
    dist.print(f"{len(rows)} prompts, {N if N == max(counts) else f'{N} to {max(counts)}'} answers each")

    # ------------------------------------------------------------------------------------------------------------------- scores
    scores = pool.score(rows, config.reward_model, tokenizer, config, dist)  # {name: P lists of N}
    if config.gold_model:
        (gold,) = pool.score(rows, [config.gold_model], tokenizer, config, dist).values()
    else:
        gold = [row["gold_scores"] for row in rows] if has_gold else None
    if not dist.main:
        return dist.barrier()  # what is left is arithmetic

    # Answer, proxies and gold stay in one place: [p, j] of every matrix is answer j to prompt p.
    members = torch.stack([pool.matrix(member)[0] for member in scores.values()])  # [K, P, N]
    values, mask = pool.matrix(gold or next(iter(scores.values())))  # [P, N]
    mask = None if mask.all() else mask  # answers may differ in number
    proxies = dict(zip(scores, members))
    if len(members) > 1:
        proxies |= combine_all(members, config.uwo_lambda)

    # ---------------------------------------------------------------------------------------------------------------- best of n
    results, fits = {}, {}
    for name, proxy in proxies.items():
        proxy_curve = bon_estimate(proxy, proxy, ns, mask, per_prompt=True)  # [P, L]
        gold_curve = bon_estimate(proxy, values, ns, mask, per_prompt=True) if gold else None
        results[name] = curve(ns, proxy_curve, gold_curve)
        if gold and ns[0] == 1 and len(ns) > 2 and len(rows) > 1:
            fits[name] = fit_bon(torch.tensor([bon_kl(n) for n in ns]), gold_curve)._asdict()

    # --------------------------------------------------------------------------------------------------------------------- save
    def out(name):
        return os.path.join(config.output_dir, name)

    write_json(out("bon_results.json"), results)
    write_lines(out("pool.jsonl"), joined(rows, scores, gold))
    if config.save_best:
        best = combine(members, config.objective, config.uwo_lambda[0])  # [P, N]
        split = None if config.pool else config.eval_splits[0].partition("=")[0] if config.eval_splits else config.split
        chosen = [best_of(row, proxy, config.n[0], split) for row, proxy in zip(joined(rows, scores, gold), best)]
        write_lines(out(f"best_of_{config.n[0]}.jsonl"), [row for part in chosen for row in part])
    if config.save_pairs:
        pairs = [pair for row in joined(rows, scores, gold) for pair in pairs_of(row)]
        write_lines(out("pairs.jsonl"), pairs)
        dist.print(f"{len(pairs)} pairs, {sum(n // 2 for n in counts) - len(pairs)} ties in gold left out")
    picture = plot_run(config.output_dir)
    dist.print(table(results, gold), f"Written to {config.output_dir}: bon_results.json, pool.jsonl{', ' + picture if picture else ''}")
    if config.diversity:
        diversity_report.report(config, dist, {"answers": list(joined(rows, scores, gold))})
    summary = {"prompts": len(rows), "answers": N, "fits": fits}
    write_json(out("summary.json"), summary)
    dist.barrier()
    return results


def prompts_of(config):
    """The rows of the chosen split, and a sentence on them."""
    in_world = data.is_world(config.dataset)
    if config.eval_splits or config.split in ("train", "test") or (config.split == "ood" and not in_world):
        wanted = config.eval_splits or ["ood" if config.split == "ood" else "test"]
        train, held_out, note = load_splits(replace(config, eval_splits=wanted, split="test"), "prompts")
        return (train if config.split == "train" else held_out["eval"]), note
    splits = ("train", "test", "ood") if config.split == "all" and in_world else (config.split,)
    rows = [row for split in splits for row in data.read_rows(config.dataset, "prompts", config.columns, split, config.prompt_format)]
    return data.subset(rows, config.max_rows), f"{len(rows)} prompts rows in {config.split}"


def curve(ns, proxy, gold):
    """Estimates for each prompt [P, L] -> [{n, kl, proxy_score, proxy_se, proxy_interval, gold_score, ...}], one for each n."""
    columns = {"n": ns, "kl": [bon_kl(n) for n in ns]}
    for name, values in (("proxy", proxy), ("gold", gold)):
        if values is None:
            columns |= {f"{name}_{what}": [None] * len(ns) for what in ("score", "se", "interval")}
            continue
        se = values.std(0) / len(values) ** 0.5 if len(values) > 1 else torch.zeros(len(ns))
        columns |= {f"{name}_score": values.mean(0).tolist(), f"{name}_se": se.tolist()}  # over prompts
        columns[f"{name}_interval"] = torch.stack(bootstrap(values), 1).tolist()  # 95%, over prompts
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def joined(rows, scores, gold):
    """The scored pool: {prompt, responses: [N], scores: {name: [N]}, gold_scores: [N]}."""
    for p, row in enumerate(rows):
        own = {name: part[p] for name, part in scores.items()}
        yield {"prompt": row["prompt"], "responses": row["responses"], "scores": own, **({"gold_scores": gold[p]} if gold else {})}


def best_of(row, proxy, n, split=None):
    """The best of each n answers in turn by proxy [N]: rows {prompt, response, scores, gold, split, sample}, sample the answer's place
    in the pool. A last group of fewer is left out. n = 1: every answer."""
    groups = proxy[: len(row["responses"]) // n * n].view(-1, n)
    out = []
    for j in (groups.argmax(1) + torch.arange(len(groups)) * n).tolist():
        scores, gold = {name: part[j] for name, part in row["scores"].items()}, row.get("gold_scores")
        out.append({"prompt": row["prompt"], "response": row["responses"][j], "scores": scores, "gold": gold[j] if gold else None,
                    "split": split, "sample": j})  # fmt: skip
    return out


def pairs_of(row):
    """Answers 0 and 1, 2 and 3, ... as preferences of gold: {prompt, chosen, rejected}; ties are left out."""
    gold, responses = row["gold_scores"], row["responses"]
    for j in range(0, len(responses) - 1, 2):
        if gold[j] != gold[j + 1]:
            better = j if gold[j] > gold[j + 1] else j + 1
            yield {"prompt": row["prompt"], "chosen": responses[better], "rejected": responses[2 * j + 1 - better]}


def table(results, gold):
    """Proxy and gold against n, as readable text."""
    lines = ["\nExpected score of the best of n, mean over prompts +- standard error:"]
    for what in ("proxy", "gold") if gold else ("proxy",):
        for name, points in results.items():
            shown = [p for p in points if p["n"] in (1, 4, 16, 64, 256, 1024, 4096, points[-1]["n"])]
            text = "  ".join(f"n {p['n']}: {p[what + '_score']:.2f} +- {p[what + '_se']:.2f}" for p in shown)
            lines.append(f"  {what:5s} {name:8s} {text}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(Config, main)

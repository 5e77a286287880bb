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
from nanorlhf.chat_templates import leave_out_control_tokens
from nanorlhf.ensemble import OBJECTIVES, combine, combine_all, objective_of
from nanorlhf.errors import at_least, require
from nanorlhf.evals import diversity_report
from nanorlhf.hf.folders import check_model
from nanorlhf.models import load_tokenizer
from nanorlhf.rewards import expand, reward_names
from nanorlhf.rollout import SamplingFlags
from nanorlhf.runtime import cli
from nanorlhf.runtime.distributed import setup
from nanorlhf.runtime.files import check_name, write_json, write_lines
from nanorlhf.runtime.flags import (
    FORWARD_HELP,
    SEED_HELP,
    ResultFlags,
    SplitFlags,
    TextFlags,
    results_in,
)
from nanorlhf.runtime.locks import unlock_afterwards
from nanorlhf.runtime.log import RunFolder
from nanorlhf.runtime.plots import plot_run
from nanorlhf.runtime.settings import PLACES
from nanorlhf.show.page import write_page
from nanorlhf.splits import load_splits, read_eval_splits
from nanorlhf.stages import check_inputs, train_what_is_missing
from nanorlhf.stats import bootstrap
from nanorlhf.tokens import ready_prompts

# These may change between calls on one folder: they only read the answers, which stay, and scores
# are cached by their reward.
FREE = [*PLACES, "reward_model", "gold_model", "n", "uwo_lambda", "objective"]
FREE += ["save_best", "save_pairs", "batch_size", "micro_batch_size"]
FREE += [flag.name for flag in fields(diversity_report.Flags)]


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
    micro_batch_size: int = HfArg(default=64, help=FORWARD_HELP)
    seed: int = HfArg(default=0, help=SEED_HELP)

    output_dir: str = results_in("runs/bon")
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
        require(
            self.pool or all(n <= self.n_answers for n in self.n),
            f"--n must not be above --n_answers ({self.n_answers})",
        )
        require(
            self.uwo_lambda and all(x >= 0 for x in self.uwo_lambda),
            "--uwo_lambda takes numbers of at least 0",
        )
        require(not self.save_best or len(self.n) == 1, "--save_best takes one --n")
        check_sources(self)
        # The world's gold is known. For other data the user must name one.
        if data.is_world(self.dataset) and not self.pool and not self.gold_model:
            self.gold_model = "world:gold"
        # --from measures files without a policy or reward; its results have a folder of their own.
        if self.from_files and self.output_dir == "runs/bon":
            self.output_dir = "runs/diversity"
        # Rewards and objectives stand side by side in the results, so their names must differ.
        self.reward_model = expand(self.reward_model)
        for name in reward_names(self.reward_model):
            free = objective_of(name) is None
            require(
                free,
                f"a reward cannot be called {name}: that is an objective's name in the results",
            )


def check_sources(config):
    """InputError where flags contradict each other that say where prompts and answers come from."""
    samples = not (config.pool or config.from_files)
    require(
        not samples or config.best_of < config.n_answers,
        f"--best_of must be below --n_answers ({config.n_answers})",
    )
    require(
        not config.from_files or not (config.pool or config.diversity),
        "--from measures files alone: it takes no --pool and no --diversity",
    )
    read_eval_splits(config.eval_splits)
    require(
        not config.eval_splits or (samples and config.split == "test"),
        "--eval_splits takes the place of --split, and needs answers to sample: no --pool, "
        "no --from",
    )
    in_world = data.is_world(config.dataset)
    require(
        not in_world or not (config.in_distribution or config.prompt_format),
        "--in_distribution and --prompt_format are for data of one's own: name it with --dataset",
    )
    require(
        config.split != "ood" or in_world or config.in_distribution,
        "--split ood is the embedded world's; of other data it needs --in_distribution",
    )


@unlock_afterwards()
def main(config):
    """Best of n on one split, or on each of several. -> its results, or {split: results}"""
    # ------------------------------------------------------------------------------------ set-up
    dist = setup(config.device)
    check_name(config.output_dir)
    if config.from_files:
        return diversity_report.compare_files(config, dist)
    diversity_report.check_models(config)
    if len(config.eval_splits) > 1:
        return run_each_split(config, dist)
    # A folder that is done may be written again, with other rewards and other n for its answers.
    folder = RunFolder(config, dist, FREE, written_again=True)
    # What is wrong with a reward or the policy is said now, before anything is sampled. A pool's
    # policy is not known, and not needed.
    check_inputs(config, "reward_model", "gold_model")
    if not config.pool:
        check_inputs(config, "model")

    # ----------------------------------------------------------------------------------- answers
    # rows: {"prompt": ..., "responses": [N answers], ...}, from a file or from the policy.
    if config.pool:
        tokenizer = None  # only the texts are known
        rows = pool.read(config.pool)
    else:
        prompt_rows, note = prompts_of(config)
        dist.print(note)
        train_what_is_missing(config, "model", "reward_model")
        tokenizer = load_tokenizer(config.model)
        prompt_rows = leave_out_control_tokens(tokenizer, prompt_rows, config, dist.print)
        prompts = ready_prompts(
            tokenizer,
            prompt_rows,
            check_model(config.model),
            config.max_new_tokens,
            config.max_prompt_length,
            config.chat_template,
        )

    # Answers are kept in the folder as they come: after a kill it must be known whose they are.
    if dist.main:
        os.makedirs(config.output_dir, exist_ok=True)
        write_json(os.path.join(config.output_dir, "config.json"), folder.config)
    if not config.pool:
        rows = pool.sample(config, tokenizer, prompts, dist)

    # The best of n needs n answers, so the prompt with the fewest answers sets the largest n.
    counts = [len(row["responses"]) for row in rows]  # P
    N = min(counts)
    ns = choose_ns(config, rows[counts.index(N)])
    has_gold = bool(config.gold_model) or "gold_scores" in rows[0]
    require(has_gold or not config.save_pairs, "--save_pairs needs gold scores: name --gold_model")
    answers_each = f"{N}" if N == max(counts) else f"{N} to {max(counts)}"
    dist.print(f"{len(rows)} prompts, {answers_each} answers each")

    # ------------------------------------------------------------------------------------ scores
    # The rewards of --reward_model choose (the proxy); gold only says what the chosen are worth.
    scores = pool.score(rows, config.reward_model, tokenizer, config, dist)  # {name: P lists of N}
    gold = None  # or P lists of N
    if config.gold_model:
        (gold,) = pool.score(rows, [config.gold_model], tokenizer, config, dist).values()
    elif has_gold:
        gold = [row["gold_scores"] for row in rows]
    if not dist.main:
        dist.barrier()  # what is left is arithmetic
        return None

    # Answer, proxies and gold stay in one place: [p, j] of every matrix is answer j to prompt p.
    matrices = []
    for member_scores in scores.values():
        matrix, mask = pool.matrix(member_scores)  # all members have one mask
        matrices.append(matrix)
    members = torch.stack(matrices)  # [K, P, N]
    if mask.all():
        mask = None  # all prompts have the same number of answers
    # Every member is a proxy of its own, and so is every objective of all of them together.
    proxies = dict(zip(scores, members))  # {name: [P, N]}
    if len(members) > 1:
        proxies |= combine_all(members, config.uwo_lambda)

    # --------------------------------------------------------------------------------- best of n
    # The mean over all choices of n from the N answers has a closed form: nothing is drawn. The
    # proxy rises with n, since it makes the choice; watch whether gold rises with it, or falls.
    gold_matrix = None
    if gold is not None:
        gold_matrix, _ = pool.matrix(gold)  # [P, N]
    results, fits = estimate_curves(proxies, gold_matrix, ns, mask)

    # -------------------------------------------------------------------------------------- save
    def path_of(name):
        return os.path.join(config.output_dir, name)

    scored_rows = join_scores(rows, scores, gold)
    write_json(path_of("bon_results.json"), results)
    write_lines(path_of("pool.jsonl"), scored_rows)
    # The texts that were chosen, for a judge or as demonstrations: by one objective and one n.
    if config.save_best:
        n = config.n[0]
        objective = combine(members, config.objective, config.uwo_lambda[0])  # [P, N]
        best_rows = []
        for row, row_scores in zip(scored_rows, objective):
            best_rows += choose_best(row, row_scores, n, name_of_split(config))
        write_lines(path_of(f"best_of_{n}.jsonl"), best_rows)
    # Pairs labelled by gold, to train a reward model on: {"prompt", "chosen", "rejected"}.
    if config.save_pairs:
        pairs = []
        for row in scored_rows:
            pairs += make_pairs(row)
        write_lines(path_of("pairs.jsonl"), pairs)
        n_ties = sum(count // 2 for count in counts) - len(pairs)
        dist.print(f"{len(pairs)} pairs, {n_ties} ties in gold left out")

    picture = plot_run(config.output_dir)
    names_of_files = "bon_results.json, pool.jsonl"
    if picture:
        names_of_files += f", {picture}"
    dist.print(table(results, has_gold), f"Written to {config.output_dir}: {names_of_files}")
    if config.diversity:
        diversity_report.report(config, dist, {"answers": scored_rows})
    # The summary comes after all other results: by it a run counts as done.
    summary = {"prompts": len(rows), "answers": N, "fits": fits}
    write_json(path_of("summary.json"), summary)
    write_page(config.output_dir, dist)
    dist.barrier()
    return results


def run_each_split(config, dist):
    """Run main() on each of several --eval_splits, in a folder of its own. -> {split: results}"""
    # A split that is not there is an error before anything is sampled.
    _, _, note = load_splits(config, "prompts")
    dist.print(note)
    results = {}
    for item in config.eval_splits:
        name, _, _ = item.partition("=")
        output_dir = f"{config.output_dir}/{name}"
        results[name] = main(replace(config, eval_splits=[item], output_dir=output_dir))
    return results


def prompts_of(config):
    """The rows of the chosen split, and a sentence on them."""
    in_world = data.is_world(config.dataset)

    # load_splits() knows which prompts of a data set are held out.
    is_whole = config.split == "all" or (config.split == "ood" and in_world)
    if not is_whole:
        wanted = config.eval_splits or ["ood" if config.split == "ood" else "test"]
        split_config = replace(config, eval_splits=wanted, split="test")
        train, held_out, note = load_splits(split_config, "prompts")
        rows = train if config.split == "train" else held_out["eval"]
        return rows, note

    # The rest is read as it is: the embedded world's ood, and all of any data set.
    splits = (config.split,)
    if config.split == "all" and in_world:
        splits = ("train", "test", "ood")
    rows = []
    for split in splits:
        rows += data.read_rows(
            config.dataset, "prompts", config.columns, split, config.prompt_format
        )
    return data.subset(rows, config.max_rows), f"{len(rows)} prompts in {config.split}"


def choose_ns(config, scarcest) -> list[int]:
    """The values of n, ascending: --n, or by default those of DEFAULT_NS that the pool allows.

    scarcest: the row of the pool that has the fewest answers. InputError: they are too few for --n.
    """
    N = len(scarcest["responses"])
    ns = sorted(set(config.n))
    if not ns:
        ns = [n for n in DEFAULT_NS if n <= N]
    prompt = str(scarcest["prompt"])[:40]
    require(ns[-1] <= N, f"--n {ns[-1]}: the prompt {prompt!r} has only {N} answers")
    return ns


# ------------------------------------------------------------------------------------- estimates


def estimate_curves(proxies, gold, ns, mask):
    """Estimate for each proxy what the best of n by it is worth, in its own unit and in gold.

    proxies: {name: [P, N]}; gold [P, N] or None; mask [P, N] or None: which entries are answers
    -> {name: rows of describe_curve()}, {name: the fit of Gao et al.'s curve to gold}
    """
    # The KL of best-of-n follows from n alone. On this axis best-of-n and PPO can be compared.
    kl = torch.tensor([bon_kl(n) for n in ns])  # [L]
    # A fit needs a start at n = 1, two further points, and several prompts for its interval.
    can_fit = gold is not None and ns[0] == 1 and len(ns) > 2 and len(gold) > 1
    results = {}
    fits = {}
    for name, proxy in proxies.items():
        # The same choice is valued twice: by the proxy that made it, and by gold.
        proxy_curve = bon_estimate(proxy, proxy, ns, mask, per_prompt=True)  # [P, L]
        gold_curve = None
        if gold is not None:
            gold_curve = bon_estimate(proxy, gold, ns, mask, per_prompt=True)  # [P, L]
        results[name] = describe_curve(ns, proxy_curve, gold_curve)
        if can_fit:
            fits[name] = fit_bon(kl, gold_curve)._asdict()
    return results, fits


def describe_curve(ns, proxy, gold):
    """Estimates for each prompt, [P, L] each -> a row for each n:

        {n, kl, proxy_score, proxy_se, proxy_interval, gold_score, gold_se, gold_interval}

    Means over prompts, their standard errors and their 95% intervals. Without gold its are None.
    """
    rows = [{"n": n, "kl": bon_kl(n)} for n in ns]
    for name, estimates in (("proxy", proxy), ("gold", gold)):
        means = ses = intervals = [None] * len(ns)
        if estimates is not None:
            means, ses, intervals = mean_over_prompts(estimates)
        for row, mean, se, interval in zip(rows, means, ses, intervals):
            row[f"{name}_score"] = mean
            row[f"{name}_se"] = se
            row[f"{name}_interval"] = interval
    return rows


def mean_over_prompts(estimates: torch.Tensor) -> tuple[list, list, list]:
    """[P, L] -> means, standard errors (0 for one prompt) and 95% intervals, lists of L."""
    # Prompts are independent, and all the estimates of one prompt come from the same answers. So
    # the error is taken over prompts.
    P, L = estimates.shape
    se = torch.zeros(L)
    if P > 1:
        se = estimates.std(0) / P**0.5
    low, high = bootstrap(estimates)
    intervals = torch.stack([low, high], 1)
    return estimates.mean(0).tolist(), se.tolist(), intervals.tolist()


# ----------------------------------------------------------------------------------------- files


def join_scores(rows, scores, gold) -> list[dict]:
    """The scored pool: rows {prompt, responses: [N], scores: {name: [N]}[, gold_scores: [N]]}."""
    scored_rows = []
    for p, row in enumerate(rows):
        row_scores = {name: by_prompt[p] for name, by_prompt in scores.items()}
        scored = {
            "prompt": row["prompt"],
            "responses": row["responses"],
            "scores": row_scores,
        }
        if gold is not None:
            scored["gold_scores"] = gold[p]
        scored |= data.columns_for_files(row)
        scored_rows.append(scored)
    return scored_rows


def choose_best(row, scores: torch.Tensor, n: int, split: str | None) -> list[dict]:
    """The best of each n answers in turn, by scores [N or more]; n = 1: every answer.

    A last group of fewer than n answers is left out. -> rows {prompt, response, scores, gold,
    split, sample}; `sample` is the answer's place in the pool
    """
    # With n = 4 and 10 answers the groups are 0 1 2 3 and 4 5 6 7. Each answer is in one group at
    # most, so that the chosen texts are independent draws of best-of-n.
    n_groups = len(row["responses"]) // n
    groups = scores[: n_groups * n].view(n_groups, n)
    first_places = torch.arange(n_groups) * n
    places = first_places + groups.argmax(1)  # [n_groups]

    best_rows = []
    for j in places.tolist():
        gold = row["gold_scores"][j] if "gold_scores" in row else None
        best = {
            "prompt": row["prompt"],
            "response": row["responses"][j],
            "scores": {name: numbers[j] for name, numbers in row["scores"].items()},
            "gold": gold,
            "split": split,
            "sample": j,
            **data.columns_for_files(row),
        }
        best_rows.append(best)
    return best_rows


def name_of_split(config) -> str | None:
    """The split that the prompts are of; None where they come with their answers, from --pool."""
    if config.pool:
        return None
    if config.eval_splits:
        return config.eval_splits[0].partition("=")[0]
    return config.split


def make_pairs(row) -> list[dict]:
    """Answers 0 and 1, 2 and 3, ... as preferences of gold: rows {prompt, chosen, rejected}.

    Ties are left out.
    """
    gold = row["gold_scores"]
    responses = row["responses"]
    pairs = []
    # Each answer is in one pair at most, so that pairs of one prompt are independent draws.
    for j in range(0, len(responses) - 1, 2):
        if gold[j] == gold[j + 1]:
            continue
        better = j
        worse = j + 1
        if gold[worse] > gold[better]:
            better, worse = worse, better
        texts = {"chosen": responses[better], "rejected": responses[worse]}
        pairs.append({"prompt": row["prompt"], **texts})
    return pairs


def table(results, has_gold):
    """Proxy and gold against n, as readable text."""
    shown_ns = (1, 4, 16, 64, 256, 1024, 4096)
    lines = ["\nExpected score of the best of n, mean over prompts +- standard error:"]
    for what in ("proxy", "gold"):
        if what == "gold" and not has_gold:
            continue
        for name, points in results.items():
            # A few of the values of n, and the largest, fit into one line.
            cells = []
            for point in points:
                if point["n"] in shown_ns or point is points[-1]:
                    score = point[f"{what}_score"]
                    se = point[f"{what}_se"]
                    cells.append(f"n {point['n']}: {score:.2f} +- {se:.2f}")
            lines.append(f"  {what:5s} {name:8s} " + "  ".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(Config, main)

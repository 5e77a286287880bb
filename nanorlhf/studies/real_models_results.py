"""What the runs of the study on a real model have found: read from their folders, and shown.

A run's result is a small dict. A table is {row: {column: [one number a seed]}}, without the rows of
runs that are not kept yet.
"""

from pathlib import Path

from ..hf.activations import SITES
from ..runtime.files import read_object, read_rows
from ..runtime.log import cut_end, in_one_line
from .common import collect, describe_numbers, print_title
from .tables import print_table, read_seconds, shorten

# What tables call the metrics of a run of train_ppo.py.
EVALUATED = {
    "proxy": "reward",
    "gold": "judge",
    "score/rewards.py:is_right": "right",
    "score/rewards.py:is_in_form": "in form",
    "kl": "KL",
    "length": "tokens",
    "distinct_2": "distinct-2",
}
# What tables call the rewards of a benchmark.
NOT_CUT = "not cut wins"
REWARD_MODEL_COLUMNS = ("accuracy", "accuracy_se", "longer_wins", "shorter_wins", "seconds")
SHOWN_TEXT = 240  # characters of a sample

# -------------------------------------------------------------------------------------- reading


def read_policy(folder: str) -> dict:
    """A run of train_ppo.py: its evaluations before and after, its seconds, and two samples."""
    # {"steps": 30, "before": {"proxy": 0.17, "proxy_se": 0.12, "proxy_n": 24, ...}, "after": {...}}
    summary = read_object(f"{folder}/summary.json")
    run = {"steps": summary["steps"]}
    for moment in ("before", "after"):
        run[moment] = {}
        for name in EVALUATED:
            if summary[moment].get(name) is None:
                continue
            run[moment][name] = shorten(summary[moment][name])
            run[moment][f"{name}_se"] = shorten(summary[moment][f"{name}_se"])
        run["prompts"] = summary[moment]["proxy_n"]
    run["seconds"] = read_seconds(folder)
    run["samples"] = read_samples(folder, summary["steps"])
    return run


def read_samples(folder: str, last_step: int) -> list[dict]:
    """The same prompts' answers before and after -> [{prompt, before, after}]"""
    # samples.jsonl has answers to the same few prompts: {"step": 0, "prompt": ..., "response": ...}
    answers = {}
    for row in read_rows(f"{folder}/samples.jsonl", {"step": int}):
        question = row["prompt"][-1]["content"]
        texts = answers.setdefault(question, {"prompt": cut_end(in_one_line(question), SHOWN_TEXT)})
        moment = {0: "before", last_step: "after"}.get(row["step"])
        if moment:
            texts[moment] = cut_end(in_one_line(row["response"]), SHOWN_TEXT)
    complete = []
    for texts in answers.values():
        if "before" in texts and "after" in texts:
            complete.append(texts)
    return complete


def read_reward_model(folder: str) -> dict:
    """A reward model: its accuracy on held-out pairs, what length alone has there, its seconds."""
    summary = read_object(f"{folder}/summary.json")
    run = {"seconds": read_seconds(folder)}
    for name in ("accuracy", "accuracy_se", "longer_wins", "shorter_wins", "n_pairs"):
        run[name] = shorten(summary[f"eval/{name}"])
    return run


def read_bon(folder: str) -> dict:
    """Best-of-n by each reward: at n = 1 and at the largest n, the reward itself and the judge."""
    run = {}
    for name, points in read_object(f"{folder}/bon_results.json").items():
        run[name] = []
        # At n = 1 nothing is chosen: the numbers are those of all answers.
        for point in (points[0], points[-1]):
            numbers = {"n": point["n"]}
            for column in ("proxy_score", "proxy_se", "gold_score", "gold_se"):
                numbers[column] = shorten(point[column])
            run[name].append(numbers)
    return run


def read_benchmark(folder: str) -> dict:
    """Rewards on pairs or on RM-Bench: each metric with its interval, and how many were cut."""
    # summary["cut"] has, for each reward, how many answers were too long for it.
    summary = read_object(f"{folder}/summary.json")
    run = {"units": summary["units"], "answers": summary["answers"], "rewards": {}}
    run["cut"] = {name_of_reward(spec): n for spec, n in summary["cut"].items()}
    for spec, metrics in summary["rewards"].items():
        shown = {}
        for name in ("accuracy", "average", "hard", "normal", "easy"):
            if name in metrics:
                shown[name] = [shorten(x) for x in metrics[name]]
        run["rewards"][name_of_reward(spec)] = shown
    return run


def name_of_reward(spec: str) -> str:
    """A reward in a table: the part of its path that says what it is."""
    if spec.endswith(":fits"):
        return NOT_CUT
    # runs/real_models/refusals/dense/seed_0 -> dense
    path = Path(spec)
    if path.name.startswith("seed_"):
        path = path.parent
    return path.name


def read_judge(folder: str) -> dict:
    """A language model that has judged reviews: the splits' numbers of it and of the controls."""
    summary = read_object(f"{folder}/summary.json")
    run = {"pairs": summary["pairs"]}
    # The judges are the model, gold and a control of length. Each has one split here.
    for spec, judge in summary["judges"].items():
        (split,) = judge["splits"].values()
        shown = {}
        for name in ("win_rate", "wins", "ties", "losses", "longer_won"):
            shown[name] = shorten(split[name])
        shown["interval"] = [shorten(x) for x in split["interval"]]
        if "first_chosen" in judge:
            shown["first_chosen"] = shorten(judge["first_chosen"])
        label = "model" if spec.startswith("llm:") else spec
        run[label] = shown
    return run


def read_diversity(folder: str) -> dict:
    """The diversity of a pool's answers and of its best -> {system: {protocol: {metric: [...]}}}"""
    report = read_object(f"{folder}/diversity.json")
    run = {}
    for system, protocols in report["systems"].items():
        run[system] = {}
        for protocol in ("per_input", "across_input"):
            # Best-of-n draws again and again from one pool and repeats answers, so its diversity
            # per input would say nothing: None.
            spreads = protocols[protocol] or {}
            shown = {}
            for name in ("length", "distinct", "ead", "embedding", "nli"):
                if name in spreads:
                    shown[name] = shorten(spreads[name]["mean"])
            run[system][protocol] = shown
    return run


def read_divergence(folder: str) -> dict:
    """How far each block has moved: its weights, and 1 - cosine of its activations."""
    # summary["layers"] has one entry for each block, from the first to the last.
    layers = read_object(f"{folder}/summary.json")["layers"]
    run = {"weights": [shorten(layer["relative"]) for layer in layers]}
    for site in SITES:
        if site in layers[0]["activations"]:
            run[site] = [shorten(layer["activations"][site]["cosine"]) for layer in layers]
    return run


def read_autoencoders(folder: str) -> dict:
    """{autoencoder: what it misses, how many features fire, how many are dead, loss recovered}"""
    run = {}
    for key, numbers in read_object(f"{folder}/summary.json").items():
        run[key] = {"tokens": numbers["n_tokens"]}
        for name in ("fvu", "l0", "dead", "loss_recovered"):
            run[key][name] = shorten(numbers[name])
    return run


def read_mmcs(folder: str) -> dict:
    """{autoencoder A, autoencoder B: how alike their features are, and random ones}"""
    run = {}
    for pair in read_object(f"{folder}/summary.json")["pairs"]:
        # .../sae/base/14_mlp -> base/14_mlp
        names = [str(Path(*Path(pair[side]).parts[-2:])) for side in ("a", "b")]
        run[", ".join(names)] = {name: shorten(pair[name]) for name in ("mmcs", "chance")}
    return run


def read_features(folder: str) -> dict:
    """{id: how often a feature fires, on which tokens, and the model's own words for it}"""
    (report,) = read_object(f"{folder}/summary.json")["saes"].values()
    run = {}
    for feature in report["features"]:
        run[str(feature["id"])] = {
            "rate": shorten(feature["rate"]),
            "tokens": [token for token, _, _ in feature["tokens"][:5]],
            "description": cut_end(in_one_line(feature["description"]), SHOWN_TEXT),
            "related": feature["related"],
        }
    return run


def read_probe(folder: str) -> dict:
    """{input of a probe: the first metric, its interval, the policy's less it, its interval}"""
    summary = read_object(f"{folder}/summary.json")
    metric = summary["metrics"][0]
    run = {"metric": metric, "texts": summary["texts"], "inputs": {}}
    for name, row in summary["rows"].items():
        # Mean and half-width of the metric, then those of the policy's metric less this one.
        values = [*row[metric], *row["policy_less"]]
        run["inputs"][name] = [shorten(x) for x in values]
    return run


# -------------------------------------------------------------------------------------- tables

# In all functions results is {name of a cell: its result}, and a are the study's settings.


def runs_of(results: dict, part: str) -> list[dict]:
    """The results of all seeds of a part that are kept."""
    runs = []
    for name, result in results.items():
        if name.startswith(f"{part}/seed_"):
            runs.append(result)
    return runs


def print_tables(part: str, results: dict, a):
    """The tables of a part, as far as its cells are kept."""
    if results:
        TABLES[part](results, a)


def print_policies(title: str, parts: dict[str, str], results: dict, a):
    """Evaluations before and after, a row for each of {label: part}; samples of the first seed."""
    table = {}
    for label, part in parts.items():
        runs = runs_of(results, part)
        if not runs:
            continue
        # All policies begin as the same model.
        if "before" not in table:
            table["before"] = collect(name_columns(run["before"]) for run in runs)
        rows = []
        for run in runs:
            rows.append({**name_columns(run["after"]), "seconds": run["seconds"]})
        table[label] = collect(rows)
    if not table:
        return
    print_title(f"{title}; {describe_numbers(a)}", a)
    print_table(table)
    for label, part in parts.items():
        for run in runs_of(results, part)[:1]:
            print_samples(label, run["samples"])


def name_columns(evaluation: dict) -> dict[str, float]:
    """An evaluation under the tables' names."""
    columns = {}
    for name, label in EVALUATED.items():
        if name in evaluation:
            columns[label] = evaluation[name]
    return columns


def print_samples(label: str, samples: list[dict]):
    """Answers before and after."""
    print(f"\nanswers, {label}:")
    for sample in samples:
        print(f"  > {sample['prompt']}")
        print(f"    before: {sample['before']}")
        print(f"    after:  {sample['after']}")


def print_lexicon(results: dict, a):
    """PPO with a KL penalty and without."""
    parts = {"kl_coef 0.05": "lexicon/kl_0.05", "kl_coef 0": "lexicon/kl_0"}
    print_policies("PPO on the words of a lexicon", parts, results, a)


def print_sums(results: dict, a):
    """GRPO before and after, and how many sums are right when sampling leaves less to chance."""
    title = "GRPO on sums: right answers, and answers in the form of a sum"
    print_policies(title, {"after": "sums"}, results, a)
    table = {}
    for name in sorted(results):
        if "/temperature_" not in name:
            continue
        # sums/temperature_1/before, and sums/temperature_1/seed_0 of a policy
        _, temperature, policy = name.split("/")
        label = "before" if policy == "before" else "after"
        row = table.setdefault(label, {})
        column = row.setdefault(temperature.replace("_", " "), [])
        # There is one reward. The best of one answer is any answer: their mean.
        (points,) = results[name].values()
        column.append(points[0]["proxy_score"])
    if table:
        print_title("Right sums by temperature, 4 answers to each; a number a seed", a)
        print_table(table)


def print_judge(results: dict, a):
    """A line for each judge: its choices, and how much the order decides."""
    run = results["judge"]
    print_title(
        f"The model judges {run['pairs']} pairs of reviews; A has more gold, each stood first once",
        a,
    )
    for name, judge in run.items():
        if name == "pairs":
            continue
        low, high = judge["interval"]
        line = f"{name:14s} for A {judge['win_rate']:.3f} [{low:.3f}, {high:.3f}]"
        # A pair is a win or a loss if both orders gave the same choice, else a tie.
        line += f"; the same answer both times {judge['wins'] + judge['losses']:.3f}"
        if judge["longer_won"] is not None:
            line += f"; the longer answer {judge['longer_won']:.3f}"
        if judge.get("first_chosen") is not None:
            line += f"; the first answer {judge['first_chosen']:.3f}"
        print(line)


def print_reward_models(title: str, names: dict[str, list[str]], moved: dict, results: dict, a):
    """Accuracies beside those of length, and of questions with the answers of others.

    names: {row: cells}; moved: {row: the cells of its tests with other questions}
    """
    table = {}
    for label, cells in names.items():
        rows = []
        for name in cells:
            if name in results:
                rows.append({column: results[name][column] for column in REWARD_MODEL_COLUMNS})
        if rows:
            table[label] = collect(rows)
        # A reward model that does not read the questions is as accurate with other ones.
        accuracies = moved_accuracies(moved.get(label, []), results)
        if accuracies:
            table.setdefault(label, {})["moved prompts"] = accuracies
    if table:
        print_title(title, a)
        print_table(table)


def moved_accuracies(cells: list[str], results: dict) -> list[float]:
    """The accuracies of reward models on tests whose questions have the answers of others."""
    accuracies = []
    for name in cells:
        if name in results:
            rewards = results[name]["rewards"]
            # The file also has the controls of length, which are the same with any questions.
            (reward,) = rewards.keys() - {"longer wins", "shorter wins"}
            accuracies.append(rewards[reward]["accuracy"][0])
    return accuracies


def print_polite(results: dict, a):
    """The reward models, best-of-n by them, and PPO on them."""
    members = [name for name in results if name.startswith("polite/members/")]
    names = {"judge": ["polite/judge"], "members, noisy": members}
    title = "Reward models of polite answers, on held-out pairs"
    print_reward_models(title, names, {"judge": ["polite/moved"]}, results, a)
    if "polite/bon" in results:
        print_title("Best-of-n by each reward, in standard deviations of the judge's score", a)
        print_bon(results["polite/bon"])
    parts = {"one member": "polite/ppo_one", "mean of all": "polite/ppo_all"}
    print_policies("PPO on reward models, judged by another one", parts, results, a)


def print_bon(run: dict):
    """The reward and the judge at n = 1 and at the largest n."""
    for name, (first, last) in run.items():
        line = f"{name:18s}"
        for point in (first, last):
            line += f"  n = {point['n']}: reward {point['proxy_score']:6.3f}, judge "
            line += f"{point['gold_score']:6.3f} +- {point['gold_se']:.3f}"
        print(line)


def print_hh(results: dict, a):
    """The reward models beside length."""
    trained = [name for name in results if name.startswith("hh/rm/")]
    moved = [name for name in results if name.startswith("hh/moved/")]
    title = "Reward models of helpful dialogues, on held-out pairs"
    print_reward_models(title, {"HH": trained}, {"HH": moved}, results, a)


def print_diversity(results: dict, a):
    """A row for each system, a column for each metric."""
    table = {}
    for name in ("model", "policy"):
        for system, protocols in results.get(f"diversity/{name}", {}).items():
            label = system.replace("answers", name)
            row = {}
            for protocol, metrics in protocols.items():
                for metric, value in metrics.items():
                    row[f"{metric}, {protocol.partition('_')[0]}"] = [value]
            table[label] = row
    print_title("Diversity of the answers to one input, and across inputs", a)
    print_table(table)


def print_inside(results: dict, a):
    """Divergence, autoencoders, probes and features, as far as they are kept."""
    if "inside/divergence" in results:
        print_title("How far each block has moved", a)
        for name, values in results["inside/divergence"].items():
            print(f"{name:10s} " + " ".join(f"{x:.3g}" for x in values))
    if "inside/sae" in results:
        print_title("Autoencoders", a)
        print_rows(results["inside/sae"])
    if "inside/mmcs" in results:
        print_title("How alike the features of two autoencoders are", a)
        print_rows(results["inside/mmcs"])
    for label in ("word", "difference", "sequence"):
        if f"inside/probe_{label}" in results:
            print_probe(label, results[f"inside/probe_{label}"], a)
    if "inside/features" in results:
        print_title("The features that fire most, described by the model itself", a)
        for number, feature in results["inside/features"].items():
            print(f"{number:>6s} {feature['rate']:6.1%} {feature['tokens']}")
            print(f"       {feature['description']}")


def print_probe(label: str, run: dict, a):
    """A line for each input that the reward was read from: the policy's first, then controls."""
    print_title(f"The reward read from activations, {label}: {run['metric']} over splits", a)
    for name, numbers in run["inputs"].items():
        value, half_width, less, half_width_of_less = numbers
        line = f"{name:28s}{describe(value)} +- {describe(half_width)}"
        print(f"{line}   policy less this {describe(less)} +- {describe(half_width_of_less)}")


def describe(x: float | None) -> str:
    """A number with three digits; a line where there is none."""
    if x is None:
        return "    -"
    return f"{x:7.3f}"


def print_rows(rows: dict[str, dict]):
    """A line for each row, with its numbers by name."""
    for name, numbers in rows.items():
        line = f"{name:34s}"
        for column, x in numbers.items():
            line += f"  {column} {describe(x)}"
        print(line)


def print_refusals(results: dict, a):
    """A row for each reward: its accuracies, and what was cut."""
    # {column of the table: (the cells that it is read from, their metric)}
    columns = {
        "test": ("test", "accuracy"),
        "moved prompts": ("moved", "accuracy"),
        "RM-Bench": ("rm_bench", "average"),
        "hard": ("rm_bench", "hard"),
        "normal": ("rm_bench", "normal"),
        "easy": ("rm_bench", "easy"),
    }
    table = {}
    for column, (test, metric) in columns.items():
        for run in runs_of(results, f"refusals/{test}"):
            for reward, metrics in run["rewards"].items():
                numbers = table.setdefault(reward, {}).setdefault(column, [])
                numbers.append(metrics[metric][0])
    if table:
        print_title(f"Rewards of refusals, one split a seed; {describe_numbers(a)}", a)
        print_table(table)
        # The first split stands for all of them.
        cut = runs_of(results, "refusals/test")
        for run in cut[:1]:
            print(f"cut, of {run['answers']} answers of the first test: {run['cut']}")


TABLES = {
    "lexicon": print_lexicon,
    "sums": print_sums,
    "judge": print_judge,
    "polite": print_polite,
    "refusals": print_refusals,
    "diversity": print_diversity,
    "inside": print_inside,
    "hh": print_hh,
}

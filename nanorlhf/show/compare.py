"""Two runs beside each other: their settings, their metrics, their answers.

    PPO with two coefficients of the KL penalty:
        python -m nanorlhf.show.compare runs/ppo runs/no_kl
    one run with itself, before and after:
        python -m nanorlhf.show.compare runs/ppo runs/ppo --step 0 40
    PPO and best-of-n from the same policy, the best of 16:
        python -m nanorlhf.show.compare runs/ppo runs/bon --step 40 16

Runs of train_ppo.py, train_sft.py, train_rm.py and sample_bon.py can be
compared; of two different kinds it is what they share. The step of best-of-n
is n. Where both runs have answered the same prompts, a difference is taken
prompt by prompt: what makes a prompt hard or easy for both drops out of it.
"""

import contextlib
import os
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..data import number_prompts
from ..errors import InputError, at_least, require
from ..runtime import cli
from ..runtime.files import check_can_write, check_output, read_object, write_json
from ..runtime.flags import FlagGroup
from ..stats import mean_over_groups, percentiles
from .comparison_text import table
from .evaluations_of_runs import Answer, Number, Run, read_answers, read_run
from .terminal import in_one_line, name_runs, terminal_width, until_nobody_reads

# What means the same in runs of every kind. The accuracy of SFT is not that of a reward model.
OF_ANSWERS = "gold proxy variance kl kl_k2 kl_k3 length eos_rate distinct_2".split()
# By which metric the best evaluation is chosen: the first that both runs have. More is better.
BEST_BY = ("gold", "proxy", "accuracy")
# Settings that say nothing of what was trained. The inputs (digests of files) are compared file by
# file.
NOT_COMPARED = {"output_dir", "inputs", "resume"}

Pairs = list[tuple[Answer, Answer]]  # two answers to one prompt


@dataclass
class Config(FlagGroup):
    """The comparison: which evaluations of which runs, and how much of them is shown"""

    runs: list[str] = HfArg(
        kw_only=True, help="the two run folders; they may stand first, without --runs"
    )
    step: list[int] = HfArg(
        default_factory=list,
        help="the step of both evaluations, or two: of the first run and of the second; by default "
        "the last that both have, or the last of each where the kinds differ",
    )
    split: str = HfArg(
        default="eval",
        help="which held-out prompts: eval, the first split, or the name of a further one, as ood",
    )
    n: int = HfArg(default=5, help="how many prompts to show with both answers; 0: none")
    sort: str = HfArg(
        default="",
        metadata={"choices": ("", "file", "gold", "proxy")},
        help="which prompts come first: those whose two answers differ most in gold or in proxy, "
        "or file, those of the file; by default gold, else proxy, else file",
    )
    output: str = HfArg(default="", help="a .json file for the whole comparison")

    def __post_init__(self):
        super().__post_init__()
        require(len(self.runs) == 2, f"two runs are compared, not {len(self.runs)}")
        require(len(self.step) < 3, "--step takes one step, or one for each run")
        at_least(self, 0, "n")


def main(config: Config) -> dict:
    """Compare two runs, print what was found, and write it to --output.

    The folders are read by evaluations_of_runs.py; comparison_text.py makes the text.
    """
    # A place that cannot be written to ends the command before any run is read.
    if config.output:
        check_can_write(config.output)
        check_output(config.output, is_comparison, "a comparison")

    # One evaluation of each run is compared, and the answers to the prompts that both have.
    path_a, path_b = config.runs
    a = read_run(path_a, config.split)
    b = read_run(path_b, config.split)
    step_a, step_b = choose_steps(config.step, a, b)
    pairs = read_pairs(a, step_a, b, step_b, config.split)
    if a.kind != b.kind:
        keep_what_all_kinds_have(a, b)
    metrics = compare_metrics(a.evaluations[step_a], b.evaluations[step_b], pairs)
    # The kind of a run is text from its config.json, and may hold escape codes for the terminal.
    both = in_one_line(f"{a.path} ({a.kind}) and {b.path} ({b.kind})")
    require(metrics or pairs, f"{both} have no metric and no prompt in common")
    pairs, sorted_by = sort_pairs(pairs, config.sort)

    # One dictionary holds the whole comparison: it is printed, and written to --output.
    comparison = {}
    only_a, only_b = settings_of_one(a, b)
    comparison["a"] = {"run": a.path, "kind": a.kind, "step": step_a, "only_here": only_a}
    comparison["b"] = {"run": b.path, "kind": b.kind, "step": step_b, "only_here": only_b}
    comparison["settings"] = compare_settings(a.settings, b.settings)
    comparison["split"] = config.split
    comparison["metrics"] = metrics
    comparison["best"] = compare_best(a, b, config.split)
    comparison["course"] = compare_course(a, b, config.split)
    comparison["sorted_by"] = sorted_by
    comparison["answers"] = [describe_pair(*pair) for pair in pairs]
    with until_nobody_reads():
        print(table(comparison, config.n, terminal_width()))
    if config.output:
        os.makedirs(os.path.dirname(config.output) or ".", exist_ok=True)
        write_json(config.output, comparison)
    return comparison


def is_comparison(path: str) -> bool:
    """Whether a file is one that an earlier call has written."""
    with contextlib.suppress(InputError):
        return {"a", "b", "metrics", "answers"} <= read_object(path).keys()
    return False


# --------------------------------------------------------------------------------- what is compared


def choose_steps(steps: list[int], a: Run, b: Run) -> tuple[int, int]:
    """The steps of the two evaluations. InputError: a run has no evaluation at its step."""
    if steps:
        chosen = (steps[0], steps[-1])  # twice the same, where --step has one number
        for run, step in zip((a, b), chosen):
            known = ", ".join(map(str, run.evaluations))
            is_there = step in run.evaluations
            require(is_there, f"{run.path}: no evaluation at --step {step}; there are {known}")
        return chosen
    # Two runs of one kind are compared after the same number of steps. Between kinds a step means
    # different things (PPO: a rollout, SFT: an update, best-of-n: n): each run's last one is taken.
    shared = a.evaluations.keys() & b.evaluations.keys()
    if a.kind == b.kind and shared:
        last = max(shared)
        return last, last
    return max(a.evaluations), max(b.evaluations)


def compare_settings(a: dict, b: dict) -> dict[str, list]:
    """The settings that both runs have and that differ: {name: [A's value, B's value]}.

    So do the contents of a file that both name, if it was changed between the runs.
    """
    differing = {}
    for name in sorted(a.keys() & b.keys() - NOT_COMPARED):
        values = [a[name], b[name]]
        if values[0] != values[1]:
            differing[name] = values

    # Two runs may name the same folder, say runs/rm/seed_0, which held another model each time.
    inputs = a["inputs"]
    others = b["inputs"]
    for path in sorted(inputs.keys() & others.keys()):
        digests = [inputs[path]["digest"], others[path]["digest"]]
        if digests[0] != digests[1]:
            differing[f"content of {path}"] = digests
    return differing


def settings_of_one(a: Run, b: Run) -> tuple[list[str], list[str]]:
    """Settings that only A has, and only B, such as flags that are younger than the other run.

    Runs of different kinds have too many of them to name.
    """
    if a.kind != b.kind:
        return [], []
    only_a = a.settings.keys() - b.settings.keys()
    only_b = b.settings.keys() - a.settings.keys()
    return sorted(only_a), sorted(only_b)


def read_pairs(a: Run, step_a: int, b: Run, step_b: int, split: str) -> Pairs:
    """Answers of both runs to one prompt side by side: the first to the first, and so on."""
    # Answers are matched by the text of their prompt, not by its place: two files may have their
    # prompts in different orders, or different prompts. An answer without a partner is left out.
    waiting = {}  # {prompt: the answers of B to it}
    for answer in read_answers(b, step_b, split):
        waiting.setdefault(answer.prompt, []).append(answer)
    pairs = []
    for answer in read_answers(a, step_a, split):
        if waiting.get(answer.prompt):
            pairs.append((answer, waiting[answer.prompt].pop(0)))
    return pairs


def compare_metrics(a: dict[str, Number], b: dict[str, Number], pairs: Pairs) -> dict[str, dict]:
    """{metric: {a, b, difference, se, interval, pairs}} of all metrics that both evaluations have.

    The difference is B less A, its interval one of 95%. `pairs` is None where the two evaluations
    are taken for independent; where it is a number of pairs, they share so many prompts.
    """
    compared = {}
    for name, number in a.items():
        if name in b:
            difference = subtract(name, number, b[name], pairs)
            compared[name] = {"a": number, "b": b[name], **difference}
    return compared


def subtract(name: str, a: Number, b: Number, pairs: Pairs) -> dict:
    """B less A of one metric: {difference, se, interval, pairs}."""
    # Differences are taken prompt by prompt, if answers have this number: an easy prompt is easy
    # for both runs, and that drops out.
    differences = []
    prompts = []  # of each difference: answers to one prompt are not independent
    for first, second in pairs:
        number_a = first.expected.get(name)
        number_b = second.expected.get(name)
        if number_a is not None and number_b is not None:
            differences.append(number_b - number_a)
            prompts.append(first.prompt)
    # The interval is over prompts: one alone would give it the width 0, as if nothing were unsure.
    if len(set(prompts)) > 1:
        mean, draws = mean_over_groups(differences, number_prompts(prompts))
        return {
            "difference": mean.item(),
            "se": draws.std(correction=0).item(),
            "interval": percentiles(draws).tolist(),
            "pairs": len(differences),
        }

    # Otherwise the two recorded means are subtracted as if they were independent: variances add up.
    # On the same prompts they are not independent, so this interval is usually too wide.
    difference = b["mean"] - a["mean"]
    se = (a["se"] ** 2 + b["se"] ** 2) ** 0.5
    interval = [difference - 1.96 * se, difference + 1.96 * se]
    return {"difference": difference, "se": se, "interval": interval, "pairs": None}


def choose_metric(a: Run, b: Run) -> str | None:
    """The first metric of BEST_BY that both runs have; None where there is nothing to choose from.

    That is one run at two steps, or one evaluation of each.
    """
    n_evaluations = max(len(a.evaluations), len(b.evaluations))
    if a.path == b.path or n_evaluations < 2:
        return None
    for name in BEST_BY:
        if steps_with(a, name) and steps_with(b, name):
            return name
    return None


def steps_with(run: Run, name: str) -> list[int]:
    return [step for step, numbers in run.evaluations.items() if name in numbers]


def compare_best(a: Run, b: Run, split: str) -> dict | None:
    """Each run at its own best evaluation. Pitfall: the best of many looks better than it is."""
    name = choose_metric(a, b)
    if name is None:
        return None
    # The best evaluation need not be the last one: after too much training gold may fall.
    best = []
    for run in (a, b):
        means = {}
        for step in steps_with(run, name):
            means[step] = run.evaluations[step][name]["mean"]
        best.append(max(means, key=means.get))
    return {"metric": name, "steps": best, **compare_one(name, a, b, best, split)}


def compare_course(a: Run, b: Run, split: str) -> list[dict]:
    """The same metric at every step that both runs have evaluated."""
    # A step of one kind of run is not comparable with a step of another kind.
    name = choose_metric(a, b)
    if name is None or a.kind != b.kind:
        return []
    course = []
    for step in steps_with(a, name):
        if step in steps_with(b, name):
            row = compare_one(name, a, b, [step, step], split)
            course.append({"step": step, **row})
    return course


def compare_one(name: str, a: Run, b: Run, steps: list[int], split: str) -> dict:
    """One metric at a step of each run."""
    step_a, step_b = steps
    pairs = read_pairs(a, step_a, b, step_b, split)
    number_a = a.evaluations[step_a][name]
    number_b = b.evaluations[step_b][name]
    return {"a": number_a, "b": number_b, **subtract(name, number_a, number_b, pairs)}


def keep_what_all_kinds_have(a: Run, b: Run):
    """Drop the metrics whose names mean different things in runs of different kinds, in place."""
    for run in (a, b):
        for step, numbers in run.evaluations.items():
            shared = {name: numbers[name] for name in OF_ANSWERS if name in numbers}
            run.evaluations[step] = shared


def sort_pairs(pairs: Pairs, by: str) -> tuple[Pairs, str]:
    """Pairs in the order in which they are shown, and what they are sorted by."""
    # Only a number that every answer has can sort: an answer without it would have no place.
    known = []
    for name in ("gold", "proxy"):
        have_it = [name in a.numbers and name in b.numbers for a, b in pairs]
        if pairs and all(have_it):
            known.append(name)
    known.append("file")
    by = by or known[0]
    names = ", ".join(known)
    require(by in known, f"--sort {by}: not all answers of both runs have it; there is {names}")
    if by == "file":
        return pairs, by

    # The sign does not matter: the largest differences come first, whichever run is better.
    def difference(pair):
        a, b = pair
        return abs(b.numbers[by] - a.numbers[by])

    return sorted(pairs, key=difference, reverse=True), by


def describe_pair(a: Answer, b: Answer) -> dict:
    """{prompt, a: {response, numbers}, b: the same}, as in --output."""
    described = {"prompt": a.prompt}
    described["a"] = {"response": a.response, "numbers": a.numbers}
    described["b"] = {"response": b.response, "numbers": b.numbers}
    return described


def run(args: list[str] | None = None):
    """The command line: RUN_A RUN_B [flags]"""
    with cli.errors_in_one_line():
        main(cli.parse(Config, name_runs(args), "RUN_A RUN_B"))


if __name__ == "__main__":
    run()

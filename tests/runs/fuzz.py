"""Bad and odd input for every script and every command of probe.py: thousands of cases, each of
which says what must come of it.

    a table of outcomes, and every case that did not end as it should:
        python tests/runs/fuzz.py --n 2000 --seed 0
    all cases whose names match; --list prints the names:
        python tests/runs/fuzz.py --n 0 --only 'sae .*scale'

A case is one run of a script in a folder of its own, which holds a copy of the material: small
models, runs, and files. Something in it is damaged, or a flag is wrong, or only odd. All cases run
in forks of one process, which has done the imports. It has a single thread, and has never computed
a gradient: a fork would have no copies of further threads. A case expects one of

    refused    exit code 2; the last line on stderr is the one error; what was there is as it was,
               and nothing new is left
    stopped    exit code 2 and one line, but what was written up to then may stay: a reward that
               fails at its tenth call
    equal      exit code 0, and the numbers of the undamaged run: an odd way to say the right thing
    sound      refused or equal: damage that may be harmless, or for which there is a remedy, such
               as an older checkpoint
    failed or equal
               exit code 1 and one line, as on a full disk; or equal
    any        0 with results, or one line: a value that may well be meant, such as another layer

and whatever it expects, it may not end in a traceback, or hang, or show the secret that it was
given.
"""

import argparse
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    # What conftest.py does for pytest, before torch makes a thread or looks for a GPU.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    sys.path[:0] = [str(REPO), str(REPO / "tests")]

import fuzz_files
import fuzz_flags
import torch
from fuzz_flags import SECRET
from fuzz_material import (
    RUNS,
    Case,
    make_material,
    run_words,
    small_config,
    without_gold,
)
from safetensors.torch import load_file
from support import read_rows
from transformers import AutoModelForCausalLM

import sample_bon
import train_ppo
import train_rm
import train_sft
from nanorlhf.runtime import plots
from nanorlhf.runtime.locks import LOCK_FILE

HANGS_AFTER = 60  # seconds


# Bytes that a case may ask for; more is an error of its own, not of the machine.
MEMORY = 8 * 2**30


TIMES = ("seconds", "tokens_per_second", "peak_memory")


# ---------------------------------------------------------------------------------------- the cases


KINDS = [
    fuzz_files.cases_of_files,
    fuzz_flags.cases_of_numbers,
    fuzz_flags.cases_of_choices,
    fuzz_flags.cases_of_paths,
    fuzz_flags.cases_of_other_names,
    fuzz_files.cases_of_formats,
    fuzz_flags.cases_of_texts,
    fuzz_flags.cases_of_rewards,
    fuzz_flags.cases_of_environment,
    fuzz_files.cases_of_code,
    fuzz_files.cases_of_checkpoints,
    fuzz_flags.cases_of_finished_runs,
    fuzz_flags.cases_of_numerics,
    fuzz_files.cases_of_adapters,
    fuzz_files.cases_of_human_latents,
    fuzz_files.cases_of_autoencoders,
    fuzz_files.cases_of_reward_models,
    fuzz_files.cases_of_contents,
    fuzz_flags.cases_of_predicates,
    fuzz_flags.cases_of_endpoints,
]


def all_cases():
    """Every case there is, by run and kind. Each name is found once."""
    found = {}
    for run in RUNS.values():
        for kind in KINDS:
            for case in kind(run):
                case.name = f"{run.name} '{case.name}'"
                case.kind = kind.__name__
                found.setdefault(case.name, case)
    return list(found.values())


def choose(cases, n, seed):
    """n cases in random order, 0: all.

    Of a kind that has four times as many, twice as many are taken.
    """
    rng = random.Random(seed)
    groups = defaultdict(list)
    for case in cases:
        groups[case.kind, case.expected == "any"].append(case)
    # The i-th of a kind's m cases has a place of about i / sqrt(m).
    places = {}
    for group in groups.values():
        rng.shuffle(group)
        for i, case in enumerate(group):
            places[case.name] = (i + rng.random()) / math.sqrt(len(group))
    chosen = sorted(cases, key=lambda case: places[case.name])
    return chosen[: n or None]


# ------------------------------------------------------------------------------------- running them


def prepare_process():
    """Import what the scripts import when it is needed, so that no fork does; draw no pictures."""
    import datasets  # noqa: F401
    import transformers.models.mamba.modeling_mamba  # noqa: F401

    sys.dont_write_bytecode = True
    for script in (train_sft, train_rm, train_ppo, sample_bon):
        script.plot_run = lambda run: None
    plots.save = lambda draw, what, path: None
    with torch.no_grad():
        model = AutoModelForCausalLM.from_config(small_config())
        model(torch.zeros(1, 3, dtype=torch.long))
    torch.optim.AdamW(model.parameters())


def in_fork(function, stderr):
    """Call a function in a fork with its stderr in a file. -> the fork's id"""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        redirect(stderr)
        torch.set_num_threads(1)
        function()
        code = 0
    except SystemExit as e:
        code = e.code
        # As Python ends: None is 0, and a text is 1.
        if not isinstance(code, int):
            code = int(code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stderr.flush()
        finally:
            os._exit(code)


def redirect(stderr):
    """This process's stderr into a file; what it prints goes nowhere, and it can read nothing."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")


def copy_material(material: Path, here: Path):
    """The material in a new folder: linked, but for the logs, which scripts write into."""
    for folder, _, names in os.walk(material):
        place = here / os.path.relpath(folder, material)
        place.mkdir()
        for name in names:
            source = os.path.join(folder, name)
            if name.endswith(".jsonl"):
                shutil.copy2(source, place / name)
            else:
                os.link(source, place / name)


def tree(here: Path):
    """{path: what is there} of a folder, by sizes and times. Lock files are no content."""
    found = {}
    for folder, folders, names in os.walk(here):
        for name in folders:
            path = os.path.join(folder, name)
            found[path] = "folder"
            if os.path.islink(path):
                found[path] = os.readlink(path)
        for name in names:
            path = os.path.join(folder, name)
            stat = os.lstat(path)
            if name != LOCK_FILE:
                found[path] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found


def numbers_in(value):
    """All numbers of a JSON value in their order, but times and memory."""
    if isinstance(value, dict):
        for name, part in value.items():
            # The data's own row is no result: it may have more columns.
            if name != "row" and not name.startswith(TIMES):
                yield from numbers_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from numbers_in(part)
    elif isinstance(value, (int, float)):
        yield float(value)


def results_of(path: Path):
    """The numbers that a run left, {file: list}: of its JSON files, and sums over its tensors."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    found = {}
    for file in files:
        if not file.is_file():
            continue
        name = str(file.relative_to(path))
        # Settings are no results, nor is what only this machine knows of a tokenizer.
        inside = Path(name).parts[:1]
        if file.name == "config.json" or inside in (("cache",), ("checkpoint",)):
            continue
        if file.suffix == ".jsonl":
            found[name] = list(numbers_in(read_rows(file)))
        elif file.suffix == ".json" and not file.name.startswith(("tokenizer", "adapter")):
            found[name] = list(numbers_in(json.loads(file.read_text())))
        elif file.suffix == ".safetensors":
            tensors = load_file(file)
            found[name] = [tensors[key].double().abs().sum().item() for key in sorted(tensors)]
    return found


def same_results(a, b):
    """Where two results differ; "" where they do not."""
    if a.keys() != b.keys():
        return f"other files: {', '.join(sorted(a.keys() ^ b.keys()))}"
    for name in a:
        if len(a[name]) != len(b[name]) or not all(map(same_number, a[name], b[name])):
            return f"other numbers in {name}"
    return ""


def same_number(x, y):
    if math.isnan(x) or math.isnan(y):
        return math.isnan(x) and math.isnan(y)
    return math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-6)


def last_line(text):
    """The last line that is not blank."""
    for line in reversed(text.splitlines()):
        if line.strip():
            return line
    return ""


def last_place(text):
    """FILE:LINE of the last frame of a traceback in the project; "" where there is none."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', text)
    for file, line in reversed(frames):
        if file.startswith(f"{REPO}/") and "/tests/" not in file:
            return f"{os.path.relpath(file, REPO)}:{line}"
    return ""


@dataclass
class Outcome:
    case: Case
    problem: str  # "" where the case ended as it should
    how: str  # exit 0, exit 2, a signal ...
    line: str = ""  # the last one on stderr
    place: str = ""  # FILE:LINE of the traceback's last frame in the project
    seconds: float = 0.0


class Fuzzer:
    """Runs cases, two at a time, on material that is made once."""

    def __init__(self, root: Path, workers=2):
        self.root = root
        self.workers = workers
        self.material = root / "material"
        self.expected = {}  # {run: its results}
        self.count = 0
        self.material.mkdir(parents=True)
        stderr = root / "material.txt"
        child = in_fork(lambda: make_material(self.material), stderr)
        _, status = os.waitpid(child, 0)
        assert status == 0, stderr.read_text()
        shutil.copytree(self.material / "done_ppo", self.material / "no_gold")
        without_gold(self.material / "no_gold")
        self.made = tree(self.material)

    def results(self, run):
        """What a run gives on the undamaged material, the second of two equal ones."""
        if run.name not in self.expected:
            case = Case(f"{run.name} 'undamaged'", run, "right")
            outcome = self.run_all([case])[0]
            assert not outcome.problem, (outcome.problem, outcome.line, outcome.place)
        return self.expected[run.name]

    def run_all(self, cases, show=lambda outcome: None, seconds=math.inf):
        """Run cases until they are done or time is up. -> outcomes"""
        waiting = list(reversed(cases))
        running = {}  # {process id: its case, folder, what was in it, when it began}
        outcomes = []
        end = time.monotonic() + seconds
        while running or (waiting and time.monotonic() < end):
            # Start cases until all workers have one.
            while waiting and len(running) < self.workers and time.monotonic() < end:
                case = waiting.pop()
                if case.expected in ("equal", "sound", "failed or equal"):
                    self.results(case.run)
                child, here, before = self.start(case)
                running[child] = (case, here, before, time.monotonic())

            # Judge those that have ended, and end those that hang.
            for child, (case, here, before, begun) in list(running.items()):
                done, status = os.waitpid(child, os.WNOHANG)
                took = time.monotonic() - begun
                hangs = not done and took > HANGS_AFTER
                if hangs:
                    os.kill(child, signal.SIGKILL)
                    _, status = os.waitpid(child, 0)
                if done or hangs:
                    del running[child]
                    outcome = self.judge(case, here, before, status, hangs)
                    outcome.seconds = took
                    outcomes.append(outcome)
                    show(outcome)
                    shutil.rmtree(here.parent, ignore_errors=True)
            time.sleep(0.005)
        return outcomes

    def start(self, case):
        """Copy the material, damage it, and run the case in a fork.

        -> the fork's id, its folder, and what is in the folder before it runs
        """
        self.count += 1
        place = self.root / f"case_{self.count}"
        place.mkdir()
        here = place / "here"
        copy_material(self.material, here)
        case.damage(here, random.Random(case.name))
        before = tree(here)

        def play():
            os.chdir(here)
            os.environ.update(escaped(case.environment))
            limit_memory()
            before_case = case.before or case.run.before
            port = before_case()
            words = case.words
            if words is None:
                words = case.run.words()
            places = {"{here}": str(here), "{endpoint}": f"http://127.0.0.1:{port}/v1"}
            words = [fill_in(word, places) for word in words]
            run_words(case.run.script.split()[0], words)

        return in_fork(play, place / "stderr.txt"), here, before

    def judge(self, case, here, before, status, hangs):
        """What is wrong with how a case ended."""
        text = (here.parent / "stderr.txt").read_text(errors="replace")
        code = os.waitstatus_to_exitcode(status)
        outcome = Outcome(case, "", f"exit {code}", last_line(text), last_place(text))
        outcome.problem = "hangs"
        if not hangs:
            outcome.problem = self.problem(case, here, before, code, text)
        if tree(self.material) != self.made:
            outcome.problem += " (the material itself was changed)"
            self.made = tree(self.material)
        return outcome

    def problem(self, case, here, before, code, text):
        after = tree(here)
        never = what_may_never_be(case, before, after, code, text)
        if never:
            return never
        where = here / (case.writes or case.run.writes)
        if case.expected == "right":
            self.expected[case.run.name] = results_of(where)
            return "" if code == 0 else f"undamaged, but exit {code}"
        if code not in (0, 1, 2):
            return f"wrong exit code {code}"

        keeps = case.run.name.startswith(KEEP)
        if case.expected == "any":
            if code == 2 and not keeps:
                return changes(before, after, late=True)
            return ""
        if case.expected == "stopped":
            return "" if code == 2 else f"accepted (exit {code})"
        if case.expected == "refused" or (case.expected == "sound" and code == 2):
            if code != 2:
                return f"accepted (exit {code})"
            return changes(before, after, late=keeps and case.kind in LATE)

        # "equal", "sound" and "failed or equal": the numbers must be those of the undamaged run.
        if case.expected == "failed or equal" and code == 1:
            return ""
        if code:
            return "refused what is right"
        return same_results(results_of(where), self.results(case.run))


def what_may_never_be(case, before, after, code, text):
    """What no case may end with, whatever it expects; "" where there is nothing of the kind."""
    if "Traceback (most recent call last)" in text:
        return "traceback"
    if code < 0:
        return f"ended by signal {-code}"
    new = [path for path in after if path not in before]
    if any(os.path.basename(path) == "the_code_was_run" for path in after):
        return "ran the model folder's code"
    if SECRET in text or any(map(shows_secret, new)):
        return "shows the secret"
    line = last_line(text)
    script = case.run.script.split()[0]
    is_error = code in (1, 2) and line.startswith(f"{script}: error: ")
    if code and not is_error and f"{script} [rank" not in line:
        return "no error in the last line"
    return ""


# Runs that keep answers and scores as they come, whatever fails after them; and what may fail then.
KEEP = ("bon", "judge")


LATE = {"cases_of_files", "cases_of_code", "cases_of_reward_models", "cases_of_rewards"}
LATE |= {"cases_of_texts", "cases_of_paths"}


def changes(before, after, late=False):
    """What a refused run changed in its folder; "" where that is nothing.

    late: it may leave new files, and another config.json.
    """
    for path in before:
        name = os.path.basename(path)
        if after.get(path) != before[path] and not (late and name == "config.json"):
            return f"refused, but changed {name}"
    for path in after:
        if path not in before and not late:
            return f"refused, but left {'/'.join(path.split('/')[-2:])}"
    return ""


def shows_secret(path):
    try:
        return SECRET.encode() in Path(path).read_bytes()
    except OSError:
        return False


def fill_in(word, places):
    """A word of a command line as a shell hands it to Python: bytes, whatever they are."""
    for name, value in places.items():
        word = word.replace(name, value)
    return os.fsdecode(os.fsencode(word))


def escaped(environment):
    """Variables as a shell hands them over: bytes, whatever they are."""
    variables = {}
    for name, value in environment.items():
        variables[name] = value.encode("utf-8", "surrogateescape").decode(
            "utf-8", "surrogateescape"
        )
    return variables


def limit_memory():
    """No core is dumped, and a case may ask for MEMORY more than the process has."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * 4096 + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# --------------------------------------------------------------------------------------- the report


def table(outcomes):
    """How many cases ended how, by what they expected."""
    counts = Counter((o.case.expected, o.problem or "as it should") for o in outcomes)
    lines = [f"{'expected':18s}{'outcome':44s}cases"]
    for (expected, problem), n in sorted(counts.items()):
        lines.append(f"{expected:18s}{problem[:42]:44s}{n:5d}")
    return "\n".join(lines)


def by_cause(outcomes):
    """Failures together that share a place, or else a problem. -> lines"""
    groups = defaultdict(list)
    for outcome in outcomes:
        if outcome.problem:
            groups[outcome.problem, outcome.place].append(outcome)
    lines = []
    for (problem, place), group in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(f"\n{len(group):4d}  {problem}  {place}")
        for outcome in sorted(group, key=lambda o: o.case.name):
            lines.append(f"      {outcome.case.name} [{outcome.how}, {outcome.seconds:.1f} s]")
            lines.append(f"          {outcome.line[:200]}")
    return lines


def make_fuzzer(folder=None, workers=2):
    root = Path(tempfile.mkdtemp(prefix="fuzz_", dir=folder))
    prepare_process()
    return Fuzzer(root, workers)


def read_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--n", type=int, default=2000, help="how many cases; 0: all")
    add("--seed", type=int, default=0, help="which of them, and in what order")
    add("--only", default="", help="a regular expression for their names")
    add("--workers", type=int, default=2, help="cases at a time")
    add("--folder", type=os.path.abspath, help="where temporary files go")
    add("--report", help="write the failures, by cause, into this file, as they come")
    add("--list", action="store_true", help="print the names and stop")
    add("--undamaged", action="store_true", help="only the runs that cases are made of")
    return parser.parse_args()


def main():
    args = read_flags()
    cases = [case for case in all_cases() if re.search(args.only, case.name)]
    if args.list:
        for case in cases:
            print(f"{case.expected:16s} {case.name}")
        return
    chosen = choose(cases, args.n, args.seed)
    print(f"{len(chosen)} of {len(cases)} cases", flush=True)
    fuzzer = make_fuzzer(args.folder, args.workers)
    if args.undamaged:
        for run in RUNS.values():
            print(run.name, list(fuzzer.results(run)), flush=True)
        return

    outcomes = []

    def show(outcome):
        outcomes.append(outcome)
        if outcome.problem:
            print(f"{outcome.problem}: {outcome.case.name} [{outcome.how}]", flush=True)
            print(f"    {outcome.place} {outcome.line[:200]}", flush=True)
        if args.report and len(outcomes) % 50 == 0:
            write_report(args.report, outcomes)

    fuzzer.run_all(chosen, show)
    if args.report:
        write_report(args.report, outcomes)
    print(table(outcomes), *by_cause(outcomes), sep="\n")
    shutil.rmtree(fuzzer.root)
    sys.exit(any(outcome.problem for outcome in outcomes))


def write_report(path, outcomes):
    lines = [f"{len(outcomes)} cases\n", table(outcomes), *by_cause(outcomes)]
    Path(path).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

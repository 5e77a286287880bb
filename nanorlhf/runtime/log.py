"""What a run leaves behind and shows while it runs.

RunFolder is the folder of a run: config.json, metrics.jsonl, samples.jsonl, eval/, summary.json
and, while the run is unfinished, checkpoint/. Progress is its progress line; the functions at the
end make its tables. Only the main process, rank 0, writes and prints.
"""

import contextlib
import os
import re
import shutil
import sys
import time

from tqdm import tqdm

from ..errors import InputError, require
from . import checkpoint
from .files import (
    append_lines,
    check_name,
    digest_start,
    is_inside,
    read_checked_lines,
    read_object,
    read_rows,
    replace_folder,
    write_json,
    write_lines,
)
from .fingerprints import changed_inputs, fingerprint_inputs, input_paths
from .fsdp import is_sharded, whole
from .locks import LOCK_FILE, lock, unlock_afterwards
from .settings import PLACES, as_json, read_config, settings_that_differ

LOGS = ("metrics.jsonl", "samples.jsonl")  # they grow by rows {step, ...}

# What a kill leaves in the folder of a run that had not begun.
BEFORE_A_RUN = {"config.json.tmp", LOCK_FILE}


class RunFolder:
    """One run's folder. Its `status` is 'new', 'unfinished' (the run will be continued) or 'done'.

        folder = RunFolder(config, dist)    look at the folder, and lock it
        folder.create(state)                begin, or go on from a checkpoint's state
        folder.append(...)                  while the run goes on; also write_eval, checkpoint
        folder.finish(summary)              the run is done

    The settings named in `free` may differ from those of the run that is in the folder. No other
    process can write into the folder until the function ends that locks.unlock_afterwards()
    decorates; a new folder that is still empty then is removed. A run that is done is only read,
    and not locked, unless it is `written_again`. InputError: the folder holds a run with other
    settings, or something else, or another process is working in it.
    """

    # ------------------------------------------------------------------------------- before the run

    def __init__(self, config, dist, free=PLACES, written_again=False):
        self.path = config.output_dir
        self.dist = dist
        self.config = as_json(config)
        # Settings that make it this run; files that they name must not change.
        self.fixed = {}
        for name, value in self.config.items():
            if name not in free:
                self.fixed[name] = value

        dist.together(self.check_place)
        # A folder that holds something else is refused before a lock file is put into it.
        dist.on_main(lambda: self.claim(config, free, written_again))
        # Once more, on all processes: another run may have ended between the look and the lock.
        dist.together(lambda: self.find_status(config, free))
        if self.status == "new" and getattr(config, "resume", False):
            dist.print(f"{self.path}: nothing to resume, the run starts from the beginning")
        self.check_inputs()
        dist.barrier()  # every process has looked before one writes

    def check_place(self):
        """InputError where no run can be written."""
        check_name(self.path)
        # What is written into a folder changes it, and a run whose inputs change cannot be resumed.
        for path in input_paths(self.fixed):
            require(
                not is_inside(self.path, path),
                f"{self.path} lies in {path}, which this run reads; choose another --output_dir",
            )
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise InputError(f"{self.path}: the output folder is a file")

    def claim(self, config, free, written_again: bool):
        """Find the status, and lock the folder if this run will write into it."""
        self.find_status(config, free)
        if self.status != "done" or written_again:
            lock(self.path)

    def find_status(self, config, free):
        """Set `status` by what is in the folder. InputError: another run, or something else."""
        self.status = "new"
        self.inputs = {}  # fingerprints of the files that `fixed` names
        if not os.path.isdir(self.path):
            return

        # A run writes config.json first and summary.json last.
        stored = os.path.join(self.path, "config.json")
        if os.path.isfile(stored):
            self.inputs = read_config(stored)["inputs"]
            changed = settings_that_differ(stored, config, free)
            if changed:
                raise InputError(
                    f"{self.path} already holds another run (it differs in {', '.join(changed)}); "
                    "choose another --output_dir"
                )
            self.status = "unfinished"
            if os.path.isfile(os.path.join(self.path, "summary.json")):
                self.status = "done"
            self.check_entries()
        elif set(os.listdir(self.path)) - BEFORE_A_RUN:
            raise InputError(
                f"{self.path} is not empty and holds no run; choose another --output_dir"
            )

    def check_entries(self):
        """InputError where a file of the run is a folder, or the other way round."""
        again = "remove it, and give the same command again"
        for name in os.listdir(self.path):
            path = os.path.join(self.path, name)
            is_folder = os.path.isdir(path)
            if re.fullmatch(r"eval(_[\w-]+)?", name) and not is_folder:
                raise InputError(f"{path} should be a folder; {again}")
            if name in ("summary.json", *LOGS) and is_folder:
                raise InputError(f"{path} should be a file; {again}")

    def check_inputs(self):
        """InputError where a file that the settings name is not as it was at an earlier look.

        All processes call this; the main one looks.
        """
        self.dist.on_main(self.compare_inputs)

    def compare_inputs(self):
        """Compare the fingerprints of inputs with those in `inputs`, and add the new ones to it."""
        now = fingerprint_inputs(self.fixed, self.inputs)
        for name in changed_inputs(self.inputs, now):
            raise InputError(
                f"{name} has changed since the run in {self.path} began; put its old content "
                "back, choose another --output_dir or, to go on with the new content, delete "
                f"its entry in {self.path}/config.json"
            )
        self.inputs |= now

    # ----------------------------------------------------------------------- while the run goes on

    def write_config(self):
        """Make the folder, and put the run's settings and fingerprints of its inputs into it."""
        # Once more: a default model may have been trained since the first look, a hub model loaded.
        self.check_inputs()
        if self.dist.main:
            os.makedirs(self.path, exist_ok=True)
            content = {**self.config, "inputs": self.inputs}
            write_json(os.path.join(self.path, "config.json"), content)

    def create(self, state: dict | None = None):
        """Make the folder, and in an unfinished run drop what was logged after its checkpoint.

        state: the checkpoint's. None, or one of step 0: there is no checkpoint, and all is dropped.
        """
        self.write_config()
        if self.dist.main:
            self.drop_what_came_after(state or {"step": 0})

    def drop_what_came_after(self, state: dict):
        """Cut the logs, and remove evaluations, to what there was at the checkpoint `state`."""
        for name in LOGS:
            path = os.path.join(self.path, name)
            # A checkpoint knows how long the logs were.
            if "logs" in state:
                os.truncate(path, state["logs"][name]["size"])
            else:
                write_lines(path, [])

        # The resumed run makes later evaluations again.
        for files in find_evaluations(self.path).values():
            for step, file in files.items():
                if step > state["step"]:
                    os.remove(file)

    def append(self, name: str, rows):
        """Append JSON rows to a .jsonl file of the run."""
        if self.dist.main:
            append_lines(os.path.join(self.path, name), rows)

    def write_eval(self, step: int, rows, label: str = "eval"):
        """Write eval/step_{N}.jsonl: one row for the answer to each held-out prompt.

            {prompt, response, scores: {name: x}, gold, prompt_ids, response_ids[, tokens]}

        The file of a further split (splits.read_eval_splits) is eval_{label}/step_{N}.jsonl.
        """
        if self.dist.main:
            folder = os.path.join(self.path, eval_folder(label))
            os.makedirs(folder, exist_ok=True)
            write_lines(os.path.join(folder, f"step_{step}.jsonl"), rows)

    def checkpoint(self, step, module, optimizer, state, keep, more=None):
        """Write an atomic checkpoint, after the metrics of its step; see checkpoint.py.

        All processes call this.
        """
        if self.dist.main:
            # The logs must be on disk before a checkpoint says how long they are.
            logs = {}
            for name in LOGS:
                path = os.path.join(self.path, name)
                with open(path, "a") as f:
                    os.fsync(f.fileno())
                size = os.path.getsize(path)
                logs[name] = {"size": size, "sha256": digest_start(path, size)}
            state = {**state, "logs": logs}
        # With shards every process writes its own. Without them all processes hold the same.
        if self.dist.main or is_sharded(module):
            checkpoint.save(self.path, step, module, optimizer, state, keep, self.dist, more)
        self.dist.barrier()

    def records(self) -> list[dict]:
        """The rows of metrics.jsonl."""
        # Nobody reads before the main process has written all rows.
        self.dist.barrier()
        return read_rows(os.path.join(self.path, "metrics.jsonl"), {"step": int})

    # ----------------------------------------------------------------------------------- at its end

    def save_model(self, save, module, tokenizer):
        """save(module, tokenizer, folder) into model/, atomically.

        All processes call this, since shards must be gathered first.
        """

        def write(path):
            save(module, tokenizer, path)

        with whole(module, self.dist.main):
            if self.dist.main:
                replace_folder(os.path.join(self.path, "model"), write)
        self.dist.barrier()

    def before_and_after(self, labels: list[str]) -> dict:
        """The evaluations of the first and of the last step: a run's summary.

        labels: the names of the splits, "eval" first. A metric of the first split is called "kl",
        say, that of a further one "ood/kl".
        """
        records = self.records()
        prefixes = tuple(f"{label}/" for label in labels)
        summary = {"steps": records[-1]["step"]}
        for name, record in (("before", records[0]), ("after", records[-1])):
            evaluations = {}
            for key, value in record.items():
                if key.startswith(prefixes):
                    evaluations[key.removeprefix("eval/")] = value
            summary[name] = evaluations
        return summary

    def finish(self, summary: dict) -> dict:
        """Write summary.json, which makes the run done, and remove its checkpoints.

        Returns the summary.
        """
        # The summary comes first. A kill in between leaves a run that is done, and already_done()
        # removes its checkpoints.
        if self.dist.main:
            write_json(os.path.join(self.path, "summary.json"), summary)
        self.remove_checkpoints()
        self.dist.barrier()
        return summary

    def already_done(self) -> dict:
        """Say that the run is done. Returns its summary."""
        self.dist.print(
            f"{self.path}: this run is done already (for another one choose another --output_dir)"
        )
        summary = read_object(os.path.join(self.path, "summary.json"), finite=False)
        # A kill may have left checkpoints, which stay if the summary is damaged.
        self.remove_checkpoints()
        # A lock file that it left goes when it is given back, unless somebody works here.
        if self.dist.main and os.path.exists(os.path.join(self.path, LOCK_FILE)):
            with contextlib.suppress(InputError), unlock_afterwards():
                lock(self.path)
        return summary

    def remove_checkpoints(self):
        """Remove the checkpoints: a finished run has no use for them."""
        if self.dist.main:
            shutil.rmtree(os.path.join(self.path, "checkpoint"), ignore_errors=True)


# -------------------------------------------------------------------------------- files of answers


def eval_folder(label: str) -> str:
    """The folder of a split's answers: eval of the first split, eval_{label} of a further one."""
    if label == "eval":
        return "eval"
    return f"eval_{label}"


def find_evaluations(folder: str) -> dict[str, dict[int, str]]:
    """{split: {step: its file of answers}} of a run: the folder eval_ood is of the split ood."""
    files_of_splits = {}
    for name in os.listdir(folder):
        split = re.fullmatch(r"eval(?:_([\w-]+))?", name)
        if not split or not os.path.isdir(os.path.join(folder, name)):
            continue
        label = split[1] or "eval"
        for file in os.listdir(os.path.join(folder, name)):
            step = re.fullmatch(r"step_(0|[1-9][0-9]*)\.jsonl", file)
            if step:
                files = files_of_splits.setdefault(label, {})
                files[int(step[1])] = os.path.join(folder, name, file)
    return files_of_splits


def read_eval(path: str, n: int, vocabulary: int) -> list[dict]:
    """The n answers in a file of RunFolder.write_eval().

    InputError: the file has another number of answers, or is damaged.
    """
    require(os.path.isfile(path), f"{path}: no such file")

    # An embedding raises an error for an id out of range, but that error names no file.
    def are_ids(value):
        is_list = isinstance(value, list) and len(value) > 0
        return is_list and all(type(i) is int and 0 <= i < vocabulary for i in value)

    def is_answer(i, row):
        if not isinstance(row, dict):
            return False
        # A prompt is a string, or a chat: a list of messages.
        if not isinstance(row.get("prompt"), str | list):
            return False
        if not isinstance(row.get("response"), str):
            return False
        return are_ids(row.get("prompt_ids")) and are_ids(row.get("response_ids"))

    rows = read_checked_lines(path, is_answer, "restore it from a copy")
    require(len(rows) == n, f"{path}: {len(rows)} answers, and {n} in metrics.jsonl")
    return rows


# ----------------------------------------------------------------------------------- progress line


def is_long(seconds: float, done: int, left: int) -> bool:
    """Whether a run that has made some steps in so many seconds has over an hour to go.

    Its first steps are slower than the others, so nothing is said in the first minute.
    """
    return seconds > 60 and left * seconds / done > 3600


class Progress:
    """A tqdm bar on a terminal.

    Elsewhere it is a plain line every few seconds, so that log files stay readable. A long run on a
    GPU that trains without --compile (compiled=False) prints one line that recommends it.
    """

    def __init__(self, dist, name: str, steps: int, start: int = 0, compiled: bool = True):
        self.name = name
        self.steps = steps
        self.start = start
        self.recommends_compile = not compiled and dist.device.type == "cuda"
        self.begun = time.monotonic()
        self.last = float("-inf")  # when the last plain line was printed
        self.quiet = not dist.main
        self.tty = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps,
            initial=start,
            desc=name,
            disable=self.quiet or not self.tty,
            dynamic_ncols=True,
        )

    def step(self, step: int, text: str):
        """Show that `step` is done."""
        if self.quiet:
            return
        now = time.monotonic()
        if self.recommends_compile:
            self.recommend_compile(now - self.begun, step)

        if self.tty:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
            return

        # The last step is printed at once.
        if now - self.last > 5 or step == self.steps:
            self.last = now
            seconds = f"{now - self.begun:.0f} s"
            line = f"{self.name} {step}/{self.steps} [{seconds}] {text}"
            print(line, file=sys.stderr, flush=True)

    def recommend_compile(self, seconds: float, step: int):
        """Print once that --compile would make the steps of a long run faster."""
        if is_long(seconds, step - self.start, self.steps - step):
            self.recommends_compile = False
            line = (
                f"{self.name}: this run will take over an hour; in a new --output_dir, "
                "--compile true makes whole steps faster, PPO's rollouts too, after a minute of "
                "warm-up"
            )
            tqdm.write(line, file=sys.stderr)

    def close(self):
        self.bar.close()


# ------------------------------------------------------------------------------------------- tables


def sample_table(rows: list[dict], width: int = 110) -> str:
    """Rows {prompt, response, **numbers} as readable text, with a line for each turn."""
    lines = []
    for row in rows:
        lines += prompt_lines(row["prompt"], width)
        lines.append(f"    {cut_end(in_one_line(row['response']), width)}")

        numbers = []
        for name, value in row.items():
            if isinstance(value, float):
                numbers.append(f"{name} {value:+.2f}")
        if numbers:
            lines.append("    " + "  ".join(numbers))
    return "\n".join(lines)


def prompt_lines(prompt: str | list[dict[str, str]], width: int) -> list[str]:
    """A prompt, a text or a chat, as lines of a table: the words that were said."""
    if isinstance(prompt, str):
        # A text goes on where its end is.
        return [f"  > {in_one_line(prompt)[-width:]}"]

    # What a single turn asks is clear without saying who asks it.
    if len(prompt) == 1:
        return [f"  > {cut_end(in_one_line(prompt[0]['content']), width)}"]
    lines = []
    for message in prompt:
        words = cut_end(in_one_line(message["content"]), width)
        lines.append(f"  > {message['role']}: {words}")
    return lines


def in_one_line(text: str) -> str:
    """A text with single spaces in the place of its line breaks and other white space."""
    return " ".join(text.split())


def cut_end(text: str, width: int) -> str:
    """The beginning of a text that is too long, marked as such."""
    if len(text) <= width:
        return text
    return text[:width] + "..."


def before_and_after_table(summary: dict, names: list[str]) -> str:
    """What RunFolder.before_and_after() found, as readable text: one line for each of the names."""
    before = summary["before"]
    after = summary["after"]
    n = after[f"{names[0]}_n"]
    lines = [
        f"\nBefore and after {summary['steps']} steps, on {n} held-out prompts "
        "(mean +- standard error):"
    ]
    for name in names:
        if name not in after:
            continue
        first = with_error(before, name)
        last = with_error(after, name)
        lines.append(f"  {name:11s}{first}  ->  {last}")
    return "\n".join(lines)


def with_error(evaluation: dict[str, float], name: str) -> str:
    """A metric and its standard error."""
    value = evaluation[name]
    error = evaluation[f"{name}_se"]
    return f"{value:6.2f} +- {error:.2f}"

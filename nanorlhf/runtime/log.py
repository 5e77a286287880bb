"""Run folders: config.json, metrics.jsonl, samples.jsonl, eval/, summary.json; a progress line and sample tables on rank 0."""

import dataclasses
import json
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
    check_fields,
    check_name,
    digest_start,
    read_checked_lines,
    read_object,
    read_rows,
    replace_folder,
    write_json,
    write_lines,
)
from .fingerprints import FINGERPRINT, changed_inputs, fingerprint_inputs
from .fsdp import is_sharded, whole
from .locks import LOCK_FILE, lock

# Fields that do not make it another run: results are the same, some up to float error.
PLACES = ("output_dir", "resume", "device", "distributed", "checkpoint_activations", "micro_batch_size", "tokens_per_micro_batch")
LOGS = ("metrics.jsonl", "samples.jsonl")  # they grow by rows {step, ...}

# What a kill leaves in the folder of a run that had not begun.
BEFORE_A_RUN = {"config.json.tmp", LOCK_FILE}


class RunFolder:
    """One run's folder. `state` is 'new', 'unfinished' (it will be continued) or 'done'; another config in it is an error.

    Fields in `free` may differ. No other process can write into the folder until the function ends
    that locks.unlock_afterwards() decorates; a new folder that is still empty then is removed. A
    run that is done is only read, and not locked, unless it is `written_again`. InputError: another
    process is working in the folder.
    """

    def __init__(self, config, dist, free=PLACES, written_again=False):
        self.path, self.dist = config.output_dir, dist
        self.config = json.loads(json.dumps(dataclasses.asdict(config)))
        self.named = {k: v for k, v in self.config.items() if k not in free}

        def claim():
            self.find_state(config, free)
            if self.state != "done" or written_again:
                lock(self.path)

        dist.together(lambda: claim() if dist.main else None)
        # Once more, on all processes: another run may have ended between the look and the lock.
        dist.together(lambda: self.find_state(config, free))
        if self.state == "new" and getattr(config, "resume", False):
            dist.print(f"{self.path}: nothing to resume, the run starts from the beginning")
        self.check_inputs()
        dist.barrier()  # every process has looked before one writes

    def find_state(self, config, free):
        """Set `state` by what is in the folder. InputError: another run, or something else."""
        check_name(self.path)
        self.state = "new"
        self.inputs = {}  # fingerprints of what `named` names
        stored = os.path.join(self.path, "config.json")
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise InputError(f"{self.path}: the output folder is a file")
        if os.path.isfile(stored):
            self.inputs = read_config(stored)["inputs"]
            changed = settings_that_differ(stored, config, free)
            if changed:
                raise InputError(f"{self.path} already holds another run (it differs in {', '.join(changed)}); choose another --output_dir")
            self.state = "done" if os.path.isfile(os.path.join(self.path, "summary.json")) else "unfinished"
            for name in os.listdir(self.path):
                path = os.path.join(self.path, name)
                if re.fullmatch(r"eval(_[\w-]+)?", name) and not os.path.isdir(path):
                    raise InputError(f"{path} should be a folder; remove it, and give the same command again")
                if name in ("summary.json", *LOGS) and os.path.isdir(path):
                    raise InputError(f"{path} should be a file; remove it, and give the same command again")
        elif os.path.isdir(self.path) and set(os.listdir(self.path)) - BEFORE_A_RUN:
            raise InputError(f"{self.path} is not empty and holds no run; choose another --output_dir")

    def check_inputs(self):
        """An error where a file that the settings name has another content than at an earlier look.

        All processes call this; the main one looks.
        """

        def look():
            now = fingerprint_inputs(self.named, self.inputs)
            for name in changed_inputs(self.inputs, now):
                raise InputError(
                    f"{name} has changed since the run in {self.path} began; put its old content "
                    "back, choose another --output_dir or, to go on with the new content, delete "
                    f"its entry in {self.path}/config.json"
                )
            self.inputs |= now

        self.dist.together(look if self.dist.main else lambda: None)

    def write_config(self):
        """Make the folder, and put into it what the run is: its settings, and fingerprints of inputs."""
        # Once more: a default model may have been trained since the first look, a hub model loaded.
        self.check_inputs()
        if self.dist.main:
            os.makedirs(self.path, exist_ok=True)
            content = {**self.config, "inputs": self.inputs}
            write_json(os.path.join(self.path, "config.json"), content)

    def create(self, state=None):
        """Make the folder; in an unfinished run drop what was logged after its checkpoint, `state`.

        Without a checkpoint, which is None or step 0, that is everything.
        """
        self.write_config()
        if not self.dist.main:
            return
        state = state or {"step": 0}
        step = state["step"]
        logs = state.get("logs", {})
        for name in LOGS:
            path = os.path.join(self.path, name)
            if name in logs:
                os.truncate(path, logs[name]["size"])
            elif step > 0:  # a checkpoint that is older than these sizes
                write_lines(path, rows_until(path, step))
            else:
                write_lines(path, [])
        for name in os.listdir(self.path):
            if name == "eval" or name.startswith("eval_"):  # eval_folder() of each split
                remove_later(os.path.join(self.path, name), step)

    def append(self, name, rows):
        """Append JSON rows to a .jsonl file of the run."""
        if self.dist.main:
            append_lines(os.path.join(self.path, name), rows)

    def write_eval(self, step, rows, label="eval"):
        """eval/step_{N}.jsonl: one row {prompt, response, scores: {name: x}, gold, prompt_ids, response_ids} for each held-out prompt.

        Of a further split (splits.labels) eval_{label}/step_{N}.jsonl.
        """
        if self.dist.main:
            folder = os.path.join(self.path, eval_folder(label))
            os.makedirs(folder, exist_ok=True)
            write_lines(os.path.join(folder, f"step_{step}.jsonl"), rows)

    def checkpoint(self, step, module, optimizer, state, keep, more=None):
        """An atomic checkpoint, after the metrics of its step are on disk; see checkpoint.py. All processes call it."""
        if self.dist.main:
            logs = {}
            for name in LOGS:
                path = os.path.join(self.path, name)
                with open(path, "a") as f:
                    os.fsync(f.fileno())
                size = os.path.getsize(path)
                logs[name] = {"size": size, "sha256": digest_start(path, size)}
            state = {**state, "logs": logs}
        if self.dist.main or is_sharded(module):
            checkpoint.save(self.path, step, module, optimizer, state, keep, self.dist, more)
        self.dist.barrier()

    def records(self):
        """The rows of metrics.jsonl."""
        self.dist.barrier()
        return read_rows(os.path.join(self.path, "metrics.jsonl"), {"step": int})

    def before_and_after(self, labels):
        """The evaluations of the first and of the last step: a run's summary.

        labels: of the splits, "eval" first; the names of further splits stay in front.
        """
        records = self.records()
        prefixes = tuple(f"{label}/" for label in labels)
        summary = {"steps": records[-1]["step"]}
        for name, record in (("before", records[0]), ("after", records[-1])):
            summary[name] = {
                key.removeprefix("eval/"): value
                for key, value in record.items()
                if key.startswith(prefixes)
            }
        return summary

    def already_done(self):
        self.dist.print(f"{self.path}: this run is done already (for another one choose another --output_dir)")
        self.remove_checkpoints()  # a kill may have left them
        return read_object(os.path.join(self.path, "summary.json"), finite=False)

    def save_model(self, save, *args):
        """save(module, ..., folder) into model/, atomically; on all processes, since shards must be gathered first."""
        with whole(*args[:1], main=self.dist.main):
            if self.dist.main:
                replace_folder(os.path.join(self.path, "model"), lambda path: save(*args, path))
        self.dist.barrier()

    def finish(self, summary):
        """summary.json makes the run done; its checkpoints are no longer needed. Returns the summary."""
        if self.dist.main:
            write_json(os.path.join(self.path, "summary.json"), summary)
        self.remove_checkpoints()
        self.dist.barrier()
        return summary

    def remove_checkpoints(self):
        """What a finished run has no use for."""
        if self.dist.main:
            shutil.rmtree(os.path.join(self.path, "checkpoint"), ignore_errors=True)


def read_config(stored: str) -> dict:
    """What is in a run's config.json: settings, and as "inputs" fingerprints of what they name."""
    run = read_object(stored, {"inputs": dict | None}, finite=False)  # a setting may be infinite
    run["inputs"] = run.get("inputs") or {}  # older runs have no fingerprints
    for name, known in run["inputs"].items():
        check_fields(known, FINGERPRINT, f"{stored}: the fingerprint of {name}")
    return run


def settings_that_differ(stored: str, config, free=()) -> list[str]:
    """The names of the settings in which a run's config.json differs from a config.

    A flag that is younger than the run had its default.
    """
    run = read_config(stored)
    run.pop("inputs", None)
    own = json.loads(json.dumps(dataclasses.asdict(config)))
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            run.setdefault(field.name, field.default)
        elif field.default_factory is not dataclasses.MISSING:
            run.setdefault(field.name, field.default_factory())
    return [name for name in {**run, **own} if name not in free and run.get(name) != own.get(name)]


def rows_until(path: str, step: int) -> list[dict]:
    """The rows of a log up to and with a step."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; restore it from a copy, or start the run again")
    return [row for row in read_rows(path, {"step": int}) if row["step"] <= step]


def remove_later(folder: str, last: int):
    """Remove the evaluations of steps after `last`: the resumed run makes them again."""
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        step = re.fullmatch(r"step_(0|[1-9][0-9]*)\.jsonl", name)
        if step and int(step[1]) > last:
            os.remove(os.path.join(folder, name))


def eval_folder(label):
    """The folder of a split's answers, in a run's: eval of the first one, eval_{label} of another."""
    return "eval" if label == "eval" else f"eval_{label}"


def read_eval(path: str, n: int, vocabulary: int) -> list[dict]:
    """The n answers in a file of RunFolder.write_eval(). InputError: they are others, or damaged."""
    require(os.path.isfile(path), f"{path}: no such file")

    def are_ids(value):
        is_list = isinstance(value, list) and len(value) > 0
        return is_list and all(type(i) is int and 0 <= i < vocabulary for i in value)

    def is_answer(i, row):
        texts = [row.get("prompt"), row.get("response")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            return False
        return are_ids(row.get("prompt_ids")) and are_ids(row.get("response_ids"))

    rows = read_checked_lines(path, is_answer, "restore it from a copy")
    require(len(rows) == n, f"{path}: {len(rows)} answers, and {n} in metrics.jsonl")
    return rows


class Progress:
    """A tqdm bar on a terminal; elsewhere a plain line every few seconds, so that log files stay readable."""

    def __init__(self, dist, name, steps, start=0):
        self.name, self.steps, self.begun, self.last = name, steps, time.time(), 0.0
        self.quiet, self.tty = not dist.main, sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=start, desc=name, disable=self.quiet or not self.tty, dynamic_ncols=True)

    def step(self, step, text):
        """Show that `step` is done."""
        if self.tty:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif not self.quiet and (time.time() - self.last > 5 or step == self.steps):
            self.last = time.time()
            print(f"{self.name} {step}/{self.steps} [{self.last - self.begun:.0f} s] {text}", file=sys.stderr, flush=True)

    def close(self):
        self.bar.close()


def sample_table(rows, width=110):
    """Rows {prompt, response, **numbers} as readable text."""
    out = []
    for row in rows:
        numbers = "  ".join(f"{k} {v:+.2f}" for k, v in row.items() if isinstance(v, float))
        more = "..." if len(row["response"]) > width else ""
        out += [f"  > {row['prompt'][-width:]}", f"    {row['response'][:width]}{more}"] + ([f"    {numbers}"] if numbers else [])
    return "\n".join(out)


def before_and_after_table(summary, names):
    """What RunFolder.before_and_after() found, as readable text."""
    n = summary["after"][names[0] + "_n"]
    lines = [f"\nBefore and after {summary['steps']} steps, on {n} held-out prompts (mean +- standard error):"]
    for name in names:
        if name in summary["after"]:
            before, after = (f"{part[name]:6.2f} +- {part[name + '_se']:.2f}" for part in (summary["before"], summary["after"]))
            lines.append(f"  {name:11s}{before}  ->  {after}")
    return "\n".join(lines)



"""Every command of every page (*.md) is run, in its smallest form, in the order of the page.

Bash reads a page's ```bash blocks as one script, line by line as they stand on the page, so that
variables, loops and files written on the way work as they do for a reader. But `python`, `torchrun`
and the like are functions there, which hand their arguments over to this process: it adds flags
that make the run smaller (SIZES), and calls the script's main(). In the page's folder the first run
is done: runs/sft, runs/rm/seed_0, runs/ppo.

What is not run is looked at as closely as can be done without running it:
  blocks tagged needs=hub, gpu, data or run             the script reads the flags
  studies (tests/studies/ runs them), benchmarks        they read their flags
  chat and compare (tests/show/ runs them)              they read their flags
  what starts from a study's runs                       flags; whether the study makes such a run
  pytest, pip, ruff                                     the files that they name are there
Every other command that this file does not know fails.
"""

import argparse
import contextlib
import fnmatch
import importlib
import importlib.util
import io
import itertools
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
from links import find_pages, read_blocks
from support import ALL_SCRIPTS, ENV, REPO, free_port, metrics
from torch.distributed.run import parse_args as parse_torchrun

import probe
import train_rm
import train_sae
from nanorlhf import data, ppo
from nanorlhf.runtime import cli, distributed
from nanorlhf.show.terminal import name_runs
from nanorlhf.studies import common, cue_control

pytestmark = pytest.mark.slow

# The smallest form of each script: no flag of a page, and no default, is larger than this.
# 0 or nothing, which often means "all", counts as larger.
SMALL_MODEL_RUN = {"steps": 2, "batch_size": 4, "eval_size": 4, "max_new_tokens": 8, "n_samples": 1}
SIZES = {
    "train_sft.py": {**SMALL_MODEL_RUN, "steps": 8, "batch_size": 16, "compile": False},
    "train_rm.py": {**SMALL_MODEL_RUN, "members": 2, "compile": False},
    "train_ppo.py": {**SMALL_MODEL_RUN, "minibatch_size": 2, "ppo_epochs": 1, "compile": False},
    "sample_bon.py": {"eval_size": 4, "max_rows": 8, "n_answers": 16, "n": 16, "max_new_tokens": 8},
    "train_sae.py": {"steps": 10, "batch_size": 32, "buffer_tokens": 256, "max_rows": 64}
    | {"eval_size": 8, "n_answers": 2, "max_new_tokens": 8},
    "probe.py": {"max_rows": 40, "eval_size": 64, "seeds": 2, "triples": 20, "draws": 2, "top": 4}
    | {"n_answers": 2, "max_new_tokens": 8},
}  # fmt: skip

# The embedded world's data sets, which every run reads whole; and what train_sae.py reads first.
WORLD_SIZES = {"sft": 600, "pairs": 200}
FIT_TOKENS = 512

# --------------------------------------------------------------------------- a page, read by bash

# hand_over LINE WORD...: this process runs the command, and answers with its output's file.
PRELUDE = r"""
hand_over() {
    printf '%s\0' "$#" "$needs" "$@" >&"$TO_TEST"
    local output
    read -r output <&"$FROM_TEST"
    [ -z "$output" ] || cat "$output"
}
hand_over_from_page() {
    local i line
    for i in "${!BASH_LINENO[@]}"; do
        [[ ${BASH_SOURCE[i + 1]} != *page.sh ]] || { line=${BASH_LINENO[i]}; break; }
    done
    hand_over "$line" "$@"
}
python() {
    if [ "$1" = - ]; then shift; set -- -c "$(cat)" "$@"; fi
    hand_over_from_page python "$@"
}
for tool in torchrun pip ruff rm write_block; do
    eval "$tool() { hand_over_from_page $tool \"\$@\"; }"
done
timeout() {    # what would be killed is run to its end
    while [[ $1 = -* || $1 = KILL || $1 = [0-9]* ]]; do shift; done
    "$@"
}
command_not_found_handle() { hand_over_from_page "$@"; }
trap 'hand_over "$LINENO" failed "$BASH_COMMAND"' ERR
"""
TOOLS = ("cat", "cmp", "cp", "cut", "diff", "grep", "head", "ls", "mkdir", "sort", "tail", "wc")


def script_of(text):
    """A page as a script of bash. Each line of it is the page's line of the same number."""
    lines = [""] * (len(text.splitlines()) + 1)
    for block in read_blocks(text):
        start = block.line - 1
        end = block.line + len(block.lines)
        if block.language == "bash":
            lines[start] = f"needs={block.tags.get('needs', '')}"
            lines[start + 1 : end] = block.lines
        elif file_of(block):
            lines[start] = f"write_block {block.line}"
    return "\n".join([*lines, "needs=", "hand_over 0 end", ""])


def file_of(block):
    """The file that a block is, by the comment in its first line: # my.py"""
    named = re.fullmatch(r"# (\S+\.\w+)", block.lines[0]) if block.lines else None
    return named[1] if named else ""


class Page:
    """The commands of a page, run in a folder; `failures` are texts PAGE:LINE: command, and why."""

    real_torchruns = 1  # of all pages together; others run as one process

    def __init__(self, name, text, folder):
        self.name, self.text, self.folder = name, text, Path(folder)
        self.failures = []
        self.ran, self.parsed = [], []  # (script, args)
        self.ended = False
        self.studied = []  # folders that a study would have made, and what would be made from them
        self.tools = self.folder / ".tools"
        self.tools.mkdir()

    def run(self):
        tools = self.tools
        for tool in TOOLS:
            os.symlink(shutil.which(tool), tools / tool)
        (tools / "prelude.sh").write_text(PRELUDE)
        (tools / "page.sh").write_text(script_of(self.text))
        from_bash, to_test = os.pipe()
        from_test, to_bash = os.pipe()
        env = {
            "PATH": str(tools),
            "TO_TEST": str(to_test),
            "FROM_TEST": str(from_test),
            "HOME": str(self.folder),
        }
        command = [shutil.which("bash"), "-c", ". .tools/prelude.sh; . .tools/page.sh"]
        with open(tools / "errors", "w") as errors:
            bash = subprocess.Popen(
                command,
                cwd=self.folder,
                env=env,
                pass_fds=(to_test, from_test),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        os.close(to_test)
        os.close(from_test)
        with open(from_bash, "rb") as requests, open(to_bash, "w") as answers:
            words = read_words(requests)
            for count in words:
                needs, line, *command = itertools.islice(words, int(count) + 1)
                output = self.answer(int(line), needs, command)
                print(output, file=answers, flush=True)
        bash.wait()
        if not self.ended:
            self.failures.append(f"{self.name}: bash did not come to the page's end")
        for error in (tools / "errors").read_text().splitlines():
            # page.sh: line 12: syntax error near unexpected token
            line = re.search(r"line (\d+): (.*)", error)
            self.failures.append(
                f"{self.name}:{line[1]}: {line[2]}" if line else f"{self.name}: {error}"
            )

    def answer(self, line, needs, command):
        """Do what a command says; -> the file of its output."""
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.chdir(self.folder):
                self.do(command, needs)
        except (Exception, SystemExit) as error:
            what = (
                traceback.format_exc()
                if unexpected(error)
                else f"    {type(error).__name__}: {error}"
            )
            self.failures.append(f"{self.name}:{line}: {shlex.join(command)}\n{what}")
        finally:
            distributed.shutdown()
        output = self.tools / "output"
        output.write_text(printed.getvalue())
        return output

    # ------------------------------------------------------------------------------- one command

    def do(self, command, needs):
        tool, *args = command
        if tool == "python":
            self.do_python(args, needs)
        elif tool == "torchrun":
            self.do_torchrun(args, needs)
        elif tool == "write_block":
            block = next(block for block in read_blocks(self.text) if block.line == int(args[0]))
            # The comment that names it is no row of a data file.
            kept = block.lines if block.language == "python" else block.lines[1:]
            Path(file_of(block)).write_text("\n".join(kept) + "\n")
        elif tool == "rm":
            for path in args:
                if not path.startswith("-"):
                    assert Path(path).resolve().is_relative_to(self.folder.resolve()), (
                        f"rm of {path}"
                    )
                    shutil.rmtree(path, ignore_errors=True)
        elif tool in ("pip", "ruff"):
            check_files(args)
        elif tool == "end":
            self.ended = True
        elif tool == "failed":
            raise Unknown(f"it ended with an error: {args[0]}")
        else:
            raise Unknown("the test does not know how to run this")

    def do_python(self, args, needs):
        script = args[0] if args else ""
        if script == "-m":
            self.do_module(args[1], args[2:], needs)
        elif script == "-c":
            code = compile(args[1], "python -c", "exec")
            run_program(lambda: exec(code, {"__name__": "__main__"}), ["-c", *args[2:]])
        elif script in SIZES:
            self.do_script(script, args[1:], needs)
        elif script.startswith("tests/bench/"):
            parse_bench(REPO / script, args[1:])
            self.parsed.append((script, args[1:]))
        elif script.startswith("tests/"):
            check_files(args)
        elif needs:
            assert Path(script).is_file(), f"no block of this page is {script}"
        elif Path(script).is_file():
            run_program(lambda: runpy.run_path(script, run_name="__main__"), args)
            self.ran.append((script, args[1:]))
        else:
            raise Unknown(f"no script here, and no block of this page, is {script}")

    def do_module(self, module, args, needs):
        if module == "pytest":
            check_files(args)
        elif module.startswith("nanorlhf.studies."):
            study = importlib.import_module(module)
            self.studied += outputs_of(study, study.read_settings(args))
            self.parsed.append((module, args))
        elif module in ("nanorlhf.show.chat", "nanorlhf.show.compare"):
            cli.parse(importlib.import_module(module).Config, name_runs(args))
            self.parsed.append((module, args))
        elif module in ("nanorlhf.runtime.plots", "nanorlhf.show.page"):
            if self.from_a_study(args):
                self.check_studied(args)
            elif not needs:
                run_program(
                    lambda: runpy.run_module(module, run_name="__main__", alter_sys=True),
                    [module, *args],
                )
                self.ran.append((module, args))
        else:
            raise Unknown(f"the test does not know how to run the module {module}")

    def do_script(self, script, args, needs):
        if not args and script == "probe.py" or "--help" in args:
            return
        if (script, args) in self.ran:
            return  # the same command once more
        if needs or self.from_a_study(args):
            # A {seed} would be looked for.
            literal = (
                args if script == "train_rm.py" else [arg.replace("{seed}", "0") for arg in args]
            )
            _, config = parse(script, literal)
            self.check_studied(args)
            if self.from_a_study(args):
                self.studied.append(getattr(config, "output_dir", ""))
            self.parsed.append((script, args))
            return
        with evaluated_steps(script, args):
            main, config = parse(script, args + size_flags(script, args))
            main(config)
        self.ran.append((script, args))

    def do_torchrun(self, args, needs):
        options = parse_torchrun(args)
        script = options.training_script
        rest = options.training_script_args
        if needs or script not in SIZES or Page.real_torchruns == 0:
            self.do_python([script, *rest], needs)
            return
        Page.real_torchruns -= 1
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            f"--master_port={free_port()}",
        ]
        with evaluated_steps(script, rest):
            command = [*launcher, str(REPO / script), *rest, *size_flags(script, rest)]
            done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
        print(done.stdout)
        self.ran.append(("torchrun", args))

    # ---------------------------------------------------------------------------------- studies

    def from_a_study(self, args):
        roots = {"/".join(output.split("/")[:2]) for output in self.studied}
        return any(path.startswith(f"{root}/") for path in map(path_in, args) for root in roots)

    def check_studied(self, args):
        """What a command takes from a study's folder is a run that the study makes."""
        for flag, arg in zip(["", *args], args):
            if self.from_a_study([arg]) and flag not in ("--output_dir", "--compare"):
                path = path_in(arg)
                known = any(same_path(path, output) for output in self.studied)
                assert known, f"{path}: no study of this page makes such a run"


class Unknown(Exception):
    """A command that is not run, and not known to be right."""


def unexpected(error):
    """Whether an error needs a traceback: it is neither bad input nor a check of this file."""
    return not isinstance(
        error, (ValueError, SystemExit, Unknown, AssertionError, FileNotFoundError)
    )


def read_words(stream):
    """Words that end in a zero byte, as they come."""
    word = bytearray()
    while byte := stream.read(1):
        if byte == b"\0":
            yield word.decode()
            word.clear()
        else:
            word += byte


# -------------------------------------------------------------------------------- scripts and flags


def config_of(script, args):
    """-> (Config, main, the flags, the sub-command's name)"""
    if script == "probe.py":
        if args[0] not in probe.COMMANDS:
            raise Unknown(f"probe.py has no command {args[0]}")
        config_class, main = probe.COMMANDS[args[0]]
        return config_class, main, args[1:], args[0]
    module = {f"{module.__name__}.py": module for module in ALL_SCRIPTS.values()}[script]
    return module.Config, module.main, args, ""


def parse(script, args):
    """A command line as its script reads it -> (main, its config)."""
    config_class, main, args, name = config_of(script, args)
    return main, cli.parse(config_class, args, name, name)


def flags_of(script, args):
    """The values of all flags, given or not, before anything is made of them."""
    config_class, _, args, _ = config_of(script, args)
    return vars(cli.Parser(script, "", config_class).parse_args(args))


def size_flags(script, args):
    """Further flags that make the run a small one: the last of two equal flags holds."""
    values = flags_of(script, args)
    added = []
    for name, limit in SIZES[script].items():
        # A mean of models refuses the sizes of a training.
        is_refused = values.get("average") and name in train_rm.NOT_FOR_AVERAGE
        if name not in values or is_refused:
            continue
        value = values[name]
        if isinstance(value, list):
            smaller = sorted({min(x, limit) for x in value})
            if smaller:
                added += [f"--{name}", *map(str, smaller)]
        elif not value or value > limit:
            added += [f"--{name}", str(limit)]
    if values.get("advantage", "gae") != "gae":
        # A rollout of four answers has no group of eight.
        added += ["--group_size", "2"]
    if script == "train_sae.py" and values["layers"].startswith("highest"):
        # After two steps of PPO other layers have moved most than after all.
        added += ["--layers", "2,3"]
    return added


@contextlib.contextmanager
def evaluated_steps(script, args):
    """Files of the evaluations that the whole run would have: copies of the small run's last."""
    yield
    values = flags_of(script, args)
    if script != "train_ppo.py" or values["score_gold"]:
        return
    steps, every = values["steps"], values["eval_every"]
    last = f"step_{SIZES[script]['steps']}.jsonl"
    for folder in Path(values["output_dir"]).glob("eval*"):
        for step in {steps, *range(0, steps + 1, every or steps)} - {0}:
            if not (folder / f"step_{step}.jsonl").exists():
                shutil.copy(folder / last, folder / f"step_{step}.jsonl")


def run_program(function, argv):
    """Run a program with its arguments, in a fork: what it changes in modules ends with it."""
    output = Path(".tools/program")
    output.unlink(missing_ok=True)
    fork = multiprocessing.get_context("fork").Process(
        target=in_fork, args=(function, argv, output)
    )
    fork.start()
    fork.join()
    printed = output.read_text()
    assert fork.exitcode == 0, printed
    print(printed, end="")


def in_fork(function, argv, output):
    sys.argv = list(argv)
    # A module that is run was imported before: runpy warns of that.
    warnings.simplefilter("ignore", RuntimeWarning)
    cli.run = run_small
    with open(output, "w") as file, contextlib.redirect_stdout(file):
        try:
            function()
        except SystemExit as ended:
            if ended.code:
                print(f"exit code {ended.code}")
                raise
        except Exception:
            traceback.print_exc(file=file)
            raise SystemExit(1)


def run_small(config_class, main, args=None):
    """cli.run() for programs of a page that go on as one of the scripts."""
    script = Path(sys.modules[config_class.__module__].__file__).name
    args = list(sys.argv[1:] if args is None else args)
    with evaluated_steps(script, args):
        main(cli.parse(config_class, args + size_flags(script, args)))


class Parsed(BaseException):
    """Raised once a program has read its flags."""


def parse_bench(path, args):
    """Let a benchmark read its flags, and no more."""
    assert path.is_file(), f"there is no {path.relative_to(REPO)}"
    read_flags = argparse.ArgumentParser.parse_args

    def read_and_stop(parser, *_):
        read_flags(parser, args)
        raise Parsed

    modules, environment = set(sys.modules), dict(os.environ)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", read_and_stop)
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        try:
            spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.main()
        finally:
            # Benchmarks import one another by names such as ppo.
            for name in set(sys.modules) - modules:
                if str(path.parent) in str(getattr(sys.modules[name], "__file__", "")):
                    del sys.modules[name]
            os.environ.clear()
            os.environ.update(environment)


def check_files(args):
    """Files of the repository that are named exist: tests/hf, requirements.txt."""
    for arg in args:
        if re.search(r"^tests\b|/|\.(txt|toml|py)$", arg) and not arg.startswith("-"):
            assert (REPO / arg).exists(), f"there is no {arg}"


# ----------------------------------------------------------------------------------------- studies


def outputs_of(study, a):
    """The folders and files that a study's commands would write, {seed} in them or not."""
    if study is cue_control:
        stages = study.first_commands(a)
        stages += [list(study.arms(a, seed, {"features": []}).values()) for seed in study.seeds(a)]
    else:
        stages = study.commands(a)
    return [common.output_of(shlex.split(command)) for stage in stages for command in stage]


def path_in(arg):
    """NAME=PATH -> PATH"""
    return arg.rpartition("=")[2]


def same_path(path, output):
    """Whether a path, in which * and ? may stand, is an output, lies in one, or above one."""
    output = re.sub(r"\{\w+\}", "*", output)
    pairs = zip(path.split("/"), output.split("/"))
    return all(fnmatch.fnmatch(b, a) or fnmatch.fnmatch(a, b) for a, b in pairs)


# ---------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module", autouse=True)
def less_data():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sae, "FIT_TOKENS", FIT_TOKENS)
        for kind, size in WORLD_SIZES.items():
            patch.setitem(data.WORLD_SIZES, kind, size)
        yield


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, less_data):
    """A folder after the first run, in its smallest form: runs/sft, runs/rm/seed_0, runs/ppo."""
    folder = tmp_path_factory.mktemp("first")
    page = Page("first run", "", folder)
    for script in ("train_sft.py", "train_rm.py", "train_ppo.py"):
        page.answer(0, "", ["python", script])
    assert not page.failures, page.failures
    return folder


@pytest.fixture
def run_page(first_run, tmp_path, monkeypatch):
    """A function that runs a page's commands -> the Page."""
    # No page may need the hub without saying so.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(first_run / "runs", tmp_path / "runs")
    (tmp_path / "assets").mkdir()

    def run(name, text):
        shutil.rmtree(tmp_path / ".tools", ignore_errors=True)
        page = Page(name, text, tmp_path)
        page.run()
        return page

    return run


@pytest.mark.parametrize("path", find_pages(), ids=lambda path: str(path.relative_to(REPO)))
def test_commands_of_a_page_run(path, run_page):
    page = run_page(str(path.relative_to(REPO)), path.read_text(encoding="utf-8"))
    assert not page.failures, "\n" + "\n".join(page.failures)


SAMPLE = """# A page
```python
# show.py
import sys

print(*sys.argv[1:])
```

```python
# change.py
from nanorlhf import ppo
from nanorlhf.runtime import cli

ppo.KL_ESTIMATES["half"] = lambda x: x / 2

import train_ppo

cli.run(train_ppo.Config, train_ppo.main)
```

    python not_in_a_block.py

```jsonl
# rows.jsonl
{"prompt": "a", "response": "b"}
```

1. In a list:

   ```bash
   NAME=world
   export OTHER="two words"
   THREADS=1 python show.py $NAME \\
       "$OTHER" 'runs/{seed}'     # a comment
   cat > cat.txt <<'END'
$NAME
END
   ```

```bash
for i in 0 1; do python show.py $i; done    # variables live on: $NAME
LAST=$(python show.py last $NAME)
python show.py "$LAST" && python - <<END
open("by_python.txt", "w").write("$LAST")
END
python change.py --kl_kind half --output_dir runs/half | grep -c "^Before"
timeout -s KILL 60 python show.py killed || true
ls runs/ppo/eval | grep step
```

```bash needs=hub
python train_sft.py --model gpt2 --dataset gone.jsonl
python train_ppo.py --reward_model 'runs/gone/seed_{seed}'
```
"""


def test_a_page_is_read_as_a_reader_would(run_page):
    page = run_page("page.md", SAMPLE)
    assert not page.failures, "\n".join(page.failures)
    shown = [
        ["world", "two words", "runs/{seed}"],
        ["0"],
        ["1"],
        ["last", "world"],
        ["last world"],
        ["killed"],
    ]
    changed = ("change.py", ["--kl_kind", "half", "--output_dir", "runs/half"])
    assert page.ran == [
        *(("show.py", args) for args in shown[:-1]),
        changed,
        ("show.py", shown[-1]),
    ]
    assert len(metrics(page.folder / "runs" / "half")) == 3  # in its smallest form: steps 0, 1, 2
    assert "half" not in ppo.KL_ESTIMATES
    assert [script for script, _ in page.parsed] == ["train_sft.py", "train_ppo.py"]
    written = {
        "rows.jsonl": '{"prompt": "a", "response": "b"}\n',
        "cat.txt": "$NAME\n",
        "by_python.txt": "last world",
    }
    for name, text in written.items():
        assert (page.folder / name).read_text() == text


FAULTS = """
python train_ppo.py --kl_weight 1
python train_ppo.py --reward_model runs/gone --output_dir runs/a
python train_sft.py --model some/hub_model --output_dir runs/b
python gone.py
python -m http.server
python probe.py nothing
python probe.py judge --a runs/ppo/eval/step_50.jsonl --b runs/ppo/eval/step_0.jsonl
python -m pytest -q tests/gone
pip install -r gone.txt
python tests/bench/ppo.py --gone 1
python tests/bench/gone.py
python -m nanorlhf.studies.overoptimisation --gone
torchrun --processes 2 train_ppo.py
wget https://x.org/y
cat gone.txt
rm -rf ../first0
python -m nanorlhf.show.compare runs/ppo runs/ppo --stepz 3
python -m nanorlhf.show.chat
python -c "1 / 0"
(python probe.py nothing)
""".strip()


def test_faults_of_commands_are_found(run_page):
    lines = FAULTS.splitlines()
    page = run_page("page.md", f"```bash\n{FAULTS}\n```\n")
    found = [
        int(re.match(r"page.md:(\d+): ", failure)[1])
        for failure in page.failures
        if "No such file or" not in failure
    ]
    assert found == list(range(2, len(lines) + 2)), "\n".join(page.failures)


def test_flags_of_commands_that_are_not_run_are_read(run_page):
    for needs in ("hub", "gpu", "data", "run"):
        block = "python train_sft.py --model gpt2 --stepz 3\npython probe.py divergence --seeds 3\n"
        block += "python gone.py\n"
        (failed, *others) = run_page("page.md", f"```bash needs={needs}\n{block}```\n").failures
        assert "--stepz" in failed and "page.md:2: python train_sft.py" in failed
        assert [failure.split(": ")[0] for failure in others] == ["page.md:3", "page.md:4"]


def test_what_bash_cannot_read_is_a_failure(run_page):
    for block in ("if true; then", "echo 'open", "exit 3"):
        assert run_page("page.md", f"```bash\n{block}\n```\n").failures, block


def test_runs_of_a_study_are_those_that_it_makes(run_page):
    block = """
python -m nanorlhf.studies.overoptimisation --output_dir runs/study
python train_sft.py --model runs/study/sft/seed_0 --output_dir runs/study/more
python probe.py divergence --model runs/study/more --policy runs/study/ppo_noise0_kl0/single/seed_0
python -m nanorlhf.runtime.plots --compare assets/a.png runs/study/ppo_noise0_kl0*/single/seed_?
python probe.py divergence --policy runs/study/gone
python -m nanorlhf.runtime.plots runs/study/ppo_noise0_kl0*/gone/seed_?
""".strip()
    failures = run_page("page.md", f"```bash\n{block}\n```\n").failures
    assert [failure.split(": ")[0] for failure in failures] == ["page.md:6", "page.md:7"], (
        "\n".join(failures)
    )


def test_sizes_only_make_runs_smaller():
    def sizes(script, *args):
        flags = size_flags(script, list(args))
        return dict(zip(flags[::2], flags[1::2]))

    assert sizes("train_ppo.py", "--batch_size", "2")["--steps"] == "2"
    assert "--batch_size" not in sizes("train_ppo.py", "--batch_size", "2")
    assert (
        sizes("train_sft.py", "--loss", "dpo")["--steps"] == "8"
    )  # by default None, until the loss is known
    assert sizes("train_rm.py", "--members", "5")["--members"] == "2"
    assert "--members" not in sizes("train_rm.py")
    assert size_flags("sample_bon.py", ["--n", "1", "64"])[-5:-2] == ["--n", "1", "16"]
    assert sizes("probe.py", "divergence", "--max_rows", "0")["--max_rows"] == "40"  # 0 is all
    assert "--layers" not in sizes("train_sae.py", "--layers", "1")

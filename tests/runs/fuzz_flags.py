"""Cases of fuzz.py in which a flag, the environment, a reward function or an endpoint is wrong, or only odd."""

import dataclasses
import functools
import gzip
import os
import resource
import shutil
import typing

from fuzz_damage import deep_json, replace
from fuzz_material import Case, answer_with, chat

from nanorlhf.evals import diversity_report

SECRET = "sk-SECRET123456"


# -------------------------------------------------------------------------------------------- flags


# Flags that take paths: of what is read, and of what is written.
READS = (
    "model base policy reward_model gold_model value_model sae sarm feature_sae human_latents "
    "dataset eval_dataset pool a b reward answers against texts encoder nli_model tokenizer "
    "explainer score_gold from_files"
).split()


WRITES = ("output_dir", "output", "save", "cache")


CHOICES = (
    "dtype distributed schedule loss sarm_mode objective kl_kind kl_in score_scaling split sites "
    "site normalize bias kind tokens by benchmark penalty device prompt_format"
).split()


# Flags for which a number below 0 stands for something, or may.
MAY_BE_NEGATIVE = {"layer", "final_lr", "lam", "missing_eos_penalty", "length_penalty"}


# Flags for which infinity says "never" or "no limit".
MAY_BE_INFINITE = {"max_grad_norm", "kl_target", "target_kl", "score_clip", "clip_range"}
MAY_BE_INFINITE |= {"value_clip_range", "timeout", "requests_per_minute", "temperature"}


# With 2**70 of these a run is right to go on for ever.
NEVER_DONE = {"steps", "members", "ppo_epochs", "seeds", "draws", "n_answers", "triples"}


def hint_of(run, name):
    return typing.get_type_hints(run.config)[name]


# Of some runs: the flags that they look at, or do not.
USED = {
    "ppo score_gold": {"score_gold", "gold_model", "micro_batch_size", "device"},
    "bon from": {f.name for f in dataclasses.fields(diversity_report.Flags)} | {"output_dir"},
}


UNUSED = {
    "bon pool": {"model", "dataset", "eval_dataset", "in_distribution", "columns"},
    "evaluate rewardbench2": {"eval_dataset", "columns"},
    "evaluate rm_bench": {"eval_dataset", "columns"},
}


def is_used(run, name):
    """Whether a run looks at a flag at all. --score_gold trains nothing, --from samples nothing."""
    return name in USED.get(run.name, {name}) and name not in UNUSED.get(run.name, ())


def cases_of_numbers(run):
    """Every numeric flag of a script with numbers that are out of range, and with none."""
    for f in dataclasses.fields(run.config):
        hint = hint_of(run, f.name)
        whole = hint in (int, int | None, list[int])
        if not whole and hint not in (float, float | None, list[float]):
            continue
        if not is_used(run, f.name):
            continue
        values = {"nan": "refused", "text": "refused", "": "refused", "-1": "refused", "0": "any"}
        if f.name in MAY_BE_NEGATIVE:
            values["-1"] = "any"
        if whole:
            values |= {"1e300": "refused", "inf": "refused", "0.5": "refused"}
            values["2**70"] = "any"
            values["9" * 5000] = "refused"
        else:
            may = "any" if f.name in MAY_BE_INFINITE else "refused"
            values |= {"inf": may, "1e300": "any", "1e-300": "any", "2**70": "any"}
        for value, expected in values.items():
            if value == "2**70" and f.name in NEVER_DONE:
                continue
            if f.name == "timeout" and value == "1e300":
                expected = "any"
            given = str(2**70) if value == "2**70" else value
            given = [given, "0.9"] if f.name == "betas" else [given]
            shown = value if len(value) < 20 else "5,000 digits"
            words = run.words(**{f.name: None}) + [f"--{f.name}", *given]
            yield Case(f"--{f.name} {shown}", run, expected, words=words)


def cases_of_choices(run):
    for f in dataclasses.fields(run.config):
        own = f.name in ("sae", "texts") and run.script == "train_sae.py"
        own = own or f.name == "task" and run.script == "probe.py reward"
        if not own and f.name not in CHOICES or not is_used(run, f.name):
            continue
        for value in ("nonsense", "None", "\u00e9", "0"):
            words = run.words(**{f.name: None}) + [f"--{f.name}", value]
            yield Case(f"--{f.name} {value}", run, "refused", words=words)


def cases_of_paths(run):
    """Every flag that names what is there, and what will be."""
    long = "x" * 300
    nowhere = ["./nothing/here", "/dev/null/x", "loop", "loop/x", long, "x\udcff", "a\nb"]
    nowhere += ["/proc/self/mem", "sft.jsonl/x", "\u00e9t\u00e9", "/", "{seed}", "*", "-", "~"]

    def loop(here, rng):
        (here / "loop").symlink_to("loop")

    for f in dataclasses.fields(run.config):
        own_meaning = f.name in ("sae", "texts") and run.script == "train_sae.py"
        if f.name not in (*READS, *WRITES) or own_meaning or run.name.endswith("--resume"):
            continue
        if not is_used(run, f.name):
            continue
        for value in nowhere if f.name in READS else []:
            if f.name == "explainer" and value == "-":
                continue
            words = run.words(**{f.name: None}) + [f"--{f.name}", value]
            yield Case(f"--{f.name} {shown(value)}", run, "refused", loop, words)
        if f.name in READS and run.flags.get(f.name):
            needed = f.name not in ("value_model", "gold_model", "human_latents", "feature_sae")
            needed = needed and f.name not in ("encoder", "nli_model", "tokenizer", "answers")
            needed = needed and f.name not in ("against", "base", "sae", "sarm", "pool")
            if needed:
                words = run.words(**{f.name: None}) + [f"--{f.name}", ""]
                yield Case(f"--{f.name} ''", run, "refused", words=words)
        for value in OUTPUTS if f.name in WRITES else []:
            words = run.words(**{f.name: None}) + [f"--{f.name}", value]
            if f.name == "save" and value == "":
                continue
            if f.name == "cache" and value == "":
                continue
            expected = "refused"
            if f.name == "output_dir" and value == "" and run.script == "train_sft.py":
                continue
            if f.name == "cache" and value in ("model", ".") or value == "x\udcff":
                expected = "any"  # bytes that are no text may be a name
            yield Case(f"--{f.name} {shown(value)}", run, expected, loop, words)


OUTPUTS = ["", "/dev/null/x", "loop", "loop/x", "sft.jsonl", "sft.jsonl/x", "x" * 300, "/proc/x"]
OUTPUTS += ["model", ".", "x\udcff", "a/" + "y" * 300]


def shown(value):
    return repr(value) if len(value) < 30 else "300 letters"


def cases_of_other_names(run):
    """The same thing under another name: the same numbers."""
    if run.name.endswith(("--resume", "again")):
        return
    for name, value in run.flags.items():
        if name not in READS or not isinstance(value, str) and len(value) != 1:
            continue
        path = value if isinstance(value, str) else value[0]
        if not isinstance(path, str) or path in ("none", "world") or "{seed}" in path:
            continue
        own_meaning = name in ("sae", "texts") and run.script == "train_sae.py"
        if own_meaning or name == "score_gold":
            continue
        file, colon, function = path.partition(":")
        is_file = file.endswith((".jsonl", ".py", ".tsv", ".safetensors", ".json"))
        forms = {"./": f"./{file}", "a//b": f".//{file}", "absolute": None}
        copies = {"\u00fcber uns": "copy", "with a space": "copy", "linked": "link"}
        if not is_file:
            forms["trailing slash"] = file + "/"
        for what, changed in forms.items():
            yield OtherName(run, name, what, file, changed, "", colon + function)
        for what, how in copies.items():
            suffix = os.path.splitext(file)[1] if is_file else ""
            yield OtherName(run, name, what, file, f"{what}{suffix}", how, colon + function)


def OtherName(run, flag, what, old, new, how, rest):
    """A case in which a flag names the same file or folder by another name, which may first be made."""
    place = {}

    def damage(here, rng):
        place["here"] = here
        if how == "link":
            (here / new).symlink_to(old)
        elif how == "copy" and (here / old).is_dir():
            shutil.copytree(here / old, here / new)
        elif how == "copy":
            shutil.copy2(here / old, here / new)

    given = new if new else f"{{here}}/{old}"
    words = run.words(**{flag: given + rest})
    return Case(f"--{flag} {what}", run, "equal", damage, words)


def cases_of_texts(run):
    """Flags that are small languages of their own."""
    flags = {f.name for f in dataclasses.fields(run.config)}
    for name, values in SMALL_LANGUAGES.items():
        for value in values if name in flags and is_used(run, name) else []:
            words = run.words(**{name: None}) + [f"--{name}", *value.split(" ")]
            if name == "lora_layers":
                words += ["--lora_rank", "2"]
            yield Case(f"--{name} {value}", run, "refused", words=words)
    yield Case("--nonsense", run, "refused", words=[*run.words(), "--nonsense"])
    yield Case("a word too many", run, "refused", words=[*run.words(), "--seed", "0", "word"])
    if (
        "columns" in flags
        and is_used(run, "columns")
        and run.flags.get("dataset", "world") != "world"
    ):
        for value in ("prompt", "prompt=", "=prompt", "prompt=nothing"):
            if value == "=prompt":
                continue
            words = [*run.words(), "--columns", value]
            yield Case(f"--columns {value}", run, "refused", words=words)


SMALL_LANGUAGES = {
    "layers": ["99", "-1", "1,", "highest:0", "highest:x", "highest", "nonsense", "1;2", "\u00b2"],
    "features": ["99999", "-1", "x", "3,,4", "\u00b2", "1.5"],
    "edits": ["3", "x:set:0", "3:set:x", "3:set:nan", "3:set:1e39", "99999:set:0", "3:nonsense:0"],
    "weights": ["3", "x:*:0", "3:*:inf", "3:*:nan", "99999:*:0", "-1:*:0"],
    "clamp": ["3", "3:max:nan", "3:max:1e39", "99999:max:0", "3:*:2"],
    "tau": ["q2", "q-1", "nan", "x", "0.5 0.6", "1e39"],
    "alpha": ["-1", "nan", "xstd", "inf", "1e39"],
    "penalize_features": ["99999", "-1", "3 3", "x"],
    "eval_splits": ["nonsense", "ood=", "test test", "x=missing.jsonl", "eval=sft.jsonl"],
    "in_distribution": ["nonsense", "words:", "words:prompt<=x", "a=", "rewards.py:nothing"],
    "lora_layers": ["(", "nothing", "(((a|.)+)+)+!"],
    "dataset": ["world:x", "world:\u00b2", "world:-1", "world:" + "9" * 5000],
    "truncate": ["x", "-1", "0", "\u00b2"],
    "judge": ["http://", "http://[", "llm:", "llm:missing", "http://user:pw@127.0.0.1:9/v1"],
    "uwo_lambda": ["x", "-1", "nan"],
}


def cases_of_finished_runs(run):
    """An output folder that holds something else, and one whose run is done."""
    if run.writes != "out":
        return
    another = "half_rm" if run.script == "train_sft.py" else "half_sft"
    words = run.words(output_dir=another)
    yield Case("--output_dir of another run", run, "refused", words=words)

    def notes(here, rng):
        replace_tree(here / "out/notes.txt")

    yield Case("--output_dir with notes in it", run, "refused", notes)
    yield Case("--output_dir empty", run, "equal", lambda here, rng: (here / "out").mkdir())
    nested = run.words(output_dir="deep/er/out")
    yield Case("--output_dir deep", run, "equal", words=nested, writes="deep/er/out")
    odd = run.words(output_dir="\u00e4 b\u200b")
    yield Case("--output_dir with odd letters", run, "equal", words=odd, writes="\u00e4 b\u200b")
    linked = lambda here, rng: ((here / "there").mkdir(), (here / "out").symlink_to("there"))  # noqa: E731
    yield Case("--output_dir a link to a folder", run, "equal", linked)
    dangling = lambda here, rng: (here / "out").symlink_to("nowhere")  # noqa: E731
    yield Case("--output_dir a dangling link", run, "any", dangling)


def replace_tree(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("notes\n")


def cases_of_numerics(run):
    """Settings with which no finite number comes out."""
    trained = run.script in ("train_sft.py", "train_rm.py", "train_ppo.py", "train_sae.py")
    if not trained or run.name.endswith("--resume") or "score_gold" in run.name:
        return
    for value in ("1e30", "1e38"):
        words = run.words(lr=value, steps=4)
        yield Case(f"--lr {value} for 4 steps", run, "any", words=words)


# --------------------------------------------------------------------------- rewards and predicates


IMPORT_TIME = {
    "exits at import": "import sys\nsys.exit(0)\n",
    "argparse at import": "import argparse\nargparse.ArgumentParser().parse_args(['--x'])\n",
    "raises at import": "1 / 0\n",
    "recursion at import": "def f(): f()\nf()\n",
    "quits at import": "quit()\n",
    "__getattr__ raises": "def __getattr__(name): raise ValueError(name)\n",
    "the function is a number": "{function} = 3\n",
}


# The body of a function of (prompts, responses).
WRONG_REWARDS = {
    "raises": "raise KeyError('no such word\\nsecond line')",
    "raises an error without a text": "raise ValueError",
    "raises an error whose str() fails": "raise Wordless",
    "exits with 0": "import sys; sys.exit(0)",
    "exits with a text": "import sys; sys.exit('enough')",
    "quits": "quit()",
    "raises GeneratorExit": "raise GeneratorExit",
    "recursion": "return {function}(prompts, responses)",
    "an object that cannot be called": "return prompts[0](responses)",
    "None": "return None",
    "a number": "return 1.0",
    "a string": "return 'good'",
    "a string of digits": "return '1' * len(responses)",
    "bytes": "return bytes(len(responses))",
    "a dict": "return {{float(i): 1.0 for i in range(len(responses))}}",
    "a set": "return {{float(i) for i in range(len(responses))}}",
    "one too few": "return [1.0] * (len(responses) - 1)",
    "one too many": "return [1.0] * (len(responses) + 1)",
    "none at all": "return []",
    "texts": "return list(responses)",
    "numbers as texts": "return ['1.5'] * len(responses)",
    "nested lists": "return [[1.0] for _ in responses]",
    "None in a list": "return [None] * len(responses)",
    "nan": "return [float('nan')] * len(responses)",
    "inf": "return [float('inf')] * len(responses)",
    "1e300": "return [1e300] * len(responses)",
    "complex": "return [1j] * len(responses)",
    "an integer of 400 digits": "return [10**400] * len(responses)",
    "a tensor of another shape": "import torch; return torch.zeros(len(responses), 2)",
    "a coroutine": "async def later(): return [1.0]\n    return later()",
    "an argparse error": "import argparse; argparse.ArgumentParser().error('no such option')",
    "a warning as an error": "import warnings; warnings.simplefilter('error'); warnings.warn('x')",
    "an iterator that raises": "yield 1.0\n    raise OSError(5, 'x')",
}


ODD_REWARDS = {
    "a tuple": "return tuple(real(prompts, responses))",
    "an iterator": "yield from real(prompts, responses)",
    "an array": "import numpy; return numpy.array(real(prompts, responses))",
    "a tensor": "import torch; return torch.tensor(real(prompts, responses), dtype=torch.float64)",
    "sorts its list": "out = real(prompts, responses); responses.sort(); return out",
    "empties its lists": "out = real(prompts, responses)\n    prompts.clear(); responses.clear()\n    return out",
    "prints": "print('hello'); return real(prompts, responses)",
    "draws random numbers": "import torch, random; torch.rand(5); random.random()\n    return real(prompts, responses)",
}


# {run: the function of rewards.py that it calls}
CALLS = {
    "ppo": "good",
    "ppo ensemble": "words",
    "bon": "good",
    "bon pool": "good",
    "judge": "score",
    "evaluate": "score",
    "reward sequence": "score",
    "ablate": "good",
    "rm": "words",
}


def cases_of_rewards(run):
    """A reward function that misbehaves, and one that is only odd."""
    function = CALLS.get(run.name)
    if not function:
        return
    more = {"gold_model": f"rewards.py:{function}"} if run.name == "rm" else {}
    words = run.words(**more)
    for what, body in IMPORT_TIME.items():
        text = "def other(): pass\n" + body.replace("{function}", function)
        damage = functools.partial(append_code, text=text)
        yield Case(f"a reward: {what}", run, "refused", damage, words)
    for what, body in WRONG_REWARDS.items():
        text = "class Wordless(Exception):\n    def __str__(self): return 1 / 0\n"
        text += f"def {function}(prompts, responses):\n    " + body.format(function=function) + "\n"
        late = run.name in ("bon", "bon pool", "judge", "rm")  # answers and other scores are kept
        damage = functools.partial(append_code, text=text)
        yield Case(f"a reward: {what}", run, "stopped" if late else "refused", damage, words)
    for what, body in ODD_REWARDS.items() if run.name != "rm" else []:
        text = f"real = {function}\ndef {function}(prompts, responses):\n    {body}\n"
        damage = functools.partial(append_code, text=text)
        yield Case(f"a reward: {what}", run, "equal", damage, words)


def append_code(here, rng, text):
    path = here / "rewards.py"
    known = "" if "__getattr__" in text or "at import" in text else path.read_text()
    replace(path, known + "\n" + text)


def cases_of_predicates(run):
    """A function of a row, --in_distribution, that misbehaves."""
    if run.name not in ("sft", "rm", "ppo", "bon"):
        return
    words = [*run.words(), "--in_distribution", "rewards.py:short"]
    for what, body in {
        "raises": "raise KeyError(1)",
        "exits": "raise SystemExit(0)",
        "None": "return None",
        "a number": "return 3",
        "an array": "import numpy; return numpy.zeros(3)",
        "a string": "return 'yes'",
        "never": "return False",
        "always": "return True",
        "empties the row": "row.clear(); return True",
    }.items():
        text = f"def short(row):\n    {body}\n"
        expected = "any" if what in ("always", "empties the row") else "refused"
        damage = functools.partial(append_code, text=text)
        yield Case(f"a predicate: {what}", run, expected, damage, words)


# ---------------------------------------------------------------------------------- the environment


def cases_of_environment(run):
    """torchrun's variables, a full disk, keys."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29417"}
    for name, value in (
        ("RANK", "x"), ("WORLD_SIZE", "x"), ("LOCAL_RANK", "x"), ("RANK", "-1"),
        ("WORLD_SIZE", "0"), ("RANK", "1"), ("MASTER_PORT", "x"), ("MASTER_PORT", "99999999"),
        ("WORLD_SIZE", "-2"), ("RANK", ""), ("WORLD_SIZE", ""), ("LOCAL_RANK", "\u00b2"),
    ):  # fmt: skip
        given = {**alone, name: value}
        expected = "any" if name == "MASTER_PORT" else "refused"  # one process may not need it
        yield Case(f"{name}={value} of torchrun's", run, expected, environment=given)
    yield Case("WORLD_SIZE=2 alone", run, "refused", environment={"WORLD_SIZE": "2"})
    yield Case("RANK=0 alone", run, "any", environment={"RANK": "0"})
    room = (300, 3000) if run.script.startswith("probe") else (3000, 12_000)
    if run.name == "judge choices":
        return  # it has an endpoint to start before it
    for size in room:
        before = functools.partial(limit_files, size)
        expected = "failed or equal"
        yield Case(f"files of {size} bytes at most", run, expected, before=before)


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# ---------------------------------------------------------------------------------------- endpoints


REPLIES = {  # {name: (status, headers, body, seconds between its bytes)}
    "garbage": (200, {}, b"\x00\xff\xfe garbage", 0),
    "empty": (200, {}, b"", 0),
    "null": (200, {}, b"null", 0),
    "no choices": (200, {}, b'{"choices": []}', 0),
    "deep": (200, {}, deep_json().encode(), 0),
    "5,000 digits": (200, {}, b'{"choices": ' + b"7" * 5000 + b"}", 0),
    "a number as text": (200, {}, chat(3), 0),
    "an essay": (200, {}, chat("I would rather not say. " * 50), 0),
    "huge": (200, {}, chat("word " * 200_000), 0),
    "500": (500, {}, b"oops", 0),
    "429 for an hour": (429, {"Retry-After": "3600"}, b"", 0),
    "Retry-After nan": (429, {"Retry-After": "nan"}, b"", 0),
    "Retry-After inf": (429, {"Retry-After": "inf"}, b"", 0),
    "Retry-After a bad date": (503, {"Retry-After": "Mon, 99 Foo 99999 99:99:99"}, b"", 0),
    "401 with the key": (401, {}, f"bad key {SECRET}".encode(), 0),
    "400 with the key": (400, {}, f"bad key {SECRET}".encode(), 0),
    "the key as an answer": (200, {}, chat(f"the key is {SECRET}"), 0),
    "a redirect": (302, {"Location": "http://127.0.0.1:9/"}, b"", 0),
    "a wrong length": (200, {"Content-Length": "999999"}, chat("1"), 0),
    "a bad length": (200, {"Content-Length": "x"}, chat("1"), 0),
    "gzip": (200, {"Content-Encoding": "gzip"}, gzip.compress(chat("1")), 0),
    "drip": (200, {}, chat("1") + b" " * 600, 0.2),
    "latin-1": (200, {"Content-Type": "text/plain; charset=latin-1"}, chat("caf\u00e9"), 0),
}


def cases_of_endpoints(run):
    """A judge or an explainer behind an endpoint that answers oddly, and keys that are none."""
    if run.name not in ("judge", "features", "reward_features"):
        return
    flag = "judge" if run.name == "judge" else "explainer"
    words = run.words(pause=0, timeout=1) + [f"--{flag}_model", "m", f"--{flag}", "{endpoint}"]
    for what, reply in REPLIES.items():
        before = functools.partial(answer_with, *reply)
        key = {"OPENAI_API_KEY": SECRET}
        # Without a length an answer ends where the server ends it: in time, or not.
        expected = "any" if what == "a bad length" else "stopped"
        yield Case(
            f"an endpoint: {what}", run, expected, words=words, before=before, environment=key
        )
    good = functools.partial(answer_with, 200, {}, chat("1"), 0)
    for what, key in {"CR": SECRET + "\r", "newline inside": SECRET[:5] + "\n" + SECRET,
                      "a space inside": "a " + SECRET, "not ASCII": SECRET + "\u20ac",
                      "a surrogate": SECRET + "\udcff"}.items():  # fmt: skip
        environment = {"OPENAI_API_KEY": key}
        expected = "any" if what == "CR" else "stopped"
        yield Case(
            f"a key: {what}", run, expected, words=words, before=good, environment=environment
        )
    for url in ("http://127.0.0.1:1/v1", "http://", "http://127.0.0.1:x/v1", "http://[/v1",
                f"http://127.0.0.1/v1?key={SECRET}", f"http://me:{SECRET}@127.0.0.1/v1",
                "HTTP://127.0.0.1:1", "http://127.0.0.1:1/a b", "http://no.such.host.invalid/v1",
                "http:/x", "https:"):  # fmt: skip
        given = [url if word == "{endpoint}" else word for word in words]
        yield Case(f"--{flag} {url.replace(SECRET, 'KEY')}", run, "stopped", words=given)

"""Cases of fuzz.py in which a flag, the environment, a reward function or an endpoint is wrong, or
only odd.
"""

import dataclasses
import functools
import gzip
import os
import resource
import shutil
import typing

from fuzz_damage import deep_json, replace
from fuzz_material import Case, Reply, answer_with, chat

from nanorlhf.evals import diversity_report

SECRET = "sk-SECRET123456"


# -------------------------------------------------------------------------------------------- flags


# Flags that take paths: of what is read, and of what is written.
READS = (
    "model base policy reward_model gold_model value_model sae sarm feature_sae human_latents "
    "dataset eval_dataset pool a b reward answers against texts encoder nli_model tokenizer "
    "explainer score_gold from_files"
).split()


# Those that may be left empty.
OPTIONAL = (
    "value_model gold_model human_latents feature_sae encoder nli_model tokenizer answers against "
    "base sae sarm pool score_gold"
).split()


WRITES = ("output_dir", "output", "save", "cache")


CHOICES = (
    "dtype distributed schedule loss sarm_mode objective kl_kind kl_in score_scaling advantage "
    "loss_mean split sites site normalize bias kind tokens by benchmark penalty device "
    "prompt_format"
).split()


# Flags for which a number below 0 stands for something, or may.
MAY_BE_NEGATIVE = {"layer", "final_lr", "lam", "missing_eos_penalty", "length_penalty"}


# Flags for which infinity says "never" or "no limit".
MAY_BE_INFINITE = {"max_grad_norm", "kl_target", "target_kl", "score_clip", "clip_range"}
MAY_BE_INFINITE |= {"clip_range_high", "value_clip_range", "timeout", "requests_per_minute"}
MAY_BE_INFINITE |= {"temperature"}


# With 2**70 of these a run is right to go on for ever.
NEVER_DONE = {"steps", "members", "ppo_epochs", "seeds", "draws", "n_answers", "triples"}


def names_of(config):
    return [field.name for field in dataclasses.fields(config)]


# Of some runs: the flags that they look at, or do not.
USED = {
    "ppo score_gold": {"score_gold", "gold_model", "micro_batch_size", "device"},
    "bon from": {*names_of(diversity_report.Flags), "output_dir"},
}


UNUSED = {
    "bon pool": {"model", "dataset", "eval_dataset", "in_distribution", "columns"},
    "evaluate rewardbench2": {"eval_dataset", "columns"},
    "evaluate rm_bench": {"eval_dataset", "columns"},
}


def is_used(run, name):
    """Whether a run looks at a flag at all. --score_gold trains nothing, --from samples nothing."""
    return name in USED.get(run.name, {name}) and name not in UNUSED.get(run.name, ())


def used_flags(run):
    """The names of the flags of a run's script that the run looks at."""
    return [name for name in names_of(run.config) if is_used(run, name)]


def is_choice_of_train_sae(run, name):
    """--sae and --texts of train_sae.py are choices; elsewhere they are paths."""
    return name in ("sae", "texts") and run.script == "train_sae.py"


def with_flag(run, name, *values):
    """The command line of a run in which a flag has other values."""
    return [*run.words(**{name: None}), f"--{name}", *values]


# ----------------------------------------------------------------------------------------- numbers


def cases_of_numbers(run):
    """Every numeric flag of a script with numbers that are out of range, and with none."""
    hints = typing.get_type_hints(run.config)
    for name in used_flags(run):
        if hints[name] in (int, int | None, list[int]):
            values = whole_numbers()
        elif hints[name] in (float, float | None, list[float]):
            values = real_numbers(name)
        else:
            continue
        if name in MAY_BE_NEGATIVE:
            values["-1"] = "any"
        if name in NEVER_DONE:
            values.pop("2**70", None)

        for value, expected in values.items():
            given = [NUMBERS.get(value, value)]
            if name == "betas":  # takes two numbers
                given.append("0.9")
            yield Case(f"--{name} {value}", run, expected, words=with_flag(run, name, *given))


# Numbers that are named in words.
NUMBERS = {"2**70": str(2**70), "5,000 digits": "9" * 5000}


# What may be given for any number: {value: expected}.
ANY_NUMBER = {"nan": "refused", "text": "refused", "": "refused", "-1": "refused", "0": "any"}


def whole_numbers():
    numbers = dict(ANY_NUMBER)
    numbers |= {"1e300": "refused", "inf": "refused", "0.5": "refused", "2**70": "any"}
    numbers["5,000 digits"] = "refused"
    return numbers


def real_numbers(name):
    numbers = dict(ANY_NUMBER)
    numbers |= {"inf": "refused", "1e300": "any", "1e-300": "any", "2**70": "any"}
    if name in MAY_BE_INFINITE:
        numbers["inf"] = "any"
    return numbers


# ------------------------------------------------------------------------------ choices, and paths


def cases_of_choices(run):
    for name in used_flags(run):
        is_choice = name in CHOICES or is_choice_of_train_sae(run, name)
        is_choice = is_choice or (name == "task" and run.script == "probe.py reward")
        if not is_choice:
            continue
        for value in ("nonsense", "None", "\u00e9", "0"):
            words = with_flag(run, name, value)
            yield Case(f"--{name} {value}", run, "refused", words=words)


def cases_of_paths(run):
    """Every flag that names what is there, and what will be."""
    if run.name.endswith("--resume"):
        return
    for name in used_flags(run):
        if is_choice_of_train_sae(run, name):
            continue
        if name in READS:
            yield from cases_of_inputs(run, name)
        if name in WRITES:
            yield from cases_of_outputs(run, name)


LONG_NAME = "x" * 300
NO_TEXT = "x\udcff"  # a name whose bytes are no text


INPUTS = ["./nothing/here", "/dev/null/x", "loop", "loop/x", LONG_NAME, NO_TEXT, "a\nb"]
INPUTS += ["/proc/self/mem", "sft.jsonl/x", "\u00e9t\u00e9", "/", "{seed}", "*", "-", "~"]


OUTPUTS = ["", "/dev/null/x", "loop", "loop/x", "sft.jsonl", "sft.jsonl/x", LONG_NAME, "/proc/x"]
OUTPUTS += ["model", ".", NO_TEXT, "a/" + "y" * 300]


def make_loop(here, rng):
    """A link to itself."""
    (here / "loop").symlink_to("loop")


def shown(value):
    return repr(value) if len(value) < 30 else "300 letters"


def cases_of_inputs(run, name):
    """What cannot be read."""
    for value in INPUTS:
        # An explainer may be "-": none.
        if (name, value) != ("explainer", "-"):
            words = with_flag(run, name, value)
            yield Case(f"--{name} {shown(value)}", run, "refused", make_loop, words)
    if run.flags.get(name) and name not in OPTIONAL:
        yield Case(f"--{name} ''", run, "refused", words=with_flag(run, name, ""))


def cases_of_outputs(run, name):
    """Where nothing can be written."""
    for value in OUTPUTS:
        is_default = value == "" and name in ("save", "cache")
        is_default = is_default or (
            value == "" and name == "output_dir" and run.script == "train_sft.py"
        )
        if is_default:
            continue
        expected = "refused"
        # A cache may lie in any folder; bytes that are no text may be a name.
        if (name == "cache" and value in ("model", ".")) or value == NO_TEXT:
            expected = "any"
        words = with_flag(run, name, value)
        yield Case(f"--{name} {shown(value)}", run, expected, make_loop, words)


# {what a copy is called: how it is made}
COPIES = {"\u00fcber uns": "copy", "with a space": "copy", "linked": "link"}


def cases_of_other_names(run):
    """The same thing under another name: the same numbers."""
    if run.name.endswith(("--resume", "again")):
        return
    for flag, value in run.flags.items():
        path = single_path(value)
        if flag not in READS or path in (None, "none", "world") or "{seed}" in path:
            continue
        if is_choice_of_train_sae(run, flag) or flag == "score_gold":
            continue
        yield from cases_of_names(run, flag, path)


def single_path(value):
    """The one path of a flag's value, or None."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    return value if isinstance(value, str) else None


def cases_of_names(run, flag, path):
    """Other names of a file or a folder; of a path such as rewards.py:good, of the file."""
    file, colon, function = path.partition(":")
    rest = colon + function
    is_file = file.endswith((".jsonl", ".py", ".tsv", ".safetensors", ".json"))
    names = {"./": f"./{file}", "a//b": f".//{file}", "absolute": f"{{here}}/{file}"}
    if not is_file:
        names["trailing slash"] = f"{file}/"
    for what, name in names.items():
        words = run.words(**{flag: name + rest})
        yield Case(f"--{flag} {what}", run, "equal", words=words)

    suffix = os.path.splitext(file)[1] if is_file else ""
    for what, how in COPIES.items():
        name = what + suffix
        damage = functools.partial(make_copy, old=file, new=name, how=how)
        words = run.words(**{flag: name + rest})
        yield Case(f"--{flag} {what}", run, "equal", damage, words)


def make_copy(here, rng, old, new, how):
    if how == "link":
        (here / new).symlink_to(old)
    elif (here / old).is_dir():
        shutil.copytree(here / old, here / new)
    else:
        shutil.copy2(here / old, here / new)


# ------------------------------------------------------------------------------- small languages


def cases_of_texts(run):
    """Flags that are small languages of their own."""
    flags = used_flags(run)
    for name, values in SMALL_LANGUAGES.items():
        if name not in flags:
            continue
        for value in values.split(" | "):
            words = with_flag(run, name, *value.split(" "))
            if name == "lora_layers":
                words += ["--lora_rank", "2"]
            yield Case(f"--{name} {value}", run, "refused", words=words)
    yield Case("--nonsense", run, "refused", words=[*run.words(), "--nonsense"])
    yield Case("a word too many", run, "refused", words=[*run.words(), "--seed", "0", "word"])
    if "columns" in flags and run.flags.get("dataset", "world") != "world":
        for value in ("prompt", "prompt=", "prompt=nothing"):
            words = [*run.words(), "--columns", value]
            yield Case(f"--columns {value}", run, "refused", words=words)


# {flag: values that are wrong, with " | " between them}
SMALL_LANGUAGES = {
    "layers": "99 | -1 | 1, | highest:0 | highest:x | highest | nonsense | 1;2 | \u00b2",
    "features": "99999 | -1 | x | 3,,4 | \u00b2 | 1.5",
    "edits": "3 | x:set:0 | 3:set:x | 3:set:nan | 3:set:1e39 | 99999:set:0 | 3:nonsense:0",
    "weights": "3 | x:*:0 | 3:*:inf | 3:*:nan | 99999:*:0 | -1:*:0",
    "clamp": "3 | 3:max:nan | 3:max:1e39 | 99999:max:0 | 3:*:2",
    "tau": "q2 | q-1 | nan | x | 0.5 0.6 | 1e39",
    "alpha": "-1 | nan | xstd | inf | 1e39",
    "penalize_features": "99999 | -1 | 3 3 | x",
    "eval_splits": "nonsense | ood= | test test | x=missing.jsonl | eval=sft.jsonl",
    "in_distribution": "nonsense | words: | words:prompt<=x | a= | rewards.py:nothing",
    "lora_layers": "( | nothing",
    "dataset": "world:x | world:\u00b2 | world:-1 | world:" + "9" * 5000,
    "truncate": "x | -1 | 0 | \u00b2",
    "judge": "http:// | http://[ | llm: | llm:missing | http://user:pw@127.0.0.1:9/v1",
    "uwo_lambda": "x | -1 | nan",
}


# --------------------------------------------------------------------------------- output folders


def cases_of_finished_runs(run):
    """An output folder that holds something else, and one whose run is done."""
    if run.writes != "out":
        return
    another = "half_rm" if run.script == "train_sft.py" else "half_sft"
    words = run.words(output_dir=another)
    yield Case("--output_dir of another run", run, "refused", words=words)
    yield Case("--output_dir with notes in it", run, "refused", write_notes)
    yield Case("--output_dir empty", run, "equal", make_output)
    for what, place in {"deep": "deep/er/out", "with odd letters": "\u00e4 b\u200b"}.items():
        words = run.words(output_dir=place)
        yield Case(f"--output_dir {what}", run, "equal", words=words, writes=place)
    yield Case("--output_dir a link to a folder", run, "equal", link_output)
    yield Case("--output_dir a dangling link", run, "any", link_output_to_nothing)


def make_output(here, rng):
    (here / "out").mkdir()


def write_notes(here, rng):
    make_output(here, rng)
    (here / "out/notes.txt").write_text("notes\n")


def link_output(here, rng):
    (here / "there").mkdir()
    (here / "out").symlink_to("there")


def link_output_to_nothing(here, rng):
    (here / "out").symlink_to("nowhere")


def cases_of_numerics(run):
    """Settings with which no finite number comes out."""
    is_trained = run.script in ("train_sft.py", "train_rm.py", "train_ppo.py", "train_sae.py")
    if not is_trained or run.name.endswith("--resume") or "score_gold" in run.name:
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
    "an iterator without an end": "import itertools; return itertools.repeat(1.0)",
}


ODD_REWARDS = {
    "a tuple": "return tuple(real(prompts, responses))",
    "an iterator": "yield from real(prompts, responses)",
    "an array": "import numpy; return numpy.array(real(prompts, responses))",
    "a tensor": "import torch; return torch.tensor(real(prompts, responses), dtype=torch.float64)",
    "sorts its list": "out = real(prompts, responses); responses.sort(); return out",
    "empties its lists": """out = real(prompts, responses)
    prompts.clear(); responses.clear()
    return out""",
    "prints": "print('hello'); return real(prompts, responses)",
    "draws random numbers": """import torch, random; torch.rand(5); random.random()
    return real(prompts, responses)""",
    "switches gradients off": """import torch; torch.set_grad_enabled(False)
    return real(prompts, responses)""",
    "computes in float64": """import torch; torch.set_default_dtype(torch.float64)
    return real(prompts, responses)""",
    "goes to another folder": """import os; os.chdir("/")
    return real(prompts, responses)""",
    "makes a dataclass": """import dataclasses
    Score = dataclasses.make_dataclass("Score", [("score", "float")])
    return [Score(score).score for score in real(prompts, responses)]""",
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
    if run.name not in CALLS:
        return
    function = CALLS[run.name]
    words = run.words()
    if run.name == "rm":
        words = run.words(gold_model=f"rewards.py:{function}")

    for what, body in IMPORT_TIME.items():
        code = "def other(): pass\n" + body.replace("{function}", function)
        damage = functools.partial(append_code, code=code)
        yield Case(f"a reward: {what}", run, "refused", damage, words)

    # These runs keep answers and other scores, whatever the reward does then.
    expected = "refused"
    if run.name in ("bon", "bon pool", "judge", "rm"):
        expected = "stopped"
    for what, body in WRONG_REWARDS.items():
        code = WORDLESS + define(function, body.format(function=function))
        damage = functools.partial(append_code, code=code)
        yield Case(f"a reward: {what}", run, expected, damage, words)

    if run.name != "rm":
        for what, body in ODD_REWARDS.items():
            code = f"real = {function}\n" + define(function, body)
            damage = functools.partial(append_code, code=code)
            yield Case(f"a reward: {what}", run, "equal", damage, words)


WORDLESS = """class Wordless(Exception):
    def __str__(self): return 1 / 0
"""


def define(function, body):
    """The code of a reward function; further lines of its body are indented already."""
    return f"def {function}(prompts, responses):\n    {body}\n"


def append_code(here, rng, code):
    """More code at the end of rewards.py."""
    known = (here / "rewards.py").read_text()
    replace(here / "rewards.py", f"{known}\n{code}")


PREDICATES = {
    "raises": "raise KeyError(1)",
    "exits": "raise SystemExit(0)",
    "None": "return None",
    "a number": "return 3",
    "an array": "import numpy; return numpy.zeros(3)",
    "a string": "return 'yes'",
    "never": "return False",
    "always": "return True",
    "empties the row": "row.clear(); return True",
}


def cases_of_predicates(run):
    """A function of a row, --in_distribution, that misbehaves."""
    if run.name not in ("sft", "rm", "ppo", "bon"):
        return
    words = [*run.words(), "--in_distribution", "rewards.py:short"]
    for what, body in PREDICATES.items():
        damage = functools.partial(append_code, code=f"def short(row):\n    {body}\n")
        expected = "any" if what in ("always", "empties the row") else "refused"
        yield Case(f"a predicate: {what}", run, expected, damage, words)


# ---------------------------------------------------------------------------------- the environment


# torchrun's variables, as of one process alone, and what is wrong with one of them.
ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29417",
}
WRONG_VARIABLES = (
    "RANK=x WORLD_SIZE=x LOCAL_RANK=x RANK=-1 WORLD_SIZE=0 RANK=1 MASTER_PORT=x "
    "MASTER_PORT=99999999 WORLD_SIZE=-2 RANK= WORLD_SIZE= LOCAL_RANK=\u00b2"
).split()


def cases_of_environment(run):
    """torchrun's variables, a full disk."""
    for assignment in WRONG_VARIABLES:
        name, _, value = assignment.partition("=")
        expected = "any" if name == "MASTER_PORT" else "refused"  # one process may not need it
        environment = {**ALONE, name: value}
        yield Case(f"{assignment} of torchrun's", run, expected, environment=environment)
    yield Case("WORLD_SIZE=2 alone", run, "refused", environment={"WORLD_SIZE": "2"})
    yield Case("RANK=0 alone", run, "any", environment={"RANK": "0"})

    # This run has an endpoint to start before it, and a case can do one thing before.
    if run.name == "judge choices":
        return
    sizes = (3000, 12_000)
    if run.script.startswith("probe"):
        sizes = (300, 3000)
    for size in sizes:
        before = functools.partial(limit_files, size)
        name = f"files of {size} bytes at most"
        yield Case(name, run, "failed or equal", before=before)


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# ---------------------------------------------------------------------------------------- endpoints


REPLIES = {
    "garbage": Reply(b"\x00\xff\xfe garbage"),
    "empty": Reply(b""),
    "null": Reply(b"null"),
    "no choices": Reply(b'{"choices": []}'),
    "deep": Reply(deep_json().encode()),
    "5,000 digits": Reply(b'{"choices": ' + b"7" * 5000 + b"}"),
    "a number as text": Reply(chat(3)),
    "an essay": Reply(chat("I would rather not say. " * 50)),
    "huge": Reply(chat("word " * 200_000)),
    "500": Reply(b"oops", 500),
    "429 for an hour": Reply(b"", 429, {"Retry-After": "3600"}),
    "Retry-After nan": Reply(b"", 429, {"Retry-After": "nan"}),
    "Retry-After inf": Reply(b"", 429, {"Retry-After": "inf"}),
    "Retry-After a bad date": Reply(b"", 503, {"Retry-After": "Mon, 99 Foo 99999 99:99:99"}),
    "401 with the key": Reply(f"bad key {SECRET}".encode(), 401),
    "400 with the key": Reply(f"bad key {SECRET}".encode(), 400),
    "the key as an answer": Reply(chat(f"the key is {SECRET}")),
    "a redirect": Reply(b"", 302, {"Location": "http://127.0.0.1:9/"}),
    "a wrong length": Reply(chat("1"), headers={"Content-Length": "999999"}),
    "a bad length": Reply(chat("1"), headers={"Content-Length": "x"}),
    "gzip": Reply(gzip.compress(chat("1")), headers={"Content-Encoding": "gzip"}),
    "drip": Reply(chat("1") + b" " * 600, pause=0.2),
    "latin-1": Reply(chat("caf\u00e9"), headers={"Content-Type": "text/plain; charset=latin-1"}),
}


# Keys that are none; after a CR alone the key itself is right.
BAD_KEYS = {
    "CR": SECRET + "\r",
    "newline inside": SECRET[:5] + "\n" + SECRET,
    "a space inside": "a " + SECRET,
    "not ASCII": SECRET + "\u20ac",
    "a surrogate": SECRET + "\udcff",
}


BAD_URLS = [
    "http://127.0.0.1:1/v1",
    "http://",
    "http://127.0.0.1:x/v1",
    "http://[/v1",
    f"http://127.0.0.1/v1?key={SECRET}",
    f"http://me:{SECRET}@127.0.0.1/v1",
    "HTTP://127.0.0.1:1",
    "http://127.0.0.1:1/a b",
    "http://no.such.host.invalid/v1",
    "http:/x",
    "https:",
]


def cases_of_endpoints(run):
    """A judge or an explainer behind an endpoint that answers oddly, and keys that are none."""
    if run.name not in ("judge", "features", "reward_features"):
        return
    flag = "judge" if run.name == "judge" else "explainer"
    words = [*run.words(pause=0, timeout=1), f"--{flag}_model", "m", f"--{flag}"]

    def make_case(name, expected, reply, key):
        before = functools.partial(answer_with, reply)
        environment = {"OPENAI_API_KEY": key}
        given = [*words, "{endpoint}"]
        return Case(name, run, expected, words=given, before=before, environment=environment)

    for what, reply in REPLIES.items():
        # Without a length an answer ends where the server ends it: in time, or not.
        expected = "any" if what == "a bad length" else "stopped"
        yield make_case(f"an endpoint: {what}", expected, reply, SECRET)
    good_reply = Reply(chat("1"))
    for what, key in BAD_KEYS.items():
        expected = "any" if what == "CR" else "stopped"
        yield make_case(f"a key: {what}", expected, good_reply, key)
    for url in BAD_URLS:
        name = f"--{flag} {url.replace(SECRET, 'KEY')}"
        yield Case(name, run, "stopped", words=[*words, url])

"""Cases of fuzz.py in which a file or a folder that a run reads is damaged, or says the same in an
odd way.
"""

import functools
import gzip
import json
import os
import shutil

import torch
from fuzz_damage import (
    JSON_FILE,
    JSON_VALUES,
    NAN,
    ODD_ROWS,
    OTHER_FORMATS,
    TENSOR_FILE,
    TEXT_FILE,
    add_line,
    add_one,
    bad_rows,
    cast,
    change_rows,
    change_tensors,
    change_text,
    deep_json,
    drop_first_line,
    drop_optimizer,
    edit_json,
    flip_bit,
    flip_header,
    header_of,
    keep_bytes,
    keep_lines,
    replace,
    set_deep,
    set_in_line,
    set_in_row,
    set_key,
    set_notes,
    turn_lines,
    write,
)
from fuzz_material import LEXICON, REWARDS, RUNS, Case, half
from safetensors.torch import load_file

ROWS = ("sft", "pairs", "prompts", "pool")  # the kinds of files of one row a line


def on_file(path, damage):
    """A damage of one of the files of the case.

    A path that is only a beginning stands for the first such file.
    """

    def do(here, rng):
        target = here / path
        if not target.exists():
            (target, *_) = sorted(target.parent.glob(target.name + "*"))
        damage(target, rng)

    return do


def paths_read(run, *kinds):
    """The paths of the files of these kinds that a run reads."""
    return [path for path, kind in run.reads.items() if kind in kinds]


def configs_read(run):
    """The paths of the config.json files that a run reads, a run's own config among them."""
    return [path for path in run.reads if path.endswith("/config.json")]


# ----------------------------------------------------------------------------------- single files


def cases_of_files(run):
    """Damage to each file that a run reads."""
    for path, kind in run.reads.items():
        damages_of_kind = DAMAGES.get(kind, damages_of_json)
        for what, damage, expected in damages_of_kind(run, path):
            yield Case(f"{path}: {what}", run, expected, on_file(path, damage))


# The functions below yield (name, damage, expected) of a file that a run reads.


def all_of(table, expected):
    """A table {name: damage}, all of which have one outcome."""
    for what, damage in table.items():
        yield what, damage, expected


def damages_of_rows(run, path):
    yield from all_of(TEXT_FILE, "refused")
    damages = bad_rows(path)
    # Half of a character is read as U+FFFD.
    yield "a lone surrogate", damages.pop("a lone surrogate"), "any"
    yield from all_of(damages, "refused")
    yield from all_of(ODD_ROWS, "equal")
    yield "flipped bit", flip_bit(), "any"


def damages_of_tensors(run, path):
    yield from all_of(TENSOR_FILE, "refused")
    yield from flipped_bits(3, 0.7, "any")
    yield "float16", cast(torch.float16), "any"
    yield "one more tensor", change_tensors(add_one), "any"


def damages_of_checkpoints(run, path):
    """There is an older checkpoint to go on from."""
    yield from all_of(TENSOR_FILE, "sound")
    yield from flipped_bits(4, 0.3, "sound")
    yield "float16", cast(torch.float16), "sound"
    yield "one more tensor", change_tensors(add_one), "sound"
    yield "without the optimizer", change_tensors(drop_optimizer), "sound"


def flipped_bits(n, first, expected):
    """n of them in the header, and n behind this share of the file."""
    for i in range(n):
        yield f"flipped bit in the header {i}", flip_header, expected
        yield f"flipped bit {i}", flip_bit(first), expected


def damages_of_states(run, path):
    yield from all_of(JSON_FILE, "sound")
    for name in ("step", "files", "logs", "sha256"):
        for what in JSON_VALUES:
            yield f"{name} {what}", functools.partial(set_key, name=name, what=what), "sound"


def first_lines(lines, expected):
    """One more line at the beginning."""
    for line in lines:
        yield f"a line {line[:12]}", add_line(line, at=0), expected


LONG_LINE = deep_json()[:150_000]


def damages_of_logs(run, path):
    expected = "sound" if "--resume" in run.name else "refused"
    yield from all_of(TEXT_FILE, expected)
    lines = ["null", "3", "[]", "{}", '{"step": "x"}', '{"step": ', LONG_LINE]
    yield from first_lines(lines, expected)
    yield "a row is lost", drop_first_line, "any"


def damages_of_lexicons(run, path):
    yield from all_of(TEXT_FILE, "refused")
    for what, text in BAD_LEXICONS.items():
        yield what, write(text), "refused"
    for what, text in LEXICONS_WITH_A_NOTE.items():
        yield what, write(text), "any"
    for what, change in ODD_LEXICONS.items():
        yield what, change_text(change), "equal"


def damages_of_code(run, path):
    yield from all_of(TEXT_FILE, "refused")
    missing_function = "def other(prompts, responses): return [1.0]\n"
    yield "without the function", write(missing_function), "refused"
    yield "a syntax error", write("def good(:\n"), "refused"


def damages_of_caches(run, path):
    """What is damaged is made again."""
    yield from all_of(TEXT_FILE, "sound")
    yield from first_lines(["null", "3", "{}", '{"index": 0}', LONG_LINE], "sound")
    yield "every line twice", change_text(lambda text: text * 2), "sound"
    yield "lines in another order", turn_lines, "sound"
    yield "cut by a kill", keep_bytes(-9), "equal"
    for what, value in {"a string": "x", "3": 3, "nan": NAN, "null": None}.items():
        for name in ("scores", "response_ids", "choice", "key"):
            damage = functools.partial(set_in_line, name=name, value=value)
            yield f"{name} {what}", damage, "sound"
    yield "a line is lost", change_text(drop_line), "sound"


def drop_line(text):
    return "\n".join(text.splitlines()[1:])


def damages_of_benchmarks(run, path):
    yield from all_of(JSON_FILE, "refused")
    for name in ("id", "prompt", "chosen", "rejected"):
        for what in ("missing", "null", "text", "a list", "an object", "0"):
            # An id is not needed, and any text is a prompt.
            may_be = name == "id" or (name == "prompt" and what == "text")
            damage = functools.partial(set_in_row, name=name, what=what)
            yield f"{name} {what}", damage, "any" if may_be else "refused"


def damages_of_json(run, path):
    """Of any other file, a JSON object."""
    kind = run.reads[path]
    for what, damage in JSON_FILE.items():
        is_harmless = may_be_so(kind, what) or may_be_gone(kind, path, what)
        yield what, damage, "any" if is_harmless else "refused"

    # Human latents know the reward model by its files' bytes.
    same = "sound" if "feature" in run.name else "equal"
    if kind != "tokenizer":
        yield "indented", change_text(indent), same
    if kind in ("model config", "cfg"):
        more = {"a_key_of_nobody": {"a": [1, "\u00e9"]}}
        yield "one more key", lambda path, rng: edit_json(path, more), same

    for name in KEYS.get(kind, []):
        for what in JSON_VALUES:
            if (name, what) not in ENDLESS:
                damage = functools.partial(set_key, name=name, what=what)
                yield f"{name} {what}", damage, expected_of_key(run, kind, name, what)


def indent(text):
    return json.dumps(json.loads(text), indent=7)


def may_be_so(kind, what):
    """transformers takes a tokenizer's config that is no object for an empty one."""
    return kind == "tokenizer config" and what in ("null", "a number", "a string", "a list")


def may_be_gone(kind, path, what):
    if what == "a number of 5,000 digits":
        return path.endswith("tokenizer.json")
    is_gone = what in ("missing", "a folder", "a link to itself")
    return is_gone and kind in ("notes", "tokenizer config", "tokenizer", "run config", "object")


def expected_of_key(run, kind, name, what):
    """Outcome where an entry of a JSON object is changed."""
    is_resumed = kind == "run config" and "--resume" in run.name
    if is_resumed and what in ("nan", "an object"):
        return "sound"
    if (name, what) in WRONG.get(kind, ()):
        return "refused"
    return "any"


# {kind of a file: what is done to it}; all others are JSON objects.
DAMAGES = {
    "sft": damages_of_rows,
    "pairs": damages_of_rows,
    "prompts": damages_of_rows,
    "pool": damages_of_rows,
    "weights": damages_of_tensors,
    "human": damages_of_tensors,
    "checkpoint": damages_of_checkpoints,
    "state": damages_of_states,
    "log": damages_of_logs,
    "eval": damages_of_logs,
    "lexicon": damages_of_lexicons,
    "python": damages_of_code,
    "cache": damages_of_caches,
    "choices": damages_of_caches,
    "benchmark": damages_of_benchmarks,
}


BAD_LEXICONS = {
    "no tabs": "good 3\nbad -3\n",
    "no number": "good\tlots\n",
    "nan": "good\tnan\nbad\t-3\n",
    "inf": "good\tinf\nbad\t-3\n",
    "1e999": "good\t1e999\nbad\t-3\n",
    "blank": "\n\n",
}

# Lines without effect are counted and said, and the rest is read.
LEXICONS_WITH_A_NOTE = {
    "two words": LEXICON + "very good\t3\n",
    "an empty word": LEXICON + "\t3\n",
    "a word twice, with two values": LEXICON + "good\t-2\n",
}


ODD_LEXICONS = {
    "BOM": lambda text: "\ufeff" + text,
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "blank lines": lambda text: text.replace("\n", "\n\n"),
    "more columns": lambda text: text.replace("\n", "\tmore\tand more\n"),
    "upper case": str.upper,
}


# Entries of JSON files that are changed one by one.
KEYS = {
    "model config": (
        "model_type vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
        "max_position_embeddings eos_token_id pad_token_id architectures dtype layer_norm_eps "
        "rope_parameters hidden_act tie_word_embeddings id2label num_labels reward_mean reward_std "
        "sarm_param quantization_config attn_implementation auto_map transformers_version use_cache"
    ).split(),
    "tokenizer config": "eos_token pad_token unk_token tokenizer_class model_max_length".split(),
    "cfg": "architecture d_in d_sae k dtype normalize_activations metadata".split(),
    "adapter config": (
        "peft_type base_model_name_or_path r lora_alpha lora_dropout target_modules bias "
        "modules_to_save fan_in_fan_out rank_pattern use_dora task_type"
    ).split(),
    "notes": ["base", "reward_mean", "reward_std"],
    "run config": (
        "steps batch_size betas lr model dataset seed eval_splits inputs dtype output_dir columns"
    ).split(),
    "object": ["after", "before", "steps", "command", "output_dir"],
}


# Names of JSON_VALUES, separated by commas.
NUMBERS = "text, a list, an object, -1, 2.5, 1e300, 2**70, nan"
EVERYTHING = ", ".join(JSON_VALUES)


def each_of(names, values):
    """{(name, value)}: names, separated by spaces, with each of the values."""
    entries = set()
    for name in names.split():
        for value in values.split(", "):
            entries.add((name, value))
    return entries


# What can be nothing but wrong.
WRONG = {
    "model config": (
        each_of("vocab_size hidden_size", NUMBERS)
        | each_of("num_attention_heads", f"{NUMBERS}, 0")
        | each_of("model_type", "missing, null, text, a list, 0, nan")
        | each_of("dtype", "text, a list")
    ),
    "tokenizer config": each_of("eos_token", "missing, null, 0, a list"),
    "cfg": each_of("d_in d_sae k", f"{NUMBERS}, 0, missing") | each_of("architecture", EVERYTHING),
    "adapter config": (
        each_of("peft_type base_model_name_or_path", "null")
        | each_of("r", f"{NUMBERS}, 0, missing")
        | each_of("lora_dropout", "nan, 2.5, -1, text")
        | each_of("modules_to_save", "2.5, true, text")
    ),
    "run config": each_of("steps", "text, a list, -1, 2.5, nan"),
}


# A model of so many layers takes for ever to make, a run of so many steps to do, and transformers
# writes down a name for each label.
ENDLESS = each_of("num_hidden_layers num_labels steps batch_size", "2**70")


# --------------------------------------------------------------------------------------------- data


def cases_of_formats(run):
    """The same rows in another format, and archives that are damaged."""
    for path in paths_read(run, *ROWS):
        for what, (damage, suffix) in OTHER_FORMATS.items():
            words = words_with(run, path, path.replace(".jsonl", suffix))
            yield Case(f"{path}: {what}", run, "equal", on_file(path, damage), words)
        if flags_of(run, path):
            words = words_with(run, path, f"{path}.gz")
            cut = functools.partial(pack_and_cut, path=path)
            yield Case(f"{path}: gz cut", run, "refused", cut, words)
            flipped = functools.partial(pack_and_flip, path=path)
            yield Case(f"{path}: gz flipped", run, "refused", flipped, words)


def flags_of(run, path):
    """The flags that name this file and no other one."""
    return [name for name, value in run.flags.items() if value in (path, [path])]


def words_with(run, path, other):
    """The command line with another file in the place of a file."""
    changes = {}
    for name, value in run.flags.items():
        if isinstance(value, list):
            changes[name] = [other if item == path else item for item in value]
        elif value == path:
            changes[name] = other
    return run.words(**changes)


def pack_and_cut(here, rng, path):
    packed = gzip.compress((here / path).read_bytes())
    replace(here / f"{path}.gz", packed[:-20])


def pack_and_flip(here, rng, path):
    packed = bytearray(gzip.compress((here / path).read_bytes()))
    packed[len(packed) // 2] ^= 0x41
    replace(here / f"{path}.gz", bytes(packed))


def cases_of_contents(run):
    """Data that are well formed, but hardly meant."""
    for path in paths_read(run, "sft", "pairs", "prompts"):
        for what, change in CONTENTS.items():
            damage = functools.partial(change_texts, change=change)
            yield Case(f"{path}: {what}", run, "any", on_file(path, damage))
        for what, n in {"one row": 1, "two rows": 2}.items():
            yield Case(f"{path}: {what}", run, "any", on_file(path, keep_lines(n)))


def change_texts(path, rng, change):
    """change(name of the field, text) in every field of every row."""

    def change_row(row):
        for name, value in row.items():
            if isinstance(value, str):
                row[name] = change(name, value)

    change_rows(path, change_row)


def everywhere(text):
    return lambda name, old: text


def in_prompts(text):
    return lambda name, old: text if name == "prompt" else old


def in_answers(text):
    return lambda name, old: old if name == "prompt" else text


def around(before, after):
    return lambda name, old: before + old + after


CONTENTS = {
    "empty texts": everywhere(""),
    "empty prompts": in_prompts(""),
    "empty answers": in_answers(""),
    "white space alone": everywhere(" \n\t"),
    "the same prompt everywhere": in_prompts("a b"),
    "the same answer everywhere": in_answers("a b"),
    "long texts": around("", " very" * 300),
    "very long texts": around("", " very" * 3_000),
    "words that nobody knows": lambda name, old: "xyzzy " + old[::-1],
    "NUL": around("\0", "\0"),
    "line separators": lambda name, old: old.replace(" ", " \u2028\x85\x0c", 1),
    "emoji": around("\U0001f600 ", ""),
    "right to left": around("\u202e", ""),
    "special tokens": around("<eos> <pad> ", ""),
}


# ------------------------------------------------------------------------------------------- models


def cases_of_code(run):
    """Model folders that bring code, or point elsewhere."""
    for path in configs_read(run):
        if run.reads[path] != "model config":
            continue
        folder = os.path.dirname(path)
        if folder not in ("encoder", "nli", "classifier"):
            for model_type in ("mamba", "gpt_neox", "nothing"):
                damage = functools.partial(add_code, folder=folder, model_type=model_type)
                expected = expected_of_code(run, folder, model_type)
                yield Case(f"{folder}: code for {model_type}", run, expected, damage)
        for what, target in INDEXES.items():
            damage = functools.partial(add_index, folder=folder, target=target)
            yield Case(f"{folder}: an index {what}", run, "refused", damage)
        # PPO reads no tokenizer of a value model.
        is_read = not (run.name == "ppo value_model" and folder.startswith("rms"))
        expected = "refused" if is_read else "any"
        damage = functools.partial(add_words, folder=folder)
        yield Case(f"{folder}: vocabulary larger than the embeddings", run, expected, damage)


def expected_of_code(run, folder, model_type):
    if model_type == "gpt_neox":
        return "any"
    if run.name == "bon" and folder.startswith("rms"):
        return "stopped"  # its answers are kept, whatever the reward model is
    return "refused"


INDEXES = {
    "to a pickle": "pytorch_model.bin",
    "outside": "../model/model.safetensors",
    "far outside": "../../model/model.safetensors",
    "absolute": "/dev/null",
    "to nothing": "model-00001-of-00002.safetensors",
    "of numbers": 3,
}


def add_code(here, rng, folder, model_type):
    """A config that names Python code; the code says so if it is run."""
    evil = "open('the_code_was_run', 'w').close()\nclass Evil: pass\n"
    replace(here / folder / "evil.py", evil)
    classes = ["AutoModelForSequenceClassification"]
    if model_type != "mamba":
        classes = ["AutoConfig", "AutoModel", "AutoModelForCausalLM", *classes]
    change = {"auto_map": dict.fromkeys(classes, "evil.Evil"), "model_type": model_type}
    edit_json(here / folder / "config.json", change)


def add_index(here, rng, folder, target):
    """Weights by an index in place of model.safetensors."""
    weights = here / folder / "model.safetensors"
    names = list(header_of(weights)[0])
    tensors = load_file(weights)
    if target == "pytorch_model.bin":
        torch.save(tensors, here / folder / target)
        replace(here / folder / "x.safetensors", b"")
    os.rename(weights, here / folder / "weights.hidden")
    weight_map = {name: target for name in names if name != "__metadata__"}
    content = {"metadata": {}, "weight_map": weight_map}
    replace(here / folder / "model.safetensors.index.json", json.dumps(content))


def add_words(here, rng, folder):
    """Words whose ids the model has no embeddings for, among them those of the texts."""
    path = here / folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    for i, word in enumerate(sorted(vocab, key=vocab.get)[4:]):
        vocab[word] = len(vocab) + i
    replace(path, json.dumps(content))


# Changes of an adapter's config.
ADAPTER_CONFIGS = {
    "base missing": {"base_model_name_or_path": "./nothing/here"},
    "base a file": {"base_model_name_or_path": "sft.jsonl"},
    "base an encoder": {"base_model_name_or_path": "encoder"},
    "no such layer": {"target_modules": ["nothing"]},
    "a pattern that is none": {"target_modules": "("},
    "target_modules of numbers": {"target_modules": [3]},
    "rank 1": {"r": 1},
    "dropout 1": {"lora_dropout": 1},
    "alpha 1e300": {"lora_alpha": 1e300},
    "alpha nan": {"lora_alpha": NAN},
    "alpha -1": {"lora_alpha": -1},
}


# A number too high, or a base that is found by its other name, in nanorlhf.json.
MAY_BE = ("alpha -1", "alpha 1e300", "dropout 1", "base missing", "base a file")


def cases_of_adapters(run):
    if "adapter" not in str(run.flags.get("model")) and "rm_adapter" not in str(run.flags):
        return
    folder = "adapter/model" if run.name == "sft adapter" else "rm_adapter/model"
    itself = {"base itself": {"base_model_name_or_path": folder}}
    for what, change in (itself | ADAPTER_CONFIGS).items():
        damage = functools.partial(change_adapter, folder=folder, change=change)
        expected = "any" if what in MAY_BE else "refused"
        yield Case(f"{folder}: {what}", run, expected, damage)
    circle = functools.partial(make_circle, folder=folder)
    yield Case(f"{folder}: a circle of two", run, "refused", circle)


def change_adapter(here, rng, folder, change):
    edit_json(here / folder / "adapter_config.json", change)


def make_circle(here, rng, folder):
    """Two adapters, each of which names the other one as its base."""
    shutil.copytree(here / folder, here / "other")
    change_adapter(here, rng, folder, {"base_model_name_or_path": "other"})
    change_adapter(here, rng, "other", {"base_model_name_or_path": folder})


BAD_NOTES = {
    "broken": "{",
    "null": "null",
    "empty": "{}",
    "a list": "[]",
    "a number": "3",
    "deep": deep_json(),
}


def set_tensor(name, change):
    """A damage: change(tensor) in the place of a tensor."""

    def change_one(tensors, rng):
        tensors[name] = change(tensors[name])

    return change_tensors(change_one)


# {what: (damage, expected)}
HUMAN_TENSORS = {
    "latents double": (set_tensor("latents", torch.Tensor.double), "any"),
    "latents int": (set_tensor("latents", torch.Tensor.int), "refused"),
    "latents 1e38": (set_tensor("latents", lambda x: x * 0 + 3e38), "any"),
    "latents of no text": (set_tensor("latents", lambda x: x[:0]), "refused"),
    "scores of no text": (set_tensor("scores", lambda x: x[:0]), "refused"),
    "scores all the same": (set_tensor("scores", lambda x: x * 0), "any"),
}


def cases_of_human_latents(run):
    """The notes in the header of a file of human latents, and its tensors."""
    for path in paths_read(run, "human"):
        for what, text in BAD_NOTES.items():
            damage = functools.partial(set_notes, text=text)
            yield Case(f"{path}: notes {what}", run, "refused", on_file(path, damage))
        for what, (damage, expected) in HUMAN_TENSORS.items():
            yield Case(f"{path}: {what}", run, expected, on_file(path, damage))


def deeper_cases(run, path, table):
    """A table {"a.b": the values that entry b of entry a is given} -> (names, Case)."""
    for names, values in table.items():
        for what in values.split(", "):
            value = JSON_VALUES[what]
            damage = functools.partial(set_deep, names=names.split("."), value=value)
            yield names, Case(f"{path}: {names} {what}", run, "refused", on_file(path, damage))


def cases_of_autoencoders(run):
    """Entries of cfg.json that lie deeper."""
    for path in paths_read(run, "cfg"):
        for names, case in deeper_cases(run, path, DEEPER):
            if names.endswith((".model", ".layer", ".site", ".tied")):
                case.expected = "any"
            yield case


DEEPER = {
    "metadata": "text, a list, 2.5, true",
    "metadata.nanorlhf": "text, a list, 2.5, true, an object",
    "metadata.nanorlhf.scale": "null, text, a list, -1, 0, nan, true, 2**70, missing",
    "metadata.nanorlhf.normalize": "null, text, a list, 0, missing",
    "metadata.nanorlhf.tied": EVERYTHING,
    "metadata.model": EVERYTHING,
    "metadata.layer": EVERYTHING,
    "metadata.site": EVERYTHING,
}


OF_ANY_REWARD_MODEL = {
    "reward_mean": "null, text, a list, an object, nan, true",
    "reward_std": "null, text, a list, an object, 0, -1, nan, true",
}
OF_SARMS = {
    "sarm_param.sae_source_layer": "null, text, -1, 0, 2.5, 2**70, nan, missing",
    "sarm_param.sae_latent_size": "null, text, -1, 0, 2.5, 2**70, nan, missing",
    "sarm_param.sae_k": "null, text, -1, 0, 2.5, 2**70, nan",
    **OF_ANY_REWARD_MODEL,
}


def cases_of_reward_models(run):
    """What a reward model's config.json says beside its trunk."""
    for path in configs_read(run):
        table = {}
        if path.startswith("sarm"):
            table = OF_SARMS
        elif path.startswith("rms"):
            table = OF_ANY_REWARD_MODEL
        for _, case in deeper_cases(run, path, table):
            yield case


# ---------------------------------------------------------------------------------- unfinished runs


def make_file(path):
    replace(path, "x")


def make_folder(path):
    path.mkdir(parents=True)


def remove_file(path):
    path.unlink(missing_ok=True)


def empty_folders(*paths):
    for path in paths:
        shutil.rmtree(path)
        path.mkdir()


# {what: (what is done, to which places in the run's folder)}
DAMAGED_FOLDERS = {
    "checkpoint a file": (make_file, "checkpoint"),
    "checkpoint missing": (shutil.rmtree, "checkpoint"),
    "step_2 a file": (make_file, "checkpoint/step_2"),
    "step_2 empty": (empty_folders, "checkpoint/step_2"),
    "both steps empty": (empty_folders, "checkpoint/step_1", "checkpoint/step_2"),
    "step_03": (os.rename, "checkpoint/step_2", "checkpoint/step_03"),
    "step_9 is step_2": (shutil.copytree, "checkpoint/step_2", "checkpoint/step_9"),
    ".tmp_step_3 a file": (make_file, "checkpoint/.tmp_step_3"),
    ".tmp_step_3 a folder": (make_folder, "checkpoint/.tmp_step_3/x"),
    "samples.jsonl missing": (remove_file, "samples.jsonl"),
    "eval a file": (make_file, "eval"),
    "model a file": (make_file, "model"),
    "metrics.jsonl.tmp a folder": (make_folder, "metrics.jsonl.tmp"),
    "summary.json a folder": (make_folder, "summary.json"),
}


def cases_of_checkpoints(run):
    """Whole folders that are damaged, of a run that is to be resumed."""
    if not run.name.endswith("--resume"):
        return
    root = run.writes
    for what, (action, *places) in DAMAGED_FOLDERS.items():
        damage = functools.partial(damage_folder, root=root, action=action, places=places)
        expected = "any" if what == "model a file" else "sound"
        yield Case(what, run, expected, damage)
    for name in ("sft", "dpo", "rm", "ppo", "sae"):
        other = half(name)
        if other != root:
            damage = functools.partial(take_checkpoints, root=root, other=other)
            yield Case(f"the checkpoints of {other}", run, "sound", damage)
    data = RUNS[run.name.removesuffix(" --resume")].flags["dataset"]
    damage = on_file(data, change_text(lambda text: text.replace("the", "a")))
    yield Case("the data have changed", run, "refused", damage)
    if run.script in ("train_ppo.py", "train_rm.py"):
        damage = functools.partial(add_code_to_run, root=root)
        yield Case("code in the run folder", run, "refused", damage)


def damage_folder(here, rng, root, action, places):
    action(*(here / root / place for place in places))


def take_checkpoints(here, rng, root, other):
    """Another run's checkpoints."""
    shutil.rmtree(here / root / "checkpoint")
    shutil.copytree(here / other / "checkpoint", here / root / "checkpoint")


def add_code_to_run(here, rng, root):
    """A reward function in the run's own folder, which its config names."""
    replace(here / root / "r.py", REWARDS)
    edit_json(here / root / "config.json", {"gold_model": f"{root}/r.py:good"})

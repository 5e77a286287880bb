"""Cases of fuzz.py in which a file or a folder that a run reads is damaged, or says the same in an odd way."""

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
    TENSOR_FILE,
    TEXT_FILE,
    bad_rows,
    cast,
    change_tensors,
    deep_json,
    edit_json,
    edited_rows,
    flip_bit,
    flip_header,
    header_of,
    lines_of,
    no_optimizer,
    odd_rows,
    one_more,
    other_formats,
    replace,
    set_deep,
    set_in_line,
    set_in_row,
    set_key,
    set_notes,
    turned_lines,
    with_line,
)
from fuzz_material import LEXICON, REWARDS, RUNS, Case, half
from safetensors.torch import load_file


def on_file(path, damage):
    """A damage of one of the case's files. A path that is only a beginning stands for the first such file."""

    def do(here, rng):
        target = here / path
        if not target.exists():
            (target, *_) = sorted(target.parent.glob(target.name + "*"))
        damage(target, rng)

    return do


def cases_of_files(run):
    """Damage to each file that a run reads."""
    for path, kind in run.reads.items():
        for what, damage, expected in damages_of(run, path, kind):
            yield Case(f"{path}: {what}", run, expected, on_file(path, damage))


def damages_of(run, path, kind):
    """(name, damage, expected) of a file of a kind."""
    if kind in ("sft", "pairs", "prompts", "pool"):
        yield from ((what, damage, "refused") for what, damage in TEXT_FILE.items())
        yield from ((what, damage, "refused") for what, damage in bad_rows(path).items())
        yield from ((what, damage, "equal") for what, damage in odd_rows().items())
        yield "flipped bit", flip_bit(), "any"
    elif kind in ("weights", "human"):
        yield from ((what, damage, "refused") for what, damage in TENSOR_FILE.items())
        for i in range(3):
            yield f"flipped bit in the header {i}", flip_header, "any"
            yield f"flipped bit {i}", flip_bit(0.7), "any"
        yield "float16", cast(torch.float16), "any"
        yield "one more tensor", change_tensors(one_more), "any"
    elif kind == "checkpoint":
        for what, damage in TENSOR_FILE.items():
            yield what, damage, "sound"
        for i in range(4):
            yield f"flipped bit in the header {i}", flip_header, "sound"
            yield f"flipped bit {i}", flip_bit(0.3), "sound"
        yield "float16", cast(torch.float16), "sound"
        yield "one more tensor", change_tensors(one_more), "sound"
        yield "without the optimizer", change_tensors(no_optimizer), "sound"
    elif kind == "state":
        yield from ((what, damage, "sound") for what, damage in JSON_FILE.items())
        for name in ("step", "files", "logs", "sha256"):
            for what in JSON_VALUES:
                yield f"{name} {what}", functools.partial(set_key, name=name, what=what), "sound"
    elif kind in ("log", "eval"):
        expected = "sound" if "--resume" in run.name else "refused"
        yield from ((what, damage, expected) for what, damage in TEXT_FILE.items())
        for line in ("null", "3", "[]", "{}", '{"step": "x"}', '{"step": ', deep_json()[:150_000]):
            yield f"a line {line[:12]}", lambda p, rng, line=line: with_line(p, line, 0), expected
        yield "a row is lost", lambda p, rng: replace(p, "\n".join(lines_of(p)[1:]) + "\n"), "any"
    elif kind == "lexicon":
        yield from ((what, damage, "refused") for what, damage in TEXT_FILE.items())
        for what, text in BAD_LEXICONS.items():
            yield what, lambda p, rng, text=text: replace(p, text), "refused"
        for what, change in ODD_LEXICONS.items():
            yield what, lambda p, rng, c=change: replace(p, c(p.read_text())), "equal"
    elif kind == "python":
        missing_function = "def other(prompts, responses): return [1.0]\n"
        yield from ((what, damage, "refused") for what, damage in TEXT_FILE.items())
        yield "without the function", lambda p, rng: replace(p, missing_function), "refused"
        yield "a syntax error", lambda p, rng: replace(p, "def good(:\n"), "refused"
    elif kind in ("cache", "choices"):
        expected = "sound"
        yield from ((what, damage, expected) for what, damage in TEXT_FILE.items())
        for line in ("null", "3", "{}", '{"index": 0}', deep_json()[:150_000]):
            yield f"a line {line[:12]}", lambda p, rng, line=line: with_line(p, line, 0), expected
        yield "every line twice", lambda p, rng: replace(p, p.read_text() * 2), expected
        yield "lines in another order", lambda p, rng: replace(p, turned_lines(p)), expected
        yield "cut by a kill", lambda p, rng: replace(p, p.read_bytes()[:-9]), "equal"
        for what, value in {"a string": "x", "3": 3, "nan": NAN, "null": None}.items():
            for name in ("scores", "response_ids", "choice", "key"):
                yield (
                    f"{name} {what}",
                    functools.partial(set_in_line, name=name, value=value),
                    expected,
                )
        yield "a line is lost", lambda p, rng: replace(p, "\n".join(lines_of(p)[1:])), expected
    elif kind == "benchmark":
        yield from ((what, damage, "refused") for what, damage in JSON_FILE.items())
        for name in ("id", "prompt", "chosen", "rejected"):
            for what in ("missing", "null", "text", "a list", "an object", "0"):
                may = name == "id" or (what, name) == ("text", "prompt")
                damage = functools.partial(set_in_row, name=name, what=what)
                yield f"{name} {what}", damage, "any" if may else "refused"
    else:
        yield from damages_of_json(run, path, kind)


def damages_of_json(run, path, kind):
    """The same of a JSON object."""
    resumed = kind == "run config" and "--resume" in run.name
    optional = kind in ("notes", "tokenizer config")
    # Human latents know the reward model by its files' bytes.
    same = "sound" if "feature" in run.name else "equal"
    for what, damage in JSON_FILE.items():
        if kind == "tokenizer config" and what in ("null", "a number", "a string", "a list"):
            yield what, damage, "any"  # transformers takes it for an empty one
            continue
        gone = what in ("missing", "a folder", "a link to itself") and (
            optional or kind in ("tokenizer", "run config", "object")
        )
        gone = gone or what == "a number of 5,000 digits" and path.endswith("tokenizer.json")
        yield what, damage, "any" if gone else "refused"
    if kind != "tokenizer":
        yield "indented", lambda p, rng: replace(p, json.dumps(json.loads(p.read_text()), indent=7)), same  # fmt: skip
    if kind in ("model config", "cfg"):
        more = {"a_key_of_nobody": {"a": [1, "\u00e9"]}}
        yield "one more key", lambda p, rng: edit_json(p, more), same
    for name in KEYS.get(kind, []):
        for what in JSON_VALUES:
            if (name, what) in ENDLESS:
                continue
            expected = "refused" if (name, what) in WRONG.get(kind, ()) else "any"
            expected = "sound" if resumed and what in ("nan", "an object") else expected
            yield f"{name} {what}", functools.partial(set_key, name=name, what=what), expected


BAD_LEXICONS = {
    "no tabs": "good 3\nbad -3\n",
    "no number": "good\tlots\n",
    "nan": "good\tnan\nbad\t-3\n",
    "inf": "good\tinf\nbad\t-3\n",
    "1e999": "good\t1e999\nbad\t-3\n",
    "blank": "\n\n",
    "two words": LEXICON + "very good\t3\n",
    "an empty word": LEXICON + "\t3\n",
    "a word twice, with two values": LEXICON + "good\t-2\n",
}


ODD_LEXICONS = {
    "BOM": lambda text: "\ufeff" + text,
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "blank lines": lambda text: text.replace("\n", "\n\n"),
    "more columns": lambda text: text.replace("\n", "\tmore\tand more\n"),
    "upper case": lambda text: text.upper(),
}


# Entries of JSON files that are changed one by one.
KEYS = {
    "model config": (
        "model_type vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
        "max_position_embeddings eos_token_id pad_token_id architectures dtype layer_norm_eps "
        "rope_parameters hidden_act tie_word_embeddings id2label num_labels reward_mean sarm_param "
        "quantization_config attn_implementation auto_map transformers_version use_cache"
    ).split(),
    "tokenizer config": "eos_token pad_token unk_token tokenizer_class model_max_length".split(),
    "cfg": "architecture d_in d_sae k dtype normalize_activations metadata".split(),
    "adapter config": (
        "peft_type base_model_name_or_path r lora_alpha lora_dropout target_modules bias "
        "modules_to_save fan_in_fan_out rank_pattern use_dora task_type"
    ).split(),
    "notes": ["base", "reward_mean"],
    "run config": (
        "steps batch_size betas lr model dataset seed eval_splits inputs dtype output_dir columns"
    ).split(),
    "object": ["after", "before", "steps", "command", "output_dir"],
}


NUMBERS = ("text", "a list", "an object", "-1", "2.5", "1e300", "2**70", "nan")


# What can be nothing but wrong.
WRONG = {
    "model config": {
        *((name, what) for name in ("vocab_size", "hidden_size") for what in NUMBERS),
        *(("num_attention_heads", what) for what in (*NUMBERS, "0")),
        *(("model_type", what) for what in ("missing", "null", "text", "a list", "0", "nan")),
        *(("dtype", what) for what in ("text", "a list")),
    },
    "tokenizer config": {("eos_token", what) for what in ("missing", "null", "0", "a list")},
    "cfg": {
        *((name, what) for name in ("d_in", "d_sae", "k") for what in (*NUMBERS, "0", "missing")),
        *(("architecture", what) for what in JSON_VALUES),
    },
    "adapter config": {
        *((name, what) for name in ("peft_type", "base_model_name_or_path") for what in ("null",)),
        *(("r", what) for what in (*NUMBERS, "0", "missing")),
        *(("lora_dropout", what) for what in ("nan", "2.5", "-1", "text")),
        *(("modules_to_save", what) for what in ("2.5", "true", "text")),
    },
    "run config": {("steps", what) for what in ("text", "a list", "-1", "2.5", "nan")},
}


# A model of so many layers takes for ever to make, a run of so many steps to do.
ENDLESS = {("num_hidden_layers", "2**70"), ("steps", "2**70"), ("batch_size", "2**70")}


# --------------------------------------------------------------------------------------------- data


def cases_of_formats(run):
    for path, kind in run.reads.items():
        if kind not in ("sft", "pairs", "prompts", "pool"):
            continue
        for what, (damage, suffix) in other_formats().items():
            changes = {}
            for name, value in run.flags.items():
                swap = path.replace(".jsonl", suffix)
                if isinstance(value, list):
                    changes[name] = [swap if x == path else x for x in value]
                elif value == path:
                    changes[name] = swap
            words = run.words(**changes)
            yield Case(f"{path}: {what}", run, "equal", on_file(path, damage), words)
        for what, keep in {"cut": -20, "flipped": None}.items():
            changes = {k: path + ".gz" for k, value in run.flags.items() if value in (path, [path])}
            damage = functools.partial(bad_gzip, path=path, keep=keep)
            if changes:
                yield Case(f"{path}: gz {what}", run, "refused", damage, run.words(**changes))


def bad_gzip(here, rng, path, keep):
    content = bytearray(gzip.compress((here / path).read_bytes()))
    if keep:
        content = content[:keep]
    else:
        content[len(content) // 2] ^= 0x41
    replace(here / f"{path}.gz", bytes(content))


def cases_of_contents(run):
    """Data that are well formed, but hardly meant."""
    for path in [path for path, kind in run.reads.items() if kind in ("sft", "pairs", "prompts")]:
        for what, change in CONTENTS.items():
            damage = functools.partial(change_texts, change=change)
            yield Case(f"{path}: {what}", run, "any", on_file(path, damage))
        for what, n in {"one row": 1, "two rows": 2}.items():
            damage = lambda p, rng, n=n: replace(p, "\n".join(lines_of(p)[:n]))  # noqa: E731
            yield Case(f"{path}: {what}", run, "any", on_file(path, damage))


CONTENTS = {
    "empty texts": lambda name, text: "",
    "empty prompts": lambda name, text: "" if name == "prompt" else text,
    "empty answers": lambda name, text: text if name == "prompt" else "",
    "white space alone": lambda name, text: " \n\t",
    "the same prompt everywhere": lambda name, text: "a b" if name == "prompt" else text,
    "the same answer everywhere": lambda name, text: text if name == "prompt" else "a b",
    "long texts": lambda name, text: text + " very" * 300,
    "very long texts": lambda name, text: text + " very" * 3_000,
    "words that nobody knows": lambda name, text: "xyzzy " + text[::-1],
    "NUL": lambda name, text: "\0" + text + "\0",
    "line separators": lambda name, text: text.replace(" ", " \u2028\x85\x0c", 1),
    "emoji": lambda name, text: "\U0001f600 " + text,
    "right to left": lambda name, text: "\u202e" + text,
    "special tokens": lambda name, text: "<eos> <pad> " + text,
}


def change_texts(path, rng, change):
    def changed(row):
        for name, value in row.items():
            if isinstance(value, str):
                row[name] = change(name, value)

    edited_rows(path, changed)


# ------------------------------------------------------------------------------------------- models


def cases_of_code(run):
    """Model folders that bring code, or point elsewhere."""
    for path in [path for path in run.reads if path.endswith("/config.json")]:
        if run.reads[path] != "model config":
            continue
        folder = os.path.dirname(path)
        for model_type in ("mamba", "gpt_neox", "nothing"):
            damage = functools.partial(add_code, folder=folder, model_type=model_type)
            expected = "refused" if model_type != "gpt_neox" else "any"
            if folder in ("encoder", "nli", "classifier"):
                continue
            if expected == "refused" and run.name == "bon" and folder.startswith("rms"):
                expected = "stopped"  # its answers are kept, whatever the reward model is
            yield Case(f"{folder}: code for {model_type}", run, expected, damage)
        for what, target in INDEXES.items():
            damage = functools.partial(add_index, folder=folder, target=target)
            yield Case(f"{folder}: an index {what}", run, "refused", damage)
        # PPO reads no tokenizer of a value model.
        is_read = not (run.name == "ppo value_model" and folder.startswith("rms"))
        expected = "refused" if is_read else "any"
        yield Case(f"{folder}: vocabulary larger than the embeddings", run, expected,
                   functools.partial(add_words, folder=folder, run=run))  # fmt: skip


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
    names = "AutoConfig AutoModel AutoModelForCausalLM AutoModelForSequenceClassification"
    change = {"auto_map": {name: "evil.Evil" for name in names.split()}}
    if model_type == "mamba":
        change["auto_map"] = {"AutoModelForSequenceClassification": "evil.Evil"}
    edit_json(here / folder / "config.json", {**change, "model_type": model_type})


def add_index(here, rng, folder, target):
    """Weights by an index in place of model.safetensors."""
    weights = here / folder / "model.safetensors"
    names = list(header_of(weights)[0])
    tensors = load_file(weights)
    if target == "pytorch_model.bin":
        torch.save(tensors, here / folder / target)
        replace(here / folder / "x.safetensors", b"")
    os.rename(weights, here / folder / "weights.hidden")
    content = {"metadata": {}, "weight_map": {n: target for n in names if n != "__metadata__"}}
    replace(here / folder / "model.safetensors.index.json", json.dumps(content))


def add_words(here, rng, folder, run):
    """Words whose ids the model has no embeddings for, among them those of the texts."""
    path = here / folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    for i, word in enumerate(sorted(vocab, key=vocab.get)[4:]):
        vocab[word] = len(vocab) + i
    replace(path, json.dumps(content))


# A rank too high for the numbers, or a base that is found by its other name, in nanorlhf.json.
MAY_BE = ("alpha -1", "alpha 1e300", "dropout 1", "base missing", "base a file")


def cases_of_adapters(run):
    if "adapter" not in str(run.flags.get("model")) and "rm_adapter" not in str(run.flags):
        return
    folder = "adapter/model" if run.name == "sft adapter" else "rm_adapter/model"
    config = f"{folder}/adapter_config.json"
    changes = {
        "base itself": {"base_model_name_or_path": folder},
        "base missing": {"base_model_name_or_path": "./nothing/here"},
        "base a file": {"base_model_name_or_path": "sft.jsonl"},
        "base an encoder": {"base_model_name_or_path": "encoder"},
        "no such layer": {"target_modules": ["nothing"]},
        "a pattern without end": {"target_modules": "(((a|.)+)+)+!"},
        "a pattern that is none": {"target_modules": "("},
        "target_modules of numbers": {"target_modules": [3]},
        "rank 1": {"r": 1},
        "dropout 1": {"lora_dropout": 1},
        "alpha 1e300": {"lora_alpha": 1e300},
        "alpha nan": {"lora_alpha": NAN},
        "alpha -1": {"lora_alpha": -1},
    }
    for what, change in changes.items():
        damage = lambda here, rng, c=change: edit_json(here / config, c)  # noqa: E731
        yield Case(f"{folder}: {what}", run, "any" if what in MAY_BE else "refused", damage)

    def circle(here, rng):
        shutil.copytree(here / folder, here / "other")
        edit_json(here / config, {"base_model_name_or_path": "other"})
        edit_json(here / "other/adapter_config.json", {"base_model_name_or_path": folder})

    yield Case(f"{folder}: a circle of two", run, "refused", circle)


def cases_of_human_latents(run):
    """The notes in the header of a file of human latents, and its tensors."""
    for path, kind in run.reads.items():
        if kind != "human":
            continue
        for what, text in {"broken": "{", "null": "null", "empty": "{}", "a list": "[]",
                           "a number": "3", "deep": deep_json()}.items():  # fmt: skip
            damage = functools.partial(set_notes, text=text)
            yield Case(f"{path}: notes {what}", run, "refused", on_file(path, damage))
        for what, change in {
            "latents double": lambda t, rng: t.update(latents=t["latents"].double()),
            "latents int": lambda t, rng: t.update(latents=t["latents"].int()),
            "latents 1e38": lambda t, rng: t.update(latents=t["latents"] * 0 + 3e38),
            "latents of no text": lambda t, rng: t.update(latents=t["latents"][:0]),
            "scores of no text": lambda t, rng: t.update(scores=t["scores"][:0]),
            "scores all the same": lambda t, rng: t.update(scores=t["scores"] * 0),
        }.items():
            damage = on_file(path, change_tensors(change))
            may = what in ("latents double", "latents 1e38", "scores all the same")
            yield Case(f"{path}: {what}", run, "any" if may else "refused", damage)


def cases_of_autoencoders(run):
    """Entries of cfg.json that lie deeper."""
    for path in [path for path, kind in run.reads.items() if kind == "cfg"]:
        for names, values in DEEPER.items():
            for what in values:
                damage = functools.partial(
                    set_deep, names=names.split("."), value=JSON_VALUES[what]
                )
                may = names.endswith((".model", ".layer", ".site", ".tied"))
                expected = "any" if may else "refused"
                yield Case(f"{path}: {names} {what}", run, expected, on_file(path, damage))


DEEPER = {
    "metadata": ("text", "a list", "2.5", "true"),
    "metadata.nanorlhf": ("text", "a list", "2.5", "true", "an object"),
    "metadata.nanorlhf.scale": (
        "null",
        "text",
        "a list",
        "-1",
        "0",
        "nan",
        "true",
        "2**70",
        "missing",
    ),
    "metadata.nanorlhf.normalize": ("null", "text", "a list", "0", "missing"),
    "metadata.nanorlhf.tied": tuple(JSON_VALUES),
    "metadata.model": tuple(JSON_VALUES),
    "metadata.layer": tuple(JSON_VALUES),
    "metadata.site": tuple(JSON_VALUES),
}


SARM_PARAMS = {
    "sarm_param.sae_source_layer": ("null", "text", "-1", "0", "2.5", "2**70", "nan", "missing"),
    "sarm_param.sae_latent_size": ("null", "text", "-1", "0", "2.5", "2**70", "nan", "missing"),
    "sarm_param.sae_k": ("null", "text", "-1", "0", "2.5", "2**70", "nan"),
    "reward_mean": ("null", "text", "a list", "an object", "nan", "true"),
}


def cases_of_reward_models(run):
    """What a reward model's config.json says beside its trunk."""
    for path in [path for path in run.reads if path.endswith("/config.json")]:
        if not path.startswith(("rms", "sarm")):
            continue
        for names, values in SARM_PARAMS.items():
            if names.startswith("sarm_param") and not path.startswith("sarm"):
                continue
            for what in values:
                damage = functools.partial(
                    set_deep, names=names.split("."), value=JSON_VALUES[what]
                )
                yield Case(f"{path}: {names} {what}", run, "refused", on_file(path, damage))


# ---------------------------------------------------------------------------------- unfinished runs


def cases_of_checkpoints(run):
    """Whole folders that are damaged, of a run that is to be resumed."""
    if not run.name.endswith("--resume"):
        return
    root = run.writes
    for what, damage in {
        "checkpoint a file": lambda h: (shutil.rmtree(h / "checkpoint"), replace(h / "checkpoint", "x")),
        "checkpoint missing": lambda h: shutil.rmtree(h / "checkpoint"),
        "step_2 a file": lambda h: replace(h / "checkpoint/step_2", "x"),
        "step_2 empty": lambda h: empty_folder(h / "checkpoint/step_2"),
        "both steps empty": lambda h: [empty_folder(h / f"checkpoint/step_{i}") for i in (1, 2)],
        "step_03": lambda h: (h / "checkpoint/step_2").rename(h / "checkpoint/step_03"),
        "step_9 is step_2": lambda h: shutil.copytree(h / "checkpoint/step_2", h / "checkpoint/step_9"),
        ".tmp_step_3 a file": lambda h: replace(h / "checkpoint/.tmp_step_3", "x"),
        ".tmp_step_3 a folder": lambda h: (h / "checkpoint/.tmp_step_3/x").mkdir(parents=True),
        "samples.jsonl missing": lambda h: (h / "samples.jsonl").unlink(missing_ok=True),
        "eval a file": lambda h: (shutil.rmtree(h / "eval", ignore_errors=True), replace(h / "eval", "x")),
        "model a file": lambda h: replace(h / "model", "x"),
        "metrics.jsonl.tmp a folder": lambda h: (h / "metrics.jsonl.tmp").mkdir(),
        "summary.json a folder": lambda h: (h / "summary.json").mkdir(),
    }.items():  # fmt: skip
        expected = "any" if "model a file" in what else "sound"
        yield Case(f"{what}", run, expected, lambda here, rng, d=damage: d(here / root))
    others = [half(name) for name in ("sft", "dpo", "rm", "ppo", "sae") if half(name) != root]
    for other in others:

        def damage(here, rng, other=other):
            shutil.rmtree(here / root / "checkpoint")
            shutil.copytree(here / other / "checkpoint", here / root / "checkpoint")

        yield Case(f"the checkpoints of {other}", run, "sound", damage)
    data = RUNS[run.name.removesuffix(" --resume")].flags["dataset"]
    yield Case("the data have changed", run, "refused",
               lambda here, rng: replace(here / data, (here / data).read_text().replace("the", "a")))  # fmt: skip
    code = lambda here, rng: (replace(here / root / "r.py", REWARDS),
                              edit_json(here / root / "config.json", {"gold_model": f"{root}/r.py:good"}))  # fmt: skip # noqa: E731
    if run.script in ("train_ppo.py", "train_rm.py"):
        yield Case("code in the run folder", run, "refused", code)


def empty_folder(path):
    shutil.rmtree(path)
    path.mkdir()

"""Adapter folders in the format of PEFT: adapter_config.json and adapter_model.safetensors. The adapters are lora.py's.

The adapter's base model stays where it is, and is named in the config. A reward model's mean, for which PEFT has no place, is in
nanorlhf.json beside them.
"""

import os

from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from ..errors import InputError, require
from ..runtime.files import check_fields, read_object, shorten, write_json
from ..runtime.tensors import check_tensors
from ..runtime.tensors import read_tensors as read_file
from .lora import HEADS, adapters, matching, merge, put_adapter, shape_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NOTES = "nanorlhf.json"  # what PEFT's two files have no place for: {"reward_mean": x, "base": path relative to the adapter folder}
PREFIX = "base_model.model."  # of PEFT's tensor names

# Fields of adapter_config.json that are understood here, or say nothing of what the adapter computes.
UNDERSTOOD = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save",
              "bias", "init_lora_weights", "fan_in_fan_out", "inference_mode", "peft_version", "auto_mapping", "megatron_core",
              "qalora_group_size"}  # fmt: skip


FIELDS = {"r": int, "lora_alpha": float, "lora_dropout": float}
FIELDS |= {"target_modules": str | list[str], "base_model_name_or_path": str}
FIELDS |= {"task_type": str | None, "bias": str | None, "modules_to_save": list[str] | None}
NOTE_FIELDS = {"base": str | None, "reward_mean": float | None}


def resolve(path):
    """A run folder stands for the model/ inside it; anything else is a model folder, an adapter folder or a hub name.

    Whatever opens a model's files (check_..., load_..., is_...) calls this itself: names are handed on as they were given.
    """
    require(path, "a model without a name: '' is neither a folder nor a hub name")
    inner = os.path.join(path, "model")
    return inner if os.path.isfile(os.path.join(inner, "config.json")) or is_adapter(inner) else path


def is_adapter(path):
    """Whether this folder holds an adapter rather than a model."""
    return os.path.isfile(os.path.join(path, CONFIG))


def save_model(lm, path):
    """What a run trained: the adapter where there is one, else the whole model."""
    if not adapters(lm):
        return lm.save_pretrained(path)
    save_adapter(lm, path, lm.name_or_path)


def save_adapter(lm, path, base):
    """adapter_config.json and adapter_model.safetensors, as PEFT writes them; the model itself stays in `base`, a folder or hub name.

    A folder's name is stored whole, and relative to `path` in nanorlhf.json: the two may be moved together. Pitfall: where `base` is
    an adapter folder itself, load_policy() follows; for PEFT merge that one first.
    """
    if not base:
        raise InputError("an adapter needs a saved base model: this one was never loaded from anywhere")
    os.makedirs(path, exist_ok=True)
    layers, local = adapters(lm), os.path.isdir(base)
    tensors = {f"{PREFIX}{name}.lora_{x}.weight": getattr(layer, f"lora_{x}") for name, layer in layers.items() for x in "AB"}
    heads = [head for head in HEADS if hasattr(lm, head)]
    tensors |= {f"{PREFIX}{head}.{name}": p for head in heads for name, p in getattr(lm, head).named_parameters()}
    save_file({name: p.detach().contiguous() for name, p in tensors.items()}, os.path.join(path, WEIGHTS), {"format": "pt"})
    one = next(iter(layers.values()))
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if heads else "CAUSAL_LM", "inference_mode": True, "revision": None,
        "base_model_name_or_path": os.path.abspath(base) if local else base,
        "r": len(one.lora_A), "lora_alpha": int(one.alpha) if one.alpha == int(one.alpha) else one.alpha, "lora_dropout": one.dropout.p,
        "target_modules": sorted(layers), "modules_to_save": heads or None, "bias": "none", "init_lora_weights": True,
        "fan_in_fan_out": any(isinstance(layer.base_layer, Conv1D) for layer in layers.values()),
        "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    notes = {"base": os.path.relpath(base, path)} if local else {}
    if hasattr(lm.config, "reward_mean"):
        notes["reward_mean"] = lm.config.reward_mean
    write_json(os.path.join(path, CONFIG), config)
    write_json(os.path.join(path, NOTES), notes)


def read_notes(path: str) -> dict:
    """What nanorlhf.json says of an adapter folder; {} where there is none."""
    file = os.path.join(path, NOTES)
    return read_object(file, NOTE_FIELDS) if os.path.isfile(file) else {}


def read_config(path):
    """The adapter_config.json of a folder; an InputError names what is wrong with it or is not supported here.

    Its base model is looked for where it was when the adapter was saved, then where it was as seen from the adapter folder. A base
    that is an adapter folder again must lead to a model in the end, not back.
    """
    config = read_one_config(path)
    base, seen = config["base_model_name_or_path"], {os.path.realpath(path)}
    while is_adapter(resolve(base)):
        base = resolve(base)
        is_new = os.path.realpath(base) not in seen
        require(is_new, f"{path}: an adapter whose base model leads back to {base}, an adapter itself")
        seen.add(os.path.realpath(base))
        base = read_one_config(base)["base_model_name_or_path"]
    return config


def read_one_config(path):
    """read_config(), but that the base model is not looked at."""
    file = os.path.join(path, CONFIG)
    config = read_object(file)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{file}: no LoRA adapter (its peft_type is {shorten(config.get('peft_type'))})")
    check_fields(config, FIELDS, file)
    for name in ("r", "lora_alpha", "target_modules", "base_model_name_or_path"):
        require(config[name], f"{file}: {name} cannot be {config[name]!r}")
    require(config["r"] > 0, f"{file}: r cannot be {config['r']}")
    require(0 <= config["lora_dropout"] < 1, f"{file}: lora_dropout must lie in [0, 1), not be {config['lora_dropout']}")
    odd = [name for name, value in config.items() if value and name not in UNDERSTOOD]
    odd += ["bias"] * (config.get("bias", "none") != "none")
    odd += ["init_lora_weights"] * (config.get("init_lora_weights", True) not in (True, False, "gaussian"))  # others change the base
    odd += ["modules_to_save"] * (not set(config.get("modules_to_save") or []) <= set(HEADS))
    if odd:
        raise InputError(f"{file}: the adapter uses {odd[0]} = {shorten(config[odd[0]])}, which is not supported; merge it with PEFT first")
    if not os.path.isfile(os.path.join(path, WEIGHTS)):
        raise InputError(f"{path}: an adapter without {WEIGHTS}")
    base, beside = config["base_model_name_or_path"], os.path.join(path, read_notes(path).get("base") or "?")
    if not os.path.isdir(base) and os.path.isdir(beside):
        config["base_model_name_or_path"] = os.path.normpath(beside)
    elif os.path.isabs(base) and not os.path.isdir(base):
        raise InputError(f"{path}: its base model {base} is gone; write its new place into {CONFIG} (base_model_name_or_path)")
    return config


def read_tensors(path):
    """The tensors of an adapter folder, by their names in the model: {"layers.0.mlp.lora_A.weight": [r, in], ...}."""
    file = os.path.join(path, WEIGHTS)
    tensors = read_file(file)
    check_tensors(tensors, dict.fromkeys(tensors), file)
    for name in tensors:
        known = name.endswith((".lora_A.weight", ".lora_B.weight")) or name.removeprefix(PREFIX).split(".")[0] in HEADS
        if not (known and name.startswith(PREFIX)):
            raise InputError(f"{file}: the tensor {name} is not supported")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def load_adapter(lm, path):
    """Put the adapter of a folder on its base model, a classifier's head too. -> lm, whose adapters merge() folds in.

    InputError, before the model is touched: unsupported or broken files, an adapter that was made for another model.
    """
    config, tensors = read_config(path), read_tensors(path)
    known, wanted, r = matching(lm, ".*"), set(matching(lm, config["target_modules"])), config["r"]
    names = {name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name}
    # A reward model has no LM head, and needs no adapter on it.
    unused = {name for name in names if "." not in name and not hasattr(lm, name)}
    names -= unused
    expected = {}  # {tensor: its shape}
    for name in sorted(names | wanted):
        if name not in known:
            raise InputError(f"{path}: an adapter for another model: {type(lm).__name__} has no linear layer {name}")
        n_out, n_in = shape_of(known[name])
        expected |= {f"{name}.lora_A.weight": (r, n_in), f"{name}.lora_B.weight": (n_out, r)}
    others = sorted(names - wanted)
    require(not others, f"{path}: {others[:1]} of its layers are not among its target_modules")
    heads = {name: p for name, p in lm.named_parameters() if name.split(".")[0] in HEADS and config.get("task_type") == "SEQ_CLS"}
    expected |= {name: tuple(p.shape) for name, p in heads.items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{path}: the adapter lacks {name}")
        if tuple(tensors[name].shape) != shape:
            raise InputError(f"{path}: an adapter for another model: {name} is {list(tensors[name].shape)}, not {list(shape)}")
    for name in tensors:
        known = name in expected or name.rpartition(".lora_")[0] in unused
        require(known, f"{path}: the tensor {name} has no place in {type(lm).__name__}")
    for name in sorted(names):
        put_adapter(lm, name, tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], config["lora_alpha"], config["lora_dropout"])
    for name, p in heads.items():
        p.data.copy_(tensors[name])
    mean = read_notes(path).get("reward_mean")
    if mean is not None:
        lm.config.reward_mean = mean
    return lm


def load_merged(load, auto, path, new_head, **kwargs):
    """The base model of an adapter folder with the adapter merged into it: what comes next starts from a plain model.

    load(auto, path, new_head, **kwargs) is models.pretrained, for the base model: an adapter folder itself, maybe.
    """
    config = read_config(path)
    base, classifier = config["base_model_name_or_path"], config.get("task_type") == "SEQ_CLS"
    if auto is AutoModel:  # a bare trunk, for a value model
        return load_merged(load, AutoModelForSequenceClassification if classifier else AutoModelForCausalLM, path, new_head).base_model
    if classifier and auto is AutoModelForCausalLM:
        raise InputError(f"{path}: the adapter of a reward model, not of a policy")
    head = read_tensors(path).get("score.weight")
    if head is not None:
        kwargs = {"num_labels": len(head), **kwargs}
    lm = merge(load_adapter(load(auto, base, new_head or classifier, **kwargs), path))
    lm.name_or_path = path  # what an adapter of the next stage is an adapter of
    return lm

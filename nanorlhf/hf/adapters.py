"""Adapter folders in PEFT's format. The adapters themselves are lora.py's.

    adapter_config.json          rank, alpha, layers, and the name of the base model
    adapter_model.safetensors    A and B of each layer, and a classifier's head
    nanorlhf.json                what PEFT has no place for: a reward model's mean, and the base
                                 model's folder as seen from this one

The base model stays where it is: a folder names it and does not hold it. It may be an adapter
folder itself, as when PPO starts from a policy that SFT trained with LoRA:

    runs/ppo/model (adapter) -> runs/sft/model (adapter) -> a folder or hub name with the weights
"""

import os
from collections.abc import Callable

import torch
import transformers
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import snapshot_download

from ..errors import InputError, library_call, require
from ..runtime.files import check_fields, read_object, shorten, write_json
from ..runtime.tensors import check_numbers, read_tensors
from .lora import HEADS, adapters, heads_of, matching, merge, put_adapter, shape_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NOTES = "nanorlhf.json"
# What is downloaded of a base model: its weights, configs and tokenizer, and no pickles.
MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
PREFIX = "base_model.model."  # of PEFT's tensor names

# Fields of adapter_config.json that are read here, or say nothing about what the adapter computes.
UNDERSTOOD = {
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout",
    "target_modules", "modules_to_save", "bias", "init_lora_weights", "fan_in_fan_out",
    "inference_mode", "peft_version", "revision", "auto_mapping", "megatron_core",
    "qalora_group_size",
}  # fmt: skip

# The types of fields that are read here; see files.is_of_type.
FIELDS = {
    "r": int,
    "lora_alpha": float,
    "lora_dropout": float,
    "target_modules": str | list[str],
    "base_model_name_or_path": str,
    "task_type": str | None,
    "bias": str | None,
    "modules_to_save": list[str] | None,
    "revision": str | None,
}
NOTE_FIELDS = {"base": str | None, "reward_mean": float | None, "reward_std": float | None}
# The scale of a reward model's scores: in its config, or in the notes beside its adapter.
SCALE = ("reward_mean", "reward_std")


# ------------------------------------------------------------------------------ names of models


def resolve(path: str) -> str:
    """A run folder stands for the model/ inside it; any other name is given back as it is.

    Whatever opens a model's files (check_..., load_..., is_...) calls this itself: names are handed
    on as they were given.
    """
    require(path, "a model without a name: '' is neither a folder nor a hub name")
    inner = os.path.join(path, "model")
    has_model = os.path.isfile(os.path.join(inner, "config.json"))
    if has_model or is_adapter(inner):
        return inner
    return path


def is_adapter(path: str) -> bool:
    """Whether this folder holds an adapter rather than a model."""
    return os.path.isfile(os.path.join(path, CONFIG))


# --------------------------------------------------------------------------------------- writing


def save_model(lm, path: str):
    """Save what a run trained: the adapter where there is one, else the whole model.

    A model is written in the type in which it came. It was trained in float32.
    """
    if adapters(lm):
        save_adapter(lm, path, lm.name_or_path)
        return
    dtype = getattr(lm, "stored_dtype", torch.float32)
    if dtype == torch.float32:
        lm.save_pretrained(path)
        return

    # Copies are rounded, so the model in memory stays as it is. Tied weights are one tensor under
    # two names, and stay one.
    rounded = {}  # {where a tensor lies in memory: the tensor in `dtype`}
    tensors = {}
    for name, tensor in lm.state_dict().items():
        # Buffers such as masks and counters hold integers or bools, and keep their type.
        if not tensor.is_floating_point():
            tensors[name] = tensor
            continue
        place = tensor.data_ptr()
        if place not in rounded:
            rounded[place] = tensor.to(dtype)
        tensors[name] = rounded[place]
    lm.save_pretrained(path, state_dict=tensors)

    # save_pretrained writes down the type of the model in memory, and not that of these tensors.
    file = os.path.join(path, "config.json")
    config = read_object(file)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(file, config)


def save_adapter(lm, path: str, base: str):
    """Write an adapter folder as PEFT does; the model itself stays in `base`, a folder or hub name.

    A folder's name is stored whole, and in nanorlhf.json relative to `path`: the two may be moved
    together. InputError: no base. Pitfall: `base` may be an adapter folder itself, which
    load_policy() follows; for PEFT, merge that one first.
    """
    if not base:
        raise InputError(
            "an adapter needs a saved base model: this one was never loaded from anywhere"
        )
    os.makedirs(path, exist_ok=True)
    save_file(tensors_to_save(lm), os.path.join(path, WEIGHTS), {"format": "pt"})

    # PEFT's config has one field for the base, so its relative path goes into the notes. The notes
    # of a reward model: {"base": "../../../sft/model", "reward_mean": 0.3, "reward_std": 1.7}.
    notes = {}
    if os.path.isdir(base):
        notes["base"] = os.path.relpath(base, path)
        base = os.path.abspath(base)
    for name in SCALE:
        if hasattr(lm.config, name):
            notes[name] = getattr(lm.config, name)
    write_json(os.path.join(path, CONFIG), config_to_save(lm, base))
    write_json(os.path.join(path, NOTES), notes)


def tensors_to_save(lm) -> dict[str, torch.Tensor]:
    """A and B of each adapter, and the head of a classifier, by PEFT's names for them."""
    parameters = {}
    for name, layer in adapters(lm).items():
        parameters[f"{name}.lora_A.weight"] = layer.lora_A
        parameters[f"{name}.lora_B.weight"] = layer.lora_B
    # A classifier's head is trained in full, so all of it is saved.
    for head in heads_of(lm):
        for name, p in getattr(lm, head).named_parameters():
            parameters[f"{head}.{name}"] = p
    return {PREFIX + name: p.detach().contiguous() for name, p in parameters.items()}


def config_to_save(lm, base: str) -> dict:
    """The content of adapter_config.json. All adapters of a model have one rank and one alpha."""
    layers = adapters(lm)
    heads = heads_of(lm)
    first = next(iter(layers.values()))
    # PEFT declares lora_alpha as an int: 16.0 is written as 16.
    alpha = first.alpha
    if alpha == int(alpha):
        alpha = int(alpha)
    # GPT-2's weights are stored as [in, out], so PEFT must transpose B A when it merges.
    any_conv = any(isinstance(layer.base_layer, Conv1D) for layer in layers.values())
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
        "inference_mode": True,
        "revision": None,
        "base_model_name_or_path": base,
        "r": len(first.lora_A),
        "lora_alpha": alpha,
        "lora_dropout": first.dropout.p,
        "target_modules": sorted(layers),
        "modules_to_save": heads or None,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": any_conv,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


# --------------------------------------------------------------------------------------- reading


def read_config(path: str) -> dict:
    """The adapter_config.json of a folder. InputError: it is wrong, or asks for what is not here.

    The base model is looked for where it was when the adapter was saved, then where it was as seen
    from the adapter folder. A base that is an adapter folder again must lead to a model in the end,
    not back.
    """
    config = read_one_config(path)
    # Follow the chain of bases down to a model. Two adapters that name each other would send the
    # loader round in a circle for ever.
    base = resolve_base(config)
    seen = {os.path.realpath(path)}
    while is_adapter(base):
        is_new = os.path.realpath(base) not in seen
        require(
            is_new, f"{path}: an adapter whose base model leads back to {base}, an adapter itself"
        )
        seen.add(os.path.realpath(base))
        base = resolve_base(read_one_config(base))
    return config


def resolve_base(config: dict) -> str:
    """The folder or hub name of the base model that an adapter_config.json names."""
    return resolve(config["base_model_name_or_path"])


def read_one_config(path: str) -> dict:
    """The adapter_config.json of a folder, without a look at what the base model is."""
    file = os.path.join(path, CONFIG)
    config = read_object(file)
    check_adapter_config(config, file)
    if not os.path.isfile(os.path.join(path, WEIGHTS)):
        raise InputError(f"{path}: an adapter without {WEIGHTS}")

    # A base model that is not in its old place may have been moved together with this folder.
    notes = read_notes(path)
    base = config["base_model_name_or_path"]
    if not os.path.isdir(base):
        # Without a note the place is unknown: no folder has the name "?".
        beside = os.path.join(path, notes.get("base") or "?")
        if os.path.isdir(beside):
            config["base_model_name_or_path"] = os.path.normpath(beside)
        # An absolute path cannot be a hub name; any other name may be one.
        elif os.path.isabs(base):
            raise InputError(
                f"{path}: its base model {base} is gone; write its new place into {CONFIG} "
                "(base_model_name_or_path)"
            )
        # A and B were trained on this revision; the hub would give the newest one.
        elif config.get("revision"):
            config["base_model_name_or_path"] = download(base, config["revision"])
    return config


def download(name: str, revision: str) -> str:
    """The folder of a hub model as it was at a revision. InputError: the hub does not give it."""
    with library_call(f"{name}: the hub gives no revision {revision}"):
        return snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES)


def check_adapter_config(config: dict, file: str):
    """InputError where adapter_config.json holds what no adapter can have, or is not supported."""
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise InputError(f"{file}: no LoRA adapter (its peft_type is {shorten(peft_type)})")
    check_fields(config, FIELDS, file)
    # The types are right by now, but a value may still be 0 or empty.
    for name in ("r", "lora_alpha", "target_modules", "base_model_name_or_path"):
        require(config[name], f"{file}: {name} cannot be {config[name]!r}")
    rank = config["r"]
    require(rank > 0, f"{file}: r cannot be {rank}")
    dropout = config["lora_dropout"]
    require(0 <= dropout < 1, f"{file}: lora_dropout must lie in [0, 1), not be {dropout}")
    name = find_unsupported(config)
    if name:
        raise InputError(
            f"{file}: the adapter uses {name} = {shorten(config[name])}, which is not supported; "
            "merge it with PEFT first"
        )


def find_unsupported(config: dict) -> str | None:
    """The first field of adapter_config.json that changes the adapter in ways unknown here."""
    # PEFT writes all of its options into every file; one that is off is null, false or empty.
    for name, value in config.items():
        if value and name not in UNDERSTOOD:
            return name
    if config.get("bias", "none") != "none":
        return "bias"
    # Any other start, such as "pissa", changes the weights of the base model.
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        return "init_lora_weights"
    # PEFT can save any module in full; here only a classifier's head is read.
    saved_whole = config.get("modules_to_save") or []
    if not set(saved_whole) <= set(HEADS):
        return "modules_to_save"
    return None


def read_notes(path: str) -> dict:
    """What nanorlhf.json says about an adapter folder; {} where there is none."""
    file = os.path.join(path, NOTES)
    if not os.path.isfile(file):
        return {}
    notes = read_object(file, NOTE_FIELDS)
    std = notes.get("reward_std")
    require(std is None or 0 < std < 1e9, f"{file}: reward_std cannot be {shorten(std)}")
    return notes


def read_adapter_tensors(path: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder, by their names in the model.

    {"layers.0.mlp.lora_A.weight": [r, in], ...}. InputError: broken, or not supported.
    """
    file = os.path.join(path, WEIGHTS)
    tensors = read_tensors(file)
    check_numbers(tensors, file)  # load_adapter() compares their shapes with those of the model

    # base_model.model.layers.0.mlp.lora_A.weight -> layers.0.mlp.lora_A.weight
    by_name = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(PREFIX)
        of_adapter = name.endswith((".lora_A.weight", ".lora_B.weight"))
        of_head = name.split(".")[0] in HEADS
        if not full_name.startswith(PREFIX) or not (of_adapter or of_head):
            raise InputError(f"{file}: the tensor {full_name} is not supported")
        by_name[name] = tensor
    return by_name


# --------------------------------------------------------------------------------------- loading


def load_adapter(lm, path: str):
    """Put the adapter of a folder on its base model, and a classifier's head too. -> lm

    merge() folds the adapters into the weights. InputError, before the model is touched: files that
    are broken or not supported, or an adapter that was made for another model.
    """
    config = read_config(path)
    tensors = read_adapter_tensors(path)

    # What the file must hold: A and B of each layer that the config names, and a classifier's head.
    layers = matching(lm, config["target_modules"])
    expected = {}
    for name, layer in layers.items():
        n_out, n_in = shape_of(layer)
        expected[f"{name}.lora_A.weight"] = [config["r"], n_in]
        expected[f"{name}.lora_B.weight"] = [n_out, config["r"]]
    heads = {}
    if config.get("task_type") == "SEQ_CLS":
        for name, p in lm.named_parameters():
            if name.split(".")[0] in HEADS:
                heads[name] = p
                expected[name] = list(p.shape)
    check_fits(lm, tensors, expected, path)

    # The files fit the model, which is changed from here on.
    for name in layers:
        lora_A = tensors[f"{name}.lora_A.weight"]
        lora_B = tensors[f"{name}.lora_B.weight"]
        put_adapter(lm, name, lora_A, lora_B, config["lora_alpha"], config["lora_dropout"])
    for name, p in heads.items():
        p.data.copy_(tensors[name])
    # A reward model that is saved whole has the scale of its scores in its config.
    notes = read_notes(path)
    for name in SCALE:
        if notes.get(name) is not None:
            setattr(lm.config, name, notes[name])
    return lm


def check_fits(lm, tensors: dict[str, torch.Tensor], expected: dict[str, list[int]], path: str):
    """InputError unless an adapter's tensors are those that are expected: {name: shape}."""
    for name in tensors:
        # A reward model has no LM head, and needs no adapter on it: lm_head.lora_A.weight.
        layer = name.rpartition(".lora_")[0]
        is_unused = layer and "." not in layer and not hasattr(lm, layer)
        require(
            name in expected or is_unused,
            f"{path}: {name} has no place in {type(lm).__name__}: the adapter is for another "
            "model, or its target_modules do not name the layer",
        )
    for name, shape in expected.items():
        require(name in tensors, f"{path}: the adapter lacks {name}")
        saved_shape = list(tensors[name].shape)
        require(
            saved_shape == shape,
            f"{path}: an adapter for another model: {name} is {saved_shape}, not {shape}",
        )


def load_merged(load: Callable, auto: type, path: str, new_head: bool, **kwargs):
    """The base model of an adapter folder with the adapter merged into it: a plain model.

    load(auto, base, new_head, **kwargs) is models.pretrained. It loads the base model, which may be
    an adapter folder itself. auto: the Auto class of transformers that is asked for.
    """
    config = read_config(path)
    is_classifier = config.get("task_type") == "SEQ_CLS"
    # A value model needs the bare trunk. It is taken out of the whole model, since the names of the
    # adapter's tensors are those of the layers in the whole model.
    if auto is transformers.AutoModel:
        whole = transformers.AutoModelForCausalLM
        if is_classifier:
            whole = transformers.AutoModelForSequenceClassification
        return load_merged(load, whole, path, new_head).base_model
    if is_classifier and auto is transformers.AutoModelForCausalLM:
        raise InputError(f"{path}: the adapter of a reward model, not of a policy")

    # Where the base is a causal LM, it is given a score head with as many labels as the adapter's.
    head = read_adapter_tensors(path).get("score.weight")  # [labels, D]
    if head is not None:
        kwargs = {"num_labels": len(head), **kwargs}
    # The base may lack this head: load_adapter() fills it.
    base = load(auto, config["base_model_name_or_path"], new_head or is_classifier, **kwargs)
    lm = merge(load_adapter(base, path))
    # An adapter that is trained next has this folder for its base.
    lm.name_or_path = path
    return lm

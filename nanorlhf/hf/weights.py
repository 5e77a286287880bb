"""Which files a model's weights are read from: safetensors in the model's own folder, no others.

A model folder holds model.safetensors; or else several files and model.safetensors.index.json,
whose weight_map says {tensor: its file}. Anyone can write such an index: it may name a pickle,
which runs code when it is read, or a file outside the folder.
"""

import os

import torch
from transformers.utils import cached_file

from ..errors import InputError, first_line
from ..runtime.files import read_object
from ..runtime.tensors import read_shapes

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def has_weights(folder: str) -> bool:
    """Whether a model folder holds weights that can be read."""
    has_one_file = os.path.isfile(os.path.join(folder, WEIGHTS))
    has_index = os.path.isfile(os.path.join(folder, INDEX))
    return has_one_file or has_index


def weight_names(path: str) -> list[str]:
    """The names of the weight files of a model folder or hub name, by its index where it has one.

    InputError: the index is broken, names anything but a safetensors file beside it, or names a
    file that is missing. Pitfall: a symbolic link is followed wherever it leads, since the hub's
    own cache consists of links. What it leads to is read as safetensors all the same.
    """
    index = find_file(path, INDEX, must=False)
    if index is None:
        return [WEIGHTS]

    # A bad index is refused even where model.safetensors stands beside it and is read instead.
    weight_map = read_object(index, {"weight_map": dict})["weight_map"]
    if not weight_map:
        raise InputError(f"{index}: its weight_map is empty")
    for tensor, name in weight_map.items():
        check_name(index, tensor, name)

    if os.path.isfile(os.path.join(path, WEIGHTS)):
        return [WEIGHTS]
    names = sorted(set(weight_map.values()))
    # A hub model's files need not be here yet.
    if os.path.isdir(path):
        for name in names:
            if not os.path.isfile(os.path.join(path, name)):
                raise InputError(f"{index}: it names {name}, and there is no such file")
    return names


def check_name(index: str, tensor: str, name):
    """InputError where an index puts a tensor into anything but a safetensors file beside it."""
    if not isinstance(name, str):
        raise InputError(f"{index}: the file of {tensor} must be a name, not {name!r}")
    if not name.endswith(".safetensors"):
        raise InputError(
            f"{index}: {tensor} is in {name}; weights are read from .safetensors files, "
            "never from a pickle"
        )
    if os.path.basename(name) != name:
        raise InputError(f"{index}: {tensor} is in {name}, outside the model's own folder")


def check_config(path: str, config):
    """InputError where a model's config names the file of its weights.

    transformers would read that file in the place of model.safetensors, even if it is a pickle.
    """
    # A model of several parts, such as text and images, has a config for each.
    parts = [config]
    for name in config.sub_configs:
        parts.append(getattr(config, name, None))
    for part in parts:
        name = getattr(part, "transformers_weights", None)
        if name:
            raise InputError(
                f"{path}: config.json puts the weights into {name} (transformers_weights); "
                f"they are read from {WEIGHTS}, or by {INDEX}, alone"
            )


def weight_files(path: str) -> list[str]:
    """The paths of a model's safetensors files; a hub model's are downloaded."""
    return [find_file(path, name) for name in weight_names(path)]


def find_dtype(path: str) -> torch.dtype:
    """The type in which a model's folder holds its weights: bfloat16, float16 or float32.

    float32, where they are of several types. InputError: weights that are no floating-point
    numbers, which transformers would turn into some without a word. Buffers, such as masks, may
    have any type.
    """
    # The headers alone are read: safetensors puts names, types and shapes before the numbers.
    stored_types = set()
    for file in weight_files(path):
        for name, (dtype, _) in read_shapes(file).items():
            if not name.endswith(".weight"):
                continue
            # safetensors' names of floating-point types have an F: F32, BF16, F8_E4M3.
            if "F" not in dtype:
                raise InputError(f"{file}: {name} holds {dtype}, not floating-point numbers")
            stored_types.add(dtype)
    if stored_types == {"BF16"}:
        return torch.bfloat16
    if stored_types == {"F16"}:
        return torch.float16
    return torch.float32


def find_file(path: str, name: str, must: bool = True) -> str | None:
    """The path of a file of a model folder or hub name. must: InputError where it is not there.

    Without `must` it is None where the file is missing. Offline, the hub cannot say whether a file
    is missing: it then counts as missing.
    """
    try:
        return cached_file(
            path,
            name,
            _raise_exceptions_for_missing_entries=must,
            _raise_exceptions_for_connection_errors=must,
        )
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: {name} is not there ({first_line(e)})") from None

"""Tensors in safetensors files, which anybody may have written, or which were damaged since.

What is wrong with a file is an InputError: one line that names it.
"""

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..errors import library_call, require


def read_tensors(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, by their names. InputError: it cannot be read."""
    with library_call(f"{path}: cannot be read"):
        return load_file(path)


def read_shapes(path: str) -> dict[str, tuple[str, list[int]]]:
    """{name of a tensor: its type, such as F32, and its shape}, without loading any tensor.

    InputError: the file cannot be read.
    """
    shapes = {}
    with library_call(f"{path}: cannot be read"), safe_open(path, "pt") as f:
        for name in f.keys():
            tensor = f.get_slice(name)
            shapes[name] = (tensor.get_dtype(), list(tensor.get_shape()))
    return shapes


def read_notes(path: str) -> dict[str, str]:
    """The texts in a safetensors file's header, by their names. InputError: it cannot be read."""
    with library_call(f"{path}: cannot be read"), safe_open(path, "pt") as f:
        return f.metadata() or {}


def check_tensors(tensors: dict, shapes: dict, place: str):
    """InputError where tensors are not those that are expected: {name: shape}, or None for any.

    Their numbers are checked too (check_numbers). The caller decides about tensors that are not
    expected.
    """
    for name, shape in shapes.items():
        require(name in tensors, f"{place}: the tensor {name} is missing")
        if shape is not None:
            shape_wanted = list(shape)
            shape_there = list(tensors[name].shape)
            is_same = shape_there == shape_wanted
            require(is_same, f"{place}: {name} is {shape_there}, not {shape_wanted}")
        check_numbers({name: tensors[name]}, place)


def check_numbers(tensors: dict, place: str):
    """InputError where a tensor holds no floating-point numbers, or one that is not finite."""
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        is_float = tensor.is_floating_point()
        require(is_float, f"{place}: {name} holds {dtype}, not floating-point numbers")
        # A run that diverged saves NaN, and a float64 of 1e300 is infinite in float32.
        is_finite = bool(tensor.detach().float().isfinite().all())
        require(is_finite, f"{place}: {name} holds numbers that are not finite")

"""Tensors in safetensors files, which anybody may have written, or which were damaged since."""

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..errors import library_call, require


def read_tensors(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, by their names. InputError: it cannot be read."""
    with library_call(f"{path}: cannot be read"):
        return load_file(path)


def read_shapes(path: str) -> dict[str, tuple[str, list[int]]]:
    """{name: its type, such as F32, and its shape}; no tensor is loaded. InputError: as above."""
    with library_call(f"{path}: cannot be read"), safe_open(path, "pt") as f:
        slices = {name: f.get_slice(name) for name in f.keys()}
        return {name: (x.get_dtype(), list(x.get_shape())) for name, x in slices.items()}


def read_notes(path: str) -> dict[str, str]:
    """The texts in a safetensors file's header, by their names. InputError: as above."""
    with library_call(f"{path}: cannot be read"), safe_open(path, "pt") as f:
        return f.metadata() or {}


def check_tensors(tensors: dict, shapes: dict, place: str):
    """InputError where tensors are not those that are expected: {name: shape}, or None for any shape.

    Each must hold floating-point numbers, and all of them finite in float32.
    """
    for name, shape in shapes.items():
        require(name in tensors, f"{place}: the tensor {name} is missing")
        found = list(tensors[name].shape)
        require(
            shape is None or found == list(shape),
            f"{place}: {name} is {found}, not {list(shape or [])}",
        )
        dtype = str(tensors[name].dtype).removeprefix("torch.")
        require(
            tensors[name].is_floating_point(),
            f"{place}: {name} holds {dtype}, not floating-point numbers",
        )
        finite = bool(tensors[name].detach().float().isfinite().all())
        require(finite, f"{place}: {name} holds numbers that are not finite")

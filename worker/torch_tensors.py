"""Tensors of PyTorch as arrays, and arrays as tensors, in the same memory where that can be."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_FOREIGN = {
    name: (np.dtype(getattr(ml_dtypes, name)), bits)
    for name, bits in {
        "bfloat16": torch.int16,
        "float8_e4m3fn": torch.uint8,
        "float8_e4m3fnuz": torch.uint8,
        "float8_e5m2": torch.uint8,
        "float8_e5m2fnuz": torch.uint8,
        "float8_e8m0fnu": torch.uint8,
    }.items()
}
"""By name: dtypes that are not NumPy's own, and what torch can hand over of the same size."""


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A CPU tensor's memory as an array."""
    tensor = tensor.detach()
    if (name := dtype_name(tensor.dtype)) in _FOREIGN:
        dtype, bits = _FOREIGN[name]
        return tensor.view(bits).numpy().view(dtype)
    return tensor.numpy()


def as_tensor(leaf: Any, device: torch.device) -> torch.Tensor:
    """Of a batch; its own memory where that can be."""
    if not isinstance(leaf, torch.Tensor):
        array = np.asarray(leaf)
        if not array.flags.writeable:
            array = array.copy()  # torch has no tensors that cannot be written
        if array.dtype.name in _FOREIGN:
            bits = np.dtype(f"u{array.dtype.itemsize}")
            leaf = torch.from_numpy(array.view(bits)).view(getattr(torch, array.dtype.name))
        else:
            leaf = torch.from_numpy(array)
    return leaf.to(device)


def describe(value: Any) -> str:
    """For people: `float32[3, 4]`, or the name of its type."""
    if isinstance(value, torch.Tensor):
        return f"{dtype_name(value.dtype)}{list(value.shape)}"
    return type(value).__name__

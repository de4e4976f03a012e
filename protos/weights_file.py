"""Named weights as a safetensors file, written whole or not at all.

The file is what any safetensors reader expects. Dtypes that the format lacks
are kept bit for bit under one it has, and named in the metadata as
`dtype:<tensor>`: complex128 as float64 pairs on a new last axis, the rarer
8-bit floats as uint8.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

_NATIVE = {
    "float16", "float32", "float64", "bfloat16", "complex64", "float8_e4m3fn", "float8_e5m2",
}  # fmt: skip


def save_weights(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write `arrays` to `path`, replacing it only when everything is on disk.

    On return the file survives loss of power, if the disk keeps what it
    acknowledged to fsync.

    Raises:
      OSError: The folder is missing, or the disk is full or broken; `path` is as it was.
    """
    notes = dict(metadata)
    tensors = {}
    for name, array in arrays.items():
        stored = np.ascontiguousarray(array).reshape(array.shape)
        if array.dtype.name == "complex128":
            stored = stored.view(np.float64).reshape(*array.shape, 2)
        elif array.dtype.name not in _NATIVE:
            stored = stored.view(np.uint8)
        if stored.dtype != array.dtype:
            notes[f"dtype:{name}"] = array.dtype.name
        tensors[name] = stored
    replace_file(path, safetensors.numpy.save(tensors, notes))


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to a temporary name, fsync, rename to `path`, fsync the folder."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

"""Named weights as a safetensors file, written whole or not at all.

The file is what any safetensors reader expects. Dtypes that the format lacks
are kept bit for bit under one it has, and named in the metadata as
`dtype:<tensor>`: complex128 as float64 pairs on a new last axis, 8-bit floats
as uint8.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

# The format has two 8-bit floats as well, which its own NumPy and JAX readers cannot read.
_NATIVE = {"float16", "float32", "float64", "bfloat16", "complex64"}


def save_weights(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write `arrays` to `path`, replacing it only when everything is on disk.

    On return the file survives loss of power, if the disk keeps what it
    acknowledged to fsync.

    Raises:
      OSError: The folder is missing, or the disk is full or broken; `path` is as
        it was, or whole and new but perhaps not on disk yet.
    """
    notes = dict(metadata)
    tensors = {}
    for name, array in arrays.items():
        stored = np.ascontiguousarray(array).reshape(array.shape)
        if array.dtype.name == "complex128":
            stored = stored.reshape(-1).view(np.float64).reshape(*array.shape, 2)
        elif array.dtype.name not in _NATIVE:
            stored = stored.view(np.uint8)
        if stored.dtype != array.dtype:
            notes[f"dtype:{name}"] = array.dtype.name
        tensors[name] = stored
    replace_file(path, safetensors.numpy.save(tensors, notes))


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to a temporary name, fsync, rename to `path`, fsync the folder."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

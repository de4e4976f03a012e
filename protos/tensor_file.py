"""Named arrays in a safetensors file, written and read without a second copy in memory.

The format (github.com/huggingface/safetensors): eight bytes of the header's
length, the header as JSON, then the tensors' bytes one after the other. Any
safetensors reader takes the files. The library's own writer would hold the
whole file in memory beside the arrays, twice what a snapshot of a large model
may cost; hence this one.

Dtypes that the format lacks are kept bit for bit under one it has, and named in
the metadata as `dtype:<tensor>`: complex128 as float64 pairs on a new last axis,
8-bit floats and the like as uint8.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from headwater.protos.crc import bytes_of
from headwater.protos.files import Buffer

MAX_HEADER_BYTES = 100_000_000
"""The limit of the library's own reader."""

# The format has 8-bit floats as well, which its own NumPy and JAX readers cannot read.
_CODES = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}


_DTYPES = {code: name for name, code in _CODES.items()} | {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class FormatError(ValueError):
    """The file is no such file, or was damaged; says where."""


def encode(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Iterator[Buffer]:
    """The file in pieces: its header, then each array where it lies."""
    yield header(
        {name: (array.dtype.name, array.shape) for name, array in arrays.items()}, metadata
    )
    for array in arrays.values():
        yield bytes_of(array)


def header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The file's beginning, for tensors given as (dtype, shape) in the order of their bytes.

    The same arguments give the same bytes, so that a reader who knows them can
    tell whether the file's are intact.
    """
    notes = dict(metadata)
    entries: dict[str, object] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = dtype_of(dtype).itemsize * math.prod(shape)
        kept, kept_shape = dtype, shape
        if dtype == "complex128":
            kept, kept_shape = "float64", (*shape, 2)
        elif dtype not in _CODES:
            kept = "uint8"
        if kept != dtype:
            notes[f"dtype:{name}"] = dtype
        entries[name] = {
            "dtype": _CODES[kept],
            "shape": list(kept_shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps({"__metadata__": notes, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def dtype_of(name: str) -> np.dtype:
    """NumPy's or ml_dtypes' dtype of this name.

    Raises:
      FormatError: There is none, or it does not consist of plain bytes.
    """
    try:
        found = np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        raise FormatError(f"dtype {name!r} is not known") from None
    if found.hasobject or found.itemsize == 0:
        raise FormatError(f"dtype {name!r} cannot be kept in a file")
    return found


def read_header(file: IO[bytes]) -> tuple[dict[str, str], bytes]:
    """The metadata, and the header's own bytes; leaves the file at the first tensor.

    Raises:
      FormatError: It does not begin as such a file does.
    """
    start, text = _beginning(file)
    try:
        notes = json.loads(text)["__metadata__"]
    except (ValueError, KeyError, TypeError):
        raise FormatError("its header is not that of a safetensors file") from None
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        raise FormatError("its header's metadata are not texts")
    return notes, start + text


def _beginning(file: IO[bytes]) -> tuple[bytes, bytes]:
    """The header's length, and its text, as they are in the file."""
    start = file.read(8)
    size = int.from_bytes(start, "little")
    left = os.fstat(file.fileno()).st_size - 8
    if len(start) < 8 or not 2 <= size <= min(left, MAX_HEADER_BYTES):
        raise FormatError(f"it does not begin with a header's length ({left + 8} bytes in all)")
    return start, file.read(size)


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, anybody's, in the order of their bytes.

    Raises:
      FormatError: It is no such file, or has a tensor that cannot be read.
      OSError: It cannot be opened.
    """
    with path.open("rb") as file:
        start, text = _beginning(file)
        base = len(start) + len(text)
        try:
            entries = json.loads(text)
            notes = entries.pop("__metadata__", {})
            placed = sorted(entries.items(), key=lambda entry: entry[1]["data_offsets"][0])
            return {name: _placed(file, name, entry, notes, base) for name, entry in placed}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"its header is not that of a safetensors file: {error}") from None


def read_specs(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a safetensors file, in the order of their bytes.

    Raises:
      FormatError: It is no such file, or one of Headwater's snapshots.
      OSError: It cannot be opened.
    """
    with path.open("rb") as file:
        _, text = _beginning(file)
    try:
        entries = json.loads(text)
        notes = entries.pop("__metadata__", {})
        placed = sorted(entries.items(), key=lambda entry: entry[1]["data_offsets"][0])
        found = {}
        for name, entry in placed:
            kept, shape = _DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
            own = notes.get(f"dtype:{name}", kept)
            found[name] = dtype_of(own).name, shape[:-1] if own == "complex128" else shape
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"its header is not that of a safetensors file: {error}") from None
    if "snapshot_crc32c" in notes:
        raise FormatError("it is a snapshot, with an optimizer's state among the weights")
    return found


def _placed(
    file: IO[bytes], name: str, entry: Mapping[str, Any], notes: Mapping[str, str], base: int
) -> np.ndarray:
    """One tensor, as the header has it."""
    begin, end = entry["data_offsets"]
    kept = _DTYPES[entry["dtype"]]
    shape = tuple(entry["shape"])
    if not 0 <= begin <= end or end - begin != dtype_of(kept).itemsize * math.prod(shape):
        raise FormatError(f"{name} has {end - begin} bytes, which its shape is not of")
    file.seek(base + begin)
    array = read_array(file, kept, shape)
    own = notes.get(f"dtype:{name}")
    if own is None:
        return array
    return array.view(dtype_of(own)).reshape(shape[:-1] if own == "complex128" else shape)


def read_array(file: IO[bytes], dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The next tensor.

    Raises:
      FormatError: The file ends in the middle of it.
    """
    kind = dtype_of(dtype)
    buffer = np.empty(math.prod(shape) * kind.itemsize, np.uint8)
    got = file.readinto(buffer.data) if buffer.size else 0  # type: ignore[attr-defined]
    if got != buffer.size:
        raise FormatError(f"it ends {buffer.size - got} bytes early")
    return buffer.view(kind).reshape(shape)

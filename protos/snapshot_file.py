"""A snapshot: weights, optimizer state and ledger of one version, in one safetensors file.

The weights stand under their own names, for any safetensors reader; the
optimizer's state under `optimizer/...`. Everything else is JSON text in the
header's metadata under `snapshot`, with a CRC32C of its own beside it, and in it
a CRC32C for each tensor. The rest of the header follows from that text, so a
reader writes it anew and compares: no bit of the file goes unchecked.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headwater.protos import tensor_file
from headwater.protos.crc import bytes_of, crc32c
from headwater.protos.errors import HeadwaterError
from headwater.protos.files import CHUNK_BYTES, Buffer, replace_file
from headwater.protos.tensor_file import FormatError

FORMAT = 1
"""Of the JSON text. A file with a greater one was written by a later Headwater."""

Pairs = list[list[int]]


class SnapshotError(HeadwaterError):
    """The file cannot be used as a snapshot; names it, and says what is wrong."""


class Unreadable(SnapshotError):
    """The system does not give its bytes: it is missing, or barred, or the disk failed."""


class NewerFormat(SnapshotError):
    """A later Headwater wrote it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What a snapshot says beside its tensors."""

    run_id: str
    task: str
    incarnation: int
    version: int
    applied: Pairs
    """[start, end) ranges of the positions of batches that are done with."""
    left_out: Pairs
    """Those of them that moved nothing."""
    settings: Mapping[str, Any]
    """What could be changed while the run trained, as it stood: consistency, numbers of the
    optimizer, and the like."""
    optimizer: str
    """Its expression, or a description."""
    optimizer_prefix: str
    """How the names of the optimizer's tensors begin."""
    software: Mapping[str, str]
    """Library to version, of the server that wrote it."""
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]
    """Name to (dtype, shape, CRC32C), in the order of the file."""
    sessions: Mapping[str, Any] | None = None
    """The last applied push of each session; None, and not in the file, where there was none."""

    @property
    def batch_count(self) -> int:
        """Batches that are done with."""
        return sum(end - start for start, end in self.applied)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A file that was read and found whole."""

    facts: Facts
    arrays: Mapping[str, np.ndarray]


def write(
    path: Path,
    facts: Facts,
    arrays: Mapping[str, np.ndarray],
    reach: Callable[[str], None] = lambda step: None,
) -> None:
    """Make `arrays`, in order, and `facts` one durable file; `facts.tensors` is filled in here.

    Args:
      path: Replaced only when everything is on disk.
      facts: What is said beside the arrays.
      arrays: Weights by their own names, optimizer state by prefixed ones.
      reach: As in `replace_file`, and "half-written" in the middle of the arrays.

    Raises:
      OSError: See `replace_file`.
    """
    facts = dataclasses.replace(
        facts,
        tensors={
            name: (array.dtype.name, array.shape, crc32c(bytes_of(array)))
            for name, array in arrays.items()
        },
    )

    def pieces() -> Iterator[Buffer]:
        yield _header(facts)
        half, at = sum(array.nbytes for array in arrays.values()) // 2, 0
        for array in arrays.values():
            data: Buffer = bytes_of(array)
            for start in range(0, len(data), CHUNK_BYTES):
                if at <= half < at + CHUNK_BYTES:
                    reach("half-written")
                yield data[start : start + CHUNK_BYTES]
                at += CHUNK_BYTES

    replace_file(path, pieces(), reach)


def read(path: Path) -> Snapshot:
    """A snapshot, every bit of it checked.

    Raises:
      SnapshotError: It is damaged or no snapshot; Unreadable when the system does not
        give its bytes; NewerFormat when a later Headwater wrote it.
    """
    try:
        with path.open("rb") as file:
            notes, raw = tensor_file.read_header(file)
            facts = _facts(notes)
            if _header(facts) != raw:
                raise FormatError("its header was damaged")
            arrays = {}
            for name, (dtype, shape, crc) in facts.tensors.items():
                arrays[name] = tensor_file.read_array(file, dtype, shape)
                if crc32c(bytes_of(arrays[name])) != crc:
                    raise FormatError(f"the checksum of {name} does not fit: it was damaged")
            if file.read(1):
                raise FormatError("it goes on after its last tensor")
    except FormatError as error:
        raise SnapshotError(f"{path}: {error}") from None
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from None
    except NewerFormat as error:
        raise NewerFormat(f"{path}: {error}") from None
    return Snapshot(facts, arrays)


def _header(facts: Facts) -> bytes:
    values = dataclasses.asdict(facts)
    if facts.sessions is None:
        del values["sessions"]  # as it was before there were any
    text = json.dumps({"format": FORMAT, **values}, separators=(",", ":"))
    metadata = {
        "run_id": facts.run_id,
        "task": facts.task,
        "incarnation": str(facts.incarnation),
        "version": str(facts.version),
        "snapshot": text,
        "snapshot_crc32c": f"{crc32c(text.encode()):08x}",
    }
    tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape, _) in facts.tensors.items()}
    return tensor_file.header(tensors, metadata)


def _facts(notes: Mapping[str, str]) -> Facts:
    text = notes.get("snapshot", "")
    if not text:
        raise FormatError("it holds tensors, but is no snapshot of Headwater's")
    if notes.get("snapshot_crc32c") != f"{crc32c(text.encode(errors='replace')):08x}":
        raise FormatError("the checksum of its header does not fit: it was damaged")
    values = json.loads(text)
    written = values.pop("format")
    if written > FORMAT:
        raise NewerFormat(
            f"its format is {written}, and this version of Headwater reads up to {FORMAT}; "
            "install the version that wrote it, or a later one"
        )
    tensors = {
        n: (dtype, tuple(shape), crc) for n, (dtype, shape, crc) in values["tensors"].items()
    }
    return Facts(**{**values, "tensors": tensors})


def element_count(facts: Facts) -> int:
    """Numbers in the weights."""
    return sum(
        math.prod(shape)
        for name, (_, shape, _) in facts.tensors.items()
        if not name.startswith(facts.optimizer_prefix)
    )

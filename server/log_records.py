"""The update log's bytes: segments of records, and what to make of a damaged one. No I/O.

A segment is a head, then records one after the other:

    head    magic, length, JSON {format, run_id, layout, sequence, version, …}, CRC32C
    record  72 bytes with a CRC32C of their own, then a detail and the gradient, whose CRC32Cs
            they hold

Records count through the run's log from 1. Each says up to which of them the log
was known to be on disk when it was written. That tells a torn tail from damage:
after a loss of power the records since the last fsync may be missing in any
pattern, and are cut; but a record is damaged if a later one says that it had
been on disk.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from headwater.protos.crc import crc32c

FORMAT = 1

_HEAD_MAGIC = b"HWLOG\r\n\x1a"
_MAGIC = b"HWUPDATE"
_HEAD = struct.Struct("<8sI")
_RECORD = struct.Struct("<8sIIIIQQQQdI")
_CRC = struct.Struct("<I")

RECORD_BYTES = _RECORD.size + _CRC.size


class Kind(enum.IntEnum):
    """What a record is of."""

    UPDATE = 1
    LEFT_OUT = 2
    """A batch that is done with, without an update."""
    SYNCED = 3
    """Nothing happened; it only says what is on disk."""
    SETTINGS = 4
    """Other settings hold from here on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One update: what the optimizer ate, and what it did to the ledger."""

    kind: Kind
    sequence: int
    synced: int
    """The sequence up to which the log was on disk when this was written."""
    version: int = 0
    """Of the weights after it."""
    detail: Any = None
    """JSON: of an update, its gradients as the history has them; of a batch left out, its
    position; of settings, what they are."""
    loss: float = 0.0
    weights_crc: int = 0
    """CRC32C of the weights just before it."""
    gradient: memoryview | bytes = b""
    """The flat buffer, as the optimizer got it."""


class LogError(ValueError):
    """A segment cannot be read; says at which byte, and why."""


def encode_head(facts: Mapping[str, Any]) -> bytes:
    """A segment's beginning."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True).encode()
    data = _HEAD.pack(_HEAD_MAGIC, len(text)) + text
    return data + _CRC.pack(crc32c(data))


def decode_head(data: memoryview) -> tuple[dict[str, Any], int]:
    """The facts of a segment's head, and its length in bytes.

    Raises:
      LogError: It is none, or not whole, or of a later Headwater.
    """
    if len(data) < _HEAD.size:
        raise LogError("the file ends within its head")
    magic, size = _HEAD.unpack_from(data)
    end = _HEAD.size + size
    if magic != _HEAD_MAGIC or len(data) < end + _CRC.size:
        raise LogError("it does not begin as a log of updates does")
    if _CRC.unpack_from(data, end)[0] != crc32c(data[:end]):
        raise LogError("the checksum of its head does not fit")
    facts = json.loads(bytes(data[_HEAD.size : end]))
    if facts["format"] > FORMAT:
        raise LogError(
            f"its format is {facts['format']}, and this version of Headwater reads up to {FORMAT}"
        )
    return facts, end + _CRC.size


def encode(record: Record) -> bytes:
    """A record's bytes before the gradient, which follows them as it is."""
    detail = b"" if record.detail is None else json.dumps(record.detail).encode()
    head = _RECORD.pack(
        _MAGIC,
        record.kind,
        crc32c(record.gradient),
        len(detail),
        crc32c(detail),
        len(record.gradient),
        record.sequence,
        record.synced,
        record.version,
        record.loss,
        record.weights_crc,
    )
    return head + _CRC.pack(crc32c(head)) + detail


def decode(data: memoryview, at: int) -> tuple[Record, int] | None:
    """The record at a byte, and where it ends; None where there is no whole one."""
    start = at + RECORD_BYTES
    if len(data) < start:
        return None
    if _CRC.unpack_from(data, at + _RECORD.size)[0] != crc32c(data[at : at + _RECORD.size]):
        return None
    magic, kind, crc, detail_size, detail_crc, size, sequence, synced, version, loss, weights = (
        _RECORD.unpack_from(data, at)
    )
    detail = data[start : start + detail_size]
    start += detail_size
    gradient = data[start : start + size]
    whole = len(detail) == detail_size and len(gradient) == size
    if magic != _MAGIC or not whole or (crc32c(detail), crc32c(gradient)) != (detail_crc, crc):
        return None
    record = Record(
        kind=Kind(kind),
        sequence=sequence,
        synced=synced,
        version=version,
        detail=json.loads(bytes(detail)) if detail_size else None,
        loss=loss,
        weights_crc=weights,
        gradient=gradient,
    )
    return record, start + size


@dataclasses.dataclass(frozen=True)
class Tail:
    """Where the whole records of a segment end, and what follows."""

    end: int
    """Bytes up to there."""
    sequence: int
    """Of the last whole record."""
    torn_bytes: int
    """Bytes after it that are no record, or none that follows on."""
    damaged: bool
    """Whether a record is missing that had been on disk, or the rest cannot be known."""


def read(data: memoryview, at: int, sequence: int) -> Iterator[Record | Tail]:
    """The whole records from a byte on that follow on `sequence`, then the segment's end."""
    synced = 0
    while (found := decode(data, at)) is not None and found[0].sequence == sequence + 1:
        record, at = found
        sequence, synced = record.sequence, max(synced, record.synced)
        yield record
    synced = max([synced, *(r.synced for r in records_within(data, at))])
    yield Tail(at, sequence, len(data) - at, synced > sequence)


def records_within(data: memoryview, at: int) -> Iterator[Record]:
    """Whatever whole records there are from a byte on, gaps between them or not."""
    rest = bytes(data[at:])  # long only where something is wrong
    at = rest.find(_MAGIC)
    while at >= 0:
        found = decode(memoryview(rest), at)
        if found is not None:
            yield found[0]
        at = rest.find(_MAGIC, at + 1 if found is None else found[1])

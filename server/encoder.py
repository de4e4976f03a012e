"""Versions as they cross the wire: framed parts, made once and shared by all who take them.

The first parts of a large version leave while its last ones are still encoded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.wire import PART_BYTES, frame
from headwater.server.packed_versions import EvaluationVersions, PackedVersions
from headwater.server.store import Published

KEPT = 3
"""Versions kept encoded. A version is asked for by few workers and some readers
shortly after it was made; more would be memory for nothing."""


class _Encoding:
    """One version's parts as they are made; all methods run on the event loop."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._is_whole = False
        self._error: BaseException | None = None
        self._grown = asyncio.Event()

    def add(self, part: bytes) -> None:
        self.parts.append(part)
        self._wake()

    def finish(self, error: BaseException | None = None) -> None:
        self._is_whole, self._error = True, error
        self._wake()

    def _wake(self) -> None:
        # A new event each time: who waits for the old one sees this growth, and no other.
        self._grown.set()
        self._grown = asyncio.Event()

    async def read(self) -> AsyncIterator[bytes]:
        """All parts in order, each when it is there."""
        at = 0
        while True:
            if at < len(self.parts):
                yield self.parts[at]
                at += 1
            elif self._error is not None:
                raise self._error
            elif self._is_whole:
                return
            else:
                await self._grown.wait()


class Encoder:
    """Encodes each version at most once; large ones off the event loop."""

    def __init__(self, packed: PackedVersions | EvaluationVersions) -> None:
        self._packed = packed
        self._kept: dict[int, _Encoding] = {}
        self._thread = ThreadPoolExecutor(1, "headwater-encoder")

    def parts(self, published: Published) -> AsyncIterator[bytes]:
        """The version's messages: each is a ServerMessage and a PullReply at once."""
        found = self._kept.get(published.version)
        if found is None:
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            found = self._kept[published.version] = self._begin(published)
        return found.read()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin(self, published: Published) -> _Encoding:
        encoding = _Encoding()
        made = encode(self._packed, published)
        if self._packed.layout.total_bytes <= PART_BYTES:
            for part in made:
                encoding.add(part)
            encoding.finish()
        else:
            loop = asyncio.get_running_loop()
            self._thread.submit(_hand_over, made, encoding, loop.call_soon_threadsafe)
        return encoding


def _hand_over(made: Iterator[bytes], to: _Encoding, on_loop: Callable[..., object]) -> None:
    try:
        for part in made:
            on_loop(to.add, part)
    except BaseException as error:
        on_loop(to.finish, error)
        raise
    on_loop(to.finish)


def encode(packed: PackedVersions | EvaluationVersions, published: Published) -> Iterator[bytes]:
    """Cut a version into framed parts of about 1 MiB; one even where there are no bytes."""
    stamp = pb.Stamp(incarnation=published.incarnation, version=published.version)
    layout = packed.layout
    for offset, pieces in layout.cut(packed.arrays(published), PART_BYTES):
        part = pb.WeightsPart(
            version=published.version, offset=offset, total_bytes=layout.total_bytes
        )
        message = pb.ServerMessage(stamp=stamp, weights=part)
        yield frame(message, *(pieces or (b"",)))

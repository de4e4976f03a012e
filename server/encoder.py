"""Versions as they cross the wire: framed parts, made once and shared by all who take them."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.layout import Layout
from headwater.protos.wire import PART_BYTES, frame, parts
from headwater.server.store import Published

Parts = tuple[bytes, ...]

KEPT = 3
"""Versions kept encoded. A version is asked for by few workers and some readers
shortly after it was made; more would be memory for nothing."""


class Encoder:
    """Encodes each version at most once; large ones off the event loop."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._kept: dict[int, asyncio.Future[Parts]] = {}
        self._thread = ThreadPoolExecutor(1, "headwater-encoder")

    async def parts(self, published: Published) -> Parts:
        """The version's messages: each is a ServerMessage and a PullReply at once."""
        found = self._kept.get(published.version)
        if found is None:
            loop = asyncio.get_running_loop()
            if self._layout.total_bytes <= PART_BYTES:
                found = loop.create_future()
                found.set_result(encode(self._layout, published))
            else:
                found = loop.run_in_executor(self._thread, encode, self._layout, published)
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[published.version] = found
        # Shielded: one reader that gives up must not take it from the others.
        return await asyncio.shield(found)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def encode(layout: Layout, published: Published) -> Parts:
    """Cut a version into framed parts of about 1 MiB; one even where there are no bytes."""
    buffer = layout.empty()
    layout.pack((np.asarray(leaf) for leaf in published.leaves), buffer)
    whole = buffer.data
    return tuple(
        frame(
            pb.ServerMessage(
                stamp=pb.Stamp(incarnation=published.incarnation, version=published.version),
                weights=pb.WeightsPart(
                    version=published.version, offset=start, total_bytes=layout.total_bytes
                ),
            ),
            whole[start:end],
        )
        for start, end in parts(layout.total_bytes)
    )

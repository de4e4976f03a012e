"""The memory that the server shares with a worker on its machine, by the numbers of its slots."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import HeadwaterError
from headwater.protos.layout import Layout
from headwater.protos.shared_memory import attach, copy


class Slots:
    """What was shared on one stream. Each slot holds one flat buffer.

    Args:
      pulled: Layout of what is sent for a version's weights.
      pushed: Layout of what is sent for a gradient.
    """

    def __init__(self, pulled: Layout, pushed: Layout) -> None:
        self._pulled = pulled
        self._pushed = pushed
        self._views: dict[int, list[np.ndarray]] = {}
        self._flat: dict[int, list[np.ndarray]] = {}

    def learn(self, message: pb.ServerMessage, descriptors: Sequence[int]) -> None:
        """Map what came with a message, and forget what it says is gone.

        Raises:
          HeadwaterError: The server's descriptors are not what it says.
          OSError: They cannot be mapped.
        """
        for number in message.gone_slots:
            self._views.pop(number, None)
            self._flat.pop(number, None)
        waiting = list(descriptors)
        try:
            if len(waiting) != len(message.new_slots):
                raise HeadwaterError(
                    f"the server announced {len(message.new_slots)} slots and sent "
                    f"{len(waiting)} descriptors"
                )
            for number in message.new_slots:
                writable = number == message.ticket.gradient_slot
                self._map(number, waiting.pop(0), writable=writable)
        finally:
            for descriptor in waiting:
                os.close(descriptor)

    def weights(self, number: int) -> list[np.ndarray]:
        """The tensors in a slot, in layout order.

        Raises:
          HeadwaterError: There is no such slot.
        """
        if number not in self._views:
            raise HeadwaterError(f"the server speaks of slot {number}, which it did not share")
        return self._views[number]

    def write(self, number: int, leaves: Sequence[np.ndarray]) -> None:
        """Put a gradient into a slot.

        Raises:
          HeadwaterError: There is no such slot that can be written.
        """
        if number not in self._flat:
            raise HeadwaterError(f"the server speaks of slot {number}, which it did not share")
        sources = (leaf.reshape(-1).view(np.uint8) for leaf in leaves)
        copy(list(zip(self._flat[number], sources, strict=True)))

    def _map(self, number: int, descriptor: int, *, writable: bool) -> None:
        layout = self._pushed if writable else self._pulled
        buffer = attach(descriptor, layout.total_bytes, writable=writable)
        if writable:
            self._flat[number] = [buffer[t.offset : t.end] for t in layout.tensors]
        else:
            self._views[number] = list(layout.views(buffer).values())

"""A bare worker's end of the same-host line: a socket on its event loop, and the slots it writes.

What headwater.protos.line.Line and headwater.worker.slots.Slots are to a real worker,
without a thread and without looking at the weights: their slots are not mapped, only
their descriptors closed. A real worker maps each once. Refuses tensors in parts, so
that what is measured over shared memory was there.
"""

from __future__ import annotations

import asyncio
import os
import socket

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import HeadwaterError
from headwater.protos.layout import Bytes
from headwater.protos.line import Received, Splitter, packed
from headwater.protos.shared_memory import attach, copy

CONNECT_TIMEOUT_S = 5.0


class BareLine:
    """One line, from its key on. Lives on the event loop.

    Args:
      offer: From the welcome.
      total_bytes: Of the layout.

    Raises:
      HeadwaterError: The server offers none.
      OSError: It is not on this machine.
    """

    def __init__(self, offer: pb.SameHost, total_bytes: int) -> None:
        if not offer.socket:
            raise HeadwaterError("the server offers no shared memory; use --transport grpc")
        self._total_bytes = total_bytes
        self._slots: dict[int, Bytes] = {}
        self._splitter = Splitter()
        self._received: asyncio.Queue[Received | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(CONNECT_TIMEOUT_S)  # waits where many come in at once
        self._socket.connect(b"\0" + offer.socket.encode())
        self._socket.sendall(packed(offer.key, ()))
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._read)

    async def receive(self) -> pb.ServerMessage | None:
        """The next message; None at the end, of which the stream beside it tells why.

        Raises:
          HeadwaterError: The server had no memory left to share.
        """
        received = await self._received.get()
        if received is None:
            return None
        message = pb.ServerMessage.FromString(received.data)
        self._learn(message, received.descriptors)
        if message.HasField("weights") and not message.weights.slot:
            raise HeadwaterError("weights came in parts: the server has no memory to share")
        return message

    async def send(self, data: bytes) -> None:
        """Send one message; not two at a time."""
        await self._loop.sock_sendall(self._socket, packed(data, ()))

    def write(self, number: int, gradient: Bytes) -> None:
        """Put a gradient, the whole flat buffer, into a ticket's slot.

        Raises:
          HeadwaterError: There is no such slot.
        """
        if number not in self._slots:
            raise HeadwaterError(f"the ticket has slot {number}: none that the server shared")
        copy([(self._slots[number], gradient)])

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self._splitter.close()

    def _read(self) -> None:
        try:
            found = self._splitter.read(self._socket)
        except BlockingIOError:
            return
        except OSError:
            found = None  # as at its end
        if found is None:
            self._loop.remove_reader(self._socket)
            self._received.put_nowait(None)
            return
        for received in found:
            self._received.put_nowait(received)

    def _learn(self, message: pb.ServerMessage, descriptors: list[int]) -> None:
        for number in message.gone_slots:
            self._slots.pop(number, None)
        for number, descriptor in zip(message.new_slots, descriptors, strict=True):
            if number == message.ticket.gradient_slot:
                self._slots[number] = attach(descriptor, self._total_bytes, writable=True)
            else:
                os.close(descriptor)

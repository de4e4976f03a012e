"""Workers down to their protocol, many in one process: what is left is the server.

    python -m benchmarks.bare_worker ADDRESS --task NAME [--option NAME=VALUE] [--workers N]
                                     [--transport shm|grpc] [--compute-s S] [--warm-up N]
                                     [--seconds S]

Each takes tickets, waits `compute-s` in place of a gradient, and pushes tiny numbers: into
shared memory, as real workers on the server's machine do, or by gRPC, as those
elsewhere do. One asyncio loop, no JAX; weights are dropped. Nobody pushes before the
whole crew (crew.py) has joined: a server that is kept busy lets others in late. Begins
with the rest of the crew and prints, of those seconds, each worker's pushes, all round
trips, and their stalenesses.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import numpy as np

from benchmarks.bare_line import BareLine
from benchmarks.crew import wait_for_begin, wait_for_joined
from headwater.client.client import Client
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos import rpc
from headwater.protos.layout import Bytes
from headwater.protos.reading import Reader
from headwater.protos.shared_memory import IS_AVAILABLE
from headwater.protos.wire import PART_BYTES, frame, unframe

PROGRESS_S = 1.0

TRANSPORTS = ("shm", "grpc") if IS_AVAILABLE else ("grpc",)
"""Here; the first is what a real worker on the server's machine uses."""


class BareWorker:
    """One stream, on a connection of its own, and what was counted on it.

    Args:
      transport: One of TRANSPORTS. With "shm" it fails where the server offers none.
      may_push: Set once it may use its first ticket.
    """

    def __init__(
        self,
        address: str,
        hello: pb.Hello,
        transport: str,
        compute_s: float,
        gradient: Bytes,
        may_push: asyncio.Event,
    ) -> None:
        self._address = address
        self._hello = hello
        self._transport = transport
        self._compute_s = compute_s
        self._gradient = gradient
        self._may_push = may_push
        self.joined = asyncio.Event()
        """Set when it is ready. Not by its first ticket: an epoch may have too few for all."""
        self._line: BareLine | None = None
        self._pushed_time = 0.0
        self._steps = 0
        self._writing = asyncio.Lock()
        self.round_trips: list[tuple[float, float]] = []
        """When each ended, and how long it took: push, outcome, fresh weights, next ticket."""
        self.staleness: list[int] = []

    async def run(self) -> None:
        """Until the server ends the stream, or it is cancelled."""
        async with grpc.aio.insecure_channel(self._address, options=rpc.CHANNEL_OPTIONS) as channel:
            call = rpc.Stub(channel).Exchange()
            progress = asyncio.create_task(self._say_progress(call))
            try:
                await self._write(call, frame(pb.WorkerMessage(hello=self._hello)))
                async for message in self._messages(call):
                    await self._handle(call, message)
            finally:
                progress.cancel()
                if self._line is not None:
                    self._line.close()

    async def _messages(self, call: Any) -> AsyncIterator[pb.ServerMessage]:
        """What the server says, on the line once there is one; the stream tells how it ended."""
        async for data in call:
            message, _ = unframe(pb.ServerMessage, data)
            if message.HasField("welcome") and self._transport == "shm":
                self._line = await self._attached(message.welcome.same_host)
            yield message
            while self._line is not None and (said := await self._line.receive()) is not None:
                yield said

    async def _attached(self, offer: pb.SameHost) -> BareLine:
        line = BareLine(offer, self._gradient.nbytes)
        if await line.receive() is None:
            line.close()
            raise ConnectionError("the server hangs up on this worker's key")
        return line

    async def _handle(self, call: Any, message: pb.ServerMessage) -> None:
        if message.HasField("welcome"):
            await self._write(call, frame(pb.WorkerMessage(ready=pb.Ready())))
            self.joined.set()
        if message.HasField("outcome"):
            assert message.outcome.code == pb.OUTCOME_APPLIED, message.outcome
            self.staleness.append(message.outcome.staleness)
        if message.HasField("ticket"):
            now = time.perf_counter()
            if self._pushed_time:
                self.round_trips.append((now, now - self._pushed_time))
            await self._may_push.wait()
            await asyncio.sleep(self._compute_s)
            self._pushed_time = time.perf_counter()
            await self._push(call, message.ticket, message.stamp.incarnation)

    async def _push(self, call: Any, ticket: pb.Ticket, incarnation: int) -> None:
        push = pb.Push(token=ticket.token, base=ticket.base, incarnation=incarnation)
        if self._line is not None:
            self._line.write(ticket.gradient_slot, self._gradient)
            push.slot = ticket.gradient_slot
            await self._write(call, frame(pb.WorkerMessage(push=push)))
            self._steps += 1
            return
        whole = self._gradient.data
        for start in range(0, max(1, len(whole)), PART_BYTES):
            message = pb.WorkerMessage(push=push)
            if start:
                part = pb.PushPart(token=ticket.token, offset=start)
                message = pb.WorkerMessage(push_part=part)
            await self._write(call, frame(message, whole[start : start + PART_BYTES]))
            self._steps += 1

    async def _say_progress(self, call: Any) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            progress = pb.Progress(phase=pb.PHASE_COMPUTING, steps=self._steps)
            await self._write(call, frame(pb.WorkerMessage(progress=progress)))

    async def _write(self, call: Any, data: bytes) -> None:
        async with self._writing:  # grpc.aio takes one at a time, and so does a line
            if self._line is not None:
                await self._line.send(data)
            else:
                await call.write(data)


def hello(address: str, task: str, options: Sequence[str]) -> tuple[pb.Hello, int]:
    """What a worker of the server's task says, and a gradient's bytes; asks the server."""
    reader = Reader(address)
    with Client(address) as client:
        status = client.status()
    weights = reader.pull(pb.PullRequest()).weights
    reader.close()
    assert weights is not None
    said = pb.Hello(
        protocol=rpc.PROTOCOL,
        attempt=1,
        task=pb.TaskIdentity(
            name=task,
            options=dict(option.split("=", 1) for option in options),
            example_count=status["example_count"],
            batch_size=status["batch_size"],
        ),
        layout=weights.layout.to_proto(),
        host="here",
        platform="bare",
        devices=1,
    )
    return said, weights.layout.total_bytes


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    said, size = hello(arguments.address, arguments.task, arguments.option)
    may_push = asyncio.Event()
    workers = []
    for _ in range(arguments.workers):
        mine = pb.Hello()
        mine.CopyFrom(said)
        mine.instance = secrets.randbits(63) + 1
        gradient = np.ones(size, np.uint8)  # zeros would be one page, and in the cache
        words = arguments.address, mine, arguments.transport, arguments.compute_s
        workers.append(BareWorker(*words, gradient, may_push))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(worker.run()) for worker in workers]
        for worker in workers:
            await worker.joined.wait()
        await asyncio.to_thread(wait_for_joined)
        may_push.set()
        # Looked at now and then: an event would cost something at each push.
        while min(len(w.round_trips) for w in workers) < arguments.warm_up:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.to_thread(wait_for_begin)
        first = [len(worker.round_trips) for worker in workers]
        began, began_cpu = time.perf_counter(), time.process_time()
        await asyncio.sleep(arguments.seconds)
        seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
        done = [worker.round_trips[at:] for worker, at in zip(workers, first, strict=True)]
        for task in tasks:
            task.cancel()
    staleness = Counter(
        s for worker, at in zip(workers, first, strict=True) for s in worker.staleness[at:]
    )
    return {
        "seconds": seconds,
        "cpu_share": cpu / seconds,
        "pushes": [len(each) for each in done],
        "round_trips_s": [took for each in done for _, took in each],
        "staleness": dict(staleness),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--task", required=True)
    parser.add_argument("--option", action="append", default=[])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--transport", choices=TRANSPORTS, default=TRANSPORTS[0])
    parser.add_argument("--compute-s", type=float, default=0.0)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    print(json.dumps(asyncio.run(measure(parser.parse_args()))))


if __name__ == "__main__":
    main()

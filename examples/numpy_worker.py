"""A whole worker from the protocol alone: the .proto's generated code, grpcio and NumPy.

    headwater server --init w.safetensors --optimizer 'sgd(1.0)' --examples 1000 --batch-size 8
    python -m headwater.examples.numpy_worker 127.0.0.1:50051

The numbers are those of docs/protocol.md, "A worker from nothing". What it trains is
`gradient`, which counts how often each example was used: put your own there.
"""

import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np

from headwater.protos import parameter_server_pb2 as pb

Arrays = dict[str, np.ndarray]


def gradient(weights: Arrays, indices: np.ndarray) -> tuple[Arrays, float]:
    """Of the batch with these examples; and its loss, the mean over them."""
    time.sleep(float(os.environ.get("PAUSE_S", "0")))  # as if it took that long
    found = {name: np.zeros_like(array) for name, array in weights.items()}
    found["count"][indices] = -1
    return found, float(weights["count"].mean())


def parameters(layout: pb.Layout, buffer: np.ndarray) -> Arrays:
    """Where they lie in the flat buffer (2)."""
    found = {}
    for t in layout.tensors:
        if t.role == pb.ROLE_PARAMETER:
            size = int(np.prod(t.shape, dtype=int)) * np.dtype(t.dtype).itemsize
            found[t.name] = buffer[t.offset : t.offset + size].view(t.dtype).reshape(t.shape)
    return found


class Worker:
    """One process: it trains until bye, and connects again where the stream breaks."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address, [("grpc.keepalive_time_ms", 10_000)])
        ask = self.method("unary_unary", "GetStatus", pb.StatusRequest, pb.StatusReply)
        status = ask(pb.StatusRequest(), wait_for_ready=True, timeout=60)  # (1)
        task = pb.TaskIdentity(
            name=status.task, seed=status.seed,
            example_count=status.example_count, batch_size=status.batch_size,
        )  # fmt: skip
        pull = self.method("unary_stream", "Pull", pb.PullRequest, pb.PullReply)
        self.layout = next(pull(pb.PullRequest())).layout  # (2)
        self.hello = pb.Hello(
            protocol=1, instance=secrets.randbits(63) + 1, task=task, layout=self.layout,
            name="numpy", pid=os.getpid(), platform="cpu", devices=1,
        )  # fmt: skip
        self.pushes = 0

    def method(self, kind: str, name: str, request: Any, reply: Any) -> Any:
        return getattr(self.channel, kind)(
            f"/headwater.v1.ParameterServer/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=reply.FromString,
        )

    def run(self) -> pb.Bye:
        """Train to the end. No push is repeated: after a break all is asked anew (8)."""
        while True:
            self.hello.attempt += 1
            outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
            try:
                return self.stream(outgoing)
            except grpc.RpcError as error:
                call: Any = error
                reason = dict(call.trailing_metadata() or ()).get("headwater-reason")
                if reason not in (None, "SILENT", "SLOW_READER", "SERVER_ENDED"):
                    raise SystemExit(f"refused: {call.details()}") from None
            finally:
                outgoing.put(None)
            time.sleep(0.2)

    def stream(self, outgoing: "queue.SimpleQueue[Any]") -> pb.Bye:
        outgoing.put(pb.WorkerMessage(hello=self.hello))
        threading.Thread(target=self.be_heard, args=(outgoing,), daemon=True).start()
        exchange = self.method("stream_stream", "Exchange", pb.WorkerMessage, pb.ServerMessage)
        leased: dict[tuple[int, int], list[int]] = {}
        buffer, version = np.zeros(0, np.uint8), -1
        for message in exchange(iter(outgoing.get, None), wait_for_ready=True):
            if message.HasField("welcome"):  # (3)
                welcome = message.welcome
                self.hello.run_id = welcome.run_id
                self.hello.seen_incarnation = message.stamp.incarnation
                how = welcome.compression, welcome.pull_dtype, welcome.local_steps
                if how != ("none", "own", 1):
                    raise SystemExit(f"this worker cannot train with {how}")
                outgoing.put(pb.WorkerMessage(ready=pb.Ready()))
            if message.HasField("outcome") and message.outcome.code != pb.OUTCOME_APPLIED:
                print(message.outcome, flush=True)
            if message.HasField("weights"):  # (4)
                part, body = message.weights, np.frombuffer(message.body, np.uint8)
                if part.offset == 0:
                    buffer, version = np.zeros(part.total_bytes, np.uint8), part.version
                buffer[part.offset : part.offset + len(body)] = body
            for batch in message.lease.granted:  # (5)
                leased[batch.id.epoch, batch.id.number] = list(batch.indices)
            for gone in message.lease.withdrawn:
                leased.pop((gone.epoch, gone.number), None)
            if message.HasField("bye"):
                return message.bye
            if message.HasField("ticket"):  # (6)
                assert message.ticket.base == version
                (batch_id,) = message.ticket.batches
                indices = np.array(leased.pop((batch_id.epoch, batch_id.number)))
                for out in self.push(message, buffer, indices, welcome.max_part_bytes):
                    outgoing.put(out)
        raise SystemExit("no bye")

    def push(
        self, message: pb.ServerMessage, buffer: np.ndarray, indices: np.ndarray, size: int
    ) -> Iterator[pb.WorkerMessage]:
        """The gradient and, as it was, the state behind it, in parts (7)."""
        found, loss = gradient(parameters(self.layout, buffer), indices)
        for name, place in parameters(self.layout, whole := buffer.copy()).items():
            place[...] = found[name]
        data, ticket = whole.tobytes(), message.ticket
        push = pb.Push(token=ticket.token, base=ticket.base, loss=loss)
        push.incarnation = message.stamp.incarnation
        yield pb.WorkerMessage(push=push, body=data[:size])
        for at in range(size, len(data), size):
            part = pb.PushPart(token=ticket.token, offset=at)
            yield pb.WorkerMessage(push_part=part, body=data[at : at + size])
        self.pushes += 1

    def be_heard(self, outgoing: "queue.SimpleQueue[Any]") -> None:
        """Every two seconds, whatever else goes on; `steps` tells work from a standstill (9)."""
        attempt = self.hello.attempt
        while self.hello.attempt == attempt:
            progress = pb.Progress(phase=pb.PHASE_COMPUTING, steps=self.pushes)
            outgoing.put(pb.WorkerMessage(progress=progress))
            time.sleep(2.0)


if __name__ == "__main__":
    print(pb.ByeReason.Name(Worker(sys.argv[1]).run().reason))

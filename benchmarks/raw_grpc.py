"""What gRPC in Python carries on this machine with nothing of ours around it.

A grpc.aio server in a process of its own, Headwater's own channel settings, raw
bytes in and out. Prints bytes per second of streams of 1 MiB messages, one way,
the other, and up then down as a push and a pull; and seconds of small echoes.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from headwater.protos.rpc import CHANNEL_OPTIONS, SERVER_OPTIONS

PART = bytes(1 << 20)
PARTS = 40
"""Of one stream: about the weights of 10 M float32 parameters."""
STREAMS = 10
ECHOES = 500
WARM_UP = 2


async def up(requests: AsyncIterator[bytes], context: Any) -> bytes:
    async for _ in requests:
        pass
    return b""


async def down(request: bytes, context: Any) -> AsyncIterator[bytes]:
    for _ in range(PARTS):
        yield PART


async def exchange(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    """For every stream's worth that came, one back."""
    count = 0
    async for _ in requests:
        count += 1
        if count % PARTS == 0:
            for _ in range(PARTS):
                yield PART


async def echo(request: bytes, context: Any) -> bytes:
    return request


async def serve() -> None:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    table: dict[str, Any] = {
        "up": grpc.stream_unary_rpc_method_handler(up),
        "down": grpc.unary_stream_rpc_method_handler(down),
        "exchange": grpc.stream_stream_rpc_method_handler(exchange),
        "echo": grpc.unary_unary_rpc_method_handler(echo),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("raw", table),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


async def measure(port: int) -> dict[str, float]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        call_up: Any = channel.stream_unary("/raw/up")
        call_down: Any = channel.unary_stream("/raw/down")
        call_echo: Any = channel.unary_unary("/raw/echo")
        size = PARTS * len(PART)

        async def one_up() -> None:
            call = call_up()
            for _ in range(PARTS):
                await call.write(PART)
            await call.done_writing()
            await call

        async def one_down() -> None:
            async for _ in call_down(b""):
                pass

        async def one_echo(message: bytes) -> None:
            await call_echo(message)

        stream: Any = channel.stream_stream("/raw/exchange")()

        async def one_exchange() -> None:
            for _ in range(PARTS):
                await stream.write(PART)
            for _ in range(PARTS):
                await stream.read()

        return {
            "up": size / await median_s(one_up, STREAMS),
            "down": size / await median_s(one_down, STREAMS),
            "exchange": 2 * size / await median_s(one_exchange, STREAMS),
            "echo_100": await median_s(lambda: one_echo(bytes(100)), ECHOES),
            "echo_40k": await median_s(lambda: one_echo(bytes(40_000)), ECHOES),
            "echo_200k": await median_s(lambda: one_echo(bytes(203_560)), ECHOES),
        }


async def median_s(call: Any, count: int) -> float:
    times = []
    for _ in range(WARM_UP + count):
        began = time.perf_counter()
        await call()
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM_UP:])


def main() -> None:
    if sys.argv[1:] == ["serve"]:
        return asyncio.run(serve())
    command = [sys.executable, __file__, "serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:  # noqa: S603
        assert server.stdout is not None
        try:
            found = asyncio.run(measure(int(server.stdout.readline())))
        finally:
            server.kill()
    return print(json.dumps(found))


if __name__ == "__main__":
    main()

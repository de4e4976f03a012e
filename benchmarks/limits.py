"""The part `limits`: what this machine, its sockets and gRPC could do at best, at this moment."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.crew import alone
from benchmarks.figures import Figures

MEMCPY = "memcpy of 40 MB"
EXCHANGE = "raw gRPC, 40 MiB up then down"
DOWN = "raw gRPC, 40 MiB down"
ECHO_SMALL = "raw gRPC, echo of 40 kB"
ECHOES_MNIST = "raw gRPC, echoes of 200 kB"

COPIES = 20


def measure(figures: Figures) -> None:
    figures.add(MEMCPY, "MB/s", memcpy())
    sockets = alone("benchmarks.raw_socket")
    figures.add("loopback TCP", "MB/s", sockets["tcp"] / 1e6)
    figures.add("Unix socket", "MB/s", sockets["unix"] / 1e6)
    raw = alone("benchmarks.raw_grpc")
    figures.add("raw gRPC, 40 MiB up", "MB/s", raw["up"] / 1e6, "loopback TCP")
    figures.add(DOWN, "MB/s", raw["down"] / 1e6, "loopback TCP")
    figures.add(EXCHANGE, "MB/s", raw["exchange"] / 1e6, "loopback TCP")
    figures.add("raw gRPC, echo of 100 B", "ms", raw["echo_100"] * 1e3)
    figures.add(ECHO_SMALL, "ms", raw["echo_40k"] * 1e3)
    figures.add("raw gRPC, echo of 200 kB", "ms", raw["echo_200k"] * 1e3)
    figures.add(ECHOES_MNIST, "updates/s", 1 / raw["echo_200k"])


def memcpy() -> float:
    """MB/s that one thread copies: bytes copied, counted once."""
    source, target = np.ones(10_000_000, np.float32), np.zeros(10_000_000, np.float32)
    np.copyto(target, source)  # touches its pages
    began = time.perf_counter()
    for _ in range(COPIES):
        np.copyto(target, source)
    return COPIES * source.nbytes / 1e6 / (time.perf_counter() - began)

"""The part `capacity`: how many workers one server feeds, each with a gradient of 20 ms.

A stand-in for workers whose accelerators are elsewhere, hence by gRPC: they only wait
(bare_worker.py), so that they leave the cores to the server as far as they can. Some
numbers of them also by shared memory, as if the accelerators were in the server's
machine. All are in two processes, one where there is one worker. Model and optimizer
are those of mnist.
"""

from __future__ import annotations

import time

import psutil

from benchmarks.bare_worker import TRANSPORTS
from benchmarks.crew import together
from benchmarks.figures import Figures
from benchmarks.serving import ENDLESS, MNIST, training

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128)
BY_EACH_TRANSPORT = (32, 128)
COMPUTE_S = 0.02
WINDOW_S = 2.5
WORKERS_PER_S = 20
"""The window is longer for many: with two pushes each, slowest / mean says little."""
PROCESSES = 2


def measure(figures: Figures) -> None:
    with training(MNIST, 0, *ENDLESS) as (client, child):
        server = psutil.Process(child.process.pid)
        for workers in WORKERS:
            figures.add(ideal(workers), "updates/s", workers / COMPUTE_S)
            one(figures, client.address, server, workers, "grpc")
            if workers in BY_EACH_TRANSPORT and "shm" in TRANSPORTS:
                one(figures, client.address, server, workers, "shm")


def one(
    figures: Figures, address: str, server: psutil.Process, workers: int, transport: str
) -> None:
    words = [address, "--task", "mnist", "--compute-s", str(COMPUTE_S)]
    words += ["--transport", transport]
    words += ["--seconds", str(max(WINDOW_S, workers / WORKERS_PER_S)), "--warm-up", "10"]
    crews = [workers // PROCESSES + (n < workers % PROCESSES) for n in range(PROCESSES)]
    commands = [["benchmarks.bare_worker", *words, f"--workers={n}"] for n in crews if n]
    before = [0.0, 0.0]

    def begin() -> None:
        before[:] = [time.perf_counter(), busy_s(server)]

    found = together(commands, begin)
    cpu = (busy_s(server) - before[1]) / (time.perf_counter() - before[0])
    pushes = [count for each in found for count in each["pushes"]]
    stale = [(int(s), n) for each in found for s, n in each["staleness"].items()]
    seconds = max(each["seconds"] for each in found)
    name = named(workers, transport)
    rate = sum(pushes) / seconds
    figures.add(updates(workers, transport), "updates/s", rate, ideal(workers))
    figures.add(server_cpu(workers, transport), "% core", 100 * cpu)
    figures.add(f"{name}: workers' CPU", "% core", sum(100 * each["cpu_share"] for each in found))
    mean = sum(s * n for s, n in stale) / max(1, sum(n for _, n in stale))
    figures.add(f"{name}: mean staleness", "updates", mean)
    figures.add(f"{name}: slowest / mean", "share", min(pushes) * workers / max(1, sum(pushes)))


def busy_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def named(workers: int, transport: str) -> str:
    """By gRPC, where none is named."""
    return f"20 ms workers, {workers:3}" + ("" if transport == "grpc" else f", {transport}")


def ideal(workers: int) -> str:
    return f"{named(workers, 'grpc')}: if all else were free"


def updates(workers: int, transport: str = "grpc") -> str:
    return f"{named(workers, transport)}: updates"


def server_cpu(workers: int, transport: str = "grpc") -> str:
    return f"{named(workers, transport)}: server's CPU"

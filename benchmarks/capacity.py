"""The part `capacity`: how many workers one server feeds, each with a gradient of 20 ms.

A stand-in for workers whose accelerators are elsewhere: they only wait
(bare_worker.py), so that they leave the cores to the server as far as they can.
All are in two processes, one where there is one worker. Model and optimizer are
those of mnist.
"""

from __future__ import annotations

import time

import psutil

from benchmarks.crew import together
from benchmarks.figures import Figures
from benchmarks.serving import ENDLESS, MNIST, training

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128)
COMPUTE_S = 0.02
WINDOW_S = 2.5
PROCESSES = 2


def measure(figures: Figures) -> None:
    with training(MNIST, 0, *ENDLESS) as (client, child):
        server = psutil.Process(child.process.pid)
        for workers in WORKERS:
            one(figures, client.address, server, workers)


def one(figures: Figures, address: str, server: psutil.Process, workers: int) -> None:
    words = [address, "--task", "mnist", "--compute-s", str(COMPUTE_S)]
    words += ["--seconds", str(WINDOW_S), "--warm-up", "10"]
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
    name = f"20 ms workers, {workers:3}"
    limit = ideal(workers)
    figures.add(limit, "updates/s", workers / COMPUTE_S)
    figures.add(updates(workers), "updates/s", sum(pushes) / seconds, limit)
    figures.add(server_cpu(workers), "% core", 100 * cpu)
    figures.add(f"{name}: workers' CPU", "% core", sum(100 * each["cpu_share"] for each in found))
    mean = sum(s * n for s, n in stale) / max(1, sum(n for _, n in stale))
    figures.add(f"{name}: mean staleness", "updates", mean)
    figures.add(f"{name}: slowest / mean", "share", min(pushes) * workers / max(1, sum(pushes)))


def busy_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def ideal(workers: int) -> str:
    return f"20 ms workers, {workers:3}: if all else were free"


def updates(workers: int) -> str:
    return f"20 ms workers, {workers:3}: updates"


def server_cpu(workers: int) -> str:
    return f"20 ms workers, {workers:3}: server's CPU"

"""The parts `durability` and `recovery`: what --durability log costs, and what a crash does."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figures
from benchmarks.serving import (
    ENDLESS,
    LARGE,
    MNIST,
    training,
    until,
    updates_per_second,
    warm,
)
from headwater.client.client import Client
from headwater.client.processes import Child, free_address, kill_all

WINDOW_S = 5.0
DISK = "disk, 40 MB writes + fsync"


def measure(figures: Figures) -> None:
    figures.add(DISK, "updates/s", disk())
    for level in ("snapshot", "log"):
        options = (*ENDLESS, "--durability", level)
        with training(MNIST, 2, *options) as (client, _):
            warm(client, 2, 50)
            rate = updates_per_second(client, WINDOW_S)
        figures.add(f"mnist, 2 workers, {level}", "updates/s", rate)
        with training(LARGE, 1, *options) as (client, _):
            warm(client, 1, 5)
            rate = updates_per_second(client, WINDOW_S)
        limit = DISK if level == "log" else ""
        figures.add(f"10 M, sgd, 1 worker, {level}", "updates/s", rate, limit)


def disk() -> float:
    """Gradients of 40 MB a second that the disk keeps."""
    data, count = os.urandom(40_000_000), 10
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        for number in range(count):
            with (Path(folder) / str(number)).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        return count / (time.perf_counter() - began)


def measure_recovery(figures: Figures) -> None:
    """From the start of a killed server to its first answer, with about 400 updates in the log."""
    for level in ("snapshot", "log"):
        with tempfile.TemporaryDirectory() as folder:
            listen = free_address("127.0.0.1")
            words = ["--task", MNIST, "--run-dir", folder, "--listen", listen]
            words += ["--durability", level, *ENDLESS]
            children = [Child("server", "server", words, tells_ready=True)]
            try:
                children.append(Child("worker", "worker", ["--task", MNIST, "--server", listen]))
                children[0].ready()
                with Client(listen) as client:
                    until(lambda: client.status()["version"] > 400, "400 updates")
                children[0].send(signal.SIGKILL)
                children[0].process.wait()
                began = time.perf_counter()
                children.append(Child("server", "server", words, tells_ready=True))
                children[-1].ready()
                figures.add(f"recovery at {level}", "s", time.perf_counter() - began)
            finally:
                kill_all(children)
                for child in children:
                    child.close()

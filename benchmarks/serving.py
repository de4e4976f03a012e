"""Servers and workers to measure, as `headwater run` starts them."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from headwater.client.client import Client
from headwater.client.processes import Child, core_count, free_address, kill_all

HERE = Path(__file__).parent
MNIST = "headwater.examples.mnist"
LARGE = str(HERE / "large.py")

SERVED_EPOCHS = 1000
"""Never reached: the clock ends what is measured."""
ENDLESS = ("--epochs", str(SERVED_EPOCHS))
TIMEOUT_S = 180.0


@contextlib.contextmanager
def training(
    task: str,
    workers: int,
    *options: str,
    task_options: Sequence[str] = (),
    worker_environment: Callable[[int], Mapping[str, str]] = lambda number: {},
) -> Iterator[tuple[Client, Child]]:
    """A server and workers as `headwater run` starts them; a client, and the server's process."""
    share = {"NPROC": str(max(1, core_count() // (workers + 1)))}
    address = free_address("127.0.0.1")
    words = ["--task", task, *(f"--task-option={option}" for option in task_options)]
    with tempfile.TemporaryDirectory() as folder:
        run_dir = ["--run-dir", folder, "--listen", address]
        server = Child(
            "server", "server", [*words, *run_dir, *options], environment=share, tells_ready=True
        )
        children = [server]
        try:
            children += [
                Child(
                    f"worker-{n}",
                    "worker",
                    [*words, "--server", address],
                    environment={**share, **worker_environment(n)},
                )
                for n in range(workers)
            ]
            if server.ready() is None:
                sys.exit(server.last_words())
            with Client(address) as client:
                yield client, server
        finally:
            # Without a farewell: the last snapshot of a large model takes seconds.
            kill_all(children)
            for child in children:
                child.close()


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for it; ends the benchmark where it takes longer than TIMEOUT_S."""
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"not within {TIMEOUT_S:.0f} s: {what}")
        time.sleep(0.02)


def warm(client: Client, workers: int, least: int) -> None:
    """Wait until every worker has had `least` gradients applied."""

    def all_have() -> bool:
        counts = [worker["gradients"] for worker in client.status()["workers"]]
        return len(counts) == workers and min(counts) >= least

    until(all_have, f"{workers} workers with {least} gradients each")


def updates_per_second(client: Client, window_s: float, least: int = 1) -> float:
    """From one update to another, over at least `window_s` seconds and `least` updates."""

    def tick() -> tuple[float, int]:
        """When a version was first seen, and which."""
        last = client.status()["version"]
        while (version := client.status()["version"]) == last:
            time.sleep(0.005)
        return time.perf_counter(), version

    began, first = tick()
    now, version = began, first
    while now - began < window_s or version - first < least:
        time.sleep(min(window_s, max(0.0, began + window_s - time.perf_counter())))
        now, version = tick()
    return (version - first) / (now - began)

"""The parts `memory` and `huge-memory`: what the server holds, beside what it must.

What it must: twice the parameters (weights, and one gradient) and the optimizer's
state, which is Adam's, twice more.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import psutil

from benchmarks.figures import Figures
from benchmarks.serving import ENDLESS, LARGE, training, until
from benchmarks.transfer import SIZES

UPDATES = 20
LOOK_EVERY_S = 0.005


def measure(figures: Figures) -> None:
    with training(LARGE, 0, task_options=["parameters=10000"]) as (_, child):
        resident = psutil.Process(child.process.pid).memory_info().rss
        figures.add("10 k, server's memory, at start", "MB", resident / 1e6)
    one(figures, "10 M")


def measure_huge(figures: Figures) -> None:
    one(figures, "100 M")


def one(figures: Figures, size: str) -> None:
    options = [f"parameters={SIZES[size]}", "optimizer=adam"]
    must = 4 * 4 * SIZES[size]
    # No snapshot but the first, and the one that is asked for.
    quiet = ("--snapshot-every", "1000000", *ENDLESS)
    with training(LARGE, 1, *quiet, task_options=options) as (client, child):
        server = psutil.Process(child.process.pid)
        name = f"{size}, adam, server's memory"
        with peak(server) as highest:
            figures.add(f"{name}, at start", "of need", server.memory_info().rss / must)
            until(lambda: client.status()["version"] >= UPDATES, f"{UPDATES} updates")
            figures.add(f"{name}, {UPDATES} updates", "of need", server.memory_info().rss / must)
        figures.add(f"{name}, peak till then", "of need", highest[0] / must)
        with peak(server) as highest:
            client.snapshot()
        figures.add(f"{name}, peak in snapshot", "of need", highest[0] / must)


@contextlib.contextmanager
def peak(process: psutil.Process) -> Iterator[list[int]]:
    """A list of one number: the most resident bytes that were seen within."""
    highest, over = [process.memory_info().rss], threading.Event()

    def look() -> None:
        while not over.wait(LOOK_EVERY_S):
            highest[0] = max(highest[0], process.memory_info().rss)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        yield highest
    finally:
        over.set()
        looker.join()

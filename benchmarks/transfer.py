"""The parts `transfer` and `huge`: round trips of models whose gradient costs nothing.

A round trip is a gradient pushed, the update, and the weights pulled: twice the
model's bytes. The workers are Headwater's own.
"""

from __future__ import annotations

from benchmarks.figures import Figures
from benchmarks.limits import EXCHANGE
from benchmarks.serving import ENDLESS, LARGE, training, updates_per_second, warm

WINDOW_S = 2.0
SIZES = {"10 k": 10_000, "1 M": 1_000_000, "10 M": 10_000_000, "100 M": 100_000_000}


def measure(figures: Figures) -> None:
    for size in ("10 k", "1 M", "10 M"):
        for workers, optimizer in ((1, "sgd"), (2, "sgd"), (1, "adam"), (2, "adam")):
            one(figures, size, workers, optimizer)


def measure_huge(figures: Figures) -> None:
    one(figures, "100 M", 1, "sgd")


def one(figures: Figures, size: str, workers: int, optimizer: str) -> None:
    parameters = SIZES[size]
    options = [f"parameters={parameters}", f"optimizer={optimizer}"]
    with training(LARGE, workers, *ENDLESS, task_options=options) as (client, _):
        warm(client, workers, 3)
        rate = updates_per_second(client, WINDOW_S, 3)
    name = name_of(size, workers, optimizer)
    figures.add(f"{name}, round trips", "1/s", rate)
    figures.add(name, "MB/s", rate * 2 * 4 * parameters / 1e6, EXCHANGE)


def name_of(size: str, workers: int, optimizer: str) -> str:
    """Of its figure in MB/s, which the plot asks for."""
    return f"{size}, {optimizer}, {workers} worker{'s' * (workers > 1)}"

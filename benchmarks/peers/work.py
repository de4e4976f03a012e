"""The work that all peers do, and how it is timed. Needs NumPy alone.

updates      784 -> 64 -> 10, batch 32, Adam(1e-3), two workers, each on its own: take the
             weights, compute a gradient, push it. One call does the last and the next first.
round trips  a gradient of ones pushed, SGD(1e-3), all weights back; one worker, ten tensors
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

BATCH_SIZE = 32
LEARNING_RATE = 1e-3
SHAPES = ((784, 64), (64,), (64, 10), (10,))
"""50,890 parameters."""
TENSORS = 10
WARM_UP = 50
WINDOW_S = 4.0
ROUND_TRIPS = {10_000: 500, 10_000_000: 20, 100_000_000: 5}
"""How many are timed, by the number of parameters."""


def digits() -> tuple[np.ndarray, np.ndarray]:
    """As many images as the sample of Headwater's example has; noise, which takes as long."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (4000, 784), dtype=np.uint8)
    return images, generator.integers(0, 10, 4000)


def initial_weights() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [
        (generator.normal(size=shape) * (2 / shape[0]) ** 0.5 * (len(shape) > 1)).astype(np.float32)
        for shape in SHAPES
    ]


def size_arguments() -> list[int]:
    """The command line's sizes of round trips."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=list(ROUND_TRIPS))
    return parser.parse_args().sizes


def window(count: Callable[[], int]) -> float:
    """Updates per second by a counter of updates, once it is past the warm-up of both workers."""
    while count() < 4 * WARM_UP:
        time.sleep(0.01)
    began, first = time.perf_counter(), count()
    time.sleep(WINDOW_S)
    return (count() - first) / (time.perf_counter() - began)


def median_s(call: Callable[[], object], parameters: int) -> float:
    """Seconds of one round trip of so many parameters."""
    times = []
    for _ in range(2 + ROUND_TRIPS[parameters]):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times[2:]))


def report(updates_per_s: dict[str, float], round_trip_s: dict[str, dict[int, float]]) -> None:
    """Print the JSON line; both by variant."""
    print(json.dumps({"updates_per_s": updates_per_s, "round_trip_s": round_trip_s}), flush=True)

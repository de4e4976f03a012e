"""The part `latency`: one small round trip, and how long the event loop is away.

The worker is down to its protocol (bare_worker.py), and speaks by each transport. What
a status takes while a large model is pushed, by gRPC, is the loop's lag as anyone
outside can see it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from benchmarks.bare_worker import TRANSPORTS
from benchmarks.crew import together
from benchmarks.figures import Figures
from benchmarks.limits import ECHO_SMALL
from benchmarks.serving import ENDLESS, LARGE, training
from headwater.client.client import Client

WINDOW_S = 3.0
ASK_EVERY_S = 0.005
UNLOADED_COUNT = 200


def measure(figures: Figures) -> None:
    options = ["parameters=10000", "optimizer=sgd"]
    with training(LARGE, 0, *ENDLESS, task_options=options) as (client, _):
        words = [client.address, "--task", "large", *(f"--option={option}" for option in options)]
        words += ["--warm-up", "50", "--seconds", str(WINDOW_S)]
        for transport in TRANSPORTS:
            (found,) = together([["benchmarks.bare_worker", *words, f"--transport={transport}"]])
            times = found["round_trips_s"]
            name = f"10 k, sgd, one bare worker, {transport}"
            figures.add(f"{name}, p50", "ms", quantile(times, 50), ECHO_SMALL)
            figures.add(f"{name}, p99", "ms", quantile(times, 99), ECHO_SMALL)
        times = ask(client, UNLOADED_COUNT)
        figures.add("GetStatus of an idle server, p50", "ms", quantile(times, 50))
        figures.add("GetStatus of an idle server, p99", "ms", quantile(times, 99))
    options = ["parameters=10000000", "optimizer=sgd"]
    with training(LARGE, 0, *ENDLESS, task_options=options) as (client, _):
        words = [client.address, "--task", "large", *(f"--option={option}" for option in options)]
        words += ["--transport", "grpc", "--seconds", "0.1"]
        asked: list[float] = []

        def begin() -> None:
            asked.extend(ask(client, UNLOADED_COUNT))

        # Warm, and already pushing, when it is said to begin.
        together([["benchmarks.bare_worker", *words]], begin)
        figures.add("GetStatus while 40 MB are pushed, p50", "ms", quantile(asked, 50))
        figures.add("GetStatus while 40 MB are pushed, p99", "ms", quantile(asked, 99))


def ask(client: Client, count: int) -> list[float]:
    """Seconds of each of `count` statuses, a moment apart."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        client.status()
        times.append(time.perf_counter() - began)
        time.sleep(ASK_EVERY_S)
    return times


def quantile(times_s: Sequence[float], percent: int) -> float:
    """In ms."""
    return statistics.quantiles(times_s, n=100, method="inclusive")[percent - 1] * 1e3

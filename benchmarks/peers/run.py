"""Measures the same work by Headwater and by others, in turns: `make bench-peers`.

    python -m benchmarks.peers.run [torch] [ray] [tensorflow] --folder build/peers
                                   [--repeats 3] [--sizes N ...] [--json FILE]

What the work is says work.py; how each does it, its script. A peer runs in the
virtual environment of its name in the folder. Headwater's round trips are those of
a worker that pushes a gradient that is there, as the peers' do, and beside them
those of its own worker, which has JAX compute it. The table's last column is the
figure over Headwater's of the same run: above 1, the peer is faster (or, in ms,
slower).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.crew import together
from benchmarks.figures import Figures
from benchmarks.latency import quantile
from benchmarks.peers.work import ROUND_TRIPS, WINDOW_S
from benchmarks.serving import ENDLESS, LARGE, MNIST, training, updates_per_second, warm

SCRIPTS = {"torch": "torch_rpc", "ray": "ray_actor", "tensorflow": "tensorflow_ps"}
SMALL = min(ROUND_TRIPS)
WARM_UPS = {size: min(50, count) for size, count in ROUND_TRIPS.items()}

# Each process its share of two cores, as `headwater run` has it.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "RAY_DEDUP_LOGS": "0"}


def updates_name(who: str) -> str:
    return f"mnist, 2 workers: {who}"


def round_trip_name(size: int, who: str) -> str:
    return f"{size // 1000:,} k, sgd: {who}"


def measure_headwater(figures: Figures, sizes: Iterable[int]) -> None:
    with training(MNIST, 2, *ENDLESS) as (client, _):
        warm(client, 2, 50)
        rate = updates_per_second(client, WINDOW_S)
    figures.add(updates_name("Headwater"), "updates/s", rate)
    for size in sizes:
        options = [f"parameters={size}", "optimizer=sgd"]
        with training(LARGE, 0, *ENDLESS, task_options=options) as (client, _):
            words = [client.address, "--task", "large", "--warm-up", str(WARM_UPS[size])]
            words += [f"--option={option}" for option in options]
            (found,) = together([["benchmarks.bare_worker", *words]])
        add(figures, size, "Headwater", quantile(found["round_trips_s"], 50) / 1e3)
        if size == SMALL:
            continue
        with training(LARGE, 1, *ENDLESS, task_options=options) as (client, _):
            warm(client, 1, 3)
            rate = updates_per_second(client, WINDOW_S, ROUND_TRIPS[size])
        add(figures, size, "Headwater, gradient by JAX", 1 / rate)


def measure_peer(figures: Figures, peer: str, folder: Path, sizes: Iterable[int]) -> None:
    python = folder.absolute() / peer / "bin" / "python"
    command = [str(python), "-m", f"benchmarks.peers.{SCRIPTS[peer]}", "--sizes"]
    done = subprocess.run(  # noqa: S603  (our own script)
        [*command, *map(str, sizes)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{peer} failed: {done.stderr[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for variant, rate in found["updates_per_s"].items():
        figures.add(
            updates_name(f"{peer} ({variant})"), "updates/s", rate, updates_name("Headwater")
        )
    for variant, trips in found["round_trip_s"].items():
        for size, seconds in trips.items():
            add(figures, int(size), f"{peer} ({variant})", seconds)


def add(figures: Figures, size: int, who: str, seconds: float) -> None:
    """One round trip: in ms where it is small, else as a rate."""
    unit, value = ("ms", seconds * 1e3) if size == SMALL else ("1/s", 1 / seconds)
    limit = "" if who == "Headwater" else round_trip_name(size, "Headwater")
    figures.add(round_trip_name(size, who), unit, value, limit)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="*", choices=[[], *SCRIPTS])
    parser.add_argument("--folder", type=Path, default=Path("build/peers"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(ROUND_TRIPS))
    parser.add_argument("--json", type=Path, help="keep every figure here")
    arguments = parser.parse_args()
    figures = Figures()
    for turn in range(arguments.repeats):
        measure_headwater(figures, arguments.sizes)
        for peer in arguments.peers or SCRIPTS:
            print(f"{turn + 1}/{arguments.repeats} {peer}", file=sys.stderr)
            measure_peer(figures, peer, arguments.folder, arguments.sizes)
    print("\n".join(figures.table()))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures.as_json(), indent=2) + "\n")


if __name__ == "__main__":
    main()

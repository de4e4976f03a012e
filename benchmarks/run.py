"""Measures Headwater on this machine: `make bench`, or parts of it by name.

    python benchmarks/run.py [updates] [start] [status] [transfer] [durability] [recovery]
                             [--repeats 5] [--json FILE]

updates    updates per second of the mnist task with 1, 2 and 4 workers, each
           beside the plain single-process loop on the same batches
start      seconds from `headwater run` to the first applied gradient
status     seconds that `headwater status --json` takes, the whole process
transfer   megabytes per second pushed and pulled, of a model of 40 MB
durability updates per second of both models at --durability snapshot and log,
           beside the megabytes per second that the disk writes and fsyncs
recovery   seconds from the start of a killed server to its first answer

Every figure is the median of the repeats, which take turns with what they are
compared with. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from headwater.client.client import Client
from headwater.client.processes import Child, core_count, free_address, kill_all, wait_all
from headwater.protos.errors import HeadwaterError

HERE = Path(__file__).parent
MNIST = "headwater.examples.mnist"

PLAIN_EPOCHS = 40
SERVED_EPOCHS = 1000  # never reached: the clock ends it
WINDOW_S = 5.0
TIMEOUT_S = 120.0

Figures = dict[str, list[float]]


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
            server.send(signal.SIGTERM)
            wait_all(children, 10.0)
        finally:
            kill_all(children)
            for child in children:
                child.close()


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"not within {TIMEOUT_S:.0f} s: {what}")
        time.sleep(0.02)


def updates_per_second(task: str, workers: int, least: int, *options: str) -> float:
    """Over WINDOW_S seconds, once every worker has had `least` gradients applied."""
    with training(task, workers, *options) as (client, _):

        def warm() -> bool:
            counts = [worker["gradients"] for worker in client.status()["workers"]]
            return len(counts) == workers and min(counts) >= least

        until(warm, f"{workers} workers with {least} gradients each")
        began, first = time.perf_counter(), client.status()["version"]
        time.sleep(WINDOW_S)
        last, seconds = client.status()["version"], time.perf_counter() - began
        return float(last - first) / seconds


def plain_updates_per_second() -> float:
    command = [sys.executable, str(HERE / "plain_loop.py"), str(PLAIN_EPOCHS)]
    return float(subprocess.check_output(command, text=True))  # noqa: S603  (our own script)


def measure_updates(figures: Figures) -> None:
    figures.setdefault("plain loop, updates/s", []).append(plain_updates_per_second())
    for workers in (1, 2, 4):
        rate = updates_per_second(MNIST, workers, 50, "--epochs", str(SERVED_EPOCHS))
        figures.setdefault(f"{workers} worker(s), updates/s", []).append(rate)


def measure_start(figures: Figures) -> None:
    """From `headwater run` to version 1, asked every 10 ms by a process that is not in the way."""
    address = free_address("127.0.0.1")
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(Path(sys.executable).parent / "headwater"),
            "run", "--task", MNIST, "--workers", "2", "--listen", address, "--run-dir", folder,
        ]  # fmt: skip
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603
        try:
            with Client(address) as client:

                def first() -> bool:
                    with contextlib.suppress(HeadwaterError):
                        return bool(client.status()["version"])
                    return False

                until(first, "the first gradient")
            figures.setdefault("first gradient, s", []).append(time.perf_counter() - began)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def measure_status(figures: Figures) -> None:
    with training(MNIST, 0) as (client, _):
        command = [
            str(Path(sys.executable).parent / "headwater"),
            "status", "--json", "--server", client.address,
        ]  # fmt: skip
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
            figures.setdefault("headwater status --json, s", []).append(time.perf_counter() - began)


def measure_transfer(figures: Figures) -> None:
    task = str(HERE / "large.py")
    rate = updates_per_second(task, 1, 5, "--epochs", str(SERVED_EPOCHS))
    figures.setdefault("40 MB model, round trips/s", []).append(rate)
    figures.setdefault("40 MB model, MB/s pushed + pulled", []).append(rate * 80)


def measure_durability(figures: Figures) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, count = os.urandom(40_000_000), 10
        began = time.perf_counter()
        for number in range(count):
            with (Path(folder) / str(number)).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        rate = count * len(data) / 1e6 / (time.perf_counter() - began)
        figures.setdefault("disk, 40 MB writes + fsync, MB/s", []).append(rate)
    for level in ("snapshot", "log"):
        options = ("--epochs", str(SERVED_EPOCHS), "--durability", level)
        rate = updates_per_second(MNIST, 2, 50, *options)
        figures.setdefault(f"mnist, 2 workers, {level}, updates/s", []).append(rate)
        rate = updates_per_second(str(HERE / "large.py"), 1, 5, *options)
        figures.setdefault(f"40 MB model, {level}, updates/s", []).append(rate)


def measure_recovery(figures: Figures) -> None:
    """Of the mnist task, with about 400 updates in the log at level `log`."""
    for level in ("snapshot", "log"):
        with tempfile.TemporaryDirectory() as folder:
            listen = free_address("127.0.0.1")
            words = ["--task", MNIST, "--run-dir", folder, "--listen", listen]
            words += ["--durability", level, "--epochs", str(SERVED_EPOCHS)]
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
                seconds = time.perf_counter() - began
                figures.setdefault(f"recovery at {level}, s", []).append(seconds)
            finally:
                kill_all(children)
                for child in children:
                    child.close()


PARTS: dict[str, Callable[[Figures], None]] = {
    "updates": measure_updates,
    "start": measure_start,
    "status": measure_status,
    "transfer": measure_transfer,
    "durability": measure_durability,
    "recovery": measure_recovery,
}


def table(figures: Figures) -> str:
    rows = [f"{'':38}  median    min    max   runs"]
    for name, values in figures.items():
        median = statistics.median(values)
        digits = 2 if median < 100 else 0
        rows.append(
            f"{name:38}  {median:6.{digits}f} {min(values):6.{digits}f} "
            f"{max(values):6.{digits}f}  {len(values):5}"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure Headwater on this machine.")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="keep every figure here")
    arguments = parser.parse_args()
    figures: Figures = {}
    for turn in range(arguments.repeats):
        for part in arguments.parts or PARTS:
            print(f"\r{turn + 1}/{arguments.repeats} {part:10}", end="", file=sys.stderr)
            PARTS[part](figures)
    print("\r", end="", file=sys.stderr)
    print(table(figures))
    if arguments.json:
        kept: dict[str, Any] = {
            "machine": f"{os.cpu_count()} cores, {platform.platform()}",
            "figures": figures,
        }
        arguments.json.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()

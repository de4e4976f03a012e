"""The parts `start` and `status`: what a user waits for before anything moves."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figures
from benchmarks.serving import MNIST, training, until
from headwater.client.client import Client
from headwater.client.processes import free_address
from headwater.protos.errors import HeadwaterError

HEADWATER = str(Path(sys.executable).parent / "headwater")


def measure(figures: Figures) -> None:
    """From `headwater run` to version 1, asked every 20 ms by a process that is not in the way."""
    address = free_address("127.0.0.1")
    with tempfile.TemporaryDirectory() as folder:
        command = [HEADWATER, "run", "--task", MNIST, "--workers", "2"]
        command += ["--listen", address, "--run-dir", folder]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603  (our own)
        try:
            with Client(address) as client:

                def first() -> bool:
                    with contextlib.suppress(HeadwaterError):
                        return bool(client.status()["version"])
                    return False

                until(first, "the first gradient")
            seconds = time.perf_counter() - began
            figures.add("headwater run, to the first gradient", "s", seconds)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def measure_status(figures: Figures) -> None:
    with training(MNIST, 0) as (client, _):
        command = [HEADWATER, "status", "--json", "--server", client.address]
        for _ in range(3):
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603  (our own)
            seconds = time.perf_counter() - began
            figures.add("headwater status --json, whole process", "s", seconds)

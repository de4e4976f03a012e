"""A storm: one run under a random schedule of faults, and every invariant held to the end.

    python -m kit.storm --seed 7 --seconds 600 --durability log      (in tests/)

The same seed draws the same schedule. What the processes make of it still
depends on the machine, so a seed that failed may have to be run more than once.

Held to: every batch counts exactly once; what was durable, or at `log`
acknowledged, stays; the clock never goes back; reads are whole versions;
training goes on within 10 s of a fault's end; descriptors, threads and disk stay
bounded; no traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from headwater.client.client import Client
from headwater.server import failpoints
from kit import counting
from kit.disk import set_faults
from kit.lives import RECOVERY_S, TASK, Lives, Witness, descriptors, steady_workers
from kit.processes import Command, worker
from kit.proxy import Proxy
from kit.waiting import wait_for

BATCH = 4
BATCHES_PER_S = 250
"""More than the slowed workers get done, so that the storm ends before the run."""

MAX_DESCRIPTORS = 120
MAX_THREADS = 120
MAX_DISK_BYTES = 200_000_000


class Storm:
    """One run and its faults."""

    def __init__(self, folder: Path, seed: int, seconds: float, level: str) -> None:
        self._rng = random.Random(seed)  # noqa: S311  (moments, not secrets)
        self._folder = folder
        self._seconds = seconds
        self._level = level
        self._control = folder / "faults.json"
        self._slow = folder / "slow"
        self.faults: Counter[str] = Counter()
        self.slowest_recovery_s = 0.0

    def run(self) -> None:
        """Fails where an invariant does."""
        self._slow.touch()
        epochs = 1 + int(self._seconds * BATCHES_PER_S * BATCH / 1024)
        task = {"examples": 1024, "epochs": epochs, "batch_size": BATCH}
        bad = {"slow_while": str(self._slow), "load_s": 0.01, "faults": str(self._control)}
        server_options = [
            *("--durability", self._level, "--snapshot-every", "1s", "--grace", "5"),
            *("--session-timeout", "3", "--ticket-timeout", "2"),
        ]
        options = counting.options(**task, **bad)
        with Lives(self._folder, options, server_options) as lives, contextlib.ExitStack() as stack:
            self._lives = lives
            lives.start()
            self._network = stack.enter_context(Proxy(lives.address))
            self._witness = stack.enter_context(
                Witness(lives.address, BATCH, acknowledged_is_durable=self._level == "log")
            )
            self._steady = stack.enter_context(
                steady_workers(lives.address, self._witness, 2, 0.01, **task, **bad)
            )
            self._crew = [stack.enter_context(self._hire(options)) for _ in range(2)]
            self._options = options
            self._stack = stack
            self._blow()
            self._calm()

    def _hire(self, options: list[str]) -> contextlib.AbstractContextManager[Command]:
        transport = self._rng.choice(("grpc", "shm"))
        return worker(
            TASK, self._network.address, "--transport", transport, *options, cwd=self._folder
        )

    # ------------------------------------------------------------------ faults

    def _blow(self) -> None:
        end = time.monotonic() + self._seconds
        faults = [
            self._kill_server,
            self._kill_server,
            self._terminate_server,
            self._crash_server_at_a_place,
            self._stop_server,
            self._kill_worker,
            self._stop_worker,
            self._cut_network,
            self._freeze_network,
            self._slow_network,
            self._fill_disk,
            self._break_disk,
        ]
        self._wait_for_progress()
        while time.monotonic() < end:
            fault = self._rng.choice(faults)
            name = fault.__name__.removeprefix("_")
            self.faults[name] += 1
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            fault()
            self._wait_for_progress()
            self._look_at_resources()
            time.sleep(self._rng.uniform(0, 0.5))

    def _wait_for_progress(self) -> None:
        """Training goes on in time; a finished run has nowhere to go."""
        first = wait_for(self._lives.status, "the server answers", RECOVERY_S, self._state)
        wait_for(
            lambda: (
                (now := self._lives.status())
                and (now["version"] > first["version"] or now["state"] == "finished")
            ),
            "training goes on",
            RECOVERY_S,
            self._state,
        )

    def _restart(self) -> None:
        began = time.monotonic()
        self._lives.start()
        self._wait_for_progress()
        self.slowest_recovery_s = max(self.slowest_recovery_s, time.monotonic() - began)
        assert self.slowest_recovery_s < RECOVERY_S, self._state()

    def _kill_server(self) -> None:
        self._lives.kill()
        time.sleep(self._rng.uniform(0, 1))
        self._restart()

    def _terminate_server(self) -> None:
        assert self._lives.command is not None
        self._lives.command.send(signal.SIGTERM)
        assert self._lives.command.wait(10) == 0, self._lives.command.errors
        self._restart()
        for number, command in enumerate(self._crew):  # who was told so has gone
            if command.process.poll() == 0:
                self._crew[number] = self._stack.enter_context(self._hire(self._options))

    def _crash_server_at_a_place(self) -> None:
        """It may be killed before it serves."""
        place = self._rng.choice([p for p in failpoints.NAMES if not p.startswith("end")])
        self._lives.kill()
        count = self._rng.randint(1, 3)
        self._lives.start(wait=False, HEADWATER_FAILPOINTS=f"{place}={count}")
        assert self._lives.command is not None
        with contextlib.suppress(psutil.TimeoutExpired):
            psutil.Process(self._lives.command.process.pid).wait(4)
        self._lives.kill()
        self._restart()

    def _stop_server(self) -> None:
        assert self._lives.command is not None
        self._lives.command.send(signal.SIGSTOP)
        time.sleep(self._rng.uniform(0.5, 5))
        self._lives.command.send(signal.SIGCONT)

    def _kill_worker(self) -> None:
        number = self._rng.randrange(len(self._crew))
        self._crew[number].kill()
        self._crew[number] = self._stack.enter_context(self._hire(self._options))

    def _stop_worker(self) -> None:
        command = self._rng.choice(self._crew)
        command.send(signal.SIGSTOP)
        time.sleep(self._rng.uniform(0.5, 5))
        command.send(signal.SIGCONT)

    def _cut_network(self) -> None:
        self._network.cut_all(reset=self._rng.random() < 0.5)

    def _freeze_network(self) -> None:
        self._network.stalled = True
        time.sleep(self._rng.uniform(0.5, 5))
        self._network.stalled = False

    def _slow_network(self) -> None:
        self._network.bytes_per_s = 125_000.0  # 1 Mbit/s
        time.sleep(self._rng.uniform(0.5, 3))
        self._network.bytes_per_s = None

    def _fill_disk(self) -> None:
        room = self._rng.choice([0, 100, 10_000])
        set_faults(self._control, {"operation": "write", "error": "ENOSPC", "room": room})
        time.sleep(self._rng.uniform(0.2, 3))
        set_faults(self._control)

    def _break_disk(self) -> None:
        """At `log` the server ends by it, with 1."""
        operation = self._rng.choice(["write", "sync", "rename"])
        set_faults(self._control, {"operation": operation, "error": "EIO"})
        time.sleep(self._rng.uniform(0.2, 2))
        set_faults(self._control)
        command = self._lives.command
        assert command is not None
        if self._level == "log" and operation != "rename":
            # It was writing all the time; a moment for it to notice, and end.
            assert command.wait(15) == 1, command.errors
            self._restart()

    # ------------------------------------------------------------------ the end

    def _calm(self) -> None:
        self._slow.unlink()
        for steady in self._steady:
            steady.pause_s = 0.0
        self._lives.finished(60 + self._seconds)
        for steady in self._steady:
            steady.wait_bye()
        for command in self._crew:
            assert command.wait(30) == 0, command.errors
        with Client(self._lives.address) as client:
            counting.assert_exactly_once(client)
        assert not self._witness.broken, self._witness.broken
        said = self._lives.errors + "".join(command.errors for command in self._crew)
        assert "Traceback" not in said, said

    def _look_at_resources(self) -> None:
        assert self._lives.command is not None
        process = psutil.Process(self._lives.command.process.pid)
        assert descriptors(process.pid) < MAX_DESCRIPTORS, process.open_files()
        assert process.num_threads() < MAX_THREADS
        disk = sum(path.stat().st_size for path in self._lives.run_dir.iterdir())
        assert disk < MAX_DISK_BYTES, sorted(p.name for p in self._lives.run_dir.iterdir())

    def _state(self) -> str:
        command = self._lives.command
        said = command.errors[-3000:] if command else ""
        workers = "".join(f"\n{c.errors[-500:]}" for c in self._crew)
        return f"{self._lives.status()}\n{said}{workers}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a storm of faults.")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--durability", choices=["snapshot", "log"], default="log")
    asked = parser.parse_args()
    print(f"seed {asked.seed}, {asked.seconds:.0f} s, {asked.durability}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        storm = Storm(Path(folder), asked.seed, asked.seconds, asked.durability)
        storm.run()
    faults = ", ".join(f"{count} {name}" for name, count in sorted(storm.faults.items()))
    print(f"held through {storm.faults.total()} faults: {faults}")
    print(f"slowest recovery, from the start of a process: {storm.slowest_recovery_s:.1f} s")


if __name__ == "__main__":
    sys.exit(main())

"""What must stay bounded: memory of many large pushes, and whatever grows with restarts."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from headwater.client.client import Client
from headwater.protos import parameter_server_pb2 as pb
from kit import counting
from kit.lives import RECOVERY_S, TASK, Lives, Witness, descriptors, steady_workers
from kit.processes import server
from kit.protocol import BareWorker, hello_of


def bytes_in(folder):
    """Of its files, but for those that go while they are counted."""
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("level", ["snapshot", "log"])
def test_a_hundred_restarts_under_load_cost_no_more_than_the_first(level, tmp_path):
    task = {"examples": 1024, "epochs": 400, "batch_size": 4}
    level_options = ["--durability", level, "--snapshot-every", "50"]
    starts, sizes, open_files, resident = [], [], [], []
    with Lives(tmp_path, counting.options(**task), level_options) as lives:
        lives.start()
        with (
            Witness(lives.address, 4, acknowledged_is_durable=level == "log") as witness,
            steady_workers(lives.address, witness, 2, 0.002, **task),
        ):
            for _ in range(100):
                time.sleep(0.3)
                lives.kill()
                began = time.monotonic()
                lives.start()
                starts.append(time.monotonic() - began)
                process = psutil.Process(lives.command.process.pid)
                sizes.append(bytes_in(lives.run_dir))
                open_files.append(descriptors(process.pid))
                resident.append(process.memory_info().rss)
            status = lives.status()
        assert status["incarnation"] == 101
        assert status["version"] > 1000
    print(f"starts {min(starts):.1f} … {max(starts):.1f} s, {max(sizes) / 1e6:.1f} MB on disk")
    assert max(starts) < RECOVERY_S
    early, late = sorted(starts[:20])[10], sorted(starts[-20:])[10]
    assert late < 1.5 * early + 0.5, (early, late)
    assert max(sizes[-20:]) < 2 * max(sizes[5:25]), sizes
    assert max(open_files[-20:]) <= max(open_files[:20]) + 10, open_files
    assert max(resident[-20:]) < 1.2 * max(resident[:20])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_for_pushes_is_bounded_and_all_are_served(tmp_path):
    """32 workers of a 100 MB model, and room for three gradients."""
    size, room = 100_000_000, 300_100_000
    values = {"examples": 32, "epochs": 1, "batch_size": 1, "padding": size // 4}
    options = counting.options(**values)
    with (
        server(
            TASK,
            *options,
            "--max-staged-bytes",
            str(room),
            "--session-timeout",
            "300",
            cwd=tmp_path,
        ) as (service, address),
        Client(address) as client,
    ):
        hello = hello_of(counting.task(**values), "counting")
        hello.task.options.update({name: str(value) for name, value in values.items()})
        process = psutil.Process(service.process.pid)
        before = process.memory_info().rss
        peak, most_out, over = before, 0, threading.Event()

        def watch() -> None:
            nonlocal peak, most_out
            while not over.wait(0.05):
                peak = max(peak, process.memory_info().rss)
                with Client(address) as looking:
                    out = looking.status()["workers"]
                    most_out = max(most_out, len(out))

        def one_push(_: int) -> int:
            with BareWorker(address, hello) as worker:
                worker.join()
                ticket = worker.ticket(timeout_s=300)
                worker.push(ticket, bytes(worker.layout.total_bytes))
                return worker.outcome(timeout_s=300).code

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with ThreadPoolExecutor(32) as threads:
                outcomes = list(threads.map(one_push, range(32)))
        finally:
            over.set()
            watcher.join()
        assert outcomes == [pb.OUTCOME_APPLIED] * 32
        assert client.status()["version"] == 32
        # Staging, three encoded versions and what is on its way of them, the new weights, and
        # what XLA takes to make them; without the bound it would be 3.2 GB of staging alone.
        print(f"resident {before / 1e6:.0f} MB before, {peak / 1e6:.0f} MB at most")
        assert peak - before < room + 12 * size
        assert most_out > 20, "they were there at once"

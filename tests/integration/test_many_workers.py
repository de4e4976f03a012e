"""64 workers on one server: all are served alike, and every batch counts once.

They live in four processes of 16 threads, which this file is the program of as
well, as `python test_many_workers.py ADDRESS`; those processes load no JAX.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from headwater.protos import parameter_server_pb2 as pb
from kit.protocol import BareWorker, counting_gradient, hello_of, key
from kit.waiting import wait_for

PROCESSES, THREADS = 4, 16
WORKERS = PROCESSES * THREADS
BATCHES = WORKERS * 20
BATCH = 2

TESTS = Path(__file__).parents[1]


def live(address: str, hello: pb.Hello) -> int:
    """One worker's life; how many of its gradients were applied."""
    applied = 0
    with BareWorker(address, hello) as worker:
        worker.join()
        for ticket in worker.tickets():
            worker.push(ticket, counting_gradient(worker.layout, worker.leased[key(ticket)]))
            outcome = worker.outcome()
            assert outcome.code == pb.OUTCOME_APPLIED, outcome
            applied += 1
        assert worker.bye().reason == pb.BYE_FINISHED
    return applied


def main() -> None:
    """Be a process of 16 workers: a hello on stdin, their counts on stdout."""
    hello = pb.Hello.FromString(sys.stdin.buffer.read())
    with ThreadPoolExecutor(THREADS) as threads:
        lives = [threads.submit(live, sys.argv[1], hello) for _ in range(THREADS)]
        counts = [life.result(100) for life in lives]
    assert "jax" not in sys.modules
    print(json.dumps(counts))


@contextlib.contextmanager
def process(address: str, hello: pb.Hello) -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen(  # noqa: S603  (this file)
        [sys.executable, __file__, address],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert started.stdin is not None
        started.stdin.write(hello.SerializeToString())
        started.stdin.close()
        started.stdin = None  # communicate() is not to close it again
        yield started
    finally:
        started.kill()
        started.communicate()


def test_64_workers_are_served_alike_and_every_batch_counts_once(tmp_path: Path) -> None:
    from headwater import Client, Server
    from kit import counting

    task = counting.task(examples=BATCHES * BATCH, epochs=1, batch_size=BATCH)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(task, run_dir=tmp_path / "run"))
        client = stack.enter_context(Client(server.address))
        client.pause()  # until all are here
        started = [
            stack.enter_context(process(server.address, hello_of(task))) for _ in range(PROCESSES)
        ]

        def all_here() -> bool:
            for one in started:
                assert one.poll() is None, one.communicate()[1].decode()
            workers = client.status()["workers"]
            return len(workers) == WORKERS and all(w["state"] == "waiting" for w in workers)

        wait_for(all_here, "64 workers ask for a ticket", 60, client.status)
        client.resume()
        ended = [one.communicate(timeout=90) for one in started]
        wait_for(lambda: not client.status()["workers"], "all have left")
        status, weights = client.status(), client.pull()

    for one, (_, errors) in zip(started, ended, strict=True):
        assert one.returncode == 0, errors.decode()
    counts = [count for output, _ in ended for count in json.loads(output)]
    assert len(counts) == WORKERS
    assert sum(counts) == BATCHES == status["version"]
    assert min(counts) >= 10, counts  # half of each one's share of 20
    assert max(counts) <= 40, counts
    assert status["state"] == "finished"
    assert set(weights["count"].tolist()) == {1.0}
    assert not any(status["rejected"].values())


if __name__ == "__main__":
    main()

"""The part `reads`: a model of 40 MB pulled by readers that do nothing else.

Run as a module it is such a reader: `python -m benchmarks.reads ADDRESS SECONDS`.
"""

from __future__ import annotations

import json
import sys
import time

from benchmarks.crew import together, wait_for_begin
from benchmarks.figures import Figures
from benchmarks.limits import DOWN
from benchmarks.serving import LARGE, training
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.reading import Reader

WINDOW_S = 1.5


def measure(figures: Figures) -> None:
    with training(LARGE, 0) as (client, _):
        for readers in (1, 2, 4, 8):
            command = ["benchmarks.reads", client.address, str(WINDOW_S)]
            found = together([command] * readers)
            rate = sum(each["bytes"] / each["seconds"] for each in found) / 1e6
            name = f"40 MB pulled by {readers} reader{'s' * (readers > 1)}"
            figures.add(name, "MB/s", rate, DOWN)


def read(address: str, window_s: float) -> dict[str, float]:
    first = Reader(address)
    weights = first.pull(pb.PullRequest()).weights
    first.close()
    assert weights is not None
    reader = Reader(address, weights.layout)  # of a known layout: its buffers are reused
    reader.pull(pb.PullRequest())
    wait_for_begin()
    began, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < window_s:
        reader.pull(pb.PullRequest())
        count += 1
    seconds = time.perf_counter() - began
    return {"bytes": count * weights.layout.total_bytes, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(read(sys.argv[1], float(sys.argv[2]))))

"""Measures Headwater on this machine: `make bench`, or parts of it by name.

    python -m benchmarks.run [PART ...] [--repeats 3] [--json FILE] [--plot FOLDER]

limits      memcpy, plain sockets, gRPC with nothing of ours around it
updates     the mnist task with 1, 2 and 4 workers, beside the plain single-process loop
transfer    push + pull of models of 10 k to 10 M parameters; 1 and 2 workers, SGD and Adam
huge        the same of 100 M parameters, 1 worker, SGD
wire        10 M parameters by gRPC: with second tickets, and with fewer bytes
latency     a small round trip, and what a status takes while a large model is pushed
reads       a model of 40 MB pulled by 1, 2, 4, 8 readers
capacity    1 to 128 workers that only wait 20 ms for a gradient
memory      the server's, of 10 M parameters; huge-memory: of 100 M
start       seconds from `headwater run` to the first applied gradient
status      seconds that `headwater status --json` takes, the whole process
durability  what --durability log costs, beside what the disk does
recovery    seconds from the start of a killed server to its first answer

Those that take long are left out unless they are named: see LONG. `limits` is
always measured, for every figure's share of its limit to be of the same run.
Every figure is the median of the repeats, which take turns with what they are
compared with. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    capacity,
    durability,
    latency,
    limits,
    memory,
    reads,
    start,
    transfer,
    updates,
    wire,
)
from benchmarks.figures import Figures

PARTS: dict[str, Callable[[Figures], None]] = {
    "limits": limits.measure,
    "updates": updates.measure,
    "transfer": transfer.measure,
    "huge": transfer.measure_huge,
    "wire": wire.measure,
    "latency": latency.measure,
    "reads": reads.measure,
    "capacity": capacity.measure,
    "memory": memory.measure,
    "huge-memory": memory.measure_huge,
    "start": start.measure,
    "status": start.measure_status,
    "durability": durability.measure,
    "recovery": durability.measure_recovery,
}
LONG = {"huge-memory", "durability", "recovery"}


def measure(parts: list[str], repeats: int) -> Figures:
    figures = Figures()
    for turn in range(repeats):
        for part in parts:
            began = time.perf_counter()
            figures.part = part
            PARTS[part](figures)
            seconds = time.perf_counter() - began
            print(f"{turn + 1}/{repeats} {part}: {seconds:.0f} s", file=sys.stderr)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="keep every figure here")
    parser.add_argument("--plot", type=Path, help="draw into this folder; needs matplotlib")
    arguments = parser.parse_args()
    named = arguments.parts or [part for part in PARTS if part not in LONG]
    figures = measure(["limits", *(part for part in named if part != "limits")], arguments.repeats)
    print("\n".join(figures.table()))
    if arguments.json:
        machine = f"{os.cpu_count()} cores, {platform.platform()}"
        kept = {"machine": machine, "figures": figures.as_json()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(kept, indent=2) + "\n")
    if arguments.plot:
        from benchmarks.plot import draw

        draw(figures, arguments.plot)


if __name__ == "__main__":
    main()

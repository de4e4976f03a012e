"""The part `wire`: 10 M parameters by gRPC, as between machines, and what makes it faster.

Second tickets hide the exchange behind the next gradient; fewer bytes shorten it, and
cost the worker's and the server's time.
"""

from __future__ import annotations

from benchmarks.figures import Figures
from benchmarks.limits import EXCHANGE
from benchmarks.serving import ENDLESS, LARGE, training, updates_per_second, warm

PARAMETERS = 10_000_000
WINDOW_S = 2.0
SMALLER = ("--compress", "int8", "--pull-dtype", "bfloat16")
SECOND = ("--pipeline", "on")
VARIANTS = {
    "as it is": (),
    "second tickets": SECOND,
    "bfloat16 both ways": ("--compress", "bfloat16", "--pull-dtype", "bfloat16"),
    "int8, bfloat16": SMALLER,
    "int8, bfloat16, second tickets": (*SMALLER, *SECOND),
    "topk:0.01, bfloat16": ("--compress", "topk:0.01", "--pull-dtype", "bfloat16"),
}


def measure(figures: Figures) -> None:
    words = [f"parameters={PARAMETERS}", "optimizer=sgd"]
    for name, options in VARIANTS.items():
        how = ("--transport", "grpc", *options)
        with training(LARGE, 1, *ENDLESS, *how, task_options=words) as (client, _):
            warm(client, 1, 3)
            rate = updates_per_second(client, WINDOW_S, 3)
        figures.add(f"10 M by gRPC, {name}, round trips", "1/s", rate)
        if "--compress" not in options:
            figures.add(f"10 M by gRPC, {name}", "MB/s", rate * 8 * PARAMETERS / 1e6, EXCHANGE)

"""Measures what staleness does to the weights, and what avoiding it costs.

    python -m benchmarks.consistency [convergence] [bound] [bytes]
                                     [--data mnist.npz] [--batch-size 64] [--epochs 10]
                                     [--repeats 3] [--json FILE] [--plot FILE.png]

convergence  test accuracy, staleness and bytes of whole trainings with workers of
             unlike speed; a repeat for each of the seeds 0, 1, 2
bound        examples per second and staleness at bounded:K, one worker of four
             being ten times slower than the others
bytes        bytes on the wire in an epoch, by the number of local steps

What docs/consistency.md and docs/performance.md say is from

    make bench-consistency ARGS="--data mnist.npz --batch-size 128 --plot docs/consistency.png"

which takes about an hour, from the root of the repository. Each run is written to the
JSON file when it is over, and what is there is not run again: an interrupted benchmark
goes on where it was. The seconds of `convergence`, which are kept but not shown, say
nothing of one setting against another: the more workers, the longer each one sleeps.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.kept import Kept, Run
from benchmarks.serving import SERVED_EPOCHS, training, until
from benchmarks.settings import BOUND, BYTES, CONVERGENCE, Setting
from benchmarks.slowed import SLOWNESS_ENV
from headwater.client.client import Client
from headwater.examples.mnist import task as mnist

SLOWED = str(Path(__file__).parent / "slowed.py")

BATCHES_PER_S = 600
"""That the workers would compute together if all were of the faster kind: more than a
server on two cores applies, by little, so that a training takes no longer than it must."""

BOUND_COMPUTE_S = 0.02
"""Long enough that the workers, and not the cores, set the pace."""
WARM_UP_S = 5.0
WINDOW_S = 10.0


# ------------------------------------------------------------------- one run each


def convergence(setting: Setting, arguments: argparse.Namespace, seed: int) -> Run:
    """A whole training, every second worker three times as slow as the others."""
    task = mnist(arguments.data)
    assert task.evaluate is not None
    options = [*setting.options, "--seed", str(seed), *sizes(arguments, arguments.epochs)]
    with training(
        SLOWED,
        setting.workers,
        *options,
        task_options=[f"data={arguments.data}", f"compute_s={setting.at_once / BATCHES_PER_S}"],
        worker_environment=lambda number: {SLOWNESS_ENV: "3" if number % 2 else "1"},
    ) as (client, _):
        begin_together(client, setting.workers)
        began = time.perf_counter()
        per_epoch = setting.updates(client.status()["batches_total"] // arguments.epochs)
        curve = [
            (weights.version / per_epoch, float(task.evaluate(task.restore(weights))["accuracy"]))
            for weights in client.subscribe(every=per_epoch)
        ]
        seconds = time.perf_counter() - began
        return {"accuracy": curve[-1][1], "seconds": seconds, "curve": curve, **end(client)}


def bound(setting: Setting, arguments: argparse.Namespace, turn: int) -> Run:
    """Throughput over a window of time, the first worker ten times as slow as the others."""
    with training(
        SLOWED,
        setting.workers,
        *setting.options,
        *("--seed", str(turn), *sizes(arguments, SERVED_EPOCHS)),
        task_options=[f"compute_s={BOUND_COMPUTE_S}"],
        worker_environment=lambda number: {SLOWNESS_ENV: "1" if number else "10"},
    ) as (client, _):
        begin_together(client, setting.workers)
        time.sleep(WARM_UP_S)
        began, first = time.perf_counter(), client.status()["version"]
        time.sleep(WINDOW_S)
        status, seconds = client.status(), time.perf_counter() - began
        staleness = status["staleness"]
        if setting.consistency != "async":
            assert staleness["max"] <= setting.number, f"{setting.name}: {staleness}"
        rate = (status["version"] - first) / seconds
        # Without local steps an update is a batch; the last of an epoch may be short.
        per_epoch = status["batches_total"] / SERVED_EPOCHS
        return {
            "updates_per_s": rate,
            "examples_per_s": rate * status["example_count"] / per_epoch,
            "staleness_mean": staleness["mean"],
            "staleness_max": staleness["max"],
        }


def bytes_of_an_epoch(setting: Setting, arguments: argparse.Namespace, turn: int) -> Run:
    """One epoch on workers that are not slowed."""
    options = [*setting.options, "--seed", str(turn), *sizes(arguments, 1)]
    data = [f"data={arguments.data}"]
    with training(SLOWED, setting.workers, *options, task_options=data) as (client, _):
        begin_together(client, setting.workers)
        until(lambda: client.status()["state"] in {"finished", "failed"}, "the end of an epoch")
        return end(client)


def sizes(arguments: argparse.Namespace, epochs: int) -> list[str]:
    return ["--batch-size", str(arguments.batch_size), "--epochs", str(epochs)]


def begin_together(client: Client, workers: int) -> None:
    """Hold the run until every worker has compiled: a lone early one has no staleness."""
    client.pause()

    def ready() -> bool:
        states = [worker["state"] for worker in client.status()["workers"]]
        return states == ["waiting"] * workers

    until(ready, f"{workers} workers that wait")
    client.resume()


def end(client: Client) -> Run:
    """What a finished run says of itself."""
    status = client.status()
    if status["state"] != "finished":
        sys.exit(f"the run is {status['state']}: {' '.join(status['problems'])}")
    return {
        "updates": status["version"],
        "staleness_mean": status["staleness"]["mean"],
        "staleness_max": status["staleness"]["max"],
        "bytes": status["bytes_in"] + status["bytes_out"],
    }


# ---------------------------------------------------------------- all of a part


Column = tuple[str, Callable[[Sequence[Run]], str]]


@dataclasses.dataclass(frozen=True)
class Part:
    """One of those that the command line names."""

    settings: Sequence[Setting]
    measure: Callable[[Setting, argparse.Namespace, int], Run]
    columns: Sequence[Column]
    compared: str = ""
    """A figure to show as a share of what it is without local steps."""


def median(name: str, digits: int, unit: float = 1.0) -> Callable[[Sequence[Run]], str]:
    return lambda runs: f"{statistics.median(run[name] for run in runs) / unit:,.{digits}f}"


def maximum(name: str) -> Callable[[Sequence[Run]], str]:
    return lambda runs: f"{max(run[name] for run in runs)}"


def percents(runs: Sequence[Run]) -> str:
    return f"{100 * statistics.fmean(run['accuracy'] for run in runs):.2f} %"


def spread(runs: Sequence[Run]) -> str:
    accuracies = [100 * run["accuracy"] for run in runs]
    return f"{min(accuracies):.2f} % to {max(accuracies):.2f} %"


def extent(name: str) -> Callable[[Sequence[Run]], str]:
    def text(runs: Sequence[Run]) -> str:
        values = [run[name] for run in runs]
        return f"{min(values):,.0f} to {max(values):,.0f}"

    return text


def share(name: str, runs: Iterable[Run], of: Iterable[Run]) -> str:
    part, whole = (statistics.median(run[name] for run in each) for each in (runs, of))
    return f"{part / whole:.3f}"


STALENESS: Sequence[Column] = (
    ("staleness, mean", median("staleness_mean", 1)),
    ("max", maximum("staleness_max")),
)
PARTS = {
    "convergence": Part(
        CONVERGENCE,
        convergence,
        (
            ("test accuracy, mean", percents),
            ("min to max", spread),
            *STALENESS,
            ("updates", median("updates", 0)),
            ("MB on the wire", median("bytes", 0, 1e6)),
        ),
    ),
    "bound": Part(
        BOUND,
        bound,
        (
            ("examples/s", median("examples_per_s", 0)),
            ("min to max", extent("examples_per_s")),
            ("updates/s", median("updates_per_s", 1)),
            *STALENESS,
        ),
    ),
    "bytes": Part(
        BYTES,
        bytes_of_an_epoch,
        (("pushes", median("updates", 0)), ("MB on the wire", median("bytes", 1, 1e6))),
        compared="bytes",
    ),
}


def measure(names: Sequence[str], arguments: argparse.Namespace, kept: Kept) -> None:
    """Whatever is not kept yet. The settings take turns, so that a slower hour slows all."""
    for name, turn in itertools.product(names, range(arguments.repeats)):
        for setting in PARTS[name].settings:
            if str(turn) not in kept.runs(name, setting.name):
                print(f"{name} {turn + 1}/{arguments.repeats}: {setting.name}", file=sys.stderr)
                kept.add(name, setting.name, turn, PARTS[name].measure(setting, arguments, turn))


def table(name: str, kept: Kept) -> Iterator[str]:
    """As Markdown; a row a setting, over its repeats."""
    part = PARTS[name]
    titles = [title for title, _ in part.columns] + ["of H=1"] * bool(part.compared)
    yield f"| {name} | {' | '.join(titles)} |"
    yield f"| --- |{' ---: |' * len(titles)}"
    for setting in part.settings:
        if runs := [*kept.runs(name, setting.name).values()]:
            cells = [setting.name, *(text(runs) for _, text in part.columns)]
            if part.compared:
                plain = dataclasses.replace(setting, local_steps=1)
                cells.append(share(part.compared, runs, kept.runs(name, plain.name).values()))
            yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all")
    parser.add_argument("--data", default="sample", help="Keras's mnist.npz, or sample")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("build/consistency.json"))
    parser.add_argument("--plot", type=Path, help="draw convergence here; needs matplotlib")
    arguments = parser.parse_args()
    conditions = {
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "data": Path(arguments.data).name,
        "batch_size": arguments.batch_size,
        "epochs": arguments.epochs,
    }
    kept = Kept(arguments.json, conditions)
    names = arguments.parts or list(PARTS)
    measure(names, arguments, kept)
    for name in names:
        print("\n".join(table(name, kept)), end="\n\n")
    if arguments.plot:
        from benchmarks.consistency_plot import draw

        draw({s: [*kept.runs("convergence", s.name).values()] for s in CONVERGENCE}, arguments.plot)


if __name__ == "__main__":
    main()

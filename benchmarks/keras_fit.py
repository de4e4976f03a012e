"""Measures Keras's fit by workers beside Keras's own: accuracy and seconds.

    python -m benchmarks.keras_fit [--data mnist.npz] [--epochs 10] [--workers 2 4] [--seeds 3]

Runs examples/keras_mnist.py as a user would, each way in turn for each seed. The seconds
are those of `fit`: with workers they have the start of the processes in them.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence

RESULT = re.compile(r"^([\d.]+)% of .* ([\d.]+) s$", re.MULTILINE)


def run(options: Sequence[str]) -> tuple[float, float]:
    """(held-out accuracy in percent, seconds of fit) of one run of the program."""
    command = [sys.executable, "-m", "headwater.examples.keras_mnist", *options]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(  # noqa: S603  (our own example)
            command, cwd=folder, capture_output=True, text=True, check=False
        )
    found = RESULT.search(done.stdout)
    if done.returncode != 0 or found is None:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(found[1]), float(found[2])


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="sample", help="Keras's mnist.npz, or sample")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    ways = {"Keras alone": ["--plain"]}
    ways |= {f"{count} workers": ["--workers", str(count)] for count in given.workers}
    found = defaultdict(list)
    for seed in range(given.seeds):
        for way, options in ways.items():
            common = ["--data", given.data, "--epochs", str(given.epochs), "--seed", str(seed)]
            found[way].append(run([*options, *common]))
            print(f"seed {seed}  {way:12}  {found[way][-1][0]:.2f} %  {found[way][-1][1]:.1f} s")
    print(
        "\n| | held-out accuracy, median (least to most) | seconds, median |\n| --- | --- | --- |"
    )
    for way, runs in found.items():
        accuracies, seconds = zip(*runs, strict=True)
        shown = f"{statistics.median(accuracies):.2f} %"
        print(
            f"| {way} | {shown} ({min(accuracies):.2f} to {max(accuracies):.2f}) "
            f"| {statistics.median(seconds):.1f} |"
        )


if __name__ == "__main__":
    main()

"""The part `updates`: the mnist task with 1, 2 and 4 workers, beside the loop without Headwater."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.figures import Figures
from benchmarks.limits import ECHOES_MNIST
from benchmarks.serving import ENDLESS, HERE, MNIST, training, updates_per_second, warm

PLAIN = "mnist, plain loop"
PLAIN_EPOCHS = 40
WINDOW_S = 3.0


def measure(figures: Figures) -> None:
    command = [sys.executable, str(HERE / "plain_loop.py"), str(PLAIN_EPOCHS)]
    plain = float(subprocess.check_output(command, text=True))  # noqa: S603  (our own script)
    figures.add(PLAIN, "updates/s", plain)
    for workers in (1, 2, 4):
        with training(MNIST, workers, *ENDLESS) as (client, _):
            warm(client, workers, 50)
            rate = updates_per_second(client, WINDOW_S)
        name = f"mnist, {workers} worker{'s' * (workers > 1)}"
        figures.add(name, "updates/s", rate, PLAIN)
        if workers == 1:
            figures.add(f"{name}, beside echoes", "updates/s", rate, ECHOES_MNIST)

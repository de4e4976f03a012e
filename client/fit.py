"""`fit`: trains a task that is an object of this program, by processes of this machine.

It is `headwater run` from Python. The processes get the task itself (worker/handed.py),
so that it may have been made anywhere: in a notebook, a closure, a script without
`if __name__ == "__main__"`. Nothing is forked, the script is not run again.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.client.client import Client
from headwater.client.fitted import Fitted, read_fitted
from headwater.client.interrupts import Stopped, heard_in_a_coroutine
from headwater.client.progress import Display, Screen
from headwater.client.run import Training
from headwater.protos.errors import UsageError

if TYPE_CHECKING:
    from headwater.worker.task import Task


def fit(
    task: Task,
    workers: int = 2,
    *,
    name: str = "task",
    platform: str | None = None,
    devices: int | str | None = None,
    quiet: bool = False,
    **options: Any,
) -> Fitted:
    """Train here: one server, so many workers, and an evaluator if the task has `evaluate`.

        result = fit(task, workers=2, epochs=3, consistency="sync:2")
        result.params, result.metrics

    Progress is shown on stderr, or below the notebook's cell. Ctrl-C ends all processes in
    order, within five seconds, and keeps the weights in the run directory.

    Args:
      task: May use anything that cloudpickle can pickle.
      workers: Processes; 0 trains in this process and this thread, for a debugger.
      name: What the run directory, runs/NAME-…, is called after.
      platform: Where the workers compute: cpu, gpu or tpu; by default JAX's own choice.
      devices: Of those that a worker sees, it splits its batches over these: "all", a number
        for the first so many, or "0,1"; by default all, in sync mode 1. With several workers
        this machine's GPUs are dealt out among them first.
      quiet: Show nothing.
      options: Those of `headwater server`, with underscores: `run_dir`, `batch_size`,
        `durability`, …; paths may be Paths.

    Raises:
      UsageError: The task, or an option, cannot work.
      RunFailed: The run, or its last worker, failed; what the user's code raised there is
        in the message, with its traceback. With workers=0 it goes through as it is.
      HeadwaterError: These two are; so is whatever else goes wrong, say with the disk.
      KeyboardInterrupt: See above.
    """
    from headwater.server.here import train_here
    from headwater.server.keywords import read_keywords
    from headwater.worker import handed
    from headwater.worker.load import is_loading
    from headwater.worker.task import NAME, Task

    if is_loading():
        raise UsageError(
            "fit was called by a file that is just being loaded for its task, which would go on "
            'without end; put the call under `if __name__ == "__main__":`'
        )
    if not isinstance(task, Task):
        raise UsageError(f"fit takes a Task, not {type(task).__name__}")
    if type(workers) is not int or workers < 0:
        raise UsageError(f"fit: workers is a whole number from 0 on, not {workers!r}")
    if not re.fullmatch(NAME, name):
        raise UsageError(f"fit: name is for a folder: letters, digits, - and _; not {name!r}")
    keywords = read_keywords("fit", options, _OWN)
    spelt = None if devices is None else str(devices)
    screen = Screen(stderr=True, quiet=quiet)
    if workers == 0:
        if platform is not None:
            raise UsageError("fit: with workers=0 it is this process that computes; no platform")
        with Display(screen, live=False) as display, heard_in_a_coroutine():
            run_dir = train_here(
                task, name, keywords.fields, lambda at: _look(at, display), spelt or "all"
            )
        return read_fitted(run_dir, task.restore)
    with handed.write(task) as file:
        training = Training(
            task=name,
            task_file=file.fileno(),
            workers=workers,
            platform=platform,
            devices=spelt,
            server_options=keywords.words,
            stopped_by=(signal.SIGINT,),
            display=Display(screen),
        )
        try:
            facts = training.run()
        except Stopped:
            raise KeyboardInterrupt from None
    return read_fitted(Path(facts["run_dir"]), task.restore)


_OWN = ("workers", "name", "platform", "devices", "quiet")


def _look(address: str, display: Display) -> None:
    with Client(address) as client:
        display.show(client.status())

"""Workers for a server that runs in this very process, on this machine."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from headwater.client.endings import Endings
from headwater.client.processes import Child, kill_all, wait_all
from headwater.protos.command import RUN_ID_ENV, TASK_ENV

log = logging.getLogger("headwater")

LEAVE_TIMEOUT_S = 3.0
"""For workers to finish what they have in hand."""


class Crew:
    """Some `headwater worker` processes, which end with the block.

    Args:
      environments: Of each worker, added to ours.
      address: Of the server.
      run_id: The run that they join, and no other.
      task: What it is called.
      task_file: Descriptor of the file with the task; see worker/handed.py.
      options: Of `headwater worker`, the same for all.
      logs: The folder for what they say.
    """

    def __init__(
        self,
        environments: Sequence[Mapping[str, str]],
        *,
        address: str,
        run_id: str,
        task: str,
        task_file: int,
        options: Sequence[str] = (),
        logs: Path,
    ) -> None:
        self._children: list[Child] = []
        self._endings = Endings(self._children, log.warning)
        logs.mkdir(exist_ok=True)
        with contextlib.ExitStack() as opened:
            opened.callback(self._end)
            for number, environment in enumerate(environments, 1):
                name = f"worker-{number}"
                child = Child(
                    name,
                    "worker",
                    ["--task", task, "--server", address, "--name", name, *options],
                    environment={**environment, RUN_ID_ENV: run_id},
                    inherits={TASK_ENV: task_file},
                )
                self._children.append(child)
                child.log_to(logs / f"{name}.log")
            opened.pop_all()

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def look(self) -> None:
        """Warn of workers that failed.

        Raises:
          HeadwaterError: None is left, and some failed; with what the last of those said. Or
            all were told to leave a while ago. At every look from then on: who gets by
            without them now may not later.
        """
        if error := self._endings.look():
            raise error

    def _end(self) -> None:
        # Those that the server has sent away are on their way out.
        if not wait_all(self._children, LEAVE_TIMEOUT_S):
            for child in self._children:
                child.send(signal.SIGTERM)
            wait_all(self._children, LEAVE_TIMEOUT_S)
        kill_all(self._children)
        for child in self._children:
            child.close()
        self._children.clear()

"""`headwater`: the command. It looks and steers itself, and trains by becoming another process.

Quick, because it imports neither JAX nor, until it must, NumPy.
"""

from __future__ import annotations

import os
import sys

PROCESSES = {
    "server": ("headwater.server.main", "Keep the weights of one run and apply gradients to them."),
    "worker": ("headwater.worker.main", "Compute gradients for a server until the run is over."),
    "evaluate": ("headwater.worker.evaluate", "Evaluate the served weights and report the result."),
    "check": ("headwater.server.check", "Try a task out: one batch, one gradient, no server."),
}
"""Commands that need JAX: each is a module to run, and what it is for."""


def command_line(command: str, arguments: list[str]) -> list[str]:
    """What runs a command of PROCESSES."""
    # -P: a folder called headwater where the user works must not hide this package.
    return [sys.executable, "-P", "-m", PROCESSES[command][0], *arguments]


def become(command: str, arguments: list[str]) -> None:
    """Be a command of PROCESSES from now on, so that pid and signals are its own."""
    os.execv(sys.executable, command_line(command, arguments))  # noqa: S606  (our own module)


def main() -> None:
    """The `headwater` command."""
    if sys.argv[1:2] and sys.argv[1] in PROCESSES:
        become(sys.argv[1], sys.argv[2:])
    from headwater.client import commands
    from headwater.protos import command

    command.run(commands.app, "headwater")


if __name__ == "__main__":
    main()

"""`headwater`: the command. It looks and steers by itself, and hands over to what trains.

Quick, because it imports neither JAX nor, until it must, NumPy.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

from headwater.client import memory

PROCESSES = {
    "server": ("headwater.server.main", "Keep the weights of one run and apply gradients to them."),
    "worker": ("headwater.worker.main", "Compute gradients for a server until the run is over."),
    "evaluate": ("headwater.worker.evaluate", "Evaluate the served weights and report the result."),
    "check": ("headwater.server.check", "Try a task out: one batch, one gradient, no server."),
    "replay": ("headwater.server.replay", "Compute a run again from its history, bit for bit."),
}
"""Commands that need JAX: each is the `main` of a module, and what it is for."""

TRAINING = ("server", "worker")
"""Those that handle tensors without end."""


def command_line(command: str, arguments: list[str]) -> list[str]:
    """What runs a command as a process of its own."""
    # -P: a folder called headwater where the user works must not hide this package.
    return [sys.executable, "-P", "-m", "headwater.client.main", command, *arguments]


def hand_over(command: str, arguments: list[str]) -> None:
    """Be a command of PROCESSES from now on, in this process: pid and signals stay its own."""
    # Until it minds signals itself, Ctrl-C ends it at once: loading JAX takes
    # seconds, and loses a KeyboardInterrupt now and then.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.argv = [f"headwater {command}", *arguments]
    importlib.import_module(PROCESSES[command][0]).main()


def main() -> None:
    """The `headwater` command."""
    _open_standard_streams()
    if sys.argv[1:2] and sys.argv[1] in PROCESSES:
        if sys.argv[1] in TRAINING:
            memory.tune()
        hand_over(sys.argv[1], sys.argv[2:])
        return
    try:
        from headwater.client import commands
        from headwater.protos import command
    except KeyboardInterrupt:
        sys.exit(130)
    command.run(commands.app, "headwater")


def _open_standard_streams() -> None:
    """Have 0, 1 and 2 be open, or the next pipe would get their numbers and be lost on the way."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


if __name__ == "__main__":
    main()

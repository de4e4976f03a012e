"""Helpers in processes of their own that begin to count at the same moment.

Each prints "ready" when it is warm, begins at the line it then reads, and ends
with one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any


def together(
    commands: Sequence[Sequence[str]], begin: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Run `python -m` each of `commands`; what they print. `begin` is called as they begin."""
    with contextlib.ExitStack() as stack:
        crew = [stack.enter_context(_started(command)) for command in commands]
        for process in crew:
            _expect(process, "ready")
        begin()
        for process in crew:
            assert process.stdin is not None
            process.stdin.write("begin\n")
            process.stdin.flush()
        return [json.loads(_expect(process, "")) for process in crew]


def alone(*command: str) -> dict[str, Any]:
    """The same of one that begins at once."""
    return json.loads(subprocess.check_output([sys.executable, "-m", *command]))  # noqa: S603


def wait_for_begin() -> None:
    """In a helper: say that it is ready, and wait for the others."""
    print("ready", flush=True)
    sys.stdin.readline()


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Any:
    process = subprocess.Popen(  # noqa: S603  (our own module)
        [sys.executable, "-m", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _expect(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line or (word and line.strip() != word):
        sys.exit(f"a helper ended early, or said {line!r}: {process.args!r}")
    return line

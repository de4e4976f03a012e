"""Helpers in processes of their own that begin to count at the same moment.

Each prints "ready" when it is warm, begins at the line it then reads, and ends
with one line of JSON. Before that it may print "joined" and read a line likewise:
then nobody warms up before all have joined.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from headwater.client.memory import tuning


def together(
    commands: Sequence[Sequence[str]], begin: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Run `python -m` each of `commands`; what they print. `begin` is called as they begin."""
    with contextlib.ExitStack() as stack:
        crew = [stack.enter_context(_started(command)) for command in commands]
        while _expect_of_all(crew) != "ready":
            _let_go_on(crew)
        begin()
        _let_go_on(crew)
        return [json.loads(_expect(process, "")) for process in crew]


def alone(*command: str) -> dict[str, Any]:
    """The same of one that begins at once."""
    return json.loads(subprocess.check_output([sys.executable, "-m", *command]))  # noqa: S603


def wait_for_begin() -> None:
    """In a helper: say that it is ready, and wait for the others."""
    _meet("ready")


def wait_for_joined() -> None:
    """In a helper: say that it has joined, and wait for the others."""
    _meet("joined")


def _meet(word: str) -> None:
    print(word, flush=True)
    sys.stdin.readline()


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Any:
    process = subprocess.Popen(  # noqa: S603  (our own module)
        [sys.executable, "-m", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **tuning(os.environ)},  # as a worker
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _expect_of_all(crew: Sequence[subprocess.Popen[str]]) -> str:
    """The word that each says next."""
    word = ""
    for process in crew:
        word = _expect(process, word).strip()
    return word


def _let_go_on(crew: Sequence[subprocess.Popen[str]]) -> None:
    for process in crew:
        assert process.stdin is not None
        process.stdin.write("go on\n")
        process.stdin.flush()


def _expect(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line or (word and line.strip() != word):
        sys.exit(f"a helper ended early, or said {line!r}: {process.args!r}")
    return line

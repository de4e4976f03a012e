"""What every Headwater command does alike: errors, exit statuses, log lines, and its parent.

A command that another process started may hold two pipes from it: the lifeline,
which closes when the parent dies, however it dies; and the ready pipe, on which
a server says where it listens. And a file, with the task that `fit` was called with.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NoReturn, TextIO

import typer

from headwater.protos.errors import HeadwaterError
from headwater.protos.rpc import SERVER_ENV

ServerAddress = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT", envvar=SERVER_ENV, show_default=True, help="The server's address."
    ),
]
"""The option --server, of every command that talks to one."""

LIFELINE_ENV = "HEADWATER_LIFELINE_FD"
READY_ENV = "HEADWATER_READY_FD"
TASK_ENV = "HEADWATER_TASK_FD"
RUN_ID_ENV = "HEADWATER_RUN_ID"
"""The id that a new run gets, or the only one that a worker joins; `headwater run` sets it."""


def new_run_id() -> str:
    """When it began, and four hexadecimal digits against another of the same second."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def expected_run_id() -> str:
    """The run that the process which started this one meant; "" where it did not say."""
    return os.environ.pop(RUN_ID_ENV, "")


def handed_task() -> int | None:
    """The open file with the task that the process which started this one means, if it hands one.

    See worker/handed.py.
    """
    text = os.environ.pop(TASK_ENV, "")
    return int(text) if text else None


INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def new_app(**options: Any) -> typer.Typer:
    """A typer app with plain help, which looks the same in any terminal and in a pipe."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, **options)


def run(app: typer.Typer, prog: str) -> NoReturn:
    """Be the command `prog`: parse the arguments, run it, and exit with its status.

    0 done; 1 failed; 2 wrong usage or input; 3 server not reachable; 130 Ctrl-C.
    Errors are one line on stderr, and the user's own traceback where there is one.
    """
    _log_to_stderr(prog)
    with contextlib.ExitStack() as noting:
        outputs = []
        if sys.stdout is not None:  # None where it was closed from the start
            outputs.append(noting.enter_context(contextlib.redirect_stdout(_Noting(sys.stdout))))
        if sys.stderr is not None:
            outputs.append(noting.enter_context(contextlib.redirect_stderr(_Noting(sys.stderr))))
        status = _status_of(app, prog, outputs)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        status = _unwritten(prog, error)
    sys.exit(status)


def _status_of(app: typer.Typer, prog: str, outputs: Sequence[_Noting]) -> int:
    try:
        status = typer.main.get_command(app).main(prog_name=prog, standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        helped = context.command_path if context is not None else prog
        return _fail(prog, f"{error.format_message()} (see {helped} --help)", error.exit_code)
    except HeadwaterError as error:
        return _fail(prog, str(error), error.exit_status)
    except OSError as error:
        return _of_the_system(prog, error, outputs)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:
        # How typer ends a command that a pipe was broken to.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        return _of_the_system(prog, end.__context__, outputs)
    return status if isinstance(status, int) else 0


class _Noting:
    """A standard stream that keeps the error for which it could not be written.

    Another OSError, say of a folder that cannot be made, must not be taken for one.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        with self._noted():
            return self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        with self._noted():
            self._stream.writelines(lines)

    def flush(self) -> None:
        with self._noted():
            self._stream.flush()

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _of_the_system(prog: str, error: OSError, outputs: Sequence[_Noting]) -> int:
    if any(output.error is error for output in outputs):
        return _unwritten(prog, error)
    return _fail(prog, str(error), 1)


def _unwritten(prog: str, error: OSError) -> int:
    """Nothing more can be said on stdout; a reader that has all it wants, say `head`, is fine."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if isinstance(error, BrokenPipeError):
        return 0
    return _fail(prog, f"the output could not be written: {error}", 1)


def _fail(prog: str, message: str, status: int) -> int:
    print(f"{prog}: error: {message}", file=sys.stderr, flush=True)
    return status


def _log_to_stderr(prog: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines(prog))
    logger = logging.getLogger("headwater")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _Lines(logging.Formatter):
    """`12:30:59 headwater worker: warning: …`; the level is named only above info."""

    def __init__(self, prog: str) -> None:
        super().__init__(f"%(asctime)s {prog}: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        if record.levelno > logging.INFO:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


def watch_lifeline(on_end: Callable[[], None]) -> None:
    """Call `on_end`, in a thread, when the process that started this one has gone."""
    text = os.environ.pop(LIFELINE_ENV, "")  # popped: it is not for processes of our own
    if not text:
        return
    lifeline = int(text)

    def watch() -> None:
        while os.read(lifeline, 1024):
            continue  # nothing is ever written; the end is what counts
        on_end()

    threading.Thread(target=watch, name="headwater-lifeline", daemon=True).start()


def announce_ready(facts: Mapping[str, Any]) -> None:
    """Tell the process that started this server that it serves, if it asked."""
    text = os.environ.pop(READY_ENV, "")
    if text:
        # One that has gone does not want to know; the lifeline tells of it.
        with contextlib.suppress(BrokenPipeError), os.fdopen(int(text), "w") as pipe:
            pipe.write(json.dumps(facts) + "\n")

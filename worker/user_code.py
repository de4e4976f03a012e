"""Runs the user's own code, and shows its errors as the user's own: without our frames."""

from __future__ import annotations

import contextlib
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from headwater.protos.errors import HeadwaterError

_PACKAGE = Path(__file__).resolve().parent.parent
_OUR_FOLDERS = [_PACKAGE / name for name in ("worker", "server", "client", "protos")]
_TASKS_OF_OUR_FOLDERS = _PACKAGE / "examples"
# Libraries call user code and are called by it, functools of Python's own among them.
_LIBRARIES = [
    Path(sysconfig.get_path(name)).resolve()
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
]

_TYPED = ("<stdin>", "<console>", "<python-input", "<ipython-input")
"""Beginnings of what code is called that was typed."""


class UserCodeError(HeadwaterError):
    """The user's code raised; the message holds its traceback."""


@contextlib.contextmanager
def guard_user_code(what: str) -> Iterator[None]:
    """Turn any exception but ours into a UserCodeError that begins with `what`.

    Raises:
      UserCodeError: Something else than a HeadwaterError was raised inside.
    """
    try:
        yield
    except HeadwaterError:
        raise
    except Exception as error:
        raise UserCodeError(f"{what}\n{user_traceback(error)}") from error


def user_traceback(error: BaseException) -> str:
    """The error's traceback from the user's own first frame on, and of what led to it."""
    shown = traceback.TracebackException.from_exception(error)
    _trim(shown)
    return "".join(shown.format()).rstrip()


def _trim(shown: traceback.TracebackException) -> None:
    own = [i for i, frame in enumerate(shown.stack) if is_users(frame.filename)]
    shown.stack = traceback.StackSummary.from_list(shown.stack[own[0] :] if own else [])
    notes = getattr(shown, "__notes__", None) or []
    shown.__notes__ = [n for n in notes if "JAX has removed its internal frames" not in n]
    for before in (shown.__cause__, shown.__context__):
        if before is not None:
            _trim(before)


def user_place(error: BaseException) -> str:
    """` (file.py, line 12)`: the last of the user's own lines that led to the error, if any."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if is_users(frame.filename)]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def is_users(filename: str) -> bool:
    """Whether code of this file is neither ours nor a library's."""
    if filename.startswith("<"):
        return filename.startswith(_TYPED)
    path = Path(filename).resolve()
    if path.is_relative_to(_TASKS_OF_OUR_FOLDERS):
        return True
    return not any(path.is_relative_to(folder) for folder in (*_OUR_FOLDERS, *_LIBRARIES))

"""Runs the user's own code, and shows its errors as the user's own: without our frames."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from headwater.protos.errors import HeadwaterError

_PACKAGE = Path(__file__).resolve().parent.parent
_OUR_FOLDERS = [
    _PACKAGE / name for name in ("worker", "server", "client", "protos")
]  # not examples: those are tasks


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
    """The error's traceback from the user's own first frame on; whole where there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [i for i, frame in enumerate(frames) if _is_users(frame.filename)]
    kept = traceback.format_list(frames[own[0] :] if own else frames)
    notes = getattr(error, "__notes__", [])
    error.__notes__ = [note for note in notes if "JAX has removed its internal frames" not in note]
    return "".join(
        ["Traceback (most recent call last):\n", *kept, *traceback.format_exception_only(error)]
    ).rstrip()


def _is_users(filename: str) -> bool:
    path = Path(filename).resolve()
    if any(path.is_relative_to(folder) for folder in _OUR_FOLDERS):
        return False
    # Libraries, ours among them when installed, call user code and are called by it.
    return not filename.startswith("<") and not {"site-packages", "importlib", "concurrent"} & {
        *path.parts
    }

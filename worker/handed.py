"""A task from one process to those that it starts, for `fit`: pickled, in a file without a name.

The processes of `headwater run` each load the task's file. A task that was made in a
notebook, a closure or a script has none that could be loaded again.

Unpickling runs code, so a pickle must come from nobody else (promise 6): the file has no
name from the start, and a process gets at it by inheriting its descriptor. Nothing that
came over a network is ever read here.

A file and not a pipe: each process reads all of it, when it gets there, and nobody has to
wait for it to be read. Read by `pread`, for those who inherit a descriptor share its position.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import linecache
import os
import pickle
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import jax

from headwater.protos.errors import HeadwaterError, UsageError
from headwater.worker.pickler import Pickler, modules_nobody_else_finds, uses
from headwater.worker.task import Task

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

READ_BYTES = 16 << 20
"""Of one read: it is copied once, and so much memory is used for that."""

_JAX_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_debug_nans",
)
"""What decides how a task computes and is set in the program, not in the environment."""


@dataclasses.dataclass(frozen=True)
class _Surroundings:
    """What has to hold in a process before it can take the task out of its pickle."""

    path: list[str]
    """sys.path, absolute: where the task's modules are found."""

    jax: Mapping[str, Any]
    typed: Mapping[str, Any]
    """linecache's entries of source that is in no file, say a notebook's, for tracebacks."""

    @classmethod
    def here(cls) -> _Surroundings:
        return cls(
            # "" is where one works; what is no place is for a hook that knows it.
            path=[os.path.abspath(p) if Path(p).exists() else str(p) for p in sys.path],  # noqa: PTH100
            jax={name: getattr(jax.config, name) for name in _JAX_SETTINGS if _is_known(name)},
            typed={
                name: entry
                for name, entry in linecache.cache.items()
                if len(entry) == 4 and entry[1] is None and not Path(name).exists()
            },
        )

    def restore(self) -> None:
        sys.path[:] = [*self.path, *(place for place in sys.path if place not in self.path)]
        for name, value in self.jax.items():
            jax.config.update(name, value)
        linecache.cache.update(self.typed)


def write(task: Task) -> IO[bytes]:
    """A file for `read` in processes that inherit its descriptor. Close it to be rid of it.

    Raises:
      UsageError: The task uses something that cannot be pickled; names it.
      HeadwaterError: There is no room for it.
    """
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
        try:
            _write(task, file)
        except BaseException:
            with contextlib.suppress(OSError):  # what is left of a full disk's file
                file.close()
            raise
    except OSError as error:
        reason, where = error.strerror or error, tempfile.gettempdir()
        raise HeadwaterError(f"the task could not be written to {where}: {reason}") from None
    return file


def _write(task: Task, file: IO[bytes]) -> None:
    pickle.dump(_Surroundings.here(), file)
    with modules_nobody_else_finds():
        try:
            Pickler(file).dump(task)
        except OSError:
            raise
        except Exception as error:
            raise UsageError(
                f"the task cannot be handed to other processes: {uses(task)}: {error}; load or "
                "make it inside the function that needs it, or use workers=0, or put the task "
                "into a file and use `headwater run --task`"
            ) from None
    file.flush()


def read(descriptor: int) -> Task:
    """The task in the file that this process inherited, which is closed. Sets sys.path and JAX.

    Raises:
      Exception: Whatever importing what the task uses may raise.
    """
    try:
        with io.BufferedReader(_FromStart(descriptor), READ_BYTES) as file:
            # Our own parent's, see above.
            pickle.load(file).restore()  # noqa: S301
            task = pickle.load(file)  # noqa: S301
    finally:
        os.close(descriptor)
    assert isinstance(task, Task)
    return task


class _FromStart(io.RawIOBase):
    """An open file, read from its beginning, whoever else reads it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = os.pread(self._descriptor, min(len(view), READ_BYTES), self._at)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def _is_known(setting: str) -> bool:
    """Whether this version of JAX has it."""
    return hasattr(jax.config, setting)

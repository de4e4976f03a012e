"""Finds the task that TASK names and gives it the user's options.

TASK is `file.py`, `file.py:name`, `package.module` or `package.module:name`;
the name is `task` unless given, and is a Task or a function that returns one.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from headwater.protos import command
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import UsageError
from headwater.worker import compute, handed
from headwater.worker.platform import check_platform, choose_platform
from headwater.worker.task import Task, TaskError
from headwater.worker.user_code import user_place, user_traceback


@dataclasses.dataclass(frozen=True)
class LoadedTask:
    """A task and what identifies it beside its contents."""

    task: Task
    name: str
    options: Mapping[str, str]
    source_sha256: str
    """Of the file it was found in; empty where there is none."""

    is_handed: bool = False
    """It came from the process that called `fit`; no --task can name it."""

    arrays: Mapping[str, tuple[str, tuple[int, ...]]] | None = None
    """Of a run without task code: the dtype and shape of what is served, by name."""

    def identity(self) -> pb.TaskIdentity:
        """What must be equal on both sides; loads the data, to count it."""
        return pb.TaskIdentity(
            name=self.name,
            options=self.options,
            example_count=self.task.example_count(self.task.batch_size),
            batch_size=self.task.batch_size,
            seed=self.task.seed,
        )

    def software(self) -> dict[str, str]:
        """Versions of what may change a result, on this side."""
        versions = {name: importlib.metadata.version(name) for name in ("jax", "optax", "numpy")}
        versions["python"] = platform.python_version()
        if self.source_sha256:
            versions["task source"] = self.source_sha256[:12]
        if self.task.backend is not None:
            versions |= self.task.backend.software()
        return versions

    def fingerprint(self, devices: int = 1) -> dict[str, str]:
        """What decides the bits of the gradients that are computed here. Starts JAX.

        Args:
          devices: Over how many of them a batch is split.
        """
        backend = self.task.backend
        return {**compute.fingerprint(devices), **(backend.fingerprint() if backend else {})}

    def platform(self) -> str:
        """Where gradients are computed: cpu, gpu or tpu. Starts JAX."""
        backend = self.task.backend
        return backend.platform if backend else jax.default_backend()

    def use(self, platform: str | None) -> None:
        """Compute gradients there, where JAX was told to already (`choose_platform`).

        Raises:
          UsageError: It cannot be had.
        """
        if self.task.backend is not None:
            self.task.backend.use(platform)
        else:
            check_platform(platform)


def load_task(spec: str, options: Sequence[str] = ()) -> LoadedTask:
    """Load TASK with `--task-option NAME=VALUE` texts.

    Puts the file's folder, or the working directory for a module, first on
    sys.path. In a process of `fit`, which hands its task over, TASK is merely its name.

    Raises:
      UsageError: There is no such file, module or name; it is not a task; an
        option does not fit. When the user's own code raises, its traceback is
        part of the message.
    """
    # Read when a library that computes with OpenMP is loaded, as torch is: its threads would
    # wait for one another by spinning, and processes that share cores take them from each
    # other (measured, two threads: 50 to 370 ms for a gradient that takes 3 to 60 so).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _loading():
        if (descriptor := command.handed_task()) is not None:
            what = "the task could not be made again in a process of its own"
            task = _guarded(lambda: handed.read(descriptor), what)
            loaded = LoadedTask(task, spec, {}, "", is_handed=True)
        else:
            loaded = _load(spec, options)
        backend = loaded.task.backend
        if backend is not None:
            _guarded(lambda: backend.check(loaded.task), f"making the model of {spec} raised")
        return loaded


def load_task_on(platform: str | None, spec: str, options: Sequence[str] = ()) -> LoadedTask:
    """Load TASK, and have its gradients computed on cpu, gpu or tpu.

    Only the task says what computes them; where that is PyTorch, JAX need not be there.

    Raises:
      UsageError: See `load_task`; or there is no such platform here.
    """
    choose_platform(platform)
    try:
        loaded = load_task(spec, options)
    except UsageError:
        check_platform(platform)  # which is why, if the task computes while it is loaded
        raise
    loaded.use(platform)
    return loaded


_loads = 0


def is_loading() -> bool:
    """Whether a task is just being loaded, in this process."""
    return _loads > 0


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    global _loads  # noqa: PLW0603  (of the process, as sys.modules is)
    _loads += 1
    try:
        yield
    finally:
        _loads -= 1


def _load(spec: str, options: Sequence[str]) -> LoadedTask:
    given = dict(_split_option(option) for option in options)
    place, _, name = spec.partition(":")
    name = name or "task"
    module = _import_file(Path(place), spec) if place.endswith(".py") else _import_module(place)
    found = getattr(module, name, None)
    if found is None:
        tasks = sorted(n for n, v in vars(module).items() if isinstance(v, Task))
        hint = f"; it has {', '.join(tasks)}: write {place}:{tasks[0]}" if tasks else ""
        raise UsageError(f"{place} has no {name!r}{hint or '; a task is a Task called `task`'}")
    if isinstance(found, Task):
        if given:
            raise UsageError(
                f"{spec} is a Task, which takes no --task-option; make it a function that returns "
                f"one to take {', '.join(given)}"
            )
        task = found
    elif callable(found):
        task = _call(found, given, spec)
    else:
        raise UsageError(
            f"{name} in {place} is {type(found).__name__}; it must be a Task or a function that "
            "returns one"
        )
    stem = Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]
    title = task.name or (stem if name == "task" else f"{stem}-{name}")
    return LoadedTask(task, title, given, _source_sha256(module))


def _split_option(option: str) -> tuple[str, str]:
    name, equals, value = option.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--task-option takes NAME=VALUE, not {option!r}")
    return name, value


def _import_file(path: Path, spec: str) -> types.ModuleType:
    if not path.is_file():
        raise UsageError(f"there is no file {path}; --task {spec} names one")
    folder = str(path.resolve().parent)
    if folder not in sys.path[:1]:
        sys.path.insert(0, folder)
    # Under its own name, so that what the file's helpers import is this module;
    # under another where that name is taken, say by the standard library.
    name = path.stem if path.stem not in sys.modules else f"headwater_task_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path.resolve())
    if found is None or found.loader is None:
        raise UsageError(f"{path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    loader = found.loader
    try:
        _guarded(lambda: loader.exec_module(module), f"{path} raised while it was loaded")
    except UsageError:
        del sys.modules[name]  # half-made
        raise
    return module


def _import_module(name: str) -> types.ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"--task {name!r}: TASK is file.py[:NAME] or package.module[:NAME]")
    if sys.path[:1] != [""]:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(
                f"there is no module {name!r} (looked in the working directory and the installed "
                "packages); a file is named with its .py"
            ) from None
        raise UsageError(f"{name} raised while it was loaded\n{user_traceback(error)}") from None
    except TaskError as error:
        raise UsageError(f"{error}{user_place(error)}") from None
    except (Exception, SystemExit) as error:
        raise UsageError(f"{name} raised while it was loaded\n{user_traceback(error)}") from None


def _call(function: Callable[..., Any], given: Mapping[str, str], spec: str) -> Task:
    parameters = inspect.signature(function).parameters
    for name in given:
        if name not in parameters:
            takes = ", ".join(parameters) or "none"
            raise UsageError(f"{spec} takes no --task-option {name!r}; it takes: {takes}")
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in given
    ]
    if missing:
        raise UsageError(f"{spec} needs --task-option {missing[0]}=VALUE")
    hints = _guarded(lambda: _annotations(function), f"{spec}'s annotations raise")
    values = {name: _convert(name, text, hints.get(name)) for name, text in given.items()}
    task = _guarded(lambda: function(**values), f"{spec} raised")
    if not isinstance(task, Task):
        raise UsageError(f"{spec} returned {type(task).__name__}, not a Task")
    return task


def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of the arguments of a function, a partial one, or an object that is called."""
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function) and not inspect.isclass(function):
        function = type(function).__call__
    return typing.get_type_hints(function)


def _without_none(annotation: Any) -> Any:
    """`str` for `str | None`: what is given is never None."""
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return kinds[0] if is_union and len(kinds) == 1 else annotation


def _convert(name: str, text: str, annotation: Any) -> Any:
    annotation = _without_none(annotation)
    if annotation in (str, Path):
        return annotation(text)
    if annotation is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in known:
            raise UsageError(f"--task-option {name}={text}: takes true or false")
        return known[text.lower()]
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            kind = "a whole number" if annotation is int else "a number"
            raise UsageError(f"--task-option {name}={text}: takes {kind}") from None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _guarded(call: Callable[[], Any], what: str) -> Any:
    try:
        return call()
    except UsageError:
        raise
    except TaskError as error:
        raise UsageError(f"{error}{user_place(error)}") from None
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what}\n{user_traceback(error)}") from None


def _source_sha256(module: types.ModuleType) -> str:
    path = getattr(module, "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""

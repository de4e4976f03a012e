"""Pickles of tasks, by cloudpickle: a function that can be imported as its name, others whole.

It is told here more exactly which is which: what JAX made of a function may be importable
though it is none, and may look importable though it is not; a module that pytest loaded
cannot be imported by others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import operator
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import cloudpickle
import jax

from headwater.worker.task import Task
from headwater.worker.user_code import is_users

_INSTALLED = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib"))


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle, and what libraries make of functions."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, FunctionType) and not _has_a_home(value):
            if library := _library_of(value):
                return _reduced(value, library)
        elif isinstance(value, CodeType):
            # Which cloudpickle leaves out, and a traceback is made of.
            return _code_of_file, (value.co_filename, *self.dispatch_table[CodeType](value))
        elif not isinstance(value, type | FunctionType):
            if _has_a_home(value):
                return value.__qualname__  # such as jax.nn.relu, which is jitted
            if isinstance(value, jax.custom_vjp):
                # Its class would insist on the function.
                return object.__new__, (type(value),), vars(value)
        return super().reducer_override(value)


def _code_of_file(name: str, make: Any, arguments: tuple[Any, ...]) -> CodeType:
    return make(*arguments).replace(co_filename=name)


def _library_of(function: FunctionType) -> str | None:
    """The installed module that a function was made in, whatever it calls itself.

    What `jax.checkpoint` gives, say, claims to be of its user's module. It is at home among the
    globals of JAX, copies of which would be others: caches, primitives without their rules.
    """
    name = function.__globals__.get("__name__")
    module = sys.modules.get(name) if isinstance(name, str) else None
    if module is None or vars(module) is not function.__globals__:
        return None
    return name if str(getattr(module, "__file__", None)).startswith(_INSTALLED) else None


def _reduced(function: FunctionType, library: str) -> tuple[Any, ...]:
    cells = function.__closure__ or ()
    state = {
        "closure": [cell.cell_contents for cell in cells],
        "dict": vars(function),
        **{name: getattr(function, name) for name in _ATTRIBUTES},
    }
    # In two steps, for it may be reached from itself.
    return _function_of, (library, function.__code__, len(cells)), state, None, None, _complete


_ATTRIBUTES = ("__defaults__", "__kwdefaults__", "__name__", "__qualname__", "__module__")


def _function_of(library: str, code: CodeType, cell_count: int) -> FunctionType:
    cells = tuple(CellType() for _ in range(cell_count))
    return FunctionType(code, vars(importlib.import_module(library)), closure=cells)


def _complete(function: FunctionType, state: dict[str, Any]) -> None:
    for cell, value in zip(function.__closure__ or (), state["closure"], strict=True):
        cell.cell_contents = value
    vars(function).update(state["dict"])
    for name in _ATTRIBUTES:
        setattr(function, name, state[name])


def _has_a_home(value: Any) -> bool:
    """Whether it is a function in all but its type that every process can import."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not (isinstance(module, str) and isinstance(name, str)):
        return False
    if module == "__main__" or module in cloudpickle.list_registry_pickle_by_value():
        return False
    try:
        return operator.attrgetter(name)(sys.modules.get(module)) is value
    except AttributeError:
        return False


# ------------------------------------------------------- modules that only we have


@contextlib.contextmanager
def modules_nobody_else_finds() -> Iterator[None]:
    """Have functions of modules that are not on sys.path be pickled whole, as a script's own are.

    Such as test modules, which pytest loads from wherever they are.
    """
    before = cloudpickle.list_registry_pickle_by_value()
    ours = [module for name, module in sorted(sys.modules.items()) if _is_hidden(name, module)]
    ours = [module for module in ours if module.__name__ not in before]
    for module in ours:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in ours:
            cloudpickle.unregister_pickle_by_value(module)


def _is_hidden(name: str, module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return (
        isinstance(file, str)
        and not file.startswith(_INSTALLED)  # most of thousands, and told in no time
        and name not in ("__main__", "__mp_main__")
        and getattr(module, "__name__", None) == name
        and is_users(file)
        and not _is_found(name, file)
    )


def _is_found(name: str, file: str | None) -> bool:
    """Whether importing `name` in another process gives what is in `file`."""
    parent = name.rpartition(".")[0]
    path = None
    if parent:
        path = getattr(sys.modules.get(parent), "__path__", None)
        if path is None or not _is_found(parent, getattr(sys.modules[parent], "__file__", None)):
            return False
    for finder in sys.meta_path:
        with contextlib.suppress(Exception):  # anybody's
            if spec := finder.find_spec(name, path):
                return file is None or spec.origin == file
    return False


# --------------------------------------------------------- what cannot be pickled


def uses(task: Task) -> str:
    """`Task.loss uses helper, which uses lock`: the way to what cannot be pickled."""
    way: list[str] = []
    value: Any = task
    seen = {id(task)}
    while True:
        for name, part in _parts(value):
            if id(part) not in seen and not _can_be_pickled(part):
                way.append(name)
                seen.add(id(part))
                value = part
                break
        else:
            break
    first, *others = way or ["something in it"]
    return f"{first} uses {', which uses '.join(others)}" if others else first


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a pickle of `value` would hold, by the names that its author gave them."""
    if isinstance(value, Task):
        for field in dataclasses.fields(value):
            yield f"Task.{field.name}", getattr(value, field.name)
    elif inspect.isfunction(value):
        used = inspect.getclosurevars(value)
        yield from used.nonlocals.items()
        yield from used.globals.items()
        for default in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
            yield "a default", default
    elif inspect.ismethod(value):
        yield f"its {type(value.__self__).__name__}", value.__self__
    elif isinstance(value, functools.partial):
        yield from ((getattr(part, "__name__", "it"), part) for part in (value.func, *value.args))
        yield from value.keywords.items()
    elif isinstance(value, Mapping):
        yield from ((f"its {key!r}", part) for key, part in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        names = getattr(value, "_fields", None) or [f"its item {at}" for at in range(len(value))]
        yield from zip(names, value, strict=True)
    elif hasattr(value, "__wrapped__"):  # jitted, or decorated otherwise
        yield getattr(value, "__name__", "it"), value.__wrapped__
    elif not isinstance(value, type):
        yield from getattr(value, "__dict__", {}).items()


def _can_be_pickled(value: Any) -> bool:
    try:
        Pickler(io.BytesIO()).dump(value)
    except Exception:
        return False
    return True

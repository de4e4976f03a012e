"""The snapshots of a run directory: written, found again, and the old ones removed.

    snapshot-00000000000000014070.safetensors

Also how a version becomes named arrays and comes back: weights under their own
names; the optimizer's state by the paths of its tree, restored into the tree
that `init` gives, because a file holds no functions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from headwater.protos import files, snapshot_file
from headwater.protos.errors import UsageError
from headwater.protos.layout import Layout
from headwater.protos.snapshot_file import (
    Facts,
    NewerFormat,
    Snapshot,
    SnapshotError,
    Unreadable,
)
from headwater.server import failpoints
from headwater.server.optimizer import AbstractOptimizer
from headwater.server.push_sessions import PushSessions
from headwater.server.ranges import Ranges
from headwater.server.settings import Settings
from headwater.server.store import Published
from headwater.worker.tree import ModelTree, PyTree

log = logging.getLogger("headwater.server")

_PREFIX, _SUFFIX = "snapshot-", ".safetensors"


class Snapshots:
    """The files of one folder.

    Args:
      folder: The run directory; this process holds its lock.
      keep: How many to keep, the newest ones.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def path(self, version: int) -> Path:
        # Twenty digits hold every version there can be, so that `ls` shows them in order.
        return self._folder / f"{_PREFIX}{version:020}{_SUFFIX}"

    def versions(self) -> list[int]:
        """Of the files that are there, damaged ones not yet found out included; rising."""
        names = [p.name for p in self._folder.glob(f"{_PREFIX}*{_SUFFIX}")]
        numbers = [name[len(_PREFIX) : -len(_SUFFIX)] for name in names]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def save(self, facts: Facts, arrays: Mapping[str, np.ndarray]) -> None:
        """Make a version durable, and only then remove what is no longer kept.

        Raises:
          OSError: The disk is full or broken; the older snapshots are as they were.
        """
        snapshot_file.write(
            self.path(facts.version),
            facts,
            arrays,
            lambda step: failpoints.reach(f"snapshot-{step}"),
        )
        for version in self.versions()[: -self._keep]:
            # One that cannot be removed only takes room; it is tried again next time.
            with contextlib.suppress(OSError):
                files.DISK.remove(self.path(version))

    def newest(self) -> Snapshot:
        """The newest whole snapshot. Damaged ones on the way are reported and set aside.

        Raises:
          UsageError: There is none, or one cannot be read, or a later Headwater wrote it.
        """
        versions = self.versions()
        for version in reversed(versions):
            path = self.path(version)
            try:
                return snapshot_file.read(path)
            except NewerFormat as error:
                raise UsageError(str(error)) from None
            except Unreadable as error:
                # Perhaps only for now: to go back a version is not ours to decide.
                raise UsageError(
                    f"{error}; nothing was changed. Try again, or move it away to continue with "
                    "the one before it"
                ) from None
            except SnapshotError as error:
                aside = path.with_name(f"{path.name}.damaged")
                log.error("%s; set aside as %s", error, aside.name)
                files.DISK.rename(path, aside)
        found = f"none of its {len(versions)} snapshots is whole" if versions else "no snapshot"
        raise UsageError(
            f"{self._folder} holds a run, but {found}: it cannot be continued. Restore it from a "
            "copy, or start anew in another directory; nothing in it was overwritten"
        )

    def remove_leftovers(self) -> None:
        """Remove what a process that was killed left half-written."""
        for path in self._folder.glob(f"{files.temporary_prefix(Path(_PREFIX))[:-1]}*"):
            files.DISK.remove(path)


def arrays_of(layout: Layout, published: Published) -> tuple[dict[str, np.ndarray], str]:
    """A version's arrays by name, and how the names of the optimizer's begin."""
    names = [spec.name for spec in layout.tensors]
    arrays = dict(zip(names, map(np.asarray, published.tensors), strict=True))
    prefix = "optimizer/"
    while any(name.startswith(prefix) for name in names):
        prefix = f"_{prefix}"
    leaves = jax.tree.leaves(published.optimizer_state)
    for name, leaf in zip(_state_names(published.optimizer_state, prefix), leaves, strict=True):
        arrays[name] = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
    return arrays, prefix


def restored(
    snapshot: Snapshot, tree: ModelTree, optimizer: AbstractOptimizer, incarnation: int
) -> Published:
    """The version that a snapshot holds.

    Raises:
      UsageError: Its weights are another model's, or its state another optimizer's.
    """
    facts, arrays = snapshot.facts, snapshot.arrays
    for spec in tree.layout.tensors:
        found = arrays.get(spec.name)
        if found is None or (found.dtype, found.shape) != (spec.dtype, spec.shape):
            raise UsageError(
                f"the run's snapshot has {_describe(found)} for {spec.name}, the task has "
                f"{spec.describe()}: it is a run of another task"
            )
    params, state, constants = tree.split(
        [jnp.asarray(arrays[spec.name]) for spec in tree.layout.tensors]
    )
    prefix, text = facts.optimizer_prefix, facts.optimizer
    return Published(
        incarnation=incarnation,
        version=facts.version,
        leaves=(*params, *state),
        constants=tuple(constants),
        optimizer_state=_state(arrays, prefix, text, params, tree, optimizer),
        applied=_ranges(facts.applied),
        left_out=_ranges(facts.left_out),
        settings=Settings.from_json(facts.settings),
        sessions=PushSessions.from_json(facts.sessions),
    )


def handed_over(
    published: Published,
    tree: ModelTree,
    before: AbstractOptimizer,
    optimizer: AbstractOptimizer,
    incarnation: int,
) -> Published:
    """A version as the next incarnation goes on from it, with an optimizer that may be another.

    The same as writing a snapshot and reading it: the state's arrays stay, what kind
    of numbers they were is what the new optimizer makes of them.

    Raises:
      UsageError: The state does not fit the new optimizer.
    """
    arrays, prefix = arrays_of(tree.layout, published)
    moving = tree.layout.moving.tensors
    leaves = tuple(jnp.asarray(arrays[spec.name]) for spec in moving)
    params, _, _ = tree.split(leaves)
    state = _state(arrays, prefix, before.text, params, tree, optimizer)
    return dataclasses.replace(
        published, incarnation=incarnation, leaves=leaves, optimizer_state=state
    )


def _state(
    arrays: Mapping[str, np.ndarray],
    prefix: str,
    trained_with: str,
    params: Sequence[jax.Array],
    tree: ModelTree,
    optimizer: AbstractOptimizer,
) -> PyTree:
    """The optimizer's state from its arrays, in the tree that `init` gives."""
    template = optimizer.init(tree.trained.restore(params))
    names = _state_names(template, prefix)
    kept = {name for name in arrays if name.startswith(prefix)}
    leaves = jax.tree.leaves(template)
    fits = kept == set(names) and all(
        _shape(leaf) == (arrays[name].dtype, arrays[name].shape)
        for name, leaf in zip(names, leaves, strict=True)
    )
    if not fits:
        raise UsageError(
            f"the run was trained with {trained_with}, whose state does not fit "
            f"{optimizer.text}; continue it with the optimizer that it had"
        )
    state = [_leaf(arrays[name], leaf) for name, leaf in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(template), state)


def _ranges(pairs: snapshot_file.Pairs) -> Ranges:
    return Ranges(tuple((start, end) for start, end in pairs))


def _state_names(state: PyTree, prefix: str) -> list[str]:
    """A name for each leaf, by its path; the second leaf of one name gets a number."""
    names: dict[str, None] = {}
    for path, _ in tree_flatten_with_path(state)[0]:
        name = base = prefix + keystr(path, simple=True, separator="/")
        number = 1
        while name in names:
            number += 1
            name = f"{base}#{number}"
        names[name] = None
    return list(names)


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _shape(leaf: Any) -> tuple[np.dtype, tuple[int, ...]]:
    array = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    return np.dtype(array.dtype), tuple(array.shape)


def _leaf(array: np.ndarray, like: Any) -> jax.Array:
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    return jnp.asarray(array)


def _describe(array: np.ndarray | None) -> str:
    if array is None:
        return "nothing"
    return f"{array.dtype.name}[{','.join(map(str, array.shape))}]"

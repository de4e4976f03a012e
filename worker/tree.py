"""From the user's trees to named tensors, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import GetAttrKey, keystr

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.layout import (
    CONSTANT,
    PARAMETER,
    SERVED,
    STATE,
    Described,
    Layout,
    LayoutError,
)

PyTree = Any


class Branch:
    """One tree's structure; its leaves are given and taken in layout order."""

    def __init__(self, treedef: Any, order: Sequence[int]) -> None:
        self._treedef = treedef
        self._order = order
        self._places = {leaf: place for place, leaf in enumerate(order)}
        self._is_straight = list(order) == list(range(len(order)))

    def leaves(self, tree: PyTree) -> list[Any]:
        """The leaves of a tree of this structure."""
        found = self._treedef.flatten_up_to(tree)
        return list(found) if self._is_straight else [found[leaf] for leaf in self._order]

    def restore(self, leaves: Sequence[Any]) -> PyTree:
        """The tree with these leaves."""
        if not self._is_straight:
            leaves = [leaves[self._places[leaf]] for leaf in range(len(self._order))]
        return self._treedef.unflatten(leaves)


class ModelTree:
    """What a task's `init` gives: a layout for the wire, and the trees around its tensors.

    Args:
      made: The parameters, or with state (parameters, state); arrays or their shapes.
      has_state: Whether there is state.
      trainable: (name) -> whether a parameter is trained; the others are constants.
        None: all are.

    Raises:
      LayoutError: A leaf is not an array that can be served in its role, two leaves
        have one name, there is nothing to train, or `made` is no such pair; names it.
    """

    def __init__(
        self,
        made: PyTree,
        *,
        has_state: bool = False,
        trainable: Callable[[str], bool] | None = None,
    ) -> None:
        self.has_state = has_state
        params, state = self._split(made)
        named = [(_name(path), leaf) for path, leaf in _flat(params)]
        trained = [trainable is None or bool(trainable(name)) for name, _ in named]
        first = [at for at, is_trained in enumerate(trained) if is_trained]
        last = [at for at, is_trained in enumerate(trained) if not is_trained]
        if named and not first:
            raise LayoutError(f"Task.trainable left nothing to train of {', '.join(dict(named))}")
        self.layout = Layout.of(
            (_described(*named[at], PARAMETER) for at in first),
            (_described(_name(path), leaf, STATE) for path, leaf in _flat(state)),
            (_described(*named[at], CONSTANT) for at in last),
        )
        treedef: Any = jax.tree.structure(params)
        self._params = Branch(treedef, [*first, *last])
        self._state = Branch(jax.tree.structure(state), range(len(_flat(state))))
        self._first, self._moving = len(first), len(self.layout.moving.tensors)
        holes = [0 if is_trained else None for is_trained in trained]
        self.trained = Branch(
            treedef if not last else jax.tree.structure(treedef.unflatten(holes)),
            range(len(first)),
        )
        """The parameters alone, as the optimizer sees them: None in place of a constant."""

    @property
    def names(self) -> list[str]:
        """Of the tensors, in layout order."""
        return [t.name for t in self.layout.tensors]

    @property
    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Of the tensors, in layout order."""
        return [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in self.layout.tensors]

    @property
    def trained_shapes(self) -> PyTree:
        """The tree `trained`, with shapes and dtypes for arrays."""
        return self.trained.restore(self.split(self.shapes)[0])

    def split(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """The parameters, the state, and the constants, of tensors in layout order.

        Those at the end may be missing.
        """
        first, moving = self._first, self._moving
        return list(leaves[:first]), list(leaves[first:moving]), list(leaves[moving:])

    def check(self, made: PyTree) -> None:
        """What `init` really returned; tracing it made arrays of Python's own numbers.

        Raises:
          LayoutError: A leaf is not an array; names it.
        """
        for name, leaf in zip(self.names, self.leaves(made), strict=True):
            _described(name, leaf, CONSTANT)

    def leaves(self, made: PyTree) -> list[Any]:
        """In layout order, of what `init` gives."""
        params, state = self._split(made)
        found = self._params.leaves(params)
        return [*found[: self._first], *self._state.leaves(state), *found[self._first :]]

    def restore(self, leaves: Sequence[Any]) -> PyTree:
        """As `init` gives it, from all tensors in layout order."""
        params = self.params(leaves)
        return (params, self.state(leaves)) if self.has_state else params

    def params(self, leaves: Sequence[Any]) -> PyTree:
        """The user's parameters, constants among them, from all tensors in layout order."""
        first, _, last = self.split(leaves)
        return self._params.restore([*first, *last])

    def state(self, leaves: Sequence[Any]) -> PyTree:
        """The user's state, from the tensors in layout order."""
        return self._state.restore(self.split(leaves)[1])

    def state_leaves(self, state: PyTree) -> list[Any]:
        """Of the user's state, in layout order.

        Raises:
          ValueError: It is another tree.
        """
        return self._state.leaves(state)

    def restore_named(self, weights: Mapping[str, Any]) -> PyTree:
        """As `init` gives it, from named arrays.

        Raises:
          LayoutError: A name is missing or unknown, or a shape differs.
        """
        unknown = weights.keys() - set(self.names)
        missing = set(self.names) - weights.keys()
        if unknown or missing:
            raise LayoutError(
                "these weights are of another model: "
                f"missing {sorted(missing)[:5]}, unknown {sorted(unknown)[:5]}"
            )
        for spec in self.layout.tensors:
            shape = np.shape(weights[spec.name])
            if shape != spec.shape:
                raise LayoutError(
                    f"{spec.name} has shape {list(shape)}, the model's is {list(spec.shape)}"
                )
        return self.restore([weights[name] for name in self.names])

    def _split(self, made: PyTree) -> tuple[PyTree, PyTree]:
        if not self.has_state:
            return made, ()
        if not isinstance(made, tuple) or len(made) != 2:
            raise LayoutError(
                f"Task.init gave {type(made).__name__}; with has_state it is (params, state)"
            )
        return made


def described(tree: PyTree) -> Any:
    """Structure, shapes and dtypes: equal where one compiled function serves both. Hashable."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple(
        (np.shape(leaf), getattr(leaf, "dtype", None) or np.result_type(leaf)) for leaf in leaves
    )


def _flat(tree: PyTree) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = jax.tree_util.tree_flatten_with_path(tree)[0]
    return found


def _name(path: tuple[Any, ...]) -> str:
    # Flax NNX ends the path of every variable in the attribute `value`.
    if len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return keystr(path, simple=True, separator="/") or "parameters"


_REMEDIES = {
    PARAMETER: "a parameter is floating or complex. Keep counters in the state (has_state), and "
    "masks out of the parameters, or make them constants (trainable)",
    STATE: "state consists of numbers",
    CONSTANT: "it cannot be served",
}


def _described(name: str, leaf: Any, role: pb.Role) -> Described:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape"):
        raise LayoutError(f"{name} is {leaf!r}, not an array; `init` gives a tree of arrays")
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        raise LayoutError(f"{name} is a PRNG key; dropout keys come from the loss's own `key`")
    if np.dtype(dtype).name not in SERVED[role]:
        raise LayoutError(f"{name} has dtype {np.dtype(dtype).name}; {_REMEDIES[role]}")
    return name, np.dtype(dtype), tuple(leaf.shape)

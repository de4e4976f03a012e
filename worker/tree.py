"""From the user's tree of parameters to named tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import GetAttrKey, keystr

from headwater.protos.layout import DTYPES, Layout, LayoutError

PyTree = Any


class ParameterTree:
    """The shape of a task's parameters: a layout for the wire and the tree around it.

    Raises:
      LayoutError: A leaf is not a floating or complex array, or two leaves have
        one name; names the leaf.
    """

    def __init__(self, params: PyTree) -> None:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        self.treedef: Any = treedef
        self.layout = Layout.of(
            (_name(path), _dtype(_name(path), leaf), leaf.shape) for path, leaf in leaves
        )

    @property
    def names(self) -> list[str]:
        """Of the leaves, in the tree's order, which is the layout's."""
        return [t.name for t in self.layout.tensors]

    @property
    def shapes(self) -> PyTree:
        """The user's tree, with shapes and dtypes for arrays."""
        return self.restore([jax.ShapeDtypeStruct(t.shape, t.dtype) for t in self.layout.tensors])

    def check(self, params: PyTree) -> None:
        """What `init` really returned; tracing it made arrays of Python's own numbers.

        Raises:
          LayoutError: A leaf is not an array; names it.
        """
        for name, leaf in zip(self.names, self.leaves(params), strict=True):
            _dtype(name, leaf)

    def leaves(self, params: PyTree) -> list[Any]:
        """The leaves of a tree of this structure, in layout order."""
        return list(self.treedef.flatten_up_to(params))

    def restore(self, leaves: Sequence[Any]) -> PyTree:
        """The user's tree with these leaves, given in layout order."""
        return self.treedef.unflatten(leaves)

    def restore_named(self, weights: Mapping[str, Any]) -> PyTree:
        """The user's tree from named arrays.

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


def described(tree: PyTree) -> Any:
    """Structure, shapes and dtypes: equal where one compiled function serves both. Hashable."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple(
        (np.shape(leaf), getattr(leaf, "dtype", None) or np.result_type(leaf)) for leaf in leaves
    )


def _name(path: tuple[Any, ...]) -> str:
    # Flax NNX ends the path of every variable in the attribute `value`.
    if len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return keystr(path, simple=True, separator="/") or "parameters"


def _dtype(name: str, leaf: Any) -> np.dtype:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape"):
        raise LayoutError(f"{name} is {leaf!r}, not an array; `init` gives a tree of arrays")
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        raise LayoutError(f"{name} is a PRNG key; dropout keys come from the loss's own `key`")
    if np.dtype(dtype).name not in DTYPES:
        raise LayoutError(
            f"{name} has dtype {np.dtype(dtype).name}; a parameter is floating or complex. Keep "
            "counters and masks out of the parameters"
        )
    return np.dtype(dtype)

"""From trees of parameters to named tensors and back, and what is no parameter."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headwater.protos.layout import LayoutError
from headwater.worker.tree import ModelTree

# The same examples every time and no limits of time: the verdict is about the code alone.
quick = settings(
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    kernel: Any
    bias: Any
    activation: str = dataclasses.field(default="relu", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Variable:
    """Like a variable of Flax NNX: the array is its attribute `value`."""

    value: Any


class Scale(NamedTuple):
    gamma: Any
    beta: Any


arrays = st.builds(
    np.ones,
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from([np.float16, np.float32, np.complex64]),
)


def _nodes(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    few = st.lists(children, max_size=3)
    return st.one_of(
        few,
        few.map(tuple),
        st.dictionaries(st.sampled_from(["w", "b", "layer 1", "Öl"]), children, max_size=3),
        st.builds(Dense, children, children, st.sampled_from(["relu", "tanh"])),
        st.builds(Scale, children, children),
    )


trees = st.recursive(arrays | st.none(), _nodes, max_leaves=8).filter(jax.tree.leaves)


def look_up(tree: Any, name: str) -> Any:
    """What a person finds who follows `name` through the tree."""
    for step in name.split("/"):
        if isinstance(tree, dict):
            tree = tree[step]
        elif step.isdecimal():
            tree = tree[int(step)]
        else:
            tree = getattr(tree, step)
    return tree


@quick
@given(trees.filter(lambda tree: not isinstance(tree, np.ndarray)))
def test_a_name_is_the_path_to_its_leaf(params: Any) -> None:
    tree = ModelTree(params)

    for name, leaf in zip(tree.names, tree.leaves(params), strict=True):
        assert look_up(params, name) is leaf


@quick
@given(trees)
def test_the_layout_lists_the_leaves_in_the_trees_order(params: Any) -> None:
    tree = ModelTree(params)

    leaves = jax.tree.leaves(params)
    assert [(t.dtype, t.shape) for t in tree.layout.tensors] == [(x.dtype, x.shape) for x in leaves]
    assert all(a is b for a, b in zip(tree.leaves(params), leaves, strict=True))
    assert len(set(tree.names)) == len(leaves)


@quick
@given(trees)
def test_restored_leaves_are_the_users_own_tree(params: Any) -> None:
    tree = ModelTree(params)

    restored = tree.restore(tree.leaves(params))

    assert jax.tree.structure(restored) == jax.tree.structure(params)
    assert all(
        a is b for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True)
    )


@quick
@given(trees, st.randoms(use_true_random=False))
def test_named_weights_are_restored_in_whatever_order_they_come(params: Any, random: Any) -> None:
    tree = ModelTree(params)
    named = list(zip(tree.names, tree.leaves(params), strict=True))
    random.shuffle(named)

    restored = tree.restore_named(dict(named))

    assert jax.tree.structure(restored) == jax.tree.structure(params)
    assert all(
        a is b for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True)
    )


@quick
@given(trees)
def test_a_worker_that_only_traces_the_tree_has_the_same_layout(params: Any) -> None:
    traced = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert ModelTree(traced).layout == ModelTree(params).layout


X = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (X, ["parameters"]),
        ({"b": X, "a": X}, ["a", "b"]),
        ([X, (X, X)], ["0", "1/0", "1/1"]),
        ({"encoder": [{"kernel": X}, {"kernel": X}]}, ["encoder/0/kernel", "encoder/1/kernel"]),
        (Dense(kernel=X, bias=X), ["kernel", "bias"]),
        ({"dense": Dense(kernel=X, bias=None)}, ["dense/kernel"]),
        ({"norm": Scale(gamma=X, beta=X)}, ["norm/gamma", "norm/beta"]),
        ([None, X, None], ["1"]),
        ({2: X, 10: X}, ["2", "10"]),
        ({"dense": {"kernel": Variable(X), "bias": Variable(X)}}, ["dense/bias", "dense/kernel"]),
        ({"value": X}, ["value"]),
        ({"dense": {"value": X}}, ["dense/value"]),
        (Variable(X), ["value"]),
    ],
)
def test_names_read_like_paths(params: Any, names: list[str]) -> None:
    assert ModelTree(params).names == names


def test_flax_nnx_variables_are_named_as_flax_names_them() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.eval_shape(lambda: nnx.List([nnx.Linear(1, 2, rngs=nnx.Rngs(0))]))
    assert ModelTree(nnx.state(model, nnx.Param)).names == ["0/bias", "0/kernel"]


def test_what_is_no_array_comes_back_as_it_was() -> None:
    params = {"empty": {}, "none": [None, ()], "dense": Dense(X, None, activation="tanh")}
    tree = ModelTree(params)

    assert tree.names == ["dense/kernel"]
    restored = tree.restore([X + 1])
    assert restored["empty"] == {}
    assert restored["none"] == [None, ()]
    assert restored["dense"].activation == "tanh"
    assert restored["dense"].bias is None


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"steps": np.zeros(3, np.int32)}, "steps has dtype int32; a parameter is floating or"),
        ({"mask": np.zeros(3, bool)}, "mask has dtype bool; a parameter is floating or complex"),
        ({"w": {"rate": 0.5}}, r"w/rate is 0.5, not an array; `init` gives a tree of arrays"),
        ([X, 1], "1 is 1, not an array"),
        ({"names": "abc"}, "names is 'abc', not an array"),
        (1.5, "parameters is 1.5, not an array"),
        ({"dropout": {"key": jax.eval_shape(jax.random.key, 0)}}, "dropout/key is a PRNG key; "),
        ({"words": np.array(["a"])}, "words has dtype str32"),
        ({"a/b": X, "a": {"b": X}}, "two tensors are called 'a/b'; names must be unique"),
        ({"w": X, "v": {"w": Variable(X), "w/value": X}, "v/w": X}, "two tensors are called 'v/w'"),
        ({"": X, "parameters": X}, "two tensors are called 'parameters'"),
        ({}, "there is no tensor to train"),
        (None, "there is no tensor to train"),
        ({"w": [None, {}]}, "there is no tensor to train"),
    ],
)
def test_what_is_no_tree_of_parameters_is_refused(params: Any, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        ModelTree(params)


def test_a_real_prng_key_is_refused() -> None:
    with pytest.raises(LayoutError, match="key is a PRNG key; dropout keys come from the loss"):
        ModelTree({"w": X, "key": jax.random.key(0)})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": X}, r"another model: missing \['b'\], unknown \[\]"),
        ({"a": X, "b": X, "c": X}, r"another model: missing \[\], unknown \['c'\]"),
        ({"a": X, "B": X}, r"another model: missing \['b'\], unknown \['B'\]"),
        ({"a": X, "b": X[:1]}, r"b has shape \[1\], the model's is \[2\]"),
        ({"a": X, "b": X[None]}, r"b has shape \[1, 2\], the model's is \[2\]"),
    ],
)
def test_named_weights_of_another_model_are_refused(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        ModelTree({"a": X, "b": X}).restore_named(weights)


def test_leaves_of_a_tree_of_another_structure_are_refused() -> None:
    with pytest.raises(ValueError, match="key"):
        ModelTree({"a": X, "b": X}).leaves({"a": X, "c": X})

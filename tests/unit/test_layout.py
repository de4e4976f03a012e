"""Where tensors lie in the buffer, which layouts are refused, and what makes two the same."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.layout import (
    ALIGNMENT,
    DTYPES,
    FLOATING,
    MAX_DIMENSIONS,
    Layout,
    LayoutError,
    differences,
)

# The same examples every time and no limits of time: the verdict is about the code alone.
steady = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
quick = settings(steady, max_examples=100)

Tensor = tuple[str, np.dtype, tuple[int, ...]]

F32, C64 = np.dtype(np.float32), np.dtype(np.complex64)
BF16 = np.dtype(ml_dtypes.bfloat16)
A: Tensor = ("a", F32, (2,))
B: Tensor = ("b", C64, (3, 1))

names = st.text(min_size=1, max_size=8)
dtypes = st.sampled_from(list(FLOATING.values()))
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
tensor_lists = st.lists(
    st.tuples(names, dtypes, shapes), min_size=1, max_size=5, unique_by=lambda t: t[0]
)


def bits(dtype: np.dtype, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """An array of random bits: NaNs of every kind, infinities, negative zeros."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.random.default_rng(seed).bytes(count * dtype.itemsize)
    return np.frombuffer(raw, dtype).reshape(shape)


@quick
@given(tensor_lists, st.integers(0, 2**32))
def test_what_is_packed_is_viewed_bit_for_bit(tensors: list[Tensor], seed: int) -> None:
    layout = Layout.of(tensors)
    arrays = [bits(dtype, shape, seed + i) for i, (_, dtype, shape) in enumerate(tensors)]

    buffer = layout.empty()
    layout.pack(arrays, buffer)
    views = layout.views(buffer)

    assert list(views) == [name for name, _, _ in tensors]
    for view, array in zip(views.values(), arrays, strict=True):
        assert (view.dtype, view.shape) == (array.dtype, array.shape)
        assert view.tobytes() == array.tobytes()


@quick
@given(tensor_lists, st.integers(0, 2**32), st.integers(1, 300))
def test_parts_that_are_cut_are_those_of_the_packed_buffer(
    tensors: list[Tensor], seed: int, part_bytes: int
) -> None:
    layout = Layout.of(tensors)
    arrays = [bits(dtype, shape, seed + i) for i, (_, dtype, shape) in enumerate(tensors)]
    buffer = layout.empty()
    layout.pack(arrays, buffer)

    cut = [(offset, b"".join(pieces)) for offset, pieces in layout.cut(arrays, part_bytes)]

    assert b"".join(part for _, part in cut) == buffer.tobytes()
    assert [offset for offset, _ in cut] == list(range(0, max(len(buffer), 1), part_bytes))
    assert all(len(part) == part_bytes for _, part in cut[:-1])


def test_what_is_cut_is_not_copied_unless_it_is_not_contiguous() -> None:
    layout = Layout.of([("a", F32, (300,)), ("b", F32, (2, 3))])
    a, b = np.arange(300, dtype=F32), np.zeros((3, 2), F32).T

    ((_, pieces),) = layout.cut([a, b], 1 << 20)

    assert np.shares_memory(np.frombuffer(pieces[0], np.uint8), a)
    assert b"".join(pieces)[-24:] == bytes(24)


@pytest.mark.parametrize("name", DTYPES)
def test_every_bit_pattern_of_a_byte_survives_in_every_dtype(name: str) -> None:
    pattern = np.arange(256, dtype=np.uint8)
    array = np.repeat(pattern, DTYPES[name].itemsize).view(DTYPES[name])
    layout = Layout.of([("scalar first", F32, ())], (), [("x", array.dtype, array.shape)])

    buffer = layout.empty()
    layout.pack([np.zeros((), F32), array], buffer)

    assert layout.views(buffer)["x"].tobytes() == array.tobytes()


def test_arrays_that_are_not_contiguous_are_packed_row_by_row() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)[::-1]
    layout = Layout.of([("x", F32, array.shape)])

    buffer = layout.empty()
    layout.pack([array], buffer)

    np.testing.assert_array_equal(layout.views(buffer)["x"], array)


@quick
@given(tensor_lists)
def test_tensors_follow_each_other_at_multiples_of_64_bytes(tensors: list[Tensor]) -> None:
    layout = Layout.of(tensors)

    assert layout.tensors[0].offset == 0
    for before, after in zip(layout.tensors, layout.tensors[1:], strict=False):
        assert after.offset % 64 == 0
        assert 0 <= after.offset - before.end < 64
    assert layout.total_bytes == layout.tensors[-1].end
    assert layout.parameter_count == sum(np.zeros(shape).size for _, _, shape in tensors)


@quick
@given(tensor_lists)
def test_an_empty_buffer_is_aligned_and_zero(tensors: list[Tensor]) -> None:
    layout = Layout.of(tensors)

    buffer = layout.empty()

    assert buffer.nbytes == layout.total_bytes
    assert buffer.nbytes == 0 or buffer.ctypes.data % ALIGNMENT == 0
    assert not buffer.any()


def test_views_are_no_copies() -> None:
    layout = Layout.of([("a", F32, (2,)), ("b", C64, ())])
    buffer = layout.empty()

    layout.views(buffer)["b"][()] = 1j

    assert layout.views(buffer)["b"] == 1j


@pytest.mark.parametrize(
    ("array", "got"),
    [(np.zeros((3, 2), F32), r"float32\[3,2\]"), (np.zeros((2, 3), C64), r"complex64\[2,3\]")],
)
def test_an_array_that_is_not_its_tensor_is_not_packed(array: np.ndarray, got: str) -> None:
    layout = Layout.of([("w", F32, (2, 3))])

    with pytest.raises(LayoutError, match=rf"w is {got}, the layout says float32\[2,3\]"):
        layout.pack([array], layout.empty())
    with pytest.raises(LayoutError, match=rf"w is {got}, the layout says float32\[2,3\]"):
        list(layout.cut([array], 8))


@quick
@given(tensor_lists)
def test_a_layout_crosses_the_wire_unchanged(tensors: list[Tensor]) -> None:
    layout = Layout.of(tensors)

    read = Layout.from_proto(pb.Layout.FromString(layout.to_proto().SerializeToString()))

    assert read == layout
    assert read.fingerprint == layout.fingerprint


def _renamed(data: st.DataObject, tensors: list[Tensor], at: int) -> list[Tensor]:
    name = data.draw(names.filter(lambda n: n not in {t[0] for t in tensors}))
    return [*tensors[:at], (name, *tensors[at][1:]), *tensors[at + 1 :]]


def _of_another_dtype(data: st.DataObject, tensors: list[Tensor], at: int) -> list[Tensor]:
    name, dtype, shape = tensors[at]
    other = data.draw(dtypes.filter(lambda d: d != dtype))
    return [*tensors[:at], (name, other, shape), *tensors[at + 1 :]]


def _of_another_shape(data: st.DataObject, tensors: list[Tensor], at: int) -> list[Tensor]:
    name, dtype, shape = tensors[at]
    # The same elements under another shape above all.
    near = st.sampled_from([(*shape, 1), (1, *shape), shape[::-1], (int(np.prod(shape)),)])
    other = data.draw((near | shapes).filter(lambda s: s != shape))
    return [*tensors[:at], (name, dtype, other), *tensors[at + 1 :]]


def _with_one_more(data: st.DataObject, tensors: list[Tensor], at: int) -> list[Tensor]:
    name = data.draw(names.filter(lambda n: n not in {t[0] for t in tensors}))
    return [*tensors[:at], (name, F32, (0,)), *tensors[at:]]


def _in_another_order(data: st.DataObject, tensors: list[Tensor], at: int) -> list[Tensor]:
    assume(at > 0)
    return [tensors[at], *tensors[:at], *tensors[at + 1 :]]


Change = Callable[[st.DataObject, list[Tensor], int], list[Tensor]]


@pytest.mark.parametrize(
    "change",
    [_renamed, _of_another_dtype, _of_another_shape, _with_one_more, _in_another_order],
)
@settings(steady, max_examples=40)
@given(tensors=tensor_lists, data=st.data())
def test_any_change_changes_the_fingerprint_and_is_named(
    change: Change, tensors: list[Tensor], data: st.DataObject
) -> None:
    ours = Layout.of(tensors)
    theirs = Layout.of(change(data, tensors, data.draw(st.integers(0, len(tensors) - 1))))

    assert ours.fingerprint != theirs.fingerprint
    assert differences(ours, theirs)
    assert differences(theirs, ours)


@quick
@given(tensor_lists)
def test_a_layout_does_not_differ_from_itself(tensors: list[Tensor]) -> None:
    assert Layout.of(tensors).fingerprint == Layout.of(tensors).fingerprint
    assert differences(Layout.of(tensors), Layout.of(tensors)) == []


def test_a_fingerprint_is_the_same_in_every_process_and_release() -> None:
    layout = Layout.of([("dense/kernel", F32, (784, 64)), ("dense/scale", BF16, ())])

    assert layout.fingerprint == "78be552408c8edfaa33e3ebbf5ebdc2d754f8b9ef470766f495a241ef369bd05"


def _tensor(**changed: object) -> pb.Tensor:
    fields: dict[str, object] = {
        "name": "w", "role": pb.ROLE_PARAMETER, "dtype": "float32", "shape": [2], "offset": 0,
    }  # fmt: skip
    return pb.Tensor(**(fields | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "there is no tensor to train"),
        ([_tensor(name="")], "tensor 0 has no name"),
        ([_tensor(), _tensor(name="", offset=64)], "tensor 1 has no name"),
        ([_tensor(), _tensor(offset=64)], "two tensors are called 'w'; names must be unique"),
        ([_tensor(dtype="int32")], "'w' has dtype 'int32'; a parameter is one of float16, "),
        ([_tensor(dtype="object")], "'w' has dtype 'object'"),
        ([_tensor(dtype="f4,f4")], "'w' has dtype 'f4,f4'"),
        ([_tensor(dtype=">f4")], "'w' has dtype '>f4'"),
        ([_tensor(dtype="")], "'w' has dtype ''"),
        ([_tensor(role=pb.ROLE_UNSPECIFIED)], "'w' has role 0, which is none"),
        ([_tensor(role=pb.ROLE_STATE)], "there is no tensor to train"),
        (
            [
                _tensor(),
                _tensor(name="c", role=pb.ROLE_CONSTANT, offset=64),
                _tensor(name="s", role=pb.ROLE_STATE, offset=128),
            ],
            "'s', a state, comes after a constant",
        ),
        (
            [_tensor(), _tensor(name="s", role=pb.ROLE_STATE, dtype="bool", offset=64)],
            "'s' has dtype 'bool'; a state is one of float16",
        ),
        ([_tensor(role=99)], "'w' has role 99, which is none"),
        ([_tensor(offset=64)], "'w' starts at byte 64; in its place .* it starts at 0"),
        ([_tensor(), _tensor(name="b", offset=0)], "'b' starts at byte 0; .* it starts at 64"),
        ([_tensor(), _tensor(name="b", offset=8)], "'b' starts at byte 8; .* it starts at 64"),
        ([_tensor(), _tensor(name="b", offset=128)], "'b' starts at byte 128; .* at 64"),
        ([_tensor(shape=[2**63])], r"'w' of shape \(9223372036854775808,\) is too large"),
        ([_tensor(shape=[2**32, 2**32])], r"'w' of shape \(4294967296, 4294967296\) is too large"),
        ([_tensor(shape=[1] * (MAX_DIMENSIONS + 1))], "'w' of shape .* is too large"),
    ],
)
def test_a_peers_layout_that_breaks_a_rule_is_refused(
    tensors: list[pb.Tensor], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        Layout.from_proto(pb.Layout(tensors=tensors))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "there is no tensor to train: `init` gave no parameter"),
        ([("", F32, ())], "tensor 0 has no name"),
        ([("w", F32, ()), ("w", C64, ())], "two tensors are called 'w'"),
        ([("w", np.dtype(np.int32), ())], "'w' has dtype 'int32'"),
        ([("w", np.dtype(bool), ())], "'w' has dtype 'bool'"),
    ],
)
def test_parameters_that_make_no_layout_are_refused(tensors: list[Tensor], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Layout.of(tensors)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([A], [("a", BF16, (2,))], ["a: here float32[2], there bfloat16[2]"]),
        ([A], [("a", F32, ())], ["a: here float32[2], there float32[]"]),
        ([A, B], [A], ["b: here complex64[3,1], there missing"]),
        ([A], [A, B], ["b: here missing, there complex64[3,1]"]),
        ([A, B], [B, A], ["the same tensors in another order: a here where b is there"]),
    ],
    ids=["dtype", "shape", "missing there", "missing here", "order"],
)
def test_differences_are_named_tensor_by_tensor(
    ours: list[Tensor], theirs: list[Tensor], expected: list[str]
) -> None:
    assert differences(Layout.of(ours), Layout.of(theirs)) == expected


def test_of_many_differences_the_rest_is_counted() -> None:
    ours = Layout.of([(f"layer{i}", F32, ()) for i in range(5)])
    theirs = Layout.of([(f"layer{i}", F32, (1,)) for i in range(5)])

    assert differences(ours, theirs, limit=2) == [
        "layer0: here float32[], there float32[1]",
        "layer1: here float32[], there float32[1]",
        "and 3 more",
    ]
    assert len(differences(ours, theirs, limit=5)) == 5


def test_a_parameter_can_have_every_floating_and_complex_dtype_of_jax() -> None:
    """Those of 4 and 6 bits left out: their elements share bytes."""
    offered = {np.dtype(kind.dtype) for kind in vars(jnp).values() if _is_scalar_type(kind)}
    inexact = {d for d in offered if jnp.issubdtype(d, jnp.inexact)}
    whole_bytes = {d for d in inexact if ml_dtypes.finfo(d).bits >= 8}

    assert F32 in whole_bytes  # so that an enumeration that finds nothing fails
    assert {d.name for d in whole_bytes} == set(FLOATING)


def _is_scalar_type(kind: object) -> bool:
    return isinstance(getattr(kind, "dtype", None), np.dtype) and callable(kind)


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_are_found_by_the_name_that_numpy_gives_them(name: str) -> None:
    assert DTYPES[name].name == name
    assert DTYPES[name].isnative

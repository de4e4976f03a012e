"""A version's way over the wire: cut by the server's `encode`, put together by `Weights`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.assembly import Weights
from headwater.protos.compression import NONE
from headwater.protos.errors import HeadwaterError
from headwater.protos.layout import FLOATING, Layout
from headwater.protos.wire import PART_BYTES, unframe
from headwater.server.encoder import encode
from headwater.server.packed_versions import PackedVersions
from headwater.server.ranges import Ranges
from headwater.server.store import Published

# The same examples every time and no limits of time: the verdict is about the code alone.
quick = settings(
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
)

Part = tuple[int, bytes, int]
"""Offset, bytes, and what it says is the size of the whole."""

tensor_lists = st.lists(
    st.tuples(
        st.text(min_size=1, max_size=4),
        st.sampled_from(list(FLOATING.values())),
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda t: t[0],
)


def bits(layout: Layout, seed: int) -> list[np.ndarray]:
    """Arrays of random bits, NaNs of every kind among them."""
    draw = np.random.default_rng(seed)
    return [np.frombuffer(draw.bytes(t.nbytes), t.dtype).reshape(t.shape) for t in layout.tensors]


def published(version: int, leaves: Sequence[np.ndarray]) -> Published:
    return Published(
        incarnation=2,
        version=version,
        leaves=tuple(leaves),  # type: ignore[arg-type]
        optimizer_state=None,
        applied=Ranges(),
        left_out=Ranges(),
    )


def take(weights: Weights, messages: Sequence[bytes], kind: type = pb.ServerMessage) -> None:
    for data in messages:
        message, body = unframe(kind, data)
        weights.add(message.weights, body)


def same(leaves: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> bool:
    """Bit for bit, which `==` is not for NaN and negative zero."""
    return [(x.dtype, x.shape, x.tobytes()) for x in leaves] == [
        (x.dtype, x.shape, x.tobytes()) for x in expected
    ]


@pytest.mark.parametrize("kind", [pb.ServerMessage, pb.PullReply])
@pytest.mark.parametrize("reuse", [True, False], ids=["reused", "fresh"])
@quick
@given(tensors=tensor_lists, seed=st.integers(0, 2**32))
def test_what_the_server_encodes_is_put_together_bit_for_bit(
    kind: type,
    reuse: bool,
    tensors: list[tuple[str, np.dtype, tuple[int, ...]]],
    seed: int,
) -> None:
    layout = Layout.of(tensors)
    weights = Weights(layout, reuse=reuse)

    for version in (0, 1, 2, 3):
        leaves = bits(layout, seed + version)
        take(weights, encode(PackedVersions(layout, NONE), published(version, leaves)), kind)

        assert weights.version == version
        assert same(weights.leaves, leaves)


@pytest.mark.parametrize(
    ("total_bytes", "part_count"),
    [
        (1, 1),
        (PART_BYTES - 1, 1),
        (PART_BYTES, 1),
        (PART_BYTES + 1, 2),
        (3 * PART_BYTES, 3),
        (3 * PART_BYTES + 5, 4),
    ],
)
def test_a_model_of_any_size_crosses_in_parts_of_one_mebibyte(
    total_bytes: int, part_count: int
) -> None:
    layout = Layout.of([("w", np.dtype(ml_dtypes.float8_e5m2), (total_bytes,))])
    leaves = bits(layout, seed=0)
    weights = Weights(layout)

    messages = list(encode(PackedVersions(layout, NONE), published(7, leaves)))
    take(weights, messages[:-1])
    assert weights.version == -1  # not whole yet
    take(weights, messages[-1:])

    assert len(messages) == part_count
    assert all(len(m) < PART_BYTES + 100 for m in messages)
    assert weights.version == 7
    assert same(weights.leaves, leaves)


def test_tensors_that_lie_across_parts_are_put_together() -> None:
    row = PART_BYTES // 4  # elements of float32 in one part
    layout = Layout.of(
        [
            ("scale", np.dtype(np.float64), ()),
            ("kernel", np.dtype(np.float32), (3, row)),
            ("phase", np.dtype(np.complex128), (5,)),
        ]
    )
    leaves = bits(layout, seed=0)
    weights = Weights(layout)

    take(weights, encode(PackedVersions(layout, NONE), published(7, leaves)))

    assert weights.version == 7
    assert same(weights.leaves, leaves)


def test_every_part_says_which_version_of_which_incarnation_it_is() -> None:
    layout = Layout.of([("w", np.dtype(np.float32), (PART_BYTES // 2,))])

    messages = list(encode(PackedVersions(layout, NONE), published(7, bits(layout, seed=0))))

    for number, data in enumerate(messages):
        message = unframe(pb.PullReply, data).message
        assert message.stamp == pb.Stamp(incarnation=2, version=7)
        assert message.weights == pb.WeightsPart(
            version=7, offset=number * PART_BYTES, total_bytes=2 * PART_BYTES
        )


def test_a_model_without_a_single_number_is_one_empty_part() -> None:
    layout = Layout.of([("w", np.dtype(np.float32), (0, 3))])
    weights = Weights(layout)

    messages = list(encode(PackedVersions(layout, NONE), published(7, bits(layout, seed=0))))
    take(weights, messages)

    assert len(messages) == 1
    assert weights.version == 7
    assert [leaf.shape for leaf in weights.leaves] == [(0, 3)]


W = Layout.of([("w", np.dtype(np.float32), (4,))])
ONES, TWOS = (np.full(4, x, np.float32).tobytes() for x in (1, 2))


def add(weights: Weights, version: int, *parts: Part) -> None:
    for offset, body, total_bytes in parts:
        part = pb.WeightsPart(version=version, offset=offset, total_bytes=total_bytes)
        weights.add(part, memoryview(body))


@quick
@given(st.lists(st.integers(1, 15), max_size=6).map(sorted))
def test_a_version_is_whole_however_the_server_cuts_it(cuts: list[int]) -> None:
    weights = Weights(W)
    bounds = [0, *sorted(set(cuts)), 16]
    parts = [(start, TWOS[start:end], 16) for start, end in itertools.pairwise(bounds)]

    add(weights, 1, *parts[:-1])
    assert weights.version == -1
    add(weights, 1, *parts[-1:])

    assert weights.version == 1
    assert weights.leaves[0].tobytes() == TWOS


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([(0, TWOS[:4], 16), (8, TWOS[8:], 16)], "bytes 8 to 16 of 16 .*; next was byte 4 of 16"),
        ([(4, TWOS[4:], 16)], "bytes 4 to 16 of 16 of version 2; next was byte 0 of 16"),
        ([(0, TWOS[:8], 16), (4, TWOS[4:8], 16)], "bytes 4 to 8 of 16 .*; next was byte 8 of 16"),
        ([(0, TWOS[:4], 16), (4, TWOS[4:8], 16), (4, TWOS[4:8], 16)], "next was byte 8 of 16"),
        ([(0, TWOS[:12], 12)], "bytes 0 to 12 of 12 of version 2; next was byte 0 of 16"),
        ([(0, TWOS + TWOS, 32)], "bytes 0 to 32 of 32 of version 2; next was byte 0 of 16"),
        ([(0, TWOS[:8], 16), (8, TWOS[8:], 20)], "bytes 8 to 16 of 20 .*; next was byte 8 of 16"),
        ([(0, b"", 0)], "bytes 0 to 0 of 0 of version 2; next was byte 0 of 16"),
        ([(0, TWOS + b"x", 16)], "bytes 0 to 17 of 16 of version 2; next was byte 0 of 16"),
        ([(0, TWOS[:8], 16), (8, TWOS[:12], 16)], "bytes 8 to 20 of 16 .*; next was byte 8 of 16"),
        ([(2**64 - 8, TWOS, 16)], "bytes 18446744073709551608 to 18446744073709551624 of 16"),
    ],
    ids=[
        "a gap", "a start in the middle", "an overlap", "a part twice", "a smaller model",
        "a larger model", "a size that changes", "a size of nothing", "one byte too many",
        "a last part past the end", "an offset past every end",
    ],
)  # fmt: skip
def test_parts_that_make_no_version_are_refused_and_change_nothing(
    parts: list[Part], message: str
) -> None:
    weights = Weights(W)
    add(weights, 1, (0, ONES, 16))

    with pytest.raises(HeadwaterError, match=message):
        add(weights, 2, *parts)

    assert weights.version == 1
    assert weights.leaves[0].tobytes() == ONES


def test_parts_of_two_versions_are_never_put_together() -> None:
    weights = Weights(W)
    add(weights, 1, (0, ONES, 16))
    add(weights, 5, (0, ONES[:8], 16))

    with pytest.raises(HeadwaterError, match="of version 6; next was byte 8 of 16 of version 5"):
        add(weights, 6, (8, TWOS[8:], 16))

    assert weights.version == 1


def test_a_complete_version_takes_no_further_part() -> None:
    weights = Weights(W)
    add(weights, 1, (0, ONES, 16))

    with pytest.raises(HeadwaterError, match="of version 9; next was byte 0 of 16"):
        add(weights, 9, (16, b"", 16))

    assert weights.version == 1


def test_what_never_came_whole_leaves_the_last_version_as_it_was() -> None:
    weights = Weights(W)
    add(weights, 1, (0, ONES, 16))
    newest = weights.leaves[0]
    for version in range(2, 6):
        add(weights, version, (0, TWOS[:8], 16))

    assert newest.tobytes() == ONES


def test_after_a_restart_the_same_version_may_come_again() -> None:
    weights = Weights(W)
    add(weights, 1, (0, ONES[:8], 16))

    weights.restart()
    add(weights, 1, (0, TWOS, 16))

    assert (weights.version, weights.leaves[0].tobytes()) == (1, TWOS)


def test_before_the_first_version_a_part_in_the_middle_is_refused() -> None:
    weights = Weights(W)

    with pytest.raises(HeadwaterError, match="next was byte 0 of 16"):
        add(weights, 1, (4, ONES[4:], 16))

    assert weights.version == -1
    assert weights.leaves == []


@pytest.mark.parametrize("body", [None, memoryview(b"")], ids=["missing", "empty"])
def test_a_part_without_bytes_completes_nothing(body: memoryview | None) -> None:
    weights = Weights(W)
    add(weights, 1, (0, ONES, 16))

    weights.add(pb.WeightsPart(version=2, offset=0, total_bytes=16), body)

    assert weights.version == 1
    assert weights.leaves[0].tobytes() == ONES


def test_a_version_stays_as_it_was_until_the_one_after_the_next_begins() -> None:
    weights = Weights(W)
    add(weights, 1, (0, ONES, 16))
    first = weights.leaves[0]

    add(weights, 2, (0, TWOS[:8], 16))
    assert (weights.version, first.tobytes()) == (1, ONES)
    add(weights, 2, (8, TWOS[8:], 16))

    assert (weights.version, weights.leaves[0].tobytes()) == (2, TWOS)
    assert first.tobytes() == ONES


def test_without_reuse_a_version_stays_as_it_was_for_ever() -> None:
    weights = Weights(W, reuse=False)
    add(weights, 1, (0, ONES, 16))
    first = weights.leaves[0]

    for version in (2, 3, 4):
        add(weights, version, (0, TWOS, 16))

    assert first.tobytes() == ONES

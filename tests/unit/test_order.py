"""The order of the examples is a rule that holds for ever, on every machine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.server.order import ORDER_VERSION, BatchId, BatchOrder
from headwater.worker.task import TaskError


def epoch_of(order: BatchOrder, epoch: int) -> list[int]:
    """The examples of a whole epoch, in the order they are trained on."""
    first = epoch * order.per_epoch
    return [i for at in range(first, first + order.per_epoch) for i in order.indices(at).tolist()]


@given(
    count=st.integers(1, 200),
    batch_size=st.integers(1, 64),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 5),
)
@settings(deadline=None)
def test_an_epoch_uses_every_example_exactly_once(
    count: int, batch_size: int, seed: int, epoch: int
) -> None:
    order = BatchOrder(example_count=count, batch_size=batch_size, epochs=6, seed=seed)

    assert sorted(epoch_of(order, epoch)) == list(range(count))


@given(
    count=st.integers(1, 200),
    batch_size=st.integers(1, 64),
    remainder=st.sampled_from(["keep", "drop"]),
    shuffle=st.booleans(),
)
@settings(deadline=None)
def test_a_batch_has_the_size_that_is_said_of_it(
    count: int, batch_size: int, remainder: str, shuffle: bool
) -> None:
    batch_size = min(batch_size, count)
    order = BatchOrder(
        example_count=count,
        batch_size=batch_size,
        epochs=2,
        seed=0,
        shuffle=shuffle,
        remainder=remainder,
    )

    for position in range(order.total):
        assert len(order.indices(position)) == order.size(position) >= 1


@pytest.mark.parametrize(
    ("seed", "epoch", "count", "first"),
    [
        (0, 0, 1000, [998, 162, 670, 664, 185, 322, 431, 318]),
        (0, 1, 1000, [338, 261, 724, 958, 333, 497, 17, 614]),
        (1, 0, 1000, [404, 476, 90, 962, 378, 306, 737, 254]),
        (2**32 - 1, 3, 60_000, [19039, 24264, 28505, 44307, 17384, 35396, 38714, 28080]),
        (7, 0, 8, [4, 1, 6, 3, 2, 7, 5, 0]),
    ],
)
def test_the_order_of_version_1_never_changes(
    seed: int, epoch: int, count: int, first: list[int]
) -> None:
    """Another order needs another ORDER_VERSION, or resumed runs would mix two."""
    order = BatchOrder(example_count=count, batch_size=8, epochs=4, seed=seed)

    assert ORDER_VERSION == 1
    assert order.indices(epoch * order.per_epoch).tolist() == first


def test_the_same_seed_gives_the_same_order() -> None:
    first, second = (
        BatchOrder(example_count=100, batch_size=10, epochs=2, seed=5) for _ in range(2)
    )

    assert [epoch_of(first, e) for e in (0, 1)] == [epoch_of(second, e) for e in (0, 1)]


def test_every_epoch_and_every_seed_has_an_order_of_its_own() -> None:
    orders = [BatchOrder(example_count=50, batch_size=7, epochs=4, seed=seed) for seed in range(4)]

    found = {tuple(epoch_of(order, epoch)) for order in orders for epoch in range(4)}

    assert len(found) == 16


def test_the_order_does_not_depend_on_the_batch_size_or_the_number_of_epochs() -> None:
    small = BatchOrder(example_count=50, batch_size=7, epochs=2, seed=3)
    large = BatchOrder(example_count=50, batch_size=20, epochs=9, seed=3)

    assert epoch_of(small, 1) == epoch_of(large, 1)


def test_batches_may_be_asked_for_in_any_order() -> None:
    order = BatchOrder(example_count=40, batch_size=4, epochs=6, seed=1)
    forward = [order.indices(position).tolist() for position in range(order.total)]

    backward = [order.indices(position).tolist() for position in reversed(range(order.total))]

    assert backward == forward[::-1]


def test_preparing_an_epoch_changes_no_order() -> None:
    plain = BatchOrder(example_count=40, batch_size=4, epochs=2, seed=1)
    prepared = BatchOrder(example_count=40, batch_size=4, epochs=2, seed=1)

    prepared.prepare(1)
    prepared.prepare(2)  # past the end: nothing to do

    assert epoch_of(prepared, 1) == epoch_of(plain, 1)


def test_without_shuffle_the_examples_come_in_their_own_order_every_epoch() -> None:
    order = BatchOrder(example_count=7, batch_size=3, epochs=2, seed=1, shuffle=False)

    batches = [order.indices(position).tolist() for position in range(order.total)]

    assert batches == [[0, 1, 2], [3, 4, 5], [6]] * 2
    assert order.indices(0).dtype == np.int64


def test_the_short_last_batch_is_kept() -> None:
    order = BatchOrder(example_count=10, batch_size=4, epochs=2, seed=0, remainder="keep")

    assert (order.per_epoch, order.total) == (3, 6)
    assert [order.size(position) for position in range(6)] == [4, 4, 2, 4, 4, 2]


def test_the_short_last_batch_is_dropped() -> None:
    order = BatchOrder(example_count=10, batch_size=4, epochs=2, seed=0, remainder="drop")

    assert (order.per_epoch, order.total) == (2, 4)
    assert [order.size(position) for position in range(4)] == [4, 4, 4, 4]
    assert len(set(epoch_of(order, 1))) == 8


def test_no_batch_is_dropped_where_none_is_short() -> None:
    order = BatchOrder(example_count=8, batch_size=4, epochs=1, seed=0, remainder="drop")

    assert sorted(epoch_of(order, 0)) == list(range(8))


def test_a_run_whose_epochs_have_no_batch_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(
        TaskError, match=r'3 examples, batch size 4.*use remainder="keep" or a smaller batch size'
    ):
        BatchOrder(example_count=3, batch_size=4, epochs=1, seed=0, remainder="drop")


def test_fewer_examples_than_a_batch_make_one_short_batch() -> None:
    order = BatchOrder(example_count=3, batch_size=4, epochs=1, seed=0)

    assert (order.per_epoch, order.size(0)) == (1, 3)


def test_a_position_is_named_by_its_epoch_and_number() -> None:
    order = BatchOrder(example_count=10, batch_size=4, epochs=2, seed=0)

    assert [order.id(position) for position in (0, 2, 3)] == [
        BatchId(epoch=0, shard=0, number=0),
        BatchId(epoch=0, shard=0, number=2),
        BatchId(epoch=1, shard=0, number=0),
    ]
    assert str(order.id(5)) == "batch 2 of epoch 1"

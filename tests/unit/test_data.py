"""Training data: arrays by their indices, and one stream of random numbers for each batch."""

from __future__ import annotations

import itertools
import re
from typing import Any, NamedTuple

import numpy as np
import pytest

from headwater import ArrayData, Generated, from_items
from headwater.worker.data import Indexed, batch_rng

RNG = batch_rng(0, 0, 0)


def test_a_batch_is_every_array_at_the_indices_in_their_order() -> None:
    data = ArrayData(x=np.arange(12).reshape(4, 3), y=np.array([10, 11, 12, 13]))

    batch = data.batch(np.array([3, 0, 3]), RNG)

    assert batch.keys() == {"x", "y"}
    np.testing.assert_array_equal(batch["x"], [[9, 10, 11], [0, 1, 2], [9, 10, 11]])
    np.testing.assert_array_equal(batch["y"], [13, 10, 13])


def test_arrays_keep_their_dtypes() -> None:
    data = ArrayData(image=np.zeros((2, 4), np.uint8), label=np.zeros(2, np.int32))

    batch = data.batch(np.array([1]), RNG)

    assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
    assert batch["image"].shape == (1, 4)


def test_what_numpy_takes_for_an_array_may_be_given() -> None:
    data = ArrayData(x=[[1, 2], [3, 4], [5, 6]])

    assert len(data) == 3
    np.testing.assert_array_equal(data.batch(np.array([2]), RNG)["x"], [[5, 6]])


def test_a_batch_is_a_copy_that_may_be_written() -> None:
    data = ArrayData(x=np.zeros(3))

    data.batch(np.array([0, 1, 2]), RNG)["x"][:] = 1

    assert not data.arrays["x"].any()


def test_array_data_is_indexed() -> None:
    assert isinstance(ArrayData(x=[1]), Indexed)
    assert not isinstance([1, 2, 3], Indexed)
    assert not isinstance(None, Indexed)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "ArrayData needs at least one array, such as ArrayData(x=images)"),
        ({"x": 7}, "ArrayData: x is a scalar; it needs a leading axis"),
        ({"x": [1], "y": np.float32(1)}, "ArrayData: y is a scalar; it needs a leading axis"),
        (
            {"x": [1, 2], "y": [1, 2, 3]},
            "ArrayData: the leading axes differ: {'x': 2, 'y': 3}",
        ),
        ({"x": [], "y": [1]}, "ArrayData: the leading axes differ: {'x': 0, 'y': 1}"),
    ],
)
def test_arrays_that_make_no_examples_are_refused(arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the whole text is compared)
        ArrayData(**arrays)

    assert str(error.value) == message


def test_the_random_numbers_of_a_batch_are_the_same_wherever_it_is_loaded() -> None:
    one, other = batch_rng(7, 2, 5), batch_rng(7, 2, 5)
    np.testing.assert_array_equal(one.random(100), other.random(100))


def test_every_seed_epoch_and_batch_has_random_numbers_of_its_own() -> None:
    ids = [*itertools.product(range(4), repeat=3), (2**32 - 1, 2**32, 2**32)]

    first = {batch_rng(*id_).integers(0, 2**63) for id_ in ids}

    assert len(first) == len(ids)


# ------------------------------------------------------------------- from_items


class Digit(NamedTuple):
    image: np.ndarray
    label: int


def taken(source: Any, *indices: int, **options: Any) -> Any:
    return from_items(source, **options).batch(np.array(indices), RNG)


def test_items_are_collated_as_they_are_built() -> None:
    items = [Digit(np.full((2, 2), n, np.uint8), n) for n in range(5)]

    batch = taken([{"digit": item, "name": (float(item.label),)} for item in items], 3, 0)

    assert isinstance(batch["digit"], Digit)
    assert batch["digit"].image.shape == (2, 2, 2)
    assert batch["digit"].image.dtype == np.uint8
    np.testing.assert_array_equal(batch["digit"].image[:, 0, 0], [3, 0])
    np.testing.assert_array_equal(batch["digit"].label, [3, 0])
    np.testing.assert_array_equal(batch["name"][0], [3.0, 0.0])


def test_a_list_in_an_item_is_an_array() -> None:
    np.testing.assert_array_equal(taken([[1, 2], [3, 4]], 1, 0), [[3, 4], [1, 2]])


def test_the_data_is_as_long_as_its_source_and_indexed() -> None:
    data = from_items(range(7))

    assert isinstance(data, Indexed)
    assert len(data) == 7


def test_many_items_are_asked_for_at_once_where_that_can_be() -> None:
    class Table:
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> int:
            raise AssertionError("one by one")

        def __getitems__(self, indices: list[int]) -> list[int]:
            assert all(type(index) is int for index in indices)
            return [10 * index for index in indices]

    np.testing.assert_array_equal(taken(Table(), 4, 2), [40, 20])


def test_a_collate_of_the_users_own_has_the_items() -> None:
    assert taken(["abc", "d"], 1, 0, collate=lambda items: [len(i) for i in items]) == [1, 3]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([{"x": 1}, {"y": 1}], "from_items: the keys of the item differ from item to item"),
        ([(1, 2), (1, 2, 3)], "from_items: the tuples of the item differ from item to item"),
        (
            [{"ids": [1, 2]}, {"ids": [1, 2, 3]}],
            (
                "from_items: the item's 'ids' has shape [2] in one item and [3] in another; pad or "
                "crop them to one shape, or give a `collate` that does"
            ),
        ),
        (
            [("text", 1), ("more", 2)],
            (
                "from_items: the item's place 0 is str, not numbers; leave it out, or give a "
                "`collate` that makes numbers of it"
            ),
        ),
        ([None, None], "from_items: the item is NoneType, not numbers; leave it out"),
    ],
)
def test_items_that_make_no_batch_are_named(items: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        taken(items, 0, 1)


def test_a_source_without_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="generator has no __len__; it takes what has a length"):
        from_items(n for n in range(3))


# -------------------------------------------------------------------- Generated


@pytest.mark.parametrize("count", [0, -1, 2.0, True, 2**31 + 1])
def test_a_count_of_batches_that_cannot_be_is_refused(count: Any) -> None:
    with pytest.raises(ValueError, match="batches_per_epoch is a whole number from 1 to"):
        Generated(lambda params, key: key, batches_per_epoch=count)


def test_what_makes_batches_must_be_a_function() -> None:
    with pytest.raises(ValueError, match="takes a function"):
        Generated([1, 2, 3])  # type: ignore[arg-type]

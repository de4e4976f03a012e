"""Training data: arrays by their indices, and one stream of random numbers for each batch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from headwater import ArrayData
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

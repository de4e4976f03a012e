"""Weights as a reader gets them: named arrays, and which version they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # quick commands do without NumPy
    import numpy as np

    from headwater.protos.reading import Read


class Weights(dict[str, "np.ndarray"]):
    """The weights of one version, by name. The arrays are the caller's own."""

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        *,
        run_id: str,
        incarnation: int,
        version: int,
        epoch: int,
    ) -> None:
        super().__init__(arrays)
        self.run_id = run_id
        self.incarnation = incarnation
        """With `version`, names this state of the weights for ever."""
        self.version = version
        self.epoch = epoch
        """The lowest epoch that was not complete, from 0."""


def named(read: Read) -> Weights:
    """What a pull gave, by name."""
    assert read.weights is not None  # only a known version comes without
    names = [spec.name for spec in read.weights.layout.tensors]
    return Weights(
        dict(zip(names, read.weights.leaves, strict=True)),
        run_id=read.run_id,
        incarnation=read.stamp.incarnation,
        version=read.stamp.version,
        epoch=read.epoch,
    )

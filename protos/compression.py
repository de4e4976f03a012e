"""What stands for a tensor on the wire when it is sent with fewer bytes.

Here is which arrays, of which dtypes and sizes, so that both sides agree on every
byte; the arithmetic is in worker/compression.py. A packed tensor is flat; a complex
number counts as two real ones, the real part first.

    bfloat16    each real number as bfloat16
    int8        each as a signed byte: those of whole blocks, the rest, and a float32 scale
                for each block of BLOCK numbers; the last may be shorter
    topk:R      those ceil(R · n) of the n numbers that are largest, and where they stand

State, and a tensor that would not become smaller, is sent as it is.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Literal

import ml_dtypes
import numpy as np

from headwater.protos.errors import UsageError
from headwater.protos.layout import PARAMETER, Layout, TensorSpec

BLOCK = 512
"""Numbers that share a scale."""

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Compression:
    """How a gradient, or a version's weights, are sent."""

    kind: Literal["none", "bfloat16", "int8", "topk"] = "none"
    ratio: float = 0.0
    """Of topk: the share of the numbers that is sent."""

    @classmethod
    def parse(cls, text: str, flag: str = "--compress") -> Compression:
        """`none`, `bfloat16`, `int8` or `topk:RATIO`.

        Raises:
          UsageError: It is none of these; names `flag`.
        """
        if text in ("none", "bfloat16", "int8"):
            return cls(text)  # type: ignore[arg-type]  # one of the literals
        if match := re.fullmatch(r"topk:([0-9.eE+-]+)", text):
            ratio = _number(match[1])
            if 0 < ratio < 1:
                return cls("topk", ratio)
        raise UsageError(
            f"{flag} {text!r}: it is none, bfloat16, int8, or topk:RATIO with a ratio between 0 "
            "and 1, such as topk:0.01"
        )

    def __str__(self) -> str:
        return f"topk:{self.ratio!r}" if self.kind == "topk" else self.kind

    @property
    def keeps_residual(self) -> bool:
        """Whether what is left out of one push is added to the next (error feedback)."""
        return self.kind == "topk"

    def packs(self, tensor: TensorSpec) -> bool:
        """Whether it makes this tensor smaller."""
        if tensor.role != PARAMETER:
            return False
        numbers, size = real_count(tensor), real_dtype(tensor).itemsize
        if self.kind == "bfloat16":
            return size > BFLOAT16.itemsize
        if self.kind == "int8":
            return size > 1 and numbers > 0
        if self.kind == "topk":
            fewer = self.kept(tensor) * (4 + size) < numbers * size
            return fewer and numbers < 1 << 32
        return False

    def kept(self, tensor: TensorSpec) -> int:
        """Of topk: how many numbers of the tensor are sent."""
        return math.ceil(self.ratio * real_count(tensor))

    def packed(self, layout: Layout) -> Layout:
        """The arrays that are sent for a model's tensors, in their order."""
        if self.kind == "none":
            return layout
        return Layout.unchecked(part for spec in layout.tensors for part in self._parts(spec))

    def _parts(self, tensor: TensorSpec) -> Iterator[tuple[str, np.dtype, tuple[int, ...]]]:
        count = real_count(tensor)
        if not self.packs(tensor):
            yield f"values {tensor.name}", tensor.dtype, tensor.shape
        elif self.kind == "bfloat16":
            yield f"values {tensor.name}", BFLOAT16, (count,)
        elif self.kind == "int8":
            for name, size in int8_parts(tensor).items():
                yield f"{name} {tensor.name}", np.dtype(np.int8), (size,)
            yield f"scales {tensor.name}", np.dtype(np.float32), (-(-count // BLOCK),)
        else:
            kept = self.kept(tensor)
            yield f"places {tensor.name}", np.dtype(np.uint32), (kept,)
            yield f"values {tensor.name}", real_dtype(tensor), (kept,)


NONE = Compression()

PULL_DTYPES = ("own", "bfloat16")


def pulls(dtype: str | None) -> Compression:
    """How weights are sent to workers under --pull-dtype.

    Raises:
      UsageError: There is no such choice.
    """
    if dtype in (None, "", "own"):
        return NONE
    if dtype == "bfloat16":
        return Compression("bfloat16")
    raise UsageError(f"--pull-dtype {dtype!r}: it is one of {', '.join(PULL_DTYPES)}")


def real_count(tensor: TensorSpec) -> int:
    """Real numbers in a tensor: of complex ones, two each."""
    return math.prod(tensor.shape) * (2 if tensor.dtype.kind == "c" else 1)


def int8_parts(tensor: TensorSpec) -> dict[str, int]:
    """The arrays that a tensor's bytes are in, by name, and how many; none has 0.

    Two, because to join them again costs as much as all the arithmetic.
    """
    count = real_count(tensor)
    whole = count // BLOCK * BLOCK
    sizes = {"bytes": whole, "rest": count - whole}
    return {name: size for name, size in sizes.items() if size}


def real_dtype(tensor: TensorSpec) -> np.dtype:
    """What they are."""
    if tensor.dtype.kind != "c":
        return tensor.dtype
    return np.dtype(np.float32 if tensor.dtype == np.complex64 else np.float64)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

"""Where each tensor lies in the one flat buffer that crosses the wire.

The layout is names, roles, shapes, dtypes and byte offsets: all parameters, all
state, all constants, each in the order of the user's tree, so that what is pushed
is a prefix of the weights' buffer. It never holds the tree itself, which may hold
functions. Two sides whose fingerprints are equal mean the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np
import numpy.typing as npt

from headwater.protos import parameter_server_pb2 as pb

ALIGNMENT = 64
"""Bytes; a cache line, and what XLA wants to use a buffer without copying it."""

FLOATING: Mapping[str, np.dtype] = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in (
        np.float16,
        np.float32,
        np.float64,
        np.complex64,
        np.complex128,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e3m4,
        ml_dtypes.float8_e4m3,
        ml_dtypes.float8_e4m3b11fnuz,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e4m3fnuz,
        ml_dtypes.float8_e5m2,
        ml_dtypes.float8_e5m2fnuz,
        ml_dtypes.float8_e8m0fnu,
    )
}
"""What a parameter can be made of: JAX's floating and complex dtypes, by name."""

INTEGER: Mapping[str, np.dtype] = {
    f"{sign}int{bits}": np.dtype(f"{sign}int{bits}")
    for sign in ("", "u")
    for bits in (8, 16, 32, 64)
}
"""What state can be made of as well: counters."""

DTYPES: Mapping[str, np.dtype] = {**FLOATING, **INTEGER, "bool": np.dtype(bool)}
"""What a constant can be made of: all that can be served."""

_GAP = memoryview(bytes(ALIGNMENT))
"""What lies between two tensors, at most."""

MAX_DIMENSIONS = 64
_MAX_BYTES = 1 << 50  # far past any machine, small enough that no sum overflows

Bytes = npt.NDArray[np.uint8]
Arrays = Mapping[str, np.ndarray]

PARAMETER = pb.ROLE_PARAMETER
STATE = pb.ROLE_STATE
CONSTANT = pb.ROLE_CONSTANT

ROLES: Mapping[pb.Role, str] = {PARAMETER: "parameter", STATE: "state", CONSTANT: "constant"}
"""The roles in buffer order, and what people call them."""

SERVED: Mapping[pb.Role, Mapping[str, np.dtype]] = {
    PARAMETER: FLOATING,
    STATE: {**FLOATING, **INTEGER},
    CONSTANT: DTYPES,
}
"""What the tensors of each role can be made of."""

Described = tuple[str, np.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""


class LayoutError(ValueError):
    """The tensors make no layout; names the tensor and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor: what it is and where it lies (`offset` in bytes)."""

    name: str
    role: pb.Role
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def describe(self) -> str:
        """For people: `float32[784,64]`, and its role where it is no parameter."""
        what = f"{self.dtype.name}[{','.join(map(str, self.shape))}]"
        return what if self.role == PARAMETER else f"{what} {ROLES[self.role]}"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tensors of a model in buffer order. Build it with `of` or `from_proto`."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(
        cls,
        parameters: Iterable[Described],
        state: Iterable[Described] = (),
        constants: Iterable[Described] = (),
    ) -> Layout:
        """Lay out tensors, those of each role in the order given.

        Raises:
          LayoutError: A name is empty or used twice, a dtype cannot be served
            in that role, or there is no parameter at all.
        """
        specs: list[TensorSpec] = []
        end = 0
        for role, tensors in zip(ROLES, (parameters, state, constants), strict=True):
            for name, dtype, shape in tensors:
                found = _dtype(name, np.dtype(dtype).name, role)
                if found != np.dtype(dtype):
                    raise LayoutError(f"{name!r} is big-endian; tensors are little-endian")
                specs.append(TensorSpec(name, role, found, tuple(shape), _aligned(end)))
                end = specs[-1].end
        return cls(_checked(specs))

    @classmethod
    def unchecked(cls, arrays: Iterable[Described]) -> Layout:
        """Lay out arrays that need not be parameters, such as those that stand for some."""
        specs: list[TensorSpec] = []
        end = 0
        for name, dtype, shape in arrays:
            specs.append(TensorSpec(name, PARAMETER, dtype, shape, _aligned(end)))
            end = specs[-1].end
        return cls(tuple(specs))

    @classmethod
    def from_proto(cls, message: pb.Layout) -> Layout:
        """Read a peer's layout, trusting nothing in it.

        Raises:
          LayoutError: As `of`; also a role, offset or shape that breaks the
            rules of the .proto.
        """
        specs = [
            TensorSpec(t.name, t.role, _dtype(t.name, t.dtype, t.role), tuple(t.shape), t.offset)
            for t in message.tensors
        ]
        return cls(_checked(specs))

    def to_proto(self) -> pb.Layout:
        return pb.Layout(
            tensors=[
                pb.Tensor(
                    name=t.name, role=t.role, dtype=t.dtype.name, shape=t.shape, offset=t.offset
                )
                for t in self.tensors
            ]
        )

    @functools.cached_property
    def total_bytes(self) -> int:
        """Size of the flat buffer, in bytes."""
        return self.tensors[-1].end

    def count(self, role: pb.Role) -> int:
        """Tensors of this role."""
        return self._counts[role]

    @functools.cached_property
    def _counts(self) -> Counter[pb.Role]:
        return Counter(t.role for t in self.tensors)

    @functools.cached_property
    def moving(self) -> Layout:
        """Of what updates move, the parameters and the state: all but the constants."""
        if not self.count(CONSTANT):
            return self
        return Layout(tuple(t for t in self.tensors if t.role != CONSTANT))

    @functools.cached_property
    def trained(self) -> Layout:
        """Of the parameters alone."""
        if self.count(PARAMETER) == len(self.tensors):
            return self
        return Layout(tuple(t for t in self.tensors if t.role == PARAMETER))

    @functools.cached_property
    def parameter_count(self) -> int:
        """Numbers in the parameters."""
        return sum(math.prod(t.shape) for t in self.tensors if t.role == PARAMETER)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every name, role, dtype, shape and offset, in hexadecimal."""
        return hashlib.sha256(self.to_proto().SerializeToString(deterministic=True)).hexdigest()

    def empty(self) -> Bytes:
        """A zeroed, aligned buffer of `total_bytes`; the gaps between tensors stay zero."""
        raw = np.zeros(self.total_bytes + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + self.total_bytes]

    def views(self, buffer: Bytes) -> dict[str, np.ndarray]:
        """The tensors inside `buffer`, by name, without a copy."""
        return {
            t.name: buffer[t.offset : t.end].view(t.dtype).reshape(t.shape) for t in self.tensors
        }

    def pack(self, arrays: Iterable[np.ndarray], buffer: Bytes) -> None:
        """Copy `arrays`, in layout order, to their places in `buffer`.

        Raises:
          LayoutError: An array has another shape or dtype than its tensor.
        """
        for spec, array in zip(self.tensors, arrays, strict=True):
            buffer[spec.offset : spec.end] = _flat(spec, array)

    def cut(
        self, arrays: Iterable[np.ndarray], part_bytes: int
    ) -> Iterator[tuple[int, list[memoryview]]]:
        """The flat buffer of `arrays`, in layout order, in parts, without copying.

        Yields:
          The offset of each part and the pieces that it consists of; one empty part
          for an empty buffer. All parts but the last have `part_bytes` bytes.

        Raises:
          LayoutError: An array has another shape or dtype than its tensor.
        """
        start, at = 0, 0
        pieces: list[memoryview] = []
        for spec, array in zip(self.tensors, arrays, strict=True):
            for source in (_GAP[: spec.offset - at], _flat(spec, array).data):
                taken = 0
                while taken < len(source):
                    piece = source[taken : taken + start + part_bytes - at]
                    pieces.append(piece)
                    taken, at = taken + len(piece), at + len(piece)
                    if at == start + part_bytes:
                        yield start, pieces
                        start, pieces = at, []
        if pieces or start == 0:
            yield start, pieces


def _flat(spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    """The array's bytes, uint8, without a copy where it is contiguous."""
    if array.shape != spec.shape or array.dtype != spec.dtype:
        got = f"{array.dtype.name}[{','.join(map(str, array.shape))}]"
        raise LayoutError(f"{spec.name} is {got}, the layout says {spec.describe()}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def differences(ours: Layout, theirs: Layout, limit: int = 10) -> list[str]:
    """Sentences on how two layouts differ, `limit` at most and then a count."""
    mine = {t.name: t for t in ours.tensors}
    other = {t.name: t for t in theirs.tensors}
    found = [f"{n}: here {t.describe()}, there missing" for n, t in mine.items() if n not in other]
    found += [f"{n}: here missing, there {t.describe()}" for n, t in other.items() if n not in mine]
    for name in mine.keys() & other.keys():
        if mine[name].describe() != other[name].describe():
            found.append(f"{name}: here {mine[name].describe()}, there {other[name].describe()}")
        elif mine[name].role != other[name].role:
            here, there = (pb.Role.Name(t.role) for t in (mine[name], other[name]))
            found.append(f"{name}: here {here}, there {there}")
    if not found and ours.fingerprint != theirs.fingerprint:
        pairs = zip(ours.tensors, theirs.tensors, strict=True)
        first = next(((a.name, b.name) for a, b in pairs if a.name != b.name), None)
        where = f": {first[0]} here where {first[1]} is there" if first else ""
        found.append(f"the same tensors in another order{where}")
    found.sort()
    rest = len(found) - limit
    return found if rest <= 0 else [*found[:limit], f"and {rest} more"]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _dtype(name: str, text: str, role: pb.Role) -> np.dtype:
    if role not in ROLES:
        raise LayoutError(f"{name!r} has role {role}, which is none")
    known = SERVED[role]
    if text not in known:
        raise LayoutError(
            f"{name!r} has dtype {text!r}; a {ROLES[role]} is one of {', '.join(known)}"
        )
    return known[text]


def _checked(specs: list[TensorSpec]) -> tuple[TensorSpec, ...]:
    if not specs or specs[0].role != PARAMETER:
        raise LayoutError("there is no tensor to train: `init` gave no parameter")
    seen: set[str] = set()
    end, role = 0, PARAMETER
    for spec in specs:
        if not spec.name:
            raise LayoutError(f"tensor {len(seen)} has no name")
        if spec.name == "__metadata__" or re.search("[\ud800-\udfff]", spec.name):
            raise LayoutError(f"a tensor cannot be called {spec.name!r}; no file could hold it")
        if spec.name in seen:
            raise LayoutError(f"two tensors are called {spec.name!r}; names must be unique")
        seen.add(spec.name)
        _dtype(spec.name, spec.dtype.name, spec.role)
        if spec.role < role:
            raise LayoutError(f"{spec.name!r}, a {ROLES[spec.role]}, comes after a {ROLES[role]}")
        role = spec.role
        # Without the zeros, so that [2**63, 0] is seen for what it is; and not
        # before the axes were counted, for millions of them take minutes.
        if (
            len(spec.shape) > MAX_DIMENSIONS
            or spec.dtype.itemsize * math.prod(size for size in spec.shape if size) > _MAX_BYTES
        ):
            axes = f"{spec.shape}" if len(spec.shape) <= 8 else f"{len(spec.shape)} axes"
            raise LayoutError(f"{spec.name!r} of shape {axes} is too large for any machine")
        if spec.offset != _aligned(end):
            raise LayoutError(
                f"{spec.name!r} starts at byte {spec.offset}; in its place in the order it starts "
                f"at {_aligned(end)}"
            )
        end = spec.end
    return tuple(specs)

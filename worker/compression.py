"""From tensors to what stands for them on the wire, and back (protos/compression.py).

Sources: int8 with stochastic rounding is QSGD (Alistarh et al. 2017) with a scale for
each block; topk with error feedback is Stich et al. 2018, "Sparsified SGD with Memory".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headwater.protos.compression import BLOCK, Compression, int8_parts, real_count, real_dtype
from headwater.protos.layout import Bytes, Layout, TensorSpec

Leaves = Sequence[Any]

SAMPLE = 8192
"""Numbers of a tensor from which it is guessed how large its largest ones are."""


class Pack:
    """What is sent for a model's tensors.

    Args:
      layout: Of the model.
      compression: How.
      seed: Of the rounding; with the same seed, epoch and number, the same bytes.
    """

    def __init__(self, layout: Layout, compression: Compression, seed: int = 0) -> None:
        self._tensors = layout.tensors
        self._compression = compression
        self._seed = seed
        self._jitted = jax.jit(self._pack)
        self._accumulated = jax.jit(self._accumulate)
        self._picked = jax.jit(_pick, donate_argnums=0)
        self._residual: tuple[jax.Array, ...] | None = None
        self._next: tuple[jax.Array, ...] | None = None

    def __call__(self, leaves: Leaves, epoch: int = 0, number: int = 0) -> list[np.ndarray]:
        """The arrays that are sent, in the order of the packed layout.

        Args:
          leaves: In layout order.
          epoch: Of the first batch that the gradient is of.
          number: Of the same.
        """
        kind = self._compression.kind
        if kind == "none":
            packed: Leaves = leaves
        elif kind == "topk":
            packed = self._sparse(leaves)
        else:
            packed = self._jitted(tuple(leaves), np.uint32(epoch), np.uint32(number))
        return [np.asarray(array) for array in packed]

    # ------------------------------------------------------------ error feedback

    def settle(self, *, applied: bool) -> None:
        """What became of the gradient packed last: what it left out counts only if it was applied.

        Each is settled before the next is packed.
        """
        if applied and self._next is not None:
            self._residual = self._next
        self._next = None

    def forget(self) -> float:
        """Drop what was left out so far; its norm, 0 where there was nothing."""
        total = sum(float(jnp.vdot(r, r)) for r in self._residual or ())
        self._residual = self._next = None
        return float(np.sqrt(total))

    def _sparse(self, leaves: Leaves) -> list[Any]:
        packed = [self._compression.packs(tensor) for tensor in self._tensors]
        chosen = tuple(leaf for leaf, smaller in zip(leaves, packed, strict=True) if smaller)
        whole = self._accumulated(chosen, self._residual)
        counts = [self._compression.kept(t) for t in self._tensors if self._compression.packs(t)]
        places = tuple(_largest(x, count) for x, count in zip(whole, counts, strict=True))
        values, self._next = self._picked(whole, places)
        pairs = iter(zip(places, values, strict=True))
        found: list[Any] = []
        for leaf, smaller in zip(leaves, packed, strict=True):
            found += next(pairs) if smaller else [leaf]
        return found

    def _accumulate(
        self, leaves: tuple[jax.Array, ...], residual: tuple[jax.Array, ...] | None
    ) -> tuple[jax.Array, ...]:
        numbers = tuple(map(_reals, leaves))
        if residual is None:
            # A copy, for the caller's own arrays are not donated.
            return tuple(map(jnp.copy, numbers))
        return tuple(n + r for n, r in zip(numbers, residual, strict=True))

    # ------------------------------------------------------------------- dense

    def _pack(self, leaves: Leaves, epoch: jax.Array, number: jax.Array) -> list[jax.Array]:
        found = []
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._seed), epoch), number)
        for at, (tensor, leaf) in enumerate(zip(self._tensors, leaves, strict=True)):
            if not self._compression.packs(tensor):
                found.append(jnp.asarray(leaf))
            elif self._compression.kind == "bfloat16":
                found.append(_reals(leaf).astype(jnp.bfloat16))
            else:
                word = jax.random.bits(jax.random.fold_in(key, at), (), jnp.uint32)
                found += _to_int8(_reals(leaf), word)
        return found


class Unpack:
    """A model's tensors from what was sent for them.

    Args:
      layout: Of the model.
      compression: How they were packed.
    """

    def __init__(self, layout: Layout, compression: Compression) -> None:
        self._tensors = layout.tensors
        self._compression = compression
        self._packed = compression.packed(layout)
        self.is_view = compression.kind == "none"
        """Whether nothing is made anew."""
        self._compiled: Callable[..., list[jax.Array]] | None = None
        if not self.is_view:
            shapes = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in self._packed.tensors]
            self._compiled = jax.jit(self._unpack).lower(shapes).compile()

    def __call__(self, buffer: Bytes) -> Leaves:
        """The tensors, in layout order, from the flat buffer; may be views of it."""
        return self.arrays(list(self._packed.views(buffer).values()))

    def arrays(self, packed: list[Any]) -> Leaves:
        """The same from the arrays in the buffer."""
        return packed if self._compiled is None else self._compiled(packed)

    def _unpack(self, packed: list[jax.Array]) -> list[jax.Array]:
        arrays = iter(packed)
        return [self._tensor(tensor, arrays.__next__) for tensor in self._tensors]

    def _tensor(self, tensor: TensorSpec, take: Callable[[], jax.Array]) -> jax.Array:
        if not self._compression.packs(tensor):
            return take()
        if self._compression.kind == "bfloat16":
            numbers = take().astype(real_dtype(tensor))
        elif self._compression.kind == "int8":
            parts = [take() for _ in int8_parts(tensor)]
            numbers = _from_int8(parts, take(), real_dtype(tensor))
        else:
            numbers = _scattered(take(), take(), real_count(tensor))
        return _restored(numbers, tensor)


# ---------------------------------------------------------------------- numbers


def _reals(x: jax.Array) -> jax.Array:
    """Flat; the parts of complex numbers one after the other."""
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    return x.reshape(-1)


def _restored(numbers: jax.Array, tensor: TensorSpec) -> jax.Array:
    if tensor.dtype.kind == "c":
        pairs = numbers.reshape(-1, 2)
        numbers = jax.lax.complex(pairs[:, 0], pairs[:, 1])
    return numbers.reshape(tensor.shape)


# ------------------------------------------------------------------------- int8


def _to_int8(x: jax.Array, word: jax.Array) -> list[jax.Array]:
    """Bytes, of the whole blocks and of the rest, and scales; byte · scale is on average x."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # Barriers, because XLA on a CPU computes what it fused more slowly than one after the other.
    chances = jax.lax.optimization_barrier(_uniform(x.size, word))
    found = [_rounded(*blocks) for blocks in zip(_blocks(wide), _blocks(chances), strict=True)]
    rounded, scales = zip(*found, strict=True)
    rest = -x.size % BLOCK
    return [
        *rounded[:-1],
        rounded[-1][: BLOCK - rest] if rest else rounded[-1],
        jnp.concatenate(scales),
    ]


def _rounded(blocks: jax.Array, chances: jax.Array) -> tuple[jax.Array, jax.Array]:
    scales = jax.lax.optimization_barrier((_largest_in_each(blocks) / 127).astype(jnp.float32))
    steps = jnp.where(scales == 0, 1, scales).astype(blocks.dtype)[:, None]
    rounded = jnp.clip(jnp.floor(blocks / steps + chances), -127, 127)
    return rounded.astype(jnp.int8).reshape(-1), scales


def _largest_in_each(blocks: jax.Array) -> jax.Array:
    """The largest magnitude of each row. The bits of a float have its order, and NaN is above."""
    whole, top = {4: (jnp.int32, 1 << 31), 8: (jnp.int64, 1 << 63)}[blocks.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(blocks, whole) & whole(top - 1)
    # By halves, because XLA on a CPU compares many columns at once, but one row's numbers singly.
    while bits.shape[1] > 8:
        half = bits.shape[1] // 2
        bits = jnp.maximum(bits[:, :half], bits[:, half:])
    return jax.lax.bitcast_convert_type(jnp.max(bits, axis=1), blocks.dtype)


def _blocks(x: jax.Array) -> Iterator[jax.Array]:
    """Rows of BLOCK numbers: all that are whole, and the last one filled up with zeros.

    Not all filled up at once, because XLA on a CPU is slow at that.
    """
    whole = x.size // BLOCK * BLOCK
    if whole:
        yield x[:whole].reshape(-1, BLOCK)
    if whole < x.size:
        rest = x[whole:]
        yield jnp.pad(rest, (0, BLOCK - rest.size)).reshape(1, BLOCK)


def _from_int8(parts: Sequence[jax.Array], scales: jax.Array, dtype: np.dtype) -> jax.Array:
    at, found = 0, []
    for part in parts:
        for blocks in _blocks(part):
            own = scales[at : at + len(blocks), None]
            found.append((blocks.astype(scales.dtype) * own).reshape(-1)[: part.size])
            at += len(blocks)
    return jnp.concatenate(found).astype(dtype)


def _uniform(count: int, word: jax.Array) -> jax.Array:
    """`count` numbers in [0, 1), float32: MurmurHash3's finalizer over a counter.

    Rounding needs no better ones, and JAX's own take longer than a small model's gradient.
    """
    h = jax.lax.iota(jnp.uint32, count) * np.uint32(0x9E3779B1) + word
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * np.uint32(factor)
    return ((h ^ (h >> 16)) >> 8).astype(jnp.float32) * np.float32(2**-24)


# ------------------------------------------------------------------------- topk


def _largest(x: jax.Array, count: int) -> Any:
    """Places of the `count` numbers with the largest magnitudes, uint32; NaN is the largest."""
    if jax.default_backend() == "cpu":
        # XLA's own takes several times as long on a CPU.
        return _largest_of(np.abs(np.asarray(x)), count).astype(np.uint32)
    return jax.lax.top_k(jnp.abs(x), count)[1].astype(jnp.uint32)


def _largest_of(sizes: np.ndarray, count: int) -> np.ndarray:
    """`_largest` of magnitudes: first those that are as large as a sample has few of."""
    sample = sizes[:: max(1, len(sizes) // SAMPLE)]
    rank = min(len(sample), 2 * math.ceil(count * len(sample) / len(sizes)) + 8)
    least = np.partition(sample, len(sample) - rank)[len(sample) - rank]
    candidates = np.flatnonzero(~(sizes < least))  # so that NaN is one
    if len(candidates) < count:  # the sample was not like the rest
        candidates = np.arange(len(sizes))
    first = len(candidates) - count
    return candidates[np.argpartition(sizes[candidates], first)[first:]]


def _pick(
    whole: tuple[jax.Array, ...], places: tuple[Any, ...]
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The numbers at the places, and all others."""
    values = tuple(x[at] for x, at in zip(whole, places, strict=True))
    return values, tuple(x.at[at].set(0) for x, at in zip(whole, places, strict=True))


def _scattered(places: jax.Array, values: jax.Array, count: int) -> jax.Array:
    """All others are 0. A place that there is not makes all NaN, so that it is refused."""
    outside = jnp.any(places >= count)
    spread = jnp.zeros(count, values.dtype).at[places].set(values, mode="drop")
    return jnp.where(outside, jnp.asarray(np.nan, values.dtype), spread)

"""What stands for tensors on the wire: its bytes, its numbers, and what is left out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.protos.compression import BLOCK, Compression, pulls
from headwater.protos.errors import UsageError
from headwater.protos.layout import Layout
from headwater.worker.compression import Pack, Unpack

KINDS = ("none", "bfloat16", "int8", "topk:0.01")
SIZES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7)


def layout(*tensors: tuple[type, tuple[int, ...]]) -> Layout:
    return Layout.of((f"t{n}", np.dtype(kind), shape) for n, (kind, shape) in enumerate(tensors))


def drawn(model: Layout, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    found = []
    for t in model.tensors:
        numbers = random.normal(size=t.shape)
        if t.dtype.kind == "c":
            numbers = numbers + 1j * random.normal(size=t.shape)
        found.append(numbers.astype(t.dtype))
    return found


def crossed(pack: Pack, model: Layout, kind: str, leaves: list[np.ndarray], number: int = 0):
    """What arrives, and the bytes it took."""
    compression = Compression.parse(kind)
    packed = compression.packed(model)
    buffer = packed.empty()
    packed.pack(pack(leaves, 0, number), buffer)
    return [np.asarray(x) for x in Unpack(model, compression)(buffer)], buffer


MANY = layout(
    *((np.float32, (size,)) for size in SIZES),
    (np.float32, ()),
    (np.float16, (40, 30)),
    (ml_dtypes.bfloat16, (40, 30)),
    (np.complex64, (3, 700)),
    (ml_dtypes.float8_e4m3fn, (50,)),
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_shape_and_dtype_arrives_as_what_it_was(kind: str) -> None:
    leaves = drawn(MANY)
    got, _ = crossed(Pack(MANY, Compression.parse(kind)), MANY, kind, leaves)
    for tensor, sent, arrived in zip(MANY.tensors, leaves, got, strict=True):
        assert (arrived.shape, arrived.dtype) == (tensor.shape, tensor.dtype)
        if kind == "none" or not Compression.parse(kind).packs(tensor):
            assert arrived.tobytes() == sent.tobytes()
        elif kind == "bfloat16":
            wide = np.stack([sent.real, sent.imag]) if tensor.dtype.kind == "c" else sent
            also = np.stack([arrived.real, arrived.imag]) if tensor.dtype.kind == "c" else arrived
            assert (also == wide.astype(ml_dtypes.bfloat16).astype(also.dtype)).all()


@pytest.mark.parametrize(
    ("kind", "most"), [("none", 1.0), ("bfloat16", 0.501), ("int8", 0.253), ("topk:0.01", 0.0201)]
)
def test_how_many_bytes_are_sent(kind: str, most: float) -> None:
    model = layout((np.float32, (784, 128)), (np.float32, (128, 100)))
    assert Compression.parse(kind).packed(model).total_bytes <= most * model.total_bytes


@pytest.mark.parametrize("size", [1, BLOCK, 3 * BLOCK + 7])
def test_a_byte_is_off_by_less_than_its_scale_and_on_average_by_nothing(size: int) -> None:
    model = layout((np.float32, (size,)))
    (sent,) = drawn(model)
    pack = Pack(model, Compression("int8"), seed=3)
    several = [crossed(pack, model, "int8", [sent], n)[0][0] for n in range(100)]
    blocks = [np.abs(sent[at : at + BLOCK]).max() / 127 for at in range(0, size, BLOCK)]
    scales = np.repeat(blocks, BLOCK)[:size]
    assert all((np.abs(each - sent) <= scales * 1.0001).all() for each in several)
    # 100 roundings of a standard deviation of at most half a scale, added up.
    off = np.mean(several, axis=0) - sent
    assert (np.abs(off) <= 6 * 0.5 / np.sqrt(100) * scales).all()
    assert np.abs(off / scales).mean() <= 0.5 / np.sqrt(100)


def test_the_rounding_is_drawn_from_seed_epoch_and_number_alone() -> None:
    model = layout((np.float32, (2000,)), (np.float32, (2000,)))
    leaves = [drawn(model)[0]] * 2
    one, other = (Pack(model, Compression("int8"), seed=5) for _ in range(2))
    other(leaves, 0, 1)  # what came before does not matter
    first = [x.tobytes() for x in one(leaves, 2, 7)]
    assert first == [x.tobytes() for x in other(leaves, 2, 7)]
    assert first[0] != first[3]  # of two tensors that are the same, too
    for different in (one(leaves, 2, 8), one(leaves, 3, 7)):
        assert first != [x.tobytes() for x in different]
    assert first != [x.tobytes() for x in Pack(model, Compression("int8"), seed=6)(leaves, 2, 7)]


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "topk:0.01"])
def test_what_is_not_finite_arrives_as_that(kind: str) -> None:
    """So that it is refused, as it would be if it had been sent as it is."""
    model = layout((np.float32, (3 * BLOCK + 7,)))
    compression = Compression.parse(kind)
    pack, unpack = Pack(model, compression), Unpack(model, compression)
    packed = compression.packed(model)
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, 5, BLOCK, 3 * BLOCK + 6):
            leaves = drawn(model)
            leaves[0][place] = bad
            buffer = packed.empty()
            packed.pack(pack(leaves), buffer)
            assert not np.isfinite(unpack(buffer)[0]).all()


@settings(max_examples=30, deadline=None)
@given(
    ratio=st.sampled_from([0.001, 0.02, 0.4]),
    seed=st.integers(0, 1000),
    applied=st.lists(st.booleans(), min_size=1, max_size=6),
)
def test_what_is_left_out_is_pushed_later_and_only_what_was_applied_counts(
    ratio: float, seed: int, applied: list[bool]
) -> None:
    model = layout((np.float32, (300,)), (np.float32, (7, 11)))
    compression = Compression("topk", ratio)
    pack = Pack(model, compression)
    unpack = Unpack(model, compression)
    packed = compression.packed(model)
    due = [np.zeros(t.shape, np.float32) for t in model.tensors]
    for number, good in enumerate(applied):
        # Whole numbers, so that every sum is exact.
        random = np.random.default_rng(seed + number)
        leaves = [random.integers(-99, 99, t.shape).astype(np.float32) for t in model.tensors]
        buffer = packed.empty()
        packed.pack(pack(leaves), buffer)
        arrived = [np.asarray(x) for x in unpack(buffer)]
        whole = [d + leaf for d, leaf in zip(due, leaves, strict=True)]
        for tensor, sent, all_of_it in zip(model.tensors, arrived, whole, strict=True):
            if not compression.packs(tensor):
                assert (sent == all_of_it).all()
                continue
            chosen = sent != 0
            assert chosen.sum() <= compression.kept(tensor)
            assert (sent[chosen] == all_of_it[chosen]).all()
            left = np.abs(all_of_it[~chosen])
            if chosen.any() and left.size:
                assert left.max() <= np.abs(sent[chosen]).min()
        pack.settle(applied=good)
        if good:
            due = [a - b for a, b in zip(whole, arrived, strict=True)]
    norm = np.sqrt(sum(float((d**2).sum()) for d in due))
    assert pack.forget() == pytest.approx(norm, rel=1e-5)
    assert pack.forget() == 0


def test_packing_leaves_the_gradient_as_it_was() -> None:
    """Its buffers belong to the caller, whatever is donated inside."""
    model = layout((np.float32, (1000,)))
    leaf = jnp.arange(1000, dtype=jnp.float32)
    for kind in KINDS:
        pack = Pack(model, Compression.parse(kind))
        for _ in range(3):
            pack([leaf])
            pack.settle(applied=True)
    assert (np.asarray(leaf) == np.arange(1000)).all()


def test_a_place_outside_the_tensor_makes_it_not_finite() -> None:
    model = layout((np.float32, (1000,)))
    compression = Compression("topk", 0.01)
    packed = compression.packed(model)
    buffer = packed.empty()
    views = packed.views(buffer)
    views["places t0"][:] = [*range(9), 1000]
    views["values t0"][:] = 1
    (got,) = Unpack(model, compression)(buffer)
    assert not jnp.isfinite(got).any()
    views["places t0"][9] = 999
    (got,) = Unpack(model, compression)(buffer)
    assert float(jnp.sum(got)) == 10


@pytest.mark.parametrize("text", ["", "int4", "topk", "topk:", "topk:0", "topk:1", "topk:x", "top"])
def test_what_is_no_compression_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match=r"--compress .* it is none, bfloat16, int8, or topk"):
        Compression.parse(text)


@pytest.mark.parametrize("text", KINDS)
def test_its_text_reads_as_itself(text: str) -> None:
    assert str(Compression.parse(text)) == text


@pytest.mark.parametrize("ratio", ["0.12345649", "0.9999999", "1e-7"])
def test_its_text_has_every_digit_of_the_ratio(ratio: str) -> None:
    """It is what the welcome says: a worker has to send as many numbers as the server takes."""
    given = Compression.parse(f"topk:{ratio}")
    assert Compression.parse(str(given)) == given


def test_weights_are_pulled_as_they_are_or_as_bfloat16() -> None:
    assert pulls(None) == pulls("own") == Compression()
    assert pulls("bfloat16") == Compression("bfloat16")
    with pytest.raises(UsageError, match="--pull-dtype 'int8': it is one of own, bfloat16"):
        pulls("int8")


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "topk:0.1"])
def test_state_crosses_as_it_is(kind: str) -> None:
    """A counter or a running average must not be rounded."""
    state = [("mean", np.dtype(np.float32), (500,)), ("seen", np.dtype(np.int64), ())]
    model = Layout.of([("w", np.dtype(np.float32), (500,))], state)

    *_, mean, seen = Compression.parse(kind).packed(model).tensors

    assert (mean.dtype, mean.shape) == state[0][1:]
    assert (seen.dtype, seen.shape) == state[1][1:]


def test_double_precision_has_its_own_scale() -> None:
    with jax.enable_x64(True):
        model = layout((np.float64, (1500,)))
        leaves = drawn(model)
        got, _ = crossed(Pack(model, Compression("int8")), model, "int8", leaves)
        assert got[0].dtype == np.float64
        assert np.abs(got[0] - leaves[0]).max() < 0.05

"""Snapshots: what a version becomes on disk, that it comes back bit for bit, or not at all."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.protos import files, snapshot_file
from headwater.protos.errors import UsageError
from headwater.protos.snapshot_file import Facts, SnapshotError
from headwater.server.optimizer import AbstractOptimizer, OptaxOptimizer
from headwater.server.snapshots import Snapshots, arrays_of, restored
from headwater.server.store import Published, Store, initial
from headwater.worker.tree import ModelTree


class NoisySgd(AbstractOptimizer):
    """A state of every odd kind: a typed key, numbers, None, an empty node, small dtypes."""

    text = "noisy"

    def init(self, params: Any) -> Any:
        return {
            "key": jax.random.key(7),
            "threefry": jax.random.key(8, impl="rbg"),
            "count": jnp.int32(0),
            "flag": jnp.array(True),
            "nothing": None,
            "empty": (),
            "small": jnp.arange(4, dtype=jnp.float8_e4m3fn),
            "half": jnp.ones(3, jnp.bfloat16),
            "zero": jnp.zeros((0, 2)),
            "a/b": jnp.float32(1),
            "a": {"b": jnp.float32(2)},
        }

    def apply(self, grads: Any, state: Any, params: Any, loss: jax.Array) -> tuple[Any, Any]:
        key, here = jax.random.split(state["key"])
        noise = jax.random.normal(here)
        params = jax.tree.map(lambda p, g: p - 0.1 * (g + noise), params, grads)
        return params, state | {"key": key, "count": state["count"] + 1}


class Case(NamedTuple):
    """A store, and the gradient that moves it."""

    tree: ModelTree
    optimizer: AbstractOptimizer
    store: Store

    def move(self, position: int, store: Store | None = None) -> Published:
        buffer = self.tree.layout.empty()
        rng = np.random.default_rng(position)
        arrays = [rng.normal(size=s.shape).astype(s.dtype) for s in self.tree.layout.tensors]
        self.tree.layout.pack(arrays, buffer)
        return (store or self.store).apply(buffer, 0.5, position)


def case(optimizer: optax.GradientTransformation | AbstractOptimizer, params: Any = None) -> Case:
    params = params or {"kernel": jnp.ones((5, 3)), "bias": jnp.zeros(3), "none": None}
    if not isinstance(optimizer, AbstractOptimizer):
        optimizer = OptaxOptimizer(optimizer, "the test's")
    tree = ModelTree(params)
    return Case(tree, optimizer, Store(tree, optimizer, initial(tree, params, optimizer)))


def save(snapshots: Snapshots, case: Case, published: Published | None = None) -> None:
    published = published or case.store.current
    arrays, prefix = arrays_of(case.tree.layout, published)
    facts = Facts(
        run_id="20270101-120000-abcd",
        task="mine",
        incarnation=published.incarnation,
        version=published.version,
        applied=[list(pair) for pair in published.applied.pairs],
        left_out=[list(pair) for pair in published.left_out.pairs],
        settings=published.settings.to_json(),
        optimizer=case.optimizer.text,
        optimizer_prefix=prefix,
        software={"jax": jax.__version__},
        tensors={},
    )
    snapshots.save(facts, arrays)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "adam": optax.adam(1e-2),
    "schedule": optax.adamw(optax.cosine_decay_schedule(0.1, 100)),
    "masked": optax.masked(optax.adam(1e-2), {"kernel": True, "bias": False, "none": None}),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(0.1)),
    "accumulating": optax.MultiSteps(optax.adam(1e-2), 3),
    "plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    "odd": NoisySgd(),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit_from_a_snapshot(name: str, tmp_path: Path) -> None:
    whole, snapshots = case(OPTIMIZERS[name]), Snapshots(tmp_path, 3)
    for position in (0, 1, 3):
        whole.move(position)
    whole.store.leave_out(2)
    save(snapshots, whole)

    start = restored(snapshots.newest(), whole.tree, whole.optimizer, incarnation=2)
    again = Store(whole.tree, whole.optimizer, start)

    assert (start.incarnation, start.version) == (2, 3)
    assert (start.applied, start.left_out) == (
        whole.store.current.applied,
        whole.store.current.left_out,
    )
    for position in (4, 5, 6, 7):
        whole.move(position)
        whole.move(position, again)
    assert_same(again.current, whole.store.current)


def assert_same(one: Published, other: Published) -> None:
    for a, b in zip(
        jax.tree.leaves((one.leaves, one.optimizer_state)),
        jax.tree.leaves((other.leaves, other.optimizer_state)),
        strict=True,
    ):
        assert a.dtype == b.dtype
        assert bits(a) == bits(b)


def bits(leaf: jax.Array) -> tuple[str, bytes]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(leaf))
        return str(jax.random.key_impl(leaf)), data.tobytes()
    return leaf.dtype.name, np.asarray(leaf).tobytes()


def test_the_weights_are_there_under_their_own_names_for_any_reader(tmp_path: Path) -> None:
    mine = case(optax.adam(1e-2))
    published = mine.move(0)
    save(Snapshots(tmp_path, 3), mine)

    arrays = safetensors.numpy.load_file(Snapshots(tmp_path, 3).path(1))

    weights = {name for name in arrays if not name.startswith("optimizer/")}
    assert weights == {"kernel", "bias"}
    for spec, leaf in zip(mine.tree.layout.tensors, published.leaves, strict=True):
        np.testing.assert_array_equal(arrays[spec.name], leaf)


def test_a_model_may_call_its_weights_optimizer(tmp_path: Path) -> None:
    params = {"optimizer": {"0": {"mu": {"w": jnp.ones(3)}}}, "w": jnp.zeros(2)}
    mine, snapshots = case(optax.adam(0.1), params), Snapshots(tmp_path, 3)
    mine.move(0)
    save(snapshots, mine)

    start = restored(snapshots.newest(), mine.tree, mine.optimizer, incarnation=2)

    assert_same(start, mine.store.current)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    mine, snapshots = case(optax.adam(0.1)), Snapshots(tmp_path, 3)
    save(snapshots, mine)

    with pytest.raises(UsageError, match="trained with the test's, whose state does not fit"):
        restored(snapshots.newest(), mine.tree, case(optax.sgd(0.1)).optimizer, incarnation=2)


def test_another_models_weights_are_refused_and_named(tmp_path: Path) -> None:
    mine, snapshots = case(optax.sgd(0.1)), Snapshots(tmp_path, 3)
    save(snapshots, mine)
    wider = case(optax.sgd(0.1), {"kernel": jnp.ones((5, 4)), "bias": jnp.zeros(4)})

    with pytest.raises(UsageError, match=r"has float32\[3\] for bias, the task has float32\[4\]"):
        restored(snapshots.newest(), wider.tree, wider.optimizer, incarnation=2)


# ------------------------------------------------------------- the folder


def test_the_newest_are_kept_and_the_others_removed(tmp_path: Path) -> None:
    mine, snapshots = case(optax.sgd(0.1)), Snapshots(tmp_path, 2)
    for position in range(12):
        save(snapshots, mine, mine.move(position))

    assert snapshots.versions() == [11, 12]
    assert snapshots.newest().facts.version == 12


def test_a_newest_that_cannot_be_read_for_now_is_left_where_it_is(tmp_path: Path) -> None:
    """Its version was called durable; to go back behind it is not the server's to decide."""
    mine, snapshots = case(optax.sgd(0.1)), Snapshots(tmp_path, 3)
    for position in range(2):
        save(snapshots, mine, mine.move(position))
    newest = snapshots.path(2)
    newest.rename(tmp_path / "elsewhere")
    newest.mkdir()  # nobody may read it, root neither

    with pytest.raises(UsageError, match=r"cannot be read: Is a directory; nothing was changed"):
        snapshots.newest()

    assert snapshots.versions() == [1, 2]


def test_a_damaged_newest_is_set_aside_and_the_one_before_it_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine, snapshots = case(optax.sgd(0.1)), Snapshots(tmp_path, 3)
    for position in range(3):
        save(snapshots, mine, mine.move(position))
    damage(snapshots.path(3))
    damage(snapshots.path(2))

    with caplog.at_level(logging.ERROR, "headwater.server"):
        found = snapshots.newest()

    assert found.facts.version == 1
    assert snapshots.versions() == [1]
    assert len(list(tmp_path.glob("*.damaged"))) == 2
    assert [m.partition(": ")[0] for m in caplog.messages] == [
        str(snapshots.path(3)),
        str(snapshots.path(2)),
    ]


def test_where_none_is_whole_nothing_is_used_and_nothing_overwritten(tmp_path: Path) -> None:
    mine, snapshots = case(optax.sgd(0.1)), Snapshots(tmp_path, 3)
    save(snapshots, mine)
    damage(snapshots.path(0))
    before = snapshots.path(0).read_bytes()

    with pytest.raises(UsageError, match="none of its 1 snapshots is whole: it cannot be"):
        snapshots.newest()

    assert Path(f"{snapshots.path(0)}.damaged").read_bytes() == before


def test_a_folder_without_a_snapshot_cannot_be_continued(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a run, but no snapshot: it cannot be continued"):
        Snapshots(tmp_path, 3).newest()


def test_a_snapshot_of_a_later_headwater_is_refused_and_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, snapshots = case(optax.sgd(0.1)), Snapshots(tmp_path, 3)
    save(snapshots, mine)
    monkeypatch.setattr(snapshot_file, "FORMAT", snapshot_file.FORMAT + 1)
    save(snapshots, mine, mine.move(0))
    monkeypatch.undo()

    with pytest.raises(UsageError, match=r"its format is 2, and this version .* reads up to 1"):
        snapshots.newest()
    assert snapshots.versions() == [0, 1]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    mine, snapshots = case(optax.sgd(0.1)), Snapshots(tmp_path, 3)
    save(snapshots, mine)
    half = tmp_path / f"{files.temporary_prefix(snapshots.path(1))}1a2b3c4d"
    half.write_bytes(b"half")

    snapshots.remove_leftovers()

    assert [path.name for path in tmp_path.iterdir()] == [snapshots.path(0).name]


# ------------------------------------------------------------- damage


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    mine, snapshots = case(optax.adam(0.1)), Snapshots(folder, 3)
    mine.move(0)
    save(snapshots, mine)
    return snapshots.path(1).read_bytes()


def test_a_thousand_flipped_bits_are_all_noticed(whole: bytes, tmp_path: Path) -> None:
    path, rng = tmp_path / "snapshot.safetensors", random.Random(1)  # noqa: S311
    for bit in rng.sample(range(8 * len(whole)), 1000):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(SnapshotError, match=rf"^{path}: "):
            snapshot_file.read(path)


def test_a_file_cut_at_any_byte_is_noticed(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "snapshot.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(SnapshotError, match=rf"^{path}: "):
            snapshot_file.read(path)


def test_bytes_after_the_last_tensor_are_noticed(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "snapshot.safetensors"
    path.write_bytes(whole + b"\0")
    with pytest.raises(SnapshotError, match="it goes on after its last tensor"):
        snapshot_file.read(path)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=400))
def test_what_is_no_snapshot_is_said_to_be_none(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "nonsense.safetensors"
    path.write_bytes(data)
    with pytest.raises(SnapshotError):
        snapshot_file.read(path)


def test_plain_weights_are_no_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file({"w": np.ones(3)}, path, {"version": "7"})
    with pytest.raises(SnapshotError, match="holds tensors, but is no snapshot of Headwater's"):
        snapshot_file.read(path)

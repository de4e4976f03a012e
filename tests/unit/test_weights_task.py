"""A task without code: what of a file is served, and what is said of wrong usage."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from headwater.protos.errors import UsageError
from headwater.protos.tensor_file import encode
from headwater.server.config import ServerConfig
from headwater.server.embedded import Server
from headwater.server.run_dir import RunDir
from headwater.server.run_record import RunRecord
from headwater.server.weights_task import weights_task

FLOATS = {"layers/0/kernel": np.ones((3, 2), np.float32), "bias": np.zeros(2, np.float16)}
OTHERS = {"step": np.array(3, np.int32), "mask": np.array([True, False])}


def write(path: Path, metadata: dict[str, str] | None = None, **arrays: np.ndarray) -> Path:
    path.write_bytes(b"".join(map(bytes, encode(arrays, metadata or {}))))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "net.safetensors", **FLOATS, **OTHERS)


def config(file: Path | None, **options: Any) -> ServerConfig:
    init = None if file is None else str(file)
    return ServerConfig(**{"optimizer": "sgd(1.0)", "init": init, **options})


def test_floats_are_trained_and_all_else_is_constant(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("headwater").propagate = True
    with caplog.at_level(logging.INFO, "headwater.server"):
        loaded = weights_task(config(file), None)

    tensors = [t.describe() for t in loaded.task.tree.layout.tensors]
    assert loaded.task.tree.names == ["bias", "layers/0/kernel", "mask", "step"]
    assert tensors == ["float16[2]", "float32[3,2]", "bool[2] constant", "int32[] constant"]
    assert loaded.name == "net"
    assert "not trained, for they are no floats: step (int32), mask (bool)" in caplog.text


def test_64_bits_stay_64_bits(tmp_path: Path) -> None:
    file = write(tmp_path / "w.safetensors", x=np.full(2, math.pi), n=np.array([2**40]))
    before = jax.config.jax_enable_x64
    try:
        layout = weights_task(config(file), None).task.tree.layout
    finally:
        jax.config.update("jax_enable_x64", before)

    assert [t.dtype.name for t in layout.tensors] == ["float64", "int64"]


def test_a_mask_is_a_dict_of_the_same_names(file: Path, tmp_path: Path) -> None:
    names = '{"bias": False, "layers/0/kernel": True, "mask": None, "step": None}'
    asked = config(
        file,
        optimizer=f"chain(masked(scale(2.0), {names}), sgd(1.0))",
        run_dir=tmp_path / "run",
        listen="127.0.0.1:0",
    )
    loaded = weights_task(asked, None)
    fields = {f.name: getattr(asked, f.name) for f in dataclasses.fields(asked)}
    with contextlib.closing(Server(loaded.task, **fields)._prepared.run_dir):
        pass  # the optimizer's state could be made


@pytest.mark.parametrize(
    ("options", "examples", "message"),
    [
        ({"init": None}, None, "give --task TASK, or for a run without task code --init"),
        ({"optimizer": None}, None, "add --optimizer SPEC"),
        ({"batch_size": 4}, None, "--batch-size 4 without --task says nothing unless there are"),
        ({"epochs": 2}, None, "--epochs 2 without --task says nothing unless there are"),
        ({}, 100, "add --batch-size N"),
        ({}, -1, "--examples -1 must be at least 1"),
        ({"consistency": "sync:2"}, None, "a run without --examples has none; use async"),
        ({"local_steps": 4, "batch_size": 4}, 8, "--local-steps and --inner-optimizer need --task"),
    ],
)
def test_wrong_usage_says_what_to_add(
    options: dict[str, Any], examples: int | None, message: str, file: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        weights_task(config(file, **options), examples)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "nothing to train in it, only no array at all"),
        (OTHERS, r"nothing to train in it, only step \(int32\), mask \(bool\)"),
        ({"": np.zeros(1, np.float32)}, "the array '' of dtype float32 cannot be served"),
    ],
)
def test_a_file_with_nothing_to_serve_is_refused(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        weights_task(config(write(tmp_path / "w.safetensors", **arrays)), None)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory"):
        weights_task(config(tmp_path / "nowhere.safetensors"), None)
    (tmp_path / "text").write_text("these are no weights, but a text that is long enough")
    with pytest.raises(UsageError, match="does not begin with a header's length"):
        weights_task(config(tmp_path / "text"), None)
    snapshot = write(tmp_path / "s.safetensors", {"snapshot_crc32c": "0"}, **FLOATS)
    with pytest.raises(UsageError, match="it is a snapshot"):
        weights_task(config(snapshot), None)


def test_a_run_of_a_task_is_continued_with_its_task(file: Path, tmp_path: Path) -> None:
    with contextlib.closing(RunDir(tmp_path / "run", "mnist")) as run_dir:
        values = {f.name: None for f in dataclasses.fields(RunRecord)}
        asked = {"epochs": 3}
        run_dir.write_record(RunRecord(**values | {"task": "mnist", "asked": asked}))

    with pytest.raises(UsageError, match=r"holds a run of the task mnist; continue it with --task"):
        weights_task(config(file, run_dir=tmp_path / "run"), None)

"""Weights as a safetensors file: what any reader finds in it, and that it is whole or not there."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from headwater.protos.files import replace_file
from headwater.protos.layout import DTYPES
from headwater.protos.tensor_file import FormatError, read_file
from headwater.protos.weights_file import save_weights

ALL_BITS = np.arange(256, dtype=np.uint8)


def read_back(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What a safetensors reader finds, once it has followed our notes; and the metadata."""
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata() or {}
    arrays = {}
    for name, stored in safetensors.numpy.load_file(path).items():
        note = metadata.get(f"dtype:{name}")
        array = stored if note is None else stored.view(DTYPES[note])
        arrays[name] = array[..., 0] if note == "complex128" and stored.ndim else array
    return arrays, metadata


@pytest.mark.parametrize("name", DTYPES)
def test_every_bit_pattern_of_every_dtype_is_read_back(name: str, tmp_path: Path) -> None:
    path, dtype = tmp_path / "weights.safetensors", DTYPES[name]
    flat = np.repeat(ALL_BITS, dtype.itemsize).view(dtype)
    arrays = {"flat": flat, "square": flat.reshape(16, 16), "none": flat[:0].reshape(0, 3)}

    save_weights(path, arrays, {})

    for found in (read_back(path)[0], read_file(path)):
        assert found.keys() == arrays.keys()
        for tensor, array in arrays.items():
            assert (found[tensor].dtype, found[tensor].shape) == (dtype, array.shape)
            assert found[tensor].tobytes() == array.tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_a_scalar_is_read_back(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    array = np.ones((), DTYPES[name])

    save_weights(path, {"temperature": array}, {})

    for found in (read_back(path)[0], read_file(path)):
        assert (found["temperature"].dtype, found["temperature"].shape) == (array.dtype, ())
        assert found["temperature"].tobytes() == array.tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_that_the_format_lacks_is_named_in_the_metadata(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, {"w": np.ones(3, DTYPES[name])}, {"version": "41"})

    stored = safetensors.numpy.load_file(path)["w"]
    _, metadata = read_back(path)

    expected = {"version": "41"}
    if stored.dtype != DTYPES[name]:
        expected["dtype:w"] = name
    assert metadata == expected


def test_the_common_dtypes_need_no_note(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    common = ["float16", "float32", "float64", "bfloat16", "complex64"]
    save_weights(path, {name: np.ones(2, DTYPES[name]) for name in common}, {})

    stored = safetensors.numpy.load_file(path)

    assert {name: array.dtype.name for name, array in stored.items()} == {n: n for n in common}


def test_complex128_is_stored_as_pairs_of_float64(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, {"w": np.array([[1 + 2j, 3 - 4j]])}, {})

    stored = safetensors.numpy.load_file(path)["w"]

    np.testing.assert_array_equal(stored, [[[1.0, 2.0], [3.0, -4.0]]])


def test_arrays_that_are_not_contiguous_are_written_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    arrays = {
        name: np.arange(24).astype(DTYPES[name]).reshape(2, 3, 4).transpose(2, 0, 1)[::-1]
        for name in ("float32", "complex128", "float8_e4m3")
    }

    save_weights(path, arrays, {})

    found, _ = read_back(path)
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_only_its_owner_may_write_the_file_and_the_umask_says_who_reads(
    umask: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        save_weights(tmp_path / "w.safetensors", {"w": np.ones(2)}, {})
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == 0o644 & ~umask


def test_a_file_that_was_there_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, {"old": np.ones(2)}, {})
    save_weights(path, {"new": np.zeros(3)}, {})

    assert list(safetensors.numpy.load_file(path)) == ["new"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("there", [True, False], ids=["replacing", "new"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("call", ["fsync", "write", "replace"])
def test_an_error_while_writing_leaves_the_folder_as_it_was(
    call: str, error: BaseException, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    if there:
        path.write_bytes(b"the old weights")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)) as raised:
        save_weights(path, {"w": np.ones(1000)}, {})

    assert raised.value is error
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == (
        {path.name: b"the old weights"} if there else {}
    )


def test_a_missing_folder_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        save_weights(tmp_path / "missing" / "w.safetensors", {"w": np.ones(2)}, {})


def test_the_bytes_are_on_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w"
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(handle: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
        size = "" if kind == "folder" else f" of {os.fstat(handle).st_size} bytes"
        done.append(f"fsync {kind}{size}")
        fsync(handle)

    def recorded_replace(source: str, target: Path) -> None:
        done.append(f"rename to {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    replace_file(path, [b"a", b"bc"])

    assert done == ["fsync file of 3 bytes", "rename to w", "fsync folder"]
    assert path.read_bytes() == b"abc"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{}" + b" " * 6, ""),
        (b"[1, 2] ", "not that of a safetensors file"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "a has 4 bytes"),
        (b'{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}', "F31"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}', "a has -4 bytes"),
        (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "it ends 16 bytes early"),
        (b'{"a":{"dtype":"F32"}}', "not that of a safetensors file: 'data_offsets'"),
    ],
)
def test_a_header_that_lies_is_an_error_that_says_so(
    header: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)

    if not message:
        assert read_file(path) == {}
        return
    with pytest.raises(FormatError) as error:
        read_file(path)
    assert message in str(error.value)

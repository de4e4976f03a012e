"""--init begins a run with weights from a file, and says what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from headwater.client.client import Client
from kit import counting
from kit.lives import Lives
from kit.processes import FREE_PORT, Command, run

SMALL = counting.options(examples=8, batch_size=4, epochs=2)
START = {"count": np.arange(8, dtype=np.float32), "padding": np.zeros(0, np.float32)}


def write(path: Path, **changed: np.ndarray) -> str:
    """The task's weights in a file as the library writes it."""
    arrays = {"padding": np.zeros(0, np.float32), "count": START["count"], **changed}
    save_file({name: array for name, array in arrays.items() if array is not None}, path)
    return str(path)


def refused(folder: Path, *options: str) -> str:
    """What a server says that does not begin; it leaves nothing behind."""
    done = run("server", "--task", counting.__file__, *FREE_PORT, *SMALL, *options, cwd=folder)
    assert done.status == 2, done.errors
    assert "Traceback" not in done.errors
    assert not (folder / "runs").exists()
    return done.errors


def test_a_run_begins_with_the_files_weights_and_replays_from_them(tmp_path: Path) -> None:
    file = write(tmp_path / "start.safetensors")
    with Lives(tmp_path, SMALL, ["--init", file]) as lives:
        lives.start()
        with Client(lives.address) as client:
            np.testing.assert_array_equal(client.pull()["count"], START["count"])
            words = ("worker", "--task", counting.__file__, "--server", lives.address, *SMALL)
            with Command(*words, cwd=tmp_path):
                lives.finished()
            np.testing.assert_array_equal(client.pull()["count"], START["count"] + 2)
    replayed = run("replay", "run", "--task", counting.__file__, *SMALL, cwd=tmp_path)
    assert replayed.status == 0, replayed.errors
    assert "has the same bits as in the run" in replayed.output


def test_a_run_that_is_continued_goes_on_with_its_own_weights(tmp_path: Path) -> None:
    file = write(tmp_path / "start.safetensors")
    with Lives(tmp_path, SMALL, ["--init", file]) as lives:
        lives.start()
        words = ("worker", "--task", counting.__file__, "--server", lives.address, *SMALL)
        with Command(*words, cwd=tmp_path):
            lives.finished()
        lives.kill()
        Path(file).unlink()
        lives.start()
        with Client(lives.address) as client:
            np.testing.assert_array_equal(client.pull()["count"], START["count"] + 2)


def test_what_was_pulled_from_one_run_begins_another(tmp_path: Path) -> None:
    with Lives(tmp_path, SMALL) as lives:
        lives.start()
        assert run("pull", "w.safetensors", "--server", lives.address, cwd=tmp_path).status == 0
    pulled = load_file(tmp_path / "w.safetensors")
    (tmp_path / "next").mkdir()
    with Lives(tmp_path / "next", SMALL, ["--init", "../w.safetensors"]) as lives:
        lives.start()
        with Client(lives.address) as client:
            np.testing.assert_array_equal(client.pull()["count"], pulled["count"])


def test_floats_of_another_width_are_cast(tmp_path: Path) -> None:
    file = write(tmp_path / "half.safetensors", count=START["count"].astype(np.float16))
    with Lives(tmp_path, SMALL, ["--init", file]) as lives:
        lives.start()
        with Client(lives.address) as client:
            found = client.pull()["count"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, START["count"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": np.zeros(9, np.float32)}, "count has shape [9], the model's is [8]"),
        ({"more": np.zeros(1, np.float32)}, "missing [], unknown ['more']"),
        ({"count": None}, "missing ['count'], unknown []"),
        ({"count": np.zeros(8, np.int32)}, "count is int32, the model's is float32"),
        ({"count": np.full(8, np.nan, np.float32)}, "8 of the 8 numbers in count"),
    ],
    ids=["shape", "unknown", "missing", "integers", "not finite"],
)
def test_weights_of_another_model_are_refused(
    changed: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "w.safetensors", **changed)

    errors = refused(tmp_path, "--init", file)

    assert file in errors
    assert message in errors


def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("these are no weights, but a text that is long enough")
    assert "No such file or directory" in refused(tmp_path, "--init", "nowhere.safetensors")
    assert "does not begin with a header's length" in refused(tmp_path, "--init", "text")
    whole = Path(write(tmp_path / "w.safetensors")).read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-4])
    assert "it ends 4 bytes early" in refused(tmp_path, "--init", "cut")

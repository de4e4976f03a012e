"""Where a run is kept: one server at a time, nothing overwritten, errors that say what to do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from headwater.protos.errors import UsageError
from headwater.server.run_dir import FORMAT, RunDir


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def opened(path: Path | None = None, task_name: str = "mnist") -> contextlib.closing[RunDir]:
    return contextlib.closing(RunDir(path, task_name))


def refusal(path: Path) -> str:
    """Why it cannot be used. What stays open is closed: another test is about that."""
    with pytest.raises(UsageError) as error:
        RunDir(path, "mnist")
    close_left_open(error)
    return str(error.value)


def close_left_open(error: pytest.ExceptionInfo[UsageError]) -> list[str]:
    """Close the files of a RunDir that was refused; their names."""
    half_made = error.traceback[-1].frame.f_locals["self"]
    files = [getattr(half_made, name, None) for name in ("_lock", "_metrics")]
    left = [file for file in files if file and not file.closed]
    for file in left:
        file.close()
    return [Path(file.name).name for file in left]


def test_a_run_is_kept_under_runs_by_its_task_and_id() -> None:
    with opened() as run:
        assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", run.run_id)
        assert run.path == Path("runs", f"mnist-{run.run_id}")
        assert run.path.is_dir()
        assert run.weights_path == run.path / "weights.safetensors"


def test_a_directory_may_be_named_and_is_made_with_its_parents() -> None:
    with opened(Path("a/b/c")) as run:
        assert run.path == Path("a/b/c")
        assert run.path.is_dir()


def test_runs_that_begin_in_the_same_second_have_ids_of_their_own() -> None:
    with opened() as one, opened() as other:
        assert one.run_id != other.run_id


# ------------------------------------------------------------- latest


def test_latest_is_the_newest_run() -> None:
    latest = Path("runs/latest")
    with opened() as first:
        assert latest.resolve() == first.path.resolve()
        with opened() as second:
            assert latest.resolve() == second.path.resolve()
    assert latest.is_symlink()
    assert not latest.readlink().is_absolute()  # so that runs/ can be moved
    assert [path.name for path in Path("runs").glob(".*")] == []


def test_latest_may_point_at_a_run_that_was_removed() -> None:
    Path("runs").mkdir()
    Path("runs/latest").symlink_to("gone")

    with opened() as run:
        assert Path("runs/latest").resolve() == run.path.resolve()


def test_a_named_directory_is_not_the_latest_run() -> None:
    with opened(Path("mine")):
        assert not Path("runs").exists()


def test_a_latest_that_cannot_be_replaced_is_said_and_is_no_reason_to_fail(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("runs/latest").mkdir(parents=True)

    with opened():
        pass

    assert capsys.readouterr().out == (
        "headwater server: runs/latest could not be linked: Is a directory\n"
    )


def test_a_latest_that_cannot_be_replaced_leaves_nothing_behind() -> None:
    Path("runs/latest").mkdir(parents=True)

    with opened():
        pass

    assert list(Path("runs").glob(".*")) == []


# ------------------------------------------------------------- what cannot be used


def test_a_directory_that_another_server_has_is_refused() -> None:
    with opened(Path("mine")):
        assert refusal(Path("mine")) == (
            "another server has the run directory mine; stop it, or name another with --run-dir"
        )


def test_a_directory_that_another_process_has_is_refused() -> None:
    with opened(Path("mine")):
        script = """
            from pathlib import Path
            from headwater.protos.errors import UsageError
            from headwater.server.run_dir import RunDir
            try:
                RunDir(Path("mine"), "mnist")
            except UsageError as error:
                print(error)
        """
        done = subprocess.run(  # noqa: S603  (our own text)
            [sys.executable, "-c", textwrap.dedent(script)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    assert done.stdout.startswith("another server has the run directory mine;")


def test_a_directory_is_free_again_when_its_server_has_closed_it() -> None:
    with opened(Path("mine")):
        pass
    with opened(Path("mine")):
        pass


@contextlib.contextmanager
def with_a_run() -> Iterator[Path]:
    with opened(Path("mine")) as run:
        run.write_run({})
    yield run.path


def test_a_directory_that_holds_a_run_is_refused_and_left_as_it_is() -> None:
    with with_a_run() as path:
        before = (path / "run.json").read_bytes()

        message = refusal(path)

        assert message == (
            "mine holds a run already, and this version cannot continue one; name another with "
            "--run-dir"
        )
        assert (path / "run.json").read_bytes() == before


@pytest.mark.parametrize("what", ["", "lock", "metrics.jsonl"])
def test_a_directory_that_cannot_be_written_is_refused_with_the_reason(what: str) -> None:
    if what:
        Path("mine", what).mkdir(parents=True)
        reason = "Is a directory"
    else:
        Path("mine").write_text("a file")
        reason = "File exists"

    assert refusal(Path("mine")) == (
        f"the run directory mine cannot be written: {reason}; name another with --run-dir"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_leave_to_write_is_refused() -> None:
    Path("mine").mkdir(mode=0o500)
    assert "Permission denied" in refusal(Path("mine"))


def test_a_refused_directory_is_not_kept_open() -> None:
    with with_a_run() as path:
        with pytest.raises(UsageError) as error:
            RunDir(path, "mnist")

        assert close_left_open(error) == []


# ------------------------------------------------------------- what is written


def test_run_json_says_what_the_run_is() -> None:
    with opened(Path("mine")) as run:
        run.write_run({"incarnation": 1, "task": "mnist", "settings": {"epochs": 3}})

        text = Path("mine/run.json").read_text()
        assert json.loads(text) == {
            "format": FORMAT,
            "run_id": run.run_id,
            "incarnation": 1,
            "task": "mnist",
            "settings": {"epochs": 3},
        }
        assert text.endswith("}\n")


def test_run_json_is_replaced_whole() -> None:
    with opened(Path("mine")) as run:
        run.write_run({"incarnation": 1})
        run.write_run({"incarnation": 2})

        assert json.loads(Path("mine/run.json").read_text())["incarnation"] == 2
        assert {path.name for path in run.path.iterdir()} == {"lock", "metrics.jsonl", "run.json"}


def test_weights_are_a_safetensors_file() -> None:
    with opened(Path("mine")) as run:
        run.save_weights({"w": np.arange(3, dtype=np.float32)}, {"version": "7"})
        run.save_weights({"w": np.ones(3, np.float32)}, {"version": "8"})

        (w,) = safetensors.numpy.load_file(run.weights_path).values()
        np.testing.assert_array_equal(w, [1, 1, 1])


def test_metrics_are_a_json_object_a_line_and_are_there_at_once() -> None:
    with opened(Path("mine")) as run:
        before = time.time()
        run.log_metrics("progress", {"version": 1, "loss": 0.5})
        run.log_metrics("evaluation", {"accuracy": 0.9, "note": "Öl\n"})

        first, second = map(json.loads, Path("mine/metrics.jsonl").read_text().splitlines())
        assert before <= first.pop("time") <= second.pop("time") <= time.time()
        assert first == {"kind": "progress", "version": 1, "loss": 0.5}
        assert second == {"kind": "evaluation", "accuracy": 0.9, "note": "Öl\n"}


def test_a_metric_that_is_not_finite_is_still_json() -> None:
    with opened(Path("mine")) as run:
        run.log_metrics("evaluation", {"perplexity": float("inf"), "loss": float("nan")})

        text = Path("mine/metrics.jsonl").read_text()
        assert "Infinity" not in text
        assert "NaN" not in text

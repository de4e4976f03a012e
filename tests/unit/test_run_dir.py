"""Where a run is kept: one server at a time, nothing overwritten, errors that say what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from headwater.protos import files
from headwater.protos.errors import UsageError
from headwater.server.config import ServerConfig
from headwater.server.run_dir import RunDir
from headwater.server.run_record import FORMAT, RunRecord


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def opened(path: Path | None = None, task_name: str = "mnist") -> contextlib.closing[RunDir]:
    return contextlib.closing(RunDir(path, task_name))


def refusal(path: Path) -> str:
    """Why it cannot be used; what was opened is closed again."""
    before = open_files()
    with pytest.raises(UsageError) as error:
        RunDir(path, "mnist")
    assert open_files() == before
    return str(error.value)


def open_files() -> list[str]:
    return sorted(file.path for file in psutil.Process().open_files())


def record(**changes: Any) -> RunRecord:
    values = {
        "run_id": "20270101-120000-abcd",
        "incarnation": 1,
        "task": "mnist",
        "options": {"width": "64"},
        "layout": "0123456789abcdef",
        "example_count": 4000,
        "batch_size": 32,
        "seed": 0,
        "shuffle": True,
        "remainder": "keep",
        "order_version": 1,
        "epochs": 10,
        "local_steps": 1,
        "updates": 1250,
        "optimizer": "adam(1e-3)",
        "asked": {"epochs": 10, "optimizer": None},
    }
    return RunRecord(**values | changes)


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
            f"another server (pid {os.getpid()}) has the run directory mine; stop it, or name "
            "another with --run-dir"
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
    assert done.stdout.startswith(f"another server (pid {os.getpid()}) has the run directory mine;")


def test_a_directory_is_free_again_when_its_server_has_closed_it() -> None:
    with opened(Path("mine")):
        pass
    with opened(Path("mine")):
        pass


# ------------------------------------------------------------- a run that is there


def test_a_run_that_is_there_is_found_with_its_id() -> None:
    with opened(Path("mine")) as run:
        run.write_record(record())

    assert RunDir.holds_run(Path("mine"))
    with opened(Path("mine")) as again:
        assert again.record == record()
        assert again.run_id == record().run_id


def test_an_empty_directory_holds_no_run() -> None:
    with opened(Path("mine")) as run:
        assert run.record is None
    assert not RunDir.holds_run(Path("mine"))
    assert not RunDir.holds_run(None)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"run_id": "x"}', "null"])
def test_a_run_json_that_was_damaged_is_refused_and_left_as_it_is(text: str) -> None:
    Path("mine").mkdir()
    Path("mine/run.json").write_text(text)

    message = refusal(Path("mine"))

    assert message.startswith("mine/run.json was damaged (")
    assert "restore it from a copy" in message
    assert Path("mine/run.json").read_text() == text


def test_a_run_of_a_later_headwater_is_refused() -> None:
    Path("mine").mkdir()
    Path("mine/run.json").write_text(json.dumps({"format": FORMAT + 1, "what": "ever"}))

    assert refusal(Path("mine")) == (
        f"mine/run.json has format {FORMAT + 1}, and this version of Headwater reads up to "
        f"{FORMAT}; continue the run with the version that began it, or a later one"
    )


def test_the_next_incarnation_counts_on() -> None:
    new = record(run_id="another", epochs=20, asked={})

    assert record(incarnation=7).continued_as(new, "mine") == dataclasses.replace(
        new, run_id=record().run_id, incarnation=8
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "cifar"}, "task: mnist in the directory, cifar now"),
        ({"options": {}}, "task options: width=64 in the directory, none now"),
        ({"layout": "f" * 16}, "tensors: 0123456789ab in the directory, ffffffffffff now"),
        ({"example_count": 60000}, "examples: 4000 in the directory, 60000 now"),
        ({"batch_size": 64}, "batch size: 32 in the directory, 64 now"),
        ({"seed": 1}, "seed: 0 in the directory, 1 now"),
        ({"shuffle": False}, "shuffle: True in the directory, False now"),
        ({"remainder": "drop"}, "remainder: keep in the directory, drop now"),
        ({"order_version": 2}, "version of the batch order: 1 in the directory, 2 now"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_another_run_is_refused_and_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=f"mine holds another run.*{re.escape(said)}"):
        record().continued_as(record(**change), "mine")


def test_what_was_asked_for_goes_on_to_hold_unless_asked_anew() -> None:
    before = record(asked={"epochs": 10, "batch_size": None, "optimizer": "sgd(0.1)", "seed": 3})

    settings = before.settings(ServerConfig(epochs=20))

    assert (settings.epochs, settings.batch_size) == (20, None)
    assert (settings.optimizer, settings.seed) == ("sgd(0.1)", 3)


@pytest.mark.parametrize(
    "name", ["run.json", "metrics.jsonl", "weights.safetensors", "evaluation.safetensors"]
)
def test_what_a_killed_server_left_half_written_is_removed(name: str) -> None:
    with opened(Path("mine")) as run:
        half = run.path / f"{files.temporary_prefix(run.path / name)}1a2b3c4d"
        half.write_bytes(b"half")

    with opened(Path("mine")):
        assert not half.exists()


# ------------------------------------------------------------- a server that is ending


def test_a_directory_whose_server_is_ending_is_waited_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = RunDir(Path("mine"), "mnist")
    first.ends_within(20)
    threading.Timer(0.5, first.close).start()

    with caplog.at_level(logging.INFO, "headwater.server"), opened(Path("mine")):
        pass

    assert caplog.messages == [
        f"waiting up to 25 s for the server (pid {os.getpid()}) that is ending in mine"
    ]


def test_a_server_that_does_not_end_in_time_is_waited_for_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("headwater.server.run_dir.LOCK_EXTRA_S", 0.2)
    with opened(Path("mine")) as first:
        first.ends_within(0.1)

        assert "has not ended within 0 s; end it" in refusal(Path("mine"))


def test_the_wait_is_for_the_server_that_is_ending_and_not_for_its_successor() -> None:
    with opened(Path("mine")) as first:
        first.ends_within(20)
    with opened(Path("mine")):
        assert "another server" in refusal(Path("mine"))


# ------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize("what", ["", "lock", "metrics.jsonl"])
def test_a_directory_that_cannot_be_written_is_refused_with_the_reason(what: str) -> None:
    if what:
        Path("mine", what).mkdir(parents=True)
        reason = "Is a directory"
    else:
        Path("mine").write_text("a file")
        reason = "File exists"

    assert refusal(Path("mine")) == (
        f"the run directory mine cannot be used: {reason}; name another with --run-dir"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_leave_to_write_is_refused() -> None:
    Path("mine").mkdir(mode=0o500)
    assert "Permission denied" in refusal(Path("mine"))


# ------------------------------------------------------------- what is written


def test_run_json_says_what_the_run_is() -> None:
    with opened(Path("mine")) as run:
        run.write_record(record())

        text = Path("mine/run.json").read_text()
        expected = {"format": FORMAT, **dataclasses.asdict(record())}
        assert json.loads(text) == expected
        assert text.endswith("}\n")


def test_run_json_is_replaced_whole() -> None:
    with opened(Path("mine")) as run:
        run.write_record(record(incarnation=1))
        run.write_record(record(incarnation=2))

        assert json.loads(Path("mine/run.json").read_text())["incarnation"] == 2
        assert {path.name for path in run.path.iterdir()} == {"lock", "metrics.jsonl", "run.json"}


def test_metrics_of_a_history_that_did_not_survive_are_cut() -> None:
    with opened(Path("mine")) as run:
        run.log_metrics("evaluation", {"version": 5, "metrics": {"accuracy": 0.5}})
        run.log_metrics("progress", {"version": 7})
        run.log_metrics("evaluation", {"version": 10, "metrics": {"accuracy": 0.9}})
        run.log_metrics("progress", {"version": 10})
    with Path("mine/metrics.jsonl").open("a") as file:
        file.write('{"kind": "progress", "versi')  # as a crash leaves it

    with opened(Path("mine")) as again:
        newest = again.cut_metrics(7)
        again.log_metrics("progress", {"version": 8})

        lines = [json.loads(line) for line in Path("mine/metrics.jsonl").read_text().splitlines()]
    assert [line["version"] for line in lines] == [5, 7, 8]
    assert newest is not None
    assert newest["metrics"] == {"accuracy": 0.5}


def test_a_last_line_without_its_end_is_mended() -> None:
    with opened(Path("mine")) as run:
        Path("mine/metrics.jsonl").write_text('{"kind": "progress", "version": 1}')
        assert run.cut_metrics(9) is None
        run.log_metrics("progress", {"version": 2})

    assert len(Path("mine/metrics.jsonl").read_text().splitlines()) == 2


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


def test_a_directory_whose_disk_is_full_can_be_let_go(tmp_path: Path) -> None:
    """What could not be written was said then; now the lock must be free for the next."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    run_dir = RunDir(folder, "mnist")
    with pytest.raises(OSError, match="No space left"):
        run_dir.log_metrics("progress", {"version": 1})

    run_dir.close()

    (folder / "metrics.jsonl").unlink()
    with opened(folder) as again:
        assert again.record is None


def test_what_killed_processes_left_half_written_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.json", "metrics.jsonl", "weights.safetensors"):
        (folder / f".{name}-01234567").touch()

    with opened(folder):
        assert {path.name for path in folder.iterdir()} == {"lock", "metrics.jsonl"}

"""Beginning a run and continuing it: what must hold whatever happened in between."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headwater.protos import files
from headwater.protos.errors import UsageError
from headwater.server import history
from headwater.server.config import ServerConfig
from headwater.server.journal import weights_crc
from headwater.server.log_records import Kind
from headwater.server.prepare import Prepared, prepare
from headwater.worker.load import LoadedTask
from kit import counting
from kit.disk import FaultyDisk, ForgetfulDisk, power_loss, set_faults


def prepared(run_dir: Path, **options: Any) -> Prepared:
    task = counting.task(examples=64, epochs=4, batch_size=8)
    options = {"durability": "log", **options}
    config = ServerConfig(listen="127.0.0.1:0", run_dir=run_dir, **options)
    return prepare(LoadedTask(task, "counting", {}, ""), config)


def make_updates(run: Prepared, count: int) -> None:
    """As the applier would, each logged and then applied."""
    assert run.log is not None
    for _ in range(count):
        now = run.store.current
        gradient = run.store.layout.empty()
        gradient.view(np.float32)[:64] = -1.0
        run.log.append(
            Kind.UPDATE, version=now.version + 1, gradient=gradient.data,
            detail=[[len(now.applied), now.version, "1.1", 0]], loss=1.0,
            weights_crc=weights_crc(now),
        )  # fmt: skip
        run.store.apply(gradient, 1.0, len(now.applied))
    run.log.sync()


def set_numbers(run: Prepared, **numbers: float) -> None:
    assert run.log is not None
    now = run.store.current
    settings = now.settings.with_numbers(numbers, None)
    run.log.append(
        Kind.SETTINGS, version=now.version, gradient=memoryview(b""), detail=settings.to_json()
    )
    run.store.set(settings)


def crash(run: Prepared) -> None:
    if run.log is not None:
        run.log.abandon()
    run.run_dir.close()


def cells(run: Prepared) -> set[float]:
    return set(np.asarray(run.store.current.leaves[0]).tolist())


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"optimizer": "sgd(1.0)"}, {"optimizer": "sgd(0.25)"}),
        (
            {"optimizer": "sgd(cosine_decay_schedule(1.0,total_updates))", "epochs": 1},
            {"epochs": 4},
        ),
    ],
    ids=["optimizer", "epochs"],
)
def test_acknowledged_updates_stay_what_they_were_under_another_optimizer(
    first: dict[str, Any], then: dict[str, Any], tmp_path: Path
) -> None:
    run = prepared(tmp_path, **first)
    make_updates(run, 5)
    made = cells(run)
    crash(run)

    for _ in range(2):  # the second finds no log of the first's optimizer
        run = prepared(tmp_path, **then)
        assert (run.store.current.version, cells(run)) == (5, made)
        assert not run.warnings
        crash(run)

    run = prepared(tmp_path)
    make_updates(run, 1)
    (before,), (after,) = made, cells(run)
    if "optimizer" in then:
        assert after == before + 0.25, "from here on with the new one"
    crash(run)
    run = prepared(tmp_path)
    assert (run.store.current.version, cells(run)) == (6, {after})
    crash(run)


@pytest.mark.parametrize("then", ["sgd(0.25)", "scale(-0.25)"])
@pytest.mark.parametrize("is_set_last", [False, True], ids=["set earlier", "set last"])
def test_what_was_set_of_one_optimizer_never_comes_back_over_the_next_ones_updates(
    is_set_last: bool, then: str, tmp_path: Path
) -> None:
    """The second has no number of that name: the run could not even start."""
    run = prepared(tmp_path, optimizer="sgd(1.0)")
    if not is_set_last:
        set_numbers(run, learning_rate=1.0)
    make_updates(run, 2)
    if is_set_last:
        set_numbers(run, learning_rate=0.5)
    run.save(run.store.current)
    crash(run)

    run = prepared(tmp_path, optimizer=then)
    make_updates(run, 1)
    assert cells(run) == {2.25}
    crash(run)

    run = prepared(tmp_path)
    assert (cells(run), run.store.current.settings.numbers) == ({2.25}, {})
    (warning,) = run.warnings
    assert f"the optimizer is {then} now: the numbers that were set of sgd(1.0)" in warning
    crash(run)


def test_what_was_dropped_for_one_optimizer_is_gone_when_the_first_is_back(tmp_path: Path) -> None:
    run = prepared(tmp_path, optimizer="sgd(1.0)")
    set_numbers(run, learning_rate=0.5)
    run.save(run.store.current)
    crash(run)
    crash(prepared(tmp_path, optimizer="sgd(0.25)"))

    run = prepared(tmp_path, optimizer="sgd(1.0)")
    make_updates(run, 1)
    assert cells(run) == {1.0}
    crash(run)

    run = prepared(tmp_path)
    assert cells(run) == {1.0}
    crash(run)


@pytest.mark.parametrize("durability", ["log", "snapshot"])
@pytest.mark.parametrize(
    ("operation", "file"),
    [("rename", "snapshot-*"), ("remove", "updates-*"), ("rename", "run.json")],
)
@pytest.mark.parametrize("goes_back", [True, False], ids=["to the old one", "to the new one"])
def test_a_crash_while_the_optimizer_is_changed_takes_nothing_back(
    goes_back: bool,
    operation: str,
    file: str,
    durability: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_dir, control = tmp_path / "run", tmp_path / "faults.json"
    run = prepared(run_dir, optimizer="sgd(1.0)")
    set_numbers(run, learning_rate=0.5)
    make_updates(run, 2)
    crash(run)

    monkeypatch.setattr(files, "DISK", FaultyDisk(control))
    set_faults(control, {"operation": operation, "files": file, "error": "ENOSPC"})
    with pytest.raises(UsageError, match="No space left on device"):
        prepared(run_dir, optimizer="sgd(0.25)", durability=durability)
    set_faults(control)

    run = prepared(run_dir, **({} if goes_back else {"optimizer": "sgd(0.25)"}))
    assert cells(run) == {1.0}
    make_updates(run, 1)
    assert cells(run) == {1.5 if goes_back else 1.25}
    crash(run)
    run = prepared(run_dir)
    assert cells(run) == {1.5 if goes_back else 1.25}
    crash(run)


def test_after_a_loss_of_power_what_was_set_last_holds_though_only_a_snapshot_was_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, shadow = tmp_path / "run", tmp_path / "shadow"
    monkeypatch.setattr(files, "DISK", ForgetfulDisk(shadow))
    run = prepared(run_dir, optimizer="sgd(1.0)")
    assert run.log is not None
    set_numbers(run, learning_rate=0.5)
    run.log.sync()
    set_numbers(run, learning_rate=0.25)
    run.save(run.store.current)
    crash(run)
    power_loss(run_dir, shadow)
    monkeypatch.setattr(files, "DISK", files.Disk())

    run = prepared(run_dir)

    assert run.store.current.settings.numbers == {"learning_rate": 0.25}
    crash(run)


def test_a_run_that_found_no_room_for_its_record_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(files.Disk):
        def rename(self, old: Path, new: Path) -> None:
            if new.name == "run.json":
                raise OSError(errno.ENOSPC, "No space left on device")
            super().rename(old, new)

    monkeypatch.setattr(files, "DISK", Full())
    with pytest.raises(UsageError, match="cannot be written: No space left on device"):
        prepared(tmp_path)
    monkeypatch.setattr(files, "DISK", files.Disk())

    run = prepared(tmp_path)

    make_updates(run, 1)
    crash(run)


def test_a_log_without_its_run_is_not_overwritten(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    make_updates(run, 1)
    crash(run)
    (tmp_path / "run.json").unlink()

    with pytest.raises(UsageError, match=r"no run\.json: it cannot be continued"):
        prepared(tmp_path)


def test_an_inner_optimizer_that_no_worker_could_use_is_found_when_the_server_starts(
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=r"--inner-optimizer.*adem"):
        prepared(tmp_path / "run", local_steps=4, inner_optimizer="adem(0.1)")
    with pytest.raises(UsageError, match="cannot make a local step from a gradient and its loss"):
        prepared(tmp_path / "run", local_steps=4, inner_optimizer="lbfgs()")
    assert not (tmp_path / "run").exists()


def test_a_history_that_lost_its_end_says_so_when_the_run_goes_on(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    for version in (1, 2, 3):
        make_updates(run, 1)
        run.history.append({"v": version, "u": [[version - 1, version - 1, "1.1", 0]]})
        run.save(run.store.current)
    crash(run)
    path = tmp_path / "history.jsonl"
    first, one, *_ = path.read_text().splitlines(keepends=True)
    path.write_text(first + one)

    crash(prepared(tmp_path))

    *_, gap, begun = history.read(path)
    assert gap == {"v": 3, "gap": 1}
    assert (begun["v"], begun["incarnation"]) == (3, 2)


def test_what_an_incarnation_trains_with_is_on_disk_before_it_counts(tmp_path: Path) -> None:
    crash(prepared(tmp_path, optimizer="sgd(1.0)", epochs=3))

    (begun,) = history.read(tmp_path / "history.jsonl")  # nobody has closed the file
    assert (begun["optimizer_spec"], begun["epochs"], begun["updates"]) == ("sgd(1.0)", 3, 24)


@pytest.mark.parametrize(
    ("consistency", "outer"),
    [
        ("async", "delayed_nesterov(0.7, delay=8)"),
        ("bounded:2", "delayed_nesterov(0.7, delay=8)"),
        ("sync:4", "sgd(0.7, momentum=0.9, nesterov=True)"),
    ],
)
def test_with_local_steps_the_outer_optimizer_goes_by_the_consistency_and_stays(
    tmp_path: Path, consistency: str, outer: str
) -> None:
    run = prepared(tmp_path, local_steps=2, consistency=consistency)
    assert run.optimizer_text == outer
    crash(run)

    again = prepared(tmp_path, local_steps=2, consistency="async")
    assert again.optimizer_text == outer
    crash(again)


def test_a_consistency_that_does_not_fit_is_refused_and_not_recorded(tmp_path: Path) -> None:
    too_much: dict[str, Any] = {"consistency": "sync:8", "max_staged_bytes": 1}
    with pytest.raises(UsageError, match="consistency sync:8 holds 8 gradients"):
        prepared(tmp_path, **too_much)
    assert not list(tmp_path.iterdir()), "a new run has not begun"

    crash(prepared(tmp_path))
    record = (tmp_path / "run.json").read_text()
    with pytest.raises(UsageError, match="--max-staged-bytes has room for 1; raise it"):
        prepared(tmp_path, **too_much)
    assert (tmp_path / "run.json").read_text() == record

    again = prepared(tmp_path, max_staged_bytes=1)
    assert str(again.settings.dial) == "async"
    crash(again)

"""The update log: what was synced comes back, torn tails are cut, damage is refused."""

from __future__ import annotations

import contextlib
import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.protos import files
from headwater.protos.errors import UsageError
from headwater.server import log_records
from headwater.server.log_records import RECORD_BYTES, Kind, Record
from headwater.server.update_log import LogBroken, NoRoom, Recovery, UpdateLog, segments
from kit.disk import FaultyDisk, ForgetfulDisk, power_loss, set_faults

FACTS = {"run_id": "20270101-120000-abcd", "layout": "0123"}


def begin(folder: Path, version: int = 0, sequence: int = 0) -> UpdateLog:
    return UpdateLog(folder, FACTS, version=version, sequence=sequence)


@contextlib.contextmanager
def crashing(log: UpdateLog) -> Iterator[UpdateLog]:
    """Afterwards nobody has closed it in order."""
    try:
        yield log
    finally:
        log.abandon()


def gradient(version: int) -> memoryview:
    return memoryview(random.Random(version).randbytes(40))  # noqa: S311  (any bytes)


DETAIL = [[101, 0, "1.1", 0]]
WHOLE_BYTES = RECORD_BYTES + len(json.dumps(DETAIL)) + 40
"""Of a record that `append` makes: its head, its detail and its gradient."""


def append(log: UpdateLog, version: int) -> None:
    log.append(
        Kind.UPDATE,
        version=version,
        gradient=gradient(version),
        detail=[[version + 100, version - 1, "1.1", 0]],
        loss=version / 8,
        weights_crc=version * 7,
    )


def written(folder: Path, versions: range, *, sync_each: bool = True) -> Path:
    """A crashed log of these versions in one segment."""
    with crashing(begin(folder, version=versions[0] - 1)) as log:
        for version in versions:
            append(log, version)
            if sync_each:
                log.sync()
    return segments(folder)[-1].path


def recovered(folder: Path, version: int = 0, **facts: str) -> list[Record]:
    return list(Recovery(folder, {**FACTS, **facts}, version))


def versions(folder: Path, version: int = 0) -> list[int]:
    return [record.version for record in recovered(folder, version)]


# ------------------------------------------------------------- what comes back


def test_every_field_of_every_record_comes_back(tmp_path: Path) -> None:
    with crashing(begin(tmp_path)) as log:
        append(log, 1)
        log.sync()
        log.append(Kind.LEFT_OUT, version=1, gradient=memoryview(b""), detail=9)

    update, left_out = recovered(tmp_path)

    assert update == Record(
        kind=Kind.UPDATE, sequence=1, synced=0, version=1, loss=0.125, weights_crc=7,
        detail=[[101, 0, "1.1", 0]], gradient=gradient(1),
    )  # fmt: skip
    assert (left_out.kind, left_out.sequence, left_out.synced) == (Kind.LEFT_OUT, 2, 1)
    assert (left_out.version, left_out.detail) == (1, 9)


def test_a_log_closed_in_order_goes_on_in_the_next_life(tmp_path: Path) -> None:
    log = begin(tmp_path)
    append(log, 1)
    log.close()
    recovery = Recovery(tmp_path, FACTS, 0)
    assert [record.version for record in recovery] == [1]

    with crashing(begin(tmp_path, version=1, sequence=recovery.sequence)) as log:
        append(log, 2)

    assert versions(tmp_path) == [1, 2]
    assert len(segments(tmp_path)) == 2


def test_a_life_without_an_update_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    for _ in range(3):
        with crashing(begin(tmp_path)):
            pass
    with crashing(begin(tmp_path)) as log:
        append(log, 1)
    assert versions(tmp_path) == [1]


def test_segments_that_a_snapshot_covers_are_removed(tmp_path: Path) -> None:
    with crashing(begin(tmp_path)) as log:
        for version in range(1, 10):
            append(log, version)
            if version % 3 == 0:
                log.snapshot_written(needed_from=version - 3)  # the snapshot before the newest

    assert versions(tmp_path, version=6) == [4, 5, 6, 7, 8, 9]
    assert len(segments(tmp_path)) == 2


def test_the_size_is_what_a_recovery_would_read(tmp_path: Path) -> None:
    with crashing(begin(tmp_path)) as log:
        empty = log.size_bytes
        append(log, 1)
        assert log.size_bytes == empty + WHOLE_BYTES
        log.snapshot_written(needed_from=1)
        append(log, 2)
        assert log.size_bytes == pytest.approx(empty + WHOLE_BYTES, abs=4)


# ------------------------------------------------------------- what does not fit


def test_the_log_of_another_run_is_refused(tmp_path: Path) -> None:
    written(tmp_path, range(1, 3))
    with pytest.raises(UsageError, match="its run_id is 20270101-120000-abcd, not another"):
        recovered(tmp_path, run_id="another")


def test_a_log_that_begins_after_the_snapshot_is_refused(tmp_path: Path) -> None:
    written(tmp_path, range(8, 10))
    with pytest.raises(UsageError, match="begins at version 7, and the newest whole snapshot is"):
        recovered(tmp_path, version=6)


def test_a_missing_segment_is_refused(tmp_path: Path) -> None:
    with crashing(begin(tmp_path)) as log:
        for version in range(1, 7):
            append(log, version)
            if version % 2 == 0:
                log.snapshot_written(needed_from=0)
    segments(tmp_path)[1].path.unlink()

    with pytest.raises(UsageError, match="records 3 to 4 are missing"):
        recovered(tmp_path)


# ------------------------------------------------------------- torn and damaged


def test_a_log_torn_at_any_byte_of_its_last_record_is_cut_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, range(1, 4), sync_each=False)
    whole = path.read_bytes()
    end = len(whole) - WHOLE_BYTES
    for size in range(end + 1, len(whole)):
        path.write_bytes(whole[:size])
        caplog.clear()
        with caplog.at_level(logging.WARNING, "headwater.server"):
            assert versions(tmp_path) == [1, 2]
        (message,) = caplog.messages
        assert message == (
            f"{path}: cut at byte {end}; the {size - end} bytes after it are of an update that was "
            "never acknowledged"
        )
        assert path.read_bytes() == whole[:end]
        assert versions(tmp_path) == [1, 2], "the second time there is nothing to cut"


def test_a_segment_torn_in_its_head_was_never_begun(tmp_path: Path) -> None:
    first = written(tmp_path, range(1, 3))
    with crashing(begin(tmp_path, version=2, sequence=2)):
        pass
    second = segments(tmp_path)[-1].path
    head = second.read_bytes()
    for size in range(len(head)):
        second.write_bytes(head[:size])
        assert versions(tmp_path) == [1, 2]
        assert [s.path for s in segments(tmp_path)] == [first]


def test_a_thousand_flipped_bits_never_change_what_is_loaded(tmp_path: Path) -> None:
    """Refused, or cut with a word where it was the last record; never another value."""
    log = begin(tmp_path)
    for version in range(1, 6):
        append(log, version)
        log.sync()
    log.close()
    path = segments(tmp_path)[-1].path
    whole, expected = path.read_bytes(), recovered(tmp_path)
    last = len(whole) - RECORD_BYTES  # what closed it in order, and holds no update
    rng = random.Random(2)  # noqa: S311
    for bit in rng.sample(range(8 * len(whole)), 1000):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        if bit // 8 >= last:
            assert recovered(tmp_path) == expected
        else:
            with pytest.raises(UsageError, match="was damaged: "):
                recovered(tmp_path)
            assert path.read_bytes() == data, "nothing was changed"


PAGE = 64


@settings(max_examples=300, deadline=None)
@given(data=st.data(), synced=st.integers(0, 8), after=st.integers(0, 6))
def test_a_loss_of_power_costs_nothing_that_was_synced(
    data: st.DataObject, synced: int, after: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Pages written since the last fsync may be there or not, in any pattern."""
    folder = tmp_path_factory.mktemp("power")
    with crashing(begin(folder)) as log:
        for version in range(1, synced + 1):
            append(log, version)
        log.sync()
        safe = log.size_bytes
        for version in range(synced + 1, synced + after + 1):
            append(log, version)
    path = segments(folder)[-1].path
    content = bytearray(path.read_bytes())
    for start in range(safe, len(content), PAGE):
        if data.draw(st.booleans()):
            content[start : start + PAGE] = bytes(len(content[start : start + PAGE]))
    path.write_bytes(content[: data.draw(st.integers(safe, len(content)))])

    found = recovered(folder)

    assert [r.version for r in found] == list(range(1, len(found) + 1))
    assert len(found) >= synced
    assert all(bytes(r.gradient) == bytes(gradient(r.version)) for r in found)


def test_what_a_killed_process_had_not_fsynced_is_on_disk_once_it_was_recovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next life builds on it, so it must not be lost with the power later on."""
    folder, shadow = tmp_path / "run", tmp_path / "shadow"
    folder.mkdir()
    monkeypatch.setattr(files, "DISK", ForgetfulDisk(shadow))
    with crashing(begin(folder)) as log:
        for version in range(1, 7):
            append(log, version)
            if version == 3:
                log.sync()
    monkeypatch.setattr(files, "DISK", ForgetfulDisk(shadow))
    assert versions(folder) == [1, 2, 3, 4, 5, 6]
    with crashing(begin(folder, version=6, sequence=6)) as log:
        append(log, 7)
        log.sync()

    power_loss(folder, shadow)

    monkeypatch.setattr(files, "DISK", files.Disk())
    assert versions(folder) == [1, 2, 3, 4, 5, 6, 7]


def test_what_was_fsynced_is_not_written_again(faults: Callable[..., None], tmp_path: Path) -> None:
    """A log may be long; only what its last records do not call synced is in doubt."""
    written(tmp_path, range(1, 50))
    faults({"operation": "write", "room": 2 * WHOLE_BYTES - 1, "error": "ENOSPC"})

    assert len(versions(tmp_path)) == 49


def test_segments_that_the_snapshot_covers_may_be_damaged(tmp_path: Path) -> None:
    with crashing(begin(tmp_path)) as log:
        for version in range(1, 6):
            append(log, version)
            if version == 3:
                log.snapshot_written(needed_from=0)
    first = segments(tmp_path)[0].path
    content = bytearray(first.read_bytes())
    content[-60] ^= 1
    first.write_bytes(content)

    assert versions(tmp_path, version=5) == [4, 5]
    with pytest.raises(UsageError, match="was damaged"):
        recovered(tmp_path, version=2)


@settings(max_examples=200, deadline=None)
@given(junk=st.binary(max_size=300))
def test_what_is_no_record_is_never_taken_for_one(junk: bytes) -> None:
    assert log_records.decode(memoryview(junk), 0) is None
    assert list(log_records.records_within(memoryview(junk), 0)) == []


# ------------------------------------------------------------- a bad disk


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    control = tmp_path / "faults.json"
    monkeypatch.setattr(files, "DISK", FaultyDisk(control))
    return lambda *rules: set_faults(control, *rules)


@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT"])
def test_where_there_is_no_room_the_log_is_as_it_was(
    error: str, faults: Callable[..., None], tmp_path: Path
) -> None:
    with crashing(begin(tmp_path)) as log:
        append(log, 1)
        size = log.size_bytes
        for room in (0, 50, RECORD_BYTES, RECORD_BYTES + 20):
            faults({"operation": "write", "room": room, "error": error})
            with pytest.raises(NoRoom):
                append(log, 2)
        assert (log.size_bytes, segments(tmp_path)[0].path.stat().st_size) == (size, size)
        faults()
        append(log, 2)
        log.sync()

    assert versions(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    "rule",
    [
        {"operation": "write", "error": "EIO"},
        {"operation": "sync", "error": "EIO"},
        {"operation": "sync", "error": "ENOSPC"},
    ],
    ids=lambda rule: "-".join(rule.values()),
)
def test_any_other_error_breaks_the_log(
    rule: dict[str, str], faults: Callable[..., None], tmp_path: Path
) -> None:
    with crashing(begin(tmp_path)) as log:
        append(log, 1)
        log.sync()
        faults(rule)
        with contextlib.suppress(LogBroken):
            append(log, 2)
        if rule["operation"] == "sync":
            with pytest.raises(LogBroken):
                log.sync()
        else:
            with pytest.raises(LogBroken):
                append(log, 3)

    faults()
    assert versions(tmp_path)[:1] == [1]


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_a_broken_log_stays_broken(
    operation: str, faults: Callable[..., None], tmp_path: Path
) -> None:
    """After a failed fsync the next one would say that all is well."""
    with crashing(begin(tmp_path)) as log:
        append(log, 1)
        log.sync()
        if operation == "write":
            faults(
                {"operation": "write", "error": "EIO", "room": 50},
                {"operation": "truncate", "error": "EIO"},
            )
            with pytest.raises(LogBroken):
                append(log, 2)
        else:
            append(log, 2)
            faults({"operation": "sync", "error": "EIO"})
            with pytest.raises(LogBroken):
                log.sync()
        faults()
        log.snapshot_written(needed_from=0)
        for attempt in (lambda: append(log, 3), log.sync):
            with pytest.raises(LogBroken):
                attempt()
        assert not (operation == "sync" and log.is_synced)

    assert versions(tmp_path)[:1] == [1]
    assert len(segments(tmp_path)) == 1


def test_a_segment_that_cannot_be_removed_keeps_those_after_it(
    faults: Callable[..., None], tmp_path: Path
) -> None:
    """A gap could not be told from a loss."""
    with crashing(begin(tmp_path)) as log:
        for version in range(1, 10):
            append(log, version)
            log.snapshot_written(needed_from=0)
        first = segments(tmp_path)[0].path.name
        faults({"operation": "remove", "files": first, "error": "EIO"})
        log.snapshot_written(needed_from=8)

    assert versions(tmp_path) == list(range(1, 10))


def test_a_segment_that_cannot_be_begun_is_tried_again(
    faults: Callable[..., None], tmp_path: Path
) -> None:
    with crashing(begin(tmp_path)) as log:
        append(log, 1)
        log.snapshot_written(needed_from=0)
        faults({"operation": "create", "error": "ENOSPC"})
        with pytest.raises(NoRoom):
            append(log, 2)
        faults()
        append(log, 2)

    assert versions(tmp_path) == [1, 2]
    assert len(segments(tmp_path)) == 2

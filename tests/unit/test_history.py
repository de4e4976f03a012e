"""The history file through crashes: what survives is the run's past, and what is lost is said."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from headwater.protos import files
from headwater.protos.files import Buffer
from headwater.server import history
from headwater.server.history import History
from headwater.server.ranges import Ranges
from headwater.server.settings import Settings

PLAIN = Settings()
FASTER = Settings(numbers={"learning_rate": 0.5})


def update(version: int) -> dict[str, Any]:
    return {"v": version, "u": [[version - 1, version - 1, "1.1", 7]]}


def setting(version: int, settings: Settings) -> dict[str, Any]:
    return {"v": version, "set": settings.to_json()}


def written(folder: Path) -> list[Any]:
    return list(history.read(folder / history.NAME))


def went_on(
    folder: Path,
    lines: list[dict[str, Any]],
    version: int,
    *,
    settings: Settings = PLAIN,
    left_out: tuple[int, ...] = (),
    of_log: tuple[dict[str, Any], ...] = (),
) -> list[Any]:
    """What the file has when a server goes on from `version` and found these lines."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / history.NAME).write_text(text)
    applied = Ranges.of(sorted({*range(version), *left_out}))
    again = History(folder, version, applied, settings)
    again.go_on(of_log)
    again.close()
    return written(folder)


def test_what_came_after_the_restored_version_is_cut_off(tmp_path: Path) -> None:
    lines = [update(1), update(2), {"v": 2, "out": 9}, {"v": 2, "out": 5}, update(3)]

    assert went_on(tmp_path, lines, 2, left_out=(9,)) == lines[:3]


def test_a_last_line_that_is_not_whole_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / history.NAME).write_text(json.dumps(update(1)) + '\n{"v":2,"u":')

    History(tmp_path, 1, Ranges.of([0]), PLAIN).close()

    assert (tmp_path / history.NAME).read_text() == json.dumps(update(1)) + "\n"


def test_what_was_set_at_the_restored_version_but_after_it_was_saved_is_cut_off(
    tmp_path: Path,
) -> None:
    lines = [update(1), setting(1, FASTER), {"v": 1, "worker": "1.2"}]

    assert went_on(tmp_path, lines, 1, settings=PLAIN) == lines[:1]
    assert went_on(tmp_path, lines, 1, settings=FASTER) == lines
    back = [*lines, setting(1, PLAIN)]
    assert went_on(tmp_path, back, 1, settings=PLAIN) == back
    assert went_on(tmp_path, back, 1, settings=FASTER) == lines
    later = [setting(0, FASTER), *lines[:1]]
    assert went_on(tmp_path, later, 1, settings=PLAIN) == later, "set before, and by a plan again"


def test_a_tail_that_was_lost_is_a_gap(tmp_path: Path) -> None:
    assert went_on(tmp_path, [update(1)], 4) == [update(1), {"v": 4, "gap": 1}]


def test_a_file_that_was_lost_is_a_gap(tmp_path: Path) -> None:
    History(tmp_path, 0, Ranges(), PLAIN).go_on(())
    again = History(tmp_path, 3, Ranges.of(range(3)), PLAIN)
    again.go_on(())
    again.close()

    assert written(tmp_path) == [{"v": 3, "gap": 0}]


def test_what_the_update_log_kept_is_no_gap(tmp_path: Path) -> None:
    of_log = (update(2), {"v": 2, "out": 7}, setting(2, FASTER), update(3))

    assert went_on(tmp_path, [update(1)], 3, of_log=of_log) == [update(1), *of_log]
    later = [update(1), *of_log]
    assert went_on(tmp_path, later, 3, left_out=(7,), settings=FASTER, of_log=of_log) == later
    known = [update(1), update(2), {"v": 2, "out": 7}]
    assert went_on(tmp_path, known, 3, left_out=(7,), of_log=of_log) == [update(1), *of_log]


def test_what_is_missing_before_the_update_log_is_a_gap(tmp_path: Path) -> None:
    of_log = (update(5), {"v": 5, "out": 7})

    assert went_on(tmp_path, [update(1)], 5, of_log=of_log) == [
        update(1),
        {"v": 4, "gap": 1},
        *of_log,
    ]


def test_a_worker_that_joins_is_noted_at_the_newest_version(tmp_path: Path) -> None:
    file = History(tmp_path, 0, Ranges(), PLAIN)
    file.append(update(1))
    file.append({"v": 0, "worker": "1.1"})
    file.close()

    assert written(tmp_path) == [update(1), {"v": 1, "worker": "1.1"}]


def test_what_a_full_disk_made_it_give_up_is_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(files.Disk):
        def write(self, file: int, data: Buffer) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(history, "FLUSH_BYTES", 1)
    monkeypatch.setattr(history, "MAX_PENDING_BYTES", 60)
    file = History(tmp_path, 0, Ranges(), PLAIN)
    monkeypatch.setattr(files, "DISK", Full())
    for version in range(1, 6):
        file.append(update(version))
    assert "cannot be replayed" in (file.problem or "")
    monkeypatch.setattr(files, "DISK", files.Disk())
    file.flush()
    assert file.problem is None
    file.append(update(6))
    file.close()

    *kept, gap, last = written(tmp_path)
    assert [line["v"] for line in kept] == [*range(1, len(kept) + 1)]
    assert gap == {"v": 5, "gap": len(kept)}
    assert last == update(6)


class SlowToSync(files.Disk):
    """Its fsync lasts until `go_on` is set."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()

    def sync(self, file: int) -> None:
        self.began.set()
        assert self.go_on.wait(20)
        super().sync(file)


def test_no_line_waits_for_an_fsync_and_all_are_written_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "FLUSH_BYTES", 1)
    slow = SlowToSync()
    file = History(tmp_path, 0, Ranges(), PLAIN)
    monkeypatch.setattr(files, "DISK", slow)
    file.append(update(1))
    saver = threading.Thread(target=file.sync)
    saver.start()
    assert slow.began.wait(20)

    loop = threading.Thread(target=lambda: [file.append(update(v)) for v in range(2, 5)])
    loop.start()
    loop.join(5)
    was_held_up = loop.is_alive()
    slow.go_on.set()
    for thread in (saver, loop):
        thread.join(20)
    file.close()

    assert not was_held_up
    assert written(tmp_path) == [update(version) for version in range(1, 5)]


def test_what_was_added_while_a_write_failed_comes_after_what_it_was_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = History(tmp_path, 0, Ranges(), PLAIN)

    class FillsUp(files.Disk):
        def write(self, handle: int, data: Buffer) -> int:
            file.append(update(2))
            super().write(handle, data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

    file.append(update(1))
    monkeypatch.setattr(files, "DISK", FillsUp())
    adder = threading.Thread(target=file.flush, daemon=True)  # held up, it would be for ever
    adder.start()
    adder.join(5)
    assert not adder.is_alive()
    monkeypatch.setattr(files, "DISK", files.Disk())
    file.close()

    assert written(tmp_path) == [update(1), update(2)]


def test_what_was_given_up_during_an_fsync_is_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "MAX_PENDING_BYTES", 60)
    slow = SlowToSync()
    file = History(tmp_path, 0, Ranges(), PLAIN)
    monkeypatch.setattr(files, "DISK", slow)
    saver = threading.Thread(target=file.sync, daemon=True)
    saver.start()
    assert slow.began.wait(20)
    adder = threading.Thread(
        target=lambda: [file.append(update(v)) for v in range(1, 6)], daemon=True
    )
    adder.start()
    adder.join(5)
    assert not adder.is_alive()
    slow.go_on.set()
    saver.join(20)
    file.flush()
    file.append(update(6))
    file.close()

    *kept, gap, last = written(tmp_path)
    assert [line["v"] for line in kept] == [*range(1, len(kept) + 1)]
    assert gap == {"v": 5, "gap": len(kept)}
    assert last == update(6)

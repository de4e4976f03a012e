"""The share of the machine that `headwater run` gives each process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from headwater.client import shares
from headwater.client.run import Training
from headwater.client.shares import share_of_cores


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "core_count", lambda: 8)
    monkeypatch.delenv("NPROC", raising=False)


def threads(*server_options: str, workers: int = 1) -> str:
    training = Training(
        task="mnist", workers=workers, platform="cpu", server_options=server_options
    )
    return share_of_cores(workers, in_sync=training._is_sync())["NPROC"]


def recorded(folder: Path, consistency: str | None) -> Sequence[str]:
    asked = {"consistency": consistency}
    (folder / "run.json").write_text(json.dumps({"run_id": "a-run", "asked": asked}))
    return ["--run-dir", str(folder)]


def test_cores_are_dealt_out_between_the_server_and_the_workers() -> None:
    assert threads(workers=1) == "4"
    assert threads(workers=3) == "2"
    assert threads(workers=20) == "1"


def test_in_sync_mode_each_process_has_one_thread_however_many_workers_there_are() -> None:
    assert threads("--consistency", "sync:2") == "1"
    assert threads("--consistency=sync", workers=3) == "1"


def test_a_sync_run_that_is_continued_without_saying_so_is_one_still(tmp_path: Path) -> None:
    assert threads(*recorded(tmp_path, "sync:2")) == "1"
    assert threads(*recorded(tmp_path, "async")) == "4"
    assert threads(*recorded(tmp_path, None)) == "4"
    assert threads(*recorded(tmp_path, "sync:2"), "--consistency", "async") == "4"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"asked": 3}'])
def test_a_damaged_record_is_left_for_the_server_to_say(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    assert threads("--run-dir", str(tmp_path)) == "4"

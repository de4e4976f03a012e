"""The workers of a fit in this process: when their endings end it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headwater.client import crew as module
from headwater.client import endings
from headwater.client.crew import Crew
from headwater.protos.errors import RunFailed


class FakeChild:
    """A worker that ends when the test says so."""

    def __init__(self, name: str, *_: Any, **__: Any) -> None:
        self.name = name
        self.status: int | None = None
        self.process = SimpleNamespace(wait=lambda: None)

    @property
    def ending(self) -> str:
        return f"failed: {self.name} is broken"

    def log_to(self, path: Path) -> None:
        pass

    def send(self, number: int) -> None:
        self.status = -number if self.status is None else self.status

    def close(self) -> None:
        pass


@pytest.fixture
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Crew:
    monkeypatch.setattr(module, "Child", FakeChild)
    return Crew([{}, {}], address="", run_id="", task="", task_file=0, logs=tmp_path / "logs")


def test_of_a_worker_that_fails_is_warned_once(
    crew: Crew, caplog: pytest.LogCaptureFixture
) -> None:
    crew._children[0].status = 1

    for _ in range(3):
        crew.look()

    assert caplog.messages == ["worker-1 failed: worker-1 is broken; the others go on"]


def test_when_all_have_failed_every_look_says_so(crew: Crew) -> None:
    crew._children[1].status = 1
    crew.look()
    crew._children[0].status = 1

    for _ in range(3):
        with pytest.raises(RunFailed, match=r"^worker-1 failed: worker-1 is broken$"):
            crew.look()


def test_beside_one_that_was_sent_away_a_failed_one_is_the_last(crew: Crew) -> None:
    crew._children[0].status = 0
    crew._children[1].status = 1

    for _ in range(3):
        with pytest.raises(RunFailed, match="worker-2 is broken"):
            crew.look()


def test_workers_that_were_sent_away_have_not_failed_but_do_not_come_back(
    crew: Crew, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for child in crew._children:
        child.status = 0

    crew.look()

    assert caplog.record_tuples == []
    monkeypatch.setattr(endings, "ALONE_S", 0.0)
    for _ in range(3):
        with pytest.raises(RunFailed, match="no worker is left: all of them were told to leave"):
            crew.look()

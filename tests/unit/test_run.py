"""`headwater run`: when it ends a run, and what it says of one that has ended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headwater.client import endings
from headwater.client import run as module
from headwater.client.progress import Display, Screen
from headwater.client.run import Training, print_result
from headwater.protos import plain_json
from headwater.protos.errors import HeadwaterError, RunFailed, Unreachable, UsageError

END: dict[str, Any] = {
    "kind": "end",
    "state": "finished",
    "version": 1250,
    "metrics": {},
    "skipped": 0,
    "seconds": 2.5,
    "updates_per_second": 500.0,
}


def test_a_metric_that_is_no_number_is_printed_as_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """metrics.jsonl has null for it."""
    metrics = {"accuracy": 0.25, "loss": float("inf"), "perplexity": float("nan")}
    (tmp_path / "metrics.jsonl").write_text(plain_json.dumps(END | {"metrics": metrics}) + "\n")

    print_result({"run_dir": str(tmp_path), "evaluates": True})

    assert capsys.readouterr().out.splitlines() == [
        "finished at version 1,250 in 2.5 s (500 updates/s)",
        "evaluation  accuracy 0.25  loss nan  perplexity nan",
        f"weights     {tmp_path / 'weights.safetensors'}",
        f"metrics     {tmp_path / 'metrics.jsonl'}",
    ]


def test_where_the_end_was_not_written_the_log_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(END)[:-9])

    print_result({"run_dir": str(tmp_path), "evaluates": True})

    assert capsys.readouterr().err == (
        "finished; metrics.jsonl lacks its end: see logs/server.log\n"
    )


# ------------------------------------------------------------------ workers that end

Statuses = dict[str, int | None]
"""Exit statuses by name; None: it runs."""


class Life:
    """A run whose processes' statuses, and the server's answers, are a story told in steps.

    A step is what has become of the processes, and the state that the server then says it is
    in, or "" where it does not answer. After the last one the server has ended in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *steps: tuple[Statuses, str]) -> None:
        self._steps: Iterator[tuple[Statuses, str]] = iter(steps)
        self._answer = ""
        self.elsewhere: list[str] = []
        self.sessions: list[str] = []
        self.stopped = False
        children = {name: SimpleNamespace(name=name, status=None) for name in ("server", "a", "b")}
        for child in children.values():
            child.ending, child.process = f"failed: {child.name} is broken", None
        self._children: dict[str, Any] = children
        self._training = Training(
            task="", workers=2, platform=None, server_options=[],
            display=Display(Screen(quiet=True), live=False),
        )  # fmt: skip
        self.said: list[str] = []
        self._training._said = set()
        monkeypatch.setattr(self._training.display, "say", self.said.append)
        monkeypatch.setattr(self._training.display, "show", lambda status: None)
        monkeypatch.setattr(self._training, "_stop_in_order", self._stop)
        monkeypatch.setattr(module, "Client", lambda address: self)
        monkeypatch.setattr(module.time, "sleep", lambda seconds: self._go_on())

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def status(self, *, watches: bool) -> dict[str, Any]:
        if not self._answer:
            raise Unreachable("gone")
        running = [name for name in ("a", "b") if self._children[name].status is None]
        workers = [{"name": name, "state": "computing"} for name in (*running, *self.elsewhere)]
        workers += [{"name": name, "state": "pushing"} for name in self.sessions]
        return {"state": self._answer, "problems": [], "version": 1, "workers": workers}

    def follow(self) -> None:
        self._go_on()
        server, *workers = self._children.values()
        self._training._follow(server, workers, "", {}, Path(), evaluates=False)

    def _go_on(self) -> None:
        statuses, self._answer = next(self._steps, ({"server": 0}, ""))
        for name, status in statuses.items():
            self._children[name].status = status

    def _stop(self) -> None:
        self.stopped = True


@pytest.mark.parametrize("first", [{"a": 0}, {"a": 1}], ids=["told to leave", "failed"])
def test_when_the_last_worker_fails_the_run_ends_whatever_became_of_the_others(
    first: Statuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life(monkeypatch, ({}, "training"), (first, "training"), ({"b": 1}, "training"))

    with pytest.raises(RunFailed, match=r"^b failed: b is broken$"):
        life.follow()

    assert life.stopped
    gone = ["warning: a failed: a is broken; the others go on"]
    assert life.said == (gone if first["a"] else [])


def test_one_that_failed_is_told_of_when_the_last_is_told_to_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    life = Life(monkeypatch, ({"a": 1}, "training"), ({"b": 0}, "waiting"))

    with pytest.raises(RunFailed, match=r"^a failed: a is broken$"):
        life.follow()


def test_when_all_workers_were_told_to_leave_the_run_ends_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: tuple[Statuses, str] = ({"a": 0, "b": 0}, "training")
    Life(monkeypatch, left, left).follow()  # over in good time

    monkeypatch.setattr(endings, "ALONE_S", 0.0)
    life = Life(monkeypatch, left, left, left)
    with pytest.raises(RunFailed, match="no worker is left: all of them were told to leave"):
        life.follow()

    assert life.stopped


@pytest.mark.parametrize("answer", ["finished", "stopping", "failed", ""])
def test_workers_that_end_with_their_run_do_not_fail_it(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may be waiting for its evaluation, or be on its way out."""
    life = Life(monkeypatch, ({"a": 1}, "training"), ({"b": 1}, answer), ({}, answer))

    life.follow()

    assert not life.stopped
    assert life.said == [
        "warning: a failed: a is broken; the others go on",
        "warning: b failed: b is broken",
    ]


def test_a_server_that_has_long_been_silent_beside_no_worker_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endings, "ALONE_S", 0.0)
    life = Life(monkeypatch, *[({"a": 3, "b": 3}, "")] * 3)

    with pytest.raises(HeadwaterError, match="b failed"):
        life.follow()


def test_while_workers_of_elsewhere_train_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endings, "ALONE_S", 0.0)
    life = Life(monkeypatch, ({}, "training"), *[({"a": 1, "b": 0}, "training")] * 3)
    life.elsewhere = ["nova-1"]

    life.follow()

    assert life.said == ["warning: a failed: a is broken; the others go on"]


def test_a_push_session_takes_no_batches_and_does_not_hold_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    life = Life(monkeypatch, ({}, "training"), *[({"a": 1, "b": 1}, "training")] * 3)
    life.sessions = ["simulator"]

    with pytest.raises(RunFailed, match=r"^b failed: b is broken$"):
        life.follow()


# ------------------------------------------------------------------ where the server listens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--listen", "nosuchhost.invalid:0"],
            r"^--listen (\S+):0: \1 is not an address of this machine \(.+\); leave --listen out, ",
        ),
        (["--epochs", "2", "--listen"], r"^--listen takes HOST:PORT .*, and has no value$"),
        (["--listen="], r"^--listen takes HOST:PORT such as 127\.0\.0\.1:50051, not ''$"),
    ],
    ids=["another machine", "no value", "an empty one"],
)
def test_an_address_that_cannot_be_listened_at_is_refused_before_anything_starts(
    options: list[str], message: str
) -> None:
    training = Training(task="", workers=1, platform=None, server_options=options)

    with pytest.raises(UsageError, match=message):
        training._choose_address()

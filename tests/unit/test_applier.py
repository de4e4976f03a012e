"""What the applier notes of an update, and when."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from headwater.server import history
from headwater.server.applier import Applier, Update
from headwater.server.history import History
from headwater.server.optimizer import resolve
from headwater.server.ranges import Ranges
from headwater.server.settings import Settings
from headwater.server.staleness import StalenessPolicy
from headwater.server.store import Base, Contribution, Store, initial
from headwater.worker.tree import ModelTree

PARAMS = {"w": jnp.zeros(4)}


def store(settings: Settings = Settings()) -> Store:  # noqa: B008  (frozen)
    tree, sgd = ModelTree(PARAMS), resolve("sgd(1.0)", 10)
    return Store(tree, sgd, initial(tree, PARAMS, sgd, settings=settings))


def update(store: Store, base_leaves: tuple[jax.Array, ...] | None) -> Update:
    applied = len(store.current.applied)
    contribution = Contribution(
        applied, store.current.version, 1, 0.0, store.layout.empty(), "1.1", Base(base_leaves)
    )
    return Update((), (contribution,))


def apply(applier: Applier, done: threading.Semaphore, job: Update) -> None:
    applier.submit(job)
    assert done.acquire(timeout=30)


def test_a_gradient_that_could_not_be_compensated_is_noted_as_plain(tmp_path: Path) -> None:
    it = store(Settings(staleness=StalenessPolicy(compensate=0.04)))
    noted, done = History(tmp_path, 0, Ranges(), it.current.settings), threading.Semaphore(0)
    applier = Applier(it, lambda job, result: done.release(), history=noted)

    apply(applier, done, update(it, None))
    apply(applier, done, update(it, it.current.leaves))
    applier.close()
    noted.close()

    first, second = (line["u"][0] for line in history.read(tmp_path / history.NAME))
    assert first[4:] == [history.PLAIN]
    assert second[4:] == []


def test_who_computed_is_on_disk_before_the_journal_has_the_update(tmp_path: Path) -> None:
    noted, done = History(tmp_path, 0, Ranges(), Settings()), threading.Semaphore(0)
    noted.append({"v": 0, "worker": "1.1"})
    seen: list[list[Any]] = []

    class Journal:
        def update(self, *_: object) -> None:
            seen.append(list(history.read(tmp_path / history.NAME)))

    it = store()
    journal: Any = Journal()
    applier = Applier(it, lambda job, result: done.release(), journal, noted)
    apply(applier, done, update(it, None))
    applier.close()
    noted.close()

    assert seen == [[{"v": 0, "worker": "1.1"}]]

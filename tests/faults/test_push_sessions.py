"""A session that counts, while the server is killed and the network cut: the weights are exact."""

from __future__ import annotations

import random
import secrets
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from headwater.client.client import Client
from headwater.examples import numpy_worker
from headwater.protos.errors import Refused
from kit import counting
from kit.disk import set_faults
from kit.lives import Lives
from kit.processes import run
from kit.proxy import Cut, Proxy
from kit.served import COUNTING, ServedLives, program
from kit.waiting import wait_for

CUTS = 3


class Pusher(threading.Thread):
    """A program that pushes -1 until it is told to end, and counts what was applied."""

    def __init__(self, address: str, size: int, *, name: str = "") -> None:
        super().__init__(name=f"pusher {name}")
        self._address = address
        self._size = size
        self.over = threading.Event()
        self.applied = 0
        self.lost = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with Client(self._address) as client, client.train(name=self.name) as session:
                while not self.over.is_set():
                    session.pull()
                    outcome = session.push({"total": np.full(self._size, -1.0)}, loss=1.0)
                    self.applied += outcome.applied
                session.flush()
                self.lost = session.lost_count
        except BaseException as error:
            self.error = error

    def end(self) -> int:
        """How many of its pushes are in the weights, by its own account."""
        self.over.set()
        self.join(60)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.applied - self.lost


def test_a_push_that_a_failing_disk_kept_all_the_same_counts_once(tmp_path: Path) -> None:
    control = tmp_path / "faults"
    set_faults(control)
    options = [*counting.options(examples=4), "--task-option", f"faults={control}"]
    with Lives(tmp_path, options, ["--durability", "log"]) as lives:
        lives.start()
        with Client(lives.address) as client, client.train() as session:
            weights = session.pull()
            gradient = {name: np.full_like(array, -1) for name, array in weights.items()}
            assert session.push(gradient).applied
            set_faults(control, {"operation": "sync", "files": "updates-*", "error": "EIO"})
            outcomes = []
            pushing = threading.Thread(target=lambda: outcomes.append(session.push(gradient)))
            pushing.start()
            assert lives.command.wait(30) == 1
            set_faults(control)
            lives.start()
            pushing.join(60)
            assert [outcome.applied for outcome in outcomes] == [True]
            np.testing.assert_array_equal(session.pull()["count"], weights["count"] + 2)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("level", "kills"),
    [
        ("snapshot", 2),
        ("log", 2),
        pytest.param("snapshot", 25, marks=pytest.mark.slow),
        pytest.param("log", 25, marks=pytest.mark.slow),
    ],
)
def test_each_push_counts_exactly_once_whatever_dies(
    level: str, kills: int, tmp_path: Path
) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown on failure
    rng = random.Random(seed)  # noqa: S311  (moments, not secrets)
    options = [*COUNTING, "--durability", level, "--snapshot-every", "200"]
    with ServedLives(tmp_path, options, total=np.zeros(3, np.float32)) as lives:
        lives.start()
        pushers = [Pusher(lives.address, 3, name=name) for name in ("ann", "bob")]
        for pusher in pushers:
            pusher.start()
        for _ in range(kills):
            time.sleep(rng.uniform(0.1, 0.8))
            lives.kill()
            lives.start()
            before = [pusher.applied for pusher in pushers]
            wait_for(
                lambda: all(p.applied > n + 20 for p, n in zip(pushers, before, strict=True)),  # noqa: B023
                "they push again",
                state=lambda: (lives.status(), [p.error for p in pushers]),
            )
        counted = sum(pusher.end() for pusher in pushers)
        with Client(lives.address) as client:
            weights, status = client.pull(), client.status()
        assert weights["total"].tolist() == [counted] * 3
        assert weights.version == counted == status["durable_version"]
        assert status["incarnation"] == kills + 1
        assert "Traceback" not in lives.errors
        print(f"{counted} pushes, {kills} kills")
        lives.kill()  # and what they were told is durable is so
        lives.start()
        with Client(lives.address) as client:
            assert client.pull()["total"].tolist() == [counted] * 3


def test_a_network_that_cuts_in_the_middle_of_pushes_costs_none_and_doubles_none(
    tmp_path: Path,
) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown on failure
    rng = random.Random(seed)  # noqa: S311  (moments, not secrets)
    size = 700_000  # three parts

    def some_cut() -> Cut:
        # In the middle of pushes and of weights; or of the little that goes the other way.
        return Cut(
            to_server=rng.random() < 0.5,
            after_bytes=rng.choice((rng.randrange(1, 1000), rng.randrange(2 * 4 * size))),
            reset=rng.random() < 0.5,
        )

    with ServedLives(tmp_path, COUNTING, total=np.zeros(size, np.float32)) as lives:
        lives.start()
        with Proxy(lives.address, some_cut) as network:
            pusher = Pusher(network.address, size)
            pusher.start()

            def cut_often() -> bool:
                if rng.random() < 0.05:  # where a connection is cut that hardly anything goes over
                    network.cut_all(reset=True)
                seen = network.stats
                return min(seen.cuts_to_server, seen.cuts_to_client, seen.cuts_at_once) >= CUTS

            wait_for(cut_often, "cuts of all kinds", 60, lambda: (network.stats, pusher.error))
            network.plan = lambda: None
            counted = pusher.end()
            print(f"{counted} pushes, {network.stats}")
        with Client(lives.address) as client:
            weights, status = client.pull(), client.status()
        assert np.unique(weights["total"]).tolist() == [counted]
        assert weights.version == counted
        assert status["rejected"]["stale"] == status["rejected"]["malformed"] == 0


def test_the_bound_holds_for_what_is_sent_again_after_a_crash(tmp_path: Path) -> None:
    """The weights that the lost pushes were computed at are gone: they count as version 0's."""
    options = [*COUNTING, "--consistency", "bounded:1", "--snapshot-every", "1000"]
    with ServedLives(tmp_path, options, total=np.zeros(1, np.float32)) as lives:
        lives.start()
        with Client(lives.address) as client, client.train() as session:
            for _ in range(5):
                session.pull()
                assert session.push({"total": [-1.0]}).staleness == 0
            assert session.kept_count == 5
            lives.kill()
            lives.start()
            weights = session.pull()  # what was lost comes first, in order, as far as it may
            assert session.lost_count == 3
            assert weights["total"].tolist() == [2.0]
            assert session.push({"total": [-1.0]}).staleness == 0
            status = client.status()
            assert status["staleness"]["max"] == 1
            assert status["rejected"]["stale"] == 3
            session.flush()
        with Client(lives.address) as client:
            assert client.pull()["total"].tolist() == [3.0]
            assert client.status()["durable_version"] == 3


def test_sessions_and_ticketed_workers_train_one_run_while_it_is_killed(tmp_path: Path) -> None:
    examples, epochs = 400, 3
    options = ["--examples", str(examples), "--batch-size", "4", "--epochs", str(epochs)]
    arrays = {"count": np.zeros(examples, np.float32), "total": np.zeros(1, np.float32)}

    class Both(Pusher):
        def run(self) -> None:
            with Client(self._address) as client, client.train() as session:
                while not self.over.is_set():
                    session.pull()
                    zeros = np.zeros(examples)
                    self.applied += session.push({"count": zeros, "total": [-1.0]}).applied

    with ServedLives(tmp_path, [*COUNTING, *options, "--snapshot-every", "50"], **arrays) as lives:
        lives.start()
        worker = ("-m", numpy_worker.__name__, lives.address)
        pusher = Both(lives.address, 1)
        with program(*worker, cwd=tmp_path, PAUSE_S="0.02") as one:
            pusher.start()
            wait_for(lambda: lives.status()["batches_applied"] > 40, "both train")
            names = [w["state"] for w in lives.status()["workers"]]  # type: ignore[index]
            assert {"session", "pushing"} & set(names)
            lives.kill()
            lives.start()
            wait_for(lambda: lives.status()["batches_applied"] > 120, "they go on")
            counted = pusher.end()
            lives.finished()
            assert one.wait(20) == 0
        with (
            Client(lives.address) as client,
            pytest.raises(Refused, match="the run is over"),
            client.train() as session,
        ):
            session.push({"count": np.zeros(examples), "total": [-1.0]}, at=session.pull())
        with Client(lives.address) as client:
            weights, status = client.pull(), client.status()
        assert np.unique(weights["count"]).tolist() == [epochs]
        assert weights["total"].tolist() == [counted]
        assert weights.version == counted + status["batches_total"]
    replayed = run("replay", "run", "--task", "headwater.examples.mnist", cwd=tmp_path)
    assert replayed.status != 0

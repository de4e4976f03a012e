"""`client.train()`: what a program is told of its pushes, and what the run shows of them."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from headwater import Server
from headwater.client.client import Client
from headwater.client.push_session import PushSession
from headwater.client.weights import Weights
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos import rpc
from headwater.protos.errors import Reason, Refused, Unreachable, UsageError
from headwater.protos.layout import Layout
from headwater.protos.wire import PART_BYTES, frame
from headwater.server import push_sessions
from headwater.worker.link import Patience
from headwater.worker.load import LoadedTask
from headwater.worker.loop import Worker
from kit import counting, stateful
from kit.processes import run
from kit.served import COUNTING, ServedLives
from kit.waiting import wait_for

SIZE = 300_000  # 1.2 MB: two parts


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedLives]:
    """A server with one array to count in, and a constant; with examples, for sync mode."""
    folder = tmp_path_factory.mktemp("served")
    options = [*COUNTING, "--examples", "8", "--batch-size", "4"]
    arrays = {"total": np.zeros(SIZE, np.float32), "frozen": np.array([5])}
    with ServedLives(folder, options, **arrays) as lives:
        lives.start()
        yield lives


@pytest.fixture
def client(lives: ServedLives) -> Iterator[Client]:
    with Client(lives.address) as client:
        yield client
        client.set({"consistency": "async"})


@pytest.fixture
def session(client: Client) -> Iterator[PushSession]:
    with client.train(name="sim") as session:
        session.pull()
        yield session


def ones(value: float = -1.0) -> dict[str, Any]:
    return {"total": np.full(SIZE, value)}


def pushing(client: Client) -> int:
    """How many sessions the server is taking a push from, or holds one of."""
    return sum(worker["state"] == "pushing" for worker in client.status()["workers"])


def test_a_push_moves_the_weights_and_says_which_version_it_made(
    client: Client, session: PushSession
) -> None:
    before = session.pull()
    first = session.push(ones(), loss=2.0, examples=3)
    second = session.push(ones())  # at the same weights

    assert (first.applied, first.version, first.staleness) == (True, before.version + 1, 0)
    assert (second.applied, second.version, second.staleness) == (True, before.version + 2, 1)
    after = session.pull()
    np.testing.assert_array_equal(after["total"], before["total"] + 2)
    assert after["frozen"] == 5
    status = client.status()
    assert status["session_updates"] >= 2
    assert status["loss"] == pytest.approx(2.0)
    assert status["batches_applied"] == 0
    assert status["bytes_in"] > 2 * 4 * SIZE
    mine = [w for w in status["workers"] if w["name"] == "sim"][-1]
    assert (mine["state"], mine["gradients"], mine["staleness_mean"]) == ("session", 2, 0.5)
    session.flush()
    assert session.kept_count == 0
    assert client.status()["durable_version"] >= second.version


def test_what_is_kept_is_bounded(client: Client) -> None:
    with client.train(keep_bytes=4 * SIZE) as session:
        session.pull()
        first = session.push(ones())
        assert session.kept_count == 1
        second = session.push(ones())  # both are too much: the first is made durable before
        assert session.kept_count == 1
        assert client.status()["durable_version"] >= (first.version or 0)
        assert (second.version or 0) > (first.version or 0)


def test_programs_wait_for_the_servers_memory(tmp_path: Path) -> None:
    options = [*COUNTING, "--max-staged-bytes", str(4 * SIZE + 4096)]  # for one gradient

    def push(address: str) -> None:
        with Client(address) as client, client.train() as session:
            for _ in range(10):
                session.pull()
                assert session.push(ones()).applied

    with ServedLives(tmp_path, options, total=np.zeros(SIZE, np.float32)) as lives:
        lives.start()
        threads = [threading.Thread(target=push, args=(lives.address,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        with Client(lives.address) as client:
            assert np.unique(client.pull()["total"]).tolist() == [30.0]


def test_the_table_of_workers_has_sessions(lives: ServedLives, session: PushSession) -> None:
    session.push(ones())
    done = run("workers", "--server", lives.address, cwd=lives.cwd)
    assert done.status == 0, done.errors
    assert "sim" in done.output
    assert "session" in done.output


def test_what_is_older_than_the_bound_is_stale_and_changes_nothing(
    client: Client, session: PushSession
) -> None:
    client.set({"consistency": "bounded:1"})
    old = session.pull()
    assert [session.push(ones(), at=old).code for _ in range(3)] == ["applied", "applied", "stale"]
    refused = session.push(ones(), at=old)
    assert f"computed at version {old.version}, now {old.version + 2}" in refused.message
    assert (refused.version, refused.staleness) == (None, None)
    fresh = session.pull()
    assert fresh.version == old.version + 2
    assert session.push(ones()).applied


def test_what_is_not_finite_is_rejected_and_the_next_push_is_not(
    client: Client, session: PushSession
) -> None:
    before = client.status()
    gradient = ones()
    gradient["total"][7] = np.nan
    outcome = session.push(gradient)
    assert outcome.code == "rejected"
    assert f"1 of the {SIZE} numbers in total" in outcome.message
    assert session.push(ones(), loss=float("inf")).code == "rejected"
    status = client.status()
    assert status["version"] == before["version"]
    assert status["rejected"]["nonfinite"] == before["rejected"]["nonfinite"] + 2
    assert session.push(ones()).applied


def test_a_push_is_held_while_the_run_is_paused(client: Client, session: PushSession) -> None:
    version = client.status()["version"]
    client.pause()
    outcomes = []
    held = threading.Thread(target=lambda: outcomes.append(session.push(ones())))
    held.start()
    try:
        wait_for(lambda: pushing(client) == 1, "it came")
        assert client.status()["version"] == version
    finally:
        client.resume()
        held.join(30)
    assert outcomes[0].applied


def test_sync_mode_refuses_sessions(client: Client, session: PushSession) -> None:
    client.set({"consistency": "sync:2"})
    with pytest.raises(Refused, match="choose another consistency, or take tickets") as refused:
        session.push(ones())
    assert refused.value.reason is Reason.NOT_IN_SYNC
    client.set({"consistency": "async"})
    before = session.pull()
    assert session.push(ones()).version == before.version + 1  # that one was not kept


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (None, "a gradient is a dict of arrays by name, not of type NoneType"),
        ([1, 2], "not of type list"),
        ({}, r"missing \['total'\], unknown \[\]"),
        ({**ones(), "frozen": np.array([1])}, r"missing \[\], unknown \['frozen'\]"),
        ({"total": np.zeros(3)}, r"total is float64\[3\], the parameter is float32\[300000\]"),
        ({"total": np.zeros(SIZE, np.complex64)}, "total is complex64"),
    ],
)
def test_a_gradient_of_other_arrays_is_wrong_usage(
    gradient: Any, message: str, session: PushSession
) -> None:
    with pytest.raises(UsageError, match=message):
        session.push(gradient)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": "low"}, "loss is a number, not 'low'"),
        ({"loss": np.zeros(2)}, "loss is a number"),
        ({"examples": -1}, "examples is a whole number from 0 on, not -1"),
        ({"examples": 2.0}, "examples is a whole number from 0 on, not 2.0"),
    ],
)
def test_what_is_wrong_beside_the_gradient_is_not_kept(
    wrong: dict[str, Any], message: str, session: PushSession
) -> None:
    with pytest.raises(UsageError, match=message):
        session.push(ones(), **wrong)
    assert session.kept_count == 0
    assert session.push(ones(), loss=np.array(1.5), examples=np.int64(3)).applied


def test_weights_of_another_run_or_of_the_future_are_no_base(session: PushSession) -> None:
    weights = session.pull()

    def other(**changed: Any) -> Weights:
        named = {k: getattr(weights, k) for k in ("run_id", "incarnation", "version", "epoch")}
        return Weights(weights, **{**named, **changed})

    with pytest.raises(UsageError, match="`at` is of run another"):
        session.push(ones(), at=other(run_id="another"))
    with pytest.raises(Refused, match="has never been made") as refused:
        session.push(ones(), at=other(version=weights.version + 5))
    assert refused.value.reason is Reason.FUTURE_VERSION
    assert session.push(ones(), at=weights).applied


def test_weights_are_pulled_first(client: Client) -> None:
    with (
        client.train() as session,
        pytest.raises(UsageError, match="pull the weights first"),
    ):
        session.push(ones())


def test_no_server_is_waited_for_as_long_as_was_asked() -> None:
    with (
        Client("127.0.0.1:9") as nowhere,
        nowhere.train(timeout_s=0.2) as session,
        pytest.raises(Unreachable),
    ):
        session.pull()


# ------------------------------------------------------------------- the protocol


class Bare:
    """PushGradient by hand."""

    def __init__(self, address: str, session: int) -> None:
        self.stub = rpc.Stub(rpc.connect(address))
        with Client(address) as client:
            weights = client.pull()
        trained = {n: a for n, a in weights.items() if a.dtype.kind == "f"}
        layout = Layout.of(
            [(n, a.dtype, a.shape) for n, a in trained.items()],
            constants=[(n, a.dtype, a.shape) for n, a in weights.items() if n not in trained],
        )
        buffer = layout.trained.empty()
        layout.trained.pack([np.full_like(a, -1) for a in trained.values()], buffer)
        self.data = buffer.tobytes()
        self.fields: dict[str, Any] = {
            "session": session,
            "opened_version": weights.version,
            "sequence": 1,
            "run_id": weights.run_id,
            "incarnation": weights.incarnation,
            "base_incarnation": weights.incarnation,
            "base": weights.version,
            "layout": bytes.fromhex(layout.fingerprint),
        }
        self.attempt = 0

    def push(self, *parts: bytes, **changed: Any) -> pb.SessionReply:
        self.attempt += 1
        if not parts:
            size = len(self.data)
            parts = tuple(self.data[at : at + PART_BYTES] for at in range(0, size, PART_BYTES))
        messages = [self._first(parts[0], **changed)]
        messages += [frame(pb.SessionPush(), part) for part in parts[1:]]
        reply: pb.SessionReply = self.stub.PushGradient(iter(messages), timeout=30)
        return reply

    def begin(self, go_on: threading.Event, **changed: Any) -> Any:
        """The call of a push whose second half comes when it is told to, and its reply."""
        self.attempt += 1
        half = len(self.data) // 2
        first = self._first(self.data[:half], **changed)

        def halves() -> Iterator[bytes]:
            yield first
            go_on.wait(30)
            yield frame(pb.SessionPush(), self.data[half:])

        return self.stub.PushGradient.future(halves(), timeout=60)

    def _first(self, part: bytes, **changed: Any) -> bytes:
        head = pb.SessionPush(**{**self.fields, "attempt": self.attempt, **changed})
        return frame(head, part)

    def refused(self, *parts: bytes, **changed: Any) -> str:
        with pytest.raises(grpc.RpcError) as error:
            self.push(*parts, **changed)
        return reason_of(error.value)


def reason_of(error: Any) -> str:
    return str(dict(error.trailing_metadata())["headwater-reason"])


def test_a_repeat_is_answered_with_the_first_outcome_and_changes_nothing(
    lives: ServedLives, client: Client
) -> None:
    bare = Bare(lives.address, 77)
    first = bare.push()
    assert (first.code, first.last_sequence) == (pb.OUTCOME_APPLIED, 1)
    before = client.pull()
    again = bare.push()
    assert (again.code, again.version) == (pb.OUTCOME_DUPLICATE, first.version)
    asked = bare.push(asks=True)
    assert (asked.code, asked.version) == (pb.OUTCOME_DUPLICATE, first.version)
    ahead = bare.push(sequence=3)
    assert (ahead.code, ahead.last_sequence) == (pb.OUTCOME_MISSING, 1)
    unknown = bare.push(sequence=2, asks=True)
    assert (unknown.code, unknown.last_sequence) == (pb.OUTCOME_MISSING, 1)
    assert client.pull().version == before.version
    assert bare.push(sequence=2).code == pb.OUTCOME_APPLIED
    assert client.status()["rejected"]["duplicate"] >= 1


def test_what_breaks_the_protocol_is_refused_and_changes_nothing(
    lives: ServedLives, client: Client
) -> None:
    bare, before = Bare(lives.address, 78), client.pull()
    whole = bytes(4 * SIZE)
    parts = (whole[:PART_BYTES], whole[PART_BYTES:])
    version = before.version
    for name in ("session", "sequence", "run_id", "incarnation", "base_incarnation"):
        assert bare.refused(**{name: "" if name == "run_id" else 0}) == "MALFORMED"
    assert bare.refused(attempt=0) == "MALFORMED"
    assert bare.refused(base_incarnation=9) == "MALFORMED"
    assert bare.refused(run_id="another") == "WRONG_RUN"
    assert bare.refused(incarnation=9, base_incarnation=9) == "OLD_INCARNATION"
    assert bare.refused(layout=b"x" * 32) == "LAYOUT_MISMATCH"
    assert bare.refused(base=version + 1) == "FUTURE_VERSION"
    assert bare.refused(parts[0]) == "MALFORMED"  # the rest is missing
    for wrong, said in (
        ((whole,), "at most 1048576"),
        ((*parts, b"x"), None),  # nobody reads so far
        ((parts[0], parts[1] + b"x"), "the gradient has 1200000 bytes"),
        ((parts[0], b"", parts[1]), "a part has no body"),
    ):
        if said is not None:
            reply = bare.push(*wrong)
            assert reply.code == pb.OUTCOME_REJECTED
            assert reply.rejected_for == pb.REJECTED_FOR_MALFORMED
            assert said in reply.message
    assert client.pull().version == version
    assert bare.push().code == pb.OUTCOME_APPLIED
    assert bare.refused(attempt=1) == "FENCED"


def test_a_stream_that_is_cut_gives_its_place_back(lives: ServedLives, client: Client) -> None:
    client.set({"consistency": "bounded:0"})  # room for one at a time
    bare, other = Bare(lives.address, 79), Bare(lives.address, 80)
    over = threading.Event()
    call = bare.begin(over)
    try:
        # Until it has come, the other's push would be the first, and the stream's too late.
        wait_for(lambda: pushing(client) == 1, "the stream has the place")
        assert other.push().code == pb.OUTCOME_STALE
    finally:
        call.cancel()
        over.set()
    wait_for(lambda: other.push().code != pb.OUTCOME_STALE, "the place is free again")


def test_a_session_that_was_forgotten_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_sessions.PushSessions.add, "__defaults__", (2,))
    with (
        Server(counting.task(examples=4), run_dir=tmp_path / "run") as server,
        Client(server.address) as client,
        client.train() as a,
        client.train() as b,
        client.train() as c,
    ):
        gradient = {"count": np.full(4, -1.0), "padding": np.zeros(0)}
        for session in (a, b, c):
            session.pull()
        for session in (a, b, c):
            assert session.push(gradient).applied
        with pytest.raises(Refused, match="open a new session") as refused:
            a.push(gradient)
        assert refused.value.reason is Reason.SESSION_FORGOTTEN
        a._kept.clear()  # it is lost; nothing to wait for at the end
        assert client.pull().version == 3


@pytest.mark.parametrize("durability", ["snapshot", "log"])
def test_a_session_that_is_forgotten_while_it_pushes_is_refused_and_the_run_goes_on(
    durability: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_sessions.PushSessions.add, "__defaults__", (2,))
    task, go_on = counting.task(examples=4), threading.Event()
    options = {"run_dir": tmp_path / "run", "durability": durability}
    with Server(task, **options) as server, Client(server.address) as client:
        a, b, c = (Bare(server.address, session) for session in (1, 2, 3))
        for bare in (a, b):
            assert bare.push().code == pb.OUTCOME_APPLIED
        call = a.begin(go_on, sequence=2)
        wait_for(lambda: pushing(client) == 1, "it has come to half")
        assert c.push().code == pb.OUTCOME_APPLIED  # which takes the place of a
        go_on.set()
        with pytest.raises(grpc.RpcError) as error:
            call.result()
        assert reason_of(error.value) == "SESSION_FORGOTTEN"
        assert b.push(sequence=2).code == pb.OUTCOME_APPLIED
    with Server(task, **options) as server, Client(server.address) as client:
        weights = client.pull()
        assert weights.version == 4
        np.testing.assert_array_equal(weights["count"], 4)


def test_a_base_is_of_no_later_version_than_all_lives_since_had_of_it(tmp_path: Path) -> None:
    task, folder = counting.task(examples=4), tmp_path / "run"

    def push(times: int) -> Bare:
        """In a life of its own; returns another session, of its last version."""
        with Server(task, run_dir=folder) as server:
            bare = Bare(server.address, secrets.randbits(60) + 1)
            for at in range(times):
                assert bare.push(sequence=at + 1).code == pb.OUTCOME_APPLIED
            return Bare(server.address, 7)

    push(2)
    late = push(4)
    push(0)
    (folder / f"snapshot-{6:020}.safetensors").write_bytes(b"damaged")
    with Server(task, run_dir=folder, staleness="scale") as server:
        assert server.published.version == 2
        bare = Bare(server.address, 8)
        for at in range(3):
            bare.push(sequence=at + 1)
        late.stub = bare.stub
        reply = late.push(incarnation=4)
        assert (reply.code, reply.version, reply.staleness) == (pb.OUTCOME_APPLIED, 6, 3)


def test_what_comes_whole_after_the_end_is_told_so(tmp_path: Path) -> None:
    task, go_on = counting.task(examples=4, batch_size=4, epochs=1), threading.Event()
    with (
        Server(task, name="counting", run_dir=tmp_path / "run") as server,
        Client(server.address) as client,
    ):
        bare = Bare(server.address, 1)
        call = bare.begin(go_on)
        wait_for(lambda: pushing(client) == 1, "it has come to half")
        loaded = LoadedTask(task, "counting", {}, "")
        Worker(loaded, server.address, Patience(server.address, 30)).run()
        wait_for(lambda: client.status()["state"] == "finished", "the run is over")
        go_on.set()
        with pytest.raises(grpc.RpcError) as error:
            call.result()
        assert reason_of(error.value) == "RUN_OVER"
        np.testing.assert_array_equal(client.pull()["count"], 1)


def test_a_call_in_which_nothing_comes_is_given_up(tmp_path: Path) -> None:
    over = threading.Event()

    def silent() -> Iterator[bytes]:
        over.wait(30)
        yield from ()

    with Server(counting.task(4), run_dir=tmp_path / "run", session_timeout_s=0.5) as server:
        call = rpc.Stub(rpc.connect(server.address)).PushGradient.future(silent())
        with pytest.raises(grpc.RpcError) as error:
            call.result(timeout=20)
        over.set()
    assert reason_of(error.value) == "SILENT"


def test_a_session_leaves_state_beside_the_parameters_as_it_is(tmp_path: Path) -> None:
    with (
        Server(stateful.task(), run_dir=tmp_path / "run") as server,
        Client(server.address) as client,
        client.train() as session,
    ):
        before = session.pull()
        layout = session._layout
        assert layout is not None
        gradient = {t.name: np.ones(t.shape, t.dtype) for t in layout.tensors}
        assert session.push(gradient).applied
        after = session.pull()
        changed = {n for n in after if not np.array_equal(after[n], before[n])}
        assert changed == set(gradient)

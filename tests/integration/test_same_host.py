"""A server and workers on one machine: tensors in shared memory, messages by a Unix socket."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headwater import Client, Server
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos import shared_memory
from headwater.protos.line import Line
from headwater.server import door, slots
from kit import counting
from kit.processes import run, server, worker
from kit.protocol import BareWorker, counting_gradient, hello_of, key
from kit.waiting import wait_for

pytestmark = pytest.mark.skipif(not shared_memory.IS_AVAILABLE, reason="no memfd here")

TASK = Path(counting.__file__)


@contextlib.contextmanager
def serving(tmp_path: Path, **options: Any) -> Iterator[tuple[Server, Client, Any]]:
    """An embedded server of the counting task, its client, and how to make a bare worker."""
    padding = options.pop("padding", 0)
    task = counting.task(64, options.pop("epochs", 1), 4, padding)
    with (
        Server(task, run_dir=tmp_path / "run", **options) as server,
        Client(server.address) as client,
        contextlib.ExitStack() as stack,
    ):

        def hire(**more: Any) -> BareWorker:
            bare = BareWorker(server.address, hello_of(task), **{"on_line": True, **more})
            return stack.enter_context(bare)

        yield server, client, hire


def train(bare: BareWorker, ticket: pb.Ticket) -> pb.Outcome:
    bare.push(ticket, counting_gradient(bare.layout, bare.leased[key(ticket)]))
    return bare.outcome()


# ------------------------------------------------------------------ as users see it


def test_workers_on_the_servers_machine_share_its_memory_by_themselves(tmp_path) -> None:
    options = counting.options(batch_size=4)
    with server(TASK, *options, cwd=tmp_path) as (_, address), Client(address) as client:
        with (
            worker(TASK, address, "--name", "ann", *options, cwd=tmp_path) as ann,
            worker(
                TASK, address, "--name", "bob", "--transport", "grpc", *options, cwd=tmp_path
            ) as bob,
        ):
            wait_for(
                lambda: (
                    {w["name"]: w["transport"] for w in client.status()["workers"]}
                    == {"ann": "shm", "bob": "grpc"}
                ),
                "both are there, ann over her line",
                state=client.status,
            )
            assert (ann.wait(), bob.wait()) == (0, 0)
            assert ann.errors.count("tensors travel through shared memory") == 1
            assert "shared memory" not in bob.errors
        counting.assert_exactly_once(client)


def test_a_server_that_offers_none_is_used_by_grpc_and_it_is_said_once(tmp_path) -> None:
    options = counting.options(batch_size=64)
    with (
        server(TASK, "--transport", "grpc", *options, cwd=tmp_path) as (_, address),
        worker(TASK, address, *options, cwd=tmp_path) as ann,
    ):
        assert ann.wait() == 0
        assert ann.errors.count("tensors travel by gRPC") == 1


def test_who_insists_on_shared_memory_is_told_why_there_is_none(tmp_path) -> None:
    options = counting.options(batch_size=64)
    with server(TASK, "--transport", "grpc", *options, cwd=tmp_path) as (_, address):
        found = run(
            "worker", "--task", TASK, "--server", address, "--transport", "shm", *options,
            cwd=tmp_path,
        )  # fmt: skip
    assert found.status == 1
    assert "--transport shm: no shared memory with the server" in found.errors
    assert "use auto or grpc" in found.errors
    assert "Traceback" not in found.errors


def test_the_weights_are_the_same_bits_by_either_transport(tmp_path) -> None:
    weights = []
    for transport in ("grpc", "shm"):
        folder = tmp_path / transport
        folder.mkdir()
        found = run(
            "run", "--task", "headwater.examples.mnist", "--workers", "2", "--epochs", "1",
            "--consistency", "sync:3", "--transport", transport, "--run-dir", folder / "run",
            cwd=folder, timeout_s=120,
        )  # fmt: skip
        assert found.status == 0, found.errors
        weights.append((folder / "run" / "weights.safetensors").read_bytes())
        said = (folder / "run" / "logs" / "worker-1.log").read_text()
        assert ("through shared memory" in said) == (transport == "shm")
    grpc, shm = (data[data.index(b"}}") :] for data in weights)  # the names of the runs differ
    assert grpc == shm


def test_nothing_is_left_of_a_server_and_a_worker_that_were_killed(tmp_path) -> None:
    options = counting.options(batch_size=4, compute_s=0.02)
    with (
        server(TASK, *options, cwd=tmp_path) as (service, address),
        worker(TASK, address, *options, cwd=tmp_path) as ann,
        Client(address) as client,
    ):
        wait_for(lambda: client.status()["version"] > 5, "it trains", state=client.status)
        (name,) = _abstract_sockets(service.process.pid)
        ann.kill()
        service.kill()
    assert name not in Path("/proc/net/unix").read_text()
    assert not list(Path("/dev/shm").glob("*headwater*"))  # noqa: S108  (only looked at)


def _abstract_sockets(pid: int) -> set[str]:
    """Those that a process listens at."""
    inodes = {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {
        words[7]
        for words in lines
        if len(words) > 7
        and words[7].startswith("@headwater-")
        and f"socket:[{words[6]}]" in inodes
    }


# ------------------------------------------------------------------- what is shared


def test_weights_stay_as_they_were_until_their_gradient_is_pushed(tmp_path) -> None:
    with serving(tmp_path, epochs=4) as (_, client, hire):
        reader, trainer = hire(), hire()
        reader.join()
        trainer.join()
        ticket = reader.ticket()
        weights = reader.weights.leaves[0]
        before = weights.copy()

        for _ in range(30):
            assert train(trainer, trainer.ticket()).code == pb.OUTCOME_APPLIED
            assert np.array_equal(weights, before)
        assert client.status()["version"] == 30

        assert train(reader, ticket).staleness == 30
        assert len(reader.slots) <= 2 + slots.SPARE + 2


def counting_is_exact(client: Client, epochs: int) -> None:
    count = client.pull()["count"]
    assert count.tolist() == [epochs] * 64


def test_readers_of_a_version_share_one_copy_that_they_cannot_write(tmp_path) -> None:
    with serving(tmp_path) as (_, _, hire):
        bares = [hire(), hire(), hire()]
        for bare in bares:
            bare.join()
            bare.ticket()
        inodes = set()
        for bare in bares:
            (event,) = (e for e in bare.events if e.kind == "weights")
            descriptor = bare.descriptors[event.value.slot]
            inodes.add(os.fstat(descriptor).st_ino)
            with pytest.raises(PermissionError):
                shared_memory.attach(os.dup(descriptor), 64, writable=True)
        assert len(inodes) == 1
        gradients = {
            os.fstat(d).st_ino
            for b in bares
            for number, d in b.descriptors.items()
            if b.slots[number].flags.writeable
        }
        assert len(gradients) == 3  # and each its own for its gradient


def test_a_gradient_that_is_not_finite_is_refused_and_its_slot_used_again(tmp_path) -> None:
    with serving(tmp_path) as (_, client, hire):
        bare = hire()
        bare.join()
        used = set()
        for value in (np.nan, np.inf, -np.inf):
            ticket = bare.ticket()
            used.add(ticket.gradient_slot)
            gradient = np.zeros(bare.layout.total_bytes, np.uint8)
            bare.layout.views(gradient)["count"][63] = value
            bare.push(ticket, gradient)
            outcome = bare.outcome()
            assert (outcome.code, outcome.rejected_for) == (
                pb.OUTCOME_REJECTED,
                pb.REJECTED_FOR_NOT_FINITE,
            )
            assert "1 of the 64 numbers in count" in outcome.message
            if value != -np.inf:  # then it is in quarantine
                assert client.status()["version"] == 0
        assert len(used) == 1


def test_a_push_that_names_another_slot_is_malformed_and_changes_nothing(tmp_path) -> None:
    with serving(tmp_path) as (_, client, hire):
        bare = hire()
        bare.join()
        ticket = bare.ticket()
        bare.push(ticket, slot=ticket.gradient_slot + 1000)
        outcome = bare.outcome()
        assert outcome.rejected_for == pb.REJECTED_FOR_MALFORMED
        assert "is not its ticket's" in outcome.message
        assert train(bare, bare.ticket()).version == 1
        assert client.status()["rejected"]["malformed"] == 1


def test_a_slot_without_a_line_is_malformed(tmp_path) -> None:
    with serving(tmp_path) as (_, _, hire):
        bare = hire(on_line=False)
        bare.join()
        bare.push(bare.ticket(), pieces=[(0, b"")], slot=1)
        assert bare.outcome().rejected_for == pb.REJECTED_FOR_MALFORMED


def test_a_gradient_may_come_in_parts_on_the_line_as_well(tmp_path) -> None:
    with serving(tmp_path, padding=700_000) as (_, _, hire):
        bare = hire()
        bare.join()
        ticket = bare.ticket()
        gradient = counting_gradient(bare.layout, bare.leased[key(ticket)])
        size = 1 << 20
        bare.push(
            ticket, pieces=[(at, gradient[at : at + size]) for at in range(0, len(gradient), size)]
        )
        assert bare.outcome().code == pb.OUTCOME_APPLIED
        assert train(bare, bare.ticket()).version == 2


def test_without_memory_to_share_tensors_go_in_parts_on_the_line(tmp_path, monkeypatch) -> None:
    def none(self: Any, size: int, *, read_only: bool) -> None:
        self.descriptor = -1
        raise OSError(28, "No space left on device")

    with serving(tmp_path, padding=700_000) as (_, client, hire):
        monkeypatch.setattr(shared_memory.SharedMemory, "__init__", none)
        bare = hire()
        bare.join()
        for ticket in bare.tickets():
            assert ticket.gradient_slot == 0
            assert bare.weights.version == ticket.base
            assert train(bare, ticket).code == pb.OUTCOME_APPLIED
        assert not bare.slots
        counting_is_exact(client, 1)


# ------------------------------------------------------------------------- the door


def test_a_stranger_at_the_door_is_sent_away(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(door, "KEY_TIMEOUT_S", 0.5)
    with serving(tmp_path) as (_, _, hire):
        bare = hire(on_line=False)
        bare.join()
        (welcome,) = bare.heard("welcome")
        for said in (b"x" * 16, b"", bytes(welcome.same_host.key[:-1])):
            line = Line(welcome.same_host.socket, 10)
            line.send(said)
            assert line.receive() is None
            line.close()
        silent = Line(welcome.same_host.socket, 10)
        began = time.monotonic()
        assert silent.receive() is None
        assert time.monotonic() - began < 5
        silent.close()
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(b"\0" + welcome.same_host.socket.encode())
            raw.settimeout(10)
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
            with contextlib.suppress(ConnectionResetError):
                assert raw.recv(1) == b""
        assert train(bare, bare.ticket()).code == pb.OUTCOME_APPLIED  # nobody else was disturbed


def test_a_key_opens_the_door_once_and_for_its_stream_alone(tmp_path) -> None:
    with serving(tmp_path) as (_, _, hire):
        bare = hire()
        bare.join()
        (welcome,) = bare.heard("welcome")
        again = Line(welcome.same_host.socket, 10)
        again.send(welcome.same_host.key)
        assert again.receive() is None
        again.close()

        gone = hire(on_line=False)
        gone.open()
        offer = gone.welcome().same_host
        gone.cut()
        gone.end()
        wait_for(lambda: _is_shut(offer), "the key of a stream that has ended is void")
        assert train(bare, bare.ticket()).code == pb.OUTCOME_APPLIED


def _is_shut(offer: pb.SameHost) -> bool:
    line = Line(offer.socket, 10)
    line.send(offer.key)
    shut = line.receive() is None
    line.close()
    return shut


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_not_let_in(tmp_path) -> None:
    with serving(tmp_path) as (_, _, hire):
        bare = hire(on_line=False)
        bare.open()
        offer = bare.welcome().same_host
        knocks = [sys.executable, "-I", "-c", KNOCK, offer.socket, offer.key.hex()]
        said = subprocess.run(  # noqa: S603  (our own script)
            knocks, capture_output=True, text=True, timeout=30, check=False
        )
        assert said.stdout == "shut", said.stderr
        bare.ready()
        assert train(bare, bare.ticket()).code == pb.OUTCOME_APPLIED


KNOCK = """
import os, socket, sys
os.setuid(65534)
knocking = socket.socket(socket.AF_UNIX)
knocking.settimeout(10)
try:
    knocking.connect(bytes(1) + sys.argv[1].encode())
    knocking.sendall(bytes((16, 0, 0, 0, 0, 0, 0, 0)) + bytes.fromhex(sys.argv[2]))
    print("open" if knocking.recv(1) else "shut", end="")
except (ConnectionResetError, BrokenPipeError):
    print("shut", end="")
"""


def test_a_line_that_breaks_ends_the_stream_and_gives_its_batch_back(tmp_path) -> None:
    with serving(tmp_path) as (_, client, hire):
        bare = hire()
        bare.join()
        ticket = bare.ticket()
        assert bare._line is not None
        bare._line.end()
        bare.end()
        wait_for(lambda: not client.status()["workers"], "it is gone", state=client.status)
        other = hire()
        other.join()
        assert key(other.ticket()) == key(ticket)


def test_a_message_that_is_none_is_a_refusal_of_the_stream(tmp_path) -> None:
    with serving(tmp_path) as (_, _, hire):
        bare = hire()
        bare.join()
        bare.ticket()
        bare.send_bytes(b"\xff\xff\xff")
        assert bare.end().reason == "MALFORMED"


def test_a_worker_that_takes_nothing_from_its_line_holds_up_nobody(tmp_path) -> None:
    with serving(tmp_path, epochs=20) as (_, client, hire):
        deaf = hire()
        deaf.open()
        offer = deaf.welcome().same_host
        line = Line(offer.socket, 10)
        line.send(offer.key)  # and reads not even the answer
        other = hire()
        other.join()
        done = threading.Event()

        def work() -> None:
            for _ in range(100):
                train(other, other.ticket())
            done.set()

        threading.Thread(target=work, daemon=True).start()
        assert done.wait(30)
        assert client.status()["version"] == 100
        line.close()

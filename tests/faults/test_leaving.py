"""How workers and servers end: asked to, interrupted, or without a word."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from headwater.client.client import Client
from kit import counting
from kit.processes import BY_GRPC, server, worker
from kit.proxy import Proxy
from kit.waiting import wait_for

TASK = Path(counting.__file__)

BATCH_SIZE = 32


@pytest.fixture
def slow(tmp_path):
    """While this file is there, steps take their time."""
    file = tmp_path / "slow"
    file.touch()
    return file


def wait_for_version(client, version):
    return wait_for(
        lambda: (status := client.status())["version"] >= version and status,
        f"version {version}",
        state=client.status,
    )


def tickets_out(status):
    """Batches that somebody is to compute now, of those that are reserved."""
    return status["batches_leased"] - sum(worker["leased"] for worker in status["workers"])


def last_line(command):
    return command.errors.splitlines()[-1]


def test_a_worker_told_to_leave_finishes_the_gradient_in_hand(slow, tmp_path):
    begun = tmp_path / "begun"
    options = counting.options(
        batch_size=BATCH_SIZE, compute_s=0.4, slow_while=slow, begun=begun
    )  # fmt: skip
    with server(TASK, *options, cwd=tmp_path) as (service, address), Client(address) as client:
        for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
            first = client.status()["version"]
            with worker(TASK, address, "--name", "ann", *options, cwd=tmp_path) as ann:
                wait_for_version(client, first + 1)
                size = begun.stat().st_size
                wait_for(lambda: begun.stat().st_size > size, "a gradient is begun")  # noqa: B023
                version = client.status()["version"]
                ann.send(number)
                assert ann.wait() == status, ann.errors
                assert f"left; {version + 1 - first} of its gradients" in last_line(ann)
                assert "Traceback" not in ann.errors
            wait_for(lambda: not client.status()["workers"], "the server knows")
            left = client.status()
            assert left["version"] == version + 1
            assert (left["batches_leased"], left["batches_admitted"]) == (0, 0)
        assert service.errors.count(" ann left") == 2

        # What was reserved for them is done by who comes next.
        slow.unlink()
        with worker(TASK, address, *options, cwd=tmp_path) as bob:
            assert bob.wait() == 0
        counting.assert_exactly_once(client)


def test_a_worker_that_waits_for_a_ticket_leaves_at_once(slow, tmp_path):
    options = counting.options(batch_size=BATCH_SIZE, load_s=0.02, slow_while=slow)
    with (
        server(TASK, *options, cwd=tmp_path) as (_, address),
        Client(address) as client,
        worker(TASK, address, *options, cwd=tmp_path) as ann,
    ):
        wait_for_version(client, 1)
        client.pause()
        # Its push is held, or its next ticket: either way it hears nothing before the run goes on.
        wait_for(
            lambda: not tickets_out(client.status()), "it has nothing to do", 30, client.status
        )
        ann.send(signal.SIGTERM)
        assert ann.wait(10) == 0, ann.errors

        slow.unlink()
        client.resume()
        with worker(TASK, address, *options, cwd=tmp_path) as bob:
            assert bob.wait() == 0
        counting.assert_exactly_once(client)


def test_a_worker_told_to_leave_while_it_computes_does_not_wait_for_a_push_that_is_held(
    slow, tmp_path
):
    begun = tmp_path / "begun"
    options = counting.options(
        batch_size=BATCH_SIZE, compute_s=0.4, slow_while=slow, begun=begun
    )  # fmt: skip
    with (
        server(TASK, *options, cwd=tmp_path) as (_, address),
        Client(address) as client,
        worker(TASK, address, *options, cwd=tmp_path) as ann,
    ):
        wait_for_version(client, 1)
        size = begun.stat().st_size
        wait_for(lambda: begun.stat().st_size > size, "a gradient is begun")
        client.pause()
        ann.send(signal.SIGTERM)
        assert ann.wait(10) == 0, ann.errors

        slow.unlink()
        client.resume()
        with worker(TASK, address, *options, cwd=tmp_path) as bob:
            assert bob.wait() == 0
        counting.assert_exactly_once(client)


def test_a_stopped_server_keeps_its_weights_and_dismisses_its_workers(slow, tmp_path):
    options = counting.options(batch_size=BATCH_SIZE, load_s=0.02, slow_while=slow)
    with (
        server(TASK, *options, cwd=tmp_path) as (service, address),
        worker(TASK, address, *options, cwd=tmp_path) as ann,
        worker(TASK, address, *options, cwd=tmp_path) as bob,
    ):
        with Client(address) as client:
            client.pause()  # until both are there: who comes later waits for the next server
            wait_for(lambda: len(client.status()["workers"]) == 2, "both have joined", 60)
            client.resume()
            wait_for_version(client, 10)
            shown = client.status()
        service.send(signal.SIGTERM)
        assert [command.wait() for command in (service, ann, bob)] == [0, 0, 0], service.errors
        for command in (ann, bob):
            assert "the server was stopped" in last_line(command)

    weights_file = tmp_path / shown["run_dir"] / "weights.safetensors"
    with safe_open(weights_file, framework="numpy") as weights:
        version = int(weights.metadata()["version"])
        count = weights.get_tensor("count")
    assert version >= shown["version"]
    # Whole: so many batches, no example used twice within the first epoch.
    assert version < 4096 // BATCH_SIZE
    assert count.sum() == version * BATCH_SIZE
    assert set(np.unique(count)) == {0, 1}


def test_workers_outlast_a_server_that_was_killed(slow, tmp_path):
    """They keep trying, until they are told to leave."""
    options = counting.options(batch_size=BATCH_SIZE, load_s=0.02, slow_while=slow)
    with (
        server(TASK, *options, cwd=tmp_path) as (service, address),
        Proxy(address) as network,
        worker(
            TASK, network.address, *BY_GRPC, "--connect-timeout", "0.5", *options, cwd=tmp_path
        ) as ann,
    ):
        with Client(address) as client:
            wait_for_version(client, 1)
        service.kill()
        before = network.stats.refused
        # With pauses of 0.1, 0.2, 0.4, … s between: --connect-timeout is over by then.
        wait_for(lambda: network.stats.refused >= before + 4, "four more attempts", 60)
        assert ann.process.poll() is None, ann.errors

        ann.send(signal.SIGTERM)
        assert ann.wait(10) == 0, ann.errors
        assert "Traceback" not in ann.errors


def test_a_worker_of_one_run_is_no_worker_of_the_next(slow, tmp_path):
    """A new server at the old address has a new run."""
    options = counting.options(batch_size=BATCH_SIZE, load_s=0.02, slow_while=slow)
    with (
        server(TASK, *options, cwd=tmp_path) as (old, old_address),
        Proxy(old_address) as network,
        worker(TASK, network.address, *BY_GRPC, *options, cwd=tmp_path) as ann,
    ):
        with Client(old_address) as client:
            wait_for_version(client, 1)
            old_run = client.status()["run_id"]
        old.kill()
        with (
            server(TASK, *options, cwd=tmp_path) as (_, new_address),
            Client(new_address) as client,
        ):
            network.target = new_address
            assert ann.wait() not in (0, None)
            assert last_line(ann).startswith("headwater worker: error: ")
            new_run = client.status()["run_id"]
            assert old_run in last_line(ann)
            assert new_run in last_line(ann)
            assert "Traceback" not in ann.errors
            assert client.status()["version"] == 0


def test_a_worker_of_a_run_that_is_starting_waits_while_another_has_its_port(tmp_path):
    """Those of `headwater run` know their run before its server answers."""
    options = counting.options(batch_size=BATCH_SIZE)
    mine = {"HEADWATER_RUN_ID": "20270101-120000-abcd"}
    with (
        server(TASK, *options, "--run-dir", "theirs", cwd=tmp_path) as (_, their_address),
        Proxy(their_address) as network,
        worker(TASK, network.address, *BY_GRPC, *options, cwd=tmp_path, **mine) as ann,
    ):
        wait_for(lambda: "not 20270101-120000-abcd" in ann.errors, "it is told")
        with (
            server(TASK, *options, "--run-dir", "mine", cwd=tmp_path, **mine) as (_, my_address),
            Client(my_address) as client,
        ):
            network.target = my_address
            assert ann.wait() == 0, ann.errors
            counting.assert_exactly_once(client)
        with Client(their_address) as client:
            assert client.status()["version"] == 0

"""Servers that end in order, and those that take their place."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headwater import Server
from headwater.client.client import Client
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos import rpc
from headwater.protos.errors import HeadwaterError, Unreachable, from_rpc_error
from headwater.protos.reading import Reader
from kit import counting
from kit.lives import TASK, Lives, Witness, steady_workers
from kit.processes import START_TIMEOUT_S, worker
from kit.protocol import BareWorker, counting_gradient, hello_of, key
from kit.waiting import wait_for

SMALL = {"examples": 64, "epochs": 50, "batch_size": 4}

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health(address: str, service: str = "") -> int:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        return stub.Check(request, timeout=5).status


def bare(lives: Lives) -> BareWorker:
    hello = hello_of(counting.task(**SMALL), "counting")
    hello.task.options.update({name: str(value) for name, value in SMALL.items()})
    return BareWorker(lives.address, hello)


def test_a_server_that_is_told_to_end_takes_in_what_is_under_way(tmp_path):
    """NOT_SERVING, no more tickets, the gradient under way applied, durable, exit 0."""
    with Lives(tmp_path, counting.options(**SMALL)) as lives:
        lives.start()
        with bare(lives) as late, bare(lives) as idle:
            late.join()
            ticket = late.ticket()
            assert health(lives.address) == health(lives.address, rpc.SERVICE_NAME) == SERVING

            lives.command.send(signal.SIGTERM)
            wait_for(lambda: health(lives.address) == NOT_SERVING, "it says that it is ending")
            idle.join()
            late.push(ticket, counting_gradient(late.layout, late.leased[key(ticket)]))

            assert late.outcome().version == 1
            late.bye()
            assert idle.bye()
            assert not late.heard("ticket")[1:]
            assert not idle.heard("ticket")
        assert lives.command.wait(10) == 0
        *_, stopped, again = lives.command.errors.splitlines()
        assert "stopped; version 1 is in run" in stopped
        assert "go on with: headwater server --task " in again

        lives.start()
        assert (lives.status()["version"], lives.status()["durable_version"]) == (1, 1)


def test_a_worker_that_hangs_holds_up_an_ending_server_for_half_of_its_grace(tmp_path):
    with Lives(tmp_path, counting.options(**SMALL), ["--grace", "3"]) as lives:
        lives.start()
        with bare(lives) as hanging:
            hanging.join()
            hanging.ticket()
            began = time.monotonic()
            lives.command.send(signal.SIGTERM)
            assert lives.command.wait(10) == 0, lives.command.errors
            assert 1.4 < time.monotonic() - began < 3.5


def test_a_paused_server_ends_all_the_same(tmp_path):
    with Lives(tmp_path, counting.options(**SMALL), ["--grace", "3"]) as lives:
        lives.start()
        with bare(lives) as held, Client(lives.address) as client:
            held.join()
            ticket = held.ticket()
            client.pause()
            held.push(ticket, counting_gradient(held.layout, held.leased[key(ticket)]))
            wait_for(lambda: client.status()["batches_admitted"], "the push is held")
            lives.command.send(signal.SIGTERM)
            assert held.outcome().version == 1
            assert lives.command.wait(10) == 0, lives.command.errors


def test_the_next_server_waits_for_the_one_that_is_ending(tmp_path):
    with Lives(tmp_path, counting.options(**SMALL), ["--grace", "60"]) as lives:
        lives.start()
        first = lives.command
        try:
            with bare(lives) as hanging:
                hanging.join()
                hanging.ticket()
                first.send(signal.SIGTERM)
                lives.command = None  # the next is started beside it
                wait_for(lambda: health(lives.address) == NOT_SERVING, "it is ending")
                lives.start(wait=False)
                waits = "waiting up to 65 s for the server (pid "
                wait_for(lambda: waits in lives.command.errors, "the next waits", START_TIMEOUT_S)
            assert first.wait(30) == 0
            wait_for(lambda: lives.status().get("incarnation") == 2, "the next goes on")
        finally:
            first.__exit__(None, None, None)


def test_a_finished_run_is_finished_when_it_is_started_again(tmp_path):
    """And goes on with more epochs."""
    options = counting.options(**SMALL)
    with Lives(tmp_path, options) as lives:
        for epochs in (2, 5):
            lives.start("--epochs", str(epochs))
            with worker(TASK, lives.address, *options, cwd=tmp_path) as one:
                assert one.wait() == 0, one.errors
            assert lives.finished()["version"] == epochs * 16
            lives.command.send(signal.SIGTERM)
            assert lives.command.wait(10) == 0
        lives.start("--epochs", "3", wait=False)
        assert lives.command.wait(30) == 2
        assert "--epochs 3 ends before what the run has trained already" in lives.command.errors


def test_another_task_does_not_continue_a_run(tmp_path):
    with Lives(tmp_path) as lives:
        lives.start(*counting.options(**SMALL))
        lives.kill()
        lives.start(*counting.options(**SMALL | {"batch_size": 8}), wait=False)
        assert lives.command.wait(30) == 2
        (line,) = lives.command.errors.splitlines()
        assert line.startswith(
            "headwater server: error: run holds another run than the one that would continue it "
            "(task options: batch_size=4, epochs=50, examples=64 in the directory, batch_size=8, "
        )


@pytest.mark.slow
@pytest.mark.parametrize("level", ["snapshot", "log"])
def test_a_run_may_change_its_level_from_life_to_life(level, tmp_path):
    """What was acknowledged at `log` is there at `snapshot`, and the other way round."""
    other = {"snapshot": "log", "log": "snapshot"}[level]
    task = SMALL | {"epochs": 60}
    with Lives(tmp_path, counting.options(**task), ["--snapshot-every", "100"]) as lives:
        lives.start("--durability", level)
        with (
            Witness(lives.address, 4, acknowledged_is_durable=False) as witness,
            steady_workers(lives.address, witness, 1, 0.0005, **task) as (one,),
        ):
            for durability in (other, level):
                version = lives.status()["version"] + 120
                wait_for(lambda: lives.status()["version"] > version, "it trains")  # noqa: B023
                lives.kill()
                lives.start("--durability", durability)
            lives.finished()
            one.wait_bye()
        with Client(lives.address) as client:
            counting.assert_exactly_once(client)


def test_a_server_that_ends_is_unreachable_to_all_who_are_asking(tmp_path):
    """Whether their calls were being served, were waiting, or came too late."""

    def ask_to_the_end(address: str) -> HeadwaterError:
        with Client(address) as client:
            while True:
                try:
                    client.status()
                except HeadwaterError as error:
                    return error

    for life in range(3):  # grpc does not always have calls waiting when it shuts down
        run_dir = tmp_path / f"run-{life}"
        with (
            ThreadPoolExecutor(8) as threads,
            Server(counting.task(**SMALL), run_dir=run_dir) as server,
        ):
            ends = [threads.submit(ask_to_the_end, server.address) for _ in range(8)]
            server.stop()
            assert [type(end.result(30)) for end in ends] == [Unreachable] * 8


def test_a_client_that_is_closed_while_it_asks_blames_no_server(tmp_path):
    with Server(counting.task(**SMALL), run_dir=tmp_path / "run") as server:
        reader = Reader(server.address)
        call = reader.stub.Pull(pb.PullRequest(min_version=10, wait_s=30.0))
        reader.close()
        with pytest.raises(grpc.RpcError) as ended:
            next(call)
        error = from_rpc_error(ended.value, server.address)
        assert type(error) is HeadwaterError
        assert str(error).startswith("the call was given up here: ")


def test_jumps_of_the_clock_mean_nothing(tmp_path):
    """An hour on, an hour back: nobody is evicted, nothing is refused."""
    clock = tmp_path / "clock"
    clock.write_text("0")
    task = SMALL | {"epochs": 100_000}
    options = [*counting.options(**task), "--task-option", f"clock={clock}"]
    timeouts = ["--session-timeout", "3", "--ticket-timeout", "2", "--snapshot-every", "1s"]
    with Lives(tmp_path, options, timeouts) as lives:
        lives.start()
        with worker(TASK, lives.address, *options, cwd=tmp_path) as one:
            wait_for(lambda: lives.status()["version"] > 10, "it trains", 30, lambda: one.errors)
            for jump in ("3600", "-3600", "0"):
                clock.write_text(jump)
                before = lives.status()
                wait_for(
                    lambda: lives.status()["durable_version"] > before["version"] + 10,  # noqa: B023
                    "it trains and makes snapshots",
                    30,
                    lives.status,
                )
        after = lives.status()
        assert not any(after["rejected"].values()), after["rejected"]
        assert lives.command.errors.count(" joined ") == 1

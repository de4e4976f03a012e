"""A network that loses, holds back and crawls, and a server that is away for long."""

from __future__ import annotations

import contextlib
import signal
import time

import pytest

from headwater.client.client import Client
from kit import counting
from kit.lives import TASK, Lives, Witness, steady_workers
from kit.processes import BY_GRPC, server, worker
from kit.proxy import Proxy
from kit.waiting import wait_for

SMALL = {"examples": 1024, "epochs": 2, "batch_size": 4}


def test_a_reply_that_is_lost_after_its_update_does_no_harm(tmp_path):
    """The worker is never told, and the batch does not count twice."""
    with Lives(tmp_path, counting.options(**SMALL)) as lives:
        lives.start()
        with (
            Proxy(lives.address) as network,
            Witness(lives.address, 4, acknowledged_is_durable=False) as witness,
            steady_workers(network.address, witness, 1, **SMALL) as (one,),
        ):
            for lost in range(1, 11):
                wait_for(lambda: one.streams == lost and one.acknowledged >= 5 * lost, "it trains")  # noqa: B023
                network.stalled_back = True
                version = lives.status()["version"]
                # What is on its way arrives; then nothing more can, for it has no answer.
                time.sleep(0.1)
                assert lives.status()["version"] - version <= 2
                network.cut_all()
                network.stalled_back = False
            lives.finished()
            one.wait_bye()
            assert one.acknowledged < 512, "replies were lost"
        with Client(lives.address) as client:
            counting.assert_exactly_once(client)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("cut_off", ["to the server", "from the server", "both"])
def test_a_partition_is_found_and_outlasted(cut_off, tmp_path):
    """35 s without FIN or RST, at the default timeouts; the others go on."""
    task = {"examples": 4096, "epochs": 16, "batch_size": 4}
    options = counting.options(**task, load_s=0.02, slow_while=tmp_path / "slow")
    (tmp_path / "slow").touch()
    with (
        server(TASK, *options, cwd=tmp_path) as (service, address),
        Client(address) as client,
        Proxy(address) as network,
        worker(TASK, network.address, *BY_GRPC, "--name", "ann", *options, cwd=tmp_path) as ann,
        worker(TASK, address, "--name", "bob", *options, cwd=tmp_path) as bob,
    ):

        def names():
            return {w["name"] for w in client.status()["workers"] if w["gradients"]}

        wait_for(lambda: names() == {"ann", "bob"}, "both train")
        began = time.monotonic()
        network.stalled = cut_off != "from the server"
        network.stalled_back = cut_off != "to the server"
        wait_for(lambda: names() == {"bob"}, "ann is missed", 25)
        print(f"missed after {time.monotonic() - began:.1f} s")
        version = client.status()["version"]
        time.sleep(max(0.0, began + 35 - time.monotonic()))
        assert client.status()["version"] > version + 100, "bob goes on"
        network.stalled = network.stalled_back = False
        wait_for(lambda: names() == {"ann", "bob"}, "ann is back", 30, lambda: ann.errors)
        (tmp_path / "slow").unlink()
        assert (ann.wait(), bob.wait()) == (0, 0)
        counting.assert_exactly_once(client)
        assert "Traceback" not in service.errors


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_is_slow_but_moves_is_not_taken_for_dead(tmp_path):
    """1 Mbit/s and 100 ms: a gradient of 3 MB takes longer than a session may be silent."""
    options = counting.options(examples=64, batch_size=32, epochs=1, padding=750_000)
    with (
        server(TASK, *options, cwd=tmp_path) as (service, address),
        Client(address) as client,
        Proxy(address) as network,
    ):
        network.bytes_per_s, network.delay_s = 125_000.0, 0.1
        with worker(TASK, network.address, *BY_GRPC, *options, cwd=tmp_path) as one:
            assert one.wait(180) == 0, one.errors
        counting.assert_exactly_once(client)
        assert service.errors.count(" joined ") == 1
        assert "taken back" not in service.errors


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_server_that_stands_still_for_half_a_minute_loses_nothing(tmp_path):
    """Longer than the keepalive: connections are given up, and made anew."""
    task = {"examples": 4096, "epochs": 4, "batch_size": 4}
    options = counting.options(**task, load_s=0.02, slow_while=tmp_path / "slow")
    (tmp_path / "slow").touch()
    with (
        Lives(tmp_path, options) as lives,
        contextlib.ExitStack() as stack,
    ):
        lives.start()
        crew = [
            stack.enter_context(worker(TASK, lives.address, *options, cwd=tmp_path))
            for _ in range(2)
        ]
        wait_for(lambda: lives.status()["version"] > 20, "it trains")
        lives.command.send(signal.SIGSTOP)
        time.sleep(30)
        lives.command.send(signal.SIGCONT)
        version = wait_for(lives.status, "it answers")["version"]
        wait_for(lambda: lives.status()["version"] > version + 20, "it trains again", 15)
        (tmp_path / "slow").unlink()
        lives.finished()
        assert [command.wait() for command in crew] == [0, 0]
        with Client(lives.address) as client:
            counting.assert_exactly_once(client)

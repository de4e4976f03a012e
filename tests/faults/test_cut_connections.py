"""A network that breaks connections in the middle of gradients and of weights."""

from __future__ import annotations

import random
import secrets
from pathlib import Path

from headwater.client.client import Client
from kit import counting
from kit.processes import BY_GRPC, server, worker
from kit.proxy import Cut, Proxy
from kit.waiting import wait_for

TASK = Path(counting.__file__)

GRADIENT_BYTES = 4 * (4096 + 500_000)
CUTS_EACH_WAY = 4


def test_a_run_outlasts_a_network_that_cuts_in_the_middle_of_parts(tmp_path):
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown on failure
    rng = random.Random(seed)  # noqa: S311  (moments, not secrets)

    def some_cut() -> Cut:
        return Cut(
            to_server=rng.random() < 0.5,
            # Some in the greetings, most within the first few gradients or weights.
            after_bytes=rng.choice((rng.randrange(1, 10_000), rng.randrange(5 * GRADIENT_BYTES))),
            reset=rng.random() < 0.5,
        )

    options = counting.options(batch_size=32, padding=500_000, epochs=2)
    with (
        # No room for a third gradient: a ticket that outlived its connection would
        # soon leave nobody any.
        server(
            TASK, *options, "--max-staged-bytes", f"{2 * GRADIENT_BYTES + 4096}", cwd=tmp_path
        ) as (service, address),
        Client(address) as client,
        Proxy(address, some_cut) as network,
        worker(TASK, network.address, *BY_GRPC, "--name", "ann", *options, cwd=tmp_path) as ann,
        worker(TASK, network.address, *BY_GRPC, "--name", "bob", *options, cwd=tmp_path) as bob,
    ):

        def cut_often() -> bool:
            cut = network.stats
            return min(cut.cuts_to_server, cut.cuts_to_client) >= CUTS_EACH_WAY

        wait_for(cut_often, "cuts both ways", 60, lambda: (network.stats, client.status()))
        with network.closed():
            status = wait_for(lambda: _deserted(client), "nobody is left", state=client.status)
            assert status["batches_leased"] == 0
            assert status["batches_pending"] + status["version"] == status["batches_total"]
            assert status["state"] != "finished", "the cuts must hit while the run goes on"
        pids = {ann.process.pid, bob.process.pid}
        wait_for(
            lambda: {w["pid"] for w in client.status()["workers"]} == pids,
            "the same two processes are back",
            state=client.status,
        )
        network.plan = lambda: None
        network.cut_all(reset=False)

        assert (ann.wait(), bob.wait()) == (0, 0), ann.errors + bob.errors
        status = counting.assert_exactly_once(client)
        assert not any(status["rejected"].values()), status["rejected"]
        print(network.stats)
        for command, name in ((ann, "ann"), (bob, "bob")):
            joined = service.errors.count(f" {name} joined ")
            assert joined >= 3, f"{name} joined {joined} times"
            assert "headwater worker: error:" not in command.errors


def _deserted(client):
    """The status once there are no workers and what they sent whole is applied."""
    status = client.status()
    return not status["workers"] and not status["batches_admitted"] and status

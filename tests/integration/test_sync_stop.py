"""A server in sync mode that is stopped keeps the group that its last gradient completes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from headwater.protos import parameter_server_pb2 as pb
from kit.line import ONES, LineRun, line


@pytest.mark.parametrize("durability", ["snapshot", "log"])
def test_the_last_group_is_applied_before_the_final_snapshot(
    tmp_path: Path, durability: str
) -> None:
    options = {"durability": durability, "consistency": "sync:1"}
    with contextlib.ExitStack() as stack:
        run = LineRun(stack, line("sgd(1.0)"), tmp_path / "run", **options)
        worker = run.worker(compute={"threads": "1"})
        ticket = worker.ticket()
        run.client.stop()  # waits for the ticket that is out
        worker.push(ticket, ONES.tobytes())
        assert worker.outcome().code == pb.OUTCOME_HELD
        assert worker.bye().reason == pb.BYE_STOPPED
        ended = run.server.wait(30)
    assert (ended.version, ended.durable_version) == (1, 1)
    with contextlib.ExitStack() as stack:
        run = LineRun(stack, line("sgd(1.0)"), tmp_path / "run", **options)
        assert run.client.status()["version"] == 1

"""--staleness: what a stale gradient does to the weights, by formulas worked out by hand."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from headwater.protos import parameter_server_pb2 as pb
from kit.line import ONES, LineRun, line


@pytest.mark.parametrize(
    ("policy", "weight"),
    [
        ("none", -1.0 - 2.0),
        ("scale", -1.0 - 2.0 / 2),
        ("compensate:0.25", -1.0 - (2.0 + 0.25 * 2.0 * 2.0 * (-1.0 - 0.0))),
    ],
)
def test_a_gradient_that_is_one_version_old(tmp_path: Path, policy: str, weight: float) -> None:
    """Both at version 0: ones by the fast worker, then twos by the slow one; plain SGD."""
    with contextlib.ExitStack() as stack:
        run = LineRun(stack, line("sgd(1.0)"), tmp_path / "run", staleness=policy)
        fast, slow = run.worker(), run.worker()
        first, second = fast.ticket(), slow.ticket()
        assert first.base == second.base == 0
        fast.push(first, ONES.tobytes())
        assert fast.outcome().version == 1
        slow.push(second, (2 * ONES).tobytes())
        outcome = slow.outcome()
        assert (outcome.version, outcome.staleness) == (2, 1)
        assert run.client.pull()["w"].tolist() == [weight] * 4
        assert run.client.status()["staleness_policy"] == policy


def test_what_is_older_than_drop_allows_is_refused_and_its_batch_is_pending_again(
    tmp_path: Path,
) -> None:
    with contextlib.ExitStack() as stack:
        run = LineRun(stack, line("sgd(1.0)", batches=3), tmp_path / "run", staleness="drop:0")
        fast, slow = run.worker(), run.worker()
        first, second = fast.ticket(), slow.ticket()
        fast.push(first, ONES.tobytes())
        assert fast.outcome().code == pb.OUTCOME_APPLIED
        slow.push(second, ONES.tobytes())
        outcome = slow.outcome()
        assert outcome.code == pb.OUTCOME_STALE
        assert "--staleness drop:0" in outcome.message
        again = slow.ticket()
        assert again.base == 1
        slow.push(again, ONES.tobytes())
        assert slow.outcome().code == pb.OUTCOME_APPLIED
        status = run.client.status()
        assert (status["version"], status["rejected"]["stale"]) == (2, 1)

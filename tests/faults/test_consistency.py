"""The bound holds, and every batch counts once, with workers that are slow or killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwater.client.client import Client
from kit import counting
from kit.processes import server, worker
from kit.waiting import wait_for

TASK = Path(counting.__file__)
EPOCHS = 2


@pytest.mark.parametrize(
    "bound", [1, *(pytest.param(bound, marks=pytest.mark.slow) for bound in (0, 4, 16))]
)
def test_no_gradient_is_older_than_the_bound_and_each_counts_once(
    tmp_path: Path, bound: int
) -> None:
    """With three workers, one of them ten times as slow for a while, and one that is killed."""
    slow = tmp_path / "slow"
    slow.touch()
    words = counting.options(
        examples=1024, epochs=EPOCHS, compute_s=0.02, slow_while=slow, begun=tmp_path / "begun"
    )
    run = [*words, "--consistency", f"bounded:{bound}"]
    with (
        server(TASK, *run, cwd=tmp_path) as (_, address),
        worker(TASK, address, *words, cwd=tmp_path),
        worker(TASK, address, *words, cwd=tmp_path, SLOWNESS="10"),
        worker(TASK, address, *words, cwd=tmp_path) as victim,
        Client(address) as client,
    ):
        wait_for(lambda: client.status()["version"] >= 3, "the first updates")
        victim.kill()
        slow.unlink()
        wait_for(lambda: client.status()["state"] == "finished", "the end", 90)
        status = counting.assert_exactly_once(client)

    assert status["consistency"] == f"bounded:{bound}"
    assert status["staleness"]["max"] <= bound
    histogram = status["staleness"]["histogram"]
    assert sum(histogram.values()) == status["version"]
    assert status["rejected"]["stale"] == 0, "nobody's work was for nothing"

"""Versions are kept for an evaluator until it has reported, and no more than a few."""

from __future__ import annotations

from headwater.protos import parameter_server_pb2 as pb
from headwater.server.evaluations import KEPT_EPOCHS, Evaluations
from headwater.server.ranges import Ranges
from headwater.server.store import Published


def published(version: int) -> Published:
    return Published(1, version, (), {"momentum": "large"}, Ranges(), Ranges())


def kept(evaluations: Evaluations, epoch: int = 0) -> tuple[int, int] | None:
    found = evaluations.oldest(epoch)
    return found and (found[0], found[1].version)


def test_the_oldest_that_was_not_reported_on_comes_first() -> None:
    evaluations = Evaluations()
    assert kept(evaluations) is None
    evaluations.keep(1, published(10))
    evaluations.keep(2, published(20))

    assert kept(evaluations) == (1, 10)
    assert kept(evaluations, epoch=2) == (2, 20)
    assert kept(evaluations, epoch=3) is None

    evaluations.add(pb.EvaluationReport(version=10), now=0.0)
    assert kept(evaluations) == (2, 20)
    evaluations.add(pb.EvaluationReport(version=25), now=0.0)
    assert kept(evaluations) is None


def test_for_one_that_is_too_slow_the_newest_few_are_kept_without_the_optimizers_state() -> None:
    evaluations = Evaluations()
    for epoch in range(1, 10):
        evaluations.keep(epoch, published(10 * epoch))

    assert kept(evaluations) == (10 - KEPT_EPOCHS, 10 * (10 - KEPT_EPOCHS))
    found = evaluations.oldest(9)
    assert found is not None
    assert found[1].optimizer_state is None

"""Epochs: who waits for the end of one, and the barrier between one and the next."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.reading import Read, Reader
from kit import counting, generated
from kit.lives import Lives
from kit.processes import Command, run

PER_EPOCH = 16
EPOCHS = 6
OPTIONS = counting.options(examples=64, batch_size=4, epochs=EPOCHS, load_s=0.005)


@contextlib.contextmanager
def training(folder: Path, *options: str) -> Iterator[str]:
    """A server's address, and two workers that train."""
    with Lives(folder, OPTIONS, options) as lives:
        lives.start()
        words = ("worker", "--task", counting.__file__, "--server", lives.address, *OPTIONS)
        with Command(*words, cwd=folder), Command(*words, cwd=folder):
            yield lives.address


def ends_of_epochs(address: str) -> Iterator[tuple[Read, list[int]]]:
    """What an evaluator is sent that reports at once, and how often examples are in it."""
    request = pb.PullRequest(evaluates=True, for_evaluation=True, wait_s=30.0, min_epoch=1)
    with contextlib.closing(Reader(address)) as reader:
        while True:
            read = reader.pull(request)
            weights = read.weights
            assert weights is not None
            names = [tensor.name for tensor in weights.layout.tensors]
            counts = weights.leaves[names.index("count")]
            yield read, sorted({round(float(count)) for count in counts})
            report = pb.EvaluationReport(
                incarnation=read.stamp.incarnation, version=weights.version, metrics={"seen": 1.0}
            )
            reader.stub.ReportEvaluation(report, timeout=10.0)
            if read.epoch >= read.epochs:
                return
            request.min_epoch = read.epoch + 1


@pytest.mark.parametrize("average", [(), ("--ema", "1e-6")], ids=["newest", "average"])
def test_with_a_barrier_an_evaluator_is_sent_what_each_epoch_ended_with(
    average: tuple[str, ...], tmp_path: Path
) -> None:
    with training(tmp_path, "--epoch-barrier", *average) as address:
        for read, counts in ends_of_epochs(address):
            assert read.weights is not None
            assert read.weights.version == PER_EPOCH * read.epoch
            assert counts == [read.epoch]  # every example that often: none of the next epoch
    assert read.epoch == EPOCHS


def test_without_one_it_is_sent_the_newest_when_an_epoch_is_complete(tmp_path: Path) -> None:
    with training(tmp_path) as address:
        for read, counts in ends_of_epochs(address):
            assert read.weights is not None
            assert read.weights.version >= PER_EPOCH * read.epoch
            assert counts[0] >= read.epoch
    assert read.epoch == EPOCHS


@pytest.mark.parametrize(("dial", "per_epoch"), [("sync:4", 10), ("async", 40)])
def test_evaluate_follows_epochs_whatever_an_update_consists_of(
    dial: str, per_epoch: int, tmp_path: Path
) -> None:
    with Lives(tmp_path, (), ["--consistency", dial, "--epoch-barrier"]) as lives:
        lives.task = generated.__file__
        lives.start()
        words = ("--task", generated.__file__, "--server", lives.address)
        with (
            Command("evaluate", *words, "--follow", "--json", cwd=tmp_path) as evaluate,
            Command("worker", *words, cwd=tmp_path),
            Command("worker", *words, cwd=tmp_path),
        ):
            assert evaluate.wait(60) == 0, evaluate.errors
            found = [json.loads(line) for line in evaluate.output.splitlines()]
    assert {line["version"] for line in found} <= {0, per_epoch, 2 * per_epoch}
    assert found[-1]["version"] == 2 * per_epoch
    assert all(line["metrics"]["count"] == 40 * line["epoch"] for line in found if dial == "async")
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    kept = [(line["version"], line["epoch"]) for line in lines if line["kind"] == "evaluation"]
    assert kept == [(line["version"], line["epoch"]) for line in found]


def test_an_evaluator_that_comes_after_the_end_is_sent_what_was_kept_and_then_the_last(
    tmp_path: Path,
) -> None:
    with Lives(tmp_path, (), ["--epoch-barrier"]) as lives:
        lives.task = generated.__file__
        lives.start()
        words = ("--task", generated.__file__, "--server", lives.address)
        with Command("worker", *words, cwd=tmp_path):
            lives.finished()
        found = run("evaluate", *words, "--follow", "--json", cwd=tmp_path)
    assert found.status == 0, found.errors
    assert [json.loads(line)["version"] for line in found.output.splitlines()] == [40, 80]

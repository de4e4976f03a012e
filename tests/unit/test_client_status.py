"""A status reply as plain Python values: what `headwater status --json` prints."""

from __future__ import annotations

import json
from typing import Any

import pytest

from headwater.client.status import as_dict
from headwater.protos import parameter_server_pb2 as pb

PROMISED = {
    *("run_id", "incarnation", "state", "version", "durable_version", "epoch", "epochs"),
    *("batches_applied", "batches_total", "loss", "metrics", "updates_per_second"),
    *("examples_per_second", "staleness", "rejected", "parameters", "bytes_in", "bytes_out"),
    "workers",
}
"""The least that design.md says of `status --json`."""


def full() -> pb.StatusReply:
    return pb.StatusReply(
        stamp=pb.Stamp(incarnation=2, version=2**60 + 1, durable_version=41),
        run_id="20270101-120000-abcd",
        task="mnist",
        state=pb.RUN_TRAINING,
        epoch=1,
        epochs=10,
        batches_applied=42,
        batches_total=1250,
        loss=0.25,
        metrics={"loss": 0.5, "accuracy": 0.75},
        metrics_version=40,
        staleness=pb.Staleness(mean=0.5, p50=1, p99=2, max=3),
        rejected=pb.Rejected(stale=1, nonfinite=2),
        workers=[
            pb.WorkerStatus(id=1, name="a", platform="cpu", devices=1, state="computing"),
            pb.WorkerStatus(id=2, name="b", platform="gpu", devices=8, state="waiting"),
        ],
        problems=["worker b is slow"],
        training_metrics={"z": 1.0, "a": 2.0},
    )


def test_every_field_is_there_by_its_name_and_the_stamps_stand_beside_the_others() -> None:
    status = as_dict(full())

    fields = {field.name for field in pb.StatusReply.DESCRIPTOR.fields} - {"stamp"}
    assert status.keys() == fields | {"incarnation", "version", "durable_version"}
    assert status.keys() >= PROMISED
    assert status["staleness"] == {"mean": 0.5, "p50": 1, "p99": 2, "max": 3, "histogram": {}}
    assert status["rejected"] == {
        "stale": 1, "lease_lost": 0, "duplicate": 0, "nonfinite": 2, "malformed": 0
    }  # fmt: skip
    assert status["problems"] == ["worker b is slow"]


def test_each_worker_is_a_dict_in_the_order_they_came() -> None:
    workers = as_dict(full())["workers"]

    assert [worker["name"] for worker in workers] == ["a", "b"]
    assert workers[1] == {
        "id": 2, "name": "b", "host": "", "platform": "gpu", "devices": 8, "state": "waiting",
        "gradients": 0, "examples_per_second": 0.0, "staleness_mean": 0.0, "pid": 0,
        "compute_s": 0.0, "connected_s": 0.0, "leased": 0, "transport": "",
        "staleness": {"mean": 0.0, "p50": 0, "p99": 0, "max": 0, "histogram": {}},
        "times": {"wait_s": 0.0, "load_s": 0.0, "compute_s": 0.0, "wire_s": 0.0},
    }  # fmt: skip


def test_counts_are_whole_numbers_however_large_and_not_texts() -> None:
    status = as_dict(full())

    assert status["version"] == 2**60 + 1
    for name in ("incarnation", "version", "epoch", "batches_applied", "bytes_in", "batch_size"):
        assert type(status[name]) is int
    for name in ("loss", "updates_per_second", "uptime_s"):
        assert type(status[name]) is float


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (pb.RUN_WAITING, "waiting"),
        (pb.RUN_TRAINING, "training"),
        (pb.RUN_PAUSED, "paused"),
        (pb.RUN_FINISHED, "finished"),
        (pb.RUN_FAILED, "failed"),
        (pb.RUN_STOPPING, "stopping"),
        (pb.RUN_UNSPECIFIED, "unspecified"),
    ],
)
def test_the_state_is_a_lower_case_word(state: Any, word: str) -> None:
    assert as_dict(pb.StatusReply(state=state))["state"] == word


@pytest.mark.parametrize("name", ["loss", "batches_total", "metrics_version"])
def test_what_is_not_known_is_none_and_zero_is_zero(name: str) -> None:
    assert as_dict(pb.StatusReply())[name] is None
    assert as_dict(pb.StatusReply(**{name: 0}))[name] == 0


def test_an_empty_reply_has_every_field_all_the_same() -> None:
    status = as_dict(pb.StatusReply())

    assert status.keys() == as_dict(full()).keys()
    assert (status["version"], status["run_id"], status["workers"]) == (0, "", [])
    assert status["staleness"] == {"mean": 0.0, "p50": 0, "p99": 0, "max": 0, "histogram": {}}


def test_metrics_are_a_dict_sorted_by_name() -> None:
    status = as_dict(full())

    assert list(status["training_metrics"].items()) == [("a", 2.0), ("z", 1.0)]
    assert status["metrics"] == {"accuracy": 0.75, "loss": 0.5}
    assert as_dict(pb.StatusReply())["metrics"] == {}


def test_the_dict_is_json_and_independent_of_the_reply() -> None:
    reply = full()
    status = as_dict(reply)
    before = json.dumps(status)

    reply.metrics["loss"] = 9.0
    reply.workers[0].name = "other"

    assert json.dumps(status) == before
    assert json.loads(before) == status


def test_a_state_that_this_version_does_not_know_is_still_shown() -> None:
    reply = pb.StatusReply()
    reply.ParseFromString(b"\x20\x63")  # field 4, state, is 99

    assert "99" in as_dict(reply)["state"]

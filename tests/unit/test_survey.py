"""What a history says as a whole; what makes it one that cannot be replayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headwater.protos.errors import HeadwaterError, UsageError
from headwater.server.settings import Settings
from headwater.server.survey import Worker, survey

BEGIN: dict[str, Any] = {
    "v": 0, "incarnation": 1, "run_id": "r", "epochs": 1, "updates": 9, "optimizer": "sgd(1.0)",
    "ema": None, "optimizer_spec": None, "inner_optimizer_spec": None, "compression": "none",
    "pull_dtype": None, "weights": 1, "set": Settings().to_json(), "compute": {},
}  # fmt: skip


def history(folder: Path, *lines: Any) -> Path:
    path = folder / "history.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def update(version: int, *gradients: tuple[int, int, str]) -> dict[str, Any]:
    return {"v": version, "u": [[*gradient, 7] for gradient in gradients]}


def test_it_tells_when_each_version_was_last_used_and_who_computed(tmp_path: Path) -> None:
    path = history(
        tmp_path,
        BEGIN,
        {"v": 0, "worker": "1.1", "name": "quick", "compute": {"threads": "1"}},
        {"v": 0, "worker": "1.2", "name": "idle", "compute": {}},
        update(1, (0, 0, "1.1")),
        update(2, (1, 0, "1.3")),
        update(3, (2, 1, "1.1"), (3, 1, "1.1")),
        {"v": 3, "out": 5},
    )

    found = survey(path)

    assert (found.run_id, found.version) == ("r", 3)
    assert list(found.last_used) == [2, 3, 0, 0]
    assert found.workers == {
        "1.1": Worker("quick", {"threads": "1"}, 3),
        "1.3": Worker("worker 1.3", {}, 1),
    }
    assert list(survey(path, to=1).last_used) == [1, 0]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "is empty: the run has not begun, or its history was lost"),
        ([update(1, (0, 0, "1.1"))], "line 1: it begins with something else than a server"),
        ([BEGIN, update(2, (0, 0, "1.1"))], "line 2: it is of version 2, and 1 should follow"),
        ([BEGIN, update(1, (0, 1, "1.1"))], "line 2: its gradient is of round 0 at version 1"),
        ([BEGIN, update(1)], "line 2: an update has no gradient; .* replay --to 0, the version"),
        ([BEGIN, {"v": 1, "u": [["x"]]}], "line 2: "),
        ([BEGIN, 3], "line 2: "),
        ([BEGIN, {"v": 0, "set": {}}], "line 2: 'consistency'"),
        ([{"v": 0, "incarnation": 1}], "line 1: 'run_id'"),
        (
            [BEGIN, {"v": 1, "u": [[None, 0, "session 7", 7, [7, 0, 1]]]}],
            "version 1 was made by a push of session 7, whose gradient is no batch's",
        ),
        (
            [BEGIN, update(1, (0, 0, "1.1")), {"v": 9, "gap": 1}],
            "what came between version 1 and 9 was not written, because .*; replay --to 1$",
        ),
    ],
)
def test_a_history_that_cannot_be_followed_is_refused(
    lines: list[Any], why: str, tmp_path: Path
) -> None:
    path = history(tmp_path, *lines)

    with pytest.raises(HeadwaterError, match=why) as refused:
        survey(path)
    assert refused.value.exit_status == 1


def test_a_gap_after_the_version_that_is_asked_for_is_none(tmp_path: Path) -> None:
    path = history(tmp_path, BEGIN, update(1, (0, 0, "1.1")), {"v": 9, "gap": 1})

    assert survey(path, to=1).version == 1


def test_what_is_asked_for_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"history\.jsonl cannot be read: No such file"):
        survey(tmp_path / "history.jsonl")
    with pytest.raises(UsageError, match="--to 1: the history leads to version 0"):
        survey(history(tmp_path, BEGIN), to=1)

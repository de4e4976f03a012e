"""What `fit` reads from the run directory is the end of the run, or it says what is wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headwater.client.fitted import Fitted, read_fitted
from headwater.protos.errors import HeadwaterError
from headwater.protos.weights_file import save_weights

SNAPSHOT = f"snapshot-{50:020}.safetensors"


def save(path: Path, version: int, run_id: str = "this") -> None:
    notes = {"run_id": run_id, "incarnation": "2", "version": str(version)}
    save_weights(path, {"w": np.full(3, version, np.float32)}, notes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run that has ended at version 50, and was continued at 10."""
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "this"}))
    records = [
        {"kind": "progress", "version": 10, "epoch": 1},
        {"kind": "end", "version": 10, "state": "finished"},
        {"kind": "evaluation", "version": 50, "epoch": 5, "metrics": {"loss": None}},
        {"kind": "progress", "version": 50, "epoch": 5},
        {"kind": "end", "version": 50, "state": "finished"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    save(tmp_path / "weights.safetensors", 50)
    for version in (10, 50):
        (tmp_path / f"snapshot-{version:020}.safetensors").touch()
    return tmp_path


def read(folder: Path) -> Fitted:
    def restore(weights: Mapping[str, Any]) -> Any:
        return dict(weights)

    return read_fitted(folder, restore)


def test_a_run_that_has_ended_is_read_whole(folder: Path) -> None:
    found = read(folder)

    assert (found.weights.version, found.weights.epoch, found.state) == (50, 5, "finished")
    assert found.weights.incarnation == 2
    assert set(found.params["w"]) == {50}
    assert found.evaluation_params is found.params
    assert [(e.version, e.epoch) for e in found.history] == [(50, 5)]
    assert math.isnan(found.metrics["loss"])


@pytest.mark.parametrize("name", ["weights.safetensors", "evaluation.safetensors"])
@pytest.mark.parametrize(("version", "run_id"), [(10, "this"), (50, "other")])
def test_other_weights_than_the_final_ones_are_refused(
    name: str, version: int, run_id: str, folder: Path
) -> None:
    save(folder / name, version, run_id)

    with pytest.raises(HeadwaterError) as raised:
        read(folder)

    assert str(raised.value) == (
        f"{folder / name} has version {version} of run {run_id}, and the run this has ended at "
        f"version 50: the disk did not take the final weights; the newest are in "
        f"{folder / SNAPSHOT}: make room, and go on with run_dir={str(folder)!r}"
    )


def test_the_final_evaluation_weights_are_read(folder: Path) -> None:
    save(folder / "evaluation.safetensors", 50)

    assert set(read(folder).evaluation_params["w"]) == {50}


def test_a_torn_last_line_of_the_metrics_is_no_line(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "prog')

    assert read(folder).state == "finished"


def test_without_the_end_nobody_knows_which_weights_are_final(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])

    with pytest.raises(HeadwaterError, match=rf"metrics\.jsonl lacks the run's end.*{SNAPSHOT}"):
        read(folder)


@pytest.mark.parametrize(
    "line", ["\x00\x00", "3", '{"version": 3}', '{"kind": "progress"}', '{"kind": "evaluation"}']
)
def test_a_damaged_line_names_its_file(line: str, folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text()}")

    with pytest.raises(HeadwaterError, match=re.escape(f"{path} is damaged: ")):
        read(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights.safetensors", "is damaged: it does not begin with a header's length"),
        ("run.json", "is damaged: it names no run"),
    ],
)
def test_a_damaged_file_is_named(name: str, message: str, folder: Path) -> None:
    (folder / name).write_bytes(b"{")

    with pytest.raises(HeadwaterError, match=re.escape(f"{folder / name} {message}")):
        read(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "run.json", "metrics.jsonl"])
def test_a_file_that_is_not_there_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()

    with pytest.raises(HeadwaterError, match=re.escape(f"{folder / name}")):
        read(folder)

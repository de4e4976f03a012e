"""`headwater run`: what it says of a run that has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headwater.client.run import print_result
from headwater.protos import plain_json

END: dict[str, Any] = {
    "kind": "end",
    "state": "finished",
    "version": 1250,
    "metrics": {},
    "skipped": 0,
    "seconds": 2.5,
    "updates_per_second": 500.0,
}


def test_a_metric_that_is_no_number_is_printed_as_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """metrics.jsonl has null for it."""
    metrics = {"accuracy": 0.25, "loss": float("inf"), "perplexity": float("nan")}
    (tmp_path / "metrics.jsonl").write_text(plain_json.dumps(END | {"metrics": metrics}) + "\n")

    print_result({"run_dir": str(tmp_path), "evaluates": True})

    assert capsys.readouterr().out.splitlines() == [
        "finished at version 1,250 in 2.5 s (500 updates/s)",
        "evaluation  accuracy 0.25  loss nan  perplexity nan",
        f"weights     {tmp_path / 'weights.safetensors'}",
        f"metrics     {tmp_path / 'metrics.jsonl'}",
    ]


def test_where_the_end_was_not_written_the_log_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(END)[:-9])

    print_result({"run_dir": str(tmp_path), "evaluates": True})

    assert capsys.readouterr().err == (
        "finished; metrics.jsonl lacks its end: see logs/server.log\n"
    )

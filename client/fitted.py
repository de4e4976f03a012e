"""What `fit` returns: read from the run directory, where it is kept."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.client import show
from headwater.client.weights import Weights
from headwater.protos.errors import HeadwaterError

if TYPE_CHECKING:  # quick commands do without NumPy
    import numpy as np


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `Task.evaluate` found of one version."""

    version: int
    epoch: int
    """How many epochs were complete."""
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Fitted:
    """A training that has ended."""

    params: Any
    """The final weights in the task's own tree."""

    evaluation_params: Any
    """The weights to evaluate in the same tree: an average (ema=…), or a schedule-free
    optimizer's; else `params`."""

    weights: Weights
    """The trained ones by name, as `Client.pull` gives them, with `.version`."""

    history: tuple[Evaluation, ...]
    """The evaluations in order, those of before a run was continued included."""

    run_dir: Path
    """Where the run is kept; `fit(task, run_dir=…)` goes on with it."""

    state: str
    """finished, or stopped where somebody used `headwater stop`."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of the last evaluation; {} if there was none."""
        return self.history[-1].metrics if self.history else {}

    def __repr__(self) -> str:
        found = f", {show.metrics(dict(self.metrics))}" if self.metrics else ""
        return f"<{self.state} at version {self.weights.version:,}{found}; {self.run_dir}>"


def read_fitted(run_dir: Path, restore: Callable[[Mapping[str, Any]], Any]) -> Fitted:
    """Of a run whose server has ended in order.

    Args:
      run_dir: The run's.
      restore: `Task.restore`.

    Raises:
      HeadwaterError: The disk did not take all of it, so that what is there may be of an
        earlier version; or a file is damaged.
    """
    path, log = run_dir / "weights.safetensors", run_dir / "metrics.jsonl"
    records, history, epoch = _records(log), [], 0
    if not records or records[-1]["kind"] != "end":
        raise HeadwaterError(
            f"{log} lacks the run's end, so that nobody can tell whether {path} is of the last "
            f"version: the disk did not take it; {_way_on(run_dir)}"
        )
    end = records[-1]
    try:
        for record in records:
            if record["kind"] == "evaluation":
                found = _floats(record["metrics"])
                history.append(Evaluation(record["version"], record["epoch"], found))
            elif record["kind"] == "progress":
                epoch = record["epoch"]
        version, state = int(end["version"]), end["state"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HeadwaterError(f"{log} is damaged: a line lacks {error}") from None
    notes, arrays = _read_weights(path, version)
    others = run_dir / "evaluation.safetensors"
    evaluated = _read_weights(others, version)[1] if others.exists() else None
    weights = Weights(
        arrays,
        run_id=notes["run_id"],
        incarnation=int(notes["incarnation"]),
        version=version,
        epoch=epoch,
    )
    params = restore(weights)
    return Fitted(
        params=params,
        evaluation_params=params if evaluated is None else restore(evaluated),
        weights=weights,
        history=tuple(history),
        run_dir=run_dir,
        state=state,
    )


def _records(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what a full disk or a crash left of a last one.

    Raises:
      HeadwaterError: It cannot be read, or another line is not one of Headwater's.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise HeadwaterError(f"{path} cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["kind"]  # raises where it is no record
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise HeadwaterError(
                f"{path} is damaged: line {number} is not one that Headwater wrote"
            ) from None
        records.append(record)
    return records


def _read_weights(path: Path, version: int) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """What the file says of itself, and its arrays.

    Raises:
      HeadwaterError: It is not that version of its folder's run, or cannot be read.
    """
    from headwater.protos.tensor_file import FormatError, read_file, read_header

    run_dir = path.parent
    try:
        run_id = json.loads((run_dir / "run.json").read_text())["run_id"]
        with path.open("rb") as file:
            notes, _ = read_header(file)
        arrays = read_file(path)
    except OSError as error:
        raise HeadwaterError(
            f"the run has ended, and its weights could not be read from {error.filename or path}: "
            f"{error.strerror}; see {run_dir / 'logs'}; {_way_on(run_dir)}"
        ) from None
    except FormatError as error:
        raise HeadwaterError(f"{path} is damaged: {error}; {_way_on(run_dir)}") from None
    except (ValueError, KeyError, TypeError):
        raise HeadwaterError(f"{run_dir / 'run.json'} is damaged: it names no run") from None
    if (notes.get("run_id"), notes.get("version")) != (run_id, str(version)):
        raise HeadwaterError(
            f"{path} has version {notes.get('version')} of run {notes.get('run_id')}, and the run "
            f"{run_id} has ended at version {version}: the disk did not take the final weights; "
            f"{_way_on(run_dir)}"
        )
    return notes, arrays


def _way_on(run_dir: Path) -> str:
    """How to come to the weights, which a snapshot has."""
    newest = max(run_dir.glob("snapshot-*.safetensors"), default=None)
    if newest is None:
        return f"there is no snapshot in {run_dir}"
    return f"the newest are in {newest}: make room, and go on with run_dir={str(run_dir)!r}"


def _floats(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """JSON has no NaN."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}

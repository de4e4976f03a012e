"""What `fit` returns: read from the run directory, where it is kept."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from headwater.client import show
from headwater.client.weights import Weights
from headwater.protos.errors import HeadwaterError


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
      HeadwaterError: The disk did not take all of it.
    """
    from headwater.protos.tensor_file import read_file, read_header

    path, history, epoch, state = run_dir / "weights.safetensors", [], 0, ""
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "evaluation":
            history.append(
                Evaluation(record["version"], record["epoch"], _floats(record["metrics"]))
            )
        elif record["kind"] == "progress":
            epoch = record["epoch"]
        elif record["kind"] == "end":
            state = record["state"]
    others = run_dir / "evaluation.safetensors"
    try:
        with path.open("rb") as file:
            notes, _ = read_header(file)
        arrays = read_file(path)
        evaluated = read_file(others) if others.exists() else None
    except OSError as error:
        raise HeadwaterError(
            f"the run has ended, and its weights could not be read from {error.filename or path}: "
            f"{error.strerror}; see {run_dir / 'logs'}"
        ) from None
    weights = Weights(
        arrays,
        run_id=notes["run_id"],
        incarnation=int(notes["incarnation"]),
        version=int(notes["version"]),
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


def _floats(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """JSON has no NaN."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}

"""When evaluations are good enough, or have ceased to get better: rules that end a run.

Pure: evaluations in, the reason to stop out.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping

from headwater.protos.errors import UsageError

_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}

_LOWER_IS_BETTER = ("loss", "error", "perplexity")
"""In a metric's name, unless `max:` says otherwise."""


class StopWhen:
    """`accuracy>=0.97`: an evaluation that is good enough.

    Raises:
      UsageError: The text is not of this form.
    """

    def __init__(self, text: str) -> None:
        match = re.fullmatch(r"\s*([^<>=]+?)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
        limit = _number(match[3]) if match else None
        if match is None or limit is None:
            raise UsageError(
                f"--stop-when {text}: it is a metric, one of >= <= > <, and a number, such as "
                "'accuracy>=0.97' (in quotes, for > is the shell's)"
            )
        self.metric, self._sign, self._limit = match[1], match[2], limit

    def reason(self, metrics: Mapping[str, float]) -> str | None:
        """Why this evaluation ends the run; None if it does not."""
        value = metrics[self.metric]
        if not _COMPARISONS[self._sign](value, self._limit):
            return None
        return f"{self.metric} {value:.6g} {self._sign} {self._limit:g}"


class Patience:
    """`accuracy:3`: so many evaluations in a row of which none was better than the best before.

    Lower is better for a metric with "loss", "error" or "perplexity" in its name, higher
    for any other; `min:` or `max:` before it decides.

    Raises:
      UsageError: The text is not of this form.
    """

    def __init__(self, text: str) -> None:
        match = re.fullmatch(r"(?:(min|max):)?(.+):(\d+)", text)
        if match is None or int(match[3]) < 1:
            raise UsageError(
                f"--patience {text}: it is a metric and a number of evaluations from 1 on, such as "
                "accuracy:3, or min:latency:3 where lower is better"
            )
        self.metric, self._limit = match[2], int(match[3])
        lower = any(word in self.metric.lower() for word in _LOWER_IS_BETTER)
        self._sign = -1 if (match[1] or ("min" if lower else "max")) == "min" else 1
        self._best: float | None = None
        self._since = 0

    def reason(self, metrics: Mapping[str, float]) -> str | None:
        """Why this evaluation ends the run; None if it does not. Each is given once, in order."""
        value = metrics[self.metric]
        is_better = self._best is None or self._sign * value > self._sign * self._best
        if is_better and not math.isnan(value):
            self._best, self._since = value, 0
            return None
        self._since += 1
        if self._since < self._limit:
            return None
        best = "nothing" if self._best is None else f"{self._best:.6g}"
        return f"{self.metric} has not been better than {best} for {self._since} evaluations"


class EarlyStop:
    """Both rules, for the evaluations of rising versions.

    Args:
      stop_when: As `StopWhen`; None for no such rule.
      patience: As `Patience`; None for no such rule.

    Raises:
      UsageError: One is not of its form.
    """

    def __init__(self, stop_when: str | None, patience: str | None) -> None:
        self._rules: list[StopWhen | Patience] = []
        if stop_when is not None:
            self._rules.append(StopWhen(stop_when))
        if patience is not None:
            self._rules.append(Patience(patience))
        self._version = -1

    def __bool__(self) -> bool:
        return bool(self._rules)

    def add(self, version: int, metrics: Mapping[str, float]) -> str | None:
        """Why this evaluation ends the run; None if it does not.

        One of an older version than the last, or without a rule's metric, says nothing.
        """
        if version <= self._version:
            return None
        self._version = version
        reasons = [r.reason(metrics) for r in self._rules if r.metric in metrics]
        return next((reason for reason in reasons if reason), None)

    def missing(self, metrics: Mapping[str, float]) -> list[str]:
        """Metrics that a rule asks for and an evaluation lacks."""
        return [rule.metric for rule in self._rules if rule.metric not in metrics]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return None if math.isnan(value) else value

"""Figures of a long benchmark, kept run by run, so that one that was interrupted goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Run = dict[str, Any]
"""What one run gave, by name; as JSON has it."""


class Kept:
    """Every run's figures, in a JSON file that is whole after each.

    Raises:
      SystemExit: The file is of other data or sizes, which it names.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        self._path = path
        self._content: dict[str, Any] = {"conditions": dict(conditions), "runs": {}}
        if path.exists():
            self._content = json.loads(path.read_text())
        if self._content["conditions"] != conditions:
            sys.exit(
                f"{path} was measured with {self._content['conditions']}, now asked for is "
                f"{conditions}: name another file with --json"
            )

    def runs(self, part: str, setting: str) -> dict[str, Run]:
        """By number of the repeat."""
        return self._content["runs"].setdefault(part, {}).setdefault(setting, {})

    def add(self, part: str, setting: str, turn: int, run: Run) -> None:
        self.runs(part, setting)[str(turn)] = run
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps(self._content, indent=1) + "\n")
        beside.replace(self._path)

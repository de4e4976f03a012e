"""`headwater check-snapshot`: is the file whole, and what does it hold?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headwater.client import show
from headwater.protos.snapshot_file import Facts, SnapshotError, element_count, read


def check(path: Path) -> dict[str, Any]:
    """What a snapshot holds, every byte of it checked; with `error`, why it cannot be used."""
    try:
        facts = read(path).facts
    except SnapshotError as error:
        return {"file": str(path), "error": str(error)}
    names = [n for n in facts.tensors if not n.startswith(facts.optimizer_prefix)]
    return {
        "file": str(path),
        "error": None,
        "run_id": facts.run_id,
        "task": facts.task,
        "incarnation": facts.incarnation,
        "version": facts.version,
        "batches_applied": facts.batch_count - sum(b - a for a, b in facts.left_out),
        "batches_left_out": sum(b - a for a, b in facts.left_out),
        "parameters": element_count(facts),
        "tensors": {name: describe(facts, name) for name in names},
        "optimizer": facts.optimizer,
        "optimizer_tensors": len(facts.tensors) - len(names),
        "bytes": path.stat().st_size,
        "software": dict(facts.software),
    }


def describe(facts: Facts, name: str) -> str:
    """A tensor's dtype and shape, such as `float32[784,64]`."""
    dtype, shape, _ = facts.tensors[name]
    return f"{dtype}[{','.join(map(str, shape))}]"


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    wide = max(map(len, found["tensors"]))
    run = f"run {found['run_id']} ({found['task']})"
    left_out = found["batches_left_out"]
    skipped = f", {left_out:,} left out" if left_out else ""
    return [
        f"{found['file']}: whole, {show.size(found['bytes'])}",
        f"  version {found['version']:,} of {run}, written by incarnation {found['incarnation']}",
        f"  {found['batches_applied']:,} batches applied{skipped}",
        f"  {found['parameters']:,} parameters:",
        *(f"    {name:{wide}}  {what}" for name, what in found["tensors"].items()),
        f"  optimizer {found['optimizer']}, {found['optimizer_tensors']} tensors of state",
        f"  {', '.join(f'{name} {version}' for name, version in found['software'].items())}",
    ]

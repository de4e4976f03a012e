"""Whether a version has the bits of the files that its run directory keeps. Reads only."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from headwater.protos import snapshot_file, tensor_file
from headwater.protos.crc import bytes_of
from headwater.protos.layout import Layout
from headwater.protos.snapshot_file import SnapshotError
from headwater.protos.tensor_file import FormatError
from headwater.server.snapshots import Snapshots, arrays_of
from headwater.server.store import Published

log = logging.getLogger("headwater.replay")


class Comparison(NamedTuple):
    """With one file."""

    file: str
    differs: str | None
    """The first tensor with other bits."""


def compare(
    run_dir: Path, run_id: str, layout: Layout, published: Published, lives: Collection[int]
) -> Comparison | None:
    """Compare a version with its snapshot, else with weights.safetensors; None where neither is.

    Args:
      run_dir: May be a running server's.
      run_id: A file of another run is passed over.
      layout: Of the weights.
      published: The version.
      lives: Incarnations that had it: of another one, the same number is another version.
    """
    return _with_snapshot(run_dir, run_id, layout, published, lives) or _with_weights(
        run_dir, run_id, layout, published, lives
    )


def _with_snapshot(
    run_dir: Path, run_id: str, layout: Layout, published: Published, lives: Collection[int]
) -> Comparison | None:
    snapshots = Snapshots(run_dir, keep=1)
    path = snapshots.path(published.version)
    if published.version not in snapshots.versions():
        return None
    try:
        facts, theirs = (found := snapshot_file.read(path)).facts, found.arrays
    except SnapshotError as error:  # perhaps it was just now replaced by a newer one
        log.warning("not compared: %s", error)
        return None
    if facts.run_id != run_id or facts.incarnation not in lives:
        return None
    ours, _ = arrays_of(layout, published)
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(name), theirs.get(name)
        if here is None or there is None or bytes_of(here) != bytes_of(there):
            return Comparison(path.name, name)
    return Comparison(path.name, None)


def _with_weights(
    run_dir: Path, run_id: str, layout: Layout, published: Published, lives: Collection[int]
) -> Comparison | None:
    path = run_dir / "weights.safetensors"
    try:
        with path.open("rb") as file:
            notes, _ = tensor_file.read_header(file)
            known = notes.get("run_id"), notes.get("version"), notes.get("incarnation")
            if known not in {(run_id, str(published.version), str(life)) for life in lives}:
                return None
            arrays, prefix = arrays_of(layout, published)
            for name, array in arrays.items():
                if not name.startswith(prefix) and file.read(array.nbytes) != bytes_of(array):
                    return Comparison(path.name, name)
    except FileNotFoundError:
        return None
    except (OSError, FormatError) as error:
        log.warning("not compared: %s: %s", path, error)
        return None
    return Comparison(path.name, None)

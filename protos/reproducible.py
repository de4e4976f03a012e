"""What has a process compute the same bits as others: in sync mode the run's all do.

XLA reads it when JAX starts, so it is in the environment before that.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

SYNC_THREADS = "1"
"""Threads of XLA on a CPU in sync mode: how many there are changes how larger sums are split."""

_DETERMINISTIC = "--xla_gpu_deterministic_ops"


def fix(environment: MutableMapping[str, str]) -> None:
    """Have JAX compute the same bits everywhere; before it is first used. Keeps what is set."""
    environment.setdefault("NPROC", SYNC_THREADS)
    flags = environment.get("XLA_FLAGS", "")
    if _DETERMINISTIC not in flags:
        environment["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC}=true".strip()


def is_fixed(environment: Mapping[str, str]) -> bool:
    """Whether `fix` was called, or the user asked for deterministic operations."""
    return f"{_DETERMINISTIC}=true" in environment.get("XLA_FLAGS", "")

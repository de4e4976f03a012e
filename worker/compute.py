"""What decides the bits of a gradient beside the task: its fingerprint.

Sync mode promises the same weights whatever computes them, and refuses a worker
whose fingerprint is another than the run's.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any


def fingerprint(devices: int = 1) -> Mapping[str, str]:
    """By name, as text: everything here equal means the same bits. Starts JAX.

    Args:
      devices: That a batch is split over, as far as its size lets.
    """
    import jax

    device = jax.local_devices()[0]
    settings: Any = jax.config
    found = {
        "framework": "jax",
        "jax": f"{jax.__version__}, jaxlib {metadata.version('jaxlib')}",
        "platform": jax.default_backend(),
        "device": device.device_kind,
        "devices": str(devices),
        "x64": str(settings.jax_enable_x64),
        "matmul precision": str(settings.jax_default_matmul_precision),
        "PRNG": str(settings.jax_default_prng_impl),
        "XLA_FLAGS": " ".join(sorted(os.environ.get("XLA_FLAGS", "").split())),
    }
    if jax.default_backend() == "cpu":
        found["device"] = _processor()
        threads = os.environ.get("NPROC") or str(_core_count())
        # XLA has a thread for each of a CPU's devices, however many are used.
        if threads.isdecimal() and int(threads) < jax.local_device_count():
            threads = str(jax.local_device_count())
        found["threads"] = threads
    return found


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """For people: `threads: 2 here, 1 there`; "" when nothing differs."""
    return "; ".join(
        f"{name}: {here.get(name, 'unknown')} here, {there.get(name, 'unknown')} there"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    )


def _processor() -> str:
    """The CPU's model: XLA uses what instructions it has."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _core_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

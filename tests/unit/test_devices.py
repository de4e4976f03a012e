"""A batch split over several devices gives one gradient, that of one device to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headwater.protos.errors import UsageError
from headwater.worker.platform import choose_devices
from kit import on_four_devices


@pytest.mark.parametrize(
    "how",
    [
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        pytest.param({"JAX_NUM_CPU_DEVICES": "4"}, marks=pytest.mark.slow),
        # The same random numbers, even where each device needs those of all others.
        pytest.param(
            {"JAX_NUM_CPU_DEVICES": "4", "JAX_THREEFRY_PARTITIONABLE": "0"}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_what_four_devices_compute(how: dict[str, str]) -> None:
    """In a process of its own: how many there are is settled when JAX starts."""
    path = Path(on_four_devices.__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(  # noqa: S603  (pytest)
        command, env={**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "1", **how},
        cwd=path.parents[2], capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_of_one_device_there_is_no_second() -> None:
    assert len(choose_devices("all")) == 1

    with pytest.raises(UsageError, match=r"there is one cpu device, 0; XLA_FLAGS=--xla_force"):
        choose_devices("2")

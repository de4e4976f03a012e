"""How the suite runs on the machine."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

from headwater.client.processes import core_count


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait for processes of theirs."""
    return core_count() + 1


COMPILED_ONCE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    # Who reads what another has not written to its end, or was killed over, compiles it anew.
    "PYTHONWARNINGS": "ignore:Error reading persistent compilation cache entry",
}


def pytest_configure(config: pytest.Config) -> None:
    """All processes of a session share what XLA compiles: few programs, hundreds of times."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # of an outer session, or the user's own
        return
    folder = tempfile.mkdtemp(prefix="headwater-compiled-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ.update(COMPILED_ONCE, JAX_COMPILATION_CACHE_DIR=folder)

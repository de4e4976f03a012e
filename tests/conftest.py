"""How the suite runs on the machine."""

from __future__ import annotations

import pytest

from headwater.client.processes import core_count


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait for processes of theirs."""
    return core_count() + 1

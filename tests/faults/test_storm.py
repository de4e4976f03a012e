"""A short storm; `make soak` lets a long one blow."""

from __future__ import annotations

import secrets

import pytest

from kit.storm import Storm


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_run_outlasts_a_storm(tmp_path):
    seed = secrets.randbits(32)
    print(f"seed {seed}: python -m kit.storm --seed {seed} --seconds 12 --durability log")
    storm = Storm(tmp_path, seed, 12, "log")
    storm.run()
    assert storm.faults.total() >= 3

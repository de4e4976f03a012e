"""--ema through a run: evaluated, pulled, kept, continued."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headwater import fit
from headwater.client.client import Client
from headwater.protos.tensor_file import read_file
from kit import counting
from kit.processes import FREE_PORT, run, server, worker

TASK = Path(counting.__file__)
OPTIONS = counting.options(examples=256, batch_size=32, epochs=2)
DECAY, UPDATES = 0.5, 16


def averages():
    """Of what the counting task's mean weight is at each version."""
    shares = DECAY ** np.arange(UPDATES - 1, -1, -1)
    return shares / shares.sum() @ (np.arange(1, UPDATES + 1) / 8)


def test_the_average_is_pulled_and_kept_beside_the_weights(tmp_path):
    place = ["--run-dir", tmp_path / "run"]
    with (
        server(TASK, *OPTIONS, "--ema", str(DECAY), *place, cwd=tmp_path) as (_, address),
        Client(address) as client,
        worker(TASK, address, *OPTIONS, cwd=tmp_path) as ann,
    ):
        assert ann.wait() == 0, ann.errors
        weights, average = client.pull(), client.pull(for_evaluation=True)
        pulled = run(
            "pull", "average.safetensors", "--evaluation", "--server", address, cwd=tmp_path
        )
        assert pulled.status == 0, pulled.errors

    assert weights.version == average.version == UPDATES
    np.testing.assert_array_equal(weights["count"], 2)
    assert average["count"].mean() == pytest.approx(averages(), rel=1e-5)
    for path in ("average.safetensors", "run/evaluation.safetensors"):
        np.testing.assert_array_equal(read_file(tmp_path / path)["count"], average["count"])
    np.testing.assert_array_equal(read_file(tmp_path / "run/weights.safetensors")["count"], 2)

    replayed = run("replay", tmp_path / "run", "--task", TASK, *OPTIONS, cwd=tmp_path)
    assert replayed.status == 0, replayed.errors

    # It belongs to the run: whoever continues it need not ask for it.
    with (
        server(TASK, *OPTIONS, *place, cwd=tmp_path) as (_, address),
        Client(address) as client,
    ):
        again = client.pull(for_evaluation=True)
        np.testing.assert_array_equal(again["count"], average["count"])


def test_fit_gives_both(tmp_path):
    result = fit(
        counting.task(examples=256, batch_size=32, epochs=2), workers=0, quiet=True, ema=DECAY,
        run_dir=tmp_path / "run", listen="127.0.0.1:0",
    )  # fmt: skip
    assert result.evaluation_params["count"].mean() == pytest.approx(averages(), rel=1e-5)
    np.testing.assert_array_equal(result.params["count"], 2)


def test_a_decay_that_is_none_is_refused(tmp_path):
    ended = run("server", "--task", TASK, *FREE_PORT, "--ema", "1", cwd=tmp_path)
    assert ended.status == 2
    assert "--ema 1.0: it is the decay of an average" in ended.errors

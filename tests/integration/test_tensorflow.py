"""The example with TensorFlow, in an environment of its own, learns to read digits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from headwater.client.client import Client
from kit.processes import FREE_PORT, Command
from kit.waiting import wait_for

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / "build/examples/tensorflow/bin/python"
EXAMPLE = "headwater.examples.tensorflow_worker"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tensorflow_trains_through_a_server_that_has_no_task(tmp_path: Path) -> None:
    python = os.environ.get("TENSORFLOW_PYTHON")
    if python is None:  # it installs TensorFlow, once
        make = ["make", f"PYTHON={sys.executable}", "build/examples/tensorflow/.installed"]
        subprocess.run(make, cwd=ROOT, check=True, timeout=1500)  # noqa: S603  (our Makefile)
        python = str(PYTHON)

    def example(*words: str) -> str:
        done = subprocess.run(  # noqa: S603  (our own)
            [python, "-m", EXAMPLE, *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    example("init", "digits.safetensors")
    words = ("--init", "digits.safetensors", "--optimizer", "adam(1e-3)")
    with Command("server", *words, *FREE_PORT, cwd=tmp_path) as server:
        address = wait_for(
            lambda: server.errors.partition("listening on ")[2].partition(";")[0],
            "the server listens",
            state=lambda: server.errors,
        )
        said = example("train", address, "--epochs", "10")
        with Client(address) as client:
            status = client.status()
    accuracy = re.search(r"([\d.]+)% of the test digits are recognised", said)
    assert accuracy is not None
    assert float(accuracy[1]) > 91
    assert status["version"] == status["session_updates"] == status["durable_version"] == 800
    assert status["metrics"]["accuracy"] >= 0.90, said

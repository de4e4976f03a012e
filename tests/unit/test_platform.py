"""--platform decides where JAX computes, whatever imported JAX before."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import os
{before}
from headwater.worker.platform import use_platform

use_platform("cpu")
import jax

print(jax.config.jax_platforms, jax.default_backend(), os.environ["JAX_PLATFORMS"])
"""


@pytest.mark.parametrize("before", ["", "import jax"], ids=["first", "imported-before"])
def test_cpu_is_chosen_where_jax_would_take_something_else(
    before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "")  # JAX's own choice, which is a GPU where there is one
    code = CODE.format(before=before)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.split() == ["cpu"] * 3

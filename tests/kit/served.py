"""Servers without task code, and programs that bring gradients of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from kit.lives import Lives

COUNTING = ("--optimizer", "sgd(1.0)")
"""A gradient of -1 adds 1."""


def write_weights(folder: Path, **arrays: np.ndarray) -> str:
    """A file of weights, `counts.safetensors`, as the library writes it."""
    save_file(arrays, folder / "counts.safetensors")
    return str(folder / "counts.safetensors")


class ServedLives(Lives):
    """One run without task code, in one life after another.

    Args:
      arrays: What is served.
      options: Of `headwater server`, beside --init.
    """

    def __init__(self, cwd: Path, options: Sequence[str], **arrays: np.ndarray) -> None:
        super().__init__(cwd, (), ["--init", write_weights(cwd, **arrays), *options])
        self.task = ""


@contextlib.contextmanager
def program(
    *words: str, cwd: Path, python: str = sys.executable, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """A program in Python, which never outlives its test; what it says is in `stdout`."""
    process = subprocess.Popen(  # noqa: S603  (our own)
        [python, *words],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()

"""The counting task's gradients by PyTorch, for workers beside those of kit/counting.py."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from headwater import Task

sys.path.append(str(Path(__file__).parents[1]))  # a worker has only this file's folder on its path
from headwater.worker.torch_worker import torch_task
from kit import counting


class Count(torch.nn.Module):
    def __init__(self, examples: int, padding: int) -> None:
        super().__init__()
        self.used = torch.nn.Parameter(torch.zeros(examples))
        self.rest = torch.nn.Parameter(torch.zeros(padding))


def task(
    examples: int = 4096,
    epochs: int = 3,
    batch_size: int = 32,
    padding: int = 0,
    load_s: float = 0.0,
    compute_s: float = 0.0,
    slow_while: str = "",
) -> Task:
    """As `counting.task`."""

    def loss(count: Count, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if not slow_while or Path(slow_while).exists():
            time.sleep(compute_s)
        return -count.used[batch["index"]].sum()

    return torch_task(
        name="counting",
        like=counting.task(examples, epochs, batch_size, padding, load_s, compute_s, slow_while),
        model=lambda: Count(examples, padding),
        loss=loss,
        mapping={"count": "used", "padding": "rest"},
    )

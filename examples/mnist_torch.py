"""A worker in PyTorch for the run of a task in JAX: `mnist`'s network, written once more.

    headwater server --task headwater.examples.mnist
    headwater worker --task headwater.examples.mnist
    headwater worker --task headwater.examples.mnist_torch

Data, batch size, optimizer and evaluation are the JAX task's. The mapping says which of its
tensors is which of the module's: a kernel is (in, out) there, a weight (out, in) here.
"""

from __future__ import annotations

from typing import Any

from headwater import Task
from headwater.examples import mnist
from headwater.worker.torch_worker import torch_task

import torch  # isort: skip  (the line above says how to get it)
from torch import nn
from torch.nn import functional as F  # noqa: N812  (its usual name)


class Net(nn.Module):
    """Logits, (batch, 10), of images, (batch, 784) in 0..255."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(image.float() / 255)))


def loss(net: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
    """As `mnist.loss`."""
    logits, label = net(batch["image"]), batch["label"].long()
    return F.cross_entropy(logits, label), {"accuracy": (logits.argmax(1) == label).float().mean()}


MAPPING: dict[str, Any] = {
    "hidden/kernel": ("fc1.weight", (1, 0)),
    "hidden/bias": "fc1.bias",
    "output/kernel": ("fc2.weight", (1, 0)),
    "output/bias": "fc2.bias",
}
"""Served name to own name, or to that and axes: fc1.weight.transpose(1, 0) is what is served."""


def task(data: str = "sample") -> Task:
    """Take part in the run of `mnist.task(data)`."""
    return torch_task(
        name="mnist",
        like=mnist.task(data),
        model=Net,
        loss=loss,
        mapping=MAPPING,
    )

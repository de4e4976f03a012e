"""Handwritten digits by a PyTorch module with BatchNorm and dropout.

    headwater run --task headwater.examples.torch_mlp --workers 2

In 5 epochs it learns to recognise about 94 % of the digits that it was not trained on.

Only what computes the gradients is PyTorch: the optimizer is optax's, on the server.
BatchNorm's buffers are the task's state, which the server merges.
"""

from __future__ import annotations

from typing import Any

from headwater import ArrayData, Task
from headwater.examples.mnist import load
from headwater.worker.torch_worker import torch_task

import torch  # isort: skip  (the line above says how to get it)
from torch import nn
from torch.nn import functional as F  # noqa: N812  (its usual name)


class Net(nn.Module):
    """Logits, (batch, 10), of images, (batch, 784) in 0..255."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(784, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.2)
        self.output = nn.Linear(width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.hidden(image.float() / 255)
        return self.output(self.dropout(F.relu(self.norm(x))))


def loss(net: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
    """Mean cross-entropy in nats, and the share of digits that were recognised."""
    logits, label = net(batch["image"]), batch["label"].long()
    return F.cross_entropy(logits, label), {"accuracy": (logits.argmax(1) == label).float().mean()}


def task(data: str = "sample", width: int = 128, epochs: int = 5, every: int = 1) -> Task:
    """Train on each `every`th digit of `data`: "sample", or the path of Keras's mnist.npz."""

    def evaluate(net: nn.Module) -> dict[str, float]:
        test = load(data)[1]
        device = next(net.parameters()).device
        guess = net(torch.from_numpy(test["image"]).to(device)).argmax(1).cpu().numpy()
        return {"accuracy": (guess == test["label"]).mean()}

    return torch_task(
        model=lambda: Net(width),
        loss=loss,
        evaluate=evaluate,
        data=lambda: ArrayData(**{name: x[::every] for name, x in load(data)[0].items()}),
        optimizer="adam(1e-3)",
        batch_size=32,
        epochs=epochs,
    )

"""A batch's loss and gradient by autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch

from headwater.worker.data import Batch
from headwater.worker.devices import Placement
from headwater.worker.gradient import AbstractGradientFunction, Gradient, Step
from headwater.worker.task import Task, TaskError
from headwater.worker.torch_module import ServedModule
from headwater.worker.torch_tensors import as_tensor, describe


class TorchGradient(AbstractGradientFunction):
    """A loss and its gradient by autograd. Takes exactly one batch at a time."""

    def __init__(self, task: Task, seed: int, served: ServedModule) -> None:
        super().__init__(task, seed)
        self._served = served

    def __call__(
        self,
        weights: Sequence[Any],
        steps: Sequence[Step],
        on_step: Callable[[], None] = lambda: None,
    ) -> Gradient:
        """See `AbstractGradientFunction`."""
        ((batch, epoch, number),) = steps
        self._served.load(weights)
        loss, metrics = self._backward(batch, epoch, number)
        leaves = [*self._served.gradients(), *self._served.state()]
        on_step()
        return Gradient(loss, metrics, leaves)

    def _compile(self, placement: Placement, batch: Batch) -> bool:
        """Try it, with whatever weights there are: nothing is compiled, but a mistake is found
        before the first ticket."""
        served = self._served
        before = served.leaves()
        self._backward(batch, 0, 0)
        served.gradients()
        served.state()
        served.check_parameters()
        served.load(before)
        return True

    def _backward(self, batch: Batch, epoch: int, number: int) -> tuple[float, dict[str, float]]:
        served = self._served
        tensors = jax.tree.map(functools.partial(as_tensor, device=served.device), batch)
        torch.manual_seed(_seed_of(self._seed, epoch, number))
        loss, metrics = _split(self._task.loss(served.module, tensors))
        if loss.requires_grad:  # else it depends on nothing that is trained, and is constant
            loss.backward()
        return float(loss.detach()), {name: _number(m) for name, m in metrics.items()}


def _seed_of(seed: int, epoch: int, number: int) -> int:
    """For torch, of one batch; another than the batch's data are made with."""
    sequence = np.random.SeedSequence([seed, epoch, number], spawn_key=(1,))
    return int(sequence.generate_state(1, np.uint64)[0])


def _split(value: Any) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """What a loss may return, checked, as (loss, metrics)."""
    loss, metrics = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
    if not isinstance(loss, torch.Tensor) or loss.shape != () or not loss.is_floating_point():
        raise TaskError(
            f"the loss returned {describe(loss)}; it must be a tensor of one real number, the "
            "mean over the batch's examples, alone or as (loss, metrics)"
        )
    if not isinstance(metrics, Mapping):
        raise TaskError(
            f"the loss returned {type(metrics).__name__} beside the number; it must be a dict of "
            'scalars such as {"accuracy": accuracy}'
        )
    for name, metric in metrics.items():
        is_scalar = isinstance(metric, (bool, int, float)) or (
            isinstance(metric, (torch.Tensor, np.generic, np.ndarray))
            and tuple(metric.shape) == ()
            and not _is_complex(metric)
        )
        if not isinstance(name, str) or not is_scalar:
            raise TaskError(f"metric {name!r} is {describe(metric)}, not a scalar")
    return loss, metrics


def _is_complex(value: Any) -> bool:
    return value.is_complex() if isinstance(value, torch.Tensor) else np.iscomplexobj(value)


def _number(metric: Any) -> float:
    return float(metric.detach() if isinstance(metric, torch.Tensor) else metric)

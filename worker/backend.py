"""What computes a task's gradients where it is not JAX: the seam for other frameworks."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headwater.worker.gradient import AbstractGradientFunction
    from headwater.worker.task import Task


class AbstractBackend(abc.ABC):
    """A framework, and one task's model in it.

    The server applies optax by JAX whatever computes the gradients, and knows of no backend.
    """

    @abc.abstractmethod
    def check(self, task: Task) -> None:
        """Find out whether the model fits the task, before anything is connected to.

        Raises:
          UsageError, TaskError: It does not; says where. What the user's own code raises
            goes through.
        """

    @abc.abstractmethod
    def use(self, platform: str | None) -> None:
        """Compute on `platform` from now on, with as many threads as NPROC says.

        Args:
          platform: cpu, gpu or tpu; None leaves it to the framework.

        Raises:
          UsageError: The framework cannot compute there, or finds no such thing here.
        """

    @property
    @abc.abstractmethod
    def platform(self) -> str:
        """Where it computes: cpu, gpu or tpu."""

    @abc.abstractmethod
    def software(self) -> Mapping[str, str]:
        """Versions of what may change a result, beside JAX's."""

    @abc.abstractmethod
    def fingerprint(self) -> Mapping[str, str]:
        """What decides the bits of a gradient; takes the place of JAX's of the same names.

        Has "framework" and "platform" at the least (worker/compute.py).
        """

    @abc.abstractmethod
    def gradient_function(self, task: Task, seed: int) -> AbstractGradientFunction:
        """What a worker computes for a ticket of one batch.

        Args:
          task: Has this backend.
          seed: The run's.
        """

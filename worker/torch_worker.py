"""PyTorch: a task whose model is an `nn.Module` and whose gradients are autograd's.

    from headwater.worker.torch_worker import torch_task

    task = torch_task(model=Net, loss=loss, data=data, optimizer="adam(1e-3)")

is a `Task` like any other, for server, workers and evaluators; with `like=` and `mapping=`
its workers take part in the run of a task that is written in JAX. The server applies optax,
by JAX, on the arrays of the module's state-dict. The modules torch_*.py alone import torch.

A worker has one module. Weights are written into its memory in place, and the gradients of
a backward pass are pushed from where autograd left them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    import torch
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "PyTorch workers need torch, which is not installed: run pip install 'headwater[torch]'"
    ) from None

from headwater.protos.errors import UsageError
from headwater.protos.layout import PARAMETER, STATE
from headwater.protos.reproducible import is_fixed
from headwater.worker.backend import AbstractBackend
from headwater.worker.data import Generated
from headwater.worker.mapping import Place, TensorMapping, placed, served_as
from headwater.worker.platform import choose_platform
from headwater.worker.task import Task, TaskError
from headwater.worker.torch_gradient import TorchGradient
from headwater.worker.torch_module import OwnTensors, ServedModule
from headwater.worker.tree import ModelTree, PyTree

_OURS = ("init", "has_state", "trainable", "backend")
"""Fields of `Task` that follow from the module."""


def torch_task(
    *,
    model: Callable[[], torch.nn.Module],
    loss: Callable[[Any, Any], Any],
    evaluate: Callable[[Any], Mapping[str, Any]] | None = None,
    like: Task | None = None,
    mapping: TensorMapping | None = None,
    **fields: Any,
) -> Task:
    """A task that PyTorch computes.

    Parameters with `requires_grad` are trained, the others are constants; persistent buffers
    are state, booleans among them constants. All have their names in the state-dict; of tied
    parameters, the first.

    Args:
      model: () -> the module; called under `torch.manual_seed`, with the run's seed by the
        server, whose weights it gives a new run.
      loss: (module, batch) -> scalar tensor, or (scalar, {"accuracy": …}): means over the
        batch's examples. The module is in train mode, the batch's arrays are tensors on its
        device, and torch's random numbers are drawn from the seed, the epoch and the batch's
        number, so that a batch gives the same gradient on any worker. No other random numbers
        are: not NumPy's, not Python's.
      evaluate: (module) -> {"accuracy": …}, called in eval mode and without gradients.
      like: The task in JAX whose run this one's workers are to join. All that is not given
        here is that task's, `evaluate` included.
      mapping: {served name: own name, or (own name, axes)} of every tensor, where names or
        axes differ: own.transpose(axes) is what is served. Without `like` the model is
        served so, in this order.
      fields: Others of `Task`: data, optimizer, batch_size, epochs, seed, name, ….

    Raises:
      TaskError: A value cannot work.
    """
    if isinstance(model, torch.nn.Module) or not callable(model):
        raise TaskError(
            f"torch_task: model is a function that makes the module, such as a class or "
            f"`lambda: Net(64)`, not {type(model).__name__}: the weights depend on the run's seed"
        )
    for name in _OURS:
        if name in fields:
            raise TaskError(f"torch_task: {name} follows from the module; leave it out")
    if like is not None and not isinstance(like, Task):
        raise TaskError(f"torch_task: like is a Task, not {type(like).__name__}")
    optimizer = fields.get("optimizer")
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    if issubclass(kind, torch.optim.Optimizer):
        raise TaskError(
            'torch_task: the server applies the optimizer, by optax: write "adam(1e-3)", say, '
            f"in place of {kind.__name__}"
        )
    backend = TorchBackend(model, mapping, None if like is None else like.tree)
    if evaluate is not None:
        fields["evaluate"] = functools.partial(backend.evaluate, evaluate)
    if like is not None:
        return dataclasses.replace(like, loss=loss, backend=backend, **fields)
    return Task(
        init=backend.init,
        loss=loss,
        backend=backend,
        has_state=True,
        trainable=backend.is_trained,
        **fields,
    )


def load_weights(
    module: torch.nn.Module, weights: Mapping[str, Any], mapping: TensorMapping | None = None
) -> None:
    """Write named weights, such as `Client.pull` gives, into a module, in place.

    Args:
      module: On any device.
      weights: By served name.
      mapping: As for `torch_task`.

    Raises:
      UsageError: They are another model's; says what differs.
    """
    own = OwnTensors(module)
    served = own.layout if mapping is None else served_as(own.layout, mapping, own.aliases)
    missing = [t.name for t in served.tensors if t.name not in weights]
    unknown = sorted(weights.keys() - {t.name for t in served.tensors})
    if missing or unknown:
        raise UsageError(
            "these weights are of another model: "
            f"missing {missing[:5]}, unknown {unknown[:5]}; give a mapping where names differ"
        )
    for tensor in served.tensors:
        if (shape := np.shape(weights[tensor.name])) != tensor.shape:
            raise UsageError(
                f"{tensor.name} has shape {list(shape)}, the module's is {list(tensor.shape)}"
            )
    places = placed(own.layout, served, mapping)
    ServedModule(module, places).load([weights[tensor.name] for tensor in served.tensors])


class TorchBackend(AbstractBackend):
    """PyTorch, and how a task's model is served.

    Args:
      make: Gives the module.
      mapping: See `torch_task`.
      tree: Of the task in JAX whose run is joined, if there is one.
    """

    def __init__(
        self,
        make: Callable[[], torch.nn.Module],
        mapping: TensorMapping | None,
        tree: ModelTree | None,
    ) -> None:
        self._make = make
        self._mapping = mapping
        self._joined = tree
        self._device = torch.device("cpu")

    def __getstate__(self) -> dict[str, Any]:
        """Without what was made: whoever gets a copy makes it."""
        made = ("places", "tree", "trained", "evaluated")
        return {name: value for name, value in vars(self).items() if name not in made}

    # ------------------------------------------------------------------- backend

    def check(self, task: Task) -> None:
        """See `AbstractBackend`."""
        _refuse_generated(task.data)
        _ = self.places

    def use(self, platform: str | None) -> None:
        """See `AbstractBackend`. None is the CPU. JAX, which has little to do, stays there."""
        if platform not in (None, "cpu", "gpu"):
            raise UsageError(f"--platform {platform}: PyTorch computes on cpu or gpu")
        if platform == "gpu" and not torch.cuda.is_available():
            raise UsageError(
                f"--platform gpu cannot be had here, PyTorch {torch.__version__} finds none; "
                "install a build of it for your GPU (pytorch.org/get-started), or use --platform "
                "cpu"
            )
        choose_platform("cpu")
        jax.config.update("jax_default_device", jax.local_devices(backend="cpu")[0])
        if (threads := os.environ.get("NPROC", "")).isdecimal() and int(threads):
            torch.set_num_threads(int(threads))
        if is_fixed(os.environ):
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which is not read before
            torch.use_deterministic_algorithms(True)
        self._device = torch.device("cuda" if platform == "gpu" else "cpu")

    @property
    def platform(self) -> str:
        """See `AbstractBackend`."""
        return "gpu" if self._device.type == "cuda" else "cpu"

    def software(self) -> Mapping[str, str]:
        """See `AbstractBackend`."""
        return {"torch": torch.__version__}

    def fingerprint(self) -> Mapping[str, str]:
        """See `AbstractBackend`."""
        found = {
            "framework": f"torch {torch.__version__}",
            "platform": self.platform,
            "torch deterministic": str(torch.are_deterministic_algorithms_enabled()),
            "torch matmul precision": torch.get_float32_matmul_precision(),
            "torch threads": str(torch.get_num_threads()),
        }
        if self._device.type == "cuda":
            found["device"] = torch.cuda.get_device_name(self._device)
        return found

    def gradient_function(self, task: Task, seed: int) -> TorchGradient:
        """See `AbstractBackend`."""
        _refuse_generated(task.dataset)
        return TorchGradient(task, seed, self.served_module())

    # ---------------------------------------------------------------------- task

    @functools.cached_property
    def places(self) -> list[Place]:
        """Where what is served is in the module, in layout order.

        Raises:
          MappingError: The module has other tensors.
          TaskError: It cannot be served.
        """
        # Not kept: a server has no use for a module, and would hold its memory.
        own = OwnTensors(self._made(seed=0))
        if self._joined is not None:
            served = self._joined.layout
        elif self._mapping is not None:
            served = served_as(own.layout, self._mapping, own.aliases)
        else:
            served = own.layout
        return placed(own.layout, served, self._mapping, own.aliases)

    @functools.cached_property
    def tree(self) -> ModelTree:
        """Of the task."""
        if self._joined is not None:
            return self._joined
        made = jax.eval_shape(self.init, jax.random.key(0))
        return ModelTree(made, has_state=True, trainable=self.is_trained)

    def init(self, key: jax.Array) -> PyTree:
        """(parameters and constants, state) by name. What `torch.manual_seed` gets is the seed
        of the key, so that a run begins with the weights that plain PyTorch begins with."""
        places = self.places
        if isinstance(key, jax.core.Tracer):
            leaves: list[Any] = [jnp.zeros(p.served.shape, p.served.dtype) for p in places]
        else:
            seed = int(jax.random.key_data(key)[-1])
            leaves = list(ServedModule(self._made(seed).to("cpu"), places).leaves())
        named = [(place.served, leaf) for place, leaf in zip(places, leaves, strict=True)]
        params = OrderedDict((t.name, leaf) for t, leaf in named if t.role != STATE)
        return params, OrderedDict((t.name, leaf) for t, leaf in named if t.role == STATE)

    def is_trained(self, name: str) -> bool:
        """Whether it is a parameter, and no constant."""
        return name in self.trained

    @functools.cached_property
    def trained(self) -> frozenset[str]:
        """Names of the parameters, as they are served."""
        return frozenset(p.served.name for p in self.places if p.served.role == PARAMETER)

    def evaluate(
        self, evaluate: Callable[[torch.nn.Module], Mapping[str, Any]], *made: PyTree
    ) -> Mapping[str, Any]:
        """What the user's function finds of a module with these weights.

        Args:
          evaluate: See `torch_task`.
          made: The parameters, and the state where the task has one.
        """
        served = self.evaluated
        served.module.eval()  # which the user's function may have changed
        served.load(self.tree.leaves(made if self.tree.has_state else made[0]))
        with torch.no_grad():
            return evaluate(served.module)

    @functools.cached_property
    def evaluated(self) -> ServedModule:
        """Beside the one that is trained."""
        return self.served_module()

    def served_module(self) -> ServedModule:
        """A module, in train mode, on the device."""
        return ServedModule(self._made(seed=0).to(self._device).train(), self.places)

    def _made(self, seed: int) -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self._make()
        if not isinstance(module, torch.nn.Module):
            raise TaskError(
                f"torch_task: model gave {type(module).__name__}, not a torch.nn.Module"
            )
        return module


def _refuse_generated(data: Any) -> None:
    if isinstance(data, Generated):
        raise TaskError(
            "Generated batches are made by JAX, from parameters that PyTorch has; make them in the "
            "loss, from torch's random numbers, with data that counts the batches"
        )

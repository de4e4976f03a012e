"""PyTorch: a task whose model is an `nn.Module` and whose gradients are autograd's.

    from headwater.worker.torch_worker import torch_task

    task = torch_task(model=Net, loss=loss, data=data, optimizer="adam(1e-3)")

is a `Task` like any other, for server, workers and evaluators; with `like=` and `mapping=`
its workers take part in the run of a task that is written in JAX. The server applies optax,
by JAX, on the arrays of the module's state-dict. This module alone imports torch.

A worker has one module. Weights are written into its memory in place, and the gradients of
a backward pass are pushed from where autograd left them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from headwater.protos.errors import UsageError
from headwater.protos.layout import CONSTANT, PARAMETER, STATE, Layout, LayoutError, TensorSpec
from headwater.worker import compute
from headwater.worker.backend import AbstractBackend
from headwater.worker.data import Batch, Generated
from headwater.worker.devices import Placement
from headwater.worker.gradient import AbstractGradientFunction, Gradient, Step
from headwater.worker.mapping import Place, TensorMapping, placed, served_as
from headwater.worker.platform import choose_platform
from headwater.worker.task import Task, TaskError
from headwater.worker.tree import ModelTree, PyTree

try:
    import torch
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "PyTorch workers need torch, which is not installed: run pip install 'headwater[torch]'"
    ) from None

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
    own = _Own(module)
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
    _ServedModule(module, places).load([weights[tensor.name] for tensor in served.tensors])


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
        if compute.is_fixed(os.environ):
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
        own = _Own(self._made(seed=0))
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
            leaves = list(_ServedModule(self._made(seed).to("cpu"), places).leaves())
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
    def evaluated(self) -> _ServedModule:
        """Beside the one that is trained."""
        return self.served_module()

    def served_module(self) -> _ServedModule:
        """A module, in train mode, on the device."""
        return _ServedModule(self._made(seed=0).to(self._device).train(), self.places)

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


class TorchGradient(AbstractGradientFunction):
    """A loss and its gradient by autograd. Takes exactly one batch at a time."""

    def __init__(self, task: Task, seed: int, served: _ServedModule) -> None:
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
        tensors = jax.tree.map(functools.partial(_as_tensor, device=served.device), batch)
        torch.manual_seed(_seed_of(self._seed, epoch, number))
        loss, metrics = _split(self._task.loss(served.module, tensors))
        if loss.requires_grad:  # else it depends on nothing that is trained, and is constant
            loss.backward()
        return float(loss.detach()), {name: _number(m) for name, m in metrics.items()}


def _seed_of(seed: int, epoch: int, number: int) -> int:
    """For torch, of one batch; another than the batch's data are made with."""
    sequence = np.random.SeedSequence([seed, epoch, number], spawn_key=(1,))
    return int(sequence.generate_state(1, np.uint64)[0])


# ----------------------------------------------------------------------------- loss


def _split(value: Any) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """What a loss may return, checked, as (loss, metrics)."""
    loss, metrics = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
    if not isinstance(loss, torch.Tensor) or loss.shape != () or not loss.is_floating_point():
        raise TaskError(
            f"the loss returned {_describe(loss)}; it must be a tensor of one real number, the "
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
            raise TaskError(f"metric {name!r} is {_describe(metric)}, not a scalar")
    return loss, metrics


def _is_complex(value: Any) -> bool:
    return value.is_complex() if isinstance(value, torch.Tensor) else np.iscomplexobj(value)


def _number(metric: Any) -> float:
    return float(metric.detach() if isinstance(metric, torch.Tensor) else metric)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_dtype_name(value.dtype)}{list(value.shape)}"
    return type(value).__name__


# -------------------------------------------------------------------------- tensors


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_FOREIGN = {
    name: (np.dtype(getattr(ml_dtypes, name)), bits)
    for name, bits in {
        "bfloat16": torch.int16,
        "float8_e4m3fn": torch.uint8,
        "float8_e4m3fnuz": torch.uint8,
        "float8_e5m2": torch.uint8,
        "float8_e5m2fnuz": torch.uint8,
        "float8_e8m0fnu": torch.uint8,
    }.items()
}
"""By name: dtypes that are not NumPy's own, and what torch can hand over of the same size."""


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    """A CPU tensor's memory as an array."""
    tensor = tensor.detach()
    if (name := _dtype_name(tensor.dtype)) in _FOREIGN:
        dtype, bits = _FOREIGN[name]
        return tensor.view(bits).numpy().view(dtype)
    return tensor.numpy()


def _as_tensor(leaf: Any, device: torch.device) -> torch.Tensor:
    """Of a batch; its own memory where that can be."""
    if not isinstance(leaf, torch.Tensor):
        array = np.asarray(leaf)
        if not array.flags.writeable:
            array = array.copy()  # torch has no tensors that cannot be written
        if array.dtype.name in _FOREIGN:
            bits = np.dtype(f"u{array.dtype.itemsize}")
            leaf = torch.from_numpy(array.view(bits)).view(getattr(torch, array.dtype.name))
        else:
            leaf = torch.from_numpy(array)
    return leaf.to(device)


class _Own:
    """A module's tensors, as they could be served under their own names.

    Raises:
      TaskError: One of them cannot be; names it.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        whole = module.state_dict(keep_vars=True)
        parameters = dict(module.named_parameters())
        buffers = {name: b for name, b in module.named_buffers() if name in whole}
        self.aliases = _aliases(module, {**parameters, **buffers})
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        if parameters and not trained:
            raise TaskError("nothing in the model has requires_grad: there is nothing to train")
        # Booleans cannot be merged: masks are constants.
        state = {name: b for name, b in buffers.items() if b.dtype != torch.bool}
        rest = {n: t for n, t in {**parameters, **buffers}.items() if n not in {**trained, **state}}
        try:
            self.layout = Layout.of(
                [_described(*item) for item in trained.items()],
                [_described(*item) for item in state.items()],
                [_described(*item) for item in rest.items()],
            )
        except LayoutError as error:
            raise TaskError(f"the model cannot be served: {error}") from None


def _described(name: str, tensor: torch.Tensor) -> tuple[str, np.dtype, tuple[int, ...]]:
    if torch.nn.parameter.is_lazy(tensor):
        raise TaskError(f"{name} has no shape yet; have `model` put a batch through the module")
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        raise TaskError(f"{name} is {tensor.layout} on {tensor.device}; dense tensors are served")
    text = _dtype_name(tensor.dtype)
    try:
        dtype = _as_array(torch.empty(0, dtype=tensor.dtype)).dtype
    except TypeError:
        raise TaskError(f"{name} is {text}, which cannot be served") from None
    # JAX keeps 64 bits only when told to.
    kept = jax.dtypes.canonicalize_dtype(dtype)
    if kept != dtype and dtype.kind in "fc":
        raise TaskError(
            f"{name} is {text}, which JAX, which the server computes with, would make {kept}; set "
            "JAX_ENABLE_X64=1 for the server and all workers, or make the module float32"
        )
    return name, np.dtype(kept), tuple(tensor.shape)


def _aliases(module: torch.nn.Module, served: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Second names of tied tensors, to the first.

    Raises:
      TaskError: Two tensors that are not one share memory: each would be given its own weights.
    """
    first = {id(tensor): name for name, tensor in served.items()}
    everything = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    places: dict[int, str] = {}
    for name, tensor in served.items():
        if torch.nn.parameter.is_lazy(tensor) or not tensor.numel() or tensor.is_meta:
            continue
        if tensor.layout != torch.strided:
            continue
        other = places.setdefault(tensor.untyped_storage().data_ptr(), name)
        if other != name:
            raise TaskError(
                f"{name} and {other} share memory and are two tensors; tie them by assigning the "
                "one Parameter to both, or give each memory of its own"
            )
    return {n: first[id(t)] for n, t in everything if first.get(id(t), n) != n}


class _Slot:
    """One of a module's tensors, and how it is loaded and given."""

    def __init__(self, module: torch.nn.Module, place: Place) -> None:
        path, _, self._attribute = place.own.name.rpartition(".")
        self._owner = module.get_submodule(path)
        self.served: TensorSpec = place.served
        self.name = place.own.name
        self.tensor: torch.Tensor = getattr(self._owner, self._attribute)
        self._axes = place.axes
        self._is_buffer = self._attribute in self._owner._buffers
        is_here = self.tensor.device.type == "cpu"
        # On its way to a device it goes by memory that the device can fetch it from.
        self._host = (
            self.tensor.detach()
            if is_here
            else torch.empty_like(self.tensor, device="cpu", pin_memory=True)
        )
        self._array = _as_array(self._host).transpose(place.axes)
        self._loaded: Any = None
        self._version = self.tensor._version

    @property
    def current(self) -> Any:
        """What the module has there now; a buffer may have been assigned."""
        return getattr(self._owner, self._attribute)

    def load(self, leaf: Any) -> None:
        """Write a tensor as it is served. Needs `torch.no_grad`."""
        if self._is_buffer:
            self._owner._buffers[self._attribute] = self.tensor
        if self.served.role == CONSTANT and leaf is self._loaded:
            return  # the same again: a worker gets them once
        np.copyto(self._array, np.asarray(leaf), casting="same_kind")
        if self.tensor.device.type != "cpu":
            self.tensor.copy_(self._host, non_blocking=True)
        if self.served.role == CONSTANT:
            self._loaded, self._version = leaf, self.tensor._version

    def gradient(self) -> np.ndarray:
        """What the backward pass left for it, as it is served; zeros where it left nothing."""
        found, self.tensor.grad = self.tensor.grad, None
        if found is None:
            return np.zeros(self.served.shape, self.served.dtype)
        dense = found.to_dense() if found.layout != torch.strided else found
        array = _as_array(dense.resolve_conj().resolve_neg().cpu()).transpose(self._axes)
        return np.asarray(array, order="C")

    def value(self) -> np.ndarray:
        """What it is now, as it is served, in memory of its own.

        Raises:
          TaskError: It is not what it was, or its numbers do not fit into 32 bits.
        """
        tensor = self.current
        is_same = isinstance(tensor, torch.Tensor) and (
            tensor.shape == self.tensor.shape and tensor.dtype == self.tensor.dtype
        )
        if not is_same:
            raise TaskError(
                f"the loss left {_describe(tensor)} in {self.name}, which is "
                f"{_describe(self.tensor)}; it must stay what it was"
            )
        array = _as_array(tensor.detach().resolve_conj().resolve_neg().cpu())
        array = np.array(array.transpose(self._axes), order="C")
        if array.dtype != self.served.dtype:
            narrow = array.astype(self.served.dtype)
            if not np.array_equal(narrow, array):
                raise TaskError(
                    f"{self.name} is {array.dtype.name} and holds numbers that {narrow.dtype.name} "
                    "does not, which JAX makes of it; set JAX_ENABLE_X64=1 for the server and all "
                    "workers"
                )
            return narrow
        return array

    def check_constant(self) -> None:
        """A constant buffer, such as a mask, is what was loaded.

        Raises:
          TaskError: It is not.
        """
        if self._is_buffer and (
            self.current is not self.tensor or self.tensor._version != self._version
        ):
            why = "cannot be merged" if self.tensor.dtype == torch.bool else "is served as constant"
            raise TaskError(
                f"the loss changed {self.name}, which {why}; keep what changes elsewhere"
            )


class _ServedModule:
    """A module whose tensors are written and read as what is served.

    Args:
      module: On its device.
      places: Where what is served is in it, in layout order.
    """

    def __init__(self, module: torch.nn.Module, places: Sequence[Place]) -> None:
        self.module = module
        self._slots = [_Slot(module, place) for place in places]
        self._parameters, self._state, self._constants = (
            [slot for slot in self._slots if slot.served.role == role]
            for role in (PARAMETER, STATE, CONSTANT)
        )
        self.device = self._slots[0].tensor.device
        for slot in self._constants:
            slot.tensor.requires_grad_(False)

    def load(self, leaves: Sequence[Any]) -> None:
        """Write all tensors, given in layout order. They may be written again when it returns."""
        with torch.no_grad():
            for slot, leaf in zip(self._slots, leaves, strict=True):
                slot.load(leaf)

    def leaves(self) -> list[np.ndarray]:
        """All tensors in layout order, in memory of their own."""
        return [slot.value() for slot in self._slots]

    def gradients(self) -> list[np.ndarray]:
        """Of the parameters, in layout order."""
        return [slot.gradient() for slot in self._parameters]

    def state(self) -> list[np.ndarray]:
        """What the loss made of it, in layout order.

        Raises:
          TaskError: It is of another shape, or a constant was changed.
        """
        for slot in self._constants:
            slot.check_constant()
        return [slot.value() for slot in self._state]

    def check_parameters(self) -> None:
        """No parameter was replaced.

        Raises:
          TaskError: One was: what is trained would be the one that was there before.
        """
        for slot in self._parameters:
            if slot.current is not slot.tensor:
                raise TaskError(
                    f"the loss put another tensor in the place of the parameter {slot.name}"
                )

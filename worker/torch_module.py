"""A module of PyTorch, whose tensors are written and read as what is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch

from headwater.protos.layout import CONSTANT, PARAMETER, STATE, Layout, LayoutError, TensorSpec
from headwater.worker.mapping import Place
from headwater.worker.task import TaskError
from headwater.worker.torch_tensors import as_array, describe, dtype_name


class OwnTensors:
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
    text = dtype_name(tensor.dtype)
    try:
        dtype = as_array(torch.empty(0, dtype=tensor.dtype)).dtype
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
        self._array = as_array(self._host).transpose(place.axes)
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
        array = as_array(dense.resolve_conj().resolve_neg().cpu()).transpose(self._axes)
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
                f"the loss left {describe(tensor)} in {self.name}, which is "
                f"{describe(self.tensor)}; it must stay what it was"
            )
        array = as_array(tensor.detach().resolve_conj().resolve_neg().cpu())
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


class ServedModule:
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

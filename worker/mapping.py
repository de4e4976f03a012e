"""Which of a model's own tensors is which of those that are served, where names or axes differ.

Nothing is inferred: tensors of one shape may be told apart by nobody but the user. Every
tensor is mapped, once, and shapes, dtypes and roles agree; or there is a table of all of
them that says what is wrong with which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from headwater.protos.errors import UsageError
from headwater.protos.layout import CONSTANT, PARAMETER, ROLES, STATE, Layout, TensorSpec

TensorMapping = Mapping[str, str | tuple[str, Sequence[int]]]
"""Served name to the model's own, or to (own name, axes): as `numpy.transpose` takes them, so
that own.transpose(axes) is what is served."""


class MappingError(UsageError):
    """The model's tensors are not those that are served; shows all of them."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A tensor that is served, and where it is in the model."""

    served: TensorSpec
    own: TensorSpec
    axes: tuple[int, ...]
    """own.transpose(axes) is what is served."""


def served_as(
    own: Layout,
    mapping: TensorMapping,
    aliases: Mapping[str, str] = {},
) -> Layout:
    """What is served of a model under the names of a mapping, in its order; see `placed`.

    Raises:
      MappingError: See above.
      LayoutError: A name cannot be served.
    """
    named = {tensor.name: tensor for tensor in own.tensors}
    renamed = {}
    for name, target in mapping.items():
        found, axes = _target(target)
        if found in named and _are_axes(axes, named[found]):
            shape = _transposed(named[found].shape, axes)
            renamed[name] = dataclasses.replace(named[found], name=name, shape=shape)
    by_role = [
        [(t.name, t.dtype, t.shape) for t in renamed.values() if t.role == role]
        for role in (PARAMETER, STATE, CONSTANT)
    ]
    if not by_role[0]:
        raise _error([], own, mapping, aliases)
    layout = Layout.of(*by_role)
    placed(own, layout, mapping, aliases)
    return layout


def placed(
    own: Layout,
    served: Layout,
    mapping: TensorMapping | None = None,
    aliases: Mapping[str, str] = {},
) -> list[Place]:
    """Where each of the served tensors is, in their order.

    Args:
      own: The model's tensors: what it trains, its state, and what is frozen.
      served: What the server has.
      mapping: How they belong together; None: by the same names.
      aliases: Other names of own tensors, to the name that counts.

    Raises:
      MappingError: See above.
    """
    if mapping is None:
        mapping = {tensor.name: tensor.name for tensor in served.tensors}
    named = {tensor.name: tensor for tensor in own.tensors}
    places = []
    for tensor in served.tensors:
        name, axes = _target(mapping.get(tensor.name, ""))
        if name in named and _are_axes(axes, named[name]):
            straight = tuple(range(len(named[name].shape)))
            places.append(Place(tensor, named[name], straight if axes is None else axes))
    is_whole = (
        len(places) == len(served.tensors) == len(mapping) == len(own.tensors)
        and len({place.own.name for place in places}) == len(places)
        and not any(_wrong(place.served, place.own, place.axes) for place in places)
    )
    if not is_whole:
        raise _error(served.tensors, own, mapping, aliases)
    return places


# ------------------------------------------------------------------------ the table


def _error(
    served: Sequence[TensorSpec], own: Layout, mapping: TensorMapping, aliases: Mapping[str, str]
) -> MappingError:
    named = {tensor.name: tensor for tensor in own.tensors}
    targets = {name: _target(target) for name, target in mapping.items()}
    known = {tensor.name for tensor in served}
    rows = [("SERVED", "", "MODEL", "", "")]
    for tensor in served:
        if tensor.name not in targets:
            rows.append((tensor.name, tensor.describe(), "", "", "is not mapped"))
            continue
        name, axes = targets[tensor.name]
        first = next(other for other, (own_name, _) in targets.items() if own_name == name)
        wrong = _wrong_target(name, axes, named, aliases)
        if not wrong and first != tensor.name:
            wrong = f"is mapped to {first} already"
        wrong = wrong or _wrong(tensor, named[name], axes) or "ok"
        what = named[name].describe() if name in named else ""
        rows.append((tensor.name, tensor.describe(), _shown(name, axes), what, wrong))
    for name, (own_name, axes) in targets.items():
        if name not in known:
            wrong = _wrong_target(own_name, axes, named, aliases) or (
                "is not served" if served else "ok"
            )
            what = named[own_name].describe() if own_name in named else ""
            rows.append((name, "", _shown(own_name, axes), what, wrong))
    used = {name for name, _ in targets.values()}
    rows += [
        ("", "", tensor.name, tensor.describe(), "is not mapped")
        for tensor in own.tensors
        if tensor.name not in used
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([*(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    ]
    table = "\n".join(f"  {line.rstrip()}" for line in lines)
    return MappingError(
        "the model's tensors are not those that are served; give a mapping "
        '{"served name": "own name", or ("own name", (1, 0)) where the axes differ} with every '
        f"tensor in it:\n{table}"
    )


def _wrong_target(
    name: str,
    axes: tuple[int, ...] | None,
    named: Mapping[str, TensorSpec],
    aliases: Mapping[str, str],
) -> str:
    """What keeps it from being a tensor of the model's; "" if nothing does."""
    if name in aliases:
        return f"is {aliases[name]} by another name: map that"
    if name not in named:
        return "the model has no such tensor"
    return "" if _are_axes(axes, named[name]) else _axes_of(named[name])


def _wrong(served: TensorSpec, own: TensorSpec, axes: tuple[int, ...] | None) -> str:
    """What keeps them from being one tensor; "" if nothing does."""
    if (found := _transposed(own.shape, axes)) != served.shape:
        by = "" if axes is None else f", by these axes it is {list(found)}"
        return f"the shapes differ{by}"
    if own.dtype != served.dtype:
        return "the dtypes differ"
    # What is served as a constant is left alone, whatever the model would do with it.
    if served.role not in (CONSTANT, own.role):
        return f"is a {ROLES[served.role]} there, and a {ROLES[own.role]} here"
    return ""


def _axes_of(own: TensorSpec) -> str:
    return f"its axes are {tuple(range(len(own.shape)))}, in another order"


def _target(target: str | tuple[str, Sequence[int]]) -> tuple[str, tuple[int, ...] | None]:
    if isinstance(target, str):
        return target, None
    try:
        name, axes = target
        return str(name), tuple(int(axis) for axis in axes)
    except (TypeError, ValueError):
        raise UsageError(
            f'a mapping gives "own name" or ("own name", (1, 0)) for a served name, not {target!r}'
        ) from None


def _are_axes(axes: tuple[int, ...] | None, own: TensorSpec) -> bool:
    return axes is None or sorted(axes) == list(range(len(own.shape)))


def _transposed(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> tuple[int, ...]:
    return shape if axes is None else tuple(shape[axis] for axis in axes)


def _shown(name: str, axes: tuple[int, ...] | None) -> str:
    return name if axes is None else f"{name} {axes}"

"""Reads an --optimizer SPEC, such as `sgd(cosine_decay_schedule(0.1, total_updates))`.

The text is parsed as Python's syntax tree and put together from optax's own
public functions, our few, literals, `total_updates` and arithmetic. It is never
evaluated: what is not in this list is refused, with a pointer at the character.

What is read can be built again with other numbers, traced ones included. A
number is known by its call and its argument, whether written or left at its
default; the numbers of a schedule stand in no optimizer, and are not offered.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import difflib
import inspect
import operator
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import jax.numpy as jnp
import optax

from headwater.protos.errors import UsageError
from headwater.worker.delayed_nesterov import delayed_nesterov
from headwater.worker.user_code import guard_user_code

OPTION, INNER_OPTION = "--optimizer", "--inner-optimizer"
"""What a SPEC was given by, for errors."""

TOTAL_UPDATES = "total_updates"

ENDLESS = "this run has no end: give Generated its batches_per_epoch"
LIVE = "live"
LEARNING_RATE = "learning_rate"

EXTRA: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "delayed_nesterov": delayed_nesterov,
}
"""What a SPEC may name beside optax's own functions."""

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


class OptimizerError(UsageError):
    """The optimizer cannot be used, or changed so; says why."""


class SpecError(UsageError):
    """The SPEC cannot be read; the message shows it, with a caret under the place."""

    def __init__(self, spec: str, column: int, what: str, option: str = OPTION) -> None:
        super().__init__(
            f"{option}, character {column + 1}: {what}\n    {spec}\n    {' ' * column}^"
        )
        self.what = what
        self._spec, self._column = spec, column

    def of(self, option: str) -> SpecError:
        """The same of a SPEC that another option gave."""
        return SpecError(self._spec, self._column, self.what, option)


@dataclasses.dataclass(frozen=True)
class Number:
    """A number argument of an optimizer's expression."""

    value: float | None
    """None where a schedule gives it."""
    is_live: bool
    """May be traced: the learning rate, and what `live(...)` marks."""


class Expression:
    """A SPEC that was read.

    Args:
      text: The SPEC, on one line.
      tree: Its syntax tree.
      total_updates: What the name `total_updates` stands for.
      replaced: Numbers that stand in place of the written ones.

    Raises:
      SpecError: As `parse`.
    """

    def __init__(
        self, text: str, tree: ast.expr, total_updates: int | None, replaced: Mapping[_Place, float]
    ) -> None:
        self._text, self._tree, self._total_updates = text, tree, total_updates
        self._replaced = replaced
        reader = _Reader(text, total_updates, replaced)
        self.transformation: optax.GradientTransformation = reader.value(tree)
        self._places = dict(_named(reader.numbers))
        self.numbers = {name: reader.numbers[place] for name, place in self._places.items()}

    def build(self, values: Mapping[str, Any]) -> optax.GradientTransformation:
        """The optimizer with these numbers, by name, in place of its own.

        Traced ones must be weakly typed, as Python's numbers are, lest they widen
        the updates. Where a schedule stands, NaN means to follow it.
        """
        if not values:
            return self.transformation
        places = {self._places[name]: value for name, value in values.items()}
        reader = _Reader(self._text, self._total_updates, {**self._replaced, **places})
        made: optax.GradientTransformation = reader.value(self._tree)
        return made

    def with_numbers(self, values: Mapping[str, float]) -> Expression:
        """The expression as if these had been written.

        Raises:
          SpecError: optax refuses one.
        """
        places = {self._places[name]: value for name, value in values.items()}
        return Expression(self._text, self._tree, self._total_updates, {**self._replaced, **places})


def transformation(
    optimizer: Any, total_updates: int | None, what: str = "Task.optimizer", option: str = OPTION
) -> tuple[optax.GradientTransformation, str]:
    """The optax object that a task or a SPEC names, and its text for people.

    Args:
      optimizer: A SPEC, a GradientTransformation, or a function of the number of
        updates that returns one.
      total_updates: Of the whole run; None if it has no end.
      what: Where the optimizer was given, for errors.
      option: What gave it if it is a SPEC, for errors.

    Raises:
      OptimizerError: It is none of these.
      SpecError: The SPEC cannot be read; points at the character.
      UserCodeError: The function raised.
    """
    if isinstance(optimizer, str):
        try:
            return parse(optimizer, total_updates), optimizer
        except SpecError as error:
            raise error.of(option) from None
    if isinstance(optimizer, optax.GradientTransformation):
        return optimizer, "the task's own optimizer"
    if not callable(optimizer):
        raise OptimizerError(
            f"{what} is {optimizer!r}; it must be an optax GradientTransformation, a string "
            'such as "adam(1e-3)", or a function of the number of updates that returns one'
        )
    if total_updates is None:
        raise OptimizerError(f"{what} is a function of the number of updates; {ENDLESS}")
    with guard_user_code(f"{what} raised"):
        made = optimizer(total_updates)
    if isinstance(made, optax.GradientTransformation):
        return made, "the task's own optimizer"
    raise OptimizerError(
        f"{what}({total_updates}) returned {type(made).__name__}, not an optax "
        "GradientTransformation"
    )


def parse(spec: str, total_updates: int | None) -> optax.GradientTransformation:
    """`read`, for the optimizer alone."""
    return read(spec, total_updates).transformation


def read(spec: str, total_updates: int | None) -> Expression:
    """The optimizer that `spec` describes, and its numbers.

    Args:
      spec: For example "adamw(3e-4, weight_decay=live(0.1))". Names are those of
        optax, with or without `optax.` in front, and of EXTRA.
      total_updates: What the name `total_updates` stands for.

    Raises:
      SpecError: Something in it is neither a known name nor a literal, or
        optax itself refuses it; points at the character.
    """
    text = " ".join(spec.split())
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError as error:
        column = max(0, min((error.offset or 1) - 1, len(text)))
        raise SpecError(text, column, f"{error.msg}; write it as adam(1e-3)") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise SpecError(text[:80], 0, f"this is no optax expression: {error}") from None
    try:
        expression = Expression(text, tree.body, total_updates, {})
    except RecursionError:
        raise SpecError(text[:80], 0, "this is nested too deeply") from None
    made = expression.transformation
    if not isinstance(made, optax.GradientTransformation):
        raise SpecError(
            text,
            0,
            f"this gives {_kind(made)}, not an optimizer; write one such as adam(1e-3)",
        )
    return expression


_Place = tuple[ast.Call, str]
"""A number's call and argument."""


def _named(places: Mapping[_Place, Number]) -> Iterator[tuple[str, _Place]]:
    """Each number's shortest unambiguous name, in the order of the text."""
    calls = sorted({call for call, _ in places}, key=lambda call: call.col_offset)
    seen: collections.Counter[str] = collections.Counter()
    functions = {}
    for call in calls:
        function = _shown(call.func).rpartition(".")[2]
        seen[function] += 1
        functions[call] = function if seen[function] == 1 else f"{function}#{seen[function]}"
    uses = collections.Counter(argument for _, argument in places)
    for place in sorted(places, key=lambda place: place[0].col_offset):
        call, argument = place
        yield (argument if uses[argument] == 1 else f"{functions[call]}.{argument}"), place


class _Reader:
    """Turns one SPEC's syntax tree into values, and notes its `numbers` on the way."""

    def __init__(
        self, text: str, total_updates: int | None, replaced: Mapping[_Place, Any]
    ) -> None:
        self._text = text
        self._total_updates = total_updates
        self._replaced = replaced
        self.numbers: dict[_Place, Number] = {}

    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            if isinstance(node.value, (int, float, str, bool)) or node.value is None:
                return node.value
            raise self._error(node, f"{node.value!r} is not a number, string, True, False or None")
        if isinstance(node, ast.Call):
            if _is_live(node):
                raise self._misplaced(node)
            return self._call(node)
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._name(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self._number(node.operand)
        if isinstance(node, ast.BinOp):
            return self._arithmetic(node)
        if isinstance(node, ast.Tuple):
            return tuple(self.value(item) for item in node.elts)
        if isinstance(node, ast.List):
            return [self.value(item) for item in node.elts]
        if isinstance(node, ast.Dict):
            return {
                self._key(key, node): self.value(item)
                for key, item in zip(node.keys, node.values, strict=True)
            }
        raise self._error(
            node,
            "only names of optax, numbers, strings, lists, dicts and + - * / // can stand here",
        )

    def _key(self, node: ast.expr | None, whole: ast.Dict) -> Any:
        if not isinstance(node, ast.Constant):
            raise self._error(node or whole, "a key must be a number or a string")
        return self.value(node)

    def _call(self, node: ast.Call) -> Any:
        function = self.value(node.func)
        if not callable(function):
            raise self._error(node.func, f"{_shown(node.func)} cannot be called")
        for starred in [a for a in node.args if isinstance(a, ast.Starred)]:
            raise self._error(starred, "* is not understood here")
        arguments = [self._argument(argument) for argument in node.args]
        named = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self._error(keyword.value, "** is not understood here")
            named[keyword.arg] = self._argument(keyword.value)
        try:
            made = function(*arguments, **named)
            # Of inject_hyperparams(adam)(1e-3) the numbers stand in the state instead.
            if isinstance(made, optax.GradientTransformation) and not isinstance(
                node.func, ast.Call
            ):
                return self._with_numbers(node, function, made, arguments, named)
        except SpecError:
            raise
        except Exception as error:
            raise self._error(node, f"optax says: {error}") from None
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            if _is_live(argument):
                raise self._misplaced(argument)
        return made

    def _argument(self, node: ast.expr) -> Any:
        if not _is_live(node):
            return self.value(node)
        assert isinstance(node, ast.Call)
        value = self.value(node.args[0]) if len(node.args) == 1 and not node.keywords else None
        if not _is_number(value):
            raise self._error(node, "live takes one number, such as live(0.9)")
        return value

    def _with_numbers(
        self,
        node: ast.Call,
        function: Callable[..., Any],
        made: optax.GradientTransformation,
        arguments: list[Any],
        named: dict[str, Any],
    ) -> optax.GradientTransformation:
        """Note the call's numbers; `made` again, if some of them are replaced."""
        signature = inspect.signature(function)
        marks = signature.bind(
            *map(_is_live, node.args), **{str(k.arg): _is_live(k.value) for k in node.keywords}
        ).arguments
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        replaced = False
        for name, value in bound.arguments.items():
            follows = name == LEARNING_RATE and callable(value)
            if not follows and not _is_number(value):
                continue
            place, now = (node, name), value
            if place in self._replaced:
                replaced = True
                now = self._fitted(node, signature.parameters[name], value, self._replaced[place])
                bound.arguments[name] = now
            is_live = name == LEARNING_RATE or marks.get(name) is True
            self.numbers[place] = Number(float(now) if _is_number(now) else None, is_live)
        return function(*bound.args, **bound.kwargs) if replaced else made

    def _fitted(self, node: ast.Call, parameter: inspect.Parameter, own: Any, new: Any) -> Any:
        """`new` in place of `own`: of its kind."""
        if callable(own):
            return lambda count: jnp.where(jnp.isnan(new), own(count), new)
        if not isinstance(new, float) or not isinstance(own, int):
            return new
        if new.is_integer():
            return int(new)
        if parameter.annotation in (int, "int"):
            raise self._error(node, f"{parameter.name} must be a whole number, not {new}")
        return new

    def _name(self, node: ast.Name | ast.Attribute) -> Any:
        dotted = self._dotted(node).removeprefix("optax.")
        if dotted == TOTAL_UPDATES:
            if self._total_updates is None:
                raise self._error(node, f"there is no {TOTAL_UPDATES}: {ENDLESS}")
            return self._total_updates
        if dotted in EXTRA:
            return EXTRA[dotted]
        found: Any = optax
        for part in dotted.split("."):
            public = not part.startswith("_") and isinstance(found, types.ModuleType)
            found = getattr(found, part, None) if public else None
        if _is_function(found):
            return found
        near = difflib.get_close_matches(dotted, [*_names(), *EXTRA, TOTAL_UPDATES, LIVE], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise self._error(node, f"{dotted!r} is not a function of optax{hint}")

    def _dotted(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Attribute):
            return f"{self._dotted(node.value)}.{node.attr}"
        raise self._error(node, "a name of optax must stand before the dot")

    def _arithmetic(self, node: ast.BinOp) -> float:
        if type(node.op) not in _BINARY:
            raise self._error(node, "the operators are + - * / //")
        left, right = self._number(node.left), self._number(node.right)
        try:
            return _BINARY[type(node.op)](left, right)
        except (ZeroDivisionError, OverflowError) as error:
            raise self._error(node, str(error)) from None

    def _number(self, node: ast.expr) -> float:
        value = self.value(node)
        if _is_number(value):
            return value
        raise self._error(node, f"arithmetic takes numbers; this is {_kind(value)}")

    def _misplaced(self, node: ast.expr) -> SpecError:
        return self._error(
            node,
            "live marks a number argument of an optimizer's call, as in adam(1e-3, b1=live(0.9))",
        )

    def _error(self, node: ast.expr, what: str) -> SpecError:
        # The tree counts bytes of UTF-8, the caret counts characters.
        column = len(self._text.encode()[: node.col_offset].decode(errors="ignore"))
        return SpecError(self._text, column, what)


def _is_live(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == LIVE


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_function(found: Any) -> bool:
    return callable(found) and str(getattr(found, "__module__", "")).startswith("optax")


def _names() -> list[str]:
    return [n for n, found in vars(optax).items() if n[0] != "_" and _is_function(found)]


def _kind(value: Any) -> str:
    if callable(value) and not isinstance(value, optax.GradientTransformation):
        return f"a function, {getattr(value, '__name__', 'unnamed')}"
    try:
        return f"{type(value).__name__} {value!r}"
    except ValueError:  # Python does not write out numbers of thousands of digits
        return f"{type(value).__name__}"


def _shown(node: ast.expr) -> str:
    try:
        return ast.unparse(node)
    except ValueError:
        return "a number"

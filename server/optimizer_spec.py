"""Reads an --optimizer SPEC, such as `sgd(cosine_decay_schedule(0.1, total_updates))`.

The text is parsed as Python's syntax tree and put together from optax's own
public functions, literals, `total_updates` and arithmetic. It is never
evaluated: what is not in this list is refused, with a pointer at the character.
"""

from __future__ import annotations

import ast
import difflib
import operator
import types
from collections.abc import Callable
from typing import Any

import optax

from headwater.protos.errors import UsageError

TOTAL_UPDATES = "total_updates"

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


class SpecError(UsageError):
    """The SPEC cannot be read; the message shows it, with a caret under the place."""

    def __init__(self, spec: str, column: int, what: str) -> None:
        super().__init__(
            f"--optimizer, character {column + 1}: {what}\n    {spec}\n    {' ' * column}^"
        )


def parse(spec: str, total_updates: int) -> optax.GradientTransformation:
    """The optimizer that `spec` describes.

    Args:
      spec: For example "adamw(3e-4, weight_decay=0.1)". Names are those of
        optax, with or without `optax.` in front.
      total_updates: What the name `total_updates` stands for.

    Raises:
      SpecError: Something in it is neither a name in optax nor a literal, or
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
        made = _Reader(text, total_updates).value(tree.body)
    except RecursionError:
        raise SpecError(text[:80], 0, "this is nested too deeply") from None
    if not isinstance(made, optax.GradientTransformation):
        raise SpecError(
            text,
            0,
            f"this gives {_kind(made)}, not an optimizer; write one such as adam(1e-3)",
        )
    return made


class _Reader:
    """Turns one SPEC's syntax tree into values."""

    def __init__(self, text: str, total_updates: int) -> None:
        self._text = text
        self._total_updates = total_updates

    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            if isinstance(node.value, (int, float, str, bool)) or node.value is None:
                return node.value
            raise self._error(node, f"{node.value!r} is not a number, string, True, False or None")
        if isinstance(node, ast.Call):
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
        arguments = [self.value(argument) for argument in node.args]
        named = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self._error(keyword.value, "** is not understood here")
            named[keyword.arg] = self.value(keyword.value)
        try:
            return function(*arguments, **named)
        except Exception as error:
            raise self._error(node, f"optax says: {error}") from None

    def _name(self, node: ast.Name | ast.Attribute) -> Any:
        dotted = self._dotted(node).removeprefix("optax.")
        if dotted == TOTAL_UPDATES:
            return self._total_updates
        found: Any = optax
        for part in dotted.split("."):
            public = not part.startswith("_") and isinstance(found, types.ModuleType)
            found = getattr(found, part, None) if public else None
        if _is_function(found):
            return found
        near = difflib.get_close_matches(dotted, [*_names(), TOTAL_UPDATES], n=1)
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
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value
        raise self._error(node, f"arithmetic takes numbers; this is {_kind(value)}")

    def _error(self, node: ast.expr, what: str) -> SpecError:
        # The tree counts bytes of UTF-8, the caret counts characters.
        column = len(self._text.encode()[: node.col_offset].decode(errors="ignore"))
        return SpecError(self._text, column, what)


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

"""Others' texts and numbers, fit for one line of a terminal."""

from __future__ import annotations

from rich.cells import cell_len, set_cell_size

LONG_S = 10.0
"""From here on a time is told in seconds, below in milliseconds."""


def plain(text: str, encoding: str) -> str:
    """The text without what could steer a terminal, or what its encoding does not have.

    Another process chose it, and would choose the escape sequence in it, too.
    """
    shown = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
    return shown.encode(encoding, "replace").decode(encoding)


def cropped(text: str, cells: int, *, ascii_only: bool) -> str:
    """At most so many cells of it; a dot tells that there was more."""
    if cell_len(text) <= cells:
        return text
    return set_cell_size(text, cells - 1).rstrip() + ("." if ascii_only else "…")


def duration(seconds: float) -> str:
    """A time for people, to three figures or so: `0.3 ms`, `1,234 ms`, `65.2 s`."""
    return number(seconds, in_s=seconds >= LONG_S) + (" s" if seconds >= LONG_S else " ms")


def number(seconds: float, *, in_s: bool) -> str:
    """The number alone, of seconds or milliseconds."""
    value = seconds if in_s else seconds * 1000
    return f"{value:,.1f}" if value < 99.95 else f"{value:,.0f}"

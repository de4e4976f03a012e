"""The options of `headwater server` as keyword arguments of Python: one list, read from there."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import typer

from headwater.protos.errors import UsageError
from headwater.server.config import ServerConfig
from headwater.server.main import app

_FIELDS = {
    "grace": "grace_s",
    "lease_seconds": "lease_s",
    "session_timeout": "session_timeout_s",
    "ticket_timeout": "ticket_timeout_s",
}
"""Of ServerConfig, where they are called otherwise than the options."""

_OF_THE_COMMAND = ("task", "task_option", "examples", "platform")
"""Options that are none of ServerConfig."""


@dataclasses.dataclass(frozen=True)
class Keywords:
    """What was asked for, checked."""

    words: list[str]
    """For the command line."""

    fields: dict[str, Any]
    """For `ServerConfig`; only what was given."""


def read_keywords(caller: str, given: Mapping[str, Any], others: Collection[str] = ()) -> Keywords:
    """Options by the names that they have in Python: `batch_size` for --batch-size.

    Args:
      caller: Whose keywords they are, for errors.
      given: None, or False for a flag, is as if it was not given.
      others: The caller's own keywords, for whoever mistypes one.

    Raises:
      UsageError: There is no such option, or it cannot have that value; says which.
    """
    command: Any = typer.main.get_command(app)
    options = {p.name: p for p in command.params if p.name not in _OF_THE_COMMAND}
    words, fields = [], {}
    for name, value in given.items():
        if name not in options:
            raise UsageError(f"{caller} takes no {name!r}{meant(name, [*options, *others])}")
        flag = options[name].opts[0]
        if options[name].is_flag:
            if value not in (True, False, None):
                raise UsageError(f"{caller}: {name} is True or False, not {value!r}")
            words += [flag] if value else []
        elif value is not None:
            words.append(f"{flag}={value}")
    try:
        # With a task, which it cannot do without.
        parsed = command.make_context(caller, ["--task=task", *words]).params
    except typer.TyperException as error:
        raise UsageError(f"{caller}: {error.format_message()}") from None
    for name, value in given.items():
        if value is not None:
            fields[_FIELDS.get(name, name)] = parsed[name]
    if "run_dir" in fields:
        fields["run_dir"] = Path(fields["run_dir"])
    if "init" in fields:
        fields["init"] = str(Path(fields["init"]).absolute())
    ServerConfig(**fields)  # raises where a value cannot work
    return Keywords(words, fields)


def meant(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_").lower(), known, 1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return "; it takes the options of `headwater server`, with underscores: see --help there"

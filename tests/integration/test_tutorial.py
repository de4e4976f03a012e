"""docs/tutorial.md is run: its Python as one program, its shell lines as one session.

A block of `python` is a part of the program, and the `text` below it is what that part prints.
One whose first line is `# name.py` is a file that the reader saves. In a `console` block,
lines with `$` are typed and the others are shown; `…` stands for lines that are left out.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from headwater.client.processes import free_address
from kit.processes import HEADWATER
from kit.waiting import wait_for

PAGE = Path(__file__).parents[2] / "docs/tutorial.md"

MARK = "@@@"
"""Printed between the parts, so that each output is compared with its own block."""


class Block(NamedTuple):
    language: str
    text: str


FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [Block(*found) for found in FENCED.findall(PAGE.read_text())]
FILES = {
    found[1]: block.text
    for block in BLOCKS
    if (found := re.match(r"# (\w+\.py)\n", block.text)) and block.language == "python"
}

VARIES = [
    # What differs from run to run and from machine to machine; all else is compared.
    (r"127\.0\.0\.1:\d+", "ADDRESS"),
    (r"\d{8}-\d{6}-[0-9a-f]{4}", "RUN"),
    (r"[\d,]+(?= (?:gradients|updates)/s)", "RATE"),
    (r"\d+\.\d+(?= s\b)", "SECONDS"),
    (r"(?<=accuracy )0\.\d+", "SHARE"),  # compared by itself
    (r"(?m)^(version +)[\d,]+$", r"\1VERSION"),
    (r"(?m)^(staleness +)mean .*?max [012] .*$", r"\1BOUNDED"),
    (r"(?m)^(workers +\d+): .*$", r"\1"),
]
ACCURACY = 0.06
"""How far that of 1,000 digits may be from the page's: asynchronous runs differ."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a reader would be; with the page's files, and afterwards with no process in it."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    yield tmp_path
    for process in in_folder(tmp_path):
        process.kill()


def test_the_tutorial_prints_and_shows_what_it_says(folder: Path) -> None:
    parts, printed = program()
    typed, shown = shell_lines()
    (folder / "page.py").write_text(f"print({MARK!r})\n".join(parts))
    address = free_address("127.0.0.1")

    with (
        # Both at once, for each of them waits a lot.
        started([sys.executable, "page.py"], folder) as python,
        started(["/bin/bash", "-c", session(folder, typed, address)], folder, address) as shell,
    ):
        output, errors = python.communicate()
        assert python.returncode == 0, errors
        for part, got, expected in zip(parts, output.split(f"{MARK}\n"), printed, strict=True):
            assert got == expected, part

        output, errors = shell.communicate()
        *outputs, rest = re.split(rf"{MARK} (\d+)\n", output)
        assert outputs[1::2] == ["0"] * (len(typed) + 1), errors + output
        assert (rest, shell.returncode) == ("", 0)
        for command, output, lines in zip(typed, outputs[::2], shown, strict=False):
            assert_shows(output, lines, command)
    wait_for(lambda: not in_folder(folder), "nothing is left running")


def program() -> tuple[list[str], list[str]]:
    """The program's parts, and what the page says that each prints."""
    parts: list[str] = []
    printed: list[str] = []
    for language, text in BLOCKS:
        if language == "python" and text not in FILES.values():
            parts.append(text)
            printed.append("")
        elif language == "text":
            printed[-1] += text
    return parts, printed


def shell_lines() -> tuple[list[str], list[list[str]]]:
    """The lines that are typed, and what the page shows below each."""
    typed: list[str] = []
    shown: list[list[str]] = []
    for line in "".join(b.text for b in BLOCKS if b.language == "console").splitlines():
        if line.startswith("$ "):
            typed.append(line[2:])
            shown.append([])
        else:
            shown[-1].append(line)
    return typed, shown


def started(words: list[str], folder: Path, address: str = "") -> subprocess.Popen[str]:
    """A process in the folder, with one thread for XLA, which compiles each thing once for all."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HEADWATER")}
    changed = {
        "NPROC": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **({"HEADWATER_SERVER": address} if address else {}),
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(  # noqa: S603  (our own page)
        words, cwd=folder, env={**kept, **changed}, stdout=pipe, stderr=pipe, text=True
    )


def session(folder: Path, typed: list[str], address: str) -> str:
    """The lines as a script that says after each how it ended, and at last how the worker did.

    Its server has an address of its own, and to sleep is to wait until both workers train.
    """
    shim = folder / "bin/headwater"
    shim.parent.mkdir()
    real = shlex.quote(str(HEADWATER))
    shim.write_text(
        "#!/bin/sh\n"
        f'case $1 in server|run) set -- "$@" --listen {address};; esac\n'
        f'exec {real} "$@"\n'
    )
    shim.chmod(0o755)
    begin = (
        "PATH=$PWD/bin:$PATH\n"
        "sleep() { command sleep 2; for try in $(seq 60); do\n"
        "  headwater status 2>&1 | grep -q 'workers *2: ' && return; command sleep 0.3\n"
        "done; return 1; }\n"
    )
    said = [f"{line}\necho {MARK} $?\nlast=$!\n" for line in typed]
    said.append(f"wait $last\necho {MARK} $?\n")
    return begin + "".join(said)


def assert_shows(output: str, lines: list[str], command: str) -> None:
    """The lines are those of the output, but for what varies and what `…` stands for."""
    got = [line.rstrip() for line in output.splitlines()]
    pattern = "".join(
        r"(?:.*\n)*" if line == "…" else re.escape(f"{alike(line)}\n") for line in lines
    )
    seen = alike("".join(f"{line}\n" for line in got))
    assert re.fullmatch(pattern, seen), f"$ {command}\n{output}\nis not\n" + "\n".join(lines)
    if any(line.startswith("evaluation") for line in lines):
        assert accuracy(output) == pytest.approx(accuracy("\n".join(lines)), abs=ACCURACY), command


def alike(text: str) -> str:
    """The text without what varies."""
    for pattern, name in VARIES:
        text = re.sub(pattern, name, text)
    return text


def accuracy(text: str) -> float:
    """That of the evaluation at the end."""
    (found,) = re.findall(r"^evaluation  accuracy (\S+)", text, re.MULTILINE)
    return float(found)


def in_folder(folder: Path) -> list[psutil.Process]:
    """The processes that run there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()) == folder:
                found.append(process)
    return found

"""A server or a worker tells the C library how to treat large blocks, unless its user has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from headwater.client.memory import tuning
from kit import counting
from kit.lives import Lives

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc, and glibc")


def test_what_the_user_set_is_left_alone() -> None:
    assert tuning({"GLIBC_TUNABLES": "glibc.malloc.check=3"}) == {}
    assert tuning({"MALLOC_ARENA_MAX": "2"}) == {}


def test_what_is_tuned_is_not_tuned_again() -> None:
    assert tuning(tuning({})) == {}


@linux
@pytest.mark.parametrize("users", [None, "glibc.malloc.check=3"], ids=["tuned", "users"])
def test_a_server_is_tuned_and_keeps_its_pid(users: str | None, tmp_path: Path) -> None:
    with Lives(tmp_path, counting.options(examples=8)) as lives:
        server = lives.start(**{} if users is None else {"GLIBC_TUNABLES": users})
        expected = users or tuning({})["GLIBC_TUNABLES"]
        # glibc cuts its own copy at each colon as it reads it.
        found = _environment(server.process.pid)["GLIBC_TUNABLES"]
        assert found == expected.split(":")[0] or found == expected


@linux
def test_it_begins_again_once_even_where_the_variable_does_not_stay(tmp_path: Path) -> None:
    code = (
        "import os; os.environ.pop('GLIBC_TUNABLES', None); from headwater.client import memory; "
    )
    code += "memory.tune(); print('on it goes')"
    done = subprocess.run(  # noqa: S603  (our own code)
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "on it goes\n"


def _environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)

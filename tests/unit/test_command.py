"""What every command does alike: exit statuses, lines on stderr, its parent's pipes."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from headwater.protos import command
from headwater.protos.errors import (
    HeadwaterError,
    Reason,
    Refused,
    RunFailed,
    Unreachable,
    UsageError,
)
from headwater.worker.user_code import UserCodeError


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    logger = logging.getLogger("headwater")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def status_of(body: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of a command that does `body`."""
    app = command.new_app()

    @app.command()
    def main(count: int = 1) -> Any:
        """Do one thing."""
        return body()

    monkeypatch.setattr(sys, "argv", ["headwater test", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.run(app, "headwater test")
    assert type(ended.value.code) is int
    return ended.value.code


def raising(error: BaseException) -> Callable[[], Any]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (HeadwaterError("no disk left"), 1),
        (UsageError("no disk left"), 2),
        (Unreachable("no disk left"), 3),
        (RunFailed("no disk left"), 1),
        (UserCodeError("no disk left"), 1),
        (Refused(Reason.TASK_MISMATCH, "no disk left"), 2),
        (Refused(Reason.LAYOUT_MISMATCH, "no disk left"), 2),
        (Refused(Reason.UNKNOWN_WORKER, "no disk left"), 2),
        (Refused(Reason.PROTOCOL_MISMATCH, "no disk left"), 2),
        (Refused(Reason.EVICTED, "no disk left"), 1),
        (Refused(Reason.SILENT, "no disk left"), 1),
        (Refused(Reason.OLD_INCARNATION, "no disk left"), 1),
    ],
    ids=lambda value: (
        getattr(getattr(value, "reason", None), "name", None)
        or (type(value).__name__ if isinstance(value, Exception) else None)
    ),
)
def test_an_error_of_ours_is_one_line_on_stderr_and_its_own_exit_status(
    error: HeadwaterError,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert status_of(raising(error), monkeypatch) == status

    assert capsys.readouterr() == ("", "headwater test: error: no disk left\n")


def test_the_users_traceback_follows_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = UserCodeError("the task raised\nTraceback (most recent call last):\nKeyError: 'x'")

    assert status_of(raising(error), monkeypatch) == 1

    assert capsys.readouterr().err == f"headwater test: error: {error}\n"


def test_a_command_that_does_its_work_ends_with_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(lambda: print("done"), monkeypatch) == 0
    assert capsys.readouterr() == ("done\n", "")


@pytest.mark.parametrize(
    ("body", "status"),
    [(lambda: 7, 7), (lambda: "text", 0), (raising(typer.Exit(4)), 4), (raising(typer.Exit()), 0)],
    ids=["a number returned", "text returned", "Exit(4)", "Exit"],
)
def test_a_command_may_choose_its_exit_status(
    body: Callable[[], Any], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert status_of(body, monkeypatch) == status


def test_ctrl_c_ends_with_130_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(raising(KeyboardInterrupt()), monkeypatch) == command.INTERRUPTED == 130
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--count", "many"], "Invalid value for '--count'"),
        (["--size", "3"], "No such option: --size"),
        (["--count"], "Option '--count' requires an argument"),
        (["more"], "Got unexpected extra argument"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_where_help_is(
    arguments: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert status_of(lambda: None, monkeypatch, *arguments) == 2

    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"headwater test: error: {complaint}")
    assert line.endswith(" (see headwater test --help)")


def test_help_is_plain_text_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(lambda: None, monkeypatch, "--help") == 0

    out, err = capsys.readouterr()
    assert err == ""
    assert "Usage: headwater test [OPTIONS]" in out
    assert "Do one thing." in out
    assert "\x1b" not in out
    assert "--install-completion" not in out


def test_a_bug_of_ours_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    app = command.new_app()

    @app.command()
    def main() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["headwater test"])
    with pytest.raises(ZeroDivisionError):
        command.run(app, "headwater test")


def test_log_lines_name_the_time_and_the_command_and_the_level_above_info(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        log = logging.getLogger("headwater.worker")
        log.debug("not said")
        log.info("joined as worker %d", 3)
        log.warning("the server is slow")
        log.error("100% lost")

    assert status_of(body, monkeypatch) == 0

    out, err = capsys.readouterr()
    assert out == ""
    assert re.sub(r"(?m)^\d\d:\d\d:\d\d ", "TIME ", err) == textwrap.dedent(
        """\
        TIME headwater test: joined as worker 3
        TIME headwater test: warning: the server is slow
        TIME headwater test: error: 100% lost
        """
    )


def test_another_command_in_the_same_process_says_nothing_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        status_of(lambda: logging.getLogger("headwater").info("hello"), monkeypatch)

    assert capsys.readouterr().err.count("hello") == 2


# ------------------------------------------------------------- a reader that has had enough

PRINTS = """
    from headwater.protos import command
    app = command.new_app()

    @app.command()
    def main(lines: int) -> None:
        for line in range(lines):
            print(line)

    command.run(app, "headwater test")
"""


def status_of_prints(lines: int, stdout: int) -> tuple[int, str]:
    """Exit status and stderr of a command that prints so many lines to a descriptor."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(  # noqa: S603  (our own text)
        [sys.executable, "-c", textwrap.dedent(PRINTS), str(lines)],
        env=buffered,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


def status_when_nobody_reads(lines: int) -> tuple[int, str]:
    """The same of one whose stdout is closed at the other end."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return status_of_prints(lines, writer)
    finally:
        os.close(writer)


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    assert status_when_nobody_reads(lines=3) == (0, "")


def test_a_reader_that_leaves_in_the_middle_is_no_error() -> None:
    assert status_when_nobody_reads(lines=10_000) == (0, "")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file or directory", "runs/a"), "runs/a"),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe"),  # a process of ours, say
    ],
)
def test_an_error_of_the_system_is_not_said_to_be_one_of_the_output(
    error: OSError,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert status_of(raising(error), monkeypatch) == 1

    out, err = capfd.readouterr()
    assert (out, err) == ("", f"headwater test: error: {error}\n")
    assert message in err


@pytest.mark.parametrize("lines", [3, 10_000])
def test_an_output_that_cannot_be_written_is_said_to_be_so(lines: int) -> None:
    with Path("/dev/full").open("wb") as full:
        status, errors = status_of_prints(lines, full.fileno())

    assert status == 1
    assert errors == (
        "headwater test: error: the output could not be written: "
        "[Errno 28] No space left on device\n"
    )


# ------------------------------------------------------------- its parent's pipes


def test_the_end_of_the_lifeline_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    lifeline, parents = os.pipe()
    ended = threading.Event()
    monkeypatch.setenv(command.LIFELINE_ENV, str(lifeline))
    try:
        command.watch_lifeline(ended.set)
        os.write(parents, b"still here")
        assert not ended.wait(0.05)
    finally:
        os.close(parents)

    assert ended.wait(10)
    os.close(lifeline)


def test_the_lifeline_is_not_handed_to_processes_of_our_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lifeline, parents = os.pipe()
    ended = threading.Event()
    monkeypatch.setenv(command.LIFELINE_ENV, str(lifeline))

    command.watch_lifeline(ended.set)

    assert command.LIFELINE_ENV not in os.environ
    os.close(parents)
    assert ended.wait(10)
    os.close(lifeline)


def test_a_command_that_a_person_started_has_no_lifeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(command.LIFELINE_ENV, raising=False)
    before = threading.active_count()

    command.watch_lifeline(lambda: None)

    assert threading.active_count() == before


def test_a_server_says_where_it_listens_on_the_ready_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setenv(command.READY_ENV, str(writer))

    command.announce_ready({"address": "127.0.0.1:50051", "run_dir": "runs/Öl-1"})

    with os.fdopen(reader) as pipe:  # to its end: the other side is closed
        assert json.loads(pipe.read()) == {"address": "127.0.0.1:50051", "run_dir": "runs/Öl-1"}
    assert command.READY_ENV not in os.environ


def test_a_server_that_nobody_asked_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(command.READY_ENV, raising=False)
    command.announce_ready({"address": "127.0.0.1:50051"})


def test_a_server_whose_parent_has_gone_serves_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setenv(command.READY_ENV, str(writer))

    command.announce_ready({"address": "127.0.0.1:50051"})


def test_nothing_of_a_traceback_is_shown_for_an_error_of_ours(tmp_path: Path) -> None:
    """In a real process, as a person sees it."""
    script = """
        from headwater.protos import command
        from headwater.protos.errors import UsageError
        app = command.new_app()

        @app.command()
        def main() -> None:
            try:
                {}["x"]
            except KeyError as error:
                raise UsageError("no such name; write another") from error

        command.run(app, "headwater test")
    """
    done = subprocess.run(  # noqa: S603  (our own text)
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "headwater test: error: no such name; write another\n"

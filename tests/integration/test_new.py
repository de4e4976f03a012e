"""`headwater new` writes a task that trains as it is."""

from __future__ import annotations

import re
from pathlib import Path

from kit.processes import FREE_PORT, run


def test_what_it_writes_checks_and_trains_by_the_lines_it_prints(tmp_path: Path) -> None:
    done = run("new", "mine.py", cwd=tmp_path)

    assert done.status == 0, done.errors
    check, train = (line.split()[1:] for line in done.output.splitlines() if "headwater " in line)
    checked = run(*check, cwd=tmp_path)
    assert checked.status == 0, checked.errors
    trained = run(*train, "--run-dir", "run", *FREE_PORT, cwd=tmp_path)
    assert trained.status == 0, trained.errors
    (accuracy,) = re.findall(r"evaluation +accuracy ([\d.]+)", trained.output + trained.errors)
    assert float(accuracy) > 0.97


def test_its_comments_name_the_file(tmp_path: Path) -> None:
    run("new", "mine.py", cwd=tmp_path)

    text = (tmp_path / "mine.py").read_text()
    assert "headwater run --task mine.py" in text
    assert "starter" not in text


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("precious = True\n")

    done = run("new", "mine.py", cwd=tmp_path)

    assert (done.status, done.output) == (2, "")
    assert "mine.py is there already, and is not overwritten" in done.errors
    assert (tmp_path / "mine.py").read_text() == "precious = True\n"


def test_where_nothing_can_be_written_it_says_so(tmp_path: Path) -> None:
    done = run("new", "nowhere/mine.py", cwd=tmp_path)

    assert done.status == 2
    assert "nowhere/mine.py cannot be written: No such file or directory" in done.errors
    assert "name it mine.py" in run("new", "mine", cwd=tmp_path).errors

"""The pages say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from headwater import __version__
from headwater.client import commands
from headwater.protos.errors import Reason
from headwater.server.check import check_task
from headwater.worker.load import load_task
from headwater.worker.optimizer_spec import parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_protocols_page_has_every_reason_of_a_refusal() -> None:
    page = (ROOT / "docs/protocol.md").read_text()

    rows = re.findall(r"^\| ([A-Z_]+) \| ([A-Z_]+) \| (.*) \|$", page, re.MULTILINE)

    assert rows == [(r.name, r.code.name, r.meaning) for r in Reason]


def test_the_proto_names_every_reason() -> None:
    contract = (ROOT / "protos/parameter_server.proto").read_text()

    assert [r.name for r in Reason if not re.search(rf"\b{r.name}\b", contract)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_a_page_exists(page: Path) -> None:
    known = set(typer.main.get_command(commands.app).commands)  # type: ignore[attr-defined]

    named = re.findall(r"(?:^|`|\$ )headwater ([a-z]+)", page.read_text(), re.MULTILINE)

    assert set(named) - known == set()


def test_the_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text()

    assert [c for c in typer.main.get_command(commands.app).commands if c not in readme] == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_in_a_page_exists(page: Path) -> None:
    sources = [*ROOT.glob("*/main.py"), *ROOT.glob("client/*.py"), *ROOT.glob("worker/*.py")]
    sources += [ROOT / "server/check.py", ROOT / "server/replay.py", ROOT / "benchmarks/run.py"]
    code = "".join(path.read_text() for path in sources)

    named = set(re.findall(r"`?headwater [^`\n]*?(--[a-z-]+)", page.read_text()))

    # An option is written out, or made by typer from its parameter's name.
    unknown = {n for n in named if n not in code and n[2:].replace("-", "_") not in code}
    assert unknown == set()


def test_the_readmes_task_can_be_trained(tmp_path: Path) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    path = tmp_path / "line.py"
    path.write_text(source)

    report = check_task(load_task(str(path)))

    assert report.tensors == {"b": "float32[]", "w": "float32[8]"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_spec_in_a_page_is_an_optimizer(page: Path) -> None:
    for spec in re.findall(r"--optimizer '([^']+)'", page.read_text()):
        parse(spec, total_updates=100)


def test_continuous_integration_runs_what_the_readme_says() -> None:
    steps = re.findall(r"^make \w+", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    readme = (ROOT / "README.md").read_text()

    assert steps == ["make lint", "make test"]
    assert re.search(r"^    make test ", readme, re.MULTILINE)


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert versions[0] == __version__

"""The wheel: it holds all of Headwater and nothing else, and works away from the clone."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.numpy import load_file

import headwater

ROOT = Path(__file__).parents[2]
NOT_INSTALLED = {"tests", "benchmarks"}
MADE = {"build", "dist", "runs"}


def run(*command: str | Path, cwd: Path, timeout_s: float = 60) -> str:
    """Run `command` and return what it printed; it must succeed in time.

    In a session of its own, so that what it started ends with it, and without
    the variables by which this interpreter could leak into it.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HEADWATER"))}
    process = subprocess.Popen(  # noqa: S603, commands of this file
        [str(word) for word in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{command} took over {timeout_s} s and printed:\n{process.communicate()[0]}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{command} exited {process.returncode}:\n{output}"
    return output


def python_folders() -> list[Path]:
    """The folders at the root that hold Python and belong to the product."""
    return [
        folder
        for folder in sorted(ROOT.iterdir())
        if folder.is_dir()
        and not folder.name.startswith(".")
        and folder.name not in NOT_INSTALLED | MADE | {"src"}
        and not (folder / "pyvenv.cfg").exists()
        and any(folder.rglob("*.py"))
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Of a copy: setuptools leaves files beside the sources, and would put what an
    # earlier build left there into the wheel.
    source = tmp_path_factory.mktemp("source")
    for folder in (*python_folders(), ROOT / "src"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(folder, source / folder.name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = tmp_path_factory.mktemp("wheel")
    quietly = ("--quiet", "--disable-pip-version-check", "--no-index")
    how = ("--no-deps", "--no-build-isolation", "--wheel-dir", built)
    run(sys.executable, "-m", "pip", "wheel", *quietly, *how, source, cwd=built)
    (path,) = built.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_of_the_clone_and_no_other(wheel: Path) -> None:
    places = {ROOT / "src/headwater": Path("headwater")}
    places |= {folder: Path("headwater") / folder.name for folder in python_folders()}
    expected = {
        str(place / path.relative_to(folder))
        for folder, place in places.items()
        for path in folder.rglob("*.py")
    }
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name.partition("/")[0] for name in names} == {
        "headwater",
        f"headwater-{headwater.__version__}.dist-info",
    }


def test_the_wheel_holds_the_contract_the_types_and_the_license(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= {
        "headwater/py.typed",
        "headwater/protos/parameter_server.proto",
        "headwater/protos/parameter_server_pb2.pyi",
        f"headwater-{headwater.__version__}.dist-info/licenses/LICENSE",
    }


def test_the_wheels_version_and_page_are_the_packages(wheel: Path) -> None:
    info = f"headwater-{headwater.__version__}.dist-info/METADATA"
    metadata = message_from_bytes(zipfile.ZipFile(wheel).read(info))
    assert metadata["Version"] == headwater.__version__
    assert metadata.get_payload(decode=True) == (ROOT / "README.md").read_bytes()


class Installed(NamedTuple):
    bin: Path
    elsewhere: Path  # where a user works; not the clone


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    (site,) = (home / "lib").glob("python*/site-packages")
    quietly = ("--quiet", "--disable-pip-version-check", "--no-index")
    pip = (sys.executable, "-m", "pip", "--python", home / "bin/python")
    run(*pip, "install", *quietly, "--no-deps", wheel, cwd=home)
    # The dependencies of the running environment, after the wheel. Not by
    # site.addsitedir, which would take its editable Headwater along.
    paths = sysconfig.get_paths()
    (site / "dependencies.pth").write_text(f"{paths['purelib']}\n{paths['platlib']}\n")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    # Users have folders of these names; neither may hide the other.
    for name in ("client", "protos", "server", "worker"):
        (elsewhere / name).mkdir()
        (elsewhere / name / "__init__.py").write_text("raise ImportError('the wrong module')\n")
    return Installed(home / "bin", elsewhere)


def test_the_installed_package_is_the_wheels(installed: Installed) -> None:
    show = "import headwater.server, headwater.protos; print(headwater.server.__file__)"
    where = Path(run(installed.bin / "python", "-c", show, cwd=installed.elsewhere).strip())
    assert where.is_relative_to(installed.bin.parent)


def test_the_installed_command_helps(installed: Installed) -> None:
    output = run(installed.bin / "headwater", "--help", cwd=installed.elsewhere)
    for command in ("server", "worker", "run", "status"):
        assert f" {command} " in output


def test_the_installed_command_trains(installed: Installed) -> None:
    # The default port may be taken between the look at it and the server's start.
    task = ("--task", "headwater.examples.mnist", "--epochs", "1", "--listen", "127.0.0.1:0")
    output = run(
        installed.bin / "headwater", "run", *task, "--workers", "1", cwd=installed.elsewhere
    )
    assert "accuracy" in output
    weights = load_file(installed.elsewhere / "runs/latest/weights.safetensors")
    assert weights["hidden/kernel"].shape == (784, 64)

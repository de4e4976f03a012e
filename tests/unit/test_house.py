"""The structure of the house: who imports whom, and what stays unloaded.

Each rule is a function from source text to what breaks it, so that the tests
can also show that a breach is seen.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import headwater

ROOT = Path(__file__).parents[2]
FOLDERS = ("client", "examples", "protos", "server", "worker")

_API = tuple(f"headwater.{name}" for name in headwater.__all__)
_TASK_API = tuple(
    f"headwater.worker.{room}"
    for room in (
        "task",
        "backend",
        "data",
        "tree",
        "load",
        "options",
        "platform",
        "user_code",
        "optimizer_spec",
        "compute",
        "delayed_nesterov",
        "compression",  # of what its workers send, and get
        "local_steps",  # checked when the server starts, for its workers
    )
)

ARROWS = {
    "headwater": ("headwater",),  # all of it on first use; another test holds the laziness
    "headwater.protos": ("headwater.protos",),
    "headwater.worker": ("headwater.worker", "headwater.protos"),
    # A program leads its training: the server runs in it, the workers are its processes.
    "headwater.worker.keras_worker": (
        *("headwater.worker", "headwater.protos", "headwater.client", "headwater.server"),
    ),
    "headwater.worker.keras_steps": (
        *("headwater.worker", "headwater.protos", "headwater.client", "headwater.server"),
    ),
    "headwater.worker.torch_worker": ("headwater.worker", "headwater.protos", "headwater.client"),
    "headwater.server": ("headwater.server", "headwater.protos", *_TASK_API),
    # Both sides in one process, without a server.
    "headwater.server.check": ("headwater.server", "headwater.protos", "headwater.worker"),
    "headwater.server.replay": ("headwater.server", "headwater.protos", "headwater.worker"),
    "headwater.server.recompute": ("headwater.server", "headwater.protos", "headwater.worker"),
    "headwater.server.here": ("headwater.server", "headwater.protos", "headwater.worker"),
    "headwater.client": ("headwater.client", "headwater.protos"),
    # Whoever calls it has a Task, and so JAX: it hands the task over, and may train here.
    "headwater.client.fit": (
        *("headwater.client", "headwater.protos"),
        *("headwater.server.here", "headwater.server.keywords"),
        *("headwater.worker.handed", "headwater.worker.load", "headwater.worker.task"),
    ),
    "headwater.examples": (
        *(*_API, "headwater.examples"),
        *("headwater.worker.keras_worker", "headwater.worker.torch_worker"),
    ),
    # What anybody can do who has the .proto.
    "headwater.examples.numpy_worker": ("headwater.protos.parameter_server_pb2",),
}
"""What of Headwater a module may import; the longest entry that fits the module holds."""

_FRAMEWORKS = ("jax", "jaxlib", "equinox", "flax", "haiku", "keras", "optax", "tensorflow", "torch")
_WORLD = (
    *("asyncio", "concurrent", "multiprocessing", "queue", "subprocess", "threading"),
    *("datetime", "random", "secrets", "time", "uuid"),
    *("grpc", "io", "logging", "os", "pathlib", "socket", "sys"),
)

SHUNNED = {
    # `headwater status` must answer at once.
    "headwater.client": _FRAMEWORKS,
    "headwater.protos": _FRAMEWORKS,
    # State machines: same calls in, same state out, without I/O, threads or a clock.
    "headwater.server.admission": (*_FRAMEWORKS, *_WORLD),
    "headwater.server.acknowledgements": (*_FRAMEWORKS, *_WORLD),
    "headwater.server.ledger": (*_FRAMEWORKS, *_WORLD),
    "headwater.server.push_sessions": (*_FRAMEWORKS, *_WORLD),
}
"""What else a module may not import."""

EXTRAS = ("equinox", "flax", "haiku", "keras", "tensorflow", "torch")
"""Libraries that come with an extra: for its adapter, worker/<library>_*.py, and examples alone."""


def imports(source: str) -> Iterator[str]:
    """The dotted names that `source` imports, at any depth: `from a import b` is "a.b"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def breaches(module: str, source: str) -> list[str]:
    """What `module` imports against ARROWS and SHUNNED, sorted."""
    arrow = max((place for place in ARROWS if within(module, (place,))), key=len)
    allowed = ("headwater.__version__", *ARROWS[arrow])
    shunned = [name for place in SHUNNED if within(module, (place,)) for name in SHUNNED[place]]
    return sorted(
        name
        for name in imports(source)
        if name.startswith(".")
        or (within(name, ("headwater",)) and not within(name, allowed))
        or within(name, tuple(shunned))
        or (within(name, EXTRAS) and not may_use_extra(module, name.partition(".")[0]))
    )


def may_use_extra(module: str, library: str) -> bool:
    adapter = module.startswith(f"headwater.worker.{library}_")
    return adapter or within(module, ("headwater.examples",))


def bare_imports(source: str) -> list[str]:
    """Imports of our folders by their bare names, which would make second copies."""
    return sorted(name for name in imports(source) if within(name, FOLDERS))


_OURS = f"(?:{'|'.join(FOLDERS)})"
_BARE_LINE = re.compile(
    rf"^\s*(?:>>> )?(?:from {_OURS}[.\w]* import |import {_OURS}\b).*", re.MULTILINE
)


def bare_lines(page: str) -> list[str]:
    """The same, in a page of documentation."""
    return [line.strip() for line in _BARE_LINE.findall(page)]


def modules() -> dict[str, Path]:
    """Every module that gets installed, by its name, but for generated code."""
    places = {"headwater": ROOT / "src/headwater"}
    places |= {f"headwater.{folder}": ROOT / folder for folder in FOLDERS}
    found = {}
    for package, folder in places.items():
        for path in folder.rglob("*.py"):
            inner = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *inner)).removesuffix(".__init__")
            if not name.endswith("_pb2"):
                found[name] = path
    return found


def test_imports_follow_the_arrows() -> None:
    found = {name: breaches(name, path.read_text()) for name, path in modules().items()}
    assert len(found) > len(FOLDERS)
    assert {name: broken for name, broken in found.items() if broken} == {}


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("headwater.protos.wire", "from headwater.protos import layout", []),
        ("headwater.protos.wire", "import headwater.worker.tree", ["headwater.worker.tree"]),
        ("headwater.protos.layout", "import jax.numpy", ["jax.numpy"]),
        ("headwater.worker.loop", "from headwater import __version__", []),
        ("headwater.worker.loop", "from headwater import server", ["headwater.server"]),
        ("headwater.worker.loop", "from headwater import Client", ["headwater.Client"]),
        ("headwater.worker.loop", "from .task import Task", [".task.Task"]),
        ("headwater.worker.keras_worker", "from headwater.client.client import Client", []),
        ("headwater.worker.keras_task", "import keras.src.models", []),
        ("headwater.worker.loop", "import keras.src.models", ["keras.src.models"]),
        ("headwater.worker.keras_task", "import torch", ["torch"]),
        ("headwater.server.store", "from headwater.worker.task import Task", []),
        (
            "headwater.server.store",
            "def f():\n    from headwater.worker.loop import run",
            ["headwater.worker.loop.run"],
        ),
        ("headwater.server.store", "import headwater", ["headwater"]),
        ("headwater.server.ledger", "import heapq, time", ["time"]),
        ("headwater.server.admission", "from os import urandom", ["os.urandom"]),
        ("headwater.client", "import numpy", []),
        ("headwater.client.run", "import optax", ["optax"]),
        ("headwater.client.run", "import headwater.server.main as m", ["headwater.server.main"]),
        ("headwater.examples.mnist", "from headwater import ArrayData, Task", []),
        (
            "headwater.examples.mnist",
            "from headwater.worker.task import Task",
            ["headwater.worker.task.Task"],
        ),
    ],
)
def test_a_breach_of_the_arrows_is_seen(module: str, source: str, broken: list[str]) -> None:
    assert breaches(module, source) == broken


def test_nothing_imports_our_folders_by_their_bare_names() -> None:
    code = {path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    found = {path: bare_imports(path.read_text()) for path in {*modules().values(), *code}}
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    found |= {path: bare_lines(path.read_text()) for path in pages}
    assert Path(__file__) in found
    assert {str(path): bare for path, bare in found.items() if bare} == {}


@pytest.mark.parametrize(
    ("source", "bare"),
    [
        ("import server", ["server"]),
        ("import numpy, worker.task as task", ["worker.task"]),
        ("if True:\n    from protos import wire", ["protos.wire"]),
        ("from headwater import server\nimport headwater.client\nimport servers", []),
    ],
)
def test_a_bare_name_in_code_is_seen(source: str, bare: list[str]) -> None:
    assert bare_imports(source) == bare


@pytest.mark.parametrize(
    ("page", "bare"),
    [
        ("Then:\n\n    import client\n", ["import client"]),
        ("```python\n>>> from worker.task import Task\n```", [">>> from worker.task import Task"]),
        ("    from headwater import Task\n\nWeights go back\nfrom server to worker.", []),
    ],
)
def test_a_bare_name_in_a_page_is_seen(page: str, bare: list[str]) -> None:
    assert bare_lines(page) == bare


def loaded_by(code: str) -> set[str]:
    """The modules that a new interpreter has loaded after `code`, which may exit."""
    watched = (
        f"import json, sys\ntry:\n    exec({code!r})\n"
        "finally:\n    json.dump([*sys.modules], sys.stderr)"
    )
    done = subprocess.run(  # noqa: S603, the code is this file's own
        [sys.executable, "-c", watched], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr))


def test_what_an_interpreter_loads_is_seen() -> None:
    loaded = loaded_by("import headwater.worker.task\nsys.exit(0)")
    assert {"headwater", "headwater.worker.task", "jax", "numpy"} <= loaded


def test_importing_headwater_loads_no_library() -> None:
    loaded = loaded_by("import headwater\ndir(headwater)\nheadwater.__version__")
    assert "headwater" in loaded
    assert loaded & {"cloudpickle", "jax", "grpc", "numpy", "google.protobuf", "typer"} == set()


HEAVY = {*_FRAMEWORKS, "cloudpickle", "headwater.server", "headwater.worker"}


def test_the_client_loads_neither_jax_nor_the_other_two() -> None:
    names = [name for name in modules() if within(name, ("headwater.client",))]
    loaded = loaded_by("\n".join(f"import {name}" for name in names))
    assert "headwater.client.main" in loaded
    assert loaded & HEAVY == set()


def test_the_commands_help_loads_no_jax() -> None:
    loaded = loaded_by(
        "sys.argv = ['headwater', '--help']\nfrom headwater.client.main import main\nmain()"
    )
    assert "headwater.client.main" in loaded
    assert loaded & HEAVY == set()


def test_looking_at_a_run_loads_no_framework() -> None:
    loaded = loaded_by(
        "import headwater\nsys.argv = ['headwater', 'status', '--help']\n"
        "from headwater.client.main import main\nmain()"
    )
    assert "headwater.client.main" in loaded
    assert loaded & HEAVY == set()


def test_workers_and_servers_of_jax_tasks_load_no_torch() -> None:
    loaded = loaded_by(
        "import headwater.worker.loop, headwater.worker.main, headwater.server.serve"
    )
    assert {"jax", "headwater.worker.backend", "headwater.server.prepare"} <= loaded
    assert "torch" not in loaded


def test_a_history_is_surveyed_before_jax_starts() -> None:
    loaded = loaded_by("import headwater.server.replay")
    assert {"headwater.server.survey", "headwater.server.likeness"} <= loaded
    assert loaded & set(_FRAMEWORKS) == set()


@pytest.mark.parametrize("name", headwater.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(headwater, name) is not None
    assert name in dir(headwater)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'headwater' has no attribute 'Sever'"):
        headwater.Sever  # type: ignore[attr-defined]  # noqa: B018


def test_type_checkers_are_told_where_the_lazy_names_live() -> None:
    told = set(imports((ROOT / "src/headwater/__init__.py").read_text()))
    told = {name for name in told if within(name, ("headwater",))}
    lazy = set(headwater.__all__) - {"__version__"}
    homes = {name: getattr(headwater, name) for name in lazy}
    assert told == {f"{homes[name].__module__}.{name}" for name in lazy}
    assert all(getattr(importlib.import_module(h.__module__), n) is h for n, h in homes.items())

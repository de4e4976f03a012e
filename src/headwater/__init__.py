"""A parameter server for JAX: workers push gradients, the server applies optax.

    from headwater import ArrayData, Client, Server, Task, fit

Importing this package loads nothing else: JAX, gRPC and NumPy come with the
first name that needs them, so that `headwater status` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "ArrayData",
    "Client",
    "Generated",
    "Server",
    "Task",
    "__version__",
    "fit",
    "from_items",
]

_HOMES = {
    "ArrayData": "headwater.worker.data",
    "Client": "headwater.client.client",
    "Generated": "headwater.worker.data",
    "Server": "headwater.server.embedded",
    "Task": "headwater.worker.task",
    "fit": "headwater.client.fit",
    "from_items": "headwater.worker.data",
}

if TYPE_CHECKING:
    from headwater.client.client import Client
    from headwater.client.fit import fit
    from headwater.server.embedded import Server
    from headwater.worker.data import ArrayData, Generated, from_items
    from headwater.worker.task import Task
else:
    # Hidden from type checkers, which would take any name to be there.
    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value  # this function is not asked again
        return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))

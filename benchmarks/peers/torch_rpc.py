"""PyTorch RPC: a process that holds the parameters and steps the optimizer where it is called.

After PyTorch's tutorials "Implementing a Parameter Server Using Distributed RPC
Framework" and "Implementing Batch RPC Processing": one rpc_sync pushes a gradient
and returns the parameters. Asynchronous, under a lock; the parameters are not
copied before they are sent. TensorPipe chooses shared memory by itself; `tcp` is
what it does between machines.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from torch import multiprocessing
from torch.distributed import rpc

from benchmarks.peers import work

TRANSPORTS: dict[str, dict[str, Any]] = {
    "shm": {},
    "tcp": {"_transports": ["uv"], "_channels": ["basic"]},
}
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=work.LEARNING_RATE),
    "adam": lambda params: torch.optim.Adam(params, lr=work.LEARNING_RATE),
    "fused adam": lambda params: torch.optim.Adam(params, lr=work.LEARNING_RATE, fused=True),
}


class ParameterServer:
    """Lives in rank 0; the workers call `push` on it."""

    def __init__(self, weights: list[torch.Tensor], optimizer: str) -> None:
        self.params = [torch.nn.Parameter(weight) for weight in weights]
        self.optimizer = OPTIMIZERS[optimizer](self.params)
        self.lock = threading.Lock()
        self.updates = 0
        self.over = False


server: ParameterServer | None = None


def push(gradients: list[torch.Tensor] | None) -> list[torch.Tensor] | None:
    """Apply it, if there is one; the weights, or None when it is over."""
    assert server is not None
    with server.lock:
        if server.over:
            return None
        if gradients is not None:
            for param, gradient in zip(server.params, gradients, strict=True):
                param.grad = gradient
            server.optimizer.step()
            server.updates += 1
        return [param.detach() for param in server.params]


def train() -> None:
    """A worker of the MLP, until it is over."""
    images, labels = (torch.from_numpy(array) for array in work.digits())
    model = torch.nn.Sequential(torch.nn.Linear(784, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    weights = rpc.rpc_sync("server", push, args=(None,))
    while weights is not None:
        with torch.no_grad():
            for param, weight in zip(model.parameters(), weights, strict=True):
                param.copy_(weight)
        batch = torch.randint(0, len(images), (work.BATCH_SIZE,))
        model.zero_grad()
        logits = model(images[batch].float() / 255)
        torch.nn.functional.cross_entropy(logits, labels[batch]).backward()
        gradients = [param.grad for param in model.parameters()]
        weights = rpc.rpc_sync("server", push, args=(gradients,))


def process(
    rank: int, port: int, workers: int, transport: str, optimizer: str, size: int, found: Any
) -> None:
    """Rank 0 serves; size 0 is the MLP, else a model for round trips."""
    global server  # noqa: PLW0603  (what is called by name must be the module's)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)  # each process its share of the cores, as with Headwater
    if rank == 0:
        weights = [torch.from_numpy(w.T.copy()) for w in work.initial_weights()]
        if size:
            weights = [torch.ones(size // work.TENSORS) for _ in range(work.TENSORS)]
        server = ParameterServer(weights, optimizer)
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"tcp://127.0.0.1:{port}", rpc_timeout=300, **TRANSPORTS[transport]
    )
    name = f"worker{rank}" if rank else "server"
    rpc.init_rpc(name, rank=rank, world_size=workers + 1, rpc_backend_options=options)
    if rank and size:
        gradients = [torch.ones(size // work.TENSORS) for _ in range(work.TENSORS)]
        found.put(work.median_s(lambda: rpc.rpc_sync("server", push, args=(gradients,)), size))
    elif rank:
        train()
    elif not size:
        assert server is not None
        here = server
        found.put(work.window(lambda: here.updates))
        here.over = True
    rpc.shutdown()


def measure(workers: int, transport: str, optimizer: str, size: int) -> float:
    found = multiprocessing.get_context("spawn").SimpleQueue()
    port = free_port()
    multiprocessing.spawn(
        process, (port, workers, transport, optimizer, size, found), nprocs=workers + 1
    )
    return found.get()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    sizes = work.size_arguments()
    updates, trips = {}, {}
    for transport in TRANSPORTS:
        for adam in ("adam", "fused adam") if transport == "shm" else ("adam",):
            updates[f"{transport}, {adam}"] = measure(2, transport, adam, 0)
        trips[transport] = {size: measure(1, transport, "sgd", size) for size in sizes}
    work.report(updates, trips)


if __name__ == "__main__":
    main()

"""What a plain socket carries on this machine: prints GB/s over loopback TCP and a Unix socket.

The sender is a process of its own. Both read and write 1 MiB at a time.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHUNK = 1 << 20
TOTAL = 2000 * CHUNK


def rate(kind: str, family: socket.AddressFamily, address: str | tuple[str, int]) -> float:
    """Bytes per second that one process receives from another."""
    with socket.socket(family) as listener:
        listener.bind(address)
        listener.listen(1)
        where = json.dumps(listener.getsockname())
        with subprocess.Popen([sys.executable, __file__, kind, where]):  # noqa: S603  (ourselves)
            connection, _ = listener.accept()
            with connection:
                buffer, received = bytearray(CHUNK), 0
                began = time.perf_counter()
                while count := connection.recv_into(buffer):
                    received += count
                seconds = time.perf_counter() - began
    assert received == TOTAL
    return received / seconds


def send(kind: str, where: str) -> None:
    address = json.loads(where)
    family = socket.AF_INET if kind == "tcp" else socket.AF_UNIX
    with socket.socket(family) as connection:
        connection.connect(tuple(address) if kind == "tcp" else address)
        data = bytes(CHUNK)
        for _ in range(TOTAL // CHUNK):
            connection.sendall(data)


def main() -> None:
    if len(sys.argv) > 1:
        return send(sys.argv[1], sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        rates = {
            "tcp": rate("tcp", socket.AF_INET, ("127.0.0.1", 0)),
            "unix": rate("unix", socket.AF_UNIX, str(Path(folder, "socket"))),
        }
    return print(json.dumps(rates))


if __name__ == "__main__":
    main()

"""This machine's GPUs, found without JAX, and dealt out among processes.

By what they may see: CUDA_VISIBLE_DEVICES is set before a process starts, and is all
that it needs. AMD's are dealt out where HIP_VISIBLE_DEVICES or ROCR_VISIBLE_DEVICES
names them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

CUDA = "CUDA_VISIBLE_DEVICES"
_VARIABLES = (CUDA, "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")

NVIDIA_SMI_TIMEOUT_S = 10.0
"""It takes a second or two, and more where no driver is loaded yet."""

MEMORY = 0.9
"""Of a GPU that several processes share; JAX itself takes three quarters for one."""


class Gpus(NamedTuple):
    """What there is to deal out."""

    variable: str
    """Of the environment; tells a process which GPUs it may see."""
    names: tuple[str, ...]
    """Numbers or UUIDs."""


def find_gpus(environment: Mapping[str, str]) -> Gpus | None:
    """What a process with this environment may see; None where that is not known.

    Raises:
      TimeoutError: nvidia-smi does not answer.
    """
    for variable in _VARIABLES:
        if variable in environment:
            return Gpus(variable, _visible(environment[variable]))
    path = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if path is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603  (the driver's own program)
            [path, "-L"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=NVIDIA_SMI_TIMEOUT_S,
            check=False,
        )
    except OSError:
        return None
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"nvidia-smi -L took over {NVIDIA_SMI_TIMEOUT_S:.0f} s") from None
    return Gpus(CUDA, _listed(done.stdout)) if done.returncode == 0 else None


def deal(gpus: Gpus | None, workers: int) -> list[dict[str, str]]:
    """For each worker, the environment that gives it its share.

    Neighbours go together, for they are often linked; the first workers have one more
    where the numbers do not divide. Where there are too few, workers share one, and
    its memory. Where it is not known what there is, they share that.
    """
    if gpus is None:
        return [_memory(workers) for _ in range(workers)]
    count = len(gpus.names)
    if count == 0 or workers == 1:
        return [{} for _ in range(workers)]
    if count < workers:
        sharers = [len(range(gpu, workers, count)) for gpu in range(count)]
        return [
            {gpus.variable: gpus.names[at % count], **_memory(sharers[at % count])}
            for at in range(workers)
        ]
    each, more = divmod(count, workers)
    if any(name.startswith("MIG-") for name in gpus.names):
        each, more = 1, 0  # of which a process never sees a second one
    shares, begin = [], 0
    for at in range(workers):
        end = begin + each + (at < more)
        shares.append({gpus.variable: ",".join(gpus.names[begin:end])})
        begin = end
    return shares


def _memory(sharers: int) -> dict[str, str]:
    if sharers == 1:
        return {}
    fraction = f"{MEMORY / sharers:.3f}"
    return {
        "XLA_CLIENT_MEM_FRACTION": fraction,
        "XLA_PYTHON_CLIENT_MEM_FRACTION": fraction,  # its name before JAX 0.5.1
    }


def _visible(text: str) -> tuple[str, ...]:
    """The driver stops at the first that is none."""
    found = []
    for word in text.split(","):
        name = word.strip()
        if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", name):
            break
        found.append(name)
    return tuple(found)


def _listed(text: str) -> tuple[str, ...]:
    """Of `nvidia-smi -L`; in place of a GPU that is cut into instances, these."""
    found: list[str] = []
    for line in text.splitlines():
        if gpu := re.match(r"GPU (\d+): ", line):
            found.append(gpu[1])
        elif instance := re.match(r"\s+MIG .*\(UUID: (MIG-[\w/-]+)\)", line):
            if found and not found[-1].startswith("MIG-"):
                found.pop()
            found.append(instance[1])
    return tuple(found)

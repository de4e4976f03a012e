"""Chooses where JAX computes, before it first does."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from headwater.protos.errors import UsageError

if TYPE_CHECKING:
    import jax

ALL_DEVICES = "all"

# "gpu" alone makes JAX insist on every vendor's plugin at once.
_BACKENDS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}


def use_platform(platform: str | None) -> None:
    """Have JAX compute on cpu, gpu or tpu; None leaves it JAX's own choice.

    Raises:
      UsageError: There is no such platform, or JAX finds none on this machine.
    """
    choose_platform(platform)
    check_platform(platform)


def choose_platform(platform: str | None) -> None:
    """Say where JAX is to compute, without starting it.

    Raises:
      UsageError: There is no such platform.
    """
    if platform is not None:
        if platform not in _BACKENDS:
            raise UsageError(f"--platform {platform}: it is one of {', '.join(_BACKENDS)}")
        os.environ["JAX_PLATFORMS"] = _BACKENDS[platform]
        import jax

        # Something else may have imported JAX before, and that is when it read the environment.
        jax.config.update("jax_platforms", _BACKENDS[platform])


def check_platform(platform: str | None) -> None:
    """Start JAX, and see whether it is where it was to be.

    Raises:
      UsageError: JAX finds no such platform on this machine.
    """
    import jax

    try:
        found, why = jax.default_backend(), ""
    except RuntimeError as error:
        found, why = "nothing", f": {str(error).splitlines()[0]}"
    if found == "nothing" or platform not in (None, found):
        wanted = f"--platform {platform}" if platform else "JAX_PLATFORMS in the environment"
        raise UsageError(
            f"{wanted} cannot be had here, JAX finds {found}{why}; install JAX for it "
            "(docs.jax.dev/en/latest/installation.html), or use --platform cpu"
        )


def check_devices(text: str) -> None:
    """Whether --devices can be read; without JAX, so before anything is waited for.

    Raises:
      UsageError: It is neither `all`, nor a number, nor numbers and commas.
    """
    if text != ALL_DEVICES and not re.fullmatch(r"[0-9]+(,[0-9]+)*,?", text):
        raise UsageError(
            f"--devices {text!r}: it is all, a number for the first so many, or numbers from 0 on "
            "with commas, such as 0,1"
        )


def choose_devices(text: str) -> Sequence[jax.Device]:
    """What --devices names of this process's devices. Starts JAX.

    Args:
      text: `all`; a number, for the first so many; or their numbers with commas: `0,1`, or
        `1,` for one alone.

    Raises:
      UsageError: It is none of these, or there are not so many.
    """
    check_devices(text)
    import jax

    found = jax.local_devices()
    if text == ALL_DEVICES:
        return found
    numbers = [int(word) for word in text.split(",") if word]
    if "," not in text:
        numbers = list(range(min(numbers[0], len(found) + 1)))
    if not numbers or max(numbers) >= len(found) or len(set(numbers)) < len(numbers):
        raise UsageError(f"--devices {text}: {_there_are(found)}")
    return [found[number] for number in numbers]


def _there_are(found: Sequence[jax.Device]) -> str:
    platform = found[0].platform
    if len(found) > 1:
        return f"there are {len(found)} {platform} devices, 0 to {len(found) - 1}; name each once"
    more = "; XLA_FLAGS=--xla_force_host_platform_device_count=N makes more of a CPU"
    return f"there is one {platform} device, 0{more if platform == 'cpu' else ''}"

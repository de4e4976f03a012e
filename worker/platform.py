"""Chooses where JAX computes, before it first does."""

from __future__ import annotations

import os

from headwater.protos.errors import UsageError

# "gpu" alone makes JAX insist on every vendor's plugin at once.
_BACKENDS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}


def use_platform(platform: str | None) -> None:
    """Have JAX compute on cpu, gpu or tpu; None leaves it JAX's own choice.

    Raises:
      UsageError: There is no such platform, or JAX finds none on this machine.
    """
    if platform is not None:
        if platform not in _BACKENDS:
            raise UsageError(f"--platform {platform}: it is one of {', '.join(_BACKENDS)}")
        os.environ["JAX_PLATFORMS"] = _BACKENDS[platform]
    import jax

    if platform is not None:
        # Something else may have imported JAX before, and that is when it read the environment.
        jax.config.update("jax_platforms", _BACKENDS[platform])
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

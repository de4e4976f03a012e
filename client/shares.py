"""Each process's share of this machine, as the environment that it is started with."""

from __future__ import annotations

import os
from collections.abc import Callable

from headwater.client.gpus import deal, find_gpus
from headwater.client.processes import core_count
from headwater.protos.reproducible import fix


def share_of_cores(workers: int, *, in_sync: bool) -> dict[str, str]:
    """Of a server and so many workers, for each; what is set by hand stays."""
    share = {name: os.environ[name] for name in ("NPROC", "XLA_FLAGS") if name in os.environ}
    if in_sync:
        fix(share)  # the number of workers must not show in the bits
    share.setdefault("NPROC", str(max(1, core_count() // (workers + 1))))
    return share


def shares_of_gpus(
    workers: int, platform: str | None, warn: Callable[[str], None]
) -> list[dict[str, str]]:
    """For each worker its share of the GPUs, or of a shared one's memory.

    Args:
      workers: How many.
      platform: Where they compute; None: wherever JAX does.
      warn: Gets a sentence where the GPUs could not be counted.
    """
    if platform not in (None, "gpu") or workers == 1:
        return [{} for _ in range(workers)]
    gpus = None
    try:
        gpus = find_gpus(os.environ)
    except TimeoutError as error:
        warn(
            f"{error}: every worker will see all GPUs; set CUDA_VISIBLE_DEVICES to have them "
            "dealt out"
        )
    return [
        # What is set by hand stays, but for the GPUs that are dealt out of what it names.
        {n: v for n, v in share.items() if n not in os.environ or (gpus and n == gpus.variable)}
        for share in deal(gpus, workers)
    ]


def devices_option(devices: str | None, *, in_sync: bool) -> list[str]:
    """The words of --devices for `headwater worker`; none for its default, all."""
    # How many devices a batch is split over shows in the bits, and so would, in what they
    # are dealt, the number of workers.
    given = devices or ("1" if in_sync else None)
    return ["--devices", given] if given else []

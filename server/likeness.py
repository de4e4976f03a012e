"""What a run was computed with, and how this process is made to compute the same bits.

XLA reads its flags and the number of its threads when JAX starts, so `imitate`
comes before that. A history holds what workers said of themselves, over the
network: it is checked before it becomes a part of the environment.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, MutableMapping

from headwater.protos.errors import HeadwaterError
from headwater.server.survey import Survey
from headwater.worker.compute import differences

MAX_THREADS = 1024
"""Of XLA; and devices of a CPU."""

_DEVICES_FLAG = "--xla_force_host_platform_device_count"

SHOWN_NAMES = 3
"""Of workers, in one sentence."""

# Switches and numbers: nothing that could name a file, nor have one written.
_FLAG = re.compile(r"--xla_(?!dump)[a-z0-9_]+(=(true|false|\d+))?")


def gradients_platform(survey: Survey) -> str | None:
    """What the gradients were computed on: cpu, gpu or tpu; None where nobody said.

    Raises:
      HeadwaterError: On more than one; no process computes the bits of both.
    """
    names = defaultdict(list)
    for worker in survey.workers.values():
        if "platform" in worker.compute:
            names[worker.compute["platform"]].append(worker.name)
    if len(names) > 1:
        found = " and ".join(f"{what} ({_shown(who)})" for what, who in sorted(names.items()))
        raise HeadwaterError(
            f"the run cannot be replayed: its gradients were computed on {found}, whose bits "
            "differ; train with workers of one platform to replay it"
        )
    return next(iter(names), None)


def check_framework(survey: Survey, here: Mapping[str, str]) -> None:
    """All gradients were computed by one framework, which is this task's.

    Args:
      survey: Of the run.
      here: This process's fingerprint, as a worker's.

    Raises:
      HeadwaterError: They were not.
    """
    names = defaultdict(list)
    for worker in survey.workers.values():
        names[_framework(worker.compute)].append(worker.name)
    if len(names) > 1:
        found = " and ".join(f"{what} ({_shown(who)})" for what, who in sorted(names.items()))
        raise HeadwaterError(
            f"the run cannot be replayed: its gradients were computed by {found}, and one task "
            "computes by one of them; train with workers of one framework to replay it"
        )
    for what in names:
        if what != _framework(here):
            raise HeadwaterError(
                f"the run's gradients were computed by {what}, and this task's are by "
                f"{_framework(here)}; replay it with the --task of its workers"
            )


def _framework(compute: Mapping[str, str]) -> str:
    """Its name, without a version: another version may well give the same bits."""
    return compute.get("framework", "jax").partition(" ")[0]


def accelerator(survey: Survey) -> str:
    """The platform that JAX is to be started for; `cpu` is there beside every other.

    Raises:
      HeadwaterError: The run needs two that one process cannot have.
    """
    platforms = {line["compute"].get("platform", "cpu") for line in survey.incarnations}
    platforms |= {gradients_platform(survey) or "cpu"}
    needed = sorted(platforms - {"cpu"})
    if len(needed) > 1:
        raise HeadwaterError(
            f"the run cannot be replayed: it was computed on {' and '.join(needed)}, and one "
            "process has one of them; train on one to replay it"
        )
    return needed[0] if needed else "cpu"


def imitate(survey: Survey, environment: MutableMapping[str, str]) -> None:
    """Have XLA take as many threads, and the flags, as it had in most of the workers.

    And have as many devices of a CPU as any worker split its batches over.
    """
    threads = _most_common(survey, "threads")
    if threads is not None and threads.isdecimal() and 0 < int(threads) <= MAX_THREADS:
        environment["NPROC"] = threads
    flags = _most_common(survey, "XLA_FLAGS")
    if flags is not None and all(_FLAG.fullmatch(flag) for flag in flags.split()):
        environment["XLA_FLAGS"] = flags
    computed = [w for w in survey.workers.values() if w.compute.get("platform") == "cpu"]
    devices = max((worker.device_count for worker in computed), default=1)
    if 1 < devices <= MAX_THREADS and _DEVICES_FLAG not in environment.get("XLA_FLAGS", ""):
        environment["JAX_NUM_CPU_DEVICES"] = str(devices)


def warnings(
    survey: Survey,
    here: Mapping[str, str],
    software: Mapping[str, str],
    devices: int = 1,
    serves: Mapping[str, str] | None = None,
) -> list[str]:
    """What differs from then, and may change bits, in sentences.

    Args:
      survey: Of the run.
      here: This process's fingerprint.
      software: Library to version, of this process.
      devices: That this process has; it splits as a worker did, if there are enough.
      serves: This process's fingerprint as a server's, which always computes by JAX; None: as
        a worker's.
    """
    serves = here if serves is None else serves
    workers = defaultdict(list)
    for worker in survey.workers.values():
        alike = dict(here)
        if "devices" in worker.compute:
            alike["devices"] = str(min(devices, worker.device_count))
        found = differences(alike, worker.compute) if worker.compute else "nothing is known of it"
        workers[found].append(worker.name)
    sentences = {f"{_shown(who)}: {what}" for what, who in workers.items() if what}
    for line in survey.incarnations:
        compute, libraries = line["compute"], line.get("software", {})
        # Of a server on another platform than the workers there is nothing to compare.
        there = compute if compute.get("platform") == serves["platform"] else serves
        known = {name: software[name] for name in libraries.keys() & software.keys()}
        both = {name: libraries[name] for name in known}
        found = "; ".join(filter(None, [differences(serves, there), differences(known, both)]))
        if found:
            sentences.add(f"the server: {found}")
    return [f"what computed may give other bits here: {each}" for each in sorted(sentences)]


def _most_common(survey: Survey, name: str) -> str | None:
    """The value that most gradients were computed with; without gradients, the first server's."""
    counts: Counter[str] = Counter()
    for worker in survey.workers.values():
        if name in worker.compute:
            counts[worker.compute[name]] += worker.gradients
    if counts:
        return counts.most_common(1)[0][0]
    found = survey.incarnations[0]["compute"].get(name)
    return None if found is None else str(found)


def _shown(names: Iterable[str]) -> str:
    """Not all of a thousand."""
    names = sorted(set(names))
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more

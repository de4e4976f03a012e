"""How a server behaves: one frozen object, checked once, at the edge."""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import re
from pathlib import Path
from typing import Literal

from headwater.protos.compression import Compression, pulls
from headwater.protos.errors import UsageError
from headwater.protos.rpc import DEFAULT_ADDRESS, Transport, split_address
from headwater.server.dial import Dial
from headwater.server.early_stop import EarlyStop
from headwater.server.staleness import StalenessPolicy

NOT_IN_SYNC = (
    "what it leaves out of a gradient stays with the worker, and sync mode promises that it does "
    "not matter who computes what; use bfloat16 or int8, or another consistency"
)

NEEDS_BATCHES = (
    "sync mode makes each update of N batches, and a run without --examples has none; use async or "
    "bounded:K"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """See `headwater server --help` for the same list. None keeps the task's own value.

    Raises:
      UsageError: A value cannot work; names the flag.
    """

    listen: str = DEFAULT_ADDRESS
    """HOST:PORT; port 0 takes a free one."""

    insecure: bool = False
    """Allow other machines to connect in clear text, and anyone who can reach the port."""

    transport: Transport = "auto"
    """How tensors reach workers on this machine; shm insists on shared memory."""

    run_dir: Path | None = None
    """Where the run is kept; by default runs/<task>-<run id>."""

    consistency: str | None = None
    """async, bounded:K or sync:N (see dial.py). None goes on with what was in force; at
    first, async."""

    staleness: str | None = None
    """none, scale, compensate:L or drop:K (see staleness.py); None as above, at first none."""

    local_steps: int | None = None
    """Batches of a push: steps of the inner optimizer between two exchanges; 1 unless given."""

    inner_optimizer: str | None = None
    """With local steps, a SPEC for the workers' own steps; None means the task's optimizer."""

    compress: str | None = None
    """How gradients are sent: none, bfloat16, int8 or topk:RATIO; None as above, at first none."""

    pull_dtype: str | None = None
    """How weights are sent to workers: own or bfloat16; None as above, at first own."""

    epochs: int | None = None
    batch_size: int | None = None
    init: str | None = None
    """A safetensors file of weights to begin with, in place of those of Task.init."""

    optimizer: str | None = None
    """A SPEC; see worker/optimizer_spec.py. With local steps, of the outer optimizer."""

    ema: float | None = None
    """Keep an exponential average of the weights for evaluation, of this decay; None as above."""

    seed: int | None = None

    exit_when_done: bool = False
    """End the process when the run is finished, rather than go on serving its weights."""

    on_nonfinite: Literal["end", "skip"] = "end"
    """What becomes of a batch whose gradient nobody can compute: end the run, or leave it out."""

    max_staged_bytes: int = 4 << 30
    """Bytes of gradients that may be on their way into the weights at once; room
    for one is always made. It bounds how many workers hold a ticket."""

    durability: Literal["snapshot", "log"] = "snapshot"
    """What a crash of the server may cost: what came since the last snapshot, or,
    because every update is logged before it is acknowledged, nothing."""

    snapshot_every: str = "30s"
    """Time (30s, 5m, 1h) or number of updates (500) from one snapshot to the next."""

    keep: int = 3
    """Snapshots kept, the newest ones. With 2 or more, a damaged newest one is survived."""

    grace_s: float = 20.0
    """Seconds that a server which is told to end has: to let the gradients under way
    come in, and to make the last version durable."""

    session_timeout_s: float = 15.0
    """Seconds of silence before a worker is forgotten. Workers speak every 2 s."""

    ticket_timeout_s: float = 60.0
    """Seconds without progress before a ticket is taken back; or ten times the
    worker's own slowest step, if that is longer."""

    pipeline: Literal["auto", "on", "off"] = "auto"
    """Whether a worker gets a second ticket, to compute while its last gradient travels; auto:
    where there are two or more, and it would wait for a network or for its accelerator's host."""

    epoch_barrier: bool = False
    """No batch of an epoch is begun before all of the one before are applied; the version that an
    epoch ends with is kept until it is evaluated."""

    stop_when: str | None = None
    """`accuracy>=0.97`: the first evaluation like this ends the run (see early_stop.py)."""

    patience: str | None = None
    """`accuracy:3`: so many evaluations without a better one end the run."""

    lease_s: float = 2.0
    """Seconds of a worker's work that are reserved for it, so that it loads their data ahead."""

    compile_timeout_s: float = 1800.0
    """Seconds a worker may compile before its first ticket."""

    await_evaluation: bool = False
    """Before it exits, wait for an evaluation of the final version, even from an
    evaluator that has not been heard of yet."""

    evaluation_timeout_s: float = 60.0
    """Seconds that a finished server waits for an evaluation before it exits."""

    def __post_init__(self) -> None:
        host, port = split_address(self.listen, "--listen")
        if not is_loopback(host) and not self.insecure:
            raise UsageError(
                f"--listen {self.listen} lets other machines in, without encryption or "
                "passwords; add --insecure if you trust everyone on that network, or listen on "
                f"127.0.0.1:{port}"
            )
        if self.consistency is not None:
            Dial.parse(self.consistency)
        if self.staleness is not None:
            StalenessPolicy.parse(self.staleness)
        if self.pushes.keeps_residual and Dial.parse(self.consistency or "async").group:
            raise UsageError(f"--compress {self.pushes}: {NOT_IN_SYNC}")
        self.pulls  # noqa: B018  (raises where it is none)
        self.early_stop()
        if self.ema is not None and not 0 <= self.ema < 1:
            raise UsageError(
                f"--ema {self.ema}: it is the decay of an average, from 0, which keeps none, to "
                "less than 1, such as 0.999"
            )
        for flag, value in (
            ("epochs", self.epochs),
            ("batch-size", self.batch_size),
            ("local-steps", self.local_steps),
        ):
            if value is not None and value < 1:
                raise UsageError(f"--{flag} {value} must be at least 1")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed} must be in 0 … 4294967295")
        if self.keep < 1:
            raise UsageError(f"--keep {self.keep} must be at least 1")
        self.snapshot_interval  # noqa: B018  (raises where it is none)
        if self.max_staged_bytes < 1:
            raise UsageError(f"--max-staged-bytes {self.max_staged_bytes} must be at least 1")
        for flag, seconds in (
            ("session-timeout", self.session_timeout_s),
            ("ticket-timeout", self.ticket_timeout_s),
            ("lease-seconds", self.lease_s),
            ("compile-timeout", self.compile_timeout_s),
            ("evaluation-timeout", self.evaluation_timeout_s),
            ("grace", self.grace_s),
        ):
            if not seconds > 0:  # NaN is not
                raise UsageError(f"--{flag} {seconds} must be more than 0 seconds")

    def early_stop(self) -> EarlyStop:
        """`stop_when` and `patience`, read; nothing evaluated yet."""
        return EarlyStop(self.stop_when, self.patience)

    @functools.cached_property
    def pushes(self) -> Compression:
        """`compress`, read."""
        return Compression.parse(self.compress or "none")

    @functools.cached_property
    def pulls(self) -> Compression:
        """`pull_dtype`, read."""
        return pulls(self.pull_dtype)

    @property
    def pipelines(self) -> bool:
        """Whether there can be second tickets. Error feedback needs one outcome after the other."""
        return self.pipeline != "off" and not self.pushes.keeps_residual

    @functools.cached_property
    def snapshot_interval(self) -> Interval:
        """`snapshot_every`, read."""
        return Interval.parse(self.snapshot_every, "--snapshot-every")


@dataclasses.dataclass(frozen=True)
class Interval:
    """From one snapshot to the next: so many seconds, or so many updates."""

    seconds: float | None = None
    updates: int | None = None

    @classmethod
    def parse(cls, text: str, flag: str) -> Interval:
        """`30s`, `5m`, `1h`, or a number of updates.

        Raises:
          UsageError: It is none of these, or not more than 0; names `flag`.
        """
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text):
            number, unit = match.groups()
            if unit and float(number) > 0:
                return cls(seconds=float(number) * _SECONDS[unit])
            if number.isdecimal() and int(number) > 0:
                return cls(updates=int(number))
        raise UsageError(
            f"{flag} {text!r}: it is a time, such as 30s, 5m or 1h, or a number of updates, such "
            "as 500"
        )

    def __str__(self) -> str:
        if self.updates is not None:
            return f"{self.updates:,} updates"
        return f"{self.seconds:g} s"


_SECONDS = {"s": 1, "m": 60, "h": 3600}


def is_loopback(host: str) -> bool:
    """Whether only processes on this machine can reach the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

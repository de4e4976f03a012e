"""What is known of a run while it is served: the state that the server's parts share.

Everything is touched on the event loop alone. The state machines in it decide
nothing by themselves; who moves what is said in coordinator.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from headwater.protos import parameter_server_pb2 as pb
from headwater.server.admission import Admission
from headwater.server.config import ServerConfig
from headwater.server.evaluations import Evaluations
from headwater.server.identity import RunIdentity
from headwater.server.ledger import Ledger
from headwater.server.lookers import Lookers
from headwater.server.metrics import RunFigures
from headwater.server.order import BatchOrder
from headwater.server.pace import Pace
from headwater.server.pushers import Pushers
from headwater.server.refusals import Refusals
from headwater.server.roster import Member, Roster
from headwater.server.rounds import Rounds
from headwater.server.settings import Settings
from headwater.server.staging import Staging
from headwater.server.store import Published, Store


class Run:
    """One run, as it stands.

    Args:
      on_done: Called once, with an error's text or None, when no more updates
        will come: the last batch was applied, or the run failed.
      inner_optimizer: With local steps, the workers'; "" for the task's own.
      settings: To hold from the start; by default those of the store's version.
      pace: Of a program that leads the run.
      starts: The version that each incarnation began with.
      clock: Seconds, monotonic.
    """

    def __init__(
        self,
        store: Store,
        rounds: Rounds,
        identity: RunIdentity,
        config: ServerConfig,
        on_done: Callable[[str | None], None],
        *,
        run_dir: str,
        optimizer_text: str,
        inner_optimizer: str = "",
        settings: Settings | None = None,
        pace: Pace | None = None,
        starts: Sequence[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.current: Published = store.current
        self.durable_version = store.current.version
        """The newest that survives the death of every process, and loss of power."""
        self.settings = settings or store.current.settings
        """The newest; those of `current` hold for the version after it."""
        self.rounds = rounds
        self.identity = identity
        self.config = config
        self.layout = store.layout
        self.pushed = config.pushes.packed(self.layout.moving)
        """What stands for a gradient, and the new state, on the wire."""
        self.pulled = config.pulls.packed(self.layout.moving)
        """What stands for a version's weights there, constants left out."""
        self.staging = Staging(self.pushed, config.max_staged_bytes)
        self.roster = Roster()
        self.pushers = Pushers()
        self.refusals = Refusals()
        self.ledger = Ledger(
            rounds.total, rounds.per_epoch, store.current.applied, 1 if config.epoch_barrier else 2
        )
        self.pace = pace
        if pace is not None:
            self.ledger.allowed_epochs = pace.epochs
        self.admission = Admission(
            self.ledger, self.staging.slots, self._avoided_by, self.settings.dial,
            lambda: len(self.able()),
        )  # fmt: skip
        self.admission.drop_over = self.settings.staleness.drop
        self.figures = RunFigures()
        self.evaluations = Evaluations()
        self.lookers = Lookers()
        self.problems: dict[str, str] = {}
        """What needs the user's attention, in sentences, by what it is about."""
        self.starts = starts
        self.run_dir = run_dir
        self.optimizer_text = optimizer_text
        self.inner_optimizer = inner_optimizer
        self.clock = clock
        self.began_time = clock()
        self.draining = False
        """No more tickets are issued: the server is being stopped."""
        self.is_done = False
        """No more updates will come."""
        self.log_broken = False
        """Whether the update log failed: then nothing more is made durable."""
        self.state_override: pb.RunState | None = None
        """What the ending says of the run; None while it goes on."""
        self._on_done = on_done

    @property
    def order(self) -> BatchOrder:
        return self.rounds.order

    @property
    def state(self) -> pb.RunState:
        """What status calls the run's state."""
        if self.state_override is not None:
            return self.state_override
        if self.admission.paused:
            return pb.RUN_PAUSED
        is_anybody_here = self.roster.members or self.pushers.shown(self.clock())
        if is_anybody_here and self.figures.updates.per_second(self.clock()) > 0:
            return pb.RUN_TRAINING
        return pb.RUN_WAITING

    @property
    def in_groups(self) -> bool:
        """Whether the dial stands at sync."""
        return self.settings.dial.group is not None

    def finish(self, error: str | None) -> None:
        """No more updates will come, because of `error`, or because all are made."""
        if not self.is_done:
            self.is_done = True
            self._on_done(error)

    def stamp(self) -> pb.Stamp:
        return pb.Stamp(
            incarnation=self.current.incarnation,
            version=self.current.version,
            durable_version=self.durable_version,
        )

    def worker_name(self, member: Member) -> str:
        """As the history knows it, through all incarnations."""
        return f"{self.current.incarnation}.{member.id}"

    def able(self) -> set[int]:
        """Workers that a batch could be given to."""
        members = self.roster.members.values()
        return {m.id for m in members if not m.hung and m.id not in self.refusals.quarantined}

    def _avoided_by(self, worker: int) -> set[int]:
        if self.refusals.is_clear:
            return set()  # nearly always, and asked for every ticket
        return self.refusals.avoided_by(worker, self.able())

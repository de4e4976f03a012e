"""The run's middle: events of workers in, tickets and outcomes out.

Lives on the event loop, alone touches leases and tickets, and never waits. The
state machines decide (ledger, admission, refusals, roster); the applier thread
does the arithmetic; sessions do the talking; the ending is in serve.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import ParamSpec

import jax

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Reason, Refused, UsageError
from headwater.protos.layout import Bytes, Layout
from headwater.server import replies
from headwater.server.acknowledgements import Acknowledgements
from headwater.server.admission import Admission, Grant, Ticket, Unwanted
from headwater.server.applier import Applier, Change, Check, Job, LeaveOut, Result, Update
from headwater.server.config import ServerConfig
from headwater.server.dial import Dial
from headwater.server.evaluations import Evaluations
from headwater.server.history import History
from headwater.server.identity import RunIdentity
from headwater.server.journal import Journal
from headwater.server.ledger import Ledger
from headwater.server.lookers import Lookers
from headwater.server.metrics import RunFigures
from headwater.server.refusals import Refusals, Verdict
from headwater.server.roster import Member, Roster, printable
from headwater.server.rounds import Rounds
from headwater.server.session import Session
from headwater.server.settings import Settings
from headwater.server.staging import Staging
from headwater.server.store import Contribution, NotFinite, Published, Store
from headwater.server.update_log import LogBroken, NoRoom, UpdateLog
from headwater.server.waiters import VersionWaiters
from headwater.worker.compute import differences

log = logging.getLogger("headwater.server")

P = ParamSpec("P")

BACKUP_LATE_S = 0.001
"""After the moment from which a batch may be given to a second worker."""

PULSE_S = 2.0
"""Between messages to a worker that waits, so that it can tell waiting from a dead network."""


class Coordinator:
    """One run, while it is served. Every method is called on the event loop.

    Args:
      on_done: Called once, with an error's text or None, when no more updates
        will come: the last batch was applied, or the run failed.
      inner_optimizer: With local steps, the workers'; "" for the task's own.
      settings: To hold from the start; by default those of the store's version.
      history: Where each update is noted.
      update_log: Where each update is made durable before it is acknowledged.
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
        update_log: UpdateLog | None = None,
        history: History | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.current: Published = store.current
        self.rounds = rounds
        self.order = rounds.order
        self.inner_optimizer = inner_optimizer
        self.settings = settings or store.current.settings
        """The newest; those of `current` hold for the version after it."""
        self.identity = identity
        self.config = config
        self.layout: Layout = store.layout
        self.staging = Staging(self.layout, config.max_staged_bytes)
        self.roster = Roster()
        self.refusals = Refusals()
        self.ledger = Ledger(rounds.total, rounds.per_epoch, store.current.applied)
        self.admission = Admission(
            self.ledger, self.staging.slots, self._avoided_by, self.settings.dial
        )
        self.admission.drop_over = self.settings.staleness.drop
        self._check_group_fits(self.settings.dial)
        self.state_override: pb.RunState | None = None
        """What the ending says of the run; None while it goes on."""
        self.figures = RunFigures()
        self.evaluations = Evaluations()
        self.lookers = Lookers()
        self.problems: dict[str, str] = {}
        """What needs the user's attention, in sentences, by what it is about."""
        self.run_dir = run_dir
        self.optimizer_text = optimizer_text
        self.clock = clock
        self.began_time = clock()

        self._on_done = on_done
        self._is_done = False
        self._draining = False
        self._drained = asyncio.Event()  # and nothing is out any more
        self.log_broken = False
        """Whether the update log failed: then nothing more is made durable."""
        self._sessions: dict[int, Session] = {}
        self._life = secrets.randbits(64)
        self._pushes: dict[int, tuple[Member, pb.Push]] = {}  # admitted, by ticket number
        self._buffers: dict[int, Bytes] = {}  # their gradients, until applied or left out
        self._version_waiters = VersionWaiters()
        self._idle = asyncio.Event()  # nothing is being applied
        self._idle.set()
        self._paused_time: float | None = None
        self._owed: Acknowledgements[tuple[Member, pb.Outcome]] = Acknowledgements(
            store.current.version
        )
        self.journal: Journal | None = None
        if update_log is not None:
            self.journal = Journal(
                update_log,
                self.layout,
                on_synced=_on_loop(self.durable),
                on_broken=_on_loop(self._log_failed),
                on_full=_on_loop(self._log_full),
            )
        self.history = history
        self._kept: dict[int, tuple[jax.Array, ...]] = {}  # weights of bases, to compensate
        if self.settings.staleness.compensate is not None:
            self._kept[store.current.version] = store.current.leaves
        self._backup_timer: asyncio.TimerHandle | None = None
        self.applier = Applier(store, _on_loop(self._done), self.journal, history)
        if self.settings != store.current.settings:
            self.applier.submit(Change(self.settings))

    # ----------------------------------------------------- workers come and go

    def join(self, session: Session, hello: pb.Hello) -> Member:
        """Check a hello, take the worker in, and welcome it.

        Raises:
          Refused: Its protocol, task, layout or run is another; or it may not come
            back; or this server is about to end without a word.
        """
        if self.log_broken:
            raise Refused(Reason.SERVER_ENDED, "the server's disk failed")
        warnings = self.identity.check(hello, self.current.incarnation)
        self._check_compute(hello)
        member, old = self.roster.join(hello, self.clock())
        if old is not None:
            self._forget(old)
            self._sessions.pop(old.id).end(Reason.FENCED, "a newer stream of this worker took over")
        self._sessions[member.id] = session
        for warning in warnings:
            log.warning("%s: %s", member.name, warning)
        if self.state_override is not None:
            log.info("%s came after the end", member.name)
            self._bye_now(member)
            return member
        session.send(
            self._message(
                welcome=replies.welcome(
                    member,
                    self.identity.run_id,
                    self.rounds,
                    self.config,
                    warnings,
                    self.inner_optimizer,
                )
            )
        )
        log.info("%s joined (%s)", member.name, member.hello.platform)
        if self.history is not None:
            self.history.append(
                {
                    "v": self.current.version,
                    "worker": self._worker_name(member),
                    "name": member.name,
                    "compute": dict(hello.compute),
                }
            )
        return member

    def _worker_name(self, member: Member) -> str:
        """As the history knows it, through all incarnations."""
        return f"{self.current.incarnation}.{member.id}"

    def _check_compute(self, hello: pb.Hello) -> None:
        """In sync mode all compute alike: as the first worker does."""
        if self.settings.dial.group is None:
            return
        if not hello.compute:
            raise Refused(
                Reason.COMPUTE_MISMATCH,
                "sync mode needs to know what a worker computes with, and hello.compute is empty",
            )
        if not self.settings.compute:
            self._change(dataclasses.replace(self.settings, compute=dict(hello.compute)))
        elif found := differences(hello.compute, self.settings.compute):
            raise Refused(
                Reason.COMPUTE_MISMATCH,
                "in sync mode every worker computes the same bits, and this one would not "
                f"(here: the worker, there: the run): {printable(found, 1000)}",
            )

    def _check_group_fits(self, dial: Dial) -> None:
        if (dial.group or 0) > self.staging.slots:
            raise UsageError(
                f"consistency {dial} holds {dial.group} gradients of "
                f"{self.layout.total_bytes:,} bytes at once, and --max-staged-bytes has room for "
                f"{self.staging.slots}; raise it, or use smaller groups"
            )

    def _change(self, settings: Settings) -> None:
        """Have other settings hold from the next update on."""
        self.settings = settings
        self.applier.submit(Change(settings))

    def ready(self, member: Member) -> None:
        """The worker has compiled and wants its first ticket."""
        member.ready = True
        member.phase = "waiting"
        self._request(member)
        self._pump()

    def heard(self, member: Member) -> None:
        """Any message or part renews the session."""
        member.heard_time = self.clock()

    def progress(self, member: Member, progress: pb.Progress) -> None:
        """Renew the tickets of a worker that moved on."""
        member.set_phase(progress.phase)
        if progress.steps != member.steps:
            member.steps = progress.steps
            self.admission.progress(member.id, self.clock())

    def lost(self, member: Member) -> None:
        """The worker's stream has ended: what it had not finished goes back."""
        self._sessions.pop(member.id, None)
        if self.roster.leave(member):
            self._forget(member)
            log.info("%s left", member.name)

    def evict(self, who: str) -> str:
        """Take a worker out and bar it; returns its name.

        Raises:
          Refused: UNKNOWN_WORKER.
        """
        member = self.roster.evict(who)
        self.say_bye(member, pb.BYE_EVICTED, "this worker was evicted")
        return member.name

    def say_bye(self, member: Member, reason: pb.ByeReason, message: str) -> None:
        """Take back what the worker has and let its stream end in order."""
        self._forget(member)
        member.ready = False
        if session := self._sessions.get(member.id):
            session.send(self._message(bye=pb.Bye(reason=reason, message=message)))

    def _forget(self, member: Member) -> None:
        self.admission.lost(member.id)
        self.refusals.forget(member.id)
        self._pump()

    # ------------------------------------------------------------------ pushes

    def admit(self, member: Member, push: pb.Push) -> Ticket | None:
        """The ticket of a push that begins; None when it was answered with a refusal."""
        ticket = self._ticket(member, push.token)
        if ticket is None or push.incarnation != self.current.incarnation:
            self._not_wanted(member, push.token)
            return None
        if push.base != ticket.base:
            self.reject_malformed(
                member, ticket, push.token,
                f"the push's base is version {push.base}, its ticket's is {ticket.base}",
            )  # fmt: skip
            return None
        return ticket

    def still_wanted(self, member: Member, ticket: Ticket, token: pb.Token) -> bool:
        """Whether a push under way still has its ticket; answers it otherwise."""
        member.set_phase(pb.PHASE_SENDING)
        if self.admission.outstanding(ticket.number) == ticket:
            self.admission.progress(member.id, self.clock())
            return True
        self._not_wanted(member, token)
        return False

    def received(self, member: Member, ticket: Ticket, push: pb.Push, buffer: Bytes) -> None:
        """The whole gradient is here: from now on it outlives its worker."""
        member.step_s.append(self.clock() - member.granted_time)
        member.times.pushed(push.load_s, push.compute_s, self.clock() - member.granted_time)
        member.phase = "waiting"
        member.hung = False
        self.admission.hold(ticket.number, self.clock())
        self._pushes[ticket.number] = member, push
        self._buffers[ticket.number] = buffer
        if self.settings.dial.group is not None:
            self.applier.submit(Check(ticket, buffer, push.loss))
        self._pump()

    def reject_malformed(
        self, member: Member, ticket: Ticket, token: pb.Token, message: str
    ) -> None:
        """Refuse a push that breaks the protocol; its batch goes back."""
        if self.admission.outstanding(ticket.number) != ticket:
            self._not_wanted(member, token)
            return
        self.figures.malformed_count += 1
        self.admission.refuse(ticket)
        log.warning("%s: push rejected: %s", member.name, message)
        self._answer(
            member,
            replies.rejected(token, pb.REJECTED_FOR_MALFORMED, message),
        )
        self._pump()

    def check_size(self, size: int, limit: int) -> None:
        """Bound what is thrown away, too."""
        if size > limit:
            raise Refused(Reason.MALFORMED, f"a part has {size} bytes; at most {limit} are taken")

    def _not_wanted(self, member: Member, token: pb.Token) -> None:
        """Answer a push whose ticket is no longer out, or never was."""
        mine = token.life == self._life
        why = self.admission.unwanted(token.number, member.id) if mine else None
        if why is Unwanted.DUPLICATE:
            self.figures.duplicate_count += 1
            outcome = replies.duplicate(token)
        elif why is Unwanted.STALE:
            self.figures.stale_count += 1
            outcome = replies.stale(token, f"consistency was set to {self.settings.dial}")
        else:
            self.figures.lease_lost_count += 1
            outcome = replies.lease_lost(token)
        member.hung = False
        self._answer(member, outcome)
        self._pump()

    def _ticket(self, member: Member, token: pb.Token) -> Ticket | None:
        if token.life != self._life:
            return None
        ticket = self.admission.outstanding(token.number)
        return ticket if ticket and ticket.worker == member.id else None

    # ---------------------------------------------------------------- applying

    def _pump(self) -> None:
        """Apply what is held and grant what can be granted."""
        if self._is_done:
            return
        self._apply_held()
        if self._draining:
            if not self.admission.out_count:
                self._drained.set()
        else:
            self._grant_all()

    def _grant_all(self) -> None:
        for grant in self.admission.grants(self.current.version, self.clock()):
            self._send_grant(grant)
        due = self.admission.backup_time()
        if due is not None and self._backup_timer is None:
            self._backup_timer = asyncio.get_running_loop().call_later(
                max(0.0, due - self.clock()) + BACKUP_LATE_S, self._back_up
            )

    def _back_up(self) -> None:
        self._backup_timer = None
        self._pump()

    def _apply_held(self) -> None:
        for ticket in self.admission.too_stale(self.current.version):
            self._drop(ticket, f"--staleness {self.settings.staleness}")
        while (update := self.admission.next_to_apply(self.current.version)) is not None:
            self._idle.clear()
            self.applier.submit(Update(update, tuple(map(self._contribution, update))))

    def _contribution(self, ticket: Ticket) -> Contribution:
        member, push = self._pushes[ticket.number]
        return Contribution(
            ticket.position,
            ticket.base,
            self.rounds.size(ticket.position),
            push.loss,
            self._buffers[ticket.number],
            self._worker_name(member),
            self._kept.get(ticket.base),
        )

    def _drop(self, ticket: Ticket, why: str) -> None:
        """Answer a held gradient that is too old; admission has taken it back."""
        member, push = self._pushes.pop(ticket.number)
        self.staging.give_back(self._buffers.pop(ticket.number))
        self.figures.stale_count += 1
        self._answer(member, replies.stale(push.token, why))

    def _done(self, job: Job, result: Result) -> None:
        """What became of a job; the applier's answer, on the loop."""
        if isinstance(job, Check):
            self._checked(job, result)
            return
        if isinstance(result, Published):
            self.current = result
        if isinstance(job, Update):
            self._update_done(job, result)
        elif isinstance(job, LeaveOut):
            self._left_out(job, result)
        elif isinstance(result, Exception):
            self._failed(result, "the settings could not be changed")
        self._keep_bases()
        self._version_waiters.wake(self.current.version)
        self._acknowledge()
        if not self.admission.applying_count:
            self._idle.set()
        if self.ledger.done:
            self._finish(None)
        self._pump()

    def _checked(self, job: Check, result: Result) -> None:
        """Whether a gradient that waits for its group is finite."""
        if not self.admission.is_held(job.ticket):
            return  # the dial was turned: it was dropped, or is applied on its own
        member, push = self._pushes[job.ticket.number]
        if isinstance(result, NotFinite):
            self._pushes.pop(job.ticket.number)
            self.staging.give_back(self._buffers.pop(job.ticket.number))
            self._refused(member, push, job.ticket, result)
        elif isinstance(result, Exception):
            self._failed(result, "a gradient could not be checked")
        else:
            self.admission.checked(job.ticket)
            self._apply_held()
            self._answer(member, replies.held(push.token))
        self._pump()

    def _update_done(self, job: Update, result: Result) -> None:
        found = [self._pushes.pop(ticket.number) for ticket in job.tickets]
        for ticket in job.tickets:
            self.staging.give_back(self._buffers.pop(ticket.number))
        if isinstance(result, Published):
            self.admission.settle(job.tickets, result.applied)
            for ticket, (member, push) in zip(job.tickets, found, strict=True):
                self._count_update(member, push, ticket, result)
            return
        for ticket, (member, push) in zip(job.tickets, found, strict=True):
            if isinstance(result, NotFinite):
                # Of a group it is the sum that is not; then they are all computed anew.
                self._refused(member, push, ticket, result)
            else:
                self.admission.refuse(ticket)
        if isinstance(result, Exception) and not isinstance(result, NotFinite):
            self._failed(result, f"the update of version {self.current.version + 1} failed")

    def _left_out(self, job: LeaveOut, result: Result) -> None:
        self._pushes.pop(job.ticket.number)
        if isinstance(result, Published):
            self.admission.settle((job.ticket,), result.applied)
            self.refusals.left_out(job.ticket.position)
        elif isinstance(result, Exception):
            self.admission.refuse(job.ticket)
            self._failed(result, "a batch could not be left out")

    def _failed(self, error: Exception, what: str) -> None:
        """A job failed for good, unless the server is being stopped with a full disk."""
        if isinstance(error, LogBroken):
            self._log_failed(str(error))
        elif not isinstance(error, NoRoom):
            log.error("%s", what, exc_info=error)
            self._finish(f"{what}: {error}")

    def _keep_bases(self) -> None:
        """Keep the weights that gradients under way were computed at, where they are needed."""
        if self.settings.staleness.compensate is None:
            return
        kept = {**self._kept, self.current.version: self.current.leaves}
        needed = {*self.admission.bases, self.current.version}
        self._kept = {version: kept[version] for version in needed if version in kept}

    def _count_update(
        self, member: Member, push: pb.Push, ticket: Ticket, result: Published
    ) -> None:
        now = self.clock()
        staleness = result.version - 1 - ticket.base
        size = self.rounds.size(ticket.position)
        self.refusals.accepted(member.id, ticket.position)
        self.figures.count_update(
            {**_bounded(push), "loss": push.loss}, examples=size, staleness=staleness, now=now
        )
        member.gradients += 1
        member.staleness.add(staleness)
        member.examples.add(size, now)
        if self.settings.dial.group is not None:
            return  # they were told HELD
        outcome = replies.applied(push, result.version, staleness)
        if self.journal is None:
            self._answer(member, outcome)
        else:
            self._owed.owe(result.version, (member, outcome))

    def durable(self, version: int) -> None:
        """All up to `version` is on disk: whoever made it may be told."""
        self._owed.on_disk(version)
        self._acknowledge()

    def _acknowledge(self) -> None:
        for member, outcome in self._owed.due(self.current.version):
            self._answer(member, outcome)

    @property
    def durable_version(self) -> int:
        """The newest that survives the death of every process, and loss of power."""
        return self._owed.durable_version

    def _log_full(self, why: str | None) -> None:
        if why is None:
            del self.problems["log"]
            log.info("there is room for the update log again; pushes go on")
        else:
            self.problems["log"] = (
                f"the update log in {self.run_dir} cannot be written: {why}; pushes are held until "
                "there is room"
            )
            log.error("%s", self.problems["log"])

    def _log_failed(self, why: str) -> None:
        self.log_broken = True
        self._finish(
            f"the update log in {self.run_dir} failed: {why}. Nothing after version "
            f"{self.durable_version} is durable, and nothing of it was acknowledged"
        )

    def _refused(self, member: Member, push: pb.Push, ticket: Ticket, why: NotFinite) -> None:
        batch = self.rounds.name(ticket.position)
        verdict = self.refusals.refused(member.id, ticket.position, self._able())
        text = f"the gradient of {batch} is not finite: {why}"
        log.warning("%s: %s; %s", member.name, text, verdict.value)
        if verdict is Verdict.CONDEMN and self.config.on_nonfinite == "skip":
            # Still being applied, as far as admission knows: as a batch left out.
            self._pushes[ticket.number] = member, push
            self.admission.leave_out(ticket)
            self._idle.clear()
            self.applier.submit(LeaveOut(ticket))
        else:
            self.admission.refuse(ticket)
        if verdict is Verdict.QUARANTINE:
            self.ledger.release(member.id)
        self._answer(member, replies.rejected(push.token, pb.REJECTED_FOR_NOT_FINITE, text))
        if verdict is Verdict.CONDEMN and self.config.on_nonfinite == "end":
            self._finish(
                f"nobody could compute a finite gradient: {text}. Lower the learning rate, or look "
                "at that batch; --on-nonfinite skip leaves such batches out"
            )
        elif verdict is Verdict.QUARANTINE and not self._able():
            self._finish(
                f"every worker computed gradients that are not finite, {member.name} last: {text}. "
                "The weights have probably diverged: lower the learning rate"
            )

    def _finish(self, error: str | None) -> None:
        if not self._is_done:
            self._is_done = True
            self._on_done(error)

    # ----------------------------------------------------------------- tickets

    def _request(self, member: Member) -> None:
        if (
            member.ready
            and member.id in self.roster.members
            and member.id not in self.refusals.quarantined
            and not self.admission.tickets_of(member.id)
        ):
            self.admission.request(
                member.id,
                member.deadline_s(self.config.ticket_timeout_s),
                member.reserve(self.config.lease_s),
            )
            member.times.asked(self.clock())

    def _answer(self, member: Member, outcome: pb.Outcome) -> None:
        """Send an outcome, with the next ticket in the same message where there is one."""
        session = self._sessions.get(member.id)
        if session is None:
            return
        self._request(member)
        message = self._message(outcome=outcome)
        if self._is_done or self._draining or self.ledger.done:
            session.send(message)
            return
        sent = False
        for grant in self.admission.grants(self.current.version, self.clock()):
            if grant.ticket.worker == member.id:
                self._send_grant(grant, message)
                sent = True
            else:
                self._send_grant(grant)
        if not sent:
            session.send(message)

    def _send_grant(self, grant: Grant, message: pb.ServerMessage | None = None) -> None:
        """Send a ticket, in `message` if there is one to join, with the weights it is based on."""
        member = self.roster.members[grant.ticket.worker]
        message = message or self._message()
        if grant.leased:
            message.lease.CopyFrom(replies.lease(self.rounds, grant.leased))
        if grant.withdrawn_from is not None:
            self._withdraw(self.roster.members[grant.withdrawn_from], [grant.ticket.position])
        deadline_s = member.deadline_s(self.config.ticket_timeout_s)
        message.ticket.CopyFrom(replies.ticket(self.rounds, grant, self._life, deadline_s))
        member.granted_time = self.clock()
        member.times.granted(member.granted_time)
        weights = self.current if member.has_version != grant.ticket.base else None
        member.has_version = grant.ticket.base
        self._sessions[member.id].send(message, weights)

    def _withdraw(self, member: Member, positions: Sequence[int]) -> None:
        """Tell a worker that batches are no longer reserved for it."""
        session = self._sessions.get(member.id)
        if session is not None and positions:
            session.send(self._message(lease=replies.withdrawal(self.rounds, positions)))

    def _able(self) -> set[int]:
        """Workers that a batch could be given to."""
        members = self.roster.members.values()
        return {m.id for m in members if not m.hung and m.id not in self.refusals.quarantined}

    def _avoided_by(self, worker: int) -> set[int]:
        return self.refusals.avoided_by(worker, self._able())

    # -------------------------------------------------------------------- time

    def tick(self) -> None:
        """Find the silent, the hung and the endless compilers; be heard. Called each moment."""
        now = self.clock()
        for member in self.roster.silent(now, self.config.session_timeout_s):
            self._cut(member, Reason.SILENT, f"not heard of for {now - member.heard_time:.0f} s")
        for member in list(self.roster.members.values()):
            if not member.ready and now - member.joined_time > self.config.compile_timeout_s:
                limit = self.config.compile_timeout_s
                self._cut(member, Reason.COMPILE_TIMEOUT, f"not ready after {limit:.0f} s")
        for ticket, released in self.admission.expire(now):
            member = self.roster.members[ticket.worker]
            member.hung = True
            self._withdraw(member, released)
            log.warning(
                "%s: no progress on %s; taken back", member.name, self.rounds.name(ticket.position)
            )
        for member in self.roster.listening():
            session = self._sessions.get(member.id)
            if session is not None and session.quiet_for(PULSE_S):
                session.send(self._message())  # only the stamp: to be heard of
        self._pump()

    def shift(self, seconds: float) -> None:
        """The server itself stood still for so long: move every deadline."""
        self.admission.shift(seconds, self.clock())
        self.roster.shift(seconds)

    def _cut(self, member: Member, reason: Reason, message: str) -> None:
        log.warning("%s: %s", member.name, message)
        if session := self._sessions.get(member.id):
            session.end(reason, message)
        self.lost(member)

    # ---------------------------------------------------------------- steering

    async def pause(self) -> None:
        """Returns when nothing is being applied any more."""
        if not self.admission.paused:
            self.admission.paused = True
            self._paused_time = self.clock()
        await self._idle.wait()

    def resume(self) -> None:
        """Undo pause; deadlines go on from where they stood."""
        if self.admission.paused and self._paused_time is not None:
            self.admission.paused = False
            now = self.clock()
            self.admission.shift(now - self._paused_time, now)
            self._paused_time = None
            self._pump()

    def begin(self) -> None:
        """Find out whether there is anything left to train."""
        if self.ledger.done:
            self._finish(None)

    async def drain(self, timeout_s: float) -> None:
        """No more tickets; returns when those that are out have come back, or after the time."""
        self._draining = True
        self._pump()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._drained.wait()

    async def stop_training(self, *, apply_held: bool) -> None:
        """No more tickets. Returns when nothing is being applied any more.

        Args:
          apply_held: Apply the gradients that are here whole, paused or not.
        """
        self._is_done = True
        if self.journal is not None:
            self.journal.give_up()
        if apply_held:
            self.admission.paused = False
            self._apply_held()
        await self._idle.wait()

    def bye_to_all(self) -> None:
        for member in list(self.roster.members.values()):
            self._bye_now(member)

    def cut_all(self, message: str) -> None:
        """End all streams without bye: the workers wait for the next server, as after a crash."""
        for session in list(self._sessions.values()):
            session.end(Reason.SERVER_ENDED, message)

    def _bye_now(self, member: Member) -> None:
        reasons = {pb.RUN_FINISHED: pb.BYE_FINISHED, pb.RUN_FAILED: pb.BYE_FAILED}
        state = self.state_override or pb.RUN_STOPPING
        text = self.problems["end"] if state == pb.RUN_FAILED else ""
        self.say_bye(member, reasons.get(state, pb.BYE_STOPPED), text)

    # ----------------------------------------------------------------- reading

    async def wait_for_version(self, version: int, timeout_s: float) -> None:
        """Returns when the version is there, the run is over, or the time has passed."""
        if self.current.version < version and self.state_override is None:
            await self._version_waiters.wait(version, timeout_s)

    def end_waits(self) -> None:
        """The run is over: nobody waits for a version that will not come."""
        self._version_waiters.wake(None)

    @property
    def state(self) -> pb.RunState:
        """What status calls the run's state."""
        if self.state_override is not None:
            return self.state_override
        if self.admission.paused:
            return pb.RUN_PAUSED
        if self.roster.members and self.figures.updates.per_second(self.clock()) > 0:
            return pb.RUN_TRAINING
        return pb.RUN_WAITING

    def stamp(self) -> pb.Stamp:
        return pb.Stamp(
            incarnation=self.current.incarnation,
            version=self.current.version,
            durable_version=self.durable_version,
        )

    def _message(
        self,
        welcome: pb.Welcome | None = None,
        outcome: pb.Outcome | None = None,
        lease: pb.Lease | None = None,
        bye: pb.Bye | None = None,
    ) -> pb.ServerMessage:
        return pb.ServerMessage(
            stamp=self.stamp(), welcome=welcome, outcome=outcome, lease=lease, bye=bye
        )


def _on_loop(method: Callable[P, None]) -> Callable[P, None]:
    """The method as threads may call it: it runs on this event loop, a moment later."""
    loop = asyncio.get_running_loop()

    def call(*arguments: P.args, **named: P.kwargs) -> None:
        loop.call_soon_threadsafe(lambda: method(*arguments, **named))

    return call


def _bounded(push: pb.Push, limit: int = 64) -> dict[str, float]:
    """A push's metrics, not more than can be shown."""
    return dict(sorted(push.metrics.items())[:limit])

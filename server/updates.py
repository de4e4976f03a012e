"""Held gradients into versions: jobs to the applier in, outcomes to the workers out.

A gradient that has come whole is kept here until it is applied, refused or
dropped, whatever becomes of its worker. With an update log a worker is told of
its update when that is durable.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, ParamSpec

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Reason, Refused
from headwater.server import replies
from headwater.server.acknowledgements import Acknowledgements
from headwater.server.admission import Ticket
from headwater.server.applier import Applier, Change, Check, Job, LeaveOut, Result, Update
from headwater.server.dial import Dial
from headwater.server.history import History
from headwater.server.journal import Journal
from headwater.server.pace import Tallies
from headwater.server.push_sessions import NotNext
from headwater.server.pushers import SessionPush, disk_failed, forgotten
from headwater.server.refusals import Verdict
from headwater.server.roster import Member
from headwater.server.run_state import Run
from headwater.server.settings import Settings
from headwater.server.staging import Staged
from headwater.server.store import (
    NOT_KEPT,
    Base,
    Contribution,
    Diverged,
    NotFinite,
    Published,
    Store,
    base_of,
)
from headwater.server.tickets import Tickets
from headwater.server.update_log import LogBroken, NoRoom, UpdateLog

log = logging.getLogger("headwater.server")

P = ParamSpec("P")


class Updates:
    """What is on its way into the weights.

    Args:
      run: Its `current`, `settings` and `durable_version` are moved by this object alone.
      store: Moved by the applier's thread alone from here on.
      tickets: To answer the workers.
      moved: Called when something was applied, refused, left out or changed.
      history: Where each update is noted.
      update_log: Where each update is made durable before it is acknowledged.
    """

    def __init__(
        self,
        run: Run,
        store: Store,
        tickets: Tickets,
        moved: Callable[[], None],
        *,
        history: History | None = None,
        update_log: UpdateLog | None = None,
    ) -> None:
        self._run = run
        self._tickets = tickets
        self._moved = moved
        self._pushes: dict[int, tuple[Member, pb.Push]] = {}  # admitted, by ticket number
        self._session_pushes: dict[int, SessionPush] = {}  # likewise
        self._staged: dict[int, Staged] = {}  # their gradients, until applied or left out
        self._told_held: set[int] = set()  # tickets whose outcome was HELD: the only one they get
        self._changes: dict[Change, asyncio.Future[Result]] = {}  # not in the weights yet
        self._submitted = 0  # jobs that the applier has not answered
        self._in_thread = 0  # those of them that its thread has
        self._scheduled = 0  # those that are about to be done here
        self._loop = asyncio.get_running_loop()
        self._applies_held = True
        self._has_failed = False
        self.idle = asyncio.Event()
        """Nothing is being applied, checked or changed."""
        self.idle.set()
        self._owed: Acknowledgements[Callable[[], None]] = Acknowledgements(store.current.version)
        self.journal: Journal | None = None
        if update_log is not None:
            self.journal = Journal(
                update_log,
                run.layout.moving,
                on_synced=_on_loop(self.durable),
                on_broken=_on_loop(self._log_failed),
                on_full=_on_loop(self._log_full),
            )
        self._kept: dict[int, Base] = {}
        self._keep_bases()
        self.applier = Applier(store, _on_loop(self._done_in_thread), self.journal, history)
        if run.settings != store.current.settings:
            self.change(run.settings)

    # ---------------------------------------------------------------- gradients

    def received(self, member: Member, ticket: Ticket, push: pb.Push, staged: Staged) -> None:
        """The whole gradient is here: from now on it outlives its worker."""
        self._run.admission.hold(ticket.number, self._run.clock())
        self._pushes[ticket.number] = member, push
        self._staged[ticket.number] = staged
        if self._run.in_groups:
            self._submit(Check(ticket, staged.buffer, push.loss))

    def received_from_session(self, ticket: Ticket, push: SessionPush, staged: Staged) -> None:
        """The same of a push without a batch."""
        self._run.admission.hold(ticket.number, self._run.clock())
        self._session_pushes[ticket.number] = push
        self._staged[ticket.number] = staged

    def _submit(self, job: Job) -> None:
        self._submitted += 1
        self.idle.clear()
        # All in one place at a time: jobs keep their order.
        if self._scheduled or (not self._in_thread and self.applier.is_quick):
            self._scheduled += 1
            self._loop.call_soon(self._do_here, job)
        else:
            self._in_thread += 1
            self.applier.submit(job)

    def _do_here(self, job: Job) -> None:
        result = self.applier.do(job)
        self._scheduled -= 1
        self._done(job, result)

    def _done_in_thread(self, job: Job, result: Result) -> None:
        self._in_thread -= 1
        self._done(job, result)

    def apply_held(self) -> None:
        """Submit all whose turn it is."""
        admission = self._run.admission
        for ticket in admission.too_stale(self._run.current.version):
            self._drop(ticket, f"--staleness {self._run.settings.staleness}")
        while (update := admission.next_to_apply(self._run.current.version)) is not None:
            self._submit(Update(update, tuple(map(self._contribution, update))))

    def _contribution(self, ticket: Ticket) -> Contribution:
        if not ticket.has_batch:
            return self._session_contribution(ticket)
        member, push = self._pushes[ticket.number]
        staged = self._staged[ticket.number]
        return Contribution(
            ticket.position,
            ticket.base,
            self._run.rounds.size(ticket.position),
            push.loss,
            staged.buffer,
            self._run.worker_name(member),
            self._kept.get(ticket.base, NOT_KEPT),
            is_shared=staged.is_shared,
        )

    def _session_contribution(self, ticket: Ticket) -> Contribution:
        push = self._session_pushes[ticket.number]
        return Contribution(
            ticket.position,
            ticket.base,
            push.examples,
            push.loss if push.loss is not None else 0.0,
            self._staged[ticket.number].buffer,
            push.pusher.history_name,
            self._kept.get(ticket.base, NOT_KEPT),
            push=push.id,
        )

    def _take_session_push(self, ticket: Ticket) -> SessionPush:
        self._staged.pop(ticket.number).give_back()
        return self._session_pushes.pop(ticket.number)

    def _take(self, ticket: Ticket) -> tuple[Member, pb.Push]:
        """Whose the gradient was, which is of no more use."""
        self._staged.pop(ticket.number).give_back()
        return self._pushes.pop(ticket.number)

    def _drop(self, ticket: Ticket, why: str) -> None:
        """Answer a held gradient that is too old; admission has taken it back."""
        self._run.figures.stale_count += 1
        if not ticket.has_batch:
            code = pb.OUTCOME_STALE
            self._take_session_push(ticket).tell(self._session_reply(code, message=why))
            return
        member, push = self._take(ticket)
        self._tell(member, ticket, replies.stale(push.token, why))

    def _tell(self, member: Member, ticket: Ticket, outcome: pb.Outcome) -> None:
        """Answer a push, unless it was told HELD."""
        if ticket.number in self._told_held:
            self._told_held.discard(ticket.number)
        else:
            self._tickets.answer(member, outcome)

    # ----------------------------------------------------------------- settings

    def change(self, settings: Settings) -> asyncio.Future[Result]:
        """Have other settings hold from the next update on.

        Returns:
          The version after which they do, once it is published; or what went wrong.
        """
        self._run.settings = settings
        job = Change(settings)
        self._changes[job] = asyncio.get_running_loop().create_future()
        self._submit(job)
        return self._changes[job]

    def turn(self, dial: Dial) -> None:
        """Hold to the dial that the settings have now; what does not fit goes back."""
        for ticket in self._run.admission.set_dial(dial, self._run.current.version):
            self._drop(ticket, f"consistency was set to {dial}")

    # ------------------------------------------------------ the applier's answers

    def _done(self, job: Job, result: Result) -> None:
        """What became of a job."""
        self._submitted -= 1
        try:
            if isinstance(job, Check):
                self._checked(job, result)
            else:
                self._applied(job, result)
        finally:
            # Not before: an answer may have led to the next job.
            if not self._submitted:
                self.idle.set()

    def _applied(self, job: Update | LeaveOut | Change, result: Result) -> None:
        if isinstance(result, Published):
            self._run.current = result
        if isinstance(job, Update):
            self._update_done(job, result)
        elif isinstance(job, LeaveOut):
            self._left_out(job, result)
        else:
            self._changes.pop(job).set_result(result)
            if isinstance(result, Exception):
                self._failed(result, "the settings could not be changed")
        if not self._changes:
            # Planned ones may have become due.
            self._run.settings = self._run.current.settings
        self._keep_bases()
        self._acknowledge()
        self._moved()

    def _checked(self, job: Check, result: Result) -> None:
        """Whether a gradient that waits for its group is finite."""
        admission = self._run.admission
        if not admission.is_held(job.ticket) or not self._run.in_groups:
            return  # the dial was turned: it was dropped, or is applied on its own
        if isinstance(result, NotFinite):
            member, push = self._take(job.ticket)
            self._refused(member, push, job.ticket, result)
        elif isinstance(result, Exception):
            self._failed(result, "a gradient could not be checked")
        else:
            member, push = self._pushes[job.ticket.number]
            admission.checked(job.ticket)
            self._told_held.add(job.ticket.number)
            if self._applies_held:
                self.apply_held()
            self._tickets.answer(member, replies.held(push.token))
        self._moved()

    def _session_update_done(self, ticket: Ticket, result: Result) -> None:
        run, push = self._run, self._take_session_push(ticket)
        if isinstance(result, Published):
            run.admission.settle((ticket,), result.applied)
            staleness, now = result.version - 1 - ticket.base, run.clock()
            run.figures.session_updates += 1
            run.figures.count_update(
                {} if push.loss is None else {"loss": push.loss},
                examples=push.examples, staleness=staleness, now=now,
            )  # fmt: skip
            push.pusher.applied(staleness, push.examples, now)
            self._owe(result.version, lambda: push.tell(self._session_applied(push, result)))
            return
        run.admission.refuse(ticket)
        if isinstance(result, NotFinite):
            run.figures.nonfinite_count += 1
            text = f"the gradient is not finite: {result}"
            log.warning("%s: %s", push.pusher.name, text)
            reply = self._session_reply(pb.OUTCOME_REJECTED, message=text)
            reply.rejected_for = pb.REJECTED_FOR_NOT_FINITE
            push.tell(reply)
        elif isinstance(result, NotNext):
            push.tell(forgotten())
        elif isinstance(result, LogBroken):
            push.tell(disk_failed())
            self._log_failed(str(result))
        elif isinstance(result, Exception):
            push.tell(Refused(Reason.RUN_OVER, "the update could not be made"))
            self._failed(result, f"the update of version {run.current.version + 1} failed")

    def _session_applied(self, push: SessionPush, result: Published) -> pb.SessionReply:
        last = result.sessions.known[push.id.session]
        return self._session_reply(
            pb.OUTCOME_APPLIED,
            version=last.version,
            staleness=last.staleness,
            last_sequence=last.sequence,
        )

    def _session_reply(self, code: pb.OutcomeCode, **fields: Any) -> pb.SessionReply:
        return pb.SessionReply(stamp=self._run.stamp(), code=code, **fields)

    def _owe(self, version: int, answer: Callable[[], None]) -> None:
        """Have an answer given: now, or with an update log when the version is durable."""
        if self.journal is None:
            answer()
        else:
            self._owed.owe(version, answer)

    def _update_done(self, job: Update, result: Result) -> None:
        if not job.tickets[0].has_batch:
            self._session_update_done(job.tickets[0], result)
            return
        found = [self._take(ticket) for ticket in job.tickets]
        if isinstance(result, Published):
            self._run.admission.settle(job.tickets, result.applied)
            for ticket, (member, push) in zip(job.tickets, found, strict=True):
                self._count(member, push, ticket, result)
            return
        for ticket, (member, push) in zip(job.tickets, found, strict=True):
            if isinstance(result, NotFinite):
                # Of a group it is the sum that is not; then they are all computed anew.
                self._refused(member, push, ticket, result)
            else:
                self._run.admission.refuse(ticket)
        if isinstance(result, Exception) and not isinstance(result, NotFinite):
            self._failed(result, f"the update of version {self._run.current.version + 1} failed")

    def _left_out(self, job: LeaveOut, result: Result) -> None:
        self._pushes.pop(job.ticket.number)
        if isinstance(result, Published):
            self._run.admission.settle((job.ticket,), result.applied)
            self._run.refusals.left_out(job.ticket.position)
            self._tell_pace(job.ticket, None)
        elif isinstance(result, Exception):
            self._run.admission.refuse(job.ticket)
            self._failed(result, "a batch could not be left out")

    def _failed(self, error: Exception, what: str) -> None:
        """A job failed for good, unless the server is being stopped with a full disk."""
        if isinstance(error, LogBroken):
            self._log_failed(str(error))
        elif not isinstance(error, NoRoom) and not self._has_failed:
            # Those that were queued behind the first one fail with it.
            self._has_failed = True
            self._failed_first(error, f"{what}: {error}")

    def _failed_first(self, error: Exception, text: str) -> None:
        if not isinstance(error, Diverged):
            log.error("%s", text, exc_info=error)
        if not self._run.is_done:
            self._run.finish(text)
            return
        self._run.problems["stop"] = text
        log.warning("while the server stops: %s", text)

    def _keep_bases(self) -> None:
        """Keep what is needed of the versions that gradients under way were computed at."""
        run = self._run
        now = base_of(run.current, run.layout)
        if now is NOT_KEPT:
            return
        kept = {**self._kept, run.current.version: now}
        needed = {*run.admission.bases, run.current.version}
        self._kept = {version: kept[version] for version in needed if version in kept}

    def _count(self, member: Member, push: pb.Push, ticket: Ticket, result: Published) -> None:
        run = self._run
        now = run.clock()
        staleness = result.version - 1 - ticket.base
        size = run.rounds.size(ticket.position)
        run.refusals.accepted(member.id, ticket.position)
        run.figures.count_update(
            {**_bounded(push), "loss": push.loss}, examples=size, staleness=staleness, now=now
        )
        member.gradients += 1
        member.staleness.add(staleness)
        member.examples.add(size, now)
        self._tell_pace(ticket, push.tallies)
        outcome = replies.applied(push, result.version, staleness)
        if ticket.number in self._told_held:
            self._tell(member, ticket, outcome)
        else:
            self._owe(result.version, lambda: self._tickets.answer(member, outcome))

    def _tell_pace(self, ticket: Ticket, tallies: Tallies | None) -> None:
        if self._run.pace is not None:
            self._run.pace.on_batch(ticket.position // self._run.rounds.per_epoch, tallies)

    def _refused(self, member: Member, push: pb.Push, ticket: Ticket, why: NotFinite) -> None:
        run = self._run
        batch = run.rounds.name(ticket.position)
        verdict = run.refusals.refused(member.id, ticket.position, run.able())
        text = f"the gradient of {batch} is not finite: {why}"
        log.warning("%s: %s; %s", member.name, text, verdict.value)
        if verdict is Verdict.CONDEMN and run.config.on_nonfinite == "skip":
            # Still being applied, as far as admission knows: as a batch left out.
            self._pushes[ticket.number] = member, push
            run.admission.leave_out(ticket)
            self._submit(LeaveOut(ticket))
        else:
            run.admission.refuse(ticket)
        if verdict is Verdict.QUARANTINE:
            run.ledger.release(member.id)
        self._tell(member, ticket, replies.rejected(push.token, pb.REJECTED_FOR_NOT_FINITE, text))
        if verdict is Verdict.CONDEMN and run.config.on_nonfinite == "end":
            run.finish(
                f"nobody could compute a finite gradient: {text}. Lower the learning rate, or look "
                "at that batch; --on-nonfinite skip leaves such batches out"
            )
        elif verdict is Verdict.QUARANTINE and not run.able():
            run.finish(
                f"every worker computed gradients that are not finite, {member.name} last: {text}. "
                + _why_not_finite(run.current.version)
            )

    # ------------------------------------------------------------- made durable

    def durable(self, version: int) -> None:
        """All up to `version` is on disk: whoever made it may be told."""
        self._owed.on_disk(version)
        self._acknowledge()

    def _acknowledge(self) -> None:
        due = self._owed.due(self._run.current.version)
        self._run.durable_version = self._owed.durable_version
        for answer in due:
            try:
                answer()
            except Exception:  # the others are owed theirs all the same
                log.exception("an update could not be acknowledged")

    def _log_full(self, why: str | None) -> None:
        problems = self._run.problems
        if why is None:
            del problems["log"]
            log.info("there is room for the update log again; pushes go on")
        else:
            problems["log"] = (
                f"the update log in {self._run.run_dir} cannot be written: {why}; pushes are held "
                "until there is room"
            )
            log.error("%s", problems["log"])

    def _log_failed(self, why: str) -> None:
        self._run.log_broken = True
        self._run.finish(
            f"the update log in {self._run.run_dir} failed: {why}. Nothing after version "
            f"{self._run.durable_version} is durable, and nothing of it was acknowledged"
        )

    # ------------------------------------------------------------------- ending

    async def stop(self, *, apply_held: bool) -> None:
        """Wait for room on the disk no longer. Returns when nothing is being applied any more.

        Args:
          apply_held: Apply the gradients that are here whole, paused or not.
        """
        if self.journal is not None:
            self.journal.give_up()
        self._applies_held = apply_held
        if apply_held:
            self._run.admission.paused = False
            self.apply_held()
        await self.idle.wait()  # also for checks under way, which may complete a group


def _on_loop(method: Callable[P, None]) -> Callable[P, None]:
    """The method as threads may call it: it runs on this event loop, a moment later."""
    loop = asyncio.get_running_loop()

    def call(*arguments: P.args, **named: P.kwargs) -> None:
        loop.call_soon_threadsafe(lambda: method(*arguments, **named))

    return call


def _bounded(push: pb.Push, limit: int = 64) -> dict[str, float]:
    """A push's metrics, not more than can be shown."""
    return dict(sorted(push.metrics.items())[:limit])


def _why_not_finite(version: int) -> str:
    if not version:
        return (
            "These are the initial weights: look for what is not finite in the data, in "
            "Task.init or in the loss; `headwater check` computes one gradient"
        )
    return "The weights have probably diverged: lower the learning rate"

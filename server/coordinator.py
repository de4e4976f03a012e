"""The run's middle: events of workers in, tickets and outcomes out.

Lives on the event loop, alone touches leases and tickets, and never waits. It
puts the parts together:

    run_state.py   what is known; the state machines decide (ledger, admission, ...)
    tickets.py     what is said to workers
    updates.py     held gradients into versions, by the applier's thread
    steering.py    what a user changes while it trains

Sessions do the talking; the ending is in serve.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from typing import Any

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Reason, Refused
from headwater.server import replies
from headwater.server.admission import Ticket, Unwanted
from headwater.server.history import History
from headwater.server.roster import Member
from headwater.server.run_state import Run
from headwater.server.session import Session
from headwater.server.session_pushes import SessionPushes
from headwater.server.staging import Staged
from headwater.server.steering import Steering
from headwater.server.store import Store
from headwater.server.tickets import Tickets
from headwater.server.update_log import UpdateLog
from headwater.server.updates import Updates
from headwater.server.waiters import Waiters

log = logging.getLogger("headwater.server")


class Coordinator:
    """One run, while it is served. Every method is called on the event loop.

    Args:
      on_event: See `Steering`.
      history, update_log: See `Updates`.
    """

    def __init__(
        self,
        run: Run,
        store: Store,
        on_event: Callable[[str, dict[str, Any]], None],
        *,
        update_log: UpdateLog | None = None,
        history: History | None = None,
    ) -> None:
        self.run = run
        self.tickets = Tickets(run, self._pump)
        self.updates = Updates(
            run, store, self.tickets, self._moved, history=history, update_log=update_log
        )
        self.session_pushes = SessionPushes(run, self.updates, self._pump)
        self.steering = Steering(run, store, self.updates, self._pump, on_event)
        self._history = history
        self._drained = asyncio.Event()  # no tickets are issued, and none is out any more
        self._version_waiters = Waiters()
        self._epoch_waiters = Waiters()
        self._epoch = run.ledger.epoch

    # ----------------------------------------------------- workers come and go

    def join(self, session: Session, hello: pb.Hello) -> Member:
        """Check a hello, take the worker in, and welcome it.

        Raises:
          Refused: Its protocol, task, layout or run is another; or it may not come
            back; or this server is about to end without a word.
        """
        run = self.run
        if run.log_broken:
            raise Refused(Reason.SERVER_ENDED, "the server's disk failed")
        warnings = run.identity.check(hello, run.current.incarnation)
        # All that may refuse comes before the first change, which would have to be undone.
        run.roster.check(hello)
        if not run.is_done:
            self.steering.check_compute(hello)
        member, old = run.roster.join(hello, run.clock())
        if old is not None:
            self._forget(old)
            self.tickets.close(old, (Reason.FENCED, "a newer stream of this worker took over"))
        self.tickets.open(member, session)
        for warning in warnings:
            log.warning("%s: %s", member.name, warning)
        if run.state_override is not None:
            log.info("%s came after the end", member.name)
            self._bye_now(member)
            return member
        self.tickets.welcome(member, warnings)
        log.info("%s joined (%s)", member.name, member.hello.platform)
        if self._history is not None:
            self._history.append(
                {
                    "v": run.current.version,
                    "worker": run.worker_name(member),
                    "name": member.name,
                    "compute": dict(hello.compute),
                }
            )
        return member

    def ready(self, member: Member) -> None:
        """The worker has compiled and wants its first ticket."""
        member.ready = True
        member.phase = "waiting"
        self.tickets.request(member)
        self._pump()

    def heard(self, member: Member) -> None:
        """Any message or part renews the session."""
        member.heard_time = self.run.clock()

    def progress(self, member: Member, progress: pb.Progress) -> None:
        """Renew the tickets of a worker that moved on."""
        member.set_phase(progress.phase)
        if progress.steps != member.steps:
            member.steps = progress.steps
            self.run.admission.progress(member.id, self.run.clock())

    def lost(self, member: Member) -> None:
        """The worker's stream has ended: what it had not finished goes back."""
        self.tickets.close(member)
        if self.run.roster.leave(member):
            self._forget(member)
            log.info("%s left", member.name)

    def evict(self, who: str) -> str:
        """Take a worker out and bar it; returns its name.

        Raises:
          Refused: UNKNOWN_WORKER.
        """
        member = self.run.roster.evict(who)
        self.say_bye(member, pb.BYE_EVICTED, "this worker was evicted")
        return member.name

    def say_bye(self, member: Member, reason: pb.ByeReason, message: str) -> None:
        """Take back what the worker has and let its stream end in order."""
        self._forget(member)
        member.ready, member.leaving = False, True
        self.tickets.bye(member, reason, message)

    def _forget(self, member: Member) -> None:
        self.run.admission.lost(member.id)
        self.run.refusals.forget(member.id)
        self._pump()

    # ------------------------------------------------------------------ pushes

    def check_tallies(self, member: Member, push: pb.Push) -> None:
        """See that a push can be added up, by the program that leads the run.

        Raises:
          Refused: MALFORMED; not an outcome, since all of this worker's pushes are like it.
        """
        pace, count = self.run.pace, len(push.tallies)
        if pace is None or count == pace.tally_count:
            return
        self.run.figures.malformed_count += 1
        message = (
            f"the push adds up {count} numbers, and the program that leads the run "
            f"{pace.tally_count}; has the worker's script other metrics, in model.compile?"
        )
        log.warning("%s: push rejected: %s", member.name, message)
        raise Refused(Reason.MALFORMED, message)

    def admit(self, member: Member, push: pb.Push) -> Ticket | None:
        """The ticket of a push that begins; None when it was answered with a refusal."""
        ticket = self.tickets.outstanding(member, push.token)
        if ticket is None or push.incarnation != self.run.current.incarnation:
            member.came_late(push)
            self._not_wanted(member, push.token)
            return None
        if push.base != ticket.base:
            self.reject_malformed(
                member, ticket, push.token,
                f"the push's base is version {push.base}, its ticket's is {ticket.base}",
            )  # fmt: skip
            return None
        if not all(map(math.isfinite, (push.load_s, push.compute_s, push.queue_s))):
            self.reject_malformed(member, ticket, push.token, "the push's times are not finite")
            return None
        return ticket

    def still_wanted(self, member: Member, ticket: Ticket, token: pb.Token) -> bool:
        """Whether a push under way still has its ticket; answers it otherwise."""
        member.set_phase(pb.PHASE_SENDING)
        if self.run.admission.outstanding(ticket.number) == ticket:
            self.run.admission.progress(member.id, self.run.clock())
            return True
        self._not_wanted(member, token)
        return False

    def received(self, member: Member, ticket: Ticket, push: pb.Push, staged: Staged) -> None:
        """The whole gradient is here."""
        issued_time = self.run.admission.issued_time(ticket.number)
        step_s = max(0.0, self.run.clock() - issued_time - max(0.0, push.queue_s))
        member.steps_s.add(step_s)
        member.times.pushed(push.load_s, push.compute_s, step_s)
        member.phase = "waiting"
        member.hung = False
        self.updates.received(member, ticket, push, staged)
        self._pump()

    def reject_malformed(
        self, member: Member, ticket: Ticket, token: pb.Token, message: str
    ) -> None:
        """Refuse a push that breaks the protocol; its batch goes back."""
        if self.run.admission.outstanding(ticket.number) != ticket:
            self._not_wanted(member, token)
            return
        self.run.figures.malformed_count += 1
        self.run.admission.refuse(ticket)
        log.warning("%s: push rejected: %s", member.name, message)
        outcome = replies.rejected(token, pb.REJECTED_FOR_MALFORMED, message)
        self.tickets.answer(member, outcome)
        self._pump()

    def _not_wanted(self, member: Member, token: pb.Token) -> None:
        """Answer a push whose ticket is no longer out, or never was."""
        run, why = self.run, None
        if self.tickets.token_is_mine(token):
            why = run.admission.unwanted(token.number, member.id)
        if why is Unwanted.DUPLICATE:
            run.figures.duplicate_count += 1
            outcome = replies.duplicate(token)
        elif why is Unwanted.STALE:
            run.figures.stale_count += 1
            outcome = replies.stale(token, f"consistency was set to {run.settings.dial}")
        else:
            run.figures.lease_lost_count += 1
            outcome = replies.lease_lost(token)
        member.hung = False
        self.tickets.answer(member, outcome)
        self._pump()

    # ------------------------------------------------------------- going round

    def _pump(self) -> None:
        """Apply what is held and grant what can be granted."""
        if self.run.is_done:
            self._drained.set()
            return
        self.updates.apply_held()
        self.session_pushes.wake()
        if not self.run.draining:
            self.tickets.grant()
        elif not self.run.admission.out_count:
            self._drained.set()

    def _moved(self) -> None:
        """The applier has answered."""
        run = self.run
        self._version_waiters.wake(run.current.version)
        if run.ledger.epoch > self._epoch:
            self._epoch = run.ledger.epoch
            if run.config.epoch_barrier:
                run.evaluations.keep(self._epoch, run.current)
            self._epoch_waiters.wake(self._epoch)
        if run.ledger.done:
            run.finish(None)
        self._pump()

    # -------------------------------------------------------------------- time

    def tick(self) -> None:
        """Find the silent, the hung and the endless compilers; be heard. Called each moment."""
        run, now = self.run, self.run.clock()
        run.admission.session_count = len(run.pushers.shown(now))
        for member in run.roster.silent(now, run.config.session_timeout_s):
            self._cut(member, Reason.SILENT, f"not heard of for {now - member.heard_time:.0f} s")
        for member in list(run.roster.members.values()):
            compiles = not (member.ready or member.leaving)
            if compiles and now - member.joined_time > run.config.compile_timeout_s:
                limit = run.config.compile_timeout_s
                self._cut(member, Reason.COMPILE_TIMEOUT, f"not ready after {limit:.0f} s")
        for ticket, released in run.admission.expire(now):
            if not ticket.has_batch:
                continue  # a session's; whoever receives it sees that it is gone
            member = run.roster.members[ticket.worker]
            member.hung = True
            self.tickets.withdraw(member, released)
            log.warning(
                "%s: no progress on %s; taken back; raise --ticket-timeout where one gradient "
                "takes that long", member.name, run.rounds.name(ticket.position),
            )  # fmt: skip
        self.tickets.pulse()
        self._pump()

    def shift(self, seconds: float) -> None:
        """The server itself stood still for so long: move every deadline."""
        self.run.admission.shift(seconds, self.run.clock())
        self.run.roster.shift(seconds)

    def _cut(self, member: Member, reason: Reason, message: str) -> None:
        log.warning("%s: %s", member.name, message)
        self.tickets.close(member, (reason, message))
        self.lost(member)

    # ------------------------------------------------------- beginning, ending

    def begin(self) -> None:
        """Find out whether there is anything left to train."""
        if self.run.ledger.done:
            self.run.finish(None)

    def allow_epochs(self, count: int) -> None:
        """Let so many epochs be begun."""
        self.run.ledger.allowed_epochs = count
        self._pump()

    async def drain(self, timeout_s: float) -> None:
        """No more tickets; returns when those that are out have come back, or after the time."""
        self.run.draining = True
        self._pump()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._drained.wait()

    async def stop_training(self, *, apply_held: bool) -> None:
        """No more tickets. Returns when nothing is being applied any more; see `Updates.stop`."""
        self.run.is_done = True
        await self.updates.stop(apply_held=apply_held)

    def bye_to_all(self) -> None:
        for member in list(self.run.roster.members.values()):
            self._bye_now(member)

    def cut_all(self, message: str) -> None:
        """End all streams without bye: the workers wait for the next server, as after a crash."""
        self.tickets.close_all(Reason.SERVER_ENDED, message)

    def _bye_now(self, member: Member) -> None:
        reasons = {pb.RUN_FINISHED: pb.BYE_FINISHED, pb.RUN_FAILED: pb.BYE_FAILED}
        state = self.run.state_override or pb.RUN_STOPPING
        text = self.run.problems["end"] if state == pb.RUN_FAILED else ""
        self.say_bye(member, reasons.get(state, pb.BYE_STOPPED), text)

    # ----------------------------------------------------------------- reading

    async def wait_for_version(self, version: int, timeout_s: float) -> None:
        """Returns when the version is there, the run is over, or the time has passed."""
        if self.run.current.version < version and self.run.state_override is None:
            await self._version_waiters.wait(version, timeout_s)

    async def wait_for_epoch(self, complete: int, timeout_s: float) -> None:
        """Returns when so many are complete, the run is over, or the time has passed."""
        if self.run.ledger.epoch < complete and self.run.state_override is None:
            await self._epoch_waiters.wait(complete, timeout_s)

    def end_waits(self) -> None:
        """The run is over: nobody waits for a version that will not come."""
        self.session_pushes.end()
        self._version_waiters.wake(None)
        self._epoch_waiters.wake(None)

"""What is said to workers: tickets, outcomes, leases, bye, each into its worker's stream.

The next ticket goes with the outcome of the last push in one message where it can.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Reason
from headwater.server import replies
from headwater.server.admission import Grant, Ticket
from headwater.server.roster import Member
from headwater.server.run_state import Run
from headwater.server.session import Session

log = logging.getLogger("headwater.server")

BACKUP_LATE_S = 0.001
"""After the moment from which a batch may be given to a second worker."""

PULSE_S = 2.0
"""Between messages to a worker that waits, so that it can tell waiting from a dead network."""


class Tickets:
    """The workers' streams, and the tickets that go down them.

    Args:
      run: Its admission is asked for tickets.
      pump: Called when a batch may be given to a second worker.
    """

    def __init__(self, run: Run, pump: Callable[[], None]) -> None:
        self._run = run
        self._pump = pump
        self._sessions: dict[int, Session] = {}
        self._life = secrets.randbits(64)
        self._backup_timer: asyncio.TimerHandle | None = None

    # ----------------------------------------------------------------- streams

    def open(self, member: Member, session: Session) -> None:
        """The worker is heard through this stream."""
        self._sessions[member.id] = session

    def close(self, member: Member, why: tuple[Reason, str] | None = None) -> None:
        """The worker's stream has ended, or is to end with a refusal."""
        session = self._sessions.pop(member.id, None)
        if session is not None and why is not None:
            session.end(*why)

    def close_all(self, reason: Reason, message: str) -> None:
        """End all streams without bye: the workers wait for the next server, as after a crash."""
        for session in list(self._sessions.values()):
            session.end(reason, message)

    def welcome(self, member: Member, warnings: list[str]) -> None:
        run = self._run
        self._send(
            member,
            welcome=replies.welcome(
                member, run.identity.run_id, run.rounds, run.config, warnings, run.inner_optimizer
            ),
        )

    def bye(self, member: Member, reason: pb.ByeReason, message: str) -> None:
        self._send(member, bye=pb.Bye(reason=reason, message=message))

    def withdraw(self, member: Member, positions: Sequence[int]) -> None:
        """Tell a worker that batches are no longer reserved for it."""
        if positions:
            self._send(member, lease=replies.withdrawal(self._run.rounds, positions))

    def pulse(self) -> None:
        """Be heard by those who wait."""
        for member in self._run.roster.listening():
            session = self._sessions.get(member.id)
            if session is not None and session.quiet_for(PULSE_S):
                self._send(member)  # only the stamp

    # ----------------------------------------------------------------- tickets

    def token_is_mine(self, token: pb.Token) -> bool:
        """Whether it is of this life of the process."""
        return token.life == self._life

    def outstanding(self, member: Member, token: pb.Token) -> Ticket | None:
        """The worker's ticket, if its gradient is still awaited."""
        if not self.token_is_mine(token):
            return None
        ticket = self._run.admission.outstanding(token.number)
        return ticket if ticket and ticket.worker == member.id else None

    def request(self, member: Member) -> bool:
        """The worker wants a ticket; whether it may have one."""
        run = self._run
        may = (
            member.ready
            and member.id in run.roster.members
            and member.id not in run.refusals.quarantined
            and self._has_room(member)
        )
        if may:
            run.admission.request(
                member.id,
                member.deadline_s(run.config.ticket_timeout_s),
                member.reserve(run.config.lease_s),
            )
            member.times.asked(run.clock())
        return may

    def _has_room(self, member: Member) -> bool:
        admission = self._run.admission
        # Those that were pushed count too: a worker that is faster than the server would have
        # ever more of them waiting, and older.
        return not admission.tickets_of(member.id) or (
            admission.under_way_of(member.id) < self._depth(member)
        )

    def _depth(self, member: Member) -> int:
        """Gradients that may be under way: with two, the worker computes while it exchanges."""
        run, dial = self._run, self._run.settings.dial
        if not member.hello.pipelines or not run.config.pipelines or dial.group is not None:
            return 1
        if dial.bound == 0:
            return 1
        if run.config.pipeline == "on":
            return 2
        # A CPU here would compute slower for all that goes on beside it.
        waits = member.transport == "grpc" or member.hello.platform != "cpu"
        return 2 if waits and len(run.able()) > 1 else 1

    def answer(self, member: Member, outcome: pb.Outcome) -> None:
        """Send an outcome, with the next ticket in the same message where there is one."""
        run = self._run
        session = self._sessions.get(member.id)
        if session is None:
            return
        self.request(member)
        message = self._message(outcome=outcome)
        if run.is_done or run.draining or run.ledger.done:
            session.send(message)
            return
        sent = False
        for grant in self._grants():
            if grant.ticket.worker == member.id and not sent:
                self._send_grant(grant, message)
                sent = True
            else:
                self._send_grant(grant)
        if not sent:
            session.send(message)

    def grant(self) -> None:
        """Issue what can be issued."""
        run = self._run
        for grant in self._grants():
            self._send_grant(grant)
        due = run.admission.backup_time()
        if due is not None and self._backup_timer is None:
            self._backup_timer = asyncio.get_running_loop().call_later(
                max(0.0, due - run.clock()) + BACKUP_LATE_S, self._back_up
            )

    def _grants(self) -> Iterator[Grant]:
        """All that can be issued; who has one asks for a second, if it may have two."""
        run = self._run
        while grants := run.admission.grants(run.current.version, run.clock()):
            yield from grants
            asked = [self.request(run.roster.members[grant.ticket.worker]) for grant in grants]
            if not any(asked):
                return

    def _back_up(self) -> None:
        self._backup_timer = None
        self._pump()

    def _send_grant(self, grant: Grant, message: pb.ServerMessage | None = None) -> None:
        """Send a ticket, in `message` if there is one to join, with the weights it is based on."""
        run = self._run
        member = run.roster.members[grant.ticket.worker]
        message = message or self._message()
        if grant.leased:
            message.lease.CopyFrom(replies.lease(run.rounds, grant.leased))
        if grant.withdrawn_from is not None:
            self.withdraw(run.roster.members[grant.withdrawn_from], [grant.ticket.position])
        deadline_s = member.deadline_s(run.config.ticket_timeout_s)
        message.ticket.CopyFrom(replies.ticket(run.rounds, grant, self._life, deadline_s))
        member.times.granted(run.clock())
        weights = run.current if member.has_version != grant.ticket.base else None
        member.has_version = grant.ticket.base
        self._sessions[member.id].send(message, weights)

    # --------------------------------------------------------------- privately

    def _send(
        self,
        member: Member,
        welcome: pb.Welcome | None = None,
        lease: pb.Lease | None = None,
        bye: pb.Bye | None = None,
    ) -> None:
        if session := self._sessions.get(member.id):
            session.send(self._message(welcome=welcome, lease=lease, bye=bye))

    def _message(
        self,
        welcome: pb.Welcome | None = None,
        outcome: pb.Outcome | None = None,
        lease: pb.Lease | None = None,
        bye: pb.Bye | None = None,
    ) -> pb.ServerMessage:
        return pb.ServerMessage(
            stamp=self._run.stamp(), welcome=welcome, outcome=outcome, lease=lease, bye=bye
        )

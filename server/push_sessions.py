"""Which pushes of sessions have moved the weights: exactly-once is decided here for those
that are of no batch.

Of each session its last applied push is remembered. The next one to be applied has the
sequence after it, and no other; all up to it are repeats, whoever sends them. This is
part of every published version, so it goes back with the weights when a crash takes
updates back; then the client sends again what is missing, in order.

Memory is bounded: the session that was applied longest ago is forgotten when more than
MAX_SESSIONS are known. From then on an unknown session may be one that was forgotten.
It is taken for new only if it was opened at a later version than each of those; all
others are refused, for ever. So no push is applied twice, at the price that a session
may be refused which had not pushed anything yet.

Pure values: no I/O, no threads, no clock.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

MAX_SESSIONS = 4096
"""A version's table has a line of about 60 bytes for each in a snapshot's header."""


@dataclasses.dataclass(frozen=True)
class PushId:
    """One push, as it is named for ever."""

    session: int
    opened: int
    """The version that the session began with."""
    sequence: int


@dataclasses.dataclass(frozen=True)
class LastPush:
    """A session's last that was applied."""

    opened: int
    sequence: int
    version: int
    """That it made."""
    staleness: int


class Verdict(enum.Enum):
    """What is to become of a push."""

    NEXT = "it may be applied"
    REPEATED = "it was applied before"
    MISSING = "others come before it"
    FORGOTTEN = "it may have been applied before, and nobody knows"


class NotNext(Exception):
    """The push is not the next of its session, or nobody knows whether it is."""


@dataclasses.dataclass(frozen=True)
class PushSessions:
    """The sessions in one version's history."""

    known: Mapping[int, LastPush] = dataclasses.field(default_factory=dict)
    """The one that was applied longest ago comes first."""
    forgotten: int = -1
    """The latest version that a session which is not known any more was opened at."""

    def judge(self, push: PushId) -> Verdict:
        last = self.known.get(push.session)
        if last is None and push.opened <= self.forgotten:
            return Verdict.FORGOTTEN
        done = last.sequence if last is not None else 0
        if push.sequence <= done:
            return Verdict.REPEATED
        return Verdict.NEXT if push.sequence == done + 1 else Verdict.MISSING

    def check(self, push: PushId) -> None:
        """Raises:
        NotNext: It must not be applied.
        """
        if (verdict := self.judge(push)) is not Verdict.NEXT:
            raise NotNext(f"push {push.sequence} of session {push.session:x}: {verdict.value}")

    def last_sequence(self, session: int) -> int:
        """0 where none is known."""
        last = self.known.get(session)
        return last.sequence if last is not None else 0

    def add(
        self, push: PushId, version: int, staleness: int, limit: int = MAX_SESSIONS
    ) -> PushSessions:
        """With this push, which made `version`.

        Raises:
          NotNext: Something was about to be counted twice.
        """
        self.check(push)
        known = dict(self.known)
        before = known.pop(push.session, None)
        opened = before.opened if before is not None else push.opened
        known[push.session] = LastPush(opened, push.sequence, version, staleness)
        forgotten = self.forgotten
        if len(known) > limit:
            oldest = known.pop(next(iter(known)))
            forgotten = max(forgotten, oldest.opened)
        return PushSessions(known, forgotten)

    def to_json(self) -> dict[str, Any] | None:
        """As `from_json` reads it; None where there never was a session."""
        if not self.known and self.forgotten < 0:
            return None
        known = [[session, *dataclasses.astuple(last)] for session, last in self.known.items()]
        return {"known": known, "forgotten": self.forgotten}

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> PushSessions:
        """The opposite of `to_json`."""
        if values is None:
            return cls()
        known = {session: LastPush(*last) for session, *last in values["known"]}
        return cls(known, values["forgotten"])

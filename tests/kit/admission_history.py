"""Histories of admission over its ledger, as lines that anyone can review."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from headwater.server.admission import Admission, Grant, Ticket
from headwater.server.dial import Dial
from headwater.server.ledger import Ledger

DEADLINE_S = 60


class History:
    """A run driven by lines such as `push a -> 0 applied, a gets 1`.

    What is left of the arrow is done, and tickets are granted where they can
    be; right of it stands what came of that. Workers are letters, and what is
    joined by + is one update.
    """

    def __init__(
        self,
        total: int,
        dial: str = "async",
        *,
        per_epoch: int | None = None,
        slots: int = 100,
        workers: int = 0,
    ) -> None:
        self.ledger = Ledger(total, per_epoch or total)
        self.admission = Admission(
            self.ledger,
            slots,
            lambda worker: self.avoided.get(worker, ()),
            Dial.parse(dial),
            lambda: workers,
        )
        self.avoided: dict[int, set[int]] = {}
        self.staleness: list[int] = []
        """Of all gradients that were applied, in order."""
        self._version = 0
        self._newest: dict[int, Ticket] = {}  # of each worker
        self._applying: deque[tuple[Ticket, ...]] = deque()
        self._now = 0.0
        self._paused_time = 0.0

    def play(self, text: str) -> None:
        for line in filter(None, map(str.strip, text.splitlines())):
            action, _, expected = (part.strip() for part in line.partition("->"))
            found = self.do(action)
            assert found == expected, f"{action} -> {found}; expected was {expected}"

    def do(self, action: str) -> str:
        verb, *words = action.split()
        verbs: dict[str, Callable[..., list[str]]] = {
            "ask": self._ask,
            "hold": self._hold,
            "check": self._check,
            "begin": self._begin,
            "end": self._end,
            "push": self._push,
            "refuse": self._refuse,
            "leave_out": self._leave_out,
            "lose": self._lose,
            "wait": self._wait,
            "progress": self._progress,
            "stand_still": self._stand_still,
            "pause": self._pause,
            "resume": self._resume,
            "dial": self._dial,
            "drop": self._drop,
        }
        found = verbs[verb](*words)
        grants = self.admission.grants(version=self._version, now=self._now)
        self._newest |= {grant.ticket.worker: grant.ticket for grant in grants}
        return ", ".join([*found, *map(_shown, grants)]) or "nothing"

    def reserve(self, who: str) -> list[int]:
        return self.ledger.leased_to(worker_id(who))

    def _ask(self, *who: str) -> list[str]:
        for letter in who:
            self.admission.request(worker_id(letter), DEADLINE_S)
        return []

    def _hold(self, who: str) -> list[str]:
        tickets = self.admission.tickets_of(worker_id(who))
        if not tickets:
            why = self.admission.unwanted(self._newest[worker_id(who)].number, worker_id(who))
            return [why.name if why else "LEASE_LOST"]
        return [f"{self.admission.hold(tickets[0].number, self._now).position} held"]

    def _check(self, who: str) -> list[str]:
        """In sync mode: the worker's newest gradient is found to be finite."""
        self.admission.checked(self._newest[worker_id(who)])
        return []

    def _begin(self) -> list[str]:
        late = [f"{t.position} too stale" for t in self.admission.too_stale(self._version)]
        update = self.admission.next_to_apply(self._version)
        self._applying.extend([update] if update else [])
        return [*late, *([f"{_joined(update)} begun"] if update else [])]

    def _end(self) -> list[str]:
        update = self._applying.popleft()
        self.staleness += [self._version - ticket.base for ticket in update]
        self._version += 1
        self._settle(update)
        return [f"{_joined(update)} applied"]

    def _settle(self, update: tuple[Ticket, ...]) -> None:
        applied = self.ledger.applied
        for ticket in update:
            applied = applied.add(ticket.position)
        self.admission.settle(update, applied)

    def _push(self, who: str) -> list[str]:
        """A whole round: hold, check, apply what can be applied, ask."""
        found = self._hold(who)
        self._check(who)
        while begun := self._begin():
            found += [what for what in begun if not what.endswith("begun")]
            while self._applying:
                found += self._end()
        if f"{found[0].removesuffix(' held')} applied" in found:
            del found[0]
        return [*found, *self._ask(who)]

    def _refuse(self, who: str) -> list[str]:
        """The worker's newest gradient is malformed, or not finite."""
        ticket = self._newest[worker_id(who)]
        self._applying = deque(update for update in self._applying if ticket not in update)
        self.admission.refuse(ticket)
        return [f"{ticket.position} back"]

    def _leave_out(self, who: str) -> list[str]:
        """The batch of the worker's newest gradient cannot be computed by anyone."""
        ticket = self._newest[worker_id(who)]
        self._applying = deque(update for update in self._applying if ticket not in update)
        self.admission.leave_out(ticket)
        self._settle((ticket,))
        return [f"{ticket.position} left out"]

    def _lose(self, who: str) -> list[str]:
        return [self._gone(ticket) for ticket in self.admission.lost(worker_id(who))]

    def _wait(self, seconds: str) -> list[str]:
        self._now += float(seconds)
        return [self._gone(ticket) for ticket, _ in self.admission.expire(self._now)]

    def _gone(self, ticket: Ticket) -> str:
        is_back = self.ledger.state(ticket.position) is None
        return f"{ticket.position} {'back' if is_back else 'lost'}"

    def _progress(self, who: str) -> list[str]:
        self.admission.progress(worker_id(who), self._now)
        return []

    def _stand_still(self, seconds: str) -> list[str]:
        self._now += float(seconds)
        self.admission.shift(float(seconds), self._now)
        return []

    def _pause(self) -> list[str]:
        self.admission.paused, self._paused_time = True, self._now
        return []

    def _resume(self) -> list[str]:
        self.admission.paused = False
        self.admission.shift(self._now - self._paused_time, self._now)
        return []

    def _dial(self, text: str) -> list[str]:
        out = [t for worker in self._newest for t in self.admission.tickets_of(worker)]
        late = self.admission.set_dial(Dial.parse(text), self._version)
        void = [t for t in out if not self.admission.outstanding(t.number)]
        return [
            *(f"{ticket.position} back" for ticket in late),
            *(f"{letter_of(ticket.worker)}'s {ticket.position} void" for ticket in void),
        ]

    def _drop(self, limit: str) -> list[str]:
        self.admission.drop_over = int(limit)
        return []


def worker_id(letter: str) -> int:
    """Of the worker called so in a history."""
    return ord(letter) - ord("a")


def letter_of(worker: int) -> str:
    return chr(ord("a") + worker)


def _shown(grant: Grant) -> str:
    source = "" if grant.withdrawn_from is None else f" from {letter_of(grant.withdrawn_from)}"
    return f"{letter_of(grant.ticket.worker)} gets {grant.ticket.position}{source}"


def _joined(update: tuple[Ticket, ...]) -> str:
    return "+".join(str(ticket.position) for ticket in update)

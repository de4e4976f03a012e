"""Who may take part in a run: the checks on a worker's hello."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Reason, Refused
from headwater.protos.layout import Layout, LayoutError, differences
from headwater.protos.rpc import PROTOCOL
from headwater.server.roster import printable


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """What a run is, for those who want to join it."""

    run_id: str
    task: pb.TaskIdentity
    layout: Layout
    software: Mapping[str, str]
    """Library to version, on the server's side."""

    def check(self, hello: pb.Hello, incarnation: int) -> list[str]:
        """Refuse what cannot take part; returns warnings about what may compute otherwise.

        Raises:
          Refused: PROTOCOL_MISMATCH, MALFORMED, WRONG_RUN, OLD_INCARNATION,
            TASK_MISMATCH or LAYOUT_MISMATCH; says what differs.
        """
        if hello.protocol != PROTOCOL:
            raise Refused(
                Reason.PROTOCOL_MISMATCH,
                f"the worker speaks protocol {hello.protocol}, the server {PROTOCOL}; install the "
                "same version of headwater on both",
            )
        if hello.instance == 0 or hello.attempt == 0:
            raise Refused(Reason.MALFORMED, "hello.instance and hello.attempt must not be 0")
        self.check_run(hello.run_id, hello.seen_incarnation, incarnation)
        if not self.task.example_count:
            raise Refused(
                Reason.TASK_MISMATCH,
                "the server's run has no batches to give to workers: it was started without "
                "--examples, for push sessions alone",
            )
        self._check_task(hello.task)
        self._check_layout(hello.layout)
        return [
            f"{name} is {printable(theirs)} here, {self.software[name]} on the server"
            for name, theirs in sorted(hello.software.items())
            if name in self.software and theirs != self.software[name]
        ]

    def check_run(self, run_id: str, seen_incarnation: int, incarnation: int) -> None:
        """Refuse who belongs to another run, or has seen a later life of this one.

        Raises:
          Refused: WRONG_RUN or OLD_INCARNATION.
        """
        if run_id and run_id != self.run_id:
            raise Refused(
                Reason.WRONG_RUN,
                f"this server keeps run {self.run_id}, not {printable(run_id)}; the run you took "
                "part in is not here",
            )
        if seen_incarnation > incarnation:
            raise Refused(
                Reason.OLD_INCARNATION,
                f"this server is incarnation {incarnation} of its run, but incarnation "
                f"{seen_incarnation} has been seen: it was restored from an older copy. Start it "
                "from the newest copy of the run directory",
            )

    def _check_task(self, theirs: pb.TaskIdentity) -> None:
        mine = self.task
        pairs = [
            ("task", mine.name, theirs.name),
            ("options", _options(mine), _options(theirs)),
            ("examples", mine.example_count, theirs.example_count),
            ("batch size", mine.batch_size, theirs.batch_size),
            ("seed", mine.seed, theirs.seed),
        ]
        found = [
            f"{what}: {printable(str(there))} in the worker, {here} in the server"
            for what, here, there in pairs
            if here != there
        ]
        if found:
            raise Refused(
                Reason.TASK_MISMATCH,
                f"the worker's task is another than the server's: {'; '.join(found)}",
            )

    def _check_layout(self, message: pb.Layout) -> None:
        try:
            theirs = Layout.from_proto(message)
        except LayoutError as error:
            raise Refused(Reason.MALFORMED, f"hello.layout: {error}") from None
        if theirs.fingerprint != self.layout.fingerprint:
            found = "; ".join(differences(theirs, self.layout))
            raise Refused(
                Reason.LAYOUT_MISMATCH,
                f"the worker's tensors differ from the server's (here: the worker, there: the "
                f"server): {found}",
            )


def _options(task: pb.TaskIdentity) -> str:
    return ", ".join(f"{k}={v}" for k, v in sorted(task.options.items())) or "none"

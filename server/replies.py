"""What the server says to a worker, put into messages. Pure; the .proto explains the fields."""

from __future__ import annotations

from collections.abc import Iterable

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.wire import PART_BYTES
from headwater.server.admission import Grant
from headwater.server.config import ServerConfig
from headwater.server.order import BatchId, BatchOrder
from headwater.server.roster import Member


def welcome(
    member: Member, run_id: str, order: BatchOrder, config: ServerConfig, warnings: list[str]
) -> pb.Welcome:
    """The run's settings, for a worker that was taken in."""
    return pb.Welcome(
        run_id=run_id,
        worker_id=member.id,
        name=member.name,
        seed=order.seed,
        batch_size=order.batch_size,
        epochs=order.epochs,
        batches_per_epoch=order.per_epoch,
        max_part_bytes=PART_BYTES,
        session_timeout_s=config.session_timeout_s,
        warnings=warnings,
    )


def lease(order: BatchOrder, positions: Iterable[int]) -> pb.Lease:
    """Batches newly reserved, with the examples they consist of."""
    return pb.Lease(
        granted=[
            pb.Batch(id=batch_id(order.id(position)), indices=order.indices(position).tolist())
            for position in positions
        ]
    )


def withdrawal(order: BatchOrder, positions: Iterable[int]) -> pb.Lease:
    """Batches that are no longer reserved."""
    return pb.Lease(withdrawn=[batch_id(order.id(position)) for position in positions])


def ticket(order: BatchOrder, grant: Grant, life: int, deadline_s: float) -> pb.Ticket:
    """The right to one push; `life` is this process's part of the token."""
    return pb.Ticket(
        token=pb.Token(life=life, number=grant.ticket.number),
        batches=[batch_id(order.id(grant.ticket.position))],
        base=grant.ticket.base,
        deadline_s=deadline_s,
    )


def applied(push: pb.Push, version: int, staleness: int) -> pb.Outcome:
    """The push moved the weights."""
    return pb.Outcome(
        token=push.token, code=pb.OUTCOME_APPLIED, version=version, staleness=staleness
    )


def lease_lost(token: pb.Token) -> pb.Outcome:
    """The push has no living ticket."""
    return pb.Outcome(
        token=token,
        code=pb.OUTCOME_LEASE_LOST,
        message="this ticket is not, or no longer, yours; nothing was changed",
    )


def rejected(token: pb.Token, why: pb.RejectedFor, message: str) -> pb.Outcome:
    """The push cannot be applied; its batch goes back."""
    return pb.Outcome(token=token, code=pb.OUTCOME_REJECTED, rejected_for=why, message=message)


def batch_id(batch: BatchId) -> pb.BatchId:
    return pb.BatchId(epoch=batch.epoch, shard=batch.shard, number=batch.number)

"""What the server says to a worker, put into messages. Pure; the .proto explains the fields."""

from __future__ import annotations

from collections.abc import Iterable

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.wire import PART_BYTES
from headwater.server.admission import Grant
from headwater.server.config import ServerConfig
from headwater.server.order import BatchId
from headwater.server.roster import Member
from headwater.server.rounds import Rounds


def welcome(
    member: Member,
    run_id: str,
    rounds: Rounds,
    config: ServerConfig,
    warnings: list[str],
    inner_optimizer: str,
) -> pb.Welcome:
    """The run's settings, for a worker that was taken in."""
    order = rounds.order
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
        local_steps=rounds.steps,
        inner_optimizer=inner_optimizer,
        compression=str(config.pushes),
        pull_dtype=config.pull_dtype or "own",
        pipelines=config.pipelines,
    )


def lease(rounds: Rounds, positions: Iterable[int]) -> pb.Lease:
    """Batches newly reserved, with the examples they consist of."""
    return pb.Lease(
        granted=[
            pb.Batch(
                id=batch_id(rounds.order.id(batch)), indices=rounds.order.indices(batch).tolist()
            )
            for position in positions
            for batch in rounds.batches(position)
        ]
    )


def withdrawal(rounds: Rounds, positions: Iterable[int]) -> pb.Lease:
    """Batches that are no longer reserved."""
    return pb.Lease(withdrawn=[b for position in positions for b in _ids(rounds, position)])


def _ids(rounds: Rounds, position: int) -> list[pb.BatchId]:
    return [batch_id(rounds.order.id(batch)) for batch in rounds.batches(position)]


def ticket(rounds: Rounds, grant: Grant, life: int, deadline_s: float) -> pb.Ticket:
    """The right to one push; `life` is this process's part of the token."""
    return pb.Ticket(
        token=pb.Token(life=life, number=grant.ticket.number),
        batches=_ids(rounds, grant.ticket.position),
        base=grant.ticket.base,
        deadline_s=deadline_s,
    )


def applied(push: pb.Push, version: int, staleness: int) -> pb.Outcome:
    """The push moved the weights."""
    return pb.Outcome(
        token=push.token, code=pb.OUTCOME_APPLIED, version=version, staleness=staleness
    )


def held(token: pb.Token) -> pb.Outcome:
    """The push is finite, and waits for its group."""
    return pb.Outcome(token=token, code=pb.OUTCOME_HELD)


def duplicate(token: pb.Token) -> pb.Outcome:
    """Its batch was computed by another worker as well, who was first."""
    return pb.Outcome(
        token=token,
        code=pb.OUTCOME_DUPLICATE,
        message="another worker was first with this batch; nothing was changed",
    )


def stale(token: pb.Token, why: str) -> pb.Outcome:
    """The push is older than is allowed; its batch goes back."""
    return pb.Outcome(
        token=token, code=pb.OUTCOME_STALE, message=f"too old now: {why}; nothing was changed"
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

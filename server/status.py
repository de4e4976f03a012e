"""What `headwater status` shows, put together from the run's parts."""

from __future__ import annotations

from headwater.protos import parameter_server_pb2 as pb
from headwater.server.coordinator import Coordinator
from headwater.server.ledger import BatchState


def status(run: Coordinator) -> pb.StatusReply:
    """The run as it stands. Field by field as the .proto says."""
    now = run.clock()
    means = run.figures.means.values()
    loss = means.pop("loss", None)
    ledger = run.ledger
    evaluation = run.evaluations.newest
    return pb.StatusReply(
        stamp=run.stamp(),
        run_id=run.identity.run_id,
        task=run.identity.task.name,
        state=run.state,
        epoch=ledger.epoch,
        epochs=run.order.epochs,
        batches_applied=len(ledger.applied) - len(run.current.left_out),
        batches_total=ledger.total,
        loss=loss,
        metrics=dict(evaluation.metrics) if evaluation else {},
        metrics_version=evaluation.version if evaluation else None,
        updates_per_second=run.figures.updates.per_second(now),
        examples_per_second=run.figures.examples.per_second(now),
        staleness=pb.Staleness(
            mean=run.figures.staleness.mean,
            p50=run.figures.staleness.percentile(50),
            p99=run.figures.staleness.percentile(99),
            max=run.figures.staleness.max,
        ),
        rejected=pb.Rejected(
            lease_lost=run.figures.lease_lost_count,
            nonfinite=run.refusals.total,
            malformed=run.figures.malformed_count,
        ),
        parameters=run.layout.element_count,
        bytes_in=run.figures.bytes_in,
        bytes_out=run.figures.bytes_out,
        workers=[
            member.status(now, member.id in run.refusals.quarantined)
            for member in run.roster.members.values()
        ],
        run_dir=run.run_dir,
        consistency=run.config.consistency,
        optimizer=run.optimizer_text,
        skipped=len(run.current.left_out),
        problems=list(run.problems.values()),
        uptime_s=now - run.began_time,
        training_metrics=means,
        example_count=run.order.example_count,
        batch_size=run.order.batch_size,
        batches_pending=ledger.pending_count,
        batches_leased=ledger.count(BatchState.LEASED) + ledger.count(BatchState.TICKETED),
        batches_admitted=ledger.count(BatchState.ADMITTED),
        durability=run.config.durability,
        snapshot_every=str(run.config.snapshot_interval),
    )

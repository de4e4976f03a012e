"""What `headwater status` shows, put together from the run's parts."""

from __future__ import annotations

from headwater.protos import parameter_server_pb2 as pb
from headwater.server.ledger import BatchState
from headwater.server.metrics import mean_times
from headwater.server.run_state import Run


def status(run: Run) -> pb.StatusReply:
    """The run as it stands. Field by field as the .proto says."""
    now = run.clock()
    means = run.figures.means.values()
    loss = means.pop("loss", None)
    ledger = run.ledger
    evaluation = run.evaluations.newest
    rounds = run.rounds
    done = len(rounds.in_batches(ledger.applied))
    skipped = len(rounds.in_batches(run.current.left_out))
    leased = rounds.batch_count(ledger.positions(BatchState.LEASED, BatchState.TICKETED))
    admitted = rounds.batch_count(ledger.positions(BatchState.ADMITTED))
    return pb.StatusReply(
        stamp=run.stamp(),
        run_id=run.identity.run_id,
        task=run.identity.task.name,
        state=run.state,
        epoch=ledger.epoch,
        epochs=run.order.epochs,
        batches_applied=done - skipped,
        batches_total=None if run.order.is_endless else run.order.total,
        loss=loss,
        metrics=dict(evaluation.metrics) if evaluation else {},
        metrics_version=evaluation.version if evaluation else None,
        updates_per_second=run.figures.updates.per_second(now),
        examples_per_second=run.figures.examples.per_second(now),
        staleness=run.figures.staleness.message(),
        rejected=pb.Rejected(
            stale=run.figures.stale_count,
            duplicate=run.figures.duplicate_count,
            lease_lost=run.figures.lease_lost_count,
            nonfinite=run.refusals.total + run.figures.nonfinite_count,
            malformed=run.figures.malformed_count,
        ),
        parameters=run.layout.parameter_count,
        bytes_in=run.figures.bytes_in,
        bytes_out=run.figures.bytes_out,
        workers=[
            member.status(
                now,
                member.id in run.refusals.quarantined,
                rounds.batch_count(ledger.leased_to(member.id)),
            )
            for member in run.roster.members.values()
        ]
        + [pusher.status(now) for pusher in run.pushers.shown(now)],
        session_updates=run.figures.session_updates,
        times=mean_times(member.times for member in run.roster.members.values()),
        run_dir=run.run_dir,
        consistency=str(run.settings.dial),
        staleness_policy=str(run.settings.staleness),
        local_steps=run.rounds.steps,
        inner_optimizer=run.inner_optimizer,
        compression=str(run.config.pushes),
        pull_dtype=run.config.pull_dtype or "own",
        optimizer=run.optimizer_text,
        optimizer_numbers=run.current.settings.numbers,
        skipped=skipped,
        problems=list(run.problems.values()),
        uptime_s=now - run.began_time,
        training_metrics=means,
        example_count=run.order.example_count,
        seed=run.identity.task.seed,
        batch_size=run.order.batch_size if run.order.has_batches else 0,
        batches_pending=run.order.total - done - leased - admitted if run.order.has_batches else 0,
        batches_leased=leased,
        batches_admitted=admitted,
        durability=run.config.durability,
        snapshot_every=str(run.config.snapshot_interval),
    )

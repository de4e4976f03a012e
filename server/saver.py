"""Makes versions durable in the background, and keeps `durable_version` true.

Works from a published version, which nothing changes any more, in a thread; so
pushes go on meanwhile, however slow the disk is. What goes wrong is shown in
status until it has gone right.
"""

from __future__ import annotations

import asyncio
import logging
import weakref

from headwater.server.prepare import Prepared
from headwater.server.run_state import Run
from headwater.server.store import Published
from headwater.server.update_log import LogBroken, UpdateLog
from headwater.server.updates import Updates

log = logging.getLogger("headwater.server")

LOOK_S = 0.1
RETRY_S = 2.0
"""Seconds from a failure to the next attempt."""

MAX_LOG_BYTES = 4 << 30
MAX_REPLAY_S = 5.0
"""Of log to read, and of updates to make again, after which a snapshot is due at once."""


class Saver:
    """Snapshots of one run."""

    def __init__(self, run: Run, updates: Updates, prepared: Prepared) -> None:
        self._run = run
        self._updates = updates
        self._prepared = prepared
        self._lock = asyncio.Lock()
        # Not held: it would be its weights and its optimizer's state until the next is saved.
        self._saved: weakref.ref[Published] | None = None
        self._saved_version = prepared.snapshot_version
        self._began_time = run.clock()
        self._failed_time: float | None = None
        if prepared.is_saved:
            self._saved = weakref.ref(run.current)

    async def save_when_due(self) -> None:
        """Runs for as long as the server trains."""
        while True:
            if self._is_due():
                await self.save(self._run.current)
            await asyncio.sleep(LOOK_S)

    async def save(self, published: Published) -> str | None:
        """Make a version durable; returns what was wrong, if anything."""
        async with self._lock:
            if self._is_saved(published):
                return None
            self._began_time = self._run.clock()
            try:
                await asyncio.to_thread(self._prepared.save, published)
            except (OSError, LogBroken) as error:
                reason = getattr(error, "strerror", None) or error
                problem = (
                    f"version {published.version} could not be written to "
                    f"{self._prepared.run_dir.path}: {reason}; what has come "
                    f"since version {self._run.durable_version} would be lost in a crash"
                )
                self._failed_time = self._run.clock()
                if "snapshot" not in self._run.problems:
                    log.error("%s; trying again", problem)
                self._run.problems["snapshot"] = problem
                return problem
            self._saved, self._saved_version = weakref.ref(published), published.version
            self._failed_time = None
            if self._run.problems.pop("snapshot", None):
                log.info("version %d was written; the disk is well again", published.version)
            self._updates.durable(published.version)
            if self._prepared.log is not None:
                await asyncio.to_thread(self._shorten, self._prepared.log)
            return None

    def _shorten(self, log: UpdateLog) -> None:
        """Drop of the log what is not needed from the last but one snapshot on.

        Not the last: it may turn out to be damaged.
        """
        versions = self._prepared.snapshots.versions()
        log.snapshot_written(versions[-2] if versions[1:] else versions[-1])

    def _is_saved(self, published: Published) -> bool:
        return self._saved is not None and self._saved() is published

    def _is_due(self) -> bool:
        run, now = self._run, self._run.clock()
        if self._is_saved(run.current) or run.log_broken:
            return False
        if self._failed_time is not None:
            return now - self._failed_time >= RETRY_S
        interval = self._prepared.config.snapshot_interval
        updates = run.current.version - self._saved_version
        if interval.updates is not None and updates >= interval.updates:
            return True
        if interval.seconds is not None and now - self._began_time >= interval.seconds:
            return True
        update_log = self._prepared.log
        return update_log is not None and (
            update_log.size_bytes > MAX_LOG_BYTES
            or updates * self._updates.applier.mean_update_s > MAX_REPLAY_S
        )

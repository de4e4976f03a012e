"""Group commit: the applier appends to the update log, one other thread makes it durable.

While one fsync is under way further updates are appended; the next fsync is for
all of them. So the log costs each update a write, and many updates one fsync.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from headwater.protos.crc import bytes_of, crc32c
from headwater.protos.layout import Bytes, Layout
from headwater.server.log_records import Kind
from headwater.server.settings import Settings
from headwater.server.store import Published, Step
from headwater.server.update_log import LogBroken, NoRoom, UpdateLog

RETRY_S = 0.5
"""Between attempts to write while the disk is full."""

CLOSE_TIMEOUT_S = 10.0
"""For an fsync under way to return."""


class Journal:
    """Records updates, and tells when they are durable.

    Args:
      log: Written by this object alone from here on.
      layout: Of a gradient.
      on_synced: Called with a version when all up to it is durable; in a thread.
      on_broken: Called once, with the reason, when nothing more will be; in a thread.
      on_full: Called with what the disk says when it is full, and with None when
        there is room again; in a thread.
    """

    def __init__(
        self,
        log: UpdateLog,
        layout: Layout,
        *,
        on_synced: Callable[[int], None],
        on_broken: Callable[[str], None],
        on_full: Callable[[str | None], None],
    ) -> None:
        self._log = log
        self._layout = layout
        self._buffer: Bytes | None = None
        self._on_synced = on_synced
        self._on_broken = on_broken
        self._on_full = on_full
        self._broken = False
        self._ending = False
        self._giving_up = threading.Event()
        self._work = threading.Semaphore(0)  # released for each record, and to end
        self._thread = threading.Thread(target=self._sync, name="headwater-journal", daemon=True)
        self._thread.start()

    def update(self, before: Published, gradients: Any, step: Step) -> None:
        """Write down the update that makes the next version. Waits while the disk is full.

        Args:
          before: The version that it moves.
          gradients: What it was made of, as the history has it.
          step: What the optimizer is about to get.

        Raises:
          NoRoom: The disk still is full, and this server is being stopped.
          LogBroken: The disk failed.
        """
        flat = step.flat
        if flat is None:
            if self._buffer is None:
                self._buffer = self._layout.empty()
            flat = self._buffer
            self._layout.pack((np.asarray(leaf) for leaf in step.leaves), flat)
        self._append(
            Kind.UPDATE,
            before.version + 1,
            flat.data,
            detail=gradients,
            loss=step.loss,
            weights_crc=weights_crc(before),
        )

    def left_out(self, before: Published, position: int) -> None:
        """Write down that a batch is done with. Raises as `update`."""
        self._append(Kind.LEFT_OUT, before.version, memoryview(b""), detail=position)

    def settings(self, before: Published, settings: Settings) -> None:
        """Write down what holds from here on. Raises as `update`."""
        self._append(Kind.SETTINGS, before.version, memoryview(b""), detail=settings.to_json())

    def give_up(self) -> None:
        """Wait for room no longer."""
        self._giving_up.set()

    def close(self) -> None:
        """Make durable what was written, and close the log.

        Raises:
          NoRoom, LogBroken: See `UpdateLog.close`.
        """
        self.give_up()
        self._ending = True
        self._work.release()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            return  # an fsync hangs; the file is closed with the process
        if self._broken:
            self._log.abandon()
        else:
            self._log.close()

    def _append(self, kind: Kind, version: int, gradient: memoryview, **values: object) -> None:
        full = False
        while True:
            try:
                self._log.append(kind, version=version, gradient=gradient, **values)
                break
            except NoRoom as error:
                if self._giving_up.is_set():
                    raise
                if not full:
                    self._on_full(str(error))
                full = True
                self._giving_up.wait(RETRY_S)
            except LogBroken:
                self._broken = True
                raise
        if full:
            self._on_full(None)
        self._work.release()

    def _sync(self) -> None:
        told = -1
        while True:
            self._work.acquire()
            if self._ending or self._broken:
                return
            try:
                # Synced already: by the fsync for an earlier record, or for a new segment.
                version = self._log.synced_version if self._log.is_synced else self._log.sync()
            except LogBroken as error:
                self._broken = True
                self._on_broken(str(error))
                return
            if version > told:
                told = version
                self._on_synced(version)


def weights_crc(published: Published) -> int:
    """CRC32C of all of a version's weights, in layout order."""
    crc = 0
    for leaf in published.leaves:
        crc = crc32c(bytes_of(np.asarray(leaf)), crc)
    return crc

"""`headwater replay`: computes a run again from its history, and compares the bits.

One process does what the server and its workers did. The history is read before
JAX is imported, because it says how JAX has to be started; the run directory is
only read, so that a run may be replayed while it goes on.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from headwater.protos import command, plain_json
from headwater.protos.errors import HeadwaterError, UsageError
from headwater.server import history, likeness
from headwater.server.survey import Survey, survey
from headwater.worker.compute import fingerprint
from headwater.worker.options import TaskArg, TaskOptions
from headwater.worker.platform import use_platform

if TYPE_CHECKING:
    from headwater.server.recompute import Recomputation
    from headwater.server.rounds import Rounds
    from headwater.worker.load import LoadedTask

log = logging.getLogger("headwater.replay")

LINE_S = 10.0
"""Between lines where there is no terminal."""

app = command.new_app()


@dataclasses.dataclass(frozen=True)
class Report:
    """What came of a replay."""

    run_id: str
    version: int
    """Where it ended."""
    updates: int
    """Made again."""
    seconds: float
    identical: bool
    """Whether nothing differed of what the run kept to compare with."""
    checked_version: int
    """The newest whose weights were compared; each gradient after it was, too. -1 for none."""
    compared_with: str | None
    """The file of the run directory that has the same version."""
    weights_crc32c: str
    """Of that version's weights as they are here."""
    difference: dict[str, Any] | None
    """Its version, what differs (weights, gradient, update or file), and a sentence."""
    out: str | None
    """Where the weights are."""
    out_version: int | None
    """The newest without a difference."""
    warnings: list[str]
    """What is not as it was, and may be why bits differ."""

    def line(self) -> str:
        """For people."""
        if self.difference is not None:
            return str(self.difference["text"])
        place = f" and in {self.compared_with}" if self.compared_with else ""
        found = f"version {self.version:,} has the same bits as in the run{place}"
        if self.checked_version < self.version:
            found = (
                f"every gradient up to version {self.version:,} has the same bits as in the run, "
                f"which kept no checksum of weights after version {self.checked_version:,}"
            )
        return (
            f"replayed {self.updates:,} updates in {self.seconds:.1f} s: {found} "
            f"(weights CRC32C {self.weights_crc32c})"
        )


def replay_run(
    run_dir: Path,
    loaded: LoadedTask,
    surveyed: Survey,
    out: Path | None = None,
    on_version: Callable[[int], None] = lambda version: None,
) -> Report:
    """Compute a run again, up to the version that was surveyed or the first that differs.

    Args:
      run_dir: Is only read.
      loaded: The run's task.
      surveyed: The history as it was read before JAX started.
      out: Gets the newest weights that do not differ.
      on_version: Called after each update.

    Raises:
      UsageError: The directory holds another run than this task's.
      HeadwaterError: The history cannot be followed; says why.
    """
    import jax

    from headwater.server.journal import weights_crc
    from headwater.server.kept_files import compare
    from headwater.server.recompute import Difference, Recomputation

    began = time.monotonic()
    rounds = _rounds(run_dir, loaded, surveyed)
    platform = likeness.gradients_platform(surveyed)
    devices = 1 if loaded.task.backend else jax.local_device_count(platform)
    warnings = likeness.warnings(
        surveyed, loaded.fingerprint(), loaded.software(), devices, fingerprint()
    )
    for warning in warnings:
        log.warning("%s", warning)
    likeness.check_framework(surveyed, loaded.fingerprint())
    loaded.use(platform)
    again = Recomputation(loaded, rounds, surveyed, platform)
    try:
        for version in again.run(_lines(run_dir, surveyed)):
            on_version(version)
    finally:
        again.close()
    difference = again.difference
    if difference is None and again.current.version != surveyed.version:
        raise HeadwaterError(
            f"the history in {run_dir} was cut while it was read, by a server that went back to "
            "an earlier version; replay it again"
        )
    kept = None
    if difference is None:
        layout = loaded.task.tree.layout
        kept = compare(run_dir, surveyed.run_id, layout, again.current, again.lives)
        if kept is not None and kept.differs is not None:
            text = f"{kept.differs} in {kept.file} has other bits than were computed now"
            difference = Difference(again.current.version, "file", text)
    written = out if out is not None and again.same is not None else None
    if written is not None:
        _save(written, loaded, surveyed, again)
    told = None
    if difference is not None:
        told = {**dataclasses.asdict(difference), "text": str(difference)}
    return Report(
        run_id=surveyed.run_id,
        version=again.current.version if difference is None else difference.version,
        updates=again.current.version,
        seconds=time.monotonic() - began,
        identical=difference is None,
        checked_version=again.current.version if kept else again.checked_version,
        compared_with=kept.file if kept else None,
        weights_crc32c=f"{weights_crc(again.current):08x}",
        difference=told,
        out=str(written) if written else None,
        out_version=again.same.version if written and again.same else None,
        warnings=warnings,
    )


def _rounds(run_dir: Path, loaded: LoadedTask, surveyed: Survey) -> Rounds:
    """The run's rounds, if the task is the run's."""
    from headwater.server.config import ServerConfig
    from headwater.server.plan import rounds_of
    from headwater.server.run_record import RunRecord

    path = run_dir / "run.json"
    try:
        record = RunRecord.parse(path.read_text(), str(path))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}; name the directory of a run"
        ) from None
    if record.run_id != surveyed.run_id:
        raise UsageError(
            f"{run_dir} has the record of run {record.run_id} and the history of run "
            f"{surveyed.run_id}; restore both from one copy"
        )
    if record.arrays is not None:
        raise UsageError(
            f"{run_dir} holds a run that was served without task code: its gradients were computed "
            "by programs of their own, which nobody can call again"
        )
    config = record.settings(ServerConfig())
    rounds = rounds_of(loaded.task, config)
    now = RunRecord.of(
        record.run_id, loaded, loaded.task.tree.layout, rounds, record.updates, "", config
    )
    if changed := record.differences(now):
        raise UsageError(
            f"{run_dir} holds a run of another task than {loaded.name} ({changed}); replay it "
            "with the --task and --task-option that it was trained with"
        )
    return rounds


def _lines(run_dir: Path, surveyed: Survey) -> Iterator[history.Line]:
    for line in history.read(run_dir / history.NAME):
        if line["v"] > surveyed.version:
            return
        yield line


def _save(out: Path, loaded: LoadedTask, surveyed: Survey, again: Recomputation) -> None:
    import numpy as np

    from headwater.protos.weights_file import save_weights

    assert again.same is not None
    names = loaded.task.tree.names
    weights = dict(zip(names, map(np.asarray, again.same.tensors), strict=True))
    facts = {
        "run_id": surveyed.run_id,
        "task": loaded.name,
        "incarnation": str(again.same.incarnation),
        "version": str(again.same.version),
    }
    try:
        save_weights(out, weights, facts)
    except OSError as error:
        raise HeadwaterError(
            f"{out} could not be written: {error.strerror}; what was there before is as it was"
        ) from None


class _Display:
    """How far it is: a bar on a terminal, else a line now and then. On stderr."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        self._total = total
        self._said_time = time.monotonic()
        self._bar = Progress(
            TextColumn("replaying"),
            BarColumn(bar_width=None),
            TextColumn("version {task.completed:,.0f} of {task.total:,.0f}"),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal or console.is_dumb_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def show(self, version: int) -> None:
        self._bar.update(self._task, completed=version)
        now = time.monotonic()
        if self._bar.disable and now - self._said_time > LINE_S:
            self._said_time = now
            log.info("version %s of %s", f"{version:,}", f"{self._total:,}")


@app.command()
def replay(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="Of the run; is read, and left as it is.")
    ],
    task: TaskArg,
    task_option: TaskOptions = None,
    to: Annotated[
        int | None, typer.Option(metavar="VERSION", min=0, help="Stop there. Default: the end.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.safetensors", help="Write the weights of where it stopped."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compute a run again from its history, in one process, and compare it bit for bit.

    Ends with the run's weights, or names the first version that differs and exits with 1.
    """
    _check_out(out, run_dir)
    surveyed = survey(run_dir / history.NAME, to)
    _start_jax_alike(surveyed)
    from headwater.protos.layout import LayoutError
    from headwater.worker.load import load_task
    from headwater.worker.task import TaskError
    from headwater.worker.user_code import guard_user_code

    signal.signal(signal.SIGINT, signal.default_int_handler)  # so that the bar is cleared away
    loaded = load_task(task, task_option or ())
    with (
        guard_user_code(f"the task {loaded.name} raised"),
        _Display(surveyed.version) as display,
    ):
        try:
            report = replay_run(run_dir, loaded, surveyed, out, display.show)
        except (TaskError, LayoutError) as error:
            raise UsageError(str(error)) from None
    if as_json:
        print(plain_json.dumps(dataclasses.asdict(report), indent=2))
    else:
        print(report.line())
        if report.out is not None:
            print(f"the weights of version {report.out_version:,} are in {report.out}")
    if not report.identical:
        raise typer.Exit(1)


def _check_out(out: Path | None, run_dir: Path) -> None:
    """Find out now rather than after an hour; and leave the run's own files alone."""
    if out is None:
        return
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent} to write {out.name} into")
    if out.resolve().parent == run_dir.resolve():
        raise UsageError(
            f"--out {out} is in the run directory, which a replay leaves as it is; name another "
            "place"
        )


def _start_jax_alike(surveyed: Survey) -> None:
    """Start JAX as it was in the workers.

    Raises:
      HeadwaterError: There is no such platform here, or the run had several.
    """
    platform = likeness.accelerator(surveyed)
    likeness.gradients_platform(surveyed)
    likeness.imitate(surveyed, os.environ)
    try:
        use_platform(platform)
    except UsageError:
        raise HeadwaterError(
            f"the run was computed on {platform}, and JAX finds none here, so that its bits cannot "
            "be had; replay it on a machine with one, and with JAX for it"
        ) from None


def main() -> None:
    command.run(app, "headwater replay")

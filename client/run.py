"""A server and its workers on this machine, from start to end: `headwater run`, and `fit`.

All processes are started at once, for each takes seconds to load JAX. The
server ends by itself when the run is finished; the others follow it. Whatever
happens, no process of ours is left behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headwater.client import show
from headwater.client.client import Client
from headwater.client.endings import Endings
from headwater.client.interrupts import Interrupts, Stopped
from headwater.client.processes import (
    Child,
    failure,
    free_address,
    is_free,
    kill_all,
    wait_all,
)
from headwater.client.progress import Display
from headwater.client.shares import devices_option, share_of_cores, shares_of_gpus
from headwater.client.status import OF_SESSIONS, OVER
from headwater.protos.command import RUN_ID_ENV, TASK_ENV, new_run_id
from headwater.protos.errors import HeadwaterError, UsageError
from headwater.protos.rpc import DEFAULT_ADDRESS, join_address, split_address

POLL_S = 0.25
SOON_S = 1.0
"""For workers to end after their server by themselves."""
FOLLOW_TIMEOUT_S = 10.0
"""For them to end when they are told to."""

STOP_TIMEOUT_S = 3.0
"""For the server to end in order after Ctrl-C, and KILL_S later all is killed: 5 s in all."""
KILL_S = 1.2
GRACE = "2.5"
"""The server's own, unless another is asked for."""

EVALUATOR_NICE = 10
"""Evaluation gives way to training."""


@dataclasses.dataclass(kw_only=True)
class Training:
    """One training, made once and `run` once."""

    task: str
    """A TASK, or with `task_file` its name."""

    workers: int
    platform: str | None
    server_options: Sequence[str]
    """Options of `headwater server`, passed on as they are."""

    devices: str | None = None
    """As --devices of `headwater worker`, of what each sees; None: all, in sync mode 1."""

    task_options: Sequence[str] = ()
    task_file: int | None = None
    """Descriptor of a file with the task itself; see worker/handed.py."""

    stopped_by: Sequence[int] = (signal.SIGINT, signal.SIGTERM)
    """Signals that end it in order."""

    display: Display = dataclasses.field(default_factory=Display)

    def run(self) -> Mapping[str, Any]:
        """Train; what the server said of itself. However it ends, every process has ended.

        Raises:
          HeadwaterError: It failed; says who, and why.
          Stopped: A signal came; the weights are kept.
        """
        self._children: list[Child] = []
        self._run_dir: Path | None = None
        self._said: set[str] = set()
        self._interrupts = Interrupts(*self.stopped_by)
        with self._interrupts:
            try:
                with self.display:
                    try:
                        return self._train()
                    except Stopped:
                        self._stop_in_order()
                        raise
            finally:
                with self._interrupts.held():
                    self._end_children()

    # ---------------------------------------------------------------- training

    def _train(self) -> Mapping[str, Any]:
        """Returns what the server said of itself, when the run is finished."""
        share = share_of_cores(self.workers, in_sync=self._is_sync())
        gpus = shares_of_gpus(self.workers, self.platform, self._warn)
        listen, address = self._choose_address()
        self._start_all(listen, address, share, gpus)
        facts = self._wait_until_ready(self._children[0])
        if facts and "port_taken" in facts and not _option(self.server_options, "--listen"):
            # By another run, between our look and our server's start.
            self._end_children()
            listen = address = free_address(split_address(listen, "--listen")[0])
            self.display.say(f"{DEFAULT_ADDRESS} is in use; this run is at {address}")
            self._start_all(listen, address, share, gpus)
            facts = self._wait_until_ready(self._children[0])
        server, *workers = self._children
        if facts is None or "port_taken" in facts:
            server.process.wait()
            raise failure(server)
        self._run_dir = Path(facts["run_dir"])
        logs = self._run_dir / "logs"
        logs.mkdir(exist_ok=True)
        for child in self._children:
            child.log_to(logs / f"{child.name}.log")
        self._follow(server, workers, address, share, logs, evaluates=facts["evaluates"])
        if server.status != 0:
            raise failure(server)
        if not wait_all(self._children, SOON_S):
            # Still on their way to a server that had nothing more to do.
            for child in self._children:
                child.send(signal.SIGTERM)
            wait_all(self._children, FOLLOW_TIMEOUT_S)
        return facts

    def _end_children(self) -> None:
        kill_all(self._children)
        for child in self._children:
            child.close()
        self._children.clear()

    def _start_all(
        self,
        listen: str,
        address: str,
        share: Mapping[str, str],
        gpus: Sequence[Mapping[str, str]],
    ) -> None:
        """The server, and the workers that join it and no other run's."""
        environment = {**share, RUN_ID_ENV: self._run_id()}
        self._start(
            "server", "server",
            [
                "--listen", listen, "--exit-when-done", "--await-evaluation", "--grace", GRACE,
                *self._pass_on_to_server(),
            ],
            environment=environment, tells_ready=True,
        )  # fmt: skip
        for number in range(1, self.workers + 1):
            self._start(
                f"worker-{number}", "worker",
                [
                    "--server", address, "--name", f"worker-{number}",
                    *self._platform_option(), *self._transport_option(),
                    *devices_option(self.devices, in_sync=self._is_sync()),
                ],
                environment={**environment, **gpus[number - 1]},
            )  # fmt: skip
        count = f"{self.workers} worker{'s' if self.workers > 1 else ''}"
        self.display.wait_for(f"starting a server and {count} at {address}")

    def _run_id(self) -> str:
        """Of the run that the run directory holds, or a new one."""
        return str(self._recorded().get("run_id") or new_run_id())

    def _recorded(self) -> Mapping[str, Any]:
        """What the run directory says of the run it holds; {} of a new or a damaged one.

        The server says what is wrong with it.
        """
        folder = _option(self.server_options, "--run-dir")
        try:
            record = json.loads((Path(folder or "") / "run.json").read_text())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _wait_until_ready(self, server: Child) -> Mapping[str, Any] | None:
        """What the server says of itself once it serves; None when it ended instead."""
        facts: list[dict[str, Any] | None] = []
        # In a thread, so that a signal is acted on while it waits.
        waiting = threading.Thread(target=lambda: facts.append(server.ready()), daemon=True)
        waiting.start()
        while waiting.is_alive():
            waiting.join(POLL_S)
        if not facts or facts[0] is None:
            server.process.wait()
            return None
        return facts[0]

    def _follow(
        self,
        server: Child,
        workers: list[Child],
        address: str,
        share: Mapping[str, str],
        logs: Path,
        *,
        evaluates: bool,
    ) -> None:
        """Show how it goes until the server has ended.

        Raises:
          HeadwaterError: No worker is left, and the run is not over.
        """
        evaluator: Child | None = None
        endings, others = Endings(workers, self._warn), False
        ours = {child.name for child in workers}
        with Client(address) as client:
            while server.status is None:
                # Looked for before the server is asked: workers also leave a run that ends.
                error, status = endings.look(others=others), None
                with contextlib.suppress(HeadwaterError):  # it may be ending
                    status = client.status(watches=True)
                    self.display.show(status)
                    self._warn_of(status["problems"])
                    if evaluates and evaluator is None and status["version"] > 0:
                        evaluator = self._start_evaluator(address, share, logs)
                    if evaluator and evaluator.status and status["state"] == "finished":
                        server.send(signal.SIGTERM)  # the evaluation will not come
                    others = any(
                        worker["name"] not in ours and worker["state"] not in OF_SESSIONS
                        for worker in status["workers"]
                    )
                goes_on = status["state"] not in OVER if status else endings.long_alone
                if error is not None and server.status is None:
                    if goes_on:
                        self._stop_in_order()
                        raise error
                    endings.tell()
                time.sleep(POLL_S)

    def _start_evaluator(self, address: str, share: Mapping[str, str], logs: Path) -> Child:
        # Not before the first update: until then the others need the cores to start.
        evaluator = self._start(
            "evaluator", "evaluate",
            ["--server", address, "--follow", "--nice", str(EVALUATOR_NICE), "--platform", "cpu"],
            environment=share,
        )  # fmt: skip
        evaluator.log_to(logs / "evaluator.log")
        return evaluator

    def _warn_of(self, problems: Sequence[str]) -> None:
        for problem in problems:
            if problem not in self._said:
                self._said.add(problem)
                self.display.say(f"warning: {problem}")

    def _stop_in_order(self) -> None:
        """End everything within 5 s: the server first, so that it keeps the weights."""
        self.display.say("stopping")
        with contextlib.suppress(Stopped):  # the second signal ends it at once
            for child in self._children[:1]:
                child.send(signal.SIGTERM)
            wait_all(self._children[:1], STOP_TIMEOUT_S)
            for child in self._children[1:]:
                child.send(signal.SIGTERM)
            wait_all(self._children, KILL_S)
            if self._run_dir is not None and self._children[0].status == 0:
                self.display.say(f"the weights are in {self._run_dir / 'weights.safetensors'}")
            elif self._run_dir is not None:
                self.display.say(f"server {self._children[0].ending}")

    # ---------------------------------------------------------------- starting

    def _start(
        self,
        name: str,
        command: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        tells_ready: bool = False,
    ) -> Child:
        options = [word for option in self.task_options for word in ("--task-option", option)]
        with self._interrupts.held():
            child = Child(
                name,
                command,
                ["--task", self.task, *options, *arguments],
                environment=environment,
                tells_ready=tells_ready,
                inherits={} if self.task_file is None else {TASK_ENV: self.task_file},
            )
            self._children.append(child)
        return child

    def _choose_address(self) -> tuple[str, str]:
        """Where the server is to listen, and where its workers find it.

        The default port may be taken, say by another run; a port that was asked
        for may not.

        Raises:
          UsageError: It is not HOST:PORT, or its host is not this machine.
        """
        if self.server_options[-1:] == ["--listen"]:
            raise UsageError(
                f"--listen takes HOST:PORT such as {DEFAULT_ADDRESS}, and has no value"
            )
        asked = _option(self.server_options, "--listen")
        host, port = split_address(DEFAULT_ADDRESS if asked is None else asked, "--listen")
        listen = join_address(host, port)
        if port == 0:
            try:
                listen = free_address(host)
            except OSError as error:
                raise UsageError(
                    f"--listen {listen}: {host} is not an address of this machine "
                    f"({error.strerror}); leave --listen out, or name one of its own, such as "
                    "127.0.0.1:0"
                ) from None
        elif asked is None and not is_free(host, port):
            listen = free_address(host)
            self.display.say(f"{DEFAULT_ADDRESS} is in use; this run is at {listen}")
        _, port = split_address(listen, "--listen")
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  (compared, not used)
        return listen, join_address(here, port)

    def _pass_on_to_server(self) -> list[str]:
        """The server's options, without the --listen that was acted on here."""
        kept, words = [], iter(self.server_options)
        for word in words:
            if word == "--listen":
                next(words, None)
            elif not word.startswith("--listen="):
                kept.append(word)
        return kept

    def _platform_option(self) -> list[str]:
        return ["--platform", self.platform] if self.platform else []

    def _transport_option(self) -> list[str]:
        transport = _option(self.server_options, "--transport")
        return ["--transport", transport] if transport else []

    def _warn(self, text: str) -> None:
        self.display.say(f"warning: {text}")

    def _is_sync(self) -> bool:
        consistency = _option(self.server_options, "--consistency")
        if consistency is None:
            asked = self._recorded().get("asked")
            consistency = asked.get("consistency") if isinstance(asked, dict) else None
        return str(consistency).startswith("sync")


def _option(words: Sequence[str], name: str) -> str | None:
    for at, word in enumerate(words):
        if word == name and at + 1 < len(words):
            return words[at + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def print_result(facts: Mapping[str, Any]) -> None:
    """The final metrics, and where everything is."""
    run_dir = Path(facts["run_dir"])
    end = end_record(run_dir / "metrics.jsonl")
    if end is None:
        print("finished; metrics.jsonl lacks its end: see logs/server.log", file=sys.stderr)
    else:
        print(
            f"{end['state']} at version {end['version']:,} in {end['seconds']:.1f} s "
            f"({end['updates_per_second']:,.0f} updates/s)"
        )
        if end["skipped"]:
            print(f"left out    {end['skipped']:,} batches that gave nothing finite")
        if end["metrics"]:
            print(f"evaluation  {show.metrics(end['metrics'])}")
        elif facts["evaluates"] and end["state"] == "finished":
            log = run_dir / "logs" / "evaluator.log"
            print(f"the final version was not evaluated; see {log}", file=sys.stderr)
    print(f"weights     {run_dir / 'weights.safetensors'}")
    print(f"metrics     {run_dir / 'metrics.jsonl'}")


def end_record(path: Path) -> dict[str, Any] | None:
    """The last line of metrics.jsonl; None where a full disk kept it from being written."""
    lines = path.read_text().splitlines()
    try:
        record = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        return None
    return record if record["kind"] == "end" else None

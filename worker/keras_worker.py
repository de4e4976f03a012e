"""Training of Keras models, on its JAX backend, by workers and a parameter server.

    strategy = ParameterServerStrategy(workers=2)
    with strategy.scope():
        model = make_model()
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    history = model.fit(x, y, epochs=10, validation_data=(x_test, y_test))

`fit` is still Keras's own: its epochs, callbacks, history and validation. What is put in
its place is one step of it, which here waits until the server, in this process, has
applied one more gradient of the workers', which are processes of their own. An epoch's
last step ends with its last update; the next one is begun by its first. So weights,
optimizer and metrics are those of the epoch when callbacks and validation look at them.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import re
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from headwater.client.client import Client
from headwater.client.crew import Crew
from headwater.client.shares import devices_option, share_of_cores, shares_of_gpus
from headwater.client.weights import Weights
from headwater.protos.errors import HeadwaterError, Unreachable, UsageError
from headwater.protos.rpc import Transport, split_address
from headwater.server.embedded import Server
from headwater.server.here import GRACE_S, PATIENCE_S
from headwater.server.keras_optimizer import KerasOptimizer
from headwater.server.keywords import read_keywords
from headwater.server.pace import Pace, Tallies
from headwater.server.run_dir import RunDir
from headwater.worker import handed
from headwater.worker.keras_data import KerasBatches, training_data
from headwater.worker.keras_steps import Steps, overridden, with_report
from headwater.worker.keras_task import Variables, build, task_of
from headwater.worker.link import Patience
from headwater.worker.load import LoadedTask, is_loading
from headwater.worker.loop import Worker
from headwater.worker.task import NAME, Task

log = logging.getLogger("headwater")

JOIN_TIMEOUT_S = 60.0
"""For a server to be there that is to be joined."""

LAST_TIMEOUT_S = 10.0
"""For the last weights to come, when the run is over."""

_FAR = 1 << 48
"""Versions that no run makes."""

_ELSEWHERE = {
    "epochs": "give it to fit",
    "batch_size": "give it to fit",
    "init": "a run begins with the weights that the model has",
    "optimizer": "give it to compile",
    "ema": "an optimizer of Keras has use_ema",
    "stop_when": "give fit a callback, such as keras.callbacks.EarlyStopping",
    "patience": "give fit a callback, such as keras.callbacks.EarlyStopping",
    "epoch_barrier": "there always is one",
    "await_evaluation": "give fit validation_data",
    "evaluation_timeout": "give fit validation_data",
    "exit_when_done": "the server always ends with fit",
    "local_steps": "each batch is an update",
    "inner_optimizer": "each batch is an update",
}
"""Options of `headwater server` that have no place here, and what there is instead."""


class ParameterServerStrategy:
    """Where the models that are made in its `scope` are trained by `fit`.

    `ParameterServerStrategy(workers=2)` starts a server in this process and two workers
    on this machine for each `fit`. `ParameterServerStrategy("host:port")`, in the same
    script elsewhere, makes `fit` a further worker of that server.

    Args:
      server: HOST:PORT of a server to join, as a worker.
      workers: Processes to start here; 0 computes in a thread of this one, for a debugger.
      name: What the run directory, runs/NAME-…, is called after; those who join must
        have the same.
      platform: Where the workers that are started compute: cpu, gpu or tpu; by default JAX's
        own choice.
      seed: Of each fit's order of examples and of its random layers; by default that of the
        run that is continued, or drawn from NumPy, which `keras.utils.set_random_seed` seeds.
      options: Those of `headwater server`, with underscores: `consistency`, `run_dir`,
        `listen`, `durability`, …

    Raises:
      UsageError: An option cannot work, or Keras runs on another backend.
    """

    def __init__(
        self,
        server: str | None = None,
        *,
        workers: int | None = None,
        name: str = "keras",
        platform: str | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        if keras.backend.backend() != "jax":
            raise UsageError(
                f"Keras runs on {keras.backend.backend()}; Headwater trains on its JAX backend: "
                'set os.environ["KERAS_BACKEND"] = "jax" before Keras is imported'
            )
        if isinstance(server, int):
            raise UsageError(f"ParameterServerStrategy(workers={server}) starts so many workers")
        if server is not None and (workers is not None or options or seed is not None):
            raise UsageError(
                f"ParameterServerStrategy({server!r}) joins a server that is there; workers, seed "
                "and the server's options are for whoever starts it"
            )
        count = 2 if workers is None else workers
        if type(count) is not int or count < 0:
            raise UsageError(f"workers is a whole number from 0 on, not {count!r}")
        if platform is not None and (server is not None or count == 0):
            alone = "workers=0" if server is None else repr(server)
            raise UsageError(
                f"ParameterServerStrategy: with {alone} it is this process that computes; no "
                "platform, but JAX's own choice, which the environment's JAX_PLATFORMS makes"
            )
        if not re.fullmatch(NAME, name):
            raise UsageError(f"name is for a folder: letters, digits, - and _; not {name!r}")
        if server is not None:
            split_address(server, "ParameterServerStrategy")
        for option in sorted(options.keys() & _ELSEWHERE.keys()):
            raise UsageError(f"ParameterServerStrategy takes no {option!r}: {_ELSEWHERE[option]}")
        own = ("server", "workers", "name", "platform", "seed")
        self._fields = read_keywords("ParameterServerStrategy", options, own).fields
        self._server = server
        self._workers = count
        self._name = name
        self._platform = platform
        self._seed = seed
        self._transport: Transport = self._fields.get("transport", "auto")
        self._has_trained = False

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Models that are made inside, or loaded, are trained by this strategy."""
        own = vars(keras.Model)["__new__"]
        made: list[weakref.ref[keras.Model]] = []

        def new(kind: type, *args: Any, **named: Any) -> Any:
            model = own.__func__(kind, *args, **named)
            made.append(weakref.ref(model))
            return model

        keras.Model.__new__ = staticmethod(new)
        try:
            yield
        finally:
            keras.Model.__new__ = own
        for reference in made:
            if (model := reference()) is not None:
                self.distribute(model)

    def distribute(self, model: keras.Model) -> keras.Model:
        """Have a model that is there be trained by this strategy; returns it."""
        # In place of the class's; not an attribute that Keras should look into.
        vars(model)["fit"] = lambda *args, **named: self._fit(model, *args, **named)
        return model

    # --------------------------------------------------------------------- fit

    def _fit(self, model: keras.Model, *args: Any, **named: Any) -> keras.callbacks.History:
        _check(model)
        bound = inspect.signature(keras.Model.fit).bind(model, *args, **named)
        bound.apply_defaults()
        given = bound.arguments
        data, batch_size = training_data(given), given["batch_size"] or 32
        if isinstance(data, KerasBatches):
            batch_size = 1  # of what the server counts
        variables = build(model, data, batch_size)
        optimizer = KerasOptimizer(model.optimizer, variables.trained, variables.slots)
        task = task_of(
            model, variables, data, optimizer,
            batch_size=batch_size, shuffle=bool(given["shuffle"]),
        )  # fmt: skip
        if self._server is not None:
            return _join(model, variables, LoadedTask(task, self._name, {}, ""), self._server)
        if given["epochs"] <= given["initial_epoch"]:
            return keras.Model.fit(**given)
        return self._lead(model, variables, task, given)

    def _lead(
        self, model: keras.Model, variables: Variables, task: Task, given: dict[str, Any]
    ) -> keras.callbacks.History:
        if self._has_trained and (folder := self._fields.get("run_dir")):
            # It would go on with what is complete: train nothing, and undo what was done since.
            raise UsageError(
                f"fit: this strategy has trained the run in {folder}; make a new strategy, with "
                "another run_dir for another run, or with the same one to go on with more epochs"
            )
        applied: deque[Tallies | None] = deque()
        first = given["initial_epoch"]
        patient = {"ticket_timeout_s": PATIENCE_S, "compile_timeout_s": PATIENCE_S}
        server = Server(
            task,
            name=self._name,
            pace=Pace(
                0,
                lambda _, tallies: applied.append(tallies),
                tally_count=sum(math.prod(v.shape) for v in model.metrics_variables),
            ),
            **{"grace_s": GRACE_S, **({} if self._workers else patient), **self._fields},
            epochs=given["epochs"] - first,
            epoch_barrier=True,
            seed=self._run_seed(),
        )
        with contextlib.ExitStack() as opened:
            opened.enter_context(server)
            client = opened.enter_context(Client(server.address))
            file = opened.enter_context(handed.write(task))
            if self._workers:
                crew = opened.enter_context(self._crew(server, client, file.fileno()))
                look = crew.look
            else:
                look = _Here(server, self._name, file.fileno(), self._transport).look
            opened.callback(server.stop)  # the first to be called: it tells the workers to end
            if given["verbose"]:
                print(_beginning(server, self._workers), file=sys.stderr)
            steps = Steps(model, variables, server, client, applied, look)
            steps.take_up()
            given["initial_epoch"] = first + steps.epoch
            given["callbacks"] = with_report(given["callbacks"], steps)
            if steps.epoch >= given["epochs"] - first:
                log.warning(
                    "fit: the run in %s is complete already; nothing is trained, and the model "
                    "has its weights now", server.run_dir,
                )  # fmt: skip
            with overridden(model, steps):
                history = keras.Model.fit(**given)
        self._has_trained = True
        return history

    def _run_seed(self) -> int:
        """As asked for; else that of the run to continue, or a new one."""
        if self._seed is not None:
            return self._seed
        record = RunDir.recorded(self._fields.get("run_dir"))
        if record is not None:
            return record.seed
        return int(np.random.randint(2**31))  # noqa: NPY002  (the one that Keras seeds)

    def _crew(self, server: Server, client: Client, task_file: int) -> Crew:
        in_sync = str(self._fields.get("consistency")).startswith("sync")
        share = {**share_of_cores(self._workers, in_sync=in_sync), "KERAS_BACKEND": "jax"}
        gpus = shares_of_gpus(self._workers, self._platform, log.warning)
        options = ["--transport", self._transport]
        if self._platform is not None:
            options += ["--platform", self._platform]
        return Crew(
            [{**share, **gpu} for gpu in gpus],
            address=server.address,
            run_id=str(client.status()["run_id"]),
            task=self._name,
            task_file=task_file,
            options=[*options, *devices_option(None, in_sync=in_sync)],
            logs=server.run_dir / "logs",
        )


def _beginning(server: Server, workers: int) -> str:
    who = f"{workers} worker{'s' * (workers != 1)}" if workers else "computed in this process"
    return f"headwater: training at {server.address}, {who}; kept in {server.run_dir}"


class _Here:
    """A worker in a thread of this process, with a model of its own; ends with the server."""

    def __init__(self, server: Server, name: str, task_file: int, transport: Transport) -> None:
        task = handed.read(os.dup(task_file))
        patience = Patience(server.address, JOIN_TIMEOUT_S)
        loaded = LoadedTask(task, name, {}, "")
        self._worker = Worker(loaded, server.address, patience, name="here", transport=transport)
        self._error: Exception | None = None
        server.when_ended(self._worker.give_up)
        threading.Thread(target=self._run, name="headwater-worker", daemon=True).start()

    def look(self) -> None:
        """Raises what ended it, if it has failed."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._worker.run()
        except Exception as error:
            self._error = error


# --------------------------------------------------------------------- joining


def _join(
    model: keras.Model, variables: Variables, loaded: LoadedTask, address: str
) -> keras.callbacks.History:
    """Compute for the server at `address` until the run is over; then have its final weights."""
    with contextlib.closing(_LastWeights(address)) as last:
        Worker(loaded, address, Patience(address, JOIN_TIMEOUT_S)).run()
        weights = last.get()
    names = [*variables.trained, *(name for name, _ in variables.others)]
    own = [*model.trainable_variables, *model.non_trainable_variables]
    for name, variable in zip(names, own, strict=True):
        if name in weights:  # seeds are not
            variable.assign(weights[name])
    history = keras.callbacks.History()
    history.set_model(model)
    history.on_train_begin()
    return history


class _LastWeights:
    """Waits for a run's last version, from the start: later the server may have gone."""

    def __init__(self, address: str) -> None:
        self._client = Client(address)
        self._is_closed = False
        self._found: Weights | None = None
        self._thread = threading.Thread(target=self._wait, name="headwater-last", daemon=True)
        self._thread.start()

    def get(self) -> Weights:
        """What came, once the run is over.

        Raises:
          Unreachable: The server ended without a word, or they were too long in coming.
        """
        self._thread.join(LAST_TIMEOUT_S)
        if self._found is None:
            raise Unreachable(
                f"the server at {self._client.address} ended without its last weights; they are "
                "in its run directory"
            )
        return self._found

    def close(self) -> None:
        """Wait no longer."""
        self._is_closed = True
        self._client.close()

    def _wait(self) -> None:
        end = time.monotonic() + JOIN_TIMEOUT_S
        with self._client:
            while not self._is_closed and time.monotonic() < end:
                try:
                    self._found = self._last()
                    return
                except Unreachable:  # there may be none yet
                    time.sleep(0.2)
                except (HeadwaterError, ValueError) as error:  # ValueError: gRPC's, when closed
                    if not self._is_closed:
                        log.warning("the last weights will not come: %s", error)
                    return

    def _last(self) -> Weights | None:
        """None where they are not waited for any longer."""
        newest = None
        for weights in self._client.subscribe(every=_FAR):
            if self._is_closed:
                return None
            newest = weights  # at first those of now, which end nothing
        return newest


# -------------------------------------------------------------------- checking


def _check(model: keras.Model) -> None:
    """Refuse what would be trained otherwise than the user thinks."""
    if is_loading():
        raise UsageError("fit was called by a file that is just being loaded for its task")
    kind, name = type(model), type(model).__name__
    for method in ("fit", "train_step", "make_train_function"):
        if getattr(kind, method) is not getattr(keras.Model, method):
            raise UsageError(
                f"fit: {name} has a {method} of its own, and workers run Keras's; override "
                "compute_loss instead, or write a headwater.Task"
            )
    if not model.compiled or model.optimizer is None:
        raise UsageError("fit: call model.compile(optimizer=…, loss=…) first")
    optimizer = model.optimizer
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if scaled or optimizer.loss_scale_factor:
        raise UsageError(
            "fit: losses are not scaled here, as mixed_float16 needs; use mixed_bfloat16, or "
            "float32, and an optimizer without loss_scale_factor"
        )
    if model.run_eagerly:
        raise UsageError("fit: run_eagerly=True is for a debugger; train without Headwater there")
    if model.steps_per_execution != 1:
        raise UsageError(
            f"fit: steps_per_execution={model.steps_per_execution}: it has to be 1, for each batch "
            "is an update; leave it out of compile"
        )
    if keras.distribution.distribution() is not None:
        raise UsageError("fit: a keras.distribution is set; workers have devices of their own")

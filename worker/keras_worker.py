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
import os
import re
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from headwater.client.client import Client, Weights
from headwater.client.crew import Crew
from headwater.client.processes import core_count
from headwater.protos.errors import HeadwaterError, RunFailed, Unreachable, UsageError
from headwater.server.embedded import Server
from headwater.server.here import GRACE_S
from headwater.server.keras_optimizer import LEARNING_RATE, KerasOptimizer
from headwater.server.keywords import read_keywords
from headwater.server.pace import Pace, Tallies
from headwater.worker import handed
from headwater.worker.keras_task import (
    KerasBatches,
    KerasData,
    Variables,
    build,
    class_weights,
    task_of,
)
from headwater.worker.link import Patience
from headwater.worker.load import LoadedTask, is_loading
from headwater.worker.loop import Worker
from headwater.worker.task import Task

POLL_S = 0.005
"""Between two looks for updates: each wakes this thread, in the process that makes them."""

LOOK_S = 0.5
"""Between two looks at whether all are well."""

JOIN_TIMEOUT_S = 60.0
"""For a server to be there that is to be joined."""

_SAID_BY_FIT = {
    "epochs": "epochs",
    "batch_size": "batch_size",
    "init": "the weights that the model has",
    "optimizer": "compile(optimizer=…)",
    "ema": "the optimizer's own use_ema",
    "seed": "ParameterServerStrategy(seed=…)",
    "stop_when": "a callback, such as keras.callbacks.EarlyStopping",
    "patience": "a callback, such as keras.callbacks.EarlyStopping",
    "epoch_barrier": "nothing: it is always on",
    "await_evaluation": "validation_data",
    "evaluation_timeout": "validation_data",
    "exit_when_done": "nothing: the server ends with fit",
    "local_steps": "nothing: each batch is an update",
    "inner_optimizer": "nothing: each batch is an update",
}
"""Options of `headwater server` that have no place here, and what says it instead."""


class ParameterServerStrategy:
    """Where the models that are made in its `scope` are trained by `fit`.

    `ParameterServerStrategy(workers=2)` starts a server in this process and two workers
    on this machine for each `fit`. `ParameterServerStrategy("host:port")`, in the same
    script elsewhere, makes `fit` a further worker of that server.

    Args:
      server: HOST:PORT of a server to join, as a worker.
      workers: Processes to start here; 0 waits for workers that join.
      name: What the run directory, runs/NAME-…, is called after; those who join must
        have the same.
      platform: Where the workers compute: cpu, gpu or tpu; by default JAX's own choice.
      seed: Of each fit's order of examples and of its random layers; by default drawn
        from NumPy, which `keras.utils.set_random_seed` seeds.
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
        if not re.fullmatch(r"[\w.-]*\w", name):
            raise UsageError(f"name is for a folder: letters, digits, - and _; not {name!r}")
        for option in options.keys() & _SAID_BY_FIT.keys():
            raise UsageError(
                f"ParameterServerStrategy takes no {option!r}: {_SAID_BY_FIT[option]} says that"
            )
        own = ("server", "workers", "name", "platform", "seed")
        self._fields = read_keywords("ParameterServerStrategy", options, own).fields
        self._server = server
        self._workers = count
        self._name = name
        self._platform = platform
        self._seed = seed

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Models that are made inside, or loaded, are trained by this strategy."""
        own = keras.Model.__new__
        made: list[weakref.ref[keras.Model]] = []

        def new(kind: type, *args: Any, **named: Any) -> Any:
            model = own(kind, *args, **named)
            made.append(weakref.ref(model))
            return model

        keras.Model.__new__ = new
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
        data, batch_size = _data(given), given["batch_size"] or 32
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
        progress = _Progress()
        seed = self._seed if self._seed is not None else int(np.random.randint(2**31))  # noqa: NPY002  (Keras's)
        first = given["initial_epoch"]
        server = Server(
            task,
            name=self._name,
            pace=Pace(0, progress.on_batch),
            **{"grace_s": GRACE_S, **self._fields},
            epochs=given["epochs"] - first,
            epoch_barrier=True,
            seed=seed,
        )
        with contextlib.ExitStack() as opened:
            opened.enter_context(server)
            client = opened.enter_context(Client(server.address))
            crew = self._crew(opened, server, client, task) if self._workers else None
            opened.callback(server.stop)  # first of all: it tells the workers to end
            if given["verbose"]:
                print(_beginning(server, self._workers), file=sys.stderr)
            steps = _Steps(model, variables, server, client, crew, progress)
            steps.take_up()
            with _overridden(model, steps):
                given["initial_epoch"] = first + steps.epoch
                given["callbacks"] = _with_report(given["callbacks"], steps)
                history = keras.Model.fit(**given)
        return history

    def _crew(
        self, opened: contextlib.ExitStack, server: Server, client: Client, task: Task
    ) -> Crew:
        in_sync = str(self._fields.get("consistency")).startswith("sync")
        threads = 1 if in_sync else max(1, core_count() // (self._workers + 1))
        share = {} if "NPROC" in os.environ else {"NPROC": str(threads)}
        file = opened.enter_context(handed.write(task))
        return opened.enter_context(
            Crew(
                self._workers,
                address=server.address,
                run_id=str(client.status()["run_id"]),
                task=self._name,
                task_file=file.fileno(),
                options=[] if self._platform is None else ["--platform", self._platform],
                environment={**share, "KERAS_BACKEND": "jax"},
                logs=server.run_dir / "logs",
            )
        )


def _beginning(server: Server, workers: int) -> str:
    who = f"{workers} worker{'s' * (workers != 1)} here" if workers else "waiting for workers"
    return f"headwater: training at {server.address}, {who}; kept in {server.run_dir}"


# ------------------------------------------------------------------- the steps


class _Progress:
    """What the server has applied, from its thread to the one that trains."""

    def __init__(self) -> None:
        self._applied: deque[Tallies | None] = deque()

    def on_batch(self, epoch: int, tallies: Tallies | None) -> None:
        """See `Pace.on_batch`."""
        self._applied.append(tallies)

    def next(self) -> list[Tallies | None]:
        """Of at most one more batch; empty when there is none yet."""
        return [self._applied.popleft()] if self._applied else []


class _Steps:
    """Keras's `train_function` of one fit: (state, iterator) -> (logs, state).

    State is as in Keras's JAX trainer: (trainable, non-trainable, optimizer's, metrics')
    variables' values.
    """

    def __init__(
        self,
        model: keras.Model,
        variables: Variables,
        server: Server,
        client: Client,
        crew: Crew | None,
        progress: _Progress,
    ) -> None:
        self._model = model
        self._variables = variables
        self._server = server
        self._client = client
        self._crew = crew
        self._progress = progress
        status = client.status()
        self._run_id = str(status["run_id"])
        self._per_epoch = int(str(status["batches_total"])) // int(str(status["epochs"]))
        self.epoch, self._done = divmod(int(str(status["batches_applied"])), self._per_epoch)
        """Of the run, and how many of its batches are done with."""
        self._is_begun = False
        self._tree = server.tree
        self._seeds = [
            np.array(variable)
            for variable, (_, role) in zip(
                model.non_trainable_variables, variables.others, strict=True
            )
            if role == "seed"
        ]
        self._metrics_at_first = [np.array(v) for v in model.metrics_variables]
        self._sums = [np.zeros(v.shape, np.float64) for v in self._metrics_at_first]
        self._results = jax.jit(self._results_of)
        self._looked_time = time.monotonic()

    def take_up(self) -> None:
        """Have the model hold what the server has, of a run that is continued."""
        if self._server.published.version > 0:
            trained, others, slots, _ = self.state()
            model = self._model
            for variable, value in zip(
                [*model.trainable_variables, *model.non_trainable_variables,
                 *model.optimizer.variables],
                [*trained, *others, *slots], strict=True,
            ):  # fmt: skip
                variable.assign(jnp.array(value))

    def __call__(self, state: Any, iterator: Any) -> tuple[dict[str, Any], Any]:
        if not self._is_begun:
            self._begin(state)
        while not (found := self._progress.next()):
            self._look()
            time.sleep(POLL_S)
        (tallies,) = found
        if tallies is not None:
            self._add(tallies)
        self._done += 1
        if self._done == self._per_epoch:
            self.epoch, self._done, self._is_begun = self.epoch + 1, 0, False
        state = self.state()
        return self._results(state[3]), state

    def state(self) -> tuple[Any, Any, Any, Any]:
        """Of the newest version; the arrays are the server's, and must not be donated."""
        published = self._server.published
        params, model_state = self._tree.restore(published.tensors)
        trained, others = self._variables.in_order(params, model_state, iter(self._seeds))
        slots = [published.optimizer_state[slot] for slot in self._variables.slots]
        metrics = [
            (first + total).astype(first.dtype)
            for first, total in zip(self._metrics_at_first, self._sums, strict=True)
        ]
        return trained, others, slots, metrics

    def report(self, metrics: Mapping[str, float]) -> None:
        """Have an evaluation of the newest version be shown by `headwater status`."""
        published = self._server.published
        weights = Weights(
            {},
            run_id=self._run_id,
            incarnation=published.incarnation,
            version=published.version,
            epoch=self.epoch,
        )
        with contextlib.suppress(HeadwaterError):  # the training does not hang on it
            self._client.report_evaluation(weights, metrics)

    # ------------------------------------------------------------ privately

    def _begin(self, state: Any) -> None:
        """The first step of an epoch: what callbacks changed, and then the go-ahead."""
        model = self._model
        # Should it be interrupted: the model was emptied of its values for the epoch.
        names = ("trainable", "non_trainable", "optimizer", "metrics")
        model._jax_state = {
            f"{name}_variables": values for name, values in zip(names, state, strict=True)
        }
        trained, _, slots, _ = state
        served, _, served_slots, _ = self.state()
        for name, ours, theirs in zip(self._variables.trained, trained, served, strict=True):
            if not np.array_equal(ours, theirs):
                raise UsageError(
                    f"fit: a callback changed the weights ({name}) between two epochs, which the "
                    "server has; change them before fit, or train without Headwater"
                )
        for variable, ours, theirs in zip(
            model.optimizer.variables, slots, served_slots, strict=True
        ):
            if variable is model.optimizer._learning_rate and not np.array_equal(ours, theirs):
                self._client.set({LEARNING_RATE: repr(float(ours))})
        for total in self._sums:
            total[...] = 0
        self._is_begun = True
        self._server.allow_epochs(self.epoch + 1)

    def _add(self, tallies: Tallies) -> None:
        at = 0
        for total in self._sums:
            total[...] += np.reshape(tallies[at : at + total.size], total.shape)
            at += total.size

    def _results_of(self, metrics: Sequence[Any]) -> dict[str, Any]:
        mapping = list(zip(self._model.metrics_variables, metrics, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return self._model.get_metrics_result()

    def _look(self) -> None:
        """Whether anything still comes.

        Raises:
          HeadwaterError: The run failed or was stopped, or no worker is left.
        """
        now = time.monotonic()
        if now - self._looked_time < LOOK_S:
            return
        self._looked_time = now
        with contextlib.suppress(TimeoutError):
            ended = self._server.wait(0)
            raise RunFailed(
                f"fit: {ended.message}" if ended.message else
                f"fit: the run was stopped at version {ended.version}; the weights are kept in "
                f"{self._server.run_dir}"
            )  # fmt: skip
        if self._crew is not None and not self._is_served_by_others():
            self._crew.look()

    def _is_served_by_others(self) -> bool:
        workers: Any = self._client.status()["workers"]
        return any(not str(w["name"]).startswith("worker-") for w in workers)


@contextlib.contextmanager
def _overridden(model: keras.Model, steps: _Steps) -> Iterator[None]:
    """Have Keras's fit take its steps from `steps`."""

    def make_train_function(force: bool = False) -> None:
        model.train_function = steps

    def jax_state_sync() -> None:
        state = getattr(model, "_jax_state", None)
        if state and not model._jax_state_synced:
            # Keras's evaluate donates what the model holds, and the server goes on with its own.
            model._jax_state = {name: list(map(jnp.array, state[name])) for name in state}
            type(model).jax_state_sync(model)

    own = vars(model)
    own["make_train_function"], own["jax_state_sync"] = make_train_function, jax_state_sync
    try:
        yield
    finally:
        del own["make_train_function"], own["jax_state_sync"]
        model.train_function = None


class _Report(keras.callbacks.Callback):
    """Tells the server what an epoch's validation found."""

    def __init__(self, steps: _Steps) -> None:
        super().__init__()
        self._steps = steps

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        found = {
            name.removeprefix("val_"): float(value)
            for name, value in (logs or {}).items()
            if name.startswith("val_") and np.ndim(value) == 0
        }
        if found:
            self._steps.report(found)


def _with_report(callbacks: Any, steps: _Steps) -> Any:
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.append(_Report(steps))
        return callbacks
    given = callbacks if isinstance(callbacks, list | tuple) else [callbacks] if callbacks else []
    return [*given, _Report(steps)]


# --------------------------------------------------------------------- joining


def _join(
    model: keras.Model, variables: Variables, loaded: LoadedTask, address: str
) -> keras.callbacks.History:
    """Compute for the server at `address` until the run is over; its final weights."""
    Worker(loaded, address, Patience(address, JOIN_TIMEOUT_S)).run()
    history = keras.callbacks.History()
    history.set_model(model)
    history.on_train_begin()
    try:
        with Client(address) as client:
            weights = client.pull()
    except Unreachable:
        print(
            f"headwater: the server at {address} has ended with its fit; the final weights are "
            "there, and this model's are as they were",
            file=sys.stderr,
        )
        return history
    names = [*variables.trained, *(name for name, _ in variables.others)]
    own = [*model.trainable_variables, *model.non_trainable_variables]
    for name, variable in zip(names, own, strict=True):
        if name in weights:
            variable.assign(weights[name])
    return history


# -------------------------------------------------------------------- checking


def _data(given: dict[str, Any]) -> KerasData | KerasBatches:
    """What `fit` is to train on, from its arguments; takes what is for validation out of it."""
    x, y, weight = given["x"], given["y"], given["sample_weight"]
    if isinstance(x, keras.utils.PyDataset):
        if given["class_weight"] is not None:
            raise UsageError("fit: class_weight goes with arrays; weigh the batches of a PyDataset")
        return KerasBatches(x)
    if given["shuffle"] not in (True, False):
        raise UsageError(f"fit: shuffle is True or False, not {given['shuffle']!r}")
    if given["steps_per_epoch"] is not None:
        raise UsageError(
            "fit: steps_per_epoch has no place: an epoch is all batches, each exactly once; pass "
            "fewer examples, or a keras.utils.PyDataset of so many batches"
        )
    if given["class_weight"] is not None:
        if weight is not None:
            raise UsageError("fit takes class_weight or sample_weight, not both")
        if keras.tree.is_nested(y):
            raise UsageError("fit: class_weight is for a model with one output")
        given["sample_weight"] = weight = class_weights(y, given["class_weight"])
        given["class_weight"] = None
    data = KerasData(x, y, weight)
    if given["validation_split"] and given["validation_data"] is None:
        share = given["validation_split"]
        count = int(len(data) * (1.0 - share))
        if not 0 < count < len(data):
            raise UsageError(
                f"fit: validation_split={share} leaves nothing of {len(data)} examples"
            )
        first, last = (
            keras.tree.map_structure(
                lambda a, part=part: None if a is None else a[part], data.arrays
            )
            for part in (slice(count), slice(count, None))
        )
        given.update(zip(("x", "y", "sample_weight"), first, strict=True))
        given.update(validation_data=last, validation_split=0.0)
        data = KerasData(*first)
    return data


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
        raise UsageError("fit: steps_per_execution is 1: each batch is an update")
    if keras.distribution.distribution() is not None:
        raise UsageError("fit: a keras.distribution is set; workers have devices of their own")

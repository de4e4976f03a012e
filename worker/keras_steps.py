"""The steps of a Keras `fit` whose gradients are computed elsewhere."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from headwater.client.client import Client
from headwater.client.status import OF_SESSIONS
from headwater.client.weights import Weights
from headwater.protos.errors import HeadwaterError, RunFailed, UsageError
from headwater.server.embedded import Server
from headwater.server.keras_optimizer import LEARNING_RATE
from headwater.server.pace import Tallies
from headwater.worker.keras_task import Variables

log = logging.getLogger("headwater")

POLL_S = 0.005
"""Between two looks for updates: each wakes this thread, in the process that makes them."""

LOOK_S = 0.5
"""Between two looks at whether all are well."""


class Steps:
    """Keras's `train_function` of one fit: (state, iterator) -> (logs, state).

    State is as in Keras's JAX trainer: (trainable, non-trainable, optimizer's, metrics')
    variables' values.

    Args:
      model, variables: What is trained.
      server: Trains it; none of its epochs has been allowed.
      client: Of that server.
      applied: What `Pace.on_batch` is told, appended by the server's thread.
      look: Raises when no worker is left that was started here.
    """

    def __init__(
        self,
        model: keras.Model,
        variables: Variables,
        server: Server,
        client: Client,
        applied: deque[Tallies | None],
        look: Callable[[], None],
    ) -> None:
        self._model = model
        self._variables = variables
        self._server = server
        self._client = client
        self._applied = applied
        self._look_at_workers = look
        status = client.status()
        self._run_id = str(status["run_id"])
        self._per_epoch = int(str(status["batches_total"])) // int(str(status["epochs"]))
        self.epoch, self._done = divmod(len(server.published.applied), self._per_epoch)
        """Of the run, the first that is not complete; and how many of its batches are done with."""
        self._done_before = self._done
        self._is_begun = False
        self._tree = server.tree
        self._seeds = [
            np.array(variable.value)
            for variable, (_, role) in zip(
                model.non_trainable_variables, variables.others, strict=True
            )
            if role == "seed"
        ]
        self._metrics_at_first = [np.array(v.value) for v in model.metrics_variables]
        self._sums = [np.zeros(v.shape, np.float64) for v in self._metrics_at_first]
        self._results = jax.jit(self._results_of)
        self._looked_time = time.monotonic()
        self._has_warned = False

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
        if self._done_before:  # in the epoch that a run is continued in
            self._done_before -= 1
        else:
            self._await_batch()
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

    def _await_batch(self) -> None:
        while not self._applied:
            self._look()
            time.sleep(POLL_S)
        tallies = self._applied.popleft()
        if tallies is not None:
            self._add(tallies)
        self._done += 1

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
        try:
            self._look_at_workers()
        except Exception as error:
            if not self._others_compute():
                raise
            if not self._has_warned:
                self._has_warned = True
                log.warning("%s; workers from elsewhere go on", error)

    def _others_compute(self) -> bool:
        """Whether there are workers from elsewhere; a push session takes no batches."""
        return any(
            worker["state"] not in OF_SESSIONS for worker in self._client.status()["workers"]
        )


@contextlib.contextmanager
def overridden(model: keras.Model, steps: Steps) -> Iterator[None]:
    """Have Keras's fit of a model take its steps from `steps`."""

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

    def __init__(self, steps: Steps) -> None:
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


def with_report(callbacks: Any, steps: Steps) -> Any:
    """What `fit` was given as callbacks, and one that tells the server of validations."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.append(_Report(steps))
        return callbacks
    given = callbacks if isinstance(callbacks, list | tuple) else [callbacks] if callbacks else []
    return [*given, _Report(steps)]

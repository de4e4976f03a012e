"""Keras models through workers and a server: what is as in Keras, what is refused, what differs.

Each row of the table in docs/keras.md names the test here that shows it. Most train in one
process, by a worker in a thread of it that has a model of its own, for the sake of speed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers

from headwater.protos.errors import UsageError
from headwater.server.keras_optimizer import KerasOptimizer
from headwater.worker.gradient import GradientFunction
from headwater.worker.keras_data import KerasData
from headwater.worker.keras_task import build, task_of
from headwater.worker.keras_worker import ParameterServerStrategy

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"  # Keras's
)

PAGE = Path(__file__).parents[2] / "docs" / "keras.md"

DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(120, 6)).astype(np.float32)
Y = DRAW.integers(0, 3, 120)
ONE_HOT = np.eye(3, dtype=np.float32)[Y]


class Row(NamedTuple):
    """What the table says of a feature of Keras's."""

    feature: str
    verdict: str
    test: str
    note: str = ""


WORKS, DIFFERS, REFUSED = "works", "differs", "clear error"

ROWS = [
    Row("`Sequential`, functional and subclassed models", WORKS, "test_kinds_of_models"),
    Row("layers and losses of your own, with or without `get_config`", WORKS, "test_own_code"),
    Row("`Lambda`, nested models, several inputs and outputs, `loss_weights`", WORKS,
        "test_several_inputs_and_outputs"),
    Row("`BatchNormalization`", WORKS, "test_batch_normalization",
        "with several workers its averages are merged, see the guide"),
    Row("`Dropout` and other random layers", DIFFERS, "test_dropout",
        "the masks are drawn for each batch from `seed`, not one after the other"),
    Row("frozen layers, `Normalization.adapt`", WORKS, "test_frozen_layers",
        "sent once, never pushed"),
    Row("regularizers, constraints, `add_loss`, `compute_loss`", WORKS, "test_what_adds_to_a_loss"),
    Row("every optimizer, with its own arithmetic", WORKS, "test_optimizers"),
    Row("weight decay, clipping, schedules, `use_ema`, `gradient_accumulation_steps`", WORKS,
        "test_what_optimizers_can_do"),
    Row("`metrics`, `weighted_metrics`: means, `AUC`, your own that add up", WORKS, "test_metrics"),
    Row("a metric whose variables are not sums, such as a maximum", DIFFERS,
        "test_a_metric_that_does_not_add_up", "changes are added up, over an epoch's batches"),
    Row("`sample_weight`, `class_weight`", WORKS, "test_weights_of_examples"),
    Row("`validation_data`, `validation_split`, `validation_freq`", WORKS, "test_validation"),
    Row("`keras.utils.PyDataset`", WORKS, "test_a_pydataset",
        "its items are the batches; `on_epoch_end` is not called in workers"),
    Row("`History`; callbacks of batches and epochs, in order", WORKS, "test_callbacks"),
    Row("`LearningRateScheduler`, `ReduceLROnPlateau`", WORKS, "test_learning_rates"),
    Row("`EarlyStopping`, `ModelCheckpoint`", WORKS, "test_early_stopping_and_checkpoints"),
    Row("`SwapEMAWeights`", WORKS, "test_swapped_weights"),
    Row("`on_train_batch_end`: the model's weights", DIFFERS, "test_weights_within_an_epoch",
        "those of the newest version, which may be some updates on"),
    Row("`fit` again, `initial_epoch`", WORKS, "test_fit_again"),
    Row("`evaluate`, `predict`, `save`, `load_model`", WORKS, "test_saved_and_loaded"),
    Row("`mixed_bfloat16`", WORKS, "test_mixed_bfloat16"),
    Row("a `train_step` or `fit` of your own", REFUSED, "test_refused"),
    Row("`mixed_float16`, `loss_scale_factor`", REFUSED, "test_refused"),
    Row("`steps_per_execution`, `steps_per_epoch`, `run_eagerly`", REFUSED, "test_refused"),
    Row("generators, and data that cannot be indexed", REFUSED, "test_refused"),
    Row("a callback that changes weights before an epoch, as `BackupAndRestore` does", REFUSED,
        "test_a_callback_that_changes_weights", "`run_dir=` goes on with a run"),
    Row("another backend than JAX", REFUSED, "test_another_backend"),
]  # fmt: skip


def test_the_table_in_the_docs_is_this_one() -> None:
    lines = [
        f"| {row.feature} | {row.verdict}{': ' + row.note if row.note else ''} |" for row in ROWS
    ]
    table = "\n".join(["| Keras | here |", "| --- | --- |", *lines])
    assert table in PAGE.read_text(), f"docs/keras.md should have\n\n{table}\n"
    assert {row.test for row in ROWS} <= globals().keys()


# ------------------------------------------------------------------- the harness


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _compiled_quickly() -> Iterator[None]:
    """Nearly all the time goes into compiling what then runs for a moment."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def here(**options: Any) -> ParameterServerStrategy:
    return ParameterServerStrategy(workers=0, **{"consistency": "sync:1", "seed": 0, **options})


def compiled(make: Callable[[], keras.Model], **options: Any) -> keras.Model:
    model = make()
    model.compile(
        **{
            "optimizer": keras.optimizers.Adam(0.01),
            "loss": "sparse_categorical_crossentropy",
            "metrics": ["accuracy"],
            **options,
        }
    )
    return model


class Trained(NamedTuple):
    plain: keras.Model
    served: keras.Model
    histories: tuple[Mapping[str, Any], Mapping[str, Any]]


def both(
    make: Callable[[], keras.Model],
    compile_options: Callable[[], Mapping[str, Any]] = dict,
    x: Any = X,
    y: Any = Y,
    **fit: Any,
) -> Trained:
    """Train by Keras alone, and the same through a server; fails where they differ."""
    given = {"epochs": 2, "batch_size": 16, "shuffle": False, "verbose": 0, **fit}
    models = []
    for strategy in (None, here()):
        keras.utils.set_random_seed(0)
        keras.utils.clear_session(free_memory=False)
        model = compiled(make, **compile_options())
        if strategy is not None:
            strategy.distribute(model)
        callbacks = given.get("callbacks")
        made = {} if callbacks is None else {"callbacks": callbacks()}
        history = model.fit(x, y, **{**given, **made})
        models.append((model, history.history))
    (plain, first), (served, second) = models
    assert_close(first, second)
    for one, other in zip(plain.variables, served.variables, strict=True):
        if "seed_generator" not in one.path:
            np.testing.assert_allclose(
                np.asarray(other.value), np.asarray(one.value), atol=2e-5, rtol=2e-4,
                err_msg=one.path,
            )  # fmt: skip
    return Trained(plain, served, (first, second))


def assert_close(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    assert list(first) == list(second)
    for name, values in first.items():
        np.testing.assert_allclose(second[name], values, atol=1e-4, rtol=1e-4, err_msg=name)


def dense(**options: Any) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="tanh", **options),
            layers.Dense(3, activation="softmax"),
        ]
    )


def test_a_gradient_is_that_of_plain_jax() -> None:
    model = compiled(dense)
    data = KerasData(X, Y)
    variables = build(model, data, 16)
    optimizer = KerasOptimizer(model.optimizer, variables.trained, variables.slots)
    task = task_of(model, variables, data, optimizer, batch_size=16, shuffle=False)
    params, state = task.init(jax.random.key(0))
    batch = data.batch(np.arange(16), np.random.default_rng(0))

    def loss(w1: jax.Array, b1: jax.Array, w2: jax.Array, b2: jax.Array) -> jax.Array:
        logits = jnp.tanh(X[:16] @ w1 + b1) @ w2 + b2
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), Y[:16, None], 1).mean()

    plain = jax.grad(loss, range(4))(*(params[name] for name in variables.trained))

    leaves = task.tree.leaves((params, state))
    found = GradientFunction(task, seed=0)(leaves, [(batch, 0, 0)])

    expected = task.tree.leaves(
        ({**params, **dict(zip(variables.trained, plain, strict=True))}, {})
    )
    for ours, theirs in zip(found.leaves, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    total, count = found.tallies[2:]  # of the accuracy, after the loss
    assert count == 16
    assert total == pytest.approx(16 * found.metrics["accuracy"])


# ------------------------------------------------------------------------ models


class Doubled(layers.Layer):
    """Without get_config."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.units = units

    def build(self, shape: tuple[int, ...]) -> None:
        self.w = self.add_weight(shape=(shape[-1], self.units), name="w")

    def call(self, x: Any) -> Any:
        return 2 * keras.ops.matmul(x, self.w)


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.first = Doubled(5)
        self.rest = [layers.Dense(8, activation="tanh"), layers.Dense(3, activation="softmax")]

    def call(self, x: Any, training: bool = False) -> Any:
        x = self.first(x)
        for layer in self.rest:
            x = layer(x)
        return x


def test_kinds_of_models() -> None:
    def functional() -> keras.Model:
        given = keras.Input((6,))
        return keras.Model(given, layers.Dense(3, activation="softmax")(given))

    for make in (dense, functional, Subclassed):
        trained = both(make)
        assert trained.histories[1]["loss"][-1] < trained.histories[1]["loss"][0]


def test_own_code() -> None:
    scale = 1.5

    class Loss(keras.losses.Loss):
        def call(self, y: Any, predicted: Any) -> Any:
            return scale * keras.losses.sparse_categorical_crossentropy(y, predicted)

    def model() -> keras.Model:
        return keras.Sequential(
            [keras.Input((6,)), Doubled(4), layers.Dense(3, activation="softmax")]
        )

    both(model, lambda: {"loss": Loss()})
    both(model, lambda: {"loss": lambda y, p: keras.ops.mean((y - p) ** 2, axis=-1)}, y=ONE_HOT)


def test_several_inputs_and_outputs() -> None:
    def model() -> keras.Model:
        a, b = keras.Input((6,), name="a"), keras.Input((2,), name="b")
        inner = keras.Sequential([layers.Dense(4, activation="relu", name="d")], name="inner")
        joined = layers.Concatenate()([inner(a), layers.Lambda(lambda t: t * 2)(b)])
        kind = layers.Dense(3, activation="softmax", name="kind")(joined)
        size = layers.Dense(1, name="size")(joined)
        return keras.Model({"a": a, "b": b}, {"kind": kind, "size": size})

    trained = both(
        model,
        lambda: {
            "loss": {"kind": "sparse_categorical_crossentropy", "size": "mse"},
            "loss_weights": {"kind": 1.0, "size": 0.1},
            "metrics": {"kind": ["accuracy"], "size": ["mae"]},
        },
        x={"a": X, "b": X[:, :2]},
        y={"kind": Y, "size": X.sum(1, keepdims=True)},
    )
    assert {"kind_accuracy", "size_mae", "kind_loss", "size_loss"} <= trained.histories[1].keys()


def test_batch_normalization() -> None:
    def model() -> keras.Model:
        return keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(8, use_bias=False),
                layers.BatchNormalization(momentum=0.9),
                layers.Activation("relu"),
                layers.Dense(3, activation="softmax"),
            ]
        )

    served = both(model).served
    (mean,) = [v for v in served.non_trainable_variables if v.path.endswith("moving_mean")]
    assert float(jnp.abs(mean.value).max()) > 0.01


def test_dropout() -> None:
    """Each batch has masks of its own, the same whoever computes it."""

    def model() -> keras.Model:
        return keras.Sequential(
            [keras.Input((6,)), layers.Dropout(0.5), layers.Dense(3, activation="softmax")]
        )

    def loss(seed: int) -> list[float]:
        keras.utils.set_random_seed(0)
        made = here(seed=seed).distribute(compiled(model))
        before = [np.array(v.value) for v in made.non_trainable_variables]
        found = made.fit(X, Y, epochs=2, batch_size=16, shuffle=False, verbose=0).history["loss"]
        for variable, old in zip(made.non_trainable_variables, before, strict=True):
            np.testing.assert_array_equal(variable.value, old)
        return found

    first = loss(1)
    assert first == loss(1)
    assert first != loss(2)


def test_frozen_layers() -> None:
    def model() -> keras.Model:
        normal = layers.Normalization(name="normal")
        normal.adapt(X * 3 + 1)
        frozen = layers.Dense(8, activation="tanh", name="frozen", trainable=False)
        last = layers.Dense(3, activation="softmax")
        return keras.Sequential([keras.Input((6,)), normal, frozen, last])

    served = both(model).served

    others = dict(build(served, KerasData(X, Y), 16).others)
    assert {name.rpartition("/")[2] for name in others} == {"mean", "variance", "kernel", "bias",
                                                            "count"}  # fmt: skip
    assert set(others.values()) == {"constant"}


def test_what_adds_to_a_loss() -> None:
    class Sparse(layers.Layer):
        def call(self, x: Any) -> Any:
            self.add_loss(1e-2 * keras.ops.mean(keras.ops.abs(x)))
            return x

    class Sharper(Subclassed):
        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            return 2 * super().compute_loss(*arguments, **named)

    def model() -> keras.Model:
        return keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(8, kernel_regularizer="l2", kernel_constraint="unit_norm"),
                Sparse(),
                layers.Dense(3, activation="softmax"),
            ]
        )

    served = both(model).served
    norms = jnp.linalg.norm(served.layers[0].kernel.value, axis=0)
    np.testing.assert_allclose(norms, 1, atol=1e-5)
    both(Sharper)


# -------------------------------------------------------------------- optimizers


@pytest.mark.parametrize(
    "name",
    [
        *("sgd", "adam"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "adadelta",
                "adafactor",
                "adagrad",
                "adamax",
                "ftrl",
                "lion",
                "muon",
                "nadam",
                "rmsprop",
            )
        ),
    ],
)
def test_optimizers(name: str) -> None:
    both(dense, lambda: {"optimizer": name}, epochs=1)


def test_what_optimizers_can_do() -> None:
    schedule = keras.optimizers.schedules.ExponentialDecay(1e-2, 4, 0.9)
    both(dense, lambda: {"optimizer": keras.optimizers.AdamW(schedule, clipnorm=0.5)})

    def averaging() -> keras.optimizers.Optimizer:
        return keras.optimizers.SGD(
            0.1, momentum=0.9, use_ema=True, ema_momentum=0.9, gradient_accumulation_steps=2
        )

    both(dense, lambda: {"optimizer": averaging()})


def test_learning_rates() -> None:
    def callbacks() -> list[keras.callbacks.Callback]:
        return [
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5),
            keras.callbacks.ReduceLROnPlateau(monitor="loss", min_delta=10.0, patience=1),
        ]

    trained = both(dense, callbacks=callbacks, epochs=4)
    rates = trained.histories[1]["learning_rate"]
    assert rates[-1] < rates[0] / 10
    assert float(trained.served.optimizer.learning_rate.value) == pytest.approx(
        float(trained.plain.optimizer.learning_rate.value)
    )


# ---------------------------------------------------------------- metrics, weights


class Mass(keras.metrics.Metric):
    """Adds up."""

    def __init__(self) -> None:
        super().__init__(name="mass")
        self.total = self.add_weight(shape=(3,), initializer="zeros", name="total")

    def update_state(self, y: Any, predicted: Any, sample_weight: Any = None) -> None:
        self.total.assign_add(keras.ops.sum(predicted, axis=0))

    def result(self) -> Any:
        return keras.ops.max(self.total)


def test_metrics() -> None:
    def options() -> dict[str, Any]:
        return {
            "loss": "categorical_crossentropy",
            "metrics": ["accuracy", keras.metrics.AUC(name="auc"), keras.metrics.F1Score("macro"),
                        Mass()],
            "weighted_metrics": ["mae"],
        }  # fmt: skip

    weights = DRAW.uniform(0.5, 2, 120)
    both(dense, options, y=ONE_HOT, sample_weight=weights)


def test_a_metric_that_does_not_add_up() -> None:
    class Largest(Mass):
        def update_state(self, y: Any, predicted: Any, sample_weight: Any = None) -> None:
            self.total.assign(keras.ops.maximum(self.total, keras.ops.max(predicted, axis=0)))

    def largest(strategy: ParameterServerStrategy | None) -> float:
        model = compiled(dense, metrics=[Largest()])
        if strategy is not None:
            strategy.distribute(model)
        found = model.fit(X, Y, batch_size=60, shuffle=False, verbose=0)
        return found.history["mass"][-1]

    assert largest(None) <= 1
    assert largest(here()) > 1  # one batch's and another's


def test_weights_of_examples() -> None:
    both(dense, sample_weight=DRAW.uniform(0, 2, 120))
    both(dense, class_weight={0: 0.1, 2: 3.0})


def test_validation() -> None:
    both(dense, validation_split=0.25, class_weight={0: 2.0})
    both(dense, validation_data=(X[:30], Y[:30]), validation_freq=2, epochs=4)


# -------------------------------------------------------------------- data, steps


class Batches(keras.utils.PyDataset):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: int) -> tuple[np.ndarray, np.ndarray]:
        return X[at * 20 : at * 20 + 20], Y[at * 20 : at * 20 + 20]


def test_a_pydataset() -> None:
    both(dense, x=Batches(6), y=None, batch_size=None)


class Diary(keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def on_train_begin(self, logs: Any = None) -> None:
        self.lines.append("begin")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.lines.append(f"epoch {epoch}")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.lines.append(f"{batch} {float(logs['loss']):.3f}")

    def on_test_end(self, logs: Any = None) -> None:
        self.lines.append(f"test {float(logs['loss']):.3f}")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.lines.append(f"end {epoch} {sorted(logs)}")


def test_callbacks() -> None:
    diaries: list[Diary] = []

    def callbacks() -> list[keras.callbacks.Callback]:
        diaries.append(Diary())
        return [diaries[-1]]

    both(dense, callbacks=callbacks, validation_split=0.2)

    plain, served = (diary.lines for diary in diaries)
    assert len(plain) == 1 + 2 * (1 + 6 + 1 + 1)
    assert served == plain


def test_early_stopping_and_checkpoints(tmp_path: Path) -> None:
    kept = tmp_path / "best.keras"

    def callbacks() -> list[keras.callbacks.Callback]:
        return [
            keras.callbacks.EarlyStopping(
                monitor="loss", min_delta=10.0, patience=2, restore_best_weights=True
            ),
            keras.callbacks.ModelCheckpoint(kept, monitor="loss", save_best_only=True),
        ]

    trained = both(dense, callbacks=callbacks, epochs=9)
    assert len(trained.histories[1]["loss"]) == 3
    # Saved at the end of the last epoch, the best; restored was the one that counted as best.
    saved = keras.saving.load_model(kept)
    assert int(saved.optimizer.iterations.value) == 3 * 8


def test_swapped_weights() -> None:
    both(
        dense,
        lambda: {"optimizer": keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)},
        callbacks=lambda: [keras.callbacks.SwapEMAWeights()],
        validation_split=0.2,
    )


def test_weights_within_an_epoch() -> None:
    """They are never of an older version than the batch's own."""
    seen: list[tuple[int, int]] = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append((batch, int(self.model.optimizer.iterations.value)))

    here().distribute(compiled(dense)).fit(
        X, Y, batch_size=16, shuffle=False, verbose=0, callbacks=[Look()]
    )

    assert len(seen) == 8
    assert all(batch + 1 <= updates <= 8 for batch, updates in seen)


def test_fit_again() -> None:
    def twice(strategy: ParameterServerStrategy | None) -> tuple[keras.Model, list[float]]:
        keras.utils.set_random_seed(0)
        model = compiled(dense)
        if strategy is not None:
            strategy.distribute(model)
        given = {"batch_size": 16, "shuffle": False, "verbose": 0}
        losses = model.fit(X, Y, epochs=1, **given).history["loss"]
        history = model.fit(X, Y, epochs=4, initial_epoch=2, **given)
        assert history.epoch == [2, 3]
        return model, losses + history.history["loss"]

    plain, first = twice(None)
    served, second = twice(here())
    np.testing.assert_allclose(second, first, rtol=1e-4)
    assert int(served.optimizer.iterations.value) == int(plain.optimizer.iterations.value) == 24
    assert served.fit(X, Y, epochs=2, initial_epoch=2, verbose=0).history == {}


def test_a_run_is_continued_whatever_numpy_draws_now() -> None:
    def fitted(epochs: int, **options: Any) -> keras.callbacks.History:
        keras.utils.clear_session(free_memory=False)  # as in a new program: layers' names
        model = here(run_dir="run", **options).distribute(compiled(dense))
        history = model.fit(X, Y, epochs=epochs, verbose=0)
        assert int(model.optimizer.iterations.value) == epochs * 4
        return history

    assert fitted(1, seed=None).epoch == [0]
    assert fitted(3, seed=None).epoch == [1, 2]
    with pytest.raises(UsageError, match=r"seed: \d+ in the directory, 1 now"):
        fitted(4, seed=1)


def test_a_run_directory_is_for_one_fit_of_a_strategy() -> None:
    strategy = here(run_dir="run")
    model = strategy.distribute(compiled(dense))
    with pytest.raises(UsageError, match="differ in length"):
        model.fit(X, Y[:5], verbose=0)
    model.fit(X, Y, verbose=0)
    weights = np.ones((6, 8))
    model.layers[0].kernel.assign(weights)

    with pytest.raises(
        UsageError, match="has trained the run in run; make a new strategy, with an"
    ):
        model.fit(X, Y, epochs=3, initial_epoch=1, verbose=0)

    np.testing.assert_array_equal(model.layers[0].kernel.value, weights)


def test_a_run_that_is_complete_is_not_trained_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = compiled(dense)
    here(run_dir="run").distribute(model).fit(X, Y, verbose=0)
    assert "complete already" not in caplog.text

    history = here(run_dir="run").distribute(model).fit(X, Y, verbose=0)

    assert history.epoch == []
    assert "the run in run is complete already; nothing is trained" in caplog.text


def test_saved_and_loaded(tmp_path: Path) -> None:
    strategy = here()
    with strategy.scope():
        model = compiled(dense)
    model.fit(X, Y, verbose=0)
    predicted = model.predict(X, verbose=0)
    model.save(tmp_path / "it.keras")
    with strategy.scope():
        loaded = keras.saving.load_model(tmp_path / "it.keras")
    np.testing.assert_allclose(loaded.predict(X, verbose=0), predicted, rtol=1e-6)
    before = loaded.evaluate(X, Y, verbose=0)[0]
    loaded.fit(X, Y, epochs=3, verbose=0)
    assert loaded.evaluate(X, Y, verbose=0)[0] < before
    assert int(loaded.optimizer.iterations.value) == 4 * 4
    assert len(list(Path("runs").glob("keras-*"))) == 2


def test_mixed_bfloat16() -> None:
    def model() -> keras.Model:
        return dense(dtype="mixed_bfloat16")

    served = both(model).served
    assert served.layers[0].kernel.dtype == "float32"


# ----------------------------------------------------------------------- refused


class OwnStep(Subclassed):
    def train_step(self, *arguments: Any) -> Any:
        return super().train_step(*arguments)


class OwnFit(Subclassed):
    def fit(self, *arguments: Any, **named: Any) -> Any:
        return super().fit(*arguments, **named)


def generator() -> Any:
    yield X, Y


@pytest.mark.parametrize(
    ("make", "compile_options", "fit", "said"),
    [
        (OwnStep, {}, {}, "OwnStep has a train_step of its own"),
        (OwnFit, {}, {}, "OwnFit has a fit of its own"),
        (dense, {"optimizer": keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())}, {},
         "losses are not scaled here, as mixed_float16 needs; use mixed_bfloat16"),
        (dense, {"optimizer": keras.optimizers.SGD(loss_scale_factor=8.0)}, {},
         "loss_scale_factor"),
        (dense, {"steps_per_execution": 4}, {}, "steps_per_execution=4: it has to be 1"),
        (dense, {"run_eagerly": True}, {}, "run_eagerly=True is for a debugger"),
        (dense, {}, {"steps_per_epoch": 2}, "steps_per_epoch has no place"),
        (dense, {}, {"x": Batches(6), "y": None, "steps_per_epoch": 2}, "steps_per_epoch has no"),
        (dense, {}, {"x": generator(), "y": None}, "x has a generator, which workers cannot index"),
        (dense, {}, {"x": X.tolist()}, "x has a float, which workers cannot index; give arrays"),
        (dense, {}, {"y": Y[:5]}, r"differ in length: \[5, 120\]"),
        (dense, {}, {"class_weight": {0: 2.0}, "sample_weight": X[:, 0]}, "not both"),
        (dense, {}, {"validation_split": 0.999}, "validation_split=0.999 leaves nothing"),
        (dense, {}, {"shuffle": "batch"}, "shuffle is True or False"),
    ],
)  # fmt: skip
def test_refused(
    make: Callable[[], keras.Model],
    compile_options: Mapping[str, Any],
    fit: Mapping[str, Any],
    said: str,
) -> None:
    model = here().distribute(compiled(make, **compile_options))
    with pytest.raises(UsageError, match=said):
        model.fit(**{"x": X, "y": Y, "verbose": 0, **fit})
    assert not Path("runs").exists()


def test_not_compiled() -> None:
    with pytest.raises(UsageError, match=r"call model.compile\("):
        here().distribute(dense()).fit(X, Y)


def test_a_callback_that_changes_weights() -> None:
    class Shake(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.layers[0].kernel.assign_add(keras.ops.ones((6, 8)))

    model = here().distribute(compiled(dense))
    with pytest.raises(UsageError, match=r"a callback changed the weights .*dense/kernel"):
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[Shake()])
    assert np.isfinite(model.evaluate(X, Y, verbose=0)[0])  # it has its weights still


def test_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    with pytest.raises(UsageError, match=r'Keras runs on numpy; .*KERAS_BACKEND"] = "jax"'):
        ParameterServerStrategy()


@pytest.mark.parametrize(
    ("arguments", "named", "said"),
    [
        ((2,), {}, r"ParameterServerStrategy\(workers=2\) starts so many"),
        ((), {"workers": -1}, "workers is a whole number from 0 on, not -1"),
        ((), {"workers": "two"}, "workers is a whole number"),
        ((), {"name": "a/b"}, "name is for a folder"),
        ((), {"epochs": 3}, "takes no 'epochs': give it to fit"),
        ((), {"stop_when": "accuracy>0.9"}, "EarlyStopping"),
        ((), {"consistancy": "async"}, "did you mean 'consistency'"),
        ((), {"consistency": "often"}, "consistency"),
        (("host",), {}, "ParameterServerStrategy takes HOST:PORT such as .*, not 'host'"),
        (("host:1",), {"workers": 2}, "joins a server that is there"),
        (("host:1",), {"platform": "cpu"}, "with 'host:1' it is this process that computes"),
        ((), {"workers": 0, "platform": "cpu"}, "with workers=0 it is this process that comp"),
    ],
)
def test_wrong_strategies(arguments: tuple[Any, ...], named: Mapping[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ParameterServerStrategy(*arguments, **named)

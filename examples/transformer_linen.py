"""A transformer in Flax Linen that learns to write Python, one character at a time.

    headwater run --task headwater.examples.transformer_linen --workers 2

It learns from the text of character_lm.py. An epoch takes the held-out loss to 1.56 nats
per character, and 58.5 % of them are predicted right.

`module.init(key, ...)["params"]` is a tree of arrays already, so that nothing needs
converting. AdamW decays the kernels alone, by a mask; gradients are clipped by their
global norm; and the schedule ends with the run, since it is told how long that is.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from headwater import Task
from headwater.examples.character_lm import ALPHABET, load

try:
    from flax import linen as nn
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "this example needs Flax, which is not installed: run pip install 'headwater[flax]'"
    ) from None


class Layer(nn.Module):
    """Attention and a perceptron, each after a norm (Xiong et al. 2020)."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, mask = x.shape[-1], nn.make_causal_mask(x[..., 0])
        h = nn.LayerNorm(name="attention_norm")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(h, mask=mask)
        h = nn.Dense(4 * width, name="up")(nn.LayerNorm(name="mlp_norm")(x))
        return x + nn.Dense(width, name="down")(nn.gelu(h))


class Transformer(nn.Module):
    """Logits of every next character, (batch, time, 97), given tokens, (batch, time)."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 64

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        place = nn.Embed(self.context, self.width, name="position")(jnp.arange(tokens.shape[1]))
        x = nn.Embed(len(ALPHABET), self.width, name="embedding")(tokens) + place
        for layer in range(self.layers):
            x = Layer(self.heads, name=f"layer_{layer}")(x)
        return nn.Dense(len(ALPHABET), name="output")(nn.LayerNorm(name="norm")(x))


def kernels(params: Any) -> Any:
    """The mask of what AdamW decays: True at kernels, False at embeddings, norms, biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def optimizer(total_updates: int) -> optax.GradientTransformation:
    """AdamW that warms up for a twentieth of the run, then cools down along a cosine."""
    learning_rate = optax.warmup_cosine_decay_schedule(
        init_value=3e-4,
        peak_value=3e-3,
        warmup_steps=total_updates // 20 + 1,
        decay_steps=total_updates + 1,
    )
    adamw = optax.adamw(learning_rate, weight_decay=0.01, mask=kernels)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def task(text: str = "", width: int = 64, layers: int = 2, heads: int = 4) -> Task:
    """Learn `text`: a file, or with "" Python's standard library."""
    model = Transformer(width, layers, heads)

    def init(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, model.context), jnp.int32))["params"]

    def loss(params: Any, windows: jax.Array, key: jax.Array | None) -> Any:
        logits, targets = model.apply({"params": params}, windows[:, :-1]), windows[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean(), {"accuracy": (logits.argmax(axis=-1) == targets).mean()}

    @jax.jit
    def measure(params: Any, windows: Any) -> Any:
        one = functools.partial(loss, params, key=None)
        nats, metrics = jax.lax.map(lambda window: one(window[None]), windows, batch_size=128)
        return {"loss": nats.mean(), "accuracy": metrics["accuracy"].mean()}

    def evaluate(params: Any) -> dict[str, Any]:
        held_out = load(text, model.context)[1]
        return measure(params, held_out.batch(np.arange(len(held_out))))

    return Task(
        init=init,
        loss=loss,
        data=lambda: load(text, model.context)[0],
        optimizer=optimizer,
        batch_size=16,
        evaluate=evaluate,
    )

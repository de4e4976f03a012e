"""Reinforcement learning: a pole is balanced on a cart, by policy gradients.

    headwater run --task headwater.examples.cartpole --workers 2
    headwater run --task headwater.examples.cartpole --workers 2 --task-option batches=20

Nothing is read: a worker plays 32 episodes with the weights that it was given, and pushes
the gradient that they call for. Each batch of episodes has its number and its key, so that
it counts once, whoever is killed, and can be played again.

Untrained, the pole falls after about 20 pushes. After the 150 batches, about two seconds of
two workers on two cores, it stands to the end of all 100 episodes of the evaluation: a mean
length of 500 of 500, with each of the seeds 0 to 4.

The cart and its pole are those of Barto, Sutton and Anderson 1983, "Neuronlike adaptive
elements that can solve difficult learning control problems", appendix, without friction:
a push of 10 N to the left or to the right every 0.02 s, until the pole has leaned over by
12 degrees or the cart has gone 2.4 m. Here an episode ends after 500 pushes as well.

The gradient is REINFORCE's (Williams 1992, "Simple statistical gradient-following algorithms
for connectionist reinforcement learning"), less a baseline: what a second network, the
critic, expects of a state.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from headwater import Generated, Task

EPISODES = 32
"""In a batch."""

STEPS = 500
"""Of an episode, at most."""

HIDDEN = 32

GRAVITY, CART_KG, POLE_KG, HALF_POLE_M = 9.8, 1.0, 0.1, 0.5
FORCE_N, TICK_S = 10.0, 0.02
EDGE_M, LEAN_RAD = 2.4, 12 * jnp.pi / 180

DISCOUNT = 0.99
CRITIC = 0.5
"""What the critic's error weighs beside the actor's."""

SCALE = jnp.array([2.4, 2.0, 0.2, 2.0])
"""Of what the network sees: about as far as each number goes."""

Episodes = dict[str, jax.Array]
"""{"state": (episodes, steps, 4), "action": (episodes, steps) of 0 and 1, "alive":
(episodes, steps) of 0.0 and 1.0, 1 where the pole stood before the push}"""


def init(key: jax.Array) -> Any:
    """One layer of tanh for actor and critic each; at first either push is about as likely."""
    actor, critic, last = jax.random.split(key, 3)
    return {
        "actor": {
            "hidden": jax.random.normal(actor, (4, HIDDEN)),
            "bias": jnp.zeros(HIDDEN),
            "output": jax.random.normal(last, (HIDDEN, 2)) * 0.01,
        },
        "critic": {
            "hidden": jax.random.normal(critic, (4, HIDDEN)),
            "bias": jnp.zeros(HIDDEN),
            "output": jax.random.normal(last, (HIDDEN, 1)) * 0.01,
        },
    }


def network(params: Any, state: jax.Array) -> jax.Array:
    """(…, 2) logits of the actor, or (…, 1) of the critic, of states (…, 4)."""
    return jnp.tanh(state / SCALE @ params["hidden"] + params["bias"]) @ params["output"]


def push(state: jax.Array, action: jax.Array) -> jax.Array:
    """The state a tick after a push to the left (0) or to the right (1), by Euler's method.

    A state is (…, 4): the cart's place in m and speed, the pole's angle in rad, 0 upright,
    and its speed.
    """
    _, x_speed, angle, angle_speed = jnp.moveaxis(state, -1, 0)
    force = jnp.where(action == 1, FORCE_N, -FORCE_N)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    mass = CART_KG + POLE_KG
    pull = (force + POLE_KG * HALF_POLE_M * angle_speed**2 * sin) / mass
    angle_change = (GRAVITY * sin - cos * pull) / (
        HALF_POLE_M * (4 / 3 - POLE_KG * cos**2 / mass)
    )  # rad/s^2
    x_change = pull - POLE_KG * HALF_POLE_M * angle_change * cos / mass  # m/s^2
    changes = jnp.stack([x_speed, x_change, angle_speed, angle_change], axis=-1)
    return state + TICK_S * changes


def stands(state: jax.Array) -> jax.Array:
    """Whether the pole is up and the cart on its track, of states (…, 4)."""
    return (jnp.abs(state[..., 0]) <= EDGE_M) & (jnp.abs(state[..., 2]) <= LEAN_RAD)


def play(params: Any, key: jax.Array, episodes: int, *, greedy: bool = False) -> Episodes:
    """Episodes side by side, each from a state near rest. What comes after an end is not alive."""
    start_key, action_key = jax.random.split(key)
    start = jax.random.uniform(start_key, (episodes, 4), minval=-0.05, maxval=0.05)

    def step(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> Any:
        state, alive = carry
        logits = network(params["actor"], state)  # (episodes, 2)
        action = logits.argmax(axis=-1) if greedy else jax.random.categorical(key, logits)
        after = jnp.where(alive[:, None], push(state, action), state)
        seen = {"state": state, "action": action, "alive": alive.astype(jnp.float32)}
        return (after, alive & stands(after)), seen

    alive = jnp.ones(episodes, bool)
    _, seen = jax.lax.scan(step, (start, alive), jax.random.split(action_key, STEPS))
    return {name: jnp.swapaxes(values, 0, 1) for name, values in seen.items()}


def make(params: Any, key: jax.Array) -> Episodes:
    """A batch, from the weights that its gradient is computed at."""
    return play(params, key, EPISODES)


def loss(params: Any, batch: Episodes, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean over all pushes, and the episodes' mean length."""
    alive = batch["alive"]

    def follow(later: jax.Array, alive: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = alive * (1 + DISCOUNT * later)  # a reward of 1 a push
        return value, value

    _, returns = jax.lax.scan(follow, jnp.zeros(len(alive)), alive.T, reverse=True)
    returns = returns.T * (1 - DISCOUNT)  # (episodes, steps) in 0..1
    expected = network(params["critic"], batch["state"])[..., 0]
    advantage = jax.lax.stop_gradient(returns - expected)
    mean = _mean(advantage, alive)
    spread = jnp.sqrt(_mean((advantage - mean) ** 2, alive))
    chances = jax.nn.log_softmax(network(params["actor"], batch["state"]))
    taken = jnp.take_along_axis(chances, batch["action"][..., None], axis=-1)[..., 0]
    actor = -_mean(taken * (advantage - mean) / (spread + 1e-6), alive)
    critic = _mean((returns - expected) ** 2, alive)
    return actor + CRITIC * critic, {"length": alive.sum(axis=1).mean()}


def _mean(values: jax.Array, alive: jax.Array) -> jax.Array:
    return (values * alive).sum() / alive.sum()


@jax.jit
def evaluate(params: Any) -> dict[str, jax.Array]:
    """The mean length of 100 episodes, always from the same states, by the likelier pushes."""
    episodes = play(params, jax.random.key(2**31), 100, greedy=True)
    return {"length": episodes["alive"].sum(axis=1).mean()}


def task(batches: int = 50, epochs: int = 3, seed: int = 0) -> Task:
    """The task, of so many batches an epoch."""
    return Task(
        init=init,
        loss=loss,
        data=Generated(make, batches_per_epoch=batches),
        optimizer="adam(0.01)",
        batch_size=EPISODES,
        epochs=epochs,
        seed=seed,
        evaluate=evaluate,
    )

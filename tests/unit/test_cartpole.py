"""The cart and its pole obey mechanics; episodes end where they should."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from headwater.examples import cartpole
from headwater.examples.cartpole import EDGE_M, EPISODES, LEAN_RAD, STEPS, play, push, stands


@pytest.fixture(scope="module")
def params() -> Any:
    return cartpole.init(jax.random.key(1))


def test_a_push_obeys_the_equations_of_motion() -> None:
    """Those that the paper's are solved from: of cart and pole together, and of its turning."""
    states = np.random.default_rng(0).uniform(-1, 1, (100, 4)) * [2.4, 3, 0.5, 3]
    for action, force in ((0, -10.0), (1, 10.0)):
        after = np.asarray(push(states.astype(np.float32), np.full(100, action)), np.float64)

        x_speed, turning = states[:, 1], states[:, 3]
        np.testing.assert_allclose(after[:, 0], states[:, 0] + 0.02 * x_speed, atol=1e-5)
        np.testing.assert_allclose(after[:, 2], states[:, 2] + 0.02 * turning, atol=1e-5)
        x_change = (after[:, 1] - x_speed) / 0.02
        angle_change = (after[:, 3] - turning) / 0.02
        sin, cos = np.sin(states[:, 2]), np.cos(states[:, 2])
        whole = 1.1 * x_change + 0.1 * 0.5 * (angle_change * cos - turning**2 * sin)
        np.testing.assert_allclose(whole, force, atol=1e-2)
        pole = 4 / 3 * 0.5 * angle_change + x_change * cos
        np.testing.assert_allclose(pole, 9.8 * sin, atol=1e-2)


def test_a_pole_stands_until_it_leans_or_the_cart_is_at_the_edge() -> None:
    states = np.zeros((5, 4), np.float32)
    states[1, 2], states[2, 2] = 0.99 * LEAN_RAD, -1.01 * LEAN_RAD
    states[3, 0], states[4, 0] = -0.99 * EDGE_M, 1.01 * EDGE_M

    assert stands(states).tolist() == [True, True, False, True, False]


def test_an_episode_is_alive_until_its_pole_has_fallen_and_never_again(params: Any) -> None:
    episodes = {k: np.asarray(v) for k, v in play(params, jax.random.key(3), EPISODES).items()}

    assert episodes["state"].shape == (EPISODES, STEPS, 4)
    columns = (episodes[name] for name in ("state", "action", "alive"))
    for state, action, alive in zip(*columns, strict=True):
        length = int(alive.sum())
        assert 8 <= length < 200  # at random
        assert (alive[:length] == 1).all()
        assert stands(state[:length]).all()
        assert not stands(push(state[length - 1], action[length - 1]))


def test_the_same_key_plays_the_same_episodes(params: Any) -> None:
    one, same, other = (play(params, jax.random.key(n), 4)["action"] for n in (5, 5, 6))

    assert (one == same).all()
    assert not (one == other).all()


def test_the_loss_does_not_see_what_comes_after_an_end(params: Any) -> None:
    batch = play(params, jax.random.key(3), EPISODES)
    dead = batch["alive"] == 0

    changed = {
        "state": jax.numpy.where(dead[..., None], 7.0, batch["state"]),
        "action": jax.numpy.where(dead, 1 - batch["action"], batch["action"]),
        "alive": batch["alive"],
    }

    value, metrics = cartpole.loss(params, batch, jax.random.key(0))
    assert cartpole.loss(params, changed, jax.random.key(0))[0] == value
    assert metrics["length"] == batch["alive"].sum() / EPISODES


def test_an_untrained_policy_lets_the_pole_fall(params: Any) -> None:
    assert float(cartpole.evaluate(params)["length"]) < 100

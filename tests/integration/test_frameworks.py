"""Models of Flax, Equinox and Haiku: named, differentiated, trained and given back as their own."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from headwater.worker.gradient import GradientFunction
from headwater.worker.load import UsageError, load_task
from kit.processes import FREE_PORT, run


def gradients(task, own_loss):
    """(headwater's, the library's own) gradient of a batch, and the parameters, all by name."""
    made = jax.jit(task.init)(jax.random.key(0))
    params, given = (made[0], made) if task.has_state else (made, (made,))
    batch = task.dataset.batch(np.arange(task.batch_size), None)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 1), 3)
    ours = GradientFunction(task, 7)(task.tree.leaves(made), [(batch, 1, 3)]).leaves
    count = len(jax.tree.leaves(params))
    own = jax.jit(jax.grad(own_loss))(*given, batch, key)
    return list(zip(task.tree.names[:count], ours, jax.tree.leaves(own), strict=False))


def assert_same(found):
    for name, ours, own in found:
        np.testing.assert_allclose(ours, own, rtol=1e-3, atol=2e-5, err_msg=name)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@pytest.mark.parametrize(
    ("example", "library", "extra"),
    [
        ("resnet_nnx", "flax", "flax"),
        ("transformer_linen", "flax", "flax"),
        ("equinox_mlp", "equinox", "equinox"),
        ("haiku_mlp", "haiku", "haiku"),
        ("torch_mlp", "torch", "torch"),
        ("mnist_torch", "torch", "torch"),
    ],
)
def test_without_its_library_an_example_says_how_to_get_it(example, library, extra, monkeypatch):
    name = f"headwater.examples.{example}"
    for loaded in (name, "headwater.worker.torch_worker"):
        monkeypatch.delitem(sys.modules, loaded, raising=False)
    monkeypatch.setitem(sys.modules, library, None)

    with pytest.raises(UsageError, match=rf"pip install 'headwater\[{extra}\]'$"):
        load_task(name)


def test_a_flax_nnx_model_has_its_own_names_and_gradients():
    from flax import nnx

    from headwater.examples import resnet_nnx

    task = resnet_nnx.task(width=4, depth=1)
    names = set(task.tree.names)
    model = nnx.eval_shape(lambda: resnet_nnx.ResNet(4, 1, rngs=nnx.Rngs(0)))
    own_names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert names == own_names
    assert {"blocks/0/conv1/kernel", "blocks/0/norm1/mean", "output/bias"} <= names

    def own_loss(params, stats, batch, key):
        model = nnx.eval_shape(lambda: resnet_nnx.ResNet(4, 1, rngs=nnx.Rngs(0)))
        nnx.update(model, params, stats)
        return cross_entropy(model(batch["image"], key), batch["label"])

    assert_same(gradients(task, own_loss))


@pytest.mark.slow
def test_a_flax_nnx_model_trains_in_processes_and_is_given_back(tmp_path):
    from flax import nnx

    from headwater.examples import resnet_nnx
    from headwater.examples.mnist import load

    ended = run(
        *("run", "--task", "headwater.examples.resnet_nnx", "--workers", "2"),
        *(*FREE_PORT, "--run-dir", tmp_path / "run"),
        cwd=tmp_path, timeout_s=100,
    )  # fmt: skip
    assert ended.status == 0, ended.errors
    weights = load_file(tmp_path / "run/weights.safetensors")

    task = resnet_nnx.task()
    params, stats = task.restore(weights)
    model = resnet_nnx.ResNet(16, rngs=nnx.Rngs(0))
    nnx.update(model, params, stats)
    model.eval()
    test = load("sample")[1]
    accuracy = jnp.mean(model(test["image"]).argmax(-1) == test["label"])

    assert accuracy > 0.9
    assert accuracy == pytest.approx(float(task.evaluate(params, stats)["accuracy"]), abs=0.002)


def test_an_equinox_model_has_its_own_names_and_gradients():
    import equinox as eqx

    from headwater.examples import equinox_mlp

    task = equinox_mlp.task(width=16)
    names = ["hidden/0/weight", "hidden/1/weight", "hidden/1/bias", "norm/weight", "norm/bias"]
    assert task.tree.names == [*names, "output/weight", "output/bias"]
    whole = equinox_mlp.Net(16, key=jax.random.key(1))

    def own_loss(params, batch, key):
        model = eqx.combine(params, whole)
        keys = jax.random.split(key, len(batch["label"]))
        return cross_entropy(jax.vmap(model)(batch["image"], keys), batch["label"])

    assert_same(gradients(task, own_loss))


def test_an_equinox_model_trains_and_is_given_back():
    import equinox as eqx

    from headwater import fit
    from headwater.examples import equinox_mlp
    from headwater.examples.mnist import load

    task = equinox_mlp.task(epochs=2, every=2)
    params = task.restore(fit(task, workers=0).weights)
    whole = equinox_mlp.Net(128, key=jax.random.key(1))
    model = eqx.nn.inference_mode(eqx.combine(params, whole))
    test = load("sample")[1]
    accuracy = jnp.mean(jax.vmap(model)(test["image"]).argmax(-1) == test["label"])

    assert accuracy > 0.8
    assert accuracy == pytest.approx(float(task.evaluate(params)["accuracy"]), abs=0.002)


def test_a_flax_linen_model_has_its_own_names_and_gradients(tmp_path):
    from flax import traverse_util

    from headwater.examples import transformer_linen

    book = tmp_path / "book.txt"
    book.write_text("how much wood would a woodchuck chuck?\n" * 200)
    task = transformer_linen.task(str(book), width=16, layers=1, heads=2)
    model = transformer_linen.Transformer(16, 1, 2)
    own = model.init(jax.random.key(0), jnp.zeros((1, 64), jnp.int32))["params"]
    assert set(task.tree.names) == set(traverse_util.flatten_dict(own, sep="/"))
    assert "layer_0/attention/query/kernel" in task.tree.names
    decayed = transformer_linen.kernels(own)
    assert decayed["layer_0"]["up"] == {"kernel": True, "bias": False}

    def own_loss(params, windows, key):
        return cross_entropy(model.apply({"params": params}, windows[:, :-1]), windows[:, 1:])

    assert_same(gradients(task, own_loss))


def test_a_haiku_model_has_its_own_names_and_gradients_and_is_given_back():
    import haiku as hk

    from headwater import fit
    from headwater.examples import haiku_mlp
    from headwater.examples.mnist import load

    task = haiku_mlp.task(epochs=2, every=2)
    model = hk.transform_with_state(haiku_mlp.network)
    own = model.init(jax.random.key(0), jnp.zeros((1, 784)), 128, is_training=True)
    assert set(task.tree.names) == {
        f"{module}/{name}" for tree in own for module, name, _ in hk.data_structures.traverse(tree)
    }
    assert {"linear/w", "batch_norm/~/mean_ema/average"} <= set(task.tree.names)

    def own_loss(params, state, batch, key):
        logits, _ = model.apply(params, state, key, batch["image"], 128, is_training=True)
        return cross_entropy(logits, batch["label"])

    assert_same(gradients(task, own_loss))

    params, state = task.restore(fit(task, workers=0).weights)
    test = load("sample")[1]
    logits, _ = model.apply(params, state, None, test["image"], 128, is_training=False)
    accuracy = jnp.mean(logits.argmax(-1) == test["label"])
    assert accuracy > 0.8
    assert accuracy == pytest.approx(float(task.evaluate(params, state)["accuracy"]), abs=0.002)

"""Gradients by PyTorch: those of JAX, for any dtype and layout, the same wherever a batch goes."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

from headwater import ArrayData, Generated, Task, fit
from headwater.examples import mnist, mnist_torch, torch_mlp
from headwater.server.check import check_task
from headwater.worker.data import from_items
from headwater.worker.load import LoadedTask, UsageError, load_task
from headwater.worker.local_steps import LocalSteps, gradient_function, gradient_of_one
from headwater.worker.mapping import MappingError
from headwater.worker.task import TaskError
from headwater.worker.torch_worker import load_weights, torch_task

X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
DATA = ArrayData(x=X)
BATCH = {"x": X[:8]}
SEED = 7

torch.set_num_threads(1)  # threads that share cores with other tests wait for one another


def task(model, loss, **fields):
    given = {"data": DATA, "optimizer": "sgd(0.1)", "batch_size": 8, **fields}
    return torch_task(model=model, loss=loss, **given)


def weights(task, seed=0):
    """As a worker has them: views of one buffer that is not to be written."""
    buffer = task.tree.layout.empty()
    task.tree.layout.pack(
        map(np.asarray, task.tree.leaves(task.init(jax.random.key(seed)))), buffer
    )
    buffer.flags.writeable = False
    return list(task.tree.layout.views(buffer).values())


def pushed(task, batch=BATCH, epoch=0, number=0, given=None):
    """What a worker of its own pushes, by name; and the loss."""
    function = gradient_of_one(task, SEED)
    found = function(weights(task) if given is None else given, [(batch, epoch, number)])
    assert [leaf.shape for leaf in found.leaves] == [
        t.shape for t in task.tree.layout.moving.tensors
    ]
    assert [leaf.dtype for leaf in found.leaves] == [
        t.dtype for t in task.tree.layout.moving.tensors
    ]
    return dict(zip(task.tree.names, found.leaves, strict=False)), found


def mean_output(net, batch):
    return net(batch["x"]).mean()


# ------------------------------------------------------------------------- the same as JAX


def test_the_gradient_is_jaxs_on_the_same_weights_and_batch() -> None:
    theirs, ours = mnist.task(), mnist_torch.task()
    given = weights(theirs)
    batch = theirs.dataset.batch(np.arange(32), np.random.default_rng(0))

    want = gradient_of_one(theirs, SEED)(given, [(batch, 1, 3)])
    named, got = pushed(ours, batch, 1, 3, given)

    assert ours.tree.layout.fingerprint == theirs.tree.layout.fingerprint
    assert got.loss == pytest.approx(want.loss, rel=1e-6)
    assert got.metrics["accuracy"] == pytest.approx(want.metrics["accuracy"])
    for leaf, (name, mine) in zip(want.leaves, named.items(), strict=True):
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(mine, leaf, rtol=0, atol=2e-6 * scale, err_msg=name)


def test_without_the_task_in_jax_the_mapping_alone_gives_its_layout() -> None:
    mapping = {name: mnist_torch.MAPPING[name] for name in sorted(mnist_torch.MAPPING)}
    ours = task(mnist_torch.Net, mnist_torch.loss, mapping=mapping)

    params, _ = ours.init(jax.random.key(0))

    assert ours.tree.layout.fingerprint == mnist.task().tree.layout.fingerprint
    assert params["hidden/kernel"].shape == (784, 64)
    assert ours.restore(dict(zip(ours.tree.names, weights(ours), strict=True)))[0].keys() == set(
        ours.tree.names
    )


def test_a_convolutions_axes_are_mapped() -> None:
    image = np.random.default_rng(0).normal(size=(4, 9, 9, 2)).astype(np.float32)

    def loss(params, batch, key):
        y = jax.lax.conv_general_dilated(
            batch["x"],
            params["kernel"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.sin(y).mean()

    theirs = Task(
        init=lambda key: {"kernel": jax.random.normal(key, (3, 2, 2, 5))},
        loss=loss, data=ArrayData(x=image), optimizer="sgd(1.0)", batch_size=4,
    )  # fmt: skip
    ours = torch_task(
        like=theirs,
        model=lambda: nn.Conv2d(2, 5, (3, 2), bias=False),
        loss=lambda net, batch: torch.sin(net(batch["x"].permute(0, 3, 1, 2))).mean(),
        mapping={"kernel": ("weight", (2, 3, 1, 0))},
    )

    want = gradient_of_one(theirs, SEED)(weights(theirs), [({"x": image}, 0, 0)])
    named, got = pushed(ours, {"x": image}, given=weights(theirs))

    assert got.loss == pytest.approx(want.loss, rel=1e-5)
    np.testing.assert_allclose(named["kernel"], want.leaves[0], rtol=1e-4, atol=1e-7)


def test_a_complex_parameters_gradient_is_what_optax_descends_along() -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j, 0.5j]))

    theirs = Task(
        init=lambda key: {"w": jnp.array([1 + 2j, 3 - 1j, 0.5j])},
        loss=lambda params, batch, key: (jnp.abs(params["w"] * batch["x"] - 1j) ** 2).mean(),
        data=DATA, optimizer="sgd(0.1)", batch_size=8,
    )  # fmt: skip
    ours = task(Net, lambda net, batch: ((net.w * batch["x"] - 1j).abs() ** 2).mean())

    want = gradient_of_one(theirs, SEED)(weights(theirs), [(BATCH, 0, 0)])
    named, _ = pushed(ours)

    assert weights(ours)[0].tolist() == weights(theirs)[0].tolist()
    np.testing.assert_allclose(named["w"], want.leaves[0], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_short_floats_cross_as_they_are(dtype) -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5, -2.0, 3.0]).to(getattr(torch, dtype)))
            self.b = nn.Parameter(torch.tensor(1.0, dtype=torch.bfloat16))

    mine = task(Net, lambda net, batch: (net.w.float() * batch["x"]).sum() + net.b.float())

    named, _ = pushed(mine)

    assert [t.dtype.name for t in mine.tree.layout.tensors] == [dtype, "bfloat16"]
    assert np.asarray(weights(mine)[0], np.float32).tolist() == [0.5, -2, 3]
    want = torch.from_numpy(BATCH["x"].sum(0)).to(getattr(torch, dtype)).float()
    assert named["w"].astype(np.float32).tolist() == want.tolist()
    assert float(named["b"]) == 1


def test_double_precision_needs_x64_and_says_so() -> None:
    mine = task(
        lambda: nn.Linear(3, 1).double(), lambda net, batch: net(batch["x"].double()).mean()
    )

    with pytest.raises(TaskError, match=r"weight is float64, which JAX.*JAX_ENABLE_X64=1"):
        mine.tree  # noqa: B018
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        mine = task(
            lambda: nn.Linear(3, 1).double(), lambda net, batch: net(batch["x"].double()).mean()
        )
        named, _ = pushed(mine)
        np.testing.assert_allclose(named["weight"][0], X[:8].astype(np.float64).mean(0), rtol=1e-15)


def test_batches_of_any_pytree_and_dtype_and_of_tensors_are_taken() -> None:
    halves = jnp.asarray(X[:8], jnp.bfloat16)
    still = X[:8].copy()
    still.flags.writeable = False
    seen = []

    def loss(net, batch):
        seen.append(batch)
        return net.weight.sum()

    mine = task(lambda: nn.Linear(3, 1, bias=False), loss)
    pushed(mine, ({"h": np.asarray(halves)}, [still, torch.ones(8)], np.uint8([1, 2])))

    named, [x, ones], n = seen[-1]
    h = named["h"]
    assert (h.dtype, x.dtype, ones.dtype, n.dtype) == (
        torch.bfloat16, torch.float32, torch.float32, torch.uint8,
    )  # fmt: skip
    assert torch.equal(h, torch.from_numpy(X[:8]).bfloat16())


# --------------------------------------------------------------------------------- state


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("local", torch.ones(3), persistent=False)

    def forward(self, x):
        self.seen = self.seen + len(x)  # assigned, not changed in place
        return self.dropout(self.norm(x) ** 3) * self.local


def test_buffers_are_state_and_counters_are_integers() -> None:
    mine = task(Normed, mean_output)
    plain = Normed()
    plain.train()(torch.from_numpy(BATCH["x"]))

    named, _ = pushed(mine)

    assert {t.name: t.describe() for t in mine.tree.layout.tensors} == {
        "norm.weight": "float32[3]",
        "norm.bias": "float32[3]",
        "seen": "int32[] state",
        "norm.running_mean": "float32[3] state",
        "norm.running_var": "float32[3] state",
        "norm.num_batches_tracked": "int32[] state",
    }
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "seen"):
        np.testing.assert_allclose(named[name], plain.state_dict()[name].numpy(), rtol=1e-6)
    assert (named["seen"], named["norm.num_batches_tracked"]) == (8, 1)


def test_a_push_depends_on_its_weights_and_batch_alone() -> None:
    """Whatever the module computed before, itself or at other weights."""
    mine = task(Normed, mean_output)
    function = gradient_of_one(mine, SEED)
    function.compile(BATCH)
    first = function(weights(mine), [(BATCH, 2, 5)])
    kept = [leaf.copy() for leaf in first.leaves]
    function([np.asarray(w + 1) for w in weights(mine)], [({"x": X[8:]}, 2, 6)])
    for before, copy in zip(first.leaves, kept, strict=True):
        assert before.tolist() == copy.tolist()  # it may still be on its way

    again = function(weights(mine), [(BATCH, 2, 5)])
    other, _ = pushed(mine, BATCH, 2, 5)
    changed, _ = pushed(mine, BATCH, 2, 6)

    for a, b, c in zip(kept, again.leaves, other.values(), strict=True):
        assert a.tolist() == b.tolist() == c.tolist()
    assert changed["norm.weight"].tolist() != other["norm.weight"].tolist()  # another dropout
    assert changed["norm.running_mean"].tolist() == other["norm.running_mean"].tolist()


def test_frozen_parameters_and_boolean_buffers_are_constants() -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(3, 3)
            self.frozen.requires_grad_(False)
            self.head = nn.Linear(3, 1)
            self.register_buffer("mask", torch.tensor([True, False, True]))

        def forward(self, x):
            return self.head(torch.where(self.mask, self.frozen(x), 0))

    mine = task(Net, mean_output)
    roles = {t.name: t.describe() for t in mine.tree.layout.tensors}
    named, _ = pushed(mine)

    assert roles["frozen.weight"] == "float32[3,3] constant"
    assert roles["mask"] == "bool[3] constant"
    assert set(named) == {"head.weight", "head.bias"}
    assert named["head.weight"][0, 1] == 0 != named["head.weight"][0, 0]
    report = check_task(LoadedTask(mine, "mine", {}, ""))  # through the server's update as well
    assert report.parameters == 4


def test_constants_are_written_into_the_module_when_they_are_new() -> None:
    mine = task(
        lambda: nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 1)), mean_output
    )
    function = gradient_of_one(mine, SEED)
    given = [np.array(leaf) for leaf in weights(mine)]

    first = function(given, [(BATCH, 0, 0)]).loss
    same = function(given, [(BATCH, 0, 0)]).loss
    doubled = function([*given[:2], given[2] * 2, given[3]], [(BATCH, 0, 0)]).loss

    assert first == same != doubled


# ---------------------------------------------------------------------- from the user's side


def test_a_run_begins_with_the_weights_of_plain_torch_for_the_same_seed() -> None:
    mine = task(lambda: nn.Linear(3, 2), mean_output)
    torch.manual_seed(41)
    plain = nn.Linear(3, 2)
    before = torch.random.get_rng_state()

    params, state = mine.init(jax.random.key(41))

    assert params["weight"].tolist() == plain.weight.tolist()
    assert state == {}
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's are left alone


def test_tied_parameters_have_the_first_name() -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 3, bias=False)
            self.output = nn.Linear(3, 3, bias=False)
            self.output.weight = self.embed.weight

        def forward(self, x):
            return self.output(torch.sin(self.embed(x)))

    mine = task(Net, mean_output)
    net = Net()
    load_weights(net, {"embed.weight": weights(mine)[0]})
    net(torch.from_numpy(BATCH["x"])).mean().backward()

    named, _ = pushed(mine)

    assert list(named) == ["embed.weight"]
    np.testing.assert_allclose(named["embed.weight"], net.embed.weight.grad, rtol=1e-5)
    with pytest.raises(MappingError, match=r"is embed.weight by another name"):
        task(Net, mean_output, mapping={"w": "output.weight"}).backend.places  # noqa: B018


def test_a_parameter_that_the_loss_does_not_use_has_a_gradient_of_zero() -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))

    named, _ = pushed(task(Net, lambda net, batch: (net.used * batch["x"]).sum()))
    still, found = pushed(task(Net, lambda net, batch: batch["x"].mean()))

    assert named["unused"].tolist() == [0, 0]
    assert named["used"].any()
    assert not still["used"].any()
    assert found.loss == pytest.approx(X[:8].mean())


def test_sparse_gradients_are_made_dense() -> None:
    mine = task(
        lambda: nn.Embedding(5, 2, sparse=True),
        lambda net, batch: net(batch["i"]).sum(),
        data=ArrayData(i=np.arange(8)),
    )
    named, _ = pushed(mine, {"i": np.array([1, 1, 3])})

    assert named["weight"].tolist() == [[0, 0], [2, 2], [0, 0], [1, 1], [0, 0]]


def test_torchs_own_datasets_and_collate_are_data() -> None:
    items = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.arange(16))
    data = from_items(items, collate=torch.utils.data.default_collate)
    mine = task(lambda: nn.Linear(3, 1), lambda net, batch: net(batch[0]).mean(), data=data)

    report = check_task(LoadedTask(mine, "mine", {}, ""))

    assert list(report.batch.values()) == ["float32[8, 3]", "int64[8]"]


def test_a_task_of_a_closure_trains_here_and_its_weights_go_back_into_a_module(tmp_path) -> None:
    width = 4

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))

    def loss(net, batch):
        return ((net(batch["x"])[:, 0] - batch["x"].sum(1)) ** 2).mean()

    def evaluate(net):
        assert not net.training
        assert not torch.is_grad_enabled()
        return {"error": loss(net, {"x": torch.from_numpy(X)})}

    mine = task(Net, loss, evaluate=evaluate, optimizer=optax.adam(0.03), epochs=100)
    result = fit(mine, workers=0, run_dir=tmp_path / "run", quiet=True)

    net = Net()
    load_weights(net, result.weights)
    assert result.metrics["error"] < 0.1
    with torch.no_grad():
        assert float(evaluate(net.eval())["error"]) == pytest.approx(result.metrics["error"])


def test_weights_of_another_model_are_refused_by_a_module() -> None:
    with pytest.raises(UsageError, match=r"missing \['bias'\], unknown \['b'\]"):
        load_weights(nn.Linear(3, 1), {"weight": np.zeros((1, 3)), "b": np.zeros(1)})
    with pytest.raises(UsageError, match=r"weight has shape \[3\], the module's is \[1, 3\]"):
        load_weights(nn.Linear(3, 1, bias=False), {"weight": np.zeros(3, np.float32)})


def test_local_steps_walk_with_torchs_gradients() -> None:
    """As with a JAX task of the same loss; the model's state goes along."""
    theirs, ours = mnist.task(), mnist_torch.task()
    given = weights(theirs)
    data = theirs.dataset
    steps = [(data.batch(np.arange(n * 32, n * 32 + 32), None), 0, n) for n in range(3)]

    def walked(task):
        function = gradient_function(
            task, SEED, steps=3, inner_optimizer="adam(1e-3)", epochs=1, batches_per_epoch=3
        )
        assert isinstance(function, LocalSteps)
        return function(given, steps)

    want, got = walked(theirs), walked(ours)

    assert got.loss == pytest.approx(want.loss, rel=1e-4)
    for a, b in zip(got.leaves, want.leaves, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # where Adam divides by next to nothing
        assert np.abs(np.asarray(a) - b).mean() < 1e-6

    normed = task(Normed, mean_output)
    function = gradient_function(
        normed, SEED, steps=2, inner_optimizer="sgd(0.1)", epochs=1, batches_per_epoch=2
    )
    found = function(weights(normed), [(BATCH, 0, 0), ({"x": X[8:]}, 0, 1)])
    counted = dict(zip(normed.tree.names, found.leaves, strict=True))
    assert (int(counted["seen"]), int(counted["norm.num_batches_tracked"])) == (16, 2)


def test_the_example_learns_and_counts_its_batches(tmp_path) -> None:
    mine = torch_mlp.task(epochs=1, every=4)

    result = fit(mine, workers=0, run_dir=tmp_path / "run", quiet=True)

    assert result.metrics["accuracy"] > 0.75
    assert int(result.weights["norm.num_batches_tracked"]) == result.weights.version == 32


# ------------------------------------------------------------------------------- mistakes

LINEAR = lambda: nn.Linear(3, 1)  # noqa: E731


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (
            lambda net, batch: net(batch["x"]),
            r"returned float32\[8, 1\]; it must be a tensor of one",
        ),
        (lambda net, batch: mean_output(net, batch).item(), "returned float; it must be a tensor"),
        (lambda net, batch: net(batch["x"]).sum().long(), r"returned int64\[\]; it must be"),
        (lambda net, batch: (mean_output(net, batch), 3), "returned int beside the number"),
        (
            lambda net, batch: (mean_output(net, batch), {"a": batch["x"]}),
            r"metric 'a' is float32\[8, 3\], not a scalar",
        ),
    ],
)
def test_what_a_loss_may_not_return_is_named(loss, told) -> None:
    with pytest.raises(TaskError, match=told):
        gradient_of_one(task(LINEAR, loss), SEED).compile(BATCH)


class Changing(nn.Module):
    """Does to its buffers or parameters what `change` says."""

    def __init__(self, change):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("count", torch.zeros(2))
        self.change = change

    def forward(self, x):
        self.change(self)
        return self.w * x


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda net: net.mask.fill_(True), "changed mask, which cannot be merged"),
        (lambda net: setattr(net, "mask", net.mask | True), "changed mask, which cannot be merged"),
        (
            lambda net: setattr(net, "count", torch.zeros(3)),
            r"left float32\[3\] in count, which is",
        ),
        (lambda net: setattr(net, "count", None), "left NoneType in count"),
        (
            lambda net: setattr(net, "w", nn.Parameter(torch.ones(3))),
            "another tensor in the place of the parameter w",
        ),
    ],
)
def test_a_loss_that_changes_what_it_may_not_is_found_before_the_first_ticket(change, told) -> None:
    with pytest.raises(TaskError, match=told):
        gradient_of_one(task(lambda: Changing(change), mean_output), SEED).compile(BATCH)


def test_a_counter_beyond_32_bits_needs_x64() -> None:
    def grow(net):
        net.n += 2**40

    class Net(nn.Linear):
        def __init__(self):
            super().__init__(3, 1)
            self.register_buffer("n", torch.tensor(0))

        def forward(self, x):
            grow(self)
            return super().forward(x)

    with pytest.raises(TaskError, match="n is int64 and holds numbers that int32 does not"):
        gradient_of_one(task(Net, mean_output), SEED).compile(BATCH)


def shared():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight.data = net[0].weight.data.T
    return net


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda: nn.LazyLinear(1), "weight has no shape yet; have `model` put a batch through"),
        (lambda: nn.Linear(3, 1, device="meta"), "weight is .* on meta"),
        (lambda: nn.Linear(3, 1).requires_grad_(False), "nothing in the model has requires_grad"),
        (nn.ReLU, "no tensor to train"),
        (lambda: 3, "model gave int, not a torch.nn.Module"),
        (shared, "1.weight and 0.weight share memory"),
    ],
)
def test_a_model_that_cannot_be_served_is_named(model, told) -> None:
    with pytest.raises(TaskError, match=told):
        task(model, mean_output).tree  # noqa: B018


def test_what_cannot_be_a_task_is_refused_where_it_is_written() -> None:
    for wrong, told in (
        ({"model": nn.Linear(3, 1)}, "model is a function that makes the module"),
        ({"optimizer": torch.optim.Adam}, r'by optax: write "adam\(1e-3\)", say, in place of Adam'),
        ({"has_state": True}, "has_state follows from the module"),
        ({"like": 3}, "like is a Task, not int"),
        ({"name": "a/b"}, "Task.name is for a folder"),
    ):
        given = {"model": LINEAR, "loss": mean_output, "data": DATA, "optimizer": "sgd(1.0)"}
        with pytest.raises(TaskError, match=told):
            torch_task(**{**given, **wrong})
    made = task(LINEAR, mean_output, data=Generated(lambda params, key: None))
    with pytest.raises(TaskError, match="Generated batches are made by JAX"):
        made.backend.check(made)
    later = task(LINEAR, mean_output, data=lambda: Generated(lambda params, key: None))
    with pytest.raises(TaskError, match="Generated batches are made by JAX"):
        gradient_of_one(later, SEED)


def test_a_platform_that_torch_cannot_have_is_refused() -> None:
    mine = task(LINEAR, mean_output)

    with pytest.raises(UsageError, match="--platform tpu: PyTorch computes on cpu or gpu"):
        mine.backend.use("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--platform gpu cannot be had here, PyTorch"):
            mine.backend.use("gpu")


# -------------------------------------------------------------------------------- the guide

GUIDE = Path(__file__).parents[2] / "docs/guide.md"


def snippets():
    section = GUIDE.read_text().split("\n## PyTorch\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_guides_tasks_can_be_trained(tmp_path) -> None:
    alone, beside = snippets()
    (tmp_path / "alone.py").write_text(alone)
    (tmp_path / "beside.py").write_text(beside)

    first = check_task(load_task(str(tmp_path / "alone.py")))
    second = check_task(load_task(str(tmp_path / "beside.py")))

    assert first.tensors["norm.num_batches_tracked"] == "int32[] state"
    assert first.evaluation.keys() == {"error"}
    assert second.task == "mnist"
    want = check_task(LoadedTask(mnist.task(), "mnist", {}, ""))
    assert second.tensors == want.tensors
    assert second.loss == pytest.approx(want.loss, rel=1e-5)
    assert second.evaluation == want.evaluation

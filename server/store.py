"""The weights, the optimizer's state, and the one way they move.

Each update publishes one immutable `Published`; replies, reads and what is kept
on disk come from such an object alone, so that a read never locks and is one
version by construction. Imports no grpc, reads no clock, starts no thread: the
same calls in, the same state out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headwater.protos.compression import NONE, Compression
from headwater.protos.layout import PARAMETER, Bytes, Layout
from headwater.server.combine import combine
from headwater.server.compiled_updates import CompiledUpdates, all_finite, extras, wide
from headwater.server.model_state import merged
from headwater.server.optimizer import AbstractOptimizer
from headwater.server.push_sessions import PushId, PushSessions
from headwater.server.ranges import Ranges
from headwater.server.settings import Settings
from headwater.worker.compression import Unpack
from headwater.worker.tree import ModelTree, PyTree

Leaves = Sequence[Any]
"""Arrays of the shapes and dtypes of what moves, the parameters and the state, in layout order."""


class NotFinite(ValueError):
    """A gradient or its loss holds NaN or infinity; names the first place. Nothing changed."""


class Diverged(ArithmeticError):
    """An update would have made weights that are not finite. Nothing changed."""


@dataclasses.dataclass(frozen=True)
class Published:
    """One version: its weights, which batches made it, and what holds. Never mutated."""

    incarnation: int
    version: int
    leaves: tuple[jax.Array, ...]
    """The parameters and the state, in layout order."""
    optimizer_state: PyTree
    applied: Ranges
    """Positions of the batches that are done with, those left out included."""
    left_out: Ranges
    settings: Settings = dataclasses.field(default_factory=Settings)
    constants: tuple[jax.Array, ...] = ()
    sessions: PushSessions = dataclasses.field(default_factory=PushSessions)
    """Which pushes without a batch are among the updates."""

    @property
    def tensors(self) -> tuple[jax.Array, ...]:
        """All of them, in layout order."""
        return *self.leaves, *self.constants


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """What is kept of a version while gradients are computed at it."""

    params: tuple[jax.Array, ...] | None = None
    """Where the staleness policy needs them."""
    state: tuple[jax.Array, ...] = ()


NOT_KEPT = Base()


def base_of(published: Published, layout: Layout) -> Base:
    """What has to be kept of a version."""
    count = layout.count(PARAMETER)
    compensates = published.settings.staleness.compensate is not None
    if not compensates and count == len(published.leaves):
        return NOT_KEPT
    params, state = published.leaves[:count], published.leaves[count:]
    return Base(params if compensates else None, state)


@dataclasses.dataclass(frozen=True, eq=False)
class Contribution:
    """One gradient of an update."""

    position: int
    """Of its batch; of no meaning where a session pushed it."""
    base: int
    """The version that it was computed at."""
    examples: int
    loss: float
    """Mean over them."""
    gradient: Bytes
    """The flat buffer, as it was pushed; uint8."""
    worker: str = ""
    """As the history names it."""
    kept: Base = NOT_KEPT
    """Of the version that it was computed at."""
    is_shared: bool = False
    """Whether its worker could still write it."""
    push: PushId | None = None
    """Where a session pushed it; then it is of the parameters alone, and the state stays."""

    @property
    def base_params(self) -> tuple[jax.Array, ...] | None:
        return self.kept.params


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """What one update is made of."""

    leaves: Leaves
    """The optimizer's gradient, and the next state."""
    loss: float
    positions: tuple[int, ...]
    staleness: int
    """Versions; 0 for a group."""
    flat: Bytes | None = None
    """The buffer that the leaves are views of, if they are."""
    push: PushId | None = None
    """The session's push that it consists of, in place of batches."""


def initial(
    tree: ModelTree,
    made: PyTree,
    optimizer: AbstractOptimizer,
    incarnation: int = 1,
    settings: Settings = Settings(),  # noqa: B008  (frozen)
) -> Published:
    """Version 0 of a run, from what `Task.init` gave."""
    tensors = [jnp.array(leaf) for leaf in tree.leaves(made)]  # a copy: they stay the user's
    params, state, constants = tree.split(tensors)
    optimizer_state = optimizer.init(tree.trained.restore(params))
    leaves = (*params, *state)
    return Published(
        incarnation, 0, leaves, optimizer_state, Ranges(), Ranges(), settings, tuple(constants)
    )


class Store:
    """The newest version, and `move`, which makes the next one.

    Args:
      tree: Of the model.
      optimizer: Moves its parameters.
      start: The version to go on from.

    Raises:
      NotFinite: Its weights are not finite.
    """

    def __init__(self, tree: ModelTree, optimizer: AbstractOptimizer, start: Published) -> None:
        self.tree = tree
        self._updates = CompiledUpdates(tree, optimizer)
        self.optimizer = optimizer
        self.current = start
        loss = np.zeros((), np.float32)
        # Compiled here, so that the first push does not wait for it.
        self._is_finite = jax.jit(_is_finite).lower(start.leaves, loss).compile()
        self._unpack = Unpack(tree.layout.moving, NONE)
        self._unpack_trained = Unpack(tree.layout.trained, NONE)
        self.prepare(start.settings)
        self._check(start.leaves, loss)

    @property
    def layout(self) -> Layout:
        return self.tree.layout

    def receive(self, compression: Compression) -> None:
        """Take gradients that are compressed like this from now on."""
        self._unpack = Unpack(self.layout.moving, compression)

    @property
    def reads_in_place(self) -> bool:
        """Whether what was pushed is used as it is, where it lies."""
        return self._unpack.is_view

    # ------------------------------------------------------------- changing

    def prepare(self, settings: Settings) -> bool:
        """Compile what updates under these settings need; whether there was anything.

        May be called from another thread than `move`.

        Raises:
          OptimizerError: A number cannot be set to that.
        """
        stages = _stages(settings)
        # Those in the state cost no compilation, but may not be what the state can hold.
        in_state = {n: v for s in stages for n, v in self.optimizer.in_state(s.numbers).items()}
        if in_state:
            self.optimizer.set_in_state(self.current.optimizer_state, in_state)
        return self._updates.prepare(stages)

    def set(self, settings: Settings) -> Published:
        """Have other settings hold from the next update on; the version stays."""
        self.current = self._with(self.current, settings)
        self._updates.forget_others(_stages(settings))
        return self.current

    def _with(self, before: Published, settings: Settings) -> Published:
        old = before.settings.numbers
        new = {n: v for n, v in settings.numbers.items() if n not in old or old[n] != v}
        state = before.optimizer_state
        if in_state := self.optimizer.in_state(new):
            state = self.optimizer.set_in_state(state, in_state)
        return dataclasses.replace(before, settings=settings, optimizer_state=state)

    # --------------------------------------------------------------- moving

    def apply(self, gradient: Bytes, loss: float, position: int) -> Published:
        """Move the weights by one fresh gradient; the version grows by one.

        Args:
          gradient: The flat buffer, as it was pushed. It may be used again when this returns.
          loss: Mean over the batch's examples.
          position: Of the batch, which counts as applied from this version on.

        Raises:
          NotFinite: The gradient or the loss is not finite.
        """
        fresh = Contribution(position, self.current.version, 1, loss, gradient)
        return self.move(self.step([fresh]))

    def check_pushed(self, gradient: Bytes, loss: float) -> None:
        """`check` of a gradient as it was pushed."""
        self._check(self._unpack(gradient), _loss_array(loss))

    def check(self, leaves: Leaves, loss: float) -> None:
        """Whether `move` will take a gradient, without moving; it looks itself.

        Args:
          leaves: The gradient, in layout order.
          loss: Mean over its examples.

        Raises:
          NotFinite: It will not.
        """
        self._check(leaves, _loss_array(loss))

    def step(self, contributions: Sequence[Contribution]) -> Step:
        """Put an update together from its gradients, in the order of their batches.

        Raises:
          NotNext: A session's push, which since it came has become one that may be a repeat.
        """
        before = self.current
        split = self.tree.split
        if contributions[0].push is not None:
            return self._session_step(contributions[0], contributions[0].push)
        pushed = [self._unpack(c.gradient) for c in contributions]
        leaves, loss = combine(
            [split(each)[0] for each in pushed],
            contributions,
            split(before.leaves)[0],
            before.settings.staleness,
        )
        staleness = max(before.version - c.base for c in contributions)
        state = merged(
            split(before.leaves)[1],
            [split(each)[1] for each in pushed],
            [c.examples for c in contributions],
            contributions[0].kept.state,
            staleness,
        )
        is_pushed = self.reads_in_place and all(
            mine is own for mine, own in zip([*leaves, *state], pushed[0], strict=True)
        )
        return Step(
            [*leaves, *state],
            loss,
            tuple(c.position for c in contributions),
            staleness,
            contributions[0].gradient if is_pushed else None,
        )

    def _session_step(self, contribution: Contribution, push: PushId) -> Step:
        """The state stays as it is: the program that pushed knows of no batch that made another."""
        before = self.current
        before.sessions.check(push)
        params, state, _ = self.tree.split(before.leaves)
        pushed = self._unpack_trained(contribution.gradient)
        leaves, loss = combine([pushed], [contribution], params, before.settings.staleness)
        is_pushed = not state and all(a is b for a, b in zip(leaves, pushed, strict=True))
        return Step(
            [*leaves, *state],
            loss,
            (),
            before.version - contribution.base,
            contribution.gradient if is_pushed else None,
            push,
        )

    def move(self, step: Step) -> Published:
        """Make the next version; its settings are those that are due by now.

        The step's arrays may be used again when this returns. They are looked at while
        they are used, so that what another process may write is taken as it was seen.

        Raises:
          NotFinite: The gradient or the loss is not finite.
          Diverged: The weights after it are not finite.
        """
        before = self.current
        settings = before.settings.at(before.version)
        if settings is not before.settings:
            before = self._with(before, settings)
        compiled, live, scale = self._updates.get(settings)
        loss = _loss_array(step.loss)
        trained, split = self.tree.trained, self.tree.split
        gradient, next_state, _ = split(step.leaves)
        params, _, _ = split(before.leaves)
        scales = extras(live, 1.0 / (1.0 + step.staleness) if scale else None)

        def update(gradient: Leaves, next_state: Leaves) -> Any:
            return compiled(
                trained.restore(gradient),
                before.optimizer_state,
                trained.restore(params),
                loss,
                next_state,
                *scales,
            )

        after, optimizer_state, model_state, is_finite = update(gradient, next_state)
        # XLA may read the gradient where it lies: it is ours until this is ready.
        jax.block_until_ready((after, optimizer_state, model_state))
        if not is_finite:
            raise self._reason(step.leaves, loss, update)
        applied = before.applied
        for position in step.positions:
            applied = applied.add(position)
        sessions = before.sessions
        if step.push is not None:
            sessions = sessions.add(step.push, before.version + 1, step.staleness)
        self.current = dataclasses.replace(
            before,
            sessions=sessions,
            version=before.version + 1,
            leaves=(*trained.leaves(after), *model_state),
            optimizer_state=optimizer_state,
            applied=applied,
        )
        return self.current

    def leave_out(self, position: int) -> Published:
        """Count a batch as done without an update; the version stays."""
        before = self.current
        self.current = dataclasses.replace(
            before,
            applied=before.applied.add(position),
            left_out=before.left_out.add(position),
        )
        return self.current

    # ------------------------------------------------------------ privately

    def _reason(
        self, leaves: Leaves, loss: np.ndarray, update: Callable[[Leaves, Leaves], Any]
    ) -> NotFinite | Diverged:
        """Why an update made weights that are not finite: by its gradient, or by itself."""
        own = [np.array(leaf) for leaf in leaves]  # which nobody writes any more
        try:
            self._check(own, loss)
        except NotFinite as error:
            return error
        gradient, state, _ = self.tree.split(own)
        params, _, _, is_finite = update(gradient, state)
        if is_finite:
            return NotFinite("it was written while it was used, and was not finite then")
        bad = self._not_finite(self.tree.trained.leaves(params))
        return Diverged(f"{bad} would not be finite any more; lower the learning rate")

    def _check(self, leaves: Leaves, loss: np.ndarray) -> None:
        if self._is_finite(tuple(leaves), loss):
            return
        if not np.isfinite(loss):
            raise NotFinite(f"the loss is {float(loss)}")
        raise NotFinite(self._not_finite(leaves))

    def _not_finite(self, leaves: Leaves) -> str:
        """Which numbers of the first tensor that has such."""
        counts = {
            spec.name: (
                int(np.count_nonzero(~np.asarray(jnp.isfinite(wide(leaf))))),
                np.size(leaf),
            )
            for spec, leaf in zip(self.layout.tensors, map(jnp.asarray, leaves), strict=False)
        }
        name, (count, size) = next((name, found) for name, found in counts.items() if found[0])
        return f"{count} of the {size} numbers in {name}"


def _stages(settings: Settings) -> list[Settings]:
    """These, and what they become by what is planned."""
    return [settings, *(settings.at(plan.after_version) for plan in settings.planned)]


def _loss_array(loss: float) -> np.ndarray:
    with np.errstate(over="ignore"):  # too large is infinite, and refused as such
        return np.asarray(loss, np.float32)


def _is_finite(leaves: tuple[jax.Array, ...], loss: jax.Array) -> jax.Array:
    return all_finite([loss, *leaves])

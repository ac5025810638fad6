"""Pipeline schedules: which stage works on which microbatch when, and the loops that carry it out in the manual region.

Stage s of P holds layers; activations go from one to the next by a single `ppermute` per tick. Two schedules:

* **gpipe**: forward over all microbatches; the backward pass is its transpose, by autodiff. With V ``repeats`` it is
  circular (interleaved): stage s holds V separate runs of layers, and a microbatch passes all stages V times. Groups
  of P microbatches pass all repeats before the next group starts, so that what the last stage sends is what the first
  needs in the next tick, and no buffer for waiting microbatches exists.
* **1f1b**: in one tick a stage runs forward on one microbatch and backward on an earlier one, so that it holds the
  inputs of at most 2P - 1 microbatches however many there are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from parallel.axes import BATCH_AXES, MESH_AXES, PIPELINE
from parallel.collectives import axis_index, psum, vary, zeros_like
from parallel.plan import Schedule

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Timetable:
    """The arithmetic of a schedule. Ticks count from 0; a tick of "1f1b" has a forward and a backward half."""

    schedule: Schedule
    stages: int
    microbatches: int
    repeats: int = 1

    @property
    def ticks(self) -> int:
        """Ticks of the loop."""
        if self.schedule == "1f1b":
            return self.microbatches + 2 * (self.stages - 1)
        return self.microbatches * self.repeats + self.stages - 1

    @property
    def bubble(self) -> float:
        """Share of the time, of forward and backward together, in which a stage has nothing to do.

        Of "1f1b" where idle stages branch around their work.
        """
        idle = self.stages - 1
        return idle / (self.microbatches * self.repeats + idle)

    def forward(self, tick: T, stage: T) -> tuple[T, T, T]:
        """``(microbatch, repeat, busy)`` of a stage in a tick; integers or integer arrays."""
        n: Any = tick - stage  # type: ignore[operator]
        busy = (n >= 0) & (n < self.microbatches * self.repeats)
        if self.repeats == 1:
            return n, n * 0, busy
        group, within = n // (self.stages * self.repeats), n % self.stages
        return group * self.stages + within, (n // self.stages) % self.repeats, busy

    def backward(self, tick: T, stage: T) -> tuple[T, T]:
        """``(microbatch, busy)`` of the backward half of a tick of "1f1b"."""
        n: Any = tick - (2 * (self.stages - 1) - stage)  # type: ignore[operator]
        return n, (n >= 0) & (n < self.microbatches)


def at(tree: Any, index: Any) -> Any:
    """Element ``index``, held inside the bounds, of the leading axis of every array."""
    return jax.tree.map(
        lambda a: lax.dynamic_index_in_dim(a, jnp.clip(index, 0, a.shape[0] - 1), 0, keepdims=False), tree
    )


def hand_on(x: jax.Array, step: int = 1) -> jax.Array:
    """To the next stage (the last hands to the first), or with ``step=-1`` to the one before."""
    stages = lax.axis_size(PIPELINE)
    if stages == 1:
        return x
    return lax.ppermute(x, PIPELINE, [(i, (i + step) % stages) for i in range(stages)])


def gpipe(
    stage: Callable[[Any, Any, jax.Array, Any], tuple[jax.Array, Any]],
    xs: jax.Array,
    repeats: int = 1,
    into: Any = None,
) -> tuple[jax.Array, Any]:
    """Pass microbatches through all stages.

    Args:
        stage: ``(repeat, microbatch, x, into) -> (y, into)``: this stage's layers of that repeat; shapes of x and y are
            equal.
        xs: [M, ...], what enters the first stage, the same on all stages.
        repeats: times that each microbatch passes every stage; above 1, M must be a multiple of the stages.
        into: what is handed from tick to tick on every stage by itself: where gradients go (`layers.stack.run`).

    Returns:
        [M, ...]: what left the last stage; zeros on the other stages. And ``into``.
    """
    stages, me = lax.axis_size(PIPELINE), axis_index(PIPELINE)
    table = Timetable("gpipe", stages, xs.shape[0], repeats)
    xs = vary(xs, MESH_AXES)

    def tick(carry: tuple[jax.Array, jax.Array, Any], t: jax.Array) -> tuple[tuple[jax.Array, jax.Array, Any], None]:
        arrived, left, into = carry
        microbatch, repeat, busy = table.forward(t, me)
        enters = (me == 0) & (repeat == 0)
        y, into = stage(repeat, microbatch, jnp.where(enters, at(xs, microbatch), arrived), into)
        done = (me == stages - 1) & (repeat == repeats - 1) & busy
        place = jnp.clip(microbatch, 0, xs.shape[0] - 1)
        left = lax.dynamic_update_index_in_dim(left, jnp.where(done, y, at(left, microbatch)), place, 0)
        return (hand_on(y), left, into), None

    (_, left, into), _ = lax.scan(tick, (jnp.zeros_like(xs[0]), jnp.zeros_like(xs), into), jnp.arange(table.ticks))
    return left, into


def in_turn(stage: Callable[[jax.Array], tuple[jax.Array, T]], x: jax.Array) -> tuple[jax.Array, T]:
    """Pass one batch through all stages, one after the other, without gradients or overlap (inference).

    Args:
        stage: ``x -> (y, output)``: this stage's layers.
        x: what enters the first stage, the same on all stages.

    Returns:
        What left the last stage, on all stages; and each stage's own output.
    """
    stages, me = lax.axis_size(PIPELINE), axis_index(PIPELINE)
    if stages == 1:
        return stage(x)
    x, kept = stage(vary(x, (PIPELINE,)))  # of this first round only the first stage's result is of use
    for turn in range(1, stages):
        x, output = stage(hand_on(x))
        kept = jax.tree.map(lambda new, old, turn=turn: jnp.where(me == turn, new, old), output, kept)
    return psum(jnp.where(me == stages - 1, x, 0), PIPELINE), kept


def one_forward_one_backward(
    enter: Callable[[Any, Any], jax.Array],
    stage: Callable[[Any, Any, jax.Array, Any], tuple[jax.Array, Any]],
    leave: Callable[[Any, Any, jax.Array], jax.Array],
    weights: Any,
    microbatches: int,
    skip_idle: bool,
) -> tuple[jax.Array, Any]:
    """Loss and gradients of all microbatches, with memory that does not grow with their number.

    The backward half runs a stage's forward pass again from its input, so that only inputs are kept.

    Args:
        enter: ``(weights, microbatch) -> x``: what enters the first stage.
        stage: ``(weights, microbatch, x, into) -> (y, into)``: this stage's layers; shapes of x and y are equal, and
            ``into`` is where the gradients of ``weights.layers`` go (`layers.stack.run`), or None.
        leave: ``(weights, microbatch, y) -> loss``: float32 scalar, of what leaves the last stage, equal over tensor.
        weights: what the three take, a module with ``layers``; gradients are taken with respect to it.
        microbatches: how many.
        skip_idle: branch around what a stage has not to do; else it is computed and thrown away.

    Returns:
        This device's sum of the losses (nothing but 0 on all stages before the last), and float32 gradients.
    """
    stages, me = lax.axis_size(PIPELINE), axis_index(PIPELINE)
    table = Timetable("1f1b", stages, microbatches)
    is_first, is_last = me == 0, me == stages - 1
    slots = 2 * stages - 1

    def either(condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
        if skip_idle:
            return lax.cond(condition, yes, no)
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes(), no())

    def entered(weights: Any, microbatch: Any, x: jax.Array) -> jax.Array:
        return either(is_first, lambda: vary(enter(weights, microbatch)), lambda: x)

    def forward(microbatch: Any, x: jax.Array) -> jax.Array:
        return vary(stage(weights, microbatch, entered(weights, microbatch, x), None)[0])

    def whole(ends: Any, x: jax.Array, into: Any, microbatch: Any) -> tuple[jax.Array, jax.Array, Any]:
        y, into = stage(weights, microbatch, entered(ends, microbatch, x), into)
        y = vary(y)
        return y, either(is_last, lambda: vary(leave(ends, microbatch, y), loss_axes), lambda: no_loss), into

    like = jax.eval_shape(enter, weights, 0)
    nothing = vary(jnp.zeros(like.shape, like.dtype))
    loss_axes = (PIPELINE, *BATCH_AXES)
    no_loss = vary(jnp.float32(0), loss_axes)
    zeros = jax.tree.map(lambda w: zeros_like(w.shape, w), weights)

    def tick(carry: Any, t: jax.Array) -> tuple[Any, None]:
        arrived, returned, kept, gradients, loss = carry
        microbatch, _, busy = table.forward(t, me)
        kept = lax.dynamic_update_index_in_dim(kept, arrived, jnp.mod(microbatch, slots), 0)
        # The last stage runs a microbatch forward in its backward half, which comes in the same tick.
        y = either(busy & ~is_last, lambda: forward(microbatch, arrived), lambda: nothing)

        earlier, due = table.backward(t, me)
        x = lax.dynamic_index_in_dim(kept, jnp.mod(earlier, slots), 0, keepdims=False)

        def backward() -> Any:
            (out, part, _), pull_back = jax.vjp(
                lambda ends, x, into: whole(ends, x, into, earlier), weights, x, zeros.layers
            )
            of_y = jnp.where(is_last | ~due, 0, returned).astype(out.dtype)
            of_loss = vary(jnp.where(is_last & due, 1.0, 0.0), loss_axes)
            of_ends, of_x, layers = pull_back((of_y, of_loss, gradients.layers))
            total = jax.tree.map(lambda g, new: g + new.astype(jnp.float32), gradients, of_ends)
            total.layers = layers
            return total, of_x, jnp.where(is_last & due, part, 0.0)

        gradients, of_x, part = (
            either(due, backward, lambda: (gradients, nothing, no_loss)) if skip_idle else backward()
        )
        return (hand_on(y), hand_on(of_x, -1), kept, gradients, loss + part), None

    kept = vary(jnp.zeros((slots, *nothing.shape), nothing.dtype))
    begin = (nothing, nothing, kept, zeros, no_loss)
    (_, _, _, gradients, loss), _ = lax.scan(tick, begin, jnp.arange(table.ticks))
    return loss, gradients

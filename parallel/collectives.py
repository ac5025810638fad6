"""The collectives of the manual region: the only communication in a step, so that it can be read and counted.

All of them are no-ops on a mesh axis of size 1 (libtpu 0.0.42 aborts on a reduce-scatter over one, and keeps an
all-reduce as a real operation). Call them only inside `jax.shard_map` over all of MESH_AXES with ``check_vma=True``.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from parallel.axes import MESH_AXES, PIPELINE


def live(axes: Sequence[str]) -> tuple[str, ...]:
    """Those of ``axes`` that have more than one device."""
    return tuple(a for a in axes if lax.axis_size(a) > 1)


def vary(x: jax.Array, axes: Sequence[str] = MESH_AXES) -> jax.Array:
    """Mark ``x`` as different on each device along ``axes``.

    The transpose is a psum of the cotangent. Doing it once, before a loop, keeps that psum out of the loop. Axis by
    axis, for the same reason as in `psum`.
    """
    for axis in live(axes):
        if axis not in jax.typeof(x).mat.varying:
            x = lax.pcast(x, axis, to="varying")
    return x


def zeros_like(shape: Sequence[int], like: jax.Array) -> jax.Array:
    """float32 zeros of a shape that vary over the same mesh axes as ``like``."""
    return vary(jnp.zeros(shape, jnp.float32), tuple(jax.typeof(like).mat.varying))


def psum(x: jax.Array, axes: str | Sequence[str]) -> jax.Array:
    """Sum over mesh axes; the result is the same on all their devices.

    Axis by axis: a sum of two does not depend on the order in which a transport adds, so that on axes of two devices
    any number of processes gives the same bits.
    """
    axes = live((axes,) if isinstance(axes, str) else axes)
    x = vary(x, axes)
    for axis in reversed(axes):
        x = lax.psum(x, axis)
    return x


def pmax(x: jax.Array, axis: str) -> jax.Array:
    """Maximum over a mesh axis."""
    return lax.pmax(x, axis) if lax.axis_size(axis) > 1 else x


def all_gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Concatenate the shards of ``x`` along ``dim`` over a mesh axis."""
    return lax.all_gather(x, axis, axis=dim, tiled=True) if lax.axis_size(axis) > 1 else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def all_gather_as(x: jax.Array, axis: str, dim: int, dtype: jnp.dtype) -> jax.Array:
    """`all_gather` of a float32 array, whose values travel in ``dtype`` and whose gradient is summed in float32."""
    return x if lax.axis_size(axis) == 1 else all_gather(x.astype(dtype), axis, dim).astype(jnp.float32)


def _all_gather_as_forward(x: jax.Array, axis: str, dim: int, dtype: jnp.dtype) -> tuple[jax.Array, None]:
    return all_gather_as(x, axis, dim, dtype), None


def _all_gather_as_backward(axis: str, dim: int, dtype: jnp.dtype, _: None, ct: jax.Array) -> tuple[jax.Array]:
    return (psum_scatter(ct, axis, dim),)


all_gather_as.defvjp(_all_gather_as_forward, _all_gather_as_backward)


def psum_scatter(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Sum over a mesh axis, each device keeping its slice along ``dim``.

    The dimensions after an inner one are made one: of [8, 4096, 8, 128] along 1, libtpu 0.0.42 makes an all-reduce and
    a slice, which moves twice as much.
    """
    if lax.axis_size(axis) == 1:
        return x
    flat = x.reshape(*x.shape[: dim + 1], -1) if 0 < dim < x.ndim - 1 else x
    part = lax.psum_scatter(flat, axis, scatter_dimension=dim, tiled=True)
    return part.reshape(*part.shape[: dim + 1], *x.shape[dim + 1 :])


def axis_index(axis: str) -> jax.Array | int:
    """Index of this device along a mesh axis; a plain 0 on an axis of size 1, which must not appear in types."""
    return lax.axis_index(axis) if lax.axis_size(axis) > 1 else 0


class Gather(NamedTuple):
    """A move of a weight: make dimension ``dim`` whole over a mesh axis."""

    axis: str
    dim: int


class Exchange(NamedTuple):
    """A move of a weight that is split along ``dim`` over a mesh axis: split it along ``onto`` instead."""

    axis: str
    dim: int
    onto: int


@jax.custom_vjp
def with_float32_gradient(x: jax.Array, stand_in: jax.Array) -> jax.Array:
    """``x``, whose gradient goes to ``stand_in`` instead: a float32 array of its shape that is otherwise not looked at.

    A gradient has the dtype of what it belongs to, so that a loop over microbatches would sum those of a bfloat16
    weight in bfloat16. Differentiated by the stand-in (zeros, which need never exist), they are summed in float32. Used
    inside the loop, that is: outside of it, the loop has summed already.
    """
    return x


def _with_float32_gradient_forward(x: jax.Array, stand_in: jax.Array) -> tuple[jax.Array, None]:
    return x, None


def _with_float32_gradient_backward(_: None, ct: jax.Array) -> tuple[None, jax.Array]:
    return None, ct.astype(jnp.float32)


with_float32_gradient.defvjp(_with_float32_gradient_forward, _with_float32_gradient_backward)


@jax.custom_vjp
def with_gradient_added(x: jax.Array, total: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x``, part ``index`` of the leading axes of something, whose gradient is added to that part of ``total``.

    ``total`` is float32 and goes through a loop unchanged, beside what the loop is about; its values are not looked at.
    Its cotangent comes back through the loop the other way and takes up the gradient of each turn in place: begun with
    what earlier loops have summed (the cotangent of the last ``total``), it ends as the sum, and a second set of
    gradients never exists.

    Args:
        x: this turn's part, in any dtype.
        total: float32, [*leading, *x.shape].
        index: int32 [n]: which part, along the n leading axes.
    """
    return x, total


def _with_gradient_added_forward(x: jax.Array, total: jax.Array, index: jax.Array) -> tuple[Any, jax.Array]:
    return (x, total), index


def _with_gradient_added_backward(index: jax.Array, ct: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array, None]:
    of_x, total = ct
    start = (*index, *(0,) * of_x.ndim)
    part = lax.dynamic_slice(total, start, (*(1,) * len(index), *of_x.shape))
    return None, lax.dynamic_update_slice(total, part + of_x.astype(jnp.float32), start), None


with_gradient_added.defvjp(_with_gradient_added_forward, _with_gradient_added_backward)


def deal(x: jax.Array, repeats: int) -> jax.Array:
    """Layers [L/P, ...], sharded over P pipeline stages in order, given out anew: [V, L/(P*V), ...] for V repeats.

    Afterwards repeat r of stage s is run r*P + s of L/(P*V) layers, as the circular schedule wants them. In V rounds
    each stage sends one run and receives one; which, is a proper edge colouring of who needs what from whom.
    """
    stages = lax.axis_size(PIPELINE)
    x = x.reshape(repeats, x.shape[0] // repeats, *x.shape[1:])
    if stages == 1 or repeats == 1:
        return x
    me = axis_index(PIPELINE)
    apart = stages // math.gcd(stages, repeats)
    dealt = jnp.zeros_like(x)
    for turn in range(repeats):
        sent = [(turn + s // apart) % repeats for s in range(stages)]  # the run of its own that each stage sends
        runs = [s * repeats + sent[s] for s in range(stages)]  # its number in the whole model
        comes = {run % stages: run // stages for run in runs}  # to which stage, as which repeat
        assert len(comes) == stages, "each stage receives one"
        out = lax.dynamic_index_in_dim(x, jnp.asarray(sent)[me], 0, keepdims=False)
        out = lax.ppermute(out, PIPELINE, [(s, run % stages) for s, run in enumerate(runs)])
        place = jnp.asarray([comes[s] for s in range(stages)])[me]
        dealt = lax.dynamic_update_index_in_dim(dealt, out, place, 0)
    return dealt


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def move_weight(shard: jax.Array, moves: tuple[Gather | Exchange, ...], dtype: jnp.dtype) -> jax.Array:
    """A weight brought to where it is used: cast to ``dtype``, then moved, so that the cheap bytes travel.

    The gradient goes the other way in the *master* dtype: cast up, then reduce-scattered, so that summing over many
    devices does not round to bfloat16 (design section 8: reductions in float32).
    """
    x = shard.astype(dtype)
    for move in moves:
        if isinstance(move, Gather):
            x = all_gather(x, move.axis, move.dim)
        else:
            x = lax.all_to_all(x, move.axis, split_axis=move.onto, concat_axis=move.dim, tiled=True)
    return x


def _move_weight_forward(
    shard: jax.Array, moves: tuple[Gather | Exchange, ...], dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    return move_weight(shard, moves, dtype), jnp.zeros((0,), shard.dtype)


def _move_weight_backward(
    moves: tuple[Gather | Exchange, ...], dtype: jnp.dtype, like: jax.Array, ct: jax.Array
) -> tuple[jax.Array]:
    ct = ct.astype(like.dtype)
    for move in reversed(moves):
        if isinstance(move, Gather):
            ct = psum_scatter(ct, move.axis, move.dim)
        else:
            ct = lax.all_to_all(ct, move.axis, split_axis=move.dim, concat_axis=move.onto, tiled=True)
    return (ct,)


move_weight.defvjp(_move_weight_forward, _move_weight_backward)

"""The collectives of the manual region: the only communication in a step, so that it can be read and counted.

All of them are no-ops on a mesh axis of size 1 (libtpu 0.0.42 aborts on a reduce-scatter over one, and keeps an
all-reduce as a real operation). Call them only inside `jax.shard_map` over all of MESH_AXES with ``check_vma=True``.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from parallel.axes import MESH_AXES


def live(axes: Sequence[str]) -> tuple[str, ...]:
    """Those of ``axes`` that have more than one device."""
    return tuple(a for a in axes if lax.axis_size(a) > 1)


def vary(x: jax.Array, axes: Sequence[str] = MESH_AXES) -> jax.Array:
    """Mark ``x`` as different on each device along ``axes``.

    The transpose is a psum of the cotangent. Doing it once, before a loop, keeps that psum out of the loop.
    """
    missing = tuple(a for a in live(axes) if a not in jax.typeof(x).mat.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def psum(x: jax.Array, axes: str | Sequence[str]) -> jax.Array:
    """Sum over mesh axes; the result is the same on all their devices."""
    axes = live((axes,) if isinstance(axes, str) else axes)
    return lax.psum(vary(x, axes), axes) if axes else x


def pmax(x: jax.Array, axis: str) -> jax.Array:
    """Maximum over a mesh axis."""
    return lax.pmax(x, axis) if lax.axis_size(axis) > 1 else x


def all_gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Concatenate the shards of ``x`` along ``dim`` over a mesh axis."""
    return lax.all_gather(x, axis, axis=dim, tiled=True) if lax.axis_size(axis) > 1 else x


def psum_scatter(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Sum over a mesh axis, each device keeping its slice along ``dim``."""
    return lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True) if lax.axis_size(axis) > 1 else x


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

"""A stack of equal blocks: one module with a leading layer axis, run by `lax.scan`: compile time is flat in L."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from layers.region import Region
from parallel.collectives import with_gradient_added

M = TypeVar("M", bound=nnx.Module)


def stack(make: Callable[[jax.Array], M], num_layers: int, key: jax.Array) -> M:
    """``num_layers`` blocks made from keys split from ``key``, as one module whose arrays have a leading L."""
    return jax.vmap(make)(jax.random.split(key, num_layers))


def run(
    block: Callable[..., tuple[jax.Array, Any]],
    layers: M,
    x: jax.Array,
    region: Region,
    per_layer: Any = None,
    into: Any = None,
    repeat: Any = None,
) -> tuple[jax.Array, Any, Any]:
    """Apply the layers in order.

    Args:
        block: ``(layer, x, its slice of per_layer) -> (x, output)``; the layer's weights are ready for use.
        layers: module with a leading L on every array.
        x: the residual stream.
        region: says when weights are gathered and what is rematerialised.
        per_layer: pytree with a leading L (a cache), or None.
        into: where gradients of the layers go, instead of to the layers themselves, or None: like the layers, in
            float32 (`parallel.collectives.with_gradient_added`).
        repeat: which part of ``into``'s leading axis the layers are, where it has one more than they have.

    Returns:
        The residual stream after the last layer, the outputs stacked with a leading L, and ``into``, for whatever comes
        after.
    """
    if region.gather == "tick" and into is not None:  # what is added are gradients of the stage as a whole
        at = () if repeat is None else (repeat,)
        layers, into = _added(layers, into, at)

    def body(carry: tuple[jax.Array, Any], scanned: tuple[jax.Array, M, Any]) -> tuple[tuple[jax.Array, Any], Any]:
        (x, into), (index, layer, extra) = carry, scanned
        if region.gather != "tick" and into is not None:
            layer, into = _added(layer, into, (index,) if repeat is None else (repeat, index))
        x, output = block(region.use_layer(layer), x, extra)
        return (x, into), output

    scanned = (jnp.arange(len(jax.tree.leaves(layers)[0])), region.use_stage(layers), per_layer)
    (x, into), outputs = lax.scan(region.checkpoint(body), (x, into), scanned, unroll=region.unroll)
    return x, outputs, into


def _added(weights: Any, into: Any, at: tuple[Any, ...]) -> tuple[Any, Any]:
    """Weights whose gradients are added to a part of ``into``, and ``into``."""
    leaves, structure = jax.tree.flatten(weights)
    index = jnp.asarray(at, jnp.int32)
    pairs = [with_gradient_added(w, t, index) for w, t in zip(leaves, jax.tree.leaves(into), strict=True)]
    weights, into = (jax.tree.unflatten(structure, part) for part in zip(*pairs, strict=True))
    return weights, into

"""A stack of equal blocks: one module with a leading layer axis, run by `lax.scan`: compile time is flat in L."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import lax

from layers.region import Region

M = TypeVar("M", bound=nnx.Module)


def stack(make: Callable[[jax.Array], M], num_layers: int, key: jax.Array) -> M:
    """``num_layers`` blocks made from keys split from ``key``, as one module whose arrays have a leading L."""
    return jax.vmap(make)(jax.random.split(key, num_layers))


def run(
    block: Callable[..., tuple[jax.Array, Any]], layers: M, x: jax.Array, region: Region, per_layer: Any = None
) -> tuple[jax.Array, Any]:
    """Apply the layers in order.

    Args:
        block: ``(layer, x, its slice of per_layer) -> (x, output)``; the layer's weights are ready for use.
        layers: module with a leading L on every array.
        x: the residual stream.
        region: says when weights are gathered and what is rematerialised.
        per_layer: pytree with a leading L (a cache), or None.

    Returns:
        The residual stream after the last layer, and the outputs stacked with a leading L.
    """

    def body(x: jax.Array, scanned: tuple[M, Any]) -> tuple[jax.Array, Any]:
        layer, extra = scanned
        return block(region.use_layer(layer), x, extra)

    return lax.scan(region.checkpoint(body), x, (region.use_stage(layers), per_layer), unroll=region.unroll)

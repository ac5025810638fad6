"""Rotary position embedding, half-split form (LLaMA)."""

import jax
import jax.numpy as jnp


def angles(positions: jax.Array, width: int, base: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin of ``position * base^(-2i/width)``, i = 0 .. width/2 - 1, in float32.

    Args:
        positions: [B or 1, S] integers.
        width: number of head dimensions that rotate; even.
        base: 10000 in LLaMA (fact sheet 1.2).

    Returns:
        Two float32 arrays [B or 1, S, 1, width/2], to be used for all heads.
    """
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def rotate_half(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate pairs (x[i], x[i + width/2]) of the last dimension. [B, S, H, K] -> same, computed in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

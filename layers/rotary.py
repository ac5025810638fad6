"""Rotary position embedding: half-split over a whole head (LLaMA), or interleaved over its first dimensions (GPT-J)."""

import jax
import jax.numpy as jnp


def angles(
    positions: jax.Array, width: int, base: float, scaling: tuple[float, float, float, float] | None = None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of ``position * base^(-2i/width)``, i = 0 .. width/2 - 1, in float32.

    Args:
        positions: [B or 1, S] integers.
        width: number of head dimensions that rotate; even.
        base: 10000 in both models (fact sheet 1.1).
        scaling: (factor, low, high, context) of Llama 3.1: a wave that is longer than context/low turns ``factor``
            times slower, one shorter than context/high as ever, and what is between is interpolated by context/wave.

    Returns:
        Two float32 arrays [B or 1, S, 1, width/2], to be used for all heads.
    """
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if scaling is not None:
        factor, low, high, context = scaling
        waves = context * frequencies / (2 * jnp.pi)  # of a context
        kept = jnp.clip((waves - low) / (high - low), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angle = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def rotate_half(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate pairs (x[i], x[i + width/2]) of the last dimension. [B, S, H, K] -> same, computed in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rotate_pairs(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate neighbours (x[2i], x[2i + 1]) of the first dimensions of a head; the rest passes (fact sheet 1.6).

    Args:
        x: [B, S, H, K].
        cos: [B or 1, S, 1, width/2] with width <= K.
        sin: the same.

    Returns:
        [B, S, H, K] in x's dtype, computed in float32.
    """
    # Elementwise over the whole head, which fuses, where cutting it into pairs and a rest makes copies: the others turn
    # by an angle of 0.
    others = [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] - 2 * cos.shape[-1])]
    cos = jnp.pad(jnp.repeat(cos, 2, axis=-1), others, constant_values=1.0)
    sin = jnp.pad(jnp.repeat(sin, 2, axis=-1), others)
    y = x.astype(jnp.float32)
    first = jnp.arange(x.shape[-1]) % 2 == 0
    partner = jnp.where(first, -jnp.roll(y, -1, axis=-1), jnp.roll(y, 1, axis=-1))
    return (y * cos + partner * sin).astype(x.dtype)
